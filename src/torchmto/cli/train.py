"""``torchmto train``: one training run, or the rest of one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torchmto.cli.settings import DONE, command, guarded, merged, parse, settings_of, settings_parser

SUMMARY = "train a model with a multi-task method; interrupted runs go on with --resume"


def main(argv: Sequence[str]) -> int:
    """Run the verb.

    Args:
        argv: The arguments after the verb.

    Returns:
        0 done, 1 failed, 2 wrong usage, 130 interrupted and resumable.
    """
    parser = settings_parser("train", "Train a model with a multi-task method.")
    parser.add_argument("--resume", action="store_true", help="Go on with the run in --out, by its own settings.")
    parser.add_argument("--checkpoint", type=str | None, metavar="FILE", help="Go on from this checkpoint.")
    args, given = parse(parser, argv)
    out = Path(args.out)

    def action() -> int:
        from torchmto.cli.tables import metric_table  # noqa: PLC0415 - `--help` needs no torch
        from torchmto.lab.trainer import TrainConfig, train  # noqa: PLC0415
        from torchmto.lab.trainer.folder import RunFolder  # noqa: PLC0415

        resume = bool(args.resume or args.checkpoint)
        if not resume or args.config:
            config = TrainConfig.from_dict(settings_of(args))
        else:
            config = merged(RunFolder(out).read_settings().as_dict(), given)
        checkpoint = None if args.checkpoint is None else Path(args.checkpoint)
        results = train(config, out, resume=resume, checkpoint=checkpoint, say=_say)
        print(metric_table(results))
        print(f"Best by {results['measure']}: step {results['best_step']}, {results['score']:.4g}")
        print(f"Data wait: {results['cost']['data_wait']:.1%} of step time. Results: {out / 'results.json'}")
        return DONE

    return guarded(action, command("train", "--resume", "--out", args.out))


def _say(line: str) -> None:
    print(line, flush=True)
