"""Screens: what is refused, and that what is read, split and batched is the AnnData's own content."""

import re

import anndata as ad
import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import scipy.sparse as sp
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import gammaln

import pyrocausal as pc
from pyrocausal import PerturbationData
from pyrocausal.errors import DataError
from pyrocausal.loading import batches

LABELS = ["control"] * 8 + ["A"] * 6 + ["B"] * 7 + ["C"] * 6 + ["A+B"] * 5 + ["A+C"] * 4 + ["B+C"] * 4
N, G = len(LABELS), 12


def counts(n=N, seed=0):
    x = np.random.default_rng(seed).poisson(0.3, (n, G)).astype(np.float32)
    x[np.arange(n), np.arange(n) % G] += 1
    x[0] += 1
    return x


def screen(labels=LABELS, x=None, **obs):
    x = counts(len(labels)) if x is None else x
    obs = pd.DataFrame({"perturbation": list(labels), **obs}, index=[f"cell{i}" for i in range(len(labels))])
    return ad.AnnData(x, obs=obs, var=pd.DataFrame(index=[f"gene{j}" for j in range(x.shape[1])]))


def full_screen(sparse=True):
    x = sp.csr_matrix(counts()) if sparse else counts()
    return screen(x=x, lane=[f"lane{i % 3}" for i in range(N)], hours=[float(i % 4) for i in range(N)])


def read(labels=LABELS, x=None, **arguments):
    return PerturbationData.from_anndata(screen(labels, x), **arguments)


def read_full(adata):
    return PerturbationData.from_anndata(adata, batch_key="lane", time_key="hours")


def with_value(value, row=3, gene=5):
    x = counts()
    x[row, gene] = value
    return x


def changed(**attributes):
    adata = screen()
    for name, value in attributes.items():
        setattr(adata, name, value)
    return PerturbationData.from_anndata(adata)


def from_bytes(folder, name, content):
    path = folder / name
    path.write_bytes(content)
    return PerturbationData.from_anndata(path)


