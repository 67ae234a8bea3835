"""The posterior in ArviZ and NetworkX, and the evidence against closed forms."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from typing import Any

import anndata as ad
import arviz as az
import matplotlib as mpl
import networkx as nx
import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.nn import PyroModule
from torch import Tensor

import pyrocausal as pc
from pyrocausal import posterior, query
from pyrocausal.elbo import ELBO
from pyrocausal.errors import InterventionError
from pyrocausal.fit import Fit, coords_of, reference_cells
from pyrocausal.structural import mechanism_shift

mpl.use("Agg")
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def counts() -> pc.PerturbationData:
    adata = pc.simulate.svae_screen(
        n_perturbations=12, n_latent=4, cells_per_perturbation=40, n_genes=30, n_control=100, library_size=2000.0
    )
    return pc.PerturbationData.from_anndata(adata)


@pytest.fixture(scope="session")
def fitted(counts: pc.PerturbationData) -> pc.Fit:
    model, guide = pc.build("sams_vae", counts, n_latent=4, n_hidden=32, n_layers=2, turns=(0.5,))
    return pc.fit(model, guide, counts, max_epochs=30, batch_size=128, lr=1e-2)


@pytest.fixture(scope="session")
def cells(counts: pc.PerturbationData) -> pc.PerturbationData:
    return counts[::20]


@pytest.fixture(scope="session")
def idata(fitted: pc.Fit, cells: pc.PerturbationData) -> Any:
    return pc.to_inference_data(fitted, draws=40, cells=cells, predictive_draws=30, particles=5)


@pytest.fixture(autouse=True)
def _own_random_state():
    with torch.random.fork_rng(devices=[]):
        yield


# -- ArviZ ------------------------------------------------------------------------------------------------------------------------

DIMS = {
    ("posterior", "mask"): ("chain", "draw", "perturbation", "latent"),
    ("posterior", "effect"): ("chain", "draw", "perturbation", "latent"),
    ("posterior", "net_effect"): ("chain", "draw", "perturbation", "latent"),
    ("posterior_predictive", "x"): ("chain", "draw", "cell", "gene"),
    ("log_likelihood", "x"): ("chain", "draw", "cell"),
    ("observed_data", "x"): ("cell", "gene"),
    ("constant_data", "dose"): ("cell", "perturbation"),
    ("constant_data", "library_size"): ("cell",),
    ("constant_data", "batch_code"): ("cell",),
    ("sample_stats", "elbo"): ("epoch",),
    ("sample_stats", "elbo_validation"): ("epoch",),
}


def test_groups_and_dimensions(idata):
    assert {(g, v): idata[g][v].dims for g in {g for g, _ in DIMS} for v in idata[g].data_vars} == DIMS
    assert set(idata.groups()) == {g for g, _ in DIMS}
    assert idata.posterior.sizes["draw"] == 40
    assert idata.posterior_predictive.sizes["draw"] == 30


def test_coordinates_are_the_real_names(idata, cells, fitted):
    assert list(idata.posterior["perturbation"].to_numpy()) == list(cells.perturbations)
    assert list(idata.posterior_predictive["gene"].to_numpy()) == list(cells.genes)
    for group in ("posterior_predictive", "log_likelihood", "observed_data", "constant_data"):
        assert list(idata[group]["cell"].to_numpy()) == list(cells.cells)
    assert list(idata.sample_stats["epoch"].to_numpy()) == list(fitted.history.index)


def test_values_are_those_of_the_fit(idata, cells, fitted):
    post = idata.posterior
    assert set(np.unique(post["mask"])) <= {0.0, 1.0}
    assert np.array_equal(post["net_effect"], post["mask"] * post["effect"])
    assert np.array_equal(idata.observed_data["x"], cells.dense())
    assert np.array_equal(idata.constant_data["dose"], cells.dose.toarray())
    assert np.array_equal(idata.sample_stats["elbo"], fitted.history["elbo"])
    probability = fitted.guide.table.logits.sigmoid().numpy()
    error = np.sqrt(probability * (1 - probability) / 40)
    assert (np.abs(post["mask"][0].mean("draw").to_numpy() - probability) <= 5 * error + 1e-4).all()


def test_predictions_have_the_cells_library_and_mean(idata, cells):
    """The posterior-predictive total of a cell is its library, up to counting noise (mean over 30 draws)."""
    total = idata.posterior_predictive["x"][0].sum("gene")
    error = total.std("draw") / math.sqrt(30)
    assert (np.abs(total.mean("draw") - cells.library_size) <= 5 * error).all()
    correlation = np.corrcoef(idata.posterior_predictive["x"][0].mean("draw").to_numpy().ravel(), cells.dense().ravel())[0, 1]
    assert correlation > 0.9


def test_without_cells_there_are_globals_only(fitted):
    idata = pc.to_inference_data(fitted, draws=6)
    assert set(idata.groups()) == {"posterior", "sample_stats"}


def test_same_seed_same_data_and_the_callers_random_state(fitted, cells):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    one, two = (pc.to_inference_data(fitted, draws=5, cells=cells[:4], predictive_draws=3, particles=2) for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    assert all(one[g].equals(two[g]) for g in one.groups())


def test_summary_forest_and_loo_run(idata):
    summary = az.summary(idata, var_names=["net_effect"], kind="stats")
    assert "net_effect[pert00, 0]" in summary.index
    assert np.isfinite(summary["mean"]).all()
    assert az.plot_forest(idata, var_names=["effect"], coords={"perturbation": ["pert03"]}, combined=True) is not None
    mpl.pyplot.close("all")
    loo = az.loo(idata, reff=1.0)
    assert np.isfinite(loo.elpd_loo)
    assert loo.n_data_points == idata.log_likelihood.sizes["cell"]


@pytest.mark.parametrize("local", [False, True])
def test_a_summary_of_everything_runs(fitted, cells, local):
    idata = pc.to_inference_data(fitted, draws=8, cells=cells[:3], predictive_draws=4, particles=2, local=local)
    assert len(az.summary(idata, kind="stats")) > 0


def test_too_much_is_refused_in_one_line(fitted, cells, monkeypatch):
    monkeypatch.setattr(posterior, "MAX_BYTES", 1000)
    with pytest.raises(InterventionError, match=r"would take .* GiB; pass fewer") as caught:
        pc.to_inference_data(fitted, draws=50, cells=cells)
    assert "\n" not in str(caught.value)


def test_importing_the_library_imports_no_arviz():
    code = "import sys, pyrocausal; print([m for m in ('arviz', 'matplotlib', 'scanpy', 'sklearn') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


# -- a linear-Gaussian model whose evidence is known --------------------------------------------------------------------------------

P, D, G, SIGMA = 3, 2, 5, 0.7


class Factor(PyroModule):
    """``z ~ Normal(0, I)``, ``x ~ Normal((z + dose effect) W, sigma)``; without globals the effect is a plain tensor."""

    def __init__(self, has_globals: bool, product: Any = mechanism_shift) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(4)
        self.has_globals, self.product = has_globals, product
        self.register_buffer("weight", torch.randn(D, G, generator=g))
        self.register_buffer("table", torch.randn(P, D, generator=g))

    def forward(self, batch: Any) -> Tensor:
        effect = pyro.sample("effect", dist.Normal(torch.zeros(P, D), 1.0).to_event(2)) if self.has_globals else self.table
        with batch.cells():
            dose = pyro.deterministic("dose", batch.dose, event_dim=1)
            z = pyro.sample("z", dist.Normal(torch.zeros(D), 1.0).to_event(1))
            shift = pyro.deterministic("shift", self.product(dose, effect), event_dim=1)
            return pyro.sample("x", dist.Normal((z + shift) @ self.weight, SIGMA).to_event(1), obs=batch.x)

    def evidence(self, x: Tensor, dose: Tensor, effect: Tensor, effect_sd: float = 0.0) -> Tensor:
        """log p(x) of each cell: z, and the effect's uncertainty, integrated out."""
        spread = torch.eye(D) * (1 + effect_sd**2 * dose.square().sum(-1))[..., None, None]
        covariance = self.weight.T @ spread @ self.weight + SIGMA**2 * torch.eye(G)
        return dist.MultivariateNormal(dose @ effect @ self.weight, covariance).log_prob(x)


