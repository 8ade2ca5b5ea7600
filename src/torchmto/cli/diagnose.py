"""Probe a problem for a minute: how its tasks get on, which methods suit, and why.

Measures cosines and norms of the tasks' gradients, how well conditioned these are, affinities against their noise
floor, where in the model conflicts are, and costs; writes everything to DIR/diagnose.json.
"""

import json
from pathlib import Path

from jsonargparse import Namespace
from jsonargparse.typing import restricted_number_type

from torchmto.cli._errors import wrong_usage
from torchmto.cli._settings import SettingsParser, chosen_config, reported

_Batches = restricted_number_type("Batches", int, (">=", 2))


def make_parser(prog: str) -> SettingsParser:
    """The options of `torchmto diagnose` besides the settings."""
    parser = SettingsParser(prog=prog, description=__doc__)
    parser.add_argument("--batches", type=_Batches, default=20, metavar="N", help="Batches per measurement.")
    parser.add_argument("--out", type=Path, default=Path("runs/diagnose"), metavar="DIR", help="The folder.")
    return parser


def run(args: Namespace) -> int:
    """Probe, print, write."""
    from torchmto.lab.atomic import write_bytes  # noqa: PLC0415  the lab takes seconds to import
    from torchmto.lab.diagnosis.runs import diagnose  # noqa: PLC0415
    from torchmto.lab.diagnosis.text import as_text  # noqa: PLC0415
    from torchmto.lab.terminal import make_console  # noqa: PLC0415

    with wrong_usage():
        args.out.mkdir(parents=True, exist_ok=True)
    with reported():
        config = chosen_config(args)
        report = diagnose(config.data.reference, batches=args.batches, say=print, config=config)
    print(as_text(report.measurements, report.diagnosis, make_console().width))
    content = json.dumps(report.as_dict(), indent=1, ensure_ascii=False, allow_nan=False)
    write_bytes(args.out / "diagnose.json", content.encode() + b"\n")
    print(f"\n{args.out / 'diagnose.json'} written")
    return 0
