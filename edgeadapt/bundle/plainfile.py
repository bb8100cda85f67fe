"""Files that come from anywhere, opened only where they are files: opening a pipe would wait for ever, and a device has no end."""

from __future__ import annotations

import errno
import os
import stat
from io import BufferedReader


def opened(path: str | os.PathLike[str]) -> BufferedReader:
    """A file to be read; links are followed.

    Raises:
        OSError: it cannot be opened, or is a pipe, a folder, a device or a socket.
    """
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # NONBLOCK matters to pipes alone
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "it is not a file", os.fspath(path))
        return open(handle, "rb")
    except BaseException:
        os.close(handle)
        raise
