"""The stationary law of a linear stochastic differential equation, in row vectors.

    dx = (x M + b) dt + dW diag(sigma)          M [d, d]: entry (j, k) is what j does to k
    mu = -b M^-1                                stationary mean
    M' S + S M + diag(sigma^2) = 0              stationary covariance (pyrocausal.dynamics.lyapunov)

**Chart.** Every stable M with its S is ``M = S^-1 (-Q - D/2)`` with S positive definite and Q skew, and every such pair is a stable system
(the drift of a diffusion is a gradient part and a rotation). :func:`stable_drift` writes it; fitting moves S and Q, and never leaves the
stable systems nor solves an equation.

**Twins.** Two systems that the same noise drives have the cross-covariance C of a Sylvester equation. :meth:`StationaryNormal.carry` takes
a cell from one to the other accordingly: where only the production changes, the cell is moved by the change of the mean.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pandas as pd
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import Independent, Normal, constraints
from torch.distributions.kl import register_kl

from pyrocausal.dynamics.lyapunov import lyapunov, spectral_abscissa, sylvester
from pyrocausal.errors import DataError, PyrocausalError

if TYPE_CHECKING:
    from pyrocausal.data import PerturbationData


@dataclass(frozen=True)
class Moments:
    """What a Gaussian law needs of the cells of Q conditions, whose means are the rows of the batch.

    Attributes:
        weight: cells of each condition, [..., Q].
        within: covariance of the cells about the mean of their condition, pooled [..., d, d] or of each condition [..., Q, d, d].
    """

    weight: Tensor
    within: Tensor


def condition_moments(
    data: PerturbationData, pooled: bool = True, weights: Tensor | None = None, by_time: bool = False
) -> tuple[Tensor, Tensor, Moments, Tensor | None]:
    """Treatments [Q, P], means [Q, d], :class:`Moments`, and times [Q] or None, of the conditions of a screen, in float64.

    Args:
        pooled: one covariance for all conditions (as a shift leaves it), or one for each.
        weights: of the cells, [n_cells]; one each if None.
        by_time: cells of one treatment at different times are different conditions; units that were seen at all times, whole paths.

    Raises:
        DataError: if the pooled covariance is singular (fewer cells than genes, or a gene without variance).
    """
    codes = pd.Categorical(data.labels, categories=data.conditions).codes.astype(np.int64)
    paths = by_time and data.path is not None
    if by_time and data.time is not None and not paths:
        codes = codes * (1 + len(data)) + np.unique(data.time, return_inverse=True)[1]
    labels, codes = np.unique(codes, return_inverse=True)
    code = torch.as_tensor(codes)
    x = torch.as_tensor(data.path.reshape(len(data), -1).astype(np.float64) if paths else data.dense(np.float64))  # type: ignore[union-attr]
    w = torch.ones(len(data), dtype=x.dtype) if weights is None else weights.to(x.dtype)
    size = torch.zeros(len(labels), dtype=x.dtype).index_add(0, code, w)
    mean = torch.zeros(len(labels), x.shape[1], dtype=x.dtype).index_add(0, code, w[:, None] * x) / size[:, None]
    centred = (x - mean[code]) * w.sqrt()[:, None]
    if pooled:
        within = centred.T @ centred / size.sum()
        if not bool(torch.linalg.eigvalsh(within)[0] > 1e-10 * within.diagonal().mean()):
            raise DataError(f"the covariance of {x.shape[1]} genes over {len(data):,} cells is singular; leave out genes without variance")
    else:
        within = torch.stack([centred[code == q].T @ centred[code == q] / size[q] for q in range(len(labels))])
    first = np.unique(code.numpy(), return_index=True)[1]
    dose = torch.as_tensor(data.dose[first].toarray(), dtype=x.dtype)
    time = torch.as_tensor(data.time[first].astype(np.float64)) if by_time and data.time is not None else None
    return dose, mean, Moments(size, within), time


def stable_drift(factor: Tensor, curl: Tensor, diffusion: Tensor) -> Tensor:
    """``M = S^-1 (-Q - D/2)``, whose stationary covariance is ``S = factor factor'``, [..., d, d].

    Args:
        factor: lower triangular, [..., d, d].
        curl: Q, skew, [..., d, d].
        diffusion: diagonal of D, [..., d].
    """
    return torch.cholesky_solve(-curl - 0.5 * torch.diag_embed(diffusion), factor)


def linear_system(
    chart: Tensor, unit: Tensor, covariance_free: Tensor, curl_free: Tensor, log_sigma: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """M, a factor F of S, and the diagonal of D, from free coordinates.

        F = F0 (strict lower + exp(diagonal)),   Q = F0 (upper - upper') F0',   D = unit^2 exp(2 (log_sigma - mean))

    Args:
        chart: F0, lower triangular, [d, d]. unit: of the genes, [d].
        covariance_free: [..., d (d + 1)/2]. curl_free: [..., d (d - 1)/2]. log_sigma: [..., d], or None for 0.
    """
    d = len(unit)
    E = _square(covariance_free, torch.tril_indices(d, d, device=unit.device), d)
    factor = chart @ (E.tril(-1) + torch.diag_embed(E.diagonal(dim1=-2, dim2=-1).exp()))
    upper = _square(curl_free, torch.triu_indices(d, d, 1, device=unit.device), d)
    Q = chart @ (upper - upper.mT) @ chart.T
    D = unit.square() if log_sigma is None else (unit * (log_sigma - log_sigma.mean(-1, keepdim=True)).exp()).square()
    return stable_drift(factor, Q, D), factor, D


def stationary_mean(drift: Tensor, production: Tensor) -> Tensor:
    """``mu = -b M^-1``, [..., n, d], for b [..., n, d] and M [d, d] or with a 1 (or n) for the cells, [..., 1, d, d]."""
    if drift.dim() == 2:
        flat = production.reshape(-1, production.shape[-1])
        return -torch.linalg.solve(drift, flat, left=False).reshape(production.shape)
    if drift.shape[-3] != 1:
        return -torch.linalg.solve(drift, production.unsqueeze(-2), left=False).squeeze(-2)
    drift = drift.squeeze(-3)
    lead = torch.broadcast_shapes(drift.shape[:-2], production.shape[:-2])
    if drift.dim() == 4 and drift.shape[1] == 1 and production.dim() == 4:  # draws x interventions: one factorisation for each draw
        flat = production.expand(*lead, *production.shape[-2:]).flatten(1, 2)
        return -torch.linalg.solve(drift.squeeze(1), flat, left=False).unflatten(1, (lead[1], production.shape[-2]))
    return -torch.linalg.solve(drift.expand(*lead, *drift.shape[-2:]), production.expand(*lead, *production.shape[-2:]), left=False)


def hold(drift: Tensor, production: Tensor, diffusion: Tensor, clamp: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The system in which some genes are held: ``do(x_k = v_k)``. Nothing acts on them and nothing moves them; what they act on follows.

    Column k of M becomes ``-e_k``, production k becomes v_k and its noise 0, whose stationary state is x_k = v_k without variance, and
    whose other coordinates are the reduced system that sees v.

    Args:
        drift: [..., 1, d, d] or [d, d]. production: [..., n, d]. diffusion: diagonal of D, [d] or [..., 1, d].
        clamp: values, NaN where a gene is free, [d] or broadcastable to [..., n, d].
    """
    held = ~clamp.isnan()
    eye = torch.eye(drift.shape[-1], dtype=drift.dtype, device=drift.device)
    drift = torch.where(held.unsqueeze(-2), -eye, drift)
    return drift, torch.where(held, clamp.nan_to_num(), production), torch.where(held, 0.0, diffusion)


def covariance_factor(drift: Tensor, diffusion: Tensor) -> Tensor:
    """A lower triangular factor of the stationary covariance, [..., d, d]; genes without noise that nothing moves have zero rows.

    Raises:
        PyrocausalError: for a system without stationary law, such as one that a clamp has left unstable.
    """
    try:
        S = lyapunov(drift, diffusion)
        variance = S.diagonal(dim1=-2, dim2=-1)
        still = torch.diag_embed((variance <= 0).to(S.dtype))
        factor = torch.linalg.cholesky(S + still)
        if bool((variance >= -1e-9 * variance.abs().amax()).all()):
            return factor * (1 - still.sum(-1, keepdim=True))
    except RuntimeError as error:  # a singular matrix; only some of them are a LinAlgError
        if "linalg" not in str(error):
            raise
    raise PyrocausalError(
        f"a system of {drift.shape[-1]} genes has no stationary law (largest real part of an eigenvalue "
        f"{float(spectral_abscissa(drift).max()):.3g}); under a clamp the rest can be unstable, so ask for another, or for a shift"
    )


def transient(
    drift: Tensor, production: Tensor, diffusion: Tensor, mean: Tensor, covariance: Tensor, times: Tensor
) -> tuple[Tensor, Tensor]:
    """Mean and covariance at times after a system that was at (mean, covariance) starts to follow new equations.

        m(t) = mu + (m(0) - mu) e^{Mt},    S(t) = S + e^{M't} (S(0) - S) e^{Mt}

    Args:
        drift: M of the new equations, [..., d, d]. production: b, [..., d]. diffusion: diagonal of D, [..., d].
        mean, covariance: at time 0, [..., d] and [..., d, d]. times: [T], at least 0, in the time unit of the drift.

    Returns:
        [..., T, d] and [..., T, d, d].
    """
    mu = (
        stationary_mean(drift, production.unsqueeze(-2))
        if drift.dim() == 2
        else stationary_mean(drift.unsqueeze(-3), production.unsqueeze(-2))
    )
    S = lyapunov(drift, diffusion)
    flow = torch.linalg.matrix_exp(drift.unsqueeze(-3) * times[:, None, None])  # [..., T, d, d]
    m = mu + (mean.unsqueeze(-2) - mu).unsqueeze(-2).matmul(flow).squeeze(-2)
    return m, S.unsqueeze(-3) + flow.mT @ (covariance - S).unsqueeze(-3) @ flow


class StationaryNormal(TorchDistribution):
    """``Normal(loc, S)`` over genes, ``S = factor factor'``, that knows the equations that it is the stationary law of.

    Args:
        loc: [..., n, d].
        factor: lower triangular, [d, d], or with a 1 (or n) for the cells, [..., 1, d, d].
        drift: M, of the same shape.
        diffusion: diagonal of D, [d] or [..., 1, d].
        moments: if the rows are means of conditions, the log-probability of a row is that of all its cells, scaled so that the plate
            over the rows gives the sum.
    """

    arg_constraints: ClassVar = {"loc": constraints.real_vector}
    support = constraints.real_vector
    has_rsample = True

    def __init__(
        self,
        loc: Tensor,
        factor: Tensor,
        drift: Tensor,
        diffusion: Tensor,
        moments: Moments | None = None,
        validate_args: bool | None = None,
    ) -> None:
        lead = torch.broadcast_shapes(loc.shape[:-1], factor.shape[:-2])
        self.loc = loc.expand(*lead, loc.shape[-1])
        self.factor, self.drift, self.diffusion, self.moments = factor, drift, diffusion, moments
        super().__init__(lead, loc.shape[-1:], validate_args=validate_args)

    @property
    def mean(self) -> Tensor:
        return self.loc

    @property
    def variance(self) -> Tensor:
        return self.factor.square().sum(-1).expand(self.loc.shape)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        shape = torch.Size(sample_shape) + self.loc.shape
        return self.loc + _rows(torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device), self.factor.mT)

    def whiten(self, value: Tensor) -> Tensor:
        """``(value - loc) factor'^-1``, independent standard normals under the law, [..., n, d]."""
        return _solve_rows(value.to(self.loc.dtype) - self.loc, self.factor)

    def log_prob(self, value: Tensor) -> Tensor:
        """[..., n], in nats."""
        log_det = self.factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)  # [] or [..., 1]
        square = self.whiten(value).square().sum(-1)
        constant = 0.5 * self.loc.shape[-1] * math.log(2 * math.pi)
        if self.moments is None:
            return -constant - log_det - 0.5 * square
        weight, within = self.moments.weight, self.moments.within
        spread = (torch.cholesky_inverse(self.factor) * within).sum((-2, -1))  # tr(S^-1 within), [] or [..., 1 or n]
        scale = weight * (weight.shape[-1] / weight.sum(-1, keepdim=True))
        return scale * (-constant - log_det - 0.5 * spread - 0.5 * square)

    def carry(self, value: Tensor, new: StationaryNormal) -> Tensor:
        """The same cells, had they lived under ``new`` and been driven by the same noise, [..., n, d].

        The stationary states of two systems with one Brownian motion are jointly normal, with cross-covariance C where
        ``M' C + C M_new + diag(sigma sigma_new) = 0``; what C leaves open of the new state is drawn.
        """
        value = value.to(self.loc.dtype)
        if _same(self.drift, new.drift) and _same(self.diffusion, new.diffusion):
            moved = new.loc - self.loc
            return torch.where(moved == 0, value, value + moved)
        diffusion = (self.diffusion * new.diffusion).sqrt()
        C = sylvester(self.drift, new.drift, torch.diag_embed(diffusion.expand(*diffusion.shape[:-1], value.shape[-1])))
        gain = torch.cholesky_solve(C, self.factor.expand(C.shape))  # S^-1 C
        left = new.factor @ new.factor.mT - C.mT @ gain
        eigenvalues, vectors = torch.linalg.eigh(0.5 * (left + left.mT))
        noise = torch.randn(torch.broadcast_shapes(value.shape, new.loc.shape), dtype=value.dtype, device=value.device)
        return new.loc + _rows(value - self.loc, gain) + _rows(noise * eigenvalues.clamp_min(0).sqrt(), vectors.mT)

    def expand(self, batch_shape: Any, _instance: Any = None) -> StationaryNormal:
        loc = self.loc.expand(torch.Size(batch_shape) + self.event_shape)
        return StationaryNormal(loc, self.factor, self.drift, self.diffusion, self.moments, validate_args=False)


