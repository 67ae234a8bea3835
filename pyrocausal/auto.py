"""A guide made from the model: mean field over what cells share, an encoder for what each cell has of its own."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.distributions import biject_to, constraints

from pyrocausal.data import PerturbationData
from pyrocausal.distributions import StraightThroughBernoulli
from pyrocausal.elbo import _sample_sites
from pyrocausal.errors import ContractError
from pyrocausal.loading import Batch
from pyrocausal.nn import MLP, Standardise


class AutoGuide(PyroModule):
    """The guide that :func:`auto_guide` makes; one law per latent site of the model, in the model's order.

    ====================  ===========================================  =============================================================
    site                  shared by all cells                          of each cell (in the plate ``cell``)
    ====================  ===========================================  =============================================================
    real                  Normal(m, s^2)                               Normal(MLP([norm(x), dose]))
    constrained           the same, through the support's bijection    the same, through the support's bijection
    Bernoulli             straight-through Bernoulli(sigmoid(phi))     straight-through Bernoulli(sigmoid(MLP([norm(x), dose])))
    ====================  ===========================================  =============================================================
    """

    def __init__(self, model: Any, data: PerturbationData, n_hidden: int = 128, n_layers: int = 2) -> None:
        super().__init__()
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            trace = poutine.trace(model).get_trace(data.batch([0] if len(data) == 1 else [0, 1]))
        self.standardise = Standardise(len(data.genes), log=data.kind == "counts")
        self.latent_sites: list[tuple[str, bool, bool, torch.Size, Any]] = []  # name, local, binary, event shape, support
        self.parts = nn.ModuleDict()
        n_in = len(data.genes) + len(data.perturbations)
        for name, site in _sample_sites(trace):
            if site["is_observed"]:
                continue
            fn, local = site["fn"], any(f.name == "cell" for f in site["cond_indep_stack"])
            binary = _is_bernoulli(fn)
            if not binary and not fn.has_rsample:
                raise ContractError(
                    f"the site {name!r} is discrete ({type(fn).__name__}), for which no guide can be made; write one by hand"
                )
            size = fn.event_shape.numel()
            width = size if binary else 2 * size
            self.parts[name] = MLP(n_in, width, n_hidden, n_layers) if local else _Free(width)
            support = constraints.real if binary else fn.support
            self.latent_sites.append((name, local, binary, fn.event_shape, support))
        if not self.latent_sites:
            raise ContractError("the model has no latent site, so there is nothing to guide; add pyro.sample sites without obs=")

    def initialise(self, model: Any, data: PerturbationData) -> None:
        """Before the first epoch: moments of the expression."""
        self.standardise.fit_moments(torch.as_tensor(data.dense(), device=self.standardise.mean.device))

    def forward(self, batch: Batch) -> None:
        for name, local, *law in self.latent_sites:
            if not local:
                pyro.sample(name, _law(self.parts[name](), *law))
        if batch.x is None:
            return
        h = torch.cat([self.standardise(batch.x), batch.dose], -1)
        with batch.cells():
            for name, local, *law in self.latent_sites:
                if local:
                    pyro.sample(name, _law(self.parts[name](h), *law))


class _Free(nn.Module):
    """Parameters of a law that depends on nothing."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.zeros(width))

    def forward(self) -> Tensor:
        return self.value


def auto_guide(model: Any, data: PerturbationData, n_hidden: int = 128, n_layers: int = 2) -> AutoGuide:
    """A guide for any model that keeps the contract; see :class:`AutoGuide`.

    Args:
        model: a model of your own or of the collection.
        data: gives the sizes; the guide serves any cells with these genes and perturbations.
        n_hidden, n_layers: of the encoders of sites that belong to cells.

    Raises:
        ContractError: for a model without latent sites, or with a discrete site other than a Bernoulli.
    """
    return AutoGuide(model, data, n_hidden, n_layers)


def _law(raw: Tensor, binary: bool, event_shape: torch.Size, support: Any) -> Any:
    """[..., width] -> a law with the event shape of the site."""
    n_event = len(event_shape)
    if binary:
        return StraightThroughBernoulli(logits=raw.unflatten(-1, event_shape) if n_event else raw.squeeze(-1)).to_event(n_event)
    loc, log_scale = raw.chunk(2, -1)
    if n_event:
        loc, log_scale = loc.unflatten(-1, event_shape), log_scale.unflatten(-1, event_shape)
    else:
        loc, log_scale = loc.squeeze(-1), log_scale.squeeze(-1)
    base = dist.Normal(loc, 0.3 * log_scale.exp())
    transform = biject_to(support)
    if support is constraints.real or getattr(support, "base_constraint", None) is constraints.real:
        return base.to_event(n_event)
    if isinstance(support, constraints.independent):
        transform = biject_to(support.base_constraint)
    return dist.TransformedDistribution(base, [transform]).to_event(n_event)


def _is_bernoulli(fn: Any) -> bool:
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return isinstance(fn, torch.distributions.Bernoulli)
