"""The table of ``goals.py``: what a row asks, how it is answered from results, and how sure that is.

A *unit* is one world (a simulated screen of one seed, or one split of a real one) and everything that is fitted to it. It returns
*records*: dictionaries with ``method``, ``metric``, ``num`` and ``den`` (default 1), whose value is ``num / den``. A record with ``error``
stands for a method that failed, and takes the worst value there is: nothing is clipped or dropped.

A :class:`Row` reduces the records of its unit over worlds. The 95 % interval is of a bootstrap over worlds, all methods of a world
together, so that ratios and differences are paired.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd

Records = list[dict[str, Any]]
Statistic = Literal["mean", "median", "p90", "pooled", "gap"]
DRAWS = 2000
NOMINAL = 0.9  # of intervals
FEWEST = 200  # entries of a stratum that is judged


@dataclass(frozen=True)
class Unit:
    """A family of worlds: ``run(seed, quick)`` gives the records of one."""

    name: str
    run: Callable[[int, bool], Records]
    worlds: int


@dataclass(frozen=True)
class Row:
    """A part of a goal.

    Attributes:
        statistic: over worlds: ``mean``, ``median``, ``p90`` of ``num / den``; ``pooled``: sum of num over sum of den; ``gap``: the
            largest ``|pooled - .9|`` over all metrics ``metric/<stratum>`` with 200 entries or more.
        against: methods whose best value the statistic is read against, as a ``"ratio"`` or a ``"difference"``.
        bar: (least, most); None where there is none. No bar at all: the row is reported and has no verdict.
        lower: whether less is better (it decides the worst value, and the best opponent).
        why: for a row that cannot be run: the reason.
    """

    goal: str
    task: str
    unit: str = ""
    metric: str = ""
    ours: str = ""
    statistic: Statistic = "mean"
    against: tuple[str, ...] = ()
    relation: Literal["", "ratio", "difference"] = ""
    bar: tuple[float | None, float | None] = (None, None)
    lower: bool = True
    opponents: tuple[str, ...] = ()
    why: str = ""


def attempt(method: str, metric: str, answer: Callable[[], Iterable[tuple[str, float, float]]]) -> Records:
    """Records of one method from (metric, num, den); if it raises, one that says why, for all metrics whose name starts with ``metric``."""
    try:
        return [{"method": method, "metric": m, "num": float(num), "den": float(den)} for m, num, den in answer()]
    except Exception as error:  # a failure is a result
        return [{"method": method, "metric": metric, "num": np.nan, "error": f"{type(error).__name__}: {error}"}]


def lines(rows: Sequence[Row], results: dict[str, list[Records]], planned: dict[str, int]) -> pd.DataFrame:
    """The printed table: one line for each row."""
    out = []
    for row in rows:
        worlds = results.get(row.unit, [])
        line: dict[str, Any] = {
            "goal": row.goal,
            "task": row.task,
            "measured": "",
            "95 %": "",
            "bar": bar_text(row),
            "verdict": "",
            "values": "",
        }
        if row.why or not worlds:
            out.append(line | {"verdict": f"not run: {row.why or 'no results yet'}"})
            continue
        value, low, high = measured(row, worlds)
        verdict = judge(row, value, low, high)
        if 0 < len(worlds) < planned[row.unit] and verdict:
            verdict += f" ({len(worlds)} of {planned[row.unit]} worlds)"
        failures = [
            r["error"] for w in worlds for r in w if r["method"] == row.ours and "error" in r and row.metric.startswith(r["metric"])
        ]
        verdict += f"; failed in {len(failures)} of {len(worlds)} worlds: {failures[0][:60]}" if failures else ""
        others = ", ".join(f"{m} {number(value_of(row, worlds, m))}" for m in (row.ours, *opponents_of(row)))
        out.append(line | {"measured": number(value), "95 %": f"{number(low)} to {number(high)}", "values": others, "verdict": verdict})
    return pd.DataFrame(out)


def printed(table: pd.DataFrame) -> str:
    """Two lines for each row: what was asked and how it ended; then the statistic of whoever answers, and of the opponents."""
    out = []
    for goal, part in table.groupby("goal", sort=False):
        out.append(f"\n{goal}  {'task':<78} {'measured':>9}  {'95 %':<18} {'bar':<48} verdict")
        for line in part.to_dict("records"):
            out.append(f"    {line['task']:<78} {line['measured']:>9}  {line['95 %']:<18} {line['bar']:<48} {line['verdict']}")
            out += [f"        {line['values']}"] if line["values"] else []
    return "\n".join(out)


def measured(row: Row, worlds: list[Records], seed: int = 0) -> tuple[float, float, float]:
    """Value of a row and the ends of its interval (NaN of a single world)."""
    value = read(row, worlds)
    if len(worlds) < 2:
        return value, np.nan, np.nan
    rng = np.random.default_rng(seed)
    tables = {m: tabled(row, worlds, m) for m in (row.ours, *row.against)}
    draws = [related(row, tables, rng.integers(len(worlds), size=len(worlds))) for _ in range(DRAWS)]
    low, high = np.quantile(np.nan_to_num(draws, nan=worst(row)), [0.025, 0.975], method="nearest")
    return value, float(low), float(high)


def read(row: Row, worlds: list[Records]) -> float:
    """Value of a row over all worlds."""
    return related(row, {m: tabled(row, worlds, m) for m in (row.ours, *row.against)}, np.arange(len(worlds)))


def value_of(row: Row, worlds: list[Records], method: str) -> float:
    """The statistic of one method, against nobody."""
    return reduced(row, tabled(row, worlds, method), np.arange(len(worlds)))


def related(row: Row, tables: dict[str, np.ndarray], which: np.ndarray) -> float:
    """The statistic of ours in the worlds ``which``, read against the best opponent."""
    value = reduced(row, tables[row.ours], which)
    if not row.against:
        return value
    others = [reduced(row, tables[m], which) for m in row.against]
    best = np.nanmin(others) if row.lower else np.nanmax(others)
    if not np.isfinite(best):
        return value if np.isnan(best) else worst(row)
    return float(value / best if row.relation == "ratio" else value - best)


def tabled(row: Row, worlds: list[Records], method: str) -> np.ndarray:
    """``num`` and ``den`` of a method, [2, n_worlds, n_metrics]; NaN where it has no record, the worst where it failed."""
    strata = row.statistic == "gap"
    names = sorted({r["metric"] for w in worlds for r in w if r["metric"].startswith(row.metric + "/")}) if strata else [row.metric]
    place = {m: i for i, m in enumerate(names)}
    out = np.full((2, len(worlds), len(names)), np.nan)
    for w, records in enumerate(worlds):
        for r in records:
            if r["method"] == method and "error" in r:
                hit = [i for m, i in place.items() if m.startswith(r["metric"])]
                out[:, w, hit] = np.array([worst(row), 1.0])[:, None]
            elif r["method"] == method and r["metric"] in place:
                entry = np.array([r["num"] if np.isfinite(r["num"]) else worst(row), r.get("den", 1.0)])
                i = place[r["metric"]]
                out[:, w, i] = np.where(np.isnan(out[:, w, i]), entry, out[:, w, i] + entry)  # several records of a metric add up
    return out


def reduced(row: Row, table: np.ndarray, which: np.ndarray) -> float:
    num, den = table[:, which]
    if row.statistic in ("pooled", "gap"):
        total, size = np.nansum(num, 0), np.nansum(den, 0)
        with np.errstate(invalid="ignore", divide="ignore"):
            share = total / size
        if row.statistic == "pooled":
            return float(share[0])
        kept = size >= FEWEST
        return float(np.abs(share[kept] - NOMINAL).max()) if kept.any() else np.nan
    with np.errstate(invalid="ignore", divide="ignore"):
        each = (num / den)[:, 0]
    each = each[~np.isnan(each)]
    if not len(each):
        return np.nan
    if row.statistic == "mean":
        return float(each.mean())
    return float(
        np.quantile(each, 0.5 if row.statistic == "median" else 0.9, method="median_unbiased" if np.isfinite(each).all() else "higher")
    )


def judge(row: Row, value: float, low: float, high: float) -> str:
    """``stands`` if value and interval keep the bar, ``falls short`` otherwise."""
    least, most = row.bar
    if least is None and most is None:
        return "reported"

    def keeps(v: float) -> bool:
        return bool((least is None or v >= least) and (most is None or v <= most))

    if not keeps(value):
        return "falls short"
    if np.isnan(low):
        return "no verdict: the value keeps the bar, one world has no interval"
    return "stands" if keeps(low) and keeps(high) else "falls short: the value keeps the bar, its interval does not"


def worst(row: Row) -> float:
    return np.inf if row.lower else 0.0


def opponents_of(row: Row) -> list[str]:
    return list(dict.fromkeys((*row.against, *row.opponents)))


def bar_text(row: Row) -> str:
    least, most = row.bar
    text = f"{least:g} to {most:g}" if least is not None and most is not None else f">= {least:g}" if least is not None else ""
    text = f"<= {most:g}" if least is None and most is not None else text
    return f"{text} {row.relation} to best of {', '.join(row.against)}".strip() if row.relation else text


def number(v: float) -> str:
    return "-" if np.isnan(v) else f"{v:.3g}" if abs(v) < 100 else f"{v:.0f}"