def truncated(folder):
    whole = folder / "whole.h5ad"
    screen().write_h5ad(whole)
    content = whole.read_bytes()
    return from_bytes(folder, "truncated.h5ad", content[: len(content) // 2])


def timed(times):
    return PerturbationData.from_anndata(screen(["control", "A", "A"], hours=times), time_key="hours")


def same(a, b):
    """Equal in everything."""
    assert sp.issparse(a.x) == sp.issparse(b.x)
    np.testing.assert_array_equal(a.dense(), b.dense())
    np.testing.assert_array_equal(a.dose.toarray(), b.dose.toarray())
    for name in ("labels", "library_size", "batch_codes", "cells", "genes", "perturbations", "batches", "time"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)
    assert (a.kind, a.control, a.modality, a.separator) == (b.kind, b.control, b.modality, b.separator)


# -- refusals ------------------------------------------------------------------------------------------------------------------

REFUSED = {
    # expression
    "nan": (lambda _: read(x=with_value(np.nan)), "X holds 1 NaN"),
    "nan, sparse": (lambda _: read(x=sp.csr_matrix(with_value(np.nan))), "X holds 1 NaN"),
    "infinite": (lambda _: read(x=with_value(-np.inf)), "X holds 1 NaN or infinite"),
    "too large for float32": (lambda _: read(x=counts().astype(np.float64) * 1e300), "infinite"),
    "negative counts": (lambda _: read(x=with_value(-1), kind="counts"), "1 values are negative"),
    "fractional counts": (lambda _: read(x=with_value(0.5), kind="counts"), "not integers"),
    "unknown kind": (lambda _: read(kind="raw"), "'raw'"),
    "objects": (lambda _: changed(X=counts().astype(object)), "X has dtype object"),
    "no X": (lambda _: changed(X=None), "X is empty"),
    "unknown layer": (lambda _: read(layer="cuonts"), "'cuonts'"),
    "no cells": (lambda _: PerturbationData.from_anndata(screen()[:0]), "0 cells"),
    "no genes": (lambda _: PerturbationData.from_anndata(screen()[:, :0]), "0 genes"),
    "cell without counts": (lambda _: read(x=counts() * (np.arange(N) != 4)[:, None]), "1 cells"),
    "gene without counts": (lambda _: read(x=sp.csr_matrix(counts() * (np.arange(G) != 4))), "1 genes"),
    # names and labels
    "unknown key": (lambda _: read(perturbation_key="perturbatoin"), "'perturbatoin' for the perturbation; did you mean 'perturbation'?"),
    "no control": (lambda _: read(control="ctrl"), "'ctrl'"),
    "only control": (lambda _: read(["control"] * 5), "all cells of obs['perturbation'] are 'control'"),
    "only control, combined": (lambda _: read(["control", "control+control", "control"]), "'control'"),
    "missing labels": (lambda _: read([*LABELS[:-2], np.nan, None]), "obs['perturbation'] is missing for 2 cells"),
    "repeated gene name": (lambda _: changed(var_names=["g0", "g0", *(f"g{i}" for i in range(2, G))]), "'g0'"),
    "repeated cell name": (lambda _: changed(obs_names=["c0", "c0", *(f"c{i}" for i in range(2, N))]), "'c0'"),
    "repeated part": (lambda _: read([*LABELS[:-1], "A+A"]), "'A+A'"),
    "empty part": (lambda _: read([*LABELS[:-1], "A+"]), "'A+'"),
    "empty label": (lambda _: read([*LABELS[:-1], ""]), "''"),
    "empty separator": (lambda _: read(separator=""), "separator=''"),
    "unknown modality": (lambda _: read(modality="knockuot"), "'knockuot'"),
    "unknown batch key": (lambda _: read(batch_key="lane"), "'lane' for the batch"),
    "unknown time key": (lambda _: read(time_key="hours"), "'hours' for the time"),
    "times in words": (lambda _: timed(["0", "1", "late"]), "obs['hours']"),
    "infinite time": (lambda _: timed([0.0, 1.0, np.inf]), "obs['hours']"),
    "missing time": (lambda _: timed([0.0, 1.0, np.nan]), "obs['hours'] is missing for 1 cells"),
    # files
    "not an AnnData": (lambda _: PerturbationData.from_anndata(counts()), "ndarray"),
    "no such file": (lambda tmp: PerturbationData.from_anndata(tmp / "nowhere.h5ad"), "nowhere.h5ad"),
    "a folder": (lambda tmp: PerturbationData.from_anndata(str(tmp)), "there is no file"),
    "text file": (lambda tmp: from_bytes(tmp, "text.h5ad", b"gene,count\n"), "'text.h5ad'"),
    "empty file": (lambda tmp: from_bytes(tmp, "empty.h5ad", b""), "'empty.h5ad'"),
    "truncated file": (truncated, "'truncated.h5ad'"),
    # parts
    "empty slice": (lambda _: read()[N:], "slice(40"),
    "empty list": (lambda _: read()[[]], "[]"),
    "empty mask": (lambda _: read()[np.zeros(N, bool)], "holds no cell"),
    "index too large": (lambda _: read()[[0, N]], "cell 40 "),
    "index too small": (lambda _: read()[[0, -N - 1]], "cell -41 "),
    "wrong-length mask": (lambda _: read()[np.ones(N + 1, bool)], "(41,)"),
    "table of indices": (lambda _: read()[np.zeros((2, 2), int)], "(2, 2)"),
    "unknown cell": (lambda _: read()[["cell1", "cell_9"]], "'cell_9'; did you mean 'cell9'"),
    "unknown condition": (lambda _: read().select("A", "A+b"), "'A+b'; did you mean"),
    "empty batch": (lambda _: read().batch([]), "empty batch"),
    "batch of unknown cells": (lambda _: read().batch([N]), "cell 40 "),
    "empty minibatches": (lambda _: list(batches(read(), 0)), "batch_size=0"),
    # splits
    "unknown split": (lambda _: read().split("genes"), "'genes'"),
    "share of all cells": (lambda _: read().split(test=1.0), "test=1.0"),
    "negative share": (lambda _: read().split("perturbations", test=-0.1), "test=-0.1"),
    "share that is too small": (lambda _: read().split(test=0.01), "test=0.01 leaves no test cells"),
    "labels for a split by cells": (lambda _: read().split(test=["A"]), "test=['A']"),
    "many labels for a split by cells": (lambda _: read().split(test=np.array(LABELS)), "test="),
    "unknown perturbation": (lambda _: read().split("perturbations", test=["A", "D"]), "'D'"),
    "one unknown perturbation": (lambda _: read().split("perturbations", test="AB"), "'AB'"),
    "combination as a perturbation": (lambda _: read().split("perturbations", test=["A+B"]), "'A+B'"),
    "single as a combination": (lambda _: read().split("combinations", test=["A"]), "'A'"),
    "unknown combination": (
        lambda _: read().split("combinations", test=["A+D"]),
        "'A+D' is none of the combinations of the screen; did you mean",
    ),
    "no combinations": (lambda _: read(["control", "A", "B"]).split("combinations"), "no combinations"),
}


@pytest.mark.filterwarnings("ignore:.*names are not unique:UserWarning")
@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_sentence(case, tmp_path):
    attempt, offender = REFUSED[case]
    with pytest.raises(DataError) as caught:
        attempt(tmp_path)
    message = str(caught.value)
    assert offender in message
    assert "\n" not in message
    assert not re.search(r"[.!?]\s+[A-Z]", message), "more than one sentence"


def test_refusal_of_a_layer_names_the_layer():
    adata = screen()
    adata.layers["logged"] = with_value(np.nan)
    with pytest.raises(DataError, match=re.escape("layers['logged'] holds 1 NaN")):
        PerturbationData.from_anndata(adata, layer="logged")


@pytest.mark.parametrize("form", [np.asarray, sp.csr_matrix])
def test_the_mend_that_a_refusal_names_works(form):
    x = counts()
    x[4], x[:, 3] = 0, 0
    adata = screen(x=form(x))
    for _ in range(2):
        with pytest.raises(DataError, match="remove them, ") as caught:
            PerturbationData.from_anndata(adata)
        adata = eval(str(caught.value).split("remove them, ")[1], {"adata": adata})
    np.testing.assert_array_equal(PerturbationData.from_anndata(adata).dense(), np.delete(np.delete(x, 4, 0), 3, 1))


# -- reading -------------------------------------------------------------------------------------------------------------------

parts = st.sets(st.sampled_from(["A", "B", "C10", "D-1"]), max_size=3)


@settings(max_examples=40, deadline=None)
@given(st.lists(parts, min_size=1, max_size=12), st.booleans())
def test_dose_is_the_labels(treatments, spelled_out):
    joined = ["+".join([*(["control"] if spelled_out else []), *sorted(p)]) or "control" for p in treatments]
    data = read([*joined, "control", "A"])
    treatments = [*treatments, set(), {"A"}]
    names = sorted(set().union(*treatments))
    assert data.perturbations.tolist() == names
    assert data.sizes == (G, len(names))
    expected = np.array([[name in treatment for name in names] for treatment in treatments], dtype=np.float32)
    np.testing.assert_array_equal(data.dose.toarray(), expected)
    assert data.is_control.tolist() == [not t for t in treatments]
    assert data.cells_per_perturbation.tolist() == expected.sum(0).tolist()
    assert data.condition_counts() == tuple(
        len({frozenset(t) for t in treatments if ok(len(t))}) for ok in (lambda n: n == 1, lambda n: n > 1)
    )


def test_conditions_in_order():
    assert read(LABELS[::-1]).conditions == ["control", "A", "B", "C", "A+B", "A+C", "B+C"]


def test_one_treatment_has_one_label():
    data = read(["control", "control+control", "A", "control+A", "A+control", "A+B", "B+A"])
    assert data.condition_counts() == (1, 1)
    assert data.conditions == ["control", "A", "A+B"]
    assert len(data.select("A")) == 3


def test_own_control_and_separator():
    data = read(["NT", "A_1", "A_1&B+2", "NT&B+2"], control="NT", separator="&")
    assert data.perturbations.tolist() == ["A_1", "B+2"]
    assert data.dose.toarray().tolist() == [[0, 0], [1, 0], [1, 1], [0, 1]]


@pytest.mark.parametrize("sparse", [True, False])
def test_values_and_library_sizes(sparse):
    x = counts()
    data = read(x=sp.csc_matrix(x) if sparse else x)
    assert sp.issparse(data.x) == sparse
    assert data.kind == "counts"
    np.testing.assert_array_equal(data.dense(), x)
    np.testing.assert_array_equal(data.library_size, [sum(float(v) for v in row) for row in x])


@pytest.mark.parametrize("value", [-1, 0.5])
def test_other_values_are_normalised(value):
    x = with_value(value)
    x[2] = 0  # a cell may be zero everywhere unless it was counted
    x[:, 7] = 0
    x[[0, 1], 7] = 1, -1  # a gene may cancel
    data = read(x=x)
    assert data.kind == "normalised"
    np.testing.assert_array_equal(data.dense(), x)
    np.testing.assert_array_equal(data.library_size, np.ones(N))
    assert read(kind="normalised").kind == "normalised"


@pytest.mark.parametrize("dtype", [np.int64, np.uint8, np.float64, np.float16])
def test_any_number_type(dtype):
    same(read(x=counts().astype(dtype)), read())


def test_sparse_equals_dense():
    sparse, dense = read_full(full_screen()), read_full(full_screen(sparse=False))
    np.testing.assert_array_equal(sparse.dense(), dense.x)
    np.testing.assert_array_equal(sparse.library_size, dense.library_size)
    assert sp.issparse(sparse[3:9].x) and not sp.issparse(dense[3:9].x)
    np.testing.assert_array_equal(sparse[3:9].dense(), dense[3:9].x)


def test_layer_is_read_instead_of_x():
    adata = screen()
    adata.layers["counts"] = sp.csr_matrix(counts(seed=1))
    np.testing.assert_array_equal(PerturbationData.from_anndata(adata, layer="counts").dense(), counts(seed=1))
    adata.X = None
    np.testing.assert_array_equal(PerturbationData.from_anndata(adata, layer="counts").dense(), counts(seed=1))


def test_file_equals_memory(tmp_path):
    adata = full_screen()
    adata.write_h5ad(tmp_path / "screen.h5ad")
    same(read_full(tmp_path / "screen.h5ad"), read_full(adata))
    same(read_full(str(tmp_path / "screen.h5ad")), read_full(adata))


def test_batches_and_times_of_the_screen():
    data = read_full(full_screen())
    assert data.batches.tolist() == ["lane0", "lane1", "lane2"]
    assert data.batch_codes.tolist() == [i % 3 for i in range(N)]
    assert data.time.tolist() == [i % 4 for i in range(N)]
    assert read().batch_codes.tolist() == [0] * N and read().time is None


def test_the_anndata_is_left_alone_and_not_shared():
    x = sp.csr_matrix((np.array([0.0, 1, 2, 3], np.float32), np.array([0, 1, 0, 1]), np.array([0, 2, 3, 4])), shape=(3, 2))
    adata = screen(["control", "A", "A"], x)
    data = PerturbationData.from_anndata(adata)
    assert adata.X.nnz == 4 and data.x.nnz == 3
    adata.X.data[:] = 9
    np.testing.assert_array_equal(data.dense(), [[0, 1], [2, 0], [0, 3]])
    x = counts()
    dense = read(x=x)
    x[:] = 9
    dense.batch().x.fill_(9)
    np.testing.assert_array_equal(dense.x, counts())


@settings(max_examples=25, deadline=None)
@given(st.permutations(range(N)), st.booleans())
def test_row_order_permutes_everything_and_changes_nothing_else(order, sparse):
    adata = full_screen(sparse)
    data, permuted = read_full(adata), read_full(adata[order].copy())
    same(permuted, data[order])
    assert permuted.cells.tolist() == [f"cell{i}" for i in order]
    assert permuted.conditions == data.conditions
    assert permuted.cells_per_perturbation.tolist() == data.cells_per_perturbation.tolist()
    a, b = permuted.batch(), data.batch(order)
    for name in ("x", "dose", "library_size", "batch_code", "time"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name


# -- parts ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("index", "expected"),
    [
        (slice(2, 20, 5), [2, 7, 12, 17]),
        (slice(None, None, -1), list(range(N))[::-1]),
        ([5, 1, -1, 5], [5, 1, N - 1, 5]),
        (3, [3]),
        (torch.tensor([4, 2]), [4, 2]),
        ([i % 2 == 0 for i in range(N)], list(range(0, N, 2))),
        (["cell7", "cell0"], [7, 0]),
        ("cell7", [7]),
        (pd.Index(["cell1"]), [1]),
    ],
    ids=lambda v: type(v).__name__,
)
def test_indexing_takes_the_rows(index, expected):
    adata = full_screen()
    data = read_full(adata)
    part = data[index]
    np.testing.assert_array_equal(part.dense(), adata.X.toarray()[expected])
    np.testing.assert_array_equal(part.dose.toarray(), data.dose.toarray()[expected])
    assert part.labels.tolist() == [LABELS[i] for i in expected]
    assert part.cells.tolist() == [f"cell{i}" for i in expected]
    assert part.library_size.tolist() == [adata.X.toarray()[i].sum() for i in expected]
    assert part.batch_codes.tolist() == [i % 3 for i in expected]
    assert part.time.tolist() == [i % 4 for i in expected]
    assert part.perturbations.equals(data.perturbations) and part.genes.equals(data.genes)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8])