class FactorGuide(PyroModule):
    """The exact posterior of z given the effect, or one that is wider by a factor."""

    def __init__(self, model: Factor, effect_sd: float = 0.0, wider: float = 1.0) -> None:
        super().__init__()
        self.has_globals, self.product, self.table, self.weight = model.has_globals, model.product, model.table, model.weight
        self.effect_sd = effect_sd
        covariance = torch.linalg.inv(torch.eye(D) + self.weight @ self.weight.T / SIGMA**2)
        self.gain = self.weight.T @ covariance / SIGMA**2
        self.covariance = wider**2 * covariance

    def forward(self, batch: Any) -> None:
        effect = self.table
        if self.has_globals:
            law = dist.Normal(self.table, self.effect_sd).to_event(2) if self.effect_sd else dist.Delta(self.table, event_dim=2)
            effect = pyro.sample("effect", law)
        with batch.cells():
            loc = (batch.x - self.product(batch.dose, effect) @ self.weight) @ self.gain
            pyro.sample("z", dist.MultivariateNormal(loc, self.covariance))


def tiny_screen(n: int = 40) -> pc.PerturbationData:
    labels = np.array(["control", "A", "B", "C", "A+B"], dtype=object)[np.arange(n) % 5]
    obs = pd.DataFrame({"perturbation": labels}, index=[f"c{i}" for i in range(n)])
    x = np.random.default_rng(0).normal(size=(n, G)).astype(np.float32)
    return pc.PerturbationData.from_anndata(ad.AnnData(x, obs=obs))


