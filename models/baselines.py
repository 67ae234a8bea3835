"""Baselines that every model has to beat, as models: a mean for untreated cells, an effect for each perturbation, a rule for combinations.

::

    a    ~ Normal(centre, baseline_scale^2)                  mean of untreated cells, on the scale of effects; vague
    m    ~ Normal(0, shared_scale^2)                         shift that perturbations share
    e_p  ~ Normal(m, effect_scale_p^2)                       effect of perturbation p; vague but for the shrunk ones
    i_q  ~ Normal(0, interaction_scale_q^2)                  of combination q beyond the sum; condition_eb only, 0 where no cell received q
    y_n  = a + w_n e + v_n i,   w_n = dose_n ("sum") or dose_n over the number of its non-zeros ("mean"),
                                v_nq = product of the doses of the parts of q, if the cell received no others
    x_n  ~ Normal(y_n, sigma^2),                                          normalised data, or
           NB(mean = library_n rate, theta),  rate = (exp(y_n) - 1) / 1e4 counts: y is log1p of mean CP10k; rate within 1e-8 and 1

A vague prior is ten times as wide as what it is of. Everything is set in closed form by the guide, from control cells and single
perturbations (:mod:`pyrocausal.closed_form`; for ``condition_eb`` also from combinations, :mod:`pyrocausal.shrunk_interactions`):

====================  =======  =======================================================================================================
name                  rule     effect of a perturbation
====================  =======  =======================================================================================================
control               sum      none
mean_perturbed        mean     mean effect of the training perturbations
matching_mean         mean     its measured one, else the mean effect (Systema: half of an additive effect for pairs)
additive              sum      its measured one, else none (Ahlmann-Eltze: ``x_A + x_B - x_c``)
additive_eb           sum      its measured one, shrunk by empirical Bayes, control and others together
condition_eb          sum      the same; of combinations that were measured, the sum and their shrunk departure from it
nearest_perturbation  sum      its measured one, else that of the most similar embedding
knn_embedding         sum      its measured one, else the mean of the k most similar
ridge_embedding       sum      its measured one, else ridge regression on the embedding
linear_embedding      sum      ``A K P_p + b``, measured or not (Ahlmann-Eltze, Huber and Anders)
====================  =======  =======================================================================================================

An effect that is measured varies with the sampling noise of its cells and of the control's; one that is predicted, as its leave-one-out
error says; an unknown one, as effects scatter over perturbations. Draws of ``effect`` are draws of that law.

===============  ============  =============  =================================
site             shape         kind           meaning
===============  ============  =============  =================================
``baseline``     [G]           sample         a
``shared``       [G]           sample         m
``effect``       [P, G]        sample         e
``interaction``  [Q, G]        sample         i (condition_eb)
``dose``         [cells, P]    deterministic  the treatment
``x_loc``        [cells, G]    deterministic  expected expression
``x``            [cells, G]    observed       expression
===============  ============  =============  =================================

Batches and times are pooled. **Identified:** effects of what was measured. **Assumed:** everything about combinations
(for ``condition_eb``, about those that were not measured).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor

from pyrocausal.errors import PyrocausalError
from pyrocausal.likelihood import Likelihood, LikelihoodName
from pyrocausal.loading import Batch
from pyrocausal.shrunk_interactions import each_once
from pyrocausal.structural import mechanism_shift

Kind = Literal[
    "control", "mean_perturbed", "matching_mean", "additive", "additive_eb", "condition_eb", "nearest_perturbation", "knn_embedding",
    "ridge_embedding", "linear_embedding",
]  # fmt: skip
LEAST_RATE = 1e-8


class Baseline(PyroModule):
    """The generative program.

    Args:
        n_genes, n_perturbations: sizes of the screen.
        kind: which of the baselines; it decides the rule for combinations.
        likelihood: ``"negative_binomial"`` for counts, ``"gaussian"`` otherwise.
        combinations: of the cells, as columns of their parts, for ``condition_eb``; ``pc.build`` finds them.
    """

    answers_unseen: ClassVar = True
    learning_rates: dict[str, float]
    centre: Tensor
    baseline_scale: Tensor
    shared_scale: Tensor
    effect_scale: Tensor
    interaction_scale: Tensor
    parts: Tensor
    size: Tensor

    def __init__(
        self,
        n_genes: int,
        n_perturbations: int,
        kind: Kind = "additive",
        likelihood: LikelihoodName = "negative_binomial",
        combinations: Sequence[Sequence[int]] = (),
    ) -> None:
        super().__init__()
        if likelihood not in ("negative_binomial", "gaussian"):
            raise PyrocausalError(f"likelihood={likelihood!r} was given for a baseline; choose 'negative_binomial' or 'gaussian'")
        self.shape = (n_perturbations, n_genes)
        self.averages = kind in ("mean_perturbed", "matching_mean")
        self.likelihood = Likelihood(likelihood, n_genes)
        self.learning_rates = {f"likelihood.{k}": 0.0 for k, _ in self.likelihood.named_parameters()}
        self.register_buffer("centre", torch.zeros(n_genes))
        self.register_buffer("baseline_scale", torch.ones(n_genes))
        self.register_buffer("shared_scale", torch.ones(n_genes))
        self.register_buffer("effect_scale", torch.ones(self.shape))
        each = each_once(combinations, kind)
        self.interacts = len(each) > 0
        if self.interacts:
            most = max(len(q) for q in each)
            padded = [[*q, *[n_perturbations] * (most - len(q))] for q in each]  # of a dose that is 1
            self.register_buffer("parts", torch.tensor(padded))
            self.register_buffer("size", torch.tensor([len(q) for q in each]))
            self.register_buffer("interaction_scale", torch.ones(len(each), n_genes))

    def combined(self, dose: Tensor) -> Tensor:
        """v: the product of the doses of the parts of each combination, of cells that received these and no others; [..., cells, Q]."""
        parts = torch.cat([dose, torch.ones_like(dose[..., :1])], -1)[..., self.parts].prod(-1)
        return parts * ((dose != 0).sum(-1, keepdim=True) == self.size)

    def forward(self, batch: Batch) -> Tensor:
        gene = {"event_dims": ("gene",)}
        zero = torch.zeros_like(self.shared_scale)
        a = pyro.sample("baseline", dist.Normal(self.centre, self.baseline_scale).to_event(1), infer=gene)
        m = pyro.sample("shared", dist.Normal(zero, self.shared_scale).to_event(1), infer=gene)
        law = dist.Normal(m.unsqueeze(-2), self.effect_scale).to_event(2)
        effect = pyro.sample("effect", law, infer={"event_dims": ("perturbation", "gene")})
        if self.interacts:
            law = dist.Normal(0.0, self.interaction_scale).to_event(2)
            interaction = pyro.sample("interaction", law, infer={"event_dims": ("combination", "gene")})
        with batch.cells():
            dose = pyro.deterministic("dose", batch.dose, event_dim=1)
            if self.averages:
                dose = dose / (dose != 0).sum(-1, keepdim=True).clamp_min(1)
            y = a + mechanism_shift(dose, effect)
            if self.interacts:
                y = y + mechanism_shift(self.combined(dose), interaction)
            if self.likelihood.is_counts:
                y = batch.library_size * (y.expm1() / 1e4).clamp(LEAST_RATE, 1.0)
            x_loc = pyro.deterministic("x_loc", y, event_dim=1)
            return pyro.sample("x", self.likelihood(x_loc, batch.nonzeros), obs=batch.x, infer=gene)
