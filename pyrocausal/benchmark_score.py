"""How a prediction is judged by held-out cells: panels on the scale of effects, and the scores of an answer on them.

One scale for everything, that of :func:`pyrocausal.effects` and :func:`~pyrocausal.evaluate.measured_effects`: ``y = log1p(1e4 r)`` with
``r`` the mean over a condition's cells of counts over library (log1p of mean CP10k, never the mean of the logarithms), or the mean of
normalised values. The test cells of every condition, the control included, are halved (:func:`pyrocausal.duplicates.halves`): truth A
and replicate B. For a condition p, with c the control and e the effect that a model says::

    levels    x^_p = c^ + e_p (the model's ``expression``)    against y_p,A           metrics of profiles
    changes   c_A + e_p                                       against y_p,A over c_A  metrics of changes from control
    laws      draws of x^_p + Normal(0, se_p,A^2)             against y_p,A           intervals, of expressed genes
    cells     sampled cells                                   against cells of A      metrics of cells, as published

The replicate is ``y_p,B`` (of changes ``c_A + y_p,B - c_B``), the baseline the mean of the training conditions. A prediction of changes is
anchored at the control of the truth, the replicate by its own control, so that nobody gains from noise of a control that truth and
prediction share. Where the held-out cells are of other batches or times, levels are anchored at their control as well.

Targets of the panel's perturbations are left out of levels, changes and laws for all of them (``drop_targets``), and so are genes that are
not expressed, which fewer than a tenth of the training controls have: of laws always, of levels and changes if ``genes="expressed"``. (On
the scale of logarithms of means, a gene with a handful of counts in a condition is noise of the size of one unit, and there are many.)
Draws of the replicate are ``Normal(y_p,B, se_p,B^2)``, of the baseline ``Normal(mean, sd^2)`` over training conditions. Intervals are
also scored by stratum: of the genes that respond (a quarter, whose means spread most over the training conditions) and of the quiet ones.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import pandas as pd

from pyrocausal.data import PerturbationData
from pyrocausal.duplicates import interpolated_duplicate
from pyrocausal.errors import DataError, InterventionError, nearest
from pyrocausal.evaluate import _totals
from pyrocausal.fit import Fit
from pyrocausal.interventions import parse
from pyrocausal.metrics import intervals
from pyrocausal.metrics.means import Array, dense
from pyrocausal.metrics.panel import Entry, Mask, Panel, Side, _rest_test, normalised
from pyrocausal.metrics.scores import _LOG, PRESETS, Metric, _parts, _punished, score_panel
from pyrocausal.query import effects, interventional
from pyrocausal.splits import Split, halves

EXPRESSED = 0.1  # least share of training controls with a count
LEVEL = 0.9  # of intervals
RESPONSIVE = 0.25  # share of the genes that respond
Cells: TypeAlias = dict[str, tuple[Array, ...]]
CHANGES = {"pearson_ctrl", "cosine", "rank_cosine", "pds_l1", "r2_w_ctrl"}  # metrics of changes from control
SCALE = "log1p of mean CP10k"
TEST = "sums of counts"  # of two conditions, behind the interpolated duplicate
SAMPLED = 20  # posterior draws behind sampled cells


@dataclass(frozen=True)
class Options:
    """How answers are asked and scored; arguments of :func:`pyrocausal.benchmark`."""

    presets: tuple[str, ...]
    draws: int
    cells: int
    max_epochs: int | None
    min_cells: int
    drop_targets: bool
    genes: str
    n_permutations: int
    n_bootstrap: int


@dataclass(frozen=True)
class Answer:
    """What is said of P conditions, NaN where nothing is.

    Attributes:
        level, change: profile and effect, [P, n_genes].
        draws: of the profile, [P, S, n_genes]; None: no uncertainty is said.
        cells: P samples [n_cells, n_genes], or None.
        note: why a condition has no answer.
    """

    level: Array
    change: Array
    draws: Array | None = None
    cells: tuple[Array, ...] | None = None
    note: str = ""


@dataclass(frozen=True)
class Judge:
    """The panels of one split, by what is scored on them, with the metrics of each.

    Attributes:
        names: of the P conditions. kept, expressed: genes of levels and changes, and of laws, [n_genes] bool.
        anchor: control of the truth's half, [n_genes]; moved: control of the held-out cells where their level is their own, else None.
        duplicates: answers of the replicate.
    """

    names: tuple[str, ...]
    panels: dict[str, tuple[Panel, tuple[Metric, ...]]]
    kept: Mask
    expressed: Mask
    anchor: Array
    moved: Array | None
    duplicates: dict[str, Answer]

    def entry(self, kind: str, answer: Answer) -> Entry:
        """An answer as an entry of a panel."""
        if kind == "changes":
            return Entry((self.anchor + answer.change)[:, self.kept])
        level = answer.level if self.moved is None else self.moved + answer.change
        if kind == "levels":
            return Entry(level[:, self.kept])
        if kind == "cells":
            return Entry(level, answer.cells)
        draws = None if answer.draws is None else answer.draws + (level - answer.level)[:, None]
        return Entry(level[:, self.expressed], None if draws is None else tuple(draws[:, :, self.expressed]))


def metrics_of(presets: tuple[str, ...], counts: bool) -> dict[str, tuple[Metric, ...]]:
    """The metrics of presets by the panel that they are taken on, each once, after ``l2``."""
    out: dict[str, list[Metric]] = {"levels": [L2], "changes": [], "cells": []}
    for preset in presets:
        if preset not in PRESETS:
            raise DataError(f"there is no preset {preset!r}{nearest(preset, PRESETS)}")
        for metric in PRESETS[preset]:
            kind = "cells" if metric.needs != "means" else "changes" if metric.name in CHANGES else "levels"
            if metric.name not in {m.name for m in out[kind]}:
                said = metric.convention.replace(_LOG, SCALE if counts else "means")
                out[kind].append(replace(metric, convention=said) if kind != "cells" else metric)
    return {kind: tuple(metrics) for kind, metrics in out.items()}


def judge(data: PerturbationData, split: Split, options: Options, seed: int) -> Judge:
    """The panels of a split's test cells: of the conditions with ``min_cells`` of them."""
    train, _, test = split.parts(data)
    size = pd.Series(np.asarray(test.labels, dtype=str)).value_counts()
    names = tuple(c for c in test.conditions if c != test.control and size[c] >= max(options.min_cells, 4))
    if len(names) < 2:
        raise DataError(
            f"{len(names)} held-out conditions have {max(options.min_cells, 4)} cells or more; a benchmark compares two at least: hold out "
            "more, or lower min_cells"
        )
    source = test if test.is_control.sum() >= max(options.min_cells, 4) else train
    pool = data[np.concatenate([test.cells[np.isin(test.labels, names)], source.cells[source.is_control]])]
    a, b = halves(pool, seed)
    true, other = (_profiles(half, names) for half in (a, b))
    control = {k: _totals(d, np.flatnonzero(d.is_control)) for k, d in (("a", a), ("b", b), ("all", pool))}
    same = np.isin(train.batch_codes, train.batch_codes[~train.is_control])  # of a held-out batch, only control cells are trained on
    control["train"] = _totals(train, np.flatnonzero(train.is_control & same if (train.is_control & same).any() else train.is_control))
    conditions = _training_conditions(train, options.min_cells)
    centroids = np.stack([_totals(train, np.flatnonzero(train.labels == c)).value for c in conditions])
    reference = centroids.mean(0)
    moved = control["all"].value if split.settings["by"] in ("batch", "time") else None
    if moved is not None:
        reference = moved + reference - control["train"].value
    counts = data.kind == "counts"
    own = np.stack([np.isin(np.asarray(data.genes, dtype=str), c.split(data.separator)) for c in names])
    kept: Mask = ~np.asarray(own.any(0)) if options.drop_targets else np.ones(own.shape[1], bool)
    if kept.mean() < 0.5:
        raise DataError(f"{int((~kept).sum())} of {len(kept)} genes are targets of the held-out conditions; score them: drop_targets=False")
    seen = np.asarray((train.x[train.is_control] != 0).mean(0)).ravel() >= EXPRESSED
    expressed: Mask = kept & seen
    kept = expressed if options.genes == "expressed" else kept
    if not kept.any():
        raise DataError(f"no gene but targets is in {EXPRESSED:.0%} of the training controls; score all of them: genes='all'")
    cells_of = [{c: dense(d.x[np.asarray(d.labels == c)]) for c in names} for d in (a, b)]
    training = {c: dense(train.x[np.asarray(train.labels == c)]) for c in conditions}
    score = _rest_test(cells_of[0], training, counts)[0]
    drawn_b = _normal(other.value, other.se, options.draws, seed)
    replicate = Answer(other.value, other.value - control["b"].value, drawn_b, tuple(cells_of[1].values()))
    inter = interpolated_duplicate(b).sel(intervention=list(names))
    change = inter["effect"].to_numpy()
    said = {"technical_duplicate": replicate, "interpolated_duplicate": Answer(control["b"].value + change, change)}
    mean = np.repeat(reference[None], len(names), 0)
    n, genes = len(names), np.asarray(data.genes, dtype=str)

    def panel(of: Mask, means: dict[str, Array], base: Array, ref: Array, cells: Cells | None = None, raw: bool = False) -> Panel:
        given: dict[str, Any] = {k: Entry(v[:, of], None if cells is None else cells[k]) for k, v in means.items()}
        own_cells = None if cells is None else cells["control"]
        return Panel(
            names=names, genes=tuple(genes[of]), control=Entry(base[None][:, of], own_cells), reference=ref[of], own=own[:, of],
            score=score[:, of], counts=raw and counts, **given,
        )  # fmt: skip

    levels = {"true": true.value, "replicate": other.value, "baseline": mean, "positive": said["interpolated_duplicate"].level}
    anchor = control["a"].value
    steps = {"replicate": replicate.change, "baseline": mean - (control["train"].value if moved is None else moved), "positive": change}
    changes = {"true": true.value} | {k: anchor + v for k, v in steps.items()}
    base = control["all"].value
    spread = centroids.std(0, ddof=1) if len(centroids) > 1 else np.sqrt(control["train"].variance)
    drawn = {
        "true": _normal(true.value, true.se, options.draws, seed + 1),
        "replicate": replicate.draws,
        "baseline": _normal(mean, np.repeat(spread[None], n, 0), options.draws, seed + 2),
        "positive": replicate.draws,
        "control": _normal(base[None], np.sqrt(control["all"].variance)[None], options.draws, seed + 3),
    }
    laws = {k: tuple(v[:, :, expressed]) for k, v in drawn.items() if v is not None}
    wanted = metrics_of(options.presets, counts)
    panels = {
        "levels": (panel(kept, levels, base, reference), wanted["levels"]),
        "changes": (panel(kept, changes, anchor, anchor + steps["baseline"][0]), wanted["changes"]),
    }
    if expressed.any():
        most = spread[expressed] >= np.quantile(spread[expressed], 1 - RESPONSIVE)
        metrics = _law_metrics(true.se[:, expressed], {"responsive": most, "quiet": ~most}, options.draws, seed + 4)
        panels["laws"] = (panel(expressed, levels, base, reference, laws), metrics)
    if wanted["cells"]:
        panels["cells"] = (_cell_panel(panel, levels, base, reference, cells_of, pool, training, counts, seed), wanted["cells"])
    return Judge(names, panels, kept, expressed, anchor, moved, said)


