"""The law of a cell's exogenous state, when what is known is where its programs are.

An encoder finds the programs of a cell, ``u ~ Normal(a, diag v^2)``; the structural equations say what they leave to chance,

    z = u - f(u) graph - shift,

and since that map has a unit triangular Jacobian, ``log q(z) = log q(u)``: abduction and training in one. Under linear equations z is
Gaussian, with mean ``a (I - graph) - shift`` and the variances ``v^2 @ (I - graph)^2`` on the diagonal, whence the closed form

    KL(q(z) || N(0, I)) = 1/2 sum_k (E[z_k^2] - 1) - sum_j log v_j.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import Independent, Normal, constraints
from torch.distributions.kl import register_kl

from pyrocausal.structural import Equations, _times, residual, solve


class Abducted(TorchDistribution):
    """``z`` of cells whose programs are ``u ~ Normal(loc, scale^2)``, event [D].

    Args:
        loc, scale: of u, [..., n, D].
        graph: [D, D], or [S, K, 1, D, D].
        shift: [..., n, D].
        equations: link of the structural equations.
        order: programs from causes to effects, [D], if they are not numbered so.
    """

    arg_constraints: ClassVar = {"loc": constraints.real_vector, "scale": constraints.independent(constraints.positive, 1)}
    support = constraints.real_vector
    has_rsample = True

    def __init__(
        self,
        loc: Tensor,
        scale: Tensor,
        graph: Tensor,
        shift: Tensor,
        equations: Equations = "linear",
        order: Tensor | None = None,
        validate_args: bool | None = None,
    ) -> None:
        shape = torch.broadcast_shapes(
            loc.shape, shift.shape, (*graph.shape[:-2], graph.shape[-1]) if graph.dim() > 2 else graph.shape[-1:]
        )
        self.loc, self.scale, self.shift = loc.expand(shape), scale.expand(shape), shift.expand(shape)
        self.graph = graph
        self.equations = equations
        self.order = order
        self._drawn: tuple[Tensor, Tensor] | None = None
        super().__init__(shape[:-1], shape[-1:], validate_args=validate_args)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        if len(sample_shape):
            raise NotImplementedError("draws of Abducted come from plates, not from a sample_shape")
        u = self.loc + self.scale * torch.randn_like(self.loc)
        z = residual(u, self.graph, self.equations) - self.shift
        self._drawn = z, u
        return z

    def log_prob(self, value: Tensor) -> Tensor:
        """log q(z) = log q(u), [..., n]."""
        if self._drawn is not None and self._drawn[0] is value:
            u = self._drawn[1]
        else:
            u = solve(value + self.shift, self.graph, self.equations, order=self.order)
        return Normal(self.loc, self.scale, validate_args=False).log_prob(u).sum(-1)

    @property
    def mean(self) -> Tensor:
        """Exact for linear equations; otherwise z at the mean of u."""
        return residual(self.loc, self.graph, self.equations) - self.shift

    def second_moment(self) -> Tensor:
        """E[z_k^2], [..., n, D]; exact for linear equations, else of one draw."""
        if self.equations != "linear":
            return self.rsample().square()
        eye = torch.eye(self.graph.shape[-1], dtype=self.graph.dtype, device=self.graph.device)
        return self.mean.square() + _times(self.scale**2, (eye - self.graph) ** 2)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Abducted:
        shape = torch.Size(batch_shape) + self.event_shape
        return Abducted(
            self.loc.expand(shape), self.scale.expand(shape), self.graph, self.shift.expand(shape), self.equations, self.order, False
        )


@register_kl(Abducted, Independent)
def _kl_abducted(q: Abducted, p: Independent) -> Tensor:
    base = p.base_dist
    if q.equations != "linear" or not isinstance(base, Normal) or p.reinterpreted_batch_ndims != 1:
        raise NotImplementedError
    ratio = (q.second_moment() - 2 * base.loc * q.mean + base.loc**2) / base.scale**2
    return (0.5 * (ratio - 1) - q.scale.log() + base.scale.log()).sum(-1)