def as_fit(model: Any, guide: Any, data: pc.PerturbationData) -> Fit:
    """The pair as it stands, without training."""
    return Fit(
        model=model.eval(),
        guide=guide.eval(),
        elbo=ELBO()(model, guide),
        history=pd.DataFrame({"elbo": [], "validation": []}),
        coords=coords_of(data),
        cells_per_perturbation=data.cells_per_perturbation,
        stopped="max_epochs",
        settings={"n_cells": len(data)},
        reference=reference_cells(data),
    )


def factor_fit(has_globals: bool = True, effect_sd: float = 0.0, wider: float = 1.0, product: Any = mechanism_shift):
    model, data = Factor(has_globals, product), tiny_screen()
    return model, as_fit(model, FactorGuide(model, effect_sd, wider), data), data


def exact(model: Factor, data: pc.PerturbationData, effect_sd: float = 0.0) -> np.ndarray:
    batch = data.batch()
    return model.evidence(batch.x, batch.dose, model.table, effect_sd).numpy()


def relative_variance(wider: float) -> float:
    """Variance of the importance weight over its square mean, when the proposal is the exact posterior, wider: D dimensions."""
    return (wider**2 / math.sqrt(2 * wider**2 - 1)) ** D - 1


GLOBALS = pytest.mark.parametrize("has_globals", [True, False], ids=["Delta globals", "no globals"])
PRODUCTS = pytest.mark.parametrize("product", [mechanism_shift, torch.matmul], ids=["broadcasting", "draw by draw"])


@GLOBALS
@PRODUCTS
@pytest.mark.parametrize("particles", [1, 10, 1000])
def test_log_likelihood_is_the_evidence_under_the_exact_posterior(has_globals, product, particles):
    if product is torch.matmul and particles == 1000:
        particles = 50
    model, fit, data = factor_fit(has_globals, product=product)
    tables = {"effect": model.table.numpy()[None]} if has_globals else {}
    got = posterior.log_likelihood(fit, data, tables, particles)
    assert got.shape == (1, len(data))
    assert np.allclose(got[0], exact(model, data), atol=1e-3)


