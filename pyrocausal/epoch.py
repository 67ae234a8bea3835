"""One pass over the training cells, and the bound of cells that were held out."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import pyro
import torch
from torch import nn

from pyrocausal.data import PerturbationData
from pyrocausal.elbo import ELBO, KLWeight
from pyrocausal.errors import ContractError
from pyrocausal.loading import Batch, batches, batches_by_condition
from pyrocausal.optimiser import learning_rate_factor

BATCH_SIZE = 256  # cells per step
STEPS = 3000, 4000  # gradient steps below which epochs are added, and above which they are taken away


def steps_per_epoch(model: Any, data: PerturbationData, batch_size: int = BATCH_SIZE) -> int:
    """Gradient steps of a pass over the cells: minibatches of all cells; of each condition apart (``batching="condition"``); or one, of the
    moments of the screen (``"moments"``)."""
    batching = getattr(model, "batching", "cells")
    if batching == "moments" and data.complete:
        return 1
    sizes = np.unique(data.labels.astype(str), return_counts=True)[1] if batching == "condition" else np.array([len(data)])
    return int(np.maximum(1, -(-sizes // batch_size)).sum())


def default_epochs(steps: int) -> int:
    """60 epochs of so many steps; more where that is under 3,000 gradient steps, fewer (but 10) where it is over 4,000."""
    return max(10, min(max(60, -(-STEPS[0] // steps)), STEPS[1] // steps))


def run_epoch(
    loss_module: nn.Module,
    optimiser: torch.optim.Optimizer,
    base_rates: list[float],
    model: Any,
    guide: Any,
    train: PerturbationData,
    held: PerturbationData | None,
    epoch: int,
    max_epochs: int,
    batch_size: int,
    schedule: str,
    kl_warmup: tuple[float, float],
    clip_norm: float | None,
    seed: int,
    device: torch.device,
    moments: Batch | None = None,
) -> dict[str, float]:
    """One pass over the training cells, from randomness that depends on ``(seed, epoch)`` only."""
    start = time.perf_counter()
    rng = np.random.default_rng([seed, epoch])
    torch.manual_seed(int(rng.integers(2**62)))
    n = len(train)
    by_condition = getattr(model, "batching", "cells") == "condition"
    if moments is not None:
        n_steps, minibatches = 1, iter([moments])
    elif by_condition:
        n_steps, minibatches = batches_by_condition(train, batch_size, rng, device=device)
    else:
        n_steps, minibatches = max(1, -(-n // batch_size)), batches(train, batch_size, rng.permutation(n), device=device)
    parameters = [p for g in optimiser.param_groups for p in g["params"]]
    total = torch.zeros((), device=device, dtype=torch.float64)
    sites: dict[str, torch.Tensor] = {}
    healthy = torch.ones((), device=device, dtype=torch.bool)
    model.train()
    guide.train()
    weight, factor = 1.0, 1.0
    with _quiet_validation(True):
        for step, batch in enumerate(minibatches):
            done = (epoch + step / n_steps) / max_epochs
            risen = (done - kl_warmup[0]) * max_epochs * n_steps + 1
            weight = min(1.0, max(0.0, risen) / max(1.0, (kl_warmup[1] - kl_warmup[0]) * max_epochs * n_steps))
            factor = learning_rate_factor(done, schedule)
            for group, base in zip(optimiser.param_groups, base_rates, strict=True):
                group["lr"] = base * factor
            collapsed = batch.moments is None and getattr(model, "collapses", False)
            with KLWeight(weight) if weight < 1 else nullcontext():
                loss = loss_module(replace(batch, collapsed=True) if collapsed else batch) / n
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            if clip_norm is not None:
                nn.utils.clip_grad_norm_(parameters, clip_norm, foreach=True)
            optimiser.step()
            if hasattr(guide, "after_step"):
                guide.after_step(model, batch, done)
            cells = n if batch.moments is not None else len(batch)
            total -= loss.detach() * cells
            for name, term in _terms(loss_module).items():
                sites[name] = sites.get(name, 0) + torch.where(healthy, term, 0.0) * (cells / n)
            healthy = healthy & loss.detach().isfinite()  # later steps of a lost epoch would blame every site
    if hasattr(guide, "after_epoch"):
        guide.after_epoch(model, (epoch + 1) / max_epochs)
    row = {"elbo": float(total) / n, "validation": math.nan, "kl_weight": weight, "lr": base_rates[0] * factor}
    row |= {f"site:{name}": float(term) / n for name, term in sites.items()}
    if not math.isfinite(row["elbo"]):
        raise ContractError(
            f"the ELBO became {row['elbo']} in epoch {epoch + 1} (terms: {_not_finite(row)}); lower lr, or check the scale of the data"
        )
    if held is not None:
        controls = train if by_condition else None
        row["validation"] = held_out_elbo(loss_module, held, n, batch_size=batch_size, device=device, seed=seed, controls=controls)
    row["seconds"] = time.perf_counter() - start
    return row


def held_out_elbo(
    loss_module: nn.Module,
    held: PerturbationData,
    n_train: int,
    batch_size: int = BATCH_SIZE,
    device: torch.device | str = "cpu",
    seed: int = 0,
    controls: PerturbationData | None = None,
) -> float:
    """The bound of held-out cells in nats per cell.

    Local terms are averaged over the held-out cells; global terms count once for the ``n_train`` cells that they were learned from,
    that is, ``1 / n_train`` of them per cell, as in training (a plain bound over the held-out cells would charge them
    ``n_train / n_held`` times too much). With ``controls`` the minibatches are by condition, with control cells of it beside them.
    """
    was_training = loss_module.training
    loss_module.eval()
    total = torch.zeros((), dtype=torch.float64, device=device)
    with torch.random.fork_rng(), no_grad_if(loss_module), _quiet_validation(True):
        torch.manual_seed(seed)
        minibatches = batches(held, batch_size, n_total=n_train, device=device)
        if controls is not None:
            rng = np.random.default_rng(seed)
            _, minibatches = batches_by_condition(held, batch_size, rng, n_total=n_train, device=device, controls=controls)
        collapsed = getattr(loss_module.model, "collapses", False)
        for batch in minibatches:
            batch = replace(batch, collapsed=True) if collapsed else batch
            total -= loss_module(batch).detach().double() / n_train * len(batch)
    loss_module.train(was_training)
    return float(total) / len(held)


def no_grad_if(loss_module: nn.Module) -> Any:
    """Without gradients, if the bound allows it (TraceEnum_ELBO refuses to be evaluated without)."""
    return torch.no_grad() if isinstance(getattr(loss_module, "elbo", None), ELBO) else nullcontext()


@contextmanager
def _quiet_validation(quiet: bool) -> Iterator[None]:
    """Pyro's argument checks off (each is a host synchronisation); on in the first epoch, restored afterwards."""
    before = pyro.settings.get("validate_distributions_pyro"), pyro.settings.get("validate_distributions_torch"), pyro.settings.get("validate_infer"), pyro.settings.get("validate_poutine")  # fmt: skip  # noqa: E501
    if quiet:
        pyro.enable_validation(False)
    try:
        yield
    finally:
        pyro.settings.set(
            validate_distributions_pyro=before[0],
            validate_distributions_torch=before[1],
            validate_infer=before[2],
            validate_poutine=before[3],
        )


def _terms(loss_module: nn.Module) -> dict[str, torch.Tensor]:
    return getattr(getattr(loss_module, "elbo", None), "terms", {})


def _not_finite(row: dict[str, float]) -> str:
    bad = [k.removeprefix("site:") for k, v in row.items() if k.startswith("site:") and not math.isfinite(v)]
    return ", ".join(bad) or "none separately"
