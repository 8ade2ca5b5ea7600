"""What the terminal shows through rich."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions
from rich.table import Table
from rich.text import Text

from torchmto._layout import divided, terminal_width


def make_console(file_width: int) -> Console:
    """A console on the standard output; what isn't a terminal is as wide as told, COLUMNS aside."""
    console = Console()
    return console if console.is_terminal else Console(width=terminal_width(file_width))


@dataclass
class FittedTable:
    """A table with frames that knows what to do on a narrow terminal: `divided`.

    Attributes:
        rows: The titles and the cells, as plain text.
        names: So many columns at the left say what a row is.
        left: Columns whose cells stand at the left.
        title: Stands above.
        notes: Stand below, a paragraph each.
    """

    rows: Sequence[Sequence[str]]
    names: int = 1
    left: Sequence[int] = (0,)
    title: str = ""
    notes: Sequence[str] = ()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Table | Text]:
        if self.title:
            yield Text(self.title, "table.title")
        for widths in divided(self.rows, options.max_width, self.names, gap=3, edge=4):
            table = Table()
            for i, width in widths.items():
                table.add_column(Text(self.rows[0][i]), width=width, overflow="fold")
                table.columns[-1].justify = "left" if i in self.left else "right"
            for row in self.rows[1:]:
                table.add_row(*(Text(row[i]) for i in widths))
            yield table
        for note in self.notes:
            yield Text(note, "table.caption")
