"""Simulated screens whose perturbations shift nodes of a latent causal graph, with everything known.

- :func:`chain_screen`, the toy of the discrepancy VAE (Zhang et al., NeurIPS 2023, arXiv 2307.06250): a chain of five nodes, seen directly;
- :func:`graph_screen`, a sparse random graph behind many genes, with targets that follow from an embedding: the library's own, for the
  claims of SCCVAE (Liu, Zhang and Uhler, PLOS Comput Biol 2026). ``edge_probability=0`` gives independent factors.

Row vectors; ``graph[j, k]`` is the weight of the edge j -> k, strictly upper triangular (nodes are numbered from causes to effects)::

    z_n  ~ Normal(0, I_D)                                       exogenous noise of cell n
    u_nk = z_nk + shift_nk + sum_j f(u_nj) graph_jk             f = identity ("linear"), relu or softplus
    shift_n = sum_p dose_np effect_p,  effect_p = penetrance_p mask_p

The penetrance is a strength: the same shift, in standard deviations of z, in all cells of a perturbation. Both return an ``AnnData`` with
what :mod:`pyrocausal.simulate` lists, and

==================================  =============  ============================================================================
where                               shape          what
==================================  =============  ============================================================================
``obsm["z"]``                       [n_cells, D]   exogenous noise (``obsm["u"]`` are the nodes, after shift and graph)
``uns["truth"]["graph"]``           [D, D]         edge weights
``uns["truth"]["penetrance"]``      [P]            size of the shift
``uns["truth"]["mask"]``            [P, D]         1 at the target of the perturbation
``uns["truth"]["embedding"]``       [P, E]         what the target follows from (:func:`graph_screen`; see :func:`embedding_table`)
``uns["truth"]["target_map"]``      [E, D]         W, ``target_p = argmax_k (e_p W)_k`` (:func:`graph_screen`)
``varm["loadings"]``                [G, D]         what each node adds to each gene (``decoder="anchored"``)
``var["intercept"]``                [G]            mean (or logit) of each gene at ``u = 0`` (``decoder="anchored"``)
==================================  =============  ============================================================================
"""

from __future__ import annotations

from itertools import combinations
from numbers import Integral, Real
from typing import Any, Literal

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

from pyrocausal.errors import DataError, nearest
from pyrocausal.simulate import Array, _decode, _decoder, _names, _screen

Structural = Literal["linear", "relu", "softplus"]
LINKS: dict[str, Any] = {"linear": lambda u: u, "relu": lambda u: np.maximum(u, 0), "softplus": lambda u: np.logaddexp(u, 0)}
GAIN = 0.3  # log-fold change of a gene of unit loading when its node moves by one, in counts
THETA = 10.0  # inverse dispersion of counts