def test_small_integers_index_a_large_screen(dtype):
    data = read(["control", "A"] * 200)
    assert data[np.array([3, 1], dtype)].cells.tolist() == ["cell3", "cell1"]


def test_cells_drawn_with_replacement_keep_their_names():
    twice = read()[[0, 0, 9]]
    assert twice[["cell9"]].labels.tolist() == ["A"]
    assert twice["cell0"].cells.tolist() == ["cell0", "cell0"]


def test_select_takes_the_conditions():
    part = read().select("A+B", "control")
    assert part.labels.tolist() == [label for label in LABELS if label in ("A+B", "control")]


def test_parts_count_their_own_conditions():
    part = read().select("A", "B+C")
    assert part.conditions == ["A", "B+C"]
    assert part.condition_counts() == (1, 1)
    assert part.cells_per_perturbation.tolist() == [6, 4, 4]


# -- splits --------------------------------------------------------------------------------------------------------------------


def carriers(data, names):
    return [bool(set(label.split("+")) & set(names)) for label in data.labels]


@pytest.mark.parametrize("by", ["cells", "perturbations", "combinations"])
@pytest.mark.parametrize("seed", range(3))
def test_splits_are_disjoint_cover_everything_and_repeat(by, seed):
    data = read_full(full_screen())
    train, test = data.split(by, 0.4, seed)
    assert set(train.cells).isdisjoint(test.cells)
    assert sorted([*train.cells, *test.cells]) == sorted(data.cells)
    same(train, data[train.cells])
    same(test, data[test.cells])
    again = data.split(by, 0.4, seed)
    same(train, again[0])
    same(test, again[1])


