"""Tells the service manager how the daemon is, as sd_notify(3) does, and lets it be restarted when one of its workers hangs.

Only the loop that does the work pings the watchdog, and only while every worker shows that it lives: a thread that did nothing else would ping on
when all the others hang.
"""

from __future__ import annotations

import logging
import os
import re
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager

from edgeadapt.runtime.daemon.plain import one_line

LOG = logging.getLogger("edgeadapt")

LONGEST = 200
"""Characters of a status."""

SILENCES = {"source": 60.0, "predict": 30.0, "adapt": 120.0, "store": 120.0}
"""Seconds without a beat after which a worker counts as hung. One that waits for a device beats while it waits."""

STEP = SILENCES["adapt"]
"""Seconds that the loop may wait for a step without a ping."""

_KNOWN, _SHORT = 3, 10.0  # steps after which is known how long they take, and how often such a one must fit the manager's time not to be told of
_PATIENCE = 0.2  # seconds that a message may wait for a manager that does not read


class Notifier:
    """Sends messages to the socket that NOTIFY_SOCKET names; without one it does nothing.

    Nothing here raises for what the manager does. The first message that cannot be sent is told in the log, later ones are not.

    Args:
        environ: where NOTIFY_SOCKET is looked up; None: the process's own environment.
    """

    def __init__(self, environ: Mapping[str, str] | None = None) -> None:
        self._address = (os.environ if environ is None else environ).get("NOTIFY_SOCKET", "")
        self._complained = False

    def ready(self, status: str = "") -> None:
        """It serves; also after a reload."""
        self._send("READY=1", *([_status(status)] if status else []))

    def status(self, text: str) -> None:
        """One line for `systemctl status`, of at most 200 characters; other characters than those one can print become blanks."""
        self._send(_status(text))

    def watchdog(self) -> None:
        """All is well; see `Watchdog`, which knows whether it is."""
        self._send("WATCHDOG=1")

    def stopping(self, status: str = "") -> None:
        """It is about to end."""
        self._send("STOPPING=1", *([_status(status)] if status else []))

    def reloading(self) -> None:
        """It reads its configuration again; `ready` follows."""
        self._send("RELOADING=1", f"MONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")

    def patience(self, seconds: float, well: bool = False) -> None:
        """From now on the watchdog waits so long for a ping, whatever the unit says. well: this is one, and is counted from."""
        self._send(*(["WATCHDOG=1"] if well else []), f"WATCHDOG_USEC={max(1, round(seconds * 1e6))}")

    def extend(self, seconds: float) -> None:
        """What goes on (start, reload, stop) will take so many seconds more, counted from now, whatever its time-out says."""
        self._send(f"EXTEND_TIMEOUT_USEC={max(0, round(seconds * 1e6))}")

    def _send(self, *assignments: str) -> None:
        if not self._address:
            return
        name = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as wire:
                wire.settimeout(_PATIENCE)
                wire.sendto("\n".join(assignments).encode("utf-8", "replace"), name)
        except (OSError, ValueError) as reason:  # ValueError: a name with a NUL inside
            if not self._complained:
                LOG.warning("the service manager cannot be told anything: %s: %s", self._address, reason)
            self._complained = True


def _status(text: str) -> str:
    return f"STATUS={one_line(text, LONGEST)}"


def watchdog_seconds(environ: Mapping[str, str] | None = None) -> float | None:
    """Seconds after which the manager ends the daemon if it was not pinged, by WATCHDOG_USEC; ping twice as often. None: nobody waits for pings.

    So it is also where WATCHDOG_PID names another process, or WATCHDOG_USEC is no number.
    """
    values = os.environ if environ is None else environ
    text, process = values.get("WATCHDOG_USEC", ""), values.get("WATCHDOG_PID", "")
    if not re.fullmatch(r"[0-9]{1,20}", text) or int(text) == 0:
        return None
    return None if process and process != str(os.getpid()) else int(text) / 1e6


