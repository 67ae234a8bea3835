"""Direct effects: the map and its inverse, the closed form against brute force, and recovery where genes respond beside the programs."""

from __future__ import annotations

from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pyrocausal as pc
from pyrocausal.closed_form import conditions_of, shrunk_effects
from pyrocausal.direct import LEAST_SHARE, MOST_SD, move, predicted_levels
from pyrocausal.errors import PyrocausalError
from pyrocausal.structural import mechanism_shift

N_GENES, PERTURBATIONS = 40, [f"g{i}" for i in range(8)]


def shares(rng: np.random.Generator, n: int, n_genes: int) -> torch.Tensor:
    return torch.as_tensor(rng.dirichlet(np.full(n_genes, 5.0), n))


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(st.integers(0, 10**6))
def test_a_direct_effect_is_a_fold_change_of_cells_and_of_their_mean(seed: int) -> None:
    """float64."""
    rng = np.random.default_rng(seed)
    x, d = torch.as_tensor(rng.gamma(0.3, 5.0, (7, 20))), torch.as_tensor(rng.normal(0, 1, (2, 20)))
    moved = move(x, d[0], True)
    torch.testing.assert_close(moved.mean(0).log() - x.mean(0).log(), d[0], rtol=0, atol=1e-10)
    torch.testing.assert_close(move(moved, -d[0], True), x, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(move(moved, d[1], True), move(x, d.sum(0), True), rtol=1e-12, atol=1e-12)  # two perturbations add
    torch.testing.assert_close(move(move(x, d[0], False), -d[0], False), x, rtol=0, atol=1e-12)
    assert torch.equal(move(x, 0 * d[0], True), x)


def screen(kind: str, seed: int, strength: float = 1.2, cells: int = 60) -> tuple[ad.AnnData, np.ndarray]:
    """Two programs that two halves of the perturbations move, and the gene that each perturbation targets, which falls by ``strength``.

    The truth: what each does to the mean of untreated cells, [P, G], on the scale of effects.
    """
    rng = np.random.default_rng(seed)
    loadings = rng.normal(0, 0.5, (2, N_GENES))
    effect = np.zeros((8, 2))
    effect[:4, 0], effect[4:, 1] = 1.5, -1.5
    direct = np.zeros((8, N_GENES))
    direct[np.arange(8), np.arange(8)] = -strength
    treat = np.r_[np.full(300, -1), np.repeat(np.arange(8), cells)]
    z = rng.normal(0, 1, (len(treat), 2))
    base = rng.normal(0, 0.5, N_GENES)

    def level(z: np.ndarray, p: int) -> np.ndarray:
        u = z + (effect[p] if p >= 0 else 0)
        eta = base + u @ loadings
        if kind == "counts":
            share = np.exp(eta) / np.exp(eta).sum(1, keepdims=True)
            return np.asarray(share * np.exp(direct[p] if p >= 0 else 0))  # not quite the model's scale
        return np.asarray(eta + (direct[p] if p >= 0 else 0))

    mean = np.stack([level(z[i : i + 1], int(p))[0] for i, p in enumerate(treat)])
    if kind == "counts":
        library = rng.lognormal(np.log(1500), 0.3, (len(treat), 1))
        x = rng.poisson(library * mean)
    else:
        x = mean + rng.normal(0, 0.5, mean.shape)
    labels = ["control" if p < 0 else f"g{p}" for p in treat]
    adata = ad.AnnData(
        x.astype(np.float32),
        obs=pd.DataFrame({"perturbation": labels}, index=[f"c{i}" for i in range(len(labels))]),
        var=pd.DataFrame(index=[f"g{i}" for i in range(N_GENES)]),
    )
    fresh = rng.normal(0, 1, (100_000, 2))
    means = np.stack([level(fresh, p).mean(0) for p in range(-1, 8)])
    y = np.log1p(1e4 * means) if kind == "counts" else means
    return adata, y[1:] - y[0]


def fit(name: str, data: pc.PerturbationData, epochs: int = 60, **settings: object) -> pc.Fit:
    return pc.fit(*pc.build(name, data, n_latent=4, **settings), data, max_epochs=epochs, batch_size=128, progress=False)


def programs_alone(f: pc.Fit, data: pc.PerturbationData) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What the programs of a fit say, without its direct effects: as :func:`predicted_levels`."""
    got = f.guide.direct
    known = {k: v.clone() for k, v in got.state_dict().items()}
    for value in got.state_dict().values():
        value.zero_()
    out = predicted_levels(f.model, f.guide, data, list(range(8)), seed=f.settings["seed"])
    got.load_state_dict(known)
    return out


@pytest.mark.longest
@pytest.mark.parametrize("kind", ["counts", "normalised"])
def test_genes_that_respond_beside_the_programs_are_found_and_the_effects_are_right(kind: str) -> None:
    """Three seeds, errors against a simulated truth: of all genes, and of the one that each perturbation targets."""
    own = np.arange(8), np.arange(8)
    errors: dict[str, list[list[float]]] = {"programs": [], "direct": [], "additive_eb": []}
    for seed in range(3):
        adata, truth = screen(kind, seed)
        data = pc.PerturbationData.from_anndata(adata, kind=kind)
        f, eb = fit("sams_vae_direct", data, epochs=100), pc.fit(*pc.build("additive_eb", data), data, progress=False)
        base, levels, _ = programs_alone(f, data)
        said = {"programs": levels - base}
        for name, found in (("direct", f), ("additive_eb", eb)):
            said[name] = pc.effects(found, PERTURBATIONS, draws=100, cells=64)["effect"].mean("draw").to_numpy()
        for name, effect in said.items():
            errors[name].append([float(np.sqrt(((effect - truth)[where] ** 2).mean())) for where in (..., own)])
    mean = {k: np.mean(v, 0) for k, v in errors.items()}
    assert mean["programs"][1] > 0.9  # a decoder of four programs says next to nothing of a single gene, which falls by 1.2
    assert mean["direct"][1] < 0.4 * mean["programs"][1], mean
    assert mean["direct"][0] < 0.7 * mean["programs"][0] and mean["direct"][0] < mean["additive_eb"][0], mean


def test_without_programs_it_is_the_shrunk_additive_estimate() -> None:
    """A decoder that says the same of every cell leaves all to the direct effects: the closed form of the measured means, and its law."""
    adata, _ = screen("counts", 0)
    data = pc.PerturbationData.from_anndata(adata, kind="counts")
    model, guide = pc.build("sams_vae_direct", data, n_latent=2)
    guide.initialise(model, data)
    with torch.no_grad():
        model.decoder.last.weight.zero_()
    rows = list(range(8))
    base, levels, spread = predicted_levels(model, guide, data, rows, seed=0)
    share = model.decoder.last.bias.detach().double().softmax(-1).numpy()
    np.testing.assert_allclose(base, np.log1p(1e4 * share), atol=1e-4)
    np.testing.assert_allclose(levels, np.tile(base, (8, 1)), atol=1e-4)
    assert (spread < 1e-8).all()
    guide.after_training(model, data, 0, False)
    c = conditions_of(data)
    want = shrunk_effects(c, 8, shared=False)
    got = guide.direct
    f0, f = 1 - np.exp(-want.control), 1 - np.exp(-want.control - want.effect)  # dy / dlog share
    v, sd = want.control_sd / f0, want.effect_sd / f
    assert max(v.max(), sd.max()) < MOST_SD
    np.testing.assert_allclose(got.offset_sd.numpy(), v, rtol=1e-3)
    np.testing.assert_allclose(got.direct_sd.numpy(), sd, rtol=1e-3)
    np.testing.assert_allclose(got.weight.numpy(), -want.on_control, atol=1e-4)
    np.testing.assert_allclose(model.direct.direct_scale.numpy(), np.minimum(want.prior_effect / f, MOST_SD), rtol=1e-3)
    fit = pc.fit(model, guide, data, max_epochs=1, lr=0.0, progress=False)
    answer = pc.effects(fit, PERTURBATIONS, draws=4000, cells=1, seed=1)
    for told, mean, spread in (
        (answer["baseline"], want.control, want.control_sd),
        (answer["effect"], want.effect, np.sqrt(want.effect_sd**2 + (want.on_control * want.control_sd) ** 2)),
    ):
        error = np.abs(told.mean("draw").to_numpy() - mean) / (told.std("draw").to_numpy() / np.sqrt(4000))
        assert np.median(error) < 2 and error.max() < 6
        np.testing.assert_allclose(told.std("draw").to_numpy(), spread, rtol=0.15)


def test_without_a_shared_shift_shrinkage_is_that_of_each_effect_to_zero() -> None:
    """Brute force: of one gene alone given tau and k, E[e | y] by the joint Gaussian law of control and perturbations, float64."""
    adata, _ = screen("normalised", 1)
    c = conditions_of(pc.PerturbationData.from_anndata(adata, kind="normalised"))
    found = shrunk_effects(c, 8, shared=False)
    for g in (0, 7, 30):
        prior = found.prior_effect[:, g] ** 2
        # y_p - y_c = e_p + noise, the control's noise common to all: E[e | y] = K (K + S)^-1 (y - y_c) under a flat a
        s = np.diag(c.variance[:, g]) + c.control_variance[g]
        k = np.diag(prior)
        np.testing.assert_allclose(found.effect[:, g], k @ np.linalg.solve(k + s, c.effect[:, g]), rtol=1e-5, atol=1e-10)
    assert np.abs(found.shared).max() < 1e-6


@pytest.fixture(scope="module")
def fitted() -> tuple[pc.PerturbationData, pc.Fit]:
    data = pc.PerturbationData.from_anndata(screen("counts", 5)[0], kind="counts")
    return data, fit("sams_vae_direct", data, epochs=20)


def test_the_law_of_the_answer_is_that_of_programs_and_measured_means(fitted: tuple[pc.PerturbationData, pc.Fit]) -> None:
    """The mean of an effect lies between what the programs say and what was measured; its spread is ``w s^2 + (1 - w)^2 V``."""
    data, f = fitted
    c, got = conditions_of(data), f.guide.direct
    base, levels, spread = programs_alone(f, data)
    assert np.isfinite(base).all()
    w, y0 = got.weight.numpy().astype(float), c.control[None]
    answer = pc.effects(f, PERTURBATIONS, draws=1000, cells=64, seed=3)
    said = answer["effect"]
    between = levels - base + w * (c.mean - levels - (y0 - base))  # given the control; y_0 is measured well here
    error = np.abs(said.mean("draw").to_numpy() - between)
    assert np.median(error) < 0.01 and (error < 0.1).mean() > 0.99
    slope = 1 - np.exp(-answer["expression"].mean("draw").to_numpy())
    own = np.maximum(w * c.variance - w * (2 - w) * spread, LEAST_SHARE * w * c.variance)
    np.testing.assert_allclose((slope * got.direct_sd.numpy()) ** 2, own, rtol=0.1, atol=1e-7)
    whole = own + spread + (w * slope * got.offset_sd.numpy()) ** 2
    ratio = said.var("draw").to_numpy() / whole
    assert 0.8 < np.median(ratio) < 1.25 and (np.abs(np.log(ratio)) < np.log(2)).mean() > 0.95


def test_the_encoder_sees_cells_without_their_direct_effects(fitted: tuple[pc.PerturbationData, pc.Fit]) -> None:
    data, f = fitted
    batch = data.select("g3").batch(np.arange(10))
    d = f.guide.direct.offset + mechanism_shift(batch.dose, f.guide.direct.direct)
    seen = f.guide.direct.undone(batch, True)
    torch.testing.assert_close(seen.x, batch.x * (-d).exp())
    assert (seen.x[:, 3] >= batch.x[:, 3]).all() and (seen.x[:, 3] > batch.x[:, 3]).any()  # the target's expression is given back
    factual = pc.counterfactual(f, data.select("g3")[:10], "g3", draws=3, units="counts")
    np.testing.assert_array_equal(factual["expression"][0, 0], data.select("g3")[:10].dense())
    rescued = pc.counterfactual(f, data.select("g3")[:10], pc.untreated(), draws=20, noise="mean")["effect"].mean(("draw", "cell"))
    assert float(rescued[0, 3]) > 0.5


def test_saved_and_read_again_it_answers_the_same(fitted: tuple[pc.PerturbationData, pc.Fit], tmp_path: Path) -> None:
    _, f = fitted
    f.save(tmp_path / "run")
    again = pc.load(tmp_path / "run")
    a, b = (pc.effects(x, ["g0", "g0+g5"], draws=5, cells=8) for x in (f, again))
    np.testing.assert_array_equal(a["effect"], b["effect"])
    posterior = pc.to_inference_data(f, draws=10).posterior
    assert posterior["direct"].dims[-2:] == ("perturbation", "gene") and posterior["offset"].dims[-1:] == ("gene",)


def test_a_pair_that_is_fitted_again_or_estimated_twice_has_the_same_direct_effects(fitted: tuple[pc.PerturbationData, pc.Fit]) -> None:
    data, f = fitted
    before = {k: v.clone() for k, v in f.guide.direct.state_dict().items()}
    f.guide.after_training(f.model, data, f.settings["seed"], False)
    assert all(torch.equal(before[k], v) for k, v in f.guide.direct.state_dict().items())
    f.guide.initialise(f.model, data)
    assert not f.guide.direct.known and not f.guide.direct.direct.any() and (f.model.direct.direct_scale < 1e-5).all()
    f.guide.after_training(f.model, data, f.settings["seed"], False)


def test_a_batch_is_no_effect_of_the_perturbations_that_it_holds() -> None:
    """Two batches, 1 apart in half of the genes; four perturbations are nearly all in the first, four in the second."""
    adata, truth = screen("normalised", 2)
    rng = np.random.default_rng(0)
    code = np.array([-1 if p == "control" else int(p[1]) for p in adata.obs["perturbation"]])
    batch = rng.random(len(code)) < np.where(code < 0, 0.5, np.where(code < 4, 0.1, 0.9))
    by_batch = np.where(np.arange(N_GENES) < N_GENES // 2, 1.0, 0.0)
    adata.X = adata.X + np.where(batch[:, None], by_batch, 0.0).astype(np.float32)
    adata.obs["batch"] = np.where(batch, "b", "a")
    data = pc.PerturbationData.from_anndata(adata, kind="normalised", batch_key="batch")
    side = np.where(np.arange(8) < 4, -0.4, 0.4)[:, None] * by_batch  # what an estimate that knows no batches adds
    slope = {}
    for name in ("sams_vae", "sams_vae_direct", "additive_eb"):
        found = fit(name, data, epochs=60) if name != "additive_eb" else pc.fit(*pc.build(name, data), data, progress=False)
        error = pc.effects(found, PERTURBATIONS, draws=50, cells=64)["effect"].mean("draw").to_numpy() - truth
        slope[name] = float((error * side).sum() / (side**2).sum())
    assert slope["additive_eb"] > 0.9 and slope["sams_vae"] < 0.7  # the programs have learned a part of it so far
    assert slope["sams_vae_direct"] < slope["sams_vae"] + 0.1, slope


def test_an_adapted_perturbation_has_programs_and_a_usual_spread(fitted: tuple[pc.PerturbationData, pc.Fit]) -> None:
    data, _ = fitted
    train, rest = data.split("perturbations", test=["g7"], seed=0)
    few = fit("sams_vae_direct", train, epochs=10)
    adapted = pc.adapt(few, rest.select("g7"))
    got, row = adapted.guide.direct, list(adapted.coords["perturbation"]).index("g7")
    known = torch.arange(8) != row
    assert not got.direct[row].any() and not got.weight[row].any()
    torch.testing.assert_close(got.direct_sd[row], adapted.model.direct.direct_scale[known].square().mean(0).sqrt())
    assert float(pc.effects(adapted, "g7", draws=20, cells=8)["effect"].std("draw").mean()) > 0.01


def test_what_cannot_be_estimated_is_refused_before_the_fit() -> None:
    data = pc.PerturbationData.from_anndata(screen("counts", 0)[0], kind="counts")
    steps: list[int] = []
    for given_settings, part, said in (
        ({"likelihood": "gaussian"}, data, "needs a likelihood of counts data"),
        ({}, data[~data.is_control], "0 control cells"),
    ):
        with pytest.raises(PyrocausalError, match=said):
            pc.fit(*pc.build("sams_vae_direct", part, **given_settings), part, progress=False, callback=lambda e, r: steps.append(e))
    model, guide = pc.build("sams_vae", data)[0], pc.build("sams_vae_direct", data)[1]
    with pytest.raises(PyrocausalError, match="give both the same"):
        pc.fit(model, guide, data, progress=False, callback=lambda e, r: steps.append(e))
    assert not steps


def test_guides_that_do_not_infer_them_refuse() -> None:
    data = pc.PerturbationData.from_anndata(screen("counts", 0)[0], kind="counts")
    with pytest.raises(PyrocausalError, match="take the guide SAMSVAE"):
        pc.fit(*pc.build("sams_vae_mean_field", data, direct=True), data, max_epochs=1, progress=False)