@pytest.mark.parametrize("by", ["cells", "perturbations", "combinations"])
def test_another_seed_gives_another_split(by):
    assert len({tuple(read().split(by, 0.3, seed)[1].cells) for seed in range(10)}) > 1


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_split_by_cells_takes_the_share_of_every_condition(share):
    _, test = read().split(test=share, seed=3)
    assert {c: (test.labels == c).sum() for c in set(LABELS)} == {c: round(share * LABELS.count(c)) for c in set(LABELS)}


@pytest.mark.parametrize("seed", range(5))
def test_held_out_perturbations_are_nowhere_in_training(seed):
    data = read()
    train, test = data.split("perturbations", 1 / 3, seed)
    held = data.perturbations[train.cells_per_perturbation == 0]
    assert len(held) == 1
    assert not any(carriers(train, held)) and all(carriers(test, held))
    assert (train.labels == "control").sum() == LABELS.count("control")
    assert len(test) == sum(carriers(data, held))


def test_named_perturbations_are_held_out_with_their_combinations():
    train, test = read().split("perturbations", ["A", "C"])
    assert set(train.labels) == {"control", "B"}
    assert set(test.labels) == {"A", "C", "A+B", "A+C", "B+C"}


def test_one_name_is_one_label():
    assert set(read().split("perturbations", "A")[1].labels) == {"A", "A+B", "A+C"}
    assert set(read().split("combinations", "A+B")[1].labels) == {"A+B"}


