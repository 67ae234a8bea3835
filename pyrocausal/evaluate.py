"""Metrics, measured effects of a real screen, and the baselines that every model has to beat.

With the truth of a simulated screen: :func:`mcc`, :func:`linear_r2` and :func:`dci` compare latents, :func:`mask_scores` targets;
:func:`fast_ica` is the label-free baseline. With held-out cells: :func:`measured_effects` says what was seen and how surely,
:func:`baseline_effects` what needs no model, and :func:`score_effects` compares any prediction with it; :func:`split_half` is the noise.

Every metric of :mod:`pyrocausal.metrics` is here by its name: errors of means, correlations of changes, retrieval ranks, sets of
differentially expressed genes, distances between samples of cells, intervals and draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import scipy.sparse as sp
import xarray as xr
from numpy.typing import NDArray
from scipy import stats

from pyrocausal.data import PerturbationData
from pyrocausal.errors import DataError, nearest
from pyrocausal.metrics import *  # noqa: F403
from pyrocausal.splits import halves

Array = NDArray[np.float64]
BASELINES = ("control", "mean", "additive", "train")


def measured_effects(data: PerturbationData, reference: str = "control") -> xr.Dataset:
    """What the cells of each condition show against those of a reference, gene by gene.

    Counts: ``effect = log1p(1e4 r_c) - log1p(1e4 r_0)`` with ``r = mean_i x_i / l_i`` over the cells of a condition, what
    :func:`pyrocausal.effects` says of a population; normalised data: difference of means. ``se`` is that of the mean (delta method),
    ``var r = sum_i (x_i / l_i - r)^2 / (n (n-1))`` with at least one count's error; ``p_value`` is of the two-sided Welch test, and for
    counts not below that of the conditional binomial test of the sums of counts at the sums of libraries, which keeps genes with a
    handful of counts honest: of Poisson counts at one rate it is exact, whatever the depths of the cells.

    The sum of the counts over the sum of the libraries is another quantity, that of the deep cells, wherever composition goes with depth.

    Args:
        reference: label of the condition to compare with; ``"control"`` is the screen's control, whatever its label.

    Returns:
        Dataset: ``effect``, ``se``, ``p_value`` (intervention, gene) and ``n_cells`` (intervention); a condition of one cell has no
        ``se``. Cannot see: batches, guides (cells are taken as replicates), changes of variance or shape; and in ``effect`` a count in a
        cell far shallower than the others weighs as many of theirs.
    """
    reference = data.control if reference == "control" else reference
    rows = pd.Series(np.arange(len(data))).groupby(np.asarray(data.labels, dtype=str)).indices
    others = [c for c in data.conditions if c != reference]
    if reference not in rows or not others:
        raise DataError(f"measured effects compare conditions with {reference!r}, but the cells are of {len(rows)}: {', '.join(rows)[:80]}")
    base, each = _totals(data, rows[reference]), [_totals(data, rows[c]) for c in others]
    tables = {
        "effect": [c.value - base.value for c in each],
        "se": [np.sqrt(c.variance + base.variance) for c in each],
        "p_value": [_p_value(c, base, data.kind == "counts") for c in each],
    }
    return xr.Dataset(
        {k: (("intervention", "gene"), np.stack(v)) for k, v in tables.items()} | {"n_cells": ("intervention", [c.n for c in each])},
        coords={"intervention": others, "gene": list(data.genes)},
        attrs={"unit": "log1p_cp10k" if data.kind == "counts" else "data", "rung": "measured", "reference": reference},
    )


def de_genes(measured: xr.Dataset, fdr: float = 0.05) -> xr.DataArray:
    """Genes that measurably change, (intervention, gene) bool: Benjamini-Hochberg at ``fdr`` over the genes of each intervention.

    Cannot see: how large a change is; more cells find more genes. Without a p-value: not found.
    """
    p = measured["p_value"].transpose("intervention", "gene")
    adjusted = stats.false_discovery_control(np.nan_to_num(p.to_numpy(), nan=1.0), axis=1, method="bh")
    return p.copy(data=adjusted <= fdr).rename("de")


def baseline_effects(train: PerturbationData, interventions: Sequence[str], kind: str) -> xr.Dataset:
    """Effects that need no model, ``effect`` (intervention, gene), NaN where the baseline has no answer.

    Args:
        train: training cells.
        interventions: labels; combinations as in the screen, in any order of their parts.
        kind: ``"control"``: zero. ``"mean"``: mean of the measured effects of all training conditions, each with equal weight.
            ``"additive"``: sum of the measured effects of the parts (of a single: its own). ``"train"``: the measured effect of that
            very condition in the training cells.
    """
    if kind not in BASELINES:
        raise DataError(f"there is no baseline {kind!r}{nearest(kind, BASELINES)}")
    measured = measured_effects(train)
    labels = [frozenset(str(c).split(train.separator)) for c in measured["intervention"].values]
    known = dict(zip(labels, measured["effect"].values, strict=True))
    unknown = np.full(len(measured["gene"]), np.nan)
    effect = np.zeros((len(interventions), len(unknown)))
    for row, label in zip(effect, interventions, strict=True):
        parts = [p for p in label.split(train.separator) if p != train.control]
        if kind == "mean":
            row[:] = measured["effect"].mean("intervention")
        elif kind == "train":
            row[:] = known.get(frozenset(parts), unknown)
        elif kind == "additive":
            row[:] = sum(known.get(frozenset([p]), unknown) for p in parts)
    coords = {"intervention": list(interventions), "gene": measured["gene"].values}
    return xr.Dataset({"effect": (("intervention", "gene"), effect)}, coords=coords, attrs={**measured.attrs, "rung": f"baseline {kind}"})


def score_effects(predicted: xr.Dataset, measured: xr.Dataset, genes: Sequence[str] | None = None, level: float = 0.9) -> pd.DataFrame:
    """Predicted against measured effects, a row for each intervention that both have, over the genes that both have.

    With prediction p (the mean over draws, if there are any) and measured m: ``pearson``; ``mse = mean (p - m)^2``;
    ``relative_l2 = ||p - m|| / ||m||`` (1: as good as no effect); ``direction``: share of the measurably changed genes
    (:func:`de_genes`, ``n_de`` of them) whose sign is right; ``coverage``: share of genes whose m lies in the interval.

    Args:
        predicted: of :func:`pyrocausal.effects`, :func:`baseline_effects` or :func:`measured_effects`: ``effect`` (intervention, [draw,]
            gene). The interval is ``lower``/``upper`` as given; else, of draws, the central one of ``level``, widened in quadrature by
            the error of m (a measurement scatters even about the right answer).
        genes: names to restrict to; the measurably changed ones are found among all genes.

    Cannot see: pearson the size of the prediction, mse and relative_l2 whether an error is sampling noise (compare :func:`split_half`),
    direction anything about unchanged genes, coverage an interval that is too wide. Genes of one intervention are not independent.
    """
    units = {d.attrs["unit"] for d in (predicted, measured) if "unit" in d.attrs}
    if len(units) > 1:
        raise DataError(f"predicted and measured effects are in different units, {' and '.join(sorted(units))}; ask both in one")
    if genes is not None and (unknown := [g for g in genes if g not in measured["gene"].values]):
        raise DataError(f"no gene is named {unknown[0]!r}{nearest(unknown[0], measured['gene'].values)}")
    names = [k for k in predicted["intervention"].values if k in measured["intervention"].values]
    chosen = [g for g in (measured["gene"].values if genes is None else genes) if g in predicted["gene"].values]
    if not names or not chosen:
        raise DataError("predicted and measured effects share no intervention or no gene; name interventions by the labels of the screen")
    where = {"intervention": names, "gene": chosen}
    given, truth = predicted.sel(where).transpose(..., *where), measured.sel(where).transpose(..., *where)
    p = (given["effect"].mean("draw") if "draw" in given["effect"].dims else given["effect"]).to_numpy().astype(float)
    m, de = truth["effect"].to_numpy(), de_genes(measured).sel(where).to_numpy()
    with np.errstate(divide="ignore", invalid="ignore"):
        p0, m0 = p - p.mean(1, keepdims=True), m - m.mean(1, keepdims=True)
        scores = {
            "pearson": np.where(np.ptp(p, 1) > 0, (p0 * m0).sum(1) / np.sqrt((p0**2).sum(1) * (m0**2).sum(1)), np.nan),
            "mse": ((p - m) ** 2).mean(1),
            "relative_l2": np.linalg.norm(p - m, axis=1) / np.linalg.norm(m, axis=1),
            "direction": np.where(np.isnan(p), np.nan, (np.sign(p) == np.sign(m)) & de).sum(1) / de.sum(1),
            "n_de": de.sum(1),
        }
    if (interval := _interval(given, truth, p, level)) is not None:
        scores["coverage"] = ((interval[0] <= m) & (m <= interval[1])).mean(1)
    return pd.DataFrame(scores, index=pd.Index(names, name="intervention"))


def split_half(data: PerturbationData, seed: int = 0) -> pd.DataFrame:
    """The noise floor: :func:`score_effects` of one random half of every condition's cells, control included, against the other half.

    Conditions of fewer than four cells are left out. Each half has twice the sampling variance of all cells, so that the mean squared
    difference is four times that of all cells about the truth (a perfect prediction scored on one half has half of this ``mse``).
    """
    a, b = halves(data, seed)
    return score_effects(measured_effects(a), measured_effects(b))


class _Totals(NamedTuple):
    """Of the cells of one condition: how many, r [G] (of normalised data the mean), the value [G] that follows, and its variance; sums of
    the expression [G] and of the libraries; and ``exposure = n^2 / sum 1 / l``, at which a Poisson count would vary as r does."""

    n: int
    rate: Array
    value: Array
    variance: Array
    total: Array
    library: float
    exposure: float


def _totals(data: PerturbationData, rows: NDArray[np.int64]) -> _Totals:
    shares, n, counts = _shares(data, rows), len(rows), data.kind == "counts"
    mean, squares = (np.asarray(a.sum(0)).ravel() for a in (shares, shares.multiply(shares) if sp.issparse(shares) else shares**2))
    library = data.library_size[rows].astype(np.float64)
    rate = mean / n
    inverse = float((1 / library).sum())
    least = inverse / float(library.sum()) if counts else 0.0  # mean (1 / l)^2 of the cell of a count
    slope = 1e4 / (1 + 1e4 * rate) if counts else 1.0
    variance = slope**2 * np.maximum(squares - n * rate**2, least) / n**2 * (n / (n - 1) if n > 1 else np.nan)
    total = np.asarray(data.x[rows].sum(0, dtype=np.float64)).ravel()
    return _Totals(n, rate, np.log1p(1e4 * rate) if counts else rate, variance, total, float(library.sum()), n**2 / inverse)


def _shares(data: PerturbationData, rows: NDArray[np.int64]) -> Any:
    """x_i / l_i of cells, [n, G], sparse if the counts are; normalised data as they are (their library is 1)."""
    x, scale = data.x[rows].astype(np.float64), 1 / data.library_size[rows].astype(np.float64)
    return sp.diags(scale) @ x if sp.issparse(x) else scale[:, None] * x


def _p_value(a: _Totals, b: _Totals, counts: bool) -> Array:
    """Welch's two-sided test; of counts, the larger p-value of it and of equal Poisson rates given the counts of both together."""
    effect, variance = a.value - b.value, a.variance + b.variance
    with np.errstate(divide="ignore", invalid="ignore"):
        df = variance**2 / (a.variance**2 / max(a.n - 1, 1) + b.variance**2 / max(b.n - 1, 1))
        welch = np.where(variance == 0, (effect == 0).astype(float), 2 * stats.t.sf(np.abs(effect) / np.sqrt(variance), df))
    if not counts:
        return welch
    k, n, share = a.total, a.total + b.total, a.library / (a.library + b.library)
    return np.maximum(welch, np.minimum(1.0, 2 * np.minimum(stats.binom.cdf(k, n, share), stats.binom.sf(k - 1, n, share))))


def _interval(predicted: xr.Dataset, measured: xr.Dataset, centre: Array, level: float) -> tuple[Array, Array] | None:
    if "lower" in predicted and "upper" in predicted:
        return predicted["lower"].to_numpy(), predicted["upper"].to_numpy()
    if "draw" not in predicted["effect"].dims:
        return None
    tails = [(1 - level) / 2, (1 + level) / 2]
    low, high = predicted["effect"].quantile(tails, "draw").to_numpy()
    noise = stats.norm.ppf(tails[1]) * measured["se"].to_numpy()
    return centre - np.hypot(centre - low, noise), centre + np.hypot(high - centre, noise)
