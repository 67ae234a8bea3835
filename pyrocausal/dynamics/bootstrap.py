"""Fits by moments outside the loop of :func:`pyrocausal.fit`: starting points, and the members of a weighted likelihood bootstrap."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pyro
import pyro.poutine as poutine
import scipy.sparse as sp
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor
from tqdm.auto import tqdm

from pyrocausal.data import PerturbationData
from pyrocausal.dynamics.stationary import Moments
from pyrocausal.elbo import _deterministic, _sample_sites
from pyrocausal.loading import Batch, moment_batch
from pyrocausal.nn import inverse_softplus


def weighted_moments(data: PerturbationData, pooled: bool, members: int, seed: int) -> Batch:
    """Moments of the conditions with cells weighted by Exp(1), a set for each: x [S, 1, Q, d], weight [S, 1, Q], within [S, 1, ...]."""
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for _ in range(members):
        weights = torch.empty(len(data), dtype=torch.float64).exponential_(generator=generator)
        parts.append(moment_batch(data, pooled, weights * (len(data) / weights.sum())))
    moments = [p.moments for p in parts if p.moments is not None]
    x = torch.stack([p.x for p in parts if p.x is not None])[:, None]
    weight = torch.stack([m.weight for m in moments])[:, None]
    within = torch.stack([m.within for m in moments])
    within = within[:, None, None] if within.dim() == 3 else within[:, None]
    return replace(parts[0], x=x, moments=Moments(weight, within))


def deconvolved_moments(model: Any, data: PerturbationData) -> Batch:
    """Moments of the latent states behind counts, to first order; sets the model's units of depth.

    With rates ``r = unit softplus(u)`` per median library and Poisson counts, ``E[y] = E[r]`` and ``Cov[y] = Cov[r] + diag E[y]`` for cells
    scaled to one library; ``u = softplus^-1(r / unit)`` is linearised at the mean. Directions that noise alone fills keep a floor.
    """
    library = data.library_size.astype(np.float64)
    median = float(np.median(library))
    x = np.asarray(data.x.toarray() if sp.issparse(data.x) else data.x, np.float64)
    y = x * (median / library)[:, None]
    control = data.is_control if data.is_control.any() else np.ones(len(data), bool)
    mean, var = y[control].mean(0), y[control].var(0, ddof=1)
    noise = (x[control] * ((median / library[control]) ** 2)[:, None]).mean(0)  # what counting adds to the variance of y
    unit = np.maximum(np.maximum(mean, (var - noise) / np.maximum(mean, 1e-8)), 1e-3)
    model.median_library.fill_(median)
    model.depth_unit.copy_(torch.as_tensor(unit))
    batch = moment_batch(replace(data, x=y.astype(np.float32), kind="normalised"), pooled=False)
    assert batch.x is not None and batch.moments is not None
    rate = (batch.x / model.depth_unit).clamp_min(0.02)
    state = inverse_softplus(rate)
    slope = torch.sigmoid(state) * model.depth_unit
    counted = torch.as_tensor(np.stack([(x[rows] * ((median / library[rows]) ** 2)[:, None]).mean(0) for rows in _rows_by_condition(data)]))
    within = (batch.moments.within - torch.diag_embed(counted)) / (slope.unsqueeze(-1) * slope.unsqueeze(-2))
    weight = batch.moments.weight
    if model.pooled:
        within = (weight[:, None, None] * within).sum(0) / weight.sum()
    eigenvalues, vectors = torch.linalg.eigh(within)
    floor = 0.05 * within.diagonal(dim1=-2, dim2=-1).clamp_min(1e-3).mean(-1, keepdim=True)
    within = (vectors * eigenvalues.maximum(floor).unsqueeze(-2)) @ vectors.mT
    return replace(batch, x=state, moments=Moments(weight, within))


def _rows_by_condition(data: PerturbationData) -> list[np.ndarray]:
    return [np.flatnonzero(data.labels == condition) for condition in data.conditions]


class _Weighted(Messenger):
    """Factors weighted member by member."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.weights = weights

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.weights:
            msg["scale"] = msg["scale"] * self.weights[msg["name"]]


def maximise(
    model: Any, guide: Any, batch: Batch, *, steps: int, members: int | None = None, seed: int = 0, lr: float = 3e-3, progress: bool = False
) -> dict[str, Tensor]:
    """The globals that maximise the log joint density of moments, from the guide's points on.

    Args:
        batch: of :func:`~pyrocausal.loading.moment_batch`, or of :func:`weighted_moments` for several members side by side.
        members: how many; each has its own weights Exp(1) of the factors. None: one fit, which also goes into the guide's points, with
            the widths of the priors coming down.

    Returns:
        Values of the sites, [members, ...] (without members when None). An interrupt keeps what there is.
    """
    lead = (1, 1, 1) if members is None else (members, 1, 1)
    values = {k: v.detach().expand(*lead, *v.shape).clone().requires_grad_() for k, v in guide.point.items()}
    groups = [{"params": [v], "lr": lr * guide.learning_rates.get(f"point.{k}", 1.0)} for k, v in values.items()]
    optimiser = torch.optim.Adam(groups, lr=lr)
    base = [g["lr"] for g in optimiser.param_groups]
    generator = torch.Generator().manual_seed(seed + 1)
    weights = {}
    if members is not None:
        names = ("edge_prior", "off_target_prior")
        weights = {n: torch.empty(lead, dtype=torch.float64).exponential_(generator=generator) for n in names}
    bar = tqdm(total=steps, desc="posterior draws" if members else "start", unit="step", disable=not (progress and sys.stderr.isatty()))
    try:
        for step in range(steps):
            done = step / steps
            if members is None:
                model.widening.fill_(10.0 ** (1 - min(1.0, 2 * done)))
            for group, rate in zip(optimiser.param_groups, base, strict=True):
                group["lr"] = rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))
            loss = -_log_joint(model, values, batch, lead[0], weights) / batch.n_total
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            bar.update()
            if step % 50 == 0:
                bar.set_postfix_str(f"log joint {-float(loss.detach()) / lead[0]:.3f}")
    except KeyboardInterrupt:
        pass
    bar.close()
    out = {k: v.detach().reshape(lead[0], *guide.point[k].shape) for k, v in values.items()}
    if members is None:
        with torch.no_grad():
            for k, v in out.items():
                guide.point[k].copy_(v[0])
        model.widening.fill_(1.0)
        return {k: v[0] for k, v in out.items()}
    return out


def _log_joint(model: Any, values: dict[str, Tensor], batch: Batch, draws: int, weights: dict[str, Tensor]) -> Tensor:
    """Sum over the members of ``log p(cells, globals)``."""
    with pyro.plate("draw", draws, dim=-3), pyro.plate("intervention", 1, dim=-2), _Weighted(weights):
        trace = poutine.trace(poutine.condition(model, data=values)).get_trace(batch)
    trace.compute_log_prob(lambda name, site: not _deterministic(site))
    return torch.stack([site["log_prob_sum"].reshape(()) for _, site in _sample_sites(trace)]).sum()
