"""Does an edge of a causal matrix imply a measured effect? P(differential expression | edge) against its base rate, and against reversal.

With P the pairs (i, j), i perturbed, whose edge i -> j is among the largest, and Q the pairs where gene j is differentially expressed under
i: the confidence P(Q|P) with Wilson's interval, the base rate P(Q), Fisher's exact test (one-sided), lift P(Q|P)/P(Q), and conviction
P(not Q)/P(not Q|P), the last two with percentile bootstrap intervals over pairs. The same for the transpose: a symmetric matrix cannot tell
the two apart, and ``p_direction`` tests whether the matrix does (Fisher's exact test between the pairs that only one of the two selects).

Source: the evaluation of CLIPR on a genome-wide screen (Lorch et al. 2026, arXiv 2601.15341); the transpose and its test are ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from scipy import stats

from pyrocausal.errors import DataError


def implication(
    effects: xr.DataArray | pd.DataFrame,
    differential: xr.DataArray | pd.DataFrame,
    quantiles: Sequence[float] = (0.9, 0.95, 0.98),
    resamples: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """One row for each quantile of ``|M|`` off the diagonal and each direction (``"forward"``, ``"transposed"``).

    Args:
        effects: matrix (cause, effect), of :func:`pyrocausal.clipr` (draws are averaged) or a table with names.
        differential: (perturbation, gene) bool, such as ``evaluate.de_genes(evaluate.measured_effects(data))``.
        quantiles: thresholds, taken over all pairs of genes that can be tested in either direction.

    Raises:
        DataError: if no perturbation is a gene of the matrix, or no pair exceeds a threshold.

    Cannot see: indirect effects (an effect without an edge counts against nobody), nor how large an effect is.
    """
    M, D = _table(effects, ("cause", "effect")), _table(differential, None)
    causes = [c for c in D.index if c in M.index]
    both = [c for c in causes if c in D.columns]
    genes = [g for g in M.columns if g in D.columns]
    if not causes or not genes:
        raise DataError("no perturbation of the measured effects is a gene of the matrix; name perturbations by their genes")
    truth = D.loc[causes, genes].to_numpy(bool)
    tested = np.array([[c != g for g in genes] for c in causes])
    sizes = {"forward": np.abs(M.loc[causes, genes].to_numpy(float)), "transposed": np.abs(M.T.loc[causes, genes].to_numpy(float))}
    rng = np.random.default_rng(seed)
    rows: list[dict[str, Any]] = []
    for quantile in quantiles:
        threshold = float(np.quantile(sizes["forward"][tested], quantile))
        chosen = {name: (size > threshold) & tested for name, size in sizes.items()}
        p_direction = _direction(chosen["forward"], chosen["transposed"], truth)
        for name, edge in chosen.items():
            if not edge.any():
                raise DataError(f"no pair exceeds the quantile {quantile} of |M|; lower it ({int(tested.sum())} pairs can be tested)")
            rows.append({"quantile": quantile, "direction": name, **_statistics(edge[tested], truth[tested], resamples, rng)})
            rows[-1]["p_direction"] = p_direction
    out = pd.DataFrame(rows)
    out.attrs |= {"n_pairs": int(tested.sum()), "n_causes": len(causes), "n_causes_measured": len(both)}
    return out


# -- parts -----------------------------------------------------------------------------------------------------------------------


def _statistics(edge: np.ndarray, truth: np.ndarray, resamples: int, rng: np.random.Generator) -> dict[str, float]:
    n, k, base = int(edge.sum()), int((edge & truth).sum()), float(truth.mean())
    table = [[k, n - k], [int((~edge & truth).sum()), int((~edge & ~truth).sum())]]
    wilson = stats.binomtest(k, n).proportion_ci(0.95, method="wilson")
    counts = rng.multinomial(len(edge), np.array(table).ravel() / len(edge), size=resamples)
    a, b, c, _ = counts.T
    with np.errstate(divide="ignore", invalid="ignore"):
        confidence, rate = a / (a + b), (a + c) / len(edge)
        lift, conviction = np.nanquantile(confidence / rate, [0.025, 0.975]), (1 - rate) / (1 - confidence)
    conviction = np.nanquantile(conviction, [0.025, 0.975], method="nearest")
    return {
        "n_edges": n,
        "confidence": k / n,
        "lower": wilson.low,
        "upper": wilson.high,
        "base_rate": base,
        "p_fisher": float(stats.fisher_exact(table, "greater").pvalue),
        "lift": k / n / base if base else np.nan,
        "lift_lower": lift[0],
        "lift_upper": lift[1],
        "conviction": (1 - base) / (1 - k / n) if k < n else np.inf,
        "conviction_lower": conviction[0],
        "conviction_upper": conviction[1],
    }


def _direction(forward: np.ndarray, backward: np.ndarray, truth: np.ndarray) -> float:
    """Exact p-value (Fisher, one-sided) that pairs selected forward only show an effect more often than those backward only."""
    only_f, only_b = truth[forward & ~backward], truth[backward & ~forward]
    if not len(only_f) or not len(only_b):
        return 1.0
    table = [[int(only_f.sum()), int((~only_f).sum())], [int(only_b.sum()), int((~only_b).sum())]]
    return float(stats.fisher_exact(table, "greater").pvalue)


def _table(given: xr.DataArray | pd.DataFrame, dims: tuple[str, str] | None) -> pd.DataFrame:
    if isinstance(given, pd.DataFrame):
        return given
    table = given.mean("draw") if "draw" in given.dims else given
    if dims is not None:
        table = table.transpose(*dims)
    return pd.DataFrame(
        table.to_numpy(), [str(i) for i in table[table.dims[0]].to_numpy()], [str(i) for i in table[table.dims[1]].to_numpy()]
    )
