"""SCCVAE on a screen of known truth: its graph, perturbations that no cell received, twins of measured cells, doses."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import pyrocausal as pc
from pyrocausal import simulate_graph
from pyrocausal.errors import DataError, InterventionError

SCREEN = {"n_latent": 6, "n_genes": 90, "n_perturbations": 30, "cells_per_perturbation": 120, "n_control": 600, "n_embedding": 5}


@pytest.fixture(scope="module")
def adata():
    return simulate_graph.graph_screen(**SCREEN, edge_probability=0.3)


@pytest.fixture(scope="module")
def data(adata) -> pc.PerturbationData:
    return pc.PerturbationData.from_anndata(adata, kind="normalised")


HELD = ["pert03", "pert11", "pert17", "pert20", "pert24", "pert28"]


@pytest.fixture(scope="module")
def fit(adata, data: pc.PerturbationData) -> pc.Fit:
    train, _ = data.split("perturbations", test=HELD)
    table = simulate_graph.embedding_table(adata).sample(frac=1, random_state=0)  # by name, whatever the order
    model, guide = pc.build(
        "sccvae", data, n_latent=6, embedding=table, decoder="anchored", anchors=(adata.varm["loadings"] > 0).T, n_hidden=32
    )
    return pc.fit(model, guide, train, max_epochs=40, batch_size=128, seed=0)


@pytest.fixture(scope="module")
def adapted(fit: pc.Fit, data: pc.PerturbationData) -> pc.Fit:
    return pc.adapt(fit, data.split("perturbations", test=HELD)[1].split("cells", test=0.5)[0])


def test_the_graph_and_the_targets_are_found(adata, fit: pc.Fit) -> None:
    truth = adata.uns["truth"]
    found = fit.guide.edges.mean().numpy()
    assert ((np.abs(found) > 0.2) == (truth["graph"] != 0)).all()
    np.testing.assert_allclose(found[truth["graph"] != 0], truth["graph"][truth["graph"] != 0], atol=0.12)
    seen = fit.cells_per_perturbation > 0
    assert (fit.guide.table.logits.argmax(1).numpy() == truth["mask"].argmax(1))[seen].all()
    c = fit.guide.table.expected().sum(1).numpy()
    assert np.abs(c - truth["penetrance"])[seen].mean() < 0.12  # sampling error of the mean of 120 cells: .09


def test_the_order_of_the_programs_is_found_from_the_interventions(adata, data: pc.PerturbationData) -> None:
    places = np.array([4, 1, 5, 0, 3, 2])
    anchors = (adata.varm["loadings"] > 0).T[places]
    model, guide = pc.build("sccvae", data, n_latent=6, graph="free", decoder="anchored", anchors=anchors, n_hidden=32)
    pc.fit(model, guide, data, max_epochs=40, batch_size=128, seed=0)
    found, true = guide.edges.mean().numpy(), adata.uns["truth"]["graph"][places][:, places]
    assert ((np.abs(found) > 0.2) == (true != 0)).all()


def test_unseen_perturbations_are_answered_by_their_embedding(adata, data: pc.PerturbationData, fit: pc.Fit) -> None:
    table = fit.guide.table
    rows = data.perturbations.get_indexer(HELD)
    assert (fit.cells_per_perturbation[rows] == 0).all()
    prior = fit.model.target_log_probs().exp().detach()
    torch.testing.assert_close(table.logits.softmax(-1)[rows], prior[rows], rtol=1e-3, atol=1e-4)  # q = p where nothing was seen
    right = adata.uns["truth"]["mask"].argmax(1)[rows]
    assert prior[rows, right].log().mean() > np.log(1 / 6) + 0.3  # better than chance, by the mean log-probability of the truth
    effect = pc.effects(fit, HELD, draws=50)["effect"]
    assert np.isfinite(effect).all() and float(effect.std("draw").mean()) > float(pc.effects(fit, "pert00")["effect"].std("draw").mean())


def test_a_model_without_embedding_refuses_unseen_perturbations(data: pc.PerturbationData) -> None:
    train, _ = data.split("perturbations", test=HELD)
    fit = pc.fit(*pc.build("sccvae", data, n_latent=3, n_hidden=8), train, max_epochs=1)
    with pytest.raises(InterventionError, match="no training cell received 'pert03'"):
        pc.effects(fit, "pert03")


def test_few_shot_recovers_penetrance_and_leaves_the_rest_alone(adata, fit: pc.Fit, adapted: pc.Fit) -> None:
    truth, new = adata.uns["truth"], [fit.coords["perturbation"].index(n) for n in HELD]
    table, before = adapted.guide.table, fit.guide.table
    assert (table.logits.argmax(1).numpy() == truth["mask"].argmax(1))[new].all()
    c, sd = table.expected().sum(1).numpy()[new], table.scale.numpy()[new, truth["mask"].argmax(1)[new]]
    assert (np.abs(c - truth["penetrance"][new]) < 4 * sd).all()  # six comparisons at four standard deviations: false alarm 4e-4
    old = [i for i in range(30) if i not in new]
    for name in ("logits", "loc", "scale"):
        assert torch.equal(getattr(table, name)[old], getattr(before, name)[old])
    for (name, a), (same, b) in zip(fit.model.named_parameters(), adapted.model.named_parameters(), strict=True):
        assert name == same and torch.equal(a, b), name


def test_few_shot_of_a_name_never_heard_needs_its_embedding(adata, fit: pc.Fit, data: pc.PerturbationData) -> None:
    cells = simulate_graph.graph_screen(**SCREEN, edge_probability=0.3, seed=0)
    cells = cells[cells.obs["perturbation"].isin(["pert00", "control"])].copy()
    cells.obs["perturbation"] = cells.obs["perturbation"].astype(str).replace({"pert00": "stranger"})
    new = pc.PerturbationData.from_anndata(cells, kind="normalised")
    with pytest.raises(DataError, match="'stranger' has none"):
        pc.adapt(fit, new)
    row = simulate_graph.embedding_table(adata).loc[["pert00"]].rename(index={"pert00": "stranger"})
    known = pc.adapt(fit, new, embedding=row)
    assert known.coords["perturbation"] == [*fit.coords["perturbation"], "stranger"]
    a, b = (known.guide.table.expected()[known.coords["perturbation"].index(n)] for n in ("stranger", "pert00"))
    torch.testing.assert_close(a, b, rtol=0, atol=0.15)  # the very same cells
    assert known.model.target_log_probs().shape == (31, 6)
    torch.testing.assert_close(known.model.target_log_probs()[:30], fit.model.target_log_probs())


def test_saved_with_its_tables(fit: pc.Fit, tmp_path: Path) -> None:
    fit.save(tmp_path / "run")
    again = pc.load(tmp_path / "run")
    np.testing.assert_array_equal(pc.effects(fit, HELD[:2], draws=5)["effect"], pc.effects(again, HELD[:2], draws=5)["effect"])
    assert "embedding" not in (tmp_path / "run" / "run.json").read_text()  # arrays are in the archive
    assert pc.adapt(again, pc.PerturbationData.from_anndata(simulate_graph.graph_screen(**SCREEN), kind="normalised")) is not None


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (pd.DataFrame(np.ones((2, 3)), index=["pert00", "pert01"]), "no row for 'pert02' \\(28 of 30"),
        (pd.DataFrame(np.ones((31, 3)), index=[*(f"pert{i:02d}" for i in range(30)), "pert00"]), "'pert00' more than once"),
    ],
)
def test_bad_embeddings_are_refused(data: pc.PerturbationData, table: pd.DataFrame, message: str) -> None:
    with pytest.raises(pc.errors.PyrocausalError, match=message):
        pc.build("sccvae", data, embedding=table)
    with pytest.raises(ValueError, match="4 rows was given for 30"):
        pc.build("sccvae", data, embedding=np.ones((4, 3)))


def test_twins_of_measured_cells_are_the_true_twins(adata, fit: pc.Fit, data: pc.PerturbationData) -> None:
    """Cells simulated under a perturbation, counterfactually untreated, against the same cell of the simulator without its shift."""
    truth = adata.uns["truth"]
    labels = np.asarray(data.labels)
    rows = np.flatnonzero(np.isin(labels, ["pert00", "pert05", "pert09"]))[::6]
    shift = np.stack([truth["effect"][int(label[4:])] for label in labels[rows]])
    undone = -shift @ np.linalg.inv(np.eye(6) - truth["graph"]) @ adata.varm["loadings"].T  # the true effect on each gene, cell by cell
    twins = pc.counterfactual(fit, data[rows], pc.untreated() if hasattr(pc, "untreated") else "control", draws=30)
    found = twins["effect"].isel(intervention=0).mean("draw").to_numpy()
    residual = ((found - undone) ** 2).sum() / ((undone - undone.mean()) ** 2).sum()
    assert 1 - residual >= 0.9
    mean = undone.mean(0)  # one mean effect for all perturbed cells
    assert ((found - undone) ** 2).sum() < 0.5 * ((mean - undone) ** 2).sum()
    np.testing.assert_allclose(twins["factual"], data[rows].dense())
    same = pc.counterfactual(fit, data[rows[:5]], {"again": pc.perturb("pert00")}, draws=2)
    assert float(abs(same["effect"]).max()) <= 1e-5  # the factual action (these are pert00 cells)


def test_dose_response_is_effects_over_a_grid(fit: pc.Fit) -> None:
    doses = [0.0, 0.5, 1.0, 2.0]
    curve = pc.dose_response(fit, ["pert00", "pert01"], doses, draws=20, cells=16)
    assert curve["effect"].dims == ("perturbation", "dose", "draw", "gene") and curve["effect"].shape == (2, 4, 20, 90)
    assert float(abs(curve["effect"].sel(dose=0.0)).max()) == 0
    plain = pc.effects(fit, ["pert00", "pert01"], draws=20, cells=16)["effect"]
    np.testing.assert_array_equal(curve["effect"].sel(dose=1.0), plain)
    linear = curve["effect"].sel(dose=2.0) - 2 * curve["effect"].sel(dose=1.0)  # linear equations, linear decoder, Gaussian
    assert float(abs(linear).max()) < 1e-4
    assert list(pc.dose_response(fit, "pert00", np.linspace(0, 1, 3), draws=2, cells=4)["dose"].values) == [0, 0.5, 1]
    for bad in (([], [1.0]), ("pert00", []), ("pert00", [1.0, 1.0])):
        with pytest.raises(InterventionError, match="distinct"):
            pc.dose_response(fit, *bad)


def test_a_dose_curve_can_be_drawn(fit: pc.Fit, data: pc.PerturbationData) -> None:
    from pyrocausal import evaluate, plots

    curve = pc.dose_response(fit, "pert00", [0, 1, 2], draws=10, cells=8)
    ax = plots.dose_curves(curve, "pert00", fit.coords["gene"][:2], evaluate.measured_effects(data))
    assert len(ax.lines) >= 4 and ax.get_xlabel().startswith("dose")
    with pytest.raises(DataError, match="0 genes"):
        plots.dose_curves(curve, "pert00", [])


@pytest.mark.longest
@pytest.mark.parametrize("likelihood", ["gaussian", "negative_binomial"])
def test_the_own_gene_of_a_perturbation_is_hit_directly(likelihood: str) -> None:
    """Every second perturbation has its gene measured, and loses 1.5 on the decoder's scale there, beside what its program does."""
    adata = simulate_graph.graph_screen(**SCREEN | {"n_control": 1500}, edge_probability=0.3, likelihood=likelihood, library_size=5000.0)
    names = [str(n) for n in adata.uns["truth"]["perturbations"]]
    owners = names[::2]
    level = np.asarray(adata.X.mean(0)).ravel()
    columns = np.argsort(-level)[: len(owners)]
    adata.var_names = [owners[list(columns).index(i)] if i in columns else g for i, g in enumerate(adata.var_names)]
    x = adata.X.toarray() if likelihood != "gaussian" else adata.X.copy()
    labels, rng = adata.obs["perturbation"].to_numpy(), np.random.default_rng(0)
    for name, column in zip(owners, columns, strict=True):
        mine = labels == name
        x[mine, column] = x[mine, column] - 1.5 if likelihood == "gaussian" else rng.binomial(x[mine, column].astype(int), np.exp(-1.5))
    adata.X = x.astype(np.float32)
    data = pc.PerturbationData.from_anndata(adata, kind="normalised" if likelihood == "gaussian" else "counts")
    held = owners[2::5]
    train, test = data.split("perturbations", test=held)
    table = simulate_graph.embedding_table(adata)
    fit = pc.fit(*pc.build("sccvae", data, n_latent=6, embedding=table, n_hidden=32), train, max_epochs=60, batch_size=128)
    h, seen = fit.guide.own_loc.detach().numpy(), [names.index(n) for n in owners if n not in held]
    assert abs(h[seen].mean() + 1.5) < 0.15 and abs(float(fit.model.own_loc.detach()) + 1.5) < 0.25
    rows = [names.index(n) for n in held]
    assert np.abs(h[rows] + 1.5).max() < 0.3  # zero-shot: as the others did
    size = pc.effects(fit, held, draws=100)["effect"].mean("draw")
    plain = pc.effects(fit, {n: pc.perturb(n, dose=0.0) for n in held}, draws=2, cells=4)["effect"]
    assert all(size.sel(intervention=n, gene=n) < size.sel(intervention=n).median() - 0.5 for n in held) and float(abs(plain).max()) == 0
    few = pc.adapt(fit, test)
    assert np.abs(few.guide.own_loc.detach().numpy()[rows] + 1.5).max() < 0.35
    assert torch.equal(few.guide.own_loc[seen], fit.guide.own_loc[seen])
