"""SCM: the search against brute force, the held system against its definition, recovery of a known network, and the rest of the library."""

from __future__ import annotations

import itertools
from pathlib import Path

import anndata as ad
import networkx as nx
import numpy as np
import pandas as pd
import pyro
import pytest
import torch

import pyrocausal as pc
from pyrocausal.dag_search import Regressions, Score, Walk, climb, descent, leads, regress
from pyrocausal.errors import PyrocausalError
from pyrocausal.interventions import parse
from pyrocausal.network import Moments, Network
from pyrocausal.simulate_scm import scm_screen
from pyrocausal.structural import hold, solve


def _without_cycles(d: int) -> list[np.ndarray]:
    """All networks over d genes."""
    pairs = [(j, k) for j in range(d) for k in range(d) if j != k]
    out = []
    for on in itertools.product((False, True), repeat=len(pairs)):
        edges = np.zeros((d, d), bool)
        edges[tuple(np.array([p for p, o in zip(pairs, on, strict=True) if o], dtype=int).reshape(-1, 2).T)] = True
        if nx.is_directed_acyclic_graph(nx.from_numpy_array(edges, create_using=nx.DiGraph)):
            out.append(edges)
    return out


def _regressions(x: np.ndarray) -> Regressions:
    d = x.shape[1]
    y = x - x.mean(0)
    return Regressions(np.repeat((y.T @ y)[None], d, 0), np.full(d, len(x) - 1.0), np.ones(d, bool))


def _screen(seed: int = 0, **settings: object) -> tuple[ad.AnnData, pc.PerturbationData]:
    adata = scm_screen(
        **{"n_genes": 12, "degree": 2.0, "n_perturbed": 8, "cells_per_perturbation": 150, "n_control": 400, "seed": seed} | settings
    )
    return adata, pc.PerturbationData.from_anndata(adata)


def _fit(data: pc.PerturbationData, seed: int = 0, **settings: object) -> pc.Fit:
    return pc.fit(*pc.build("scm", data, seed=seed, **settings), data, seed=seed, progress=False)


# -- the search --------------------------------------------------------------------------------------------------------------------


def test_the_score_is_the_gaussian_likelihood_less_the_penalty() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((200, 4)) @ rng.standard_normal((4, 4))
    score = Score(_regressions(x), gamma=0.3)
    for k, S in ((0, ()), (1, (0, 3)), (2, (0, 1, 3))):
        y = x - x.mean(0)
        rss = ((y[:, k] - y[:, S] @ np.linalg.lstsq(y[:, S], y[:, k], rcond=None)[0]) ** 2).sum() if S else (y[:, k] ** 2).sum()
        expected = -199 / 2 * np.log(rss / 199) - len(S) * (np.log(199) / 2 + 0.3 * np.log(4))
        value, gain = score.of(k, frozenset(S))
        assert value == pytest.approx(expected, rel=1e-7)
        for j in set(range(4)) - {k, *S}:
            assert gain[j] == pytest.approx(score.of(k, frozenset({*S, j}))[0] - value, abs=1e-5)


@pytest.mark.parametrize("seed", range(6))
def test_the_walk_finds_the_best_of_all_networks(seed: int) -> None:
    """Of the 543 networks over four genes."""
    rng = np.random.default_rng(seed)
    graph = np.triu(rng.standard_normal((4, 4)) * (rng.random((4, 4)) < 0.7), 1)
    x = rng.standard_normal((300, 4)) @ np.linalg.inv(np.eye(4) - graph)
    every = _without_cycles(4)
    assert len(every) == 543
    score = Score(_regressions(x))
    best = max(score.total(e) for e in every)
    walk = Walk(score, rng)
    edges = walk.start()
    tops = [score.total(edges := walk.step(edges)) for _ in range(30)]
    assert max(tops) == pytest.approx(best, abs=0.02)  # a step gains .01 at least


