"""What :func:`pyrocausal.report.demo` says and shows: the findings as sentences, the pictures, and the page that holds them."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import pandas as pd
import xarray as xr

from pyrocausal import evaluate, plots
from pyrocausal.data import PerturbationData
from pyrocausal.errors import DataError

if TYPE_CHECKING:
    from pyrocausal.report import Demo

GENERATOR = '<meta name="generator" content="pyrocausal demo">'  # by which an earlier report is known
Kind = Literal["control", "mean", "train", "additive"]
BASELINES: dict[Kind, str] = {
    "control": "nothing changes",
    "mean": "every perturbation does what the average one does",
    "train": "the mean of the training cells of the same condition",
    "additive": "a combination is the sum of its singles in the training cells",
}
LEVEL = 0.01  # errors that differ by less than this share are called level
LEGEND = """total_mse: squared error, mean over genes, summed over interventions. model_mse: the model's on the same interventions.
model_closer: in how many of them the model's error is smaller by more than 1 %. Means over interventions: pearson, the correlation over
genes; relative_l2, the size of the error over the size of the measured effect (1: as good as 'nothing changes'); direction, the share of
the measurably changed genes (5 % FDR) whose sign is right; coverage, the share of genes in the 90 % interval of the prediction, widened by
the error of the measurement."""
CSS = """body{font:15px/1.5 system-ui,sans-serif;color:#222;max-width:1080px;margin:2rem auto;padding:0 1rem}
h1{font-size:1.6rem;margin-bottom:0}h2{font-size:1.2rem;margin-top:2.2rem;border-bottom:1px solid #ddd}
img{max-width:100%;height:auto;display:block;margin:1rem auto}table{border-collapse:collapse;font-size:13px;margin:.6rem 0}
th,td{padding:.2rem .7rem;text-align:right;border-bottom:1px solid #eee;white-space:nowrap}th:first-child,td:first-child{text-align:left}
.wide{overflow-x:auto}.note,figcaption{color:#666;font-size:13px}details{margin:.3rem 0}summary{cursor:pointer}"""


def findings(result: Demo, test: PerturbationData, epochs: int) -> list[str]:
    """The findings as sentences: shared targets and inert perturbations, where the model wins and loses, the noise, the truth.

    Args:
        test: the held-out cells.
        epochs: that were meant to be run.
    """
    words = []
    if result.fit.stopped == "interrupted":
        n = len(result.fit.history)
        words.append(f"Training was interrupted after {n} of {epochs} epochs: effects and targets may not have settled.")
    if len(result.target_mask):
        words.extend(_sharing(result))
    else:
        words.append("This model has no target mask: every perturbation moves every program.")
    words.extend(_against(result, kind) for kind in BASELINES if kind in result.scores.index and result.scores.loc[kind, "interventions"])
    words.extend(_noise(result, test))
    if result.truth:
        words.append("Against the truth of the simulation: " + ", ".join(f"{k} {v:.3f}" for k, v in result.truth.items()) + ".")
    return words


def _against(result: Demo, kind: Kind) -> str:
    """Where the model wins and loses against a baseline."""
    row = result.scores.loc[kind]
    change = row["model_mse"] / row["total_mse"] - 1
    verdict = "is level with" if abs(change) < LEVEL else "wins against" if change < 0 else "loses to"
    theirs = result.by_intervention.loc[kind, "mse"].dropna()
    ratio = result.by_intervention.loc["model", "mse"][theirs.index] / theirs - 1
    worse = [str(k) for k in ratio.index[ratio >= LEVEL]]
    places = {"closer": (ratio <= -LEVEL).sum(), "level (within 1 %)": (abs(ratio) < LEVEL).sum(), "farther": len(worse)}
    where = _listed([f"{what} in {n}" for what, n in places.items() if n])
    return (
        f"The model {verdict} '{kind}' ({BASELINES[kind]}): total squared error on the held-out cells {row['model_mse']:.3g} against "
        f"{row['total_mse']:.3g} ({change:+.0%}). Of {len(theirs)} interventions it is {where}{': ' + _listed(worse, 8) if worse else ''}."
    )


def _noise(result: Demo, test: PerturbationData) -> list[str]:
    """What of the error is noise of the held-out cells."""
    try:
        noise = evaluate.split_half(test)["mse"] / 4  # of all cells about the truth
    except DataError:  # too few cells for two halves
        return []
    both = noise.index.intersection(result.by_intervention.loc["model"].index)
    left, total = (result.by_intervention.loc[m, "mse"][both].sum() for m in ("model", "control"))
    return [
        f"Of the {total:.3g} that 'control' leaves, about {noise[both].sum():.3g} is sampling noise of the held-out cells, which no method "
        f"can predict; the model leaves {left:.3g}."
    ]


def _sharing(result: Demo) -> list[str]:
    """Who shares a program, who has one alone, who has none."""
    words = []
    for row in result.groups.itertuples():
        against = f" ({_listed(row.opposite)} in the opposite direction)" if row.opposite else ""
        genes = f"; strongest: {', '.join(row.genes)}" if row.genes else ""
        sure = "above .99" if row.sharing > 0.99 else f"of at least {row.sharing:.2f}"
        words.append(f"{_listed(row.perturbations)} share program {row.program}{against}, with a probability {sure}{genes}.")
    grouped = {p for names in result.groups["perturbations"] for p in names} | set(result.inert)
    alone = [str(p) for p in result.target_mask.index if p not in grouped]
    if alone:
        words.append(f"{_listed(alone)} {'has a program of its own' if len(alone) == 1 else 'have programs of their own'}.")
    which = f": {_listed(result.inert, 40)}" if result.inert else ""
    words.append(
        f"{len(result.inert)} of {len(result.target_mask)} perturbations do next to nothing (they target no program with a probability "
        f"above .5){which}."
    )
    return words


def _listed(names: Sequence[str], most: int = 12) -> str:
    """``"A, B and C"``."""
    shown = list(names[:most]) + ([f"{len(names) - most} more"] if len(names) > most else [])
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}"


def as_text(result: Demo) -> str:
    """The score table and the findings, for a terminal."""
    table = _printable(result.scores).to_string(float_format="{:.3f}".format, na_rep="")
    return f"{result.fit}\n\nHeld-out cells, the model beside simple baselines:\n{table}\n\n" + "\n".join(f"- {w}" for w in result.words)


def _printable(scores: pd.DataFrame) -> pd.DataFrame:
    return scores.assign(model_closer=scores["model_closer"].astype(str).replace("<NA>", ""))


def strongest(table: pd.DataFrame, intervention: str, n: int = 10) -> pd.DataFrame:
    """The genes that an intervention moves most, of those whose interval excludes zero; rows of :func:`effects_table`."""
    rows = table[(table["intervention"] == intervention) & ((table["lower"] > 0) | (table["upper"] < 0))]
    return rows.loc[rows["median"].abs().sort_values(ascending=False, kind="stable").index[:n]]


def pictures(result: Demo, measured: xr.Dataset, effects: xr.Dataset) -> dict[str, bytes]:
    from matplotlib.figure import Figure

    shown = list(dict.fromkeys(result.effects["intervention"]))
    axes = {"elbo": plots.elbo_curve(result.fit)}
    if len(result.target_mask):
        axes["target_mask"] = plots.target_mask(result.target_mask.to_numpy(), list(result.target_mask.index))
    axes["predicted_vs_measured"] = plots.predicted_vs_measured(effects, measured, evaluate.de_genes(measured))
    if len(shown) > 1:
        axes["effects_heatmap"] = plots.effects_heatmap(effects, 40, shown)
    figures = {key: ax.figure for key, ax in axes.items()}
    strong = [(k, list(genes)) for k in shown if len(genes := strongest(result.effects, k)["gene"])][:6]
    if strong:
        rows = -(-len(strong) // 2)
        grid = Figure(figsize=(10.4, 3.9 * rows), layout="constrained")
        for i, (k, genes) in enumerate(strong):
            plots.effects_forest(effects, measured, k, genes, grid.add_subplot(rows, 2, i + 1))
        figures["effects_forest"] = grid
    return {key: _png(figure) for key, figure in figures.items()}


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, metadata={"Software": None})
    return buffer.getvalue()


def page(result: Demo, drawn: Mapping[str, bytes], data: PerturbationData, name: str, settings: Mapping[str, Any]) -> str:
    """The report as one HTML file."""

    def picture(key: str, caption: str) -> str:
        if key not in drawn:
            return ""
        source = base64.b64encode(drawn[key]).decode()
        return f'<figure><img alt="{caption}" src="data:image/png;base64,{source}"><figcaption>{caption}</figcaption></figure>'

    def table(frame: pd.DataFrame, **options: Any) -> str:
        text = frame.to_html(border=0, na_rep="", float_format="{:.3f}".format, **options)
        return f'<div class="wide">{text}</div>'

    rows = result.effects
    each = []
    for label in dict.fromkeys(rows["intervention"]):
        genes = strongest(rows, label).drop(columns="intervention")
        genes["p_value"] = genes["p_value"].map("{:.1g}".format)
        inner = table(genes, index=False) if len(genes) else '<p class="note">No gene whose 90 % interval excludes zero.</p>'
        top = ", ".join(f"{r.gene} {r.median:+.2f}" for r in genes.head(5).itertuples())
        each.append(f"<details><summary><b>{html.escape(label)}</b> {html.escape(top) or 'no effect'}</summary>{inner}</details>")
    parts = [
        f"<h1>{html.escape(name)}</h1><p class='note'>{html.escape(repr(data).partition('(')[2][:-1])}</p>",
        "<h2>In short</h2><ul>" + "".join(f"<li>{html.escape(w)}</li>" for w in result.words) + "</ul>",
        "<h2>Does it predict cells that it has not seen?</h2><p>A fifth of the cells of every condition was held out. The scores compare "
        "predicted with measured effects (perturbed against unperturbed held-out cells), gene by gene.</p>",
        table(_printable(result.scores).reset_index(), index=False),
        f"<p class='note'>{html.escape(LEGEND)}</p>",
        picture("predicted_vs_measured", "Each dot is a gene under an intervention: the model's median effect against the held-out cells."),
        "<h2>Which perturbations act on the same program?</h2>",
        picture("target_mask", "Posterior probability that a perturbation (row) targets a program (column)."),
        "<h2>What does each perturbation do?</h2>",
        picture("effects_heatmap", "Median effect of the model against untreated cells."),
        picture(
            "effects_forest", "The strongest interventions: median and 90 % interval of the model, held-out effect with its 90 % interval."
        ),
        "<p>The strongest genes of each, of those whose 90 % interval excludes zero:</p>",
        *each,
        "<h2>How it was fitted</h2>",
        f"<p>{html.escape(repr(result.fit))}; " + ", ".join(f"{k} {html.escape(str(v))}" for k, v in settings.items()) + ".</p>",
        picture("elbo", "The bound on the evidence (ELBO) during training."),
        "<p class='note'>The intervals hold what the posterior of targets and effects leaves open. They do not hold the uncertainty of the "
        "decoder's weights, and so are rather too narrow than too wide: see the coverage in the table above.</p>",
    ]
    head = f'<!doctype html><html lang="en"><head><meta charset="utf-8">{GENERATOR}<title>pyrocausal: {html.escape(name)}</title>'
    return f"{head}<style>{CSS}</style></head><body>" + "\n".join(p for p in parts if p) + "</body></html>\n"
