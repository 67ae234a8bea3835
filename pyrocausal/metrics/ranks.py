"""Is a prediction nearer to its own perturbation than to the others? Retrieval ranks, with every convention stated.

The same question is asked in incompatible ways; :class:`Ranking` holds what differs, and ``RANKINGS`` the published ones by name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.spatial.distance import cdist

from pyrocausal.errors import DataError, nearest
from pyrocausal.metrics.means import Array, kept_genes

Among = Literal["truths", "predictions"]
Distance = Literal["l1", "l2", "cosine"]
Ties = Literal["against", "midrank", "for", "position"]
Denominator = Literal["n-1", "n"]
Exclude = Literal["none", "own", "panel"]
Report = Literal["rank", "score"]
SCIPY = {"l1": "cityblock", "l2": "euclidean"}


@dataclass(frozen=True)
class Ranking:
    """How a rank is taken.

    Attributes:
        among: ``"truths"``: the n truths in order of distance from the prediction; ``"predictions"``: the predictions in order of distance
            from the truth.
        distance: between profiles: ``"l1"``, ``"l2"``, or ``"cosine"`` (1 - cosine, 1 where a profile is 0; of *changes*, give those).
        ties: others at the very same distance count as nearer (``"against"``), as half (``"midrank"``), or not (``"for"``);
            ``"position"``: those of a lower row do (what a stable sort gives; it rewards early names).
        denominator: the rank k (0 for the nearest) is divided by ``n - 1`` or by ``n``.
        exclude: genes left out: none; ``"own"``, the one that the perturbation of the row targets; ``"panel"``, those of all perturbations
            (with ``"own"`` a prediction that only moves the *other* targets retrieves itself, .76 to .80 on the 2026 challenge).
        report: ``"rank"`` k / denominator, 0 best; ``"score"`` 1 minus that. Chance is .5 with denominator n - 1.
    """

    among: Among
    distance: Distance
    ties: Ties
    denominator: Denominator
    exclude: Exclude
    report: Report

    def __post_init__(self) -> None:
        for name, kind in _CHOICES.items():
            if (value := getattr(self, name)) not in get_args(kind):
                raise DataError(f"there is no {name} {value!r}{nearest(str(value), get_args(kind))}")

    def __str__(self) -> str:
        side = "truths around the prediction" if self.among == "truths" else "predictions around the truth"
        return f"{self.report}, {side}, {self.distance}, ties {self.ties}, /({self.denominator}), genes excluded: {self.exclude}"


_CHOICES = {"among": Among, "distance": Distance, "ties": Ties, "denominator": Denominator, "exclude": Exclude, "report": Report}

RANKINGS = {
    "perturbench": Ranking("predictions", "cosine", "against", "n-1", "none", "rank"),
    "perturbench_rmse": Ranking("predictions", "l2", "against", "n-1", "none", "rank"),
    "perturbench_code": Ranking("predictions", "cosine", "midrank", "n", "none", "rank"),
    "vcc2025": Ranking("truths", "l1", "position", "n", "own", "score"),
    "vcc2026": Ranking("truths", "cosine", "midrank", "n-1", "panel", "score"),
    "systema": Ranking("truths", "l2", "against", "n-1", "none", "score"),
    "nir": Ranking("truths", "l2", "against", "n-1", "none", "score"),
}
"""Published conventions. ``perturbench``: equation 2 of the paper (arXiv 2408.10609); ``perturbench_code``: its code, which divides by n
and breaks ties by an unseeded shuffle (here: its expectation). ``vcc2025``: ``discrimination_score_l1`` of cell-eval. ``vcc2026``:
``pds_cosine`` of cell-eval2, on changes from control of :func:`~pyrocausal.metrics.means.bulk_lognorm`. ``systema``: centroid accuracy.
``nir``: Miller 2025; scperteval breaks its ties by noise of 1e-12, the definition, ``1[d_pp < d_pq]``, counts them against, and so do
we."""


def retrieval(
    predicted: ArrayLike,
    true: ArrayLike,
    ranking: Ranking | str,
    own: ArrayLike | None = None,
    rows: ArrayLike | None = None,
) -> Array:
    """Rank of the right match of every prediction, [P].

    With ``d_pq`` the distance of prediction p and truth q: ``k_p`` is the number of q other than p (of predictions q, for
    ``among="predictions"``) with ``d_pq < d_pp``, and of ties what the convention says.

    Args:
        predicted: [P, n_genes]: profiles, or changes; every row NaN where nothing was predicted, which scores NaN and is nobody's rival.
        true: [T, n_genes], the panel, in the same unit.
        ranking: a convention, or its name in ``RANKINGS``.
        own: targeted genes of each truth, as for :func:`~pyrocausal.metrics.means.kept_genes`; needed where genes are excluded.
        rows: the truth that each prediction is of, [P]; 0..P-1 if None. n is the number of rivals and the match: T, or P.

    Noise floor: a technical duplicate, on screens of similar perturbations far from perfect. Cannot see: scale (cosine) or a shift common
    to all predictions (``among="predictions"``); steps are 1/(n-1), coarse for few perturbations; stand an error beside it.
    """
    how = RANKINGS.get(ranking) if isinstance(ranking, str) else ranking
    if how is None:
        raise DataError(f"there is no ranking {ranking!r}{nearest(str(ranking), RANKINGS)}")
    p, t = np.asarray(predicted, dtype=float), np.asarray(true, dtype=float)
    match = np.arange(len(p)) if rows is None else np.asarray(rows)
    if p.ndim != 2 or t.ndim != 2 or p.shape[1] != t.shape[1] or match.shape != (len(p),) or (len(p) and not 0 <= match.max() < len(t)):
        raise DataError(f"profiles of shapes {p.shape} and {t.shape} were given; give [P, G] and [T, G], and the row of the truth of each")
    d = _distances(p, t, how, own, match)
    there = np.asarray(np.isfinite(d).all(1))
    at = d[np.arange(len(p)), match]
    if how.among == "truths":
        d, at, index = d, at, match
    else:  # [P, P]: every prediction's distance from the truth of each row
        d, index = d[:, match].T, np.arange(len(p))
        d = np.where(there[None], d, np.inf)
    value = _rank(d, at, index, how.ties)
    n = d.shape[1] if how.among == "truths" else int(there.sum())
    value = value / max(n - 1 if how.denominator == "n-1" else n, 1)
    return np.where(there, value if how.report == "rank" else 1 - value, np.nan)


def _rank(d: Array, at: Array, index: NDArray[np.int64], ties: str) -> Array:
    """How many entries of each row are nearer than ``at``, the entry in column ``index``, [n_rows]."""
    column = np.arange(d.shape[1])
    nearer = (d < at[:, None]).sum(1).astype(float)
    same = (d == at[:, None]) & (column != index[:, None])
    if ties == "position":
        return nearer + (same & (column < index[:, None])).sum(1)
    return nearer + {"against": 1.0, "midrank": 0.5, "for": 0.0}[ties] * same.sum(1)


def _distances(p: Array, t: Array, how: Ranking, own: ArrayLike | None, match: NDArray[np.int64]) -> Array:
    if how.exclude == "none":
        return _pairwise(p, t, how.distance)
    if own is None:
        raise DataError(f"the ranking leaves out genes ({how.exclude}) and own=None was given; give the targeted column of each truth")
    kept = kept_genes(own, *t.shape)
    if how.exclude == "panel":
        there = np.flatnonzero(kept.all(0))
        return _pairwise(p[:, there], t[:, there], how.distance)
    d = _pairwise(p, t, how.distance)
    for row in np.flatnonzero(~kept[match].all(1)):
        there = np.flatnonzero(kept[match[row]])
        d[row] = _pairwise(p[row : row + 1, there], t[:, there], how.distance)[0]
    return d


def _pairwise(p: Array, t: Array, distance: str) -> Array:
    if distance != "cosine":
        return cdist(p, t, SCIPY[distance])
    a, b = (x / np.where((size := np.linalg.norm(x, axis=1, keepdims=True)) > 0, size, 1.0) for x in (p, t))
    return np.clip(1 - a @ b.T, 0.0, 2.0)
