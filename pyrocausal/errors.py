"""What can go wrong, by kind. Every message is one sentence: what was given, what was expected, and the mend."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PyrocausalError(ValueError):
    """Base of all errors that the library raises on purpose."""


class DataError(PyrocausalError):
    """The screen cannot be used as it is."""


class ContractError(PyrocausalError):
    """A model or guide does not keep the contract of site names."""


class InterventionError(PyrocausalError):
    """A question that the model or the data cannot answer."""


class CheckpointError(PyrocausalError):
    """A saved run or checkpoint cannot be read."""


def nearest(name: str, valid: Iterable[str], n: int = 3) -> str:
    """A hint naming the closest valid names, or the first few: ``"; did you mean 'STAT1'?"``."""
    names = [str(v) for v in valid]
    close = difflib.get_close_matches(str(name), names, n=n, cutoff=0.6)
    if not close:
        close = [v for v in names if v.lower() == str(name).lower()]
    if close:
        return "; did you mean " + " or ".join(repr(c) for c in close) + "?"
    return f"; there are {len(names)}: " + ", ".join(repr(v) for v in names[:n]) + (", ..." if len(names) > n else "")
