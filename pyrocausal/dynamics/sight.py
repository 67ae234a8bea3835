"""What is seen of a course: cells at one time or units at several, the law of what they show, and the posterior of what they do not.

With the exogenous state ``z = (w, z_0, ..., z_T)`` and linear steps, ``(w, u_f) = z A_f + k_f`` at the F times at which a cell was seen. It
shows these through a linear observation with independent noise of precision Lambda::

    y_f = (w, u_f) W + bias + noise,    M = I + sum_f A_f W Lambda W' A_f',    b = sum_f A_f W Lambda (y_f - bias - k_f W)
    z | y ~ Normal(M^-1 b, M^-1)
    log p(y) = sum_f log Normal(y_f; bias + k_f W, Lambda^-1) - log |M| / 2 + b' M^-1 b / 2

so that no matrix over genes is factored.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, NamedTuple

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import Independent, MultivariateNormal, Normal, constraints
from torch.distributions.kl import register_kl

from pyrocausal.dynamics.course import Step, loadings
from pyrocausal.dynamics.stationary import Moments


class Sight(NamedTuple):
    """``s_f = (w, u_f) = z A_f + k_f`` of R kinds of cells at F times.

    Attributes:
        maps: A, [R, F, e, s], with e = I + (T + 1) D coordinates of z and s = I + D of what is seen. offsets: k, [R, F, s].
        seen: whether the cells were, [R, F], 1 or 0. row: kind of each cell, [n].
    """

    maps: Tensor
    offsets: Tensor
    seen: Tensor
    row: Tensor


def sight(steps: list[Step], row: Tensor, look: Tensor) -> Sight:
    """What cells show.

    Args:
        steps: of R courses. row: course of each cell, [n].
        look: positions of the times at which each cell was seen, [n, F]; -1 for a time at which it was not.
    """
    A, k = loadings(steps)
    n_w = steps[0].invariant.shape[-2]
    kinds, kind = torch.unique(torch.cat([row.unsqueeze(-1), look], -1), dim=0, return_inverse=True)
    course, at = kinds[:, :1], kinds[:, 1:].clamp_min(0)
    A, k = A[course, at], k[course, at]
    eye = torch.eye(A.shape[-2], n_w, dtype=A.dtype, device=A.device).expand(*A.shape[:-1], n_w)
    return Sight(torch.cat([eye, A], -1), torch.cat([k.new_zeros(*k.shape[:-1], n_w), k], -1), (kinds[:, 1:] >= 0).to(k.dtype), kind)


class Observation(NamedTuple):
    """``y = s W + bias + noise``: W [s, G], bias [G], precision of the noise [G]."""

    loadings: Tensor
    bias: Tensor
    precision: Tensor


def _normal_equations(sight: Sight, y: Tensor, o: Observation) -> tuple[Tensor, Tensor]:
    """A Cholesky factor of M of each kind, [R, e, e], and b of each cell, [n, e]."""
    A, k, seen, row = sight
    inner = (o.loadings * o.precision) @ o.loadings.T  # [s, s]
    A = A * seen[..., None, None]
    M = torch.eye(A.shape[-2], dtype=A.dtype, device=A.device) + (A @ inner @ A.mT).sum(1)
    pull = ((y - o.bias) * o.precision) @ o.loadings.T - (k @ inner)[row]  # [n, F, s]
    b = torch.einsum("nfes,nfs->ne", A[row], pull)
    return torch.linalg.cholesky(M), b


def posterior(sight: Sight, y: Tensor, o: Observation) -> dist.MultivariateNormal:
    """Law of z given ``y`` [n, F, G] (anything where nothing was seen)."""
    factor, b = _normal_equations(sight, y, o)
    loc = torch.cholesky_solve(b.unsqueeze(-1), factor[sight.row]).squeeze(-1)
    return dist.MultivariateNormal(loc, scale_tril=_scale_of(factor)[sight.row])


def _scale_of(factor: Tensor) -> Tensor:
    """Lower triangular L with ``L L' = (factor factor')^-1``."""
    back = torch.linalg.inv_ex(factor)[0].mT  # upper triangular R: R R' = M^-1
    return torch.linalg.cholesky(back @ back.mT)


class Seen(TorchDistribution):
    """The law of what cells show, their course unknown; event [G], or [F, G] for units seen at several times.

    Args:
        sight: of the n cells. observation: linear.
        weight: probabilities of H courses of each cell, [n, H]; the kinds of cell i under course h are then ``sight.row[i H + h]``.
        flat: the event is [G] (F = 1).
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    has_rsample = False

    def __init__(self, sight: Sight, observation: Observation, weight: Tensor | None = None, flat: bool = True) -> None:
        self.sight, self.observation, self.weight, self.flat = sight, observation, weight, flat
        F, G = sight.seen.shape[1], len(observation.bias)
        n = len(sight.row) if weight is None else len(weight)
        super().__init__(torch.Size([n]), torch.Size([G] if flat else [F, G]), validate_args=False)

    @property
    def support(self) -> Any:
        return constraints.independent(constraints.real, 1 if self.flat else 2)

    @property
    def mean(self) -> Tensor:
        o = self.observation
        each = (self.sight.offsets @ o.loadings + o.bias)[self.sight.row]
        if self.weight is not None:
            each = (each.unflatten(0, self.weight.shape) * self.weight[..., None, None]).sum(1)
        return each.squeeze(-2) if self.flat else each

    def log_prob(self, value: Tensor) -> Tensor:
        """[n], in nats, of what was seen."""
        y = value.unsqueeze(-2) if self.flat else value
        if self.weight is None:
            return _log_prob(self.sight, y, self.observation)
        each = _log_prob(self.sight, y.repeat_interleave(self.weight.shape[1], 0), self.observation).unflatten(0, self.weight.shape)
        return (each + self.weight.clamp_min(1e-30).log()).logsumexp(-1)


