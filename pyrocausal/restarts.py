"""Several fits from different starts, of which held-out cells choose: where local optima matter, a restart is part of the algorithm."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyrocausal.data import PerturbationData
from pyrocausal.errors import ContractError

if TYPE_CHECKING:
    from pyrocausal.fit import Fit

Make = Callable[[int], tuple[Any, Any]]
SHARE = 0.1  # of the cells, held out if no validation is given


def best_of(
    restarts: int, make: Make | None, model: Any, guide: Any, data: PerturbationData, validation: Any, seed: int, settings: dict[str, Any]
) -> Fit:
    """The fit with the best held-out bound among ``restarts``; ``settings["restarts"]`` of the result has all of them.

    The first fit is of the given pair, fit r of ``make(seed + r)``. Cells are held out once, before the first fit; without
    ``validation`` no fit sees them, and they judge at the end only.
    """
    from pyrocausal.epoch import held_out_elbo
    from pyrocausal.fit import _hold_out, fit

    if make is None:
        make = _again(model)
    train, held = _hold_out(data, SHARE if validation is None else validation, seed)
    assert held is not None
    rows, best, checkpoint = [], None, settings.pop("checkpoint")
    for r in range(restarts):
        pair = (model, guide) if r == 0 else make(seed + r)
        path = None if checkpoint is None else Path(checkpoint).with_name(f"{Path(checkpoint).name}.{r}")
        found = fit(*pair, train, validation=None if validation is None else held, seed=seed + r, checkpoint=path, **settings)
        score = held_out_elbo(found.elbo, held, len(train), seed=seed, device=settings["device"])
        rows.append({"restart": r, "seed": seed + r, "validation": score, "elbo": float(found.history["elbo"].iloc[-1])})
        if best is None or score > max(row["validation"] for row in rows[:-1]):
            best = found
        if found.stopped == "interrupted":
            break
    assert best is not None
    best.settings["restarts"] = rows
    return best


def _again(model: Any) -> Make:
    recipe = getattr(model, "recipe", None)
    if recipe is None:
        raise ContractError("restarts need new pairs, and this one is not of pc.build; pass make=, a function from a seed to a pair")

    def make(seed: int) -> tuple[Any, Any]:
        from pyrocausal.collection import build_from

        return build_from({**recipe, "seed": recipe["seed"] + seed})

    return make


__all__ = ["best_of"]
