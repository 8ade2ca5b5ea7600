"""What a run was made with."""

import platform
from importlib import metadata

from torchmto import __version__

__all__ = ["versions"]

_PACKAGES = ("torch", "numpy", "scipy", "scikit-learn", "torchmetrics", "transformers", "lightning")


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
