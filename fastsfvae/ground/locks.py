"""Files that one process has at a time."""

from __future__ import annotations

from types import ModuleType


def file_locks() -> ModuleType:
    """The module fcntl, whose `flock` the system releases when a process dies.

    Raises:
        RuntimeError: on a system without it, in one line.
    """
    try:
        import fcntl
    except ImportError as error:
        raise RuntimeError(
            "training and converted data sets lock files as POSIX systems do, which this one does "
            "not: use Linux, macOS, or WSL on Windows"
        ) from error
    return fcntl
