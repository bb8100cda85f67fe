"""Recorded frames at the pace of a camera."""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Generator, Mapping
from dataclasses import replace

from edgeadapt.devices.sources.arrays import Archive
from edgeadapt.devices.sources.base import Frame, Source, Wanted
from edgeadapt.devices.sources.folder import Folder
from edgeadapt.errors import SourceError, UsageError


class Replay(Source):
    """An archive or a folder of images, a frame each time that one is due.

    None is left out: whoever takes them late gets them at once until the stream is on time again, and "late" counts these.

    Args:
        path: an .npz or .npy file, or a folder of images.
        wanted: what the bundle takes.
        fps: frames a second; None: as fast as they are taken.
        loop: whether it begins again at its end. Frames are then numbered on; names get "#2", "#3", ... after the first time.

    Raises:
        UsageError: no frames a second.
        SourceError: there is no such file or folder, or it cannot be read.
        InputError: its frames are not what the model takes.
    """

    def __init__(self, path: str | os.PathLike[str], wanted: Wanted, fps: float | None = None, loop: bool = False) -> None:
        if fps is not None and not (fps > 0 and math.isfinite(fps)):
            raise UsageError(f"{fps} frames a second cannot be given", "give a number above 0, or none")
        self.name, self._wanted, self._loop = str(path), wanted, loop
        self._period = 0.0 if fps is None else 1 / fps
        self._stopped, self._late = threading.Event(), 0
        self._source = self._opened()
        self.count, self.labelled = None if loop else self._source.count, self._source.labelled

    @property
    def counts(self) -> Mapping[str, int]:
        return {"late": self._late}

    def _opened(self) -> Source:
        if os.path.isdir(self.name):
            return Folder(self.name, self._wanted)
        if self.name.endswith((".npz", ".npy")):
            return Archive(self.name, self._wanted)
        raise SourceError(f"{self.name} cannot be replayed", "give an .npz or .npy file, or a folder of images")

    def __iter__(self) -> Generator[Frame, None, None]:
        begun = None
        for number, frame in enumerate(self._rounds()):
            now = time.monotonic()
            begun = now if begun is None else begun
            wait = begun + number * self._period - now
            if self._period and wait < 0:
                self._late += 1
            if self._stopped.wait(max(wait, 0.0)):
                return
            yield frame

    def _rounds(self) -> Generator[Frame, None, None]:
        rounds = given = 0
        while not self._stopped.is_set():
            before = given
            with self._source:
                for frame in self._source:
                    yield frame if not rounds else replace(frame, id=given if isinstance(frame.id, int) else f"{frame.id}#{rounds + 1}")
                    given += 1
            if given == before:
                raise SourceError(f"{self.name} holds no frames", "give at least one")
            if not self._loop:
                return
            rounds += 1
            self._source = self._opened()

    def stop(self) -> None:
        """Ends the iteration, also of a wait for the next frame."""
        self._stopped.set()

    def close(self) -> None:
        self.stop()
        self._source.close()
