"""What perturbations do gene by gene, beyond the programs that they move.

A decoder of few programs cannot say that one gene alone is knocked down, and its mean of untreated cells is a little off::

    offset    ~ Normal(0, offset_scale^2)                       what the programs' mean of untreated cells lacks; vague
    direct_t  ~ Normal(0, direct_scale_t^2)                     what t does to each gene beyond its programs
    d_n       = offset + sum_t dose_nt direct_t
    x_loc'_n  = x_loc_n e^(d_n)                                 counts: logarithms of fold changes, of cells and of their mean alike
    x_loc'_n  = x_loc_n + d_n                                   normalised data

They are inferred when the programs have been fitted, and do not move them. On the scale of effects (y = log1p(1e4 share) for counts, the
data's own otherwise), with y_t the measured mean of the cells of t alone, s_t^2 its sampling variance, and y^_t what the programs say of
fresh cells under do(t), in the batches that the cells of t are of (the mean over posterior draws)::

    y_0 - y^_0 ~ Normal(b, s_0^2)
    y_t - y^_t ~ Normal(b + e_t, s_t^2),   e_t ~ Normal(0, k_t tau^2)
    E[e_t | b] = w_t (y_t - y^_t - b),   w_t = k_t tau^2 / (k_t tau^2 + s_t^2)
    Var[e_t | b] = w_t s_t^2 - w_t (2 - w_t) V_t, and at least w_t s_t^2 / 10

with tau and k by empirical Bayes (:func:`pyrocausal.closed_form.shrunk_effects`). V_t is the variance of y^_t - y^_0 over posterior draws,
which the answer has anyway: together, the two vary as ``(1 - w) y^ + w y`` does; where V is larger than that, answers are as wide as the
programs make them. Populations, not cells, are matched, because an encoder that has seen the cells of t explains them by their basal state
(the bound of cells may fall by a nat or two). For counts, b and e become logarithms of fold changes, at the mean share that they lead to::

    offset = log(expm1(y^_0 + b) / expm1(y^_0)),   direct_t = log(expm1(y^_t + b + e_t) / expm1(y^_t)) - offset

and standard deviations go by the slope ``f = dy / dlog share = 1 - e^-y``, at most ``MOST_SD`` (a gene without a count is not known to be
zero); less ``(1 - f) / 2`` times their squares, by which the mean of y over draws is that of the estimate (to second order).

**Assumed:** direct effects of the perturbations of a combination add (logarithms of fold changes, for counts). A perturbation that no cell
received alone, and one that :func:`pyrocausal.adapt` adds, has none, give or take ``direct_scale``. An interrupted training ends without
direct effects. Shares need not sum to one.
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

from pyrocausal.errors import PyrocausalError
from pyrocausal.structural import mechanism_shift

if TYPE_CHECKING:
    from pyrocausal.data import PerturbationData
    from pyrocausal.loading import Batch

LEAST_SD = 1e-6
MOST_SD = 1.0  # of the logarithm of a fold change
LEAST_FOLD = 0.02
DRAWS, CELLS = 512, 64  # of the population that the programs predict
VAGUE = 10.0
LEAST_SHARE = 0.1  # of the variance of a direct effect that the programs' own may take


def move(x_loc: Tensor, d: Tensor, counts: bool) -> Tensor:
    """``x_loc'`` of ``x_loc`` [..., n, n_genes]."""
    return x_loc * d.exp() if counts else x_loc + d


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
        return replace(batch, x=move(batch.x, -self.offset - mechanism_shift(batch.dose, self.direct), counts))

    def reset(self, model: Any) -> None:
        """No direct effects, in guide and model."""
        for value in (self.offset, self.offset_sd, self.direct, self.direct_sd, self.weight, self.known):
            value.zero_()
        for value in (model.direct.offset_scale, model.direct.direct_scale):
            value.fill_(LEAST_SD)

    def check(self, model: Any, data: PerturbationData) -> None:
        """Refuse, before a fit, what cannot be estimated after it."""
        from pyrocausal.closed_form import conditions_of

        if model.direct is None:
            raise PyrocausalError("the guide was given direct=True and the model was not; give both the same, as pc.build does")
        if model.likelihood.is_counts != (data.kind == "counts"):
            raise PyrocausalError(f"direct=True needs a likelihood of {data.kind} data, not {model.likelihood.name!r}; leave one out")
        conditions_of(data)

    @torch.no_grad()
    def estimate(self, model: Any, guide: Any, data: PerturbationData, seed: int) -> None:
        """Infer both, given the programs, and set the scales of ``model.direct``; see the module's docstring."""
        from pyrocausal.closed_form import conditions_of, shrunk_effects

        self.reset(model)
        c, counts = conditions_of(data), data.kind == "counts"
        base, levels, spread = predicted_levels(model, guide, data, [int(r) for r in c.rows], seed)
        residual = replace(c, control=c.control - base, mean=c.mean - levels)
        law = shrunk_effects(residual, len(data.perturbations), shared=False)
        w, variance = -law.on_control[c.rows], law.effect_sd[c.rows] ** 2
        law.effect_sd[c.rows] = np.sqrt(np.maximum(variance - w * (2 - w) * spread, LEAST_SHARE * variance))
        every = np.tile(base, (len(data.perturbations), 1))  # of perturbations without cells of their own: as the control
        every[c.rows] = levels
        offset, on_offset = _log_fold(base, law.control, counts)
        both, on_direct = _log_fold(every, law.control + law.effect, counts)
        v, sd = _on_log_scale(law.control_sd, on_offset, counts), _on_log_scale(law.effect_sd, on_direct, counts)
        w = -law.on_control
        offset, direct = offset - (1 - on_offset) * v**2 / 2, both - (1 - on_direct) * (sd**2 + (1 - w) ** 2 * v**2) / 2
        found = {"offset": offset, "offset_sd": v, "direct": direct - offset, "direct_sd": sd, "weight": w}
        for name, value in found.items():
            getattr(self, name).copy_(torch.from_numpy(value))
        prior = _on_log_scale(law.prior_effect, on_direct, counts)
        model.direct.offset_scale.copy_(torch.from_numpy(np.maximum(VAGUE * np.maximum(v, np.abs(offset)), LEAST_SD)))
        model.direct.direct_scale.copy_(torch.from_numpy(np.maximum(prior, LEAST_SD)))
        self.known.fill_(True)

    @torch.no_grad()
    def extend(self, model: Any, known: Tensor) -> None:
        """Perturbations that are not ``known`` [P] have no direct effect, give or take what is usual."""
        typical = model.direct.direct_scale[known].square().mean(0).sqrt()
        self.direct[~known], self.weight[~known] = 0.0, 0.0
        self.direct_sd[~known] = model.direct.direct_scale[~known] = typical


