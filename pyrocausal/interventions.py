"""The vocabulary of interventions: words about genes, compiled to values for ``pyro.do``.

=========================================  =====================================================================================
word                                       compiles to
=========================================  =====================================================================================
``perturb("KLF1", dose=1.0)``              ``{"dose": ...}``; also ``knockout``, ``knockdown``, ``activate``, the screen's own reading
``perturb("A") & perturb("B")``            one ``dose`` with two non-zero entries
``perturb("KLF1", penetrance=0.5)``        ``{"hit": ...}``, or a ``dose`` of 0 in the cells where it does not take
``flip_target("KLF1", program)``           ``{"mask": ...}`` with one entry flipped
``silence("KLF1")``                        ``{"effect": ...}`` with one row set to zero
=========================================  =====================================================================================

Interventions are values: ``a & b == b & a``, ``a & a == a``, and ``(a & b) & c == a & (b & c)``. A ``dose`` replaces the whole treatment
of a cell; ``flip_target`` and ``silence`` leave the treatment as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from numbers import Real
from typing import Any

import pyro
import pyro.poutine as poutine
import torch
from pyro.poutine.do_messenger import DoMessenger
from pyro.poutine.messenger import _context_wrap
from torch import Tensor

from pyrocausal.errors import InterventionError, nearest

WORDS = {"knockout": "knockout", "knockdown": "knockdown", "activate": "activation"}  # word -> modality of the screens it fits


@dataclass(frozen=True)
class Intervention:
    """What is done to the cells; made by the words of this module and combined with ``&``.

    Attributes:
        doses: dose of each perturbation, sorted by name; None leaves the treatment as it is, an empty tuple removes it.
        penetrances: share of the cells in which each takes, sorted by name.
        flips: (perturbation, program) entries of the target mask that are flipped.
        silenced: perturbations whose effect is set to zero.
        words: the modality words that were used.
    """

    doses: tuple[tuple[str, float], ...] | None = None
    penetrances: tuple[tuple[str, float], ...] = ()
    flips: frozenset[tuple[str, int]] = frozenset()
    silenced: frozenset[str] = frozenset()
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
        parts += [f"flip {p} -> {d}" for p, d in sorted(self.flips)]
        parts += [f"silence {p}" for p in sorted(self.silenced)]
        return " & ".join(parts)

    @property
    def perturbations(self) -> set[str]:
        """Names of all perturbations that the intervention mentions."""
        return {n for n, _ in self.doses or ()} | {p for p, _ in self.flips} | set(self.silenced)


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


def flip_target(name: str, program: int) -> Intervention:
    """Flip whether a perturbation targets a program (an entry of ``mask``)."""
    return Intervention(flips=frozenset({(name, int(program))}))


def silence(name: str) -> Intervention:
    """Set the effect of a perturbation to zero on every program (a row of ``effect``)."""
    return Intervention(silenced=frozenset({name}))


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
                raise InterventionError(f"no training cell received {name!r}, so its effect is not learned; train on cells that did")
        for word in sorted(intervention.words):
            if coords["modality"] not in ("perturbation", WORDS[word]):
                raise InterventionError(
                    f"{word}(...) was asked of a {coords['modality']} screen; use pc.perturb(...) or the screen's own word"
                )


def compile_sites(
    interventions: Sequence[Intervention],
    perturbations: Sequence[str],
    base_dose: Tensor,
    given: Mapping[str, Tensor],
    sites: Iterable[str],
    uniform: Tensor | None = None,
) -> dict[str, Tensor]:
    """Values for ``pyro.do`` of K interventions at once.

    Args:
        perturbations: names in the order of the dose.
        base_dose: treatment of the cells before any intervention, [n, P] or [1, P].
        given: current values of ``mask`` and ``effect``, [P, D] or [S, 1, 1, P, D].
        sites: names of the model's sites.
        uniform: uniform numbers [..., n, P] that decide in which cells a perturbation takes, shared by all interventions.

    Returns:
        ``dose`` [K, n or 1, P] (or [..., K, n, P] with penetrance), and as needed ``hit``, ``mask`` and ``effect`` [..., K, 1, P, D].
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
    for site in ("mask", "effect"):
        acts = [i.flips if site == "mask" else i.silenced for i in interventions]
        if any(acts):
            values[site] = _edited(site, acts, code, given, sites)
    return values


