"""The report: on a tiny screen against the API calls that it stands for, and on a real screen (slow)."""

import base64
import re
import sys
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest

import pyrocausal as pc
from pyrocausal import evaluate, report
from pyrocausal.cli import main
from pyrocausal.collection import ENTRIES
from pyrocausal.errors import DataError, PyrocausalError
from pyrocausal.report import Demo, demo, sharing_groups, target_draws

PNG = b"\x89PNG\r\n\x1a\n"
PICTURES = {"elbo", "target_mask", "predicted_vs_measured", "effects_heatmap", "effects_forest"}
TABLES = {"effects.csv", "scores.csv", "scores_by_intervention.csv", "target_mask.csv"}


@pytest.fixture(scope="module")
def screen() -> ad.AnnData:
    """480 cells x 40 genes of known truth, with two combinations."""
    return pc.simulate.sams_screen(
        n_perturbations=5, n_latent=3, cells_per_perturbation=60, n_genes=40, n_control=100, doubles=2, cells_per_double=40, seed=1
    )


@pytest.fixture(scope="module")
def result(screen: ad.AnnData, tmp_path_factory: pytest.TempPathFactory) -> Demo:
    data = pc.PerturbationData.from_anndata(screen)
    return demo(data, tmp_path_factory.mktemp("demo") / "out", n_latent=4, max_epochs=120, draws=60, truth=screen, name="<tiny> & co")


@pytest.fixture(scope="module")
def test_cells(screen: ad.AnnData) -> pc.PerturbationData:
    return pc.PerturbationData.from_anndata(screen).split("cells", test=0.2, seed=0)[1]


# -- the folder ------------------------------------------------------------------------------------------------------------------


def test_the_folder_holds_page_tables_pictures_and_fit(result: Demo) -> None:
    names = {p.name for p in result.out.iterdir()}
    assert names == {"report.html", "run"} | TABLES | {f"{p}.png" for p in PICTURES}
    for picture in PICTURES:
        assert (result.out / f"{picture}.png").read_bytes().startswith(PNG)


def test_the_page_loads_nothing_from_elsewhere(result: Demo) -> None:
    page = (result.out / "report.html").read_text(encoding="utf-8")
    bare = re.sub(r'src="data:image/png;base64,[^"]*"', "", page)
    assert "http" not in bare.replace("http://www.w3.org/2000/svg", "")
    for word in ("<script", "<link", "@import", "url(", "src="):
        assert word not in bare
    inside = {base64.b64decode(m) for m in re.findall(r"data:image/png;base64,([^\"]*)", page)}
    assert inside == {(result.out / f"{p}.png").read_bytes() for p in PICTURES}
    assert "&lt;tiny&gt; &amp; co" in page and "<tiny>" not in page


def test_nothing_written_names_a_path(result: Demo) -> None:
    for file in result.out.rglob("*"):
        if file.suffix in (".html", ".csv", ".json"):
            text = file.read_text(encoding="utf-8")
            assert str(result.out) not in text and str(Path.home()) not in text and sys.prefix not in text, file.name


def test_the_tables_on_disk_are_those_returned(result: Demo) -> None:
    pd.testing.assert_frame_equal(pd.read_csv(result.out / "effects.csv"), result.effects, check_dtype=False, rtol=1e-6)
    scores = pd.read_csv(result.out / "scores.csv", index_col="method")
    np.testing.assert_allclose(scores["total_mse"], result.scores["total_mse"])
    mask = pd.read_csv(result.out / "target_mask.csv", index_col="perturbation")
    np.testing.assert_allclose(mask, result.target_mask)
    each = pd.read_csv(result.out / "scores_by_intervention.csv", index_col=["method", "intervention"])
    np.testing.assert_allclose(each["mse"], result.by_intervention["mse"])


# -- the numbers -------------------------------------------------------------------------------------------------------------------


