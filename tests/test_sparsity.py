"""Sparse tables: the closed form against enumeration, straight-through gradients against exact ones, the rotation, the running table."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.stats import multivariate_normal
from torch import Tensor
from torch.distributions import Beta

import pyrocausal as pc
from pyrocausal.distributions import StraightThroughBernoulli
from pyrocausal.errors import PyrocausalError
from pyrocausal.guides.svae_plus import BetaBernoulliTable
from pyrocausal.sparsity import PRIOR, SpikeSlabTable, sparse_rotation, spike_slab_update

torch.set_num_threads(1)
F64 = torch.float64
RHO, SLAB = 0.2, 3.0
LOG_ODDS = math.log(RHO / (1 - RHO))


@pytest.fixture(autouse=True)
def _own_random_state():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def world(coupled: bool, n_perturbations: int = 4, n_programs: int = 3, n: int = 24, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Doses [n, P] and programs [n, D] with ``u = dose @ (mask * effect) + noise``; some weak effects, so that no posterior is 0 or 1."""
    rng = np.random.default_rng(seed)
    dose = np.zeros((n, n_perturbations))
    for i in range(n):
        dose[i, rng.choice(n_perturbations, rng.integers(1, 4) if coupled else 1, replace=False)] = 1
    dose[:3] = 0
    table = (rng.random((n_perturbations, n_programs)) < 0.5) * rng.normal(0, 1.0, (n_perturbations, n_programs))
    u = dose @ table + rng.standard_normal((n, n_programs))
    return torch.tensor(dose, dtype=F64), torch.tensor(u, dtype=F64)


def enumerate_masks(dose: Tensor, u: Tensor, noise_variance: float = 1.0) -> dict[str, np.ndarray]:
    """The exact posterior, program by program: all 2^P masks, the Gaussian effects integrated out over the cells' own covariance."""
    d, n_perturbations = dose.numpy(), dose.shape[1]
    shape = (n_perturbations, u.shape[1])
    out = {k: np.zeros(shape) for k in ("probs", "loc", "scale")} | {"evidence": np.zeros(u.shape[1])}
    masks = np.array(list(itertools.product([0, 1], repeat=n_perturbations)))
    for j in range(u.shape[1]):
        y = u[:, j].numpy()
        log_joint = np.array([
            m.sum() * math.log(RHO)
            + (1 - m).sum() * math.log(1 - RHO)
            + multivariate_normal.logpdf(y, cov=noise_variance * np.eye(len(y)) + SLAB**2 * (d * m) @ d.T)
            for m in masks
        ])  # fmt: skip
        out["evidence"][j] = np.logaddexp.reduce(log_joint)
        posterior = np.exp(log_joint - out["evidence"][j])
        for t in range(n_perturbations):
            on = masks[:, t] == 1
            out["probs"][t, j] = posterior[on].sum()
            first = second = 0.0
            for m, p in zip(masks[on], posterior[on] / posterior[on].sum(), strict=True):
                covariance = SLAB**2 * np.eye(n_perturbations) - SLAB**4 * (d * m).T @ np.linalg.solve(
                    noise_variance * np.eye(len(y)) + SLAB**2 * (d * m) @ d.T, d * m
                )
                mean = covariance @ (d * m).T @ y / noise_variance
                first, second = first + p * mean[t], second + p * (covariance[t, t] + mean[t] ** 2)
            out["loc"][t, j], out["scale"][t, j] = first, math.sqrt(second - first**2)
    return out


def update(dose: Tensor, u: Tensor, probs: Tensor, loc: Tensor, **more: object) -> tuple[Tensor, Tensor, Tensor]:
    return spike_slab_update(dose.T @ dose, dose.T @ u, torch.tensor(LOG_ODDS, dtype=F64), SLAB, probs, loc, **more)  # type: ignore[arg-type]


