"""Raw frames on the disk, where somebody asked for them: the latest, no more than that many, and no more bytes than that."""

from __future__ import annotations

import logging
import os
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from edgeadapt.runtime.daemon.config import FramesConfig

LOG = logging.getLogger("edgeadapt")

_HEAD = 1024  # bytes of an .npz file beside its arrays, at most


class Keeping:
    """Frames as .npz files that `edgeadapt run` and `bench` read: `x` [1,…] as it came, and `y` [1], as it was predicted. Old ones are written over.

    They are written by a thread of its own; those that come while it writes are passed over. Nothing is forced to the disk, and what goes wrong there
    is told in the log, once.

    Args:
        settings: the section [frames]; its `keep` is at least 1.
        state: the state folder, in which they are where no other is named.
    """

    def __init__(self, settings: FramesConfig, state: Path) -> None:
        self._settings, self._folder = settings, settings.folder or state / "frames"
        self._pool = ThreadPoolExecutor(1, "edgeadapt-frames")
        self._going: Future[None] | None = None
        self._number, self._complained = 0, False

    def keep(self, pixels: NDArray[Any], label: int) -> None:
        """One frame more. It must not be changed by others."""
        if self._going is None or self._going.done():
            self._going = self._pool.submit(self._write, pixels, label)

    def close(self) -> None:
        """Waits for the one that is written."""
        self._pool.shutdown()

    def _write(self, pixels: NDArray[Any], label: int) -> None:
        places = min(self._settings.keep, self._settings.most // (pixels.nbytes + _HEAD))
        if not places:
            self._complain(f"a frame of {pixels.nbytes} bytes is more than frames.most")
            return
        path = self._folder / _name(self._number % places)
        temporary = path.with_suffix(".tmp")
        try:
            self._folder.mkdir(exist_ok=True)
            if not self._number:
                self._clear(places)
            with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600), "wb") as file:
                np.savez(file, x=pixels[None], y=np.array([label]))
            os.replace(temporary, path)
            self._number += 1
        except OSError as reason:
            with suppress(OSError):
                temporary.unlink()
            self._complain(f"frames cannot be kept in {self._folder}: {reason.strerror}")

    def _clear(self, places: int) -> None:
        """Removes what was kept when more could be."""
        ours = {_name(number) for number in range(places)}
        for path in self._folder.glob("frame-*"):
            if path.name not in ours and path.suffix in (".npz", ".tmp"):
                path.unlink()

    def _complain(self, text: str) -> None:
        if not self._complained:
            LOG.warning("%s", text)
        self._complained = True


def _name(number: int) -> str:
    return f"frame-{number:06}.npz"
