"""Metrics against closed forms, brute force and other libraries, and the properties that all of them must have."""

from itertools import combinations

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse, stats
from scipy.spatial.distance import pdist

from pyrocausal import evaluate as ev
from pyrocausal.errors import DataError
from pyrocausal.metrics.distances import _transport

RNG = np.random.default_rng(0)
P, G = 7, 12
TRUE, PREDICTED, CONTROL = RNG.normal(size=(P, G)), RNG.normal(size=(P, G)), RNG.normal(size=G)
WEIGHTS = RNG.uniform(size=(P, G))


def cells(seed, n=20, d=5, loc=0.0, scale=1.0):
    return np.random.default_rng(seed).normal(loc, scale, size=(n, d))


# -- errors and correlations of means --------------------------------------------------------------------------------------------


def test_weights_of_genes_from_scores():
    w = ev.de_weights([[1.0, -3.0, 2.0, np.nan]])
    np.testing.assert_allclose(w, [[0, 1 / 1.25, 0.25 / 1.25, 0]])
    np.testing.assert_allclose(ev.de_weights([[2.0, -2.0, 2.0]]), 1 / 3)
    np.testing.assert_allclose(ev.de_weights([[np.nan] * 3]), 0)
    assert ev.de_weights([[0, 1.0, 2]], exponent=1)[0, 1] == pytest.approx(1 / 3)


def test_weighted_correlation_is_the_plain_one_of_repeated_genes():
    times = RNG.integers(0, 4, G)
    repeated = [np.repeat(x - CONTROL, times, axis=1) for x in (PREDICTED, TRUE)]
    expected = [np.corrcoef(a, b)[0, 1] for a, b in zip(*repeated, strict=True)]
    np.testing.assert_allclose(ev.delta_correlation(PREDICTED, TRUE, CONTROL, times.astype(float)), expected, atol=1e-12)


def test_rank_correlation_of_a_mask_is_scipys():
    mask = ev.top_genes(TRUE, 6)
    found = ev.delta_correlation(PREDICTED, TRUE, CONTROL, mask, method="spearman")
    rows = zip(PREDICTED - CONTROL, TRUE - CONTROL, mask, strict=True)
    np.testing.assert_allclose(found, [stats.spearmanr(a[m], b[m]).statistic for a, b, m in rows], atol=1e-12)
    assert (mask.sum(1) == 6).all()
    with pytest.raises(DataError, match="mask"):
        ev.delta_correlation(PREDICTED, TRUE, CONTROL, WEIGHTS, method="spearman")


def test_pooled_correlation_is_that_of_all_entries():
    mask = ev.top_genes(TRUE, 4)
    expected = np.corrcoef((PREDICTED - CONTROL)[mask], (TRUE - CONTROL)[mask])[0, 1]
    assert ev.pooled_correlation(PREDICTED, TRUE, CONTROL, mask) == pytest.approx(expected, abs=1e-12)


def test_no_prediction_of_change_has_no_correlation_and_no_cosine():
    flat = np.tile(CONTROL + 0.1, (P, 1))
    assert np.isnan(ev.delta_correlation(flat, TRUE, CONTROL)).all()
    np.testing.assert_allclose(ev.cosine(np.tile(CONTROL, (P, 1)), TRUE, CONTROL), 0)


def test_the_mean_of_centroids_is_not_the_mean_of_cells():
    x, groups = np.array([[1.0], [1.0], [1.0], [5.0]]), ["a", "a", "a", "b"]
    assert ev.perturbed_mean(x, groups) == pytest.approx(3.0)
    assert ev.perturbed_mean(x) == pytest.approx(2.0)


