"""Screens over time whose latent programs follow a known mechanism: ``tvlg``, the theory-matched process of CITE-VAE.

    keep = 1 - m_p,    mu = keep b + m_p dmu_p,    variance = keep .5 + m_p v_p
    u_t  = (u_{t-1} B keep + w C keep + mu + sd z_t)(1 - L keep)^-1,      w, z_t ~ Normal(0, I),      x = mix(w, u_t) + noise

Every perturbation targets one program, each program is the target of as many: its parents are cut, its mean moves by +-Uniform(1, 2.5), and
its variance becomes Uniform(.1, 1.5).
"""

from __future__ import annotations

from typing import Literal

import anndata as ad
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from pyrocausal.errors import DataError

Array = NDArray[np.float64]
SLOPE = 0.2  # of the leaky ReLU below zero


def course_screen(
    n_latent: int = 3,
    n_invariant: int = 2,
    n_perturbations: int = 12,
    times: int = 4,
    cells_per_condition: int = 1200,
    n_genes: int | None = None,
    mixing: Literal["linear", "leaky"] = "linear",
    doubles: int = 0,
    cells_per_double: int | None = None,
    changes: bool = True,
    trajectories: bool = False,
    penetrance: float = 1.0,
    noise: float = 0.02,
    seed: int = 0,
) -> ad.AnnData:
    """Snapshots: every cell is measured once, at one of the times 0 to ``times - 1``; perturbations act after time 0. Or trajectories.

    ``|L|`` ~ Uniform(.4, .9); B ~ Uniform(.3, .7) on the diagonal, +-Uniform(.1, .3) above it; C ~ +-Uniform(.2, .6) sqrt(2 / n_invariant).

    Args:
        cells_per_condition: of each treatment at each time; units of each treatment, if ``trajectories``.
        n_genes: at least n_latent + n_invariant; that number if None.
        mixing: a linear map, or two with a leaky ReLU between them.
        doubles: random pairs of perturbations of two different programs, labelled ``A+B``.
        changes: False for a screen in which perturbations do nothing.
        trajectories: units are seen at all times; a row for each unit and time, the unit in ``obs["unit"]``.
        penetrance: share of the cells in which a perturbation takes; which, in ``obs["took"]``.
        noise: standard deviation of the measurement.

    Returns:
        AnnData with ``obs["perturbation"]``, ``obs["time"]``, ``obsm["u"]``, ``obsm["w"]``, and in ``uns["truth"]`` the tables ``instant``
        L, ``lagged`` B, ``invariant`` C, ``mean`` b, ``targets`` [P, D], ``effect`` dmu, ``variance`` v, and the ``loadings`` of linear
        mixing.
    """
    D, n_w, P, d = n_latent, n_invariant, n_perturbations, n_latent + n_invariant
    G = d if n_genes is None else n_genes
    if min(D, n_w, P, cells_per_condition) < 1 or times < 2 or d > G:
        raise DataError(f"{D} programs, {n_w} invariant, {P} perturbations, {times} times, {G} genes were asked for; give more of each")
    rng = np.random.default_rng(seed)

    def signed(low: float, high: float, shape: tuple[int, ...]) -> Array:
        return rng.uniform(low, high, shape) * rng.choice([-1.0, 1.0], shape)

    L = np.triu(signed(0.4, 0.9, (D, D)), 1)
    B = np.diag(rng.uniform(0.3, 0.7, D)) + np.triu(signed(0.1, 0.3, (D, D)), 1)
    C = signed(0.2, 0.6, (n_w, D)) * np.sqrt(2 / n_w)
    b = rng.normal(0, 0.5, D)
    m = np.eye(D)[np.arange(P) % D]
    dmu, v = signed(1.0, 2.5, (P, D)) * m, np.where(m > 0, rng.uniform(0.1, 1.5, (P, D)), 0.5)
    names = [f"pert{p:0{len(str(P - 1))}d}" for p in range(P)]
    pairs = [(i, j) for i in range(P) for j in range(i + 1, P) if i % D != j % D]
    chosen = [pairs[k] for k in rng.permutation(len(pairs))[:doubles]]
    treatments = [(), *[(p,) for p in range(P)], *chosen]
    maps = [_conditioned(rng, d) for _ in range(1 if mixing == "linear" else 2)]
    lift = np.eye(d) if d == G else np.linalg.qr(rng.normal(size=(G, d)))[0].T

    parts: list[tuple[Array, Array, Array]] = []
    obs: list[pd.DataFrame] = []
    for treatment in treatments:
        n = cells_per_double if cells_per_double and len(treatment) == 2 else cells_per_condition
        for last in [times - 1] if trajectories else range(times):
            w, u, path = rng.normal(size=(n, n_w)), np.zeros((n, D)), []
            took = rng.random((n, len(treatment))) < penetrance if penetrance < 1 else np.ones((n, len(treatment)), bool)
            for t in range(last + 1):
                on = took[:, :, None] * m[list(treatment)] * (changes and t > 0)  # [n, treatments, D]
                keep = np.prod(1 - on, axis=1)
                mu = keep * b + (on * dmu[list(treatment)]).sum(1)
                log_var = keep * np.log(0.5) + (on * np.log(v[list(treatment)])).sum(1)
                push = (u @ B) * keep * (t > 0) + (w @ C) * keep + mu + np.exp(0.5 * log_var) * rng.normal(size=(n, D))
                u = _solved(push, L, keep)
                path.append(u)
            for t in range(last + 1) if trajectories else [last]:
                h = np.concatenate([w, path[t]], 1) @ maps[0]
                for A in maps[1:]:
                    h = np.where(h > 0, h, SLOPE * h) @ A
                parts.append((h @ lift + noise * rng.normal(size=(n, G)), path[t], w))
                rows = {"perturbation": "+".join(names[p] for p in treatment) or "control", "time": float(t), "took": took.all(1)}
                rows |= {"unit": [f"unit{len(obs) // times * 10**6 + i}" for i in range(n)]} if trajectories else {}
                obs.append(pd.DataFrame(rows))
    x, u, w = (np.concatenate(each) for each in zip(*parts, strict=True))
    frame = pd.concat(obs, ignore_index=True)
    frame.index = pd.Index([f"cell{i}" for i in range(len(frame))])
    adata = ad.AnnData(x.astype(np.float32), frame, pd.DataFrame(index=[f"gene{g:0{len(str(G - 1))}d}" for g in range(G)]))
    adata.obsm["u"], adata.obsm["w"] = u.astype(np.float32), w.astype(np.float32)
    adata.uns["X_kind"] = "normalised"
    truth = {"instant": L, "lagged": B, "invariant": C, "mean": b, "targets": m, "effect": dmu, "variance": v}
    adata.uns["truth"] = truth | {"perturbations": names}
    if mixing == "linear":
        adata.uns["truth"]["loadings"] = maps[0] @ lift
    return adata


def _solved(push: Array, L: Array, keep: Array) -> Array:
    """Programs u [n, D] with ``u = u L keep + push``, L strictly upper triangular."""
    u = push.copy()
    for k in range(1, push.shape[1]):
        u[:, k] += (u[:, :k] @ L[:k, k]) * keep[:, k]
    return u


def _conditioned(rng: np.random.Generator, d: int) -> Array:
    """A random square matrix whose condition number is in the lowest quarter of its kind."""
    tried = [A / np.linalg.norm(A, axis=0) for A in (rng.uniform(-1, 1, (d, d)) for _ in range(100))]
    return sorted(tried, key=np.linalg.cond)[int(rng.integers(25))]
