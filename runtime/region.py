"""Where the sessions of a process take their tensors from: one region of fixed size under a budget, one that grows without."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime

from edgeadapt.errors import EdgeAdaptError

_TOO_MUCH = 2**48  # elements: more than any machine can address, so that asking for them never takes memory


@dataclass(frozen=True, eq=False)
class Region:
    """Memory that sessions share, because they never run at once.

    Attributes:
        size: bytes for tensors and workspace, taken at the first run and never more. 0: grows as needed.
        kept: bytes that sessions may take besides, while they load, for weights in another layout.
        prepacking: let them.
    """

    size: int = 0
    kept: int = 0
    prepacking: bool = True


GROWING = Region()
"""That of all adapters without a budget.

Measured on a chain of convolutions, forward and backward (18 MB of live tensors, batch 16): without an arena the peak is 1 MB lower but a run takes
twice as long, for mapping its blocks anew; three sessions with an arena each peak at 48 MB over the process's base, sharing one at 38 MB. Growth in
powers of two fragments less than growth as requested (46 MB), and pages count only once they are used.
"""

LOCK = threading.RLock()
"""Held while a session is made, which takes the region that is registered at that moment, for good."""

_wanted = GROWING
_registered: Region | None = None


@contextmanager
def using(region: Region) -> Iterator[None]:
    """Sessions made inside take their tensors from `region`; other threads wait with theirs.

    onnxruntime has one shared arena a process, but registering another one replaces it for sessions made later, and the old one goes with the
    last of its sessions (1.23 and 1.31). Entering twice makes two regions.
    """
    global _wanted, _registered  # noqa: PLW0603 - as the arena itself, these are the process's
    with LOCK:
        before, _wanted = _wanted, region
        try:
            yield
        finally:
            _wanted = before
            if _registered is region:
                _registered = None


def apply(options: Any) -> None:
    """Has a session that is about to be made, under `LOCK`, take its tensors from the region in use."""
    global _registered  # noqa: PLW0603 - as the arena itself, this is the process's
    with LOCK:
        if _registered is not _wanted:
            _register(_wanted)
            _registered = _wanted
        options.enable_cpu_mem_arena = True
        options.add_session_config_entry("session.use_env_allocators", "1")
        if not _wanted.prepacking:
            options.add_session_config_entry("session.disable_prepacking", "1")


def prepacks() -> bool:
    """Whether sessions that are made now keep copies of weights."""
    return _wanted.prepacking


def release() -> None:
    """Lets go of a fixed region that onnxruntime holds on to for sessions yet to be made, after its own have gone; sessions keep theirs.

    Without this, what an adapter touched of its region stayed resident after it was closed, until the next one was opened.
    """
    global _registered  # noqa: PLW0603 - as the arena itself, this is the process's
    with LOCK:
        if _wanted is GROWING is not _registered:
            _register(GROWING)
            _registered = GROWING


def _register(region: Region) -> None:
    place = onnxruntime.OrtMemoryInfo("Cpu", onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, onnxruntime.OrtMemType.DEFAULT)
    settings = {
        "max_mem": region.size + region.kept,  # 0: no limit
        "arena_extend_strategy": 0,
        "initial_chunk_size_bytes": region.size or -1,
        "max_dead_bytes_per_chunk": 1,  # blocks are cut to size; 0 crashes the process
    }
    onnxruntime.create_and_register_allocator(place, onnxruntime.OrtArenaCfg(settings))


def left() -> int | None:
    """Bytes that the registered region could still take from the system before its first run; None if its limit no longer holds.

    What sessions keep while they load is never refused, only counted: once the count has passed the limit, onnxruntime (1.23 and 1.31) computes
    what is left without a sign, and nothing is refused any more. So it must be asked after loading. This asks for more than there can be,
    and reads the refusal; nothing is allocated.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL  # none of whose code need be resident for this
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    apply(options)
    session = onnxruntime.InferenceSession(_probe(), options, providers=["CPUExecutionProvider"])
    try:
        session.run(None, {"n": np.array([_TOO_MUCH], np.int64)})
    except Exception as reason:  # onnxruntime's own types have no common base of theirs
        found = re.search(r"Available memory of (\d+) ", str(reason))
        if found:
            return int(found[1])
        if "Failed to allocate memory" in str(reason) or isinstance(reason, MemoryError):
            return None
        raise EdgeAdaptError(f"onnxruntime {onnxruntime.__version__} does not tell what its memory is limited to: {reason}") from None
    return None


def _probe() -> bytes:
    """A model of one node: y = ConstantOfShape(n)."""
    node = _field(1, b"n") + _field(2, b"y") + _field(4, b"ConstantOfShape")
    given, made = _value(b"n", 7, b"\x0a\x02\x08\x01"), _value(b"y", 1, b"\x0a\x03\x12\x01s")
    graph = _field(1, node) + _field(2, b"probe") + _field(11, given) + _field(12, made)
    return b"\x08\x09" + _field(7, graph) + _field(8, b"\x10\x14")


def _value(name: bytes, kind: int, shape: bytes) -> bytes:
    return _field(1, name) + _field(2, _field(1, b"\x08" + bytes([kind]) + _field(2, shape)))


def _field(number: int, data: bytes) -> bytes:
    return bytes([number << 3 | 2, len(data)]) + data