def test_bulk_noise_is_the_jackknife_by_brute_force():
    counts = RNG.poisson(3.0, (9, 6)).astype(float)

    def profile(x):
        return np.log1p(5e4 * x.sum(0) / x.sum())

    left_out = np.stack([profile(np.delete(counts, i, axis=0)) for i in range(9)])
    expected = 8 / 9 * ((left_out - left_out.mean(0)) ** 2).sum()
    for given_cells in (counts, sparse.csr_matrix(counts)):
        found = ev.bulk_lognorm([given_cells])
        np.testing.assert_allclose(found.value[0], profile(counts), atol=1e-12)
        assert found.noise[0] == pytest.approx(expected, abs=1e-10)
    assert ev.bulk_lognorm([counts[:1]]).noise[0] == 0 and (ev.bulk_lognorm([0 * counts]).value == 0).all()


def test_scatter_that_cancels_earns_no_correction():
    """Predicted profiles that do not vary: rho = 0, however noisy the cells claim to be; profiles that vary enough: rho = 1."""
    base = ev.Bulk(CONTROL[None], np.array([0.1]))
    true = ev.Bulk(TRUE, np.full(P, 0.5))
    flat = ev.capped_mse(ev.Bulk(np.tile(CONTROL, (P, 1)), np.full(P, 9.0)), true, base)
    assert flat.rho == pytest.approx(0, abs=1e-12) and flat.numerator == pytest.approx(((CONTROL - TRUE) ** 2).sum(1) / G - 0.5 / G)
    free = ev.capped_mse(ev.Bulk(PREDICTED, np.full(P, 9.0)), true, base)
    assert free.rho == 1 and free.numerator == pytest.approx((((PREDICTED - TRUE) ** 2).sum(1) - 1.0) / G)
    assert free.value == pytest.approx(free.numerator.sum() / free.denominator.sum())


# -- ranks ---------------------------------------------------------------------------------------------------------------------------


def brute_rank(predicted, true, how, own):
    out = []
    for p in range(len(predicted)):
        keep = np.ones(predicted.shape[1], bool)
        if how.exclude == "own":
            keep[own[p]] = False
        if how.exclude == "panel":
            keep[own] = False

        def d(a, b, keep=keep):
            a, b = a[keep], b[keep]
            if how.distance == "cosine":
                return 1 - a @ b / np.linalg.norm(a) / np.linalg.norm(b)
            return np.abs(a - b).sum() if how.distance == "l1" else np.sqrt(((a - b) ** 2).sum())

        mine = d(predicted[p], true[p])
        rivals = [d(predicted[p], true[q]) if how.among == "truths" else d(predicted[q], true[p]) for q in range(len(true)) if q != p]
        k = sum(r < mine for r in rivals) / (len(true) - 1 if how.denominator == "n-1" else len(true))
        out.append(k if how.report == "rank" else 1 - k)
    return np.array(out)


@pytest.mark.parametrize("name", ev.RANKINGS)
def test_ranks_by_brute_force(name):
    own = RNG.permutation(G)[:P]
    np.testing.assert_allclose(
        ev.retrieval(PREDICTED, TRUE, name, own=own), brute_rank(PREDICTED, TRUE, ev.RANKINGS[name], own), atol=1e-12
    )


@pytest.mark.parametrize(("ties", "expected"), [("against", 1.0), ("midrank", 0.5), ("for", 0.0)])
def test_one_prediction_for_all_is_a_tie(ties, expected):
    how = ev.Ranking("predictions", "l2", ties, "n-1", "none", "rank")
    np.testing.assert_allclose(ev.retrieval(np.tile(CONTROL, (P, 1)), TRUE, how), expected)
    by_place = ev.retrieval(np.tile(CONTROL, (P, 1)), TRUE, ev.Ranking("predictions", "l2", "position", "n-1", "none", "rank"))
    np.testing.assert_allclose(by_place, np.arange(P) / (P - 1))


def test_spiking_the_other_targets_pays_only_without_panel_exclusion():
    """A prediction without biology: the targets of all other perturbations go up. Truth: each knocks its own target down."""
    n, genes = 20, 60
    own = np.arange(n)
    true = np.random.default_rng(1).normal(size=(n, genes)) * 0.3
    true[own, own] = -4
    spiked = np.zeros((n, genes))
    spiked[:, :n] = 1 - np.eye(n)
    row, panel = (ev.Ranking("truths", "cosine", "midrank", "n-1", scope, "score") for scope in ("own", "panel"))
    assert ev.retrieval(spiked, true, row, own=own).mean() > 0.95
    np.testing.assert_allclose(ev.retrieval(spiked, true, panel, own=own), 0.5)


