"""The vocabulary of interventions: words about genes, compiled to values for ``pyro.do``.

=========================================  =====================================================================================
word                                       compiles to
=========================================  =====================================================================================
``perturb("KLF1", dose=1.0)``              ``{"dose": ...}``; also ``knockout``, ``knockdown``, ``activate``, the screen's own reading
``perturb("A") & perturb("B")``            one ``dose`` with two non-zero entries
``perturb("KLF1", penetrance=0.5)``        ``{"hit": ...}``, or a ``dose`` of 0 in the cells where it does not take
``flip_target("KLF1", program)``           ``{"mask": ...}`` with one entry flipped
``silence("KLF1")``                        ``{"effect": ...}`` (and ``direct``, if it is there) with one row set to zero
``clamp(program, value)``                  ``{"clamp": ...}``: the program is held there, whatever acts on it; its descendants follow
``set_edge(a, b, weight)``, ``cut(a, b)``  ``{"graph": ...}`` with one weight changed, or set to zero
``shift(program, by)``                     a soft act: added to ``shift``, after what the dose of the same intervention does there
``sustain(act, start)``                    from a time on: ``{"course": ...}`` (doses), ``{"held": ...}`` (clamps); models with time
``pulse(act, start, stop)``                the same until a time; afterwards the cell has what it had before
``at(time, act)``                          at that one time
=========================================  =====================================================================================

Interventions are values: ``a & b == b & a``, ``a & a == a``, and ``(a & b) & c == a & (b & c)``. A ``dose`` replaces the whole treatment
of a cell, and a ``clamp`` the whole site ``clamp``; the others leave the treatment as it was.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from numbers import Real
from typing import Any, TypeVar

import pyro
import pyro.poutine as poutine
import torch
from pyro.poutine.do_messenger import DoMessenger
from pyro.poutine.messenger import _context_wrap
from torch import Tensor

from pyrocausal.compile_sites import check_edges, compile_shift, compile_sites, edges_of, possible_edges, schedule_of
from pyrocausal.errors import InterventionError, nearest
from pyrocausal.soft import Change, Soft

Node = int | str  # the number of a program, or the name of a gene where the nodes are genes
Key = TypeVar("Key", str, Node, tuple[Node, Node])
WORDS = {"knockout": "knockout", "knockdown": "knockdown", "activate": "activation"}  # word -> modality of the screens it fits


@dataclass(frozen=True)
class Intervention:
    """What is done to the cells; made by the words of this module and combined with ``&``.

    Attributes:
        doses: dose of each perturbation, sorted by name; None leaves the treatment as it is, an empty tuple removes it.
        penetrances: share of the cells in which each takes, sorted by name.
        flips: (perturbation, program) entries of the target mask that are flipped.
        silenced: perturbations whose effect is set to zero.
        clamps: value at which each program is held, sorted by program.
        edges: weight that each edge (cause, effect) is given, 0 where it is cut, sorted.
        shifts: what is added to the shift of each program, sorted by program.
        timed: (start, stop, act): doses and clamps during ``start < time <= stop`` only.
        words: the modality words that were used.
    """

    doses: tuple[tuple[str, float], ...] | None = None
    penetrances: tuple[tuple[str, float], ...] = ()
    flips: frozenset[tuple[str, Node]] = frozenset()
    silenced: frozenset[str] = frozenset()
    clamps: tuple[tuple[Node, float], ...] = ()
    edges: tuple[tuple[tuple[Node, Node], float], ...] = ()
    shifts: tuple[tuple[Node, float], ...] = ()
    timed: frozenset[tuple[float, float, Intervention]] = frozenset()
    words: frozenset[str] = field(default=frozenset(), compare=False)

    def __and__(self, other: Intervention) -> Intervention:
        doses = None
        if self.doses is not None or other.doses is not None:
            doses = _union(self.doses or (), other.doses or (), "dose")
        return Intervention(
            doses=doses,
            penetrances=_union(self.penetrances, other.penetrances, "penetrance"),
            flips=self.flips | other.flips,
            silenced=self.silenced | other.silenced,
            clamps=_union(self.clamps, other.clamps, "clamp"),
            edges=_union(self.edges, other.edges, "weight"),
            shifts=_union(self.shifts, other.shifts, "shift"),
            timed=self.timed | other.timed,
            words=self.words | other.words,
        )

    def __str__(self) -> str:
        penetrance = dict(self.penetrances)
        parts = []
        for name, dose in self.doses or ():
            share = penetrance.get(name, 1.0)
            marks = ([f"dose {dose}"] if dose != 1 else []) + ([f"penetrance {share}"] if share != 1 else [])
            parts.append(name + (f" ({', '.join(marks)})" if marks else ""))
        if self.doses == ():
            parts.append("untreated")
        parts += [f"flip {p} -> {d}" for p, d in sorted(self.flips, key=str)]
        parts += [f"silence {p}" for p in sorted(self.silenced)]
        parts += [f"clamp {_said(d)} at {value}" for d, value in self.clamps]
        parts += [f"edge {a} -> {b} at {weight}" if weight else f"cut {a} -> {b}" for (a, b), weight in self.edges]
        parts += [f"shift {_said(d)} by {by}" for d, by in self.shifts]
        parts += sorted(f"({act}) {_window(start, stop)}" for start, stop, act in self.timed)
        return " & ".join(parts)

    @property
    def perturbations(self) -> set[str]:
        """Names of all perturbations that the intervention mentions."""
        inner = set().union(*(act.perturbations for _, _, act in self.timed))
        return {n for n, _ in self.doses or ()} | {p for p, _ in self.flips} | set(self.silenced) | inner


def perturb(name: str, dose: float = 1.0, penetrance: float = 1.0) -> Intervention:
    """Give a perturbation at a dose (1 = as in the screen, 0 = not at all), taking in a share of the cells."""
    return _dosed(name, dose, penetrance, frozenset())


def knockout(name: str, dose: float = 1.0, penetrance: float = 1.0) -> Intervention:
    """:func:`perturb` on a knockout screen."""
    return _dosed(name, dose, penetrance, frozenset({"knockout"}))


def knockdown(name: str, dose: float = 1.0, penetrance: float = 1.0) -> Intervention:
    """:func:`perturb` on a knock-down (CRISPRi) screen; ``dose=0.5`` is half of the screen's effect."""
    return _dosed(name, dose, penetrance, frozenset({"knockdown"}))


