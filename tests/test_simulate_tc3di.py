"""Temporal Causal3DIdent: goals against the published table, chains against their law.

Statistical checks compare a family of statistics with the normal quantile of a union bound (``bound``), or a p-value with .001 over the
number of p-values: at a fresh seed a correct simulator would fail one such check with probability of about .001. The tolerances of the
acceptance check (rates .005, shape changes .006, deviations .005 and .03) are more than four standard errors at the 100,000 steps used.
"""

from __future__ import annotations

import cmath
import math
from typing import Any

import anndata as ad
import numpy as np
import pytest
from scipy import stats

import pyrocausal as pc
from pyrocausal.errors import DataError
from pyrocausal.simulate_tc3di import BOX, CIRC, System, box_goals, circ_goals, step, tc3di_box, tc3di_circ

NAMES = ["x", "y", "z", "rot_alpha", "rot_beta", "rot_spot", "hue_obj", "hue_spot", "hue_back", "shape"]
TABLE = {
    "x": {"rot_beta"}, "y": {"rot_alpha"}, "z": {"rot_alpha"}, "rot_alpha": {"hue_back"}, "rot_beta": {"hue_obj"},
    "rot_spot": {"x", "y"}, "hue_obj": {"shape", "hue_spot", "hue_back"}, "hue_spot": {"hue_back"}, "hue_back": {"hue_back"},
    "shape": set(),
}  # fmt: skip
PLAIN: dict[str, Any] = {"n_features": None, "layers": 1}
CHAINS, STEPS = 250, 400
SYSTEMS = {"circ": CIRC, "box": BOX}


def bound(n: int, alpha: float = 1e-3) -> float:
    """What the largest of n standard normals, dependent or not, exceeds in size with probability below alpha."""
    return float(stats.norm.isf(alpha / (2 * n)))


@pytest.fixture(scope="module")
def circ() -> ad.AnnData:
    return tc3di_circ(CHAINS, STEPS, **PLAIN)


def chains(adata: ad.AnnData) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """States [n, T + 1, 9], shapes [n, T + 1] and hits [n, T + 1, 10]."""
    n = adata.obs["unit"].nunique()
    shape = adata.obs["shape"].cat.codes.to_numpy().astype(int)
    return adata.obsm["state"].reshape(n, -1, 9), shape.reshape(n, -1), adata.obsm["hit"].reshape(n, -1, 10) == 1


def circ_by_hand(v: dict[str, float], shape: str | None) -> dict[str, float]:
    mean = cmath.phase(cmath.exp(1j * v["hue_spot"]) + cmath.exp(1j * v["hue_back"]))
    own = {"teapot": 0, "armadillo": 2 * math.pi / 5, "cow": 4 * math.pi / 5, "head": 6 * math.pi / 5, "horse": 8 * math.pi / 5}
    hue = {**own, "hare": mean, "dragon": math.pi + mean, None: v["hue_obj"]}[shape]
    return {
        "x": 1.5 * math.sin(v["rot_beta"]), "y": 1.5 * math.sin(v["rot_alpha"]), "z": 1.5 * math.cos(v["rot_alpha"]),
        "rot_alpha": v["hue_back"], "rot_beta": v["hue_obj"], "rot_spot": math.atan2(v["x"], v["y"]), "hue_obj": hue,
        "hue_spot": 2 * math.pi - v["hue_back"], "hue_back": v["hue_back"],
    }  # fmt: skip


def box_by_hand(v: dict[str, float], shape: str | None) -> dict[str, float]:
    half = (v["hue_back"] - v["hue_spot"]) / 2
    own = {"teapot": -0.8, "armadillo": -0.4, "cow": 0.0, "head": 0.4, "horse": 0.8}
    hue = {**own, "hare": half, "dragon": -half, None: v["hue_obj"]}[shape]
    return {
        "x": 0.75 * math.sin(math.pi * v["rot_beta"] / 2), "y": 0.75 * math.sin(math.pi * v["rot_alpha"] / 2),
        "z": 0.75 * math.cos(math.pi * v["rot_alpha"]), "rot_alpha": v["hue_back"], "rot_beta": v["hue_obj"],
        "rot_spot": 2 / math.pi * math.atan2(v["x"], v["y"] + 1.25), "hue_obj": hue,
        "hue_spot": -v["hue_back"], "hue_back": v["hue_back"],
    }  # fmt: skip


