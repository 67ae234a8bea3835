"""Regulatory and structural simulators: means in closed form, the semantics of do, knobs that are off, truth against the cells.

Statistical checks compare a family of statistics with the normal quantile that a union bound gives (``bound``): at a fresh seed a correct
simulator would fail one such comparison with probability of about .001. Seeds are fixed.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import anndata as ad
import networkx as nx
import numpy as np
import pytest
import scipy.sparse as sp
from scipy import stats
from scipy.linalg import solve_continuous_lyapunov

import pyrocausal as pc
from pyrocausal.errors import DataError
from pyrocausal.simulate_regulatory import STRATUM, System, interactions_of, random_system, regulatory_screen
from pyrocausal.simulate_scm import scm_screen

SMALL: dict[str, Any] = {"n_genes": 8, "n_perturbed": 4, "doubles": 3, "cells_per_perturbation": 60, "n_control": 150}
WORLDS = [(m, i) for m in ("linear", "tanh", "hill") for i in ("do", "shift")]


@cache
def screen(**more: Any) -> ad.AnnData:
    return regulatory_screen(**SMALL | more)


@cache
def scm(**more: Any) -> ad.AnnData:
    return scm_screen(**{"n_genes": 12, "n_perturbed": 6, "doubles": 8, "degree": 4.0, "seed": 2} | more)


def bound(n: int) -> float:
    return float(stats.norm.isf(0.0005 / n))


def labels(adata: ad.AnnData) -> np.ndarray:
    return adata.obs["perturbation"].astype(str).to_numpy()


def descendants(adata: ad.AnnData, condition: str) -> set[int]:
    truth = adata.uns["truth"]
    network = nx.from_numpy_array((truth["graph"] != 0).astype(int), create_using=nx.DiGraph)
    names = list(truth["perturbations"])
    roots = {int(t) for part in condition.split("+") for t in np.flatnonzero(truth["mask"][names.index(part)])}
    return roots.union(*(nx.descendants(network, t) for t in roots))


@pytest.mark.parametrize("cycles", [True, False])
def test_linear_means_are_those_of_the_mutilated_system(cycles: bool) -> None:
    adata = screen(cycles=cycles, seed=1)
    truth = adata.uns["truth"]
    m = np.diag(truth["decay"]) - truth["graph"]
    control = np.linalg.solve(m.T, truth["basal"])
    np.testing.assert_allclose(truth["states"][0], control, atol=1e-10)
    for q, condition in enumerate(truth["conditions"][1:], 1):
        parts = [list(truth["perturbations"]).index(p) for p in condition.split("+")]
        held = truth["targets"][parts]
        free = np.setdiff1d(np.arange(8), held)
        level = truth["states"][q, held]
        x = np.linalg.solve(m[np.ix_(free, free)].T, truth["basal"][free] - level @ m[np.ix_(held, free)])
        np.testing.assert_allclose(truth["states"][q, free], x, atol=1e-10)
        np.testing.assert_allclose(level, [truth["states"][1 + p, t] for p, t in zip(parts, held, strict=True)], atol=1e-12)


def test_linear_shifts_are_additive_and_their_covariance_is_lyapunovs() -> None:
    adata = screen(intervention="shift", n_control=4000, doubles=6, seed=2)
    truth = adata.uns["truth"]
    np.testing.assert_allclose(truth["interaction"], 0, atol=1e-10)
    assert not truth["stratum"].any()
    x = adata.obsm["state"][labels(adata) == "control"].astype(float)
    drift = truth["graph"] - np.diag(truth["decay"])
    covariance = solve_continuous_lyapunov(drift.T, -np.diag(truth["sigma"] ** 2))
    sd = np.sqrt(np.diag(covariance))
    # sampling error of 36 correlations and variances from 4,000 cells, and .06 for steps of finite length
    assert (np.abs(np.cov(x.T) - covariance) / np.outer(sd, sd) < bound(36) * np.sqrt(2 / 4000) + 0.06).all()


@pytest.mark.parametrize(("mechanism", "intervention"), WORLDS)
def test_cells_have_the_means_that_the_truth_says(mechanism: str, intervention: str) -> None:
    adata = screen(mechanism=mechanism, intervention=intervention, seed=3)
    truth, x = adata.uns["truth"], adata.obsm["state"].astype(float)
    z = []
    for q, condition in enumerate(truth["conditions"]):
        cells = x[labels(adata) == condition]
        sd = cells.std(0, ddof=1)
        held = sd < 1e-6
        np.testing.assert_allclose(cells[:, held], np.broadcast_to(truth["states"][q, held], (len(cells), held.sum())), rtol=1e-5)
        se = np.sqrt(sd[~held] ** 2 / len(cells) + truth["error"] ** 2 + sd[~held] ** 2 / 200)  # the truth's own: its PATHS cells
        z.append((cells.mean(0)[~held] - truth["states"][q, ~held]) / se)
    assert np.abs(np.concatenate(z)).max() < bound(8 * 8)


@pytest.mark.parametrize(("mechanism", "intervention"), WORLDS)
def test_what_does_not_descend_from_a_target_is_not_moved(mechanism: str, intervention: str) -> None:
    adata = screen(mechanism=mechanism, intervention=intervention, cycles=False, off_target=1.0, seed=4)
    truth = adata.uns["truth"]
    effect = truth["expression"][1:] - truth["expression"][0]
    for row, condition in zip(effect, truth["conditions"][1:], strict=True):
        below = descendants(adata, condition)
        still = [k for k in range(8) if k not in below]
        np.testing.assert_allclose(row[still], 0, atol=1e-12)
        assert (np.abs(row[sorted(below)]) > 1e-6).all()
    assert (truth["mask"].sum(1) == 2).all()


@pytest.mark.parametrize("mechanism", ["linear", "tanh", "hill"])
def test_production_by_loops(mechanism: Any) -> None:
    rng = np.random.default_rng(0)
    system = random_system(6, 2.0, True, mechanism, rng)
    x = rng.uniform(0.1, 3, (4, 6))
    expected = np.empty_like(x)
    for n in range(4):
        for k in range(6):
            if mechanism == "hill":
                value = system.basal[k]
                for j in range(6):
                    h = x[n, j] ** 2 / (system.half[j] ** 2 + x[n, j] ** 2)
                    value *= 1 + (np.exp(system.graph[j, k]) - 1) * h
            else:
                drive = sum(x[n, j] * system.graph[j, k] for j in range(6))
                value = system.basal[k] + (3 * np.tanh(drive) if mechanism == "tanh" else drive)
            expected[n, k] = value
    np.testing.assert_allclose(system.production(x), expected, rtol=1e-10)
    if mechanism == "hill":
        np.testing.assert_allclose(system.production(system.half), system.half * system.decay, rtol=1e-10)


def test_a_held_gene_is_held_and_a_step_is_eulers() -> None:
    system = System("linear", np.array([[0.0, 0.5], [0.0, 0.0]]), np.ones(2), np.full(2, 2.0), np.array([0.3, 0.4]), np.ones(2))
    x = system.step(np.array([1.0, 2.0]), np.array([0.1, 0.0]), np.array([np.nan, 7.0]), np.array([1.0, 1.0]))
    np.testing.assert_allclose(x, [1 + 0.05 * (1 - 2 + 0.1) + np.sqrt(0.05) * 0.3, 7.0])


def test_strata_by_brute_force() -> None:
    rng = np.random.default_rng(0)
    expression, pairs = rng.normal(size=(1 + 3 + 2, 5)), [(0, 2), (1, 2)]
    found = interactions_of(expression, pairs)
    for r, (a, b) in enumerate(pairs):
        e = expression - expression[0]
        gap = e[4 + r] - e[1 + a] - e[1 + b]
        np.testing.assert_allclose(found["interaction"][r], gap)
        assert found["nonadditive"][r] == pytest.approx(gap @ gap / (e[4 + r] @ e[4 + r]))
        assert found["stratum"][r] == (found["nonadditive"][r] > STRATUM)


def test_knobs_leave_the_network_alone_and_do_what_they_say() -> None:
    plain = screen(counts=True)
    faulty = screen(counts=True, penetrance=0.5, off_target=1.0, systematic=0.5, n_batches=3, batch_sd=0.4, depth_sd=0.5, dispersion=2.0)
    for name in ("graph", "targets", "conditions", "basal", "pairs"):
        np.testing.assert_array_equal(plain.uns["truth"][name], faulty.uns["truth"][name])
    treated = np.array([[p in label.split("+") for p in plain.uns["truth"]["perturbations"]] for label in labels(plain)])
    np.testing.assert_array_equal(plain.obsm["hit"], treated)
    assert (plain.obs["size"] == 1).all() and set(plain.obs["batch"]) == {"batch0"} and not plain.uns["truth"]["batch"].any()
    hit = faulty.obsm["hit"]
    assert not hit[~treated].any() and abs(hit[treated].mean() - 0.5) < bound(1) * 0.5 / np.sqrt(treated.sum())
    assert (faulty.uns["truth"]["mask"].sum(1) == 2).all()
    assert faulty.obs["size"].std() > 0.3 and len(set(faulty.obs["batch"])) == 3
    assert pc.PerturbationData.from_anndata(faulty, batch_key="batch").kind == "counts"


def test_cells_that_were_not_hit_are_control_cells() -> None:
    adata = screen(penetrance=(0.3, 0.6), intervention="do", cells_per_perturbation=300, seed=5)
    truth = adata.uns["truth"]
    missed = ~adata.obsm["hit"].any(1) & (labels(adata) != "control")
    x, control = adata.obsm["state"][missed].astype(float), adata.obsm["state"][labels(adata) == "control"].astype(float)
    z = (x.mean(0) - control.mean(0)) / np.sqrt(x.var(0) / len(x) + control.var(0) / len(control))
    assert np.abs(z).max() < bound(8) and ((truth["penetrance"] >= 0.3) & (truth["penetrance"] <= 0.6)).all()


def test_a_null_screen_has_no_effect_at_all() -> None:
    adata = screen(null=True, systematic=1.0, mechanism="tanh", seed=6)
    truth = adata.uns["truth"]
    np.testing.assert_allclose(truth["expression"] - truth["expression"][0], 0, atol=1e-12)
    assert not truth["nonadditive"].any()
    x, control = adata.obsm["state"][labels(adata) != "control"], adata.obsm["state"][labels(adata) == "control"]
    assert stats.kstest(stats.ttest_ind(x, control).pvalue, "uniform").pvalue > 0.001  # eight genes, nearly independent


def test_systematic_shift_moves_every_perturbed_cell() -> None:
    adata = screen(systematic=2.0, intervention="shift", seed=7)
    truth, plain = adata.uns["truth"], screen(intervention="shift", seed=7).uns["truth"]
    extra = truth["states"] - plain["states"]
    np.testing.assert_allclose(extra[1:], np.broadcast_to(extra[1], extra[1:].shape), atol=1e-10)
    assert not extra[0].any() and np.abs(extra[1]).max() > 0.1


@pytest.mark.parametrize("mechanism", ["tanh", "hill"])
def test_counts_have_the_expected_shares_and_depth(mechanism: str) -> None:
    adata = screen(mechanism=mechanism, counts=True, library_size=200.0, depth_sd=0.3, dispersion=5.0, n_control=1500, seed=8)
    truth, y = adata.uns["truth"], np.asarray(adata.X.todense(), dtype=float)
    assert sp.issparse(adata.X)
    control = y[labels(adata) == "control"]
    share = np.expm1(truth["expression"][0]) / 1e4
    library = control.sum(1)
    residual = control - library[:, None] * share
    se = residual.std(0) / np.sqrt(len(control))
    # the truth's own error: the read-out averaged over 200 cells
    assert (np.abs(residual.mean(0)) < bound(8) * se + 3 * 200 * share / np.sqrt(200)).all()
    assert library.mean() == pytest.approx(200, rel=0.1)
    assert share.sum() == pytest.approx(1)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"mechanism": "cubic"}, "mechanism='cubic'"),
        ({"n_perturbed": 9}, "n_perturbed=9"),
        ({"doubles": 7}, "make 6 pairs"),
        ({"penetrance": (0.8, 0.2)}, "penetrance="),
        ({"penetrance": 1.2}, "penetrance=1.2"),
        ({"strength": -1.0}, "strength=-1.0"),
        ({"off_target": 2}, "off_target=2"),
        ({"n_control": 0}, "n_control=0"),
        ({"dispersion": 0.0}, "dispersion=0.0"),
        ({"direction": "sideways"}, "direction='sideways'"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(DataError, match=match):
        regulatory_screen(**SMALL | arguments)


@pytest.mark.parametrize("intervention", ["do", "shift"])
def test_linear_scm_means_by_path_sums(intervention: str) -> None:
    adata = scm(intervention=intervention)
    truth = adata.uns["truth"]
    graph, d = truth["graph"], 12
    assert nx.is_directed_acyclic_graph(nx.from_numpy_array(graph, create_using=nx.DiGraph))
    for q, condition in enumerate(truth["conditions"][1:], 1):
        held = [truth["targets"][list(truth["perturbations"]).index(p)] for p in condition.split("+")]
        cut, push = graph.copy(), np.zeros(d)
        if intervention == "do":
            cut[:, held] = 0
            raw = -3 * np.sqrt((truth["sigma"] * truth["spread"])[held] ** 2 + 1) / truth["spread"][held]
        else:
            raw = -3 / truth["spread"][held]
        push[held] = raw
        np.testing.assert_allclose(truth["states"][q], push @ np.linalg.inv(np.eye(d) - cut), atol=1e-10)
    if intervention == "shift":
        np.testing.assert_allclose(truth["interaction"], 0, atol=1e-10)
    else:
        assert truth["nonadditive"].max() > 1e-3


@pytest.mark.parametrize("mechanism", ["linear", "tanh"])
def test_scm_cells_are_standardised_and_follow_their_equations(mechanism: str) -> None:
    adata = scm(mechanism=mechanism, n_control=3000)
    truth, x = adata.uns["truth"], adata.X[labels(adata) == "control"].astype(float)
    own = 2 / np.sqrt(4000) if mechanism == "tanh" else 0.0  # of the truth's own paths
    assert np.abs(x.mean(0)).max() < bound(12) / np.sqrt(3000) + own
    assert np.abs(x.std(0) - 1).max() < bound(12) / np.sqrt(6000) + own
    if mechanism == "linear":
        residual = x - x @ truth["graph"]
        assert np.abs(residual.std(0) / truth["sigma"] - 1).max() < bound(12) / np.sqrt(6000)
        correlation = np.corrcoef(residual.T)[np.triu_indices(12, 1)]
        assert np.abs(correlation).max() < bound(66) / np.sqrt(3000)
    for q, condition in enumerate(truth["conditions"][1:7], 1):
        cells = adata.X[labels(adata) == condition].astype(float)
        sd = cells.std(0, ddof=1)
        z = (cells.mean(0) - truth["states"][q]) / np.maximum(sd * np.sqrt(1 / len(cells) + own**2), 1e-4)
        assert np.abs(z).max() < bound(6 * 12)


def test_scm_counts_are_about_one_for_each_gene() -> None:
    adata = scm(counts=True)
    control = np.asarray(adata.X[labels(adata) == "control"].todense(), dtype=float)
    assert control.mean() == pytest.approx(1.0, abs=0.1)
    np.testing.assert_allclose(np.expm1(adata.uns["truth"]["expression"]).sum(1), 1e4)
    share = np.expm1(adata.uns["truth"]["expression"][0]) / 1e4
    se = control.std(0) / np.sqrt(len(control)) / 12 + 0.6 / 12 / np.sqrt(4000)
    assert (np.abs(control.mean(0) / control.mean(0).sum() - share) < bound(12) * se).all()
