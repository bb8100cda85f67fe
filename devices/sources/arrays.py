"""Frames in numpy's files, read one at a time: a file may be far larger than the memory budget."""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Iterator
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from edgeadapt.bundle import InputSpec
from edgeadapt.devices.sources import fitting
from edgeadapt.devices.sources.base import PIXELS, Frame, PictureTooLarge, Source, Wanted
from edgeadapt.errors import InputError, SourceError
from edgeadapt.preprocess import Windows, batch_of
from edgeadapt.units import format_shape


class Reader:
    """One array in numpy's .npy format, its rows read one after another.

    Args:
        file: where the array begins; it is read no further than to the array's end.
        where: the file as a person would call it.

    Attributes:
        shape, dtype: the array's.

    Raises:
        SourceError: no such array, or one that cannot be read row by row.
    """

    def __init__(self, file: IO[bytes], where: str) -> None:
        self._file, self._where = file, where
        try:
            version = np.lib.format.read_magic(file)
            read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
            self.shape, columns, self.dtype = read(file)
        except Exception as reason:  # numpy's parser of headers raises tokenize.TokenError and others on damaged ones
            raise SourceError(f"{where} holds no numpy array: {reason}", "write it with numpy.save or numpy.savez") from None
        if min(self.shape, default=0) < 0:
            raise SourceError(f"{where} has the shape {self.shape}", "write it with numpy.save or numpy.savez")
        if self.dtype.hasobject or self.dtype.names is not None:
            raise SourceError(f"{where} holds {self.dtype}, not numbers", "write uint8 images or float32 frames; objects are never unpickled")
        if columns and len(self.shape) > 1:
            raise SourceError(f"{where} is stored column by column", "write numpy.ascontiguousarray(array)")

    def rows(self, shape: tuple[int, ...], count: int) -> Iterator[NDArray[Any]]:
        """That many arrays of that shape, one after another, in this machine's byte order.

        Raises:
            SourceError: the file ends before.
        """
        for row in range(count):
            data = self.take(self.dtype.itemsize * math.prod(shape), f"row {row} of {count}")
            yield np.frombuffer(data, self.dtype).reshape(shape).astype(self.dtype.newbyteorder("="), copy=False)

    def take(self, size: int, what: str) -> bytearray:
        """The next bytes.

        Raises:
            SourceError: there are fewer.
        """
        data = bytearray(size)
        view, got = memoryview(data), 0
        try:
            while got < size and (chunk := self._file.read(min(size - got, 2**20))):
                view[got : got + len(chunk)] = chunk
                got += len(chunk)
        except Exception as reason:  # a damaged archive: zlib.error, BadZipFile, EOFError
            raise SourceError(f"{self._where} is damaged at {what}: {reason}", "copy it again") from None
        if got < size:
            raise SourceError(f"{self._where} ended in {what}", "it was cut short: copy or record it again")
        return data


def frames_shape(shape: tuple[int, ...], dtype: np.dtype[Any], spec: InputSpec) -> tuple[tuple[int, ...], bool]:
    """The shape [N,...] that an array of frames has for this model, and whether it is one frame without N.

    Raises:
        InputError: no such frames.
    """
    try:
        empty = np.broadcast_to(np.zeros((), dtype.newbyteorder("=")), shape)  # takes no memory, whatever the shape
    except ValueError:
        raise InputError(f"an array of {format_shape(shape)} is too large", "give frames as the model takes them") from None
    view, single = batch_of(empty, spec)
    if math.prod(view.shape[1:]) > 3 * PIXELS:
        raise InputError(f"frames of {format_shape(view.shape[1:])} are too large", f"give at most {PIXELS} pixels")
    return view.shape, single


def frames_of(reader: Reader, shape: tuple[int, ...], wanted: Wanted) -> Iterator[NDArray[Any]]:
    """The frames of an array that is [N,...] as `frames_shape` says, one after another, as a source gives them; see `Wanted.picture`.

    Raises:
        PictureTooLarge: at once.
        SourceError: the file ends before.
    """
    rows = reader.rows(shape[1:], shape[0])
    if wanted.picture is None:
        return rows
    fitting.check_array(shape[1:], reader.dtype, wanted.input, wanted.picture)
    return (fitting.array(row, wanted.input) for row in rows)


