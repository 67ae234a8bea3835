"""LinearLCD: recovery, what do means in it, twins, counts, and the sparse prior chosen without the truth."""

import math
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from pyro import poutine

import pyrocausal as pc
from pyrocausal.dynamics.lyapunov import lyapunov
from pyrocausal.dynamics.response import response
from pyrocausal.dynamics.select import select_settings
from pyrocausal.errors import InterventionError, PyrocausalError
from pyrocausal.graph_metrics import graph_scores, shift_correlation
from pyrocausal.linearise import closed_form
from pyrocausal.posterior import deterministic_tables, global_draws
from pyrocausal.simulate_sde import linear_sde_screen


def fitted(adata, epochs, draws=0, **settings):
    data = pc.PerturbationData.from_anndata(adata)
    model, guide = pc.build("linear_lcd", data, draws=draws, **({"standardise": False} | settings))
    return pc.fit(model, guide, data, max_epochs=epochs, kl_warmup=0.0), data


def tables(fit, draws=1):
    sampled = global_draws(fit, draws)
    out = sampled | deterministic_tables(fit, sampled, draws)
    out["drift"] = out["graph"] - np.einsum("sd,de->sde", out["decay"], np.eye(out["decay"].shape[-1]))
    return out


@pytest.fixture(scope="module")
def small():
    adata = linear_sde_screen(n_genes=10, n_perturbed=10, degree=2, doubles=2, seed=4)
    return adata, *fitted(adata, 2500, draws=20, steps=300)


@pytest.fixture(scope="module")
def point():
    """One draw only, so that answers are those of one system."""
    adata = linear_sde_screen(n_genes=10, n_perturbed=6, degree=2, seed=4)
    return adata, *fitted(adata, 600)


# -- recovery ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cells", "error"), [(200, 0.30), (2000, 0.08)])
def test_closed_form(cells, error):
    errors, scores = [], []
    for seed in range(3):
        adata = linear_sde_screen(n_genes=30, n_perturbed=30, degree=5, cells_per_perturbation=cells, seed=seed)
        truth, x = adata.uns["truth"], pd.DataFrame(np.asarray(adata.X, float))
        groups = x.groupby(adata.obs["perturbation"].astype(str).to_numpy())
        means = groups.mean()
        effects = (means - means.loc["control"]).loc[[f"gene{i:02d}" for i in range(30)]].to_numpy()
        centred = (x - groups.transform("mean")).to_numpy()
        found = closed_form(effects, centred.T @ centred / (len(x) - 31))
        off = ~np.eye(30, dtype=bool)
        errors.append(np.linalg.norm((found - truth["drift"])[off]) / np.linalg.norm(truth["drift"][off]))
        scores.append(graph_scores(found, truth["drift"]))
    assert np.mean(errors) <= error
    assert np.mean([s["auroc"] for s in scores]) >= 0.995 and np.mean([s["f1"] for s in scores]) >= 0.95


@pytest.mark.slow
def test_half_of_the_genes_are_enough():
    """Two seeds here; the sizes and graphs of the published benchmark are in ``benchmarks/causal_recovery.py``."""
    rows = []
    for seed in range(2):
        adata = linear_sde_screen(n_genes=30, n_perturbed=15, degree=5, seed=seed)
        truth = adata.uns["truth"]
        M = tables(fitted(adata, 1500)[0])["drift"][0]
        unseen = np.setdiff1d(np.arange(30), truth["targets"])
        rows.append([*graph_scores(M, truth["drift"])[["auroc", "f1", "pearson"]], shift_correlation(M, truth["drift"], unseen)])
    auroc, f1, pearson, held_out = np.mean(rows, axis=0)
    assert auroc >= 0.98 and f1 >= 0.88 and pearson >= 0.88 and held_out >= 0.80


