"""One graph as onnxruntime optimises it for this CPU, with true shapes, in an order of ours, and without copies of weights that the bundle has.

Preparing only: it imports onnx, which the serving process never does.
"""

from __future__ import annotations

import heapq
import json
import mmap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import onnx
import onnxruntime
from onnx import TensorProto, helper

from edgeadapt.bundle import Bundle, GraphSpec
from edgeadapt.bundle.digest import sha256
from edgeadapt.bundle.onnxwire import BITS, COPY, KINDS, External
from edgeadapt.bundle.roles import STEPS
from edgeadapt.memory import Graph, Machine, Node, Plan, Tensor, best_order, fits, footprint, quantised, read
from edgeadapt.memory.graph import OWN
from edgeadapt.runtime import prepare_copies, prepare_forms, profiling, region
from edgeadapt.runtime import session as sessions
from edgeadapt.runtime.prepared import BUNDLE, INDEX, PreparedGraph, map_own

LEVELS = {"extended": "ORT_ENABLE_EXTENDED", "all": "ORT_ENABLE_ALL", "turned": "ORT_ENABLE_ALL", "light": "ORT_ENABLE_ALL"}
"""What onnxruntime is asked for, mildest first: fusions; and the blocked layout of convolutions besides, of the forms in `prepare_forms`."""


def levels(spec: GraphSpec) -> tuple[str, ...]:
    """Those that are tried: of a graph that is to save memory, what takes little for weights of its own."""
    steps = spec.role.startswith(STEPS)
    return ("extended", "light") if spec.variant else ("extended", "all", "turned") if steps else ("extended", "all")


EFFORT = 0.3
"""How much work the search for an order is worth: the one it begins with is nearly the exported graph's, which was searched with all of it."""

_UNWANTED = ["CommonSubexpressionElimination"]  # what is computed twice is so to save memory
ALIGNMENT = 64  # bytes, of tensors in a weights file
_SMALL = 1024  # initialisers of fewer bytes stay in the graph's file
_KINDS = {name: kind for kind, name in KINDS.items()}


@dataclass(frozen=True)
class Version:
    """An optimised graph in a folder of its own, laid out as an entry of the cache is.

    Attributes:
        prepared: what loads it; its region is not known yet.
        plan: of the true shapes.
        base, peak: bytes that onnxruntime told of its run: taken when loaded, and the most above that; None where it does not tell.
        exact: whether it had the counted bytes in use after every node; None where it does not tell.
        stored: bytes of its own tensors that are only copied when it is loaded, and of such copies, which go when another graph runs.
    """

    prepared: PreparedGraph
    plan: Plan
    base: int | None
    peak: int | None
    exact: bool | None
    stored: int = 0


def told(profile: profiling.Profile, plan: Plan) -> tuple[int | None, int | None, bool | None]:
    """Of a run: the bytes in use before the first node, the peak above that, and whether the plan counts the same after every node.

    Where loading it took more than any node, as the packing of large weights may, the peak is what was in use after a node. None where onnxruntime
    does not tell.
    """
    if not profile.in_use:
        return None, None, None
    loading = profile.peak == profile.first and profile.peak - profile.base > plan.peak
    peak = (max(profile.in_use) if loading else profile.peak) - profile.base
    return profile.base, peak, [held - profile.base for held in profile.in_use] == plan.after()


