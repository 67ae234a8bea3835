"""The score network line by line; learned scores, bounds, samples and couplings against Gaussian closed forms."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pyrocausal.dynamics import score as module
from pyrocausal.dynamics.score import LCDStationary, ScoreNetwork, dsm_loss, from_cells, train_score
from pyrocausal.errors import DataError

torch.set_num_threads(1)
F64 = torch.float64


class Exact(ScoreNetwork):
    """The network's place taken by the score of ``Normal(dose @ effect, V)`` (standardised units), through the same F."""

    def __init__(self, effect: Tensor, V: Tensor, **settings: float) -> None:
        super().__init__(len(V), len(effect), n_hidden=4, n_embed=2, **settings)
        self.double()
        self.effect, self.V = effect, V

    def exact(self, y: Tensor, sigma: Tensor, dose: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(self.V)
        return -((y - dose.to(y.dtype) @ self.effect) @ vectors / (values + sigma**2)) @ vectors.T

    def body(self, y: Tensor, k: Tensor, dose: Tensor) -> Tensor:
        sigma = self.sigma(k)[..., None]
        return (y / (1 + sigma**2).sqrt() - y - sigma**2 * self.exact(y, sigma, dose)) / sigma


def covariance(d: int, seed: int = 0) -> Tensor:
    A = torch.randn(d, d, generator=torch.Generator().manual_seed(seed), dtype=F64)
    return A @ A.T / d + 0.3 * torch.eye(d, dtype=F64)


def seeded(seed: int, make: Callable[[], ScoreNetwork]) -> ScoreNetwork:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make()


# -- the network -----------------------------------------------------------------------------------------------------------------


def test_network_line_by_line() -> None:
    """The equations of the module's docstring, row by row in float64, with the cancelling form of the skip term."""
    net = seeded(0, lambda: ScoreNetwork(5, 3, n_hidden=8, n_embed=6)).double()
    g = torch.Generator().manual_seed(1)
    y, dose = torch.randn(30, 5, generator=g, dtype=F64), torch.randint(2, (30, 3), generator=g).double()
    k = torch.arange(30)
    out = net(y, k, dose)
    torch.testing.assert_close(net(y, k.double(), dose), out, rtol=1e-10, atol=1e-10)
    (W1, W2), (B1, B2), (T1, T2), W3 = net.layers, net.inject, (net.time[0], net.time[2]), net.out
    for i in range(30):
        sigma = 10.0 * (0.01 / 10.0) ** (i / 29)
        E = sum((dose[i, g] * net.embedding[g] for g in range(3)), torch.zeros(6, dtype=F64))
        angle = [i * math.exp(-math.log(30) * j / 3) for j in range(4)]
        t = torch.tensor([math.sin(a) for a in angle] + [math.cos(a) for a in angle], dtype=F64)
        x = y[i] / math.sqrt(1 + sigma**2)
        h1 = torch.tanh(W1.weight @ x + W1.bias + T2.weight @ torch.tanh(T1.weight @ t + T1.bias) + T2.bias + B1.weight @ E + B1.bias)
        h2 = torch.tanh(W2.weight @ h1 + W2.bias + B2.weight @ E + B2.bias)
        F = W3.weight @ h2 + W3.bias
        torch.testing.assert_close(out[i], (x - sigma * F - y[i]) / sigma**2, rtol=1e-5, atol=1e-5)  # frequencies are float32


def test_residual_and_loss() -> None:
    """``sigma s + eps`` without cancellation, and the published weighting of the loss."""
    net = seeded(0, lambda: ScoreNetwork(5, 3, n_hidden=8, n_embed=6)).double()
    g = torch.Generator().manual_seed(1)
    z, eps, dose = (torch.randn(30, n, generator=g, dtype=F64) for n in (5, 5, 3))
    k = torch.arange(30)
    sigma = net.sigma(k)[:, None]
    torch.testing.assert_close(sigma[:, 0], net.sigmas, rtol=1e-5, atol=0, check_dtype=False)
    direct = sigma * net(z + sigma * eps, k, dose) + eps
    torch.testing.assert_close(net.residual(z, eps, k, dose), direct, rtol=1e-9, atol=1e-9)
    loss = dsm_loss(net, z, dose, torch.Generator().manual_seed(2))
    g = torch.Generator().manual_seed(2)
    k, eps = torch.randint(30, (30,), generator=g), torch.randn(30, 5, generator=g, dtype=F64)
    sigma = net.sigma(k)[:, None]
    terms = 0.5 * sigma**2 / 5 * (net(z + sigma * eps, k, dose) + eps / sigma) ** 2
    torch.testing.assert_close(loss, terms.sum(1).mean(), rtol=1e-10, atol=0)


def test_unseen_perturbations_get_the_mean_embedding() -> None:
    net = ScoreNetwork(2, 4, n_hidden=4, n_embed=3)
    before = net.embedding.detach().clone()
    net.fill_untrained(torch.tensor([True, False, True, False]))
    expected = torch.stack([before[0], before[[0, 2]].mean(0), before[2], before[[0, 2]].mean(0)])
    torch.testing.assert_close(net.embedding.detach(), expected)


def test_conditions_weigh_alike() -> None:
    """10 cells against 1,000: units by condition, not by cell; draws stay within their condition."""
    x = torch.cat([torch.full((1000, 1), 3.0), torch.full((10, 1), 5.0), torch.full((10, 1), 9.0)])
    codes = torch.cat([torch.zeros(1000), torch.ones(10), torch.full((10,), 2)]).long()[torch.arange(1020)]
    source = from_cells(x, codes, 3)
    q = torch.tensor([2, 0, 1, 1])
    assert source(q, torch.Generator().manual_seed(0)).flatten().tolist() == [9, 3, 5, 5]
    net = ScoreNetwork(1, 2, n_hidden=4, n_embed=2)
    net.fit_units(source, torch.tensor([[0.0, 0], [1, 0], [0, 1]]), torch.Generator().manual_seed(0))
    assert float(net.centre) == 3 and abs(float(net.scale) - math.sqrt(56 / 9)) < 1e-3
    with pytest.raises(DataError, match="condition 3"):
        from_cells(x, codes, 4)


# -- training --------------------------------------------------------------------------------------------------------------------


def trained(seed: int, steps: int = 30, **settings: bool) -> tuple[ScoreNetwork, list[float]]:
    g = torch.Generator().manual_seed(0)
    net = seeded(3, lambda: ScoreNetwork(2, 2, n_hidden=8, n_embed=4))
    source = from_cells(torch.randn(90, 2, generator=g), torch.arange(90) % 3, 3)
    doses = torch.tensor([[0.0, 0], [1, 0], [0, 1]])
    history = train_score(net, source, doses, steps=steps, batch_size=16, seed=seed, progress=False, **settings)
    return net, history["loss"].tolist()


def test_training_is_reproducible_and_leaves_the_random_state() -> None:
    before = torch.random.get_rng_state()
    (a, la), (b, lb), (_, lc) = trained(1), trained(1), trained(2)
    assert la == lb and la != lc
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert torch.equal(before, torch.random.get_rng_state())


def test_weight_decay_of_embeddings_is_that_of_parity_only() -> None:
    """With no gradient (an all-zero design) embeddings shrink by the product of ``1 - lr_t wd`` under parity, and stay otherwise."""
    start = seeded(3, lambda: ScoreNetwork(2, 2, n_hidden=8, n_embed=4)).embedding.detach()
    source = from_cells(torch.randn(8, 2, generator=torch.Generator().manual_seed(0)), torch.zeros(8, dtype=torch.int64), 1)
    for parity in (True, False):
        net = seeded(3, lambda: ScoreNetwork(2, 2, n_hidden=8, n_embed=4))
        train_score(net, source, torch.zeros(1, 2), steps=20, batch_size=4, parity=parity, progress=False)
        left = math.prod(1 - 1e-3 * 0.5 * (1 + math.cos(math.pi * t / 20)) for t in range(20)) if parity else 1.0
        torch.testing.assert_close(net.embedding.detach(), start * left, rtol=1e-5, atol=1e-8)


def test_interrupt_keeps_what_was_fitted(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, real = [0], module.dsm_loss

    def stop(*args: object, **kwargs: object) -> Tensor:
        calls[0] += 1
        if calls[0] == 11:
            raise KeyboardInterrupt
        return real(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "dsm_loss", stop)
    net, losses = trained(1, steps=100)
    start = seeded(3, lambda: ScoreNetwork(2, 2, n_hidden=8, n_embed=4))
    assert len(losses) == 10 and not torch.equal(net.out.weight, start.out.weight)


@pytest.mark.longest
def test_learned_score_of_two_gaussian_conditions() -> None:
    """Within 5 % of the exact score in L2(p) at every level from .1 on, in control and perturbed cells."""
    g = torch.Generator().manual_seed(0)
    V, shift = torch.tensor([[1.0, 0.5], [0.5, 0.6]], dtype=F64), torch.tensor([[1.5, -1.0]], dtype=F64)
    L, doses = torch.linalg.cholesky(V), torch.tensor([[0.0], [1.0]])

    def source(q: Tensor, generator: torch.Generator) -> Tensor:
        return (torch.randn(len(q), 2, generator=generator, dtype=F64) @ L.T + doses[q].double() @ shift).float()

    net = seeded(0, lambda: ScoreNetwork(2, 1, n_hidden=32, n_embed=8))
    train_score(net, source, doses, steps=10_000, batch_size=2048, lr=1e-2, weight_decay=0.0, progress=False, seed=1)
    truth = Exact(shift, V)
    for k in range(20):
        sigma = net.sigma(torch.tensor(float(k))).double()
        dose = doses.repeat_interleave(4000, 0)
        y = source(torch.arange(2).repeat_interleave(4000), g).double() + sigma * torch.randn(8000, 2, generator=g, dtype=F64)
        exact = truth.exact(y, sigma, dose)
        with torch.no_grad():
            learned = net(y.float(), float(k), dose).double()
        assert float((learned - exact).norm() / exact.norm()) < 0.05, f"level {k}, sigma {float(sigma):.3f}"


# -- the law ---------------------------------------------------------------------------------------------------------------------


def nll(z: Tensor, mean: Tensor, V: Tensor) -> Tensor:
    return -torch.distributions.MultivariateNormal(mean, V).log_prob(z)


@pytest.mark.slow
def test_bound_is_the_likelihood_of_a_gaussian() -> None:
    """5 genes, 2,000,000 draws: within .03 nats of the exact value for the true score, and never below it by more."""
    V, mean = covariance(5), torch.tensor([[0.5, -1.0, 0.3, 0.0, 2.0]], dtype=F64)
    wrong = {"right": (V, mean), "covariance": (0.5 * V + 0.5 * torch.eye(5, dtype=F64), mean), "mean": (V, mean + 0.7)}
    n = 2_000_000
    with torch.random.fork_rng():
        torch.manual_seed(0)
        z = torch.randn(n, 5, dtype=F64) @ torch.linalg.cholesky(V).T + mean
        for name, (W, m) in wrong.items():
            law = LCDStationary(Exact(m, W), torch.ones(1, 1).expand(n, 1))
            with torch.no_grad():
                bound = -float(law.log_prob(z).mean())
            smooth = W + 1e-4 * torch.eye(5, dtype=F64)
            exact = float(nll(z, m[0], smooth).mean())
            assert bound > exact - 0.03
            assert bound < exact + 0.03 or name != "right"


def test_bound_unit_change_and_spread() -> None:
    """20,000 cells in other units: the same bound plus the log of the scale; the control variate leaves it its mean."""
    V, mean = covariance(3), torch.zeros(1, 3, dtype=F64)
    net, other = Exact(mean, V), Exact(mean, V)
    other.centre.copy_(torch.tensor([1.0, 2.0, 3.0]))
    other.scale.copy_(torch.tensor([2.0, 0.5, 4.0]))
    dose = torch.zeros(20_000, 1)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        z = torch.randn(20_000, 3, dtype=F64) @ torch.linalg.cholesky(V).T
        torch.manual_seed(1)
        a = LCDStationary(net, dose).log_prob(z)
        torch.manual_seed(1)
        b = LCDStationary(other, dose).log_prob(other.centre + other.scale * z)
        torch.testing.assert_close(b, a - math.log(4.0), rtol=1e-9, atol=1e-9)
        k, eps = torch.rand(20_000, dtype=F64) * 29, torch.randn(20_000, 3, dtype=F64)
        plain = net.residual(z, eps, k, dose).square().sum(-1) * net.span
        exact = float(-nll(z, mean[0], V).mean())
    assert abs(float(a.mean()) - exact) < 4.5 * float(a.std()) / math.sqrt(20_000) + 0.01
    assert float(a.std()) < float(plain.std())  # of single estimates: the control variate is worth having


def test_samples_mean_and_transport() -> None:
    """Two conditions of 20,000 cells: moments within 4.5 standard errors and 1.5 % of the steps; exact mean; transport adds the shift."""
    V, effect = covariance(3), torch.tensor([[2.0, 0.0, -1.0], [0.0, 4.0, 0.0]], dtype=F64)
    net = Exact(effect, V)
    net.centre.copy_(torch.tensor([1.0, 2.0, 3.0]))
    net.scale.copy_(torch.tensor([2.0, 0.5, 4.0]))
    dose = torch.tensor([[0.0, 0.0], [1.0, 0.5]])[:, None]
    law = LCDStationary(net, dose).expand((2, 20_000))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        x = law.sample()
    assert x.shape == (2, 20_000, 3) == law.mean.shape
    z = (x - net.centre) / net.scale
    for each, mean in zip(z, dose[:, 0].double() @ effect, strict=True):
        white = torch.linalg.solve_triangular(torch.linalg.cholesky(V), (each - mean).T, upper=False).T
        assert float(white.mean(0).abs().max()) < 4.5 / math.sqrt(20_000) + 0.015
        assert float((torch.cov(white.T) - torch.eye(3)).abs().max()) < 4.5 * math.sqrt(2 / 20_000) + 0.015
    exact = net.centre + net.scale * (dose.double() @ effect)
    torch.testing.assert_close(law.mean, exact.expand(2, 20_000, 3), rtol=0, atol=0.02)
    base, worlds = LCDStationary(net, dose[:1].expand(1, 50, 2)), LCDStationary(net, dose.expand(2, 50, 2))
    carried = base.carry(x[:1, :50], worlds)
    torch.testing.assert_close(carried[0], x[0, :50], rtol=0, atol=1e-12)
    torch.testing.assert_close(carried[1] - x[0, :50], (exact[1] - exact[0]).expand(50, 3), rtol=0, atol=0.02)


def test_drift_and_limit_in_the_units_of_the_data() -> None:
    """Of a Gaussian: the drift is ``-(S + s0^2 D)^-1 (x - mu)`` in raw units, D the squared units; the limit is the mean."""
    V, effect = covariance(3), torch.tensor([[2.0, 0.0, -1.0]], dtype=F64)
    net = Exact(effect, V)
    net.centre.copy_(torch.tensor([1.0, 2.0, 3.0]))
    net.scale.copy_(torch.tensor([2.0, 0.5, 4.0]))
    D = torch.diag(net.scale)
    S, mu = D @ (V + 1e-4 * torch.eye(3, dtype=F64)) @ D, net.centre + net.scale * effect[0]
    x = torch.randn(7, 3, dtype=F64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(net.drift(x, torch.ones(7, 1)), -torch.linalg.solve(S, (x - mu).T).T, rtol=1e-6, atol=1e-8)
    dose = torch.tensor([[0.0], [1.0]])
    ends = [net.limit(dose, n) for n in (500, 60)]
    torch.testing.assert_close(ends[0], torch.stack([net.centre, mu]), rtol=0, atol=1e-3)
    torch.testing.assert_close(ends[1], ends[0], rtol=0, atol=1e-4)
