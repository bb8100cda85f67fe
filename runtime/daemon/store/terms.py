"""What a store is told, and what it tells."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from edgeadapt.runtime.daemon.store.pointer import Installed


@dataclass(frozen=True)
class Limits:
    """What a store does when.

    Attributes:
        probation: seconds that a start, or a new state, has to serve before it has proved itself.
        boots: starts in a row that may fail to prove themselves before the next thing is started with.
        bytes_per_day: states are saved more rarely where they would write more than this in 24 hours.
        history: entries of it that are kept.
        spare: bytes that installing a bundle leaves free on the disk.
    """

    probation: float = 600.0
    boots: int = 3
    bytes_per_day: int = 64 * 2**20
    history: int = 200
    spare: int = 16 * 2**20


@dataclass(frozen=True)
class Boot:
    """What to start with.

    Attributes:
        bundle: the bundle's file; every byte of it was checked.
        installed: what is recorded of it: its digest, and whether it is on trial.
        state: the saved state to go on from, for `Guard.load`; None: the bundle's own start.
        choice: which of the possible that is, a constant of `moves`.
        why: why none of those before it in their order; "" where there are none.
        attempt: the how manieth start in a row this is that has yet to prove itself.
    """

    bundle: Path
    installed: Installed
    state: Path | None
    choice: str
    why: str
    attempt: int


@dataclass(frozen=True)
class Installation:
    """What came of installing.

    Attributes:
        path: where the bundle lies now. installed: what is recorded of it.
        again: whether it was the active one already.
        goes_on: whether it goes on from what was learned with another bundle, whose states it takes.
        before: the digest of the bundle that can be gone back to; "" where there is none.
    """

    path: Path
    installed: Installed
    again: bool
    goes_on: bool
    before: str
