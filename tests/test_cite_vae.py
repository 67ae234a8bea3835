"""CITE-VAE: likelihood of snapshots, recovery, interventions with a when, paths of cells, restarts."""

import warnings

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

import pyrocausal as pc
from pyrocausal.elbo import ELBO
from pyrocausal.errors import ContractError, DataError, InterventionError, PyrocausalError
from pyrocausal.loading import moment_batch
from pyrocausal.simulate_course import course_screen

pytestmark = pytest.mark.xdist_group("cite_vae")  # one worker makes the fit that most of them ask


def programs_of(fit, data):
    """Posterior mean programs of cells at their own times."""
    paths = pc.trajectory(fit, {"as it was": pc.pulse(pc.clamp(0, 0.0), 0.0, 0.0)}, data, draws=20)["program"][0].mean("draw").to_numpy()
    at = np.abs(data.time[:, None] - np.asarray(fit.model.times)).argmin(1)
    return paths[np.arange(len(data)), at]


def mcc(u, v):
    correlation = np.abs(np.corrcoef(u.T, v.T)[: u.shape[1], u.shape[1] :])
    return correlation[linear_sum_assignment(-correlation)].mean()


@pytest.fixture(scope="session")
def fitted():
    adata = course_screen(cells_per_condition=250, seed=0)
    data = pc.PerturbationData.from_anndata(adata, time_key="time")
    model, guide = pc.build("cite_vae", data, n_latent=3, n_invariant=2, targets=adata.uns["truth"]["targets"])
    return adata, data, pc.fit(model, guide, data, max_epochs=100, lr=1e-1, kl_warmup=0.0, restarts=3)


# -- the likelihood ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"transition": "ou"}, {"weights": "free"}, {"weights": "sparse"}], ids=str)
def test_moments_exact_posterior_and_cells_agree(settings):
    """log p(x) of all cells: by the moments of conditions, by a normal for each cell, and by the bound with the exact posterior."""
    data = pc.PerturbationData.from_anndata(course_screen(cells_per_condition=20, n_perturbations=3, n_genes=7, seed=1), time_key="time")
    model, guide = pc.build("cite_vae", data, n_latent=3, n_invariant=2, **settings)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        guide.initialise(model, data)
        for p in model.parameters():
            p.data += 0.1 * torch.randn_like(p)
    bound, batch = ELBO(analytic_kl=False), moment_batch(data, False, by_time=True)
    bound.differentiable_loss(model, guide, batch)
    by_moments = float(bound.terms["x"])
    bound.differentiable_loss(model, guide, data.batch())
    by_cells = float(bound.terms["x"] + bound.terms["z"])
    with torch.no_grad():
        law = torch.distributions.MultivariateNormal(*_law(model, batch))
        labels = np.array([f"{p} {t}" for p, t in zip(data.labels, data.time, strict=True)])
        rows = [f"{data.labels[i]} {data.time[i]}" for i in (_first(data, batch, q) for q in range(len(batch)))]
        x = torch.as_tensor(data.dense(np.float64))
        direct = sum(float(law.log_prob(x[labels == name][:, None])[:, q].sum()) for q, name in enumerate(rows))
    assert abs(by_moments - direct) < 1e-6 * abs(direct)
    assert abs(by_cells - direct) < 1e-6 * abs(direct)  # at any draw of z, for its posterior is exact


def _law(model, batch):
    from pyro import poutine

    fn = poutine.trace(model).get_trace(batch).nodes["x"]["fn"]
    fn = getattr(fn, "base_dist", fn)
    return fn.loc, fn.covariance


def _first(data, batch, q):
    same = (data.dose.toarray() == batch.dose[q].numpy()).all(1) & (data.time == float(batch.time[q]))
    return int(same.argmax())


# -- recovery ------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_programs_and_transition_from_snapshots(fitted):
    """Each cell is seen once; the sizes of the dossier are in ``benchmarks/cite_vae.py``."""
    adata, data, fit = fitted
    some = data[::10]
    assert mcc(adata.obsm["u"][::10], programs_of(fit, some)) > 0.97
    scores = [r["validation"] for r in fit.settings["restarts"]]
    assert len(scores) == 3 and np.ptp(scores) > 0.01


