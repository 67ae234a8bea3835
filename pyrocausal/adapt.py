"""Perturbations that a fit never saw: their targets and effects from cells that received them, everything else frozen."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from pyrocausal.centred import CentredGuide
from pyrocausal.collection import build_from
from pyrocausal.data import PerturbationData
from pyrocausal.elbo import ELBO
from pyrocausal.errors import ContractError, DataError
from pyrocausal.fit import Fit, coords_of
from pyrocausal.loading import batches


def adapt(fit: Fit, data: PerturbationData, *, sweeps: int = 10) -> Fit:
    """A fit that also knows the perturbations of ``data`` (the transfer task of sVAE+, arXiv 2211.03553, done in closed form).

    Encoder, decoder and dispersions stay as they are; the cells of ``data`` that carry a new perturbation are encoded once, and
    ``q(mask, effect)`` follows from their sufficient statistics as for every other perturbation, sparsity included.

    Args:
        fit: of a model of the collection with a centred guide.
        data: cells of new perturbations (cells without a new one are ignored); the genes must be those of the fit.
        sweeps: passes of the coordinate update.

    Returns:
        A new fit over the union of the perturbations, those of ``fit`` first; ``fit`` is left as it was.

    Raises:
        ContractError: if the guide keeps no sufficient statistics. DataError: if the genes differ or no perturbation is new.
    """
    guide = fit.guide
    if not isinstance(guide, CentredGuide) or fit.recipe is None:
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

    recipe = {**fit.recipe, "arguments": {**fit.recipe["arguments"], "n_perturbations": len(names)}}
    model, adapted = build_from(recipe)
    assert isinstance(adapted, CentredGuide)
    table = adapted.table
    model.load_state_dict(fit.model.state_dict())
    frozen = {k: v for k, v in guide.state_dict().items() if not k.startswith("table.")}
    adapted.load_state_dict(frozen, strict=False)
    _move_table(guide, adapted, len(old))

    place = torch.zeros(len(data.perturbations), len(names))
    for i, name in enumerate(data.perturbations):
        place[i, column[name]] = 1
    gram = table.gram.clone()
    with torch.no_grad():
        for batch in batches(part, 2048):
            dose = batch.dose @ place
            u, _ = adapted.encode(batch)
            gram += dose.T @ dose
            table.cross += dose.T @ u
    table.set_gram(gram)
    blur, leak = table.blur.clone(), table.leak.clone()  # learned from the training set; the new cells are judged by it
    frozen_rows = {k: getattr(table, k).clone() for k in ("logits", "loc", "scale")}
    kept = torch.tensor([name in known for name in names])[:, None]
    for _ in range(sweeps):
        table.update()
        table.blur.copy_(blur)
        table.leak.copy_(leak)
        for k, before in frozen_rows.items():
            getattr(table, k).copy_(torch.where(kept, before, getattr(table, k)))
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


def _move_table(source: CentredGuide, target: CentredGuide, n_old: int) -> None:
    """Copy the statistics of the known perturbations into the larger table."""
    theirs, ours = source.table, target.table
    with torch.no_grad():
        for name in ("cross", "logits", "loc", "scale", "seen"):
            getattr(ours, name)[:n_old] = getattr(theirs, name)
        gram = torch.zeros_like(ours.gram)
        gram[:n_old, :n_old] = theirs.gram
        ours.set_gram(gram)
        ours.blur.copy_(theirs.blur)
        ours.leak.copy_(theirs.leak)
        ours.is_sparse.copy_(theirs.is_sparse)
