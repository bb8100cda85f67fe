"""Named numpy arrays in a safetensors file, read strictly and without copies.

A file is an 8-byte little-endian header length, a JSON header, and the arrays' bytes. The header names every array's type, shape and
place; the places must cover the bytes exactly, without holes or overlaps. Format: https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgeadapt import plainfile
from edgeadapt.bundle.reading import shortened, strict
from edgeadapt.errors import EdgeAdaptError, InputError

Array = NDArray[Any]

MAX_HEADER = 16 * 2**20
MAX_TENSORS = 32_768
MAX_DIMENSIONS = 16
_CHECKED = 65536
_ADDRESSED = int(np.iinfo(np.intp).max)
_DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}


def encode(tensors: Mapping[str, Array], metadata: Mapping[str, str] | None = None) -> bytes:
    """The whole file as bytes; see `write`."""
    head, ordered = _plan(tensors, metadata)
    return b"".join([head, *(bytes_of(array) for array in ordered)])


def write(file: BinaryIO, tensors: Mapping[str, Array], metadata: Mapping[str, str] | None = None) -> int:
    """Writes the arrays to an open file without a second copy of them, and says how many bytes that were.

    Arrays are laid out by falling alignment, then by name, so that equal contents give equal files.

    Raises:
        InputError: an array's dtype is not one of float32, float16, int8/16/32/64, uint8, bool; a name is empty or reserved.
    """
    head, ordered = _plan(tensors, metadata)
    return file.write(head) + sum(file.write(bytes_of(array)) for array in ordered)


def bytes_of(array: Array) -> memoryview | bytes:
    """A contiguous array's bytes, without a copy."""
    return array.reshape(-1).view(np.uint8).data if array.size else b""


def _plan(tensors: Mapping[str, Array], metadata: Mapping[str, str] | None) -> tuple[bytes, list[Array]]:
    entries: list[tuple[int, str, Array]] = []
    for name, given in tensors.items():
        array = np.asarray(given)
        dtype = array.dtype.newbyteorder("<")
        if dtype not in _CODES:
            raise InputError(f"tensor {name!r} has dtype {array.dtype}, which is none of {_known()}", "convert it with .astype")
        if not name or name == "__metadata__":
            raise InputError(f"a tensor cannot be named {name!r}", "give it another name")
        entries.append((-dtype.itemsize, name, np.ascontiguousarray(array, dtype=dtype).reshape(array.shape)))
    entries.sort(key=lambda entry: entry[:2])
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata is not None else {}
    position = 0
    for _, name, array in entries:
        header[name] = {"dtype": _CODES[array.dtype], "shape": list(array.shape), "data_offsets": [position, position + array.nbytes]}
        position += array.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER:
        raise InputError(f"the header of {len(entries)} tensors takes {len(text)} bytes; at most {MAX_HEADER} are allowed")
    return len(text).to_bytes(8, "little") + text, [array for _, _, array in entries]


def _known() -> str:
    return ", ".join(str(dtype) for dtype in _CODES)


def read(path: str | os.PathLike[str], error: type[EdgeAdaptError] = InputError) -> tuple[dict[str, Array], dict[str, str]]:
    """The arrays and metadata of a file; see `decode`.

    Raises:
        error: the file cannot be read or is malformed.
    """
    try:
        with plainfile.opened(path) as file:
            data = file.read()
    except OSError as reason:
        raise error(f"{path} cannot be read: {reason.strerror}", "check the path and its permissions") from None
    return decode(data, str(path), error)


def decode(
    data: bytes | bytearray | memoryview, where: str = "the data", error: type[EdgeAdaptError] = InputError
) -> tuple[dict[str, Array], dict[str, str]]:
    """The arrays and metadata held in `data`.

    Args:
        data: a whole safetensors file. The arrays returned are views of it where their alignment allows; of `bytes` they are read-only.
        where: what the data is, for messages.
        error: the type to raise.

    Returns:
        the arrays by name, and the metadata (empty where there is none).

    Raises:
        error: the data is not a well-formed safetensors file of the dtypes known here; the message names the tensor and the fault.
    """
    view = memoryview(data)
    bad = _complaint(where, error)
    start = 8 + _length(view[:8], len(view), bad)
    places, metadata = _places(bytes(view[8:start]), len(view) - start, bad)
    found = {name: _array(name, view[start + place.begin : start + place.end], place, bad) for name, place in places.items()}
    return {name: array if array.flags.aligned else array.copy() for name, array in found.items()}, metadata


def finite(array: Array) -> bool:
    """Whether an array has neither NaN nor infinity; looked at in pieces, so that the answers take 64 KiB and not as much as the array."""
    if array.dtype.kind != "f":
        return True
    flat = array.reshape(-1)
    return all(np.isfinite(flat[begin : begin + _CHECKED]).all() for begin in range(0, flat.size, _CHECKED))


