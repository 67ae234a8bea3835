"""From responses to a causal matrix: the algebra of CLIPR (Lorch et al. 2026, arXiv 2601.15341), and what mends it.

Rows are perturbations, columns genes. A perturbation has an initial response v (the drift at the origin) and a limit response l (where the
noise-free system settles). Under linear drifts ``x M + b + c_q`` they are ``v_q = b + c_q`` and ``l_q = -v_q M^-1``, so that V = -L M and

    M^ = -(L' L + ridge I)^-1 L' V                               entry (j, k): what gene j does to gene k

which is M if the limits span the genes, and M projected on their span otherwise. That is algebra about drifts. A drift that was learned by
matching scores is a gradient field, and for Gaussian cells M^ is then minus their precision matrix, symmetric whatever the truth.

:func:`curl_correct` looks for the rotation that score matching cannot see: with scores s_q it takes the drift to be ``s_q (I + Q)``, Q skew
in units of the noise (it has the same stationary law), and chooses Q so that the perturbations act on their targets alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.sparse.linalg import LinearOperator, lsmr

from pyrocausal.errors import PyrocausalError

Array = NDArray[np.float64]
RIDGES = np.geomspace(1e-5, 3.0, 50)


def linearise(initial: ArrayLike, limit: ArrayLike, ridge: float = 1e-3, rank: int | None = None) -> Array:
    """``-(L' L + ridge I)^-1 L' V``, [d, d]; in its p x p form where there are fewer perturbations than genes (the same matrix).

    Args:
        initial, limit: V and L, [p, d].
        ridge: 0 or less: the pseudo-inverse.
        rank: singular values of L that are kept; all if None.

    Raises:
        PyrocausalError: shapes that differ, values that are not finite, a rank that L cannot have.
    """
    V, L = _pair(initial, limit)
    left, s, right = np.linalg.svd(L, full_matrices=False)
    if rank is not None:
        if not 1 <= rank <= len(s):
            raise PyrocausalError(f"rank={rank} was given for limit responses {L.shape}; it is from 1 to {len(s)}")
        left, s, right = left[:, :rank], s[:rank], right[:rank]
    kept = s > s[0] * max(L.shape) * np.finfo(float).eps
    gain = s / (s**2 + ridge) if ridge > 0 else np.where(kept, 1 / np.maximum(s, 1e-300), 0.0)
    return -(right.T * gain) @ (left.T @ V)


def surrogate(effects: ArrayLike, control_limit: ArrayLike, limit: ArrayLike) -> tuple[Array, Array]:
    """Production of the linear system with drift ``effects``: ``b = -l_0 M`` [d], and ``c_q = -(l_q - l_0) M`` [p, d]."""
    M, l0, L = (np.asarray(a, float) for a in (effects, control_limit, limit))
    return -l0 @ M, -(L - l0) @ M


def curl_correct(shift: ArrayLike, precision: ArrayLike, targets: ArrayLike, damping: float = 1e-6) -> Array:
    """The drift matrix whose perturbations act on target, [d, d], in the scale of a diffusion sqrt(2) (as scores are).

    Minimises ``sum_p |(R_p (I + Q)) off target|^2`` over skew Q, the smallest Q where the targets leave it open; ``M = -K (I + Q)``.

    Args:
        shift: R, score under each perturbation minus that of control cells at the same state, [p, d].
        precision: K, of control cells, symmetric, [d, d]; minus the slope of the score.
        targets: column of the target of each perturbation, [p].
        damping: of the least squares, relative to the size of R.

    Assumes noise of equal size and on-target action; with off-target effects it is wrong, and ``models.LinearLCD`` is the one to fit.
    """
    R, K = np.asarray(shift, float), np.asarray(precision, float)
    p, d = R.shape
    if K.shape != (d, d) or np.shape(targets) != (p,):
        raise PyrocausalError(
            f"shifts {R.shape}, a precision {K.shape} and {np.shape(targets)} targets were given; give [p, d], [d, d], [p]"
        )
    off = np.ones((p, d))
    off[np.arange(p), np.asarray(targets)] = 0
    up = np.triu_indices(d, 1)

    def skew(q: Array) -> Array:
        Q = np.zeros((d, d))
        Q[up] = q
        return Q - Q.T

    def adjoint(y: Array) -> Array:
        G = R.T @ (off * y.reshape(p, d))
        return (G - G.T)[up]

    shape = (p * d, len(up[0]))
    operator = LinearOperator(shape, matvec=lambda q: (off * (R @ skew(q))).ravel(), rmatvec=adjoint, dtype=float)
    scale = float(np.linalg.norm(R)) / np.sqrt(p)
    q = lsmr(operator, -(off * R).ravel(), damp=damping * scale, atol=1e-12, btol=1e-12, conlim=1e12, maxiter=20 * d)[0]
    return -K @ (np.eye(d) + skew(q))


def closed_form(total_effects: ArrayLike, covariance: ArrayLike) -> Array:
    """The drift matrix of a system in which every gene was perturbed on target, by moments alone, [d, d].

    ``E M = -diag(c)`` for the changes E of the means, and ``2 (S M)_kk = -1`` for the sizes c that are not known.

    Args:
        total_effects: E, change of the means when gene j is perturbed in row j, [d, d].
        covariance: S, of cells about the mean of their condition, [d, d]; the noise of each gene is 1.
    """
    inverse = np.linalg.inv(np.asarray(total_effects, float))
    return -inverse / (2 * np.einsum("kj,jk->k", np.asarray(covariance, float), inverse))


@dataclass(frozen=True)
class Diagnostics:
    """How far the limits determine the matrix.

    Attributes:
        ridges: of the L-curve, [50]. residual: ``|V + L M|``, size: ``|M|``, curvature: of log size against log residual, [50] each.
        corner: ridge of the largest curvature. singular_values: of L. effective_rank: exp of the entropy of their shares.
    """

    ridges: Array
    residual: Array
    size: Array
    curvature: Array
    corner: float
    singular_values: Array
    effective_rank: float


def diagnose(initial: ArrayLike, limit: ArrayLike, ridges: ArrayLike = RIDGES) -> Diagnostics:
    """The L-curve (Hansen 1992) and the spectrum of the limits."""
    V, L = _pair(initial, limit)
    lam = np.asarray(ridges, float)
    left, s, _ = np.linalg.svd(L, full_matrices=False)
    coefficient = left.T @ V  # [r, d]
    power = (coefficient**2).sum(1)
    outside = max(float((V**2).sum() - power.sum()), 0.0)
    filtered = s**2 / (s**2 + lam[:, None])
    residual = np.sqrt(((1 - filtered) ** 2 * power).sum(1) + outside)
    size = np.sqrt(((s / (s**2 + lam[:, None])) ** 2 * power).sum(1))
    x, y, t = np.log(np.maximum(residual, 1e-300)), np.log(np.maximum(size, 1e-300)), np.log(lam)
    dx, dy = np.gradient(x, t), np.gradient(y, t)
    ddx, ddy = np.gradient(dx, t), np.gradient(dy, t)
    curvature = (dx * ddy - dy * ddx) / np.maximum((dx**2 + dy**2) ** 1.5, 1e-300)
    inner = curvature[1:-1]
    share = s / max(float(s.sum()), 1e-300)
    share = share[share > 0]
    return Diagnostics(lam, residual, size, curvature, float(lam[1 + np.argmax(inner)]), s, float(np.exp(-(share * np.log(share)).sum())))


def asymmetry(effects: ArrayLike) -> float:
    """``|M - M'| / |M + M'|`` off the diagonal: 0 for a symmetric matrix, which says nothing about direction; about 1 without symmetry."""
    M = np.array(effects, float)
    np.fill_diagonal(M, 0)
    return float(np.linalg.norm(M - M.T)) / max(float(np.linalg.norm(M + M.T)), 1e-300)


def _pair(initial: ArrayLike, limit: ArrayLike) -> tuple[Array, Array]:
    V, L = np.asarray(initial, float), np.asarray(limit, float)
    if V.shape != L.shape or V.ndim != 2:
        raise PyrocausalError(f"initial responses {V.shape} and limit responses {L.shape} were given; give both as [perturbations, genes]")
    if not (np.isfinite(V).all() and np.isfinite(L).all()):
        raise PyrocausalError("the responses have values that are not finite; leave those perturbations out")
    return V, L