def test_the_measured_effects_are_of_the_held_out_cells(result: Demo, test_cells: pc.PerturbationData) -> None:
    measured = evaluate.measured_effects(test_cells)
    for label, rows in result.effects.groupby("intervention"):
        there = measured.sel(intervention=label, gene=list(rows["gene"]))
        np.testing.assert_allclose(rows["measured"], there["effect"])
        np.testing.assert_allclose(rows["measured_se"], there["se"])
        np.testing.assert_allclose(rows["p_value"], there["p_value"])


def test_the_effects_are_those_of_the_saved_fit(result: Demo) -> None:
    fitted = pc.load(result.out / "run")
    labels = list(dict.fromkeys(result.by_intervention.loc["model"].index))
    effects = pc.effects(fitted, {k: pc.interventions.parse(k) for k in labels}, draws=60, cells=64, seed=0)["effect"]
    for label, rows in result.effects.groupby("intervention"):
        low, mid, high = np.quantile(effects.sel(intervention=label, gene=list(rows["gene"])), [0.05, 0.5, 0.95], axis=0)
        np.testing.assert_allclose(rows["median"], mid, atol=1e-5)
        np.testing.assert_allclose(rows["lower"], low, atol=1e-5)
        np.testing.assert_allclose(rows["upper"], high, atol=1e-5)


def test_the_scores_are_those_of_evaluate(result: Demo, screen: ad.AnnData, test_cells: pc.PerturbationData) -> None:
    train = pc.PerturbationData.from_anndata(screen).split("cells", test=0.2, seed=0)[0]
    measured = evaluate.measured_effects(test_cells)
    labels = list(result.by_intervention.loc["model"].index)
    for kind in ("control", "mean", "train"):
        expected = evaluate.score_effects(evaluate.baseline_effects(train, labels, kind), measured)
        np.testing.assert_allclose(result.by_intervention.loc[kind, "mse"], expected["mse"])
    assert set(result.by_intervention.loc["additive"].index) == {k for k in labels if "+" in k}, "additive is about combinations"
    row = result.scores.loc["additive"]
    ours = result.by_intervention.loc["model", "mse"][result.by_intervention.loc["additive"].index]
    assert row["interventions"] == 2 and row["model_mse"] == pytest.approx(ours.sum())
    assert result.scores.loc["model", "total_mse"] == pytest.approx(result.by_intervention.loc["model", "mse"].sum())


def test_words_follow_from_the_numbers(result: Demo) -> None:
    for kind in ("control", "mean", "train", "additive"):
        sentence = next(w for w in result.words if f"'{kind}' (" in w)
        row = result.scores.loc[kind]
        change = row["model_mse"] / row["total_mse"] - 1
        assert ("wins against" in sentence) == (change <= -0.01) and ("loses to" in sentence) == (change >= 0.01)
        theirs = result.by_intervention.loc[kind, "mse"]
        ratio = result.by_intervention.loc["model", "mse"][theirs.index] / theirs
        closer = int((ratio <= 0.99).sum())
        assert (f"closer in {closer}" in sentence) if closer else ("closer" not in sentence)
        for label in ratio.index[ratio >= 1.01][:8]:
            assert label in sentence


def test_the_strongest_come_first_and_singles_before_combinations(result: Demo) -> None:
    order = list(dict.fromkeys(result.effects["intervention"]))
    assert order[:5] == [k for k in order if "+" not in k] and len(order) == 7
    size = np.square(result.effects.set_index("intervention")["median"]).groupby(level=0).sum()
    assert list(size[order[:5]]) == sorted(size[order[:5]], reverse=True)


def test_the_truth_is_found_and_scored_by_evaluate(result: Demo, screen: ad.AnnData, test_cells: pc.PerturbationData) -> None:
    assert result.truth is not None
    u = report.cell_programs(result.fit, test_cells)
    rows = screen.obs_names.get_indexer(test_cells.cells)
    mcc = evaluate.mcc(screen.obsm["u"][rows], u)
    f1 = evaluate.mask_scores(screen.uns["truth"]["mask"], result.target_mask.to_numpy(), mcc.columns).f1
    assert result.truth["MCC"] == pytest.approx(mcc.value) and result.truth["mask F1"] == pytest.approx(f1)
    assert result.truth["mask F1"] > 0.7
    assert any(f"mask F1 {f1:.3f}" in w for w in result.words)


