"""Effects of perturbations in closed form: what the baselines of the collection estimate, with the law of each estimate.

Per gene g, with condition means ``y`` on the scale of :func:`~pyrocausal.evaluate.measured_effects` (log1p of mean CP10k for counts,
the data's own otherwise), c the control and p a single perturbation::

    y_c ~ Normal(a, s_c^2)          a: mean of untreated cells
    y_p ~ Normal(a + e_p, s_p^2)    e_p: effect
    s_p^2 = V_p / n_p,  V_p = ((n_p - 1) v_p + d0 v) / (n_p - 1 + d0)      v_p: variance of a cell (delta method), v: pooled, d0 = 10

All conditions share the noise of y_c, so that the estimates of two effects are correlated; an :class:`Estimate` keeps that, and a sum of
effects has the right variance. Only single perturbations and control cells are read here: what is predicted of a combination never saw one
(:mod:`pyrocausal.shrunk_interactions` adds what combinations themselves tell).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
import scipy.sparse as sp
from numpy.typing import NDArray

from pyrocausal.data import PerturbationData
from pyrocausal.errors import DataError
from pyrocausal.evaluate import _totals

Array = NDArray[np.float64]
PRIOR_CELLS = 10.0  # d0: cells that the pooled variance counts for
PRIOR_PERTURBATIONS = 4.0  # perturbations that the geometric mean of tau^2 / v over genes counts for
PRIOR_GENES = 20.0  # genes that a perturbation of average strength counts for
SILENT = 1e-4  # least variance of a gene, in units of the mean over genes: a gene without a count is not known to be zero
VAGUE = 10.0  # width of a prior that has little say, in units of what it is of
NEIGHBOURS = (1, 5, 10, 20)
NOTHING = 1e-12  # rho of a shift that is not there
RATIOS = 10.0 ** np.arange(-6, 3.1, 0.2)
PENALTIES = 10.0 ** np.arange(-3, 4.5, 0.5)


@dataclass(frozen=True)
class Conditions:
    """Means of the control and of the single perturbations of a screen.

    Attributes:
        control, control_variance: y_c and s_c^2, [G].
        rows: columns of the perturbations that have cells of their own, [n] int64.
        mean, variance: y_p and s_p^2, [n, G].
        n_cells: [n].
        unit_variance: v, [G].
    """

    control: Array
    control_variance: Array
    rows: NDArray[np.int64]
    mean: Array
    variance: Array
    n_cells: Array
    unit_variance: Array

    @property
    def effect(self) -> Array:
        """y_p - y_c, [n, G]."""
        return self.mean - self.control

    @property
    def spread(self) -> Array:
        """Variance of effects about zero, ``[mean_p (y_p - y_c)^2 - s_p^2 - s_c^2]_+``, [G]."""
        return np.maximum((self.effect**2 - self.variance).mean(0) - self.control_variance, 0.0)


@dataclass(frozen=True)
class Estimate:
    """The joint law of untreated mean a, shared shift m and effects e, independent over genes::

        m ~ Normal(shared, shared_sd^2)
        a ~ Normal(control + control_on_shared (m - shared), control_sd^2)
        e_p ~ Normal(effect_p + on_control_p (a - control) + on_shared_p (m - shared), effect_sd_p^2)

    Attributes:
        shared, shared_sd, control, control_sd, control_on_shared: [G].
        effect, effect_sd, on_control, on_shared: [P, G].
        prior_shared, prior_effect: standard deviations of the prior of m [G] and of e_p about m [P, G].
    """

    shared: Array
    shared_sd: Array
    control: Array
    control_sd: Array
    control_on_shared: Array
    effect: Array
    effect_sd: Array
    on_control: Array
    on_shared: Array
    prior_shared: Array
    prior_effect: Array


def conditions_of(data: PerturbationData, n_prior: float = PRIOR_CELLS) -> Conditions:
    """Condition means of a screen with their moderated sampling variances."""
    size = np.diff(data.dose.indptr)
    column = np.full(len(data), -1)
    column[size == 1] = data.dose.indices[data.dose.indptr[:-1][size == 1]]
    rows = np.unique(column[column >= 0])
    if not (size == 0).any() or not len(rows):
        raise DataError(
            f"{int((size == 0).sum())} control cells and {len(rows)} single perturbations were given; a baseline needs one of each at least"
        )
    n, mean, variance, pooled = moderated_means(data, [np.flatnonzero(size == 0), *(np.flatnonzero(column == p) for p in rows)], n_prior)
    return Conditions(mean[0], variance[0], rows.astype(np.int64), mean[1:], variance[1:], n[1:], pooled)


def moderated_means(
    data: PerturbationData, groups: list[NDArray[np.int64]], n_prior: float = PRIOR_CELLS, pooled: Array | None = None
) -> tuple[Array, Array, Array, Array]:
    """Cells [n] and means [n, G] of groups of cells, with their sampling variances, moderated by the ``pooled`` variance of a cell [G]
    (of these groups, if it is not given), and the latter."""
    totals = [_totals(data, rows) for rows in groups]
    n, mean = np.array([t.n for t in totals], dtype=float), np.stack([t.value for t in totals])
    own = np.nan_to_num(np.stack([t.variance for t in totals])) * n[:, None]
    freedom = (n - 1)[:, None]
    if pooled is None:
        pooled = (freedom * own).sum(0) / max(freedom.sum(), 1.0)
        pooled = np.maximum(pooled, SILENT * pooled.mean() + 1e-12)
    return n, mean, (freedom * own + n_prior * pooled) / (freedom + n_prior) / n[:, None], pooled


def unbiased_effects(c: Conditions, n_perturbations: int) -> Estimate:
    """``e_p = y_p - a`` as measured, under a flat prior; ``Normal(0, spread)`` for a perturbation without cells of its own."""
    out = _same(c, n_perturbations, np.zeros_like(c.control), np.sqrt(c.spread), on_control=0.0)
    return _with_measured(out, c)


def shrunk_effects(c: Conditions, n_perturbations: int, iterations: int = 60, shared: bool = True) -> Estimate:
    """Empirical Bayes: effects of a common size by gene and by perturbation, shrunk as their noise asks, the control among them.

    ::

        e_pg ~ Normal(m_g, k_p tau_g^2),   m_g ~ Normal(0, rho tau_g^2),   flat a
        E[e_pg | a, m, y] = m_g + w_pg (y_pg - a_g - m_g),   Var = w_pg s_pg^2,   w_pg = k_p tau_g^2 / (k_p tau_g^2 + s_pg^2)

    tau, k (of mean 1) and rho (on a grid) maximise the marginal likelihood, by expectation-maximisation; ``tau^2 / v`` is moderated
    towards its geometric mean over genes by ``PRIOR_PERTURBATIONS``, k towards its mean by ``PRIOR_GENES``, which makes intervals of the
    least responsive genes wide. The control mean is estimated together with all others: where perturbations do little, their cells tell
    it too. With m = 0, k = 1, tau by moments and a held at y_c this is James and Stein's rule gene by gene.

    Args:
        shared: whether perturbations share a shift; if not, m = 0.

    Source: Efron and Morris 1973; Efron 2010, ch. 1. Cannot see: heavy tails of effects within a gene (few large ones are shrunk as
    their gene and perturbation ask), interactions.
    """
    y, s = c.mean, c.variance
    strength, rho = np.ones((len(y), 1)), 0.1 if shared else NOTHING
    live = live_genes(c.unit_variance)
    tau = c.unit_variance * max(float((c.spread / c.unit_variance)[live].mean()), 1e-8)
    for _ in range(iterations):
        a, m, va, vm, cov, w = _joint(c, strength * tau, rho * tau)
        deviation = w * (y - a - m)
        square = deviation**2 + w * s + w**2 * (va + vm + 2 * cov)
        tau, strength = common_sizes(square, strength, c.unit_variance)
        rho = _shared(c, strength * tau, tau) if shared else NOTHING
    a, m, va, vm, cov, w = _joint(c, strength * tau, rho * tau)
    effect, sd = np.tile(m, (n_perturbations, 1)), np.tile(np.sqrt(tau), (n_perturbations, 1))
    on_control, prior = np.zeros_like(effect), sd.copy()
    on_shared = np.ones_like(effect)
    effect[c.rows], sd[c.rows], prior[c.rows] = m + w * (y - a - m), np.sqrt(w * s), np.sqrt(strength * tau)
    on_control[c.rows], on_shared[c.rows] = -w, 1 - w
    slope = cov / vm
    return Estimate(
        m, np.sqrt(vm), a, np.sqrt(np.maximum(va - slope * cov, 1e-16)), slope, effect, sd, on_control, on_shared, np.sqrt(rho * tau), prior
    )


def common_sizes(square: Array, strength: Array, unit_variance: Array) -> tuple[Array, Array]:
    """tau^2 [G] and k [n, 1], of mean 1, from expected squares [n, G] of what has the variance k tau^2, given the k before; moderated."""
    n, n_genes = square.shape
    each = (square / strength).mean(0) / unit_variance
    typical = np.exp(np.log(np.maximum(each[live_genes(unit_variance)], 1e-12)).mean())
    tau = unit_variance * (n * each + PRIOR_PERTURBATIONS * typical) / (n + PRIOR_PERTURBATIONS)
    strength = ((square / tau).sum(1, keepdims=True) + PRIOR_GENES) / (n_genes + PRIOR_GENES)
    scale = strength.mean()
    return tau * scale, strength / scale


def live_genes(unit_variance: Array) -> NDArray[np.bool_]:
    """All genes, or all but the silent ones."""
    live: NDArray[np.bool_] = unit_variance > 1.01 * unit_variance.min()
    return live if live.any() else ~live


def constant_effects(c: Conditions, n_perturbations: int, value: str, weights: str = "perturbation") -> Estimate:
    """The same effect for every perturbation: ``"zero"``, or the ``"mean"`` of the training perturbations, with weights equal by
    ``"perturbation"`` or by ``"cell"``. Its sd is how far effects scatter about it, sampling noise taken out."""
    if value == "zero":
        return _same(c, n_perturbations, np.zeros_like(c.control), np.sqrt(c.spread), on_control=0.0)
    mean, sd = _mean_effect(c, weights)
    return _same(c, n_perturbations, mean, sd, on_control=-1.0)


def matching_effects(c: Conditions, n_perturbations: int) -> Estimate:
    """As measured; the mean effect for a perturbation without cells of its own."""
    return _with_measured(constant_effects(c, n_perturbations, "mean"), c)


def neighbour_effects(c: Conditions, embedding: Array, k: int | None = None, measured: bool = True) -> Estimate:
    """``e_p = 1/k sum over the k most similar training perturbations (cosine) of y_q - y_c``, [P, G] from an embedding [P, E].

    k of None: of 1, 5, 10, 20 the one with the least leave-one-out error. The sd of a prediction is the leave-one-out error, gene by
    gene, sampling noise of the left-out effect taken out. A perturbation with a zero vector has the mean effect.

    Args:
        measured: a perturbation with cells of its own has its measured effect (it is its own neighbour).
    """
    known = _embedded(c, embedding)
    train, unit = embedding[c.rows[known]], embedding / np.maximum(np.linalg.norm(embedding, axis=1, keepdims=True), 1e-300)
    d, noise = c.effect[known], c.variance[known].mean(0) + c.control_variance
    similarity = unit @ (train / np.linalg.norm(train, axis=1, keepdims=True)).T  # [P, n]
    others = similarity[c.rows[known]] - 9.0 * np.eye(len(train))
    if k is not None and not 1 <= k <= len(train):
        raise DataError(f"k={k} neighbours were asked for, but {len(train)} training perturbations have an embedding; give 1 to so many")
    choices = [q for q in NEIGHBOURS if q < len(train)] or [1]
    if len(train) > 1:
        errors = {q: (_nearest(others, q) @ d - d) ** 2 for q in (choices if k is None else [min(k, len(train) - 1)])}
        best = min(errors, key=lambda q: float(errors[q].mean()))
        residual = errors[best].mean(0)
    else:
        best, residual = 1, c.spread + noise
    out = _predicted(c, embedding, _nearest(similarity, best if k is None else k) @ d, np.sqrt(np.maximum(residual - noise, 0.0)))
    return _with_measured(out, c) if measured else out


def ridge_effects(c: Conditions, embedding: Array, penalty: float | None = None, measured: bool = True) -> Estimate:
    """``e_p = b + x_p B``, ridge regression of measured effects on an embedding [P, E], intercept free, genes together.

    ``x`` is the embedding less its training mean, over the root of its mean squared training norm, and
    ``B = (X'X + penalty I)^-1 X' (y - y_c - b)``; a penalty of None is the one of ``PENALTIES`` times n / E with the least leave-one-out
    error (in closed form, from the hat matrix). ``measured`` and the sd as in :func:`neighbour_effects`, times ``1 + h_p``.
    """
    known = _embedded(c, embedding)
    rows = c.rows[known]
    d, noise, n = c.effect[known], c.variance[known].mean(0) + c.control_variance, int(known.sum())
    centre = embedding[rows].mean(0)
    size = np.sqrt(((embedding[rows] - centre) ** 2).sum(1).mean())
    x = (embedding - centre) / (size if size > 0 else 1.0)
    u, w, vt = np.linalg.svd(x[rows], full_matrices=False)
    b = d.mean(0)

    def left_out(lam: float) -> Array:
        hat = (u * (w**2 / (w**2 + lam))) @ u.T + 1 / n
        return (d - hat @ d) / np.maximum(1 - np.diag(hat), 1e-9)[:, None]

    grid = PENALTIES * n / x.shape[1] if penalty is None else [penalty]
    best = float(min(grid, key=lambda lam: float((left_out(lam) ** 2).mean())) if n > 1 else grid[-1])
    turned = x @ vt.T  # [P, rank]
    value = b + turned @ ((w / (w**2 + best))[:, None] * (u.T @ (d - b)))
    leverage = 1 / n + (turned**2 / (w**2 + best)).sum(1)
    residual = (left_out(best) ** 2).mean(0) if n > 1 else c.spread + noise
    sd = np.sqrt(np.maximum(residual - noise, 0.0)) * np.sqrt(1 + leverage)[:, None]
    out = _predicted(c, embedding, value, sd)
    return _with_measured(out, c) if measured else out


def linear_embedding_effects(
    c: Conditions,
    own_genes: NDArray[np.int64],
    genes: Array | None = None,
    embedding: Array | None = None,
    d: int = 10,
    penalty: float = 0.1,
) -> Estimate:
    """The linear model with gene and perturbation embeddings of Ahlmann-Eltze, Huber and Anders.

    ::

        Y [G, n + 1]: y_p - y_c of the training perturbations and the control's zeros;  b = row means of Y
        K = (A'A + penalty I)^-1 A' (Y - b) P' (P P' + penalty I)^-1,   e_p = A K P_p + b

    Args:
        own_genes: column of the gene that each perturbation targets, -1 if it is not measured, [P].
        genes: A [G, d]; None for the first d principal components of the genes over the training means (genes as samples, centred).
        embedding: P_p, rows of [P, d']; None for the rows of A of the targeted genes. The control's is zero.

    A perturbation without embedding has the effect b. The sd is that of the leave-one-out residuals, with A and b held (from the hat
    matrix), sampling noise taken out.

    Source: Nature Methods 22:1657, 2025, ``run_linear_pretrained_model.R``.
    """
    n, n_genes, n_perturbations = len(c.rows), len(c.control), len(own_genes)
    if genes is None:
        bulk = np.vstack([c.mean, c.control]).T
        u, w, _ = np.linalg.svd(bulk - bulk.mean(0), full_matrices=False)
        d = min(d, len(w))
        genes = u[:, :d] * w[:d]
    if len(genes) != n_genes:
        raise DataError(f"a gene embedding of {len(genes)} rows was given for {n_genes} genes; give a row for each")
    if embedding is None:
        embedding = np.where((own_genes >= 0)[:, None], genes[own_genes], 0.0)
    _embedded(c, embedding)
    y = np.vstack([c.effect, np.zeros(n_genes)]).T
    b = y.mean(1)
    p = np.vstack([embedding[c.rows], np.zeros(embedding.shape[1])]).T  # [d', n + 1]
    left = np.linalg.solve(genes.T @ genes + penalty * np.eye(genes.shape[1]), genes.T)  # [d, G]
    right = np.linalg.solve(p @ p.T + penalty * np.eye(len(p)), embedding.T)  # [d', P]
    smooth = genes @ (left @ (y - b[:, None]))  # [G, n + 1]
    hat = p.T @ right  # [n + 1, P]
    value = (smooth @ hat).T + b
    own = hat[np.arange(n), c.rows]
    out_of = (value[c.rows] - b - own[:, None] * smooth.T[:n]) / np.maximum(1 - own, 1e-9)[:, None] + b
    noise = c.variance.mean(0) + c.control_variance
    sd = np.sqrt(np.maximum(((c.effect - out_of) ** 2).mean(0) - noise, 0.0))
    out = _same(c, n_perturbations, b, sd, on_control=-1.0)
    return _replaced(out, value, np.tile(sd, (n_perturbations, 1)))


def embedding_of(table: NDArray[np.floating] | pd.DataFrame | None, data: PerturbationData, n_components: int = 20) -> Array:
    """An embedding [P, E]: the given one, or that of the perturbed genes in the control cells (zero where they are not measured)."""
    from pyrocausal.embeddings import control_pca

    if table is not None:
        out = np.asarray(table, dtype=float)
        if out.ndim != 2 or len(out) != len(data.perturbations) or not np.isfinite(out).all():
            raise DataError(
                f"an embedding of shape {out.shape} was given for {len(data.perturbations)} perturbations; give a finite row for each"
            )
        return out
    if not data.genes.isin(data.perturbations).any():
        raise DataError(
            "no perturbation of the screen has the name of a measured gene, so that it has no embedding; "
            "give embedding= (see pyrocausal.embeddings), or take mean_perturbed"
        )
    most = min(len(data.genes), int(data.is_control.sum())) - 1
    return control_pca(data, n_components=max(1, min(n_components, most)), missing="mean").to_numpy()


def noise_of(data: PerturbationData) -> tuple[Array, str]:
    """Within conditions: theta [G] of counts by moments, ``sum mu^2 / sum ((x - mu)^2 - mu)``, or sigma [G], and the parameter's name."""
    codes = np.unique(data.labels.astype(str), return_inverse=True)[1]
    group = sp.csr_matrix((np.ones(len(codes)), (codes, np.arange(len(codes)))))  # [conditions, cells]
    library = data.library_size.astype(np.float64)
    mean = np.asarray((group @ data.x).toarray() if sp.issparse(data.x) else group @ data.x) / (group @ library)[:, None]
    squares = (group @ (library**2))[:, None] * mean**2
    x = data.x.astype(np.float64)
    total = np.asarray((x.multiply(x) if sp.issparse(x) else x * x).sum(0)).ravel()
    weighted = sp.diags(library) @ x
    crossed = np.asarray((group @ weighted).toarray() if sp.issparse(weighted) else group @ weighted)
    residual = np.maximum(total - 2 * (mean * crossed).sum(0) + squares.sum(0), 0.0)
    if data.kind != "counts":
        return np.sqrt(np.maximum(residual, SILENT * residual.mean() + 1e-12) / max(len(codes) - group.shape[0], 1)), "log_sigma"
    excess = residual - (mean * (group @ library)[:, None]).sum(0)
    return np.clip(squares.sum(0) / np.maximum(excess, 1e-12), 1e-2, 1e4), "log_theta"


# -- parts ---------------------------------------------------------------------------------------------------------------------


def _joint(c: Conditions, between: Array, shared: Array) -> tuple[Array, Array, Array, Array, Array, Array]:
    """Posterior means of a and m, their variances and covariance, all [G], and the weights w [n, G]; variances ``between`` [n, G],
    ``shared`` [G] of the prior."""
    weight = 1 / (between + c.variance)
    total, pull = weight.sum(0), (weight * c.mean).sum(0)
    aa, mm = 1 / c.control_variance + total, 1 / shared + total  # precisions; the mixed one is ``total``
    determinant = aa * mm - total**2
    right_a, right_m = c.control / c.control_variance + pull, pull
    a, m = (mm * right_a - total * right_m) / determinant, (aa * right_m - total * right_a) / determinant
    return a, m, mm / determinant, aa / determinant, -total / determinant, between * weight


def _shared(c: Conditions, between: Array, tau: Array) -> float:
    """rho of largest likelihood: ``y_. - y_c ~ Normal(0, rho tau^2 + 1 / W + s_c^2)``, y_. the mean of the y_p by weights of sum W."""
    weight = 1 / (between + c.variance)
    total = weight.sum(0)
    contrast, noise = (weight * c.mean).sum(0) / total - c.control, 1 / total + c.control_variance
    variance = RATIOS[:, None] * tau + noise
    return float(RATIOS[int((np.log(variance) + contrast**2 / variance).sum(1).argmin())])


def _same(c: Conditions, n: int, value: Array, sd: Array, on_control: float) -> Estimate:
    """One effect [G] with its scatter [G] for all n perturbations, a as measured."""
    table, zero = np.zeros((n, len(value))), np.zeros_like(value)
    return Estimate(
        shared=zero,
        shared_sd=zero,
        control=c.control,
        control_sd=np.sqrt(c.control_variance),
        control_on_shared=zero,
        effect=table + value,
        effect_sd=table + sd,
        on_control=table + on_control,
        on_shared=table,
        prior_shared=zero,
        prior_effect=table + VAGUE * np.sqrt((c.effect**2).mean(0)),
    )


def _replaced(e: Estimate, effect: Array, sd: Array) -> Estimate:
    return Estimate(**{**vars(e), "effect": effect, "effect_sd": sd})


def _with_measured(e: Estimate, c: Conditions) -> Estimate:
    """Perturbations with cells of their own have the effect ``y_p - a``."""
    effect, sd, on_control = e.effect.copy(), e.effect_sd.copy(), e.on_control.copy()
    effect[c.rows], sd[c.rows], on_control[c.rows] = c.effect, np.sqrt(c.variance), -1.0
    return Estimate(**{**vars(e), "effect": effect, "effect_sd": sd, "on_control": on_control})


def _mean_effect(c: Conditions, weights: str = "perturbation") -> tuple[Array, Array]:
    if weights not in ("perturbation", "cell"):
        raise DataError(f"weights={weights!r} was given; perturbations are weighted equally ('perturbation') or by their cells ('cell')")
    share = np.ones(len(c.rows)) if weights == "perturbation" else c.n_cells
    share = share / share.sum()
    mean = share @ c.effect
    freedom = max(1 - float((share**2).sum()), 1e-9)
    scatter = (share @ (c.effect - mean) ** 2) / freedom - share @ c.variance if len(share) > 1 else c.spread
    return mean, np.sqrt(np.maximum(scatter, 0.0))


def _embedded(c: Conditions, embedding: Array) -> NDArray[np.bool_]:
    """Training perturbations with an embedding, [n]; refused if there is none."""
    known = (embedding[c.rows] != 0).any(1)
    if not known.any():
        raise DataError(
            "the embedding is zero for every perturbation of the training cells; give embedding= for those, or take mean_perturbed"
        )
    return known


def _predicted(c: Conditions, embedding: Array, value: Array, sd: Array) -> Estimate:
    """Predictions [P, G] where there is an embedding, the mean effect elsewhere."""
    mean, scatter = _mean_effect(c)
    there = (embedding != 0).any(1)[:, None]
    out = _same(c, len(embedding), mean, scatter, on_control=-1.0)
    return _replaced(out, np.where(there, value, mean), np.where(there, sd, scatter))


def _nearest(similarity: Array, k: int) -> Array:
    """Weights 1/k of the k most similar in each row, [rows, n]; ties go to the first."""
    order = np.argsort(-similarity, axis=1, kind="stable")[:, :k]
    out = np.zeros_like(similarity)
    np.put_along_axis(out, order, 1.0 / k, axis=1)
    return out
