"""Frames that another program writes to our standard input."""

from __future__ import annotations

import io
import json
import logging
import math
import os
import select
import threading
import time
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import BinaryIO

from edgeadapt.devices.sources import pictures
from edgeadapt.devices.sources.arrays import Reader, frames_of, frames_shape
from edgeadapt.devices.sources.base import Frame, Source, Wanted
from edgeadapt.devices.sources.lines import WRONG, Lines
from edgeadapt.errors import InputError, SourceError
from edgeadapt.units import format_shape

LOG = logging.getLogger("edgeadapt")

_LINE = 65536  # bytes; a longer line is no path
_WAIT, _GRACE = 0.1, 0.5  # seconds between two looks whether it was stopped, and to read what was begun after that


class _Input:
    """Standard input, read no further than it is asked for: who reads it next, such as this program after a reload, goes on where this ended.

    Not by Python's own buffer, which reads ahead, and whose lock a thread that waits in it would hold while the interpreter ends.

    Attributes:
        taken: bytes so far. last: the last of them.
    """

    def __init__(self, file: BinaryIO) -> None:
        raw = getattr(file, "raw", file)
        self._file, self._number = file, raw.fileno() if isinstance(raw, io.FileIO) else None
        self._stopped, self._stopped_at, self._within = threading.Event(), 0.0, False
        self.taken, self.last = 0, b"\n"

    @property
    def stopped(self) -> bool:
        return self._stopped.is_set()

    def read(self, size: int) -> bytes:
        """At least one byte and at most so many, as soon as there are some; none at the end and after a stop, within `begun` after a grace."""
        while not self._stopped.is_set() or time.monotonic() < self._until:
            if self._ready(_WAIT):
                return self._now(size)
        return b""

    @contextmanager
    def begun(self) -> Iterator[None]:
        """What is read within is read to its end, if that comes soon after a stop."""
        self._within = True
        try:
            yield
        finally:
            self._within = False

    @property
    def _until(self) -> float:
        return self._stopped_at + _GRACE if self._within else -math.inf

    def readline(self, size: int) -> bytes:
        """Up to the end of a line, so many bytes at most, byte by byte; less at the end and after a stop."""
        found = bytearray()
        while len(found) < size and (one := self.read(1)):
            found += one
            if one == b"\n":
                break
        return bytes(found)

    def skip(self, left: Callable[[], int]) -> None:
        """Throws away what comes within half a second, also after a stop, as long as so many bytes are left to be thrown away."""
        end = time.monotonic() + _GRACE
        while (size := left()) > 0 and (seconds := end - time.monotonic()) > 0 and self._ready(seconds):
            if not self._now(min(size, _LINE)):
                return

    def _ready(self, seconds: float) -> bool:
        return self._number is None or bool(select.select([self._number], [], [], seconds)[0])

    def _now(self, size: int) -> bytes:
        data = self._file.read(size) if self._number is None else os.read(self._number, size)
        self.taken, self.last = self.taken + len(data), data[-1:] or self.last
        return data

    def stop(self) -> None:
        if not self._stopped.is_set():
            self._stopped_at = time.monotonic()
            self._stopped.set()


class _Stdin(Source):
    """What all of them have in common: a stop ends the wait for a byte, and a close reads to the end of what was begun, if that comes soon."""

    name = "stdin"

    def __init__(self, file: BinaryIO, wanted: Wanted) -> None:
        self._file, self._wanted, self._closed = _Input(file), wanted, False

    def __iter__(self) -> Iterator[Frame]:
        try:
            yield from self._frames()
        except SourceError:
            if not self._file.stopped:  # else it ended where it was stopped
                raise

    @abstractmethod
    def _frames(self) -> Iterator[Frame]: ...

    def _finish(self) -> None:
        """Reads to the end of a line."""
        self._file.skip(lambda: int(self._file.last != b"\n"))

    def stop(self) -> None:
        """Ends the iteration, also of a wait for the next byte."""
        self._file.stop()

    def close(self) -> None:
        """Stops, and reads what is left of the line or the array that was begun, so that whoever reads on is in step."""
        self.stop()
        if not self._closed:
            self._closed = True
            self._finish()


