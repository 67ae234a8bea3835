"""Guide of CITE-VAE: the exogenous state of a cell from one glimpse of it.

The cell shows ``s = (w, u_t)`` at its own time with some noise, and ``s = z A + k`` is linear in its exogenous state, so that::

    q(z_n | x_n) ~ Normal(z_n; 0, I) Normal(a_n; z_n A_n + k_n, diag(v_n)^-1)

is Gaussian, knows the treatment through A and k, and leaves the path before the glimpse as uncertain as the model says. With a linear
decoder and Gaussian noise the glimpse is the expression itself, ``x ~ Normal(bias + s W, sigma^2)``, and q is the exact posterior;
otherwise an encoder gives a_n and v_n from the expression alone, never from the treatment.

Programs start from the principal axes of the expression, turned at random; ``fit(restarts=...)`` tries several turns. Counts and networks
start from a linear fit to the principal components.
"""

from __future__ import annotations

import warnings
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
from pyrocausal.dynamics.course import distinct
from pyrocausal.dynamics.snapshots import glimpsed
from pyrocausal.errors import DataError
from pyrocausal.likelihood import LikelihoodName
from pyrocausal.loading import Batch
from pyrocausal.nn import MLP, Standardise

EXTRA = 10  # principal components beyond as many as there are programs and invariant coordinates, for the noise
STEPS = 800  # of the linear start
FINAL = 0.1  # temperature of learned targets at the end
ANNEALED = 0.6  # share of the training after which it is reached