def test_groups_and_inert_follow_from_the_mask(result: Demo) -> None:
    on = result.target_mask > 0.5
    assert result.inert == list(on.index[~on.any(axis=1)])
    shared = {int(d): sorted(on.index[on[d]]) for d in on.columns if on[d].sum() > 1}
    assert {row.program: sorted(row.perturbations) for row in result.groups.itertuples()} == shared


def test_sharing_is_the_least_probability_of_any_two(result: Demo) -> None:
    draws, n_perturbations, n_programs = 100, 5, 4
    mask = np.zeros((draws, n_perturbations, n_programs))
    mask[:, 0, 2] = mask[:, 1, 2] = 1
    mask[:80, 3, 2] = 1  # shares program 2 with a probability of .8
    mask[:, 4, 1] = 1  # alone
    effect = np.full(mask.shape, -2.0)
    effect[:, 1, 2] = 3.0
    groups = sharing_groups(result.fit, mask, effect)
    names = result.fit.coords["perturbation"]
    assert len(groups) == 1
    row = groups.iloc[0]
    assert row["program"] == 2 and row["perturbations"] == [names[0], names[1], names[3]]
    assert row["sharing"] == pytest.approx(0.8) and row["opposite"] == [names[1]]
    assert len(row["genes"]) == 6 and all(g.endswith((" up", " down")) for g in row["genes"])


@pytest.mark.parametrize("name", [n for n, e in ENTRIES.items() if e.model != "Baseline"] + ["additive_eb"])
def test_every_model_of_the_collection_can_be_reported(name: str, small_screen: ad.AnnData, tmp_path: Path) -> None:
    data = pc.PerturbationData.from_anndata(small_screen)
    found = demo(data, tmp_path / "out", model=name, n_latent=3, max_epochs=2, draws=8, truth=small_screen)
    mask, _ = target_draws(found.fit, draws=20)
    assert (mask is None) == (
        name in ("cpa_vae", "sccvae_parity", "discrepancy_vae", "linear_lcd", "lcd", "scm", "cite_vae", "perturbed_vae", "additive_eb")
    )  # dense, soft, or none
    assert (tmp_path / "out" / "report.html").is_file()
    told = found.fit.settings["batch_size"], found.fit.settings["lr"]
    assert told == {"sccvae_parity": (32, 5e-4), "discrepancy_vae": (32, 1e-3)}.get(name, (256, 3e-3))  # as published
    if mask is None:
        assert any("no target mask" in w for w in found.words) and found.truth is None
    else:
        assert found.target_mask.shape == (5, 3) and mask.shape == (20, 5, 3)


# -- where it writes -----------------------------------------------------------------------------------------------------------------


def test_an_earlier_demo_is_replaced_and_anything_else_is_not(small_screen: ad.AnnData, tmp_path: Path) -> None:
    data = pc.PerturbationData.from_anndata(small_screen)
    small = {"n_latent": 2, "max_epochs": 1, "draws": 4}
    (tmp_path / "out").mkdir()  # empty: may be used
    demo(data, tmp_path / "out", **small)
    (tmp_path / "out" / "notes.txt").write_text("mine")
    before = (tmp_path / "out" / "effects.csv").read_text()
    demo(data, tmp_path / "out", knockouts=["pert1"], **small)
    assert (tmp_path / "out" / "effects.csv").read_text() != before and (tmp_path / "out" / "notes.txt").read_text() == "mine"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "report.html").write_text("<html>somebody's</html>")
    with pytest.raises(DataError, match="not the folder of an earlier demo"):
        demo(data, tmp_path / "other", **small)
    assert [p.name for p in (tmp_path / "other").iterdir()] == ["report.html"]


