"""Simulators: what is in the data is what the truth says, and what the papers say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp

import pyrocausal as pc
from pyrocausal.simulate import sams_screen, svae_screen

SIMULATORS: dict[str, Callable[..., ad.AnnData]] = {"svae": svae_screen, "sams": sams_screen}
SMALL: dict[str, Any] = {"n_perturbations": 12, "n_latent": 6, "cells_per_perturbation": 40, "n_genes": 25, "n_control": 30}


def dense(adata: ad.AnnData) -> np.ndarray:
    return np.asarray(adata.X.toarray() if sp.issparse(adata.X) else adata.X, dtype=float)


def same(a: ad.AnnData, b: ad.AnnData) -> None:
    np.testing.assert_array_equal(dense(a), dense(b))
    assert list(a.obs["perturbation"]) == list(b.obs["perturbation"])
    for key in ("u", "rate"):
        np.testing.assert_array_equal(a.obsm[key], b.obsm[key])
    for key in ("mask", "effect", "perturbations"):
        np.testing.assert_array_equal(a.uns["truth"][key], b.uns["truth"][key])


@pytest.mark.parametrize("replicate", [False, True])
@pytest.mark.parametrize("name", SIMULATORS)
def test_shapes_names_and_kinds(name: str, replicate: bool) -> None:
    adata = SIMULATORS[name](**SMALL, replicate=replicate)
    truth = adata.uns["truth"]
    assert adata.shape == (12 * 40 + 30, 25)
    assert adata.obsm["u"].shape == (510, 6) and adata.obsm["rate"].shape == (510, 25)
    assert truth["mask"].shape == truth["effect"].shape == (12, 6)
    np.testing.assert_array_equal(truth["mask"], truth["effect"] != 0)
    counts = adata.obs["perturbation"].value_counts()
    assert counts["control"] == 30 and (counts.drop("control") == 40).all() and set(counts.index) == {"control", *truth["perturbations"]}
    data = pc.PerturbationData.from_anndata(adata)
    assert data.kind == adata.uns["X_kind"] == {"svae": "counts", "sams": "normalised"}[name]
    assert list(data.perturbations) == list(truth["perturbations"])  # rows of the truth are rows of the models' tables
    assert truth["settings"]["replicate"] is replicate and truth["settings"]["simulator"] == name


@pytest.mark.parametrize("name", SIMULATORS)
def test_same_seed_same_data(name: str) -> None:
    first, other = SIMULATORS[name](**SMALL, seed=3), SIMULATORS[name](**SMALL, seed=4)
    same(first, SIMULATORS[name](**SMALL, seed=3))
    assert (first.obsm["u"] != other.obsm["u"]).all() and (dense(first) != dense(other)).any()


@pytest.mark.parametrize("name", SIMULATORS)
def test_h5ad_round_trip(name: str, tmp_path: Path) -> None:
    adata = SIMULATORS[name](**SMALL)
    adata.write_h5ad(tmp_path / "screen.h5ad")
    back = ad.read_h5ad(tmp_path / "screen.h5ad")
    same(adata, back)
    assert back.uns["X_kind"] == adata.uns["X_kind"] and list(back.var_names) == list(adata.var_names)
    assert {k: type(v)(back.uns["truth"]["settings"][k]) for k, v in adata.uns["truth"]["settings"].items()} == adata.uns["truth"][
        "settings"
    ]


@pytest.mark.parametrize("replicate", [False, True])
@pytest.mark.parametrize("name", SIMULATORS)
def test_programs_are_basal_state_plus_shift(name: str, replicate: bool) -> None:
    n = 150
    adata = SIMULATORS[name](n_perturbations=30, n_latent=8, cells_per_perturbation=n, n_genes=10, n_control=n, replicate=replicate, seed=1)
    u = adata.obsm["u"].astype(float).reshape(31, n, 8)
    basal = u - np.concatenate([adata.uns["truth"]["effect"], np.zeros((1, 8))])[:, None]
    # 248 standard normal means and variances: the largest of them stays below 4.2 standard errors with probability .993 each
    assert np.abs(basal.mean(1)).max() < 4.2 / np.sqrt(n)
    assert np.abs(basal.var(1, ddof=1) - 1).max() < 4.2 * np.sqrt(2 / (n - 1)) * 1.2  # chi-squared is skewed to the right
    correlation = np.corrcoef(basal.reshape(-1, 8).T) - np.eye(8)
    assert np.abs(correlation).max() < 4.2 / np.sqrt(31 * n)


@pytest.mark.parametrize("name", SIMULATORS)
@pytest.mark.parametrize("shift", [5.0, 1.5])
def test_effects_have_the_size_asked_for_and_both_signs(name: str, shift: float) -> None:
    truth = SIMULATORS[name](n_perturbations=400, cells_per_perturbation=1, n_genes=2, shift=shift, seed=2).uns["truth"]
    effect = truth["effect"][truth["mask"] == 1]
    se = 0.5 / np.sqrt(len(effect))
    assert abs(np.abs(effect).mean() - shift) < 3.5 * se
    assert abs(np.abs(effect).std() - 0.5) < 3.5 * se / np.sqrt(2)
    assert abs((effect > 0).mean() - 0.5) < 3.5 * 0.5 / np.sqrt(len(effect))


def test_svae_targets_are_one_to_three_drawn_with_replacement() -> None:
    masks = np.concatenate([svae_screen(cells_per_perturbation=1, n_genes=2, seed=s).uns["truth"]["mask"] for s in range(30)])
    per_row = masks.sum(1)
    assert set(per_row) == {1, 2, 3}
    # distinct among 1, 2, 3 draws of 15: 1, 1.9333, 2.8044; a mask rate of .1275, which the dossier measured as .125-.128
    expected = (1 + (15 - 14**2 / 15) + (15 - 14**3 / 15**2)) / 3 / 15
    assert abs(expected - 0.1275) < 1e-4
    assert abs(masks.mean() - expected) < 3.5 * per_row.std() / np.sqrt(len(per_row)) / 15
    assert abs(masks.mean(0) - expected).max() < 4 * np.sqrt(expected * (1 - expected) / len(masks))  # no program is preferred


@pytest.mark.parametrize(("cells", "library"), [(100, 10_002), (250, 4_000)])
def test_svae_replicate_mode_has_the_library_of_the_reference(cells: int, library: int) -> None:
    adata = svae_screen(cells_per_perturbation=cells, replicate=True, seed=0)
    n = adata.n_obs
    assert n == 100 * cells
    np.testing.assert_allclose(adata.obsm["rate"].mean(0, dtype=float), 1e6 / n, rtol=1e-4)  # every gene, whatever it is
    depth = dense(adata).sum(1)
    expected, poisson = 1e6 * 100 / n, np.sqrt(1e6 * 100) / n  # 10,000 and 4,000; all counts together are Poisson
    assert abs(depth.mean() - expected) < 4 * poisson
    assert abs(depth.mean() - library) < 4 * poisson + 2
    assert depth.std() / depth.mean() > 0.1  # libraries carry signal: the flaw that this mode keeps


def test_svae_counts_are_poisson_and_libraries_are_noise_by_default() -> None:
    adata = svae_screen(n_perturbations=40, cells_per_perturbation=100, library_size=2000.0, seed=5)
    x, rate, u = dense(adata), adata.obsm["rate"].astype(float), adata.obsm["u"].astype(float)
    z = (x - rate) / np.sqrt(rate)
    assert abs(z.mean()) < 4 / np.sqrt(z.size)
    # the fourth moment of a standardised Poisson is 3 + 1 / rate
    assert abs((z**2).mean() - 1) < 4 * np.sqrt((2 + 1 / rate).mean() / z.size)
    depth = np.log(rate.sum(1))
    n = len(depth)
    assert abs(depth.mean() - np.log(2000)) < 4 * 0.2 / np.sqrt(n) and abs(depth.std() - 0.2) < 4 * 0.2 / np.sqrt(2 * n)
    correlation = np.corrcoef(np.column_stack([depth, u]).T)[0, 1:]
    assert np.abs(correlation).max() < 4 / np.sqrt(n)


@pytest.mark.parametrize("replicate", [False, True])
def test_sams_noise_is_a_fifth_of_the_variance(replicate: bool) -> None:
    adata = sams_screen(cells_per_perturbation=100, replicate=replicate, seed=0)
    mean, noise = adata.obsm["rate"].astype(float), dense(adata) - adata.obsm["rate"]
    np.testing.assert_allclose(mean.var(0), 1.0, rtol=1e-4)
    n = len(mean)
    share = noise.var(0) / (noise.var(0) + mean.var(0))
    assert np.abs(share - 0.2).max() < 4 * 0.2 * 0.8 * np.sqrt(2 / n)  # of 100 genes
    assert abs(share.mean() - 0.2) < 4 * 0.2 * 0.8 * np.sqrt(2 / n) / 10
    assert np.abs(noise.mean(0)).max() < 4 * 0.5 / np.sqrt(n)


def test_sams_targets_are_bernoulli_and_only_the_replicate_mode_leaves_empty_rows() -> None:
    def masks(replicate: bool) -> np.ndarray:
        screens = (sams_screen(cells_per_perturbation=1, n_genes=2, replicate=replicate, seed=s) for s in range(20))
        return np.concatenate([a.uns["truth"]["mask"] for a in screens])

    published, mended = masks(True), masks(False)
    rate, empty = 2 / 15, (13 / 15) ** 15
    assert abs(published.mean() - rate) < 4 * np.sqrt(rate * (1 - rate) / published.size)
    assert abs((published.sum(1) == 0).mean() - empty) < 4 * np.sqrt(empty * (1 - empty) / len(published))
    assert (mended.sum(1) > 0).all()
    np.testing.assert_array_equal(mended[published.sum(1) > 0], published[published.sum(1) > 0])


@pytest.mark.parametrize("interaction", [0.0, 0.5, -1.0])
def test_sams_doubles_add_and_interactions_scale_the_sum(interaction: float) -> None:
    n = 400
    adata = sams_screen(
        n_perturbations=20, cells_per_perturbation=5, n_genes=10, doubles=12, cells_per_double=n, interaction=interaction, seed=7
    )
    truth, labels = adata.uns["truth"], adata.obs["perturbation"].astype(str).to_numpy()
    row = {name: k for k, name in enumerate(truth["perturbations"])}
    doubles = sorted(label for label in set(labels) if "+" in label)
    assert len(doubles) == 12
    for label in doubles:
        a, b = label.split("+")
        assert a < b
        cells = adata.obsm["u"][labels == label].astype(float)
        assert len(cells) == n
        shift = (1 + interaction) * (truth["effect"][row[a]] + truth["effect"][row[b]])
        assert np.abs(cells.mean(0) - shift).max() < 4.2 / np.sqrt(n)  # 180 means in all
    data = pc.PerturbationData.from_anndata(sams_screen(**SMALL, doubles=3))
    assert data.condition_counts() == (12, 3) and list(data.perturbations) == list(row)[:12]
