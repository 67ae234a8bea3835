"""The table of the library: every model of the collection and every baseline on the shared real screens and on simulated ones.

    python benchmarks/leaderboard.py [--screens norman2019 ...] [--processes 2] [--quick]

Real screens are read from the folder that PYROCAUSAL_DATA names, else ../shared/data beside the repository; they are not redistributed.
Finished jobs are kept in ``--work`` (default: runs/leaderboard), so that the command goes on where it was interrupted; what it writes is
``benchmarks/leaderboard/<screen>_table.csv`` and ``_paired.csv`` when a screen is complete, and ``benchmarks/leaderboard.md`` of all
screens in that folder. ``--quick`` (one seed, two epochs, few draws) proves that everything runs, and writes to runs/leaderboard-quick
only.

==================  ==================================================================================================================
screen              what
==================  ==================================================================================================================
norman2019          CRISPRa pairs in K562, counts of the 246 genes that have any; held out: the three pairs with both singles
norman2019_cells    the same screen; held out: half of the cells of all conditions
norman2019_log      as both, as log1p of CP10k (layer ``log1p_cp10k``), the scale of published tables: means of logarithms
schraivogel2020     CRISPRi, TAP-seq, K562, counts of 72 genes; held out: half of the cells (conditions of 10 test cells or more)
papalexi2021        CRISPR knockout, THP-1, counts of 299 genes; held out: a fifth of the cells
papalexi2021_unseen the same screen; held out: a third of the perturbations, unseen
linear_do           simulated: linear regulation with cycles, do-interventions, counts; held out: half of the pairs; a third of the genes
hill_do             simulated: Hill regulation, do-interventions, off-targets, incomplete penetrance, batches, counts; as linear_do
==================  ==================================================================================================================

Models have their own defaults; those that answer unseen perturbations, and the baselines that use an embedding, have the principal
components of the perturbed genes in the control cells. A perturbation whose gene is not measured has the mean embedding.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd

import pyrocausal as pc
from pyrocausal.benchmark_page import findings
from pyrocausal.benchmark_paired import best_baselines
from pyrocausal.benchmark_run import BASELINES
from pyrocausal.collection import ENTRIES, accepts
from pyrocausal.embeddings import control_pca
from pyrocausal.simulate_regulatory import regulatory_screen

ROOT = Path(__file__).resolve().parents[1]
EXCLUDED = {
    "cite_vae": "needs measurement times, which none of these screens has; perturbed_vae is the same class at one time",
}
LCD_GENES = 100  # most genes of linear_lcd with counts: every cell of a minibatch is a system of all genes, hours a fit beyond
SHOWN = (
    "l2",
    "wmse",
    "r2_w_pert",
    "pearson_pert",
    "centroid_accuracy",
    "cosine",
    "crps",
    "interval_score",
    "coverage",
    "coverage_responsive",
)
HALF, UNSEEN = {"by": "cells", "test": 0.5}, {"by": "perturbations", "test": 1 / 3}
PAIRS = {"by": "combinations", "test": 0.5, "seen": 2}


@dataclass(frozen=True)
class Screen:
    """``read`` gives the data; ``options`` are arguments of :func:`pyrocausal.benchmark`."""

    read: Callable[[], pc.PerturbationData]
    splits: tuple[dict[str, Any], ...]
    options: dict[str, Any]


def real(file: str, **settings: Any) -> pc.PerturbationData:
    """A shared screen without the genes that are zero in every cell."""
    folder = Path(os.environ.get("PYROCAUSAL_DATA") or ROOT.parent / "shared" / "data")
    if not folder.is_dir():
        raise SystemExit(f"no real data: {folder} is absent; name the folder with PYROCAUSAL_DATA, or give --screens of simulated ones")
    adata = ad.read_h5ad(folder / f"{file}.h5ad")
    adata = adata[:, np.asarray(adata.X.sum(0)).ravel() > 0].copy()
    return pc.PerturbationData.from_anndata(adata, **settings)


def simulated(**settings: Any) -> pc.PerturbationData:
    adata = regulatory_screen(
        n_genes=60, n_perturbed=24, doubles=24, cells_per_perturbation=100, n_control=500, counts=True, seed=2026, **settings
    )
    return pc.PerturbationData.from_anndata(adata, batch_key="batch")


NORMAN, SCHRAIVOGEL, PAPALEXI = (
    "norman2019_k562_crispra_hvg500",
    "schraivogel2020_k562_tapseq_crispri_72g",
    "papalexi2021_thp1_crisprko_299g",
)
HELD = {"by": "combinations", "test": ("KLF1+MAP2K6", "MAP2K3+MAP2K6", "MAP2K3+SLC38A2"), "seen": 2, "control": 0.5}
SCREENS = {
    "norman2019": Screen(lambda: real(NORMAN, modality="activation"), (HELD,), {}),
    "norman2019_cells": Screen(lambda: real(NORMAN, modality="activation"), (HALF,), {}),
    "norman2019_log": Screen(lambda: real(NORMAN, layer="log1p_cp10k", modality="activation"), (HELD, HALF), {"genes": "all"}),
    "schraivogel2020": Screen(lambda: real(SCHRAIVOGEL, modality="knockdown"), (HALF,), {}),
    "papalexi2021": Screen(lambda: real(PAPALEXI, batch_key="batch", modality="knockout"), ({"by": "cells", "test": 0.2},), {}),
    "papalexi2021_unseen": Screen(lambda: real(PAPALEXI, batch_key="batch", modality="knockout"), (UNSEEN,), {}),
    "linear_do": Screen(lambda: simulated(mechanism="linear"), (PAIRS, UNSEEN), {}),
    "hill_do": Screen(
        lambda: simulated(mechanism="hill", off_target=0.2, penetrance=(0.6, 1.0), n_batches=2, batch_sd=0.1, depth_sd=0.3),
        (PAIRS, UNSEEN),
        {},
    ),
}


def models_of(data: pc.PerturbationData) -> dict[str, tuple[str, dict[str, Any]]]:
    """Every model of the collection, with an embedding where it takes one, and the baselines that use one."""
    control = data[data.is_control]
    measured = [p for p in data.perturbations if p in set(data.genes)]
    table = None
    if len(measured) > 2:
        table = control_pca(control, list(data.perturbations), n_components=min(10, len(measured) - 1), missing="mean")
    out: dict[str, tuple[str, dict[str, Any]]] = {}
    for name in ENTRIES:
        with_table = table is not None and accepts(name, "embedding") and (name not in BASELINES or name in EMBEDDED)
        large = name == "linear_lcd" and data.kind == "counts" and len(data.genes) > LCD_GENES
        if name not in EXCLUDED and not large and (name not in BASELINES or with_table):
            out[name] = (name, {"embedding": table} if with_table else {})
    return out


EMBEDDED = ("nearest_perturbation", "knn_embedding", "ridge_embedding")  # linear_embedding has the published one


def run(name: str, a: argparse.Namespace, work: Path) -> pc.Benchmark:
    screen = SCREENS[name]
    data = screen.read()
    print(f"{name}: {data}", flush=True)
    quick = {"seeds": (0,), "max_epochs": 2, "draws": 20, "cells": 8, "n_permutations": 20, "n_bootstrap": 100} if a.quick else {}
    options = {"seeds": tuple(a.seeds)} | screen.options | quick
    return pc.benchmark(
        data, models_of(data), splits=screen.splits, out=work / name, processes=a.processes, progress=True, name=name, **options
    )


def write(name: str, result: pc.Benchmark, folder: Path) -> None:
    """The tables, without the texts of the conventions (which are in the report)."""
    folder.mkdir(parents=True, exist_ok=True)
    slim = result.table.drop(columns=["convention"])
    slim.to_csv(folder / f"{name}_table.csv", index=False, float_format="%.6g")
    result.paired.to_csv(folder / f"{name}_paired.csv", index=False, float_format="%.6g")


def written(folder: Path) -> dict[str, pc.Benchmark]:
    """What :func:`write` has written there, by screen."""
    results = {}
    for name in SCREENS:
        if (folder / f"{name}_table.csv").exists():
            table, paired = (pd.read_csv(folder / f"{name}_{part}.csv") for part in ("table", "paired"))
            results[name] = pc.Benchmark(table.fillna({"metric": "", "note": ""}), paired, folder)
    return results


def markdown(results: dict[str, pc.Benchmark], quick: bool) -> str:
    """All screens: means over seeds, s in brackets, the verdict of each model, and what failed."""
    lines = [
        "# Leaderboard",
        "",
        ("A smoke run of two epochs: no model is trained here. " if quick else "")
        + "Made by `python benchmarks/leaderboard.py`. Values are means over seeds, in brackets s = (value - mean response) / (replicate - "
        "mean response); **bold** is the best baseline of a metric, + and - a model that wins or loses against it (paired over held-out "
        "conditions, 95 % interval without 0 and p at most .05), no mark: not distinguishable. † marks metrics that are not admitted on "
        "the data. l2, wmse, crps and interval_score: lower is better; coverage: 0.9 is right "
        "(`_responsive`: of the quarter of the genes that respond most in the training conditions).",
        "",
        "Left out: " + "; ".join(f"`{k}` ({v})" for k, v in EXCLUDED.items()) + "; `linear_lcd` on counts of more than "
        f"{LCD_GENES} genes (hours a fit).",
    ]
    for name, result in results.items():
        for (split, unit), rows in result.table.groupby(["split", "unit"], sort=False):
            lines += ["", f"## {name}: {split}, {unit}", "", *_table(result, split, unit, rows)]
        lines += ["", *(f"- {w}" for w in findings(result))]
    return "\n".join(lines) + "\n"


def _table(result: pc.Benchmark, split: str, unit: str, rows: pd.DataFrame) -> list[str]:
    best = best_baselines(result.table)
    tested = result.paired[(result.paired["split"] == split) & (result.paired["unit"] == unit)].set_index(["model", "metric"])["verdict"]
    metrics = [m for m in SHOWN if (rows["metric"] == m).any()]
    mean = rows[rows["metric"] != ""].groupby(["model", "metric"], sort=False)[["value", "s", "admitted"]].mean()
    heads = [f"{m}{'' if m.startswith('coverage') or mean.xs(m, level='metric')['admitted'].max() == 1 else ' †'}" for m in metrics]
    n = int(rows["n"].max())
    out = [
        f"{n} held-out conditions, {rows['seed'].nunique()} seeds.",
        "",
        "| | " + " | ".join(heads) + " |",
        "|---" * (len(metrics) + 1) + "|",
    ]
    for model in dict.fromkeys(rows["model"]):
        cells = []
        for m in metrics:
            if (model, m) not in mean.index or np.isnan(mean.loc[(model, m), "value"]):
                cells.append("")
                continue
            value, s, _ = mean.loc[(model, m)]
            text = f"{value:.3g}" + ("" if np.isnan(s) else f" ({s:.2f})")
            mark = {"wins": " +", "loses": " -"}.get(str(tested.get((model, m), "")), "")
            cells.append(f"**{text}**" if best.get((split, unit, m)) == model else text + mark)
        lost = (rows[rows["model"] == model]["status"] == "failed").any()
        out.append(f"| {model}{' (failed)' if lost else ''} | " + " | ".join(cells) + " |")
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--screens", nargs="+", choices=list(SCREENS), default=list(SCREENS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--work", type=Path, help="folder of the jobs (default: runs/leaderboard)")
    parser.add_argument("--quick", action="store_true", help="a smoke run; nothing is written outside runs/leaderboard-quick")
    a = parser.parse_args()
    work = a.work or ROOT / "runs" / ("leaderboard-quick" if a.quick else "leaderboard")
    target = work if a.quick else ROOT / "benchmarks"
    for name in a.screens:
        write(name, run(name, a, work), target / "leaderboard")
        (target / "leaderboard.md").write_text(markdown(written(target / "leaderboard"), a.quick), encoding="utf-8")


if __name__ == "__main__":
    main()
