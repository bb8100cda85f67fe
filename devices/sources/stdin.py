"""Frames that another program writes to our standard input."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Mapping
from typing import BinaryIO

from edgeadapt.devices.sources import pictures
from edgeadapt.devices.sources.arrays import Reader, frames_of, frames_shape
from edgeadapt.devices.sources.base import Frame, Source, Wanted
from edgeadapt.devices.sources.lines import Lines
from edgeadapt.errors import InputError, SourceError
from edgeadapt.units import format_shape

LOG = logging.getLogger("edgeadapt")

_LINE = 65536  # bytes; a longer line is no path


class Paths(Source):
    """Lines that name image files: a path, or JSON {"path": "...", "label": 3} with the label (a class's number or name) left out where unknown.

    Args:
        file: the lines, UTF-8.
        wanted: what the bundle takes.

    Raises:
        SourceError: no image files can be read for this model.
    """

    name = "stdin"

    def __init__(self, file: BinaryIO, wanted: Wanted) -> None:
        pictures.check(wanted.input)
        self._file, self._wanted = file, wanted

    def __iter__(self) -> Iterator[Frame]:
        while line := self._file.readline(_LINE):
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


class Arrays(Source):
    """Arrays in numpy's .npy format, one after another, as numpy.save writes them: each one frame or N frames.

    Args:
        file: the bytes.
        wanted: what the bundle takes.
    """

    name = "stdin"

    def __init__(self, file: BinaryIO, wanted: Wanted) -> None:
        self._file, self._wanted = file, wanted

    def __iter__(self) -> Iterator[Frame]:
        index = 0
        while first := self._file.read(1):
            reader = Reader(_Again(first, self._file), f"stdin (array {index})")  # type: ignore[arg-type]
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


class Numbers(Source):
    """Lines of numbers, each a frame or a sample, as `Lines` takes them. Those that cannot be used are left out, and told at the end.

    Args:
        file: the lines.
        wanted: what the bundle takes.
        form: "csv" or "jsonl".
    """

    name = "stdin"

    def __init__(self, file: BinaryIO, wanted: Wanted, form: str) -> None:
        self._file, self._shape, self._lines = file, wanted.input.shape, Lines(wanted, form)

    @property
    def counts(self) -> Mapping[str, int]:
        """As `Lines` counts."""
        return dict(self._lines.counts)

    def __iter__(self) -> Iterator[Frame]:
        while data := self._file.readline(_LINE):
            yield from self._lines.feed(data)
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

    def __init__(self, first: bytes, file: BinaryIO) -> None:
        self._first, self._file = first, file

    def read(self, size: int) -> bytes:
        if self._first and size:
            data, self._first = self._first + (self._file.read(size - 1) if size > 1 else b""), b""
            return data
        return self._file.read(size)