def activate(name: str, dose: float = 1.0, penetrance: float = 1.0) -> Intervention:
    """:func:`perturb` on an activation (CRISPRa) screen."""
    return _dosed(name, dose, penetrance, frozenset({"activate"}))


def untreated() -> Intervention:
    """No perturbation at all: ``do(dose = 0)``."""
    return Intervention(doses=())


def flip_target(name: str, program: int | str) -> Intervention:
    """Flip whether a perturbation targets a program (an entry of ``mask``)."""
    return Intervention(flips=frozenset({(name, _program(program))}))


def silence(name: str) -> Intervention:
    """Set the effect of a perturbation to zero on every program (a row of ``effect``)."""
    return Intervention(silenced=frozenset({name}))


def clamp(program: int | str, value: float) -> Intervention:
    """Hold a program (``3`` or ``"program 3"``), or a gene by its name where the model's nodes are genes, at a value: ``do(u_3 = value)``.

    Nothing acts on it any more; its descendants follow.
    """
    return Intervention(clamps=((_program(program), _finite(value, "clamp", "value")),))


def set_edge(a: int | str, b: int | str, weight: float) -> Intervention:
    """Give the edge from program a to program b a weight (an entry of ``graph``)."""
    cause, effect = _program(a), _program(b)
    if cause == effect:
        raise InterventionError(f"an edge from program {cause} to itself was given; an edge joins two programs")
    return Intervention(edges=(((cause, effect), _finite(weight, "set_edge", "weight")),))


def cut(a: int | str, b: int | str) -> Intervention:
    """Remove the edge from program a to program b: :func:`set_edge` with a weight of 0."""
    return set_edge(a, b, 0.0)


