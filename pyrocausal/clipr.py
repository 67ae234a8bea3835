"""From where perturbations push and where cells settle to a causal matrix: causal linearisation by perturbation responses (CLIPR).

Row vectors throughout; ``M[j, k]`` says how gene j acts on gene k. If the drift under perturbation q is ``x M + b + c_q``, its value at the
origin is ``v_q = b + c_q`` (initial response) and the noise-free system settles at ``l_q = -v_q M^-1`` (limit response), so that
``V = -L M`` for rows V, L [p, d]: an identity about the *given* drift, which M follows from if the limits span all genes.

**What it cannot do.** A score is a drift too, of a system that is reversible: there M is minus the precision matrix of the cells, symmetric
whatever the truth, and known without a perturbation. Direction then has to come from elsewhere: ``curl="target"``
(:mod:`pyrocausal.curl`) takes it from which gene each perturbation acts on. :class:`Clipr` says so where it sees it.

Source: Lorch, Zhang, Bunne, Krause, Schoelkopf and Uhler 2026 (arXiv 2601.15341).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import networkx as nx
import numpy as np
import pandas as pd
import pyro.poutine as poutine
import torch
import xarray as xr
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from pyrocausal.curl import CurlCorrection, curl_correct
from pyrocausal.errors import ContractError, DataError, InterventionError, nearest
from pyrocausal.fit import Fit
from pyrocausal.interventions import perturb
from pyrocausal.query import _device, _fits_in_memory, _seeded, effects
from pyrocausal.worlds import global_draws, latents

__all__ = ["Clipr", "CurlCorrection", "Surrogate", "asymmetry", "clipr", "curl_correct", "linearise", "regularisation", "surrogate"]

Array = NDArray[np.float64]
REVERSIBLE = 0.1  # asymmetry of the responses below which a drift is called as good as a gradient


class Surrogate(NamedTuple):
    """``basal`` b [d] and ``shift`` c [p, d] of the linear drift ``x M + b + c_q``."""

    basal: Array
    shift: Array


def linearise(initial: ArrayLike | Tensor, limit: ArrayLike | Tensor, ridge: float = 1e-3, rank: int | None = None) -> Array:
    """``M = -(L'L + ridge I)^-1 L'V``, the matrix of the linear drift that has these responses, [..., d, d] in float64.

    Args:
        initial: V, the drift at the origin under each perturbation, [..., p, d].
        limit: L, where the noise-free system settles under each, [..., p, d].
        ridge: in squared units of L; 0 or less is the pseudo-inverse. With p < d and no ridge the rows of M are projected on the span of
            the limits: what was not reached is 0, not unknown.
        rank: keep so many of the largest singular values of L.

    Raises:
        DataError: for responses of unlike shapes or that are not finite, or a rank below 1.
    """
    V, L = _responses(initial, limit)
    p, d = L.shape[-2:]
    if rank is not None and rank < 1:
        raise DataError(f"rank={rank} was given; give at least 1, or None for all")
    Lt = L.swapaxes(-1, -2)
    if rank is None and ridge > 0:
        if p < d:
            return np.asarray(-Lt @ np.linalg.solve(L @ Lt + ridge * np.eye(p), V))
        return np.asarray(-np.linalg.solve(Lt @ L + ridge * np.eye(d), Lt @ V))
    u, s, wt = np.linalg.svd(L, full_matrices=False)
    keep = s > max(p, d) * np.finfo(np.float64).eps * s[..., :1]
    keep &= np.arange(s.shape[-1]) < (s.shape[-1] if rank is None else rank)
    gain = np.where(keep, s, 0) / np.where(keep, s**2 + max(ridge, 0.0), 1)
    return np.asarray(-(wt.swapaxes(-1, -2) * gain[..., None, :]) @ (u.swapaxes(-1, -2) @ V))


def surrogate(drift: ArrayLike, limit: ArrayLike, control_limit: ArrayLike) -> Surrogate:
    """``b = -l_0 M`` and ``c_q = -(l_q - l_0) M``, from a drift matrix M [d, d], limits [p, d] and that of the control [d]."""
    M, L, l0 = (np.asarray(a, dtype=np.float64) for a in (drift, limit, control_limit))
    return Surrogate(-l0 @ M, -(L - l0) @ M)


def asymmetry(matrix: ArrayLike) -> Array:
    """``||M - M'|| / ||M + M'||`` off the diagonal, [...] for [..., d, d]: 0 symmetric, 1 one edge at most between any two; 0 for no edge."""
    M = np.asarray(matrix, dtype=np.float64)
    if M.ndim < 2 or M.shape[-1] != M.shape[-2]:
        raise DataError(f"a matrix of shape {M.shape} was given; give a square one, with the same genes as causes and effects")
    M = np.where(np.eye(M.shape[-1], dtype=bool), 0, M)
    Mt = M.swapaxes(-1, -2)
    odd, even = np.linalg.norm(M - Mt, axis=(-2, -1)), np.linalg.norm(M + Mt, axis=(-2, -1))
    return np.asarray(np.where(odd > 0, odd / np.where(even > 0, even, 1e-300), 0.0))


def regularisation(initial: ArrayLike | Tensor, limit: ArrayLike | Tensor, ridges: ArrayLike | None = None) -> xr.Dataset:
    """What a ridge does to :func:`linearise`, for one set of responses [p, d] each.

    Returns:
        Dataset with, over ``ridge`` (50 values from 1e-5 to 3, equal steps of the logarithm, if none are given): ``residual`` |V + L M|,
        ``size`` |M| (Frobenius), and ``curvature`` of log size against log residual, positive where the curve bends like an L; over
        ``component``: ``singular_value`` of L; and the numbers ``corner``, the ridge of the largest curvature, and ``effective_rank``,
        exp of the entropy of the singular values as shares of their sum (Roy and Vetterli 2007).

    The corner is a compromise without knowledge of the noise (Hansen 1992), not an optimum; without noise the curve has none.
    """
    V, L = _responses(initial, limit)
    if L.ndim != 2:
        raise DataError(f"responses of shape {L.shape} were given; give those of one draw, [p, d]")
    grid = np.geomspace(1e-5, 3, 50) if ridges is None else np.asarray(ridges, dtype=np.float64)
    if grid.ndim != 1 or len(grid) == 0 or not (grid > 0).all():
        raise DataError("ridges that are not all above 0 were given; give a list of positive numbers")
    u, s, _ = np.linalg.svd(L, full_matrices=False)
    power = ((u.T @ V) ** 2).sum(1)
    outside = max(float((V**2).sum() - power.sum()), 0.0)
    t, total = grid[:, None], s**2 + grid[:, None]
    size, size_1, size_2 = ((k * power * s**2 * total**-e).sum(1) for k, e in ((1, 2), (-2, 3), (6, 4)))
    residual = (power * (t / total) ** 2).sum(1) + outside
    residual_1, residual_2 = -grid * size_1, -size_1 - grid * size_2
    with np.errstate(divide="ignore", invalid="ignore"):
        slopes = []
        for f, f1, f2 in ((residual, residual_1, residual_2), (size, size_1, size_2)):  # of log sqrt f against log ridge
            first = grid * f1 / f
            slopes.append((first / 2, (first + grid**2 * f2 / f - first**2) / 2))
        (x1, x2), (y1, y2) = slopes
        curvature = (x1 * y2 - x2 * y1) / (x1**2 + y1**2) ** 1.5
    finite = np.where(np.isfinite(curvature), curvature, -np.inf)
    share = s[s > 0] / max(float(s.sum()), 1e-300)
    return xr.Dataset(
        {
            "residual": ("ridge", np.sqrt(residual)),
            "size": ("ridge", np.sqrt(size)),
            "curvature": ("ridge", curvature),
            "singular_value": ("component", s),
            "corner": float(grid[int(finite.argmax())]),
            "effective_rank": float(np.exp(-(share * np.log(share)).sum())),
        },
        coords={"ridge": grid},
    )


@dataclass(frozen=True, eq=False, repr=False)
class Clipr:
    """A causal matrix between genes, with its draws; S draws, C causes, d genes.

    Attributes:
        effects: [S, C, d], dims (draw, cause, effect): how a cause acts on an effect, directly, in the unit of ``attrs["scale"]``. The
            diagonal holds minus the decay (-1 where that is the unit).
        responses: what it was made from: ``initial`` and ``limit`` (draw, perturbation, gene), ``control_initial`` and ``control_limit``
            (draw, gene), as far as there are any.
        diagnostics: of the mean responses, as of :func:`regularisation`, and ``response_asymmetry`` (see ``attrs["warning"]``).
        attrs: how it was made: ``route``, ``initial``, ``curl``, ``ridge``, ``rank``, ``scale``, and ``warning`` where there is one.
    """

    effects: xr.DataArray
    responses: xr.Dataset
    diagnostics: xr.Dataset
    attrs: dict[str, Any]

    @property
    def mean(self) -> pd.DataFrame:
        """Posterior mean, causes in rows."""
        return self.effects.mean("draw").to_pandas()

    @property
    def asymmetry(self) -> float:
        """:func:`asymmetry` of the posterior mean among the genes that are causes: near 0, direction is not known."""
        causes = self.effects.indexes["cause"]
        return float(asymmetry(self.mean.loc[:, causes].to_numpy()))

    def to_dataframe(self) -> pd.DataFrame:
        """A row for each pair of different genes, the largest effect first.

        Columns: cause, effect, mean, lower, upper (90 % interval), probability (share of draws with the sign of the majority).
        """
        values = self.effects.to_numpy()
        causes, genes = self.effects.indexes["cause"], self.effects.indexes["effect"]
        positive, negative = (values > 0).mean(0), (values < 0).mean(0)
        lower, upper = np.quantile(values, [0.05, 0.95], axis=0)
        i, j = np.nonzero(causes.to_numpy()[:, None] != genes.to_numpy())
        table = pd.DataFrame(
            {
                "cause": causes[i],
                "effect": genes[j],
                "mean": values.mean(0)[i, j],
                "lower": lower[i, j],
                "upper": upper[i, j],
                "probability": np.maximum(positive, negative)[i, j],
            }
        )
        return table.reindex(table["mean"].abs().sort_values(ascending=False, kind="stable").index).reset_index(drop=True)

    def graph(self, threshold: float | None = None, top: int | None = None, probability: float = 0.0) -> nx.DiGraph:
        """Genes and the effects between them, an edge for each that is large and sure enough.

        Args:
            threshold: least size of the posterior mean. top: most edges, the largest first. Without either: twice as many as there are genes.
            probability: least posterior probability of the sign.

        Returns:
            ``nx.DiGraph`` whose edges have ``mean``, ``lower``, ``upper`` and ``probability`` as in :meth:`to_dataframe`.
        """
        if (threshold is not None and threshold < 0) or (top is not None and top < 0) or not 0 <= probability <= 1:
            raise DataError(f"threshold={threshold}, top={top}, probability={probability} were given; give sizes of 0 or more, 0 to 1 last")
        table = self.to_dataframe()
        table = table[(table["probability"] >= probability) & (table["mean"] != 0)]
        if threshold is not None:
            table = table[table["mean"].abs() >= threshold]
        genes = self.effects.indexes["effect"]
        limit = top if top is not None else None if threshold is not None else 2 * len(genes)
        out = nx.DiGraph(**{k: v for k, v in self.attrs.items() if v is not None})
        out.add_nodes_from(genes, kind="gene")
        for row in table.head(len(table) if limit is None else limit).itertuples(index=False):
            values = {"mean": row.mean, "lower": row.lower, "upper": row.upper, "probability": row.probability}
            out.add_edge(row.cause, row.effect, **{k: float(v) for k, v in values.items()})  # type: ignore[arg-type]
        return out

    def __repr__(self) -> str:
        sizes, best = self.effects.sizes, self.to_dataframe().head(3)
        made = ", ".join(f"{k}={self.attrs[k]}" for k in ("route", "initial", "curl", "ridge", "rank") if self.attrs.get(k) is not None)
        lines = [
            f"Clipr({sizes['cause']} causes, {sizes['effect']} genes, {sizes['draw']} draw{'s' * (sizes['draw'] != 1)}; {made})",
            f"  scale: {self.attrs['scale']}",
            f"  asymmetry {self.asymmetry:.2f} (0: direction unknown), effective rank of the responses "
            f"{float(self.diagnostics['effective_rank']):.1f} of {self.diagnostics.sizes['component']}",
            "  largest: " + "; ".join(f"{r.cause} -> {r.effect} {r.mean:+.3g}" for r in best.itertuples(index=False)),
        ]
        return "\n".join(lines + [f"  warning: {self.attrs['warning']}"] * bool(self.attrs.get("warning")))


def clipr(
    fit: Fit,
    genes: Sequence[str] | None = None,
    *,
    curl: Literal["target"] | None = None,
    jacobian: bool = False,
    initial: Literal["drift", "target"] | None = None,
    ridge: float | None = None,
    rank: int | None = None,
    sigma: float | ArrayLike = float(np.sqrt(2)),
    draws: int = 50,
    cells: int = 128,
    seed: int = 0,
) -> Clipr:
    """A causal matrix between genes from what a fitted model answers to knock-outs of single genes.

    ``initial="drift"`` asks a model that is a dynamical system: one with ``drift(x [..., d], dose [..., P]) -> [..., d]`` and
    ``limit(dose [K, P]) -> [K, d]`` in the unit of the data. Global sites that they sample take the values of each posterior draw.

    ``initial="target"`` asks any model, for limits only, and takes it that a perturbation pushes its own gene and no other. With mean
    responses ``delta`` [p, p] among the perturbed genes, ``M = -delta^-1 diag(c)``, known up to the scale of each column, which is set by
    a diagonal of -1: coefficients as of a structural equation for each gene, all unperturbed genes marginalised. An unperturbed gene g has
    ``delta^-1 delta_g``, the regression of its responses on those of the perturbed genes.

    Args:
        genes: perturbations to ask about; all that were trained if None (for ``"target"``, all of these that name a gene).
        curl: ``"target"`` corrects a score field by the targets of the perturbations, see :func:`~pyrocausal.curl.curl_correct`; its
            weights are chosen once, on the mean over draws. None is the published formula.
        jacobian: the derivative of the control drift where the control settles, in place of responses: it needs no coverage by perturbations.
        initial: None takes ``"drift"`` of a model that has one.
        ridge: of :func:`linearise`; None is the published 1e-3. For ``"target"``: relative to the largest squared singular value.
        rank: singular values of the responses to keep.
        sigma: noise of the system in raw units, for ``curl`` (a model of the score: sqrt(2)).
        draws: posterior draws. A model without global sites has one.
        cells: fresh cells for each draw (``"target"`` of a model without ``limit``).

    Returns:
        A :class:`Clipr`. Its warning tells a score field by an exact law: ``(V - v_0)(L - l_0)'`` is symmetric where the drift is
        a gradient, with any number of perturbations.

    Raises:
        InterventionError: if the model cannot answer, or no perturbation fits the question. ContractError: if drift or limit give
            other shapes than promised or sample sites that the guide does not.
    """
    model = fit.model
    dynamic = callable(getattr(model, "drift", None)) and callable(getattr(model, "limit", None))
    initial = ("drift" if dynamic else "target") if initial is None else initial
    if initial not in ("drift", "target") or curl not in (None, "target"):
        raise InterventionError(f"initial={initial!r} and curl={curl!r} were given; choose 'drift' or 'target', and None or 'target'")
    if initial == "drift" and not dynamic:
        raise InterventionError(f"{type(model).__name__} has no drift and limit to ask; use initial='target', which needs effects only")
    if initial == "target" and (curl or jacobian):
        raise InterventionError("curl= and jacobian= are about a drift, and initial='target' uses none; leave them out")
    if curl and jacobian:
        raise InterventionError("jacobian=True uses no responses that curl='target' could correct; choose one of the two")
    columns = _perturbations(fit, genes, need_gene=initial == "target" or curl is not None)
    if initial == "target":
        return _from_targets(fit, columns, dynamic, 1e-3 if ridge is None else ridge, rank, draws, cells, seed)
    answers = _ask(fit, columns, jacobian or curl is not None, draws, seed)
    return _from_drift(fit, columns, answers, curl, jacobian, 1e-3 if ridge is None else ridge, rank, sigma)


# -- parts -----------------------------------------------------------------------------------------------------------------------


def _responses(initial: Any, limit: Any) -> tuple[Array, Array]:
    V, L = (np.asarray(a.detach().cpu() if isinstance(a, Tensor) else a, dtype=np.float64) for a in (initial, limit))
    if V.shape != L.shape or V.ndim < 2 or 0 in V.shape:
        raise DataError(f"responses of shapes {V.shape} and {L.shape} were given; give two of [p, d], a row for each perturbation")
    if not (np.isfinite(V).all() and np.isfinite(L).all()):
        raise DataError("responses that are not finite were given; leave out perturbations under which the system does not settle")
    return V, L


def _own_genes(fit: Fit) -> NDArray[np.int64]:
    """Column of the gene of each perturbation, -1 where none is measured, [P]."""
    own = getattr(fit.model, "targets", None)
    if isinstance(own, Tensor) and own.shape == (len(fit.coords["perturbation"]),) and not own.is_floating_point():
        return own.cpu().numpy().astype(np.int64)
    return pd.Index(fit.coords["gene"]).get_indexer(fit.coords["perturbation"]).astype(np.int64)


def _perturbations(fit: Fit, genes: Sequence[str] | None, need_gene: bool) -> NDArray[np.int64]:
    names, own = fit.coords["perturbation"], _own_genes(fit)
    if genes is None:
        chosen = np.asarray(fit.cells_per_perturbation) > 0
        columns = np.flatnonzero(chosen & (own >= 0) if need_gene else chosen)
    else:
        listed = [genes] if isinstance(genes, str) else list(genes)
        if unknown := [g for g in listed if g not in names]:
            raise InterventionError(f"{unknown[0]!r} is no perturbation of the screen{nearest(unknown[0], names)}")
        columns = np.array([names.index(g) for g in dict.fromkeys(listed)], dtype=np.int64)
        if need_gene and (bad := [names[c] for c in columns if own[c] < 0]):
            raise InterventionError(f"the perturbation {bad[0]!r} names no measured gene, which its target has to be; leave it out")
    if len(columns) < 2 or (need_gene and len(set(own[columns])) < len(columns)):
        what = "with a measured gene each, all different" if need_gene else "with cells"
        raise InterventionError(f"{len(columns)} perturbations can be asked about; a causal matrix needs at least two, {what}")
    return columns


class _Answers(NamedTuple):
    """Of each draw: V, L [S, 1 + p, d] with the control first, and the Jacobian [S, d, d] (drift matrix, row acts on column)."""

    initial: Array
    limit: Array
    jacobian: Array | None


def _ask(fit: Fit, columns: NDArray[np.int64], jacobian: bool, draws: int, seed: int, limits_only: bool = False) -> _Answers:
    """Drift at the origin and limits under each posterior draw."""
    model: Any = fit.model
    d, P, p = len(fit.coords["gene"]), len(fit.coords["perturbation"]), len(columns)
    first = next((t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()), torch.zeros(()))
    dose = torch.zeros(1 + p, P, dtype=first.dtype, device=first.device)
    dose[torch.arange(1, 1 + p), torch.as_tensor(columns)] = 1.0
    origin = dose.new_zeros(1 + p, d)
    with _seeded(seed, fit):
        tables = global_draws(fit.guide, fit.reference.to(_device(fit)).rows([0]), draws, vectorised=False)
        n = draws if tables else 1
        _fits_in_memory(8 * n * d * (2 * (1 + p) + 2 * d), "the responses and matrices", "ask for fewer draws")
        V, L, J = np.zeros((n, 1 + p, d)), np.empty((n, 1 + p, d)), np.empty((n, d, d)) if jacobian else None
        for s in range(n):
            given = {k: v[s] for k, v in tables.items()}
            with poutine.trace() as tracer, poutine.condition(data=given):
                with torch.no_grad():
                    L[s] = _checked(model.limit(dose), (1 + p, d), "limit").cpu().numpy()
                    if not limits_only:
                        V[s] = _checked(model.drift(origin, dose), (1 + p, d), "drift").cpu().numpy()
            if free := set(latents(tracer.trace)) - set(given):
                raise ContractError(f"drift or limit sample {sorted(free)[0]!r}, which the guide does not give; read it from a global site")
            if J is not None:
                at = torch.as_tensor(L[s, 0], dtype=dose.dtype, device=dose.device)

                def control(x: Tensor, given: dict[str, Tensor] = given) -> Tensor:
                    with poutine.condition(data=given):
                        return model.drift(x, dose[0])  # type: ignore[no-any-return]

                J[s] = torch.func.jacrev(control)(at).detach().T.cpu().numpy()
    return _Answers(V, L, J)


def _checked(value: Tensor, shape: tuple[int, int], what: str) -> Tensor:
    if tuple(value.shape) != shape:
        raise ContractError(f"{what} gave {tuple(value.shape)} for {shape[0]} doses, but {shape} was expected; broadcast over doses")
    return value


def _from_drift(
    fit: Fit,
    columns: NDArray[np.int64],
    answers: _Answers,
    curl: str | None,
    jacobian: bool,
    ridge: float,
    rank: int | None,
    sigma: Any,
) -> Clipr:
    V, L, genes = answers.initial, answers.limit, fit.coords["gene"]
    centred_V, centred_L = (a.mean(0)[1:] - a.mean(0)[0] for a in (V, L))
    odd = float(asymmetry(centred_V @ centred_L.T))
    attrs: dict[str, Any] = {"route": "jacobian" if jacobian else "responses", "initial": "drift", "curl": curl}
    attrs |= {"ridge": None if jacobian or curl else ridge, "rank": None if jacobian or curl else rank}
    attrs["scale"] = "change of an effect's drift per unit of the cause, in the data's unit and the model's unit of time"
    if jacobian:
        assert answers.jacobian is not None
        matrix = answers.jacobian
    elif curl is None:
        matrix = linearise(V[:, 1:], L[:, 1:], ridge, rank)
    else:
        matrix, weights = _corrected(answers, _own_genes(fit)[columns], sigma)
        attrs |= weights
    if curl is None and odd < REVERSIBLE:
        attrs["warning"] = (
            f"the responses are those of a gradient field (asymmetry {odd:.2g}), as a score's are: the matrix is near minus the precision "
            "matrix of the cells, symmetric whatever the truth, so that it says nothing of direction; use curl='target'"
        )
    elif curl is None and not jacobian and len(columns) < V.shape[-1]:
        attrs["warning"] = f"{len(columns)} perturbations for {V.shape[-1]} genes: what their limits do not span counts as 0"
    dims = ("draw", "perturbation", "gene")
    responses = xr.Dataset(
        {
            "initial": (dims, V[:, 1:]),
            "limit": (dims, L[:, 1:]),
            "control_initial": (("draw", "gene"), V[:, 0]),
            "control_limit": (("draw", "gene"), L[:, 0]),
        },
        coords={"draw": np.arange(len(V)), "perturbation": [fit.coords["perturbation"][c] for c in columns], "gene": genes},
    )
    diagnostics = regularisation(V.mean(0)[1:], L.mean(0)[1:]).assign(response_asymmetry=odd)
    coords = {"draw": np.arange(len(V)), "cause": genes, "effect": genes}
    return Clipr(xr.DataArray(matrix, coords, ("draw", "cause", "effect"), name="effect"), responses, diagnostics, attrs)


def _corrected(answers: _Answers, targets: NDArray[np.int64], sigma: Any) -> tuple[Array, dict[str, Any]]:
    """Curl-corrected matrices [S, d, d]; the precision is minus the Jacobian of the control's score, which no coverage limits."""
    V, J = answers.initial, answers.jacobian
    assert J is not None
    precisions = -(J + J.swapaxes(-1, -2)) / 2

    def corrected(v: Array, precision: Array, **weights: Any) -> CurlCorrection:
        return curl_correct(v[1:], None, targets, v[0], precision=precision, sigma=sigma, **weights)

    chosen = corrected(V.mean(0), precisions.mean(0))
    one = {"l1": chosen.l1, "slack": chosen.slack}
    each = [chosen.drift] if len(V) == 1 else [corrected(v, q, **one).drift for v, q in zip(V, precisions, strict=True)]
    return np.stack(each), one | {"held_out": chosen.held_out}


def _from_targets(
    fit: Fit, columns: NDArray[np.int64], dynamic: bool, ridge: float, rank: int | None, draws: int, cells: int, seed: int
) -> Clipr:
    names, genes, own = [fit.coords["perturbation"][c] for c in columns], fit.coords["gene"], _own_genes(fit)[columns]
    if dynamic:
        limit = _ask(fit, columns, False, draws, seed, limits_only=True).limit
        baseline, delta, unit = limit[:, 0], limit[:, 1:] - limit[:, :1], "data"
    else:
        asked = effects(fit, {n: perturb(n) for n in names}, draws=draws, cells=cells, seed=seed)
        delta = asked["effect"].transpose("draw", "intervention", "gene").to_numpy().astype(np.float64)
        baseline, unit = asked["baseline"].to_numpy().astype(np.float64), str(asked.attrs["unit"])
    among = delta[..., own]
    largest = np.linalg.norm(among, 2, axis=(-2, -1))
    if not (largest > 0).all():
        raise InterventionError("no perturbed gene responds to any perturbation, so that there is nothing to linearise; train the model more")
    scaled = delta / largest[:, None, None]
    matrix = -linearise(scaled, scaled[..., own], ridge, rank)
    inverse = -linearise(np.broadcast_to(np.eye(len(own)), among.shape), scaled[..., own], ridge, rank) / largest[:, None, None]
    diagonal = np.diagonal(inverse, axis1=-2, axis2=-1)
    matrix[..., own] = -inverse / np.where(diagonal == 0, np.nan, diagonal)[:, None]
    push = 1 / np.where(diagonal == 0, np.nan, diagonal)
    wrong = np.sign(push) != np.sign(np.diagonal(among, axis1=-2, axis2=-1))
    attrs: dict[str, Any] = {"route": "responses", "initial": "target", "curl": None, "ridge": ridge, "rank": rank, "unit": unit}
    attrs["scale"] = "change of an effect per unit of the cause, all other perturbed genes held, in units of its own decay (diagonal -1)"
    if wrong.any():
        attrs["warning"] = (
            f"the push on its own gene has another sign than the gene's response for {int(wrong.any(0).sum())} of {len(own)} perturbations "
            "in some draw: there on-target action and these responses disagree, see responses['push']"
        )
    dims, draw = ("draw", "perturbation", "gene"), np.arange(len(delta))
    responses = xr.Dataset(
        {"limit": (dims, delta + baseline[:, None]), "control_limit": (("draw", "gene"), baseline), "push": (dims[:2], push)},
        coords={"draw": draw, "perturbation": names, "gene": genes},
    )
    mean = among.mean(0) / np.linalg.norm(among.mean(0), 2)
    diagnostics = regularisation(np.eye(len(own)), mean)
    causes = [genes[k] for k in own]
    return Clipr(
        xr.DataArray(matrix, {"draw": draw, "cause": causes, "effect": genes}, ("draw", "cause", "effect"), name="effect"),
        responses,
        diagnostics,
        attrs,
    )