def test_what_was_not_predicted_is_nobodys_rival():
    partial = PREDICTED.copy()
    partial[2] = np.nan
    found = ev.retrieval(partial, TRUE, "perturbench")
    rest = np.delete(np.arange(P), 2)
    assert np.isnan(found[2])
    np.testing.assert_allclose(found[rest], ev.retrieval(PREDICTED[rest], TRUE[rest], "perturbench"))
    some = ev.retrieval(PREDICTED[[4, 1]], TRUE, "nir", rows=[4, 1])
    np.testing.assert_allclose(some, ev.retrieval(PREDICTED, TRUE, "nir")[[4, 1]])


@pytest.mark.parametrize("bad", [{"among": "both"}, {"ties": "random"}, {"denominator": "P"}, {"exclude": "row"}, {"distance": "l3"}])
def test_conventions_that_do_not_exist_are_refused(bad):
    good = {"among": "truths", "distance": "l1", "ties": "for", "denominator": "n", "exclude": "none", "report": "rank"}
    with pytest.raises(DataError, match="there is no"):
        ev.Ranking(**(good | bad))


# -- sets of genes ---------------------------------------------------------------------------------------------------------------------


def test_rank_sum_tables_are_scipys():
    control = RNG.poisson(RNG.gamma(1, 8, G), (30, G)).astype(float)
    groups = [RNG.poisson(RNG.gamma(1, 8, G), (n, G)).astype(float) for n in (8, 15)]
    found = ev.wilcoxon_de(groups, sparse.csr_matrix(control))
    base = 1e6 * control / control.sum(1, keepdims=True)
    tested = base.mean(0) > 5
    for row, x in enumerate(groups):
        y = 1e6 * x / x.sum(1, keepdims=True)
        p = np.array([stats.mannwhitneyu(y[:, g], base[:, g], method="asymptotic").pvalue for g in np.flatnonzero(tested)])
        np.testing.assert_allclose(found.p_value[row, tested], p, atol=1e-12)
        np.testing.assert_allclose(found.p_adjusted[row, tested], stats.false_discovery_control(p), atol=1e-12)
        np.testing.assert_allclose(found.lfc[row, tested], np.log2((y.mean(0) + 1e-9) / (base.mean(0) + 1e-9))[tested])
    assert np.isnan(found.p_value[:, ~tested]).all()


def test_adjusted_p_values_do_not_count_missing_ones():
    p = np.array([[0.01, np.nan, 0.04, 0.03], [np.nan] * 4])
    found = ev.adjust(p)
    np.testing.assert_allclose(found[0, [0, 2, 3]], stats.false_discovery_control(p[0, [0, 2, 3]]))
    assert np.isnan(found[1]).all() and np.isnan(found[0, 1])


def table(lfc, p):
    return ev.DETable(np.array(lfc, float), np.array(p, float), np.array(p, float))


def test_direction_of_hand_made_tables():
    true = table([[1, -1, 1, -1, 2, 0.0]], [[0.01, 0.01, 0.01, 0.01, 0.5, 0.5]])
    hat = table([[1, -1, -1, -1, 2, 1.0]], [[0.01, 0.02, 0.04, 0.9, 0.01, 0.01]])
    # called by the prediction and judged: genes 0, 1, 2, 4 (5 has no true sign); right: 0, 1, 4; truly called: 4
    assert ev.direction_fidelity(hat, true) == pytest.approx(3 / 4)
    assert ev.sig_jaccard(hat, true) == pytest.approx(3 / 6)
    assert ev.direction_reach(hat, true) == pytest.approx(2 / 4)  # +, +, -, +
    assert ev.direction_reach(hat, true, purity=0.75) == pytest.approx(1.0)  # purity recovers at 3 of 4
    assert ev.lfc_nmae(hat, true, min_genes=1) == pytest.approx(2 / 4)
    assert np.isnan(ev.lfc_nmae(hat, true)).all()
    assert ev.overlap_at_n(hat, true) == pytest.approx(3 / 4)  # by size 4, then 0, 1, 2 of equals, against 0, 1, 2, 3
    assert ev.sig_recall(hat, true) == pytest.approx(3 / 4)