class CITEVAE(PyroModule):
    """The posterior of ``z``; arguments as the model's, and ``n_encoder``: width of the encoder, of two layers."""

    def __init__(
        self,
        n_genes: int,
        n_perturbations: int,
        n_latent: int = 6,
        n_invariant: int = 6,
        likelihood: LikelihoodName = "gaussian",
        decoder: Literal["linear", "mlp"] = "linear",
        n_encoder: int = 128,
    ) -> None:
        super().__init__()
        self.exact = decoder == "linear" and likelihood == "gaussian"
        self.settled = ANNEALED
        self.learning_rates = {"target_logits": 3.0}
        if not self.exact:
            self.standardise = Standardise(n_genes, log=likelihood != "gaussian").double()
            self.linear = nn.Linear(n_genes, n_latent + n_invariant).double()
            self.network = MLP(n_genes, 2 * (n_latent + n_invariant), n_encoder, 2, layer_norm=True).double()
            nn.init.zeros_(self.network.last.weight)
            nn.init.zeros_(self.network.last.bias)
        self._model: list[Any] = []  # not a submodule: the model's parameters stay the model's

    def forward(self, batch: Batch) -> None:
        if batch.x is None or batch.moments is not None:
            return
        with batch.cells():
            pyro.sample("z", self.posterior(batch))

    def posterior(self, batch: Batch) -> Any:
        """``q(z | x)``, batch shape [n], event [I + (T + 1) D]."""
        from pyrocausal.models.cite_vae import seen

        if not self._model:
            raise DataError("the guide does not know its model yet; call guide.meet(model), as pc.build and pc.fit do")
        model = self._model[0]
        assert batch.x is not None
        dtype, T = model.times.dtype, len(model.times)
        course = batch.dose.to(dtype).unsqueeze(-2) * model.schedule[:, None]
        held = course.new_full((len(batch), T, model.shape[1]), torch.nan)
        rows, holds, row = distinct(course, held)
        A, k = seen(model.steps(model.mechanism(*model.tables()), rows, holds), row, model.at(batch.time, len(batch)), model.n_invariant)
        x = batch.x.to(dtype)
        if self.exact:
            precision = model.precision
            W = model.loadings
            pull = (x - model.bias) * precision  # of s: W diag(precision) W'
            return _from_expression(A, k, W, precision, pull)
        h = self.standardise(x)
        a, log_v = self.network(h).chunk(2, -1)
        return glimpsed(A, k, self.linear(h) + a, log_v.clamp(-6, 8).exp())

    # -- training ------------------------------------------------------------------------------------------------------------------

    def meet(self, model: Any) -> None:
        """The guide reads the model's mechanism, whose parameters stay the model's."""
        self._model = [model]

    def initialise(self, model: Any, data: PerturbationData) -> None:
        """Loadings from the principal axes of the expression, turned at random; where the posterior is not exact, everything from a fit
        with Gaussian noise and a linear decoder to the principal components, whose likelihood is."""
        known = model.times.cpu().numpy()
        off = 0.0 if data.time is None else np.abs(data.time[:, None] - known).min(1)
        if np.max(off) > 1e-3 * max(1.0, float(np.abs(known).max())):
            strange = data.time[np.argmax(off)]  # type: ignore[index]
            raise DataError(f"the screen has cells at time {strange:g}, the model has {known.tolist()}; build it with times=")
        x = torch.as_tensor((data.log_normalised() if data.kind == "counts" else data).dense(np.float64))
        control = torch.as_tensor(data.is_control)
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
        if self.exact:
            return
        more = min(m + EXTRA, len(spread))
        start = self._linear_start(model, data, centred @ axes[:more].T)
        for name, value in start.named_parameters():
            if name not in ("bias", "turn") and not name.startswith("likelihood"):
                model.get_parameter(name).data.copy_(value)
        model.target_logits.data.div_(FINAL)  # it has sharpened
        W, precision = start.loadings.detach(), start.precision.detach()
        model.turn.data.zero_()
        model.turn.data[:, :more] = W / spread[:more].clamp_min(1e-3 * spread[0])
        if model.likelihood.is_counts:
            rate = torch.as_tensor(data.dense(np.float64)) / torch.as_tensor(data.library_size.astype(np.float64))[:, None]
            model.bias.data.copy_((rate.mean(0) + 1e-6).log())
        if model.rest is not None:
            nn.init.zeros_(model.rest.last.weight)
            nn.init.zeros_(model.rest.last.bias)
        raw = torch.as_tensor(data.dense(np.float64))
        self.standardise.fit_moments(raw)
        h = self.standardise(raw)
        inner = (W * precision) @ W.T
        ridge = 1e-6 * inner.diagonal().mean() * torch.eye(m, dtype=x.dtype)
        glimpse = torch.linalg.solve(inner + ridge, ((centred @ axes[:more].T - start.bias.detach()) * precision @ W.T).T).T
        weight = torch.linalg.solve(h.T @ h + 100 * torch.eye(h.shape[1], dtype=h.dtype), h.T @ (glimpse - glimpse.mean(0)))
        self.linear.weight.data.copy_(weight.T)
        self.linear.bias.data.copy_(glimpse.mean(0) - h.mean(0) @ weight)
        error = (glimpse - self.linear(h)).square().mean(0) + 1 / inner.diagonal()
        self.network.last.bias.data.copy_(torch.cat([torch.zeros(m, dtype=x.dtype), -error.detach().log()]))

    def _linear_start(self, model: Any, data: PerturbationData, components: Tensor) -> Any:
        """A fit to the principal components [n, k] of the cells, with the model's own settings."""
        from pyrocausal.fit import fit

        (P, D), k, n_w = model.shape, components.shape[1], model.n_invariant
        names = pd.Index([f"component {i}" for i in range(k)])
        ones = np.ones(len(data), np.float32)
        linear = replace(data, x=components.numpy().astype(np.float32), genes=names, library_size=ones, kind="normalised")
        settings = {"transition": model.transition, "weights": model.weights, "targets": model.given, "lag": model.lag}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # of few times, which the model has said
            start = type(model)(k, P, D, n_w, model.times.tolist(), **settings)
        guide = type(self)(k, P, D, n_w)
        seed = int(torch.randint(2**31, ()))
        fit(start, guide, linear, max_epochs=STEPS, lr=3e-2, kl_warmup=0.0, seed=seed, progress=False)
        return start

    def after_step(self, model: Any, batch: Batch, done: float) -> None:
        """Learned targets sharpen, unless they have at the start."""
        model.temperature.fill_(FINAL ** min(1.0, done / ANNEALED) if self.exact else 1.0)


def _from_expression(A: Tensor, k: Tensor, W: Tensor, precision: Tensor, pull: Tensor) -> Any:
    """The exact posterior of ``x ~ Normal(bias + s W, 1 / precision)``."""
    inner = (W * precision) @ W.T  # [s, s]
    total = torch.eye(A.shape[-2], dtype=A.dtype, device=A.device) + A @ inner @ A.mT
    loc = torch.cholesky_solve((A @ (pull @ W.T - k @ inner).unsqueeze(-1)), torch.linalg.cholesky(total)).squeeze(-1)
    return dist.MultivariateNormal(loc, precision_matrix=total)
