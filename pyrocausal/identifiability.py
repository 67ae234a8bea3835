"""Which questions do the data answer, and which does the model only seem to answer?

**The fold.** With linear equations ``u = e (I - A)^-1``. A decoder that begins with a free linear map takes ``(I - A)^-1`` into itself:
without a graph, and with that decoder, the model gives every cell and every perturbation the very same expression. Two graphs, one law: no
data tell them apart, and neither edges nor clamps (which cut edges) mean anything, while shifts do. :func:`identifiability` carries the
fold out, on the model itself, and looks whether the outputs agree.

============================================  ===================  ==================================  ==================================
equations, decoder                            shift                clamp, edge                         carried by
============================================  ===================  ==================================  ==================================
linear; free (``mlp``, ``linear``)            identified           not identified                      --
nonlinear; ``mlp``                            identified           not identified                      (a network absorbs curves too)
nonlinear; ``linear``                         identified           up to permutation and scale         the curvature of the equations
any; ``anchored``                             identified           identified                          the anchors, and the given order
linear diffusion of d genes, k targeted       identified           k = d: identified; else in part     on-target action, and a sparse prior
score field                                   identified           not identified                      --
programs over time, gated weights             identified           up to permutation and scale         every program cut off by some target
no graph                                      identified           no edges; clamps need anchors       --
============================================  ===================  ==================================  ==================================

**The rotation.** A linear diffusion ``dx = (x M + b + shift) dt + diag(sigma) dW`` over d genes has the stationary covariance S of any
other with ``M = S^-1 (-Q - diag(sigma^2)/2)``, Q skew: d (d - 1)/2 numbers that no control cell knows. A perturbation that moves the mean
by m and acts on its own gene alone makes ``m S^-1 Q`` known (its size follows from ``a Q a' = 0``), so that k targeted genes leave a skew
matrix of d - k dimensions, (d - k)(d - k - 1)/2 numbers, to the sparse prior. If perturbations may act off target at no cost, all of
them are left. A score field is ``Q = 0``, whatever the truth.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyro
import pyro.poutine as poutine
import torch
from torch import Tensor, nn

from pyrocausal.errors import ContractError
from pyrocausal.loading import Batch
from pyrocausal.nn import MLP, Loadings
from pyrocausal.structural import total_effects

AGREE = 1e-4  # relative difference of outputs below which they are the same (float32)


@dataclass(frozen=True)
class Verdict:
    """What is known of one kind of question.

    ``status`` is ``"identified"``, ``"up to permutation and scale"``, ``"in part"``, ``"not identified"`` or ``"unknown"``.
    """

    query: str
    status: str
    because: str


@dataclass(frozen=True)
class Identifiability:
    """A verdict for each kind of question; ``print`` it.

    Attributes:
        fold_error: relative difference between the outputs of the model and of the one without a graph whose decoder took the graph in;
            None where the decoder can take in no linear map, or the model has no graph.
    """

    verdicts: tuple[Verdict, ...]
    fold_error: float | None

    @property
    def folds(self) -> bool:
        """Whether the decoder absorbs the graph."""
        return self.fold_error is not None and self.fold_error < AGREE

    def __getitem__(self, query: str) -> Verdict:
        return next(v for v in self.verdicts if v.query == query)

    def __str__(self) -> str:
        return "\n".join(["identifiability", *(f"  {v.query}: {v.status}: {v.because}" for v in self.verdicts)])

    __repr__ = __str__


def identifiability(model: Any, batch: Batch | None = None, seed: int = 0) -> Identifiability:
    """Verdicts for ``shift``, ``clamp`` and ``edge`` questions, after carrying out the fold.

    Args:
        model: a fit, or a model with the sites ``graph`` and ``u``, the attribute ``decoder`` (:class:`pyrocausal.nn.MLP` or
            :class:`pyrocausal.nn.Loadings`, or any module whose first layer is an ``nn.Linear``) and ``equations`` (linear if it has none).
        batch: cells whose doses and covariates the fold is tried on; random single perturbations if None.

    Raises:
        ContractError: for a model without a site ``u``.
    """
    shift = Verdict("shift", "identified", "perturbed and control cells are both measured, and the law of the cells determines the shift")
    if getattr(getattr(model, "model", model), "state", "program") == "gene":
        law = _network if getattr(getattr(model, "model", model), "acyclic", False) else _diffusion
        status, because = law(getattr(model, "model", model), getattr(model, "cells_per_perturbation", None))
        return Identifiability((shift, Verdict("clamp", status, because), Verdict("edge", status, because)), None)
    if getattr(getattr(model, "model", model), "timed", False):
        status, because = _course(getattr(model, "model", model))
        return Identifiability((shift, Verdict("clamp", status, because), Verdict("edge", status, because)), None)
    batch = _example(model) if batch is None else batch.hide()
    model = getattr(model, "model", model)
    sites = _sites(model, batch)
    if "u" not in sites:
        raise ContractError(
            "the model has no site 'u', so there are no programs to ask about; write pyro.deterministic('u', ..., event_dim=1)"
        )
    decoder = getattr(model, "decoder", None)
    anchored = isinstance(decoder, Loadings) and decoder.kind == "anchored"
    if "graph" not in sites or not _may_have_edges(model, sites):
        clamp = (
            ("identified", "every program owns genes (anchors)")
            if anchored
            else ("not identified", "the programs have no axes of their own")
        )
        return Identifiability((shift, Verdict("clamp", *clamp), Verdict("edge", "not identified", "the model has no graph")), None)
    equations = getattr(model, "equations", "linear")
    if decoder is None:
        why = "the model has no attribute 'decoder' to fold the graph into"
        return Identifiability((shift, Verdict("clamp", "unknown", why), Verdict("edge", "unknown", why)), None)
    error = None if anchored else _fold_error(model, batch, seed)
    if anchored:
        status, because = "identified", "every program owns genes (anchors), which pins the axes; assumes the anchors and the allowed edges"
    elif error is not None and error < AGREE:
        status = "not identified"
        because = f"without a graph the decoder gives the same outputs (relative difference {error:.0e}): it absorbs the graph"
    elif isinstance(decoder, Loadings) and decoder.kind == "linear":
        status, because = "up to permutation and scale", f"the {equations} equations bend what a linear decoder cannot"
    else:
        status, because = (
            "not identified",
            f"a network for a decoder can absorb {equations} equations too; use a linear or anchored decoder",
        )
    return Identifiability((shift, Verdict("clamp", status, because), Verdict("edge", status, because)), error)


def _network(model: Any, cells: Any) -> tuple[str, str]:
    """Clamps and edges of a network of genes without cycles."""
    own, d = model.on_target.cpu().numpy() > 0, model.shape[1]
    seen = own if cells is None else own & (np.asarray(cells) > 0)[:, None]
    k = int(seen.any(0).sum())
    assumed = "assumes linear equations, no cycles, and that no unmeasured cause moves two genes"
    if k >= d - 1:
        return "identified", f"{k} of {d} genes are targeted; {assumed}"
    why = "edges between two others only up to turns that change no distribution, over which the draws vary"
    return "in part", f"{k} of {d} genes are targeted, whose edges are identified, {why}; {assumed}"


def _diffusion(model: Any, cells: Any) -> tuple[str, str]:
    """Clamps and edges of a diffusion over genes."""
    if getattr(model, "gradient_field", False):
        return "not identified", "the drift is a score, whose slope is symmetric whatever the regulation; use linear_lcd"
    targets, d = model.targets.cpu().numpy(), model.shape[1]
    seen = targets[(targets >= 0) & (True if cells is None else np.asarray(cells) > 0)]
    k = len(np.unique(seen))
    left = (d - k) * (d - k - 1) // 2
    known = f"{k} of {d} genes are targeted, which leaves {left} of {d * (d - 1) // 2} rotations of the drift open"
    if left:
        return "in part", f"{known}; the sparse prior on edges decides those, and assumes few edges and mostly on-target action"
    return "identified", f"{known}; assumes a linear diffusion at stationarity and mostly on-target action"


@torch.no_grad()
def _course(model: Any) -> tuple[str, str]:
    """Clamps and edges of programs over time."""
    if model.weights == "free":
        return "not identified", "free weights fit as well after any linear mixing of the programs; use weights='gated'"
    lost = int((model.mask.max(0).values < 0.5).sum())
    if lost:
        return "in part", f"{lost} of {model.shape[1]} programs are the target of no perturbation, and may be mixed"
    few = "; the lagged weights are not, of fewer than three times" if len(model.times) < 3 and model.lag else ""
    why = "every program is cut from its parents by some perturbation; assumes one decoder for all times and independent Gaussian noise"
    return "up to permutation and scale", why + few


@torch.no_grad()
def fold(model: Any, graph: Tensor) -> nn.Module:
    """The model without edges whose decoder took ``(I - graph)^-1`` in: for linear equations its outputs are those of ``model``.

    Raises:
        ContractError: for a decoder that can take in no linear map.
    """
    folded = copy.deepcopy(model)
    total = total_effects(graph)  # e -> u
    decoder = folded.decoder
    if isinstance(decoder, Loadings):
        if decoder.kind == "anchored":
            raise ContractError("an anchored decoder takes in no linear map: every program keeps its own genes")
        decoder.weight.copy_(total @ decoder.weight)
        if decoder.rest is not None:
            decoder.rest.first.weight.copy_(decoder.rest.first.weight @ total.T)
    else:
        first = decoder.first if isinstance(decoder, MLP) else next((m for m in decoder.modules() if isinstance(m, nn.Linear)), None)
        if first is None or first.in_features != len(graph):
            raise ContractError(f"a decoder of type {type(decoder).__name__} has no linear first layer that reads the programs")
        first.weight.copy_(first.weight @ total.T)
    return folded


def _fold_error(model: Any, batch: Batch, seed: int) -> float | None:
    """Relative difference of ``x_loc`` between the model and its fold, over cells of random state and shift."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        trace = poutine.trace(model).get_trace(batch)
        graph = trace.nodes["graph"]["value"]
        if float(graph.abs().max()) < 1e-3:  # nothing to fold yet: any graph of the model's will do
            graph = (graph != 0) * 0.5 if bool((graph != 0).any()) else graph
        values = {n: s["value"] for n, s in trace.nodes.items() if _is_latent(s)}
        with_graph = poutine.trace(pyro.do(poutine.condition(model, data=values), data={"graph": graph})).get_trace(batch)
        try:
            folded = fold(model, graph)
        except ContractError:
            return None
        without = pyro.do(poutine.condition(folded, data=values), data={"graph": torch.zeros_like(graph)})
        a, b = with_graph.nodes["x_loc"]["value"], poutine.trace(without).get_trace(batch).nodes["x_loc"]["value"]
        return float((a - b).norm() / (a - a.mean(0)).norm().clamp_min(1e-12))