def test_inflated_variance_buys_overlap_but_not_jaccard():
    """Calling everything with the true order of sizes: perfect overlap_at_N, poor set agreement."""
    size = RNG.normal(size=(1, 200))
    p = np.where(np.abs(size) > np.sort(np.abs(size))[0, -20], 0.001, 0.9)
    everything = table(size, np.zeros_like(p))
    assert ev.overlap_at_n(everything, table(size, p)) == 1
    assert ev.sig_jaccard(everything, table(size, p)) < 0.1


# -- distances -------------------------------------------------------------------------------------------------------------------------


def brute_energy(x, y, power, biased):
    def mean(a, b, same):
        pairs = [np.linalg.norm(u - v) ** power for i, u in enumerate(a) for j, v in enumerate(b) if biased or not (same and i == j)]
        return np.mean(pairs)

    return 2 * mean(x, y, False) - mean(x, x, True) - mean(y, y, True)


@pytest.mark.parametrize("ground", ["euclidean", "sqeuclidean"])
@pytest.mark.parametrize("estimator", ["unbiased", "biased"])
def test_energy_distance_by_brute_force(ground, estimator):
    x, y = cells(1, 9, 3), cells(2, 11, 3, loc=0.5)
    power, biased = (1 if ground == "euclidean" else 2), estimator == "biased"
    assert ev.energy_distance(x, y, ground, estimator) == pytest.approx(brute_energy(x, y, power, biased), abs=1e-10)
    genes = [brute_energy(x[:, [g]], y[:, [g]], power, biased) for g in range(3)]
    assert ev.energy_distance(x, y, ground, estimator, "genes") == pytest.approx(np.mean(genes), abs=1e-10)


def test_squared_energy_distance_sees_the_mean_alone():
    x, y = cells(1, 30, 4), cells(2, 40, 4, loc=1.0, scale=2.0)
    shift = ((x.mean(0) - y.mean(0)) ** 2).sum()
    expected = 2 * shift - 2 * x.var(0, ddof=1).sum() / 30 - 2 * y.var(0, ddof=1).sum() / 40
    assert ev.energy_distance(x, y, "sqeuclidean") == pytest.approx(expected, abs=1e-10)
    assert ev.mmd(x, y, kernel="linear", estimator="biased") == pytest.approx(shift, abs=1e-10)


def test_one_name_is_many_numbers():
    """The conventions of one energy distance, on the same cells: they differ by more than a factor of 100, and none of them is wrong."""
    x, y = cells(1, 100, 50), cells(2, 100, 50, loc=0.6)
    values = {name: ev.energy_distance(x, y, *how) for name, how in ev.ENERGY.items()}
    assert values["scperteval"] < values["pertpy"] == values["cell_eval"]
    assert values["scperturb"] > 10 * values["scperteval"] > 20 * values["gge"] > 0


def test_mmd_by_brute_force():
    x, y = cells(1, 8, 3), cells(2, 9, 3, loc=0.5)
    z = np.concatenate([x, y])
    sigma = np.median([np.linalg.norm(a - b) for a, b in combinations(z, 2)])
    gram = np.exp(-((z[:, None] - z[None]) ** 2).sum(-1) / (2 * sigma**2))
    xx, yy, xy = gram[:8, :8], gram[8:, 8:], gram[:8, 8:]
    off = (xx.sum() - 8) / 56 + (yy.sum() - 9) / 72 - 2 * xy.mean()
    assert ev.mmd(x, y) == pytest.approx(off, abs=1e-12) == ev.mmd(x, y, bandwidth=sigma)
    assert ev.mmd(x, y, estimator="biased") == pytest.approx(xx.mean() + yy.mean() - 2 * xy.mean(), abs=1e-12)


