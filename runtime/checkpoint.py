"""The state on disk: one safetensors file, checked by a hash, and a folder of two slots of which a torn write can only lose the older."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeadapt.bundle import Manifest, atomic, tensors
from edgeadapt.bundle.digest import sha256
from edgeadapt.errors import StateError

FORMAT = 1
SLOTS = ("a.safetensors", "b.safetensors")
_KEYS = {"format", "model", "weights_sha256", "compatible", "generation", "counters", "hyper", "sha256"}


@dataclass(frozen=True)
class Snapshot:
    """What a saved state holds: the tensors, the adapter's counters, the scalars that were set, and how many saves came before it in its folder."""

    tensors: dict[str, NDArray[Any]]
    counters: dict[str, int]
    hyper: dict[str, float]
    generation: int = 0


def compatible(manifest: Manifest) -> str:
    """A hash that two bundles share when one's state can serve the other: the same frozen weights and the same state tensors."""
    specs = [
        [spec.name, list(spec.shape), spec.kind, *([] if spec.dtype == "float32" else [spec.dtype])]
        for spec in sorted(manifest.state, key=lambda spec: spec.name)
    ]
    return sha256(json.dumps([manifest.model.weights_sha256, specs]).encode()).hexdigest()


def write(path: Path, snapshot: Snapshot, manifest: Manifest) -> None:
    """Writes a snapshot; the file is the old one or the whole new one, never a part.

    Raises:
        StateError: it cannot be written.
    """
    header = {
        "format": str(FORMAT),
        "model": manifest.model.name,
        "weights_sha256": manifest.model.weights_sha256,
        "compatible": compatible(manifest),
        "generation": str(snapshot.generation),
        "counters": json.dumps(snapshot.counters, sort_keys=True),
        "hyper": json.dumps(snapshot.hyper, sort_keys=True),
    }
    header["sha256"] = _checksum(header, snapshot.tensors)
    try:
        with atomic.replacing(path) as (file, _):
            tensors.write(file, snapshot.tensors, header)
    except OSError as reason:
        raise StateError(f"the state cannot be saved to {path}: {reason.strerror}", "save to a folder that is writable and has room") from None


def read(path: Path, manifest: Manifest) -> Snapshot:
    """Reads a snapshot of this bundle's state.

    Raises:
        StateError: the file is missing, truncated, tampered with, of a newer format, or the state of another bundle.
    """
    found, header = tensors.read(path, StateError)
    if "compatible" not in header or not set(header) <= _KEYS | {"format"}:
        raise StateError(f"{path} is no saved state of edgeadapt", "give a file that save wrote")
    if header.get("format") != str(FORMAT):
        raise StateError(f"{path} has state format {header.get('format', '')[:20]!r}, this reads {FORMAT}", "upgrade edgeadapt on this machine")
    given = header.pop("sha256", "")
    if given != _checksum(header, found):
        raise StateError(f"{path} is damaged (its checksum differs)", "take an older save")
    if header["compatible"] != compatible(manifest):
        what = "other frozen weights" if header["weights_sha256"] != manifest.model.weights_sha256 else "other trainable parts"
        raise StateError(
            f"{path} is the state of {header['model']} (weights {header['weights_sha256'][:12]}), this bundle is {manifest.model.name} "
            f"(weights {manifest.model.weights_sha256[:12]}): {what}",
            "load it into the bundle it was saved from",
        )
    try:
        counters = {str(key): int(value) for key, value in json.loads(header["counters"]).items()}
        hyper = {str(key): float(value) for key, value in json.loads(header["hyper"]).items()}
        return Snapshot(found, counters, hyper, int(header["generation"]))
    except (ValueError, KeyError, AttributeError, TypeError):
        raise StateError(f"{path} has counters or scalars that cannot be read", "take an older save") from None


def _checksum(header: Mapping[str, str], values: Mapping[str, NDArray[Any]]) -> str:
    digest = sha256(json.dumps(sorted(header.items())).encode())
    for name in sorted(values):
        array = np.ascontiguousarray(values[name])
        digest.update(json.dumps([name, str(array.dtype), list(values[name].shape)]).encode())
        digest.update(array.tobytes())
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
        found, faults = self._all()
        if found:
            return max(found.values(), key=lambda snapshot: snapshot.generation)
        if faults:
            raise faults[0]
        raise StateError(f"{self.folder} holds no saved state", "save one first")

    def save(self, snapshot: Snapshot) -> Path:
        """Saves beside the newest sound state, never over it.

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
        order = sorted(SLOTS, key=lambda name: found[name].generation if name in found else -1)
        generation = 1 + max((item.generation for item in found.values()), default=0)
        path = self.folder / order[0]
        write(path, Snapshot(snapshot.tensors, snapshot.counters, snapshot.hyper, generation), self._manifest)
        return path

    def _all(self) -> tuple[dict[str, Snapshot], list[StateError]]:
        found: dict[str, Snapshot] = {}
        faults: list[StateError] = []
        for name in SLOTS:
            if not os.path.lexists(self.folder / name):
                continue
            try:
                found[name] = read(self.folder / name, self._manifest)
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
