"""Structural equations against brute force: node by node, path by path, and by inverses, in float64."""

import networkx as nx
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pyrocausal.errors import PyrocausalError
from pyrocausal.structural import (
    LINKS,
    allowed_edges,
    longest_path,
    mechanism_shift,
    residual,
    solve,
    topological_order,
    total_effects,
)

NAN = float("nan")


def random_dag(n: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """About two parents a node."""
    generator = torch.Generator().manual_seed(seed)
    edges = (torch.rand(n, n, generator=generator) < min(0.5, 4 / n)).triu(1)
    return (edges * 0.7 * torch.randn(n, n, generator=generator, dtype=torch.float64)).to(dtype)


def node_by_node(e: Tensor, graph: Tensor, equations: str, clamp: Tensor | None = None) -> Tensor:
    """The definition, one node and one parent at a time."""
    u = torch.zeros_like(e)
    for k in range(e.shape[-1]):
        u[:, k] = e[:, k]
        for j in range(k):
            u[:, k] += LINKS[equations](u[:, j]) * graph[j, k]
        if clamp is not None and not clamp[k].isnan():
            u[:, k] = clamp[k]
    return u


@pytest.mark.parametrize("equations", LINKS)
@pytest.mark.parametrize(("n", "dtype", "tolerance"), [(6, torch.float64, 1e-10), (64, torch.float64, 1e-10), (64, torch.float32, 1e-4)])
def test_solve_is_the_definition_node_by_node(n: int, dtype: torch.dtype, tolerance: float, equations: str) -> None:
    graph, e = random_dag(n, 0, dtype), torch.randn(9, n, dtype=dtype, generator=torch.Generator().manual_seed(1))
    u = solve(e, graph, equations)
    torch.testing.assert_close(u, node_by_node(e, graph, equations), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(residual(u, graph, equations), e, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(solve(e, graph, equations, depth=longest_path(graph)), u, rtol=tolerance, atol=tolerance)


def test_a_large_graph_is_solved_exactly() -> None:
    n = 512
    graph = (torch.randn(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) / n**0.5).triu(1)
    e = torch.randn(32, n, dtype=torch.float64)
    torch.testing.assert_close(solve(e, graph) @ (torch.eye(n) - graph), e, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("seed", range(5))
def test_total_effects_sum_over_paths(seed: int) -> None:
    graph = random_dag(7, seed)
    network = nx.from_numpy_array(graph.numpy(), create_using=nx.DiGraph)
    by_path = np.eye(7)
    for j in range(7):
        for k in range(j + 1, 7):
            paths = nx.all_simple_edge_paths(network, j, k)
            by_path[j, k] = sum(np.prod([graph[edge].item() for edge in path]) for path in paths)
    np.testing.assert_allclose(total_effects(graph), by_path, atol=1e-10)
    z = torch.zeros(7, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda v: solve(v[None], graph)[0], z)
    np.testing.assert_allclose(jacobian.T, by_path, atol=1e-10)


@pytest.mark.parametrize("equations", LINKS)
@pytest.mark.parametrize("n", [6, 64])
def test_a_clamp_cuts_the_incoming_edges(n: int, equations: str) -> None:
    graph, e = random_dag(n, 2), torch.randn(9, n, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    clamp = torch.full((n,), NAN, dtype=torch.float64)
    clamp[[1, 4]] = torch.tensor([2.0, -1.5], dtype=torch.float64)
    free, held = solve(e, graph, equations), solve(e, graph, equations, clamp)
    torch.testing.assert_close(held, node_by_node(e, graph, equations, clamp), rtol=0, atol=1e-10)
    assert (held[:, 1] == 2.0).all() and (held[:, 4] == -1.5).all()
    network = nx.from_numpy_array(graph.numpy(), create_using=nx.DiGraph)
    below = {1, 4} | nx.descendants(network, 1) | nx.descendants(network, 4)
    rest = [k for k in range(n) if k not in below]
    assert torch.equal(held[:, rest], free[:, rest])  # not nearly: exactly


def test_a_clamp_is_a_shift_of_the_cells_own_size() -> None:
    graph, e = random_dag(8, 4), torch.randn(9, 8, dtype=torch.float64)
    k, free = 2, solve(e, graph)
    shift = torch.zeros_like(e)
    shift[:, k] = 1.7 - free[:, k]
    clamp = torch.full((8,), NAN, dtype=torch.float64)
    clamp[k] = 1.7
    torch.testing.assert_close(solve(e, graph, clamp=clamp), solve(e + shift, graph), rtol=0, atol=1e-10)


@pytest.mark.parametrize("equations", LINKS)
def test_worlds_and_draws_at_once_equal_one_by_one(equations: str) -> None:
    n, n_draws, n_worlds = 7, 3, 4
    generator = torch.Generator().manual_seed(5)
    graphs = torch.stack([random_dag(n, s) for s in range(n_draws)])[:, None, None]  # [S, 1, 1, D, D]
    e = torch.randn(n_draws, n_worlds, 5, n, dtype=torch.float64, generator=generator)
    clamp = torch.full((n_worlds, 1, n), NAN, dtype=torch.float64)
    clamp[0, 0, 3], clamp[1, 0, [0, 5]], clamp[3, 0, :] = 1.0, 2.0, 0.5
    for given_clamp in (None, clamp):
        u = solve(e, graphs, equations, given_clamp)
        for s in range(n_draws):
            for w in range(n_worlds):
                held = None if given_clamp is None else given_clamp[w, 0]
                torch.testing.assert_close(u[s, w], solve(e[s, w], graphs[s, 0, 0], equations, held), rtol=0, atol=1e-12)
    per_cell = graphs.expand(n_draws, n_worlds, 5, n, n)
    torch.testing.assert_close(solve(e, per_cell, equations), solve(e, graphs, equations), rtol=0, atol=1e-12)
    torch.testing.assert_close(solve(e[0, 0], graphs, equations)[1, 0], solve(e[0, 0], graphs[1, 0, 0], equations), rtol=0, atol=1e-12)


def test_any_order_of_the_nodes() -> None:
    graph, e = random_dag(9, 6), torch.randn(4, 9, dtype=torch.float64)
    places = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    clamp = torch.full((9,), NAN, dtype=torch.float64)
    clamp[3] = 0.3
    turned = graph[places][:, places]
    order = torch.tensor(topological_order(turned))
    for held in (None, clamp):
        expected = solve(e, graph, clamp=held)[:, places]
        got = solve(e[:, places], turned, clamp=None if held is None else held[places], order=order)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    np.testing.assert_allclose(total_effects(turned), total_effects(graph)[places][:, places], atol=1e-12)


def test_no_graph_no_change() -> None:
    e = torch.randn(4, 5)
    for equations in LINKS:
        assert torch.equal(solve(e, torch.zeros(5, 5), equations), e)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 1000), doses=st.lists(st.floats(-3, 3), min_size=3, max_size=3))
def test_linear_programs_are_affine_in_the_dose_and_add(seed: int, doses: list[float]) -> None:
    graph, z = random_dag(6, seed), torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    table = torch.randn(2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 1))

    def programs(a: float, b: float) -> Tensor:
        dose = torch.tensor([[a, b]], dtype=torch.float64).expand(3, 2)
        return solve(z + mechanism_shift(dose, table), graph)

    one, two, three = doses
    slope = programs(1, 0) - programs(0, 0)
    for dose in (one, two, three):
        torch.testing.assert_close(programs(dose, 0) - programs(0, 0), dose * slope, rtol=0, atol=1e-9)
    both = programs(one, two) - programs(0, 0)
    torch.testing.assert_close(both, (programs(one, 0) - programs(0, 0)) + (programs(0, two) - programs(0, 0)), rtol=0, atol=1e-9)


@pytest.mark.parametrize("equations", ["relu", "softplus"])
def test_nonlinear_programs_do_not_add(equations: str) -> None:
    """The power of the test above: it fails where it should."""
    graph = torch.tensor([[0.0, 1.0, 1.0], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    z = torch.randn(200, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    a, b = torch.tensor([2.0, 0.0, 0.0], dtype=torch.float64), torch.tensor([0.0, -2.0, 0.0], dtype=torch.float64)
    base = solve(z, graph, equations)
    both = solve(z + a + b, graph, equations) - base
    apart = (solve(z + a, graph, equations) - base) + (solve(z + b, graph, equations) - base)
    assert (both - apart).abs().max() > 1e-3


def test_gradients() -> None:
    graph = random_dag(5, 7).requires_grad_()
    e = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    clamp = torch.tensor([NAN, 1.0, NAN, NAN, NAN], dtype=torch.float64)
    for held in (None, clamp):
        assert torch.autograd.gradcheck(lambda a, b, held=held: solve(a, b.triu(1), clamp=held), (e, graph))


# -- graphs --------------------------------------------------------------------------------------------------------------------


def test_longest_path_and_order_agree_with_networkx() -> None:
    for seed in range(10):
        graph = random_dag(9, seed)
        network = nx.from_numpy_array(graph.numpy(), create_using=nx.DiGraph)
        assert longest_path(graph) == nx.dag_longest_path_length(network, weight=None, default_weight=1)
        place = {k: i for i, k in enumerate(topological_order(graph))}
        assert all(place[j] < place[k] for j, k in network.edges)


def test_cycles_are_refused_by_name() -> None:
    graph = torch.zeros(4, 4)
    graph[0, 1] = graph[1, 2] = graph[2, 1] = graph[2, 3] = 1.0
    with pytest.raises(PyrocausalError, match="cycle through node 1"):
        topological_order(graph)
    with pytest.raises(PyrocausalError, match="cycle"):
        allowed_edges(4, graph)


def test_kinds_of_graphs() -> None:
    assert allowed_edges(5, "full").sum() == 10
    assert not allowed_edges(5, "none").any()
    assert allowed_edges(5, "free").sum() == 20
    assert allowed_edges(5, np.eye(5, k=1)).sum() == 4
    share = float(allowed_edges(512, "random").float().sum()) / (512 * 511 / 2)
    assert abs(share - 0.02998) < 5 * (0.03 * 0.97 / 130816) ** 0.5  # five standard errors: false alarm 6e-7
    assert torch.equal(allowed_edges(50, "random", seed=1), allowed_edges(50, "random", seed=1))
    assert not torch.equal(allowed_edges(50, "random", seed=1), allowed_edges(50, "random", seed=2))
    with pytest.raises(PyrocausalError, match="'full', 'free', 'none', 'random' or a matrix"):
        allowed_edges(5, "dense")
    with pytest.raises(PyrocausalError, match=r"\(4, 4\).*5 programs"):
        allowed_edges(5, torch.zeros(4, 4))