def optimise(bundle: Bundle, name: str, level: str, folder: Path, threads: int) -> Version:
    """Has onnxruntime optimise a graph of the bundle, and orders the result.

    The result is run nearly in the exported graph's order, to learn the true shapes. If that order keeps within what is planned it stays, else one
    of less memory is searched, and run once more to compare the count.

    Args:
        bundle: the bundle.
        name: the graph.
        level: a key of `LEVELS`.
        folder: an empty one, for the result.
        threads: of one operator.

    Raises:
        EdgeAdaptError: onnxruntime cannot load or run it.
        OSError: the folder cannot be written.
    """
    machine = Machine.here(threads)
    saved, raw = folder / "saved.onnx", folder / "saved.weights"
    form = prepare_forms.formed(bundle, name, level)
    _save(bundle, name, form.data, level, saved, raw, threads)
    model = onnx.load(str(saved), load_external_data=False)
    own = _own_weights(bundle, name, model, raw, folder / OWN)
    prepare_forms.restored(model, {key: _in_bundle(tensor) for key, tensor in form.held.items()})
    saved.unlink()
    raw.unlink(missing_ok=True)
    (folder / BUNDLE).touch()
    graph = read(model.SerializeToString())
    emitted = read(bundle.graph_bytes(name))
    _reorder(model, graph, _as_emitted(graph, emitted))
    profile = _profile(bundle, _write(model, name, level, folder, own, 0), threads)
    _learn_shapes(graph, model, profile)
    plan = Plan(graph, machine=machine)
    searched = not _within(plan, bundle.manifest.graphs[name], machine)
    if searched:
        _reorder(model, graph, best_order(graph, machine, EFFORT))
        plan = Plan(graph, machine=machine)
    _name(model, graph, emitted)
    _declare(model, graph)
    prepared = _write(model, name, level, folder, own, plan.peak)
    kept = prepare_copies.keep(bundle, prepared, threads)
    if searched or kept is not prepared:
        prepared = kept
        profile = _profile(bundle, prepared, threads)
    return Version(prepared, plan, *told(profile, plan), prepare_copies.stored(prepared))


def _within(plan: Plan, spec: GraphSpec, machine: Machine) -> bool:
    """Whether the exported graph's plan has room for this one."""
    region = footprint.stated(spec, machine.threads)
    return region > 0 and fits(plan, footprint.margined(region))


def adopt(chosen: PreparedGraph, folder: Path) -> bytes:
    """Takes a version into the entry in the making: its tensors into the one weights file, each once for all graphs. The graph as it is there.

    Raises:
        OSError: the folder cannot be written.
    """
    index = folder / INDEX
    known: dict[str, int] = json.loads(index.read_text()) if index.exists() else {}
    model = onnx.load(str(chosen.model), load_external_data=False)
    data = map_own(chosen)
    with (folder / OWN).open("ab") as file:
        for tensor in model.graph.initializer:
            if tensor.external_data and (place := _external(tensor)).location == OWN:
                piece = data[place.offset : place.offset + place.length]
                key = sha256(piece).hexdigest()
                if key not in known:
                    known[key] = append(file, piece)
                held = [(entry.key, entry.value) for entry in tensor.external_data if entry.key.startswith(COPY)]
                point(tensor, OWN, known[key], place.length)
                for entry, value in held:
                    placed = prepare_copies.moved(value, lambda at, size: _once(file, data[at : at + size], known))
                    tensor.external_data.add(key=entry, value=placed)
    index.write_text(json.dumps(known))
    adopted: bytes = model.SerializeToString()
    (folder / chosen.model.name).write_bytes(adopted)
    return adopted


def _once(file: BinaryIO, piece: memoryview, known: dict[str, int]) -> int:
    """Where a copy of weights lies in the entry; written if it is not there yet."""
    key = sha256(piece).hexdigest()
    if key not in known or known[key] % prepare_copies.PAGE:
        known[key] = prepare_copies.append(file, piece)
    return known[key]


def _write(model: onnx.ModelProto, name: str, level: str, folder: Path, own: int, peak: int) -> PreparedGraph:
    data, path = model.SerializeToString(), folder / f"{name}.onnx"
    path.write_bytes(data)
    return PreparedGraph(path, str(folder), level, len(model.graph.node), peak, peak, 0, 0, own, sha256(data).hexdigest())


def _profile(bundle: Bundle, prepared: PreparedGraph, threads: int) -> profiling.Profile:
    weights = sessions.Weights(bundle, map_own(prepared))
    graph = prepared.read(bundle.weights_size, weights.own_size)
    with region.using(region.Region()):
        chosen = sessions.options(threads)
        weights.share(sessions.shared(graph, False), chosen)
        return profiling.memory_of(graph.data, prepared.folder, threads, options=chosen)