@pytest.mark.parametrize("order", [1, 2])
def test_wasserstein_distances(order):
    x, y = cells(1, 12, 1), cells(2, 17, 1, loc=0.4)
    if order == 1:
        assert ev.wasserstein(x, y) == pytest.approx(stats.wasserstein_distance(x[:, 0], y[:, 0]), abs=1e-9)
    joint = ev.wasserstein(x, y, order)
    assert joint == pytest.approx(ev.wasserstein(x, y, order, "genes"), abs=1e-8)  # linear programme against quantiles
    assert joint == pytest.approx(ev.sliced_wasserstein(x, y, order, 3), abs=1e-8)  # one dimension has one direction
    a = cells(3, 20, 4)
    shift = np.array([1.0, -2.0, 0.5, 0.0])
    assert ev.wasserstein(a, a + shift, order) == pytest.approx(np.linalg.norm(shift))
    assert ev.wasserstein(a, np.repeat(a, 2, axis=0), order) == pytest.approx(0, abs=1e-6)
    assert ev.sliced_wasserstein(a, a + shift, 2, 4000) == pytest.approx(np.linalg.norm(shift) / 2, rel=0.05)  # E (theta . v)^2 = |v|^2 / d


def test_assignment_is_the_linear_programme():
    cost = RNG.uniform(size=(6, 6))
    assert _transport(cost) == pytest.approx(_transport(np.repeat(cost, 2, axis=0)), abs=1e-9)


def test_correlation_gap_sees_what_the_marginals_do_not():
    x = cells(1, 400, 6)
    mixed = x.copy()
    mixed[:, 1:] = 0.8 * x[:, :1] + 0.6 * x[:, 1:]
    broken = np.stack([np.random.default_rng(g).permutation(mixed[:, g]) for g in range(6)], axis=1)
    assert ev.energy_distance(mixed, broken, pool="genes") == pytest.approx(-ev.energy_distance(mixed, mixed, pool="genes"), abs=0.05)
    assert ev.correlation_gap(mixed, broken) > 8 * ev.correlation_gap(mixed[::2], mixed[1::2])
    assert ev.correlation_gap(mixed, 3 * mixed + 1) == pytest.approx(0, abs=1e-12)


UNBIASED = {
    "energy": ev.energy_distance,
    "squared energy": lambda x, y: ev.energy_distance(x, y, "sqeuclidean"),
    "energy by genes": lambda x, y: ev.energy_distance(x, y, pool="genes"),
    "mmd, fixed bandwidth": lambda x, y: ev.mmd(x, y, 2.0),
    "mmd, linear": lambda x, y: ev.mmd(x, y, kernel="linear"),
}


@pytest.mark.parametrize("name", UNBIASED)
def test_equal_distributions_are_zero_within_two_standard_errors(name):
    """In 20 batches of 25 pairs of samples; more than 4 batches beyond two standard errors would be by chance with probability .003."""
    values = np.array([UNBIASED[name](cells(2 * i, 15), cells(2 * i + 1, 20)) for i in range(500)]).reshape(20, 25)
    beyond = np.abs(values.mean(1)) > 2.06 * values.std(1, ddof=1) / 5
    assert beyond.sum() <= 4


def test_the_floor_of_halves():
    """The unbiased one scatters about 0; the biased one is larger by the mean distance of two cells over the cells of a half, twice."""
    x = cells(0, 200, 5)
    fair, biased = (ev.split_floor(lambda a, b, e=e: ev.energy_distance(a, b, estimator=e), x) for e in ("unbiased", "biased"))
    assert abs(fair.mean()) < 2 * fair.std() and biased.min() > 0
    assert (biased - fair).mean() == pytest.approx(2 * pdist(x).mean() / 100, rel=0.01)
    np.testing.assert_array_equal(fair, ev.split_floor(ev.energy_distance, x))


