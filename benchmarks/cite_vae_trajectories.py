"""CITE-VAE where units are seen at several times: every figure beside its bar.

python benchmarks/cite_vae_trajectories.py linear [--learned]   the theory-matched process (4 + 7 latents, 5 times, 300 units for each of 13
                                                                treatments, 100 genes), linear mixing
python benchmarks/cite_vae_trajectories.py leaky                two-layer mixing through an exact bijection, 3 + 2 and 4 + 7 latents
python benchmarks/cite_vae_trajectories.py amortised            linear mixing through an encoder and a network for a decoder, 3 + 2 latents
python benchmarks/cite_vae_trajectories.py controls             free weights, treatments ignored, perturbations that do nothing
python benchmarks/cite_vae_trajectories.py individual           counterfactual paths of observed controls (4 + 2 latents)
python benchmarks/cite_vae_trajectories.py box [--images]       Temporal Causal3DIdent on its box, targets known at each step and ignored;
                                                                --noise .02 for a measurement that loses some of the state
python benchmarks/cite_vae_trajectories.py alignment            the companion paper's penalty, static, through an encoder, two mixings

Seeds of the data 0 to 2. Screens of the linear process are reduced to their leading principal components, which loses nothing but noise.
Restarts are chosen by held-out units.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import torch
from cite_vae import Array, block, matched, report, transition_error
from sklearn.neural_network import MLPRegressor
from sklearn.preprocessing import StandardScaler

import pyrocausal as pc
from pyrocausal.simulate_course import course_screen
from pyrocausal.simulate_raster import rasterise
from pyrocausal.simulate_tc3di import tc3di_box

EXTRA = 10  # components beyond as many as there are latents


def units_of(adata: ad.AnnData, key: str = "perturbation") -> pc.PerturbationData:
    return pc.PerturbationData.from_anndata(adata, perturbation_key=key, time_key="time", unit_key="unit", kind="normalised")


def truth_of(adata: ad.AnnData, data: pc.PerturbationData, name: str) -> Array:
    """A table of the cells by unit and time, [n, T + 1, ...]."""
    row = data.cells.get_indexer(adata.obs["unit"].astype(str))
    at = np.searchsorted(np.unique(adata.obs["time"]), adata.obs["time"].to_numpy())
    out = np.empty((len(data), at.max() + 1, adata.obsm[name].shape[1]))
    out[row, at] = adata.obsm[name]
    return out


def components(data: pc.PerturbationData, k: int) -> pc.PerturbationData:
    """The same units in ``k`` leading principal components of what was seen."""
    assert data.path is not None
    x = data.path.reshape(-1, data.path.shape[-1]).astype(float)
    centre = x.mean(0)
    axes = np.linalg.svd((x - centre)[:: max(1, len(x) // 20000)], full_matrices=False)[2][:k].T
    path = ((data.path - centre) @ axes).astype(np.float32)
    names = pd.Index([f"component{i:02d}" for i in range(k)], name="gene")
    return replace(data, x=path[:, -1], path=path, genes=names)


def states_of(fit: pc.Fit, data: pc.PerturbationData) -> tuple[Array, Array]:
    """Posterior mean invariant states [n, I] and programs [n, T + 1, D]."""
    as_was = pc.pulse(pc.untreated(), float(fit.model.times[0]), float(fit.model.times[0]))
    batch = data.batch()
    with torch.no_grad():
        w, _ = fit.model.split(fit.guide.posterior(batch).mean)
    return w.numpy(), pc.trajectory(fit, {"as it was": as_was}, data, draws=4)["program"][0].mean("draw").to_numpy()


def fitted(data: pc.PerturbationData, sizes: tuple[int, int], restarts: int, epochs: int, lr: float = 1e-1, **settings: Any) -> pc.Fit:
    model, guide = pc.build("cite_vae", data, n_latent=sizes[0], n_invariant=sizes[1], **settings)
    return pc.fit(model, guide, data, max_epochs=epochs, lr=lr, kl_warmup=0.0, restarts=restarts, progress=False)


def judged(fit: pc.Fit, adata: ad.AnnData, data: pc.PerturbationData, every: int = 10) -> tuple[float, float, float, float]:
    """MCC of programs, R2 of w, and how much of the programs is linear in w: as found and in truth."""
    some = data[::every]
    w, u = states_of(fit, some)
    true_u, true_w = truth_of(adata, data, "u")[::every], truth_of(adata, data, "w")[::every, 0]
    score, _, _ = matched(true_u.reshape(-1, u.shape[-1]), u.reshape(-1, u.shape[-1]))
    at_end = true_u[:, -1]
    return score, block(true_w, w), block(at_end, w), block(at_end, true_w)


def bound_of(fit: pc.Fit) -> float:
    rows = fit.settings.get("restarts")
    return max(r["validation"] for r in rows) if rows else float(fit.history["elbo"].iloc[-1])


def linear(args: argparse.Namespace) -> None:
    for seed in args.seeds:
        adata, start = course_screen(4, 7, times=5, cells_per_condition=300, n_genes=100, trajectories=True, seed=seed), time.perf_counter()
        truth, data = adata.uns["truth"], components(units_of(adata), 11 + EXTRA)
        fit = fitted(data, (4, 7), args.restarts, 200, targets=None if args.learned else truth["targets"])
        score, invariant, leak, own = judged(fit, adata, data)
        known = "learned" if args.learned else "known"
        print(f"seed {seed}, targets {known}, {args.restarts} restarts, {time.perf_counter() - start:.0f} s, bound {bound_of(fit):.3f}")
        bar = 0.90 if args.learned else 0.95
        report("programs, MCC", score, f">= {bar}", score >= bar)
        report("invariant state, R2", invariant, ">= .99", invariant >= 0.99)
        report("leakage less the true dependence", leak - own, "<= .02", abs(leak - own) <= 0.02)
        if not args.learned:
            _, u = states_of(fit, data[::10])
            _, match, scale = matched(truth_of(adata, data, "u")[::10].reshape(-1, 4), u.reshape(-1, 4))
            print(f"  transition, largest error {transition_error(fit, truth['lagged'], match, scale):.3f}")


def leaky(args: argparse.Namespace) -> None:
    for seed in args.seeds:
        for sizes, bar in (((3, 2), 0.90), ((4, 7), 0.75)):
            adata = course_screen(*sizes, times=5, cells_per_condition=300, n_genes=100, mixing="leaky", trajectories=True, seed=seed)
            start, data = time.perf_counter(), components(units_of(adata), sum(sizes))
            targets = adata.uns["truth"]["targets"]
            fit = fitted(data, sizes, args.restarts, 40, 5e-3, targets=targets, likelihood="flow")
            score, invariant, _, _ = judged(fit, adata, data)
            print(f"seed {seed}, two layers, {sizes[0]} + {sizes[1]}, {args.restarts} restarts, {time.perf_counter() - start:.0f} s")
            report("programs, MCC", score, f">= {bar}", score >= bar)
            print(f"  invariant state, R2 {invariant:.3f}", flush=True)


def amortised(args: argparse.Namespace) -> None:
    for seed in args.seeds:
        adata, start = course_screen(3, 2, times=4, cells_per_condition=300, trajectories=True, seed=seed), time.perf_counter()
        data = units_of(adata)
        model, guide = pc.build("cite_vae", data, n_latent=3, n_invariant=2, targets=adata.uns["truth"]["targets"], decoder="mlp")
        fit = pc.fit(model, guide, data, max_epochs=args.epochs, lr=3e-3, kl_warmup=0.0, restarts=args.restarts, progress=False)
        score, invariant, _, _ = judged(fit, adata, data, every=1)
        print(f"seed {seed}, an encoder and a network, 3 + 2, {args.restarts} restarts, {time.perf_counter() - start:.0f} s")
        report("programs, MCC", score, ">= .90", score >= 0.90)
        print(f"  invariant state, R2 {invariant:.3f}", flush=True)


def controls(args: argparse.Namespace) -> None:
    for seed in args.seeds:
        settings: dict[str, Any] = {"times": 5, "cells_per_condition": 300, "n_genes": 100, "trajectories": True, "seed": seed}
        adata = course_screen(4, 7, **settings)
        data, targets = components(units_of(adata), 11 + EXTRA), adata.uns["truth"]["targets"]
        print(f"seed {seed}, {args.restarts} restarts")
        bounds = {}
        for name, more in (("gated", {"targets": targets}), ("free weights", {"weights": "free"})):
            fit = fitted(data, (4, 7), args.restarts, 200, **more)
            score, bounds[name] = judged(fit, adata, data)[0], bound_of(fit)
            report(f"{name}, MCC", score, ">= .95" if name == "gated" else "<= .75", score >= 0.95 if name == "gated" else score <= 0.75)
        off = abs(bounds["gated"] - bounds["free weights"])
        report("free weights, held-out bound less that of gated, nats", off, "<= .6", off <= 0.6)
        ignored = adata.copy()
        half = pd.factorize(ignored.obs["unit"])[0] % 2
        ignored.obs["perturbation"] = np.where(half, "control", "pert00")  # says nothing
        none = components(units_of(ignored), 11 + EXTRA)
        score = judged(fitted(none, (4, 7), args.restarts, 200, targets=np.eye(4)[:1]), ignored, none)[0]
        report("treatments ignored, MCC", score, "<= .80", score <= 0.80)
        still = course_screen(4, 7, changes=False, **settings)
        quiet = components(units_of(still), 11 + EXTRA)
        fit = fitted(quiet, (4, 7), args.restarts, 200, targets=targets)
        score = judged(fit, still, quiet)[0]
        report("perturbations that do nothing, MCC", score, "<= .85", score <= 0.85)
        u, found = truth_of(still, quiet, "u")[::10].reshape(-1, 4), states_of(fit, quiet[::10])[1].reshape(-1, 4)
        within = block(u, found)
        report("perturbations that do nothing, R2 of the block", within, ">= .95", within >= 0.95)


def individual(args: argparse.Namespace) -> None:
    """Observed control paths under each single and under pairs: the same noise through the true mechanism."""
    for seed in args.seeds:
        adata = course_screen(4, 2, times=4, cells_per_condition=300, trajectories=True, seed=seed)
        truth, data = adata.uns["truth"], units_of(adata)
        fit = fitted(data, (4, 2), args.restarts, 200, targets=truth["targets"])
        rows = np.flatnonzero(data.is_control)[:50]
        w, u = truth_of(adata, data, "w")[rows, 0], truth_of(adata, data, "u")[rows]
        names = [str(p) for p in data.perturbations]
        acts = [*names[:6], *[f"{names[i]}+{names[j]}" for i, j in ((0, 1), (2, 3), (4, 7), (5, 10))]]
        out = pc.trajectory(fit, acts, data[rows], draws=2)["effect"].isel(time=-1).mean("draw").to_numpy()
        true = np.stack([np.concatenate([0 * w, moved(truth, w, u, a.split("+")) - u[:, -1]], 1) @ truth["loadings"] for a in acts])
        error = float(np.sqrt(((out - true) ** 2).mean() / (true**2).mean()))
        r = float(np.corrcoef(out.ravel(), true.ravel())[0, 1])
        print(f"seed {seed}, {args.restarts} restarts, 50 controls under 6 singles and 4 unseen pairs")
        report("individual effects, relative error", error, "<= .15", error <= 0.15)
        report("individual effects, correlation", r, ">= .98", r >= 0.98)


def moved(truth: dict[str, Any], w: Array, u: Array, act: list[str]) -> Array:
    """Programs at the last time had untreated paths u [n, T + 1, D] been treated from time 1 on."""
    L, B, C, b = (truth[k] for k in ("instant", "lagged", "invariant", "mean"))
    which = [list(truth["perturbations"]).index(p) for p in act]
    hit = truth["targets"][which]
    keep, mu = np.prod(1 - hit, 0), np.prod(1 - hit, 0) * b + (hit * truth["effect"][which]).sum(0)
    sd = np.exp(0.5 * (keep * np.log(0.5) + (hit * np.log(truth["variance"][which])).sum(0)))
    now = u[:, 0]
    for t in range(1, u.shape[1]):
        z = (u[:, t] @ (np.eye(len(b)) - L) - u[:, t - 1] @ B - w @ C - b) / np.sqrt(0.5)
        now = ((now @ B) * keep + (w @ C) * keep + mu + sd * z) @ np.linalg.inv(np.eye(len(b)) - L * keep)
    return now


def box(args: argparse.Namespace) -> None:
    """Nine variables, a target known at each step; or the same units with their targets hidden."""
    for seed in args.seeds:
        adata = tc3di_box(n_chains=3000, n_steps=6, n_shapes=1, noise=args.noise, seed=seed)
        if args.images:  # a second view of the same states
            shape = adata.obs["shape"].astype("category").cat.codes.to_numpy()
            x = rasterise(adata.obsm["state"], shape, n_pixels=48, box=True).reshape(len(adata), -1)
            adata = seen_through(adata, x, args.components)
        names = [n for n in adata.uns["truth"]["names"] if n != "shape"]
        scores = {}
        for mode in ("known", "ignored"):
            if mode == "ignored":
                adata.obs["hit"] = np.where(pd.factorize(adata.obs["unit"])[0] % 2, "control", "nothing")
            start, data = time.perf_counter(), units_of(adata, "hit")
            targets = np.eye(9)[[names.index(p) for p in data.perturbations]] if mode == "known" else np.eye(9)[:1]
            settings = {"likelihood": "flow", "transition": "mlp", "targets": targets}
            fit = fitted(data, (9, 0), 1 if mode == "ignored" else args.restarts, args.epochs, 1e-2, **settings)
            with torch.no_grad():
                y = fit.model.warp(torch.as_tensor(data.path, dtype=torch.float64))[0][:, 1:, :9].reshape(-1, 9).numpy()
            true = truth_of(adata, data, "state")[:, 1:].reshape(-1, 9)
            score, match, _ = matched(true, y)
            each = np.array([np.corrcoef(true[:, i], y[:, j])[0, 1] for i, j in enumerate(match)])
            scores[mode] = score
            print(f"seed {seed}, targets {mode}, {time.perf_counter() - start:.0f} s, by variable {np.round(np.abs(each), 2).tolist()}")
            if mode == "known":
                report("variables, MCC", score, ">= .85", score >= 0.85)
                report("variables, R2 of the match", float((each**2).mean()), ">= .75", (each**2).mean() >= 0.75)
            else:
                report("variables, MCC", score, "<= .72", score <= 0.72)
        report("gap", scores["known"] - scores["ignored"], ">= .15", scores["known"] - scores["ignored"] >= 0.15)


def seen_through(adata: ad.AnnData, x: Array, k: int) -> ad.AnnData:
    """The screen with principal components of other features [n_cells, ...] in place of its own, in standard deviations of the first."""
    x = x - x.mean(0)
    axes = np.linalg.svd(x[:: max(1, len(x) // 2000)], full_matrices=False)[2][:k].T
    score = x @ axes
    out = ad.AnnData(
        (score / score[:, :1].std()).astype(np.float32), adata.obs.copy(), pd.DataFrame(index=[f"component{i:02d}" for i in range(k)])
    )
    out.obsm["state"], out.uns = adata.obsm["state"], adata.uns
    print(f"  {x.shape[1]} pixels, {k} components: {(score.var(0).sum() / x.var(0).sum()):.3f} of their variance")
    return out


def alignment(args: argparse.Namespace) -> None:
    """Static, 12 perturbations, 3,000 cells and 1,000 for the test, 100 genes: R2 of w with and without the penalty, from random
    starts and from a linear fit. Beside it a regression that is shown the true w of the training cells, and the paired design, where
    units show w before and after."""
    cold = {"start": "random"}
    ways: dict[str, list[tuple[str, dict[str, Any]]]] = {
        "linear": [
            ("random start", cold),
            ("random start, cells", cold | {"alignment": 1.0, "aligned": "cells"}),
            ("random start, means", cold | {"alignment": 100.0, "aligned": "means"}),
            ("linear start", {}),
            ("linear start, means", {"alignment": 100.0, "aligned": "means"}),
        ],
        "leaky": [
            ("linear start", {}),
            ("linear start, means", {"alignment": 100.0, "aligned": "means"}),
            ("units", {}),
            ("units, unit", {"alignment": 10.0, "aligned": "unit"}),
        ],
    }
    for seed in args.seeds:
        for mixing in ("linear", "leaky"):
            settings = {"times": 2, "cells_per_condition": 308, "n_genes": 100, "mixing": mixing, "seed": seed}
            units, cells = course_screen(4, 7, trajectories=True, **settings), course_screen(4, 7, **settings)
            cells = cells[(cells.obs["time"] == 1).to_numpy()].copy()
            found = {}
            for name, more in ways[mixing]:
                paired = name.startswith("units")
                data = units_of(units) if paired else pc.PerturbationData.from_anndata(cells)
                truth = truth_of(units, data, "w")[:, 0] if paired else cells.obsm["w"]
                train, test = data.split("cells", test=0.25, seed=seed)
                shown, hidden = (truth[data.cells.get_indexer(part.cells)].astype(float) for part in (train, test))
                entry = "cite_vae" if paired else "perturbed_vae"
                model, guide = pc.build(entry, train, n_latent=4, n_invariant=7, decoder="mlp", weights="free", **more)
                fit = pc.fit(model, guide, train, max_epochs=args.epochs, lr=3e-3, validation=0.1, progress=False)
                with torch.no_grad():
                    w = fit.guide.glimpse(torch.as_tensor(test.dense(np.float64)))[0][:, :7].numpy()
                found[name] = block(hidden, w)
                if name == "linear start":
                    scale = StandardScaler().fit(train.dense())
                    oracle = MLPRegressor(hidden_layer_sizes=(128, 128), early_stopping=True, max_iter=300, random_state=0)
                    oracle.fit(scale.transform(train.dense()), shown)
                    known = oracle.score(scale.transform(test.dense()), hidden)
            print(f"seed {seed}, {mixing} mixing: R2 of w " + ", ".join(f"{k} {v:.3f}" for k, v in found.items()))
            print(f"  a network that is shown w of the training cells: {known:.3f}", flush=True)
            if mixing == "linear":
                best = max(found["random start, cells"], found["random start, means"])
                report("invariant state with alignment, R2", best, ">= .90", best >= 0.90)
                gain = best - found["random start"]
                report("gain over none", gain, ">= .15", gain >= 0.15)
                report("no alignment, from a linear fit, R2", found["linear start"], ">= .90", found["linear start"] >= 0.90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for run, restarts in ((linear, 5), (leaky, 2), (amortised, 1), (controls, 5), (individual, 10), (box, 1), (alignment, 1)):
        each = commands.add_parser(run.__name__)
        each.set_defaults(run=run)
        each.add_argument("--restarts", type=int, default=restarts)
        each.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
        if run is linear:
            each.add_argument("--learned", action="store_true")
        if run in (amortised, box, alignment):
            each.add_argument("--epochs", type=int, default={"amortised": 300, "box": 40, "alignment": 100}[run.__name__])
        if run is box:
            each.add_argument("--images", action="store_true")
            each.add_argument("--noise", type=float, default=0.0, help="standard deviation of the measurement")
            each.add_argument("--components", type=int, default=24)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