def _save(bundle: Bundle, name: str, data: bytes, level: str, saved: Path, raw: Path, threads: int) -> None:
    """Writes what onnxruntime makes of a graph, its large initialisers to `raw`.

    Between codes and values it fuses operators that want one scale for all channels, without a look at whether there is one, and then refuses what it
    made itself (up to 1.31 at least, of sums of branches). Such a graph is optimised without these fusions.
    """
    for fused in (True, False):
        try:
            _optimised(bundle, data, level, saved, raw, threads, fused)
            return
        except Exception as reason:  # onnxruntime's own types have no common base of theirs
            if not fused or b"QuantizeLinear" not in data:
                raise sessions.failure(f"{name}: onnxruntime cannot optimise it", reason) from None


def _optimised(bundle: Bundle, data: bytes, level: str, saved: Path, raw: Path, threads: int, fused: bool) -> None:
    chosen = onnxruntime.SessionOptions()
    chosen.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, LEVELS[level])
    chosen.intra_op_num_threads, chosen.inter_op_num_threads = threads, 1
    chosen.enable_cpu_mem_arena = False
    chosen.log_severity_level = 3 if fused else 4
    chosen.optimized_model_filepath = str(saved)
    settings = {
        "session.model_external_initializers_file_folder_path": bundle.folder,
        "session.optimized_model_external_initializers_file_name": raw.name,
        "session.optimized_model_external_initializers_min_size_in_bytes": str(_SMALL),
        "session.disable_prepacking": "1",  # nothing is run
        "session.disable_quant_qdq": str(int(not fused)),
    }
    for key, value in settings.items():
        chosen.add_session_config_entry(key, value)
    onnxruntime.InferenceSession(data, chosen, providers=["CPUExecutionProvider"], disabled_optimizers=_UNWANTED)


def _own_weights(bundle: Bundle, name: str, model: onnx.ModelProto, raw: Path, weights: Path) -> int:
    """Points every external tensor at the bundle where that has its bytes, else into a new file `weights`; that file's size."""
    known = {}
    mapped = bundle.mapped()
    gone = quantised.released(read(model.SerializeToString()))  # onnxruntime maps them itself, and only files of the entry
    for tensor in bundle.graph(name).external:
        known[tensor.length, sha256(mapped[tensor.offset : tensor.offset + tensor.length]).hexdigest()] = tensor.offset
    found = [tensor for tensor in model.graph.initializer if tensor.external_data]
    with weights.open("wb") as file:
        if found:
            with raw.open("rb") as source, mmap.mmap(source.fileno(), 0, access=mmap.ACCESS_READ) as data:
                for tensor in found:
                    place = _external(tensor)
                    piece = data[place.offset : place.offset + place.length]
                    key = (len(piece), sha256(piece).hexdigest())
                    shared = place.kind in sessions.DTYPES
                    if shared and key in known and tensor.name not in gone:
                        point(tensor, BUNDLE, known[key], len(piece))
                    else:
                        point(tensor, OWN, append(file, piece), len(piece))
        return file.tell()


def _in_bundle(tensor: Any) -> Any:
    """An initialiser of the bundle's graph as a prepared one names it."""
    place = _external(tensor)
    point(tensor, BUNDLE, place.offset, place.length)
    return tensor


def append(file: BinaryIO, data: bytes | memoryview) -> int:
    """Writes a tensor's bytes at the next multiple of `ALIGNMENT`, and says where."""
    file.write(bytes(-file.tell() % ALIGNMENT))
    offset = file.tell()
    file.write(data)
    return offset


def point(tensor: Any, location: str, offset: int, length: int) -> None:
    """Makes an initialiser's data that piece of another file."""
    del tensor.external_data[:]
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", str(offset)), ("length", str(length))):
        tensor.external_data.add(key=key, value=value)


def _external(tensor: Any) -> External:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    return External(tensor.name, tensor.data_type, tuple(tensor.dims), entries["location"], int(entries["offset"]), int(entries["length"]), True)


