"""Frames on their way from a source to who answers them: taken by a thread of its own, a few wait, and no source holds up an answer.

A camera's newest frame is the one that counts, so none waits long; files stay where they are until somebody takes them; what a wire brings waits in a
queue and gives way when there is more, by number and by bytes.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Mapping

from edgeadapt.devices.sources import Frame, Source, posted
from edgeadapt.errors import EdgeAdaptError

LOG = logging.getLogger("edgeadapt")

MOST = posted.MOST
"""Bytes of frames that wait, at most; one always may."""

_PATIENCE = 30.0  # seconds after which it is told that all that comes cannot be used


class Feed:
    """Of one source. Of a live one the oldest frames give way where nobody takes them, unless it `keeps` them; others wait until there is room.

    One that deletes what held a frame is asked for the next when `take` is, and no sooner: the one before is gone then.

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
        self.source, self.size = source, 1 if source.keeps else size
        self.dropped = self.taken = 0
        self.fault = ""
        self.last: float | None = None
        self._waiting: deque[Frame] = deque()
        self._bytes = 0
        self._changed = threading.Condition()
        self._ended = self._closed = self._wanted = False
        self._useful, self._right, self._unfit, self._why_unfit = 0, 0, 0, ""
        self._looked: tuple[float, int, dict[str, int]] = (time.monotonic(), 0, {})
        self._rubbish = ""
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
            self._wanted = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._waiting or self._ended, seconds)
            if not self._waiting:
                return None
            self._wanted = False
            frame = self._first()
            self._changed.notify_all()
            return frame

    @property
    def complaint(self) -> str:
        """Why no frames come now, or none that can be used; "" while they do."""
        return self.fault or getattr(self.source, "complaint", "") or ("it has ended" if self.ended else "") or self._rubbish

    def look(self, now: float) -> None:
        """Sees whether all that comes cannot be used. To be called every few seconds.

        Args:
            now: `time.monotonic()`.
        """
        begun, useful, before = self._looked
        counts = self.source.counts
        right = sum(counts.get(kind, 0) for kind in self.source.right) - self._unfit
        wrong = self._wrong(counts)
        if right > self._right or useful != self._useful:
            self._right, self._rubbish, self._looked = right, "", (now, self._useful, wrong)
        elif now - begun >= _PATIENCE:
            told = self._told({kind: count - before.get(kind, 0) for kind, count in wrong.items()}, now - begun)
            if told and not self._rubbish:
                LOG.warning("%s: %s", self.source.name, told)
            self._rubbish, self._looked = told, (now, useful, wrong)

    def _wrong(self, counts: Mapping[str, int]) -> dict[str, int]:
        """How often something came that could not be used, by kind; faults of files are not among it, as no device is set up wrongly there."""
        unfit = {"unfit": self._unfit} if self.source.live and not self.source.keeps else {}
        return {kind: counts[kind] for kind in self.source.wrong if kind in counts} | unfit

    def _told(self, risen: dict[str, int], seconds: float) -> str:
        kinds = {kind: count for kind, count in risen.items() if count > 0}
        if not kinds:
            return ""
        many, what = sum(kinds.values()), ", ".join(f"{kind} {count}" for kind, count in kinds.items())
        last = f"; the last frame {self._why_unfit}" if "unfit" in kinds else ""
        advice = f"; {self.source.advice}" if self.source.advice else ""
        return f"{many} pieces could not be used in the last {seconds:.0f} s, and no frame came ({what}){last}{advice}"

    def close(self, seconds: float = 2.0) -> None:
        """Stops the source, waits so long for its thread, and lets go of its device. What waits may still be taken. A second close does nothing."""
        with self._changed:
            if self._closed:
                return
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
                if frame.pixels is None:
                    self._unfit, self._why_unfit = self._unfit + 1, frame.fault
                else:
                    self._useful += 1
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
            size = frame.nbytes
            if not self.source.live or self.source.keeps:
                self._changed.wait_for(lambda: not self._full(size) or self._closed)
            if self._closed:
                return False
            while self._full(size):
                self._first()
                self.dropped += 1
            self._waiting.append(frame)
            self._bytes += size
            self._changed.notify_all()
            if self.source.deletes:  # as soon as the next one is asked for
                self._changed.wait_for(lambda: (self._wanted and not self._waiting) or self._closed)
                return not self._closed
        return True

    def _full(self, size: int) -> bool:
        return len(self._waiting) >= self.size or (bool(self._waiting) and self._bytes + size > MOST)

    def _first(self) -> Frame:
        frame = self._waiting.popleft()
        self._bytes -= frame.nbytes
        return frame
