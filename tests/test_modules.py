"""Modules: planted groups are found, nothing is not grouped, over-representation against brute force."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import anndata as ad
import matplotlib.colors
import numpy as np
import pandas as pd
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import pdist, squareform
from sklearn.metrics import adjusted_rand_score, silhouette_score

import pyrocausal as pc
from pyrocausal import embeddings as em
from pyrocausal import evaluate as ev
from pyrocausal import modules as mo
from pyrocausal.errors import DataError

laws = settings(max_examples=25, deadline=None, derandomize=True, database=None)
seeds = st.integers(0, 2**31)
METRICS = ("correlation", "cosine", "euclidean")


def table_of(values: np.ndarray) -> pd.DataFrame:
    return pd.DataFrame(values, [f"p{i:02d}" for i in range(len(values))], [f"g{j}" for j in range(values.shape[1])])


def planted(seed: int, sizes: tuple[int, ...] = (6, 5, 4, 2), n_genes: int = 80, noise: float = 0.5) -> tuple[pd.DataFrame, np.ndarray]:
    """Shuffled responses, a random profile for each group; and the groups [P]."""
    rng = np.random.default_rng(seed)
    group = rng.permutation(np.repeat(range(len(sizes)), sizes))
    return table_of(rng.standard_normal((len(sizes), n_genes))[group] + noise * rng.standard_normal((len(group), n_genes))), group


def drawn(mean: pd.DataFrame, sd: float | np.ndarray, seed: int = 0, draws: int = 60) -> xr.Dataset:
    """The form of pc.effects: normal draws [intervention, draw, gene] about a table."""
    noise = np.random.default_rng(seed).standard_normal((len(mean), draws, mean.shape[1])) * sd
    effect = (mean.to_numpy()[:, None] + noise).astype(np.float32)
    coords = {"intervention": list(mean.index), "draw": np.arange(draws), "gene": list(mean.columns)}
    return xr.Dataset({"effect": (("intervention", "draw", "gene"), effect)}, coords=coords)


def measured(effect: np.ndarray, p_value: np.ndarray) -> xr.Dataset:
    names, genes = table_of(effect).axes
    coords = {"intervention": list(names), "gene": list(genes)}
    return xr.Dataset({k: (("intervention", "gene"), v) for k, v in (("effect", effect), ("p_value", p_value))}, coords=coords)


# -- clusters -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("seed", range(6))
def test_planted_groups_are_found_and_counted(metric: Any, seed: int) -> None:
    table, group = planted(seed)
    found = mo.perturbation_modules(table, metric=metric)
    assert adjusted_rand_score(group, found.labels) == 1 and set(found.labels) == set(found.members)
    assert [len(m) for m in found.members.values()] == [6, 5, 4, 2] and list(found.members) == [f"module {k}" for k in range(4)]
    assert found.inert == [] and found.together is None and found.evidence is None
    for name, members in found.members.items():
        places = sorted(found.order.index(p) for p in members)
        assert places == list(range(places[0], places[0] + len(places)))  # together in the leaf order
        assert (found.labels[members] == name).all() and members == sorted(members)
    same = mo.perturbation_modules(table, n_modules=4, metric=metric)
    assert same.members == found.members and same.order == found.order


@laws
@given(seeds, st.sampled_from(METRICS), st.floats(0.3, 2.5))
def test_the_order_of_perturbations_does_not_matter(seed: int, metric: Any, noise: float) -> None:
    table, _ = planted(seed, noise=noise)
    found = mo.perturbation_modules(table, metric=metric)
    order = np.random.default_rng(seed).permutation(len(table))
    again = mo.perturbation_modules(table.iloc[order], metric=metric)
    assert again.members == found.members and again.labels[table.index].equals(found.labels)
    pd.testing.assert_frame_equal(again.similarity.loc[table.index, table.index], found.similarity, atol=1e-12)
    renamed = mo.perturbation_modules(table.rename(index=lambda p: f"x{p}"), metric=metric)
    assert renamed.members == {k: [f"x{p}" for p in m] for k, m in found.members.items()}


@laws
@given(seeds)
def test_distances_tree_and_silhouettes_are_those_of_scipy_and_sklearn(seed: int) -> None:
    table, _ = planted(seed, noise=1.5)
    values = table.to_numpy()
    for metric in METRICS:
        distance, _ = mo._distances(values, metric)
        np.testing.assert_allclose(squareform(distance, checks=False), pdist(values, metric), atol=1e-10)
        tree = mo.perturbation_modules(table, metric=metric).linkage
        np.testing.assert_allclose(tree[:, 2], linkage(pdist(values, metric), "average")[:, 2], atol=1e-10)
    distance, n = mo._distances(values, "euclidean")[0], len(values)
    cuts = {k: fcluster(linkage(pdist(values), "average"), k, "maxclust") for k in range(2, n)}
    scores = {k: silhouette_score(distance, labels, metric="precomputed") for k, labels in cuts.items()}
    best = max(scores, key=lambda k: scores[k])
    clusters, s, cut = mo._choose(distance, linkage(squareform(distance, checks=False), "average"), 2, None, np.inf, -1.0)
    assert cut == best and s.mean() == pytest.approx(scores[best], abs=1e-10)
    kept = clusters >= 0
    assert adjusted_rand_score(cuts[best][kept], clusters[kept]) == 1 and (np.bincount(cuts[best])[cuts[best][~kept]] == 1).all()


def test_correlated_modules_need_no_other_module() -> None:
    """One group and one or three unlike: the group is found although nothing else is; every member's b is 1 or less."""
    rng = np.random.default_rng(0)
    table = table_of(np.concatenate([rng.standard_normal(80) + 0.5 * rng.standard_normal((5, 80)), rng.standard_normal((3, 80))]))
    group = {"module 0": [f"p0{i}" for i in range(5)]}
    for n in (5, 8):
        found = mo.perturbation_modules(table.iloc[:n])
        assert found.members == group and (found.labels.iloc[5:] == "alone").all()
    found, r = mo.perturbation_modules(table.iloc[:6]), np.corrcoef(table.iloc[:6])
    for i, name in enumerate(table.index[:5]):
        a, b = (5 - r[i, :5].sum()) / 4, min(1, 1 - r[i, 5])
        assert found.silhouette[name] == pytest.approx((b - a) / max(a, b), abs=1e-10)
    assert found.silhouette["p05"] == 0
    assert mo.perturbation_modules(table, min_silhouette=0.95).members == {}


