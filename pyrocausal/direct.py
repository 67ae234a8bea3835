"""What perturbations do gene by gene, beyond the programs that they move.

A decoder of few programs cannot say that one gene alone is knocked down, and its mean of untreated cells is a little off. On the scale of
effects, ``y = log1p(1e4 share)`` for counts and the data's own otherwise::

    offset    ~ Normal(0, offset_scale^2)                       what the programs' mean of untreated cells lacks; vague
    direct_t  ~ Normal(0, k_t tau^2)                            what t does to each gene beyond its programs
    d_n       = offset + sum_t dose_nt direct_t
    share'_n  = e^d share_n + (e^d - 1) / 1e4                   so that y'_n = y_n + d_n, cell by cell and in the mean over cells
    x_loc'_n  = x_loc_n + d_n                                   normalised data

They are inferred when the programs have been fitted, and do not move them: with ``y_t`` the measured mean of the cells of t alone,
``s_t^2`` its sampling variance and ``y^_t`` what the programs say of a fresh population under do(t) (the mean over posterior draws)::

    y_0 - y^_0 ~ Normal(offset, s_0^2)
    y_t - y^_t ~ Normal(offset + direct_t, s_t^2)
    q(offset) = Normal(b, v),   E_q[direct_t | offset] = w_t (y_t - y^_t - offset),   w_t = k_t tau^2 / (k_t tau^2 + s_t^2)

with tau and k by empirical Bayes (:func:`pyrocausal.closed_form.shrunk_effects`). Populations, not cells, are matched, because an encoder
that has seen the cells of t explains them by their basal state. Where the programs say all, tau is 0. What is said of t is
``(1 - w) y^_t + w y_t``, whose variance is ``w s^2 + (1 - w)^2 V`` if V is that of y^_t - y^_0 over posterior draws; as V is there anyway,
the variance of direct_t given offset is ``w s^2 - w (2 - w) V``, and at least a tenth of w s^2.

**Assumed:** direct effects add, on the scale above, over the perturbations of a combination. A perturbation that no cell received alone
has none (its sd is that of the others), nor has one that :func:`pyrocausal.adapt` adds. Shares need not sum to one (on two real screens,
.92 to 1.01 in the mean): made to, effects would not add, and were further from held-out cells.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyrocausal.structural import mechanism_shift

if TYPE_CHECKING:
    from pyrocausal.data import PerturbationData
    from pyrocausal.loading import Batch

LEAST_SD = 1e-6
LEAST_RATE = 1e-8
DRAWS, CELLS = 64, 256  # of the population that the programs predict
VAGUE = 10.0
LEAST_SHARE = 0.1  # of the variance of a direct effect that the programs' own may take


def move(x_loc: Tensor, library_size: Tensor, d: Tensor, counts: bool) -> Tensor:
    """``x_loc'`` of ``x_loc`` [..., n, n_genes] and d, on the scale of effects."""
    if not counts:
        return x_loc + d
    return library_size * (x_loc / library_size * d.exp() + d.expm1() / 1e4).clamp(LEAST_RATE, 1.0)


def undo(x: Tensor, library_size: Tensor, d: Tensor, counts: bool) -> Tensor:
    """The expression [n, n_genes] that cells would have had without d; counts are not below 0."""
    if not counts:
        return x - d
    return (x * (-d).exp() + library_size * (-d).expm1() / 1e4).clamp_min(0.0)


class DirectPrior(nn.Module):
    """The sites ``offset`` [G] and ``direct`` [P, G] of a model."""

    offset_scale: Tensor
    direct_scale: Tensor

    def __init__(self, n_genes: int, n_perturbations: int) -> None:
        super().__init__()
        self.register_buffer("offset_scale", torch.full((n_genes,), LEAST_SD))
        self.register_buffer("direct_scale", torch.full((n_perturbations, n_genes), LEAST_SD))

    def forward(self) -> tuple[Tensor, Tensor]:
        """``(offset, direct)``."""
        offset = pyro.sample("offset", dist.Normal(0.0, self.offset_scale).to_event(1), infer={"event_dims": ("gene",)})
        table = {"event_dims": ("perturbation", "gene")}
        return offset, pyro.sample("direct", dist.Normal(0.0, self.direct_scale).to_event(2), infer=table)


