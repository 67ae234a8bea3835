"""The main job on a screen in one call: fit, ask, compare with what was measured and with simple baselines, and write a report.

:func:`demo` holds out a fifth of the cells of every condition, fits a model to the rest, asks what each perturbation does, and sets the
answers beside the held-out cells and beside four baselines. Everything goes to one folder: ``report.html`` (one file, nothing is loaded
from elsewhere), the tables as CSV, the pictures as PNG, and the fit (``run/``).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import torch
import xarray as xr

from pyrocausal import evaluate
from pyrocausal.collection import ENTRIES, accepts, build
from pyrocausal.data import PerturbationData
from pyrocausal.epoch import default_epochs, steps_per_epoch
from pyrocausal.errors import DataError, PyrocausalError, nearest
from pyrocausal.fit import Fit, fit
from pyrocausal.interventions import parse
from pyrocausal.query import _fresh, _population, _seeded, _unit, _vectorises
from pyrocausal.query import effects as ask
from pyrocausal.report_page import BASELINES, GENERATOR, LEVEL, Kind, as_text, findings, page, pictures
from pyrocausal.worlds import factual_base, law_under

__all__ = ["Demo", "as_text", "demo"]
METRICS = ("pearson", "relative_l2", "direction", "coverage")
MAX_SHOWN, MAX_SCORED, MIN_CELLS = 40, 200, 2


@dataclass(frozen=True)
class Demo:
    """What :func:`demo` found; the same tables as in its folder.

    Attributes:
        fit: the fitted pair.
        effects: one row per shown intervention and gene: ``median``, ``lower``, ``upper`` of the model (90 % interval), ``measured``,
            ``measured_se``, ``p_value`` of the held-out cells; strongest interventions first.
        scores: one row per method (the model and the baselines), over the interventions that the method answers.
        by_intervention: one row per method and intervention.
        target_mask: posterior probability that a perturbation targets a program, [n_perturbations, n_programs]; empty for a model
            without a mask.
        groups: one row per shared program: see :func:`sharing_groups`.
        inert: perturbations that target no program with a probability above .5.
        truth: agreement with a simulated screen's truth, or None.
        words: the findings as sentences.
        out: the folder.
    """

    fit: Fit
    effects: pd.DataFrame
    scores: pd.DataFrame
    by_intervention: pd.DataFrame
    target_mask: pd.DataFrame
    groups: pd.DataFrame
    inert: list[str]
    truth: dict[str, float] | None
    words: list[str]
    out: Path


def demo(
    data: PerturbationData,
    out: str | Path,
    *,
    model: str = "sams_vae",
    knockouts: Sequence[str] | None = None,
    n_latent: int = 20,
    max_epochs: int | None = None,
    batch_size: int | None = None,
    draws: int = 200,
    truth: ad.AnnData | None = None,
    name: str = "screen",
    seed: int = 0,
    progress: bool | None = None,
) -> Demo:
    """Fit a model of the collection to a screen and report what it says and how good that is.

    Args:
        data: the screen; a fifth of the cells of each condition is held out.
        out: folder to write; a new or empty one, or one that an earlier demo wrote.
        model: one of ``pc.models()``.
        knockouts: labels to show (``"A"`` or ``"A+B"``); by default the singles, strongest first, and at most 40 of them, then the
            combinations.
        n_latent: programs.
        max_epochs: passes over the training cells; by default :func:`pyrocausal.epoch.default_epochs`.
        batch_size: cells per step; by default 256, or as published (``pyrocausal.collection``).
        draws: posterior draws behind every interval.
        truth: the simulated screen that ``data`` are of (see :mod:`pyrocausal.simulate`), for a comparison with its truth.
        name: of the screen, in the report's title.
        progress: show a bar; by default, if standard error is a terminal.

    Raises:
        DataError: if ``out`` holds something else, or the screen cannot be split. PyrocausalError: if training was interrupted before
            the first epoch had ended.
    """
    out = Path(out)
    check_out(out)
    check_model_name(model)
    if ENTRIES[model].data_kind == "normalised" and data.kind == "counts":
        data = data.log_normalised()
    train, test = data.split("cells", test=0.2, seed=seed)
    for label in knockouts or ():
        if label not in data.conditions:
            raise DataError(f"no cell has the perturbation {label!r}{nearest(label, data.conditions)}")
    if not test.is_control.any():
        raise DataError(f"the screen has {int(data.is_control.sum())} control cells, too few to hold a fifth out; a demo needs at least 3")
    measured = evaluate.measured_effects(test)
    labels = _scored(train, measured, knockouts)
    measured = measured.sel(intervention=labels)
    start = time.perf_counter()
    size = {"n_latent": n_latent} if accepts(model, "n_latent") else {}  # a model over genes has no programs
    pair = build(model, train, **size, seed=seed)
    training = ENTRIES[model].training | ({} if batch_size is None else {"batch_size": batch_size})
    epochs = max_epochs or default_epochs(steps_per_epoch(pair[0], train, training["batch_size"]))
    fitted = fit(*pair, train, max_epochs=epochs, seed=seed, progress=progress, **training)
    if not len(fitted.history):
        raise PyrocausalError("the training was interrupted before the first epoch had ended, so nothing was fitted; nothing is written")
    seconds = time.perf_counter() - start
    affordable = max(50, int(5e7 // (len(labels) * len(data.genes))))  # numbers of 4 bytes, a few times over
    named = {label: parse(label, data.separator, data.control) for label in labels}
    answers = ask(fitted, named, draws=min(draws, affordable), cells=64, seed=seed)
    ranked = _ranked(answers)
    shown = [k for k in ranked if k in knockouts] if knockouts else _default_shown(ranked, data)
    by_intervention = _scores(train, measured, answers)
    scores = score_table(by_intervention)
    mask, effect = target_draws(fitted, seed=seed)
    probability = pd.DataFrame() if mask is None else pd.DataFrame(mask.mean(0), index=data.perturbations)
    result = Demo(
        fit=fitted,
        effects=effects_table(answers, measured, shown),
        scores=scores,
        by_intervention=by_intervention,
        target_mask=probability,
        groups=sharing_groups(fitted, mask, effect),
        inert=[] if mask is None else list(probability.index[(probability <= 0.5).all(axis=1)]),
        truth=None if truth is None or mask is None else truth_scores(fitted, test, probability, truth),
        words=[],
        out=out,
    )
    result.words.extend(findings(result, test, epochs))
    _write(result, measured, answers, data, name, {"model": model, "programs": n_latent, "seed": seed, "seconds": round(seconds)})
    return result


# -- what to fit and where to write ---------------------------------------------------------------------------------------------


def check_out(out: str | Path) -> None:
    """Refuse a folder for a demo that holds anything but an earlier demo."""
    out = Path(out)
    if not out.exists() or (out.is_dir() and (not any(out.iterdir()) or _is_report(out / "report.html"))):
        return
    raise DataError(f"{str(out)!r} exists and is not the folder of an earlier demo; give another folder")


def check_run(out: str | Path) -> None:
    """Refuse a folder for a fit that holds anything but an earlier fit."""
    out = Path(out)
    if out.exists() and not (out.is_dir() and (not any(out.iterdir()) or (out / "run.json").is_file())):
        raise DataError(f"{str(out)!r} exists and is not the folder of an earlier fit; give another folder")


def check_model_name(name: str) -> None:
    """Refuse a model that the collection does not have."""
    if name not in ENTRIES:
        raise PyrocausalError(f"there is no model {name!r}{nearest(name, ENTRIES)}")


def _is_report(path: Path) -> bool:
    return path.is_file() and GENERATOR in path.read_text(errors="replace")[:2000]


# -- tables ----------------------------------------------------------------------------------------------------------------------


def target_draws(fitted: Fit, draws: int = 200, seed: int = 0) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Posterior draws of ``mask`` and of ``effect``, [draws, n_perturbations, n_programs] each; None for a site that is not sampled."""
    with _seeded(seed, fitted):
        bases = [_fresh(fitted, draws, 1)] if _vectorises(fitted) else [_fresh(fitted, None, 1) for _ in range(draws)]
    found: list[np.ndarray | None] = []
    for site in ("mask", "effect"):
        values = [b.values[site] for b in bases if site in b.values]
        found.append(torch.cat([v.reshape(-1, *v.shape[-2:]) for v in values]).detach().cpu().numpy() if values else None)
    return found[0], found[1]


