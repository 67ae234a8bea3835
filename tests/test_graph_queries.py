"""Questions to a model with a graph (clamp, cut, set_edge, shift) against structural equations that are solved by hand, node by node."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import anndata as ad
import networkx as nx
import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyro.nn import PyroModule
from torch import Tensor

import pyrocausal as pc
from pyrocausal import posterior, query, worlds
from pyrocausal.compile_sites import compile_shift, compile_sites
from pyrocausal.coupling import couple
from pyrocausal.elbo import ELBO
from pyrocausal.errors import InterventionError
from pyrocausal.fit import Fit, coords_of, reference_cells
from pyrocausal.interventions import Intervention, resolve
from pyrocausal.soft import Change, Soft
from pyrocausal.structural import mechanism_shift, residual, solve, total_effects

torch.set_num_threads(1)
laws = settings(max_examples=60, deadline=None, derandomize=True, database=None)
few = settings(max_examples=15, deadline=None, derandomize=True, database=None)
D, P = 4, 3
LINK: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "linear": lambda u: u,
    "relu": lambda u: np.maximum(u, 0),
    "softplus": lambda u: np.log1p(np.exp(u)),
}


@pytest.fixture(autouse=True)
def _own_random_state() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        yield


# -- a model of twelve lines, whose cells show their programs ------------------------------------------------------------------------


class Network(PyroModule):
    """x = u (+ noise), u of a graph with the edges 0 -> 1, 0 -> 2, 1 -> 2, 2 -> 3; nothing but the contract's sites."""

    def __init__(self, equations: str = "linear", sampled: bool = False) -> None:
        super().__init__()
        self.equations, self.sampled = equations, sampled
        self.register_buffer("weight", torch.tensor([[0, 0.9, -0.5, 0], [0, 0, 1.2, 0], [0, 0, 0, 0.7], [0, 0, 0, 0.0]]))
        self.register_buffer("table", torch.tensor([[1.5, 0, 0, 0], [0, -1.0, 0, 0], [0, 0, 0.8, 0]]))
        self.anchor = torch.nn.Parameter(torch.zeros(()))

    def forward(self, batch: Any) -> Tensor:
        w = self.weight
        if self.sampled:
            w = pyro.sample("weight", dist.Normal(w, 1.0).to_event(2)) * (w != 0)
        graph = pyro.deterministic("graph", w, event_dim=2)
        effect = pyro.deterministic("effect", self.table, event_dim=2)
        with batch.cells():
            dose = pyro.deterministic("dose", batch.dose, event_dim=1)
            z = pyro.sample("z", dist.Normal(torch.zeros(D), 1.0).to_event(1))
            shift = pyro.deterministic("shift", mechanism_shift(dose, effect), event_dim=1)
            clamp = pyro.deterministic("clamp", torch.full((D,), math.nan), event_dim=1)
            u = pyro.deterministic("u", solve(z + shift, graph, self.equations, clamp), event_dim=1)
            return pyro.sample("x", dist.Normal(u + 0 * self.anchor, 0.5).to_event(1), obs=batch.x)


class Reader(PyroModule):
    """The exogenous state that explains the cell without noise."""

    def __init__(self, model: Network) -> None:
        super().__init__()
        self.of = [model]

    def forward(self, batch: Any) -> None:
        model = self.of[0]
        w = model.weight
        if model.sampled:
            w = pyro.sample("weight", dist.Normal(w, 0.2 * (w != 0) + 1e-3).to_event(2)) * (w != 0)
        with batch.cells():
            e = residual(batch.x, w, model.equations)
            pyro.sample("z", dist.Delta(e - mechanism_shift(batch.dose, model.table), event_dim=1))


def screen(n: int = 30, n_genes: int = D, seed: int = 0) -> pc.PerturbationData:
    rng = np.random.default_rng(seed)
    labels = np.array(["control", "A", "B", "C", "A+B"], dtype=object)[np.arange(n) % 5]
    obs = pd.DataFrame({"perturbation": labels}, index=[f"c{i}" for i in range(n)])
    return pc.PerturbationData.from_anndata(ad.AnnData(rng.normal(size=(n, n_genes)).astype(np.float32), obs=obs), kind="normalised")


def as_fit(model: Any, guide: Any, data: pc.PerturbationData, vectorises: bool | None = None) -> Fit:
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
        vectorises=vectorises,
    )


def network(equations: str = "linear", sampled: bool = False, vectorises: bool | None = None) -> tuple[Network, Fit, pc.PerturbationData]:
    model, data = Network(equations, sampled), screen()
    return model, as_fit(model, Reader(model), data, vectorises), data


# -- the definition -------------------------------------------------------------------------------------------------------------------


def by_hand(
    e: np.ndarray, graph: np.ndarray, equations: str, clamps: Mapping[int, float] = {}, order: list[int] | None = None
) -> np.ndarray:
    """u of the mutilated graph, one node after the other, [n, D]."""
    u = np.zeros_like(e)
    for k in order or range(e.shape[-1]):
        u[:, k] = clamps[k] if k in clamps else e[:, k] + LINK[equations](u) @ graph[:, k]
    return u


def act_by_hand(act: Intervention, z: np.ndarray, dose: np.ndarray, effect: np.ndarray, graph: np.ndarray, equations: str) -> np.ndarray:
    """u of cells with state z and treatment dose under an intervention: every word by its definition."""
    if act.doses is not None:
        dose = np.zeros_like(dose)
        for name, amount in act.doses:
            dose[:, "ABC".index(name)] = amount
    effect, graph = effect.copy(), graph.copy()
    for name in act.silenced:
        effect["ABC".index(name)] = 0
    for (a, b), weight in act.edges:
        graph[a, b] = weight
    shift = dose @ effect
    for k, by in act.shifts:
        shift[:, k] += by
    return by_hand(z + shift, graph, equations, dict(act.clamps))


ACTS = {
    "clamp": pc.clamp(1, 2.0),
    "clamp low": pc.clamp(2, -1.5),
    "two clamps": pc.clamp(0, 0.5) & pc.clamp(2, 1.0),
    "clamp and dose": pc.perturb("A") & pc.clamp("program 1", 0.3),
    "cut": pc.cut(1, 2),
    "cut and dose": pc.cut(0, 1) & pc.perturb("A", dose=2.0),
    "edge": pc.set_edge(0, 3, 1.7),
    "edge changed": pc.set_edge(1, 2, -0.4) & pc.set_edge("program 0", "program 2", 2.0),
    "shift": pc.shift(0, 1.25),
    "shift and dose": pc.shift(1, -2.0) & pc.perturb("B") & pc.perturb("C", dose=0.5),
    "silence": pc.perturb("A") & pc.perturb("B") & pc.silence("A"),
    "nothing": pc.perturb("A", dose=0.0),
    "everything": pc.perturb("A") & pc.silence("C") & pc.clamp(2, 1.0) & pc.cut(2, 3) & pc.set_edge(1, 3, 0.6) & pc.shift(1, 0.9),
}


