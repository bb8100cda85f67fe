"""A folder whose changes are watched, call by call, and what a power cut at any moment may leave of it.

Only what was synced is sure to be there: a file's bytes since `fsync` of it, a name since `fsync` of its folder. Of the rest each name may be the old
or the new one, and a file may be whole, cut short, or filled with zeros or rubbish.
"""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

CALLS = ("open", "fsync", "replace", "unlink", "mkdir", "rmdir")

Names = dict[str, int | None]
"""What a folder holds: files by a number of their own, folders as None."""


@dataclass(frozen=True)
class Cut:
    """A moment: before which call it is, what is there, what of that is sure, and the bytes of files as they are and as they were synced."""

    call: str
    there: dict[str, Names]
    sure: dict[str, Names]
    now: dict[int, bytes]
    synced: dict[int, bytes]

    def left(self, folder: Path, rng: random.Random | None, killed: bool = False) -> None:
        """Makes in `folder` what is left: of a process that was killed all, of a power cut what is sure, or with `rng` any of what may be."""
        folder.mkdir()
        self._make(".", folder, rng, killed)

    def _make(self, name: str, folder: Path, rng: random.Random | None, killed: bool) -> None:
        there, sure = self.there.get(name, {}), self.sure.get(name, {})
        for entry in sorted({*there, *sure}):
            either = [names[entry] for names in ((there,) if killed else (sure,) if rng is None else (there, sure)) if entry in names]
            if rng is not None and there.get(entry, -1) != sure.get(entry, -1) and len(either) < 2 and rng.random() < 0.5:
                continue  # not there in one of them
            if not either:
                continue
            chosen = either[0] if rng is None else rng.choice(either)
            if chosen is None:
                (folder / entry).mkdir()
                self._make(os.path.normpath(f"{name}/{entry}"), folder / entry, rng, killed)
            else:
                (folder / entry).write_bytes(self._bytes(chosen, rng, killed))

    def _bytes(self, number: int, rng: random.Random | None, killed: bool) -> bytes:
        now, synced = self.now.get(number, b""), self.synced.get(number)
        if killed or now == synced:
            return now
        if rng is None:
            return synced or b""
        torn = [now, now[: rng.randrange(len(now) + 1)], bytes(len(now)), rng.randbytes(len(now)), synced or b""]
        begin = rng.randrange(len(now) + 1) // 512 * 512
        return rng.choice([*torn, now[:begin] + bytes(len(now[begin : begin + 512])) + now[begin + 512 :]])


@dataclass
class Watched:
    """A folder that is watched. Whatever is there at the beginning is sure."""

    root: Path
    cuts: list[Cut] = field(default_factory=list)
    _ids: dict[int, int] = field(default_factory=dict)
    _sure: dict[str, Names] = field(default_factory=dict)
    _synced: dict[int, bytes] = field(default_factory=dict)
    _now: dict[int, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._fresh = itertools.count()
        self._sure = self._look()
        self._synced = dict(self._now)

    def _look(self) -> dict[str, Names]:
        found: dict[str, Names] = {}
        for path, folders, files in os.walk(self.root):
            names: Names = dict.fromkeys(folders)
            for name in files:
                inner = os.path.join(path, name)
                inode = os.stat(inner).st_ino
                if inode not in self._ids:
                    self._ids[inode] = next(self._fresh)
                names[name] = self._ids[inode]
                with open(inner, "rb") as file:
                    self._now[self._ids[inode]] = file.read()
            found[os.path.relpath(path, self.root)] = names
        return found

    def look(self, call: str) -> None:
        """A moment at which the power may go."""
        there = self._look()
        self.cuts.append(Cut(call, there, {name: dict(names) for name, names in self._sure.items()}, dict(self._now), dict(self._synced)))

    def _inside(self, path: Any) -> bool:
        place = os.path.realpath(os.fspath(path))
        return place == str(self.root) or place.startswith(f"{self.root}/")

    def synced(self, handle: int) -> None:
        path = os.readlink(f"/proc/self/fd/{handle}")
        if not self._inside(path):
            return
        there = self._look()
        if os.path.isdir(path):
            name = os.path.relpath(path, self.root)
            self._sure[name] = dict(there[name])
        else:
            number = self._ids[os.fstat(handle).st_ino]
            self._synced[number] = self._now[number]

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Notes a cut before each call that changes something, and after the last."""
        real = {name: getattr(os, name) for name in CALLS}

        def watched(name: str) -> Callable[..., Any]:
            def call(*given: Any, **named: Any) -> Any:
                changes = name != "open" or bool(given[1] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
                if not changes or (name != "fsync" and not self._inside(given[0])):
                    return real[name](*given, **named)
                self.look(f"{name} {given[0]}")
                if name == "open" and not os.path.lexists(given[0]):
                    handle = real[name](*given, **named)
                    self._ids[os.fstat(handle).st_ino] = next(self._fresh)  # numbers of the system's are used again
                    return handle
                result = real[name](*given, **named)
                if name == "fsync":
                    self.synced(given[0])
                return result

            return call

        with pytest.MonkeyPatch.context() as patch:
            for name in CALLS:
                patch.setattr(os, name, watched(name))
            yield
            self.look("the end")


@contextmanager
def failing(root: Path, error: int, begin: int, count: int) -> Iterator[list[str]]:
    """Has `count` of the calls that change something under `root` fail with this error, from the `begin`-th on; gives all that were made."""
    made: list[str] = []
    real = {name: getattr(os, name) for name in CALLS}

    def wrapped(name: str) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            place = os.readlink(f"/proc/self/fd/{given[0]}") if name == "fsync" else os.path.abspath(given[0])
            changes = name != "open" or bool(given[1] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
            if not changes or not place.startswith(str(root)):
                return real[name](*given, **named)
            made.append(f"{name} {place}")
            if begin < len(made) <= begin + count:
                raise OSError(error, os.strerror(error), place)
            return real[name](*given, **named)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in CALLS:
            patch.setattr(os, name, wrapped(name))
        yield made
