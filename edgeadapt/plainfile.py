"""Paths that come from anywhere. Files are opened only where they are files: opening a pipe would wait for ever, and a device has no end."""

from __future__ import annotations

import errno
import os
import stat
from io import BufferedReader
from pathlib import Path


class NotAFileError(OSError):
    """It is there, and is a pipe, a folder, a device or a socket."""


def present(path: Path) -> Path:
    """The path where there is something, also a link to nothing; else the nearest folder above it that there is."""
    return next(place for place in (path, *path.absolute().parents) if os.path.lexists(place))


def opened(path: str | os.PathLike[str]) -> BufferedReader:
    """A file to be read; links are followed.

    Raises:
        NotAFileError: see there.
        OSError: it cannot be opened.
    """
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # NONBLOCK matters to pipes alone
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise NotAFileError(errno.EINVAL, "it is not a file", os.fspath(path))
        return open(handle, "rb")
    except BaseException:
        os.close(handle)
        raise
