"""Simulated screens of a structural causal model without cycles: the small worlds on which methods are told apart.

Row vectors, genes are nodes in a random order, ``graph[j, k]`` is the edge j -> k::

    x_k = f(sum_j graph_jk x_j) + shift_k + e_k,   e_k ~ Normal(0, sigma_k^2)        except where x_k is held
    f(s) = s ("linear") or 3 tanh(s) ("tanh")

``"do"``: the target is held at ``mean_k - 3 sqrt(sigma_k^2 + 1)``, mean_k of control cells; ``"shift"``: ``shift = -3`` on it. Read as the
state, in standard deviations about the mean of control cells (which keeps the order of variances from giving the graph away), or with
``counts`` as ``Poisson(exp(v / 2 - 1 / 8))`` of that, about one count for each gene.

``uns["truth"]`` is as in :mod:`pyrocausal.simulate_regulatory`: ``graph`` and ``edges`` (of the standardised state), ``conditions``,
``states`` (exact for ``"linear"``, else averages of ``PATHS`` cells that share their noise), ``expression``, ``interaction``,
``nonadditive``, ``stratum``, ``pairs``, ``targets``, ``perturbations``.
"""

from __future__ import annotations

from typing import Any, Literal

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

from pyrocausal.simulate import Array, _names
from pyrocausal.simulate_regulatory import AMPLITUDE, Intervention, _check, _conditions, _design, interactions_of

PATHS = 4000


def scm_screen(
    n_genes: int = 30,
    degree: float = 2.0,
    n_perturbed: int = 20,
    mechanism: Literal["linear", "tanh"] = "linear",
    intervention: Intervention = "do",
    cells_per_perturbation: int = 200,
    n_control: int = 1000,
    doubles: int = 0,
    counts: bool = False,
    seed: int = 0,
) -> ad.AnnData:
    """A screen of a random acyclic model.

    ``graph_jk = +-Uniform(.5, 1.5)`` with probability ``degree / (d - 1)`` for j before k, so that a gene has ``degree / 2`` parents on
    average; ``sigma_k^2 ~ Uniform(.5, 2)``. Source: Erdos-Renyi models as in Zheng et al. 2018 (arXiv 1803.01422).
    """
    given: dict[str, Any] = dict(locals())
    _check(given)
    rng_system, rng_pair, rng_cell, rng_truth = (np.random.default_rng(s) for s in np.random.SeedSequence(seed).spawn(4))
    d, order = n_genes, rng_system.permutation(n_genes)
    before = np.triu(rng_system.random((d, d)) < min(degree / max(d - 1, 1), 1.0), 1)
    weight = np.where(before, rng_system.uniform(0.5, 1.5, (d, d)) * rng_system.choice([-1.0, 1.0], (d, d)), 0.0)
    graph = np.zeros((d, d))
    graph[np.ix_(order, order)] = weight
    sigma = np.sqrt(rng_system.uniform(0.5, 2.0, d))
    targets = rng_system.permutation(d)[:n_perturbed]
    link: Any = _saturating if mechanism == "tanh" else _same

    def solve(e: Array, shift: Array, held: Array) -> Array:
        """States [..., d] from noise, gene by gene in causal order."""
        x = np.zeros(np.broadcast_shapes(e.shape, shift.shape))
        for k in order:
            x[..., k] = np.where(np.isnan(held[..., k]), link(x @ graph[:, k]) + e[..., k] + shift[..., k], held[..., k])
        return x

    free = np.full((1, d), np.nan)
    noise = sigma * rng_truth.standard_normal((1 if mechanism == "linear" else PATHS, d)) * (mechanism != "linear")
    mean = solve(noise, np.zeros((1, d)), free).mean(0)
    level = mean - 3 * np.sqrt(sigma**2 + 1)

    design, pairs = _design(n_perturbed, doubles, rng_pair)
    touched = np.zeros((len(design), d))
    touched[:, targets] = design
    held = np.where(touched > 0, level, np.nan) if intervention == "do" else np.full_like(touched, np.nan)
    shift = -3.0 * touched if intervention == "shift" else np.zeros_like(touched)
    code = np.repeat(np.arange(len(design)), [n_control] + [cells_per_perturbation] * (len(design) - 1))
    x = solve(sigma * rng_cell.standard_normal((len(code), d)), shift[code], held[code])

    if mechanism == "linear":
        reach = np.linalg.inv(np.eye(d) - graph)
        spread = np.sqrt(np.diagonal(reach.T @ np.diag(sigma**2) @ reach))
    else:
        spread = solve(noise, np.zeros((1, d)), free).std(0)
    states = (solve(noise[None], shift[:, None], held[:, None]).mean(1) - mean) / spread
    v = (x - mean) / spread
    names, genes = [f"gene{t:0{len(str(d - 1))}d}" for t in targets], _names("gene", d)
    expression = states
    if counts:
        paths = sigma * rng_truth.standard_normal((PATHS, d))
        rates = (np.exp((solve(paths, shift[q], held[q]) - mean) / spread / 2 - 0.125) for q in range(len(design)))
        expression = np.log1p(1e4 * np.stack([(rate / rate.sum(1, keepdims=True)).mean(0) for rate in rates]))
    label = np.array(_conditions(names, pairs), dtype=object)
    obs = pd.DataFrame({"perturbation": pd.Categorical(label[code])}, index=pd.Index(_names("cell", len(code))))
    y: Any = sp.csr_matrix(rng_cell.poisson(np.exp(v / 2 - 0.125)).astype(np.float32)) if counts else v.astype(np.float32)
    out = ad.AnnData(X=y, obs=obs, var=pd.DataFrame({"perturbed": np.isin(np.arange(d), targets)}, index=pd.Index(genes)))
    out.obsm["state"] = v.astype(np.float32)
    out.uns["X_kind"] = "counts" if counts else "normalised"
    scaled = graph * spread[:, None] / spread
    out.uns["truth"] = {
        "graph": scaled, "edges": graph != 0, "sigma": sigma / spread, "spread": spread, "order": order, "targets": targets,
        "perturbations": np.array(names, dtype=object), "conditions": label, "states": states, "expression": expression,
        "settings": {"simulator": "scm", **given},
    } | interactions_of(expression, pairs)  # fmt: skip
    return out


def _saturating(s: Array) -> Array:
    return AMPLITUDE * np.tanh(s)


def _same(x: Array) -> Array:
    return x