def test_a_screen_too_small_to_hold_cells_out_is_refused_before_it_is_fitted(small_screen: ad.AnnData, tmp_path: Path) -> None:
    few_controls = small_screen[np.r_[0:150, 150:152]].copy()
    with pytest.raises(DataError, match="2 control cells, too few"):
        demo(pc.PerturbationData.from_anndata(few_controls), tmp_path / "out", max_epochs=10**9)
    few_cells = small_screen[np.r_[0:4, 30:34, 150:190]].copy()
    few_cells = few_cells[:, np.asarray(few_cells.X.sum(0)).ravel() > 0].copy()
    with pytest.raises(DataError, match="every condition has too few cells"):
        demo(pc.PerturbationData.from_anndata(few_cells), tmp_path / "out", max_epochs=10**9)
    assert not (tmp_path / "out").exists()


def test_an_interrupt_before_the_first_epoch_writes_nothing(
    small_screen: ad.AnnData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["pyrocausal.fit"], "run_epoch", interrupted)
    with pytest.raises(PyrocausalError, match="nothing is written"):
        demo(pc.PerturbationData.from_anndata(small_screen), tmp_path / "out", max_epochs=3)
    assert not (tmp_path / "out").exists()


# -- the simulated demo and a real screen ---------------------------------------------------------------------------------------------


def test_the_demo_screen_is_what_it_says() -> None:
    adata = pc.demo_screen()
    again = pc.demo_screen()
    assert adata.shape == (3000, 200) and (adata.X != again.X).nnz == 0, "deterministic"
    assert 0.2 < adata.X.nnz / 600_000 < 0.3 and 300 < np.median(np.asarray(adata.X.sum(1))) < 500
    data = pc.PerturbationData.from_anndata(adata, batch_key="batch")
    assert data.condition_counts() == (16, 4) and data.is_control.sum() == 300 and len(data.batches) == 2
    truth = adata.uns["truth"]
    assert list(truth["perturbations"]) == list(data.perturbations)
    mask = pd.DataFrame(truth["mask"], index=truth["perturbations"], columns=truth["programs"])
    assert sorted(mask.sum()) == [1, 1, 2, 4] and (mask.sum(axis=1) == 0).sum() == 8
    assert ((truth["effect"] != 0) == (truth["mask"] != 0)).all()
    interferon = adata.var["program"] == "interferon"
    rates = pd.DataFrame(adata.obsm["rate"], index=adata.obs["perturbation"].astype(str)).groupby(level=0).mean()
    assert rates.loc["STAT1", interferon.to_numpy()].sum() < 0.4 * rates.loc["control", interferon.to_numpy()].sum()
    assert rates.loc["RHO", interferon.to_numpy()].sum() == pytest.approx(rates.loc["control", interferon.to_numpy()].sum(), rel=0.2)


@pytest.mark.slow
def test_the_demo_on_a_real_screen(data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Papalexi et al. 2021: the interferon pathway shares a program, most other knock-outs do nothing, and held-out cells are predicted."""
    path = data_dir / "papalexi2021_thp1_crisprko_299g.h5ad"
    if not path.is_file():
        pytest.skip(f"{path.name} is not in the data folder")
    assert main(["demo", str(path), "--modality", "knockout", "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    pathway = ["IFNGR1", "IFNGR2", "JAK2", "STAT1"]
    mask = pd.read_csv(tmp_path / "out" / "target_mask.csv", index_col="perturbation")
    assert (mask.loc[pathway] > 0.5).all().any(), "one program that all four target"
    assert re.search("IFNGR1.*IFNGR2.*JAK2.*STAT1.* share program", printed)
    others = mask.drop(index=pathway)
    assert (others <= 0.5).all(axis=1).mean() >= 0.6, "at least 60 % of the other 21 target nothing"
    effects = pd.read_csv(tmp_path / "out" / "effects.csv").set_index(["intervention", "gene"])
    for knockout in pathway:
        for gene in ("STAT1", "PSMB9", "UBE2L6"):
            assert effects.loc[(knockout, gene), "upper"] < 0, f"{knockout} lowers {gene}"
    scores = pd.read_csv(tmp_path / "out" / "scores.csv", index_col="method")
    assert scores.loc["model", "total_mse"] < scores.loc["control", "total_mse"]
