"""Does a model/guide pair keep the contract? A report in plain words, before any time is spent on training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pyro
import pyro.poutine as poutine
import torch
from pyro.poutine.subsample_messenger import _Subsample
from torch import nn

from pyrocausal.collapse import collapse_of as collapse
from pyrocausal.data import PerturbationData
from pyrocausal.elbo import _deterministic, _sample_sites
from pyrocausal.identifiability import identifiability
from pyrocausal.loading import Batch
from pyrocausal.posterior import RESERVED_DIMS
from pyrocausal.worlds import vectorises


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        level: ``"error"`` (training or queries would fail or be wrong), ``"warning"`` (a query is lost), ``"note"``.
        site: the site it is about, or an empty string.
        message: what is the case, and the mend.
    """

    level: str
    site: str
    message: str


@dataclass(frozen=True)
class Report:
    """What :func:`check_model` found; ``print`` it. True if there is no error."""

    findings: tuple[Finding, ...]

    def __bool__(self) -> bool:
        return not any(f.level == "error" for f in self.findings)

    def __str__(self) -> str:
        verdict = "the pair keeps the contract" if self else "the pair does not keep the contract"
        return "\n".join([f"check_model: {verdict}", *(f"  {f.level}: {f.message}" for f in self.findings)])

    __repr__ = __str__

    def about(self, level: str) -> list[str]:
        """Messages of one level."""
        return [f.message for f in self.findings if f.level == level]


def check_model(model: nn.Module, guide: nn.Module, data: PerturbationData, fitted: bool = False) -> Report:
    """Run the pair on a few cells and say what is missing or wrong.

    Looks at: the observation, its plate and the plate's scale; latents that the guide forgets, and the reverse; parameters where a site
    belongs; whether ``do(dose)`` reaches the observation; hidden observations; guides that cannot serve new cells; finite
    log-probabilities; named dimensions; broadcasting over draws; for a model with a graph, what is identified
    (:func:`pyrocausal.identifiability`); and of a ``fitted`` pair, whether its posterior has collapsed (:func:`pyrocausal.collapse`).
    """
    findings: list[Finding] = []
    store = set(pyro.get_param_store().keys())
    n_total = 10 * len(data)
    cells = [int(i) for i in torch.linspace(0, len(data) - 1, min(4, len(data))).tolist()]
    batch = data.batch(cells, n_total=n_total)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        guided = _trace(guide, batch, "guide", findings, guide)
        modelled = None
        if guided is not None:
            modelled = _trace(poutine.replay(model, trace=guided), batch, "model", findings, model)
        if modelled is not None and guided is not None:
            _observation(modelled, batch, n_total, findings)
            _latents(modelled, guided, findings)
            _parameters(modelled, findings)
            _finite(modelled, guided, findings)
            if not any("log-probability" in f.message for f in findings):  # NaN would stop, or mislead, what follows
                plain = poutine.trace(model).get_trace(batch)  # a replayed trace shows the guide's declarations
                _dimensions(plain, findings)
                if "x" in modelled.nodes and "dose" in modelled.nodes:
                    _dose(model, plain, batch, findings)
                _hidden(model, batch, findings)
            _new_cells(guide, data, n_total, findings)
    for name in set(pyro.get_param_store().keys()) - store:
        del pyro.get_param_store()[name]
    if not any(f.level == "error" for f in findings):
        fast = len(data) > 1 and vectorises(model, guide, batch.rows([0, 1]), list(data.perturbations))
        text = (
            "draws run in one pass"
            if fast
            else "draws run one by one, for the arithmetic does not broadcast over them; pyrocausal.structural.mechanism_shift does"
        )
        findings.append(Finding("note", "", text))
        if modelled is not None and {"graph", "u"} <= set(modelled.nodes):
            for verdict in identifiability(model, batch).verdicts:
                level = "warning" if verdict.status == "not identified" else "note"
                findings.append(Finding(level, "graph", f"{verdict.query} questions: {verdict.status}: {verdict.because}"))
        if fitted and modelled is not None and "z" in modelled.nodes:
            state = collapse(model, guide, data)
            findings.append(Finding("warning" if state else "note", "z", str(state)))
    return Report(tuple(findings))


