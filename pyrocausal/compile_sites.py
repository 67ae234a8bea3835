"""What interventions compile to: values of sites for ``pyro.do``, and what is added to ``shift``.

Every function answers K interventions at once. Values that are set have the worlds in front of the cells, ``[K, 1, D]``; the tables
``mask``, ``effect``, ``direct`` and ``graph`` are edited from the value that the world has, ``[..., K, 1, P, D]`` (``direct``: G for D).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import pyro.poutine as poutine
import torch
from torch import Tensor

from pyrocausal.errors import InterventionError, PyrocausalError
from pyrocausal.structural import longest_path

if TYPE_CHECKING:
    from pyrocausal.interventions import Intervention

TABLES = ("mask", "effect", "direct", "graph")  # edited; every other site is replaced
WORDS_OF = {
    "dose": "perturb",
    "mask": "flip_target",
    "effect": "silence",
    "graph": "cut and set_edge",
    "clamp": "clamp",
    "shift": "shift",
}


def compile_sites(
    interventions: Sequence[Intervention],
    perturbations: Sequence[str],
    base_dose: Tensor,
    given: Mapping[str, Tensor],
    sites: Iterable[str],
    uniform: Tensor | None = None,
    cyclic: bool = False,
    schedule: tuple[Tensor, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Values for ``pyro.do`` of K interventions at once.

    Args:
        perturbations: names in the order of the dose.
        base_dose: treatment of the cells before any intervention, [n, P] or [1, P].
        given: current values of ``mask``, ``effect``, ``direct``, ``graph`` and, where the order of the programs is learned,
            ``priority``, [P, D] or [S, 1, 1, P, D]; of ``clamp`` anything with its last dimension.
        sites: names of the model's sites.
        uniform: uniform numbers [..., n, P] that decide in which cells a perturbation takes, shared by all interventions.
        cyclic: whether the model allows edges that close a cycle.
        schedule: of a model with time, its times [T + 1] and the share of the dose that the cells have until each, [T + 1].

    Returns:
        ``dose`` [K, n or 1, P] (or [..., K, n, P] with penetrance), and as needed ``hit``, ``clamp`` [K, 1, D] (NaN = untouched), and
        ``mask``, ``effect`` and ``graph`` [..., K, 1, P, D], ``direct`` [..., K, 1, P, G]; for acts with a time ``course``
        [K, n or 1, T + 1, P] and ``held`` [K, n or 1, T + 1, D].
    """
    sites = set(sites)
    code = {name: i for i, name in enumerate(perturbations)}
    if "dose" not in sites:
        raise InterventionError(
            "the model has no site 'dose', so no treatment can be given; write dose = pyro.deterministic('dose', batch.dose, event_dim=1)"
        )
    dose = base_dose.expand(len(interventions), *base_dose.shape).clone()
    takes = torch.ones(len(interventions), 1, len(perturbations), dtype=dose.dtype, device=dose.device)
    for k, intervention in enumerate(interventions):
        if intervention.doses is not None:
            dose[k] = 0
            for name, amount in intervention.doses:
                dose[k, :, code[name]] = amount
        for name, share in intervention.penetrances:
            takes[k, 0, code[name]] = share
    values = {"dose": dose}
    if bool((takes < 1).any()):
        if uniform is None:
            raise InterventionError(
                "a penetrance below 1 differs from cell to cell; ask for it through effects, interventional or counterfactual"
            )
        hit = (uniform.unsqueeze(-3) < takes).to(dose.dtype)
        values |= {"hit": hit} if "hit" in sites else {"dose": dose * hit}
    for site, acts in _edits(interventions).items():
        if any(acts):
            values[site] = _edited(site, acts, code, given, sites, cyclic)
    if "effect" in values and "direct" in sites:  # what is silenced acts neither on programs nor on genes
        values["direct"] = _edited("direct", [i.silenced for i in interventions], code, given, sites, cyclic)
    clamp = _per_program("clamp", [i.clamps for i in interventions], given, sites, float("nan"))
    values = values if clamp is None else values | {"clamp": clamp}
    if any(i.timed for i in interventions):
        values |= _over_time(interventions, values, code, given, schedule)
    return values


def compile_shift(interventions: Sequence[Intervention], given: Mapping[str, Tensor], sites: Iterable[str]) -> Tensor | None:
    """What K interventions add to ``shift`` (the value of which is in ``given``), [K, 1, D]; None if none of them adds anything."""
    return _per_program("shift", [i.shifts for i in interventions], given, set(sites), 0.0)


