"""Lyapunov and Sylvester equations by structure-preserving doubling: matrix products only, batched, differentiable.

In the library's row vectors a linear system is ``dx = (x M + b) dt + dW diag(sigma)``, and its stationary covariance S solves

    M' S + S M + D = 0,    D = diag(sigma^2).

With a shift r > 0 the Cayley transform ``F = (M' - r)^-1 (M' + r)`` makes it the discrete equation ``S = G + F S F'``, whose series is
summed by squaring: ``G <- G + F G F'``, ``F <- F F``. For a stable M all eigenvalues of F are inside the unit circle, and the error is
squared in every round. The gradient is one more equation of the same kind (the adjoint), never a derivative of an eigendecomposition.

Source: the doubling of Smith (1968) after the Cayley transform; adjoint by the implicit function theorem.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyrocausal.errors import PyrocausalError

ROUNDS = 40  # of doubling; ten are enough unless the system is nearly unstable


def lyapunov(drift: Tensor, diffusion: Tensor) -> Tensor:
    """The covariance S of ``M' S + S M + D = 0``, [..., d, d].

    Args:
        drift: M, stable (every eigenvalue left of zero), [..., d, d]; entry (j, k) says how j acts on k.
        diffusion: D, symmetric, [..., d, d], or its diagonal [..., d].

    Raises:
        PyrocausalError: if the doubling does not converge, which says that the system is not stable.
    """
    if diffusion.dim() < drift.dim() or diffusion.shape[-2:] != drift.shape[-2:]:
        diffusion = torch.diag_embed(diffusion.expand(*drift.shape[:-2], drift.shape[-1]))
    S = sylvester(drift, drift, diffusion)
    return 0.5 * (S + S.mT)


def sylvester(left: Tensor, right: Tensor, constant: Tensor) -> Tensor:
    """The solution X of ``left' X + X right + constant = 0`` for stable ``left`` and ``right``, [..., d, d].

    For two linear systems that the same noise drives, with ``constant`` its covariance, X is their cross-covariance.

    Raises:
        PyrocausalError: if the doubling does not converge.
    """
    shape = torch.broadcast_shapes(left.shape, right.shape, constant.shape)
    return _Sylvester.apply(left.expand(shape), right.expand(shape), constant.expand(shape))


def spectral_abscissa(drift: Tensor) -> Tensor:
    """The largest real part of an eigenvalue, [...]; below zero for a stable system."""
    return torch.linalg.eigvals(drift.detach()).real.amax(-1)


class _Sylvester(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, left: Tensor, right: Tensor, constant: Tensor) -> Tensor:
        X = _doubling(left, right, constant)
        ctx.save_for_backward(left, right, X)
        return X

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor, Tensor]:
        left, right, X = ctx.saved_tensors
        Y = sylvester(left.mT, right.mT, grads[0])  # left Y + Y right' + dX = 0
        return X @ Y.mT, X.mT @ Y, Y


def _doubling(left: Tensor, right: Tensor, constant: Tensor) -> Tensor:
    eye = torch.eye(left.shape[-1], dtype=left.dtype, device=left.device)
    same = left is right or (left.data_ptr() == right.data_ptr() and left.stride() == right.stride())
    # the geometric mean of the eigenvalues' moduli, of both systems, as the shift
    r = (torch.linalg.slogdet(left)[1] / left.shape[-1]).exp()
    if not same:
        r = (r * (torch.linalg.slogdet(right)[1] / right.shape[-1]).exp()).sqrt()
    r = r[..., None, None]
    A, B = left.mT, right.mT
    lu_a = torch.linalg.lu_factor(A - r * eye)
    F = torch.linalg.lu_solve(*lu_a, A + r * eye)
    if same:
        lu_b, H = lu_a, F
    else:
        lu_b = torch.linalg.lu_factor(B - r * eye)
        H = torch.linalg.lu_solve(*lu_b, B + r * eye)
    X = torch.linalg.lu_solve(*lu_b, torch.linalg.lu_solve(*lu_a, 2 * r * constant).mT).mT
    tolerance = torch.finfo(left.dtype).eps / 4
    for _ in range(ROUNDS):
        step = F @ X @ H.mT
        X = X + step
        size = X.abs().amax()
        if not bool(size < torch.inf):
            break
        if bool((step.abs().amax((-2, -1)) <= tolerance * X.abs().amax((-2, -1))).all()):
            return X
        F = F @ F
        H = F if same else H @ H
    raise PyrocausalError(
        f"a Lyapunov equation of {left.shape[-1]} genes has no solution, because the system is not stable "
        f"(largest real part of an eigenvalue {float(spectral_abscissa(left).max()):.3g}); raise the decay or weaken the edges"
    )
