"""A vector for every perturbation, also for those that no cell received, so that a model can predict them.

:func:`control_pca` reads co-expression off the unperturbed cells, :func:`from_gene_sets` and :func:`from_pairs` prior knowledge,
:func:`from_table` what the user has; all give a table (perturbation x component), float64, looked up by the name of the perturbed gene.
:func:`combine` puts tables side by side on one scale, :func:`nearest_embedding_effects` is the baseline that any use of them has to beat.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import pandas as pd
import scipy.sparse as sp
import xarray as xr
from numpy.typing import NDArray
from scipy.sparse.csgraph import connected_components
from scipy.sparse.linalg import LinearOperator, eigsh, svds

from pyrocausal.data import PerturbationData
from pyrocausal.errors import DataError, nearest
from pyrocausal.evaluate import measured_effects

Array = NDArray[np.float64]
Names: TypeAlias = Iterable[str]
Missing = Literal["refuse", "mean"]
GeneOf: TypeAlias = Mapping[str, str] | Callable[[str], str] | None
DENSE = 400  # matrices whose shorter side is at most this are decomposed whole, larger ones for their leading part only
UNREADABLE = (ValueError, OSError, EOFError, zlib.error)  # pandas' own errors are ValueErrors


def control_pca(
    data: PerturbationData, perturbations: Names | None = None, n_components: int = 50, missing: Missing = "refuse", gene_of: GeneOf = None
) -> pd.DataFrame:
    """Principal component scores of the perturbed genes, with genes as samples and control cells as features, [perturbation, component].

    ``Y = log1p(x_gc m / l_c)`` [genes, control cells] with library sizes ``l`` and their median ``m`` over the control cells (normalised
    data as they are), ``Y - 1/G sum_g Y_g = U S V'``, and a perturbation has the row of its gene in the first columns of ``U S``; the
    largest entry of each is positive. Only control cells are read: cells of held-out perturbations cannot leak in.

    Args:
        perturbations: names, known to the screen or not; all of the screen if None.
        n_components: below the numbers of genes and of control cells.
        missing: for a perturbation that names no gene of the data, ``"refuse"``, or ``"mean"`` for the mean of all genes, which is zero.
        gene_of: gene of a perturbation, a mapping (names that it lacks stand for themselves) or a function; for names like ``HS2_enh``.

    Raises DataError: no control cell, too many components, a perturbation without gene. Source: Liu, Zhang and Uhler 2026 (SCCVAE), whose
    code looks genes up by position. Cannot see: what a gene does beyond co-variation in unperturbed cells.
    """
    if not data.is_control.any():
        raise DataError("the data have no control cell, and their principal components are asked for; give the training part of the screen")
    control = data[data.is_control]
    y = sp.csc_matrix(control.x.T, dtype=np.float64)
    if data.kind == "counts":
        library = control.library_size.astype(np.float64)
        y = (y @ sp.diags(np.median(library) / library)).log1p().tocsc()
    scores = _scores(y, n_components, "the control cells", centred=True)
    names = data.perturbations if perturbations is None else perturbations
    return _look_up(names, gene_of, data.genes, scores, missing, "control_pca", "the data")


def from_gene_sets(
    gmt_path: str | Path, names: Names, n_components: int = 50, missing: Missing = "refuse", gene_of: GeneOf = None
) -> pd.DataFrame:
    """Genes by the sets they belong to (gene ontology, hallmarks, pathways), [perturbation, component].

    ``M_gs = log(1 + N / |s|)`` where gene g is in set s, 0 elsewhere, over the N genes in any set of 3 to 500 genes; rows scaled to length
    1; ``M = U S V'``, scores ``U S``. Cosines of full rank are those of the weighted memberships (tf-idf).
    Names, ``missing`` and ``gene_of`` are as in :func:`control_pca`; ``"mean"`` is that of all N genes.
    Raises DataError: not a gene set file, too many components, a perturbation without gene. Cannot see: genes that nobody has studied.
    """
    sets = {name: genes for name, genes in read_gmt(gmt_path).items() if 3 <= len(genes) <= 500}
    if not sets:
        raise DataError(f"{Path(gmt_path).name!r} has no gene set of 3 to 500 genes; give another collection")
    sizes = np.array([len(genes) for genes in sets.values()])
    codes, genes = pd.factorize(np.concatenate([np.asarray(g, dtype=object) for g in sets.values()]), sort=True)
    weight = np.repeat(np.log1p(len(genes) / sizes), sizes)
    m = sp.csr_matrix((weight, (codes, np.repeat(np.arange(len(sets)), sizes))))
    m = sp.diags(1 / np.sqrt(np.asarray(m.multiply(m).sum(1)).ravel())) @ m
    scores = _scores(m.tocsc(), n_components, Path(gmt_path).name, centred=False)
    return _look_up(names, gene_of, pd.Index(genes), scores, missing, "gene_sets", f"the sets of {Path(gmt_path).name}")


def from_pairs(
    path: str | Path | pd.DataFrame,
    names: Names,
    n_components: int = 50,
    missing: Missing = "refuse",
    gene_of: GeneOf = None,
    columns: tuple[str, str] = ("entity1", "entity2"),
) -> pd.DataFrame:
    """Spectral embedding of a graph of protein pairs (STRING, SIGNOR), [perturbation, component].

    With the symmetric 0/1 adjacency A of the largest connected component and degrees d, ``(D + I)^-1/2 A (D + I)^-1/2 = V diag(w) V'``;
    scores ``v_k w_k`` for the largest w. The identity keeps genes with few partners from filling whole eigenvectors (without it the
    median eigenvector of SIGNOR lives on 7 of its 4,317 genes). Direction and sign of a pair are not used, repeated pairs count once.
    A path is of a ``.csv`` or ``.tsv`` (also ``.gz``) with a header; ``columns`` are those of the two partners; the rest is as in
    :func:`control_pca`, and genes outside the largest component are missing.
    Raises DataError: no such columns, no pair, too many components, a perturbation without gene. Source: regularised as in Chaudhuri,
    Chung and Tsiatas, COLT 2012. Cannot see: genes without a recorded partner, cell types.
    """
    table = path if isinstance(path, pd.DataFrame) else _read(path)
    what = "the table" if isinstance(path, pd.DataFrame) else Path(path).name
    for column in columns:
        if column not in table:
            raise DataError(f"{what} has no column {column!r} of partners; name the two with columns={nearest(column, table.columns)}")
    pairs = table[list(columns)].dropna().astype(str).to_numpy()
    pairs = pairs[pairs[:, 0] != pairs[:, 1]]
    if len(pairs) == 0:
        raise DataError(f"{what} holds no pair of two different genes; give a table with a pair in each row")
    genes, codes = np.unique(pairs, return_inverse=True)
    a, b = codes.reshape(-1, 2).T
    graph = sp.csr_matrix((np.ones(2 * len(a)), (np.r_[a, b], np.r_[b, a])), shape=(len(genes),) * 2)
    component = connected_components(graph, directed=False)[1]
    kept = np.flatnonzero(component == np.bincount(component).argmax())
    graph = (graph[kept][:, kept] > 0).astype(np.float64)
    _components(n_components, len(kept) - 1, what)
    scale = sp.diags(1 / np.sqrt(np.asarray(graph.sum(1)).ravel() + 1))
    values, vectors = eigsh(scale @ graph @ scale, n_components, which="LA", v0=np.random.default_rng(0).standard_normal(len(kept)))
    if values.min() <= 0:
        raise DataError(
            f"n_components={n_components} was given for {what}, which has only {int((values > 0).sum())} to give; ask for those"
        )
    scores = (_signed(vectors) * values)[:, np.argsort(-values)]
    return _look_up(names, gene_of, pd.Index(genes[kept]), scores, missing, "pairs", f"the largest component of {what}")


def from_table(table: pd.DataFrame | str | Path, names: Names) -> pd.DataFrame:
    """A table of one's own, its rows in the order of ``names``, checked, [perturbation, column].

    It has perturbations in the index and numbers in the columns; of a ``.csv``/``.tsv`` file, the names are the first column.
    Raises DataError: repeated or missing names, columns that are not numbers, NaN or infinite values among the rows asked for.
    """
    table = table if isinstance(table, pd.DataFrame) else _read(table, index_col=0)
    index, names = pd.Index(table.index.astype(str)), _unique(names)
    if not index.is_unique:
        raise DataError(f"the table has several rows for {index[index.duplicated()][0]!r}; keep one row for each perturbation")
    words = [str(c) for c, kind in table.dtypes.items() if kind.kind not in "iufb"]
    if words or table.shape[1] == 0:
        raise DataError(f"the table has {f'words in column {words[0]!r}' if words else 'no column'}; give columns of numbers only")
    table = pd.DataFrame(table.to_numpy(np.float64), index, table.columns.astype(str))
    if absent := [n for n in names if n not in table.index]:
        raise DataError(f"the table lacks {len(absent)} of {len(names)} names, first {absent[0]!r}; add them{nearest(absent[0], index)}")
    table = table.loc[names].rename_axis("perturbation")
    if (bad := ~np.isfinite(table.to_numpy()).all(1)).any():
        raise DataError(f"{int(bad.sum())} rows of the table hold NaN or infinite values, the first {table.index[bad][0]!r}; fill them in")
    return table


def combine(*tables: pd.DataFrame, weights: Sequence[float] | None = None) -> pd.DataFrame:
    """Tables side by side: ``[w_1 T_1 / s_1, w_2 T_2 / s_2, ...]`` with ``s_k^2 = 1/P sum_p |T_k,p|^2``, rows in the order of the first.

    A single table is just scaled to unit mean squared norm. Columns that two tables share are told apart by the table's number.
    Raises DataError: no table, other perturbations, a table of zeros, a weight that is not positive.
    """
    weights = [1.0] * len(tables) if weights is None else list(weights)
    if not tables or len(weights) != len(tables) or not all(np.isfinite(w) and w > 0 for w in weights):
        raise DataError(f"{len(tables)} tables and the weights {weights} were given; give a positive weight for each of at least one table")
    blocks = []
    for k, (given, weight) in enumerate(zip(tables, weights, strict=True)):
        table = from_table(given, tables[0].index)
        if len(given) != len(table):
            raise DataError(f"table {k} has {len(given)} perturbations and the first {len(table)}; select the same of both")
        scale = float(np.sqrt((table**2).sum(axis=1).mean()))
        if scale == 0:
            raise DataError(f"table {k} is zero for every perturbation and cannot be scaled; leave it out")
        blocks.append(table * (weight / scale))
    if not pd.Index([c for block in blocks for c in block]).is_unique:
        blocks = [block.add_prefix(f"{k}: ") for k, block in enumerate(blocks)]
    return pd.concat(blocks, axis=1)


def nearest_perturbation(table: pd.DataFrame, of: Names, among: Names) -> pd.Series:
    """The name ``argmax_q cos(T_p, T_q)``, q in ``among``, for each p of ``of``; itself where it is among them, None for a zero vector.

    Raises DataError: names that the table lacks, candidates that are all zero.
    """
    targets, candidates = from_table(table, of), from_table(table, among)
    candidates = candidates[(candidates != 0).any(axis=1)]
    if candidates.empty:
        raise DataError("the vectors of all candidates are zero, and no direction is nearest; give perturbations that have an embedding")
    cosine = targets.to_numpy() @ (candidates.to_numpy() / np.linalg.norm(candidates, axis=1, keepdims=True)).T  # times |T_p|
    found = np.where(targets.index.isin(candidates.index), targets.index, candidates.index[cosine.argmax(1)]).astype(object)
    found[(targets == 0).all(axis=1)] = None
    return pd.Series(found, index=targets.index, name="nearest", dtype=object)


def nearest_embedding_effects(train: PerturbationData, table: pd.DataFrame, interventions: Sequence[str]) -> xr.Dataset:
    """The measured effect of the nearest single perturbation of the training cells, ``effect`` (intervention, gene).

    The form of :func:`~pyrocausal.evaluate.baseline_effects`, NaN where a vector is zero; the coordinate ``nearest`` says whose effects
    they are. Of a combination: the sum over its parts, each with its own nearest. A perturbation seen in training is its own nearest.
    Training perturbations that the table lacks are no candidates. Raises DataError: an asked one that it lacks, or no candidate at all.
    """
    measured = measured_effects(train)
    known = dict(zip(measured["intervention"].values.tolist(), measured["effect"].values, strict=True))
    candidates = [k for k in known if train.separator not in k and k in table.index]
    parts = [[p for p in label.split(train.separator) if p and p != train.control] for label in interventions]
    asked = sorted({p for label in parts for p in label})
    if asked and not candidates:
        raise DataError("no perturbation of the training cells is in the table; give one that has them")
    found = nearest_perturbation(table, asked, candidates).to_dict() if asked else {}
    unknown = np.full(len(measured["gene"]), np.nan)
    effect = np.zeros((len(interventions), len(unknown)))
    for row, label in zip(effect, parts, strict=True):
        row[:] = sum((known.get(found[p], unknown) for p in label), np.zeros(len(unknown)))
    whose = [train.separator.join(found[p] or "?" for p in label) or train.control for label in parts]
    coords = {"intervention": list(interventions), "gene": measured["gene"].values, "nearest": ("intervention", whose)}
    return xr.Dataset({"effect": (("intervention", "gene"), effect)}, coords=coords, attrs={**measured.attrs, "rung": "baseline nearest"})


def read_gmt(path: str | Path) -> dict[str, list[str]]:
    """Gene sets of a ``.gmt`` or ``.gmt.gz`` file (name, description, genes, tabs between), each gene once and in its order."""
    path = Path(path)
    try:
        raw = path.read_bytes()
        lines = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode().splitlines()
    except UNREADABLE as error:
        raise DataError(f"{str(path)!r} cannot be read ({type(error).__name__}); give the path of a .gmt or .gmt.gz file") from error
    sets: dict[str, list[str]] = {}
    for number, (name, *fields) in ((k, line.split("\t")) for k, line in enumerate(lines, 1) if line.strip()):
        if len(fields) < 2 or name in sets:
            fault = "repeats the set" if name in sets else "has no genes behind name and description for"
            raise DataError(f"line {number} of {path.name!r} {fault} {name[:40]!r}; give a .gmt file, one set in a line, tabs between")
        sets[name] = list(dict.fromkeys(g for g in fields[1:] if g))
    return sets


def genes_of(names: Names, gene_of: GeneOf = None) -> list[str]:
    """The gene of each perturbation, by a mapping (names that it lacks stand for themselves), a function, or as it is."""
    if gene_of is None:
        return [str(n) for n in names]
    return [str(gene_of.get(n, n) if isinstance(gene_of, Mapping) else gene_of(n)) for n in names]


# -- parts ---------------------------------------------------------------------------------------------------------------------


def _look_up(names: Names, gene_of: GeneOf, genes: pd.Index, scores: Array, missing: str, block: str, what: str) -> pd.DataFrame:
    """Rows of ``scores`` [genes, components] by the names of the perturbed genes."""
    names = _unique(names)
    wanted = genes_of(names, gene_of)
    rows = genes.get_indexer(wanted)
    absent = np.flatnonzero(rows < 0)
    if missing not in ("refuse", "mean"):
        raise DataError(f"missing={missing!r} was given; choose 'refuse' or 'mean'")
    if len(absent) and (missing == "refuse" or len(absent) == len(names)):
        mend = "translate them with gene_of=" + (", or choose missing='mean'" if len(absent) < len(names) else "")
        hint = nearest(wanted[absent[0]], genes)
        raise DataError(f"{len(absent)} of {len(names)} perturbations name no gene of {what}, first {names[absent[0]]!r}; {mend}{hint}")
    mean = scores.mean(0)
    mean[np.abs(mean) < 1e-9 * np.abs(scores).max(0)] = 0  # exactly zero after centring
    values = np.where((rows < 0)[:, None], mean, scores[rows])
    return pd.DataFrame(values, pd.Index(names, name="perturbation"), [f"{block} {k}" for k in range(scores.shape[1])])


def _unique(names: Names) -> list[str]:
    listed = pd.Index([names] if isinstance(names, str) else [str(n) for n in names])
    if len(listed) == 0 or not listed.is_unique:
        fault = f"{listed[listed.duplicated()][0]!r} twice" if len(listed) else "no name"
        raise DataError(f"the perturbations to embed hold {fault}; give every name once")
    return listed.tolist()


def _read(path: str | Path, **options: Any) -> pd.DataFrame:
    path = Path(path)
    tabs = any(s in (".tsv", ".txt") for s in path.suffixes[-2:])
    try:
        return pd.read_csv(path, sep="\t" if tabs else ",", **options)
    except UNREADABLE as error:
        kind = ".tsv" if tabs else ".csv"
        raise DataError(f"{str(path)!r} cannot be read ({type(error).__name__}); give the path of a {kind} or {kind}.gz file") from error


def _components(n: int, most: int, what: str) -> None:
    if not 1 <= n <= most:
        raise DataError(f"n_components={n} was given, but {what} can give 1 to {most}; ask for such a number")


def _scores(matrix: sp.csc_matrix, n: int, what: str, centred: bool) -> Array:
    """First n columns of ``U S``, of the matrix or of the matrix minus its column means, which are never subtracted in memory."""
    _components(n, min(matrix.shape) - 1, what)
    means = np.asarray(matrix.mean(0)).ravel() if centred else np.zeros(matrix.shape[1])
    if min(matrix.shape) <= DENSE:
        u, s, _ = np.linalg.svd(matrix.toarray() - means, full_matrices=False)
    else:
        there, back = (lambda v: matrix @ v - means @ v), (lambda v: matrix.T @ v - np.multiply.outer(means, v.sum(0)))
        operator = LinearOperator(matrix.shape, matvec=there, matmat=there, rmatvec=back, rmatmat=back, dtype=np.float64)
        u, s, _ = svds(operator, n, v0=np.random.default_rng(0).standard_normal(min(matrix.shape)), return_singular_vectors="u")
    order = np.argsort(-s)[:n]
    return _signed(u[:, order]) * s[order]


def _signed(vectors: Array) -> Array:
    """Columns turned so that the entry of largest size is positive."""
    return vectors * np.where(np.take_along_axis(vectors, np.abs(vectors).argmax(0)[None], 0) < 0, -1.0, 1.0)
