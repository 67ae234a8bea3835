"""Which cells a model may see and which judge it: seeded splits, checked for leaks, and written down with the result.

==================  ==================================================  ===========================================================
by                  held out                                            in neither part
==================  ==================================================  ===========================================================
``"cells"``         a share of the cells of every condition             nothing
``"perturbations"`` perturbations, as singles                           combinations with one of them
``"combinations"``  pairs with 2, 1 or 0 of their parts ``seen`` alone  ``seen=2``: larger combinations that hold such a pair;
                                                                        1 and 0: all else with an unseen part
``"batch"``         perturbed cells of batches                          nothing
``"time"``          all cells of times                                  nothing
==================  ==================================================  ===========================================================

A part of the control cells goes with the test cells (and with the validation cells), since effects are differences: a control that judges
may not have been trained on. Controls of a held-out batch that do not judge stay in training: its untreated state is known, its effects
are not. :meth:`Split.facts` is what to save; :func:`again` makes the split of such facts and refuses if it is another.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from pyrocausal.data import SHARE, PerturbationData
from pyrocausal.errors import DataError, nearest

By = Literal["cells", "perturbations", "combinations", "batch", "time"]
Hold = float | str | Sequence[str] | Sequence[float]
Names = NDArray[np.object_]
PARTS = ("train", "validation", "test")


@dataclass(frozen=True)
class Split:
    """Names of the cells of each part, and how they were chosen.

    Attributes:
        train, validation, test: names of cells; ``validation`` may be empty.
        held, held_validation: what was held out: labels, batches or times (nothing for ``by="cells"``).
        settings: arguments of :func:`split`, so that it can be made again.
    """

    train: Names
    validation: Names
    test: Names
    held: tuple[str, ...]
    held_validation: tuple[str, ...]
    settings: dict[str, Any]

    def __repr__(self) -> str:
        sizes = ", ".join(f"{len(getattr(self, part)):,} {part}" for part in PARTS)
        return f"Split(by={self.settings['by']!r}, seed={self.settings['seed']}; {sizes} cells)"

    def parts(self, data: PerturbationData) -> tuple[PerturbationData, PerturbationData | None, PerturbationData]:
        """Training, validation (None if there is none) and test cells of a screen."""
        return data[self.train], data[self.validation] if len(self.validation) else None, data[self.test]

    def facts(self) -> dict[str, Any]:
        """What to save beside a result: plain JSON, with a digest of each part's cells in place of their names."""
        sizes = {part: len(getattr(self, part)) for part in PARTS}
        digests = {part: _digest(getattr(self, part)) for part in PARTS}
        held = {"held": list(self.held), "held_validation": list(self.held_validation)}
        return {"settings": self.settings, "cells": sizes, "sha256": digests} | held


def split(
    data: PerturbationData,
    by: By = "cells",
    test: Hold = 0.2,
    validation: Hold | None = None,
    seen: int = 2,
    control: float = 0.2,
    seed: int = 0,
) -> Split:
    """Cells of a screen for training, validation and test.

    Args:
        by: see the module's table.
        test: the share to hold out of the cells of each condition, of the perturbations, of the pairs (``seen=2``), of the perturbations
            that become unseen (``seen`` 1 or 0), of the batches, or of the times; or names: labels (of perturbations for
            ``by="perturbations"`` and ``seen`` 1 or 0, of pairs for ``seen=2``), batches, times.
        validation: the same, out of what the test leaves; None for no validation.
        seen: parts of a held-out pair whose singles are trained on.
        control: share of the control cells that goes to test, and to validation (not for ``by="cells"`` and ``by="time"``; of the held
            batches for ``by="batch"``).
        seed: of the random choice.

    Raises:
        DataError: if there is nothing to hold out, nothing left to train on, or a leak (:func:`leaks`).
    """
    if by not in get_args(By):
        raise DataError(f"by={by!r} is no way to split{nearest(by, get_args(By))}")
    if seen not in (0, 1, 2):
        raise DataError(f"seen={seen!r} was given; of the two parts of a pair 0, 1 or 2 are seen")
    if not isinstance(control, SHARE) or not 0 <= control < 1:
        raise DataError(f"control={control!r} was given; give the share of the control cells to hold out, at least 0 and below 1")
    rng = np.random.default_rng(seed)
    part = np.zeros(len(data), np.int64)  # 0 train, 1 validation, 2 test, -1 neither
    held: dict[int, list[str]] = {1: [], 2: []}
    for code, share in ((2, test), (1, validation)):
        if share is not None:
            needed = {p for label in held[2] for p in label.split(data.separator)}
            held[code] = _hold(data, part, code, by, share, seen, control, rng, needed)
    settings = {
        "by": by,
        "test": _plain(test),
        "validation": _plain(validation),
        "seen": seen,
        "control": float(control),
        "seed": int(seed),
    }
    names = data.cells.to_numpy(dtype=object)
    out = Split(names[part == 0], names[part == 1], names[part == 2], tuple(held[2]), tuple(held[1]), settings)
    if found := leaks(out, data):
        raise DataError(f"the split leaks: {found[0]}; hold out something else")
    return out


