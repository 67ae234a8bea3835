"""Metrics against a known truth, measured effects of a real screen, and the baselines that every model has to beat.

With the truth of a simulated screen: :func:`mcc`, :func:`linear_r2` and :func:`dci` compare latents, :func:`mask_scores` targets;
:func:`fast_ica` is the label-free baseline. With held-out cells: :func:`measured_effects` says what was seen and how surely,
:func:`baseline_effects` what needs no model, and :func:`score_effects` compares any prediction with it; :func:`split_half` is the noise.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import scipy.sparse as sp
import xarray as xr
from numpy.typing import ArrayLike, NDArray
from scipy import stats
from scipy.optimize import linear_sum_assignment

from pyrocausal.data import PerturbationData
from pyrocausal.errors import DataError, nearest

Array = NDArray[np.float64]
Columns = Sequence[int] | NDArray[np.int64]
BASELINES = ("control", "mean", "additive", "train")


class MCC(NamedTuple):
    """``value``, and ``columns`` [n_true]: the estimated column that stands for each true one, -1 where there is none."""

    value: float
    columns: NDArray[np.int64]


class DCI(NamedTuple):
    """Disentanglement, completeness and informativeness, each 1 at best."""

    disentanglement: float
    completeness: float
    informativeness: float


class MaskScores(NamedTuple):
    """``precision``, ``recall`` and ``f1`` of a target mask, and the matching (as in :class:`MCC`) that they hold for."""

    precision: float
    recall: float
    f1: float
    columns: NDArray[np.int64]


def mcc(true: ArrayLike, estimated: ArrayLike, legacy: bool = False) -> MCC:
    """Mean correlation coefficient: ``max over matchings m of 1/L sum_j |corr(true_j, estimated_m(j))|`` (Pearson, Hungarian).

    Args:
        true: latents, [n_cells, L].
        estimated: [n_cells, D]; surplus columns are ignored, and a true latent without a partner counts as 0.
        legacy: match on the signed correlation, as the sVAE reference does for its masks (a latent recovered with flipped sign is lost).

    Source: Khemakhem et al. 2020 (arXiv 2002.11537); ``svae/metrics.py``. Cannot see: scale and sign, what surplus columns hold, nor
    whether the label-free part of a latent is right when perturbations move it far (both enter one correlation).
    """
    t, e = _centred(true, estimated)
    size = np.outer(np.linalg.norm(t, axis=0), np.linalg.norm(e, axis=0))
    correlation = t.T @ e / np.where(size > 0, size, np.inf)
    columns = _matching(correlation if legacy else np.abs(correlation))
    matched = np.abs(correlation)[np.arange(len(columns)), columns]
    return MCC(float(matched[columns >= 0].sum() / len(columns)), columns)


def linear_r2(true: ArrayLike, estimated: ArrayLike) -> float:
    """``1/L sum_j R^2`` of the least-squares regression (with intercept) of each true latent [n_cells, L] on all estimated [n_cells, D].

    Source: sVAE's ``LinearRegression().fit(z_hat, z).score``. Cannot see: rotations. A subspace without its axes scores 1, and PCA and ICA
    of the same components score the same; it is not adjusted for D, so n_cells has to be far above D.
    """
    t, e = _centred(true, estimated)
    residual = t - e @ np.linalg.lstsq(e, t, rcond=None)[0]
    return float(np.mean(1 - (residual**2).sum(0) / np.maximum((t**2).sum(0), 1e-300)))


def dci(true: ArrayLike, estimated: ArrayLike, seed: int = 0, n_cells: int = 4000) -> DCI:
    """Importances ``R_ij`` of estimated column i for true latent j (random forest on half of at most ``n_cells`` random cells), then

    ``D = sum_i w_i (1 - H_L(R_i. / sum_j R_ij))`` with ``w_i = sum_j R_ij / sum R`` and the entropy ``H_L`` to base L;
    ``C = 1/L sum_j (1 - H_D(R_.j / sum_i R_ij))``; ``I = 1/L sum_j R^2`` on the other half,
    of the true latents [n_cells, L] and the estimated ones [n_cells, D]. Source: Eastwood and Williams, ICLR 2018. Cannot see: sign and
    monotone transforms. Values depend on the regressor (lasso and forests differ): compare only what this function gave.
    """
    ensemble = _sklearn("ensemble", "dci")
    t, e = _centred(true, estimated)
    rows = np.random.default_rng(seed).permutation(len(t))[:n_cells]
    train, test = rows[: len(rows) // 2], rows[len(rows) // 2 :]
    importance, r2 = np.empty((e.shape[1], t.shape[1])), np.empty(t.shape[1])
    for j in range(t.shape[1]):
        forest = ensemble.RandomForestRegressor(50, min_samples_leaf=5, random_state=seed).fit(e[train], t[train, j])
        importance[:, j] = forest.feature_importances_
        r2[j] = forest.score(e[test], t[test, j])
    weight = importance.sum(1) / importance.sum()
    return DCI(float(weight @ (1 - _entropy(importance))), float(np.mean(1 - _entropy(importance.T))), float(r2.mean()))


def mask_scores(true_mask: ArrayLike, probability: ArrayLike, matching: Columns | None = None, threshold: float = 0.5) -> MaskScores:
    """``precision = TP / called``, ``recall = TP / true``, ``F1 = 2 TP / (called + true)`` of the entries above ``threshold``.

    Args:
        true_mask: [P, L]. probability: [P, D], of a target.
        matching: estimated column of each true one: ``mcc(...).columns`` of the cells, or of ``mcc(..., legacy=True)`` as in the sVAE
            reference. None matches by most true positives (the ``get_mask_stats`` of SAMS-VAE; optimistic by about .01).

    Entries called in unmatched columns are false positives. Nothing called: precision and F1 are 0. Cannot see: signs and sizes of the
    effects, nor calibration. Choose the threshold before the truth is seen; :func:`oracle_f1` is what choosing it afterwards would give.
    """
    true, called = np.asarray(true_mask) > 0.5, np.asarray(probability) > threshold
    overlap = true[: len(called)].T.astype(float) @ called[: len(true)]  # [L, D]; unequal numbers of rows are refused below
    columns = _matching(overlap) if matching is None else np.asarray(matching, dtype=np.int64)
    hits, n_called, n_true = int((_aligned(true, columns, called) & called).sum()), int(called.sum()), int(true.sum())
    return MaskScores(hits / max(n_called, 1), hits / max(n_true, 1), 2 * hits / max(n_called + n_true, 1), columns)


def oracle_f1(true_mask: ArrayLike, table: ArrayLike, columns: Columns) -> float:
    """The F1 of ``|table| > t``, table [P, D] of any scale, at the threshold t that makes it largest: chosen on the truth, an upper bound.

    ``true_mask`` [P, L] and the matching ``columns`` as in :func:`mask_scores`. Cannot see: that no threshold is known on real data.
    """
    true, size = np.asarray(true_mask) > 0.5, np.abs(np.nan_to_num(np.asarray(table, dtype=float)))
    hit = _aligned(true, np.asarray(columns, dtype=np.int64), size)
    order = np.argsort(-size, axis=None, kind="stable")
    last = np.append(np.diff(size.ravel()[order]) != 0, True)  # equal scores are called together
    f1 = 2 * np.cumsum(hit.ravel()[order]) / (np.arange(1, size.size + 1) + true.sum())
    return float(f1[last].max())


def fast_ica(data: PerturbationData, n_latent: int, seed: int = 0, normalise: str = "none", starts: int = 10) -> Array:
    """Latents of independent component analysis, [n_cells, n_latent], centred, of unit variance.

    ``n_latent`` whitened principal components of log1p counts (or of the data themselves), turned by FastICA to
    ``max sum_j E exp(-2 s_j^2)``, a contrast for latents that few perturbations move far; the best of several random starts is kept.
    Labels are not used.

    Args:
        normalise: of counts, before log1p: ``"none"``, ``"median"`` (to the median library) or ``"cp10k"``. The default is the strongest on
            the published sVAE simulator, whose libraries carry signal; where depth is technical ``"median"`` is stronger.

    Source: Hyvarinen and Oja 2000 (scikit-learn's FastICA). Cannot see: nonlinear mixing, dependent latents, noise that differs by gene.
    """
    decomposition = _sklearn("decomposition", "fast_ica")
    if n_latent > min(len(data), len(data.genes)):
        raise DataError(f"n_latent={n_latent} was given for {len(data):,} cells and {len(data.genes)} genes; give no more than either")
    y = data.dense(np.float64)
    if data.kind == "counts":
        library = data.library_size.astype(float)[:, None]
        totals: dict[str, Any] = {"none": library, "median": np.median(library), "cp10k": 1e4}
        if normalise not in totals:
            raise DataError(f"there is no normalisation {normalise!r}{nearest(normalise, totals)}")
        y = np.log1p(y * (totals[normalise] / library))
    y -= y.mean(0)
    values, vectors = np.linalg.eigh(y.T @ y / len(y))
    whitened = y @ (vectors[:, -n_latent:] / np.sqrt(np.maximum(values[-n_latent:], 1e-12 * values[-1])))

    def contrast(s: Array) -> tuple[Array, Array]:
        bell = np.exp(-2 * s**2)
        return s * bell, ((1 - 4 * s**2) * bell).mean(-1)

    found = []
    for start in range(starts):
        ica = decomposition.FastICA(whiten=False, fun=contrast, max_iter=500, random_state=seed * starts + start)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="FastICA did not converge")  # the other starts are there for that
            s = ica.fit_transform(whitened)
        found.append(s / s.std(0))
    return max(found, key=lambda s: float(np.exp(-2 * s**2).mean()))


def ica_mask(latents: ArrayLike, data: PerturbationData) -> Array:
    """Mean latent of the cells of each perturbation over the standard deviation within conditions, [P, D]; NaN without cells.

    The score of a target for methods that have no mask (:func:`oracle_f1` finds their best threshold). Latents should be centred at the
    unperturbed state; cells of a combination count for each of its parts.
    """
    s = np.asarray(latents, dtype=float)
    n = data.cells_per_perturbation.astype(float)
    means = np.asarray(data.dose.T @ s) / np.where(n > 0, n, np.nan)[:, None]
    within = s - pd.DataFrame(s).groupby(np.asarray(data.labels)).transform("mean").to_numpy()
    return means / np.maximum(within.std(0), 1e-12)


def measured_effects(data: PerturbationData, reference: str = "control") -> xr.Dataset:
    """What the cells of each condition show against those of a reference, gene by gene.

    Counts: ``effect = log1p(1e4 r_c) - log1p(1e4 r_0)`` with ``r = sum of counts / sum of libraries`` over the cells of a condition;
    normalised data: difference of means. ``se`` is the linearised delete-one-cell jackknife (delta method),
    ``var r = n/(n-1) sum_i (x_i - r l_i)^2 / (sum l)^2`` with at least one count's error; ``p_value`` is of the two-sided Welch test, and
    for counts not below that of the exact conditional binomial test, which keeps genes with a handful of counts honest.

    Args:
        reference: label of the condition to compare with; ``"control"`` is the screen's control, whatever its label.

    Returns:
        Dataset: ``effect``, ``se``, ``p_value`` (intervention, gene) and ``n_cells`` (intervention); a condition of one cell has no
        ``se``. Cannot see: batches, guides (cells are taken as replicates), changes of variance or shape.
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
    rng = np.random.default_rng(seed)
    half = np.full(len(data), -1)
    for condition in data.conditions:
        members = rng.permutation(np.flatnonzero(data.labels == condition))
        if len(members) >= 4:
            half[members] = np.arange(len(members)) % 2
    return score_effects(measured_effects(data[half == 0]), measured_effects(data[half == 1]))


class _Totals(NamedTuple):
    """Of the cells of one condition: how many, their counts and libraries summed, and the value [G] that follows, with its variance."""

    n: int
    total: Array
    library: float
    value: Array
    variance: Array


def _totals(data: PerturbationData, rows: NDArray[np.int64]) -> _Totals:
    x, library = data.x[rows].astype(np.float64), data.library_size[rows].astype(np.float64)
    counts, n, whole = data.kind == "counts", len(rows), float(library.sum())
    total, squares = (np.asarray(a.sum(0)).ravel() for a in (x, x.multiply(x) if sp.issparse(x) else x * x))
    rate = total / whole
    residual = np.maximum(squares - 2 * rate * (x.T @ library) + rate**2 * (library @ library), float(counts))
    slope = 1e4 / (1 + 1e4 * rate) if counts else 1.0
    variance = slope**2 * residual / whole**2 * (n / (n - 1) if n > 1 else np.nan)
    return _Totals(n, total, whole, np.log1p(1e4 * rate) if counts else rate, variance)


def _p_value(a: _Totals, b: _Totals, counts: bool) -> Array:
    """Welch's two-sided test; of counts, the larger p-value of it and of equal Poisson rates given the counts of both together."""
    effect, variance = a.value - b.value, a.variance + b.variance
    with np.errstate(divide="ignore", invalid="ignore"):
        df = variance**2 / (a.variance**2 / max(a.n - 1, 1) + b.variance**2 / max(b.n - 1, 1))
        welch = np.where(variance == 0, (effect == 0).astype(float), 2 * stats.t.sf(np.abs(effect) / np.sqrt(variance), df))
    if not counts:
        return welch
    k, n, share = np.rint(a.total), np.rint(a.total + b.total), a.library / (a.library + b.library)
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


def _sklearn(module: str, caller: str) -> Any:
    try:
        return import_module(f"sklearn.{module}")
    except ImportError as error:
        raise ImportError(f"{caller} needs scikit-learn, which is not installed; pip install 'pyrocausal[test]'") from error


def _centred(true: ArrayLike, estimated: ArrayLike) -> tuple[Array, Array]:
    t, e = np.asarray(true, dtype=float), np.asarray(estimated, dtype=float)
    if t.ndim != 2 or e.ndim != 2 or len(t) != len(e) or len(t) < 2:
        raise DataError(f"latents of shapes {t.shape} and {e.shape} were given; give [n_cells, n_latent] each, of the same cells")
    return t - t.mean(0), e - e.mean(0)


def _matching(weight: Array) -> NDArray[np.int64]:
    """The column of each row that makes the sum of weights largest, -1 for rows without one, [n_rows]."""
    columns = np.full(len(weight), -1, np.int64)
    rows, matched = linear_sum_assignment(-weight)
    columns[rows] = matched
    return columns


def _aligned(true: NDArray[np.bool_], columns: NDArray[np.int64], estimated: NDArray[Any]) -> NDArray[np.bool_]:
    """The true mask [P, L] in the columns of the estimated one [P, D]; nothing is true in unmatched columns."""
    there = columns >= 0
    if len(true) != len(estimated) or columns.shape != true.shape[1:] or (columns >= estimated.shape[1]).any():
        raise DataError(f"masks of shapes {true.shape} and {estimated.shape} with a matching of {len(columns)} columns were given; see mcc")
    out = np.zeros(estimated.shape, bool)
    out[:, columns[there]] = true[:, there]
    return out


def _entropy(table: Array) -> Array:
    """Entropy of each row, normalised to sum 1, to the base of its length; 1 for rows without weight."""
    table = np.where(table.sum(1, keepdims=True) > 0, table, 1.0)
    return stats.entropy(table, axis=1) / np.log(max(table.shape[1], 2))
