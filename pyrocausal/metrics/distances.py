"""Distances between samples of cells: energy, maximum mean discrepancy, Wasserstein, and what they miss.

The same name stands for different numbers in different packages; for the same cells, "energy distance" was 2.12, 2.38, 47.2 and .13. What
differs is named: the distance between cells, whether the zeros of a sample's distances to itself are counted (``"biased"``, a V-statistic)
or not (``"unbiased"``, a U-statistic), and whether cells are compared jointly or gene by gene. ``ENERGY`` holds the published ones.

Samples are ``x`` [n, d] and ``y`` [m, d], in a space fixed beforehand (all genes, or components of training cells). Every distance grows
with dimension, depth and sparsity: report it beside that of a technical duplicate, and :func:`correlation_gap` beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import ArrayLike
from scipy import sparse
from scipy.optimize import linear_sum_assignment, linprog
from scipy.spatial.distance import cdist

from pyrocausal.errors import DataError, nearest
from pyrocausal.metrics.means import Array

Ground = Literal["euclidean", "sqeuclidean"]
Estimator = Literal["unbiased", "biased"]
Pool = Literal["joint", "genes"]
Kernel = Literal["rbf", "linear"]


class Energy(NamedTuple):
    """Arguments of :func:`energy_distance`."""

    ground: Ground
    estimator: Estimator
    pool: Pool = "joint"


ENERGY = {
    "scperteval": Energy("euclidean", "unbiased"),
    "scperturb": Energy("sqeuclidean", "unbiased"),
    "pertpy": Energy("euclidean", "biased"),
    "cell_eval": Energy("euclidean", "biased"),
    "gge": Energy("euclidean", "biased", "genes"),
}
"""Published conventions of the energy distance: scperteval 0.2, scperturb 0.1 (its default), pertpy 1.0.3, cell-eval 0.8, gge 1.0."""


def energy_distance(
    x: ArrayLike, y: ArrayLike, ground: Ground = "euclidean", estimator: Estimator = "unbiased", pool: Pool = "joint"
) -> float:
    """``2 E|X - Y| - E|X - X'| - E|Y - Y'|``, means over all pairs of cells; ``energy_distance(x, y, *ENERGY["scperturb"])`` for a
    convention.

    Args:
        ground: ``"euclidean"``: 0 only for equal distributions. ``"sqeuclidean"``: exactly
            ``2 |mean x - mean y|^2 - 2 tr var x / n - 2 tr var y / m`` if unbiased (variances with n - 1): *nothing but the mean is seen*.
        estimator: ``"unbiased"``: pairs of different cells; 0 in expectation for equal distributions, so it can be negative.
            ``"biased"``: all pairs, larger by ``E|X - X'| / n + E|Y - Y'| / m``, at least 0, and dependent on the number of cells.
        pool: ``"joint"``, or ``"genes"``: mean over columns of the one-dimensional distances (the dependence of genes is not seen).

    NaN without cells. A sample of one cell has no pairs: its own term is 0 (scperteval's convention), and the value too large by the
    spread.
    Source: Szekely and Rizzo 2013. Noise floor: :func:`split_floor`. Cannot see: in many dimensions, broken dependence between genes, which
    changes norms little.
    """
    a, b = _samples(x, y)
    for value, kind in ((ground, Ground), (estimator, Estimator), (pool, Pool)):
        _known(value, get_args(kind))
    n, m = len(a), len(b)
    if n == 0 or m == 0:
        return np.nan
    if pool == "genes":
        cross, xx, yy = _marginal_sums(a, b, ground)
    else:
        cross, xx, yy = cdist(a, b, ground).sum(), cdist(a, a, ground).sum(), cdist(b, b, ground).sum()
    less = 1 if estimator == "unbiased" else 0
    return float(np.mean(2 * cross / (n * m) - xx / (n * max(n - less, 1)) - yy / (m * max(m - less, 1))))


def mmd(
    x: ArrayLike,
    y: ArrayLike,
    bandwidth: float | Literal["median"] = "median",
    estimator: Estimator = "unbiased",
    kernel: Kernel = "rbf",
) -> float:
    """Squared maximum mean discrepancy ``E k(X, X') + E k(Y, Y') - 2 E k(X, Y)``.

    Args:
        bandwidth: sigma of ``k(x, y) = exp(-|x - y|^2 / (2 sigma^2))``; ``"median"``: the median distance of two different cells of the
            pooled sample (0 if that is 0). The median depends on the prediction: fix a number where values of several models are compared.
        estimator: as in :func:`energy_distance`; the unbiased one can be negative.
        kernel: ``"linear"``: ``k(x, y) = <x, y>``, of which the biased form is ``|mean x - mean y|^2`` (pertpy's default) and sees only
            means.

    NaN for fewer than two cells on a side. Source: Gretton et al. 2012, equation 3; scperteval ``unbiased_mmd_median``. Noise floor:
    :func:`split_floor`, about ``sqrt(2) / n``. Cannot see: differences much finer or much wider than the bandwidth.
    """
    a, b = _samples(x, y)
    _known(estimator, get_args(Estimator))
    _known(kernel, get_args(Kernel))
    n, m = len(a), len(b)
    if n < 2 or m < 2:
        return np.nan
    if kernel == "linear":
        grams = a @ a.T, b @ b.T, a @ b.T
    else:
        squares = [cdist(*pair, "sqeuclidean") for pair in ((a, a), (b, b), (a, b))]
        sigma = _median(*squares) if bandwidth == "median" else float(bandwidth)
        if bandwidth != "median" and not 0 < sigma < np.inf:
            raise DataError(f"bandwidth={bandwidth!r} was given; give a number above 0, or 'median'")
        if sigma <= 0:
            return 0.0
        grams = tuple(np.exp(-s / (2 * sigma**2)) for s in squares)
    xx, yy, xy = grams
    if estimator == "biased":
        return float(xx.mean() + yy.mean() - 2 * xy.mean())
    return float((xx.sum() - np.trace(xx)) / (n * (n - 1)) + (yy.sum() - np.trace(yy)) / (m * (m - 1)) - 2 * xy.mean())


def wasserstein(x: ArrayLike, y: ArrayLike, order: int = 1, pool: Pool = "joint") -> float:
    """``(min over couplings of E |X - Y|^order)^(1/order)`` with Euclidean ``|.|``: exact, of the two empirical distributions.

    By assignment for samples of one size, else by linear programming (some hundreds of cells). ``pool="genes"``: mean over columns of the
    one-dimensional distances. No entropy is added: entropic transport costs (pertpy) are not 0 between a sample and itself.

    Noise floor: large, and slow to fall: ``n^(-1/d)`` in d dimensions, so that a perfect model scores far above 0 (:func:`split_floor`).
    Cannot see: in many dimensions, a wrong variance, which can look nearer than a fresh sample. Source: Villani 2009.
    """
    a, b = _samples(x, y)
    if order not in (1, 2):
        raise DataError(f"order={order!r} was given; give 1 or 2")
    _known(pool, get_args(Pool))
    if not len(a) or not len(b):
        return np.nan
    if pool == "genes":
        return float(_quantile_cost(a, b, order).mean()) if order == 1 else float(np.sqrt(_quantile_cost(a, b, order)).mean())
    cost = cdist(a, b, "euclidean" if order == 1 else "sqeuclidean")
    return float(_transport(cost) ** (1 / order))


def sliced_wasserstein(x: ArrayLike, y: ArrayLike, order: int = 2, n_projections: int = 200, seed: int = 0) -> float:
    """``(E_theta W_order^order(<theta, X>, <theta, Y>))^(1/order)``, theta uniform on the sphere, a mean over ``n_projections`` draws.

    Smaller than :func:`wasserstein` (by about ``sqrt(d)`` for shifts), cheap for many cells, and of floor ``n^(-1/2)`` in any dimension.
    Monte Carlo error of some per cent; compare models with one ``seed``. Source: Bonneel et al. 2015. Cannot see: what few directions show.
    """
    a, b = _samples(x, y)
    if order not in (1, 2) or n_projections < 1:
        raise DataError(f"order={order!r}, n_projections={n_projections!r} were given; give order 1 or 2 and at least one projection")
    if not len(a) or not len(b):
        return np.nan
    theta = np.random.default_rng(seed).normal(size=(a.shape[1], n_projections))
    theta /= np.linalg.norm(theta, axis=0)
    return float(_quantile_cost(a @ theta, b @ theta, order).mean() ** (1 / order))


def correlation_gap(x: ArrayLike, y: ArrayLike) -> float:
    """``||corr(x) - corr(y)||_F / sqrt(d (d - 1))``: root mean square difference of the correlations of genes; constant genes correlate
    with none.

    The dependence check to print beside every distance. Noise floor: about ``sqrt(1/n + 1/m)``. Cannot see: means and variances, which the
    distances see; nonlinear dependence.
    """
    a, b = _samples(x, y)
    if min(len(a), len(b)) < 2 or a.shape[1] < 2:
        return np.nan
    gap = _correlations(a) - _correlations(b)
    return float(np.linalg.norm(gap) / np.sqrt(a.shape[1] * (a.shape[1] - 1)))


def split_floor(distance: Callable[[Array, Array], float], x: ArrayLike, n_splits: int = 20, seed: int = 0) -> Array:
    """The noise floor of a distance: its values [n_splits] between random disjoint halves of one sample of cells.

    Halves have half of the cells: unbiased distances scatter about 0 with about twice the standard deviation that they have for all cells;
    biased ones and Wasserstein are larger than for all cells. Splits of one sample are not independent of each other.
    """
    a = np.asarray(x, dtype=float)
    if a.ndim != 2 or len(a) < 4:
        raise DataError(f"cells of shape {a.shape} were given; give [n_cells, d] with at least four cells")
    rng = np.random.default_rng(seed)
    orders = rng.permuted(np.tile(np.arange(len(a)), (n_splits, 1)), axis=1)
    half = len(a) // 2
    return np.array([distance(a[o[:half]], a[o[half : 2 * half]]) for o in orders])


def _samples(x: ArrayLike, y: ArrayLike) -> tuple[Array, Array]:
    a, b = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise DataError(f"samples of shapes {a.shape} and {b.shape} were given; give [n_cells, d] each, of the same columns")
    return a, b


def _known(value: str, valid: tuple[str, ...]) -> None:
    if value not in valid:
        raise DataError(f"there is no convention {value!r}{nearest(str(value), valid)}")


def _median(xx: Array, yy: Array, xy: Array) -> float:
    """Median distance of different cells of the pooled sample; every pair enters twice, as in the full matrix without its diagonal."""
    pairs = [np.sqrt(xx[np.triu_indices(len(xx), 1)]), np.sqrt(yy[np.triu_indices(len(yy), 1)]), np.sqrt(xy).ravel()]
    return float(np.median(np.concatenate(pairs)))


def _marginal_sums(a: Array, b: Array, ground: str) -> tuple[Array, Array, Array]:
    """Sums over all ordered pairs of ``|x - y|`` (or its square), ``|x - x'|``, ``|y - y'|``, gene by gene, [d] each."""
    if ground == "sqeuclidean":
        n, m = len(a), len(b)
        qa, qb, sa, sb = (a**2).sum(0), (b**2).sum(0), a.sum(0), b.sum(0)
        return m * qa + n * qb - 2 * sa * sb, 2 * (n * qa - sa**2), 2 * (m * qb - sb**2)
    xx, yy, both = _absolute(a), _absolute(b), _absolute(np.concatenate([a, b]))
    return (both - xx - yy) / 2, xx, yy


def _absolute(a: Array) -> Array:
    """``sum_ij |a_i - a_j|`` of each column: ``2 sum_i (2 i - n + 1) a_(i)`` over order statistics."""
    n = len(a)
    centred = np.sort(a, axis=0) - a.mean(0)
    return 2 * ((2 * np.arange(n) - n + 1)[:, None] * centred).sum(0)


def _quantile_cost(a: Array, b: Array, order: int) -> Array:
    """``int_0^1 |F_a^-1 - F_b^-1|^order`` of each column, [d]."""
    n, m = len(a), len(b)
    steps = np.union1d(np.arange(1, n + 1) * m, np.arange(1, m + 1) * n)  # in units of 1 / (n m)
    width = np.diff(np.concatenate([[0], steps])) / (n * m)
    gap = np.sort(a, axis=0)[(steps - 1) // m] - np.sort(b, axis=0)[(steps - 1) // n]
    return (width[:, None] * np.abs(gap) ** order).sum(0)


def _transport(cost: Array) -> float:
    """Least mean cost of a coupling of two uniform distributions, cost [n, m]."""
    n, m = cost.shape
    if n == m:
        return float(cost[linear_sum_assignment(cost)].mean())
    rows = sparse.kron(sparse.eye(n), np.ones((1, m)))
    columns = sparse.kron(np.ones((1, n)), sparse.eye(m))
    mass = np.concatenate([np.full(n, 1 / n), np.full(m, 1 / m)])
    found = linprog(cost.ravel(), A_eq=sparse.vstack([rows, columns]).tocsr(), b_eq=mass, bounds=(0, None), method="highs")
    return float(found.fun)


def _correlations(a: Array) -> Array:
    z = a - a.mean(0)
    size = np.linalg.norm(z, axis=0)
    z = z / np.where(size > 1e-12 * np.maximum(np.abs(a).max(0), 1e-300), size, np.inf)
    out = z.T @ z
    np.fill_diagonal(out, 0.0)
    return out
