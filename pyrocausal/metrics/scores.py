"""Presets of metrics with their conventions, and the table that says what a score means: baseline, replicate, chance and interval beside
it.

``PRESETS`` holds published suites by name. :func:`score_panel` puts every metric on the scale ``s = (u - b) / (r - b)``: 0 is the baseline
that needs no model, 1 a repetition of the experiment. :func:`dynamic_range` and the share of perturbations in which a positive control
beats the baseline say whether a metric can tell anything on the data at hand; one that cannot is not admitted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from pyrocausal.errors import DataError, nearest
from pyrocausal.metrics import de_sets, distances, means
from pyrocausal.metrics.delta import cosine, delta_correlation, top_genes
from pyrocausal.metrics.distances import ENERGY
from pyrocausal.metrics.means import Array
from pyrocausal.metrics.panel import Entry, Panel, Side
from pyrocausal.metrics.ranks import RANKINGS, Ties, retrieval

RESAMPLED = 0.95  # least share of resamples in which a scale exists, for an interval of s
ENOUGH = 5  # least number of perturbations with a value, of an admitted metric
BDS, DRF = 0.9, 0.5  # least share of perturbations and least dynamic range of an admitted metric


@dataclass(frozen=True)
class Metric:
    """A metric of a whole panel, in one convention.

    Attributes:
        name, convention: what it is, and how it is taken, in words.
        parts: of a prediction and the panel, one row for each perturbation: its values [P], NaN where undefined, or [P, 2].
        best: value of a perfect prediction. worst: what a perturbation without prediction scores; NaN: no bound.
        higher: whether higher is better.
        needs: ``"means"``, ``"cells"`` or ``"counts"``.
        negative: the prediction without skill: ``"baseline"`` (the mean response) or ``"control"``, where the mean response is the
            reference.
        parts_of_negative: for it, where the convention does not give one profile for all what chance gives; None: ``parts``.

    The value of the panel is the mean over perturbations; of parts [P, 2], the ratio of the sums of the columns.
    """

    name: str
    convention: str
    parts: Callable[[Side, Side, Panel], Array]
    best: float
    worst: float
    higher: bool
    needs: Literal["means", "cells", "counts"] = "means"
    negative: Literal["baseline", "control"] = "baseline"
    parts_of_negative: Callable[[Side, Side, Panel], Array] | None = None


def score_panel(
    predicted: Entry, panel: Panel, preset: str | Sequence[Metric], n_permutations: int = 200, n_bootstrap: int = 1000, seed: int = 0
) -> pd.DataFrame:
    """A prediction scored on a panel, one row for each metric of a preset.

    A perturbation without prediction (NaN) takes the worst value of a bounded metric; of an unbounded one, the worst that any perturbation
    has under prediction or baseline; in a ratio of sums, that of the control. A metric that needs cells, where there are none, is a row
    that says so in ``note``.

    Args:
        predicted: means, and cells where metrics need them, of the perturbations of the panel, in its unit.
        preset: a name in ``PRESETS``, or metrics.
        n_permutations: of the labels of the predictions, for the null; 0 for none.
        n_bootstrap: resamples of perturbations.

    Returns:
        A table with ``metric``, ``convention``, ``higher`` (is better), ``n`` (perturbations with a value) and ``n_failed``, ``u`` the
        value, ``b`` of the negative control, ``r`` of the replicate, ``s = (u - b) / (r - b)`` (not clipped; NaN where the replicate is no
        better than the baseline: there is no scale then), ``null_mean`` and ``null_p`` (one-sided: share of permutations as good, the
        prediction counted with them), ``low`` and ``high`` (95 % of u), ``s_low`` and ``s_high`` (of s; u, b and r resampled together),
        ``drf``, ``bds``, ``admitted``, ``note``.

    ``drf`` is the mean :func:`dynamic_range`, ``bds`` the share of perturbations in which the positive control (of metrics of means the
    interpolated duplicate, else the replicate) beats the negative one; a ratio of sums has them over bootstrap resamples. Admitted: ``bds``
    of at least .9, ``drf`` of at least .5, a replicate ahead of the baseline, and values for five perturbations. Truth and replicate are
    halves: a model that knew the truth would score beyond s = 1.

    Bootstrap intervals take ranks, weights and ``rho`` as given and perturbations as independent; a few perturbations give a rough one.
    """
    if isinstance(preset, str) and preset not in PRESETS:
        raise DataError(f"there is no preset {preset!r}{nearest(preset, PRESETS)}")
    metrics = PRESETS[preset] if isinstance(preset, str) else tuple(preset)
    rng = np.random.default_rng(seed)
    n = len(panel.names)
    orders = rng.permuted(np.tile(np.arange(n), (n_permutations, 1)), axis=1)
    resamples = rng.multinomial(n, np.full(n, 1 / n), size=n_bootstrap).astype(float)
    entries = {"u": predicted, "b": panel.baseline, "c": panel.control_entry, "r": panel.replicate, "p": panel.positive, "t": panel.true}
    sides = {name: Side(entry, panel) for name, entry in entries.items()}
    return pd.DataFrame([_row(metric, sides, panel, orders, resamples) for metric in metrics])


def dynamic_range(positive: ArrayLike, negative: ArrayLike, best: float, higher: bool = True) -> Array:
    """``(m+ - m-) / (best - m-)``, clipped to [-1, 1]: what part of the way from the negative control to perfection the positive one goes.

    Entry by entry, the signs turned for errors (``higher=False``); NaN where the negative control is perfect or beyond. Source: Miller et
    al. 2025 (DRF), whose published code adds 1e-6 to the denominator. Cannot see: whether a gap is due to a few perturbations; read it
    beside BDS.
    """
    m, low = np.asarray(positive, dtype=float), np.asarray(negative, dtype=float)
    room = best - low if higher else low - best
    gain = m - low if higher else low - m
    return np.where(room > 0, np.clip(gain / np.where(room > 0, room, 1.0), -1.0, 1.0), np.nan)


def _row(metric: Metric, sides: dict[str, Side], panel: Panel, orders: NDArray[np.int64], resamples: Array) -> dict[str, object]:
    row: dict[str, object] = {"metric": metric.name, "convention": metric.convention, "higher": metric.higher}
    names = {"u": "u", "b": "b" if metric.negative == "baseline" else "c", "r": "r", "p": "p" if metric.needs == "means" else "r"}
    lacking = [k for k, name in names.items() if metric.needs != "means" and sides[name].raw is None]
    if metric.needs == "counts" and not panel.counts:
        lacking = list(names)
    true = sides["t"]
    parts = {k: _parts(metric, sides[name], true, panel, k == "b") for k, name in names.items() if k not in lacking}
    if "u" in parts and "b" in parts:
        parts["u"] = _punished(metric, sides["u"], parts["u"], parts["b"])
    value = {k: float(_combine(v, np.ones((1, len(v))))[0]) if (v := parts.get(k)) is not None else np.nan for k in names}
    u, b, r = value["u"], value["b"], value["r"]
    row |= {"n": int(np.isfinite(parts["u"]).all(1).sum()) if "u" in parts else 0, "n_failed": int(sides["u"].failed.sum())}
    row |= {"u": u, "b": b, "r": r, "s": float(_scaled(metric, u, b, r))}
    drawn = {k: _combine(v, resamples) for k, v in parts.items()}
    row |= {"null_mean": np.nan, "null_p": np.nan, "low": np.nan, "high": np.nan, "s_low": np.nan, "s_high": np.nan}
    if np.isfinite(u) and len(orders):
        null = np.array([_null(metric, sides["u"].permuted(o), true, panel, parts) for o in orders])
        as_good = null >= u - 1e-12 if metric.higher else null <= u + 1e-12
        row |= {"null_mean": float(np.nanmean(null)), "null_p": float((1 + as_good.sum()) / (1 + len(null)))}
    if np.isfinite(u) and len(resamples):
        row["low"], row["high"] = np.nanquantile(drawn["u"], [0.025, 0.975])
        if {"b", "r"} <= set(parts):
            scaled = _scaled(metric, drawn["u"], drawn["b"], drawn["r"])
            if np.isfinite(scaled).mean() >= RESAMPLED:
                row["s_low"], row["s_high"] = np.nanquantile(scaled, [0.025, 0.975])
    row |= _calibration(metric, parts, drawn, bool(np.isfinite(_scaled(metric, r, b, r))))
    return row | {"note": f"needs {metric.needs}: {', '.join(lacking)} without them" if lacking else ""}


def _scaled(metric: Metric, u: ArrayLike, b: ArrayLike, r: ArrayLike) -> Array:
    """``(u - b) / (r - b)``, NaN where the replicate does not beat the baseline."""
    u, b, r = (np.asarray(x, dtype=float) for x in (u, b, r))
    ahead = r > b if metric.higher else r < b
    return np.where(ahead, (u - b) / np.where(ahead, r - b, 1.0), np.nan)


def _calibration(metric: Metric, parts: dict[str, Array], drawn: dict[str, Array], ahead: bool) -> dict[str, object]:
    if not {"p", "b"} <= set(parts):
        return {"drf": np.nan, "bds": np.nan, "admitted": False}
    plain = parts["p"].shape[1] == 1
    m, low = (parts[k][:, 0] if plain else drawn[k] for k in ("p", "b"))
    known = np.isfinite(m) & np.isfinite(low)
    if not known.any():
        return {"drf": np.nan, "bds": np.nan, "admitted": False}
    better = m > low if metric.higher else m < low
    ranges = dynamic_range(m[known], low[known], metric.best, metric.higher)
    drf = float(np.nanmean(ranges)) if np.isfinite(ranges).any() else np.nan
    bds = float(better[known].mean())
    return {
        "drf": drf,
        "bds": bds,
        "admitted": bool(ahead and (parts["p"].shape[0] if not plain else known.sum()) >= ENOUGH and bds >= BDS and drf >= DRF),
    }


def _parts(metric: Metric, side: Side, true: Side, panel: Panel, negative: bool = False) -> Array:
    function = metric.parts_of_negative if negative and metric.parts_of_negative is not None else metric.parts
    parts = np.asarray(function(side, true, panel), dtype=float)
    return parts[:, None] if parts.ndim == 1 else parts


def _null(metric: Metric, side: Side, true: Side, panel: Panel, parts: dict[str, Array]) -> float:
    found = _parts(metric, side, true, panel)
    if "b" in parts:
        found = _punished(metric, side, found, parts["b"])
    return float(_combine(found, np.ones((1, len(found))))[0])


def _punished(metric: Metric, side: Side, parts: Array, baseline: Array) -> Array:
    """Worst values in the rows without prediction (where the truth defines one)."""
    if not side.failed.any() or parts.shape[1] > 1:
        return parts
    worst = metric.worst
    if np.isnan(worst):
        both = np.concatenate([parts, baseline])
        worst = float(np.nanmin(both) if metric.higher else np.nanmax(both))
    defined = np.isfinite(parts[:, 0]) | np.isfinite(baseline[:, 0])
    return np.where((side.failed & defined)[:, None], worst, parts)


def _combine(parts: Array, counts: Array) -> Array:
    """Value of the panel for every resample, ``counts`` [B, P] saying how often each perturbation is in it."""
    known = np.asarray(np.isfinite(parts).all(1))
    total = counts @ np.where(known[:, None], parts, 0.0)
    below = total[:, 1] if parts.shape[1] > 1 else counts @ known.astype(float)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(below > 0, total[:, 0] / below, np.nan)


def _pairs(name: str, distance: Callable[[Array, Array], float]) -> Callable[[Side, Side, Panel], Array]:
    """A distance between the cells of each perturbation; every pair is computed once, whatever the permutation."""

    def parts(side: Side, true: Side, panel: Panel) -> Array:
        out = np.empty(len(side.order))
        for row, source in enumerate(side.order):
            key = (name, int(source), row)
            if key not in side.memo:
                side.memo[key] = distance(side.space[row], true.space[row])
            out[row] = side.memo[key]
        return out

    return parts


def _capped(side: Side, true: Side, panel: Panel) -> Array:
    found = means.capped_mse(side.bulk, true.bulk, panel.control_bulk, own=panel.own)
    return np.stack([found.numerator, found.denominator], axis=1)


def _pds(side: Side, true: Side, panel: Panel) -> Array:
    base = panel.control_bulk.value
    return retrieval(side.bulk.value - base, true.bulk.value - base, "vcc2026", own=panel.own)


def _rank(name: str, ties: Ties | None = None) -> Callable[[Side, Side, Panel], Array]:
    """Ranks of changes from control; with other ties than the convention's, if given."""
    how = RANKINGS[name] if ties is None else replace(RANKINGS[name], ties=ties)
    return lambda s, t, p: retrieval(s.means - p.control.means, t.means - p.control.means, how, own=p.own)


