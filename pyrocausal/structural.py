"""Primitives of a structural model that models call in their ``forward``.

A latent graph over D programs, in row vectors: ``graph[j, k]`` is the weight of the edge j -> k, and

    e_k = z_k + shift_k                                    what comes from outside
    u_k = e_k + sum_j f(u_j) graph[j, k]                   f = identity ("linear"), relu or softplus

which is solved without an inverse: one unit-triangular solve for linear equations, as many sweeps ``u <- e + f(u) graph`` as the longest
path has edges otherwise (exact, since the graph has no cycle). ``clamp`` is the hard intervention ``do(u_k = v)``: the edges into k are
cut, u_k is v, and what descends from k follows.

Every function takes one world or many: vectors of the cells are ``[..., n, D]``, a graph is ``[D, D]``, or has the dimensions of draws and
interventions on the left and a 1 for the cells, ``[S, K, 1, D, D]``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from pyrocausal.errors import PyrocausalError

Equations = Literal["linear", "relu", "softplus"]
LINKS = {"linear": lambda u: u, "relu": torch.relu, "softplus": torch.nn.functional.softplus}


def targets_table(own_genes: Sequence[int] | None, shape: tuple[int, int]) -> Tensor:
    """1 where a perturbation targets a gene, [P, G]; from the column of each one's gene, -1 where it is not measured."""
    out = torch.zeros(shape)
    for p, g in enumerate(own_genes if own_genes is not None else ()):
        if g >= 0:
            out[p, g] = 1.0
    return out


def mechanism_shift(dose: Tensor, table: Tensor) -> Tensor:
    """The shift of every program in every cell, ``dose @ table``, in one world or in many.

    Args:
        dose: treatment of each cell, [..., n, n_perturbations].
        table: what each perturbation does to each program (``mask * effect``): [n_perturbations, n_latent], or with the dimensions of
            draws and interventions on the left and a 1 for the cells, [S, K, 1, n_perturbations, n_latent].

    Returns:
        [..., n, n_latent].
    """
    return _times(dose, table)


def solve(
    e: Tensor,
    graph: Tensor,
    equations: Equations = "linear",
    clamp: Tensor | None = None,
    order: Tensor | None = None,
    depth: int | None = None,
) -> Tensor:
    """The programs ``u`` that the structural equations give, [..., n, D].

    Args:
        e: what comes from outside (``z + shift``), [..., n, D].
        graph: weights, strictly upper triangular in ``order``, [D, D] or [S, K, 1, D, D].
        equations: the link f.
        clamp: value of each clamped program, NaN where it is left alone, [D] or broadcastable to [..., n, D]; None for no clamp.
        order: the programs from causes to effects, [D] int64; None if they are numbered so.
        depth: edges of the longest path, if it is known to be below D - 1 (links other than the identity).
    """
    if equations != "linear":
        held = None if clamp is None else ~clamp.isnan()
        link = LINKS[equations]
        u = e if held is None else torch.where(held, clamp.nan_to_num(), e)  # type: ignore[union-attr]
        for _ in range(graph.shape[-1] - 1 if depth is None else depth):
            u = e + _times(link(u), graph)
            if held is not None:
                u = torch.where(held, clamp.nan_to_num(), u)  # type: ignore[union-attr]
        return u
    if order is not None:
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        turned = solve(e[..., order], _reordered(graph, order), clamp=None if clamp is None else clamp[..., order])
        return turned[..., back]
    u = _triangular(e, graph)
    return u if clamp is None else _clamped(u, graph, clamp)


def respond(e: Tensor, reach: Tensor, value: Tensor | None = None) -> Tensor:
    """What linear equations give whose ``R = (I - graph)^-1`` is known, ``u = e R``, in any order of the programs; some of them
    :func:`hold`, if ``value`` is given. Arguments as there; ``e`` as in :func:`solve`."""
    u = _times(e, reach)
    return u if value is None else hold(u, reach, value)


