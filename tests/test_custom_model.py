"""A model of your own: forty lines of Pyro get everything that the collection has, and faults are named in plain words."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule, PyroParam
from torch import nn
from torch.distributions import constraints

import pyrocausal as pc
from pyrocausal.distributions import NegativeBinomial, StraightThroughBernoulli
from pyrocausal.structural import mechanism_shift

# -- the example of the README -----------------------------------------------------------------------------------------------------


class ShiftVAE(PyroModule):
    """Each perturbation shifts few latent programs of a cell; counts follow from the programs."""

    def __init__(self, n_genes, n_perturbations, n_latent=6):
        super().__init__()
        self.shape = (n_perturbations, n_latent)
        self.decoder = nn.Sequential(nn.Linear(n_latent, 64), nn.LeakyReLU(), nn.Linear(64, n_genes), nn.Softmax(-1))
        self.theta = PyroParam(torch.full((n_genes,), 5.0), constraints.positive)

    def forward(self, batch):
        mask = pyro.sample("mask", dist.Bernoulli(0.2).expand(self.shape).to_event(2))
        effect = pyro.sample("effect", dist.Normal(0.0, 2.0).expand(self.shape).to_event(2))
        with batch.cells():
            dose = pyro.deterministic("dose", batch.dose, event_dim=1)
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand(self.shape[1:]).to_event(1))
            shift = pyro.deterministic("shift", mechanism_shift(dose, mask * effect), event_dim=1)
            x_loc = batch.library_size * self.decoder(z + shift)
            pyro.sample("x", NegativeBinomial(x_loc, self.theta), obs=batch.x)


class ShiftGuide(PyroModule):
    """Mean field over targets and effects; an encoder finds a cell's programs, less what its treatment explains."""

    def __init__(self, n_genes, n_perturbations, n_latent=6):
        super().__init__()
        shape = (n_perturbations, n_latent)
        self.logits = PyroParam(torch.zeros(shape))
        self.loc, self.scale = PyroParam(torch.randn(shape)), PyroParam(torch.full(shape, 0.1), constraints.positive)
        self.encoder = nn.Sequential(nn.Linear(n_genes, 64), nn.LeakyReLU(), nn.Linear(64, 2 * n_latent))

    def forward(self, batch):
        mask = pyro.sample("mask", StraightThroughBernoulli(logits=self.logits).to_event(2))
        effect = pyro.sample("effect", dist.Normal(self.loc, self.scale).to_event(2))
        with batch.cells():
            u, log_scale = self.encoder(batch.x.log1p()).chunk(2, -1)
            pyro.sample("z", dist.Normal(u - mechanism_shift(batch.dose, mask * effect), log_scale.exp()).to_event(1))


# -- what it gets --------------------------------------------------------------------------------------------------------------------

from collections.abc import Callable  # noqa: E402
from typing import Any  # noqa: E402

import networkx as nx  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

torch.set_num_threads(1)


def pair(data: pc.PerturbationData, seed: int = 0) -> tuple[ShiftVAE, ShiftGuide]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ShiftVAE(*data.sizes), ShiftGuide(*data.sizes)


@pytest.fixture(scope="session")
def data() -> pc.PerturbationData:
    adata = pc.simulate.svae_screen(n_perturbations=8, n_latent=3, cells_per_perturbation=40, n_genes=25, n_control=80, library_size=800.0)
    return pc.PerturbationData.from_anndata(adata)


@pytest.fixture(scope="session")
def fit(data: pc.PerturbationData) -> pc.Fit:
    return pc.fit(*pair(data), data, max_epochs=100, batch_size=50, lr=2e-2)


@pytest.fixture(autouse=True)
def _own_random_state():
    with torch.random.fork_rng(devices=[]):
        yield


def test_the_example_is_short():
    import inspect

    code = inspect.getsource(ShiftVAE) + inspect.getsource(ShiftGuide)
    assert len([line for line in code.splitlines() if line.strip()]) <= 40
    assert max(len(line) for line in code.splitlines()) <= 140


def test_it_keeps_the_contract(data):
    report = pc.check_model(*pair(data), data)
    assert report
    assert report.about("error") == report.about("warning") == []
    assert report.about("note") == ["draws run in one pass"]


