"""List the data sets that --data knows, and where to get them."""

from jsonargparse import Namespace

from torchmto.cli._settings import Parser


def make_parser(prog: str) -> Parser:
    """`torchmto datasets` has no options."""
    return Parser(prog=prog, description=__doc__)


def run(args: Namespace) -> int:  # noqa: ARG001
    """Print one entry per data set."""
    from torchmto.lab.data import dataset_info, datasets  # noqa: PLC0415  the lab takes seconds to import

    for name in datasets():
        info = dataset_info(name)
        print(f"{name}{':PATH' if info.layouts else ''}\n    {info.summary}")
        for layout in info.layouts:
            print(f"    PATH: {layout}")
        if info.options:
            print(f"    options: {', '.join(f'{key}={value!r}' for key, value in info.options.items())}")
        if info.source:
            print(f"    get it: {info.source}")
    return 0
