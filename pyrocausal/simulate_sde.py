"""Simulated screens of cells in the stationary state of a linear stochastic differential equation, with cycles and a known drift.

Row vectors; ``graph[j, k]`` is the weight of the edge j -> k, and genes are nodes. In condition q::

    dx = (x M + basal + c_q) dt + dW diag(sigma),     M = graph - diag(decay)
    x ~ Normal(mu_q, S),   mu_q = -(basal + c_q) M^-1,   M' S + S M + diag(sigma^2) = 0

With ``mechanism="shift"`` a perturbation adds c_q to the drift, on its target and perhaps elsewhere. With ``"knockdown"`` it multiplies
the production of its target k, which is all that regulates it and its basal production, by ``1 - kappa``, and leaves its decay: column k of
``graph`` and ``basal_k`` shrink, so that S depends on the condition. Cells are drawn from the stationary law itself, not by steps in time.

:func:`linear_sde_screen` returns an ``AnnData`` with ``obs["perturbation"]`` ("control", a gene, or "A+B"), and

===================================  ==============  ===========================================================================
where                                shape           what
===================================  ==============  ===========================================================================
``obsm["state"]``                    [n_cells, d]    the state x (``X`` itself unless ``counts``)
``obsm["rate"]``                     [n_cells, d]    expected counts (``counts`` only; before zero inflation)
``obs["hit"]``                       [n_cells]       the perturbations that took in the cell, as a label
``obs["size"]``                      [n_cells]       relative depth of the cell, mean 1 (``counts`` only)
``uns["truth"]["drift"]``            [d, d]          M; ``graph`` [d, d] and ``decay`` [d] are its parts
``uns["truth"]["basal"]``            [d]             basal production
``uns["truth"]["sigma"]``            [d]             noise
``uns["truth"]["shift"]``            [p, d]          c of each single perturbation (0 for knock-downs)
``uns["truth"]["knockdown"]``        [p, d]          kappa of each single perturbation (0 for shifts)
``uns["truth"]["mask"]``             [p, d]          1 at the genes that the perturbation acts on
``uns["truth"]["penetrance"]``       [p]             share of cells in which it takes
``uns["truth"]["perturbations"]``    [p]             names; ``targets`` [p] are their columns
``uns["truth"]["conditions"]``       [1 + p + n]     control, single perturbations, pairs
``uns["truth"]["means"]``            [1 + p + n, d]  mu of each condition, of cells in which all of it took
``uns["truth"]["covariance"]``       [d, d]          S of control cells (shifts: of all cells)
``uns["truth"]["covariances"]``      [1 + p + n, d, d]  S of each condition (knock-downs only)
===================================  ==============  ===========================================================================

and ``uns["truth"]["edges"]``, the same as ``graph != 0``; with counts also ``unit``, ``gate``, ``offset`` (see :func:`linear_sde_screen`).

Source: the synthetic systems of Lorch et al. 2026 (arXiv 2601.15341) and, for shifts of linear diffusions, Lorch et al. 2024
(arXiv 2310.17405). Scale-free graphs: Barabasi and Albert 1999. Knock-downs, penetrance, unequal noise and counts are ours.
"""

from __future__ import annotations

from itertools import combinations
from numbers import Integral, Real
from typing import Any, Literal, NamedTuple, get_args

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from numpy.typing import NDArray
from scipy.linalg import solve_continuous_lyapunov
from scipy.optimize import brentq

from pyrocausal.dynamics.lyapunov import lyapunov
from pyrocausal.errors import DataError, nearest
from pyrocausal.simulate import Array, _names

Graph = Literal["er", "sfo"]
Effects = Literal["on_target", "off_target", "random"]
Mechanism = Literal["shift", "knockdown"]
Integers = NDArray[np.int64]
OFF_TARGET = 0.05  # share of genes hit in the published off-target and random modes
CHUNK = 2**24  # numbers in one batch of covariances


class ExactResponses(NamedTuple):
    """What the exact drift and the exact score of a linear system give, row by row; see :func:`exact_score_responses`.

    Attributes:
        score: score of each perturbation at the state asked for, [n, d].
        drift: drift of each perturbation there, [n, d].
        limit: where the noise-free system settles under each, [n, d]; the same for both.
        control_score, control_drift, control_limit: the same without perturbation, [d].
    """

    score: Array
    drift: Array
    limit: Array
    control_score: Array
    control_drift: Array
    control_limit: Array


