"""The guide of the discrepancy VAE: ``q(z | x) = Normal(mu(x), diag v(x))`` of control cells, ``v = softplus``.

Without partners (queries) the cells themselves are encoded: ask about control cells.
"""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
from pyro.nn import PyroModule
from torch import nn

from pyrocausal.loading import Batch
from pyrocausal.nn import MLP


class DiscrepancyVAE(PyroModule):
    """The paper's guide; arguments as the model's."""

    def __init__(self, n_genes: int, n_perturbations: int, n_latent: int | None = None, n_hidden: int = 128) -> None:
        super().__init__()
        n = n_perturbations if n_latent is None else n_latent
        self.encoder = MLP(n_genes, 2 * n, max(n_hidden, 1), int(n_hidden > 0))

    def forward(self, batch: Batch) -> None:
        x = batch.partner if batch.partner is not None else batch.x
        if x is None:
            return
        with batch.cells():
            mu, v = self.encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(mu, (nn.functional.softplus(v) + 1e-8).sqrt()).to_event(1))

    def after_step(self, model: Any, batch: Batch, progress: float) -> None:
        """Tell the model how far the training is, for its schedules."""
        model.progress.fill_(progress)

    def initialise(self, model: Any, data: Any) -> None:
        """Schedules start at their beginning."""
        model.progress.zero_()
