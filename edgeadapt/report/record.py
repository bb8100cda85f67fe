"""Measurements of an endless stream in bounded memory."""

from __future__ import annotations

import math


class Trace:
    """A series that keeps its whole span: when it has too many points, neighbours are merged into their mean.

    Args:
        limit: the most points kept; an even number.
    """

    def __init__(self, limit: int = 480) -> None:
        self._limit, self._each = limit, 1
        self._done: list[tuple[float, float]] = []
        self._sum, self._count, self._x = 0.0, 0, 0.0

    def add(self, x: float, value: float) -> None:
        """A value at x; x only grows. One that is not finite is left out."""
        if not math.isfinite(value):
            return
        self._sum, self._count, self._x = self._sum + value, self._count + 1, x
        if self._count == self._each:
            self._done.append((x, self._sum / self._count))
            self._sum, self._count = 0.0, 0
            if len(self._done) == self._limit:
                pairs = zip(self._done[::2], self._done[1::2])
                self._done = [(b[0], (a[1] + b[1]) / 2) for a, b in pairs]
                self._each *= 2

    @property
    def points(self) -> list[tuple[float, float]]:
        """(x, mean) pairs; x is where each stretch ends. What is left over at the end belongs to the last stretch."""
        if not self._count:
            return list(self._done)
        if not self._done:
            return [(self._x, self._sum / self._count)]
        mean = (self._done[-1][1] * self._each + self._sum) / (self._each + self._count)
        return [*self._done[:-1], (self._x, mean)]


class Quantiles:
    """Quantiles of positive numbers to within one percent, however many there are."""

    _STEP = math.log(1.02)

    def __init__(self) -> None:
        self._bins: dict[int, int] = {}
        self._count = 0

    def add(self, value: float, times: int = 1) -> None:
        """Counts a value; those below 1e-9 count as that."""
        place = round(math.log(max(value, 1e-9)) / self._STEP)
        self._bins[place] = self._bins.get(place, 0) + times
        self._count += times

    def __len__(self) -> int:
        return self._count

    def at(self, share: float) -> float:
        """The value that a share (0 to 1) of all values do not exceed; 0 where there are none."""
        left = share * self._count
        for place in sorted(self._bins):
            left -= self._bins[place]
            if left <= 0:
                return math.exp(place * self._STEP)
        return 0.0
