"""Errors of predicted mean profiles: plain, weighted by differential expression, and corrected for sampling noise.

Profiles are rows, [..., n_genes]; the result has one value for each row. Whoever compares several perturbations stacks them, [P, n_genes].
Predicted and true profiles must be in one unit. A difference to one and the same reference changes none of the errors here
(``(x_hat - c) - (x - c) = x_hat - x``), so there is no second, "delta" version of them. A row with missing predictions (NaN) scores NaN.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp
from numpy.typing import ArrayLike, NDArray

from pyrocausal.errors import DataError

Array = NDArray[np.float64]
BULK_TARGET = 5e4  # counts of a pseudobulk profile
CHUNK = 64  # cells left out at a time


class Bulk(NamedTuple):
    """``value`` [P, n_genes], log-normalised pseudobulk profiles, and ``noise`` [P], the sum over genes of their sampling variances."""

    value: Array
    noise: Array


class CappedMSE(NamedTuple):
    """``value = sum numerator / sum denominator``, both [P]; ``rho``: the share of the claimed noise correction that was granted."""

    value: float
    numerator: Array
    denominator: Array
    rho: float


def mse(predicted: ArrayLike, true: ArrayLike) -> Array:
    """``1/G sum_g (x_hat_g - x_g)^2``.

    Noise floor: the sampling variance of ``x``, ``1/G sum_g s_g^2 / n``; a technical duplicate has about twice that. Cannot see: which
    genes are wrong. Most genes do not move, so the control or the perturbed mean is near the optimum on screens of weak effects.
    """
    p, t = _rows(predicted, true)
    return ((p - t) ** 2).mean(-1)


def rmse(predicted: ArrayLike, true: ArrayLike) -> Array:
    """``sqrt(mse)``, row by row (the PerturBench convention; the root of a mean over perturbations is another number). See :func:`mse`."""
    return np.sqrt(mse(predicted, true))


def mae(predicted: ArrayLike, true: ArrayLike) -> Array:
    """``1/G sum_g |x_hat_g - x_g|``; Virtual Cell Challenge 2025, on means of log1p-normalised cells.

    Noise floor: ``sqrt(2/pi)`` times the mean standard error. Cannot see: what :func:`mse` cannot; rewards predicting the median change, 0.
    """
    p, t = _rows(predicted, true)
    return np.abs(p - t).mean(-1)


def l2_heg(predicted: ArrayLike, true: ArrayLike, control: ArrayLike, k: int = 1000) -> Array:
    """``||x_hat - x||_2`` over the ``k`` genes of highest control mean (fewer if there are fewer).

    ``control`` [n_genes] comes from training cells. Source: Ahlmann-Eltze, Huber and Anders 2025 (Nat Methods 22:1657). Noise floor:
    ``sqrt(sum_g s_g^2 / n)``. Cannot see: genes that are silent in the control and come on; its scale is that of the normalisation.
    """
    p, t = _rows(predicted, true)
    genes = np.argsort(-np.asarray(control, dtype=float), kind="stable")[:k]
    return np.sqrt(((p - t)[..., genes] ** 2).sum(-1))


def de_weights(score: ArrayLike, exponent: float = 2.0) -> Array:
    """Weights of genes from a score of differential expression [..., n_genes], such as a t-statistic, summing to 1 in each row:

    ``w_g = m_g^e / sum m^e`` with ``m = (|t| - min |t|) / (max |t| - min |t|)``; equal weights if all scores are equal.

    A gene without a score (NaN) has weight 0; a row without any score has weights 0. The score decides everything: Mejia et al. test
    the perturbation against *all other perturbed cells*, which takes the shift that all perturbations share out of the weights. Fix the
    scores before predictions are seen. Source: Mejia et al. 2025 (arXiv 2506.22641), exponent 2; CellSimBench and scperteval also offer 1
    and 4.
    """
    size = np.abs(np.asarray(score, dtype=float))
    known = np.isfinite(size)
    low = np.min(size, axis=-1, keepdims=True, where=known, initial=np.inf)
    high = np.max(size, axis=-1, keepdims=True, where=known, initial=-np.inf)
    spread = np.where(high > low, high - low, 1.0)
    with np.errstate(invalid="ignore"):
        m = np.where(known, np.nan_to_num((size - low) / spread), 0.0) ** exponent
    flat = known.any(-1, keepdims=True) & (m.sum(-1, keepdims=True) <= 0)
    m = np.where(flat, 1.0, m)
    return m / np.maximum(m.sum(-1, keepdims=True), 1e-300)


def weighted_mse(predicted: ArrayLike, true: ArrayLike, weights: ArrayLike) -> Array:
    """``sum_g w_g (x_hat_g - x_g)^2``, ``weights`` [..., n_genes] of :func:`de_weights` (used as given, not normalised again).

    Source: Mejia et al. 2025, WMSE. Noise floor: ``sum_g w_g s_g^2 / n``; weights of the very cells that are scored favour genes whose
    error is large there. Cannot see: genes wrongly moved (their weight is near 0), so that false positives are free.
    """
    p, t = _rows(predicted, true)
    return (np.asarray(weights, dtype=float) * (p - t) ** 2).sum(-1)


def weighted_r2(predicted: ArrayLike, true: ArrayLike, reference: ArrayLike, weights: ArrayLike) -> Array:
    """``1 - sum_g w_g (d_hat_g - d_g)^2 / sum_g w_g (d_g - m)^2`` of the changes ``d = x - reference``, ``m = sum w d / sum w``.

    1 is perfect, without a lower bound; ``reference`` [n_genes] (or [..., n_genes]) is part of the definition: the mean of the perturbed
    training profiles (``R2_w(delta)`` of Mejia et al. 2025) or of control cells. Without weight: NaN. True changes that do not vary: 1 if
    met exactly, else 0, as ``sklearn.metrics.r2_score`` has it. Noise floor: that of :func:`weighted_mse` over the weighted variance of the
    true changes. Cannot see: what its weights leave out; of a single gene, anything.
    """
    p, t = _rows(predicted, true)
    d, w = t - np.asarray(reference, dtype=float), np.broadcast_to(np.asarray(weights, dtype=float), t.shape)
    total = w.sum(-1)
    residual = (w * (p - t) ** 2).sum(-1)
    centre = (w * d).sum(-1, keepdims=True) / np.where(total > 0, total, 1.0)[..., None]
    spread = (w * (d - centre) ** 2).sum(-1)
    value = np.where(spread > 0, 1 - residual / np.where(spread > 0, spread, 1.0), np.where(residual == 0, 1.0, 0.0))
    return np.where((total > 0) & np.isfinite(residual), value, np.nan)


def bulk_lognorm(cells: Sequence[ArrayLike], target: float = BULK_TARGET) -> Bulk:
    """Pseudobulk profiles of counts and their sampling noise, for P groups of cells, each [n_p, n_genes] (dense or sparse).

    ``b_g = log(1 + T S_g / sum_g S_g)`` with ``S_g`` the counts of gene g summed over cells; ``noise = (n-1)/n sum_g sum_i (v_ig -
    v_g)^2``, the delete-one-cell jackknife, ``v_ig`` being ``b_g`` without cell i and ``v_g`` its mean over i; 0 for a single cell. Group
    sums make ``b`` a function of the mean alone: means of log1p of cells, which everyone else takes, also reward the right dispersion. The
    jackknife is biased upwards: by .3 % for 400 cells of 20,000 counts, far more where T is large against the counts of a group (then even
    a replicate can be below 0, or no effect be left: give a smaller T). Source: cell-eval2 (vcc2026); a group without counts has profile
    and noise 0.
    """
    value, noise = zip(*(_bulk(x, target) for x in cells), strict=True) if len(cells) else ((), ())
    return Bulk(np.array(value, dtype=float), np.array(noise, dtype=float))


def capped_mse(predicted: Bulk, true: Bulk, control: Bulk, own: ArrayLike | None = None) -> CappedMSE:
    """Squared error over the squared effect, both freed of sampling noise: 0 is perfect, 1 is as good as the control, whatever the depth.

    ``value = sum_p N_p / sum_p D_p``, ``N_p = (||b_hat_p - b_p||^2 - rho min(C_hat_p, C_p) - C_p) / G_p``,
    ``D_p = (||b_p - b_0||^2 - C_p - C_0) / G_p``, with profiles b and noise C of :func:`bulk_lognorm` and control ``b_0`` (one row).
    ``rho = min(1, B / sum_p min(C_hat_p, C_p) / G_p)``: the correction that a prediction claims is at most what its own profiles vary by,
    ``B = sum_g sum_p (b_hat_pg - mean_p b_hat_pg)^2 / G_p`` (``1/G_p`` also weighs that mean), so that scatter among predicted cells that
    cancels in their sum earns nothing.

    Args:
        own: targeted genes, as for :func:`kept_genes`; left out of distances (``G_p = G - 1``) and of B, not of the noises (their share is
            negligible, and cell-eval2 does the same).

    Source: cell-eval2 0.20, ``expr_mse_unbiased_capped_norm`` (rule 3). NaN where no effect is left in the truth (sum of D not positive).
    Noise floor: a perfect prediction scores 0 in expectation and may be below. Cannot see: which perturbation an error belongs to, as
    strong perturbations dominate both sums; shape or spread of the cells.
    """
    b_hat, b, b_0 = (np.asarray(side.value, dtype=float) for side in (predicted, true, control))
    if b_hat.shape != b.shape or b_0.shape != (1, b.shape[1]):
        raise DataError(
            f"profiles of shapes {b_hat.shape}, {b.shape} and {b_0.shape} were given; give [P, G], [P, G] and one control, [1, G]"
        )
    n_genes = b.shape[1]
    kept = kept_genes(own, *b.shape)
    size = kept.sum(1).astype(float)
    weight = np.divide(1.0, size, out=np.zeros_like(size), where=size > 0)
    granted = np.minimum(predicted.noise, true.noise)
    claim, rho = float(granted @ weight), 1.0
    if claim > 0:
        rho = min(1.0, _spread(b_hat, kept, weight) / claim)
    with np.errstate(invalid="ignore", divide="ignore"):
        numerator = (((b_hat - b) ** 2 * kept).sum(1) - rho * granted - true.noise) / size
        denominator = (((b - b_0) ** 2 * kept).sum(1) - true.noise - control.noise[0]) / size
    if n_genes == 0:
        numerator = denominator = np.full(len(b), np.nan)
    total = np.nansum(denominator)
    return CappedMSE(float(np.nansum(numerator) / total) if total > 0 else np.nan, numerator, denominator, rho)


def kept_genes(own: ArrayLike | None, n_rows: int, n_genes: int) -> NDArray[np.bool_]:
    """Mask [P, n_genes], False at the genes that each perturbation targets.

    ``own``: the column of the targeted gene of each perturbation [P], -1 where it is not among the genes, or a mask [P, n_genes] (of
    combinations, several).
    """
    kept = np.ones((n_rows, n_genes), dtype=bool)
    if own is None:
        return kept
    given = np.asarray(own)
    if given.dtype == bool and given.shape == kept.shape:
        return ~given
    if given.shape != (n_rows,) or not np.issubdtype(given.dtype, np.integer) or (given < -1).any() or (given >= n_genes).any():
        raise DataError(f"own={own!r} was given; give the column of the targeted gene of each of {n_rows} perturbations, -1 for none")
    kept[np.flatnonzero(given >= 0), given[given >= 0]] = False
    return kept


def dense(cells: Any) -> Array:
    """Cells as floats, whether they were sparse or not."""
    return np.asarray(cells.toarray() if sp.issparse(cells) else cells, dtype=float)


def _rows(predicted: ArrayLike, true: ArrayLike) -> tuple[Array, Array]:
    p, t = np.asarray(predicted, dtype=float), np.asarray(true, dtype=float)
    if p.shape != t.shape or p.ndim < 1 or p.shape[-1] == 0:
        raise DataError(f"profiles of shapes {p.shape} and {t.shape} were given; give the same perturbations and genes, [..., n_genes]")
    return p, t


def _bulk(cells: ArrayLike, target: float) -> tuple[Array, float]:
    x: Any = sp.csr_matrix(cells) if sp.issparse(cells) else np.asarray(cells, dtype=float)
    if x.ndim != 2 or x.shape[0] == 0 or x.min() < 0:
        raise DataError(f"cells of shape {x.shape} were given; give counts, [n_cells, n_genes], at least one cell, none below 0")
    n = x.shape[0]
    counts, library = np.asarray(x.sum(0), dtype=float).ravel(), np.asarray(x.sum(1), dtype=float).ravel()
    whole = counts.sum()
    if whole <= 0:
        return np.zeros(x.shape[1]), 0.0
    value = np.log1p(target * counts / whole)
    if n < 2:
        return value, 0.0
    total, squares = np.zeros_like(value), np.zeros_like(value)
    for start in range(0, n, CHUNK):
        part = x[start : start + CHUNK]
        left = (whole - library[start : start + CHUNK])[:, None]
        without = np.where(left > 0, np.log1p(target * (counts - dense(part)) / np.where(left > 0, left, 1.0)), 0.0) - value
        total += without.sum(0)
        squares += (without**2).sum(0)
    return value, max((n - 1) / n * float((squares - total**2 / n).sum()), 0.0)


def _spread(b: Array, kept: NDArray[np.bool_], weight: Array) -> float:
    """``sum_g sum_p w_p (b_pg - mean_g)^2`` over the kept entries, of genes with two or more."""
    w = kept * weight[:, None]
    total = w.sum(0)
    usable = (kept.sum(0) >= 2) & (total > 0)
    centre = (w * b).sum(0) / np.where(usable, total, 1.0)
    return float((w * (b - centre) ** 2)[:, usable].sum())