def _log_fold(level: np.ndarray, change: np.ndarray, counts: bool) -> tuple[np.ndarray, np.ndarray]:
    """``change`` of a level, on the scale of effects, as the logarithm of a fold change, and the slope dy / dlog share there."""
    if not counts:
        return change + np.zeros_like(level), np.ones_like(level + change)
    before = np.expm1(np.maximum(level, 1e-9))
    after = np.maximum(np.expm1(level + change), LEAST_FOLD * before)
    return np.log(after / before), after / (1 + after)


def _on_log_scale(sd: np.ndarray, slope: np.ndarray, counts: bool) -> np.ndarray:
    return np.minimum(sd / slope, MOST_SD) if counts else sd


def predicted_levels(
    model: Any, guide: Any, data: PerturbationData, rows: Sequence[int], seed: int, draws: int = DRAWS, cells: int = CELLS
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What a pair says of the mean of fresh cells, untreated [G] and under each of the perturbations ``rows`` [n, G], on the scale of
    effects, and the variance of the difference over posterior draws [n, G]. Fresh cells are of the batches of the cells that they stand
    for, the control's or those that received the perturbation alone."""
    from pyrocausal.interventions import Intervention
    from pyrocausal.worlds import MAX_ROWS, fresh_base, intervened_law

    names = [str(p) for p in data.perturbations]
    device = next(model.parameters()).device
    received = [np.flatnonzero(data.is_control), *(np.flatnonzero(data.labels == names[r]) for r in rows)]
    acts = [Intervention(doses=()), *(Intervention(doses=((names[r], 1.0),)) for r in rows)]
    worlds = [[*range(len(acts))]] if len(data.batches) == 1 else [[k] for k in range(len(acts))]  # that can share their cells
    total, moved, square = (np.zeros((len(acts), len(data.genes))) for _ in range(3))
    example = data.batch(received[0][:1], device=device)
    at_once = max(1, MAX_ROWS // cells)

    def levels(base: Any, act: Intervention, n: int) -> Tensor:
        law, _ = intervened_law(model, base, [act], names, strict=False)
        mean = law.mean.reshape(n, cells, -1)
        return ((1e4 * (mean / base.batch.library_size).mean(1)).log1p() if data.kind == "counts" else mean.mean(1)).double()

    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        for together in worlds:
            torch.manual_seed(seed)
            like = received[together[0]]
            for start in range(0, draws, at_once):
                n = min(at_once, draws - start)
                chosen = like[torch.randint(len(like), (cells,)).numpy()]
                population = data.batch(chosen, device=device)
                population = replace(population, dose=torch.zeros_like(population.dose), nonzeros=None)
                base = fresh_base(model, guide, example, population, n)
                untreated = levels(base, acts[0], n)
                for k in together:
                    mean = untreated if k == 0 else levels(base, acts[k], n)
                    total[k] += mean.sum(0).cpu().numpy()
                    moved[k] += (mean - untreated).sum(0).cpu().numpy()
                    square[k] += (mean - untreated).square().sum(0).cpu().numpy()
    level = total / draws
    return level[0], level[1:], np.maximum(square / draws - (moved / draws) ** 2, 0.0)[1:]
