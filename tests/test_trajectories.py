"""Units that are seen at several times, exact bijections, networks for the transition, learned penetrance: identities and recovery."""

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pyro
import pytest
import torch

import pyrocausal as pc
from pyrocausal.dynamics.course import Mechanism, roll, steps_of
from pyrocausal.dynamics.hits import ways
from pyrocausal.dynamics.nonlinear import Transition, abduct
from pyrocausal.dynamics.nonlinear import roll as roll_networks
from pyrocausal.dynamics.sight import Observation, Seen, glimpsed, posterior, sight
from pyrocausal.dynamics.walk import Walk
from pyrocausal.elbo import ELBO
from pyrocausal.errors import DataError, PyrocausalError
from pyrocausal.loading import moment_batch
from pyrocausal.simulate_course import course_screen
from pyrocausal.units import frames
from pyrocausal.warp import Warp

F64 = torch.float64
SMALL = {"cells_per_condition": 12, "n_perturbations": 3, "n_genes": 7}


def screen(seed=1, keep=1.0, **settings):
    adata = course_screen(**{**SMALL, "trajectories": True, **settings}, seed=seed)
    adata = adata[np.random.default_rng(seed).random(len(adata)) < keep].copy() if keep < 1 else adata
    return adata, pc.PerturbationData.from_anndata(adata, time_key="time", unit_key="unit" if "unit" in adata.obs else None)


def pair(data, noise=0.05, **settings):
    """A pair away from its start, so that every part counts."""
    model, guide = pc.build("cite_vae", data, n_latent=3, n_invariant=2, **{"times": [0.0, 1.0, 2.0, 3.0], **settings})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if settings.get("likelihood") == "flow":
            model.warp.fit_components(torch.as_tensor(data.dense(np.float64)))
            model.likelihood.log_sigma.data.fill_(-1.0)
        else:
            guide.initialise(model, data)
        for p in [*model.parameters(), *guide.parameters()]:
            p.data += noise * torch.randn_like(p)
    return model, guide


def bound(model, guide, batch):
    estimate = ELBO(analytic_kl=False)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(1)
        estimate.differentiable_loss(model, guide, batch)
    return sum(float(v) for k, v in estimate.terms.items() if k != "weights_prior")


# -- data ----------------------------------------------------------------------------------------------------------------------


def test_units_are_rows():
    adata, data = screen(keep=0.7)
    assert not data.complete and len(data) == adata.obs["unit"].nunique()
    part = data[5:9]
    for i, unit in enumerate(part.cells):
        rows = adata[(adata.obs["unit"] == unit).to_numpy()]
        for t in range(4):
            seen = rows.X[(rows.obs["time"] == t).to_numpy()]
            assert np.array_equal(part.path[i, t], seen[0]) if len(seen) else np.isnan(part.path[i, t]).all()
        assert np.array_equal(part.dense()[i], rows.X[np.argmax(rows.obs["time"])]) and part.time[i] == rows.obs["time"].max()
    apart = frames(part)
    rows = adata[adata.obs["unit"].isin(part.cells).to_numpy()]
    order = np.lexsort((rows.obs["time"], rows.obs["unit"].astype(str)))
    assert np.array_equal(apart.dense(), rows.X[order]) and np.array_equal(apart.time, rows.obs["time"].to_numpy()[order])
    batch = part.batch()
    assert (batch.path_time.isnan().numpy() == np.isnan(part.path[..., 0])).all() and not batch.path.isnan().any()


def test_what_is_no_unit_is_refused():
    adata, _ = screen()
    with pytest.raises(DataError, match="no times; name the column"):
        pc.PerturbationData.from_anndata(adata, unit_key="unit")
    twice = adata.copy()
    twice.obs["time"] = 0.0
    with pytest.raises(DataError, match="more than once at time 0"):
        pc.PerturbationData.from_anndata(twice, time_key="time", unit_key="unit")


