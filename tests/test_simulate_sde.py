"""Screens of linear diffusions: the truth against its own equations, the cells against the truth.

Statistical checks compare a family of statistics with the normal quantile of a union bound (``bound``), or a p-value with .001: at a fresh
seed a correct simulator would fail one such comparison with probability of about .001. Seeds are fixed.
"""

from __future__ import annotations

from collections import Counter
from itertools import product
from typing import Any

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp
import torch
from scipy import stats
from scipy.linalg import solve_continuous_lyapunov, solve_discrete_lyapunov

import pyrocausal as pc
from pyrocausal.errors import DataError
from pyrocausal.simulate_sde import exact_score_responses, linear_sde_screen, random_graph

SMALL: dict[str, Any] = {"n_genes": 12, "n_perturbed": 6, "degree": 4, "cells_per_perturbation": 30}
VARIANTS: dict[str, dict[str, Any]] = {
    "shift": {"doubles": 4},
    "sfo": {"graph": "sfo", "doubles": 4, "sigma": (0.5, 2.0)},
    "off target": {"effects": "off_target", "off_target": 0.3, "penetrance": (0.2, 0.9), "doubles": 4},
    "knock-down": {"mechanism": "knockdown", "doubles": 4, "penetrance": 0.6, "basal": (2.0, 4.0), "sigma": (0.5, 2.0)},
    "counts": {"counts": True, "zero_inflation": (0.0, 0.5), "doubles": 2},
}


def screen(**kw: Any) -> ad.AnnData:
    return linear_sde_screen(**SMALL | kw)


def column(adata: ad.AnnData, key: str) -> np.ndarray:
    return adata.obs[key].astype(str).to_numpy()


def bound(n: int, alpha: float = 1e-3) -> float:
    """What the largest of n standard normals, dependent or not, exceeds in size with probability below alpha."""
    return float(stats.norm.isf(alpha / (2 * n)))


def by_hand(truth: dict[str, Any], condition: str) -> tuple[np.ndarray, np.ndarray]:
    """Drift matrix [d, d] and constant part [d] of a condition, gene by gene and perturbation by perturbation."""
    graph, decay, basal = truth["graph"].copy(), truth["decay"], truth["basal"].copy()
    for name in [] if condition == "control" else condition.split("+"):
        i = list(truth["perturbations"]).index(name)
        for k in range(len(basal)):
            graph[:, k] *= 1 - truth["knockdown"][i, k]
            basal[k] *= 1 - truth["knockdown"][i, k]
    for name in [] if condition == "control" else condition.split("+"):
        basal += truth["shift"][list(truth["perturbations"]).index(name)]
    return graph - np.diag(decay), basal


@pytest.mark.parametrize("variant", VARIANTS)
def test_means_and_covariances_solve_the_stationary_equations(variant: str) -> None:
    truth = screen(**VARIANTS[variant]).uns["truth"]
    np.testing.assert_array_equal(truth["drift"], truth["graph"] - np.diag(truth["decay"]))
    abscissa = []
    for row, condition in enumerate(truth["conditions"]):
        drift, constant = by_hand(truth, condition)
        covariance = truth["covariances"][row] if "covariances" in truth else truth["covariance"]
        assert np.abs(truth["means"][row] @ drift + constant).max() < 1e-10 * np.abs(constant).max()
        noise = np.diag(truth["sigma"] ** 2)
        assert np.abs(drift.T @ covariance + covariance @ drift + noise).max() < 1e-10 * noise.max()
        np.testing.assert_allclose(covariance, solve_continuous_lyapunov(drift.T, -noise), rtol=0, atol=1e-10 * np.abs(covariance).max())
        abscissa.append(np.linalg.eigvals(drift).real.max())
    assert max(abscissa) == pytest.approx(-0.5, abs=1e-9)


