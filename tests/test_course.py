"""Latent dynamics: composition of steps against brute force, the continuous form against integrals, the companion paper's special case."""

import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad_vec
from scipy.linalg import expm

from pyrocausal.dynamics.course import Mechanism, distinct, loadings, roll, steps_of

F64 = torch.float64
D, W, P = 3, 2, 4
TIMES = torch.tensor([0.0, 1.0, 3.0, 7.0], dtype=F64)


def mechanism(seed=0, lag=True, free=False):
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, dtype=F64, generator=g)

    return Mechanism(
        instant=0.5 * normal(D, D).triu(1),
        lagged=0.4 * normal(D, D) * lag,
        decay=0.5 + torch.rand(D, dtype=F64, generator=g),
        invariant=normal(W, D),
        mean=normal(D),
        log_var=0.3 * normal(D),
        start=(normal(W, D), normal(D), normal(D, D)),
        cuts=not free,
        mask=torch.ones(P, D, dtype=F64) if free else (torch.rand(P, D, generator=g) < 0.4).to(F64),
        mean_change=normal(P, D),
        log_var_change=0.2 * normal(P, D),
        free=(0.5 * normal(P, D, D).triu(1), 0 * normal(P, D, D), normal(P, W, D)) if free else None,
    )


def courses(seed=0, n=6, holds=True):
    g = torch.Generator().manual_seed(seed)
    held = torch.full((n, len(TIMES), D), math.nan, dtype=F64)
    if holds:
        held[2, 1:, 1], held[3, 2, 0], held[4, 0, 2] = 2.0, -1.0, 0.5
    return torch.rand(n, len(TIMES), P, dtype=F64, generator=g), held


@pytest.mark.parametrize("transition", ["steps", "ou"])
@pytest.mark.parametrize("seed", range(3))
def test_composed_steps_are_the_path(transition, seed):
    """And held programs have their value, exactly, when they are held."""
    course, held = courses(seed)
    steps = steps_of(mechanism(seed), course, held, TIMES, transition)
    w, z = torch.randn(6, W, dtype=F64), torch.randn(6, len(TIMES), D, dtype=F64)
    path = roll(steps, torch.arange(6), w, z)
    A, k = loadings(steps)
    assert (torch.einsum("re,rted->rtd", torch.cat([w, z.flatten(1)], 1), A) + k - path).abs().max() < 1e-12
    assert (path[~held.isnan()] == held[~held.isnan()]).all()


def test_density_of_a_path_step_by_step_and_at_once():
    """log p(u_0, ..., u_T | w): sum over steps, and one dense normal; the equations as written, with no inverse of ours."""
    m, (course, held) = mechanism(), courses(holds=False)
    steps = steps_of(m, course, held, TIMES, "steps")
    w, z = torch.randn(6, W, dtype=F64), torch.randn(6, len(TIMES), D, dtype=F64)
    u = roll(steps, torch.arange(6), w, z)
    by_step = torch.zeros(6, dtype=F64)
    for t in range(len(TIMES)):
        c = course[:, t]
        keep = (1 - c[..., None] * m.mask).prod(-2)
        before = u[:, t - 1] if t else torch.zeros_like(u[:, 0])
        loc = keep * (u[:, t] @ m.instant + before @ m.lagged * (t > 0) + w @ m.invariant + m.mean) + c @ (m.mask * m.mean_change)
        scale = (0.5 * (keep * m.log_var + c @ (m.mask * m.log_var_change))).exp()
        by_step += torch.distributions.Normal(loc, scale).log_prob(u[:, t]).sum(-1)
    A, k = loadings(steps)
    mean = k + torch.einsum("ri,rtid->rtd", w, A[:, :, :W])
    root = A[:, :, W:].permute(0, 2, 1, 3).flatten(2)
    dense = torch.distributions.MultivariateNormal(mean.flatten(1), root.mT @ root)
    assert (dense.log_prob(u.flatten(1)) - by_step).abs().max() < 1e-8


@pytest.mark.parametrize("transition", ["steps", "ou"])
def test_law_at_a_time_against_many_paths(transition):
    """200,000 cells: mean within .02 standard deviations (9 standard errors), covariance within 1 %."""
    course, held = courses(1, 1, holds=False)
    steps = steps_of(mechanism(1), course, held, TIMES, transition)
    g = torch.Generator().manual_seed(0)
    w, z = torch.randn(200_000, W, dtype=F64, generator=g), torch.randn(200_000, len(TIMES), D, dtype=F64, generator=g)
    u = roll(steps, torch.zeros(200_000, dtype=torch.int64), w, z)[:, 3]
    A, k = loadings(steps)
    S = A[0, 3].T @ A[0, 3]
    assert ((u.mean(0) - k[0, 3]) / S.diagonal().sqrt()).abs().max() < 0.02
    assert (torch.cov(u.T) - S).norm() < 0.01 * S.norm()


def test_the_special_case_is_the_companion_paper():
    """One time, no lag, free weights: Normal((w C + mu)(1 - L)^-1, (1 - L)^-T diag(var) (1 - L)^-1), equation 59 of PerturbedVAE."""
    m = mechanism(lag=False, free=True)
    course = torch.eye(P, dtype=F64)[:, None]
    (step,) = steps_of(m, course, torch.full((P, 1, D), math.nan, dtype=F64), TIMES[:1], "steps")
    w = torch.randn(W, dtype=F64)
    for p in range(P):
        back = torch.linalg.inv(torch.eye(D, dtype=F64) - m.instant - m.free[0][p])
        mean = (w @ (m.invariant + m.free[2][p]) + m.mean + m.mean_change[p]) @ back
        covariance = back.T @ torch.diag((m.log_var + m.log_var_change[p]).exp()) @ back
        assert (w @ step.invariant[p] + step.offset[p] - mean).abs().max() < 1e-12
        assert (step.noise[p].T @ step.noise[p] - covariance).abs().max() < 1e-12


def test_continuous_form_against_integrals():
    """One interval: e^{Kd}, its integral, and the integral of e^{K's} D e^{Ks}."""
    m, (course, held) = mechanism(2), courses(2, 1, holds=False)
    step = steps_of(m, course, held, TIMES, "ou")[3]
    keep = (1 - course[0, 3, :, None] * m.mask).prod(0)
    K = (m.lagged * keep - torch.diag(m.decay)).numpy()
    variance = (keep * m.log_var + course[0, 3] @ (m.mask * m.log_var_change)).exp().numpy()
    mu = (keep * m.mean + course[0, 3] @ (m.mask * m.mean_change)).numpy()
    length = float(TIMES[3] - TIMES[2])
    integral = quad_vec(lambda s: expm(K * s), 0, length, epsabs=1e-12)[0]
    noise = quad_vec(lambda s: expm(K * s).T @ np.diag(variance) @ expm(K * s), 0, length, epsabs=1e-12)[0]
    assert np.abs(step.carry[0].numpy() - expm(K * length)).max() < 1e-10
    assert np.abs(step.offset[0].numpy() - mu @ integral).max() < 1e-9
    assert np.abs(step.invariant[0].numpy() - (m.invariant * keep).numpy() @ integral).max() < 1e-9
    assert np.abs((step.noise[0].T @ step.noise[0]).numpy() - noise).max() < 1e-9


def test_equal_courses_share_a_row():
    course, held = courses(0, 6)
    again = [0, 1, 2, 0, 2, 5, 5]
    rows, holds, row = distinct(course[again], held[again])
    assert len(rows) == 4
    assert torch.equal(rows[row], course[again]) and torch.equal(holds[row].nan_to_num(), held[again].nan_to_num())
