"""Recovery of latents and target masks on the two published simulators: ``python benchmarks/recovery.py --out recovery.csv``.

One row for each simulator, variant, model and seed. Rows are appended to ``--out`` as they finish; those already there are not run again.

==========  =========================================================================================================================
variant     what differs from the published screen (K = 100 perturbations, p = 15 latents, 250 (svae) or 200 (sams) cells each)
==========  =========================================================================================================================
published   nothing: ``replicate=True``
softmax     svae only: softmax over genes and log-normal libraries, ``replicate=False``
shift       effects of 1.5 basal standard deviations in place of 5
latents     30 latents in place of ``--n-latent``
permuted    labels permuted among the perturbed cells: nothing to find, ``share_on`` should be at most .02
prior       mask prior .5: a Bernoulli(.5) for sams_vae, Beta(1, 1) for svae_plus
==========  =========================================================================================================================

Columns: ``mcc``, ``r2``, ``dci_d`` of the encoded cells; ``precision``, ``recall``, ``f1`` of the mask at the posterior's own threshold .5,
matched by the cells; ``oracle_f1`` of the perturbation means of the latents, at the threshold that is best in hindsight; ``share_on``, the
share of mask entries above .5; ``seconds`` of fitting. FastICA has no mask and knows the true number of latents (an advantage), but in
``latents``; ``fast_ica_median`` is the same on counts scaled to the median library (the better of the two depends on the variant).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import torch

import pyrocausal as pc
from pyrocausal import evaluate

MODELS = ("fast_ica", "fast_ica_median", "sams_vae", "svae_plus", "cpa_vae")
VARIANTS = ("published", "softmax", "shift", "latents", "permuted", "prior")
KEY = ["simulator", "variant", "model", "seed", "n_latent", "epochs", "batch_size"]
SCORES = ["mcc", "r2", "dci_d", "precision", "recall", "f1", "oracle_f1", "share_on", "seconds"]
PRIOR: dict[str, dict[str, Any]] = {"sams_vae": {"mask_probability": 0.5}, "svae_plus": {"sparsity": 1.0}}
N_TRUE = 15


def screen(simulator: str, variant: str, seed: int) -> ad.AnnData:
    """A screen with one control cell (which a ``PerturbationData`` needs)."""
    simulate = pc.simulate.svae_screen if simulator == "svae" else pc.simulate.sams_screen
    shift = 1.5 if variant == "shift" else 5.0
    adata = simulate(n_latent=N_TRUE, n_control=1, shift=shift, replicate=variant != "softmax", seed=seed)
    if variant == "permuted":
        labels = adata.obs["perturbation"].astype(str).to_numpy()
        perturbed = np.flatnonzero(labels != "control")
        labels[perturbed] = np.random.default_rng(seed).permutation(labels[perturbed])
        adata.obs["perturbation"] = pd.Categorical(labels)
    return adata


def latents_and_mask(key: dict[str, Any], data: pc.PerturbationData) -> tuple[np.ndarray, np.ndarray | None]:
    """Latents [n_cells, D], and mask probabilities [n_perturbations, D] if the model has them."""
    if key["model"].startswith("fast_ica"):
        normalise = "median" if key["model"].endswith("median") else "none"
        return evaluate.fast_ica(data, key["n_latent"], seed=key["seed"], normalise=normalise), None
    settings = PRIOR[key["model"]] if key["variant"] == "prior" else {}
    guide: Any
    model, guide = pc.build(key["model"], data, seed=key["seed"], n_latent=key["n_latent"], **settings)
    pc.fit(model, guide, data, max_epochs=key["epochs"], batch_size=key["batch_size"], seed=key["seed"])
    with torch.no_grad():
        return guide.encode(data.batch())[0].double().numpy(), guide.table.logits.sigmoid().double().numpy()


def run(key: dict[str, Any]) -> dict[str, Any]:
    """One row of the table."""
    adata = screen(key["simulator"], key["variant"], key["seed"])
    data = pc.PerturbationData.from_anndata(adata)
    assert list(data.perturbations) == list(adata.uns["truth"]["perturbations"])
    start = time.perf_counter()
    latents, probability = latents_and_mask(key, data)
    seconds = time.perf_counter() - start
    cells = ~data.is_control
    true, found = adata.obsm["u"][cells], latents[cells]
    mask = adata.uns["truth"]["mask"]
    value, columns = evaluate.mcc(true, found)
    row = {
        **key,
        "mcc": value,
        "r2": evaluate.linear_r2(true, found),
        "dci_d": evaluate.dci(true, found, seed=key["seed"]).disentanglement,
        "oracle_f1": evaluate.oracle_f1(mask, evaluate.ica_mask(found, data[cells]), columns),
        "seconds": seconds,
    }
    if probability is not None:
        scores = evaluate.mask_scores(mask, probability, matching=columns)
        row |= {"precision": scores.precision, "recall": scores.recall, "f1": scores.f1, "share_on": float((probability > 0.5).mean())}
    return row


def plan(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The keys of all rows that were asked for; the published screen first."""
    for variant in arguments.variants:
        for simulator in arguments.simulator:
            for seed in arguments.seeds:
                for model in arguments.models if variant == "published" else [m for m in arguments.models if m in arguments.variant_models]:
                    baseline = model.startswith("fast_ica")
                    pointless = (variant == "softmax" and simulator == "sams") or (model == "fast_ica_median" and simulator == "sams")
                    if pointless or (variant == "prior" and model not in PRIOR) or (variant == "permuted" and baseline):
                        continue
                    n_latent = 30 if variant == "latents" else N_TRUE if baseline else arguments.n_latent
                    steps = (0, 0) if baseline else (arguments.epochs, arguments.batch_size)
                    yield dict(zip(KEY, (simulator, variant, model, seed, n_latent, *steps), strict=True))


