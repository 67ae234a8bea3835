"""SCCVAE against known truth and on real screens: ``python benchmarks/sccvae.py chain|ood|real|known [--seeds 0 1 2] [--out rows.csv]``.

=========  ==========================================================================================================================
part       what
=========  ==========================================================================================================================
``chain``  the toy of the discrepancy VAE: a chain of five nodes, ReLU equations, identity mixing; trained on control cells and singles,
           judged on edges and on the discrepancy of generated singles and pairs (V-statistic, training kernels, batches of 256).
           ``known``: targets given; ``learned``: targets found, programs numbered as the perturbations (in both the order is given);
           ``order``: numbering permuted, which no setting here makes up for
``ood``    16 programs, a sparse graph, 500 genes, 60 perturbations whose target follows from an embedding, a fifth of them held out:
           zero-shot (embedding only) and few-shot (half of the held-out cells) against the mean response and the nearest embedding;
           ``order`` does not know the order of the programs; ``mlp`` is the negative control, where a free decoder leaves no edge to find
``real``   leave perturbations out of real screens, zero-shot and few-shot, against the same baselines
``known``  what is known of the Papalexi screen: the interferon knock-outs form a module, and dose curves of STAT1 and IFNGR1
=========  ==========================================================================================================================
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy import stats
from sklearn.metrics import average_precision_score

import pyrocausal as pc
from pyrocausal import embeddings, evaluate, simulate_graph
from pyrocausal.discrepancy import TRAINING_BANDWIDTHS, mmd
from pyrocausal.modules import perturbation_modules, score_modules

BATCH = 256


# -- the chain -------------------------------------------------------------------------------------------------------------------


def chain(seed: int, variant: str) -> dict[str, Any]:
    """One fit of the toy chain; the data are the published ones (numpy seed 1234) whatever ``seed`` is."""
    adata = simulate_graph.chain_screen()
    data = pc.PerturbationData.from_anndata(adata, kind="normalised")
    train = data[(adata.obs["split"] == "train").to_numpy()]
    n = len(data.perturbations)
    places = np.random.default_rng(seed).permutation(n) if variant == "order" else np.arange(n)  # node of each perturbation
    settings: dict[str, Any] = {"targets": np.eye(n)[places]} if variant != "learned" else {}
    start = time.perf_counter()
    model, guide = pc.build(
        "sccvae", data, seed=seed, n_latent=n, equations="relu", decoder="linear", noise_floor=0.3, encoder_layers=0,
        graph="free" if variant == "order" else "full", **settings,
    )  # fmt: skip
    fit = pc.fit(model, guide, train, max_epochs=180, batch_size=512, lr=0.02, kl_warmup=0.0, seed=seed, progress=False)
    seconds = time.perf_counter() - start
    target = guide.table.targets if guide.table.targets is not None else guide.table.logits
    node = target.argmax(1).numpy()  # of each perturbation
    found = guide.edges.mean().numpy()[node][:, node]
    c = guide.table.loc.numpy()[np.arange(n), node]
    true = np.asarray(adata.uns["truth"]["graph"])
    scores = {"right_targets": len(set(node)) == n, "shd": int(((np.abs(found) > 0.3) != (true != 0)).sum())}
    scores |= {"edge_min": found[true != 0].min(), "edge_max": found[true != 0].max(), "other_max": np.abs(found[true == 0]).max()}
    scores |= {"c_min": np.abs(c).min(), "c_max": np.abs(c).max()}
    for kind in ("singles", "doubles"):
        labels = [k for k in data.conditions if k != data.control and ("+" in k) == (kind == "doubles")]
        held = data[(adata.obs["split"] == "test").to_numpy()]
        scores[f"mmd_{kind}"] = float(np.mean([_generated_mmd(fit, held.select(label), label, seed) for label in labels]))
    return {"part": "chain", "variant": variant, "seed": seed, **scores, "seconds": seconds}


def _generated_mmd(fit: pc.Fit, cells: pc.PerturbationData, label: str, seed: int) -> float:
    """Discrepancy between generated and measured cells of one condition, mean over batches of 256."""
    real = torch.as_tensor(cells.dense())
    n = len(real) // BATCH * BATCH
    fake = pc.interventional(fit, label, draws=1, cells=n, noise="independent", seed=seed)["expression"].to_numpy()[0, 0]
    pairs = zip(torch.as_tensor(fake).split(BATCH), real[:n].split(BATCH), strict=True)
    return float(np.mean([float(mmd(a, b, TRAINING_BANDWIDTHS, unbiased=False)) for a, b in pairs]))


# -- held-out perturbations --------------------------------------------------------------------------------------------------------


def answers(
    fit: pc.Fit, train: pc.PerturbationData, test: pc.PerturbationData, table: pd.DataFrame, seed: int
) -> Iterator[tuple[str, pd.DataFrame]]:
    """Predictions for the perturbations of ``test``, scored on one half of its cells, control cells included: (who, scores).

    No cell that is judged with was seen by anybody who predicts: not the control cells either, whose sampling noise is in every effect.
    """
    learn, judge = test.split("cells", test=0.5, seed=seed)
    measured = evaluate.measured_effects(judge)
    names = [str(k) for k in measured["intervention"].values]
    predicted = {
        "zero-shot": pc.effects(fit, names, draws=200, seed=seed),
        "few-shot": pc.effects(pc.adapt(fit, learn), names, draws=200, seed=seed),
        "mean": evaluate.baseline_effects(train, names, "mean"),
        "nearest": embeddings.nearest_embedding_effects(train, table, names),
        "control": evaluate.baseline_effects(train, names, "control"),
        "own half": evaluate.measured_effects(learn),
    }
    for who, prediction in predicted.items():
        yield who, evaluate.score_effects(prediction, measured)


def without(data: pc.PerturbationData, held: list[str], seed: int) -> tuple[pc.PerturbationData, pc.PerturbationData]:
    """Training cells without the held-out perturbations, and the cells of those; half of the control cells go to either."""
    carries = np.asarray(data.dose[:, data.perturbations.get_indexer(held)].sum(1)).ravel() > 0
    control = np.flatnonzero(data.is_control)
    carries[np.random.default_rng(seed).permutation(control)[: len(control) // 2]] = True
    single = np.diff(data.dose.indptr) <= 1
    return data[~carries], data[carries & single]


def ood(seed: int, variant: str) -> Iterator[dict[str, Any]]:
    """One simulated screen."""
    adata = simulate_graph.graph_screen(decoder="mlp" if variant == "mlp" else "anchored", seed=seed)
    truth = adata.uns["truth"]
    data = pc.PerturbationData.from_anndata(adata, kind="normalised")
    names = list(truth["perturbations"])
    assert names == list(data.perturbations)
    table = pd.DataFrame(truth["embedding"], index=names)
    held = [names[i] for i in np.random.default_rng(seed).permutation(len(names))[: len(names) // 5]]
    train, test = without(data, held, seed)
    n_latent = truth["graph"].shape[0]
    places = np.random.default_rng(seed).permutation(n_latent) if variant == "order" else np.arange(n_latent)
    settings: dict[str, Any] = {"decoder": "mlp"}
    if variant != "mlp":
        settings = {
            "decoder": "anchored",
            "anchors": (adata.varm["loadings"] > 0).T[places],
            "graph": "free" if variant == "order" else "full",
        }
    start = time.perf_counter()
    fit = pc.fit(*pc.build("sccvae", data, seed=seed, n_latent=n_latent, embedding=table, **settings), train, max_epochs=30, seed=seed)
    seconds = time.perf_counter() - start
    found = np.zeros((n_latent, n_latent))
    found[np.ix_(places, places)] = np.abs(fit.guide.edges.mean().numpy())
    pairs = ~np.eye(n_latent, dtype=bool) if variant == "order" else np.triu(np.ones((n_latent, n_latent), bool), 1)
    edges, true = found[pairs], (truth["graph"] != 0)[pairs]
    row: dict[str, Any] = {"part": "ood", "variant": variant, "seed": seed, "seconds": seconds}
    row |= {"auprc": average_precision_score(true, edges), "prevalence": true.mean(), "edge": pc.identifiability(fit)["edge"].status}
    yield row | {"who": "edges"}
    learn, _ = test.split("cells", test=0.5, seed=seed)
    posterior = pc.adapt(fit, learn).guide.table
    for i in [names.index(k) for k in held]:
        k = int(posterior.logits[i].argmax())
        c, se, expected = float(posterior.loc[i, k]), float(posterior.scale[i, k]), float(truth["penetrance"][i])
        zero = fit.guide.table.logits[i].softmax(-1)
        right = bool(truth["mask"][i, places[k]])
        more = {"target_right": right, "zero_shot_right": bool(truth["mask"][i, places[int(zero.argmax())]]), "c_error": abs(c - expected)}
        yield row | {"who": "penetrance", "intervention": names[i], "covered": abs(c - expected) < 1.645 * se, **more}
    for who, scores in answers(fit, train, test, table, seed):
        for intervention, values in scores.iterrows():
            yield row | {"who": who, "intervention": intervention, **values.to_dict()}


SCREENS: dict[str, dict[str, Any]] = {
    "papalexi2021_thp1_crisprko_299g": {"modality": "knockout"},
    "schraivogel2020_k562_tapseq_crispri_72g": {"modality": "knockdown"},
}


def real(seed: int, screen: str, folds: int = 5) -> Iterator[dict[str, Any]]:
    """Every perturbation of a real screen is held out once, with all combinations it is in."""
    folder = Path(os.environ.get("PYROCAUSAL_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")
    data = pc.PerturbationData.from_anndata(folder / f"{screen}.h5ad", **SCREENS[screen])
    names = [str(n) for n in data.perturbations]
    gene_of = {n: n.removesuffix("_enh") for n in names}
    blocks = {
        "control_pca": embeddings.control_pca(data, n_components=10, missing="mean", gene_of=gene_of),
        "pairs": embeddings.from_pairs(folder / "annotations" / "pairs_StringDB.csv.gz", names, 10, missing="mean", gene_of=gene_of),
    }
    order = np.random.default_rng(seed).permutation(names)
    for name, table in (blocks | {"both": embeddings.combine(*blocks.values())}).items():
        for fold in range(folds):
            train, test = without(data, [str(n) for n in order[fold::folds]], seed)
            fit = pc.fit(*pc.build("sccvae", data, seed=seed, n_latent=16, embedding=table), train, max_epochs=40, seed=seed)
            for who, scores in answers(fit, train, test, table, seed):
                for intervention, values in scores.iterrows():
                    row = {"part": "real", "variant": f"{screen.split('_')[0]} {name}", "seed": seed, "who": who}
                    yield row | {"intervention": intervention, **values.to_dict()}


def known(seed: int) -> None:
    """Print modules, dose curves and reports of a fit to the whole Papalexi screen."""
    folder = Path(os.environ.get("PYROCAUSAL_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")
    data = pc.PerturbationData.from_anndata(folder / "papalexi2021_thp1_crisprko_299g.h5ad", modality="knockout")
    names = [str(n) for n in data.perturbations]
    table = embeddings.from_pairs(folder / "annotations" / "pairs_StringDB.csv.gz", names, 10, missing="mean")
    train, test = data.split("cells", test=0.2, seed=seed)
    fit = pc.fit(*pc.build("sccvae", data, seed=seed, n_latent=16, embedding=table), train, max_epochs=40, seed=seed)
    found = perturbation_modules(pc.effects(fit, names, draws=60, seed=seed))
    print(found)
    sets = embeddings.read_gmt(folder / "annotations" / "enrichr.GO_Biological_Process_2021.gmt.gz")
    scores = score_modules(found, sets, names)
    print(scores.head(5)[["module", "gene_set", "overlap", "module_size", "p_value", "fdr"]].to_string(index=False))
    curve = pc.dose_response(fit, ["STAT1", "IFNGR1"], np.linspace(0, 1.5, 7), draws=200, seed=seed)["effect"]
    for name in ("STAT1", "IFNGR1"):
        for gene in ("STAT1", "PSMB9", "UBE2L6"):
            steps = curve.sel(perturbation=name, gene=gene).diff("dose")
            share = float((steps < 0).all("dose").mean())
            values = " ".join(f"{v:.2f}" for v in curve.sel(perturbation=name, gene=gene).median("draw").values)
            print(f"{name} -> {gene}: medians {values}; draws that fall at every step {share:.2f}")
    print(pc.collapse(fit, test))
    print(pc.identifiability(fit))
    measured = evaluate.measured_effects(test)
    answers = {"sccvae": pc.effects(fit, names, draws=200, seed=seed)}
    answers |= {k: evaluate.baseline_effects(train, names, k) for k in ("control", "mean", "train")}
    rows = {k: evaluate.score_effects(v, measured)[["pearson", "mse", "relative_l2", "direction"]].mean() for k, v in answers.items()}
    print(pd.DataFrame(rows).T.round(3).to_string())


# -- tables ------------------------------------------------------------------------------------------------------------------------


def summary(rows: pd.DataFrame) -> None:
    """Means by variant and by who predicts, and paired tests of zero-shot against the baselines."""
    with pd.option_context("display.width", 200, "display.max_columns", 40, "display.float_format", "{:.3f}".format):
        toys = rows[rows["part"] == "chain"].dropna(axis=1, how="all")
        if len(toys):
            print(toys.drop(columns="part").to_string(index=False))
        rest = rows[rows["part"] != "chain"]
        for variant, part in rest.groupby("variant"):
            scored = part[part["who"].isin(["zero-shot", "few-shot", "mean", "nearest", "control", "own half"])]
            print(f"\n{variant}: {scored['intervention'].nunique()} perturbations, seeds {sorted(part['seed'].unique())}")
            print(scored.groupby("who")[["pearson", "mse", "relative_l2", "direction", "coverage"]].mean().to_string())
            wide = scored.pivot_table(index=["seed", "intervention"], columns="who", values="pearson")
            for baseline in ("mean", "nearest"):
                both = wide[["zero-shot", baseline]].dropna()
                p = stats.wilcoxon(both["zero-shot"], both[baseline]).pvalue
                gain = (both["zero-shot"] - both[baseline]).mean()
                print(f"zero-shot against {baseline}: mean difference of pearson {gain:+.3f}, Wilcoxon p = {p:.1e}")
            if (part["who"] == "edges").any():
                print(part[part["who"] == "edges"][["seed", "auprc", "prevalence", "edge", "seconds"]].to_string(index=False))
                c = part[part["who"] == "penetrance"]
                shares = {"within .15": c["c_error"] <= 0.15, "in the 90 % interval": c["covered"], "target right": c["target_right"]}
                print("few-shot penetrance:", ", ".join(f"{k} {v.astype(float).mean():.3f}" for k, v in shares.items()))
                print(f"zero-shot: target right {c['zero_shot_right'].astype(float).mean():.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["chain", "ood", "real", "known"])
    parser.add_argument("--variants", nargs="+", help="chain: known learned order; ood: anchored order mlp; real: names of screens")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.part == "known":
        known(arguments.seeds[0])
        return
    defaults = {"chain": ["known", "learned", "order"], "ood": ["anchored", "order", "mlp"], "real": list(SCREENS)}
    rows: list[dict[str, Any]] = []
    for variant in arguments.variants or defaults[arguments.part]:
        for seed in arguments.seeds:
            if arguments.part == "chain":
                rows.append(chain(seed, variant))
            else:
                rows += list((ood if arguments.part == "ood" else real)(seed, variant))
            if arguments.out:
                pd.DataFrame(rows).to_csv(arguments.out, index=False)
    summary(pd.DataFrame(rows))


if __name__ == "__main__":
    main()
