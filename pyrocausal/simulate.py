"""Simulated perturbation screens whose truth is known.

Two published simulators, each with the settings of its reference (``replicate=True``) and with its flaws mended (the default):

- :func:`svae_screen`, the sparse mechanism shifts of sVAE+ (Lopez et al., CLeaR 2023, arXiv 2211.03553);
- :func:`sams_screen`, the sparse additive shifts of SAMS-VAE (Bereket and Karaletsos, NeurIPS 2023, arXiv 2311.02794);

A small screen with marker genes and inert perturbations, for demonstrations, is in :mod:`pyrocausal.demo_screen`.
Screens whose perturbations shift the nodes of a latent causal graph are in :mod:`pyrocausal.simulate_graph`.

All return an ``AnnData`` with ``obs["perturbation"]`` and the truth beside it:

==========================  =====================  ==========================================================
where                       shape                  what
==========================  =====================  ==========================================================
``obsm["u"]``               [n_cells, n_latent]    latent programs of each cell, after the shift
``obsm["rate"]``            [n_cells, n_genes]     noise-free expression (expected counts, or expected value)
``uns["truth"]["mask"]``    [n_pert, n_latent]     1 where the perturbation targets the program
``uns["truth"]["effect"]``  [n_pert, n_latent]     shift of the program, in standard deviations of the basal state
``uns["truth"]["perturbations"]``  [n_pert]        names, in the order of the rows above
==========================  =====================  ==========================================================
"""

from __future__ import annotations

from itertools import pairwise

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
from numpy.typing import NDArray

Array = NDArray[np.float64]

LEAK = 0.2  # slope of the leaky ReLU below zero, both papers


def _leaky_relu(h: Array) -> Array:
    return np.where(h > 0, h, LEAK * h)


def _orthonormal(rng: np.random.Generator, fan_in: int, fan_out: int) -> Array:
    """A [fan_in, fan_out] matrix with orthonormal rows (or columns, whichever are fewer)."""
    q, _ = np.linalg.qr(rng.standard_normal((max(fan_in, fan_out), min(fan_in, fan_out))))
    return q.T if fan_in <= fan_out else q


def _decoder(rng: np.random.Generator, widths: list[int], gain: float | None) -> list[Array]:
    """Weights of an orthogonal multilayer perceptron; ``gain=None`` is the Kaiming-Xavier mixture of the sVAE+ reference."""
    weights = []
    for fan_in, fan_out in pairwise(widths):
        scale = gain if gain is not None else np.sqrt(2 / (1 + LEAK**2)) * np.sqrt(2 / (fan_in + fan_out))
        weights.append(scale * _orthonormal(rng, fan_in, fan_out))
    return weights


def _decode(weights: list[Array], u: Array) -> Array:
    h = u
    for w in weights[:-1]:
        h = _leaky_relu(h @ w)
    return h @ weights[-1]


def _names(prefix: str, n: int) -> list[str]:
    width = len(str(n - 1))
    return [f"{prefix}{i:0{width}d}" for i in range(n)]


def _screen(
    x: NDArray[np.float32] | sp.csr_matrix,
    labels: NDArray[np.object_],
    u: Array,
    rate: Array,
    mask: Array,
    effect: Array,
    names: list[str],
    genes: list[str],
    kind: str,
    settings: dict[str, object],
) -> ad.AnnData:
    obs = pd.DataFrame({"perturbation": pd.Categorical(labels)}, index=_names("cell", len(labels)))
    adata = ad.AnnData(X=x, obs=obs, var=pd.DataFrame(index=genes))
    adata.obsm["u"] = u.astype(np.float32)
    adata.obsm["rate"] = rate.astype(np.float32)
    adata.uns["X_kind"] = kind
    adata.uns["truth"] = {"mask": mask, "effect": effect, "perturbations": np.array(names, dtype=object), "settings": settings}
    return adata


