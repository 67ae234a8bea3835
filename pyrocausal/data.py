"""An AnnData screen as tensors: counts, treatments, covariates, and the names of everything.

``PerturbationData.from_anndata`` checks the screen and refuses what cannot be modelled; ``split`` and indexing give parts of it;
``batch`` turns cells into a :class:`~pyrocausal.loading.Batch`, the one argument of every model and guide.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from numpy.typing import NDArray

from pyrocausal.errors import DataError, nearest
from pyrocausal.loading import Batch, make_batch
from pyrocausal.reading import (
    codes_of,
    column,
    doses_of,
    expression,
    kind_of,
    labels_of,
    no_empty_rows,
    open_screen,
    parts_of,
    times_of,
    unique,
)
from pyrocausal.units import by_unit

Kind = Literal["counts", "normalised"]
Modality = Literal["perturbation", "knockout", "knockdown", "activation"]
SHARE = (int, float, np.floating)
Expression: TypeAlias = Any  # sp.csr_matrix | NDArray[np.float32], [n_cells, n_genes]


class Sizes(NamedTuple):
    """Arguments of a model's constructor: ``Model(*data.sizes)``."""

    n_genes: int
    n_perturbations: int


@dataclass(frozen=True)
class PerturbationData:
    """A perturbation screen, checked, with its names.

    Attributes:
        x: expression, [n_cells, n_genes] float32; CSR if the AnnData was sparse.
        dose: treatment, [n_cells, n_perturbations] float32 CSR; a zero row is an unperturbed cell, several non-zeros a combination.
        labels: perturbation label of each cell, [n_cells]; one spelling per treatment (parts in alphabetical order, without the control).
        library_size: total of each cell in ``x``, [n_cells] (ones for normalised data).
        kind: ``"counts"`` or ``"normalised"``.
        modality: what a treatment does: ``"knockout"``, ``"knockdown"``, ``"activation"``, or the neutral ``"perturbation"``.
        batch_codes: technical batch of each cell, [n_cells] int64 (zeros if the screen has one batch).
        time: measurement time of each cell, [n_cells] float32, or None.
        path: expression of units that were seen at several times, ``path_times`` [F]: [n_cells, F, n_genes], NaN at times at which a unit
            was not seen; a row of everything else is then a unit at its last time. None if each cell was seen once.
        course: treatment of units during the interval that leads to each time, [n_cells, F, n_perturbations]; None if it never changes.
    """

    x: Expression
    dose: sp.csr_matrix
    labels: NDArray[np.object_]
    library_size: NDArray[np.float32]
    cells: pd.Index
    genes: pd.Index
    perturbations: pd.Index
    control: str
    kind: Kind
    modality: Modality
    separator: str
    batch_codes: NDArray[np.int64]
    batches: pd.Index
    time: NDArray[np.float32] | None = None
    path: NDArray[np.float32] | None = None
    path_times: NDArray[np.float32] | None = None
    course: NDArray[np.float32] | None = None

    @classmethod
    def from_anndata(
        cls,
        adata: ad.AnnData | str | Path,
        perturbation_key: str = "perturbation",
        control: str = "control",
        layer: str | None = None,
        batch_key: str | None = None,
        time_key: str | None = None,
        unit_key: str | None = None,
        separator: str = "+",
        kind: Kind | None = None,
        modality: Modality = "perturbation",
    ) -> PerturbationData:
        """Read a screen from an AnnData object or an ``.h5ad`` file.

        Args:
            adata: the screen; sparse matrices stay sparse.
            perturbation_key: column of ``obs`` with the perturbation of each cell; combinations are ``A<separator>B``.
            control: label of unperturbed cells (it may also stand beside a perturbation, as in ``control+A``).
            layer: layer to read instead of ``X``.
            batch_key: column of ``obs`` with the technical batch.
            time_key: column of ``obs`` with the measurement time (numbers).
            unit_key: column of ``obs`` with the unit that a cell is of, if units were seen at several times, or cells of different times
                are paired; rows of the result are units.
            kind: ``"counts"`` or ``"normalised"``; recognised from the values if None.
            modality: the screen's own reading of a treatment; ``knockout(...)`` is refused on an activation screen.

        Raises:
            DataError: for whatever cannot be modelled: see the messages.
        """
        if modality not in get_args(Modality):
            raise DataError(f"modality={modality!r} was given{nearest(modality, get_args(Modality))}")
        adata = open_screen(adata)
        unique(adata.var_names, "gene names (var_names)", "call adata.var_names_make_unique()")
        unique(adata.obs_names, "cell names (obs_names)", "call adata.obs_names_make_unique()")
        x = expression(adata, layer)
        kind = kind_of(x, kind)
        library = np.asarray(x.sum(1), dtype=np.float32).ravel() if kind == "counts" else np.ones(x.shape[0], np.float32)
        no_empty_rows(x, kind)
        labels = labels_of(adata, perturbation_key, control)
        labels, perturbations, dose = doses_of(labels, control, separator)
        codes, batches = codes_of(adata, batch_key)
        data = cls(
            x=x,
            dose=dose,
            labels=labels,
            library_size=library,
            cells=pd.Index(adata.obs_names, name="cell"),
            genes=pd.Index(adata.var_names, name="gene"),
            perturbations=pd.Index(perturbations, name="perturbation"),
            control=control,
            kind=kind,
            modality=modality,
            separator=separator,
            batch_codes=codes,
            batches=batches,
            time=times_of(adata, time_key),
        )
        return data if unit_key is None else by_unit(data, column(adata, unit_key, "unit").astype(str).to_numpy(dtype=object))

    def __len__(self) -> int:
        return len(self.cells)

    def __repr__(self) -> str:
        singles, combos = self.condition_counts()
        return (
            f"PerturbationData({len(self):,} cells x {len(self.genes):,} genes, {self.kind}; {int(self.is_control.sum()):,} control cells, "
            f"{singles} single perturbations, {combos} combinations, {len(self.batches)} batch{'es' if len(self.batches) != 1 else ''})"
        )

    @property
    def sizes(self) -> Sizes:
        return Sizes(len(self.genes), len(self.perturbations))

    @property
    def is_control(self) -> NDArray[np.bool_]:
        """Unperturbed cells, [n_cells]."""
        return np.diff(self.dose.indptr) == 0

    @property
    def cells_per_perturbation(self) -> NDArray[np.int64]:
        """Cells that got each perturbation, alone or in a combination, [n_perturbations]."""
        return np.bincount(self.dose.indices, minlength=len(self.perturbations)).astype(np.int64)

    @property
    def conditions(self) -> list[str]:
        """Labels present among the cells, the control first, then singles and combinations in alphabetical order."""
        present = sorted(set(self.labels) - {self.control}, key=lambda c: (self.separator in c, c))
        return ([self.control] if self.is_control.any() else []) + present

    @property
    def complete(self) -> bool:
        """Whether each unit was seen at all times and has one treatment (so it is of cells that were seen once)."""
        return self.path is None or (self.course is None and not bool(np.isnan(self.path[..., 0]).any()))

    def combination_cells(self) -> dict[tuple[int, ...], NDArray[np.int64]]:
        """Rows of the cells of each combination, by the columns of its perturbations in increasing order."""
        several = np.flatnonzero(np.diff(self.dose.indptr) > 1)
        _, first, code = np.unique(self.labels[several].astype(str), return_index=True, return_inverse=True)
        starts = self.dose.indptr[several[first]], self.dose.indptr[several[first] + 1]
        parts = [tuple(sorted(self.dose.indices[low:high].tolist())) for low, high in zip(*starts, strict=True)]
        return {parts[k]: several[code == k] for k in sorted(range(len(parts)), key=lambda k: parts[k])}

    def condition_counts(self) -> tuple[int, int]:
        """Numbers of distinct single perturbations and of distinct combinations among the cells."""
        size = np.diff(self.dose.indptr)
        return len(set(self.labels[size == 1])), len(set(self.labels[size > 1]))

    def dense(self, dtype: type = np.float32) -> NDArray[Any]:
        """All expression as one dense array [n_cells, n_genes]."""
        return np.asarray(self.x.toarray() if sp.issparse(self.x) else self.x, dtype=dtype)

    def log_normalised(self) -> PerturbationData:
        """The same screen with ``log1p(counts x median library / library)`` in place of counts, for models of normalised expression."""
        if self.kind != "counts":
            raise DataError("the data are normalised already; log_normalised() is for counts")
        factor = (np.median(self.library_size) / self.library_size).astype(np.float32)
        x = (sp.diags(factor) @ self.x).tocsr().log1p() if sp.issparse(self.x) else np.log1p(self.x * factor[:, None])
        path = None
        if self.path is not None:
            path = np.log1p(self.path * (np.median(self.library_size) / self.path.sum(-1, keepdims=True)))
        return replace(self, x=x.astype(np.float32), library_size=np.ones(len(self), np.float32), kind="normalised", path=path)

    # -- parts -----------------------------------------------------------------------------------------------------------------

    def __getitem__(self, index: slice | Sequence[int] | Sequence[str] | NDArray[Any]) -> PerturbationData:
        """Some of the cells: by slice, positions, boolean mask, or cell names. Perturbations and genes keep their codes."""
        rows = self._rows(index)
        if len(rows) == 0:
            raise DataError(f"the selection {_short(index)} holds no cell of the {len(self):,}; select at least one")
        return replace(
            self,
            x=self.x[rows],
            dose=self.dose[rows],
            labels=self.labels[rows],
            library_size=self.library_size[rows],
            cells=self.cells[rows],
            batch_codes=self.batch_codes[rows],
            time=None if self.time is None else self.time[rows],
            path=None if self.path is None else self.path[rows],
            course=None if self.course is None else self.course[rows],
        )

    def _rows(self, index: Any) -> NDArray[np.int64]:
        if isinstance(index, slice):
            return np.arange(len(self))[index]
        array = np.asarray(index)
        if array.ndim > 1:
            raise DataError(f"cells were selected by an array of shape {array.shape}; give positions, a mask or names in one dimension")
        if array.dtype == bool:
            if array.shape != (len(self),):
                raise DataError(f"a mask of shape {array.shape} was given for {len(self):,} cells; give one value for each cell")
            return np.flatnonzero(array)
        if array.size == 0:
            return np.empty(0, np.int64)
        if array.dtype.kind in "iu":
            rows = np.atleast_1d(array).astype(np.int64)
            outside = rows[(rows < -len(self)) | (rows >= len(self))]
            if outside.size:
                raise DataError(f"cell {outside[0]} was asked for, but there are {len(self):,}; positions run from 0 to {len(self) - 1:,}")
            return rows % len(self)
        names = np.atleast_1d(array)
        unknown = names[~pd.Index(names).isin(self.cells)]
        if unknown.size:
            raise DataError(f"no cell is named {str(unknown[0])!r}{nearest(unknown[0], self.cells[:2000])}")
        return self.cells.get_indexer_for(names).astype(np.int64)

    def select(self, *conditions: str) -> PerturbationData:
        """Cells of the given conditions, by label: ``data.select("STAT1", "control")``."""
        present = set(self.labels)
        for condition in conditions:
            if self._canonical(condition) not in present:
                raise DataError(f"no cell has the perturbation {condition!r}{nearest(condition, self.conditions)}")
        return self[np.isin(self.labels, [self._canonical(c) for c in conditions])]

    def split(
        self,
        by: Literal["cells", "perturbations", "combinations"] = "cells",
        test: float | str | Sequence[str] = 0.2,
        seed: int = 0,
    ) -> tuple[PerturbationData, PerturbationData]:
        """Training and test cells.

        Args:
            by: ``"cells"`` splits within every condition; ``"perturbations"`` holds out perturbations with every combination they are
                in; ``"combinations"`` holds out combinations and keeps all singles.
            test: the share to hold out, or the labels to hold out (not for ``by="cells"``).
            seed: of the random choice.

        Returns:
            ``(train, test)``; control cells are only ever in both for ``by="cells"``, otherwise all of them are in ``train``.
        """
        rng = np.random.default_rng(seed)
        if by == "cells":
            if not isinstance(test, SHARE) or not 0 < test < 1:
                raise DataError(f"test={_short(test)} was given for a split by cells; give a share between 0 and 1")
            held = np.zeros(len(self), bool)
            for condition in self.conditions:
                members = np.flatnonzero(self.labels == condition)
                held[rng.permutation(members)[: round(test * len(members))]] = True
        elif by in ("perturbations", "combinations"):
            held = self._held_conditions(by, test, rng)
        else:
            raise DataError(f"by={by!r} is no way to split; choose 'cells', 'perturbations' or 'combinations'")
        if not held.any() or held.all():
            raise DataError(
                f"a split by {by} with test={_short(test)} leaves no {'training' if held.all() else 'test'} cells; change the share"
            )
        return self[~held], self[held]

    def _held_conditions(self, by: str, test: float | str | Sequence[str], rng: np.random.Generator) -> NDArray[np.bool_]:
        size = np.diff(self.dose.indptr)
        combos = by == "combinations"
        pool = sorted(set(self.labels[size > 1])) if combos else sorted(self.perturbations[self.cells_per_perturbation > 0])
        if not pool:
            raise DataError(f"the screen has no {by} to hold out; its conditions are {', '.join(self.conditions[:5])}")
        if isinstance(test, SHARE):
            if not 0 < test < 1:
                raise DataError(f"test={test!r} was given; give a share between 0 and 1, or the labels to hold out")
            chosen = list(rng.permutation(pool)[: max(1, round(test * len(pool)))])
        else:
            chosen = [self._canonical(c) for c in ([test] if isinstance(test, str) else test)]
            for label in chosen:
                if label not in pool:
                    raise DataError(f"{label!r} is none of the {by} of the screen{nearest(label, pool)}")
        if combos:
            return np.isin(self.labels, chosen)
        columns = self.perturbations.get_indexer(chosen)
        return np.asarray(self.dose[:, columns].sum(1)).ravel() > 0

    def _canonical(self, label: str) -> str:
        """The one spelling of a treatment, whatever the order of its parts."""
        return self.separator.join(parts_of(label, self.control, self.separator)) or self.control

    # -- tensors ---------------------------------------------------------------------------------------------------------------

    def batch(
        self,
        index: slice | Sequence[int] | NDArray[Any] | None = None,
        n_total: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Batch:
        """Cells as tensors, the argument of models and guides.

        Args:
            index: positions of the cells; all of them if None.
            n_total: size of the population that the cells stand for (the scale of ``batch.cells()``); all cells of this object if None.
        """
        rows = np.arange(len(self)) if index is None else self._rows(index)
        if len(rows) == 0:
            raise DataError("an empty batch was asked for; give the position of at least one cell")
        return make_batch(self, rows, len(self) if n_total is None else n_total, dtype, device)


def _short(index: Any) -> str:
    text = repr(index).replace("\n", " ")
    return text if len(text) < 60 else text[:57] + "..."
