"""Goal M3 (interactions): doubles of seen genes in structural causal models, and interaction calls.

The stratum is declared by the truth: pairs with more than 20 % of their energy not additive, over the genes that are scored (own targets
left out; with them a method that knows a held gene is held would win for that alone). Errors as in ``goals_worlds.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import anndata as ad
import numpy as np
from goals_table import Records, Row, Unit, attempt
from goals_worlds import (
    PENALTY,
    SCM_DRAWS,
    Array,
    baseline_effect,
    fitted_lcd,
    fitted_scm,
    held_effects,
    reach_of,
    responses,
    ridge_system,
    screened,
)

import pyrocausal as pc
from pyrocausal.graph_baselines import de_scores
from pyrocausal.interactions import call_interactions
from pyrocausal.interventions import parse
from pyrocausal.simulate_regulatory import STRATUM
from pyrocausal.simulate_scm import scm_screen

ZERO = 1e-8  # of a true interaction; means are exact, or averages under the same noise


def pairs_of(make: Callable[[int], ad.AnnData], predicts: bool, seed: int, quick: bool) -> Records:
    """Unseen doubles of seen genes, in the stratum and over all pairs; and interaction calls on the measured pairs."""
    adata = make(seed)
    truth, data = adata.uns["truth"], pc.PerturbationData.from_anndata(adata)
    conditions = [str(c) for c in truth["conditions"]]
    singles = [c for c in conditions[1:] if "+" not in c]
    doubles = conditions[1 + len(singles) :]
    targets = data.genes.get_indexer(singles)
    sets = targets[truth["pairs"]]
    kept = np.ones((len(doubles), len(data.genes)), dtype=bool)
    np.put_along_axis(kept, sets, False, 1)
    effect = (truth["expression"] - truth["expression"][0])[1 + len(singles) :] * kept
    interaction = truth["interaction"] * kept
    energy = (effect**2).sum(1)
    stratum = (interaction**2).sum(1) > STRATUM * np.where(energy > 0, energy, np.inf)
    real = np.abs(interaction) > ZERO

    def score(predicted: Array) -> Iterable[tuple[str, float, float]]:
        error = (((predicted - effect) ** 2) * kept).sum(1)
        return [("pairs all", error.sum(), energy.sum()), ("pairs stratum", error[stratum].sum(), energy[stratum].sum())]

    def calls() -> Iterable[tuple[str, float, float]]:
        table = call_interactions(data, doubles, fdr=0.1)
        called = table["called"].to_numpy().reshape(len(doubles), -1) & kept  # pairs in the order given, genes within
        n, right = int(called.sum()), int((called & real).sum())
        yield "calls fdp", (n - right) / max(n, 1), 1.0
        yield "calls false", n - right, int((kept & ~real).sum())
        yield "calls any", float(n > right), 1.0
        inside = stratum[:, None] & real
        if inside.any():
            yield "calls power", int((called & inside).sum()), int(inside.sum())
        if real.any():
            yield "calls power, all pairs", int((called & real).sum()), int(real.sum())

    out = attempt("call_interactions", "calls", calls)
    out += [{"method": "truth", "metric": "stratum share", "num": float(stratum.sum()), "den": float(len(stratum))}]
    if not predicts:
        return out
    train = data[np.isin(data.labels, [data.control, *singles])]
    for name in ("control", "mean_perturbed", "matching_mean", "additive", "additive_eb"):
        out += attempt(name, "pairs", lambda n=name: score(baseline_effect(n, train, doubles)))
    change = np.stack([train.dense(np.float64)[train.labels == s].mean(0) for s in singles])
    change = (change - train.dense(np.float64)[train.is_control].mean(0))[np.arange(len(singles)), targets]  # measured, of each target

    def held() -> Iterable[tuple[str, float, float]]:
        R = responses(fitted_lcd(train, seed, quick), singles)
        return score(held_effects(R, sets, change[truth["pairs"]])[0])

    out += attempt("linear_lcd", "pairs", held)

    def told() -> Iterable[tuple[str, float, float]]:
        found = pc.effects(fitted_scm(train, seed), {c: parse(c) for c in doubles}, draws=SCM_DRAWS, cells=2, seed=seed)["effect"]
        return score(found.mean("draw").transpose("intervention", "gene").to_numpy())

    out += attempt("scm", "pairs", told)
    x, z, own = train.dense(np.float64), de_scores(train), train.genes.get_indexer(train.labels)
    seen = np.isin(np.arange(len(data.genes)), targets)

    def ridge() -> Iterable[tuple[str, float, float]]:
        R = reach_of(ridge_system(x, own, screened(z, seen), PENALTY))
        return score(held_effects(R[None], sets, change[truth["pairs"]])[0])

    out += attempt("ridge, ancestor screen", "pairs", ridge)
    return out


def _pairs(seed: int, **settings: Any) -> ad.AnnData:
    return scm_screen(**{"n_genes": 30, "n_perturbed": 20, "doubles": 190, "seed": seed} | settings)


UNITS = [
    Unit("doubles linear do 2", partial(pairs_of, partial(_pairs, degree=2.0), True), 12),
    Unit("doubles linear do 4", partial(pairs_of, partial(_pairs, degree=4.0), True), 12),
    Unit("doubles tanh do 4", partial(pairs_of, partial(_pairs, degree=4.0, mechanism="tanh"), True), 12),
    Unit("doubles linear shift 4", partial(pairs_of, partial(_pairs, degree=4.0, intervention="shift"), False), 12),
]
_SUMS = ("scm", "control", "mean_perturbed", "matching_mean", "additive", "additive_eb", "ridge, ancestor screen")


def _calls(task: str, unit: str, metric: str, **settings: Any) -> Row:
    return Row(**{"goal": "M3", "task": task, "unit": unit, "metric": metric, "ours": "call_interactions"} | settings)


def _doubles(degree: str, unit: str) -> list[Row]:
    common: dict[str, Any] = {"goal": "M3", "unit": unit, "ours": "linear_lcd", "statistic": "pooled", "opponents": _SUMS}
    return [
        Row(
            task=f"unseen doubles, {degree}, NMSE in the stratum",
            metric="pairs stratum",
            **common | {"against": ("additive",), "relation": "ratio", "bar": (None, 0.5)},
        ),
        Row(
            task=f"unseen doubles, {degree}, NMSE of all pairs",
            metric="pairs all",
            **common | {"against": ("additive_eb",), "relation": "ratio", "bar": (None, 1.05)},
        ),
        _calls(f"interaction calls at FDR 10 %, {degree}: realised FDR", unit, "calls fdp", bar=(None, 0.12)),
        _calls(f"interaction calls, {degree}: power in the stratum", unit, "calls power", statistic="pooled", bar=(0.5, None), lower=False),
    ]


ROWS = [
    *_doubles("linear do, degree 2", "doubles linear do 2"),
    *_doubles("linear do, degree 4", "doubles linear do 4"),
    *_doubles("tanh do, degree 4", "doubles tanh do 4"),
    _calls(
        "calls where nothing interacts (linear shift): share of tests",
        "doubles linear shift 4",
        "calls false",
        statistic="pooled",
        bar=(None, 0.1),
    ),
    _calls("calls where nothing interacts: share of screens with any", "doubles linear shift 4", "calls any", bar=(None, 0.1)),
    Row("M3", "interaction AUPRC on Norman above .33", why="needs the full Norman screen; the slice has three pairs with both singles"),
]
