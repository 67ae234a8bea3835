"""Simulated screens of a gene regulatory network in time, with cycles, three kinds of mechanism, and every fault of a real screen to order.

Row vectors, genes are nodes, ``graph[j, k]`` is the edge j -> k. In a cell that the perturbations of its label have hit::

    dx_k = (f_k(x) - decay_k x_k + shift_k) dt + s_k(x) dW_k           except where x_k is held (do)

    linear  f_k = basal_k + sum_j graph_jk x_j                                        s = sigma
    tanh    f_k = basal_k + 3 tanh(sum_j graph_jk x_j)                                s = sigma
    hill    f_k = basal_k prod_j (1 + (exp(graph_jk) - 1) h(x_j / K_j)),  x >= 0      s = sigma sqrt(x)
            h(v) = v^2 / (1 + v^2)

- ``intervention="do"``: a hit target is held ``strength`` standard deviations (of control cells) below its control mean (at least at 5 % of
  it with ``"hill"``), and its own regulation is cut; ``"shift"``: ``shift_k = -strength sd_k decay_k``. ``direction="up"``: above, and +.
- of a pair both act. ``off_target``: the probability that a perturbation acts on a second gene as well, in the same way.
- ``penetrance``: the share of its cells that a perturbation hits, independently in pairs.
- ``systematic``: a shift that all cells with a perturbation in their label share, of as many standard deviations, on a third of the genes.
- ``null=True``: labels mean nothing.

The cells are read either as the state (plus its batch's offset), or as counts, negative binomial or Poisson, with library size::

    y_k ~ Counts(size * unit_k * g_k(x) * exp(batch_k)),   g = softplus(offset + (x - mu_0) / sd_0), for "hill" x / mu_0

Cells without a single count are left out, as they would be. Each knob is off by default. What is returned, an ``AnnData`` with
``obs["perturbation"]`` (``"control"``, a gene, ``"A+B"``) and

=====================================  ==============  ==========================================================================
where                                  shape           what
=====================================  ==============  ==========================================================================
``obsm["state"]``, ``obsm["hit"]``     [n, d], [n, p]  the state; which perturbations took in the cell
``obs["batch"]``, ``obs["size"]``      [n]             batch; relative depth (``counts``)
``uns["truth"]["graph"]``              [d, d]          see above; ``edges`` is ``graph != 0``; also ``basal``, ``decay``, ``sigma``, [d]
``uns["truth"]["perturbations"]``      [p]             names; ``targets`` [p] and ``mask`` [p, d] are what they act on
``uns["truth"]["conditions"]``         [q]             control, single perturbations, pairs
``uns["truth"]["states"]``             [q, d]          mean state of each, of cells in which all of it took, without batch
``uns["truth"]["expression"]``         [q, d]          the same on the scale of effects (counts: log1p of 1e4 times the mean share)
``uns["truth"]["interaction"]``        [n_pairs, d]    ``e_AB - e_A - e_B`` on that scale, e the effect against control
``uns["truth"]["nonadditive"]``        [n_pairs]       ``|interaction|^2 / |e_AB|^2``; ``stratum``: above .2
``uns["truth"]["batch"]``              [n_batches, d]  offsets
=====================================  ==============  ==========================================================================

Means are exact for ``"linear"`` (state), else averages over time of cells that see the same noise under every treatment, so that their
differences are exact to about ``uns["truth"]["error"]`` (an estimate of the largest standard error of a mean effect). Shares are of the
expected counts of a cell; ``dispersion`` moves the mean of the measured ones, s, by about the factor ``1 + (sum s^2 - s) / theta``.

Integration: Euler and Maruyama with step ``DT``, from the noise-free state of the treatment, over ``BURN_IN`` units of time. Source:
stationary diffusions, Lorch et al. 2024 (arXiv 2310.17405); multiplicative Hill regulation and chemical Langevin noise as in SERGIO
(Dibaeinia and Sinha 2020) and Gillespie 2000.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from numbers import Integral, Real
from typing import Any, Literal, get_args

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

from pyrocausal.errors import DataError, nearest
from pyrocausal.simulate import Array, _names

Mechanism = Literal["linear", "tanh", "hill"]
Intervention = Literal["do", "shift"]
DT, BURN_IN, AVERAGED = 0.05, 10.0, 10.0  # step, time before a cell is read, time over which means are taken
PATHS = 200  # cells behind each mean
STRATUM = 0.2  # share of a pair's energy above which it is not additive
AMPLITUDE = 3.0  # most that regulation adds with "tanh"
OFFSET = -0.27  # of the read-out, as in simulate_sde
LEAST = 0.05  # of its control mean, the level of a held gene with "hill"


@dataclass(frozen=True)
class System:
    """The network: what moves a state.

    Attributes:
        graph: [d, d]; basal, decay, sigma: [d]; half: K, [d] (``"hill"``).
    """

    mechanism: Mechanism
    graph: Array
    basal: Array
    decay: Array
    sigma: Array
    half: Array

    def production(self, x: Array) -> Array:
        """f(x), [..., d]."""
        if self.mechanism == "linear":
            return self.basal + x @ self.graph
        if self.mechanism == "tanh":
            return self.basal + AMPLITUDE * np.tanh(x @ self.graph)
        source, target = np.nonzero(self.graph)
        squared = (x / self.half) ** 2
        h = squared / (1 + squared)
        folds = np.log1p(np.expm1(self.graph[source, target]) * h[..., source])  # one for each edge
        return self.basal * np.exp(folds @ (target[:, None] == np.arange(len(self.basal))))

    def step(self, x: Array, shift: Array, held: Array, noise: Array | float) -> Array:
        """The state after DT, with standard normal ``noise`` (0: without); ``held`` is NaN where a gene is free."""
        size = self.sigma * np.sqrt(x if self.mechanism == "hill" else 1.0)
        out = x + DT * (self.production(x) - self.decay * x + shift) + np.sqrt(DT) * size * noise
        out = np.abs(out) if self.mechanism == "hill" else out
        return np.where(np.isnan(held), out, held)


def regulatory_screen(
    n_genes: int = 30,
    n_perturbed: int = 20,
    degree: float = 2.0,
    weight: tuple[float, float] = (0.5, 1.5),
    cycles: bool = True,
    mechanism: Mechanism = "linear",
    intervention: Intervention = "do",
    strength: float = 3.0,
    direction: Literal["down", "up"] = "down",
    cells_per_perturbation: int = 100,
    n_control: int = 500,
    doubles: int = 0,
    cells_per_double: int | None = None,
    penetrance: float | tuple[float, float] = 1.0,
    off_target: float = 0.0,
    systematic: float = 0.0,
    n_batches: int = 1,
    batch_sd: float = 0.0,
    counts: bool = False,
    library_size: float | None = None,
    depth_sd: float = 0.0,
    dispersion: float | None = None,
    null: bool = False,
    seed: int = 0,
) -> ad.AnnData:
    """A screen of a random network; see the module's docstring.

    ::

        graph_jk = +-Uniform(weight) with probability degree / (d - 1), j != k (without cycles: j before k in a random order)
        linear, tanh   decay = max(1, c + .5), c the largest eigenvalue of (graph + graph') / 2, which keeps a linear system stable
                       whatever is held (without cycles: 1); sigma_k ~ Uniform(.7, 1.4), basal_k ~ Uniform(-1, 1)
        hill           decay = 1, sigma_k ~ Uniform(.2, .4), basal_k such that all genes are at Uniform(1, 4) without noise, K = that level

    Network, targets and pairs depend on the seed and on their own sizes and mechanism only; a knob turned on leaves them alone.

    Args:
        n_perturbed: genes that are perturbed, at random; each gives its name to its perturbation.
        degree: expected number of regulators of a gene.
        doubles: number of random pairs, of ``cells_per_double`` cells each (None: ``cells_per_perturbation``).
        penetrance: share of cells in which a perturbation takes, or a range from which each perturbation draws its own.
        batch_sd: standard deviation of a batch's offset of a gene, in standard deviations of control cells (counts: of the log rate).
        library_size: expected counts of a control cell; None for 20 per gene. ``depth_sd``: standard deviation of log size.
        dispersion: theta of negative binomial counts; None for Poisson.

    Raises:
        DataError: for an argument out of range.
    """
    given: dict[str, Any] = dict(locals())
    _check(given)
    rng_system, rng_target, rng_pair, rng_cell, rng_read, rng_truth = (
        np.random.default_rng(s) for s in np.random.SeedSequence(seed).spawn(6)
    )
    system = random_system(n_genes, degree, cycles, mechanism, rng_system, weight)
    targets = rng_target.permutation(n_genes)[:n_perturbed]
    second = (targets + rng_target.integers(1, n_genes, n_perturbed)) % n_genes
    stray = rng_target.random(n_perturbed) < off_target
    shared = np.where(rng_target.random(n_genes) < 1 / 3, rng_target.choice([-1.0, 1.0], n_genes), 0.0)
    mask = np.zeros((n_perturbed, n_genes))
    mask[np.arange(n_perturbed), targets] = 1
    mask[np.flatnonzero(stray), second[stray]] = 1

    design, pairs = _design(n_perturbed, doubles, rng_pair)
    genes = _names("gene", n_genes)
    names = [genes[t] for t in targets]
    conditions = _conditions(names, pairs)

    no_shift, free = np.zeros((1, 1, n_genes)), np.full((1, 1, n_genes), np.nan)
    noise_seed = int(rng_truth.integers(2**31))
    control = _moments(system, no_shift, free, noise_seed)
    mu, sd = control.mean[0], control.sd[0]
    sign = -1.0 if direction == "down" else 1.0
    level = mu + sign * strength * sd
    level = np.maximum(level, LEAST * mu) if mechanism == "hill" else level

    def acts(hit: Array, labelled: Array) -> tuple[Array, Array]:
        """Shift and held levels [..., d] of treatments that took, [..., p], in cells that are labelled as perturbed, [...]."""
        touched = (hit @ mask) * (0.0 if null else 1.0)
        shift = systematic * shared * sd * system.decay * labelled[..., None] * (0.0 if null else 1.0)
        if intervention == "shift":
            return shift + sign * strength * sd * system.decay * touched, np.full_like(touched, np.nan)
        return shift, np.where(touched > 0, level, np.nan)

    shift, held = acts(design, (design.sum(1) > 0).astype(float))
    read = _read_out(mechanism, mu, sd)
    unit = rng_read.lognormal(0.0, 1.0, n_genes) if counts else np.ones(n_genes)

    def read_shares(x: Array) -> Array:
        """Relative expression of states and its shares of the library, [..., 2 d]."""
        relative = read(x)
        rate = unit * relative
        return np.concatenate([relative, rate / rate.sum(-1, keepdims=True)], -1)

    truth_of = _moments(system, shift[:, None], held[:, None], noise_seed, read_shares if counts else None)
    states = truth_of.mean if mechanism != "linear" else _linear_means(system, shift, held)
    if counts:
        total = 20.0 * n_genes if library_size is None else library_size
        unit *= total / (unit @ truth_of.read[0, :n_genes])
        expression = np.log1p(1e4 * truth_of.read[:, n_genes:])
    else:
        expression = states

    share = rng_cell.uniform(*penetrance, n_perturbed) if isinstance(penetrance, tuple | list) else np.full(n_perturbed, float(penetrance))
    per_pair = cells_per_perturbation if cells_per_double is None else cells_per_double
    code = np.repeat(np.arange(len(conditions)), [n_control] + [cells_per_perturbation] * n_perturbed + [per_pair] * doubles)
    hit = (design[code] > 0) & (rng_cell.random((len(code), n_perturbed)) < share)
    cell_shift, cell_held = acts(hit.astype(float), (design[code].sum(1) > 0).astype(float))
    x = _relaxed(system, cell_shift, cell_held)
    for _ in range(round(BURN_IN / DT)):
        x = system.step(x, cell_shift, cell_held, rng_cell.standard_normal(x.shape))

    batch = rng_read.integers(n_batches, size=len(code))
    offsets = batch_sd * rng_read.standard_normal((n_batches, n_genes)) * (1.0 if counts else sd)
    size = rng_read.lognormal(-0.5 * depth_sd**2, depth_sd, len(code))
    obs = pd.DataFrame(
        {"perturbation": pd.Categorical(np.array(conditions, dtype=object)[code]), "batch": pd.Categorical([f"batch{b}" for b in batch])},
        index=pd.Index(_names("cell", len(code))),
    )
    if counts:
        rate = size[:, None] * unit * read(x) * np.exp(offsets[batch])
        rate = rate if dispersion is None else rate * rng_read.gamma(dispersion, 1 / dispersion, rate.shape)
        y: Any = sp.csr_matrix(rng_read.poisson(rate).astype(np.float32))
        obs["size"] = size
    else:
        y = (x + offsets[batch]).astype(np.float32)
    out = ad.AnnData(X=y, obs=obs, var=pd.DataFrame({"perturbed": np.isin(np.arange(n_genes), targets)}, index=pd.Index(genes)))
    out.obsm["state"], out.obsm["hit"] = x.astype(np.float32), hit
    if counts:
        out = out[y.getnnz(1) > 0].copy()
    out.uns["X_kind"] = "counts" if counts else "normalised"
    out.uns["truth"] = {
        "graph": system.graph, "edges": system.graph != 0, "basal": system.basal, "decay": system.decay, "sigma": system.sigma,
        "perturbations": np.array(names, dtype=object), "targets": targets, "mask": mask, "penetrance": share, "batch": offsets,
        "conditions": np.array(conditions, dtype=object), "states": states, "expression": expression, "unit": unit,
        "error": 0.0 if mechanism == "linear" and not counts else truth_of.error,
        "settings": {"simulator": "regulatory"} | {k: list(v) if isinstance(v, tuple) else v for k, v in given.items() if v is not None},
    } | interactions_of(expression, pairs)  # fmt: skip
    return out


def random_system(
    n_genes: int, degree: float, cycles: bool, mechanism: Mechanism, rng: np.random.Generator, weight: tuple[float, float] = (0.5, 1.5)
) -> System:
    """A random network; see :func:`regulatory_screen`."""
    edges = rng.random((n_genes, n_genes)) < min(degree / max(n_genes - 1, 1), 1.0)
    if not cycles:
        order = rng.permutation(n_genes)
        before = order[:, None] < order
        edges = before & (rng.random((n_genes, n_genes)) < min(2 * degree / max(n_genes - 1, 1), 1.0))
    np.fill_diagonal(edges, False)
    graph = np.where(edges, rng.uniform(*weight, edges.shape) * rng.choice([-1.0, 1.0], edges.shape), 0.0)
    one = np.ones(n_genes)
    if mechanism == "hill":
        level = rng.uniform(1.0, 4.0, n_genes)
        folds = np.log1p(0.5 * np.expm1(graph)).sum(0)  # h = 1/2 at the level itself
        return System(mechanism, graph, level * np.exp(-folds), one, rng.uniform(0.2, 0.4, n_genes), level)
    # no held gene can make the rest unstable: the largest eigenvalue of the symmetric part bounds those of all parts of the network
    decay = max(1.0, float(np.linalg.eigvalsh((graph + graph.T) / 2)[-1]) + 0.5) if cycles else 1.0
    return System(mechanism, graph, rng.uniform(-1.0, 1.0, n_genes), decay * one, rng.uniform(0.7, 1.4, n_genes), one)


def interactions_of(expression: Array, pairs: list[tuple[int, int]]) -> dict[str, Array]:
    """What is not additive in the true means [q, d] of control, single perturbations and ``pairs`` (numbers of singles), in this order."""
    effect = expression[1:] - expression[0]
    singles = len(effect) - len(pairs)
    a, b = np.array(pairs, dtype=int).reshape(-1, 2).T
    interaction = effect[singles:] - effect[a] - effect[b]
    energy = (effect[singles:] ** 2).sum(1)
    share = (interaction**2).sum(1) / np.where(energy > 0, energy, 1.0)
    return {"interaction": interaction, "nonadditive": share, "stratum": share > STRATUM, "pairs": np.column_stack([a, b])}


# -- parts ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Moments:
    mean: Array  # [q, d]
    sd: Array
    read: Array  # mean of the read-out
    error: float  # standard error of the worst mean effect


def _moments(system: System, shift: Array, held: Array, seed: int, read: Any = None) -> _Moments:
    """Averages over PATHS cells and over time of every treatment, [q, 1, d] each, under the same noise."""
    rng = np.random.default_rng(seed)
    x = np.repeat(_relaxed(system, shift[:, 0], held[:, 0])[:, None], PATHS, axis=1)
    total, square, out = np.zeros_like(x), np.zeros_like(x), np.zeros_like(x if read is None else read(x))
    burn, n = round(BURN_IN / DT), round(AVERAGED / DT)
    for t in range(burn + n):
        x = system.step(x, shift, held, rng.standard_normal(x.shape[1:]))
        if t >= burn:
            total += x
            square += x * x
            out += x if read is None else read(x)
    by_path = out / n
    difference = by_path - by_path[:1]
    mean = total.mean(1) / n
    error = float((difference.std(1) / np.sqrt(PATHS)).max())
    return _Moments(mean, np.sqrt(np.maximum(square.mean(1) / n - mean**2, 1e-12)), by_path.mean(1), error)


def _relaxed(system: System, shift: Array, held: Array) -> Array:
    """The noise-free state of each treatment, [n, d]."""
    kinds, which = np.unique(np.hstack([shift, np.nan_to_num(held, nan=-1e9)]), axis=0, return_inverse=True)
    d = shift.shape[1]
    s, h = kinds[:, :d], np.where(kinds[:, d:] == -1e9, np.nan, kinds[:, d:])
    x = np.where(np.isnan(h), system.half if system.mechanism == "hill" else 0.0, h)
    for _ in range(round(3 * BURN_IN / DT)):
        x = system.step(x, s, h, 0.0)
    return x[which.ravel()]


def _linear_means(system: System, shift: Array, held: Array) -> Array:
    """``x = (basal + shift + sum of what held genes send) (diag(decay) - graph)^-1`` over the free genes, [q, d]."""
    d = len(system.basal)
    free = np.isnan(held)
    m = np.broadcast_to(np.diag(system.decay) - system.graph, (len(held), d, d)).copy()
    m = np.where(free[:, None, :], m, np.eye(d))  # column k is the equation of gene k
    right = np.where(free, system.basal + shift, np.nan_to_num(held))
    return np.asarray(np.linalg.solve(m.swapaxes(1, 2), right[..., None])[..., 0], dtype=float)


def _read_out(mechanism: Mechanism, mu: Array, sd: Array) -> Any:
    """g: relative expression of a state."""
    if mechanism == "hill":
        return lambda x: x / mu
    return lambda x: np.logaddexp(0.0, OFFSET + (x - mu) / sd)


def _design(p: int, doubles: int, rng: np.random.Generator) -> tuple[Array, list[tuple[int, int]]]:
    """Treatments [1 + p + doubles, p], and the pairs."""
    pairs = list(combinations(range(p), 2))
    chosen = [pairs[i] for i in sorted(rng.permutation(len(pairs))[:doubles])]
    a, b = np.array(chosen, dtype=int).reshape(-1, 2).T
    return np.vstack([np.zeros(p), np.eye(p), np.eye(p)[a] + np.eye(p)[b]]), chosen


def _conditions(names: list[str], pairs: list[tuple[int, int]]) -> list[str]:
    return ["control", *names, *("+".join(sorted((names[a], names[b]))) for a, b in pairs)]


def _check(given: dict[str, Any]) -> None:
    whole = {"n_genes": 2, "n_perturbed": 1, "cells_per_perturbation": 1, "n_control": 1, "doubles": 0, "n_batches": 1, "seed": 0}
    whole |= {"cells_per_double": 1} if given.get("cells_per_double") is not None else {}
    for name, least in whole.items():
        if name in given and (not isinstance(given[name], Integral) or isinstance(given[name], bool) or given[name] < least):
            raise DataError(f"{name}={given[name]!r} was given; give a whole number of at least {least}")
    p = given["n_perturbed"]
    if p > given["n_genes"]:
        raise DataError(f"n_perturbed={p} was given, but there are {given['n_genes']} genes to perturb; give at most so many")
    if given["doubles"] > p * (p - 1) // 2:
        raise DataError(f"doubles={given['doubles']} was given, but {p} perturbations make {p * (p - 1) // 2} pairs; ask for fewer")
    words = {"mechanism": get_args(Mechanism), "intervention": get_args(Intervention), "direction": ("down", "up")}
    for name, valid in words.items():
        if name in given and given[name] not in valid:
            raise DataError(f"{name}={given[name]!r} was given{nearest(str(given[name]), valid)}")
    inf = np.inf
    size = (0.0, inf)
    ranges = {"degree": size, "strength": size, "batch_sd": size, "depth_sd": size, "off_target": (0.0, 1.0), "systematic": (-inf, inf)}
    for name, (low, high) in (ranges | {"library_size": (1e-6, inf), "dispersion": (1e-6, inf)}).items():
        value = given.get(name)
        if value is not None and not _within((value, value), low, high):
            raise DataError(f"{name}={value!r} was given; give a number between {low:g} and {high:g}")
    for name, (low, high) in {"penetrance": (0.0, 1.0), "weight": size}.items():
        if name not in given:
            continue
        ends = given[name] if isinstance(given[name], tuple | list) else (given[name],) * 2
        if not _within(ends, low, high):
            raise DataError(f"{name}={given[name]!r} was given; give a range (low, high) or a number between {low:g} and {high:g}")


def _within(ends: Any, low: float, high: float) -> bool:
    if len(ends) != 2 or not all(isinstance(v, Real) and not isinstance(v, bool) for v in ends):
        return False
    return bool(low <= ends[0] <= ends[1] <= high and np.isfinite(ends).all())
