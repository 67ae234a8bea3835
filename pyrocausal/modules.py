"""Perturbation modules: which perturbations do the same, which do nothing that can be told, and what the groups are made of.

:func:`perturbation_modules` clusters responses (of a model with its draws, or measured), :func:`score_modules` compares the groups with
gene sets, :func:`plot_modules` shows them. Perturbations without a response are named as such and never forced into a group.
"""

from __future__ import annotations

import textwrap
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import NDArray
from scipy import stats
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.spatial.distance import squareform

from pyrocausal.embeddings import GeneOf, genes_of
from pyrocausal.errors import DataError, nearest

Array = NDArray[np.float64]
Names = Collection[str]
Metric = Literal["correlation", "cosine", "euclidean"]
DIMS = ("draw", "intervention", "gene")


@dataclass(frozen=True, eq=False)
class Modules:
    """Groups of perturbations with like responses; P perturbations, n of them not inert.

    Attributes:
        members: perturbations of each module, ``module 0`` the largest. silhouette: of each in a module, from -1 to 1 (else 0), [P].
        labels: its module, ``"alone"`` (a response like no other's) or ``"inert"`` (none that can be told), [P].
        linkage: tree of those that are not inert, in their order in ``labels``, [n - 1, 4] as of :func:`scipy.cluster.hierarchy.linkage`.
        order: the leaves of the tree from left to right, then the inert ones, [P].
        similarity: of the responses, [P, P]: correlation, cosine, or 1 - distance / largest distance, as ``metric`` says.
        together: probability that two perturbations are in one module, [P, P]; None without draws.
        inert: names. evidence: the p-value behind it, [P], None where nothing is known of errors. rule: the decision in words.
    """

    members: dict[str, list[str]]
    labels: pd.Series
    linkage: Array
    order: list[str]
    similarity: pd.DataFrame
    together: pd.DataFrame | None
    inert: list[str]
    evidence: pd.Series | None
    rule: str
    silhouette: pd.Series
    metric: str

    def __str__(self) -> str:
        rows = [(name, f"{len(m)}, silhouette {self.silhouette[m].mean():.2f}: ", m) for name, m in self.members.items()]
        rows += [(k, f"{len(m)}: ", m) for k in ("alone", "inert") if (m := self.labels.index[self.labels == k].tolist())]
        head = f"{len(self.members)} module{'s' * (len(self.members) != 1)} among {len(self.labels)} perturbations, by {self.metric}"
        lines = [line for name, n, m in rows for line in textwrap.wrap(f"{name:10}" + n + ", ".join(m), 110, subsequent_indent=" " * 10)]
        return "\n".join([head, *lines, f"inert: {self.rule}"])


