"""The pictures people expect. Every function draws on ``ax`` (a new figure of a fitting size if None) and returns the Axes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from pyrocausal.data import PerturbationData
from pyrocausal.errors import DataError, nearest
from pyrocausal.fit import Fit
from pyrocausal.units import frames

# Okabe and Ito: told apart with every kind of colour vision
BLUE, ORANGE, GREEN, GREY, BLACK = "#0072B2", "#D55E00", "#009E73", "#8A8F98", "#222222"
CURVES = (BLUE, ORANGE, GREEN, "#CC79A7", "#E69F00", BLACK)
NORMAL_90 = 1.6449  # a 90 % interval is this many standard errors on either side
UNITS = {"log1p_cp10k": "log(1 + counts per 10,000)", "rate": "share of the library", "counts": "counts", "data": "the data's own scale"}


def elbo_curve(fit: Fit, ax: Any = None) -> Any:
    """The training curve: ELBO (nats per cell) against the epoch, and the held-out ELBO if there is one.

    The epochs in which the latent terms are phased in are shaded: the curve falls there, since the bound gets stricter.
    """
    ax = _axes(ax, (6.4, 3.4))
    history = fit.history
    warm = int((history["kl_weight"] < 1).sum())
    if warm:
        ax.axvspan(1, warm, color="#eef1f5", lw=0, zorder=0)
        ax.text(1 + (warm - 1) / 2, 0.03, "latent terms phased in", transform=ax.get_xaxis_transform(), ha="center", fontsize=8, color=GREY)
    ax.plot(history.index, history["elbo"], color=BLUE, lw=1.5, label="training")
    if history["validation"].notna().any():
        ax.plot(history.index, history["validation"], color=ORANGE, lw=1.5, label="held out")
        ax.legend(frameon=False, fontsize=8, loc="lower right")
    if len(history) > 4:  # the first epochs are far below the rest and would flatten it
        shown = np.concatenate([history["elbo"], history["validation"].dropna()])
        low = np.quantile(shown, 0.05)
        ax.set_ylim(low - 0.05 * (shown.max() - low), shown.max() + 0.05 * (shown.max() - low))
    ax.set(xlabel="epoch", ylabel="ELBO (nats per cell)", xlim=(0, len(history) + 1))
    ax.set_title("Training", fontsize=10, loc="left")
    return _clean(ax)


def target_mask(probability: NDArray[np.floating], perturbations: Sequence[str], ax: Any = None) -> Any:
    """Heat map of the posterior probability that a perturbation targets a program.

    Perturbations with the same targets stand together, those without targets last (left out where there are more than 60 rows); programs
    that none targets (all probabilities at most .5) are dropped; the title says how many.

    Args:
        probability: [n_perturbations, n_programs], in [0, 1].
        perturbations: names of the rows.
    """
    probability = np.asarray(probability, dtype=float)
    rows, columns = target_order(probability)
    kept = rows if len(rows) <= 60 else [r for r in rows if (probability[r] > 0.5).any()]
    dropped = {"program": probability.shape[1] - len(columns), "perturbation": len(rows) - len(kept)}
    left_out = " and ".join(f"{n} {what}{'s' * (n > 1)}" for what, n in dropped.items() if n)
    rows = kept
    ax = _axes(ax, (2.8 + 0.42 * max(len(columns), 4), min(1.5 + 0.24 * len(rows), 40)))
    note = f"\n{left_out} without targets not shown" if left_out else ""
    ax.set_title("Which programs a perturbation targets" + note, fontsize=10, loc="left")
    if not columns:
        ax.text(0.5, 0.5, "no perturbation targets any program", ha="center", va="center", transform=ax.transAxes)
        ax.set_axis_off()
        return ax
    image = ax.imshow(probability[np.ix_(rows, columns)], cmap="Blues", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    ax.set_xticks(range(len(columns)), [str(c) for c in columns], fontsize=8)
    ax.set_yticks(range(len(rows)), [perturbations[r] for r in rows], fontsize=_font(len(rows)))
    ax.set_xlabel("program", fontsize=9)
    _grid(ax, len(rows), len(columns))
    _colour_bar(ax, image, "probability of being a target", ticks=[0, 0.5, 1])
    return ax


def target_order(probability: NDArray[np.floating]) -> tuple[list[int], list[int]]:
    """Order of perturbations and of programs with targets, so that shared targets stand together.

    Args:
        probability: [n_perturbations, n_programs].

    Returns:
        ``(rows, columns)``: all rows, those without a target last; columns with a probability above .5, most targeted first.
    """
    on = probability > 0.5
    columns = sorted(np.flatnonzero(on.any(0)).tolist(), key=lambda d: (-int(on[:, d].sum()), d))
    patterns = [tuple(np.flatnonzero(on[p, columns]).tolist()) for p in range(len(on))]
    rows = sorted(range(len(on)), key=lambda p: (not patterns[p], patterns[p], p))
    return rows, columns


def effects_forest(effects: xr.Dataset, measured: xr.Dataset | None, intervention: str, genes: Sequence[str], ax: Any = None) -> Any:
    """One intervention, gene by gene: the model's median and 90 % interval against the measured effect with its own 90 % interval.

    Args:
        effects: of :func:`pyrocausal.effects`.
        measured: of :func:`pyrocausal.evaluate.measured_effects`, in the same unit; None draws the model alone.
        genes: from top to bottom.
    """
    _known(intervention, effects, "intervention")
    for gene in genes:
        _known(gene, effects, "gene")
    ax = _axes(ax, (5.2, 1.3 + 0.3 * len(genes)))
    y = np.arange(len(genes), dtype=float)
    has = measured is not None and intervention in measured["intervention"].values
    gap = 0.17 if has else 0.0
    low, mid, high = np.quantile(effects["effect"].sel(intervention=intervention, gene=list(genes)), [0.05, 0.5, 0.95], axis=0)
    ax.axvline(0, color=GREY, lw=0.8, zorder=0)
    ax.hlines(y - gap, low, high, color=BLUE, lw=2)
    ax.plot(mid, y - gap, "o", color=BLUE, ms=4.5, label="model")
    if has and measured is not None:
        there = measured.sel(intervention=intervention, gene=list(genes))
        loc, width = there["effect"].to_numpy(), NORMAL_90 * there["se"].to_numpy()
        ax.hlines(y + gap, loc - width, loc + width, color=ORANGE, lw=1)
        ax.plot(loc, y + gap, "D", color=ORANGE, ms=3.8, mfc="white", label="measured")
    ax.set_yticks(y, list(genes))
    ax.set_ylim(len(genes) - 0.4, -0.6)
    ax.set_xlabel(f"effect, {UNITS.get(effects.attrs.get('unit', ''), '')}")
    ax.set_title(intervention, fontsize=10, loc="left", fontweight="bold")
    ax.tick_params(axis="y", length=0)
    if has:  # above the data, which may be anywhere below
        ax.legend(frameon=False, fontsize=8, loc="lower right", bbox_to_anchor=(1, 1.0), ncols=2, borderaxespad=0, handletextpad=0.3)
    return _clean(ax)


def dose_curves(response: xr.Dataset, perturbation: str, genes: Sequence[str], measured: xr.Dataset | None = None, ax: Any = None) -> Any:
    """Effect against dose, a curve with its 90 % band for each gene; the measured effect, with its 90 % interval, at dose 1.

    Args:
        response: of :func:`pyrocausal.dose_response`.
        genes: at most six.
        measured: of :func:`pyrocausal.evaluate.measured_effects`, in the same unit.
    """
    _known(perturbation, response, "perturbation")
    if not 0 < len(genes) <= len(CURVES):
        raise DataError(f"{len(genes)} genes were given, and curves are told apart for 1 to {len(CURVES)}; give fewer")
    for gene in genes:
        _known(gene, response, "gene")
    ax = _axes(ax, (5.4, 3.4))
    doses = response["dose"].to_numpy()
    there = measured is not None and perturbation in measured["intervention"].values
    ax.axhline(0, color=GREY, lw=0.8, zorder=0)
    ax.axvline(1, color=GREY, lw=0.8, ls=":", zorder=0)
    for i, (gene, colour) in enumerate(zip(genes, CURVES, strict=False)):
        low, mid, high = np.quantile(response["effect"].sel(perturbation=perturbation, gene=gene), [0.05, 0.5, 0.95], axis=-1)
        ax.fill_between(doses, low, high, color=colour, alpha=0.18, lw=0)
        ax.plot(doses, mid, color=colour, lw=1.6, label=gene)
        if there and measured is not None:
            one = measured.sel(intervention=perturbation, gene=gene)
            aside = 1 + 0.012 * (i - (len(genes) - 1) / 2) * np.ptp(doses)
            width = NORMAL_90 * float(one["se"])
            ax.errorbar(aside, float(one["effect"]), width, fmt="D", color=colour, ms=4, mfc="white", lw=1)
    ax.set(xlabel="dose (1 = as in the screen)", ylabel=f"effect, {UNITS.get(response.attrs.get('unit', ''), '')}")
    ax.set_title(perturbation, fontsize=10, loc="left", fontweight="bold")
    ax.legend(frameon=False, fontsize=8)
    return _clean(ax)


def time_courses(
    course: xr.Dataset, intervention: str, names: Sequence[str | int], data: PerturbationData | None = None, ax: Any = None
) -> Any:
    """Expression of genes (or programs, by number) over time under an intervention, with 90 % bands over draws.

    Args:
        course: of :func:`pyrocausal.trajectory` for a population.
        data: cells with times; the means of those with this treatment are drawn beside the curves, with 90 % intervals.
    """
    _known(intervention, course, "intervention")
    for name in names:
        if isinstance(name, str):
            _known(name, course, "gene")
    ax = _axes(ax, (5.6, 3.4))
    times = course["time"].to_numpy()
    measured = None if data is None or data.time is None else _means_over_time(data, intervention, str(course.attrs["unit"]))
    for i, name in enumerate(names):
        colour, program = CURVES[i % len(CURVES)], not isinstance(name, str)
        table = course["program"].isel(latent=int(name)) if program else course["expression"].sel(gene=name)
        low, mid, high = np.quantile(table.sel(intervention=intervention), [0.05, 0.5, 0.95], axis=0)
        ax.fill_between(times, low, high, color=colour, alpha=0.2, lw=0)
        ax.plot(times, mid, color=colour, lw=1.5, label=f"program {name}" if program else name)
        if measured is not None and data is not None and not program:
            at, mean, width = measured
            g = data.genes.get_loc(name)
            ax.errorbar(at, mean[:, g], NORMAL_90 * width[:, g], fmt="o", color=colour, ms=3.5, mfc="white", lw=1)
    ax.set(xlabel="time", ylabel="program" if all(not isinstance(n, str) for n in names) else UNITS.get(course.attrs["unit"], ""))
    ax.set_title(intervention, fontsize=10, loc="left", fontweight="bold")
    ax.legend(frameon=False, fontsize=8)
    return _clean(ax)


def _means_over_time(data: PerturbationData, label: str, unit: str) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Times at which cells had a treatment, their means and standard errors, [T], [T, G], [T, G]; before the first time, the controls."""
    data = frames(data)
    assert data.time is not None
    x = data.dense(np.float64)
    if unit in ("log1p_cp10k", "rate"):
        x = x / data.library_size[:, None]
    first = data.time.min()
    rows = [(t, (data.time == t) & ((data.labels == label) | ((t == first) & data.is_control))) for t in np.unique(data.time)]
    rows = [(t, here) for t, here in rows if here.sum() > 1]
    at = np.array([t for t, _ in rows])
    mean = np.array([x[here].mean(0) for _, here in rows])
    error = np.array([x[here].std(0, ddof=1) / here.sum() ** 0.5 for _, here in rows])
    if unit == "log1p_cp10k":
        mean, error = np.log1p(1e4 * mean), 1e4 * error / (1 + 1e4 * mean)
    return at, mean, error