def _log_prob(sight: Sight, y: Tensor, o: Observation) -> Tensor:
    factor, b = _normal_equations(sight, y, o)
    off = y - o.bias - (sight.offsets @ o.loadings)[sight.row]
    each = -0.5 * ((off.square() * o.precision).sum(-1) + len(o.bias) * math.log(2 * math.pi) - o.precision.log().sum())
    log_det = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    half = torch.linalg.solve_triangular(factor[sight.row], b.unsqueeze(-1), upper=False).squeeze(-1)
    return (each * sight.seen[sight.row]).sum(-1) - log_det[sight.row] + 0.5 * half.square().sum(-1)


class SeenMoments(TorchDistribution):
    """:class:`Seen` for all cells of a condition at once: the value is their mean, and the log-probability that of all of them.

    Args:
        sight: one cell for each condition. observation: linear.
        moments: weights and covariances of the conditions, [Q] and [Q, F G, F G]; the plate over the rows gives the sum over the cells.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    support = constraints.real_vector
    has_rsample = False

    def __init__(self, sight: Sight, observation: Observation, moments: Moments) -> None:
        A, k, _, row = sight
        o, F = observation, sight.offsets.shape[1]
        self.loc = (k @ o.loadings + o.bias).flatten(1)[row]  # [Q, F G]
        self.root = (A @ o.loadings).transpose(1, 2).flatten(2)[row]  # [Q, e, F G]
        self.precision, self.moments = o.precision.repeat(F), moments
        super().__init__(self.loc.shape[:-1], self.loc.shape[-1:], validate_args=False)

    @property
    def mean(self) -> Tensor:
        return self.loc

    @property
    def covariance(self) -> Tensor:
        """[Q, F G, F G]."""
        return self.root.mT @ self.root + torch.diag(1 / self.precision)

    def log_prob(self, value: Tensor) -> Tensor:
        """[Q], in nats."""
        weight, within = self.moments.weight, self.moments.within
        scaled = self.root * self.precision
        factor = torch.linalg.cholesky(torch.eye(scaled.shape[-2], dtype=scaled.dtype, device=scaled.device) + scaled @ self.root.mT)
        half = torch.linalg.solve_triangular(factor, scaled, upper=False)  # [Q, e, F G]: Lambda - half' half is the inverse covariance
        off = value - self.loc
        spread = (within.diagonal(dim1=-2, dim2=-1) * self.precision).sum(-1) - ((half @ within) * half).sum((-2, -1))
        size = (off.square() * self.precision).sum(-1) - (half @ off.unsqueeze(-1)).square().sum((-2, -1))
        log_det = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1) - 0.5 * self.precision.log().sum()
        each = -0.5 * value.shape[-1] * math.log(2 * math.pi) - log_det - 0.5 * (spread + size)
        return weight * (len(weight) / weight.sum()) * each


def glimpsed(sight: Sight, value: Tensor, precision: Tensor, mix: Tensor | None = None) -> dist.MultivariateNormal:
    """Law of z given a noisy glimpse of s itself, ``value mix ~ Normal((z A + k) mix, 1 / precision)``; value and precision [n, F, s],
    mix [s, s], the identity if None."""
    A, k, seen, row = sight
    if mix is not None:
        A, k, value = A @ mix, k @ mix, value @ mix
    scaled = A[row] * (precision * seen[row].unsqueeze(-1)).unsqueeze(-2)  # [n, F, e, s]
    M = torch.eye(A.shape[-2], dtype=A.dtype, device=A.device) + (scaled @ A[row].mT).sum(1)
    b = torch.einsum("nfes,nfs->ne", scaled, value - k[row])
    factor = torch.linalg.cholesky(0.5 * (M + M.mT))
    return dist.MultivariateNormal(torch.cholesky_solve(b.unsqueeze(-1), factor).squeeze(-1), precision_matrix=M)


@register_kl(MultivariateNormal, Independent)
def _kl_standard(q: MultivariateNormal, p: Independent) -> Tensor:
    """To independent normals."""
    base = p.base_dist
    if not isinstance(base, Normal) or p.reinterpreted_batch_ndims != 1:
        raise NotImplementedError
    log_det = base.scale.expand(q.loc.shape).log().sum(-1) - q.scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    trace = (q.scale_tril.square().sum(-1) / base.scale.square()).sum(-1)
    return log_det + 0.5 * (trace + ((q.loc - base.loc) / base.scale).square().sum(-1) - q.loc.shape[-1])


__all__ = ["Observation", "Seen", "SeenMoments", "Sight", "glimpsed", "posterior", "sight"]