def hold(u: Tensor, reach: Tensor, value: Tensor) -> Tensor:
    """Programs ``u`` of a linear system with some of them held at ``value``, [..., n, D]: no edge into them, the others follow.

    A shift of the held T reaches all programs, and no other equation changes; so what is missing enters as the shift of T that brings T
    to its values, ``u + (v_T - u_T) R_TT^-1 R_T``. One small system for each set T, whatever the order of the programs.

    Args:
        reach: ``R = (I - graph)^-1``, [D, D] or [S, K, 1, D, D].
        value: NaN where a program is left alone, broadcastable to ``u``.
    """
    held = ~value.isnan()
    most = int(held.sum(-1).max())
    if most == 0:
        return u
    real, at = held.to(torch.uint8).topk(most, dim=-1)  # [..., n, m]; padded where a cell has fewer
    real = real.bool()
    if reach.dim() == 2:
        rows = reach[at]
    else:
        worlds = reach.squeeze(-3)
        s = torch.arange(worlds.shape[0], device=at.device).reshape(-1, 1, 1, 1)
        k = torch.arange(worlds.shape[1], device=at.device).reshape(-1, 1, 1)
        rows = worlds[s, k, at]  # [S, K, n, m, D]
    inner = rows.gather(-1, at.unsqueeze(-2).expand(*rows.shape[:-1], most))  # R_TT
    both = real.unsqueeze(-1) & real.unsqueeze(-2)
    inner = torch.where(both, inner, torch.eye(most, dtype=u.dtype, device=u.device))
    shape = torch.broadcast_shapes(u.shape[:-1], at.shape[:-1])
    at_u = at.expand(*shape, most)
    missing = torch.where(real, value.nan_to_num().expand(*shape, -1).gather(-1, at_u) - u.expand(*shape, -1).gather(-1, at_u), 0.0)
    size = (missing.unsqueeze(-2) @ torch.linalg.inv(inner)).squeeze(-2)
    moved = u + (size.unsqueeze(-2) @ rows).squeeze(-2)
    return torch.where(held, value.nan_to_num(), moved)


def residual(u: Tensor, graph: Tensor, equations: Equations = "linear") -> Tensor:
    """The inverse of :func:`solve` without a clamp: ``e = u - f(u) graph``, [..., n, D]. Its Jacobian is unit triangular."""
    return u - _times(LINKS[equations](u), graph)


def total_effects(graph: Tensor) -> Tensor:
    """``(I - graph)^-1`` of a linear graph [..., D, D] without cycles: entry (j, k) sums the products of weights over all paths j -> k."""
    order = torch.as_tensor(topological_order(graph.reshape(-1, *graph.shape[-2:]).ne(0).any(0)), device=graph.device)
    eye = torch.eye(len(order), dtype=graph.dtype, device=graph.device)
    return solve(eye, graph.unsqueeze(-3) if graph.dim() > 2 else graph, order=order)


def topological_order(graph: Tensor) -> list[int]:
    """The programs from causes to effects; ties keep their numbers' order.

    Args:
        graph: weights or edges, [D, D]; non-zero is an edge.

    Raises:
        PyrocausalError: if there is a cycle.
    """
    edges = np.asarray(graph.detach().cpu() != 0)
    left = np.ones(len(edges), bool)
    order: list[int] = []
    while left.any():
        free = np.flatnonzero(left & ~edges[left].any(0))
        if len(free) == 0:
            k = _on_cycle(edges & left & left[:, None])
            raise PyrocausalError(f"the graph has a cycle through node {k}; structural equations need a graph without cycles, cut an edge")
        order.append(int(free[0]))
        left[free[0]] = False
    return order


def longest_path(graph: Tensor) -> int:
    """Edges of the longest path of a graph without cycles, [D, D]."""
    edges = np.asarray(graph.detach().cpu() != 0)
    length = np.zeros(len(edges), int)
    for k in topological_order(graph):
        if edges[:, k].any():
            length[k] = 1 + length[edges[:, k]].max()
    return int(length.max(initial=0))


def interventional_order(total: Tensor, precision: Tensor) -> list[int]:
    """The order of programs in which what a shift of one does to the others points forward.

    An effect of the shift of j on k says that j comes before k. The next program is the one into which those that are left have the least
    evidence, ``sum_j max(0, p_j total_jk^2 - 1)``, so that noise counts for nothing; ties keep their numbers' order.

    Args:
        total: mean change of program k per unit of shift of program j, [D, D].
        precision: of row j (one over its sampling variance), 0 for a program that nothing shifts, [D].
    """
    evidence = (precision[:, None] * total.square() - 1).clamp_min(0)
    evidence.fill_diagonal_(0)
    left, order = list(range(len(total))), []
    while left:
        incoming = evidence[left][:, left].sum(0)
        order.append(left.pop(int(incoming.argmin())))
    return order