class Archive(Source):
    """An .npz file with `x`, uint8 [N,H,W,C] or float32 [N,*input.shape], and perhaps labels `y`; or an .npy file with x alone.

    Labels are [N]; for segmentation also one a pixel, in the size of the frames or of the model's input: [N,H,W], or [N,L] of sensors.

    Where the bundle makes windows of samples, float32 [T,C] is a recording, and a window has the truth that all its samples share.

    Args:
        path: the file.
        wanted: what the bundle takes.

    Raises:
        SourceError: it cannot be opened, has no `x` or no frames, or `y` does not go with it.
        InputError: the frames are not what the model takes.
    """

    def __init__(self, path: str | os.PathLike[str], wanted: Wanted) -> None:
        import zipfile  # here only: 1.1 MB that other sources do not need

        self.name = str(path)
        self._open: list[Any] = []
        try:
            if self.name.endswith(".npy"):
                x: IO[bytes] = open(path, "rb")
                y = None
                self._open.append(x)
            else:
                archive = zipfile.ZipFile(path)
                self._open.append(archive)
                names = archive.namelist()
                if "x.npy" not in names:
                    found = ", ".join(names[:8]) or "nothing"
                    raise SourceError(f"{path} has no x.npy, but {found}", "save it with numpy.savez(path, x=..., y=...)")
                x = archive.open("x.npy")
                y = archive.open("y.npy") if "y.npy" in names else None
                self._open += [member for member in (x, y) if member is not None]  # the file stays open as long as one of them is
            self._x, self._spec, self._wanted = Reader(x, f"x in {path}"), wanted.input, wanted
            self._recorded = wanted.input.hop is not None and len(self._x.shape) == 2 and self._x.shape[1] == wanted.input.shape[0]
            self._shape, single = self._frames(wanted.input)
            if single:
                raise SourceError(f"x in {path} is one frame of shape {format_shape(self._x.shape)}", "save x[None], one row a frame")
            self.count = None if self._recorded else self._shape[0]
            self._y = None if y is None else self._labels(Reader(y, f"y in {path}"))
        except OSError as reason:
            self.close()
            raise SourceError(f"{path} cannot be opened: {reason.strerror}", "check the path and its permissions") from None
        except (zipfile.BadZipFile, RuntimeError) as reason:
            self.close()
            raise SourceError(f"{path} is not an .npz file: {reason}", "save it with numpy.savez(path, x=..., y=...)") from None
        except BaseException:
            self.close()
            raise
        self.labelled = self._y is not None

    def _frames(self, spec: InputSpec) -> tuple[tuple[int, ...], bool]:
        if self._x.shape[:1] == (0,):
            raise SourceError(f"{self.name} holds no frames", "give at least one")
        if self._recorded:
            if self._x.dtype != np.float32:
                raise InputError(f"samples in {self.name} are {self._x.dtype}, not float32", "convert them with .astype(numpy.float32)")
            return self._x.shape, False
        shape, single = frames_shape(self._x.shape, self._x.dtype, spec)
        if self._wanted.picture is not None:
            try:
                fitting.check_array(shape[1:], self._x.dtype, spec, self._wanted.picture)
            except PictureTooLarge as reason:
                raise InputError(f"a frame of {self.name} {reason.message}", reason.hint) from None
        return shape, single

    def _labels(self, y: Reader) -> Reader:
        if y.dtype.kind not in "iu" or y.shape[:1] != self._shape[:1] or y.shape[1:] not in self._maps():  # before any of it is read
            raise SourceError(
                f"y in {self.name} is {y.dtype} of shape {format_shape(y.shape)}, not whole numbers, one row for each of {self._shape[0]} frames",
                "save one class a frame, or one a pixel for segmentation",
            )
        return y

    def _maps(self) -> set[tuple[int, ...]]:
        """The shapes that the labels of one frame may have."""
        if self._recorded or self._wanted.task.kind != "segmentation":
            return {()}
        return {(), self._spec.shape[1:], self._shape[1:3] if self._x.dtype == np.uint8 else self._shape[2:]}

    def _windows(self) -> Iterator[Frame]:
        windows, latest = Windows(self._spec), deque[int](maxlen=self._spec.shape[1])
        labels = None if self._y is None else self._y.rows((), self._shape[0])
        index = 0
        for sample in self._x.rows((1, self._shape[1]), self._shape[0]):
            if labels is not None:
                latest.append(int(next(labels)))
            for pixels in windows.push(sample):
                yield Frame(index, pixels, latest[0] if len(set(latest)) == 1 else None)
                index += 1

    def __iter__(self) -> Iterator[Frame]:
        if self._recorded:
            yield from self._windows()
            return
        labels = None if self._y is None else self._y.rows(self._y.shape[1:], self._shape[0])
        for index, pixels in enumerate(frames_of(self._x, self._shape, self._wanted)):
            truth = None if labels is None else next(labels)
            yield Frame(index, pixels, int(truth) if truth is not None and truth.ndim == 0 else truth)

    def close(self) -> None:
        """Closes the file."""
        while self._open:
            self._open.pop().close()
