"""Errors in a user's own code, whose frames are what the user wants to see."""

import sysconfig
import traceback
from pathlib import Path

_OURS = (
    str(Path(__file__).resolve().parents[1]),
    *(
        str(Path(path).resolve())
        for name, path in sysconfig.get_paths().items()
        if name in {"stdlib", "purelib", "platlib"}
    ),
)


def user_frames(error: BaseException) -> str:
    """The traceback from the user's first frame on; empty if the error isn't of the user's code."""
    frames = traceback.extract_tb(error.__traceback__)
    if isinstance(error, SyntaxError) and error.filename and _is_users(error.filename):
        return "".join(traceback.format_exception_only(error))
    own = [number for number, frame in enumerate(frames) if _is_users(frame.filename)]
    if not own:
        return ""
    shown = [frame for frame in frames[own[0] :] if not frame.filename.startswith(_OURS[0])]
    lines = ["Traceback (of your code):\n", *traceback.format_list(shown), *traceback.format_exception_only(error)]
    return "".join(lines)


def from_here(error: BaseException) -> bool:
    """Whether an error was raised by this package, not by a user's code that it called."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and str(trace.tb_frame.f_globals.get("__name__", "")).startswith("torchmto")


def _is_users(file: str) -> bool:
    return not file.startswith("<frozen") and Path(file).is_file() and not str(Path(file).resolve()).startswith(_OURS)