def _sites(model: Any, batch: Batch) -> dict[str, Any]:
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return dict(poutine.trace(model).get_trace(batch).nodes)


def _may_have_edges(model: Any, sites: dict[str, Any]) -> bool:
    index = getattr(model, "edge_index", None)
    return bool(index.shape[1]) if index is not None else bool((sites["graph"]["value"] != 0).any())


def _is_latent(site: dict[str, Any]) -> bool:
    return site["type"] == "sample" and not site["is_observed"] and type(site["fn"]).__name__ != "_Subsample"


def _example(of: Any, n: int = 256) -> Batch:
    """Cells without expression, of random single perturbations, for a fit or for a model with the attribute ``shape`` (P, D)."""
    coords = getattr(of, "coords", None)
    n_perturbations = of.shape[0] if coords is None else len(coords["perturbation"])
    weight = next(getattr(of, "model", of).parameters())
    which = torch.randint(n_perturbations, (n,), generator=torch.Generator().manual_seed(0)).to(weight.device)
    dose = nn.functional.one_hot(which, n_perturbations).to(weight)
    zeros = torch.zeros(n, dtype=torch.int64, device=weight.device)
    return Batch(x=None, dose=dose, library_size=torch.full_like(dose[:, :1], 1e3), batch_code=zeros, time=None, index=zeros, n_total=n)
