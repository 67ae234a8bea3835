"""The stationary law of linear systems: chart, moments, clamps, transients, and twins, against brute force."""

import math

import numpy as np
import pytest
import torch
from scipy.linalg import expm

import pyrocausal as pc
from pyrocausal.dynamics.lyapunov import lyapunov, spectral_abscissa
from pyrocausal.dynamics.stationary import (
    MeasuredNormal,
    StationaryNormal,
    condition_moments,
    covariance_factor,
    hold,
    stable_drift,
    stationary_mean,
    transient,
)
from pyrocausal.errors import DataError, PyrocausalError
from pyrocausal.loading import moment_batch
from pyrocausal.simulate_sde import linear_sde_screen

D8 = torch.ones(8, dtype=torch.float64)


def system(d=8, seed=0):
    g = torch.Generator().manual_seed(seed)
    M = torch.randn(d, d, generator=g, dtype=torch.float64)
    return M - (spectral_abscissa(M) + 0.5) * torch.eye(d, dtype=M.dtype), torch.randn(d, generator=g, dtype=torch.float64)


def law_of(M, b, D=None):
    D = torch.ones(len(M), dtype=M.dtype) if D is None else D
    return StationaryNormal(stationary_mean(M, b[None]), covariance_factor(M, D), M, D)


@pytest.mark.parametrize("seed", range(3))
def test_the_chart_is_stable_and_has_its_covariance(seed):
    g = torch.Generator().manual_seed(seed)
    L = torch.randn(8, 8, generator=g, dtype=torch.float64).tril(-1) + torch.diag(torch.rand(8, generator=g, dtype=torch.float64) + 0.2)
    Q = torch.randn(8, 8, generator=g, dtype=torch.float64)
    D = torch.rand(8, generator=g, dtype=torch.float64) + 0.1
    M = stable_drift(L, Q - Q.T, D)
    S = L @ L.T
    assert spectral_abscissa(M) < 0
    assert (M.T @ S + S @ M + torch.diag(D)).abs().max() < 1e-8 * M.abs().max()
    assert torch.allclose(lyapunov(M, D), S, rtol=1e-6, atol=1e-8)


def test_every_stable_system_is_in_the_chart():
    M, _ = system()
    S = lyapunov(M, D8)
    Q = -(S @ M) - 0.5 * torch.eye(8)
    assert (Q + Q.T).abs().max() < 1e-10
    assert torch.allclose(stable_drift(torch.linalg.cholesky(S), Q, D8), M, atol=1e-8)


def test_log_prob_and_kl_against_torch():
    M, b = system()
    law = law_of(M, b)
    x = torch.randn(5, 8, dtype=M.dtype)
    ours = law.log_prob(x)
    theirs = torch.distributions.MultivariateNormal(law.loc[0], scale_tril=law.factor).log_prob(x)
    assert torch.allclose(ours, theirs, atol=1e-10)
    q = torch.distributions.Independent(torch.distributions.Normal(x, torch.rand(5, 8, dtype=M.dtype) + 0.1), 1)
    full = torch.distributions.MultivariateNormal(x, torch.diag_embed(q.base_dist.scale**2))
    p = torch.distributions.MultivariateNormal(law.loc[0].expand(5, 8), scale_tril=law.factor)
    assert torch.allclose(torch.distributions.kl_divergence(q, law.expand((5,))), torch.distributions.kl_divergence(full, p), atol=1e-10)