def test_training_learns_the_screen(fit, data):
    """Nine tenths of the measured effects (in mean square) are predicted."""
    assert fit.history["elbo"].iloc[-1] > fit.history["elbo"].iloc[0] + 20

    def measured(label: str) -> np.ndarray:
        cells = data.select(label)
        return np.log1p(1e4 * (cells.dense() / cells.library_size[:, None]).mean(0))

    truth = np.stack([measured(p) - measured("control") for p in data.perturbations])
    predicted = pc.effects(fit, list(data.perturbations), draws=30, cells=64)["effect"].mean("draw").to_numpy()
    assert np.square(predicted - truth).mean() < 0.1 * np.square(truth).mean()


def test_early_stopping_keeps_the_best_state(data):
    fit = pc.fit(*pair(data), data, max_epochs=80, lr=5e-2, schedule="constant", validation=0.3, patience=2, kl_warmup=0.0)
    assert fit.stopped == "early"
    assert len(fit.history) < 80
    validation = fit.history["validation"]
    assert validation.iloc[-2:].max() < validation.max() == validation.iloc[-3]
    from pyrocausal.fit import held_out_elbo

    _, held = data.split("cells", test=0.3, seed=0)
    assert held_out_elbo(fit.elbo, held, n_train=fit.settings["n_cells"]) == pytest.approx(validation.max(), rel=1e-5)


def test_resuming_equals_the_uninterrupted_run(data, tmp_path):
    settings = {"max_epochs": 6, "batch_size": 100, "seed": 3}
    whole = pc.fit(*pair(data), data, **settings)
    path = tmp_path / "run.npz"
    pc.fit(*pair(data), data, **settings, checkpoint=path, checkpoint_every=1, callback=lambda epoch, row: epoch == 3)
    resumed = pc.fit(*pair(data), data, **settings, checkpoint=path, resume=True)
    assert len(resumed.history) == 6
    for name in ("model", "guide"):
        ours, theirs = getattr(whole, name).state_dict(), getattr(resumed, name).state_dict()
        assert all(torch.equal(v, theirs[k]) for k, v in ours.items())


def test_queries_of_both_rungs(fit, data):
    kd = pc.perturb("pert0")
    effects = pc.effects(fit, [kd, kd & pc.perturb("pert3"), pc.silence("pert0") & kd], draws=4, cells=8)["effect"]
    assert np.abs(effects[0]).max() > 0.3
    assert np.allclose(effects[2], 0, atol=1e-6)
    cells = data.select("pert0")[:5]
    twins = pc.counterfactual(fit, cells, {"as it was": kd, "untreated": pc.untreated()}, draws=3, units="counts")["expression"]
    assert np.array_equal(twins[0], np.broadcast_to(cells.dense(), twins[0].shape))
    assert not np.array_equal(twins[1], twins[0])
    assert pc.interventional(fit, kd, draws=2, cells=3)["expression"].shape == (1, 2, 3, 25)


def test_arviz_and_networkx(fit, data):
    idata = pc.to_inference_data(fit, draws=10, cells=data[:4], predictive_draws=3, particles=2)
    assert idata.posterior["effect"].dims == ("chain", "draw", "perturbation", "latent")
    assert idata.posterior_predictive["x"].dims == ("chain", "draw", "cell", "gene")
    assert list(idata.posterior["perturbation"].to_numpy()) == list(data.perturbations)
    graph = pc.to_networkx(fit, draws=50)
    assert isinstance(graph, nx.DiGraph)
    assert {k for _, k in graph.nodes("kind")} == {"perturbation", "program", "gene"}
    assert np.isfinite(pc.iwelbo(fit, data[:4], particles=5)).all()