def test_log_likelihood_follows_each_draw_of_the_globals():
    model, fit, data = factor_fit(effect_sd=0.5)
    effects = torch.randn(4, P, D, generator=torch.Generator().manual_seed(0))
    got = posterior.log_likelihood(fit, data, {"effect": effects.numpy()}, particles=3)
    batch = data.batch()
    for s in range(4):
        assert np.allclose(got[s], model.evidence(batch.x, batch.dose, effects[s]), atol=1e-3)


def test_log_likelihood_with_a_wider_guide_is_within_monte_carlo_error():
    """40 cells at five standard errors, whose size is known in closed form."""
    model, fit, data = factor_fit(wider=1.5)
    torch.manual_seed(0)
    got = posterior.log_likelihood(fit, data, {"effect": model.table.numpy()[None]}, particles=1000)[0]
    assert (np.abs(np.exp(got - exact(model, data)) - 1) <= 5 * math.sqrt(relative_variance(1.5) / 1000)).all()
    assert np.abs(got - exact(model, data)).max() > 1e-4


def weights_by_hand(fit: Fit, batch: Any, tables: dict[str, Tensor], n: int) -> np.ndarray:
    """Log importance weights of each cell, one particle at a time, in plain Pyro, [n, cells]."""
    guide, model = (poutine.condition(part, data=tables) for part in (fit.guide, fit.model))
    out = []
    for _ in range(n):
        with torch.no_grad():
            guided = poutine.trace(guide).get_trace(batch)
            trace = poutine.trace(poutine.replay(model, trace=guided)).get_trace(batch)
            trace.compute_log_prob()
            guided.compute_log_prob()
        p = trace.nodes["x"]["unscaled_log_prob"] + trace.nodes["z"]["unscaled_log_prob"]
        out.append((p - guided.nodes["z"]["unscaled_log_prob"]).double().numpy())
    return np.stack(out)


def test_log_likelihood_is_brute_force_importance_sampling(fitted, cells):
    """Two estimates of one number, 2 draws x 6 cells, within five standard errors of their difference."""
    some, n = cells[:6], 400
    torch.manual_seed(1)
    tables = posterior.global_draws(fitted, 2)
    parts = np.stack([posterior.log_likelihood(fitted, some, tables, particles=40) for _ in range(10)])
    for s in range(2):
        by_hand = weights_by_hand(fitted, some.batch(), {k: torch.as_tensor(v[s]) for k, v in tables.items()}, n)
        top = by_hand.max(0)
        weight, ours = np.exp(by_hand - top), np.exp(parts[:, s] - top)
        error = np.sqrt(weight.var(0, ddof=1) / n + ours.var(0, ddof=1) / 10)
        assert (np.abs(weight.mean(0) - ours.mean(0)) <= 5 * error).all()


@GLOBALS
@PRODUCTS
def test_iwelbo_is_the_evidence_with_a_thousand_particles(has_globals, product):
    model, fit, data = factor_fit(has_globals, product=product)
    got = pc.iwelbo(fit, data, particles=1000 if product is mechanism_shift else 50)
    assert np.allclose(got, exact(model, data), atol=1e-3)


def test_iwelbo_integrates_over_the_globals():
    """With an uncertain effect it is the log predictive density, whose closed form has the effect's variance in it."""
    model, fit, data = factor_fit(effect_sd=0.4)
    got = pc.iwelbo(fit, data, particles=2000)
    batch = data.batch()
    effects = model.table + 0.4 * torch.randn(2000, P, D, generator=torch.Generator().manual_seed(9))
    each = torch.stack([model.evidence(batch.x, batch.dose, e) for e in effects]).double().exp().numpy()
    error = each.std(0) / each.mean(0) / math.sqrt(2000)
    assert (np.abs(np.exp(got - exact(model, data, 0.4)) - 1) <= 5 * error + 1e-4).all()