def predicted_vs_measured(
    effects: xr.Dataset, measured: xr.Dataset, changed: NDArray[np.bool_] | xr.DataArray | None = None, ax: Any = None
) -> Any:
    """Every gene of every intervention: the model's median effect against the measured one.

    Args:
        effects: of :func:`pyrocausal.effects`; interventions and genes that both have are drawn.
        measured: of :func:`pyrocausal.evaluate.measured_effects`.
        changed: [intervention, gene] as in ``measured``, the genes to set off (those that measurably change).
    """
    names = [str(k) for k in measured["intervention"].values if k in effects["intervention"].values]
    genes = [str(g) for g in measured["gene"].values if g in effects["gene"].values]
    ax = _axes(ax, (5.0, 4.8))
    truth = measured["effect"].sel(intervention=names, gene=genes)
    model = effects["effect"].sel(intervention=names, gene=genes).median("draw")
    flags = np.zeros(truth.shape, bool)
    if changed is not None:
        given = xr.DataArray(np.asarray(changed), coords={d: measured[d] for d in ("intervention", "gene")}, dims=("intervention", "gene"))
        flags = given.sel(intervention=names, gene=genes).to_numpy()
    x, y = truth.to_numpy(), model.to_numpy()
    ax.axline((0, 0), slope=1, color=GREY, lw=0.8, ls="--", zorder=0)
    ax.axhline(0, color="#dddddd", lw=0.6, zorder=0)
    ax.axvline(0, color="#dddddd", lw=0.6, zorder=0)
    ax.scatter(x[~flags], y[~flags], s=5, color=GREY, alpha=0.35, lw=0, label="other genes" if flags.any() else "genes", rasterized=True)
    if flags.any():
        ax.scatter(x[flags], y[flags], s=11, color=BLUE, alpha=0.7, lw=0, label="measurably changed (5 % FDR)", rasterized=True)
    ax.set(xlabel="measured effect", ylabel="model, median effect", xlim=_padded(x), ylim=_padded(y))
    ax.set_title(f"{len(names)} intervention{'s' * (len(names) != 1)}, {len(genes)} genes", fontsize=10, loc="left")
    ax.legend(frameon=False, fontsize=8, loc="upper left", markerscale=1.6)
    return _clean(ax)


