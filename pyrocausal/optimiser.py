"""Learning rates: which parameter learns how fast, and when."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from pyrocausal.errors import ContractError


def learning_rate_factor(done: float, schedule: str) -> float:
    """Multiple of the base rate after a share ``done`` of the training."""
    if schedule == "constant":
        return 1.0
    warm = 0.05
    if done < warm:
        return 0.1 + 0.9 * done / warm
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (done - warm) / (1 - warm)))


def learning_rates_of(model: nn.Module, guide: nn.Module, given: dict[str, float] | None) -> dict[str, float]:
    return {**getattr(model, "learning_rates", {}), **getattr(guide, "learning_rates", {}), **(given or {})}


def parameter_groups(module: nn.Module, lr: float, rates: dict[str, float]) -> list[dict[str, Any]]:
    """Adam's parameter groups: one for each learning rate."""
    by_rate: dict[float, list[nn.Parameter]] = {}
    met: set[str] = set()
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        keys = [k for k in rates if name.removesuffix("_unconstrained").endswith(k)]
        met.update(keys)
        by_rate.setdefault(rates[keys[0]] if keys else 1.0, []).append(parameter)
    unknown = [k for k in rates if k not in met and not any(n.endswith(k) for n, _ in module.named_parameters())]
    if unknown:
        raise ContractError(f"learning_rates names {unknown[0]!r}, but no parameter's name ends in it")
    return [{"params": ps, "lr": lr * rate} for rate, ps in by_rate.items()]