def test_unrelated_responses_are_alone() -> None:
    for seed in range(20):
        table = table_of(np.random.default_rng(seed).standard_normal((30, 200)))
        assert (mo.perturbation_modules(table).labels == "alone").all()


def test_the_number_and_size_of_modules_can_be_asked() -> None:
    table, group = planted(0)
    for n in range(1, 5):
        assert len(mo.perturbation_modules(table, n_modules=n).members) == n
    three = mo.perturbation_modules(table, min_size=3)
    assert [len(m) for m in three.members.values()] == [6, 5, 4] and (three.labels[group == 3] == "alone").all()
    with pytest.raises(DataError, match=r"n_modules=12 was given, but the tree can be cut into \[0, 1, 2, 3, 4.*\] modules only"):
        mo.perturbation_modules(table, n_modules=12)


# -- draws ----------------------------------------------------------------------------------------------------------------------


def test_draws_say_how_sure_a_module_is() -> None:
    """Perturbation 12 is like the first group in 77 of 100 draws and like the second in the others."""
    rng = np.random.default_rng(1)
    first, second = 3 * rng.standard_normal((2, 60))
    responses = drawn(table_of(np.array([first] * 6 + [second] * 6 + [first])), 1.0, draws=100)
    responses["effect"][12, rng.permutation(100)[:23]] += second - first
    found = mo.perturbation_modules(responses, inert=[])
    assert found.labels["p12"] == found.labels["p00"] == "module 0" and found.labels["p06"] == "module 1"
    expected = np.zeros((13, 13))
    expected[:6, :6] = expected[6:12, 6:12] = expected[12, 12] = 1
    expected[12, :6] = expected[:6, 12] = 0.77
    expected[12, 6:12] = expected[6:12, 12] = 0.23
    assert found.together is not None and list(found.together.index) == list(found.together.columns) == list(
        responses["intervention"].values
    )
    np.testing.assert_allclose(found.together, expected, atol=1e-12)


