"""Tables that fit a terminal: columns that have no room beside the others go into a table of their own below.

Nothing is ever cut. What can't stay whole is folded into lines, in this order: titles at their spaces, then names, and last
of all numbers.
"""

import shutil
import unicodedata
from collections.abc import Sequence

__all__ = ["BOUNDLESS", "cell_width", "divided", "folded", "plain_table", "terminal_width"]

BOUNDLESS = 10**6
"""The width of a file or a pipe: a line for every row."""


def terminal_width(otherwise: int = BOUNDLESS) -> int:
    """Columns of the terminal, or what the variable COLUMNS says; of a file or a pipe what the caller says."""
    return shutil.get_terminal_size((otherwise, 24)).columns


def cell_width(text: str) -> int:
    """Columns that a text takes on a terminal: two for a character of East Asia, none for a combining one."""
    return sum(0 if unicodedata.combining(c) else 1 + (unicodedata.east_asian_width(c) in "WF") for c in text)


def divided(
    rows: Sequence[Sequence[str]], width: int, names: int = 1, gap: int = 2, edge: int = 0
) -> list[dict[int, int]]:
    """Divide the columns of a table into tables that fit.

    Args:
        rows: The titles and the cells.
        width: Columns of the terminal.
        names: So many columns at the left say what a row is: each table begins with them.
        gap: Space between two columns.
        edge: Space that the sides of a table take.

    Returns:
        For each table its columns and their widths.
    """
    whole = [max(cell_width(row[i]) for row in rows) for i in range(len(rows[0]))]
    if sum(whole) + gap * (len(whole) - 1) + edge <= width:
        return [dict(enumerate(whole))]
    cells = [max((cell_width(row[i]) for row in rows[1:]), default=0) for i in range(len(rows[0]))]
    room = width - edge - gap * names
    numbers = min(max(cells[names:], default=1), max(room // 2, 16))  # longer ones are text, which may be folded
    first = whole[:names]
    while sum(first) > max(room - numbers, room // 3, names):  # the longest name gives way
        first[first.index(max(first))] -= 1
    room = max(room - sum(first), 1)
    tables = [dict(enumerate(first))]
    left = room
    for i in range(names, len(rows[0])):
        needed = min(room, max([cells[i], *map(cell_width, rows[0][i].split())]))
        if needed > left < room:
            tables.append(dict(enumerate(first)))
            left = room
        tables[-1][i] = needed
        left -= needed + gap
    for table in tables:  # what is left goes to titles that would be folded
        for i in table:
            used = sum(table.values()) + gap * (len(table) - 1) + edge
            table[i] += max(0, min(whole[i] - table[i], width - used))
    return tables


def plain_table(
    rows: Sequence[Sequence[str]], width: int = BOUNDLESS, indent: str = "", left: Sequence[int] = (0,)
) -> str:
    """A table as plain text.

    Args:
        rows: The titles and the cells; the first column says what a row is.
        width: Columns of the terminal.
        indent: What every line begins with.
        left: Columns whose cells stand at the left.

    Example:
        >>> print(plain_table([["task", "accuracy", "loss"], ["left", "0.91", "1.25"], ["right", "0.9", "0.875"]]))
        task   accuracy   loss
        left       0.91   1.25
        right       0.9  0.875
    """
    tables = [
        "\n".join(
            _line([row[i] for i in widths], list(widths.values()), [i in left for i in widths], indent) for row in rows
        )
        for widths in divided(rows, width - len(indent))
    ]
    return "\n\n".join(tables)


def _line(cells: Sequence[str], widths: Sequence[int], left: Sequence[bool], indent: str) -> str:
    stacks = [folded(cell, width) for cell, width in zip(cells, widths, strict=True)]
    lines = []
    for number in range(max(map(len, stacks))):
        parts = [parts[number] if number < len(parts) else "" for parts in stacks]
        blanks = [" " * (width - cell_width(part)) for part, width in zip(parts, widths, strict=True)]
        placed = [
            part + blank if at_left else blank + part for part, blank, at_left in zip(parts, blanks, left, strict=True)
        ]
        lines.append((indent + "  ".join(placed)).rstrip())
    return "\n".join(lines)


def folded(text: str, width: int) -> list[str]:
    """The lines of a text that is too wide: broken at spaces, and inside a word that is wider than a line."""
    if cell_width(text) <= width:
        return [text]
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".lstrip()
        if cell_width(longer) <= width:
            lines[-1] = longer
            continue
        lines += [""] if lines[-1] else []
        for character in word:
            if lines[-1] and cell_width(lines[-1] + character) > width:
                lines.append("")
            lines[-1] += character
    return lines
