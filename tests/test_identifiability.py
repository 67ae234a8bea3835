"""The fold: a free decoder absorbs a linear graph, exactly; and the signs of a collapsed posterior."""

import anndata as ad
import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch

import pyrocausal as pc
from pyrocausal.identifiability import fold
from pyrocausal.nn import Loadings

N_LATENT, N_GENES = 6, 30


def screen(seed: int = 0, n_latent: int = 8, n_genes: int = 80, noise: float = 0.5, n: int = 1200) -> ad.AnnData:
    """Gaussian expression of independent factors, each perturbation on one of them."""
    rng = np.random.default_rng(seed)
    labels = np.array(["control", *(f"p{i}" for i in range(n_latent))])[np.arange(n) % (n_latent + 1)]
    u = rng.standard_normal((n, n_latent))
    for i in range(n_latent):
        u[labels == f"p{i}", i] += 2
    x = u @ rng.standard_normal((n_latent, n_genes)) + noise * rng.standard_normal((n, n_genes))
    obs = pd.DataFrame({"perturbation": labels}, index=[f"c{i}" for i in range(n)])
    return ad.AnnData(x.astype(np.float32), obs=obs, var=pd.DataFrame(index=[f"g{i}" for i in range(n_genes)]))


def model_of(decoder: str, equations: str = "linear", **more: object) -> pc.models.SCCVAE:
    torch.manual_seed(0)
    anchors = None
    if decoder == "anchored":
        anchors = torch.eye(N_LATENT).repeat_interleave(N_GENES // N_LATENT, 1)
    model = pc.models.SCCVAE(
        N_GENES, 4, n_latent=N_LATENT, decoder=decoder, anchors=anchors, equations=equations, likelihood="gaussian", **more
    )
    if isinstance(model.decoder, Loadings) and model.decoder.rest is not None:
        torch.nn.init.normal_(model.decoder.rest.last.weight)
    return model


@pytest.mark.parametrize("decoder", ["mlp", "linear"])
def test_a_free_decoder_absorbs_a_linear_graph_exactly(decoder: str) -> None:
    model = model_of(decoder).double()
    batch = pc.PerturbationData.from_anndata(screen(n_latent=4, n_genes=N_GENES), kind="normalised").batch(range(200), dtype=torch.float64)
    graph = torch.randn(N_LATENT, N_LATENT, dtype=torch.float64).triu(1)
    values = {n: s["value"] for n, s in poutine.trace(model).get_trace(batch).nodes.items() if n in ("z", "mask", "penetrance")}

    def outputs(m: torch.nn.Module, g: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return poutine.trace(pyro.do(poutine.condition(m, data=values), data={"graph": g})).get_trace(batch).nodes["x_loc"]["value"]

    with_graph, without = outputs(model, graph), outputs(fold(model, graph), torch.zeros_like(graph))
    torch.testing.assert_close(without, with_graph, rtol=1e-10, atol=1e-10)
    assert (outputs(model, torch.zeros_like(graph)) - with_graph).abs().max() > 0.1  # the graph did something
    bent = model_of(decoder, "relu").double()
    difference = (outputs(fold(bent, graph), torch.zeros_like(graph)) - outputs(bent, graph)).abs().max()
    assert difference > 0.01  # and what the equations bend is not absorbed


@pytest.mark.parametrize(
    ("decoder", "equations", "status"),
    [
        ("mlp", "linear", "not identified"),
        ("linear", "linear", "not identified"),
        ("mlp", "relu", "not identified"),
        ("linear", "relu", "up to permutation and scale"),
        ("linear", "softplus", "up to permutation and scale"),
        ("anchored", "linear", "identified"),
        ("anchored", "relu", "identified"),
    ],
)
def test_verdicts(decoder: str, equations: str, status: str) -> None:
    found = pc.identifiability(model_of(decoder, equations))
    assert found["edge"].status == found["clamp"].status == status
    assert found["shift"].status == "identified"
    assert found.folds == (equations == "linear" and decoder != "anchored")
    assert status in str(found)


def test_verdicts_without_a_graph() -> None:
    for decoder, clamp in (("mlp", "not identified"), ("anchored", "identified")):
        found = pc.identifiability(model_of(decoder, graph="none"))
        assert found["edge"].status == "not identified" and found["clamp"].status == clamp and found.fold_error is None
    assert pc.identifiability(pc.models.SAMSVAE(N_GENES, 4, n_latent=3))["clamp"].status == "not identified"


def test_published_models_are_found_out() -> None:
    for model in (pc.models.SCCVAEParity(N_GENES, 4, n_latent=5, n_hidden=8), pc.models.DiscrepancyVAE(N_GENES, 4, n_hidden=8)):
        found = pc.identifiability(model)
        assert found.folds and found["edge"].status == "not identified"
    assert not pc.identifiability(pc.models.DiscrepancyVAE(N_GENES, 4, n_hidden=0, equations="relu")).folds


def test_check_model_says_what_is_identified_and_whether_it_collapsed() -> None:
    data = pc.PerturbationData.from_anndata(screen(n=200), kind="normalised")
    model, guide = pc.build("sccvae", data, n_latent=4, n_hidden=8)
    report = pc.check_model(model, guide, data)
    assert report and any("edge questions: not identified" in m for m in report.about("warning"))
    assert not any("no names" in m for m in report.about("warning"))  # factors have no dimension to name
    assert any("shift questions: identified" in m for m in report.about("note")) and "collapse" not in str(report)
    assert "collapse:" in str(pc.check_model(model, guide, data, fitted=True))


def test_a_model_without_programs_is_refused() -> None:
    class Bare(pyro.nn.PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.shape = (4, 2)
            self.loc = torch.nn.Parameter(torch.zeros(N_GENES))

        def forward(self, batch: object) -> None:
            with batch.cells():
                pyro.sample("x", dist.Normal(self.loc, 1.0).to_event(1), obs=batch.x)

    with pytest.raises(pc.errors.ContractError, match="no site 'u'"):
        pc.identifiability(Bare())


# -- collapse --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sccvae", "sams_vae"])
def test_a_model_of_eight_factors_uses_them(name: str) -> None:
    data = pc.PerturbationData.from_anndata(screen(), kind="normalised")
    train, test = data.split("cells", test=0.3)
    fit = pc.fit(*pc.build(name, data, n_latent=10, n_hidden=32), train, max_epochs=200, batch_size=128)
    found = pc.collapse(fit, test)
    assert found.active_units >= 7 and found.kl > 4 and found.worsening > 0.2 and not found
    assert "the cell matters" in str(found)


def test_a_collapsed_model_is_found_out() -> None:
    data = pc.PerturbationData.from_anndata(screen(), kind="normalised")
    model, guide = pc.build("sccvae", data, n_latent=4, n_hidden=16)
    fit = pc.fit(model, guide, data, max_epochs=1)
    with torch.no_grad():
        guide.encoder.scale(torch.full((4,), 1e-4))
        guide.encoder.log_v.fill_(0.0)
        guide.encoder.rest.last.weight.zero_()
        guide.encoder.rest.last.bias.zero_()
        guide.edges.weight.zero_()
        guide.edges.log_scale.fill_(-10.0)
    found = pc.collapse(fit, data.select("control"))  # q(z | x) = p(z)
    assert found and found.active_units == 0 and abs(found.kl) < 0.1 and abs(found.worsening) < 0.05
    assert "hardly matters" in str(found)


def test_shuffling_stays_within_the_condition() -> None:
    from pyrocausal.collapse import _other_of_condition

    labels = np.random.default_rng(0).choice(list("abc"), 60).astype(object)
    labels[0] = "alone"
    other = _other_of_condition(labels, 0)
    assert (labels[other] == labels).all() and sorted(other) == list(range(60)) and (other[1:] != np.arange(1, 60)).all() and other[0] == 0


def test_a_diffusion_says_how_much_of_its_direction_the_targets_fix() -> None:
    """Counted by hand, and against the rank of the equations ``delta S^-1 (Q + D/2) = -c e_t``, skew Q, of random systems."""
    rng = np.random.default_rng(0)
    d = 6
    rows, cols = np.triu_indices(d, 1)
    for k in (0, 2, 4, 5, 6):
        blocks = []
        for _ in range(k):
            a, t = rng.normal(size=d), rng.integers(d)
            block = np.zeros((d, len(rows) + k))
            for n, (i, j) in enumerate(zip(rows, cols, strict=True)):  # (a Q)_j += a_i Q_ij, (a Q)_i -= a_j Q_ij
                block[j, n] += a[i]
                block[i, n] -= a[j]
            block[t, len(rows) + len(blocks)] = 1.0  # the size of the push is free
            blocks.append(block)
        free = len(rows) + k - (np.linalg.matrix_rank(np.concatenate(blocks)) if blocks else 0)
        assert free == (d - k) * (d - k - 1) // 2
        verdict = pc.identifiability(pc.models.LinearLCD(d, 7, own_genes=[*range(k), *[-1] * (7 - k)]))["edge"]
        assert verdict.status == ("identified" if free == 0 else "in part")
        assert f"leaves {free} of 15" in verdict.because
    assert pc.identifiability(pc.models.LCD(4, 2))["edge"].status == "not identified"
