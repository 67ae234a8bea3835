"""How many interventional distributions a directed acyclic graph gets wrong; the other graph scores are in
:mod:`pyrocausal.graph_metrics`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pyrocausal.errors import DataError

Mask = NDArray[np.bool_]


def structural_intervention_distance(predicted: ArrayLike, true: ArrayLike) -> int:
    """Number of ordered pairs (i, j) for which adjusting for the *predicted* parents of i gives a wrong ``p(x_j | do(x_i))``.

    If j is a predicted parent of i, the prediction says "no effect": wrong if i is an ancestor of j. Otherwise the predicted parents Z have
    to be a valid adjustment set in the true graph: no member descends from a node on a directed path from i to j, and every other path
    between them is blocked by Z.

    Args:
        predicted, true: [d, d], non-zero where row acts on column; acyclic.

    Source: Peters and Buhlmann 2015; as in ``gadjid.sid``. Cannot see: extra edges that respect the causal order (the full graph of the
    right order has distance 0), so stand the structural Hamming distance beside it. Not symmetric. Noise floor:
    none, the true graph has 0; the empty graph has the number of pairs in which j is upstream of i or shares a cause with it.
    """
    guess, graph = _acyclic(predicted), _acyclic(true)
    if guess.shape != graph.shape:
        raise DataError(f"graphs of shapes {guess.shape} and {graph.shape} were given; give two of the same nodes")
    d = len(graph)
    reaches = _closure(graph)  # [v, j]: directed path from v to j, of length 0 or more
    below = reaches & ~np.eye(d, dtype=bool)
    z = guess.T  # [i, v]: v is a predicted parent of i
    bad = below & _steps(z, reaches.T)  # [i, v]: v descends from i and has a descendant in Z
    wrong = np.where(z, below, _steps(bad, reaches) | _open(graph, z))
    np.fill_diagonal(wrong, False)
    return int(wrong.sum())


def _open(graph: Mask, z: Mask) -> Mask:
    """[i, j]: a path between i and j that is not directed from i to j is open given row i of z; by walks, all i at once."""
    off = ~np.eye(len(graph), dtype=bool)
    causal, head, tail = graph & off, np.zeros_like(graph), graph.T & off  # how the last node was reached: ->, -> after a turn, <-
    while True:
        new_causal = causal | (_steps(causal & ~z, graph) & off)
        new_head = head | (_steps((head | tail) & ~z, graph) & off)
        new_tail = tail | (_steps(((causal | head) & z) | (tail & ~z), graph.T) & off)
        if (new_causal == causal).all() and (new_head == head).all() and (new_tail == tail).all():
            return head | tail
        causal, head, tail = new_causal, new_head, new_tail


def _steps(reached: Mask, edges: Mask) -> Mask:
    """Nodes one edge further than those reached, row by row."""
    return (reached.astype(float) @ edges.astype(float)) > 0


def _closure(graph: Mask) -> Mask:
    out = graph | np.eye(len(graph), dtype=bool)
    while True:
        wider = _steps(out, out)
        if (wider == out).all():
            return out
        out = wider


def _acyclic(graph: ArrayLike) -> Mask:
    edges = np.asarray(graph) != 0
    if edges.ndim != 2 or edges.shape[0] != edges.shape[1]:
        raise DataError(f"a graph of shape {edges.shape} was given; give a square matrix, [d, d]")
    if edges.diagonal().any() or (_closure(edges) & _closure(edges).T & ~np.eye(len(edges), dtype=bool)).any():
        raise DataError("a graph with a cycle was given; the distance compares acyclic graphs, so cut an edge of each cycle")
    return edges