def test_treatments_that_change_are_kept_and_a_control_may_come_first():
    adata, data = screen()
    assert data.course is None
    paired = adata.copy()
    paired.obs["perturbation"] = np.where(paired.obs["time"] == 0, "control", paired.obs["perturbation"].astype(str))
    assert pc.PerturbationData.from_anndata(paired, time_key="time", unit_key="unit").course is None
    washed = adata.copy()
    washed.obs["perturbation"] = np.where(washed.obs["time"] == 3, "control", washed.obs["perturbation"].astype(str))
    data = pc.PerturbationData.from_anndata(washed, time_key="time", unit_key="unit")
    assert (data.dose.toarray() == 0).all() and not data.complete
    treated = data.course[:, 1].sum(-1) > 0
    assert treated.sum() == 36 and (data.course[treated, 2].sum(-1) == 1).all() and (data.course[:, 3] == 0).all()
    model, guide = pair(data)
    from pyro import poutine

    course = poutine.trace(model).get_trace(data.batch()).nodes["course"]["value"]
    assert torch.equal(course[:, 1:], torch.as_tensor(data.course[:, 1:]).to(F64)) and (course[:, 0] == 0).all()
    assert math.isfinite(bound(model, guide, data.batch()))


# -- the law of what was seen --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("regime", "settings"),
    [
        ("trajectories", {}),
        ("trajectories", {"transition": "ou"}),
        ("trajectories", {"weights": "free"}),
        ("incomplete", {}),
        ("incomplete", {"likelihood": "flow"}),
        ("snapshots", {"likelihood": "flow"}),
        ("snapshots", {"penetrance": "learned"}),
        ("trajectories", {"penetrance": "learned"}),
    ],
    ids=str,
)
def test_integrated_moments_and_any_draw_of_the_exact_posterior_agree(regime, settings):
    """log p of all cells: the state integrated out, moments of whole paths, and ``log p(x, z) - log q(z | x)`` at one draw of z."""
    _, data = screen(trajectories=regime != "snapshots", keep=0.7 if regime == "incomplete" else 1.0)
    model, guide = pair(data, **settings)
    whole = bound(model, guide, replace(data.batch(), collapsed=True))
    assert abs(bound(model, guide, data.batch()) - whole) < 1e-9 * abs(whole)
    if regime == "trajectories" and not settings.get("penetrance"):
        assert abs(bound(model, guide, moment_batch(data, False, by_time=True)) - whole) < 1e-9 * abs(whole)


def test_the_law_of_a_path_is_the_dense_normal():
    """Against the covariance of all genes at all times, and the posterior against Gaussian conditioning."""
    _, data = screen(keep=0.7)
    model, _ = pair(data)
    batch = data.batch(range(6))
    with torch.no_grad():
        course = model.course(batch, batch.dose.to(F64))
        what, o = model.sight_of(model.mechanism(*model.tables()), course, model.look(batch)), model.observation
        law, q = Seen(what, o, flat=False), posterior(what, model.shown(batch), o)
        for i in range(6):
            seen = what.seen[what.row[i]].bool()
            A = torch.cat(list((what.maps[what.row[i]] @ o.loadings)[seen]), -1)  # [e, F G]
            mean = (what.offsets[what.row[i]] @ o.loadings + o.bias)[seen].flatten()
            cov = A.T @ A + torch.diag((1 / o.precision).repeat(int(seen.sum())))
            x = batch.path[i].to(F64)[seen].flatten()
            dense = torch.distributions.MultivariateNormal(mean, cov)
            assert abs(float(dense.log_prob(x) - law.log_prob(batch.path.to(F64))[i])) < 1e-6 * abs(float(dense.log_prob(x)))
            gain = A @ torch.linalg.inv(cov)
            assert (q.loc[i] - gain @ (x - mean)).abs().max() < 1e-6
            assert (q.covariance_matrix[i] - (torch.eye(len(A), dtype=F64) - gain @ A.T)).abs().max() < 1e-6
        glimpse = glimpsed(what, model.shown(batch)[..., :5], torch.full((6, 4, 5), 3.0, dtype=F64))
        direct = posterior(
            what, model.shown(batch)[..., :5], Observation(torch.eye(5, dtype=F64), torch.zeros(5, dtype=F64), 3 * torch.ones(5, dtype=F64))
        )
        assert (glimpse.loc - direct.loc).abs().max() < 1e-9
        mix, value = torch.randn(5, 5, dtype=F64), model.shown(batch)[..., :5]
        turned = glimpsed(what, value, torch.full((6, 4, 5), 3.0, dtype=F64), mix)
        direct = posterior(what, value @ mix, Observation(mix, torch.zeros(5, dtype=F64), 3 * torch.ones(5, dtype=F64)))
        assert (turned.loc - direct.loc).abs().max() < 1e-9 and (turned.covariance_matrix - direct.covariance_matrix).abs().max() < 1e-9