def _weighted(exponent: float) -> Callable[[Side, Side, Panel], Array]:
    return lambda s, t, p: means.weighted_mse(s.means, t.means, means.de_weights(p.score, exponent))


def _r2(reference: str) -> Callable[[Side, Side, Panel], Array]:
    return lambda s, t, p: means.weighted_r2(s.means, t.means, _reference(p, reference), means.de_weights(p.score))


def _pearson(reference: str, k: int | None = None) -> Callable[[Side, Side, Panel], Array]:
    """Correlation of changes; 0, that of no skill, where the prediction does not vary."""

    def parts(s: Side, t: Side, p: Panel) -> Array:
        base = _reference(p, reference)
        found = delta_correlation(s.means, t.means, base, None if k is None else top_genes(p.score, k))
        return np.where(np.ptp(t.means - base, axis=1) > 0, np.nan_to_num(found, nan=0.0), np.nan)

    return parts


def _reference(panel: Panel, name: str) -> Array:
    return panel.control.means[0] if name == "control" else panel.reference


_LOG = "means of log1p(1e4 x / sum x)"
_WILCOXON = "Wilcoxon on counts per million against true control cells, BH 5 % within perturbation"
_OWN = "targeted genes excluded"
_FLAT = "0 where the prediction does not vary"
_PEARSON_PERT = Metric(
    "pearson_pert", f"{_LOG}, minus mean of training centroids, all genes, {_FLAT}", _pearson("mean"), 1, -1, True, negative="control"
)
_PEARSON_CTRL = Metric("pearson_ctrl", f"{_LOG}, minus control, all genes, {_FLAT}", _pearson("control"), 1, -1, True)
_WMSE = Metric("wmse", f"{_LOG}, weights (min-max |t|)^2 of truth against all other perturbed cells", _weighted(2.0), 0, np.nan, False)
_GAP = Metric(
    "correlation_gap",
    "rms difference of gene correlations, panel space",
    _pairs("gap", distances.correlation_gap),
    0,
    np.nan,
    False,
    "cells",
)

