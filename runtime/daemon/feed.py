"""Frames on their way from a source to who answers them: taken by a thread of its own, a few wait, and no source holds up an answer."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque

from edgeadapt.devices.sources import Frame, Source
from edgeadapt.errors import EdgeAdaptError

LOG = logging.getLogger("edgeadapt")


class Feed:
    """Of one source. Of a live one the oldest frames give way where nobody takes them; others wait until there is room.

    Args:
        source: what `start` begins to iterate, and `close` closes.
        size: frames that wait at most.

    Attributes:
        source: see above. size: see above.
        dropped: frames that gave way to newer ones.
        taken: frames that came of the source.
        last: `time.monotonic()` of the last one; None before the first.
        fault: why it gave up; "" where it did not.
    """

    def __init__(self, source: Source, size: int) -> None:
        self.source, self.size = source, size
        self.dropped = self.taken = 0
        self.fault = ""
        self.last: float | None = None
        self._waiting: deque[Frame] = deque()
        self._changed = threading.Condition()
        self._ended = self._closed = False
        self._thread = threading.Thread(target=self._run, name="source", daemon=True)

    def start(self) -> None:
        """Begins to take frames."""
        self._thread.start()

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def ended(self) -> bool:
        """Whether nothing will come any more, and all that came was taken."""
        with self._changed:
            return self._ended and not self._waiting

    def take(self, seconds: float) -> Frame | None:
        """The frame that has waited longest; None where there is none for so many seconds, or where it has ended."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._ended, seconds)
            if not self._waiting:
                return None
            frame = self._waiting.popleft()
            self._changed.notify_all()
            return frame

    def close(self, seconds: float = 2.0) -> None:
        """Stops the source, waits so long for its thread, and lets go of its device. What waits may still be taken."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self.source.stop()
        if self._thread.is_alive():
            self._thread.join(seconds)
        if self._thread.is_alive():
            LOG.warning("%s does not stop; it is left alone", self.source.name)
            return
        self.source.close()

    def _run(self) -> None:
        try:
            for frame in self.source:
                self.taken, self.last = self.taken + 1, time.monotonic()
                if not self._put(frame):
                    break
        except EdgeAdaptError as reason:
            self.fault = reason.message
            LOG.error("no more frames come of %s: %s", self.source.name, reason.message)
        except Exception as reason:  # a defect of a source must not end the daemon, which can be asked what is wrong
            self.fault = f"a defect of the source: {reason!r}"
            LOG.exception("no more frames come of %s", self.source.name)
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()

    def _put(self, frame: Frame) -> bool:
        """Whether more are wanted."""
        with self._changed:
            if not self.source.live:
                self._changed.wait_for(lambda: len(self._waiting) < self.size or self._closed)
            if self._closed:
                return False
            if len(self._waiting) >= self.size:
                self._waiting.popleft()
                self.dropped += 1
            self._waiting.append(frame)
            self._changed.notify_all()
        return True
