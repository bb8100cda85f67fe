"""The state on disk: one safetensors file, checked by a hash, and a folder of two slots of which a torn write can only lose the older."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeadapt import plainfile
from edgeadapt.bundle import Manifest, atomic, tensors
from edgeadapt.bundle.digest import sha256
from edgeadapt.bundle.reading import strict
from edgeadapt.errors import StateError
from edgeadapt.runtime.kept import Kept, parted

FORMAT = 1
SLOTS = ("a.safetensors", "b.safetensors")
_NEEDED = {"model", "weights_sha256", "compatible"}
_KEYS = _NEEDED | {"format", "generation", "counters", "hyper", "kept", "sha256"}
_COPIES = 3  # of the state's tensors that a file may have, at most: those in use, what it started as, what was laid by
_MOST = 2**53  # what counters stay below, as all numbers in our files


@dataclass(frozen=True)
class Snapshot:
    """What a saved state holds.

    Attributes:
        tensors: the state's, by name. counters: the adapter's. hyper: the scalars that were set.
        generation: how many saves came before it in its folder.
        kept: what a guard knows of it; None where none saved it.
        sha256: of all of it, in hex; "" before it is saved.
    """

    tensors: Mapping[str, NDArray[Any]]
    counters: dict[str, int]
    hyper: dict[str, float]
    generation: int = 0
    kept: Kept | None = None
    sha256: str = ""

    def at_hand(self) -> AbstractContextManager[Snapshot]:
        """Itself, as what is to be saved."""
        return nullcontext(self)


Taken = Callable[[], AbstractContextManager[Snapshot]]
"""Gives what is to be saved; it must not change until that context is left."""


def compatible(manifest: Manifest) -> str:
    """A hash that two bundles share when one's state can serve the other: the same frozen weights and the same state tensors."""
    specs = [
        [spec.name, list(spec.shape), spec.kind, *([] if spec.dtype == "float32" else [spec.dtype])]
        for spec in sorted(manifest.state, key=lambda spec: spec.name)
    ]
    return sha256(json.dumps([manifest.model.weights_sha256, specs]).encode()).hexdigest()


def write(path: Path, taken: Taken, manifest: Manifest, generation: int | None = None) -> str:
    """Writes a snapshot; the file is the old one or the whole new one, never a part. No second copy of the tensors is made.

    The context of `taken` is left when everything was handed to the system, before it is waited for to be on the disk.

    Args:
        path: the file to make or replace.
        taken: what is saved.
        manifest: of the bundle whose state it is.
        generation: instead of the snapshot's.

    Returns:
        its `Snapshot.sha256`.

    Raises:
        StateError: it cannot be written.
    """
    try:
        with atomic.replacing(path) as (file, _), taken() as snapshot:
            header = {
                "format": str(FORMAT),
                "model": manifest.model.name,
                "weights_sha256": manifest.model.weights_sha256,
                "compatible": compatible(manifest),
                "generation": str(snapshot.generation if generation is None else generation),
                "counters": json.dumps(snapshot.counters, sort_keys=True),
                "hyper": json.dumps(snapshot.hyper, sort_keys=True),
            }
            values = snapshot.tensors
            if snapshot.kept is not None:
                header["kept"] = snapshot.kept.text()
                values = {**values, **snapshot.kept.arrays()}
            header["sha256"] = _checksum(header, values)
            tensors.write(file, values, header)
            file.flush()
    except OSError as reason:
        raise StateError(f"the state cannot be saved to {path}: {reason.strerror}", "save to a folder that is writable and has room") from None
    return header["sha256"]


def read(path: Path, manifest: Manifest) -> Snapshot:
    """Reads a snapshot of this bundle's state.

    Raises:
        StateError: the file is missing, truncated, tampered with, of a newer format, or the state of another bundle.
    """
    with opened(path, manifest) as found:
        return replace(found, tensors=dict(found.tensors), kept=None if found.kept is None else found.kept.at_hand())


@contextmanager
def opened(path: Path, manifest: Manifest) -> Iterator[Snapshot]:
    """As `read`, but each tensor is read from the file when it is asked for; all of it was checked before.

    Raises:
        StateError: as `read`; reading a tensor raises it too where the file cannot be read any more.
    """
    try:
        file = plainfile.opened(path)
    except OSError as reason:
        raise StateError(f"{path} cannot be read: {reason.strerror}", "check the path and its permissions") from None
    with file:
        found = tensors.Stored(file, str(path), StateError)
        yield _checked(path, found, dict(found.metadata), manifest)


