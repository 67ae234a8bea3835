"""The published procedure of LCD: deconvolve the counts of each condition, then match the scores of the states that come out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pyrocausal.data import PerturbationData
from pyrocausal.dynamics.deconvolve import deconvolve
from pyrocausal.dynamics.score import conditions_of, from_cells, train_score
from pyrocausal.errors import PyrocausalError
from pyrocausal.fit import Fit, fit


def fit_two_stage(
    model: Any,
    guide: Any,
    data: PerturbationData,
    *,
    steps_1: int = 250_000,
    steps_2: int = 50_000,
    mc_samples: int = 20_000,
    cells: int = 64,
    taus: Sequence[float] = (1.0, 20.0),
    lr_1: float = 3e-4,
    debias: bool = False,
    batch_size: int = 8192,
    lr_2: float = 1e-3,
    weight_decay: float = 1.0,
    parity: bool = True,
    encoder_epochs: int = 20,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: bool | None = None,
) -> Fit:
    """Fit ``models.LCD`` in the published two stages (Lorch et al. 2026, arXiv 2601.15341), and then its guide with the model as it is.

    The published model has no size factor: counts need ``LCD(..., likelihood="zero_inflated_poisson", depth=False)``. Normalised
    expression (``likelihood="gaussian"``) is its own state, and has the second stage only.

    Args:
        steps_1, mc_samples, cells, taus, lr_1, debias: of :func:`~pyrocausal.dynamics.deconvolve.deconvolve`.
        steps_2, batch_size, lr_2, weight_decay, parity: of :func:`~pyrocausal.dynamics.score.train_score`.
        encoder_epochs: epochs of the encoder of states, which only questions about measured cells need.

    Returns:
        The same as :func:`pyrocausal.fit`; its history is that of the encoder, and ``settings["stages"]`` holds the losses of both stages.
        An interrupt ends the stage that runs and keeps what was fitted; later stages then start from there.
    """
    if model.counts and (model.depth or model.law_of_counts != "zero_inflated_poisson"):
        raise PyrocausalError(
            f"the two stages are for a zero-inflated Poisson without size factor, the model has likelihood={model.law_of_counts!r} and "
            f"depth={model.depth}; make it with likelihood='zero_inflated_poisson', depth=False, or use pc.fit"
        )
    model.to(device)
    guide.to(device)
    guide.initialise(model, data)
    codes, doses = conditions_of(data)
    stages: dict[str, Any] = {}
    if model.counts:
        first = deconvolve(
            data, codes, model.unit, steps=steps_1, mc_samples=mc_samples, cells=cells, taus=taus, lr=lr_1, debias=debias, seed=seed,
            device=device, progress=progress,
        )  # fmt: skip
        source = first.source
        model.gate_logits.data.copy_(first.gate_logits)
        stages["deconvolution"] = first.history["loss"].tolist()
    else:
        source = from_cells(torch.as_tensor(data.dense()), codes, len(doses))
    model.network.fit_units(source, doses, torch.Generator().manual_seed(seed))
    guide.take_units(model)
    second = train_score(
        model.network, source, doses, steps=steps_2, batch_size=batch_size, lr=lr_2, weight_decay=weight_decay, parity=parity,
        continuous=not parity, seed=seed, progress=progress,
    )  # fmt: skip
    stages["score"] = second["loss"].tolist()
    trainable = [p for p in model.parameters() if p.requires_grad]
    for p in trainable:
        p.requires_grad_(not model.counts)  # with the state observed nothing is left to train; one epoch at rate 0 gives the bound
    guide.ready = True
    try:
        settings = {"max_epochs": encoder_epochs} if model.counts else {"max_epochs": 1, "lr": 0.0}
        out = fit(model, guide, data, kl_warmup=0.0, seed=seed, device=device, progress=progress, **settings)
    finally:
        guide.ready = False
        for p in trainable:
            p.requires_grad_(True)
    out.settings["stages"] = stages
    return out


__all__ = ["fit_two_stage"]
