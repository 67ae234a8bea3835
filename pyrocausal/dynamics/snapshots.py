"""Cells that are seen once: the law of a condition's moments, and the posterior of a path given one glimpse of it."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import Independent, MultivariateNormal, Normal, constraints
from torch.distributions.kl import register_kl

from pyrocausal.dynamics.stationary import Moments


class ConditionNormal(TorchDistribution):
    """``Normal(loc, covariance)`` of the cells of each condition; the value is their mean, and the log-probability that of all of them.

    Args:
        loc: [Q, G]. covariance: [Q, G, G].
        moments: weights and covariances of the conditions; the plate over the rows gives the sum over the cells.
    """

    arg_constraints: ClassVar = {"loc": constraints.real_vector}
    support = constraints.real_vector
    has_rsample = False

    def __init__(self, loc: Tensor, covariance: Tensor, moments: Moments, validate_args: bool | None = None) -> None:
        self.loc, self.covariance, self.moments = loc, covariance, moments
        super().__init__(loc.shape[:-1], loc.shape[-1:], validate_args=validate_args)

    @property
    def mean(self) -> Tensor:
        return self.loc

    def sample(self, sample_shape: Any = ()) -> Tensor:
        return MultivariateNormal(self.loc, self.covariance).sample(sample_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """[Q], in nats."""
        factor = torch.linalg.cholesky(self.covariance)
        weight, within = self.moments.weight, self.moments.within
        spread = (torch.cholesky_inverse(factor) * within).sum((-2, -1))
        off = torch.linalg.solve_triangular(factor, (value - self.loc).unsqueeze(-1), upper=False).squeeze(-1)
        log_det = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        each = -0.5 * self.loc.shape[-1] * math.log(2 * math.pi) - log_det - 0.5 * (spread + off.square().sum(-1))
        return weight * (len(weight) / weight.sum()) * each


def glimpsed(loadings: Tensor, offset: Tensor, value: Tensor, precision: Tensor) -> dist.MultivariateNormal:
    """Posterior of ``e ~ Normal(0, I)`` [n, m] given ``value ~ Normal(e A + k, precision^-1)``.

    Args:
        loadings: A, [n, m, s]. offset: k, [n, s]. value: [n, s]. precision: [n, s] (independent) or [s, s].
    """
    scaled = loadings * precision.unsqueeze(-2) if precision.dim() == 2 and len(precision) == len(value) else loadings @ precision
    total = torch.eye(loadings.shape[-2], dtype=loadings.dtype, device=loadings.device) + scaled @ loadings.mT
    factor = torch.linalg.cholesky(0.5 * (total + total.mT))
    loc = torch.cholesky_solve(scaled @ (value - offset).unsqueeze(-1), factor).squeeze(-1)
    return dist.MultivariateNormal(loc, precision_matrix=total)


@register_kl(MultivariateNormal, Independent)
def _kl_standard(q: MultivariateNormal, p: Independent) -> Tensor:
    """To independent normals."""
    base = p.base_dist
    if not isinstance(base, Normal) or p.reinterpreted_batch_ndims != 1:
        raise NotImplementedError
    log_det = base.scale.expand(q.loc.shape).log().sum(-1) - q.scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    trace = (q.scale_tril.square().sum(-1) / base.scale.square()).sum(-1)
    return log_det + 0.5 * (trace + ((q.loc - base.loc) / base.scale).square().sum(-1) - q.loc.shape[-1])


__all__ = ["ConditionNormal", "glimpsed"]