def sharing_groups(fitted: Fit, mask: np.ndarray | None, effect: np.ndarray | None) -> pd.DataFrame:
    """The programs that several perturbations target (each with a probability above .5), those of most perturbations first.

    Args:
        mask, effect: draws, as of :func:`target_draws`.

    Returns:
        Table with ``program``; ``perturbations``; ``opposite``, those of them that move it the other way than most; ``sharing``, the least
        posterior probability of any two to share it; and ``genes``, those that move most when the program moves as under them.
    """
    columns = ["program", "perturbations", "opposite", "sharing", "genes"]
    if mask is None:
        return pd.DataFrame(columns=columns)
    names, genes = np.array(fitted.coords["perturbation"], dtype=object), np.array(fitted.coords["gene"], dtype=object)
    on = mask.mean(0) > 0.5
    shared = sorted(np.flatnonzero(on.sum(0) > 1).tolist(), key=lambda d: (-int(on[:, d].sum()), d))
    rows: list[list[Any]] = []
    for program in shared:
        members = np.flatnonzero(on[:, program])
        part = mask[:, members, program]
        mean = np.zeros(len(members)) if effect is None else (part * effect[:, members, program]).mean(0)
        against = np.sign(mean) * (1 if np.sign(mean).sum() >= 0 else -1) < 0
        moved = _moved(fitted, program, float(mean[~against].mean()))
        text = [] if moved is None else [f"{genes[g]} {'up' if moved[g] > 0 else 'down'}" for g in np.argsort(-np.abs(moved))[:6]]
        sharing = float((part.T @ part / len(part)).min())
        rows.append([program, names[members].tolist(), names[members[against]].tolist(), sharing, text])
    return pd.DataFrame(rows, columns=columns)