def test_a_climb_ends_without_cycles_where_no_edge_gains() -> None:
    rng = np.random.default_rng(3)
    x = rng.standard_normal((400, 9)) @ rng.standard_normal((9, 9))
    score = Score(_regressions(x))
    edges = climb(score, np.zeros((9, 9), bool), rng)
    graph = nx.from_numpy_array(edges, create_using=nx.DiGraph)
    assert nx.is_directed_acyclic_graph(graph)
    here = score.total(edges)
    for j, k in itertools.permutations(range(9), 2):
        new = edges.copy()
        new[j, k] = not new[j, k]
        if nx.is_directed_acyclic_graph(nx.from_numpy_array(new, create_using=nx.DiGraph)):
            assert score.total(new) <= here + 0.02
    reach = descent(edges)
    for j, k in itertools.permutations(range(9), 2):
        assert reach[j, k] == nx.has_path(graph, j, k) == leads(edges, j, k)


def test_what_cannot_be_told_apart_is_seen_both_ways() -> None:
    """Two genes, no perturbation of either: both directions have one score, and the walk takes both."""
    rng = np.random.default_rng(1)
    a = rng.standard_normal(500)
    score = Score(_regressions(np.stack([a, a + rng.standard_normal(500)], 1)))
    walk, seen = Walk(score, rng), []
    edges = walk.start()
    for _ in range(60):
        edges = walk.step(edges)
        seen.append(bool(edges[0, 1]))
    assert 5 < sum(seen) < 55  # fair coins fall outside once in 1e10 tries


def test_nearly_equal_genes_do_not_go_round_in_circles() -> None:
    rng = np.random.default_rng(2)
    a = rng.standard_normal(300)
    x = np.stack([a, a, a + 1e-9 * rng.standard_normal(300), rng.standard_normal(300)], 1)
    edges = climb(Score(_regressions(x)), np.zeros((4, 4), bool), rng)
    assert nx.is_directed_acyclic_graph(nx.from_numpy_array(edges, create_using=nx.DiGraph))


def test_regression_leaves_out_the_cells_that_were_perturbed() -> None:
    """Weights of the true network, from moments, are those of least squares over the cells that count."""
    adata, data = _screen()
    truth = adata.uns["truth"]
    targets = np.eye(12, dtype=bool)[data.genes.get_indexer(data.perturbations)]
    moments = Moments.of(data, targets)
    A, variance = regress(moments.regressions(np.ones_like(moments.mean)), truth["edges"])
    x, own = data.dense(np.float64), data.genes.get_indexer(data.labels)
    for k in range(12):
        S, rows = np.flatnonzero(truth["edges"][:, k]), own != k
        if len(S):
            design = np.column_stack([np.ones(rows.sum()), x[rows][:, S]])
            beta, rest = np.linalg.lstsq(design, x[rows, k], rcond=None)[:2]
            np.testing.assert_allclose(A[S, k], beta[1:], rtol=1e-6)
            cells = len(data) - (own == k).sum()
            assert variance[k] == pytest.approx(rest[0] / (cells - 1 - len(S)), rel=1e-6)


# -- the held system -----------------------------------------------------------------------------------------------------------------


def test_hold_is_the_mutilated_system() -> None:
    """Edges into what is held removed, value set, solved anew: for cells that hold different sets, and for worlds."""
    torch.manual_seed(0)
    graph = torch.randn(5, 5, dtype=torch.float64).triu(1)
    e = torch.randn(6, 5, dtype=torch.float64)
    value = torch.full((6, 5), torch.nan, dtype=torch.float64)
    value[1, 2], value[2, 0], value[2, 3], value[4] = 1.5, -1.0, 2.0, torch.arange(5.0, dtype=torch.float64)
    R = torch.linalg.inv(torch.eye(5, dtype=torch.float64) - graph)
    found = hold(e @ R, R, value)
    for n in range(6):
        held = ~value[n].isnan()
        cut, there = torch.where(held, 0.0, graph), torch.where(held, value[n].nan_to_num(), e[n])
        torch.testing.assert_close(found[n], solve(there[None], cut)[0], rtol=0, atol=1e-10)
    graphs = torch.randn(3, 1, 1, 5, 5, dtype=torch.float64).triu(1)
    reach = torch.linalg.inv(torch.eye(5, dtype=torch.float64) - graphs)
    values = torch.full((2, 1, 5), torch.nan, dtype=torch.float64)
    values[0, 0, 1], values[1, 0, 3], values[1, 0, 4] = 0.5, -1.0, 1.0
    worlds = hold((e @ reach.squeeze(-3)).expand(3, 2, 6, 5), reach, values)
    for s, k in itertools.product(range(3), range(2)):
        torch.testing.assert_close(worlds[s, k], hold(e @ reach[s, 0, 0], reach[s, 0, 0], values[k]), rtol=0, atol=1e-10)


