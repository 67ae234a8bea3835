"""Files: arrays and plain facts, never pickle, never half a file.

A file is written under a temporary name and renamed when it is complete, so that a crash leaves the older one in place.
"""

from __future__ import annotations

import importlib.metadata
import io as _io
import json
import os
import tempfile
import zipfile
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pyrocausal.errors import CheckpointError

if TYPE_CHECKING:
    from torch import nn

    from pyrocausal.fit import Fit

FACTS = "__facts__"
FORMAT = 1


def write_arrays(path: Path, arrays: dict[str, torch.Tensor], facts: dict[str, Any]) -> None:
    """Write named tensors and JSON facts to one ``.npz`` file, atomically."""
    buffer = _io.BytesIO()
    text = np.frombuffer(json.dumps(facts).encode(), np.uint8)
    contents: dict[str, Any] = {k: v.detach().cpu().numpy() for k, v in arrays.items()} | {FACTS: text}
    np.savez(buffer, **contents)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as out:
            out.write(buffer.getvalue())
        Path(temporary).chmod(0o644)  # as any other file; mkstemp makes it private
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def read_arrays(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read what :func:`write_arrays` wrote.

    Raises:
        CheckpointError: if the file is missing, truncated or something else.
    """
    if not path.is_file():
        raise CheckpointError(f"there is no file {path.name!r} in {str(path.parent)!r}; give the path of a saved run or checkpoint")
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {k: torch.from_numpy(archive[k]) for k in archive.files if k != FACTS}
            facts = json.loads(archive[FACTS].tobytes())
    except (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{path.name!r} is damaged or no file of this library ({type(error).__name__}); use an older copy") from error
    return arrays, facts


def save_fit(fit: Fit, path: Path) -> None:
    """Write a run: ``state.npz``, ``run.json``, ``history.csv``; an older run is replaced when the new one is complete."""
    if path.is_file() or (path.is_dir() and not (path / "run.json").is_file() and any(path.iterdir())):
        raise CheckpointError(f"{str(path)!r} exists and is no saved run; give another directory")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.", ignore_cleanup_errors=True) as scratch:
        new, old = Path(scratch) / "new", Path(scratch) / "old"
        new.mkdir()
        _write_run(fit, new)
        if path.exists():
            path.replace(old)
        try:
            new.replace(path)
        except BaseException:
            if old.exists():
                old.replace(path)
            raise


def _write_run(fit: Fit, temporary: Path) -> None:
    state = {f"model/{k}": v for k, v in fit.model.state_dict().items()} | {f"guide/{k}": v for k, v in fit.guide.state_dict().items()}
    recipe, tables = fit.recipe, {}
    if recipe is not None:  # tables among the arguments (an embedding) are arrays, not JSON
        tables = {k: v for k, v in recipe["arguments"].items() if isinstance(v, np.ndarray)}
        recipe = {**recipe, "arguments": {k: v for k, v in recipe["arguments"].items() if k not in tables}}
    state |= {f"recipe/{k}": torch.from_numpy(v) for k, v in tables.items()}
    write_arrays(temporary / "state.npz", state, {"format": FORMAT})
    cells = {f.name: getattr(fit.reference, f.name) for f in fields(fit.reference)}
    write_arrays(
        temporary / "reference.npz", {k: v for k, v in cells.items() if isinstance(v, torch.Tensor)}, {"n_total": cells["n_total"]}
    )
    facts = {
        "format": FORMAT,
        "model": type(fit.model).__name__,
        "guide": type(fit.guide).__name__,
        "recipe": recipe,
        "coords": fit.coords,
        "cells_per_perturbation": [int(n) for n in fit.cells_per_perturbation],
        "stopped": fit.stopped,
        "settings": fit.settings,
        "history": fit.history.reset_index().to_dict("list"),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "pyro-ppl", "numpy", "anndata")},
    }
    (temporary / "run.json").write_text(json.dumps(facts, indent=1))
    fit.history.to_csv(temporary / "history.csv")


def load(path: str | Path, model: nn.Module | None = None, guide: nn.Module | None = None) -> Fit:
    """Read a saved run.

    Args:
        path: the directory.
        model, guide: freshly made pair, for a model of your own; pairs from :func:`pyrocausal.build` are built again by themselves.

    Raises:
        CheckpointError: if the run is missing, damaged, or does not fit the pair.
    """
    import pandas as pd

    from pyrocausal.collection import build_from
    from pyrocausal.elbo import ELBO
    from pyrocausal.fit import Fit
    from pyrocausal.loading import Batch

    path = Path(path)
    if not (path / "run.json").is_file():
        raise CheckpointError(f"{str(path)!r} holds no run.json; give the directory that fit.save wrote")
    try:
        facts = json.loads((path / "run.json").read_text())
        history = pd.DataFrame(facts["history"]).set_index("epoch")  # history.csv is for people
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise CheckpointError(f"the run in {str(path)!r} is damaged ({type(error).__name__}); use an older copy") from error
    arrays, _ = read_arrays(path / "state.npz")
    if facts["recipe"] is not None:
        facts["recipe"]["arguments"] |= {k.removeprefix("recipe/"): v.numpy() for k, v in arrays.items() if k.startswith("recipe/")}
    if model is None or guide is None:
        if facts["recipe"] is None:
            raise CheckpointError(
                f"the run is of {facts['model']} and {facts['guide']}, which are not of the collection; pass pc.load(path, model, guide)"
            )
        model, guide = build_from(facts["recipe"])
    cells, population = read_arrays(path / "reference.npz")
    try:
        for name, part in (("model/", model), ("guide/", guide)):
            part.load_state_dict({k.removeprefix(name): v for k, v in arrays.items() if k.startswith(name)})
    except RuntimeError as error:
        raise CheckpointError(
            f"the state in {str(path)!r} does not fit {type(part).__name__}; give the classes and sizes it was fitted with"
        ) from error
    published: Any = getattr(model, "parity_objective", None)
    objective = published() if published and facts["settings"].get("objective") == "parity" else ELBO()
    objective.cells_per_perturbation = torch.as_tensor(facts["cells_per_perturbation"], dtype=torch.float32)
    return Fit(
        model=model.eval(),
        guide=guide.eval(),
        elbo=objective(model, guide),
        history=history,
        coords=facts["coords"],
        cells_per_perturbation=np.array(facts["cells_per_perturbation"]),
        stopped=facts["stopped"],
        settings=facts["settings"],
        reference=Batch(**{"x": None, "time": None, **cells, **population}),
        recipe=facts["recipe"],
    )
