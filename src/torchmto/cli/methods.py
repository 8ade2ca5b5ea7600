"""List all methods with family, cost per batch and source."""

import argparse
from typing import NoReturn

from torchmto.cli._errors import UsageError
from torchmto.methods import Cost, Method, make_method, method_class, methods

_COLUMNS = ("method", "family", "forwards", "backwards", "steps", "source")


class _Parser(argparse.ArgumentParser):
    """Without the lab there is no jsonargparse, and this verb works all the same."""

    def error(self, message: str) -> NoReturn:
        """One line."""
        raise UsageError(message)


def make_parser(prog: str) -> argparse.ArgumentParser:
    """The options of `torchmto methods`."""
    parser = _Parser(prog, description=__doc__, allow_abbrev=False)
    parser.add_argument("--markdown", action="store_true", help="print a Markdown table")
    return parser


def run(args: argparse.Namespace) -> int:
    """Print the table."""
    if args.markdown:
        print(markdown())
        return 0
    try:
        from torchmto.lab.terminal import Table, make_console  # noqa: PLC0415  rich
    except ImportError:
        print(markdown())
    else:
        make_console().print(Table("", _COLUMNS, rows()))
    print("\nCosts are per batch with K tasks, one micro-batch, shared norms and default hyper-parameters.")
    return 0


def rows() -> list[list[str]]:
    """One row per method: name, family, cost as a function of K, source."""
    table = []
    for name in methods():
        cls = method_class(name)
        small, large = _example(name, 3).cost(3), _example(name, 5).cost(5)
        table.append([name, cls.family, *_formulas(small, large), cls.source])
    return table


def markdown(pages: str = "") -> str:
    """The table as Markdown, with links to the methods' pages if their folder is given."""
    lines = ["| " + " | ".join(_COLUMNS) + " |", "|---|---|---:|---:|---:|---|"]
    for name, *cells in rows():
        title = f"[{name}]({pages}/{name}.md)" if pages else name
        lines.append("| " + " | ".join([title, *cells]) + " |")
    return "\n".join(lines)


def _example(name: str, num_tasks: int) -> Method:
    """The method with its defaults; those that need one are given equal weights."""
    try:
        return make_method(name)
    except TypeError:
        return make_method(name, weights=[1.0] * num_tasks)


def _formulas(three: Cost, five: Cost) -> list[str]:
    """Each cost as a K + b, from its values for three and for five tasks."""
    fields = ("num_forward", "num_backward", "num_optimizer_steps")
    return [_formula(getattr(three, field), getattr(five, field)) for field in fields]


def _formula(three: int, five: int) -> str:
    slope = (five - three) // 2
    rest = three - 3 * slope
    if slope == 0:
        return str(rest)
    term = "K" if slope == 1 else f"{slope}K"
    return term if rest == 0 else f"{term} {'+' if rest > 0 else '-'} {abs(rest)}"