def test_an_encoder_comes_near_the_exact_bound_and_keeps_the_programs():
    """Linear mixing through an encoder and a network for a decoder; without the axes of the glimpses the bound turns the programs (.84)."""
    adata, data = screen(cells_per_condition=100, n_genes=5)
    settings = {"n_latent": 3, "n_invariant": 2, "targets": adata.uns["truth"]["targets"]}
    exact = pc.fit(*pc.build("cite_vae", data, polish=200, **settings), data, max_epochs=100, lr=1e-1, kl_warmup=0.0)
    model, guide = pc.build("cite_vae", data, decoder="mlp", **settings)
    fit = pc.fit(model, guide, data, max_epochs=20, lr=3e-3, kl_warmup=0.0, batch_size=64)
    last = adata[adata.obs["time"] == adata.obs["time"].max()]
    true = last.obsm["u"][pd.Index(last.obs["unit"].astype(str)).get_indexer(data.cells)]
    for found in (exact, fit):
        with torch.no_grad():
            q = found.guide.posterior(data.batch())
            w, noise = found.model.split(q.mean)
            batch = data.batch()
            course = found.model.course(batch, batch.dose.to(F64))
            held, row = torch.full((len(data), 4, 3), math.nan, dtype=F64), torch.arange(len(data))
            u = found.model.paths(found.model.mechanism(*found.model.tables()), course, held, row, w, noise)[:, -1].numpy()
        assert min(abs(np.corrcoef(true[:, k], u[:, k])[0, 1]) for k in range(3)) > 0.98
    bound, exact_bound = (found.history["elbo"].iloc[-1] for found in (fit, exact))
    assert exact_bound - 5 < bound < exact_bound


def test_a_warp_is_a_bijection_with_its_slope():
    torch.manual_seed(0)
    warp, x = Warp(7, 4), torch.randn(50, 7, dtype=F64) @ torch.randn(7, 7, dtype=F64)
    warp.fit_components(x)
    with torch.no_grad():
        assert (warp.inverse(warp(x)[0]) - x).abs().max() < 1e-10
        for p in warp.parameters():
            p += 0.3 * torch.randn_like(p)
        y, log_det = warp(x)
        assert (warp.inverse(y) - x).abs().max() < 1e-10
    jacobian = torch.stack([torch.autograd.functional.jacobian(lambda v: warp(v)[0], x[i]) for i in range(5)])
    assert (torch.linalg.slogdet(jacobian)[1] - log_det[:5]).abs().max() < 1e-9


# -- networks for the transition -----------------------------------------------------------------------------------------------


def mechanism(seed=0, D=3, n_w=2, P=4):
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, dtype=F64, generator=g)

    hit = (torch.rand(P, D, generator=g) < 0.4).to(F64)
    zero = (normal(n_w, D), normal(D), normal(D, D))
    return Mechanism(0.5 * normal(D, D).triu(1), 0.4 * normal(D, D), torch.ones(D, dtype=F64), normal(n_w, D), normal(D), 0.3 * normal(D), zero, hit, normal(P, D), 0.2 * normal(P, D))  # fmt: skip  # noqa: E501


