"""The two costs that SCCVAE adds to a training step, against straightforward versions: the discrepancy and the solution of the graph.

    python benchmarks/discrepancy.py [--rounds 15] [--genes 8563]

One thread, float32, process CPU time, both variants in every round, ratio per round, median over the rounds. Both must give the same
numbers, gradients included (checked). Limits are in milliseconds of the median. First a block of the size of a hidden layer's gradient is
freed, as in any step of a model: before that the C library hands every few MiB back to the system, and asking again costs 1 to 2 ms a step.

- discrepancy: V-statistic of 32 v 32 cells, ten bandwidths, forward and backward to the generated cells, against the differences of all
  pairs written out, [64, 64, n_genes];
- graph: ``u = e (I - A)^-1`` for 512 nodes and 32 cells, a unit-triangular solve against the dense inverse.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from pyrocausal.discrepancy import TRAINING_BANDWIDTHS, mmd

N_CELLS, N_NODES = 32, 512
Step = Callable[[], list[Tensor]]


def by_broadcasting(x: Tensor, y: Tensor) -> Tensor:
    """The V-statistic from all differences."""
    z, n = torch.cat([x, y]), len(x)
    distance = (z[:, None] - z[None]).square().sum(-1)
    kernel = torch.stack([torch.exp(-distance / h) for h in TRAINING_BANDWIDTHS]).sum(0)
    return (kernel[:n, :n] + kernel[n:, n:] - kernel[:n, n:] - kernel[n:, :n]).mean()


def discrepancies(n_genes: int) -> tuple[Step, Step]:
    """Ours and the other: value [] and gradient [n_cells, n_genes] with respect to the generated cells."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.poisson(torch.full((N_CELLS, n_genes), 0.3), generator=generator).log1p() for _ in range(2))
    x.mul_(0.9).requires_grad_()

    def step(f: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
        value = f(x, y)
        return [value.detach(), *torch.autograd.grad(value, x)]

    return lambda: step(lambda a, b: mmd(a, b, TRAINING_BANDWIDTHS, unbiased=False)), lambda: step(by_broadcasting)


def graphs(backward: bool) -> tuple[Step, Step]:
    """Ours and the other: states [n_cells, n_nodes], and with ``backward`` the gradients of their mean square for noise and graph."""
    generator = torch.Generator().manual_seed(0)
    graph = (torch.randn(N_NODES, N_NODES, generator=generator) / N_NODES**0.5).triu(1).requires_grad_(backward)
    e = torch.randn(N_CELLS, N_NODES, generator=generator).requires_grad_(backward)
    eye = torch.eye(N_NODES)

    def step(f: Callable[[Tensor], Tensor]) -> list[Tensor]:
        u = f(eye - graph)
        if not backward:
            return [u]
        noise, weights = torch.autograd.grad(u.square().mean(), (e, graph))
        return [u.detach(), noise, weights.triu(1)]

    return (
        lambda: step(lambda a: torch.linalg.solve_triangular(a, e, upper=True, left=False, unitriangular=True)),
        lambda: step(lambda a: e @ torch.inverse(a)),
    )


def check_same(ours: list[Tensor], other: list[Tensor]) -> float:
    """Largest difference relative to the largest value, over what the two return; refused above what float32 explains."""
    worst = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(ours, other, strict=True))
    if not worst < 1e-3:
        raise SystemExit(f"the two are not the same: they differ by {worst:.1e}")
    return worst


def measure(steps: tuple[Step, Step], repeats: tuple[int, int], rounds: int) -> tuple[list[float], list[float]]:
    """CPU milliseconds of each in each round, every other round in reversed order; one round to warm up."""
    times: tuple[list[float], list[float]] = ([], [])
    for i in range(rounds + 1):
        for k in (0, 1) if i % 2 else (1, 0):
            start = time.process_time()
            for _ in range(repeats[k]):
                steps[k]()
            if i > 0:
                times[k].append(1e3 * (time.process_time() - start) / repeats[k])
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--genes", type=int, default=8563)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.empty(1024, 1024)  # freed at once
    print(f"torch {torch.__version__}, {N_CELLS} v {N_CELLS} cells, {arguments.genes} genes, {N_NODES} nodes, {arguments.rounds} rounds")
    print(f"{'':34s}{'ms':>6s}  {'other':>7s}  {'ratio':>6s}  {'[range]':16s}  difference  limit")
    rows: list[tuple[str, tuple[Step, Step], tuple[int, int], float | None]] = [
        ("discrepancy, forward and backward", discrepancies(arguments.genes), (10, 1), 5.0),
        ("graph, solve", graphs(backward=False), (50, 5), 1.0),
        ("graph, solve and gradients", graphs(backward=True), (20, 5), None),
    ]
    good = True
    for what, steps, repeats, limit in rows:
        difference = check_same(steps[0](), steps[1]())
        ours, other = measure(steps, repeats, arguments.rounds)
        ratios = [b / a for a, b in zip(ours, other, strict=True)]
        mine, others = statistics.median(ours), statistics.median(other)
        met = limit is None or mine <= limit
        good &= met
        ratio = f"{statistics.median(ratios):6.1f}  {f'[{min(ratios):.1f}, {max(ratios):.1f}]':16s}"
        goal = "" if limit is None else f"<= {limit:g} ms {'met' if met else 'MISSED'}"
        print(f"{what:34s}{mine:6.2f}  {others:7.2f}  {ratio}  {difference:10.0e}  {goal}", flush=True)
    print("every limit met" if good else "a limit was MISSED")


if __name__ == "__main__":
    main()
