"""A state folder: what is in it, and what may be done to it, each a step that is either done or not, whatever happens meanwhile."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

from edgeadapt.bundle import Bundle, Manifest, signing
from edgeadapt.errors import BundleError, StateError
from edgeadapt.runtime import checkpoint, kept
from edgeadapt.runtime.checkpoint import Taken
from edgeadapt.runtime.daemon.store import disk, history, installing, moves
from edgeadapt.runtime.daemon.store.pointer import COPIES, SLOTS, Installed, Pointer, Saved
from edgeadapt.runtime.daemon.store.record import PATIENCE, WRITING, Record
from edgeadapt.runtime.daemon.store.terms import Boot, Installation, Limits
from edgeadapt.runtime.daemon.store.wear import cost
from edgeadapt.runtime.guarded import written

LOG = logging.getLogger("edgeadapt")

STATES, LOCK = "slots", "lock"
_BUSY = 5.0
_RESTART = "restart the daemon, so that it serves what is installed"
_ENTRY = 512  # bytes at most of a tensor's name and place in a saved state


class Store:
    """Made by `Store.open`. Safe to use from several threads, and beside a process that installs.

    Where the disk cannot be written, what was to be written raises a StateError, and `degraded` says why until writing succeeds again. What is
    there can be started with all the same.

    Args:
        folder: the state folder.
        limits: see there.
        keys: files of public keys; with any, only bundles that one of them signed are installed and started with.
        handle: the lock that keeps other daemons out; None: this is no daemon.
        clock: seconds that never go back.

    Attributes:
        folder, limits: see above.
    """

    def __init__(self, folder: Path, limits: Limits, keys: Sequence[Path], handle: int | None, clock: Callable[[], float]) -> None:
        self.folder, self.limits = folder, limits
        self._keys, self._handle, self._clock, self._mutex = tuple(keys), handle, clock, threading.RLock()
        self._owner = disk.Owner(folder)
        self._record = Record(folder, limits.history, clock, self._owner)
        self._bundle: Installed | None = None
        self._saved: Saved | None = None
        self._since: float | None = None

    @classmethod
    def open(
        cls,
        folder: str | os.PathLike[str],
        limits: Limits | None = None,
        keys: Sequence[Path] = (),
        serving: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> Store:
        """Opens a state folder, and makes it where only its parent is there.

        Args:
            folder: it. limits, keys, clock: see the class.
            serving: this is the daemon that serves from it, of which there is one at most. False: to install.

        Raises:
            StateError: another daemon serves from it, its lock is not a file, or it is missing and cannot be made.
        """
        place, handle = Path(os.path.abspath(folder)), None
        try:
            disk.make(place)
            if serving and (handle := _locked(place, disk.Owner(place))) is None:
                raise StateError(f"another daemon serves from {place}", "stop it first, or give this one a folder of its own")
        except OSError as reason:
            if not place.is_dir():
                raise disk.explained("the state folder cannot be used", place, reason) from None
            LOG.warning("%s cannot be locked: %s", place, reason.strerror)  # nor written, so that two do each other no harm
        return cls(place, limits or Limits(), keys, handle, clock)

    def close(self) -> None:
        """Lets others serve from the folder. Writes nothing."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def __enter__(self) -> Store:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    # ------------------------------------------------------------------------------------------------------------ serving

    def begin_boot(self, outside: Path | None = None) -> Boot:
        """Chooses what to start with, and counts this start. Where that cannot be written it is chosen all the same.

        Args:
            outside: a bundle that is not installed, to be served instead of the one that is.

        Raises:
            StateError: there is no bundle, none of those there can be used, or the record cannot be read.
            BundleError: the one outside cannot be used.
        """
        with self._mutex, self._record.changing():
            manifests: dict[Installed, Manifest] = {}
            named = None
            if outside is not None:
                found = self._checked(outside)
                named = Installed(found.digest, checkpoint.compatible(found.manifest), path=str(found.path))
                manifests[named] = found.manifest

            def fault_of(bundle: Installed) -> str:
                try:
                    if bundle not in manifests:
                        manifests[bundle] = installing.opened(self.folder, bundle, self._keys).manifest
                except BundleError as reason:
                    return reason.message
                return ""

            before = moves.served_from(self.now, named)
            begun = moves.begun(before, self.limits.boots, fault_of, lambda bundle, saved: self._sound(bundle, saved, manifests[bundle]))
            self._bundle, self._saved, self._since = begun.bundle, begun.saved, self._clock()
            with suppress(StateError):
                gave_up = [("gave up", reason) for reason in begun.given_up]
                self._record.write(begun.pointer, *gave_up, ("boot", f"with the {begun.choice}, start {begun.pointer.boots} in a row"))
            self._clear()
        path = installing.place(self.folder, begun.bundle)
        state = None if begun.saved is None else self._slot(begun.bundle, begun.saved.slot)
        return Boot(path, begun.bundle, state, begun.choice, "; ".join(begun.given_up), begun.pointer.boots)

    @property
    def left(self) -> float | None:
        """Seconds that what is served has yet to serve before it has proved itself, by `settled`; None where it has."""
        since = self._since  # another thread may take it away meanwhile
        return None if since is None else max(0.0, self.limits.probation - (self._clock() - since))

    def settled(self) -> bool:
        """What is served has proved itself: it has served well for as long as `left` said. Gives whether that was news, and is written.

        It is the last good from now on, and what is gone back to from what does not prove itself. Where another bundle was installed meanwhile, or
        another process is changing something, nothing is done.

        Raises:
            StateError: it cannot be written.
        """
        return self._prove("it has served well", False)

    def mark_good(self) -> None:
        """The same at once, because somebody says so.

        Raises:
            StateError: it cannot be written, or another bundle was installed meanwhile.
        """
        self._prove("by hand", True)

    def commit(self, taken: Taken, manifest: Manifest, always: bool = False, alone: bool = False) -> float:
        """Saves a learned state, beside the last good. It is what is started with from now on, and has yet to prove itself by serving.

        Args:
            taken: gives it, as `Guard.taken`.
            manifest: of the bundle that is served.
            always: whatever was written today, and though what is active has not proved itself: after a roll-back, or at the end.
            alone: there is no last good beside it any more, from the same change of the record on.

        Returns:
            0 once it is on the disk; else nothing was written, and these are the seconds until it may be tried again.

        Raises:
            StateError: it cannot be written, or it is not of the bundle that is served.
        """
        with self._mutex:
            bundle = self._serving()
            if checkpoint.compatible(manifest) != bundle.compatible:
                raise StateError("the state is not of the bundle that is served", "commit what that bundle's adapter holds")
            if not always and (wait := self._wait(manifest)):
                return wait
            with self._record.changing(PATIENCE if always else 0.0, needed=always) as mine:
                if not mine:
                    return _BUSY
                if bundle.compatible not in {found.compatible for found in moves.bundles(self.now)}:
                    raise StateError("the bundle that is served is not installed any more", _RESTART)
                slot, generation = moves.slot_for(self.now.states_of(bundle)), self.now.generation + 1
                saved = Saved(slot, generation, self._save(self._slot(bundle, slot), taken, manifest, generation))
                text = f"a learned state, in slot {slot}{', without a last good' if alone else ''}"
                self._record.write(moves.committed(self.now, bundle, saved, alone), ("committed", text))
                self._saved, self._since = saved, self._clock()
        return 0.0

    def roll_back(self, to_start: bool = False) -> None:
        """The last good is active again; where it was, or with `to_start`, the bundle's own start is, and there is no last good.

        Raises:
            StateError: it cannot be written.
        """
        with self._mutex, self._record.changing():
            bundle = self._serving()
            after = moves.rolled_back(self.now, bundle, to_start)
            back = after.states_of(bundle).active
            self._record.write(after, ("rolled back", "to the bundle's own start" if back is None else f"to the last good, in slot {back.slot}"))
            self._saved, self._since = back, self._clock()

    def stopped(self) -> None:
        """The daemon was asked to end, and ends in order: a start that did not have the time to prove itself has not failed.

        Raises:
            StateError: it cannot be written.
        """
        with self._mutex, self._record.changing():
            if self._since is not None and self._current() and self.now.boots:
                self._record.write(replace(self.now, boots=self.now.boots - 1))

    # ------------------------------------------------------------------------------------------------------------ bundles

    def install(self, path: str | os.PathLike[str]) -> Installation:
        """Copies a bundle beside those that are there, and has the next start begin with it; it is on trial until it has proved itself.

        The one before is kept to go back to, if it has proved itself; else the one before that. What is not used any more is removed, unless a
        daemon serves just now, whose next start does it.

        Raises:
            BundleError: it is missing, damaged, or not signed as asked for.
            StateError: there is no room for it, it cannot be written, or another process is installing.
        """
        bundle = self._checked(path)
        named = Installed(bundle.digest, checkpoint.compatible(bundle.manifest), trial=True)
        folder = self.folder / installing.FOLDER
        with self._mutex, self._record.explained(f"{path} cannot be installed"):
            disk.make(folder, self._owner)
            with disk.locked(folder, PATIENCE) as mine:
                if not mine:
                    raise StateError(f"another process is installing into {folder}", "wait until it is done")
                target = installing.bring(path, bundle, named, self.folder, self._keys, self.limits.spare, self._owner)
                with self._record.changing(lost=True):
                    before = self.now
                    if (after := moves.installed(before, named)) != before:
                        self._record.write(after, ("installed", f"{bundle.manifest.model.name} {named.digest[:12]}"))
            self._clear_unless_served()
        kept_before = "" if after.previous is None else after.previous.digest
        return Installation(target, after.active or named, after == before, before.states_of(named).active is not None, kept_before)

    def undo(self) -> Installed:
        """Has the next start begin with the bundle before, and with the last good of its states; gives what is recorded of it.

        Raises:
            StateError: there is none, or it cannot be written.
        """
        with self._mutex, self._record.changing():
            back, after = moves.undone(self.now)
            self._record.write(after, ("installed", f"the bundle before, {back.digest[:12]}"))
            self._clear_unless_served()
            return back

    # ------------------------------------------------------------------------------------------------------------- looking

    def read(self) -> Pointer:
        """What is in use, read anew.

        Raises:
            StateError: it cannot be read.
        """
        with self._record.changing():
            return self.now

    @property
    def now(self) -> Pointer:
        """What is in use, as it was last read or written."""
        return self._record.now

    @property
    def degraded(self) -> str:
        """Why nothing could be written; "" where the last write was done."""
        return self._record.degraded

    @property
    def on_probation(self) -> bool:
        """Whether the learned state that is active has yet to prove itself."""
        bundle = self._bundle or self.now.serving
        states = None if bundle is None else self.now.states_of(bundle)
        return states is not None and states.active != states.last_good

    @property
    def written_today(self) -> int:
        """Bytes written in the latest 24 hours or a little more, as far as the daemon ran then; bundles are not among them."""
        return self._record.wear.lately

    def happened(self) -> list[dict[str, Any]]:
        """The history, oldest first: "generation", "event", "text" and "time", in seconds of Unix time as far as the clock was right."""
        return self._record.history.entries()

    # -------------------------------------------------------------------------------------------------------- how it is done

    def _serving(self) -> Installed:
        if self._bundle is None:
            raise StateError("nothing was started yet", "call begin_boot first")
        return self._bundle

    def _current(self) -> bool:
        """Whether what is served is what the next start begins with."""
        installed = self.now.serving
        return installed is not None and self._bundle is not None and installed.digest == self._bundle.digest

    def _checked(self, path: str | os.PathLike[str]) -> Bundle:
        return signing.check(path, self._keys) if self._keys else Bundle.open(path)

    def _slot(self, bundle: Installed, slot: str) -> Path:
        return self.folder / STATES / installing.short(bundle.compatible) / f"{slot}.safetensors"

    def _sound(self, bundle: Installed, saved: Saved, manifest: Manifest) -> Saved | None:
        """A saved state as it is in its slot. A newer one than is recorded was being committed when the power went, and is whole."""
        path = self._slot(bundle, saved.slot)
        try:
            with checkpoint.opened(path, manifest) as found:
                kept.check(found.tensors, manifest, str(path))
                right = found.sha256 == saved.sha256 or found.generation > saved.generation
                whole = set(found.tensors) == {spec.name for spec in manifest.state}
                return Saved(saved.slot, found.generation, found.sha256) if right and whole else None
        except StateError as fault:
            LOG.warning("%s", fault.message)
            return None

    def _wait(self, manifest: Manifest) -> float:
        """Seconds until a state may be saved again."""
        if self.on_probation and self.left:
            return self.left
        learned = written(manifest, "adapt") - written(manifest, "predict")
        size = sum((spec.nbytes + _ENTRY) * (2 if spec.name in learned else 1) for spec in manifest.state)
        return self._record.wear.wait(cost(size) + 2 * WRITING, self.limits.bytes_per_day)  # with what is written once it has proved itself

    def _save(self, path: Path, taken: Taken, manifest: Manifest, generation: int) -> str:
        with self._record.explained("the state cannot be saved"):
            disk.make(path.parent.parent, self._owner)
            disk.make(path.parent, self._owner)
            try:
                digest = checkpoint.write(path, taken, manifest, generation)
                self._owner.take(path)
            except StateError as fault:
                self._record.degraded = fault.message
                raise
            self._record.wear.add(cost(path.stat().st_size))
        return digest

    def _prove(self, why: str, by_hand: bool) -> bool:
        with self._mutex, self._record.changing(PATIENCE if by_hand else 0.0, needed=by_hand) as mine:
            if not mine:
                return False
            bundle, news = self._serving(), False
            if not self._current():
                if by_hand:
                    raise StateError("what is served is not what is installed", _RESTART)
            elif (after := moves.settled(self.now, bundle, self._saved)) != self.now:
                self._record.write(after, ("marked good", why))
                news = True
            self._since = None
            return news

    def _clear(self) -> None:
        """Removes what no start can use any more, unless somebody is installing."""
        if not (self.folder / installing.FOLDER).is_dir():  # nothing was ever installed
            self._sweep()
            return
        with suppress(OSError), disk.locked(self.folder / installing.FOLDER, 0.0) as mine:
            if mine:
                self._sweep()
                digests = {installing.short(bundle.digest) for bundle in moves.bundles(self.now)}
                disk.remove_others(self.folder / installing.FOLDER, installing.is_short, digests)

    def _clear_unless_served(self) -> None:
        with suppress(OSError, StateError):
            if (handle := _locked(self.folder, self._owner)) is not None:
                try:
                    self._clear()
                finally:
                    os.close(handle)

    def _sweep(self) -> None:
        kinds = {installing.short(bundle.compatible) for bundle in moves.bundles(self.now)}
        disk.sweep(self.folder, (*COPIES, history.NAME))
        disk.remove_others(self.folder / STATES, installing.is_short, kinds)
        for name in kinds:
            disk.sweep(self.folder / STATES / name, [f"{slot}.safetensors" for slot in SLOTS])


def _locked(folder: Path, owner: disk.Owner) -> int | None:
    """The lock that the daemon holds, for us, or None where it does."""
    disk.created(folder / LOCK, owner)
    return disk.lock(folder / LOCK, os.O_RDONLY | os.O_NOFOLLOW)
