"""LinearLCD, SCM and CLIPR on real screens: ``python benchmarks/real_diffusion.py [sachs papalexi schraivogel]`` (data: PYROCAUSAL_DATA).

sachs        directed recovery of both reference graphs (log fluorescence), beside the precision matrix and the mean differences
papalexi,    mean shifts of pairs (schraivogel) or of perturbations held out, against the additive and the mean baseline; implication
schraivogel  statistics of the matrix against its transpose
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import xarray as xr

import pyrocausal as pc
from pyrocausal.dynamics.select import select_settings
from pyrocausal.evaluate import baseline_effects, de_genes, measured_effects
from pyrocausal.graph_metrics import directed_recovery, edge_matrix
from pyrocausal.implication import implication
from pyrocausal.posterior import deterministic_tables, global_draws

FOLDER = Path(os.environ.get("PYROCAUSAL_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")
FILES = {"papalexi": "papalexi2021_thp1_crisprko_299g", "schraivogel": "schraivogel2020_k562_tapseq_crispri_72g"}
pd.set_option("display.width", 200)


def fitted(data: pc.PerturbationData, seed: int, **settings: Any) -> pc.Fit:
    """With the strength of the sparse prior chosen by held-out cells."""
    chosen = select_settings(data, seed=seed, diffusion="learned", progress=False, **settings)["settings"][0]
    print("  chosen by held-out cells:", chosen, flush=True)
    model, guide = pc.build("linear_lcd", data, diffusion="learned", **settings, **chosen)
    return pc.fit(model, guide, data, max_epochs=3000, kl_warmup=0.0, seed=seed, progress=False)


def graph_of(fit: pc.Fit, draws: int = 20) -> xr.DataArray:
    """Draws of the regulation, dims (draw, cause, effect), in units of the genes' own spread."""
    genes, unit = fit.coords["gene"], np.asarray(fit.model.unit)
    sampled = global_draws(fit, draws)
    graph = deterministic_tables(fit, sampled, draws)["graph"] * unit[:, None] / unit
    return xr.DataArray(graph, dims=("draw", "cause", "effect"), coords={"cause": genes, "effect": genes})


def sachs(seed: int) -> None:
    """Directed recovery; inhibitors and activators push activities, which need not show in the target's own level."""
    adata = ad.read_h5ad(FOLDER / "sachs2005_tcell_phospho_11p.h5ad")
    edges = {k: adata.uns[k] for k in ("edges_sachs17", "edges_consensus18")}
    adata.X = np.log(np.maximum(np.asarray(adata.X.todense() if hasattr(adata.X, "todense") else adata.X), 1e-3)).astype(np.float32)
    data = pc.PerturbationData.from_anndata(adata, kind="normalised")
    print(data, "targets measured:", [p for p in data.perturbations if p in data.genes])
    own = [int(g) for g in data.genes.get_indexer([str(p).removesuffix("_act") for p in data.perturbations])]
    fit = fitted(data, seed, own_genes=own)
    M = graph_of(fit).mean("draw").to_numpy()
    x, labels = data.dense(np.float64), data.labels.astype(str)
    centred = x - pd.DataFrame(x).groupby(labels).transform("mean").to_numpy()
    control = np.linalg.inv(np.corrcoef(x[data.is_control].T))
    pooled = np.linalg.inv(np.corrcoef(centred.T))
    network = pc.fit(*pc.build("scm", data, own_genes=own, draws=200, seed=seed), data, seed=seed, progress=False)
    A = graph_of(network, 200).mean("draw").to_numpy()
    matrices = {"linear_lcd": M, "scm": A, "precision, control": -control, "precision, pooled": -pooled}
    rows = []
    for name, found in edges.items():
        pairs = [tuple(str(e).split("->")) if isinstance(e, str) else tuple(map(str, e)) for e in np.asarray(found)]
        truth = edge_matrix(pairs, list(data.genes))
        rows += [{"graph": name, "method": k, **directed_recovery(m, truth).to_dict()} for k, m in matrices.items()]
    print(pd.DataFrame(rows).round(3).to_string(index=False))