@pytest.mark.slow
def test_control_cells_alone_give_no_more_than_their_precision_matrix():
    """Otherwise the benchmark would leak direction; 200 control cells of a published system."""
    adata = linear_sde_screen(n_genes=100, n_perturbed=2, seed=0)
    data = pc.PerturbationData.from_anndata(adata).select("control")
    model, guide = pc.build("linear_lcd", data, draws=0, standardise=False)
    fit = pc.fit(model, guide, data, max_epochs=1500, kl_warmup=0.0)
    truth = adata.uns["truth"]
    exact = graph_scores(-np.linalg.inv(truth["covariance"]), truth["drift"])["pearson"]
    assert graph_scores(tables(fit)["drift"][0], truth["drift"])["pearson"] <= min(exact, 0.66)


@pytest.mark.slow
def test_the_prior_is_chosen_by_held_out_cells():
    adata = linear_sde_screen(n_genes=20, n_perturbed=10, degree=3, effects="off_target", off_target=0.1, seed=1)
    data = pc.PerturbationData.from_anndata(adata)
    candidates = [{"off_target_rate": None}, {"off_target_rate": 9.0}, {"edge_scale": 1e-3, "edge_rate": 500.0}]
    table = select_settings(data, candidates, standardise=False, max_epochs=800)
    assert table["settings"][0] == {"off_target_rate": 9.0}
    assert table["se"][0] == 0 and (table["log_likelihood"].diff()[1:] < -3 * table["se"][1:].max() / 10).all()
    again = select_settings(data, candidates[:1], standardise=False, max_epochs=50)
    assert again.equals(select_settings(data, candidates[:1], standardise=False, max_epochs=50))
    with pytest.raises(PyrocausalError, match="candidates"):
        select_settings(data, [])


def test_intervals_of_edges(small):
    """The bootstrap is approximate, and about one mode: 90 % intervals of the 90 entries are to cover 70 %."""
    adata, fit, _ = small
    found = tables(fit, 60)["drift"]
    low, high = np.quantile(found, [0.05, 0.95], axis=0)
    off = ~np.eye(10, dtype=bool)
    truth = adata.uns["truth"]["drift"]
    assert ((low <= truth) & (truth <= high))[off].mean() >= 0.7
    assert graph_scores(found.mean(0), truth)["f1"] >= 0.9


@pytest.mark.slow
def test_knockdowns_make_pairs_that_do_not_add():
    adata = linear_sde_screen(n_genes=12, n_perturbed=8, degree=3, mechanism="knockdown", doubles=3, basal=(5.0, 10.0), seed=0)
    truth = adata.uns["truth"]
    at = {c: i for i, c in enumerate(truth["conditions"])}
    pairs = [c for c in at if "+" in c]
    error = {}
    for mechanism in ("shift", "knockdown"):
        fit, _ = fitted(adata, 1200, mechanism=mechanism)
        changes = pc.effects(fit, pairs, draws=1)["effect"][:, 0].to_numpy()
        true = np.stack([truth["means"][at[c]] - truth["means"][0] for c in pairs])
        error[mechanism] = np.linalg.norm(changes - true) / np.linalg.norm(true)
        singles = [pc.effects(fit, c.split("+"), draws=1)["effect"][:, 0].to_numpy().sum(0) for c in pairs]
        assert (np.abs(changes - np.stack(singles)).max() < 1e-5) == (mechanism == "shift")
    assert error["knockdown"] < 0.15 and error["knockdown"] < 0.5 * error["shift"]


@pytest.mark.slow
def test_penetrance_is_learned():
    adata = linear_sde_screen(n_genes=10, n_perturbed=6, degree=2, penetrance=0.6, seed=0)
    fit, _ = fitted(adata, 60, penetrance="learned")
    found = fit.guide.penetrance_logits.sigmoid().detach().numpy()
    assert np.abs(found - 0.6).max() < 0.12  # 3.5 standard errors of the share of 200 cells
    full, _ = fitted(adata, 1000)
    truth = adata.uns["truth"]["drift"]
    assert graph_scores(tables(fit)["drift"][0], truth)["pearson"] > graph_scores(tables(full)["drift"][0], truth)["pearson"]
    assert fit.history["elbo"].iloc[-1] > full.history["elbo"].iloc[-1]