def test_shares_of_any_float_type():
    same(read().split(test=np.float32(0.5))[1], read().split(test=0.5)[1])


@pytest.mark.parametrize("seed", range(5))
def test_held_out_combinations_leave_all_singles(seed):
    train, test = read().split("combinations", 0.5, seed)
    assert len(set(test.labels)) == 2 and all("+" in label for label in test.labels)
    assert set(train.labels).isdisjoint(test.labels)
    for label in ("control", "A", "B", "C"):
        assert (train.labels == label).sum() == LABELS.count(label)


@pytest.mark.parametrize("name", ["A+B", "B+A"])
def test_a_combination_is_held_out_in_either_order(name):
    train, test = read(["control", "A", "B", "A+B", "B+A", "A+C"]).split("combinations", [name])
    assert test.cells.tolist() == ["cell3", "cell4"]
    assert train.dose[:, :2].sum(1).max() == 1


# -- batches -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("index", [None, [7, 2, 39, 12], slice(30, 3, -4)])
def test_batch_is_the_anndata(sparse, dtype, index):
    adata = full_screen(sparse)
    batch = read_full(adata).batch(index, n_total=100, dtype=dtype)
    rows = np.arange(N)[slice(None) if index is None else index]
    x = counts()[rows]
    assert batch.index.tolist() == rows.tolist() and len(batch) == len(rows) and batch.n_total == 100
    assert batch.x.dtype == batch.dose.dtype == batch.library_size.dtype == batch.time.dtype == dtype
    np.testing.assert_array_equal(batch.x, x)
    np.testing.assert_array_equal(batch.dose, [[name in LABELS[i].split("+") for name in "ABC"] for i in rows])
    np.testing.assert_array_equal(batch.library_size, x.sum(1, keepdims=True))
    assert batch.batch_code.tolist() == [i % 3 for i in rows]
    assert batch.time.tolist() == [i % 4 for i in rows]
    assert (batch.nonzeros is not None) == sparse


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nonzeros_against_brute_force(dtype):
    batch = read(x=sp.csr_matrix(counts() * np.arange(1, G + 1, dtype=np.float32))).batch([3, 39, 3, 20], dtype=dtype)
    nz = batch.nonzeros
    expected = [(i, j, float(v)) for i, row in enumerate(batch.x.tolist()) for j, v in enumerate(row) if v != 0]
    assert nz.dense is batch.x
    assert list(zip(nz.row.tolist(), nz.gene.tolist(), nz.value.tolist(), strict=True)) == expected
    assert nz.flat.tolist() == [i * G + j for i, j, _ in expected]
    assert torch.equal(batch.x.flatten()[nz.flat], nz.value)
    np.testing.assert_allclose(nz.log_factorial, gammaln(batch.x.double().numpy() + 1).sum(1), rtol=1e-6, atol=1e-6)