class Stored(Mapping[str, Array]):
    """The arrays of an open file, each read when it is asked for and kept by whoever asked: read-only, and never all in memory.

    Args:
        file: an open file, with a safetensors file in it.
        where, error: as for `decode`.
        begin, size: the bytes of it that are one.

    Attributes:
        metadata: its metadata, empty where there is none.
        nbytes: of all arrays.

    Raises:
        error: as `decode`, and so does reading an array; also where the file cannot be read.
    """

    def __init__(self, file: BinaryIO, where: str, error: type[EdgeAdaptError], begin: int = 0, size: int | None = None) -> None:
        self._file, self._where, self._error, self._bad = file, where, error, _complaint(where, error)
        size = os.fstat(file.fileno()).st_size - begin if size is None else size
        self._begin = begin + 8 + _length(self._read(begin, min(8, size)), size, self._bad)
        self.nbytes = begin + size - self._begin
        self._places, self.metadata = _places(self._read(begin + 8, self._begin - begin - 8), self.nbytes, self._bad)

    def _read(self, begin: int, size: int) -> bytes:
        try:
            self._file.seek(begin)
            data = self._file.read(size)
        except OSError as reason:
            raise self._error(f"{self._where} cannot be read: {reason.strerror}", "check the disk that it is on") from None
        if len(data) != size:
            raise self._bad("it became shorter while it was read")
        return data

    def __getitem__(self, name: str) -> Array:
        """The array of that name; KeyError where there is none."""
        place = self._places[name]
        return _array(name, self._read(self._begin + place.begin, place.end - place.begin), place, self._bad)

    def form(self, name: str) -> tuple[np.dtype[Any], tuple[int, ...]]:
        """Type and shape of an array, which is not read for that; KeyError where there is none."""
        place = self._places[name]
        return place.dtype, place.shape

    def __iter__(self) -> Iterator[str]:
        """The names, in the header's order."""
        return iter(self._places)

    def __len__(self) -> int:
        """How many arrays there are."""
        return len(self._places)


class _Place(NamedTuple):
    """Where an array's bytes begin and end behind the header, and what they are."""

    begin: int
    end: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]


def _complaint(where: str, error: type[EdgeAdaptError]) -> Callable[[str], EdgeAdaptError]:
    return lambda what: error(f"{where} is not a sound safetensors file: {shortened(what)}", "copy or save it again")


def _length(first: bytes | memoryview, size: int, bad: Callable[[str], EdgeAdaptError]) -> int:
    """The header's, by the first eight bytes of a file of `size` bytes."""
    if size < 8:
        raise bad(f"{size} bytes, of which 8 should say the header's length")
    length = int.from_bytes(first, "little")
    if length > MAX_HEADER:
        raise bad(f"a header of {length} bytes; at most {MAX_HEADER} are allowed")
    if 8 + length > size:
        raise bad(f"truncated in its header ({size} bytes, the header alone needs {8 + length})")
    return length


def _places(text: bytes, available: int, bad: Callable[[str], EdgeAdaptError]) -> tuple[dict[str, _Place], dict[str, str]]:
    """What a header says, checked against the bytes that follow it: the arrays' places in its order, and the metadata."""
    header = _header(text, bad)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise bad("__metadata__ is not a mapping of strings")
    if len(header) > MAX_TENSORS:
        raise bad(f"{len(header)} tensors; at most {MAX_TENSORS} are allowed")
    places = {name: _place(name, entry, available, bad) for name, entry in header.items()}
    position = 0
    for name, place in sorted(places.items(), key=lambda item: item[1][:2]):
        if place.begin != position:
            raise bad(f"tensor {name!r} begins at byte {place.begin}, but the one before it ends at {position}")
        position = place.end
    if position != available:
        raise bad(f"its tensors take {position} bytes, but {available} follow the header")
    return places, metadata


def _array(name: str, data: bytes | memoryview, place: _Place, bad: Callable[[str], EdgeAdaptError]) -> Array:
    array = np.frombuffer(data, dtype=place.dtype).reshape(place.shape)
    if place.dtype == np.bool_ and array.size and int(array.view(np.uint8).max()) > 1:
        raise bad(f"tensor {name!r} has bytes that are neither true nor false")
    return array


def _header(text: bytes, bad: Callable[[str], EdgeAdaptError]) -> dict[str, Any]:
    if text[:1] != b"{":
        raise bad("its header does not begin with a brace")
    try:
        header = strict(text)
    except ValueError as reason:
        raise bad(f"its header is not JSON ({reason})") from None
    if not isinstance(header, dict):
        raise bad("its header is not a mapping")
    return header


def _place(name: str, entry: Any, available: int, bad: Callable[[str], EdgeAdaptError]) -> _Place:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise bad(f"tensor {name!r} needs dtype, shape and data_offsets, and nothing else")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str) or code not in _DTYPES:
        raise bad(f"tensor {name!r} has dtype {code!r}, which is none of {', '.join(_DTYPES)}")
    if not _sizes(shape) or len(shape) > MAX_DIMENSIONS:
        raise bad(f"tensor {name!r} has shape {shape!r}; at most {MAX_DIMENSIONS} sizes, none below 0, are allowed")
    if not _sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1] or offsets[1] > available:
        raise bad(f"tensor {name!r} has data_offsets {offsets!r}; two rising positions up to {available} were expected")
    needed = math.prod(shape) * _DTYPES[code].itemsize
    if offsets[1] - offsets[0] != needed:
        raise bad(f"tensor {name!r} of shape {shape} and dtype {code} needs {needed} bytes, but {offsets[1] - offsets[0]} are given")
    if math.prod(size or 1 for size in shape) * _DTYPES[code].itemsize > _ADDRESSED:  # though one of them is 0
        raise bad(f"tensor {name!r} has shape {shape}, which is more than can be addressed")
    return _Place(offsets[0], offsets[1], _DTYPES[code], tuple(shape))


def _sizes(value: object) -> bool:
    return isinstance(value, list) and all(type(size) is int and 0 <= size < 2**63 for size in value)