@pytest.mark.slow
def test_the_prediction_of_unseen_pairs_is_not_additive():
    """Pairs of ancestors and descendants: closer to the truth than the sum of the true singles."""
    adata = course_screen(n_latent=3, cells_per_condition=250, doubles=8, seed=0)
    data = pc.PerturbationData.from_anndata(adata, time_key="time")
    train, test = data.split("combinations", test=[c for c in data.conditions if "+" in c])
    model, guide = pc.build("cite_vae", train, n_latent=3, n_invariant=2, targets=adata.uns["truth"]["targets"])
    fit = pc.fit(model, guide, train, max_epochs=100, lr=1e-1, kl_warmup=0.0, restarts=2)
    pairs = [c for c in test.conditions if "+" in c]
    last = data.time == data.time.max()
    mean = {c: data.dense()[last & (data.labels == c)].mean(0) for c in data.conditions}
    truth = np.stack([mean[c] - mean["control"] for c in pairs])
    additive = np.stack([sum(mean[p] - mean["control"] for p in c.split("+")) for c in pairs])
    found = pc.trajectory(fit, pairs, draws=2, n_cells=512)["effect"].isel(time=-1).mean("draw").to_numpy()
    error = [np.linalg.norm(e - truth) / np.linalg.norm(truth) for e in (found, additive)]
    assert error[0] < 0.25 and error[0] < 0.6 * error[1]


# -- interventions with a when -------------------------------------------------------------------------------------------------


def test_nothing_before_and_no_other_than_descendants_moves(fitted):
    """Bitwise: a hold of program 2, the last of the order, from time 2 on."""
    _, data, fit = fitted
    cells = data.select("control")[:20]
    asked = {"held": pc.sustain(pc.clamp(2, 1.5), 1.0), "pulse": pc.pulse(pc.clamp(2, 1.5), 1.0, 2.0), "at": pc.at(2.0, pc.clamp(2, 1.5))}
    for given in (None, cells):
        out = pc.trajectory(fit, asked, given, draws=3)
        assert (out["program_effect"].sel(time=[0.0, 1.0]) == 0).all() and (out["effect"].sel(time=[0.0, 1.0]) == 0).all()
        assert (out["program_effect"].sel(time=2.0, latent=[0, 1]) == 0).all()  # L is triangular: only the lag leads back
        assert (out["program"].sel(intervention="held", time=[2.0, 3.0], latent=2) == 1.5).all()
        assert (out["program"].sel(intervention="pulse", time=2.0, latent=2) == 1.5).all()
        assert (out["program"].sel(intervention="pulse") == out["program"].sel(intervention="at")).all()
        assert (out["program"].sel(intervention="pulse", time=3.0, latent=2) != 1.5).any()


def test_an_empty_pulse_is_the_observational_law_and_no_change_no_counterfactual(fitted):
    _, data, fit = fitted
    name = str(data.perturbations[0])
    out = pc.trajectory(fit, {"empty": pc.pulse(pc.perturb(name), 1.0, 1.0), "untreated": pc.untreated()}, draws=2)
    assert (out["effect"] == 0).all()
    treated = data.select(name)[:10]
    own = pc.trajectory(fit, {"own": pc.perturb(name), "said again": pc.sustain(pc.perturb(name), 0.0) & pc.untreated()}, treated, draws=2)
    assert (own["effect"] == 0).all() and (own["program_effect"] == 0).all()
    assert np.array_equal(pc.counterfactual(fit, treated, name, draws=2)["expression"][0, 0], treated.dense())


def test_a_wash_out_relaxes_by_the_transition(fitted):
    """After a pulse the difference of the paths is carried by (B (1 - L)^-1) alone."""
    _, data, fit = fitted
    out = pc.trajectory(fit, {"pulse": pc.at(1.0, pc.clamp(0, 3.0))}, data.select("control")[:5], draws=2)
    change = out["program_effect"][0].to_numpy()  # [draw, cell, time, latent]
    _, _, L, B = (t.detach().numpy() for t in fit.model.tables())
    carry = B @ np.linalg.inv(np.eye(3) - L)
    assert np.abs(change[..., 2, :] - change[..., 1, :] @ carry).max() < 1e-5
    assert np.abs(change[..., 3, :] - change[..., 2, :] @ carry).max() < 1e-5


