"""What streams of the bench are made of: a user's samples, and a plan of numbers from which frames are made window by window.

Frame k of a stream is a function of (data, settings, seed, k) alone, so that windows of any size show the same frames in the same order. Windows span
domains, because a device knows of no boundaries.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeadapt._version import __version__
from edgeadapt.bundle.digest import sha256
from edgeadapt.corruptions.catalogue import corrupt_at, whole
from edgeadapt.corruptions.streams import Indices, draws
from edgeadapt.errors import InputError, UsageError

CLEAN, NOISE = "clean", "noise"
"""What a stage shows in place of a corruption: images as they are, or uniform noise."""

_PIXELS = 6  # what random numbers are for, beyond what `corruptions.streams.draws` names


@dataclass(frozen=True, eq=False)
class Samples:
    """Labelled frames.

    Attributes:
        x: uint8 (N, H, W, C), or float32 (N, …) as the model takes them.
        y: integers (N,), or (N, H, W) with a class a pixel; negative where it is not known.
        name: how a person would call them.

    Raises:
        InputError: other types, other lengths, or nothing in them.
    """

    x: NDArray[Any]
    y: NDArray[Any]
    name: str = "data"

    def __post_init__(self) -> None:
        images = self.x.dtype == np.uint8 and self.x.ndim == 4 and self.x.shape[3] in (1, 3)
        if not images and not (self.x.dtype == np.float32 and self.x.ndim > 1):
            raise InputError(
                f"{self.name} holds {self.x.dtype} of shape {self.x.shape}, neither images nor float32 frames",
                "give uint8 N x H x W x C with 1 or 3 channels, or float32 N x the model's input",
            )
        if not len(self.x) or self.y.shape[:1] != self.x.shape[:1] or self.y.dtype.kind not in "iu":
            raise InputError(
                f"{self.name} holds {len(self.x)} frames and labels of {self.y.dtype} {self.y.shape}", "give one whole number for each frame"
            )

    @property
    def images(self) -> bool:
        """Whether the frames are images, which can be corrupted."""
        return self.x.dtype == np.uint8

    @cached_property
    def digest(self) -> str:
        """SHA-256 in hex of all of it."""
        found = sha256()
        for array in (self.x, self.y):
            found.update(f"{array.dtype.str} {array.shape}\n".encode())
            for part in np.array_split(array, max(1, array.nbytes >> 24)):
                found.update(np.ascontiguousarray(part).tobytes())
        return found.hexdigest()


@dataclass(frozen=True, eq=False)
class Window:
    """Frames that arrive together.

    Attributes:
        position: of the first in its stream.
        x: the frames, in the type and shape of the data.
        y: their truth; -1 where there is none.
        domain: of each frame.
        severity: int8 (n,), 0 for clean frames, else 1..5.
        index: int64 (n,), each frame's image; -1 for noise. A recording counts on from the one before.
        scored: bool (n,), whether its error counts.
    """

    position: int
    x: NDArray[Any]
    y: NDArray[Any]
    domain: tuple[str, ...]
    severity: NDArray[np.int8]
    index: Indices
    scored: NDArray[np.bool_]


@dataclass(frozen=True)
class Stage:
    """Neighbouring frames of one kind.

    Attributes:
        domain: its name.
        draw: int64 (n,), images by their number, plus the number of all images for each time that one came before in this stage.
        corruption: a corruption's name, "clean" or "noise".
        severity: 1..5; 0 for what is no corruption.
        seed: of its random corruptions, or of its noise.
        scored: whether its errors count.
        round: of recurring.
    """

    domain: str
    draw: Indices
    corruption: str = CLEAN
    severity: int = 0
    seed: int = 0
    scored: bool = True
    round: int = 0


class Stream:
    """Frames in their order.

    Args:
        name: see below.
        samples: where images come from, numbered through.
        stages: what comes.
        settings: see below.
        seed: see below.
        order: int64 (F,), the places of the stages' frames in the order in which they come; None for one stage after another.

    Attributes:
        name: one of `streams.NAMES`, or "own".
        seed: what its order and its random corruptions follow from.
        settings: JSON values that say how it was made.
        domains: their names, in the order in which they first come.
        domain: int16 (F,), each frame's place in `domains`.
        severity: int8 (F,).
        index: int64 (F,), each frame's image; -1 for noise.
        round: int16 (F,), of recurring; else 0.
        scored: bool (F,).
    """

    def __init__(
        self, name: str, samples: Sequence[Samples], stages: Sequence[Stage], settings: dict[str, Any], seed: int, order: Indices | None = None
    ) -> None:
        self.name, self.seed, self.settings = name, seed, settings
        self._samples, self._stages = tuple(samples), tuple(stages)
        counts = [len(stage.draw) for stage in stages]
        order = np.arange(sum(counts)) if order is None else order
        self._stage: Indices = np.repeat(np.arange(len(stages)), counts)[order]
        self._draw: Indices = np.concatenate([stage.draw for stage in stages])[order]
        self._kept: dict[tuple[int, int], NDArray[Any]] = {}
        self._room = 0
        self._begins = np.cumsum([0, *(len(one.x) for one in samples)])
        self.domains = tuple(dict.fromkeys(stage.domain for stage in stages))
        self.domain = np.array([self.domains.index(stage.domain) for stage in stages], np.int16)[self._stage]
        self.severity = np.array([stage.severity for stage in stages], np.int8)[self._stage]
        self.round = np.array([stage.round for stage in stages], np.int16)[self._stage]
        self.scored = np.array([stage.scored for stage in stages], np.bool_)[self._stage]
        noise = np.array([stage.corruption == NOISE for stage in stages])[self._stage]
        self.index: Indices = np.where(noise, -1, self._draw % self._begins[-1]).astype(np.int64)

    def __len__(self) -> int:
        return len(self.index)

    @cached_property
    def key(self) -> str:
        """SHA-256 in hex over everything that the frames follow from: name, settings, seed, data, and the versions of edgeadapt, numpy and Pillow."""
        versions = [__version__, np.__version__, _pillow()]
        told = [versions, self.name, self.settings, self.seed, [one.digest for one in self._samples]]
        return sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()

    def truth(self, first: int, count: int) -> NDArray[Any]:
        """The truth of `count` frames from the first on, int64 (count,) or (count, H, W); -1 where there is none."""
        index = self.index[first : first + count]
        found = np.full((len(index), *self._samples[0].y.shape[1:]), -1, np.int64)
        for which, places, inside in self._of(index):
            found[places] = self._samples[which].y[inside]
        return found

    def pixels(self, first: int, count: int) -> NDArray[Any]:
        """`count` frames from the first on, in the type and shape of the data; fewer at the end. Not to be written to."""
        found = self._kept.get((first, count))
        if found is None:
            found = self._made(first, count)
            if found.nbytes <= self._room:
                self._kept[first, count] = found
                self._room -= found.nbytes
        return found

    @contextmanager
    def kept(self, room: int = 2**26) -> Iterator[None]:
        """Meanwhile frames that were made are kept, up to `room` bytes of them, for those who ask for them again in equal portions."""
        self._room = room
        try:
            yield
        finally:
            self._kept, self._room = {}, 0

    def _made(self, first: int, count: int) -> NDArray[Any]:
        data = self._samples[0].x
        stages = self._stage[first : first + count]
        found = np.empty((len(stages), *data.shape[1:]), data.dtype)
        for which in np.unique(stages).tolist():
            mine, stage = np.flatnonzero(stages == which), self._stages[which]
            if stage.corruption == NOISE:
                for place in mine.tolist():
                    found[place] = _noise(data, draws(stage.seed, _PIXELS, first + place))
                continue
            for one, places, inside in self._of(self.index[first + mine]):
                frames = self._samples[one].x[inside]
                if stage.severity:
                    keys = self._draw[first + mine[places]].tolist()
                    frames = corrupt_at(frames, stage.corruption, stage.severity, stage.seed, self.settings.get("scale"), keys)
                found[mine[places]] = frames
        return found

    def windows(self, batch: int = 1) -> Iterator[Window]:
        """All frames, `batch` at a time, fewer in the last window.

        Raises:
            UsageError: `batch` is no number of frames.
        """
        if not whole(batch, 1):
            raise UsageError(f"batch is a number of frames, 1 or more, not {batch!r}", "use batch=64")
        for first in range(0, len(self), batch):
            part = slice(first, first + batch)
            names = tuple(self.domains[place] for place in self.domain[part])
            arrays = (self.severity[part], self.index[part], self.scored[part])
            yield Window(first, self.pixels(first, batch), self.truth(first, batch), names, *arrays)

    def _of(self, index: Indices) -> Iterator[tuple[int, Indices, Indices]]:
        """For each recording among these images: its number, their places in `index`, and their places in the recording."""
        known = np.flatnonzero(index >= 0)
        holder = np.searchsorted(self._begins, index[known], side="right") - 1
        for which in np.unique(holder).tolist():
            places = known[holder == which]
            yield which, places, index[places] - self._begins[which]


def _pillow() -> str:
    """Pillow's version; "" where it is not installed."""
    try:
        import PIL
    except ImportError:
        return ""
    return PIL.__version__


def _noise(data: NDArray[Any], rng: np.random.Generator) -> NDArray[Any]:
    """One frame of uniform noise: over all bytes, or over the range of the first hundred frames."""
    if data.dtype == np.uint8:
        return rng.integers(0, 256, data.shape[1:], dtype=np.uint8)
    seen = data[:100][np.isfinite(data[:100])]
    low, high = (float(seen.min()), float(seen.max())) if seen.size else (0.0, 1.0)
    return rng.uniform(low, high, data.shape[1:]).astype(np.float32)
