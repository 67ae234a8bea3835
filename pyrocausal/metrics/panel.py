"""What a prediction is scored against: held-out cells split into a truth and a replicate, and the baseline that needs no model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from pyrocausal.data import PerturbationData
from pyrocausal.errors import DataError
from pyrocausal.metrics.de_sets import DETable, adjust, wilcoxon_de
from pyrocausal.metrics.means import Array, Bulk, bulk_lognorm, dense

Mask = NDArray[np.bool_]
CP = 1e4  # counts of a cell after normalisation


@dataclass(frozen=True)
class Entry:
    """Profiles of P perturbations: ``means`` [P, n_genes] in the panel's unit, a row NaN where there is no prediction, and, if there are,
    the ``cells`` of each, P arrays [n_p, n_genes] of counts (or of values, on panels of normalised data)."""

    means: Array
    cells: tuple[Array, ...] | None = None

    def __post_init__(self) -> None:
        if np.ndim(self.means) != 2 or (self.cells is not None and len(self.cells) != len(self.means)):
            given = f"means of shape {np.shape(self.means)} with {len(self.cells or ())} samples of cells"
            raise DataError(f"{given} were given; give [P, n_genes] and P samples, or none")


@dataclass(frozen=True)
class Panel:
    """Held-out perturbations, and what their predictions are compared with; :func:`make_panel` makes one from cells.

    Attributes:
        names: of the P perturbations. genes: of the n_genes columns.
        true: what was measured. replicate: the same of other cells. baseline: the mean response, cells drawn from perturbed training cells.
        control: one row, of control cells.
        reference: the perturbed mean, average of the training centroids with equal weight, [n_genes].
        own: genes that each perturbation targets, [P, n_genes].
        score: score of differential expression, true cells against all other perturbed cells, fixed before any prediction, [P, n_genes].
        positive: the positive control of metrics of means, :func:`interpolated_duplicate`.
        counts: whether cells are counts; their unit is ``log1p(1e4 x / sum x)`` then.
        loadings: space of the distances between cells, [n_genes, d], from training cells; None: all genes.
    """

    names: tuple[str, ...]
    genes: tuple[str, ...]
    true: Entry
    replicate: Entry
    baseline: Entry
    control: Entry
    reference: Array
    own: Mask
    score: Array
    positive: Entry
    counts: bool
    loadings: Array | None = None

    @cached_property
    def control_entry(self) -> Entry:
        """The control as a prediction for every perturbation."""
        n = len(self.names)
        cells = None if self.control.cells is None else self.control.cells * n
        return Entry(np.repeat(self.control.means, n, axis=0), cells)

    @cached_property
    def control_bulk(self) -> Bulk:
        return bulk_lognorm([_control(self)])


class Side:
    """An entry of a panel, with what its metrics need: computed once, and permuted with it. Failed rows hold the control instead."""

    def __init__(self, entry: Entry, panel: Panel) -> None:
        if np.shape(entry.means) != np.shape(panel.true.means):
            want = np.shape(panel.true.means)
            raise DataError(
                f"means of shape {np.shape(entry.means)} were given for a panel of {want}; give a row for each of its perturbations"
            )
        means = np.asarray(entry.means, dtype=float)
        self.failed: Mask = ~np.isfinite(means).all(1)
        self.panel, self.order = panel, np.arange(len(means))
        self.means = np.where(self.failed[:, None], panel.control.means, means)
        self.memo: dict[tuple[str, int, int], float] = {}
        self.raw: list[Array] | None = None
        if entry.cells is not None and panel.control.cells is not None:
            self.raw = [panel.control.cells[0] if lost else c for c, lost in zip(entry.cells, self.failed, strict=True)]

    @property
    def cells(self) -> list[Array]:
        """Counts or values of the cells, as given."""
        if self.raw is None:
            raise DataError("predicted means without cells were given to a metric of cells; give an Entry with cells")
        return self.raw

    @cached_property
    def bulk(self) -> Bulk:
        return bulk_lognorm(self.cells)

    @cached_property
    def table(self) -> DETable:
        """Of genes with more than 5 counts per million in the control."""
        return wilcoxon_de(self.cells, _control(self.panel))

    @cached_property
    def full_table(self) -> DETable:
        """Of all genes."""
        return wilcoxon_de(self.cells, _control(self.panel), min_control=-1.0)

    @cached_property
    def space(self) -> list[Array]:
        """The cells where distances are taken."""
        return [project(x, self.panel) for x in self.cells]

    def permuted(self, order: NDArray[np.int64]) -> Side:
        """The same predictions under other labels: row i is row ``order[i]``."""
        out = object.__new__(Side)
        out.panel, out.memo, out.order, out.failed = self.panel, self.memo, self.order[order], self.failed[order]
        out.means = self.means[order]
        out.raw = None if self.raw is None else [self.raw[i] for i in order]
        for name, value in self.__dict__.items():
            if isinstance(value, Bulk):
                out.__dict__[name] = Bulk(value.value[order], value.noise[order])
            elif isinstance(value, DETable):
                out.__dict__[name] = DETable(value.lfc[order], value.p_value[order], value.p_adjusted[order])
            elif name == "space":
                out.__dict__[name] = [value[i] for i in order]
        return out


def interpolated_duplicate(duplicate: ArrayLike, mean: ArrayLike, p_adjusted: ArrayLike) -> Array:
    """``a x_dup + (1 - a) x_mean`` with ``a = 1 - p_adjusted``, gene by gene, [P, n_genes]; where the test has no answer, the mean.

    ``duplicate``: means of other cells of the same perturbation; ``p_adjusted``: of those cells against all other perturbed cells;
    ``mean``: of the other perturbations. A duplicate that keeps quiet where it has nothing to say: the positive control that a metric of
    means should put far above the mean. Source: Miller et al. 2025.
    """
    a = np.nan_to_num(1 - np.asarray(p_adjusted, dtype=float), nan=0.0)
    return a * np.asarray(duplicate, dtype=float) + (1 - a) * np.asarray(mean, dtype=float)


def make_panel(test: PerturbationData, train: PerturbationData, n_components: int | None = 50, min_cells: int = 10, seed: int = 0) -> Panel:
    """A panel of the perturbations of ``test`` that have at least ``min_cells`` cells: one random half is the truth, the other the
    replicate.

    Args:
        test: held-out cells. Control cells are taken from it if it has ``min_cells`` of them, else from ``train``.
        train: training cells: for the perturbed mean, the baseline, and the space of the distances. With ``test`` it has all genes in
            common.
        n_components: principal components of the training cells as that space; None: all genes.

    Everything is held dense in memory, [n_cells, n_genes] of 8 bytes.

    Raises:
        DataError: without perturbations of enough cells, without control cells, or if the genes differ.
    """
    if list(test.genes) != list(train.genes) or test.kind != train.kind:
        given = f"screens of {len(test.genes)} genes ({test.kind}) and {len(train.genes)} ({train.kind})"
        raise DataError(f"{given} were given; give the same genes and kind of data")
    rng = np.random.default_rng(seed)
    counts, separator = test.kind == "counts", test.separator
    groups = {str(c): np.flatnonzero(test.labels == c) for c in test.conditions if c != test.control}
    groups = {c: rng.permutation(rows) for c, rows in groups.items() if len(rows) >= max(min_cells, 2)}
    source = test if test.is_control.sum() >= min_cells else train
    pool = [str(c) for c in train.conditions if c != train.control]
    if not groups or not source.is_control.any() or not pool:
        given = f"{len(groups)} perturbations of {min_cells} cells or more, {int(source.is_control.sum())} control cells"
        raise DataError(f"{given} and {len(pool)} training perturbations were given; a panel needs some of each, so split otherwise")
    control = dense(source.x[source.is_control])
    halves = [{c: dense(test.x[np.sort(rows[side::2])]) for c, rows in groups.items()} for side in (0, 1)]
    training = {c: dense(train.x[np.asarray(train.labels == c)]) for c in pool}
    reference = np.mean([normalised(x, counts).mean(0) for x in training.values()], axis=0)
    true, replicate = (_entry(list(half.values()), counts) for half in halves)
    everything = np.concatenate(list(training.values()))
    drawn = [everything[rng.choice(len(everything), len(x), replace=len(x) > len(everything))] for x in halves[0].values()]
    tests = [_rest_test(half, training, counts) for half in halves]
    loadings = None
    if n_components is not None:
        sample = normalised(np.concatenate([everything, control]), counts)
        loadings = np.linalg.eigh(np.cov(sample.T))[1][:, ::-1][:, :n_components]
    own = np.stack([np.isin(np.asarray(test.genes, dtype=str), c.split(separator)) for c in groups])
    positive = interpolated_duplicate(replicate.means, reference, adjust(tests[1][1]))
    return Panel(
        names=tuple(groups),
        genes=tuple(map(str, test.genes)),
        true=true,
        replicate=replicate,
        baseline=Entry(np.repeat(reference[None], len(groups), axis=0), tuple(drawn)),
        control=_entry([control], counts),
        reference=reference,
        own=own,
        score=tests[0][0],
        positive=Entry(positive, replicate.cells),
        counts=counts,
        loadings=loadings,
    )


def normalised(cells: Any, counts: bool) -> Array:
    """``log1p(1e4 x / sum x)`` of counts, [n_cells, n_genes]; other values as they are."""
    x = dense(cells)
    if not counts:
        return x
    library = x.sum(1, keepdims=True)
    return np.log1p(CP * x / np.where(library > 0, library, 1.0))


def project(cells: Array, panel: Panel) -> Array:
    """Cells in the space of the panel's distances, [n_cells, d]."""
    x = normalised(cells, panel.counts)
    return x if panel.loadings is None else (x - panel.control.means) @ panel.loadings


