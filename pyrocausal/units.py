"""Units that were seen at several times: rows of cells gathered to one row for each unit."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import scipy.sparse as sp
from numpy.typing import NDArray

from pyrocausal.errors import DataError

if TYPE_CHECKING:
    from pyrocausal.data import PerturbationData


def by_unit(data: PerturbationData, units: NDArray[np.object_]) -> PerturbationData:
    """A screen whose rows are units: everything of the last time at which each was seen, and all that was seen in ``path``.

    Args:
        data: a row for each unit and time. units: name of each row's unit, [n_cells].

    A row's treatment is that of the interval which leads to its time. Where it changes in some unit (before it acts, at the screen's first
    time, a unit may be a control) all are kept in ``course``, where a time at which a unit was not seen has that of the time before;
    everything else speaks of the last.

    Raises:
        DataError: without times, or if a unit is seen twice at a time.
    """
    if data.time is None:
        raise DataError("units were named, but no times; name the column with the times with time_key=")
    names, unit = np.unique(units.astype(str), return_inverse=True)
    times, frame = np.unique(data.time, return_inverse=True)
    twice = pd.DataFrame({"unit": unit, "frame": frame}).duplicated().to_numpy()
    if twice.any():
        i = int(np.argmax(twice))
        raise DataError(
            f"the unit {names[unit[i]]!r} was seen more than once at time {data.time[i]:g}; give each of its cells a time of its own"
        )
    order = np.lexsort((frame, unit))
    last = order[np.append(np.flatnonzero(np.diff(unit[order])), len(order) - 1)]  # row of each unit's last time
    path = np.full((len(names), len(times), len(data.genes)), np.nan, np.float32)
    path[unit, frame] = data.dense()
    changes = (data.labels != data.labels[last][unit]) & ~((frame == 0) & (data.labels == data.control))
    return replace(
        data[last],
        cells=pd.Index(names, name="cell"),
        path=path,
        path_times=times,
        course=_courses(data, unit, frame, path.shape[:2]) if changes.any() else None,
    )


def _courses(data: PerturbationData, unit: NDArray[np.int64], frame: NDArray[np.int64], shape: tuple[int, int]) -> NDArray[np.float32]:
    """Treatment during the interval that leads to each time, [n, F, P]."""
    course = np.full((*shape, len(data.perturbations)), np.nan, np.float32)
    course[unit, frame] = data.dose.toarray()
    course[:, 0] = np.nan_to_num(course[:, 0])
    for t in range(1, shape[1]):
        course[:, t] = np.where(np.isnan(course[:, t]), course[:, t - 1], course[:, t])
    return course


def frames(data: PerturbationData) -> PerturbationData:
    """Units taken apart: a row for each unit and time at which it was seen, with the treatment of its last time; others as they are."""
    if data.path is None or data.path_times is None:
        return data
    unit, frame = np.nonzero(~np.isnan(data.path[..., 0]))
    x = data.path[unit, frame]
    return replace(
        data[unit],
        x=sp.csr_matrix(x) if sp.issparse(data.x) else x,
        time=data.path_times[frame],
        cells=pd.Index([f"{data.cells[i]} at {data.path_times[t]:g}" for i, t in zip(unit, frame, strict=True)], name="cell"),
        library_size=x.sum(1) if data.kind == "counts" else np.ones(len(x), np.float32),
        path=None,
        path_times=None,
        course=None,
    )


__all__ = ["by_unit", "frames"]
