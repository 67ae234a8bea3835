"""Who wins: models and baselines over splits and seeds, in one table, with a paired test of every model against the best baseline.

A *job* is one model on one split with one seed. Its result is a file in ``out/jobs`` under the digest of everything that determines it
(model, settings, split, seed, data, options, version of the library), written when the job is done and never changed; a run that was
killed goes on with the jobs that are missing, and its table is that of an uninterrupted run, bit for bit. The seed makes the split (unless
the split names its own), the initial weights, the minibatches, and the halves of the test cells.

Every baseline of the collection that the data can be given to is in the table, beside two duplicates of the experiment, which are no
models but say what is attainable. A model of normalised expression is fitted to ``data.log_normalised()`` and judged on that scale, with
baselines of its own there (``unit``): two scales are never compared. A job that fails is a row with the reason; it takes the worst value
that the metric has, else the worst that any method has for the same condition. See :mod:`pyrocausal.benchmark_score` for the scale and
:mod:`pyrocausal.benchmark_paired` for the test.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
import torch

from pyrocausal.benchmark_run import BASELINES, DUPLICATES, Job, Make, read, run_all, speaker, unit_of, write_json
from pyrocausal.collection import ENTRIES, accepts
from pyrocausal.data import PerturbationData
from pyrocausal.errors import DataError, PyrocausalError, nearest

if TYPE_CHECKING:
    from pyrocausal.benchmark_score import Options

Models = Sequence[str] | Mapping[str, str | Make | tuple[str | Make, Mapping[str, Any]]]
LOG = "log_normalised"
FACTS = "benchmark.json"


@dataclass(frozen=True)
class Benchmark:
    """What :func:`benchmark` found; the same tables as in its folder.

    Attributes:
        table: one row for each model, split, seed and metric: ``model``, ``role`` (``"model"``, ``"baseline"``, ``"duplicate"``),
            ``split``, ``unit``, ``seed``, ``metric``, ``convention``, ``higher`` (is better), ``n`` and ``n_failed`` conditions,
            ``value``, ``b`` of the mean response, ``r`` of the replicate, ``s = (value - b) / (r - b)``, ``null`` and ``null_p``
            (permuted labels), ``low`` and ``high`` (95 %, over conditions), ``s_low``, ``s_high``, ``drf``, ``bds``, ``admitted``,
            ``status`` (``"ok"`` or ``"failed"``), ``note``.
        paired: one row for each model, split, unit and metric: see :func:`pyrocausal.benchmark_paired.paired_table`.
        path: the folder, with ``table.csv``, ``paired.csv``, ``by_condition.csv``, ``report.html`` and the jobs.
    """

    table: pd.DataFrame
    paired: pd.DataFrame
    path: Path


def benchmark(
    data: PerturbationData,
    models: Models = (),
    *,
    splits: Sequence[Mapping[str, Any]] = ({"by": "cells"},),
    seeds: Sequence[int] = (0, 1, 2),
    out: str | Path = "pyrocausal-benchmark",
    presets: Sequence[str] = ("mejia", "systema", "perturbench"),
    draws: int = 200,
    cells: int = 64,
    max_epochs: int | None = None,
    min_cells: int = 10,
    drop_targets: bool = True,
    genes: Literal["expressed", "all"] = "expressed",
    n_permutations: int = 200,
    n_bootstrap: int = 1000,
    processes: int = 1,
    progress: bool | Callable[[str], object] | None = None,
    name: str = "screen",
) -> Benchmark:
    """Fit models and every baseline, and say who wins.

    Args:
        models: names of the collection; or a mapping of names for the table to an entry or ``(entry, settings)``. An entry is a name of
            the collection, with settings of :func:`pyrocausal.build`, or a function ``entry(train, seed=, **settings)`` that returns a
            model and a guide, or a ``Fit`` (importable, if ``processes`` is above 1; with an attribute ``data_kind = "normalised"``, it
            is given counts log-normalised). A baseline of the collection, under its own name
            with settings (such as an ``embedding``) or under another, is one of the baselines that have to be beaten.
        splits: arguments of :func:`pyrocausal.splits.split`, for each split.
        seeds: for each, a split, a fit and a row.
        out: folder; what an earlier run finished there is not run again.
        presets: of ``evaluate.PRESETS``; ``l2``, ``crps``, ``interval_score`` and ``coverage`` (the two also by stratum of genes) are
            always there. Those of metrics of cells (``"scperturb"``, ``"scperteval"``, ``"vcc2025"``, ``"vcc2026"``) sample cells, and
            take longer.
        draws, cells: of :func:`pyrocausal.effects`.
        max_epochs: of every fit; None: :func:`pyrocausal.epoch.default_epochs`.
        min_cells: held-out conditions with fewer are not scored.
        drop_targets: leave the genes that the scored conditions target out of metrics of means and intervals.
        genes: that metrics of means are taken of: those that a tenth of the training controls have, or all; intervals are always scored on
            the expressed ones, as silent genes are covered for free.
        n_permutations, n_bootstrap: of :func:`~pyrocausal.evaluate.score_panel`.
        processes: jobs at a time, each with one thread; above 1, call it under ``if __name__ == "__main__":`` in a script.
        progress: show a line for each job; by default, if standard error is a terminal. A function is given the line.
        name: of the screen, in the report's title.

    Raises:
        PyrocausalError: for names, settings and splits that cannot be run, before anything is.
    """
    from pyrocausal.benchmark_page import write
    from pyrocausal.benchmark_paired import assemble, paired_table
    from pyrocausal.benchmark_score import Options, metrics_of

    out = Path(out)
    check_out(out)
    if processes < 1:
        raise DataError(f"processes={processes} was given; give how many jobs to run at a time, at least 1")
    if genes not in ("expressed", "all"):
        raise DataError(f"genes={genes!r} was given; it is 'expressed' or 'all'")
    metrics_of(tuple(presets), data.kind == "counts")
    options = Options(tuple(presets), draws, cells, max_epochs, min_cells, drop_targets, genes, n_permutations, n_bootstrap)
    jobs = plan(data, models, splits, seeds, options)
    out.mkdir(parents=True, exist_ok=True)
    facts = {j.key: {"model": j.model, "split": j.split, "seed": j.seed, "unit": j.unit, "facts": dict(j.facts)} for j in jobs}
    write_json(out / FACTS, {"version": importlib.metadata.version("pyrocausal"), "options": asdict(options), "jobs": facts})
    folder = out / "jobs"
    folder.mkdir(exist_ok=True)
    run_all(data, [j for j in jobs if read(folder, j) is None], options, folder, processes, speaker(progress), len(jobs))
    table, values = assemble(jobs, [read(folder, j) or {} for j in jobs])
    result = Benchmark(table, paired_table(table, values), out)
    write(result, values, name, repr(data))
    return result


# -- what to run ---------------------------------------------------------------------------------------------------------------


def check_out(out: Path) -> None:
    """Refuse a folder that holds anything but an earlier benchmark."""
    if out.exists() and not (out.is_dir() and (not any(out.iterdir()) or (out / FACTS).is_file())):
        raise DataError(f"{str(out)!r} exists and is not the folder of an earlier benchmark; give another folder")


def plan(data: PerturbationData, models: Models, splits: Sequence[Mapping[str, Any]], seeds: Sequence[int], options: Options) -> list[Job]:
    """All jobs, in the order of the table: by split and seed; duplicates, baselines, then models by name."""
    from pyrocausal.benchmark_score import SCALE, TEST
    from pyrocausal.splits import split as make_split

    asked = _asked(models)
    if not splits or not len(seeds) or len(set(seeds)) < len(seeds):
        raise DataError(f"{len(splits)} splits and seeds {list(seeds)} were given; give one or more of each, each seed once")
    names = [_split_name(s) for s in splits]
    if len(set(names)) < len(names):
        raise DataError("a split was given twice; give each once")
    digest, plain = _digest(data), unit_of(data)
    always = {name: asked.pop(name, (name, {})) for name in BASELINES}  # perhaps with settings of the user's
    baselines = always | {k: asked.pop(k) for k in sorted(asked) if _baseline(asked[k][0])}
    given = {name: LOG if data.kind == "counts" and _normalised(entry) else plain for name, (entry, _) in asked.items()}
    units = [plain, *([LOG] if LOG in given.values() else [])]
    first: list[tuple[str, str, str | Make, dict[str, Any]]] = [(name, "duplicate", name, {}) for name in DUPLICATES]
    first += [(k, "baseline", *v) for k, v in baselines.items()]
    every = [(*job, unit) for unit in units for job in first] + [(k, "model", *asked[k], given[k]) for k in sorted(asked)]
    version = importlib.metadata.version("pyrocausal")
    jobs = []
    for name, settings in zip(names, splits, strict=True):
        for seed in seeds:
            facts = make_split(data, **({"seed": int(seed)} | dict(settings))).facts()
            for model, role, entry, own, unit in every:
                what = [model, _plain(entry), _plain(own), facts, int(seed), unit, asdict(options), digest, version]
                if entry in ENTRIES and ENTRIES[entry].published:
                    what.append(_plain(ENTRIES[entry].training))
                if unit == plain and data.kind == "counts":  # how counts are measured and tested has changed
                    what += [SCALE, *([TEST] if role == "duplicate" else [])]
                key = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:24]
                jobs.append(Job(model, role, entry, own, name, facts, int(seed), unit, key))
    return jobs


def _asked(models: Models) -> dict[str, tuple[str | Make, dict[str, Any]]]:
    pairs = models.items() if isinstance(models, Mapping) else [(name, name) for name in models]
    out: dict[str, tuple[str | Make, dict[str, Any]]] = {}
    for name, value in pairs:
        entry, settings = value if isinstance(value, tuple) else (value, {})
        if isinstance(entry, str):
            if entry not in ENTRIES:
                raise PyrocausalError(f"there is no model {entry!r}{nearest(entry, ENTRIES)}")
            if unknown := [s for s in settings if not accepts(entry, s)]:
                raise PyrocausalError(f"{entry} has no setting {unknown[0]!r}; see pc.build and the model's own arguments")
        elif not callable(entry):
            raise PyrocausalError(f"the entry of {name!r} is {type(entry).__name__}; give a name of the collection or a function")
        if name in out or name in DUPLICATES or (name in BASELINES and entry != name):
            raise PyrocausalError(f"the name {name!r} is taken in the table; give the model another, in a mapping")
        out[name] = (entry, dict(settings))
    return out


def _baseline(entry: str | Make) -> bool:
    return isinstance(entry, str) and ENTRIES[entry].model == "Baseline"


def _normalised(entry: str | Make) -> bool:
    """Whether an entry is fitted to log-normalised data: as the collection says, or the function's own attribute ``data_kind``."""
    return getattr(ENTRIES[entry] if isinstance(entry, str) else entry, "data_kind", "any") == "normalised"


