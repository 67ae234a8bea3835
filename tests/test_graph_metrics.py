"""Graph metrics against scikit-learn and against counting by hand, on random matrices, with ties, and where scores are undefined."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score

from pyrocausal.errors import DataError
from pyrocausal.graph_metrics import directed_recovery, edge_matrix, graph_scores, shift_correlation
from pyrocausal.simulate_sde import linear_sde_screen


def random_pair(seed: int, d: int = 9, ties: bool = False, density: float = 0.3) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    truth = np.where(rng.random((d, d)) < density, rng.normal(0, 2, (d, d)), 0.0)
    predicted = truth + rng.normal(0, 1.5, (d, d))
    return (np.round(predicted) / 2 if ties else predicted), truth


def off(a: np.ndarray) -> np.ndarray:
    return a[~np.eye(len(a), dtype=bool)]


def classes(a: np.ndarray, threshold: float) -> np.ndarray:
    return np.where(np.abs(a) >= threshold, np.sign(a), 0)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_agrees_with_scikit_learn(seed: int, ties: bool) -> None:
    predicted, truth = random_pair(seed, ties=ties)
    for threshold in (0.5, 1.3):
        p, t = off(predicted), off(truth)
        label, called = classes(t, threshold), classes(p, threshold)
        areas = []
        for low, high in ((-1, 0), (-1, 1), (0, 1)):
            rows = (label == low) | (label == high)
            areas.append(roc_auc_score(label[rows] == high, p[rows]))
        expected = {
            "auroc": np.mean(areas),
            "f1": f1_score(label, called, average="macro"),
            "pearson": stats.pearsonr(p, t)[0],
            "auprc": average_precision_score(label != 0, np.abs(p)),
            "frobenius": np.sqrt(((p - t) ** 2).sum() / (t**2).sum()),
        }
        got = graph_scores(predicted, truth, threshold)
        for name, value in expected.items():
            assert got[name] == pytest.approx(value, abs=1e-12), name


@pytest.mark.parametrize("seed", range(5))
def test_direction_and_hamming_distance_pair_by_pair(seed: int) -> None:
    predicted, truth = random_pair(seed, ties=True, density=0.5)
    right: list[float] = []
    distance = 0
    for i in range(9):
        for j in range(i):
            true = (abs(truth[i, j]) >= 0.5, abs(truth[j, i]) >= 0.5)
            called = (abs(predicted[i, j]) >= 0.5, abs(predicted[j, i]) >= 0.5)
            if sum(true) == 1:
                forward, back = abs(predicted[i, j]), abs(predicted[j, i])
                if true[1]:
                    forward, back = back, forward
                right.append(1.0 if forward > back else 0.5 if forward == back else 0.0)
            differ = int(true[0] != called[0]) + int(true[1] != called[1])
            distance += 1 if sum(true) == sum(called) == 1 and differ else differ
    got = graph_scores(predicted, truth)
    assert got["n_direction"] == len(right) > 0 and got["direction"] == pytest.approx(np.mean(right))
    assert got["shd"] == distance > 0


def test_truth_is_perfect_and_its_transpose_is_not() -> None:
    _, truth = random_pair(0, 30, density=0.1)
    perfect = graph_scores(truth, truth)
    assert perfect.drop(["n_direction", "frobenius", "shd"]).tolist() == pytest.approx([1, 1, 1, 1, 1])
    assert perfect["frobenius"] == perfect["shd"] == 0
    turned, symmetric = graph_scores(truth.T, truth), graph_scores(truth + truth.T, truth)
    assert turned["direction"] == 0 and turned["shd"] > 0 and symmetric["direction"] == 0.5
    assert symmetric["auroc"] > 0.95 > symmetric["f1"]  # what the area cannot see


def test_diagonals_and_scale() -> None:
    predicted, truth = random_pair(1)
    other = predicted + np.diag(np.arange(9.0))
    np.testing.assert_array_equal(graph_scores(other, truth + 5 * np.eye(9)), graph_scores(predicted, truth))
    np.testing.assert_array_equal(directed_recovery(other, truth, 20), directed_recovery(predicted, truth + np.eye(9), 20))
    scaled, plain = graph_scores(0.2 * predicted, truth), graph_scores(predicted, truth)
    free = ["auroc", "pearson", "auprc", "direction"]
    np.testing.assert_allclose(scaled[free], plain[free], atol=1e-12)
    assert scaled["f1"] != plain["f1"] and scaled["shd"] != plain["shd"]


def test_undefined_scores_are_nan() -> None:
    predicted, truth = random_pair(2)
    share = (np.abs(off(truth)) >= 0.5).mean()
    for constant in (0.0, 2.0):
        flat = graph_scores(np.full((9, 9), constant), truth)
        assert flat["auroc"] == 0.5 and flat["direction"] == 0.5 and flat["auprc"] == pytest.approx(share) and np.isnan(flat["pearson"])
    assert graph_scores(np.zeros((9, 9)), truth)["frobenius"] == 1
    none = graph_scores(predicted, np.zeros((9, 9)))
    assert none[["auroc", "pearson", "auprc", "direction", "frobenius"]].isna().all()
    assert none["n_direction"] == 0 and none["shd"] == (np.abs(off(predicted)) >= 0.5).sum()
    label = np.zeros(72)
    assert none["f1"] == pytest.approx(f1_score(label, classes(off(predicted), 0.5), average="macro"))
    assert graph_scores(np.zeros((9, 9)), np.zeros((9, 9)))["f1"] == 1
    full = graph_scores(predicted, np.where(truth > 0, 1.0, -1.0))  # all are edges: one area is left
    assert full["auprc"] == 1 and full["n_direction"] == 0 and np.isnan(full["direction"])
    assert full["auroc"] == pytest.approx(roc_auc_score(off(truth) > 0, off(predicted)))
    positive = graph_scores(predicted, np.ones((9, 9)))
    assert np.isnan(positive["auroc"]) and np.isnan(positive["pearson"])


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_recovery_of_a_reference_graph(seed: int, ties: bool) -> None:
    predicted, truth = random_pair(seed, ties=ties)
    got = directed_recovery(predicted, truth, n_permutations=0)
    score, label = np.abs(off(predicted)), off(truth) != 0
    assert got["auroc"] == pytest.approx(roc_auc_score(label, score), abs=1e-12)
    assert got["auprc"] == pytest.approx(average_precision_score(label, score), abs=1e-12)
    assert got["direction"] == pytest.approx(graph_scores(predicted, np.where(truth != 0, 1.0, 0.0))["direction"], abs=1e-12)
    assert got["k"] == label.sum() and not any(name.startswith("p_") for name in got.index)
    k, cut = int(label.sum()), np.sort(score)[-int(label.sum())]
    places = k - (score > cut).sum()
    precision = (label[score > cut].sum() + places * label[score == cut].mean()) / k
    assert got["precision_at_k"] == pytest.approx(precision, abs=1e-12)


def test_null_by_all_relabellings() -> None:
    """p-values of 20,000 permutations of five nodes against all 120; 5 standard errors of a share are .018 at most."""
    predicted, truth = random_pair(3, 5, density=0.4)
    observed = directed_recovery(predicted, truth, n_permutations=0)
    names = ["auroc", "auprc", "precision_at_k", "direction"]
    every = [directed_recovery(predicted[np.ix_(o, o)], truth, 0)[names] for o in map(list, permutations(range(5)))]
    exact = np.mean([row >= observed[names] - 1e-12 for row in every], axis=0)
    got = directed_recovery(predicted, truth, n_permutations=20_000, seed=1)
    np.testing.assert_allclose(got[[f"p_{n}" for n in names]], exact, atol=0.018)
    np.testing.assert_array_equal(got, directed_recovery(predicted, truth, n_permutations=20_000, seed=1))


def test_p_values_hold_their_level_and_find_what_is_there() -> None:
    """Under the null each p-value is at most .05 with probability .05: 200 draws exceed 24 with probability below 5e-5, four scores."""
    rng = np.random.default_rng(0)
    hits = np.zeros(4)
    for _ in range(200):
        got = directed_recovery(rng.normal(size=(11, 11)), rng.random((11, 11)) < 0.15, 200, seed=int(rng.integers(1 << 30)))
        hits += got[["p_auroc", "p_auprc", "p_precision_at_k", "p_direction"]].to_numpy() <= 0.05
    assert hits.max() <= 24
    predicted, truth = random_pair(4, 11)
    strong = directed_recovery(predicted + truth, truth, 999)
    assert strong["p_auroc"] == strong["p_auprc"] == 0.001
    assert directed_recovery(predicted + predicted.T, truth, 99)["p_direction"] == 1


def test_recovery_without_edges_and_with_all() -> None:
    predicted, _ = random_pair(0)
    none = directed_recovery(predicted, np.zeros((9, 9)), 10)
    assert none.drop(["k", "n_direction"]).isna().all() and none["k"] == 0
    full = directed_recovery(predicted, np.ones((9, 9)), 10)
    assert full["auprc"] == full["precision_at_k"] == full["p_auprc"] == 1 and np.isnan(full["auroc"]) and np.isnan(full["p_direction"])


def test_named_edges() -> None:
    got = edge_matrix([("Raf", "Mek"), ("PKA", "Raf")], ["Mek", "PKA", "Raf"])
    assert sorted(zip(*np.nonzero(got), strict=True)) == [(1, 2), (2, 0)]
    with pytest.raises(DataError, match="'raf'"):
        edge_matrix([("raf", "Mek")], ["Mek", "Raf"])
    with pytest.raises(DataError, match="itself"):
        edge_matrix([("Mek", "Mek")], ["Mek", "Raf"])


def test_mean_shifts_of_perturbations() -> None:
    """Means of a simulated screen, in units of each shift, against what two drifts say."""
    truth = linear_sde_screen(15, 15, degree=3, cells_per_perturbation=1, seed=1).uns["truth"]
    targets, size = truth["targets"], truth["shift"].sum(1)
    true = (truth["means"][1:] - truth["means"][0]) / size[:, None]
    wrong = truth["drift"] + 0.3 * np.random.default_rng(0).normal(size=(15, 15))
    guess = np.stack([-np.linalg.solve(wrong.T, np.eye(15)[k]) for k in targets])
    assert shift_correlation(wrong, truth["drift"], targets) == pytest.approx(stats.pearsonr(guess.ravel(), true.ravel())[0], abs=1e-10)
    rest = [(guess[i, k], true[i, k]) for i in range(4) for k in range(15) if k != targets[i]]
    assert shift_correlation(wrong, truth["drift"], targets[:4], others=True) == pytest.approx(stats.pearsonr(*zip(*rest, strict=True))[0])
    assert shift_correlation(3 * truth["drift"], truth["drift"], [2]) == pytest.approx(1)
    assert np.isnan(shift_correlation(truth["graph"] * 0, truth["drift"], [2])) and np.isnan(shift_correlation(wrong, truth["drift"], []))


def test_refusals() -> None:
    a = np.zeros((3, 3))
    for wrong in (np.zeros((3, 4)), np.zeros(3), np.zeros((4, 4)), np.zeros((1, 1))):
        with pytest.raises(DataError, match="square"):
            graph_scores(wrong, a)
    with pytest.raises(DataError, match="finite"):
        graph_scores(np.full((3, 3), np.nan), a)
    with pytest.raises(DataError, match="threshold"):
        graph_scores(a, a, threshold=0)


def test_the_rounding_of_an_inverse_is_no_direction() -> None:
    """The inverse of a symmetric matrix is symmetric up to rounding, which must not count."""
    rng = np.random.default_rng(0)
    root = rng.normal(size=(30, 30))
    precision = np.linalg.inv(root @ root.T + np.eye(30))
    assert not np.array_equal(precision, precision.T)
    truth = np.triu(rng.random((30, 30)) < 0.3, 1)
    assert graph_scores(precision, truth.astype(float))["direction"] == 0.5
    found = directed_recovery(precision, truth, 20)
    assert found["direction"] == 0.5 and found["p_direction"] == 1.0
