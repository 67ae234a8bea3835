"""How a population moves after a perturbation: the time course of a linear diffusion between two stationary laws."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr

from pyrocausal.dynamics.stationary import StationaryNormal, transient
from pyrocausal.errors import InterventionError
from pyrocausal.fit import Fit
from pyrocausal.query import Do, _device, _prepare, _seeded, _vectorises
from pyrocausal.worlds import Base, compiled, fresh_base, trace_under


def response(fit: Fit, do: Do, times: Sequence[float] | np.ndarray, *, draws: int = 20, seed: int = 0) -> xr.Dataset:
    """Mean and spread of the states at times after interventions set in (rung 2).

    At time 0 the cells are at the stationary law of untreated ones; from then on they follow the intervened equations::

        m(t) = mu' + (mu - mu') e^{M't},    S(t) = S' + e^{M'^T t} (S - S') e^{M't}

    A fit sees stationary cells only, so that time is in units of the drift, which the noise fixes (``LinearLCD``), not in hours.

    Args:
        do: as of :func:`pyrocausal.effects`. A clamp takes hold as fast as a decay of 1.
        times: at least 0.

    Returns:
        ``mean``, ``sd`` and ``effect`` (mean less that of untreated cells), all (intervention, draw, time, gene), on the scale of the
        states: of the data where the expression is the state, latent for counts.

    Raises:
        InterventionError: if the model's states are not a linear diffusion, or a time is negative.
    """
    named = _prepare(fit, do)
    at = np.asarray(times, float)
    if at.ndim != 1 or not len(at) or not np.isfinite(at).all() or (at < 0).any():
        raise InterventionError(f"times={times!r} were given; give one or more numbers of at least 0")
    genes, acts = fit.coords["gene"], [a for _, a in named]
    shape = (len(named), draws, len(at), len(genes))
    out = {k: np.empty(shape, np.float32) for k in ("mean", "sd", "effect")}
    example = fit.reference.to(_device(fit)).rows([0])
    with _seeded(seed, fit):
        step = draws if _vectorises(fit) else 1
        for start in range(0, draws, step):
            base = fresh_base(fit.model, fit.guide, example, example, step if _vectorises(fit) else None)
            before = _state_law(base.trace, fit)
            for k, act in enumerate(acts):
                _, values, by = compiled(fit.model, base, [act], fit.coords["perturbation"])
                after = _state_law(trace_under(fit.model, base, values, 1, False, by), fit)
                mean, covariance = _course(before, after, at, base)
                rows = slice(start, start + step)
                out["mean"][k, rows] = mean
                out["sd"][k, rows] = np.sqrt(np.maximum(np.diagonal(covariance, axis1=-2, axis2=-1), 0))
                out["effect"][k, rows] = mean - before.loc.reshape(-1, 1, len(genes)).cpu().numpy()
    dims = ("intervention", "draw", "time", "gene")
    coords = {"intervention": [n for n, _ in named], "draw": np.arange(draws), "time": at, "gene": genes}
    attrs = {"rung": "interventional", "unit": "state", "time": "units of the drift", "reference": "untreated"}
    return xr.Dataset({k: (dims, v) for k, v in out.items()}, coords=coords, attrs=attrs)


def _state_law(trace: Any, fit: Fit) -> StationaryNormal:
    law = next((trace.nodes[n]["fn"] for n in ("u", "x") if isinstance(trace.nodes.get(n, {}).get("fn"), StationaryNormal)), None)
    if law is None:
        raise InterventionError(f"{type(fit.model).__name__} has no linear diffusion of its states, so no time course; fit linear_lcd")
    return law


def _course(before: StationaryNormal, after: StationaryNormal, times: np.ndarray, base: Base) -> tuple[np.ndarray, np.ndarray]:
    """[S, T, d] and [S, T, d, d]."""
    d, S = before.loc.shape[-1], base.draws or 1

    def table(t: torch.Tensor) -> torch.Tensor:
        return t.reshape(-1, d, d).expand(S, d, d)

    def row(t: torch.Tensor) -> torch.Tensor:
        return t.reshape(-1, d).expand(S, d)

    M, factor = table(after.drift), table(before.factor)
    production = -(row(after.loc).unsqueeze(-2) @ M).squeeze(-2)
    at = torch.as_tensor(times, dtype=M.dtype, device=M.device)
    mean, covariance = transient(M, production, row(after.diffusion), row(before.loc), factor @ factor.mT, at)
    return mean.cpu().numpy(), covariance.cpu().numpy()
