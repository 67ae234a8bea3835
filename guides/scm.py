"""Guide of SCM: nothing to train. A walk over networks, and closed forms given each.

::

    networks     the best that a search finds, and a walk around it (:mod:`pyrocausal.dag_search`)
    weights      A_Sk ~ Normal((C^k_SS)^-1 C^k_Sk, sigma_k^2 (C^k_SS)^-1),   sigma_k^2 = RSS_k / (N_k - |S|)
    off targets  empirical Bayes, untreated cells and all perturbations together (:func:`pyrocausal.closed_form.shrunk_effects`), either
                 of shifts of the equations, ``x (I - A)``, where a target's own counts for nothing, or of expression: in those
                 coordinates in which the effects of one half of the cells say more of the other half
    levels       as measured, ``y_pT - b_T``; of a perturbation without cells as those of the others, in units of the genes' spread
    z            the cell, read back: ``((x - b)(I - A) - shift) / sigma``, with what the noise leaves open

Networks and effects are found in turn (:mod:`pyrocausal.network`). Where unmeasured causes move many genes, as in most real screens, edges
are not what perturbations follow, and the second coordinates win: then effects are those of ``additive_eb``, and the network answers only
for genes that are held.

``draws`` members (network, weights, effects) are kept; ``member ~ Uniform`` picks one. While it trains, and with ``draws=0``, it is the
point: the best network, and the means.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, get_args

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor

from pyrocausal.data import PerturbationData
from pyrocausal.errors import PyrocausalError
from pyrocausal.loading import Batch
from pyrocausal.network import Network, Shrink
from pyrocausal.structural import mechanism_shift, residual, targets_table

NOISE = 0.05  # of sigma, as the model's
TABLES = ("baseline", "edge", "weight", "log_sigma", "level", "off_target")


class SCM(PyroModule):
    """Members of a walk; arguments as the model's, and

    Args:
        draws: members; 0 leaves the point.
        shrink: where effects are shrunk, ``"equations"``, ``"expression"``, or ``"auto"``.
        gamma: of the penalty of an edge, ``log(N) / 2 + gamma log(G)``.
    """

    closed_form: ClassVar = True
    on_target: Tensor

    def __init__(
        self,
        n_genes: int,
        n_perturbations: int,
        own_genes: Sequence[int] | None = None,
        intervention: str = "do",
        draws: int = 50,
        shrink: Shrink = "auto",
        gamma: float = 0.5,
    ) -> None:
        super().__init__()
        if shrink not in get_args(Shrink):
            raise PyrocausalError(f"shrink={shrink!r} was given; choose one of {', '.join(get_args(Shrink))}")
        P, G = n_perturbations, n_genes
        self.draws, self.shrink, self.gamma, self.intervention = draws, shrink, gamma, intervention
        self.register_buffer("on_target", targets_table(own_genes, (P, G)))
        shapes = {"baseline": (G,), "edge": (G, G), "weight": (G, G), "log_sigma": (G,), "level": (P,), "off_target": (P, G)}
        for name in TABLES:
            self.register_buffer(f"point_{name}", torch.zeros(shapes[name]))
            self.register_buffer(f"members_{name}", torch.zeros(max(draws, 1), *shapes[name]))

    def forward(self, batch: Batch) -> None:
        values = {k: getattr(self, f"point_{k}") for k in TABLES}
        if self.draws and not self.training:
            member = pyro.sample("member", dist.Categorical(self.on_target.new_ones(self.draws)), infer={"is_auxiliary": True})
            values = {k: getattr(self, f"members_{k}")[member] for k in TABLES}
        for name, value in values.items():
            pyro.sample(name, dist.Delta(value, event_dim=getattr(self, f"point_{name}").dim()))
        if batch.x is None:
            return
        on, A, sigma = self.on_target, values["edge"] * values["weight"], values["log_sigma"].exp()
        effect = torch.where(on > 0, values["level"].unsqueeze(-1), values["off_target"])
        with batch.cells():
            shift = mechanism_shift(batch.dose, effect if self.intervention == "shift" else effect * (1 - on))
            z = (residual(batch.x - values["baseline"], A) - shift) / sigma
            left = NOISE**2 * (1 + ((A * sigma.unsqueeze(-1)) ** 2).sum(-2) / sigma**2)
            precision = 1 + 1 / left
            loc, scale = z / left / precision, precision.rsqrt().expand_as(z)
            if self.intervention == "do":  # a held gene says nothing of its own equation
                held = (batch.dose != 0).to(on) @ on > 0
                loc, scale = torch.where(held, 0.0, loc), torch.where(held, 1.0, scale)
            pyro.sample("z", dist.Normal(loc, scale).to_event(1))

    def initialise(self, model: Any, data: PerturbationData) -> None:
        """All of the fit."""
        rng = np.random.default_rng(int(torch.randint(2**31, ())))
        found = Network.of(data, self.on_target.numpy() > 0, self.intervention, self.shrink, self.gamma, rng)
        for name, value in found.point().items():
            getattr(self, f"point_{name}").copy_(torch.from_numpy(value))
        for i in range(self.draws):
            for name, value in found.member(rng).items():
                getattr(self, f"members_{name}")[i] = torch.from_numpy(value)
        prior, scale = found.level_prior()
        settings = {"centre": found.baseline, "unit": found.unit, "level_prior": prior, "level_scale": scale, "off_scale": found.off_scale}
        for name, value in settings.items():
            getattr(model, name).copy_(torch.from_numpy(value))
        with torch.no_grad():
            model.log_noise.copy_(torch.from_numpy(np.log(NOISE * np.sqrt(found.variance))))