@register_kl(Independent, StationaryNormal)
def _kl_independent(q: Independent, p: StationaryNormal) -> Tensor:
    base = q.base_dist
    if not isinstance(base, Normal) or q.reinterpreted_batch_ndims != 1:
        raise NotImplementedError
    precision = torch.cholesky_inverse(p.factor).diagonal(dim1=-2, dim2=-1)
    log_det = p.factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    trace = (base.scale.square() * precision).sum(-1)
    return 0.5 * (trace + p.whiten(base.loc).square().sum(-1) - p.loc.shape[-1]) + log_det - base.scale.log().sum(-1)


# -- parts -----------------------------------------------------------------------------------------------------------------------


class MeasuredNormal(TorchDistribution):
    """The law of a normal state given a measurement of each of its genes: with ``u ~ Normal(mu, S)`` and ``a_j ~ Normal(u_j, 1 / h_j)``::

        u | a ~ Normal(mu + C h (a - mu), C),   C = (S^-1 + diag(h))^-1;   draws: loc + C (S^-1/2 e1 + h^1/2 e2)

    A matrix is inverted for each cell, and once: no factor is differentiated, which would take most of a training step.

    Args:
        prior: the law of u, with one S for all cells.
        value, precision: a and h, [..., n, d].
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, prior: StationaryNormal, value: Tensor, precision: Tensor, validate_args: bool | None = None) -> None:
        if prior.factor.dim() > 2 and prior.factor.shape[-3] != 1:
            raise PyrocausalError(f"a factor of shape {tuple(prior.factor.shape)} was given; measured states have one for all cells")
        self.factor, self.h = prior.factor, precision
        self.precision = torch.cholesky_inverse(prior.factor) + torch.diag_embed(precision)
        self.covariance, self.log_det = _Inverse.apply(self.precision)
        self.loc = prior.loc + _rows(precision * (value - prior.loc), self.covariance)
        super().__init__(self.loc.shape[:-1], self.loc.shape[-1:], validate_args=validate_args)

    @property
    def mean(self) -> Tensor:
        return self.loc

    @property
    def variance(self) -> Tensor:
        return self.covariance.diagonal(dim1=-2, dim2=-1).expand(self.loc.shape)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        shape = torch.Size(sample_shape) + self.loc.shape
        e1, e2 = (torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device) for _ in range(2))
        factor = self.factor if self.factor.dim() == 2 else self.factor.squeeze(-3)
        root = torch.linalg.solve_triangular(factor, e1, upper=False, left=False)  # rows of variance S^-1
        return self.loc + _rows(root + self.h.sqrt() * e2, self.covariance)

    def log_prob(self, value: Tensor) -> Tensor:
        """[..., n], in nats."""
        r = value - self.loc
        square = (_rows(r, self.precision) * r).sum(-1)
        return -0.5 * (square - self.log_det + self.loc.shape[-1] * math.log(2 * math.pi))

    def expand(self, batch_shape: Any, _instance: Any = None) -> MeasuredNormal:
        new = MeasuredNormal.__new__(MeasuredNormal)
        new.__dict__.update(self.__dict__)
        new.loc = self.loc.expand(torch.Size(batch_shape) + self.event_shape)
        super(MeasuredNormal, new).__init__(torch.Size(batch_shape), self.event_shape, validate_args=False)
        return new


class _Inverse(torch.autograd.Function):
    """Inverse C and log-determinant of positive definite A, [..., d, d]; their gradients are ``-C g C`` and ``C``."""

    generate_vmap_rule = True

    @staticmethod
    def forward(A: Tensor) -> tuple[Tensor, Tensor]:
        factor = torch.linalg.cholesky(A)
        return torch.cholesky_inverse(factor), 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(output[0])

    @staticmethod
    def backward(ctx: Any, to_inverse: Tensor, to_log_det: Tensor) -> Tensor:
        (C,) = ctx.saved_tensors
        return to_log_det[..., None, None] * C - C @ to_inverse @ C


@register_kl(MeasuredNormal, StationaryNormal)
def _kl_measured(q: MeasuredNormal, p: StationaryNormal) -> Tensor:
    log_det = p.factor.diagonal(dim1=-2, dim2=-1).log().sum(-1) + 0.5 * q.log_det
    trace = (q.covariance * torch.cholesky_inverse(p.factor)).sum((-2, -1))
    return 0.5 * (trace + p.whiten(q.loc).square().sum(-1) - p.loc.shape[-1]) + log_det


def _square(values: Tensor, index: Tensor, d: int) -> Tensor:
    """Values at the entries ``index`` [2, T] of matrices, zero elsewhere: [..., T] -> [..., d, d]."""
    out = torch.zeros(*values.shape[:-1], d * d, dtype=values.dtype, device=values.device)
    return out.index_copy(-1, index[0] * d + index[1], values).unflatten(-1, (d, d))


def _same(a: Tensor, b: Tensor) -> bool:
    return a is b or bool((a == b).all())


def _rows(rows: Tensor, table: Tensor) -> Tensor:
    """``rows @ table`` for rows [..., n, d] and a table [d, d], [..., 1, d, d] or [..., n, d, d]."""
    if table.dim() == 2:
        return rows @ table
    if table.shape[-3] == 1:
        return rows @ table.squeeze(-3)
    return (rows.unsqueeze(-2) @ table).squeeze(-2)


def _solve_rows(rows: Tensor, factor: Tensor) -> Tensor:
    """``rows factor'^-1``, [..., n, d]."""
    if factor.dim() == 2:
        return torch.linalg.solve_triangular(factor.mT, rows.reshape(-1, rows.shape[-1]), upper=True, left=False).reshape(rows.shape)
    if factor.shape[-3] == 1:
        return torch.linalg.solve_triangular(factor.squeeze(-3).mT, rows, upper=True, left=False)
    return torch.linalg.solve_triangular(factor.mT, rows.unsqueeze(-2), upper=True, left=False).squeeze(-2)
