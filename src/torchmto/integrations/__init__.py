"""torchmto inside the trainers people use: one small module for each, behind an extra of its own.

Import the module you need, such as ``torchmto.integrations.lightning``. None is imported here.
"""

import importlib.util


def require(extra: str, *packages: str) -> None:
    """Check that one of ``packages`` is installed.

    Raises:
        ImportError: If none is; says what to type.
    """
    if not any(importlib.util.find_spec(package) for package in packages):
        raise ImportError(
            f"`torchmto.integrations.{extra}` needs {' or '.join(packages)}: pip install 'torchmto[{extra}]'"
        )