@pytest.mark.parametrize("distance", [ev.energy_distance, ev.mmd, ev.wasserstein, ev.sliced_wasserstein], ids=lambda f: f.__name__)
def test_collapsed_variance_is_punished(distance):
    """All cells near their true mean against a fresh sample: farther on the mean of 10 worlds, by half and by four standard errors."""
    flat, fresh = [], []
    for seed in range(10):
        x, y, z = (cells(100 * k + seed, 60, 3) @ np.array([[1, 1, 0], [0, 1, 1], [0, 0, 1.0]]) for k in range(3))
        fresh.append(distance(x, y))
        flat.append(distance(x, x.mean(0) + 0.01 * (z - z.mean(0)) / z.std(0)))
    assert np.mean(flat) > 1.5 * max(np.mean(fresh), 0) and np.mean(flat) - np.mean(fresh) > 4 * np.std(fresh) / np.sqrt(10)


def test_collapsed_variance_is_invisible_to_squared_distances():
    x = cells(0, 60, 3)
    flat = x.mean(0) + 1e-6 * cells(1, 60, 3)
    assert ev.energy_distance(x, flat, "sqeuclidean") < 0


# -- intervals -------------------------------------------------------------------------------------------------------------------------


def test_crps_by_brute_force_and_of_a_normal():
    x, y = RNG.normal(size=(9, 4)), RNG.normal(size=4)
    gaps = np.abs(x[:, None] - x[None]).sum((0, 1))
    np.testing.assert_allclose(ev.crps(x, y), np.abs(x - y).mean(0) - gaps / (2 * 9 * 8), atol=1e-12)
    np.testing.assert_allclose(ev.crps(x, y, fair=False), np.abs(x - y).mean(0) - gaps / (2 * 81), atol=1e-12)
    truth = np.array([-1.0, 0.0, 2.0])
    exact = truth * (2 * stats.norm.cdf(truth) - 1) + 2 * stats.norm.pdf(truth) - 1 / np.sqrt(np.pi)
    quantiles = stats.norm.ppf((np.arange(4000) + 0.5) / 4000)[:, None] + np.zeros(3)
    np.testing.assert_allclose(ev.crps(quantiles, truth, fair=False), exact, atol=1e-3)


def test_fair_crps_does_not_depend_on_the_number_of_draws():
    """Mean over 40,000 truths: 1/sqrt(pi) for 2 draws as for 20, within four standard errors."""
    rng = np.random.default_rng(0)
    for s in (2, 20):
        values = ev.crps(rng.normal(size=(s, 40_000)), rng.normal(size=40_000))
        assert abs(values.mean() - 1 / np.sqrt(np.pi)) < 4 * values.std() / 200


def test_interval_score_is_least_at_the_true_quantiles():
    y = np.random.default_rng(0).normal(size=20_000)
    z = stats.norm.ppf(0.95)
    score = {w: ev.interval_score(-w * z, w * z, y, 0.9).mean() for w in (0.5, 0.8, 1.0, 1.25, 2.0, 50.0)}
    assert min(score, key=score.get) == 1.0
    assert score[1.0] == pytest.approx(2 * stats.norm.pdf(z) / 0.05, rel=0.02)
    assert ev.coverage(-50, 50, y) == 1 and ev.coverage(-z, z, y) == pytest.approx(0.9, abs=0.01)
    assert np.isnan(ev.coverage(0, 1, np.nan))


@pytest.mark.parametrize("counts", [False, True])
def test_pit_is_uniform_for_exchangeable_draws(counts):
    """Kolmogorov-Smirnov at level .001."""
    rng = np.random.default_rng(0)
    x = rng.poisson(0.7, (10, 5000)) if counts else rng.normal(size=(10, 5000))
    assert stats.kstest(ev.pit(x[1:], x[0]), "uniform").pvalue > 0.001