def as_table(value: Tensor) -> Tensor:
    """A table [P, D] (or [n, P, D]) with dimensions for worlds and cells in front, [1, 1, P, D]; one that has them as it is."""
    return value.reshape(*(1,) * (4 - value.dim()), *value.shape) if value.dim() < 4 else value


def edges_of(graph: Tensor) -> Tensor:
    """The edges of a graph [..., D, D] in any of its worlds, [D, D] bool."""
    return (graph != 0).reshape(-1, *graph.shape[-2:]).any(0)


def possible_edges(model: Callable[..., Any], batch: Any, globals_: Mapping[str, Tensor]) -> Tensor | None:
    """Which edges the model may have, [D, D] bool: those of a run in which every sampled ``edge`` is there; None without a graph.

    Args:
        globals_: values of latent sites, for example from the guide; without ``priority`` both directions count where the order is learned.
    """
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        values = dict(globals_)
        nodes = poutine.trace(poutine.condition(model, data=values)).get_trace(batch).nodes
        if "edge" in nodes and "graph" in nodes:
            values["edge"] = torch.ones_like(nodes["edge"]["value"])
            nodes = poutine.trace(poutine.condition(model, data=values)).get_trace(batch).nodes
    if "graph" not in nodes:
        return None
    edges = edges_of(nodes["graph"]["value"])
    return edges | edges.T if "priority" in nodes and "priority" not in globals_ else edges


def check_edges(model: Any, interventions: Iterable[Intervention], edges: Tensor) -> None:
    """Refuse to cut an edge that is not among ``edges`` [D, D], and to set one beyond the depth to which the model solves its equations."""
    for intervention in interventions:
        after, acts = edges.clone(), cast("Iterable[tuple[tuple[int, int], float]]", intervention.edges)
        for (a, b), weight in acts:
            _in_range(a, len(edges))
            _in_range(b, len(edges))
            if weight == 0 and not edges[a, b]:
                found = edges.nonzero()[:1].tolist()
                mend = f"cut one that it has, such as {found[0][0]} -> {found[0][1]}" if found else "it has no edges at all"
                raise InterventionError(f"the model has no edge from program {a} to program {b}, so there is nothing to cut; {mend}")
            after[a, b] = weight != 0
        depth = getattr(model, "depth", None)
        if depth is None or getattr(model, "equations", "linear") == "linear" or bool((after == edges).all()):
            continue
        try:
            longest = longest_path(after)
        except PyrocausalError:  # a cycle, which compiling refuses
            continue
        if longest > depth:
            raise InterventionError(
                f"{intervention} makes a path of {longest} edges, but the model solves its equations along {depth} (model.depth); "
                "build it with a graph that allows the edge"
            )


def schedule_of(model: Any) -> tuple[Tensor, Tensor] | None:
    """Times of a model and the share of the dose that cells have until each, both [T + 1]; None for a model without time."""
    return (model.times, model.schedule) if getattr(model, "timed", False) else None


# -- parts -----------------------------------------------------------------------------------------------------------------------


def _over_time(
    interventions: Sequence[Intervention],
    values: Mapping[str, Tensor],
    code: Mapping[str, int],
    given: Mapping[str, Tensor],
    schedule: tuple[Tensor, Tensor] | None,
) -> dict[str, Tensor]:
    """``course`` and ``held`` where some act has a time."""
    if schedule is None or "course" not in given or "held" not in given:
        raise InterventionError("the model has no time, so sustain(...), pulse(...) and at(...) mean nothing to it; leave the time out")
    times, share = schedule
    dose, course, held = values["dose"], given["course"], given["held"]
    course = course.reshape(-1, *course.shape[-2:])
    courses, holds = [], []
    for k, intervention in enumerate(interventions):
        c = course if intervention.doses is None else dose[k].unsqueeze(-2).to(course.dtype) * share.unsqueeze(-1)
        h = held.reshape(-1, *held.shape[-2:])
        c, h = c.clone(), h.clone()
        for program, value in intervention.clamps:
            h[..., cast("int", program)] = value
        for start, stop, act in sorted(intervention.timed, key=lambda a: a[:2]):
            _known(times, start, stop, act)
            now = (times > start) & (times <= stop)
            if act.doses == ():
                c[:, now] = 0
            for name, amount in act.doses or ():
                c[:, now, code[name]] = amount
            for program, value in act.clamps:
                _in_range(cast("int", program), h.shape[-1])
                h[:, now, cast("int", program)] = value
        courses.append(c)
        holds.append(h)
    n = max(len(v) for v in (*courses, *holds))
    return {name: torch.stack([v.expand(n, *v.shape[1:]) for v in each]) for name, each in (("course", courses), ("held", holds))}


