"""SAMS-VAE: a sparse additive mechanism shift variational autoencoder (Bereket and Karaletsos, NeurIPS 2023, arXiv 2311.02794).

A perturbation t acts on few latent programs (``mask``), moves them by ``effect``, and combinations add::

    mask_td    ~ Bernoulli(rho)                            t = 1..P perturbations, d = 1..D programs
    effect_td  ~ Normal(0, s^2)
    z_n        ~ Normal(0, I_D)                            basal state of cell n
    shift_n    = sum_t dose_nt (mask_t * effect_t)
    u_n        = z_n + shift_n
    x_n        ~ NB(mean = library_n softmax(f(u_n)), theta)      or Poisson, or Normal(f(u_n), sigma^2)

============  ======================  =============  =============================================================
site          shape                   kind           meaning
============  ======================  =============  =============================================================
``mask``      [P, D]                  sample         which programs a perturbation targets
``effect``    [P, D]                  sample         how it moves them, in basal standard deviations
``dose``      [n, P]                  deterministic  the treatment
``z``         [n, D]                  sample         basal state (what is abducted)
``shift``     [n, D]                  deterministic  mechanism shift
``u``         [n, D]                  deterministic  programs of the cell
``x_loc``     [n, G]                  deterministic  expected expression
``x``         [n, G]                  observed       expression
``offset``    [G]                     sample         with ``direct=True``: what the programs' mean of untreated cells lacks
``direct``    [P, G]                  sample         with ``direct=True``: what a perturbation does beyond its programs
============  ======================  =============  =============================================================

With ``direct=True`` a perturbation also moves genes beyond its programs, such as the gene that it targets, ``x_loc' = x_loc e^(offset +
dose direct)``, or a sum for normalised data, shrunk gene by gene once the programs are fitted; see :mod:`pyrocausal.direct`.

**Identified:** the effect of each measured perturbation and of additive combinations on expression. The axes of the programs follow from
sparsity alone (several perturbations per program, few programs per perturbation); with a dense mask (``dense=True``, which is CPA-VAE)
only their span is, up to a rotation. **Not identified:** a regulatory graph between programs (there is none), non-additive
interactions, the response to a perturbation that no training cell received.

**Parity.** The published objective draws the mask by straight-through relaxation, has no closed-form KL, and charges row t of the tables
only in minibatches that hold cells of t: ``guides.SAMSVAEMeanField`` or ``SAMSVAECorrelated`` with ``pc.fit(..., objective="parity")``.
The default, ``guides.SAMSVAE`` with the exact bound, charges every row once, updates mask and effect in closed form, and turns the
programs to their sparsest axes; it is the one that recovers them.
"""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyrocausal.direct import DirectPrior, move
from pyrocausal.elbo import ELBO
from pyrocausal.likelihood import Likelihood, LikelihoodName
from pyrocausal.loading import Batch
from pyrocausal.nn import MLP, of_batch
from pyrocausal.sparsity import PRIOR
from pyrocausal.structural import mechanism_shift


class SAMSVAE(PyroModule):
    """The generative program.

    Args:
        n_genes, n_perturbations: sizes of the screen.
        n_latent: number of programs D; more than needed is harmless, the surplus stays without targets.
        mask_probability: rho, the prior share of programs that a perturbation targets. None: learned, as s.
        effect_scale: s, the prior standard deviation of an effect, in basal standard deviations. None: learned by the default guide
            (empirical Bayes, :class:`~pyrocausal.sparsity.SpikeSlabTable`); 3 with the others, and where the mask is dense.
        likelihood: ``"negative_binomial"``, ``"poisson"`` (both with observed library size) or ``"gaussian"``.
        dense: every perturbation moves every program (CPA-VAE); ``mask`` is then fixed to ones.
        direct: perturbations also move genes directly, beyond the programs (:mod:`pyrocausal.direct`): two more sites, ``offset`` [G] and
            ``direct`` [P, G]. For the default guide.
        n_batches: technical batches; more than one adds an offset per batch and gene to the decoder.
    """

    mask_probability: Tensor
    effect_scale: Tensor

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
        direct: bool = False,
    ) -> None:
        super().__init__()
        self.shape = (n_perturbations, n_latent)
        for name, given, default in zip(("mask_probability", "effect_scale"), (mask_probability, effect_scale), PRIOR, strict=True):
            self.register_buffer(name, torch.tensor(default if given is None else float(given)))
        self.dense = dense
        self.decoder = MLP(n_latent, n_genes, n_hidden, n_layers)
        self.batch_offset = nn.Parameter(torch.zeros(n_batches, n_genes), requires_grad=n_batches > 1)
        self.likelihood = Likelihood(likelihood, n_genes)
        self.direct = DirectPrior(n_genes, n_perturbations) if direct else None

    def parity_objective(self) -> ELBO:
        """The published bound: five particles, no closed-form KL, tables charged by the rows of the minibatch."""
        return ELBO(num_particles=5, analytic_kl=False, rows="batch")

    def forward(self, batch: Batch) -> Tensor:
        table = {"event_dims": ("perturbation", "latent")}
        programs = {"event_dims": ("latent",)}
        rho, s = self.mask_probability, self.effect_scale
        if self.dense:
            mask = pyro.deterministic("mask", torch.ones_like(rho).expand(self.shape), event_dim=2)
        else:
            mask = pyro.sample("mask", dist.Bernoulli(rho.expand(self.shape)).to_event(2), infer=table)
        effect = pyro.sample("effect", dist.Normal(0.0, s.expand(self.shape)).to_event(2), infer=table)
        if self.direct is not None:
            offset, direct = self.direct()
        with batch.cells():
            dose = pyro.deterministic("dose", batch.dose, event_dim=1)
            z = pyro.sample("z", dist.Normal(0.0, torch.ones_like(s).expand(self.shape[1:])).to_event(1), infer=programs)
            shift = pyro.deterministic("shift", mechanism_shift(dose, mask * effect), event_dim=1)
            u = pyro.deterministic("u", z + shift, event_dim=1)
            eta = self.decoder(u)
            if len(self.batch_offset) > 1:
                eta = eta + of_batch(self.batch_offset, batch.batch_code)
            x_loc = self.likelihood.mean(eta, batch.library_size)
            if self.direct is not None:
                x_loc = move(x_loc, offset + mechanism_shift(dose, direct), self.likelihood.is_counts)
            x_loc = pyro.deterministic("x_loc", x_loc, event_dim=1)
            return pyro.sample("x", self.likelihood(x_loc, batch.nonzeros), obs=batch.x, infer={"event_dims": ("gene",)})
