"""The kernel deviation from stationarity: closed form against nested automatic differentiation, zero where it has to be, what it learns.

Statistical checks compare the mean over blocks of cells with its standard error: a correct loss fails one with probability 1e-4 (``Z``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pyrocausal.dynamics.kds import kds
from pyrocausal.errors import PyrocausalError
from pyrocausal.graph_metrics import graph_scores
from pyrocausal.simulate_sde import linear_sde_screen

Z = 3.9
Field = Callable[[Tensor], Tensor]


def brute(x: Tensor, drift: Field, sigma: Field, bandwidth: float, estimator: str) -> Tensor:
    """G_x G_y k of every pair of cells x [n, d] by derivatives of derivatives, then the estimator by its definition."""

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return torch.exp(-(a - b).square().sum() / (2 * bandwidth**2))

    def generator(h: Callable[[Tensor, Tensor], Tensor], which: int) -> Callable[[Tensor, Tensor], Tensor]:
        def applied(a: Tensor, b: Tensor) -> Tensor:
            here = (a, b)[which]
            gradient = torch.func.grad(h, which)(a, b)
            curvature = torch.func.hessian(h, which)(a, b)
            return drift(here) @ gradient + 0.5 * (sigma(here).square() * curvature.diagonal()).sum()

        return applied

    f = generator(generator(kernel, 0), 1)
    n = len(x)
    if estimator == "linear":
        return torch.stack([f(x[i], x[i + n // 2]) for i in range(n // 2)]).mean()
    table = torch.stack([torch.stack([f(x[i], x[j]) for j in range(n)]) for i in range(n)])
    if estimator == "v":
        return table.mean()
    return torch.stack([table[i, j] for i in range(n) for j in range(n) if i != j]).mean()


def fields(d: int, seed: int) -> tuple[Field, Field, list[Tensor]]:
    """A non-linear drift and a noise that depends on the state, with their parameters."""
    g = torch.Generator().manual_seed(seed)
    M, b, w = (torch.randn(s, generator=g, dtype=torch.float64).requires_grad_() for s in ((d, d), (d,), (d, d)))
    return (lambda x: torch.tanh(x @ M) - x + b), (lambda x: 0.5 + torch.sigmoid(x @ w)), [M, b, w]


@pytest.mark.parametrize("bandwidth", [0.7, 3.0])
@pytest.mark.parametrize("estimator", ["linear", "u", "v"])
def test_closed_form_is_the_generator_twice(estimator: Any, bandwidth: float) -> None:
    drift, sigma, parameters = fields(3, 0)
    x = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 2
    got = kds(x, drift, sigma, bandwidth, estimator)
    expected = torch.stack([brute(cells, drift, sigma, bandwidth, estimator) for cells in x])
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    for ours, theirs in zip(torch.autograd.grad(got.sum(), parameters), torch.autograd.grad(expected.sum(), parameters), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


def test_constant_noise_one_number_or_one_per_gene() -> None:
    drift, *_ = fields(4, 2)
    x = torch.randn(4, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    s = torch.tensor([0.5, 1.0, 2.0, 0.1], dtype=torch.float64)
    for estimator in ("linear", "u", "v"):
        expected = brute(x, drift, lambda _: s, 1.5, estimator)
        torch.testing.assert_close(kds(x, drift, s, 1.5, estimator), expected, rtol=1e-10, atol=1e-10)
        one = brute(x, drift, lambda _: torch.full_like(s, 0.7), 1.5, estimator)
        torch.testing.assert_close(kds(x, drift, 0.7, 1.5, estimator), one, rtol=1e-10, atol=1e-10)


def test_conditions_with_drifts_and_bandwidths_of_their_own() -> None:
    drift, sigma, _ = fields(3, 4)
    shift = torch.tensor([[0.0, 0.0, 0.0], [1.0, -2.0, 0.5]], dtype=torch.float64)
    x = torch.randn(2, 8, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    width = torch.tensor([1.0, 2.5])
    for estimator in ("linear", "u", "v"):
        got = kds(x, lambda x: drift(x) + shift[:, None], sigma, width, estimator)  # type: ignore[arg-type]
        for q in range(2):
            alone = kds(x[q], lambda x, q=q: drift(x) + shift[q], sigma, float(width[q]), estimator)  # type: ignore[misc,arg-type]
            torch.testing.assert_close(got[q], alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("estimator", ["linear", "u", "v"])
def test_single_precision_far_from_the_origin(estimator: Any) -> None:
    generator = torch.Generator().manual_seed(6)
    x = torch.randn(64, 20, generator=generator, dtype=torch.float64) + 30
    M = torch.randn(20, 20, generator=generator, dtype=torch.float64) / 5 - torch.eye(20)
    exact = kds(x, lambda x: (x - 29) @ M, 1.0, 5.0, estimator)
    single = kds(x.float(), lambda x: (x - 29) @ M.float(), 1.0, 5.0, estimator)
    torch.testing.assert_close(single.double(), exact, rtol=1e-3, atol=0)


def z_score(x: Tensor, drift: Field, sigma: Any, bandwidth: float) -> float:
    """Mean over independent blocks of 100 cells, all pairs in each, in standard errors."""
    values = kds(x.reshape(-1, 100, x.shape[-1]), drift, sigma, bandwidth, "u")
    return float(values.mean() / values.std() * len(values) ** 0.5)


@pytest.mark.parametrize("bandwidth", [2.0, 5.0])
def test_zero_at_stationarity_and_positive_elsewhere(bandwidth: float) -> None:
    """A linear system with noise of each gene its own: right only with its drift, direction of its edges and noise."""
    truth = linear_sde_screen(n_genes=4, n_perturbed=0, degree=2, sigma=(0.5, 1.5), n_control=2, seed=1).uns["truth"]
    M, b, S, sigma = (torch.from_numpy(truth[k]) for k in ("drift", "basal", "covariance", "sigma"))
    mu = torch.from_numpy(truth["means"][0])
    x = torch.randn(30_000, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) @ torch.linalg.cholesky(S).mT + mu
    score = -0.5 * sigma**2 * torch.linalg.inv(S)
    assert abs(z_score(x, lambda x: x @ M + b, sigma, bandwidth)) < Z
    assert abs(z_score(x, lambda x: (x - mu) @ score, sigma, bandwidth)) < Z  # reversible, with the same law
    assert z_score(x, lambda x: (x - mu) @ M.T, sigma, bandwidth) > 5  # every edge turned round
    assert z_score(x, lambda x: x @ M + b + 1.0, sigma, bandwidth) > 5
    assert z_score(x, lambda x: 2 * (x @ M + b), sigma, bandwidth) > 5
    assert z_score(x, lambda x: x @ M + b, 1.5 * sigma, bandwidth) > 5


def test_zero_with_noise_that_depends_on_the_state() -> None:
    """``f_j = D_j d log p / dx_j / 2 + d D_j / dx_j / 2`` plus a rotation keeps p = Normal(0, I), for D_j = 1 + a_j x_j^2."""
    x = torch.randn(30_000, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    a = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)
    skew = torch.tensor([[0.0, 1.0, -2.0], [-1.0, 0.0, 0.5], [2.0, -0.5, 0.0]], dtype=torch.float64)

    def noise(x: Tensor) -> Tensor:
        return (1 + a * x**2).sqrt()

    def drift(x: Tensor) -> Tensor:
        return -0.5 * (1 + a * x**2) * x + a * x + x @ skew

    assert abs(z_score(x, drift, noise, 1.5)) < Z
    assert abs(z_score(x, lambda x: drift(x) - 2 * x @ skew, noise, 1.5)) < Z  # turning the other way keeps it as well
    assert z_score(x, lambda x: drift(x) - a * x, noise, 1.5) > 5  # without the derivative of the noise
    assert z_score(x, lambda x: drift(x) + x @ skew.abs(), noise, 1.5) > 5


def solve(x: Tensor, mask: Tensor, symmetric: bool) -> tuple[np.ndarray, float]:
    """The linear drift [d, d] that minimises the KDS of all conditions x [q, n, d] with unit noise and shifts where ``mask`` [q, d] allows,
    and the loss; it is quadratic in all of them, so that one step of Newton's is the minimum (checked by its gradient)."""
    q, _, d = x.shape
    base = torch.eye(d, dtype=x.dtype)

    def loss(flat: Tensor) -> Tensor:
        M, b, c = flat[: d * d].view(d, d), flat[d * d : d * d + d], flat[d * d + d :].view(q, d) * mask
        M = 0.5 * (M + M.T) if symmetric else M
        return kds(x, lambda x: x @ (M - base) + (b + c)[:, None], 1.0, 2.0, "v").sum()

    start = torch.zeros(d * d + d + q * d, dtype=x.dtype)
    hessian, gradient = torch.func.hessian(loss)(start), torch.func.grad(loss)(start)
    best = start - torch.linalg.lstsq(hessian, gradient[:, None], rcond=1e-12, driver="gelsd").solution[:, 0]
    assert torch.func.grad(loss)(best).abs().max() < 1e-6 * gradient.abs().max()
    M = best[: d * d].view(d, d)
    return ((0.5 * (M + M.T) if symmetric else M) - base).numpy(), float(loss(best))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_learns_direction_from_interventions_where_a_gradient_field_cannot(seed: int) -> None:
    """Four genes, each perturbed, 200 cells each. With shifts on the targets alone the drift is found; a symmetric drift with any shifts
    fits the cells as well, and is minus half the precision matrix, without direction."""
    adata = linear_sde_screen(n_genes=4, n_perturbed=4, degree=2, cells_per_perturbation=200, seed=seed)
    truth = adata.uns["truth"]
    x = torch.from_numpy(adata.obsm["state"].astype(float)).reshape(5, 200, 4)
    on_target = torch.from_numpy(np.vstack([np.zeros(4), truth["mask"]]))
    anywhere = torch.ones(5, 4, dtype=x.dtype)
    anywhere[0] = 0
    drift, loss = solve(x, on_target, symmetric=False)
    field, field_loss = solve(x, anywhere, symmetric=True)
    size = np.linalg.norm(truth["drift"])
    assert np.linalg.norm(drift - truth["drift"]) < 0.25 * size
    assert graph_scores(drift, truth["drift"])["f1"] == graph_scores(drift, truth["drift"])["direction"] == 1
    assert (
        np.linalg.norm(field + 0.5 * np.linalg.inv(truth["covariance"])) < 0.1 * size < 0.5 * size < np.linalg.norm(field - truth["drift"])
    )
    assert graph_scores(field, truth["drift"])["direction"] == 0.5
    restricted = solve(x, on_target, symmetric=True)[1]
    assert field_loss < 2 * loss and 3 * loss < restricted  # without curl no drift can respect the targets


def test_refusals() -> None:
    x = torch.zeros(4, 2)
    with pytest.raises(PyrocausalError, match="estimator"):
        kds(x, lambda x: x, estimator="w")  # type: ignore[arg-type]
    with pytest.raises(PyrocausalError, match="two cells"):
        kds(x[:1], lambda x: x)
    with pytest.raises(PyrocausalError, match="bandwidth"):
        kds(x, lambda x: x, bandwidth=0.0)
