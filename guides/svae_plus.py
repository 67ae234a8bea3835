"""Guides of sVAE+.

:class:`SVAEPlus`, the default, adds the closed form of the sparsity to the centred guide::

    q(rho_kd) = Beta(1 + pi_kd, lambda + 1 - pi_kd)         pi = q(mask = 1)
    E_q[logit rho_kd] = digamma(1 + pi_kd) - digamma(lambda + 1 - pi_kd)         enters the mask's update

:class:`SVAEPlusParity` is the paper's: ``q(mask) = Bernoulli(sigmoid(alpha))`` straight through with a draw per cell, alpha starting at 5,
``rho := sigmoid(alpha)``, ``effect`` a point, ``q(z | x) = Normal(m(x) - shift, v(x))`` (the paper's encoder gives ``u``, not ``z``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyrocausal.centred import TURNS, CentredGuide
from pyrocausal.data import PerturbationData
from pyrocausal.distributions import StraightThroughBernoulli
from pyrocausal.likelihood import LikelihoodName
from pyrocausal.loading import Batch
from pyrocausal.nn import MLP, Standardise
from pyrocausal.sparsity import SpikeSlabTable
from pyrocausal.structural import mechanism_shift

FLOOR = 1e-4  # of variances, as in the reference


class BetaBernoulliTable(SpikeSlabTable):
    """A spike-and-slab table whose log odds follow ``rho ~ Beta(1, lambda)``."""

    def __init__(self, n_perturbations: int, n_latent: int, sparsity: float, effect_scale: float | None) -> None:
        super().__init__(n_perturbations, n_latent, 1 / (1 + sparsity), effect_scale)
        self.sparsity = sparsity

    def beta(self) -> tuple[Tensor, Tensor]:
        """Parameters of q(rho), [P, D] each."""
        pi = self.logits.sigmoid()
        return 1 + pi, self.sparsity + 1 - pi

    def prior_log_odds(self) -> Tensor:
        a, b = self.beta()
        return torch.digamma(a) - torch.digamma(b)


class SVAEPlus(CentredGuide):
    """The closed-form centred guide; arguments as the model's, and ``turns`` (see :mod:`pyrocausal.centred`)."""

    def __init__(
        self,
        n_genes: int,
        n_perturbations: int,
        n_latent: int = 20,
        sparsity: float = 10.0,
        effect_scale: float | None = None,
        likelihood: LikelihoodName = "negative_binomial",
        n_hidden: int = 128,
        n_layers: int = 3,
        n_batches: int = 1,
        turns: Sequence[float] = TURNS,
    ) -> None:
        table = BetaBernoulliTable(n_perturbations, n_latent, sparsity, effect_scale)
        counts = likelihood != "gaussian"
        super().__init__(n_genes, n_perturbations, n_latent, table, counts, False, n_hidden, n_layers, n_batches, turns)

    def prior_sites(self) -> None:
        assert isinstance(self.table, BetaBernoulliTable)
        pyro.sample("rho", dist.Beta(*self.table.beta()).to_event(2))


class SVAEPlusParity(PyroModule):
    """The paper's guide; for ``SVAEPlus(..., parity=True)``."""

    learning_rates: ClassVar = {"mask_logits": 10.0}

    def __init__(
        self,
        n_genes: int,
        n_perturbations: int,
        n_latent: int = 20,
        sparsity: float = 10.0,
        effect_scale: float | None = None,
        likelihood: LikelihoodName = "negative_binomial",
        n_hidden: int = 128,
        n_layers: int = 3,
        n_batches: int = 1,
        mask_logit: float = 5.0,
    ) -> None:
        super().__init__()
        shape = (n_perturbations, n_latent)
        self.mask_logits = nn.Parameter(torch.full(shape, mask_logit))
        self.effect_loc = nn.Parameter(torch.randn(shape))
        self.standardise = Standardise(n_genes, log=likelihood != "gaussian")
        self.encoder = MLP(n_genes, 2 * n_latent, n_hidden, n_layers)

    def initialise(self, model: Any, data: PerturbationData) -> None:
        """Before the first epoch: moments of the expression."""
        self.standardise.fit_moments(torch.as_tensor(data.dense(), device=self.mask_logits.device))

    def forward(self, batch: Batch) -> None:
        pyro.sample("rho", dist.Delta(self.mask_logits.sigmoid(), event_dim=2))
        effect = pyro.sample("effect", dist.Delta(self.effect_loc, event_dim=2))
        if batch.x is None:
            return
        with batch.cells():
            mask = pyro.sample("mask", StraightThroughBernoulli(logits=self.mask_logits).to_event(2))
            m, log_v = self.encoder(self.standardise(batch.x)).chunk(2, -1)
            z = m - mechanism_shift(batch.dose, mask * effect)
            pyro.sample("z", dist.Normal(z, (log_v.exp() + FLOOR).sqrt()).to_event(1))
