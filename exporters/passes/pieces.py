"""Large float32 tensors between codes are made a piece of the batch at a time.

Two patterns are rewritten, to the same bits but for sums over the batch, which add up in another order: statistics of values made from codes, and
chains of elementwise operators from codes to codes. Only the codes exist whole; a piece of float32 stays in the processor's cache.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from edgeadapt.exporters.ir import Graph, Node, Value
from edgeadapt.exporters.stretches import stretches

PIECE = 2**21
"""Bytes of float32 made at once, at most. Smaller pieces are little faster, and each costs nodes, of which a session holds some 4.5 KB each."""

MOST = 16
"""Pieces at most: beside codes as large as four of them, larger pieces weigh little."""

LOCAL = {"DequantizeLinear", "BatchNormalization", "Relu", "Clip", "Add", "Sub", "Mul", "QuantizeLinear"}
"""Operators that treat each sample of a batch by itself, where their other inputs are the same for all."""


def batch_pieces(value: Value) -> list[int]:
    """Samples in each of the pieces that a tensor's batch is cut into, as equal as can be; one piece: it is not cut."""
    size = value.nbytes if value.dtype == np.float32 else 4 * value.nbytes
    return [end - begin for begin, end in stretches(value.shape[0], size, PIECE, MOST)]


@dataclass
class _Chain:
    """Nodes from codes to codes: `nodes` in order, the last one a QuantizeLinear; `codes` are the whole tensors that they begin with."""

    nodes: list[Node] = field(default_factory=list)
    codes: list[str] = field(default_factory=list)


def _chain(graph: Graph, end: Node, makers: dict[str, Node], readers: dict[str, list[int]]) -> _Chain | None:
    """What leads to an end from codes alone, through tensors that nothing else reads; None if there is no such."""
    shape = graph.values[end.outputs[0]].shape
    found = _Chain()
    stack, seen = [end], {id(end)}
    while stack:
        node = stack.pop()
        found.nodes.append(node)
        for name in filter(None, node.inputs):
            value = graph.values[name]
            if value.shape != shape:
                if len(value.shape) == len(shape) and value.shape[0] != 1:
                    return None  # something of each sample's own
                continue
            if value.dtype == np.uint8:
                if name not in found.codes:
                    found.codes.append(name)
                continue
            maker = makers.get(name)
            if maker is None or maker.op not in LOCAL or graph.late(maker) != graph.late(end):
                return None
            if maker.op != "DequantizeLinear" and (len(readers.get(name, ())) != 1 or name in graph.outputs):
                return None
            if id(maker) not in seen:
                seen.add(id(maker))
                stack.append(maker)
    order = {id(node): index for index, node in enumerate(graph.nodes)}
    found.nodes.sort(key=lambda node: order[id(node)])
    return found if len(found.nodes) > 2 and found.codes else None


def map_in_pieces(graph: Graph) -> bool:
    """Elementwise chains from codes to codes, a piece of the batch at a time."""
    makers = {out: node for node in graph.nodes for out in node.outputs}
    readers = graph.readers()
    replaced: dict[int, list[Node]] = {}
    gone: set[int] = set()
    for end in graph.nodes:
        value = graph.values[end.outputs[0]]
        sizes = batch_pieces(value) if end.op == "QuantizeLinear" and len(value.shape) > 2 else []
        chain = _chain(graph, end, makers, readers) if len(sizes) > 1 and end.outputs[0] not in graph.outputs else None
        if chain is not None:
            replaced[id(end)] = _in_pieces(graph, chain, end, sizes)
            gone |= {id(node) for node in chain.nodes if node.op != "DequantizeLinear"}  # others may read those
    if gone:
        graph.nodes = [new for node in graph.nodes for new in (replaced.get(id(node), []) if id(node) in gone else [node])]
    return bool(gone)


def _in_pieces(graph: Graph, chain: _Chain, end: Node, sizes: list[int]) -> list[Node]:
    value, early = graph.values[end.outputs[0]], not graph.late(end)
    made: list[Node] = []
    parts = []
    for start, size in _starts(sizes):
        renamed = {name: _slice(graph, name, start, size, end, made) for name in chain.codes}
        shape = (size, *value.shape[1:])
        for node in chain.nodes:
            out = graph.values[node.outputs[0]]
            renamed[out.name] = graph.declare(graph.fresh("piece"), shape, out.dtype).name
            made.append(Node(node.op, [renamed.get(name, name) for name in node.inputs], [renamed[out.name]], dict(node.attributes), node.module))
        parts.append(renamed[end.outputs[0]])
    made.append(Node("Concat", parts, list(end.outputs), {"axis": 0}, end.module))
    if early:
        graph.in_forward(made)
    return made


