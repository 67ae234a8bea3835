"""Laws of the queries: what must hold exactly holds to the bit, what holds in law is tested at five standard errors.

A test at five standard errors raises a false alarm with probability 6e-7 for each number compared (Gaussian limit; about 1e-5 with the
tails of the smallest samples used here). All seeds are fixed, so that a test that passes once passes always.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyro.infer import Predictive
from pyro.nn import PyroModule
from torch import Tensor

import pyrocausal as pc
from pyrocausal import query, worlds
from pyrocausal.coupling import couple
from pyrocausal.distributions import NegativeBinomial, Poisson
from pyrocausal.elbo import ELBO
from pyrocausal.errors import InterventionError
from pyrocausal.fit import Fit, coords_of, reference_cells
from pyrocausal.structural import mechanism_shift

torch.set_num_threads(1)
laws = settings(max_examples=12, deadline=None, derandomize=True, database=None)
GLOBALS = ("mask", "effect", "offset", "direct")  # sites outside the plate over cells
A, B, C = pc.perturb("pert00"), pc.perturb("pert03"), pc.perturb("pert07")


@pytest.fixture(scope="session")
def counts() -> pc.PerturbationData:
    adata = pc.simulate.svae_screen(
        n_perturbations=12, n_latent=4, cells_per_perturbation=40, n_genes=30, n_control=100, library_size=600.0
    )
    return pc.PerturbationData.from_anndata(adata)


@pytest.fixture(scope="session", params=["sams_vae", "sams_vae_direct"])
def fitted(counts: pc.PerturbationData, request: pytest.FixtureRequest) -> pc.Fit:
    model, guide = pc.build(request.param, counts, n_latent=6, n_hidden=32, n_layers=2, turns=(0.5,))
    return pc.fit(model, guide, counts, max_epochs=20, batch_size=128, lr=1e-2)


@pytest.fixture(scope="session")
def normalised() -> pc.PerturbationData:
    adata = pc.simulate.sams_screen(
        n_perturbations=10, n_latent=3, cells_per_perturbation=30, n_genes=20, n_control=60, shift=2.0, doubles=4, cells_per_double=20
    )
    return pc.PerturbationData.from_anndata(adata)


@pytest.fixture(scope="session")
def gaussian(normalised: pc.PerturbationData) -> pc.Fit:
    model, guide = pc.build("sams_vae", normalised, n_latent=4, n_hidden=32, n_layers=2, turns=(0.5,))
    return pc.fit(model, guide, normalised, max_epochs=20, batch_size=128, lr=1e-2)


@pytest.fixture(autouse=True)
def _own_random_state():
    with torch.random.fork_rng(devices=[]):
        yield


def equal(a: Any, b: Any) -> bool:
    """Bitwise equality of two results."""
    return all(np.array_equal(a[k].to_numpy(), b[k].to_numpy()) for k in a.data_vars)


def within(difference: np.ndarray, axis: int = 0, errors: float = 5.0) -> bool:
    """Whether the mean over ``axis`` of independent replicates is zero within so many standard errors, everywhere."""
    n = difference.shape[axis]
    return bool((np.abs(difference.mean(axis)) <= errors * difference.std(axis, ddof=1) / np.sqrt(n) + 1e-9).all())


# -- dose 0, the factual action, and other acts that do nothing -----------------------------------------------------------------


def test_dose_zero_is_the_unperturbed_world_exactly(fitted):
    acts = {"zero": pc.perturb("pert00", dose=0.0), "none": pc.untreated(), "two": pc.perturb("pert00", 0.0) & pc.perturb("pert03", 0.0)}
    for out in (pc.effects(fitted, acts, draws=7, cells=9), pc.interventional(fitted, acts, draws=7, cells=9)):
        assert (out["effect"].to_numpy() == 0).all()
    assert np.abs(pc.effects(fitted, A, draws=7, cells=9)["effect"]).max() > 0.1


@pytest.mark.parametrize("noise", ["shared", "quantile", "mean"])
def test_dose_zero_leaves_control_cells_as_they_are(fitted, counts, noise):
    acts = {"zero": pc.perturb("pert00", dose=0.0), "none": pc.untreated(), "other": pc.silence("pert05")}
    out = pc.counterfactual(fitted, counts.select("control")[:20], acts, draws=3, noise=noise)
    assert (out["effect"].to_numpy() == 0).all()


@pytest.mark.parametrize("noise", ["shared", "quantile"])
@pytest.mark.parametrize("label", ["pert03", "control"])
def test_factual_action_reproduces_counts_exactly(fitted, counts, noise, label):
    cells = counts.select(label)[:25]
    out = pc.counterfactual(fitted, cells, label, draws=4, noise=noise, units="counts")
    assert np.array_equal(out["expression"].to_numpy()[0], np.broadcast_to(cells.dense(), (4, *cells.dense().shape)))
    assert np.array_equal(out["factual"].to_numpy(), cells.dense())
    assert (out["effect"].to_numpy() == 0).all()


@pytest.mark.parametrize("noise", ["shared", "quantile"])
@pytest.mark.parametrize("pick", [0, -1], ids=["control", "double"])
def test_factual_action_reproduces_gaussian_cells_exactly(gaussian, normalised, noise, pick):
    label = normalised.conditions[pick]
    cells = normalised.select(label)[:15]
    out = pc.counterfactual(gaussian, cells, label, draws=4, noise=noise)
    assert np.array_equal(out["expression"].to_numpy()[0], np.broadcast_to(cells.dense(), (4, *cells.dense().shape)))


def test_acts_on_perturbations_that_a_cell_does_not_carry_leave_its_counts(fitted, counts):
    cells = counts.select("pert03")[:10]
    acts = [pc.silence("pert07"), pc.flip_target("pert07", 1), pc.silence("pert00") & pc.flip_target("pert08", 0)]
    assert (pc.counterfactual(fitted, cells, acts, draws=3)["effect"].to_numpy() == 0).all()


def test_the_treatment_is_given_to_every_cell_and_taken_from_the_treated(fitted, counts):
    cells = counts.select("pert03", "control")[30:60]
    out = pc.counterfactual(fitted, cells, {"off": pc.untreated(), "on": B}, draws=5, noise="mean")
    moved = np.abs(out["effect"].to_numpy()).max((1, 3)) > 0
    treated = cells.labels == "pert03"
    assert 0 < treated.sum() < len(cells)
    assert np.array_equal(moved[0], treated)
    assert np.array_equal(moved[1], ~treated)


# -- the algebra, in effects ----------------------------------------------------------------------------------------------------

names = st.sampled_from([f"pert{i:02d}" for i in range(12)])
simple = st.one_of(
    st.builds(pc.perturb, names, st.sampled_from([0.5, 1.0]), st.sampled_from([0.5, 1.0])),
    st.builds(pc.silence, names),
    st.builds(pc.flip_target, names, st.integers(0, 5)),
)


@laws
@given(simple, simple)
def test_order_of_and_is_irrelevant_to_the_bit(fitted, a, b):
    try:
        ab, ba = a & b, b & a
    except InterventionError:
        return
    assert equal(pc.effects(fitted, ab, draws=2, cells=5), pc.effects(fitted, ba, draws=2, cells=5))


@pytest.mark.parametrize("noise", ["shared", "quantile", "independent", "mean"])
def test_order_of_and_is_irrelevant_to_the_bit_in_counterfactuals(fitted, counts, noise):
    cells = counts[:12]
    ab, ba = (
        pc.counterfactual(fitted, cells, act, draws=2, noise=noise) for act in (A & B & pc.silence("pert01"), pc.silence("pert01") & B & A)
    )
    assert equal(ab, ba)


@laws
@given(names, names)
def test_silencing_is_never_having_perturbed(fitted, a, b):
    acts = {"silenced": pc.perturb(a) & pc.perturb(b) & pc.silence(a), "never": pc.perturb(b) if a != b else pc.untreated()}
    out = pc.effects(fitted, acts, draws=3, cells=8)["expression"]
    assert np.allclose(out.sel(intervention="silenced"), out.sel(intervention="never"), atol=1e-6, rtol=0)


def test_silencing_is_never_having_perturbed_for_measured_cells(fitted, counts):
    cells = counts.select("pert03")[:10]
    out = pc.counterfactual(fitted, cells, {"silenced": pc.silence("pert03"), "never": pc.untreated()}, draws=4, noise="mean")
    assert np.allclose(out["expression"][0], out["expression"][1], atol=1e-6, rtol=0)
    assert np.abs(out["effect"]).max() > 0.1


def test_flipping_an_off_bit_with_zero_effect_changes_nothing(fitted, counts):
    still = A & pc.silence("pert00")
    acts = {"still": still} | {f"flip {d}": still & pc.flip_target("pert00", d) for d in range(6)}
    out = pc.effects(fitted, acts, draws=4, cells=8)["expression"].to_numpy()
    assert all(np.array_equal(out[0], out[k]) for k in range(1, 7))
    cells = pc.counterfactual(fitted, counts.select("pert00")[:8], {"plain": pc.untreated(), **acts}, draws=3, noise="mean")["expression"]
    assert np.allclose(cells[0], cells[1:], atol=1e-6, rtol=0)


def test_flipping_a_bit_twice_is_flipping_it_once_and_does_something(fitted):
    flip = A & pc.flip_target("pert00", 2)
    acts = {"once": flip, "twice": flip & pc.flip_target("pert00", 2), "plain": A}
    out = pc.effects(fitted, acts, draws=4, cells=8)["expression"]
    assert np.array_equal(out[0], out[1])
    assert np.abs(out[0] - out[2]).max() > 0.01


# -- penetrance ------------------------------------------------------------------------------------------------------------------


def test_penetrance_one_is_plain_and_zero_is_untreated(fitted, counts):
    acts = {"plain": A & B, "one": pc.perturb("pert00", penetrance=1.0) & B, "zero": pc.perturb("pert00", penetrance=0.0) & B, "other": B}
    out = pc.effects(fitted, acts, draws=5, cells=8)["expression"].to_numpy()
    assert np.array_equal(out[0], out[1])
    assert np.allclose(out[2], out[3], atol=1e-6, rtol=0)
    cells = pc.counterfactual(fitted, counts.select("control")[:10], {k: v for k, v in acts.items() if k != "plain"}, draws=3, noise="mean")
    assert np.allclose(cells["expression"][1], cells["expression"][2], atol=1e-6, rtol=0)


def test_the_share_of_affected_cells_grows_with_penetrance(fitted, counts):
    shares = [0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0]
    cells = counts.select("control")
    sure = str(fitted.guide.table.logits.amax(1).argmax().item()).zfill(2)  # one with a target in every draw
    acts = {f"{p}": pc.perturb(f"pert{sure}", penetrance=p) for p in shares}
    moved = np.abs(pc.counterfactual(fitted, cells, acts, draws=6, noise="mean")["effect"].to_numpy()).max(-1) > 0  # [K, S, n]
    assert all((moved[k] <= moved[k + 1]).all() for k in range(len(shares) - 1))  # the same cells, and more
    trials = moved[0].size
    for p, share in zip(shares, moved.reshape(len(shares), -1).mean(1), strict=True):
        assert abs(share - p) <= 5 * np.sqrt(p * (1 - p) / trials)


def test_the_mean_effect_is_linear_in_penetrance_on_the_rate_scale(fitted):
    shares = [0.25, 0.5, 0.75]
    acts = {"full": B} | {f"{p}": pc.perturb("pert03", penetrance=p) for p in shares}
    effect = pc.effects(fitted, acts, draws=150, cells=32, units="rate")["effect"].to_numpy()
    for k, p in enumerate(shares, start=1):
        assert within(effect[k] - p * effect[0])  # 90 comparisons in all


# -- truth of the law ------------------------------------------------------------------------------------------------------------


def own_law(fit: Fit, p: int, draws: int, cells: int, seed: int) -> np.ndarray:
    """Rates of cells that the model itself samples with perturbation p, mean over cells of each draw: plain Pyro, no query."""
    torch.manual_seed(seed)
    reference = fit.reference
    out = []
    for _ in range(draws):
        batch = reference.rows(torch.randint(len(reference), (cells,)).tolist())
        batch.dose[:, p] = 1
        with torch.no_grad():
            guided = poutine.trace(fit.guide).get_trace(reference.rows([0]))
            tables = {k: guided.nodes[k]["value"] for k in GLOBALS if k in guided.nodes}
            x = poutine.condition(fit.model, data=tables)(batch.hide())
        out.append((x / batch.library_size).mean(0).numpy())
    return np.stack(out)


def test_do_dose_of_a_single_is_the_models_own_law(fitted):
    theirs = own_law(fitted, p=3, draws=150, cells=16, seed=1)
    ours = pc.interventional(fitted, B, draws=150, cells=16, noise="independent", units="rate", seed=2)["expression"].to_numpy()[0].mean(1)
    standard_error = np.sqrt(theirs.var(0, ddof=1) / 150 + ours.var(0, ddof=1) / 150)
    assert (np.abs(theirs.mean(0) - ours.mean(0)) <= 5 * standard_error).all()  # 30 comparisons
    effects = pc.effects(fitted, B, draws=150, cells=16, units="rate", seed=3)["expression"].to_numpy()[0]
    standard_error = np.sqrt(theirs.var(0, ddof=1) / 150 + effects.var(0, ddof=1) / 150)
    assert (np.abs(theirs.mean(0) - effects.mean(0)) <= 5 * standard_error).all()


def test_worlds_equal_an_honest_loop_of_predictive(fitted, counts):
    """The same latent values through pyro.infer.Predictive over pyro.do, one world and one draw at a time."""
    acts = [A, A & B, pc.untreated(), pc.perturb("pert09", dose=0.3)]
    torch.manual_seed(0)
    population = fitted.reference.rows([0, 1, 2, 3, 4])
    base = worlds.fresh_base(fitted.model, fitted.guide, fitted.reference.rows([0]), population, 3)
    law, _ = worlds.intervened_law(fitted.model, base, acts, fitted.coords["perturbation"], strict=False)
    for s, (k, act) in itertools.product(range(3), enumerate(acts)):
        values = {name: v[s, 0, 0] if name in GLOBALS else v[s, 0] for name, v in base.values.items()}
        predictive = Predictive(
            pc.do(fitted.model, act, counts), posterior_samples={n: v[None] for n, v in values.items()}, return_sites=["x_loc"]
        )
        with torch.no_grad():
            honest = predictive(population.hide())["x_loc"][0]
        assert torch.allclose(law.mean[s, k], honest, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("word", ["flip", "silence"])
def test_worlds_of_tables_equal_an_honest_loop(fitted, counts, word):
    acts = [A & (pc.flip_target("pert00", d) if word == "flip" else pc.silence(f"pert0{d}")) for d in range(3)]
    torch.manual_seed(0)
    population = fitted.reference.rows([0, 1, 2, 3, 4])
    base = worlds.fresh_base(fitted.model, fitted.guide, fitted.reference.rows([0]), population, 2)
    law, _ = worlds.intervened_law(fitted.model, base, acts, fitted.coords["perturbation"], strict=False)
    for s, (k, act) in itertools.product(range(2), enumerate(acts)):
        values = {name: v[s, 0, 0] if name in GLOBALS else v[s, 0] for name, v in base.values.items()}
        intervened = pc.do(fitted.model, act, counts, given={n: v for n, v in values.items() if n in GLOBALS})
        with torch.no_grad():
            honest = Predictive(intervened, posterior_samples={n: v[None] for n, v in values.items()}, return_sites=["x_loc"])
            assert torch.allclose(law.mean[s, k], honest(population.hide())["x_loc"][0], rtol=1e-5, atol=1e-5)


# -- bookkeeping: chunks, companions, seeds ---------------------------------------------------------------------------------------

QUESTIONS: dict[str, Callable[..., Any]] = {
    "effects": lambda fit, cells, do, draws=4: pc.effects(fit, do, draws=draws, cells=6),
    "interventional mean": lambda fit, cells, do, draws=4: pc.interventional(fit, do, draws=draws, cells=6),
    "interventional independent": lambda fit, cells, do, draws=4: pc.interventional(fit, do, draws=draws, cells=6, noise="independent"),
    "counterfactual shared": lambda fit, cells, do, draws=4: pc.counterfactual(fit, cells, do, draws=draws),
    "counterfactual quantile": lambda fit, cells, do, draws=4: pc.counterfactual(fit, cells, do, draws=draws, noise="quantile"),
    "counterfactual independent": lambda fit, cells, do, draws=4: pc.counterfactual(fit, cells, do, draws=draws, noise="independent"),
    "counterfactual mean": lambda fit, cells, do, draws=4: pc.counterfactual(fit, cells, do, draws=draws, noise="mean"),
}
MANY = {"a": A, "b": B, "half c": pc.perturb("pert07", penetrance=0.5), "ab": A & B, "quiet": B & pc.silence("pert03")}


@pytest.mark.parametrize("question", QUESTIONS)
def test_results_do_not_depend_on_how_worlds_are_chunked(fitted, counts, question, monkeypatch):
    ask, cells = QUESTIONS[question], counts[:6]
    at_once = ask(fitted, cells, MANY)
    monkeypatch.setattr(query, "MAX_ROWS", 24)  # all four draws of six cells together, one intervention at a time
    assert equal(at_once, ask(fitted, cells, MANY))


@pytest.mark.parametrize("question", QUESTIONS)
def test_results_do_not_depend_in_law_on_how_draws_are_chunked(fitted, counts, question, monkeypatch):
    """Draws take their random numbers chunk by chunk, so another size gives other draws of the same law (900 comparisons at most)."""
    ask, cells = QUESTIONS[question], counts[:6]
    at_once = ask(fitted, cells, MANY, draws=60)["effect"]
    monkeypatch.setattr(query, "MAX_ROWS", 42)  # seven draws at a time
    by_sevens = ask(fitted, cells, MANY, draws=60)["effect"]
    error = np.sqrt((at_once.var("draw", ddof=1) + by_sevens.var("draw", ddof=1)) / 60)
    assert (np.abs(at_once.mean("draw") - by_sevens.mean("draw")) <= 5 * error + 1e-6).all()


@pytest.mark.parametrize("question", QUESTIONS)
def test_an_answer_does_not_depend_on_its_companions(fitted, counts, question):
    ask, cells = QUESTIONS[question], counts[:6]
    together, alone, turned = (ask(fitted, cells, d) for d in (MANY, {"b": B}, dict(reversed(MANY.items()))))
    assert equal(together.sel(intervention=["b"]), alone)
    assert equal(together, turned.sel(intervention=list(MANY)))


@pytest.mark.parametrize("question", QUESTIONS)
def test_same_seed_same_answer_and_the_callers_random_state_is_untouched(fitted, counts, question):
    ask, cells = QUESTIONS[question], counts[:6]
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    before, before_numpy = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    first = ask(fitted, cells, MANY)
    assert torch.equal(before, torch.get_rng_state())
    assert np.array_equal(before_numpy, np.random.get_state()[1])  # noqa: NPY002
    torch.manual_seed(2)
    assert equal(first, ask(fitted, cells, MANY))


def test_another_seed_is_another_answer(fitted, counts):
    one, two = (pc.effects(fitted, A, draws=3, cells=4, seed=s) for s in (0, 1))
    assert not equal(one, two)


def test_parameters_and_store_are_left_alone(fitted, counts):
    state = {k: v.clone() for k, v in {**fitted.model.state_dict(), **fitted.guide.state_dict()}.items()}
    store = set(pyro.get_param_store().keys())
    pc.counterfactual(fitted, counts[:4], MANY, draws=2)
    assert all(torch.equal(v, {**fitted.model.state_dict(), **fitted.guide.state_dict()}[k]) for k, v in state.items())
    assert set(pyro.get_param_store().keys()) == store


# -- a linear-Gaussian structural causal model, whose answers are known -----------------------------------------------------------

P, D, G = 3, 2, 5


class LinearSCM(PyroModule):
    """``u = (z + dose (mask * effect)) (I - graph)^-1``, ``x ~ Normal(u W, sigma)``; centred: ``u`` itself is the sample site."""

    def __init__(self, product: Callable[[Tensor, Tensor], Tensor] = mechanism_shift, centred: bool = False, graph: float = 0.7) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.product, self.centred = product, centred
        self.register_buffer("weight", torch.randn(D, G, generator=g))
        self.register_buffer("table", torch.randn(P, D, generator=g))
        self.register_buffer("mask", torch.tensor([[1.0, 0], [1, 1], [0, 1]]))
        self.register_buffer("graph", torch.tensor([[0.0, graph], [0, 0]]))
        self.sigma = 0.4

    @property
    def total(self) -> Tensor:
        """What a unit of each program does to each gene, descendants included, [D, G]."""
        return torch.linalg.inv(torch.eye(D) - self.graph) @ self.weight

    def effect_of(self, dose: Tensor, mask: Tensor | None = None, table: Tensor | None = None) -> Tensor:
        """The closed form: change of x under a dose, [..., G]."""
        mask, table = self.mask if mask is None else mask, self.table if table is None else table
        return dose @ (mask * table) @ self.total

    def forward(self, batch: Any) -> Tensor:
        mask = pyro.sample("mask", dist.Bernoulli(torch.full((P, D), 0.5)).to_event(2))
        effect = pyro.sample("effect", dist.Normal(torch.zeros(P, D), 1.0).to_event(2))
        with batch.cells():
            dose = pyro.deterministic("dose", batch.dose, event_dim=1)
            shift = pyro.deterministic("shift", self.product(dose, mask * effect), event_dim=1)
            if self.centred:
                u = pyro.sample("u", dist.Normal(shift, 1.0).to_event(1))
            else:
                u = pyro.sample("z", dist.Normal(torch.zeros(D), 1.0).to_event(1)) + shift
            mean = u @ self.total
            return pyro.sample("x", dist.Normal(mean, self.sigma).to_event(1), obs=batch.x)


class LinearGuide(PyroModule):
    """The tables as they are (or with an uncertain effect), and the exact posterior of the cell given the tables."""

    def __init__(self, model: LinearSCM, effect_sd: float = 0.0) -> None:
        super().__init__()
        self.mask, self.table, self.effect_sd = model.mask, model.table, effect_sd
        self.product, self.centred, self.total = model.product, model.centred, model.total
        precision = torch.eye(D) + self.total @ self.total.T / model.sigma**2
        self.covariance = torch.linalg.inv(precision)
        self.gain = self.total.T @ self.covariance / model.sigma**2

    def forward(self, batch: Any) -> None:
        mask = pyro.sample("mask", dist.Delta(self.mask, event_dim=2))
        law = dist.Normal(self.table, self.effect_sd).to_event(2) if self.effect_sd else dist.Delta(self.table, event_dim=2)
        effect = pyro.sample("effect", law)
        with batch.cells():
            shift = self.product(batch.dose, mask * effect)
            z = (batch.x - shift @ self.total) @ self.gain
            loc = z + shift if self.centred else z
            pyro.sample("u" if self.centred else "z", dist.MultivariateNormal(loc, self.covariance))


def tiny_screen(n: int = 40, seed: int = 0) -> pc.PerturbationData:
    rng = np.random.default_rng(seed)
    labels = np.array(["control", "A", "B", "C", "A+B"], dtype=object)[np.arange(n) % 5]
    obs = pd.DataFrame({"perturbation": labels}, index=[f"c{i}" for i in range(n)])
    return pc.PerturbationData.from_anndata(ad.AnnData(rng.normal(size=(n, G)).astype(np.float32), obs=obs))


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


def linear_fit(effect_sd: float = 0.0, **settings: Any) -> tuple[LinearSCM, Fit, pc.PerturbationData]:
    model, data = LinearSCM(**settings), tiny_screen()
    return model, as_fit(model, LinearGuide(model, effect_sd), data), data


def by_einsum(dose: Tensor, table: Tensor) -> Tensor:
    return (dose[..., None] * table).sum(-2)


DOSES = {"A": [1.0, 0, 0], "A & B": [1.0, 1, 0], "half C": [0, 0, 0.5], "none": [0.0, 0, 0], "all": [1.0, 0.25, 2]}
LINEAR = {
    "A": pc.perturb("A"),
    "A & B": pc.perturb("A") & pc.perturb("B"),
    "half C": pc.perturb("C", dose=0.5),
    "none": pc.untreated(),
    "all": pc.perturb("A") & pc.perturb("B", dose=0.25) & pc.perturb("C", dose=2.0),
}
WAYS = {
    "mechanism_shift": {},
    "broadcasting sum": {"product": by_einsum},
    "plain matrix product": {"product": torch.matmul},
    "centred": {"centred": True},
    "centred, plain": {"centred": True, "product": torch.matmul},
}


@pytest.mark.parametrize("way", WAYS)
def test_interventional_effects_have_their_closed_form(way):
    model, fit, _ = linear_fit(**WAYS[way])
    effect = pc.effects(fit, LINEAR, draws=3, cells=4)["effect"].to_numpy()
    for k, dose in enumerate(DOSES.values()):
        assert np.allclose(effect[k], model.effect_of(torch.tensor(dose)), atol=1e-5)
    cells = pc.interventional(fit, LINEAR, draws=3, cells=4)["effect"].to_numpy()
    assert np.allclose(cells, np.broadcast_to(effect[:, :, None], cells.shape), atol=1e-5)


@pytest.mark.parametrize("noise", ["shared", "quantile", "mean"])
@pytest.mark.parametrize("way", WAYS)
def test_counterfactuals_have_their_closed_form(way, noise):
    model, fit, data = linear_fit(**WAYS[way])
    out = pc.counterfactual(fit, data[:15], LINEAR, draws=3, noise=noise)
    for k, dose in enumerate(DOSES.values()):
        change = model.effect_of(torch.tensor(dose) - torch.as_tensor(data[:15].dose.toarray()))
        assert np.allclose(out["effect"][k], change.expand(3, -1, -1), atol=1e-5)
        if noise != "mean":
            assert np.allclose(out["expression"][k], torch.as_tensor(data[:15].dense()) + change, atol=1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_flips_and_silences_have_their_closed_form(way):
    model, fit, data = linear_fit(**WAYS[way])
    flipped, silent = model.mask.clone(), model.table.clone()
    flipped[0, 1] = 1 - flipped[0, 1]
    silent[1] = 0
    acts = {
        "flip": pc.flip_target("A", 1),
        "silence": pc.silence("B"),
        "both": pc.flip_target("A", 1) & pc.silence("B"),
        "with dose": pc.perturb("A") & pc.flip_target("A", 1),
    }
    tables = {"flip": (flipped, None), "silence": (None, silent), "both": (flipped, silent), "with dose": (flipped, None)}
    dose = torch.as_tensor(data[:10].dose.toarray())
    out = pc.counterfactual(fit, data[:10], acts, draws=2)
    for name, (mask, table) in tables.items():
        new = torch.tensor([1.0, 0, 0]).expand(10, -1) if name == "with dose" else dose
        change = model.effect_of(new, mask, table) - model.effect_of(dose)
        assert np.allclose(out["effect"].sel(intervention=name), change.expand(2, -1, -1), atol=1e-5), name


@pytest.mark.parametrize(("way", "fast"), zip(WAYS, [True, True, False, True, False], strict=True))
def test_arithmetic_that_does_not_broadcast_is_recognised(way, fast):
    _, fit, _ = linear_fit(**WAYS[way])
    pc.effects(fit, "A", draws=2, cells=2)
    assert fit.vectorises is fast


@pytest.mark.parametrize("way", ["mechanism_shift", "plain matrix product"])
def test_penetrance_has_its_closed_form(way):
    model, fit, data = linear_fit(**WAYS[way])
    control = data.select("control")
    out = pc.counterfactual(
        fit, control, {"half": pc.perturb("A", penetrance=0.5), "both": pc.perturb("A", penetrance=0.5) & pc.perturb("B")}
    )
    took = np.abs(out["effect"][0]).max("gene") > 0
    assert 0.2 < float(took.mean()) < 0.8
    for k, other in enumerate([0.0, 1.0]):
        dose = torch.tensor(np.stack([took, np.full(took.shape, other), np.zeros(took.shape)], -1), dtype=torch.float32)
        assert np.allclose(out["effect"][k], model.effect_of(dose), atol=1e-5)  # the same cells take in both worlds


def test_draws_carry_the_uncertainty_of_the_effect():
    model, fit, _ = linear_fit(effect_sd=0.3)
    effect = pc.effects(fit, "A", draws=400, cells=2)["effect"].to_numpy()[0]
    assert within(effect - model.effect_of(torch.tensor([1.0, 0, 0])).numpy())
    sd = 0.3 * (model.mask[0, :, None] * model.total).square().sum(0).sqrt().numpy()
    assert np.allclose(effect.std(0), sd, rtol=5 / np.sqrt(2 * 400))


def test_a_draw_is_one_world_for_all_cells_however_many(monkeypatch):
    """A posterior draw of the effect is shared by the cells, so in a linear model its effect is the same for every cell of the draw."""
    _, fit, data = linear_fit(effect_sd=0.3)
    control = data.select("control")
    monkeypatch.setattr(query, "MAX_ROWS", 8)  # cells come two at a time
    effect = pc.counterfactual(fit, control, "A", draws=5, noise="mean")["effect"].to_numpy()[0]
    assert np.ptp(effect.mean(-1).mean(-1)) > 0.01  # draws differ
    assert np.allclose(effect, effect[:, :1], atol=1e-5)


class Scaled(PyroModule):
    """A centred latent whose mean and spread the perturbation moves: ``u ~ Normal(shift, exp(shift / 4))``, ``x ~ Normal(u W, 1/2)``."""

    def __init__(self, noisy: bool = False) -> None:
        super().__init__()
        self.noisy = noisy
        self.register_buffer("weight", torch.randn(1, G, generator=torch.Generator().manual_seed(1)))

    def forward(self, batch: Any) -> Tensor:
        with batch.cells():
            dose = pyro.deterministic("dose", batch.dose, event_dim=1)
            shift = dose.sum(-1, keepdim=True)
            if self.noisy:  # only the noise of the measurement moves
                return pyro.sample(
                    "x", dist.Normal(torch.zeros(G), (0.3 * shift).exp().expand(*shift.shape[:-1], G)).to_event(1), obs=batch.x
                )
            u = pyro.sample("u", dist.Normal(shift, (shift / 4).exp()).to_event(1))
            return pyro.sample("x", dist.Normal(u @ self.weight, 0.5).to_event(1), obs=batch.x)


class ScaledGuide(PyroModule):
    def __init__(self, noisy: bool = False) -> None:
        super().__init__()
        self.noisy = noisy

    def forward(self, batch: Any) -> None:
        with batch.cells():
            if not self.noisy:
                pyro.sample("u", dist.Delta(batch.x[..., :1], event_dim=1))


def test_a_centred_latent_keeps_its_standardised_residual():
    model, data = Scaled(), tiny_screen()
    control = data.select("control")
    out = pc.counterfactual(as_fit(model, ScaledGuide(), data), control, "A", draws=2, noise="mean")
    u = torch.as_tensor(control.dense()[:, :1])
    moved = 1 + np.exp(0.25) * u
    assert np.allclose(out["expression"][0], (moved @ model.weight).expand(2, -1, -1), atol=1e-5)


@pytest.mark.parametrize("noise", ["shared", "quantile"])
def test_gaussian_noise_whose_spread_alone_moves_is_stretched(noise):
    data = tiny_screen()
    control = data.select("control")
    out = pc.counterfactual(as_fit(Scaled(noisy=True), ScaledGuide(noisy=True), data), control, "A", draws=2, noise=noise)
    assert np.allclose(out["expression"][0], np.broadcast_to(np.exp(0.3) * control.dense(), (2, *control.dense().shape)), atol=1e-5)


# -- discrete and bounded latents -------------------------------------------------------------------------------------------------


class Switch(PyroModule):
    """A latent ``s`` of one number per cell, whose law the dose may move, and ``x ~ Normal(s W, 1)``."""

    def __init__(self, law: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.law = law
        self.register_buffer("weight", torch.linspace(1, 2, G))

    def forward(self, batch: Any) -> Tensor:
        with batch.cells():
            dose = pyro.deterministic("dose", batch.dose, event_dim=1)
            s = pyro.sample("s", self.law(dose[..., 0]))
            direct = dose[..., 1:2]  # the second perturbation acts on x itself
            return pyro.sample("x", dist.Normal(s[..., None] * self.weight + direct, 1.0).to_event(1), obs=batch.x)


class SwitchGuide(PyroModule):
    def __init__(self, law: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.law = law

    def forward(self, batch: Any) -> None:
        with batch.cells():
            pyro.sample("s", self.law(batch.x[..., 0] * 0))


def shifted(by: Tensor) -> Any:
    """``exp(Normal(0, 1/2)) + by``: what moves is the transform, not the base."""
    base = dist.Normal(torch.zeros_like(by), 0.5)
    return dist.TransformedDistribution(base, [dist.transforms.ExpTransform(), dist.transforms.AffineTransform(by, 1.0)])


MOVED = {  # law given the dose of A, and its mean
    "Bernoulli": (lambda a: dist.Bernoulli(logits=-1 + 3 * a), lambda a: 1 / (1 + np.exp(1 - 3 * a))),
    "Bernoulli of probs": (lambda a: dist.Bernoulli(probs=0.2 + 0.6 * a), lambda a: 0.2 + 0.6 * a),
    "Gamma": (lambda a: dist.Gamma(2 + 3 * a, torch.ones_like(a)), lambda a: 2 + 3 * a),
    "Beta": (lambda a: dist.Beta(1 + 4 * a, torch.ones_like(a)), lambda a: (1 + 4 * a) / (2 + 4 * a)),
    "GammaPoisson": (lambda a: dist.GammaPoisson(2 + 3 * a, torch.ones_like(a)), lambda a: 2 + 3 * a),
    "Weibull": (lambda a: dist.Weibull(1 + 2 * a, torch.full_like(a, 3.0)), lambda a: (1 + 2 * a) * scipy.special.gamma(4 / 3)),
    "LogNormal": (lambda a: dist.LogNormal(a, 0.5), lambda a: np.exp(a + 0.125)),
    "transformed": (lambda a: shifted(2 * a), lambda a: 2 * a + np.exp(0.125)),
}


@pytest.mark.parametrize("name", MOVED)
def test_a_latent_whose_law_is_moved_has_the_right_interventional_law(name):
    law, mean = MOVED[name]
    data = tiny_screen()
    fit = as_fit(Switch(law), SwitchGuide(law), data)
    out = pc.effects(fit, "A", draws=300, cells=8)
    per_unit = (out["effect"][0] / np.linspace(1, 2, G)).mean("gene").to_numpy()
    assert within(per_unit - (mean(1.0) - mean(0.0)))


@pytest.mark.parametrize("name", [n for n in MOVED if n != "LogNormal"])
def test_a_latent_whose_noise_cannot_be_carried_over_refuses_counterfactuals(name):
    law, _ = MOVED[name]
    data = tiny_screen()
    fit = as_fit(Switch(law), SwitchGuide(law), data)
    with pytest.raises(InterventionError, match=r"'s'.*interventional") as caught:
        pc.counterfactual(fit, data.select("control"), "A", draws=2)
    assert "\n" not in str(caught.value)


STILL = {
    "Bernoulli of logits": lambda a: dist.Bernoulli(logits=torch.zeros_like(a)),
    "Bernoulli of probs": lambda a: dist.Bernoulli(probs=torch.full_like(a, 0.5)),
    "Categorical of logits": lambda a: dist.Categorical(logits=torch.zeros(*a.shape, 3)),
    "Gamma": lambda a: dist.Gamma(torch.full_like(a, 2.0), 1.0),
    "Beta": lambda a: dist.Beta(torch.full_like(a, 2.0), 1.0),
    "transformed": lambda a: shifted(torch.zeros_like(a)),
}


@pytest.mark.parametrize("name", STILL)
def test_a_latent_whose_law_is_not_moved_keeps_its_value_in_every_world(name):
    """So that B, which adds 1 to every gene, does exactly that, whatever ``s`` is."""
    law = STILL[name]
    data = tiny_screen()
    fit = as_fit(Switch(law), SwitchGuide(law), data)
    assert np.allclose(pc.effects(fit, ["B", "A+B"], draws=5, cells=6)["effect"], 1, atol=1e-5)
    assert np.allclose(pc.interventional(fit, ["B", "A+B"], draws=5, cells=6)["effect"], 1, atol=1e-5)
    assert np.allclose(pc.counterfactual(fit, data.select("control"), ["B", "A+B"], draws=3)["effect"], 1, atol=1e-5)


# -- couplings ---------------------------------------------------------------------------------------------------------------------

N = 40_000
OLD, NEW = torch.tensor([8.0, 8.0, 8.0, 0.3, 20.0]), torch.tensor([3.0, 8.0, 14.0, 0.9, 19.0])
THETA = torch.tensor([2.0, 5.0, 1.0, 3.0, 50.0])
COUNT_LAWS = {
    "poisson": (lambda mu: Poisson(mu), lambda mu: scipy.stats.poisson(mu), OLD * 0),
    "negative_binomial": (
        lambda mu: NegativeBinomial(mu, THETA),
        lambda mu: scipy.stats.nbinom(THETA.numpy(), (THETA / (THETA + mu)).numpy()),
        1 / THETA,
    ),
    "gamma_poisson": (
        lambda mu: dist.GammaPoisson(THETA.expand_as(mu), (THETA / mu)).to_event(1),
        lambda mu: scipy.stats.nbinom(THETA.numpy(), (THETA / (THETA + mu)).numpy()),
        1 / THETA,
    ),
}


def coupled(name: str, noise: str, new: Tensor = NEW) -> tuple[np.ndarray, np.ndarray]:
    """Factual counts from the old law, and the counts that the coupling makes of them, [N, 5] each."""
    law = COUNT_LAWS[name][0]
    torch.manual_seed(0)
    old_law, new_law = law(OLD.expand(N, 5)), law(new.expand(1, N, 5))
    x = old_law.sample()
    return x.numpy(), couple(x, old_law, new_law, torch.zeros(1, N, dtype=torch.bool), noise)[0].numpy()


@pytest.mark.parametrize("noise", ["shared", "quantile", "independent"])
@pytest.mark.parametrize("name", COUNT_LAWS)
def test_coupled_counts_have_the_exact_marginal_law(name, noise):
    """Mean, variance and the probability of every count below 30: 160 comparisons at five standard errors, false alarm 1e-4."""
    _, twin = coupled(name, noise)
    over = COUNT_LAWS[name][2].numpy()
    mean = NEW.numpy()
    variance = mean + over * mean**2
    assert (np.abs(twin.mean(0) - mean) <= 5 * np.sqrt(variance / N)).all()
    squares = (twin - mean) ** 2
    assert (np.abs(squares.mean(0) - variance) <= 5 * squares.std(0) / np.sqrt(N)).all()
    exact = COUNT_LAWS[name][1](NEW)
    for k in range(30):
        p = exact.pmf(k)
        assert (np.abs((twin == k).mean(0) - p) <= 5 * np.sqrt(p * (1 - p) / N) + 1e-4).all()


@pytest.mark.parametrize("noise", ["shared", "quantile"])
@pytest.mark.parametrize("name", COUNT_LAWS)
def test_unchanged_genes_keep_their_counts_and_others_move_one_way(name, noise):
    x, twin = coupled(name, noise)
    assert np.array_equal(x[:, 1], twin[:, 1])
    assert (twin[:, [0, 4]] <= x[:, [0, 4]]).all()
    assert (twin[:, [2, 3]] >= x[:, [2, 3]]).all()


@pytest.mark.parametrize("name", COUNT_LAWS)
def test_quantile_coupling_is_monotone(name):
    x, twin = coupled(name, "quantile")
    for g in range(5):
        order = np.lexsort((twin[:, g], x[:, g]))
        low = pd.Series(twin[order, g]).groupby(x[order, g]).agg(["min", "max"])
        assert (low["max"].to_numpy()[:-1] <= low["min"].to_numpy()[1:]).all()


@pytest.mark.parametrize("name", COUNT_LAWS)
def test_shared_noise_is_closer_than_independent_noise(name):
    spread = {noise: np.subtract(*coupled(name, noise)).var(0) for noise in ("shared", "quantile", "independent")}
    moved = NEW.numpy() != OLD.numpy()
    assert (spread["shared"] < spread["independent"])[moved].all()
    assert (spread["quantile"] <= spread["shared"] * 1.02)[moved].all()  # comonotone is the closest in mean square


def test_counts_are_thinned_to_nothing_and_grown_from_nothing():
    x = torch.tensor([[5.0, 0.0]])
    old, new = Poisson(torch.tensor([[4.0, 1e-8]])), Poisson(torch.tensor([[[1e-12, 50.0]]]))
    for noise in ("shared", "quantile"):
        twin = couple(x, old, new, torch.zeros(1, 1, dtype=torch.bool), noise)[0, 0]
        assert twin[0] == 0
        assert 10 < twin[1] < 110
    assert torch.equal(couple(x, old, new, torch.ones(1, 1, dtype=torch.bool), "shared")[0], x)


def test_a_changed_dispersion_has_the_exact_law_or_is_refused():
    """Thinning knows one gamma factor: where the dispersion moves too, the law of the twin must still be the new one."""
    torch.manual_seed(0)
    old = NegativeBinomial(torch.full((N, 1), 6.0), torch.tensor([50.0]))
    new = NegativeBinomial(torch.full((1, N, 1), 7.0), torch.tensor([1.0]))
    try:
        twin = couple(old.sample(), old, new, torch.zeros(1, N, dtype=torch.bool), "shared").numpy().reshape(-1)
    except InterventionError:
        return
    squares = (twin - 7.0) ** 2
    assert abs(squares.mean() - (7 + 49)) <= 5 * squares.std() / np.sqrt(N)


@laws
@given(st.integers(0, 10_000), st.sampled_from(["shared", "quantile"]))
def test_gaussian_residual_is_kept_exactly(seed, noise):
    g = torch.Generator().manual_seed(seed)
    loc, new, sigma = torch.randn(4, 3, generator=g), torch.randn(2, 4, 3, generator=g), torch.rand(3, generator=g) + 0.1
    x = loc + sigma * torch.randn(4, 3, generator=g)
    old_law, new_law = dist.Normal(loc, sigma).to_event(1), dist.Normal(new, sigma).to_event(1)
    twin = couple(x, old_law, new_law, torch.zeros(2, 4, dtype=torch.bool), noise)
    assert torch.allclose(twin - new, (x - loc).expand_as(twin), atol=1e-6)


def test_unknown_noise_and_unknown_laws_are_refused(fitted, counts):
    with pytest.raises(InterventionError, match="noise='same' is unknown; choose one of shared"):
        pc.counterfactual(fitted, counts[:3], A, draws=1, noise="same")
    with pytest.raises(InterventionError, match="choose 'mean' or 'independent'"):
        pc.interventional(fitted, A, draws=1, noise="shared")
    odd = dist.Gamma(torch.ones(2, 3), 1.0).to_event(1)
    with pytest.raises(InterventionError, match="use noise='mean' or 'independent'"):
        couple(torch.ones(2, 3), odd, odd, torch.zeros(2, dtype=torch.bool), "shared")


# -- units, memory, AnnData ---------------------------------------------------------------------------------------------------------


def test_rates_sum_to_one_and_counts_to_the_library(fitted, counts):
    rate = pc.effects(fitted, [A, B], draws=3, cells=8, units="rate")
    direct = getattr(fitted.model, "direct", None) is not None  # these add on their own scale, and sum to one but nearly
    assert np.allclose(rate["expression"].sum("gene"), 1, atol=0.2 if direct else 1e-5)
    assert np.allclose(rate["baseline"].sum("gene"), 1, atol=0.2 if direct else 1e-5)
    if direct:
        return
    cells = counts[:8]
    twins = pc.counterfactual(fitted, cells, A, draws=3, noise="mean", units="counts")["expression"].sum("gene")
    assert np.allclose(twins, np.broadcast_to(cells.library_size, twins.shape), rtol=1e-5)


def test_the_default_unit_is_the_logarithm_of_the_populations_mean(fitted):
    rate, logged = (pc.effects(fitted, [A, B], draws=3, cells=8, units=u) for u in ("rate", None))
    assert logged.attrs["unit"] == "log1p_cp10k"
    assert np.allclose(np.log1p(1e4 * rate["expression"]), logged["expression"], atol=1e-5)
    assert np.allclose(logged["expression"] - logged["baseline"], logged["effect"], atol=1e-6)


def test_units_of_measured_cells(fitted, counts):
    cells = counts[:6]
    x, library = cells.dense(), cells.library_size[:, None]
    for unit, expected in (("counts", x), ("rate", x / library), ("log1p_cp10k", np.log1p(1e4 * x / library))):
        out = pc.counterfactual(fitted, cells, A, draws=1, units=unit)
        assert np.allclose(out["factual"], expected, rtol=1e-5)
        assert np.allclose(out["expression"][0, 0] - expected, out["effect"][0, 0], atol=1e-4)


@pytest.mark.parametrize("unit", ["counts", "rate", "log1p_cp10k"])
def test_gaussian_models_have_no_count_units(gaussian, normalised, unit):
    for ask in (
        lambda: pc.effects(gaussian, "pert0", units=unit),
        lambda: pc.counterfactual(gaussian, normalised[:2], "pert0", units=unit),
    ):
        with pytest.raises(InterventionError, match=f"units='{unit}'.*normalised.*data"):
            ask()


def test_what_does_not_fit_into_memory_is_refused_in_one_line(fitted, counts, monkeypatch):
    monkeypatch.setattr(query, "MAX_BYTES", 10_000)
    for ask in (
        lambda: pc.effects(fitted, A, draws=100),
        lambda: pc.interventional(fitted, A),
        lambda: pc.counterfactual(fitted, counts, A),
    ):
        with pytest.raises(InterventionError, match=r"would take .* GiB, more than .*; ask for fewer") as caught:
            ask()
        assert "\n" not in str(caught.value)


def test_acts_on_what_the_model_does_not_sample_are_refused(normalised):
    dense = pc.fit(*pc.build("cpa_vae", normalised, n_latent=3, n_hidden=8), normalised, max_epochs=1)
    with pytest.raises(InterventionError, match="the model has no sampled site 'mask'"):
        pc.effects(dense, pc.flip_target("pert0", 0), draws=1)
    assert (pc.effects(dense, pc.silence("pert0") & pc.perturb("pert0"), draws=2, cells=3)["effect"].to_numpy() == 0).all()


def test_cells_of_another_screen_are_refused(fitted, gaussian, counts, normalised):
    with pytest.raises(InterventionError, match=r"the genes of the data are not those of the fit"):
        pc.counterfactual(fitted, normalised[:2], A)


def test_names_dims_and_attributes(fitted, counts):
    out = pc.counterfactual(fitted, counts[:4], MANY, draws=2)
    assert out["effect"].dims == ("intervention", "draw", "cell", "gene")
    assert list(out["intervention"].to_numpy()) == list(MANY)
    assert list(out["cell"].to_numpy()) == list(counts.cells[:4])
    assert list(out["gene"].to_numpy()) == list(counts.genes)
    assert out.attrs == {"unit": "log1p_cp10k", "rung": "counterfactual", "noise": "shared"}
    assert pc.effects(fitted, A, draws=2, cells=2).attrs["rung"] == "interventional"


@pytest.mark.parametrize("draw", [None, 1])
def test_to_anndata_writes_and_reads_back(fitted, counts, draw, tmp_path):
    out = pc.counterfactual(fitted, counts[:5], MANY, draws=2, units="counts")
    adata = pc.to_anndata(out, draw=draw)
    adata.write_h5ad(tmp_path / "twins.h5ad")
    back = ad.read_h5ad(tmp_path / "twins.h5ad")
    assert list(back.obs_names) == list(counts.cells[:5])
    assert list(back.var_names) == list(counts.genes)
    assert np.array_equal(back.X, counts[:5].dense())
    assert set(back.layers) == set(MANY)
    expected = out["expression"].mean("draw") if draw is None else out["expression"].sel(draw=draw)
    for name in MANY:
        assert np.allclose(back.layers[name], expected.sel(intervention=name))
    assert dict(back.uns["pyrocausal"]) == {"unit": "counts", "rung": "counterfactual", "noise": "shared"}


def test_names_with_a_slash_can_be_written(fitted, counts, tmp_path):
    pc.to_anndata(pc.counterfactual(fitted, counts[:3], {"TRAC/TRBC": A}, draws=1)).write_h5ad(tmp_path / "twins.h5ad")
    assert len(ad.read_h5ad(tmp_path / "twins.h5ad").layers) == 1


def test_to_anndata_of_fresh_cells_and_of_populations(fitted):
    assert pc.to_anndata(pc.interventional(fitted, A, draws=2, cells=3)).shape == (3, 30)
    with pytest.raises(InterventionError, match="has no cells"):
        pc.to_anndata(pc.effects(fitted, A, draws=2, cells=3))


def test_one_control_cell_is_enough():
    data = pc.PerturbationData.from_anndata(
        pc.simulate.sams_screen(n_perturbations=3, n_latent=2, cells_per_perturbation=8, n_genes=6, n_control=1)
    )
    fit = pc.fit(*pc.build("sams_vae", data, n_latent=2, n_hidden=8, turns=()), data, max_epochs=1)
    assert pc.effects(fit, "pert0", draws=2, cells=3)["effect"].shape == (1, 2, 6)


# -- combinations that were never measured (check 7) ----------------------------------------------------------------------------------


def doubles_error(interaction: float) -> tuple[float, float]:
    """Root mean square error of predicted doubles, and of half of the measured cells against the other half (mean over pairs)."""
    adata = pc.simulate.sams_screen(
        n_perturbations=20,
        n_latent=4,
        cells_per_perturbation=100,
        n_genes=40,
        n_control=300,
        shift=2.0,
        doubles=8,
        cells_per_double=60,
        interaction=interaction,
    )
    data = pc.PerturbationData.from_anndata(adata)
    pairs = [c for c in data.conditions if "+" in c]
    train, measured = data.split("combinations", test=pairs)
    model, guide = pc.build("sams_vae", train, n_latent=4, n_hidden=64, n_layers=2, turns=(0.5,))
    fit = pc.fit(model, guide, train, max_epochs=50, batch_size=128, lr=1e-2)
    predicted = pc.effects(fit, pairs, draws=50, cells=64)["expression"].mean("draw").to_numpy()
    rng = np.random.default_rng(0)
    errors, splits = [], []
    for k, pair in enumerate(pairs):
        x = rng.permutation(measured.select(pair).dense())
        errors.append(np.sqrt(np.mean((predicted[k] - x.mean(0)) ** 2)))
        splits.append(np.sqrt(np.mean((x[:30].mean(0) - x[30:].mean(0)) ** 2)))
    return float(np.mean(errors)), float(np.mean(splits))


@pytest.fixture(scope="session")
def additive_world() -> tuple[float, float]:
    return doubles_error(interaction=0.0)


def test_additive_doubles_are_predicted_within_the_split_half_error(additive_world):
    error, split_half = additive_world
    assert error <= split_half


def test_an_interaction_is_missed_visibly(additive_world):
    error, split_half = doubles_error(interaction=1.0)
    assert error > 2 * split_half
    assert error > 2 * additive_world[0]
