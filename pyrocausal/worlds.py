"""Many worlds in one run: the same cells, the same noise, K interventions, S posterior draws.

A model is written for one world. Here it runs under two outer plates, ``draw`` (dim -3) and ``intervention`` (dim -2), with the values of
``pyro.do`` broadcast along them, so that one pass of the decoder answers K questions for S draws. Latent sites keep the value that they had
in the base world (:class:`Twin`), whence worlds differ by the intervention alone.

A model whose arithmetic does not broadcast over draws (``dose @ table`` with a sampled table; see
:func:`pyrocausal.structural.mechanism_shift`) is recognised by a trial run and served draw by draw, with the same results.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.poutine as poutine
import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor

from pyrocausal.compile_sites import TABLES, as_table, compile_shift, compile_sites, schedule_of
from pyrocausal.elbo import _deterministic
from pyrocausal.errors import ContractError, InterventionError
from pyrocausal.interventions import Intervention
from pyrocausal.loading import Batch
from pyrocausal.soft import Change, Soft

MAX_ROWS = 4096  # cells x draws x interventions that go through the model at once


@dataclass
class Base:
    """A base world: the cells as they are (or fresh ones), for S draws.

    Attributes:
        batch: the cells, observation hidden.
        values: value of each latent site; locals [S, 1, n, ...], globals [S, 1, 1, ...] (without the leading S, 1 when ``draws`` is None).
        trace: trace of the model, whose sites hold the base laws.
        draws: S, or None for a single draw served without plates.
        uniform: uniform numbers that decide where a perturbation takes, [S, n, P] (or [n, P]).
    """

    batch: Batch
    values: dict[str, Tensor]
    trace: Any
    draws: int | None
    uniform: Tensor

    @property
    def law(self) -> Any:
        """The law of the observation, batch shape [S, 1, n] or [n]."""
        return self.trace.nodes["x"]["fn"]


class _Quiet(Messenger):
    """The observation is not sampled: its mean stands in for it."""

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] == "x" and not msg["done"]:
            msg["value"] = msg["fn"].mean
            msg["done"] = True


class Twin(Messenger):
    """Latent sites keep what they had in the base world.

    A site whose law the intervention does not touch keeps its value, bit for bit. A location-scale site whose law it moves keeps its
    standardised residual: ``v' = v + (loc' - loc) + (scale' - scale) (v - loc) / scale``. A law that knows how (``carry``) takes its
    value to the new law itself. Another site whose law it moves is drawn afresh
    from the new law (``strict=False``), or refused (``strict=True``: a counterfactual would not be about this cell).
    """

    def __init__(self, base: Base, strict: bool) -> None:
        super().__init__()
        self.base = base
        self.strict = strict

    def _pyro_sample(self, msg: Any) -> None:
        name = msg["name"]
        if name not in self.base.values or msg["is_observed"] or msg["done"]:
            return
        value, old, new = self.base.values[name], self.base.trace.nodes[name]["fn"], msg["fn"]
        if hasattr(old, "carry") and type(old) is type(new):
            msg["value"], msg["done"] = old.carry(value, new), True
            return
        old_loc, old_scale = _location_scale(old)
        new_loc, new_scale = _location_scale(new)
        if old_loc is not None and new_loc is not None:
            residual = (value - old_loc) / old_scale
            moved = value + (new_loc - old_loc) + (new_scale - old_scale) * residual
            msg["value"] = moved if moved.shape != value.shape else torch.where(moved == value, value, moved)
        elif _same_law(old, new):
            msg["value"] = value
        elif self.strict:
            raise InterventionError(
                f"the intervention moves the law of the site {name!r} ({type(new).__name__}), whose noise cannot be carried over to the "
                "counterfactual; ask for interventional() instead"
            )
        else:
            return
        msg["done"] = True


def _location_scale(fn: Any) -> tuple[Any, Any]:
    while hasattr(fn, "base_dist") and hasattr(fn, "reinterpreted_batch_ndims"):
        fn = fn.base_dist
    if type(fn).__name__ in ("Normal", "Laplace", "Cauchy", "StudentT", "Gumbel"):
        return fn.loc, fn.scale
    return None, None


def _same_law(a: Any, b: Any) -> bool:
    """Whether two laws are equal: class, transforms and parameters (a law without parameters to compare counts as moved)."""
    if type(a) is not type(b):
        return False
    if hasattr(a, "base_dist"):
        mine, theirs = getattr(a, "transforms", []), getattr(b, "transforms", [])
        return len(mine) == len(theirs) and all(s == t for s, t in zip(mine, theirs, strict=True)) and _same_law(a.base_dist, b.base_dist)
    names = [n for n in a.arg_constraints if n in a.__dict__ and n in b.__dict__] or list(a.arg_constraints)
    return bool(names) and all(same_values(getattr(a, n), getattr(b, n)) for n in names)


def same_values(a: Any, b: Any) -> bool:
    """Whether two parameters are equal where they are broadcast together."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.equal(*torch.broadcast_tensors(a, b))
    return bool(a == b)


@contextmanager
def _plates(draws: int | None, interventions: int | None) -> Iterator[None]:
    with ExitStack() as stack:
        if draws is not None:
            stack.enter_context(pyro.plate("draw", draws, dim=-3))
        if interventions is not None:
            stack.enter_context(pyro.plate("intervention", interventions, dim=-2))
        yield


def latents(trace: Any, local: bool | None = None) -> dict[str, Tensor]:
    """Values of the latent sample sites of a trace; only those inside (or outside) the plate over cells if ``local`` is given."""
    out = {}
    for name, site in trace.nodes.items():
        if site["type"] != "sample" or site["is_observed"] or _deterministic(site) or type(site["fn"]) is _Subsample or name == "x":
            continue
        if local is None or local == any(f.name == "cell" for f in site["cond_indep_stack"]):
            out[name] = site["value"]
    return out


def fresh_base(model: Callable[..., Any], guide: Callable[..., Any], example: Batch, population: Batch, draws: int | None) -> Base:
    """Fresh untreated cells: globals from the guide, everything local from the model.

    Args:
        example: cells with their expression, so that any guide can run.
        population: covariates of the fresh cells; its dose is the base treatment.
    """
    with torch.no_grad():
        with _plates(draws, None):
            guided = poutine.trace(guide).get_trace(example)
        return _run_base(model, latents(guided, local=False), population, draws)


def factual_base(
    model: Callable[..., Any], guide: Callable[..., Any], batch: Batch, draws: int | None, given: dict[str, Tensor] | None = None
) -> Base:
    """The measured cells themselves: locals from the guide (abduction), treatment as it was.

    Args:
        given: draws of the globals, [S, ...event] (without S when ``draws`` is None); from the guide if None.
    """
    lead = 0 if draws is None else 1
    values = {k: v.reshape(*v.shape[:lead], *([1, 1] * lead), *v.shape[lead:]) for k, v in (given or {}).items()}
    with torch.no_grad():
        with _plates(draws, None):
            guided = poutine.trace(poutine.condition(guide, data=values)).get_trace(batch)
        return _run_base(model, latents(guided) | values, batch, draws)


def global_draws(guide: Callable[..., Any], example: Batch, draws: int, vectorised: bool) -> dict[str, Tensor]:
    """Draws of the latent sites outside the plate over cells, [draws, ...event]; consumes the current random state."""
    with torch.no_grad():
        if vectorised:
            with _plates(draws, None):
                trace = poutine.trace(guide).get_trace(example)
            return {k: v.expand(draws, *v.shape[1:]).reshape(draws, *v.shape[3:]) for k, v in latents(trace, local=False).items()}
        each = [latents(poutine.trace(guide).get_trace(example), local=False) for _ in range(draws)]
        return {k: torch.stack([e[k] for e in each]) for k in each[0]}


def _run_base(model: Callable[..., Any], values: dict[str, Tensor], batch: Batch, draws: int | None) -> Base:
    hidden = batch.hide()
    with _plates(draws, None), poutine.trace() as tracer, _Quiet(), poutine.condition(data=values):
        model(hidden)
    trace = tracer.trace
    if "x" not in trace.nodes:
        raise ContractError("the model has no site 'x'; write pyro.sample('x', ..., obs=batch.x) in the plate over cells")
    sampled = {n: s["value"] for n, s in trace.nodes.items() if n in values or n in latents(trace)}
    lead = () if draws is None else (draws,)
    uniform = torch.rand(*lead, len(batch), batch.dose.shape[-1], dtype=batch.dose.dtype, device=batch.dose.device)
    return Base(hidden, sampled, trace, draws, uniform)


def intervened_law(
    model: Callable[..., Any], base: Base, interventions: Sequence[Intervention], perturbations: Sequence[str], strict: bool
) -> tuple[Any, Tensor]:
    """The law of the observation in each of K worlds, batch shape [S, K, n], and where a world is the base world.

    Draw by draw (``base.draws`` is None) there is one world at a time, K = 1, and the batch shape is [1, n].

    Returns:
        ``(law, same)``: ``same`` [S or 1, K, n] is true for cells whose intervened sites have the very values of the base world.
    """
    sites, values, by = compiled(model, base, interventions, perturbations)
    law = law_under(model, base, values, len(interventions), strict, by)
    same = (values["dose"] == base.batch.dose).all(-1)
    for name in values.keys() - {"dose"}:
        before = as_table(sites[name]) if name in TABLES else sites[name]
        equal = (values[name] == before) | (values[name].isnan() & before.isnan())
        same = same & (equal.all(-1).all(-1) if name in (*TABLES, "course", "held") else equal.all(-1))
    if by is not None:
        same = same & (by == 0).all(-1)
    return law, same


def compiled(
    model: Callable[..., Any], base: Base, interventions: Sequence[Intervention], perturbations: Sequence[str]
) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor | None]:
    """Values of the sites in the base world, what ``pyro.do`` sets in the K worlds, and what is added to ``shift``."""
    sites = {name: s["value"] for name, s in base.trace.nodes.items() if s["type"] == "sample" and not (name == "mask" and _targetless(s))}
    cyclic = getattr(model, "cyclic", False)
    schedule = schedule_of(model)
    values = compile_sites(interventions, perturbations, base.batch.dose, sites, sites, base.uniform, cyclic, schedule)
    by = compile_shift(interventions, sites, sites)
    return sites, values, by