def svae_screen(
    n_perturbations: int = 100,
    n_latent: int = 15,
    cells_per_perturbation: int = 250,
    n_genes: int = 100,
    n_control: int = 0,
    shift: float = 5.0,
    library_size: float = 4000.0,
    replicate: bool = False,
    seed: int = 0,
) -> ad.AnnData:
    """Counts of a screen with sparse mechanism shifts (sVAE+).

    For each perturbation k, s ~ Uniform{1, 2, 3} targets are drawn with replacement, ``effect_kj = +-N(shift, .5^2)`` on them;
    ``u_n ~ N(effect_{k(n)}, I)``; four orthogonal maps of width 40 with leaky ReLU give logits of unit standard deviation.

    Args:
        n_control: unperturbed cells, labelled ``control`` (the reference has none).
        shift: mean size of an effect, in basal standard deviations.
        library_size: expected counts per cell of the default mode.
        replicate: the reference's normalisation: the softmax runs over cells and the total is 1e6 per gene, so that depth depends on
            the number of cells and libraries carry signal. The default takes the softmax over genes with a log-normal library
            (sd .2).

    Source: arXiv 2211.03553, section 5; the reference's ``sparse_shift``.
    """
    rng = np.random.default_rng(seed)
    names = _names("pert", n_perturbations)
    mask = np.zeros((n_perturbations, n_latent))
    effect = np.zeros((n_perturbations, n_latent))
    for k in range(n_perturbations):
        targets = rng.integers(0, n_latent, size=rng.integers(1, 4))
        mask[k, targets] = 1
        effect[k] = mask[k] * rng.normal(shift, 0.5, n_latent) * rng.choice([-1.0, 1.0], n_latent)
    code = np.repeat(np.arange(n_perturbations), cells_per_perturbation)
    code = np.concatenate([code, np.full(n_control, -1)])
    u = rng.standard_normal((len(code), n_latent)) + np.where(code[:, None] >= 0, effect[code], 0.0)
    weights = _decoder(rng, [n_latent, 40, 40, 40, n_genes], gain=None)
    logits = _decode(weights, u)
    logits = logits / logits.std()
    if replicate:
        rate = np.exp(logits - logits.max())
        rate = 1e6 * rate / rate.sum(0, keepdims=True)
    else:
        rate = np.exp(logits - logits.max(1, keepdims=True))
        rate = rate / rate.sum(1, keepdims=True) * library_size * rng.lognormal(0.0, 0.2, (len(code), 1))
    x = rng.poisson(rate).astype(np.float32)
    labels = np.array([*names, "control"], dtype=object)[code]
    settings = {"simulator": "svae", "seed": seed, "shift": shift, "replicate": replicate}
    return _screen(sp.csr_matrix(x), labels, u, rate, mask, effect, names, _names("gene", n_genes), "counts", settings)


def sams_screen(
    n_perturbations: int = 100,
    n_latent: int = 15,
    cells_per_perturbation: int = 200,
    n_genes: int = 100,
    n_control: int = 0,
    shift: float = 5.0,
    target_probability: float = 2 / 15,
    doubles: int = 0,
    cells_per_double: int = 100,
    interaction: float = 0.0,
    replicate: bool = False,
    seed: int = 0,
) -> ad.AnnData:
    """Gaussian expression of a screen with sparse additive shifts (SAMS-VAE).

    ``mask ~ Bernoulli(target_probability)``, ``effect = +-N(shift, .5^2)``, ``u = N(0, I) + dose @ (mask * effect)``; five orthogonal maps
    of width 50 with leaky ReLU; every gene's mean has unit variance and the noise is 20 % of the total variance.

    Args:
        doubles: number of random pairs added as ``A+B`` (``cells_per_double`` cells each).
        interaction: size of a synergy on pairs: ``interaction * (sum of both shifts)`` is added to the shift (0 = additive).
        replicate: the reference's setting, where every perturbation has cells and some may target nothing; the default redraws
            empty rows, so that every perturbation targets at least one program.

    Source: arXiv 2311.02794; the reference's ``simulate_data_sams_vae``.
    """
    rng = np.random.default_rng(seed)
    names = _names("pert", n_perturbations)
    mask = (rng.random((n_perturbations, n_latent)) < target_probability).astype(float)
    if not replicate:
        empty = mask.sum(1) == 0
        mask[empty, rng.integers(0, n_latent, empty.sum())] = 1
    effect = mask * rng.normal(shift, 0.5, mask.shape) * rng.choice([-1.0, 1.0], mask.shape)
    table = [effect[k] for k in range(n_perturbations)]
    labels_of, sizes = list(names), [cells_per_perturbation] * n_perturbations
    chosen: set[tuple[int, int]] = set()
    while len(chosen) < doubles:
        a, b = sorted(int(i) for i in rng.choice(n_perturbations, 2, replace=False))
        if (a, b) in chosen:
            continue
        chosen.add((a, b))
        table.append((1 + interaction) * (effect[a] + effect[b]))
        labels_of.append(f"{names[a]}+{names[b]}")
        sizes.append(cells_per_double)
    table.append(np.zeros(n_latent))
    labels_of.append("control")
    sizes.append(n_control)
    code = np.repeat(np.arange(len(table)), sizes)
    u = rng.standard_normal((len(code), n_latent)) + np.stack(table)[code]
    weights = _decoder(rng, [n_latent, 50, 50, 50, 50, n_genes], gain=1.0)
    mean = _decode(weights, u)
    mean = mean / mean.std(0, keepdims=True)
    x = (mean + rng.normal(0.0, np.sqrt(0.25), mean.shape)).astype(np.float32)
    settings = {"simulator": "sams", "seed": seed, "shift": shift, "replicate": replicate, "interaction": interaction}
    labels = np.array(labels_of, dtype=object)[code]
    return _screen(x, labels, u, mean, mask, effect, names, _names("gene", n_genes), "normalised", settings)
