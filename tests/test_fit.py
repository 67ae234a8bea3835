"""Training: the same run twice, the same run in two halves, what is refused, and what is on disk afterwards."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import RenyiELBO, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from pyro.nn import PyroModule, PyroParam
from torch import Tensor, nn
from torch.distributions import constraints

import pyrocausal as pc
import pyrocausal.centred
from pyrocausal.epoch import default_epochs, steps_per_epoch
from pyrocausal.errors import CheckpointError, ContractError, DataError
from pyrocausal.fit import held_out_elbo
from pyrocausal.loading import Batch
from pyrocausal.sparsity import sparse_rotation

torch.set_num_threads(1)

SIZES = {"n_latent": 3, "n_hidden": 8, "n_layers": 1}


@pytest.fixture(autouse=True)
def _own_random_state(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Own random state, and a short search for the rotation: these tests ask whether runs are the same, not whether they are good."""
    monkeypatch.setattr(pyrocausal.centred, "sparse_rotation", partial(sparse_rotation, starts=1, steps=10))
    with torch.random.fork_rng(devices=[]):
        yield


@pytest.fixture(scope="module")
def data() -> pc.PerturbationData:
    return pc.PerturbationData.from_anndata(pc.simulate.svae_screen(5, 3, 16, 12, n_control=20, library_size=200.0))


def fitted(data: pc.PerturbationData, name: str = "sams_vae", settings: dict[str, Any] | None = None, **more: Any) -> pc.Fit:
    model, guide = pc.build(name, data, **{**SIZES, **(settings or {})})
    return pc.fit(model, guide, data, **{"max_epochs": 10, "batch_size": 32, **more})


def state(fit: pc.Fit) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in fit.elbo.state_dict().items()}