@pytest.mark.parametrize("min_size", [2, 3])
def test_co_clustering_is_the_share_of_draws(min_size: int) -> None:
    table, _ = planted(2, sizes=(4, 3, 3), noise=0.8)
    responses = drawn(table, 1.5, draws=40)
    found = mo.perturbation_modules(responses, inert=[], min_size=min_size)
    distance, _ = mo._distances(responses["effect"].values.mean(1, dtype=float), "correlation")
    *_, cut = mo._choose(distance, found.linkage, min_size, None, 1.0, 0.25)
    expected = np.zeros((10, 10))
    for s in range(40):
        profile = responses["effect"].sel(draw=s).to_numpy().astype(float)
        labels = fcluster(linkage(pdist(profile, "correlation"), "average"), cut, "maxclust")
        expected += ((labels[:, None] == labels) & (np.bincount(labels)[labels] >= min_size)) / 40
    np.fill_diagonal(expected, 1)
    assert 0 < expected[0, 1:].max() < 1
    np.testing.assert_allclose(found.together, expected, atol=1e-12)


# -- no response -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [2, 20, 200])
def test_draws_without_a_response_are_inert_at_the_stated_rate(rank: int) -> None:
    """Posterior N(m, Sigma) with m ~ N(0, Sigma), of any rank and any scales: 5 % may pass (800 tries, standard error .8 %)."""
    rng = np.random.default_rng(rank)
    passed = 0
    for seed in range(20):
        mixing = rng.standard_normal((rank, 200)) * rng.lognormal(0, 1, 200)
        mean = table_of(rng.standard_normal((40, rank)) @ mixing)
        noise = np.random.default_rng(seed).standard_normal((40, 200, rank)) @ mixing
        responses = drawn(mean, 0.0, draws=200)
        responses["effect"] = responses["effect"] + noise
        passed += 40 - len(mo.perturbation_modules(responses).inert)
    assert passed / 800 < 0.075


def test_draws_with_a_response_are_not_inert() -> None:
    table, group = planted(3, sizes=(5, 4, 6))
    table[group == 2] = 0.0
    found = mo.perturbation_modules(drawn(table, 0.7, draws=100))
    assert found.inert == list(table.index[group == 2]) and found.order[-6:] == found.inert
    assert adjusted_rand_score(group, found.labels) == 1
    assert found.together is not None and found.together.loc[found.inert].sum().sum() == 6
    assert found.evidence is not None and (found.evidence[found.inert] > 0.05).all() and (found.evidence[group != 2] <= 0.05).all()
    assert "zero lies inside the 95% credible ball" in found.rule


def test_a_response_in_some_draws_is_inert_unless_it_is_in_nearly_all() -> None:
    """Of a sparse posterior (the effect is on in a share of the draws, and exactly zero in the others)."""
    rng = np.random.default_rng(0)
    table = table_of(rng.standard_normal((4, 50)))
    responses = drawn(table, 0.01, draws=100)
    for name, off in zip(table.index, (100, 50, 10, 2), strict=True):
        responses["effect"].loc[{"intervention": name, "draw": np.arange(off)}] = 0.0
    assert mo.perturbation_modules(responses).inert == list(table.index[:3])


