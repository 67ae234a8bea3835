"""Edge scores that need no causal model, the baselines of every graph: [n_genes, n_genes], row j acts on column k, diagonal zero.

Differential expression orders total effects, regression orders associations; their product is hard to beat where most genes are perturbed.
Compare with :mod:`pyrocausal.graph_metrics`; print the prevalence beside any AUPRC.
"""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from pyrocausal.data import PerturbationData
from pyrocausal.errors import DataError
from pyrocausal.evaluate import measured_effects

Array = NDArray[np.float64]


def de_scores(data: PerturbationData) -> Array:
    """``|effect| / se`` of the single perturbation of gene j on gene k; zero rows for genes that no cell has perturbed alone.

    Cannot see: direct from indirect effects, and anything of a gene that was never perturbed.
    """
    measured = measured_effects(data)
    names = measured["intervention"].values
    row = data.genes.get_indexer(names)
    if (row < 0).all():
        raise DataError("no single perturbation has the name of a measured gene; name perturbations by their genes")
    with np.errstate(invalid="ignore", divide="ignore"):
        z = np.nan_to_num(np.abs(measured["effect"].values) / measured["se"].values, posinf=0.0)
    out = np.zeros((len(data.genes),) * 2)
    out[row[row >= 0]] = z[row >= 0]
    np.fill_diagonal(out, 0.0)
    return out


def coefficient_scores(data: PerturbationData, penalty: float = 1e-3, normalise: str = "median") -> Array:
    """``|b_jk| s_j / s_k`` of the regression of each gene k on all others, over the cells in which k was not perturbed.

    Ridge of ``penalty`` times the number of cells on genes of unit variance. Counts are ``log1p(counts)``, brought to the ``"median"``
    library before, or ``"none"``: the stronger where all cells are equally deep and few genes share the library, as in simulations. Cannot
    see: direction (where nothing was perturbed), latent causes, feedback.
    """
    if normalise not in ("median", "none"):
        raise DataError(f"normalise={normalise!r} was given; it is 'median' or 'none'")
    counts = data.kind == "counts"
    x = (data.log_normalised() if counts and normalise == "median" else data).dense(np.float64)
    x = np.log1p(x) if counts and normalise == "none" else x
    x = (x - x.mean(0)) / np.maximum(x.std(0), 1e-12)
    d = x.shape[1]
    augmented = np.hstack([x, np.ones((len(x), 1))])
    whole = augmented.T @ augmented
    out = np.zeros((d, d))
    perturbs = data.perturbations.get_indexer(data.genes)
    dose = sp.csc_matrix(data.dose)
    for k in range(d):  # a system for each gene: its cells differ
        held = dose.indices[dose.indptr[perturbs[k]] : dose.indptr[perturbs[k] + 1]] if perturbs[k] >= 0 else np.empty(0, int)
        gram = whole - augmented[held].T @ augmented[held]
        others = np.delete(np.arange(d + 1), k)
        ridge = penalty * gram[d, d] * np.diag((others < d).astype(float))
        out[others[:-1], k] = np.abs(np.linalg.solve(gram[np.ix_(others, others)] + ridge, gram[others, k])[:-1])
    return out


def sqrt_coefficient_de(data: PerturbationData, penalty: float = 1e-3, normalise: str = "median") -> Array:
    """``sqrt(coefficient_scores x de_scores)``; for genes that were never perturbed the coefficient alone, below all others.

    Cannot see: direction among genes that were never perturbed.
    """
    coefficient, de = coefficient_scores(data, penalty, normalise), de_scores(data)
    both = np.sqrt(coefficient * de)
    silent = ~(de > 0).any(1)
    if silent.any() and not silent.all():
        least = both[~silent][both[~silent] > 0].min(initial=1.0)
        both[silent] = coefficient[silent] / max(coefficient[silent].max(), 1e-300) * least
    return both
