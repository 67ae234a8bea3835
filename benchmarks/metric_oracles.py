"""Parity of the metrics with published packages.

``python benchmarks/metric_oracles.py write tests/data/metric_oracles.json`` runs in an environment with cell-eval, cell-eval2, scperteval,
scperturb, gge-eval, gadjid and scikit-learn (Python 3.11, no torch needed) and stores what they say of the fixtures below;
``python benchmarks/metric_oracles.py compare tests/data/metric_oracles.json`` runs where pyrocausal is installed, and prints the largest
difference of each metric. Fixtures are made from seeds: 20 random panels, and the degenerate ones in ``DEGENERATE``.

Entries are ``{fixture: {"package metric": values}}``; missing values are null. Only what a package answers is stored: where it raises, or
where its convention is not ours by choice, there is no entry (the docstrings say which is followed and why).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

DEGENERATE = ("ties", "one_cell", "empty_de", "constant", "zero", "missing_target")
NAMES = tuple(f"random{seed}" for seed in range(20)) + DEGENERATE


@dataclass(frozen=True)
class Fixture:
    """Counts of P perturbations (true and predicted) and of control cells, tables of tests, and random graphs; ``own`` is -1 for none."""

    true: list[Any]
    predicted: list[Any]
    control: Any
    own: Any
    score: Any
    tables: dict[str, dict[str, Any]]
    graphs: tuple[Any, Any]

    @property
    def labels(self) -> list[str]:
        return [f"g{o:02d}" if o >= 0 else f"x{row:02d}" for row, o in enumerate(self.own)]

    @property
    def genes(self) -> list[str]:
        return [f"g{g:02d}" for g in range(self.control.shape[1])]

    def log(self, cells: Any) -> Any:
        """log1p of counts scaled to 1e4 a cell."""
        return np.log1p(1e4 * cells / np.maximum(cells.sum(1, keepdims=True), 1))

    @property
    def logs(self) -> list[Any]:
        return [(self.log(a), self.log(b)) for a, b in zip(self.true, self.predicted, strict=True)]

    @property
    def means(self) -> tuple[Any, Any, Any]:
        """Means of :meth:`log`: predicted [P, G], true [P, G], control [G]."""
        true, predicted = (np.stack([x.mean(0) for x in side]) for side in zip(*self.logs, strict=True))
        return predicted, true, self.log(self.control).mean(0)


def fixture(name: str) -> Fixture:
    """The fixture of that name; degenerate ones are a random panel with something changed."""
    seed = int(name[6:]) if name.startswith("random") else 100 + DEGENERATE.index(name)
    rng = np.random.default_rng(seed)
    n, genes = 5 + seed % 4, 20 + 5 * (seed % 5)
    base = rng.gamma(1.0, 4.0, genes)
    effect = rng.normal(0, 0.8, (n, genes)) * (rng.uniform(size=(n, genes)) < 0.4)
    effect[:, 0] += 0.7  # what all perturbations share
    own = np.sort(rng.choice(genes, n, replace=False))
    own[-1] = -1

    def cells(rate: Any, count: int) -> Any:
        return rng.poisson(rate * rng.gamma(4.0, 0.25, (count, 1))).astype(float)

    true = [cells(base * np.exp(e), int(rng.integers(9, 21))) for e in effect]
    predicted = [cells(base * np.exp(0.6 * e + rng.normal(0, 0.3, genes)), int(rng.integers(9, 21))) for e in effect]
    control = cells(base, 40)
    tables = {side: _table(rng, effect) for side in ("true", "predicted")}
    graphs = tuple(_dag(rng, 8) for _ in range(2))
    made = Fixture(true, predicted, control, own, rng.normal(size=(n, genes)), tables, graphs)
    return made if name.startswith("random") else _degenerate(name, made)


def _degenerate(name: str, f: Fixture) -> Fixture:
    n, genes = f.score.shape
    if name == "ties":  # two true profiles are one, so are two predictions, and half of the scores
        twin = {"true": [f.true[1], *f.true[1:]], "predicted": [f.predicted[1], *f.predicted[1:]]}
        return replace(f, **twin, score=np.round(f.score))
    if name == "one_cell":
        return replace(f, true=[f.true[0][:1], *f.true[1:]], predicted=[f.predicted[0], f.predicted[1][:1], *f.predicted[2:]])
    if name == "empty_de":
        return replace(f, tables={s: t | {"p_adjusted": np.ones((n, genes)), "p_value": np.ones((n, genes))} for s, t in f.tables.items()})
    if name == "constant":  # the same cells are predicted for everything
        table = {k: np.repeat(v[:1], n, axis=0) for k, v in f.tables["predicted"].items()}
        return replace(f, predicted=[f.predicted[0]] * n, score=np.ones((n, genes)), tables=f.tables | {"predicted": table})
    if name == "zero":  # the control is predicted
        table = {"lfc": np.zeros((n, genes)), "p_value": np.ones((n, genes)), "p_adjusted": np.ones((n, genes))}
        return replace(f, predicted=[f.control] * n, tables=f.tables | {"predicted": table})
    own = np.full(n, -1)  # missing_target: of one perturbation only is the target measured
    own[0] = f.own[0]
    return replace(f, own=own)


def _table(rng: Any, effect: Any) -> dict[str, Any]:
    lfc = np.float32(effect + rng.normal(0, 0.4, effect.shape)).astype(float)  # cell-eval stores single precision
    p = rng.uniform(size=effect.shape) ** (1 + 8 * np.abs(effect))
    order = np.argsort(p, axis=1)
    scaled = np.take_along_axis(p, order, 1) * p.shape[1] / np.arange(1, p.shape[1] + 1)
    adjusted = np.empty_like(p)
    np.put_along_axis(adjusted, order, np.minimum(np.minimum.accumulate(scaled[:, ::-1], 1)[:, ::-1], 1), 1)
    return {"lfc": lfc, "p_value": p, "p_adjusted": np.float32(adjusted).astype(float)}


def _dag(rng: Any, d: int) -> Any:
    order = rng.permutation(d)
    upper = np.triu(rng.uniform(size=(d, d)) < 0.3, 1)
    return upper[np.ix_(order, order)]


def ours(f: Fixture) -> dict[str, Any]:
    """Every stored entry as pyrocausal has it."""
    from pyrocausal import evaluate as ev

    p, t, c = f.means
    centre = ev.perturbed_mean(t)
    weights = ev.de_weights(f.score)
    bulk = [ev.bulk_lognorm(x) for x in (f.predicted, f.true, [f.control])]
    capped = ev.capped_mse(*bulk, own=f.own)
    change = [b.value - bulk[2].value for b in bulk[:2]]
    hat, true = (ev.DETable(**f.tables[side]) for side in ("predicted", "true"))
    from_cells = ev.wilcoxon_de(f.predicted, f.control, min_control=5.0)

    def each(distance: Any) -> list[float]:
        return [distance(a, b) for b, a in f.logs]

    out: dict[str, Any] = {
        "sklearn mse": ev.mse(p, t),
        "sklearn weighted_r2": ev.weighted_r2(p, t, centre, weights),
        "sklearn average_precision": ev.de_auprc(-hat.p_adjusted, true),
        "scperteval pearson_ctrl": ev.delta_correlation(p, t, c),
        "scperteval pearson_pert": ev.delta_correlation(p, t, centre),
        "scperteval weighted_pearson": ev.delta_correlation(p, t, centre, weights),
        "scperteval wmse_exp2": ev.weighted_mse(p, t, weights),
        "scperteval weighted_r2": ev.weighted_r2(p, t, c, weights),
        "scperteval l2_heg": ev.l2_heg(p, t, c, k=10),
        "scperteval rank": ev.retrieval(p, t, ev.Ranking("predictions", "l2", "for", "n-1", "none", "rank")),
        "scperteval nir": ev.retrieval(p, t, "nir"),
        "scperteval energy": each(lambda a, b: ev.energy_distance(a, b, *ev.ENERGY["scperteval"])),
        "scperteval mmd": each(ev.mmd),
        "scperteval de_auprc": ev.de_auprc(np.abs(hat.lfc), true),
        "scperturb edist": each(lambda a, b: ev.energy_distance(a, b, *ev.ENERGY["scperturb"])),
        "gge energy": each(lambda a, b: ev.energy_distance(a, b, *ev.ENERGY["gge"])),
        "cell_eval pearson_delta": ev.delta_correlation(p, t, c),
        "cell_eval mae": ev.mae(p, t),
        "cell_eval pds_l1": ev.retrieval(p - c, t - c, "vcc2025", own=f.own),
        "cell_eval overlap_at_N": ev.overlap_at_n(hat, true),
        "cell_eval overlap_at_5": ev.overlap_at_n(hat, true, k=5),
        "cell_eval precision_at_N": ev.overlap_at_n(hat, true, precision=True),
        "cell_eval recall": ev.sig_recall(hat, true),
        "cell_eval direction_match": ev.direction_match(hat, true),
        "cell_eval spearman_lfc": ev.lfc_spearman(hat, true),
        "cell_eval pr_auc": ev.de_auprc(-np.log10(np.clip(hat.p_adjusted, 1e-10, 1.0)), true),
        "cell_eval2 bulk": bulk[1].value.sum(1),
        "cell_eval2 jackknife": bulk[1].noise,
        "cell_eval2 capped_numerator": capped.numerator,
        "cell_eval2 capped_denominator": capped.denominator,
        "cell_eval2 pds_cosine": ev.retrieval(*change, "vcc2026", own=f.own),
        "cell_eval2 sig_jaccard": ev.sig_jaccard(hat, true, own=f.own),
        "cell_eval2 lfc_nmae": ev.lfc_nmae(hat, true, own=f.own, min_genes=3),
        "cell_eval2 fidelity": ev.direction_fidelity(hat, true, own=f.own),
        "cell_eval2 reach": ev.direction_reach(hat, true, own=f.own),
        "cell_eval2 de_lfc": np.nansum(np.where(np.abs(from_cells.lfc) < 20, from_cells.lfc, 0), axis=1),
        "gadjid sid": [ev.structural_intervention_distance(f.graphs[1], f.graphs[0])],
        "gadjid shd": [ev.graph_scores(*(g.astype(float) for g in f.graphs[::-1]))["shd"]],
    }
    return {k: np.asarray(v, dtype=float) for k, v in out.items()}


def oracles(f: Fixture) -> dict[str, Any]:
    """Every entry as the packages have it, where they answer."""
    out: dict[str, Any] = {}
    for part in (_sklearn, _scperteval, _cells, _cell_eval, _cell_eval2, _gadjid):
        for name, answer in part(f).items():
            try:
                out[name] = np.asarray(answer(), dtype=float)
            except Exception as error:
                print(f"  {name}: {type(error).__name__}: {str(error)[:120]}")
    return out


def _sklearn(f: Fixture) -> dict[str, Callable[[], Any]]:
    import sklearn.metrics as sk
    from scperteval.blocks.de import mejia_weights

    p, t, _ = f.means
    true, hat = f.tables["true"], f.tables["predicted"]
    label = true["p_adjusted"] < 0.05
    w, mu = [mejia_weights(s) for s in f.score], t.mean(0)
    usable = [0 < row.sum() < row.size for row in label]
    return {
        "sklearn mse": lambda: [sk.mean_squared_error(a, b) for a, b in zip(t, p, strict=True)],
        "sklearn weighted_r2": lambda: [sk.r2_score(a - mu, b - mu, sample_weight=v) for a, b, v in zip(t, p, w, strict=True)],
        "sklearn average_precision": lambda: [
            sk.average_precision_score(y, s) if ok else np.nan for y, s, ok in zip(label, -hat["p_adjusted"], usable, strict=True)
        ],
    }


def _scperteval(f: Fixture) -> dict[str, Callable[[], Any]]:
    from scperteval.protocols import metrics as m

    p, t, c = f.means
    mu = t.mean(0)
    heg = np.argsort(-c, kind="stable")[:10]
    truths = [type("DE", (), {"pvalue_adj": row}) for row in f.tables["true"]["p_adjusted"]]

    class Context:  # what a weighted metric asks for: the score of the perturbation at hand
        current_pert, cfg = 0, type("Config", (), {"truth": "truth"})

        def __init__(self, score: Any) -> None:
            self.statistic = score

        def de(self, *_: Any) -> Any:
            return self

    def rows(metric: Callable[..., float], shift: Any = 0.0, **options: Any) -> list[float]:
        return [metric(a - shift, b - shift, Context(s), **options) for a, b, s in zip(t, p, f.score, strict=True)]

    out = {
        "scperteval pearson_ctrl": lambda: rows(m.pearson, c),
        "scperteval pearson_pert": lambda: rows(m.pearson, mu),
        "scperteval weighted_pearson": lambda: rows(m.weighted_pearson, mu),
        "scperteval wmse_exp2": lambda: rows(m.weighted_mse),
        "scperteval weighted_r2": lambda: rows(m.weighted_r2, c),
        "scperteval l2_heg": lambda: [m.l2(a[heg], b[heg], None) for a, b in zip(t, p, strict=True)],
        "scperteval energy": lambda: [m.energy_distance(a, b, None) for a, b in f.logs],
        "scperteval mmd": lambda: [m.unbiased_mmd_median(a, b, None) for a, b in f.logs],
        "scperteval de_auprc": lambda: [m.de_auprc(*pair, None) for pair in zip(truths, np.abs(f.tables["predicted"]["lfc"]), strict=True)],
    }
    if len(np.unique(np.round(np.concatenate([p, t]), 9), axis=0)) == 2 * len(p):  # it breaks ties at random
        out |= {
            "scperteval rank": lambda: m.rank_retrieval(t, p, None),
            "scperteval nir": lambda: m.nir(t, p, None),
        }
    return out


def _cells(f: Fixture) -> dict[str, Callable[[], Any]]:
    import anndata as ad
    import pandas as pd
    from gge.metrics.distances import EnergyDistance
    from scperturb import edist

    def scperturb(a: Any, b: Any) -> float:
        data = ad.AnnData(np.concatenate([a, b]), obs=pd.DataFrame({"perturbation": ["a"] * len(a) + ["b"] * len(b)}).rename(index=str))
        data.obsm["X_pca"] = data.X
        return edist(data, verbose=False).loc["a", "b"]

    if min(len(x) for pair in f.logs for x in pair) < 2:  # both are NaN for a sample of one cell; we follow scperteval there
        return {}
    return {
        "scperturb edist": lambda: [scperturb(a, b) for a, b in f.logs],
        "gge energy": lambda: [EnergyDistance(use_geomloss=False).compute_per_gene(a, b).mean() for a, b in f.logs],
    }


def _frame(f: Fixture, side: str, names: tuple[str, str, str]) -> Any:
    import polars as pl

    t, n = f.tables[side], len(f.genes)
    columns = {"target": np.repeat(f.labels, n).tolist(), "feature": f.genes * len(f.labels)}
    return pl.DataFrame(columns | dict(zip(names, (t[k].ravel() for k in ("lfc", "p_value", "p_adjusted")), strict=True)))


def _anndata(f: Fixture, side: list[Any], transform: Callable[[Any], Any]) -> Any:
    import anndata as ad
    import pandas as pd

    groups = [*side, f.control]
    names = np.repeat([*f.labels, "non-targeting"], [len(g) for g in groups])
    obs = pd.DataFrame({"target": names}).rename(index=str)
    return ad.AnnData(np.concatenate([transform(g) for g in groups]), obs=obs, var=pd.DataFrame(index=f.genes))


def _cell_eval(f: Fixture) -> dict[str, Callable[[], Any]]:
    from cell_eval._types import PerturbationAnndataPair
    from cell_eval._types._de import initialize_de_comparison
    from cell_eval.metrics import _anndata as m
    from cell_eval.metrics import _de as d

    pair = PerturbationAnndataPair(
        real=_anndata(f, f.true, f.log), pred=_anndata(f, f.predicted, f.log), pert_col="target", control_pert="non-targeting"
    )
    table = initialize_de_comparison(*(_frame(f, s, ("log2_fold_change", "p_value", "fdr")) for s in ("true", "predicted")))

    def ordered(answer: dict[str, float]) -> list[float]:
        return [np.nan if (v := answer.get(k)) is None else v for k in f.labels]

    return {
        "cell_eval pearson_delta": lambda: ordered(m.pearson_delta(pair)),
        "cell_eval mae": lambda: ordered(m.mae(pair)),
        "cell_eval pds_l1": lambda: ordered(m.discrimination_score(pair, "l1")),
        "cell_eval overlap_at_N": lambda: ordered(d.de_overlap_metric(table, None)),
        "cell_eval overlap_at_5": lambda: ordered(d.de_overlap_metric(table, 5)),
        "cell_eval precision_at_N": lambda: ordered(d.de_overlap_metric(table, None, "precision")),
        "cell_eval recall": lambda: ordered(d.DESigGenesRecall()(table)),
        "cell_eval direction_match": lambda: ordered(d.DEDirectionMatch()(table)),
        "cell_eval spearman_lfc": lambda: ordered(d.DESpearmanLFC()(table)),
        "cell_eval pr_auc": lambda: ordered(d.compute_pr_auc(table)),
    }


def _cell_eval2(f: Fixture) -> dict[str, Callable[[], Any]]:
    import polars as pl
    from cell_eval2.de import prepare_de, resolve_target_genes
    from cell_eval2.de_compute import compute_de
    from cell_eval2.metrics import de, delta, direction, discrimination
    from cell_eval2.prep import pseudobulk_bulk_lognorm_with_moments

    sides = {s: pseudobulk_bulk_lognorm_with_moments(_anndata(f, x, lambda y: y), "target", bulk_target_sum=5e4) for s, x in
             (("real", f.true), ("pred", f.predicted))}  # fmt: skip
    bulks = {f"{s}_bulk": v[:2] for s, v in sides.items()}
    moments = {f"{s}_moments": v[2] for s, v in sides.items()}
    genes = np.array(f.genes)
    frames = [_frame(f, s, ("log2_fold_change", "p_value", "p_adj")) for s in ("predicted", "true")]
    table = prepare_de(*frames, control="non-targeting", target_resolution=resolve_target_genes(frames[1], f.labels))
    place = [list(sides["real"][0]).index(k) for k in f.labels]
    options = {"comparator": "bulk_lognorm", "genes": genes}

    def ordered(answer: dict[str, float]) -> list[float]:
        return [answer.get(k, np.nan) for k in f.labels]

    def fold_changes() -> list[float]:
        found = compute_de(
            _anndata(f, f.predicted, lambda y: y), groupby="target", reference="non-targeting", backend="pdex", input_type="counts",
            mean_calc="arithmetic", epsilon=1e-9, filter_gene_min_cpm_cell=5.0, threads=1,
        )  # fmt: skip
        value = pl.col("log2_fold_change")
        total = dict(found.group_by("target").agg(pl.when(value.abs() < 20).then(value).otherwise(0.0).sum()).iter_rows())
        return [total[k] for k in f.labels]

    return {
        "cell_eval2 bulk": lambda: sides["real"][1][place].sum(1),
        "cell_eval2 jackknife": lambda: sides["real"][2].jk[place],
        "cell_eval2 capped_numerator": lambda: ordered(delta.mse_unbiased_capped(**options, **bulks, **moments)),
        "cell_eval2 capped_denominator": lambda: ordered(delta.distance_unbiased(**options, **bulks, **moments)),
        "cell_eval2 pds_cosine": lambda: ordered(
            discrimination.discrimination_score(**bulks, distance="cosine", rank_denominator="n-1", genes=genes, control_source="real")
        ),
        "cell_eval2 sig_jaccard": lambda: ordered(de.de_sig_jaccard(table)),
        "cell_eval2 lfc_nmae": lambda: ordered(de.de_lfc_nmae(table, min_gate_size=3)),
        "cell_eval2 fidelity": lambda: [
            dict(direction._fidelity_family(table).select("target", "direction_fidelity_yield_raw").iter_rows())[k] for k in f.labels
        ],
        "cell_eval2 reach": lambda: ordered(direction.de_direction_reach(table, corrected=False)),
        "cell_eval2 de_lfc": fold_changes,
    }


def _gadjid(f: Fixture) -> dict[str, Callable[[], Any]]:
    import gadjid

    true, guess = (g.astype(np.int8) for g in f.graphs)
    return {
        "gadjid shd": lambda: [gadjid.shd(true, guess)[1]],
        "gadjid sid": lambda: [gadjid.sid(true, guess, edge_direction="from row to column")[1]],
    }


def differences(stored: dict[str, dict[str, list[float | None]]]) -> dict[str, float]:
    """The largest difference of each entry over all fixtures; inf where only one side has a value."""
    worst: dict[str, float] = {}
    for name, entries in stored.items():
        values = ours(fixture(name))
        for key, raw in entries.items():
            expected, found = np.array(raw, dtype=float), values[key]
            agree = found.shape == expected.shape and bool((np.isnan(found) == np.isnan(expected)).all())
            gap = float(np.nanmax(np.abs(found - expected), initial=0.0)) if agree else np.inf
            worst[key] = max(worst.get(key, 0.0), gap)
            if gap > 1e-6:
                print(f"  {name} {key}: {np.round(found, 6).tolist()} against {np.round(expected, 6).tolist()}")
    return worst


def main(command: str, path: str) -> None:
    if command == "write":
        stored = {}
        for name in NAMES:
            print(name)
            answers = {k: np.atleast_1d(v) for k, v in oracles(fixture(name)).items()}
            stored[name] = {k: [None if np.isnan(x) else float(f"{x:.9g}") for x in v] for k, v in answers.items()}
        Path(path).write_text("{\n" + ",\n".join(f'"{k}": {json.dumps(v, separators=(",", ":"))}' for k, v in stored.items()) + "\n}\n")
    else:
        for key, gap in sorted(differences(json.loads(Path(path).read_text())).items()):
            print(f"{key:32} {gap:.1e}")


if __name__ == "__main__":
    main(*sys.argv[1:])