def null_screen(seed: int, n_null: int, n_control: int = 300, n_each: int = 60) -> ad.AnnData:
    """Negative binomial counts with correlated programs; ``null`` perturbations are like control cells, ``real`` ones are not."""
    rng = np.random.default_rng(seed)
    names = (
        ["control"] * n_control + [f"null{i:02d}" for i in range(n_null) for _ in range(n_each)] + ["real0"] * n_each + ["real1"] * n_each
    )
    real = np.char.startswith(names, "real")
    programs = rng.standard_normal((len(names), 3)) @ rng.standard_normal((3, 60)) * 0.3
    fold = np.outer(real, np.where(rng.random(60) < 0.3, rng.choice([-1.2, 1.2], 60), 0))
    mean = rng.lognormal(0.5, 1, 60) * np.exp(programs + fold) * rng.lognormal(0, 0.3, (len(names), 1))
    x = rng.poisson(mean * rng.gamma(2, 0.5, mean.shape)).astype(np.float32) + np.eye(len(names), 60, dtype=np.float32)
    x[:, 0] += 1
    return ad.AnnData(x, obs=pd.DataFrame({"perturbation": names}, index=[f"c{i}" for i in range(len(names))]))


def test_measured_responses_of_nothing_are_inert() -> None:
    """Alarms: of null perturbations at most 5 % pass (200 tries); the two real ones, of the same response, always pass together."""
    passed = 0
    for seed in range(10):
        found = mo.perturbation_modules(ev.measured_effects(pc.PerturbationData.from_anndata(null_screen(seed, 20))))
        assert found.labels["real0"] == found.labels["real1"] == "module 0"
        passed += sum(name.startswith("null") for name in found.labels.index[found.labels != "inert"])
    assert passed / 200 <= 0.05


def test_the_rule_for_p_values_is_simes_then_benjamini_hochberg() -> None:
    rng = np.random.default_rng(0)
    p = rng.uniform(size=(12, 30)) ** np.linspace(1, 8, 12)[:, None]
    found = mo.perturbation_modules(measured(rng.standard_normal((12, 30)), p))
    simes = np.array([min(np.sort(row) * 30 / np.arange(1, 31)) for row in p])
    adjusted = stats.false_discovery_control(simes)
    np.testing.assert_allclose(found.evidence, adjusted)
    assert found.inert == list(found.labels.index[adjusted > 0.05]) and 2 < len(found.inert) < 10
    p[0] = np.nan  # as of a condition with one cell
    assert "p00" in mo.perturbation_modules(measured(rng.standard_normal((12, 30)), p)).inert


def test_hitting_only_its_own_gene_is_no_response() -> None:
    p = np.ones((3, 4))
    p[0, 1] = p[1, 0] = p[2, 3] = 1e-9
    data = measured(np.random.default_rng(0).standard_normal((3, 4)), p).assign_coords(intervention=["g1", "g0+g2", "g2"])
    assert mo.perturbation_modules(data).inert == ["g1", "g0+g2"]
    table = pd.DataFrame([[5.0, 0, 0, 0], [0, 5, 5, 5]], ["g0", "other"], ["g0", "g1", "g2", "g3"])
    assert mo.perturbation_modules(drawn(table, 1.0)).inert == ["g0"]
    alone = measured(np.ones((2, 1)), np.zeros((2, 1))).assign_coords(intervention=["g0", "x"])
    assert mo.perturbation_modules(alone).inert == ["g0"]


def test_without_errors_only_zeros_and_the_named_are_inert() -> None:
    table, _ = planted(0)
    table.loc["p03"] = 0.0
    found = mo.perturbation_modules(table)
    assert found.inert == ["p03"] and found.evidence is None and "nothing is known of errors" in found.rule
    assert mo.perturbation_modules(table, inert=["p01", "p02"]).inert == ["p01", "p02", "p03"]
    assert mo.perturbation_modules(table, inert="p01").inert == ["p01", "p03"]
    assert mo.perturbation_modules(drawn(table, 5.0), inert=[]).inert == []
    nothing = mo.perturbation_modules(0 * table)
    assert nothing.inert == list(table.index) == nothing.order and nothing.members == {} and nothing.linkage.shape == (0, 4)
    one = mo.perturbation_modules(table, inert=[p for p in table.index if p != "p05"])
    assert one.order[0] == "p05" and one.labels["p05"] == "alone" and len(one.order) == len(table)
    assert str(one) and str(nothing)