def _trace(fn: Any, batch: Batch, what: str, findings: list[Finding], module: Any) -> Any:
    store = set(pyro.get_param_store().keys())
    try:
        trace = poutine.trace(fn).get_trace(batch)
        trace.compute_log_prob()
    except Exception as error:  # whatever the author's code raises is the finding
        trace = _without_validation(fn, batch) if isinstance(error, ValueError) and str(error).startswith("Expected") else None
        if trace is None:
            findings.append(_failure(error, what, module))
            return None
    for name in sorted(set(pyro.get_param_store().keys()) - store):
        findings.append(
            Finding(
                "error",
                name,
                f"pyro.param({name!r}) in the {what} lives in Pyro's global store, where another model can overwrite it; "
                f"make it a PyroParam of the module (or, to intervene on it, a sample or deterministic site)",
            )
        )
        del pyro.get_param_store()[name]
    return trace


def _without_validation(fn: Any, batch: Batch) -> Any:
    """The trace of a pair that Pyro's own checks stop, so that :func:`_finite` can name the site; None if it fails without them too."""
    try:
        with pyro.validation_enabled(False):
            trace = poutine.trace(fn).get_trace(batch)
            trace.compute_log_prob()
        return trace
    except Exception:
        return None


def _failure(error: Exception, what: str, module: Any) -> Finding:
    """A crash in plain words, where its cause is known."""
    text = next(iter(str(error).strip().splitlines()), "")
    if isinstance(error, NotImplementedError) and "global pyro.param" in text:
        name = min(module._pyro_context.param_state["params"])
        return Finding(
            "error",
            name,
            f"pyro.param({name!r}) in the {what} lives in Pyro's global store, where another model can overwrite it; "
            "make it a PyroParam of the module (or, to intervene on it, a sample or deterministic site)",
        )
    if "inside plate('cell')" in text:
        site = text.split("at site ")[1].split()[0]
        mend = (
            "make the vector of each cell an event with .to_event(1)"
            if what == "model"
            else "make the vector of each cell an event with .to_event(1), and amortise: an encoder of batch.x, no parameter per cell"
        )
        return Finding("error", site, f"the site {site!r} of the {what} does not have one value for each cell ({text}); {mend}")
    return Finding("error", "", f"the {what} fails on a batch of cells: {type(error).__name__}: {text}")


def _observation(trace: Any, batch: Batch, n_total: int, findings: list[Finding]) -> None:
    site = trace.nodes.get("x")
    if site is None or site["type"] != "sample":
        findings.append(
            Finding("error", "x", "the model has no site 'x'; write pyro.sample('x', law, obs=batch.x) in the plate over cells")
        )
        return
    if not site["is_observed"]:
        findings.append(Finding("error", "x", "the site 'x' is not observed; pass obs=batch.x to pyro.sample('x', ...)"))
    frames = [f.name for f in site["cond_indep_stack"]]
    if "cell" not in frames:
        findings.append(Finding("error", "x", "the site 'x' is in no plate over cells; put it under `with batch.cells():`"))
        return
    if abs(float(site["scale"]) * len(batch) / n_total - 1) > 1e-6:
        findings.append(
            Finding(
                "error",
                "x",
                f"the plate 'cell' does not scale the batch to the population (scale {float(site['scale']):g}, expected "
                f"{n_total / len(batch):g}), so priors would weigh too much; use `with batch.cells():`",
            )
        )
    if site["fn"].event_shape != batch.x.shape[1:]:  # type: ignore[union-attr]
        findings.append(
            Finding(
                "error",
                "x",
                f"the site 'x' has event shape {tuple(site['fn'].event_shape)}, expected ({batch.x.shape[1]},); "  # type: ignore[union-attr]
                "make the genes an event with .to_event(1)",
            )
        )
    if "dose" not in trace.nodes:
        findings.append(
            Finding(
                "error",
                "dose",
                "the model has no site 'dose', so no intervention can reach it; "
                "write dose = pyro.deterministic('dose', batch.dose, event_dim=1) in the plate over cells",
            )
        )


def _latents(modelled: Any, guided: Any, findings: list[Finding]) -> None:
    in_model = {n for n, s in _sample_sites(modelled) if not s["is_observed"] and n != "x"}
    in_guide = {n for n, s in _sample_sites(guided) if not s["infer"].get("is_auxiliary")}
    for name in sorted(in_model - in_guide):
        findings.append(
            Finding("error", name, f"the model samples {name!r}, but the guide forgets it; add pyro.sample({name!r}, ...) to the guide")
        )
    for name in sorted(in_guide - in_model):
        findings.append(Finding("error", name, f"the guide samples {name!r}, which the model does not have; rename it or remove it"))
    for name in sorted(in_guide & in_model):
        ours, theirs = guided.nodes[name]["fn"].event_dim, modelled.nodes[name]["fn"].event_dim
        if ours != theirs:
            findings.append(
                Finding(
                    "error",
                    name,
                    f"{name!r} has {theirs} event dimensions in the model and {ours} in the guide; use .to_event({theirs}) in both",
                )
            )


