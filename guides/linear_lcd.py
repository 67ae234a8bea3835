"""Guide of LinearLCD: the maximum of the posterior first, then draws around it.

While it trains the globals are points (so the bound is the log joint density, and the fit its mode); the widths of the sparse priors
come down from ``WIDE`` times theirs over the first half, which keeps the non-convex priors from settling early. Afterwards ``draws``
members of the weighted likelihood bootstrap (Newton and Raftery 1994; Newton, Polson and Xu 2021) are fitted side by side from the mode:
member m gives cell n the weight ``w_mn ~ Exp(1)`` (for conditions, the moments of the weighted cells) and each sparse prior the weight
``v_m ~ Exp(1)``; the guide then picks a member, ``member ~ Uniform{1..draws}``.

Counts have states u_n, whose posterior is that of a Gaussian law that has seen each gene with some noise (pseudo-observations, after
Johnson et al. 2016): precise where the counts are many, and correlated as the law is, whatever the intervention::

    q(u_n | x_n, dose_n) ~ Normal(u_n; mu_n, S) prod_k Normal(u_nk; a_k(x_nk), 1/h_k(x_nk))
    a = softplus^-1(x / c) + offset,   h = scale * c slope^2 / softplus(a),    c: counts per unit of softplus(u) in this cell

Offset and scale are learned for each gene, apart for zeros and other counts. The globals start from the moments of the expression,
deconvolved (:func:`~pyrocausal.dynamics.bootstrap.deconvolved_moments`).

A learned penetrance: ``q(hit_np | x_n)`` is the exact posterior given the globals for a cell with one perturbation; in a combination, each
as if the others had taken. Its gradient is Fisher's identity (the globals see the likelihood of the complete data).
"""

from __future__ import annotations

from typing import Any, Literal

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyrocausal.data import PerturbationData
from pyrocausal.dynamics.bootstrap import deconvolved_moments, maximise, weighted_moments
from pyrocausal.dynamics.stationary import MeasuredNormal, StationaryNormal, linear_system, stationary_mean
from pyrocausal.loading import Batch, moment_batch
from pyrocausal.nn import inverse_softplus
from pyrocausal.structural import mechanism_shift

WIDE = 10.0  # multiple of the widths of the sparse priors at the start
ANNEALED = 0.5  # share of the training after which they have their own


