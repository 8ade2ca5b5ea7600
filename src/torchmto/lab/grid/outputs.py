"""The files a finished comparison leaves: results.json, results.csv, results.md and plots."""

import json
from collections.abc import Mapping
from typing import Any

from torchmto.lab.atomic import plain, write_bytes
from torchmto.lab.grid.folder import GridFolder
from torchmto.lab.grid.plots import plots
from torchmto.lab.grid.tables import csv_text, markdown


def write_outputs(folder: GridFolder, summary: Mapping[str, Any], results: Mapping[str, Mapping[str, Any]]) -> None:
    """Write tables and plots into the folder.

    Args:
        folder: Where to.
        summary: The figures, from `summarize`.
        results: Every run by its key.
    """
    write_bytes(folder.path / "results.csv", csv_text(summary).encode())
    write_bytes(folder.path / "results.md", markdown(summary).encode())
    text = json.dumps(plain(summary), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    write_bytes(folder.path / "results.json", text.encode())
    # Last: whatever becomes of a picture, the figures are there.
    (folder.path / "plots").mkdir(exist_ok=True)
    for name, image in plots(plain(summary), results).items():
        write_bytes(folder.path / "plots" / name, image)
