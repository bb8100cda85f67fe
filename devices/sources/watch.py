"""Files that appear in a folder, each as soon as it is complete."""

from __future__ import annotations

import logging
import math
import os
import stat
import threading
from collections.abc import Generator, Mapping
from contextlib import closing
from typing import IO

from edgeadapt import plainfile
from edgeadapt.bundle import InputSpec
from edgeadapt.devices.sources import pictures
from edgeadapt.devices.sources.arrays import Reader, frames_of, frames_shape
from edgeadapt.devices.sources.base import Frame, Source, Wanted
from edgeadapt.errors import InputError, SourceError, UsageError

LOG = logging.getLogger("edgeadapt")

UNFINISHED = (".tmp", ".part")
"""How names end that others write to before they rename what they wrote."""

_Identity = tuple[int, int, int]
"""Inode, bytes, nanoseconds of the last change: the same as long as nobody writes, also under another name. Without the inode, which FAT makes up
anew when memory is short, it tells whether a file was taken."""


class Watch(Source):
    """Image files, and arrays of numpy's .npy format, that appear in a folder (not below it), in the order of their names.

    The folder is looked at again and again, which needs nothing of its file system. A file is taken when it is as it was the time before, or when it
    was renamed from a hidden or unfinished name (.*, *.tmp, *.part), which are passed over themselves. It is taken once; when it changes, again. One
    that cannot be read is a frame with a fault. An array of several frames gives them as "name#0", "name#1", ...

    Args:
        path: the folder; it need not be there yet.
        wanted: what the bundle takes. Image files are looked for where its input is an image of 1 or 3 channels, .npy files always.
        existing: whether files that are there when it begins are taken too.
        poll: seconds between two looks.
        remove: whether a file is deleted when its frames were taken, if it is a regular file (no link) that could be read and has not changed since.
            Those that cannot be deleted are counted as "kept".

    Raises:
        UsageError: there is no time between two looks.
        SourceError: image files cannot be read on this machine.
    """

    live = keeps = True

    def __init__(self, path: str | os.PathLike[str], wanted: Wanted, existing: bool = False, poll: float = 0.5, remove: bool = False) -> None:
        if not (poll > 0 and math.isfinite(poll)):
            raise UsageError(f"a folder cannot be looked at every {poll} seconds", "give a number above 0")
        self.name, self._wanted, self._suffixes = str(path), wanted, _suffixes(wanted.input)
        self._existing, self._poll, self.deletes = existing, poll, remove
        self._stopped, self._kept, self._spared = threading.Event(), 0, False

    @property
    def counts(self) -> Mapping[str, int]:
        return {"kept": self._kept} if self.deletes else {}

    def __iter__(self) -> Generator[Frame, None, None]:
        if self._stopped.is_set():
            return
        place = self._place()
        unfinished, before = self._look()
        taken = {} if self._existing else {name: identity[1:] for name, identity in before.items()}
        while not self._stopped.wait(self._poll):
            if self._place() != place:
                raise SourceError(f"{self.name} is on another file system than before", "mount again what was there")
            hidden, now = self._look()
            taken = {name: state for name, state in taken.items() if name in now}
            for name, identity in sorted(now.items()):
                whole = before.get(name) == identity or identity in unfinished
                if not whole or taken.get(name) == identity[1:]:
                    continue
                taken[name] = identity[1:]
                yield from self._frames(name, identity)
                if self._stopped.is_set():
                    return
            unfinished, before = hidden, now

    def _place(self) -> int:
        try:
            return os.stat(self.name).st_dev
        except OSError as reason:
            raise self._gone(reason) from None

    def _look(self) -> tuple[set[_Identity], dict[str, _Identity]]:
        """The files that have a name still to be changed, and those that may be taken."""
        unfinished, found = set(), {}
        try:
            with os.scandir(self.name) as entries:
                for entry in entries:
                    name = entry.name.lower()
                    hidden = name.startswith(".") or name.endswith(UNFINISHED)
                    if not (hidden or name.endswith(self._suffixes)) or not (identity := _identity(entry.path)):
                        continue
                    if hidden:
                        unfinished.add(identity)
                    else:
                        found[entry.name] = identity
        except OSError as reason:
            raise self._gone(reason) from None
        return unfinished, found

    def _gone(self, reason: OSError) -> SourceError:
        return SourceError(f"{self.name} cannot be opened: {reason.strerror}", "check the path and its permissions, or plug it in")

    def _frames(self, name: str, identity: _Identity) -> Generator[Frame, None, None]:
        path, shown = os.path.join(self.name, name), name.encode("utf-8", "replace").decode()
        try:
            if name.lower().endswith(".npy"):
                yield from self._rows(shown, path)
            else:
                yield Frame(shown, pictures.taken(path, self._wanted))
        except (InputError, SourceError) as reason:
            yield Frame(shown, None, None, reason.message)
            return
        if self._spared:
            self._kept += 1
        elif self.deletes:
            self._delete(name, identity)
        self._spared = False

    def _delete(self, name: str, identity: _Identity) -> None:
        """In the folder itself, opened, so that nothing that was put in its place leads elsewhere."""
        try:
            folder = os.open(self.name, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                found = _identity(name, folder)
                if found is not None and found[1:] == identity[1:]:
                    os.unlink(name, dir_fd=folder)
            finally:
                os.close(folder)
        except OSError as reason:
            if not self._kept:
                LOG.warning("%s in %s cannot be deleted: %s", name, self.name, reason.strerror)
            self._kept += 1

    def _rows(self, name: str, path: str) -> Generator[Frame, None, None]:
        with closing(_opened(path)) as file:
            reader = Reader(file, name)
            shape, single = frames_shape(reader.shape, reader.dtype, self._wanted.input)
            for row, pixels in enumerate(frames_of(reader, shape, self._wanted)):
                yield Frame(name if single else f"{name}#{row}", pixels)

    def spare(self) -> None:
        """The file stays, and is counted as kept; it is not taken again."""
        self._spared = True

    def stop(self) -> None:
        self._stopped.set()

    def close(self) -> None:
        self.stop()


def _suffixes(spec: InputSpec) -> tuple[str, ...]:
    if len(spec.shape) != 3 or spec.shape[0] not in (1, 3):
        return (".npy",)
    pictures.check(spec)
    return (*pictures.SUFFIXES, ".npy")


def _identity(path: str, folder: int | None = None) -> _Identity | None:
    """That of a regular file; links are followed but for a name within an opened folder."""
    try:
        found = os.stat(path, dir_fd=folder, follow_symlinks=folder is None)
    except OSError:
        return None
    return (found.st_ino, found.st_size, found.st_mtime_ns) if stat.S_ISREG(found.st_mode) else None


def _opened(path: str) -> IO[bytes]:
    try:
        return plainfile.opened(path)
    except plainfile.NotAFileError:
        raise InputError("is not a file") from None
    except OSError as reason:
        raise InputError(f"cannot be opened: {reason.strerror}") from None
