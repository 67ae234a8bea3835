"""The estimate behind ``guides.SCM``: a network of genes, and what each perturbation shifts, in turn; and draws around them.

:class:`Moments` are what is read of a screen, :class:`Network` the estimate. Equations and what is assumed are in ``models/scm.py`` and
``guides/scm.py``, the search in :mod:`pyrocausal.dag_search`.

A perturbation that shifts gene k by itself must not be taken for an effect of what else it moved. So condition means count in the
regression of k for ``1 / (1 + n_p v_pk / sigma_k^2)`` of what their cells do, v_pk the variance of off-target shifts, and networks and
variances are found in turn, ``ROUNDS`` times.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from pyrocausal.closed_form import SILENT, Conditions, Estimate, conditions_of, shrunk_effects
from pyrocausal.dag_search import RIDGE, Array, Edges, Regressions, Score, Walk, regress
from pyrocausal.data import PerturbationData
from pyrocausal.errors import DataError

ROUNDS, SEARCH = 3, 20  # of networks and variances in turn; steps of the walk in each
HALVES = 10  # of the cells, for where effects are shrunk
STEPS = 3  # of the walk from one member to the next
CARRIED = 50.0  # cells that carry the variance of a gene with edges
MOST_GENES = 500  # products of all genes are kept for each gene: 1 GB
NEVER = 1e9  # variance of a mean that counts for nothing, in units of sigma^2
Shrink = Literal["auto", "equations", "expression"]


class Network:
    """The estimate, and draws around it; see the module's docstring."""

    def __init__(self, conditions: Conditions, targets: Edges, intervention: str, n_control: int, unit: Array) -> None:
        self.c, self.targets, self.intervention, self.n_control, self.unit = conditions, targets, intervention, n_control, unit
        self.walk: Walk
        self.edges: Edges
        self.here: Edges  # of the walk
        self.in_equations = True
        self.floor = SILENT * (unit**2).mean() + 1e-12  # of variances

    @classmethod
    def of(
        cls, data: PerturbationData, targets: Edges, intervention: str, shrink: Shrink, gamma: float, rng: np.random.Generator
    ) -> Network:
        """Networks and variances in turn, then the coordinates of effects."""
        if len(data.genes) > MOST_GENES:
            raise DataError(
                f"{len(data.genes)} genes were given, and scm has room for {MOST_GENES}: take those that vary most, or modules of genes "
                "(pyrocausal.dynamics.coarse)"
            )
        moments = Moments.of(data, targets)
        unit = np.sqrt(np.maximum(moments.within.diagonal() / max(len(data) - len(moments.n), 1), 1e-8))
        found = cls(conditions_of(data), targets, intervention, int((np.diff(data.dose.indptr) == 0).sum()), unit)
        share, edges = np.ones_like(moments.mean), None
        for _ in range(ROUNDS):
            found.walk = Walk(Score(moments.regressions(share), gamma), rng)
            edges = found.walk.start(edges)
            best, score = edges, found.walk.score.total(edges)
            for _ in range(SEARCH):
                edges = found.walk.step(edges)
                if (now := found.walk.score.total(edges)) > score:
                    best, score = edges, now
            edges = best
            found.settle(edges)
            off = (moments.dose != 0) @ (found.off_scale**2)
            share = 1 / (1 + moments.n[:, None] * off / found.variance)
        found.in_equations = shrink == "equations" or (shrink == "auto" and found.prefers_equations(data, rng))
        if not found.in_equations:
            found.law = shrunk_effects(found.c, len(targets))
            found.baseline = found.law.control
            spread = found.law.prior_effect**2 @ (np.eye(len(found.A)) - found.A) ** 2
            found.off_scale = np.maximum(np.sqrt(spread), 1e-6 * found.unit)
        return found

    def prefers_equations(self, data: PerturbationData, rng: np.random.Generator) -> bool:
        """Whether effects of a half of the cells, shrunk as shifts of equations, are nearer to the other half's than as expression: by two
        standard errors over perturbations, in sum over ``HALVES`` random halves."""
        if self.n_control < 4 or (self.c.n_cells >= 4).sum() < 2:  # no two halves to speak of
            return False
        groups = list(pd.Series(np.arange(len(data))).groupby(np.asarray(data.labels, dtype=str)).indices.values())
        lead = np.zeros(len(self.targets))
        for _ in range(HALVES):
            first = np.zeros(len(data), bool)
            for rows in groups:
                first[rng.permutation(rows)[: -(-len(rows) // 2)]] = True
            one, two = (conditions_of(data[np.flatnonzero(rows)]) for rows in (first, ~first))
            both = np.intersect1d(one.rows, two.rows)
            here, there = np.searchsorted(one.rows, both), np.searchsorted(two.rows, both)
            counts = ~self.targets[both]
            error = []
            for A, law in ((self.A, self.shifts(self.A, one)), (0 * self.A, shrunk_effects(one, len(self.targets)))):
                inner = np.where(counts, law.control + law.effect[both], one.mean[here] @ (np.eye(len(A)) - A))  # targets as measured
                error.append((((inner @ self.reach(A) - two.mean[there]) ** 2 / two.variance[there]) * counts).sum(1))
            lead[both] += error[1] - error[0]
        seen = lead[self.c.rows]
        return bool(seen.sum() > 2 * np.sqrt(len(seen)) * seen.std())

    def settle(self, edges: Edges) -> None:
        """Weights and effects of the best network."""
        self.edges = self.here = edges
        self.A, variance = regress(self.walk.score.r, edges)
        self.variance = np.maximum(variance, self.floor)
        self.law = self.shifts(self.A)
        self.baseline = self.law.control @ self.reach(self.A)
        self.off_scale = np.maximum(self.law.prior_effect, 1e-6 * self.unit)

    @staticmethod
    def reach(A: Array) -> Array:
        return np.asarray(np.linalg.inv(np.eye(len(A)) - A))

    def shifts(self, A: Array, c: Conditions | None = None) -> Estimate:
        """Law of the intercepts and of the shifts of equations, given the network; of other cells' conditions, if they are given."""
        c = self.c if c is None else c
        variance = np.where(self.targets[c.rows], NEVER, 1.0) * self.variance / c.n_cells[:, None]
        system = np.eye(len(A)) - A
        n_control = self.n_control * (c.n_cells.sum() / self.c.n_cells.sum())
        inner = Conditions(c.control @ system, self.variance / n_control, c.rows, c.mean @ system, variance, c.n_cells, self.variance)
        return shrunk_effects(inner, len(self.targets))

    def point(self) -> dict[str, Array]:
        return self._tables(self.edges, self.A, self.law.control, self.law.effect, self.c.mean, self.level_prior()[0])

    def member(self, rng: np.random.Generator) -> dict[str, Array]:
        """The next network of the walk, with weights and effects drawn given it."""
        for _ in range(STEPS):
            self.here = self.walk.step(self.here)
        r, d = self.walk.score.r, len(self.here)
        A, variance = regress(r, self.here)
        variance = np.maximum(variance, self.floor)
        for k in range(d):  # a law for each gene: parents differ
            S = np.flatnonzero(self.here[:, k])
            if len(S):
                root = np.linalg.cholesky(r.cross[k][np.ix_(S, S)] + RIDGE * np.diag(r.cross[k].diagonal()[S]))
                A[S, k] += np.sqrt(variance[k]) * np.linalg.solve(root.T, rng.standard_normal(len(S)))
        law, noise = self.shifts(A) if self.in_equations else self.law, rng.standard_normal
        m = law.shared + law.shared_sd * noise(d)
        a = law.control + law.control_on_shared * (m - law.shared) + law.control_sd * noise(d)
        e = law.effect + law.on_control * (a - law.control) + law.on_shared * (m - law.shared) + law.effect_sd * noise(law.effect.shape)
        mean = self.c.mean + np.sqrt(self.c.variance) * noise(self.c.mean.shape)
        prior, scale = self.level_prior()
        return self._tables(self.here, A, a, e, mean, prior + scale * noise(len(prior)))

    def level_prior(self) -> tuple[Array, Array]:
        """Of the change of a target that no cell has shown, [P] each: as those that were seen, in units of the spread of each gene."""
        unit = self.targets @ self.unit
        unit[unit == 0] = 1.0
        p, g = np.nonzero(self.targets[self.c.rows])
        seen = (self.c.mean - self.baseline)[p, g] / self.unit[g]
        if len(seen) < 2:
            return np.zeros(len(unit)), 10.0 * unit
        return unit * seen.mean(), unit * max(float(seen.std(ddof=1)), 0.1)

    def _tables(self, edges: Edges, A: Array, a: Array, e: Array, mean: Array, unseen: Array) -> dict[str, Array]:
        system = np.eye(len(A)) - A
        if not self.in_equations:
            a, e = a @ system, e @ system
        b = a @ self.reach(A)
        level = unseen.copy()
        p, g = np.nonzero(self.targets[self.c.rows])
        change = mean - b if self.intervention == "do" else mean @ system - a
        level[self.c.rows[p]] = change[p, g]
        log_sigma = 0.5 * np.log(self.variance)
        return {"baseline": b, "edge": edges.astype(float), "weight": A, "log_sigma": log_sigma, "level": level, "off_target": e}


@dataclass(frozen=True)
class Moments:
    """Moments of the conditions (distinct treatments) of a screen.

    Attributes:
        dose: [C, P]. n: cells, [C]. mean: [C, G].
        within: products within conditions, [G, G]; ``free``: those of the cells that tell of gene k, [G, G, G].
        hit: genes whose equation a condition may have replaced, [C, G].
        able: genes whose variance enough cells carry, [G].
    """

    dose: Array
    n: Array
    mean: Array
    within: Array
    free: Array
    hit: Edges
    able: NDArray[np.bool_]

    @classmethod
    def of(cls, data: PerturbationData, targets: Edges) -> Moments:
        dose, code = np.unique(data.dose.toarray(), axis=0, return_inverse=True)
        code = code.ravel()
        x = data.dense(np.float64)
        n = np.bincount(code).astype(float)
        mean = np.stack([x[code == q].mean(0) for q in range(len(n))])
        x = x - mean[code]
        carried = 3 * (x**2).sum(0) ** 2 / np.maximum((x**4).sum(0), 1e-300)  # all cells, if it is normal
        within, hit = x.T @ x, (dose != 0).astype(float) @ targets > 0
        free = np.repeat(within[None], x.shape[1], 0)
        for k in np.flatnonzero(hit.any(0)):
            own = x[hit[code, k]]
            free[k] -= own.T @ own
        return cls(dose.astype(float), n, mean, within, free, hit, carried >= CARRIED)

    def regressions(self, share: NDArray[np.float64]) -> Regressions:
        """Condition means counting for ``share`` [C, G] of their cells."""
        weight = np.where(self.hit, 0.0, share * self.n[:, None])  # [C, G]
        cross = self.free.copy()
        for k in range(cross.shape[0]):
            w = weight[:, k]
            away = self.mean - w @ self.mean / w.sum()
            cross[k] += (away * w[:, None]).T @ away
        n = ((self.n - 1)[:, None] * ~self.hit).sum(0) + np.where(self.hit, 0.0, share).sum(0) - 1
        return Regressions(cross, n, self.able)
