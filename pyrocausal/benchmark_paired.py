"""The table of a benchmark, and the test of every model against the best baseline.

For a model, a split, a unit and a metric, with ``u`` its value for condition p under seed s and ``b`` that of the best baseline::

    d_ps = u_ps - b_ps (of an error: b_ps - u_ps)       positive: the model is better
    d_p  = mean of d_ps over the seeds that hold p out,      difference = mean of d_p over conditions

The best baseline is that whose value in the table has the best mean over seeds: chosen with the test's own data, in favour of the baseline,
once for all models. Conditions are the clusters, whatever the number of seeds: the 95 % interval is the percentile bootstrap over d_p, the
p-value that of flipping the signs of d_p (all flips up to 13 conditions, else 9,999 random ones; two-sided). A model *wins* or *loses* if
the interval excludes 0 and p is at most .05, and is *not distinguishable* otherwise: with fewer than six conditions always.

Cannot see: that conditions share the fit, the training controls and, of pairs, their parts; nor that many tests are made side by side (no
correction for it).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from pyrocausal.benchmark_run import DUPLICATES, Job

LEVEL = 0.05
EXACT = 13  # most conditions of which all flips of signs are gone through
FLIPS, RESAMPLES = 9999, 2000
WINS, LOSES, LEVEL_WITH = "wins", "loses", "not distinguishable"
NOT_TESTED = ("coverage", "coverage_responsive", "coverage_quiet")  # neither high nor low is better
COLUMNS = ["model", "role", "split", "unit", "seed", "metric", "convention", "higher", "n", "n_failed", "value", "b", "r", "s", "null",
           "null_p", "low", "high", "s_low", "s_high", "drf", "bds", "admitted", "status", "note"]  # fmt: skip
SHARED = ("convention", "higher", "b", "r", "drf", "bds", "admitted", "best", "worst")  # of a metric, whatever the model
ADMISSION = ("drf", "bds", "admitted")
TIMES = ["split", "unit", "seed"]


class Paired(NamedTuple):
    """Of paired differences, positive: better; ``n`` clusters."""

    difference: float
    low: float
    high: float
    p_value: float
    n: int
    verdict: str


def paired_test(differences: ArrayLike, clusters: ArrayLike, seed: int = 0) -> Paired:
    """Whether differences are above or below 0 on average over clusters; the module's docstring has the test.

    Args:
        differences: positive: better. clusters: of the same length, what is independent of each other. Entries that are NaN are left out.

    False alarms: 5 % at most of symmetric differences (flips are exact for those); both directions together.
    """
    d = np.asarray(differences, dtype=float)
    there = np.isfinite(d)
    means = pd.Series(d[there]).groupby(np.asarray(clusters)[there]).mean().to_numpy()
    n = len(means)
    if n == 0:
        return Paired(np.nan, np.nan, np.nan, np.nan, 0, LEVEL_WITH)
    rng = np.random.default_rng(seed)
    mean = float(means.mean())
    if n <= EXACT:
        signs = 1.0 - 2.0 * ((np.arange(2**n)[:, None] >> np.arange(n)) & 1)
        p = float((np.abs(signs @ means / n) >= abs(mean) * (1 - 1e-9)).mean())
    else:
        signs = rng.choice([-1.0, 1.0], size=(FLIPS, n))
        p = float((1 + (np.abs(signs @ means / n) >= abs(mean) * (1 - 1e-9)).sum()) / (1 + FLIPS))
    if n == 1:
        return Paired(mean, np.nan, np.nan, p, n, LEVEL_WITH)
    resampled = rng.multinomial(n, np.full(n, 1 / n), size=RESAMPLES) @ means / n
    low, high = (float(q) for q in np.quantile(resampled, [LEVEL / 2, 1 - LEVEL / 2]))
    sure = p <= LEVEL
    return Paired(mean, low, high, p, n, WINS if sure and low > 0 else LOSES if sure and high < 0 else LEVEL_WITH)


def assemble(jobs: Sequence[Job], results: Sequence[dict[str, Any]]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The table, and the values by condition (``model``, ``role``, ``split``, ``unit``, ``seed``, ``metric``, ``condition``, ``value``).

    A failed job has the worst value of each metric; where a metric has none, the worst of any method for the same condition. Whether a
    metric is admitted is a fact of the held-out cells, the same for all methods; it is read from the technical duplicate's job.
    """
    admission = {
        (job.split, job.unit, job.seed, row["metric"]): {k: row[k] for k in ADMISSION}
        for job, result in zip(jobs, results, strict=True)
        if job.model == DUPLICATES[0] and result.get("status") == "ok"
        for row in result["rows"]
    }
    rows: list[dict[str, Any]] = []
    values: list[pd.DataFrame] = []
    failed: list[dict[str, Any]] = []
    for job, result in zip(jobs, results, strict=True):
        where = {"model": job.model, "role": job.role, "split": job.split, "unit": job.unit, "seed": job.seed}
        if result.get("status") != "ok":
            failed.append(where | {"note": result.get("note", "not run"), "status": "failed"})
            continue
        for row in result["rows"]:
            found = {"value": row["u"], "null": row["null_mean"]} | {k: v for k, v in row.items() if k not in ("u", "null_mean")}
            found |= admission.get((job.split, job.unit, job.seed, row["metric"]), {})
            note = "; ".join(t for t in (row["note"], result["note"]) if t)
            rows.append(where | found | {"status": "ok", "note": note})
            frame = pd.DataFrame({"condition": result["conditions"], "value": result["values"][row["metric"]]})
            values.append(frame.assign(**where, metric=row["metric"]))
    table = pd.DataFrame(rows, columns=[*COLUMNS, "best", "worst"])
    each = pd.concat(values, ignore_index=True) if values else pd.DataFrame(columns=["condition", "value", *where, "metric"])
    lost_rows, lost_values = _lost(failed, table, each)
    order = {(j.model, j.split, j.unit, j.seed): i for i, j in enumerate(jobs)}
    table, each = (pd.concat([a, b], ignore_index=True) if len(b) else a for a, b in ((table, lost_rows), (each, lost_values)))
    out = []
    for frame in (table, each):
        place = [order[key] for key in zip(frame["model"], frame["split"], frame["unit"], frame["seed"], strict=True)]
        out.append(frame.iloc[np.argsort(place, kind="stable")].reset_index(drop=True))
    flags = {"admitted": out[0]["admitted"].fillna(False).astype(bool), "n": out[0]["n"].fillna(0).astype(int)}
    flags["n_failed"] = out[0]["n_failed"].fillna(0).astype(int)
    coverage = out[0]["metric"].isin(NOT_TESTED)
    result_table = out[0].assign(**flags)[COLUMNS]
    result_table.loc[coverage, ["s", "s_low", "s_high", "drf", "bds", "null_p"]] = np.nan
    result_table.loc[coverage, "admitted"] = False
    return result_table, out[1][["model", "role", "split", "unit", "seed", "metric", "condition", "value"]]


