"""What :func:`pyrocausal.benchmark` writes and says: tables as CSV, findings as sentences, pictures, and the page that holds them."""

from __future__ import annotations

import base64
import html
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from pyrocausal.benchmark_paired import LEVEL_WITH, LOSES, NOT_TESTED, WINS

if TYPE_CHECKING:
    from pyrocausal.benchmark import Benchmark

PANELS = 9
GENERATOR = '<meta name="generator" content="pyrocausal benchmark">'
COLOURS = {WINS: "#1a7f37", LOSES: "#b3261e", LEVEL_WITH: "#777777"}
RULE = """The best baseline is that of the best mean over seeds, chosen with the same test cells, in its favour. Differences are taken
condition by condition and averaged over seeds; the interval (95 %) is a bootstrap over conditions, the p-value that of flipping the signs
of the conditions. A model wins or loses if the interval excludes zero and p is at most .05; with fewer than six conditions nothing can. No
correction for many tests. A metric is admitted if a repetition of the experiment beats the mean response by it; verdicts by others are in
grey. s = (value - mean response) / (replicate - mean response): 0 is the mean response, 1 a repetition of the experiment."""


def write(result: Benchmark, values: pd.DataFrame, name: str, about: str) -> None:
    """The folder of a benchmark."""
    for key, frame in {"table": result.table, "paired": result.paired, "by_condition": values}.items():
        frame.to_csv(result.path / f"{key}.csv", index=False)
    (result.path / "report.html").write_text(page(result, name, about), encoding="utf-8")


def findings(result: Benchmark) -> list[str]:
    """The verdicts as sentences, by admitted metrics, and what failed (with no verdict on what failed for every seed)."""
    words = []
    for (model, split, unit), rows in result.paired.groupby(["model", "split", "unit"], sort=False):
        if (rows["failed"] == rows["seeds"]).all():
            continue
        there = rows[rows["admitted"]]
        if not len(there):
            words.append(f"{model} on {split} [{unit}]: no metric is admitted, so nothing can be said.")
            continue
        said = [f"{verdict} by {', '.join(part['metric'])}" for verdict, part in there.groupby("verdict", sort=False)]
        words.append(f"{model} on {split} [{unit}], against the best baseline of each metric: {'; '.join(said)}.")
    if not len(result.paired):
        words.append("There is no model in the table, only baselines.")
    lost = result.table[result.table["status"] == "failed"].drop_duplicates(["model", "split", "unit", "seed"])
    said = lost["note"].str.replace("'[^']*'", "...", regex=True)
    seeds = lost.groupby(["model", "split", "unit"], sort=False)["seed"].transform(lambda s: ", ".join(map(str, s)))
    for (split, seed, note), rows in lost.groupby(["split", seeds, said], sort=False):
        who = ", ".join(dict.fromkeys(rows["model"]))
        words.append(f"{who} failed on {split}, seed {seed}, with the worst values there: {note}")
    return words


