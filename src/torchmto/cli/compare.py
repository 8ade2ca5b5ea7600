"""Compare methods on a problem with single-task models, over several seeds.

An interrupted comparison goes on when the same command is given again. Without arguments the built-in digits are
used, which need no download.
"""

import time
from pathlib import Path
from typing import Literal

from jsonargparse import Namespace
from jsonargparse.typing import NonNegativeInt, PositiveInt

from torchmto.cli._settings import (
    SettingsParser,
    add_changed_source,
    add_executor,
    chosen_config,
    reported,
    this_command,
)


def make_parser(prog: str) -> SettingsParser:
    """The options of `torchmto compare` besides the settings."""
    parser = SettingsParser(prog=prog, description=__doc__, method=False)
    parser.add_argument(
        "--methods",
        type=str | None,
        metavar="A,B,C",
        help="Methods, with hyper-parameters if wanted: 'gd,wpcgrad(mode=pairwise, priority=uw)'.",
    )
    parser.add_argument("--seeds", type=PositiveInt, default=3, metavar="N", help="Runs per method.")
    add_executor(parser, "one per core, at most 4")
    parser.add_argument(
        "--tune",
        type=NonNegativeInt,
        default=0,
        metavar="N",
        help="Settings that each method and each baseline tries first.",
    )
    parser.add_argument(
        "--tune-by",
        type=Literal["random", "tpe"],
        default="random",
        help="One plan for all, or TPE by each on its own.",
    )
    add_changed_source(parser)
    parser.add_argument("--out", type=Path, default=Path("runs/compare"), metavar="DIR", help="The folder.")
    return parser


def run(args: Namespace) -> int:
    """Run what isn't finished, print the table, write the files."""
    from torchmto.lab.grid.experiment import DEFAULT_METHODS  # noqa: PLC0415  the lab takes seconds to import
    from torchmto.lab.grid.plan import compare  # noqa: PLC0415
    from torchmto.lab.grid.tables import rich_tables  # noqa: PLC0415
    from torchmto.lab.terminal import make_console  # noqa: PLC0415

    began = time.monotonic()
    with reported(this_command()):
        result = compare(
            chosen_config(args).data.reference,
            DEFAULT_METHODS if args.methods is None else args.methods,
            config=args.settings,
            **{name: args[name] for name in _OPTIONS},
        )
    console = make_console(180)
    for table in rich_tables(result.results):
        console.print(table)
    print(f"{args.out}/results.json, results.csv, results.md, plots/*.png written; {time.monotonic() - began:.0f} s.")
    return 0


_OPTIONS = ("seeds", "out", "jobs", "executor", "ray_address", "tune", "tune_by", "changed_source")
