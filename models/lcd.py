"""LCD: cells as the stationary law of a non-linear diffusion over genes, known by its score (Lorch et al. 2026, arXiv 2601.15341).

The state u of a cell under the doses of its perturbations is the stationary state of a diffusion whose drift is a neural network, and
counts are measurements of it; row vectors, d genes::

    du = s(u, dose) dt + sqrt(2) dW                          s: a score network, dose enters by embeddings of the perturbations
    u_n ~ LCDStationary(dose_n)                              its stationary law, grad log p = s
    x_nj ~ ZIP(l_n / l0 unit_j softplus(u_nj), gate_j)       zero-inflated Poisson; or Poisson, or negative binomial
                                                             l_n: library size, l0: its median; unit_j from the controls

Normalised expression is the state itself (``likelihood="gaussian"``).

==================  ========  =============  =========================================================================================
site                shape     kind           meaning
==================  ========  =============  =========================================================================================
``dose``            [n, P]    deterministic  treatment; any real number, so that 1/2 is half a dose
``u``               [n, d]    sample         state of the cell (counts only)
``x_loc``           [n, d]    deterministic  expected counts of genes that are not silent (counts only)
``x``               [n, d]    observed       expression
==================  ========  =============  =========================================================================================

**Training.** ``pc.fit`` maximises one evidence lower bound: the prior's log-probability is an unbiased estimate of a bound by score
matching (:class:`~pyrocausal.dynamics.score.LCDStationary`), and the guide's posterior of each state replaces the deconvolution.
:func:`pyrocausal.dynamics.two_stage.fit_two_stage` is the published procedure: deconvolve each condition, then match scores.

**Identified:** the law of expression under the doses of the training, and, as far as the embeddings add, of combinations. **Not
identified:** direction. A score is a gradient field; for Gaussian cells its slope is the precision matrix, symmetric whatever the
regulation (class attribute ``gradient_field``). There are no edges to cut and no genes to clamp: ``LinearLCD`` has them. A perturbation
that no cell had gets the mean embedding of the others.

A counterfactual cell keeps its noise along the probability flow (:meth:`~pyrocausal.dynamics.score.LCDStationary.carry`).
"""

from __future__ import annotations

from typing import ClassVar, Literal, get_args

import pyro
import torch
from pyro.distributions import TorchDistribution
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.nn.functional import softplus

from pyrocausal.distributions import NegativeBinomial, Poisson
from pyrocausal.dynamics.score import LCDStationary, ScoreNetwork
from pyrocausal.errors import PyrocausalError
from pyrocausal.loading import Batch
from pyrocausal.zero_inflated import ZeroInflatedPoisson

StateLikelihood = Literal["zero_inflated_poisson", "poisson", "negative_binomial", "gaussian"]


class LCD(PyroModule):
    """The generative program.

    Args:
        n_genes, n_perturbations: sizes of the screen.
        likelihood: law of the counts; ``"gaussian"``: the expression is the state itself.
        n_hidden, n_layers, n_embed: of the score network (published: 1,024 or 2,048, 2, 1,024).
        largest, smallest: ends of the ladder of noise levels, in units of the spread of all cells.
        depth: counts in proportion to the library size of the cell; False, as published: depth is part of the state.
        probes: draws of noise and level for each cell and step.
    """

    state: ClassVar = "gene"
    gradient_field: ClassVar = True
    learning_rates: ClassVar = {"gate_logits": 5.0, "log_theta": 5.0}
    unit: Tensor
    median_library: Tensor

    def __init__(
        self,
        n_genes: int,
        n_perturbations: int,
        likelihood: StateLikelihood = "zero_inflated_poisson",
        n_hidden: int = 256,
        n_layers: int = 2,
        n_embed: int = 64,
        largest: float = 10.0,
        smallest: float = 0.01,
        depth: bool = True,
        probes: int = 1,
    ) -> None:
        super().__init__()
        if likelihood not in get_args(StateLikelihood):
            raise PyrocausalError(f"likelihood={likelihood!r} is unknown; choose one of {', '.join(get_args(StateLikelihood))}")
        self.counts = likelihood != "gaussian"
        self.data_kind = "counts" if self.counts else "normalised"
        self.law_of_counts, self.depth, self.probes = likelihood, depth, probes
        self.network = ScoreNetwork(n_genes, n_perturbations, n_hidden, n_layers, n_embed, largest=largest, smallest=smallest)
        with torch.no_grad():
            self.network.out.weight.mul_(0.05)  # at first every condition is about standard normal
        self.register_buffer("unit", torch.ones(n_genes))
        self.register_buffer("median_library", torch.ones(()))
        self.log_theta = nn.Parameter(torch.full((n_genes,), 2.0), requires_grad=likelihood == "negative_binomial")
        self.gate_logits = nn.Parameter(torch.full((n_genes,), -3.0), requires_grad=likelihood == "zero_inflated_poisson")

    def drift(self, x: Tensor, dose: Tensor) -> Tensor:
        """The drift at states x [..., d] under doses [..., P], diffusion sqrt(2) I; of the expression itself if it is normalised."""
        return self.network.drift(x, dose)

    def limit(self, dose: Tensor, n_steps: int = 500) -> Tensor:
        """Where the noise-free system settles under each dose, [K, d]; see :meth:`~pyrocausal.dynamics.score.ScoreNetwork.limit`."""
        return self.network.limit(dose, n_steps)

    def rate(self, u: Tensor, library_size: Tensor) -> Tensor:
        """Expected counts of genes that are not silent, [..., n, d]."""
        per_state = self.unit * softplus(u)
        return library_size / self.median_library * per_state if self.depth else per_state

    def law_of_states(self, dose: Tensor) -> LCDStationary:
        """The stationary law under the dose of each cell."""
        return LCDStationary(self.network, dose, self.probes)

    def forward(self, batch: Batch) -> Tensor:
        gene = {"event_dims": ("gene",)}
        with batch.cells():
            dose = pyro.deterministic("dose", batch.dose, event_dim=1)
            law = self.law_of_states(dose)
            if not self.counts:
                return pyro.sample("x", law, obs=batch.x, infer=gene)
            u = pyro.sample("u", law, infer=gene)
            x_loc = pyro.deterministic("x_loc", self.rate(u, batch.library_size), event_dim=1)
            return pyro.sample("x", self._counts(x_loc, batch), obs=batch.x, infer=gene)

    def _counts(self, x_loc: Tensor, batch: Batch) -> TorchDistribution:
        if self.law_of_counts == "negative_binomial":
            return NegativeBinomial(x_loc, self.log_theta.exp(), batch.nonzeros)
        if self.law_of_counts == "poisson":
            return Poisson(x_loc, batch.nonzeros)
        return ZeroInflatedPoisson(x_loc, self.gate_logits.sigmoid(), batch.nonzeros)
