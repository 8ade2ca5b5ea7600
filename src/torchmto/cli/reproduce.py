"""Run one of the papers' experiments: numbers, tables and plots in a folder.

An interrupted experiment, or one whose time was up, goes on when the same command is given again.
"""

import argparse
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from torchmto._layout import terminal_width
from torchmto.cli._errors import UsageError, wrong_usage

if TYPE_CHECKING:
    from torchmto.lab.reproduce.findings import Findings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `torchmto reproduce`."""
    parser.add_argument("name", nargs="?", metavar="NAME", help="an experiment, or a recipe's file; none: list them")
    parser.add_argument("--seeds", type=int, metavar="N", help="runs per setting (the recipe's)")
    parser.add_argument("--budget", type=float, metavar="MINUTES", help="begin nothing new after so many minutes")
    parser.add_argument(
        "--data-root", type=Path, default=Path("data"), metavar="DIR", help="what {data} in recipes stands for (data)"
    )
    parser.add_argument("--jobs", type=int, default=1, metavar="J", help="training runs at a time (1)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder (runs/reproduce-NAME)")


def run(args: argparse.Namespace) -> int:
    """Run what isn't finished, print the tables, write the files."""
    from torchmto.checks import check_integer, check_number  # noqa: PLC0415  the lab takes seconds to import
    from torchmto.lab.grid import FailedRunsError, FolderError  # noqa: PLC0415
    from torchmto.lab.reproduce import RecipeError, load_recipe, recipe_names, reproduce  # noqa: PLC0415

    if args.name is None:
        for name in recipe_names():
            print(f"{name:<18} {load_recipe(name).summary}")
        return 0
    with wrong_usage():
        recipe = load_recipe(args.name)
        for option in ("seeds", "jobs"):
            if getattr(args, option) is not None:
                check_integer(option, getattr(args, option), minimum=1)
        if args.budget is not None:
            check_number("budget", args.budget, above=0)
        out = args.out or Path("runs") / f"reproduce-{recipe.name}"
    again = shlex.join(["torchmto", *sys.argv[1:]])
    try:
        findings = reproduce(
            recipe, out, data_root=args.data_root, seeds=args.seeds, minutes=args.budget, jobs=args.jobs, say=_say
        )
    except (RecipeError, FolderError, FileNotFoundError) as error:
        raise UsageError(str(error)) from error
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"interrupted. What is finished is kept; the same command goes on:\n  {again}"
        ) from None
    except FailedRunsError as error:
        print(f"torchmto reproduce: some runs failed; the others are kept in {out}.\n{error}", file=sys.stderr)
        return 1
    _show(findings)
    if not findings.complete:
        print(f"The time was up before everything was done; the same command goes on:\n  {again}")
    print(f"{out}/results.json, results.md, report.html, plots/*.png written.")
    return 0


def _show(findings: "Findings") -> None:
    for table in findings.tables:
        print(f"\n{table.text(terminal_width())}")
    for note in findings.notes:
        print(note)


def _say(line: str) -> None:
    print(line, flush=True)
