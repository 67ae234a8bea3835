"""Soft acts: the value of a site is changed, where ``pyro.do`` replaces it.

::

    softly = Soft(Change("shift", plus=1.0, at=3), Change("effect", times=0.5, at=0))
    trace = pyro.poutine.trace(softly(model)).get_trace(batch)

As under ``pyro.do``, what comes downstream sees the changed value, while a trace around the model reports the natural one (and scores it):
``Soft(Change(site, to=value))(model)`` is ``pyro.do(model, {site: value})``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyrocausal.errors import InterventionError


@dataclass(frozen=True, eq=False)
class Change:
    """One change of a site: ``value -> times * value + plus``, or ``value -> to``.

    Attributes:
        site: name of a sample or deterministic site.
        plus, times: number or tensor that broadcasts with the site's value.
        to: the new value, instead of ``plus`` and ``times``.
        at: which coordinates of the event are changed, an index of its dimensions (``3``, ``(0, 2)``, ``[1, 4]``, a slice); None for all.
    """

    site: str
    plus: float | Tensor = 0.0
    times: float | Tensor = 1.0
    to: float | Tensor | None = None
    at: Any = None

    def __post_init__(self) -> None:
        if self.to is not None and any(isinstance(v, Tensor) or v != default for v, default in ((self.plus, 0), (self.times, 1))):
            raise InterventionError(f"the site {self.site!r} is given a value and a change of its value; give to=, or plus= and times=")

    def __call__(self, value: Tensor, event_dim: int) -> Tensor:
        """The changed value, [..., *event]."""
        new = self.times * value + self.plus if self.to is None else torch.as_tensor(self.to, device=value.device)
        if self.at is None:
            return new
        event = value.shape[value.dim() - event_dim :]
        here = torch.zeros(event, dtype=torch.bool, device=value.device)
        try:
            here[self.at] = True
        except IndexError:
            raise InterventionError(
                f"at={self.at!r} was given for the site {self.site!r}, whose events have the shape {list(event)}; give an index within it"
            ) from None
        return torch.where(here, new.to(value.dtype), value)


class Soft(Messenger):
    """Changes the values of named sites; several changes of one site are made in the order in which they are given.

    A handler of Pyro: ``Soft(...)(model)`` is the changed model, ``with Soft(...):`` changes what runs inside. A name that the model does
    not have is refused after the run, and a site that ``pyro.do`` sets as well (its changes would be lost).
    """

    def __init__(self, *changes: Change) -> None:
        super().__init__()
        self.changes = changes
        self.seen: set[str] = set()

    @property
    def sites(self) -> frozenset[str]:
        """Names of the sites that are changed."""
        return frozenset(c.site for c in self.changes)

    def __enter__(self) -> Soft:
        self.seen = set()
        return super().__enter__()

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)
        missing = self.sites - self.seen
        if exc[0] is None and missing:
            raise InterventionError(f"the model ran without a site {min(missing)!r}, so it could not be changed; name one of its sites")

    def _pyro_post_sample(self, msg: Any) -> None:
        if msg["name"] not in self.sites:
            return
        if msg.get("_intervener_id") is not None:
            raise InterventionError(f"the site {msg['name']!r} is set by pyro.do, so a change of it would be lost; set it or change it")
        self.seen.add(msg["name"])
        for change in self.changes:
            if change.site == msg["name"]:
                msg["value"] = change(msg["value"], msg["fn"].event_dim)