def test_words_with_a_when():
    a = pc.perturb("A")
    assert (
        str(pc.sustain(a, 2.0)) == "(A) from 2 on" and str(pc.pulse(a, 1.0, 4.0)) == "(A) from 1 to 4" and str(pc.at(3.0, a)) == "(A) at 3"
    )
    assert pc.sustain(a, 2.0) & pc.at(1.0, pc.clamp(0, 1.0)) == pc.at(1.0, pc.clamp(0, 1.0)) & pc.sustain(a, 2.0)
    with pytest.raises(InterventionError, match="ends when it began"):
        pc.pulse(a, 2.0, 1.0)
    with pytest.raises(InterventionError, match="penetrance"):
        pc.sustain(pc.perturb("A", penetrance=0.5), 1.0)
    with pytest.raises(InterventionError, match="other acts are for all times"):
        pc.sustain(pc.cut(0, 1), 1.0)


def test_what_has_no_when_is_refused(fitted, small_screen):
    _, data, fit = fitted
    with pytest.raises(InterventionError, match=r"the time 1\.5; the model has 0, 1, 2, 3"):
        pc.trajectory(fit, pc.sustain(pc.untreated(), 1.5))
    other = pc.PerturbationData.from_anndata(small_screen)
    static = pc.fit(*pc.build("sams_vae", other, n_latent=2), other, max_epochs=1)
    with pytest.raises(InterventionError, match="no time"):
        pc.trajectory(static, str(other.perturbations[0]))
    with pytest.raises(InterventionError, match="no time"):
        pc.effects(static, pc.sustain(pc.perturb(str(other.perturbations[0])), 0.0), draws=2)
    with pytest.raises(InterventionError, match="what the cells have otherwise"):
        pc.do(fit.model, pc.sustain(pc.clamp(0, 1.0), 1.0), data)
    intervened = pc.do(fit.model, pc.untreated() & pc.sustain(pc.clamp(0, 1.0), 1.0), data)
    from pyro import poutine

    u = poutine.trace(intervened).get_trace(data.batch(range(4)).hide()).nodes["u"]["value"]
    assert (u[:, 2:, 0] == 1).all() and (u[:, :2, 0] != 1).all()


# -- the contract --------------------------------------------------------------------------------------------------------------


def test_arviz_networkx_save(fitted, tmp_path):
    _, data, fit = fitted
    report = pc.check_model(fit.model, fit.guide, data)
    assert report, str(report)
    assert pc.identifiability(fit)["edge"].status == "up to permutation and scale"
    free = pc.build("cite_vae", data, n_latent=3, weights="free")[0]
    some = pc.build("cite_vae", data, n_latent=3, targets=np.eye(3)[[0] * 12])[0]
    assert [pc.identifiability(m)["clamp"].status for m in (free, some)] == ["not identified", "in part"]
    idata = pc.to_inference_data(fit, draws=3, cells=data[:4])
    assert idata.posterior["lagged"].dims == ("chain", "draw", "latent", "latent_to")
    now, later = (pc.to_networkx(fit, draws=3, lag=lag, minimum_edge=0.05) for lag in (0, 1))
    between = [{e for e in g.edges if all(str(n).startswith("program") for n in e)} for g in (now, later)]
    assert all(a < b for a, b in between[0]) and any(a == b for a, b in between[1])
    fit.save(tmp_path / "run")
    name = str(data.perturbations[0])
    again = pc.load(tmp_path / "run")
    assert pc.trajectory(again, name, draws=2).equals(pc.trajectory(fit, name, draws=2))


def test_the_picture_of_a_time_course(fitted):
    import matplotlib

    matplotlib.use("Agg")
    _, data, fit = fitted
    name = str(data.perturbations[0])
    ax = pc.plots.time_courses(pc.trajectory(fit, name, draws=4), name, ["gene0", "gene3"], data)
    shown = ax.containers[0].lines[0].get_ydata()  # measured means, the controls at the first time
    rows = [(data.time == t) & (data.labels == (name if t else "control")) for t in range(4)]
    rows[0] |= (data.time == 0) & (data.labels == name)  # cells that the perturbation is yet to act on
    assert np.allclose(shown, [data.dense()[r][:, 0].mean() for r in rows], atol=1e-5)
    assert pc.plots.time_courses(pc.trajectory(fit, name, draws=4), name, [0, 2]).get_ylabel() == "program"


