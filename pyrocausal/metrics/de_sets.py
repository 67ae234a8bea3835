"""Sets of differentially expressed genes, predicted against true: overlap, direction, size, and how deep a ranking stays right.

A :class:`DETable` holds what a test said of every perturbation and gene; :func:`wilcoxon_de` makes one from cells, and any other test can.
Predicted tables need predicted *cells*: their variance decides what is called, so that means alone cannot be scored, and a model that
predicts too little variance calls everything. All results are [P], one for each perturbation.

Cell-level tests take cells for replicates. How many genes are called depends on the number of cells: equalise it before comparing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from pyrocausal.errors import DataError
from pyrocausal.graph_metrics import _average_precision, _ranking
from pyrocausal.metrics.delta import _correlation
from pyrocausal.metrics.means import Array, dense, kept_genes

Mask = NDArray[np.bool_]
EPSILON = 1e-9  # added to mean counts per million before their logarithm
PURITY = 0.9


@dataclass(frozen=True)
class DETable:
    """``lfc``: log2 fold changes; ``p_value`` and ``p_adjusted`` (within each perturbation), all [P, n_genes]; NaN: not tested, or
    unknown.
    """

    lfc: Array
    p_value: Array
    p_adjusted: Array

    def __post_init__(self) -> None:
        shapes = {np.shape(a) for a in (self.lfc, self.p_value, self.p_adjusted)}
        if len(shapes) > 1 or len(next(iter(shapes))) != 2:
            raise DataError(f"tables of shapes {sorted(shapes)} were given; give lfc, p_value and p_adjusted, [P, n_genes] each")

    def called(self, level: float = 0.05) -> Mask:
        """Genes with ``p_adjusted < level`` and a fold change that is a number, [P, n_genes]."""
        return (self.p_adjusted < level) & ~np.isnan(self.lfc)


def wilcoxon_de(cells: Sequence[ArrayLike], control: ArrayLike, min_control: float = 5.0) -> DETable:
    """Wilcoxon's rank-sum test of counts per million, cells of each perturbation against control cells, gene by gene.

    Normal approximation with ties and continuity corrected (as in scipy's ``mannwhitneyu``); ``lfc = log2((m_p + 1e-9) / (m_0 + 1e-9))`` of
    mean counts per million. Genes with ``m_0 <= min_control`` are not tested (NaN): the rule reads control cells only, because one that
    read perturbed cells would leak the sign. Benjamini and Hochberg within each perturbation.

    Args:
        cells: counts of each of P perturbations, [n_p, n_genes].
        control: counts of control cells [n_0, n_genes]; those of the *true* screen on both sides.

    Source: cell-eval2 (vcc2026). Cells of equal proportions tie; the arithmetic of its pdex engine breaks some of these ties, which moved
    p-values by up to .007 for 10 cells against 40. Cannot see: guides and batches, in which the cells of a perturbation are alike.
    """
    base = _cpm(control)
    m_0 = base.mean(0)
    tested = m_0 > min_control
    lfc, p = np.full((2, len(cells), base.shape[1]), np.nan)
    for row, x in enumerate(cells):
        target = _cpm(x)
        lfc[row] = np.where(tested, np.log2((target.mean(0) + EPSILON) / (m_0 + EPSILON)), np.nan)
        if tested.any():
            found = stats.mannwhitneyu(target[:, tested], base[:, tested], axis=0, method="asymptotic").pvalue
            p[row, tested] = np.where(np.isnan(found), 1.0, found)
    return DETable(lfc, p, adjust(p))


def adjust(p_value: ArrayLike) -> Array:
    """Benjamini-Hochberg adjusted p-values over the last axis; NaN are not counted and stay."""
    p = np.asarray(p_value, dtype=float)
    known = np.isfinite(p)
    n = known.sum(-1, keepdims=True)
    order = np.argsort(np.where(known, p, np.inf), axis=-1, kind="stable")
    rank = np.arange(1, p.shape[-1] + 1)
    scaled = np.take_along_axis(np.where(known, p, np.inf), order, -1) * np.maximum(n, 1) / rank
    least = np.minimum.accumulate(scaled[..., ::-1], axis=-1)[..., ::-1]
    out = np.empty_like(p)
    np.put_along_axis(out, order, np.minimum(least, 1.0), -1)
    return np.where(known, out, np.nan)


def overlap_at_n(predicted: DETable, true: DETable, level: float = 0.05, k: int | None = None, precision: bool = False) -> Array:
    """``|top_n(predicted) and top_n(true)| / n``, genes called on each side in order of ``|lfc|``, n the number truly called (at most
    ``k``).

    ``precision=True``: n is the number called by the prediction. 0 where n is 0. Of equal ``|lfc|``, the lower column is first. Source: the
    DES of Virtual Cell Challenge 2025 (cell-eval ``overlap_at_N``). Noise floor: that of a duplicate, well below 1. Cannot see: signs;
    false calls of small fold change, so inflated variance and scale raise it (2025's exploit); chance, n / n_genes where everything is
    called.
    """
    sides = [(t.called(level), np.abs(t.lfc)) for t in (predicted, true)]
    ranks = [_order(mask, size) for mask, size in sides]
    n = sides[0 if precision else 1][0].sum(1)
    n = n if k is None else np.minimum(n, k)
    both = (ranks[0] < n[:, None]) & (ranks[1] < n[:, None])
    return np.where(n > 0, both.sum(1) / np.maximum(n, 1), 0.0)


def sig_recall(predicted: DETable, true: DETable, level: float = 0.05) -> Array:
    """``|R and R_hat| / |R|`` of the called sets; NaN where R is empty.

    Source: cell-eval ``de_sig_genes_recall``. Noise floor: that of a duplicate, the power of the test. Cannot see: false calls; calling
    every gene has recall 1, so stand :func:`sig_jaccard` beside it.
    """
    r_hat, r = predicted.called(level), true.called(level)
    return _ratio((r & r_hat).sum(1), r.sum(1))


def sig_jaccard(predicted: DETable, true: DETable, own: ArrayLike | None = None, level: float = 0.05) -> Array:
    """``|R and R_hat| / |R or R_hat|`` of the called sets, 1 where both are empty.

    ``own``: targeted genes (:func:`~pyrocausal.metrics.means.kept_genes`), left out on both sides. Source: cell-eval2 ``de_sig_jaccard``.
    Noise
    floor: a duplicate of 400 cells has about .4. Cannot see: signs and sizes; the nearness of a gene to the threshold.
    """
    kept = kept_genes(own, *true.lfc.shape)
    r_hat, r = predicted.called(level) & kept, true.called(level) & kept
    union = (r | r_hat).sum(1)
    return np.where(union > 0, (r & r_hat).sum(1) / np.maximum(union, 1), 1.0)


def lfc_nmae(predicted: DETable, true: DETable, own: ArrayLike | None = None, level: float = 0.05, min_genes: int = 10) -> Array:
    """``sum_S |l_hat - l| / sum_S |l|`` over the truly called genes S: 0 is perfect, 1 predicts no change.

    NaN where ``|S| < min_genes``: a matter of the truth alone. A predicted fold change that is no number counts as 0. ``own`` as in
    :func:`sig_jaccard`. Source: cell-eval2 ``de_lfc_nmae``. Noise floor: about .4 for 400 cells. Cannot see: false positives.
    """
    s = true.called(level) & np.isfinite(true.lfc) & kept_genes(own, *true.lfc.shape)
    l_hat = np.where(np.isfinite(predicted.lfc), predicted.lfc, 0.0)
    size = np.where(s, np.abs(true.lfc), 0.0).sum(1)
    error = np.where(s, np.abs(l_hat - np.where(s, true.lfc, 0.0)), 0.0).sum(1)
    return np.where(s.sum(1) >= min_genes, _ratio(error, size), np.nan)


def direction_match(predicted: DETable, true: DETable, level: float = 0.05) -> Array:
    """Share of the truly called genes whose predicted fold change has the true sign; NaN where none is called.

    Source: cell-eval ``de_direction_match``. Noise floor: near 1 for a duplicate. Cannot see: unchanged genes. A shift that all
    perturbations share gets most signs right: in SCCVAE's own tables a random graph wins by this score.
    """
    s = true.called(level)
    return _ratio((s & (np.sign(predicted.lfc) == np.sign(true.lfc))).sum(1), s.sum(1))


def direction_fidelity(predicted: DETable, true: DETable, own: ArrayLike | None = None, level: float = 0.05) -> Array:
    """``F = k / max(n_hat, n)``: n genes truly called, n_hat called by the prediction *and* judged by the truth (fold change not 0 or
    unknown), k of those with the true sign. NaN where both are 0.

    Calling more than the truth costs as much as calling less. ``own`` as in :func:`sig_jaccard`. Source: cell-eval2
    ``direction_fidelity_yield_raw``. Chance: signs at random have .5 at ``n_hat = n``, whichever genes are called; noise floor: about .8
    for a duplicate of 400 cells. Cannot see: which genes are called, sizes.
    """
    kept = kept_genes(own, *true.lfc.shape)
    judged = _directed(true.lfc)
    scored = predicted.called(level) & judged & kept
    match = scored & _directed(predicted.lfc) & (np.sign(predicted.lfc) == np.sign(true.lfc))
    n = (true.called(level) & kept).sum(1)
    return _ratio(match.sum(1), np.maximum(scored.sum(1), n))


def direction_reach(predicted: DETable, true: DETable, own: ArrayLike | None = None, level: float = 0.05, purity: float = PURITY) -> Array:
    """``R = k* / n``: the n truly called genes in the prediction's own order (its calls first, then by adjusted p-value, p-value,
    ``|lfc|``), ``k* = max{k: at least a share of purity of the first k signs is right}``. NaN where n is 0.

    Genes without a true sign neither count nor deepen k; a predicted fold change of 0 or unknown is a miss. ``own`` as in
    :func:`sig_jaccard`. Of equals, the lower column is first (cell-eval2: the name). Source: cell-eval2 ``direction_reach_raw``. Chance:
    about 1/n (one right guess); noise floor: near 1. Cannot see: genes that are wrongly called.
    """
    s = true.called(level) & kept_genes(own, *true.lfc.shape)
    call = predicted.p_adjusted < level
    keys = (
        -np.nan_to_num(np.abs(predicted.lfc), nan=-np.inf, posinf=np.inf),
        np.nan_to_num(predicted.p_value, nan=np.inf, posinf=np.inf),
        np.nan_to_num(predicted.p_adjusted, nan=np.inf, posinf=np.inf),
        ~call,
        ~s,
    )
    order = np.lexsort(keys, axis=-1)
    judged = s & _directed(true.lfc)
    match = judged & _directed(predicted.lfc) & (np.sign(predicted.lfc) == np.sign(true.lfc))
    depth = np.cumsum(np.take_along_axis(judged, order, -1), axis=1)
    right = np.cumsum(np.take_along_axis(match, order, -1), axis=1)
    pure = (depth > 0) & (right / np.maximum(depth, 1) >= purity)
    return _ratio(np.where(pure, depth, 0).max(1, initial=0), s.sum(1))


def de_auprc(score: ArrayLike, true: DETable, level: float = 0.05) -> Array:
    """Average precision of ``score`` [P, n_genes] (``-log10 p_adjusted``, a size, ...) for the genes truly called; NaN where none or all
    are.

    Ties are called together. An unknown score is the lowest. Source: scperteval ``de_auprc``, cell-eval ``pr_auc`` (which first lifts
    adjusted p-values to 1e-10). Chance: the share of called genes. Noise floor: at 100 cells even a duplicate hardly beats that. Cannot
    see: signs.
    """
    value = np.asarray(score, dtype=float)
    if value.shape != true.lfc.shape:
        raise DataError(f"scores of shape {value.shape} for tables of shape {true.lfc.shape} were given; give a score for every gene")
    value = np.where(np.isnan(value), -np.inf, value)
    called, tested = true.called(level), ~np.isnan(true.p_adjusted)
    out = np.full(len(value), np.nan)
    for row in np.flatnonzero(called.any(1) & (called.sum(1) < tested.sum(1))):
        label = called[row, tested[row]]
        above = _ranking(value[row, tested[row]])[0]
        out[row] = _average_precision(above, np.flatnonzero(label)[None])[0]
    return out


def lfc_spearman(predicted: DETable, true: DETable, level: float = 0.05) -> Array:
    """Rank correlation of fold changes over the truly called genes, unknown predictions as 0; NaN for fewer than two, or a constant side.

    Source: cell-eval ``de_spearman_lfc_sig``. Noise floor: reliability of the fold changes. Cannot see: scale; genes not called.
    """
    s = true.called(level)
    l_hat = np.where(np.isnan(predicted.lfc), 0.0, predicted.lfc)
    a, b = (stats.rankdata(np.where(s, x, np.nan), axis=-1, nan_policy="omit") for x in (l_hat, true.lfc))
    return _correlation(np.where(s, a, 0.0), np.where(s, b, 0.0), s.astype(float))


def _cpm(cells: ArrayLike) -> Array:
    x = dense(cells)
    if x.ndim != 2 or not len(x):
        raise DataError(f"cells of shape {x.shape} were given; give counts, [n_cells, n_genes], at least one cell")
    library = x.sum(1, keepdims=True).astype(float)
    return 1e6 * x / np.where(library > 0, library, 1.0)


def _directed(lfc: Array) -> Mask:
    return ~np.isnan(lfc) & (lfc != 0)


def _order(mask: Mask, size: Array) -> NDArray[np.int64]:
    """Place of each masked gene in the descending order of size in its row, n_genes for the others."""
    key = np.where(mask, -np.nan_to_num(size, nan=-1.0, posinf=np.inf), np.inf)
    place = np.argsort(np.lexsort((key, ~mask), axis=-1), axis=-1, kind="stable")
    return np.where(mask, place, mask.shape[1])


def _ratio(a: ArrayLike, b: ArrayLike) -> Array:
    top, bottom = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    return np.where(bottom > 0, top / np.where(bottom > 0, bottom, 1.0), np.nan)
