"""Columns and matrices of an AnnData screen, checked: whatever cannot be modelled is refused here, in one sentence."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
from numpy.typing import NDArray

from pyrocausal.errors import DataError, nearest

if TYPE_CHECKING:
    from pyrocausal.data import Expression, Kind


def open_screen(adata: ad.AnnData | str | Path) -> ad.AnnData:
    if isinstance(adata, str | Path):
        path = Path(adata)
        if not path.is_file():
            raise DataError(f"there is no file {str(path)!r}; give the path of an .h5ad file")
        try:
            adata = ad.read_h5ad(path)
        except Exception as error:  # anndata and h5py raise many kinds for a file that is not what it says
            raise DataError(f"{path.name!r} cannot be read as .h5ad ({type(error).__name__}); write it with adata.write_h5ad") from error
    if not isinstance(adata, ad.AnnData):
        raise DataError(f"a {type(adata).__name__} was given; give an AnnData object or the path of an .h5ad file")
    if adata.n_obs == 0 or adata.n_vars == 0:
        raise DataError(f"the screen has {adata.n_obs} cells and {adata.n_vars} genes; it needs at least one of each")
    return adata


def unique(names: pd.Index, what: str, mend: str) -> None:
    if not names.is_unique:
        raise DataError(f"{what} are not unique ({names[names.duplicated()][0]!r} occurs more than once); {mend}")


def expression(adata: ad.AnnData, layer: str | None) -> Expression:
    if layer is not None and layer not in adata.layers:
        raise DataError(f"there is no layer {layer!r}{nearest(layer, adata.layers.keys())}")
    where = "X" if layer is None else f"layers[{layer!r}]"
    given = adata.X if layer is None else adata.layers[layer]
    if given is None:
        raise DataError(f"{where} is empty; name the layer that holds the expression with layer=")
    x: Any = sp.csr_matrix(given) if sp.issparse(given) else np.asarray(given)
    if x.dtype.kind not in "iufb":
        raise DataError(f"{where} has dtype {x.dtype}; convert it to numbers, for example adata.X = adata.X.astype('float32')")
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is refused below
        x = x.astype(np.float32)
    values = x.data if sp.issparse(x) else x
    if not np.isfinite(values).all():
        raise DataError(f"{where} holds {int((~np.isfinite(values)).sum())} NaN or infinite values; replace or remove them")
    if sp.issparse(x):
        x.sum_duplicates()
        x.eliminate_zeros()
    return x


def kind_of(x: Expression, kind: Kind | None) -> Kind:
    values = x.data if sp.issparse(x) else x
    integral = bool((values == np.rint(values)).all())
    negative = int((values < 0).sum())
    if kind is None:
        return "counts" if integral and not negative else "normalised"
    if kind not in ("counts", "normalised"):
        raise DataError(f"kind={kind!r} was given; it is 'counts' or 'normalised'")
    if kind == "counts" and negative:
        raise DataError(f"kind='counts' was given, but {negative} values are negative; give raw counts, or kind='normalised'")
    if kind == "counts" and not integral:
        raise DataError("kind='counts' was given, but the values are not integers; name the layer with raw counts, or kind='normalised'")
    return kind


def no_empty_rows(x: Expression, kind: Kind) -> None:
    filled = np.abs(x)
    cells, genes = np.asarray(filled.sum(1)).ravel() == 0, np.asarray(filled.sum(0)).ravel() == 0
    if kind == "counts" and cells.any():
        raise DataError(f"{int(cells.sum())} cells have no counts at all; remove them, adata[adata.X.sum(1) > 0]")
    if genes.any():
        raise DataError(f"{int(genes.sum())} genes are zero in every cell; remove them, adata[:, adata.X.sum(0) > 0]")


def column(adata: ad.AnnData, key: str, what: str) -> pd.Series:
    if key not in adata.obs:
        raise DataError(f"obs has no column {key!r} for the {what}{nearest(key, adata.obs.columns)}")
    values = adata.obs[key]
    if values.isna().any():
        raise DataError(f"obs[{key!r}] is missing for {int(values.isna().sum())} cells; fill it in or remove those cells")
    return values


def labels_of(adata: ad.AnnData, key: str, control: str) -> NDArray[np.object_]:
    labels = column(adata, key, "perturbation").astype(str).to_numpy(dtype=object)
    if control not in set(labels):
        common = pd.Series(labels).value_counts().index[:3]
        raise DataError(
            f"no cell of obs[{key!r}] is labelled {control!r}; name the control with control=, the commonest labels are {list(common)}"
        )
    if set(labels) == {control}:
        raise DataError(f"all cells of obs[{key!r}] are {control!r}; a screen needs at least one perturbation")
    return labels


def parts_of(label: str, control: str, separator: str) -> list[str]:
    return [] if label == control else sorted(p for p in label.split(separator) if p != control)


def doses_of(labels: NDArray[np.object_], control: str, separator: str) -> tuple[NDArray[np.object_], list[str], sp.csr_matrix]:
    """Labels in one spelling, the names of the perturbations, and the treatment of each cell."""
    if not separator:
        raise DataError("separator='' was given; give the string between the parts of a combination, for example '+'")
    pieces = {label: parts_of(label, control, separator) for label in sorted(set(labels))}
    for label, parts in pieces.items():
        if "" in parts or len(set(parts)) < len(parts):
            raise DataError(
                f"the label {label!r} has an empty or repeated part at the separator {separator!r}; rename it or set separator="
            )
    names = sorted({p for parts in pieces.values() for p in parts})
    if not names:
        raise DataError(f"all labels name {control!r} alone; a screen needs at least one perturbation")
    code = {name: i for i, name in enumerate(names)}
    columns = [[code[p] for p in pieces[label]] for label in labels]
    spelled = {label: separator.join(parts) or control for label, parts in pieces.items()}
    indptr = np.concatenate([[0], np.cumsum([len(c) for c in columns])])
    indices = np.array([i for c in columns for i in c], dtype=np.int32)
    dose = sp.csr_matrix((np.ones(len(indices), np.float32), indices, indptr), shape=(len(labels), len(names)))
    return np.array([spelled[label] for label in labels], dtype=object), names, dose


def codes_of(adata: ad.AnnData, key: str | None) -> tuple[NDArray[np.int64], pd.Index]:
    if key is None:
        return np.zeros(adata.n_obs, np.int64), pd.Index(["all"], name="batch")
    values = column(adata, key, "batch").astype(str)
    codes, names = pd.factorize(values, sort=True)
    return codes.astype(np.int64), pd.Index(names, name="batch")


def times_of(adata: ad.AnnData, key: str | None) -> NDArray[np.float32] | None:
    if key is None:
        return None
    values = pd.to_numeric(column(adata, key, "time").astype(str), errors="coerce")
    if not np.isfinite(values).all():
        raise DataError(f"obs[{key!r}] holds times that are not numbers; give them in one unit, for example hours")
    return values.to_numpy(np.float32)