def draws(system: System, n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.uniform(system.low, system.high, (n, 9)), np.arange(n) % 7


def short(difference: np.ndarray) -> np.ndarray:
    """Angles in [-pi, pi): the shorter way round."""
    return np.angle(np.exp(1j * difference))


def residuals(system: System, c: np.ndarray, goal: np.ndarray, new: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``new`` less half of the way from c to the goal, and its probability under the noise: normal on angles, truncated elsewhere."""
    way = np.where(system.angle, short(goal - c), goal - c)
    centre = c + way / 2
    r = np.where(system.angle, short(new - centre), new - centre)
    low, high = (np.where(system.angle, s * np.inf, (e - centre) / system.sd) for s, e in ((-1, system.low), (1, system.high)))
    return r, stats.truncnorm.cdf(r / system.sd, low, high)


@pytest.mark.parametrize("name", SYSTEMS)
def test_goals_are_the_table(name: str) -> None:
    system, by_hand = SYSTEMS[name], {"circ": circ_by_hand, "box": box_by_hand}[name]
    c, shape = draws(system, 70)
    words = ["teapot", "armadillo", "hare", "cow", "dragon", "head", "horse"]
    for given, word in ((shape, lambda i: words[shape[i]]), (None, lambda i: None)):
        goal = system.goals(c, given)
        expected = [by_hand(dict(zip(NAMES, row, strict=False)), word(i)) for i, row in enumerate(c.tolist())]
        difference = goal - np.array([[e[k] for k in NAMES[:9]] for e in expected])
        assert np.abs(np.where(system.angle, short(difference), difference)).max() < 1e-12


@pytest.mark.parametrize("n_shapes", [7, 1])
@pytest.mark.parametrize("name", SYSTEMS)
def test_parents_are_the_table_by_finite_differences(name: str, n_shapes: int) -> None:
    """A parent changes the goal; what is no parent leaves it the same to the last bit. The whole step depends on the variable too."""
    system, simulate = SYSTEMS[name], {"circ": tc3di_circ, "box": tc3di_box}[name]
    c, shape = draws(system, 700)
    c = 0.9 * c + 0.04 * (system.low + system.high)
    z = np.random.default_rng(1).normal(size=c.shape)
    goal = system.goals(c, shape if n_shapes > 1 else None)
    after = step(system, c, goal, z)
    acts, moves = np.zeros((10, 9), int), np.zeros((10, 9), int)
    for j in range(10):
        other, form = c.copy(), shape
        if j < 9:
            other[:, j] += 0.01
        else:
            form = (shape + 1) % 7
        changed = system.goals(other, form if n_shapes > 1 else None)
        acts[j] = (changed != goal).any(0)
        moves[j] = (step(system, other, changed, z) != after).any(0)
    table = {k: parents for k, parents in TABLE.items() if k != "shape"}
    if n_shapes == 1:
        table["hue_obj"] = {"hue_obj"}
    expected = np.array([[j in parents for parents in table.values()] for j in NAMES])
    np.testing.assert_array_equal(acts, expected)
    np.testing.assert_array_equal(moves, expected | np.eye(10, 9, dtype=bool))
    truth = simulate(2, 1, n_shapes=n_shapes, **PLAIN).uns["truth"]  # type: ignore[operator]
    assert list(truth["names"]) == NAMES
    np.testing.assert_array_equal(truth["parents"][:, :9], moves)
    np.testing.assert_array_equal(truth["parents"][:, 9], np.eye(10)[9])


@pytest.mark.parametrize("name", SYSTEMS)
def test_steps_go_half_of_the_way_the_shorter_way_round(name: str) -> None:
    system = SYSTEMS[name]
    c, shape = draws(system, 700)
    goal, zero = system.goals(c, shape), np.zeros_like(c)
    expected, clear = np.empty_like(c), np.ones(c.shape, bool)
    for i, k in np.ndindex(*c.shape):
        ways = [goal[i, k] - c[i, k] + turn for turn in ((-2 * np.pi, 0.0, 2 * np.pi) if system.angle[k] else (0.0,))]
        expected[i, k] = c[i, k] + min(ways, key=abs) / 2
        clear[i, k] = system.angle[k] or system.high[k] - abs(expected[i, k]) > 7 * system.sd[k]  # the truncation is not felt
    for z in (-1.0, 0.0, 1.0):
        error = step(system, c, goal, zero + z) - expected - z * system.sd
        assert np.abs(np.where(system.angle, short(error), error))[clear].max() < 1e-10
    assert clear.mean() > 0.5
    edge = np.array([[0.0] * 3 + [0.1, 0.1, 6.2, 3.0, 0.5, 6.0]])
    to = np.array([[0.0] * 3 + [2 * np.pi - 0.3, 3.0, 0.2, 3.5, 6.2, 0.3]])
    new = step(CIRC, edge, to, np.zeros((1, 9)))[0, 3:]
    tau = 2 * np.pi
    np.testing.assert_allclose(new, [tau - 0.1, 1.55, (6.4 + tau) / 2 % tau, 3.25, (6.7 - tau) / 2, (6.3 + tau) / 2 % tau], atol=1e-10)


def test_published_statistics(circ: ad.AnnData) -> None:
    """The acceptance check: rates, residuals, positions and shape changes over 100,000 steps."""
    c, shape, hit = chains(circ)
    rates = hit[:, 1:].mean((0, 1))
    assert np.abs(rates - 1 / 7).max() < 0.005
    r, _ = residuals(CIRC, c[:, :-1], circ_goals(c[:, :-1], shape[:, :-1]), c[:, 1:])
    sd = np.array([r[..., k][~hit[:, 1:, k]].std() for k in range(9)])
    assert np.abs(sd - np.repeat([0.10, 0.15], [3, 6])).max() < 0.005
    assert np.abs(c[..., :3].std((0, 1)) - [0.89, 0.92, 0.92]).max() < 0.03
    assert abs((shape[:, 1:] != shape[:, :-1]).mean() - 0.159) < 0.006
    assert np.abs(np.exp(1j * c[..., 3:]).mean((0, 1))).max() < 0.05  # angles are uniform; chains are long, not independent
    assert (np.abs(c[..., :3]) <= 2).all() and (c[..., 3:] >= 0).all() and (c[..., 3:] < 2 * np.pi).all()


def test_noise_has_the_truncated_law(circ: ad.AnnData) -> None:
    """What no intervention hit, in chains; and steps from the edges of the range, where half of the noise would leave it."""
    box = tc3di_box(500, 40, **PLAIN)
    p_values = []
    for system, adata in ((CIRC, circ), (BOX, box)):
        c, shape, hit = chains(adata)
        c, shape, hit = c[:, :41], shape[:, :41], hit[:, :41]
        _, u = residuals(system, c[:, :-1], system.goals(c[:, :-1], shape[:, :-1]), c[:, 1:])
        p_values += [stats.kstest(u[..., k][~hit[:, 1:, k]], "uniform").pvalue for k in range(9)]
        edge = np.where(np.arange(4000)[:, None] % 2, system.low, system.high)
        new = step(system, edge, edge, np.random.default_rng(0).normal(size=(4000, 9)))
        assert (new >= system.low).all() and (new <= system.high).all()
        p_values += [stats.kstest(residuals(system, edge, edge, new)[1][:, k], "uniform").pvalue for k in range(9)]
    assert min(p_values) > 1e-3 / len(p_values)
    assert (np.abs(chains(box)[0]) <= 1).all()


def test_interventions_are_perfect_uniform_and_independent(circ: ad.AnnData) -> None:
    c, shape, hit = chains(circ)
    assert not hit[:, 0].any()
    h = hit[:, 1:].reshape(-1, 10)
    np.testing.assert_array_equal(h[:, [1, 2]], h[:, [0, 0]])
    np.testing.assert_array_equal(h[:, 3], h[:, 4])
    factors = h[:, [0, 3, 5, 6, 7, 8, 9]].astype(float)
    correlation = np.corrcoef(factors.T)[np.triu_indices(7, 1)]
    assert np.abs(correlation * np.sqrt(len(h))).max() < bound(21)
    p, pairs = 1 / 7, CHAINS * (STEPS - 1)  # neighbouring pairs share a step: twice the covariance p^3 - p^4
    again = (hit[:, 2:] & hit[:, 1:-1]).mean((0, 1)) - p**2
    assert np.abs(again).max() < bound(10) * np.sqrt((p**2 - p**4 + 2 * (p**3 - p**4)) / pairs)
    value = (c - CIRC.low) / (CIRC.high - CIRC.low)
    p_values = [stats.kstest(value[:, 1:, k][hit[:, 1:, k]], "uniform").pvalue for k in range(9)]
    p_values += [stats.kstest(value[:, 0, k], "uniform").pvalue for k in range(9)]
    p_values.append(stats.chisquare(np.bincount(shape[:, 1:][hit[:, 1:, 9]], minlength=7)).pvalue)
    assert min(p_values) > 1e-3 / len(p_values)
    free = ~hit[:, 1:, 9]
    changed = (shape[:, 1:] != shape[:, :-1])[free]
    assert abs(changed.mean() - 0.05 * 6 / 7) < bound(1) * np.sqrt(0.043 * 0.957 / free.sum())
    label = circ.obs["hit"].astype(str).to_numpy()
    members = {"pos": 0, "rot": 3, "rot_spot": 5, "hue_obj": 6, "hue_spot": 7, "hue_back": 8, "shape": 9}
    for f, k in members.items():
        np.testing.assert_array_equal([f in parts.split("+") for parts in label], circ.obsm["hit"][:, k] == 1)
    truth = circ.uns["truth"]
    assert list(truth["perturbations"]) == list(members)
    assert [set(np.flatnonzero(row)) for row in truth["targets"]] == [{0, 1, 2}, {3, 4}, {5}, {6}, {7}, {8}, {9}]


@pytest.mark.parametrize("n_shapes", [7, 1])
def test_instantaneous_goals_come_from_the_next_state(n_shapes: int) -> None:
    adata = tc3di_circ(200, 100, n_shapes=n_shapes, instantaneous=True, **PLAIN)  # type: ignore[arg-type]
    c, shape, hit = chains(adata)
    assert abs(hit[:, 1:].mean() - (1 / 7 if n_shapes == 7 else 0.9 / 6)) < 0.005
    new, form = c[:, 1:], shape[:, 1:] if n_shapes == 7 else None
    goal = circ_goals(new, form)
    goal[..., 8] = c[:, :-1, 8]
    if n_shapes == 1:
        goal[..., 6] = c[:, :-1, 6]
    r, u = residuals(CIRC, c[:, :-1], goal, new)
    p_values = [stats.kstest(u[..., k][~hit[:, 1:, k]], "uniform").pvalue for k in range(9)]
    assert min(p_values) > 1e-3 / 9
    lagged, _ = residuals(CIRC, c[:, :-1], circ_goals(c[:, :-1], None if n_shapes == 1 else shape[:, :-1]), new)
    for k in (0, 1, 2, 3, 4, 5, 7):
        assert lagged[..., k][~hit[:, 1:, k]].std() > 1.1 * r[..., k][~hit[:, 1:, k]].std()


@pytest.mark.parametrize("law", ["uniform", "gaussian"])
def test_sustained_perturbations_replace_one_mechanism(law: Any) -> None:
    adata = tc3di_box(3800, 6, "sustained", n_perturbations=18, law=law, **PLAIN)
    c, shape, hit = chains(adata)
    truth, label = adata.uns["truth"], adata.obs["perturbation"].astype(str).to_numpy().reshape(3800, 7)
    assert (label == label[:, :1]).all() and list(truth["perturbations"]) == [f"pert{p:02d}" for p in range(18)]
    names, counts = np.unique(label[:, 0], return_counts=True)
    assert len(names) == 19 and set(counts) == {200}
    np.testing.assert_array_equal(adata.obs["time"].to_numpy(), np.tile(np.arange(7.0), 3800))
    p_values, z = [], []
    for p, name in enumerate(truth["perturbations"]):
        rows, k = label[:, 0] == name, p % 9
        np.testing.assert_array_equal(truth["targets"][p], np.eye(10)[k])
        expected = np.zeros((7, 10), bool)
        expected[1:, k] = True
        assert (hit[rows] == expected).all()
        value = c[rows][:, 1:, k]
        if law == "gaussian":
            m, s = truth["mean"][p], truth["sd"][p]
            assert 0.3 <= abs(m) <= 0.9 and 0.1 <= s <= 0.3
            cdf = stats.truncnorm((-1 - m) / s, (1 - m) / s, m, s).cdf
        else:
            cdf = stats.uniform(-1, 2).cdf
        p_values.append(stats.kstest(value.ravel(), cdf).pvalue)
        z.append(np.corrcoef(value[:, 1:].ravel(), value[:, :-1].ravel())[0, 1] * np.sqrt(value[:, 1:].size))
    assert np.abs(z).max() < bound(18)  # drawn afresh in each step
    assert not hit[label[:, 0] == "control"].any()
    _, u = residuals(BOX, c[:, :-1], box_goals(c[:, :-1], shape[:, :-1]), c[:, 1:])
    p_values += [stats.kstest(u[..., k][~hit[:, 1:, k]], "uniform").pvalue for k in range(9)]
    p_values += [stats.kstest(c[:, 0, k], stats.uniform(-1, 2).cdf).pvalue for k in range(9)]
    assert min(p_values) > 1e-3 / len(p_values)
    if law == "gaussian":
        assert (truth["mean"][:9] * truth["mean"][9:] < 0).all()


def test_bernoulli_hits_of_the_box() -> None:
    adata = tc3di_box(2000, 10, **PLAIN)
    c, shape, hit = chains(adata)
    rate = hit[:, 1:, :9].mean((0, 1))
    assert np.abs(rate - 0.1).max() < bound(9) * np.sqrt(0.09 / 20_000)
    assert not hit[..., 9].any() and set(adata.obs["perturbation"]) == {"control"}
    p_values = [stats.kstest(c[:, 1:, k][hit[:, 1:, k]], stats.uniform(-1, 2).cdf).pvalue for k in range(9)]
    assert min(p_values) > 1e-3 / 9
    assert abs((shape[:, 1:] != shape[:, :-1]).mean() - 0.05 * 6 / 7) < bound(1) * np.sqrt(0.043 * 0.957 / 20_000)
    np.testing.assert_array_equal(adata.uns["truth"]["targets"], np.eye(10)[:9])


@pytest.mark.parametrize("simulate", [tc3di_circ, tc3di_box])
def test_seed_and_burn_in(simulate: Any) -> None:
    a, b = simulate(40, 5, seed=3), simulate(40, 5, seed=3)
    np.testing.assert_array_equal(a.X, b.X)
    assert a.obs.equals(b.obs) and (a.obsm["hit"] == b.obsm["hit"]).all()
    assert not np.array_equal(a.obsm["state"], simulate(40, 5, seed=4).obsm["state"])
    plain = simulate(40, 5, n_features=20, layers=1, noise=0.0, seed=3)
    np.testing.assert_array_equal(a.obsm["state"], plain.obsm["state"])
    late, (c, shape, hit) = chains(simulate(40, 3, burn_in=2, seed=3)), chains(a)
    np.testing.assert_array_equal(late[0], c[:, 2:])
    np.testing.assert_array_equal(late[1], shape[:, 2:])
    np.testing.assert_array_equal(late[2][:, 1:], hit[:, 3:])


def test_controls_run_before_sustained_perturbations_do() -> None:
    """Time 0 is that of chains to which nothing is ever done, to the last bit."""
    sustained = chains(tc3di_box(190, 2, "sustained", n_perturbations=9, burn_in=20, **PLAIN))
    alone = chains(tc3di_box(190, 2, "bernoulli", rate=0.0, burn_in=20, **PLAIN))
    np.testing.assert_array_equal(sustained[0][:, 0], alone[0][:, 0])
    untouched = ~sustained[2].any((1, 2))
    np.testing.assert_array_equal(sustained[0][untouched], alone[0][untouched])
    assert untouched.sum() == 19 and (sustained[0][~untouched][:, 1] != alone[0][~untouched][:, 1]).any(1).all()


def test_observations_can_be_inverted() -> None:
    for simulate, d, G in ((tc3di_circ, 15, 64), (tc3di_box, 9, 9), (tc3di_box, 9, 30)):
        kw: dict[str, Any] = {"n_chains": 50, "n_steps": 5, "n_features": G, "layers": 3}
        adata = simulate(noise=0.0, **kw)
        truth, state = adata.uns["truth"], adata.obsm["state"]
        h = adata.X.astype(float) @ np.linalg.pinv(truth["lift"])
        for A in truth["maps"][:0:-1]:
            h = h @ np.linalg.inv(A)
            h = np.where(h > 0, h, h / 0.2)
        h = h @ np.linalg.inv(truth["maps"][0])
        angles = state[:, 3:]
        features = state if d == 9 else np.concatenate([state[:, :3] / 2, np.sin(angles), np.cos(angles)], 1)
        np.testing.assert_allclose(h, features, atol=1e-4)
        error = simulate(noise=0.05, **kw).X - adata.X
        assert abs(error.std() / 0.05 - 1) < bound(1) / np.sqrt(2 * error.size)


def test_is_a_screen_of_the_library(circ: ad.AnnData, tmp_path: Any) -> None:
    sustained = tc3di_box(60, 3, "sustained", n_perturbations=4)
    data = pc.PerturbationData.from_anndata(sustained, time_key="time")
    assert list(data.perturbations) == [f"pert{p:02d}" for p in range(4)] and set(data.time) == {0.0, 1.0, 2.0, 3.0}
    dose = data.dose.toarray() @ sustained.uns["truth"]["targets"]
    np.testing.assert_array_equal((dose * (data.time > 0)[:, None]), sustained.obsm["hit"])
    steps = pc.PerturbationData.from_anndata(circ[:4000].copy(), perturbation_key="hit", time_key="time")
    order = [list(circ.uns["truth"]["perturbations"]).index(p) for p in steps.perturbations]
    np.testing.assert_array_equal(steps.dose.toarray() @ circ.uns["truth"]["targets"][order], circ.obsm["hit"][:4000])
    for adata in (sustained, tc3di_circ(3, 4), tc3di_box(20, 2, "sustained", law="gaussian")):
        adata.write_h5ad(tmp_path / "screen.h5ad")
        back = ad.read_h5ad(tmp_path / "screen.h5ad")
        for key in set(adata.uns["truth"]) - {"settings"}:
            np.testing.assert_array_equal(back.uns["truth"][key], adata.uns["truth"][key])


@pytest.mark.parametrize(
    ("simulate", "wrong"),
    [
        (tc3di_circ, {"n_chains": 0}), (tc3di_circ, {"n_steps": 2.5}), (tc3di_circ, {"n_shapes": 3}), (tc3di_circ, {"rate": 1.2}),
        (tc3di_circ, {"n_features": 14}), (tc3di_circ, {"layers": 0}), (tc3di_circ, {"noise": -0.1}), (tc3di_circ, {"seed": -1}),
        (tc3di_circ, {"burn_in": -1}), (tc3di_box, {"noise": float("nan")}), (tc3di_box, {"n_features": 8}), (tc3di_box, {"rate": None}),
        (tc3di_box, {"schedule": "once"}), (tc3di_box, {"law": "normal"}), (tc3di_box, {"n_perturbations": True}),
        (tc3di_box, {"n_chains": 18, "schedule": "sustained"}),
    ],
)  # fmt: skip
def test_refusals_name_the_argument(simulate: Any, wrong: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=next(iter(wrong)) + "="):
        simulate(**wrong)
