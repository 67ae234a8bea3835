"""Trajectories that an exact bijection shows without noise in the programs: their law under any transition, and the noise of a path."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from pyrocausal.dynamics.course import Mechanism, distinct
from pyrocausal.dynamics.nonlinear import Transition, abduct
from pyrocausal.warp import Warp


class WholePath(TorchDistribution):
    """The law of the paths x of n units, event [T + 1, G].

        y_t = warp(x_t) = (w_t, u_t, rest_t),    w = w_0,  w_t ~ Normal(w, sigma^2),  rest_t ~ Normal(0, sigma^2)
        log p(x) = log p(w) + log p(z) - log |du / dz| + log p(w_1 ... w_T | w) + log p(rest) + sum_t log |dy_t / dx_t|

    Args:
        sigma: [G]; that of the programs is not used. course: treatment of each unit, [n, T + 1, P].
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    has_rsample = False

    def __init__(self, mechanism: Mechanism, networks: Transition, warp: Warp, sigma: Tensor, n_invariant: int, course: Tensor) -> None:
        self.mechanism, self.networks, self.warp, self.sigma = mechanism, networks, warp, sigma
        self.n_invariant, self.course = n_invariant, course
        super().__init__(course.shape[:1], torch.Size([course.shape[1], len(sigma)]), validate_args=False)

    @property
    def support(self) -> constraints.Constraint:
        return constraints.independent(constraints.real, 2)

    def abduct(self, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``w`` [n, I] and the noise z [n, T + 1, D] of paths x, and the log-density of x, [n]."""
        n_w, D = self.n_invariant, len(self.mechanism.mean)
        y, log_det = self.warp(value.to(self.course.dtype))
        w, u, rest = y[:, 0, :n_w], y[..., n_w : n_w + D], y[..., n_w + D :]
        rows, _, row = distinct(self.course, torch.full_like(u, math.nan))
        z, slope = abduct(self.mechanism, self.networks, rows, row, w, u)
        off = (y[:, 1:, :n_w] - w.unsqueeze(-2)) / self.sigma[:n_w]
        total = _standard(w, 1) + _standard(z, 2) - slope + log_det.sum(-1)
        total = total + _standard(off, 2) - off.shape[1] * self.sigma[:n_w].log().sum()
        return w, z, total + _standard(rest / self.sigma[n_w + D :], 2) - y.shape[1] * self.sigma[n_w + D :].log().sum()

    def log_prob(self, value: Tensor) -> Tensor:
        return self.abduct(value)[2]


def _standard(value: Tensor, dims: int) -> Tensor:
    """Log-density of independent standard normals, over the last dimensions."""
    each = -0.5 * (value.square() + math.log(2 * math.pi))
    return each.flatten(-dims).sum(-1)


__all__ = ["WholePath"]
