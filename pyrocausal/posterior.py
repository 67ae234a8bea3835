"""The posterior as ArviZ and NetworkX see it, and the evidence of held-out cells.

Draws are independent draws from the guide, not a Markov chain: R-hat and effective sample size of ``az.summary`` say nothing about
convergence here; the ELBO trace (``sample_stats``) and ``az.loo`` do.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import networkx as nx
import numpy as np
import pyro.poutine as poutine
import torch
import xarray as xr
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor

from pyrocausal.data import PerturbationData
from pyrocausal.elbo import _deterministic, _sample_sites
from pyrocausal.errors import InterventionError
from pyrocausal.fit import Fit
from pyrocausal.loading import Batch
from pyrocausal.query import MAX_BYTES, _chunks, _device, _fresh, _population, _same_names, _seeded, _unit, _vectorises
from pyrocausal.worlds import MAX_ROWS, Base, _plates, _run_base, factual_base, law_under
from pyrocausal.worlds import global_draws as _global_draws

RESERVED_DIMS = {
    "dose": ("perturbation",),
    "hit": ("perturbation",),
    "penetrance": ("perturbation",),
    "mask": ("perturbation", "latent"),
    "effect": ("perturbation", "latent"),
    "graph": ("latent", "latent_to"),
    "lagged": ("latent", "latent_to"),
    "decay": ("latent",),
    "basal": ("latent",),
    "shift": ("latent",),
    "course": ("time", "perturbation"),
    "held": ("time", "latent"),
    "z": ("latent",),
    "clamp": ("latent",),
    "u": ("latent",),
    "x_loc": ("gene",),
    "x": ("gene",),
}


def site_dims(fit: Fit) -> dict[str, tuple[str, ...]]:
    """Names of the event dimensions of each site: declared in ``infer={"event_dims": ...}``, reserved by the contract, or numbered."""
    batch = fit.reference.to(_device(fit)).rows([0])
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        trace = poutine.trace(fit.model).get_trace(batch)
    out = {}
    for name, site in trace.nodes.items():
        if site["type"] != "sample" or type(site["fn"]) is _Subsample:
            continue
        n = site["fn"].event_dim
        declared = site["infer"].get("event_dims") or RESERVED_DIMS.get(name, ())
        if getattr(fit.model, "timed", False) and n == len(declared) + 1:
            declared = ("time", *declared)
        if getattr(fit.model, "state", "program") == "gene":
            declared = tuple(d.replace("latent", "gene") for d in declared)
        out[name] = tuple(declared) if len(declared) == n else tuple(f"{name}_dim_{i}" for i in range(n))
    return out


def to_inference_data(
    fit: Fit,
    draws: int = 500,
    cells: PerturbationData | None = None,
    *,
    predictive_draws: int = 50,
    particles: int = 10,
    local: bool = False,
    seed: int = 0,
) -> Any:
    """The fit as ``arviz.InferenceData`` (``xarray.DataTree`` under ArviZ 1.x).

    Args:
        draws: posterior draws.
        cells: cells for the groups about cells; without them there are ``posterior`` and ``sample_stats`` only.
        predictive_draws: draws of ``posterior_predictive`` (the large one: draws x cells x genes).
        particles: importance samples that integrate each cell's latent state out of ``log_likelihood``.
        local: also store the cells' latent sites in ``posterior``.

    Returns:
        Groups and variables:

        - ``posterior``: every global latent site, dims ``(chain, draw, ...)`` by the names of its plates and events, the global
          deterministic ones among ``mask``, ``effect``, ``penetrance`` and ``graph``, and ``net_effect``, which is ``mask * effect`` (an
          effect without target follows its prior). Edges between programs have coordinates such as ``"3->7"`` (dimension ``edge``, or
          ``edge_name`` beside a site ``edge``);
        - ``posterior_predictive``: ``x`` (chain, draw, cell, gene);
        - ``observed_data``: ``x`` (cell, gene); ``constant_data``: ``dose`` (cell, perturbation), ``library_size`` and
          ``batch_code`` (cell);
        - ``log_likelihood``: ``x`` (chain, draw, cell), ``log p(x_n | globals)`` with the cell's latent state integrated out (importance
          sampling from the guide), as ``az.loo`` needs it;
        - ``sample_stats``: ``elbo`` and ``elbo_validation`` (epoch), nats per cell.
    """
    dims = site_dims(fit)
    if cells is not None:
        _same_names(fit, cells)
        size = 4 * predictive_draws * len(cells) * len(fit.coords["gene"]) + 8 * draws * len(cells)
        if size > MAX_BYTES:
            raise InterventionError(f"the groups about cells would take {size / 2**30:.1f} GiB; pass fewer cells or predictive_draws")
    with _seeded(seed, fit):
        drawn = global_draws(fit, max(draws, predictive_draws if cells is not None else 0))
        sampled = {k: v[:draws] for k, v in drawn.items()}
        tables = sampled | deterministic_tables(fit, sampled, draws)
        net = {"net_effect": tables["mask"] * tables["effect"]} if {"mask", "effect"} <= tables.keys() else {}
        groups: dict[str, Any] = {"posterior": {k: v[None] for k, v in (tables | net).items()}}
        dims |= {"net_effect": dims.get("effect", ())}
        all_dims = {k: ("chain", "draw", *dims.get(k, _numbered(k, v, 1))) for k, v in (tables | net).items()}
        if cells is not None:
            x = _predictive(fit, cells, predictive_draws, drawn)
            if local:
                states = _states(fit, cells, draws, drawn)
                groups["posterior"] |= {k: v[None] for k, v in states.items()}
                all_dims |= {k: ("chain", "draw", "cell", *dims[k]) for k in states}
            groups |= {
                "posterior_predictive": {"x": x[None]},
                "log_likelihood": {"x": log_likelihood(fit, cells, sampled, particles)[None]},
                "observed_data": {"x": cells.dense()},
                "constant_data": {"dose": cells.dose.toarray(), "library_size": cells.library_size, "batch_code": cells.batch_codes},
            }
    epochs = fit.history.index.to_numpy()
    groups["sample_stats"] = {"elbo": fit.history["elbo"].to_numpy(), "elbo_validation": fit.history["validation"].to_numpy()}
    fixed = {
        ("log_likelihood", "x"): ("chain", "draw", "cell"),
        ("posterior_predictive", "x"): ("chain", "draw", "cell", "gene"),
        ("observed_data", "x"): ("cell", "gene"),
        ("constant_data", "dose"): ("cell", "perturbation"),
        ("constant_data", "library_size"): ("cell",),
        ("constant_data", "batch_code"): ("cell",),
        ("sample_stats", "elbo"): ("epoch",),
        ("sample_stats", "elbo_validation"): ("epoch",),
    }
    names: dict[str, Any] = {k: fit.coords[k] for k in ("gene", "perturbation")} | {"epoch": epochs, "gene_to": fit.coords["gene"]}
    if cells is not None:
        names["cell"] = list(cells.cells)
    if getattr(fit.model, "timed", False):
        names["time"] = fit.model.times.tolist()  # type: ignore[operator]
    if hasattr(fit.model, "edge_index"):
        names["edge"] = [f"{j}->{k}" for j, k in fit.model.edge_index.T.tolist()]  # type: ignore[operator]
    for taken in {d for ds in all_dims.values() for d in ds} & set(groups["posterior"]):  # a site of its dimension's name
        all_dims = {k: tuple(f"{d}_name" if d == taken else d for d in ds) for k, ds in all_dims.items()}
        names |= {f"{taken}_name": names[taken]} if taken in names else {}
    note = {"sampler": "independent draws from the guide", "inference_library": "pyrocausal"}
    datasets = {g: _dataset(g, variables, fixed, all_dims, names, note) for g, variables in groups.items()}
    return _bundle(datasets)


def global_draws(fit: Fit, draws: int) -> dict[str, np.ndarray]:
    """Posterior draws of the latent sites outside the plate over cells, [draws, ...event]; consumes the current random state."""
    drawn = _global_draws(fit.guide, fit.reference.to(_device(fit)).rows([0]), draws, _vectorises(fit))
    return {k: v.detach().cpu().numpy() for k, v in drawn.items()}


def deterministic_tables(fit: Fit, sampled: dict[str, np.ndarray], draws: int) -> dict[str, np.ndarray]:
    """Deterministic sites among ``mask``, ``effect``, ``penetrance``, ``graph``, ``decay`` and ``basal`` of no cell, [draws, ...event].

    Args:
        sampled: draws of the latent sites, of :func:`global_draws`, that they follow from. What follows from none of them is one array,
            shown ``draws`` times.
    """
    device = _device(fit)
    example = fit.reference.to(device).rows([0])
    vectorised = _vectorises(fit)
    parts: dict[str, list[np.ndarray]] = {}
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.no_grad():
        for start, stop in _chunks(draws if sampled else 1, MAX_ROWS if vectorised else 1):
            values = {k: torch.as_tensor(v[start:stop], device=device) for k, v in sampled.items()}
            values = {k: v[:, None, None] if vectorised else v[0] for k, v in values.items()}
            base = _run_base(fit.model, values, example, stop - start if vectorised else None)
            for name in ("mask", "effect", "penetrance", "graph", "lagged", "decay", "basal"):
                site = base.trace.nodes.get(name)
                if site is None or not _deterministic(site) or any(f.name == "cell" for f in site["cond_indep_stack"]):
                    continue
                value = site["value"]
                event = value.shape[value.dim() - len(RESERVED_DIMS[name]) :]
                rows = value.reshape(-1, *event).cpu().numpy()
                parts.setdefault(name, []).append(np.broadcast_to(rows, (stop - start if sampled else draws, *event)))
    return {name: rows[0] if len(rows) == 1 else np.concatenate(rows) for name, rows in parts.items()}


def log_likelihood(fit: Fit, cells: PerturbationData, tables: dict[str, np.ndarray], particles: int = 10) -> np.ndarray:
    """``log p(x_n | globals_s)``, [draws, n_cells]: the cell's latent state integrated out by importance sampling from the guide.

    ``log (1/M) sum_m p(x_n | z_m) p(z_m) / q(z_m | x_n, globals_s)``, a lower bound in expectation that is tight in M.
    """
    draws = len(next(iter(tables.values()))) if tables else 1
    out = np.empty((draws, len(cells)))
    vectorised = _vectorises(fit)
    for low, high in _chunks(len(cells), MAX_ROWS // (4 * particles)):
        batch = cells.batch(np.arange(low, high), device=_device(fit))
        for start, stop in _chunks(draws, max(1, MAX_ROWS // ((high - low) * particles)) if vectorised else 1):
            given = {k: torch.as_tensor(v[start:stop], device=_device(fit)) for k, v in tables.items()}
            weights = _log_weights(fit, batch, particles, given, vectorised)  # [particles, draws, n]
            out[start:stop, low:high] = (weights.logsumexp(0) - math.log(particles)).cpu().numpy()
    return out


def iwelbo(fit: Fit, data: PerturbationData, particles: int = 100, seed: int = 0) -> np.ndarray:
    """Predictive importance-weighted bound of each cell, [n_cells] nats (SAMS-VAE, arXiv 2311.02794).

    Globals are drawn once per particle from the guide, the cell's state from its encoder:
    ``log (1/P) sum_p p(x | z_p, globals_p) p(z_p) / q(z_p | x, globals_p)``; globals are not scored against their prior.
    """
    _same_names(fit, data)
    out = np.empty(len(data))
    with _seeded(seed, fit):
        vectorised = _vectorises(fit)
        tables = {k: torch.as_tensor(v, device=_device(fit)) for k, v in global_draws(fit, particles).items()}
        for low, high in _chunks(len(data), 512):
            batch = data.batch(np.arange(low, high), device=_device(fit))
            total = torch.full((high - low,), -math.inf, dtype=torch.float64, device=_device(fit))
            for start, stop in _chunks(particles, max(1, MAX_ROWS // (high - low)) if vectorised else 1):
                given = {k: v[start:stop] for k, v in tables.items()}
                weights = _log_weights(fit, batch, 1 if tables else stop - start, given, vectorised)
                weights = weights[0] if tables else weights[:, 0]
                total = torch.logaddexp(total, weights.logsumexp(0))
            out[low:high] = (total - math.log(particles)).cpu().numpy()
    return out


def to_networkx(
    fit: Fit,
    draws: int = 300,
    *,
    threshold: float = 0.5,
    minimum: float = 0.1,
    minimum_edge: float = 0.1,
    n_genes: int = 15,
    lag: int = 0,
    seed: int = 0,
) -> nx.DiGraph:
    """The fitted mechanism as a graph: perturbation -> program -> program -> gene.

    Args:
        threshold: least posterior probability of an edge that is kept.
        minimum: least size of a program's effect on a gene, in the unit of the edge, that counts as an effect.
        minimum_edge: least size of the weight between two programs that counts as an edge, where no site ``edge`` says whether it is one.
        n_genes: most genes per program.
        lag: of the edges between programs: 0, or 1 for what a program does to the next time (sites ``graph`` and ``lagged``).

    Returns:
        ``nx.DiGraph`` whose nodes have ``kind`` (``perturbation``, ``program``, ``gene``; programs are named ``program 3``) and whose
        edges have

        - perturbation -> program: ``probability`` of being a target (the mean of ``mask``; without one, that the sign is the majority's),
          ``mean``, ``lower``, ``upper`` (90 % interval) of ``mask * effect``, in basal standard deviations;
        - program -> program, of a model with a ``graph``: ``probability`` that the edge is there (that the site ``edge`` is on, if there is
          one; otherwise that the weight exceeds ``minimum_edge`` in size), ``mean``, ``lower``, ``upper`` of the weight;
        - program -> gene: the change of the gene when the program rises by one standard deviation in untreated cells, ``mean``, ``lower``,
          ``upper`` over draws, ``probability`` that it exceeds ``minimum`` in size; in ``graph.graph["unit"]``. With a ``graph`` it is the
          direct effect, what goes through other programs is left to their edges.

        Where the nodes of the model are genes: ``do(A)`` -> gene with what the perturbation does to it directly, and gene -> gene with the
        weight of the edge; probability that it exceeds ``minimum`` (``minimum_edge``) in size, both in units of the genes' own noise.
    """
    if getattr(fit.model, "state", "program") == "gene":
        return _gene_network(fit, draws, threshold, minimum, minimum_edge, seed)
    unit = _unit(fit, None)
    out = nx.DiGraph(unit=unit, threshold=threshold, minimum=minimum)
    out.add_nodes_from(fit.coords["perturbation"], kind="perturbation")
    with _seeded(seed, fit):
        tables = global_draws(fit, draws)
        tables |= deterministic_tables(fit, tables, draws)
        if lag not in (0, 1) or (lag == 1 and "lagged" not in tables):
            raise InterventionError(f"lag={lag} was given; the model has edges of lag {'0 and 1' if 'lagged' in tables else '0 only'}")
        tables |= {"graph": tables["lagged"]} if lag else {}
        if "effect" not in tables:
            raise InterventionError("the model samples no 'effect', so there are no edges from perturbations to programs to draw")
        moved = tables["effect"] * tables.get("mask", 1.0)
        sign = np.maximum((moved > 0).mean(0), (moved < 0).mean(0))
        probability = tables["mask"].mean(0) if "mask" in tables else sign
        for p, d in zip(*np.nonzero(probability >= threshold), strict=True):
            out.add_node(f"program {d}", kind="program")
            summary = _summary(moved[:, p, d])
            out.add_edge(fit.coords["perturbation"][p], f"program {d}", probability=float(probability[p, d]), **summary)
        if "graph" in tables:
            out.graph["minimum_edge"] = minimum_edge
            on = _edge_probability(fit, tables, minimum_edge)
            for j, k in zip(*np.nonzero(on >= threshold), strict=True):
                out.add_nodes_from([f"program {j}", f"program {k}"], kind="program")
                out.add_edge(f"program {j}", f"program {k}", probability=float(on[j, k]), **_summary(tables["graph"][:, j, k]))
        programs = sorted(int(n.split()[1]) for n, kind in out.nodes("kind") if kind == "program")
        loadings = _loadings(fit, min(draws, 100), unit, programs)  # [draws, programs, G]
    for i, d in enumerate(programs):
        mean = loadings[:, i].mean(0)
        sizes = (np.abs(loadings[:, i]) > minimum).mean(0)
        for g in np.argsort(-np.abs(mean))[:n_genes]:
            if sizes[g] >= threshold:
                gene = fit.coords["gene"][g]
                name = gene if gene not in fit.coords["perturbation"] else f"{gene} (gene)"
                out.add_node(name, kind="gene")
                out.add_edge(f"program {d}", name, probability=float(sizes[g]), **_summary(loadings[:, i, g]))
    return out


def _gene_network(fit: Fit, draws: int, threshold: float, minimum: float, minimum_edge: float, seed: int) -> nx.DiGraph:
    genes, unit = fit.coords["gene"], np.asarray(fit.model.unit.detach().cpu())  # type: ignore[operator]
    out = nx.DiGraph(unit=_unit(fit, None), threshold=threshold, minimum=minimum, minimum_edge=minimum_edge)
    out.add_nodes_from(genes, kind="gene")
    out.add_nodes_from([f"do({p})" for p in fit.coords["perturbation"]], kind="perturbation")
    with _seeded(seed, fit):
        sampled = global_draws(fit, draws)
        tables = deterministic_tables(fit, sampled, draws)
    for table, names, scale, least in (
        ("effect", [f"do({p})" for p in fit.coords["perturbation"]], 1 / unit, minimum),
        ("graph", genes, unit[:, None] / unit, minimum_edge),
    ):
        probability = (np.abs(tables[table] * scale) > least).mean(0)
        for a, b in zip(*np.nonzero(probability >= threshold), strict=True):
            out.add_edge(names[a], genes[b], probability=float(probability[a, b]), **_summary(tables[table][:, a, b]))
    return out


# -- parts ---------------------------------------------------------------------------------------------------------------------


def _log_weights(fit: Fit, batch: Batch, particles: int, given: dict[str, Tensor], vectorised: bool) -> Tensor:
    """``log p(x | z) + log p(z) - log q(z)`` of each cell, [particles, draws, n], for given globals [draws, ...event]."""
    draws = len(next(iter(given.values()))) if given else 1
    if vectorised:
        values = {k: v.repeat(particles, *([1] * (v.dim() - 1)))[:, None, None] for k, v in given.items()}
        return _weights_once(fit, batch, values, particles * draws).reshape(particles, draws, len(batch))
    values = {k: v[0] for k, v in given.items()}
    return torch.stack([_weights_once(fit, batch, values, None) for _ in range(particles)])[:, None]


def _weights_once(fit: Fit, batch: Batch, values: dict[str, Tensor], draws: int | None) -> Tensor:
    with torch.no_grad():
        with _plates(draws, None):
            guided = poutine.trace(poutine.condition(fit.guide, data=values)).get_trace(batch)
            model = poutine.replay(poutine.condition(fit.model, data=values), trace=guided)
            trace = poutine.trace(model).get_trace(batch)
        total: Any = 0.0
        for name, site in _sample_sites(trace):
            if name in values or not any(f.name == "cell" for f in site["cond_indep_stack"]):
                continue
            total = total + site["fn"].log_prob(site["value"])
            if name in guided.nodes:
                total = total - guided.nodes[name]["fn"].log_prob(guided.nodes[name]["value"])
    return total.double().reshape(-1, len(batch)) if draws is not None else total.double()


def _bases(fit: Fit, cells: PerturbationData, draws: int, tables: dict[str, np.ndarray]) -> Iterator[tuple[slice, slice, Base]]:
    """Factual base worlds in chunks of cells and draws, each draw with the same globals for all cells."""
    vectorised = _vectorises(fit)
    given = {k: torch.as_tensor(v, device=_device(fit)) for k, v in tables.items()}
    for low, high in _chunks(len(cells), MAX_ROWS // 4):
        batch = cells.batch(np.arange(low, high), device=_device(fit))
        for start, stop in _chunks(draws, MAX_ROWS // (high - low) if vectorised else 1):
            values = {k: v[start:stop] if vectorised else v[start] for k, v in given.items()}
            base = factual_base(fit.model, fit.guide, batch, stop - start if vectorised else None, values)
            yield slice(start, stop), slice(low, high), base


def _predictive(fit: Fit, cells: PerturbationData, draws: int, tables: dict[str, np.ndarray]) -> np.ndarray:
    """Posterior-predictive observations, [draws, n_cells, n_genes]."""
    out = np.empty((draws, len(cells), len(fit.coords["gene"])), np.float32)
    for which, rows, base in _bases(fit, cells, draws, tables):
        out[which, rows] = base.law.sample().reshape(out[which, rows].shape).cpu().numpy()
    return out


def _states(fit: Fit, cells: PerturbationData, draws: int, tables: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The cells' latent sites, each [draws, n_cells, ...event]."""
    out: dict[str, np.ndarray] = {}
    for which, rows, base in _bases(fit, cells, draws, tables):
        shape = (which.stop - which.start, rows.stop - rows.start)
        for name, value in base.values.items():
            if name in tables:
                continue
            event = value.shape[3 if base.draws is not None else 1 :]
            table = out.setdefault(name, np.empty((draws, len(cells), *event), np.float32))
            table[which, rows] = value.reshape(*shape, *event).cpu().numpy()
    return out


def _edge_probability(fit: Fit, tables: dict[str, np.ndarray], minimum_edge: float) -> np.ndarray:
    """Posterior probability of each edge between programs, [D, D]."""
    graph = tables["graph"]
    if "edge" not in tables:
        return (np.abs(graph) > minimum_edge).mean(0)
    on, index = tables["edge"], getattr(fit.model, "edge_index", None)
    if index is not None and on.shape[1:] == index.shape[1:]:
        j, k = index.cpu().numpy()
        on = on * (graph[:, j, k] != 0)  # an edge against a learned order is none
        out = np.zeros(graph.shape[1:])
        out[j, k] = on.mean(0)
        return out
    return (graph != 0).mean(0)


def _loadings(fit: Fit, draws: int, unit: str, programs: list[int]) -> np.ndarray:
    """Change of each gene when each program rises by one basal standard deviation in untreated cells, [draws, programs, n_genes]: the
    program alone if the model has a graph, whose edges say what follows."""
    vectorised = _vectorises(fit)
    n_cells, size = 32, 16
    parts = []
    for start, stop in _chunks(draws, size if vectorised else 1):
        base = _fresh(fit, stop - start if vectorised else None, n_cells)
        site = "u" if {"graph", "u"} <= set(base.trace.nodes) else "shift"
        if site not in base.trace.nodes:
            raise InterventionError("the model has no site 'shift', so its programs cannot be moved; declare it as a deterministic site")
        value = base.trace.nodes[site]["value"]
        steps = torch.eye(value.shape[-1], device=value.device, dtype=value.dtype)[programs, None]  # [programs, 1, D]
        steps = steps.unsqueeze(-2) if getattr(fit.model, "timed", False) else steps  # at all times
        before = _population(base.law.mean.reshape(stop - start, 1, n_cells, -1), base.batch, unit)
        moved = [np.empty((stop - start, 0, before.shape[-1]), before.dtype)]
        for low, high in _chunks(len(programs), MAX_ROWS // (size * n_cells) if vectorised else 1):
            law = law_under(fit.model, base, {site: value + steps[low:high]}, high - low, strict=False)
            moved.append(_population(law.mean.reshape(stop - start, high - low, n_cells, -1), base.batch, unit))
        parts.append(np.concatenate(moved, 1) - before)
    return np.concatenate(parts)


def _summary(values: np.ndarray) -> dict[str, float]:
    lower, upper = np.quantile(values, [0.05, 0.95])
    return {"mean": float(values.mean()), "lower": float(lower), "upper": float(upper)}


def _numbered(name: str, value: np.ndarray, skip: int) -> tuple[str, ...]:
    return tuple(f"{name}_dim_{i}" for i in range(value.ndim - skip))


def _dataset(
    group: str,
    variables: dict[str, np.ndarray],
    fixed: dict[tuple[str, str], tuple[str, ...]],
    all_dims: dict[str, tuple[str, ...]],
    names: dict[str, Any],
    attrs: dict[str, str],
) -> xr.Dataset:
    data = {k: (fixed.get((group, k), all_dims.get(k)), np.asarray(v)) for k, v in variables.items()}
    out = xr.Dataset(data, attrs=attrs)
    coords = {d: names[d] if d in names and len(names[d]) == n else np.arange(n) for d, n in out.sizes.items()}
    return out.assign_coords(coords)


def _bundle(datasets: dict[str, xr.Dataset]) -> Any:
    """``az.InferenceData`` under ArviZ 0.x, ``xr.DataTree`` under 1.x (where InferenceData is a deprecated name)."""
    import arviz as az

    if int(az.__version__.split(".")[0]) >= 1:
        return xr.DataTree.from_dict(datasets)
    return az.InferenceData(**datasets)  # type: ignore[arg-type]
