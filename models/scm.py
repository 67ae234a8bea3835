"""SCM: a linear structural causal model of the measured genes, each with its own equation; perturbations replace or shift equations.

Row vectors, genes are nodes, ``A[j, k]`` is the edge j -> k; expression is normalised, b its mean in untreated cells::

    edge_jk    ~ Bernoulli(rho), no cycles;   weight_jk ~ Normal(0, (s unit_k / unit_j)^2);   A = edge * weight
    b          ~ Normal(centre, (10 unit)^2);   log sigma_k ~ Normal(log unit_k, 1)
    level_p    ~ Normal(level_prior_p, level_scale_p^2)          change of the target T_p of perturbation p
    off_p      ~ Normal(0, off_scale_p^2)                        shifts of the equations of other genes
    z_n        ~ Normal(0, I)                                    exogenous state of cell n
    u_nk       = sum_j u_nj A_jk + sigma_k z_nk + sum_p dose_np off_pk        for the genes k that nothing holds
    u_nk       = sum_p dose_np level_p                                        where a perturbation of cell n has T_p = k ("do")
    x_n        ~ Normal(b + u_n, noise^2)                        noise: a twentieth of sigma

With ``intervention="shift"`` a target keeps its equation and level_p is a shift of it. ``unit``: spread of each gene in the screen.

==============  ===============  =============  ================================================================================
site            shape            kind           meaning
==============  ===============  =============  ================================================================================
``baseline``    [G]              sample         b
``edge``        [G, G]           sample         which genes regulate which
``weight``      [G, G]           sample         by how much
``graph``       [G, G]           deterministic  A
``log_sigma``   [G]              sample         spread of the exogenous states
``level``       [P]              sample         change of each perturbation's own target
``off_target``  [P, G]           sample         what else a perturbation shifts
``effect``      [P, G]           deterministic  both in one table
``dose``        [cells, P]       deterministic  the treatment
``z``           [cells, G]       sample         exogenous state (what is abducted)
``shift``       [cells, G]       deterministic  shifts of equations
``clamp``       [G]              deterministic  expression at which genes are held; NaN: untouched
``u``           [cells, G]       deterministic  expression less b, without noise
``x_loc``       [cells, G]       deterministic  b + u
``x``           [cells, G]       observed       expression
==============  ===============  =============  ================================================================================

**Identified** (no latent confounders, no cycles, linear equations): edges out of and into perturbed genes; edges among genes that were
never perturbed up to those whose turning changes no distribution of the screen, over which the draws of the guide vary. **Assumed:** a
perturbation reaches its target and, shrunk by empirical Bayes, other genes' equations by a shift; without edges and targets this is the
baseline ``additive_eb``. **Not known:** what a perturbation does whose gene is not measured and that no cell received; it has the prior,
the shift that all share and wide draws. The prior leaves out the normaliser of "no cycles": its own draws may have some.

Source: Pearl 2009; Hauser and Buehlmann 2012 (arXiv 1104.2808). Batches and times are pooled.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, Literal

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyrocausal.errors import PyrocausalError
from pyrocausal.loading import Batch
from pyrocausal.structural import mechanism_shift, respond, targets_table

NOISE = 0.05  # of sigma
VAGUE = 10.0  # width of a prior that has little say, in units of what it is of

Intervention = Literal["do", "shift"]


class SCM(PyroModule):
    """The generative program.

    Args:
        n_genes, n_perturbations: sizes of the screen.
        own_genes: column of the gene that each perturbation targets, -1 where it is not measured; ``pc.build`` finds them by name.
        intervention: ``"do"``: a perturbed gene is held at the level that its cells have, whatever regulates it; ``"shift"``: it is moved.
        edge_probability: rho. edge_scale: s.
    """

    state: ClassVar = "gene"  # what the nodes of the graph are
    acyclic: ClassVar = True
    data_kind: ClassVar = "normalised"
    answers_unseen: ClassVar = True
    learning_rates: ClassVar = {"log_noise": 0.0}
    on_target: Tensor
    centre: Tensor
    unit: Tensor
    level_prior: Tensor
    level_scale: Tensor
    off_scale: Tensor

    def __init__(
        self,
        n_genes: int,
        n_perturbations: int,
        own_genes: Sequence[int] | None = None,
        intervention: Intervention = "do",
        edge_probability: float = 0.05,
        edge_scale: float = 1.0,
    ) -> None:
        super().__init__()
        if intervention not in ("do", "shift"):
            raise PyrocausalError(f"intervention={intervention!r} was given; choose 'do' or 'shift'")
        self.shape = (n_perturbations, n_genes)
        self.intervention, self.edge_probability, self.edge_scale = intervention, edge_probability, edge_scale
        self.register_buffer("on_target", targets_table(own_genes, self.shape))
        self.register_buffer("centre", torch.zeros(n_genes))  # these five are set by the guide
        self.register_buffer("unit", torch.ones(n_genes))
        self.register_buffer("level_prior", torch.zeros(n_perturbations))
        self.register_buffer("level_scale", torch.ones(n_perturbations))
        self.register_buffer("off_scale", torch.ones(self.shape))
        self.log_noise = nn.Parameter(torch.full((n_genes,), math.log(NOISE)))  # and this

    def forward(self, batch: Batch) -> Tensor:
        gene, guide, pairs = {"event_dims": ("gene",)}, {"event_dims": ("perturbation",)}, {"event_dims": ("cause", "gene")}
        d, on = self.shape[1], self.on_target
        b = pyro.sample("baseline", dist.Normal(self.centre, VAGUE * self.unit).to_event(1), infer=gene)
        rho = torch.full((d, d), self.edge_probability).to(self.unit).fill_diagonal_(0.0)
        edge = pyro.sample("edge", dist.Bernoulli(rho).to_event(2), infer=pairs)
        width = self.edge_scale * self.unit / self.unit[:, None]
        weight = pyro.sample("weight", dist.Normal(torch.zeros_like(width), width).to_event(2), infer=pairs)
        A = pyro.deterministic("graph", edge * weight, event_dim=2)
        log_sigma = pyro.sample("log_sigma", dist.Normal(self.unit.log(), torch.ones_like(self.unit)).to_event(1), infer=gene)
        level = pyro.sample("level", dist.Normal(self.level_prior, self.level_scale).to_event(1), infer=guide)
        law = dist.Normal(torch.zeros_like(self.off_scale), self.off_scale).to_event(2)
        off = pyro.sample("off_target", law, infer={"event_dims": ("perturbation", "gene")})
        effect = pyro.deterministic("effect", torch.where(on > 0, level.unsqueeze(-1), off), event_dim=2)
        sigma = log_sigma.exp()
        R = torch.linalg.inv(torch.eye(d, dtype=A.dtype, device=A.device) - A)  # once for all cells of a world
        untouched = torch.full_like(self.centre, math.nan)
        with batch.cells():
            dose = pyro.deterministic("dose", batch.dose, event_dim=1)
            z = pyro.sample("z", dist.Normal(torch.zeros_like(sigma), torch.ones_like(sigma)).to_event(1), infer=gene)
            moved = effect if self.intervention == "shift" else effect * (1 - on)
            shift = pyro.deterministic("shift", mechanism_shift(dose, moved), event_dim=1)
            clamp = pyro.deterministic("clamp", untouched, event_dim=1)
            value = None if clamp is untouched else clamp - b
            if self.intervention == "do":
                own = torch.where((dose != 0).to(on) @ on > 0, mechanism_shift(dose, effect * on), math.nan)
                value = own if value is None else torch.where(value.isnan(), own, value)
            u = pyro.deterministic("u", respond(sigma * z + shift, R, value), event_dim=1)
            x_loc = pyro.deterministic("x_loc", b + u, event_dim=1)
            return pyro.sample("x", dist.Normal(x_loc, self.log_noise.exp()).to_event(1), obs=batch.x, infer=gene)
