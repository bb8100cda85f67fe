"""onnxruntime as edgeadapt wants it: our order of nodes, our memory, the frozen weights mapped out of the bundle."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from edgeadapt.bundle import Bundle, Graph
from edgeadapt.bundle.onnxwire import External, without_declarations
from edgeadapt.bundle.reading import shortened
from edgeadapt.errors import BudgetError, BundleError, EdgeAdaptError
from edgeadapt.memory import Machine, quantised
from edgeadapt.memory.graph import OWN, read
from edgeadapt.memory.rules import misplaced_sums
from edgeadapt.runtime import providers, region
from edgeadapt.runtime.eightbit import saturates
from edgeadapt.runtime.prepared import LOG, Prepared, PreparedGraph

_M_MMAP_THRESHOLD = -3
DTYPES = {1: "<f4", 2: "u1", 3: "i1", 4: "<u2", 5: "<i2", 6: "<i4", 7: "<i8", 9: "?", 10: "<f2", 11: "<f8", 12: "<u4", 13: "<u8"}
"""numpy's name of each TensorProto.DataType that it has."""

_TENSORS = {"float32": "tensor(float)", **{kind: f"tensor({kind})" for kind in ("int8", "uint8", "int16", "int64")}}


_SHORT = ("Available memory of", "Failed to allocate memory", "std::bad_alloc")
"""What onnxruntime says where memory is short."""


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
BIAS_LEFT_OUT = tuple(int(part) for part in VERSION.split(".")[:2]) < (1, 31)
"""Whether this onnxruntime may leave out what a convolution of bytes is to add: see `quantised.bias_left_out`."""


def options(threads: int) -> Any:
    """Session options: nodes run in file order on the graph as emitted, in the process's region, without the planner's own reuse.

    Under `region.LOCK` until the session is made.
    """
    result = onnxruntime.SessionOptions()
    result.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    result.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED
    result.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    result.intra_op_num_threads = threads
    result.inter_op_num_threads = 1
    region.apply(result)
    result.enable_mem_pattern = False
    if hasattr(result, "enable_mem_reuse"):
        result.enable_mem_reuse = False
    result.add_session_config_entry("session.disable_quant_qdq", "1")  # else each reader of what was made floats gets floats of its own, even so
    result.log_severity_level = 4  # what fails is raised, with its text
    return result


class Weights:
    """A bundle's frozen weights, and those of what was prepared from it, mapped once and shared by all sessions of the process.

    onnxruntime would map external data too, but anew for every session, and the operating system counts the pages of each mapping: on a
    bundle with 21 MB of weights every further session took 20.5 MB more resident memory, and takes 0.5 MB this way.

    Args:
        bundle: the bundle.
        own: the mapped weights file of prepared graphs.
    """

    def __init__(self, bundle: Bundle, own: memoryview | None = None) -> None:
        self._files = {OWN: memoryview(b"") if own is None else own}
        self._bundle = bundle.mapped()
        self._values: dict[tuple[bool, int, int, tuple[int, ...]], Any] = {}

    @property
    def own_size(self) -> int:
        """Bytes of the weights file of prepared graphs."""
        return len(self._files[OWN])

    def share(self, external: Iterable[External], chosen: Any) -> None:
        """Has a session with the options `chosen` take a graph's large tensors from here.

        Tensors of subgraphs, and of types that numpy does not have, are left to onnxruntime's own mapping.
        """
        for tensor in external:
            dtype = DTYPES.get(tensor.kind)
            if dtype is None or not tensor.outer or not tensor.length:
                continue
            own = tensor.location in self._files
            key = (own, tensor.offset, tensor.kind, tensor.shape)
            if key not in self._values:
                file = self._files.get(tensor.location, self._bundle)
                part = np.frombuffer(file[tensor.offset : tensor.offset + tensor.length], dtype).reshape(tensor.shape)
                self._values[key] = onnxruntime.OrtValue.ortvalue_from_numpy(part)  # a view, which it keeps alive
            chosen.add_initializer(tensor.name, self._values[key])