def walkers(n=6, T=4, seed=0, noise=False, scale=0.2):
    torch.manual_seed(seed)
    net = Transition(3, 2, noise)
    for p in net.parameters():
        p.data += scale * torch.randn_like(p)
    course, held = torch.rand(n, T, 4, dtype=F64), torch.full((n, T, 3), math.nan, dtype=F64)
    return net, course, held, torch.randn(n, 2, dtype=F64), torch.randn(n, T, 3, dtype=F64)


@pytest.mark.parametrize("noise", [False, True], ids=["mlp", "flow"])
def test_abduction_inverts_a_path_and_knows_its_slope(noise):
    m, (net, course, held, w, z) = mechanism(), walkers(noise=noise)
    u = roll_networks(m, net, course, held, torch.arange(6), w, z)
    found, slope = abduct(m, net, course, torch.arange(6), w, u)
    assert (found - z).abs().max() < 1e-10
    jacobian = torch.autograd.functional.jacobian(lambda v: roll_networks(m, net, course, held, torch.arange(6), w, v)[0], z)[:, :, 0]
    assert abs(float(torch.linalg.slogdet(jacobian.reshape(12, 12))[1] - slope[0].detach())) < 1e-9


def test_without_its_network_a_transition_is_linear_and_targets_have_no_parents():
    m, (net, course, held, w, z) = mechanism(), walkers(scale=0.0)
    held[1, 1:, 1], held[2, 2, 0] = 2.0, -1.0
    linear = roll(steps_of(m, course, held, torch.arange(4.0, dtype=F64), "steps"), torch.arange(6), w, z)
    assert (roll_networks(m, net, course, held, torch.arange(6), w, z) - linear).abs().max() < 1e-12
    net, _, held, w, z = walkers(noise=True)
    on = torch.zeros_like(course)
    on[:, 1:, 0] = 1.0
    hit = m._replace(mask=torch.eye(4, 3, dtype=F64))  # perturbation 0 targets program 0
    a, b = (roll_networks(hit, net, on, held, torch.arange(6), w + by, z)[..., 0] for by in (0.0, 1.0))
    assert (a[:, 1:] == b[:, 1:]).all() and (a[:, 0] != b[:, 0]).all()


def test_the_walk_is_exact_where_the_path_is_linear_and_has_no_instant_edges():
    """Its density is that of sequential conditioning on the glimpses, and without glimpses it is the prior."""
    m, (net, course, _, w, _) = mechanism()._replace(instant=torch.zeros(3, 3, dtype=F64)), walkers(scale=0.0)
    value, v = torch.randn(6, 4, 3, dtype=F64), torch.rand(6, 4, 3, dtype=F64) + 0.5
    loc, scale = torch.zeros(6, 2, dtype=F64), torch.ones(6, 2, dtype=F64)
    state = torch.randn(6, 14, dtype=F64)
    prior = Walk(m, net, course, loc, scale, value, torch.zeros_like(v))
    assert (prior.log_prob(state) - torch.distributions.Normal(0, 1).log_prob(state).sum(-1)).abs().max() < 1e-9
    q = Walk(m, net, course, w, 0.5 * scale, value, v)
    drawn = q.rsample()
    assert (q.log_prob(drawn) - q.log_prob(drawn.clone())).abs().max() < 1e-9
    first = steps_of(m, course[:, :1], torch.full((6, 1, 3), math.nan, dtype=F64), torch.zeros(1, dtype=F64), "steps")
    glimpse = glimpsed(sight(first, torch.arange(6), torch.zeros(6, 1, dtype=torch.int64)), torch.cat([state[:, :2], value[:, 0]], -1).unsqueeze(1), torch.cat([1e12 * scale, v[:, 0]], -1).unsqueeze(1))  # fmt: skip  # noqa: E501
    one = Walk(m, net, course[:, :1], state[:, :2], 1e-6 * scale, value[:, :1], v[:, :1])
    some = torch.cat([glimpse.loc[:, :2], state[:, 2:5]], -1)
    mean = glimpse.loc[:, 2:]
    var = glimpse.covariance_matrix[:, 2:, 2:].diagonal(dim1=-2, dim2=-1)
    expected = torch.distributions.Normal(mean, var.sqrt()).log_prob(some[:, 2:]).sum(-1)
    found = one.log_prob(torch.cat([state[:, :2], some[:, 2:]], -1)) - torch.distributions.Normal(state[:, :2], 1e-6).log_prob(
        state[:, :2]
    ).sum(-1)
    assert (found - expected).abs().max() < 1e-3