def _edited(site: str, acts: Sequence[Any], code: Mapping[str, int], given: Mapping[str, Tensor], sites: set[str]) -> Tensor:
    word = "flip_target" if site == "mask" else "silence"
    if site not in sites:
        raise InterventionError(f"the model has no sampled site {site!r}, so {word}(...) has nothing to act on")
    if site not in given:
        raise InterventionError(f"{word}(...) changes the value that {site!r} has; pass it as given={{{site!r}: a posterior draw}}")
    value = given[site]
    value = value[None, None] if value.dim() == 2 else value  # [..., 1, 1, P, D]
    out = value.expand(*value.shape[:-4], len(acts), *value.shape[-3:]).clone()
    for k, act in enumerate(acts):
        for what in act:
            if site == "mask":
                name, program = what
                if not 0 <= program < value.shape[-1]:
                    raise InterventionError(f"program {program} was asked for, but there are {value.shape[-1]}; they are numbered from 0")
                out[..., k, :, code[name], program] = 1 - out[..., k, :, code[name], program]
            else:
                out[..., k, :, code[what], :] = 0
    return out


def site_names(model: Callable[..., Any], batch: Any) -> list[str]:
    """Names of the sample and deterministic sites of a model, from one plain run."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        trace = poutine.trace(model).get_trace(batch)
    return [name for name, site in trace.nodes.items() if site["type"] == "sample"]


def do(
    model: Callable[..., Any], intervention: Intervention | str, data: Any, given: Mapping[str, Tensor] | None = None
) -> Callable[..., Any]:
    """``pyro.do(model, data=sites(model, intervention, data))``: the model under an intervention, nothing more.

    Raises:
        InterventionError: for an unknown name, a site the model lacks, or a second ``do`` on one site (which Pyro 1.9 cannot run).
    """
    values = sites(model, intervention, data, given)
    _, before = _unwrapped(model)
    twice = before & set(values)
    if twice:
        raise InterventionError(f"{min(twice)!r} is already intervened on; combine the interventions with & in one call of do")
    return pyro.do(model, data=values)


def sites(
    model: Callable[..., Any], intervention: Intervention | str, data: Any, given: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """The dictionary that :func:`do` hands to ``pyro.do``: site name -> value.

    Args:
        data: the :class:`~pyrocausal.data.PerturbationData` that gives the names.
        given: values of ``mask`` and ``effect`` [P, D], needed by :func:`flip_target` and :func:`silence`.
    """
    value = parse(intervention, data.separator, data.control) if isinstance(intervention, str) else intervention
    coords = {"perturbation": list(data.perturbations), "modality": data.modality}
    check([value], coords)
    batch = data.batch([0, 0] if len(data) == 1 else [0, 1])
    known = site_names(_unwrapped(model)[0], batch)
    base = batch.dose.new_zeros(1, len(data.perturbations))
    out = compile_sites([value], coords["perturbation"], base, given or {}, known)
    if value.doses is None:
        out.pop("dose")
    return {name: v.squeeze(0) if name == "dose" else v.reshape(v.shape[-2:]) for name, v in out.items()}


def _unwrapped(model: Any) -> tuple[Any, frozenset[str]]:
    """The model inside any ``pyro.do``, and the names of the sites that they intervene on."""
    names: frozenset[str] = frozenset()
    while isinstance(getattr(model, "func", None), partial) and model.func.func is _context_wrap:
        context, model = model.func.args[:2]
        names |= frozenset(context.data) if isinstance(context, DoMessenger) else frozenset()
    return model, names


def _dosed(name: str, dose: float, penetrance: float, words: frozenset[str]) -> Intervention:
    if not (isinstance(dose, Real) and 0 <= dose < float("inf")):
        raise InterventionError(f"dose={dose!r} was given for {name!r}; a dose is a number of at least 0 (1 = as in the screen)")
    if not (isinstance(penetrance, Real) and 0 <= penetrance <= 1):
        raise InterventionError(
            f"penetrance={penetrance!r} was given for {name!r}; it is the share of cells in which it takes, from 0 to 1"
        )
    return Intervention(doses=((name, float(dose)),), penetrances=((name, float(penetrance)),), words=words)


def _union(a: tuple[tuple[str, float], ...], b: tuple[tuple[str, float], ...], what: str) -> tuple[tuple[str, float], ...]:
    out = dict(a)
    for name, value in b:
        if out.setdefault(name, value) != value:
            raise InterventionError(f"{name!r} was given a {what} of {out[name]:g} and of {value:g}; give one")
    return tuple(sorted(out.items()))
