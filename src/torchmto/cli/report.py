"""Write one self-contained HTML page about finished runs.

The page shows all given folders (of `torchmto compare`, `train` or `reproduce`), works offline, and is written into each
of them as report.html, or only to the file named by --out.
"""

import argparse
from pathlib import Path

from torchmto.cli._errors import UsageError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `torchmto report`."""
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="folder of a finished run or experiment")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where to write the page (report.html in each DIR)")


def run(args: argparse.Namespace) -> int:
    """Write the page."""
    from torchmto.lab.report import ReportError, write_report  # noqa: PLC0415  the lab takes seconds to import

    if args.out is not None and (args.out.is_dir() or not args.out.parent.is_dir()):
        raise UsageError(f"Parameter `out` should be a file in a folder that exists. Found {args.out}.")
    try:
        written = write_report(args.folders, args.out)
    except ReportError as error:
        raise UsageError(str(error)) from error
    for path in written:
        print(f"{path} written ({path.stat().st_size / 1e6:.1f} MB)")
    return 0