class DirectPosterior(nn.Module):
    """q(offset) q(direct | offset), in closed form; zero until :meth:`estimate` is called."""

    offset: Tensor
    offset_sd: Tensor
    direct: Tensor
    direct_sd: Tensor
    weight: Tensor
    known: Tensor

    def __init__(self, n_genes: int, n_perturbations: int) -> None:
        super().__init__()
        for name in ("offset", "offset_sd"):
            self.register_buffer(name, torch.zeros(n_genes))
        for name in ("direct", "direct_sd", "weight"):
            self.register_buffer(name, torch.zeros(n_perturbations, n_genes))
        self.register_buffer("known", torch.zeros((), dtype=torch.bool))

    def forward(self) -> None:
        offset = pyro.sample("offset", dist.Normal(self.offset, self.offset_sd.clamp_min(LEAST_SD)).to_event(1))
        loc = self.direct - self.weight * (offset - self.offset).unsqueeze(-2)
        pyro.sample("direct", dist.Normal(loc, self.direct_sd.clamp_min(LEAST_SD)).to_event(2))

    def undone(self, batch: Batch, counts: bool) -> Batch:
        """The cells as the programs alone would have made them, at the posterior mean."""
        if not bool(self.known):
            return batch
        assert batch.x is not None
        d = self.offset + mechanism_shift(batch.dose, self.direct)
        return replace(batch, x=undo(batch.x, batch.library_size, d, counts))

    @torch.no_grad()
    def estimate(self, model: Any, guide: Any, data: PerturbationData, seed: int) -> None:
        """Infer both, given the programs, and set the scales of ``model.direct``; see the module's docstring."""
        from pyrocausal.closed_form import conditions_of, shrunk_effects

        c = conditions_of(data)
        base, levels, spread = predicted_levels(model, guide, data, [int(r) for r in c.rows], seed)
        residual = replace(c, control=c.control - base, mean=c.mean - levels)
        law = shrunk_effects(residual, len(data.perturbations), shared=False)
        w, variance = -law.on_control[c.rows], law.effect_sd[c.rows] ** 2
        law.effect_sd[c.rows] = np.sqrt(np.maximum(variance - w * (2 - w) * spread, LEAST_SHARE * variance))
        found = {"offset": law.control, "offset_sd": law.control_sd, "direct": law.effect, "direct_sd": law.effect_sd}
        for name, value in (found | {"weight": -law.on_control}).items():
            getattr(self, name).copy_(torch.from_numpy(value))
        model.direct.offset_scale.copy_(torch.from_numpy(np.maximum(VAGUE * np.sqrt(c.control_variance), LEAST_SD)))
        model.direct.direct_scale.copy_(torch.from_numpy(np.maximum(law.prior_effect, LEAST_SD)))
        self.known.fill_(True)


def predicted_levels(
    model: Any, guide: Any, data: PerturbationData, rows: Sequence[int], seed: int, draws: int = DRAWS, cells: int = CELLS
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What a pair says of the mean of fresh cells, untreated [G] and under each of the perturbations ``rows`` [n, G], on the scale of
    effects, and the variance of the difference over posterior draws [n, G]."""
    from pyrocausal.fit import reference_cells
    from pyrocausal.interventions import Intervention
    from pyrocausal.worlds import MAX_ROWS, fresh_base, intervened_law

    names = [str(p) for p in data.perturbations]
    device = next(model.parameters()).device
    reference = reference_cells(data).to(device)
    acts = [Intervention(doses=()), *(Intervention(doses=((names[r], 1.0),)) for r in rows)]
    total, square = (np.zeros((len(acts), len(data.genes))) for _ in range(2))
    at_once = max(1, MAX_ROWS // cells)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        for start in range(0, draws, at_once):
            n = min(at_once, draws - start)
            chosen = torch.randint(len(reference), (cells,)).tolist()
            base = fresh_base(model, guide, reference.rows([0]), reference.rows(chosen), n)
            untreated = None
            for k, act in enumerate(acts):
                law, _ = intervened_law(model, base, [act], names, strict=False)
                mean = law.mean.reshape(n, cells, -1)
                mean = (1e4 * (mean / base.batch.library_size).mean(1)).log1p() if data.kind == "counts" else mean.mean(1)
                untreated = mean.double() if untreated is None else untreated
                total[k] += mean.double().sum(0).cpu().numpy()
                square[k] += (mean.double() - untreated).square().sum(0).cpu().numpy()
    level = total / draws
    return level[0], level[1:], np.maximum(square[1:] / draws - (level[1:] - level[0]) ** 2, 0.0)