def perturbation_modules(
    responses: xr.Dataset | pd.DataFrame,
    n_modules: int | None = None,
    min_size: int = 2,
    metric: Metric = "correlation",
    inert: Names | None = None,
    level: float = 0.05,
    min_silhouette: float = 0.25,
) -> Modules:
    """Hierarchical clustering (average linkage) of perturbations by their responses, those without a response set apart first.

    Inert, at ``level`` and with the perturbed genes themselves (parts of the name at ``+``) left out, is

    - of draws ``e_s`` [gene] with mean m, in posterior standard deviations of each gene: a response with zero inside its credible ball,
      ``1/S sum_s [|e_s - m| sqrt((S + 1) / (S - 1)) >= |m|] > level`` (the root is for the error of m). Where the posterior spread is the
      sampling spread, the share ``level`` of the truly inert passes, however correlated genes are; a guide that is too sure lets more.
    - with ``p_value``: Simes' p-value over the genes, ``min_i p_(i) G / i``, above ``level`` after Benjamini-Hochberg over perturbations:
      ``level`` bounds the expected share of inert ones among the rest, as far as the p-values hold in their tail.
    - without either: zeros only; or the names given as ``inert``.

    A module is a cluster of at least ``min_size``. With the mean distance a_i within the cluster of i and b_i to the nearest other one,
    ``s_i = (b_i - a_i) / max(a_i, b_i)``; for correlation and cosine b_i is at most 1, the distance of unrelated responses, so that one
    module alone can be found. ``n_modules=None`` takes the cut with the largest ``sum_i s_i`` over clusters whose mean s is at least
    ``min_silhouette``, and only those are modules (.25 is where Kaufman and Rousseeuw 1990 begin to speak of structure); a number takes,
    of the cuts with so many modules, that of the largest sum. ``together`` cuts the tree of each draw into as many clusters.
    Responses are those of :func:`pyrocausal.effects` or :func:`~pyrocausal.evaluate.measured_effects`, or a table (perturbation x gene).
    Raises DataError: repeated names, values that are not finite, too few perturbations or draws, ``n_modules`` that no cut has. Cannot
    see: that measured responses share the noise of their control cells, which makes weak ones alike; have many control cells.
    """
    if metric not in get_args(Metric):
        raise DataError(f"metric={metric!r} was given{nearest(metric, get_args(Metric))}")
    if min_size < 2 or not 0 < level < 1:
        raise DataError(f"min_size={min_size} and level={level} were given; give at least 2, and a level between 0 and 1")
    names, genes, effect, p_value = _responses(responses)
    silent, p, rule = _inert(names, genes, effect, p_value, inert, level)
    distance, similarity = _distances(effect.mean(0, dtype=np.float64), metric)
    active = np.flatnonzero(~silent)
    within = distance[np.ix_(active, active)]
    pairs = squareform(within, checks=False)
    tree = linkage(pairs, "average", optimal_ordering=len(active) <= 200) if len(active) > 1 else np.empty((0, 4))
    far = np.inf if metric == "euclidean" else 1.0
    clusters, s, cut = _choose(within, tree, min_size, n_modules, far, -1.0 if n_modules else min_silhouette)
    groups = sorted((sorted(names[active[clusters == c]].tolist()) for c in set(clusters) - {-1}), key=lambda g: (-len(g), g))
    members = {f"module {k}": group for k, group in enumerate(groups)}
    module = dict.fromkeys(names[silent], "inert") | {p: name for name, group in members.items() for p in group}
    silhouette = pd.Series(s, names[active]).reindex(names, fill_value=0.0)
    labels = pd.Series([module.get(p, "alone") for p in names], pd.Index(names, name="perturbation"), name="module")
    order = [*names[active[leaves_list(tree)] if len(tree) else active].tolist(), *names[silent].tolist()]
    alike, evidence = pd.DataFrame(similarity, names, names), None if p is None else pd.Series(p, names)
    together = pd.DataFrame(_together(effect, active, metric, cut, min_size), names, names) if len(effect) > 1 else None
    return Modules(members, labels, tree, order, alike, together, names[silent].tolist(), evidence, rule, silhouette, metric)