@pytest.mark.parametrize("transition", ["mlp", "flow"])
def test_a_whole_path_through_a_warp_has_the_density_of_its_noise(transition):
    """log p(x) = log p(w, z) + log |d(w, z, off) / dx|, by brute force over one unit of as many genes as coordinates."""
    _, data = screen(n_genes=5)
    model, guide = pair(data, likelihood="flow", transition=transition)
    batch = data.batch([20])

    def state(x):
        law = model.whole_path(model.mechanism(*model.tables()), model.course(batch, batch.dose.to(F64)), model.look(batch))
        w, z, _ = law.abduct(x)
        y, _ = model.warp(x)
        sigma = 1e-3 + model.likelihood.log_sigma.exp()[:2]
        return torch.cat([w.flatten(), z.flatten(), ((y[:, 1:, :2] - w.unsqueeze(1)) / sigma).flatten()])

    x = batch.path.to(F64)
    jacobian = torch.autograd.functional.jacobian(state, x).reshape(20, 20)
    expected = torch.distributions.Normal(0, 1).log_prob(state(x)).sum() + torch.linalg.slogdet(jacobian)[1]
    law = model.whole_path(model.mechanism(*model.tables()), model.course(batch, batch.dose.to(F64)), model.look(batch))
    assert abs(float((law.log_prob(x)[0] - expected).detach())) < 1e-8
    z = guide.posterior(batch).v
    w, noise = model.split(z)
    u = model.paths(model.mechanism(*model.tables()), model.course(batch, batch.dose.to(F64)), torch.full((1, 4, 3), math.nan, dtype=F64), torch.zeros(1, dtype=torch.int64), w, noise)  # fmt: skip  # noqa: E501
    assert (model.warp(x)[0][0, :, 2:] - u[0]).abs().max() < 1e-8  # abduction, then the path again


# -- fits ----------------------------------------------------------------------------------------------------------------------


def test_penetrance_is_recovered_and_edits_that_take_in_part_move_the_population_in_part():
    """Bars of the dossier: within .05; the effect at penetrance .6 is .6 of the full one, within 3 standard errors of the cells."""
    adata = course_screen(cells_per_condition=100, n_perturbations=3, penetrance=0.6, seed=0)
    data = pc.PerturbationData.from_anndata(adata, time_key="time")
    model, guide = pc.build("cite_vae", data, n_latent=3, n_invariant=2, targets=np.eye(3), penetrance="learned", polish=0)
    fit = pc.fit(model, guide, data, max_epochs=150, lr=3e-2, kl_warmup=0.0, batch_size=512)
    took = adata.obs["took"].to_numpy() & (data.time > 0)
    for p, name in enumerate(data.perturbations):
        mine = (data.labels == name) & (data.time > 0)
        assert abs(float(fit.guide.penetrance_logits.sigmoid()[p]) - took[mine].mean()) < 0.05
    batch = data.batch(np.flatnonzero((data.labels != "control") & (data.time == 3)))
    share = fit.guide._taken(batch).gather(1, batch.dose.argmax(1, keepdim=True))[:, 0].numpy()
    assert share[took[batch.index.numpy()]].mean() > share[~took[batch.index.numpy()]].mean() + 0.5
    name = str(data.perturbations[0])
    asked = {"full": pc.perturb(name, penetrance=1 - 1e-6), "part": pc.perturb(name, penetrance=0.6)}  # 1 would leave the learned one
    out = pc.effects(fit, asked, draws=40, cells=256)["effect"]
    full, part = (out.sel(intervention=k).to_numpy() for k in ("full", "part"))
    error = (part - 0.6 * full).std(0) / math.sqrt(len(part))
    assert (np.abs((part - 0.6 * full).mean(0)) < 3 * error).all()  # 5 genes, false alarms 1.4 %


