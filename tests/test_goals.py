"""The table of the goals: its intervals, its worst values, and closed forms that its answers rest on."""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def goals():
    pytest.importorskip("sklearn")
    sys.path.insert(0, str(FOLDER))
    try:
        return importlib.import_module("goals")
    finally:
        sys.path.remove(str(FOLDER))


def test_every_row_has_its_unit_and_seeds_stay_apart(goals):
    units = {u.name: u for u in goals.UNITS}
    assert len(units) == len(goals.UNITS)
    assert all(r.why or r.unit in units for r in goals.ROWS)
    assert {f"M{i}" for i in range(2, 8)} == {r.goal for r in goals.ROWS}
    for unit in goals.UNITS:
        drawn, other = goals.seeds_of(unit), goals.seeds_of(unit, development=True)
        assert len(set(drawn)) == unit.worlds and max(drawn) < goals.DEVELOPMENT <= min(other)
        assert drawn == goals.seeds_of(unit)


def test_rows_reduce_worlds_and_judge(goals):
    table = sys.modules["goals_table"]
    worlds = [
        [{"method": "a", "metric": "e", "num": n, "den": 2.0}, {"method": "b", "metric": "e", "num": 4.0, "den": 2.0}]
        for n in (1.0, 1.0, 2.0, 1.0)
    ]
    row = table.Row("M2", "t", "u", "e", "a", "pooled", against=("b",), relation="ratio", bar=(None, 0.5))
    value, low, high = table.measured(row, worlds)
    assert value == pytest.approx(5 / 16) and 0.25 <= low <= value <= high <= 0.5
    assert table.judge(row, value, low, high) == "stands"
    assert table.judge(row, 0.4, 0.3, 0.6).startswith("falls short: the value")
    assert table.judge(row, 0.6, 0.5, 0.7) == "falls short"
    # a failure takes the worst value, of the metrics it is about
    failed = [*worlds, [{"method": "a", "metric": "e", "num": np.nan, "error": "x"}, worlds[0][1]]]
    assert table.read(row, failed) == np.inf
    assert table.read(table.Row("M2", "t", "u", "e", "a", "median"), failed) == 0.5
    # strata: the largest distance from .9, of those with enough entries
    strata = [[{"method": "a", "metric": f"c/{k}", "num": n, "den": d} for k, n, d in (("x", 95, 100), ("y", 1, 10))] for _ in range(2)]
    assert table.read(table.Row("M6", "t", "u", "c", "a", "gap"), strata) == pytest.approx(0.05)


def test_a_table_is_brought_up_to_date_by_what_was_run(goals, tmp_path):
    order = [("M2", "a"), ("M2", "b"), ("M3", "c"), ("M4", "d")]
    rows = pd.DataFrame([(*k, f"old {k[1]}", "stands") for k in order[:3]], columns=["goal", "task", "measured", "verdict"])
    rows.to_csv(tmp_path / "t.csv", index=False)
    new = [("M4", "d", "new d", "stands"), ("M2", "b", "new b", "falls short"), ("M3", "c", "", "not run: no results yet")]
    found = goals.up_to_date(tmp_path / "t.csv", pd.DataFrame(new, columns=rows.columns), order)
    assert found["measured"].tolist() == ["old a", "new b", "old c", "new d"] and found["verdict"][1] == "falls short"
    kept = pd.read_csv(FOLDER / "goals.csv", dtype=str, keep_default_na=False)
    pd.testing.assert_frame_equal(goals.up_to_date(FOLDER / "goals.csv", kept.iloc[:0], [(r.goal, r.task) for r in goals.ROWS]), kept)


def test_held_means_are_those_of_the_mutilated_system(goals):
    """``x_T = v`` in ``x = x B + e``, by solving the equations of the others, is the answer from unit shifts."""
    rng, worlds = np.random.default_rng(0), sys.modules["goals_worlds"]
    B = 0.2 * rng.standard_normal((6, 6)) * (1 - np.eye(6))
    sets, v = np.array([[1, 4], [0, 5]]), np.array([[0.7, -1.2], [2.0, 0.3]])
    found = worlds.held_effects(worlds.reach_of(B)[None], sets, v)[0]
    for t, level, effect in zip(sets, v, found, strict=True):
        free = np.setdiff1d(np.arange(6), t)
        expected = np.linalg.solve((np.eye(len(free)) - B[np.ix_(free, free)]).T, B[np.ix_(t, free)].T @ level)
        np.testing.assert_allclose(effect[free], expected, atol=1e-12)
        np.testing.assert_allclose(effect[t], level, atol=1e-12)


def test_a_world_that_is_there_is_not_run_again(goals, tmp_path):
    runs = []

    def run(seed, quick):
        runs.append(seed)
        return [{"method": "a", "metric": "e", "num": float(seed)}]

    unit = goals.Unit("u", run, 2)
    first = goals.world(unit, 7, tmp_path / "u" / "7.json", False)
    assert goals.world(unit, 7, tmp_path / "u" / "7.json", False) == first and runs == [7]
    assert json.loads((tmp_path / "u" / "7.json").read_text())["seed"] == 7