# -- do ------------------------------------------------------------------------------------------------------------------------


def law(fit, data, act, cells=2):
    """The law of ``x`` under pc.do, of the point system."""
    sampled = {k: torch.as_tensor(v[0]) for k, v in global_draws(fit, 1).items()}
    given = {k: torch.tensor(v[0]) for k, v in tables(fit).items() if k == "graph"}
    model = pc.do(poutine.condition(fit.model, data=sampled), act, data, given=given) if act is not None else fit.model
    with torch.no_grad():
        batch = data.batch(range(cells))
        batch = batch if act is not None else batch.rows([0])
        return poutine.trace(poutine.condition(model, data=sampled)).get_trace(batch.hide()).nodes["x"]["fn"]


def test_dose_zero_is_the_observational_law(point):
    _, fit, data = point
    plain, zero = (
        law(fit, data.select("control"), pc.untreated()),
        law(fit, data.select("control"), pc.perturb(data.perturbations[0], dose=0.0)),
    )
    assert torch.equal(plain.loc, zero.loc) and torch.equal(plain.factor, zero.factor)
    t = tables(fit)
    assert np.abs(plain.loc[0].numpy() + t["basal"][0] @ np.linalg.inv(t["drift"][0])).max() < 1e-10
    S = lyapunov(torch.as_tensor(t["drift"][0]), torch.ones(10, dtype=torch.float64))
    assert (plain.factor @ plain.factor.T - S).abs().max() < 1e-9


def test_mean_is_linear_in_dose_and_pairs_add(point):
    _, fit, data = point
    control = data.select("control")
    a, b = data.perturbations[:2]
    base = law(fit, control, pc.untreated()).loc[0]
    one = law(fit, control, pc.perturb(a)).loc[0] - base
    for dose in (0.25, 0.5, 2.0):
        assert (law(fit, control, pc.perturb(a, dose=dose)).loc[0] - base - dose * one).abs().max() < 1e-10
    two = law(fit, control, pc.perturb(b)).loc[0] - base
    assert (law(fit, control, pc.perturb(a) & pc.perturb(b)).loc[0] - base - one - two).abs().max() < 1e-10
    both = law(fit, control, pc.perturb(b) & pc.perturb(a))
    assert torch.equal(both.loc, law(fit, control, pc.perturb(a) & pc.perturb(b)).loc)


def test_cutting_an_edge_is_the_edited_lyapunov_equation(point):
    _, fit, data = point
    t = tables(fit)
    j, k = np.unravel_index(np.argmax(np.abs(t["graph"][0])), (10, 10))
    genes = list(data.genes)
    cut = law(fit, data.select("control"), pc.cut(genes[j], genes[k]))
    M = t["drift"][0].copy()
    M[j, k] = 0
    assert np.abs(cut.loc[0].numpy() + t["basal"][0] @ np.linalg.inv(M)).max() < 1e-8
    factor = cut.factor.reshape(10, 10)
    assert (factor @ factor.T - lyapunov(torch.as_tensor(M), torch.ones(10, dtype=torch.float64))).abs().max() < 1e-8
    grown = law(fit, data.select("control"), pc.set_edge(genes[j], genes[k], float(t["graph"][0, j, k]) * 0.5))
    assert not torch.allclose(grown.loc, cut.loc)


def test_what_is_no_descendant_of_a_cut_does_not_move():
    """An acyclic system in blocks, set by hand: genes 0-5 before 6-11; the cut is inside the second block."""
    d = 12
    rng = np.random.default_rng(0)
    graph = np.triu(rng.uniform(1, 3, (d, d)) * (rng.random((d, d)) < 0.4), 1)
    graph[6, 8] = 2.0
    M = torch.tensor(graph - 2.5 * np.eye(d))
    S = lyapunov(M, torch.ones(d, dtype=M.dtype))
    edited = M.clone()
    edited[6, 8] = 0
    T = lyapunov(edited, torch.ones(d, dtype=M.dtype))
    still = [0, 1, 2, 3, 4, 5, 6, 7]
    assert (S[still][:, still] - T[still][:, still]).abs().max() < 1e-12 * S.abs().max()
    assert (S[8, 8] - T[8, 8]).abs() > 1e-3


