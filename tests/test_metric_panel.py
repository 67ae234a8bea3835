"""The scored table on a simulated screen: perfection, control, chance, collapse, failures, and which metrics are admitted."""

from dataclasses import replace

import anndata as ad
import numpy as np
import pandas as pd
import pytest

import pyrocausal as pc
from pyrocausal import evaluate as ev
from pyrocausal.errors import DataError

GENES, CELLS = 60, 60
METRICS = [(preset, m.name) for preset, suite in ev.PRESETS.items() for m in suite]
UNBIASED = {"mse_capped", "e_distance", "energy", "mmd"}  # a copy of the truth is below 0
TABLE = ("direction_fidelity", "direction_reach", "sig_jaccard", "lfc_nmae", "des")


def screen(names, effect, seed, control=200):
    """Poisson counts with log-normal rates moved by ``effect`` [P, GENES], and libraries that scatter."""
    rng = np.random.default_rng(seed)
    base = np.random.default_rng(99).gamma(1.5, 4.0, GENES)
    label = np.repeat(["control", *names], [control, *[CELLS] * len(names)])
    moved = np.repeat(np.vstack([np.zeros(GENES), effect]), [control, *[CELLS] * len(names)], axis=0)
    rate = base * np.exp(moved) * rng.gamma(9, 1 / 9, (len(label), 1))
    data = ad.AnnData(rng.poisson(rate).astype(np.float32), obs=pd.DataFrame({"perturbation": label}).rename(index=str))
    data.var_names = [f"g{g:02d}" for g in range(GENES)]
    return pc.PerturbationData.from_anndata(data)


def effects(seed, n, size):
    rng = np.random.default_rng(seed)
    return size * rng.normal(size=(n, GENES)) * (rng.uniform(size=(n, GENES)) < 0.4) + 0.3 * (np.arange(GENES) < 5)


def build(size):
    train = screen([f"g{i:02d}" for i in range(20, 32)], effects(1, 12, size), 2)
    test = screen([f"g{i:02d}" for i in range(12)], effects(3, 12, size), 4)
    return ev.make_panel(test, train, n_components=10)


@pytest.fixture(scope="module")
def panel():
    return build(0.8)


@pytest.fixture(scope="module")
def fresh():
    """A model that knows the truth: fresh cells of the very perturbations."""
    return build_entry(screen([f"g{i:02d}" for i in range(12)], effects(3, 12, 0.8), 1000))