def again(data: PerturbationData, facts: dict[str, Any]) -> Split:
    """The split that :meth:`Split.facts` describes, made anew from its settings; refused if its cells are not the same."""
    out = split(data, **facts["settings"])
    if out.facts()["sha256"] != facts["sha256"]:
        raise DataError("the screen does not give the split of these facts; take the very cells and labels that it was made of")
    return out


def leaks(given: Split, data: PerturbationData) -> list[str]:
    """What training or validation cells know of the test, one sentence each; nothing if the split is clean.

    Looks at: cells in two parts; for unseen perturbations and pairs, conditions in two parts; perturbations that were to be unseen in any
    condition of the other parts; pairs with more or fewer singles in training than ``seen``; perturbed cells of held-out batches and
    cells of held-out times elsewhere; training without control cells. Cannot see: embeddings, gene selections, or normalisation that were
    made with test cells, and cells that are copies of one another under two names.
    """
    by, seen = given.settings["by"], given.settings["seen"]
    rows = {p: data.cells.get_indexer(pd.Index(getattr(given, p))) for p in PARTS}
    found = [f"{int((r < 0).sum())} {p} cells are not of the screen" for p, r in rows.items() if (r < 0).any()]
    if found:
        return found
    pairs = (("train", "test"), ("train", "validation"), ("validation", "test"))
    for a, b in pairs:
        if len(both := np.intersect1d(rows[a], rows[b])):
            found.append(f"{len(both)} cells are in {a} and {b}, first {data.cells[both[0]]!r}")
    if not data.is_control[rows["train"]].any():
        found.append("there is no control cell to train on")
    labels = {p: set(data.labels[rows[p]]) - {data.control} for p in PARTS}
    if by in ("perturbations", "combinations"):
        for a, b in pairs:
            if both_labels := sorted(labels[a] & labels[b]):
                found.append(f"the condition {both_labels[0]!r} is in {a} and {b}")
        for name in ("test", "validation"):
            others = labels["train"] | (labels["validation"] if name == "test" else set())
            found += _known(data, labels[name], labels["train"], others, name, 0 if by == "perturbations" else seen)
    for name, values in (("test", given.held), ("validation", given.held_validation)):
        elsewhere = [p for p in PARTS if p != name and not (name == "validation" and p == "test")]
        if by == "batch":
            inside = np.isin(np.asarray(data.batches, dtype=str)[data.batch_codes], values) & ~data.is_control
        elif by == "time" and data.time is not None:
            inside = np.isin(_times(data), values)
        else:
            continue
        found += [f"{int(inside[rows[p]].sum())} cells of the held-out {by} are in {p}" for p in elsewhere if inside[rows[p]].any()]
    return found


def halves(data: PerturbationData, seed: int = 0) -> tuple[PerturbationData, PerturbationData]:
    """Two random halves of the cells of every condition, the control included; conditions of fewer than four cells are left out.

    Raises:
        DataError: if no condition has four cells.
    """
    rng = np.random.default_rng(seed)
    part = np.full(len(data), -1)
    for condition in data.conditions:
        members = rng.permutation(np.flatnonzero(data.labels == condition))
        if len(members) >= 4:
            part[members] = np.arange(len(members)) % 2
    if not (part == 0).any():
        raise DataError(f"none of the {len(data.conditions)} conditions has four cells; halves need two for each")
    return data[part == 0], data[part == 1]


# -- parts ---------------------------------------------------------------------------------------------------------------------


