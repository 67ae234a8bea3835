"""Screens with a latent graph: the structural equations, the truth and the published toy, each against something written independently.

Statistical checks compare a family of statistics with the normal quantile that a union bound over the family gives (``bound``): at a fresh
seed a correct simulator would fail one such comparison with probability of about .001. Seeds are fixed.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import anndata as ad
import networkx as nx
import numpy as np
import pytest
import scipy.sparse as sp
from scipy import stats

import pyrocausal as pc
from pyrocausal.errors import DataError
from pyrocausal.simulate_graph import chain_screen, embedding_table, graph_screen, solve_nodes

CHAIN: dict[str, Any] = {"n_control": 60, "n_cells": 20, "n_double": 10}
GRAPH: dict[str, Any] = {"n_latent": 5, "n_genes": 23, "n_perturbations": 12, "cells_per_perturbation": 15, "n_control": 40}
VARIANTS: dict[str, Callable[..., ad.AnnData]] = {
    "chain": lambda **kw: chain_screen(**CHAIN | kw),
    "anchored": lambda **kw: graph_screen(**GRAPH | {"doubles": 4, "edge_probability": 0.4} | kw),
    "relu": lambda **kw: graph_screen(**GRAPH | {"structural": "relu", "edge_probability": 0.4} | kw),
    "softplus": lambda **kw: graph_screen(**GRAPH | {"structural": "softplus", "edge_probability": 0.4} | kw),
    "counts": lambda **kw: graph_screen(**GRAPH | {"likelihood": "negative_binomial"} | kw),
    "mlp": lambda **kw: graph_screen(**GRAPH | {"decoder": "mlp"} | kw),
    "mlp counts": lambda **kw: graph_screen(**GRAPH | {"decoder": "mlp", "likelihood": "negative_binomial"} | kw),
}


def dense(adata: ad.AnnData) -> np.ndarray:
    return np.asarray(adata.X.toarray() if sp.issparse(adata.X) else adata.X, dtype=float)


def latents(adata: ad.AnnData, key: str) -> np.ndarray:
    return np.asarray(adata.obsm[key], dtype=float)


def labels(adata: ad.AnnData) -> np.ndarray:
    return adata.obs["perturbation"].astype(str).to_numpy()


def shifts(adata: ad.AnnData) -> np.ndarray:
    """Of every cell, from its label and the table of effects."""
    truth = adata.uns["truth"]
    row = dict(zip(truth["perturbations"], truth["effect"], strict=True)) | {"control": np.zeros(truth["effect"].shape[1])}
    return np.array([sum(row[part] for part in label.split("+")) for label in labels(adata)])


def path_sums(graph: np.ndarray) -> np.ndarray:
    """Entry (j, k): products of weights summed over all paths from j to k; 1 on the diagonal."""
    network = nx.from_numpy_array(graph, create_using=nx.DiGraph)
    out = np.eye(len(graph))
    for j, k in combinations(range(len(graph)), 2):
        out[j, k] = sum(np.prod([graph[edge] for edge in path]) for path in nx.all_simple_edge_paths(network, j, k))
    return out


def bound(n: int, alpha: float = 1e-3) -> float:
    """What the largest of n standard normals, dependent or not, exceeds in size with probability below alpha."""
    return float(stats.norm.isf(alpha / (2 * n)))


def same(a: ad.AnnData, b: ad.AnnData) -> None:
    np.testing.assert_array_equal(dense(a), dense(b))
    assert list(labels(a)) == list(labels(b)) and list(a.obs_names) == list(b.obs_names)
    for key in ("u", "z", "rate"):
        np.testing.assert_array_equal(a.obsm[key], b.obsm[key])
    assert set(a.uns["truth"]) == set(b.uns["truth"])
    for key in set(a.uns["truth"]) - {"settings"}:
        np.testing.assert_array_equal(a.uns["truth"][key], b.uns["truth"][key])


# -- every variant -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
def test_shapes_truth_and_what_the_library_makes_of_it(name: str) -> None:
    adata = VARIANTS[name]()
    truth, n = adata.uns["truth"], adata.n_obs
    p, d = truth["mask"].shape
    assert adata.obsm["u"].shape == adata.obsm["z"].shape == (n, d) and adata.obsm["rate"].shape == adata.shape
    assert truth["graph"].shape == (d, d) and truth["penetrance"].shape == (p,)
    np.testing.assert_array_equal(truth["graph"], np.triu(truth["graph"], 1))
    np.testing.assert_array_equal(truth["mask"].sum(1), 1)
    np.testing.assert_array_equal(truth["effect"], truth["penetrance"][:, None] * truth["mask"])
    data = pc.PerturbationData.from_anndata(adata)
    assert data.kind == adata.uns["X_kind"] == ("counts" if "counts" in name else "normalised")
    assert list(data.perturbations) == list(truth["perturbations"])  # rows of the truth are rows of the models' tables
    assert list(data.labels) == list(labels(adata))  # pairs are spelled as the library spells them
    np.testing.assert_allclose(data.dose @ truth["effect"], shifts(adata), rtol=1e-6)


@pytest.mark.parametrize("name", VARIANTS)
def test_structural_equations_hold_in_every_cell(name: str) -> None:
    adata = VARIANTS[name]()
    graph, u, e = adata.uns["truth"]["graph"], latents(adata, "u"), latents(adata, "z") + shifts(adata)
    link: dict[str, Callable[[float], float]] = {
        "linear": lambda v: v,
        "relu": lambda v: max(v, 0.0),
        "softplus": lambda v: float(np.log(1 + np.exp(v))),
    }
    f = link[adata.uns["truth"]["settings"]["structural"]]
    right = e.copy()
    for cell, row in zip(right, u, strict=True):
        for j, k in zip(*np.nonzero(graph), strict=True):
            cell[k] += f(row[j]) * graph[j, k]
    np.testing.assert_allclose(u, right, rtol=0, atol=1e-5)  # stored in float32
    assert (graph != 0).any() or name in ("counts", "mlp", "mlp counts")  # sparse
    if name in ("relu", "softplus"):
        assert np.abs(u - e - u @ graph).max() > 0.1  # the check tells equations apart


@pytest.mark.parametrize("name", VARIANTS)
def test_same_seed_same_data_other_seed_other_data(name: str) -> None:
    first, other = VARIANTS[name](seed=3), VARIANTS[name](seed=4)
    same(first, VARIANTS[name](seed=3))
    assert (first.obsm["z"] != other.obsm["z"]).all() and (dense(first) != dense(other)).mean() > 0.3
    if name != "chain":
        for key in ("penetrance", "embedding", "target_map", "graph"):
            assert (first.uns["truth"][key] != other.uns["truth"][key]).any()


@pytest.mark.parametrize("name", VARIANTS)
def test_h5ad_round_trip(name: str, tmp_path: Path) -> None:
    adata = VARIANTS[name]()
    adata.write_h5ad(tmp_path / "screen.h5ad")
    back = ad.read_h5ad(tmp_path / "screen.h5ad")
    same(adata, back)
    settings = adata.uns["truth"]["settings"]
    assert {k: type(v)(back.uns["truth"]["settings"][k]) for k, v in settings.items()} == settings


def test_settings_are_the_arguments() -> None:
    settings = graph_screen(**GRAPH, doubles=2, weight=(0.1, 0.2), seed=9).uns["truth"]["settings"]
    assert {k: settings[k] for k in GRAPH} == GRAPH and settings["weight"] == [0.1, 0.2] and settings["seed"] == 9
    assert settings["simulator"] == "graph" and len(settings) == 18
    assert chain_screen(**CHAIN).uns["truth"]["settings"] == {
        "simulator": "chain", "structural": "relu", "n_nodes": 5, "n_genes": 5, "shift": 5.0, "seed": 1234, **CHAIN,
    }  # fmt: skip


# -- the chain ---------------------------------------------------------------------------------------------------------------------


def test_chain_is_the_published_toy() -> None:
    adata = chain_screen()
    x, label, split = dense(adata), labels(adata), adata.obs["split"].to_numpy()
    assert adata.shape == (10240 + 5 * 2048 + 10 * 1024, 5)
    np.testing.assert_array_equal(adata.X, adata.obsm["u"])
    np.testing.assert_array_equal(adata.obsm["rate"], adata.obsm["u"])
    np.testing.assert_array_equal(adata.uns["truth"]["graph"], np.diag(np.ones(4), 1))
    np.testing.assert_array_equal(adata.uns["truth"]["effect"], 5 * np.eye(5))
    # the first draws of the reference's generator are its first control cells, then come the first cells of target 0
    rng = np.random.RandomState(1234)
    control, first = (rng.randn(2048, 5).astype(np.float32) for _ in range(2))
    np.testing.assert_array_equal(adata.obsm["z"][label == "control"][:2048], control)
    np.testing.assert_array_equal(adata.obsm["z"][label == "pert0"], first)
    # recorded from a run of the reference's equations in the reference's order: means of controls, last cells of target 4 and of 3+4
    recorded = [
        (x[label == "control"].mean(0), [0.000360205696, 0.401651951, 0.679753536, 0.920300706, 1.12091568]),
        (x[label == "pert4"][-1], [-0.1561456, 0.70782788, 0.61606903, 1.04919642, 5.16405726]),
        (x[label == "pert3+pert4"][-1], [1.10695906, 0.61449999, 2.10325082, 7.28069361, 12.27345515]),
    ]
    for ours, theirs in recorded:
        np.testing.assert_allclose(ours, theirs, rtol=2e-6, atol=1e-8)
    for j in range(5):
        assert list(split[label == f"pert{j}"]) == ["test"] * 1024 + ["train"] * 1024
    assert list(split[label == "control"]) == (["test"] * 1024 + ["train"] * 1024) * 5
    assert {f"pert{i}+pert{j}" for i, j in combinations(range(5), 2)} == {k for k in label if "+" in k}
    pair = np.array(["+" in k for k in label])
    assert pair.sum() == 10240 and set(split[pair]) == {"test"}


def test_chain_regressions_recover_every_edge_and_the_shift() -> None:
    adata = chain_screen()
    x, s = dense(adata), shifts(adata)
    for k in range(5):  # x_k on relu of all nodes before it, an indicator of the shift, and a constant
        design = np.column_stack([np.maximum(x[:, :k], 0), s[:, k] > 0, np.ones(len(x))])
        coefficient, rss, *_ = np.linalg.lstsq(design, x[:, k])
        se = np.sqrt(rss[0] / len(x) * np.diag(np.linalg.inv(design.T @ design)))
        expected = [*np.eye(5)[k - 1][:k], 5.0, 0.0] if k else [5.0, 0.0]
        assert np.abs((coefficient - expected) / se).max() < bound(20) and se.max() < 0.03
        assert abs(rss[0] / len(x) - 1) < bound(5) * np.sqrt(2 / len(x))


def test_chain_marginals_of_control_cells() -> None:
    u = latents(adata := chain_screen(), "u")[labels(adata) == "control"]
    n = len(u)
    assert stats.kstest(u[:, 0], "norm").pvalue > 1e-3
    # node 1 is a normal plus a rectified normal: mean 1 / sqrt(2 pi), variance 1 + 1/2 - 1 / (2 pi), and its distribution function
    noise = stats.norm.ppf((np.arange(4000) + 0.5) / 4000)
    at = np.linspace(-3, 4, 15)
    cdf = stats.norm.cdf(at[:, None] - np.maximum(noise, 0)).mean(1)
    assert abs(u[:, 1].mean() - 1 / np.sqrt(2 * np.pi)) < bound(1) * np.sqrt((1.5 - 0.5 / np.pi) / n)
    share = (u[:, 1] <= at[:, None]).mean(1)
    assert np.abs((share - cdf) / np.sqrt(cdf * (1 - cdf) / n)).max() < bound(15)


def test_chain_of_other_sizes() -> None:
    adata = chain_screen(n_nodes=3, n_control=10, n_cells=5, n_double=0, shift=-2.0, seed=0)
    assert adata.n_obs == 25 and set(labels(adata)) == {"control", "pert0", "pert1", "pert2"}
    np.testing.assert_array_equal(adata.uns["truth"]["effect"], -2 * np.eye(3))
    assert (adata.obs["split"] == "test").sum() == 3 * 2 + 1 + 1 + 2  # 3, 3 and 4 control cells go with the targets
    np.testing.assert_array_equal(chain_screen(n_nodes=1, **CHAIN).uns["truth"]["graph"], [[0.0]])
    padded = chain_screen(**CHAIN, n_genes=10)  # as the reference has it
    assert padded.shape[1] == 10 and not dense(padded)[:, 5:].any()
    np.testing.assert_array_equal(padded.X[:, :5], chain_screen(**CHAIN).X)
    with pytest.raises(DataError, match="5 genes are zero in every cell"):
        pc.PerturbationData.from_anndata(padded)


# -- random graphs -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_total_effects_are_path_sums(seed: int) -> None:
    adata = graph_screen(**GRAPH | {"n_latent": 9, "n_perturbations": 18}, edge_probability=0.5, seed=seed)
    graph = adata.uns["truth"]["graph"]
    total = path_sums(graph)
    np.testing.assert_allclose(solve_nodes(np.eye(9), graph), total, atol=1e-12)
    np.testing.assert_allclose(latents(adata, "u"), (latents(adata, "z") + shifts(adata)) @ total, atol=2e-5)


def test_graph_has_the_edges_asked_for() -> None:
    n = 60
    adata = graph_screen(n_latent=n, n_genes=n, n_perturbations=2 * n, cells_per_perturbation=1, n_control=1, n_embedding=40, seed=1)
    weight = adata.uns["truth"]["graph"][np.triu_indices(n, 1)]
    edges = weight[weight != 0]
    assert abs((weight != 0).mean() - 0.15) < bound(4) * np.sqrt(0.15 * 0.85 / len(weight))
    assert abs((edges > 0).mean() - 0.5) < bound(4) * 0.5 / np.sqrt(len(edges))
    assert stats.kstest(np.abs(edges), stats.uniform(0.4, 0.5).cdf).pvalue > 2.5e-4
    assert stats.kstest(adata.uns["truth"]["penetrance"], stats.uniform(0.3, 1.7).cdf).pvalue > 2.5e-4
    none = graph_screen(**GRAPH, edge_probability=0)
    assert not none.uns["truth"]["graph"].any()
    np.testing.assert_allclose(none.obsm["u"], none.obsm["z"] + shifts(none), atol=1e-6)
    full = graph_screen(**GRAPH, edge_probability=1).uns["truth"]["graph"]
    np.testing.assert_array_equal(full != 0, np.triu(np.ones((5, 5)), 1))


def test_perturbations_move_their_target_and_what_descends_from_it() -> None:
    adata = graph_screen(doubles=10, n_genes=16, seed=2)
    truth, u, label = adata.uns["truth"], latents(adata, "u"), labels(adata)
    total = np.linalg.inv(np.eye(16) - truth["graph"])
    sd = np.sqrt((total**2).sum(0))  # of each node, in any condition
    control = u[label == "control"]
    row = {name: truth["effect"][i] for i, name in enumerate(truth["perturbations"])}
    scores = []
    for name in sorted(set(label) - {"control"}):
        cells = u[label == name]
        expected = sum(row[part] for part in name.split("+")) @ total  # c_p times the target's row of (I - A)^-1
        scores.append((cells.mean(0) - control.mean(0) - expected) / (sd * np.sqrt(1 / len(cells) + 1 / len(control))))
    score = np.array(scores)
    assert score.shape == (70, 16) and np.abs(score).max() < bound(score.size)
    assert 0.8 < np.sqrt((score**2).mean()) < 1.2  # the standard errors are right, and the bound above has power
    # node marginals without a perturbation: normal, mean 0, the variance that the paths give
    n = len(control)
    assert min(stats.kstest(control[:, k] / sd[k], "norm").pvalue for k in range(16)) > 1e-3 / 16
    assert np.abs(control.var(0) / sd**2 - 1).max() < bound(16) * np.sqrt(2 / n)
    z = latents(adata, "z")
    assert np.abs(np.corrcoef(z.T) - np.eye(16)).max() < bound(120) / np.sqrt(len(z))


@pytest.mark.parametrize(
    ("sizes", "seed"), [({}, 0), ({}, 1), ({"n_latent": 20, "n_perturbations": 40, "n_embedding": 5, "n_genes": 20}, 2)]
)
def test_targets_follow_from_the_embedding_and_every_node_has_two(sizes: dict[str, int], seed: int) -> None:
    adata = graph_screen(**{"cells_per_perturbation": 1, "n_control": 1, **sizes}, seed=seed)
    truth = adata.uns["truth"]
    np.testing.assert_array_equal((truth["embedding"] @ truth["target_map"]).argmax(1), truth["mask"].argmax(1))
    assert truth["mask"].sum(0).min() >= 2
    node = truth["mask"].argmax(1)
    assert (np.diff(node) < 0).sum() > len(node) / 4  # in no order of nodes
    table = embedding_table(adata)
    assert list(table.index) == list(truth["perturbations"]) and table.index.name == "perturbation" and table.columns.is_unique
    np.testing.assert_array_equal(table.to_numpy(), truth["embedding"])
    with pytest.raises(DataError, match="no embedding"):
        embedding_table(chain_screen(**CHAIN))


def test_embeddings_are_standard_normal() -> None:
    e = graph_screen(n_perturbations=3000, cells_per_perturbation=1, n_control=1, n_genes=16).uns["truth"]["embedding"]
    assert min(stats.kstest(e[:, k], "norm").pvalue for k in range(10)) > 1e-4  # redrawing is rare when there are many perturbations
    early, late = np.split(np.linalg.norm(e, axis=1), 2)
    assert stats.ks_2samp(early, late).pvalue > 1e-3  # what was redrawn is not at one end of the table


def test_the_truth_does_not_depend_on_cells_or_likelihood() -> None:
    reference = graph_screen(**GRAPH).uns["truth"]
    changes = (
        {"cells_per_perturbation": 3},
        {"likelihood": "negative_binomial"},
        {"structural": "relu"},
        {"decoder": "mlp"},
        {"doubles": 3},
    )
    for change in changes:
        truth = graph_screen(**GRAPH | change).uns["truth"]
        for key in set(reference) - {"settings"}:
            np.testing.assert_array_equal(truth[key], reference[key])


def test_doubles_are_distinct_pairs_with_both_shifts() -> None:
    adata = graph_screen(**GRAPH, doubles=66, cells_per_double=3)  # all pairs
    label = labels(adata)
    names = adata.uns["truth"]["perturbations"]
    assert {k for k in label if "+" in k} == {f"{a}+{b}" for a, b in combinations(names, 2)}
    assert (
        (latents(adata, "u") - latents(adata, "u") @ adata.uns["truth"]["graph"] - latents(adata, "z") - shifts(adata)) ** 2
    ).max() < 1e-9
    assert all((label == k).sum() == 3 for k in label if "+" in k)


# -- expression --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("likelihood", ["gaussian", "negative_binomial"])
def test_every_node_owns_its_genes(likelihood: Any) -> None:
    adata = graph_screen(**GRAPH, likelihood=likelihood)
    loadings, gain = adata.varm["loadings"], {"gaussian": 1.0, "negative_binomial": 0.3}[likelihood]
    assert loadings.shape == (23, 5)
    np.testing.assert_array_equal((loadings > 0).sum(0), 4)  # 23 // 5
    np.testing.assert_array_equal((loadings > 0).sum(1), [1] * 20 + [0] * 3)
    own = loadings[loadings != 0]
    assert own.min() > 0.5 * gain and own.max() < 1.5 * gain
    value = adata.var["intercept"].to_numpy() + latents(adata, "u") @ loadings.T
    if likelihood == "negative_binomial":
        value = np.exp(value)
        value *= 2000 / value.sum(1, keepdims=True)
    np.testing.assert_allclose(adata.obsm["rate"], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("decoder", ["anchored", "mlp"])
def test_gaussian_noise_is_what_was_asked_for(decoder: Any) -> None:
    adata = graph_screen(**GRAPH | {"cells_per_perturbation": 400}, noise=0.7, decoder=decoder)
    noise = (dense(adata) - latents(adata, "rate")) / 0.7
    n = len(noise)
    assert np.abs(noise.mean(0)).max() < bound(23) / np.sqrt(n)
    assert np.abs(noise.var(0) - 1).max() < bound(23) * np.sqrt(2 / n) * 1.05
    assert abs(np.corrcoef(noise.ravel(), latents(adata, "rate").ravel())[0, 1]) < bound(1) / np.sqrt(noise.size)
    silent = graph_screen(**GRAPH, noise=0, decoder=decoder)
    np.testing.assert_array_equal(silent.X, silent.obsm["rate"])
    if decoder == "mlp":
        assert "loadings" not in silent.varm and "intercept" not in silent.var
        np.testing.assert_allclose(silent.obsm["rate"].std(0), 1, rtol=1e-4)


@pytest.mark.parametrize("decoder", ["anchored", "mlp"])
def test_counts_are_negative_binomial(decoder: Any) -> None:
    adata = graph_screen(
        **GRAPH | {"cells_per_perturbation": 400}, likelihood="negative_binomial", library_size=500.0, decoder=decoder, seed=3
    )
    x, rate = dense(adata), latents(adata, "rate")
    np.testing.assert_allclose(rate.sum(1), 500, rtol=1e-5)
    score = (x - rate) / np.sqrt(rate + rate**2 / 10)
    assert abs(score.mean()) < bound(2) / np.sqrt(score.size)
    # kurtosis of the negative binomial: 3 + 6 / theta + 1 / variance
    fourth = 2 + 0.6 + 1 / (rate + rate**2 / 10)
    assert abs((score**2).mean() - 1) < bound(2) * np.sqrt(fourth.mean() / score.size)
    low, high = rate < np.median(rate), rate >= np.median(rate)
    for half in (low, high):  # a wrong theta would show as variances that depend on the mean
        assert abs((score[half] ** 2).mean() - 1) < bound(2) * np.sqrt(fourth[half].mean() / half.sum())


def test_mlp_mixes_all_nodes_into_every_gene() -> None:
    adata = graph_screen(**GRAPH | {"cells_per_perturbation": 200}, decoder="mlp", edge_probability=0.0, noise=0.0)
    u, x = latents(adata, "u"), dense(adata)
    design = np.column_stack([u, np.ones(len(u))])
    coefficient, rss, *_ = np.linalg.lstsq(design, x)
    assert (np.abs(coefficient[:5]) > 0.02).mean() > 0.8  # no node has genes of its own
    assert (rss / len(x) / x.var(0)).min() > 0.01  # and no gene is linear


# -- refusals ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("simulator", "arguments", "message"),
    [
        (chain_screen, {"n_nodes": 0}, "n_nodes=0 was given; give a whole number of at least 1"),
        (chain_screen, {"n_control": 0}, "n_control=0 was given"),
        (chain_screen, {"n_cells": 2.5}, "n_cells=2.5 was given; give a whole number"),
        (chain_screen, {"n_double": -1}, "n_double=-1 was given; give a whole number of at least 0"),
        (chain_screen, {"n_genes": 4}, "n_genes=4 was given; give a whole number of at least 5"),
        (chain_screen, {"shift": float("nan")}, "shift=nan was given; give a finite number$"),
        (graph_screen, {"n_latent": 0}, "n_latent=0 was given"),
        (graph_screen, {"n_latent": True}, "n_latent=True was given"),
        (graph_screen, {"n_genes": 15}, "n_genes=15 was given; give a whole number of at least 16"),
        (graph_screen, {"n_perturbations": 31}, "n_perturbations=31 was given; give a whole number of at least 32"),
        (graph_screen, {"cells_per_perturbation": 0}, "cells_per_perturbation=0 was given"),
        (graph_screen, {"n_control": 0}, "n_control=0 was given"),
        (graph_screen, {"n_embedding": 1}, "n_embedding=1 was given; give a whole number of at least 2"),
        (
            graph_screen,
            {"n_latent": 1000, "n_perturbations": 2000, "n_genes": 1000, "n_embedding": 2},
            "n_embedding=2 was given, in which some of the 1000 nodes",
        ),
        (graph_screen, {"edge_probability": 1.1}, "edge_probability=1.1 was given; give a finite number of at least 0 and at most 1"),
        (graph_screen, {"edge_probability": "0.1"}, "edge_probability='0.1' was given"),
        (graph_screen, {"weight": (0.9, 0.4)}, r"weight=\(0.9, 0.4\) was given; give the ends of a range"),
        (graph_screen, {"weight": 0.5}, "weight=0.5 was given"),
        (graph_screen, {"penetrance": (-1.0, 1.0)}, r"penetrance=\(-1.0, 1.0\) was given"),
        (graph_screen, {"penetrance": (0.0, float("inf"))}, r"penetrance=\(0.0, inf\) was given"),
        (graph_screen, {"penetrance": ("a", "b")}, r"penetrance=\('a', 'b'\) was given"),
        (graph_screen, {"structural": "Relu"}, "structural='Relu' was given; did you mean 'relu'"),
        (graph_screen, {"decoder": "linear"}, "decoder='linear' was given"),
        (graph_screen, {"likelihood": "poisson"}, "likelihood='poisson' was given"),
        (graph_screen, {"noise": -0.1}, "noise=-0.1 was given"),
        (graph_screen, {"library_size": 0}, "library_size=0 was given"),
        (graph_screen, {"doubles": 1771}, "doubles=1771 was given, but 60 perturbations make 1770 pairs; ask for fewer"),
        (graph_screen, {"seed": -1}, "seed=-1 was given"),
    ],
)
def test_bad_arguments_are_refused_in_one_sentence(simulator: Callable[..., ad.AnnData], arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match="^" + message) as caught:
        simulator(**arguments)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 140
