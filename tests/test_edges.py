"""Edge priors as sites, their posteriors, and the order that a priority gives."""

import numpy as np
import pyro.poutine as poutine
import pytest
import torch

import pyrocausal as pc
from pyrocausal import simulate_graph
from pyrocausal.edges import PRIORS, EdgePosterior, assemble, edge_index, order_of, sample_graph
from pyrocausal.structural import allowed_edges, interventional_order, topological_order, total_effects

SITES = {
    "normal": {"graph_weight"},
    "laplace": {"graph_weight"},
    "horseshoe": {"graph_weight", "graph_scale"},
    "spike_slab": {"graph_weight", "edge"},
}


@pytest.fixture(scope="module")
def adata():
    return simulate_graph.graph_screen(
        n_latent=5, n_genes=60, n_perturbations=15, cells_per_perturbation=120, n_control=500, edge_probability=0.4, seed=3
    )


@pytest.mark.parametrize("prior", PRIORS)
def test_every_prior_finds_the_graph_and_says_how_surely(prior: str, adata) -> None:
    data = pc.PerturbationData.from_anndata(adata, kind="normalised")
    anchors = (adata.varm["loadings"] > 0).T
    model, guide = pc.build("sccvae", data, n_latent=5, decoder="anchored", anchors=anchors, edge_prior=prior, n_hidden=32)
    fit = pc.fit(model, guide, data, max_epochs=40, batch_size=128)
    assert {n for n in fit.history.columns if n.removeprefix("site:") in set.union(*SITES.values())} == {f"site:{n}" for n in SITES[prior]}
    true = adata.uns["truth"]["graph"]
    found, probability = guide.edges.mean().numpy(), guide.edges.probability(0.15).numpy()
    assert 2 <= (true != 0).sum() <= 8
    assert ((np.abs(found) > 0.2) == (true != 0)).all()
    np.testing.assert_allclose(found[true != 0], true[true != 0], atol=0.15)
    assert probability[true != 0].min() > 0.9 and probability[true == 0].max() < 0.5


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("learned", [False, True])
def test_model_and_guide_agree_on_sites_and_shapes(prior: str, learned: bool) -> None:
    n = 4
    index = edge_index(allowed_edges(n, "free" if learned else "full"))
    posterior = EdgePosterior(index, n, prior, learned)
    if learned:
        posterior.set_order([2, 0, 3, 1])
    guided = poutine.trace(posterior).get_trace()
    replayed = poutine.trace(poutine.replay(sample_graph, trace=guided)).get_trace(index, n, prior, torch.tensor(0.3), 0.1, learned)
    assert {k for k in guided.nodes if not k.startswith("_")} | {"graph"} == {k for k in replayed.nodes if not k.startswith("_")}
    graph, order = replayed.nodes["_RETURN"]["value"]
    torch.testing.assert_close(graph, guided.nodes["_RETURN"]["value"][0])
    assert (order is None) == (not learned)
    if learned:
        assert order.tolist() == [2, 0, 3, 1] and (graph[order][:, order] == graph[order][:, order].triu(1)).all()
    assert all(site["fn"].log_prob(site["value"]).isfinite().all() for name, site in replayed.nodes.items() if site["type"] == "sample")


def test_assemble_places_weights_and_the_priority_removes_what_points_back() -> None:
    index = edge_index(allowed_edges(3, "free"))
    weight = torch.arange(1.0, 7.0).expand(2, 6)
    full = assemble(weight, index, 3)
    assert full.shape == (2, 3, 3) and torch.equal(full[0], torch.tensor([[0.0, 1, 2], [3, 0, 4], [5, 6, 0]]))
    assert not assemble(weight, index, 3, torch.zeros(3)).any()  # no order, no edge
    ordered = assemble(weight[0], index, 3, torch.tensor([0.0, 2.0, 1.0]))
    assert torch.equal(ordered, torch.tensor([[0.0, 1, 2], [0, 0, 0], [0, 6, 0]]))
    assert order_of(torch.tensor([0.0, 2.0, 1.0])).tolist() == topological_order(ordered) == [0, 2, 1]


@pytest.mark.parametrize("seed", range(10))
def test_the_order_follows_from_total_effects(seed: int) -> None:
    """Any order that a graph allows is right; noise of one standard error counts for nothing."""
    rng = np.random.default_rng(seed)
    graph = np.triu((rng.random((8, 8)) < 0.4) * rng.uniform(0.4, 0.9, (8, 8)) * rng.choice([-1, 1], (8, 8)), 1)
    places = rng.permutation(8)
    turned = torch.tensor(graph[places][:, places])
    noisy = total_effects(turned) + 0.01 * torch.tensor(rng.standard_normal((8, 8)))
    place = {k: i for i, k in enumerate(interventional_order(noisy, torch.full((8,), 1e4, dtype=torch.float64)))}
    assert all(place[int(j)] < place[int(k)] for j, k in turned.nonzero())
    assert interventional_order(noisy, torch.zeros(8)) == list(range(8))  # nothing shifted, nothing known


def test_an_unknown_prior_is_refused() -> None:
    with pytest.raises(ValueError, match="edge_prior='lasso'"):
        EdgePosterior(edge_index(allowed_edges(3, "full")), 3, "lasso")
