"""What a repetition of the experiment would predict: not models, but functions of data, and the scale on which models are read.

:func:`pyrocausal.splits.halves` splits a screen into two experiments without a common cell; the duplicate of one is scored on the other.
The technical duplicate is no upper bound: with few cells a denoiser beats it. The interpolated duplicate trades what it cannot tell for
the mean.
"""

from __future__ import annotations

import numpy as np
import xarray as xr
from scipy import stats

from pyrocausal.data import PerturbationData
from pyrocausal.errors import DataError
from pyrocausal.evaluate import _p_value, _totals, measured_effects
from pyrocausal.metrics.panel import interpolated_duplicate as keep_quiet

ATTRS = {"rung": "duplicate"}


def technical_duplicate(half: PerturbationData) -> xr.Dataset:
    """The measured effect of each condition, ``effect`` (intervention, gene), and the ``baseline`` (gene) that it is against.

    Definition: Ahlmann-Eltze, Huber and Anders 2025; vcc2026's replicate. Cannot see: what is common to both halves (batch, guide).
    """
    measured = measured_effects(half)
    return measured[["effect"]].assign(baseline=("gene", _baseline(half))).assign_attrs(ATTRS | {"duplicate": "technical"})


def interpolated_duplicate(half: PerturbationData) -> xr.Dataset:
    """The technical duplicate where a gene tells the perturbation from the others, the perturbed mean elsewhere.

    ``x_p = alpha_p x_dup,p + (1 - alpha_p) x_all``, ``alpha_pg = 1 - padj_pg``: Benjamini-Hochberg over the genes of p, of the Welch test
    of the half's cells of p against all its other perturbed cells; x_all is the mean of the condition means. Form as
    :func:`technical_duplicate`. Source: Miller et al. (bioRxiv 2025.10.20.683304). Cannot see: as the technical duplicate.
    """
    duplicate = technical_duplicate(half)
    perturbed = ~half.is_control
    p_values = []
    for name in duplicate["intervention"].values:
        own = half.labels == name
        if not (perturbed & ~own).any():
            raise DataError("an interpolated duplicate compares perturbations with one another, and there is one; take a technical one")
        a, b = (_totals(half, np.flatnonzero(rows)) for rows in (own, perturbed & ~own))
        p_values.append(_p_value(a, b, half.kind == "counts"))
    adjusted = stats.false_discovery_control(np.nan_to_num(np.stack(p_values), nan=1.0), axis=1)
    effect = duplicate["effect"]
    mixed = keep_quiet(effect.to_numpy(), effect.mean("intervention").to_numpy(), adjusted)
    return duplicate.assign(effect=(effect.dims, mixed)).assign_attrs(duplicate.attrs | {"duplicate": "interpolated"})


def _baseline(data: PerturbationData) -> np.ndarray:
    return _totals(data, np.flatnonzero(data.is_control)).value
