"""Windows that are adapted on beside the answers: on a thread of their own, and only as often as answers come in time."""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress

_MOST = 64  # windows that are passed over after a step that made answers late, at most
_NICE, _LEAST = 10, 19  # so much less urgent than the thread that made it, and the least urgent that there is
LOG = logging.getLogger("edgeadapt")


class Beside:
    """At most one window at a time is worked on. One that is full before the last has ended is passed over.

    After work during which an answer was late the next window is passed over too, then the next two, and so on, up to 64; work during which none was
    halves that.

    Args:
        work: what is done with a window, given its number; whether it changed the model.

    Attributes:
        late: answers that came late. passed: windows that were passed over.
    """

    def __init__(self, work: Callable[[int], bool]) -> None:
        self._work, self._pool = work, ThreadPoolExecutor(1, "edgeadapt-step", _give_way)
        self._going: Future[bool] | None = None
        self.late = self.passed = 0
        self._pause = self._left = 0
        self._hindered = False

    def ended(self) -> bool:
        """Whether work has ended since this was last asked, and changed the model.

        Raises:
            what the work raised.
        """
        if self._going is None or not self._going.done():
            return False
        going, self._going = self._going, None
        self._pause = min(max(1, 2 * self._pause), _MOST) if self._hindered else self._pause // 2
        self._left, self._hindered = self._pause, False
        return going.result()

    @property
    def going(self) -> bool:
        """Whether a window is worked on now."""
        return self._going is not None and not self._going.done()

    def answered(self, late: bool) -> None:
        """Notes an answer."""
        self.late += late
        self._hindered |= late and self._going is not None

    def full(self, window: int) -> bool:
        """Begins to work on a window, or passes it over; whether it was begun, and its memory is in use until it has `ended`."""
        if self._going is not None or self._left:
            self.passed += 1
            self._left = max(0, self._left - 1)
            return False
        self._going = self._pool.submit(self._work, window)
        return True

    def close(self, quietly: bool = False) -> None:
        """Waits for the work that goes on. quietly: what it raised is only logged, as where something else was raised already.

        Raises:
            what it raised.
        """
        self._pool.shutdown()
        reason = None if self._going is None else self._going.exception()
        if reason is not None:
            if not quietly:
                raise reason
            LOG.error("a step that went on beside the answers failed: %s", reason)


def _give_way() -> None:
    """Has this thread wait for the processor where others want it: on Linux each has a priority of its own. Threads of an operator keep theirs."""
    if sys.platform == "linux":
        with suppress(OSError):
            me = threading.get_native_id()
            os.setpriority(os.PRIO_PROCESS, me, min(_LEAST, os.getpriority(os.PRIO_PROCESS, me) + _NICE))