def effects_heatmap(
    effects: xr.Dataset, genes: Sequence[str] | int = 40, interventions: Sequence[str] | None = None, ax: Any = None
) -> Any:
    """Median effects, interventions x genes, both ordered by similarity; blue is down, red is up.

    Interventions that move no gene (by a fiftieth of the colour scale) are dropped, and the title says how many.

    Args:
        effects: of :func:`pyrocausal.effects`.
        genes: their names, or how many to take: those with the largest effect anywhere, a like number of each intervention first.
        interventions: those to show; all if None.
    """
    shown = effects if interventions is None else effects.sel(intervention=list(interventions))
    median = shown["effect"].median("draw")
    picked = strongest_genes(median, genes) if isinstance(genes, int) else list(genes)
    table = median.sel(gene=picked).to_numpy()
    bound = float(np.quantile(np.abs(table), 0.995)) or float(np.abs(table).max()) or 1.0
    names = median["intervention"].values.astype(str)
    moved = np.abs(table).max(1) > 0.02 * bound
    if moved.any() and not moved.all():
        table, names = table[moved], names[moved]
    left_out = len(moved) - len(names)
    rows, columns = _similar(table), _similar(table.T)
    ax = _axes(ax, (2.6 + 0.19 * len(columns), 1.9 + 0.24 * len(rows)))
    image = ax.imshow(table[np.ix_(rows, columns)], cmap="RdBu_r", vmin=-bound, vmax=bound, aspect="auto", interpolation="nearest")
    ax.set_xticks(range(len(columns)), [picked[c] for c in columns], rotation=90, fontsize=_font(len(columns)))
    ax.set_yticks(range(len(rows)), names[rows].tolist(), fontsize=_font(len(rows)))
    note = f" ({left_out} that move{'s' * (left_out == 1)} none not shown)" if left_out else ""
    ax.set_title("What each intervention does to the genes that move most" + note, fontsize=10, loc="left")
    _grid(ax, len(rows), len(columns))
    unit = UNITS.get(effects.attrs.get("unit", ""), "")
    _colour_bar(ax, image, f"median effect, {unit}", extend="both" if np.abs(table).max() > bound else "neither")
    return ax