def _learn_shapes(graph: Graph, model: onnx.ModelProto, profile: profiling.Profile) -> None:
    """Puts the shapes of a run into `graph`, whose nodes are the model's, and into the model."""
    declared = {value.name for value in (*model.graph.input, *model.graph.output)}
    del model.graph.value_info[:]
    for index, shapes, types in zip(profile.nodes, profile.shapes, profile.types):
        names = [name for name in graph.nodes[index].outputs if name]
        for name, shape, kind in zip(names, shapes, types):
            graph.values[name] = Tensor(shape, BITS[_KINDS[kind]], _KINDS[kind])
            if name not in declared:
                model.graph.value_info.append(helper.make_tensor_value_info(name, _KINDS[kind], shape))


def _declare(model: onnx.ModelProto, graph: Graph) -> None:
    """The model's declared shapes in the order of its nodes, so that equal graphs give equal files."""
    places = {out: index for index, node in enumerate(graph.nodes) for out in node.outputs}
    ordered = sorted(model.graph.value_info, key=lambda value: (places.get(value.name, -1), value.name))
    del model.graph.value_info[:]
    model.graph.value_info.extend(ordered)


def _reorder(model: onnx.ModelProto, graph: Graph, order: list[int]) -> None:
    """Puts the nodes of both into the order."""
    nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes[index] for index in order)
    graph.nodes[:] = [graph.nodes[index] for index in order]


def _as_emitted(graph: Graph, emitted: Graph) -> list[int]:
    """The order that is nearest the emitted graph's: that of the nodes that were there before, and others just before they are needed."""
    place = {node.name: index for index, node in enumerate(emitted.nodes)}
    readers: dict[str, list[int]] = {}
    for index, node in enumerate(graph.nodes):
        for name in node.inputs:
            readers.setdefault(name, []).append(index)
    makers = {out: index for index, node in enumerate(graph.nodes) for out in node.outputs if out}
    old = _old_names(graph, emitted)
    rank: dict[int, int] = {}
    for index in reversed(_sorted(graph, makers, list(range(len(graph.nodes))))):
        following = [rank[reader] for out in graph.nodes[index].outputs for reader in readers.get(out, ())]
        rank[index] = place[old[index]] if old[index] else min(following, default=len(place))
    return _sorted(graph, makers, [rank[index] for index in range(len(graph.nodes))])


def _sorted(graph: Graph, makers: Mapping[str, int], rank: list[int]) -> list[int]:
    """Nodes by rank, but none before what it needs."""
    waits = [{makers[name] for name in node.inputs if name in makers} for node in graph.nodes]
    followers: list[list[int]] = [[] for _ in graph.nodes]
    for index, sources in enumerate(waits):
        for source in sources:
            followers[source].append(index)
    left = [len(sources) for sources in waits]
    heap = [(rank[index], index) for index, count in enumerate(left) if not count]
    heapq.heapify(heap)
    order = []
    while heap:
        _, index = heapq.heappop(heap)
        order.append(index)
        for follower in followers[index]:
            left[follower] -= 1
            if not left[follower]:
                heapq.heappush(heap, (rank[follower], follower))
    return order


def _old_names(graph: Graph, emitted: Graph) -> list[str]:
    """Of each node, the name of the emitted one that it is or was made from; "" where there is none."""
    names = {node.name for node in emitted.nodes}
    makers = {out: node.name for node in emitted.nodes for out in node.outputs}
    return [next((makers.get(name, name) for name in _traces(node) if name in names or name in makers), "") for node in graph.nodes]


def _traces(node: Node) -> Iterator[str]:
    yield node.name
    yield node.name.partition("/")[0]
    yield from (name for name in node.outputs if name)
    yield node.name.removesuffix("_nchwc")


def _name(model: onnx.ModelProto, graph: Graph, emitted: Graph) -> None:
    """Gives nodes that onnxruntime made the names of those that they stand for or that feed them, so that the user's modules are still known."""
    old = _old_names(graph, emitted)
    makers = {out: index for index, node in enumerate(graph.nodes) for out in node.outputs if out}
    times: dict[str, int] = {}
    for target, node, name in zip(model.graph.node, graph.nodes, old):
        name = name or next((old[makers[source]] for source in node.inputs if source in makers), "")
        count = times[name] = times.get(name, 0) + 1
        index, mark, module = name.partition(":")
        node.name = target.name = name if name and count == 1 else f"{index}.{count}{mark}{module}"  # onnxruntime wants every name once
