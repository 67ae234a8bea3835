"""The models of the collection by name: what each is, and how a pair is built for a screen."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import nn

from pyrocausal.data import PerturbationData
from pyrocausal.epoch import BATCH_SIZE
from pyrocausal.errors import PyrocausalError, nearest


@dataclass(frozen=True)
class Entry:
    """One model of the collection: class names in ``pyrocausal.models`` and ``pyrocausal.guides``, and what it is for."""

    model: str
    guide: str
    paper: str
    answers: str
    fixed: tuple[tuple[str, Any], ...] = ()
    data_kind: str = "any"  # "normalised": not for counts
    published: tuple[tuple[str, Any], ...] = ()  # settings of pc.fit: batch size, rate and KL schedule of the paper

    @property
    def training(self) -> dict[str, Any]:
        """Settings of ``pc.fit`` where nothing else is asked for."""
        return {"batch_size": BATCH_SIZE} | dict(self.published)


ENTRIES = {
    "sams_vae": Entry("SAMSVAE", "SAMSVAE", "Bereket & Karaletsos 2023", "effects, combinations, doses, counterfactuals, target masks"),
    "sams_vae_mean_field": Entry("SAMSVAE", "SAMSVAEMeanField", "Bereket & Karaletsos 2023", "as sams_vae, the paper's mean-field guide"),
    "sams_vae_correlated": Entry("SAMSVAE", "SAMSVAECorrelated", "Bereket & Karaletsos 2023", "as sams_vae, the paper's correlated guide"),
    "sams_vae_direct": Entry(
        "SAMSVAE", "SAMSVAE", "Bereket & Karaletsos 2023, extended", "as sams_vae, and direct effects gene by gene", (("direct", True),)
    ),
    "svae_plus": Entry("SVAEPlus", "SVAEPlus", "Lopez et al. 2023", "as sams_vae, with learned sparsity"),
    "svae_plus_parity": Entry("SVAEPlus", "SVAEPlusParity", "Lopez et al. 2023", "the published sVAE+ objective", (("parity", True),)),
    "sccvae": Entry("SCCVAE", "SCCVAE", "Liu, Zhang & Uhler 2026", "effects, unseen perturbations, doses, network, clamps"),
    "sccvae_parity": Entry(
        "SCCVAEParity",
        "SCCVAEParity",
        "Liu, Zhang & Uhler 2026",
        "the published SCCVAE",
        data_kind="normalised",
        published=(("batch_size", 32), ("lr", 5e-4), ("kl_warmup", 1.0)),
    ),
    "discrepancy_vae": Entry(
        "DiscrepancyVAE",
        "DiscrepancyVAE",
        "Zhang et al. 2023",
        "effects of singles and pairs, as published",
        data_kind="normalised",
        published=(("batch_size", 32), ("lr", 1e-3), ("kl_warmup", (0.1, 1.0))),
    ),
    "linear_lcd": Entry("LinearLCD", "LinearLCD", "Lorch et al. 2026", "effects, pairs, doses, directed gene network, clamps, transients"),
    "lcd": Entry("LCD", "LCD", "Lorch et al. 2026", "effects, pairs, doses, counterfactuals; a score field, no direction"),
    "scm": Entry(
        "SCM",
        "SCM",
        "Hauser & Buehlmann 2012, in our form",
        "effects, pairs, unseen measured genes, gene network, clamps, counterfactuals",
        data_kind="normalised",
    ),
    "cite_vae": Entry("CITEVAE", "CITEVAE", "Jiang et al. 2026, rebuilt", "trajectories, acts with a when, targets, lagged network"),
    "perturbed_vae": Entry(
        "CITEVAE",
        "CITEVAE",
        "PerturbedVAE 2026",
        "effects, pairs; its companion paper's class, one time, free weights",
        (("times", (0.0,)), ("lag", False), ("weights", "free")),
    ),
    "cpa_vae": Entry(
        "SAMSVAE", "SAMSVAE", "Bereket & Karaletsos 2023", "as sams_vae, every perturbation moves every program", (("dense", True),)
    ),
}

_BASELINES = {
    "control": ("no change", "nothing happens"),
    "mean_perturbed": ("perturbed mean", "every perturbation has the mean effect"),
    "matching_mean": ("Vinas Torne et al. 2025", "a combination has the mean effect of its parts"),
    "additive": ("Ahlmann-Eltze et al. 2025", "a combination has the sum of the measured effects of its parts"),
    "additive_eb": ("empirical Bayes", "as additive, effects shrunk, with intervals"),
    "condition_eb": ("empirical Bayes", "as additive_eb, and combinations that were measured depart from the sum, shrunk"),
    "nearest_perturbation": ("nearest neighbour", "an unseen perturbation has the effect of the most similar embedding"),
    "knn_embedding": ("nearest neighbours", "an unseen perturbation has the mean effect of the k most similar embeddings"),
    "ridge_embedding": ("ridge regression", "effects of unseen perturbations from their embedding"),
    "linear_embedding": ("Ahlmann-Eltze et al. 2025", "the published linear model with gene and perturbation embeddings"),
}
ENTRIES |= {
    name: Entry("Baseline", "Baseline", paper, f"baseline: {answers}", (("kind", name),)) for name, (paper, answers) in _BASELINES.items()
}


def table() -> Any:
    """The collection as a table: name, classes, paper, and what it can answer."""
    import pandas as pd

    rows = [{"name": n, "model": e.model, "guide": e.guide, "paper": e.paper, "answers": e.answers} for n, e in ENTRIES.items()]
    return pd.DataFrame(rows).set_index("name")


def build(name: str, data: PerturbationData, *, seed: int = 0, **settings: Any) -> tuple[nn.Module, nn.Module]:
    """A model of the collection and its guide, sized for a screen.

    Args:
        name: one of ``pc.models()``.
        data: gives the sizes, the batches, and the default likelihood (negative binomial for counts, Gaussian otherwise).
        seed: of the initial weights.
        settings: arguments of the model's or guide's constructor; those that both have go to both. A table (``pandas.DataFrame``) is put
            in the order of the screen by its names: rows of an ``embedding`` or of ``targets`` are perturbations, those of a
            ``gene_embedding`` and columns of ``anchors`` genes.
    """
    if name not in ENTRIES:
        raise PyrocausalError(f"there is no model {name!r}{nearest(name, ENTRIES)}")
    likelihood = "negative_binomial" if data.kind == "counts" else "gaussian"
    accepted = set().union(*(_accepted(c) for c in _classes(ENTRIES[name])))
    own = [int(g) for g in data.genes.get_indexer(data.perturbations)]
    defaults = {"n_batches": len(data.batches), "likelihood": likelihood, "own_genes": own if max(own, default=-1) >= 0 else None}
    defaults |= {"combinations": [list(q) for q in data.combination_cells()]} if name == "condition_eb" else {}
    times = data.time if data.path_times is None else data.path_times
    defaults |= {} if times is None else {"times": [float(t) for t in np.unique(times)]}
    defaults = {k: v for k, v in defaults.items() if k in accepted}
    tables = {k: _in_order(k, v, data) for k, v in settings.items()}
    return build_from({"name": name, "arguments": {**defaults, **tables, **data.sizes._asdict()}, "seed": seed})


def accepts(name: str, setting: str) -> bool:
    """Whether a model of the collection, or its guide, has a setting."""
    return any(setting in _accepted(c) for c in _classes(ENTRIES[name]))


def build_from(recipe: dict[str, Any]) -> tuple[nn.Module, nn.Module]:
    """The pair that a recipe (of :func:`build`, or of a saved run) describes."""
    entry = ENTRIES[recipe["name"]]
    arguments = {**recipe["arguments"], **dict(entry.fixed)}
    classes = _classes(entry)
    accepted = [_accepted(c) for c in classes]
    unknown = set(recipe["arguments"]) - accepted[0] - accepted[1]
    if unknown:
        raise PyrocausalError(f"{recipe['name']} has no setting {min(unknown)!r}{nearest(min(unknown), sorted(accepted[0] | accepted[1]))}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe["seed"])
        model, guide = (c(**{k: v for k, v in arguments.items() if k in ok}) for c, ok in zip(classes, accepted, strict=True))
    model.recipe = recipe
    if hasattr(guide, "meet"):
        guide.meet(model)
    return model, guide


def _classes(entry: Entry) -> tuple[Any, Any]:
    return getattr(import_module("pyrocausal.models"), entry.model), getattr(import_module("pyrocausal.guides"), entry.guide)


def _accepted(cls: Any) -> set[str]:
    return set(inspect.signature(cls.__init__).parameters) - {"self"}


def _in_order(name: str, value: Any, data: PerturbationData) -> Any:
    """A named table as an array in the order of the screen; tensors as arrays; anything else as it is."""
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().numpy()
    if not hasattr(value, "reindex"):
        return value
    if name == "gene_embedding":
        return value.reindex(data.genes).fillna(0.0).to_numpy(dtype="float32")
    by_gene = name == "anchors"
    table, names = (value.T, data.genes) if by_gene else (value, data.perturbations)
    missing = [n for n in names if n not in table.index]
    if missing and not by_gene:
        raise PyrocausalError(
            f"{name} has no row for {missing[0]!r} ({len(missing)} of {len(names)} perturbations are missing); give one for each"
        )
    if not table.index.is_unique:
        raise PyrocausalError(f"{name} names {table.index[table.index.duplicated()][0]!r} more than once; give each name once")
    array = table.reindex(names).fillna(0.0).to_numpy(dtype="float32")  # genes without an anchor are owned by no program
    return array.T.copy() if by_gene else array