@pytest.mark.parametrize("n_draws", [0, 3])
def test_measured_states_against_torch(n_draws):
    """Law, divergence from the prior and all gradients, by the joint normal law; draws by 400,000 of them (five standard errors)."""
    M, b = system()
    shape = (n_draws, 4, 8) if n_draws else (4, 8)
    a, h, mu = (torch.randn(shape, dtype=M.dtype, requires_grad=True) for _ in range(3))
    chol = law_of(M, b).factor.clone().requires_grad_()
    factor = chol if not n_draws else chol * torch.linspace(1, 2, n_draws, dtype=M.dtype)[:, None, None, None]
    D = torch.ones(8, dtype=M.dtype)
    prior = StationaryNormal(mu, factor, M, D)
    ours = MeasuredNormal(prior, a, h.exp())
    S = factor @ factor.mT
    total = torch.linalg.inv(S) + torch.diag_embed(h.exp())
    rows = (torch.linalg.inv(S) @ mu.unsqueeze(-1)).squeeze(-1) + h.exp() * a
    theirs = torch.distributions.MultivariateNormal(torch.linalg.solve(total, rows), precision_matrix=total)
    flat = torch.distributions.MultivariateNormal(mu, S.expand(*shape, 8))
    x = torch.randn(shape, dtype=M.dtype)
    pairs = [
        (ours.log_prob(x), theirs.log_prob(x)),
        (torch.distributions.kl_divergence(ours, prior), torch.distributions.kl_divergence(theirs, flat)),
        (ours.loc * x, theirs.loc * x),
        (ours.variance * x, theirs.variance * x),
    ]
    for mine, other in pairs:
        assert torch.allclose(mine, other, atol=1e-9)
        gradients = (torch.autograd.grad(v.sum(), (a, h, mu, chol), retain_graph=True, allow_unused=True) for v in (mine, other))
        for g, expected in zip(*gradients, strict=True):
            g, expected = (torch.zeros(()) if v is None else v for v in (g, expected))
            expected = expected.tril() if expected.dim() == 2 else expected
            assert torch.allclose(g.tril() if g.dim() == 2 else g, expected, atol=1e-8)
    torch.manual_seed(0)
    with torch.no_grad():
        draws = ours.expand((2, *ours.batch_shape)).rsample((200_000 // max(n_draws, 1),)).flatten(0, 1) - ours.loc
        found = torch.einsum("s...i,s...j->...ij", draws, draws) / len(draws)
        sd = ours.variance.sqrt()
        error = (found - theirs.covariance_matrix) / (sd.unsqueeze(-1) * sd.unsqueeze(-2)) * (len(draws) / 2) ** 0.5
        assert error.abs().max() < 5 and (draws.mean(0) / sd * len(draws) ** 0.5).abs().max() < 5


@pytest.mark.parametrize("pooled", [True, False])
def test_moments_give_the_likelihood_of_the_cells(pooled):
    adata = linear_sde_screen(n_genes=8, n_perturbed=4, cells_per_perturbation=15, n_control=31, degree=2, seed=1)
    data = pc.PerturbationData.from_anndata(adata, kind="normalised")
    batch = moment_batch(data, pooled)
    M, b = system()
    rows = torch.tensor([list(batch.dose.sum(1)).index(0)])
    assert batch.moments.weight[rows].item() == 31 and batch.moments.weight.sum() == len(data)
    shift = torch.randn(4, 8, dtype=M.dtype)
    factor = covariance_factor(M, D8)
    by_condition = StationaryNormal(stationary_mean(M, b + batch.dose @ shift), factor, M, D8, batch.moments)
    total = by_condition.log_prob(batch.x).sum() * len(data) / len(batch)  # as the plate scales it
    cells = data.batch(dtype=torch.float64)
    brute = StationaryNormal(stationary_mean(M, b + cells.dose @ shift), factor, M, D8).log_prob(cells.x).sum()
    assert abs(total - brute) < 1e-8 * abs(brute)


def test_weights_are_repeated_cells():
    adata = linear_sde_screen(n_genes=4, n_perturbed=2, cells_per_perturbation=10, degree=2, seed=1)
    data = pc.PerturbationData.from_anndata(adata, kind="normalised")
    times = np.random.default_rng(0).integers(1, 4, len(data))
    _, mean, moments, _ = condition_moments(data, weights=torch.tensor(times))
    _, mean_2, moments_2, _ = condition_moments(data[np.repeat(np.arange(len(data)), times)])
    assert (
        torch.allclose(mean, mean_2) and torch.allclose(moments.within, moments_2.within) and torch.equal(moments.weight, moments_2.weight)
    )


def test_a_gene_without_variance_is_refused():
    adata = linear_sde_screen(n_genes=5, n_perturbed=2, cells_per_perturbation=10, degree=2, seed=1)
    adata.X[:, 2] = 1.0
    with pytest.raises(DataError, match="singular"):
        condition_moments(pc.PerturbationData.from_anndata(adata, kind="normalised"))


def test_a_clamp_is_the_reduced_system():
    M, b = system()
    clamp = torch.full((8,), math.nan, dtype=M.dtype)
    clamp[[1, 4]] = torch.tensor([2.0, -1.0], dtype=M.dtype)
    held, free = [1, 4], [0, 2, 3, 5, 6, 7]
    small = M[free][:, free]
    small = small - (spectral_abscissa(small) + 0.4).clamp_min(0) * torch.eye(6)
    M[np.ix_(free, free)] = small  # the reduced system has to be stable
    M2, b2, D2 = hold(M, b, D8, clamp)
    mu = stationary_mean(M2, b2[None])[0]
    brute = -(b[free] + clamp[held] @ M[held][:, free]) @ torch.linalg.inv(small)
    assert torch.allclose(mu[free], brute, atol=1e-9) and torch.equal(mu[held], clamp[held])
    factor = covariance_factor(M2, D2)
    S = factor @ factor.T
    assert torch.allclose(S[free][:, free], lyapunov(small, D8[free]), atol=1e-9)
    assert bool((S[held] == 0).all())
    draws = StationaryNormal(mu[None].expand(7, 8), factor, M2, D2).sample()
    assert torch.equal(draws[:, held], clamp[held].expand(7, 2))


def test_transients_against_the_matrix_exponential():
    M, b = system()
    m0, S0 = torch.randn(8, dtype=M.dtype), torch.eye(8, dtype=M.dtype)
    times = torch.tensor([0.0, 0.3, 2.0, 60.0], dtype=M.dtype)
    mean, covariance = transient(M, b, D8, m0, S0, times)
    assert torch.allclose(mean[0], m0) and torch.allclose(covariance[0], S0)
    assert torch.allclose(mean[-1], stationary_mean(M, b[None])[0], atol=1e-8)
    assert torch.allclose(covariance[-1], lyapunov(M, D8), atol=1e-8)
    big = np.zeros((16, 16))  # van Loan: the integral of e^{M's} D e^{Ms}
    big[:8, :8], big[:8, 8:], big[8:, 8:] = -M.T.numpy(), np.eye(8), M.numpy()
    flow = expm(big * 0.3)
    noise = flow[8:, 8:].T @ flow[:8, 8:]
    step = expm(M.numpy() * 0.3)
    brute_mean = m0.numpy() @ step + b.numpy() @ np.linalg.solve(M.numpy(), step - np.eye(8))
    assert np.abs(mean[1].numpy() - brute_mean).max() < 1e-10
    assert np.abs(covariance[1].numpy() - (step.T @ S0.numpy() @ step + noise)).max() < 1e-10


def test_twins_of_a_shift_move_by_the_mean_and_keep_still_genes():
    M, b = system()
    law = law_of(M, b)
    x = law.expand((50,)).sample()
    moved = law_of(M, b + torch.eye(8, dtype=M.dtype)[2])
    assert torch.allclose(law.carry(x, moved) - x, (moved.loc - law.loc).expand(50, 8), atol=1e-12)
    assert torch.equal(law.carry(x, law_of(M, b)), x)


def test_twins_of_another_system_have_its_law_and_the_joint_law_of_common_noise():
    """False-alarm rate: 72 entries beyond 5 standard errors, 4e-5."""
    M, b = system(6, 3)
    M2 = M.clone()
    M2[0, 3] += 0.4
    M2 = M2 - (spectral_abscissa(M2) + 0.5).clamp_min(0) * torch.eye(6)
    law, new = law_of(M, b), law_of(M2, b)
    n = 40_000
    torch.manual_seed(0)
    x = law.expand((n,)).sample()
    y = law.carry(x, new)
    joint = torch.zeros(12, 12, dtype=M.dtype)
    joint[:6, :6], joint[6:, 6:] = M, M2
    noise = torch.ones(12, 12, dtype=M.dtype) * torch.eye(6, dtype=M.dtype).repeat(2, 2)  # one Brownian motion for both
    S = lyapunov(joint, noise)
    z = torch.cat([x - law.loc, y - new.loc], 1)
    for block in (slice(0, 6), slice(6, 12)):
        got = z[:, block].T @ z[:, 6:] / n
        sd = ((S.diagonal()[block, None] * S.diagonal()[6:] + S[block, 6:] ** 2) / n).sqrt()
        assert bool(((got - S[block, 6:]).abs() < 5 * sd).all())


@pytest.mark.parametrize("growth", [0.5, 1.0, 0.0])
def test_a_system_that_a_clamp_leaves_unstable_is_refused_in_words(growth):
    """Three genes whose middle one holds a runaway one in check: held, it no longer does."""
    M = torch.tensor([[growth, 2.0, 0.0], [-2.0, -3.0, 0.0], [0.0, 0.0, -1.0]], dtype=torch.float64)
    D = torch.ones(3, dtype=torch.float64)
    assert bool((covariance_factor(M, D).diagonal() > 0).all())
    clamp = torch.tensor([math.nan, 0.0, math.nan], dtype=torch.float64)
    held, _, noise = hold(M, torch.zeros(1, 3, dtype=torch.float64), D, clamp)
    with pytest.raises(PyrocausalError, match=r"not stable|no stationary law"):
        covariance_factor(held, noise)
