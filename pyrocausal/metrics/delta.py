"""Agreement of predicted and true changes, without regard to their size: correlations with a stated reference, and the cosine.

Rows are perturbations, [..., n_genes], as in :mod:`pyrocausal.metrics.means`. There is no default reference, because it decides what is
measured: against *control*, every perturbed profile shares a shift (stress, selection, the vector), and predicting that alone correlates
well; against the *perturbed mean*, the average of the training centroids, only what is particular to a perturbation counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import rankdata

from pyrocausal.errors import DataError, nearest
from pyrocausal.metrics.means import Array, _rows

Method = Literal["pearson", "spearman"]
CONSTANT = 1e-13  # spread over size below which a row is constant but for rounding


def perturbed_mean(profiles: ArrayLike, groups: Sequence[object] | None = None) -> Array:
    """The reference of Systema: mean of the centroids of the *training* perturbations [P, n_genes], each with equal weight, [n_genes].

    ``groups`` names the perturbation of each row where rows are cells: first the mean of each, then of those. A mean over cells instead
    weighs perturbations by how many cells they happen to have. Source: Vinas Torne et al. 2025 (Systema, Nat Biotechnol).
    """
    x = np.asarray(profiles, dtype=float)
    if groups is None:
        return x.mean(0)
    _, codes, n = np.unique(np.asarray(groups, dtype=str), return_inverse=True, return_counts=True)
    total = np.zeros((len(n), x.shape[1]))
    np.add.at(total, codes, x)
    return (total / n[:, None]).mean(0)


def top_genes(score: ArrayLike, k: int) -> NDArray[np.bool_]:
    """Mask [..., n_genes] of the ``k`` genes of largest ``|score|`` in each row; of ties, those of lower column; all of them if k >=
    n_genes.

    Scores of the cells that are scored select genes whose noise is large there (winner's curse): take them from training or declare them.
    """
    size = -np.nan_to_num(np.abs(np.asarray(score, dtype=float)), nan=-1.0)
    rank = np.argsort(np.argsort(size, axis=-1, kind="stable"), axis=-1, kind="stable")
    return rank < k


def delta_correlation(
    predicted: ArrayLike, true: ArrayLike, reference: ArrayLike, weights: ArrayLike | None = None, method: Method = "pearson"
) -> Array:
    """Correlation over genes of ``x_hat - reference`` with ``x - reference``, one for each row.

    Args:
        reference: [n_genes] or [..., n_genes]: control, or :func:`perturbed_mean`.
        weights: [..., n_genes], at least 0: a mask of :func:`top_genes` or of declared genes, or
            :func:`~pyrocausal.metrics.means.de_weights` for the weighted correlation ``cov_w(a, b) / sqrt(cov_w(a, a) cov_w(b, b))``.
        method: ``"pearson"``, or ``"spearman"``: the same of mid-ranks (of the genes with weight; weights can only be a mask then).

    NaN where a side is constant: the control itself, or the perturbed mean when that is the reference. (cell-eval2 scores these -1,
    scipy NaN.) Source: GEARS, Systema, cell-eval ``pearson_delta``. Noise floor: the reliability of the truth; a technical duplicate of
    reliability r has correlation r, a perfect prediction ``sqrt(r)``. Cannot see: scale, ``0.01 delta`` is perfect; so stand an error
    beside it.
    """
    if method not in get_args(Method):
        raise DataError(f"there is no correlation {method!r}{nearest(str(method), get_args(Method))}")
    p, t = _rows(predicted, true)
    c = np.asarray(reference, dtype=float)
    a, b = p - c, t - c
    w = np.ones_like(a) if weights is None else np.broadcast_to(np.asarray(weights, dtype=float), a.shape)
    if (w < 0).any():
        raise DataError(f"a weight of {w.min():g} was given; give weights of at least 0")
    if method == "spearman":
        if not np.isin(w, (0.0, 1.0)).all():
            raise DataError("weights that are no mask were given for a rank correlation; give 0 and 1, or method='pearson'")
        a, b = (rankdata(np.where(w > 0, x, np.nan), axis=-1, nan_policy="omit") for x in (a, b))
        missing = ~np.isfinite(p).all(-1)
        return np.where(missing, np.nan, _correlation(np.where(w > 0, a, 0.0), np.where(w > 0, b, 0.0), w))
    return _correlation(a, b, w)


def cosine(predicted: ArrayLike, true: ArrayLike, reference: ArrayLike) -> Array:
    """``<d_hat, d> / (||d_hat|| ||d||)`` of the changes from ``reference`` (PerturBench's "cosine logFC": control); 0 for a prediction of
    no change.

    NaN where the truth has no change. Noise floor and blindness: those of :func:`delta_correlation`, but a shift common to all genes
    counts.
    """
    p, t = _rows(predicted, true)
    c = np.asarray(reference, dtype=float)
    a, b = p - c, t - c
    size, known = np.linalg.norm(a, axis=-1), np.linalg.norm(b, axis=-1)
    value = (a * b).sum(-1) / np.where((size > 0) & (known > 0), size * known, 1.0)
    return np.where(known > 0, value, np.nan)


def pooled_correlation(predicted: ArrayLike, true: ArrayLike, reference: ArrayLike, weights: ArrayLike | None = None) -> float:
    """One Pearson correlation over all entries (perturbation x gene) of the changes from ``reference``: the average-treatment-effect
    correlation of SAMS-VAE.

    There, effects are differences of mean ``log2(1 + 1e4 x / sum x)``, and the top-20 form takes the 20 genes of each row
    (``weights=top_genes(score, 20)``) before pooling. Source: Bereket and Karaletsos 2023 (arXiv 2311.02794). Noise floor: as in
    :func:`delta_correlation`. Cannot see: weak perturbations, for the strong ones hold nearly all the variance; scale.
    """
    p, t = _rows(predicted, true)
    w = np.ones_like(p) if weights is None else np.broadcast_to(np.asarray(weights, dtype=float), p.shape)
    c = np.broadcast_to(np.asarray(reference, dtype=float), p.shape)
    return float(_correlation((p - c).ravel(), (t - c).ravel(), w.ravel()))


def _correlation(a: Array, b: Array, w: Array) -> Array:
    """Weighted Pearson correlation along the last axis, NaN where a side is constant or missing."""
    total = w.sum(-1, keepdims=True)
    share = w / np.where(total > 0, total, 1.0)
    a0, b0 = (np.where(share > 0, x - (share * np.where(share > 0, x, 0.0)).sum(-1, keepdims=True), 0.0) for x in (a, b))
    va, vb = ((share * x**2).sum(-1) for x in (a0, b0))
    flat = [v <= (CONSTANT * np.sqrt((share * np.where(share > 0, x, 0.0) ** 2).sum(-1))) ** 2 for v, x in ((va, a), (vb, b))]
    undefined = flat[0] | flat[1]
    value = (share * a0 * b0).sum(-1) / np.where(undefined, 1.0, np.sqrt(va) * np.sqrt(vb))
    return np.where(undefined, np.nan, np.clip(value, -1.0, 1.0))
