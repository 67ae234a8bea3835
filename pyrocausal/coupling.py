"""Counterfactual noise of the observation: what "the same cell" means for its counts.

The data identify the law of each world, never the joint law of two worlds, so the coupling is part of the question:

``"shared"``       Gaussian: the residual is kept. States of a diffusion: both worlds are driven by the same noise. Counts: Poisson
                   thinning given the observed counts. With ``x ~ Poisson(lambda)``,
                   ``lambda = mu g`` (negative binomial: ``g ~ Gamma(theta, theta)``, abducted as ``g | x ~ Gamma(theta + x, theta + mu)``),
                   ``x' | x ~ Binomial(x, lambda'/lambda)`` if ``lambda' <= lambda``, else
                   ``x + Poisson(lambda' - lambda)``. The law of x' is exact, and a gene whose rate does not change keeps its count.
``"quantile"``     the same quantile in both worlds (comonotone); within the jump of a discrete law the quantile is uniform.
``"independent"``  fresh noise.
``"mean"``         no noise: expected values.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from pyrocausal.distributions import NegativeBinomial, Poisson
from pyrocausal.errors import InterventionError

Noise = Literal["shared", "quantile", "independent", "mean"]
NOISES = ("shared", "quantile", "independent", "mean")
ROUNDING = 1e-5  # rates closer than this (relative) are the same rate: float32 decoders differ in the last digits


def couple(x: Tensor, law: Any, new_law: Any, same: Tensor, noise: Noise) -> Tensor:
    """The observation in another world.

    Args:
        x: observed, [n, G].
        law: law in the factual world, batch shape [S, 1, n] (or [n]).
        new_law: law in the other worlds, batch shape [S, K, n] (or [K, n]).
        same: cells whose world is the factual one, broadcastable to the batch shape of ``new_law``.

    Returns:
        [S, K, n, G] (or [K, n, G]); the factual action gives back x itself.
    """
    if noise not in NOISES:
        raise InterventionError(f"noise={noise!r} is unknown; choose one of {', '.join(NOISES)}")
    shape = new_law.mean.shape
    if noise == "mean":
        return torch.where(same[..., None], law.mean, new_law.mean)
    if noise == "independent":
        return new_law.sample()
    if hasattr(law, "carry"):
        if noise != "shared":
            raise InterventionError(f"noise={noise!r} is not known for states of a diffusion; use noise='shared', 'mean' or 'independent'")
        carried = law.carry(x, new_law).to(x.dtype)
        return torch.where(same[..., None], x.expand(carried.shape), carried)
    kind = _kind(law)
    changed = [n for n in ("theta", "concentration", "scale") if kind and not _same_parameter(law, new_law, n)]
    if kind is None:
        raise InterventionError(f"noise={noise!r} is not known for {type(law).__name__}; use noise='mean' or 'independent'")
    if kind == "normal":
        out = _shift_residual(x, law, new_law)
    elif noise == "shared":
        if changed:
            raise InterventionError("the intervention moves the dispersion, which thinning cannot follow; use noise='quantile'")
        out = _thin(x, law, new_law)
    else:
        out = _same_quantile(x, law, new_law)
    still = (new_law.mean - law.mean).abs() <= ROUNDING * law.mean.abs()
    unchanged = same[..., None] | still if not changed else same[..., None]
    return torch.where(unchanged, x.expand(shape), out)


def _kind(law: Any) -> str | None:
    if isinstance(law, NegativeBinomial):
        return "negative_binomial"
    if isinstance(law, Poisson):
        return "poisson"
    base = getattr(law, "base_dist", law)
    name = type(base).__name__
    return {"Normal": "normal", "GammaPoisson": "gamma_poisson", "Poisson": "poisson"}.get(name)


def _parts(law: Any) -> tuple[Tensor, Tensor | None]:
    """Mean and inverse dispersion (None: Poisson) of a count law."""
    if isinstance(law, NegativeBinomial):
        return law.mu, law.theta
    base = getattr(law, "base_dist", law)
    if hasattr(base, "concentration"):
        return base.mean, base.concentration
    return law.mean, None


def _same_parameter(law: Any, new_law: Any, name: str) -> bool:
    old, new = (getattr(getattr(part, "base_dist", part), name, None) for part in (law, new_law))
    return old is None or torch.equal(*torch.broadcast_tensors(old, new))


def _shift_residual(x: Tensor, law: Any, new_law: Any) -> Tensor:
    old, new = law.base_dist, new_law.base_dist
    return x + (new.loc - old.loc) + (new.scale - old.scale) * ((x - old.loc) / old.scale)


def _thin(x: Tensor, law: Any, new_law: Any) -> Tensor:
    mu, theta = _parts(law)
    new_mu, _ = _parts(new_law)
    rate = mu
    if theta is not None:  # abduct the cell's own gamma factor
        gamma = torch.distributions.Gamma((theta + x).expand(mu.shape), (theta + mu).expand(mu.shape), validate_args=False)
        rate = mu * gamma.sample()
    new_rate = rate * (new_mu / mu.clamp_min(1e-30))
    keep = (new_rate / rate.clamp_min(1e-30)).clamp(max=1.0)
    thinned = torch.binomial(x.expand(keep.shape).contiguous(), keep.contiguous())
    return thinned + torch.poisson((new_rate - rate).clamp_min(0.0))


def _same_quantile(x: Tensor, law: Any, new_law: Any) -> Tensor:
    from scipy import stats

    (mu, theta), (new_mu, new_theta) = _parts(law), _parts(new_law)
    counts = x.double().cpu().numpy()

    def frozen(mean: Tensor, theta: Tensor | None) -> Any:
        m = mean.double().cpu().numpy()
        if theta is None:
            return stats.poisson(m)
        t = theta.double().cpu().numpy()
        return stats.nbinom(t, t / (t + m))

    old = frozen(mu, theta)
    low, high = old.cdf(counts - 1), old.cdf(counts)
    uniform = torch.rand(mu.shape, dtype=torch.float64).numpy()
    quantile = np.clip(low + uniform * (high - low), 0, 1 - 1e-12)
    return torch.as_tensor(frozen(new_mu, new_theta).ppf(quantile), dtype=x.dtype, device=x.device)
