"""The one region of memory that all sessions of the process take their tensors from."""

from __future__ import annotations

import threading

import onnxruntime

_ONCE = threading.Lock()
_arena_made = False


def share() -> None:
    """Gives the process one arena that all sessions take their tensors from, so that their needs do not add up: they never run at once.

    Measured on a chain of convolutions, forward and backward (18 MB of live tensors, batch 16): without an arena the peak is 1 MB lower but a
    run takes twice as long, for mapping its blocks anew; three sessions with an arena each peak at 48 MB over the process's base, sharing one
    at 38 MB. Growth in powers of two fragments less than growth as requested (46 MB), and pages count only once they are used.
    """
    global _arena_made  # noqa: PLW0603 - as the arena itself, this is the process's
    with _ONCE:
        if _arena_made:
            return
        place = onnxruntime.OrtMemoryInfo("Cpu", onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, onnxruntime.OrtMemType.DEFAULT)
        settings = {"max_mem": 0, "arena_extend_strategy": 0, "initial_chunk_size_bytes": -1, "max_dead_bytes_per_chunk": 1}
        onnxruntime.create_and_register_allocator(place, onnxruntime.OrtArenaCfg(settings))
        _arena_made = True