def test_row_acts_on_column() -> None:
    """Small steps of ``x <- x + (x M + b) dt + sigma dW`` have the same mean and, as dt falls, the same covariance."""
    truth = screen(sigma=(0.5, 2.0)).uns["truth"]
    covariance, errors = truth["covariance"], []
    for dt in (1e-3, 1e-4):
        step = np.eye(12) + dt * truth["drift"]
        discrete = solve_discrete_lyapunov(step.T, dt * np.diag(truth["sigma"] ** 2))
        errors.append(np.linalg.norm(discrete - covariance) / np.linalg.norm(covariance))
    assert errors[0] < 0.02
    assert errors[1] == pytest.approx(errors[0] / 10, rel=0.05)
    fixed = truth["means"][0]
    np.testing.assert_allclose(fixed @ (np.eye(12) + 1e-3 * truth["drift"]) + 1e-3 * truth["basal"], fixed, atol=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
def test_cells_follow_the_law_of_their_condition(variant: str) -> None:
    """Whitened by the law of the condition that took, states are standard normal: every coordinate, and the distance of every cell."""
    adata = screen(**VARIANTS[variant], seed=3)
    truth, hit = adata.uns["truth"], column(adata, "hit")
    white = np.empty(adata.obsm["state"].shape)
    for row, condition in enumerate(truth["conditions"]):
        covariance = truth["covariances"][row] if "covariances" in truth else truth["covariance"]
        rows = hit == condition
        white[rows] = np.linalg.solve(np.linalg.cholesky(covariance), (adata.obsm["state"][rows] - truth["means"][row]).T).T
    assert stats.kstest(white.ravel(), "norm").pvalue > 1e-3
    assert stats.kstest((white**2).sum(1), stats.chi2(white.shape[1]).cdf).pvalue > 1e-3
    z = white.T @ white / np.sqrt(len(white)) - np.sqrt(len(white)) * np.eye(12)
    assert np.abs(z / np.sqrt(1 + np.eye(12))).max() < bound(78)


def test_every_cell_is_in_the_screen() -> None:
    adata = screen(doubles=3, n_control=50, cells_per_double=7)
    expected = {str(c): 30 for c in adata.uns["truth"]["conditions"]} | {"control": 50}
    expected |= {c: 7 for c in expected if "+" in c}
    assert Counter(column(adata, "perturbation")) == expected
    assert sum("+" in c for c in expected) == 3
    np.testing.assert_array_equal(adata.X, adata.obsm["state"])
    assert set(adata.var_names[adata.var["perturbed"]]) == set(adata.uns["truth"]["perturbations"])
    np.testing.assert_array_equal(adata.var_names[adata.uns["truth"]["targets"]], adata.uns["truth"]["perturbations"])


def test_one_seed_one_screen_and_the_global_state_stays() -> None:
    state, torch_state = np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
    a, b, c = screen(counts=True, seed=5), screen(counts=True, seed=5), screen(counts=True, seed=6)
    np.testing.assert_array_equal(np.random.get_state()[1], state)  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), torch_state)
    np.testing.assert_array_equal(a.X.toarray(), b.X.toarray())
    np.testing.assert_array_equal(a.obsm["state"], b.obsm["state"])
    assert np.abs(a.uns["truth"]["drift"] - c.uns["truth"]["drift"]).max() > 0.1


@pytest.mark.parametrize("mechanism", ["shift", "knockdown"])
def test_fewer_perturbations_are_the_first_of_more(mechanism: str) -> None:
    kw: dict[str, Any] = {"mechanism": mechanism, "effects": "off_target", "off_target": 0.2, "penetrance": (0.3, 0.8)}
    few, many = screen(**kw, n_perturbed=4).uns["truth"], screen(**kw, n_perturbed=9).uns["truth"]
    for key in ("graph", "basal", "sigma"):
        np.testing.assert_array_equal(few[key], many[key])
    for key in ("targets", "perturbations", "mask", "shift", "knockdown", "penetrance"):
        np.testing.assert_array_equal(few[key], many[key][:4])
    other = screen(**kw, n_perturbed=4, n_control=77, counts=True, cells_per_perturbation=3).uns["truth"]
    for key in ("drift", "basal", "means", "shift", "knockdown", "penetrance"):
        np.testing.assert_array_equal(few[key], other[key])


def test_random_graph_has_the_expected_degree() -> None:
    d, degree = 60, 7
    graphs = np.stack([random_graph(d, "er", degree, seed) for seed in range(40)])
    n, p = 40 * d * (d - 1), degree / (d - 1)
    assert abs((graphs != 0).sum() - n * p) < bound(3) * np.sqrt(n * p * (1 - p))
    size = np.abs(graphs[graphs != 0])
    assert stats.kstest(size, stats.uniform(1, 2).cdf).pvalue > 1e-3 / 3
    assert abs(np.sign(graphs).sum()) < bound(3) * np.sqrt(len(size))
    assert not graphs[:, np.arange(d), np.arange(d)].any()


