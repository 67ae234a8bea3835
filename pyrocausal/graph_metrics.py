"""How well a matrix of causal effects agrees with a known directed graph, with cycles or without.

Row vectors; entry (j, k) says how j acts on k. :func:`graph_scores` compares with true weights, :func:`directed_recovery` with a reference
graph that has none, such as a consensus network, and says what chance would give; neither looks at diagonals. :func:`shift_correlation`
compares what two linear systems say about perturbations.

A score that is undefined (a correlation with a constant, a class that does not occur, no edge to find) is nan, never a guess.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.stats import rankdata

from pyrocausal.errors import DataError, nearest

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]
CHUNK = 2**24  # numbers in one batch of permutations
ROUNDING = 1e-9  # of the largest entry: what the inverse of a symmetric matrix may be asymmetric by
SINGULAR = 1e8  # condition number


def graph_scores(predicted: ArrayLike, truth: ArrayLike, threshold: float = 0.5) -> pd.Series:
    """Scores of predicted weights [d, d] against true weights [d, d], off the diagonal.

    An entry is an edge where ``|weight| >= threshold``, and its class is its sign then, 0 otherwise; on both sides alike, so that F1 and
    the Hamming distance depend on the scale of the prediction. The others do not, but for the relative error.

    ===============  ===================================================================================================================
    score            definition, and what it cannot see
    ===============  ===================================================================================================================
    ``auroc``        mean of the areas under the three ROC curves between true classes -1 and 0, -1 and 1, 0 and 1, with the signed
                     prediction as score; classes that do not occur are left out. Cannot see direction in a sparse graph: a symmetric
                     prediction is wrong on the few reversed edges among many zeros, and reaches .96 or more
    ``f1``           mean over the classes that occur in truth or prediction of ``2 TP / (2 TP + FP + FN)``. Cannot see sizes
    ``pearson``      correlation of the weights; nan for a constant. Cannot see scale; a few strong edges decide it
    ``auprc``        average precision of ``|prediction|`` for the edges; by chance, their share. Cannot see signs
    ``direction``    among the pairs with exactly one true edge, the share in which ``|prediction|`` is larger that way, ties .5: a
                     symmetric matrix has .5. Cannot see whether pairs without an edge are told from others, nor pairs with two edges
    ``n_direction``  number of those pairs
    ``frobenius``    ``||prediction - truth|| / ||truth||``; nothing predicted has 1, nan without true weights
    ``shd``          edges to add, to remove or to turn round, each counted once. Cannot see signs, nor how wrong an edge is
    ===============  ===================================================================================================================

    Ties share their ranks in every ranking: a constant prediction has .5 for each area, and the share of edges for ``auprc``.

    Returns:
        A Series of floats in the order above.

    Raises:
        DataError: if the matrices are not square, finite and of one size, or the threshold is not above 0.

    Source: ``auroc``, ``f1`` and ``pearson`` as in the evaluation of Lorch et al. 2026 (arXiv 2601.15341); structural Hamming
    distance: Tsamardinos, Brown and Aliferis 2006, extended to cycles.
    """
    p, t = _pair(predicted, truth)
    if not 0 < threshold < np.inf:
        raise DataError(f"threshold={threshold!r} was given; give a number above 0")
    p_edge, t_edge = np.abs(p) >= threshold, np.abs(t) >= threshold
    off = ~np.eye(len(p), dtype=bool)
    score, weight = p[off], t[off]
    called, label = np.sign(score) * p_edge[off], np.sign(weight) * t_edge[off]
    areas = [_area(score[label == low], score[label == high]) for low, high in ((-1, 0), (-1, 1), (0, 1))]
    f1 = [_f1(label == c, called == c) for c in (-1, 0, 1)]
    norm = np.linalg.norm(weight)
    direction, n_direction = _direction(np.abs(p), t_edge)
    return pd.Series(
        {
            "auroc": _mean(areas),
            "f1": _mean(f1),
            "pearson": _correlation(score, weight),
            "auprc": _average_precision(_ranking(np.abs(score))[0], np.flatnonzero(t_edge[off])[None])[0],
            "direction": direction,
            "n_direction": float(n_direction),
            "frobenius": np.linalg.norm(score - weight) / norm if norm > 0 else np.nan,
            "shd": float(_hamming(p_edge, t_edge)),
        },
        dtype=float,
    )


def directed_recovery(predicted: ArrayLike, edges: ArrayLike, n_permutations: int = 1000, seed: int = 0) -> pd.Series:
    """Scores of ``|predicted|`` [d, d] for the edges of a reference graph [d, d] (non-zero where j -> k), off the diagonal.

    ``auroc`` and ``auprc`` rank all ordered pairs; ``precision_at_k`` is the share of edges among the k highest, k the number of edges
    (of entries that tie for the last places, the expected share); ``direction`` and ``n_direction`` as in :func:`graph_scores`.

    Each has a p-value ``p_...``: the names of the nodes are permuted in the prediction, rows and columns together, and
    ``(1 + number of permutations that are as good or better) / (1 + n_permutations)``. That keeps hubs, symmetry and the distribution of
    sizes of the prediction, so that it asks whether the right nodes are connected; a prediction that is symmetric has p = 1 for
    ``direction``. With few nodes, few permutations differ (d! of them), and p-values of several scores are not independent.

    None of them sees signs. A reference graph is what is known, not what is true: an edge that is missing in it counts as wrong.

    Returns:
        A Series of floats: scores, ``k``, p-values. Without edges, or with all of them, undefined ones are nan, and so are their p-values.

    Raises:
        DataError: if the matrices are not square, finite and of one size.
    """
    p, t = _pair(predicted, edges)
    size, edge = np.abs(p), t != 0
    np.fill_diagonal(edge, False)
    observed = _recovery(size, edge, np.arange(len(p))[None]).iloc[0]
    single = edge & ~edge.T
    out = observed.to_dict() | {"n_direction": float(single.sum()), "k": float(edge.sum())}
    if n_permutations > 0:
        rng = np.random.default_rng(seed)
        orders = rng.permuted(np.tile(np.arange(len(p)), (n_permutations, 1)), axis=1)
        null = _recovery(size, edge, orders)
        better = (null >= observed - 1e-12).sum() + 1
        for name, value in observed.items():
            out[f"p_{name}"] = better[name] / (1 + n_permutations) if np.isfinite(value) else np.nan
    return pd.Series(out, dtype=float)


def shift_correlation(predicted: ArrayLike, truth: ArrayLike, targets: ArrayLike, others: bool = False) -> float:
    """Correlation of predicted and true mean shifts, over all genes of all perturbations of ``targets``.

    A unit shift of gene k's drift moves the mean of a linear system with drift matrix M by row k of ``-M^-1``. With targets that were not
    perturbed in training this says how well their effects are foretold, the sizes of the shifts being known.

    Args:
        predicted, truth: drift matrices M [d, d], diagonals included.
        targets: columns of the perturbed genes.
        others: leave out what a perturbation does to its own target, which is large and nearly always right.

    Returns:
        The correlation; nan without targets, for a singular matrix (condition number of 1e8 or more), or if one side is constant. Cannot
        see the scale of the prediction, nor whether it is stable.
    """
    p, t = _pair(predicted, truth)
    rows = np.atleast_1d(np.asarray(targets, dtype=int))
    if not len(rows) or not max(np.linalg.cond(p), np.linalg.cond(t)) < SINGULAR:
        return np.nan
    keep = np.arange(len(p)) != rows[:, None] if others else np.ones((len(rows), len(p)), dtype=bool)
    return _correlation(-np.linalg.inv(p)[rows][keep], -np.linalg.inv(t)[rows][keep])


def edge_matrix(edges: Iterable[tuple[str, str]], names: Sequence[str]) -> Mask:
    """A list of edges (cause, effect) as a matrix [d, d] in the order of ``names``.

    Raises:
        DataError: for a name that is not there, or an edge from a node to itself.
    """
    position = {str(name): i for i, name in enumerate(names)}
    out = np.zeros((len(position), len(position)), dtype=bool)
    for edge in edges:
        for name in edge:
            if name not in position:
                raise DataError(f"an edge with {name!r} was given, which is not a node{nearest(name, position)}")
        if edge[0] == edge[1]:
            raise DataError(f"an edge from {edge[0]!r} to itself was given; leave it out, because diagonals are not compared")
        out[position[edge[0]], position[edge[1]]] = True
    return out


def _pair(predicted: ArrayLike, truth: ArrayLike) -> tuple[Array, Array]:
    p, t = np.asarray(predicted, dtype=float), np.asarray(truth, dtype=float)
    if p.ndim != 2 or p.shape[0] != p.shape[1] or p.shape != t.shape or len(p) < 2:
        raise DataError(f"matrices of shapes {p.shape} and {t.shape} were given; give two square ones of the same nodes, at least two")
    off = ~np.eye(len(p), dtype=bool)
    if not (np.isfinite(p[off]).all() and np.isfinite(t[off]).all()):
        raise DataError("a matrix with entries that are not finite was given; set edges that were not estimated to 0")
    return p, t


def _area(low: Array, high: Array) -> float:
    """Probability that a draw of ``high`` is above one of ``low``, ties one half (Mann and Whitney)."""
    if not len(low) or not len(high):
        return np.nan
    rank = rankdata(np.concatenate([low, high]))[len(low) :].sum()
    return float((rank - len(high) * (len(high) + 1) / 2) / (len(low) * len(high)))


def _f1(true: Mask, called: Mask) -> float:
    total = int(true.sum() + called.sum())
    return 2 * int((true & called).sum()) / total if total else np.nan


def _mean(values: list[float]) -> float:
    defined = [v for v in values if not np.isnan(v)]
    return float(np.mean(defined)) if defined else np.nan


def _correlation(a: Array, b: Array) -> float:
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return np.nan
    return float(np.corrcoef(a, b)[0, 1])


def _direction(size: Array, edge: Mask) -> tuple[float, int]:
    cause, effect = np.nonzero(edge & ~edge.T)
    ahead = _ahead(size)[cause, effect]
    return (float(np.mean(0.5 * (1 + ahead))) if len(ahead) else np.nan), len(ahead)


def _ahead(size: Array) -> Array:
    """1 where an entry is larger than its mirror image, -1 where it is smaller, 0 where they differ by no more than rounding."""
    gap = size - size.T
    return np.where(np.abs(gap) > ROUNDING * np.max(size, initial=0.0), np.sign(gap), 0.0)


def _hamming(a: Mask, b: Mask) -> int:
    turned = (a & ~a.T & ~b & b.T).sum()  # each is found once, from the side where a has its edge
    off = ~np.eye(len(a), dtype=bool)
    return int(((a != b) & off).sum() - turned)


def _ranking(score: Array) -> tuple[Array, Array]:
    """Of every score [n], how many are as large or larger, and how many are larger."""
    return rankdata(-score, method="max"), rankdata(-score, method="min") - 1


def _average_precision(above: Array, positive: NDArray[np.int64]) -> Array:
    """Average precision [S] of S sets of positives [S, E], from how many entries are as large as each, [n]."""
    if positive.shape[1] == 0:
        return np.full(len(positive), np.nan)
    found = above[positive]
    return np.mean(rankdata(found, method="max", axis=1) / found, axis=1)


def _recovery(size: Array, edge: Mask, orders: NDArray[np.int64]) -> pd.DataFrame:
    """Scores of ``size[order][:, order]`` for every order [S, d]: a table of S rows."""
    d, off = len(size), ~np.eye(len(size), dtype=bool)
    above, larger = np.zeros(d * d), np.zeros(d * d)
    above[off.ravel()], larger[off.ravel()] = _ranking(size[off])
    cause, effect = np.nonzero(edge)
    k, n = len(cause), d * (d - 1)
    ahead = _ahead(size).ravel()
    one_way = (edge & ~edge.T)[cause, effect]
    share = np.clip((k - larger) / np.maximum(above - larger, 1), 0, 1)  # of the ties at an entry, what is within the first k
    columns: dict[str, list[Array]] = {"auroc": [], "auprc": [], "precision_at_k": [], "direction": []}
    step = max(1, CHUNK // max(k, 1))
    for start in range(0, len(orders), step):
        order = orders[start : start + step]
        at = order[:, cause] * d + order[:, effect]  # [S, E]
        undefined = np.full(len(order), np.nan)
        middle = n - (above[at] + larger[at] - 1) / 2  # mid-rank from below
        columns["auroc"].append((middle.sum(1) - k * (k + 1) / 2) / (k * (n - k)) if 0 < k < n else undefined)
        columns["auprc"].append(_average_precision(above, at))
        columns["precision_at_k"].append(share[at].mean(1) if k else undefined)
        columns["direction"].append(0.5 + 0.5 * ahead[at[:, one_way]].mean(1) if one_way.any() else undefined)
    return pd.DataFrame({name: np.concatenate(parts) for name, parts in columns.items()})