def chain_screen(
    n_nodes: int = 5,
    n_control: int = 10240,
    n_cells: int = 2048,
    n_double: int = 1024,
    shift: float = 5.0,
    n_genes: int | None = None,
    seed: int = 1234,
) -> ad.AnnData:
    """The toy of the discrepancy VAE: the chain 0 -> 1 -> ... of unit weights, in which every node is the target of one perturbation.

    ``u_k = z_k + shift_k + relu(u_{k-1})``, and ``x = [u, 0, ..., 0]``: identity mixing, no observation noise. Random numbers are
    drawn in the order of the reference's script from the generator that it uses, so that the defaults are the cells that it makes; its
    control cells for pairs, other draws of the same law, are left out.

    ``obs["split"]``: the reference pairs every target with ``n_control / n_nodes`` control cells of its own, and the first half of its
    perturbed and of its control cells is "test", the second "train"; so are they here (of all control cells, half). Pairs are "test".

    Args:
        n_cells: cells of each single perturbation, ``pert0``, ``pert1``, ...
        n_double: cells of each pair, ``pert0+pert1``, ...; 0 for none.
        shift: of the target, in standard deviations of its noise.
        n_genes: columns of x; those beyond ``n_nodes`` are zero in every cell (the reference has ten), which
            :meth:`pyrocausal.PerturbationData.from_anndata` refuses. None for ``n_nodes``, without padding.

    Source: arXiv 2307.06250, and its reference code's ``data/simulation``.
    """
    n_genes = n_nodes if n_genes is None else n_genes
    given: dict[str, Any] = dict(locals())
    _check(given, Integral, n_nodes=1, n_control=1, n_cells=1, n_double=0, seed=0)
    _check(given, Integral, n_genes=n_nodes)
    _check(given, Real, shift=-np.inf)
    rng = np.random.RandomState(seed)
    graph, mask, names = np.diag(np.ones(n_nodes - 1), 1), np.eye(n_nodes), _names("pert", n_nodes)
    blocks: list[tuple[str, Array, Array]] = []  # label, noise, shift
    bounds = np.arange(n_nodes + 1) * n_control // n_nodes
    for j, size in enumerate(np.diff(bounds)):
        blocks.append(("control", rng.randn(size, n_nodes), np.zeros(n_nodes)))
        blocks.append((names[j], rng.randn(n_cells, n_nodes), shift * mask[j]))
    for i, j in combinations(range(n_nodes), 2):
        rng.randn(n_double, n_nodes)  # the reference's control cells of this pair
        blocks.append((f"{names[i]}+{names[j]}", rng.randn(n_double, n_nodes), shift * (mask[i] + mask[j])))
    blocks.sort(key=lambda block: (block[0] == "control", "+" in block[0]))  # stable: singles, pairs, control
    labels, sizes = [label for label, *_ in blocks], [len(noise) for _, noise, _ in blocks]
    z, strength = np.concatenate([noise for _, noise, _ in blocks]), np.full(n_nodes, float(shift))
    u = solve_nodes(z + np.repeat([moved for *_, moved in blocks], sizes, axis=0), graph, "relu")
    x = np.zeros((len(u), n_genes))
    x[:, :n_nodes] = u
    settings = {"simulator": "chain", **given, "structural": "relu"}
    out = _known(x.astype(np.float32), "normalised", labels, sizes, z, u, x, graph, mask, strength, names, settings)
    test = np.concatenate([("+" in label) | (np.arange(n) < n // 2) for label, n in zip(labels, sizes, strict=True)])
    out.obs["split"] = pd.Categorical(np.where(test, "test", "train"))
    return out


def graph_screen(
    n_latent: int = 16,
    n_genes: int = 500,
    n_perturbations: int = 60,
    cells_per_perturbation: int = 400,
    n_control: int = 4000,
    n_embedding: int = 10,
    edge_probability: float = 0.15,
    weight: tuple[float, float] = (0.4, 0.9),
    penetrance: tuple[float, float] = (0.3, 2.0),
    structural: Structural = "linear",
    decoder: Literal["anchored", "mlp"] = "anchored",
    likelihood: Literal["gaussian", "negative_binomial"] = "gaussian",
    noise: float = 0.5,
    library_size: float = 2000.0,
    doubles: int = 0,
    cells_per_double: int = 200,
    seed: int = 0,
) -> ad.AnnData:
    """A screen with a sparse random graph of programs, and one target for each perturbation that its embedding tells.

    ::

        graph_jk    = +-Uniform(weight) with probability edge_probability, else 0         j < k, signs at random
        e_p         ~ Normal(0, I_E),  target_p = argmax_k (e_p W)_k                      W: directions of length 1, one for each node
        c_p         ~ Uniform(penetrance),  effect_p = c_p at the target, else 0
        d(u)_g      = intercept_g + sum_k u_k loadings_gk,  intercept ~ Normal(0, .5^2)   each gene has one node, or none
        gaussian:          x_n ~ Normal(d(u_n), noise^2),  loadings ~ Uniform(.5, 1.5)
        negative_binomial: x_n ~ NB(mean = library_size softmax(d(u_n)), theta = 10),  loadings ~ .3 Uniform(.5, 1.5)

    Embeddings are redrawn until every node is the target of at least two perturbations. What is drawn for the truth depends on the seed
    and on its own sizes only: more cells, or another likelihood, leave graph, targets and penetrances alone. Pairs add their shifts.

    Args:
        n_genes: each node owns ``n_genes // n_latent`` of them, the first genes belonging to node 0; what remains belongs to none.
        decoder: ``"mlp"`` puts an orthogonal multilayer perceptron (leaky ReLU, widths 50, as in SAMS-VAE's simulation, every gene's
            output of standard deviation 1) in place of the loadings: the negative control, where nothing ties nodes to genes.
        noise: standard deviation of Gaussian expression about its mean.
        library_size: expected counts of every cell.
        doubles: number of random pairs added as ``A+B``, of ``cells_per_double`` cells each.
    """
    given: dict[str, Any] = dict(locals())
    _check(given, Integral, n_latent=1, cells_per_perturbation=1, cells_per_double=1, n_control=1, doubles=0, seed=0, n_embedding=2)
    _check(given, Integral, n_genes=n_latent, n_perturbations=2 * n_latent)  # a gene and two perturbations for every node
    _check(given, Real, noise=0, library_size=1)
    _check(given, Real, 1, edge_probability=0)
    for name, pair in (("weight", weight), ("penetrance", penetrance)):
        if np.shape(pair) != (2,) or not all(isinstance(v, Real) for v in pair) or not 0 <= pair[0] <= pair[1] < np.inf:
            raise DataError(f"{name}={pair!r} was given; give the ends of a range, (low, high) with 0 <= low <= high")
    options = {"structural": tuple(LINKS), "decoder": ("anchored", "mlp"), "likelihood": ("gaussian", "negative_binomial")}
    for name, valid in options.items():
        if given[name] not in valid:
            raise DataError(f"{name}={given[name]!r} was given{nearest(given[name], valid)}")
    pairs = list(combinations(range(n_perturbations), 2))
    if doubles > len(pairs):
        raise DataError(f"doubles={doubles} was given, but {n_perturbations} perturbations make {len(pairs)} pairs; ask for fewer")

    rng = np.random.default_rng(seed)
    edges = np.triu(rng.random((n_latent, n_latent)) < edge_probability, 1)
    graph = np.where(edges, rng.uniform(*weight, edges.shape) * rng.choice([-1.0, 1.0], edges.shape), 0.0)
    embedding, target_map, target = _targets(rng, n_perturbations, n_latent, n_embedding)
    strength, mask = rng.uniform(*penetrance, n_perturbations), np.eye(n_latent)[target]
    effect, intercept = strength[:, None] * mask, rng.normal(0.0, 0.5, n_genes)
    own, gain = n_genes // n_latent, GAIN if likelihood == "negative_binomial" else 1.0
    loadings = np.zeros((n_genes, n_latent))
    loadings[np.arange(own * n_latent), np.repeat(np.arange(n_latent), own)] = gain * rng.uniform(0.5, 1.5, own * n_latent)
    layers = _decoder(rng, [n_latent, 50, 50, 50, 50, n_genes], gain=1.0)
    chosen = [pairs[i] for i in sorted(rng.choice(len(pairs), doubles, replace=False))]

    names = _names("pert", n_perturbations)
    labels = [*names, *(f"{names[a]}+{names[b]}" for a, b in chosen), "control"]
    shifts = np.stack([*effect, *(effect[a] + effect[b] for a, b in chosen), np.zeros(n_latent)])
    sizes = [cells_per_perturbation] * n_perturbations + [cells_per_double] * doubles + [n_control]
    z = rng.standard_normal((sum(sizes), n_latent))
    u = solve_nodes(z + np.repeat(shifts, sizes, axis=0), graph, structural)
    rate = u @ loadings.T if decoder == "anchored" else _decode(layers, u)
    rate = intercept + (rate if decoder == "anchored" else rate * (gain / rate.std(0)))
    if likelihood == "gaussian":
        x: Any = (rate + noise * rng.standard_normal(rate.shape)).astype(np.float32)
    else:
        rate = np.exp(rate - rate.max(1, keepdims=True))
        rate *= library_size / rate.sum(1, keepdims=True)
        x = sp.csr_matrix(rng.poisson(rate * rng.gamma(THETA, 1 / THETA, rate.shape)).astype(np.float32))
    settings = {"simulator": "graph", **given, "weight": list(weight), "penetrance": list(penetrance)}
    out = _known(
        x, "normalised" if likelihood == "gaussian" else "counts", labels, sizes, z, u, rate, graph, mask, strength, names, settings
    )
    out.uns["truth"] |= {"embedding": embedding, "target_map": target_map}
    if decoder == "anchored":
        out.varm["loadings"] = loadings
        out.var["intercept"] = intercept
    return out


def embedding_table(adata: ad.AnnData) -> pd.DataFrame:
    """The embedding of a :func:`graph_screen` as the tables of :mod:`pyrocausal.embeddings` are, [perturbation, component]."""
    truth = adata.uns.get("truth", {})
    if "embedding" not in truth:
        raise DataError("the screen has no embedding in uns['truth']; give one that graph_screen made")
    columns = [f"embedding {k}" for k in range(truth["embedding"].shape[1])]
    return pd.DataFrame(truth["embedding"], pd.Index(truth["perturbations"], name="perturbation"), columns)


def solve_nodes(e: Array, graph: Array, structural: Structural = "linear") -> Array:
    """The structural equations, node by node: ``u_k = e_k + sum_{j<k} f(u_j) graph[j, k]`` for noise plus shift e, [n, D] -> [n, D]."""
    u, f = e.copy(), np.empty_like(e)
    for k in range(e.shape[1]):
        u[:, k] += f[:, :k] @ graph[:k, k]
        f[:, k] = LINKS[structural](u[:, k])
    return u


def _known(
    x: Any, kind: str, labels: list[str], sizes: list[int], z: Array, u: Array, rate: Array, graph: Array, mask: Array, strength: Array,
    names: list[str], settings: dict[str, object],
) -> ad.AnnData:  # fmt: skip
    """The screen with its truth; ``sizes`` cells of every label."""
    label_of = np.repeat(np.array(labels, dtype=object), sizes)
    out = _screen(x, label_of, u, rate, mask, strength[:, None] * mask, names, _names("gene", x.shape[1]), kind, settings)
    out.obsm["z"] = z.astype(np.float32)
    out.uns["truth"] |= {"graph": graph, "penetrance": strength}
    return out


def _targets(rng: np.random.Generator, n_perturbations: int, n_latent: int, n_embedding: int) -> tuple[Array, Array, np.ndarray]:
    """Embeddings [P, E], W [E, D] and targets [P]: two perturbations for every node, the others as they come, in random order."""
    w = rng.standard_normal((n_embedding, n_latent))
    w /= np.linalg.norm(w, axis=0)
    pool = rng.standard_normal((max(20_000, 2 * n_perturbations), n_embedding))
    node = (pool @ w).argmax(1)
    two = [np.flatnonzero(node == k)[:2] for k in range(n_latent)]
    if min(map(len, two)) < 2:
        raise DataError(f"n_embedding={n_embedding} was given, in which some of the {n_latent} nodes are hardly ever targets; give more")
    needed = np.concatenate(two)
    others = np.setdiff1d(np.arange(len(pool)), needed)[: n_perturbations - len(needed)]
    rows = rng.permutation(np.concatenate([needed, others]))
    return pool[rows], w, node[rows]


def _check(given: dict[str, Any], kind: Any, high: float = np.inf, **least: float) -> None:
    for name, low in least.items():
        value = given[name]
        if not isinstance(value, kind) or isinstance(value, bool) or not np.isfinite(value) or not low <= value <= high:
            bounds = f" of at least {low}" * (low > -np.inf) + f" and at most {high}" * (high < np.inf)
            raise DataError(f"{name}={value!r} was given; give a {'whole' if kind is Integral else 'finite'} number{bounds}")