def test_dense_looking_or_normalised_batches_have_no_nonzeros():
    assert read(x=sp.csr_matrix(counts() + 1)).batch().nonzeros is None
    assert read(x=sp.csr_matrix(with_value(0.5))).batch().nonzeros is None


def test_cast_batch_keeps_its_pieces():
    batch = read_full(full_screen()).batch()
    cast = batch.to(dtype=torch.float64)
    assert cast.nonzeros.dense is cast.x
    for name in ("x", "dose", "library_size", "time"):
        assert getattr(cast, name).dtype == torch.float64
        assert torch.equal(getattr(cast, name).float(), getattr(batch, name)), name
    for name in ("batch_code", "index"):
        assert torch.equal(getattr(cast, name), getattr(batch, name)) and getattr(cast, name).dtype == torch.int64
    for name in ("flat", "row", "gene", "value", "log_factorial"):
        assert torch.equal(getattr(cast.nonzeros, name).to(getattr(batch.nonzeros, name).dtype), getattr(batch.nonzeros, name)), name
    assert cast.nonzeros.flat.dtype == torch.int64 and cast.nonzeros.value.dtype == torch.float64
    assert cast.n_total == batch.n_total


def test_hidden_batch_keeps_the_rest():
    batch = read_full(full_screen()).batch()
    hidden = batch.hide()
    assert hidden.x is None and hidden.nonzeros is None and hidden.dose is batch.dose
    assert hidden.to(dtype=torch.float64).x is None
    with pytest.raises(ValueError, match="'dose'"):
        batch.hide("dose")


def test_the_plate_stands_for_the_population():
    batch = read().batch([4, 1, 30], n_total=60)

    def model():
        with batch.cells() as index:
            pyro.sample("z", dist.Normal(0.0, 1.0))
        return index

    trace = pyro.poutine.trace(model).get_trace()
    assert trace.nodes["z"]["scale"] == 20
    assert trace.nodes["z"]["value"].shape == (3,)
    assert trace.nodes["_RETURN"]["value"].tolist() == [4, 1, 30]