def linear_sde_screen(
    n_genes: int = 100,
    n_perturbed: int = 50,
    graph: Graph = "er",
    degree: int = 10,
    cells_per_perturbation: int = 200,
    n_control: int | None = None,
    effects: Effects = "on_target",
    off_target: float | None = None,
    mechanism: Mechanism = "shift",
    shift: tuple[float, float] = (5.0, 15.0),
    knockdown: tuple[float, float] = (0.5, 0.95),
    penetrance: float | tuple[float, float] = 1.0,
    doubles: int = 0,
    cells_per_double: int | None = None,
    basal: tuple[float, float] = (-3.0, 3.0),
    sigma: float | tuple[float, float] = 1.0,
    counts: bool = False,
    library_size: float | None = None,
    depth_sd: float = 0.2,
    zero_inflation: float | tuple[float, float] = 0.0,
    seed: int = 0,
) -> ad.AnnData:
    """A screen of a random linear system; the defaults are the published benchmark with half of 100 genes perturbed.

    ::

        graph_jk = +-Uniform(1, 3) on the edges of a random graph (see random_graph), basal_k ~ Uniform(basal)
        decay    = the same for all genes, so that the largest real part of an eigenvalue of M is -.5
        c_q      = +-Uniform(shift) on the genes it acts on, or kappa ~ Uniform(knockdown)

    Knock-downs may remove feedback that keeps a system stable; there the decay is such that -.5 is the largest real part over all
    conditions. Graph, weights, targets and strengths depend on the seed and on ``n_genes`` only, so that 30 perturbations are the first 30
    of 50, and more cells or another likelihood leave the system alone (a knock-down's decay depends on the conditions there are).

    With ``counts`` the state is put into standard deviations of control cells, ``v = offset + (x - mu_0) / sd_0``, and
    ``y_k ~ Bernoulli(1 - gate_k) * Poisson(size * unit_k * softplus(v_k))``. ``unit`` is log-normal over genes (sd 1) such that a control
    cell is expected to have ``library_size`` counts without zero inflation; ``offset`` (-.27) is such that the published moment estimator
    ``(var + mean^2) / mean - 1`` of control counts returns ``unit``, for cells of equal size. ``size`` is log-normal, of mean 1.

    Args:
        n_perturbed: genes that are perturbed, at random; each gives its name to its perturbation.
        degree: expected number of edges out of a gene; at most ``n_genes - 1``.
        n_control: control cells; None for ``cells_per_perturbation``.
        effects: ``"on_target"``, the named gene alone; ``"off_target"``, other genes as well; ``"random"``, any genes, whatever the name.
        off_target: probability that each other gene (``"random"``: each gene) is hit too, as strongly; None for 0 with ``"on_target"``
            and .05, as published, with the other two. A share given with ``"on_target"`` is the same as ``"off_target"`` with that share.
        knockdown: range of kappa, within 0 to 1. Of ``mechanism="knockdown"`` only, as ``shift`` is of ``"shift"``.
        penetrance: share of cells in which a perturbation takes, or a range from which each perturbation draws its own. In pairs the two
            take independently.
        doubles: number of random pairs ``A+B``. Their shifts add; what is left of a production, ``1 - kappa``, is multiplied.
        sigma: noise, or a range from which each gene draws its own.
        library_size: expected counts of a control cell; None for 10 per gene.
        depth_sd: standard deviation of log size.
        zero_inflation: probability that a count is set to zero, or a range from which each gene draws its own.

    Raises:
        DataError: for an argument out of range.
    """
    given: dict[str, Any] = dict(locals())
    _check(given)
    streams = [np.random.default_rng(s) for s in np.random.SeedSequence(seed).spawn(6)]
    rng_system, rng_effects, rng_pairs, rng_strength, rng_cells, rng_counts = streams
    n_control = cells_per_perturbation if n_control is None else n_control
    cells_per_double = cells_per_perturbation if cells_per_double is None else cells_per_double

    weights = random_graph(n_genes, graph, degree, rng_system)
    production = rng_system.uniform(*basal, n_genes)
    noise = _draw(rng_system, sigma, n_genes)
    targets = rng_effects.permutation(n_genes)[:n_perturbed]
    mask, strength, sign = _effects(rng_effects, rng_strength, targets, n_genes, given)
    change = mask * sign * strength if mechanism == "shift" else np.zeros_like(mask)
    kappa = mask * strength if mechanism == "knockdown" else np.zeros_like(mask)

    genes = _names("gene", n_genes)
    names = [genes[t] for t in targets]
    pairs = list(combinations(range(n_perturbed), 2))
    chosen = [pairs[i] for i in sorted(rng_pairs.choice(len(pairs), doubles, replace=False))]
    a, b = np.array(chosen, dtype=int).reshape(-1, 2).T
    design = np.vstack([np.zeros(n_perturbed), np.eye(n_perturbed), np.eye(n_perturbed)[a] + np.eye(n_perturbed)[b]])
    conditions = ["control", *names, *("+".join(sorted((names[i], names[j]))) for i, j in chosen)]

    remaining = np.vstack([np.ones(n_genes), 1 - kappa, (1 - kappa[a]) * (1 - kappa[b])])  # of the production, [conditions, d]
    decay = _decay(weights, remaining if mechanism == "knockdown" else remaining[:1])
    drift = weights - decay * np.eye(n_genes)
    if mechanism == "shift":
        means = -np.linalg.solve(drift.T, (production + design @ change).T).T
        covariances = solve_continuous_lyapunov(drift.T, -np.diag(noise**2))[None]
    else:
        means, covariances = _knockdowns(weights, decay, remaining, production, noise)
    law = np.zeros(len(conditions), dtype=int) if mechanism == "shift" else np.arange(len(conditions))

    share = _draw(rng_effects, penetrance, n_perturbed)
    sizes = [n_control] + [cells_per_perturbation] * n_perturbed + [cells_per_double] * doubles
    code = np.repeat(np.arange(len(conditions)), sizes)
    took = (design[code] > 0) & (rng_cells.random((len(code), n_perturbed)) < share)
    hit = _condition_of(took, chosen, n_perturbed)
    root = np.linalg.cholesky(0.5 * (covariances + covariances.swapaxes(1, 2)))
    state = rng_cells.standard_normal((len(code), n_genes))
    for k in np.unique(law[hit]):
        rows = law[hit] == k
        state[rows] = state[rows] @ root[k].T
    state += means[hit]

    label = np.array(conditions, dtype=object)
    truth: dict[str, Any] = {
        "drift": drift, "graph": weights, "edges": weights != 0, "decay": np.full(n_genes, decay), "basal": production, "sigma": noise,
        "shift": change, "knockdown": kappa, "mask": mask, "penetrance": share, "perturbations": np.array(names, dtype=object),
        "targets": targets, "conditions": label, "means": means, "covariance": covariances[0],
        "settings": {"simulator": "linear_sde"} | {k: list(v) if isinstance(v, tuple) else v for k, v in given.items() if v is not None},
    }  # fmt: skip
    if mechanism == "knockdown":
        truth["covariances"] = covariances
    obs = pd.DataFrame(
        {"perturbation": pd.Categorical(label[code]), "hit": pd.Categorical(label[hit])}, index=pd.Index(_names("cell", len(code)))
    )
    x: Any = state.astype(np.float32)
    if counts:
        library_size = 10.0 * n_genes if library_size is None else library_size
        v = (state - means[0]) / np.sqrt(np.diagonal(covariances[0]))
        x, rate, obs["size"], extra = _counts(rng_counts, v, library_size, depth_sd, zero_inflation)
        truth |= extra
    out = ad.AnnData(X=x, obs=obs, var=pd.DataFrame({"perturbed": np.isin(np.arange(n_genes), targets)}, index=pd.Index(genes)))
    out.obsm["state"] = state.astype(np.float32)
    if counts:
        out.obsm["rate"] = rate.astype(np.float32)
    out.uns["X_kind"] = "counts" if counts else "normalised"
    out.uns["truth"] = truth
    return out


