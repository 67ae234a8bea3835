"""Minibatches. Counts stay sparse until the batch; the sparse pieces travel beside the dense view, so that likelihoods need not find
the non-zeros again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyro
import scipy.sparse as sp
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyrocausal.errors import DataError

if TYPE_CHECKING:
    from pyrocausal.data import PerturbationData
    from pyrocausal.dynamics.stationary import Moments

MAX_DENSITY = 0.5  # above it, the dense likelihood formula is faster than the one over non-zeros


@dataclass(frozen=True)
class Nonzeros:
    """The non-zero counts of a batch, row by row.

    Attributes:
        dense: the batch's own ``x``, by identity: the pieces below are valid for this tensor only.
        flat: positions in the flattened [n, G] matrix, [nnz] int64.
        row: row of each, [nnz] int64.
        gene: column of each, [nnz] int64.
        value: the counts, [nnz].
        log_factorial: sum over genes of lgamma(x + 1), [n].
    """

    dense: Tensor
    flat: Tensor
    row: Tensor
    gene: Tensor
    value: Tensor
    log_factorial: Tensor


@dataclass(frozen=True)
class Batch:
    """Some cells as tensors: the one argument of every model and guide.

    Attributes:
        x: counts or expression, [n, n_genes]; None when hidden (prediction).
        dose: treatment, [n, n_perturbations]; 0 = untreated, several non-zeros = combination.
        library_size: total counts of the cell, [n, 1] (ones for normalised data).
        batch_code: technical batch, [n] int64.
        time: measurement time, [n], or None.
        index: position of the cells in their data object, [n] int64.
        n_total: size of the population that the cells stand for.
        nonzeros: the sparse pieces of ``x``, or None for dense data.
        partner: expression of as many control cells, drawn at random, [n, n_genes]; for models that are trained by condition, else None.
        moments: if the rows are conditions and ``x`` their means, what else a Gaussian law needs of their cells; else None.
        path: expression of units that were seen at F times, [n, F, n_genes], 0 where they were not; ``x`` is the last of them.
        path_time: when, [n, F]; NaN where a unit was not seen.
        course: treatment of units during the interval that leads to each of the F times, [n, F, n_perturbations]; None if it never changes.
        collapsed: ask for the law of what was seen with the state of the cells integrated out, of models that can (``collapses``).
    """

    x: Tensor | None
    dose: Tensor
    library_size: Tensor
    batch_code: Tensor
    time: Tensor | None
    index: Tensor
    n_total: int
    nonzeros: Nonzeros | None = None
    partner: Tensor | None = None
    moments: Moments | None = None
    path: Tensor | None = None
    path_time: Tensor | None = None
    course: Tensor | None = None
    collapsed: bool = False

    def __len__(self) -> int:
        return len(self.index)

    def cells(self) -> Any:
        """The one plate over cells: ``with batch.cells():`` (name ``cell``, dim -1, scaled from the batch to the population)."""
        return pyro.plate("cell", self.n_total, subsample=self.index, dim=-1)

    def hide(self, name: str = "x") -> Batch:
        """The same cells with the observation hidden, so that a model samples it."""
        if name != "x":
            raise ValueError(f"{name!r} cannot be hidden; only 'x' can")
        return replace(self, x=None, nonzeros=None, partner=None, moments=None, path=None, path_time=None, collapsed=False)

    def rows(self, index: list[int]) -> Batch:
        """Some of the cells (repeats allowed); the sparse pieces are dropped."""
        picked = {f.name: getattr(self, f.name)[index] for f in fields(self) if isinstance(getattr(self, f.name), Tensor)}
        return replace(self, nonzeros=None, moments=None, **picked)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Batch:
        """Every tensor moved; floating ones also cast."""

        def move(t: Tensor) -> Tensor:
            return t.to(device=device, dtype=dtype if t.is_floating_point() else None)

        moved: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("nonzeros", "moments")}
        moved = {k: move(v) if isinstance(v, Tensor) else v for k, v in moved.items()}
        nz = None
        if self.nonzeros is not None:
            pieces = {f.name: move(getattr(self.nonzeros, f.name)) for f in fields(self.nonzeros) if f.name != "dense"}
            nz = Nonzeros(dense=moved["x"], **pieces)
        moments = None if self.moments is None else type(self.moments)(move(self.moments.weight), move(self.moments.within))
        return Batch(**moved, nonzeros=nz, moments=moments)


def make_batch(data: PerturbationData, rows: NDArray[np.int64], n_total: int, dtype: torch.dtype, device: torch.device | str) -> Batch:
    """Cells ``rows`` of ``data`` as a batch; the sparse pieces come from the CSR in one pass, never from the dense view."""
    n_genes = data.x.shape[1]
    nonzeros = None
    if sp.issparse(data.x):
        part = data.x[rows]
        row = np.repeat(np.arange(len(rows)), np.diff(part.indptr))
        flat = row * n_genes + part.indices
        dense = np.zeros(len(rows) * n_genes, np.float32)
        dense[flat] = part.data
        x = torch.from_numpy(dense.reshape(len(rows), n_genes)).to(dtype)
        if data.kind == "counts" and len(flat) < MAX_DENSITY * len(dense):
            value = torch.from_numpy(part.data).to(dtype)
            log_factorial = torch.zeros(len(rows), dtype=dtype).index_add_(0, torch.from_numpy(row), torch.lgamma(value + 1))
            nonzeros = Nonzeros(
                x, torch.from_numpy(flat), torch.from_numpy(row), torch.from_numpy(part.indices.astype(np.int64)), value, log_factorial
            )
    else:
        x = torch.from_numpy(np.ascontiguousarray(data.x[rows])).to(dtype)
    path = None if data.path is None else torch.from_numpy(data.path[rows]).to(dtype)
    path_time = None
    if path is not None:
        when = torch.from_numpy(data.path_times).to(dtype).expand(len(rows), -1)
        path_time = torch.where(path[..., 0].isnan(), torch.nan, when)
    batch = Batch(
        x=x,
        path=None if path is None else path.nan_to_num(),
        path_time=path_time,
        course=None if data.course is None else torch.from_numpy(data.course[rows]).to(dtype),
        dose=torch.from_numpy(data.dose[rows].toarray()).to(dtype),
        library_size=torch.from_numpy(data.library_size[rows]).to(dtype)[:, None],
        batch_code=torch.from_numpy(data.batch_codes[rows]),
        time=None if data.time is None else torch.from_numpy(data.time[rows]).to(dtype),
        index=torch.from_numpy(rows.astype(np.int64)),
        n_total=n_total,
        nonzeros=nonzeros,
    )
    return batch if torch.device(device).type == "cpu" else batch.to(device)


def batches(
    data: PerturbationData,
    batch_size: int,
    order: NDArray[np.int64] | None = None,
    n_total: int | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Iterator[Batch]:
    """Minibatches over all cells in the given order (their own if None); the last one may be smaller.

    Batches differ by at most one cell in size, so that no cell weighs much more than another through a small last batch.
    """
    if batch_size < 1:
        raise DataError(f"batch_size={batch_size} was given; a batch needs at least one cell")
    rows = np.arange(len(data)) if order is None else order
    for part in np.array_split(rows, max(1, -(-len(rows) // batch_size))):
        yield make_batch(data, part, len(data) if n_total is None else n_total, dtype, device)


def batches_by_condition(
    data: PerturbationData,
    batch_size: int,
    rng: np.random.Generator,
    n_total: int | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    controls: PerturbationData | None = None,
) -> tuple[int, Iterator[Batch]]:
    """Minibatches of cells of one condition each, in random order, with as many random control cells in ``partner``; every cell comes once.

    Args:
        controls: where the control cells are drawn from, with replacement; ``data`` if None.

    Returns:
        How many minibatches there are, and the minibatches.
    """
    source = data if controls is None else controls
    pool = np.flatnonzero(source.is_control)
    if len(pool) == 0:
        raise DataError("there are no control cells to stand beside the perturbed ones; train on cells that include the control")
    codes = np.unique(data.labels.astype(str), return_inverse=True)[1]
    shuffled = rng.permutation(len(data))
    shuffled = shuffled[np.argsort(codes[shuffled], kind="stable")]
    parts: list[NDArray[np.int64]] = []
    for rows in np.split(shuffled, np.flatnonzero(np.diff(codes[shuffled])) + 1):
        parts += np.array_split(rows, max(1, -(-len(rows) // batch_size)))

    def minibatches() -> Iterator[Batch]:
        for i in rng.permutation(len(parts)):
            partners = source.x[rng.choice(pool, len(parts[i]))]
            partner = torch.from_numpy(np.asarray(partners.toarray() if sp.issparse(partners) else partners)).to(device=device, dtype=dtype)
            batch = make_batch(data, parts[i], len(data) if n_total is None else n_total, dtype, device)
            yield replace(batch, partner=partner)

    return len(parts), minibatches()


def moment_batch(
    data: PerturbationData,
    pooled: bool = True,
    weights: Tensor | None = None,
    device: torch.device | str = "cpu",
    by_time: bool = False,
) -> Batch:
    """The whole screen as one batch whose rows are its conditions: means in ``x`` [Q, d], the rest in ``moments``; float64.

    Of units that were seen at F times, ``by_time`` gives the moments of whole paths, d = F n_genes.

    Args:
        pooled, weights, by_time: as of :func:`pyrocausal.dynamics.stationary.condition_moments`.
    """
    from pyrocausal.dynamics.stationary import condition_moments

    dose, mean, moments, time = condition_moments(data, pooled, weights, by_time)
    n = len(dose)
    ones, index = torch.ones(n, 1, dtype=mean.dtype), torch.arange(n)
    batch = Batch(mean, dose, ones, torch.zeros(n, dtype=torch.int64), time, index, len(data), moments=moments)
    if data.path_times is not None and by_time:
        batch = replace(batch, path_time=torch.from_numpy(data.path_times.astype(np.float64)).expand(n, -1))
    return batch if torch.device(device).type == "cpu" else batch.to(device)
