"""How things get from the thread that has them to the one that takes them: a few wait, and where nobody takes them the oldest goes."""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Mailbox(Generic[T]):
    """Things in the order in which they were put; putting never waits.

    Args:
        size: how many may wait to be taken.
        most: bytes of what waits, at most; one thing always may.
        weigh: bytes of one thing; None: they do not matter.

    Attributes:
        dropped: how many went because there were newer ones.
    """

    def __init__(self, size: int, most: float = math.inf, weigh: Callable[[T], int] | None = None) -> None:
        self._things: deque[tuple[T, int]] = deque()
        self._size, self._most, self._weigh, self._held, self._over = size, most, weigh, 0, False
        self._changed = threading.Condition()
        self.dropped = 0

    @property
    def over(self) -> bool:
        """Whether nothing more is put."""
        return self._over

    def put(self, thing: T) -> None:
        """One thing more; nothing where it is over."""
        weight = 0 if self._weigh is None else self._weigh(thing)
        with self._changed:
            if self._over:
                return
            while len(self._things) == self._size or (self._things and self._held + weight > self._most):
                self._first()
                self.dropped += 1
            self._things.append((thing, weight))
            self._held += weight
            self._changed.notify()

    def end(self) -> None:
        """Nothing more is put; what waits may still be taken."""
        with self._changed:
            self._over = True
            self._changed.notify_all()

    def stop(self) -> None:
        """It is over at once, and what waits is gone."""
        with self._changed:
            self._things.clear()
            self._over = True
            self._changed.notify_all()

    def take(self, wait: float | None = None) -> T | None:
        """The oldest as soon as there is one; None after `wait` seconds without, or where nothing more comes."""
        with self._changed:
            self._changed.wait_for(lambda: self._things or self._over, wait)
            return self._first() if self._things else None

    def _first(self) -> T:
        thing, weight = self._things.popleft()
        self._held -= weight
        return thing
