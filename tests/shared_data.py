"""Access to reference numbers and data sets that lie beside the repository, where they exist."""

import json
from pathlib import Path
from typing import Any

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"


def golden(name: str) -> dict[str, Any]:
    """Numbers of ``shared/golden/NAME.json``; skips the test where the folder isn't there."""
    path = SHARED / "golden" / f"{name}.json"
    if not path.is_file():
        pytest.skip(f"needs the reference numbers {path}, which a plain clone doesn't have", allow_module_level=True)
    result: dict[str, Any] = json.loads(path.read_text())
    return result


def data(path: str) -> Path:
    """``shared/data/PATH``; skips the test where the file isn't there."""
    full = SHARED / "data" / path
    if not full.exists():
        pytest.skip(f"needs the data set {full}, which a plain clone doesn't have", allow_module_level=True)
    return full
