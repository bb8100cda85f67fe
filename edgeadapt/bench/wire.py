"""Messages between the bench and the process that serves a row: a line of JSON, and after it as many bytes as its "bytes" says."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from edgeadapt.errors import EdgeAdaptError

_LINE = 2**20
_TYPES = ("uint8", "float32")


def send(file: BinaryIO, kind: str, values: Mapping[str, Any] | None = None, array: NDArray[Any] | None = None) -> None:
    """Writes a message and flushes.

    Args:
        file: a pipe.
        kind: what it is.
        values: JSON values.
        array: uint8 or float32.

    Raises:
        OSError: nobody reads.
    """
    data = np.zeros(0, np.uint8) if array is None else np.ascontiguousarray(array).reshape(-1).view(np.uint8)  # no copy: it would count as the row's
    told = {"kind": kind, "bytes": data.nbytes, "values": dict(values or {})}
    if array is not None:
        told |= {"dtype": array.dtype.name, "shape": list(array.shape)}
    file.write(json.dumps(told).encode() + b"\n")
    file.write(data.data)
    file.flush()


def receive(file: BinaryIO) -> tuple[str, dict[str, Any], NDArray[Any] | None] | None:
    """The next message: its kind, its values, and its array; None where the other side has gone.

    Raises:
        EdgeAdaptError: it is no message.
    """
    line = file.readline(_LINE)
    if not line.endswith(b"\n"):
        return None
    try:
        told = json.loads(line)
        data = file.read(told["bytes"]) if told["bytes"] else b""
        if len(data) < told["bytes"]:
            return None
        array = None
        if "dtype" in told:
            array = np.frombuffer(data, np.dtype(told["dtype"] if told["dtype"] in _TYPES else "")).reshape(told["shape"])
        return str(told["kind"]), dict(told["values"]), array
    except (ValueError, KeyError, TypeError) as reason:
        raise EdgeAdaptError(f"a message of the serving process cannot be read: {reason}", "run the same command again") from None
