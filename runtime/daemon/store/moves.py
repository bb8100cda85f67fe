"""How one record of what is in use follows from another. Nothing here touches the disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from edgeadapt.errors import StateError
from edgeadapt.runtime.daemon.store.pointer import SLOTS, Installed, Pointer, Saved, States

NEWEST, LAST_GOOD, START, PREVIOUS, PREVIOUS_START = "newest", "last good", "start", "previous bundle", "previous bundle's start"


class _Rung(NamedTuple):
    """Something to start with."""

    name: str
    bundle: Installed
    saved: Saved | None


@dataclass(frozen=True)
class Begun:
    """A start: the record of it, what it starts with, which of the possible that is, and why none of those before it."""

    pointer: Pointer
    bundle: Installed
    saved: Saved | None
    choice: str
    given_up: tuple[str, ...]


def begun(pointer: Pointer, boots: int, fault_of: Callable[[Installed], str], found: Callable[[Installed, Saved], Saved | None]) -> Begun:
    """One more start.

    It is with what is active; after `boots` in a row that did not prove themselves, or where it is damaged, with the next of: the last good, the
    bundle's own start, the bundle before it with its last good, that one's own start.

    Args:
        pointer: before.
        boots: see above.
        fault_of: what is wrong with a bundle; "" where nothing is.
        found: a saved state as it really is in its slot; None where that is damaged.

    Raises:
        StateError: there is no bundle, or none can be started with.
    """
    rungs, given_up = list(_rungs(pointer)), []
    if not rungs:
        raise StateError("no bundle is installed", "edgeadapt install model.edgeadapt")
    first = rungs[0]
    if pointer.boots >= boots and len(rungs) > 1:
        given_up.append(f"{pointer.boots} starts in a row did not prove themselves, so the {first.name} is passed over")
        rungs = [*rungs[1:], first]  # rather than with nothing
    faults: dict[Installed, str] = {}
    for rung in rungs:
        if rung.bundle not in faults:
            faults[rung.bundle] = fault_of(rung.bundle)
        saved = None if rung.saved is None or faults[rung.bundle] else found(rung.bundle, rung.saved)
        if not faults[rung.bundle] and (saved is not None or rung.saved is None):
            counted = pointer.boots + 1 if rung is first else 1
            return Begun(replace(_started(pointer, rung, saved), boots=counted), rung.bundle, saved, rung.name, tuple(given_up))
        given_up.append(f"the {rung.name} cannot be used: {faults[rung.bundle] or 'its state is damaged'}")
    raise StateError(f"nothing can be started with: {given_up[-1]}", "install the bundle again: edgeadapt install model.edgeadapt")


def _rungs(pointer: Pointer) -> Iterator[_Rung]:
    """What can be started with, the best first."""
    if (bundle := pointer.serving) is None:
        return
    states = pointer.states_of(bundle)
    if states.active is not None:
        yield _Rung(NEWEST, bundle, states.active)
        if states.last_good not in (None, states.active):
            yield _Rung(LAST_GOOD, bundle, states.last_good)
    yield _Rung(START, bundle, None)
    before = pointer.previous
    if pointer.outside is None and before is not None:
        if (good := pointer.states_of(before).last_good) is not None:
            yield _Rung(PREVIOUS, before, good)
        yield _Rung(PREVIOUS_START, before, None)


def _started(pointer: Pointer, rung: _Rung, saved: Saved | None) -> Pointer:
    if rung.bundle == pointer.previous and pointer.outside is None:
        pointer = replace(pointer, active=pointer.previous, previous=None)
    states = pointer.states_of(rung.bundle)
    good = saved if states.last_good == rung.saved else states.last_good  # as it really is, or where it is not what is started with as it was
    return _tidied(_with(pointer, rung.bundle, States(saved, good)))


def slot_for(states: States) -> str:
    """The slot that the next state goes to: never that of the last good, and if possible not that of what is active."""
    taken = states.last_good or states.active
    return SLOTS[1] if taken is not None and taken.slot == SLOTS[0] else SLOTS[0]


def committed(pointer: Pointer, bundle: Installed, saved: Saved, alone: bool = False) -> Pointer:
    """A state was written for a bundle, and has yet to prove itself; the last good stays, or with `alone` is put away."""
    return _with(pointer, bundle, States(saved, None if alone else pointer.states_of(bundle).last_good))


def settled(pointer: Pointer, bundle: Installed, saved: Saved | None) -> Pointer:
    """What is served, a bundle with a state, has proved itself."""
    return _with(_proved(pointer, bundle), bundle, States(saved, saved))


def _proved(pointer: Pointer, bundle: Installed) -> Pointer:
    if pointer.active is not None and pointer.active.digest == bundle.digest:
        pointer = replace(pointer, active=replace(pointer.active, trial=False))
    return replace(pointer, boots=0)


def rolled_back(pointer: Pointer, bundle: Installed, to_start: bool) -> Pointer:
    """The last good is active again; where it was, or with `to_start`, the bundle's own start is, and there is no last good."""
    good = pointer.states_of(bundle).last_good
    back = None if to_start or pointer.states_of(bundle).active == good else good
    return _with(pointer, bundle, States(back, back))


def installed(pointer: Pointer, bundle: Installed) -> Pointer:
    """A bundle takes the place of the active one, which is kept if it has proved itself, else the one before it is."""
    old = pointer.active
    if old is not None and old.digest == bundle.digest:
        return pointer
    kept = pointer.previous if old is not None and old.trial and pointer.previous is not None else old
    if kept is not None and kept.digest == bundle.digest:
        kept = None
    after = replace(pointer, boots=0, active=replace(bundle, trial=True), previous=kept)
    return _tidied(after)


def undone(pointer: Pointer) -> tuple[Installed, Pointer]:
    """The bundle before, and the record with it active again, with the last good of its states.

    Raises:
        StateError: there is none.
    """
    before = pointer.previous
    if before is None:
        raise StateError("there is no bundle to go back to", "install the one that is wanted: edgeadapt install model.edgeadapt")
    good = pointer.states_of(before).last_good
    return before, _tidied(_with(replace(pointer, boots=0, active=before, previous=None), before, States(good, good)))


def served_from(pointer: Pointer, bundle: Installed | None) -> Pointer:
    """A bundle that is not installed is served, or with None the installed one is."""
    if bundle == pointer.outside:
        return pointer
    return _tidied(replace(pointer, boots=0, outside=bundle))


def bundles(pointer: Pointer) -> list[Installed]:
    """All that are named."""
    return [bundle for bundle in (pointer.active, pointer.previous, pointer.outside) if bundle is not None]


def _with(pointer: Pointer, bundle: Installed, states: States) -> Pointer:
    return replace(pointer, states={**pointer.states, bundle.compatible: states})


def _tidied(pointer: Pointer) -> Pointer:
    """Without states of bundles that are not named any more."""
    wanted = {bundle.compatible for bundle in bundles(pointer)}
    return replace(pointer, states={key: states for key, states in pointer.states.items() if key in wanted})