def _lost(failed: list[dict[str, Any]], table: pd.DataFrame, values: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Rows and values of failed jobs: the worst there is."""
    rows: list[dict[str, Any]] = []
    each: list[pd.DataFrame] = []
    for job in failed:
        same = np.logical_and.reduce([table[k] == job[k] for k in TIMES])
        metrics = table[same & table["value"].notna()].drop_duplicates("metric")
        if not len(metrics):
            rows.append(job | {"metric": "", "value": np.nan})
        theirs = values[np.logical_and.reduce([values[k] == job[k] for k in TIMES])]
        for metric in metrics.to_dict("records"):
            mine = theirs[theirs["metric"] == metric["metric"]].groupby("condition", sort=False)["value"]
            extreme = mine.min() if metric["higher"] else mine.max()
            if np.isfinite(metric["worst"]):
                extreme = extreme.where(extreme.isna(), metric["worst"])
            value = float(extreme.mean())
            ahead = metric["r"] > metric["b"] if metric["higher"] else metric["r"] < metric["b"]
            scaled = (value - metric["b"]) / (metric["r"] - metric["b"]) if ahead else np.nan
            shared = {k: metric[k] for k in ("metric", *SHARED)}
            rows.append(job | shared | {"value": value, "s": scaled, "n": 0, "n_failed": len(extreme)})
            where = {k: job[k] for k in ("model", "role", *TIMES)}
            each.append(extreme.reset_index().assign(**where, metric=metric["metric"]))
    return pd.DataFrame(rows), pd.concat(each, ignore_index=True) if each else pd.DataFrame()


def best_baselines(table: pd.DataFrame) -> pd.Series:
    """The baseline of the best mean over seeds, by (split, unit, metric); the first of the table among equals."""
    own = table[(table["role"] == "baseline") & ~table["metric"].isin(("", *NOT_TESTED))]
    mean = own.groupby(["split", "unit", "metric", "model"], sort=False)["value"].agg(lambda v: v.mean(skipna=False)).dropna().reset_index()
    mean["order"] = mean["model"].map({name: i for i, name in enumerate(dict.fromkeys(own["model"]))})
    higher = own.drop_duplicates("metric").set_index("metric")["higher"]
    mean["loss"] = np.where(mean["metric"].map(higher).astype(bool), -mean["value"], mean["value"])
    best = mean.sort_values(["loss", "order"], kind="stable").drop_duplicates(["split", "unit", "metric"])
    return best.set_index(["split", "unit", "metric"])["model"]


def paired_table(table: pd.DataFrame, values: pd.DataFrame) -> pd.DataFrame:
    """Every model against the best baseline, by split, unit and metric: ``baseline`` (its name), ``model_value`` and ``baseline_value``
    (means over seeds), ``difference`` (positive: the model is better) with ``low``, ``high``, ``p_value``, ``n`` conditions, ``seeds``,
    ``failed`` (seeds in which the model failed), ``admitted`` (the metric, in every seed) and ``verdict``."""
    best = best_baselines(table)
    rows = []
    models = table[(table["role"] == "model") & (table["metric"] != "") & ~table["metric"].isin(NOT_TESTED)]
    by_key = dict(list(values.groupby(["model", "split", "unit", "metric"], sort=False)))
    for (model, split, unit, metric), own in models.groupby(["model", "split", "unit", "metric"], sort=False):
        if (split, unit, metric) not in best.index or own["value"].isna().all():
            continue
        rival = str(best[split, unit, metric])
        where = {"model": rival, "split": split, "unit": unit, "metric": metric}
        theirs = table[np.logical_and.reduce([table[k] == v for k, v in where.items()])]
        mine, other = (by_key[m, split, unit, metric] for m in (model, rival))
        both = mine.merge(other, on=["seed", "condition"], suffixes=("", "_b"))
        sign = 1.0 if own["higher"].iloc[0] else -1.0
        test = paired_test(sign * (both["value"] - both["value_b"]), both["condition"])
        rows.append(
            {
                "model": model, "split": split, "unit": unit, "metric": metric, "higher": bool(own["higher"].iloc[0]), "baseline": rival,
                "model_value": own["value"].mean(), "baseline_value": theirs["value"].mean(), **test._asdict(), "seeds": len(own),
                "failed": int((own["status"] == "failed").sum()), "admitted": bool(own["admitted"].all()),
            }
        )  # fmt: skip
    first = ["model", "split", "unit", "metric", "higher", "baseline", "model_value", "baseline_value"]
    return pd.DataFrame(rows, columns=[*first, *Paired._fields, "seeds", "failed", "admitted"])