def test_ways_to_take():
    dose = torch.tensor([[1.0, 0, 0.5], [0, 0, 0], [0, 2.0, 0]], dtype=F64)
    rho = torch.tensor([0.3, 0.6, 0.9], dtype=F64)
    hit, weight = ways(dose, rho)
    assert (weight.sum(1) - 1).abs().max() < 1e-12
    assert ((dose.unsqueeze(1) * hit * weight.unsqueeze(-1)).sum(1) - dose * rho).abs().max() < 1e-12
    both = (hit[0, :, [0, 2]] == 1).all(-1)
    assert abs(float(weight[0][both].sum()) - 0.27) < 1e-12
    with pytest.raises(DataError, match="penetrance='full'"):
        ways(torch.ones(1, 5), torch.full((5,), 0.5))


def test_networks_learn_from_units_that_were_seen_in_part():
    """The held-out bound rises, paths keep what was seen, and the factual act leaves a path as it was."""
    _, data = screen(cells_per_condition=40, keep=0.8)
    settings = {"n_latent": 3, "n_invariant": 2, "targets": np.eye(3), "transition": "mlp", "times": [0.0, 1.0, 2.0, 3.0]}
    model, guide = pc.build("cite_vae", data, **settings)
    fit = pc.fit(model, guide, data, max_epochs=12, lr=1e-3, kl_warmup=0.0, validation=0.15, patience=None)
    assert fit.history["validation"].iloc[-1] > fit.history["validation"].iloc[0]
    cells = data[np.flatnonzero(~data.is_control & (data.time == 3))][:8]
    name = str(data.perturbations[0])
    out = pc.trajectory(fit, {"as it was": pc.pulse(pc.clamp(0, 0.0), 0.0, 0.0), "held": pc.sustain(pc.clamp(2, 1.5), 1.0)}, cells, draws=3)
    assert (out["effect"].sel(intervention="as it was") == 0).all()
    assert (out["program_effect"].sel(intervention="held", time=[0.0, 1.0]) == 0).all()
    assert np.isfinite(pc.effects(fit, name, draws=2, cells=16)["effect"]).all()
    report = pc.check_model(fit.model, fit.guide, data)
    assert report, str(report)


@pytest.mark.parametrize("transition", ["mlp", "flow"])
def test_whole_paths_are_asked_and_saved_like_any_fit(transition, tmp_path):
    _, data = screen(n_genes=5)
    model, guide = pc.build(
        "cite_vae", data, n_latent=3, n_invariant=2, targets=np.eye(3), likelihood="flow", transition=transition, polish=20
    )
    fit = pc.fit(model, guide, data, max_epochs=20, lr=1e-2, kl_warmup=0.0, restarts=2)
    assert fit.history["elbo"].iloc[-1] > fit.history["elbo"].iloc[0]
    name, cells = str(data.perturbations[0]), data[~data.is_control][:5]
    acts = {"as it was": pc.pulse(pc.untreated(), 0.0, 0.0), "held": pc.sustain(pc.clamp(1, 0.5), 1.0)}
    out = pc.trajectory(fit, acts, cells, draws=2)
    assert (out["effect"].sel(intervention="as it was") == 0).all() and (out["program_effect"].sel(time=[0.0, 1.0]) == 0).all()
    assert (out["program"].sel(intervention="held", time=[2.0, 3.0], latent=1) == 0.5).all()
    shown = out["expression"].sel(intervention="as it was").isel(draw=0).to_numpy()
    off = np.abs(shown - cells.path)[:, 0].max()  # at the first time the warp shows (w, u) without noise
    assert off < 1e-4 * np.abs(cells.path).max()
    fit.save(tmp_path / "run")
    assert pc.trajectory(pc.load(tmp_path / "run"), name, cells, draws=2).equals(pc.trajectory(fit, name, cells, draws=2))
    assert np.isfinite(pc.effects(fit, name, draws=2, cells=16)["effect"]).all()


