"""The non-linear latent causal diffusion: training against baselines and the truth of simulated screens, and every kind of question."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import pyrocausal as pc
from pyrocausal.data import PerturbationData
from pyrocausal.distributions import NegativeBinomial
from pyrocausal.errors import InterventionError, PyrocausalError
from pyrocausal.fit import Fit
from pyrocausal.guides.lcd import LCD as Guide
from pyrocausal.models.lcd import LCD
from pyrocausal.simulate_sde import linear_sde_screen

torch.set_num_threads(1)
SCREEN = {"n_genes": 12, "n_perturbed": 4, "degree": 3, "cells_per_perturbation": 200, "n_control": 400, "doubles": 2, "seed": 0}


def pair(data: PerturbationData, **settings: Any) -> tuple[LCD, Guide]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        width = {"n_hidden": 64, "n_embed": 16}
        return LCD(*data.sizes, **{**width, **settings}), Guide(*data.sizes, **settings)


@pytest.fixture(scope="module")
def counts() -> tuple[Fit, PerturbationData, PerturbationData, Any]:
    """A fit by the joint bound, its training and held-out cells, and the screen."""
    adata = linear_sde_screen(**SCREEN, counts=True, zero_inflation=0.1, library_size=400.0)
    train, held = PerturbationData.from_anndata(adata).split("cells", test=0.25, seed=0)
    fit = pc.fit(*pair(train), train, max_epochs=60, batch_size=128, validation=held, patience=None, progress=False)
    return fit, train, held, adata


@pytest.fixture(scope="module")
def states() -> tuple[Fit, PerturbationData, Any]:
    """A fit to states that are measured without noise."""
    adata = linear_sde_screen(**SCREEN)
    data = PerturbationData.from_anndata(adata)
    model, guide = pair(data, likelihood="gaussian")
    fit = pc.fit(model, guide, data, max_epochs=120, batch_size=256, progress=False, lr=5e-3)
    return fit, data, adata


def independent_genes(train: PerturbationData, held: PerturbationData) -> float:
    """Held-out log-likelihood per cell of a negative binomial for each gene, mean in proportion to the library, by maximum likelihood."""
    tensors = [(torch.tensor(d.dense()), torch.tensor(d.library_size.astype(np.float32))[:, None]) for d in (train, held)]
    x, library = tensors[0]
    log_mu, log_theta = (x / library).mean(0).log().requires_grad_(), torch.zeros(x.shape[1], requires_grad=True)
    optimiser = torch.optim.Adam([log_mu, log_theta], lr=0.05)
    for _ in range(600):
        loss = -NegativeBinomial(library * log_mu.exp(), log_theta.exp()).log_prob(x).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    x, library = tensors[1]
    return float(NegativeBinomial(library * log_mu.exp(), log_theta.exp()).log_prob(x).mean().detach())


def test_joint_bound_rises_and_beats_independent_genes(counts: Any) -> None:
    """The held-out bound, which is below the log-likelihood, beats that of genes without states and perturbations by 2 nats per cell."""
    fit, train, held, _ = counts
    full = fit.history[fit.history["kl_weight"] == 1]
    assert fit.history["validation"].iloc[-1] > fit.history["validation"].iloc[0] + 50
    assert full["elbo"].iloc[-1] > full["elbo"].iloc[0]
    assert fit.history["validation"].iloc[-1] > independent_genes(train, held) + 2


def test_effects_are_those_of_the_cells(counts: Any) -> None:
    """Singles and pairs: correlation with the change of pseudo-bulk at least .97, relative error at most .25, in log1p of 10,000."""
    fit, train, _, _ = counts
    perturbed = [c for c in train.conditions if c != "control"]
    assert sum("+" in c for c in perturbed) == 2
    result = pc.effects(fit, perturbed, draws=20)
    ours = result["effect"].mean("draw").to_numpy()
    rate = train.dense() / train.library_size[:, None]

    def bulk(rows: np.ndarray) -> np.ndarray:
        return np.log1p(1e4 * rate[rows].mean(0))

    theirs = np.array([bulk(train.labels == c) - bulk(train.is_control) for c in perturbed])
    assert np.corrcoef(ours.ravel(), theirs.ravel())[0, 1] > 0.97
    assert np.linalg.norm(ours - theirs) / np.linalg.norm(theirs) < 0.25
    half = pc.effects(fit, pc.perturb(perturbed[0].split("+")[0], dose=0.5), draws=5)["effect"].mean("draw").to_numpy()
    full = result["effect"].sel(intervention=perturbed[0].split("+")[0]).mean("draw").to_numpy()
    assert 0 < np.linalg.norm(half) < np.linalg.norm(full)


def test_contract_and_export(counts: Any) -> None:
    fit, _, held, _ = counts
    report = pc.check_model(fit.model, fit.guide, held)
    assert report and report.about("warning") == []
    assert any("one pass" in note for note in report.about("note"))
    export = pc.to_inference_data(fit, draws=5, cells=held[:20], predictive_draws=3, particles=2)
    assert export["posterior_predictive"]["x"].shape[-2:] == (20, 12)
    assert np.isfinite(export["log_likelihood"]["x"].to_numpy()).all()


def test_counterfactual_cells(counts: Any) -> None:
    """The factual action gives the counts back; perturbed controls have the counts of perturbed cells on average."""
    fit, train, _, _ = counts
    name = train.perturbations[0]
    treated = train.select(name)[:30]
    same = pc.counterfactual(fit, treated, name, draws=2, units="counts", noise="shared")
    assert np.array_equal(same["expression"].to_numpy()[0, 0], treated.dense())
    control = train.select("control")
    moved = pc.counterfactual(fit, control, name, draws=2, units="rate", noise="mean")["expression"].mean(("draw", "cell"))
    seen = (train.select(name).dense() / train.select(name).library_size[:, None]).mean(0)
    before = (control.dense() / control.library_size[:, None]).mean(0)
    assert np.linalg.norm(moved.to_numpy()[0] - seen) < 0.3 * np.linalg.norm(before - seen)


def test_what_a_score_cannot_answer_is_refused(counts: Any) -> None:
    fit, train, _, _ = counts
    for act in (pc.cut(train.genes[0], train.genes[1]), pc.clamp(train.genes[0], 1.0)):
        with pytest.raises(InterventionError):
            pc.effects(fit, act, draws=2)


def test_saved_run_answers_alike(counts: Any, tmp_path: Path) -> None:
    fit, train, _, _ = counts
    fit.save(tmp_path / "run")
    again = pc.load(tmp_path / "run", *pair(train))
    name = train.perturbations[0]
    a, b = (pc.effects(f, name, draws=3)["effect"].to_numpy() for f in (fit, again))
    assert np.array_equal(a, b)


def test_same_seed_same_fit() -> None:
    adata = linear_sde_screen(6, 2, degree=2, cells_per_perturbation=20, counts=True, seed=1)
    data = PerturbationData.from_anndata(adata)
    runs = [pc.fit(*pair(data), data, max_epochs=2, batch_size=32, progress=False).history["elbo"].tolist() for _ in range(2)]
    assert runs[0] == runs[1]


# -- states measured without noise -------------------------------------------------------------------------------------------------


def test_states_mean_shift_and_limit(states: Any) -> None:
    """Effects and noise-free limits against the exact means: relative error of all shifts at most .1, and of the limits .15."""
    fit, _, adata = states
    truth = adata.uns["truth"]
    names, exact = list(truth["conditions"][1:]), truth["means"][1:] - truth["means"][0]
    effect = pc.effects(fit, names, draws=2)["effect"].mean("draw").to_numpy()
    assert np.linalg.norm(effect - exact) / np.linalg.norm(exact) < 0.1
    where = {name: i for i, name in enumerate(fit.coords["perturbation"])}
    dose = torch.zeros(1 + len(names), len(where))
    for row, label in enumerate(names):
        for part in label.split("+"):
            dose[row + 1, where[part]] = 1
    limit = fit.model.limit(dose, 100).numpy()
    assert np.linalg.norm(limit - truth["means"]) / np.linalg.norm(truth["means"]) < 0.15


def test_states_bound_is_near_the_exact_likelihood(states: Any) -> None:
    """The bound never exceeds the exact log-likelihood of the true law by more than what 1,600 cells let a model overfit."""
    fit, data, adata = states
    truth = adata.uns["truth"]
    mean = dict(zip(truth["conditions"], truth["means"], strict=True))
    loc = torch.tensor(np.array([mean["+".join(sorted(label.split("+")))] for label in data.labels]))
    law = torch.distributions.MultivariateNormal(loc, torch.tensor(truth["covariance"]))
    exact = float(law.log_prob(torch.tensor(data.dense().astype(np.float64))).mean())
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        batch = data.batch()
        bound = float(torch.stack([fit.model.law_of_states(batch.dose).log_prob(batch.x).mean() for _ in range(20)]).mean())
    assert exact - 2 < bound < exact + 1


def test_states_jacobian_is_the_precision(states: Any) -> None:
    """The slope of the score at the control mean is minus the precision matrix: correlation off the diagonal at least .8."""
    fit, _, adata = states
    truth = adata.uns["truth"]
    table = pc.clipr(fit, jacobian=True)
    assert table.source == "drift"
    precision, off = np.linalg.inv(truth["covariance"]), ~np.eye(12, dtype=bool)
    slope = table.effects.mean("draw").to_numpy()
    assert np.corrcoef(slope[off], -precision[off])[0, 1] > 0.8


def test_arguments() -> None:
    with pytest.raises(PyrocausalError, match="likelihood='normal' is unknown"):
        LCD(3, 2, likelihood="normal")  # type: ignore[arg-type]
    assert LCD.gradient_field is True
