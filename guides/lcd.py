"""Guide of LCD: an encoder of each cell's state.

    q(u_n | x_n, dose_n) = Normal(centre + scale (w a_n + f(x_n, dose_n)), v(x_n, dose_n)^2)

with a_n the state that the counts would have without noise, ``softplus^-1((x + 1/4) / rate unit)``, in standardised units, w a weight for
each gene, f and v a network. Units come from the moments of the expression before the first epoch. With a likelihood that observes the
state itself (``"gaussian"``) there is nothing to infer.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyrocausal.data import PerturbationData
from pyrocausal.dynamics.score import conditions_of, from_cells
from pyrocausal.loading import Batch
from pyrocausal.nn import MLP, Standardise, inverse_softplus
from pyrocausal.zero_inflated import unit_scaling


class LCD(PyroModule):
    """The encoder; arguments as the model's, and ``n_encoder``, ``n_encoder_layers``: width and hidden layers of the network."""

    ready: bool
    centre: Tensor
    scale: Tensor
    unit: Tensor
    median_library: Tensor

    def __init__(
        self,
        n_genes: int,
        n_perturbations: int,
        likelihood: str = "zero_inflated_poisson",
        depth: bool = True,
        n_encoder: int = 128,
        n_encoder_layers: int = 2,
    ) -> None:
        super().__init__()
        self.ready = False
        self.counts, self.depth = likelihood != "gaussian", depth
        if self.counts:
            self.standardise = Standardise(n_genes, log=True)
            self.network = MLP(n_genes + n_perturbations, 2 * n_genes, n_encoder, n_encoder_layers, layer_norm=True)
            nn.init.zeros_(self.network.last.weight)
            nn.init.zeros_(self.network.last.bias)
            self.weight = nn.Parameter(torch.full((n_genes,), 0.3))
            self.log_sd = nn.Parameter(torch.full((n_genes,), -0.5))
        for name, shape in (("centre", (n_genes,)), ("scale", (n_genes,)), ("unit", (n_genes,)), ("median_library", ())):
            self.register_buffer(name, torch.ones(shape))

    @torch.no_grad()
    def initialise(self, model: Any, data: PerturbationData) -> None:
        """Units of the states, and of the counts, from the expression; nothing if :attr:`ready`, when the model has them already."""
        if self.ready:
            return
        x, (codes, doses) = torch.as_tensor(data.dense()), conditions_of(data)
        if not self.counts:
            model.network.fit_units(from_cells(x, codes, len(doses)), doses, torch.Generator().manual_seed(0))
            return
        library = torch.as_tensor(data.library_size.astype(np.float32))[:, None]
        if self.depth:
            model.median_library.copy_(library.median())
        size = library / model.median_library if self.depth else torch.ones_like(library)
        y = x / size
        control = torch.as_tensor(data.is_control) if data.is_control.any() else torch.ones(len(data), dtype=torch.bool)
        model.unit.copy_(unit_scaling(y[control]))
        rate = (y[control].mean(0) / model.unit).clamp_min(0.02)
        centre = inverse_softplus(rate)
        counted = (x / size.square()).mean(0)  # what counting adds to the variance of y
        spread = (y.var(0) - counted).clamp_min(0).sqrt() / (model.unit * centre.sigmoid())
        model.network.centre.copy_(centre)
        model.network.scale.copy_(spread.clamp(0.1, 3.0))
        self.standardise.fit_moments(x)
        self.take_units(model)

    def take_units(self, model: Any) -> None:
        """Read states in the units of the model."""
        for name, value in (("unit", model.unit), ("median_library", model.median_library)):
            getattr(self, name).copy_(value)
        for name in ("centre", "scale"):
            getattr(self, name).copy_(getattr(model.network, name))

    def after_training(self, model: Any, data: PerturbationData, seed: int, progress: bool) -> None:
        """Perturbations without cells get the mean embedding of the others."""
        model.network.fill_untrained(torch.as_tensor(data.cells_per_perturbation > 0, device=self.centre.device))

    def posterior(self, batch: Batch) -> Any:
        """``q(u | x, dose)``, batch shape [n], event [d]."""
        assert batch.x is not None
        size = batch.library_size / self.median_library if self.depth else torch.ones_like(batch.library_size)
        a = inverse_softplus(((batch.x + 0.25) / (size * self.unit)).clamp_min(0.02))
        loc, log_sd = self.network(torch.cat([self.standardise(batch.x), batch.dose], -1)).chunk(2, -1)
        loc = self.weight * (a - self.centre) / self.scale + loc
        return dist.Normal(self.centre + self.scale * loc, self.scale * (self.log_sd + log_sd).exp() + 1e-4).to_event(1)

    def forward(self, batch: Batch) -> None:
        if batch.x is None or not self.counts:
            return
        with batch.cells():
            pyro.sample("u", self.posterior(batch))
