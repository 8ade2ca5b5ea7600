"""Write one self-contained HTML page about finished runs.

The page shows all given folders (of `torchmto compare`, `train` or `reproduce`), works offline, and is written into each
of them as report.html, or only to the file named by --out.
"""

from pathlib import Path

from jsonargparse import Namespace

from torchmto.cli._settings import Parser, reported


def make_parser(prog: str) -> Parser:
    """The options of `torchmto report`."""
    parser = Parser(prog=prog, description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="folder of a finished run or experiment")
    parser.add_argument(
        "--out", type=Path | None, metavar="FILE", help="where to write the page (report.html in each DIR)"
    )
    return parser


def run(args: Namespace) -> int:
    """Write the page."""
    from torchmto.checks import found  # noqa: PLC0415  the lab takes seconds to import
    from torchmto.lab.report import write_report  # noqa: PLC0415

    with reported():
        if args.out is not None and (args.out.is_dir() or not args.out.parent.is_dir()):
            raise ValueError(found("out", "a file in a folder that exists", str(args.out)))
        written = write_report(args.folders, args.out)
    for path in written:
        print(f"{path} written ({path.stat().st_size / 1e6:.1f} MB)")
    return 0
