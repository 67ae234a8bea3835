"""Which pairs of perturbations do something that neither does alone: tests against the additive expectation, with error control.

For a pair A+B whose parts and whose control were measured, gene by gene on the scale of
:func:`~pyrocausal.evaluate.measured_effects` (counts: log1p of mean CP10k; normalised data as they are)::

    interaction = (y_AB - y_c) - (y_A - y_c) - (y_B - y_c) = y_AB - y_A - y_B + y_c
    se^2 = s_AB^2 + s_A^2 + s_B^2 + s_c^2                       the noise of all four groups (delta method)
    t = interaction / se ~ t_df, df of Welch and Satterthwaite;  z = Phi^-1(T_df(t))

Counts: s_AB^2 is at least what negative binomial cells of the pooled dispersion would have at the additive expectation, since a few cells
of a skewed gene are no measure of their own spread.

What is additive depends on the scale: states that add are not additive as log expression, and two effects on the same gene may not have
room for their sum. Counts: the additive expectation ``y_A + y_B - y_c`` is held above zero.

:func:`call_interactions` is the whole procedure, :func:`pair_tests` asks for each pair as a whole. Cells are the replicates: guides and
batches that differ between the four groups are not told from interactions; penetrance below 1 makes additive pairs look sub-additive.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
import scipy.sparse as sp
from numpy.typing import ArrayLike, NDArray
from scipy import stats
from scipy.optimize import minimize

from pyrocausal.closed_form import noise_of
from pyrocausal.data import PerturbationData
from pyrocausal.errors import DataError, nearest
from pyrocausal.evaluate import _shares, _totals

Array = NDArray[np.float64]
Null = Literal["theoretical", "empirical"]
CENTRE = 1.0  # half-width, in standard deviations, of the middle that is taken for null
BINS, DEGREE = 90, 7  # of the histogram, and of the log density in it
FEWEST = 200  # tests below which a density cannot be told


@dataclass(frozen=True)
class LocalFDR:
    """Two groups, ``f(z) = p0 f0(z) + (1 - p0) f1(z)``.

    Attributes:
        lfdr: ``p0 f0(z) / f(z)`` of every test, [n]; NaN for a test that is NaN.
        p0: share of nulls. mean, sd: of f0, a normal law.
    """

    lfdr: Array
    p0: float
    mean: float
    sd: float


def call_interactions(
    data: PerturbationData,
    pairs: Sequence[str] | None = None,
    fdr: float = 0.1,
    null: Null = "theoretical",
    min_count: float = 20.0,
    drop_targets: bool = True,
) -> pd.DataFrame:
    """Interactions of every pair and gene, and which are called at a false discovery rate.

    A cell of the table is called if both hold: the mean local FDR of all that are at least as extreme (Efron's Bayesian FDR) is at most
    ``fdr``, and so is its Benjamini-Hochberg q-value under the same null. The second keeps the promise where the density of the first is
    hard to estimate: FDR at most ``fdr`` for independent or positively dependent tests, whatever the alternatives. With fewer than 200
    tests there is no density (``lfdr`` is NaN), and the second decides.

    Args:
        pairs: labels; None for all whose parts are both measured alone.
        null: law of z where nothing interacts: ``"theoretical"`` N(0, 1), or ``"empirical"``, fitted to the middle of all z (Efron 2004),
            never narrower: it allows for variance between groups that cells do not show, and costs power.
        min_count: of counts, a gene is tested if its pooled rate over the four groups gives each of them so many counts.
        drop_targets: do not test the genes that a pair perturbs. What is held at a level cannot add, so that calls of them are right and
            say nothing, and a false discovery rate over them and the others is higher among the others alone.

    Returns:
        A row for each pair and gene: ``pair, a, b, gene``; ``double`` (y_AB - y_c), ``additive`` (its expectation), ``interaction, se, df,
        z, p_value`` (under the null used), ``lfdr, q_value, called``, and ``kind``: ``"synergy"`` (further than expected, on the same
        side), ``"suppression"`` (short of it), ``"reversal"`` (on the other side) or ``""``. Untested genes have NaN and are not called.
        ``attrs`` holds p0, mean and sd of the null, and the number of tests.

    Source: additive expectation and local FDR of interactions as in Ahlmann-Eltze, Huber and Anders 2025 (who do not model noise); Efron
    2004, 2010; Benjamini and Hochberg 1995.
    """
    if not 0 < fdr < 1:
        raise DataError(f"fdr={fdr!r} was given; give a rate between 0 and 1")
    table = interaction_tests(data, pairs, min_count, drop_targets)
    found = local_fdr(table["z"].to_numpy(), null)
    scaled = (table["z"].to_numpy() - found.mean) / found.sd
    table["p_value"] = 2 * stats.norm.sf(np.abs(scaled))
    table["lfdr"], table["q_value"] = found.lfdr, _benjamini_hochberg(table["p_value"].to_numpy())
    bayes = _running_mean(found.lfdr)
    called = (table["q_value"] <= fdr) & ((bayes <= fdr) | np.isnan(found.lfdr))
    table["called"] = called.to_numpy()
    same = np.sign(table["double"]) == np.sign(table["additive"])
    beyond = np.abs(table["double"]) > np.abs(table["additive"])
    table["kind"] = np.where(table["called"], np.where(same, np.where(beyond, "synergy", "suppression"), "reversal"), "")
    tested = int(table["z"].notna().sum())
    table.attrs |= {"p0": found.p0, "null_mean": found.mean, "null_sd": found.sd, "null": null, "fdr": fdr, "tests": tested}
    return table


def interaction_tests(
    data: PerturbationData, pairs: Sequence[str] | None = None, min_count: float = 20.0, drop_targets: bool = True
) -> pd.DataFrame:
    """The statistics of :func:`call_interactions` under the theoretical null, without calls."""
    names, rows = _groups(data, pairs)
    counts = data.kind == "counts"
    totals = {label: _totals(data, members) for label, members in rows.items()}
    base, blocks = totals[data.control], []
    theta = noise_of(data)[0]
    for pair in names:
        a, b = pair.split(data.separator)
        groups = [totals[pair], totals[a], totals[b], base]
        expected = groups[1].value + groups[2].value - base.value
        parts = np.stack([g.variance for g in groups])
        if counts:
            expected = np.maximum(expected, 0.0)
            parts[0] = np.maximum(parts[0], _at_rate(expected, data.library_size[rows[pair]], theta))
        variance, n = parts.sum(0), np.array([g.n for g in groups], dtype=float)
        gap = groups[0].value - expected
        with np.errstate(divide="ignore", invalid="ignore"):
            df = variance**2 / (parts**2 / (n - 1)[:, None]).sum(0)
            t = gap / np.sqrt(variance)
            z = np.sign(t) * stats.norm.isf(stats.t.sf(np.abs(t), df))
        z = np.sign(t) * np.minimum(np.abs(z), 38.0)  # beyond, the tail is not a number
        if counts:
            rate = sum(g.rate * g.exposure for g in groups) / sum(g.exposure for g in groups)
            z = np.where(rate * min(g.exposure for g in groups) >= min_count, z, np.nan)
        z = np.where((variance > 0) & ~(drop_targets & np.isin(data.genes, [a, b])), z, np.nan)
        columns = {
            "pair": pair, "a": a, "b": b, "gene": data.genes, "double": groups[0].value - base.value, "additive": expected - base.value,
            "interaction": gap, "se": np.sqrt(variance), "df": df, "z": z, "p_value": 2 * stats.norm.sf(np.abs(z)),
        }  # fmt: skip
        blocks.append(pd.DataFrame(columns))
    return pd.concat(blocks, ignore_index=True)


def pair_tests(
    data: PerturbationData,
    pairs: Sequence[str] | None = None,
    min_count: float = 20.0,
    draws: int = 999,
    seed: int = 0,
    drop_targets: bool = True,
) -> pd.DataFrame:
    """Does a pair interact at all: ``T = sum over genes of z^2``, against its law when cells scatter about additive means.

    The law is that of ``draws`` wild bootstraps: every cell's deviation from the mean of its group, with a random sign, gives z of all
    genes at once, so that their correlation is kept; ``p = (1 + #{T* >= T}) / (draws + 1)``. Source: Wu 1986; Mammen 1993. Arguments as
    in :func:`call_interactions`.

    Returns:
        A row for each pair: ``pair, genes`` (tested), ``statistic, p_value, q_value`` (Benjamini-Hochberg over pairs), and ``energy``:
        ``sum interaction^2 - se^2`` over ``sum double^2 - its variance``, the share of the pair's energy that is not additive, noise
        taken out (it may be negative).
    """
    if draws < 19:
        raise DataError(f"draws={draws} was given; p-values need at least 19")
    tests = interaction_tests(data, pairs, min_count, drop_targets)
    names, rows = _groups(data, pairs)
    out = []
    for k, pair in enumerate(names):
        rng = np.random.default_rng([seed, k])
        t = tests[tests["pair"] == pair]
        used = t["z"].notna().to_numpy()
        groups = [pair, *pair.split(data.separator), data.control]
        se = t["se"].to_numpy()[used]
        total = np.zeros((draws, int(used.sum())))
        variance = {}
        for label in groups:
            deviation = _deviations(data, rows[label])[:, used]
            variance[label] = (deviation**2).sum(0)
            total += rng.choice([-1.0, 1.0], (draws, len(deviation))) @ deviation
        spread = np.sqrt(sum(variance.values()))
        statistic = float((t["z"].to_numpy()[used] ** 2).sum())
        null = ((total / np.where(spread > 0, spread, 1.0)) ** 2).sum(1)
        gap, double = t["interaction"].to_numpy()[used], t["double"].to_numpy()[used]
        noise = variance[pair] + variance[data.control]
        share = float((gap**2 - se**2).sum() / max((double**2 - noise).sum(), 1e-300))
        p = (1 + int((null >= statistic).sum())) / (draws + 1) if used.any() else np.nan
        out.append({"pair": pair, "genes": int(used.sum()), "statistic": statistic, "p_value": p, "energy": share})
    table = pd.DataFrame(out)
    table["q_value"] = _benjamini_hochberg(table["p_value"].to_numpy())
    return table


def local_fdr(z: ArrayLike, null: Null = "theoretical") -> LocalFDR:
    """Local false discovery rates of z-values, two groups, with a theoretical or an empirical null.

    The density f is fitted to a histogram by Poisson regression on a polynomial of degree 7 (Lindsey's method); p0 is the share of z in
    the middle (within 1 sd of the null) over what the null has there, at most 1; an empirical null is the normal law of largest
    likelihood among z within 1.5 sd of the median, truncated there, of sd at least 1. ``lfdr`` never rises away from the centre.
    NaN stays NaN; with fewer than 200 values there is no density, ``lfdr`` is NaN and the null theoretical.

    Source: Efron, JASA 99:96, 2004, and Large-Scale Inference, 2010, ch. 5 and 6 (``locfdr``). Cannot see: dependence; nulls in the tails
    only, where it extrapolates.
    """
    if null not in ("theoretical", "empirical"):
        raise DataError(f"null={null!r} was given; it is 'theoretical' or 'empirical'")
    z = np.asarray(z, dtype=float)
    there = np.isfinite(z)
    v = z[there]
    out = np.full(z.shape, np.nan)
    if len(v) < FEWEST:
        return LocalFDR(out, 1.0, 0.0, 1.0)
    mean, sd = (0.0, 1.0) if null == "theoretical" else _empirical_null(v)
    middle = np.abs(v - mean) <= CENTRE * sd
    p0 = min(1.0, float(middle.mean() / (2 * stats.norm.cdf(CENTRE) - 1)))
    density = _density(v)
    value = np.minimum(1.0, p0 * stats.norm.pdf(v, mean, sd) / density)
    for side in (v >= mean, v < mean):
        order = np.flatnonzero(side)[np.argsort(np.abs(v[side] - mean), kind="stable")]
        value[order] = np.minimum.accumulate(value[order])
    out[there] = value
    return LocalFDR(out, p0, mean, sd)


# -- parts ---------------------------------------------------------------------------------------------------------------------


def _groups(data: PerturbationData, pairs: Sequence[str] | None) -> tuple[list[str], dict[str, NDArray[np.int64]]]:
    """Pairs to test, and the rows of every group that they need."""
    members = pd.Series(np.arange(len(data))).groupby(np.asarray(data.labels, dtype=str)).indices
    rows = {k: v for k, v in members.items() if len(v) > 1}  # one cell has no variance
    complete = [p for p in rows if p.count(data.separator) == 1 and all(part in rows for part in p.split(data.separator))]
    if pairs is None:
        names = sorted(complete)
    else:
        names = [data._canonical(p) for p in ([pairs] if isinstance(pairs, str) else pairs)]
        for name in names:
            if name not in complete:
                raise DataError(f"{name!r} is no pair with two cells of it and of each part alone{nearest(name, complete)}")
    if data.control not in rows or not names:
        raise DataError("the screen has no pair whose parts, and whose control, were measured in two cells at least; nothing can be tested")
    return names, rows


def _deviations(data: PerturbationData, rows: NDArray[np.int64]) -> Array:
    """What each cell adds to the deviation of its group's value, [n, G]; their squares sum to the group's variance."""
    shares, n = _shares(data, rows), len(rows)
    shares = np.asarray(shares.toarray() if sp.issparse(shares) else shares)
    rate = shares.mean(0)
    slope = 1e4 / (1 + 1e4 * rate) if data.kind == "counts" else 1.0
    return slope * (shares - rate) / np.sqrt(n * (n - 1))


def _at_rate(value: Array, library_size: NDArray[np.float32], theta: Array) -> Array:
    """Variance of log1p of mean CP10k of negative binomial cells whose expectation is ``value``, [G]."""
    n, inverse = len(library_size), float((1 / library_size.astype(np.float64)).sum())
    rate = np.maximum(np.expm1(value) / 1e4, 1e-12)
    return (1e4 / (1 + 1e4 * rate)) ** 2 * (rate * inverse / n + rate**2 / theta) / n


def _empirical_null(v: Array) -> tuple[float, float]:
    median = float(np.median(v))
    width = 1.5 * max(float(np.subtract(*np.percentile(v, [75, 25]))) / 1.349, 1e-6)
    inside = v[np.abs(v - median) <= width]

    def loss(parameters: Array) -> float:
        mean, sd = parameters[0], np.exp(parameters[1])
        mass = stats.norm.cdf(median + width, mean, sd) - stats.norm.cdf(median - width, mean, sd)
        return float(-(stats.norm.logpdf(inside, mean, sd) - np.log(max(mass, 1e-300))).mean())

    found = minimize(loss, [median, np.log(width / 1.5)], method="Nelder-Mead", options={"xatol": 1e-5, "fatol": 1e-9})
    return float(found.x[0]), max(1.0, float(np.exp(found.x[1])))


def _density(v: Array) -> Array:
    """Density of v at v, by Poisson regression of a histogram."""
    low, high = np.percentile(v, [0.1, 99.9])
    low, high = min(low, -4.0), max(high, 4.0)
    clipped = np.clip(v, low, high)
    count, edges = np.histogram(clipped, bins=BINS, range=(low, high))
    centre = (edges[:-1] + edges[1:]) / 2
    scale = (high - low) / 2
    basis, r = np.linalg.qr(np.vander((centre - (low + high) / 2) / scale, DEGREE + 1))
    eta = np.log(count + 0.5)
    for _ in range(50):  # iteratively reweighted least squares
        mu = np.exp(eta)
        root = np.sqrt(mu)[:, None]
        beta = np.linalg.lstsq(root * basis, root[:, 0] * (eta + (count - mu) / mu), rcond=None)[0]
        new = np.clip(basis @ beta, -30.0, 30.0)
        if np.abs(new - eta).max() < 1e-8:
            break
        eta = new
    at = np.vander((clipped - (low + high) / 2) / scale, DEGREE + 1) @ np.linalg.solve(r, beta)
    return np.maximum(np.exp(np.clip(at, -30.0, 30.0)), 1e-3) / (len(v) * (edges[1] - edges[0]))


def _benjamini_hochberg(p: Array) -> Array:
    out = np.full(p.shape, np.nan)
    there = np.isfinite(p)
    if there.any():
        out[there] = stats.false_discovery_control(p[there], method="bh")
    return out


def _running_mean(lfdr: Array) -> Array:
    """Mean of all local FDRs that are at most as large, [n]; NaN stays."""
    out = np.full(lfdr.shape, np.nan)
    there = np.flatnonzero(np.isfinite(lfdr))
    order = there[np.argsort(lfdr[there], kind="stable")]
    out[order] = np.cumsum(lfdr[order]) / np.arange(1, len(order) + 1)
    return out