@laws
@given(
    st.integers(0, 10_000),
    st.sampled_from(["linear", "relu", "softplus"]),
    st.integers(1, 7),
    st.dictionaries(st.integers(0, 6), st.floats(-3, 3), max_size=4),
    st.booleans(),
)
def test_the_primitive_solves_the_mutilated_graph(seed, equations, n_latent, clamps, reorder):
    rng = np.random.default_rng(seed)
    clamps = {k: v for k, v in clamps.items() if k < n_latent}
    order = list(map(int, rng.permutation(n_latent))) if reorder else list(range(n_latent))
    graph = np.zeros((n_latent, n_latent))
    graph[np.ix_(order, order)] = np.triu(rng.normal(size=(n_latent, n_latent)), 1)
    e = rng.normal(size=(5, n_latent))
    clamp = torch.full((n_latent,), math.nan, dtype=torch.float64)
    for k, v in clamps.items():
        clamp[k] = v
    got = solve(torch.as_tensor(e), torch.as_tensor(graph), equations, clamp, torch.as_tensor(order) if reorder else None)  # type: ignore[arg-type]
    np.testing.assert_allclose(got, by_hand(e, graph, equations, clamps, order), rtol=1e-10, atol=1e-10)


WAYS = list(itertools.product(["linear", "relu"], [False, True], [True, False]))


@pytest.mark.parametrize(("equations", "sampled", "vectorises"), WAYS)
def test_counterfactuals_solve_the_mutilated_graph(equations, sampled, vectorises):
    """Of measured cells, x' is u' by hand (their noise is zero), in every draw of the graph."""
    model, fit, data = network(equations, sampled, vectorises)
    cells = data[:10]
    with query._seeded(0, fit):
        drawn = posterior.global_draws(fit, 3)
    graphs = drawn["weight"] * (model.weight.numpy() != 0) if sampled else np.broadcast_to(model.weight.numpy(), (3, D, D))
    out = pc.counterfactual(fit, cells, ACTS, draws=3)
    dose = cells.dose.toarray().astype(float)
    for name, s in itertools.product(ACTS, range(3)):
        graph, table = graphs[s].astype(float), model.table.numpy().astype(float)
        z = residual(torch.as_tensor(cells.dense()).double(), torch.as_tensor(graph), equations).numpy() - dose @ table
        expected = act_by_hand(ACTS[name], z, dose, table, graph, equations)
        np.testing.assert_allclose(out["expression"].sel(intervention=name)[s], expected, atol=1e-4, err_msg=name)
        np.testing.assert_allclose(out["effect"].sel(intervention=name)[s], expected - cells.dense(), atol=1e-4, err_msg=name)


@pytest.mark.parametrize(("equations", "sampled", "vectorises"), WAYS)
def test_fresh_cells_solve_the_mutilated_graph(equations, sampled, vectorises):
    model, fit, _ = network(equations, sampled)
    torch.manual_seed(0)
    acts, draws = list(ACTS.values()), 3 if vectorises else None
    population = fit.reference.rows([0, 1, 2, 3, 4])
    base = worlds.fresh_base(fit.model, fit.guide, fit.reference.rows([0]), population, draws)
    if vectorises:
        mean = worlds.intervened_law(model, base, acts, ["A", "B", "C"], strict=False)[0].mean
    else:
        mean = torch.stack([worlds.intervened_law(model, base, [a], ["A", "B", "C"], strict=False)[0].mean for a in acts], 1)
    graph, z = base.trace.nodes["graph"]["value"].double().numpy(), base.values["z"].double().numpy()
    for s, (k, act) in itertools.product(range(draws or 1), enumerate(acts)):
        here = graph.reshape(-1, D, D)[s if sampled else 0]
        expected = act_by_hand(act, z.reshape(-1, 5, D)[s], np.zeros((5, P)), model.table.double().numpy(), here, equations)
        np.testing.assert_allclose(mean[s, k], expected, atol=1e-4)


@pytest.mark.parametrize("vectorises", [True, False])
def test_effects_have_their_closed_form(vectorises):
    """Linear: a clamp moves what descends by (v - mean of the program) times the total effect, a shift by its size times that."""
    model, fit, _ = network(vectorises=vectorises)
    total = total_effects(model.weight).numpy()
    for k, v in ((0, 2.0), (1, -1.0), (3, 0.5)):
        out = pc.effects(fit, {"clamp": pc.clamp(k, v), "shift": pc.shift(k, v)}, draws=4, cells=9)
        moved = (v - out["baseline"].to_numpy()[:, k, None]) * total[k]
        np.testing.assert_allclose(out["effect"][0], moved, atol=1e-4)
        np.testing.assert_allclose(out["expression"][0][:, k], v, atol=1e-5)
        np.testing.assert_allclose(out["effect"][1], np.broadcast_to(v * total[k], (4, D)), atol=1e-4)


@pytest.mark.parametrize("noise", ["mean", "independent"])
def test_interventional_cells_have_the_law_of_the_graph(noise):
    """The clamped program is at its value in every cell, up to the noise of the measurement."""
    _, fit, _ = network("relu")
    out = pc.interventional(fit, {"clamp": pc.clamp(1, 2.0), "cut": pc.cut(2, 3)}, draws=5, cells=40, noise=noise)
    clamped = out["expression"].sel(intervention="clamp")[..., 1].to_numpy()
    if noise == "mean":
        np.testing.assert_allclose(clamped, 2.0, atol=1e-6)
        assert (out["effect"].sel(intervention="clamp")[..., 0] == 0).all()
        assert (out["effect"].sel(intervention="cut")[..., :3] == 0).all() and abs(
            out["effect"].sel(intervention="cut")[..., 3]
        ).max() > 0.1
    else:
        assert abs(clamped.mean() - 2) < 5 * 0.5 / math.sqrt(200) and clamped.std() == pytest.approx(0.5, rel=0.3)


# -- laws -----------------------------------------------------------------------------------------------------------------------------

DESCENDANTS = {0: {1, 2, 3}, 1: {2, 3}, 2: {3}, 3: set()}


@pytest.mark.parametrize("vectorises", [True, False])
@pytest.mark.parametrize("equations", ["linear", "relu"])
def test_what_does_not_descend_is_unchanged_to_the_bit(equations, vectorises):
    _, fit, data = network(equations, True, vectorises)
    for k, below in DESCENDANTS.items():
        acts = {"clamp": pc.clamp(k, 1.5), "shift": pc.shift(k, 1.5)} | ({"cut": pc.cut(0, k)} if k in (1, 2) else {})
        effect = pc.counterfactual(fit, data[:8], acts, draws=2)["effect"].to_numpy()
        others = [j for j in range(D) if j != k and j not in below]
        assert (effect[..., others] == 0).all()
        assert (np.abs(effect[:2, ..., k]).max((1, 2)) > 0.1).all()
        fresh = pc.effects(fit, acts, draws=2, cells=6)
        np.testing.assert_allclose(fresh["effect"][..., others], 0, atol=0)


@pytest.mark.parametrize("equations", ["linear", "relu"])
def test_clamping_to_the_factual_value_changes_nothing(equations):
    _, fit, data = network(equations, True)
    for i, k in itertools.product(range(4), range(D)):
        cell = data[[i]]
        act = pc.clamp(k, float(cell.dense()[0, k]))
        np.testing.assert_allclose(pc.counterfactual(fit, cell, act, draws=2)["effect"], 0, atol=1e-5)