def ask(fit: Fit, judge: Judge, options: Options, seed: int) -> Answer:
    """The answer of a fit; a condition that it cannot answer is NaN, and ``note`` says why.

    Raises:
        InterventionError: if it can answer none.
    """
    separator, control = fit.coords["separator"], fit.coords["control"]
    acts = {name: parse(name, separator, control) for name in judge.names}
    reasons: list[str] = []
    known: list[str] = []
    for name, act in acts.items():
        try:
            effects(fit, {name: act}, draws=1, cells=1, seed=seed)
            known.append(name)
        except InterventionError as error:
            reasons.append(str(error))
    if not known:
        raise InterventionError(reasons[0])
    there = {name: acts[name] for name in known}
    rows = [judge.names.index(name) for name in known]
    found = effects(fit, there, draws=options.draws, cells=options.cells, seed=seed)
    draws, change = (found[k].transpose("intervention", "draw", "gene").to_numpy().astype(float) for k in ("expression", "effect"))
    if not (np.isfinite(draws).all() and np.isfinite(change).all()):
        raise DataError("the effects that the fit answers are not finite; train it longer, or at a lower learning rate")
    cells = None
    if "cells" in judge.panels:
        per_draw = -(-max(options.cells, 50) // SAMPLED)
        unit = "counts" if fit.coords["kind"] == "counts" else None
        sampled = interventional(fit, there, draws=SAMPLED, cells=per_draw, noise="independent", units=unit, seed=seed)["expression"]
        cells = sampled.to_numpy().astype(float).reshape(len(known), SAMPLED * per_draw, -1)
    p = len(judge.names)

    def filled(values: Array) -> Array:
        out = np.full((p, *values.shape[1:]), np.nan)
        out[rows] = values
        return out

    note = f"{len(reasons)} of {p} conditions without an answer: {reasons[0]}" if reasons else ""
    samples = None if cells is None else tuple(filled(cells))
    return Answer(filled(draws.mean(1)), filled(change.mean(1)), filled(draws), samples, note)


def score(answer: Answer, judge: Judge, options: Options, seed: int) -> tuple[list[dict[str, Any]], dict[str, list[float]]]:
    """A row for each metric (columns of :func:`~pyrocausal.evaluate.score_panel`, ``best`` and ``worst``), and its values by condition."""
    rows: list[dict[str, Any]] = []
    values: dict[str, list[float]] = {}
    for kind, (panel, metrics) in judge.panels.items():
        if not metrics:
            continue
        entry = judge.entry(kind, answer)
        found = score_panel(entry, panel, metrics, options.n_permutations, options.n_bootstrap, seed)
        entries = {"u": entry, "true": panel.true, "b": panel.baseline, "c": panel.control_entry}
        sides = {name: Side(e, panel) for name, e in entries.items()}
        for metric, row in zip(metrics, found.to_dict("records"), strict=True):
            lacking = (metric.needs != "means" and entry.cells is None) or (metric.needs == "counts" and not panel.counts)
            rows.append({str(k): v for k, v in row.items()} | {"best": metric.best, "worst": metric.worst})
            values[metric.name] = [np.nan] * len(judge.names) if lacking else _by_condition(metric, sides, panel)
    return rows, values


def _by_condition(metric: Metric, sides: dict[str, Side], panel: Panel) -> list[float]:
    """Values of a metric for each perturbation; of a ratio of sums, the numerators over the mean denominator."""
    base = _parts(metric, sides["b" if metric.negative == "baseline" else "c"], sides["true"], panel, negative=True)
    parts = _punished(metric, sides["u"], _parts(metric, sides["u"], sides["true"], panel), base)
    if parts.shape[1] > 1:
        parts = parts[:, :1] / np.nanmean(parts[:, 1])
    return [float(v) for v in parts[:, 0]]


# -- parts ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Profiles:
    value: Array
    se: Array


def _profiles(data: PerturbationData, names: tuple[str, ...]) -> _Profiles:
    totals = [_totals(data, np.flatnonzero(data.labels == c)) for c in names]
    return _Profiles(np.stack([t.value for t in totals]), np.sqrt(np.stack([t.variance for t in totals])))


def _training_conditions(train: PerturbationData, least: int) -> list[str]:
    """Those with enough cells for a centroid that is not mere noise (all, if none has)."""
    size = pd.Series(np.asarray(train.labels, dtype=str)).value_counts()
    perturbed = [c for c in train.conditions if c != train.control]
    return [c for c in perturbed if size[c] >= least] or perturbed


def _normal(mean: Array, sd: Array, draws: int, seed: int) -> Array:
    """[P, S, n_genes] of [P, n_genes]."""
    noise = np.random.default_rng(seed).standard_normal((len(mean), draws, mean.shape[1]))
    return np.asarray(mean[:, None] + sd[:, None] * noise)


def _law_metrics(se: Array, strata: dict[str, Mask], draws: int, seed: int) -> tuple[Metric, ...]:
    """Of draws of profiles, widened by the error ``se`` [P, n_genes] of the truth; of intervals also by stratum of genes."""
    noise = se[:, None] * np.random.default_rng(seed).standard_normal((len(se), draws, se.shape[1]))
    tail = (1 - LEVEL) / 2

    def crps(x: Array, y: Array) -> float:
        return float(intervals.crps(x, y).mean())

    def interval(x: Array, y: Array) -> float:
        low, high = np.quantile(x, [tail, 1 - tail], axis=0)
        return float(intervals.interval_score(low, high, y, LEVEL).mean())

    def covered(x: Array, y: Array) -> float:
        low, high = np.quantile(x, [tail, 1 - tail], axis=0)
        return intervals.coverage(low, high, y)

    def by_pair(name: str, function: Any, genes: Any = slice(None)) -> Any:
        def parts(side: Side, true: Side, panel: Panel) -> Array:
            out = np.empty(len(side.order))
            for row, source in enumerate(side.order):
                key = (name, int(source), row)
                if key not in side.memo:
                    side.memo[key] = function((side.cells[row] + noise[row])[:, genes], true.means[row][genes])
                out[row] = side.memo[key]
            return out

        return parts

    said = f"draws of the profile with the truth's sampling error, genes in {EXPRESSED:.0%} of training controls"
    out = [Metric("crps", f"fair; {said}", by_pair("crps", crps), 0, np.nan, False, "cells")]
    for name, genes in {"": slice(None), **{f"_{k}": v for k, v in strata.items() if v.any()}}.items():
        here = f"{LEVEL:.0%} interval; {said}" + (f", the {name[1:]} ones" if name else "")
        widths, share = (
            by_pair(f"{kind}{name}", function, genes) for kind, function in (("interval_score", interval), ("coverage", covered))
        )
        out.append(Metric(f"interval_score{name}", here, widths, 0, np.nan, False, "cells"))
        out.append(Metric(f"coverage{name}", here, share, LEVEL, 0, True, "cells"))
    return tuple(out)


def _cell_panel(
    panel: Any,
    levels: dict[str, Array],
    base: Array,
    reference: Array,
    cells_of: list[dict[str, Array]],
    pool: PerturbationData,
    training: dict[str, Array],
    counts: bool,
    seed: int,
) -> Panel:
    """All genes, with cells: those of the baseline are drawn from all training conditions."""
    rng = np.random.default_rng(seed)
    everything = np.concatenate(list(training.values()))
    true, replicate = (tuple(d.values()) for d in cells_of)
    drawn = tuple(everything[rng.choice(len(everything), len(x), replace=len(x) > len(everything))] for x in true)
    control = dense(pool.x[pool.is_control])
    cells = {"true": true, "replicate": replicate, "baseline": drawn, "positive": replicate, "control": (control,)}
    every: Mask = np.ones(levels["true"].shape[1], bool)
    out: Panel = panel(every, levels, base, reference, cells, raw=True)
    sample = normalised(np.concatenate([everything, control]), counts)
    loadings = np.linalg.eigh(np.cov(sample.T))[1][:, ::-1][:, :50]
    centre = normalised(control, counts).mean(0, keepdims=True)  # of the distances' space: project() subtracts the control's means
    return replace(out, loadings=loadings, control=Entry(centre, (control,)))


def _l2(side: Side, true: Side, panel: Panel) -> Array:
    return np.asarray(np.linalg.norm(side.means - true.means, axis=1))


L2 = Metric("l2", "||x^ - x||, scale of effects", _l2, 0, np.nan, False)
