"""Questions to a fitted pair: effects on a population (rung 2) and on the very cells that were measured (rung 3).

All return an ``xarray.Dataset`` with real names as coordinates; the unit, the rung and the noise are in ``attrs``. Units:

``"log1p_cp10k"``  (default for counts) log(1 + 10,000 x expression / library size). Of a population it is the logarithm of the mean over
                   cells, not the mean of the logarithms, so that it does not depend on depth or dispersion.
``"rate"``         share of the library.
``"counts"``       expected or sampled counts at the cell's own library size.
``"data"``         the data's own scale (the only unit of Gaussian models).
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from pyrocausal.compile_sites import check_edges, possible_edges
from pyrocausal.coupling import Noise, couple
from pyrocausal.data import PerturbationData
from pyrocausal.errors import InterventionError
from pyrocausal.fit import Fit
from pyrocausal.interventions import Intervention, as_list, check, nodes_of, perturb, resolve
from pyrocausal.loading import Batch
from pyrocausal.worlds import MAX_ROWS, Base, factual_base, fresh_base, global_draws, intervened_law, vectorises

Do = Intervention | str | Sequence[Intervention | str] | Mapping[str, Intervention]
MAX_BYTES = 4 * 2**30


def effects(
    fit: Fit,
    do: Do,
    *,
    draws: int = 200,
    cells: int = 128,
    units: str | None = None,
    seed: int = 0,
) -> xr.Dataset:
    """What interventions do to a population of fresh, otherwise untreated cells (rung 2), against no intervention.

    Of a model with time, at its last time (attribute ``time`` of the result); :func:`pyrocausal.trajectory` has the others.

    Each posterior draw has ``cells`` fresh cells (covariates of the training controls, basal states from the model), the same ones in every
    world, so that differences carry no sampling noise of the cells.

    Args:
        do: interventions: one, several, or a mapping of names to interventions; a label such as ``"A+B"`` stands for its perturbations.
        draws: posterior draws of the global sites.
        cells: fresh cells for each draw.
        units: see the module's docstring.

    Returns:
        Dataset with ``effect`` and ``expression`` (intervention, draw, gene) and ``baseline`` (draw, gene). Its memory is all that grows
        with the number of interventions. As of every question, its attribute ``unseen`` names the perturbations that no training cell
        received, if the model can answer them (attribute ``answers_unseen``) and any were asked for.
    """
    named = _prepare(fit, do)
    unit = _unit(fit, units)
    genes = fit.coords["gene"]
    expression = np.empty((len(named), draws, len(genes)), np.float32)
    baseline = np.empty((draws, len(genes)), np.float32)
    _fits_in_memory(expression.nbytes, "effects", "ask for fewer draws or interventions")
    with _seeded(seed, fit):
        vectorised = _vectorises(fit)
        for start, stop in _chunks(draws, max(1, MAX_ROWS // cells) if vectorised else 1):
            _reseed(seed, start)
            base = _fresh(fit, stop - start if vectorised else None, cells)
            base_mean = base.law.mean.reshape(stop - start, 1, cells, -1)
            baseline[start:stop] = _population(base_mean, base.batch, unit)[:, 0]
            for first, last in _worlds(named, cells * (stop - start), vectorised):
                law, same = intervened_law(fit.model, base, [i for _, i in named[first:last]], fit.coords["perturbation"], strict=False)
                mean = torch.where(same[..., None], base.law.mean, law.mean).reshape(stop - start, last - first, cells, -1)
                expression[first:last, start:stop] = _population(mean, base.batch, unit).swapaxes(0, 1)
    return xr.Dataset(
        {
            "effect": (("intervention", "draw", "gene"), expression - baseline),
            "expression": (("intervention", "draw", "gene"), expression),
            "baseline": (("draw", "gene"), baseline),
        },
        coords={"intervention": [n for n, _ in named], "draw": np.arange(draws), "gene": genes},
        attrs={"unit": unit, "rung": "interventional", "reference": "untreated", "cells_per_draw": cells}
        | _when(fit)
        | _unseen(fit, named),
    )


def dose_response(
    fit: Fit,
    perturbations: str | Sequence[str],
    doses: Sequence[float] | np.ndarray,
    *,
    draws: int = 200,
    cells: int = 128,
    units: str | None = None,
    seed: int = 0,
) -> xr.Dataset:
    """Effects of perturbations over a grid of doses (multiples of the penetrance that was learned; 0 = untreated, 1 = as in the screen).

    Returns:
        As :func:`effects`, with dims (perturbation, dose, draw, gene): ``effect``, ``expression``, and ``baseline`` (draw, gene). The same
        cells and draws at every dose, so that curves are smooth draw by draw and their quantiles are bands.
    """
    names = [perturbations] if isinstance(perturbations, str) else list(perturbations)
    grid = [float(d) for d in doses]
    acts = {f"{name} at {dose!r}": perturb(name, dose=dose) for name in names for dose in grid}
    if len(acts) < len(names) * len(grid) or not acts:
        raise InterventionError("perturbations and doses are to be distinct, at least one of each; give each once")
    flat = effects(fit, acts, draws=draws, cells=cells, units=units, seed=seed)
    dims = ("perturbation", "dose", "draw", "gene")
    shape = (len(names), len(grid), draws, flat.sizes["gene"])
    tables = {k: (dims, flat[k].to_numpy().reshape(shape)) for k in ("effect", "expression")}
    coords = {"perturbation": names, "dose": grid, "draw": flat["draw"].to_numpy(), "gene": flat["gene"].to_numpy()}
    return xr.Dataset(tables | {"baseline": (("draw", "gene"), flat["baseline"].to_numpy())}, coords=coords, attrs=flat.attrs)


def interventional(
    fit: Fit,
    do: Do,
    *,
    draws: int = 20,
    cells: int = 50,
    noise: str = "mean",
    units: str | None = None,
    seed: int = 0,
) -> xr.Dataset:
    """Fresh cells in each world (rung 2): ``expression`` and ``effect`` (intervention, draw, cell, gene).

    Args:
        noise: ``"mean"`` for expected values, ``"independent"`` for sampled observations (each world its own noise).
    """
    if noise not in ("mean", "independent"):
        raise InterventionError(f"noise={noise!r} was given; fresh cells share no noise of the measurement, choose 'mean' or 'independent'")
    named = _prepare(fit, do)
    unit = _unit(fit, units)
    out = _allocate(named, draws, cells, fit)
    with _seeded(seed, fit):
        vectorised = _vectorises(fit)
        for start, stop in _chunks(draws, max(1, MAX_ROWS // cells) if vectorised else 1):
            _reseed(seed, start)
            base = _fresh(fit, stop - start if vectorised else None, cells)
            before = base.law.mean if noise == "mean" else base.law.sample()
            before = before.reshape(stop - start, 1, cells, -1)
            for first, last in _worlds(named, cells * (stop - start), vectorised, noise):
                law, same = intervened_law(fit.model, base, [i for _, i in named[first:last]], fit.coords["perturbation"], strict=False)
                after = torch.where(same[..., None], base.law.mean, law.mean) if noise == "mean" else law.sample()
                _write(out, (first, last), (start, stop), slice(None), before, after, base.batch, unit)
    return _dataset(out, named, draws, np.arange(cells), fit, {"unit": unit, "rung": "interventional", "noise": noise} | _when(fit))


def counterfactual(
    fit: Fit,
    data: PerturbationData,
    do: Do,
    *,
    draws: int = 20,
    noise: Noise = "shared",
    units: str | None = None,
    seed: int = 0,
) -> xr.Dataset:
    """What these very cells would have looked like (rung 3): abduction of their state and noise, action, prediction.

    Args:
        data: the measured cells, for example ``data[:100]``; they keep their own treatment unless the intervention gives another.
        noise: how the observation's noise is shared between worlds; see :mod:`pyrocausal.coupling`. The factual action gives back the
            factual cell.

    Returns:
        Dataset with ``expression`` and ``effect`` (counterfactual minus factual), both (intervention, draw, cell, gene), and ``factual``
        (cell, gene); with ``noise="mean"`` the factual side is the model's expectation of the cell, (draw, cell, gene).
    """
    named = _prepare(fit, do)
    _same_names(fit, data)
    unit = _unit(fit, units)
    out = _allocate(named, draws, len(data), fit)
    shape = (len(data), len(fit.coords["gene"]))
    factual = np.empty((draws, *shape) if noise == "mean" else shape, np.float32)
    with _seeded(seed, fit):
        vectorised = _vectorises(fit)
        tables = global_draws(fit.guide, fit.reference.to(_device(fit)).rows([0]), draws, vectorised)  # a draw is one world for all cells
        for low, high in _chunks(len(data), MAX_ROWS // 4):
            batch = data.batch(np.arange(low, high), n_total=fit.settings["n_cells"], device=_device(fit))
            assert batch.x is not None
            n = high - low
            for start, stop in _chunks(draws, max(1, MAX_ROWS // n) if vectorised else 1):
                _reseed(seed, start, low)
                given = {k: v[start:stop] if vectorised else v[start] for k, v in tables.items()}
                base = factual_base(fit.model, fit.guide, batch, stop - start if vectorised else None, given)
                before = base.law.mean if noise == "mean" else batch.x
                if noise == "mean":
                    factual[start:stop, low:high] = _cells(before.reshape(stop - start, n, -1), batch, unit)
                else:
                    factual[low:high] = _cells(batch.x, batch, unit)
                before = before.reshape(-1, 1, n, before.shape[-1])
                for first, last in _worlds(named, n * (stop - start), vectorised, noise):
                    acts = [i for _, i in named[first:last]]
                    law, same = intervened_law(fit.model, base, acts, fit.coords["perturbation"], strict=True)
                    after = couple(batch.x, base.law, law, same, noise)
                    _write(out, (first, last), (start, stop), slice(low, high), before, after, batch, unit)
    result = _dataset(out, named, draws, list(data.cells), fit, {"unit": unit, "rung": "counterfactual", "noise": noise})
    return result.assign(factual=(("draw", "cell", "gene") if noise == "mean" else ("cell", "gene"), factual))


def to_anndata(result: xr.Dataset, draw: int | None = None) -> Any:
    """A result of :func:`counterfactual` or :func:`interventional` as AnnData: a layer per intervention (mean over draws, or one draw)."""
    import anndata as ad
    import pandas as pd

    if "cell" not in result.dims:
        raise InterventionError("the result has no cells (it is of effects()); use result.to_dataframe() instead")
    layers = result["expression"].mean("draw") if draw is None else result["expression"].sel(draw=draw)
    first = layers.isel(intervention=0).to_numpy()
    out = ad.AnnData(
        X=result["factual"].to_numpy() if "factual" in result and "draw" not in result["factual"].dims else first,
        obs=pd.DataFrame(index=[str(c) for c in result["cell"].to_numpy()]),
        var=pd.DataFrame(index=result["gene"].to_numpy()),
        layers={str(k).replace("/", "|"): layers.sel(intervention=k).to_numpy() for k in result["intervention"].to_numpy()},
    )
    out.uns["pyrocausal"] = {k: str(v) for k, v in result.attrs.items()}
    return out


# -- parts ---------------------------------------------------------------------------------------------------------------------


def _prepare(fit: Fit, do: Do) -> list[tuple[str, Intervention]]:
    nodes = nodes_of(fit.model, fit.coords["gene"])
    named = [(name, resolve(act, nodes)) for name, act in as_list(do, fit.coords["separator"], fit.coords["control"])]
    acts = [i for _, i in named]
    trained = None if getattr(fit.model, "answers_unseen", False) else [int(n) for n in fit.cells_per_perturbation]
    check(acts, fit.coords, trained)
    if any(i.edges for i in acts):
        example = fit.reference.to(_device(fit)).rows([0])
        with _seeded(0, fit):
            globals_ = {k: v[0] for k, v in global_draws(fit.guide, example, 1, vectorised=False).items()}
            edges = possible_edges(fit.model, example, globals_)
        if edges is not None:  # without a graph, compiling refuses
            check_edges(fit.model, acts, edges)
    return named


def _unseen(fit: Fit, named: list[tuple[str, Intervention]]) -> dict[str, str]:
    """The perturbations of a question that no training cell received, as an attribute of the answer; nothing if there are none."""
    asked = set().union(*(i.perturbations for _, i in named))
    cells = zip(fit.coords["perturbation"], fit.cells_per_perturbation, strict=True)
    names = [name for name, n in cells if n == 0 and name in asked]
    return {"unseen": ", ".join(names)} if names else {}


def _when(fit: Fit) -> dict[str, float]:
    """The time of fresh cells, of a model with time."""
    return {"time": float(fit.reference.time[0])} if getattr(fit.model, "timed", False) and fit.reference.time is not None else {}


def _unit(fit: Fit, units: str | None) -> str:
    counts = fit.coords["kind"] == "counts"
    unit = units or ("log1p_cp10k" if counts else "data")
    allowed = ("log1p_cp10k", "rate", "counts") if counts else ("data",)
    if unit not in allowed:
        raise InterventionError(f"units={unit!r} was given; the fit is of {fit.coords['kind']} data, whose units are {', '.join(allowed)}")
    return unit


def _same_names(fit: Fit, data: PerturbationData) -> None:
    for what, ours in (("gene", list(data.genes)), ("perturbation", list(data.perturbations))):
        if ours != fit.coords[what]:
            raise InterventionError(f"the {what}s of the data are not those of the fit; select or order them as in fit.coords[{what!r}]")


def _fits_in_memory(n_bytes: int, what: str, mend: str) -> None:
    if n_bytes > MAX_BYTES:
        raise InterventionError(f"{what} would take {n_bytes / 2**30:.1f} GiB, more than {MAX_BYTES / 2**30:.0f}; {mend}")


def _seeded(seed: int, fit: Fit) -> Any:
    """A private random state: the caller's is left as it was."""
    device = _device(fit)
    context = torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])

    class _Context:
        def __enter__(self) -> None:
            context.__enter__()
            torch.manual_seed(seed)

        def __exit__(self, *exc: Any) -> None:
            context.__exit__(*exc)

    return _Context()


