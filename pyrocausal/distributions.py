"""Likelihoods of counts, fast at the sparsity of single cells, and the hard mask distribution.

The count distributions are vectors over genes (event shape ``[n_genes]``), parameterised by their mean. Special functions are evaluated
at the non-zero counts only, and gradients are in closed form. For theta + mu = t, the negative binomial is

    log NB(x; mu, theta) = theta log theta - theta log t                                                   (dense: one log)
                           + x (log mu - log t) + lgamma(x + theta) - lgamma(theta) - lgamma(x + 1)        (non-zeros only)
    d/d mu    = -theta / t  +  x theta / (mu t)
    d/d theta = log theta + 1 - log t - theta / t  -  x / t + digamma(x + theta) - digamma(theta)
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pyro.distributions import Bernoulli, Gamma, TorchDistribution
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.utils import broadcast_all

from pyrocausal.loading import Nonzeros

TINY = 1e-30  # floor of a mean whose logarithm is taken (a softmax may underflow in float32)


class _NegativeBinomialLogProb(torch.autograd.Function):
    """sum_g log NB(x_g; mu_g, theta_g): [..., n, G], [G] -> [..., n]."""

    @staticmethod
    def forward(ctx: Any, mu: Tensor, theta: Tensor, nz: Nonzeros) -> Tensor:
        lead, (n, n_genes) = mu.shape[:-2], mu.shape[-2:]
        t = mu + theta
        log_t = t.log()
        dense = (theta * theta.log()).sum() - log_t @ theta  # [..., n]
        mu_nz = mu.reshape(*lead, n * n_genes)[..., nz.flat].clamp_min(TINY)
        theta_nz = theta[nz.gene]
        log_t_nz = log_t.reshape(*lead, n * n_genes)[..., nz.flat]
        term = nz.value * (mu_nz.log() - log_t_nz) + (torch.lgamma(nz.value + theta_nz) - torch.lgamma(theta)[nz.gene])
        ctx.save_for_backward(mu, theta, t, log_t, mu_nz)
        ctx.nz = nz
        return dense.index_add(-1, nz.row, term) - nz.log_factorial

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, Tensor | None, None]:
        mu, theta, t, log_t, mu_nz = ctx.saved_tensors
        nz: Nonzeros = ctx.nz
        (grad,) = grads
        lead = mu.shape[:-2]
        if torch.is_grad_enabled():  # a second derivative is asked for: the pieces as functions of mu and theta again
            t = mu + theta
            log_t, mu_nz = t.log(), mu.reshape(*lead, -1)[..., nz.flat].clamp_min(TINY)
        ratio = theta / t  # [..., n, G]
        theta_nz = theta[nz.gene]
        ratio_nz = ratio.reshape(*lead, -1)[..., nz.flat]
        grad_mu = grad_theta = None
        if ctx.needs_input_grad[0]:
            grad_mu = (ratio * -grad[..., None]).reshape(*lead, -1)
            at_nonzeros = nz.value * ratio_nz / mu_nz * grad[..., nz.row]
            add = grad_mu.index_add if torch.is_grad_enabled() else grad_mu.index_add_
            grad_mu = add(-1, nz.flat, at_nonzeros).reshape(mu.shape)
        if ctx.needs_input_grad[1]:
            per_gene = (theta.log() + 1) * grad.sum()
            for part in (log_t, ratio):
                per_gene = per_gene - torch.einsum("...g,...->g", part, grad)
            term = torch.digamma(nz.value + theta_nz) - torch.digamma(theta)[nz.gene] - nz.value * ratio_nz / theta_nz
            flat = (term * grad[..., nz.row]).reshape(lead.numel(), len(nz.gene)).sum(0)
            grad_theta = per_gene.index_add(0, nz.gene, flat)
        return grad_mu, grad_theta, None


def _dense_negative_binomial(x: Tensor, mu: Tensor, theta: Tensor) -> Tensor:
    """The same sum for dense counts, or for a theta that differs between cells."""
    log_t = (mu + theta).log()
    constant = torch.lgamma(x + theta) - torch.lgamma(theta) - torch.lgamma(x + 1)
    return (theta * (theta.log() - log_t) + torch.xlogy(x, mu.clamp_min(TINY)) - x * log_t + constant).sum(-1)


class _CountVector(TorchDistribution):
    """What the count vectors share: a mean [..., n, G] whose last dimension is the event."""

    has_rsample = False
    support = constraints.independent(constraints.nonnegative_integer, 1)

    def __init__(self, mu: Tensor, nonzeros: Nonzeros | None, validate_args: bool | None) -> None:
        self.mu = mu
        self.nonzeros = nonzeros
        super().__init__(mu.shape[:-1], mu.shape[-1:], validate_args=validate_args)

    @property
    def mean(self) -> Tensor:
        return self.mu

    def _shape(self, sample_shape: Any) -> torch.Size:
        return torch.Size(sample_shape) + self.batch_shape + self.event_shape

    def _pieces(self, value: Tensor) -> Nonzeros | None:
        """The sparse pieces, if they belong to this very tensor and the mean has its rows."""
        nz = self.nonzeros
        return nz if nz is not None and nz.dense is value and self.mu.shape[-2:] == value.shape[-2:] else None


class NegativeBinomial(_CountVector):
    """Counts with ``Var x = mu + mu^2 / theta``, a vector over genes.

    Args:
        mu: mean, [..., n, n_genes] (library size included).
        theta: inverse dispersion, [n_genes] or broadcastable to ``mu``.
        nonzeros: ``batch.nonzeros``, so that the non-zeros of ``batch.x`` need not be found again; optional.
    """

    arg_constraints: ClassVar = {"mu": constraints.independent(constraints.nonnegative, 1), "theta": constraints.positive}

    def __init__(self, mu: Tensor, theta: Tensor, nonzeros: Nonzeros | None = None, validate_args: bool | None = None) -> None:
        self.theta = theta
        super().__init__(mu, nonzeros, validate_args)

    @property
    def variance(self) -> Tensor:
        return self.mu + self.mu**2 / self.theta

    def log_prob(self, value: Tensor) -> Tensor:
        """log p(x) summed over genes, [..., n]."""
        if self._validate_args:
            self._validate_sample(value)
        nz = self._pieces(value)
        if nz is not None and self.theta.dim() == 1:
            return _NegativeBinomialLogProb.apply(self.mu, self.theta, nz)
        return _dense_negative_binomial(value, self.mu, self.theta)

    @torch.no_grad()
    def sample(self, sample_shape: Any = ()) -> Tensor:
        mu, theta = self.mu.expand(self._shape(sample_shape)), self.theta.expand(self._shape(sample_shape))
        return torch.poisson(mu * Gamma(theta, theta, validate_args=False).sample())

    def expand(self, batch_shape: Any, _instance: Any = None) -> NegativeBinomial:
        mu = self.mu.expand(torch.Size(batch_shape) + self.event_shape)
        return NegativeBinomial(mu, self.theta, self.nonzeros, validate_args=False)


class Poisson(_CountVector):
    """Poisson counts, a vector over genes.

    Args:
        mu: mean, [..., n, n_genes].
        nonzeros: ``batch.nonzeros``; optional.
    """

    arg_constraints: ClassVar = {"mu": constraints.independent(constraints.nonnegative, 1)}

    def __init__(self, mu: Tensor, nonzeros: Nonzeros | None = None, validate_args: bool | None = None) -> None:
        super().__init__(mu, nonzeros, validate_args)

    @property
    def variance(self) -> Tensor:
        return self.mu

    def log_prob(self, value: Tensor) -> Tensor:
        """log p(x) summed over genes, [..., n]."""
        if self._validate_args:
            self._validate_sample(value)
        nz = self._pieces(value)
        if nz is None:
            return (torch.xlogy(value, self.mu.clamp_min(TINY)) - self.mu - torch.lgamma(value + 1)).sum(-1)
        mu_nz = self.mu.flatten(-2)[..., nz.flat].clamp_min(TINY)
        return (-self.mu.sum(-1)).index_add(-1, nz.row, nz.value * mu_nz.log()) - nz.log_factorial

    @torch.no_grad()
    def sample(self, sample_shape: Any = ()) -> Tensor:
        return torch.poisson(self.mu.expand(self._shape(sample_shape)))

    def expand(self, batch_shape: Any, _instance: Any = None) -> Poisson:
        return Poisson(self.mu.expand(torch.Size(batch_shape) + self.event_shape), self.nonzeros, validate_args=False)


class StraightThroughBernoulli(Bernoulli):
    """A Bernoulli whose samples are hard and whose gradient is that of the binary concrete relaxation.

    ``y_soft = sigmoid((logits + logit u) / temperature)``, ``y = 1[y_soft > 1/2] + y_soft - stop_gradient(y_soft)``. Densities, and so the
    KL divergence, are those of the plain Bernoulli at the hard sample (as in sVAE+ and SAMS-VAE).
    """

    has_rsample = True

    def __init__(self, probs: Any = None, logits: Any = None, temperature: float = 1.0, validate_args: bool | None = None) -> None:
        self.temperature = temperature
        super().__init__(probs=probs, logits=logits, validate_args=validate_args)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        logits = self.logits.expand(self._extended_shape(torch.Size(sample_shape)))
        uniform = torch.rand_like(logits).clamp(1e-7, 1 - 1e-7)
        soft = torch.sigmoid((logits + uniform.log() - (-uniform).log1p()) / self.temperature)
        return (soft > 0.5).to(soft.dtype) - soft.detach() + soft

    def sample(self, sample_shape: Any = ()) -> Tensor:
        with torch.no_grad():
            return self.rsample(sample_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        logits, value = broadcast_all(self.logits, value)
        return -torch.nn.functional.binary_cross_entropy_with_logits(logits, value, reduction="none")

    def expand(self, batch_shape: Any, _instance: Any = None) -> StraightThroughBernoulli:
        return StraightThroughBernoulli(logits=self.logits.expand(batch_shape), temperature=self.temperature, validate_args=False)


__all__ = ["NegativeBinomial", "Poisson", "StraightThroughBernoulli"]