def summary(table: pd.DataFrame) -> str:
    """Mean over seeds, and the standard deviation behind it."""
    groups = table.groupby(["simulator", "variant", "model", "n_latent"], sort=False)[SCORES]
    mean, sd, n = groups.mean(), groups.std(), groups.size()
    text = {c: mean[c].map("{:.3f}".format) + sd[c].map(" ({:.3f})".format) for c in SCORES[:-1]}
    shown = pd.DataFrame(text).replace({"nan (nan)": "-"}).replace(r" \(nan\)", "", regex=True)
    return shown.assign(seconds=mean["seconds"].round(1), seeds=n).to_string()


def words(text: str) -> list[str]:
    return [w for w in text.split(",") if w]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--simulator", type=words, default=["svae", "sams"], help="svae, sams")
    parser.add_argument("--seeds", type=lambda s: [int(w) for w in words(s)], default=[0, 1, 2])
    parser.add_argument("--models", type=words, default=list(MODELS), help=", ".join(MODELS))
    parser.add_argument("--variants", type=words, default=list(VARIANTS), help=", ".join(VARIANTS))
    parser.add_argument("--variant-models", type=words, default=["fast_ica", "fast_ica_median", "sams_vae"], help="models of the variants")
    parser.add_argument("--epochs", type=int, default=150)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--n-latent", type=int, default=20)
    parser.add_argument("--out", type=Path, help="CSV; rows are appended as they finish, and those already there are skipped")
    arguments = parser.parse_args()
    for name, given, known in (
        ("--simulator", arguments.simulator, ("svae", "sams")),
        ("--models", arguments.models, MODELS),
        ("--variants", arguments.variants, VARIANTS),
        ("--variant-models", arguments.variant_models, MODELS),
    ):
        if set(given) - set(known):
            parser.error(f"{name} has no {min(set(given) - set(known))!r}; choose from {', '.join(known)}")
    torch.set_num_threads(1)
    out = arguments.out
    table = pd.read_csv(out) if out is not None and out.exists() else pd.DataFrame(columns=KEY + SCORES)
    asked = list(plan(arguments))
    done = {tuple(row) for row in table[KEY].itertuples(index=False)}
    for key in asked:
        if tuple(key.values()) in done:
            continue
        row = pd.DataFrame([run(key)]).reindex(columns=KEY + SCORES)
        if out is not None:
            row.to_csv(out, mode="a", header=not out.exists(), index=False)
        table = row if table.empty else pd.concat([table, row], ignore_index=True)
        print(row.to_string(index=False, header=len(table) == 1, float_format="%.3f"), flush=True)
    wanted = [tuple(key.values()) for key in asked]
    print("\nmean (standard deviation) over seeds\n" + summary(table[[tuple(r) in wanted for r in table[KEY].itertuples(index=False)]]))


if __name__ == "__main__":
    main()
