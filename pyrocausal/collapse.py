"""Does the model use the cell? A decoder that makes do without the latent state is a generator of averages, and its per-cell
counterfactuals are empty, however good its population effects are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyro.poutine as poutine
import torch
from torch import Tensor

from pyrocausal.data import PerturbationData
from pyrocausal.elbo import _sample_sites
from pyrocausal.errors import ContractError
from pyrocausal.fit import Fit

ACTIVE = 0.01  # variance of a posterior mean above which a unit counts as active (Burda et al., ICLR 2016)
WORSE = 0.05  # least relative worsening by which a cell's state is said to matter


@dataclass(frozen=True)
class Collapse:
    """Signs of a collapsed posterior; ``print`` it, true if collapsed.

    Attributes:
        variance: of the posterior mean of each latent coordinate over the cells, [D].
        kl: KL(q(z | x) || p(z)) of a cell, in nats, mean over cells and draws.
        error: mean squared error of the expected expression, in units of each gene's variance within its condition, mean over genes.
        error_shuffled: the same when each cell gets the state of another cell of its condition.
    """

    variance: np.ndarray
    kl: float
    error: float
    error_shuffled: float

    @property
    def active_units(self) -> int:
        """Latent coordinates whose posterior mean differs between cells."""
        return int((self.variance > ACTIVE).sum())

    @property
    def worsening(self) -> float:
        """By which share the error grows when the cells' states are shuffled; 0: the cell does not matter."""
        return self.error_shuffled / self.error - 1

    def __bool__(self) -> bool:
        return self.active_units == 0 or self.worsening < WORSE

    def __str__(self) -> str:
        verdict = "collapsed: the cell hardly matters" if self else "the cell matters"
        return (
            f"collapse: {verdict}; {self.active_units} of {len(self.variance)} units active, {self.kl:.2f} nats a cell, "
            f"shuffling the cells' states worsens the reconstruction by {self.worsening:.0%}"
        )

    __repr__ = __str__


def collapse(fit: Fit, data: PerturbationData, *, draws: int = 4, seed: int = 0, n_cells: int = 2000) -> Collapse:
    """Active units, KL per cell, and whether the cell matters.

    Args:
        data: cells, best those held out; at most ``n_cells`` of them are looked at, evenly spread.

    Raises:
        ContractError: for a model without the site ``z``.
    """
    return collapse_of(fit.model, fit.guide, data, draws=draws, seed=seed, n_cells=n_cells)


def collapse_of(model: Any, guide: Any, data: PerturbationData, *, draws: int = 4, seed: int = 0, n_cells: int = 2000) -> Collapse:
    """:func:`collapse` of a pair."""
    rows = np.unique(np.linspace(0, len(data) - 1, min(n_cells, len(data))).astype(int))
    part = data[rows]
    device = next(model.parameters()).device
    batch = part.batch(device=device)
    assert batch.x is not None
    means, kls, errors, shuffled_errors = [], [], [], []
    other = torch.as_tensor(_other_of_condition(part.labels, seed), device=device)
    x = _scaled(batch.x, batch.library_size, data.kind)
    within = _within_variance(x, part.labels)
    with torch.no_grad(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        for _ in range(draws):
            guided = poutine.trace(guide).get_trace(batch)
            if "z" not in guided.nodes:
                raise ContractError("the guide samples no 'z', so there is no cell state that could collapse")
            trace = poutine.trace(poutine.replay(model, trace=guided)).get_trace(batch)
            law = guided.nodes["z"]["fn"]
            z = guided.nodes["z"]["value"]
            means.append(getattr(law, "mean", z))
            local = [n for n, s in _sample_sites(trace) if not s["is_observed"] and any(f.name == "cell" for f in s["cond_indep_stack"])]
            gap: Any = sum(guided.nodes[n]["fn"].log_prob(guided.nodes[n]["value"]) for n in local)
            gap = gap - sum(trace.nodes[n]["fn"].log_prob(trace.nodes[n]["value"]) for n in local)
            kls.append(gap.mean())
            globals_ = {n: guided.nodes[n]["value"] for n, s in _sample_sites(guided) if n not in local}
            errors.append(_error(trace.nodes["x"]["fn"].mean, x, batch, within, data.kind))
            swapped = poutine.condition(model, data=globals_ | {n: guided.nodes[n]["value"][other] for n in local})
            law_x = poutine.trace(swapped).get_trace(batch).nodes["x"]["fn"]
            shuffled_errors.append(_error(law_x.mean, x, batch, within, data.kind))
    mean = torch.stack(means).mean(0)
    return Collapse(
        variance=mean.var(0).cpu().numpy(),
        kl=float(torch.stack(kls).mean()),
        error=float(torch.stack(errors).mean()),
        error_shuffled=float(torch.stack(shuffled_errors).mean()),
    )


def _other_of_condition(labels: np.ndarray, seed: int) -> np.ndarray:
    """For each cell the position of another one of its condition (itself if it is alone): a random cycle within each condition."""
    order = np.random.default_rng(seed).permutation(len(labels))
    order = order[np.argsort(labels[order].astype(str), kind="stable")]
    other = np.empty(len(labels), np.int64)
    for group in np.split(order, np.flatnonzero(labels[order][1:] != labels[order][:-1]) + 1):
        other[group] = np.roll(group, 1)
    return other


def _scaled(x: Tensor, library_size: Tensor, kind: str) -> Tensor:
    return (1e4 * x / library_size).log1p() if kind == "counts" else x


def _within_variance(x: Tensor, labels: np.ndarray) -> Tensor:
    """Variance of each gene within conditions, [n_genes]."""
    codes = torch.as_tensor(np.unique(labels.astype(str), return_inverse=True)[1], device=x.device)
    n = torch.bincount(codes).to(x.dtype)
    means = x.new_zeros(len(n), x.shape[1]).index_add_(0, codes, x) / n[:, None]
    variance = (x - means[codes]).square().mean(0)
    return torch.where(variance > 0, variance, torch.ones_like(variance))


def _error(mean: Tensor, x: Tensor, batch: Any, within: Tensor, kind: str) -> Tensor:
    return ((_scaled(mean, batch.library_size, kind) - x).square().mean(0) / within).mean()
