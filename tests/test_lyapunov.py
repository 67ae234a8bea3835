"""Lyapunov and Sylvester equations: residuals, scipy, gradients, and what is refused."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import solve_continuous_lyapunov

from pyrocausal.dynamics.lyapunov import ROUNDS, lyapunov, spectral_abscissa, sylvester
from pyrocausal.errors import PyrocausalError
from pyrocausal.simulate_sde import linear_sde_screen


def stable(d, seed, margin=0.3):
    rng = np.random.default_rng(seed)
    M = torch.tensor(rng.standard_normal((d, d)))
    return M - (spectral_abscissa(M) + margin) * torch.eye(d, dtype=M.dtype)


@pytest.mark.parametrize("d", [30, 100, 300])
def test_residual_on_the_published_systems(d):
    M = torch.tensor(linear_sde_screen(n_genes=d, n_perturbed=2, cells_per_perturbation=2, seed=d).uns["truth"]["drift"])
    S = lyapunov(M, torch.ones(d, dtype=M.dtype))
    residual = M.T @ S + S @ M + torch.eye(d)
    assert residual.norm() / d**0.5 < 1e-10
    assert torch.equal(S, S.T)
    assert np.abs(S.numpy() - solve_continuous_lyapunov(M.T.numpy(), -np.eye(d))).max() < 1e-10


def test_ten_rounds_are_enough(monkeypatch):
    M = torch.tensor(linear_sde_screen(n_genes=100, n_perturbed=2, cells_per_perturbation=2, seed=3).uns["truth"]["drift"])
    monkeypatch.setattr("pyrocausal.dynamics.lyapunov.ROUNDS", 10)
    lyapunov(M, torch.ones(100, dtype=M.dtype))
    assert ROUNDS > 10


@settings(max_examples=20, deadline=None)
@given(d=st.integers(1, 8), seed=st.integers(0, 1000))
def test_against_the_kronecker_system(d, seed):
    A, B = stable(d, seed), stable(d, seed + 1)
    Q = torch.tensor(np.random.default_rng(seed + 2).standard_normal((d, d)))
    eye = torch.eye(d, dtype=A.dtype)
    big = torch.kron(A.T.contiguous(), eye) + torch.kron(eye, B.T.contiguous())  # of A' X + X B, rows of X one after the other
    brute = torch.linalg.solve(big, -Q.reshape(-1)).reshape(d, d)
    X = sylvester(A, B, Q)
    assert (X - brute).abs().max() < 1e-9 * (1 + brute.abs().max())


def test_batches_and_diagonals():
    M = torch.stack([stable(5, s) for s in range(6)]).reshape(2, 3, 5, 5)
    D = torch.rand(2, 3, 5, dtype=M.dtype) + 0.1
    S = lyapunov(M, D)
    for i in range(2):
        for j in range(3):
            assert torch.allclose(S[i, j], lyapunov(M[i, j], torch.diag(D[i, j])), atol=1e-12)


def test_gradients_and_second_derivatives():
    M = stable(6, 0).requires_grad_()
    D = (torch.rand(6, dtype=M.dtype) + 0.5).requires_grad_()
    assert torch.autograd.gradcheck(lyapunov, (M, D))
    assert torch.autograd.gradgradcheck(lyapunov, (M, D))
    N = stable(4, 1).requires_grad_()
    Q = torch.randn(4, 4, dtype=N.dtype).requires_grad_()
    assert torch.autograd.gradcheck(sylvester, (N, stable(4, 2).requires_grad_(), Q))


def test_an_unstable_system_is_refused():
    M = torch.diag(torch.tensor([-1.0, 0.2], dtype=torch.float64))
    with pytest.raises(PyrocausalError, match=r"not stable.*0\.2"):
        lyapunov(M, torch.ones(2, dtype=M.dtype))


def test_float32_is_solved_to_its_precision():
    M = stable(20, 5).float()
    S = lyapunov(M, torch.ones(20))
    exact = lyapunov(M.double(), torch.ones(20, dtype=torch.float64))
    assert (S - exact).abs().max() < 1e-4 * exact.abs().max()