def shift(program: int | str, by: float) -> Intervention:
    """Push a program by so much in every cell: added to ``shift``, beside what perturbations add. What acts on the program still does."""
    return Intervention(shifts=((_program(program), _finite(by, "shift", "by")),))


def sustain(act: Intervention, start: float) -> Intervention:
    """Doses and clamps from a time on (0, or whatever the first time is: from the beginning)."""
    return _timed(act, _finite(start, "sustain", "start"), math.inf)


def pulse(act: Intervention, start: float, stop: float) -> Intervention:
    """Doses and clamps after ``start`` and up to ``stop``, with a wash-out afterwards; nothing if the two are the same time."""
    start, stop = _finite(start, "pulse", "start"), _finite(stop, "pulse", "stop")
    if stop < start:
        raise InterventionError(f"start={start} and stop={stop} were given to pulse(...); a pulse ends when it began, or later")
    return _timed(act, start, stop)


def at(time: float, act: Intervention) -> Intervention:
    """Doses during the interval that leads to a time of the model, clamps at that time."""
    time = _finite(time, "at", "time")
    return _timed(act, math.nextafter(time, -math.inf), time)


def _timed(act: Intervention, start: float, stop: float) -> Intervention:
    if replace(act, doses=None, clamps=(), penetrances=(), words=frozenset()) != Intervention():
        raise InterventionError(f"{act} was given a time; doses and clamps have one, other acts are for all times")
    if any(share != 1 for _, share in act.penetrances):
        raise InterventionError(f"{act} was given a time and a penetrance; give doses that take in every cell")
    return Intervention(timed=frozenset({(start, stop, act)}), words=act.words)


def _window(start: float, stop: float) -> str:
    if stop == math.inf:
        return f"from {start:g} on"
    return f"at {stop:g}" if start == math.nextafter(stop, -math.inf) else f"from {start:g} to {stop:g}"


def parse(condition: str, separator: str = "+", control: str = "control") -> Intervention:
    """The intervention that a label of a screen names: ``"A+B"`` is ``perturb("A") & perturb("B")``, the control is :func:`untreated`."""
    out = untreated()
    for part in condition.split(separator):
        if part.strip() != control:
            out = out & perturb(part.strip())
    return out


def as_list(
    do: Intervention | str | Sequence[Intervention | str] | Mapping[str, Intervention], separator: str = "+", control: str = "control"
) -> list[tuple[str, Intervention]]:
    """Names and interventions of whatever was passed as ``do=``."""
    if isinstance(do, Mapping):
        named = list(do.items())
    else:
        items: Iterable[Any] = [do] if isinstance(do, Intervention | str) else do
        values = [parse(i, separator, control) if isinstance(i, str) else i for i in items]
        named = [(str(i), i) for i in values]
    for _, value in named:
        if not isinstance(value, Intervention):
            raise InterventionError(f"do= holds a {type(value).__name__}; give interventions such as pc.perturb('A') & pc.perturb('B')")
    if not named:
        raise InterventionError("do= is empty; give at least one intervention such as pc.perturb('A')")
    names = [n for n, _ in named]
    if len(set(names)) < len(names):
        repeated = next(n for n in names if names.count(n) > 1)
        raise InterventionError(
            f"the intervention {repeated!r} is asked for more than once; ask for each once, or name them with a dictionary"
        )
    return named


# -- compiling -----------------------------------------------------------------------------------------------------------------


def check(interventions: Iterable[Intervention], coords: Mapping[str, Any], trained: Sequence[int] | None = None) -> None:
    """Refuse what the screen cannot answer: unknown names, words of another modality, perturbations that no training cell received."""
    names = list(coords["perturbation"])
    for intervention in interventions:
        for name in sorted(intervention.perturbations):
            if name not in names:
                raise InterventionError(f"no perturbation of the screen is named {name!r}{nearest(name, names)}")
            if trained is not None and trained[names.index(name)] == 0:
                raise InterventionError(
                    f"no training cell received {name!r}, so its effect is not learned; train on them, or take a model with an embedding"
                )
        for word in sorted(intervention.words):
            if coords["modality"] not in ("perturbation", WORDS[word]):
                raise InterventionError(
                    f"{word}(...) was asked of a {coords['modality']} screen; use pc.perturb(...) or the screen's own word"
                )