def _moved(fitted: Fit, program: int, by: float, draws: int = 16, cells: int = 64) -> np.ndarray | None:
    """What shifting one program does to each gene of untreated cells, [n_genes]; None for a model without the site ``shift``."""
    with _seeded(0, fitted):
        base = _fresh(fitted, draws if _vectorises(fitted) else None, cells)
        if "shift" not in base.trace.nodes or not by:
            return None
        value = base.trace.nodes["shift"]["value"]
        step = torch.zeros_like(value)
        step[..., program] = by
        law = law_under(fitted.model, base, {"shift": (value + step)[None] if base.draws is None else value + step}, 1, strict=False)
        after, before = (m.reshape(-1, 1, cells, m.shape[-1]) for m in (law.mean, base.law.mean))
        unit = _unit(fitted, None)
        return np.asarray((_population(after, base.batch, unit) - _population(before, base.batch, unit)).mean((0, 1)))


def effects_table(effects: xr.Dataset, measured: xr.Dataset, interventions: Sequence[str]) -> pd.DataFrame:
    """One row per intervention and gene: the model's median and 90 % interval, and the measured effect."""
    chosen = effects["effect"].sel(intervention=list(interventions))
    low, mid, high = np.quantile(chosen.to_numpy(), [0.05, 0.5, 0.95], axis=1)
    there = measured.sel(intervention=list(interventions), gene=chosen["gene"].values)
    index = pd.MultiIndex.from_product([list(interventions), chosen["gene"].values.tolist()], names=["intervention", "gene"])
    columns = {
        "median": mid,
        "lower": low,
        "upper": high,
        "measured": there["effect"],
        "measured_se": there["se"],
        "p_value": there["p_value"],
    }
    return pd.DataFrame({k: np.asarray(v).ravel() for k, v in columns.items()}, index=index).reset_index()


