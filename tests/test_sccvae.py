"""SCCVAE and the discrepancy VAE: the published objectives against a plain re-statement, laws of the model, recovery of a known truth."""

import math
from dataclasses import replace
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pyro
import pyro.poutine as poutine
import pytest
import torch
from torch import Tensor
from torch.nn.functional import leaky_relu, softplus

import pyrocausal as pc
from pyrocausal.abduction import Abducted
from pyrocausal.loading import Batch, batches_by_condition
from pyrocausal.structural import solve


def screen(n_control: int = 60, n_cells: int = 40, n_genes: int = 12, seed: int = 0) -> ad.AnnData:
    """Four singles and a pair; Gaussian."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(["control", "A", "B", "C", "D", "A+B"], [n_control, *[n_cells] * 5])
    x = rng.standard_normal((len(labels), n_genes)).astype(np.float32)
    for i, name in enumerate("ABCD"):
        x[[name in label.split("+") for label in labels], i] += 2
    obs = pd.DataFrame({"perturbation": labels}, index=[f"c{i}" for i in range(len(labels))])
    return ad.AnnData(x, obs=obs, var=pd.DataFrame(index=[f"g{i}" for i in range(n_genes)]))


@pytest.fixture(scope="module")
def data() -> pc.PerturbationData:
    return pc.PerturbationData.from_anndata(screen(), kind="normalised")


def embedding(seed: int = 0) -> pd.DataFrame:
    return pd.DataFrame(np.random.default_rng(seed).standard_normal((5, 3)), index=["D", "B", "A", "C", "unused"])


def paired_batch(data: pc.PerturbationData, condition: str, n: int = 32) -> Batch:
    """Cells of one condition and control cells beside them, float64."""
    cells, controls = data.select(condition), data.select("control")
    batch = cells.batch(np.arange(n) % len(cells), dtype=torch.float64)
    return replace(batch, partner=controls.batch(np.arange(n), dtype=torch.float64).x)


# -- parity --------------------------------------------------------------------------------------------------------------------


def mlp(network: Any, h: Tensor) -> Tensor:
    """A multilayer perceptron from its weights alone."""
    weights = [(layer.weight, layer.bias) for layer in network if hasattr(layer, "weight")]
    for w, b in weights[:-1]:
        h = leaky_relu(h @ w.T + b, 0.2)
    w, b = weights[-1]
    return h @ w.T + b


def v_statistic(x: Tensor, y: Tensor) -> Tensor:
    """The reference's MMD by broadcasting: ten bandwidths, diagonals included."""
    total = torch.cat([x, y])
    distance = ((total[:, None] - total[None]) ** 2).sum(-1)
    kernel = sum(torch.exp(-distance / (1000 / 2**5 * 2**i)) for i in range(10))
    n = len(x)
    return (kernel[:n, :n] + kernel[n:, n:] - kernel[:n, n:] - kernel[n:, :n]).mean()