def random_graph(n_genes: int, graph: Graph = "er", degree: int = 10, seed: int | np.random.Generator = 0) -> Array:
    """Weights [n_genes, n_genes] of a random directed graph with cycles: ``+-Uniform(1, 3)`` on its edges, signs at random, no loops.

    - ``"er"``: each ordered pair is an edge with probability ``degree / (n_genes - 1)``, at most .99;
    - ``"sfo"``: preferential attachment. Every new node points at ``degree`` distinct older ones (all, if there are fewer), with
      probability proportional to their in-degree plus one; nodes are relabelled at random; each entry (j, k) is replaced by entry (k, j)
      with probability .1, independently, so that edges turn round, double or vanish; at last all are turned, so that hubs regulate many.

    The published systems use igraph for the second; ours follows its description.
    """
    rng = np.random.default_rng(seed)
    if graph == "er":
        edges = rng.random((n_genes, n_genes)) < min(degree / max(n_genes - 1, 1), 0.99)
    else:
        edges = np.zeros((n_genes, n_genes), dtype=bool)
        attraction = np.ones(n_genes)
        for node in range(1, n_genes):
            waiting = rng.exponential(size=node) / attraction[:node]  # the first to ring: sampling without replacement by weight
            picked = np.argsort(waiting)[:degree]
            edges[node, picked] = True
            attraction[picked] += 1
        order = rng.permutation(n_genes)
        edges = edges[np.ix_(order, order)]
        edges = np.where(rng.random(edges.shape) < 0.1, edges.T, edges).T
    np.fill_diagonal(edges, False)
    size, sign = rng.uniform(1.0, 3.0, edges.shape), rng.choice([-1.0, 1.0], edges.shape)
    return np.where(edges, sign * size, 0.0)