def _device(fit: Fit) -> torch.device:
    return next((p.device for p in fit.elbo.parameters()), torch.device("cpu"))


def _vectorises(fit: Fit) -> bool:
    if fit.vectorises is None:
        example = fit.reference.to(_device(fit)).rows([0, len(fit.reference) - 1])
        fit.vectorises = vectorises(fit.model, fit.guide, example, fit.coords["perturbation"])
    return fit.vectorises


def _fresh(fit: Fit, draws: int | None, cells: int) -> Base:
    reference = fit.reference.to(_device(fit))
    rows = torch.randint(len(reference), (cells,)).tolist()
    return fresh_base(fit.model, fit.guide, reference.rows([0]), reference.rows(rows), draws)


def _reseed(*key: int) -> None:
    """The random state of one chunk, whatever was drawn before it."""
    torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1))


def _worlds(named: list[tuple[str, Intervention]], rows: int, vectorised: bool, noise: str = "mean") -> Iterator[tuple[int, int]]:
    """Chunks of interventions. Where noise is drawn each is alone, from a random state that its companions do not touch."""
    if noise == "mean":
        yield from _chunks(len(named), MAX_ROWS // rows if vectorised else 1)
        return
    key = torch.initial_seed()
    for k, (_, act) in enumerate(named):
        _reseed(key, 1, zlib.crc32(str(act).encode()) if noise == "independent" else 0)
        yield k, k + 1


def _chunks(n: int, size: int) -> list[tuple[int, int]]:
    size = max(1, size)
    return [(i, min(n, i + size)) for i in range(0, n, size)]


def _population(mean: Tensor, batch: Batch, unit: str) -> np.ndarray:
    """[S, K, n, G] -> [S, K, G]: the population's expression in the unit."""
    mean = mean.detach()  # of laws that compute it when they are asked
    if unit in ("rate", "log1p_cp10k"):
        rate = (mean / batch.library_size).mean(-2)
        return (rate if unit == "rate" else (1e4 * rate).log1p()).cpu().numpy()
    return mean.mean(-2).cpu().numpy()


def _cells(x: Tensor, batch: Batch, unit: str) -> np.ndarray:
    """[..., n, G] -> the same, in the unit."""
    x = x.detach()
    if unit in ("rate", "log1p_cp10k"):
        rate = x / batch.library_size
        x = rate if unit == "rate" else (1e4 * rate).log1p()
    return x.cpu().numpy()


def _allocate(named: list[tuple[str, Intervention]], draws: int, cells: int, fit: Fit) -> dict[str, np.ndarray]:
    shape = (len(named), draws, cells, len(fit.coords["gene"]))
    _fits_in_memory(2 * 4 * int(np.prod(shape)), "the result", "ask for fewer cells, draws or interventions, or use effects()")
    return {"expression": np.empty(shape, np.float32), "effect": np.empty(shape, np.float32)}


def _write(
    out: dict[str, np.ndarray],
    worlds: tuple[int, int],
    draws: tuple[int, int],
    rows: slice,
    before: Tensor,
    after: Tensor,
    batch: Batch,
    unit: str,
) -> None:
    """Put the worlds of one chunk, [S, K, n, G], where they belong."""
    after = after.reshape(draws[1] - draws[0], worlds[1] - worlds[0], *after.shape[-2:])
    value, base = _cells(after, batch, unit), _cells(before, batch, unit)
    where = (slice(*worlds), slice(*draws), rows)
    out["expression"][where] = value.swapaxes(0, 1)
    out["effect"][where] = (value - base).swapaxes(0, 1)


def _dataset(
    out: dict[str, np.ndarray], named: list[tuple[str, Intervention]], draws: int, cells: Any, fit: Fit, attrs: dict[str, Any]
) -> xr.Dataset:
    dims = ("intervention", "draw", "cell", "gene")
    coords = {"intervention": [n for n, _ in named], "draw": np.arange(draws), "cell": cells, "gene": fit.coords["gene"]}
    return xr.Dataset({k: (dims, v) for k, v in out.items()}, coords=coords, attrs=attrs | _unseen(fit, named))