@pytest.mark.parametrize("pair", ["linear", "linear without globals", "fitted"])
def test_iwelbo_does_not_fall_with_particles_in_expectation(pair, fitted, cells):
    """1, 10, 100 particles; the mean over cells in 12 runs; within three standard errors."""
    if pair == "fitted":
        fit, data, model = fitted, cells[:10], None
    else:
        model, fit, data = factor_fit(has_globals=pair == "linear", wider=1.6)
    runs = {n: np.array([pc.iwelbo(fit, data, particles=n, seed=s).mean() for s in range(12)]) for n in (1, 10, 100)}
    for few, many in itertools.pairwise(runs):
        error = np.sqrt(runs[few].var(ddof=1) / 12 + runs[many].var(ddof=1) / 12)
        assert runs[many].mean() >= runs[few].mean() - 3 * error
    if model is not None:
        assert runs[100].mean() > runs[1].mean() + 0.1  # a wider guide leaves something to gain
        assert abs(runs[100].mean() - exact(model, data).mean()) <= 0.01 + 3 * runs[100].std(ddof=1) / math.sqrt(12)


@pytest.mark.parametrize("chunk", [50, 4096])
def test_iwelbo_does_not_depend_on_chunks_in_law(chunk, monkeypatch):
    model, fit, data = factor_fit(wider=1.3)
    monkeypatch.setattr(posterior, "MAX_ROWS", chunk)
    got = pc.iwelbo(fit, data, particles=200)
    assert (np.abs(np.exp(got - exact(model, data)) - 1) <= 5 * math.sqrt(relative_variance(1.3) / 200)).all()


def test_local_sites_are_draws_of_the_cells_own_posterior():
    """The first two moments of z in each cell, 400 draws, within five standard errors."""
    model, fit, data = factor_fit()
    z = pc.to_inference_data(fit, draws=400, cells=data[:6], predictive_draws=400, particles=1, local=True).posterior["z"]
    assert z.dims[2:] == ("cell", "latent")
    assert list(z["cell"].to_numpy()) == list(data.cells[:6])
    loc = (torch.as_tensor(data[:6].dense()) - data[:6].batch().dose @ model.table @ model.weight) @ fit.guide.gain
    variance = fit.guide.covariance.diagonal()
    assert (np.abs(z[0].mean(z.dims[1]) - loc.numpy()) <= 5 * np.sqrt(variance.numpy() / 400)).all()
    assert np.allclose(z[0].var(z.dims[1]), variance.expand(6, -1), rtol=5 * math.sqrt(2 / 400))


def test_a_posterior_draw_serves_all_cells_of_the_predictive(monkeypatch):
    """In a linear model without noise of z and x, a draw's prediction reveals its effect; cells of one draw must agree on it."""
    model, data = Factor(has_globals=True), tiny_screen()
    fit = as_fit(model, FactorGuide(model, effect_sd=0.5, wider=1e-4), data)
    treated = data.select("A")
    monkeypatch.setattr(posterior, "MAX_ROWS", 8)  # cells come two at a time
    idata = pc.to_inference_data(fit, draws=6, cells=treated, predictive_draws=6, particles=2, local=True)
    z = torch.as_tensor(idata.posterior["z"].to_numpy()[0])  # [6, n, D]: z = (x - effect W) gain, so effect W gain = x gain - z
    shown = torch.as_tensor(treated.dense()) @ fit.guide.gain - z
    assert np.ptp(shown.mean(1), axis=0).max() > 0.05
    assert torch.allclose(shown, shown[:, :1].expand_as(shown), atol=1e-2)


# -- NetworkX -----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def graph(fitted: pc.Fit) -> nx.DiGraph:
    return pc.to_networkx(fitted, draws=200)


def by_kind(graph: nx.DiGraph, kind: str) -> list[tuple[str, str, dict[str, Any]]]:
    return [(a, b, e) for a, b, e in graph.edges(data=True) if graph.nodes[a]["kind"] == kind]


def test_edges_to_programs_are_the_means_of_the_drawn_tables(graph, fitted):
    with query._seeded(0, fitted):
        tables = posterior.global_draws(fitted, 200)
    moved, names = tables["mask"] * tables["effect"], fitted.coords["perturbation"]
    probability = tables["mask"].mean(0)
    edges = {(a, b): e for a, b, e in by_kind(graph, "perturbation")}
    assert set(edges) == {(names[p], f"program {d}") for p, d in zip(*np.nonzero(probability >= 0.5), strict=True)}
    for p, d in zip(*np.nonzero(probability >= 0.5), strict=True):
        edge = edges[names[p], f"program {d}"]
        assert edge["probability"] == pytest.approx(probability[p, d])
        assert edge["mean"] == pytest.approx(moved[:, p, d].mean(), rel=1e-5)
        assert (edge["lower"], edge["upper"]) == pytest.approx(tuple(np.quantile(moved[:, p, d], [0.05, 0.95])), rel=1e-5)


