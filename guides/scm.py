"""Guide of SCM: nothing to train. A walk over networks, and closed forms given each.

::

    networks     the best that a search finds, and a walk around it (:mod:`pyrocausal.dag_search`)
    weights      A_Sk ~ Normal((C^k_SS)^-1 C^k_Sk, sigma_k^2 (C^k_SS)^-1),   sigma_k^2 = RSS_k / (N_k - |S|)
    off targets  empirical Bayes, untreated cells and all perturbations together (:func:`pyrocausal.closed_form.shrunk_effects`), either
                 of shifts of the equations, ``x (I - A)``, where a target's own counts for nothing, or of expression: in those
                 coordinates in which the effects of one half of the cells say more of the other half
    levels       as measured, ``y_pT - b_T``; of a perturbation without cells as those of the others, in units of the genes' spread
    z            the cell, read back: ``((x - b)(I - A) - shift) / sigma``, with what the noise leaves open

A perturbation that shifts gene k by itself must not be taken for an effect of what else it moved. So condition means count in the
regression of k for ``1 / (1 + n_p v_pk / sigma_k^2)`` of what their cells do, v_pk the variance of off-target shifts, and networks and
variances are found in turn, ``ROUNDS`` times. Where unmeasured causes move many genes, as in most real screens, edges are not what
perturbations follow, and the second coordinates win: then effects are those of ``additive_eb``, and the network answers only for genes that
are held.

``draws`` members (network, weights, effects) are kept; ``member ~ Uniform`` picks one. While it trains, and with ``draws=0``, it is the
point: the best network, and the means.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import torch
from numpy.typing import NDArray
from pyro.nn import PyroModule
from torch import Tensor

from pyrocausal.closed_form import SILENT, Conditions, Estimate, conditions_of, shrunk_effects
from pyrocausal.dag_search import RIDGE, Array, Edges, Regressions, Score, Walk, regress
from pyrocausal.data import PerturbationData
from pyrocausal.errors import DataError, PyrocausalError
from pyrocausal.loading import Batch
from pyrocausal.structural import mechanism_shift

NOISE = 0.05  # of sigma, as the model's
ROUNDS, SEARCH = 3, 20  # of networks and variances in turn; steps of the walk in each
HALVES = 10  # of the cells, for where effects are shrunk
STEPS = 3  # of the walk from one member to the next
CARRIED = 50.0  # cells that carry the variance of a gene with edges
MOST_GENES = 500  # products of all genes are kept for each gene: 1 GB
NEVER = 1e9  # variance of a mean that counts for nothing, in units of sigma^2
Shrink = Literal["auto", "equations", "expression"]
TABLES = ("baseline", "edge", "weight", "log_sigma", "level", "off_target")


class SCM(PyroModule):
    """Members of a walk; arguments as the model's, and

    Args:
        draws: members; 0 leaves the point.
        shrink: where effects are shrunk, ``"equations"``, ``"expression"``, or ``"auto"``.
        gamma: of the penalty of an edge, ``log(N) / 2 + gamma log(G)``.
    """

    closed_form: ClassVar = True
    on_target: Tensor

    def __init__(
        self,
        n_genes: int,
        n_perturbations: int,
        own_genes: Sequence[int] | None = None,
        intervention: str = "do",
        draws: int = 50,
        shrink: Shrink = "auto",
        gamma: float = 0.5,
    ) -> None:
        super().__init__()
        if shrink not in get_args(Shrink):
            raise PyrocausalError(f"shrink={shrink!r} was given; choose one of {', '.join(get_args(Shrink))}")
        P, G = n_perturbations, n_genes
        self.draws, self.shrink, self.gamma, self.intervention = draws, shrink, gamma, intervention
        self.register_buffer("on_target", torch.zeros(P, G))
        for p, g in enumerate(own_genes or ()):
            if g >= 0:
                self.on_target[p, g] = 1.0
        shapes = {"baseline": (G,), "edge": (G, G), "weight": (G, G), "log_sigma": (G,), "level": (P,), "off_target": (P, G)}
        for name in TABLES:
            self.register_buffer(f"point_{name}", torch.zeros(shapes[name]))
            self.register_buffer(f"members_{name}", torch.zeros(max(draws, 1), *shapes[name]))

    def forward(self, batch: Batch) -> None:
        values = {k: getattr(self, f"point_{k}") for k in TABLES}
        if self.draws and not self.training:
            member = pyro.sample("member", dist.Categorical(self.on_target.new_ones(self.draws)), infer={"is_auxiliary": True})
            values = {k: getattr(self, f"members_{k}")[member] for k in TABLES}
        for name, value in values.items():
            pyro.sample(name, dist.Delta(value, event_dim=getattr(self, f"point_{name}").dim()))
        if batch.x is None:
            return
        on, A, sigma = self.on_target, values["edge"] * values["weight"], values["log_sigma"].exp()
        effect = torch.where(on > 0, values["level"].unsqueeze(-1), values["off_target"])
        with batch.cells():
            shift = mechanism_shift(batch.dose, effect if self.intervention == "shift" else effect * (1 - on))
            own = batch.x - values["baseline"]
            z = (own - mechanism_shift(own, A) - shift) / sigma
            left = NOISE**2 * (1 + ((A * sigma.unsqueeze(-1)) ** 2).sum(-2) / sigma**2)
            precision = 1 + 1 / left
            loc, scale = z / left / precision, precision.rsqrt().expand_as(z)
            if self.intervention == "do":  # a held gene says nothing of its own equation
                held = (batch.dose != 0).to(on) @ on > 0
                loc, scale = torch.where(held, 0.0, loc), torch.where(held, 1.0, scale)
            pyro.sample("z", dist.Normal(loc, scale).to_event(1))

    def initialise(self, model: Any, data: PerturbationData) -> None:
        """All of the fit."""
        rng = np.random.default_rng(int(torch.randint(2**31, ())))
        found = Network.of(data, self.on_target.numpy() > 0, self.intervention, self.shrink, self.gamma, rng)
        for name, value in found.point().items():
            getattr(self, f"point_{name}").copy_(torch.from_numpy(value))
        for i in range(self.draws):
            for name, value in found.member(rng).items():
                getattr(self, f"members_{name}")[i] = torch.from_numpy(value)
        prior, scale = found.level_prior()
        settings = {"centre": found.baseline, "unit": found.unit, "level_prior": prior, "level_scale": scale, "off_scale": found.off_scale}
        for name, value in settings.items():
            getattr(model, name).copy_(torch.from_numpy(value))
        with torch.no_grad():
            model.log_noise.copy_(torch.from_numpy(np.log(NOISE * np.sqrt(found.variance))))


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


class Moments:
    """Conditions (distinct treatments) of a screen: ``dose`` [C, P], ``n`` [C], ``mean`` [C, G], products within them ``within`` [G, G],
    those of the cells that tell of gene k, ``free`` [G, G, G], conditions that ``hit`` a gene [C, G], and genes whose variance enough cells
    carry, ``able`` [G]."""

    def __init__(self, dose: Array, n: Array, mean: Array, within: Array, free: Array, hit: Edges, able: NDArray[np.bool_]) -> None:
        self.dose, self.n, self.mean, self.within, self.free, self.hit, self.able = dose, n, mean, within, free, hit, able

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
