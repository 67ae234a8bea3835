"""Metrics against what published packages said of the same fixtures, degenerate panels included, and what the answers are worth.

``benchmarks/metric_oracles.py`` makes the fixtures and wrote ``tests/data/metric_oracles.json``.
"""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
STORED = json.loads((ROOT / "tests" / "data" / "metric_oracles.json").read_text())


@pytest.fixture(scope="module")
def oracles():
    path = ROOT / "benchmarks" / "metric_oracles.py"
    if not path.exists():
        pytest.skip("benchmarks are not part of the distribution")
    spec = importlib.util.spec_from_file_location("metric_oracles", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["metric_oracles"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", STORED)
def test_metrics_agree_with_the_packages(oracles, name):
    found = oracles.ours(oracles.fixture(name))
    for key, expected in STORED[name].items():
        np.testing.assert_allclose(found[key], np.array(expected, dtype=float), atol=1e-6, rtol=0, err_msg=key)


def test_every_fixture_and_every_metric_is_stored(oracles):
    assert tuple(STORED) == oracles.NAMES and len(STORED) == 20 + len(oracles.DEGENERATE)
    random = [name for name in STORED if name.startswith("random")]
    for name in random:
        assert STORED[name].keys() == oracles.ours(oracles.fixture(name)).keys()
    values = np.concatenate([np.array(v, dtype=float) for name in random for v in STORED[name].values()])
    assert np.isfinite(values).mean() > 0.95 and len(np.unique(values)) > 2000


def test_degenerate_panels_are_what_they_are_called(oracles):
    ties, one, empty, constant, zero, missing = (oracles.fixture(name) for name in oracles.DEGENERATE)
    assert (ties.true[0] == ties.true[1]).all() and (ties.predicted[0] == ties.predicted[1]).all()
    assert len(one.true[0]) == len(one.predicted[1]) == 1
    assert (empty.tables["true"]["p_adjusted"] == 1).all()
    assert all(x is constant.predicted[0] for x in constant.predicted)
    assert all(x is zero.control for x in zero.predicted)
    assert (missing.own >= 0).sum() == 1