def test_uniformity_knows_that_clusters_share_their_luck():
    """50 clusters of 40 equal values: of 400 tests at level .05, at most what chance allows at .001. A spread that is too wide is seen."""
    rng = np.random.default_rng(0)
    clusters = np.repeat(np.arange(50), 40)
    p = np.array([ev.pit_uniformity(np.repeat(rng.uniform(size=50), 40), clusters, 199).p_value for _ in range(400)])
    assert 4 <= (p < 0.05).sum() <= stats.binom.ppf(0.999, 400, 0.05)
    naive = [ev.pit_uniformity(np.repeat(rng.uniform(size=50), 40), None, 199).p_value < 0.05 for _ in range(50)]
    assert np.mean(naive) > 0.5
    seen = ev.pit_uniformity(rng.beta(2, 2, (50, 40)), clusters.reshape(50, 40))
    assert seen.p_value == 0.001 and seen.n == 50 and seen.ks > 0.05
    u = rng.uniform(size=300)
    assert ev.pit_uniformity(u).ks == pytest.approx(stats.kstest(u, "uniform").statistic)


# -- graphs ----------------------------------------------------------------------------------------------------------------------------


def valid_adjustment(graph, i, j, z):
    """Shpitser's criterion in the words of networkx: forbidden descendants, and separation in the proper back-door graph."""
    causal = ({i} | nx.descendants(graph, i)) & ({j} | nx.ancestors(graph, j)) - {i} if nx.has_path(graph, i, j) else set()
    forbidden = set().union(*({v} | nx.descendants(graph, v) for v in causal)) if causal else set()
    back = graph.copy()
    back.remove_edges_from([(i, v) for v in causal if graph.has_edge(i, v)])
    return not (forbidden & z) and nx.is_d_separator(back, {i}, {j}, z)


def test_intervention_distance_by_the_adjustment_criterion():
    rng = np.random.default_rng(0)
    for _ in range(25):
        graphs = []
        for _ in range(2):
            order = rng.permutation(6)
            graphs.append(np.triu(rng.uniform(size=(6, 6)) < 0.4, 1)[np.ix_(order, order)])
        guess, true = graphs
        g, expected = nx.DiGraph(true.astype(int)), 0
        for i in range(6):
            z = set(np.flatnonzero(guess[:, i]))
            for j in set(range(6)) - {i}:
                expected += nx.has_path(g, i, j) if j in z else not valid_adjustment(g, i, j, z)
        assert ev.structural_intervention_distance(guess, true) == expected


def test_intervention_distance_of_simple_graphs():
    chain = np.diag(np.ones(3), 1)
    assert ev.structural_intervention_distance(chain, chain) == 0
    assert ev.structural_intervention_distance(np.triu(np.ones((4, 4)), 1), chain) == 0  # more edges, the right order
    assert ev.structural_intervention_distance(np.zeros((4, 4)), chain) == 6  # no adjustment for what is upstream
    with pytest.raises(DataError, match="cycle"):
        ev.structural_intervention_distance(chain + chain.T, chain)


# -- what every metric of profiles must do -----------------------------------------------------------------------------------------------

PROFILES = {
    "mse": (lambda p, t: ev.mse(p, t), 0),
    "rmse": (lambda p, t: ev.rmse(p, t), 0),
    "mae": (lambda p, t: ev.mae(p, t), 0),
    "l2_heg": (lambda p, t, c=None: ev.l2_heg(p, t, t.mean(0), 5), 0),
    "weighted_mse": (lambda p, t: ev.weighted_mse(p, t, ev.de_weights(t)), 0),
    "weighted_r2": (lambda p, t: ev.weighted_r2(p, t, t.mean(0), ev.de_weights(t)), 1),
    "pearson": (lambda p, t: ev.delta_correlation(p, t, t.mean(0)), 1),
    "spearman": (lambda p, t: ev.delta_correlation(p, t, t.mean(0), method="spearman"), 1),
    "top 4": (lambda p, t: ev.delta_correlation(p, t, t.mean(0), ev.top_genes(t, 4)), 1),
    "cosine": (lambda p, t: ev.cosine(p, t, t.mean(0)), 1),
    "pooled": (lambda p, t: ev.pooled_correlation(p, t, t.mean(0)), 1),
    "nir": (lambda p, t: ev.retrieval(p, t, "nir"), 1),
    "perturbench": (lambda p, t: ev.retrieval(p, t, "perturbench"), 0),
}
SEEDS = st.integers(0, 10_000)


