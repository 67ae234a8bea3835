"""Checkpoints: the state of a training between two epochs, from which it goes on bit for bit."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from pyrocausal import io
from pyrocausal.errors import CheckpointError


@dataclass
class State:
    """Where a training stands, beside its parameters: epochs done, best held-out ELBO and its state, history."""

    epoch: int = 0
    best: float = -math.inf
    since_best: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    best_state: dict[str, torch.Tensor] | None = None


def store(path: Path, loss_module: Any, optimiser: torch.optim.Optimizer, state: State, seed: int) -> None:
    """Write everything that :func:`restore` needs, atomically."""
    arrays = {f"state/{k}": v for k, v in loss_module.state_dict().items()}
    for i, moments in optimiser.state_dict()["state"].items():
        arrays |= {f"optimiser/{i}/{k}": v for k, v in moments.items()}
    if state.best_state is not None:
        arrays |= {f"best/{k}": v for k, v in state.best_state.items()}
    facts = {
        "pair": _pair(loss_module),
        "epoch": state.epoch,
        "best": state.best,
        "since_best": state.since_best,
        "history": state.history,
        "seed": seed,
    }
    io.write_arrays(path, arrays, facts)


def _pair(loss_module: Any) -> list[str]:
    return [type(part).__name__ for part in (loss_module.model, loss_module.guide)]


def restore(path: Path, loss_module: Any, optimiser: torch.optim.Optimizer, state: State, seed: int) -> None:
    """Put modules, optimiser and state back to where they were.

    Raises:
        CheckpointError: if the file is damaged, or of another seed, model or guide.
    """
    arrays, facts = io.read_arrays(path)
    if facts.get("seed") != seed:
        raise CheckpointError(f"{path.name!r} was written with seed={facts.get('seed')}, but seed={seed} was given; give the same seed")
    if facts.get("pair") != _pair(loss_module):
        raise CheckpointError(f"{path.name!r} belongs to another model or guide; give the pair it was written for")
    try:
        loss_module.load_state_dict({k.removeprefix("state/"): v for k, v in arrays.items() if k.startswith("state/")})
    except RuntimeError as error:
        raise CheckpointError(f"{path.name!r} belongs to another model or guide; give the pair it was written for") from error
    moments: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in arrays.items():
        if key.startswith("optimiser/"):
            _, i, name = key.split("/")
            moments.setdefault(int(i), {})[name] = value
    optimiser.load_state_dict({"state": moments, "param_groups": optimiser.state_dict()["param_groups"]})
    state.epoch, state.best, state.since_best = facts["epoch"], facts["best"], facts["since_best"]
    state.history = facts["history"]
    best = {k.removeprefix("best/"): v for k, v in arrays.items() if k.startswith("best/")}
    state.best_state = best or None
