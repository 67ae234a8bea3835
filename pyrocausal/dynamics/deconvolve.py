"""The states behind counts, condition by condition: a generator of states whose counts are those of the cells.

First stage of Lorch et al. 2026 (arXiv 2601.15341). Condition q has a network g_q of its own, ``x = g_q(eps)``, eps ~ Normal(0, I); with M
draws of states and N cells, for temperatures tau::

    l_nm = sum_j log ZIP(y_nj; unit_j softplus(x_mj), gate_j)
    loss = mean_tau mean_n -tau (logsumexp_m(l_nm / tau) - log M)

At tau = 1 that is the Monte Carlo evidence with the generator as the prior; larger tau flatten it. The gate is shared by all conditions.
The likelihoods are three matrix products (:func:`pyrocausal.zero_inflated.pairwise_zip`).
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from torch import Tensor, nn
from torch.nn.functional import silu, softplus
from tqdm import tqdm

from pyrocausal.data import PerturbationData
from pyrocausal.dynamics.score import Source, from_cells
from pyrocausal.errors import DataError
from pyrocausal.zero_inflated import pairwise_zip

DECAY, EPSILON, CLIP = 0.99, 1e-8, 1.0  # of the squared gradients; of the step; of the gradient's norm


class Generators(nn.Module):
    """The networks of all conditions, stacked: 64 normal numbers -> a state of d genes.

    A dense layer, ``n_blocks`` residual blocks of ``width`` (dense, SiLU, dense), a dense layer to the genes, ``n_wide`` residual blocks
    through ``wide`` units.
    """

    def __init__(
        self, n_conditions: int, n_genes: int, n_noise: int = 64, width: int = 64, n_blocks: int = 4, wide: int = 256, n_wide: int = 2
    ) -> None:
        super().__init__()
        self.n_noise, self.n_blocks, self.n_wide = n_noise, n_blocks, n_wide
        sizes = {"first": (n_noise, width)}
        sizes |= {f"block{i}{part}": (width, width) for i in range(n_blocks) for part in "ab"}
        sizes |= {"genes": (width, n_genes)}
        for i in range(n_wide):
            sizes |= {f"wide{i}a": (n_genes, wide), f"wide{i}b": (wide, n_genes)}
        self.weight = nn.ParameterDict({k: nn.Parameter(_lecun(n_conditions, *v)) for k, v in sizes.items()})
        self.bias = nn.ParameterDict({k: nn.Parameter(torch.zeros(n_conditions, 1, v[1])) for k, v in sizes.items()})

    def rows(self, codes: Tensor) -> dict[str, Tensor]:
        """The parameters of some conditions, as leaves of a graph of their own, [len(codes), ...]."""
        named = {f"{kind}.{k}": v for kind in ("weight", "bias") for k, v in getattr(self, kind).items()}
        return {k: v.detach()[codes].requires_grad_() for k, v in named.items()}

    def forward(self, eps: Tensor, rows: dict[str, Tensor]) -> Tensor:
        """States [q, M, d] from noise [q, M, n_noise]."""

        def dense(x: Tensor, name: str) -> Tensor:
            return torch.baddbmm(rows[f"bias.{name}"], x, rows[f"weight.{name}"])

        x = dense(eps, "first")
        for i in range(self.n_blocks):
            x = x + dense(silu(dense(x, f"block{i}a")), f"block{i}b")
        x = dense(x, "genes")
        for i in range(self.n_wide):
            x = x + dense(silu(dense(x, f"wide{i}a")), f"wide{i}b")
        return x

    @torch.no_grad()
    def states(self, q: Tensor, generator: torch.Generator) -> Tensor:
        """States of conditions q [n], [n, d]; drawn when they are asked for, in one pass over the conditions that occur."""
        kinds, which, size = torch.unique(q, return_inverse=True, return_counts=True)
        order = torch.argsort(which, stable=True)
        place = torch.empty_like(which)
        place[order] = torch.arange(len(q)) - (size.cumsum(0) - size)[which[order]]
        eps = torch.randn(len(kinds), int(size.max()), self.n_noise, generator=generator)
        device = self.bias["first"].device
        return self(eps.to(device), self.rows(kinds.to(device)))[which.to(device), place.to(device)]


def _lecun(n: int, n_in: int, n_out: int) -> Tensor:
    sd = n_in**-0.5 / 0.87962566  # of a normal law that is cut at two standard deviations
    return nn.init.trunc_normal_(torch.empty(n, n_in, n_out), std=sd, a=-2 * sd, b=2 * sd)


def evidence(log_lik: Tensor, taus: Sequence[float] = (1.0,), debias: bool = False) -> Tensor:
    """``mean_tau tau (logsumexp_m(l / tau) - log M)`` of each cell, [..., N]; log_lik [..., N, M].

    Args:
        debias: add ``tau var / (2 M mean^2)`` of the weights ``exp(l / tau)``, what Jensen's inequality takes away to second order.
    """
    M, parts = log_lik.shape[-1], []
    for tau in taus:
        scaled = log_lik / tau
        log_mean = scaled.logsumexp(-1) - math.log(M)
        if debias:
            relative = (scaled - log_mean.unsqueeze(-1)).exp()
            log_mean = log_mean + (relative - 1).square().sum(-1) / max(M - 1, 1) / (2 * M)
        parts.append(tau * log_mean)
    return torch.stack(parts).mean(0)


@dataclass(frozen=True)
class Deconvolution:
    """Generators, logit of the gate of each gene [d], and the loss (``attrs["stopped"]`` says why it ended)."""

    generators: Generators
    gate_logits: Tensor
    history: pd.DataFrame

    @property
    def source(self) -> Source:
        """Fresh states of conditions."""
        return self.generators.states


def deconvolve(
    data: PerturbationData,
    codes: Tensor,
    unit: Tensor,
    *,
    steps: int = 250_000,
    mc_samples: int = 20_000,
    cells: int = 64,
    taus: Sequence[float] = (1.0, 20.0),
    lr: float = 3e-4,
    warmup: int | None = None,
    debias: bool = False,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: bool | None = None,
    **sizes: int,
) -> Deconvolution:
    """Fit the generators of all conditions.

    Each step has ``cells`` cells of one condition at random and ``mc_samples`` states of its generator. The optimiser is the published one:
    Adam without momentum over all parameters at once (b2 = .99, clipped at norm 1, linear warm-up, cosine to 0). Between the visits of a
    condition its squared gradients decay, and nothing else happens to it, so that only visited parameters need be touched.

    Args:
        data: counts. codes: condition of each cell, [n_cells]. unit: rate of each gene per unit of softplus, [d].
        warmup: steps; 5,000 or a fiftieth of ``steps`` if that is less.
        sizes: of :class:`Generators`.
    """
    if data.kind != "counts":
        raise DataError(f"the data are {data.kind}, which have no counting noise to remove; match scores of the expression itself")
    n_conditions, d = int(codes.max()) + 1, len(unit)
    warmup = min(5000, max(1, steps // 50)) if warmup is None else warmup
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        generators = Generators(n_conditions, d, **sizes).to(device)
        gate_logits = torch.randn(d).to(device)
    unit = unit.to(device)
    pick = from_cells(torch.arange(len(data)), codes, n_conditions)
    table = {f"{kind}.{k}": v.data for kind in ("weight", "bias") for k, v in getattr(generators, kind).items()}
    square = {k: torch.zeros_like(v) for k, v in table.items()}
    gate_square, last = torch.zeros_like(gate_logits), torch.zeros(n_conditions, dtype=torch.int64)
    history: list[dict[str, float]] = []
    every, total, count, stopped = max(1, steps // 200), torch.zeros((), device=device), 0, "max_steps"
    bar = tqdm(total=steps, desc="deconvolve", unit="step", disable=not (sys.stderr.isatty() if progress is None else progress))
    start = time.perf_counter()
    try:
        for step in range(1, steps + 1):
            q = int(torch.randint(n_conditions, (), generator=generator))
            y = _counts(data, pick(torch.full((cells,), q), generator).numpy()).to(device)
            eps = torch.randn(1, mc_samples, generators.n_noise, generator=generator).to(device)
            rows, gate = generators.rows(torch.tensor([q], device=device)), gate_logits.clone().requires_grad_()
            rate = unit * softplus(generators(eps, rows)[0])
            loss = -evidence(pairwise_zip(y, rate, gate.sigmoid()), taus, debias).mean()
            gradients = torch.autograd.grad(loss, [gate, *rows.values()])
            shrink = (CLIP / torch.stack([g.square().sum() for g in gradients]).sum().sqrt()).clamp(max=1.0)
            rate_now = lr * min(1.0, step / warmup) * 0.5 * (1 + math.cos(math.pi * max(0, step - warmup) / max(1, steps - warmup)))
            unbias = 1 - DECAY**step
            idle = DECAY ** (step - int(last[q]))
            for (name, value), g in zip(rows.items(), gradients[1:], strict=True):
                square[name][q] = idle * square[name][q] + (1 - DECAY) * (g[0] * shrink).square()
                table[name][q] = value.detach()[0] - rate_now * g[0] * shrink / ((square[name][q] / unbias).sqrt() + EPSILON)
            g = gradients[0] * shrink
            gate_square = DECAY * gate_square + (1 - DECAY) * g.square()
            gate_logits = gate_logits - rate_now * g / ((gate_square / unbias).sqrt() + EPSILON)
            last[q] = step
            total, count = total + loss.detach(), count + 1
            if step % every == 0 or step == steps:
                history.append({"step": step, "loss": float(total) / count, "seconds": time.perf_counter() - start})
                total, count = torch.zeros_like(total), 0
                bar.set_postfix_str(f"loss {history[-1]['loss']:.2f}")
            bar.update()
    except KeyboardInterrupt:
        stopped = "interrupted"
    bar.close()
    table_of_losses = pd.DataFrame(history, columns=["step", "loss", "seconds"]).set_index("step")
    table_of_losses.attrs["stopped"] = stopped
    return Deconvolution(generators.eval(), gate_logits, table_of_losses)


def _counts(data: PerturbationData, rows: np.ndarray) -> Tensor:
    x = data.x[rows]
    return torch.from_numpy(np.asarray(x.toarray() if sp.issparse(x) else x, np.float32))


__all__ = ["Deconvolution", "Generators", "deconvolve", "evidence"]