# -- the model -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_recovers_network_and_unseen_interventions(seed: int) -> None:
    """Average precision of edges out of genes that were perturbed, and mean effects of holding genes that never were."""
    adata, data = _screen(seed, n_perturbed=12)
    truth = adata.uns["truth"]
    names = [str(p) for p in truth["perturbations"]]
    train = data[~np.isin(data.labels, names[8:])]
    fit = _fit(train)
    where = data.genes.get_indexer(names)
    size = np.abs(fit.guide.members_edge.numpy() * fit.guide.members_weight.numpy()).mean(0)
    seen, edges = np.isin(np.arange(12), where[:8]), truth["edges"]
    off = ~np.eye(12, dtype=bool) & seen[:, None]
    assert size[off & edges].min() > size[off & ~edges].max()
    A = fit.guide.point_weight.numpy()
    np.testing.assert_allclose(A[seen][:, :][edges[seen]], truth["graph"][seen][edges[seen]], atol=0.1)
    rows = [list(truth["conditions"]).index(n) for n in names[8:]]
    effect = (truth["expression"] - truth["expression"][0])[rows]
    clamps = {n: pc.clamp(n, float(truth["states"][r, g])) for n, r, g in zip(names[8:], rows, where[8:], strict=True)}
    told = pc.effects(fit, clamps, draws=50, cells=4, seed=0)["effect"].mean("draw").transpose("intervention", "gene").to_numpy()
    kept = np.ones_like(effect, bool)
    kept[np.arange(4), where[8:]] = False
    assert ((told - effect)[kept] ** 2).sum() < 0.3 * (effect[kept] ** 2).sum()


def test_pairs_hold_both_targets() -> None:
    """Of a cause and its effect the second is held too: not additive, and what the simulator says."""
    adata, data = _screen(1, doubles=28)
    truth = adata.uns["truth"]
    singles = data[np.isin(data.labels, [data.control, *map(str, truth["perturbations"])])]
    fit = _fit(singles)
    conditions = [str(c) for c in truth["conditions"]]
    doubles = [c for c in conditions if "+" in c]
    effect = (truth["expression"] - truth["expression"][0])[[conditions.index(c) for c in doubles]]
    told = {}
    for name in ("scm", "additive_eb"):
        f = fit if name == "scm" else pc.fit(*pc.build(name, singles), singles, progress=False)
        draws = pc.effects(f, {c: parse(c) for c in doubles}, draws=50, cells=4, seed=0)["effect"]
        told[name] = ((draws.mean("draw").transpose("intervention", "gene").to_numpy() - effect) ** 2).sum() / (effect**2).sum()
    assert told["scm"] < 0.01 < told["additive_eb"]


def test_without_edges_it_is_the_additive_baseline() -> None:
    """No network, targets not known: empirical Bayes on the means, up to the variance that it is told of (here pooled)."""
    _, data = _screen(2, degree=0.0)
    fit = _fit(data, own_genes=None, gamma=50.0)
    assert int(fit.guide.point_edge.sum()) == 0
    other = pc.fit(*pc.build("additive_eb", data), data, progress=False)
    acts = {p: parse(p) for p in data.perturbations}
    a, b = (pc.effects(f, acts, draws=400, cells=2, seed=0)["effect"] for f in (fit, other))
    np.testing.assert_allclose(a.mean("draw"), b.mean("draw").transpose(*a.mean("draw").dims), atol=0.05)
    np.testing.assert_allclose(a.std("draw").mean(), b.std("draw").mean(), rtol=0.1)