def loss_of(objective: Any, model: Any, guide: Any, batch: Batch, seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    return objective(model, guide)(batch)


@pytest.mark.parametrize("graph", ["full", "none", "random"])
@pytest.mark.parametrize("condition", ["A", "control"])
def test_sccvae_parity_is_the_published_objective(data: pc.PerturbationData, condition: str, graph: str) -> None:
    n, n_nodes, n_genes = 32, 8, 12
    model, guide = pc.build("sccvae_parity", data, n_latent=n_nodes, n_hidden=16, embedding=embedding(), graph=graph, seed=1)
    model.double(), guide.double()
    with torch.no_grad():
        model.c.copy_(torch.tensor([0.7, -1.2, 2.0, 0.3]))
    batch = paired_batch(data, condition)
    torch.manual_seed(0)
    trace = poutine.trace(guide).get_trace(batch)
    z = trace.nodes["z"]["value"]
    # the reference, equation by equation
    x, y = batch.partner, batch.x
    h = leaky_relu(mlp(guide.encoder, x), 0.2)
    mu, v = h @ guide.mu.weight.T + guide.mu.bias, torch.exp(h @ guide.log_v.weight.T + guide.log_v.bias) + 1e-4
    e = torch.tensor(embedding().loc[list(data.perturbations)].to_numpy(), dtype=torch.float32).double()
    t = torch.softmax(mlp(model.shift_encoder, e), -1)
    A = model.B * model.mask
    assert (A.triu(1) == A).all() and (graph != "full" or (A != 0).sum() == n_nodes * (n_nodes - 1) / 2)
    inverse = torch.linalg.inv(torch.eye(n_nodes, dtype=torch.float64) - A)
    S = 0.0 if condition == "control" else model.c[0] * t[0]
    x_hat, y_hat = mlp(model.decoder, z @ inverse), mlp(model.decoder, (z + S) @ inverse)
    kl = (0.5 * (v + mu**2 - 1 - v.log())).mean()
    L = 0.25 * ((x_hat - x) ** 2).mean() + ((y_hat - y) ** 2).mean() + kl + 10 * v_statistic(y_hat, y)
    # ours
    replayed = poutine.trace(poutine.replay(model, trace=trace)).get_trace(batch)
    torch.testing.assert_close(replayed.nodes["x_loc"]["value"], y_hat, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(replayed.nodes["x_control"]["fn"].mean, x_hat, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(replayed.nodes["u"]["value"], (z + S) @ inverse, rtol=1e-8, atol=1e-8)
    constant = n * n_genes * (math.log(model.sigma_control) + math.log(model.sigma_perturbed) + math.log(2 * math.pi))
    ours = loss_of(model.parity_objective(), model, guide, replace(batch, n_total=n)) - constant
    torch.testing.assert_close(ours, n * n_nodes * L, rtol=1e-6, atol=1e-6)
    whole = loss_of(model.parity_objective(), model, guide, replace(batch, n_total=320)) - 10 * constant
    torch.testing.assert_close(whole, 10 * n * n_nodes * L, rtol=1e-6, atol=1e-6)


def test_sccvae_parity_has_the_published_noise() -> None:
    model = pc.models.SCCVAEParity(8563, 3, n_latent=512, n_hidden=4)
    assert model.sigma_control == pytest.approx(5.78, abs=0.01) and model.sigma_perturbed == pytest.approx(2.89, abs=0.01)


@pytest.mark.parametrize("condition", ["A+B", "control"])
@pytest.mark.parametrize("progress", [0.0, 0.3, 1.0])
def test_discrepancy_vae_is_the_published_objective(data: pc.PerturbationData, condition: str, progress: float) -> None:
    n, n_genes, beta = 32, 12, 2.0
    model, guide = pc.build("discrepancy_vae", data, n_hidden=16, seed=1)
    model.double(), guide.double()
    with torch.no_grad():
        model.strength.copy_(torch.tensor([0.7, -1.2, 2.0, 0.3]))
        model.progress.fill_(progress)
    batch = replace(paired_batch(data, condition), n_total=n)
    torch.manual_seed(0)
    z = poutine.trace(guide).get_trace(batch).nodes["z"]["value"]
    x, y = batch.partner, batch.x
    mu, raw = mlp(guide.encoder, x).chunk(2, -1)
    v = softplus(raw) + 1e-8
    temperature, alpha = {0.0: (1.0, 0.0), 0.3: (1 + 4 * 0.25 / 0.95, 10 * 0.25 / 0.45), 1.0: (5.0, 10.0)}[progress]
    b = torch.softmax(temperature * mlp(model.target_encoder, torch.eye(4, dtype=torch.float64)), -1)
    inverse = torch.linalg.inv(torch.eye(4, dtype=torch.float64) - model.G.triu(1))
    S = 0.0 if condition == "control" else 0.7 * b[0] - 1.2 * b[1]
    x_hat, y_hat = (leaky_relu(mlp(model.decoder, (z + shift) @ inverse), 0.2) for shift in (0.0, S))
    kl = (0.5 * (v + mu**2 - 1 - v.log())).sum(-1).mean()
    L = alpha * v_statistic(y_hat, y) + ((x_hat - x) ** 2).mean() + beta * kl + 1e-3 * model.G.triu(1).abs().sum()
    constant = n * n_genes * (math.log(model.sigma) + 0.5 * math.log(2 * math.pi))
    ours = loss_of(model.parity_objective(), model, guide, batch) - constant
    torch.testing.assert_close(ours, n / beta * L, rtol=1e-6, atol=1e-6)


def test_minibatches_by_condition(data: pc.PerturbationData) -> None:
    count, parts = batches_by_condition(data, 16, np.random.default_rng(0))
    parts = list(parts)
    assert len(parts) == count
    controls = data.select("control").dense()
    seen = []
    for batch in parts:
        assert len(set(data.labels[batch.index])) == 1 and len(batch) <= 16
        assert batch.partner is not None and batch.x is not None and batch.partner.shape == batch.x.shape
        assert all((controls == row).all(1).any() for row in batch.partner.numpy())
        seen += batch.index.tolist()
    assert sorted(seen) == list(range(len(data)))  # no remainder is lost, unlike in the reference
    orders = [[b.index.tolist() for b in batches_by_condition(data, 16, np.random.default_rng(s))[1]] for s in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    with pytest.raises(pc.errors.DataError, match="no control cells"):
        batches_by_condition(data.select("A"), 16, np.random.default_rng(0))


@pytest.mark.parametrize("name", ["sccvae_parity", "discrepancy_vae"])
def test_the_published_objectives_train_and_save(data: pc.PerturbationData, name: str, tmp_path: Any) -> None:
    settings = {"n_latent": 4, "n_hidden": 16} | ({"embedding": embedding()} if name == "sccvae_parity" else {})
    model, guide = pc.build(name, data, **settings)
    batches = list(batches_by_condition(data, 32, np.random.default_rng(0))[1])

    def loss() -> float:  # at the weights that the schedules end with
        with torch.no_grad():
            return sum(float(loss_of(model.parity_objective(), model, guide, batch)) for batch in batches) / len(batches) / len(data)

    before = loss()
    fit = pc.fit(model, guide, data, max_epochs=30, batch_size=32, objective="parity", kl_warmup=(0.1, 1.0), validation=0.2, patience=None)
    assert loss() < before - 1
    assert fit.history["site:discrepancy"].iloc[-1] < 0 and np.isfinite(fit.history["validation"]).all()
    assert fit.history["kl_weight"].iloc[0] == 0 and fit.history["kl_weight"].iloc[-1] == pytest.approx(1.0)
    fit.save(tmp_path / "run")
    again = pc.load(tmp_path / "run")
    a, b = (pc.effects(f, ["A", "A+B"], draws=3, cells=8)["effect"] for f in (fit, again))
    np.testing.assert_array_equal(a, b)
    assert float(abs(a).max()) > 0


# -- the law of the exogenous state ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("equations", ["linear", "relu", "softplus"])
def test_abducted_has_the_density_of_the_programs(equations: str) -> None:
    torch.manual_seed(0)
    graph = torch.randn(5, 5, dtype=torch.float64).triu(1)
    a, v, shift = torch.randn(7, 5).double(), 0.2 + torch.rand(7, 5).double(), torch.randn(7, 5).double()
    law = Abducted(a, v, graph, shift, equations)
    z = law.rsample()
    u = solve(z + shift, graph, equations)
    expected = torch.distributions.Normal(a, v).log_prob(u).sum(-1)
    torch.testing.assert_close(law.log_prob(z), expected, rtol=1e-10, atol=1e-10)  # of the draw, remembered
    torch.testing.assert_close(law.log_prob(z.clone()), expected, rtol=1e-10, atol=1e-10)  # of any value, solved
    jacobian = torch.autograd.functional.jacobian(lambda w: solve(w + shift[0], graph, equations), z[0])
    assert torch.linalg.det(jacobian).item() == pytest.approx(1, abs=1e-10)
    standard = torch.distributions.Independent(torch.distributions.Normal(torch.zeros(5).double(), 1.0), 1)
    kl = torch.distributions.kl_divergence(law, standard) if equations == "linear" else None
    many = Abducted(a.expand(20000, 7, 5), v, graph, shift, equations)
    draws = many.rsample()
    difference = many.log_prob(draws) - standard.log_prob(draws)
    if kl is not None:
        error = difference.std(0) / len(difference) ** 0.5
        assert ((difference.mean(0) - kl).abs() < 5 * error).all()  # seven comparisons at five standard errors: false alarm 4e-6
        torch.testing.assert_close(law.second_moment(), draws.square().mean(0), rtol=0.1, atol=0.1)
    else:
        with pytest.raises(NotImplementedError):
            torch.distributions.kl_divergence(law, standard)


# -- laws of the model -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["linear", "relu"])
def fitted(request: pytest.FixtureRequest, data: pc.PerturbationData) -> pc.Fit:
    model, guide = pc.build("sccvae", data, n_latent=4, embedding=embedding(), equations=request.param, n_hidden=16)
    return pc.fit(model, guide, data, max_epochs=15, batch_size=32)


def programs(fit: pc.Fit, dose: Tensor, **more: Tensor) -> Tensor:
    """u of the same cells and tables at a dose, [n, D]."""
    batch = fit.reference.rows([0] * len(dose))
    torch.manual_seed(3)
    with torch.no_grad():
        trace = poutine.trace(fit.model).get_trace(batch)
        values = {k: trace.nodes[k]["value"] for k in ("z", "mask", "penetrance", "graph_weight")}
        intervened = pyro.do(poutine.condition(fit.model, data=values), data={"dose": dose, **more})
        return poutine.trace(intervened).get_trace(batch).nodes["u"]["value"]


def test_programs_are_affine_in_dose_and_penetrance_under_linear_equations(fitted: pc.Fit) -> None:
    eye = torch.eye(4)
    base, one, two = (programs(fitted, c * eye) for c in (0.0, 1.0, 2.0))
    curved = (two - 2 * one + base).abs().max()
    pair = programs(fitted, eye + eye.roll(1, 0)) - base
    apart = (one - base) + (programs(fitted, eye.roll(1, 0)) - base)
    if fitted.model.equations == "linear":
        assert curved < 1e-5 and (pair - apart).abs().max() < 1e-5
    zero = programs(fitted, eye, penetrance=torch.zeros(4))
    assert torch.equal(zero, base)  # no penetrance, no shift: the very same programs


def test_a_perturbation_without_its_target_does_nothing(data: pc.PerturbationData) -> None:
    fit = pc.fit(*pc.build("sccvae", data, n_latent=4, n_hidden=16), data, max_epochs=15, batch_size=32)
    target = int(fit.guide.table.logits[0].argmax())
    effect = pc.effects(fit, pc.perturb("A") & pc.flip_target("A", target), draws=1, cells=8)["effect"]
    plain = pc.effects(fit, "A", draws=1, cells=8)["effect"]
    assert float(abs(effect).max()) < 1e-5 < 0.2 < float(abs(plain).max())


def test_no_graph_leaves_the_shifted_state(data: pc.PerturbationData) -> None:
    model, guide = pc.build("sccvae", data, n_latent=4, graph="none", n_hidden=16)
    batch = data.batch([0, 70, 130])
    trace = poutine.trace(model).get_trace(batch)
    torch.testing.assert_close(trace.nodes["u"]["value"], trace.nodes["z"]["value"] + trace.nodes["shift"]["value"], rtol=0, atol=0)
    assert trace.nodes["graph"]["value"].abs().max() == 0
    assert pc.fit(model, guide, data, max_epochs=2).history["elbo"].notna().all()


@pytest.mark.parametrize("equations", ["linear", "relu"])
def test_a_given_graph_whose_programs_are_numbered_otherwise(data: pc.PerturbationData, equations: str) -> None:
    given = np.zeros((4, 4))
    given[3, 1] = given[1, 0] = given[3, 2] = 1
    model, guide = pc.build("sccvae", data, n_latent=4, graph=given, equations=equations, n_hidden=16)
    fit = pc.fit(model, guide, data, max_epochs=20, batch_size=64)
    assert set(zip(*np.nonzero(guide.edges.mean().numpy()), strict=True)) == {(3, 1), (1, 0), (3, 2)}
    batch = data.batch([0, 70, 130])
    with torch.no_grad():
        guided = poutine.trace(guide).get_trace(batch)
        nodes = poutine.trace(poutine.replay(model, trace=guided)).get_trace(batch).nodes
    u, A = nodes["u"]["value"], nodes["graph"]["value"]
    link = u if equations == "linear" else u.relu()
    torch.testing.assert_close(u, nodes["z"]["value"] + nodes["shift"]["value"] + link @ A, rtol=1e-4, atol=1e-5)
    z = nodes["z"]["value"]
    law = guided.nodes["z"]["fn"]
    torch.testing.assert_close(law.log_prob(z.clone()), law.log_prob(z), rtol=1e-3, atol=1e-3)
    down = pc.effects(fit, pc.clamp(0, 5.0), draws=2, cells=8)["effect"]  # program 0 is the last effect
    assert float(abs(down).max()) > 0
    assert float(abs(pc.effects(fit, pc.set_edge(3, 0, 1.0), draws=2, cells=8)["effect"]).max()) > 0  # forward in its order
    with pytest.raises(pc.errors.InterventionError):
        pc.effects(fit, pc.set_edge(0, 3, 1.0), draws=2, cells=8)
    with pytest.raises(ValueError, match="against the numbering"):
        pc.models.SCCVAEParity(12, 4, n_latent=4, graph=given, n_hidden=4)


def test_rescaling_the_programs_changes_nothing_but_their_units(fitted: pc.Fit, data: pc.PerturbationData) -> None:
    import copy

    model, guide = copy.deepcopy(fitted.model), copy.deepcopy(fitted.guide)
    batch = data.batch()
    s = torch.tensor([0.5, 2.0, 1.0, 3.0])

    def seen() -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            u, _ = guide.encode(batch)
            e = u - (u if guide.equations == "linear" else u.relu()) @ guide.edges.mean()
            return model.decoder(u), e - batch.dose @ guide.table.expected()

    before, z = seen()
    guide.rescale(model, s)
    after, rescaled = seen()
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(rescaled * s, z, rtol=1e-3, atol=1e-3)


def test_closed_form_of_target_and_penetrance_is_the_exact_posterior() -> None:
    """Against brute-force integration over a grid of penetrances, each target in turn."""
    from pyrocausal.guides.sccvae import TargetTable

    torch.manual_seed(0)
    n, n_latent = 30, 3
    m, tau = torch.tensor([0.5, -0.3, 1.0], dtype=torch.float64), torch.tensor([0.8, 0.5, 1.5], dtype=torch.float64)
    e = torch.randn(n, n_latent).double() + torch.tensor([0.0, 0.4, 0.1]).double()
    log_prior = torch.tensor([[0.2, 0.5, 0.3]]).double().log()
    table = TargetTable(1, n_latent, None).double()
    table.gram.fill_(n)
    table.cross.copy_(e.sum(0, keepdim=True))
    table.update(torch.zeros(n_latent, n_latent).double(), log_prior, m, tau)
    grid = torch.linspace(-8, 8, 40001, dtype=torch.float64)
    evidence, means, deviations = [], [], []
    for k in range(n_latent):
        prior = -0.5 * ((grid - m[k]) / tau[k]) ** 2 - tau[k].log()
        joint = prior + grid * e[:, k].sum() - 0.5 * n * grid**2  # log-likelihood but for a constant that all targets share
        weight = joint.softmax(0)
        evidence.append(joint.logsumexp(0))
        means.append((weight * grid).sum())
        deviations.append((weight * (grid - means[-1]) ** 2).sum().sqrt())
    expected = (torch.stack(evidence) + log_prior[0]).softmax(0)
    torch.testing.assert_close(table.logits.softmax(-1)[0], expected, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(table.loc[0], torch.stack(means), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(table.scale[0], torch.stack(deviations), rtol=1e-8, atol=1e-8)


# -- the toy of the discrepancy VAE ------------------------------------------------------------------------------------------------


@pytest.mark.longest
def test_the_chain_is_found_and_pairs_follow() -> None:
    """One row of ``benchmarks/sccvae.py chain``; the published fit of the toy has three wrong edges."""
    from pyrocausal import simulate_graph
    from pyrocausal.discrepancy import TRAINING_BANDWIDTHS, mmd

    adata = simulate_graph.chain_screen()
    data = pc.PerturbationData.from_anndata(adata, kind="normalised")
    settings = {"equations": "relu", "decoder": "linear", "noise_floor": 0.3, "encoder_layers": 0, "targets": np.eye(5)}
    model, guide = pc.build("sccvae", data, n_latent=5, **settings)
    train = data[(adata.obs["split"] == "train").to_numpy()]
    fit = pc.fit(model, guide, train, max_epochs=180, batch_size=512, lr=0.02, kl_warmup=0.0)
    found, true = guide.edges.mean().numpy(), adata.uns["truth"]["graph"]
    assert ((np.abs(found) > 0.3) == (true != 0)).all()
    assert found[true != 0].min() >= 0.85 and found[true != 0].max() <= 1.05 and np.abs(found[true == 0]).max() <= 0.12
    assert np.abs(guide.table.loc.numpy()[np.eye(5) > 0] - 5).max() < 0.5  # within 10 %
    for label, published in (("pert2", 0.038), ("pert0+pert3", 0.087)):
        real = torch.as_tensor(data.select(label)[:256].dense())
        fake = pc.interventional(fit, label, draws=1, cells=256, noise="independent")["expression"].to_numpy()[0, 0]
        assert float(mmd(torch.as_tensor(fake), real, TRAINING_BANDWIDTHS, unbiased=False)) < published
    assert pc.identifiability(fit)["edge"].status == "up to permutation and scale"