def same_state(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return set(a) == set(b) and all(torch.equal(a[k], b[k]) for k in a)


def same_fit(a: pc.Fit, b: pc.Fit) -> bool:
    """Every parameter and buffer bit for bit, and the history but for the clock."""
    histories = [f.history.drop(columns="seconds") for f in (a, b)]
    return same_state(state(a), state(b)) and histories[0].equals(histories[1])


# -- randomness ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sams_vae", "sams_vae_mean_field", "svae_plus"])
def test_same_seed_same_fit(data: pc.PerturbationData, name: str) -> None:
    first = fitted(data, name, seed=1)
    torch.randn(7)  # the caller's random state is nobody's business
    assert same_fit(first, fitted(data, name, seed=1))
    other = fitted(data, name, seed=2)
    assert not same_state(state(first), state(other)) and not first.history["elbo"].equals(other.history["elbo"])
    assert first.stopped == "max_epochs" and list(first.history.index) == list(range(1, 11))


def test_training_helps(data: pc.PerturbationData) -> None:
    """Not only the same, but better: the bound of the last epoch is above the first's by more than a nat per cell."""
    history = fitted(data, kl_warmup=0.0).history
    assert history["elbo"].iloc[-1] > history["elbo"].iloc[0] + 1


@pytest.mark.parametrize("fails", [False, True])
def test_random_states_are_left_alone(data: pc.PerturbationData, fails: bool) -> None:
    before = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    with pytest.raises(ZeroDivisionError) if fails else nullcontext():
        fitted(data, max_epochs=2, callback=_fail if fails else None, validation=0.2)
    assert torch.equal(before[0], torch.get_rng_state()) and random.getstate() == before[2]
    assert (np.random.get_state()[1] == before[1][1]).all()  # noqa: NPY002


def _fail(epoch: int, row: dict[str, float]) -> bool:
    raise ZeroDivisionError


@pytest.mark.parametrize("setting", [True, False])
@pytest.mark.parametrize("fails", [False, True])
def test_validation_setting_is_restored(data: pc.PerturbationData, setting: bool, fails: bool) -> None:
    names = [n for n in pyro.settings.get() if n.startswith("validate_")]
    before = {n: pyro.settings.get(n) for n in names}
    try:
        pyro.enable_validation(setting)
        chosen = {n: pyro.settings.get(n) for n in names}
        with pytest.raises(ZeroDivisionError) if fails else nullcontext():
            fitted(data, max_epochs=2, callback=_fail if fails else None)
        assert {n: pyro.settings.get(n) for n in names} == chosen
    finally:
        pyro.settings.set(**before)


def test_history(data: pc.PerturbationData) -> None:
    history = fitted(data, max_epochs=4, validation=0.2, kl_warmup=0.5).history
    assert {"elbo", "validation", "kl_weight", "lr", "seconds", "site:x", "site:z", "site:mask", "site:effect"} <= set(history.columns)
    assert history["validation"].notna().all() and history["kl_weight"].is_monotonic_increasing and history["kl_weight"].iloc[-1] == 1
    sites = history[[c for c in history.columns if c.startswith("site:")]].sum(axis=1)
    np.testing.assert_allclose(sites, history["elbo"], rtol=1e-5)


# -- resuming --------------------------------------------------------------------------------------------------------------------


def stop_at(epoch: int) -> Callable[[int, dict[str, float]], bool]:
    return lambda done, _: done == epoch


@pytest.mark.parametrize("validation", [None, 0.25])
@pytest.mark.parametrize("name", ["sams_vae", "sams_vae_mean_field"])
@pytest.mark.parametrize("at", [2, 5, 8])
def test_two_halves_are_one_run(data: pc.PerturbationData, tmp_path: Path, name: str, validation: float | None, at: int) -> None:
    """Stopped after ``at`` of 10 epochs (before, at, and after the default guide's first turn) and resumed in a fresh pair."""
    common = {"validation": validation, "checkpoint_every": 1, "patience": 1}
    whole = fitted(data, name, checkpoint=tmp_path / "whole.npz", **common)
    half = fitted(data, name, checkpoint=tmp_path / "half.npz", callback=stop_at(at), **common)
    assert half.stopped == "callback" and len(half.history) == at
    resumed = fitted(data, name, checkpoint=tmp_path / "half.npz", resume=True, **common)
    assert same_fit(whole, resumed) and resumed.stopped == whole.stopped
    assert np.allclose(half.history["elbo"], whole.history["elbo"][:at], rtol=0, atol=0)


def test_resuming_a_finished_run_changes_nothing(data: pc.PerturbationData, tmp_path: Path) -> None:
    whole = fitted(data, checkpoint=tmp_path / "c.npz", validation=0.25)
    again = fitted(data, checkpoint=tmp_path / "c.npz", validation=0.25, resume=True)
    assert same_fit(whole, again) and again.stopped == whole.stopped


def test_resume_without_a_checkpoint_starts_anew(data: pc.PerturbationData, tmp_path: Path) -> None:
    fresh = fitted(data, max_epochs=3, checkpoint=tmp_path / "c.npz", resume=True)
    assert same_fit(fresh, fitted(data, max_epochs=3)) and (tmp_path / "c.npz").is_file()


@pytest.mark.parametrize("at", [3, 6])
def test_interrupt_keeps_the_fit(data: pc.PerturbationData, tmp_path: Path, at: int) -> None:
    def interrupt(epoch: int, _: dict[str, float]) -> None:
        if epoch == at:
            raise KeyboardInterrupt

    path = tmp_path / "c.npz"
    stopped = fitted(data, checkpoint=path, checkpoint_every=2, callback=interrupt)
    assert stopped.stopped == "interrupted" and len(stopped.history) == at and not stopped.model.training
    assert torch.isfinite(stopped.elbo(data.batch()))
    assert same_fit(fitted(data), fitted(data, checkpoint=path, checkpoint_every=2, resume=True))


class _Interrupted(nn.Module):
    """A guide that is interrupted in the middle of an epoch."""

    def __init__(self, guide: Any, at: int) -> None:
        super().__init__()
        self.guide, self.left = guide, at

    def forward(self, batch: Batch) -> None:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt
        self.guide(batch)


def test_interrupt_within_an_epoch(data: pc.PerturbationData) -> None:
    model, guide = pc.build("sams_vae_mean_field", data, **SIZES)
    before = torch.get_rng_state()
    fit = pc.fit(model, _Interrupted(guide, 10), data, max_epochs=10, batch_size=32)  # 4 steps an epoch
    assert fit.stopped == "interrupted" and len(fit.history) == 2
    assert torch.equal(before, torch.get_rng_state()) and not pyro.poutine.runtime._PYRO_STACK


# -- early stopping ---------------------------------------------------------------------------------------------------------------


def test_early_stopping_restores_the_best_state(data: pc.PerturbationData) -> None:
    """A decoder that learns 30 cells by heart: the held-out bound falls, and the fit is the best epoch's to the bit."""
    train, held = data[np.arange(0, 100, 3)], data[np.arange(1, 100, 3)]
    more = {"validation": held, "kl_warmup": 0.0, "lr": 0.03, "schedule": "constant", "max_epochs": 150}
    settings = {"n_hidden": 64, "n_layers": 2}
    fit = fitted(train, "sams_vae_mean_field", settings, patience=5, **more)
    history = fit.history["validation"]
    assert fit.stopped == "early" and len(history) < 150
    assert history.idxmax() == len(history) - 5 and history.iloc[-1] < history.max()
    assert held_out_elbo(fit.elbo, held, n_train=len(train), batch_size=32) == history.max()
    patient = fitted(train, "sams_vae_mean_field", settings, patience=None, **{**more, "max_epochs": len(history)})
    assert patient.stopped == "max_epochs" and same_state(state(fit), state(patient))  # the best state, however the training ended


def test_patience_waits_for_the_last_turn(data: pc.PerturbationData) -> None:
    """The default guide turns its programs at .5, .65 and .8 of the epochs: the best state is never one of before."""
    fit = fitted(data, validation=0.3, max_epochs=20, patience=1, lr=0.05)
    assert len(fit.history) > 16
    assert bool(fit.guide.table.is_sparse)


# -- objectives --------------------------------------------------------------------------------------------------------------------


BOUNDS = {
    "Trace_ELBO": lambda: Trace_ELBO(num_particles=2),
    "TraceMeanField_ELBO": TraceMeanField_ELBO,
    "TraceEnum_ELBO": lambda: TraceEnum_ELBO(max_plate_nesting=1, strict_enumeration_warning=False),
}


@pytest.mark.parametrize(
    ("name", "bound"), [("sams_vae_mean_field", "Trace_ELBO"), ("sams_vae_mean_field", "TraceMeanField_ELBO"),
                        ("sams_vae_mean_field", "TraceEnum_ELBO"), ("sams_vae", "Trace_ELBO"), ("svae_plus", "Trace_ELBO")]
)  # fmt: skip
def test_bounds_of_pyro(data: pc.PerturbationData, name: str, bound: str) -> None:
    theirs = BOUNDS[bound]()
    fit = fitted(data, name, objective=theirs, max_epochs=4, batch_size=120, validation=0.2)
    assert fit.elbo.elbo is theirs and np.isfinite(fit.history[["elbo", "validation"]]).all(axis=None)
    start, _ = pc.build(name, data, **SIZES)
    assert not torch.equal(start.decoder.last.weight, fit.model.decoder.last.weight)


@pytest.mark.parametrize("theirs", [TraceGraph_ELBO(), RenyiELBO(num_particles=2)])
def test_bounds_without_a_differentiable_loss_are_refused(data: pc.PerturbationData, theirs: Any) -> None:
    """In Pyro 1.9.2 these two have no ``differentiable_loss``, so nothing that trains an ``nn.Module`` can use them."""
    with pytest.raises(ContractError, match=type(theirs).__name__):
        fitted(data, "sams_vae_mean_field", objective=theirs, max_epochs=1)


def test_the_bound_recommended_for_hard_masks_works(data: pc.PerturbationData) -> None:
    """What the refusal of a guide site without reparametrised gradient recommends is an argument of fit, and can train it."""
    model, guide = pc.build("sams_vae_mean_field", data, **SIZES)
    plain = _PlainMask(guide)
    with pytest.raises(ContractError, match="no reparametrised gradient") as refusal:
        pc.fit(model, plain, data, max_epochs=1, objective=pc.ELBO(analytic_kl=False))
    argument, name = re.findall(r"(\w+)=pyro\.infer\.(\w+)\(\)", str(refusal.value))[0]
    fit = pc.fit(model, plain, data, max_epochs=2, **{argument: getattr(pyro.infer, name)()})
    assert np.isfinite(fit.history["elbo"]).all() and plain.logits.grad.abs().max() > 0


class _PlainMask(nn.Module):
    """The mean-field guide with a plain Bernoulli for the mask."""

    def __init__(self, guide: Any) -> None:
        super().__init__()
        self.guide = guide
        self.logits = nn.Parameter(torch.zeros_like(guide.mask_logits))

    def forward(self, batch: Batch) -> None:
        mask = pyro.sample("mask", dist.Bernoulli(logits=self.logits).to_event(2))
        with pyro.poutine.block(hide=["mask"]), pyro.condition(data={"mask": mask}):
            self.guide(batch)


def test_our_bound_and_pyros_give_the_same_fit(data: pc.PerturbationData) -> None:
    """Two epochs, warm-up included: float32 noise apart, the same parameters."""
    ours, theirs = (fitted(data, "sams_vae_mean_field", objective=o, max_epochs=2) for o in (pc.ELBO(), TraceMeanField_ELBO()))
    for k, v in state(ours).items():
        torch.testing.assert_close(v, state(theirs)[k], rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(ours.history["elbo"], theirs.history["elbo"], rtol=1e-5)


@pytest.mark.parametrize("name", ["sams_vae_mean_field", "sams_vae_correlated", "svae_plus_parity"])
def test_parity(data: pc.PerturbationData, name: str) -> None:
    fit = fitted(data, name, objective="parity", max_epochs=6, kl_warmup=0.0)
    assert type(fit.elbo.elbo) is pc.ELBO and fit.history["elbo"].iloc[-1] > fit.history["elbo"].iloc[0]


def test_wrong_arguments(data: pc.PerturbationData) -> None:
    for more in ({"objective": "evidence"}, {"schedule": "linear"}, {"max_epochs": 0}, {"batch_size": 0}):
        with pytest.raises(ValueError, match=str(next(iter(more.values())))):
            fitted(data, **more)
    model, guide = pc.build("sams_vae", data, **SIZES)
    with pytest.raises(ContractError, match=r"nn\.Module"):
        pc.fit(lambda batch: None, guide, data)
    with pytest.raises(DataError, match="from_anndata"):
        pc.fit(model, guide, pd.DataFrame())
    with pytest.raises(ContractError, match="no published objective"):
        pc.fit(_Model(12), _Guide(12), data, objective="parity")


# -- parameters -------------------------------------------------------------------------------------------------------------------


class _Model(PyroModule):
    """A model of a user's own: gene means."""

    def __init__(self, n_genes: int) -> None:
        super().__init__()
        self.n_genes = n_genes
        self.gain = PyroParam(torch.tensor(1.0), constraint=constraints.positive)

    def forward(self, batch: Batch) -> None:
        offset = pyro.sample("offset", dist.Normal(torch.zeros(self.n_genes), 3.0).to_event(1))
        with batch.cells():
            pyro.sample("x", dist.Poisson(self.gain * offset.exp()).to_event(1), obs=batch.x)


class _Guide(PyroModule):
    def __init__(self, n_genes: int) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(n_genes))

    def forward(self, batch: Batch) -> None:
        pyro.sample("offset", dist.Normal(self.loc, 0.1).to_event(1))


class _StoreGuide(nn.Module):
    """What must not be: a parameter in Pyro's global store, which no optimiser of ours would see."""

    def __init__(self, n_genes: int) -> None:
        super().__init__()
        self.n_genes = n_genes

    def forward(self, batch: Batch) -> None:
        pyro.sample("offset", dist.Normal(pyro.param("stray", torch.zeros(self.n_genes)), 0.1).to_event(1))


class _StorePyroGuide(_Guide):
    def forward(self, batch: Batch) -> None:
        pyro.sample("offset", dist.Normal(pyro.param("stray", torch.zeros(12)), 0.1).to_event(1))


def test_a_pair_of_ones_own(data: pc.PerturbationData) -> None:
    fit = pc.fit(_Model(12), _Guide(12), data, max_epochs=5, batch_size=64, lr=0.1)
    assert fit.recipe is None and float(fit.model.gain) != 1 and fit.history["elbo"].iloc[-1] > fit.history["elbo"].iloc[0] + 1


def test_models_never_touch(data: pc.PerturbationData) -> None:
    """Same classes, same parameter names, other sizes; trained in turn, and the store stays empty."""
    assert len(pyro.get_param_store()) == 0
    small = fitted(data, max_epochs=2)
    before, batch = state(small), data.batch()

    def bound() -> float:
        torch.manual_seed(0)
        return float(small.elbo(batch))

    value = bound()
    other = pc.PerturbationData.from_anndata(pc.simulate.svae_screen(7, 4, 10, 20, seed=3, n_control=10))
    large = fitted(other, settings={"n_latent": 6}, max_epochs=2)
    assert same_state(before, state(small)) and bound() == value
    assert large.guide.table.loc.shape == (7, 6) and len(pyro.get_param_store()) == 0
    assert same_state(before, state(fitted(data, max_epochs=2)))


@pytest.mark.parametrize(("guide", "refusal"), [(_StoreGuide, ContractError), (_StorePyroGuide, NotImplementedError)])
def test_stray_parameters_are_refused(data: pc.PerturbationData, guide: Any, refusal: type[Exception]) -> None:
    """Every time, not only the first, and the store is as it was. (In a PyroModule it is Pyro that refuses.)"""
    try:
        for _ in range(2):
            with pytest.raises(refusal, match="stray"):
                pc.fit(_Model(12), guide(12), data, max_epochs=2)
        assert len(pyro.get_param_store()) == 0
    finally:
        pyro.clear_param_store()


@pytest.mark.parametrize("name", ["sams_vae", "sccvae_parity", "discrepancy_vae", "linear_lcd"])
def test_steps_of_an_epoch_are_counted(data: pc.PerturbationData, name: str) -> None:
    """Minibatches of all cells, minibatches of each condition, and the moments of the whole screen."""
    taken = []
    screen = data.log_normalised()
    model, guide = pc.build(name, screen, **({"draws": 0} if name == "linear_lcd" else {"n_latent": 5}), seed=0)
    own = getattr(guide, "after_step", lambda *of: None)
    guide.after_step = lambda *of: (taken.append(1), own(*of))
    pc.fit(model, guide, screen, max_epochs=2, batch_size=7, progress=False)  # conditions of 16 and 20
    assert len(taken) == 2 * steps_per_epoch(model, screen, 7)
    conditions = len(set(screen.labels))
    if name == "linear_lcd":
        assert steps_per_epoch(model, screen) == 1
    elif name != "sams_vae":
        assert steps_per_epoch(model, screen, len(screen)) == conditions > steps_per_epoch(pc.build("sams_vae", screen)[0], screen)


@pytest.mark.parametrize(("steps", "epochs"), [(10, 300), (51, 60), (66, 60), (157, 25), (3_907, 10), (1, 3000)])
def test_default_epochs_aim_at_three_to_four_thousand_steps(steps: int, epochs: int) -> None:
    assert default_epochs(steps) == epochs


def test_masks_have_their_own_learning_rate(data: pc.PerturbationData) -> None:
    """Masks that start at logit 5: with their own rate, entries without target cross one half within 500 steps; with the networks' rate
    of 3e-3 none can, since Adam moves 3e-3 a step, that is, 1.5 in 500 (shown on 100)."""
    more = {"batch_size": 60, "schedule": "constant", "kl_warmup": 0.0}  # two steps an epoch
    own = fitted(data, "sams_vae_mean_field", {"mask_logit": 5.0}, max_epochs=250, **more)
    base = fitted(data, "sams_vae_mean_field", {"mask_logit": 5.0}, max_epochs=50, learning_rates={"mask_logits": 1.0}, **more)
    assert 0 < (own.guide.mask_logits < 0).float().mean() < 1
    assert ((base.guide.mask_logits - 5).abs() < 100 * 3e-3 * 1.01).all() and (base.guide.mask_logits < 5).any()


def test_unknown_learning_rate_is_refused(data: pc.PerturbationData) -> None:
    with pytest.raises(ContractError, match="'mask_logit'"):
        fitted(data, "sams_vae_mean_field", learning_rates={"mask_logit": 2.0})
    fitted(data, "sams_vae_mean_field", learning_rates={"log_theta": 2.0}, max_epochs=1)
    fit = pc.fit(_Model(12), _Guide(12), data, max_epochs=1, learning_rates={"gain": 0.0})  # a constrained parameter, by its own name
    assert float(fit.model.gain) == 1


def test_nothing_to_train(data: pc.PerturbationData) -> None:
    model, guide = _Model(12), _Guide(12)
    for part in (model, guide):
        part.requires_grad_(False)
    with pytest.raises(ContractError, match="no"):
        pc.fit(model, guide, data, max_epochs=1)


def test_counts_on_normalised_data() -> None:
    normalised = pc.PerturbationData.from_anndata(pc.simulate.sams_screen(4, 3, 10, 12, n_control=10))
    for likelihood in ("negative_binomial", "poisson"):
        with pytest.raises(DataError, match=f"{likelihood}.*counts.*normalised"):
            fitted(normalised, settings={"likelihood": likelihood})
    assert np.isfinite(fitted(normalised, max_epochs=2).history["elbo"]).all()


class _BadModel(_Model):
    """A likelihood that loses its value after ``after`` calls."""

    def __init__(self, n_genes: int, after: int) -> None:
        super().__init__(n_genes)
        self.left = after

    def forward(self, batch: Batch) -> None:
        self.left -= 1
        super().forward(batch)
        pyro.factor("culprit", self.gain * (float("nan") if self.left < 0 else 1.0))


@pytest.mark.parametrize("after", [1, 3])
@pytest.mark.parametrize("batch_size", [100, 25])
def test_a_bound_that_is_not_finite_names_its_site(data: pc.PerturbationData, after: int, batch_size: int) -> None:
    """In the first epoch as later, with one step an epoch as with four (when the later steps have lost every site)."""
    with pytest.raises(ContractError, match=r"nan in epoch.*culprit") as caught:
        pc.fit(_BadModel(12, after), _Guide(12), data, max_epochs=5, batch_size=batch_size)
    assert re.findall(r"terms: (.*?)\)", str(caught.value)) == ["culprit"]


@pytest.mark.parametrize("name", ["sams_vae", "sams_vae_mean_field"])
def test_a_diverging_fit_is_refused_in_our_words(data: pc.PerturbationData, name: str) -> None:
    """A learning rate of 1e9, in the first epoch (when Pyro's own checks are on) as later."""
    with pytest.raises(ContractError, match="lower lr") as caught:
        fitted(data, name, lr=1e9, clip_norm=None, schedule="constant")
    assert "\n" not in str(caught.value)


# -- checkpoints -------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(data: pc.PerturbationData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "c.npz"
    fitted(data, checkpoint=path, callback=stop_at(10), validation=0.25)
    return path


def refused(path: Path, data: pc.PerturbationData, match: str, **more: Any) -> None:
    """A refusal in one sentence that leaves the file, and its directory, as they were."""
    before, files = path.read_bytes(), sorted(path.parent.iterdir())
    with pytest.raises(CheckpointError, match=match) as caught:
        fitted(data, checkpoint=path, resume=True, **more)
    assert path.read_bytes() == before and sorted(path.parent.iterdir()) == files
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("keep", [0, 1, 100, 0.5, -1])
def test_truncated_checkpoint(data: pc.PerturbationData, checkpoint: Path, tmp_path: Path, keep: float) -> None:
    whole = checkpoint.read_bytes()
    path = tmp_path / "c.npz"
    path.write_bytes(whole[: int(len(whole) * keep) if isinstance(keep, float) else keep])
    refused(path, data, "'c.npz'.*damaged")


def test_flipped_bytes(data: pc.PerturbationData, checkpoint: Path, tmp_path: Path) -> None:
    whole = bytearray(checkpoint.read_bytes())
    for i in range(2000, 2040):
        whole[i] ^= 255
    path = tmp_path / "c.npz"
    path.write_bytes(whole)
    refused(path, data, "'c.npz'.*damaged")


@pytest.mark.parametrize("kind", ["text", "npy", "npz", "directory"])
def test_a_file_that_is_no_checkpoint(data: pc.PerturbationData, tmp_path: Path, kind: str) -> None:
    path = tmp_path / ("c.npy" if kind == "npy" else "c.npz")
    if kind == "directory":
        path.mkdir()
        with pytest.raises(CheckpointError, match=r"c\.npz"):
            fitted(data, checkpoint=path, resume=True)
        return
    if kind == "text":
        path.write_text("epoch,elbo\n")
    else:
        (np.save if kind == "npy" else np.savez)(path, np.zeros(3))
    refused(path, data, "no file of this library")


def test_checkpoint_of_another_seed(data: pc.PerturbationData, checkpoint: Path) -> None:
    refused(checkpoint, data, "seed=0.*seed=1", seed=1)


@pytest.mark.parametrize(
    ("name", "settings"), [("sams_vae_mean_field", {}), ("sams_vae", {"n_latent": 4}), ("sams_vae", {"n_hidden": 9}), ("svae_plus", {})]
)
def test_checkpoint_of_another_model(data: pc.PerturbationData, checkpoint: Path, name: str, settings: dict[str, int]) -> None:
    """(``svae_plus`` has the very tensors of ``sams_vae``: only its name tells.)"""
    refused(checkpoint, data, "another model", name=name, settings=settings)


def no_pickle(path: Path) -> None:
    with np.load(path, allow_pickle=False) as archive:
        assert len(archive.files) > 0
        assert all(archive[k].dtype != object for k in archive.files)
    assert b"pickle" not in path.read_bytes() and b"torch" not in path.read_bytes()[:4]


def test_checkpoint_is_arrays_only(checkpoint: Path) -> None:
    no_pickle(checkpoint)
    assert [p.name for p in checkpoint.parent.iterdir()] == [checkpoint.name]


# -- saved runs --------------------------------------------------------------------------------------------------------------------


def bound_of(fit: pc.Fit, batch: Batch) -> float:
    torch.manual_seed(0)
    return float(fit.elbo(batch).detach())


@pytest.mark.parametrize(
    ("name", "objective"), [("sams_vae", "exact"), ("svae_plus", "exact"), ("cpa_vae", "exact"), ("sams_vae_correlated", "parity")]
)
def test_save_and_load(data: pc.PerturbationData, tmp_path: Path, name: str, objective: str) -> None:
    fit = fitted(data, name, max_epochs=2, objective=objective)
    fit.save(tmp_path / "run")
    loaded = pc.load(tmp_path / "run")
    assert same_state(state(fit), state(loaded)) and bound_of(fit, data.batch()) == bound_of(loaded, data.batch())
    pd.testing.assert_frame_equal(fit.history, loaded.history, check_exact=True)
    assert loaded.coords == fit.coords and loaded.settings == fit.settings and loaded.recipe == fit.recipe
    assert loaded.stopped == fit.stopped and (loaded.cells_per_perturbation == fit.cells_per_perturbation).all()
    assert torch.equal(loaded.reference.library_size, fit.reference.library_size) and loaded.reference.n_total == fit.reference.n_total
    assert not loaded.model.training and not loaded.guide.training
    for path in (tmp_path / "run").glob("*.npz"):
        no_pickle(path)
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_save_and_load_of_ones_own_pair(data: pc.PerturbationData, tmp_path: Path) -> None:
    fit = pc.fit(_Model(12), _Guide(12), data, max_epochs=2)
    fit.save(tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"_Model and _Guide.*pc\.load\(path, model, guide\)"):
        pc.load(tmp_path / "run")
    loaded = pc.load(tmp_path / "run", _Model(12), _Guide(12))
    assert same_state(state(fit), state(loaded)) and bound_of(fit, data.batch()) == bound_of(loaded, data.batch())
    with pytest.raises(CheckpointError, match="does not fit _Guide"):
        pc.load(tmp_path / "run", _Model(13), _Guide(13))


@pytest.fixture(scope="module")
def run(data: pc.PerturbationData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "run"
    fitted(data, max_epochs=2).save(path)
    return path


def one_sentence(error: pytest.ExceptionInfo[CheckpointError]) -> bool:
    return "\n" not in str(error.value) and "run" in str(error.value)


def test_load_of_what_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    for path in (tmp_path / "run", tmp_path / "no run"):
        with pytest.raises(CheckpointError, match=r"no run\.json") as error:
            pc.load(path)
        assert one_sentence(error)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, None])