@pytest.mark.parametrize("seed", range(3))
def test_effects_are_shrunk_where_they_are_sparse(seed: int) -> None:
    """Shifts of few equations that a network carries on; and effects of few genes, in cells that an unmeasured cause moves."""
    _, data = _screen(seed)
    targets = np.eye(12, dtype=bool)[data.genes.get_indexer(data.perturbations)]
    assert Network.of(data, targets, "do", "auto", 0.5, np.random.default_rng(0)).in_equations
    rng = np.random.default_rng(seed)
    n, effect = 50, rng.standard_normal((20, 30)) * 0.6 * (rng.random((20, 30)) < 0.15)
    label = np.repeat(np.arange(21), n)
    cause = rng.standard_normal((21 * n, 2)) @ rng.standard_normal((2, 30))
    x = cause + rng.standard_normal((21 * n, 30)) + np.vstack([np.zeros(30), effect])[label]
    names = np.array(["control", *(f"p{i}" for i in range(20))])
    obs = pd.DataFrame({"perturbation": names[label]}, index=[f"c{i}" for i in range(len(x))])
    confounded = pc.PerturbationData.from_anndata(ad.AnnData(x.astype(np.float32), obs=obs), kind="normalised")
    fit = _fit(confounded, draws=0)  # means
    acts = {p: parse(p) for p in confounded.perturbations}
    order = [int(str(p)[1:]) for p in acts]
    error = {}
    for name, f in (("scm", fit), ("additive_eb", pc.fit(*pc.build("additive_eb", confounded), confounded, progress=False))):
        told = pc.effects(f, acts, draws=400, cells=2, seed=0)["effect"].mean("draw").transpose("intervention", "gene").to_numpy()
        error[name] = float(((told - effect[order]) ** 2).sum())
    assert error["scm"] < 1.05 * error["additive_eb"]


def test_zero_dose_changes_nothing_and_the_factual_action_gives_the_cell_back() -> None:
    _, data = _screen()
    fit = _fit(data)
    name = data.perturbations[0]
    still = pc.effects(fit, {"none": pc.perturb(name, dose=0.0)}, draws=5, cells=3, seed=0)["effect"]
    assert float(np.abs(still).max()) == 0.0
    cells = data[np.flatnonzero(data.labels == name)[:6]]
    twins = pc.counterfactual(fit, cells, {"same": pc.perturb(name)}, draws=20, noise="shared", seed=0)
    np.testing.assert_allclose(twins["expression"].squeeze().mean("draw"), cells.dense(), atol=1e-4)


def test_a_counterfactual_moves_only_what_descends() -> None:
    adata, data = _screen(1)
    fit, truth = _fit(data), adata.uns["truth"]
    reach = descent(truth["edges"])
    g = int(truth["targets"][0])
    name = str(truth["perturbations"][0])
    cells = data[np.flatnonzero(data.is_control)[:5]]
    twins = pc.counterfactual(fit, cells, {"held": pc.clamp(name, 2.0)}, draws=20, noise="shared", seed=0)["expression"]
    change = np.abs(twins.squeeze().mean("draw").transpose("cell", "gene").to_numpy() - cells.dense())
    assert change[:, ~reach[g]].max() < 0.05
    assert change[:, g].max() > 0.5


def test_the_same_seed_gives_the_same_fit_and_it_is_saved_whole(tmp_path: Path) -> None:
    _, data = _screen()
    one, two, other = _fit(data, 1), _fit(data, 1), _fit(data, 2)
    assert all(torch.equal(a, b) for a, b in zip(one.guide.state_dict().values(), two.guide.state_dict().values(), strict=True))
    assert not torch.equal(one.guide.members_weight, other.guide.members_weight)
    one.save(tmp_path / "fit")
    back = pc.load(tmp_path / "fit")
    acts = {p: parse(p) for p in data.perturbations}
    a, b = (pc.effects(f, acts, draws=5, cells=3, seed=0)["effect"] for f in (one, back))
    np.testing.assert_array_equal(a, b)