def score_modules(
    modules: Modules, gene_sets: Mapping[str, Names], background: Names | None = None, gene_of: GeneOf = None, level: float = 0.05
) -> pd.DataFrame:
    """Over-representation of each module in each gene set, against the perturbed genes and not the genome, best first.

    A module of n of the N background genes and a set with K of them share k: ``p = P(X >= k)``, X hypergeometric (N, K, n). The false
    discovery rate (Benjamini-Hochberg) is over the tests that could reach ``level`` with the largest possible overlap min(n, K), which
    the margins say without a look at k (Tarone 1990). Those without overlap count in it and are not shown.
    The background are the genes that could have been in a module: those of all perturbations, inert ones included, if None. Several
    perturbations of one gene (``gene_of`` as in :func:`~pyrocausal.embeddings.control_pca`) count once. The table has module, gene_set,
    overlap, module_size, set_size, background_size, odds_ratio, p_value, fdr, genes, and the number of tests in ``attrs["n_tests"]``.
    Raises DataError: a background without the genes of a module. Cannot see: sets that are alike.
    """
    pool = set(genes_of(modules.labels.index if background is None else background, gene_of if background is None else None))
    groups = {name: set(genes_of(group, gene_of)) for name, group in modules.members.items()}
    if outside := sorted(set().union(*groups.values()) - pool):
        raise DataError(f"the background lacks {len(outside)} genes of the modules, first {outside[0]!r}; give all perturbed genes")
    sets = {name: pool & set(genes) for name, genes in gene_sets.items()}
    rows = [(m, s, len(g & t), len(g), len(t), len(pool), ", ".join(sorted(g & t))) for m, g in groups.items() for s, t in sets.items()]
    columns = ["module", "gene_set", "overlap", "module_size", "set_size", "background_size", "genes"]
    table = pd.DataFrame(rows, columns=columns)
    k, n, size, total = table[columns[2:6]].to_numpy(np.int64).T
    with np.errstate(divide="ignore", invalid="ignore"):
        table["odds_ratio"] = k * (total - n - size + k) / ((n - k) * (size - k))
    table["p_value"] = stats.hypergeom.sf(k - 1, total, size, n)
    table = table[stats.hypergeom.sf(np.minimum(n, size) - 1, total, size, n) <= level]
    table = table.assign(fdr=stats.false_discovery_control(table["p_value"]) if len(table) else 1.0)
    shown = table[table["overlap"] > 0].sort_values(["p_value", "set_size", "module", "gene_set"], ignore_index=True)
    shown = shown[[*columns[:6], "odds_ratio", "p_value", "fdr", "genes"]]
    shown.attrs["n_tests"] = len(table)
    return shown


def name_modules(modules: Modules, scores: pd.DataFrame, fdr: float = 0.1) -> dict[str, str]:
    """The first gene set of each module in a table of :func:`score_modules` with ``fdr`` at most this, else the module's own name."""
    best = scores[scores["fdr"] <= fdr].drop_duplicates("module").set_index("module")["gene_set"]
    return {name: str(best.get(name, name)) for name in modules.members}


def plot_modules(modules: Modules, ax: Any = None, names: Mapping[str, str] | None = None) -> Any:
    """Similarity in the order of the tree, modules outlined (``names`` as of :func:`name_modules`), inert ones behind a gap; the Figure."""
    from matplotlib.patches import Rectangle

    from pyrocausal.plots import BLACK, GREY, _axes, _font

    order, n, active = modules.order, len(modules.order), len(modules.order) - len(modules.inert)
    gap = 0.6 if 0 < active < n else 0.0
    ax = _axes(ax, (min(2.2 + 0.2 * n, 30) + 2.4, min(2.2 + 0.2 * n, 30)))
    values, edges = modules.similarity.loc[order, order].to_numpy(), np.arange(n + 1.0)
    if gap:
        values = np.insert(np.insert(values, active, np.nan, 0), active, np.nan, 1)
        edges = np.r_[edges[: active + 1], edges[active:] + gap]
    signed, middle = modules.metric != "euclidean", np.arange(n) + 0.5 + gap * (np.arange(n) >= active)
    image = ax.pcolormesh(edges, edges, values, cmap="RdBu_r" if signed else "Blues", vmin=-1.0 * signed, vmax=1, rasterized=True)
    ax.set_yticks(middle, order, fontsize=_font(n))
    ax.set_xticks(middle, order, fontsize=_font(n), rotation=90)
    for label in (*ax.get_yticklabels()[active:], *ax.get_xticklabels()[active:]):
        label.set_color(GREY)
    notes = [("no response", (active + n) / 2 + gap, GREY)] if active < n else []
    for name, group in modules.members.items():
        low, width = min(map(order.index, group)), len(group)
        ax.add_patch(Rectangle((low, low), width, width, fill=False, ec=BLACK, lw=1.4, clip_on=False, zorder=3))
        notes.append((textwrap.fill((names or {}).get(name, name), 26), low + width / 2, BLACK))
    for text, y, colour in notes:
        ax.annotate(text, (n + gap, y), (6, 0), textcoords="offset points", va="center", fontsize=8, color=colour, annotation_clip=False)
    ax.set(xlim=(0, n + gap), ylim=(n + gap, 0), aspect="equal")
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    ax.set_title("Perturbations with like responses", fontsize=10, loc="left")
    label = f"{modules.metric} of the responses" if signed else "1 - distance / largest distance"
    bar = ax.figure.colorbar(image, ax=ax, location="bottom", shrink=0.5, aspect=40, pad=0.02)
    bar.set_label(label, fontsize=8)
    bar.ax.tick_params(labelsize=8, length=0)
    return ax.figure


