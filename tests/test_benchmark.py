"""Who wins: truths with a known answer, failures, copies, resumption bit for bit, and the false alarms of the paired test."""

import importlib
import itertools
import json
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import stats

import pyrocausal as pc
from pyrocausal.benchmark import plan
from pyrocausal.benchmark_paired import LEVEL_WITH, LOSES, WINS, assemble, best_baselines, paired_table, paired_test
from pyrocausal.benchmark_run import BASELINES, DUPLICATES
from pyrocausal.benchmark_score import Options, ask, judge, score
from pyrocausal.cli import main
from pyrocausal.errors import PyrocausalError
from pyrocausal.splits import halves, split

N, GENES = 12, 40
SPLIT = {"by": "cells", "test": 0.5}
FAST = {
    "splits": [SPLIT],
    "presets": ("perturbench",),
    "draws": 20,
    "cells": 2,
    "n_permutations": 9,
    "n_bootstrap": 50,
    "genes": "all",
    "max_epochs": 1,
}
OPTIONS = Options(("mejia",), 20, 2, 1, 10, True, "all", 0, 0)


def screen(cells: int, seed: int) -> pc.PerturbationData:
    """Poisson counts of twelve perturbations, of the first twelve genes by name."""
    rng, fixed = np.random.default_rng(seed), np.random.default_rng(5)
    base, effect = fixed.gamma(2.0, 1.0, GENES), 0.5 * fixed.normal(size=(N, GENES))
    code = np.repeat(np.arange(-1, N), [3 * cells, *[cells] * N])
    x = rng.poisson(base * np.exp(np.where(code[:, None] < 0, 0.0, effect[code])))
    names = np.array([*(f"g{k:02d}" for k in range(N)), "control"])[code]
    adata = ad.AnnData(x.astype(np.float32), obs=pd.DataFrame({"perturbation": names}).rename(index=str))
    adata.var_names = [f"g{g:02d}" for g in range(GENES)]
    return pc.PerturbationData.from_anndata(adata)


def additive(data: pc.PerturbationData) -> pc.Fit:
    return pc.fit(*pc.build("additive", data), data, progress=False)


def oracle(train: pc.PerturbationData, seed: int) -> pc.Fit:
    """Knows the truth: measured in an independent screen of 50 times as many cells."""
    return additive(screen(2000, 77))


def shuffled(train: pc.PerturbationData, seed: int) -> pc.Fit:
    """The training cells, the labels of the perturbed ones permuted."""
    rows = np.flatnonzero(~train.is_control)
    order = np.arange(len(train))
    order[rows] = np.random.default_rng(seed).permutation(rows)
    return additive(replace(train, dose=train.dose[order], labels=train.labels[order]))


def copy(train: pc.PerturbationData, seed: int) -> tuple[object, object]:
    """The empirical-Bayes baseline under another name."""
    return pc.build("additive_eb", train, seed=seed)


def diverged(train: pc.PerturbationData, seed: int) -> pc.Fit:
    raise ValueError("the optimiser\ndiverged")


MODELS = {"oracle": oracle, "copy": copy, "shuffled": shuffled, "diverged": diverged}


@pytest.fixture(scope="module")
def data() -> pc.PerturbationData:
    return screen(40, 0)


@pytest.fixture(scope="module")
def result(data: pc.PerturbationData, tmp_path_factory: pytest.TempPathFactory) -> pc.Benchmark:
    return pc.benchmark(data, MODELS, seeds=(0,), out=tmp_path_factory.mktemp("whole") / "b", progress=False, **FAST)


def verdicts(result: pc.Benchmark, model: str) -> pd.DataFrame:
    return result.paired[result.paired["model"] == model].set_index("metric")


# -- verdicts ------------------------------------------------------------------------------------------------------------------


def test_a_model_that_knows_the_truth_wins(result: pc.Benchmark) -> None:
    rows = verdicts(result, "oracle")
    for metric in ("l2", "rmse", "crps", "interval_score"):
        assert rows.loc[metric, "verdict"] == WINS, rows.loc[metric]
        assert rows.loc[metric, "low"] > 0 and rows.loc[metric, "n"] == N