def as_text(result: Benchmark) -> str:
    """The paired table and the findings, for a terminal."""
    columns = ["model", "split", "metric", "baseline", "model_value", "baseline_value", "low", "high", "p_value", "n", "verdict"]
    table = result.paired[columns].to_string(index=False, float_format="{:.4g}".format) if len(result.paired) else ""
    return "\n".join([table, "", *(f"- {w}" for w in findings(result))]).strip()


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Means over seeds: one row for each split, unit and model, one column for each metric (``value`` and, below, ``s``)."""
    shown = table[table["metric"] != ""]
    return shown.pivot_table(index=["split", "unit", "role", "model"], columns="metric", values=["value", "s"], aggfunc="mean", sort=False)


def page(result: Benchmark, name: str, about: str) -> str:
    """The report as one HTML file."""
    from pyrocausal.report_page import CSS

    parts = [
        f"<h1>Benchmark: {html.escape(name)}</h1><p class='note'>{html.escape(about)}</p>",
        "<h2>In short</h2><ul>" + "".join(f"<li>{html.escape(w)}</li>" for w in findings(result)) + "</ul>",
        f"<p class='note'>{html.escape(RULE)}</p>",
    ]
    for (split, unit), rows in result.table.groupby(["split", "unit"], sort=False):
        tested = result.paired[(result.paired["split"] == split) & (result.paired["unit"] == unit)]
        scored = rows[rows["metric"] != ""]
        parts.append(f"<h2>{html.escape(split)} <span class='note'>unit {html.escape(unit)}</span></h2>")
        if len(tested):
            caption = "Paired differences from the best baseline (its name at the left), right of 0: the model is better."
            parts += [_picture(forest(tested), caption), _table(tested.drop(columns=["split", "unit"]))]
        if len(scored):
            parts.append(_picture(heat_map(scored), "Mean s over seeds; a dagger marks metrics that are not admitted on these data."))
        each = scored.groupby(["role", "model", "metric"], sort=False)["value"].mean().unstack("metric", sort=False)
        parts.append(f"<details><summary>Mean values</summary>{_table(each.reset_index())}</details>")
        facts = ["metric", "convention", "higher", "b", "r", "drf", "bds", "admitted"]
        means = scored.groupby("metric", sort=False)[["b", "r", "drf", "bds", "admitted"]].mean()
        first = scored.drop_duplicates("metric").set_index("metric")[["convention", "higher"]]
        parts.append(
            f"<h3>What is admitted</h3>{_table(first.join(means).reset_index()[facts].rename(columns={'admitted': 'admitted in seeds'}))}"
        )
    head = f'<!doctype html><html lang="en"><head><meta charset="utf-8">{GENERATOR}<title>pyrocausal benchmark: {html.escape(name)}</title>'
    return f"{head}<style>{CSS}</style></head><body>" + "\n".join(parts) + "</body></html>\n"


def forest(tested: pd.DataFrame) -> Any:
    """A panel for each metric (nine at most, the admitted ones first), a line for each model: difference from the best baseline."""
    from matplotlib.figure import Figure

    models = list(dict.fromkeys(tested["model"]))
    metrics = list(dict.fromkeys(tested.sort_values("admitted", ascending=False, kind="stable")["metric"]))[:PANELS]
    columns = min(3, len(metrics))
    lines = -(-len(metrics) // columns)
    figure = Figure(figsize=(3.6 * columns + 1, (0.26 * len(models) + 1.1) * lines), layout="constrained")
    for i, metric in enumerate(metrics):
        ax = figure.add_subplot(lines, columns, i + 1)
        rows = tested[tested["metric"] == metric].set_index("model")
        ax.axvline(0, color="#222222", lw=0.8)
        for k, row in enumerate(rows.reindex(models).itertuples()):
            if np.isfinite(row.difference):
                colour = COLOURS[row.verdict] if row.admitted else "#cccccc"
                ax.plot([row.low, row.high], [k, k], color=colour, lw=1.6)
                ax.plot([row.difference], [k], "o", color=colour, ms=4.5)
        known = rows["admitted"].all()
        ax.set_title(f"{metric}{'' if known else ' †'} against {rows['baseline'].iloc[0]}", fontsize=8)
        ax.set_yticks(range(len(models)), models if i % columns == 0 else [""] * len(models), fontsize=7)
        ax.set_ylim(len(models) - 0.5, -0.5)
        ax.tick_params(axis="x", labelsize=7)
        ax.spines[["top", "right"]].set_visible(False)
    return figure


def heat_map(scored: pd.DataFrame) -> Any:
    """Mean s over seeds, methods by metrics."""
    from matplotlib.figure import Figure

    shown = scored[~scored["metric"].isin(NOT_TESTED)]
    table = shown.pivot_table(index="model", columns="metric", values="s", aggfunc="mean", sort=False, dropna=False)
    table = table.reindex(index=list(dict.fromkeys(shown["model"])), columns=list(dict.fromkeys(shown["metric"])))
    admitted = shown.groupby("metric")["admitted"].all()
    figure = Figure(figsize=(0.62 * len(table.columns) + 3, 0.27 * len(table) + 1.6), layout="constrained")
    ax = figure.add_subplot()
    values = table.to_numpy(dtype=float)
    image = ax.imshow(np.clip(values, -1, 1), cmap="RdYlGn", vmin=-1, vmax=1, aspect="auto")
    for (i, k), value in np.ndenumerate(values):
        text = "" if np.isnan(value) else f"{value:.2f}" if abs(value) < 99 else f"{value:.0e}"
        ax.text(k, i, text, ha="center", va="center", fontsize=6.5)
    names = [f"{m}{'' if admitted[m] else ' †'}" for m in table.columns]
    ax.set_xticks(range(len(names)), names, rotation=45, ha="right", fontsize=7)
    ax.set_yticks(range(len(table)), list(table.index), fontsize=7)
    figure.colorbar(image, ax=ax, shrink=0.7).set_label("s (clipped)", fontsize=7)
    return figure


def _picture(figure: Any, caption: str) -> str:
    from pyrocausal.report_page import _png

    source = base64.b64encode(_png(figure)).decode()
    return f'<figure><img alt="{caption}" src="data:image/png;base64,{source}"><figcaption>{caption}</figcaption></figure>'


def _table(frame: pd.DataFrame) -> str:
    text = frame.to_html(border=0, na_rep="", float_format="{:.4g}".format, index=False)
    return f'<div class="wide">{text}</div>'