def screen(name: str, seed: int) -> None:
    """Held-out perturbations need the size of their own push, which is taken from half of the held-out cells (its own gene only)."""
    data = pc.PerturbationData.from_anndata(FOLDER / f"{FILES[name]}.h5ad").log_normalised()
    if name == "papalexi":  # the genes with any variance to speak of
        variance = data.dense().var(0)
        keep = np.sort(np.union1d(np.argsort(-variance)[:120], data.genes.get_indexer([p for p in data.perturbations if p in data.genes])))
        adata = ad.AnnData(data.dense()[:, keep], obs=pd.DataFrame({"perturbation": data.labels}, index=data.cells))
        adata.var_names = data.genes[keep]
        data = pc.PerturbationData.from_anndata(adata, kind="normalised")
    print(data, flush=True)
    held_out(data, seed)
    fit = fitted(data, seed)
    matrix = graph_of(fit)
    print("  ", pc.clipr(fit, draws=20))
    differential = de_genes(measured_effects(data))
    singles = [i for i in differential["intervention"].to_numpy() if "+" not in str(i)]
    print(implication(matrix, differential.sel(intervention=singles)).round(3).to_string(index=False))


def held_out(data: pc.PerturbationData, seed: int) -> None:
    """Pearson of predicted and measured changes: combinations of the screen, and single perturbations of measured genes left out."""
    combos = [c for c in data.conditions if "+" in c]
    rows: list[dict[str, Any]] = []
    if combos:
        train, test = data.split("combinations", test=0.3, seed=seed)
        fit = fitted(train, seed)
        asked = [c for c in test.conditions if c != data.control]
        truth = measured_effects(pc_join(test, train)).sel(intervention=asked)["effect"].to_numpy()
        found = {"linear_lcd": pc.effects(fit, asked, draws=20)["effect"].mean("draw").to_numpy()}
        found |= {k: baseline_effects(train, asked, k)["effect"].to_numpy() for k in ("additive", "mean", "control")}
        rows += scores("pairs", found, truth)
    targets = [p for p in data.perturbations if p in data.genes and (data.labels == p).sum() > 0]
    predicted: dict[str, list[Any]] = {"linear_lcd": [], "mean": [], "control": []}
    true = []
    folds = np.array_split(np.random.default_rng(seed).permutation(targets), 5)
    for fold in folds:
        train, test = data.split("perturbations", test=list(fold))
        model, guide = pc.build("linear_lcd", train, diffusion="learned", draws=0)
        fit = pc.fit(model, guide, train, max_epochs=2000, kl_warmup=0.0, seed=seed, progress=False)
        measured = measured_effects(pc_join(test, train))
        baseline = baseline_effects(train, list(fold), "mean")["effect"].to_numpy()
        for i, target in enumerate(fold):
            effect = measured.sel(intervention=target)["effect"].to_numpy()
            own = list(data.genes).index(target)
            unit = pc.effects(fit, pc.shift(target, 1.0), draws=1)["effect"][0, 0].to_numpy()
            predicted["linear_lcd"].append(unit * effect[own] / unit[own])
            predicted["mean"].append(baseline[i])
            predicted["control"].append(np.zeros_like(effect))
            true.append(effect)
    away = np.ones((len(targets), len(data.genes)), bool)
    away[np.arange(len(targets)), data.genes.get_indexer(np.concatenate(folds))] = False
    others = {k: np.where(away, np.stack(v), 0) for k, v in predicted.items()}
    rows += scores("unseen targets, own gene left out", others, np.where(away, np.stack(true), 0))
    print(pd.DataFrame(rows).round(4).to_string(index=False), flush=True)


def scores(what: str, found: dict[str, np.ndarray], truth: np.ndarray) -> list[dict[str, Any]]:
    def pearson(a: np.ndarray) -> float:
        with np.errstate(invalid="ignore", divide="ignore"):
            return float(np.nanmean([np.corrcoef(x, y)[0, 1] if x.std() > 0 else 0.0 for x, y in zip(a, truth, strict=True)]))

    head = {"held out": what, "n": len(truth)}
    return [head | {"method": k, "pearson": pearson(v), "mse": ((v - truth) ** 2).mean()} for k, v in found.items()]


def pc_join(test: pc.PerturbationData, train: pc.PerturbationData) -> pc.PerturbationData:
    """Held-out cells beside the training controls (the controls are in ``train`` only)."""
    x = np.concatenate([test.dense(), train.select(train.control).dense()])
    labels = np.concatenate([test.labels, np.full(int(train.is_control.sum()), train.control)])
    obs = pd.DataFrame({"perturbation": labels}, index=[str(i) for i in range(len(labels))])
    return pc.PerturbationData.from_anndata(ad.AnnData(x, obs=obs, var=pd.DataFrame(index=list(test.genes))), kind="normalised")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=["sachs", "papalexi", "schraivogel"])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for part in args.parts:
        print(f"== {part}", flush=True)
        if part == "sachs":
            sachs(args.seed)
        else:
            screen(part, args.seed)


if __name__ == "__main__":
    main()