# -- parts ---------------------------------------------------------------------------------------------------------------------


def _responses(given: xr.Dataset | pd.DataFrame) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any], Array | None]:
    """Names [P], genes [G], effects [S, P, G] (S = 1 without draws), and p-values [P, G] if there are any."""
    p_value = None
    if isinstance(given, pd.DataFrame) and all(kind.kind in "iufb" for kind in given.dtypes):
        names, genes, effect = given.index, given.columns, given.to_numpy(np.float64)[None]
    elif isinstance(given, xr.Dataset) and "effect" in given and {*DIMS[1:]} <= {*given["effect"].dims} <= {*DIMS}:
        table = given["effect"] if "draw" in given["effect"].dims else given["effect"].expand_dims("draw")
        names, genes, effect = given.indexes["intervention"], given.indexes["gene"], table.transpose(*DIMS).to_numpy()
        if "p_value" in given:
            p_value = np.nan_to_num(given["p_value"].transpose(*DIMS[1:]).to_numpy(), nan=1.0)
    else:
        raise DataError(f"a {type(given).__name__} without effect ([draw,] intervention, gene) was given; ask effects(), or give numbers")
    if len(names) < 2 or not names.is_unique:
        fault = f"{names[names.duplicated()][0]!r} twice" if len(names) > 1 else f"{len(names)} perturbation"
        raise DataError(f"the responses are of {fault}; give each of at least two perturbations once")
    if len(bad := names[~np.isfinite(effect).all((0, 2))]):
        raise DataError(f"{len(bad)} responses are not finite, first {bad[0]!r}; leave them out")
    return names.astype(str).to_numpy(object), genes.astype(str).to_numpy(object), effect, p_value


def _inert(names: Any, genes: Any, effect: Any, p_value: Any, inert: Any, level: float) -> tuple[Any, Array | None, str]:
    """Which perturbations have no response, [P], by what p-values [P], and the rule in words."""
    zero = (effect == 0).all((0, 2))
    if inert is not None:
        listed = [inert] if isinstance(inert, str) else list(inert)
        if unknown := [k for k in listed if k not in names]:
            raise DataError(f"inert= names {unknown[0]!r}, which is no perturbation of the responses{nearest(unknown[0], names)}")
        return zero | np.isin(names, listed), None, "by name, or all zero"
    others = [~np.isin(genes, name.split("+")) for name in names]
    if 1 < len(effect) < 1 / level:
        raise DataError(f"{len(effect)} draws were given, too few for level={level}; ask for {int(np.ceil(1 / level))} or more")
    if len(effect) > 1:
        p, rule = np.ones(len(names)), f"zero lies inside the {1 - level:.0%} credible ball of the response"
        for k, keep in enumerate(others):
            draws = effect[:, k, keep].astype(np.float64)
            mean, sd = draws.mean(0), draws.std(0)
            sd = np.maximum(sd, 1e-6 * np.abs(mean).max(initial=0)) + 1e-300
            size = np.sqrt((len(draws) + 1) / (len(draws) - 1)) * np.linalg.norm((draws - mean) / sd, axis=1)
            p[k] = np.mean(size >= np.linalg.norm(mean / sd))
    elif p_value is not None:
        simes = [stats.false_discovery_control(row[keep]).min(initial=1) for row, keep in zip(p_value, others, strict=True)]
        p, rule = stats.false_discovery_control(simes), f"no gene but the perturbed one changes (Simes, {level:.0%} false discoveries)"
    else:
        return zero, None, "all zero (without draws or p-values nothing is known of errors; name others with inert=)"
    return zero | (p > level), p, rule


