"""Networks of the models: plain ``nn.Module``s that broadcast over any leading dimensions."""

from __future__ import annotations

from typing import Literal

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


DecoderKind = Literal["mlp", "linear", "anchored"]


class Loadings(nn.Module):
    """A decoder that says what each program does to each gene, [..., n_latent] -> [..., n_genes].

    ==============  =====================================  =============================================================================
    kind            output                                 what of the programs it pins
    ==============  =====================================  =============================================================================
    ``"mlp"``       ``b + u L + MLP(u)``                   nothing: it absorbs any linear map of u
    ``"linear"``    ``b + u L``                            nothing under linear equations; permutation and scale under others
    ``"anchored"``  ``b + u (anchors * softplus(L))``      which program is which, and its sign: each owns genes
    ==============  =====================================  =============================================================================

    Args:
        anchors: which genes each program owns, [n_latent, n_genes]; for ``"anchored"``.
    """

    anchors: Tensor | None

    def __init__(
        self, kind: DecoderKind, n_latent: int, n_genes: int, anchors: Tensor | None = None, n_hidden: int = 128, n_layers: int = 2
    ) -> None:
        super().__init__()
        if kind not in ("mlp", "linear", "anchored"):
            raise ValueError(f"decoder={kind!r} was given; it is 'mlp', 'linear' or 'anchored'")
        if (anchors is not None) != (kind == "anchored"):
            raise ValueError(f"decoder={kind!r}: anchors [n_latent, n_genes] are to be given with 'anchored', and with no other kind")
        if anchors is not None and tuple(anchors.shape) != (n_latent, n_genes):
            raise ValueError(f"anchors of shape {tuple(anchors.shape)} were given; a row for each program: [{n_latent}, {n_genes}]")
        self.kind = kind
        self.register_buffer("anchors", None if anchors is None else torch.as_tensor(anchors).float().ne(0).float())
        self.bias = nn.Parameter(torch.zeros(n_genes))
        self.weight = nn.Parameter(0.1 * torch.randn(n_latent, n_genes) if anchors is None else torch.zeros(n_latent, n_genes))
        self.rest = MLP(n_latent, n_genes, n_hidden, n_layers) if kind == "mlp" else None
        if self.rest is not None:  # at first the loadings alone
            nn.init.zeros_(self.rest.last.weight)
            nn.init.zeros_(self.rest.last.bias)

    @property
    def loadings(self) -> Tensor:
        """The linear part, [n_latent, n_genes]."""
        return self.weight if self.anchors is None else self.anchors * nn.functional.softplus(self.weight)

    @torch.no_grad()
    def scale(self, s: Tensor) -> None:
        """Read programs in other units: ``d(u / s)`` becomes ``d(u)``, so multiply what each program [n_latent] does."""
        if self.anchors is not None:
            self.weight.copy_(torch.where(self.anchors > 0, inverse_softplus(self.loadings * s[:, None]), self.weight))
        else:
            self.weight.mul_(s[:, None])
        if self.rest is not None:
            self.rest.first.weight.mul_(s)

    def forward(self, u: Tensor) -> Tensor:
        eta = self.bias + u @ self.loadings
        return eta if self.rest is None else eta + self.rest(u)


def of_batch(table: Tensor, batch_code: Tensor) -> Tensor:
    """Rows [n, n_genes] of a table of batches [n_batches, n_genes].

    As ``table[batch_code]``, whose gradient is summed in the order in which threads arrive; here the same seed gives the same sum.
    """
    return nn.functional.embedding(batch_code, table)


def inverse_softplus(y: Tensor) -> Tensor:
    """``x`` such that ``log(1 + e^x) = y`` > 0."""
    return y + (-torch.expm1(-y)).clamp_min(1e-12).log()


class Encoder(nn.Module):
    """Where the programs of a cell are and how surely, ``(a, v)``: ``a = h W + MLP(h)``, [..., n_in] -> twice [..., n_latent].

    ``n_layers=0`` leaves the linear part, with a standard deviation that is the same for all cells.
    """

    def __init__(self, n_in: int, n_latent: int, n_hidden: int = 128, n_layers: int = 2) -> None:
        super().__init__()
        self.linear = nn.Linear(n_in, n_latent)
        self.rest = MLP(n_in, 2 * n_latent, n_hidden, n_layers, layer_norm=True) if n_layers else None
        self.log_v = nn.Parameter(torch.full((n_latent,), -1.0))
        if self.rest is not None:
            nn.init.zeros_(self.rest.last.weight)
            nn.init.zeros_(self.rest.last.bias)

    @torch.no_grad()
    def scale(self, s: Tensor) -> None:
        """Give the programs in other units, ``u_k -> s_k u_k``, [n_latent]."""
        n = len(s)
        self.linear.weight.mul_(s[:, None])
        self.linear.bias.mul_(s)
        self.log_v.add_(s.log())
        if self.rest is not None:
            self.rest.last.weight[:n].mul_(s[:, None])
            self.rest.last.bias[:n].mul_(s)

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor]:
        a, log_v = self.linear(h), self.log_v
        if self.rest is not None:
            more, wider = self.rest(h).chunk(2, -1)
            a, log_v = a + more, log_v + wider
        return a, log_v.exp().expand_as(a)


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