@pytest.mark.parametrize("vectorises", [True, False])
@pytest.mark.parametrize("equations", ["linear", "relu"])
def test_cutting_is_a_model_without_the_edge(equations, vectorises):
    """In the same fresh cells: a model whose weight is zero gives what cutting gives."""
    _, fit, _ = network(equations, vectorises=vectorises)
    other, there, _ = network(equations, vectorises=vectorises)
    other.weight[1, 2] = 0
    for act in (pc.perturb("A"), pc.clamp(1, 2.0), pc.shift(1, 1.0)):
        cut = pc.effects(fit, act & pc.cut(1, 2), draws=3, cells=6)["expression"]
        np.testing.assert_allclose(cut, pc.effects(there, act, draws=3, cells=6)["expression"], atol=1e-6)


def test_setting_an_edge_to_its_weight_is_doing_nothing():
    model, fit, data = network()
    same = pc.set_edge(1, 2, float(model.weight[1, 2]))
    out = pc.counterfactual(fit, data[:6], {"same": same, "other": pc.cut(0, 1)}, draws=2)
    assert (out["effect"].sel(intervention="same") == 0).all() and (out["expression"].sel(intervention="same") == data[:6].dense()).all()
    both = pc.effects(fit, {"same": same & pc.perturb("A"), "plain": pc.perturb("A")}, draws=3, cells=5)["expression"]
    np.testing.assert_allclose(both[0], both[1], atol=1e-6)


@pytest.mark.parametrize("equations", ["linear", "relu"])
def test_a_shift_to_a_value_is_a_clamp_there_for_what_descends(equations):
    _, fit, data = network(equations)
    for i, k in itertools.product(range(3), range(D)):
        cell = data[[i]]
        acts = {"clamp": pc.clamp(k, 1.0), "shift": pc.shift(k, 1.0 - float(cell.dense()[0, k]))}
        out = pc.counterfactual(fit, cell, acts)["expression"]
        np.testing.assert_allclose(out[0], out[1], atol=1e-5)


def test_a_clamp_makes_what_acts_on_it_irrelevant():
    _, fit, data = network("relu")
    held = pc.clamp(2, 0.7)
    acts = [held, held & pc.shift(2, 5.0), held & pc.perturb("C", dose=3.0), held & pc.cut(1, 2), held & pc.set_edge(0, 2, 9.0)]
    out = pc.counterfactual(fit, data.select("control"), dict(enumerate(acts)), draws=2)["expression"]
    for k in range(1, len(acts)):
        np.testing.assert_allclose(out[k], out[0], atol=1e-6)


def test_without_a_clamp_and_a_dose_the_world_is_the_observed_one():
    _, fit, data = network(sampled=True)
    acts = {
        "zero": pc.perturb("A", dose=0.0),
        "none": pc.untreated(),
        "no shift": pc.shift(1, 0.0),
        "loud": pc.clamp(0, 3.0) & pc.cut(1, 2),
    }
    quiet = ["zero", "none", "no shift"]
    for out in (
        pc.effects(fit, acts, draws=3, cells=5),
        pc.interventional(fit, acts, draws=3, cells=5),
        pc.counterfactual(fit, data.select("control"), acts, draws=3),
    ):
        assert (out["effect"].sel(intervention=quiet) == 0).all() and abs(out["effect"].sel(intervention="loud")).max() > 0.5
    cells = data.select("A", "control")
    assert (pc.counterfactual(fit, cells, {"label": pc.shift(0, 0.0)})["effect"] == 0).all()


programs = st.integers(0, D - 1)
pairs = st.sampled_from([(0, 1), (0, 2), (1, 2), (2, 3)])
numbers = st.sampled_from([-1.0, 0.0, 0.5, 2.0])
graph_words = st.one_of(
    st.builds(pc.clamp, programs, numbers),
    st.builds(pc.shift, programs, numbers),
    pairs.map(lambda e: pc.cut(*e)),
    st.builds(lambda e, w: pc.set_edge(*e, w), pairs, numbers),
)
atoms = st.one_of(graph_words, st.builds(pc.perturb, st.sampled_from("ABC"), st.sampled_from([0.0, 1.0])), st.just(pc.silence("B")))


def joined(parts: list[Intervention]) -> Intervention | None:
    out = parts[0]
    try:
        for part in parts[1:]:
            out = out & part
    except InterventionError:
        return None
    return out


@laws
@given(st.lists(atoms, min_size=1, max_size=4), st.lists(atoms, min_size=1, max_size=4), st.randoms(use_true_random=False))
def test_the_algebra(parts, more, random):
    turned = list(parts)
    random.shuffle(turned)
    one, two, other = joined(parts), joined(turned), joined(more)
    assert one == two
    if one is not None and other is not None:
        assert hash(one) == hash(two) and one & one == one
        assert (str(one) == str(other)) == (one == other)


@few
@given(st.lists(atoms, min_size=2, max_size=4))
def test_the_order_of_and_is_irrelevant_to_the_bit(parts):
    one, two = joined(parts), joined(parts[::-1])
    if one is None or two is None:
        return
    _, fit, data = network("relu", True, True)
    a, b = (pc.counterfactual(fit, data[:4], {"it": act}, draws=2) for act in (one, two))
    assert np.array_equal(a["expression"], b["expression"])


@pytest.mark.parametrize("vectorises", [True, False])
def test_many_at_once_are_one_by_one(vectorises):
    _, fit, data = network("relu", True, vectorises)
    ask: dict[str, Callable[[Any], Any]] = {
        "effects": lambda do: pc.effects(fit, do, draws=3, cells=5),
        "interventional": lambda do: pc.interventional(fit, do, draws=3, cells=5),
        "counterfactual": lambda do: pc.counterfactual(fit, data[:6], do, draws=3),
    }
    for question in ask.values():
        together = question(ACTS)
        for name, act in ACTS.items():
            np.testing.assert_allclose(question({name: act})["expression"][0], together["expression"].sel(intervention=name), atol=1e-5)


def test_draw_by_draw_is_all_draws_at_once():
    """Of one guide without randomness, whose draws are the same in both ways."""
    for equations in ("linear", "relu"):
        at_once, by_draw = (
            pc.counterfactual(fit, data[:7], ACTS, draws=3, noise="mean")
            for fit, data in ((f, d) for _, f, d in (network(equations, vectorises=v) for v in (True, False)))
        )
        np.testing.assert_allclose(at_once["expression"], by_draw["expression"], atol=1e-5)
        np.testing.assert_allclose(at_once["effect"], by_draw["effect"], atol=1e-5)


def test_a_model_whose_graph_does_not_broadcast_is_served_draw_by_draw():
    class Plain(Network):
        def forward(self, batch: Any) -> Tensor:
            graph = pyro.deterministic("graph", self.weight, event_dim=2)
            with batch.cells():
                dose = pyro.deterministic("dose", batch.dose, event_dim=1)
                z = pyro.sample("z", dist.Normal(torch.zeros(D), 1.0).to_event(1))
                shift = pyro.deterministic("shift", dose @ self.table, event_dim=1)
                u = pyro.deterministic("u", (z + shift) @ torch.linalg.inv(torch.eye(D) - graph), event_dim=1)
                return pyro.sample("x", dist.Normal(u + 0 * self.anchor, 0.5).to_event(1), obs=batch.x)

    model, data = Plain(), screen()
    fit = as_fit(model, Reader(model), data)
    acts = {k: ACTS[k] for k in ("cut", "cut and dose", "edge", "shift and dose")}
    out = pc.counterfactual(fit, data[:5], acts, draws=3)
    assert fit.vectorises is False
    _, ours, _ = network()
    np.testing.assert_allclose(out["expression"], pc.counterfactual(ours, data[:5], acts, draws=3)["expression"], atol=1e-5)
    assert ours.vectorises is True


