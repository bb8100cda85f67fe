"""Numbers in lines of text, as a microcontroller prints them or a program pipes them: a line is a sample or a whole frame."""

from __future__ import annotations

import math
from collections import deque

import numpy as np
from numpy.typing import NDArray

from edgeadapt.bundle import InputSpec
from edgeadapt.devices.framing import Pieces
from edgeadapt.devices.sources import numbers
from edgeadapt.devices.sources.base import Frame, Wanted
from edgeadapt.preprocess import Windows

FORMATS = ("csv", "jsonl")
WRONG = ("numbers", "sizes", "long")
COUNTED = ("bytes", "lines", *WRONG)

_WIDEST = 32  # characters that a number takes, 24 of them digits, with brackets and what parts it from the next
_BESIDE = 1024  # characters of a line that are no numbers


class Lines:
    """Frames out of a stream of bytes that may be cut anywhere and hold anything. Lines that cannot be used are counted, and are no frames.

    A line of "csv" holds numbers between commas, semicolons, tabs or blanks; one of "jsonl" a list of numbers, lists of them, or
    {"x": such a list, "label": the class by number or name}. They are a frame float32 [*input.shape], which may be flat; or, where the bundle
    has a `hop`, a sample [C], or several [n,C] in lists. Samples become windows, whose truth is the label that all of them have. Where a line
    cannot be used there is a gap, and no window goes across it.

    Args:
        wanted: what the bundle takes.
        form: "csv" or "jsonl".
        midway: whether the first line may have begun before: it is left out, as numbers may be cut off it.

    Attributes:
        counts: how often what happened, all keys of `COUNTED` from the beginning.
            bytes: that came.
            lines: that could be used.
            numbers: lines that hold something else than finite numbers. The first such line of "csv" is a heading, and not counted.
            sizes: lines of more or fewer numbers than a frame or a sample has.
            long: lines that are longer than any frame would be.
    """

    def __init__(self, wanted: Wanted, form: str, midway: bool = False) -> None:
        self.counts = dict.fromkeys(COUNTED, 0)
        self._wanted, self._shape, self._size = wanted, wanted.input.shape, math.prod(wanted.input.shape)
        self._pieces = Pieces(b"\n", _WIDEST * self._size + _BESIDE)
        self._json, self._midway, self._headed = form == "jsonl", midway, form == "jsonl"
        self._samples = None if wanted.input.hop is None else _Samples(wanted.input)
        self._given = 0

    @property
    def held(self) -> int:
        """Bytes of a line that has not ended."""
        return self._pieces.held

    def feed(self, data: bytes) -> list[Frame]:
        """The frames that end in these bytes."""
        self.counts["bytes"] += len(data)
        return self._frames(self._pieces.feed(data))

    def end(self) -> list[Frame]:
        """The frames of a last line that nothing ends."""
        return self._frames(self._pieces.feed(b"\n"))

    def _frames(self, lines: list[bytes | bytearray | None]) -> list[Frame]:
        found: list[Frame] = []
        for line in lines:
            if self._midway:
                self._midway = False
            elif line is None or line.strip():
                made = "long" if line is None else self._read(bytes(line).strip())
                if isinstance(made, list):
                    self.counts["lines"] += 1
                    found += made
                elif made:
                    self.counts[made] += 1
                    if self._samples is not None:
                        self._samples.clear()
        return found

    def _read(self, line: bytes) -> list[Frame] | str:
        """What a line gives, or what it is counted as; nothing for a heading."""
        truth: int | None = None
        if self._json:
            values, label = numbers.parsed(line)
            truth = self._wanted.label(label)
        else:
            values = numbers.separated(line)
        if values is None:
            headed, self._headed = self._headed, True
            return "numbers" if headed else ""
        if values.shape == self._shape or values.shape == (self._size,):
            return [self._frame(values.reshape(self._shape), truth)]
        if self._samples is not None and values.ndim <= 2 and values.shape[-1] == self._shape[0]:
            return [self._frame(*window) for window in self._samples.push(values.reshape(-1, self._shape[0]), truth)]
        return "sizes"

    def _frame(self, pixels: NDArray[np.float32], truth: int | None) -> Frame:
        self._given += 1
        return Frame(self._given - 1, pixels, truth)


class _Samples:
    """Windows with their truth."""

    def __init__(self, spec: InputSpec) -> None:
        self._windows = Windows(spec)
        self._labels: deque[int | None] = deque(maxlen=spec.shape[1])

    def push(self, samples: NDArray[np.float32], truth: int | None) -> list[tuple[NDArray[np.float32], int | None]]:
        found = []
        for sample in samples:  # one by one, as the labels of a window are those of the samples up to its last
            self._labels.append(truth)
            found += [(window, self._truth()) for window in self._windows.push(sample[None])]
        return found

    def _truth(self) -> int | None:
        return self._labels[0] if len(set(self._labels)) == 1 else None

    def clear(self) -> None:
        self._windows.clear()  # labels of before go as those of whole windows come
