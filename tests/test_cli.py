"""The command line: real runs on a tiny screen, exit codes, one-line errors."""

import re
import signal
import subprocess
import sys
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest

import pyrocausal as pc
from pyrocausal.cli import INTERRUPTED, main


@pytest.fixture(scope="module")
def screen(tmp_path_factory: pytest.TempPathFactory, small_screen: ad.AnnData) -> Path:
    """A tiny screen as a file; its perturbation column has another name, and it has a batch column."""
    adata = small_screen.copy()
    adata.obs["batch"] = np.where(np.arange(adata.n_obs) % 2, "a", "b")
    adata.obs["target"] = adata.obs["perturbation"].astype(str).replace({"control": "none"})
    path = tmp_path_factory.mktemp("screen") / "tiny.h5ad"
    adata.write_h5ad(path)
    return path


@pytest.fixture(scope="module")
def run(screen: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved fit of the tiny screen, made on the command line."""
    out = tmp_path_factory.mktemp("fit") / "run"
    assert main(["fit", str(screen), "--out", str(out), "--epochs", "60", "--latent", "4", "--modality", "knockout"]) == 0
    return out


def refused(capsys: pytest.CaptureFixture[str], argv: list[str]) -> str:
    """The one line that a command prints when it refuses."""
    assert main(argv) == 2
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("pyrocausal: ")
    assert "Traceback" not in captured.err
    return lines[0]


# -- fit -----------------------------------------------------------------------------------------------------------------------


def test_fit_saves_a_run_that_loads(run: Path) -> None:
    fitted = pc.load(run)
    assert len(fitted.history) == 60
    assert fitted.coords["batch"] == ["a", "b"], "obs['batch'] is used by default"
    assert fitted.coords["modality"] == "knockout"
    assert fitted.model.shape == (5, 4)


def test_fit_reads_the_columns_it_is_told(screen: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["fit", str(screen), "--out", str(tmp_path / "r"), "--perturbation-key", "target", "--control", "none", "--epochs", "1"]
    assert main([*argv, "--latent", "2", "--model", "svae_plus"]) == 0
    fitted = pc.load(tmp_path / "r")
    assert fitted.coords["control"] == "none" and type(fitted.model).__name__ == "SVAEPlus"
    assert str(tmp_path / "r") in capsys.readouterr().out, "the user's own --out is named"


def test_resume_equals_the_uninterrupted_run(screen: Path, tmp_path: Path) -> None:
    base = ["fit", str(screen), "--latent", "3", "--epochs", "12", "--checkpoint"]
    assert main([*base, str(tmp_path / "a.npz"), "--out", str(tmp_path / "whole")]) == 0
    data = pc.PerturbationData.from_anndata(screen, batch_key="batch")
    pair = pc.build("sams_vae", data, n_latent=3)
    pc.fit(*pair, data, max_epochs=12, checkpoint=tmp_path / "b.npz", callback=lambda epoch, row: epoch == 10)
    assert main([*base, str(tmp_path / "b.npz"), "--resume", "--out", str(tmp_path / "resumed")]) == 0
    whole, resumed = pc.load(tmp_path / "whole"), pc.load(tmp_path / "resumed")
    for (name, a), b in zip(whole.elbo.state_dict().items(), resumed.elbo.state_dict().values(), strict=True):
        assert a.equal(b), name


def test_interrupt_keeps_what_was_fitted(
    screen: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> None:
    module = sys.modules["pyrocausal.fit"]  # pyrocausal.fit is the function
    original, epochs = module.run_epoch, []

    def interrupted(*arguments: object) -> object:
        epochs.append(1)
        if len(epochs) == 3:
            signal.raise_signal(signal.SIGINT)
        return original(*arguments)

    monkeypatch.setattr(module, "run_epoch", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job starts with it ignored
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    assert main(["fit", str(screen), "--out", str(tmp_path / "r"), "--epochs", "9", "--latent", "2"]) == INTERRUPTED
    assert "interrupted after 2 of 9 epochs; what was fitted until then was kept" in capsys.readouterr().err
    assert len(pc.load(tmp_path / "r").history) == 2


# -- query ---------------------------------------------------------------------------------------------------------------------


def test_query_prints_the_strongest_genes_and_writes_all(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, fitted = tmp_path / "q.csv", pc.load(run)
    size = pc.effects(fitted, fitted.coords["perturbation"], draws=20)["effect"].median("draw").std("gene").to_series()
    single, pair = str(size.idxmax()), "pert1+pert2"
    assert main(["query", str(run), single, pair, "--draws", "20", "--top", "3", "--csv", str(out)]) == 0
    printed = capsys.readouterr().out
    table = pd.read_csv(out)
    assert table.groupby("intervention").size().to_dict() == {single: 30, pair: 30}
    expected = pc.effects(fitted, [single, pair], draws=20)["effect"].quantile([0.05, 0.5, 0.95], dim="draw")
    for column, q in (("lower", 0.05), ("median", 0.5), ("upper", 0.95)):
        np.testing.assert_allclose(table[column], expected.sel(quantile=q).to_numpy().ravel(), rtol=1e-4, atol=1e-6)
    first = table[table["intervention"] == single]
    assert first["median"].abs().max() > 0.1
    for gene in first.loc[first["median"].abs().nlargest(3).index, "gene"]:
        assert re.search(rf"\b{gene}\b", printed)
    assert "log1p_cp10k" in printed


def test_query_at_a_dose_and_penetrance(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, extra in (("none", ["--dose", "0"]), ("half", ["--penetrance", "0.5"]), ("full", [])):
        argv = ["query", str(run), "pert3", "--draws", "20", "--csv", str(tmp_path / f"{name}.csv"), "--genes", "gene01", "gene00", *extra]
        assert main(argv) == 0
    printed = capsys.readouterr().out
    assert "pert3 (dose 0)" in printed and "pert3 (penetrance 0.5)" in printed
    tables = {name: pd.read_csv(tmp_path / f"{name}.csv") for name in ("none", "half", "full")}
    assert list(tables["full"]["gene"]) == ["gene01", "gene00"], "the genes asked for, in their order"
    assert (tables["none"]["median"] == 0).all()
    fitted = pc.load(run)
    expected = pc.effects(fitted, pc.perturb("pert3", penetrance=0.5), draws=20)["effect"].sel(gene=["gene01", "gene00"]).median("draw")
    np.testing.assert_allclose(tables["half"]["median"], expected.to_numpy().ravel(), rtol=1e-4, atol=1e-6)


# -- errors ----------------------------------------------------------------------------------------------------------------------


def test_a_file_that_is_no_screen_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = tmp_path / "bad.h5ad"
    bad.write_text("not a screen")
    assert "cannot be read as .h5ad" in refused(capsys, ["demo", str(bad), "--out", str(tmp_path / "o")])
    assert "there is no file" in refused(capsys, ["fit", str(tmp_path / "absent.h5ad"), "--out", str(tmp_path / "o")])
    assert not (tmp_path / "o").exists()


def test_wrong_names_are_refused_with_the_nearest(screen: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit = ["fit", str(screen), "--out", str(tmp_path / "o")]
    assert "'sams_vae'" in refused(capsys, [*fit, "--model", "sams_va"])
    assert "'perturbation'" in refused(capsys, [*fit, "--perturbation-key", "perturbations"])
    assert "name the control" in refused(capsys, [*fit, "--control", "NT"])
    assert "--checkpoint" in refused(capsys, [*fit, "--resume"])
    assert "'pert1'" in refused(capsys, ["query", str(run), "pertt1"])
    assert "'gene01'" in refused(capsys, ["query", str(run), "pert1", "--genes", "gene001"])
    assert "dose" in refused(capsys, ["query", str(run), "pert1", "--dose", "-1"])
    assert "penetrance" in refused(capsys, ["query", str(run), "pert1", "--penetrance", "2"])
    assert "more than once" in refused(capsys, ["query", str(run), "pert1", "pert1"])
    demo = ["demo", str(screen), "--out", str(tmp_path / "o"), "--epochs", "1"]
    assert "'pert1'" in refused(capsys, [*demo, "--show", "pertt1"])
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("damage", ["no run", "truncated json", "truncated state", "no state"])
def test_a_damaged_run_is_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in run.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    if damage == "no run":
        (copy / "run.json").unlink()
    elif damage == "truncated json":
        (copy / "run.json").write_text((copy / "run.json").read_text()[:100])
    elif damage == "truncated state":
        (copy / "state.npz").write_bytes((copy / "state.npz").read_bytes()[:500])
    else:
        (copy / "state.npz").unlink()
    message = refused(capsys, ["query", str(copy), "pert1"])
    assert any(word in message for word in ("damaged", "holds no run.json", "there is no file"))


def test_what_is_no_fit_is_not_overwritten(screen: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    (tmp_path / "file").write_text("keep")
    for name in ("mine", "file"):
        for command in ("fit", "demo"):
            assert "give another folder" in refused(capsys, [command, str(screen), "--out", str(tmp_path / name), "--epochs", "1"])
    assert (tmp_path / "mine" / "notes.txt").read_text() == (tmp_path / "file").read_text() == "keep"


def test_a_folder_that_cannot_be_written_is_one_line(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "absent" in refused(capsys, ["query", str(run), "pert1", "--draws", "2", "--csv", str(tmp_path / "absent" / "q.csv")])


# -- help ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("argv", [["--help"], ["demo", "--help"], ["fit", "--help"], ["query", "--help"], ["models", "--help"]])
def test_help_says_what_to_give(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(argv)
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert "usage: pyrocausal" in text
    if len(argv) == 1:
        for command in ("demo", "fit", "query", "models"):
            assert command in text
    if argv[0] in ("demo", "fit"):
        for option in ("--out", "--perturbation-key", "--control", "--batch-key", "--layer", "--separator", "--model", "--epochs"):
            assert option in text


def test_wrong_usage_exits_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in ([], ["fit"], ["nonsense"], ["fit", "x.h5ad", "--out", "o", "--epochs", "0"], ["query", "run"]):
        with pytest.raises(SystemExit) as ended:
            main(argv)
        assert ended.value.code == 2
    capsys.readouterr()


def test_models_lists_the_collection(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models"]) == 0
    printed = capsys.readouterr().out
    for name in pc.models().index:
        assert name in printed


def test_the_installed_command_runs() -> None:
    """A process of its own: the version, and an error's exit status."""
    code = "import sys; from pyrocausal.cli import main; sys.exit(main(sys.argv[1:]))"
    version = subprocess.run([sys.executable, "-c", code, "--version"], capture_output=True, text=True, check=True)
    assert re.fullmatch(r"pyrocausal \d+\.\d+\S*\n", version.stdout)
    failed = subprocess.run([sys.executable, "-c", code, "query", "no-such-run", "A"], capture_output=True, text=True, check=False)
    assert failed.returncode == 2 and failed.stdout == ""
    assert len(failed.stderr.splitlines()) == 1
