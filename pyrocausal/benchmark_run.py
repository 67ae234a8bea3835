"""How the jobs of a benchmark are run: one after the other or in processes, each to a file of its own, whole or not at all."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pyrocausal.collection import ENTRIES, build
from pyrocausal.data import PerturbationData
from pyrocausal.epoch import BATCH_SIZE, default_epochs, steps_per_epoch
from pyrocausal.errors import InterventionError, PyrocausalError
from pyrocausal.fit import Fit, fit

if TYPE_CHECKING:
    from pyrocausal.benchmark_score import Options

Make = Callable[..., Any]
BASELINES = tuple(name for name, entry in ENTRIES.items() if entry.model == "Baseline")
DUPLICATES = ("technical_duplicate", "interpolated_duplicate")


@dataclass(frozen=True)
class Job:
    """One cell of the benchmark; ``unit`` is that of the data it is fitted to, ``facts`` are those of its split."""

    model: str
    role: str
    entry: str | Make
    settings: Mapping[str, Any]
    split: str
    facts: Mapping[str, Any]
    seed: int
    unit: str
    key: str


def unit_of(data: PerturbationData) -> str:
    return "log1p_cp10k" if data.kind == "counts" else "data"


def run_job(data: PerturbationData, job: Job, options: Options) -> dict[str, Any]:
    """Fit, ask, score: the content of the job's file. A failure is a result, with its reason in one sentence."""
    from pyrocausal.benchmark_score import ask, judge, score
    from pyrocausal.splits import again

    start = time.perf_counter()
    split = again(data, dict(job.facts))
    panels = judge(data, split, options, job.seed)
    out: dict[str, Any] = {"status": "ok", "conditions": list(panels.names)}
    try:
        if job.model in DUPLICATES:
            answer = panels.duplicates[job.model]
        else:
            train, validation, _ = split.parts(data)
            answer = ask(_fitted(job, train, validation, panels.names, options), panels, options, job.seed)
        out["rows"], out["values"] = score(answer, panels, options, job.seed)
        out["note"] = answer.note
    except Exception as error:
        kind = "" if isinstance(error, PyrocausalError) else f"{type(error).__name__}: "
        out |= {"status": "failed", "note": (kind + " ".join(str(error).split()))[:400], "rows": [], "values": {}}
    return out | {"seconds": round(time.perf_counter() - start, 2)}


def _fitted(job: Job, train: PerturbationData, validation: PerturbationData | None, names: tuple[str, ...], options: Options) -> Fit:
    training: dict[str, Any] = {"batch_size": BATCH_SIZE}
    if isinstance(job.entry, str):
        training, pair = ENTRIES[job.entry].training, build(job.entry, train, seed=job.seed, **job.settings)
    else:
        pair = job.entry(train, seed=job.seed, **job.settings)
        if isinstance(pair, Fit):
            return pair
    _can_answer(pair[0], train, names)
    epochs = options.max_epochs or default_epochs(steps_per_epoch(pair[0], train, training["batch_size"]))
    fitted = fit(*pair, train, max_epochs=epochs, validation=validation, seed=job.seed, progress=False, **training)
    if fitted.stopped == "interrupted":  # a fit keeps what it has; a job is done or not done
        raise KeyboardInterrupt
    return fitted


def _can_answer(model: Any, train: PerturbationData, names: tuple[str, ...]) -> None:
    """Refuse, before a fit, a model that can answer none of the held-out conditions."""
    trained = set(train.perturbations[train.cells_per_perturbation > 0])
    lacking = [[p for p in name.split(train.separator) if p not in trained] for name in names]
    if all(lacking) and not getattr(model, "answers_unseen", False):
        raise InterventionError(
            f"no training cell received {lacking[0][0]!r}, and the same holds of every held-out condition; take a model with an embedding"
        )


def run_all(
    data: PerturbationData, jobs: list[Job], options: Options, folder: Path, processes: int, say: Callable[[str], object], total: int
) -> None:
    done = total - len(jobs)
    if done:
        say(f"{done} of {total} jobs are done already")
    if processes == 1 or not jobs:
        work = _Worker(data, options, folder)
        for i, job in enumerate(jobs):
            with _one_thread():
                line = work(job)
            say(f"[{done + i + 1}/{total}] {line}")
        return
    with _environment(), ExitStack() as stack:
        pool = ProcessPoolExecutor(min(processes, len(jobs)), get_context("spawn"), _start, (data, options, folder))
        stack.callback(pool.shutdown, wait=False, cancel_futures=True)
        futures = [pool.submit(_work, job) for job in jobs]
        try:
            for i, future in enumerate(as_completed(futures)):
                say(f"[{done + i + 1}/{total}] {future.result()}")
        except BaseException:
            for process in list((getattr(pool, "_processes", None) or {}).values()):
                process.terminate()
            raise


class _Worker:
    """Runs jobs in one process; keeps the data of each unit."""

    def __init__(self, data: PerturbationData, options: Options, folder: Path) -> None:
        self.data, self.options, self.folder = {unit_of(data): data}, options, folder

    def __call__(self, job: Job) -> str:
        if job.unit not in self.data:
            self.data[job.unit] = next(iter(self.data.values())).log_normalised()
        result = run_job(self.data[job.unit], job, self.options)
        write_json(self.folder / f"{job.key}.json", {"key": job.key} | result)
        said = f"{job.model}, {job.split}, seed {job.seed}: {result['status']} in {result['seconds']:.1f} s"
        return said + (f" ({result['note']})" if result["status"] == "failed" else "")


_worker: list[_Worker] = []  # of a process of the pool


def _start(data: PerturbationData, options: Options, folder: Path) -> None:
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the parent, which ends its workers
    end_with_parent()
    torch.set_num_threads(1)
    _worker[:] = [_Worker(data, options, folder)]


def end_with_parent(every: float = 2.0) -> None:
    """End this process soon after its parent, which may be killed without a word: what is half done is not written."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(every)
        os._exit(1)

    Thread(target=watch, daemon=True).start()


def _work(job: Job) -> str:
    return _worker[0](job)


@contextmanager
def _one_thread() -> Iterator[None]:
    """As in a worker: sums over several threads differ in their last bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with ExitStack() as stack:
        stack.callback(torch.set_num_threads, threads)
        with suppress(ImportError):  # those of NumPy; without the package, OMP_NUM_THREADS=1 does it
            stack.enter_context(import_module("threadpoolctl").threadpool_limits(1))
        yield


@contextmanager
def _environment() -> Iterator[None]:
    """One thread for the workers, whose libraries read this when they start."""
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    before = {k: os.environ.get(k) for k in names}
    os.environ.update(dict.fromkeys(names, "1"))
    try:
        yield
    finally:
        for k, value in before.items():
            os.environ.pop(k) if value is None else os.environ.update({k: value})


def speaker(progress: bool | Callable[[str], object] | None) -> Callable[[str], object]:
    if callable(progress):
        return progress
    shown = sys.stderr.isatty() if progress is None else progress
    return (lambda line: print(line, file=sys.stderr, flush=True)) if shown else (lambda line: None)


def read(folder: Path, job: Job) -> dict[str, Any] | None:
    """The result of a job; None if it has none (or a file that is not one)."""
    try:
        found = json.loads((folder / f"{job.key}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and found.get("key") == job.key else None


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(json.dumps(content, default=_number), encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _number(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else str(value)