def allowed_edges(n_latent: int, graph: str | Tensor, seed: int = 0) -> Tensor:
    """Which edges a model may have, [D, D] bool.

    Args:
        graph: ``"full"``: every j -> k with j < k; ``"none"``; ``"free"``: both ways, where the order is found from the interventions;
            ``"random"``: the upper triangle of an undirected random graph in which 3 % of the pairs are joined (the ablation of SCCVAE); or
            a matrix [D, D], whose non-zero entries are the edges.

    Raises:
        PyrocausalError: for a matrix of another size or with a cycle.
    """
    upper = torch.ones(n_latent, n_latent, dtype=torch.bool).triu(1)
    if isinstance(graph, str):
        if graph == "random":
            return upper & (torch.rand(n_latent, n_latent, generator=torch.Generator().manual_seed(seed)) < 0.02998)
        kinds = {"full": upper, "none": torch.zeros_like(upper), "free": upper | upper.T}
        if graph not in kinds:
            raise PyrocausalError(f"graph={graph!r} was given; it is 'full', 'free', 'none', 'random' or a matrix [n_latent, n_latent]")
        return kinds[graph]
    edges = torch.as_tensor(graph) != 0
    if edges.shape != (n_latent, n_latent):
        raise PyrocausalError(f"a graph of shape {tuple(edges.shape)} was given for {n_latent} programs; give [n_latent, n_latent]")
    topological_order(edges)
    return edges


# -- parts -----------------------------------------------------------------------------------------------------------------------


def _times(rows: Tensor, table: Tensor) -> Tensor:
    """``rows @ table`` for rows [..., n, P] and a table [P, D] or [S, K, 1, P, D]: a table shared by worlds is never repeated."""
    if table.dim() == 2:
        return rows @ table
    if table.shape[-3] != 1:  # a table of its own for every cell
        return torch.einsum("...p,...pd->...d", rows, table)
    table = table.squeeze(-3)
    if table.dim() == 4 and table.shape[1] == 1:  # draws x interventions: one product per draw
        if rows.dim() <= 3:
            out = rows.reshape(-1, rows.shape[-1]) @ table.squeeze(1)  # [S, K * n, D]
            return out.reshape(table.shape[0], *((1,) * (3 - rows.dim())), *rows.shape[:-1], table.shape[-1])
        if rows.shape[0] == table.shape[0]:
            return (rows.flatten(1, 2) @ table.squeeze(1)).unflatten(1, rows.shape[1:3])
    return rows @ table


def _triangular(e: Tensor, graph: Tensor) -> Tensor:
    """``e (I - graph)^-1`` for a strictly upper triangular graph."""
    if graph.dim() == 2:
        flat = e.reshape(-1, e.shape[-1])
        return _right_solve(flat, graph).reshape(e.shape)
    if graph.shape[-3] != 1:  # a graph of its own for every cell
        return _right_solve(e.unsqueeze(-2), graph).squeeze(-2)
    graph = graph.squeeze(-3)
    if graph.dim() == 4 and graph.shape[1] == 1 and e.dim() == 4 and e.shape[0] in (1, graph.shape[0]):
        e = e.expand(graph.shape[0], *e.shape[1:])
        return _right_solve(e.flatten(1, 2), graph.squeeze(1)).unflatten(1, e.shape[1:3])
    return _right_solve(e, graph)


def _right_solve(e: Tensor, graph: Tensor) -> Tensor:
    eye = torch.eye(graph.shape[-1], dtype=graph.dtype, device=graph.device)
    return torch.linalg.solve_triangular(eye - graph, e, upper=True, left=False, unitriangular=True)


def _clamped(u: Tensor, graph: Tensor, clamp: Tensor) -> Tensor:
    """Hold programs one after the other, causes first: what is missing at program k enters as a shift of k and spreads along row k of
    ``(I - graph)^-1``. A rank-one step for each program that any world holds; no system of a world of its own."""
    held = ~clamp.isnan()
    value = clamp.nan_to_num()
    for k in torch.nonzero(held.reshape(-1, held.shape[-1]).any(0)).ravel().tolist():
        unit = torch.zeros(u.shape[-1], dtype=u.dtype, device=u.device)
        unit[k] = 1
        row = _triangular(unit[None], graph)  # [1, D] or [..., 1, D]
        missing = torch.where(held[..., k], value[..., k] - u[..., k], 0.0)
        u = u + missing[..., None] * row
    return torch.where(held, value, u)


def _reordered(graph: Tensor, order: Tensor) -> Tensor:
    return graph[..., order, :][..., order]


def _on_cycle(edges: np.ndarray) -> int:
    """A node that can be reached from itself."""
    reach = edges.copy()
    for _ in range(len(edges)):
        reach = reach | (reach.astype(int) @ edges.astype(int) > 0)
    return int(np.flatnonzero(reach.diagonal())[0])