def test_a_row_without_direction_is_like_no_other() -> None:
    table, _ = planted(1)
    table.loc["p00"] = 0.1  # the same for every gene: no correlation
    found = mo.perturbation_modules(table)
    assert (
        found.labels["p00"] == "alone" and (found.similarity.loc["p00"].drop("p00") == 0).all() and found.similarity.loc["p00", "p00"] == 1
    )


# -- refusals and shapes ----------------------------------------------------------------------------------------------------------


def test_responses_are_refused() -> None:
    table, _ = planted(0)
    ok = drawn(table, 1.0)
    for bad, arguments, fault in (
        (table, {"metric": "cosin"}, "metric='cosin' was given; did you mean 'cosine'"),
        (table, {"min_size": 1}, "min_size=1 and level=0.05"),
        (table, {"level": 0.0}, "level between 0 and 1"),
        (table, {"inert": ["p1"]}, r"inert= names 'p1', which is no perturbation of the responses; did you mean 'p"),
        (table.rename(index={"p01": "p02"}), {}, "'p02' twice; give each"),
        (table.iloc[:1], {}, "of 1 perturbation; give each of at least two"),
        (table.mask(table > 2), {}, r"responses are not finite, first 'p"),
        (table.astype(str), {}, "a DataFrame without effect"),
        (table.to_numpy(), {}, "a ndarray without effect"),
        (ok.rename(effect="expression"), {}, "a Dataset without effect"),
        (ok.expand_dims(cell=3), {}, "a Dataset without effect"),
        (ok.isel(draw=slice(5)), {}, "5 draws were given, too few for level=0.05; ask for 20 or more"),
        (0 * table, {"n_modules": 1}, r"n_modules=1 was given, but the tree can be cut into \[0\]"),
    ):
        with pytest.raises(DataError, match=fault):
            mo.perturbation_modules(bad, **arguments)  # type: ignore[arg-type]


def test_the_effects_of_a_fit_are_responses() -> None:
    data = pc.PerturbationData.from_anndata(pc.simulate.svae_screen(4, 3, 20, n_genes=20, n_control=30, library_size=50.0, seed=0))
    fit = pc.fit(*pc.build("sams_vae", data, n_latent=3), data, max_epochs=1, seed=0)
    found = mo.perturbation_modules(pc.effects(fit, do=list(data.perturbations), draws=20, cells=4))
    assert set(found.labels.index) == set(data.perturbations) == set(found.order) and found.together is not None


def test_modules_read_well() -> None:
    table, _ = planted(0, sizes=(40, 3, 1))
    table.iloc[[0, 1]] = 0.0
    text = str(mo.perturbation_modules(table))
    lines = text.splitlines()
    assert lines[0].startswith("2 modules among 44 perturbations, by correlation") and max(map(len, lines)) <= 110
    assert any(line.startswith("module 0  ") for line in lines) and any(line.startswith("alone     1: ") for line in lines)
    assert "inert     2: p00, p01" in lines and lines[-1].startswith("inert: all zero")


# -- gene sets ------------------------------------------------------------------------------------------------------------------


def grouped(*members: list[str], others: int = 0) -> mo.Modules:
    """Modules of the given genes, with some more perturbations that are inert."""
    names = [g for m in members for g in m] + [f"other{i}" for i in range(others)]
    profile = np.random.default_rng(0).standard_normal((len(members), 60))
    code = np.repeat(range(len(members)), [len(m) for m in members])
    values = np.concatenate([profile[code] + 0.2 * np.random.default_rng(1).standard_normal((len(code), 60)), np.zeros((others, 60))])
    found = mo.perturbation_modules(pd.DataFrame(values, names))
    assert sorted(map(sorted, found.members.values())) == sorted(map(sorted, members))
    return found


