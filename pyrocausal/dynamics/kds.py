r"""The kernel deviation from stationarity (KDS): how far cells are from the stationary law of a diffusion, without simulating it.

The generator of ``dx = f(x) dt + diag(sigma(x)) dW`` acts on a test function h as

    (G h)(x) = f(x) . grad h(x) + 1/2 sum_j sigma_j(x)^2 d^2 h / dx_j^2,

and a law p is stationary exactly if ``E_p[G h] = 0`` for all h of a rich enough class. For the unit ball of the reproducing kernel Hilbert
space of k, the largest squared deviation is

    KDS(p) = E_{x, y ~ p} [G_x G_y k(x, y)]  >= 0,

a loss whose minimum over the drift is a diffusion that keeps the cells as they are. Nothing asks the drift to be a gradient: unlike a score
it can have curl, so that with interventions whose targets are known, direction can be learned.

For ``k(x, y) = exp(-|x - y|^2 / (2 l^2))`` both generators have a closed form. With ``r = x - y``, ``c = 1 / l^2``, ``D = sigma(x)^2``,
``E = sigma(y)^2``, ``f = f(x)`` and ``g = f(y)``, products and sums over genes:

    a = -c f.r + 1/2 D.(c^2 r^2 - c)          G_x k = a k
    b = +c g.r + 1/2 E.(c^2 r^2 - c)          G_y k = b k
    G_x G_y k = k [a b + c f.g + c^2 r.(E f - D g) - c^3 (D E).r^2 + c^2/2 D.E]

No derivative is left to take, and all pairs are matrix products.

Source: Lorch, Krause and Schoelkopf 2024 (arXiv 2310.17405); there by automatic differentiation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from pyrocausal.errors import PyrocausalError

Field = Callable[[Tensor], Tensor]
Estimator = Literal["linear", "u", "v"]


def kds(
    x: Tensor, drift: Field, sigma: Tensor | float | Field = 1.0, bandwidth: float | Tensor = 5.0, estimator: Estimator = "linear"
) -> Tensor:
    """Estimate of the KDS of cells x [..., n, d] under a diffusion, [...]; one value for every leading index, such as a condition.

    Differentiable in whatever ``drift`` and ``sigma`` hold; derivatives of the two with respect to x are never needed. A drift and a noise
    that may both shrink to nothing make every law stationary, so fix the time scale: sigma, or the decay of every gene. In a Pyro model
    ``pyro.factor("kds", -weight * kds(...))`` is a penalty, not a likelihood, and needs cells that cannot collapse to please it.

    Args:
        x: independent cells, in the unit of the drift. For ``"linear"`` their order has to be random.
        drift: f, from states [..., n, d] to drifts of that shape (or one that broadcasts to it).
        sigma: noise, a number or anything that broadcasts to [..., n, d], or a function of the states.
        bandwidth: l, in the unit of x; a number, or [...]. 5 is the published default for 20 genes of unit size. Far below the distance
            of neighbouring cells no pair counts, far above all distances little more than mean and covariance are compared.
        estimator: ``"linear"``, pairs i and i + n // 2 (the last cell of an odd number is left out), unbiased, O(n d), noisy; ``"u"``, all
            pairs of different cells, unbiased, O(n^2 d); ``"v"``, all pairs, never negative, biased upwards by O(1 / n). The two unbiased
            ones are negative about half of the time at stationarity: minimise them, never their absolute value.

    Raises:
        PyrocausalError: for an unknown estimator, fewer than two cells, or a bandwidth that is not positive.
    """
    if estimator not in ("linear", "u", "v"):
        raise PyrocausalError(f"estimator={estimator!r} was given; it is one of 'linear', 'u', 'v'")
    if x.dim() < 2 or x.shape[-2] < 2:
        raise PyrocausalError(f"states of shape {tuple(x.shape)} were given; give at least two cells, [..., n, d]")
    if not (bool((bandwidth > 0).all()) if isinstance(bandwidth, Tensor) else bandwidth > 0):
        raise PyrocausalError(f"bandwidth={bandwidth!r} was given; give a positive one")
    width = torch.as_tensor(bandwidth, dtype=x.dtype, device=x.device)
    f = torch.broadcast_to(drift(x), x.shape)
    s = sigma(x) if callable(sigma) else torch.as_tensor(sigma, dtype=x.dtype, device=x.device)
    D = torch.broadcast_to(s.square(), x.shape)
    c, n = width[..., None].pow(-2), x.shape[-2]
    if estimator == "linear":
        half = n // 2
        x, y = x[..., :half, :], x[..., half : 2 * half, :]
        f, g = f[..., :half, :], f[..., half : 2 * half, :]
        D, E = D[..., :half, :], D[..., half : 2 * half, :]
        return _pairs(x, f, D, y, g, E, c).mean(-1)
    h = _all_pairs(x, f, D, c[..., None])
    if estimator == "v":
        return h.mean((-2, -1))
    return (h.sum((-2, -1)) - h.diagonal(dim1=-2, dim2=-1).sum(-1)) / (n * (n - 1))


def _pairs(x: Tensor, f: Tensor, D: Tensor, y: Tensor, g: Tensor, E: Tensor, c: Tensor) -> Tensor:
    """``G_x G_y k`` of cells x with cells y, one by one, [..., n]."""
    r = x - y
    r2 = r.square()
    a = 0.5 * c**2 * (D * r2).sum(-1) - 0.5 * c * D.sum(-1) - c * (f * r).sum(-1)
    b = 0.5 * c**2 * (E * r2).sum(-1) - 0.5 * c * E.sum(-1) + c * (g * r).sum(-1)
    DE = D * E
    rest = c * (f * g).sum(-1) + c**2 * (r * (E * f - D * g)).sum(-1) - c**3 * (DE * r2).sum(-1) + 0.5 * c**2 * DE.sum(-1)
    return torch.exp(-0.5 * c * r2.sum(-1)) * (a * b + rest)


def _all_pairs(x: Tensor, f: Tensor, D: Tensor, c: Tensor) -> Tensor:
    """``G_x G_y k`` of every cell with every cell, [..., n, n]: the sums over genes of :func:`_pairs` as matrix products."""
    x = x - x.mean(-2, keepdim=True)  # only differences matter, and small numbers cancel less
    x2, xD = x.square(), x * D
    square = x2.sum(-1)
    distance = (square[..., :, None] + square[..., None, :] - 2 * x @ x.mT).clamp_min(0)
    Dr2 = (D * x2).sum(-1)[..., :, None] - 2 * xD @ x.mT + D @ x2.mT  # D(x_i) . (x_i - x_j)^2
    fr = (f * x).sum(-1)[..., :, None] - f @ x.mT  # f(x_i) . (x_i - x_j)
    a = 0.5 * c**2 * Dr2 - 0.5 * c * D.sum(-1)[..., :, None] - c * fr
    DE = D @ D.mT
    DEr2 = D @ (D * x2).mT
    DEr2 = DEr2 + DEr2.mT - 2 * xD @ xD.mT
    cross = (x * f) @ D.mT - f @ xD.mT  # r . (E f), and with r -> -r its transpose is -r . (D g)
    rest = c * (f @ f.mT) + c**2 * (cross + cross.mT) - c**3 * DEr2 + 0.5 * c**2 * DE
    return torch.exp(-0.5 * c * distance) * (a * a.mT + rest)