def _targetless(mask: Any) -> bool:
    """Whether a mask that is not sampled names no targets to flip: all ones (a dense model), or soft."""
    return _deterministic(mask) and (bool((mask["value"] == 1).all()) or bool(((mask["value"] != 0) & (mask["value"] != 1)).any()))


def law_under(
    model: Callable[..., Any], base: Base, values: dict[str, Tensor], n_worlds: int, strict: bool, by: Tensor | None = None
) -> Any:
    """The law of the observation when ``pyro.do`` sets sites to ``values``, whose dimension -2 (before the cells) runs over the worlds, and
    ``by`` [K, 1, D] is added to ``shift``."""
    law = trace_under(model, base, values, n_worlds, strict, by).nodes["x"]["fn"]
    return law.expand((1, *law.batch_shape)) if base.draws is None else law


def trace_under(
    model: Callable[..., Any], base: Base, values: dict[str, Tensor], n_worlds: int, strict: bool, by: Tensor | None = None
) -> Any:
    """The trace of the model in the worlds of :func:`law_under`.

    Draw by draw the model sees the shapes that it was written for: one world, no plates around it.
    """
    if base.draws is None:
        assert n_worlds == 1
        values = {k: v[0, 0] if k in (*TABLES, "clamp") and v.shape[1] == 1 else v[0] for k, v in values.items()}
        by = None if by is None else by[0]
    intervened = pyro.do(model, data=values)
    if by is not None:
        intervened = Soft(Change("shift", plus=by))(intervened)
    plates = _plates(base.draws, None if base.draws is None else n_worlds)
    with torch.no_grad(), plates, poutine.trace() as tracer, _Quiet(), Twin(base, strict):
        intervened(base.batch)
    return tracer.trace