def test_saved_and_loaded_unchanged(fit, data, tmp_path):
    fit.save(tmp_path / "run")
    back = pc.load(tmp_path / "run", *pair(data, seed=9))
    before, after = (pc.effects(f, "pert0", draws=5, cells=6) for f in (fit, back))
    assert before.equals(after)
    ours, theirs = (pc.counterfactual(f, data[:5], "pert1", draws=2) for f in (fit, back))
    assert ours.equals(theirs)
    assert back.stopped == fit.stopped
    assert back.history.equals(fit.history) or np.allclose(back.history, fit.history, equal_nan=True)
    with pytest.raises(pc.errors.CheckpointError, match=r"pass pc\.load"):
        pc.load(tmp_path / "run")
    with pytest.raises(pc.errors.CheckpointError, match="does not fit ShiftVAE"):
        pc.load(tmp_path / "run", ShiftVAE(25, 8, n_latent=3), ShiftGuide(25, 8, n_latent=3))


def test_do_is_pyro_do_on_it(fit, data):
    batch = data.batch(range(4)).hide()
    kd = pc.perturb("pert2", dose=0.5)
    runs = []
    for intervened in (pc.do(fit.model, kd, data), pyro.do(fit.model, data={"dose": 0.5 * torch.eye(8)[2:3]})):
        torch.manual_seed(0)
        runs.append(pyro.poutine.trace(intervened).get_trace(batch).nodes["x"]["value"])
    assert torch.equal(*runs)


# -- faults: each is named, and nothing else is -----------------------------------------------------------------------------------------


class Model(ShiftVAE):
    """The example, with one part to go wrong."""

    def prior(self) -> Any:
        return dist.Normal(0.0, 2.0).expand(self.shape).to_event(2)

    def plate(self, batch: Any) -> Any:
        return batch.cells()

    def dosed(self, batch: Any) -> torch.Tensor:
        return pyro.deterministic("dose", batch.dose, event_dim=1)

    def observe(self, batch: Any, x_loc: torch.Tensor) -> None:
        pyro.sample("x", NegativeBinomial(x_loc, self.theta), obs=batch.x)

    def table(self) -> torch.Tensor:
        return pyro.sample("effect", self.prior())

    def forward(self, batch: Any) -> None:
        effect = self.table()
        with self.plate(batch):
            dose = self.dosed(batch)
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand(self.shape[1:]).to_event(1))
            x_loc = batch.library_size * self.decoder(z + mechanism_shift(dose, effect))
            self.observe(batch, x_loc)


class Guide(ShiftGuide):
    def law(self) -> Any:
        return dist.Normal(self.loc, self.scale).to_event(2)

    def state(self, batch: Any) -> torch.Tensor:
        return self.encoder(batch.x.log1p())

    def forward(self, batch: Any) -> None:
        pyro.sample("effect", self.law())
        with batch.cells():
            loc, log_scale = self.state(batch).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


class NoObservation(Model):
    def observe(self, batch, x_loc):
        pyro.sample("counts", NegativeBinomial(x_loc, self.theta), obs=batch.x)


class NotObserved(Model):
    def observe(self, batch, x_loc):
        pyro.sample("x", NegativeBinomial(x_loc, self.theta))


class NoDose(Model):
    def dosed(self, batch):
        return batch.dose


class DoseDeclaredButNotUsed(Model):
    def dosed(self, batch):
        pyro.deterministic("dose", batch.dose, event_dim=1)
        return batch.dose


class UnscaledPlate(Model):
    def plate(self, batch):
        return pyro.plate("cell", len(batch), dim=-1)


class OutsideThePlate(Model):
    def forward(self, batch):
        effect = self.table()
        with batch.cells():
            dose = self.dosed(batch)
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand(self.shape[1:]).to_event(1))
        self.observe(batch, batch.library_size * self.decoder(z + mechanism_shift(dose, effect)))


class GenesNotAnEvent(Model):
    def observe(self, batch, x_loc):
        pyro.sample("x", dist.GammaPoisson(self.theta, self.theta / x_loc), obs=batch.x)


class GlobalParameter(Model):
    def table(self):
        scale = pyro.param("effect_scale", torch.tensor(2.0), constraint=constraints.positive)
        return pyro.sample("effect", dist.Normal(torch.zeros(self.shape), scale).to_event(2))


class ParameterForASite(Model):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.effect = PyroParam(torch.randn(self.shape))

    def table(self):
        return self.effect


class ReadsTheObservation(Model):
    def dosed(self, batch):
        assert batch.x.sum() > 0
        return super().dosed(batch)


