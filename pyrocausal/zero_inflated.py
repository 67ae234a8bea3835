"""Zero-inflated counts, and the likelihood of every cell under every state.

A gene is silent in a cell with probability ``gate``, whatever its rate; otherwise it is counted::

    h_j ~ Bernoulli(gate_j),    x_j = 0 if h_j else Poisson(mu_j)  (or NB(mu_j, theta_j))
    p(0) = gate + (1 - gate) p0,    p(x) = (1 - gate) count(x)  for x > 0

The distributions are vectors over genes (event shape ``[n_genes]``), as in :mod:`pyrocausal.distributions`. The zero-inflated Poisson is
the measurement of Latent Causal Diffusions (Lorch, Zhang, Bunne, Krause, Schoelkopf and Uhler 2026, arXiv 2601.15341).
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributions import Gamma, constraints

from pyrocausal.distributions import TINY, _CountVector
from pyrocausal.errors import DataError, InterventionError
from pyrocausal.loading import Nonzeros

SAME_RATE = 1e-5  # rates closer than this (relative) are the same rate: float32 networks differ in the last digits


class _ZeroInflated(_CountVector):
    """What the two share. Subclasses give the count law's log p(0) and log p(x) for x > 0 without its factorial, entry by entry."""

    def __init__(self, mu: Tensor, gate: Tensor, nonzeros: Nonzeros | None, validate_args: bool | None) -> None:
        self.gate = gate
        super().__init__(mu, nonzeros, validate_args)

    @property
    def mean(self) -> Tensor:
        """``(1 - gate) mu``, [..., n, n_genes]."""
        return (1 - self.gate) * self.mu

    def _log_silent(self) -> Tensor:
        raise NotImplementedError

    def _log_positive(self, x: Tensor, mu: Tensor, gene: Tensor | None) -> Tensor:
        raise NotImplementedError

    def _log_open(self) -> Tensor:
        return torch.log1p(-self.gate)

    def log_zero(self) -> Tensor:
        """log p(0) of each gene, [..., n, n_genes]."""
        return torch.logaddexp(self.gate.clamp_min(TINY).log(), self._log_open() + self._log_silent())

    def log_prob(self, value: Tensor) -> Tensor:
        """log p(x) summed over genes, [..., n]."""
        if self._validate_args:
            self._validate_sample(value)
        log_zero = self.log_zero()
        nz = self._pieces(value)
        if nz is None or self._log_open().dim() > 1:
            positive = self._log_open() + self._log_positive(value, self.mu, None) - torch.lgamma(value + 1)
            return torch.where(value > 0, positive, log_zero).sum(-1)
        at = log_zero.flatten(-2)[..., nz.flat]
        term = self._log_open()[nz.gene] + self._log_positive(nz.value, self.mu.flatten(-2)[..., nz.flat], nz.gene) - at
        return log_zero.sum(-1).index_add(-1, nz.row, term) - nz.log_factorial

    @torch.no_grad()
    def sample(self, sample_shape: Any = ()) -> Tensor:
        shape = self._shape(sample_shape)
        silent = torch.rand(shape, dtype=self.mu.dtype, device=self.mu.device) < self.gate
        return torch.where(silent, 0.0, torch.poisson(self._rate(shape)))

    def _rate(self, shape: torch.Size) -> Tensor:
        """A draw of the Poisson rate of counts that are not silent."""
        return self.mu.expand(shape)

    def _rate_given(self, x: Tensor) -> Tensor:
        """A draw of the Poisson rate given the count."""
        return self.mu

    @torch.no_grad()
    def carry(self, value: Tensor, new: _ZeroInflated) -> Tensor:
        """The same cells' counts under another mean: a silent gene stays silent, the others by Poisson thinning.

        ``h | x = 0`` is Bernoulli(gate / p(0)); where h = 0, ``x' | x ~ Binomial(x, mu'/mu)`` if ``mu' <= mu``, else
        ``x + Poisson(mu' - mu)``. The law of x' is exactly that of ``new``.

        Raises:
            InterventionError: if more than the mean is changed.
        """
        for name in ("gate", "theta"):
            ours, theirs = getattr(self, name, None), getattr(new, name, None)
            if ours is not None and (theirs is None or not torch.equal(*torch.broadcast_tensors(ours, theirs))):
                raise InterventionError(f"the intervention moves the {name} of the counts, which thinning cannot follow; use noise='mean'")
        p_silent = torch.where(value > 0, 0.0, (self.gate.clamp_min(TINY).log() - self.log_zero()).exp())
        silent = torch.rand_like(p_silent) < p_silent
        ratio = new.mu / self.mu.clamp_min(TINY)
        ratio = torch.where((ratio - 1).abs() <= SAME_RATE, 1.0, ratio)
        rate = self._rate_given(value)
        keep = ratio.clamp(max=1.0)
        thinned = torch.binomial(value.expand(keep.shape).contiguous(), keep.contiguous())
        return torch.where(silent, 0.0, thinned + torch.poisson((ratio - 1).clamp_min(0.0) * rate))