def start(dose: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    shape = (dose.shape[1], u.shape[1])
    return torch.full(shape, 0.5, dtype=F64), torch.zeros(shape, dtype=F64)


@pytest.mark.parametrize(("s", "low", "high"), [(0.6, 1.0, 2.1), (3.0, 0.85, 1.15)])
@pytest.mark.parametrize("seed", range(3))
def test_the_prior_is_learned_from_the_table(seed: int, s: float, low: float, high: float) -> None:
    """60 perturbations of 100 cells, 15 % of 12 programs targeted: 108 effects, so that s is known to 7 % at best (two of it allowed).
    Where s is small it is too large: of 108 effects some 40 are larger than what an untargeted program shows, and five entries say 3:
    ``((40 x .7^2 + 5 x 3^2) / 45)^1/2`` is twice .6."""
    rng = np.random.default_rng(seed)
    mask = rng.random((60, 12)) < 0.15
    mean = mask * rng.normal(0.0, s, mask.shape) + rng.normal(0.0, 0.1, mask.shape)
    for rho in (0.1, None):
        table = SpikeSlabTable(61, 12, rho, None).double()
        table.set_gram(torch.diag(torch.tensor([100.0] * 60 + [0.0], dtype=F64)))  # the last has no cells
        table.cross[:60] = 100 * torch.as_tensor(mean)
        table.update()
        assert float(table.effect_scale) == PRIOR[1]
        table.sparse()
        assert low < float(table.effect_scale) / s < high
        assert float(table.mask_probability) == pytest.approx(0.1) if rho else 0.05 < float(table.mask_probability) < 0.2
        learned = float(table.effect_scale)
        table.observe(torch.eye(61, dtype=F64)[:5], torch.randn(5, 12, dtype=F64))
        table.sparse()  # after a later turn
        assert float(table.effect_scale) == learned


def test_the_model_has_the_prior_that_its_guide_learned() -> None:
    adata = pc.simulate.svae_screen(n_latent=4, n_genes=40, n_perturbations=12, cells_per_perturbation=40, n_control=20, seed=0)
    data = pc.PerturbationData.from_anndata(adata)
    for settings in ({}, {"effect_scale": 2.0}, {"mask_probability": None}):
        model, guide = pc.build("sams_vae", data, n_latent=5, seed=0, **settings)
        fit = pc.fit(model, guide, data, max_epochs=4, seed=0, progress=False)
        assert torch.equal(fit.model.effect_scale, guide.table.effect_scale)
        assert torch.equal(fit.model.mask_probability, guide.table.mask_probability)
        assert (float(model.effect_scale) == PRIOR[1]) is False
        assert (float(model.effect_scale) == 2.0) is ("effect_scale" in settings)
        assert (float(model.mask_probability) == pytest.approx(0.1)) is ("mask_probability" not in settings)


def test_a_prior_that_differs_between_model_and_guide_is_refused() -> None:
    adata = pc.simulate.svae_screen(n_latent=4, n_genes=20, n_perturbations=6, cells_per_perturbation=10, n_control=5, seed=0)
    data = pc.PerturbationData.from_anndata(adata)
    for ours, theirs in (({}, {"effect_scale": 2.0}), ({"mask_probability": 0.3}, {})):
        model, guide = pc.models.SAMSVAE(20, 6, 4, **ours), pc.guides.SAMSVAE(20, 6, 4, **theirs)
        with pytest.raises(PyrocausalError, match="give both the same"):
            pc.fit(model, guide, data, max_epochs=1, progress=False)
    with pytest.raises(PyrocausalError, match="between 0 and 1"):
        pc.build("sams_vae", data, mask_probability=1.0)


# -- the linear-Gaussian oracle (dossier, check 3) ---------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("coupled", [False, True])
def test_singles_are_the_exact_posterior(coupled: bool, seed: int) -> None:
    """The vectorised pass and the pass over perturbations are both exact when no cell carries two."""
    dose, u = world(coupled=False, seed=seed)
    logits, loc, scale = update(dose, u, *start(dose, u), coupled=coupled)
    exact = enumerate_masks(dose, u)
    assert ((exact["probs"] > 0.02) & (exact["probs"] < 0.98)).sum() > 3 and exact["probs"].max() > 0.5
    np.testing.assert_allclose(logits.sigmoid().numpy(), exact["probs"], atol=1e-6)
    np.testing.assert_allclose(loc.numpy(), exact["loc"], atol=1e-6)
    np.testing.assert_allclose(scale.numpy(), exact["scale"], atol=1e-6)


@pytest.mark.parametrize("trust", [0.3, 0.05])
def test_trust_is_a_noisier_likelihood(trust: float) -> None:
    """A Gaussian likelihood to the power ``trust`` is one of variance ``1 / trust``."""
    dose, u = world(coupled=False)
    logits, loc, scale = update(dose, u, *start(dose, u), trust=trust, coupled=False)
    exact = enumerate_masks(dose, u, noise_variance=1 / trust)
    np.testing.assert_allclose(logits.sigmoid().numpy(), exact["probs"], atol=1e-6)
    np.testing.assert_allclose(loc.numpy(), exact["loc"], atol=1e-6)
    np.testing.assert_allclose(scale.numpy(), exact["scale"], atol=1e-6)


def test_doses_other_than_one() -> None:
    dose, u = world(coupled=False)
    dose = dose * torch.tensor([0.5, 1.0, 2.0, 0.7], dtype=F64)
    logits, loc, _ = update(dose, u, *start(dose, u), coupled=False)
    exact = enumerate_masks(dose, u)
    np.testing.assert_allclose(logits.sigmoid().numpy(), exact["probs"], atol=1e-6)
    np.testing.assert_allclose(loc.numpy(), exact["loc"], atol=1e-6)


def bound(dose: Tensor, u: Tensor, logits: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
    """The evidence lower bound of ``q(m) q(e | m)`` (off entries follow their prior), per program, in closed form."""
    pi = logits.sigmoid()
    w = pi * loc
    spread = pi * (loc**2 + scale**2) - w**2  # Var of mask * effect
    residual = ((u - dose @ w) ** 2).sum(0) + (dose.square().sum(0)[:, None] * spread).sum(0)
    likelihood = -0.5 * residual - 0.5 * len(u) * math.log(2 * math.pi)
    slab = math.log(SLAB) - scale.log() + (loc**2 + scale**2) / (2 * SLAB**2) - 0.5
    kl = torch.xlogy(pi, pi / RHO) + torch.xlogy(1 - pi, (1 - pi) / (1 - RHO)) + pi * slab
    return likelihood - kl.sum(0)


@pytest.mark.parametrize("seed", range(4))
def test_coordinate_ascent_climbs_to_a_fixed_point_below_the_evidence(seed: int) -> None:
    dose, u = world(coupled=True, seed=seed)
    probs, loc = start(dose, u)
    logits, loc, scale = update(dose, u, probs, loc)
    values = [bound(dose, u, logits, loc, scale)]
    for _ in range(300):
        logits, loc, scale = update(dose, u, logits.sigmoid(), loc)
        values.append(bound(dose, u, logits, loc, scale))
    climb = torch.stack(values)
    assert (climb.diff(dim=0) >= -1e-9).all() and (climb[-1] - climb[0]).max() > 1e-3
    again = update(dose, u, logits.sigmoid(), loc)
    for a, b in zip(again, (logits, loc, scale), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    evidence = torch.tensor(enumerate_masks(dose, u)["evidence"])
    assert (climb[-1] <= evidence + 1e-9).all()


def test_the_bound_is_the_evidence_where_the_update_is_exact() -> None:
    """Checks the two oracles of this file against each other."""
    dose, u = world(coupled=False)
    posterior = update(dose, u, *start(dose, u), coupled=False)
    np.testing.assert_allclose(bound(dose, u, *posterior).numpy(), enumerate_masks(dose, u)["evidence"], atol=1e-8)


def test_fixed_point_is_stationary() -> None:
    """At the fixed point the gradient of the bound in every variational parameter is zero."""
    dose, u = world(coupled=True, seed=1)
    logits, loc, scale = update(dose, u, *start(dose, u), sweeps=500)
    parameters = [p.clone().requires_grad_() for p in (logits, loc, scale)]
    for grad in torch.autograd.grad(bound(dose, u, *parameters).sum(), parameters):
        assert float(grad.abs().max()) < 1e-8


def test_update_leaves_its_arguments_alone() -> None:
    dose, u = world(coupled=True)
    probs, loc = start(dose, u)
    before = probs.clone(), loc.clone()
    update(dose, u, probs, loc, sweeps=3)
    assert torch.equal(probs, before[0]) and torch.equal(loc, before[1])


def test_beta_bernoulli_update_is_the_optimum() -> None:
    """``q(rho) = Beta(1 + pi, lambda + 1 - pi)`` is stationary for the bound's terms in rho, and its mean log odds are the prior's."""
    table = BetaBernoulliTable(3, 2, sparsity=6.0, effect_scale=3.0).double()
    table.logits.copy_(torch.randn(3, 2))
    pi = table.logits.sigmoid()
    a, b = (p.clone().requires_grad_() for p in table.beta())
    q = Beta(a, b)
    log_rho, log_rest = torch.digamma(a) - torch.digamma(a + b), torch.digamma(b) - torch.digamma(a + b)
    terms = math.log(6.0) + 5.0 * log_rest + pi * log_rho + (1 - pi) * log_rest + q.entropy()
    for grad in torch.autograd.grad(terms.sum(), (a, b)):
        assert float(grad.abs().max()) < 1e-10
    torch.testing.assert_close(table.prior_log_odds(), (log_rho - log_rest).detach())


# -- straight-through gradients -----------------------------------------------------------------------------------------------------


def logistic(x: float) -> float:
    e = math.exp(-abs(x))
    return e / (1 + e) ** 2


def overlap(logit: float, temperature: float = 1.0, half: bool = False) -> float:
    """E[d soft / d logit], and with ``half`` E[mask d soft / d logit]: integrals over the logistic noise."""

    def integrand(y: float) -> float:
        return logistic(y / temperature) / temperature * logistic(y - logit)

    width = 40 * temperature
    return quad(integrand, 0, width)[0] + (0.0 if half else quad(integrand, -width, 0)[0])


def straight_through(logits: Tensor, loss: object, n: int, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Mean gradient of ``loss(mask)`` over n draws, and its standard error, [K]."""
    many = logits.expand(n, -1).clone().requires_grad_()
    masks = StraightThroughBernoulli(logits=many, temperature=temperature).rsample()
    grads = torch.autograd.grad(loss(masks).sum(), many)[0]  # type: ignore[operator]
    return grads.mean(0), grads.std(0) / math.sqrt(n)


LOGITS = torch.tensor([-4.0, -2.0, -0.5, 0.0, 1.0, 3.0], dtype=F64)
WEIGHTS = torch.tensor([1.0, -2.0, 0.7, 1.5, -1.0, 2.0], dtype=F64)


def test_straight_through_of_a_linear_loss() -> None:
    """The exact gradient is ``w p (1 - p)``. At temperature 1 the estimator's mean is ``w c(l)`` with the overlap c of two logistic
    densities: the sign is right, the size is not, even here: c / p(1-p) = 2/3 at l = 0 and grows with |l| (2.31 at 4).
    All 6 means within 4 standard errors of w c(l); false-alarm rate 4e-4 of a fixed seed."""
    exact = WEIGHTS * LOGITS.sigmoid() * (1 - LOGITS.sigmoid())
    mean, error = straight_through(LOGITS, lambda m: m @ WEIGHTS, 200_000)
    expected = WEIGHTS * torch.tensor([overlap(float(v)) for v in LOGITS], dtype=F64)
    assert ((mean - expected).abs() < 4 * error).all()
    assert (mean.sign() == exact.sign()).all()
    ratio = expected / exact
    assert abs(float(ratio[3]) - 2 / 3) < 1e-6 and abs(float(ratio[0]) - 2.3126) < 1e-3
    assert ((mean - exact).abs() > 3 * error)[[0, 3, 4]].all()  # so "unbiased within 3 s.e." is false at temperature 1


def test_straight_through_of_a_linear_loss_at_low_temperature() -> None:
    """The bias goes with the temperature squared: below 2 % at 0.1, below what 20,000 draws can tell (3 s.e., 6 comparisons, 1.6 %)."""
    exact = WEIGHTS * LOGITS.sigmoid() * (1 - LOGITS.sigmoid())
    mean, error = straight_through(LOGITS, lambda m: m @ WEIGHTS, 20_000, temperature=0.1)
    assert ((mean - exact).abs() < 3 * error).all()
    ratio = torch.tensor([overlap(float(v), 0.1) for v in LOGITS], dtype=F64) / (LOGITS.sigmoid() * (1 - LOGITS.sigmoid()))
    assert float((ratio - 1).abs().max()) < 0.02


def quadratic(masks: Tensor) -> Tensor:
    return (masks @ WEIGHTS - 0.8) ** 2


def enumerated(logits: Tensor) -> Tensor:
    """Exact gradient of E[quadratic(mask)] over all 64 masks."""
    logits = logits.clone().requires_grad_()
    masks = torch.tensor(list(itertools.product([0.0, 1.0], repeat=len(logits))), dtype=F64)
    p = logits.sigmoid()
    mass = (masks * p + (1 - masks) * (1 - p)).prod(1)
    return torch.autograd.grad((mass * quadratic(masks)).sum(), logits)[0]


def test_straight_through_of_a_quadratic_loss() -> None:
    """As for the linear loss, and the square of an entry's own mask is differentiated at the mask (2 m w^2) where the exact gradient has
    the difference (w^2): the direction is bent too. Measured: cosine with the exact gradient 0.884, length ratio 0.818."""
    exact = enumerated(LOGITS)
    mean, error = straight_through(LOGITS, quadratic, 200_000)
    p = LOGITS.sigmoid()
    others = (p @ WEIGHTS - p * WEIGHTS) - 0.8
    whole = torch.tensor([overlap(float(v)) for v in LOGITS], dtype=F64)
    own = torch.tensor([overlap(float(v), half=True) for v in LOGITS], dtype=F64)
    expected = 2 * WEIGHTS * (others * whole + WEIGHTS * own)
    assert ((mean - expected).abs() < 4 * error).all()
    cosine = float(torch.nn.functional.cosine_similarity(mean, exact, dim=0))
    length = float(mean.norm() / exact.norm())
    print(f"\nstraight-through, quadratic: cosine {cosine:.3f}, length ratio {length:.3f}, mean {mean.tolist()}, exact {exact.tolist()}")
    assert abs(cosine - 0.884) < 0.01 and abs(length - 0.818) < 0.01  # what this estimator costs, on record
    assert ((mean - exact).abs() > 3 * error).all()  # biased in every entry


# -- the rotation ------------------------------------------------------------------------------------------------------------------


def sparse_table(seed: int, n_perturbations: int = 100, n_programs: int = 15) -> tuple[Tensor, Tensor]:
    """A table with 2 targets per row and noise .05, turned by a random rotation: (turned table, rotation)."""
    rng = np.random.default_rng(seed)
    table = np.zeros((n_perturbations, n_programs))
    for row in table:
        row[rng.choice(n_programs, 2, replace=False)] = rng.normal(5, 0.5, 2) * rng.choice([-1, 1], 2)
    table += rng.normal(0, 0.05, table.shape)
    rotation, _ = np.linalg.qr(rng.standard_normal((n_programs, n_programs)))
    return torch.tensor(table @ rotation), torch.tensor(rotation)


@pytest.mark.parametrize("seed", range(4))
def test_rotation_is_found(seed: int) -> None:
    table, rotation = sparse_table(seed)
    found = sparse_rotation(table)
    torch.testing.assert_close(found.T @ found, torch.eye(15, dtype=F64), rtol=0, atol=1e-10)
    overlap_with_truth = (rotation @ found).abs()
    assert sorted(overlap_with_truth.argmax(0).tolist()) == list(range(15))
    assert float(overlap_with_truth.max(0).values.min()) > 0.999


def test_rotation_is_deterministic() -> None:
    table, _ = sparse_table(9, 40, 6)
    state = torch.get_rng_state()
    first = sparse_rotation(table, starts=2, steps=50)
    torch.randn(3)
    assert torch.equal(first, sparse_rotation(table, starts=2, steps=50))
    assert not torch.equal(first, sparse_rotation(table, starts=2, steps=50, seed=1))
    torch.set_rng_state(state)
    sparse_rotation(table, starts=1, steps=5)
    assert torch.equal(state, torch.get_rng_state())


def test_rotation_under_no_grad() -> None:
    table, _ = sparse_table(9, 40, 6)
    with torch.no_grad():
        assert torch.equal(sparse_rotation(table, 1, 20), sparse_rotation(table, 1, 20))


@pytest.mark.parametrize("table", [torch.zeros(5, 4), torch.eye(3, 6), torch.ones(2, 4), torch.full((4, 4), 1e-12)])
def test_rotation_of_poor_tables(table: Tensor) -> None:
    """All zero, fewer perturbations than programs, rank one, tiny: still an orthogonal matrix."""
    found = sparse_rotation(table, starts=2, steps=20)
    torch.testing.assert_close(found.T @ found, torch.eye(table.shape[1]), rtol=0, atol=1e-5)


# -- the table, fed by minibatches --------------------------------------------------------------------------------------------------


def epochs(table: SpikeSlabTable, dose: Tensor, u: Tensor, n: int, batch_size: int, seed: int = 0) -> list[Tensor]:
    """Feed n epochs; the statistics after each."""
    rng = np.random.default_rng(seed)
    after = []
    for _ in range(n):
        for part in np.array_split(rng.permutation(len(u)), -(-len(u) // batch_size)):
            table.observe(dose[part], u[part])
        after.append(table.cross.clone())
    return after


def new_table(dose: Tensor, n_programs: int, robust: bool = False) -> SpikeSlabTable:
    table = SpikeSlabTable(dose.shape[1], n_programs, RHO, SLAB, robust=robust).double()
    table.set_gram(dose.T @ dose)
    return table


@pytest.mark.parametrize("coupled", [False, True])
def test_full_batch_gives_the_statistics_at_once(coupled: bool) -> None:
    dose, u = world(coupled, n=200)
    table = new_table(dose, 3)
    table.observe(dose, u)
    torch.testing.assert_close(table.cross, dose.T @ u, rtol=1e-10, atol=1e-10)
    assert table.coupled is coupled


@pytest.mark.parametrize("coupled", [False, True])
def test_full_batch_posterior_is_the_oracles(coupled: bool) -> None:
    """Not robust, all cells in one batch: the table's posterior is the exact one (singles), or the fixed point (combinations)."""
    dose, u = world(coupled)
    table = new_table(dose, 3)
    table.observe(dose, u)
    table.sparse()
    table.update(sweeps=300)
    if coupled:
        logits, loc, scale = update(dose, u, torch.full_like(table.loc, 1.0), table.means(), sweeps=500)
    else:
        logits, loc, scale = update(dose, u, *start(dose, u), coupled=False)
        np.testing.assert_allclose(table.logits.sigmoid().numpy(), enumerate_masks(dose, u)["probs"], atol=1e-6)
    for ours, theirs in zip((table.logits, table.loc, table.scale), (logits, loc, scale), strict=True):
        torch.testing.assert_close(ours, theirs.clamp(-12, 12) if theirs is logits else theirs, rtol=1e-6, atol=1e-6)


def test_minibatches_converge_without_noise() -> None:
    """Programs that are the same in every cell of a perturbation: exact from the first epoch on, whatever the batches."""
    dose, _ = world(False, n=200)
    u = dose @ torch.randn(4, 3, dtype=F64)
    for cross in epochs(new_table(dose, 3), dose, u, n=3, batch_size=16):
        torch.testing.assert_close(cross, dose.T @ u, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("coupled", [False, True])
def test_minibatches_converge_to_the_statistics_of_all_cells(coupled: bool) -> None:
    """Over 300 epochs the statistics scatter about the full-data ones: the mean within 4 s.e. of 12 (block of 5 epochs: dependence), and
    each epoch's distance, in cells' means, below one standard error of those means (that is what the sampling of cells costs anyway)."""
    dose, u = world(coupled, n=300)
    exact, n_t = dose.T @ u, (dose.T @ dose).diagonal()[:, None]
    after = torch.stack(epochs(new_table(dose, 3), dose, u, n=300, batch_size=32)[20:])
    blocks = after.reshape(56, 5, 4, 3).mean(1)
    error = blocks.std(0) / math.sqrt(len(blocks))
    assert ((blocks.mean(0) - exact).abs() < 4 * error).all()
    distance = ((after - exact) / n_t).square().mean().sqrt()
    within = torch.stack([(u - dose @ torch.linalg.lstsq(dose, u).solution).std(0)] * 4) / n_t.sqrt()
    assert float(distance) < float(within.square().mean().sqrt())


def test_table_forgets_an_old_encoder() -> None:
    """When the programs change under it, three epochs bring it within 2 % of the new statistics (it forgets e^-2 an epoch)."""
    dose, _ = world(False, n=300)
    old, new = dose @ torch.randn(4, 3, dtype=F64), dose @ torch.randn(4, 3, dtype=F64)
    table = new_table(dose, 3)
    epochs(table, dose, old, n=10, batch_size=32)
    after = epochs(table, dose, new, n=3, batch_size=32)[-1]
    assert float((after - dose.T @ new).norm() / (dose.T @ (new - old)).norm()) < 0.02


def test_perturbation_without_cells_keeps_its_prior() -> None:
    dose, u = world(False)
    dose = torch.cat([dose, torch.zeros(len(dose), 1, dtype=F64)], 1)
    table = new_table(dose, 3)
    epochs(table, dose, u, n=2, batch_size=8)
    table.sparse()
    torch.testing.assert_close(table.logits[-1], torch.full((3,), LOG_ODDS, dtype=F64), rtol=1e-9, atol=1e-9)
    assert (table.loc[-1] == 0).all() and torch.allclose(table.scale[-1], torch.tensor(SLAB, dtype=F64))


@pytest.mark.parametrize("robust", [False, True])
def test_mask_is_held_on_until_sparse(robust: bool) -> None:
    dose, u = world(False)
    table = new_table(dose, 3, robust)
    table.observe(dose, u)
    assert (table.logits == table.ON).all()
    table.sparse()
    assert (table.logits < table.ON).any()


@pytest.mark.parametrize("robust", [False, True])
def test_targets_are_found(robust: bool) -> None:
    """100 perturbations of 100 cells, 2 targets each, effects of 1.5 basal standard deviations (15 standard errors): no target is missed.
    Of the 800 other entries the exact posterior lets through those beyond 3.1 standard errors, 0.2 %: at most 8 (5 times as many)."""
    rng = np.random.default_rng(0)
    truth = np.zeros((100, 10))
    for row in truth:
        row[rng.choice(10, 2, replace=False)] = 1.5 * rng.choice([-1, 1], 2)
    dose = torch.tensor(np.eye(100).repeat(100, 0))
    u = dose @ torch.tensor(truth) + torch.tensor(rng.standard_normal((10_000, 10)))
    table = new_table(dose, 10, robust)
    table.observe(dose, u)
    table.sparse()
    found = (table.logits > 0).numpy()
    assert found[truth != 0].all() and found[truth == 0].sum() <= 8


def test_loading_a_state_finds_the_coupling_again() -> None:
    singles, combos = world(False)[0], world(True)[0]
    table, other = new_table(singles, 3), new_table(combos, 3)
    assert not table.coupled and other.coupled
    table.load_state_dict(other.state_dict())
    assert table.coupled


# -- turning the programs ------------------------------------------------------------------------------------------------------------


def centred_pair(name: str):
    data = pc.PerturbationData.from_anndata(pc.simulate.svae_screen(4, 3, 10, 12, n_control=10))
    model, guide = pc.build(name, data, n_latent=4, n_hidden=8, n_layers=2)
    model.double(), guide.double()
    guide.initialise(model, data)
    guide.table.observe(data.batch(dtype=F64).dose, torch.randn(len(data), 4, dtype=F64))
    return model, guide, data.batch(dtype=F64)


@pytest.mark.parametrize("name", ["sams_vae", "svae_plus"])
def test_turn_changes_the_axes_and_nothing_else(name: str) -> None:
    model, guide, batch = centred_pair(name)
    rotation, _ = torch.linalg.qr(torch.randn(4, 4, dtype=F64))

    def picture() -> tuple[Tensor, ...]:
        with torch.no_grad():
            a, _ = guide.encode(batch)
            shift = batch.dose @ guide.table.expected()
            return a, shift, guide.table.means(), model.decoder(a), model.decoder(a + shift)

    before = picture()
    guide.turn(model, rotation)
    after = picture()
    for x, y in zip(before[:3], after[:3], strict=True):
        torch.testing.assert_close(y, x @ rotation, rtol=1e-12, atol=1e-12)
        assert not torch.allclose(y, x)
    for x, y in zip(before[3:], after[3:], strict=True):
        torch.testing.assert_close(y, x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("turns", [(0.3,), (0.5, 0.65, 0.8), (0.52, 0.54)])
def test_programs_are_turned_when_the_guide_says(turns: tuple[float, ...]) -> None:
    """At the first epoch's end that reaches each share; two shares in one epoch are one turn; the mask is inferred from the first on."""
    data = pc.PerturbationData.from_anndata(pc.simulate.svae_screen(4, 3, 10, 12, n_control=10))
    model, guide = pc.build("sams_vae", data, n_latent=3, n_hidden=8, n_layers=1, turns=turns)
    guide.initialise(model, data)
    guide.table.observe(data.batch().dose, torch.randn(len(data), 3))
    turned, sparse = [], []
    for epoch in range(20):
        before = model.decoder.first.weight.clone()
        guide.after_epoch(model, (epoch + 1) / 20)
        sparse.append(bool(guide.table.is_sparse))
        if not torch.equal(before, model.decoder.first.weight):
            turned.append(epoch + 1)
    expected = sorted({math.ceil(20 * t - 1e-9) for t in turns})
    assert turned == expected and sparse.index(True) + 1 == expected[0]
