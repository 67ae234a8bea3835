"""Guides of SAMS-VAE.

===================  ==================================================================================================================
:class:`SAMSVAE`     the default: ``q(mask) q(effect | mask)`` in closed form, ``q(z | x, mask, effect) = Normal(a(x) - shift, v(x))``
:class:`SAMSVAEMeanField`   the paper's: ``q(mask) = Bernoulli(sigmoid(phi))`` straight through, ``q(effect) = Normal(m, r^2)``
:class:`SAMSVAECorrelated`  the paper's: ``q(effect_t | mask_t) = Normal(MLP([mask_t, onehot(t)]))``
===================  ==================================================================================================================

In both of the paper's guides ``q(z | x, dose, mask, effect) = Normal(MLP([norm(x), shift]))``; ``conditional=False`` drops the shift.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.nn.functional import linear

from pyrocausal.centred import TURNS, CentredGuide
from pyrocausal.data import PerturbationData
from pyrocausal.direct import DirectPosterior
from pyrocausal.distributions import StraightThroughBernoulli
from pyrocausal.errors import PyrocausalError
from pyrocausal.likelihood import LikelihoodName
from pyrocausal.loading import Batch
from pyrocausal.nn import MLP, Standardise
from pyrocausal.sparsity import SpikeSlabTable
from pyrocausal.structural import mechanism_shift

FLOOR = 1e-4  # of standard deviations, as in the reference


class SAMSVAE(CentredGuide):
    """The closed-form centred guide; arguments as the model's, and ``turns`` (see :mod:`pyrocausal.centred`).

    With ``direct`` (:mod:`pyrocausal.direct`), once the programs are fitted: ``q(offset) q(direct | offset)`` in closed form, and the
    encoder sees the cells as the programs alone would have made them.
    """

    def __init__(
        self,
        n_genes: int,
        n_perturbations: int,
        n_latent: int = 20,
        mask_probability: float | None = 0.1,
        effect_scale: float | None = None,
        likelihood: LikelihoodName = "negative_binomial",
        dense: bool = False,
        n_hidden: int = 128,
        n_layers: int = 3,
        n_batches: int = 1,
        turns: Sequence[float] = TURNS,
        direct: bool = False,
    ) -> None:
        table = SpikeSlabTable(n_perturbations, n_latent, mask_probability, effect_scale)
        counts = likelihood != "gaussian"
        super().__init__(n_genes, n_perturbations, n_latent, table, counts, dense, n_hidden, n_layers, n_batches, turns)
        self.counts = counts
        self.direct = DirectPosterior(n_genes, n_perturbations) if direct else None

    def prior_sites(self) -> None:
        if self.direct is not None:
            self.direct()

    def encode(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return super().encode(batch if self.direct is None else self.direct.undone(batch, self.counts))

    def initialise(self, model: Any, data: PerturbationData) -> None:
        super().initialise(model, data)
        if self.direct is not None:
            self.direct.check(model, data)
            self.direct.reset(model)

    def absorb(self, model: Any, cells: Iterable[Batch], known: Tensor, sweeps: int) -> None:
        super().absorb(model, cells, known, sweeps)
        if self.direct is not None:
            self.direct.extend(model, known)

    def after_training(self, model: Any, data: PerturbationData, seed: int, progress: bool) -> None:
        """What the programs leave over, gene by gene."""
        if self.direct is not None:
            self.direct.estimate(model, self, data, seed)


class SAMSVAEMeanField(PyroModule):
    """The paper's mean-field guide.

    Args:
        conditional: the encoder of z sees the sampled shift (the reference's default) beside the expression.
        mask_logit: initial phi (0 in the reference).
    """

    learning_rates: ClassVar = {"mask_logits": 10.0}  # times the base rate: at the networks' own, masks cannot cross 1/2 in 5,000 steps

    def __init__(
        self,
        n_genes: int,
        n_perturbations: int,
        n_latent: int = 20,
        mask_probability: float | None = 0.1,
        effect_scale: float | None = None,
        likelihood: LikelihoodName = "negative_binomial",
        dense: bool = False,
        n_hidden: int = 128,
        n_layers: int = 3,
        n_batches: int = 1,
        conditional: bool = True,
        mask_logit: float = 0.0,
    ) -> None:
        super().__init__()
        shape = (n_perturbations, n_latent)
        self.dense = dense
        self.conditional = conditional
        self.mask_logits = nn.Parameter(torch.full(shape, mask_logit), requires_grad=not dense)
        self.standardise = Standardise(n_genes, log=likelihood != "gaussian")
        self.encoder = MLP(n_genes + (n_latent if conditional else 0), 2 * n_latent, n_hidden, n_layers)
        self._effect_parameters(shape)

    def _effect_parameters(self, shape: tuple[int, int]) -> None:
        self.effect_loc = nn.Parameter(torch.zeros(shape))
        self.effect_log_scale = nn.Parameter(torch.zeros(shape))

    def effect_law(self, mask: Tensor) -> Any:
        """q(effect | mask), the same for every mask."""
        return dist.Normal(self.effect_loc, self.effect_log_scale.exp() + FLOOR)

    def initialise(self, model: Any, data: PerturbationData) -> None:
        """Before the first epoch: moments of the expression."""
        if getattr(model, "direct", None) is not None:
            raise PyrocausalError(f"direct=True was given, which {type(self).__name__} does not infer; take the guide SAMSVAE")
        self.standardise.fit_moments(torch.as_tensor(data.dense(), device=self.mask_logits.device))

    def forward(self, batch: Batch) -> None:
        mask = torch.ones_like(self.mask_logits)
        if not self.dense:
            mask = pyro.sample("mask", StraightThroughBernoulli(logits=self.mask_logits).to_event(2))
        effect = pyro.sample("effect", self.effect_law(mask).to_event(2))
        if batch.x is None:
            return
        with batch.cells():
            first, n_genes = self.encoder.first, batch.x.shape[-1]
            h = linear(self.standardise(batch.x), first.weight[:, :n_genes], first.bias)
            if self.conditional:  # MLP([norm(x), shift]): its first layer in two halves, x's once for all particles
                h = h + linear(mechanism_shift(batch.dose, mask * effect), first.weight[:, n_genes:])
            loc, log_scale = self.encoder.after_first(h).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp() + FLOOR).to_event(1))


class SAMSVAECorrelated(SAMSVAEMeanField):
    """The paper's correlated guide: the effect knows the mask it goes with."""

    def _effect_parameters(self, shape: tuple[int, int]) -> None:
        n_perturbations, n_latent = shape
        self.effect_network = MLP(n_latent + n_perturbations, 2 * n_latent, n_hidden=200, n_layers=2)
        self.register_buffer("onehot", torch.eye(n_perturbations))

    def effect_law(self, mask: Tensor) -> Any:
        """q(effect_t | mask_t) = Normal(MLP([mask_t, onehot(t)]))."""
        onehot = self.onehot.expand(*mask.shape[:-2], *self.onehot.shape)
        loc, log_scale = self.effect_network(torch.cat([mask, onehot], -1)).chunk(2, -1)
        return dist.Normal(loc, log_scale.exp() + FLOOR)
