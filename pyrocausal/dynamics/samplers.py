"""Samplers of stochastic differential equations and of score models, for any number of conditions and particles at once.

===========================  =========================================================================================================
:func:`euler_maruyama`       ``x <- x + drift(x) dt + sigma sqrt(dt) xi``: paths of a diffusion
:func:`annealed_langevin`    Langevin steps at falling noise levels (Song and Ermon 2019), as Lorch et al. 2026 (arXiv 2601.15341) sample
:func:`probability_flow`     ``dz / d log sigma = -sigma^2 score``, the noise-free flow with the same marginals (Song et al. 2021)
===========================  =========================================================================================================

A score is called as ``score(z, k)`` with z [..., d] and k the position on the ladder of noise levels, 0 the largest; between two levels k
is a fraction and log sigma linear in it.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from pyrocausal.errors import PyrocausalError

Drift = Callable[[Tensor], Tensor]
Score = Callable[[Tensor, float], Tensor]
COARSE = 0.05  # step times the largest eigenvalue above which the law of the steps is visibly not that of the diffusion


def ladder(n_levels: int = 30, largest: float = 10.0, smallest: float = 0.01, dtype: torch.dtype = torch.float64) -> Tensor:
    """Noise levels in geometric progression from the largest to the smallest, [n_levels].

    Raises:
        PyrocausalError: for fewer than two levels, or levels that do not fall.
    """
    if n_levels < 2 or not 0 < smallest < largest:
        raise PyrocausalError(f"{n_levels} levels from {largest} to {smallest} were asked for; give at least 2, falling and positive")
    return torch.logspace(math.log10(largest), math.log10(smallest), n_levels, dtype=dtype)


@torch.no_grad()
def euler_maruyama(
    drift: Drift,
    x: Tensor,
    dt: float,
    n_steps: int,
    sigma: float | Tensor = 1.0,
    *,
    thin: int = 1,
    burn_in: int = 0,
    matrix: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Paths of ``dx = drift(x) dt + sigma dW``, [n_kept, ..., d].

    Args:
        drift: [..., d] -> [..., d].
        x: where the particles start, [..., d].
        n_steps: after the burn-in; every ``thin``-th is kept.
        sigma: a number or [d].
        matrix: M of a linear drift ``x M + b``, if known: the step is checked against its eigenvalues.

    Raises:
        PyrocausalError: if the steps would diverge although the system is stable, or an argument is out of range.
    """
    if dt <= 0 or n_steps < 1 or thin < 1 or burn_in < 0:
        raise PyrocausalError(
            f"dt={dt}, n_steps={n_steps}, thin={thin}, burn_in={burn_in} were given; steps are positive, burn-in not below 0"
        )
    if matrix is not None:
        _check_step(matrix, dt)
    size = sigma * math.sqrt(dt)
    kept = []
    for step in range(1, burn_in + n_steps + 1):
        x = x + drift(x) * dt + size * torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
        if step > burn_in and (step - burn_in) % thin == 0:
            kept.append(x)
    return torch.stack(kept) if kept else x.new_empty((0, *x.shape))


def _check_step(matrix: Tensor, dt: float) -> None:
    """A step that diverges is refused; one that is coarse is said."""
    eigenvalues = torch.linalg.eigvals(matrix.double())
    if bool((eigenvalues.real < 0).all()):
        longest = float((-2 * eigenvalues.real / eigenvalues.abs().square()).min())  # |1 + dt lambda| = 1
        if dt >= longest:
            raise PyrocausalError(f"dt={dt} was given, with which the steps diverge; give less than {longest:.3g}")
    stiff = float(eigenvalues.abs().max())
    if dt * stiff > COARSE:
        warnings.warn(
            f"dt={dt} is coarse for a largest eigenvalue of {stiff:.3g}: covariances are off by about {50 * dt * stiff:.0f} % or more; "
            f"{COARSE / stiff:.2g} is fine",
            RuntimeWarning,
            stacklevel=3,
        )


def annealed_langevin(
    score: Score,
    z: Tensor,
    sigmas: Tensor,
    n_steps: int = 500,
    *,
    step: float = 0.01,
    noise: bool = True,
    generator: torch.Generator | None = None,
) -> Tensor:
    """``z <- z + a_k score(z, k) + sqrt(2 a_k) xi``, ``n_steps`` times at each level, ``a_k = step sigma_k^2``; [..., d].

    The published steps are ``1e-6 (sigma_k / 0.01)^2``, which is ``step=0.01``; fewer steps with ``step`` raised in proportion cover the
    same time, and for a noise-free run (``noise=False``, the limit response) come to the same point.

    Args:
        z: where the particles start, [..., d]. sigmas: the ladder, falling, [n_levels].
    """
    if n_steps < 1 or step <= 0:
        raise PyrocausalError(f"n_steps={n_steps} and step={step} were given; both are positive")
    with torch.no_grad():
        for k, sigma in enumerate(sigmas.tolist()):
            a = step * sigma**2
            for _ in range(n_steps):
                z = z + a * score(z, float(k))
                if noise:
                    z = z + math.sqrt(2 * a) * torch.randn(z.shape, generator=generator, dtype=z.dtype, device=z.device)
    return z


def probability_flow(score: Score, z: Tensor, sigmas: Tensor, *, subdivide: int = 1, denoise: bool = False) -> Tensor:
    """The flow from one end of the ladder to the other, in steps of log sigma between neighbouring levels; [..., d].

    With the mean of the clean state ``D = z + sigma^2 score``, of which the steps before and now tell the slope, one score for each::

        dz / d log sigma = z - D,    z <- e^h z + (1 - e^h) (D + h / (2 h') (D - D')),    h = change of log sigma

    Second order, and exact where D does not change; differentiable. Source: Lu et al. 2022 (arXiv 2211.01095), DPM-Solver++ (2M).

    Args:
        z: particles at the first level, of standard deviation ``sqrt(sd^2 + sigma_0^2)``, [..., d].
        subdivide: steps between two levels, for scores that know fractions of a level.
        denoise: end with the mean of the clean state given z at the last level.
    """
    if subdivide < 1:
        raise PyrocausalError(f"subdivide={subdivide} was given; give 1 step between two levels at least")
    log_sigma = sigmas.double().log().tolist()
    last = len(log_sigma) - 1
    before: tuple[Tensor, float] | None = None
    for i in range(last * subdivide):
        low = i // subdivide
        h = (log_sigma[low + 1] - log_sigma[low]) / subdivide
        clean = _clean(score, z, i / subdivide, log_sigma[low] + (i - low * subdivide) * h)
        ahead = clean if before is None else clean + h / (2 * before[1]) * (clean - before[0])
        z, before = math.exp(h) * z - math.expm1(h) * ahead, (clean, h)
    return _clean(score, z, float(last), log_sigma[-1]) if denoise else z


def _clean(score: Score, z: Tensor, k: float, log_sigma: float) -> Tensor:
    return z + math.exp(2 * log_sigma) * score(z, k)


__all__ = ["annealed_langevin", "euler_maruyama", "ladder", "probability_flow"]