@pytest.mark.parametrize("name", PROFILES)
@settings(max_examples=15, deadline=None)
@given(seed=SEEDS)
def test_metrics_of_profiles(name, seed):
    """Perfection is perfect; the order of genes does not matter, nor that of perturbations; labels do."""
    metric, best = PROFILES[name]
    rng = np.random.default_rng(seed)
    true, predicted = rng.normal(size=(2, 6, 9))
    np.testing.assert_allclose(metric(true, true), best, atol=1e-10)
    genes, rows = rng.permutation(9), rng.permutation(6)
    value = metric(predicted, true)
    np.testing.assert_allclose(metric(predicted[:, genes], true[:, genes]), value, atol=1e-10)
    np.testing.assert_allclose(metric(predicted[rows], true[rows]), np.asarray(value)[rows] if np.ndim(value) else value, atol=1e-10)
    shuffled = np.mean(metric(np.roll(true, 1, axis=0), true))
    assert shuffled > best + 0.05 if best == 0 else shuffled < best - 0.05


DISTANCES = [ev.energy_distance, ev.mmd, ev.wasserstein, ev.sliced_wasserstein, ev.correlation_gap]


@pytest.mark.parametrize("distance", DISTANCES, ids=lambda f: f.__name__)
@settings(max_examples=8, deadline=None)
@given(seed=SEEDS)
def test_distances_between_cells(distance, seed):
    """Symmetric, blind to the order of cells, and (but for the random slices) of genes; nothing is nearer than the sample itself."""
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(8, 4)), rng.normal(size=(8, 4)) * 2
    value = distance(x, y)
    assert distance(y, x) == pytest.approx(value, abs=1e-10)
    assert distance(x[rng.permutation(8)], y) == pytest.approx(value, abs=1e-10)
    if distance is not ev.sliced_wasserstein:
        genes = rng.permutation(4)
        assert distance(x[:, genes], y[:, genes]) == pytest.approx(value, abs=1e-10)
    assert distance(x, x) <= min(value, 1e-12)


REFUSED = [
    lambda: ev.mse(TRUE, TRUE[:, :3]),
    lambda: ev.delta_correlation(TRUE, TRUE, CONTROL, method="kendall"),
    lambda: ev.delta_correlation(TRUE, TRUE, CONTROL, -WEIGHTS),
    lambda: ev.retrieval(TRUE, TRUE, "vcc2026"),
    lambda: ev.retrieval(TRUE, TRUE, "vcc2027"),
    lambda: ev.retrieval(TRUE, TRUE, "vcc2026", own=np.full(P, G)),
    lambda: ev.energy_distance(cells(0), cells(1, d=3)),
    lambda: ev.energy_distance(cells(0), cells(1), "manhattan"),
    lambda: ev.mmd(cells(0), cells(1), bandwidth=0.0),
    lambda: ev.wasserstein(cells(0), cells(1), order=3),
    lambda: ev.split_floor(ev.mmd, cells(0, n=3)),
    lambda: ev.interval_score(1.0, 0.0, 0.5),
    lambda: ev.crps(np.zeros((1, 3)), np.zeros(3)),
    lambda: ev.pit_uniformity([1.5, 0.2]),
    lambda: ev.bulk_lognorm([np.full((2, 3), -1.0)]),
    lambda: ev.DETable(TRUE, TRUE, TRUE[:2]),
]


@pytest.mark.parametrize("call", REFUSED)
def test_bad_input_is_refused(call):
    with pytest.raises(DataError, match=r"given|there is no"):
        call()