def test_a_model_whose_clamp_does_not_broadcast_is_served_draw_by_draw():
    class Plain(Network):
        def forward(self, batch: Any) -> Tensor:
            with batch.cells():
                dose = pyro.deterministic("dose", batch.dose, event_dim=1)
                z = pyro.sample("z", dist.Normal(torch.zeros(D), 1.0).to_event(1))
                u = pyro.deterministic("shift", mechanism_shift(dose, self.table), event_dim=1) + z
                clamp = pyro.deterministic("clamp", torch.full((D,), math.nan), event_dim=1)
                for k in torch.nonzero(~clamp.isnan()).ravel():
                    u = u.index_fill(-1, k, float(clamp[k]))
                return pyro.sample("x", dist.Normal(u + 0 * self.anchor, 0.5).to_event(1), obs=batch.x)

    model, data = Plain(), screen()
    model.weight.zero_()
    fit, acts = (
        as_fit(model, Reader(model), data),
        {"one": pc.clamp(1, 2.0), "two": pc.clamp(0, 1.0) & pc.clamp(3, -1.0) & pc.shift(1, 2.0)},
    )
    out = pc.counterfactual(fit, data[:5], acts, draws=3)["effect"].to_numpy()
    assert fit.vectorises is False
    x = data[:5].dense()
    zero = np.zeros(5)
    np.testing.assert_allclose(out[0], np.broadcast_to(np.stack([zero, 2 - x[:, 1], zero, zero], 1), (3, 5, D)), atol=1e-5)
    np.testing.assert_allclose(out[1], np.broadcast_to(np.stack([1 - x[:, 0], zero + 2, zero, -1 - x[:, 3]], 1), (3, 5, D)), atol=1e-5)


def test_clamps_make_no_system_of_a_world_of_its_own(monkeypatch):
    _, fit, _ = network(vectorises=True)
    sizes = []
    plain = torch.linalg.solve_triangular
    monkeypatch.setattr(torch.linalg, "solve_triangular", lambda a, b, **how: sizes.append(a.dim()) or plain(a, b, **how))
    pc.effects(fit, {f"{k} {v}": pc.clamp(k, v) for k in range(D) for v in (0.0, 1.0, 2.0)}, draws=3, cells=4)
    assert sizes and set(sizes) == {2}
    values = compile_sites([pc.clamp(0, 1.0), pc.perturb("A")], "ABC", torch.zeros(5, P), {"clamp": torch.zeros(D)}, {"dose", "clamp"})
    assert values.keys() == {"dose", "clamp"} and values["clamp"].shape == (2, 1, D)
    assert values["clamp"].isnan().sum() == 2 * D - 1 and values["clamp"][0, 0, 0] == 1


# -- a fitted SCCVAE -----------------------------------------------------------------------------------------------------------------


def embedding() -> pd.DataFrame:
    return pd.DataFrame(np.random.default_rng(0).standard_normal((P, 2)), index=list("ABC"))


@pytest.fixture(scope="module")
def data() -> pc.PerturbationData:
    plain = screen(120, 10)
    x = plain.dense() + 2 * plain.dose.toarray() @ np.eye(P, 10)
    return pc.PerturbationData.from_anndata(
        ad.AnnData(x.astype(np.float32), obs=pd.DataFrame({"perturbation": plain.labels}, index=list(plain.cells))), kind="normalised"
    )


SETTINGS: dict[str, dict[str, Any]] = {
    "linear": {},
    "relu": {"equations": "relu"},
    "free": {"graph": "free", "equations": "relu"},
    "spike_slab": {"edge_prior": "spike_slab"},
    "targets": {"targets": pd.DataFrame(np.eye(P, D, dtype=np.float32), index=list("ABC"))},
}


@pytest.fixture(scope="module", params=SETTINGS)
def fitted(request: pytest.FixtureRequest, data: pc.PerturbationData) -> Fit:
    settings = {"n_latent": D, "embedding": embedding(), "n_hidden": 16, **SETTINGS[request.param]}
    return pc.fit(*pc.build("sccvae", data, **settings), data, max_epochs=8, batch_size=30)


def along(fit: Fit) -> list[int]:
    """The programs in the order in which the fitted model solves them."""
    guided = poutine.trace(fit.guide).get_trace(fit.reference.rows([0])).nodes
    return guided["priority"]["value"].argsort().tolist() if "priority" in guided else list(range(D))


def acts_along(order: list[int]) -> dict[str, Intervention]:
    a, b, c, d = order
    return {
        "clamp": pc.clamp(b, 1.0),
        "two": pc.clamp(a, -1.0) & pc.clamp(c, 2.0) & pc.perturb("A"),
        "cut": pc.cut(a, c) & pc.perturb("B"),
        "edge": pc.set_edge(a, d, 1.5) & pc.perturb("A", dose=2.0),
        "shift": pc.shift(b, 1.5) & pc.perturb("A"),
        "silence": pc.perturb("A") & pc.perturb("B") & pc.silence("A"),
        "all": pc.perturb("C") & pc.clamp(b, 0.5) & pc.cut(c, d) & pc.set_edge(a, b, 1.0) & pc.set_edge(b, d, -1.0) & pc.shift(c, 1.0),
    }


@pytest.mark.parametrize("draw", range(2))
def test_do_on_a_fitted_model_solves_the_mutilated_graph(fitted, data, draw):
    """pc.do, one posterior draw: u by hand from the draw's own graph, state and tables."""
    torch.manual_seed(draw)
    batch, order = data.batch(range(7)), along(fitted)
    equations = fitted.model.equations
    with torch.no_grad():
        guided = poutine.trace(fitted.guide).get_trace(batch)
        nodes = poutine.trace(poutine.replay(fitted.model, trace=guided)).get_trace(batch.hide()).nodes
        values = {n: s["value"] for n, s in guided.nodes.items() if n in nodes and s["type"] == "sample" and n != "cell"}
        graph, z = nodes["graph"]["value"], values["z"].double().numpy()
        for name, act in acts_along(order).items():
            intervened = pc.do(fitted.model, act, data, given={n: nodes[n]["value"] for n in ("graph", "effect", "priority") if n in nodes})
            u = poutine.trace(poutine.condition(intervened, data=values)).get_trace(batch.hide()).nodes["u"]["value"]
            table = nodes["mask"]["value"].double() * nodes["effect"]["value"].double()
            mutilated, shift = graph.double().numpy().copy(), np.zeros((7, P))
            for p, amount in act.doses or ():
                shift[:, "ABC".index(p)] = amount
            shift = (
                (shift if act.doses is not None else batch.dose.double().numpy()) * [p not in act.silenced for p in "ABC"] @ table.numpy()
            )
            for (a, b), weight in act.edges:
                mutilated[a, b] = weight
            for k, by in act.shifts:
                shift[:, k] += by
            expected = by_hand(z + shift, mutilated, equations, dict(act.clamps), order)
            np.testing.assert_allclose(u, expected, atol=1e-4, rtol=1e-4, err_msg=name)
            if name == "clamp":
                assert torch.equal(u[:, order[0]], nodes["u"]["value"][:, order[0]]) and (u[:, order[1]] == 1).all()