class LinearLCD(PyroModule):
    """Points, then members of a bootstrap; arguments as the model's, and

    Args:
        draws: members of the bootstrap; 0 leaves the points.
        steps: of each member's fit.
    """

    members: Tensor
    learning_rates: dict[str, float]

    def __init__(
        self,
        n_genes: int,
        n_perturbations: int,
        likelihood: str = "gaussian",
        penetrance: Literal["full", "learned"] = "full",
        diffusion: Literal["fixed", "learned"] = "fixed",
        off_target_rate: float | None = 9.0,
        draws: int = 20,
        steps: int = 300,
    ) -> None:
        super().__init__()
        d, P = n_genes, n_perturbations
        shapes: dict[str, tuple[int, ...]] = {
            "covariance_free": (d * (d + 1) // 2,), "curl_free": (d * (d - 1) // 2,), "baseline_free": (d,), "target_shift": (P,),
        }  # fmt: skip
        shapes |= {"log_sigma": (d,)} if diffusion == "learned" else {}
        shapes |= {"off_target": (P, d)} if off_target_rate is not None else {}
        self.counts, self.draws, self.steps = likelihood != "gaussian", draws, steps
        self.learned_penetrance = penetrance == "learned"
        self.penetrance_logits = nn.Parameter(torch.ones(P, dtype=torch.float64), requires_grad=self.learned_penetrance)
        self.point = nn.ParameterDict({k: nn.Parameter(torch.zeros(v, dtype=torch.float64)) for k, v in shapes.items()})
        self.learning_rates = {f"point.{k}": v for k, v in RATES.items() if k in shapes} | {"penetrance_logits": 10.0}
        for k, v in shapes.items():
            self.register_buffer(f"members_{k}", torch.zeros(max(draws, 1), *v, dtype=torch.float64))
        self.register_buffer("spread", torch.zeros((), dtype=torch.bool))
        self.settled = ANNEALED
        for name, shape in (
            ("chart", (d, d)),
            ("centre", (d,)),
            ("unit", (d,)),
            ("depth_unit", (d,)),
            ("median_library", ()),
            ("on_target", (P, d)),
        ):
            self.register_buffer(name, torch.ones(shape, dtype=torch.float64))
        self.offset = nn.Parameter(torch.zeros(2, d, dtype=torch.float64), requires_grad=self.counts)  # zeros, other counts
        self.log_scale = nn.Parameter(torch.zeros(2, d, dtype=torch.float64), requires_grad=self.counts)

    def forward(self, batch: Batch) -> None:
        if self.spread and not self.training:
            uniform = torch.ones(self.draws, device=self.spread.device)
            member = pyro.sample("member", dist.Categorical(uniform), infer={"is_auxiliary": True})
            values = {k: getattr(self, f"members_{k}")[member] for k in self.point}
        else:
            values = dict(self.point.items())
        for name, value in values.items():
            pyro.sample(name, dist.Delta(value, event_dim=self.point[name].dim()))
        if self.learned_penetrance:
            pyro.sample("penetrance", dist.Delta(self.penetrance_logits.sigmoid(), event_dim=1))
        if batch.x is None or batch.moments is not None or not (self.counts or self.learned_penetrance):
            return
        M, factor, D = linear_system(self.chart, self.unit, values["covariance_free"], values["curl_free"], values.get("log_sigma"))
        baseline = self.centre + values["baseline_free"] @ self.chart.T
        effect = self.on_target * self.unit * values["target_shift"].unsqueeze(-1)
        if "off_target" in values:
            effect = effect + (1 - self.on_target) * values["off_target"] * self.unit
        x, dose = batch.x.to(baseline.dtype), batch.dose.to(baseline.dtype)
        with batch.cells():
            if self.learned_penetrance:
                dose = dose * pyro.sample("hit", dist.Bernoulli(self._taken(x, dose, M, factor, baseline, effect)).to_event(1))
            if not self.counts:
                return
            mu = baseline + stationary_mean(M, mechanism_shift(dose, effect))
            a, h = self._pseudo_observations(x, batch.library_size.to(x.dtype))
            pyro.sample("u", MeasuredNormal(StationaryNormal(mu, factor, M, D), a, h))

    def _pseudo_observations(self, x: Tensor, library_size: Tensor) -> tuple[Tensor, Tensor]:
        """What the count of each gene says of its state: value and precision, [n, d] each."""
        c = library_size / self.median_library * self.depth_unit
        rate = ((x + 0.25) / c).clamp_min(0.02)
        u = inverse_softplus(rate)
        which = (x > 0).long()
        offset, log_scale = (torch.where(which == 1, t[1], t[0]) for t in (self.offset, self.log_scale))
        return u + offset, log_scale.exp() * c * torch.sigmoid(u).square() / rate

    @torch.no_grad()
    def _taken(self, x: Tensor, dose: Tensor, M: Tensor, factor: Tensor, baseline: Tensor, effect: Tensor) -> Tensor:
        """Probability that each perturbation took in each cell, [..., n, P], if all others of its cell did.

        With what it moves ``delta_p = -effect_p M^-1``, the residual r of the cell if all took, and K the inverse of S,
        ``logit q = logit rho_p + dose_p r K delta_p' + dose_p^2 delta_p K delta_p' / 2``.
        """
        if effect.dim() > 2:  # draws
            effect, factor = effect.squeeze(-3), factor.squeeze(-3)
        delta = stationary_mean(M, effect)  # [..., P, d]
        pull = delta @ torch.cholesky_inverse(factor)
        residual = x - baseline - dose @ delta
        square = (pull * delta).sum(-1).unsqueeze(-2)
        return torch.sigmoid(self.penetrance_logits + dose * (residual @ pull.mT) + 0.5 * dose.square() * square)

    # -- training ------------------------------------------------------------------------------------------------------------------

    def initialise(self, model: Any, data: PerturbationData) -> None:
        """Chart and units from the moments of the expression; symmetric drift, shifts as the mean changes ask."""
        start = moment_batch(data, model.pooled) if not self.counts else deconvolved_moments(model, data)
        within, control = _pooled(start), start.dose.abs().sum(-1) == 0
        model.unit.copy_(within.diagonal().sqrt() if model.standardise else torch.ones_like(model.unit))
        model.chart.copy_(torch.linalg.cholesky(within))
        assert start.x is not None and start.moments is not None
        weight = start.moments.weight * (control if bool(control.any()) else torch.ones_like(control))
        model.centre.copy_(weight @ start.x / weight.sum())
        drift = -0.5 * torch.cholesky_inverse(model.chart) * model.unit.square()
        with torch.no_grad():
            asked = -(start.x - model.centre) @ drift / model.unit  # shift of each condition, in units
            size = start.dose.T @ start.dose + 1e-6 * torch.eye(start.dose.shape[1], dtype=asked.dtype)
            each = torch.linalg.solve(size, start.dose.T @ asked)  # [P, d]
            if model.mechanism == "shift":
                self.point["target_shift"].copy_((each * model.on_target).sum(-1))
        model.widening.fill_(WIDE)
        for name in ("chart", "centre", "unit", "depth_unit", "median_library", "on_target"):
            getattr(self, name).copy_(getattr(model, name))
        if model.batching == "cells":
            maximise(model, self, start, steps=1500)

    def after_step(self, model: Any, batch: Batch, done: float) -> None:
        """The widths of the sparse priors come down."""
        model.widening.fill_(WIDE ** (1 - min(1.0, done / ANNEALED)) if model.batching == "moments" else 1.0)

    def after_training(self, model: Any, data: PerturbationData, seed: int, progress: bool) -> None:
        """Members of the bootstrap."""
        model.widening.fill_(1.0)
        if self.draws == 0 or model.batching != "moments":
            return
        batch = weighted_moments(data, model.pooled, self.draws, seed)
        members = maximise(model, self, batch, steps=self.steps, members=self.draws, seed=seed, progress=progress)
        for name, value in members.items():
            getattr(self, f"members_{name}").copy_(value)
        self.spread.fill_(True)


RATES = {  # multiples of the learning rate: coordinates of the chart are in units of the data's spread, shifts are not
    "covariance_free": 4.0,
    "curl_free": 14.0,
    "baseline_free": 4.0,
    "log_sigma": 4.0,
    "target_shift": 140.0,
    "off_target": 66.0,
}


def _pooled(batch: Batch) -> Tensor:
    assert batch.moments is not None
    weight, within = batch.moments.weight, batch.moments.within
    return within if within.dim() == 2 else (weight[:, None, None] * within).sum(0) / weight.sum()