def score_table(by_intervention: pd.DataFrame) -> pd.DataFrame:
    """One row per method over the interventions that it answers.

    Args:
        by_intervention: rows (method, intervention) with the columns of :func:`pyrocausal.evaluate.score_effects`.

    Returns:
        ``interventions``, ``total_mse`` (sum over interventions of the mean squared error over genes), ``model_mse`` (the model's on the
        same interventions), ``model_closer`` (in how many the model's is smaller by more than 1 %), and the means of the other metrics.
    """
    rows: dict[str, dict[str, Any]] = {}
    ours = by_intervention.loc["model"]
    for method in dict.fromkeys(by_intervention.index.get_level_values("method")):
        part = by_intervention.loc[method].dropna(subset="mse")
        same = ours.loc[part.index, "mse"]
        rows[method] = {
            "interventions": len(part),
            "total_mse": part["mse"].sum(),
            "model_mse": np.nan if method == "model" else same.sum(),
            "model_closer": pd.NA if method == "model" else int((same < (1 - LEVEL) * part["mse"]).sum()),
            **part[[c for c in part.columns if c in METRICS]].mean().to_dict(),
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("method").astype({"model_closer": "Int64"})


def _scored(train: PerturbationData, measured: xr.Dataset, wanted: Sequence[str] | None) -> list[str]:
    """Conditions with training and test cells: at most 200, those with the most test cells, and those that were asked for."""
    enough = measured["intervention"].values[(measured["n_cells"] >= MIN_CELLS).to_numpy()]
    labels = [str(k) for k in enough if k in set(train.labels)]
    missing = [k for k in wanted or () if k not in labels]
    if missing or not labels:
        which = repr(missing[0]) if missing else "every condition"
        raise DataError(f"{which} has too few cells for a test: a fifth of them has to be {MIN_CELLS} cells; merge guides, or show others")
    if len(labels) <= MAX_SCORED:
        return labels
    many = measured["n_cells"].sel(intervention=labels).to_numpy()
    top = {labels[i] for i in np.argsort(-many, kind="stable")[:MAX_SCORED]} | set(wanted or ())
    return [k for k in labels if k in top]


def _ranked(effects: xr.Dataset) -> list[str]:
    """Interventions by the size of their median effect, strongest first."""
    size = np.square(effects["effect"].median("draw").to_numpy()).sum(1)
    return [str(effects["intervention"].values[k]) for k in np.argsort(-size, kind="stable")]


def _combines(label: str, data: PerturbationData) -> bool:
    return len(parse(label, data.separator, data.control).doses or ()) > 1


def _default_shown(ranked: Sequence[str], data: PerturbationData) -> list[str]:
    singles = [k for k in ranked if not _combines(k, data)]
    return singles[:MAX_SHOWN] + [k for k in ranked if k not in singles][:MAX_SHOWN]


def truth_scores(fitted: Fit, test: PerturbationData, probability: pd.DataFrame, truth: ad.AnnData) -> dict[str, float] | None:
    """Agreement with a simulated screen: precision, recall and F1 of the target mask, and the mean correlation of the held-out cells'
    programs (MCC), whose matching of programs the mask scores use. None if the truth is not of these perturbations and cells.

    Args:
        probability: of the mask, [n_perturbations, n_programs].
        truth: with ``uns["truth"]`` and ``obsm["u"]``.
    """
    uns = truth.uns.get("truth")
    if not isinstance(uns, Mapping) or not {"mask", "perturbations"} <= uns.keys() or len(uns["mask"]) != len(uns["perturbations"]):
        return None
    known = pd.DataFrame(uns["mask"], index=[str(p) for p in uns["perturbations"]])
    rows = truth.obs_names.get_indexer(test.cells)
    if not set(probability.index) <= set(known.index) or (rows < 0).any():
        return None
    out, columns = {}, None
    u = cell_programs(fitted, test)
    if u is not None and "u" in truth.obsm:
        out["MCC"], columns = evaluate.mcc(np.asarray(truth.obsm["u"])[rows], u)
    mask = evaluate.mask_scores(known.loc[probability.index], probability, columns)
    return {"mask F1": mask.f1, "precision": mask.precision, "recall": mask.recall} | out


def cell_programs(fitted: Fit, cells: PerturbationData, draws: int = 10, seed: int = 0) -> np.ndarray | None:
    """Posterior mean of the programs ``u`` of measured cells, [n_cells, n_programs]; None for a model without the site."""
    parts = []
    with _seeded(seed, fitted):
        for rows in np.array_split(np.arange(len(cells)), -(-len(cells) // 1000)):
            batch = cells.batch(rows, n_total=fitted.settings["n_cells"])
            total: Any = 0.0
            for _ in range(draws):
                sites = factual_base(fitted.model, fitted.guide, batch, None).trace.nodes
                if "u" not in sites:
                    return None
                total = total + sites["u"]["value"].reshape(len(rows), -1)
            parts.append(total.cpu().numpy() / draws)
    return np.concatenate(parts)


def _scores(train: PerturbationData, measured: xr.Dataset, answers: xr.Dataset) -> pd.DataFrame:
    """Scores of the model and of each baseline, rows (method, intervention); ``additive`` answers combinations only."""
    labels = [str(k) for k in measured["intervention"].values]
    asked: dict[Kind, list[str]] = dict.fromkeys(BASELINES, labels) | {"additive": [k for k in labels if _combines(k, train)]}
    predictions = {"model": answers} | {kind: evaluate.baseline_effects(train, names, kind) for kind, names in asked.items() if names}
    return pd.concat({k: evaluate.score_effects(p, measured) for k, p in predictions.items()}, names=["method"])


# -- the folder ------------------------------------------------------------------------------------------------------------------


def _write(result: Demo, measured: xr.Dataset, effects: xr.Dataset, data: PerturbationData, name: str, settings: dict[str, Any]) -> None:
    out = result.out
    out.mkdir(parents=True, exist_ok=True)
    result.effects.to_csv(out / "effects.csv", index=False)
    result.scores.to_csv(out / "scores.csv")
    result.by_intervention.to_csv(out / "scores_by_intervention.csv")
    result.target_mask.rename_axis("perturbation").to_csv(out / "target_mask.csv")
    result.fit.save(out / "run")
    drawn = pictures(result, measured, effects)
    for key, png in drawn.items():
        (out / f"{key}.png").write_bytes(png)
    (out / "report.html").write_text(page(result, drawn, data, name, settings), encoding="utf-8")