def do(
    model: Callable[..., Any], intervention: Intervention | str, data: Any, given: Mapping[str, Tensor] | None = None
) -> Callable[..., Any]:
    """``pyro.do(model, data=sites(model, intervention, data))``: the model under an intervention, nothing more.

    A :func:`shift` is a :class:`~pyrocausal.soft.Soft` around it.

    Raises:
        InterventionError: for an unknown name, a site the model lacks, or a second ``do`` on one site (which Pyro 1.9 cannot run).
    """
    values, by = _compiled(model, intervention, data, given)
    _, before = _unwrapped(model)
    twice = before & (set(values) | (set() if by is None else {"shift"}))
    if twice:
        raise InterventionError(f"{min(twice)!r} is already intervened on; combine the interventions with & in one call of do")
    intervened = pyro.do(model, data=values)
    return intervened if by is None else Soft(Change("shift", plus=by))(intervened)


def sites(
    model: Callable[..., Any], intervention: Intervention | str, data: Any, given: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """The dictionary that :func:`do` hands to ``pyro.do``: site name -> value.

    Args:
        data: the :class:`~pyrocausal.data.PerturbationData` that gives the names.
        given: values of ``mask`` and ``effect`` [P, D], ``direct`` [P, G] and ``graph`` [D, D], needed by :func:`flip_target`,
            :func:`silence`, and :func:`cut` and :func:`set_edge` (with ``priority`` [D] where the order of the programs is learned).
    """
    values, by = _compiled(model, intervention, data, given)
    if by is not None:
        raise InterventionError(
            "shift(...) adds to the value that 'shift' has in each cell, so it sets no site; use pc.do instead of pc.sites"
        )
    return values


def _compiled(
    model: Callable[..., Any], intervention: Intervention | str, data: Any, given: Mapping[str, Tensor] | None
) -> tuple[dict[str, Tensor], Tensor | None]:
    """What is set, site name -> value, and what is added to ``shift``, [1, D]."""
    value = parse(intervention, data.separator, data.control) if isinstance(intervention, str) else intervention
    value = resolve(value, nodes_of(_unwrapped(model)[0], list(data.genes)))
    coords = {"perturbation": list(data.perturbations), "modality": data.modality}
    check([value], coords)
    batch = data.batch([0, 0] if len(data) == 1 else [0, 1])
    given = dict(given or {})
    inner = _unwrapped(model)[0]
    known = site_values(inner, batch)
    base = batch.dose.new_zeros(1, len(data.perturbations))
    shapes = {name: v for name, v in known.items() if name in ("clamp", "shift")}
    if value.timed and value.doses is None:
        raise InterventionError(f"{value} says when, but not what the cells have otherwise; add pc.untreated() & ... or a dose")
    schedule = schedule_of(inner)
    base_sites = {name: known[name].reshape(-1, *known[name].shape[-2:])[:1] for name in ("course", "held") if name in known}
    cyclic = getattr(inner, "cyclic", False)
    out = compile_sites([value], coords["perturbation"], base, shapes | base_sites | given, known, cyclic=cyclic, schedule=schedule)
    by = compile_shift([value], shapes, known)
    if value.edges:
        edges = possible_edges(inner, batch, {k: v for k, v in given.items() if k == "priority"})
        assert edges is not None
        check_edges(inner, [value], edges | edges_of(given["graph"]))
    if value.doses is None:
        out.pop("dose")
    values = {name: v.reshape(v.shape[-1:] if name == "clamp" else v.shape[-2:]) for name, v in out.items()}  # cells have one value
    return values, None if by is None else by[0]


def site_values(model: Callable[..., Any], batch: Any) -> dict[str, Tensor]:
    """Values of the sample and deterministic sites of a model, from one plain run."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        trace = poutine.trace(model).get_trace(batch)
    return {name: site["value"] for name, site in trace.nodes.items() if site["type"] == "sample"}


def _unwrapped(model: Any) -> tuple[Any, frozenset[str]]:
    """The model inside any ``pyro.do`` and ``Soft``, and the names of the sites that they intervene on."""
    names: frozenset[str] = frozenset()
    while isinstance(getattr(model, "func", None), partial) and model.func.func is _context_wrap:
        context, model = model.func.args[:2]
        if isinstance(context, DoMessenger | Soft):
            names |= context.sites if isinstance(context, Soft) else frozenset(context.data)
    return model, names


def _dosed(name: str, dose: float, penetrance: float, words: frozenset[str]) -> Intervention:
    if not (isinstance(dose, Real) and 0 <= dose < float("inf")):
        raise InterventionError(f"dose={dose!r} was given for {name!r}; a dose is a number of at least 0 (1 = as in the screen)")
    if not (isinstance(penetrance, Real) and 0 <= penetrance <= 1):
        raise InterventionError(
            f"penetrance={penetrance!r} was given for {name!r}; it is the share of cells in which it takes, from 0 to 1"
        )
    return Intervention(doses=((name, float(dose)),), penetrances=((name, float(penetrance)),), words=words)


def resolve(intervention: Intervention, genes: Sequence[str] | None) -> Intervention:
    """The intervention with numbers in place of the names of genes.

    Args:
        genes: names of the model's nodes; None where they are programs, which have numbers only.

    Raises:
        InterventionError: for a name that is none of them.
    """

    def number(node: Node) -> int:
        if not isinstance(node, str):
            return node
        if genes is None:
            raise InterventionError(f"{node!r} is no program; give its number, or its name such as 'program 3'")
        if node not in genes:
            raise InterventionError(f"no gene of the model is named {node!r}{nearest(node, list(genes))}")
        return list(genes).index(node)

    return replace(
        intervention,
        flips=frozenset((p, number(d)) for p, d in intervention.flips),
        clamps=tuple(sorted((number(d), v) for d, v in intervention.clamps)),
        edges=tuple(sorted(((number(a), number(b)), w) for (a, b), w in intervention.edges)),
        shifts=tuple(sorted((number(d), v) for d, v in intervention.shifts)),
        timed=frozenset((start, stop, resolve(act, genes)) for start, stop, act in intervention.timed),
    )


def nodes_of(model: Any, genes: Sequence[str]) -> Sequence[str] | None:
    """Names of the nodes of a model's graph: the genes, where it says so (``state = "gene"``), else None."""
    return genes if getattr(model, "state", "program") == "gene" else None


def _program(program: int | str) -> Node:
    """The number of a program, or the name of a gene as it is."""
    try:
        if not isinstance(program, str):
            return operator.index(program)
        number = program.removeprefix("program ")
        return int(number) if number.isdigit() else program
    except TypeError:
        raise InterventionError(f"{program!r} is no program; give its number, or its name such as 'program 3'") from None


def _said(node: Node) -> str:
    return node if isinstance(node, str) else f"program {node}"


def _ordered(item: tuple[Any, float]) -> Any:
    """Numbers before names, each in their order."""
    key = item[0] if isinstance(item[0], tuple) else (item[0],)
    return [(isinstance(k, str), k) for k in key]


def _finite(value: float, word: str, what: str) -> float:
    if not (isinstance(value, Real) and math.isfinite(value)):
        raise InterventionError(f"{what}={value!r} was given to {word}(...); give a finite number")
    return float(value) + 0.0  # no -0.0, which equals 0.0 but has another name


def _union(a: tuple[tuple[Key, float], ...], b: tuple[tuple[Key, float], ...], what: str) -> tuple[tuple[Key, float], ...]:
    out = dict(a)
    for key, value in b:
        if out.setdefault(key, value) != value:
            name = repr(key) if isinstance(key, str) else f"program {key}" if isinstance(key, int) else "the edge {} -> {}".format(*key)
            raise InterventionError(f"{name} was given a {what} of {out[key]:g} and of {value:g}; give one")
    return tuple(sorted(out.items(), key=_ordered))
