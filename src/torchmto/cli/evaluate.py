"""Evaluate the weights of a training run on one split."""

from jsonargparse import Namespace

from torchmto.cli._settings import SettingsParser, add_run, chosen_config, reported


def make_parser(prog: str) -> SettingsParser:
    """The options of `torchmto evaluate` besides the settings."""
    parser = SettingsParser(prog=prog, description=f"{__doc__} Settings that are given replace the run's own.")
    add_run(parser)
    return parser


def run(args: Namespace) -> int:
    """Evaluate, print the table and write it."""
    from torchmto.cli._tables import metric_table  # noqa: PLC0415  the lab takes seconds to import
    from torchmto.lab.run.folder import RunFolder  # noqa: PLC0415
    from torchmto.lab.run.inference import evaluate_run  # noqa: PLC0415
    from torchmto.lab.terminal import make_console  # noqa: PLC0415

    with reported():
        folder = RunFolder(args.out)
        results = evaluate_run(
            chosen_config(args, folder.read_settings(args.settings, changed_source=args.changed_source)),
            folder,
            args.weights,
            args.split,
        )
        path = folder.write_json(f"evaluation-{args.split}.json", results)
    print(f"{args.split} split, {results['weights']}")
    make_console().print(metric_table(results))
    print(f"Written to {path}")
    return 0