def _checked(path: Path, found: tensors.Stored, header: dict[str, str], manifest: Manifest) -> Snapshot:
    if not _NEEDED <= set(header) <= _KEYS:
        raise StateError(f"{path} is no saved state of edgeadapt", "give a file that save wrote")
    if header.get("format") != str(FORMAT):
        raise StateError(f"{path} has state format {header.get('format', '')[:20]!r}, this reads {FORMAT}", "upgrade edgeadapt on this machine")
    if header["compatible"] != compatible(manifest):
        what = "other frozen weights" if header["weights_sha256"] != manifest.model.weights_sha256 else "other trainable parts"
        raise StateError(
            f"{path} is the state of {_printed(header['model'])} (weights {_printed(header['weights_sha256'][:12])}), "
            f"this bundle is {manifest.model.name} (weights {manifest.model.weights_sha256[:12]}): {what}",
            "load it into the bundle it was saved from",
        )
    if found.nbytes > (most := _COPIES * sum(spec.nbytes for spec in manifest.state)):  # before any of it is read
        raise StateError(f"{path} holds {found.nbytes} bytes of tensors; of this bundle's state it can be {most} at most", "take an older save")
    given = header.pop("sha256", "")
    if given != _checksum(header, found):
        raise StateError(f"{path} is damaged (its checksum differs)", "take an older save")
    try:
        counters = {key: _count(value) for key, value in _mapping(header["counters"]).items()}
        hyper = {key: float(value) for key, value in _mapping(header["hyper"]).items()}
        generation = _count(int(header["generation"]))
    except (ValueError, KeyError, TypeError, OverflowError):
        raise StateError(f"{path} has counters or scalars that cannot be read", "take an older save") from None
    plain, kept = parted(found, header.get("kept"), manifest, str(path))
    return Snapshot(plain, counters, hyper, generation, kept, given)


def _mapping(text: str) -> dict[str, Any]:
    found = strict(text.encode())
    if not isinstance(found, dict):
        raise TypeError("no mapping")
    return found


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < _MOST:
        raise ValueError("no number of things that happened")
    return value


def _printed(text: str) -> str:
    return text[:80] if text.isprintable() else ascii(text[:80])


def _checksum(header: Mapping[str, str], values: Mapping[str, NDArray[Any]]) -> str:
    digest = sha256(json.dumps(sorted(header.items())).encode())
    for name in sorted(values):
        array = values[name]
        digest.update(json.dumps([name, str(array.dtype), list(array.shape)]).encode())
        digest.update(tensors.bytes_of(np.ascontiguousarray(array)))
        del array  # before the next is read
    return digest.hexdigest()


class Slots:
    """A folder with two states. Each save replaces the older; the newest that is sound is the one that counts.

    Args:
        folder: made at the first save.
        manifest: of the bundle whose states these are.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self._manifest = manifest

    def newest(self) -> Snapshot:
        """The newest sound state.

        Raises:
            StateError: nothing is saved there, or nothing that is there can be used; the message says why.
        """
        return read(self.newest_path(), self._manifest)

    def newest_path(self) -> Path:
        """The file of the newest sound state.

        Raises:
            StateError: as `newest`.
        """
        found, faults = self._all()
        if found:
            return self.folder / max(found, key=lambda name: found[name])
        if faults:
            raise faults[0]
        raise StateError(f"{self.folder} holds no saved state", "save one first")

    def save(self, taken: Taken) -> Path:
        """Saves beside the newest sound state, never over it.

        Args:
            taken: what is saved; its generation follows from those that are there.

        Returns:
            the file written.

        Raises:
            StateError: it cannot be written.
        """
        try:
            self.folder.mkdir(exist_ok=True)
            self._sweep()
        except OSError as reason:
            raise StateError(f"the state cannot be saved to {self.folder}: {reason.strerror}", "save to a folder that is writable") from None
        found, _ = self._all()
        path = self.folder / min(SLOTS, key=lambda name: found.get(name, -1))
        write(path, taken, self._manifest, 1 + max(found.values(), default=0))
        return path

    def _all(self) -> tuple[dict[str, int], list[StateError]]:
        """The generations of those that are sound, and what is wrong with the others."""
        found: dict[str, int] = {}
        faults: list[StateError] = []
        for name in SLOTS:
            if not os.path.lexists(self.folder / name):
                continue
            try:
                with opened(self.folder / name, self._manifest) as snapshot:
                    found[name] = snapshot.generation
            except StateError as fault:
                faults.append(fault)
        return found, faults

    def _sweep(self) -> None:
        """Removes what a crash in the middle of a save has left."""
        prefixes = tuple(atomic.temporary_prefix(name) for name in SLOTS)
        for path in self.folder.iterdir():
            if path.name.startswith(prefixes) and path.name.endswith(".tmp"):
                with suppress(OSError):
                    path.unlink()
