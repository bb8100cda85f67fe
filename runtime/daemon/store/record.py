"""The record of what is in use as one process sees it: read anew before it is changed, written with what happened, and with what that has cost."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from edgeadapt.errors import StateError
from edgeadapt.runtime.daemon.store import disk, history
from edgeadapt.runtime.daemon.store.pointer import LostError, Pair, Pointer
from edgeadapt.runtime.daemon.store.wear import BLOCK, Wear, blocks, cost

LOG = logging.getLogger("edgeadapt")

PATIENCE = 30.0
"""Seconds that another process may take that changes the record: milliseconds, or as long as saving a state."""
WRITING = cost(BLOCK) + BLOCK
"""Bytes that one change of it takes, with its line of the history."""
_TEXT = 200


class Record:
    """Of one folder.

    Args:
        folder: the state folder.
        most: entries of the history.
        clock: seconds that never go back.
        owner: whose is what is written; None: ours.

    Attributes:
        now: the record as it was last read or written.
        degraded: why nothing could be written; "" where the last write was done.
        wear: what was written. history: what happened.
    """

    def __init__(self, folder: Path, most: int, clock: Callable[[], float], owner: disk.Owner | None = None) -> None:
        self._folder, self._pair, self._mutex = folder, Pair(folder, owner), threading.RLock()
        self.now, self._restored = Pointer(), False
        self.degraded = ""
        self.wear, self.history = Wear(clock), history.History(folder / history.NAME, most, owner)

    @contextmanager
    def changing(self, patience: float = PATIENCE, needed: bool = True, lost: bool = False) -> Iterator[bool]:
        """Keeps others from changing it, and reads it anew; gives whether that could be had within `patience` seconds.

        Args:
            patience: see above.
            needed: where it could not, raise.
            lost: where no copy of it can be read, begin with an empty one.

        Raises:
            StateError: another process is changing it; or it cannot be read.
        """
        with self._mutex, self.explained("the state folder cannot be read"), disk.locked(self._folder, patience) as mine:
            if needed and not mine:
                raise StateError(f"another process is changing what {self._folder} holds", "wait until it is done")
            if mine:
                self._read(lost)
            yield mine

    def _read(self, lost: bool) -> None:
        try:
            self.now = self._pair.read()
        except LostError as fault:
            if not lost:
                raise
            LOG.warning("%s; it is begun anew", fault.message)
            self.now = Pointer()
        if not self._restored:
            self.wear.restore(self.now.written, self.now.into)
            self._restored = True

    @contextmanager
    def explained(self, what: str) -> Iterator[None]:
        """Raises errors of the disk as StateError, and remembers them."""
        try:
            yield
        except OSError as reason:
            fault = disk.explained(what, self._folder, reason)
            self.degraded = fault.message
            raise fault from None

    def write(self, pointer: Pointer, *events: tuple[str, str]) -> None:
        """Makes this the record, with a line of the history for each of what happened: its kind, and in words.

        Raises:
            StateError: it cannot be written; the record is as it was.
        """
        hours, into = self.wear.kept()
        pointer = replace(pointer, generation=self.now.generation + 1, written=hours, into=into)
        with self.explained("the record of what is in use cannot be written"):
            self.wear.add(cost(self._pair.write(pointer)))
        self.now, self.degraded = pointer, ""
        entries = [{"generation": pointer.generation, "event": kind, "text": text[:_TEXT], "time": int(time.time())} for kind, text in events]
        for kind, text in events:
            LOG.info("state: %s: %s", kind, text)
        try:
            if size := self.history.add(entries):
                self.wear.add(blocks(size))
        except OSError as reason:  # nothing depends on it
            self.degraded = f"the history cannot be written: {reason.filename or self._folder / history.NAME}: {reason.strerror}"