class ZeroInflatedPoisson(_ZeroInflated):
    """Poisson counts with silent genes, a vector over genes.

    Args:
        mu: rate of a gene that is not silent, [..., n, n_genes].
        gate: probability of silence, from 0 to below 1, [n_genes] or broadcastable to ``mu``.
        nonzeros: ``batch.nonzeros``; optional.
    """

    arg_constraints: ClassVar = {
        "mu": constraints.independent(constraints.nonnegative, 1),
        "gate": constraints.independent(constraints.unit_interval, 1),
    }

    def __init__(self, mu: Tensor, gate: Tensor, nonzeros: Nonzeros | None = None, validate_args: bool | None = None) -> None:
        super().__init__(mu, gate, nonzeros, validate_args)

    @property
    def variance(self) -> Tensor:
        return self.mean * (1 + self.gate * self.mu)

    def _log_silent(self) -> Tensor:
        return -self.mu

    def _log_positive(self, x: Tensor, mu: Tensor, gene: Tensor | None) -> Tensor:
        return x * mu.clamp_min(TINY).log() - mu

    def expand(self, batch_shape: Any, _instance: Any = None) -> ZeroInflatedPoisson:
        mu = self.mu.expand(torch.Size(batch_shape) + self.event_shape)
        return ZeroInflatedPoisson(mu, self.gate, self.nonzeros, validate_args=False)


class ZeroInflatedNegativeBinomial(_ZeroInflated):
    """Negative binomial counts with silent genes, a vector over genes.

    Args:
        mu: mean of a gene that is not silent, [..., n, n_genes].
        theta: inverse dispersion (``Var = mu + mu^2 / theta``), [n_genes].
        gate: probability of silence, from 0 to below 1, [n_genes].
        nonzeros: ``batch.nonzeros``; optional.
    """

    arg_constraints: ClassVar = {
        "mu": constraints.independent(constraints.nonnegative, 1),
        "theta": constraints.independent(constraints.positive, 1),
        "gate": constraints.independent(constraints.unit_interval, 1),
    }

    def __init__(
        self, mu: Tensor, theta: Tensor, gate: Tensor, nonzeros: Nonzeros | None = None, validate_args: bool | None = None
    ) -> None:
        self.theta = theta
        super().__init__(mu, gate, nonzeros, validate_args)

    @property
    def variance(self) -> Tensor:
        return self.mean * (1 + self.mu / self.theta + self.gate * self.mu)

    def _log_silent(self) -> Tensor:
        return -self.theta * torch.log1p(self.mu / self.theta)

    def _log_positive(self, x: Tensor, mu: Tensor, gene: Tensor | None) -> Tensor:
        theta = self.theta if gene is None else self.theta[gene]
        log_t = (mu + theta).log()
        constant = torch.lgamma(x + theta) - torch.lgamma(theta)
        return constant + theta * (theta.log() - log_t) + x * (mu.clamp_min(TINY).log() - log_t)

    def _rate(self, shape: torch.Size) -> Tensor:
        theta = self.theta.expand(shape)
        return self.mu.expand(shape) * Gamma(theta, theta, validate_args=False).sample()

    def _rate_given(self, x: Tensor) -> Tensor:
        shape, rate = (self.theta + x), (self.theta + self.mu)
        return self.mu * Gamma(shape.expand(rate.shape), rate, validate_args=False).sample()

    def expand(self, batch_shape: Any, _instance: Any = None) -> ZeroInflatedNegativeBinomial:
        mu = self.mu.expand(torch.Size(batch_shape) + self.event_shape)
        return ZeroInflatedNegativeBinomial(mu, self.theta, self.gate, self.nonzeros, validate_args=False)


