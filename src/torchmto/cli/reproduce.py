"""Run one of the papers' experiments: numbers, tables and plots in a folder.

An interrupted experiment, or one whose time was up, goes on when the same command is given again.
"""

import functools
from pathlib import Path

from jsonargparse import Namespace
from jsonargparse.typing import PositiveFloat, PositiveInt

from torchmto.cli._settings import Parser, add_executor, reported, this_command


def make_parser(prog: str) -> Parser:
    """The options of `torchmto reproduce`."""
    parser = Parser(prog=prog, description=__doc__)
    parser.add_argument("name", nargs="?", metavar="NAME", help="An experiment, or a recipe's file; none: list them.")
    parser.add_argument("--seeds", type=PositiveInt | None, metavar="N", help="Runs per setting (the recipe's).")
    parser.add_argument(
        "--budget", type=PositiveFloat | None, metavar="MINUTES", help="Begin nothing new after so many minutes."
    )
    parser.add_argument(
        "--data-root", type=Path | None, metavar="DIR", help="What {data} in the recipe stands for (data)."
    )
    parser.add_argument(
        "--add",
        type=str | None,
        metavar="A,B(c=1)",
        help="Methods that the first arm gets besides the recipe's, now and later.",
    )
    add_executor(parser, "1")
    parser.add_argument("--out", type=Path | None, metavar="DIR", help="The folder (runs/reproduce-NAME).")
    return parser


def run(args: Namespace) -> int:
    """Run what isn't finished, print the tables, write the files."""
    from torchmto.checks import needed  # noqa: PLC0415
    from torchmto.lab.reproduce import (  # noqa: PLC0415  the lab takes seconds to import
        load_recipe,
        recipe_names,
        reproduce,
        with_methods,
    )
    from torchmto.lab.terminal import make_console  # noqa: PLC0415

    if args.name is None:
        for name in recipe_names():
            print(f"{name:<18} {load_recipe(name).summary}")
        return 0
    with reported(this_command()):
        needed("An experiment", "matplotlib.figure")  # its figures come last
        recipe = load_recipe(args.name)
        if args.add is not None:
            recipe = with_methods(recipe, args.add)
        out = args.out or Path("runs") / f"reproduce-{recipe.name}"
        findings = reproduce(
            recipe,
            out,
            data_root=args.data_root,
            seeds=args.seeds,
            minutes=args.budget,
            jobs=args.jobs,
            executor=args.executor,
            ray_address=args.ray_address,
            say=_say,
        )
    console = make_console()
    for table in findings.tables:
        console.print()
        console.print(table)
    for note in findings.notes:
        print(note)
    if not findings.complete:
        print(f"The time was up before everything was done; the same command goes on:\n  {this_command()}")
    print(f"{out}/results.json, results.md, report.html, plots/*.png written.")
    return 0


_say = functools.partial(print, flush=True)
