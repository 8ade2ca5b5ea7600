"""Compare methods on a data set with single-task models, over several seeds.

An interrupted comparison goes on when the same command is given again. Without arguments the built-in digits are
used, which need no download.
"""

import argparse
import contextlib
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torchmto.cli._errors import wrong_usage


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"should be a positive whole number, found {text}")
    return number


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `torchmto compare`."""
    parser.add_argument(
        "--data", default="digits", metavar="NAME[:PATH]", help="data set; `torchmto datasets` lists them (digits)"
    )
    parser.add_argument(
        "--methods",
        metavar="A,B,C",
        help="methods, with hyper-parameters if wanted: 'gd,wpcgrad(mode=pairwise, priority=uw)'",
    )
    parser.add_argument("--seeds", type=_positive, default=3, metavar="N", help="runs per method (3)")
    parser.add_argument("--epochs", type=_positive, metavar="E", help="passes over the training data")
    parser.add_argument("--batch-size", type=_positive, metavar="B", help="samples per batch")
    parser.add_argument("--learning-rate", type=float, metavar="LR", help="of AdamW, falling to zero along a cosine")
    parser.add_argument("--weight-decay", type=float, metavar="W", help="of AdamW (0)")
    parser.add_argument("--model", metavar="NAME", help="model (the data set's default)")
    parser.add_argument("--model-option", action="append", default=[], metavar="KEY=VALUE", help="such as width=16")
    parser.add_argument("--data-option", action="append", default=[], metavar="KEY=VALUE", help="such as train=1000")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1, ...")
    parser.add_argument(
        "--jobs",
        type=_positive,
        metavar="J",
        help="runs at a time (one per core, at most 4); 1 for undisturbed timings",
    )
    parser.add_argument("--out", type=Path, default=Path("runs/compare"), metavar="DIR", help="folder (runs/compare)")


def _options(entries: list[str]) -> dict[str, Any]:
    from torchmto.lab.specs import parse_options  # noqa: PLC0415  the lab takes seconds to import

    return parse_options(entries)


@contextlib.contextmanager
def _given(option: str, entries: list[str]) -> Iterator[None]:
    """Errors inside the block name these options: Python's own words about a wrong value don't say where it came from."""
    try:
        yield
    except (ValueError, TypeError) as error:
        given = " ".join(f"{option} {entry}" for entry in entries)
        raise ValueError(f"{error} (with {given})" if entries else str(error)) from error


def run(args: argparse.Namespace) -> int:
    """Run what isn't finished, print the table, write the files."""
    from torchmto.lab.compare import (  # noqa: PLC0415  the lab takes seconds to import
        FailedRunsError,
        FolderError,
        RunFolder,
        compare,
        default_experiment,
        default_jobs,
        summarize,
        write_outputs,
    )
    from torchmto.lab.compare.progress import ProgressBars  # noqa: PLC0415
    from torchmto.lab.compare.tables import rich_tables  # noqa: PLC0415
    from torchmto.lab.data import load_data  # noqa: PLC0415
    from torchmto.lab.specs import parse_methods  # noqa: PLC0415
    from torchmto.lab.terminal import make_console  # noqa: PLC0415
    from torchmto.lab.training import build_run, check_device  # noqa: PLC0415

    began = time.monotonic()
    console = make_console(180)
    with wrong_usage():
        methods = {"methods": [spec.label for spec in parse_methods(args.methods)]} if args.methods is not None else {}
        check_device(args.device)
        data_options = _options(args.data_option)
        with _given("--data-option", args.data_option):
            bundle = load_data(args.data, **data_options)
        experiment = default_experiment(
            bundle,
            data=args.data,
            seeds=args.seeds,
            **methods,
            epochs=args.epochs,
            batch_size=args.batch_size,
            learning_rate=args.learning_rate,
            weight_decay=args.weight_decay,
            model=args.model,
            model_options=_options(args.model_option) or None,
            data_options=data_options,
            device=args.device,
        )
        with _given("--model-option", args.model_option):
            build_run(experiment.run, bundle)
        experiment.check(bundle)
        folder = RunFolder(args.out, experiment.settings)
    batches = experiment.run.epochs * len(bundle.loader("train", experiment.run.batch_size))
    bars = ProgressBars(console, len(bundle.tasks), batches)
    try:
        with bars:
            results = compare(experiment, folder, bundle, jobs=args.jobs or default_jobs(args.device), watcher=bars)
    except KeyboardInterrupt:
        again = shlex.join(["torchmto", *sys.argv[1:]])
        raise KeyboardInterrupt(
            f"interrupted. {bars.finished} of {bars.total} runs are finished and kept in {args.out}; "
            f"the same command goes on from there:\n  {again}"
        ) from None
    except FolderError as error:
        with wrong_usage():
            raise error from None
    except FailedRunsError as error:
        print(f"torchmto compare: some runs failed; the others are kept in {args.out}.\n{error}", file=sys.stderr)
        return 1
    summary = summarize(experiment, bundle, results)
    write_outputs(experiment, folder, summary, results)
    for table in rich_tables(summary):
        console.print(table)
    print(f"{args.out}/results.json, results.csv, results.md, plots/*.png written; {time.monotonic() - began:.0f} s.")
    return 0
