"""The record of what is in use: which bundle, which learned state, which of them are on trial. Two copies of it, written in turn.

A copy is a JSON mapping of one line with a checksum. The one with the higher generation counts; where it cannot be read the other one does, which is
one change older, and what it names is still there.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from edgeadapt.bundle import atomic
from edgeadapt.bundle.digest import sha256
from edgeadapt.bundle.reading import Node, parse
from edgeadapt.errors import BundleError, StateError
from edgeadapt.runtime.daemon.store.disk import Owner

FORMAT = 1
COPIES = ("pointer.a", "pointer.b")
SLOTS = ("a", "b")
HOURS = 25
"""The present one and those of a whole day before it."""
_LARGEST = 64 * 2**10
_HASH = "[0-9a-f]{64}"
_FIX = "where both copies are, install the bundle again: edgeadapt install model.edgeadapt"


class LostError(StateError):
    """There are copies, and all of them are damaged."""


@dataclass(frozen=True)
class Saved:
    """A learned state: the slot it is in, the pointer's generation that it was written for, and its own checksum."""

    slot: str
    generation: int
    sha256: str


@dataclass(frozen=True)
class States:
    """The learned states of bundles that can serve each other's; None is the bundle's own start.

    Attributes:
        active: what was started with, or committed since.
        last_good: what last proved itself by serving for a while.
    """

    active: Saved | None = None
    last_good: Saved | None = None


@dataclass(frozen=True)
class Installed:
    """A bundle: its digest, which states it takes (`checkpoint.compatible`), whether it has yet to prove itself, and where it is if not with us."""

    digest: str
    compatible: str
    trial: bool = False
    path: str = ""


@dataclass(frozen=True)
class Pointer:
    """What is in use.

    Attributes:
        generation: counts the changes.
        boots: starts in a row, the present one among them, that did not prove themselves.
        active, previous: the bundle that is served, and the one before it. outside: instead of these, one that is not installed.
        states: by `Installed.compatible`.
        written: bytes in each of the latest hours that the daemon ran, the present one first; `into`: seconds of that.
    """

    generation: int = 0
    boots: int = 0
    active: Installed | None = None
    previous: Installed | None = None
    outside: Installed | None = None
    states: Mapping[str, States] = field(default_factory=dict)
    written: tuple[int, ...] = ()
    into: int = 0

    @property
    def serving(self) -> Installed | None:
        """The bundle that is in use."""
        return self.outside or self.active

    def states_of(self, bundle: Installed) -> States:
        """Its learned states."""
        return self.states.get(bundle.compatible, States())


def encode(pointer: Pointer) -> bytes:
    """A copy's bytes."""
    plain = {"format": FORMAT, **asdict(pointer)}
    return (json.dumps({**plain, "sha256": _checksum(plain)}, sort_keys=True) + "\n").encode()


def decode(data: bytes, where: str) -> Pointer:
    """What a copy says.

    Raises:
        StateError: it is damaged, or of a newer format.
        LostError: it is damaged.
    """
    try:
        value = parse(data, where, halves=True)
        if not isinstance(value, dict) or value.pop("sha256", None) != _checksum(value):
            raise _lost(where)
        node = Node(value, where)
        if (found := node.child("format").integer(0)) != FORMAT:
            raise StateError(f"{where} has format {found}, this reads {FORMAT}", "upgrade edgeadapt on this machine")
        return _pointer(node)
    except (BundleError, RecursionError):
        raise _lost(where) from None


def _lost(where: str) -> LostError:
    return LostError(f"{where} is damaged", _FIX)


def _checksum(plain: Mapping[str, Any]) -> str:
    return sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def _pointer(node: Node) -> Pointer:
    node.keys({"format", "generation", "boots", "active", "previous", "outside", "states", "written", "into"})
    return Pointer(
        generation=node.child("generation").integer(0),
        boots=node.child("boots").integer(0),
        active=node.child("active").maybe(_installed),
        previous=node.child("previous").maybe(_installed),
        outside=node.child("outside").maybe(_installed),
        states=node.child("states").mapping(_states, _HASH),
        written=node.child("written").items(lambda item: item.integer(0)),
        into=node.child("into").integer(0),
    )


def _installed(node: Node) -> Installed:
    node.keys({"digest", "compatible", "trial", "path"})
    path = node.child("path").text("[^\0]*")
    try:
        os.fsencode(path)
    except UnicodeEncodeError:
        raise node.wrong("a path", "other text") from None
    return Installed(node.child("digest").text(_HASH), node.child("compatible").text(_HASH), node.child("trial").truth(), path)


def _states(node: Node) -> States:
    node.keys({"active", "last_good"})
    return States(node.child("active").maybe(_saved), node.child("last_good").maybe(_saved))


def _saved(node: Node) -> Saved:
    node.keys({"slot", "generation", "sha256"})
    return Saved(node.child("slot").text("|".join(SLOTS)), node.child("generation").integer(0), node.child("sha256").text(_HASH))


class Pair:
    """The two copies in a folder; what is written of them is its owner's, where one is given."""

    def __init__(self, folder: Path, owner: Owner | None = None) -> None:
        self._paths, self._owner = [folder / name for name in COPIES], owner

    def read(self) -> Pointer:
        """The newest; one of generation 0 where there is none yet.

        Raises:
            LostError: all that there are are damaged.
            StateError: none can be read, or one is of a newer format.
        """
        found, faults = self._all()
        if not found and faults:
            raise min(faults, key=lambda fault: isinstance(fault, LostError))  # what cannot be read now may be sound
        return max(found.values(), key=lambda pointer: pointer.generation, default=Pointer())

    def write(self, pointer: Pointer) -> int:
        """Writes over the older copy, and gives the bytes written. Where the other one could not be read, over that too.

        Raises:
            OSError: as writing any file.
        """
        found, _ = self._all()
        first, other = sorted(self._paths, key=lambda path: found[path].generation if path in found else -1)
        data, paths = encode(pointer), [first] if other in found else [first, other]
        for path in paths:
            with atomic.replacing(path) as (file, _):
                if self._owner is not None:
                    self._owner.take(file.fileno())
                file.write(data)
        return len(data) * len(paths)

    def _all(self) -> tuple[dict[Path, Pointer], list[StateError]]:
        found: dict[Path, Pointer] = {}
        faults: list[StateError] = []
        for path in self._paths:
            try:
                found[path] = decode(_read(path), str(path))
            except FileNotFoundError:
                continue
            except OSError as reason:
                faults.append(StateError(f"{path} cannot be read: {reason.strerror}", "check its permissions, and the disk"))
            except LostError as fault:
                faults.append(fault)
        return found, faults


def _read(path: Path) -> bytes:
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe would wait for ever
    with os.fdopen(handle, "rb") as file:
        return file.read(_LARGEST)
