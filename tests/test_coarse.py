"""Screens of modules: clusters and loadings against the truth of a screen whose genes follow a small linear system."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest

import pyrocausal as pc
from pyrocausal.dynamics.coarse import coarsen
from pyrocausal.errors import DataError
from pyrocausal.simulate_sde import linear_sde_screen

N_MODULES, PER_MODULE = 8, 25


@pytest.fixture(scope="module")
def screen():
    """200 genes in 8 modules; the first gene of a module gives its name to the perturbation of the module."""
    system = linear_sde_screen(N_MODULES, N_MODULES, degree=2, cells_per_perturbation=300, seed=3)
    rng = np.random.default_rng(0)
    states = np.asarray(system.X, float)
    weight = rng.uniform(0.7, 1.3, N_MODULES * PER_MODULE)
    x = np.repeat(states / states.std(0), PER_MODULE, 1) * weight + 0.3 * rng.normal(size=(len(states), N_MODULES * PER_MODULE))
    genes = [f"m{k}g{i:02d}" for k in range(N_MODULES) for i in range(PER_MODULE)]
    label = system.obs["perturbation"].astype(str).map(lambda p: p if p == "control" else f"m{int(p[4:])}g00")
    adata = ad.AnnData(x.astype(np.float32), pd.DataFrame({"perturbation": label}), pd.DataFrame(index=genes))
    return (
        pc.PerturbationData.from_anndata(adata, kind="normalised"),
        states,
        system.uns["truth"],
        weight / states.std(0).repeat(PER_MODULE),
    )


def given(data):
    return {f"m{k}": [g for g in data.genes if g.startswith(f"m{k}g")] for k in range(N_MODULES)}


def test_given_modules_and_the_way_back_to_genes(screen):
    """Scores are the states, whose network is LinearLCD's to find; changes of genes are the true ones within 10 %."""
    data, states, truth, weight = screen
    coarse = coarsen(data, given(data))
    assert [coarse.data.genes[m] for m in coarse.own_genes] == [str(p)[:2] for p in data.perturbations]
    scores = coarse.data.dense()
    assert min(np.corrcoef(scores[:, k], states[:, k])[0, 1] for k in range(N_MODULES)) > 0.995
    model, guide = pc.build("linear_lcd", coarse.data, own_genes=coarse.own_genes, diffusion="learned", draws=0)
    fit = pc.fit(model, guide, coarse.data, max_epochs=1000, kl_warmup=0.0)
    asked = [str(p) for p in data.perturbations]
    genes = coarse.to_genes(pc.effects(fit, asked, draws=1)["effect"])
    assert genes.dims == ("intervention", "draw", "gene") and list(genes["gene"].to_numpy()) == list(data.genes)
    at = [list(truth["conditions"]).index(f"gene{p[1]}") for p in asked]
    true = (truth["means"][at] - truth["means"][0]).repeat(PER_MODULE, 1) * weight
    assert np.linalg.norm(genes[:, 0].to_numpy() - true) < 0.1 * np.linalg.norm(true)


def test_modules_are_found_in_blocks():
    """Six blocks of correlated genes; a gene that does not vary belongs to none."""
    rng = np.random.default_rng(1)
    block = np.arange(60) % 6
    x = rng.normal(size=(400, 6))[:, block] + 0.5 * rng.normal(size=(400, 60))
    x[:, 59] = 2.0
    obs = pd.DataFrame({"perturbation": np.repeat(["control", "g0"], 200)}, index=[str(i) for i in range(400)])
    adata = ad.AnnData(x.astype(np.float32), obs, pd.DataFrame(index=[f"g{i}" for i in range(60)]))
    coarse = coarsen(pc.PerturbationData.from_anndata(adata, kind="normalised"), 6)
    assert sorted(sorted(int(g[1:]) % 6 for g in genes) for genes in coarse.members.values()) == [[k] * (10 - (k == 5)) for k in range(6)]
    assert coarse.members[coarse.data.genes[coarse.own_genes[0]]].count("g0") == 1
    assert (coarse.loadings["g59"] == 0).all()


def test_bad_modules_are_refused(screen):
    data = screen[0]
    for modules, message in (
        ({"a": ["none"]}, "'none', which is not in the screen"),
        ({"a": ["m0g00"], "b": ["m0g00"]}, "in two modules"),
        ({"a": []}, "without genes"),
        (1, "1 modules were asked for"),
    ):
        with pytest.raises(DataError, match=message):
            coarsen(data, modules)
