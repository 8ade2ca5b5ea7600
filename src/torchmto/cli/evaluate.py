"""``torchmto evaluate``: the metrics of a trained run's weights on one split."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from torchmto.cli.settings import DONE, guarded, merged, parse, settings_parser

SUMMARY = "evaluate a run's weights on the validation or test split"


def main(argv: Sequence[str]) -> int:
    """Run the verb.

    Args:
        argv: The arguments after the verb.

    Returns:
        0 done, 1 failed, 2 wrong usage.
    """
    parser = settings_parser("evaluate", "Evaluate a run's weights. Settings other than the run's own may be given.")
    parser.add_argument(
        "--weights", type=str, default="best", help="best, last, untrained, or a checkpoint of the run's model."
    )
    parser.add_argument("--split", type=Literal["train", "validation", "test"], default="test", help="Which samples.")
    args, given = parse(parser, argv)
    out = Path(args.out)

    def action() -> int:
        from torchmto.cli.tables import metric_table  # noqa: PLC0415 - `--help` needs no torch
        from torchmto.lab.trainer.folder import RunFolder, write_json  # noqa: PLC0415
        from torchmto.lab.trainer.inference import evaluate_run  # noqa: PLC0415

        folder = RunFolder(out)
        results = evaluate_run(merged(folder.read_settings().as_dict(), given), folder, args.weights, args.split)
        print(metric_table(results | {"test": results["metrics"]}).replace("   test", args.split.rjust(7), 1))
        path = out / f"evaluation-{args.split}.json"
        write_json(path, results)
        print(json.dumps({"weights": results["weights"], "file": str(path)}))
        return DONE

    return guarded(action, "")