def test_an_interrupted_polish_keeps_what_there_is(monkeypatch):
    _, data = screen()
    model, guide = pc.build("cite_vae", data, n_latent=3, n_invariant=2)
    bar = []

    def stop(self, n):
        bar.append(n)
        if len(bar) == 2:
            raise KeyboardInterrupt

    import pyrocausal.polish

    monkeypatch.setattr(pyrocausal.polish.tqdm, "update", stop)
    estimate = moment_batch(data, False, by_time=True)
    before = -bound(model, guide, estimate)
    with pytest.raises(KeyboardInterrupt):
        pyrocausal.polish.polish(model, guide, [estimate], 100)
    assert -bound(model, guide, estimate) < before and len(bar) == 2 and all(torch.isfinite(p).all() for p in model.parameters())


def test_parts_of_the_cells_have_the_bound_and_the_gradient_of_all():
    from pyrocausal.polish import backward

    _, data = screen(n_genes=5)
    model, guide = pair(data, likelihood="flow")
    found = []
    for cuts in ([], [7, 30]):
        rows = np.split(np.arange(len(data)), cuts)
        model.zero_grad()
        value = backward(model, guide, [replace(data.batch(part, n_total=len(data)), collapsed=True) for part in rows])
        found.append((value, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])))
    assert abs(float(found[0][0] - found[1][0])) < 1e-10
    assert (found[0][1] - found[1][1]).abs().max() < 1e-10 * found[0][1].abs().max()


def test_a_bijection_finds_the_programs_behind_two_layers():
    """Known targets, recovery up to sign and scale: mean absolute correlation of each program with its own, over two seeds."""
    for seed in (0, 1):
        adata, data = screen(cells_per_condition=60, mixing="leaky", n_genes=5, seed=seed)
        settings = {"n_latent": 3, "n_invariant": 2, "targets": adata.uns["truth"]["targets"], "likelihood": "flow", "polish": 200}
        model, guide = pc.build("cite_vae", data, **settings)
        fit = pc.fit(model, guide, data, max_epochs=10, lr=5e-3, kl_warmup=0.0)
        with torch.no_grad():
            y = fit.model.warp(torch.as_tensor(data.path[:, -1], dtype=torch.float64))[0][:, 2:].numpy()
        last = adata[adata.obs["time"] == adata.obs["time"].max()]
        true = last.obsm["u"][pd.Index(last.obs["unit"].astype(str)).get_indexer(data.cells)]
        own = [abs(np.corrcoef(true[:, k], y[:, k])[0, 1]) for k in range(3)]
        assert np.mean(own) > 0.9


