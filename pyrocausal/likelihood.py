"""From a decoder's output to the law of the expression: one place for the three likelihoods of the collection."""

from __future__ import annotations

from typing import Any, Literal

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyrocausal.distributions import NegativeBinomial, Poisson
from pyrocausal.loading import Nonzeros

LEAST = 1e-2  # of sigma, in units of the root mean square spread of the genes

LikelihoodName = Literal["negative_binomial", "poisson", "gaussian"]


class Likelihood(nn.Module):
    """``x ~ p(. | x_loc)`` with a parameter per gene.

    ==================  =======================================  ==============================
    name                mean ``x_loc``                           law
    ==================  =======================================  ==============================
    negative_binomial   library_size * softmax(eta)              Var x = mu + mu^2 / theta_g
    poisson             library_size * softmax(eta)              Var x = mu
    gaussian            eta                                      Var x = sigma_g^2, sigma_g > ``floor``
    ==================  =======================================  ==============================

    A gene that does not vary in the training cells has no largest density: :meth:`bound` keeps sigma from zero.
    """

    log_theta: nn.Parameter
    log_sigma: nn.Parameter
    least: Tensor

    def __init__(self, name: LikelihoodName, n_genes: int, floor: float = 0.0) -> None:
        super().__init__()
        self.name = name
        self.floor = floor
        self.register_buffer("least", torch.zeros(()))
        if name == "negative_binomial":
            self.log_theta = nn.Parameter(torch.full((n_genes,), 2.0))
        elif name == "gaussian":
            self.log_sigma = nn.Parameter(torch.zeros(n_genes))
        elif name != "poisson":
            raise ValueError(f"likelihood={name!r} is unknown; choose 'negative_binomial', 'poisson' or 'gaussian'")

    @property
    def is_counts(self) -> bool:
        return self.name != "gaussian"

    @torch.no_grad()
    def bound(self, x: Tensor) -> None:
        """Before the first epoch: sigma is at least a hundredth of the spread of the genes in cells [n, n_genes]."""
        if not self.is_counts:
            self.least.copy_(LEAST * x.var(0, unbiased=False).mean().sqrt())

    @property
    def sigma(self) -> Tensor:
        """Of Gaussian noise, [n_genes]."""
        return (self.floor + self.log_sigma.exp()).clamp_min(self.least)

    def mean(self, eta: Tensor, library_size: Tensor) -> Tensor:
        """[..., n, n_genes], [n, 1] -> [..., n, n_genes]."""
        return library_size * eta.softmax(-1) if self.is_counts else eta

    def forward(self, x_loc: Tensor, nonzeros: Nonzeros | None = None) -> Any:
        """The law of ``x`` given its mean; its event is the vector over genes."""
        if self.name == "negative_binomial":
            return NegativeBinomial(x_loc, self.log_theta.exp(), nonzeros=nonzeros)
        if self.name == "poisson":
            return Poisson(x_loc, nonzeros=nonzeros)
        return dist.Normal(x_loc, self.sigma).to_event(1)
