"""Zero-inflated counts against textbook formulas, Pyro's own law, automatic differentiation and brute force; couplings by their law."""

from __future__ import annotations

import math

import pyro.distributions as dist
import pytest
import scipy.stats as st
import torch
from torch import Tensor

from pyrocausal.errors import DataError, InterventionError
from pyrocausal.loading import Nonzeros
from pyrocausal.zero_inflated import ZeroInflatedNegativeBinomial, ZeroInflatedPoisson, pairwise_zip, unit_scaling

torch.set_num_threads(1)
Law = ZeroInflatedPoisson | ZeroInflatedNegativeBinomial
F64 = torch.float64


def nonzeros(x: Tensor) -> Nonzeros:
    row, gene = x.nonzero(as_tuple=True)
    value = x[row, gene]
    log_factorial = torch.zeros(len(x), dtype=x.dtype).index_add(0, row, torch.lgamma(value + 1))
    return Nonzeros(x, row * x.shape[1] + gene, row, gene, value, log_factorial)


def setting(lead: tuple[int, ...] = (), n: int = 6, d: int = 7, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Counts, means, dispersions, gates; a cell and a gene without counts, a large count."""
    g = torch.Generator().manual_seed(seed)
    x = torch.poisson(torch.full((n, d), 1.2, dtype=F64), generator=g)
    x[0], x[:, 0], x[1, 1] = 0, 0, 60
    mu = torch.rand(*lead, n, d, generator=g, dtype=F64) * 4 + 0.05
    theta = torch.rand(d, generator=g, dtype=F64) * 5 + 0.2
    gate = torch.rand(d, generator=g, dtype=F64) * 0.8 + 0.05
    return x, mu.requires_grad_(), theta.requires_grad_(), gate.requires_grad_()


def law(
    kind: str, mu: Tensor, theta: Tensor, gate: Tensor, nz: Nonzeros | None = None
) -> ZeroInflatedPoisson | ZeroInflatedNegativeBinomial:
    return ZeroInflatedPoisson(mu, gate, nz) if kind == "zip" else ZeroInflatedNegativeBinomial(mu, theta, gate, nz)


def textbook(kind: str, x: Tensor, mu: Tensor, theta: Tensor, gate: Tensor) -> Tensor:
    base = dist.Poisson(mu) if kind == "zip" else dist.NegativeBinomial(theta, logits=mu.log() - theta.log(), validate_args=False)
    return ((1 - gate) * base.log_prob(x).exp() + gate * (x == 0)).log().sum(-1)


@pytest.mark.parametrize("kind", ["zip", "zinb"])
@pytest.mark.parametrize("lead", [(), (2, 3)])
@pytest.mark.parametrize("sparse", [True, False])
def test_density_and_gradient(kind: str, lead: tuple[int, ...], sparse: bool) -> None:
    x, mu, theta, gate = setting(lead)
    used = (mu, gate) if kind == "zip" else (mu, theta, gate)
    ours = law(kind, mu, theta, gate, nonzeros(x) if sparse else None).log_prob(x)
    theirs = textbook(kind, x, mu, theta, gate)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    weight = torch.randn(ours.shape, dtype=F64, generator=torch.Generator().manual_seed(1))
    for a, b in zip(torch.autograd.grad((weight * ours).sum(), used), torch.autograd.grad((weight * theirs).sum(), used), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def test_zero_inflated_poisson_is_pyros() -> None:
    x, mu, _, gate = setting()
    theirs = dist.ZeroInflatedPoisson(mu, gate=gate.expand_as(mu)).log_prob(x).sum(-1)
    torch.testing.assert_close(ZeroInflatedPoisson(mu, gate).log_prob(x), theirs, rtol=1e-6, atol=1e-6)  # theirs rounds at 1e-6


@pytest.mark.parametrize("kind", ["zip", "zinb"])
def test_mass_is_one_and_moments_are_those_of_the_mass(kind: str) -> None:
    x = torch.arange(0.0, 3000.0, dtype=F64)[:, None]
    mu, theta, gate = (torch.tensor([v], dtype=F64) for v in (7.0, 1.5, 0.3))
    fn = law(kind, mu.expand(3000, 1), theta, gate)
    mass = fn.log_prob(x).exp()
    assert abs(float(mass.sum()) - 1) < 1e-10
    mean = (mass * x[:, 0]).sum()
    torch.testing.assert_close(fn.mean[0, 0], mean, rtol=1e-9, atol=0)
    torch.testing.assert_close(fn.variance[0, 0], (mass * (x[:, 0] - mean) ** 2).sum(), rtol=1e-9, atol=0)


def test_extreme_rates_and_gates() -> None:
    """No silence is the plain law; rates of 0 and 1e4 are finite, in float32 too."""
    x, mu, theta, _ = setting()
    none = torch.zeros(7, dtype=F64)
    torch.testing.assert_close(ZeroInflatedPoisson(mu, none).log_prob(x), dist.Poisson(mu).log_prob(x).sum(-1), rtol=1e-10, atol=1e-10)
    plain = dist.NegativeBinomial(theta, logits=mu.log() - theta.log(), validate_args=False).log_prob(x).sum(-1)
    torch.testing.assert_close(ZeroInflatedNegativeBinomial(mu, theta, none).log_prob(x), plain, rtol=1e-10, atol=1e-10)
    for dtype in (torch.float32, F64):
        rate = torch.tensor([[0.0, 1e4, 0.0]], dtype=dtype, requires_grad=True)
        gate = torch.tensor([0.2, 0.5, 0.2], dtype=dtype, requires_grad=True)
        y = torch.tensor([[0.0, 0.0, 0.0], [0.0, 1e4, 0.0]], dtype=dtype)
        for out in (ZeroInflatedPoisson(rate, gate).log_prob(y), pairwise_zip(y, rate, gate)[:, 0]):
            expected = torch.tensor([0.0, st.poisson.logpmf(1e4, 1e4)], dtype=dtype) + math.log(0.5)
            torch.testing.assert_close(out.detach(), expected, rtol=0, atol=2e-2 if dtype is torch.float32 else 1e-9)  # x log x = 1e5
            for grad in torch.autograd.grad(out.sum(), (rate, gate)):
                assert bool(grad.isfinite().all())


@pytest.mark.parametrize("kind", ["zip", "zinb"])
def test_samples_follow_the_law(kind: str) -> None:
    """Chi-squared of 40,000 counts over cells 0, 1, ...; false alarms 1 in 1,000 by the level, and the seed is fixed."""
    torch.manual_seed(3)
    mu, theta, gate = (torch.tensor([v], dtype=F64) for v in (2.5, 1.5, 0.3))
    fn = law(kind, mu[None], theta, gate)
    counts = fn.sample((40_000,)).flatten()
    edges = torch.arange(0.0, 9.0, dtype=F64)[:, None]
    p = law(kind, mu.expand(9, 1), theta, gate).log_prob(edges).exp()
    expected = torch.cat([p, 1 - p.sum()[None]]) * 40_000
    observed = torch.bincount(counts.clamp(max=9).long(), minlength=10).double()
    assert st.chi2.sf(float(((observed - expected) ** 2 / expected).sum()), 9) > 1e-3


@pytest.mark.parametrize("kind", ["zip", "zinb"])
@pytest.mark.parametrize("factor", [0.4, 2.0])
def test_carried_counts_have_the_new_law(kind: str, factor: float) -> None:
    """Mean and share of zeros of carried counts within 4.5 standard errors of the new law's (false alarms below 1e-4)."""
    torch.manual_seed(4)
    n = 40_000
    mu, theta, gate = torch.full((n, 1), 3.0, dtype=F64), torch.tensor([1.5], dtype=F64), torch.tensor([0.3], dtype=F64)
    old, new = law(kind, mu, theta, gate), law(kind, mu * factor, theta, gate)
    x = old.sample()
    carried = old.carry(x, new)
    zero = float(law(kind, mu[:1] * factor, theta, gate).log_prob(torch.zeros(1, 1, dtype=F64)).exp())
    assert abs(float(carried.mean() - new.mean[0, 0])) < 4.5 * float((new.variance[0, 0] / n).sqrt())
    assert abs(float((carried == 0).double().mean()) - zero) < 4.5 * (zero * (1 - zero) / n) ** 0.5
    assert torch.equal(old.carry(x, law(kind, mu * (1 + 1e-7), theta, gate)), x)
    assert bool((carried <= x).all()) if factor < 1 else bool((carried >= x).all())


def test_carry_refuses_another_gate() -> None:
    x, mu, _, gate = setting()
    with pytest.raises(InterventionError, match="moves the gate"):
        ZeroInflatedPoisson(mu, gate).carry(x, ZeroInflatedPoisson(mu, gate / 2))


# -- every cell under every state ------------------------------------------------------------------------------------------------


def naive(y: Tensor, rate: Tensor, gate: Tensor) -> Tensor:
    """One cell, one state and one gene at a time in the formula of the law; nothing shared with the products."""
    out = torch.empty(len(y), len(rate), dtype=y.dtype)
    for n in range(len(y)):
        for m in range(len(rate)):
            poisson = rate[m].log() * y[n] - rate[m] - torch.lgamma(y[n] + 1)
            out[n, m] = torch.where(y[n] == 0, (gate + (1 - gate) * poisson.exp()).log(), (1 - gate).log() + poisson).sum()
    return out


def test_pairwise_equals_the_loop() -> None:
    g = torch.Generator().manual_seed(5)
    rate = (torch.randn(9, 60, generator=g, dtype=F64) * 2.5).exp().requires_grad_()
    gate = torch.rand(60, generator=g, dtype=F64).mul(0.9).requires_grad_()
    y = torch.poisson(rate[:7].detach(), generator=g) * (torch.rand(7, 60, generator=g) > 0.3)
    ours, theirs = pairwise_zip(y, rate, gate), naive(y, rate, gate)
    assert float((ours - theirs).abs().max()) < 1e-10
    weight = torch.randn(7, 9, generator=g, dtype=F64)
    for a, b in zip(
        torch.autograd.grad((ours * weight).sum(), (rate, gate)), torch.autograd.grad((theirs * weight).sum(), (rate, gate)), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_pairwise_over_conditions_and_by_finite_differences() -> None:
    g = torch.Generator().manual_seed(6)
    rate = (torch.rand(3, 4, 5, generator=g, dtype=F64) + 0.1).requires_grad_()
    gate = (torch.rand(5, generator=g, dtype=F64) * 0.8).requires_grad_()
    y = torch.poisson(torch.full((3, 2, 5), 1.0, dtype=F64), generator=g)
    torch.testing.assert_close(
        pairwise_zip(y, rate, gate), torch.stack([naive(y[c], rate[c], gate) for c in range(3)]), rtol=1e-12, atol=1e-11
    )
    assert torch.autograd.gradcheck(lambda r, p: pairwise_zip(y, r, p), (rate, gate))


def test_unit_scaling_finds_the_rate() -> None:
    """ZIP(5, .3) of 100,000 cells within 1 %; the estimator's standard deviation is about .2 % there, so false alarms are below 1e-5."""
    torch.manual_seed(7)
    rate = torch.tensor([[5.0, 20.0, 0.2, 0.0]], dtype=F64)
    counts = ZeroInflatedPoisson(rate.expand(100_000, 4), torch.tensor([0.3, 0.6, 0.0, 0.0], dtype=F64)).sample()
    unit = unit_scaling(counts)
    assert abs(float(unit[0]) / 5 - 1) < 0.01 and abs(float(unit[1]) / 20 - 1) < 0.01
    assert unit[2:].tolist() == [1.0, 1.0]
    with pytest.raises(DataError, match="at least 2"):
        unit_scaling(counts[:1])