def test_alignment_pulls_what_a_unit_shows_to_what_it_showed_first():
    """The penalty by hand, and that training with it brings them nearer, in units of the prior."""
    _, data = screen(n_genes=12, mixing="leaky", noise=0.5, keep=0.7)
    settings = {"n_latent": 3, "n_invariant": 2, "decoder": "mlp", "times": [0.0, 1.0, 2.0, 3.0], "aligned": "unit"}
    apart = []
    for alignment in (0.0, 100.0):
        fit = pc.fit(*pc.build("cite_vae", data, alignment=alignment, **settings), data, max_epochs=20, kl_warmup=0.0, batch_size=16)
        with torch.no_grad():
            w = fit.guide.glimpse(torch.as_tensor(np.nan_to_num(data.path), dtype=F64))[0][..., :2].numpy()
            sites = pyro.poutine.trace(fit.guide).get_trace(data.batch()).nodes
        seen = ~np.isnan(data.path[..., 0])
        first = w[np.arange(len(w)), seen.argmax(1)][:, None]
        off = np.where(seen, np.square(w - first).sum(-1), 0).sum(1)
        apart.append(off.mean())
        assert ("alignment" in sites) == (alignment > 0)
    assert np.abs(sites["alignment"]["fn"].log_factor.numpy() - 100 * off).max() < 1e-9 * off.max()
    assert apart[1] < 0.7 * apart[0]
    once = pc.PerturbationData.from_anndata(course_screen(cells_per_condition=30, n_perturbations=2), time_key="time")
    model, guide = pc.build("cite_vae", once, n_latent=3, n_invariant=2, decoder="mlp", alignment=1.0, aligned="unit")
    with pytest.raises(DataError, match="unit_key="):
        pc.fit(model, guide, once, max_epochs=1)


def test_alignment_pulls_the_invariant_states_of_treated_and_control_cells_together():
    adata = course_screen(cells_per_condition=60, n_perturbations=2, n_genes=12, mixing="leaky", noise=0.5, seed=3)
    data = pc.PerturbationData.from_anndata(adata, time_key="time")
    apart = []
    for alignment in (0.0, 1000.0):
        model, guide = pc.build("cite_vae", data, n_latent=3, n_invariant=2, decoder="mlp", alignment=alignment)
        fit = pc.fit(model, guide, data, max_epochs=8, kl_warmup=0.0)
        with torch.no_grad():
            w = fit.guide.glimpse(torch.as_tensor(data.dense(np.float64)))[0][:, :2].numpy()
        apart.append(np.linalg.norm(w[~data.is_control].mean(0) - w[data.is_control].mean(0)))
        assert ("site:alignment" in fit.history) == (alignment > 0)
    assert apart[1] < 0.7 * apart[0]


def test_what_does_not_go_together_is_refused():
    _, data = screen()
    for settings, match in (
        ({"likelihood": "flow", "decoder": "mlp"}, "a bijection has no decoder"),
        ({"penetrance": "learned", "decoder": "mlp"}, "a mixture of laws in closed form"),
        ({"penetrance": "some"}, "'full' or 'learned'"),
        ({"transition": "mlp", "lag": False}, "without memory"),
        ({"alignment": 1.0}, "pairs with an encoder"),
        ({"start": "cold"}, "'linear' or 'random'"),
    ):
        with pytest.raises(PyrocausalError, match=match):
            pc.build("cite_vae", data, n_latent=3, n_invariant=2, **settings)
    _, parts = screen(keep=0.6)
    model, guide = pc.build("cite_vae", parts, n_latent=3, n_invariant=2, likelihood="flow", transition="mlp")
    with pytest.raises(PyrocausalError, match="seen at all 4 times"):
        pc.fit(model, guide, parts, max_epochs=1)


def test_a_polish_that_held_out_cells_lose_by_is_taken_back():
    """Few units of many genes: the training bound goes on rising, that of the held-out units does not."""
    _, data = screen(cells_per_condition=6, n_perturbations=2, n_genes=12, noise=1.0)
    model, guide = pc.build("cite_vae", data, n_latent=3, n_invariant=2, weights="free", polish=60)
    fit = pc.fit(model, guide, data, max_epochs=20, lr=3e-2, kl_warmup=0.0, validation=0.3, patience=None)
    assert len(fit.history) == 20  # 21 with a polish that is kept
