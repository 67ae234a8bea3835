"""Many interventions at once: ``pc.effects`` against a loop of ``pyro.infer.Predictive`` over ``pyro.do``; and its memory.

    python benchmarks/interventions.py

200 interventions (25 singles, 175 pairs), 10 cells, 299 genes, SAMS-VAE at its default size. Both sides are given the same posterior draws
and the same fresh cells, and must give the same numbers (checked). Process CPU time, one thread, interleaved rounds, median of the
ratios. The loops:

- ``Predictive``: one call for each intervention, its draws one after the other (Pyro's default);
- ``Predictive(parallel=True)``: one call for each intervention, its draws at once.

Memory is the peak resident size of a fresh process during the call, above what was resident before it and without the result itself.
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyro
import torch
from pyro.infer import Predictive

import pyrocausal as pc
from pyrocausal import query

N_PERTURBATIONS, N_GENES, CELLS = 25, 299, 10


def fitted() -> pc.Fit:
    adata = pc.simulate.svae_screen(n_perturbations=N_PERTURBATIONS, n_latent=10, cells_per_perturbation=20, n_genes=N_GENES, n_control=100)
    data = pc.PerturbationData.from_anndata(adata)
    return pc.fit(*pc.build("sams_vae", data, turns=()), data, max_epochs=1, progress=False)


def questions(n: int) -> dict[str, pc.interventions.Intervention]:
    """n interventions: all singles, then pairs."""
    names = [f"pert{i:02d}" for i in range(N_PERTURBATIONS)]
    singles = [pc.perturb(a) for a in names]
    pairs = [pc.perturb(a) & pc.perturb(b) for a, b in itertools.combinations(names, 2)]
    return {str(i): i for i in (singles + pairs)[:n]}


def by_predictive(fit: pc.Fit, acts: dict[str, Any], draws: int, parallel: bool) -> np.ndarray:
    """The same answer by plain Pyro, [K, S, G]: the draws and cells of ``pc.effects(..., seed=0)``, one intervention after the other."""
    with query._seeded(0, fit):
        query._reseed(0, 0)
        base = query._fresh(fit, draws, CELLS)
    samples = {name: value[:, 0] for name, value in base.values.items()}  # tables [S, 1, P, D], z [S, n, D]
    names = fit.coords["perturbation"]
    out = []
    for act in acts.values():
        dose = torch.zeros(1, len(names))
        for name, amount in act.doses:
            dose[0, names.index(name)] = amount
        intervened = pyro.do(fit.model, data={"dose": dose})
        with torch.no_grad():
            mean = Predictive(intervened, posterior_samples=samples, return_sites=["x_loc"], parallel=parallel)(base.batch)["x_loc"]
        out.append((1e4 * (mean / base.batch.library_size).mean(-2)).log1p().numpy().reshape(draws, -1))
    return np.stack(out)


def cpu(call: Callable[[], Any]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def compare(fit: pc.Fit, n: int, draws: int, rounds: int) -> list[dict[str, Any]]:
    """Rows of the table for one number of draws. The slow loop is timed on a tenth of the interventions where it has many draws."""
    acts = questions(n)
    some = dict(list(acts.items())[: n if draws == 1 else max(1, n // 10)])

    def ours() -> np.ndarray:
        return pc.effects(fit, acts, draws=draws, cells=CELLS)["expression"].to_numpy()

    expected = ours()
    loops = {
        "Predictive": (lambda: by_predictive(fit, some, draws, parallel=False), some),
        "Predictive(parallel=True)": (lambda: by_predictive(fit, acts, draws, parallel=True), acts),
    }
    seconds: dict[str, list[float]] = {"pc.effects": [], **{name: [] for name in loops}}
    worst = {name: float(np.abs(loop() - expected[: len(of)]).max()) for name, (loop, of) in loops.items()}
    assert np.ptp(expected, axis=0).max() > 0.01, "the interventions do nothing"
    assert max(worst.values()) < 1e-4, f"the loops do not give the same numbers: {worst}"
    for _ in range(rounds):
        seconds["pc.effects"].append(cpu(ours))
        for name, (loop, of) in loops.items():
            seconds[name].append(cpu(loop) * n / len(of))
    return [
        {
            "interventions": n,
            "draws": draws,
            "how": name,
            "cpu_ms": 1e3 * median(times),
            "ratio": median(a / b for a, b in zip(times, seconds["pc.effects"], strict=True)),
            "difference": worst.get(name, 0.0),
        }
        for name, times in seconds.items()
    ]


def resident() -> int:
    """Bytes of this process in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def memory_of(n: int, draws: int) -> dict[str, float]:
    """Run in a fresh process: peak of one call above what was there before, in MiB."""
    torch.set_num_threads(1)
    fit, acts = fitted(), questions(n)
    pc.effects(fit, dict(list(acts.items())[:2]), draws=2, cells=CELLS)  # lazy imports and the trial run are not the call's
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = resident()
    result = pc.effects(fit, acts, draws=draws, cells=CELLS)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    size = sum(v.nbytes for v in result.data_vars.values())
    return {"peak": (peak - before) / 2**20, "result": size / 2**20, "beyond": (peak - before - size) / 2**20}


def in_a_fresh_process(n: int, draws: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--memory", str(n), str(draws)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--interventions", type=int, default=200)
    parser.add_argument("--memory", type=int, nargs=2, metavar=("K", "DRAWS"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.memory:
        print(json.dumps(memory_of(*given.memory)))
        return
    torch.set_num_threads(1)
    fit = fitted()
    print(f"{given.interventions} interventions x {CELLS} cells x {N_GENES} genes, CPU time, median of {given.rounds} rounds")
    print(f"{'draws':>5}  {'how':<26}{'CPU ms':>10}{'ratio':>9}{'max difference':>17}")
    for draws in (1, 20):
        for row in compare(fit, given.interventions, draws, given.rounds):
            print(f"{row['draws']:>5}  {row['how']:<26}{row['cpu_ms']:>10.1f}{row['ratio']:>9.1f}{row['difference']:>17.1e}")
    print("\npeak memory of one call, MiB (20 draws)")
    print(f"{'K':>5}{'peak':>10}{'result':>10}{'beyond the result':>20}")
    rows = {k: in_a_fresh_process(k, 20) for k in (50, 200)}
    for k, row in rows.items():
        print(f"{k:>5}{row['peak']:>10.1f}{row['result']:>10.1f}{row['beyond']:>20.1f}")
    print(f"ratio of the memory beyond the result, K = 200 against 50: {rows[200]['beyond'] / rows[50]['beyond']:.2f}")


if __name__ == "__main__":
    main()