def test_over_representation_by_brute_force() -> None:
    """All 3-subsets of 8 genes are equally likely; the p-value is the share with as large an overlap."""
    modules = grouped(["a", "b", "c"], others=5)
    pool = list(modules.labels.index)
    scores = mo.score_modules(modules, {"s": ["a", "b", "other0", "not perturbed"], "u": ["a", "b", "c"]}, level=1.0)
    for name, genes in (("s", {"a", "b", "other0"}), ("u", {"a", "b", "c"})):
        row = scores.set_index("gene_set").loc[name]
        overlap = len(genes & {"a", "b", "c"})
        share = np.mean([len(genes & set(chosen)) >= overlap for chosen in itertools.combinations(pool, 3)])
        assert row["p_value"] == pytest.approx(share, abs=1e-12) and row["overlap"] == overlap
        assert row["set_size"] == 3 and row["module_size"] == 3 and row["background_size"] == 8
    assert scores["odds_ratio"].tolist() == [math.inf, 2 * 4 / (1 * 1)] and scores["genes"].tolist() == ["a, b, c", "a, b"]


@laws
@given(seeds)
def test_p_values_and_false_discovery_rates_are_those_of_scipy(seed: int) -> None:
    rng = np.random.default_rng(seed)
    genes = [f"g{i}" for i in range(14)]
    modules = grouped(genes[:6], genes[6:10], others=10)
    pool = list(modules.labels.index)
    sets = {f"s{k}": [*rng.choice(pool, rng.integers(1, 12), replace=False).tolist(), "elsewhere"] for k in range(25)}
    scores = mo.score_modules(modules, sets)
    expected = []
    for module, members in modules.members.items():
        for name, given_set in sets.items():
            k, size, n = len(set(members) & set(given_set)), len(set(given_set) & set(pool)), len(members)
            if stats.hypergeom.sf(min(n, size) - 1, len(pool), size, n) <= 0.05:
                fisher = stats.fisher_exact([[k, n - k], [size - k, len(pool) - n - size + k]], "greater")
                assert stats.hypergeom.sf(k - 1, len(pool), size, n) == pytest.approx(fisher.pvalue, abs=1e-12)
                expected.append((module, name, fisher.statistic, fisher.pvalue, k))
    fdr = stats.false_discovery_control([e[3] for e in expected]) if expected else []
    true = {(m, s): (odds, p, q) for (m, s, odds, p, k), q in zip(expected, fdr, strict=True) if k}
    assert scores.attrs["n_tests"] == len(expected) and len(scores) == len(true)
    for row in scores.itertuples():
        np.testing.assert_allclose((row.odds_ratio, row.p_value, row.fdr), true[row.module, row.gene_set], rtol=1e-10)
    assert scores["p_value"].is_monotonic_increasing and scores["fdr"].is_monotonic_increasing


def test_the_background_is_the_screen_and_each_gene_counts_once() -> None:
    modules = grouped(["a_1", "a_2", "b"], others=7)
    assert mo.score_modules(modules, {"s": ["a", "b"]}).empty and mo.score_modules(modules, {}).empty
    row = mo.score_modules(modules, {"s": ["a", "b"]}, gene_of=lambda name: name.split("_")[0]).iloc[0]
    assert (row["module_size"], row["background_size"], row["overlap"]) == (2, 9, 2) and row["p_value"] == pytest.approx(1 / 36)
    genome = [*"abcdefgh", *(f"genome{i}" for i in range(1000))]
    wide = mo.score_modules(modules, {"s": ["a", "b"]}, background=genome, gene_of={"a_1": "a", "a_2": "a"}).iloc[0]
    assert wide["background_size"] == 1008 and wide["p_value"] < row["p_value"] / 1000  # why the genome is no background
    with pytest.raises(DataError, match=r"the background lacks 2 genes of the modules, first 'a_1'; give all perturbed genes"):
        mo.score_modules(modules, {"s": ["a"]}, background=["b", "c"])


