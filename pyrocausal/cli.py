"""The command line: ``pyrocausal demo | fit | query | benchmark | models``."""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from pyrocausal.errors import InterventionError, PyrocausalError, nearest

ABOUT = """Causal generative models for single-cell perturbation screens.

  pyrocausal demo                            a simulated screen, fitted and reported in about a minute
  pyrocausal demo screen.h5ad --out report   the same on your screen: what each perturbation does, which share targets, how sure,
                                             and how good against simple baselines
  pyrocausal fit screen.h5ad --out run       fit and save
  pyrocausal query run "STAT1" "IRF1+STAT1"  ask a saved fit what perturbations do, also in combinations that were never measured
  pyrocausal benchmark screen.h5ad --models sams_vae sccvae --out table
                                             models and every baseline on held-out cells: who wins, and how surely
  pyrocausal models                          the collection"""
SCREEN = """The screen is an .h5ad file: counts (recommended) or normalised expression in X or a layer, and a column of obs that names the
perturbation of each cell, with one label for unperturbed cells and A+B for combinations."""
INTERRUPTED = 130  # the exit status of a program that Ctrl-C ended


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, 2 for what the user can mend, 130 after Ctrl-C."""
    arguments = _parser().parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except PyrocausalError as error:
        print(f"pyrocausal: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # a file or folder that cannot be written
        where = f"{error.filename}: " if error.filename else ""
        print(f"pyrocausal: {where}{error.strerror or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("pyrocausal: interrupted", file=sys.stderr)
        return INTERRUPTED


# -- commands ------------------------------------------------------------------------------------------------------------------


def _demo(a: argparse.Namespace) -> int:
    from pyrocausal import report
    from pyrocausal.data import PerturbationData
    from pyrocausal.demo_screen import demo_screen

    report.check_out(a.out)
    report.check_model_name(a.model)
    if a.screen is None:
        adata = demo_screen()
        data = PerturbationData.from_anndata(adata, batch_key="batch", modality="knockout")
        settings = {"n_latent": 10, "max_epochs": 80, "name": "simulated screen", "truth": adata}
    else:
        data, adata = _screen(a)
        settings = {"name": Path(a.screen).name, "truth": adata if "truth" in adata.uns else None}
    settings |= {k: v for k, v in {"n_latent": a.latent, "max_epochs": a.epochs}.items() if v is not None}
    print(data)
    result = report.demo(data, a.out, model=a.model, knockouts=a.show, seed=a.seed, **settings)
    print(report.as_text(result))
    return _end(result.fit, f"report.html and tables are in {a.out}")


def _fit(a: argparse.Namespace) -> int:
    from pyrocausal import report
    from pyrocausal.collection import ENTRIES, accepts, build
    from pyrocausal.epoch import default_epochs, steps_per_epoch
    from pyrocausal.fit import fit

    report.check_model_name(a.model)
    report.check_run(a.out)
    if a.resume and a.checkpoint is None:
        raise PyrocausalError("--resume was given without --checkpoint; name the file to go on from")
    data, _ = _screen(a)
    print(data)
    size = {"n_latent": a.latent or 20} if accepts(a.model, "n_latent") else {}
    pair = build(a.model, data, **size, seed=a.seed)
    training = ENTRIES[a.model].training
    epochs = a.epochs or default_epochs(steps_per_epoch(pair[0], data, training["batch_size"]))
    fitted = fit(*pair, data, max_epochs=epochs, seed=a.seed, checkpoint=a.checkpoint, resume=a.resume, **training)
    if not len(fitted.history):
        raise PyrocausalError("the training was interrupted before the first epoch had ended, so nothing was fitted; nothing is written")
    fitted.save(a.out)
    print(fitted)
    return _end(fitted, f"the fit is in {a.out}; ask it with: pyrocausal query {a.out} {data.perturbations[0]}")


def _query(a: argparse.Namespace) -> int:
    import numpy as np
    import pandas as pd

    from pyrocausal.io import load
    from pyrocausal.query import effects

    fitted = load(a.run_folder)
    named = [_intervention(label, a, fitted.coords) for label in a.interventions]
    repeated = [name for i, (name, _) in enumerate(named) if name in dict(named[:i])]
    if repeated:
        raise InterventionError(f"{repeated[0]!r} is asked for more than once; ask for each intervention once")
    result = effects(fitted, dict(named), draws=a.draws, seed=a.seed)
    known = result["gene"].values
    for gene in a.genes or ():
        if gene not in known:
            raise InterventionError(f"no gene of the fit is named {gene!r}{nearest(gene, known)}")
    low, mid, high = np.quantile(result["effect"].sel(gene=a.genes or known), [0.05, 0.5, 0.95], axis=1)
    genes = np.asarray(a.genes or known)
    unit = result.attrs["unit"]
    print(f"median effect against untreated cells and 90 % interval, unit {unit}, {a.draws} draws")
    tables = []
    for k, (name, _) in enumerate(named):
        table = pd.DataFrame({"intervention": name, "gene": genes, "median": mid[k], "lower": low[k], "upper": high[k]})
        tables.append(table)
        order = table.index if a.genes else table["median"].abs().sort_values(ascending=False, kind="stable").index[: a.top]
        print(f"\n{name}")
        if not table["median"].any() and not a.genes:
            print("no effect: zero is the median of every gene")
            continue
        print(table.loc[order, ["gene", "median", "lower", "upper"]].to_string(index=False, float_format="{:+.3f}".format))
    if a.csv is not None:
        pd.concat(tables).to_csv(a.csv, index=False)
        print(f"\nall {len(genes)} genes are in {a.csv}")
    return 0


def _benchmark(a: argparse.Namespace) -> int:
    from pyrocausal.benchmark import benchmark, check_out
    from pyrocausal.benchmark_page import as_text

    check_out(Path(a.out))
    data, _ = _screen(a)
    print(data)
    settings = {"by": a.by} | {k: v for k, v in {"test": _share(a.test), "seen": a.seen}.items() if v is not None}
    result = benchmark(
        data,
        list(dict.fromkeys(a.models)),
        splits=[settings],
        seeds=a.seeds,
        out=a.out,
        max_epochs=a.epochs,
        draws=a.draws,
        presets=a.presets,
        min_cells=a.min_cells,
        drop_targets=not a.keep_targets,
        genes=a.genes,
        processes=a.processes,
        progress=True,
        name=Path(a.screen).name,
    )
    print(as_text(result))
    print(f"report.html and tables are in {a.out}")
    return 0


def _models(a: argparse.Namespace) -> int:
    from pyrocausal.collection import table

    rows = [("name", "paper", "answers"), *table()[["paper", "answers"]].itertuples(name=None)]
    widths = [max(len(row[i]) for row in rows) for i in range(2)]
    for name, paper, answers in rows:
        print(f"{name:{widths[0]}}  {paper:{widths[1]}}  {answers}")
    return 0


# -- parts ---------------------------------------------------------------------------------------------------------------------


def _screen(a: argparse.Namespace) -> tuple[Any, Any]:
    """The screen that the arguments describe, as PerturbationData and as AnnData."""
    from pyrocausal.data import PerturbationData
    from pyrocausal.reading import open_screen

    adata = open_screen(a.screen)
    batch_key = a.batch_key or ("batch" if "batch" in adata.obs else None)
    data = PerturbationData.from_anndata(
        adata,
        perturbation_key=a.perturbation_key,
        control=a.control,
        layer=a.layer,
        batch_key=batch_key,
        separator=a.separator,
        modality=a.modality,
    )
    return data, adata


def _share(words: Sequence[str] | None) -> Any:
    """A number as such, anything else as names."""
    if words is None or len(words) != 1:
        return words
    try:
        return float(words[0])
    except ValueError:
        return words


def _intervention(label: str, a: argparse.Namespace, coords: dict[str, Any]) -> tuple[str, Any]:
    """``"A+B"`` at the asked dose and penetrance, and its name in the table."""
    from pyrocausal.interventions import parse, perturb, untreated

    value = untreated()
    for name, _ in parse(label, coords["separator"], coords["control"]).doses or ():
        value = value & perturb(name, dose=a.dose, penetrance=a.penetrance)
    marks = ([f"dose {a.dose:g}"] if a.dose != 1 else []) + ([f"penetrance {a.penetrance:g}"] if a.penetrance != 1 else [])
    return label + (f" ({', '.join(marks)})" if marks else ""), value


def _end(fitted: Any, message: str) -> int:
    print(message)
    if fitted.stopped != "interrupted":
        return 0
    n = len(fitted.history)
    print(
        f"pyrocausal: interrupted after {n} of {fitted.settings['max_epochs']} epochs; what was fitted until then was kept", file=sys.stderr
    )
    return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="pyrocausal", description=ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", action="version", version=f"pyrocausal {importlib.metadata.version('pyrocausal')}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    demo = _command(commands, "demo", _demo, "fit a screen (or a simulated one) and write a report", SCREEN)
    demo.add_argument("screen", nargs="?", metavar="SCREEN.h5ad", help="the screen; a simulated one with known truth if left out")
    demo.add_argument("--out", default="pyrocausal-demo", metavar="DIR", help="folder of the report (default: pyrocausal-demo)")
    demo.add_argument("--show", nargs="+", metavar="LABEL", help="perturbations to show, after the screen (default: the strongest)")
    _screen_options(demo)
    _fit_options(demo)

    fit = _command(commands, "fit", _fit, "fit a model to a screen and save it", SCREEN)
    fit.add_argument("screen", metavar="SCREEN.h5ad", help="the screen")
    fit.add_argument("--out", required=True, metavar="RUN", help="folder of the fit")
    _screen_options(fit)
    _fit_options(fit)
    fit.add_argument("--checkpoint", metavar="FILE", help="write the state of the training here every ten epochs")
    fit.add_argument("--resume", action="store_true", help="go on from the checkpoint, if it is there")

    about = "Interventions are labels as in the screen: STAT1, or IRF1+STAT1 for both at once (measured together or not)."
    query = _command(commands, "query", _query, "ask a saved fit what perturbations do", about)
    query.add_argument("run_folder", metavar="RUN", help="folder of a fit: of pyrocausal fit, or run/ in the folder of a demo")
    query.add_argument("interventions", nargs="+", metavar="A+B", help="one or more interventions")
    query.add_argument("--dose", type=float, default=1.0, metavar="D", help="dose of every perturbation; 1 is the screen's (default: 1)")
    query.add_argument("--penetrance", type=float, default=1.0, metavar="S", help="share of the cells in which it takes (default: 1)")
    query.add_argument("--draws", type=_positive, default=200, metavar="N", help="posterior draws (default: 200)")
    query.add_argument("--genes", nargs="+", metavar="GENE", help="these genes, in this order (default: the strongest)")
    query.add_argument("--top", type=_positive, default=10, metavar="N", help="how many of the strongest genes (default: 10)")
    query.add_argument("--csv", metavar="FILE", help="write the whole table")
    query.add_argument("--seed", type=int, default=0, metavar="N", help="of the posterior draws (default: 0)")

    about = f"{SCREEN} A run that was interrupted goes on where it was, if it is given again with the same arguments."
    bench = _command(commands, "benchmark", _benchmark, "models and every baseline on held-out cells, and who wins", about)
    bench.add_argument("screen", metavar="SCREEN.h5ad", help="the screen")
    bench.add_argument("--models", nargs="+", default=[], metavar="NAME", help="see pyrocausal models; the baselines are always there")
    bench.add_argument("--out", default="pyrocausal-benchmark", metavar="DIR", help="folder (default: pyrocausal-benchmark)")
    _screen_options(bench)
    held = bench.add_argument_group("what is held out, and how it is scored")
    ways = ("cells", "perturbations", "combinations", "batch", "time")
    held.add_argument("--by", default="cells", choices=ways, help="what is held out (default: cells, of every condition)")
    held.add_argument("--test", nargs="+", metavar="T", help="the share to hold out, or names (default: 0.2)")
    held.add_argument("--seen", type=int, choices=(0, 1, 2), help="parts of a held-out pair that are measured alone (default: 2)")
    held.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N", help="of splits and fits (default: 0 1 2)")
    suites = ["mejia", "systema", "perturbench"]
    held.add_argument("--presets", nargs="+", default=suites, metavar="P", help=f"suites of metrics (default: {' '.join(suites)})")
    held.add_argument("--min-cells", type=_positive, default=10, metavar="N", help="least test cells of a condition (default: 10)")
    held.add_argument("--keep-targets", action="store_true", help="score the genes that the held-out conditions target as well")
    genes = ("expressed", "all")
    held.add_argument("--genes", default="expressed", choices=genes, help="those in a tenth of the training controls, or all")
    held.add_argument("--draws", type=_positive, default=200, metavar="N", help="posterior draws (default: 200)")
    held.add_argument("--epochs", type=_positive, metavar="N", help="passes over the cells (default: by size, 3,000 to 4,000 steps)")
    held.add_argument("--processes", type=_positive, default=1, metavar="N", help="fits at a time (default: 1)")

    _command(commands, "models", _models, "list the models of the collection", "The models of the collection, for --model.")
    return parser


def _command(commands: Any, name: str, run: Any, short: str, long: str) -> argparse.ArgumentParser:
    added = commands.add_parser(name, help=short, description=f"{short[0].upper()}{short[1:]}. {long}")
    added.set_defaults(run=run)
    return cast(argparse.ArgumentParser, added)


def _screen_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("how to read the screen")
    group.add_argument(
        "--perturbation-key", default="perturbation", metavar="K", help="column of obs that names it (default: perturbation)"
    )
    group.add_argument("--control", default="control", metavar="C", help="label of unperturbed cells (default: control)")
    group.add_argument("--batch-key", metavar="B", help="column of obs with the technical batch (default: batch, if there is one)")
    group.add_argument("--layer", metavar="L", help="layer with the expression (default: X)")
    group.add_argument("--separator", default="+", metavar="S", help="between the parts of a combination (default: +)")
    choices = ("perturbation", "knockout", "knockdown", "activation")
    group.add_argument("--modality", default="perturbation", choices=choices, help="what it does to its gene (default: perturbation)")


def _fit_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what to fit")
    group.add_argument("--model", default="sams_vae", metavar="NAME", help="see pyrocausal models (default: sams_vae)")
    group.add_argument("--latent", type=_positive, metavar="N", help="number of programs (default: 20)")
    group.add_argument("--epochs", type=_positive, metavar="N", help="passes over the cells (default: by size, 3,000 to 4,000 steps)")
    group.add_argument("--seed", type=int, default=0, metavar="N", help="of the split, the initial weights and the draws (default: 0)")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return int(text)
