"""Samplers against exact laws: the discrete Lyapunov equation, Gaussian closed forms, known orders of convergence."""

from __future__ import annotations

import math
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.linalg import solve_discrete_lyapunov
from torch import Tensor

from pyrocausal.dynamics.lyapunov import lyapunov
from pyrocausal.dynamics.samplers import annealed_langevin, euler_maruyama, ladder, probability_flow
from pyrocausal.errors import PyrocausalError
from pyrocausal.simulate_sde import linear_sde_screen

torch.set_num_threads(1)
F64 = torch.float64


def system(d: int, degree: int, seed: int) -> tuple[Tensor, Tensor]:
    """Drift and stationary covariance."""
    truth = linear_sde_screen(d, 1, degree=degree, cells_per_perturbation=1, seed=seed).uns["truth"]
    return torch.from_numpy(truth["drift"]), torch.from_numpy(truth["covariance"])


def steps_covariance(M: Tensor, dt: float) -> Tensor:
    """Exact stationary covariance of the Euler-Maruyama steps: ``C = F' C F + dt I``, ``F = I + dt M``."""
    F = torch.eye(len(M), dtype=F64) + dt * M
    return torch.from_numpy(solve_discrete_lyapunov(F.numpy().T, dt * np.eye(len(M))))


def off(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize(("d", "degree"), [(30, 5), (100, 10)])
def test_law_of_the_steps_nears_the_stationary_law(d: int, degree: int) -> None:
    """In proportion to dt; at dt = .001 the distance is below .02 for 30 and .04 for 100 genes."""
    for seed in range(3):
        M, S = system(d, degree, seed)
        torch.testing.assert_close(lyapunov(M, torch.ones(d, dtype=F64)), S, rtol=1e-8, atol=1e-10)
        distance = [off(steps_covariance(M, dt), S) for dt in (0.01, 0.003, 0.001)]
        assert abs(distance[0] / distance[1] - 10 / 3) < 0.5 and abs(distance[1] / distance[2] - 3) < 0.3
        assert distance[2] < (0.02 if d == 30 else 0.04)


def test_steps_have_their_exact_covariance_not_that_of_the_diffusion() -> None:
    """A turning system: with dt = .01 the variance is 1.338, not 1. 40,000 particles: standard error of a variance .0095, allowed 4.5."""
    M = torch.tensor([[-0.5, 5.0], [-5.0, -0.5]], dtype=F64)
    C = steps_covariance(M, 0.01)
    assert abs(float(C[0, 0]) - 0.01 / (1 - 0.995**2 - 0.05**2)) < 1e-10
    g = torch.Generator().manual_seed(0)
    with pytest.warns(RuntimeWarning, match="coarse"):
        path = euler_maruyama(lambda y: y @ M, torch.zeros(40_000, 2, dtype=F64), 0.01, 4, burn_in=1200, thin=4, matrix=M, generator=g)
    assert path.shape == (1, 40_000, 2)
    assert float((torch.cov(path[-1].T) - C).abs().max()) < 4.5 * 1.338 * math.sqrt(2 / 40_000)


def test_every_kept_state_has_the_covariance_of_its_step() -> None:
    """``C <- F' C F + dt diag(sigma^2)`` from zero, 30 genes; relative error of 20,000 particles about .04, allowed twice that."""
    M, _ = system(30, 5, 0)
    dt, sigma = 0.004, torch.linspace(0.5, 2.0, 30, dtype=F64)
    g = torch.Generator().manual_seed(2)
    path = euler_maruyama(lambda y: y @ M, torch.zeros(20_000, 30, dtype=F64), dt, 100, sigma, burn_in=20, thin=50, matrix=M, generator=g)
    assert path.shape == (2, 20_000, 30)
    F, C, exact = torch.eye(30, dtype=F64) + dt * M, torch.zeros(30, 30, dtype=F64), {}
    for n in range(1, 121):
        C = F.T @ C @ F + dt * torch.diag(sigma**2)
        exact[n] = C
    for kept, n in zip(path, (70, 120), strict=True):
        assert off(torch.cov(kept.T), exact[n]) < 0.08
        assert off(torch.cov(kept.T), exact[n + (50 if n == 70 else -50)]) > 0.16


def test_same_generator_same_path_and_no_global_state() -> None:
    before = torch.random.get_rng_state()
    paths = [euler_maruyama(lambda y: -y, torch.zeros(4, 2), 0.1, 5, generator=torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(*paths) and torch.equal(before, torch.random.get_rng_state())


def test_diverging_steps_are_refused() -> None:
    M = torch.tensor([[-0.5, 10.0], [-10.0, -0.5]], dtype=F64)  # |1 + dt lambda| = 1 at dt = 1 / 100.25
    with pytest.raises(PyrocausalError, match=r"diverge; give less than 0\.00998"):
        euler_maruyama(lambda y: y @ M, torch.zeros(1, 2, dtype=F64), 0.0101, 1, matrix=M)
    with pytest.raises(PyrocausalError, match="dt=0"):
        euler_maruyama(lambda y: y, torch.zeros(1, 2), 0, 1)


# -- Gaussian data: score of Normal(m, V) at noise sigma is -(V + sigma^2 I)^-1 (z - m) ------------------------------------------


SIGMAS = ladder()
MEAN = torch.tensor([[1.0, -2.0], [0.5, 3.0]], dtype=F64)[:, None]  # two conditions
V = torch.tensor([[1.0, 0.6], [0.6, 0.5]], dtype=F64)


def sigma_at(k: float) -> float:
    return 10.0 * 1e-3 ** (k / 29)


def gaussian(z: Tensor, k: float) -> Tensor:
    return torch.linalg.solve(V + sigma_at(k) ** 2 * torch.eye(2, dtype=F64), (MEAN - z).mT).mT


def root(sigma: float) -> Tensor:
    """Square root of ``V + sigma^2 I``."""
    values, vectors = torch.linalg.eigh(V)
    return vectors @ torch.diag((values + sigma**2).sqrt()) @ vectors.T


def test_ladder_is_geometric() -> None:
    assert SIGMAS[0] == 10 and len(SIGMAS) == 30
    torch.testing.assert_close(SIGMAS[-1], torch.tensor(0.01, dtype=F64))
    torch.testing.assert_close(SIGMAS[1:] / SIGMAS[:-1], torch.full((29,), 1e-3 ** (1 / 29), dtype=F64))
    with pytest.raises(PyrocausalError, match="falling"):
        ladder(5, 0.1, 1.0)


@pytest.mark.parametrize("back", [False, True])
def test_flow_is_the_closed_form_and_of_its_order(back: bool) -> None:
    """``z_T - m`` is multiplied by ``(V + s0^2)^1/2 (V + sT^2)^-1/2``, or back; halving the steps divides the error by 4."""
    z = torch.randn(2, 50, 2, dtype=F64, generator=torch.Generator().manual_seed(0)) * 10 + MEAN
    exact = MEAN + (z - MEAN) @ torch.linalg.solve(root(10.0), root(0.01))
    if back:
        z, exact = exact, z
        flow = partial(probability_flow, lambda z, k: gaussian(z, 29 - k), z, SIGMAS.flip(0))
    else:
        flow = partial(probability_flow, gaussian, z, SIGMAS)
    errors = [off(flow(subdivide=n), exact) for n in (1, 2, 4, 8)]
    assert errors[0] < 0.005
    assert all(abs(a / b - 4) < 0.5 for a, b in list(pairwise(errors))[1:])


def test_denoised_end_is_the_conditional_mean() -> None:
    z = torch.randn(2, 5, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    end, mean = probability_flow(gaussian, z, SIGMAS), probability_flow(gaussian, z, SIGMAS, denoise=True)
    torch.testing.assert_close(mean, end + 1e-4 * gaussian(end, 29.0))


def test_noise_free_langevin_settles_at_the_mode() -> None:
    """The closed form of every level: ``m + (z - m) (I - step sigma^2 (V + sigma^2)^-1)^n``; 60 long steps end where 500 short ones do."""
    z = torch.zeros(2, 1, 2, dtype=F64)
    end = annealed_langevin(gaussian, z, SIGMAS, 500, noise=False)
    values, vectors = torch.linalg.eigh(V)
    left = torch.ones(2, dtype=F64)
    for sigma in SIGMAS.tolist():
        left = left * (1 - 0.01 * sigma**2 / (values + sigma**2)) ** 500
    torch.testing.assert_close(end, MEAN + (z - MEAN) @ (vectors @ torch.diag(left) @ vectors.T), rtol=1e-9, atol=1e-12)
    assert float((end - MEAN).abs().max()) < 1e-6
    short = annealed_langevin(gaussian, z, SIGMAS, 60, step=0.01 * 500 / 60, noise=False)
    torch.testing.assert_close(short, end, rtol=0, atol=1e-6)


def test_langevin_samples_the_conditions() -> None:
    """4,000 particles of two conditions in one call, against the exact law of the steps, within 4.5 standard errors (false alarms < 1e-3).

    In the eigenbasis the variance follows ``c <- (1 - a / (v + sigma^2))^2 c + 2 a``; few steps end above v, many at it.
    """
    g = torch.Generator().manual_seed(5)
    z = torch.randn(2, 4000, 2, dtype=F64, generator=g)
    out = annealed_langevin(gaussian, z, SIGMAS, 40, step=0.05, generator=g)
    values, vectors = torch.linalg.eigh(V)
    c = torch.ones(2, dtype=F64)
    for sigma in SIGMAS.tolist():
        a = 0.05 * sigma**2
        for _ in range(40):
            c = (1 - a / (values + sigma**2)) ** 2 * c + 2 * a
    assert float((c / values).max()) > 1.1
    centred = (out - MEAN) @ vectors / c.sqrt()
    assert float(centred.mean(1).abs().max()) < 4.5 / math.sqrt(4000)
    for each in centred:
        assert float((torch.cov(each.T) - torch.eye(2)).abs().max()) < 4.5 * math.sqrt(2 / 4000)
