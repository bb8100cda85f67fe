"""What a daemon remembers of the frames that it has answered: how many, how quickly, the latest of them, and whether their labels agreed."""

from __future__ import annotations

import re
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeadapt.runtime.daemon.status import CompareStatus, Latency, PredictionsStatus

LATEST, MOST = 64, 8 * 2**20
"""Frames that are remembered with their pixels, and bytes that these take, at most."""

_SHOWN = 60.0  # seconds for which a frame that was shown is remembered before others, that one may say what it shows
_TIMES, _SPAN = 1024, 10.0  # answers that latencies are of, and seconds that frames a second are of


@dataclass(frozen=True, eq=False)
class Answered:
    """A frame that was answered: its number and id, its pixels as they came, and its line as `edgeadapt run` prints it."""

    index: int
    id: str | int
    pixels: NDArray[Any]
    line: Mapping[str, Any]


class Seen:
    """Of one daemon; for any thread.

    Args:
        clock: monotonic seconds.

    Attributes:
        count, bad: frames that were answered, and that could not be.
        compared, agreed: frames that the model as exported was asked about too, and those of them on which both say the same.
        labelled, right: frames that somebody has said the class of, and those of them that had been answered so.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._lock = clock, threading.Lock()
        self._begun = clock()
        self.count = self.bad = self.compared = self.agreed = self.labelled = self.right = 0
        self._milliseconds: deque[float] = deque(maxlen=_TIMES)
        self._ends: deque[float] = deque(maxlen=_TIMES)
        self._latest: OrderedDict[str | int, Answered] = OrderedDict()
        self._bytes = 0
        self._shown: OrderedDict[str | int, float] = OrderedDict()  # and when

    def answered(self, frame: Answered, milliseconds: float) -> None:
        """One more frame, and how long it took from when it was taken up until it was answered."""
        with self._lock:
            self.count += 1
            self._milliseconds.append(milliseconds)
            self._ends.append(self._clock())
            before = self._latest.pop(frame.id, None)
            self._bytes += frame.pixels.nbytes - (0 if before is None else before.pixels.nbytes)
            self._latest[frame.id] = frame
            while len(self._latest) > 1 and (len(self._latest) > LATEST or self._bytes > MOST):
                self._bytes -= self._latest.pop(self._least()).pixels.nbytes

    def _least(self) -> str | int:
        """The frame to forget: the oldest, but not one that was shown of late, if these are not more than half; never the newest."""
        until = self._clock() - _SHOWN
        while self._shown and (len(self._shown) > len(self._latest) // 2 or next(iter(self._shown.values())) < until):
            self._shown.popitem(last=False)
        return next((name for name in islice(self._latest, len(self._latest) - 1) if name not in self._shown), next(iter(self._latest)))

    def faulty(self) -> None:
        """One more frame that could not be answered."""
        with self._lock:
            self.bad += 1

    def compare(self, same: bool) -> None:
        """The model as exported was asked about a frame too."""
        with self._lock:
            self.compared, self.agreed = self.compared + 1, self.agreed + same

    def label(self, right: bool) -> None:
        """Somebody has said the class of a frame."""
        with self._lock:
            self.labelled, self.right = self.labelled + 1, self.right + right

    def frame(self, name: str | int | None = None) -> Answered | None:
        """The frame of that id, or of that number written out; the latest where none is named. None where it is not remembered.

        Those that were given as the latest are remembered before others for a minute: somebody who looks at one may say what it shows.
        """
        with self._lock:
            if name is None:
                latest = next(reversed(self._latest.values()), None)
                if latest is not None:
                    self._shown[latest.id] = self._clock()
                    self._shown.move_to_end(latest.id)
                return latest
            found = self._latest.get(name)
            if found is None and isinstance(name, str) and re.fullmatch(r"-?[0-9]{1,19}", name):
                found = self._latest.get(int(name))
            return found

    def predictions(self) -> PredictionsStatus:
        """See there."""
        with self._lock:
            times, ends, count, bad = list(self._milliseconds), list(self._ends), self.count, self.bad
        now = self._clock()
        recent = [end for end in ends if end > now - _SPAN]
        span = min(_SPAN, now - self._begun)
        if len(recent) == _TIMES:  # more came than are remembered
            span = now - recent[0]
        rate = len(recent) / span if span > 0 else None
        return {"count": count, "bad": bad, "per_second": rate, "latency_ms": _latency(times)}

    def compare_status(self) -> CompareStatus:
        """See there."""
        with self._lock:
            return {"frames": self.compared, "agreement": self.agreed / self.compared if self.compared else None}


def _latency(times: list[float]) -> Latency:
    if not times:
        return {"p50": None, "p95": None, "p99": None}
    half, most, nearly = (float(value) for value in np.percentile(times, (50, 95, 99)))
    return {"p50": half, "p95": most, "p99": nearly}
