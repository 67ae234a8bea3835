"""CITE-VAE: latent programs whose dynamics a perturbation changes, over real time (Jiang et al. 2026, arXiv 2605.25581).

**What this is.** The paper's text and code could not be had; this is the family that its abstract names, rebuilt from the equations of its
authors' companion paper (PerturbedVAE, arXiv 2605.19343) and from temporal causal representation learning. Details are our choice, and none
of the paper's numbers is claimed. ``PerturbedVAE`` is the special case of one time, no lag and free weights.

A cell has an invariant state w [n_invariant] and programs u_t [D] at the times 0 = t_0 < ... < t_T; row vectors, c_t the treatment during
the interval that leads to time t::

    keep  = prod_p (1 - c_tp m_p)                         m_p: the programs that p targets lose their parents
    mu    = keep b + sum_p c_tp m_p dmu_p,                log sd^2 = keep s + sum_p c_tp m_p ds_p
    u_t   = u_t L + u_{t-1} B + w C + mu + sd z_t         "steps"; columns of L, B, C times keep; L strictly upper triangular
    du    = (u (B - diag(decay)) + w C + mu) dt + sd dW   "ou", for irregular times, in units of their mean distance; B off the diagonal
    u_t   = u_t L + keep f(u_{t-1}, w) + mu + sd e_t      "mlp", a network with additive noise e_t = z_t; "flow": noise shaped by the past
    w, z_t ~ Normal(0, I)
    eta   = decoder(w, u_t),    x ~ Normal(eta, sigma^2),  or NB(library_size softmax(eta), theta),  or x = warp((w, u_t) + sigma e)

**Regimes.** A cell is destroyed when it is measured: it is seen at its own time only, and the path before it is latent (snapshots; the end
point alone is the case of one time). Units that are seen at several times (``unit_key=`` of the screen: trajectories, or cells that a user
pairs) show a path. Either way (w, z_0 ... z_T) -> (w, u_t) is linear given the treatment, so that the law of what was seen is Gaussian in
closed form if the decoder is linear and the noise Gaussian (by the moments of each condition and time), or the observation is an exact
bijection, the warp. Networks for the transition leave this only for whole trajectories through a warp without noise.

====================  =======================  =============  ===================================================================
site                  shape                    kind           meaning
====================  =======================  =============  ===================================================================
``mask``              [P, D]                   deterministic  m: which programs a perturbation targets, 0 to 1
``effect``            [P, D]                   deterministic  dmu
``graph``             [D, D]                   deterministic  B (``"ou"``) or L (``"steps"``): edge j -> k, instantaneous or of drift
``lagged``            [D, D]                   deterministic  B (``"steps"``)
``weights_prior``     --                       factor         Normal(0, 1) on the weights, so that what no cell says is small
``penetrance``        [P]                      sample         Beta(2, 1): share of the cells in which a perturbation takes, if learned
``dose``              [n, P]                   deterministic  treatment, sustained from the first time on
``hit``               [n, P]                   sample         Bernoulli(penetrance): whether it took in the cell, if learned
``course``            [n, T + 1, P]            deterministic  treatment during the interval that leads to each time
``clamp``             [n, D]                   deterministic  programs held at all times; NaN = free
``held``              [n, T + 1, D]            deterministic  programs held during the interval that leads to each time; NaN = free
``z``                 [n, I + (T + 1) D]       sample         exogenous state (w, z_0, ..., z_T)
``u``                 [n, T + 1, D]            deterministic  programs at all times
``x_loc``, ``x``      [n, G]                   observed       expression at the cell's own time (a unit's last)
``before``            [n]                      factor         log-probability of a unit at the other times at which it was seen
====================  =======================  =============  ===================================================================

**Identified** (given one invertible decoder for all times and treatments, independent Gaussian noise, an invariant state that no treatment
moves, and every program a full target of some perturbation): programs up to permutation, scale and shift, weights up to the same; **not**
with ``weights="free"``, which fit as well after any linear mixing of the programs. B is identified from snapshots of three times or more.
That a cell's path is Markov with independent noise is an assumption which snapshots cannot test; path counterfactuals rest on it.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, ClassVar, Literal, get_args

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyrocausal.dynamics import nonlinear
from pyrocausal.dynamics.course import Mechanism, Step, distinct, roll, steps_of
from pyrocausal.dynamics.hits import ways
from pyrocausal.dynamics.sight import Observation, Seen, SeenMoments, Sight, sight
from pyrocausal.dynamics.whole_path import WholePath
from pyrocausal.errors import PyrocausalError
from pyrocausal.likelihood import Likelihood
from pyrocausal.loading import Batch
from pyrocausal.nn import MLP
from pyrocausal.warp import Warp, Warped

Transition = Literal["steps", "ou", "mlp", "flow"]
Observed = Literal["negative_binomial", "poisson", "gaussian", "flow"]
Penetrance = Literal["full", "learned"]
Weights = Literal["gated", "sparse", "free"]
BASIS = 50  # principal axes beyond as many as there are coordinates that loadings may use
FLOOR = 1e-3  # least standard deviation of Gaussian noise


class CITEVAE(PyroModule):
    """The generative program; float64 throughout.

    Args:
        n_genes, n_perturbations: sizes of the screen.
        n_latent, n_invariant: D programs, I invariant coordinates.
        times: of the measurements, rising; the first is before the perturbations act. ``pc.build`` takes those of the screen.
        likelihood: ``"flow"``: the expression is an exact bijection of (w, u_t) with little noise (and Gaussian noise beyond as many
            principal components); otherwise the law of the expression given the decoder.
        transition: ``"steps"`` (one step between neighbouring times, whatever their distance), ``"ou"`` (real time), ``"mlp"`` or
            ``"flow"`` (as steps, by networks of ``n_hidden`` units).
        weights: ``"gated"``: a perturbation cuts the parents of its targets; ``"sparse"``: and may change weights, with a Laplace prior;
            ``"free"``: changes them at will (the companion paper's class, not identified).
        targets: programs that each perturbation targets, [P, D]; learned if None, one program each.
        decoder: ``"linear"`` or ``"mlp"``.
        lag: False for programs without memory (B = 0).
        penetrance: ``"full"``: a perturbation takes in every cell; ``"learned"``: in a share of them.
    """

    timed: ClassVar = True
    times: Tensor
    temperature: Tensor
    basis: Tensor

    def __init__(
        self,
        n_genes: int,
        n_perturbations: int,
        n_latent: int = 6,
        n_invariant: int = 6,
        times: Sequence[float] = (0.0, 1.0),
        likelihood: Observed = "gaussian",
        transition: Transition = "steps",
        weights: Weights = "gated",
        targets: Any = None,
        decoder: Literal["linear", "mlp"] = "linear",
        lag: bool = True,
        penetrance: Penetrance = "full",
        n_hidden: int = 128,
        n_layers: int = 2,
    ) -> None:
        super().__init__()
        P, D, n_w, T = n_perturbations, n_latent, n_invariant, len(times)
        _check(times, transition, weights, decoder, targets, (P, D))
        _check_together(likelihood, transition, decoder, penetrance, lag)
        if T < 3 and lag:
            warnings.warn(
                f"{T} times were given: the transition between them is not identified, only programs are", RuntimeWarning, stacklevel=2
            )
        double: dict[str, Any] = {"dtype": torch.float64}
        self.shape, self.cyclic = (P, D), transition == "ou"
        self.n_invariant, self.transition, self.weights, self.lag = n_w, transition, weights, lag
        self.register_buffer("times", torch.tensor([float(t) for t in times], **double))
        self.register_buffer("temperature", torch.ones((), **double))  # of learned targets, while training
        self.register_buffer("given", None if targets is None else torch.as_tensor(targets).to(torch.float64))
        self.target_logits = nn.Parameter(0.1 * torch.randn(P, D, **double), requires_grad=targets is None)
        self.instant_weight = nn.Parameter(torch.zeros(D, D, **double), requires_grad=transition != "ou")
        self.lagged_weight = nn.Parameter(torch.zeros(D, D, **double), requires_grad=lag)
        self.log_decay = nn.Parameter(torch.zeros(D, **double), requires_grad=transition == "ou")
        self.invariant_weight = nn.Parameter(0.1 * torch.randn(n_w, D, **double))
        self.mean, self.log_var = nn.Parameter(torch.zeros(D, **double)), nn.Parameter(torch.zeros(D, **double))
        self.start_invariant = nn.Parameter(torch.zeros(n_w, D, **double), requires_grad=transition == "ou")
        self.start_mean = nn.Parameter(torch.zeros(D, **double), requires_grad=transition == "ou")
        self.start_noise = nn.Parameter(torch.eye(D, **double), requires_grad=transition == "ou")
        self.mean_change = nn.Parameter(0.1 * torch.randn(P, D, **double))
        self.log_var_change = nn.Parameter(torch.zeros(P, D, **double))
        gated = weights == "gated"
        self.free = nn.ParameterList(
            [] if gated else [nn.Parameter(0.01 * torch.randn(P, n, D, **double)) for n in (D, D, n_w)]
        )  # of L, B, C
        networks = transition in ("mlp", "flow")
        self.networks = nonlinear.Transition(D, n_w, transition == "flow", n_hidden) if networks else None
        self.penetrance_prior = penetrance == "learned"
        flow = likelihood == "flow"
        self.warp = Warp(n_genes, n_w + D) if flow else None
        self.bias = nn.Parameter(torch.zeros(n_genes, **double), requires_grad=not flow)
        k = min(n_genes, n_w + D + BASIS)
        self.turn = nn.Parameter(torch.randn(n_w + D, k, **double) / math.sqrt(n_w + D), requires_grad=not flow)
        self.register_buffer("basis", torch.eye(k, n_genes, **double))  # principal axes, as long as the expression spreads along them
        self.rest = MLP(n_w + D, n_genes, n_hidden, n_layers).double() if decoder == "mlp" else None
        self.likelihood = Likelihood("gaussian" if likelihood == "flow" else likelihood, n_genes, floor=FLOOR).double()
        self.data_kind = "counts" if self.likelihood.is_counts else "normalised"
        gaussian = decoder == "linear" and not self.likelihood.is_counts
        self.whole = networks and flow  # the path itself is seen
        self.exact = gaussian and not networks
        self.collapses = self.exact or self.whole
        self.batching = "moments" if self.exact and not flow and not self.penetrance_prior else "cells"
        self.pooled, self.by_time = False, True

    @property
    def clock(self) -> Tensor:
        """Times in units of their mean distance, in which the rates of ``"ou"`` are."""
        first, last = self.times[0], self.times[-1]
        return (self.times - first) * ((len(self.times) - 1) / (last - first).clamp_min(1e-12))

    @property
    def schedule(self) -> Tensor:
        """Share of the dose that cells have until each time, [T + 1]: none at the first, unless it is the only one."""
        return torch.ones_like(self.times) if len(self.times) == 1 else (torch.arange(len(self.times)) > 0).to(self.times)

    @property
    def loadings(self) -> Tensor:
        """W, [I + D, G], in the units of the expression's own spread, so that no direction is stiff."""
        return self.turn @ self.basis if self.warp is None else torch.eye(len(self.turn), len(self.bias)).to(self.turn)

    @property
    def observation(self) -> Observation:
        """What is linear in (w, u_t): the expression, or its warped coordinates."""
        return Observation(self.loadings, self.bias, (FLOOR + self.likelihood.log_sigma.exp()).pow(-2))

    def tables(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Values of ``mask``, ``effect``, ``graph`` and ``lagged``, before any intervention."""
        steps, memory = self.transition != "ou", self.lagged_weight * (1.0 if self.lag else 0.0)
        off = 1 - torch.eye(len(memory), dtype=memory.dtype, device=memory.device)
        graph, lagged = (self.instant_weight.triu(1), memory) if steps else (memory * off, torch.zeros_like(memory))
        return self.mask, self.mean_change, graph, lagged

    # -- the mechanism -------------------------------------------------------------------------------------------------------------

    @property
    def mask(self) -> Tensor:
        """Targets, [P, D]: given, or a softmax over the programs that sharpens while training; all programs where weights are free."""
        if self.weights == "free":
            return torch.ones_like(self.mean_change)
        return (self.target_logits / self.temperature).softmax(-1) if self.given is None else self.given

    def mechanism(self, mask: Tensor, effect: Tensor, graph: Tensor, lagged: Tensor) -> Mechanism:
        """With the sites that may be intervened on in their places."""
        steps = self.transition != "ou"
        off = 1 - torch.eye(len(self.mean), dtype=self.mean.dtype, device=self.mean.device)
        free = tuple(self.free)
        if free:
            free = (free[0].triu(1), free[1] * (1.0 if self.lag else 0.0) * (1.0 if steps else off), free[2])
        return Mechanism(
            instant=graph if steps else torch.zeros_like(graph),
            lagged=lagged if steps else graph,
            decay=self.log_decay.exp(),
            invariant=self.invariant_weight,
            mean=self.mean,
            log_var=self.log_var,
            start=(self.start_invariant, self.start_mean, self.start_noise.triu()),
            mask=mask,
            cuts=self.weights != "free",
            mean_change=effect,
            log_var_change=self.log_var_change,
            free=free or None,
        )

    def steps(self, mechanism: Mechanism, course: Tensor, held: Tensor) -> list[Step]:
        """Steps of R courses [R, T + 1, P]."""
        return steps_of(mechanism, course, held, self.clock, "ou" if self.transition == "ou" else "steps")

    def look(self, batch: Batch) -> Tensor:
        """Positions of the times at which each cell was seen, [n, F]; -1 where a unit was not; the last time without times."""
        if batch.path_time is not None:
            at = (batch.path_time.nan_to_num().to(self.times.dtype).unsqueeze(-1) - self.times).abs().argmin(-1)
            return torch.where(batch.path_time.isnan(), -1, at)
        if batch.time is None:
            return torch.full((len(batch), 1), len(self.times) - 1, device=self.times.device)
        return (batch.time.to(self.times.dtype).unsqueeze(-1) - self.times).abs().argmin(-1, keepdim=True)

    def course(self, batch: Batch, dose: Tensor) -> Tensor:
        """Treatment during the interval that leads to each time, [..., n, T + 1, P]: sustained from the first on, or as units had it."""
        sustained = dose.unsqueeze(-2) * self.schedule[:, None]
        if batch.course is None:
            return sustained
        if batch.course.shape[-2] != len(self.times):
            raise PyrocausalError(
                f"the treatment of units changes over {batch.course.shape[-2]} times, the model has {len(self.times)}; build it with the "
                "times of the screen"
            )
        given = batch.course.to(sustained.dtype) * (self.schedule > 0).unsqueeze(-1)
        return torch.where((dose == batch.dose.to(dose.dtype)).all(-1)[..., None, None], given, sustained)

    def shown(self, batch: Batch) -> Tensor:
        """What cells show, [n, F, G]; F = 1 for those that were seen once."""
        assert batch.x is not None
        return (batch.x.unsqueeze(-2) if batch.path is None else batch.path).to(self.times.dtype)

    def decode(self, w: Tensor, u: Tensor) -> Tensor:
        """Linear predictor of each gene, or the expression that a bijection gives, [..., G]."""
        s = torch.cat([w.expand(*u.shape[:-1], w.shape[-1]), u], -1)
        eta = self.bias + s @ self.loadings
        if self.warp is not None:
            return self.warp.inverse(eta)
        return eta if self.rest is None else eta + self.rest(s)

    def law(self, w: Tensor, u: Tensor, library_size: Tensor, nonzeros: Any = None) -> tuple[Tensor, Any]:
        """``x_loc`` [..., G] and the law of the expression of cells with programs u [..., D]."""
        if self.warp is not None:
            y = self.bias + torch.cat([w.expand(*u.shape[:-1], w.shape[-1]), u], -1) @ self.loadings
            law = Warped(self.likelihood(y), self.warp)
            return law.mean, law
        x_loc = self.likelihood.mean(self.decode(w, u), library_size)
        return x_loc, self.likelihood(x_loc, nonzeros)

    def paths(self, mechanism: Mechanism, course: Tensor, held: Tensor, row: Tensor, w: Tensor, noise: Tensor) -> Tensor:
        """Programs of cells at all times, [n, T + 1, D], under the distinct courses and holds of their rows."""
        if self.networks is None:
            return roll(self.steps(mechanism, course, held), row, w, noise)
        return nonlinear.roll(mechanism, self.networks, course, held, row, w, noise)

    def split(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """``(w, noise)`` from the exogenous state, [..., I] and [..., T + 1, D]."""
        return z[..., : self.n_invariant], z[..., self.n_invariant :].unflatten(-1, (len(self.times), self.shape[1]))

    def forward(self, batch: Batch) -> Tensor:
        D = self.shape[1]
        T, n_w = len(self.times), self.n_invariant
        one = self.times.new_ones(())
        gene = {"event_dims": ("gene",)}
        tables = zip(("mask", "effect", "graph", "lagged"), self.tables(), strict=True)
        mask, effect, graph, lagged = (pyro.deterministic(name, value, event_dim=2) for name, value in tables)
        pyro.factor("weights_prior", self._log_prior())
        mechanism = self.mechanism(mask, effect, graph, lagged)
        rho = None
        if self.penetrance_prior:
            size = one.expand(self.shape[0])
            rho = pyro.sample("penetrance", dist.Beta(2 * size, size).to_event(1), infer={"event_dims": ("perturbation",)})
        seen = batch.x is not None and batch.collapsed and self.collapses

        with batch.cells():
            dose = pyro.deterministic("dose", batch.dose, event_dim=1).to(one.dtype)
            course = self.course(batch, dose)
            if rho is not None and not seen:
                course = course * pyro.sample("hit", dist.Bernoulli(rho).to_event(1), infer={"event_dims": ("perturbation",)}).unsqueeze(-2)
            course = pyro.deterministic("course", course, event_dim=2)
            clamp = pyro.deterministic("clamp", one.new_full((D,), math.nan), event_dim=1).to(one.dtype)
            always = clamp.unsqueeze(-2).expand(*clamp.shape[:-1], T, D)
            held = pyro.deterministic("held", always, event_dim=2)
            n = len(batch)
            course, held = (v.to(one.dtype).broadcast_to(n, T, v.shape[-1]) for v in (course, held))
            if seen:
                return pyro.sample(
                    "x", self._law_of_seen(mechanism, course, batch, rho), obs=batch.path if batch.path is not None else batch.x
                )
            rows, holds, row = distinct(course, held)
            if batch.moments is not None:
                what = sight(self.steps(mechanism, rows, holds), row, self.look(batch))
                return pyro.sample("x", SeenMoments(what, self.observation, batch.moments), obs=batch.x, infer=gene)
            z = pyro.sample("z", dist.Normal(0 * one, one).expand([n_w + T * D]).to_event(1), infer={"event_dims": ("exogenous",)})
            w, noise = self.split(z)
            u = pyro.deterministic("u", self.paths(mechanism, rows, holds, row, w, noise), event_dim=2)
            at = self.look(batch)
            if batch.path is not None:
                self._observe_before(batch, at, w, u)
            now = u.gather(-2, at.max(-1).values[:, None, None].expand(n, 1, D)).squeeze(-2)
            x_loc, law = self.law(w, now, batch.library_size.to(one.dtype), batch.nonzeros)
            pyro.deterministic("x_loc", x_loc, event_dim=1)
            return pyro.sample("x", law, obs=batch.x, infer=gene)

    def _observe_before(self, batch: Batch, at: Tensor, w: Tensor, u: Tensor) -> None:
        """Units at all times at which they were seen but their last."""
        assert batch.path is not None
        earlier = (at >= 0) & (at < at.max(-1, keepdim=True).values)  # [n, F]
        then = u.gather(-2, at.clamp_min(0).unsqueeze(-1).expand(*at.shape, u.shape[-1]))
        _, law = self.law(w.unsqueeze(-2), then, batch.path.sum(-1, keepdim=True).clamp_min(1).to(u.dtype))
        pyro.factor("before", (law.log_prob(batch.path.to(u.dtype)) * earlier).sum(-1))

    def _law_of_seen(self, mechanism: Mechanism, course: Tensor, batch: Batch, rho: Tensor | None) -> Any:
        """The law of what cells show, their state integrated out; under a learned penetrance a mixture of all ways to take."""
        chances = None
        if rho is not None:
            hit, chances = ways(batch.dose.to(course.dtype), rho)
            course = (course.unsqueeze(1) * hit.unsqueeze(-2)).flatten(0, 1)
        look = self.look(batch)
        if self.whole:
            return self.whole_path(mechanism, course, look)
        what = self.sight_of(mechanism, course, look if chances is None else look.repeat_interleave(chances.shape[1], 0))
        law = Seen(what, self.observation, chances, flat=batch.path is None)
        return law if self.warp is None else Warped(law, self.warp, (look >= 0).to(course.dtype))

    def whole_path(self, mechanism: Mechanism, course: Tensor, look: Tensor) -> WholePath:
        """The law of trajectories with a course [n, T + 1, P] that a warp shows."""
        if look.shape[1] != len(self.times) or bool((look < 0).any()):
            raise PyrocausalError(
                f"transition={self.transition!r} with likelihood='flow' needs units that were seen at all {len(self.times)} times, "
                "named by unit_key= of the screen; fit snapshots with transition='steps' or another likelihood"
            )
        assert self.warp is not None and self.networks is not None
        sigma = FLOOR + self.likelihood.log_sigma.exp()
        return WholePath(mechanism, self.networks, self.warp, sigma, self.n_invariant, course)

    def sight_of(self, mechanism: Mechanism, course: Tensor, look: Tensor) -> Sight:
        """What cells with a course [n, T + 1, P] show; nothing is held."""
        rows, holds, row = distinct(course, course.new_full((*course.shape[:2], self.shape[1]), math.nan))
        return sight(self.steps(mechanism, rows, holds), row, look)

    def _log_prior(self) -> Tensor:
        """Standard normal weights; Laplace changes of weights where they are sparse."""
        parts = [
            self.instant_weight.triu(1),
            self.lagged_weight,
            self.invariant_weight,
            self.mean,
            self.log_var,
            self.mean_change / 3,
            self.log_var_change,
        ]
        total = -0.5 * torch.stack([p.square().sum() for p in parts]).sum()
        if self.weights == "sparse":
            total = total - 10 * torch.stack([(p.square() + 1e-6).sqrt().sum() for p in self.free]).sum()
        elif self.weights == "free":
            total = total - 0.5 * torch.stack([p.square().sum() for p in self.free]).sum()
        return total


def _check(times: Sequence[float], transition: str, weights: str, decoder: str, targets: Any, shape: tuple[int, int]) -> None:
    at = [float(t) for t in times]
    if len(at) < 1 or any(b <= a for a, b in pairwise(at)):
        raise PyrocausalError(f"times={tuple(times)} were given; give one or more, rising, the first before the perturbations act")
    if transition not in get_args(Transition) or weights not in ("gated", "sparse", "free") or decoder not in ("linear", "mlp"):
        raise PyrocausalError(
            f"transition={transition!r}, weights={weights!r} and decoder={decoder!r} were given; choose 'steps', 'ou', 'mlp' or 'flow'; "
            "'gated', 'sparse' or 'free'; 'linear' or 'mlp'"
        )
    if targets is not None and tuple(torch.as_tensor(targets).shape) != shape:
        raise PyrocausalError(f"targets of shape {tuple(torch.as_tensor(targets).shape)} were given; a row for each perturbation: {shape}")


def _check_together(likelihood: str, transition: str, decoder: str, penetrance: str, lag: bool) -> None:
    networks, flow = transition in ("mlp", "flow"), likelihood == "flow"
    if flow and decoder != "linear":
        raise PyrocausalError(f"likelihood='flow' and decoder={decoder!r} were given; a bijection has no decoder, so leave it out")
    if penetrance not in ("full", "learned"):
        raise PyrocausalError(f"penetrance={penetrance!r} was given; it is 'full' or 'learned'")
    exact = not networks and decoder == "linear" and likelihood in ("gaussian", "flow")
    if penetrance == "learned" and not exact:
        raise PyrocausalError(
            "penetrance='learned' was given with networks or counts; it is a mixture of laws in closed form, for a linear decoder with "
            "Gaussian noise (of log-normalised counts), or likelihood='flow'"
        )
    if networks and not lag:
        raise PyrocausalError(f"transition={transition!r} with lag=False was given; without memory there is no transition, so use 'steps'")
