"""The last stretch of a training whose objective has no noise: quasi-Newton steps, where gradient steps crawl along a valley.

For pairs that are trained on the moments of conditions with a bound in closed form, limited-memory BFGS with a strong Wolfe line search
(Nocedal and Wright 2006, chapter 7) goes on from where Adam stopped.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from tqdm import tqdm

from pyrocausal.elbo import ELBO
from pyrocausal.loading import Batch

CHUNK = 20  # iterations between looks at the bar
SMALL = 1e-7  # nats per cell in a chunk, below which it has converged


def polish(model: Any, guide: Any, batch: Batch, steps: int, progress: bool = False) -> float:
    """Maximise the bound of a moment batch over all parameters, in place; nats per cell at the end.

    Steps that do not improve the bound are taken back, and so are those of a chunk that is interrupted.
    """
    bound, parameters = ELBO(), [p for part in (model, guide) for p in part.parameters() if p.requires_grad]
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
        value = bound.differentiable_loss(model, guide, batch) / batch.n_total
        value.backward()
        return value

    best, kept = float(loss().detach()), [p.detach().clone() for p in parameters]
    bar = tqdm(total=steps, desc="polish", unit="step", disable=not (progress and sys.stderr.isatty()))
    try:
        for _ in range(0, steps, CHUNK):
            optimiser.step(loss)
            now = float(loss().detach())
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


__all__ = ["polish"]
