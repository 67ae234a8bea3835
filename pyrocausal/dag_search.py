"""Search for a network without cycles that explains linear equations between genes, each known apart from the cells that reached into it.

Gene k has parents S, ``x_k = sum_{j in S} x_j A_jk + noise``, in the cells in which k itself was not perturbed (a perturbation of k may
have replaced its equation, whatever else it did). With ``C^k`` the products of centred expression over those N_k cells, the score is
Gaussian and decomposes over genes (Hauser and Buehlmann 2012, arXiv 1104.2808; penalty of Chen and Chen 2008)::

    score_k(S) = -N_k / 2 log(RSS_k(S) / N_k) - |S| (log(N) / 2 + gamma log d),   RSS_k(S) = C^k_kk - C^k_kS (C^k_SS)^-1 C^k_Sk

Networks that differ in the direction of edges no perturbation tells apart have the same score. :func:`climb` takes the best addition,
removal or reversal of an edge until none gains; :class:`Walk` goes on from such a network by random reversals and removals, climbs again,
and moves there as a Metropolis step would: a crude sampler of good networks, equal ones included, not the posterior itself.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Edges = NDArray[np.bool_]
GAIN = 1e-2  # least gain of a step, above the rounding of scores
RIDGE = 1e-9  # of a regression, in units of the diagonal
LEAST = 1e-6  # share of a gene's variance that its parents never explain
TIE = 1e-4  # sd of what breaks ties between additions
MOST_PARENTS = 30


@dataclass(frozen=True)
class Regressions:
    """What the search reads: ``cross`` [d, d, d], row k of products over cells that tell of gene k, their number ``n`` [d], and which genes
    may have edges, ``able`` [d]."""

    cross: Array
    n: Array
    able: NDArray[np.bool_]


@dataclass
class Score:
    """Scores of parent sets, remembered."""

    r: Regressions
    gamma: float = 0.5
    known: dict[tuple[int, frozenset[int]], tuple[float, Array]] = field(default_factory=dict)

    @property
    def penalty(self) -> float:
        """Of an edge."""
        return float(0.5 * np.log(self.r.n.mean()) + self.gamma * np.log(len(self.r.n)))

    def of(self, k: int, parents: frozenset[int]) -> tuple[float, Array]:
        """The score of gene k with these parents, and what each further parent would add to it, [d] (-inf where it cannot)."""
        key = (k, parents)
        if key not in self.known:
            self.known[key] = self._of(k, sorted(parents))
        return self.known[key]

    def _of(self, k: int, S: list[int]) -> tuple[float, Array]:
        if not self.r.able[k]:
            return 0.0, np.full(len(self.r.n), -np.inf)
        C, n, lam = self.r.cross[k], self.r.n[k], self.penalty
        V, c = C.diagonal(), C[k]
        if S:
            inner = C[np.ix_(S, S)] + RIDGE * np.diag(V[S])
            slopes = np.linalg.solve(inner, C[S])  # of every gene on S
            V, c = V - (C[S] * slopes).sum(0), C[k] - C[k, S] @ slopes
        least = LEAST * float(C[k, k])
        rss = max(float(c[k]), least)
        left = self.r.able & (LEAST * C.diagonal() < V)
        more = np.maximum(rss - np.where(left, c**2 / np.where(left, V, 1.0), 0.0), least)
        gain = -0.5 * n * np.log(more / rss) - lam
        gain[[*S, k]] = -np.inf
        if len(S) >= MOST_PARENTS:
            gain[:] = -np.inf
        return -0.5 * n * float(np.log(rss / n)) - lam * len(S), gain

    def total(self, edges: Edges) -> float:
        """Of a network [d, d]."""
        return sum(self.of(k, parents_of(edges, k))[0] for k in range(len(edges)))


def parents_of(edges: Edges, k: int) -> frozenset[int]:
    return frozenset(np.flatnonzero(edges[:, k]).tolist())


def descent(edges: Edges) -> Edges:
    """[j, k]: k is j, or can be reached from it."""
    out, n = np.eye(len(edges), dtype=bool) | edges, 0
    while n != (n := int(out.sum())):
        wide = out.astype(np.float32)
        out = wide @ wide > 0
    return np.asarray(out)


def leads(edges: Edges, j: int, k: int) -> bool:
    """Whether k can be reached from j."""
    seen = edges[j].copy()
    front = seen
    while front.any() and not seen[k]:
        front = edges[front].any(0) & ~seen
        seen |= front
    return bool(seen[k])


def climb(score: Score, edges: Edges, rng: np.random.Generator) -> Edges:
    """The network from which no single edge gains, starting from ``edges`` (without cycles)."""
    edges, d = edges.copy(), len(edges)
    add, remove = np.empty((d, d)), np.full((d, d), -np.inf)

    def look(k: int) -> None:
        """Gains of adding and of removing each edge into k."""
        parents = parents_of(edges, k)
        here, gain = score.of(k, parents)
        add[:, k] = gain + TIE * rng.standard_normal(d)
        remove[:, k] = -np.inf
        for j in parents:
            remove[j, k] = score.of(k, parents - {j})[0] - here

    for k in range(d):
        look(k)
    reaches = descent(edges)
    while True:
        free = np.where(reaches.T, -np.inf, add)  # j -> k closes a cycle if k reaches j
        steps = [(free.max(), "add", int(free.argmax())), (remove.max(), "remove", int(remove.argmax()))]
        there = np.flatnonzero(edges)
        turn = remove.ravel()[there] + add.T.ravel()[there]
        for i in np.argsort(-turn):
            if turn[i] <= max(GAIN, steps[0][0], steps[1][0]):
                break
            j, k = divmod(int(there[i]), d)
            if not reaches[np.flatnonzero(edges[j] & (np.arange(d) != k)), k].any():  # no other path j -> k
                steps.append((turn[i], "turn", int(there[i])))
                break
        gain, step, at = max(steps)
        if gain <= GAIN:
            return edges
        j, k = divmod(at, d)
        parents = parents_of(edges, k)
        if step == "add" and score.of(k, parents | {j})[0] - score.of(k, parents)[0] <= GAIN / 2:  # rounding: nearly collinear
            add[j, k] = -np.inf
            continue
        edges[j, k] = step == "add"
        if step == "turn":
            edges[k, j] = True
            look(j)
        look(k)
        reaches = reaches | (reaches[:, [j]] & reaches[[k]]) if step == "add" else descent(edges)


@dataclass
class Walk:
    """Networks around good ones."""

    score: Score
    rng: np.random.Generator
    share: float = 0.2  # of the edges that a step reverses or removes
    most: int = 10  # and no more than

    def start(self, edges: Edges | None = None) -> Edges:
        d = len(self.score.r.n)
        return climb(self.score, np.zeros((d, d), bool) if edges is None else edges, self.rng)

    def step(self, edges: Edges) -> Edges:
        """Kick, climb, accept with probability ``min(1, exp(score' - score))``."""
        new = edges.copy()
        n = max(3, min(self.most, int(self.share * new.sum())))
        for j, k in self.rng.permutation(np.argwhere(new))[:n]:
            new[j, k] = False
            new[k, j] = self.rng.random() < 0.7 and not leads(new, j, k)
        new = climb(self.score, new, self.rng)
        return new if self.score.total(new) - self.score.total(edges) > np.log(self.rng.random()) else edges


def regress(r: Regressions, edges: Edges) -> tuple[Array, Array]:
    """Weights A [d, d] of the edges, by least squares, and variances of the noise [d]."""
    A, variance = np.zeros(edges.shape), np.empty(len(edges))
    for k in range(len(edges)):  # a system for each gene: parents and cells differ
        S, C = np.flatnonzero(edges[:, k]), r.cross[k]
        if len(S):
            A[S, k] = np.linalg.solve(C[np.ix_(S, S)] + RIDGE * np.diag(C.diagonal()[S]), C[S, k])
        variance[k] = max(C[k, k] - C[k, S] @ A[S, k], LEAST * C[k, k]) / max(r.n[k] - len(S), 1.0)
    return A, variance