def strongest_genes(median: xr.DataArray, n: int) -> list[str]:
    """The n genes that move most under any intervention; the square root of its largest effect keeps a strong one from taking all.

    Args:
        median: effects (intervention, gene).
    """
    size = np.abs(median.transpose("intervention", "gene").to_numpy())
    score = (size / np.sqrt(np.maximum(size.max(1, keepdims=True), 1e-12))).max(0)
    return [str(g) for g in median["gene"].values[np.argsort(-score, kind="stable")[:n]]]


# -- parts ---------------------------------------------------------------------------------------------------------------------


def _axes(ax: Any, size: tuple[float, float]) -> Any:
    """The given Axes, or those of a new figure (outside pyplot, so that nothing piles up and no window is needed)."""
    if ax is not None:
        return ax
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure.add_subplot()


def _padded(values: NDArray[np.floating]) -> tuple[float, float]:
    """Limits a twentieth beyond the values."""
    low, high = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
    edge = 0.05 * (high - low) or 1.0
    return low - edge, high + edge


def _clean(ax: Any) -> Any:
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(labelsize=8)
    ax.xaxis.label.set_size(9)
    ax.yaxis.label.set_size(9)
    return ax


def _colour_bar(ax: Any, image: Any, label: str, **options: Any) -> None:
    """A slim bar beside a heat map, no longer than it needs."""
    bar = ax.figure.colorbar(image, ax=ax, fraction=0.05, pad=0.03, shrink=0.7, aspect=18, **options)
    bar.set_label(label, fontsize=8)
    bar.ax.tick_params(labelsize=8, length=0)
    bar.outline.set_visible(False)


def _grid(ax: Any, n_rows: int, n_columns: int) -> None:
    """White lines between the cells of a heat map."""
    ax.set_xticks(np.arange(n_columns + 1) - 0.5, minor=True)
    ax.set_yticks(np.arange(n_rows + 1) - 0.5, minor=True)
    ax.grid(which="minor", color="white", lw=0.8)
    ax.tick_params(which="both", length=0)
    ax.spines[:].set_visible(False)


def _font(n: int) -> float:
    return 8.0 if n <= 50 else 6.0


def _similar(table: NDArray[np.floating]) -> list[int]:
    """Rows ordered so that similar ones stand together."""
    from scipy.cluster.hierarchy import leaves_list, linkage

    if len(table) < 3:
        return list(range(len(table)))
    return [int(i) for i in leaves_list(linkage(table, "average", optimal_ordering=len(table) <= 200))]


def _known(name: str, effects: xr.Dataset, what: str) -> None:
    if name not in effects[what].values:
        raise DataError(f"the effects hold no {what} {name!r}{nearest(name, effects[what].values)}")