def _known(times: Tensor, start: float, stop: float, act: Intervention) -> None:
    """Acts begin and end at times of the model."""
    for time in (start, stop):
        near = times[(times - time).abs().argmin()]
        if time != float("inf") and abs(float(near) - time) > 1e-9 * max(1.0, abs(time)):
            raise InterventionError(f"{act} was given the time {time:g}; the model has {', '.join(f'{t:g}' for t in times.tolist())}")


def _edits(interventions: Sequence[Intervention]) -> dict[str, list[Any]]:
    return {
        "mask": [i.flips for i in interventions],
        "effect": [i.silenced for i in interventions],
        "graph": [i.edges for i in interventions],
    }


def _edited(site: str, acts: Sequence[Any], code: Mapping[str, int], given: Mapping[str, Tensor], sites: set[str], cyclic: bool) -> Tensor:
    word = {"mask": "flip_target", "effect": "silence", "direct": "silence", "graph": "cut(...) or set_edge"}[site]
    _needs(site, word, sites)
    if site not in given:
        raise InterventionError(f"{word}(...) changes the value that {site!r} has; pass it as given={{{site!r}: a posterior draw}}")
    value = as_table(given[site])  # [..., 1, 1, P, D]
    out = value.expand(*value.shape[:-4], len(acts), *value.shape[-3:]).clone()
    for k, act in enumerate(acts):
        for what in act:
            if site == "mask":
                name, program = what
                _in_range(program, value.shape[-1])
                out[..., k, :, code[name], program] = 1 - out[..., k, :, code[name], program]
            elif site in ("effect", "direct"):
                out[..., k, :, code[what], :] = 0
            else:
                (a, b), weight = what
                _in_range(a, value.shape[-1])
                _in_range(b, value.shape[-1])
                out[..., k, :, a, b] = weight
    if site == "graph" and not cyclic:
        for k, act in enumerate(acts):
            for (a, b), weight in act:
                if weight != 0:
                    _check_order(a, b, value, out[..., k, :, :, :], given, sites)
    return out


def _check_order(a: int, b: int, before: Tensor, after: Tensor, given: Mapping[str, Tensor], sites: set[str]) -> None:
    """Refuse an edge a -> b against the order in which the model solves its equations, or one that closes a cycle.

    Args:
        before, after: the graph without and with the edge, [..., D, D].
    """
    if "priority" in sites:
        if "priority" not in given:
            raise InterventionError("set_edge(...) follows the learned order; pass it as given={'priority': the draw that the graph is of}")
        against = bool((given["priority"][..., a] >= given["priority"][..., b]).any())
    elif not bool(before.tril().any()):
        against = a >= b
    else:
        against = False
        reached = torch.zeros(*after.shape[:-2], 1, after.shape[-1], dtype=after.dtype, device=after.device)
        reached[..., b] = 1
        for _ in range(after.shape[-1]):
            reached = ((reached @ (after != 0).to(after.dtype) + reached) > 0).to(after.dtype)
        if bool(reached[..., a].any()):
            raise InterventionError(f"set_edge({a}, {b}, ...) closes a cycle, since program {b} acts on program {a}; cut that path as well")
    if against:
        raise InterventionError(
            f"set_edge({a}, {b}, ...) points against the model's order, in which program {b} comes before program {a}; set an edge along it"
        )


def _per_program(site: str, acts: Sequence[Any], given: Mapping[str, Tensor], sites: set[str], empty: float) -> Tensor | None:
    """A row of numbers for each act, [K, 1, D], ``empty`` where it names none; None if no act names any."""
    if not any(acts):
        return None
    _needs(site, site, sites)
    like = given[site]
    out = like.new_full((len(acts), 1, like.shape[-1]), empty)
    for k, act in enumerate(acts):
        for program, value in act:
            _in_range(program, like.shape[-1])
            out[k, 0, program] = value
    return out


def _needs(site: str, word: str, sites: set[str]) -> None:
    if site not in sites:
        able = [w for s, w in WORDS_OF.items() if s in sites]
        raise InterventionError(
            f"the model has no sampled site {site!r}, nor a fixed one to change, so {word}(...) has nothing to act on; "
            f"it can answer {', '.join(able)}"
        )


def _in_range(program: int, n_latent: int) -> None:
    if not 0 <= program < n_latent:
        raise InterventionError(f"program {program} was asked for, but there are {n_latent}; they are numbered from 0")
