"""Recovery of the drift of linear diffusions from their stationary cells: ``python benchmarks/causal_recovery.py --out causal.csv``.

One row for each variant, graph, size, number of perturbations, seed and method. Rows are appended to ``--out`` as they finish; those
already there are not run again. The screens are those of :func:`pyrocausal.simulate_sde.linear_sde_screen` (sigma 1, 200 cells per
condition), the scores those of :func:`pyrocausal.graph_metrics.graph_scores`, on the scale of the true drift with edges from .5 on.

=====================  ==============================================================================================================
variant                what differs from the published systems; the table printed at the end is of means over seeds
=====================  ==============================================================================================================
published              nothing
sigma                  noise of each gene from Uniform(.5, 2), which no method is told
off_target             5 % of the other genes are hit as well, as strongly, which no method is told
knockdown              perturbations take away half or more of the target's production, basal Uniform(5, 10), in place of shifts
penetrance             perturbations take in 70 % of their cells
counts                 zero-inflated Poisson counts of the states, 10 per gene on average; baselines see log1p at median depth, whose
                       scale is not that of the states: F1, frobenius and shd mean little
=====================  ==============================================================================================================

======================  =============================================================================================================
method                  matrix [d, d], and its scale
======================  =============================================================================================================
precision_control       minus the Ledoit-Wolf precision of control cells: drift of a diffusion sqrt(2), twice the drift if it is symmetric
precision_pooled        the same of all cells, each about the mean of its condition
precision_exact         the same of the true covariance: what endless control cells would give
mean_difference         mean of the perturbed cells minus control in the row of their target, 0 elsewhere: total effects, in units of state
clipr_exact_score       linearisation of the exact score: the limit of a diffusion trained by score matching; scale as precision
clipr_true_drift        linearisation of the true drift: what the linearisation itself loses with fewer perturbations than genes; they
                        change the slope of the drift under knock-downs, so that at the origin it fails
clipr_true_control      the same from the control mean in place of the origin
closed_form             moments of cells with every gene perturbed on target (left out else); scale fixed by sigma = 1
clipr_trained_score     linearisation of a score network trained on these cells, as published but smaller; seconds are those of the training
jacobian_trained_score  slope of the same network at the control mean; seconds without the training
clipr_turned            clipr(curl="target") on the score that the moments of these cells give; half of it, as sigma is 1 and not sqrt(2)
linear_lcd              the model, edge_scale (.1, .3 or 1) chosen by the likelihood of held-out cells; scale of the true drift
linear_lcd_sigma        the same with a noise of each gene to learn
linear_lcd_knockdown    the same with row-scaling knock-downs
======================  =============================================================================================================

``held_out`` is the correlation of predicted and true mean shifts of genes that were not perturbed, ``held_out_others`` without what they do
to themselves (:func:`pyrocausal.graph_metrics.shift_correlation`). Methods with ``exact`` or ``true`` in their names see the truth: they
are limits of others, not competitors. Linearisations use the published ridge, 1e-3 for 100 genes and about ``.1 / n_genes`` for more.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from sklearn.covariance import ledoit_wolf

import pyrocausal as pc
from pyrocausal import linearise
from pyrocausal.dynamics import score
from pyrocausal.dynamics.select import select_settings
from pyrocausal.graph_metrics import graph_scores, shift_correlation
from pyrocausal.posterior import deterministic_tables, global_draws
from pyrocausal.simulate_sde import exact_score_responses, linear_sde_screen

Array = NDArray[np.float64]
Truth = dict[str, Any]
Method = Callable[[ad.AnnData, Truth], Array | None]

KEY = ["variant", "graph", "n_genes", "n_perturbed", "cells", "seed", "method"]
SCORES = ["auroc", "f1", "pearson", "auprc", "direction", "frobenius", "shd", "held_out", "held_out_others", "seconds"]
VARIANTS: dict[str, dict[str, Any]] = {
    "published": {},
    "sigma": {"sigma": (0.5, 2.0)},
    "off_target": {"effects": "off_target"},
    "knockdown": {"mechanism": "knockdown", "basal": (5.0, 10.0)},
    "penetrance": {"penetrance": 0.7},
    "counts": {"counts": True, "zero_inflation": (0.0, 0.3)},
}


def expression(adata: ad.AnnData) -> Array:
    """States, or log1p of counts at the median depth, [n_cells, d]."""
    if adata.uns["X_kind"] == "normalised":
        return np.asarray(adata.X, dtype=float)
    depth = np.asarray(adata.X.sum(1), dtype=float)
    return np.log1p(adata.X.toarray() * (np.median(depth) / np.maximum(depth, 1)))


def condition_means(adata: ad.AnnData) -> tuple[Array, pd.Index, Array]:
    """Means of control and single perturbations [q, d], their labels, and all those cells about their means [n, d]."""
    label = adata.obs["perturbation"].astype(str)
    rows = ~label.str.contains("+", regex=False).to_numpy()
    frame = pd.DataFrame(expression(adata)[rows])
    groups = frame.groupby(label.to_numpy()[rows])
    means = groups.mean()
    return means.to_numpy(), means.index, (frame - groups.transform("mean")).to_numpy()


def total_effects(adata: ad.AnnData, truth: Truth) -> Array:
    """Mean of each perturbation minus control, in the row of its target, [d, d]; 0 for genes that are not perturbed."""
    means, labels, _ = condition_means(adata)
    out = np.zeros((adata.n_vars, adata.n_vars))
    out[truth["targets"]] = means[labels.get_indexer(truth["perturbations"])] - means[labels.get_loc("control")]
    return out


def precision_control(adata: ad.AnnData, truth: Truth) -> Array:
    control = expression(adata)[(adata.obs["perturbation"] == "control").to_numpy()]
    return -np.linalg.inv(ledoit_wolf(control)[0])


def precision_pooled(adata: ad.AnnData, truth: Truth) -> Array:
    return -np.linalg.inv(ledoit_wolf(condition_means(adata)[2], assume_centered=True)[0])


def precision_exact(adata: ad.AnnData, truth: Truth) -> Array:
    return -np.linalg.inv(truth["covariance"])


def clipr_exact_score(adata: ad.AnnData, truth: Truth) -> Array:
    responses = exact_score_responses(truth)
    return linearise.linearise(responses.score, responses.limit, ridge=0.1 / adata.n_vars)


def clipr_true_drift(adata: ad.AnnData, truth: Truth) -> Array:
    responses = exact_score_responses(truth)
    return linearise.linearise(responses.drift, responses.limit, ridge=0.1 / adata.n_vars)


def clipr_true_control(adata: ad.AnnData, truth: Truth) -> Array:
    centre = truth["means"][0]
    responses = exact_score_responses(truth, at=centre)
    return linearise.linearise(responses.drift, responses.limit - centre, ridge=0.1 / adata.n_vars)


def closed_form(adata: ad.AnnData, truth: Truth) -> Array | None:
    """``M = -D^-1 diag(c)`` from ``D M = -diag(c)`` for total effects D of shifts c on target, and ``2 (S M)_kk = -1`` for the c."""
    if len(truth["targets"]) < adata.n_vars:
        return None
    _, labels, residual = condition_means(adata)
    return linearise.closed_form(total_effects(adata, truth), residual.T @ residual / (len(residual) - len(labels)))


def clipr_turned(adata: ad.AnnData, truth: Truth) -> Array:
    """The rotation that scores leave out, from moments: ``clipr(..., curl="target")`` of a perfectly trained score on these cells."""
    _, labels, residual = condition_means(adata)
    precision = np.linalg.inv(residual.T @ residual / (len(residual) - len(labels)))
    moved = total_effects(adata, truth)[truth["targets"]]
    return 0.5 * linearise.curl_correct(moved @ precision, precision, truth["targets"])


def trained_score(adata: ad.AnnData, truth: Truth) -> tuple[Array, Array, Array]:
    """Responses [p, d] and the Jacobian at the control mean of a score network that was trained on these cells; kept for the methods here.

    The published network and schedule at the size of two processor cores: width 256, batches of 512, 10,000 steps.
    """
    if "trained" not in truth:
        data = pc.PerturbationData.from_anndata(adata)
        codes, doses = score.conditions_of(data)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network = score.ScoreNetwork(adata.n_vars, len(data.perturbations), n_hidden=256, n_embed=256)
        source = score.from_cells(torch.as_tensor(data.dense()), codes, len(doses))
        network.fit_units(source, doses, torch.Generator().manual_seed(0))
        score.train_score(network, source, doses, steps=10_000, batch_size=512, parity=True, progress=False)
        dose = torch.eye(len(data.perturbations))[data.perturbations.get_indexer(truth["perturbations"])]
        with torch.no_grad():
            V, L = network.drift(torch.zeros(len(dose), adata.n_vars), dose), network.limit(dose)
        slope = torch.func.jacrev(lambda x: network.drift(x, 0 * dose[0]))(network.centre).T.detach()
        truth["trained"] = tuple(t.double().numpy() for t in (V, L, slope))
    return truth["trained"]  # type: ignore[no-any-return]


def clipr_trained_score(adata: ad.AnnData, truth: Truth) -> Array:
    V, L, _ = trained_score(adata, truth)
    return linearise.linearise(V, L, ridge=0.1 / adata.n_vars)


def jacobian_trained_score(adata: ad.AnnData, truth: Truth) -> Array:
    return trained_score(adata, truth)[2]


def linear_lcd(adata: ad.AnnData, truth: Truth, **settings: Any) -> Array:
    """LinearLCD, the strength of its prior on edges chosen by held-out cells."""
    data = pc.PerturbationData.from_anndata(adata, kind=None if "unit" in truth else "normalised")
    shared = {"standardise": False, "draws": 0} | settings
    chosen = select_settings(data, progress=False, **shared)["settings"][0]
    model, guide = pc.build("linear_lcd", data, **shared, **chosen)
    return drift_of(pc.fit(model, guide, data, max_epochs=3000, kl_warmup=0.0, progress=False))


def drift_of(fit: pc.Fit) -> Array:
    sampled = global_draws(fit, 1)
    tables = deterministic_tables(fit, sampled, 1)
    return tables["graph"][0] - np.diag(tables["decay"][0])


METHODS: dict[str, Method] = {
    "precision_control": precision_control,
    "precision_pooled": precision_pooled,
    "precision_exact": precision_exact,
    "mean_difference": total_effects,
    "clipr_exact_score": clipr_exact_score,
    "clipr_true_drift": clipr_true_drift,
    "clipr_true_control": clipr_true_control,
    "closed_form": closed_form,
    "clipr_trained_score": clipr_trained_score,
    "jacobian_trained_score": jacobian_trained_score,
    "clipr_turned": clipr_turned,
    "linear_lcd": linear_lcd,
    "linear_lcd_sigma": partial(linear_lcd, diffusion="learned"),
    "linear_lcd_knockdown": partial(linear_lcd, mechanism="knockdown"),
}


def run(key: dict[str, Any], adata: ad.AnnData) -> dict[str, Any] | None:
    """A row of the table, or None if the method does not apply."""
    truth, start = adata.uns["truth"], time.perf_counter()
    matrix = METHODS[key["method"]](adata, truth)
    seconds = time.perf_counter() - start
    if matrix is None:
        return None
    scores = graph_scores(matrix, truth["drift"])
    unseen = np.setdiff1d(np.arange(adata.n_vars), truth["targets"])
    held_out = {f"held_out{'_others' * o}": shift_correlation(matrix, truth["drift"], unseen, o) for o in (False, True)}
    return key | scores[[s for s in SCORES if s in scores]].to_dict() | held_out | {"seconds": seconds}


def summary(table: pd.DataFrame, asked: dict[str, list[Any]]) -> str:
    """Means over seeds of the rows that were asked for."""
    rows = np.logical_and.reduce([table[name].isin(values) for name, values in asked.items()])
    groups = table[rows].groupby([k for k in KEY if k != "seed"])
    return groups[SCORES].mean().join(groups.size().rename("seeds")).round(3).to_string()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", default=["published"], choices=VARIANTS)
    parser.add_argument("--graphs", nargs="+", default=["er", "sfo"], choices=["er", "sfo"])
    parser.add_argument("--genes", type=int, default=100)
    parser.add_argument("--perturbed", type=int, nargs="+", default=[30, 50, 70, 100])
    parser.add_argument("--cells", type=int, default=200, help="of every condition")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--out", type=Path, default=Path("causal_recovery.csv"))
    args = parser.parse_args()
    done = pd.read_csv(args.out) if args.out.exists() else pd.DataFrame(columns=KEY)
    have = set(done[KEY].itertuples(index=False, name=None))
    for variant in args.variants:
        for graph in args.graphs:
            for p in args.perturbed:
                for seed in args.seeds:
                    known = (variant, graph, args.genes, p, args.cells, seed)
                    todo = [m for m in args.methods if (*known, m) not in have]
                    if not todo:
                        continue
                    adata = linear_sde_screen(args.genes, p, graph, cells_per_perturbation=args.cells, seed=seed, **VARIANTS[variant])
                    for method in todo:
                        row = run(dict(zip(KEY, (*known, method), strict=True)), adata)
                        if row is not None:
                            pd.DataFrame([row])[KEY + SCORES].to_csv(args.out, mode="a", header=not args.out.exists(), index=False)
    asked = (args.variants, args.graphs, [args.genes], args.perturbed, [args.cells], args.seeds, args.methods)
    print(summary(pd.read_csv(args.out), dict(zip(KEY, asked, strict=True))))


if __name__ == "__main__":
    main()
