"""Folders of `torchmto reproduce`: its tables and plots, and the comparisons it is made of."""

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torchmto.lab.report.base import Study, provenance, study

LARGEST_PLOTS = 700_000
"""Bytes of plots that a page takes; the others stay in their folder."""
_PNG = b"\x89PNG\r\n\x1a\n"


def arms_of(folder: Path) -> list[Path]:
    """The experiment's comparisons of which something is finished."""
    return sorted(path.parent for path in (folder / "arms").glob("*/results.json"))


def experiment_study(folder: Path, results: Mapping[str, Any]) -> Study:
    """What the page shows of an experiment as a whole.

    Args:
        folder: Where it is.
        results: Its results.json.
    """
    plots, left_out = _plots(folder / "plots")
    notes = [str(note).replace("**", "") for note in results["notes"]]
    if not results["complete"]:
        notes.insert(0, "Not complete: the time was up. The same command goes on.")
    if left_out:
        notes.append(f"More plots are in {folder.name}/plots: {', '.join(left_out)}.")
    about = {key: results.get(key) for key in ("experiment", "study", "complete", "seeds")}
    return study(
        title=str(results["experiment"]),
        about="What the experiment found; the comparisons it is made of can be chosen below."
        if arms_of(folder)
        else "",
        made=provenance([results.get("made") or {}], [60 * results.get("minutes_of_this_call", 0.0)]),
        notes=notes,
        seeds=int(results["seeds"]),
        results={"versus": None, "single_task": None, "versions": results["versions"]},
        settings=[["Experiment", about]],
        tables=[
            {
                "title": str(table["title"]),
                "header": [str(cell) for cell in table["header"]],
                "rows": [[str(cell) for cell in row] for row in table["rows"]],
                "notes": [str(note) for note in table["notes"]],
            }
            for table in results["tables"]
        ],
        plots=plots,
    )


def _plots(folder: Path) -> tuple[list[list[str]], list[str]]:
    """Name, and data URIs as PNG and as SVG (or ""); smallest first to take in many. And the names of those left out."""
    taken: list[list[str]] = []
    left_out, room = [], LARGEST_PLOTS
    for path in sorted(folder.glob("*.png"), key=lambda path: (path.stat().st_size, path.name)):
        data, vector = path.read_bytes(), path.with_suffix(".svg")
        lines = vector.read_bytes() if vector.is_file() else b""
        if data.startswith(_PNG) and len(data) + len(lines) <= room:
            room -= len(data) + len(lines)
            taken.append([path.stem, _uri("png", data), _uri("svg+xml", lines) if lines else ""])
        else:
            left_out.append(path.name)
    return sorted(taken), left_out


def _uri(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
