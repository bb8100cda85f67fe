"""What is learned on its way to the disk: by a thread of its own, and no more often than the store lets it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any

from edgeadapt.bundle import Manifest
from edgeadapt.errors import StateError
from edgeadapt.runtime.checkpoint import Snapshot
from edgeadapt.runtime.daemon.store import Store

LOG = logging.getLogger("edgeadapt")

_SOON, _AGAIN = 5.0, 60.0  # seconds until another process may be done, and until a disk that could not be written is tried again


class Saving:
    """Of one store and one model. Nothing here raises a StateError: it is told in the log, and the store says that it is degraded.

    Args:
        store: where to.
        taken: gives what is saved, as `Guard.taken`; None: nothing is learned, and what is served has only to prove itself.
        manifest: of the bundle that is served.
        working: entered by the thread while it writes; for the watchdog.
        tell: told in words of what was saved, proven or not.
        clock: monotonic seconds.

    Attributes:
        pending: whether there is something that is not yet on the disk.
        saved: Unix time of the last save; None before it.
    """

    def __init__(
        self,
        store: Store,
        taken: Callable[[], AbstractContextManager[Snapshot]] | None,
        manifest: Manifest,
        working: Callable[[], AbstractContextManager[None]],
        tell: Callable[[str, str], object],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store, self._taken, self._manifest, self._working, self._tell, self._clock = store, taken, manifest, working, tell, clock
        self._pool = ThreadPoolExecutor(1, "edgeadapt-store")
        self._going: Future[Any] | None = None
        self._lock = threading.Lock()
        self.pending, self._always, self._alone, self._not_before, self._proving_from = False, False, False, 0.0, 0.0
        self.saved: float | None = None
        self._complaint = ""

    def wanted(self, always: bool = False, alone: bool = False) -> None:
        """What is learned has changed for good.

        always: it is to be saved whatever was written today, as after a roll-back. alone: there is to be no last good beside it then, as that was
        put away.
        """
        if self._taken is None:
            return
        with self._lock:
            self.pending, self._always, self._alone = True, self._always or always, self._alone or alone
            self._not_before = 0.0 if always else self._not_before

    def turn(self, well: bool) -> None:
        """To be called in every turn of the daemon's loop: has what is due done, and waits for nothing.

        well: whether frames are answered, and nothing was rolled back just now; else what is served does not prove itself.
        """
        if self._going is not None and not self._going.done():
            return
        now = self._clock()
        if well and not self._always and self._store.left == 0.0 and now >= self._proving_from:  # before a save begins its time anew
            self._going = self._pool.submit(self._prove)
        elif self.pending and now >= self._not_before:
            self._going = self._pool.submit(self._save)

    def at_once(self) -> str:
        """Saves what is pending, and waits for it; gives why it is not on the disk, "" where it is.

        More may have been learned meanwhile, and be pending again. After `finish` nothing is saved any more.
        """
        try:
            going = self._pool.submit(self._save)
        except RuntimeError:  # there is no such thread any more
            return "the daemon ends just now"
        return going.result()

    def finish(self) -> None:
        """At the end: waits for what goes on, and saves what is not yet on the disk."""
        self._pool.shutdown()
        if self.pending:
            self.wanted(always=True)
            self._save()

    def _save(self) -> str:
        """Why it is not on the disk; "" once it is."""
        with self._lock:
            if not self.pending:  # somebody was quicker
                return ""
            always, alone = self._always, self._alone
            self.pending = self._always = self._alone = False
        assert self._taken is not None
        try:
            with self._working():
                wait = self._store.commit(self._taken, self._manifest, always, alone)
        except StateError as fault:
            return self._failed(fault, always, alone)
        except Exception:  # a defect must not end the thread that saves
            LOG.exception("what was learned could not be saved")
            return self._failed(StateError("what was learned could not be saved"), always, alone)
        if wait:
            with self._lock:
                self.pending, self._alone = True, self._alone or alone
                self._not_before = 0.0 if self._always else self._clock() + wait
            return "it is put off"
        self.saved, self._complaint = time.time(), ""
        self._tell("saved", "what was learned is on the disk")
        return ""

    def _prove(self) -> None:
        self._proving_from = self._clock() + _SOON
        if self._always:  # what is active was just rolled back
            return
        try:
            with self._working():
                if self._store.settled():
                    self._tell("proven", "it has served well and is the last good from now on")
        except StateError as fault:
            self._proving_from = self._clock() + _AGAIN
            self._complain(fault)

    def _failed(self, fault: StateError, always: bool, alone: bool) -> str:
        with self._lock:
            self._not_before = self._clock() + _AGAIN
            self.pending, self._always, self._alone = True, self._always or always, self._alone or alone
        self._complain(fault)
        return fault.message

    def _complain(self, fault: StateError) -> None:
        LOG.warning("%s", fault)
        if fault.message != self._complaint:  # each minute the same would push all else out of the events
            self._tell("disk", fault.message)
        self._complaint = fault.message