@pytest.mark.slow
@pytest.mark.parametrize("transition", ["steps", "ou"])
def test_counts_and_a_network_for_a_decoder(transition):
    """Means of conditions and times are those of the cells, through an encoder that knows neither."""
    adata = course_screen(cells_per_condition=120, n_perturbations=3, n_genes=20, seed=2)
    rate = np.exp(adata.X / adata.X.std() * 0.7)
    adata.X = np.random.default_rng(0).poisson(500 * rate / rate.sum(1, keepdims=True)).astype(np.float32)
    adata.uns["X_kind"] = "counts"
    data = pc.PerturbationData.from_anndata(adata, time_key="time")
    settings = {"n_latent": 3, "n_invariant": 2, "decoder": "mlp", "targets": adata.uns["truth"]["targets"], "transition": transition}
    fit = pc.fit(*pc.build("cite_vae", data, **settings), data, max_epochs=30, kl_warmup=0.0, validation=0.1, patience=None)
    assert fit.history["validation"].iloc[-1] > fit.history["validation"].iloc[0]
    names = [str(p) for p in data.perturbations]
    found = pc.trajectory(fit, names, draws=2, n_cells=256)["expression"].mean("draw").to_numpy()[:, 1:]
    share = data.dense() / data.library_size[:, None]
    cells = np.array([[np.log1p(1e4 * share[(data.labels == p) & (data.time == t)].mean(0)) for t in (1, 2, 3)] for p in names])
    assert np.corrcoef(found.ravel(), cells.ravel())[0, 1] > 0.97
    report = pc.check_model(fit.model, fit.guide, data)
    assert report, str(report)


def test_the_static_special_case_predicts_the_changes_that_it_saw():
    """Free weights: every condition has a law of its own, so that the changes of the fit are those of the cells."""
    adata = course_screen(cells_per_condition=300, n_perturbations=4, times=2, seed=1)
    data = pc.PerturbationData.from_anndata(adata[(adata.obs["time"] == 1).to_numpy()].copy())
    model, guide = pc.build("perturbed_vae", data, n_latent=3, n_invariant=2)
    fit = pc.fit(model, guide, data, max_epochs=100, lr=1e-1, kl_warmup=0.0)
    names = [str(p) for p in data.perturbations]
    found = pc.effects(fit, names, draws=20, cells=256)["effect"].mean("draw").to_numpy()
    x = data.dense()
    true = np.stack([x[data.labels == p].mean(0) - x[data.is_control].mean(0) for p in names])
    assert np.linalg.norm(found - true) < 0.1 * np.linalg.norm(true)
    assert pc.identifiability(fit)["edge"].status == "not identified"


def test_restarts_are_judged_by_held_out_cells_and_resume(tmp_path):
    data = pc.PerturbationData.from_anndata(course_screen(cells_per_condition=20, n_perturbations=2, times=3, seed=1), time_key="time")

    def run(restarts, **settings):
        model, guide = pc.build("cite_vae", data, n_latent=2, n_invariant=2, polish=0)
        return pc.fit(model, guide, data, **{"max_epochs": 30, "lr": 3e-2, "kl_warmup": 0.0, "restarts": restarts, **settings})

    fit = run(3)
    rows = fit.settings["restarts"]
    best = max(rows, key=lambda r: r["validation"])
    assert fit.history["elbo"].iloc[-1] == best["elbo"] and len({r["validation"] for r in rows}) == 3
    asked = {"checkpoint": tmp_path / "state", "resume": True}
    run(3, callback=lambda epoch, row: epoch == 13, **asked)  # stopped in the middle of every restart
    assert run(3, **asked).settings["restarts"] == rows
    model, guide = pc.build("cite_vae", data, n_latent=2, n_invariant=2)
    del model.recipe
    with pytest.raises(ContractError, match="make="):
        pc.fit(model, guide, data, max_epochs=1, restarts=2)
    make = lambda s: pc.build("cite_vae", data, seed=s, n_latent=2, n_invariant=2, polish=0)  # noqa: E731
    assert len(pc.fit(*make(0), data, max_epochs=1, restarts=2, make=make).settings["restarts"]) == 2


