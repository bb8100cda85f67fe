"""Frames that other threads of this process hand over, such as those of requests over HTTP."""

from __future__ import annotations

from collections.abc import Generator, Mapping

from edgeadapt.devices.sources.base import Frame, Source
from edgeadapt.devices.sources.mailbox import Mailbox
from edgeadapt.errors import UsageError

WAITING, MOST = 64, 8 * 2**20
"""Frames that may wait to be taken, and their bytes; one always may. All of one request over HTTP fit."""


class Posted(Source):
    """Frames in the order in which they were put, until it is stopped. Counts as "dropped" those that gave way to newer ones.

    Args:
        name: how a person would call it.
        size: frames that may wait to be taken. They also take `MOST` bytes at most.

    Raises:
        UsageError: none may wait.
    """

    live = True

    def __init__(self, name: str = "http", size: int = WAITING) -> None:
        if size < 1:
            raise UsageError(f"{size} frames of {name} cannot wait to be taken", "let at least one")
        self.name = name
        self._box: Mailbox[Frame] = Mailbox(size, MOST, lambda frame: frame.nbytes)

    @property
    def counts(self) -> Mapping[str, int]:
        return {"dropped": self._box.dropped}

    def put(self, frame: Frame) -> None:
        """One frame more, from any thread; never waits. After a stop it is ignored."""
        self._box.put(frame)

    def __iter__(self) -> Generator[Frame, None, None]:
        while (frame := self._box.take()) is not None:
            yield frame

    def stop(self) -> None:
        self._box.stop()

    def close(self) -> None:
        self.stop()