def exact_score_responses(truth: dict[str, Any], perturbed: Integers | list[int] | None = None, at: Array | None = None) -> ExactResponses:
    """Initial and limit responses of the true system: what a perfectly trained score, and the true drift, would give.

    At a state x the drift is ``x M_q + basal_q``, and the score ``(mu_q - x) S_q^-1``. A model trained by score matching with diffusion
    sqrt(2) has the score for its drift. Both settle at ``mu_q``.

    For shifts ``drift = -(limit - x) M`` whatever x is. For knock-downs it is not, because M_q differs; at the control mean only the
    target responds, and what is recovered from ``drift`` and ``limit - x`` is M with its columns scaled (by about .5 to 2 for 100 genes
    with basal production of 5 to 10).

    Args:
        truth: ``adata.uns["truth"]`` of :func:`linear_sde_screen`.
        perturbed: rows of ``truth["perturbations"]``; None for all.
        at: the state x, [d]; None for the origin, as published.
    """
    rows = np.arange(len(truth["perturbations"])) if perturbed is None else np.asarray(perturbed, dtype=int)
    conditions = np.concatenate([[0], 1 + rows])
    limit, x = truth["means"][conditions], np.zeros_like(truth["basal"]) if at is None else np.asarray(at, dtype=float)
    if "covariances" in truth:
        score = np.linalg.solve(truth["covariances"][conditions], (limit - x)[..., None])[..., 0]
    else:
        score = np.linalg.solve(truth["covariance"], (limit - x).T).T
    none = np.zeros((1, len(x)))
    kappa, shift = (np.vstack([none, truth[key][rows]]) for key in ("knockdown", "shift"))
    drift = (x @ truth["graph"] + truth["basal"]) * (1 - kappa) + shift - truth["decay"] * x
    return ExactResponses(score[1:], drift[1:], limit[1:], score[0], drift[0], limit[0])


def _effects(
    rng: np.random.Generator, rng_strength: np.random.Generator, targets: Integers, n_genes: int, given: dict[str, Any]
) -> tuple[Array, Array, Array]:
    """Mask, sizes and signs, [p, d]; drawn for every gene as if it were perturbed, so that fewer perturbations are the first of more."""
    share = given["off_target"]
    if share is None:
        share = 0.0 if given["effects"] == "on_target" else OFF_TARGET
    shape = (n_genes, n_genes)
    mask = rng.random(shape)[: len(targets)] < share
    if given["effects"] != "random":
        mask[np.arange(len(targets)), targets] = True
    low, high = given[given["mechanism"]]
    strength = rng_strength.uniform(low, high, shape)[: len(targets)]
    sign = rng_strength.choice([-1.0, 1.0], shape)[: len(targets)]
    return mask.astype(float), strength, sign


