"""Files that are either the old ones or the new ones, whatever happens in between."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[tuple[BinaryIO, Path]]:
    """Opens a temporary file beside `path`; on leaving without an error it is flushed to disk and takes the place of `path`.

    Yields:
        the open binary file, and the temporary file's path. With an exception the temporary file is removed and `path` is untouched.

    Raises:
        OSError: the folder is missing or read-only, or the disk is full.
    """
    target = Path(path)
    temporary = target.with_name(f"{temporary_prefix(target.name)}{os.urandom(6).hex()}.tmp")
    # 0o666 less the umask, as any program's file: a bundle or a state is read by other users' daemons.
    with os.fdopen(os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666), "w+b") as file:
        try:
            yield file, temporary
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, target)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise
    sync_folder(target.parent)


def temporary_prefix(name: str) -> str:
    """What the names of temporary files for `name` begin with; such files in a folder are left-overs of a crash."""
    return f".{name}."


def sync_folder(folder: str | os.PathLike[str]) -> None:
    """Makes renames inside `folder` durable."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
