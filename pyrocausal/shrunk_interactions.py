"""What a combination does beyond the sum of its parts, as its own cells tell it, shrunk: the interactions of ``condition_eb``.

Per gene, for a combination q of the training cells with mean ``y_q`` (on the scale of :mod:`pyrocausal.closed_form`) and sampling variance
``s_q^2``, and the law of untreated mean a and effects e that single perturbations gave (an :class:`~pyrocausal.closed_form.Estimate`)::

    r_q = y_q - a^ - sum_{p in q} e^_p
    V_q = Var(a + sum_{p in q} e_p)
    i_q ~ Normal(0, b_q),   b_q = k_q tau^2
    K_q = (b_q + V_q) / (b_q + V_q + s_q^2)

    E[a + sum e + i | y_q] = a^ + sum e^ + K_q r_q,   Var = K_q s_q^2,   Cov with a + sum e = (1 - K_q) V_q

Parts keep the law that single perturbations gave them, ``d_q = (a - a^) + sum (e_p - e^_p)``; so that the sum has the moments above, ::

    i_q | a, e ~ Normal(K_q (r_q - d_q), sd_q^2),   sd_q^2 = s_q^2 ((b_q + V_q)^2 + b_q s_q^2) / (b_q + V_q + s_q^2)^2

tau^2 and k are found as in :func:`~pyrocausal.closed_form.shrunk_effects`, as if the r_q were independent. Doses of the training cells are
taken for 1. A combination that no cell received has i = 0: there ``condition_eb`` is ``additive_eb``, however large interactions are.

Cannot see: whether all pairs of a part that was never measured alone depart because of that part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pyrocausal.closed_form import RATIOS, Array, Conditions, Estimate, common_sizes, live_genes, moderated_means
from pyrocausal.data import PerturbationData
from pyrocausal.errors import PyrocausalError

ITERATIONS = 60


@dataclass(frozen=True)
class Interactions:
    """The law of the interactions of Q combinations given a and e.

    Attributes:
        value: K r, [Q, G]. gain: K. sd: standard deviations. prior: sqrt(b). All are 0 for a combination without cells.
    """

    value: Array
    gain: Array
    sd: Array
    prior: Array


def each_once(combinations: Sequence[Sequence[int]], kind: str) -> list[tuple[int, ...]]:
    """Combinations in order, each once, its parts in order; refused for a baseline without interactions."""
    out = sorted({tuple(sorted(int(p) for p in q)) for q in combinations})
    if out and kind != "condition_eb":
        raise PyrocausalError(f"combinations= was given for the baseline {kind!r}, which does not use it; leave it out")
    return out


def shrunk_interactions(data: PerturbationData, c: Conditions, law: Estimate, part: Array) -> Interactions:
    """Interactions of combinations; see the module's docstring.

    Args:
        c: conditions of the same cells, whose pooled variances moderate those of combinations. law: of a and e.
        part: 1 for the parts of each combination, [Q, P].
    """
    received = data.combination_cells()
    cells = {q: received[key] for q, row in enumerate(part) if (key := tuple(np.flatnonzero(row).tolist())) in received}
    out = Interactions(*(np.zeros((len(part), len(c.control))) for _ in range(4)))
    if not cells:
        return out
    seen = list(cells)
    _, y, s, _ = moderated_means(data, list(cells.values()), pooled=c.unit_variance)
    w = part[seen]
    on_control = 1 + w @ law.on_control
    V = (on_control * law.control_on_shared + w @ law.on_shared) ** 2 * law.shared_sd**2
    V += on_control**2 * law.control_sd**2 + w @ law.effect_sd**2
    r, v = y - law.control - w @ law.effect, V + s
    k, live = np.ones((len(seen), 1)), live_genes(c.unit_variance)
    start = [np.log(v + x * c.unit_variance)[:, live].sum() + (r**2 / (v + x * c.unit_variance))[:, live].sum() for x in RATIOS]
    tau = c.unit_variance * RATIOS[int(np.argmin(start))]
    for _ in range(ITERATIONS):
        weight = k * tau / (k * tau + v)
        tau, k = common_sizes((weight * r) ** 2 + weight * v, k, c.unit_variance)
    b = k * tau
    K = (b + V) / (b + v)
    out.value[seen], out.gain[seen], out.prior[seen] = K * r, K, np.sqrt(b)
    out.sd[seen] = np.sqrt(s * ((b + V) ** 2 + b * s)) / (b + v)
    return out