def test_attachment_is_preferential() -> None:
    """Three nodes with one edge each: the third attaches to the first with probability 2/3; then every entry is exchanged with
    probability .1, and all edges are turned. Degrees (out, in) of the nodes, over all 64 exchanges, against 5,000 graphs."""
    law: Counter[tuple[tuple[int, int], ...]] = Counter()
    entries = [(j, k) for j in range(3) for k in range(3) if j != k]
    for points_at, probability in ((0, 2 / 3), (1, 1 / 3)):
        edges = {(1, 0), (2, points_at)}
        for exchanged in product((False, True), repeat=6):
            final = [(k, j) for (j, k), e in zip(entries, exchanged, strict=True) if ((k, j) if e else (j, k)) in edges]
            p = probability * 0.1 ** sum(exchanged) * 0.9 ** (6 - sum(exchanged))
            law[tuple(sorted((sum(j == i for j, _ in final), sum(k == i for _, k in final)) for i in range(3)))] += p  # type: ignore[assignment]
    n, seen = 5000, Counter[tuple[tuple[int, int], ...]]()
    rng = np.random.default_rng(0)
    for _ in range(n):
        edges_of = random_graph(3, "sfo", 1, rng) != 0
        seen[tuple(sorted(zip(edges_of.sum(1).tolist(), edges_of.sum(0).tolist(), strict=True)))] += 1
    assert set(seen) <= set(law)
    assert sum(law.values()) == pytest.approx(1) and min(law.values()) * n > 5
    assert stats.chisquare([seen[key] for key in law], [n * p for p in law.values()]).pvalue > 1e-3


def test_hubs_of_scale_free_graphs_regulate() -> None:
    edges = random_graph(100, "sfo", 10, 0) != 0
    assert edges.sum(1).max() > 2 * edges.sum(0).max()
    # exchanges keep the expected number: of each of 945 pairs with one edge, the edge is lost or doubled with probability .09 each
    assert abs(int(edges.sum()) - (45 + 90 * 10)) < bound(1) * np.sqrt(945 * 2 * 0.09)


def test_where_perturbations_act() -> None:
    d, p = 80, 60
    kw: dict[str, Any] = {"n_genes": d, "n_perturbed": p, "cells_per_perturbation": 1}
    truth = {effects: linear_sde_screen(effects=effects, **kw).uns["truth"] for effects in ("on_target", "off_target", "random")}  # type: ignore[arg-type]
    on = np.eye(d)[truth["on_target"]["targets"]]
    np.testing.assert_array_equal(truth["on_target"]["mask"], on)
    assert (truth["off_target"]["mask"] >= on).all()
    for effects, n in (("off_target", p * (d - 1)), ("random", p * d)):
        extra = truth[effects]["mask"].sum() - (p if effects == "off_target" else 0)
        assert abs(extra - 0.05 * n) < bound(2) * np.sqrt(n * 0.05 * 0.95)
    for t in truth.values():
        np.testing.assert_array_equal(t["shift"] != 0, t["mask"] == 1)
        size = np.abs(t["shift"][t["mask"] == 1])
        assert stats.kstest(size, stats.uniform(5, 10).cdf).pvalue > 1e-3 / 3
    same = linear_sde_screen(off_target=0.05, **kw).uns["truth"]
    np.testing.assert_array_equal(same["shift"], truth["off_target"]["shift"])


def test_penetrance_is_the_share_of_cells_in_which_it_takes() -> None:
    adata = screen(penetrance=(0.2, 0.9), doubles=5, cells_per_perturbation=400, seed=2)
    truth, label, hit = adata.uns["truth"], column(adata, "perturbation"), column(adata, "hit")
    share = dict(zip(truth["perturbations"], truth["penetrance"], strict=True))
    assert all(0.2 <= v <= 0.9 for v in share.values()) and len(set(share.values())) == 6
    z, p_values = [], []
    for condition in truth["conditions"]:
        took = hit[label == condition]
        if "+" not in condition:
            rate = share.get(condition, 0.0)
            assert set(took) <= {condition, "control"}
            error = np.sqrt(rate * (1 - rate) / len(took)) if rate else 1e-12  # control: none at all
            z.append((np.mean(took != "control") - rate) / error)
        else:
            a, b = condition.split("+")
            expected = {
                condition: share[a] * share[b],
                a: share[a] * (1 - share[b]),
                b: (1 - share[a]) * share[b],
                "control": (1 - share[a]) * (1 - share[b]),
            }
            count = Counter(took)
            assert set(count) <= set(expected)
            p_values.append(stats.chisquare([count[c] for c in expected], [len(took) * q for q in expected.values()]).pvalue)
    assert np.abs(z).max() < bound(2 * len(z))
    assert min(p_values) > 5e-4 / len(p_values)


