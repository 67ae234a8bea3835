"""Guide of CITE-VAE: the exogenous state of a cell from what was seen of it, once or at several times.

What is seen, ``s_f = (w, u_f) = z A_f + k_f``, is linear in the exogenous state, so that::

    q(z_n | x_n) ~ Normal(z_n; 0, I) prod_f Normal(a_nf R; (z_n A_nf + k_nf) R, diag(v_nf)^-1)

is Gaussian, knows the treatment through A and k, and leaves the path before the first glimpse as uncertain as the model says. With a linear
decoder and Gaussian noise, or through an exact bijection, the glimpse is the expression itself and q is the exact posterior; otherwise an
encoder gives a_nf and v_nf from the expression alone, never from the treatment; R [I + D, I + D] turns to the axes along which glimpses
are independent (without it the bound would rather turn the programs).

Under a transition by networks the state is walked forward: each glimpse, of precision v, is combined with the prior of the noise given the
path so far (:mod:`pyrocausal.dynamics.walk`); times that were not seen have guesses from what was. A whole path through a bijection leaves
nothing open: q is a point.

``alignment`` pulls the encoder's w of treated and control cells together (the companion paper's fourth equation): ``"cells"`` for random
pairs, as published, which also pays for the spread of w within a group; ``"means"`` for the means of the two groups; ``"unit"`` for what a
unit shows later and what it showed first, which is the same w indeed.

Programs start from the principal axes of the expression, turned at random; ``fit(restarts=...)`` tries several turns. Counts and networks
start from a linear fit to the principal components, which settles what is invariant (``start="random"`` leaves it out, and the inputs of
the encoder as they are; then the penalty helps).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyrocausal.data import PerturbationData
from pyrocausal.dynamics.hits import ways
from pyrocausal.dynamics.sight import Seen, glimpsed, posterior
from pyrocausal.dynamics.walk import Walk
from pyrocausal.errors import DataError, PyrocausalError
from pyrocausal.loading import Batch, moment_batch
from pyrocausal.nn import MLP, Standardise
from pyrocausal.polish import polish
from pyrocausal.units import frames

EXTRA = 10  # principal components beyond as many as there are programs and invariant coordinates, for the noise
STEPS = 150  # of the linear start, before as many of the polish
FINAL = 0.1  # temperature of learned targets at the end
HELD, PART = 2e8, 4096  # values of expression that the polish holds at most, and cells in each part of them
ANNEALED = 0.6  # share of the training after which it is reached


class CITEVAE(PyroModule):
    """The posterior of ``z``; arguments as the model's, and:

    Args:
        n_encoder: width of the encoder, of two layers.
        alignment, aligned: weight and kind of the penalty on w of treated and control cells.
        start: of pairs with an encoder or a bijection: from a ``"linear"`` fit, or ``"random"``.
        polish: quasi-Newton steps after the training, of pairs whose bound is in closed form; none above 2e8 values of expression.
    """

    def __init__(
        self,
        n_genes: int,
        n_perturbations: int,
        n_latent: int = 6,
        n_invariant: int = 6,
        times: Sequence[float] = (0.0, 1.0),
        likelihood: Literal["negative_binomial", "poisson", "gaussian", "flow"] = "gaussian",
        transition: Literal["steps", "ou", "mlp", "flow"] = "steps",
        decoder: Literal["linear", "mlp"] = "linear",
        penetrance: Literal["full", "learned"] = "full",
        alignment: float = 0.0,
        aligned: Literal["means", "cells", "unit"] = "means",
        n_encoder: int = 128,
        polish: int = 1000,
        start: Literal["linear", "random"] = "linear",
    ) -> None:
        super().__init__()
        networks = transition in ("mlp", "flow")
        self.exact = (decoder == "linear" and likelihood == "gaussian" and not networks) or likelihood == "flow"
        self.alignment, self.aligned, self.walks = alignment, aligned, networks
        if start not in ("linear", "random"):
            raise PyrocausalError(f"start={start!r} was given; it is 'linear' or 'random'")
        self.starts = start == "linear" and (not self.exact or (likelihood == "flow" and not networks))  # from a linear fit
        if alignment and (self.exact or aligned not in ("means", "cells", "unit")):
            raise PyrocausalError(
                f"alignment={alignment} with aligned={aligned!r} was given; it is for pairs with an encoder (counts or networks), and "
                "aligns 'means', 'cells' or 'unit'"
            )
        self.settled, self.polish = ANNEALED, polish
        self.learning_rates = {"target_logits": 3.0} | ({"penetrance_logits": 3.0} if penetrance == "learned" else {})
        if penetrance == "learned":
            self.penetrance_logits = nn.Parameter(torch.full((n_perturbations,), 2.0, dtype=torch.float64))
        if not self.exact:
            s, T = n_latent + n_invariant, len(times)
            self.standardise = Standardise(n_genes, log=likelihood != "gaussian").double()
            self.linear = nn.Linear(n_genes, s).double()
            self.network = MLP(n_genes, 2 * s, n_encoder, 2, layer_norm=True).double()
            self.mix = None if networks else nn.Parameter(torch.eye(s, dtype=torch.float64))  # R
            self.guess = MLP(s + n_perturbations + T, 2 * T * n_latent, n_encoder, 1).double() if networks else None
            for network in (self.network, self.guess):
                if network is not None:
                    nn.init.zeros_(network.last.weight)
                    nn.init.zeros_(network.last.bias)
        self._model: list[Any] = []  # not a submodule: the model's parameters stay the model's

    def forward(self, batch: Batch) -> None:
        model = self.model
        if model.penetrance_prior:
            pyro.sample("penetrance", dist.Delta(self.penetrance_logits.sigmoid(), event_dim=1))
        if batch.x is None or batch.moments is not None or (batch.collapsed and model.collapses):
            return
        with batch.cells():
            hit = pyro.sample("hit", dist.Bernoulli(self._taken(batch)).to_event(1)) if model.penetrance_prior else None
            pyro.sample("z", self.posterior(batch, hit))

    @property
    def model(self) -> Any:
        if not self._model:
            raise DataError("the guide does not know its model yet; call guide.meet(model), as pc.build and pc.fit do")
        return self._model[0]

    def posterior(self, batch: Batch, hit: Tensor | None = None) -> Any:
        """``q(z | x)`` of cells, batch shape [n], event [I + (T + 1) D], given which perturbations took in them, [n, P] (all if None)."""
        model, look = self.model, self.model.look(batch)
        course = model.course(batch, batch.dose.to(model.times.dtype))
        course = course if hit is None else course * hit.unsqueeze(-2)
        mechanism, x = model.mechanism(*model.tables()), model.shown(batch)
        if model.whole:
            w, z, _ = model.whole_path(mechanism, course, look).abduct(x)
            return dist.Delta(torch.cat([w, z.flatten(1)], 1), event_dim=1)
        if self.exact:
            return posterior(model.sight_of(mechanism, course, look), x if model.warp is None else model.warp(x)[0], model.observation)
        value, log_v = self.glimpse(x)
        if self.alignment and self.aligned == "unit":
            self._align_units(value, look)
        elif self.alignment and batch.partner is not None:
            self._align(value, batch.partner.to(x.dtype), look)
        if not self.walks:
            return glimpsed(model.sight_of(mechanism, course, look), value, log_v.exp(), self.mix)
        return self._walk(mechanism, course, look, value, log_v)

    def glimpse(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Where (w, u) are and the logarithm of how precisely (along R), [..., I + D] each, from expression [..., G]."""
        h = self.standardise(x)
        a, log_v = self.network(h).chunk(2, -1)
        return self.linear(h) + a, log_v.clamp(-6, 12)

    def _walk(self, mechanism: Any, course: Tensor, look: Tensor, value: Tensor, log_v: Tensor) -> Walk:
        """The path of cells, from glimpses [n, F, I + D] where there are any."""
        model, n_w, (_, D) = self.model, self.model.n_invariant, self.model.shape
        n, T = len(value), len(model.times)
        seen = (look >= 0).to(value.dtype).unsqueeze(-1)
        v_w = log_v[..., :n_w].exp() * seen
        total = 1 + v_w.sum(1)
        assert self.guess is not None
        last = look.max(-1).values
        latest = value.gather(1, look.argmax(-1)[:, None, None].expand(n, 1, value.shape[-1])).squeeze(1)
        known = torch.cat([latest, course[:, -1], nn.functional.one_hot(last, T).to(value.dtype)], -1)
        u, log_precision = self.guess(known).unflatten(-1, (T, 2 * D)).chunk(2, -1)
        u = u + latest[:, None, n_w:]
        later = torch.arange(T, device=look.device) > last.unsqueeze(-1)  # after the last glimpse nothing is known
        precision = (log_precision - 2).clamp(-8, 8).exp() * (~later).unsqueeze(-1)
        at = (look.unsqueeze(-1) == torch.arange(T, device=look.device)).to(value.dtype)  # [n, F, T + 1]
        shown = at.sum(1).unsqueeze(-1) > 0
        u = torch.where(shown, torch.einsum("nft,nfd->ntd", at, value[..., n_w:]), u)
        precision = torch.where(shown, torch.einsum("nft,nfd->ntd", at, log_v[..., n_w:].exp()), precision)
        return Walk(mechanism, model.networks, course, (v_w * value[..., :n_w]).sum(1) / total, total.rsqrt(), u, precision)

    def _align(self, value: Tensor, control: Tensor, look: Tensor) -> None:
        """The companion paper's penalty (its equation 4), on w of the last glimpse; the sign of a factor is turned in a guide."""
        n_w, n = self.model.n_invariant, len(value)
        w = value.gather(1, look.argmax(-1)[:, None, None].expand(n, 1, value.shape[-1]))[:, 0, :n_w]
        off = w - self.glimpse(control)[0][..., :n_w]
        off = off.mean(0, keepdim=True).expand_as(off) if self.aligned == "means" else off
        pyro.factor("alignment", self.alignment * off.square().sum(-1), has_rsample=True)

    def _align_units(self, value: Tensor, look: Tensor) -> None:
        """The same for w of every later glimpse of a unit and of its first."""
        w = value[..., : self.model.n_invariant]
        first = torch.where(look < 0, len(self.model.times), look).argmin(-1)
        reference = w.gather(1, first[:, None, None].expand(-1, 1, w.shape[-1]))
        off = (w - reference).square().sum(-1) * (look >= 0)
        pyro.factor("alignment", self.alignment * off.sum(-1), has_rsample=True)

    @torch.no_grad()
    def _taken(self, batch: Batch) -> Tensor:
        """Probability that each perturbation took in each cell given what was seen, [n, P]."""
        model, dtype = self.model, self.model.times.dtype
        hit, chance = ways(batch.dose.to(dtype), self.penetrance_logits.sigmoid())
        course = (model.course(batch, batch.dose.to(dtype)).unsqueeze(1) * hit.unsqueeze(-2)).flatten(0, 1)
        what = model.sight_of(model.mechanism(*model.tables()), course, model.look(batch).repeat_interleave(chance.shape[1], 0))
        x = model.shown(batch) if model.warp is None else model.warp(model.shown(batch))[0]
        each = Seen(what, model.observation, flat=False).log_prob(x.repeat_interleave(chance.shape[1], 0)).unflatten(0, chance.shape)
        share = (each + chance.clamp_min(1e-30).log()).softmax(-1)
        took = (share.unsqueeze(-1) * hit).sum(1)
        given = batch.dose.to(dtype) != 0
        return torch.where(given, took, self.penetrance_logits.sigmoid()).clamp(0, 1)

    # -- training ------------------------------------------------------------------------------------------------------------------

    def meet(self, model: Any) -> None:
        """The guide reads the model's mechanism, whose parameters stay the model's; alignment needs control cells beside the others."""
        self._model = [model]
        if self.alignment and self.aligned != "unit":
            model.batching = "condition"

    def initialise(self, model: Any, data: PerturbationData) -> None:
        """Loadings from the principal axes of the expression, turned at random; where the posterior is not exact, everything from a fit
        with Gaussian noise and a linear decoder to the principal components, whose likelihood is."""
        known = model.times.cpu().numpy()
        times = data.time if data.path_times is None else data.path_times
        off = 0.0 if times is None else np.abs(times[:, None] - known).min(1)
        if np.max(off) > 1e-3 * max(1.0, float(np.abs(known).max())):
            strange = times[np.argmax(off)]  # type: ignore[index]
            raise DataError(f"the screen has cells at time {strange:g}, the model has {known.tolist()}; build it with times=")
        if self.alignment and self.aligned == "unit" and data.path is None:
            raise DataError("aligned='unit' was given for cells that are seen once; name the units by unit_key=, or align 'means'")
        normal = data.log_normalised() if data.kind == "counts" else data
        x, control = _seen(normal)
        centred, m = x - x.mean(0), len(model.loadings)
        _, spread, axes = torch.linalg.svd(centred, full_matrices=False)
        spread = spread / len(x) ** 0.5
        k, wide = min(m, len(spread)), min(len(model.basis), len(spread))
        model.basis.zero_()
        model.basis[:wide] = spread[:wide, None].clamp_min(1e-3 * spread[0]) * axes[:wide]
        model.turn.data.zero_()
        model.turn.data[:, :k] = torch.linalg.qr(torch.randn(m, m, dtype=x.dtype))[0][:, :k]
        explained = spread[:k, None] * axes[:k]
        left = (centred.square().mean(0) - explained.square().sum(0)).clamp_min(1e-4 * centred.square().mean(0)).clamp_min(1e-8)
        model.bias.data.copy_(x[control].mean(0) if bool(control.any()) else x.mean(0))
        if model.likelihood.name == "gaussian":
            model.likelihood.log_sigma.data.copy_(0.5 * left.log())
        if model.whole:
            model.warp.fit_components(x)
            model.bias.data.zero_()
            model.likelihood.log_sigma.data.zero_()
        if not self.starts:
            return
        more = m if model.warp is not None else min(m + EXTRA, len(spread))
        start = self._linear_start(model, normal, x.mean(0), axes[:more])
        for name, value in start.named_parameters():
            if name not in ("bias", "turn") and not name.startswith("likelihood"):
                model.get_parameter(name).data.copy_(value)
        model.target_logits.data.div_(FINAL)  # it has sharpened
        if model.warp is not None:
            _unwarp(model, x, start)
            return
        W, precision = start.loadings.detach(), start.observation.precision.detach()
        if model.likelihood.name == "gaussian":
            beyond = centred.square().mean(0) - (spread[:more, None] * axes[:more]).square().sum(0)
            noise = (axes[:more].square() / precision.unsqueeze(-1)).sum(0) + beyond.clamp_min(0)
            model.likelihood.log_sigma.data.copy_(0.5 * noise.clamp_min(1e-8).log())
        model.turn.data.zero_()
        model.turn.data[:, :more] = W / spread[:more].clamp_min(1e-3 * spread[0])
        raw, _ = _seen(data)
        if model.likelihood.is_counts:
            model.bias.data.copy_(((raw / raw.sum(-1, keepdim=True)).mean(0) + 1e-6).log())
        if model.rest is not None:
            nn.init.zeros_(model.rest.last.weight)
            nn.init.zeros_(model.rest.last.bias)
        self.standardise.fit_moments(raw)
        h = self.standardise(raw)
        inner = (W * precision) @ W.T
        ridge = 1e-6 * inner.diagonal().mean() * torch.eye(m, dtype=x.dtype)
        glimpse = torch.linalg.solve(inner + ridge, ((centred @ axes[:more].T - start.bias.detach()) * precision @ W.T).T).T
        weight = torch.linalg.solve(h.T @ h + 100 * torch.eye(h.shape[1], dtype=h.dtype), h.T @ (glimpse - glimpse.mean(0)))
        self.linear.weight.data.copy_(weight.T)
        self.linear.bias.data.copy_(glimpse.mean(0) - h.mean(0) @ weight)
        off = glimpse - self.linear(h)
        error = torch.linalg.inv(inner + ridge) + off.mT @ off / len(off)
        if self.mix is None:
            self.network.last.bias.data[m:] = -error.diagonal().log()
            return
        factor = torch.linalg.cholesky(torch.linalg.inv(error))
        self.mix.data.copy_(factor / factor.norm(dim=0))
        self.network.last.bias.data[m:] = 2 * factor.norm(dim=0).log()

    def _linear_start(self, model: Any, data: PerturbationData, centre: Tensor, axes: Tensor) -> Any:
        """A fit to the principal components along ``axes`` [k, G], with the model's own settings but linear."""
        from pyrocausal.fit import fit

        (P, D), k, n_w = model.shape, len(axes), model.n_invariant

        def components(x: Any) -> Any:
            return ((torch.as_tensor(x, dtype=axes.dtype) - centre) @ axes.T).numpy().astype(np.float32)

        linear = replace(
            data,
            x=components(data.dense(np.float64)),
            path=None if data.path is None else components(data.path),
            genes=pd.Index([f"component {i}" for i in range(k)]),
            library_size=np.ones(len(data), np.float32),
        )
        transition = "ou" if model.transition == "ou" else "steps"
        settings = {"transition": transition, "weights": model.weights, "targets": model.given, "lag": model.lag}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # of few times, which the model has said
            start = type(model)(k, P, D, n_w, model.times.tolist(), **settings)
        guide = type(self)(k, P, D, n_w, model.times.tolist(), polish=STEPS)
        seed = int(torch.randint(2**31, ()))
        fit(start, guide, linear, max_epochs=STEPS, lr=1e-1, kl_warmup=0.0, seed=seed, progress=False)
        return start

    def after_training(self, model: Any, data: PerturbationData, seed: int, progress: bool) -> float | None:
        """A bound in closed form has no noise, so that quasi-Newton steps finish what gradients began: on the moments of the conditions,
        or on all cells where their law is not Gaussian."""
        device, frames = model.times.device, 1 if data.path is None else data.path.shape[1]
        if not model.collapses or self.polish == 0:
            return None
        if model.batching == "moments" and data.complete:
            return polish(model, self, [moment_batch(data, model.pooled, device=device, by_time=True)], self.polish, progress)
        if len(data) * frames * len(data.genes) > HELD:
            return None
        parts = np.array_split(np.arange(len(data)), -(-len(data) // PART))
        batches = [replace(data.batch(rows, n_total=len(data), device=device), collapsed=True) for rows in parts]
        return polish(model, self, batches, self.polish, progress)

    def after_step(self, model: Any, batch: Batch, done: float) -> None:
        """Learned targets sharpen, unless they have at the start."""
        model.temperature.fill_(FINAL ** min(1.0, done / ANNEALED) if not self.starts else 1.0)


def _seen(data: PerturbationData) -> tuple[Tensor, Tensor]:
    """Expression of everything that was seen, [n, G] float64, and whether it is of untreated cells, [n]."""
    each = frames(data)
    return torch.as_tensor(each.dense(np.float64)), torch.as_tensor(each.is_control)


def _unwarp(model: Any, x: Tensor, start: Any) -> None:
    """The warp from a linear fit to its components: ``y = (c - bias) W^-1``, in standard deviations at the splines."""
    warp = model.warp
    warp.fit_components(x)
    spread = warp.scale[: warp.k]
    W = start.loadings.detach() / spread  # of the scaled components
    warp.centre += ((start.bias.detach() / spread) * spread) @ warp.axes[:, : warp.k].T
    back = torch.linalg.inv(W)
    sd = (((x - warp.centre) @ warp.axes / warp.scale)[:, : warp.k] @ back).std(0)
    warp.matrices[0].data.copy_(back / sd)
    for K in warp.matrices[1:-1]:
        nn.init.eye_(K)
    warp.matrices[-1].data.copy_(torch.diag(sd))
    model.bias.data.zero_()
    log_sigma = model.likelihood.log_sigma.data
    noise = (start.observation.precision.rsqrt().detach() / spread) @ back.abs() / sd.numel() ** 0.5
    log_sigma.fill_(0.0)  # of the components beyond, which are in standard deviations
    log_sigma[: warp.k] = noise.clamp_min(1e-3).log()
