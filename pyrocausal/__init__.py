"""Causal generative models for single-cell perturbation screens, as Pyro model/guide pairs.

``import pyrocausal as pc`` sets Pyro's ``module_local_params``: parameters belong to their module, and two models in one process never
touch.
"""

from importlib import import_module as _import_module
from types import ModuleType as _ModuleType

import pyro as _pyro

_pyro.settings.set(module_local_params=True)

from pyrocausal import errors, simulate
from pyrocausal.adapt import adapt
from pyrocausal.auto import auto_guide
from pyrocausal.benchmark import Benchmark, benchmark
from pyrocausal.check import check_model
from pyrocausal.clipr import clipr
from pyrocausal.collapse import collapse
from pyrocausal.collection import build
from pyrocausal.data import PerturbationData
from pyrocausal.demo_screen import demo_screen
from pyrocausal.elbo import ELBO
from pyrocausal.fit import Fit, fit
from pyrocausal.identifiability import identifiability
from pyrocausal.interventions import (
    activate,
    at,
    clamp,
    cut,
    do,
    flip_target,
    knockdown,
    knockout,
    perturb,
    pulse,
    set_edge,
    shift,
    silence,
    sites,
    sustain,
    untreated,
)
from pyrocausal.io import load
from pyrocausal.posterior import iwelbo, to_inference_data, to_networkx
from pyrocausal.query import counterfactual, dose_response, effects, interventional, to_anndata
from pyrocausal.trajectory import trajectory

__all__ = [
    "ELBO",
    "Benchmark",
    "Fit",
    "PerturbationData",
    "activate",
    "adapt",
    "at",
    "auto_guide",
    "benchmark",
    "build",
    "check_model",
    "clamp",
    "clipr",
    "collapse",
    "counterfactual",
    "cut",
    "demo_screen",
    "do",
    "dose_response",
    "duplicates",
    "effects",
    "embeddings",
    "errors",
    "evaluate",
    "fit",
    "flip_target",
    "graph_baselines",
    "guides",
    "identifiability",
    "interactions",
    "interventional",
    "iwelbo",
    "knockdown",
    "knockout",
    "load",
    "models",
    "modules",
    "perturb",
    "plots",
    "pulse",
    "set_edge",
    "shift",
    "silence",
    "simulate",
    "simulate_graph",
    "simulate_regulatory",
    "simulate_scm",
    "sites",
    "splits",
    "sustain",
    "to_anndata",
    "to_inference_data",
    "to_networkx",
    "trajectory",
    "untreated",
]


LAZY = (
    "models", "guides", "duplicates", "embeddings", "evaluate", "graph_baselines", "interactions", "modules", "plots", "simulate_graph",
    "simulate_regulatory", "simulate_scm", "splits",
)  # fmt: skip


def __getattr__(name: str) -> _ModuleType:
    """``pc.models``, ``pc.guides`` and what not every session needs: imported when they are asked for."""
    if name in LAZY:
        return _import_module(f"pyrocausal.{name}")
    raise AttributeError(f"module 'pyrocausal' has no attribute {name!r}")