class Unprepared(BundleError):
    """What was prepared cannot be loaded any more, and a plan was made for it."""


def usable(bundle: Bundle, prepared: Prepared | None, planned: bool = False) -> tuple[dict[str, PreparedGraph], memoryview | None]:
    """The graphs to run instead of the exported ones, and their weights; none where the weights have gone since they were checked.

    Args:
        bundle: the bundle.
        prepared: what was found.
        planned: a plan needs them.

    Raises:
        Unprepared: with `planned`, they have gone.
    """
    if prepared is None:
        return {}, None
    try:
        return dict(prepared.graphs), prepared.mapped()
    except BundleError as reason:
        if planned:
            raise Unprepared(reason.message, reason.hint) from None
        LOG.warning("%s runs as exported: %s", bundle.path.name, reason.message)
        return {}, None


def load(
    bundle: Bundle,
    name: str,
    threads: int,
    weights: Weights,
    prepared: PreparedGraph | None = None,
    planned: bool = False,
    limit: int | None = None,
) -> Any:
    """A session of one of the bundle's graphs, checked against what the manifest says of its inputs and outputs.

    Args:
        bundle: the bundle.
        name: the graph.
        threads: of one operator.
        weights: they must outlive the session.
        prepared: what to load instead of the graph as exported; if that cannot be loaded, a line in the log says so and the graph is.
        planned: a plan was made for what was prepared, so nothing else may take its place.
        limit: on a GPU, of what the session may take of its memory, 0 for no limit; None: on the CPU.

    Raises:
        BundleError: the graph is damaged, contradicts the manifest, or this onnxruntime cannot load it.
        Unprepared: with `planned`, what was prepared cannot be loaded.
        EdgeAdaptError: the GPU's provider does not start.
    """
    if prepared is not None:
        try:
            return open_graph(bundle, name, threads, weights, prepared)
        except EdgeAdaptError as reason:
            if planned:
                raise Unprepared(reason.message, reason.hint) from None
            LOG.warning("%s: graph %s runs as exported: %s", bundle.path.name, name, reason.message)
    return open_graph(bundle, name, threads, weights, None, limit)


def open_graph(bundle: Bundle, name: str, threads: int, weights: Weights, prepared: PreparedGraph | None, limit: int | None = None) -> Any:
    """As `load`, but what cannot be loaded is not replaced by anything else.

    Raises:
        EdgeAdaptError: the graph is damaged or cannot be loaded.
    """
    if prepared is None:
        return _open(bundle, name, threads, weights, bundle.graph(name), bundle.folder, limit)
    return _open(bundle, name, threads, weights, prepared.read(bundle.weights_size, weights.own_size), prepared.folder, limit)


def _open(bundle: Bundle, name: str, threads: int, weights: Weights, graph: Graph, folder: str, limit: int | None) -> Any:
    with region.LOCK:
        chosen = options(threads)
        chosen.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
        if limit is None:  # on a GPU, onnxruntime copies them there itself
            _complete(graph, threads, bundle.path, name)
        try:
            if limit is None:
                weights.share(shared(graph, folder == bundle.folder), chosen)
            session = onnxruntime.InferenceSession(without_declarations(graph.data), chosen, **providers.arguments(limit))
        except Exception as reason:  # onnxruntime's own types have no common base of theirs
            raise failure(f"{bundle.path}: onnxruntime {VERSION} cannot load graph {name}", reason) from None
    if limit is not None:
        providers.checked(session, f"graph {name}")
    spec = bundle.manifest.graphs[name]
    if spec.sums and spec.batch and (odd := misplaced_sums(read(graph.data), spec.sums)):
        raise wrong(f"{bundle.path}: graph {name}", f"sum {odd[0]} added to in place", "a graph that reads or makes it otherwise")
    _check(session, bundle, name)
    return session


