"""What the terminal shows through rich: tables that fit it.

Nothing is ever cut. Columns that have no room beside the others go into a table of their own below; what can't stay whole is
folded into lines, in this order: titles at their spaces, then names, and last of all numbers.
"""

import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich import box, table
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions
from rich.text import Text

BOUNDLESS = 10**6
"""The width of a file or a pipe: a line for every row."""


def make_console(file_width: int = BOUNDLESS) -> Console:
    """A console on the standard output, which shows texts as they are: names and paths may look like rich's markup.

    What isn't a terminal is as wide as told, if the variable COLUMNS doesn't say.
    """
    console = Console(markup=False, emoji=False)
    if console.is_terminal or console.is_jupyter:
        return console
    console.width = shutil.get_terminal_size((file_width, 24)).columns
    return console


def visible(text: str) -> str:
    """The text without control characters: names come from data sets."""
    return "".join(character if character.isprintable() else "?" for character in text)


@dataclass(frozen=True)
class Table:
    """A table of names and figures, for the terminal (rich prints it) and for a Markdown page.

    Attributes:
        title: What it shows.
        header: Titles of the columns; the first one's cells say what a row is.
        rows: Cells, as text.
        notes: What a reader needs to know to read it.
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()
    framed = False

    def markdown(self) -> str:
        """The table in Markdown.

        Example:
            >>> print(Table("", ["a", "b"], [["x", "1"]]).markdown(), end="")
            | a | b |
            | --- | ---: |
            | x | 1 |
        """
        lines = [self.header, ["---", *["---:"] * (len(self.header) - 1)], *self.rows]
        cells = "".join(
            "| " + " | ".join(visible(cell).replace("|", "\\|") for cell in line) + " |\n" for line in lines
        )
        title = [f"### {visible(self.title)}", ""] if self.title else []
        return "\n".join([*title, cells, *(f"{visible(note)}\n" for note in self.notes)])

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[table.Table | Text]:
        blank = [] if self.framed else [Text()]
        if self.title:
            yield Text(visible(self.title), "table.title")
            yield from blank
        lines = [[visible(cell) for cell in row] for row in (self.header, *self.rows)]
        for number, widths in enumerate(divided(lines, options.max_width, framed=self.framed)):
            yield from blank if number else ()
            drawn = table.Table(box=box.HEAVY_HEAD if self.framed else None, pad_edge=self.framed)
            for i, width in widths.items():
                figures = i > 0 and any(re.match(r"[+-]?\d", row[i]) for row in lines[1:])
                drawn.add_column(
                    Text(lines[0][i]), width=width, overflow="fold", justify="right" if figures else "left"
                )
            for row in lines[1:]:
                drawn.add_row(*(Text(row[i]) for i in widths))
            yield drawn
        for note in self.notes:
            yield from blank
            yield Text(visible(note), "table.caption")


class FramedTable(Table):
    """A table with frames on the terminal."""

    framed = True


def divided(rows: Sequence[Sequence[str]], width: int, *, framed: bool = False) -> list[dict[int, int]]:
    """Divide the columns of a table into tables that fit, each of which begins with the first column.

    Args:
        rows: The titles and the cells.
        width: Columns of the terminal.
        framed: Whether there are lines between the columns and at the sides.

    Returns:
        For each table its columns and their widths.
    """
    gap, edge = (3, 4) if framed else (2, 0)
    whole = [max(map(cell_len, column)) for column in zip(*rows, strict=True)]
    if sum(whole) + gap * (len(whole) - 1) + edge <= width:
        return [dict(enumerate(whole))]
    cells = [max(map(cell_len, column[1:]), default=0) for column in zip(*rows, strict=True)]
    room = width - edge - gap
    numbers = min(max(cells[1:], default=1), max(room // 2, 16))  # longer ones are text, which may be folded
    name = min(whole[0], max(room - numbers, room // 3, 1))  # a long name gives way
    room = max(room - name, 1)
    tables = [{0: name}]
    left = room
    for i in range(1, len(whole)):
        needed = min(room, max([cells[i], *map(cell_len, rows[0][i].split())]))
        if needed > left < room:
            tables.append({0: name})
            left = room
        tables[-1][i] = needed
        left -= needed + gap
    for part in tables:  # what is left goes to titles that would be folded
        for i in part:
            used = sum(part.values()) + gap * (len(part) - 1) + edge
            part[i] += max(0, min(whole[i] - part[i], width - used))
    return tables