def test_draws_at_once_are_draws_one_by_one_of_a_fitted_model(fitted, data):
    batch, acts = data.batch(range(9)), list(acts_along(along(fitted)).values())
    torch.manual_seed(0)
    base = worlds.factual_base(fitted.model, fitted.guide, batch, 3)
    law, same = worlds.intervened_law(fitted.model, base, acts, ["A", "B", "C"], strict=True)
    assert query._vectorises(fitted) and law.mean.shape == (3, len(acts), 9, 10)
    for s in range(3):
        values = {k: v[s, 0] if k == "z" else v[s, 0, 0] for k, v in base.values.items()}
        with torch.no_grad():
            one = worlds._run_base(fitted.model, values, batch, None)
        for k, act in enumerate(acts):
            single, same_single = worlds.intervened_law(fitted.model, one, [act], ["A", "B", "C"], strict=True)
            torch.testing.assert_close(single.mean[0], law.mean[s, k], atol=1e-4, rtol=1e-4)
            assert torch.equal(same_single[0].expand(9), same.expand(3, len(acts), 9)[s, k])


def test_every_question_to_a_fitted_model(fitted, data):
    acts = acts_along(along(fitted)) | {"nothing": pc.perturb("A", dose=0.0)}
    for out in (
        pc.effects(fitted, acts, draws=3, cells=6),
        pc.interventional(fitted, acts, draws=3, cells=6),
        pc.counterfactual(fitted, data.select("control")[:6], acts, draws=3),
    ):
        effect = out["effect"]
        assert np.isfinite(effect).all() and (effect.sel(intervention="nothing") == 0).all()
        assert all(abs(effect.sel(intervention=name)).max() > 1e-4 for name in ("clamp", "two", "edge", "shift", "all"))
    factual = pc.counterfactual(fitted, data[:10], {"same": pc.shift(0, 0.0), "loud": acts["all"]}, draws=2)
    assert (factual["effect"].sel(intervention="same") == 0).all()
    assert (factual["expression"].sel(intervention="same") == data[:10].dense()).all()


def test_the_last_program_moves_no_other(fitted, data):
    """Clamping the end of the order is decoding with that program alone replaced."""
    last = along(fitted)[-1]
    batch = data.batch(range(5))
    base = worlds.factual_base(fitted.model, fitted.guide, batch, 2)
    law, _ = worlds.intervened_law(fitted.model, base, [pc.clamp(last, 1.0)], ["A", "B", "C"], strict=True)
    u = base.trace.nodes["u"]["value"].clone()
    u[..., last] = 1.0
    with torch.no_grad():
        torch.testing.assert_close(law.mean, worlds.law_under(fitted.model, base, {"u": u}, 1, strict=True).mean, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("noise", ["shared", "quantile"])
@pytest.mark.parametrize("equations", ["linear", "relu"])
def test_counts_stay_as_they_are_under_a_clamp_to_the_factual_value(equations, noise):
    """Of a cell whose program is where it is held already; the genes of a cell that is moved keep their exact law (thinning)."""
    adata = pc.simulate.svae_screen(n_perturbations=3, n_latent=3, cells_per_perturbation=20, n_genes=15, n_control=30, seed=1)
    counts = pc.PerturbationData.from_anndata(adata)
    pair = pc.build("sccvae", counts, n_latent=D, equations=equations, n_hidden=16)
    fit = pc.fit(*pair, counts, max_epochs=5)
    torch.manual_seed(0)
    for i, k in itertools.product((0, 40), range(D)):
        batch = counts.batch([i])
        base = worlds.factual_base(fit.model, fit.guide, batch, 1)
        held = [pc.clamp(k, float(base.trace.nodes["u"]["value"][0, 0, 0, k])), pc.clamp(k, 4.0)]
        law, same = worlds.intervened_law(fit.model, base, held, fit.coords["perturbation"], strict=True)
        assert not same.any()  # whether a clamp changes anything, the equations say
        x = couple(batch.x, base.law, law, same, noise)
        assert torch.equal(x[0, 0], batch.x) and not torch.equal(x[0, 1], batch.x)
    out = pc.counterfactual(
        fit, counts[:6], {"off": pc.clamp(0, 2.0) & pc.shift(1, 1.0), "same": pc.shift(1, 0.0)}, noise=noise, units="counts"
    )
    assert (out["expression"].sel(intervention="same") == counts[:6].dense()).all()
    assert (out["expression"] >= 0).all() and (out["expression"] == out["expression"].round()).all()


# -- soft acts --------------------------------------------------------------------------------------------------------------------------


def run(model: Any, batch: Any) -> dict[str, Any]:
    torch.manual_seed(5)
    with torch.no_grad():
        trace = poutine.trace(model).get_trace(batch)
    return {n: s["value"] for n, s in trace.nodes.items() if s["type"] == "sample" and n != "cell"}


HARD = {"dose": torch.ones(1, P), "z": torch.full((6, D), 0.3), "graph": torch.zeros(D, D), "shift": torch.tensor([1.0, 0, 0, 2])}


@pytest.mark.parametrize("site", HARD)
def test_a_soft_act_that_sets_is_pyro_do(site):
    model, _, data = network("relu", True)
    batch = data.batch(range(6)).hide()
    ours, theirs = run(Soft(Change(site, to=HARD[site]))(model), batch), run(pyro.do(model, data={site: HARD[site]}), batch)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k].nan_to_num(), theirs[k].nan_to_num()) for k in ours)
    plain = run(model, batch)
    assert torch.equal(ours[site], plain[site]) and not torch.equal(ours["x"], plain["x"])  # the natural value is reported


def test_soft_acts_by_coordinate():
    model, _, data = network()
    batch = data.batch(range(6)).hide()
    plain = run(model, batch)
    z, table, w = plain["z"], model.table, model.weight
    got = run(
        Soft(Change("z", plus=1.0, at=[1, 2]), Change("z", times=2.0, at=1), Change("effect", times=0.5, at=(0, slice(None))))(model), batch
    )
    state = z.clone()
    state[:, 2] += 1
    state[:, 1] = 2 * (z[:, 1] + 1)
    half = table.clone()
    half[0] *= 0.5
    assert torch.allclose(got["u"], solve(state + batch.dose @ half, w), atol=1e-6)
    got = run(Soft(Change("graph", to=0.0, at=(1, 2)), Change("graph", to=torch.tensor(3.0), at=(0, 3)))(model), batch)
    edited = w.clone()
    edited[1, 2], edited[0, 3] = 0, 3
    assert torch.allclose(got["u"], solve(z + batch.dose @ table, edited), atol=1e-6)
    got = run(Soft(Change("u", plus=torch.arange(4.0)))(model), batch)
    assert torch.equal(got["u"], plain["u"]) and torch.allclose(got["x"], plain["x"] + torch.arange(4.0), atol=1e-6)