class Heartbeats:
    """When each worker was last seen to live. All count from now on, but those that rest.

    Args:
        silences: for each worker, how many seconds it may go without a beat.
        resting: those that have nothing to do yet, and may be silent until they first beat.
        clock: monotonic seconds.
    """

    def __init__(
        self, silences: Mapping[str, float] = SILENCES, resting: Collection[str] = ("adapt", "store"), clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._silences, self._clock = dict(silences), clock
        now = clock()
        self._last: dict[str, float | None] = {worker: None if worker in resting else now for worker in self._silences}

    def beat(self, worker: str) -> None:
        """It lives, and has something to do; from any thread.

        Raises:
            KeyError: there is no such worker.
        """
        self._silences[worker]
        self._last[worker] = self._clock()

    def rest(self, worker: str) -> None:
        """It has nothing to do, and may be silent until its next beat.

        Raises:
            KeyError: there is no such worker.
        """
        self._silences[worker]
        self._last[worker] = None

    @contextmanager
    def working(self, worker: str) -> Iterator[None]:
        """It works within, and rests afterwards."""
        self.beat(worker)
        try:
            yield
        finally:
            self.rest(worker)

    def late(self) -> dict[str, float]:
        """The workers that have been silent for too long, and for how many seconds."""
        now = self._clock()
        silent = {worker: now - last for worker, last in self._last.items() if last is not None}
        return {worker: seconds for worker, seconds in silent.items() if seconds > self._silences[worker]}


class Watchdog:
    """Pings the manager for the loop that does the work, while no worker is late; and has it wait longer for a step, during which nobody pings.

    Args:
        notifier: sends the pings.
        heartbeats: of the workers.
        seconds: what `watchdog_seconds` says; None: there is no ping, but late workers are told in the log all the same.
        clock: monotonic seconds.
    """

    def __init__(self, notifier: Notifier, heartbeats: Heartbeats, seconds: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._notifier, self._heartbeats, self._clock = notifier, heartbeats, clock
        self._seconds, self._every = seconds, None if seconds is None else seconds / 4
        self._steps, self._patient, self._lock = 0, False, threading.Lock()
        self._took: deque[float] = deque(maxlen=_KNOWN)
        self._pinged = -float("inf")
        self._late: set[str] = set()

    def waits(self, seconds: float | None = None, well: bool = False) -> None:
        """Has the manager wait so long for a ping; None: as long as its unit says. Nothing where nobody waits: it would begin to.

        well: this is a ping, and is counted from.
        """
        if self._seconds is not None:
            self._notifier.patience(self._seconds if seconds is None else seconds, well)

    @contextmanager
    def step(self) -> Iterator[None]:
        """A step is taken within that the loop takes or may have to wait for; from any thread.

        The manager is asked to wait `STEP` seconds, where it would not wait as long and the latest steps were not much shorter than it would.
        """
        begun = self._clock()
        with self._lock:
            self._steps += 1
            short = len(self._took) == _KNOWN and self._seconds is not None and _SHORT * max(self._took) < self._seconds
            if not self._patient and not short and self._seconds is not None and self._seconds < STEP:
                self._patient = True  # until the loop turns again after the last step: sooner, what it was late by would count
                self._notifier.patience(STEP)
        try:
            yield
        finally:
            with self._lock:
                self._steps -= 1
                self._took.append(self._clock() - begun)

    def turn(self) -> dict[str, float]:
        """To be called in every turn of the loop, at least four times as often as the manager waits: pings when it is time and nobody is late.

        Returns:
            those that are late, as `Heartbeats.late`.
        """
        late = self._heartbeats.late()
        for worker in late.keys() - self._late:
            LOG.error("%s shows no sign of life for %.0f s; the watchdog is not pinged until it does", worker, late[worker])
        for worker in self._late - late.keys():
            LOG.info("%s shows signs of life again", worker)
        self._late = set(late)
        with self._lock:
            if self._patient and not self._steps and not late and self._seconds is not None:
                self._patient, self._pinged = False, self._clock()
                self._notifier.patience(self._seconds, well=True)
        if not late and self._every is not None and self._clock() - self._pinged >= self._every:
            self._pinged = self._clock()
            self._notifier.watchdog()
        return late