def shared(graph: Graph, exported: bool) -> Iterable[External]:
    """The tensors of a graph, exported or prepared, that a session takes from `Weights`: those that are read while it runs.

    8-bit weights that are only read to be copied in another layout are left to onnxruntime, which maps them, copies them, and lets go of the mapping:
    in ours their pages would stay resident beside the copies. A prepared graph finds those that are not the bundle's only.
    """
    if not region.prepacks() or not quantised.present(graph.data):
        return graph.external
    gone = quantised.released(read(graph.data))
    return [tensor for tensor in graph.external if tensor.name not in gone or (not exported and tensor.location != OWN)]


@cache
def _tell_of_saturation(path: Path) -> None:
    """Once for a bundle."""
    what = "computes in 8 bits, and on this processor (x86-64 without VNNI) pairs of products end at 16 bits"
    LOG.warning("%s %s: a few answers differ from those that it was checked with; on Arm and with VNNI they do not", path, what)


def _complete(graph: Graph, threads: int, path: Path, name: str) -> None:
    """Refuses a graph of which this onnxruntime would compute something else, and tells where this processor does in a few places."""
    if not quantised.present(graph.data):
        return
    if saturates():
        _tell_of_saturation(path)
    if not BIAS_LEFT_OUT:
        return
    if wrong_ones := quantised.bias_left_out(read(graph.data), Machine.here(threads, region.prepacks())):
        raise BundleError(
            f"{path}: graph {name}: onnxruntime {VERSION} would leave out the bias of {len(wrong_ones)} convolutions on bytes, "
            f"of {wrong_ones[0]!r} first",
            "install onnxruntime 1.31 or newer",
        )


def failure(what: str, reason: Exception) -> EdgeAdaptError:
    """onnxruntime's exception as ours: memory that is not there is the budget's affair, anything else the bundle's."""
    whole, text = str(reason), shortened(str(reason))
    if any(sign in whole for sign in _SHORT) or isinstance(reason, MemoryError):
        return BudgetError(f"{what}: there is not enough memory ({text})", "raise the budget, or export with a smaller batch")
    return BundleError(f"{what}: {text}", "export the bundle with this edgeadapt, or install a newer onnxruntime")


def _check(session: Any, bundle: Bundle, name: str) -> None:
    manifest, spec = bundle.manifest, bundle.manifest.graphs[name]
    held = {state.name: (_TENSORS[state.dtype], list(state.shape)) for state in manifest.state}
    kept = [item for item in manifest.sums if item.name in spec.sums]
    sums, added = ({f"{way}.{item.name}": ("tensor(float)", list(item.shape)) for item in kept} for way in ("sum", "added"))
    wanted: dict[str, tuple[str, list[int] | None]] = {} if not spec.batch else {"x": ("tensor(float)", [spec.batch, *manifest.input.shape])}
    if spec.batch and spec.role.startswith("learn"):
        wanted["y"] = ("tensor(int64)", None)
    wanted |= {f"hyper.{key}": ("tensor(float)", []) for key in spec.hyper}
    wanted |= {f"state.{key}": held[key] for key in spec.reads}
    wanted |= sums
    _compare(session.get_inputs(), wanted, f"{bundle.path}: graph {name}: input")
    wanted = {"logits": ("tensor(float)", None), **added} if spec.batch else {}
    wanted |= {f"metric.{key}": ("tensor(float)", []) for key in spec.metrics}
    wanted |= {f"new.{key}": held[key] for key in spec.writes}
    _compare(session.get_outputs(), wanted, f"{bundle.path}: graph {name}: output")
    if not spec.batch:
        return
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
    return BundleError(f"{shortened(where)}: expected {shortened(expected)}, got {shortened(got)}", "export the bundle again")


def label_shape(session: Any) -> tuple[int, ...]:
    """The shape of `y` in a learn graph's session."""
    return next(tuple(node.shape) for node in session.get_inputs() if node.name == "y")


def output_shape(session: Any) -> tuple[int, ...]:
    """The shape of a session's logits."""
    return next(tuple(node.shape) for node in session.get_outputs() if node.name == "logits")
