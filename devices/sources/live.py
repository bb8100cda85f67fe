"""Sources that are there when their device is: opened again and again, less and less often, until somebody stops them."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Mapping

from edgeadapt.devices.sources.base import Frame, Source
from edgeadapt.errors import SourceError

LOG = logging.getLogger("edgeadapt")

FIRST, LONGEST = 0.5, 30.0
"""Seconds to wait before a device is opened again, at first and at most; twice as long each time."""


class Reopened(Source):
    """A source that outlives its device: where that breaks or ends it is opened again. Never raises a SourceError; what one said is in `complaint`.

    Args:
        make: makes the source anew, which opens its device when it is iterated. Called at once too, so that a mistake in what was asked for is told.
        first, longest: seconds to wait before it is opened again, at first and at most; up to a fifth less, so that several that broke together do
            not come back together. It begins with `first` again after frames came for `longest`.

    Attributes:
        complaint: why there are no frames now; "" while there are.
        last: `time.monotonic()` of the last frame; None before the first.

    Raises:
        EdgeAdaptError: what `make` does.
    """

    live = True

    def __init__(self, make: Callable[[], Source], first: float = FIRST, longest: float = LONGEST) -> None:
        self._make, self._first, self._longest = make, first, longest
        self._stopped, self._lock = threading.Event(), threading.Lock()
        self._source, self._fresh = make(), True
        self._before: Counter[str] = Counter()
        self._breaks = 0
        self.name, self.keeps, self.deletes = self._source.name, self._source.keeps, self._source.deletes
        self.right, self.wrong, self.advice = self._source.right, self._source.wrong, self._source.advice
        self.complaint = ""
        self.last: float | None = None

    @property
    def counts(self) -> Mapping[str, int]:
        """As its sources counted, all of them together, and "breaks": how often one broke or ended."""
        with self._lock:
            now = self._source.counts
            return {**{kind: self._before[kind] + now.get(kind, 0) for kind in {**self._before, **now}}, "breaks": self._breaks}

    def __iter__(self) -> Generator[Frame, None, None]:
        wait = self._first
        while not self._stopped.is_set():
            begun = time.monotonic()
            try:
                yield from self._once()
                complaint = f"{self.name} has ended"
            except SourceError as reason:
                complaint = reason.message
            except Exception as reason:  # no memory, no thread, a driver's own, or a defect: the next time may go well
                complaint = f"{self.name} broke: {reason!r}"
                if complaint != self.complaint:
                    LOG.exception("%s broke", self.name)
            if self._stopped.is_set():
                return
            self._broke(complaint)
            if self.last is not None and self.last - begun >= self._longest:
                wait = self._first
            self._stopped.wait(wait * random.uniform(0.8, 1.0))
            wait = min(2 * wait, self._longest)

    def _once(self) -> Generator[Frame, None, None]:
        source = self._source if self._fresh else self._make()
        with self._lock:
            if source is not self._source:
                self._before.update(self._source.counts)
                self._source = source
            self._fresh = False
        if self._stopped.is_set():  # `stop` may have met the one before
            return
        with source:
            for frame in source:
                if self.complaint:
                    LOG.info("%s gives frames again", self.name)
                self.complaint, self.last = "", time.monotonic()
                yield frame

    def _broke(self, complaint: str) -> None:
        self._breaks += 1
        if complaint != self.complaint:  # the same again and again is told once
            LOG.warning("%s", complaint)
        self.complaint = complaint

    def stop(self) -> None:
        """Has the iteration end within half a second, whether it waits for its device or for a frame."""
        self._stopped.set()
        with self._lock:
            source = self._source
        source.stop()

    def spare(self) -> None:
        """As its source does."""
        with self._lock:
            source = self._source
        source.spare()

    def close(self) -> None:
        """Stops, and lets go of the device."""
        self.stop()
        self._source.close()