def vectorises(model: Callable[..., Any], guide: Callable[..., Any], example: Batch, perturbations: Sequence[str]) -> bool:
    """Whether the pair broadcasts over draws: two draws at once equal the same two draws one by one, under acts of every kind."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        try:
            base = factual_base(model, guide, example, 2)
            acts = _trial_acts(base, perturbations)
            law, _ = intervened_law(model, base, acts, perturbations, strict=False)
            if law.batch_shape != (2, len(acts), len(example)):
                return False
            local = {n for n in base.values if any(f.name == "cell" for f in base.trace.nodes[n]["cond_indep_stack"])}
            for s in range(2):
                values = {k: v[s].reshape(v.shape[2:]) if k in local else v[s, 0, 0] for k, v in base.values.items()}
                one = _run_base(model, values, example, None)
                for k, act in enumerate(acts):
                    single, _ = intervened_law(model, one, [act], perturbations, strict=False)
                    if not torch.allclose(single.mean[0], law.mean[s, k], rtol=1e-3, atol=1e-5):
                        return False
        except (RuntimeError, ValueError, IndexError, NotImplementedError):
            return False
    return True


def _trial_acts(base: Base, perturbations: Sequence[str]) -> list[Intervention]:
    """An act of each kind that sets sites of other shapes: doses, a clamp, an edge."""
    acts = [Intervention(doses=()), Intervention(doses=((perturbations[0], 1.0),))]
    if "clamp" in base.trace.nodes:
        acts.append(Intervention(clamps=((0, 1.0),)))
    if "graph" in base.trace.nodes:
        graph = base.trace.nodes["graph"]["value"]
        edges = (graph != 0).reshape(-1, *graph.shape[-2:]).all(0).nonzero().tolist()
        acts += [Intervention(edges=(((a, b), 0.5),)) for a, b in edges[:1]]
    return acts
