"""Distances between two samples of cells: terms of an objective (``pyro.factor``), and metrics of generated against measured cells.

With cells ``x_1 .. x_n ~ P`` and ``y_1 .. y_m ~ Q``, d the Euclidean distance over genes and kernel ``k = sum_i exp(-d^2 / h_i)``:

- :func:`mmd`: ``MMD^2 = E k(x, x') + E k(y, y') - 2 E k(x, y)``; 0 only for P = Q.
- :func:`energy_distance`: ``2 E d(x, y) - E d(x, x') - E d(y, y')``; 0 only for P = Q, and nothing to choose.
- :func:`energy_reference`: what the code of SCCVAE calls energy distance, which it is not; to compare with published tables.

Everything rests on ``d^2 = |x|^2 + |y|^2 - 2 x.y``: one product of matrices, never an array of n x m x G. Cells are first moved by a common
point, which changes no distance and keeps float32 exact where all cells share a large mean; what is below the rounding of the two norms
counts as 0, so that cells that coincide are at distance 0 and have a finite gradient. (Wants true float32 products, torch's default.)

Sources: Gretton et al., JMLR 13:723, 2012; Szekely and Rizzo, J Stat Plan Inference 143:1249, 2013; bandwidths and ``energy_reference``:
Liu, Zhang and Uhler, PLOS Comput Biol 22(2): e1013194, 2026, and their code ``uhlerlab/sccvae``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyrocausal.errors import DataError

TRAINING_BANDWIDTHS = tuple(1000 / 2**5 * 2**i for i in range(10))
"""The bandwidths h_i of training in SCCVAE and the discrepancy VAE: 31.25, 62.5, ..., 16000."""

METRIC_MULTIPLES = (0.25, 0.5, 1.0, 2.0, 4.0)
"""The bandwidths of SCCVAE's metric, in mean squared distances of the pooled cells."""


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """``|x_i - y_j|^2 = |x_i|^2 + |y_j|^2 - 2 x_i.y_j``, not below 0.

    Args:
        x: [..., n_cells_x, n_genes]. y: [..., n_cells_y, n_genes]; the leading dimensions broadcast.

    Returns:
        [..., n_cells_x, n_cells_y].
    """
    _check_shapes(x, y, 0)
    x, y = _centred(x, y)
    return _expand(torch.linalg.vecdot(x, x), torch.linalg.vecdot(y, y), x @ y.mT)


def mmd(x: Tensor, y: Tensor, bandwidths: Sequence[float] | None = None, unbiased: bool = True) -> Tensor:
    """Squared maximum mean discrepancy with the kernel ``k(x, y) = sum_i exp(-|x - y|^2 / h_i)``.

    Args:
        x: cells of one sample, [..., n_cells_x, n_genes]. y: of the other, [..., n_cells_y, n_genes]; the leading dimensions broadcast.
        bandwidths: the h_i, for an objective :data:`TRAINING_BANDWIDTHS`. Only shapes are checked, and a GPU is never waited for. None is
            SCCVAE's metric: five kernels at 1/4, 1/2, 1, 2 and 4 times the mean of ``|z_i - z_j|^2`` over the N (N - 1) ordered pairs
            i != j of the N pooled cells (the N zeros of the diagonal count neither in sum nor in number), constant in the gradient.
            Values that are not finite are refused, and a GPU is waited for.
        unbiased: the U-statistic ``1/(n(n-1)) sum_{i != j} k(x_i, x_j) + 1/(m(m-1)) sum_{i != j} k(y_i, y_j) - 2/(nm) sum_ij k(x_i, y_j)``,
            which is 0 on average for P = Q, and then negative half of the time. False: the V-statistic of the reference,
            ``mean(K_xx + K_yy - K_xy - K_yx)`` with the diagonals, never negative.

    Returns:
        [...]. A V-statistic does not fall to 0: for P = Q and n cells on each side its mean is ``2/n (K - E k(x, y))`` with K kernels. For
        the metric and many genes, where all distances are about the mean one, that is ``2/n (5 - 1.907) = 0.1933`` at n = 32
        (``sum_i exp(-1/c_i) = 1.907`` over the five multiples c_i). Subtract it, or compare ``unbiased=True``.
    """
    _check_shapes(x, y, 2 if unbiased else 1, ", or unbiased=False")
    scales: Sequence[float | Tensor]
    if bandwidths is None:
        _check_values(x, y)
        pairs = _pairs(x, y)
        scale = _mean_squared_distance(pairs.detach(), x.shape[-2], y.shape[-2])
        scales = [c * scale for c in METRIC_MULTIPLES]
    else:
        scales = tuple(bandwidths)
        if not scales or not all(h > 0 for h in scales):
            raise DataError(f"the bandwidths {list(scales)} were given; give at least one, each above 0, or None for those of the metric")
        pairs = _pairs(x, y)
    kernel = torch.zeros_like(pairs)
    for h in scales:  # not by squaring, h to h/2: nine squarings lose 4e-5 in float32, and gain no time
        kernel = kernel + (pairs / -h).exp()
    return _contrast(kernel, x.shape[-2], y.shape[-2], unbiased)


