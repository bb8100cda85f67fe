"""weights.bin: the frozen tensors all graphs of a bundle share, and how graphs point into it.

onnxruntime maps external data from the file a tensor names, so it can map frozen weights straight out of the bundle: once for all
sessions, file-backed and clean. For that weights.bin is stored uncompressed as the first member, its data at a fixed offset, and graphs
carry a location of fixed length that is overwritten with the bundle's present name when a graph is loaded (a bundle may be renamed).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeadapt.bundle.digest import sha256
from edgeadapt.bundle.onnxwire import External, Facts
from edgeadapt.errors import BundleError

WEIGHTS_OFFSET = 4096
"""Where the data of weights.bin begins in every bundle, in bytes: page-aligned, as a mapping wants it."""

PLACEHOLDER = "edgeadapt-weights-".ljust(300, "@")
"""The external location that graphs in a bundle carry; 300 bytes, room for the longest file name (255)."""

WINDOW = 65_536
"""Bytes: a fault on a page of a file also maps those of this window around it that are in the page cache. No page is larger."""

_ALIGNMENT = 64  # bytes: a cache line, and enough for any vector instruction


class WeightsFile:
    """The contents of weights.bin in the making. Equal bytes are kept once, whatever shape they are seen in."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._places: dict[str, tuple[int, int]] = {}
        self._size = 0

    def add(self, array: NDArray[Any]) -> tuple[int, int]:
        """Keeps an array's bytes, little-endian and in C order.

        Returns:
            (offset, nbytes) inside weights.bin, the offset a multiple of 64. A graph writes `WEIGHTS_OFFSET + offset` and `PLACEHOLDER`.
        """
        array = np.asarray(array)
        data = array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()
        key = sha256(data).hexdigest()
        if key not in self._places:
            padding = -self._size % _ALIGNMENT
            self._parts += [bytes(padding), data]
            self._places[key] = (self._size + padding, len(data))
            self._size += padding + len(data)
        return self._places[key]

    def __len__(self) -> int:
        """Bytes so far."""
        return self._size

    def __iter__(self) -> Iterator[bytes]:
        """The bytes, in pieces."""
        return iter(self._parts)

    def sha256(self) -> str:
        """The hash of the bytes so far, in hex."""
        digest = sha256()
        for part in self._parts:
            digest.update(part)
        return digest.hexdigest()


def windows(tensors: Iterable[External]) -> int:
    """Which windows of a file are mapped once these tensors in it have been read: a bit for each, so that sets of graphs are joined by `|`."""
    found = 0
    for tensor in tensors:
        first, last = tensor.offset // WINDOW, -(-(tensor.offset + tensor.length) // WINDOW)
        found |= (1 << last) - (1 << first)
    return found


def check_external(facts: Facts, weights_size: int, where: str) -> None:
    """Refuses external data that lies anywhere but inside weights.bin.

    Raises:
        BundleError: a location other than the placeholder, or a place outside weights.bin.
    """
    for tensor in facts.external:
        if tensor.location != PLACEHOLDER:
            raise BundleError(
                f"{where}: tensor {tensor.name!r} takes its data from {tensor.location[:80]!r}, not from this bundle's weights.bin",
                "take the bundle from its exporter; this one was edited",
            )
        if tensor.offset % _ALIGNMENT:
            raise BundleError(f"{where}: tensor {tensor.name!r} begins at byte {tensor.offset}, no multiple of 64", "export the bundle again")
        if tensor.offset < WEIGHTS_OFFSET or tensor.offset + tensor.length > WEIGHTS_OFFSET + weights_size:
            raise BundleError(
                f"{where}: tensor {tensor.name!r} lies at bytes {tensor.offset} to {tensor.offset + tensor.length}, "
                f"outside weights.bin ({WEIGHTS_OFFSET} to {WEIGHTS_OFFSET + weights_size})",
                "export the bundle again",
            )


def relocate(graph: bytes, facts: Facts, file_name: str) -> bytes:
    """A graph's bytes with the placeholder replaced by `file_name`, padded to the same length by slashes: "./////X.edgeadapt".

    Raises:
        BundleError: the file name is not UTF-8 or too long.
    """
    if not facts.external:
        return graph
    name = os.fsencode(file_name)
    try:
        name.decode("utf-8")
    except UnicodeDecodeError:
        raise BundleError(f"the bundle's file name {file_name!r} is not UTF-8", "rename the file") from None
    location = b"." + b"/" * (len(PLACEHOLDER) - 1 - len(name)) + name
    if len(location) != len(PLACEHOLDER) or len(name) > 255:
        raise BundleError(f"the bundle's file name is {len(name)} bytes long, more than 255", "rename the file")
    placeholder = PLACEHOLDER.encode()
    if graph.count(placeholder) != len(facts.external):
        raise BundleError("a graph mentions the weights' placeholder outside its external data", "export the bundle again")
    return graph.replace(placeholder, location)