def test_penetrance_mixes_two_laws(point):
    """Mean rho delta and covariance S + rho (1 - rho) delta delta'; 20,000 cells, bounds of 3 %."""
    _, fit, data = point
    a = data.perturbations[0]
    draws = pc.interventional(fit, [pc.perturb(a, penetrance=0.4), pc.perturb(a)], draws=20, cells=1000, noise="independent")
    control = data.select("control")
    base, full = law(fit, control, pc.untreated()), law(fit, control, pc.perturb(a))
    delta = (full.loc[0] - base.loc[0]).numpy()
    x = draws["expression"][0].to_numpy().reshape(-1, 10).astype(float)
    S = (base.factor @ base.factor.T).numpy() + 0.4 * 0.6 * np.outer(delta, delta)
    assert np.abs(x.mean(0) - base.loc[0].numpy() - 0.4 * delta).max() < 0.03 * np.abs(delta).max()
    assert np.linalg.norm(np.cov(x.T) - S) < 0.03 * np.linalg.norm(S)


def test_clamps_and_pushes(point):
    _, fit, data = point
    gene = str(data.genes[3])
    out = pc.effects(fit, {"clamp": pc.clamp(gene, 1.5), "push": pc.shift(gene, 2.0)}, draws=2)
    assert np.abs(out["expression"].sel(intervention="clamp", gene=gene) - 1.5).max() < 1e-6
    t = tables(fit)
    expected = -2.0 * np.linalg.inv(t["drift"][0])[3]
    assert np.abs(out["effect"].sel(intervention="push")[0].to_numpy() - expected).max() < 1e-5
    cells = pc.counterfactual(fit, data[:5], pc.clamp(gene, 1.5), draws=2)
    assert np.abs(cells["expression"].sel(gene=gene) - 1.5).max() < 1e-5


def test_the_factual_action_is_the_factual_cell_and_a_shift_moves_all_cells_alike(point):
    _, fit, data = point
    a, b = data.perturbations[:2]
    cells = data.select(a)[:20]
    out = pc.counterfactual(fit, cells, [pc.perturb(a), pc.untreated(), pc.perturb(b)], draws=2)
    assert np.array_equal(out["expression"][0, 0].to_numpy(), cells.dense())
    moved = out["effect"][1, 0].to_numpy()
    expected = -pc.effects(fit, a, draws=1)["effect"][0, 0].to_numpy()
    assert np.abs(moved - expected).max() < 1e-4


def test_the_transient_goes_from_law_to_law(point):
    _, fit, data = point
    a = data.perturbations[0]
    course = response(fit, [a, pc.clamp("gene3", 1.0)], [0.0, 0.05, 0.2, 1.0, 1000.0], draws=1)
    assert np.abs(course["effect"].sel(time=0.0)).max() < 1e-5
    end = pc.effects(fit, a, draws=1)["effect"][0, 0].to_numpy()
    assert np.abs(course["effect"].sel(intervention=a, time=1000.0)[0].to_numpy() - end).max() < 1e-4 * np.abs(end).max()
    early = course["effect"].sel(intervention=a, time=0.05)[0].to_numpy()
    assert str(data.genes[np.abs(early).argmax()]) == a  # the target first
    with pytest.raises(InterventionError, match="times"):
        response(fit, a, [-1.0])


def test_no_linear_diffusion_no_transient(small_screen):
    data = pc.PerturbationData.from_anndata(small_screen)
    model, guide = pc.build("sams_vae", data, n_latent=3)
    fit = pc.fit(model, guide, data, max_epochs=1)
    with pytest.raises(InterventionError, match="linear_lcd"):
        response(fit, str(data.perturbations[0]), [1.0])