def _distances(profile: Array, metric: str) -> tuple[Array, Array]:
    """Distances and similarities of the rows, [P, P] each; a row without direction is like no other."""
    if metric == "euclidean":
        centred = profile - profile.mean(0)
        square = (centred**2).sum(1)
        distance = np.sqrt(np.maximum(square[:, None] + square - 2 * centred @ centred.T, 0)) * (1 - np.eye(len(profile)))
        return distance, 1 - distance / (distance.max() or 1)
    rows = profile - profile.mean(1, keepdims=True) if metric == "correlation" else profile
    size = np.linalg.norm(rows, axis=1, keepdims=True)
    rows = np.where(size > 1e-12 * np.abs(profile).max(1, keepdims=True), rows, 0) / np.maximum(size, 1e-300)
    similarity = np.clip(rows @ rows.T, -1, 1) * (1 - np.eye(len(rows))) + np.eye(len(rows))
    return 1 - similarity, similarity


def _choose(distance: Array, tree: Array, min_size: int, n_modules: int | None, far: float, floor: float) -> tuple[Any, Array, int]:
    """Of all cuts of the tree, the best: cluster of each leaf (-1: in no module), its silhouette, and the number of clusters."""
    n = len(distance)
    labels, size, total, slot, counts = np.arange(n), np.ones(n, int), distance.copy(), np.arange(2 * n), {0}
    best, chosen = -np.inf, (np.full(n, -1), np.zeros(n), n)
    for cut in range(n, 0, -1):
        if cut < n:  # two clusters become one; ``total`` [leaf, slot] sums the distances to each
            a, b = slot[tree[n - cut - 1, :2].astype(int)]
            total[:, a] += total[:, b]
            size[a], size[b], slot[2 * n - cut - 1] = size[a] + size[b], 0, a
            labels[labels == b] = a
        s = _silhouette(total, labels, size, min_size, far)
        kept = (size >= min_size) & (np.bincount(labels, s, n) >= floor * size)
        counts.add(int(kept.sum()))
        if n_modules in (None, int(kept.sum())) and (s * kept[labels]).sum() > best:
            chosen = np.where(kept[labels], labels, -1), s * kept[labels], cut
            best = chosen[1].sum()
    if n_modules is not None and n_modules not in counts:
        raise DataError(f"n_modules={n_modules} was given, but the tree can be cut into {sorted(counts)} modules only; give one of these")
    return chosen


def _silhouette(total: Array, labels: NDArray[np.int64], size: NDArray[np.int64], min_size: int, far: float) -> Array:
    """Silhouettes [n] from sums of distances to the clusters [n, slot]; 0 in clusters that are too small and where nothing is near."""
    rows, live, own = np.arange(len(labels)), np.flatnonzero(size), size[labels]
    mean = total[:, live] / size[live]
    mean[rows, np.searchsorted(live, labels)] = np.inf
    a, b = total[rows, labels] / np.maximum(own - 1, 1), np.minimum(mean.min(1), far)
    there = (own >= min_size) & np.isfinite(b) & (np.maximum(a, b) > 0)
    return np.where(there, b - a, 0) / np.where(there, np.maximum(a, b), 1)


def _together(effect: NDArray[Any], active: NDArray[np.int64], metric: str, cut: int, min_size: int) -> Array:
    """Share of draws in which two perturbations share a module, the tree of every draw cut into as many clusters, [P, P]."""
    together, n = np.zeros(effect.shape[1:2] * 2), len(active)
    for draw in effect[:, active] if n > 1 else ():
        labels, pairs = np.arange(n), squareform(_distances(draw.astype(np.float64), metric)[0], checks=False)
        for step, (a, b) in enumerate(linkage(pairs, "average")[: n - cut, :2]):
            labels[(labels == a) | (labels == b)] = n + step
        big = np.bincount(labels)[labels] >= min_size
        together[np.ix_(active, active)] += ((labels[:, None] == labels) & big) / len(effect)
    np.fill_diagonal(together, 1)
    return together
