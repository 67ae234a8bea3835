"""One training step of the published SCCVAE against itself with a dense inverse and a discrepancy written out.

    python benchmarks/sccvae_step.py [--rounds 7] [--genes 8563]

512 nodes, hidden layers of 1,024, 32 cells of one perturbation and 32 control cells, float32, loss, gradients and Adam; one thread, process
CPU time, both in every round, ratio per round, median over the rounds. Both start from the same weights and must give the same loss.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from unittest.mock import patch

import torch
from torch import Tensor

import pyrocausal as pc
from pyrocausal.discrepancy import TRAINING_BANDWIDTHS
from pyrocausal.loading import Batch
from pyrocausal.models import sccvae

N_CELLS, N_NODES = 32, 512


def dense_solve(e: Tensor, graph: Tensor, *_: object, **__: object) -> Tensor:
    """u = e (I - A)^-1, by the inverse."""
    return e @ torch.inverse(torch.eye(len(graph)) - graph)


def written_out(x: Tensor, y: Tensor, *_: object, **__: object) -> Tensor:
    """The V-statistic from all differences, [64, 64, n_genes]."""
    z, n = torch.cat([x, y]), len(x)
    distance = (z[:, None] - z[None]).square().sum(-1)
    kernel = sum(torch.exp(-distance / h) for h in TRAINING_BANDWIDTHS)
    return (kernel[:n, :n] + kernel[n:, n:] - kernel[:n, n:] - kernel[n:, :n]).mean()


def step_of(n_genes: int, straightforward: bool) -> Callable[[], float]:
    """A step that returns its loss."""
    x = (torch.rand(2 * N_CELLS, n_genes, generator=torch.Generator().manual_seed(0)) < 0.2).float()
    one, zeros = torch.ones(N_CELLS, 1), torch.zeros(N_CELLS, dtype=torch.int64)
    batch = Batch(x[:N_CELLS], one, one, zeros, None, torch.arange(N_CELLS), N_CELLS, partner=x[N_CELLS:])
    torch.manual_seed(0)
    model, guide = pc.models.SCCVAEParity(n_genes, 1, n_latent=N_NODES), pc.guides.SCCVAEParity(n_genes, n_latent=N_NODES)
    loss = pc.ELBO()(model, guide)
    optimiser = torch.optim.Adam(loss.parameters(), lr=1e-5, fused=True)

    def step() -> float:
        torch.manual_seed(1)
        with patch.multiple(sccvae, solve=dense_solve, mmd=written_out) if straightforward else nullcontext():
            value = loss(batch)
        optimiser.zero_grad()
        value.backward()
        optimiser.step()
        return float(value.detach())

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--genes", type=int, default=8563)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    steps = {name: step_of(arguments.genes, name == "straightforward") for name in ("ours", "straightforward")}
    first = {name: step() for name, step in steps.items()}
    if abs(first["ours"] - first["straightforward"]) > 1e-4 * abs(first["ours"]):
        raise SystemExit(f"the two are not the same step: {first}")
    times: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(arguments.rounds):
        for name in steps if i % 2 else reversed(list(steps)):
            start = time.process_time()
            steps[name]()
            times[name].append(1e3 * (time.process_time() - start))
    ratios = [b / a for a, b in zip(times["ours"], times["straightforward"], strict=True)]
    ours, other = (statistics.median(t) for t in times.values())
    print(f"torch {torch.__version__}, {arguments.genes} genes, {N_NODES} nodes, {N_CELLS} cells, {arguments.rounds} rounds, CPU ms")
    print(
        f"step {ours:.0f} ms, straightforward {other:.0f} ms, ratio {statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]"
    )


if __name__ == "__main__":
    main()
