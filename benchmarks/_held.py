"""What `memory_constants.py` measures in processes of their own; nothing is imported here that an adapter's process does not have.

Arguments: the name of a function below and what it takes. Prints JSON.
"""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import onnxruntime


def in_heap() -> int:
    """Bytes that malloc has given out in this process."""
    names = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    ask = ctypes.CDLL(None).mallinfo2
    ask.restype = type("Info", (ctypes.Structure,), {"_fields_": [(name, ctypes.c_size_t) for name in names]})
    found = ask()
    return int(found.uordblks + found.hblkhd)


def peak() -> int:
    """The most bytes this process has had resident."""
    line = next(line for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def resident() -> int:
    """Bytes that this process has resident now."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * 4096


def code() -> int:
    """Resident bytes of libraries that are mapped from files."""
    total, library = 0, False
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8", errors="replace").splitlines():
        if not line.split(None, 1)[0].endswith(":"):
            library = ".so" in line
        elif line.startswith("Rss:") and library:
            total += int(line.split()[1]) * 1024
    return total


def trivial(path: str) -> Any:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    session.run(None, {"x": np.ones(4, np.float32)})
    return session


def floor(path: str) -> dict[str, Any]:
    """The process that everything is counted from."""
    held = trivial(path)
    result = {"resident": peak(), "heap": in_heap(), "code": code()}
    from edgeadapt.runtime import library

    result["given"] = library.give_back()
    del held
    return result


def session_of(path: str, threads: int = 1, prepacking: bool = True, runs: int = 2) -> list[Any]:
    """A session with an adapter's options, run on ones, every output bound."""
    from edgeadapt.bundle.onnxwire import without_declarations
    from edgeadapt.runtime import session as sessions

    options = sessions.options(threads)
    if not prepacking:
        options.add_session_config_entry("session.disable_prepacking", "1")
    session = onnxruntime.InferenceSession(without_declarations(Path(path).read_bytes()), options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    arrays = []
    for nodes, bind in ((session.get_inputs(), binding.bind_ortvalue_input), (session.get_outputs(), binding.bind_ortvalue_output)):
        for node in nodes:
            arrays.append(onnxruntime.OrtValue.ortvalue_from_numpy(np.ones(node.shape, np.float32)))
            bind(node.name, arrays[-1])
    for _ in range(runs):
        session.run_with_iobinding(binding)
    return [session, binding, arrays]


def beginning() -> dict[str, Any]:
    """The peak of a process that begins as an adapter with a budget does."""
    from edgeadapt.runtime import adapter, loading

    assert adapter
    loading.begin()
    return {"resident": peak()}


def heap(*paths: str) -> dict[str, Any]:
    """Bytes in the heap of each session in turn; copies of weights are not made, as they are counted elsewhere."""
    kept, sizes = [], []
    for path in paths:
        before = in_heap()
        kept.append(session_of(path, prepacking=False))
        sizes.append(in_heap() - before)
    return {"sizes": sizes}


def kernels(path: str, *paths: str) -> dict[str, Any]:
    """Pages of libraries that come back after those of onnxruntime were given back: with making a session, and with the runs of all."""
    from edgeadapt.runtime import library, region

    kept, loading = [trivial(path)], 0
    region.left()
    library.give_back()
    before = code()
    for path in paths:
        kept.append(session_of(path, runs=0))
        loading = max(loading, library.held())
        library.give_back()
    for session, binding, _ in kept[1:]:
        for _ in range(2):
            session.run_with_iobinding(binding)
    result = {"code": code() - before, "loading": loading}
    del kept
    return result


def optimised(path: str, target: str) -> dict[str, Any]:
    """Writes what onnxruntime makes of a graph for this processor."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.optimized_model_filepath = target
    options.log_severity_level = 3
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return {}


def adapter(path: str, batches: str) -> dict[str, Any]:
    """A process that has run an almost empty bundle within a budget, less what its sessions are counted at."""
    from edgeadapt import Adapter
    from edgeadapt.memory import footprint, read

    sizes = [int(batch) for batch in batches.split(",")]
    served = Adapter.open(path, "8GiB", roles="predict", batches=sizes)
    for batch in sizes:
        for _ in range(4):
            served.predict(np.zeros((batch, 3, 4, 4), np.float32))
    result = {"resident": resident(), "heap": in_heap(), "code": code()}
    counted = sum(footprint.session_bytes(footprint.count(read(served.bundle.graph_bytes(f"predict.b{batch}")))) for batch in sizes)
    return {**result, "resident": result["resident"] - counted, "heap": result["heap"] - counted}


def reading(first: str, path: str, *paths: str) -> dict[str, Any]:
    """A process that serves graphs, after another was read, planned and forgotten as an adapter with a budget does; path "": without that."""
    from edgeadapt.memory import Plan, read, smallest
    from edgeadapt.runtime import loading

    kept, nodes = [trivial(first)], 0
    if path:
        graph = read(Path(path).read_bytes())
        nodes = len(graph.nodes)
        smallest(Plan(graph))
        del graph
    loading.give_back()
    kept += [session_of(other) for other in paths]
    result = {"resident": resident(), "nodes": nodes}
    del kept
    return result


def region(path: str) -> dict[str, Any]:
    """Bytes of a region's table for every 256 of the region."""
    size = 256 << 20
    place = onnxruntime.OrtMemoryInfo("Cpu", onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, onnxruntime.OrtMemType.DEFAULT)
    settings = {"max_mem": size, "arena_extend_strategy": 0, "initial_chunk_size_bytes": size, "max_dead_bytes_per_chunk": 1}
    onnxruntime.create_and_register_allocator(place, onnxruntime.OrtArenaCfg(settings))
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.use_env_allocators", "1")
    before = in_heap()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    session.run(None, {"x": np.ones(4, np.float32)})
    return {"TABLE_ENTRY": (in_heap() - before - size) // (size // 256)}


def threads(path: str, count: str) -> dict[str, Any]:
    """Peak of a graph that one operator's threads work on."""
    kept = session_of(path, int(count), runs=20)
    result = {"resident": peak()}
    del kept
    return result


PARTS: Mapping[str, Any] = {part.__name__: part for part in (floor, beginning, heap, kernels, optimised, adapter, reading, region, threads)}

if __name__ == "__main__":
    print(json.dumps(PARTS[sys.argv[1]](*sys.argv[2:])))