def test_pairs_add_shifts_and_multiply_what_is_left() -> None:
    truth = screen(doubles=6).uns["truth"]
    mean = {c: m - truth["means"][0] for c, m in zip(truth["conditions"], truth["means"], strict=True)}
    for pair in truth["conditions"][7:]:
        a, b = pair.split("+")
        np.testing.assert_allclose(mean[pair], mean[a] + mean[b], atol=1e-12)
    down = screen(doubles=6, mechanism="knockdown", basal=(3.0, 4.0)).uns["truth"]
    mean = {c: m - down["means"][0] for c, m in zip(down["conditions"], down["means"], strict=True)}
    gap = [np.abs(mean[p] - sum(mean[g] for g in p.split("+"))).max() / np.abs(mean[p]).max() for p in down["conditions"][7:]]
    assert max(gap) > 0.01


def test_counts_are_poisson_about_their_rate() -> None:
    adata = screen(counts=True, zero_inflation=(0.1, 0.5), cells_per_perturbation=300, library_size=600.0, seed=1)
    truth, y, rate = adata.uns["truth"], adata.X.toarray().astype(float), adata.obsm["rate"].astype(float)
    assert sp.issparse(adata.X) and adata.uns["X_kind"] == "counts" and (y == np.round(y)).all()
    state, sd = adata.obsm["state"], np.sqrt(np.diagonal(truth["covariance"]))
    size = adata.obs["size"].to_numpy()[:, None]
    v = truth["offset"] + (state - truth["means"][0]) / sd
    np.testing.assert_allclose(rate, size * truth["unit"] * np.log1p(np.exp(v)), rtol=1e-4)
    keep, zero = 1 - truth["gate"], np.exp(-rate)
    variance = keep * rate + keep * (1 - keep) * rate**2
    z_mean = (y - keep * rate).sum(0) / np.sqrt(variance.sum(0))
    p_zero = 1 - keep + keep * zero
    z_zero = ((y == 0) - p_zero).sum(0) / np.sqrt((p_zero * (1 - p_zero)).sum(0))
    assert np.abs(np.concatenate([z_mean, z_zero])).max() < bound(24)
    np.testing.assert_allclose(np.log(adata.obs["size"]).std(), 0.2, rtol=0.05)  # 2,100 cells: standard error 1.5 %


def test_the_published_moment_estimator_returns_the_unit() -> None:
    """u = E[y^2] / E[y] - 1 of control counts, for cells of equal depth; zero inflation cancels. Largest of 12 relative errors, in standard
    errors by the delta method from the sample itself."""
    adata = screen(counts=True, zero_inflation=(0.0, 0.5), n_perturbed=0, n_control=40_000, depth_sd=0.0)
    y, unit = adata.X.toarray().astype(float), adata.uns["truth"]["unit"]
    first, second = y.mean(0), (y**2).mean(0)
    estimate = second / first - 1
    influence = (y**2 - second) / first - second / first**2 * (y - first)
    assert (np.abs(estimate - unit) / (influence.std(0) / np.sqrt(len(y)))).max() < bound(12)
    plain = screen(counts=True, n_perturbed=0, n_control=40_000, depth_sd=0.0, library_size=500.0).X.sum(1)
    assert abs(plain.mean() - 500) < bound(1) * plain.std() / 200


