"""sVAE+: sparse mechanism shifts with a learned sparsity (Lopez et al., CLeaR 2023, arXiv 2211.03553).

A perturbation k replaces the mechanism of its targets; which ones is drawn from a Beta-Bernoulli prior::

    rho_kd     ~ Beta(1, lambda)                           k = 1..P perturbations, d = 1..D programs
    mask_kd    ~ Bernoulli(rho_kd)
    effect_kd  ~ Normal(0, s^2)                            (a free parameter in the paper)
    u_n        ~ Normal(sum_k dose_nk (mask_k * effect_k), I_D)
    x_n        ~ NB(mean = library_n softmax(f(u_n)), theta)      or Poisson, or Normal(f(u_n), sigma^2)

The stochastic intervention on ``u`` is written with its noise outside, ``z ~ Normal(0, I)`` and ``u = z + shift``: the same law, and the
form that answers counterfactuals (``z`` is what a cell keeps). Sites as in SAMS-VAE, and ``rho`` [P, D].

**Identified, and not:** as SAMS-VAE. In the paper a combination is a perturbation of its own; here doses add.

**Parity** (``parity=True`` with ``guides.SVAEPlusParity`` and ``objective="parity"``): every cell draws its own mask, the effect has no
prior, and rho is the guide's own mask probability, so that only
``log Beta(sigmoid(alpha); 1, lambda)`` is left of the global terms. The default
shares one mask between the cells, keeps the Beta-Bernoulli terms, and updates rho, mask and effect in closed form.
"""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyrocausal.elbo import ELBO
from pyrocausal.likelihood import Likelihood, LikelihoodName
from pyrocausal.loading import Batch
from pyrocausal.nn import MLP, of_batch
from pyrocausal.sparsity import PRIOR
from pyrocausal.structural import mechanism_shift


class SVAEPlus(PyroModule):
    """The generative program.

    Args:
        n_genes, n_perturbations: sizes of the screen.
        n_latent: number of programs D.
        sparsity: lambda of the Beta(1, lambda) prior, whose mean is 1 / (1 + lambda); the paper takes the number of perturbations.
        effect_scale: s, prior standard deviation of an effect (unused with ``parity``); None: learned, as in SAMS-VAE.
        likelihood: ``"negative_binomial"``, ``"poisson"`` or ``"gaussian"``.
        parity: the published objective; see the module's docstring.
        n_batches: technical batches.
    """

    effect_scale: Tensor

    def __init__(
        self,
        n_genes: int,
        n_perturbations: int,
        n_latent: int = 20,
        sparsity: float = 10.0,
        effect_scale: float | None = None,
        likelihood: LikelihoodName = "negative_binomial",
        parity: bool = False,
        n_hidden: int = 128,
        n_layers: int = 3,
        n_batches: int = 1,
    ) -> None:
        super().__init__()
        self.shape = (n_perturbations, n_latent)
        self.sparsity = float(sparsity)
        self.register_buffer("effect_scale", torch.tensor(PRIOR[1] if effect_scale is None else float(effect_scale)))
        self.parity = parity
        self.decoder = MLP(n_latent, n_genes, n_hidden, n_layers)
        self.batch_offset = nn.Parameter(torch.zeros(n_batches, n_genes), requires_grad=n_batches > 1)
        self.likelihood = Likelihood(likelihood, n_genes)

    def parity_objective(self) -> ELBO:
        """The published bound (dossier: one draw, closed-form KL of z)."""
        return ELBO(num_particles=1, analytic_kl=True)

    def forward(self, batch: Batch) -> Tensor:
        table = {"event_dims": ("perturbation", "latent")}
        programs = {"event_dims": ("latent",)}
        one = torch.ones_like(self.batch_offset[0, 0])
        rho = pyro.sample("rho", dist.Beta(one.expand(self.shape), self.sparsity * one).to_event(2), infer=table)
        if not self.parity:
            mask = pyro.sample("mask", dist.Bernoulli(rho).to_event(2), infer=table)
            effect = pyro.sample("effect", dist.Normal(0.0, self.effect_scale.expand(self.shape)).to_event(2), infer=table)
        else:
            flat = dist.Normal(0.0, one.expand(self.shape)).mask(False).to_event(2)  # no prior, yet it can be run
            effect = pyro.sample("effect", flat, infer=table)
        with batch.cells():
            dose = pyro.deterministic("dose", batch.dose, event_dim=1)
            if self.parity:
                mask = pyro.sample("mask", dist.Bernoulli(rho).to_event(2), infer=table)
            z = pyro.sample("z", dist.Normal(0.0, one.expand(self.shape[1:])).to_event(1), infer=programs)
            shift = pyro.deterministic("shift", mechanism_shift(dose, mask * effect), event_dim=1)
            u = pyro.deterministic("u", z + shift, event_dim=1)
            eta = self.decoder(u)
            if len(self.batch_offset) > 1:
                eta = eta + of_batch(self.batch_offset, batch.batch_code)
            x_loc = pyro.deterministic("x_loc", self.likelihood.mean(eta, batch.library_size), event_dim=1)
            return pyro.sample("x", self.likelihood(x_loc, batch.nonzeros), obs=batch.x, infer={"event_dims": ("gene",)})