def _split_name(settings: Mapping[str, Any]) -> str:
    rest = ", ".join(f"{k}={_short(v)}" for k, v in settings.items() if k != "by")
    return str(settings.get("by", "cells")) + (f" ({rest})" if rest else "")


def _short(value: Any) -> str:
    text = str(value) if isinstance(value, (str, int, float)) else ",".join(map(str, value))
    return text if len(text) <= 40 else f"{text[:30]}...{hashlib.sha256(text.encode()).hexdigest()[:6]}"


def _plain(value: Any) -> Any:
    """A setting as JSON; arrays and tables by digest, functions by name."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, (pd.DataFrame, pd.Series)):
        return [_plain(value.to_numpy()), [str(i) for i in value.index], [str(c) for c in getattr(value, "columns", [])]]
    if isinstance(value, (np.ndarray, torch.Tensor)):
        array = np.ascontiguousarray(value)
        return [str(array.dtype), list(array.shape), hashlib.sha256(array.tobytes()).hexdigest()]
    if isinstance(value, PerturbationData):
        return _digest(value)
    if callable(value):
        return f"{value.__module__}.{value.__qualname__}"
    return value if isinstance(value, (str, int, float, bool, type(None))) else repr(value)


def _digest(data: PerturbationData) -> str:
    """Of everything that a fit or a score can depend on."""
    found = hashlib.sha256()
    x, dose = data.x, data.dose
    arrays = [x.data, x.indices, x.indptr] if hasattr(x, "indptr") else [np.ascontiguousarray(x)]
    arrays += [dose.data, dose.indices, dose.indptr, data.batch_codes]
    arrays += [a for a in (data.time, data.path, data.path_times, data.course) if a is not None]
    for array in arrays:
        found.update(f"{array.dtype}{array.shape}".encode() + array.tobytes())
    names = [list(map(str, n)) for n in (data.labels, data.cells, data.genes, data.perturbations, data.batches)]
    found.update(json.dumps([names, data.kind, data.control, data.separator, data.modality]).encode())
    return found.hexdigest()
