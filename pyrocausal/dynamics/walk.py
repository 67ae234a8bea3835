"""The posterior of a path under a transition by networks: walked forward, each glimpse combined with what came before it.

A glimpse ``u_t ~ a_t`` of precision v_t says that the noise is ``r_t``, the residual of a_t given the path so far, with precision
``lambda_t = v_t (du/dz)^2``; with the prior Normal(0, 1) that is::

    w ~ Normal(m, s^2),    z_t | z_0 ... z_{t-1}, w ~ Normal(lambda_t r_t / (1 + lambda_t), 1 / (1 + lambda_t))

exact for normal noise and no instantaneous edges; with no glimpse it is the prior.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from pyrocausal.dynamics.course import Mechanism, distinct, gates
from pyrocausal.dynamics.nonlinear import Transition, forward, residual

LEAST, MOST = -15.0, 15.0  # logarithm of lambda


class Walk(TorchDistribution):
    """``q(w, z_0, ..., z_T)``, batch shape [n], event [I + (T + 1) D].

    Args:
        course: [n, T + 1, P]. loc, scale: of w, [n, I].
        value, precision: of the glimpses of u, [n, T + 1, D]; precision 0 where there is none.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    support = constraints.real_vector
    has_rsample = True

    def __init__(
        self, mechanism: Mechanism, net: Transition, course: Tensor, loc: Tensor, scale: Tensor, value: Tensor, precision: Tensor
    ) -> None:
        self.mechanism, self.net, self.course = mechanism, net, course
        self.loc, self.scale, self.value, self.precision = loc, scale, value, precision
        self._drawn: tuple[Tensor, Tensor] | None = None
        super().__init__(loc.shape[:1], torch.Size([loc.shape[1] + value[0].numel()]), validate_args=False)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        if len(sample_shape):
            raise NotImplementedError("draws of Walk come from plates, not from a sample_shape")
        eps = torch.randn(len(self.loc), self.event_shape[0], dtype=self.loc.dtype, device=self.loc.device)
        self._drawn = self._walk(eps, None)
        return self._drawn[0]

    def log_prob(self, value: Tensor) -> Tensor:
        """[n], in nats."""
        if self._drawn is not None and self._drawn[0] is value:
            return self._drawn[1]
        return self._walk(None, value)[1]

    def _walk(self, eps: Tensor | None, given: Tensor | None) -> tuple[Tensor, Tensor]:
        """The state, drawn with standard normal ``eps`` or given, and its log-density."""
        n_w, (T, D) = self.loc.shape[1], self.value.shape[1:]

        def part(x: Tensor, t: int) -> Tensor:
            return x[:, n_w + t * D : n_w + (t + 1) * D]

        w = given[:, :n_w] if given is not None else self.loc + self.scale * eps[:, :n_w]  # type: ignore[index]
        total = _normal(w, self.loc, self.scale)
        rows, held, row = distinct(self.course, torch.full_like(self.value, math.nan))
        out, before = [w], None
        for t in range(T):
            g = gates(self.mechanism, rows[:, t], held[:, t])
            r, slope = residual(self.net, g, row, before, w, self.value[:, t])
            weight = (self.precision[:, t].clamp_min(1e-12).log() + 2 * slope).clamp(LEAST, MOST).exp() * (self.precision[:, t] > 0)
            loc, scale = weight * r / (1 + weight), (1 + weight).rsqrt()
            z = part(given, t) if given is not None else loc + scale * part(eps, t)  # type: ignore[arg-type]
            total = total + _normal(z, loc, scale)
            before = forward(self.net, g, row, before, w, z)
            out.append(z)
        return torch.cat(out, -1) if given is None else given, total


def _normal(x: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
    return (-0.5 * ((x - loc) / scale).square() - scale.log() - 0.5 * math.log(2 * math.pi)).sum(-1)


__all__ = ["Walk"]
