"""What an experiment found, and the files it is written to."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchmto.lab.atomic import BrokenFileError, plain, read_json, write_bytes, write_json
from torchmto.lab.folders import FolderError, check_folder
from torchmto.lab.grid.plots import picture
from torchmto.lab.reproduce.recipe import Recipe, with_methods
from torchmto.lab.run.environment import made
from torchmto.lab.terminal import Table
from torchmto.lab.versions import versions

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SCHEMA_VERSION = 1
_KIND = "torchmto reproduce"
_MARKER = "experiment.json"
FEW_SEEDS = 5
"""Below so many seeds a comparison of methods is called a smoke run."""


@dataclass
class Findings:
    """What came out.

    Attributes:
        numbers: Everything, with full precision.
        tables: The same to read.
        figures: File name without ending -> matplotlib figure.
        notes: What decides how far the findings carry.
        complete: Whether everything the recipe asks for was done.
    """

    numbers: dict[str, Any] = field(default_factory=dict)
    tables: list[Table] = field(default_factory=list)
    figures: "dict[str, Figure]" = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    complete: bool = True


def number(value: float | None, interval: float | None = None, digits: int = 2) -> str:
    """A number as text, with its interval.

    Example:
        >>> number(1.234, 0.5), number(None)
        ('1.23 ± 0.50', '-')
    """
    if value is None:
        return "-"
    return f"{value:.{digits}f}" + ("" if interval is None else f" ± {interval:.{digits}f}")


def figure(entry: Mapping[str, Any] | None) -> str:
    """A ``mean`` with its ``ci95`` as text.

    Example:
        >>> figure({"mean": 1.0, "ci95": None}), figure(None)
        ('1.00', '-')
    """
    return number(None) if entry is None else number(entry["mean"], entry["ci95"])


def with_folder(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe with the methods that earlier calls have added to the experiment in a folder, if there is one.

    Raises:
        FolderError: If it may not be written to.
        RecipeError: If there is no such method any more.
    """
    if not check_folder(folder, _KIND):
        return recipe
    try:
        content = read_json(folder / _MARKER, _KIND, SCHEMA_VERSION)
    except BrokenFileError as error:
        raise FolderError(f"{error} The folder was left as it is; choose another one (--out, `out=`).") from error
    owner, added = content.get("experiment"), content.get("added")
    if owner != recipe.name:
        raise FolderError(
            f"The folder {folder} holds results of the experiment {owner!r}, not of {recipe.name!r}. It was left as it is; "
            "choose another one (--out, `out=`)."
        )
    return with_methods(recipe, ",".join(added)) if added else recipe


def claim_folder(folder: Path, recipe: Recipe) -> None:
    """Take a folder for an experiment, a new one or one in which the same was begun, and keep which methods were added.

    Raises:
        FolderError: If it may not be written to.
        RecipeError: If a method that was added there isn't known any more.
    """
    recipe = with_folder(recipe, folder)
    folder.mkdir(parents=True, exist_ok=True)
    added = [method for arm in recipe.arms for method in arm.added]
    content = {"experiment": recipe.name, **({"added": added} if added else {})}
    write_json(folder / _MARKER, _KIND, SCHEMA_VERSION, content)


def write_findings(folder: Path, recipe: Recipe, findings: Findings, *, seeds: int, minutes: float) -> None:
    """Write results.json, results.md and plots/*.png.

    Args:
        folder: Where to.
        recipe: What was asked for.
        findings: What came out.
        seeds: How many seeds were asked for.
        minutes: What this call took.
    """
    (folder / "plots").mkdir(parents=True, exist_ok=True)
    for name, plot in findings.figures.items():
        for kind in ("png", "svg"):
            write_bytes(folder / "plots" / f"{name}.{kind}", picture(plot, kind))
    content: Mapping[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "experiment": recipe.name,
        "study": recipe.study,
        "complete": findings.complete,
        "seeds": seeds,
        "minutes_of_this_call": minutes,
        "made": made(),
        "notes": findings.notes,
        "numbers": findings.numbers,
        "tables": [vars(table) for table in findings.tables],
        "versions": versions(),
    }
    text = json.dumps(plain(content), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    write_bytes(folder / "results.json", text.encode())
    write_bytes(folder / "results.md", _page(recipe, findings).encode())


def _page(recipe: Recipe, findings: Findings) -> str:
    parts = [f"# {recipe.name}", "", recipe.summary, ""]
    if not findings.complete:
        parts += ["**Not complete**: the time was up. The same command goes on.", ""]
    if recipe.papers:
        parts += [f"The papers: {recipe.papers.strip()}", ""]
    parts += [f"{note}\n" for note in findings.notes]
    parts += [table.markdown() for table in findings.tables]
    parts += [f"![{name}](plots/{name}.png) [as SVG](plots/{name}.svg)\n" for name in findings.figures]
    return "\n".join(parts)
