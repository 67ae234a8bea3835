"""The goals M2 to M7 as one table: what stands, what falls short, and by how much.

    python benchmarks/goals.py                          runs what is missing, then prints the table (hours; a killed run resumes)
    python benchmarks/goals.py --table                  prints the table of the results that are there
    python benchmarks/goals.py --only M7 --csv benchmarks/goals.csv    brings a table up to date: what was not run here stays as it is
    python benchmarks/goals.py --only M4 --worlds 3     the first three worlds of the units behind M4
    python benchmarks/goals.py --development --quick     other seeds, short fits: to try the code, never to quote
    python benchmarks/goals.py --shard 1/2              one of two processes that share the work

Rules, the same for every row:

1. What is held out is a perturbation or a pair, never cells; pairs with an unseen gene are not trained on.
2. Own targets of the scored perturbation do not count. Sets of genes and strata are declared by the truth, or by training cells.
3. Settings were chosen on seeds from 1000 on, for opponents too; the seeds of the table, below 1000, are drawn by ``DRAW``, which was set
   when the code was done. To draw others is to run another table: a first one of M2 to M4 had been printed when ``scm`` joined the
   collection, whose units then got new names, from which seeds are drawn.
4. A method that fails in a world takes the worst value there. Nothing is clipped, no world is left out.
5. Every value has a 95 % interval, of a bootstrap over worlds (splits, for a real screen, which are not independent: too narrow). A
   goal stands if value *and* interval keep the bar; it is read against the best opponent, whoever that is in each resample.
6. Which model answers is said in the row beforehand; the other entries of the collection are printed as opponents.

Units (worlds of one family, everything fitted to each) are in ``goals_worlds.py``, ``goals_pairs.py``, ``goals_screens.py`` and
``goals_real.py``; each world's records are written to ``runs/goals/<seeds>/<unit>/<seed>.json``. Real screens: ``PYROCAUSAL_DATA``.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
import warnings
import zlib
from pathlib import Path

import numpy as np
import pandas as pd
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

import goals_pairs
import goals_real
import goals_screens
import goals_worlds
from goals_table import Records, Row, Unit, lines, printed

DRAW = 20261121  # of the seeds of the table
DEVELOPMENT = 1000  # first of the other seeds
UNITS: list[Unit] = [*goals_worlds.UNITS, *goals_pairs.UNITS, *goals_screens.UNITS, *goals_real.UNITS]
ROWS: list[Row] = sorted([*goals_worlds.ROWS, *goals_pairs.ROWS, *goals_screens.ROWS, *goals_real.ROWS], key=lambda r: r.goal)


def seeds_of(unit: Unit, development: bool = False) -> list[int]:
    """Seeds of the worlds of a unit: the same whatever else is run."""
    if development:
        return [DEVELOPMENT + i for i in range(unit.worlds)]
    rng = np.random.default_rng([DRAW, zlib.crc32(unit.name.encode())])
    return [int(s) for s in rng.permutation(DEVELOPMENT)[: unit.worlds]]


def world(unit: Unit, seed: int, path: Path, quick: bool) -> Records:
    """The records of one world, from its file if it has one. A unit that raises is a record that says why."""
    if path.exists():
        return list(json.loads(path.read_text())["records"])
    start = time.perf_counter()
    try:
        records = unit.run(seed, quick)
    except FileNotFoundError as error:  # a real screen that is not there: nothing was run
        print(f"{unit.name}: {error}", flush=True)
        return []
    seconds = time.perf_counter() - start
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps({"unit": unit.name, "seed": seed, "seconds": round(seconds, 1), "records": records}, indent=0))
    part.replace(path)
    failed = [r["method"] for r in records if "error" in r]
    print(f"{unit.name}, seed {seed}: {seconds:.0f} s" + (f"; failed: {', '.join(failed)}" if failed else ""), flush=True)
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=sorted({r.goal for r in ROWS}), help="goals")
    parser.add_argument("--units", nargs="+", choices=[u.name for u in UNITS])
    parser.add_argument("--worlds", type=int, help="at most so many worlds of each unit")
    parser.add_argument("--table", action="store_true", help="run nothing")
    parser.add_argument("--details", action="store_true", help="every metric of every method as well, pooled over worlds")
    parser.add_argument("--development", action="store_true", help=f"seeds from {DEVELOPMENT} on")
    parser.add_argument("--quick", action="store_true", help="a tenth of the training steps")
    parser.add_argument("--shard", type=lambda s: tuple(int(v) for v in s.split("/")), default=(1, 1), metavar="I/N")
    parser.add_argument("--out", type=Path, default=Path("runs/goals"))
    parser.add_argument("--csv", type=Path, help="a table of before, to be brought up to date with what was run here")
    a = parser.parse_args()
    if a.csv is not None and (a.quick or a.development):
        parser.error("--csv is for results that may be quoted, which those of --quick and --development are not")
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    rows = [r for r in ROWS if (not a.only or r.goal in a.only) and (not a.units or r.unit in a.units)]
    wanted = {r.unit for r in rows}
    folder = a.out / (("development" if a.development else f"draw-{DRAW}") + ("-quick" if a.quick else ""))
    results: dict[str, list[Records]] = {}
    job = 0
    for unit in (u for u in UNITS if u.name in wanted):
        results[unit.name] = []
        for seed in seeds_of(unit, a.development)[: a.worlds]:
            path = folder / unit.name / f"{seed}.json"
            job += 1
            mine = not a.table and job % a.shard[1] == a.shard[0] % a.shard[1]
            if not mine and not path.exists():
                continue
            try:
                records = world(unit, seed, path, a.quick)
            except Exception:  # the others go on; the row says that worlds are missing
                traceback.print_exc()
                continue
            results[unit.name] += [records] if records else []
    table = lines(rows, results, {u.name: u.worlds for u in UNITS})
    print(printed(table))
    folder.mkdir(parents=True, exist_ok=True)
    table.to_csv(folder / "table.csv", index=False)
    if a.csv is not None:
        up_to_date(a.csv, table, [(r.goal, r.task) for r in ROWS]).to_csv(a.csv, index=False)
    counted = table["verdict"].str.extract("^(stands|falls short|not run|no verdict|reported)")[0].value_counts()
    print("\n" + ", ".join(f"{n} {k}" for k, n in counted.items()))
    if a.details:
        print(details(results))


def up_to_date(path: Path, table: pd.DataFrame, order: list[tuple[str, str]]) -> pd.DataFrame:
    """The rows of ``table`` that have results, and those of the file for all others, in the order of the goals."""
    key = ["goal", "task"]
    old = pd.read_csv(path, dtype=str, keep_default_na=False).set_index(key) if path.exists() else table.iloc[:0].set_index(key)
    new = table.astype(str).set_index(key)
    kept = [k for k in order if k in old.index and (k not in new.index or new.loc[k, "verdict"].startswith("not run: no results"))]
    merged = pd.concat([new.drop(index=[k for k in kept if k in new.index]), old.loc[kept]])
    return merged.loc[[k for k in order if k in merged.index]].reset_index()


def details(results: dict[str, list[Records]]) -> str:
    """Every metric, sum of num over sum of den."""
    flat = [r | {"unit": u} for u, worlds in results.items() for w in worlds for r in w if "error" not in r]
    table = pd.DataFrame(flat)
    table["den"] = table["den"].fillna(1.0) if "den" in table else 1.0
    total = table.groupby(["unit", "metric", "method"], sort=False)[["num", "den"]].sum()
    return (total["num"] / total["den"]).unstack("method").round(4).to_string(na_rep="")


if __name__ == "__main__":
    main()