def test_do_with_a_shift_composes_like_any_handler():
    model, _, data = network()
    batch = data.batch(range(6)).hide()
    plain = run(model, batch)
    act = pc.perturb("A", dose=0.5) & pc.shift(0, 1.0) & pc.shift(2, -1.0)
    intervened = pc.do(model, act, data)
    shift = torch.tensor([1.75, 0, -1, 0])
    assert torch.allclose(run(intervened, batch)["u"], solve(plain["z"] + shift, model.weight), atol=1e-6)
    fixed = {"z": torch.zeros(6, D)}
    assert torch.allclose(run(poutine.condition(intervened, data=fixed), batch)["u"], solve(shift.expand(6, D), model.weight), atol=1e-6)
    twice = pc.do(intervened, pc.clamp(1, 2.0), data)  # another site, around it
    clamp = torch.tensor([math.nan, 2, math.nan, math.nan])
    assert torch.allclose(run(twice, batch)["u"], solve(plain["z"] + shift, model.weight, clamp=clamp), atol=1e-6)
    by = compile_shift([pc.untreated(), act], {"shift": plain["shift"]}, {"shift"})
    assert by is not None and by.tolist() == [[[0, 0, 0, 0]], [[1, 0, -1, 0]]]
    assert compile_shift([pc.untreated()], {}, set()) is None


# -- refusals ---------------------------------------------------------------------------------------------------------------------------


def refused(make: Callable[[], Any], *words: str) -> None:
    """The call is refused in one line that holds all the words."""
    with pytest.raises(InterventionError) as caught:
        make()
    message = str(caught.value)
    assert "\n" not in message and len(message) < 260
    for word in words:
        assert word in message, message


def test_contradictions_are_refused():
    refused(lambda: pc.clamp(1, 0.0) & pc.clamp("program 1", 2.0), "program 1", "clamp", "give one")
    refused(lambda: pc.shift(1, 1.0) & pc.shift(1, 2.0), "program 1", "shift", "give one")
    refused(lambda: pc.cut(0, 1) & pc.set_edge(0, 1, 2.0), "0 -> 1", "weight", "give one")
    assert pc.cut(0, 1) & pc.set_edge(0, 1, 0.0) == pc.cut(0, 1)
    assert pc.clamp(2, -0.0) == pc.clamp("program 2", 0) and str(pc.clamp(2, -0.0)) == str(pc.clamp(2, 0.0))


@pytest.mark.parametrize("program", ["A", "program", "program x", 1.5, None])
def test_what_is_no_program_is_refused(program):
    for word in (lambda p: pc.clamp(p, 1.0), lambda p: pc.shift(p, 1.0), lambda p: pc.cut(0, p), lambda p: pc.flip_target("A", p)):
        refused(lambda word=word: resolve(word(program), genes=None), repr(program), "'program 3'")


def test_genes_are_named_where_the_nodes_are_genes():
    act = pc.clamp("G2", 1.0) & pc.clamp(0, 2.0) & pc.cut("G1", "G0") & pc.shift("G0", 3.0)
    numbered = resolve(act, ["G0", "G1", "G2"])
    assert numbered == pc.clamp(2, 1.0) & pc.clamp(0, 2.0) & pc.cut(1, 0) & pc.shift(0, 3.0)
    assert "G2" in str(act) and resolve(numbered, None) == numbered
    refused(lambda: resolve(pc.clamp("G9", 1.0), ["G0", "G1", "G2"]), "G9", "gene")


@pytest.mark.parametrize("value", [math.nan, math.inf, "1", None])
def test_what_is_no_number_is_refused(value):
    for word in (lambda v: pc.clamp(0, v), lambda v: pc.shift(0, v), lambda v: pc.set_edge(0, 1, v)):
        refused(lambda word=word: word(value), repr(value), "finite number")


def test_programs_and_edges_that_are_not_there_are_refused():
    model, fit, data = network()
    for act in (pc.clamp(D, 0.0), pc.shift(-1, 1.0), pc.cut(0, D), pc.set_edge(-1, 2, 1.0)):
        refused(lambda act=act: pc.effects(fit, act), "program", f"there are {D}", "from 0")
        refused(lambda act=act: pc.do(model, act, data, {"graph": model.weight}), "program", f"there are {D}", "from 0")
    for ask in (lambda act: pc.effects(fit, act), lambda act: pc.do(model, act, data, {"graph": model.weight})):
        refused(lambda ask=ask: ask(pc.cut(0, 3)), "no edge from program 0 to program 3", "such as 0 -> 1")
        refused(lambda ask=ask: ask(pc.cut(2, 1)), "no edge from program 2 to program 1")
        refused(lambda ask=ask: ask(pc.set_edge(3, 0, 1.0)), "set_edge(3, 0", "order", "program 0 comes before program 3")
        refused(lambda ask=ask: ask(pc.set_edge(2, 1, 1.0) & pc.cut(1, 2)), "set_edge(2, 1", "order")
    refused(lambda: pc.set_edge(2, 2, 1.0), "itself", "two programs")


def test_a_cycle_is_refused_where_the_order_is_free():
    """A model that solves any acyclic graph: below its diagonal already, so that only a cycle is wrong."""

    class Free(Network):
        def forward(self, batch: Any) -> Tensor:
            graph = pyro.deterministic("graph", self.weight.T, event_dim=2)
            with batch.cells():
                pyro.deterministic("dose", batch.dose, event_dim=1)
                z = pyro.sample("z", dist.Normal(torch.zeros(D), 1.0).to_event(1))
                u = pyro.deterministic("u", (z[..., None, :] @ torch.linalg.inv(torch.eye(D) - graph))[..., 0, :], event_dim=1)
                return pyro.sample("x", dist.Normal(u + 0 * self.anchor, 0.5).to_event(1), obs=batch.x)

    model, data = Free(), screen()
    graph = {"graph": model.weight.T.clone()}
    refused(lambda: pc.do(model, pc.set_edge(0, 3, 1.0), data, graph), "set_edge(0, 3", "cycle", "program 3 acts on program 0")
    refused(lambda: pc.do(model, pc.set_edge(0, 1, 1.0), data, graph), "cycle")
    assert pc.sites(model, pc.set_edge(0, 1, 1.0) & pc.cut(1, 0) & pc.cut(2, 0), data, graph)["graph"][0, 1] == 1
    assert pc.sites(model, pc.set_edge(3, 0, 1.0), data, graph)["graph"][3, 0] == 1


def test_a_learned_order_is_followed(data):
    pair = pc.build("sccvae", data, n_latent=D, embedding=embedding(), graph="free", n_hidden=16)
    with torch.no_grad():
        pair[1].edges.priority.copy_(torch.tensor([0.5, -1.0, 2.0, 0.0]))  # 1, 3, 0, 2
    fit = as_fit(*pair, data)
    assert along(fit) == [1, 3, 0, 2]
    refused(lambda: pc.effects(fit, pc.set_edge(0, 3, 1.0)), "set_edge(0, 3", "program 3 comes before program 0")
    refused(lambda: pc.effects(fit, pc.cut(0, 3)), "no edge from program 0 to program 3")
    out = pc.effects(
        fit, {"set": pc.set_edge(3, 0, 1.0) & pc.shift(3, 2.0), "shift": pc.shift(3, 2.0), "cut": pc.cut(3, 0)}, draws=2, cells=4
    )
    assert abs(out["effect"][0] - out["effect"][1]).max() > 1e-4
    refused(lambda: pc.do(fit.model, pc.set_edge(3, 0, 1.0), data, {"graph": torch.zeros(D, D)}), "learned order", "priority")
    for act in (pc.cut(0, 3), pc.cut(3, 0)):  # without a draw of the order, either may be an edge
        assert (pc.sites(fit.model, act, data, {"graph": torch.zeros(D, D)})["graph"] == 0).all()