def test_the_graph_is_bipartite_in_layers_with_probabilities(graph, counts):
    assert all(0 <= e["probability"] <= 1 and e["lower"] <= e["mean"] <= e["upper"] for _, _, e in graph.edges(data=True))
    kinds = {(graph.nodes[a]["kind"], graph.nodes[b]["kind"]) for a, b in graph.edges}
    assert kinds == {("perturbation", "program"), ("program", "gene")}
    assert nx.is_directed_acyclic_graph(graph)
    assert set(counts.perturbations) <= set(graph.nodes)
    assert max(dict(graph.out_degree([n for n, k in graph.nodes("kind") if k == "program"])).values()) <= 15
    assert graph.graph["unit"] == "log1p_cp10k"


def test_edges_to_programs_are_the_true_targets():
    """Up to the order of the programs, which no data tell: there is one matching under which every perturbation has its true targets."""
    adata = pc.simulate.sams_screen(
        n_perturbations=16, n_latent=4, cells_per_perturbation=60, n_genes=40, n_control=100, target_probability=0.01, shift=4.0, seed=2
    )
    data = pc.PerturbationData.from_anndata(adata)
    model, guide = pc.build("sams_vae", data, n_latent=4, n_hidden=32, n_layers=2)
    graph = pc.to_networkx(pc.fit(model, guide, data, max_epochs=40, batch_size=128, lr=1e-2))
    truth, names = adata.uns["truth"]["mask"].astype(bool), list(adata.uns["truth"]["perturbations"])
    found = np.zeros_like(truth)
    for a, b, _ in by_kind(graph, "perturbation"):
        found[names.index(a), int(b.split()[1])] = True
    assert any(np.array_equal(found[:, list(order)], truth) for order in itertools.permutations(range(4)))


def test_edges_to_genes_have_their_closed_form():
    model, fit, _ = factor_fit(effect_sd=0.1)
    graph = pc.to_networkx(fit, draws=60, minimum=0.3)
    weight = model.weight.numpy()
    edges = {(a, b): e for a, b, e in by_kind(graph, "program")}
    programs = {n for n, k in graph.nodes("kind") if k == "program"}
    assert set(edges) == {
        (f"program {d}", str(g)) for d in range(D) for g in range(G) if abs(weight[d, g]) > 0.3 and f"program {d}" in programs
    }
    for (program, gene), edge in edges.items():
        assert edge["mean"] == pytest.approx(weight[int(program.split()[1]), int(gene)], abs=1e-4)
        assert edge["probability"] == 1
    assert graph.graph["unit"] == "data"


def test_without_a_mask_the_probability_is_that_of_the_sign():
    model, fit, _ = factor_fit(effect_sd=1.0)
    graph = pc.to_networkx(fit, draws=300, threshold=0.0)
    p_positive = 0.5 * (1 + torch.erf(model.table / math.sqrt(2))).numpy()
    for a, b, edge in by_kind(graph, "perturbation"):
        p = p_positive["ABC".index(a), int(b.split()[1])]
        expected = max(p, 1 - p)
        assert abs(edge["probability"] - expected) <= 5 * math.sqrt(0.25 / 300)


def test_the_drawing_can_be_written(graph, tmp_path):
    nx.write_graphml(graph, tmp_path / "graph.graphml")
    back = nx.read_graphml(tmp_path / "graph.graphml")
    assert set(back.edges) == set(graph.edges)


def test_a_model_without_effects_has_no_graph():
    _, fit, _ = factor_fit(has_globals=False)
    with pytest.raises(InterventionError, match="samples no 'effect'"):
        pc.to_networkx(fit)
