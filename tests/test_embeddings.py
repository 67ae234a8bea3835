"""Embeddings of perturbations against brute-force decompositions, by name under any order, and every refusal."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

import pyrocausal as pc
from pyrocausal import embeddings as em
from pyrocausal import evaluate as ev
from pyrocausal.errors import DataError

laws = settings(max_examples=25, deadline=None, derandomize=True, database=None)
seeds = st.integers(0, 2**31)
ORDER = ["gene3", "gene0", "gene7"]


def screen(x: Any, labels: Any, genes: Any = None, **arguments: Any) -> pc.PerturbationData:
    obs = pd.DataFrame({"perturbation": list(labels)}, index=[f"cell{i}" for i in range(len(labels))])
    var = pd.DataFrame(index=[f"gene{j}" for j in range(x.shape[1])] if genes is None else list(genes))
    return pc.PerturbationData.from_anndata(ad.AnnData(x, obs=obs, var=var), **arguments)


def counts(seed: int, n_genes: int, n_control: int, n_each: int = 20) -> tuple[np.ndarray, list[str]]:
    """Control cells with two programs, then cells of three perturbed genes; no empty gene among the controls."""
    rng = np.random.default_rng(seed)
    labels = ["control"] * n_control + [p for p in ORDER for _ in range(n_each)]
    programs = np.exp(0.5 * rng.standard_normal((len(labels), 2)) @ rng.standard_normal((2, n_genes)))
    x = rng.poisson(programs * rng.lognormal(0, 1, n_genes) * rng.lognormal(0, 0.4, (len(labels), 1))).astype(np.float32)
    x[: min(n_genes, n_control), : min(n_genes, n_control)] += np.eye(min(n_genes, n_control), dtype=np.float32)
    x[:, 0] += 1
    x[0] += 1
    return x, labels


def control_scores(data: pc.PerturbationData, n: int) -> pd.DataFrame:
    """Brute force in float64: dense matrix, full decomposition, sign by the entry of largest size."""
    x = data.dense(np.float64)[np.asarray(data.labels) == data.control]
    if data.kind == "counts":
        total = x.sum(1, keepdims=True)
        x = np.log1p(x / total * np.median(total))
    y = x.T - x.T.mean(0)
    u, s, _ = np.linalg.svd(y, full_matrices=False)
    scores = (u * s)[:, :n]
    return pd.DataFrame(scores * np.sign(scores[np.abs(scores).argmax(0), range(n)]), index=data.genes)


# -- control cells --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n_genes", "n_control"), [(40, 90), (90, 40), (420, 450), (450, 420)], ids=str)
@pytest.mark.parametrize("sparse", [True, False])
def test_control_pca_is_the_decomposition_of_the_control_cells(n_genes: int, n_control: int, sparse: bool) -> None:
    """Small ones are decomposed whole, large ones for their leading part, without a centred copy."""
    x, labels = counts(0, n_genes, n_control)
    data = screen(sp.csr_matrix(x) if sparse else x, labels)
    found, true = em.control_pca(data, n_components=8), control_scores(data, 8)
    assert list(found.index) == sorted(ORDER) and found.index.name == "perturbation" and (found.dtypes == np.float64).all()
    np.testing.assert_allclose(found, true.loc[found.index], atol=1e-8 * np.abs(true).max().max())
    everything = em.control_pca(data, data.genes, n_components=8)
    np.testing.assert_allclose(everything.mean(), 0, atol=1e-8)
    assert (everything.max() > -everything.min()).all()


def test_control_pca_of_normalised_data_takes_them_as_they_are() -> None:
    rng = np.random.default_rng(1)
    x = rng.standard_normal((80, 2)) @ rng.standard_normal((2, 25)) + 0.3 * rng.standard_normal((80, 25))
    data = screen(x.astype(np.float32), ["control"] * 50 + ["gene1"] * 30)
    np.testing.assert_allclose(em.control_pca(data, n_components=4), control_scores(data, 4).loc[["gene1"]], atol=1e-8)


@laws
@given(seeds)
def test_control_pca_goes_by_name_whatever_the_order(seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, labels = counts(seed % 97, 40, 60)
    genes, cells = rng.permutation(40), rng.permutation(len(labels))
    data = screen(x, labels)
    moved = screen(x[cells][:, genes], np.array(labels)[cells], [f"gene{g}" for g in genes])
    first = em.control_pca(data, ORDER, n_components=3)
    again = em.control_pca(moved, list(rng.permutation(ORDER)), n_components=3).loc[ORDER]
    np.testing.assert_allclose(again, first, atol=1e-8)


def test_control_pca_reads_control_cells_only() -> None:
    x, labels = counts(3, 40, 60)
    changed = x.copy()
    changed[60:] = np.random.default_rng(0).poisson(30, changed[60:].shape) + 1
    one, other = (em.control_pca(screen(v, labels), ORDER, n_components=5) for v in (x, changed))
    pd.testing.assert_frame_equal(one, other, check_exact=True)
    train, _ = screen(x, labels).split("perturbations", test=["gene3"])
    pd.testing.assert_frame_equal(em.control_pca(train, ORDER, n_components=5), one, check_exact=True)


def test_control_pca_of_perturbations_without_a_gene() -> None:
    x, labels = counts(4, 40, 60)
    labels = [{"gene7": "gene7_enh", "gene3": "HS2"}.get(k, k) for k in labels]
    data = screen(x, labels)
    with pytest.raises(DataError, match=r"2 of 3 perturbations name no gene of the data, first 'HS2'; .*missing='mean'"):
        em.control_pca(data, n_components=3)
    table = em.control_pca(data, n_components=3, missing="mean")
    assert (table.loc[["HS2", "gene7_enh"]] == 0).all(axis=None) and (table.loc["gene0"] != 0).all()
    true = em.control_pca(data, ["gene0", "gene7", "gene3"], n_components=3).to_numpy()
    by_function = em.control_pca(data, ["gene0", "gene7_enh"], 3, gene_of=lambda name: name.removesuffix("_enh"))
    by_mapping = em.control_pca(data, ["gene0", "gene7_enh", "HS2"], 3, gene_of={"gene7_enh": "gene7", "HS2": "gene3"})
    np.testing.assert_array_equal(by_function, true[:2])
    np.testing.assert_array_equal(by_mapping, true)


def test_control_pca_refuses() -> None:
    x, labels = counts(5, 30, 50)
    data = screen(x, labels)
    with pytest.raises(DataError, match=r"no control cell, and .*; give the training part"):
        em.control_pca(data[~data.is_control], n_components=3)
    for n in (0, 30):
        with pytest.raises(DataError, match=rf"n_components={n} was given, but the control cells can give 1 to 29"):
            em.control_pca(data, n_components=n)
    with pytest.raises(DataError, match=r"'gene 3'; translate them with gene_of=; did you mean 'gene3'"):
        em.control_pca(data, ["gene 3"], 3, missing="mean")
    with pytest.raises(DataError, match="'gene3' twice; give every name once"):
        em.control_pca(data, ["gene3", "gene3"], 3)
    with pytest.raises(DataError, match="hold no name"):
        em.control_pca(data, [], 3)
    with pytest.raises(DataError, match="missing='zero' was given; choose 'refuse' or 'mean'"):
        em.control_pca(data, ORDER, 3, missing="zero")  # type: ignore[arg-type]


# -- gene sets ------------------------------------------------------------------------------------------------------------------


def write_sets(folder: Path, sets: dict[str, list[str]], name: str = "sets.gmt") -> Path:
    text = "".join("\t".join([k, "description", *genes]) + "\n" for k, genes in sets.items())
    path = folder / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return path


def random_sets(seed: int, n_sets: int = 30, n_genes: int = 60) -> dict[str, list[str]]:
    rng = np.random.default_rng(seed)
    return {f"set{k}": [f"g{g}" for g in rng.choice(n_genes, rng.integers(3, 12), replace=False)] for k in range(n_sets)}


def test_gene_sets_are_weighted_memberships(tmp_path: Path) -> None:
    sets = random_sets(0) | {"tiny": ["g1", "g2"], "huge": [f"h{i}" for i in range(501)]}
    used = {k: v for k, v in sets.items() if 3 <= len(v) <= 500}
    genes = sorted({g for v in used.values() for g in v})
    m = np.array([[np.log(1 + len(genes) / len(v)) * (g in v) for v in used.values()] for g in genes])
    m /= np.linalg.norm(m, axis=1, keepdims=True)
    u, s, _ = np.linalg.svd(m, full_matrices=False)
    table = em.from_gene_sets(write_sets(tmp_path, sets, "sets.gmt.gz"), genes, n_components=7)
    np.testing.assert_allclose(np.abs(table), np.abs((u * s)[:, :7]), atol=1e-10)
    full = em.from_gene_sets(write_sets(tmp_path, sets), genes, n_components=29).to_numpy()
    np.testing.assert_allclose(full @ full.T, m @ m.T - s[29] ** 2 * np.outer(u[:, 29], u[:, 29]), atol=1e-10)
    mean = em.from_gene_sets(tmp_path / "sets.gmt", ["g1", "h1"], n_components=7, missing="mean")
    np.testing.assert_allclose(mean.loc["h1"], table.mean(), atol=1e-10)
    with pytest.raises(DataError, match=r"1 of 2 perturbations name no gene of the sets of sets.gmt, first 'h1'"):
        em.from_gene_sets(tmp_path / "sets.gmt", ["g1", "h1"], n_components=7)


def test_gmt_files_are_read_and_refused(tmp_path: Path) -> None:
    assert em.read_gmt(write_sets(tmp_path, {"a": ["x", "y", "x", ""], "b": ["z"]})) == {"a": ["x", "y"], "b": ["z"]}
    (tmp_path / "twice.gmt").write_text("a\t\tx\n\na\t\ty\n")
    with pytest.raises(DataError, match=r"line 3 of 'twice.gmt' repeats the set 'a'"):
        em.read_gmt(tmp_path / "twice.gmt")
    (tmp_path / "words.gmt").write_text("a\t\tx\nfree text\n")
    with pytest.raises(DataError, match=r"line 2 of 'words.gmt' has no genes .*; give a .gmt file"):
        em.read_gmt(tmp_path / "words.gmt")
    with pytest.raises(DataError, match=r"cannot be read \(FileNotFoundError\); give the path of a .gmt"):
        em.read_gmt(tmp_path / "absent.gmt")
    for name, raw in (("a.gmt.gz", b"no gzip"), ("b.gmt", b"\xff\xfe\x00"), ("c.gmt.gz", gzip.compress(b"a\tb\tc\n" * 99)[:20])):
        (tmp_path / name).write_bytes(raw)
        with pytest.raises(DataError, match="cannot be read"):
            em.read_gmt(tmp_path / name)
    with pytest.raises(DataError, match="no gene set of 3 to 500 genes"):
        em.from_gene_sets(write_sets(tmp_path, {"a": ["x", "y"]}), ["x"])


# -- pairs ----------------------------------------------------------------------------------------------------------------------


def random_pairs(seed: int, n_genes: int = 40) -> pd.DataFrame:
    """A ring (one component) with random chords, some pairs twice or to itself, and a component of two genes."""
    rng = np.random.default_rng(seed)
    ring = [(i, (i + 1) % n_genes) for i in range(n_genes)]
    chords = [tuple(p) for p in rng.integers(0, n_genes, (60, 2))]
    rows = [(f"g{a}", f"g{b}") for a, b in [*ring, *chords, *[(b, a) for a, b in chords[:20]], *chords[:5]]]
    return pd.DataFrame([*rows, ("far1", "far2"), ("far2", "far1")], columns=["entity1", "entity2"])


def adjacency(pairs: pd.DataFrame, genes: list[str]) -> np.ndarray:
    a = np.zeros((len(genes), len(genes)))
    for x, y in pairs.to_numpy():
        if x in genes and x != y:
            a[genes.index(x), genes.index(y)] = a[genes.index(y), genes.index(x)] = 1
    return a


@pytest.mark.parametrize("seed", range(3))
def test_pairs_are_the_leading_eigenvectors_of_the_component(seed: int, tmp_path: Path) -> None:
    pairs = random_pairs(seed)
    genes = [f"g{i}" for i in range(40)]
    a = adjacency(pairs, genes)
    d = a.sum(1) + 1
    values, vectors = np.linalg.eigh(a / np.sqrt(np.outer(d, d)))
    true = (vectors * values)[:, ::-1][:, :6]
    pairs.to_csv(tmp_path / "pairs.csv.gz", index=False)
    table = em.from_pairs(tmp_path / "pairs.csv.gz", genes, n_components=6)
    np.testing.assert_allclose(np.abs(table), np.abs(true), atol=1e-8)
    assert (table.max() >= -table.min()).all()
    shuffled = pairs.sample(frac=1, random_state=seed)[["entity2", "entity1"]].set_axis(["a", "b"], axis=1)
    shuffled.to_csv(tmp_path / "pairs.tsv", sep="\t", index=False)
    again = em.from_pairs(tmp_path / "pairs.tsv", genes[::-1], n_components=6, columns=("a", "b")).loc[genes]
    np.testing.assert_allclose(again, table, atol=1e-8)
    with pytest.raises(DataError, match=r"1 of 2 perturbations name no gene of the largest component of the table, first 'far1'"):
        em.from_pairs(pairs, ["g1", "far1"], n_components=6)
    mean = em.from_pairs(pairs, ["g1", "far1"], n_components=6, missing="mean")
    np.testing.assert_allclose(mean.loc["far1"], table.mean(), atol=1e-8)


def test_pairs_are_refused(tmp_path: Path) -> None:
    pairs = random_pairs(0)
    with pytest.raises(DataError, match=r"no column 'entity_1' .*did you mean 'entity1'"):
        em.from_pairs(pairs, ["g1"], columns=("entity_1", "entity2"))
    with pytest.raises(DataError, match="no pair of two different genes"):
        em.from_pairs(pairs[pairs["entity1"] == pairs["entity2"]], ["g1"])
    with pytest.raises(DataError, match=r"n_components=40 was given, but the table can give 1 to 39"):
        em.from_pairs(pairs, ["g1"], n_components=40)
    with pytest.raises(DataError, match=r"n_components=39 was given for the table, which has only \d+ to give"):
        em.from_pairs(pairs, ["g1"], n_components=39)
    with pytest.raises(DataError, match=r"cannot be read \(FileNotFoundError\); give the path of a .csv or .csv.gz"):
        em.from_pairs(tmp_path / "absent.csv", ["g1"])


# -- tables, combinations, neighbours --------------------------------------------------------------------------------------------


def a_table(seed: int = 0, n: int = 6, width: int = 3) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    return pd.DataFrame(rng.standard_normal((n, width)), [f"p{i}" for i in range(n)], [f"c{j}" for j in range(width)])


def blank(table: pd.DataFrame, name: str, value: float = np.nan) -> pd.DataFrame:
    table = table.copy()
    table.loc[name, "c1"] = value
    return table


def test_tables_of_ones_own(tmp_path: Path) -> None:
    table = a_table()
    table.to_csv(tmp_path / "t.csv")
    table.to_csv(tmp_path / "t.tsv.gz", sep="\t")
    for given_table in (table, tmp_path / "t.csv", tmp_path / "t.tsv.gz"):
        np.testing.assert_allclose(em.from_table(given_table, ["p4", "p0"]), table.loc[["p4", "p0"]], atol=1e-12)
    for bad, fault in (
        (pd.concat([table, table.iloc[:1]]), "several rows for 'p0'; keep one row"),
        (table.assign(word="x"), "words in column 'word'; give columns of numbers only"),
        (table.iloc[:, :0], "has no column; give columns"),
        (table.drop(index="p4"), r"lacks 1 of 2 names, first 'p4'; add them"),
        (blank(table, "p4"), r"1 rows of the table hold NaN or infinite values, the first 'p4'"),
        (blank(table, "p4", np.inf), "NaN or infinite"),
    ):
        with pytest.raises(DataError, match=fault):
            em.from_table(bad, ["p0", "p4"])
    em.from_table(blank(table, "p5"), ["p0"])  # rows that are not asked for do not matter


@laws
@given(seeds)
def test_combined_blocks_have_the_same_size(seed: int) -> None:
    rng = np.random.default_rng(seed)
    one, two = a_table(seed), 100 * a_table(seed + 1, width=5).sample(frac=1, random_state=seed % 1000)
    weights = rng.uniform(0.1, 3, 2)
    both = em.combine(one, two, weights=weights.tolist())
    assert list(both.index) == list(one.index) and both.shape == (6, 8) and both.columns.is_unique
    sizes = [(both.iloc[:, block] ** 2).sum(axis=1).mean() for block in (slice(0, 3), slice(3, 8))]
    np.testing.assert_allclose(sizes, weights**2)
    np.testing.assert_allclose(both.iloc[:, 3:] * (100 / both.iloc[0, 3]), two.loc[one.index] * (100 / two.loc["p0", "c0"]), rtol=1e-9)


def test_combining_is_refused() -> None:
    table = a_table()
    for tables, weights, fault in (
        ((), None, "0 tables"),
        ((table,), [1.0, 2.0], "1 tables and the weights"),
        ((table,), [0.0], "give a positive weight"),
        ((table, table.drop(index="p1")), None, "lacks 1 of 6"),
        ((table.drop(index="p1"), table), None, "table 1 has 6 perturbations and the first 5"),
        ((table, 0 * table), None, "table 1 is zero for every perturbation"),
    ):
        with pytest.raises(DataError, match=fault):
            em.combine(*tables, weights=weights)


@laws
@given(seeds)
def test_the_nearest_has_the_largest_cosine(seed: int) -> None:
    table = a_table(seed, n=12)
    of, among = list(table.index[:5]), list(table.index[3:])
    found = em.nearest_perturbation(table, of, among)
    for p in of:
        cosine = {q: table.loc[p] @ table.loc[q] / np.linalg.norm(table.loc[p]) / np.linalg.norm(table.loc[q]) for q in among}
        assert found[p] == max(cosine, key=lambda q: cosine[q])
    assert found["p3"] == "p3" and found["p4"] == "p4"


def test_a_zero_vector_has_no_neighbour() -> None:
    table = a_table()
    table.loc[["p0", "p1"]] = 0.0
    found = em.nearest_perturbation(table, ["p0", "p2"], ["p1", "p3"])
    assert found["p0"] is None and found["p2"] == "p3"
    table.loc["p4"] = table.loc["p3"]  # two guides of one gene: each is its own neighbour
    assert em.nearest_perturbation(table, ["p4", "p3"], ["p3", "p4"]).to_dict() == {"p4": "p4", "p3": "p3"}
    with pytest.raises(DataError, match="vectors of all candidates are zero"):
        em.nearest_perturbation(table, ["p2"], ["p0", "p1"])
    with pytest.raises(DataError, match=r"lacks 1 of 1 names, first 'p 2'.*did you mean 'p2'"):
        em.nearest_perturbation(table, ["p 2"], ["p3"])


def test_the_baseline_borrows_measured_effects() -> None:
    x, labels = counts(6, 40, 60, n_each=40)
    labels = ["gene0+gene3" if k == "gene0" and i % 2 else k for i, k in enumerate(labels)]
    train = screen(x, labels)
    table = pd.DataFrame([[1, 0], [0, 1], [0.9, 0.1], [0.2, 0.9], [0, 0]], ["gene0", "gene3", "new", "other", "nowhere"], dtype=float)
    asked = ["gene0", "new", "new+other", "new+control", "control", "nowhere", "gene3+nowhere"]
    found, measured = em.nearest_embedding_effects(train, table, asked), ev.measured_effects(train)
    own = {p: measured["effect"].sel(intervention=p).to_numpy() for p in ("gene0", "gene3")}
    expected = [own["gene0"], own["gene0"], own["gene0"] + own["gene3"], own["gene0"], 0 * own["gene0"], np.nan, np.nan]
    for name, effect in zip(asked, expected, strict=True):
        np.testing.assert_allclose(found["effect"].sel(intervention=name), np.broadcast_to(effect, 40), atol=1e-12)
    assert found["nearest"].values.tolist() == ["gene0", "gene0", "gene0+gene3", "gene0", "control", "?", "gene3+?"]
    other = ev.baseline_effects(train, asked, "additive")
    assert found["effect"].dims == other["effect"].dims and found.attrs == other.attrs | {"rung": "baseline nearest"}
    assert ev.score_effects(found.sel(intervention=["gene0"]), measured).loc["gene0", "pearson"] == pytest.approx(1)
    with pytest.raises(DataError, match=r"lacks 1 of 1 names"):
        em.nearest_embedding_effects(train, table, ["unheard"])
    with pytest.raises(DataError, match="no perturbation of the training cells is in the table"):
        em.nearest_embedding_effects(train, table.loc[["new"]], ["new"])


# -- real resources --------------------------------------------------------------------------------------------------------------


def test_real_resources_know_the_interferon_receptor(data_dir: Path) -> None:
    names = ["IFNGR1", "IFNGR2", "STAT2", "SMAD4", "MYC", "CUL3", "BRD4", "CD86"]
    others = [n for n in names if n != "IFNGR1"]
    for name in ("pairs_StringDB.csv.gz", "pairs_SIGNOR.csv.gz"):
        table = em.from_pairs(data_dir / "annotations" / name, names, missing="mean")
        assert table.shape == (8, 50) and em.nearest_perturbation(table, ["IFNGR1"], others).tolist() == ["IFNGR2"]
    for name in ("enrichr.GO_Biological_Process_2021.gmt.gz", "h.all.v7.0.symbols.gmt"):
        table = em.from_gene_sets(data_dir / "annotations" / name, [*names, "JAK2", "STAT1"], n_components=40, missing="mean")
        pd.testing.assert_frame_equal(
            table, em.from_gene_sets(data_dir / "annotations" / name, table.index, n_components=40, missing="mean")
        )
        unit = table.div(np.linalg.norm(table, axis=1), axis=0)
        assert unit.loc["STAT1"] @ unit.loc["JAK2"] > unit.loc["STAT1"] @ unit.loc["CUL3"]


def test_enhancers_of_a_real_screen_have_the_vector_of_their_gene(data_dir: Path) -> None:
    data = pc.PerturbationData.from_anndata(data_dir / "schraivogel2020_k562_tapseq_crispri_72g.h5ad")
    with pytest.raises(DataError, match=r"4 of 14 perturbations name no gene of the data, first 'GATA1_enh'"):
        em.control_pca(data, n_components=10)
    gene = {"GATA1_enh": "GATA1", "HS2_enh": "HBE1", "MYC_enh": "MYC", "ZFPM2_enh": "ZFPM2"}
    table = em.control_pca(data, n_components=10, gene_of=gene)
    np.testing.assert_allclose(table, control_scores(data, 10).loc[[gene.get(p, p) for p in table.index]], atol=1e-7)