def test_a_copy_of_the_best_baseline_does_not(result: pc.Benchmark) -> None:
    """The copy is fitted; that of every other baseline, whichever is best, is its rows under another name."""
    rows = verdicts(result, "copy")
    same = rows[rows["baseline"] == "additive_eb"]
    assert "crps" in same.index and (same["difference"] == 0).all() and (same["p_value"] == 1).all()
    assert (rows["verdict"] != WINS).all() and (same["verdict"] == LEVEL_WITH).all()
    each = pd.read_csv(result.path / "by_condition.csv")
    for name in sorted(set(best_baselines(result.table))):
        twins = [f[f["model"] == name].assign(model="twin", role="model") for f in (result.table, each)]
        found = paired_table(pd.concat([result.table, twins[0]]), pd.concat([each, twins[1]]))
        found = found[found["model"] == "twin"]
        assert len(found) == 9 and (found["verdict"] != WINS).all()
        tied = found[found["baseline"] == name]
        assert (tied["difference"] == 0).all() and (tied["verdict"] == LEVEL_WITH).all()


def test_shuffled_labels_lose(result: pc.Benchmark) -> None:
    rows = verdicts(result, "shuffled")
    assert (rows.loc[["l2", "rmse", "cosine", "rank_cosine", "crps", "interval_score"], "verdict"] == LOSES).all()
    nulls = result.table[(result.table["model"] == "shuffled") & (result.table["metric"] == "cosine")]
    assert nulls["null_p"].iloc[0] > 0.1  # permuted labels do as well


def test_a_failure_is_a_row_that_says_why_and_has_the_worst_values(result: pc.Benchmark) -> None:
    table = result.table
    lost = table[table["model"] == "diverged"].set_index("metric")
    assert (lost["status"] == "failed").all() and (lost["note"] == "ValueError: the optimiser diverged").all()
    assert set(lost.index) == set(table["metric"]) and (lost["n_failed"] == N).all() and (lost["n"] == 0).all()
    others = table[(table["status"] == "ok")]
    for metric, bound in (("cosine", -1.0), ("rank_cosine", 1.0), ("coverage", 0.0)):
        assert lost.loc[metric, "value"] == bound
    for metric in ("l2", "rmse", "crps"):
        assert lost.loc[metric, "value"] >= others.loc[others["metric"] == metric, "value"].max()
    each = pd.read_csv(result.path / "by_condition.csv")
    each = each[each["metric"] == "l2"].pivot(index="condition", columns="model", values="value")
    np.testing.assert_array_equal(each["diverged"], each.drop(columns="diverged").max(axis=1))
    assert (verdicts(result, "diverged").loc[["l2", "crps", "cosine"], "verdict"] == LOSES).all()
    page = (result.path / "report.html").read_text()
    assert "diverged failed on" in page and "diverged on " not in page  # no verdict on what failed for every seed


# -- the table -----------------------------------------------------------------------------------------------------------------


def test_baselines_and_duplicates_are_always_there(result: pc.Benchmark) -> None:
    roles = result.table.drop_duplicates("model").set_index("model")["role"]
    assert set(roles.index[roles == "baseline"]) == set(BASELINES) and len(BASELINES) == 10
    assert set(roles.index[roles == "duplicate"]) == set(DUPLICATES)
    assert set(roles.index[roles == "model"]) == set(MODELS)
    assert not result.table.duplicated(["model", "split", "unit", "seed", "metric"]).any()


def test_the_scale_and_its_anchors(result: pc.Benchmark) -> None:
    shares = result.table["metric"].str.startswith("coverage")
    table = result.table[~shares]
    known = table["s"].notna()
    s = (table["value"] - table["b"]) / (table["r"] - table["b"])
    np.testing.assert_allclose(table["s"][known], s[known], rtol=1e-12)
    twin = table[(table["model"] == "technical_duplicate")]
    np.testing.assert_allclose(twin["value"], twin["r"], rtol=1e-12)
    assert shares.any() and not result.table.loc[shares, "admitted"].any()
    for _, rows in table.groupby("metric"):  # one panel for all models
        assert rows[["b", "r", "drf", "bds"]].nunique(dropna=False).eq(1).all()


