"""What ends a verb early."""

import contextlib
from collections.abc import Iterator

INTERRUPTED = 130


class UsageError(Exception):
    """The user asked for something that makes no sense; exit code 2."""


@contextlib.contextmanager
def wrong_usage() -> Iterator[None]:
    """Errors of arguments and files inside the block are the user's to mend: exit code 2.

    Raises:
        UsageError: In place of ValueError, TypeError and missing or unreadable files.
    """
    try:
        yield
    except (ValueError, TypeError, FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError) as error:
        raise UsageError(str(error)) from error