def build_entry(data):
    groups = [np.asarray(data[data.labels == c].x, dtype=float) for c in data.conditions if c != data.control]
    means = [np.log1p(1e4 * x / x.sum(1, keepdims=True)).mean(0) for x in groups]
    return ev.Entry(np.stack(means), tuple(x[: CELLS // 2] for x in groups))


def scores(entry, panel, **options):
    options = {"n_permutations": 0, "n_bootstrap": 0} | options
    return {(name, row.metric): row for name in ev.PRESETS for row in ev.score_panel(entry, panel, name, **options).itertuples()}


@pytest.fixture(scope="module")
def perfect(panel):
    return scores(panel.true, panel)


@pytest.fixture(scope="module")
def of_fresh(panel, fresh):
    return scores(fresh, panel, n_permutations=39, n_bootstrap=200)


@pytest.fixture(scope="module")
def of_control(panel):
    return scores(panel.control_entry, panel)


@pytest.mark.parametrize("key", METRICS, ids=":".join)
def test_the_truth_is_perfect(perfect, key):
    row = perfect[key]
    best = next(m.best for m in ev.PRESETS[key[0]] if m.name == key[1])
    assert row.u <= 0 if key[1] in UNBIASED else row.u == pytest.approx(best, abs=1e-9)
    assert row.n >= 10 and row.n_failed == 0 and row.note == ""


def test_the_control_scores_as_documented(panel, of_control):
    def u(preset, name):
        return of_control[preset, name].u

    assert u("vcc2026", "pds_cosine") == 0.5
    assert u("vcc2026", "direction_fidelity") == u("vcc2026", "direction_reach") == u("vcc2026", "sig_jaccard") == 0
    assert u("vcc2026", "lfc_nmae") == pytest.approx(1, abs=1e-9)
    base, true = panel.control_bulk, ev.bulk_lognorm(panel.true.cells)
    exact = ev.capped_mse(true._replace(value=np.repeat(base.value, 12, 0), noise=np.repeat(base.noise, 12)), true, base, panel.own)
    assert exact.rho == pytest.approx(0, abs=1e-12) and u("vcc2026", "mse_capped") == pytest.approx(exact.value)
    assert 1 < exact.value < 1.05  # one profile for all earns no correction
    assert u("vcc2025", "des") == u("perturbench", "cosine") == u("systema", "pearson_ctrl") == 0
    assert u("perturbench", "rank_rmse") == 1  # a tie of all predictions, which counts against it
    assert u("mejia", "r2_w_ctrl") <= 0
    assert u("vcc2025", "mae") == pytest.approx(np.abs(panel.true.means - panel.control.means).mean())


@pytest.mark.parametrize("key", METRICS, ids=":".join)
def test_a_model_that_knows_the_truth(of_fresh, of_control, key):
    """Fresh cells of the right distribution: near s = 1, better than every permutation of labels, better than the control."""
    row = of_fresh[key]
    if key[1] == "correlation_gap":  # the cells of all perturbations have nearly the same correlations: nothing to see, and not admitted
        assert not row.admitted
        return
    assert row.null_p == 1 / 40
    assert (row.u > row.null_mean) == row.higher and (row.u > of_control[key].u) == row.higher
    assert row.s > 0.8 and row.low <= row.u <= row.high and row.s_low <= row.s <= row.s_high


def test_the_unbiased_ratio_of_equal_distributions_is_zero(panel, of_fresh):
    """Within two standard errors (bootstrap over perturbations); beyond by chance with probability .05."""
    row = of_fresh["vcc2026", "mse_capped"]
    assert row.low <= 0 <= row.high


def test_the_scale_is_zero_at_the_baseline_and_one_at_the_replicate(panel, perfect):
    for entry, expected in ((panel.baseline, 0.0), (panel.replicate, 1.0)):
        found = scores(entry, panel)
        for key, row in found.items():
            metric = next(m for m in ev.PRESETS[key[0]] if m.name == key[1])
            if (metric.negative == "baseline" and metric.parts_of_negative is None) or expected:
                assert row.s == pytest.approx(expected, abs=1e-9) if row.admitted else np.isnan(row.s) or abs(row.s - expected) < 1e-9


def test_collapsed_variance_is_punished(panel, fresh, of_fresh):
    """The right means without the cells' variance: worse by every metric of cells that sees variance, and no better by the others."""
    flat = replace(fresh, cells=tuple(np.tile(np.rint(x.mean(0)), (len(x), 1)) for x in fresh.cells))
    found = scores(flat, panel)
    for preset, name in [("vcc2026", "mse_capped"), ("vcc2026", "sig_jaccard"), ("scperteval", "energy"), ("scperteval", "mmd")]:
        row, right = found[preset, name], of_fresh[preset, name]
        assert (row.u < right.u) == row.higher
        assert row.s < right.s - 0.1
    assert found["scperteval", "mse"].u == of_fresh["scperteval", "mse"].u  # means cannot see it


def test_the_order_of_genes_does_not_matter(panel, fresh):
    order = np.random.default_rng(0).permutation(GENES)

    def turned(entry):
        return ev.Entry(entry.means[:, order], None if entry.cells is None else tuple(x[:, order] for x in entry.cells))

    sides = {name: turned(getattr(panel, name)) for name in ("true", "replicate", "baseline", "control", "positive")}
    other = replace(
        panel,
        genes=tuple(np.array(panel.genes)[order]),
        reference=panel.reference[order],
        own=panel.own[:, order],
        score=panel.score[:, order],
        loadings=panel.loadings[order],
        **sides,
    )
    one, two = scores(fresh, panel), scores(turned(fresh), other)
    for key, row in one.items():
        for column in ("u", "b", "r", "drf", "bds"):
            assert getattr(two[key], column) == pytest.approx(getattr(row, column), abs=1e-8, nan_ok=True), (key, column)


def test_a_failed_perturbation_takes_the_worst_value(panel, fresh, of_fresh):
    means = fresh.means.copy()
    means[3] = np.nan
    found = scores(replace(fresh, means=means), panel)
    for key, row in found.items():
        assert row.n_failed == 1 and row.n == of_fresh[key].n
        if key[1] != "correlation_gap":
            assert (row.u < of_fresh[key].u) == row.higher, key
    errors = ev.mae(np.where(np.isnan(means), panel.control.means, means), panel.true.means)
    errors[3] = max(errors.max(), ev.mae(panel.baseline.means, panel.true.means).max())
    assert found["vcc2025", "mae"].u == pytest.approx(errors.mean())
    lost, rest = found["vcc2026", "direction_fidelity"], [i for i in range(12) if i != 3]
    assert lost.u == pytest.approx(11 / 12 * scores(_some(fresh, rest), _panel_of(panel, rest))["vcc2026", "direction_fidelity"].u)


def _some(entry, keep):
    return ev.Entry(entry.means[keep], None if entry.cells is None else tuple(entry.cells[i] for i in keep))


def _panel_of(panel, keep):
    keep = list(keep)
    sides = {name: _some(getattr(panel, name), keep) for name in ("true", "replicate", "baseline", "positive")}
    return replace(panel, names=tuple(panel.names[i] for i in keep), own=panel.own[keep], score=panel.score[keep], **sides)


def test_means_alone_are_not_scored_by_metrics_of_cells(panel, fresh):
    table = ev.score_panel(replace(fresh, cells=None), panel, "vcc2025", n_permutations=5, n_bootstrap=5)
    row = table.set_index("metric").loc["des"]
    assert np.isnan(row["u"]) and row["note"] == "needs counts: u without them" and np.isfinite(row["b"]) and np.isfinite(row["r"])
    assert table.set_index("metric").loc["mae", "u"] == pytest.approx(ev.mae(fresh.means, panel.true.means).mean())


def test_a_screen_without_effects_admits_no_metric_of_labels():
    """Effects of 0 beyond the shared shift: retrieval cannot tell perturbations, and no such metric is admitted."""
    null = build(0.0)
    found = scores(null.replicate, null)
    for key in [("vcc2026", "pds_cosine"), ("systema", "pearson_pert"), ("systema", "centroid_accuracy"), ("scperteval", "mse")]:
        assert not found[key].admitted, key


def test_a_screen_of_strong_effects_admits_most(of_fresh):
    admitted = {key for key, row in of_fresh.items() if row.admitted}
    assert {
        ("vcc2026", "pds_cosine"),
        ("vcc2026", "mse_capped"),
        ("scperteval", "nir"),
        ("scperteval", "energy"),
        ("mejia", "wmse"),
    } <= admitted


def test_one_profile_for_all_is_at_chance_in_every_ranking(panel, of_fresh):
    """Mean rank .5 of the mean response, or near it (12 perturbations); where ties would make it the worst, its ties are halved."""
    for key in [("perturbench", "rank_cosine"), ("perturbench", "rank_rmse"), ("systema", "centroid_accuracy")]:
        assert of_fresh[key].b == pytest.approx(0.5, abs=1e-9), key


def test_few_perturbations_and_lost_scales_admit_nothing(panel):
    few = _panel_of(panel, range(4))
    assert not any(row.admitted for row in scores(few.replicate, few).values())
    worse = replace(panel, replicate=ev.Entry(panel.baseline.means + 5.0))
    rows = [row for key, row in scores(panel.true, worse).items() if key[1] in ("mae", "rmse", "mse", "wmse")]
    assert len(rows) == 5 and not any(row.admitted for row in rows) and all(np.isnan(row.s) and row.bds > 0.9 for row in rows)


def test_tables_are_tidy_and_reproducible(panel, fresh):
    one, two = (ev.score_panel(fresh, panel, "systema", n_permutations=9, n_bootstrap=20, seed=5) for _ in range(2))
    pd.testing.assert_frame_equal(one, two)
    assert list(one.columns[:8]) == ["metric", "convention", "higher", "n", "n_failed", "u", "b", "r"]
    chosen = ev.score_panel(fresh, panel, ev.PRESETS["systema"][:1], n_permutations=9, n_bootstrap=20, seed=5)
    assert chosen.loc[0, "u"] == one.loc[0, "u"]
    assert all(one["convention"].str.len() > 20)


def test_panels_hold_disjoint_halves_of_what_was_held_out():
    test = screen([f"g{i:02d}" for i in range(3)], effects(3, 3, 0.8), 4)
    train = screen(["g20", "g21+g22"], effects(1, 2, 0.8), 2)
    panel = ev.make_panel(test, train, n_components=None)
    assert panel.names == ("g00", "g01", "g02") and panel.loadings is None
    for row, name in enumerate(panel.names):
        halves = np.concatenate([panel.true.cells[row], panel.replicate.cells[row]])
        whole = np.asarray(test[test.labels == name].x, dtype=float)
        assert sorted(map(tuple, halves)) == sorted(map(tuple, whole))
    x = [np.asarray(train[train.labels == c].x, dtype=float) for c in ("g20", "g21+g22")]
    np.testing.assert_allclose(
        panel.reference, np.mean([np.log1p(1e4 * y / y.sum(1, keepdims=True)).mean(0) for y in x], axis=0), atol=1e-12
    )
    assert [panel.genes[int(np.flatnonzero(o)[0])] for o in panel.own] == list(panel.names) and (panel.own.sum(1) == 1).all()


def test_interpolated_duplicates_keep_quiet_without_evidence():
    dup, mean = np.array([[1.0, 2.0, 3.0]]), np.zeros(3)
    np.testing.assert_allclose(ev.interpolated_duplicate(dup, mean, [[0.0, 0.5, np.nan]]), [[1.0, 1.0, 0.0]])


def test_dynamic_range():
    np.testing.assert_allclose(ev.dynamic_range([0.9, 0.2, 0.5], [0.5, 0.5, 1.0], 1.0), [0.8, -0.6, np.nan])
    np.testing.assert_allclose(ev.dynamic_range([0.1, 0.9], [0.4, 0.4], 0.0, higher=False), [0.75, -1.0])


@pytest.mark.parametrize("bad", ["vcc2027", "means", "genes", "few"])
def test_bad_panels_are_refused(panel, fresh, bad):
    with pytest.raises(DataError, match=r"given|no preset"):
        if bad == "vcc2027":
            ev.score_panel(fresh, panel, bad)
        elif bad == "means":
            ev.score_panel(_some(fresh, [0, 1]), panel, "systema")
        elif bad == "genes":
            ev.Entry(fresh.means, fresh.cells[:3])
        else:
            train = screen(["g20"], effects(1, 1, 0.8), 2)
            ev.make_panel(train, train, min_cells=1000)
