"""The baselines of the collection on a real screen, trained on one half of its cells and scored on the other.

    python benchmarks/baselines.py norman2019_k562_crispra_hvg500.h5ad [--layer log1p_cp10k] [--splits 40] [--out table.csv]

The cells of every condition are halved at random; combinations whose parts are all measured alone are held out of the training half
altogether, and predicted. The duplicates are the training half's own cells of those combinations. Scores are against the other half:

- l2: ``||x^ - x||`` of the condition means over all genes;
- coverage: share of measured effects inside the 90 % interval (of draws, widened by the measurement's error), and its interval score, over
  the genes expressed in the training controls (mean above ``--expressed``);
- gap: l2 less that of ``additive_eb``, paired, with its standard error over splits.

One process; a split takes about a second.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import xarray as xr
from scipy import stats

import pyrocausal as pc
from pyrocausal.duplicates import interpolated_duplicate, technical_duplicate
from pyrocausal.evaluate import measured_effects
from pyrocausal.interventions import parse
from pyrocausal.splits import halves

NAMES = ["control", "mean_perturbed", "matching_mean", "additive", "additive_eb", "linear_embedding"]
TAIL = 0.05


def scores(predicted: xr.Dataset, measured: xr.Dataset, baseline: np.ndarray, expressed: np.ndarray) -> pd.DataFrame:
    """A row for each intervention."""
    p, m = predicted["effect"], measured.sel(intervention=predicted["intervention"].values)
    centre = (p.mean("draw") if "draw" in p.dims else p).transpose("intervention", "gene").values
    start = predicted["baseline"].mean("draw").values if "draw" in predicted["baseline"].dims else predicted["baseline"].values
    rows = {"l2": np.linalg.norm(start + centre - m["effect"].values - baseline, axis=1)}
    if "draw" in p.dims:
        low, high = p.quantile([TAIL, 1 - TAIL], "draw").transpose("quantile", "intervention", "gene").values
        noise = -stats.norm.ppf(TAIL) * m["se"].values
        low, high = centre - np.hypot(centre - low, noise), centre + np.hypot(high - centre, noise)
        y = m["effect"].values
        miss = np.maximum(low - y, 0) + np.maximum(y - high, 0)
        rows["coverage"] = (miss == 0)[:, expressed].mean(1)
        rows["interval_score"] = (high - low + miss / TAIL)[:, expressed].mean(1)
    return pd.DataFrame(rows, index=pd.Index(predicted["intervention"].values, name="intervention"))


def one_split(data: pc.PerturbationData, seed: int, least: float, draws: int) -> pd.DataFrame:
    """All methods on one split."""
    train, test = halves(data, seed)
    alone = {c for c in train.conditions if train.separator not in c}
    held = [c for c in train.conditions if train.separator in c and all(p in alone for p in c.split(train.separator))]
    if not held:
        raise SystemExit("the screen has no combination whose parts are all measured alone")
    kept = train[~np.isin(train.labels, held)]
    measured = measured_effects(test)
    baseline = technical_duplicate(test)["baseline"].values
    expressed = technical_duplicate(train)["baseline"].values > least
    tables = {"technical duplicate": technical_duplicate(train), "interpolated duplicate": interpolated_duplicate(train)}
    tables = {k: v.sel(intervention=held) for k, v in tables.items()}
    for name in NAMES:
        fit = pc.fit(*pc.build(name, kept), kept, seed=seed, progress=False)
        tables[name] = pc.effects(fit, {c: parse(c) for c in held}, draws=draws, cells=4, seed=seed)
    rows = {k: scores(v, measured, baseline, expressed) for k, v in tables.items()}
    return pd.concat(rows, names=["method"]).assign(split=seed).reset_index()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("screen", type=Path)
    parser.add_argument("--layer")
    parser.add_argument("--splits", type=int, default=40)
    parser.add_argument("--draws", type=int, default=100)
    parser.add_argument("--expressed", type=float, default=0.1, help="least mean of a gene in the controls, on the scale of effects")
    parser.add_argument("--out", type=Path)
    a = parser.parse_args()
    adata = ad.read_h5ad(a.screen)
    adata = adata[:, np.asarray(adata.X.sum(0)).ravel() > 0].copy()
    data = pc.PerturbationData.from_anndata(adata, layer=a.layer)
    table = pd.concat([one_split(data, seed, a.expressed, a.draws) for seed in range(a.splits)])
    if a.out is not None:
        table.to_csv(a.out, index=False)
    held = sorted(set(table["intervention"]))
    print(f"{data}\n{a.splits} splits, {len(held)} held-out combinations: {', '.join(held[:6])}{', ...' if len(held) > 6 else ''}")
    by_split = table.groupby(["method", "split"])["l2"].mean().unstack("method")
    gap = by_split.sub(by_split["additive_eb"], axis=0)
    out = table.groupby("method")[["l2", "coverage", "interval_score"]].mean()
    out["gap"], out["gap_se"] = gap.mean(), gap.std() / np.sqrt(max(len(gap), 1))
    print(out.sort_values("l2").round(4).to_string())


if __name__ == "__main__":
    main()
