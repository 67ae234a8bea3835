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
    w, z_t ~ Normal(0, I)
    eta   = decoder(w, u_t),    x ~ Normal(eta, sigma^2),  or NB(library_size softmax(eta), theta)

**Snapshots.** A cell is destroyed when it is measured: it is seen at its own time only, and the path before it is latent. Given the
treatment, (w, z_0 ... z_T) -> (w, u_t) is linear, so that the prior of what was seen is Gaussian in closed form, and with the linear
decoder and Gaussian noise so is the likelihood, by the moments of each condition and time.

====================  =======================  =============  ===================================================================
site                  shape                    kind           meaning
====================  =======================  =============  ===================================================================
``mask``              [P, D]                   deterministic  m: which programs a perturbation targets, 0 to 1
``effect``            [P, D]                   deterministic  dmu
``graph``             [D, D]                   deterministic  B (``"ou"``) or L (``"steps"``): edge j -> k, instantaneous or of drift
``lagged``            [D, D]                   deterministic  B (``"steps"``)
``weights_prior``     --                       factor         Normal(0, 1) on the weights, so that what no cell says is small
``dose``              [n, P]                   deterministic  treatment, sustained from the first time on
``course``            [n, T + 1, P]            deterministic  treatment during the interval that leads to each time
``clamp``             [n, D]                   deterministic  programs held at all times; NaN = free
``held``              [n, T + 1, D]            deterministic  programs held during the interval that leads to each time; NaN = free
``z``                 [n, I + (T + 1) D]       sample         exogenous state (w, z_0, ..., z_T)
``u``                 [n, T + 1, D]            deterministic  programs at all times
``x_loc``, ``x``      [n, G]                   observed       expression at the cell's own time
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
from typing import Any, ClassVar, Literal

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyrocausal.dynamics.course import Mechanism, Step, Transition, distinct, loadings, roll, steps_of
from pyrocausal.dynamics.snapshots import ConditionNormal
from pyrocausal.errors import PyrocausalError
from pyrocausal.likelihood import Likelihood, LikelihoodName
from pyrocausal.loading import Batch
from pyrocausal.nn import MLP

Weights = Literal["gated", "sparse", "free"]
BASIS = 50  # principal axes beyond as many as there are coordinates that loadings may use
FLOOR = 1e-3  # least standard deviation of Gaussian noise