class Paths(_Stdin):
    """Lines that name image files: a path, or JSON {"path": "...", "label": 3} with the label (a class's number or name) left out where unknown.

    Args:
        file: the lines, UTF-8.
        wanted: what the bundle takes.

    Raises:
        SourceError: no image files can be read for this model.
    """

    def __init__(self, file: BinaryIO, wanted: Wanted) -> None:
        pictures.check(wanted.input)
        super().__init__(file, wanted)

    def _frames(self) -> Iterator[Frame]:
        while (line := self._file.readline(_LINE)) and not self._file.stopped:
            if len(line) == _LINE and not line.endswith(b"\n"):
                raise SourceError(f"stdin has a line of more than {_LINE} bytes", "write one path a line, or use --stdin-format npy")
            text = line.decode("utf-8", "surrogateescape").rstrip("\r\n")
            if text.strip():
                yield self._frame(text)

    def _frame(self, text: str) -> Frame:
        path, truth = text, None
        if text.lstrip().startswith("{"):
            try:
                values = json.loads(text)
                path, truth = values["path"], self._wanted.label(values.get("label"))
            except (ValueError, KeyError, RecursionError):
                path = None  # type: ignore[assignment]
            if not isinstance(path, str):
                return Frame(text[:200], None, None, 'is neither a path nor JSON like {"path": "a.png"}')
        shown = path.encode("utf-8", "replace").decode()
        try:
            return Frame(shown, pictures.taken(path, self._wanted), truth)
        except InputError as reason:
            return Frame(shown, None, truth, reason.message)


class Arrays(_Stdin):
    """Arrays in numpy's .npy format, one after another, as numpy.save writes them: each one frame or N frames.

    Args:
        file: the bytes.
        wanted: what the bundle takes.
    """

    def __init__(self, file: BinaryIO, wanted: Wanted) -> None:
        super().__init__(file, wanted)
        self._end = 0

    def _finish(self) -> None:
        self._file.skip(lambda: self._end - self._file.taken)

    def _frames(self) -> Iterator[Frame]:
        index = 0
        while first := self._file.read(1):
            with self._file.begun():  # else nobody knows where it ends
                reader = Reader(_Again(first, self._file), f"stdin (array {index})")  # type: ignore[arg-type]
            self._end = self._file.taken + reader.dtype.itemsize * math.prod(reader.shape)
            try:
                shape, _ = frames_shape(reader.shape, reader.dtype, self._wanted.input)
                rows = frames_of(reader, shape, self._wanted)
            except InputError as reason:
                left = reader.dtype.itemsize * math.prod(reader.shape)
                while left:
                    left -= len(reader.take(min(left, 2**20), "a frame that does not fit"))
                yield Frame(index, None, None, reason.message)
                index += 1
                continue
            for pixels in rows:
                yield Frame(index, pixels)
                index += 1


class Numbers(_Stdin):
    """Lines of numbers, each a frame or a sample, as `Lines` takes them. Those that cannot be used are left out, and told at the end.

    Args:
        file: the lines.
        wanted: what the bundle takes.
        form: "csv" or "jsonl".
    """

    right, wrong = ("lines",), WRONG

    def __init__(self, file: BinaryIO, wanted: Wanted, form: str) -> None:
        super().__init__(file, wanted)
        self._shape, self._lines = wanted.input.shape, Lines(wanted, form)
        self.advice = f"write {form} with frames of {format_shape(self._shape)} numbers, or samples"

    @property
    def counts(self) -> Mapping[str, int]:
        """As `Lines` counts."""
        return dict(self._lines.counts)

    def _frames(self) -> Iterator[Frame]:
        while data := self._file.read(_LINE):
            for line in data.splitlines(keepends=True):  # one by one: all of them together may be many frames
                yield from self._lines.feed(line)
        if self._file.stopped:
            return
        yield from self._lines.end()
        counts = self.counts
        bad = {"numbers": "hold something else than numbers", "sizes": "hold more or fewer than a frame", "long": "are too long"}
        told = ", ".join(f"{counts[kind]} {words}" for kind, words in bad.items() if counts[kind])
        if told and not counts["lines"]:
            raise SourceError(f"no line of stdin could be used: {told}", f"write frames of {format_shape(self._shape)} numbers, or samples")
        if told:
            LOG.warning("lines of stdin were left out: %s; %d were used", told, counts["lines"])


class _Again:
    """A file whose first byte was taken to see whether there is one."""

    def __init__(self, first: bytes, file: _Input) -> None:
        self._first, self._file = first, file

    def read(self, size: int) -> bytes:
        if self._first and size:
            data, self._first = self._first + (self._file.read(size - 1) if size > 1 else b""), b""
            return data
        return self._file.read(size)
