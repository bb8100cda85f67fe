"""Bundles in the state folder: each in a folder named by its digest, copied whole, and never changed afterwards."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from edgeadapt import plainfile
from edgeadapt.bundle import Bundle, atomic, signing
from edgeadapt.errors import BundleError
from edgeadapt.runtime.daemon.store import disk
from edgeadapt.runtime.daemon.store.pointer import Installed

FOLDER, NAME = "bundles", "model.edgeadapt"
SHORT = 16
_CHUNK = 2**20
_AGAIN = "install it again"


def short(text: str) -> str:
    """The name of a digest's folder."""
    return text[:SHORT]


def is_short(name: str) -> bool:
    """Whether a folder may be so named."""
    return re.fullmatch(f"[0-9a-f]{{{SHORT}}}", name) is not None


def place(folder: Path, bundle: Installed) -> Path:
    """Where a bundle lies, or is to lie."""
    return Path(bundle.path) if bundle.path else folder / FOLDER / short(bundle.digest) / NAME


def opened(folder: Path, bundle: Installed, keys: Sequence[Path]) -> Bundle:
    """A bundle, every byte checked, with its signature where there are keys.

    Raises:
        BundleError: it is missing, damaged, another one, or not signed by any of the keys.
    """
    path = place(folder, bundle)
    found = signing.check(path, keys) if keys else Bundle.open(path)
    if found.digest != bundle.digest:
        raise BundleError(f"{path} is another bundle than was installed there", "install it again: edgeadapt install model.edgeadapt")
    return found


def bring(
    path: str | os.PathLike[str], bundle: Bundle, installed: Installed, folder: Path, keys: Sequence[Path], spare: int, owner: disk.Owner
) -> Path:
    """Copies a bundle into the state folder, if it is not there yet, with its signature where there are keys. It is the owner's.

    Args:
        path: where it was opened, maybe through a link; its signature is beside that.
        bundle, installed: it. folder: the state folder. keys, spare, owner: see `Store`, `Limits` and `disk.Owner`.

    Returns:
        where it lies now; where there are keys it was checked there.

    Raises:
        BundleError: it or its signature changed meanwhile, or cannot be read.
        StateError: there is no room.
        OSError: it cannot be written.
    """
    target = place(folder, installed)
    with suppress(BundleError):  # not there, or not any more as it was
        opened(folder, installed, keys)
        return target
    disk.need_room(folder, os.stat(bundle.path).st_size, spare)
    disk.make(target.parent, owner)
    disk.sweep(target.parent, (NAME, signing.beside(target).name))
    if keys:
        _copy(signing.beside(path), signing.beside(target), None, owner)
    _copy(bundle.path, target, installed.digest, owner)
    if keys:
        try:
            opened(folder, installed, keys)
        except BundleError as fault:
            raise BundleError(f"{signing.beside(path)} was replaced while it was copied: {fault.message}", _AGAIN) from None
    return target


def _copy(source: Path, target: Path, digest: str | None, owner: disk.Owner) -> None:
    try:
        origin = plainfile.opened(source)
    except OSError as reason:
        raise BundleError(f"{source} cannot be read: {reason.strerror}", _AGAIN) from None
    with origin, atomic.replacing(target) as (file, temporary):
        owner.take(file.fileno())
        while piece := origin.read(_CHUNK):
            file.write(piece)
        file.flush()
        if digest is not None and Bundle.open(temporary).digest != digest:
            raise BundleError(f"{source} was replaced while it was copied", _AGAIN)
