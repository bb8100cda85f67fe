"""How many bytes were written lately. Only the time that the daemon ran counts, so that no clock that jumps makes it more than there may be."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence

from edgeadapt.runtime.daemon.store.pointer import HOURS

BLOCK = 4096
_JOURNAL = 6 * BLOCK  # of the file system, for a file that is replaced and synced with its folder: up to 24 KiB, measured on ext4
_HOUR = 3600.0


def blocks(size: int) -> int:
    """Bytes that so many are on the disk, in whole blocks."""
    return -(-size // BLOCK) * BLOCK


def cost(size: int) -> int:
    """Bytes that are written where a file of `size` takes the place of another."""
    return blocks(size) + _JOURNAL


class Wear:
    """Bytes of each of the latest hours. Seconds while the daemon does not run count as none. Safe to use from several threads.

    Args:
        clock: seconds that never go back.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock, self._hours = clock, [0] * HOURS
        self._began = clock()  # the present hour
        self._lock = threading.RLock()

    def restore(self, hours: Sequence[int], into: float) -> None:
        """Goes on from what `kept` gave."""
        with self._lock:
            self._hours = [*hours, *[0] * HOURS][:HOURS]
            self._began = self._clock() - min(max(into, 0.0), _HOUR)

    def kept(self) -> tuple[tuple[int, ...], int]:
        """The hours, without those at the end in which there was nothing, and seconds of the present one."""
        with self._lock:
            self._turn()
            hours = list(self._hours)
            while hours and not hours[-1]:
                hours.pop()
            return tuple(hours), max(0, int(self._clock() - self._began))

    def add(self, size: int) -> None:
        """So many bytes were written now."""
        with self._lock:
            self._turn()
            self._hours[0] += size

    @property
    def lately(self) -> int:
        """Bytes in the present hour and the 24 before it: never fewer than in the latest 24 hours."""
        with self._lock:
            self._turn()
            return sum(self._hours)

    def wait(self, size: int, most: int) -> float:
        """Whole seconds until `size` bytes more are at most `most`; 0 where they are now, infinite where they never will be."""
        if size > most:
            return math.inf
        with self._lock:
            total = self.lately + size
            if total <= most:
                return 0.0
            passed = self._clock() - self._began
            for back in range(1, HOURS + 1):  # after so many hours' ends the last `back` of them have left
                total -= self._hours[HOURS - back]
                if total <= most:
                    return int(back * _HOUR - passed) + 1.0
        return math.inf

    def _turn(self) -> None:
        passed = int((self._clock() - self._began) // _HOUR)
        if passed > 0:
            self._hours = ([0] * min(passed, HOURS) + self._hours)[:HOURS]
            self._began += passed * _HOUR
