"""Count likelihoods and the hard mask distribution against textbook formulas, SciPy, torch.distributions and automatic differentiation."""

from __future__ import annotations

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.stats as st
import torch
from torch import Tensor
from torch.distributions import kl_divergence

from pyrocausal.distributions import NegativeBinomial, Poisson, StraightThroughBernoulli
from pyrocausal.loading import Nonzeros

torch.set_num_threads(1)
F64 = torch.float64
LEADS = [(), (3,), (2, 3)]


def nonzeros(x: Tensor) -> Nonzeros:
    """The sparse pieces, written here a second time so that the library's own way of finding them is not its own judge."""
    row, gene = x.nonzero(as_tuple=True)
    value = x[row, gene]
    log_factorial = torch.zeros(len(x), dtype=x.dtype).index_add(0, row, torch.lgamma(value + 1))
    return Nonzeros(x, row * x.shape[1] + gene, row, gene, value, log_factorial)


def counts(n: int = 6, n_genes: int = 9, rate: float = 0.8, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    x = np.random.default_rng(seed).poisson(rate, (n, n_genes))
    x[0] = 0  # a cell, and a gene, without counts
    x[:, 0] = 0
    x[1, 1] = 37
    return torch.tensor(x, dtype=dtype)


def parameters(x: Tensor, lead: tuple[int, ...] = (), seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mu = torch.rand(*lead, *x.shape, generator=generator, dtype=x.dtype) * 3 + 0.05
    theta = torch.rand(x.shape[1], generator=generator, dtype=x.dtype) * 5 + 0.2
    return mu.requires_grad_(), theta.requires_grad_()


def laws(name: str, mu: Tensor, theta: Tensor, nz: Nonzeros | None) -> NegativeBinomial | Poisson:
    return NegativeBinomial(mu, theta, nz) if name == "nb" else Poisson(mu, nz)


# -- densities -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lead", LEADS)
@pytest.mark.parametrize("sparse", [True, False])
def test_negative_binomial_density(lead: tuple[int, ...], sparse: bool) -> None:
    x = counts()
    mu, theta = parameters(x, lead)
    ours = NegativeBinomial(mu, theta, nonzeros(x) if sparse else None).log_prob(x)
    torch_law = torch.distributions.NegativeBinomial(theta, logits=mu.log() - theta.log(), validate_args=False)
    by_scipy = st.nbinom.logpmf(x.numpy(), theta.detach().numpy(), (theta / (theta + mu)).detach().numpy()).sum(-1)
    assert ours.shape == (*lead, len(x))
    torch.testing.assert_close(ours, torch_law.log_prob(x).sum(-1), rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(ours.detach().numpy(), by_scipy, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("lead", LEADS)
@pytest.mark.parametrize("sparse", [True, False])
def test_poisson_density(lead: tuple[int, ...], sparse: bool) -> None:
    x = counts()
    mu, _ = parameters(x, lead)
    ours = Poisson(mu, nonzeros(x) if sparse else None).log_prob(x)
    torch.testing.assert_close(ours, torch.distributions.Poisson(mu).log_prob(x).sum(-1), rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(ours.detach().numpy(), st.poisson.logpmf(x.numpy(), mu.detach().numpy()).sum(-1), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["nb", "poisson"])
def test_density_sums_to_one(name: str) -> None:
    """One gene: the mass over all counts is 1, which no common factor of both formulas can hide."""
    x = torch.arange(0.0, 4000.0, dtype=F64)[:, None]
    mu, theta = torch.full_like(x, 7.3), torch.tensor([0.6], dtype=F64)
    total = laws(name, mu, theta, nonzeros(x)).log_prob(x).exp().sum()
    assert abs(float(total) - 1) < 1e-10


@pytest.mark.parametrize("name", ["nb", "poisson"])
def test_pieces_of_another_tensor_are_not_used(name: str) -> None:
    """The sparse pieces are of one tensor only; a value of its own (a sampled or replayed x) must not meet them."""
    x, other = counts(seed=0), counts(seed=5)
    mu, theta = parameters(x)
    stale = laws(name, mu, theta, nonzeros(x)).log_prob(other)
    torch.testing.assert_close(stale, laws(name, mu, theta, nonzeros(other)).log_prob(other), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["nb", "poisson"])
def test_a_mean_shared_by_all_cells(name: str) -> None:
    """A mean [G] or [1, G] broadcasts over the cells, with or without sparse pieces."""
    x = counts()
    mu, theta = parameters(x)
    row = mu[:1].detach()
    expected = laws(name, row.expand(x.shape), theta, nonzeros(x)).log_prob(x)
    for shared in (row, row[0]):
        torch.testing.assert_close(laws(name, shared, theta, nonzeros(x)).log_prob(x), expected, rtol=1e-10, atol=1e-10)


def test_theta_of_each_cell() -> None:
    """A dispersion [n, G] takes the dense formula."""
    x = counts()
    mu, _ = parameters(x)
    theta = torch.rand(x.shape, dtype=F64) + 0.5
    expected = st.nbinom.logpmf(x.numpy(), theta.numpy(), (theta / (theta + mu)).detach().numpy()).sum(-1)
    np.testing.assert_allclose(NegativeBinomial(mu, theta, nonzeros(x)).log_prob(x).detach().numpy(), expected, rtol=1e-10)


def test_single_precision() -> None:
    """float32 at the size of a real batch: within 2e-6 of float64, the figure of performance.md."""
    x = counts(64, 500, 0.15, dtype=torch.float32)
    mu, theta = parameters(x)
    low = NegativeBinomial(mu, theta, nonzeros(x)).log_prob(x)
    x64 = x.double()
    high = NegativeBinomial(mu.double(), theta.double(), nonzeros(x64)).log_prob(x64)
    assert float(((low.double() - high) / high).detach().abs().max()) < 2e-6


# -- gradients -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lead", LEADS)
@pytest.mark.parametrize("name", ["nb", "poisson"])
def test_gradcheck(name: str, lead: tuple[int, ...]) -> None:
    x = counts(3, 4)
    mu, theta = parameters(x, lead)
    nz = nonzeros(x)
    assert torch.autograd.gradcheck(lambda m: laws(name, m, theta.detach(), nz).log_prob(x), (mu,))
    if name == "nb":
        assert torch.autograd.gradcheck(lambda t: NegativeBinomial(mu.detach(), t, nz).log_prob(x), (theta,))


@pytest.mark.parametrize("lead", LEADS)
@pytest.mark.parametrize("name", ["nb", "poisson"])
def test_gradient_of_sparse_and_dense_path(name: str, lead: tuple[int, ...]) -> None:
    """Uneven weights of the cells, so that a mixed-up row shows."""
    x = counts()
    mu, theta = parameters(x, lead)
    weight = torch.rand(*lead, len(x), dtype=F64)
    inputs = (mu, theta) if name == "nb" else (mu,)
    sparse, dense = (torch.autograd.grad((laws(name, mu, theta, nz).log_prob(x) * weight).sum(), inputs) for nz in (nonzeros(x), None))
    for a, b in zip(sparse, dense, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["nb", "poisson"])
def test_gradient_of_a_strided_mean(name: str) -> None:
    """A mean that is a transposed view, as from einsum or a permuted particle dimension."""
    x = counts()
    mu, theta = parameters(x, (3,))
    strided = mu.detach().permute(2, 1, 0).contiguous().permute(2, 1, 0).requires_grad_()
    assert not strided.is_contiguous()
    expected = torch.autograd.grad(laws(name, mu, theta, nonzeros(x)).log_prob(x).sum(), mu)[0]
    got = torch.autograd.grad(laws(name, strided, theta, nonzeros(x)).log_prob(x).sum(), strided)[0]
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["nb", "poisson"])
def test_second_derivative(name: str) -> None:
    """Laplace guides differentiate twice: the Hessian times a vector, in the logarithm of the mean and of theta, as by the dense path."""
    x = counts(3, 4)
    mu, theta = (p.detach().log().requires_grad_() for p in parameters(x))
    inputs = (mu, theta) if name == "nb" else (mu,)
    second = []
    for nz in (nonzeros(x), None):
        first = torch.autograd.grad(laws(name, mu.exp(), theta.exp(), nz).log_prob(x).square().sum(), inputs, create_graph=True)
        second.append(torch.autograd.grad(sum((g * torch.arange(1.0, 1 + g.shape[-1])).sum() for g in first), inputs))
    for a, b in zip(*second, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


# -- the edges -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lead", LEADS)
@pytest.mark.parametrize("name", ["nb", "poisson"])
def test_no_counts_at_all(name: str, lead: tuple[int, ...]) -> None:
    x = torch.zeros(4, 5, dtype=F64)
    mu, theta = parameters(x, lead)
    inputs = (mu, theta) if name == "nb" else (mu,)
    sparse, dense = (laws(name, mu, theta, nz).log_prob(x) for nz in (nonzeros(x), None))
    torch.testing.assert_close(sparse, dense, rtol=1e-10, atol=1e-10)
    for a, b in zip(torch.autograd.grad(sparse.sum(), inputs), torch.autograd.grad(dense.sum(), inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["nb", "poisson"])
@pytest.mark.parametrize("size", [1e4, 1e6, 1e8])
def test_very_large_counts(name: str, size: float) -> None:
    """float64. lgamma(x + 1) near 1e8 is 1.7e9: the last digits of the difference are the rounding of two such numbers, 1e-15 of them."""
    x = torch.tensor([[size, 0.0, size / 3 // 1]], dtype=F64)
    mu = torch.tensor([[size * 1.1, 2.0, size / 2]], dtype=F64, requires_grad=True)
    theta = torch.tensor([3.0, 0.5, 40.0], dtype=F64, requires_grad=True)
    ours = laws(name, mu, theta, nonzeros(x)).log_prob(x)
    if name == "nb":
        reference = st.nbinom.logpmf(x.numpy(), theta.detach().numpy(), (theta / (theta + mu)).detach().numpy()).sum()
    else:
        reference = st.poisson.logpmf(x.numpy(), mu.detach().numpy()).sum()
    rounding = 8 * np.finfo(float).eps * 2 * size * math.log(size)
    assert abs(float(ours.detach()) - reference) < max(rounding, 1e-10 * abs(reference))
    assert all(g.isfinite().all() for g in torch.autograd.grad(ours.sum(), (mu, theta) if name == "nb" else (mu,)))


@pytest.mark.parametrize("name", ["nb", "poisson"])
def test_large_counts_in_single_precision(name: str) -> None:
    """Up to 10,000 counts of one gene: value within a tenth of a nat, gradient to 1e-4 (float32 rounds lgamma(1e4) = 8e4 to 4e-3)."""
    x = torch.tensor([[1e4, 0.0, 3e3, 5.0]])
    mu, theta = torch.tensor([[9e3, 1.0, 4e3, 6.0]], requires_grad=True), torch.tensor([3.0, 0.5, 40.0, 1.0], requires_grad=True)
    x64, mu64, theta64 = x.double(), mu.detach().double().requires_grad_(), theta.detach().double().requires_grad_()
    low, high = laws(name, mu, theta, nonzeros(x)).log_prob(x), laws(name, mu64, theta64, nonzeros(x64)).log_prob(x64)
    assert abs(float(low.detach()) - float(high.detach())) < 0.1
    grads = [torch.autograd.grad(v.sum(), ps[: 2 if name == "nb" else 1]) for v, ps in ((low, (mu, theta)), (high, (mu64, theta64)))]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["nb", "poisson"])
@pytest.mark.parametrize("sparse", [True, False])
def test_a_mean_that_underflows(name: str, sparse: bool) -> None:
    """A softmax in float32 gives exact zeros for logits 200 apart: the density stays finite, and so does the gradient of the logits."""
    x = torch.tensor([[3.0, 7.0, 0.0], [0.0, 1.0, 2.0]])
    eta = torch.tensor([[0.0, -200.0, -1.0], [-200.0, 0.0, -90.0]], requires_grad=True)
    theta = torch.tensor([0.5, 2.0, 10.0], requires_grad=True)
    mu = 100 * eta.softmax(-1)
    assert mu[0, 1] == 0 and 0 <= mu[1, 2] < 1e-30
    value = laws(name, mu, theta, nonzeros(x) if sparse else None).log_prob(x)
    assert value.isfinite().all() and (value < 0).all()
    grads = torch.autograd.grad(value.sum(), (eta, theta) if name == "nb" else (eta,))
    assert all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("name", ["nb", "poisson"])
def test_underflow_gives_the_same_value_on_both_paths(name: str) -> None:
    x = torch.tensor([[3.0, 7.0, 0.0]], dtype=F64)
    mu, theta = torch.tensor([[1.0, 0.0, 1e-40]], dtype=F64), torch.tensor([0.5, 2.0, 10.0], dtype=F64)
    sparse, dense = (laws(name, mu, theta, nz).log_prob(x) for nz in (nonzeros(x), None))
    torch.testing.assert_close(sparse, dense, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("theta", [1e3, 1e5])
def test_large_theta_is_poisson(theta: float) -> None:
    """NB - Poisson is ((x - mu)^2 - x) / (2 theta) per entry to first order in 1/theta."""
    x = counts()
    mu, _ = parameters(x)
    mu = mu.detach()
    gap = NegativeBinomial(mu, torch.full((x.shape[1],), theta, dtype=F64), nonzeros(x)).log_prob(x) - Poisson(mu, nonzeros(x)).log_prob(x)
    first = ((x - mu) ** 2 - x).sum(-1) / (2 * theta)
    second = (x.max() + mu.max()) ** 3 * x.shape[1] / theta**2
    assert float((gap - first).abs().max()) < float(second) + 1e-7


def test_validation() -> None:
    x = counts()
    mu, theta = parameters(x)
    for wrong in (-x - 1, x + 0.5):
        with pytest.raises(ValueError, match="support"):
            NegativeBinomial(mu, theta, validate_args=True).log_prob(wrong)
        with pytest.raises(ValueError, match="support"):
            Poisson(mu, validate_args=True).log_prob(wrong)
    with pytest.raises(ValueError, match="mu"):
        NegativeBinomial(-mu, theta, validate_args=True)
    with pytest.raises(ValueError, match="theta"):
        NegativeBinomial(mu, -theta, validate_args=True)
    with pytest.raises(ValueError, match="mu"):
        Poisson(-mu, validate_args=True)


# -- the sampler -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["nb", "poisson"])
def test_sampling_law(name: str) -> None:
    """Mean and variance of 8 genes within 5 standard errors: 16 comparisons of a fixed seed, each with a false-alarm rate of 5.7e-7
    under normality; so about 1e-5 for the test, were the seed drawn anew."""
    n = 40_000
    mu = torch.tensor([0.02, 0.1, 0.5, 1.0, 3.0, 10.0, 50.0, 300.0], dtype=F64)
    theta = torch.tensor([0.3, 5.0, 0.5, 1.0, 20.0, 2.0, 0.8, 100.0], dtype=F64)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        law = laws(name, mu[None], theta, None)
        x = law.sample((n,))[:, 0].numpy()
    mean, variance = law.mean[0].numpy(), law.variance[0].numpy()
    centred = (x - mean) ** 2
    assert (np.abs(x.mean(0) - mean) < 5 * np.sqrt(variance / n)).all()
    assert (np.abs(centred.mean(0) - variance) < 5 * centred.std(0) / math.sqrt(n)).all()
    assert (x == np.rint(x)).all() and (x >= 0).all()


def test_sampler_and_density_are_of_one_law() -> None:
    """Chi-squared of 20,000 draws against the density; false-alarm rate 1e-6."""
    n, top = 20_000, 25
    law = NegativeBinomial(torch.full((1, 1), 4.0, dtype=F64), torch.tensor([1.5], dtype=F64))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        x = law.sample((n,)).flatten().clamp(max=top).long()
    p = torch.stack([law.log_prob(torch.full((1, 1), float(k), dtype=F64)) for k in range(top)]).exp().flatten().numpy()
    expected = n * np.append(p, 1 - p.sum())
    statistic = ((np.bincount(x.numpy(), minlength=top + 1) - expected) ** 2 / expected).sum()
    assert st.chi2.sf(statistic, top) > 1e-6


@pytest.mark.parametrize("name", ["nb", "poisson"])
def test_shapes_in_pyro(name: str) -> None:
    """Drawn within plates of draws and interventions, and expanded to them."""
    mu, theta = torch.rand(5, 7) + 0.1, torch.rand(7) + 0.5
    with pyro.plate("draw", 2, dim=-3), pyro.plate("intervention", 3, dim=-2), pyro.plate("cell", 5, dim=-1):
        x = pyro.sample("x", laws(name, mu, theta, None))
    assert x.shape == (2, 3, 5, 7)
    law = laws(name, mu, theta, None).expand((2, 3, 5))
    assert law.batch_shape == (2, 3, 5) and law.event_shape == (7,)
    assert law.sample((4,)).shape == (4, 2, 3, 5, 7) and law.log_prob(x).shape == (2, 3, 5)
    assert not law.sample().requires_grad


# -- the hard mask ---------------------------------------------------------------------------------------------------------------


def uniforms(logits: Tensor, seed: int) -> Tensor:
    torch.manual_seed(seed)
    return torch.rand_like(logits).clamp(1e-7, 1 - 1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("temperature", [0.3, 1.0])
def test_mask_is_hard(dtype: torch.dtype, temperature: float) -> None:
    """Exactly 0 or 1 (not 1 - 6e-8), with the right frequency: within 5 s.e. at 7 logits, false-alarm rate 4e-6 of a fixed seed."""
    logits = torch.tensor([-30.0, -4.0, -1.0, 0.0, 1.0, 4.0, 30.0], dtype=dtype)
    n = 20_000
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        y = StraightThroughBernoulli(logits=logits, temperature=temperature).rsample((n,))
    assert set(y.unique().tolist()) == {0.0, 1.0}
    p = logits.sigmoid()
    assert ((y.mean(0) - p).abs() <= 5 * (p * (1 - p) / n).sqrt() + 1e-6).all()


@pytest.mark.parametrize("temperature", [0.3, 1.0])
@pytest.mark.parametrize("expanded", [False, True])
def test_mask_gradient_is_the_relaxations(temperature: float, expanded: bool) -> None:
    logits = torch.linspace(-3, 3, 12, dtype=F64).requires_grad_()
    weight = torch.randn(12, dtype=F64)
    law = StraightThroughBernoulli(logits=logits, temperature=temperature)
    law = law.expand((4, 12)) if expanded else law
    shape = law.batch_shape
    with torch.random.fork_rng(devices=[]):
        u = uniforms(logits.detach().expand(shape), 7)
        torch.manual_seed(7)
        y = law.rsample()
    soft = torch.sigmoid((logits + u.logit()) / temperature)
    assert torch.equal(y.detach(), (soft > 0.5).to(F64))
    ours = torch.autograd.grad((weight * y.sin()).sum(), logits)[0]
    chain = torch.autograd.grad(soft, logits, weight * y.detach().cos().expand(shape))[0]  # f'(hard) d soft / d logits
    torch.testing.assert_close(ours, chain, rtol=1e-10, atol=1e-12)


def test_mask_density() -> None:
    logits = torch.tensor([-3.0, 0.0, 2.0, 100.0], dtype=F64, requires_grad=True)
    law, plain = StraightThroughBernoulli(logits=logits), torch.distributions.Bernoulli(logits=logits)
    for value in (torch.zeros(4, dtype=F64), torch.ones(4, dtype=F64)):
        torch.testing.assert_close(law.log_prob(value), plain.log_prob(value), rtol=1e-10, atol=1e-10)
        a, b = (torch.autograd.grad(d.log_prob(value).sum(), logits)[0] for d in (law, plain))
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    value = torch.rand(4, dtype=F64).round().requires_grad_()
    slope = torch.autograd.grad(law.log_prob(value).sum(), value)[0]  # d log q / d mask = logits: what the reference's gradient sees
    torch.testing.assert_close(slope, logits.detach(), rtol=1e-10, atol=1e-10)


def test_mask_kl() -> None:
    logits, rho = torch.tensor([-30.0, -2.0, 0.0, 3.0], dtype=F64), torch.tensor(0.1, dtype=F64)
    p = logits.sigmoid()
    expected = torch.xlogy(p, p / rho) + torch.xlogy(1 - p, (1 - p) / (1 - rho))
    q = StraightThroughBernoulli(logits=logits)
    torch.testing.assert_close(kl_divergence(q, dist.Bernoulli(rho.expand(4))), expected, rtol=1e-10, atol=1e-10)
    table = kl_divergence(q.expand((2, 4)).to_event(2), dist.Bernoulli(rho.expand(2, 4)).to_event(2))
    torch.testing.assert_close(table, 2 * expected.sum(), rtol=1e-10, atol=1e-10)


def test_mask_from_probabilities_and_without_gradient() -> None:
    law = StraightThroughBernoulli(probs=torch.tensor([0.2, 0.7]))
    torch.testing.assert_close(law.logits, torch.tensor([0.2, 0.7]).logit())
    assert law.has_rsample and law.sample((5,)).shape == (5, 2)
    assert not StraightThroughBernoulli(logits=torch.zeros(2, requires_grad=True)).sample().requires_grad