def _entry(cells: Sequence[Array], counts: bool) -> Entry:
    return Entry(np.stack([normalised(x, counts).mean(0) for x in cells]), tuple(cells))


def _control(panel: Panel) -> Array:
    if panel.control.cells is None:
        raise DataError("a panel without control cells was given to a metric of cells; give control=Entry(means, cells)")
    return panel.control.cells[0]


def _rest_test(half: dict[str, Array], training: dict[str, Array], counts: bool) -> tuple[Array, Array]:
    """Welch's t and p-value, [P, n_genes] each, of the cells of each perturbation against the perturbed cells of all others."""

    def moments(x: Array) -> Array:
        y = normalised(x, counts)
        return np.stack([np.full(y.shape[1], len(y)), y.sum(0), (y**2).sum(0)])

    each = {c: moments(x) for c, x in half.items()}
    rest = {c: moments(x) for c, x in training.items()}
    whole = sum(rest.values()) + sum(v for c, v in each.items() if c not in rest)
    t, p = [], []
    for name, mine in each.items():
        n, m = mine, whole - rest.get(name, mine)
        sides = [(s[1] / s[0], np.sqrt(np.maximum(s[2] - s[1] ** 2 / s[0], 0) / np.maximum(s[0] - 1, 1)), s[0]) for s in (n, m)]
        with np.errstate(divide="ignore", invalid="ignore"):
            found = stats.ttest_ind_from_stats(*sides[0], *sides[1], equal_var=False)
        t.append(np.nan_to_num(found.statistic, nan=0.0, posinf=0.0, neginf=0.0))
        p.append(np.nan_to_num(found.pvalue, nan=1.0))
    return np.stack(t), np.stack(p)