class NotANumber(Model):
    def observe(self, batch, x_loc):
        pyro.sample("x", dist.Normal(x_loc * float("nan"), 1.0, validate_args=False).to_event(1), obs=batch.x)


class NotANumberInALaw(Model):
    """Pyro's own validation meets it first."""

    def observe(self, batch, x_loc):
        super().observe(batch, x_loc)
        pyro.factor("penalty", torch.full(batch.index.shape, float("nan")))


class OutsideTheSupport(Model):
    def observe(self, batch, x_loc):
        pyro.sample("x", dist.LogNormal(x_loc.clamp_min(1e-3).log(), 1.0, validate_args=False).to_event(1), obs=batch.x)


class UnnamedDimension(Model):
    def table(self):
        pyro.sample("drift", dist.Normal(torch.zeros(4), 1.0).to_event(1))
        return super().table()


class NamedDimension(Model):
    def table(self):
        pyro.sample("drift", dist.Normal(torch.zeros(4), 1.0).to_event(1), infer={"event_dims": ("direction",)})
        return super().table()


class Drifting(Guide):
    def law(self):
        pyro.sample("drift", dist.Normal(torch.zeros(4), 1.0).to_event(1))
        return super().law()


class SilentEffect(Guide):
    """Effects start at exactly zero: a common and harmless initial value."""

    def law(self):
        return dist.Delta(0 * self.loc, event_dim=2)


class WithoutEffect(Guide):
    """For models whose effect is no site."""

    def forward(self, batch):
        with batch.cells():
            loc, log_scale = self.state(batch).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


class OneTooMany(Guide):
    def law(self):
        pyro.sample("gate", dist.Normal(torch.zeros(()), 1.0))
        return super().law()


class WithObservation(Guide):
    def forward(self, batch):
        super().forward(batch)
        with batch.cells():
            pyro.sample("x", dist.Delta(batch.x, event_dim=1))


class OtherEventDimensions(Guide):
    def law(self):
        return dist.Normal(self.loc, self.scale).to_event(1)