def test_an_edge_that_is_off_in_a_draw_is_still_an_edge(data):
    """A spike-and-slab model may be asked to cut an edge of low probability; draw by draw it is often off already."""
    pair = pc.build("sccvae", data, n_latent=D, embedding=embedding(), edge_prior="spike_slab", n_hidden=16)
    with torch.no_grad():
        pair[1].edges.edge_logits.fill_(-30.0)
    for vectorises in (True, False):
        out = pc.effects(as_fit(*pair, data, vectorises), pc.cut(0, 1) & pc.perturb("A"), draws=2, cells=3)
        assert np.isfinite(out["effect"]).all()


def test_an_edge_beyond_the_depth_of_the_equations_is_refused(data):
    allowed = torch.zeros(D, D)
    allowed[0, 1] = allowed[2, 3] = 1
    pair = pc.build("sccvae", data, n_latent=D, embedding=embedding(), graph=allowed, equations="relu", n_hidden=16)
    with torch.no_grad():
        pair[1].edges.weight.fill_(0.5)
    fit = as_fit(*pair, data)
    if fit.model.depth < D - 1:
        refused(lambda: pc.effects(fit, pc.set_edge(1, 2, 1.0)), "path of 3 edges", "along 1")
    assert np.isfinite(pc.effects(fit, pc.set_edge(0, 3, 1.0), draws=2, cells=3)["effect"]).all()
    linear = pc.build("sccvae", data, n_latent=D, embedding=embedding(), graph=allowed, n_hidden=16)
    assert np.isfinite(pc.effects(as_fit(*linear, data), pc.set_edge(1, 2, 1.0), draws=2, cells=3)["effect"]).all()


def test_what_a_model_without_a_graph_can_do_instead(data):
    sams = pc.build("sams_vae", data, n_latent=D, n_hidden=8, n_layers=1)
    fit = as_fit(*sams, data)
    for act, word, site in (
        (pc.clamp(0, 1.0), "clamp", "clamp"),
        (pc.cut(0, 1), "cut", "graph"),
        (pc.set_edge(0, 1, 1.0), "set_edge", "graph"),
    ):
        for ask in (
            lambda act=act: pc.effects(fit, act, draws=2),
            lambda act=act: pc.counterfactual(fit, data[:2], act),
            lambda act=act: pc.do(sams[0], act, data, {"graph": torch.zeros(D, D)}),
        ):
            refused(ask, f"{word}(...)", f"'{site}'", "perturb, flip_target, silence, shift")
    assert abs(pc.effects(fit, pc.shift(0, 2.0), draws=2, cells=3)["effect"]).max() > 0

    def bare(batch: Any) -> Tensor:
        with batch.cells():
            pyro.deterministic("dose", batch.dose, event_dim=1)
            return pyro.sample("x", dist.Normal(torch.zeros(len(batch), 10), 1.0).to_event(1), obs=batch.x)

    refused(lambda: pc.do(bare, pc.shift(0, 1.0), data), "shift(...)", "'shift'", "it can answer perturb")


def test_soft_and_hard_acts_are_kept_apart():
    model, _, data = network()
    refused(lambda: pc.sites(model, pc.shift(0, 1.0), data), "shift(...)", "pc.do")
    once = pc.do(model, pc.shift(0, 1.0), data)
    refused(lambda: pc.do(once, pc.shift(1, 1.0), data), "'shift'", "already", "&")
    hard = pyro.do(model, data={"shift": torch.zeros(D)})
    refused(lambda: pc.do(hard, pc.shift(1, 1.0), data), "'shift'", "already")
    batch = data.batch(range(3)).hide()
    refused(lambda: Soft(Change("shift", plus=1.0))(hard)(batch), "'shift'", "pyro.do")
    refused(lambda: pyro.do(Soft(Change("shift", plus=1.0))(model), data={"shift": torch.zeros(D)})(batch), "'shift'", "pyro.do")
    refused(lambda: Soft(Change("shift", plus=1.0), Change("shfit", plus=1.0))(model)(batch), "'shfit'", "name one of its sites")
    refused(lambda: Soft(Change("shift", plus=1.0, at=D))(model)(batch), f"at={D}", "'shift'", f"[{D}]")
    refused(lambda: Change("shift", to=1.0, plus=1.0), "'shift'", "give to=")
    with pytest.raises(RuntimeError):  # a fault of the model is not covered by ours
        Soft(Change("shfit", plus=1.0))(lambda b: (_ for _ in ()).throw(RuntimeError()))(batch)


def test_the_graph_must_be_given_to_do():
    model, _, data = network()
    refused(lambda: pc.do(model, pc.cut(0, 1), data), "cut", "graph", "given=")
    assert torch.equal(pc.sites(model, pc.cut(0, 1), data, {"graph": model.weight})["graph"][0], torch.tensor([0, 0, -0.5, 0]))
    assert pc.sites(model, pc.clamp(1, 2.0), data)["clamp"].shape == (D,)


def test_a_soft_mask_has_no_targets_to_flip(data):
    fit = as_fit(*pc.build("discrepancy_vae", data, n_latent=D, n_hidden=8), data)
    refused(lambda: pc.effects(fit, pc.flip_target("A", 0), draws=2), "'mask'", "flip_target")
    known = pc.build("sccvae", data, n_latent=D, n_hidden=8, graph="none", decoder="linear", **SETTINGS["targets"])
    acts = {"moved": pc.perturb("A") & pc.flip_target("A", 0) & pc.flip_target("A", "program 3"), "A": pc.perturb("A")}
    effect = pc.effects(as_fit(*known, data), acts, draws=3, cells=4)["effect"].to_numpy()
    weight = known[0].decoder.weight.detach().numpy()
    for k, program in ((0, 3), (1, 0)):
        cosine = (effect[k] @ weight[program]) / np.linalg.norm(effect[k], axis=-1) / np.linalg.norm(weight[program])
        assert np.allclose(np.abs(cosine), 1, atol=1e-4)


# -- perturbations that no cell received --------------------------------------------------------------------------------------------


def test_unseen_perturbations_are_answered_and_named(data):
    train = data.select("control", "A", "B")
    fit = pc.fit(*pc.build("sccvae", train, n_latent=D, embedding=embedding(), n_hidden=8), train, max_epochs=2)
    assert fit.model.answers_unseen and fit.cells_per_perturbation[2] == 0
    seen = pc.effects(fit, ["A", "A+B"], draws=2, cells=3)
    assert "unseen" not in seen.attrs
    for out in (
        pc.effects(fit, ["A", "A+C"], draws=2, cells=3),
        pc.interventional(fit, "C", draws=2, cells=3),
        pc.counterfactual(fit, data[:3], pc.silence("C")),
        pc.dose_response(fit, ["A", "C"], [0.5, 1.0], draws=2, cells=3),
    ):
        assert out.attrs["unseen"] == "C"
    both = as_fit(fit.model, fit.guide, train.select("control", "A"))
    assert pc.effects(both, ["C", "B+A"], draws=2, cells=3).attrs["unseen"] == "B, C"


