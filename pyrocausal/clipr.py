"""CLIPR: the gene network that explains a fitted model's answers to knock-outs (Lorch et al. 2026, arXiv 2601.15341).

``clipr(fit)`` asks a model for the initial and the limit response to every single perturbation of a measured gene and finds the linear
system that gives them (:mod:`pyrocausal.linearise`). Where the responses come from:

=====================================  ===========================================================================================
the model                              responses
=====================================  ===========================================================================================
has ``graph``, ``basal``, ``decay``    exact, for every posterior draw (``LinearLCD``)
has ``drift(x, dose)``, ``limit``      from its drift (``LCD``, whose drift is a score: symmetric in the limit unless ``curl="target"``)
any other                              limits from :func:`pyrocausal.effects`; the initial response is taken to be on target
=====================================  ===========================================================================================

In the last case ``M^ = -pinv(L) diag(c)`` is known up to the size of each column, and is given with a diagonal of -1: entry (j, k) is then
the direct effect of j on k as a coefficient of the structural equation of k.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import networkx as nx
import numpy as np
import pandas as pd
import torch
import xarray as xr
from numpy.typing import NDArray
from scipy.cluster.hierarchy import fcluster, leaves_list, linkage
from scipy.sparse.csgraph import shortest_path
from scipy.spatial.distance import squareform

from pyrocausal.errors import InterventionError
from pyrocausal.fit import Fit
from pyrocausal.linearise import Diagnostics, asymmetry, curl_correct, diagnose, linearise
from pyrocausal.modules import Modules
from pyrocausal.posterior import deterministic_tables, global_draws
from pyrocausal.query import _device, _seeded, effects

Array = NDArray[np.float64]
Source = Literal["equations", "drift", "effects"]


@dataclass(frozen=True)
class Clipr:
    """A causal matrix with its uncertainty; d genes, p perturbations.

    Attributes:
        effects: what each gene does to each, dims (draw, cause, effect).
        initial, limit: the responses that it explains, dims (draw, intervention, gene).
        diagnostics: of the first draw.
        source: where the responses came from. curl: as asked.
    """

    effects: xr.DataArray
    initial: xr.DataArray
    limit: xr.DataArray
    diagnostics: Diagnostics
    source: Source
    curl: str | None

    @property
    def asymmetry(self) -> float:
        """``|M - M'| / |M + M'|`` of the mean: near 0 there is no direction in it."""
        return asymmetry(self.effects.mean("draw").to_numpy())

    def __repr__(self) -> str:
        n_draws, d, _ = self.effects.shape
        p = self.limit.sizes["intervention"]
        note = {
            "drift": "a score field: symmetric in the limit, its direction is not identified" if self.curl is None else "turned on target",
            "effects": "initial responses taken to be on target, in units of structural coefficients",
            "equations": "the model's own equations",
        }[self.source]
        rank = f"effective rank {self.diagnostics.effective_rank:.1f} of {min(p, d)}"
        return f"Clipr({d} genes, {p} perturbations, {n_draws} draw{'s' * (n_draws > 1)}; {rank}, asymmetry {self.asymmetry:.2f}; {note})"

    def graph(self, threshold: float | None = None, top: int | None = None, probability: float = 0.9) -> nx.DiGraph:
        """Edges as ``nx.DiGraph`` with ``mean``, ``lower``, ``upper`` (90 %), and ``probability`` (of the majority's sign among the draws).

        Args:
            threshold: least size of the mean. top: the largest edges only; 5 per gene if neither is given.
            probability: least probability of the sign.
        """
        table = self.effects.to_numpy()
        mean = table.mean(0)
        size = np.abs(mean) * ~np.eye(len(mean), dtype=bool)
        sure = np.maximum((table > 0).mean(0), (table < 0).mean(0))
        size = np.where(sure >= probability, size, 0)
        if threshold is None:
            n = min(5 * len(mean) if top is None else top, int((size > 0).sum()))
            threshold = float(np.sort(size.ravel())[len(size) ** 2 - n]) if n else np.inf
        names = [str(g) for g in self.effects["cause"].to_numpy()]
        out = nx.DiGraph(threshold=threshold, source=self.source)
        out.add_nodes_from(names, kind="gene")
        low, high = np.quantile(table, [0.05, 0.95], axis=0)
        for j, k in zip(*np.nonzero((size >= threshold) & (size > 0)), strict=True):
            edge = {"mean": mean[j, k], "lower": low[j, k], "upper": high[j, k], "probability": sure[j, k]}
            out.add_edge(names[j], names[k], **{a: float(v) for a, v in edge.items()})
        return out

    def to_dataframe(self) -> pd.DataFrame:
        """One row for each ordered pair of genes: cause, effect, mean, lower, upper, probability; the largest first."""
        table = self.effects.to_numpy()
        d = table.shape[1]
        low, high = np.quantile(table, [0.05, 0.95], axis=0)
        j, k = np.nonzero(~np.eye(d, dtype=bool))
        names = self.effects["cause"].to_numpy().astype(str)
        sure = np.maximum((table > 0).mean(0), (table < 0).mean(0))
        columns = {"mean": table.mean(0), "lower": low, "upper": high, "probability": sure}
        out = pd.DataFrame({"cause": names[j], "effect": names[k], **{c: v[j, k] for c, v in columns.items()}})
        return out.sort_values("mean", key=np.abs, ascending=False, ignore_index=True)


def clipr(
    fit: Fit,
    *,
    curl: Literal["target"] | None = None,
    jacobian: bool = False,
    ridge: float = 1e-3,
    rank: int | None = None,
    draws: int = 20,
    seed: int = 0,
) -> Clipr:
    """The causal matrix of a fitted model.

    Args:
        curl: ``None``, as published; ``"target"``: a score field is turned so that perturbations act on target (models with a drift).
        jacobian: take the slope of the drift at the mean of control cells, rather than the linearisation of the responses (models with a
            drift, or with equations); it needs no perturbation, and under score matching has no direction.
        ridge, rank: as of :func:`~pyrocausal.linearise.linearise`.
        draws: of the posterior.

    Raises:
        InterventionError: if no perturbation that the fit saw is of a measured gene, or for an option that the model has no drift for.
    """
    genes = [str(g) for g in fit.coords["gene"]]
    seen = [p for p, n in zip(fit.coords["perturbation"], fit.cells_per_perturbation, strict=True) if n > 0 and p in genes]
    if not seen:
        raise InterventionError("no perturbation is named after a measured gene, so there is no matrix of genes to find; name them so")
    targets = np.array([genes.index(p) for p in seen])
    codes = [list(fit.coords["perturbation"]).index(p) for p in seen]
    source: Source = "effects"
    if hasattr(fit.model, "drift") and hasattr(fit.model, "limit"):
        source = "drift"
        V, L, slope = _from_drift(fit, codes)
    else:
        with _seeded(seed, fit):
            sampled = global_draws(fit, draws)
            tables = deterministic_tables(fit, sampled, draws)
        if {"graph", "basal", "decay", "effect"} <= tables.keys() and tables["graph"].shape[-1] == len(genes):
            source = "equations"
            V, L, slope = _from_equations(tables, codes)
        else:
            if curl is not None or jacobian:
                raise InterventionError(f"curl={curl!r} and jacobian={jacobian} ask for a drift, which {type(fit.model).__name__} has not")
            V, L = _from_effects(fit, seen, targets, draws, seed)
            slope = np.empty((0,))
    each = []
    for v, limit, m in zip(V, L, slope if len(slope) else [None] * len(V), strict=True):
        if jacobian:
            assert m is not None
            each.append(m)
        elif curl == "target" and source == "drift":
            assert m is not None
            each.append(curl_correct(v[1:] - v[0], -0.5 * (m + m.T), targets))
        elif source == "effects":
            M = linearise(v, limit, ridge, rank)
            diagonal = np.abs(np.diag(M))
            each.append(np.divide(M, diagonal, out=np.zeros_like(M), where=diagonal > 0))
        else:
            each.append(linearise(v[1:], limit[1:], ridge, rank))
    skip = 0 if source == "effects" else 1
    coords = {"draw": np.arange(len(V)), "intervention": seen, "gene": genes}
    dims = ("draw", "intervention", "gene")
    matrix = xr.DataArray(
        np.stack(each),
        dims=("draw", "cause", "effect"),
        coords={"draw": coords["draw"], "cause": genes, "effect": genes},
        attrs={"source": source, "curl": curl or "none", "ridge": ridge, "jacobian": int(jacobian)},
    )
    initial, limits = (xr.DataArray(t[:, skip:], dims=dims, coords=coords) for t in (V, L))
    return Clipr(matrix, initial, limits, diagnose(V[0, skip:], L[0, skip:]), source, curl)


def functional_modules(effects: xr.DataArray | pd.DataFrame | Array, cut: float = 0.175, min_size: int = 5) -> Modules:
    """Genes that are close in the network, for :func:`pyrocausal.modules.score_modules` and ``plot_modules``.

    Closeness is ``|M| + |M|'``, an edge is as long as one over it, the distance of two genes that of the shortest path, in units of the
    longest finite one; average linkage, cut at ``cut``. (The paper's unit of the cut is not known; this one is ours.)

    Args:
        effects: of :attr:`Clipr.effects` (draws are averaged), or a table gene x gene.
    """
    if isinstance(effects, xr.DataArray):
        table = effects.mean("draw") if "draw" in effects.dims else effects
        names, M = table["cause"].to_numpy().astype(str), table.to_numpy()
    else:
        M = np.asarray(effects, float)
        names = np.asarray(effects.index, str) if isinstance(effects, pd.DataFrame) else np.array([str(i) for i in range(len(M))])
    close = np.abs(M) + np.abs(M).T
    np.fill_diagonal(close, 0)
    distance = shortest_path(1 / (close + 1e-10), directed=False)
    distance = 0.5 * (distance + distance.T)
    distance = distance / distance.max()
    tree = linkage(squareform(distance, checks=False), "average", optimal_ordering=len(M) <= 400)
    cluster = fcluster(tree, cut, "distance")
    groups = sorted((sorted(names[cluster == c].tolist()) for c in set(cluster) if (cluster == c).sum() >= min_size), key=_by_size)
    members = {f"module {k}": group for k, group in enumerate(groups)}
    of = {gene: name for name, group in members.items() for gene in group}
    labels = pd.Series([of.get(g, "alone") for g in names], pd.Index(names, name="perturbation"), name="module")
    similarity = pd.DataFrame(1 - distance, names, names)
    order = names[leaves_list(tree)].tolist()
    return Modules(members, labels, tree, order, similarity, None, [], None, "none", pd.Series(0.0, names), "euclidean")


def _by_size(group: list[str]) -> tuple[int, list[str]]:
    return -len(group), group


# -- parts -----------------------------------------------------------------------------------------------------------------------


def _from_equations(tables: dict[str, Array], codes: list[int]) -> tuple[Array, Array, Array]:
    """Control first: V and L [draws, 1 + p, d], and the slope [draws, d, d]."""
    M = tables["graph"] - np.einsum("sd,de->sde", tables["decay"], np.eye(tables["graph"].shape[-1]))
    V = np.concatenate([tables["basal"][:, None], tables["basal"][:, None] + tables["effect"][:, codes]], 1)
    return V, -np.linalg.solve(M.swapaxes(-1, -2), V.swapaxes(-1, -2)).swapaxes(-1, -2), M


def _from_drift(fit: Fit, codes: list[int]) -> tuple[Array, Array, Array]:
    model: Any = fit.model
    device, P = _device(fit), len(fit.coords["perturbation"])
    dose = torch.zeros(1 + len(codes), P, device=device)
    dose[torch.arange(1, len(dose)), torch.as_tensor(codes)] = 1
    origin = torch.zeros(len(dose), len(fit.coords["gene"]), device=device)
    with torch.no_grad():
        V, L = model.drift(origin, dose), model.limit(dose)
    slope = torch.func.jacrev(lambda x: model.drift(x[None], dose[:1])[0])(L[0]).mT.detach()  # [effect, cause] -> [cause, effect]
    return tuple(t.double().cpu().numpy()[None] for t in (V, L, slope))


def _from_effects(fit: Fit, names: list[str], targets: Array, draws: int, seed: int) -> tuple[Array, Array]:
    """Limits from the fitted population; a unit initial response of each perturbation on its target, of the sign of its own effect."""
    L = effects(fit, names, draws=draws, seed=seed)["effect"].transpose("draw", "intervention", "gene").to_numpy().astype(float)
    V = np.zeros_like(L)
    rows = np.arange(len(names))
    own = L[:, rows, targets]
    V[:, rows, targets] = np.where(own < 0, -1.0, 1.0)
    return V, L
