"""The guide of the baselines: closed forms of :mod:`pyrocausal.closed_form`, set once; there is nothing to train.

The law of a, m and e is Gaussian, joint over the three and independent over genes (:class:`~pyrocausal.closed_form.Estimate`)::

    m   ~ Normal(m^, sd_m^2)
    a   ~ Normal(a^ + l (m - m^), sd_a^2)
    e_p ~ Normal(e^_p + g_p (a - a^) + h_p (m - m^), sd_p^2)

For ``additive`` it is the posterior under flat priors, which is the sampling law of the measured effects; for ``additive_eb`` the posterior
given the estimated variances, and ``condition_eb`` adds interactions of combinations (:mod:`pyrocausal.shrunk_interactions`)::

    i_q ~ Normal(i^_q - K_q ((a - a^) + sum_{p in q} (e_p - e^_p)), sd_q^2)

The noise of a cell about its mean is set by moments within conditions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor

from pyrocausal import closed_form
from pyrocausal.closed_form import Conditions, Estimate
from pyrocausal.data import PerturbationData
from pyrocausal.errors import PyrocausalError
from pyrocausal.loading import Batch
from pyrocausal.shrunk_interactions import each_once, shrunk_interactions

LEAST_SD = 1e-6
BY_GENE = ("shared", "shared_sd", "control", "control_sd", "control_on_shared")
BY_PERTURBATION = ("effect", "effect_sd", "on_control", "on_shared")
BY_COMBINATION = ("value", "gain", "sd")


class Baseline(PyroModule):
    """Closed forms; arguments as the model's, and

    Args:
        own_genes: column of the gene that each perturbation targets, -1 where it is not measured; ``pc.build`` finds them by name.
        embedding: vector of each perturbation, [P, E] (a table with names in the index, through ``pc.build``); None for the principal
            components of the perturbed genes in the control cells (``linear_embedding``: of all genes over the training means).
        gene_embedding: vector of each gene, [G, d], for ``linear_embedding``.
        neighbours: of ``knn_embedding``; None for the best by leaving one perturbation out.
        penalty: of a ridge; None for the best by leaving one perturbation out (``linear_embedding``: .1, as published).
        weights: ``mean_perturbed`` over perturbations (``"perturbation"``) or over cells (``"cell"``).
        combinations: as the model's.
        seen: a perturbation with cells of its own has its ``"measured"`` effect, or its ``"fitted"`` one; of embeddings.
    """

    closed_form: ClassVar = True
    part: Tensor

    def __init__(
        self,
        n_genes: int,
        n_perturbations: int,
        kind: str = "additive",
        own_genes: Sequence[int] | None = None,
        embedding: Any = None,
        gene_embedding: Any = None,
        neighbours: int | None = None,
        penalty: float | None = None,
        weights: str = "perturbation",
        seen: str = "measured",
        combinations: Sequence[Sequence[int]] = (),
    ) -> None:
        super().__init__()
        used = {
            "embedding": "embedding" in kind or kind == "nearest_perturbation",
            "gene_embedding": kind == "linear_embedding",
            "neighbours": kind == "knn_embedding",
            "penalty": kind in ("ridge_embedding", "linear_embedding"),
        }
        given = {"embedding": embedding, "gene_embedding": gene_embedding, "neighbours": neighbours, "penalty": penalty}
        for name, value in given.items():
            if value is not None and not used[name]:
                raise PyrocausalError(f"{name}= was given for the baseline {kind!r}, which does not use it; leave it out")
        if seen not in ("measured", "fitted"):
            raise PyrocausalError(f"seen={seen!r} was given; it is 'measured' or 'fitted'")
        self.kind, self.own_genes = kind, own_genes
        self.embedding, self.gene_embedding = embedding, gene_embedding
        self.neighbours, self.penalty, self.weights, self.seen = neighbours, penalty, weights, seen
        for name in BY_GENE:
            self.register_buffer(name, torch.zeros(n_genes))
        for name in BY_PERTURBATION:
            self.register_buffer(name, torch.zeros(n_perturbations, n_genes))
        each = each_once(combinations, kind)
        self.interacts = len(each) > 0
        if self.interacts:
            for name in BY_COMBINATION:
                self.register_buffer(f"interaction_{name}", torch.zeros(len(each), n_genes))
            part = torch.zeros(len(each), n_perturbations)
            for q, parts in enumerate(each):
                part[q, list(parts)] = 1.0
            self.register_buffer("part", part)

    def forward(self, batch: Batch) -> None:
        t: dict[str, Tensor] = dict(self.named_buffers())
        m = pyro.sample("shared", _normal(t["shared"], t["shared_sd"]).to_event(1))
        a = pyro.sample("baseline", _normal(t["control"] + t["control_on_shared"] * (m - t["shared"]), t["control_sd"]).to_event(1))
        moved = t["on_control"] * (a - t["control"]).unsqueeze(-2) + t["on_shared"] * (m - t["shared"]).unsqueeze(-2)
        e = pyro.sample("effect", _normal(t["effect"] + moved, t["effect_sd"]).to_event(2))
        if self.interacts:
            d = (a - t["control"]).unsqueeze(-2) + t["part"] @ (e - t["effect"])
            loc = t["interaction_value"] - t["interaction_gain"] * d
            pyro.sample("interaction", _normal(loc, t["interaction_sd"]).to_event(2))

    def initialise(self, model: Any, data: PerturbationData) -> None:
        """All of the fit."""
        conditions = closed_form.conditions_of(data)
        estimate = self.estimate(conditions, data)
        for name in (*BY_GENE, *BY_PERTURBATION):
            getattr(self, name).copy_(torch.from_numpy(getattr(estimate, name)))
        if self.interacts:
            found = shrunk_interactions(data, conditions, estimate, self.part.double().numpy())
            for name in BY_COMBINATION:
                getattr(self, f"interaction_{name}").copy_(torch.from_numpy(getattr(found, name)))
            model.interaction_scale.copy_(torch.from_numpy(np.maximum(found.prior, LEAST_SD)))
        model.centre.copy_(self.control)
        model.baseline_scale.copy_(torch.from_numpy(closed_form.VAGUE * np.sqrt(conditions.control_variance)))
        model.shared_scale.copy_(torch.from_numpy(np.maximum(estimate.prior_shared, LEAST_SD)))
        model.effect_scale.copy_(torch.from_numpy(np.maximum(estimate.prior_effect, LEAST_SD)))
        with torch.no_grad():
            noise, name = closed_form.noise_of(data)
            getattr(model.likelihood, name).copy_(torch.from_numpy(noise).log())

    def estimate(self, c: Conditions, data: PerturbationData) -> Estimate:
        """The closed form of this baseline."""
        n, measured = len(data.perturbations), self.seen == "measured"
        if self.kind in ("control", "mean_perturbed"):
            return closed_form.constant_effects(c, n, "zero" if self.kind == "control" else "mean", self.weights)
        if self.kind == "matching_mean":
            return closed_form.matching_effects(c, n)
        if self.kind == "additive":
            return closed_form.unbiased_effects(c, n)
        if self.kind in ("additive_eb", "condition_eb"):
            return closed_form.shrunk_effects(c, n)
        if self.kind == "linear_embedding":
            own = np.full(n, -1) if self.own_genes is None else np.asarray(self.own_genes)
            given = None if self.embedding is None else closed_form.embedding_of(self.embedding, data)
            genes = None if self.gene_embedding is None else np.asarray(self.gene_embedding, dtype=float)
            return closed_form.linear_embedding_effects(c, own, genes, given, penalty=0.1 if self.penalty is None else self.penalty)
        embedding = closed_form.embedding_of(self.embedding, data)
        if self.kind == "ridge_embedding":
            return closed_form.ridge_effects(c, embedding, self.penalty, measured)
        if self.kind in ("knn_embedding", "nearest_perturbation"):
            return closed_form.neighbour_effects(c, embedding, 1 if self.kind == "nearest_perturbation" else self.neighbours, measured)
        raise PyrocausalError(f"there is no baseline {self.kind!r}; see pc.models()")


def _normal(loc: Tensor, sd: Tensor) -> Any:
    return dist.Normal(loc, sd.clamp_min(LEAST_SD))
