"""Training: one loop for every model/guide pair.

The step is ``loss = elbo(batch); loss.backward(); optimiser.step()`` with one fused Adam over a ``torch.nn.Module``. A guide may define

- ``meet(model)``: called before the first run, by everything that makes or takes a pair; for guides that read the model's parameters;
- ``initialise(model, data)``: called once before the first epoch;
- ``after_step(model, batch, progress)`` and ``after_epoch(model, progress)``: closed-form updates between gradient steps;
- ``after_training(model, data, seed, progress)``: what follows from the fitted parameters, such as draws around a point; where it goes on
  with them it returns the bound that it reached, in nats per cell, the last row of the history (taken back if held-out cells lose by it);
- ``learning_rates``: ``{parameter name: multiple of lr}``;
- ``closed_form = True``: ``initialise`` is all of the fit, and the one epoch that follows only evaluates the bound.

Every epoch draws its randomness from ``(seed, epoch)`` alone, which is why a resumed run equals the uninterrupted one bit for bit.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
import pyro
import torch
from pyro.infer.elbo import ELBO as PyroELBO
from torch import nn
from tqdm import tqdm

from pyrocausal import io
from pyrocausal.checkpoint import State, restore, store
from pyrocausal.data import PerturbationData
from pyrocausal.elbo import ELBO
from pyrocausal.epoch import BATCH_SIZE, held_out_elbo, no_grad_if, run_epoch
from pyrocausal.errors import ContractError, DataError
from pyrocausal.loading import Batch, moment_batch
from pyrocausal.optimiser import learning_rates_of, parameter_groups
from pyrocausal.restarts import best_of

History: TypeAlias = pd.DataFrame


@dataclass
class Fit:
    """A fitted model/guide pair and what is needed to ask it questions.

    Attributes:
        model, guide: the pair, in evaluation mode.
        elbo: the objective as an ``nn.Module``: ``fit.elbo(batch)`` is the loss in nats for the whole training set.
        history: one row per epoch: ``elbo`` and ``validation`` (nats per cell), ``seconds``, ``lr``, ``kl_weight``, and each site's term.
        coords: names of genes, perturbations, batches, and the control; what the data taught the fit about itself.
        cells_per_perturbation: training cells of each perturbation.
        reference: up to 64 control cells of the training set, the covariates of fresh cells.
        vectorises: whether queries can run all draws at once; found by the first query.
        stopped: why training ended: ``"max_epochs"``, ``"early"``, ``"interrupted"`` or ``"callback"``.
        recipe: how to build the pair again (``pc.build``), or None for a pair of the user's own.
    """

    model: nn.Module
    guide: nn.Module
    elbo: nn.Module
    history: History
    coords: dict[str, Any]
    cells_per_perturbation: np.ndarray
    stopped: str
    settings: dict[str, Any]
    reference: Batch
    recipe: dict[str, Any] | None = None
    vectorises: bool | None = None

    def __repr__(self) -> str:
        last = self.history.iloc[-1] if len(self.history) else None
        score = "" if last is None else f", ELBO {last['elbo']:.2f} nats per cell"
        return f"Fit({type(self.model).__name__}, {len(self.history)} epochs, {self.stopped}{score})"

    def save(self, path: str | Path) -> None:
        """Write the run to a directory (JSON and ``.npz``, no pickle). An older run there is replaced only once the new one is complete."""
        io.save_fit(self, Path(path))


def fit(
    model: Any,
    guide: Any,
    data: PerturbationData,
    *,
    max_epochs: int = 100,
    batch_size: int = BATCH_SIZE,
    lr: float = 3e-3,
    learning_rates: dict[str, float] | None = None,
    schedule: str = "cosine",
    kl_warmup: float | tuple[float, float] = 0.5,
    validation: float | PerturbationData | None = None,
    patience: int | None = 20,
    objective: str | PyroELBO = "exact",
    clip_norm: float | None = 100.0,
    restarts: int = 1,
    make: Callable[[int], tuple[Any, Any]] | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 10,
    resume: bool = False,
    callback: Callable[[int, dict[str, float]], bool | None] | None = None,
    progress: bool | None = None,
) -> Fit:
    """Fit a model and its guide to a screen by stochastic variational inference.

    Args:
        model, guide: ``nn.Module``s taking a batch: of the collection, or your own.
        max_epochs: passes over the training cells.
        batch_size: cells per step.
        lr: peak learning rate of Adam.
        learning_rates: multiples of ``lr`` by parameter name (any parameter whose dotted name ends in the key); the guide's and model's own
            ``learning_rates`` are the defaults.
        schedule: ``"cosine"`` (5 % warm-up, then to a hundredth) or ``"constant"``.
        kl_warmup: share of the epochs over which the weight of all latent terms rises from 0 to 1, or the shares at which it starts
            to rise and is 1.
        validation: share of the cells to hold out, or held-out data; None trains on all cells and does not stop early. The held-out
            bound charges the global terms as for the training cells, once for all of them.
        patience: epochs without a better held-out ELBO before stopping (counted after the warm-up and after the guide's last turn); the
            best state is kept. None never stops early.
        objective: ``"exact"`` (our ELBO), ``"parity"`` (the published objective, if the model has one), or any ``pyro.infer`` ELBO.
        clip_norm: bound on the norm of the gradient per cell.
        restarts: fits from different starts, of which the held-out bound chooses (of a tenth of the cells, if there is no ``validation``);
            all are in ``Fit.settings["restarts"]``.
        make: ``make(seed)`` returns a new pair for a restart; pairs of ``pc.build`` need none.
        seed: of initialisation order, minibatches and draws. The caller's random state is left as it was.
        checkpoint: file to write the state to every ``checkpoint_every`` epochs and at the end.
        resume: go on from ``checkpoint`` if it exists.
        callback: ``callback(epoch, row of the history)``; a true return value stops the training.
        progress: show the bar; by default, if standard error is a terminal.

    An interrupt (Ctrl-C) ends the training and keeps the fit: ``Fit.stopped == "interrupted"``.

    Raises:
        ContractError: if the pair cannot be trained. DataError: if model and data do not match. CheckpointError: if ``checkpoint`` is
            damaged or belongs to another run.
    """
    _check(model, guide, data, max_epochs, batch_size, schedule)
    if getattr(guide, "closed_form", False):
        max_epochs, restarts, kl_warmup = 1, 1, 0.0
    if restarts != 1:
        if restarts < 1:
            raise ValueError(f"restarts={restarts} was given; it is the number of fits, at least 1")
        same = {
            "max_epochs": max_epochs, "batch_size": batch_size, "lr": lr, "learning_rates": learning_rates, "schedule": schedule,
            "kl_warmup": kl_warmup, "patience": patience, "objective": objective, "clip_norm": clip_norm, "device": device,
            "checkpoint": checkpoint, "checkpoint_every": checkpoint_every, "resume": resume, "callback": callback, "progress": progress,
        }  # fmt: skip
        return best_of(restarts, make, model, guide, data, validation, seed, same)
    train, held = _hold_out(data, validation, seed)
    device = torch.device(device)
    model.to(device)
    guide.to(device)
    state = State()
    warmup = kl_warmup if isinstance(kl_warmup, tuple) else (0.0, kl_warmup)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        estimator = _objective(objective, model)
        if isinstance(estimator, ELBO):
            cells = torch.as_tensor(train.cells_per_perturbation, dtype=torch.float32, device=device)
            estimator.cells_per_perturbation = cells
        loss_module = estimator(model, guide)
        if hasattr(guide, "meet"):
            guide.meet(model)
        if hasattr(guide, "initialise"):
            guide.initialise(model, train)
        _first_step(loss_module, model, guide, train, device)
        groups = parameter_groups(loss_module, lr, learning_rates_of(model, guide, learning_rates))
        optimiser = torch.optim.Adam(groups, lr=lr, fused=True)
        base_rates = [g["lr"] for g in optimiser.param_groups]
        if resume and checkpoint is not None and Path(checkpoint).exists():
            restore(Path(checkpoint), loss_module, optimiser, state, seed)
        stopped = "early" if _exhausted(state, patience, held) else "max_epochs"
        bar = tqdm(
            total=max_epochs,
            initial=state.epoch,
            desc=f"fit {type(model).__name__}",
            unit="epoch",
            disable=not (sys.stderr.isatty() if progress is None else progress),
            dynamic_ncols=True,
        )
        settled = max(warmup[1], getattr(guide, "settled", 0.0))
        by_moments = getattr(model, "batching", "cells") == "moments" and train.complete
        moments = None
        if by_moments:
            moments = moment_batch(train, getattr(model, "pooled", True), device=device, by_time=getattr(model, "by_time", False))
        try:
            while state.epoch < max_epochs and stopped == "max_epochs":
                row = run_epoch(
                    loss_module, optimiser, base_rates, model, guide, train, held, state.epoch, max_epochs, batch_size, schedule, warmup,
                    clip_norm, seed, device, moments,
                )  # fmt: skip
                state.epoch += 1
                state.history.append(row)
                _track_best(state, row, loss_module, state.epoch / max_epochs > settled, held is not None)
                bar.update()
                bar.set_postfix_str(f"elbo {row['elbo']:.2f}" + (f", held out {row['validation']:.2f}" if held is not None else ""))
                if checkpoint is not None and (state.epoch % checkpoint_every == 0 or state.epoch == max_epochs):
                    store(Path(checkpoint), loss_module, optimiser, state, seed)
                if callback is not None and callback(state.epoch, row):
                    stopped = "callback"
                elif _exhausted(state, patience, held):
                    stopped = "early"
        except KeyboardInterrupt:
            stopped = "interrupted"
        bar.close()
        if state.best_state is not None and stopped in ("early", "max_epochs"):
            loss_module.load_state_dict(state.best_state)
        if stopped != "interrupted" and hasattr(guide, "after_training"):
            start, before = time.perf_counter(), _copy_of(loss_module)
            try:
                reached = guide.after_training(model, train, seed, sys.stderr.isatty() if progress is None else progress)
            except KeyboardInterrupt:
                stopped, reached = "interrupted", None
            row = {} if reached is None else {**state.history[-1], "elbo": reached, "seconds": time.perf_counter() - start}
            if row and held is not None:
                row["validation"] = held_out_elbo(loss_module, held, len(train), batch_size=batch_size, device=device, seed=seed)
                if row["validation"] < max(state.best, state.history[-1]["validation"]):  # it went too far
                    loss_module.load_state_dict(before)
                    row = {}
            state.history += [row] if row else []
    model.eval()
    guide.eval()
    return Fit(
        model=model,
        guide=guide,
        elbo=loss_module,
        history=History(state.history, index=pd.RangeIndex(1, len(state.history) + 1, name="epoch")),
        coords=coords_of(data),
        cells_per_perturbation=train.cells_per_perturbation,
        stopped=stopped,
        settings={
            "max_epochs": max_epochs,
            "batch_size": batch_size,
            "lr": lr,
            "seed": seed,
            "n_cells": len(train),
            "objective": objective if isinstance(objective, str) else "exact",
        },
        reference=_at_the_end(model, reference_cells(train)),
        recipe=getattr(model, "recipe", None),
    )


def reference_cells(train: PerturbationData, n: int = 64) -> Batch:
    """Control cells spread evenly over the training set (any cells if it has no control)."""
    rows = np.flatnonzero(train.is_control)
    rows = rows if len(rows) else np.arange(len(train))
    rows = rows[np.linspace(0, len(rows) - 1, min(n, len(rows))).astype(int)]
    batch = train.batch(rows, n_total=len(train))
    return replace(batch, dose=torch.zeros_like(batch.dose), nonzeros=None)


def _at_the_end(model: Any, cells: Batch) -> Batch:
    """Fresh cells of a model with time are asked about at its last time, wherever the controls were measured."""
    if not getattr(model, "timed", False):
        return cells
    return replace(cells, time=torch.full((len(cells),), float(model.times[-1])), course=None)


def coords_of(data: PerturbationData) -> dict[str, Any]:
    """The names that a fit keeps of its data."""
    return {
        "gene": list(data.genes),
        "perturbation": list(data.perturbations),
        "batch": list(data.batches),
        "control": data.control,
        "separator": data.separator,
        "kind": data.kind,
        "modality": data.modality,
    }


# -- setting up ----------------------------------------------------------------------------------------------------------------


def _check(model: nn.Module, guide: nn.Module, data: PerturbationData, max_epochs: int, batch_size: int, schedule: str) -> None:
    for name, part in (("model", model), ("guide", guide)):
        if not isinstance(part, nn.Module):
            raise ContractError(f"the {name} is a {type(part).__name__}; it must be an nn.Module (PyroModule) that is called with a batch")
    if not isinstance(data, PerturbationData):
        raise DataError(f"data is a {type(data).__name__}; make it with pc.PerturbationData.from_anndata(adata)")
    if max_epochs < 1 or batch_size < 1:
        raise ValueError(f"max_epochs={max_epochs} and batch_size={batch_size} were given; both must be at least 1")
    if schedule not in ("cosine", "constant"):
        raise ValueError(f"schedule={schedule!r} was given; it is 'cosine' or 'constant'")
    if getattr(model, "data_kind", data.kind) != data.kind:
        raise DataError(
            f"{type(model).__name__} models {model.data_kind} expression, but the data are {data.kind}; fit it to data.log_normalised()"
        )
    likelihood: Any = getattr(model, "likelihood", None)
    if getattr(likelihood, "is_counts", False) and data.kind != "counts":
        raise DataError(
            f"the likelihood {likelihood.name!r} is for counts, but the data are {data.kind}; "
            "name the layer with counts in from_anndata, or use likelihood='gaussian'"
        )


def _hold_out(
    data: PerturbationData, validation: float | PerturbationData | None, seed: int
) -> tuple[PerturbationData, PerturbationData | None]:
    if validation is None or isinstance(validation, PerturbationData):
        return data, validation
    return data.split("cells", test=validation, seed=seed)


def _objective(objective: str | PyroELBO, model: nn.Module) -> PyroELBO:
    if isinstance(objective, PyroELBO):
        if not hasattr(objective, "differentiable_loss"):
            raise ContractError(f"{type(objective).__name__} has no differentiable_loss, so it cannot train modules; use Trace_ELBO")
        return objective
    if objective == "exact":
        return ELBO()
    if objective == "parity":
        if not hasattr(model, "parity_objective"):
            raise ContractError(f"{type(model).__name__} has no published objective; use objective='exact'")
        return model.parity_objective()  # type: ignore[operator]
    raise ValueError(f"objective={objective!r} was given; it is 'exact', 'parity' or a pyro.infer ELBO")


def _first_step(loss_module: nn.Module, model: nn.Module, guide: nn.Module, train: PerturbationData, device: torch.device) -> None:
    """Run once with validation on: lazy parameters are made, and faults show before any work is done."""
    store = set(pyro.get_param_store().keys())
    with no_grad_if(loss_module):
        loss_module(train.batch(np.arange(min(4, len(train))), n_total=len(train), device=device))
    new = set(pyro.get_param_store().keys()) - store
    if new:
        for name in new:
            del pyro.get_param_store()[name]
        raise ContractError(f"pyro.param made {sorted(new)[0]!r} in the global store; make it a PyroParam or nn.Parameter of the module")
    if not any(p.requires_grad for p in loss_module.parameters()):
        raise ContractError("neither model nor guide has a parameter to train; add a PyroParam or nn.Parameter")


# -- stopping -------------------------------------------------------------------------------------------------------------------


def _track_best(state: State, row: dict[str, float], loss_module: nn.Module, counting: bool, held: bool) -> None:
    if not held or not counting:
        return
    if row["validation"] > state.best:
        state.best, state.since_best = row["validation"], 0
        state.best_state = _copy_of(loss_module)
    else:
        state.since_best += 1


def _copy_of(loss_module: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.detach().clone() for k, v in loss_module.state_dict().items()}


def _exhausted(state: State, patience: int | None, held: PerturbationData | None) -> bool:
    return held is not None and patience is not None and state.since_best >= patience