def energy_distance(x: Tensor, y: Tensor, check: bool = True) -> Tensor:
    """``2/(nm) sum_ij |x_i - y_j| - 1/(n(n-1)) sum_{i != j} |x_i - x_j| - 1/(m(m-1)) sum_{i != j} |y_i - y_j|``: unbiased.

    Args:
        x: [..., n_cells_x, n_genes]. y: [..., n_cells_y, n_genes]; the leading dimensions broadcast.
        check: refuse values that are not finite, for which a GPU is waited for. False inside a training step: shapes are checked always.

    Returns:
        [...], 0 on average for P = Q, and then negative about half of the time. The gradient of the distance of two cells that coincide
        is taken as 0. Cannot see: which genes differ; genes count by their variance.
    """
    _check_shapes(x, y, 2)
    if check:
        _check_values(x, y)
    pairs = _pairs(x, y)
    same = pairs == 0
    return -_contrast(pairs.masked_fill(same, 1).sqrt().masked_fill(same, 0), x.shape[-2], y.shape[-2], True)


def energy_reference(x: Tensor, y: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """``mean(2 (x - y)^2 - (x - x')^2 - (y - y')^2)`` over cells and genes, with x' and y' the cells in a random order.

    Not an energy distance: no root is taken, cells are paired by their rows, and a cell can be its own partner. Its mean is
    ``2 |E x - E y|^2 / G + 2/n (var x + var y)`` with the variances averaged over the G genes. It sees no more than means, and *rewards
    collapse*: cells without variance score better than cells of the right distribution. Only to compare with tables of SCCVAE, which takes
    batches of n = 32 and averages them.

    Args:
        x: generated cells, [..., n_cells, n_genes]. y: measured cells, as many. generator: of the random orders, one for each sample.

    Returns:
        [...].
    """
    _check_shapes(x, y, 1)
    if x.shape[-2] != y.shape[-2]:
        raise DataError(f"x has {x.shape[-2]} cells and y {y.shape[-2]}, which are compared row by row; give as many of each")
    _check_values(x, y)
    device = "cpu" if generator is None else generator.device
    within = torch.zeros((), dtype=x.dtype, device=x.device)
    for v in (x, y):
        order = torch.rand(v.shape[:-1], generator=generator, device=device).argsort(-1).to(v.device)
        within = within + (v - v.take_along_dim(order[..., None], -2)).square().mean((-2, -1))
    return 2 * (x - y).square().mean((-2, -1)) - within


def _centred(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Both moved by one point [n_genes] near their cells, a constant of the gradient because no distance depends on it."""
    centre = (x.detach().mean(tuple(range(x.dim() - 1))) + y.detach().mean(tuple(range(y.dim() - 1)))) / 2
    return x - centre, y - centre


def _expand(a: Tensor, b: Tensor, products: Tensor) -> Tensor:
    """Squared distances [..., n, m] from squared norms a [..., n], b [..., m] and products [..., n, m]."""
    size = a[..., :, None] + b[..., None, :]
    squared = size - 2 * products
    return squared.masked_fill(squared < 32 * torch.finfo(squared.dtype).eps * size, 0)  # keeps NaN and infinity


def _pairs(x: Tensor, y: Tensor) -> Tensor:
    """Squared distances of all pairs, x with x, y with y, then x with y, row by row: [..., n n + m m + n m].

    The norms are the diagonals of the products, so that no other pass over the genes is needed and a cell is at 0 from itself.
    """
    x, y = _centred(x, y)
    xx, yy = x @ x.mT, y @ y.mT
    a, b = xx.diagonal(dim1=-2, dim2=-1), yy.diagonal(dim1=-2, dim2=-1)
    blocks = [_expand(a, a, xx).flatten(-2), _expand(b, b, yy).flatten(-2), _expand(a, b, x @ y.mT).flatten(-2)]
    leading = torch.broadcast_shapes(*(v.shape[:-1] for v in blocks))
    return torch.cat([v.expand(*leading, v.shape[-1]) for v in blocks], -1)


def _contrast(pairs: Tensor, n: int, m: int, unbiased: bool) -> Tensor:
    """``mean xx + mean yy - 2 mean xy`` of a function of :func:`_pairs`, [..., n n + m m + n m] -> [...]."""
    xx, yy, xy = pairs.split([n * n, m * m, n * m], -1)
    if not unbiased:
        return xx.mean(-1) + yy.mean(-1) - 2 * xy.mean(-1)
    within = [(v.sum(-1) - v[..., :: k + 1].sum(-1)) / (k * (k - 1)) for v, k in ((xx, n), (yy, m))]
    return within[0] + within[1] - 2 * xy.mean(-1)


def _mean_squared_distance(pairs: Tensor, n: int, m: int) -> Tensor:
    """Mean over the ordered pairs of different cells of the pooled sample, [..., n n + m m + n m] -> [..., 1]."""
    total = pairs.sum(-1, keepdim=True) + pairs[..., n * n + m * m :].sum(-1, keepdim=True)
    return (total / ((n + m) * (n + m - 1))).clamp_min(torch.finfo(pairs.dtype).tiny * 4)  # all cells equal: every kernel is 1


def _check_shapes(x: Tensor, y: Tensor, least: int, otherwise: str = "") -> None:
    """Refuse what cannot be compared; reads no values."""
    for name, v in (("x", x), ("y", y)):
        if v.dim() < 2:
            raise DataError(f"{name} of shape {list(v.shape)} was given; give cells by genes, [..., n_cells, n_genes]")
        if v.shape[-2] < least:
            raise DataError(f"{name} has {v.shape[-2]} cells and the estimate needs at least {least} of each sample; give more{otherwise}")
    if x.shape[-1] != y.shape[-1]:
        raise DataError(f"x has {x.shape[-1]} genes and y {y.shape[-1]}; give two samples of the same genes in the same order")
    if x.dtype != y.dtype or not x.is_floating_point():
        raise DataError(f"x is of {x.dtype} and y of {y.dtype}; give both as floating point numbers of one type, as in y.to(x)")
    if any(a != b and 1 not in (a, b) for a, b in zip(x.shape[-3::-1], y.shape[-3::-1], strict=False)):
        leading = f"{list(x.shape[:-2])} of x and {list(y.shape[:-2])} of y"
        raise DataError(f"the leading dimensions {leading} do not broadcast; give samples of one shape, or one sample for all")


def _check_values(x: Tensor, y: Tensor) -> None:
    """Refuse NaN and infinity; a GPU is waited for."""
    for name, v in (("x", x), ("y", y)):
        if not v.detach().isfinite().all():
            bad = int((~v.detach().isfinite()).sum())
            raise DataError(f"{bad} of {v.numel():,} values of {name} are NaN or infinite, all have to be finite; leave those cells out")