def test_whether_a_metric_is_admitted_is_read_from_the_duplicate(result: pc.Benchmark, data: pc.PerturbationData) -> None:
    own = result.table[(result.table["metric"] != "") & (result.table["status"] == "ok")]
    assert (own.groupby(["split", "seed", "unit", "metric"])[["drf", "bds", "admitted"]].nunique(dropna=False) == 1).all(None)
    options = json.loads((result.path / "benchmark.json").read_text())["options"]
    jobs = plan(data, MODELS, [SPLIT], (0,), Options(**options | {"presets": tuple(options["presets"])}))
    results = [json.loads((result.path / "jobs" / f"{j.key}.json").read_text()) for j in jobs]
    once = assemble(jobs, results)[0]
    pd.testing.assert_frame_equal(once[["drf", "bds"]], result.table[["drf", "bds"]], check_exact=True)
    for job, found in zip(jobs, results, strict=True):  # every job has found the same by itself; were it otherwise, the duplicate's counts
        for row in found["rows"]:
            row["bds"] = 0.25 if job.model == "technical_duplicate" else 0.75
    assert set(assemble(jobs, results)[0].dropna(subset="bds")["bds"]) == {0.25}


def test_strata_of_genes_make_up_the_whole(result: pc.Benchmark) -> None:
    """One share of responsive genes, the same for every model and both metrics, joins the strata; genes that respond are harder."""
    value = result.table[result.table["status"] == "ok"].pivot_table(index="model", columns="metric", values="value")
    for metric in ("coverage", "interval_score"):
        whole, some, rest = (value[m] for m in (metric, f"{metric}_responsive", f"{metric}_quiet"))
        share = ((whole - rest) / (some - rest))[(some - rest).abs() > 1e-6]
        np.testing.assert_allclose(share, share.iloc[0], rtol=1e-6)
        assert 0.25 - 1e-6 < share.iloc[0] < 0.3
    assert value.loc["control", "interval_score_responsive"] > value.loc["control", "interval_score_quiet"]


def test_l2_by_hand(result: pc.Benchmark, data: pc.PerturbationData) -> None:
    """Of the duplicate and of the additive baseline, from the cells."""
    given = split(data, **SPLIT, seed=0)
    train, _, test = given.parts(data)
    names = [c for c in data.conditions if c != "control"]
    a, b = halves(data[np.concatenate([test.cells[np.isin(test.labels, names)], test.cells[test.is_control]])], 0)

    def profile(cells: pc.PerturbationData, name: str) -> np.ndarray:
        x = cells.dense(np.float64)[cells.labels == name]
        return np.log1p(1e4 * (x / x.sum(1, keepdims=True)).mean(0))[N:]  # the targets are left out

    found = result.table[result.table["metric"] == "l2"].set_index("model")["value"]
    expected = {"technical_duplicate": b, "additive": train}
    for model, source in expected.items():
        l2 = np.mean([np.linalg.norm(profile(source, c) - profile(a, c)) for c in names])
        assert found[model] == pytest.approx(l2, rel=1e-9 if model == "technical_duplicate" else 0.05)  # draws: 20
    assert found["technical_duplicate"] > found["oracle"]


def test_the_best_baseline_is_that_of_the_best_mean(result: pc.Benchmark) -> None:
    best = best_baselines(result.table)
    own = result.table[result.table["role"] == "baseline"]
    for (_, _, metric), name in best.items():
        rows = own[own["metric"] == metric].set_index("model")
        top = rows["value"].max() if rows["higher"].iloc[0] else rows["value"].min()
        assert rows.loc[name, "value"] == top


# -- running -------------------------------------------------------------------------------------------------------------------


