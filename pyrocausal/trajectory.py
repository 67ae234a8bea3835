"""Questions about time: how programs and genes of a population, or of the very cells that were measured, move under interventions.

For models with time (class attribute ``timed``: sites ``course``, ``held``, and ``u`` [n, T + 1, D] over ``model.times``).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from pyrocausal.data import PerturbationData
from pyrocausal.errors import InterventionError
from pyrocausal.fit import Fit
from pyrocausal.query import Do, _cells, _device, _fits_in_memory, _fresh, _population, _prepare, _same_names, _seeded, _unit, _unseen
from pyrocausal.worlds import Base, compiled, factual_base, trace_under


def trajectory(
    fit: Fit,
    do: Do,
    cells: PerturbationData | None = None,
    *,
    draws: int = 20,
    n_cells: int = 128,
    units: str | None = None,
    seed: int = 0,
) -> xr.Dataset:
    """Programs and expression at every time of the model.

    Args:
        cells: the measured cells whose paths are asked for (rung 3); None for a population of fresh ones (rung 2). A cell was seen once:
            each draw is a path that may have led through what was seen, and the spread of the draws is what the snapshot leaves open.
        draws: posterior draws; of the population, each with ``n_cells`` fresh cells, the same in all worlds. Where the fit has point
            estimates (``cite_vae``), draws of the population differ by their cells only.
        units: as of :mod:`pyrocausal.query`.

    Returns:
        ``program`` (intervention, draw, [cell], time, latent) and ``expression`` (..., gene), ``effect`` and ``program_effect``
        (differences from the untreated population, or from the factual path of the cell). Expected expression, without noise of the
        measurement.

    Raises:
        InterventionError: for a model without time.
    """
    if not getattr(fit.model, "timed", False):
        raise InterventionError(f"{type(fit.model).__name__} has no time; ask pc.effects, or fit a model that has, such as 'cite_vae'")
    named, unit, model = _prepare(fit, do), _unit(fit, units), fit.model
    times, D, genes = _times_of(model), int(model.shape[1]), fit.coords["gene"]  # type: ignore[index]
    if cells is not None:
        _same_names(fit, cells)
    lead = (len(named), draws) if cells is None else (len(named), draws, len(cells))
    _fits_in_memory(8 * int(np.prod(lead)) * len(times) * (D + len(genes)), "the paths", "ask for fewer cells, draws or interventions")
    out = {k: np.empty((*lead, len(times), size), np.float32) for k, size in (("program", D), ("expression", len(genes)))}
    out |= {"program_effect": np.empty_like(out["program"]), "effect": np.empty_like(out["expression"])}
    with _seeded(seed, fit):
        batch = None if cells is None else cells.batch(n_total=fit.settings["n_cells"], device=_device(fit))
        for s in range(draws):
            base = _fresh(fit, None, n_cells) if batch is None else factual_base(model, fit.guide, batch, None)
            before = _read(fit, base, base.trace, unit, cells is None)
            for k, (_, act) in enumerate(named):
                _, values, by = compiled(model, base, [act], fit.coords["perturbation"])
                after = _read(fit, base, trace_under(model, base, values, 1, cells is not None, by), unit, cells is None)
                for name, change, a, b in zip(("program", "expression"), ("program_effect", "effect"), after, before, strict=True):
                    out[name][k, s], out[change][k, s] = a, a - b
    dims = ("intervention", "draw", *(() if cells is None else ("cell",)), "time")
    coords: dict[str, Any] = {"intervention": [n for n, _ in named], "draw": np.arange(draws), "time": times, "gene": genes}
    coords |= {} if cells is None else {"cell": list(cells.cells)}
    tables = {k: ((*dims, "latent" if k.startswith("program") else "gene"), v) for k, v in out.items()}
    attrs = {"unit": unit, "rung": "interventional" if cells is None else "counterfactual", "noise": "mean"}
    return xr.Dataset(tables, coords, attrs | _unseen(fit, named))


def _times_of(model: Any) -> list[float]:
    return [float(t) for t in model.times]


def _read(fit: Fit, base: Base, trace: Any, unit: str, population: bool) -> tuple[np.ndarray, np.ndarray]:
    """Programs and expression [..., T + 1, D or G], of each cell, or averaged over the population."""
    model: Any = fit.model
    u: Tensor = trace.nodes["u"]["value"]
    u = u.reshape(-1, *u.shape[-2:])  # [n, T + 1, D]
    w, _ = model.split(base.trace.nodes["z"]["value"])
    with torch.no_grad():
        library = base.batch.library_size.to(u.dtype)
        mean = torch.stack([model.likelihood.mean(model.decode(w, u[:, t]), library) for t in range(u.shape[1])])  # [T + 1, n, G]
    if population:
        return u.mean(0).cpu().numpy(), _population(mean[:, None], base.batch, unit)[:, 0]
    return u.cpu().numpy(), np.moveaxis(_cells(mean, base.batch, unit), 0, 1)


__all__ = ["trajectory"]
