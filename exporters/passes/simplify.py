"""Removes work from a graph without changing what it computes."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from edgeadapt.exporters.emit import to_onnx
from edgeadapt.exporters.execution import open_session
from edgeadapt.exporters.ir import Graph, Node
from edgeadapt.exporters.passes.gradients import largest_code, mask_codes, scale_codes
from edgeadapt.exporters.passes.moments import absorb_moments
from edgeadapt.exporters.passes.pieces import in_pieces
from edgeadapt.exporters.passes.products import cut_products
from edgeadapt.exporters.passes.requantise import compare_codes, cut_codes, join_units, make_late, pool_codes, skip_bounds, skip_roundings
from edgeadapt.exporters.passes.vectors import compute_joined, join_products

FOLD_BYTES = 65536
BROADCASTING = {"Add", "Sub", "Mul", "Div", "Max", "Min", "Pow", "Greater", "Less", "GreaterOrEqual", "LessOrEqual", "Equal"}


def fold_constants(graph: Graph) -> bool:
    """Evaluate nodes whose inputs are all constant, in onnxruntime itself so that the bits are the device's.

    Only results of up to 64 KiB are kept: a folded transpose of a large weight would store it twice. Vectors that are joined are, as what reads them
    joined need not have them apart. What was quantised is left so.
    """
    known = set(graph.constants)
    folded: list[Node] = []
    for node in graph.nodes:
        ready = all(name in known for name in node.inputs if name)
        joined = node.op == "Concat" and graph.values[node.outputs[0]].rank == 1
        small = joined or all(graph.values[out].nbytes <= FOLD_BYTES for out in node.outputs)
        if ready and small and node.op != "DequantizeLinear" and not any(out in graph.outputs for out in node.outputs):
            folded.append(node)
            known.update(node.outputs)
    if not folded:
        return False
    piece = Graph("fold")
    piece.values, piece.constants, piece.nodes = graph.values, graph.constants, folded
    piece.outputs = [out for node in folded for out in node.outputs]
    results = open_session(to_onnx(piece), threads=1).run(None, {})
    for name, array in zip(piece.outputs, results, strict=True):
        graph.constants[name] = np.asarray(array)
    done = {id(node) for node in folded}
    graph.nodes = [node for node in graph.nodes if id(node) not in done]
    return True


def drop_unread(graph: Graph) -> bool:
    """Remove nodes whose outputs nothing reads."""
    needed, trimmed = set(graph.outputs), False
    kept = []
    for node in reversed(graph.nodes):
        if any(out in needed for out in node.outputs):
            needed.update(node.inputs)
            wanted = [out for position, out in enumerate(node.outputs) if not position or out in needed]
            if node.op == "MaxPool" and len(wanted) < len(node.outputs):  # the places are optional
                node = Node(node.op, node.inputs, wanted, node.attributes, node.module)
                trimmed = True
            kept.append(node)
    changed = trimmed or len(kept) != len(graph.nodes)
    graph.nodes = kept[::-1]
    return changed


def merge_equal(graph: Graph) -> bool:
    """Give equal nodes one result, and then those that read them."""
    seen: dict[object, Node] = {}
    kept: list[Node] = []
    renamed: dict[str, str] = {}
    for node in graph.nodes:
        node.inputs = [renamed.get(name, name) for name in node.inputs]
        key = (node.op, tuple(node.inputs), len(node.outputs), repr(sorted(node.attributes.items(), key=lambda item: item[0])))
        first = seen.setdefault(key, node)
        if first is node or any(out in graph.outputs for out in node.outputs):
            kept.append(node)
        else:
            renamed.update(zip(node.outputs, first.outputs, strict=True))
    graph.nodes = kept
    return bool(renamed)


def join_views(graph: Graph) -> bool:
    """A reshape of a reshape reads the original; one to the same shape disappears."""
    producer = {out: node for node in graph.nodes for out in node.outputs}
    kept: list[Node] = []
    renamed: dict[str, str] = {}
    changed = False
    for node in graph.nodes:
        node.inputs = [renamed.get(name, name) for name in node.inputs]
        if node.op == "Reshape":
            before = producer.get(node.inputs[0])
            if before is not None and before.op == "Reshape":
                node.inputs[0] = before.inputs[0]
                changed = True
            if node.outputs[0] not in graph.outputs and graph.values[node.inputs[0]].shape == graph.values[node.outputs[0]].shape:
                renamed[node.outputs[0]] = node.inputs[0]
                continue
        kept.append(node)
    graph.nodes = kept
    return changed or bool(renamed)


def absorb_transposes(graph: Graph) -> bool:
    """Matrix products read transposed matrices as they are stored."""
    producer = {out: node for node in graph.nodes for out in node.outputs}
    changed = False
    for node in graph.nodes:
        if node.op == "MatMul" and all(graph.values[name].rank == 2 for name in node.inputs):
            node.op = "Gemm"
        if node.op != "Gemm":
            continue
        for slot, flag in ((0, "transA"), (1, "transB")):
            before = producer.get(node.inputs[slot])
            if before is not None and before.op == "Transpose" and list(before.attributes["perm"]) == [1, 0]:
                node.inputs[slot] = before.inputs[0]
                node.attributes[flag] = 1 - node.attributes.get(flag, 0)
                changed = True
    return changed


def skip_expansions(graph: Graph) -> bool:
    """An elementwise operator broadcasts by itself: it reads what was expanded, where its other input has the full shape."""
    producer = {out: node for node in graph.nodes for out in node.outputs}
    changed = False
    for node in graph.nodes:
        if node.op not in BROADCASTING:
            continue
        for slot in (0, 1):
            before, other = producer.get(node.inputs[slot]), graph.values[node.inputs[1 - slot]]
            if before is None or before.op != "Expand":
                continue
            full, small = graph.values[node.outputs[0]].shape, graph.values[before.inputs[0]].shape
            if np.broadcast_shapes(small, other.shape) == full:
                node.inputs[slot] = before.inputs[0]
                changed = True
    return changed


def shrink_scalings(graph: Graph) -> bool:
    """Divide or multiply by a scalar before an expansion, not after."""
    producer = {out: node for node in graph.nodes for out in node.outputs}
    readers = graph.readers()
    nodes: list[Node] = []
    for node in graph.nodes:
        before = producer.get(node.inputs[0]) if node.op in ("Mul", "Div") and graph.values[node.inputs[1]].shape == () else None
        if before is not None and before.op == "Expand" and len(readers[before.outputs[0]]) == 1:
            inner = graph.values[before.inputs[0]]
            if math.prod(inner.shape) < math.prod(graph.values[node.outputs[0]].shape):
                scaled = graph.declare(graph.fresh(node.op.lower()), inner.shape, inner.dtype)
                nodes.append(Node(node.op, [inner.name, node.inputs[1]], [scaled.name], {}, node.module))
                node.op, node.inputs = "Expand", [scaled.name, before.inputs[1]]
        nodes.append(node)
    changed = len(nodes) != len(graph.nodes)
    graph.nodes = nodes
    return changed


PASSES: tuple[Callable[[Graph], bool], ...] = (
    drop_unread,
    absorb_moments,  # before anything of it is folded, so that constant statistics give the bits of those that move
    fold_constants,
    join_views,
    absorb_transposes,
    shrink_scalings,
    skip_expansions,
    skip_bounds,
    skip_roundings,
    join_units,
    compare_codes,
    pool_codes,
    cut_codes,
    mask_codes,
    scale_codes,
    largest_code,
    compute_joined,  # before equal nodes are one, which would have readers elsewhere
    merge_equal,
    drop_unread,
)


def simplify(graph: Graph) -> None:
    """Apply all of the above until nothing changes."""
    changed = True
    while changed:
        changed = False
        for step in PASSES:
            changed = step(graph) or changed
    join_products(graph)
    if cut_products(graph):
        drop_unread(graph)
        join_views(graph)
    if in_pieces(graph):
        drop_unread(graph)
    make_late(graph)