def _decay(weights: Array, remaining: Array) -> float:
    """What has to be taken from the diagonal for a largest real part of -.5 over the conditions, ``remaining`` [conditions, d]."""
    step = max(1, CHUNK // weights.size)
    blocks = [weights * remaining[i : i + step, None, :] for i in range(0, len(remaining), step)]
    return float(max(np.linalg.eigvals(block).real.max() for block in blocks) + 0.5)


def _knockdowns(weights: Array, decay: float, remaining: Array, basal: Array, noise: Array) -> tuple[Array, Array]:
    """Means [conditions, d] and covariances [conditions, d, d], each of its own drift."""
    d, step = len(basal), max(1, CHUNK // weights.size)
    means, covariances = np.empty_like(remaining), np.empty((len(remaining), d, d))
    for i in range(0, len(remaining), step):
        part = slice(i, i + step)
        drift = weights * remaining[part, None, :] - decay * np.eye(d)
        means[part] = -np.linalg.solve(drift.swapaxes(1, 2), (basal * remaining[part])[..., None])[..., 0]
        covariances[part] = lyapunov(torch.from_numpy(drift), torch.from_numpy(noise**2)).numpy()
    return means, covariances


def _condition_of(took: NDArray[np.bool_], pairs: list[tuple[int, int]], p: int) -> NDArray[np.int64]:
    """The condition whose law a cell follows, [n_cells]: 0 control, then the p single perturbations, then the pairs."""
    table = np.zeros((p + 1, p + 1), dtype=np.int64)
    table[0, 1:] = np.arange(1, p + 1)
    for i, (a, b) in enumerate(pairs):
        table[a + 1, b + 1] = 1 + p + i
    number = np.arange(1, p + 1)
    last = (took * number).max(1, initial=0)
    return table[took @ number - last, last]


def _counts(
    rng: np.random.Generator, v: Array, library_size: float, depth_sd: float, zero_inflation: float | tuple[float, float]
) -> tuple[sp.csr_matrix, Array, Array, dict[str, Any]]:
    """Counts, rates, sizes and the truth of the counts, from standardised states [n_cells, d]."""
    n, d = v.shape
    offset, mean = _offset()
    share = rng.lognormal(0.0, 1.0, size=(d,))
    unit = library_size / mean * share / share.sum()
    gate = _draw(rng, zero_inflation, d)
    size = rng.lognormal(-0.5 * depth_sd**2, depth_sd, size=(n,))
    rate = size[:, None] * unit * np.logaddexp(0.0, offset + v)
    y = np.where(rng.random((n, d)) < gate, 0, rng.poisson(rate))
    return sp.csr_matrix(y.astype(np.float32)), rate, size, {"unit": unit, "gate": gate, "offset": offset}


def _offset() -> tuple[float, float]:
    """The mean m of v ~ Normal(m, 1) for which ``E[s^2] = E[s]``, ``s = softplus(v)``, and E[s] there."""
    node, weight = np.polynomial.hermite_e.hermegauss(80)
    weight = weight / weight.sum()

    def moments(m: float) -> tuple[float, float]:
        s = np.logaddexp(0.0, m + node)
        return float(weight @ s), float(weight @ s**2)

    m = float(brentq(lambda m: moments(m)[1] - moments(m)[0], -3.0, 3.0, xtol=1e-12))
    return m, moments(m)[0]


def _draw(rng: np.random.Generator, value: float | tuple[float, float], n: int) -> Array:
    return rng.uniform(value[0], value[1], n) if isinstance(value, tuple | list) else np.full(n, float(value))


def _check(given: dict[str, Any]) -> None:
    whole = {"n_genes": 2, "n_perturbed": 0, "degree": 1, "cells_per_perturbation": 1, "n_control": 0, "doubles": 0, "cells_per_double": 1}
    for name, least in (whole | {"seed": 0}).items():
        value = given[name]
        if value is None and name in ("n_control", "cells_per_double"):
            continue
        if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
            raise DataError(f"{name}={value!r} was given; give a whole number of at least {least}")
    d, p = given["n_genes"], given["n_perturbed"]
    if p > d:
        raise DataError(f"n_perturbed={p} was given, but there are {d} genes to perturb; give at most {d}")
    if given["degree"] > d - 1:
        raise DataError(f"degree={given['degree']} was given, but a gene has {d - 1} others to regulate; give at most {d - 1}")
    if given["doubles"] > p * (p - 1) // 2:
        raise DataError(f"doubles={given['doubles']} was given, but {p} perturbations make {p * (p - 1) // 2} pairs; ask for fewer")
    options = {"graph": Graph, "effects": Effects, "mechanism": Mechanism}
    for name, valid in options.items():
        if given[name] not in get_args(valid):
            raise DataError(f"{name}={given[name]!r} was given{nearest(given[name], get_args(valid))}")
    inf, share = np.inf, (0.0, 1.0)
    for name, (low, high) in {"shift": (0.0, inf), "knockdown": share, "basal": (-inf, inf)}.items():
        if not _within(given[name], low, high):
            raise DataError(f"{name}={given[name]!r} was given; give a range (low, high) between {low:g} and {high:g}")
    for name, (low, high) in {"sigma": (1e-6, inf), "penetrance": share, "zero_inflation": share}.items():
        if not _within(given[name], low, high) and not _within((given[name],) * 2, low, high):
            raise DataError(f"{name}={given[name]!r} was given; give a number or a range (low, high) between {low:g} and {high:g}")
    for name, (low, high) in {"off_target": share, "library_size": (1e-6, inf), "depth_sd": (0.0, inf)}.items():
        if given[name] is not None and not _within((given[name],) * 2, low, high):
            raise DataError(f"{name}={given[name]!r} was given; give a number between {low:g} and {high:g}")


def _within(ends: Any, low: float, high: float) -> bool:
    if not isinstance(ends, tuple | list) or len(ends) != 2 or not all(isinstance(v, Real) and not isinstance(v, bool) for v in ends):
        return False
    return bool(low <= ends[0] <= ends[1] <= high and np.isfinite(ends).all())
