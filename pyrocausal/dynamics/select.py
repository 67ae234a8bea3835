"""Strength of a sparse prior, chosen by cells that the fit has not seen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch

from pyrocausal.collection import build
from pyrocausal.data import PerturbationData
from pyrocausal.errors import PyrocausalError
from pyrocausal.fit import fit
from pyrocausal.posterior import global_draws, log_likelihood

EDGE_SCALES = ({"edge_scale": 0.1}, {"edge_scale": 0.3}, {"edge_scale": 1.0})


def select_settings(
    data: PerturbationData,
    candidates: Sequence[dict[str, Any]] = EDGE_SCALES,
    *,
    name: str = "linear_lcd",
    test: float = 0.2,
    max_epochs: int = 1500,
    seed: int = 0,
    progress: bool | None = None,
    **settings: Any,
) -> pd.DataFrame:
    """Held-out log-likelihood of a model under several settings, the best first.

    ``pc.build(name, data, **select_settings(data)["settings"][0])`` makes the model that the cells prefer.

    Every candidate is fitted to the same ``1 - test`` of the cells of every condition, and scored by ``log p(x)`` of the others given its
    point estimate; priors do not enter the score, so that candidates may differ in them. Nothing but the cells decides.

    Args:
        candidates: settings that differ. settings: those that all share.

    Returns:
        Columns ``settings`` (dictionary), ``log_likelihood`` (nats per held-out cell), ``se`` of the difference from the best.
    """
    if not candidates:
        raise PyrocausalError("candidates is empty; give at least one dictionary of settings")
    train, held = data.split("cells", test=test, seed=seed)
    scores = []
    for candidate in candidates:
        model, guide = build(name, data, seed=seed, **{"draws": 0, **settings, **candidate})
        found = fit(model, guide, train, max_epochs=max_epochs, kl_warmup=0.0, seed=seed, progress=progress)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            scores.append(log_likelihood(found, held, global_draws(found, 1))[0])
    means = np.array([s.mean() for s in scores])
    best = scores[int(np.argmax(means))]
    error = [float((s - best).std(ddof=1) / len(s) ** 0.5) for s in scores]
    out = pd.DataFrame({"settings": list(candidates), "log_likelihood": means, "se": error})
    return out.sort_values("log_likelihood", ascending=False, ignore_index=True)