def test_unseen_perturbations_are_refused_without_knowledge(data):
    train = data.select("control", "A", "B")
    fit = pc.fit(*pc.build("sccvae", train, n_latent=D, n_hidden=8), train, max_epochs=1)
    refused(lambda: pc.effects(fit, "C"), "no training cell received 'C'")


# -- the posterior --------------------------------------------------------------------------------------------------------------------


def test_inference_data_has_the_deterministic_tables(fitted):
    post = pc.to_inference_data(fitted, draws=20).posterior
    dims = {k: v.dims[2:] for k, v in post.data_vars.items()}
    assert dims["graph"] == ("latent", "latent_to") and dims["effect"] == dims["mask"] == ("perturbation", "latent")
    edge = "edge_name" if fitted.model.edge_prior == "spike_slab" else "edge"  # where there is a site edge as well
    assert dims["penetrance"] == ("perturbation",) and dims["graph_weight"] == (edge,)
    assert list(post[edge].to_numpy()) == [f"{j}->{k}" for j, k in fitted.model.edge_index.T.tolist()]
    if edge == "edge_name":
        assert dims["edge"] == (edge,) and set(np.unique(post["edge"])) <= {0.0, 1.0}
    np.testing.assert_allclose(post["effect"], post["penetrance"].to_numpy()[..., None] * np.ones(D), atol=0)
    np.testing.assert_allclose(post["net_effect"], post["mask"] * post["effect"], atol=0)
    for i, (j, k) in enumerate(fitted.model.edge_index.T.tolist()):
        weight = post["graph_weight"][..., i].to_numpy()
        got = post["graph"][..., j, k].to_numpy()
        assert ((got == weight) | (got == 0)).all()
    if "priority" not in post:
        assert (np.tril(post["graph"][0, 0].to_numpy()) == 0).all()
    _, plain, _ = network(sampled=True, vectorises=False)
    graph = pc.to_inference_data(plain, draws=6).posterior
    assert np.array_equal(graph["graph"], graph["weight"] * (plain.model.weight.numpy() != 0))
    assert graph["graph"].dims == ("chain", "draw", "latent", "latent_to") and graph["effect"].shape == (1, 6, P, D)


def test_inference_data_of_fixed_tables():
    """Nothing is sampled outside the cells: every draw shows the same tables, stored once."""
    for vectorises in (True, False):
        model, fit, _ = network(vectorises=vectorises)
        tables = posterior.deterministic_tables(fit, {}, 500)
        assert tables.keys() == {"effect", "graph"} and tables["graph"].shape == (500, D, D) and tables["graph"].strides[0] == 0
        assert np.array_equal(tables["graph"][7], model.weight)
        assert pc.to_inference_data(fit, draws=9).posterior.sizes["draw"] == 9


def test_deterministic_tables_leave_the_random_state_and_the_sampled_tables():
    _, fit, data = network(sampled=True)
    with query._seeded(0, fit):
        drawn = posterior.global_draws(fit, 5)
        before = torch.get_rng_state()
        posterior.deterministic_tables(fit, drawn, 5)
        assert torch.equal(before, torch.get_rng_state())
    idata = pc.to_inference_data(fit, draws=5, cells=data[:3], predictive_draws=2)
    assert np.array_equal(idata.posterior["weight"][0], drawn["weight"])


@pytest.mark.parametrize("equations", ["linear", "relu"])
def test_networkx_has_the_edges_between_programs(equations):
    """A fixed graph: the true weights, and to the genes the direct effect alone (each program is its own gene)."""
    model, fit, _ = network(equations)
    graph = pc.to_networkx(fit, draws=30)
    between = {(a, b): e for a, b, e in graph.edges(data=True) if graph.nodes[a]["kind"] == graph.nodes[b]["kind"] == "program"}
    assert set(between) == {("program 0", "program 1"), ("program 0", "program 2"), ("program 1", "program 2"), ("program 2", "program 3")}
    for (a, b), edge in between.items():
        w = float(model.weight[int(a[-1]), int(b[-1])])
        assert edge == {"probability": 1.0, "mean": pytest.approx(w), "lower": pytest.approx(w), "upper": pytest.approx(w)}
    genes = {(a, b): e["mean"] for a, b, e in graph.edges(data=True) if graph.nodes[b]["kind"] == "gene"}
    assert genes == {(f"program {k}", str(k)): pytest.approx(1, abs=1e-5) for k in range(D)}
    assert nx.is_directed_acyclic_graph(graph) and graph.graph["minimum_edge"] == 0.1
    strong = pc.to_networkx(fit, draws=30, minimum_edge=0.8)
    kept = {(a, b) for a, b in strong.edges if strong.nodes[a]["kind"] == strong.nodes.get(b, {}).get("kind") == "program"}
    assert kept == {("program 0", "program 1"), ("program 1", "program 2")}


def test_networkx_probabilities_are_those_of_the_draws(fitted):
    with query._seeded(0, fitted):
        sampled = posterior.global_draws(fitted, 60)
        tables = posterior.deterministic_tables(fitted, sampled, 60)
    graph = pc.to_networkx(fitted, draws=60, threshold=0.05, minimum_edge=0.2)
    weights = tables["graph"]
    on = (weights != 0).mean(0) if "edge" in sampled else (np.abs(weights) > 0.2).mean(0)
    between = {(a, b): e for a, b, e in graph.edges(data=True) if graph.nodes[a]["kind"] == graph.nodes[b]["kind"] == "program"}
    assert set(between) == {(f"program {j}", f"program {k}") for j, k in zip(*np.nonzero(on >= 0.05), strict=True)}
    for (a, b), edge in between.items():
        j, k = int(a[-1]), int(b[-1])
        assert edge["probability"] == pytest.approx(on[j, k]) and edge["mean"] == pytest.approx(weights[:, j, k].mean(), rel=1e-4, abs=1e-6)
    mask = (sampled | tables)["mask"].mean(0)
    targets = {(a, b) for a, b in graph.edges if graph.nodes[a]["kind"] == "perturbation"}
    assert targets == {("ABC"[p], f"program {d}") for p, d in zip(*np.nonzero(mask >= 0.05), strict=True)}


@pytest.mark.parametrize("name", ["sccvae_parity", "discrepancy_vae"])
def test_the_published_models_answer_everything_that_their_graph_allows(data, name):
    pair = pc.build(name, data, n_latent=D, n_hidden=8)
    fit = as_fit(*pair, data)
    acts = {k: v for k, v in ACTS.items() if k != "everything"}
    out = pc.effects(fit, acts, draws=2, cells=5)["effect"]
    assert fit.vectorises and np.isfinite(out).all() and (out.sel(intervention="nothing") == 0).all()
    fit.vectorises = False
    np.testing.assert_allclose(pc.effects(fit, acts, draws=1, cells=5)["effect"].shape, (len(acts), 1, 10))
    post = pc.to_inference_data(fit, draws=7).posterior
    assert {"mask", "effect", "penetrance", "graph", "net_effect"} <= set(post.data_vars)
    drawn = pc.to_networkx(fit, draws=20, threshold=0.2, minimum_edge=0.0)
    assert any(drawn.nodes[a]["kind"] == drawn.nodes[b]["kind"] == "program" for a, b in drawn.edges)
