"""Baselines in closed form against brute force, through the public face, and the laws of their intervals.

Statistical checks use bounds that a correct program fails at a fresh seed with probability of about .001; seeds are fixed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import stats

import pyrocausal as pc
from pyrocausal import closed_form as cf
from pyrocausal.collection import ENTRIES
from pyrocausal.duplicates import interpolated_duplicate, technical_duplicate
from pyrocausal.errors import DataError, PyrocausalError
from pyrocausal.evaluate import _p_value, _totals, baseline_effects, measured_effects
from pyrocausal.graph_baselines import coefficient_scores, de_scores, sqrt_coefficient_de
from pyrocausal.shrunk_interactions import shrunk_interactions
from pyrocausal.splits import halves

BASELINES = [name for name, entry in ENTRIES.items() if entry.model == "Baseline"]
LABELS = ["control"] * 40 + ["g0"] * 25 + ["g1"] * 30 + ["g3"] * 20 + ["q"] * 15 + ["g0+g1"] * 10 + ["g2+q"] * 8


def screen(counts: bool, n_genes: int = 6, seed: int = 0) -> pc.PerturbationData:
    """Six perturbations (g2 in a combination only), of which q is no gene."""
    rng = np.random.default_rng(seed)
    loc = 3 + rng.normal(0, 1, (len(set(LABELS)), n_genes))[np.unique(LABELS, return_inverse=True)[1]]
    x = rng.poisson(np.exp(0.6 * loc)) if counts else loc + rng.normal(0, 1, loc.shape)
    obs = pd.DataFrame({"perturbation": LABELS}, index=[f"c{i}" for i in range(len(LABELS))])
    genes = pd.DataFrame(index=[f"g{k}" for k in range(n_genes)])
    return pc.PerturbationData.from_anndata(ad.AnnData(x.astype(np.float32), obs=obs, var=genes), kind=None if counts else "normalised")


def fitted(name: str, data: pc.PerturbationData, certain: bool = False, **settings: Any) -> pc.Fit:
    """A fitted baseline; ``certain`` takes the uncertainty out, so that every draw is the point estimate."""
    out = pc.fit(*pc.build(name, data, **settings), data, progress=False)
    if certain:
        for sd in ("shared_sd", "control_sd", "effect_sd"):
            getattr(out.guide, sd).zero_()
    return out


@pytest.mark.parametrize("counts", [False, True])
@pytest.mark.parametrize("name", BASELINES)
def test_every_baseline_is_built_fitted_asked_and_saved_as_any_model(name: str, counts: bool, tmp_path: Path) -> None:
    data = screen(counts)
    fit = fitted(name, data)
    assert len(fit.history) == 1 and np.isfinite(fit.history["elbo"].iloc[0])
    assert pc.check_model(fit.model, fit.guide, data)
    asked = ["g0", "g2", "g0+g3", "g0+g1"]  # the last was measured
    answer = pc.effects(fit, asked, draws=20, cells=4)
    assert np.isfinite(answer["effect"]).all() and answer.attrs["unit"] == ("log1p_cp10k" if counts else "data")
    cells = pc.interventional(fit, "g0", draws=2, cells=3, noise="independent")
    assert np.isfinite(cells["expression"]).all()
    fit.save(tmp_path / "run")
    again = pc.effects(pc.load(tmp_path / "run"), asked, draws=20, cells=4)
    np.testing.assert_array_equal(answer["effect"], again["effect"])


@pytest.mark.parametrize("counts", [False, True])
def test_point_estimates_are_the_published_ones(counts: bool) -> None:
    data = screen(counts)
    measured = measured_effects(data)
    single = {p: measured["effect"].sel(intervention=p).values for p in ("g0", "g1", "g3", "q")}
    mean = np.mean(list(single.values()), axis=0)
    zero = np.zeros(6)
    expected = {
        "control": [zero, zero, zero],
        "mean_perturbed": [mean, mean, mean],
        "matching_mean": [single["g0"], (single["g0"] + single["g3"]) / 2, (mean + single["q"]) / 2],
        "additive": [single["g0"], single["g0"] + single["g3"], single["q"]],
    }
    asked = {k: pc.interventions.parse(k) for k in ("g0", "g0+g3", "g2+q")}
    for name, values in expected.items():
        answer = pc.effects(fitted(name, data, certain=True), asked, draws=2, cells=3)
        floor = -answer["baseline"].values[0]  # a rate cannot fall below zero
        values = [np.maximum(v, floor) if counts else v for v in values]
        np.testing.assert_allclose(answer["effect"].values[:, 0], values, atol=2e-4)
    ours = baseline_effects(data, ["g0+g3"], "additive")["effect"].values[0]
    np.testing.assert_allclose(ours, single["g0"] + single["g3"], atol=1e-12)


def test_mean_by_perturbation_and_by_cell() -> None:
    data = screen(False)
    c = cf.conditions_of(data)
    x, labels = data.dense(np.float64), np.asarray(data.labels)
    singles = np.isin(labels, ["g0", "g1", "g3", "q"])
    by_cell = x[singles].mean(0) - x[labels == "control"].mean(0)
    np.testing.assert_allclose(cf.constant_effects(c, 5, "mean", "cell").effect[3], by_cell, atol=1e-6)
    with pytest.raises(DataError, match="weights='genes'"):
        cf.constant_effects(c, 5, "mean", "genes")


def test_draws_of_additive_have_the_sampling_variance_of_all_groups() -> None:
    """A pair varies by ``s_A^2 + s_B^2 + 4 s_c^2``: the control enters both effects. 12 variances of 4,000 draws, two-sided at .001/12."""
    data = screen(False)
    c = cf.conditions_of(data)
    answer = pc.effects(fitted("additive", data), {"A": pc.perturb("g0"), "AB": pc.perturb("g0") & pc.perturb("g3")}, draws=4000, cells=1)
    a, b = c.variance[list(data.perturbations[c.rows]).index("g0")], c.variance[list(data.perturbations[c.rows]).index("g3")]
    expected = np.stack([a + c.control_variance, a + b + 4 * c.control_variance])
    ratio = answer["effect"].var("draw", ddof=1).values / expected
    low, high = stats.chi2.ppf([0.001 / 24, 1 - 0.001 / 24], 3999) / 3999
    assert ((low < ratio) & (ratio < high)).all(), ratio


def test_sampling_variance_is_the_moderated_one() -> None:
    data = screen(False)
    c, x, labels = cf.conditions_of(data), data.dense(np.float64), np.asarray(data.labels)
    groups = ["control", *data.perturbations[c.rows]]
    n = np.array([(labels == g).sum() for g in groups])
    own = np.stack([x[labels == g].var(0, ddof=1) for g in groups])
    pooled = ((n - 1)[:, None] * own).sum(0) / (n - 1).sum()
    expected = ((n - 1)[:, None] * own + 10 * pooled) / (n + 9)[:, None] / n[:, None]
    np.testing.assert_allclose(np.vstack([c.control_variance, c.variance]), expected, rtol=1e-4)


def test_shrunk_effects_are_the_posterior_of_the_stated_model() -> None:
    """Mean and covariance of (m, a, e) against dense linear algebra at the variances that were estimated."""
    c = cf.conditions_of(screen(False, seed=3))
    e = cf.shrunk_effects(c, 5)
    n = len(c.rows)
    for g in range(6):
        # unknowns: m, a, e_1..e_n; prior m ~ N(0, prior_shared^2), e ~ N(m, prior_effect^2), flat a
        precision = np.zeros((n + 2, n + 2))
        precision[0, 0] = 1 / e.prior_shared[g] ** 2
        right = np.zeros(n + 2)
        v = np.zeros(n + 2)
        v[1] = 1
        precision += np.outer(v, v) / c.control_variance[g]
        right += v * c.control[g] / c.control_variance[g]
        for i, p in enumerate(c.rows):
            prior, data = np.zeros(n + 2), np.zeros(n + 2)
            prior[[0, i + 2]] = -1, 1
            data[[1, i + 2]] = 1
            precision += np.outer(prior, prior) / e.prior_effect[p, g] ** 2 + np.outer(data, data) / c.variance[i, g]
            right += data * c.mean[i, g] / c.variance[i, g]
        covariance = np.linalg.inv(precision)
        mean = covariance @ right
        np.testing.assert_allclose([e.shared[g], e.control[g], *e.effect[c.rows, g]], mean, rtol=1e-7, atol=1e-9)
        # the guide's law: m, then a given m, then e given both
        root = np.zeros((n + 2, n + 2))
        root[0, 0] = e.shared_sd[g]
        root[1] = e.control_on_shared[g] * root[0]
        root[1, 1] = e.control_sd[g]
        root[2:] = e.on_control[c.rows, g, None] * root[1] + e.on_shared[c.rows, g, None] * root[0]
        root[range(2, n + 2), range(2, n + 2)] = e.effect_sd[c.rows, g]
        np.testing.assert_allclose(root @ root.T, covariance, rtol=1e-6, atol=1e-10)


def simulated_conditions(seed: int, n: int = 40, genes: int = 400, shift: float = 0.0) -> tuple[cf.Conditions, np.ndarray, np.ndarray]:
    """Conditions drawn from the model, the true effects [n, G] and the true a."""
    rng = np.random.default_rng(seed)
    tau, strength = np.exp(rng.normal(-1, 0.7, genes)), rng.gamma(2.0, 0.5, (n, 1))
    a, m = rng.normal(0, 2, genes), shift * tau * rng.standard_normal(genes)
    effect = m + np.sqrt(strength) * tau * rng.standard_normal((n, genes))
    variance = np.full((n, genes), 0.2)
    mean = a + effect + np.sqrt(variance) * rng.standard_normal((n, genes))
    control = a + np.sqrt(0.2) * rng.standard_normal(genes)
    conditions = cf.Conditions(control, np.full(genes, 0.2), np.arange(n), mean, variance, np.full(n, 50.0), np.full(genes, 10.0))
    return conditions, effect, a


@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_shrinkage_lowers_the_error_and_its_intervals_hold(shift: float) -> None:
    """90 % intervals of 16,000 effects cover at least 90 %, by a bound that takes the 400 genes for the sample (effects of a gene share its
    control), and at most 95 %: genes differ here more (e-fold sd .7) than the moderation expects, which errs on the wide side."""
    c, effect, _ = simulated_conditions(1, shift=shift)
    e = cf.shrunk_effects(c, len(effect))
    unbiased = cf.unbiased_effects(c, len(effect)).effect
    assert ((e.effect - effect) ** 2).mean() < 0.5 * ((unbiased - effect) ** 2).mean()
    sd_control = np.sqrt(e.control_sd**2 + (e.control_on_shared * e.shared_sd) ** 2)
    moved = e.on_control * e.control_on_shared * e.shared_sd + e.on_shared * e.shared_sd
    sd = np.sqrt(e.effect_sd**2 + (e.on_control * e.control_sd) ** 2 + moved**2)
    inside = (np.abs(effect - e.effect) < 1.645 * sd).mean(0)
    assert 0.9 - 3.1 * inside.std() / 20 < inside.mean() < 0.95, inside.mean()
    assert (sd_control <= np.sqrt(c.control_variance) * (1 + 1e-6)).all()


def pairs_screen(
    seed: int, interaction: float, cells: int = 25, genes: int = 80, idle: int = 0, alone: int = 25
) -> tuple[pc.PerturbationData, dict[str, np.ndarray]]:
    """Ten singles and 20 pairs of normalised expression (two parts were never measured alone), and the true effects; ``idle`` more pairs
    have a part that was never measured alone and does nothing."""
    rng = np.random.default_rng(seed)
    names = [f"p{i}" for i in range(12)]
    size = np.exp(rng.normal(-1, 0.5, genes))
    truth = {name: size * rng.standard_normal(genes) for name in names}
    pairs = [(a, b) for a in names for b in names if a < b]
    for a, b in (pairs[k] for k in rng.permutation(len(pairs))[:20]):
        truth[f"{a}+{b}"] = truth[a] + truth[b] + interaction * size * rng.standard_normal(genes)
    truth = {k: v for k, v in truth.items() if k not in ("p10", "p11")} | {f"p{k}+q{k}": truth[f"p{k}"] for k in range(idle)}
    labels = np.repeat(["control", *truth], [4 * alone, *[cells if "+" in k else alone for k in truth]])
    x = 3 + np.stack([truth.get(label, np.zeros(genes)) for label in labels]) + rng.standard_normal((len(labels), genes))
    obs = pd.DataFrame({"perturbation": labels}, index=[f"c{i}" for i in range(len(labels))])
    adata = ad.AnnData(x.astype(np.float32), obs=obs, var=pd.DataFrame(index=[f"g{k}" for k in range(genes)]))
    return pc.PerturbationData.from_anndata(adata, kind="normalised"), truth


def part_of(data: pc.PerturbationData) -> np.ndarray:
    """1 for the parts of each combination, [Q, P]."""
    return np.array([np.isin(np.arange(len(data.perturbations)), q) for q in data.combination_cells()], float)


def test_interactions_are_the_posterior_of_the_stated_model() -> None:
    """The sum with its interaction, and its covariance with the sum alone, against dense linear algebra at the estimated variances."""
    data, _ = pairs_screen(0, 0.5, genes=5)
    n = len(data.perturbations)
    c, pairs = cf.conditions_of(data), [list(q) for q in data.combination_cells()]
    law = cf.shrunk_effects(c, n)
    found = shrunk_interactions(data, c, law, part_of(data))
    x, labels = data.dense(np.float64), np.asarray(data.labels)
    for q, parts in enumerate(pairs):
        own = x[labels == "+".join(data.perturbations[parts])]
        s = ((len(own) - 1) * own.var(0, ddof=1) + 10 * c.unit_variance) / (len(own) + 9) / len(own)
        for g in range(5):
            root = np.zeros((n + 2, n + 2))  # of m, a, e; see the test above
            root[0, 0] = law.shared_sd[g]
            root[1] = law.control_on_shared[g] * root[0]
            root[1, 1] = law.control_sd[g]
            root[2:] = law.on_control[:, g, None] * root[1] + law.on_shared[:, g, None] * root[0]
            root[range(2, n + 2), range(2, n + 2)] = law.effect_sd[:, g]
            takes = np.zeros(n + 2)
            takes[[1, *(np.array(parts) + 2)]] = 1.0
            V, b = takes @ root @ root.T @ takes, found.prior[q, g] ** 2
            P = law.control[g] + law.effect[parts, g].sum()
            prior = np.array([[V, V], [V, V + b]])  # of the sum, and the sum with its interaction
            gain = prior[:, 1] / (V + b + s[g])
            mean, covariance = P + gain * (own.mean(0)[g] - P), prior - np.outer(gain, prior[:, 1])
            K, sd = found.gain[q, g], found.sd[q, g]
            np.testing.assert_allclose(P + found.value[q, g], mean[1], rtol=1e-6)
            np.testing.assert_allclose([(1 - K) * V, (1 - K) ** 2 * V + sd**2], covariance[1], rtol=1e-6)


def test_draws_of_condition_eb_have_the_stated_law_and_interactions_are_of_their_combination_alone() -> None:
    """Variances of 4,000 draws of ten effects, two-sided at .001/10; their means at .001/10."""
    data, _ = pairs_screen(1, 1.0, genes=10)
    c = cf.conditions_of(data)
    law = cf.shrunk_effects(c, len(data.perturbations))
    found = shrunk_interactions(data, c, law, part_of(data))
    q, pairs = 3, [list(k) for k in data.combination_cells()]
    pair = data.perturbations[pairs[q]]
    fit = fitted("condition_eb", data)
    asked = pc.perturb(pair[0]) & pc.perturb(pair[1])
    told = pc.effects(fit, {"pair": asked, "other way": pc.perturb(pair[1]) & pc.perturb(pair[0])}, draws=4000, cells=1)["effect"]
    np.testing.assert_array_equal(told[0], told[1])
    g, K = law.effect[pairs[q]].sum(0), found.gain[q]
    on_a = law.on_control[pairs[q]].sum(0)
    on_m = law.on_shared[pairs[q]].sum(0)
    m = np.stack([law.shared_sd, law.control_on_shared * law.shared_sd * (1 + on_a) + on_m * law.shared_sd])
    sum_a = (1 - K) * (1 + on_a) - 1  # of the control's own noise in pair less control
    variance = ((1 - K) * m[1] - law.control_on_shared * law.shared_sd) ** 2 + (sum_a * law.control_sd) ** 2
    variance += (1 - K) ** 2 * (law.effect_sd[pairs[q]] ** 2).sum(0) + found.sd[q] ** 2
    ratio = told[0].var("draw", ddof=1).values / variance
    low, high = stats.chi2.ppf([0.001 / 20, 1 - 0.001 / 20], 3999) / 3999
    assert ((low < ratio) & (ratio < high)).all(), ratio
    off = (told[0].mean("draw").values - (g + found.value[q])) / np.sqrt(variance / 4000)
    assert np.abs(off).max() < stats.norm.ppf(1 - 0.001 / 20)

    certain = {k: fitted(k, data, certain=True) for k in ("condition_eb", "additive_eb")}
    certain["condition_eb"].guide.interaction_sd.zero_()
    third = next(str(p) for p in data.perturbations if p not in pair)
    unseen = next(f"{a}+{b}" for a in data.perturbations for b in data.perturbations if a < b and f"{a}+{b}" not in data.conditions)
    acts = {
        "pair": asked,
        "with another": asked & pc.perturb(third),
        "unseen": pc.interventions.parse(unseen),
        "half": pc.perturb(pair[0], dose=0.5) & pc.perturb(pair[1], dose=0.5),
        "none": pc.perturb(pair[0]) & pc.perturb(pair[1], dose=0.0),
    }
    one, other = (pc.effects(f, acts, draws=2, cells=1)["effect"].mean("draw") for f in certain.values())
    np.testing.assert_allclose(one.sel(intervention="pair") - other.sel(intervention="pair"), found.value[q], atol=1e-5)
    np.testing.assert_allclose(one.sel(intervention="half") - other.sel(intervention="half"), found.value[q] / 4, atol=1e-5)
    for name in ("with another", "unseen", "none"):
        np.testing.assert_allclose(one.sel(intervention=name), other.sel(intervention=name), atol=1e-5)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("interaction", [0.0, 1.0])
def test_measured_pairs_are_told_better_than_by_their_cells_or_their_parts(interaction: float, seed: int) -> None:
    """Without interactions next to nothing is lost by looking for them. 90 % intervals of 20 pairs cover .9 within .05: 1,600 intervals
    of 80 genes, whose standard error over genes is about .01."""
    data, truth = pairs_screen(seed, interaction)
    pairs = [k for k in truth if "+" in k]
    true = np.stack([truth[k] for k in pairs])
    known = [i for i, k in enumerate(pairs) if not {"p10", "p11"} & set(k.split("+"))]  # both parts were measured alone
    error = {"measured": measured_effects(data)["effect"].sel(intervention=pairs).values - true}
    for name in ("condition_eb", "additive_eb"):
        draws = pc.effects(fitted(name, data), {k: pc.interventions.parse(k) for k in pairs}, draws=400, cells=1)["effect"].values
        error[name] = draws.mean(1) - true
        if name == "condition_eb":
            low, high = np.quantile(draws, [0.05, 0.95], axis=1)
            assert abs(((low < true) & (true < high)).mean() - 0.9) < 0.05
    mean = {name: [(e[rows] ** 2).mean() for rows in (slice(None), known)] for name, e in error.items()}
    assert len(known) > 5 and mean["condition_eb"][0] < mean["measured"][0] and mean["condition_eb"][0] < mean["additive_eb"][0]
    assert mean["condition_eb"][1] < mean["additive_eb"][1] * (0.5 if interaction else 1.03)


@pytest.mark.parametrize("seed", range(2))
def test_interactions_are_found_beside_pairs_that_have_none(seed: int) -> None:
    """Pairs whose unknown part does nothing lie closer to the sum than an unknown part would have them. 90 % intervals of the others cover
    .9 within .06: 1,200 intervals of 60 genes."""
    data, truth = pairs_screen(seed, 0.5, cells=20, genes=60, idle=10, alone=200)
    pairs = [k for k in truth if "+" in k and "q" not in k]
    true = np.stack([truth[k] for k in pairs])
    draws = pc.effects(fitted("condition_eb", data), {k: pc.interventions.parse(k) for k in pairs}, draws=400, cells=1)["effect"].values
    low, high = np.quantile(draws, [0.05, 0.95], axis=1)
    assert abs(((low < true) & (true < high)).mean() - 0.9) < 0.06
    measured = measured_effects(data)["effect"].sel(intervention=pairs).values
    assert ((draws.mean(1) - true) ** 2).mean() < 0.85 * ((measured - true) ** 2).mean()


def test_shrinkage_without_effects_leaves_none() -> None:
    rng = np.random.default_rng(0)
    variance = np.full((30, 300), 0.1)
    mean = 1 + np.sqrt(0.1) * rng.standard_normal((30, 300))
    c = cf.Conditions(
        1 + np.sqrt(0.1) * rng.standard_normal(300), np.full(300, 0.1), np.arange(30), mean, variance, np.full(30, 9.0), np.ones(300)
    )
    assert (cf.shrunk_effects(c, 30).effect ** 2).mean() < 0.02 * (c.effect**2).mean()


def test_neighbours_by_brute_force() -> None:
    c, _, _ = simulated_conditions(2, n=12, genes=5)
    rng = np.random.default_rng(0)
    embedding = rng.normal(size=(15, 3))
    embedding[14] = 0
    found = cf.neighbour_effects(c, embedding, k=3, measured=False)
    for p in range(14):
        cosine = [embedding[p] @ embedding[q] / np.linalg.norm(embedding[p]) / np.linalg.norm(embedding[q]) for q in range(12)]
        chosen = sorted(range(12), key=lambda q: -cosine[q])[:3]
        np.testing.assert_allclose(found.effect[p], c.effect[chosen].mean(0), atol=1e-10)
    np.testing.assert_allclose(found.effect[14], c.effect.mean(0), atol=1e-10)
    np.testing.assert_allclose(cf.neighbour_effects(c, embedding, k=3).effect[:12], c.effect, atol=1e-10)
    nearest = cf.neighbour_effects(c, embedding, k=1)
    table = pd.DataFrame(embedding, [f"p{i}" for i in range(15)])
    names = pc.embeddings.nearest_perturbation(table, ["p12", "p13"], [f"p{i}" for i in range(12)])
    np.testing.assert_allclose(nearest.effect[12:14], c.effect[[int(n[1:]) for n in names]], atol=1e-10)
    with pytest.raises(DataError, match="k=13 neighbours"):
        cf.neighbour_effects(c, embedding, k=13)


def test_ridge_by_brute_force_and_its_penalty_by_leaving_out() -> None:
    c, _, _ = simulated_conditions(4, n=12, genes=5)
    rng = np.random.default_rng(1)
    embedding = rng.normal(size=(14, 3)) @ np.diag([1.0, 5.0, 0.2])

    def ridge(rows: np.ndarray, lam: float) -> np.ndarray:
        centre = embedding[:12].mean(0)
        x = (embedding - centre) / np.sqrt(((embedding[:12] - centre) ** 2).sum(1).mean())
        design = np.column_stack([np.ones(len(rows)), x[rows]])
        penalty = lam * np.diag([0.0, 1, 1, 1])
        b = np.linalg.solve(design.T @ design + penalty, design.T @ c.effect[rows])
        return np.column_stack([np.ones(14), x]) @ b

    whole = np.arange(12)
    np.testing.assert_allclose(cf.ridge_effects(c, embedding, 0.7, measured=False).effect, ridge(whole, 0.7), atol=1e-10)
    grid = cf.PENALTIES * 12 / 3
    errors = [np.mean([(ridge(np.delete(whole, i), lam)[i] - c.effect[i]) ** 2 for i in whole]) for lam in grid]
    best = grid[int(np.argmin(errors))]
    np.testing.assert_allclose(cf.ridge_effects(c, embedding, measured=False).effect, ridge(whole, best), atol=1e-10)


def test_linear_embedding_is_the_published_model() -> None:
    c, _, _ = simulated_conditions(5, n=9, genes=20)
    own = np.array([3, 7, -1, 0, 11, 2, 5, 19, 8, 4, -1])
    y = np.column_stack([c.effect.T, np.zeros(20)])
    b = y.mean(1, keepdims=True)
    bulk = np.column_stack([c.mean.T, c.control])
    u, s, _ = np.linalg.svd(bulk - bulk.mean(0), full_matrices=False)
    g = u[:, :4] * s[:4]
    rows = np.where((own >= 0)[:, None], g[own], 0.0)
    p = np.vstack([rows[:9], np.zeros(4)]).T
    k = np.linalg.inv(g.T @ g + 0.1 * np.eye(4)) @ g.T @ (y - b) @ p.T @ np.linalg.inv(p @ p.T + 0.1 * np.eye(4))
    found = cf.linear_embedding_effects(c, own, d=4)
    np.testing.assert_allclose(found.effect, (g @ k @ rows.T + b).T, atol=1e-8)
    given = cf.linear_embedding_effects(c, own, genes=g, embedding=rows)
    np.testing.assert_allclose(given.effect, found.effect, atol=1e-8)


def test_tables_are_put_in_the_order_of_the_screen() -> None:
    data = screen(False)
    rng = np.random.default_rng(0)
    table = pd.DataFrame(rng.normal(size=(5, 3)), index=list(data.perturbations)[::-1])
    genes = pd.DataFrame(rng.normal(size=(6, 3)), index=list(data.genes)[::-1])
    fit = fitted("linear_embedding", data, embedding=table, gene_embedding=genes)
    own = data.genes.get_indexer(data.perturbations)
    arrays = [t.to_numpy(np.float32).astype(float) for t in (genes.loc[data.genes], table.loc[data.perturbations])]
    expected = cf.linear_embedding_effects(cf.conditions_of(data), own, *arrays)
    np.testing.assert_allclose(fit.guide.effect.numpy(), expected.effect, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "settings", "match"),
    [
        ("control", {"embedding": np.ones((5, 2))}, "embedding= was given for the baseline 'control'"),
        ("additive", {"penalty": 1.0}, "penalty= was given"),
        ("ridge_embedding", {"seen": "guessed"}, "seen='guessed'"),
        ("additive", {"combinations": [[0, 1]]}, "combinations= was given"),
        ("additive", {"likelihood": "poisson"}, "likelihood='poisson'"),
    ],
)
def test_settings_that_a_baseline_does_not_have(name: str, settings: dict[str, Any], match: str) -> None:
    with pytest.raises(PyrocausalError, match=match):
        pc.build(name, screen(False), **settings)


def test_what_cannot_be_estimated_is_refused() -> None:
    data = screen(False)
    renamed = ad.AnnData(data.dense(), obs=pd.DataFrame({"perturbation": data.labels.astype(str)}, index=data.cells))
    no_genes = pc.PerturbationData.from_anndata(renamed, kind="normalised")
    with pytest.raises(DataError, match="take mean_perturbed"):
        fitted("nearest_perturbation", no_genes)
    with pytest.raises(DataError, match="0 control cells"):
        cf.conditions_of(data[~data.is_control])
    with pytest.raises(DataError, match=r"embedding of shape \(4, 2\)"):
        fitted("knn_embedding", data, embedding=np.ones((4, 2)))


def test_duplicates() -> None:
    data = screen(True)
    a, b = halves(data, seed=1)
    assert not set(a.cells) & set(b.cells) and set(a.labels) == set(b.labels) == set(data.labels)
    assert len(a) + len(b) == len(data)
    duplicate = technical_duplicate(a)
    np.testing.assert_array_equal(duplicate["effect"], measured_effects(a)["effect"])
    mixed = interpolated_duplicate(a)
    mean = duplicate["effect"].values.mean(0)
    own, others = np.flatnonzero(a.labels == "g1"), np.flatnonzero((a.labels != "g1") & ~a.is_control)
    p = _p_value(_totals(a, own), _totals(a, others), True)
    order = np.argsort(p)
    adjusted = np.empty(6)
    adjusted[order] = np.minimum(1, np.minimum.accumulate((p[order] * 6 / np.arange(1, 7))[::-1])[::-1])
    raw = duplicate["effect"].sel(intervention="g1").values
    np.testing.assert_allclose(mixed["effect"].sel(intervention="g1"), (1 - adjusted) * raw + adjusted * mean, atol=1e-10)
    with pytest.raises(DataError, match="four cells"):
        halves(data[[0, 1, 50]])


def test_edge_scores_by_brute_force() -> None:
    data = screen(False)
    x = data.dense(np.float64)
    x = (x - x.mean(0)) / x.std(0)
    found = coefficient_scores(data, penalty=1e-12)
    for k in range(6):
        free = np.array([f"g{k}" not in label.split("+") for label in data.labels])
        others = [j for j in range(6) if j != k]
        b = np.linalg.lstsq(np.column_stack([x[free][:, others], np.ones(free.sum())]), x[free, k], rcond=None)[0]
        np.testing.assert_allclose(found[others, k], np.abs(b[:-1]), rtol=1e-6)
    de, measured = de_scores(data), measured_effects(data).sel(intervention="g3")
    z = np.abs(measured["effect"].values / measured["se"].values)
    np.testing.assert_allclose(np.delete(de[3], 3), np.delete(z, 3), rtol=1e-10)
    assert not de[[2, 4, 5]].any() and not np.diag(de).any()
    both = sqrt_coefficient_de(data)
    np.testing.assert_allclose(both[0], np.sqrt(coefficient_scores(data)[0] * de[0]))
    assert both[[2, 4, 5]].max() <= both[[0, 1, 3]][both[[0, 1, 3]] > 0].min()
