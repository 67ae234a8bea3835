"""The last stretch of a training whose objective has no noise: quasi-Newton steps, where gradient steps crawl along a valley.

For pairs whose bound is in closed form (on the moments of conditions, or with the state of each cell integrated out), limited-memory BFGS
with a strong Wolfe line search (Nocedal and Wright 2006, chapter 7) goes on from where Adam stopped.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from tqdm import tqdm

from pyrocausal.elbo import ELBO
from pyrocausal.loading import Batch

CHUNK = 20  # iterations between looks at the bar
SMALL = 1e-7  # nats per cell in a chunk, below which it has converged


def polish(model: Any, guide: Any, batches: Sequence[Batch], steps: int, progress: bool = False) -> float:
    """Maximise the bound over all parameters, in place; nats per cell at the end.

    Args:
        batches: the whole of the data, in parts whose gradients are summed: one moment batch, or cells.

    Steps that do not improve the bound are taken back, and so are those of a chunk that is interrupted.
    """
    parameters = [p for part in (model, guide) for p in part.parameters() if p.requires_grad]
    optimiser = torch.optim.LBFGS(
        parameters,
        max_iter=CHUNK,
        max_eval=2 * CHUNK,
        history_size=50,
        tolerance_grad=1e-9,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )

    def loss() -> torch.Tensor:
        optimiser.zero_grad()
        return backward(model, guide, batches)

    best, kept = float(loss()), [p.detach().clone() for p in parameters]
    bar = tqdm(total=steps, desc="polish", unit="step", disable=not (progress and sys.stderr.isatty()))
    try:
        for _ in range(0, steps, CHUNK):
            optimiser.step(loss)
            now = float(loss())
            bar.update(CHUNK)
            bar.set_postfix_str(f"elbo {-now:.3f}")
            if not now < best:
                break
            gain, best, kept = best - now, now, [p.detach().clone() for p in parameters]
            if gain < SMALL:
                break
    finally:
        bar.close()
        with torch.no_grad():
            for p, value in zip(parameters, kept, strict=True):
                p.copy_(value)
    return -best


def backward(model: Any, guide: Any, batches: Sequence[Batch]) -> torch.Tensor:
    """The negative bound of all batches, in nats per cell; its gradient is added to that of the parameters."""
    bound, n = ELBO(), sum(len(b) for b in batches)
    parts = []
    for batch in batches:  # each scales its cells to the whole, and has the global terms
        part = bound.differentiable_loss(model, guide, batch) / batch.n_total * (len(batch) / n)
        part.backward()
        parts.append(part.detach())
    return torch.stack(parts).sum()


__all__ = ["backward", "polish"]
