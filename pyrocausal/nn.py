"""Networks of the models: plain ``nn.Module``s that broadcast over any leading dimensions."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class MLP(nn.Sequential):
    """A multilayer perceptron, [..., n_in] -> [..., n_out].

    Each hidden layer is Linear, LayerNorm (optional), leaky ReLU. LayerNorm rather than BatchNorm: a cell's output does not depend on
    the cells beside it, which a per-cell counterfactual needs.
    """

    def __init__(self, n_in: int, n_out: int, n_hidden: int = 128, n_layers: int = 2, layer_norm: bool = False, slope: float = 0.2) -> None:
        layers: list[nn.Module] = []
        width = n_in
        for _ in range(n_layers):
            layers.append(nn.Linear(width, n_hidden))
            if layer_norm:
                layers.append(nn.LayerNorm(n_hidden))
            layers.append(nn.LeakyReLU(slope))
            width = n_hidden
        super().__init__(*layers, nn.Linear(width, n_out))

    @property
    def first(self) -> nn.Linear:
        """The layer that reads the input."""
        layer = self[0]
        assert isinstance(layer, nn.Linear)
        return layer

    def after_first(self, h: Tensor) -> Tensor:
        """All layers but the first, for an input whose first layer is computed in pieces."""
        for layer in list(self)[1:]:
            h = layer(h)
        return h

    @property
    def last(self) -> nn.Linear:
        """The layer that writes the output."""
        layer = self[-1]
        assert isinstance(layer, nn.Linear)
        return layer


class Standardise(nn.Module):
    """Expression as a network likes it: log1p for counts, then mean 0 and standard deviation 1 per gene over the training cells.

    The moments are buffers, set once by :meth:`fit_moments`. A gene without variance is centred and left at zero.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, n_genes: int, log: bool) -> None:
        super().__init__()
        self.log = log
        self.register_buffer("mean", torch.zeros(n_genes))
        self.register_buffer("scale", torch.ones(n_genes))

    @torch.no_grad()
    def fit_moments(self, x: Tensor) -> None:
        """Set the moments from cells [n, n_genes]."""
        h = x.log1p() if self.log else x
        sd = h.std(0, unbiased=False)
        self.mean.copy_(h.mean(0))
        self.scale.copy_(torch.where(sd > 0, sd, torch.ones_like(sd)))

    def forward(self, x: Tensor) -> Tensor:
        """[..., n_genes] -> [..., n_genes]."""
        h = x.log1p().sub_(self.mean) if self.log else x - self.mean
        return h.div_(self.scale)
