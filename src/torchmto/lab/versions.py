"""What a run was made with, and whether its results still mean the same."""

import platform
from collections.abc import Mapping
from importlib import metadata
from typing import Any

from torchmto import __version__

RESULTS_VERSION = 3
"""Version of what results mean, stored with every finished run: to be raised with a change of the code after which the same
settings give other figures (a corrected metric, another default, new data), so that old and new ones aren't mixed."""

_PACKAGES = ("torch", "numpy", "scipy", "scikit-learn", "torchmetrics", "transformers", "lightning-fabric")


def versions() -> dict[str, str]:
    """Versions of torchmto, Python and the packages that figures depend on, as far as they are installed.

    Example:
        >>> sorted(versions())[-2:]
        ['torchmto', 'transformers']
    """
    found = {"torchmto": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def results_version(content: Mapping[str, Any]) -> Any:
    """The `RESULTS_VERSION` that a run's file was written with; files from before it was stored have version 1.

    Example:
        >>> results_version({"result": {}}), results_version({"results_version": 2})
        (1, 2)
    """
    return content.get("results_version", 1)
