"""The evidence lower bound, without host synchronisation, and what a training step needs around it.

:class:`ELBO` has the interface of ``pyro.infer.ELBO`` and the gradients of ``TraceMeanField_ELBO`` (``analytic_kl=True``) or
``Trace_ELBO`` (``analytic_kl=False``); it never calls ``.item()``. Any ``pyro.infer`` ELBO can stand in its place in ``fit``.
"""

from __future__ import annotations

from typing import Any

import pyro.poutine as poutine
import torch
from pyro.distributions.util import scale_and_mask
from pyro.infer.elbo import ELBO as PyroELBO
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor
from torch.distributions import Independent as TorchIndependent
from torch.distributions import kl_divergence

from pyrocausal.errors import ContractError


class ELBO(PyroELBO):
    """The negative evidence lower bound of a model/guide pair, one term per site.

    Args:
        num_particles: independent draws from the guide, averaged.
        analytic_kl: use the closed-form KL divergence at sites where one is registered; otherwise log p - log q at the sample.
        rows: which rows of a table over perturbations pay their KL in a minibatch. ``"all"``: every row, once (an exact global term,
            the default). ``"batch"``: the objective of the SAMS-VAE reference, where row t pays
            ``(1/N_t) sum_{n in batch} 1[dose_nt != 0]`` scaled
            to the population, so that rows absent from the batch get no gradient; its sum over an epoch is the same.

    The terms of the last call are in ``terms`` (site name -> detached scalar, in nats for the whole population).
    """

    def __init__(self, num_particles: int = 1, analytic_kl: bool = True, rows: str = "all") -> None:
        super().__init__(num_particles=num_particles)
        if rows not in ("all", "batch"):
            raise ValueError(f"rows={rows!r} was given; it is 'all' or 'batch'")
        self.analytic_kl = analytic_kl
        self.rows = rows
        self.cells_per_perturbation: Tensor | None = None  # [P], set by fit: N_t of the training cells, for rows="batch"
        self.terms: dict[str, Tensor] = {}

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        terms: dict[str, Tensor] = {}
        for _ in range(self.num_particles):
            model_trace, guide_trace = self._get_trace(model, guide, args, kwargs)
            for name, term in self._terms(model_trace, guide_trace, args).items():
                terms[name] = terms[name] + term if name in terms else term
        terms = {name: term / self.num_particles for name, term in terms.items()}
        self.terms = {name: term.detach() for name, term in terms.items()}
        return -torch.stack([t.reshape(()) for t in terms.values()]).sum()

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
        return poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args, **kwargs), guide_trace

    def loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        with torch.no_grad():
            return float(self.differentiable_loss(model, guide, *args, **kwargs))

    def loss_and_grads(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        loss.backward()
        return float(loss.detach())

    def _terms(self, model_trace: Any, guide_trace: Any, args: tuple[Any, ...]) -> dict[str, Tensor]:
        terms: dict[str, Tensor] = {}
        for name, site in _sample_sites(model_trace):
            if site["is_observed"]:
                log_prob = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
                terms[name] = scale_and_mask(log_prob, site["scale"], site["mask"]).sum()
                continue
            if name not in guide_trace.nodes:
                raise ContractError(f"the model samples {name!r}, but the guide does not; add pyro.sample({name!r}, ...) to the guide")
            terms[name] = self._latent(name, site, guide_trace.nodes[name], args)
        for name, site in _sample_sites(guide_trace):
            if name not in terms:  # an auxiliary latent of the guide
                terms[name] = -scale_and_mask(site["fn"].log_prob(site["value"]), site["scale"], site["mask"]).sum()
        return terms

    def _latent(self, name: str, p: dict[str, Any], q: dict[str, Any], args: tuple[Any, ...]) -> Tensor:
        if not q["fn"].has_rsample and _trainable(q["fn"]):
            raise ContractError(
                f"the guide samples {name!r} from {type(_by_entry(q['fn'])).__name__}, which has no reparametrised gradient; "
                "use StraightThroughBernoulli, or pass objective=pyro.infer.Trace_ELBO() to fit"
            )
        if self.rows == "batch" and _is_row_table(p, args) and _is_row_table(q, args):
            return self._by_rows(p, q, args[0])
        if self.analytic_kl:
            try:
                term = -kl_divergence(q["fn"], p["fn"])
            except NotImplementedError:
                term = None
            if term is not None:
                return scale_and_mask(term, q["scale"], q["mask"]).sum()
        log_p = p["fn"].log_prob(p["value"])
        log_q = q["fn"].log_prob(q["value"])
        return scale_and_mask(log_p, p["scale"], p["mask"]).sum() - scale_and_mask(log_q, q["scale"], q["mask"]).sum()

    def _by_rows(self, p: dict[str, Any], q: dict[str, Any], batch: Any) -> Tensor:
        if self.cells_per_perturbation is None:
            raise ContractError("rows='batch' needs the training cells of each perturbation; set elbo.cells_per_perturbation")
        present = (batch.dose != 0).to(batch.dose.dtype).sum(0)  # [P]
        weight = present / self.cells_per_perturbation.clamp_min(1) * (batch.n_total / len(batch))
        total = weight.new_zeros(())
        for sign, site in ((1, p), (-1, q)):
            log_prob = scale_and_mask(_by_entry(site["fn"]).log_prob(site["value"]), site["scale"])  # [..., P, D]
            total = total + sign * (weight[:, None] * log_prob).sum()
        return total


def _sample_sites(trace: Any) -> list[tuple[str, dict[str, Any]]]:
    return [(n, s) for n, s in trace.nodes.items() if s["type"] == "sample" and type(s["fn"]) is not _Subsample and not _deterministic(s)]


def _deterministic(site: dict[str, Any]) -> bool:
    return bool(site["infer"].get("_deterministic", False))


def _by_entry(fn: Any) -> Any:
    """The distribution of single entries under ``to_event``."""
    while isinstance(fn, TorchIndependent):
        fn = fn.base_dist
    return fn


def _trainable(fn: Any) -> bool:
    """Whether a gradient would flow into the parameters of a law."""
    if isinstance(fn, Tensor):
        return fn.requires_grad
    inner = [v for k, v in vars(fn).items() if isinstance(v, Tensor) or k == "base_dist"] if hasattr(fn, "__dict__") else []
    return any(_trainable(v) for v in inner)


def _is_row_table(site: dict[str, Any], args: tuple[Any, ...]) -> bool:
    """Whether a site is a table of independent entries whose rows are the perturbations."""
    dose = getattr(args[0], "dose", None) if args else None
    shape = site["fn"].event_shape
    if site["fn"].batch_shape:  # a table of every cell
        return False
    return dose is not None and len(shape) >= 2 and shape[-2] == dose.shape[-1] and _by_entry(site["fn"]).event_dim == 0


class KLWeight(Messenger):
    """Scales the latent sites (not the observed ones) of everything that runs inside: KL warm-up, for any ELBO."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = weight

    def _pyro_sample(self, msg: Any) -> None:
        if not msg["is_observed"] and not _deterministic(msg):
            msg["scale"] = msg["scale"] * self.weight
