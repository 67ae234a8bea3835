"""LinearLCD: cells as the stationary law of a linear stochastic differential equation over genes, whose direction perturbations reveal.

The linear case of Latent Causal Diffusions (Lorch, Zhang, Bunne, Krause, Schoelkopf and Uhler 2026, arXiv 2601.15341), with the drift
itself as the parameter in place of a score. Row vectors, d genes, P perturbations; t(p) is the gene that p targets::

    dx    = (x M + b + shift) dt + dW diag(sigma)            M = graph - diag(decay);  graph[j, k]: gene j acts on gene k
    x     ~ Normal(mu, S)                                    at stationarity
    mu    = -(b + shift) M^-1
    0     = M' S + S M + diag(sigma^2)
    shift = dose @ effect,   effect_p = c_p e_t(p) + o_p     c on target, o sparse and off target
    M     = S^-1 (-Q - diag(sigma^2) / 2)                    the chart: S positive definite, Q skew, M always stable
    graph_jk ~ GDP(lambda, tau),   o_pk ~ GDP(lambda', tau') generalised double Pareto: log p(w) = -lambda log(1 + |w|/tau) + const

With ``mechanism="knockdown"`` a perturbation scales its target's row of regulation and production, ``f_t = exp(dose c_p)``:
``M_q = graph diag(f) - diag(decay)``, ``b_q = b f``; every condition has a covariance of its own, and pairs are not additive by
construction. With ``penetrance="learned"`` the dose takes in a share rho_p of the cells: ``hit_np ~ Bernoulli(rho_p)``.

Counts are Poisson, negative binomial, or zero-inflated Poisson around the latent state u ~ Normal(mu, S)::

    x_nk ~ NB(mean = library_n / l0 * unit_k softplus(u_nk), theta_k)        l0: median library

=======================  ===============  =============  =======================================================================
site                     shape            kind           meaning
=======================  ===============  =============  =======================================================================
``covariance_free``      [d (d + 1)/2]    sample         chart of S: ``S = F F'``, ``F = F0 (strict lower + exp(diagonal))``
``curl_free``            [d (d - 1)/2]    sample         chart of Q: ``Q = F0 (upper - upper') F0'``
``baseline_free``        [d]              sample         chart of the control mean: ``baseline = m0 + baseline_free F0'``
``log_sigma``            [d]              sample         noise of each gene (``diffusion="learned"``), mean 0: time is in units of decay
``graph``                [d, d]           deterministic  regulation, edge j -> k
``decay``                [d]              deterministic  decay, net of self-regulation
``basal``                [d]              deterministic  production b
``target_shift``         [P]              sample         c
``off_target``           [P, d]           sample         o
``effect``               [P, d]           deterministic  shift of each perturbation
``penetrance``, ``hit``  [P], [n, P]      sample         rho, and whether it took in a cell
``dose``, ``shift``      [n, P], [n, d]   deterministic  treatment, and what it adds to the drift
``clamp``                [n, d]           deterministic  genes held at a value; NaN = free
``u``                    [n, d]           sample         latent state (counts only)
``x_loc``, ``x``         [n, d]           observed       expected and measured expression
``edge_prior``, ``off_target_prior``      factors        the sparse priors above
=======================  ===============  =============  =======================================================================

**Identified.** From control cells alone: S, that is, d (d + 1)/2 of the d^2 entries of M; no direction (a score, and the precision matrix,
are symmetric). A known target adds a row of ``-M^-1`` up to its scale; with all genes targeted M is identified, with fewer it is the sparse
prior that decides. The time scale is fixed by sigma. **Assumed:** linearity, stationarity, independent noise, perturbations that act
mostly on target. ``target_shift`` of a perturbation whose gene is not measured does not exist; all its effects are ``off_target``.

Queries: dose, penetrance, combinations, ``cut``, ``set_edge``, ``clamp``, ``shift`` by gene name; :func:`pyrocausal.dynamics.response`
for the transient. A counterfactual cell is the same cell driven by the same noise
(:meth:`~pyrocausal.dynamics.stationary.StationaryNormal.carry`).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import ClassVar, Literal, get_args

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.nn.functional import softplus

from pyrocausal.distributions import NegativeBinomial, Poisson
from pyrocausal.dynamics.lyapunov import lyapunov, spectral_abscissa
from pyrocausal.dynamics.stationary import StationaryNormal, covariance_factor, hold, linear_system, stationary_mean
from pyrocausal.errors import PyrocausalError
from pyrocausal.loading import Batch
from pyrocausal.structural import mechanism_shift, targets_table

LinearLikelihood = Literal["gaussian", "negative_binomial", "poisson", "zero_inflated_poisson"]
BASE = 10.0  # standard deviation of the chart's base measure, in units of the data's own spread
SMOOTH = 1e-2  # half-width over which |w| of the sparse priors is rounded


class LinearLCD(PyroModule):
    """The generative program; float64 throughout.

    Args:
        n_genes, n_perturbations: sizes of the screen.
        own_genes: column of the gene that each perturbation targets, -1 where it is not measured; ``pc.build`` finds them by name.
        likelihood: ``"gaussian"``: the expression is the state itself; or a count law around the latent state.
        mechanism: ``"shift"`` or ``"knockdown"``.
        penetrance: ``"full"``, or ``"learned"``.
        diffusion: ``"fixed"``: sigma is 1 in the units below; ``"learned"``: a value for each gene, of geometric mean 1.
        standardise: genes in units of their own spread within conditions, so that the priors do not depend on the scale of the data;
            False takes the data as they are (a simulation with sigma = 1).
        edge_rate, edge_scale: lambda and tau of an edge.
        off_target_rate, off_target_scale: lambda' and tau' of off-target shifts; rate None: there are none.
    """

    state: ClassVar = "gene"  # what the nodes of the graph are
    cyclic: ClassVar = True
    chart: Tensor
    centre: Tensor
    unit: Tensor
    depth_unit: Tensor
    widening: Tensor
    targets: Tensor
    on_target: Tensor

    def __init__(
        self,
        n_genes: int,
        n_perturbations: int,
        own_genes: Sequence[int] | None = None,
        likelihood: LinearLikelihood = "gaussian",
        mechanism: Literal["shift", "knockdown"] = "shift",
        penetrance: Literal["full", "learned"] = "full",
        diffusion: Literal["fixed", "learned"] = "fixed",
        standardise: bool = True,
        edge_rate: float = 9.0,
        edge_scale: float = 0.3,
        off_target_rate: float | None = 9.0,
        off_target_scale: float = 1.0,
    ) -> None:
        super().__init__()
        if likelihood not in get_args(LinearLikelihood):
            raise PyrocausalError(f"likelihood={likelihood!r} is unknown; choose one of {', '.join(get_args(LinearLikelihood))}")
        if mechanism not in ("shift", "knockdown") or diffusion not in ("fixed", "learned") or penetrance not in ("full", "learned"):
            raise PyrocausalError(
                f"mechanism={mechanism!r}, diffusion={diffusion!r} and penetrance={penetrance!r} were given; choose 'shift' or "
                "'knockdown', 'fixed' or 'learned', 'full' or 'learned'"
            )
        if penetrance == "learned" and (likelihood != "gaussian" or mechanism != "shift"):
            raise PyrocausalError(
                f"penetrance='learned' was asked for with likelihood={likelihood!r} and mechanism={mechanism!r}; it is for "
                "likelihood='gaussian' and mechanism='shift'"
            )
        self.shape = (n_perturbations, n_genes)
        self.counts = likelihood != "gaussian"
        self.law_of_counts, self.mechanism, self.diffusion, self.standardise = likelihood, mechanism, diffusion, standardise
        self.learned_penetrance = penetrance == "learned"
        self.batching = "cells" if self.counts or self.learned_penetrance else "moments"
        self.pooled = mechanism == "shift"
        self.data_kind = "counts" if self.counts else "normalised"
        self.edge_rate, self.edge_scale = edge_rate, edge_scale
        self.off_target_rate, self.off_target_scale = off_target_rate, off_target_scale
        targets = torch.full((n_perturbations,), -1) if own_genes is None else torch.as_tensor(list(own_genes), dtype=torch.int64)
        if len(targets) != n_perturbations:
            raise PyrocausalError(
                f"own_genes names {len(targets)} targets for {n_perturbations} perturbations; give one for each (-1: none)"
            )
        one = torch.ones(n_genes, dtype=torch.float64)
        self.register_buffer("targets", targets)
        self.register_buffer("on_target", targets_table(own_genes, self.shape).double())
        self.register_buffer("chart", torch.diag(one))  # F0
        self.register_buffer("centre", 0 * one)  # m0
        self.register_buffer("unit", one.clone())  # of the state
        self.register_buffer("depth_unit", one.clone())  # counts per unit of softplus(u) in a cell of the median library
        self.register_buffer("median_library", torch.ones((), dtype=torch.float64))
        self.register_buffer("widening", torch.ones((), dtype=torch.float64))  # of tau and tau', while training
        self.log_theta = nn.Parameter(torch.full((n_genes,), 2.0), requires_grad=likelihood == "negative_binomial")
        self.gate_logits = nn.Parameter(torch.full((n_genes,), -3.0), requires_grad=likelihood == "zero_inflated_poisson")

    # -- the system ----------------------------------------------------------------------------------------------------------------

    def system(self, covariance_free: Tensor, curl_free: Tensor, log_sigma: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """M, a factor of S, and the diagonal of D, from the coordinates of the chart."""
        return linear_system(self.chart, self.unit, covariance_free, curl_free, log_sigma)

    def forward(self, batch: Batch) -> Tensor:
        n_perturbations, d = self.shape
        gene, guide = {"event_dims": ("gene",)}, {"event_dims": ("perturbation",)}
        entries = {"event_dims": ("covariance_entry",)}, {"event_dims": ("curl_entry",)}
        one = torch.ones_like(self.unit)

        # the system
        covariance_free = pyro.sample("covariance_free", _base(one.new_ones(d * (d + 1) // 2), 1.0), infer=entries[0])
        curl_free = pyro.sample("curl_free", _base(one.new_ones(d * (d - 1) // 2), BASE), infer=entries[1])
        log_sigma = pyro.sample("log_sigma", _base(one, 0.5), infer=gene) if self.diffusion == "learned" else None
        M, factor, D = self.system(covariance_free, curl_free, log_sigma)
        decay = pyro.deterministic("decay", -M.diagonal(dim1=-2, dim2=-1), event_dim=1)
        regulation = M + torch.diag_embed(decay)
        standardised = regulation * (self.unit[:, None] / self.unit)
        pyro.factor("edge_prior", _gdp(standardised, self.edge_rate, self.edge_scale * self.widening).flatten(-2).sum(-1))
        graph = pyro.deterministic("graph", regulation, event_dim=2)
        natural = _untouched(graph, regulation)
        baseline_free = pyro.sample("baseline_free", _base(one, BASE), infer=gene)
        baseline = self.centre + baseline_free @ self.chart.T
        at_rest = -(baseline.unsqueeze(-2) @ M).squeeze(-2)
        basal = pyro.deterministic("basal", at_rest, event_dim=1)

        # the perturbations
        size = one.new_ones(n_perturbations)
        c = pyro.sample("target_shift", _base(size, BASE if self.mechanism == "shift" else 2.0), infer=guide)
        own = self.unit if self.mechanism == "shift" else one
        effect = self.on_target * own * c.unsqueeze(-1)
        if self.off_target_rate is not None:
            o = pyro.sample("off_target", _base(one.expand(self.shape), 2 * BASE), infer={"event_dims": ("perturbation", "gene")})
            o = o * (1 - self.on_target)
            prior = _gdp(o, self.off_target_rate, self.off_target_scale * self.widening)
            pyro.factor("off_target_prior", prior.flatten(-2).sum(-1))
            effect = effect + o * self.unit if self.mechanism == "shift" else effect
        effect = pyro.deterministic("effect", effect, event_dim=2)
        if self.learned_penetrance:
            rho = pyro.sample("penetrance", dist.Beta(2 * size, size).to_event(1), infer=guide)

        # the cells
        untouched = torch.full_like(one, math.nan)
        with batch.cells():
            dose = pyro.deterministic("dose", batch.dose, event_dim=1).to(one.dtype)
            if self.learned_penetrance and batch.moments is None:
                hit = pyro.sample("hit", dist.Bernoulli(rho).to_event(1), infer=guide)
                dose = dose * hit
            if self.mechanism == "shift":
                shift = mechanism_shift(dose, effect)
                shift = pyro.deterministic("shift", shift, event_dim=1).to(one.dtype)
                activity = None
            else:
                off = mechanism_shift(dose, o * self.unit) if self.off_target_rate is not None else one.new_zeros(len(batch), d)
                shift = pyro.deterministic("shift", off, event_dim=1).to(one.dtype)
                activity = mechanism_shift(dose, effect)  # log f
            clamp = pyro.deterministic("clamp", untouched, event_dim=1)
            held = None if clamp is untouched or bool(clamp.isnan().all()) else clamp.to(one.dtype)
            if natural and held is None and activity is None:
                mu = _mean(M, basal, shift, baseline if _untouched(basal, at_rest) else None)
                law = StationaryNormal(mu, factor, M, D, batch.moments)
            else:
                law = self._intervened(graph, decay, basal, shift, D, activity, held, batch)
            if not self.counts or batch.moments is not None:  # moments are of states
                x_loc = pyro.deterministic("x_loc", law.loc, event_dim=1)
                return pyro.sample("x", law, obs=batch.x, infer=gene)
            u = pyro.sample("u", law, infer=gene)
            rate = batch.library_size / self.median_library * self.depth_unit * softplus(u)
            x_loc = pyro.deterministic("x_loc", rate.to(batch.library_size.dtype), event_dim=1)
            return pyro.sample("x", self._counts(x_loc, batch), obs=batch.x, infer=gene)

    def _intervened(
        self,
        graph: Tensor,
        decay: Tensor,
        basal: Tensor,
        shift: Tensor,
        D: Tensor,
        activity: Tensor | None,
        held: Tensor | None,
        batch: Batch,
    ) -> StationaryNormal:
        """The stationary law of edited equations, solved anew for each world, and in it for each distinct row of activities and clamps."""
        which, production = None, basal + shift
        keys = [t for t in (activity, held) if t is not None and t.dim() > 1 and t.shape[-2] > 1]
        if keys:
            rows = torch.cat([k.nan_to_num(nan=math.pi).movedim(-2, 0).flatten(1) for k in keys], -1)
            rows, which = torch.unique(rows, dim=0, return_inverse=True)
            first = torch.full((len(rows),), len(which)).scatter_reduce(0, which, torch.arange(len(which)), "amin")
        if activity is not None:
            production = basal * activity.exp() + shift
            f = (activity[..., first, :] if which is not None else activity[..., :1, :]).exp()
            M = graph * f.unsqueeze(-2) - torch.diag_embed(decay)
        else:
            M = graph - torch.diag_embed(decay)
        if held is not None:
            M = M.unsqueeze(-3) if M.dim() == 2 else M
            at = held[..., first, :] if which is not None and held.dim() > 1 and held.shape[-2] > 1 else held
            production = torch.where(held.isnan(), production, held.nan_to_num())
            M, _, D = hold(M, production[..., :1, :], D, at)
        M = _stabilised(M, self.training) if activity is not None else M
        factor = covariance_factor(M, D)
        if which is not None:
            M, factor = (t.index_select(-3, which) if t.shape[-3] > 1 else t for t in (M, factor))
            D = D.index_select(-2, which) if D.dim() > 1 and D.shape[-2] > 1 else D
        return StationaryNormal(stationary_mean(M, production), factor, M, D, batch.moments)

    def _counts(self, x_loc: Tensor, batch: Batch) -> TorchDistribution:
        if self.law_of_counts == "negative_binomial":
            return NegativeBinomial(x_loc, self.log_theta.exp(), batch.nonzeros)
        if self.law_of_counts == "poisson":
            return Poisson(x_loc, batch.nonzeros)
        from pyrocausal.zero_inflated import ZeroInflatedPoisson

        return ZeroInflatedPoisson(x_loc, self.gate_logits.sigmoid())


# -- parts -----------------------------------------------------------------------------------------------------------------------


def _base(like: Tensor, scale: float) -> TorchDistribution:
    """Normal(0, scale^2), an event of the shape of ``like``."""
    return dist.Normal(0.0, scale * like).to_event(like.dim())


def _gdp(w: Tensor, rate: float, scale: Tensor) -> Tensor:
    """log density of the generalised double Pareto at each weight (Armagan, Dunson and Lee 2013), rounded at zero."""
    size = (w.square() + SMOOTH**2).sqrt()
    return math.log((rate - 1) / 2) - scale.log() - rate * torch.log1p(size / scale)


def _untouched(site: Tensor, value: Tensor) -> bool:
    """Whether a deterministic site has its own value, that is, nobody intervened on it."""
    return site is value or (site.shape == value.shape and torch.equal(site, value))


def _mean(M: Tensor, basal: Tensor, shift: Tensor, baseline: Tensor | None) -> Tensor:
    """``-(basal + shift) M^-1``, by the known baseline ``-basal M^-1`` where nothing has changed it."""
    return stationary_mean(M, basal + shift) if baseline is None else baseline + stationary_mean(M, shift)


def _stabilised(M: Tensor, training: bool) -> Tensor:
    """A knock-down that leaves no stationary law gets as much more decay as it lacks; outside training it is said."""
    with torch.no_grad():
        try:
            lyapunov(M, torch.ones_like(M[..., 0]))
            return M
        except PyrocausalError:
            least = 0.05 + 1e-3 * M.abs().amax((-2, -1))
            lacking = (spectral_abscissa(M) + least).clamp_min(0)
    if not training:
        warnings.warn(
            f"an intervention leaves no stationary law; decay was raised by up to {float(lacking.max()):.3g} to have one",
            RuntimeWarning,
            stacklevel=2,
        )
    return M - torch.diag_embed(lacking[..., None].expand(M.shape[:-1]))
