"""onnxruntime as edgeadapt wants it: our order of nodes, our memory, the frozen weights mapped out of the bundle."""

from __future__ import annotations

import ctypes
import sys
from typing import Any

import numpy as np
import onnxruntime

from edgeadapt.bundle import Bundle, Graph
from edgeadapt.errors import BudgetError, BundleError, EdgeAdaptError
from edgeadapt.runtime import region

_M_MMAP_THRESHOLD = -3
_DTYPES = {1: "<f4", 2: "u1", 3: "i1", 4: "<u2", 5: "<i2", 6: "<i4", 7: "<i8", 9: "?", 10: "<f2", 11: "<f8", 12: "<u4", 13: "<u8"}


def _fix_malloc() -> None:
    """Blocks of 64 KiB and more are mapped one by one and go back to the system when freed.

    glibc otherwise raises that threshold up to 32 MiB as blocks are freed, and keeps what a session needed only while it was loaded. A process
    that has torch in it is a workstation's: there it would map every tensor anew and take a third of the time.
    """
    if "torch" in sys.modules:
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # musl has none
        return
    mallopt(_M_MMAP_THRESHOLD, 65536)


_fix_malloc()
onnxruntime.set_default_logger_severity(3)  # errors; warnings are about what we chose

VERSION: str = onnxruntime.__version__


def options(threads: int) -> Any:
    """Session options: nodes run in file order on the graph as emitted, in the process's one arena, without the planner's own reuse."""
    region.share()
    result = onnxruntime.SessionOptions()
    result.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    result.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED
    result.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    result.intra_op_num_threads = threads
    result.inter_op_num_threads = 1
    result.enable_cpu_mem_arena = True
    result.add_session_config_entry("session.use_env_allocators", "1")
    result.enable_mem_pattern = False
    if hasattr(result, "enable_mem_reuse"):
        result.enable_mem_reuse = False
    result.log_severity_level = 3
    return result


class Weights:
    """A bundle's frozen weights, mapped once and shared by all sessions of the process.

    onnxruntime would map external data too, but anew for every session, and the operating system counts the pages of each mapping: on a
    bundle with 21 MB of weights every further session took 20.5 MB more resident memory, and takes 0.5 MB this way.
    """

    def __init__(self, bundle: Bundle) -> None:
        self._file = bundle.mapped()
        self._values: dict[tuple[int, int, tuple[int, ...]], Any] = {}

    def share(self, graph: Graph, chosen: Any) -> None:
        """Has a session with the options `chosen` take the graph's frozen tensors from here.

        Tensors of subgraphs, and of types that numpy does not have, are left to onnxruntime's own mapping.
        """
        for tensor in graph.external:
            dtype = _DTYPES.get(tensor.kind)
            if dtype is None or not tensor.outer or not tensor.length:
                continue
            key = (tensor.offset, tensor.kind, tensor.shape)
            if key not in self._values:
                part = np.frombuffer(self._file[tensor.offset : tensor.offset + tensor.length], dtype).reshape(tensor.shape)
                self._values[key] = onnxruntime.OrtValue.ortvalue_from_numpy(part)  # a view, which it keeps alive
            chosen.add_initializer(tensor.name, self._values[key])


def load(bundle: Bundle, name: str, threads: int, weights: Weights) -> Any:
    """A session of one of the bundle's graphs, checked against what the manifest says of its inputs and outputs.

    `weights` must outlive the session.

    Raises:
        BundleError: the graph is damaged, contradicts the manifest, or this onnxruntime cannot load it.
    """
    graph = bundle.graph(name)
    chosen = options(threads)
    chosen.add_session_config_entry("session.model_external_initializers_file_folder_path", bundle.folder)
    weights.share(graph, chosen)
    try:
        session = onnxruntime.InferenceSession(graph.data, chosen, providers=["CPUExecutionProvider"])
    except Exception as reason:  # onnxruntime's own types have no common base of theirs
        raise failure(f"{bundle.path}: onnxruntime {VERSION} cannot load graph {name}", reason) from None
    _check(session, bundle, name)
    return session


def failure(what: str, reason: Exception) -> EdgeAdaptError:
    """onnxruntime's exception as ours: memory that is not there is the budget's affair, anything else the bundle's."""
    text = str(reason)
    if "Available memory of" in text or "Failed to allocate memory" in text or isinstance(reason, MemoryError):
        return BudgetError(f"{what}: there is not enough memory ({text})", "raise the budget, or export with a smaller batch")
    return BundleError(f"{what}: {text}", "export the bundle with this edgeadapt, or install a newer onnxruntime")


def _check(session: Any, bundle: Bundle, name: str) -> None:
    manifest, spec = bundle.manifest, bundle.manifest.graphs[name]
    shapes = {state.name: list(state.shape) for state in manifest.state}
    wanted: dict[str, tuple[str, list[int] | None]] = {"x": ("tensor(float)", [spec.batch, *manifest.input.shape])}
    if spec.role == "learn":
        wanted["y"] = ("tensor(int64)", None)
    wanted |= {f"hyper.{key}": ("tensor(float)", []) for key in spec.hyper}
    wanted |= {f"state.{key}": ("tensor(float)", shapes[key]) for key in spec.reads}
    _compare(session.get_inputs(), wanted, f"{bundle.path}: graph {name}: input")
    wanted = {"logits": ("tensor(float)", None)}
    wanted |= {f"metric.{key}": ("tensor(float)", []) for key in spec.metrics}
    wanted |= {f"new.{key}": ("tensor(float)", shapes[key]) for key in spec.writes}
    _compare(session.get_outputs(), wanted, f"{bundle.path}: graph {name}: output")
    logits = next(node.shape for node in session.get_outputs() if node.name == "logits")
    dims = {"classification": (2,), "segmentation": (3, 4)}[manifest.task.kind]
    if not _static(logits) or len(logits) not in dims or logits[:2] != [spec.batch, manifest.task.classes]:
        sizes = f"{' or '.join(map(str, dims))} sizes beginning {[spec.batch, manifest.task.classes]}"
        raise wrong(f"{bundle.path}: graph {name}: output logits", sizes, str(logits))


def _compare(nodes: Any, wanted: dict[str, tuple[str, list[int] | None]], where: str) -> None:
    found = {node.name: node for node in nodes}
    if odd := sorted(set(found) ^ set(wanted)):
        raise wrong(f"{where} {odd[0]}", "the names of the manifest", "a missing one" if odd[0] in wanted else "one more")
    for name, (kind, shape) in wanted.items():
        node = found[name]
        if node.type != kind or (shape is not None and list(node.shape) != shape) or not _static(node.shape):
            raise wrong(f"{where} {name}", f"{kind} {shape if shape is not None else 'of fixed shape'}", f"{node.type} {node.shape}")


def _static(shape: Any) -> bool:
    return all(isinstance(size, int) and size > 0 for size in shape)


def wrong(where: str, expected: str, got: str) -> BundleError:
    """A graph that is not what the manifest says."""
    return BundleError(f"{where}: expected {expected}, got {got}", "export the bundle again")


def label_shape(session: Any) -> tuple[int, ...]:
    """The shape of `y` in a learn graph's session."""
    return next(tuple(node.shape) for node in session.get_inputs() if node.name == "y")


def output_shape(session: Any) -> tuple[int, ...]:
    """The shape of a session's logits."""
    return next(tuple(node.shape) for node in session.get_outputs() if node.name == "logits")
