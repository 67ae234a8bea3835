"""Distances between two samples of cells."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

TRAINING_BANDWIDTHS = tuple(1000 / 2**5 * 2**i for i in range(10))


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """Gram form, [..., n, G], [..., m, G] -> [..., n, m]."""
    return (x.square().sum(-1)[..., :, None] + y.square().sum(-1)[..., None, :] - 2 * x @ y.mT).clamp_min(0)


def mmd(x: Tensor, y: Tensor, bandwidths: Sequence[float], unbiased: bool = True) -> Tensor:
    """Squared MMD with a sum of Gaussian kernels."""
    n, m = x.shape[-2], y.shape[-2]

    def kernel(d: Tensor) -> Tensor:
        return torch.stack([(-d / h).exp() for h in bandwidths]).sum(0)

    xx, yy, xy = kernel(squared_distances(x, x)), kernel(squared_distances(y, y)), kernel(squared_distances(x, y)).mean((-2, -1))
    if not unbiased:
        return xx.mean((-2, -1)) + yy.mean((-2, -1)) - 2 * xy
    diagonal = float(len(bandwidths))
    return (xx.sum((-2, -1)) - n * diagonal) / (n * (n - 1)) + (yy.sum((-2, -1)) - m * diagonal) / (m * (m - 1)) - 2 * xy
