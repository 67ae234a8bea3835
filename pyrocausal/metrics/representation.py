"""Latents and targets against a known truth: matched correlation, linear R2, DCI, target masks, and the label-free baseline.

:func:`mcc`, :func:`linear_r2` and :func:`dci` compare latents, :func:`mask_scores` targets; :func:`fast_ica` needs no labels.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy import stats
from scipy.optimize import linear_sum_assignment

from pyrocausal.data import PerturbationData
from pyrocausal.errors import DataError, nearest

Array = NDArray[np.float64]
Columns = Sequence[int] | NDArray[np.int64]


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