@pytest.mark.parametrize("size", [1, 7, 16, 39, 40, 1000])
def test_minibatches_cover_each_cell_once(size):
    data = read_full(full_screen())
    order = np.random.default_rng(1).permutation(N)
    made = list(batches(data, size, order, n_total=77))
    sizes = [len(b) for b in made]
    assert torch.cat([b.index for b in made]).tolist() == order.tolist()
    assert max(sizes) - min(sizes) <= 1 and max(sizes) <= size
    assert len(made) == -(-N // size)
    np.testing.assert_array_equal(torch.cat([b.x for b in made]), counts()[order])
    assert {b.n_total for b in made} == {77}


def test_minibatches_in_the_order_of_the_screen():
    made = list(batches(read(), 16))
    assert torch.cat([b.index for b in made]).tolist() == list(range(N))
    assert {b.n_total for b in made} == {N}


def test_simulated_screen(small_screen):
    data = PerturbationData.from_anndata(small_screen)
    assert repr(data) == (
        "PerturbationData(190 cells x 30 genes, counts; 40 control cells, 5 single perturbations, 0 combinations, 1 batch)"
    )
    assert data.perturbations.tolist() == small_screen.uns["truth"]["perturbations"].tolist()


# -- real screens --------------------------------------------------------------------------------------------------------------

REAL = {
    "papalexi2021_thp1_crisprko_299g": ((16_192, 299), 1_923, (25, 0)),
    "norman2019_k562_crispra_hvg500": ((3_175, 500), 100, (18, 13)),
    "schraivogel2020_k562_tapseq_crispri_72g": ((20_996, 72), 8_085, (14, 87)),
}


@pytest.mark.parametrize("name", REAL)
def test_real_screens(name, data_dir):
    path = data_dir / f"{name}.h5ad"
    if not path.is_file():
        pytest.skip(f"{path} is absent")
    shape, n_control, conditions = REAL[name]
    adata = ad.read_h5ad(path)
    assert adata.shape == shape
    adata = adata[:, adata.X.sum(0) > 0]  # 254 of Norman's 500 genes were never counted
    data = PerturbationData.from_anndata(adata)
    assert data.x.shape == adata.shape and sp.issparse(data.x) and data.kind == "counts"
    assert int(data.is_control.sum()) == n_control
    assert data.condition_counts() == conditions
    assert (data.x != adata.X).nnz == 0
    np.testing.assert_allclose(data.library_size, adata.X.astype(np.float64).sum(1).A1, rtol=1e-6)
    last = data.perturbations[-1]
    carrying = adata.obs["perturbation"].astype(str).str.split("+").map(lambda p: last in p).to_numpy()
    np.testing.assert_array_equal(data.dose[:, -1].toarray().ravel(), carrying)


@pytest.mark.parametrize("sparse", [True, False])
def test_log_normalised_is_log1p_to_the_median_library(sparse: bool) -> None:
    rng = np.random.default_rng(0)
    counts = rng.poisson(2.0, (12, 5)).astype(np.float32) + np.eye(12, 5, dtype=np.float32)
    obs = pd.DataFrame({"perturbation": ["control", "A"] * 6}, index=[f"c{i}" for i in range(12)])
    adata = ad.AnnData(sp.csr_matrix(counts) if sparse else counts, obs=obs, var=pd.DataFrame(index=list("abcde")))
    data = pc.PerturbationData.from_anndata(adata)
    normal = data.log_normalised()
    total = counts.sum(1, keepdims=True)
    np.testing.assert_allclose(normal.dense(), np.log1p(counts * np.median(total) / total), rtol=1e-6)
    assert normal.kind == "normalised" and sp.issparse(normal.x) == sparse and (normal.library_size == 1).all()
    assert data.kind == "counts" and np.array_equal(data.dense(), counts)  # the original is left as it was
    with pytest.raises(DataError, match="normalised already"):
        normal.log_normalised()
    model, guide = pc.build("discrepancy_vae", data)
    with pytest.raises(DataError, match=r"fit it to data\.log_normalised\(\)"):
        pc.fit(model, guide, data, max_epochs=1)