@pytest.mark.parametrize("name", ["state.npz", "reference.npz", "run.json", "history.csv"])
def test_load_of_a_truncated_run(run: Path, tmp_path: Path, name: str, share: float | None) -> None:
    """One file cut short, or missing: a refusal in one sentence, or (where the file is not needed) the whole run; never half of it."""
    broken = tmp_path / "run"
    shutil.copytree(run, broken)
    whole = (broken / name).read_bytes()
    if share is None:
        (broken / name).unlink()
    else:
        (broken / name).write_bytes(whole[: int(share * len(whole))])
    try:
        loaded = pc.load(broken)
    except CheckpointError as refusal:
        assert "\n" not in str(refusal)
        return
    assert name == "history.csv"
    pd.testing.assert_frame_equal(loaded.history, pc.load(run).history)


def test_load_of_another_programs_run_json(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text(json.dumps({"name": "something else"}))
    with pytest.raises(CheckpointError):
        pc.load(tmp_path / "run")


def test_save_replaces_an_older_run(data: pc.PerturbationData, tmp_path: Path) -> None:
    for epochs in (1, 3):
        fitted(data, max_epochs=epochs).save(tmp_path / "run")
    assert len(pc.load(tmp_path / "run").history) == 3 and [p.name for p in tmp_path.iterdir()] == ["run"]


def test_save_over_something_else_is_refused(data: pc.PerturbationData, tmp_path: Path) -> None:
    fit = fitted(data, max_epochs=1)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("precious")
    (tmp_path / "file").write_text("precious")
    for name in ("thesis", "file"):
        with pytest.raises(CheckpointError, match=name):
            fit.save(tmp_path / name)
    assert (tmp_path / "thesis" / "chapter1.tex").read_text() == (tmp_path / "file").read_text() == "precious"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "thesis"]