class OfAllCells(Guide):
    """A parameter for every cell of the screen, in the order of the screen."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.states = PyroParam(torch.zeros(400, 12))

    def state(self, batch):
        return self.states


class IndexedByCell(OfAllCells):
    def state(self, batch):
        return self.states[batch.index] + 0.1 * batch.index[:, None]


class Failing(Guide):
    def law(self):
        raise KeyError("no such thing")


FAULTS: dict[str, tuple[type, type, tuple[str, ...]]] = {
    "no x site": (NoObservation, Guide, ("no site 'x'", "obs=batch.x")),
    "x not observed": (NotObserved, Guide, ("'x' is not observed", "obs=batch.x")),
    "no dose site": (NoDose, Guide, ("no site 'dose'", "pyro.deterministic('dose'")),
    "dose declared, batch.dose used": (DoseDeclaredButNotUsed, Guide, ("do(dose) changes nothing", "not batch.dose")),
    "plate without scale": (UnscaledPlate, Guide, ("does not scale", "batch.cells()")),
    "x outside the plate": (OutsideThePlate, Guide, ("'x' is in no plate", "batch.cells()")),
    "genes not an event": (GenesNotAnEvent, Guide, ("'x'", "event", "to_event(1)")),
    "guide forgets a latent": (Model, WithoutEffect, ("'effect'", "the guide forgets it")),
    "guide has a site too many": (Model, OneTooMany, ("the guide samples 'gate'", "the model does not have")),
    "event dimensions differ": (Model, OtherEventDimensions, ("'effect' has 2 event dimensions in the model and 1 in the guide",)),
    "pyro.param": (GlobalParameter, Guide, ("pyro.param('effect_scale')", "PyroParam")),
    "parameter for a site": (ParameterForASite, WithoutEffect, ("'effect' is a parameter", "pyro.do cannot reach")),
    "crashes when x is hidden": (ReadsTheObservation, Guide, ("when the observation is hidden", "only as obs=batch.x")),
    "a parameter for every cell": (Model, OfAllCells, ("amortise", "parameter per cell")),
    "a parameter for every cell, indexed": (Model, IndexedByCell, ("amortise", "parameter per cell")),
    "log-probability is NaN": (NotANumber, Guide, ("log-probability of 'x' in the model is nan",)),
    "parameter of a law is NaN": (NotANumberInALaw, Guide, ("log-probability of 'penalty' in the model is nan",)),
    "zeros outside the support": (OutsideTheSupport, Guide, ("'x'", "support")),
    "the guide crashes": (Model, Failing, ("the guide fails", "KeyError", "no such thing")),
}


def faulty(name: str, data: pc.PerturbationData) -> tuple[Any, Any]:
    model, guide, _ = FAULTS[name]
    return model(*data.sizes), guide(*data.sizes)


@pytest.mark.parametrize("name", FAULTS)
def test_exactly_this_fault_is_named(name, data):
    report = pc.check_model(*faulty(name, data), data)
    errors = report.about("error")
    assert not report
    assert len(errors) == 1, errors
    assert "\n" not in errors[0]
    for words in FAULTS[name][2]:
        assert words in errors[0]
    assert "does not keep the contract" in str(report)
    assert errors[0] in str(report)


@pytest.mark.parametrize("name", ["pyro.param", "guide forgets a latent", "crashes when x is hidden"])
def test_a_second_look_sees_the_same_and_leaves_no_trace(name, data):
    store = set(pyro.get_param_store().keys())
    model, guide = faulty(name, data)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    assert str(pc.check_model(model, guide, data)) == str(pc.check_model(model, guide, data))
    assert set(pyro.get_param_store().keys()) == store
    assert torch.equal(before, torch.get_rng_state())


def test_a_plain_module_with_a_global_parameter_is_named(data):
    """Outside PyroModule a ``pyro.param`` does reach the global store."""

    class Wrapped(nn.Module):
        def __init__(self, inner: Any) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, batch: Any) -> Any:
            pyro.param("stray", torch.ones(()))
            return self.inner(batch)

    errors = pc.check_model(Wrapped(Model(*data.sizes)), Guide(*data.sizes), data).about("error")
    assert len(errors) == 1
    assert "pyro.param('stray')" in errors[0]
    assert "PyroParam" in errors[0]


CLEAN: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "the example": (ShiftVAE, ShiftGuide),
    "without a mask": (Model, Guide),
    "effects start at zero": (Model, SilentEffect),
}


@pytest.mark.parametrize("name", CLEAN)
def test_a_clean_pair_has_no_error(name, data):
    model, guide = CLEAN[name]
    for seed in range(5):
        torch.manual_seed(seed)
        report = pc.check_model(model(*data.sizes), guide(*data.sizes), data)
        assert report, str(report)
        assert report.about("warning") == []


@pytest.mark.parametrize("name", ["sams_vae", "sams_vae_mean_field", "sams_vae_correlated", "svae_plus", "svae_plus_parity", "cpa_vae"])
def test_the_collection_is_clean(name, data):
    report = pc.check_model(*pc.build(name, data, n_latent=4, n_hidden=16), data)
    assert report, str(report)
    assert report.about("warning") == []


def test_unnamed_dimensions_are_a_warning(data):
    report = pc.check_model(UnnamedDimension(*data.sizes), Drifting(*data.sizes), data)
    assert report
    (warning,) = report.about("warning")
    assert "'drift'" in warning
    assert "event_dims" in warning


def test_named_dimensions_are_not(data):
    report = pc.check_model(NamedDimension(*data.sizes), Drifting(*data.sizes), data)
    assert report
    assert report.about("warning") == []


def test_draw_by_draw_is_a_note(data):
    class Plain(Model):
        def forward(self, batch: Any) -> None:
            effect = self.table()
            with batch.cells():
                dose = self.dosed(batch)
                z = pyro.sample("z", dist.Normal(0.0, 1.0).expand(self.shape[1:]).to_event(1))
                self.observe(batch, batch.library_size * self.decoder(z + dose @ effect))

    report = pc.check_model(Plain(*data.sizes), Guide(*data.sizes), data)
    assert report
    (note,) = report.about("note")
    assert "one by one" in note
    assert "mechanism_shift" in note
