"""How honest predicted uncertainty is: coverage, proper scores of intervals and of draws, and the probability integral transform.

Arrays broadcast, entry by entry (perturbation x gene); average over *declared* strata, such as expressed genes of unseen combinations:
silent genes are covered for free, and coverage over everything hides the strata in which it fails.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from pyrocausal.errors import DataError
from pyrocausal.metrics.means import Array

GRID = np.linspace(0.02, 0.98, 49)


class Uniformity(NamedTuple):
    """``ks``: largest gap between the distribution of PIT values and the uniform; its ``p_value``; ``n``: how many clusters."""

    ks: float
    p_value: float
    n: int


def coverage(lower: ArrayLike, upper: ArrayLike, true: ArrayLike) -> float:
    """Share of entries with ``lower <= true <= upper``, NaN entries left out.

    Noise floor: ``sqrt(q (1 - q) / n)`` if entries were independent; genes of one perturbation are not, so bootstrap perturbations.
    Cannot see: width. The whole line covers everything: stand :func:`interval_score` beside it.
    """
    low, high, y = _interval(lower, upper, true)
    there = ~(np.isnan(low) | np.isnan(high) | np.isnan(y))
    return float(((low <= y) & (y <= high))[there].mean()) if there.any() else np.nan


def interval_score(lower: ArrayLike, upper: ArrayLike, true: ArrayLike, level: float = 0.9) -> Array:
    """``(u - l) + 2/alpha (l - y)_+ + 2/alpha (y - u)_+`` of each entry, ``alpha = 1 - level``: least in expectation for the true
    quantiles.

    In the unit of the data, lower is better. Source: Gneiting and Raftery 2007, equation 43. Noise floor: that of the right predictive
    distribution, ``2 phi(z) / alpha * 2 sigma`` with ``z`` the upper quantile of a normal one. Cannot see: the distribution inside.
    """
    if not 0 < level < 1:
        raise DataError(f"level={level!r} was given; give a number between 0 and 1")
    low, high, y = _interval(lower, upper, true)
    alpha = 1 - level
    return (high - low) + 2 / alpha * (np.maximum(low - y, 0) + np.maximum(y - high, 0))


def crps(draws: ArrayLike, true: ArrayLike, fair: bool = True) -> Array:
    """Continuous ranked probability score ``E|X - y| - 1/2 E|X - X'|`` of draws [S, ...] of a prediction of ``true`` [...]; lower is
    better.

    ``fair``: ``E|X - X'|`` over pairs of different draws, unbiased for the score of the distribution that was drawn from (needs S > 1);
    otherwise over all pairs, the score of the S draws themselves, larger by ``E|X - X'| / 2S``. For a single draw that is ``|x - y|``.

    Source: Gneiting and Raftery 2007; Ferro 2014 (fair). Noise floor: ``sigma / sqrt(pi)`` of a right normal prediction. Cannot see:
    dependence between entries.
    """
    x, y = np.asarray(draws, dtype=float), np.asarray(true, dtype=float)
    if x.ndim < 1 or x.shape[1:] != y.shape or len(x) < (2 if fair else 1):
        raise DataError(
            f"draws of shape {x.shape} for truths of shape {y.shape} were given; give [S, ...] for [...], S > 1 for a fair score"
        )
    s = len(x)
    centred = np.sort(x, axis=0) - x.mean(0)
    rank = (2 * np.arange(s) - s + 1).reshape(-1, *[1] * y.ndim)
    spread = 2 * (rank * centred).sum(0) / (s * (s - 1 if fair else s))
    return np.abs(x - y).mean(0) - spread / 2


def pit(draws: ArrayLike, true: ArrayLike, seed: int = 0) -> Array:
    """``u = (#{x_s < y} + V (1 + #{x_s = y})) / (S + 1)`` with V uniform, of draws [S, ...] and truths [...].

    Uniform whenever the truth and the draws are exchangeable, whatever S is, and for counts too (randomised). NaN where the truth is.
    Source: Dawid 1984; Czado, Gneiting and Held 2009. Noise floor: a histogram of n values scatters by ``1 / sqrt(n)`` of a bin's
    share or more, as genes share cells (:func:`pit_uniformity`). Cannot see: whether the prediction is sharp.
    """
    x, y = np.asarray(draws, dtype=float), np.asarray(true, dtype=float)
    if x.ndim < 1 or x.shape[1:] != y.shape or not len(x):
        raise DataError(f"draws of shape {x.shape} for truths of shape {y.shape} were given; give [S, ...] for [...]")
    v = np.random.default_rng(seed).uniform(size=y.shape)
    u = ((x < y).sum(0) + v * (1 + (x == y).sum(0))) / (len(x) + 1)
    return np.where(np.isnan(y), np.nan, u)


def pit_uniformity(values: ArrayLike, clusters: ArrayLike | None = None, n_draws: int = 999, seed: int = 0) -> Uniformity:
    """Whether PIT values are uniform, allowing for dependence inside clusters: Kolmogorov and Smirnov's ``ks = max |F - u|``.

    Its usual null does not hold where genes share cells. Here, with ``d_c(u) = sum over cluster c of (1[value <= u] - u)``,
    ``max_u |sum_c d_c(u)|`` on a grid is compared with ``max_u |sum_c e_c d_c(u)|`` for random signs e (multiplier bootstrap): under
    uniformity every ``d_c`` has mean 0, and the signs keep what goes on inside a cluster. ``p_value = (1 + number as large) / (1 +
    n_draws)``.

    Args:
        values: any shape; NaN are left out.
        clusters: of the same shape: what is independent of each other, the perturbations; None: every value is its own.

    Cannot see: with few clusters, all but gross errors (with k of them, p is at least about ``2^(1 - k)``).
    """
    u = np.asarray(values, dtype=float)
    label = np.arange(u.size) if clusters is None else np.broadcast_to(np.asarray(clusters), u.shape).ravel()
    there = np.isfinite(u.ravel())
    u, label = u.ravel()[there], label[there]
    if not len(u) or (u < 0).any() or (u > 1).any():
        raise DataError(f"{len(u)} values, some outside 0 to 1 or none at all, were given; give those of pit")
    place = np.sort(u)
    rank = np.arange(len(u))
    ks = float(max(((rank + 1) / len(u) - place).max(), (place - rank / len(u)).max()))
    _, code, size = np.unique(label, return_inverse=True, return_counts=True)
    counts = np.zeros((len(size), len(GRID) + 1))
    np.add.at(counts, (code, np.searchsorted(GRID, u)), 1.0)
    excess = np.cumsum(counts, axis=1)[:, :-1] - size[:, None] * GRID
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], size=(n_draws, len(size)))
    null = np.abs(signs @ excess).max(1)
    p_value = (1 + int((null >= np.abs(excess.sum(0)).max() - 1e-9).sum())) / (1 + n_draws)
    return Uniformity(ks, p_value, len(size))


def _interval(lower: ArrayLike, upper: ArrayLike, true: ArrayLike) -> tuple[Array, Array, Array]:
    low, high, y = np.broadcast_arrays(*(np.asarray(a, dtype=float) for a in (lower, upper, true)))
    if (low > high).any():
        raise DataError("an interval whose lower end is above its upper end was given; give lower, upper, true in that order")
    return low, high, y