# -- every cell under every state ------------------------------------------------------------------------------------------------


def pairwise_zip(y: Tensor, rate: Tensor, gate: Tensor) -> Tensor:
    """Zero-inflated Poisson log-likelihood of every cell under every state, summed over genes, [..., N, M].

    With ``z = 1[y = 0]``, ``a = log(gate + (1 - gate) e^-rate)`` and ``b = log(1 - gate) - rate``::

        l = z a' + (1 - z) b' + y (log rate)' - sum log y!

    three matrix products; nothing of N x M x d numbers is made, neither here nor in the gradient, which is in closed form and keeps only
    the arguments. A rate below 1e-30 counts as that where y > 0.

    Args:
        y: counts, [..., N, d]; no gradient.
        rate: Poisson rates of the states, [..., M, d].
        gate: probability of silence, from 0 to below 1, [d].
    """
    return _PairwiseZIP.apply(y, rate, gate)


class _PairwiseZIP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, rate: Tensor, gate: Tensor) -> Tensor:
        ctx.save_for_backward(y, rate, gate)
        log_open = torch.log1p(-gate)
        zero = (y == 0).to(rate.dtype)
        out = y @ rate.clamp_min(TINY).log_().mT
        out -= (1 - zero) @ rate.mT
        out += zero @ _log_zero(rate, gate).mT
        out += ((1 - zero) @ log_open - torch.lgamma(y + 1).sum(-1))[..., None]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[None, Tensor | None, Tensor | None]:
        y, rate, gate = ctx.saved_tensors
        g = grads[0].mT  # [..., M, N]
        zero = (y == 0).to(rate.dtype)
        at_zero = g @ zero  # [..., M, d]
        grad_rate = grad_gate = None
        if ctx.needs_input_grad[2]:
            ratio = torch.exp(torch.log(-torch.expm1(-rate)) - _log_zero(rate, gate))  # (1 - e^-rate) / p(0)
            grad_gate = (at_zero * ratio).flatten(0, -2).sum(0)
            per_cell = g.sum(-2, keepdim=True)  # [..., 1, N]
            grad_gate -= (per_cell @ (1 - zero)).flatten(0, -2).sum(0) / (1 - gate)
        if ctx.needs_input_grad[1]:
            share = torch.sigmoid(torch.log1p(-gate) - gate.clamp_min(TINY).log() - rate)  # of zeros that are counts, in p(0)
            grad_rate = at_zero.mul_(share).neg_()
            grad_rate -= g @ (1 - zero)
            grad_rate += torch.where(rate > TINY, (g @ y) / rate.clamp_min(TINY), 0.0)
        return None, grad_rate, grad_gate


def _log_zero(rate: Tensor, gate: Tensor) -> Tensor:
    return torch.logaddexp(gate.clamp_min(TINY).log(), torch.log1p(-gate) - rate)


def unit_scaling(counts: Tensor) -> Tensor:
    """Rate of each gene when it is on, from control counts [n, d]: ``max((var + mean^2) / mean - 1, 1)``, [d].

    ``E[y^2] / E[y] - 1`` is the rate of a zero-inflated Poisson whatever its gate (method of moments); var has n - 1 in its denominator. A
    gene without counts has 1.

    Raises:
        DataError: if there are fewer than two cells.
    """
    if len(counts) < 2:
        raise DataError(f"{len(counts)} control cells were given; the spread of a gene needs at least 2")
    mean = counts.mean(0)
    moment = (counts.var(0) + mean.square()) / mean.clamp_min(TINY) - 1
    return torch.where(mean > 0, moment, 0.0).clamp_min(1.0)


__all__ = ["ZeroInflatedNegativeBinomial", "ZeroInflatedPoisson", "pairwise_zip", "unit_scaling"]