class CITEVAE(PyroModule):
    """The generative program; float64 throughout.

    Args:
        n_genes, n_perturbations: sizes of the screen.
        n_latent, n_invariant: D programs, I invariant coordinates.
        times: of the measurements, rising; the first is before the perturbations act. ``pc.build`` takes those of the screen.
        transition: ``"steps"`` (one step between neighbouring times, whatever their distance) or ``"ou"`` (real time).
        weights: ``"gated"``: a perturbation cuts the parents of its targets; ``"sparse"``: and may change weights, with a Laplace prior;
            ``"free"``: changes them at will (the companion paper's class, not identified).
        targets: programs that each perturbation targets, [P, D]; learned if None, one program each.
        decoder: ``"linear"`` or ``"mlp"``.
        lag: False for programs without memory (B = 0).
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
        likelihood: LikelihoodName = "gaussian",
        transition: Transition = "steps",
        weights: Weights = "gated",
        targets: Any = None,
        decoder: Literal["linear", "mlp"] = "linear",
        lag: bool = True,
        n_hidden: int = 128,
        n_layers: int = 2,
    ) -> None:
        super().__init__()
        P, D, n_w, T = n_perturbations, n_latent, n_invariant, len(times)
        _check(times, transition, weights, decoder, targets, (P, D))
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
        self.instant_weight = nn.Parameter(torch.zeros(D, D, **double), requires_grad=transition == "steps")
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
        self.bias = nn.Parameter(torch.zeros(n_genes, **double))
        k = min(n_genes, n_w + D + BASIS)
        self.turn = nn.Parameter(torch.randn(n_w + D, k, **double) / math.sqrt(n_w + D))
        self.register_buffer("basis", torch.eye(k, n_genes, **double))  # principal axes, as long as the expression spreads along them
        self.rest = MLP(n_w + D, n_genes, n_hidden, n_layers).double() if decoder == "mlp" else None
        self.likelihood = Likelihood(likelihood, n_genes, floor=FLOOR).double()
        self.data_kind = "counts" if self.likelihood.is_counts else "normalised"
        self.exact = decoder == "linear" and not self.likelihood.is_counts
        self.batching = "moments" if self.exact else "cells"
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
        return self.turn @ self.basis

    @property
    def precision(self) -> Tensor:
        """Of the Gaussian noise, [G]."""
        return (FLOOR + self.likelihood.log_sigma.exp()).pow(-2)

    def tables(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Values of ``mask``, ``effect``, ``graph`` and ``lagged``, before any intervention."""
        steps, memory = self.transition == "steps", self.lagged_weight * (1.0 if self.lag else 0.0)
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
        steps = self.transition == "steps"
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
        return steps_of(mechanism, course, held, self.clock, self.transition)

    def at(self, time: Tensor | None, n: int) -> Tensor:
        """Position of each cell's time among the model's, [n]; the last without times."""
        if time is None:
            return torch.full((n,), len(self.times) - 1, device=self.times.device)
        return (time.to(self.times.dtype).unsqueeze(-1) - self.times).abs().argmin(-1)

    def decode(self, w: Tensor, u: Tensor) -> Tensor:
        """Linear predictor of each gene, [..., G]."""
        s = torch.cat([w.expand(*u.shape[:-1], w.shape[-1]), u], -1)
        eta = self.bias + s @ self.loadings
        return eta if self.rest is None else eta + self.rest(s)

    def split(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """``(w, noise)`` from the exogenous state, [..., I] and [..., T + 1, D]."""
        return z[..., : self.n_invariant], z[..., self.n_invariant :].unflatten(-1, (len(self.times), self.shape[1]))

    def forward(self, batch: Batch) -> Tensor:
        D = self.shape[1]
        T, n_w = len(self.times), self.n_invariant
        one = self.times.new_ones(())
        tables = zip(("mask", "effect", "graph", "lagged"), self.tables(), strict=True)
        mask, effect, graph, lagged = (pyro.deterministic(name, value, event_dim=2) for name, value in tables)
        pyro.factor("weights_prior", self._log_prior())
        mechanism = self.mechanism(mask, effect, graph, lagged)

        with batch.cells():
            dose = pyro.deterministic("dose", batch.dose, event_dim=1).to(one.dtype)
            course = pyro.deterministic("course", dose.unsqueeze(-2) * self.schedule[:, None], event_dim=2)
            clamp = pyro.deterministic("clamp", one.new_full((D,), math.nan), event_dim=1).to(one.dtype)
            always = clamp.unsqueeze(-2).expand(*clamp.shape[:-1], T, D)
            held = pyro.deterministic("held", always, event_dim=2)
            n = len(batch)
            course, held = (v.to(one.dtype).broadcast_to(n, T, v.shape[-1]) for v in (course, held))
            rows, holds, row = distinct(course, held)
            steps = self.steps(mechanism, rows, holds)
            if batch.moments is not None:
                return pyro.sample("x", self._law_of_moments(steps, row, batch), obs=batch.x, infer={"event_dims": ("gene",)})
            z = pyro.sample("z", dist.Normal(0 * one, one).expand([n_w + T * D]).to_event(1), infer={"event_dims": ("exogenous",)})
            w, noise = self.split(z)
            u = pyro.deterministic("u", roll(steps, row, w, noise), event_dim=2)
            now = u.gather(-2, self.at(batch.time, n)[:, None, None].expand(n, 1, D)).squeeze(-2)
            x_loc = self.likelihood.mean(self.decode(w, now), batch.library_size.to(one.dtype))
            x_loc = pyro.deterministic("x_loc", x_loc, event_dim=1)
            return pyro.sample("x", self.likelihood(x_loc, batch.nonzeros), obs=batch.x, infer={"event_dims": ("gene",)})

    def _law_of_moments(self, steps: list[Step], row: Tensor, batch: Batch) -> ConditionNormal:
        """``x ~ Normal(bias + k W, W' A' A W + sigma^2)`` in each condition and time, W the loadings of (w, u)."""
        A, k = seen(steps, row, self.at(batch.time, len(batch)), self.n_invariant)
        assert batch.moments is not None
        sigma = FLOOR + self.likelihood.log_sigma.exp()
        loc = self.bias + k @ self.loadings
        root = A @ self.loadings  # [Q, I + (T + 1) D, G]
        return ConditionNormal(loc, root.mT @ root + torch.diag(sigma.square()), batch.moments)

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


def seen(steps: list[Step], row: Tensor, at: Tensor, n_invariant: int) -> tuple[Tensor, Tensor]:
    """``(w, u_t) = z A + k`` of cells at their own times: A [n, I + (T + 1) D, I + D] and k [n, I + D]."""
    A, k = loadings(steps)
    A, k = A[row, at], k[row, at]
    eye = torch.eye(A.shape[-2], n_invariant, dtype=A.dtype, device=A.device)
    return torch.cat([eye.expand(len(A), *eye.shape), A], -1), torch.cat([k.new_zeros(len(k), n_invariant), k], -1)


def _check(times: Sequence[float], transition: str, weights: str, decoder: str, targets: Any, shape: tuple[int, int]) -> None:
    at = [float(t) for t in times]
    if len(at) < 1 or any(b <= a for a, b in pairwise(at)):
        raise PyrocausalError(f"times={tuple(times)} were given; give one or more, rising, the first before the perturbations act")
    if transition not in ("steps", "ou") or weights not in ("gated", "sparse", "free") or decoder not in ("linear", "mlp"):
        raise PyrocausalError(
            f"transition={transition!r}, weights={weights!r} and decoder={decoder!r} were given; choose 'steps' or 'ou'; 'gated', 'sparse' "
            "or 'free'; 'linear' or 'mlp'"
        )
    if targets is not None and tuple(torch.as_tensor(targets).shape) != shape:
        raise PyrocausalError(f"targets of shape {tuple(torch.as_tensor(targets).shape)} were given; a row for each perturbation: {shape}")