def test_the_rest_of_the_library_takes_it() -> None:
    _, data = _screen()
    model, guide = pc.build("scm", data)
    report = pc.check_model(model, guide, data)
    assert report, str(report)
    fit = _fit(data)
    graph = pc.to_networkx(fit)
    assert set(graph.nodes) == {*data.genes, *(f"do({p})" for p in data.perturbations)}
    assert pc.identifiability(fit)["edge"].status == "in part"
    assert pc.to_inference_data(fit, draws=10)["posterior"]["graph"].shape[-2:] == (12, 12)


def test_refusals() -> None:
    _, data = _screen()
    with pytest.raises(PyrocausalError, match="choose one of"):
        pc.build("scm", data, shrink="none")
    with pytest.raises(PyrocausalError, match="'do' or 'shift'"):
        pc.build("scm", data, intervention="hard")
    wide = np.random.default_rng(0).standard_normal((12, 501)).astype(np.float32)
    obs = pd.DataFrame({"perturbation": ["control"] * 6 + ["a"] * 6}, index=[f"c{i}" for i in range(12)])
    with pytest.raises(PyrocausalError, match="501 genes were given, and scm has room for 500"):
        _fit(pc.PerturbationData.from_anndata(ad.AnnData(wide, obs=obs), kind="normalised"))
    counts = pc.PerturbationData.from_anndata(scm_screen(n_genes=6, n_perturbed=3, counts=True, cells_per_perturbation=20, n_control=30))
    with pytest.raises(PyrocausalError, match="normalised"):
        _fit(counts)


def test_a_screen_of_few_cells_is_fitted() -> None:
    """Of one control cell and one cell of a perturbation too there is an estimate."""
    x = np.random.default_rng(0).standard_normal((6, 4)).astype(np.float32)
    obs = pd.DataFrame({"perturbation": ["control", "a", "b", "b", "a+b", "a+b"]}, index=[f"c{i}" for i in range(6)])
    fit = _fit(pc.PerturbationData.from_anndata(ad.AnnData(x, obs=obs), kind="normalised"))
    assert np.isfinite(pc.effects(fit, {"a": parse("a"), "a+b": parse("a+b")}, draws=5, cells=2, seed=0)["effect"]).all()


def test_a_gene_that_few_cells_carry_has_no_edges() -> None:
    """One outlying cell shared by two genes, and a gene that is constant."""
    _, data = _screen()
    x = np.concatenate([data.dense(), np.zeros((len(data), 3), np.float32)], 1)
    x[5, 12:14], x[:, 14] = 8.0, 1.0
    obs = pd.DataFrame({"perturbation": data.labels.astype(str)}, index=data.cells)
    var = pd.DataFrame(index=[*data.genes, "rare1", "rare2", "constant"])
    wide = pc.PerturbationData.from_anndata(ad.AnnData(x, obs=obs, var=var), kind="normalised")
    fit = _fit(wide)
    edges = fit.guide.members_edge
    assert float(edges[:, 12:].sum() + edges[:, :, 12:].sum()) == 0
    assert float(edges.sum()) > 0
    told = pc.effects(fit, {p: parse(p) for p in data.perturbations}, draws=10, cells=2, seed=0)["effect"]
    assert np.isfinite(told).all()


def test_do_on_named_sites() -> None:
    """Cutting an edge by ``pyro.do`` on ``graph`` is what the vocabulary does."""
    adata, data = _screen(1)
    fit, edges = _fit(data), adata.uns["truth"]["edges"]
    j, k = (int(v) for v in np.argwhere(edges & np.isin(np.arange(12), adata.uns["truth"]["targets"])[:, None])[0])
    source, target = str(data.genes[j]), str(data.genes[k])
    held = pc.clamp(source, 2.0)
    whole, without = (pc.effects(fit, {"a": act}, draws=20, cells=4, seed=0)["effect"] for act in (held, held & pc.cut(source, target)))
    lost = (whole - without).mean("draw").squeeze().sel(gene=target)
    A = float((fit.guide.members_edge * fit.guide.members_weight)[:, j, k].mean())
    assert float(lost) == pytest.approx(A * (2.0 - float(fit.guide.point_baseline[j])), rel=0.25)
    assert isinstance(pyro.do(fit.model, data={}), object)
