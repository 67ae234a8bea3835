"""Perturbations that a fit never saw: what they do, from cells that received them, everything else frozen."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from pyrocausal.collection import build_from
from pyrocausal.data import PerturbationData
from pyrocausal.elbo import ELBO
from pyrocausal.errors import ContractError, DataError
from pyrocausal.fit import Fit, coords_of
from pyrocausal.loading import Batch, batches


def adapt(fit: Fit, data: PerturbationData, *, embedding: Any = None, sweeps: int = 10) -> Fit:
    """A fit that also knows the perturbations of ``data``: few-shot, in closed form (the transfer task of sVAE+, arXiv 2211.03553).

    Encoder, decoder, network and dispersions stay as they are; the cells of ``data`` that carry a new perturbation are encoded once, and
    what it targets and how far it moves it follows from their sufficient statistics, as for every other perturbation. Give it cells that
    will not be used to judge the answer.

    Args:
        fit: of a model of the collection whose guide keeps sufficient statistics (``guide.absorb``).
        data: cells of new perturbations (cells without a new one are ignored); the genes must be those of the fit.
        embedding: rows of perturbations whose names the fit has never heard, ``pandas.DataFrame`` by name, on the scale of the embedding
            that the model was built with; needed by models with an embedding if there are such names.
        sweeps: passes of the coordinate update.

    Returns:
        A new fit over the union of the perturbations, those of ``fit`` first; ``fit`` is left as it was.

    Raises:
        ContractError: if the guide keeps no sufficient statistics. DataError: if the genes differ or no perturbation is new.
    """
    guide = fit.guide
    if not hasattr(guide, "absorb") or fit.recipe is None:
        raise ContractError(
            f"{type(guide).__name__} keeps no sufficient statistics to adapt; fit a model of the collection with its default guide"
        )
    if list(data.genes) != fit.coords["gene"]:
        raise DataError("the genes of the data are not those of the fit; select and order them as in fit.coords['gene']")
    old = fit.coords["perturbation"]
    known = {name for name, n in zip(old, fit.cells_per_perturbation, strict=True) if n > 0}
    new = [name for name, n in zip(data.perturbations, data.cells_per_perturbation, strict=True) if n > 0 and name not in known]
    if not new:
        raise DataError("every perturbation of these cells was in the training set already; there is nothing to adapt to")
    names = list(old) + [name for name in new if name not in old]
    column = {name: i for i, name in enumerate(names)}
    carries = np.asarray(data.dose[:, data.perturbations.get_indexer(new)].sum(1)).ravel() > 0
    part = data[carries]

    arguments = {**fit.recipe["arguments"], "n_perturbations": len(names)}
    if arguments.get("embedding") is not None and len(names) > len(old):
        arguments["embedding"] = _longer(np.asarray(arguments["embedding"]), embedding, names[len(old) :])
    recipe = {**fit.recipe, "arguments": arguments}
    model, adapted = build_from(recipe)
    for source, target in ((fit.model, model), (guide, adapted)):
        copy_state(source, target, len(old))

    place = torch.zeros(len(data.perturbations), len(names))
    for i, name in enumerate(data.perturbations):
        place[i, column[name]] = 1

    def cells() -> Iterator[Batch]:
        for batch in batches(part, 2048):
            yield replace(batch, dose=batch.dose @ place)

    with torch.no_grad():
        adapted.absorb(model, cells(), torch.tensor([name in known for name in names]), sweeps)  # type: ignore[operator]
    counts = np.zeros(len(names), np.int64)
    counts[: len(old)] = fit.cells_per_perturbation
    for name in new:
        counts[column[name]] += int(part.cells_per_perturbation[data.perturbations.get_loc(name)])
    coords = {**coords_of(data), "perturbation": names, "batch": fit.coords["batch"]}
    reference = replace(fit.reference, dose=torch.zeros(len(fit.reference), len(names)))
    model.eval()
    adapted.eval()
    return replace(
        fit,
        model=model,
        guide=adapted,
        elbo=ELBO()(model, adapted),
        coords=coords,
        cells_per_perturbation=counts,
        recipe=recipe,
        reference=reference,
        vectorises=None,
    )


@torch.no_grad()
def copy_state(source: nn.Module, target: nn.Module, n_old: int) -> None:
    """Copy every parameter and buffer; one that has grown with the perturbations keeps its new rows (and columns) behind the old."""
    theirs = {**dict(source.named_parameters()), **dict(source.named_buffers())}
    for name, ours in {**dict(target.named_parameters()), **dict(target.named_buffers())}.items():
        block = tuple(slice(0, n_old) if a != b else slice(None) for a, b in zip(ours.shape, theirs[name].shape, strict=True))
        ours[block] = theirs[name]


def _longer(embedding: np.ndarray, table: Any, names: list[str]) -> np.ndarray:
    """The embedding [P, E] with rows for more names."""
    missing = names if table is None else [n for n in names if n not in table.index]
    if missing:
        raise DataError(
            f"the model knows perturbations by an embedding, and {missing[0]!r} has none; pass embedding= with a row for each new name"
        )
    rows = table.loc[names].to_numpy(dtype=embedding.dtype)
    if rows.shape[1] != embedding.shape[1]:
        raise DataError(f"the embedding has {rows.shape[1]} columns, but the fit's has {embedding.shape[1]}; give the same ones")
    return np.concatenate([embedding, rows])
