"""What happened, in a file of JSON lines: the latest of them, and nothing depends on it."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgeadapt import plainfile
from edgeadapt.bundle import atomic
from edgeadapt.runtime.daemon.store.disk import Owner, created

NAME = "history.jsonl"
_LINE = 1024  # bytes at most that are read of an entry, on average


class History:
    """Lines are added at the end; when there are twice as many as are kept, the file is made anew.

    Args:
        path: the file.
        most: entries that are kept; 0: none are written.
        owner: whose the file is to be; None: ours.
    """

    def __init__(self, path: Path, most: int, owner: Owner | None = None) -> None:
        self._path, self._most, self._owner = path, most, owner
        self._count: int | None = None

    def entries(self) -> list[dict[str, Any]]:
        """The latest, oldest first. Lines that cannot be read are left out."""
        found = []
        for line in self._lines():
            try:
                value = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(value, dict):
                found.append(value)
        return found[-self._most :] if self._most else []

    def add(self, entries: Sequence[Mapping[str, Any]]) -> int:
        """Adds some, and gives the bytes written. They need not be on the disk when this returns.

        Raises:
            OSError: as writing any file; NotAFileError where it is none.
        """
        if not self._most or not entries:
            return 0
        texts = [json.dumps(entry, ensure_ascii=False).encode("utf-8", "replace") for entry in entries]
        if self._count is None:
            self._count = len(self._lines())
        if self._count + len(texts) > 2 * self._most:
            kept = [*self._lines(), *texts][-self._most :]
            data = b"".join(line + b"\n" for line in kept)
            with atomic.replacing(self._path) as (file, _):
                if self._owner is not None:
                    self._owner.take(file.fileno())
                file.write(data)
            self._count = len(kept)
            return len(data)
        data = b"".join(text + b"\n" for text in texts)
        created(self._path, self._owner)
        handle = os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, 0o666)
        with os.fdopen(handle, "r+b", buffering=0) as file:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise plainfile.NotAFileError(errno.EINVAL, "it is not a file, remove it", str(self._path))
            if (size := file.seek(0, os.SEEK_END)) and file.seek(size - 1) >= 0 and file.read(1) != b"\n":
                data = b"\n" + data  # what a power cut left of a line
            file.write(data)
        self._count += len(texts)
        return len(data)

    def _lines(self) -> list[bytes]:
        try:
            with plainfile.opened(self._path) as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - 2 * self._most * _LINE))
                return [line for line in file.read().split(b"\n") if line]
        except OSError:
            return []
