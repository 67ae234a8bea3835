"""Implication statistics against brute force, and their behaviour under the truth, its transpose, and symmetry."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from pyrocausal.errors import DataError
from pyrocausal.implication import implication

NAMES = [f"G{i}" for i in range(40)]


def tables(seed=0, noise=0.1):
    rng = np.random.default_rng(seed)
    M = rng.standard_normal((40, 40)) * (rng.random((40, 40)) < 0.1)
    M += 0.01 * rng.standard_normal((40, 40))
    D = (np.abs(M) > 0.5) ^ (rng.random((40, 40)) < noise)
    return pd.DataFrame(M, NAMES, NAMES), pd.DataFrame(D, NAMES, NAMES)


def test_against_counting():
    M, D = tables()
    D = D.iloc[:25]  # genes that were perturbed
    found = implication(M, D, quantiles=(0.95,)).set_index("direction")
    pairs = [(a, b) for a in NAMES[:25] for b in NAMES if a != b]
    threshold = np.quantile([abs(M.loc[a, b]) for a, b in pairs], 0.95)
    for direction, at in (("forward", lambda a, b: M.loc[a, b]), ("transposed", lambda a, b: M.loc[b, a])):
        edges = [p for p in pairs if abs(at(*p)) > threshold]
        hits = sum(bool(D.loc[p]) for p in edges)
        row = found.loc[direction]
        assert row["n_edges"] == len(edges) and row["confidence"] == pytest.approx(hits / len(edges))
        base = np.mean([bool(D.loc[p]) for p in pairs])
        assert row["base_rate"] == pytest.approx(base) and row["lift"] == pytest.approx(hits / len(edges) / base)
        wilson = stats.binomtest(hits, len(edges)).proportion_ci(method="wilson")
        assert (row["lower"], row["upper"]) == pytest.approx((wilson.low, wilson.high))
        all_hits = sum(bool(D.loc[p]) for p in pairs)
        p = stats.hypergeom.sf(hits - 1, len(pairs), all_hits, len(edges))
        assert row["p_fisher"] == pytest.approx(p)
        assert row["lift_lower"] < row["lift"] < row["lift_upper"]


def test_direction_is_seen_and_symmetry_has_none():
    M, D = tables()
    forward = implication(M, D).iloc[0]
    assert forward["p_direction"] < 1e-3 and forward["confidence"] > 2 * forward["base_rate"]
    assert implication(M.T, D).iloc[0]["p_direction"] > 0.5
    both = implication(M + M.T, D)
    assert (both["p_direction"] == 1).all()
    assert (both.groupby("quantile")["confidence"].nunique() == 1).all()


def test_no_relation_is_seldom_called():
    """100 independent tests at 5 %: more than 13 has probability 2e-4 if the test keeps its level."""
    called = 0
    for seed in range(100):
        M, D = tables(seed)
        D = D.sample(frac=1, random_state=seed).set_axis(NAMES)
        D = D[np.random.default_rng(seed).permutation(NAMES)].set_axis(NAMES, axis=1)
        called += implication(M, D, quantiles=(0.9,), resamples=10).iloc[0]["p_fisher"] <= 0.05
    assert called <= 13


def test_what_cannot_be_tested_is_refused():
    M, D = tables()
    with pytest.raises(DataError, match="name perturbations"):
        implication(M, D.set_axis([f"p{i}" for i in range(40)]))
    with pytest.raises(DataError, match="exceeds"):
        implication(M, D, quantiles=(1.0,))
