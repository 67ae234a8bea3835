"""Latent dynamics whose transition is a network; the notation is that of :mod:`pyrocausal.dynamics.course`::

    f     = u_{t-1} B + w C + MLP(u_{t-1}, w)           of programs that lose their parents: 0
    u_t   = u_t L + keep f + mu + sd e_t
    e_t   = z_t                                         "mlp": additive noise
    e_t   = e^a sinh((asinh(z_t) + b) e^c)              "flow": its scale, skew and tails follow (u_{t-1}, w); 0 where parents are cut

with z_t standard normal (sinh-arcsinh: Jones and Pewsey 2009; the residual form of Yao et al. 2022, TDRL, with an inverse in closed form).
Nothing precedes the first time: ``u_0 = u_0 L + w C + mu + sd z_0``. The path is a monotone map of each z_t given what came before, so that
the noise of a path is found exactly: :func:`abduct`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pyrocausal.dynamics.course import Gates, Mechanism, _times, gates
from pyrocausal.nn import MLP


class Transition(nn.Module):
    """The networks, zero at first; float64."""

    def __init__(self, n_latent: int, n_invariant: int, noise: bool, n_hidden: int = 64, n_layers: int = 2) -> None:
        super().__init__()
        self.pull = MLP(n_latent + n_invariant, n_latent, n_hidden, n_layers).double()
        self.shape = MLP(n_latent + n_invariant, 3 * n_latent, n_hidden, n_layers).double() if noise else None
        for network in (self.pull, self.shape):
            if network is not None:
                nn.init.zeros_(network.last.weight)
                nn.init.zeros_(network.last.bias)

    def terms(self, g: Gates, row: Tensor, before: Tensor | None, w: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor] | None]:
        """``keep f + mu`` [n, D], and the shape ``(a, b, c)`` of the noise, [n, D] each; None for normal noise."""
        push = g.mu[row] + _times(w, g.invariant[row])
        if before is None:
            return push, None
        both, keep = torch.cat([before, w.expand(*before.shape[:-1], w.shape[-1])], -1), g.keep[row]
        push = push + _times(before, g.lagged[row]) + keep * self.pull(both)
        if self.shape is None:
            return push, None
        a, b, c = (keep * torch.tanh(v) for v in self.shape(both).chunk(3, -1))
        return push, (a, b, c)


def roll(m: Mechanism, net: Transition, course: Tensor, held: Tensor, row: Tensor, w: Tensor, z: Tensor) -> Tensor:
    """Programs of cells at all times, [n, T + 1, D].

    Args:
        course: [R, T + 1, P]. held: [R, T + 1, D], NaN where free. row: course of each cell, [n]. w: [n, I]. z: [n, T + 1, D].
    """
    path: list[Tensor] = []
    for t in range(course.shape[1]):
        g = gates(m, course[:, t], held[:, t])
        path.append(forward(net, g, row, path[-1] if path else None, w, z[:, t]))
    return torch.stack(path, 1)


def forward(net: Transition, g: Gates, row: Tensor, before: Tensor | None, w: Tensor, z: Tensor) -> Tensor:
    push, shape = net.terms(g, row, before, w)
    e = z if shape is None else shape[0].exp() * torch.sinh((torch.asinh(z) + shape[1]) * shape[2].exp())
    eye = torch.eye(z.shape[-1], dtype=z.dtype, device=z.device)
    back = torch.linalg.solve_triangular(eye - g.instant, eye.expand_as(g.instant), upper=True)
    now = _times(push + g.value[row] + g.sd[row] * e, back[row])
    return torch.where(g.free[row] > 0, now, g.value[row])  # exactly


def residual(net: Transition, g: Gates, row: Tensor, before: Tensor | None, w: Tensor, now: Tensor) -> tuple[Tensor, Tensor]:
    """The noise z_t that leads to the programs ``now`` [n, D], and ``log du_t / dz_t`` of each, [n, D]."""
    push, shape = net.terms(g, row, before, w)
    e = (now - _times(now, g.instant[row]) - push) / g.sd[row]
    slope = g.sd[row].log().expand_as(e)
    if shape is None:
        return e, slope
    a, b, c = shape
    v = torch.asinh(e * (-a).exp())
    z = torch.sinh(v * (-c).exp() - b)
    return z, slope + a + c + v.cosh().log() - 0.5 * (1 + z.square()).log()


def abduct(m: Mechanism, net: Transition, course: Tensor, row: Tensor, w: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """The noise of whole paths u [n, T + 1, D]: z, and ``log |du / dz|`` [n]."""
    noise, total = [], torch.zeros_like(u[:, 0, 0])
    free = course.new_full((*course.shape[:1], u.shape[-1]), torch.nan)
    for t in range(course.shape[1]):
        z, slope = residual(net, gates(m, course[:, t], free), row, u[:, t - 1] if t else None, w, u[:, t])
        noise.append(z)
        total = total + slope.sum(-1)
    return torch.stack(noise, 1), total


__all__ = ["Transition", "abduct", "residual", "roll"]
