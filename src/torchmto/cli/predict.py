"""Show what a training run predicts: a picture of input, label and prediction per dense task."""

from jsonargparse import Namespace

from torchmto.cli._settings import SettingsParser, add_run, chosen_config, reported


def make_parser(prog: str) -> SettingsParser:
    """The options of `torchmto predict` besides the settings."""
    parser = SettingsParser(prog=prog, description=f"{__doc__} Settings that are given replace the run's own.")
    add_run(parser)
    parser.add_argument("--count", type=int, default=4, help="How many samples, the first of the split.")
    return parser


def run(args: Namespace) -> int:
    """Predict, and write the picture and the numbers."""
    from torchmto.lab.run.folder import RunFolder  # noqa: PLC0415  the lab takes seconds to import
    from torchmto.lab.run.inference import predict_run  # noqa: PLC0415

    with reported():
        folder = RunFolder(args.out)
        config = chosen_config(args, folder.read_settings(args.settings, changed_source=args.changed_source))
        for path in predict_run(config, folder, args.weights, args.split, args.count):
            print(f"Written to {path}")
    return 0