def test_the_polish_goes_on_where_gradient_steps_ended(fitted):
    _, data, fit = fitted
    steps = fit.history["elbo"]
    assert len(steps) == 101 and steps.iloc[-1] > steps.iloc[-2]  # the last row is the polish
    model, guide = pc.build("cite_vae", data[::20], n_latent=2, n_invariant=2, polish=100)
    small = pc.fit(model, guide, data[::20], max_epochs=20, lr=3e-2, kl_warmup=0.0)
    loss = ELBO().differentiable_loss(model, guide, moment_batch(data[::20], False, by_time=True)) / len(data[::20])
    assert abs(-float(loss.detach()) - small.history["elbo"].iloc[-1]) < 1e-9


def test_the_bound_of_the_companion_paper():
    """Its equations 54 and 59 by dense Gaussian algebra in (w, u), where ours is a bound in the exogenous noise, to a millionth."""
    data = pc.PerturbationData.from_anndata(_at_one_time(course_screen(cells_per_condition=10, n_perturbations=3, n_genes=7, seed=1)))
    model, guide = pc.build("perturbed_vae", data, n_latent=3, n_invariant=2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        guide.initialise(model, data)
        for p in model.parameters():
            p.data += 0.1 * torch.randn_like(p)
        estimate, batch = ELBO(), data.batch()
        estimate.differentiable_loss(model, guide, batch)
        torch.manual_seed(1)
        q = guide.posterior(batch)
    kl = 0.0
    with torch.no_grad():
        dL, _, dC = model.free
        for i in range(len(data)):
            p = int(batch.dose[i].argmax()) if batch.dose[i].sum() else None
            A = torch.eye(3, dtype=torch.float64) - (model.instant_weight + (0 if p is None else dL[p])).triu(1)  # eq. 59, row vectors
            C = model.invariant_weight + (0 if p is None else dC[p])
            mu, log_var = (
                model.mean + (0 if p is None else model.mean_change[p]),
                model.log_var + (0 if p is None else model.log_var_change[p]),
            )
            back, sd = torch.linalg.inv(A), (0.5 * log_var).exp()
            J = torch.zeros(5, 5, dtype=torch.float64)  # (w, z) -> (w, u)
            J[:2, :2], J[:2, 2:], J[2:, 2:] = torch.eye(2), C @ back, torch.diag(sd) @ back
            shift = torch.cat([torch.zeros(2, dtype=torch.float64), mu @ back])
            prior = torch.distributions.MultivariateNormal(shift, J.T @ J)
            mine = torch.distributions.MultivariateNormal(q.loc[i] @ J + shift, J.T @ q.covariance_matrix[i] @ J)
            kl += float(torch.distributions.kl_divergence(mine, prior))
    assert abs(float(estimate.terms["z"]) + kl) < 1e-6 * kl
    x = torch.as_tensor(data.dense(np.float64))
    sigma = 1e-3 + model.likelihood.log_sigma.detach().exp()
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(2)
        from pyro import poutine

        trace = poutine.trace(poutine.replay(model, trace=poutine.trace(guide).get_trace(batch))).get_trace(batch)
        w, u = trace.nodes["z"]["value"][:, :2], trace.nodes["u"]["value"][:, 0]
        eta = model.bias + torch.cat([w, u], 1) @ model.loadings
        direct = torch.distributions.Normal(eta, sigma).log_prob(x).sum(1)
        assert (trace.nodes["x"]["fn"].log_prob(batch.x) - direct).abs().max() < 1e-5 * direct.abs().max()


def _at_one_time(adata):
    return adata[(adata.obs["time"] == 1).to_numpy()].copy()


def test_what_cannot_be_is_refused():
    data = pc.PerturbationData.from_anndata(course_screen(cells_per_condition=10, n_perturbations=3, seed=1), time_key="time")
    with pytest.raises(PyrocausalError, match="rising"):
        pc.build("cite_vae", data, times=[0.0, 2.0, 1.0])
    with pytest.raises(PyrocausalError, match="a row for each perturbation"):
        pc.build("cite_vae", data, targets=np.ones((2, 6)))
    with pytest.raises(PyrocausalError, match="transition='jump'"):
        pc.build("cite_vae", data, transition="jump")
    with pytest.warns(RuntimeWarning, match="2 times were given: the transition"):
        pc.build("cite_vae", data, times=[0.0, 3.0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, guide = pc.build("cite_vae", data, times=[0.0, 3.0])
    with pytest.raises(DataError, match="cells at time"):
        pc.fit(model, guide, data, max_epochs=1)
