"""Whose turn it is among the threads that share an adapter."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Turns:
    """A lock that a thread which takes it again and again cannot keep from the others: whoever waits has the next turn."""

    def __init__(self) -> None:
        self.gate, self._lock = threading.Lock(), threading.Lock()

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """The lock, while inside. Whoever waits holds the gate, so that nobody takes the next turn over its head."""
        with self.gate:
            self._lock.acquire()
        try:
            yield
        finally:
            self._lock.release()

    @contextmanager
    def attempt(self) -> Iterator[bool]:
        """Whether the lock was free, and is this thread's while inside; nobody who waits is passed."""
        mine = self.gate.acquire(blocking=False)
        if mine:
            try:
                mine = self._lock.acquire(blocking=False)
            finally:
                self.gate.release()
        try:
            yield mine
        finally:
            if mine:
                self._lock.release()
