"""Temporal Causal3DIdent: a process of nine continuous variables and a shape whose mechanisms, parents and interventions are known.

Every variable goes half of the way to a goal that its parents at time t set, angles the shorter way round; a step that is hit by an
intervention puts a value drawn from elsewhere in place of the mechanism::

    c_{t+1,k} = c_{t,k} + (goal_k(c_t, shape_t) - c_{t,k}) / 2 + sd_k z_{t,k}      or the value of the intervention

==========================  ====================================================  ================================================
variable                    goal, circular version (:func:`tc3di_circ`)           goal, box version (:func:`tc3di_box`)
==========================  ====================================================  ================================================
``x``                       1.5 sin(rot_beta)                                     .75 sin(pi rot_beta / 2)
``y``                       1.5 sin(rot_alpha)                                    .75 sin(pi rot_alpha / 2)
``z``                       1.5 cos(rot_alpha)                                    .75 cos(pi rot_alpha)
``rot_alpha``               hue_back                                              hue_back
``rot_beta``                hue_obj                                               hue_obj
``rot_spot``                atan2(x, y)                                           (2 / pi) atan2(x, y + 1.25)
``hue_obj``, by shape:      teapot 0, armadillo 2 pi / 5, cow 4 pi / 5,           -.8, -.4, 0,
..                          head 6 pi / 5, horse 8 pi / 5,                        .4, .8,
..                          hare: circular mean of hue_spot and hue_back,         hare: (hue_back - hue_spot) / 2,
..                          dragon: opposite of that mean                         dragon: (hue_spot - hue_back) / 2
``hue_spot``                2 pi - hue_back                                       -hue_back
``hue_back``                itself                                                itself
``shape``                   stays; is drawn anew with probability .05             the same
range                       positions [-2, 2], angles [0, 2 pi)                   [-1, 1]
sd                          positions .10, angles .15                             .08
==========================  ====================================================  ================================================

The noise of what is not an angle is truncated to the range. Data of one shape have ``hue_obj`` itself as the goal of ``hue_obj``.

Both functions return an ``AnnData`` with one row for each chain and time, chain by chain:

==================================  ============  ======================================================================================
where                               shape         what
==================================  ============  ======================================================================================
``X``                               [n, G]        the observation: an invertible network of the state, lifted to G features, with noise
``obs["unit"]``, ``obs["time"]``    [n]           the chain, and the time 0.0, 1.0, ...
``obs["perturbation"]``             [n]           what is done to the chain from time 1 on: one label for all of its rows
``obs["hit"]``                      [n]           what is done in the step that leads to the row, as a label ("control", "pos+hue_obj")
``obs["shape"]``                    [n]           the shape; it is not in ``X``
``obsm["state"]``                   [n, 9]        the continuous variables
``obsm["hit"]``                     [n, 10]       1 where the step that leads to the row hit the variable; 0 at time 0
``uns["truth"]["names"]``           [10]          the variables, the shape last
``uns["truth"]["parents"]``         [10, 10]      1 at (j, k) if j sets the goal of k, or is k
``uns["truth"]["perturbations"]``   [P]           names of the interventions
``uns["truth"]["targets"]``         [P, 10]       1 at the variables that they hit
``uns["truth"]["maps"]``            [L, d, d]     square matrices of the network; ``lift`` [d, G] follows them
==================================  ============  ======================================================================================

For models that know the targets of every step, read the screen with ``perturbation_key="hit"``. Pictures of the states:
:func:`~pyrocausal.simulate_raster.rasterise`.

Source: the process of CITRIS (Lippe et al., ICML 2022, arXiv 2202.03169), with its instantaneous version (iCITRIS, arXiv 2206.06169). The
box version, in which R^9 and the observations are diffeomorphic, the sustained interventions and the observations are ours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Literal, get_args

import anndata as ad
import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.special import ndtr, ndtri

from pyrocausal.errors import DataError, nearest
from pyrocausal.simulate import Array, _leaky_relu, _names
from pyrocausal.simulate_course import _conditioned

NAMES = ("x", "y", "z", "rot_alpha", "rot_beta", "rot_spot", "hue_obj", "hue_spot", "hue_back", "shape")
SHAPES = ("teapot", "armadillo", "hare", "cow", "dragon", "head", "horse")
FACTORS = {"pos": (0, 1, 2), "rot": (3, 4), "rot_spot": (5,), "hue_obj": (6,), "hue_spot": (7,), "hue_back": (8,), "shape": (9,)}
ORDER = ((8,), (7,), (6,), (3, 4), (0, 1, 2), (5,))  # in which the variables of the instantaneous version are set, the shape before all
PARENTS = {0: (4,), 1: (3,), 2: (3,), 3: (8,), 4: (6,), 5: (0, 1), 6: (7, 8, 9), 7: (8,), 8: (), 9: ()}  # apart from the variable itself
HARE, DRAGON, SHAPE = 2, 4, 9
LEVEL = np.array([0, 1, 2, 2, 2, 3, 4])  # of the shapes with a hue of their own
RESAMPLED = 0.05  # probability that a step draws the shape anew
TAU = 2 * np.pi
Integers = NDArray[np.int64]
Booleans = NDArray[np.bool_]
Schedule = Literal["bernoulli", "sustained"]
Law = Literal["uniform", "gaussian"]


@dataclass(frozen=True)
class System:
    """A version of the process: ``goals(c, shape)``, and of each variable its range, its noise, and whether it is an angle, [9]."""

    goals: Callable[[Array, Integers | None], Array]
    low: Array
    high: Array
    sd: Array
    angle: Booleans


def circ_goals(c: Array, shape: Integers | None = None) -> Array:
    """Goals [..., 9] of the circular version, from states ``c`` [..., 9] and shapes [...]; None for data of one shape."""
    x, y, _, alpha, beta, _, hue_obj, hue_spot, hue_back = np.moveaxis(c, -1, 0)
    goal = hue_obj
    if shape is not None:
        mean = np.arctan2(np.sin(hue_spot) + np.sin(hue_back), np.cos(hue_spot) + np.cos(hue_back))
        goal = _wrap(np.select([shape == HARE, shape == DRAGON], [mean, mean + np.pi], TAU / 5 * LEVEL[shape]))
    pos = 1.5 * np.sin(beta), 1.5 * np.sin(alpha), 1.5 * np.cos(alpha)
    return np.stack([*pos, hue_back, hue_obj, _wrap(np.arctan2(x, y)), goal, TAU - hue_back, hue_back], -1)


def box_goals(c: Array, shape: Integers | None = None) -> Array:
    """Goals [..., 9] of the box version, from states ``c`` [..., 9] and shapes [...]; None for data of one shape."""
    x, y, _, alpha, beta, _, hue_obj, hue_spot, hue_back = np.moveaxis(c, -1, 0)
    goal = hue_obj
    if shape is not None:
        contrast = 0.5 * (hue_back - hue_spot)
        goal = np.select([shape == HARE, shape == DRAGON], [contrast, -contrast], 0.4 * (LEVEL[shape] - 2.0))
    pos = 0.75 * np.sin(0.5 * np.pi * beta), 0.75 * np.sin(0.5 * np.pi * alpha), 0.75 * np.cos(np.pi * alpha)
    return np.stack([*pos, hue_back, hue_obj, 2 / np.pi * np.arctan2(x, y + 1.25), goal, -hue_back, hue_back], -1)


CIRC = System(circ_goals, np.repeat([-2.0, 0.0], [3, 6]), np.repeat([2.0, TAU], [3, 6]), np.repeat([0.1, 0.15], [3, 6]), np.arange(9) >= 3)
BOX = System(box_goals, np.full(9, -1.0), np.ones(9), np.full(9, 0.08), np.zeros(9, bool))


def tc3di_circ(
    n_chains: int = 100,
    n_steps: int = 600,
    n_shapes: Literal[1, 7] = 7,
    rate: float | None = None,
    instantaneous: bool = False,
    burn_in: int = 0,
    n_features: int | None = 64,
    layers: int = 2,
    noise: float = 0.02,
    seed: int = 0,
) -> ad.AnnData:
    """The published process. Its features are those of ``[pos / 2, sin(angles), cos(angles)]``, 15 numbers.

    In each step every factor (``pos`` and ``rot`` hold 3 and 2 variables, the others one) is hit with probability ``rate``, independently;
    the variables that are hit are drawn uniformly from their range. Chains start there too.

    Args:
        n_chains: chains, all at once; ``n_chains=1`` with many steps is the published form.
        n_steps: steps of each chain, whose times are 0 to ``n_steps``.
        n_shapes: 7, or 1 for data of one shape, which have no factor ``shape``.
        rate: one in the number of factors, as published, if None.
        instantaneous: goals are set by the parents at time t + 1, in the order shape, hue_back, hue_spot, hue_obj, rot, pos, rot_spot;
            hue_back has its own value at time t as its goal.
        burn_in: steps of the same process before time 0.
        n_features: at least 15; 15 if None.
        layers: matrices of the network, with a leaky ReLU between each two; 1 for linear observations.
        noise: standard deviation of the measurement.

    Raises:
        DataError: for an argument out of range.
    """
    given: dict[str, Any] = dict(locals())
    _check(given, 15)
    rng_act, rng_chain, rng_map, rng_noise = (np.random.default_rng(s) for s in np.random.SeedSequence(seed).spawn(4))
    factors = list(FACTORS)[: 7 if n_shapes == 7 else 6]
    targets = np.array([np.isin(np.arange(10), FACTORS[f]) for f in factors])
    steps = burn_in + n_steps
    act = rng_act.random((n_chains, steps, len(factors))) < (1 / len(factors) if rate is None else rate)
    value = rng_act.uniform(CIRC.low, CIRC.high, (n_chains, steps, 9))
    state, shape = _run(CIRC, act @ targets, value, n_shapes, ORDER if instantaneous else (tuple(range(9)),), instantaneous, rng_chain)
    state, shape, act = state[:, burn_in:], shape[:, burn_in:], act[:, burn_in:]
    features = np.concatenate([state[..., :3] / 2, np.sin(state[..., 3:]), np.cos(state[..., 3:])], -1)
    x, truth = _observe(features, n_features, layers, noise, rng_map, rng_noise)
    label = np.zeros(n_chains, np.int64)
    return _screen(x, state, shape, act, targets, factors, label, truth | _graph(n_shapes), given | {"simulator": "tc3di_circ"})


def tc3di_box(
    n_chains: int = 3000,
    n_steps: int = 6,
    schedule: Schedule = "bernoulli",
    n_perturbations: int = 18,
    law: Law = "uniform",
    rate: float = 0.1,
    n_shapes: Literal[1, 7] = 7,
    burn_in: int = 0,
    n_features: int | None = None,
    layers: int = 2,
    noise: float = 0.02,
    seed: int = 0,
) -> ad.AnnData:
    """The same parents on [-1, 1]^9, where nothing is periodic; its features are those of the state, 9 numbers. Chains start uniformly.

    Args:
        schedule: ``"bernoulli"``: in each step each variable is hit with probability ``rate``, independently, and drawn uniformly from its
            range; all chains are labelled "control". ``"sustained"``: a chain is a control, or is under one perturbation from time 1 on,
            which draws the variable that it targets afresh in each step; as many chains for each.
        n_perturbations: names ``pert00``, ...; number p targets variable ``p % 9``. Of the sustained schedule only, as is ``law``.
        law: of the values of a perturbation, ``"uniform"`` over the range, or ``"gaussian"``: normal about ``truth["mean"]``, +-Uniform(.3,
            .9), with ``truth["sd"]``, Uniform(.1, .3), truncated to the range; signs alternate over the perturbations of a variable.
        burn_in: steps before time 0, of the same process (``"bernoulli"``) or of that of controls.
        n_features: at least 9; 9 if None.

    The others are those of :func:`tc3di_circ`.

    Raises:
        DataError: for an argument out of range.
    """
    given: dict[str, Any] = dict(locals())
    _check(given, 9)
    rng_act, rng_chain, rng_map, rng_noise = (np.random.default_rng(s) for s in np.random.SeedSequence(seed).spawn(4))
    steps, extra = burn_in + n_steps, _graph(n_shapes)
    label = np.zeros(n_chains, np.int64)
    if schedule == "bernoulli":
        names, targets = list(NAMES[:9]), np.eye(10, dtype=bool)[:9]
        act = rng_act.random((n_chains, steps, 9)) < rate
        value = rng_act.uniform(-1, 1, (n_chains, steps, 9))
    else:
        p = np.arange(n_perturbations)
        names, targets = _names("pert", max(n_perturbations, 11))[:n_perturbations], np.eye(10, dtype=bool)[p % 9]
        label = np.arange(n_chains) * (n_perturbations + 1) // n_chains
        act = np.broadcast_to((label[:, None] == 1 + p)[:, None], (n_chains, steps, n_perturbations)).copy()
        act[:, :burn_in] = False
        value = rng_act.uniform(-1, 1, (n_chains, steps, 9))
        if law == "gaussian":
            extra["mean"] = rng_act.uniform(0.3, 0.9, n_perturbations) * rng_act.choice([-1, 1], 9)[p % 9] * (-1) ** (p // 9)
            extra["sd"] = rng_act.uniform(0.1, 0.3, n_perturbations)
            mean, sd = (np.append(extra[key], fill)[label - 1][:, None, None] for key, fill in (("mean", 0.0), ("sd", 1.0)))
            value = _truncated(mean, sd, rng_act.standard_normal(value.shape), -1.0, 1.0)
    state, shape = _run(BOX, act @ targets, value, n_shapes, (tuple(range(9)),), False, rng_chain)
    state, shape, act = state[:, burn_in:], shape[:, burn_in:], act[:, burn_in:]
    x, truth = _observe(state, n_features, layers, noise, rng_map, rng_noise)
    return _screen(x, state, shape, act, targets, names, label, truth | extra, given | {"simulator": "tc3di_box"})


def _wrap(angle: Array) -> Array:
    """Within [0, 2 pi), rounding included."""
    angle = angle % TAU
    return np.where(angle < TAU, angle, 0.0)


def _truncated(loc: Array, sd: Array, z: Array, low: Array | float, high: Array | float) -> Array:
    """Normal(loc, sd) truncated to [low, high], by inversion, from standard normal ``z``; ``loc`` lies within."""
    below, above = ndtr((low - loc) / sd), ndtr((high - loc) / sd)
    return np.clip(loc + sd * ndtri(below + (above - below) * ndtr(z)), low, high)


def step(system: System, c: Array, goal: Array, z: Array) -> Array:
    """``c_{t+1}`` [n, 9] without interventions, from ``c_t``, the goals and standard normal ``z``, all [n, 9]."""
    way = np.where(system.angle, (goal - c + np.pi) % TAU - np.pi, goal - c)
    low, high = np.where(system.angle, -np.inf, system.low), np.where(system.angle, np.inf, system.high)
    new = _truncated(c + 0.5 * way, system.sd, z, low, high)
    return np.where(system.angle, _wrap(new), new)


def _run(
    system: System, hit: Booleans, value: Array, n_shapes: int, blocks: tuple[tuple[int, ...], ...], now: bool, rng: np.random.Generator
) -> tuple[Array, Integers]:
    """States [n, S + 1, 9] and shapes [n, S + 1], from interventions ``hit`` [n, S, 10] and their values [n, S, 9].

    Goals are taken block by block from what has been set (the new shape if ``now``, else the old one), so that one block is the lagged
    process and six are the instantaneous one.
    """
    n, steps = hit.shape[:2]
    state, shape = np.empty((n, steps + 1, 9)), np.zeros((n, steps + 1), np.int64)
    state[:, 0], shape[:, 0] = rng.uniform(system.low, system.high, (n, 9)), rng.integers(n_shapes, size=n)
    for t in range(steps):
        c, z = state[:, t], rng.standard_normal((n, 9))
        anew = hit[:, t, SHAPE] | (rng.random(n) < RESAMPLED)
        shape[:, t + 1] = np.where(anew, rng.integers(n_shapes, size=n), shape[:, t])
        given, known = shape[:, t + 1 if now else t] if n_shapes > 1 else None, c.copy()
        for block in blocks:
            k, new = list(block), step(system, c, system.goals(known, given), z)
            known[:, k] = np.where(hit[:, t, k], value[:, t, k], new[:, k])
        state[:, t + 1] = known
    return state, shape


def _graph(n_shapes: int) -> dict[str, Any]:
    """Names and parents; data of one shape have no edge out of it."""
    parents = np.eye(10, dtype=np.int64)
    for k, causes in PARENTS.items():
        if n_shapes > 1 or k != 6:
            parents[list(causes), k] = 1
    return {"names": np.array(NAMES, dtype=object), "parents": parents}


def _observe(
    features: Array, n_features: int | None, layers: int, noise: float, rng_map: np.random.Generator, rng_noise: np.random.Generator
) -> tuple[Array, dict[str, Any]]:
    """The observation [n, T, G] of features [n, T, d] through well-conditioned matrices, leaky ReLUs and a lift with orthonormal rows."""
    d = features.shape[-1]
    G = d if n_features is None else n_features
    maps = np.stack([_conditioned(rng_map, d) for _ in range(layers)])
    lift = np.eye(d) if d == G else np.linalg.qr(rng_map.normal(size=(G, d)))[0].T
    h = features @ maps[0]
    for A in maps[1:]:
        h = _leaky_relu(h) @ A
    x = h @ lift
    return x + noise * rng_noise.standard_normal(x.shape), {"maps": maps, "lift": lift}


def _screen(
    x: Array, state: Array, shape: Integers, act: Booleans, targets: Booleans, names: list[str], label: Integers, truth: dict[str, Any],
    settings: dict[str, Any],
) -> ad.AnnData:  # fmt: skip
    """One row for each chain and time, from arrays [n, T + 1, ...]; ``act`` [n, T, P] are the interventions of the steps."""
    n, times = shape.shape
    act = np.concatenate([np.zeros((n, 1, len(names)), bool), act], 1).reshape(n * times, -1)
    kinds, code = np.unique(np.packbits(act, axis=1), axis=0, return_inverse=True)
    sets = np.unpackbits(kinds, axis=1, count=len(names))
    hits = np.array(["+".join(names[p] for p in np.flatnonzero(chosen)) or "control" for chosen in sets], dtype=object)
    conditions = np.array(["control", *names] if label.any() else ["control"], dtype=object)
    obs = pd.DataFrame(
        {
            "unit": pd.Categorical.from_codes(np.repeat(np.arange(n), times), _names("unit", n)),
            "time": np.tile(np.arange(times, dtype=float), n),
            "perturbation": pd.Categorical.from_codes(np.repeat(label, times), conditions),
            "hit": pd.Categorical.from_codes(code.ravel(), hits),
            "shape": pd.Categorical.from_codes(shape.ravel(), list(SHAPES)),
        },
        index=pd.Index(_names("cell", n * times)),
    )
    G = x.shape[-1]
    out = ad.AnnData(X=x.reshape(-1, G).astype(np.float32), obs=obs, var=pd.DataFrame(index=pd.Index(_names("feature", G))))
    out.obsm["state"], out.obsm["hit"] = state.reshape(-1, 9), (act @ targets).astype(np.float32)
    out.uns["X_kind"] = "normalised"
    out.uns["truth"] = truth | {
        "perturbations": np.array(names, dtype=object), "targets": targets.astype(np.int64),
        "settings": {key: value for key, value in settings.items() if value is not None},
    }  # fmt: skip
    return out


def _check(given: dict[str, Any], d: int) -> None:
    """Refuse what is out of range, where the observed state has ``d`` numbers."""
    whole = {"n_chains": 1, "n_steps": 1, "burn_in": 0, "n_features": d, "layers": 1, "seed": 0, "n_perturbations": 1}
    for name, least in whole.items():
        value = given.get(name, least)
        if name == "n_features" and value is None:
            continue
        if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
            raise DataError(f"{name}={value!r} was given; give a whole number of at least {least}")
    for name, valid in {"schedule": Schedule, "law": Law}.items():
        if name in given and given[name] not in get_args(valid):
            raise DataError(f"{name}={given[name]!r} was given{nearest(given[name], get_args(valid))}")
    for name, most in {"rate": 1.0, "noise": np.inf}.items():
        value = given[name]
        number = isinstance(value, Real) and not isinstance(value, bool)
        if not (number and 0 <= float(value) <= most and np.isfinite(value)) and not (name == "rate" and value is None and d == 15):
            raise DataError(f"{name}={value!r} was given; give a number from 0 to {most:g}")
    if given["n_shapes"] not in (1, 7):
        raise DataError(f"n_shapes={given['n_shapes']!r} was given; the process has 7 shapes, or 1")
    if given.get("schedule") == "sustained" and given["n_chains"] <= given["n_perturbations"]:
        raise DataError(
            f"n_chains={given['n_chains']} was given for {given['n_perturbations']} perturbations and the control; give a chain to each"
        )
