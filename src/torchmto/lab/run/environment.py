"""Where a run was made: versions, revision, machine."""

import functools
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from typing import Any

import torch

from torchmto.lab.versions import versions


def environment() -> dict[str, Any]:
    """Package versions, when and where it is, and what more may explain a difference.

    Example:
        >>> environment()["versions"]["torch"] == torch.__version__
        True
    """
    return {
        "versions": versions() | {"torch": torch.__version__},  # torch's own string names the build, such as +cpu
        **made(),
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda if torch.cuda.is_available() else None,
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "arguments": sys.argv,
    }


def made() -> dict[str, Any]:
    """When, on what machine, and from which revision of the git repository in the current folder (None outside of one).

    Example:
        >>> sorted(made())
        ['date', 'machine', 'revision']
    """
    return {"date": datetime.now(UTC).isoformat(timespec="seconds"), "machine": _machine(), "revision": _revision()}


@functools.cache
def _machine() -> str:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return ", ".join([f"{platform.system()} {platform.machine()}", f"{cores} cores", *gpus])


@functools.cache
def _revision() -> str | None:
    """The commit checked out here, with ``-dirty`` if tracked files differ from it; None outside a repository."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        described = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)  # noqa: S603 - fixed
    except (subprocess.SubprocessError, OSError):
        return None
    return described.stdout.strip() or None