def _starts(sizes: list[int]) -> list[tuple[int, int]]:
    """Where each piece begins, and its size."""
    return [(sum(sizes[:index]), size) for index, size in enumerate(sizes)]


def _slice(graph: Graph, codes: str, start: int, size: int, end: Node, made: list[Node]) -> str:
    """A piece of codes, for what `end` ends; its node is put on `made`."""
    value = graph.values[codes]
    piece = graph.declare(graph.fresh("slice"), (size, *value.shape[1:]), value.dtype)
    bounds = [graph.ints([number]).name for number in (start, start + size, 0)]
    made.append(Node("Slice", [codes, *bounds], [piece.name], {}, end.module))
    return piece.name


def reduce_in_pieces(graph: Graph) -> bool:
    """Means over the batch of values made from codes, or of their squares, as means of pieces."""
    makers = {out: node for node in graph.nodes for out in node.outputs}

    def cut(node: Node) -> list[Node] | None:
        found = _mean(graph, node, makers) if node.op == "ReduceMean" else None
        return None if found is None else _means(graph, node, *found)

    return graph.rewrite(cut)


def _mean(graph: Graph, node: Node, makers: dict[str, Node]) -> tuple[Node, bool, list[int]] | None:
    """What makes the values, whether it is their squares that are averaged, and the sizes of the pieces."""
    axes = graph.constants.get(node.inputs[1]) if len(node.inputs) > 1 else None
    if axes is None or 0 not in axes.tolist() or node.outputs[0] in graph.outputs:
        return None
    maker, squared = makers.get(node.inputs[0]), False
    if maker is not None and maker.op == "Mul" and maker.inputs[0] == maker.inputs[1]:
        maker, squared = makers.get(maker.inputs[0]), True
    if maker is None or maker.op != "DequantizeLinear" or maker.inputs[0] in graph.constants:
        return None
    sizes = batch_pieces(graph.values[maker.outputs[0]])
    return (maker, squared, sizes) if len(sizes) > 1 else None


def _means(graph: Graph, node: Node, maker: Node, squared: bool, sizes: list[int]) -> list[Node]:
    codes, early = graph.values[maker.inputs[0]], not graph.late(node)
    axes = set(graph.constants[node.inputs[1]].tolist())
    kept = tuple(1 if {axis, axis - len(codes.shape)} & axes else size for axis, size in enumerate(codes.shape))
    made: list[Node] = []
    parts = []
    for start, size in _starts(sizes):
        shape = (size, *codes.shape[1:])
        piece, values = _slice(graph, codes.name, start, size, node, made), graph.declare(graph.fresh("piece"), shape, np.float32)
        made.append(Node("DequantizeLinear", [piece, *maker.inputs[1:]], [values.name], dict(maker.attributes), node.module))
        if squared:
            square = graph.declare(graph.fresh("piece"), shape, np.float32)
            made.append(Node("Mul", [values.name, values.name], [square.name], {}, node.module))
            values = square
        part = graph.declare(graph.fresh("mean"), kept, np.float32)
        made.append(Node("ReduceMean", [values.name, node.inputs[1]], [part.name], {**node.attributes, "keepdims": 1}, node.module))
        parts.append(part.name)
    joined = graph.declare(graph.fresh("means"), (len(sizes), *kept[1:]), np.float32)
    made.append(Node("Concat", parts, [joined.name], {"axis": 0}, node.module))
    if len(set(sizes)) > 1:  # a piece counts by its samples
        shares = np.array(sizes, np.float32).reshape(-1, *(1 for _ in kept[1:])) * np.float32(len(sizes) / sum(sizes))
        weighted = graph.declare(graph.fresh("means"), joined.shape, np.float32)
        made.append(Node("Mul", [joined.name, graph.constant(shares).name], [weighted.name], {}, node.module))
        joined = weighted
    made.append(Node("ReduceMean", [joined.name, node.inputs[1]], list(node.outputs), dict(node.attributes), node.module))
    if early:
        graph.in_forward(made)
    return made