def _full_disk(*_: Any, **__: Any) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("where", ["arrays", "json", "history", "move"])
def test_an_older_run_survives_a_failed_save(
    data: pc.PerturbationData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """The disk fills up at any moment of the save: the older run loads as before, and nothing is left lying about."""
    fitted(data, max_epochs=1).save(tmp_path / "run")
    newer = fitted(data, max_epochs=2)
    replace_, tries = Path.replace, []

    def replace(self: Path, target: Any) -> Path:
        if Path(target) == tmp_path / "run" and not tries:  # the first to take the run's place
            tries.append(self)
            _full_disk()
        return replace_(self, target)

    place = {"arrays": (np, "savez"), "json": (Path, "write_text"), "history": (pd.DataFrame, "to_csv"), "move": (Path, "replace")}[where]
    with monkeypatch.context() as patched:
        patched.setattr(*place, replace if where == "move" else _full_disk)
        with pytest.raises(OSError, match="No space"):
            newer.save(tmp_path / "run")
    assert len(pc.load(tmp_path / "run").history) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_an_older_checkpoint_survives_a_failed_one(data: pc.PerturbationData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "c.npz"
    fitted(data, max_epochs=4, checkpoint=path, callback=stop_at(2), checkpoint_every=2)
    before = path.read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", _full_disk)
        with pytest.raises(OSError, match="No space"):
            fitted(data, max_epochs=4, checkpoint=path, checkpoint_every=2, resume=True)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["c.npz"]


@pytest.mark.parametrize("name", ["sams_vae", "sccvae", "svae_plus"])
def test_a_gene_that_does_not_vary_has_a_finite_density(name):
    """Its noise would go to zero, and its density without bound, whatever the other genes say."""
    rng = np.random.default_rng(0)
    x = rng.normal(1.0, 0.5, (120, 6)).astype(np.float32)
    x[:, 2] = 0.7
    obs = pd.DataFrame({"perturbation": ["control"] * 60 + ["a"] * 30 + ["b"] * 30}, index=[f"c{i}" for i in range(120)])
    data = pc.PerturbationData.from_anndata(ad.AnnData(x, obs=obs), kind="normalised")
    fit = pc.fit(*pc.build(name, data, n_latent=2, seed=0), data, max_epochs=200, lr=0.05, seed=0, progress=False)
    sigma = fit.model.likelihood.sigma.detach()
    rms = float(x.var(0).mean() ** 0.5)
    assert 0.999 * 0.01 * rms <= float(sigma[2]) < 0.1 * rms
    assert float(sigma[[0, 1, 3, 4, 5]].min()) > 0.05
    most = -np.log(0.01 * rms) - 0.5 * np.log(2 * np.pi)  # of that gene, met exactly
    assert fit.history["elbo"].iloc[-1] < most  # the others have a negative log density
    assert fit.history["elbo"].iloc[-1] > -20


@pytest.mark.parametrize("name", ["sams_vae", "svae_plus", "sccvae"])
def test_the_same_seed_gives_the_same_fit_on_several_threads_with_batches(name):
    """Indexing a table of batches, as was done, gave another fit each time: its gradient is summed as threads arrive."""
    data = pc.PerturbationData.from_anndata(pc.demo_screen(), batch_key="batch")[:1500]
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        fits = [pc.fit(*pc.build(name, data, n_latent=5), data, max_epochs=1, progress=False) for _ in range(3)]
    finally:
        torch.set_num_threads(threads)
    first, *others = ([p for part in (f.model, f.guide) for p in part.state_dict().values()] for f in fits)
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))