def _parameters(trace: Any, findings: list[Finding]) -> None:
    for name, site in trace.nodes.items():
        short = name.split(".")[-1]
        if site["type"] == "param" and short in RESERVED_DIMS and short not in ("x", "dose"):
            findings.append(
                Finding(
                    "error",
                    short,
                    f"{short!r} is a parameter, which pyro.do cannot reach; make it a site, pyro.sample({short!r}, prior) or "
                    f"pyro.deterministic({short!r}, value)",
                )
            )


def _finite(modelled: Any, guided: Any, findings: list[Finding]) -> None:
    for what, trace in (("model", modelled), ("guide", guided)):
        for name, site in _sample_sites(trace):
            if not bool(torch.isfinite(site["log_prob_sum"])):
                findings.append(
                    Finding(
                        "error", name, f"the log-probability of {name!r} in the {what} is {float(site['log_prob_sum'])}; check its support"
                    )
                )


def _dimensions(trace: Any, findings: list[Finding]) -> None:
    for name, site in trace.nodes.items():
        if site["type"] != "sample" or type(site["fn"]) in (_Subsample, pyro.distributions.Unit) or _deterministic(site):
            continue
        n = site["fn"].event_dim
        declared = site["infer"].get("event_dims") or RESERVED_DIMS.get(name, ())
        if n and len(declared) != n:
            findings.append(
                Finding(
                    "warning",
                    name,
                    f"the {n} event dimensions of {name!r} have no names; declare infer={{'event_dims': (...)}} with {n} names",
                )
            )


def _dose(model: Any, trace: Any, batch: Batch, findings: list[Finding]) -> None:
    values = {n: s["value"] for n, s in _sample_sites(trace) if not s["is_observed"] and n != "x"}
    values = {n: torch.ones_like(v) if _is_binary(trace.nodes[n]["fn"]) else v for n, v in values.items()}  # every target on
    fixed = poutine.condition(model, data=values)
    laws = []
    for amount in (0.0, 1.0):
        intervened = pyro.do(fixed, data={"dose": torch.full_like(batch.dose, amount)})
        laws.append(poutine.trace(intervened).get_trace(batch))
    moved = any(
        not torch.equal(laws[0].nodes[n]["fn"].mean, laws[1].nodes[n]["fn"].mean)
        for n in laws[0].nodes
        if laws[0].nodes[n]["type"] == "sample" and n != "dose" and not _is_constant(laws[0].nodes[n]) and n in laws[1].nodes
    )
    if not moved:
        findings.append(
            Finding("error", "dose", "do(dose) changes nothing downstream; use the value of the site 'dose' in the model, not batch.dose")
        )


def _is_constant(site: dict[str, Any]) -> bool:
    if type(site["fn"]) is _Subsample or _deterministic(site):
        return True
    try:
        return site["fn"].mean is None
    except (AttributeError, NotImplementedError):
        return True


def _is_binary(fn: Any) -> bool:
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return isinstance(fn, torch.distributions.Bernoulli)


def _hidden(model: Any, batch: Batch, findings: list[Finding]) -> None:
    try:
        model(batch.hide())
    except Exception as error:
        findings.append(
            Finding(
                "error",
                "x",
                f"the model fails when the observation is hidden (batch.x is None, {type(error).__name__}), so it cannot predict; "
                "read batch.x only as obs=batch.x",
            )
        )


def _new_cells(guide: Any, data: PerturbationData, n_total: int, findings: list[Finding]) -> None:
    if len(data) < 3:
        return
    try:
        guide(data.batch([0, 1, 2], n_total=n_total))
        guide(data.batch([len(data) - 1], n_total=n_total))
        last = len(data) - 1
        here, there = _seeded_trace(guide, data.batch([last], n_total=n_total)), _seeded_trace(guide, data[[last]].batch(n_total=n_total))
        what = "" if all(torch.equal(s["value"], there.nodes[n]["value"]) for n, s in _sample_sites(here)) else "its place in the data"
    except Exception as error:
        what = type(error).__name__
    if what:
        findings.append(
            Finding(
                "error",
                "",
                f"the guide cannot serve batches of another size or other cells ({what} decides); amortise it: "
                "an encoder of batch.x in place of a parameter per cell",
            )
        )


def _seeded_trace(guide: Any, batch: Batch) -> Any:
    torch.manual_seed(0)
    return poutine.trace(guide).get_trace(batch)