def test_modules_are_named_by_their_best_set() -> None:
    modules = grouped(list("abcdef"), list("uvwxyz"), others=12)
    first, second = modules.members.values()
    sets = {"good": first, "better": first, "weak": [*second[:3], "other0", "other1", "other2"]}
    scores = mo.score_modules(modules, sets)
    assert mo.name_modules(modules, scores, fdr=0.01) == {"module 0": "better", "module 1": "module 1"}
    assert mo.name_modules(modules, mo.score_modules(modules, {})) == {"module 0": "module 0", "module 1": "module 1"}


# -- the picture ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", METRICS)
def test_the_picture_shows_similarities_modules_and_the_inert(metric: Any) -> None:
    table, group = planted(0)
    table[group == 3] = 0.0
    modules = mo.perturbation_modules(table, metric=metric)
    figure = mo.plot_modules(modules, names={"module 0": "a name"})
    ax = figure.axes[0]
    labels = [t.get_text() for t in ax.get_yticklabels()]
    assert labels == modules.order == [t.get_text() for t in ax.get_xticklabels()] and labels[-2:] == modules.inert
    shown = np.ma.filled(ax.collections[0].get_array(), np.nan)
    kept = ~np.isnan(shown).all(1)
    assert shown.shape == (18, 18) and list(np.flatnonzero(~kept)) == [15]
    np.testing.assert_allclose(shown[kept][:, kept], modules.similarity.loc[modules.order, modules.order])
    boxes = {(p.get_x(), p.get_width()) for p in ax.patches}
    assert boxes == {(min(modules.order.index(p) for p in m), len(m)) for m in modules.members.values()}
    assert {"a name", "module 1", "module 2", "no response"} <= {t.get_text() for t in ax.texts}
    grey = {matplotlib.colors.to_hex(t.get_color()) for t in ax.get_yticklabels()[-2:]}
    assert len(grey) == 1 and grey != {matplotlib.colors.to_hex(ax.get_yticklabels()[0].get_color())}
    for silent in (table * 0, table[group < 3]):  # nothing but inert ones, and none
        mo.plot_modules(mo.perturbation_modules(silent, metric=metric)).canvas.draw()
    given_axes = type(figure)().add_subplot()
    assert mo.plot_modules(modules, ax=given_axes) is given_axes.figure


# -- a real screen ----------------------------------------------------------------------------------------------------------------


def test_the_interferon_pathway_is_a_module(data_dir: Path) -> None:
    responses = ev.measured_effects(pc.PerturbationData.from_anndata(data_dir / "papalexi2021_thp1_crisprko_299g.h5ad"))
    pathway = ["IFNGR1", "IFNGR2", "JAK2", "STAT1"]
    for metric in METRICS:
        found = mo.perturbation_modules(responses, metric=metric)
        assert found.members["module 0"] == pathway
        assert {"CD86", "IRF7", "ATF2", "ETV7", "MARCH8"} <= set(found.inert)  # no gene changes at all
    scores = mo.score_modules(found, em.read_gmt(data_dir / "annotations" / "enrichr.GO_Biological_Process_2021.gmt.gz"))
    assert scores["gene_set"].head(3).str.contains("interferon-gamma").any() and scores["fdr"].iloc[0] < 0.05
    assert (scores["background_size"] == 25).all()


def test_real_control_cells_are_inert(data_dir: Path) -> None:
    """Ten groups of 100 control cells against 900 others, twenty times: at most 5 % pass (2.2 % of 600 tries)."""
    data = ad.read_h5ad(data_dir / "papalexi2021_thp1_crisprko_299g.h5ad")
    control = data[data.obs["perturbation"] == "control"].copy()
    passed = 0
    for seed in range(20):
        cells = control[np.random.default_rng(seed).permutation(control.n_obs)[:1900]].copy()
        cells.obs["perturbation"] = ["control"] * 900 + [f"fake{i}" for i in range(10) for _ in range(100)]
        cells = cells[:, np.asarray(cells.X.sum(0)).ravel() > 0].copy()
        found = mo.perturbation_modules(ev.measured_effects(pc.PerturbationData.from_anndata(cells)))
        passed += 10 - len(found.inert)
    assert passed / 200 <= 0.05