@pytest.mark.parametrize("mechanism", ["shift", "knockdown"])
def test_exact_responses(mechanism: str) -> None:
    """Limits are the fixed points, and the drift there and the score there vanish; every row against its own condition."""
    truth = screen(mechanism=mechanism, effects="off_target", off_target=0.2).uns["truth"]
    r, x = exact_score_responses(truth, [4, 1]), np.arange(12.0)
    there = exact_score_responses(truth, [4, 1], at=x)
    for row, i in enumerate((4, 1)):
        drift, constant = by_hand(truth, truth["perturbations"][i])
        covariance = solve_continuous_lyapunov(drift.T, -np.diag(truth["sigma"] ** 2))
        np.testing.assert_allclose(r.drift[row], constant, atol=1e-12)
        np.testing.assert_allclose(there.drift[row], x @ drift + constant, atol=1e-10)
        np.testing.assert_allclose(there.score[row] @ covariance, truth["means"][1 + i] - x, atol=1e-8)
        np.testing.assert_allclose(r.drift[row] + r.limit[row] @ drift, 0, atol=1e-10)
        np.testing.assert_allclose(r.score[row] - r.limit[row] @ np.linalg.inv(covariance), 0, atol=1e-8)
    np.testing.assert_allclose(r.control_drift + r.control_limit @ truth["drift"], 0, atol=1e-10)
    np.testing.assert_allclose(r.control_score @ truth["covariance"], r.control_limit, atol=1e-10)
    assert len(exact_score_responses(truth).score) == 6


def test_responses_of_all_genes_hold_the_drift_and_the_precision() -> None:
    """``-L^+ V`` with p = d is M for the true drift, and minus the precision matrix for the score: symmetric, whatever the direction."""
    truth = linear_sde_screen(n_perturbed=100, cells_per_perturbation=1).uns["truth"]
    r, precision = exact_score_responses(truth), np.linalg.inv(truth["covariance"])
    drift, field = -np.linalg.pinv(r.limit) @ r.drift, -np.linalg.pinv(r.limit) @ r.score
    assert np.linalg.norm(drift - truth["drift"]) < 1e-8 * np.linalg.norm(truth["drift"])
    assert np.linalg.norm(field + precision) < 1e-6 * np.linalg.norm(precision)
    assert np.linalg.norm(truth["drift"] - truth["drift"].T) > 0.5 * np.linalg.norm(truth["drift"])


def test_knockdowns_scale_columns_of_what_is_recovered_at_the_control_mean() -> None:
    truth = screen(n_perturbed=12, mechanism="knockdown", basal=(4.0, 6.0)).uns["truth"]
    centre = truth["means"][0]
    r = exact_score_responses(truth, at=centre)
    assert np.abs(r.drift * (1 - truth["mask"])).max() < 1e-10  # the target alone responds
    recovered = -np.linalg.solve(r.limit - centre, r.drift)
    factor = recovered / np.where(truth["drift"] == 0, np.nan, truth["drift"])
    np.testing.assert_allclose(np.nanmin(factor, 0), np.nanmax(factor, 0), rtol=1e-8)
    assert np.abs(recovered[truth["drift"] == 0]).max() < 1e-9


@pytest.mark.parametrize("variant", ["knock-down", "counts"])
def test_is_a_screen_of_the_library(variant: str, tmp_path: Any) -> None:
    adata = screen(**VARIANTS[variant])
    data = pc.PerturbationData.from_anndata(adata, perturbation_key="perturbation", control="control")
    assert data.kind == adata.uns["X_kind"] and set(data.perturbations) == set(adata.uns["truth"]["perturbations"])
    adata.write_h5ad(tmp_path / "screen.h5ad")
    back = ad.read_h5ad(tmp_path / "screen.h5ad")
    for key in ("drift", "means", "shift", "targets"):
        np.testing.assert_array_equal(back.uns["truth"][key], adata.uns["truth"][key])
    assert list(back.uns["truth"]["perturbations"]) == list(adata.uns["truth"]["perturbations"])


@pytest.mark.parametrize(
    "wrong",
    [
        {"n_genes": 1}, {"n_perturbed": 13}, {"degree": 12}, {"doubles": 16}, {"graph": "ba"}, {"effects": "on"}, {"mechanism": "ko"},
        {"shift": (3.0, 1.0)}, {"shift": 4.0}, {"knockdown": (0.2, 1.1)}, {"penetrance": 1.2}, {"penetrance": (0.1, 2.0)}, {"sigma": 0.0},
        {"sigma": float("nan")}, {"zero_inflation": -0.1}, {"library_size": 0.0}, {"depth_sd": (0.1, 0.2)}, {"off_target": 1.5},
        {"seed": -1},
        {"cells_per_perturbation": 0}, {"n_control": 2.5}, {"cells_per_double": True}, {"basal": (0.0, float("inf"))},
    ],
)  # fmt: skip
def test_refusals_name_the_argument(wrong: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=next(iter(wrong)) + "="):
        screen(**wrong)
