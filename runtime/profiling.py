"""What onnxruntime's own profiler says of one run of a graph: memory node by node, true shapes, times."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from edgeadapt.errors import EdgeAdaptError
from edgeadapt.runtime import session as sessions

TYPES = {
    "tensor(float)": np.float32,
    "tensor(int64)": np.int64,
    "tensor(bool)": np.bool_,
    "tensor(uint8)": np.uint8,
    "tensor(int8)": np.int8,
    "tensor(int16)": np.int16,
}
"""numpy's type of each that onnxruntime names for inputs and outputs."""


@dataclass(frozen=True)
class Profile:
    """One run.

    Attributes:
        nodes: index in the file, of each node in the order of execution.
        in_use: the arena's bytes in use after each node, before its inputs are freed. Empty where this onnxruntime does not tell (before 1.28).
        peak: the most that was in use, bytes; 0 where it does not tell.
        base: of that, what was in use before the first node: prepacked weights and small constants.
        shapes: shapes of each node's outputs.
        types: and their element types, as onnxruntime names them ("float", "int64").
        seconds: each node's time.
    """

    nodes: list[int]
    in_use: list[int]
    peak: int
    base: int
    shapes: list[list[tuple[int, ...]]]
    types: list[list[str]]
    seconds: list[float]


def memory_of(model: bytes, folder: str, threads: int = 1, runs: int = 1, options: Any = None) -> Profile:
    """Profiles a graph on made-up inputs, every output bound. For a process of its own: the arena's limits are the process's.

    Args:
        model: the graph as ONNX.
        folder: where its external data lies.
        threads: of one operator.
        runs: how many; the last is told about.
        options: session options; those of the adapter where None.

    Raises:
        EdgeAdaptError: onnxruntime cannot load or run it.
    """
    with tempfile.TemporaryDirectory() as place:
        chosen = sessions.options(threads) if options is None else options
        chosen.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
        chosen.enable_profiling = True
        chosen.profile_file_prefix = str(Path(place, "run"))
        try:
            session = onnxruntime.InferenceSession(model, chosen, providers=["CPUExecutionProvider"])
            binding, held = bind(session)
            for _ in range(runs):
                session.run_with_iobinding(binding)
            events = json.loads(Path(session.end_profiling()).read_bytes())
        except EdgeAdaptError:
            raise
        except Exception as reason:  # onnxruntime's own types have no common base of theirs
            raise sessions.failure("the profiled run", reason) from None
        del held
    return _digest([event for event in events if event.get("cat") == "Node" and event["name"].endswith("_kernel_time")], runs)


def bind(session: Any) -> tuple[Any, list[Any]]:
    """A binding of made-up inputs and of memory for all outputs, and what must outlive it."""
    random, binding, held = np.random.default_rng(0), session.io_binding(), []
    for node in session.get_inputs():
        kind = TYPES[node.type]
        array = random.standard_normal(node.shape).astype(kind) if kind is np.float32 else np.zeros(node.shape, kind)
        array = np.abs(array) + np.float32(0.5) if node.name.endswith(".variance") else array
        held.append(onnxruntime.OrtValue.ortvalue_from_numpy(np.asarray(array)))
        binding.bind_ortvalue_input(node.name, held[-1])
    for node in session.get_outputs():
        held.append(onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros(node.shape, TYPES[node.type])))
        binding.bind_ortvalue_output(node.name, held[-1])
    return binding, held


def _digest(events: list[dict[str, Any]], runs: int) -> Profile:
    count = len(events) // runs
    last = events[-count:]
    told = [event["args"] for event in last]
    in_use = [int(entry["mem_bytes_in_use"]) for entry in told if "mem_bytes_in_use" in entry]
    peak = max((int(entry.get("mem_in_use_peak", 0)) for entry in told), default=0)
    base = in_use[0] - int(told[0]["mem_in_use_delta"]) if in_use else 0
    made = [[next(iter(item.items())) for item in entry["output_type_shape"]] for entry in told]
    shapes = [[tuple(int(size) for size in sizes) for _, sizes in outputs] for outputs in made]
    types = [[kind for kind, _ in outputs] for outputs in made]
    return Profile([int(entry["node_index"]) for entry in told], in_use, peak, base, shapes, types, [event["dur"] / 1e6 for event in last])