def same(one: Path, other: Path) -> None:
    for name in ("table.csv", "paired.csv", "by_condition.csv", "report.html"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


def test_lost_and_damaged_jobs_are_run_again(result: pc.Benchmark, data: pc.PerturbationData, tmp_path: Path) -> None:
    out = tmp_path / "again"
    shutil.copytree(result.path, out)
    files = sorted((out / "jobs").iterdir())
    for file in files[::5]:
        file.unlink()
    files[1].write_text(files[1].read_text()[:100])
    (out / "report.html").unlink()
    lines: list[str] = []
    again = pc.benchmark(data, MODELS, seeds=(0,), out=out, progress=lines.append, **FAST)
    assert len(lines) == 2 + len(files[::5]) and lines[0] == f"{len(files) - len(files[::5]) - 1} of {len(files)} jobs are done already"
    pd.testing.assert_frame_equal(again.table, result.table, check_exact=True)
    pd.testing.assert_frame_equal(again.paired, result.paired, check_exact=True)
    same(out, result.path)


def test_an_interrupted_run_goes_on_in_other_order_and_processes(result: pc.Benchmark, data: pc.PerturbationData, tmp_path: Path) -> None:
    """Interrupted after three jobs; all but one of the others are taken from the whole run, and that one is run in a new process."""
    lines: list[str] = []

    def stop(line: str) -> None:
        lines.append(line)
        if len(lines) == 3:
            raise KeyboardInterrupt

    out = tmp_path / "b"
    settings = {"seeds": (0,), "out": out} | FAST
    with pytest.raises(KeyboardInterrupt):
        pc.benchmark(data, MODELS, progress=stop, **settings)
    done = {f.name for f in (out / "jobs").iterdir()}
    assert len(done) == 3 and not (out / "table.csv").exists()
    left = sorted(f.name for f in (result.path / "jobs").iterdir() if f.name not in done)
    of = {f"{key}.json": job["model"] for key, job in json.loads((out / "benchmark.json").read_text())["jobs"].items()}
    for name in left:
        if of[name] != "additive_eb":
            shutil.copy(result.path / "jobs" / name, out / "jobs" / name)
    lines.clear()
    pc.benchmark(data, dict(reversed(MODELS.items())), progress=lines.append, processes=2, **settings)
    assert lines[0] == "15 of 16 jobs are done already" and len(lines) == 2
    same(out, result.path)


def test_an_interrupt_inside_a_fit_leaves_no_result(data: pc.PerturbationData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fit keeps what it has when it is interrupted; half a training is no result of a benchmark."""
    from pyrocausal import benchmark_run

    whole = benchmark_run.fit

    def interrupted(*args: object, **settings: object) -> pc.Fit:
        return replace(whole(*args, **settings), stopped="interrupted")

    monkeypatch.setattr(benchmark_run, "fit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pc.benchmark(data, seeds=(0,), out=tmp_path / "b", progress=False, **FAST)
    assert len(list((tmp_path / "b" / "jobs").iterdir())) == len(DUPLICATES)


def test_workers_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(
        "import time\nfrom multiprocessing import get_context\nfrom pyrocausal.benchmark_run import end_with_parent\n"
        "def work():\n    end_with_parent(0.1)\n    print('works', flush=True)\n    time.sleep(60)\n"
        "if __name__ == '__main__':\n    get_context('spawn').Process(target=work).start()\n    time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None and parent.stdout.readline() == "works\n"
        start = time.monotonic()
        parent.kill()
        assert parent.stdout.read() == ""  # the end of the stream: nobody is left who could write
    assert time.monotonic() - start < 20


def test_the_key_of_a_job_is_everything_that_determines_it(data: pc.PerturbationData) -> None:
    def keys(data: pc.PerturbationData = data, models: object = None, options: Options = OPTIONS, **settings: object) -> list[str]:
        given = {"splits": [SPLIT], "seeds": (0,)} | settings
        return [j.key for j in plan(data, models or {"m": ("sams_vae", {"n_latent": 3})}, options=options, **given)]

    base = keys()
    assert len(set(base)) == len(base) == 13
    other = data.x.copy()
    other[0, 0] += 1
    for changed in (
        keys(replace(data, x=other)),
        keys(seeds=(1,)),
        keys(splits=[{"by": "cells", "test": 0.4}]),
        keys(options=replace(OPTIONS, draws=21)),
    ):
        assert not set(base) & set(changed)
    assert set(base) ^ set(keys(models={"m": ("sams_vae", {"n_latent": 4})})) and base[:-1] == keys(models={"m": "sams_vae"})[:-1]


def test_the_leaderboard_is_what_its_tables_say() -> None:
    folder = Path(__file__).resolve().parents[1] / "benchmarks"
    sys.path.insert(0, str(folder))
    try:
        leaderboard = importlib.import_module("leaderboard")
    finally:
        sys.path.remove(str(folder))
    results = leaderboard.written(folder / "leaderboard")
    assert results and (folder / "leaderboard.md").read_text(encoding="utf-8") == leaderboard.markdown(results, False)


def test_models_of_normalised_data_have_baselines_of_their_own(data: pc.PerturbationData) -> None:
    jobs = plan(data, ["discrepancy_vae", "sams_vae"], [SPLIT], (0,), OPTIONS)
    units = {unit: {j.model for j in jobs if j.unit == unit} for unit in ("log1p_cp10k", "log_normalised")}
    always = set(BASELINES) | set(DUPLICATES)
    told = plan(data, {"ridge_embedding": ("ridge_embedding", {"penalty": 1.0}), "mine": "additive"}, [SPLIT], (0,), OPTIONS)
    assert [j.role for j in told].count("baseline") == len(BASELINES) + 1 and "model" not in {j.role for j in told}
    assert units == {"log1p_cp10k": always | {"sams_vae"}, "log_normalised": always | {"discrepancy_vae"}}

    def of_logarithms(train: pc.PerturbationData, seed: int) -> pc.Fit:
        return additive(train)

    of_logarithms.data_kind = "normalised"
    of = {j.model: j.unit for j in plan(data, {"mine": of_logarithms, "copy": copy}, [SPLIT], (0,), OPTIONS) if j.role == "model"}
    assert of == {"mine": "log_normalised", "copy": "log1p_cp10k"}


def test_what_cannot_be_run_is_refused_before_anything_is(data: pc.PerturbationData, tmp_path: Path) -> None:
    def refused(message: str, models: object = (), **settings: object) -> None:
        with pytest.raises(PyrocausalError, match=message):
            pc.benchmark(data, models, out=tmp_path / "b", **(FAST | settings))
        assert not (tmp_path / "b").exists()

    refused("did you mean 'sams_vae'", ["sams_va"])
    refused("no setting 'latents'", {"m": ("sams_vae", {"latents": 3})})
    refused("'control' is taken", {"control": "sams_vae"})
    refused("processes=0", processes=0)
    refused("no preset 'meji'", presets=["meji"])
    refused("given twice", splits=[SPLIT, SPLIT])
    refused("each seed once", seeds=(0, 0))
    refused("leaves no held-out", splits=[{"by": "cells", "test": 0.001}])
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(PyrocausalError, match="not the folder of an earlier benchmark"):
        pc.benchmark(data, out=tmp_path, **FAST)


# -- panels --------------------------------------------------------------------------------------------------------------------


def test_a_model_that_cannot_answer_is_refused_before_it_is_fitted(data: pc.PerturbationData) -> None:
    from pyrocausal.benchmark_run import run_job

    jobs = plan(data, {"m": ("sams_vae", {"n_latent": 2})}, [{"by": "perturbations", "test": 0.4}], (0,), OPTIONS)
    found = run_job(data, jobs[-1], replace(OPTIONS, max_epochs=10**9))
    assert found["status"] == "failed" and "no training cell received" in found["note"]


def test_held_out_batches_are_judged_from_their_own_control(data: pc.PerturbationData) -> None:
    """A batch that differs by a constant: effects are the same, levels are not, and only effects are asked for. Three of its control cells
    are trained on, and a baseline that pools batches is off by an eighth of a unit in every gene for it."""
    log = data.log_normalised()
    code = (np.arange(len(log)) % 2).astype(np.int64)
    moved = replace(log, x=log.dense() + 3 * code[:, None].astype(np.float32), batch_codes=code, batches=pd.Index(["a", "b"]))
    given = split(moved, "batch", test=["b"], control=0.95)
    panels = judge(moved, given, OPTIONS, 0)
    answer = ask(additive(given.parts(moved)[0]), panels, OPTIONS, 0)
    rows = {row["metric"]: row for row in score(answer, panels, OPTIONS, 0)[0]}
    naive = np.linalg.norm(answer.level[:, panels.kept] - panels.panels["levels"][0].true.means, axis=1).mean()
    unmoved = judge(log, split(log, "cells", test=0.5), OPTIONS, 0)
    usual = {row["metric"]: row for row in score(unmoved.duplicates["technical_duplicate"], unmoved, OPTIONS, 0)[0]}
    assert naive > 15 and rows["l2"]["u"] < 1.5 * usual["l2"]["u"]
    assert abs(rows["l2"]["b"] - usual["l2"]["b"]) < 0.3 and abs(rows["l2"]["r"] - usual["l2"]["r"]) < 0.3


def test_metrics_of_cells_sample_cells(data: pc.PerturbationData) -> None:
    options = replace(OPTIONS, presets=("scperturb", "vcc2025"))
    given = split(data, **SPLIT)
    panels = judge(data, given, options, 0)
    answer = ask(additive(given.parts(data)[0]), panels, options, 0)
    rows = {row["metric"]: row for row in score(answer, panels, options, 0)[0]}
    assert rows["e_distance"]["s"] > 0.5 and rows["des"]["n"] == N and rows["e_distance"]["note"] == ""
    replicate, values = score(panels.duplicates["technical_duplicate"], panels, options, 0)
    twin = {row["metric"]: row for row in replicate}
    assert twin["e_distance"]["u"] == twin["e_distance"]["r"] == pytest.approx(np.mean(values["e_distance"]))


# -- the paired test -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clusters", [8, 20])
def test_false_alarms_of_the_paired_test(clusters: int) -> None:
    """Copies with heavy-tailed noise that seeds of a condition share in part: at most 5 % of verdicts, wins and losses together; the bound
    is the .999 quantile of the binomial."""
    rng, reps = np.random.default_rng(0), 200
    label = np.repeat(np.arange(clusters), 3)
    alarms = 0
    for _ in range(reps):
        shared = rng.standard_t(3, clusters)[label]
        alarms += paired_test(shared + rng.standard_t(3, len(label)), label).verdict != LEVEL_WITH
    assert alarms <= stats.binom.ppf(0.999, reps, 0.05)


def test_the_paired_test_by_brute_force() -> None:
    d, label = np.random.default_rng(1).normal(0.5, 1, 21), np.repeat(np.arange(7), 3)
    means = d.reshape(7, 3).mean(1)
    flips = [abs(np.dot(s, means)) for s in itertools.product([-1, 1], repeat=7)]
    found = paired_test(d, label)
    assert found.p_value == np.mean([f >= abs(means.sum()) - 1e-12 for f in flips]) and found.n == 7
    assert found.difference == pytest.approx(means.mean()) and found.low < found.difference < found.high
    spread = (found.high - found.low) / (2 * 1.96 * means.std() / np.sqrt(7))
    assert 0.85 < spread < 1.15  # of the bootstrap, near the normal one


def test_five_conditions_are_too_few_and_a_win_needs_its_interval() -> None:
    assert paired_test(np.arange(1.0, 6.0), np.arange(5)).verdict == LEVEL_WITH
    assert paired_test(np.arange(1.0, 7.0), np.arange(6)).verdict == WINS
    assert paired_test(-np.arange(1.0, 7.0), np.arange(6)).verdict == LOSES
    around = paired_test([1.0, -1.0, 0.5, -0.4, 0.2, -0.2, 0.1], np.arange(7))
    assert around.low < 0 < around.high and around.verdict == LEVEL_WITH
    nothing = paired_test([np.nan, np.nan], [0, 1])
    assert nothing.n == 0 and nothing.verdict == LEVEL_WITH


# -- the command line ----------------------------------------------------------------------------------------------------------


def test_on_the_command_line(small_screen: ad.AnnData, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small_screen.write_h5ad(tmp_path / "tiny.h5ad")
    argv = ["benchmark", str(tmp_path / "tiny.h5ad"), "--models", "sams_vae", "--epochs", "1", "--seeds", "3", "--test", "0.5"]
    argv += ["--draws", "5", "--presets", "mejia", "--out", str(tmp_path / "b")]
    assert main(argv) == 0
    first = capsys.readouterr()
    table = pd.read_csv(tmp_path / "b" / "table.csv")
    assert set(table["model"]) == {*BASELINES, *DUPLICATES, "sams_vae"} and set(table["seed"]) == {3}
    assert "sams_vae on cells (test=0.5)" in first.out and "report.html and tables are in" in first.out
    before = (tmp_path / "b" / "table.csv").read_bytes()
    assert main(argv) == 0
    assert "13 of 13 jobs are done already" in capsys.readouterr().err and (tmp_path / "b" / "table.csv").read_bytes() == before
    page = (tmp_path / "b" / "report.html").read_text()
    assert page.count("data:image/png") == 2 and "http" not in page and "What is admitted" in page
    assert main([*argv[:3], "nothing", *argv[4:]]) == 2
    assert capsys.readouterr().err.startswith("pyrocausal: there is no model 'nothing'")


def test_a_gene_without_a_count_in_training_is_no_failure(data: pc.PerturbationData) -> None:
    """It may be in the test cells; models start from data-dependent values."""
    x = data.x.copy()
    x[:, GENES - 1] = 0
    model, guide = pc.build("sccvae", data, n_latent=3)
    fit = pc.fit(model, guide, replace(data, x=x), max_epochs=1, progress=False)
    assert np.isfinite(pc.effects(fit, "g00", draws=2, cells=2)["effect"]).all()
