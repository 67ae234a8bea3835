"""Units that were seen at several times: rows of cells gathered to one row for each unit."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from pyrocausal.errors import DataError

if TYPE_CHECKING:
    from pyrocausal.data import PerturbationData


def by_unit(data: PerturbationData, units: NDArray[np.object_]) -> PerturbationData:
    """A screen whose rows are units: everything of the last time at which each was seen, and all that was seen in ``path``.

    Args:
        data: a row for each unit and time. units: name of each row's unit, [n_cells].

    Raises:
        DataError: without times; if a unit is seen twice at a time, or has two treatments (at the screen's first time it may be a control).
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
    strange = (data.labels != data.labels[last][unit]) & ~((frame == 0) & (data.labels == data.control))
    if strange.any():
        i = int(np.argmax(strange))
        raise DataError(
            f"the unit {names[unit[i]]!r} is {data.labels[i]!r} at time {data.time[i]:g} and {data.labels[last][unit[i]]!r} at its last; "
            "a unit has one treatment (before it acts, at the first time, it may be a control)"
        )
    path = np.full((len(names), len(times), len(data.genes)), np.nan, np.float32)
    path[unit, frame] = data.dense()
    return replace(data[last], cells=pd.Index(names, name="cell"), path=path, path_times=times)


__all__ = ["by_unit"]
