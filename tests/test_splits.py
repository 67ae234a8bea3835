"""Splits: who may see what, by brute force over labels; leaks are found when they are put in; facts make the split again."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pyrocausal as pc
from pyrocausal.errors import DataError
from pyrocausal.splits import again, leaks, split

CONDITIONS = [
    "control", "A", "B", "C", "D", "E", "A+B", "A+C", "B+C", "B+D", "C+D", "D+E", "A+E", "A+B+C", "A+F", "E+F",
]  # fmt: skip


def screen(n: int = 6, conditions: list[str] = CONDITIONS) -> pc.PerturbationData:
    """n cells of each condition, three batches, two times; cells in random order."""
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.repeat(conditions, n))
    obs = pd.DataFrame(
        {
            "perturbation": labels,
            "batch": np.array(["x", "y", "z"])[pd.Series(labels).groupby(labels).cumcount() % 3],
            "time": rng.choice([0.0, 6.0, 12.0], len(labels)),
        },
        index=[f"c{i}" for i in range(len(labels))],
    )
    adata = ad.AnnData(rng.normal(size=(len(labels), 3)).astype(np.float32), obs=obs)
    return pc.PerturbationData.from_anndata(adata, batch_key="batch", time_key="time")


DATA = screen()
WAYS: list[dict[str, Any]] = [
    {"by": "cells", "test": 0.3},
    {"by": "perturbations", "test": 0.2},
    {"by": "combinations", "seen": 2, "test": 0.3},
    {"by": "combinations", "seen": 1, "test": 0.2},
    {"by": "combinations", "seen": 0, "test": ["A", "B"]},
    {"by": "batch", "test": ["x"]},
    {"by": "time", "test": [12.0]},
]


def labels(cells: np.ndarray) -> set[str]:
    return set(DATA[cells].labels) - {"control"} if len(cells) else set()


@pytest.mark.parametrize("way", WAYS, ids=lambda w: f"{w['by']}{w.get('seen', '')}")
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_parts_are_disjoint_clean_and_made_again_from_their_facts(way: dict[str, Any], seed: int) -> None:
    found = split(DATA, **way, seed=seed)
    cells = [*found.train, *found.test, *found.validation]
    assert len(set(cells)) == len(cells) <= len(DATA) and not leaks(found, DATA)
    facts = json.loads(json.dumps(found.facts()))
    same = again(DATA, facts)
    assert all(np.array_equal(getattr(found, p), getattr(same, p)) for p in ("train", "validation", "test"))
    train, validation, test = found.parts(DATA)
    assert validation is None and len(train) + len(test) == len(cells)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), seen=st.integers(0, 2))
def test_pairs_have_as_many_seen_parts_as_was_asked(seed: int, seen: int) -> None:
    try:
        found = split(DATA, "combinations", test=0.4, seen=seen, seed=seed)
    except DataError as error:  # a choice that leaves no such pair is refused, never bent
        assert "no pair has" in str(error)
        return
    train, test = labels(found.train), labels(found.test)
    assert test and test == set(found.held)
    for pair in test:
        parts = set(pair.split("+"))
        assert len(parts) == 2 and len(parts & train) == seen
        assert not any(parts <= set(other.split("+")) for other in train)
        unseen = parts - train
        assert not any(unseen & set(other.split("+")) for other in train)


def test_unseen_perturbations_are_nowhere_in_training() -> None:
    found = split(DATA, "perturbations", test=["B", "E"], control=0.5)
    assert labels(found.test) == {"B", "E"} == set(found.held)
    assert not any({"B", "E"} & set(label.split("+")) for label in labels(found.train))
    assert labels(found.train) == {"A", "C", "D", "A+C", "C+D", "A+F"}
    assert sum(DATA[found.test].is_control) == 3 == sum(DATA[found.train].is_control)


def test_validation_is_held_out_of_the_rest_by_the_same_rule() -> None:
    found = split(DATA, "perturbations", test=["B"], validation=["D"], seed=1)
    assert labels(found.validation) == {"D"} and labels(found.test) == {"B"}
    assert not any({"B", "D"} & set(label.split("+")) for label in labels(found.train))
    found = split(DATA, "combinations", test=["A+B", "C+A"], validation=["B+D"], seen=2)
    assert labels(found.test) == {"A+B", "A+C"} and labels(found.validation) == {"B+D"}
    assert "A+B+C" not in labels(found.train)
    found = split(DATA, "combinations", test=["A"], validation=0.2, seen=1, seed=3)
    assert labels(found.test) == {"A+B", "A+C", "A+E"} and not leaks(found, DATA)


def test_batches_and_times() -> None:
    found = split(DATA, "batch", test=["x"], control=0.5)
    batch = np.asarray(DATA.batches)[DATA.batch_codes]
    assert set(DATA[found.test].cells) >= set(DATA.cells[(batch == "x") & ~DATA.is_control])
    untreated = (batch == "x") & DATA.is_control
    assert 0 < np.isin(found.train, DATA.cells[untreated]).sum() < untreated.sum()
    found = split(DATA, "time", test=[12], validation=[6.0])
    assert set(DATA[found.test].time) == {12.0} and set(DATA[found.validation].time) == {6.0} and set(DATA[found.train].time) == {0.0}


def test_a_cell_split_is_the_same_share_of_every_condition() -> None:
    found = split(DATA, "cells", test=1 / 3, validation=0.5)
    for part in (found.train, found.validation, found.test):
        assert all((DATA[part].labels == c).sum() == 2 for c in CONDITIONS)


def test_leaks_that_are_put_in_are_found() -> None:
    clean = split(DATA, "perturbations", test=["B"])
    moved = DATA.cells[DATA.labels == "B+C"].to_numpy(dtype=object)
    assert any("'B', an unseen part" in m for m in leaks(replace(clean, train=np.append(clean.train, moved)), DATA))
    assert any(
        "is in train and test" in m for m in leaks(replace(clean, train=np.append(clean.train, DATA.cells[DATA.labels == "B"])), DATA)
    )
    assert any("cells are in train and test" in m for m in leaks(replace(clean, train=np.append(clean.train, clean.test[:2])), DATA))
    assert any("not of the screen" in m for m in leaks(replace(clean, test=np.array(["nobody"], object)), DATA))
    no_control = np.array([c for c in clean.train if not DATA[[c]].is_control[0]], object)
    assert leaks(replace(clean, train=no_control), DATA) == ["there is no control cell to train on"]
    pairs = split(DATA, "combinations", test=["A+B"])
    without = np.array([c for c in pairs.train if DATA[[c]].labels[0] != "A"], object)
    assert any("1 parts of the test condition 'A+B'" in m for m in leaks(replace(pairs, train=without), DATA))
    for way, match in ((WAYS[5], "held-out batch"), (WAYS[6], "held-out time")):
        held = split(DATA, **way)
        stolen = [c for c in held.test if not DATA[[c]].is_control[0]][:3]
        leaky = replace(held, train=np.append(held.train, stolen), test=np.setdiff1d(held.test, stolen))
        assert any(match in m and "3 cells" in m for m in leaks(leaky, DATA))


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"by": "genes"}, "by='genes'"),
        ({"seen": 3}, "seen=3"),
        ({"control": 1.0}, "control=1.0"),
        ({"test": 1.5}, "test=1.5"),
        ({"by": "perturbations", "test": ["Z"]}, "'Z' is none of the 5"),
        ({"by": "perturbations", "test": ["F"]}, "'F' is none of the 5"),
        ({"by": "combinations", "test": ["A+F"]}, "'A\\+F' is none of"),
        ({"by": "combinations", "seen": 0, "test": ["A"]}, "no pair has 0 of its parts seen"),
        ({"by": "batch", "test": ["w"]}, "'w' is none of the 3 batch"),
    ],
)
def test_what_cannot_be_held_out_is_refused(arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(DataError, match=match):
        split(DATA, **arguments)


def test_another_screen_is_not_taken_for_the_same() -> None:
    facts = split(DATA, "cells", seed=4).facts()
    with pytest.raises(DataError, match="does not give the split"):
        again(screen(7), facts)
