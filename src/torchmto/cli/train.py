"""Train a model with a multi-task method; an interrupted run goes on with --resume."""

import functools
import os
import shlex
from pathlib import Path

from jsonargparse import Namespace

from torchmto.cli._errors import UsageError
from torchmto.cli._settings import SettingsParser, add_changed_source, chosen_config, reported


def make_parser(prog: str) -> SettingsParser:
    """The options of `torchmto train` besides the settings."""
    parser = SettingsParser(prog=prog, description=__doc__)
    parser.add_argument("--out", type=Path | None, metavar="DIR", help="The run's folder; has to be given.")
    parser.add_argument("--resume", action="store_true", help="Go on with the run in --out, by its own settings.")
    parser.add_argument("--checkpoint", type=Path | None, metavar="FILE", help="Go on from this checkpoint.")
    parser.add_argument("--print-config", action="store_true", help="Print the settings and do nothing.")
    add_changed_source(parser)
    return parser


def run(args: Namespace) -> int:
    """Train, and print what came out."""
    from torchmto.cli._tables import metric_table  # noqa: PLC0415  the lab takes seconds to import
    from torchmto.lab.run.folder import RunFolder  # noqa: PLC0415
    from torchmto.lab.run.processes import speaks  # noqa: PLC0415
    from torchmto.lab.run.single import train  # noqa: PLC0415
    from torchmto.lab.terminal import make_console  # noqa: PLC0415

    resume = args.resume or args.checkpoint is not None
    with reported():
        base = None
        if resume and args.out and not args.config:
            base = RunFolder(args.out).read_settings(args.settings, changed_source=args.changed_source)
        config = chosen_config(args, base)
        if args.print_config:
            print(RunFolder.settings_text(config), end="")
            return 0
        if args.out is None:
            raise UsageError("The option `--out DIR` is required.")
    with reported(shlex.join([*_launcher(), "train", "--resume", f"--out={args.out}"])):
        results, _ = train(
            config,
            args.out,
            resume=resume,
            checkpoint=args.checkpoint,
            changed_source=args.changed_source,
            say=_say,
        )
    if speaks():
        make_console().print(metric_table(results))
        score = "-" if results["score"] is None else f"{results['score']:.4g}"
        _say(f"Best by {results['measure']}: step {results['best_step']}, {score}")
        _say(f"Data wait: {results['cost']['data_wait']:.1%} of step time. Results: {args.out / 'results.json'}")
    return 0


def _launcher() -> list[str]:
    """The beginning of this command: torchmto, or torchrun with as many processes, as this machine has to start it."""
    environment = os.environ
    if "TORCHELASTIC_RUN_ID" not in environment:
        return ["torchmto"]
    options = {"--nproc-per-node": "LOCAL_WORLD_SIZE"}
    if environment.get("GROUP_WORLD_SIZE", "1") != "1":
        machines = {"--nnodes": "GROUP_WORLD_SIZE", "--node-rank": "GROUP_RANK"}
        options = {**machines, "--master-addr": "MASTER_ADDR", "--master-port": "MASTER_PORT", **options}
    return [
        "torchrun",
        *(part for flag, name in options.items() for part in (flag, environment[name])),
        "-m",
        "torchmto",
    ]


_say = functools.partial(print, flush=True)