def _hold(
    data: PerturbationData,
    part: NDArray[np.int64],
    code: int,
    by: By,
    test: Any,
    seen: int,
    control: float,
    rng: np.random.Generator,
    needed: set[str],
) -> list[str]:
    """Marks the cells to hold out of those that ``part`` leaves in training, in place; what they have in common. Perturbations that are
    ``needed``, as the seen parts of what is held out already, stay in training."""
    free = part == 0
    if by == "cells":
        if not isinstance(test, SHARE) or isinstance(test, bool) or not 0 < test < 1:
            raise DataError(f"test={test!r} was given for a split by cells; give a share between 0 and 1")
        for condition in data.conditions:
            members = rng.permutation(np.flatnonzero(free & (data.labels == condition)))
            part[members[: round(test * len(members))]] = code
        _some(part, code, by, test)
        return []
    if by in ("batch", "time"):
        if by == "time" and data.time is None:
            raise DataError("the screen has no times to hold out; name the column with time_key= in from_anndata")
        value = np.asarray(data.batches, dtype=str)[data.batch_codes] if by == "batch" else _times(data)
        pool = sorted(set(value[free]), key=float if by == "time" else str)
        names = _choose(pool, test, by, rng)
        inside = np.isin(value, names) & free
        if by == "time":
            part[inside] = code
        else:
            part[inside & ~data.is_control] = code
            _controls(data, part, inside, code, control, rng)
        _some(part, code, by, test)
        return names
    present = sorted(set(data.labels[free]) - {data.control})
    parts = {label: frozenset(label.split(data.separator)) for label in present}
    alone = {label for label in present if len(parts[label]) == 1}
    doubles = sorted(label for label in present if len(parts[label]) == 2)
    if by == "perturbations":
        unseen = set(_choose(sorted(alone), test, "perturbations with cells of their own", rng))
        chosen, dropped = unseen, {label for label in present if parts[label] & unseen}
    elif seen == 2:
        pool = [label for label in doubles if parts[label] <= alone]
        chosen = set(_choose(pool, test, "pairs whose parts are both measured alone", rng, data))
        dropped = {label for label in present if any(parts[c] <= parts[label] for c in chosen)}
    else:
        candidates = sorted({p for label in doubles for p in parts[label]} - needed)
        unseen = set(_choose(candidates, test, "perturbations in pairs", rng))
        chosen = {c for c in doubles if len(parts[c] & unseen) == 2 - seen and parts[c] - unseen <= alone}
        dropped = {label for label in present if parts[label] & unseen}
        if not chosen:
            raise DataError(
                f"no pair has {seen} of its parts seen when {', '.join(sorted(unseen)[:4])} are not; hold out more or other perturbations"
            )
    part[free & np.isin(data.labels, sorted(dropped))] = -1
    part[free & np.isin(data.labels, sorted(chosen))] = code
    _controls(data, part, free, code, control, rng)
    _some(part, code, by, test)
    return sorted(chosen)


def _controls(
    data: PerturbationData, part: NDArray[np.int64], among: NDArray[np.bool_], code: int, share: float, rng: np.random.Generator
) -> None:
    members = rng.permutation(np.flatnonzero(among & data.is_control))
    part[members[: round(share * len(members))]] = code


def _some(part: NDArray[np.int64], code: int, by: str, test: Any) -> None:
    for which, name in ((code, "held-out"), (0, "training")):
        if not (part == which).any():
            raise DataError(f"a split by {by} with {test!r} leaves no {name} cells; change the share")


def _choose(pool: list[str], test: Any, what: str, rng: np.random.Generator, data: PerturbationData | None = None) -> list[str]:
    """Names out of a pool: a share of it at random (one at least), or those that were given."""
    if isinstance(test, SHARE) and not isinstance(test, bool):
        if not 0 < test < 1:
            raise DataError(f"test={test!r} was given; give a share between 0 and 1, or names of what to hold out")
        if len(pool) < 2:
            raise DataError(f"the screen has {len(pool)} {what}; a split needs two at least")
        return sorted(rng.permutation(np.array(pool, dtype=object))[: min(len(pool) - 1, max(1, round(test * len(pool))))].tolist())
    names = [test] if isinstance(test, str) else [str(float(t)) if isinstance(t, SHARE) else str(t) for t in test]
    names = names if data is None else [data._canonical(name) for name in names]
    for name in names:
        if name not in pool:
            raise DataError(f"{name!r} is none of the {len(pool)} {what}{nearest(name, pool)}")
    return sorted(set(names))


def _known(data: PerturbationData, held: set[str], train: set[str], others: set[str], name: str, seen: int) -> list[str]:
    """Held-out conditions of which the other parts know more, or less, than they may."""
    out = []
    for label in sorted(held):
        parts = label.split(data.separator)
        measured = [p for p in parts if p in train]
        met = [p for p in parts if p not in train and any(p in other.split(data.separator) for other in others)]
        if len(measured) != seen:
            out.append(f"{len(measured)} parts of the {name} condition {label!r} are trained on alone, not {seen}")
        elif met and seen < 2:
            out.append(f"{met[0]!r}, an unseen part of the {name} condition {label!r}, is in a combination outside the {name} cells")
    return out


def _times(data: PerturbationData) -> NDArray[Any]:
    assert data.time is not None
    return np.array([str(float(t)) for t in data.time])


def _digest(names: Names) -> str:
    return hashlib.sha256("\n".join(sorted(map(str, names))).encode()).hexdigest()


def _plain(value: Any) -> Any:
    """A setting as JSON has it."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, SHARE):
        return float(value)
    return [float(v) if isinstance(v, SHARE) else str(v) for v in value]