# -- the contract --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [{}, {"diffusion": "learned"}, {"mechanism": "knockdown"}, {"penetrance": "learned"}, {"off_target_rate": None}, {"standardise": True}],
    ids=str,
)
def test_every_setting_keeps_the_contract(settings, tmp_path):
    adata = linear_sde_screen(n_genes=8, n_perturbed=4, degree=2, cells_per_perturbation=60, doubles=1, seed=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        fit, data = fitted(adata, 20, draws=0 if "penetrance" in settings else 3, **({"steps": 5} | settings))
        report = pc.check_model(fit.model, fit.guide, data)
        assert report, str(report)
    asked = [str(data.perturbations[0]), pc.cut("gene1", "gene2"), pc.clamp("gene0", 1.0)]
    answers = pc.effects(fit, asked, draws=3)
    assert np.isfinite(answers["effect"]).all()
    fit.save(tmp_path / "run")
    again = pc.effects(pc.load(tmp_path / "run"), asked, draws=3)
    assert answers.equals(again)
    idata = pc.to_inference_data(fit, draws=3, cells=data[:5])
    assert idata.posterior["graph"].dims == ("chain", "draw", "gene", "gene_to")
    graph = pc.to_networkx(fit, draws=5)
    assert set(graph.nodes) == {*data.genes, *(f"do({p})" for p in data.perturbations)}


def test_the_same_seed_gives_the_same_fit():
    adata = linear_sde_screen(n_genes=6, n_perturbed=3, degree=2, cells_per_perturbation=40, seed=1)
    one, two = (fitted(adata, 50, draws=3, steps=10)[0].guide.state_dict() for _ in range(2))
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


@pytest.mark.slow
@pytest.mark.parametrize("likelihood", ["poisson", "negative_binomial", "zero_inflated_poisson"])
def test_counts(likelihood):
    """The latent network behind counts beats the precision matrix of log counts, and the held-out bound rises."""
    gate = 0.2 if likelihood == "zero_inflated_poisson" else 0.0
    adata = linear_sde_screen(n_genes=20, n_perturbed=20, degree=4, cells_per_perturbation=100, counts=True, zero_inflation=gate, seed=1)
    data = pc.PerturbationData.from_anndata(adata)
    model, guide = pc.build("linear_lcd", data, likelihood=likelihood, standardise=False, draws=0)
    fit = pc.fit(model, guide, data, max_epochs=12, kl_warmup=0.0, validation=0.1)
    assert fit.history["validation"].iloc[-1] > fit.history["validation"].iloc[0]
    truth = adata.uns["truth"]["drift"]
    x = np.log1p(data.dense() / data.library_size[:, None] * np.median(data.library_size))
    means = pd.DataFrame(x).groupby(data.labels).transform("mean").to_numpy()
    baseline = graph_scores(-np.linalg.inv(np.cov((x - means).T)), truth)
    ours = graph_scores(tables(fit)["drift"][0], truth)
    assert ours["auroc"] > baseline["auroc"]
    e = pc.effects(fit, str(data.perturbations[0]), draws=2, cells=64)
    assert np.isfinite(e["effect"]).all()
    twins = pc.counterfactual(fit, data[:5], pc.untreated(), draws=2)
    assert np.isfinite(twins["expression"]).all()


def test_what_cannot_be_is_refused():
    with pytest.raises(PyrocausalError, match="likelihood='normal'"):
        pc.models.LinearLCD(3, 2, likelihood="normal")
    with pytest.raises(PyrocausalError, match="3 targets for 2"):
        pc.models.LinearLCD(3, 2, own_genes=[0, 1, 2])
    with pytest.raises(PyrocausalError, match="penetrance='learned'"):
        pc.models.LinearLCD(3, 2, likelihood="poisson", penetrance="learned")
    with pytest.raises(PyrocausalError, match="mechanism='cut'"):
        pc.models.LinearLCD(3, 2, mechanism="cut")
    assert math.isfinite(pc.models.LinearLCD(3, 2).edge_scale)
