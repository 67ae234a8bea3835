"""Screens with more genes than a drift has room for, as screens of modules: what ``LinearLCD`` is for beyond 300 to 500 genes.

With g a gene, m its module, and y its log-normalised expression less the mean of its condition, in units of its own spread::

    score_m   = mean over genes g of module m of (x_g - mean_g of controls) / sd_g
    loading_g = cov(y_g, score_m) / var(score_m), in the unit of x_g

A linear diffusion over genes is not one over their means: the drift between modules is an effective one, of a system in which the genes of
a module move together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import scipy.sparse as sp
import xarray as xr
from numpy.typing import NDArray
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform

from pyrocausal.data import PerturbationData
from pyrocausal.errors import DataError

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Coarse:
    """A screen of modules.

    Attributes:
        data: cells x modules, normalised; names of perturbations as before.
        own_genes: module of each perturbation's target, -1 where the target is not measured or in no module; for
            ``pc.build("linear_lcd", coarse.data, own_genes=coarse.own_genes)``.
        loadings: change of each gene per unit of each module's score, modules x genes; 0 outside the module.
        members: genes of each module.
    """

    data: PerturbationData
    own_genes: list[int]
    loadings: pd.DataFrame
    members: dict[str, list[str]]

    def to_genes(self, effect: xr.DataArray) -> xr.DataArray:
        """Changes of modules (dimension ``gene``, as in the answers of ``pc.effects``) as changes of the log-normalised genes."""
        loadings = xr.DataArray(
            self.loadings.to_numpy(), {"module": self.loadings.index, "gene": self.loadings.columns}, ("module", "gene")
        )
        return effect.rename(gene="module").dot(loadings.astype(effect.dtype), dim="module")


def coarsen(data: PerturbationData, modules: int | Mapping[str, Sequence[str]]) -> Coarse:
    """Means of modules of genes in place of genes.

    Args:
        data: counts (which are log-normalised first) or normalised expression.
        modules: genes of each module; or a number of modules, found by Ward's clustering of the correlation of genes within conditions.

    Raises:
        DataError: for a gene that is not in the screen or in two modules, an empty module, or a number that is not 2 to the number of
            genes that vary.
    """
    data = data.log_normalised() if data.kind == "counts" else data
    x = data.dense(np.float64)
    codes, labels = pd.factorize(data.labels.astype(str))
    inside = sp.csr_matrix((np.ones(len(x)), (np.arange(len(x)), codes)), (len(x), len(labels)))
    residual = x - inside @ ((inside.T @ x) / np.asarray(inside.sum(0)).T)
    sd = residual.std(0)
    residual = residual / np.where(sd > 0, sd, 1)
    of = _clusters(residual, sd > 0, modules) if isinstance(modules, int) else _given(data, modules)
    names = [f"module {k}" for k in range(of.max() + 1)] if isinstance(modules, int) else list(modules)
    belongs = np.zeros((len(names), len(of)))
    belongs[of[of >= 0], np.nonzero(of >= 0)[0]] = 1
    belongs[:, sd == 0] = 0
    size = belongs.sum(1, keepdims=True)
    if (size == 0).any():
        raise DataError(f"module {names[int((size == 0).argmax())]!r} has no gene that varies; leave it out")
    mean = belongs / size
    centre = x[data.is_control].mean(0) if data.is_control.any() else x.mean(0)
    score = ((x - centre) / np.where(sd > 0, sd, 1)) @ mean.T
    within = residual @ mean.T
    slope = (within.T @ residual) / np.square(within).sum(0)[:, None] * belongs * sd
    coarse = replace(
        data, x=score.astype(np.float32), genes=pd.Index(names), library_size=np.ones(len(data), np.float32), kind="normalised"
    )
    at = data.genes.get_indexer(data.perturbations)
    own = [int(of[g]) if g >= 0 and sd[g] > 0 else -1 for g in at]
    members = {name: [str(g) for g in data.genes[belongs[k] > 0]] for k, name in enumerate(names)}
    return Coarse(coarse, own, pd.DataFrame(slope, names, data.genes), members)


def _clusters(residual: Array, varies: NDArray[np.bool_], n: int) -> NDArray[np.int64]:
    """Module of each gene [G], -1 for genes that do not vary; the largest module first."""
    if not 2 <= n <= varies.sum():
        raise DataError(f"{n} modules were asked for; give 2 to {int(varies.sum())}, the number of genes that vary")
    correlation = residual[:, varies].T @ residual[:, varies] / len(residual)
    distance = np.sqrt(np.maximum(1 - correlation, 0))
    np.fill_diagonal(distance, 0)
    found = fcluster(linkage(squareform(distance, checks=False), "ward"), n, "maxclust")
    order = pd.Series(found).value_counts(sort=True).index
    of = np.full(len(varies), -1)
    of[varies] = order.get_indexer(found)
    return of


def _given(data: PerturbationData, modules: Mapping[str, Sequence[str]]) -> NDArray[np.int64]:
    of = np.full(len(data.genes), -1)
    for k, (name, genes) in enumerate(modules.items()):
        at = data.genes.get_indexer(list(genes))
        if (at < 0).any():
            raise DataError(
                f"module {name!r} names the gene {list(genes)[int((at < 0).argmax())]!r}, which is not in the screen; leave it out"
            )
        if (of[at] >= 0).any():
            raise DataError(f"gene {str(data.genes[at[of[at] >= 0][0]])!r} is in two modules; keep it in one")
        of[at] = k
    if not modules or (np.bincount(of[of >= 0], minlength=len(modules)) == 0).any():
        raise DataError("a module without genes was given; give at least one gene for each")
    return of


__all__ = ["Coarse", "coarsen"]
