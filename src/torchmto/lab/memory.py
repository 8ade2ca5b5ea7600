"""Peak memory of a piece of work."""

import contextlib
import ctypes
import gc
import itertools
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile


class PeakMemory:
    """How far memory rises above where it was at construction.

    On a CUDA device: what tensors hold at most, from PyTorch's own counters. On the CPU: the peak of the process's
    resident memory above its size at construction, from the Linux kernel (rough to about a megabyte); None elsewhere.

    Args:
        device: Where the work is done.
    """

    def __init__(self, device: str | torch.device = "cpu") -> None:
        self._device = torch.device(device)
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            self._start = torch.cuda.memory_allocated(self._device)
            return
        _return_freed_memory()
        with contextlib.suppress(OSError):  # not Linux, or not allowed: the peak since the process started counts
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        self._start = _status("VmRSS") or 0

    def bytes(self) -> int | None:
        """The rise so far; None where the system doesn't tell."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) - self._start
        peak = _status("VmHWM")
        return None if peak is None else max(peak - self._start, 0)


def tensor_peak(work: Callable[[], object]) -> int:
    """How far the bytes that PyTorch's CPU allocator has handed out rise while ``work`` runs.

    Exact, unlike resident memory: neither the C library's caches nor the pages of code that is used for the first time
    count. What kernels of oneDNN allocate for themselves isn't seen.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    recorded = profiler.profiler.kineto_results.events()
    changes: list[tuple[int, int]] = sorted(
        (event.start_ns(), event.nbytes()) for event in recorded if event.name() == "[memory]"
    )
    return max(itertools.accumulate((size for _, size in changes), initial=0))


def _status(key: str) -> int | None:
    """An entry of /proc/self/status in bytes."""
    try:
        text = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    for line in text.splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    return None


def _return_freed_memory() -> None:
    """Have glibc give back what was freed, or an earlier peak would hide the next one."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