PRESETS: dict[str, tuple[Metric, ...]] = {
    "vcc2026": (
        Metric("pds_cosine", f"bulk log1p(5e4 S / sum S) minus control; {RANKINGS['vcc2026']}", _pds, 1, 0, True, "counts"),
        Metric("mse_capped", f"ratio of sums, unbiased, jackknife noise, capped, rho; bulk as above, {_OWN}", _capped, 0, np.nan, False,
        "counts"), Metric("direction_fidelity", f"k / max(n_hat, n); {_WILCOXON}, control CPM > 5, {_OWN}",
               lambda s, t, p: de_sets.direction_fidelity(s.table, t.table, p.own), 1, 0, True, "counts"),
        Metric("direction_reach", f"k* / n at purity .9; {_WILCOXON}, control CPM > 5, {_OWN}",
               lambda s, t, p: de_sets.direction_reach(s.table, t.table, p.own), 1, 0, True, "counts"),
        Metric("sig_jaccard", f"both empty: 1; {_WILCOXON}, control CPM > 5, {_OWN}",
               lambda s, t, p: de_sets.sig_jaccard(s.table, t.table, p.own), 1, 0, True, "counts"),
        Metric("lfc_nmae", f"truly called genes, at least 10; {_WILCOXON}, control CPM > 5, {_OWN}",
               lambda s, t, p: de_sets.lfc_nmae(s.table, t.table, p.own), 0, np.nan, False, "counts"),
    ),
    "vcc2025": (
        Metric("des", f"overlap_at_N in order of |log fold change|; {_WILCOXON}, all genes",
               lambda s, t, p: de_sets.overlap_at_n(s.full_table, t.full_table), 1, 0, True, "counts"),
        Metric("pds_l1", f"{_LOG}, minus control; {RANKINGS['vcc2025']}", _rank("vcc2025"), 1, 0, True),
        Metric("mae", _LOG, lambda s, t, p: means.mae(s.means, t.means), 0, np.nan, False),
    ),
    "perturbench": (
        Metric("cosine", f"{_LOG}, minus control", lambda s, t, p: cosine(s.means, t.means, p.control.means), 1, -1, True),
        Metric("rank_cosine", f"{_LOG}, minus control; {RANKINGS['perturbench']}", _rank("perturbench"), 0, 1, False,
               parts_of_negative=_rank("perturbench", "midrank")),
        Metric("rmse", _LOG, lambda s, t, p: means.rmse(s.means, t.means), 0, np.nan, False),
        Metric("rank_rmse", f"{_LOG}; {RANKINGS['perturbench_rmse']}", _rank("perturbench_rmse"), 0, 1, False,
               parts_of_negative=_rank("perturbench_rmse", "midrank")),
    ),
    "systema": (
        _PEARSON_PERT,
        Metric("pearson_pert_top20", f"as pearson_pert, 20 genes of largest |t| of truth against other perturbed cells, {_FLAT}",
               _pearson("mean", 20), 1, -1, True, negative="control"),
        _PEARSON_CTRL,
        Metric("centroid_accuracy", f"{_LOG}; {RANKINGS['systema']}", _rank("systema"), 1, 0, True),
    ),
    "mejia": (
        _WMSE,
        Metric("r2_w_pert", "weighted R2 of changes from the mean of training centroids, weights as wmse", _r2("mean"), 1, np.nan, True,
               negative="control"),
        Metric("r2_w_ctrl", "weighted R2 of changes from control, weights as wmse", _r2("control"), 1, np.nan, True),
    ),
    "scperturb": (
        Metric("e_distance", "squared Euclidean, unbiased, panel space",
               _pairs("scperturb", lambda x, y: distances.energy_distance(x, y, *ENERGY["scperturb"])), 0, np.nan, False, "cells"),
        _GAP,
    ),
    "scperteval": (
        _PEARSON_CTRL,
        _PEARSON_PERT,
        Metric("mse", _LOG, lambda s, t, p: means.mse(s.means, t.means), 0, np.nan, False),
        _WMSE,
        Metric("l2_heg", f"{_LOG}, 1000 genes of highest control mean",
               lambda s, t, p: means.l2_heg(s.means, t.means, p.control.means[0]), 0, np.nan, False),
        Metric("nir", f"{_LOG}; {RANKINGS['nir']}", _rank("nir"), 1, 0, True),
        Metric("energy", "Euclidean, unbiased, panel space",
               _pairs("energy", lambda x, y: distances.energy_distance(x, y, *ENERGY["scperteval"])), 0, np.nan, False, "cells"),
        Metric("mmd", "unbiased RBF, median of pooled distances, panel space", _pairs("mmd", distances.mmd), 0, np.nan, False, "cells"),
        _GAP,
    ),
}  # fmt: skip
"""Published suites: the Virtual Cell Challenges of 2025 and 2026 (cell-eval, cell-eval2), PerturBench, Systema, Mejia et al. 2025,
scPerturb and scperteval. The baseline of ``perturbench``, one profile for all, has the rank of chance, though ties count against models."""
