"""Probe a config for a minute: how its tasks get on, which methods suit, and why.

Measures cosines and norms of the tasks' gradients, how well conditioned these are, affinities against their noise
floor, where in the model conflicts are, and costs; writes everything to DIR/diagnose.json.
"""

import argparse
import json
from pathlib import Path

from torchmto.cli._errors import UsageError, wrong_usage


def _batches(text: str) -> int:
    number = int(text)
    if number < 2:
        raise argparse.ArgumentTypeError(f"should be at least 2, found {text}")
    return number


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `torchmto diagnose`."""
    parser.add_argument("--config", type=Path, metavar="FILE", help="settings, as of `torchmto train`")
    parser.add_argument("--data", metavar="NAME[:PATH]", help="data set, instead of the config's (digits)")
    parser.add_argument("--method", metavar="NAME", help="the method that is planned, instead of the config's")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="another setting, such as optimizer.lr=0.01"
    )
    parser.add_argument("--batches", type=_batches, default=20, metavar="N", help="batches per measurement (20)")
    parser.add_argument("--out", type=Path, default=Path("runs/diagnose"), metavar="DIR", help="folder (runs/diagnose)")


def run(args: argparse.Namespace) -> int:
    """Probe, print, write."""
    from torchmto._layout import terminal_width  # noqa: PLC0415
    from torchmto.cli._settings import make_settings_parser, reported  # noqa: PLC0415  the lab takes seconds to import
    from torchmto.lab.atomic import write_bytes  # noqa: PLC0415
    from torchmto.lab.diagnose import advise  # noqa: PLC0415
    from torchmto.lab.diagnose.runs import probe_config  # noqa: PLC0415
    from torchmto.lab.diagnose.text import as_json, as_text  # noqa: PLC0415
    from torchmto.lab.trainer.config import TrainConfig  # noqa: PLC0415

    settings = [f"--config={args.config}"] if args.config is not None else []
    settings += [f"--data.name={args.data}"] if args.data is not None else []
    settings += [f"--method.name={args.method}"] if args.method is not None else []
    for entry in args.set:
        if "=" not in entry or entry.startswith("-"):
            raise UsageError(f"A setting should look like KEY=VALUE. Found {entry!r}.")
        settings.append(f"--{entry}")
    if args.config is not None and not args.config.is_file():
        raise UsageError(f"There is no file {args.config}.")
    with wrong_usage():
        args.out.mkdir(parents=True, exist_ok=True)
    with reported():
        config = TrainConfig.from_dict(make_settings_parser("torchmto diagnose", "").parse_args(settings).settings)
        measured, plan = probe_config(config, num_batches=args.batches)
    diagnosis = advise(measured, plan)
    print(as_text(measured, diagnosis, terminal_width()))
    content = json.dumps(as_json(measured, plan, diagnosis), indent=1, ensure_ascii=False, allow_nan=False)
    write_bytes(args.out / "diagnose.json", content.encode() + b"\n")
    print(f"\n{args.out / 'diagnose.json'} written")
    return 0
