"""Gradients in codes: what a mask and factors for each channel do to values made from codes, they can do to the codes and to their scale."""

from __future__ import annotations

import numpy as np

from edgeadapt.exporters.ir import Graph, Node, Value
from edgeadapt.exporters.passes.requantise import made_of_codes


def _alone(graph: Graph) -> dict[str, Node]:
    """The nodes that make values from codes which one node alone reads, by these values."""
    readers = graph.readers()
    return {
        node.outputs[0]: node
        for node in graph.nodes
        if node.op == "DequantizeLinear" and len(readers.get(node.outputs[0], ())) == 1 and node.outputs[0] not in graph.outputs
    }


def mask_codes(graph: Graph) -> bool:
    """Values that a mask leaves or makes zero: so the mask leaves their codes, or makes them zero's. A byte is moved where four were, twice."""
    makers, casts = _alone(graph), {node.outputs[0]: node for node in graph.nodes if node.op == "Cast"}

    def masked(node: Node) -> list[Node] | None:
        found = _masked(graph, node, makers, casts) if node.op == "Mul" else None
        if found is None:
            return None
        maker, mask, zero = found
        value = graph.values[maker.inputs[0]]
        codes = graph.declare(graph.fresh("where"), value.shape, value.dtype)
        chosen = graph.stands_for(node, Node("Where", [mask, maker.inputs[0], zero.name], [codes.name], {}, node.module))
        return [chosen, Node("DequantizeLinear", [codes.name, *maker.inputs[1:]], node.outputs, dict(maker.attributes), node.module)]

    return graph.rewrite(masked)


def _masked(graph: Graph, node: Node, makers: dict[str, Node], casts: dict[str, Node]) -> tuple[Node, str, Value] | None:
    """What makes the values, the mask, and the code of zero, if a product is one of values made from codes with truth values."""
    for slot in (0, 1):
        maker, cast = makers.get(node.inputs[slot]), casts.get(node.inputs[1 - slot])
        zero = graph.constants.get(maker.inputs[2]) if maker is not None and len(maker.inputs) > 2 else None
        if maker is None or cast is None or zero is None or maker.inputs[0] in graph.constants or not (zero == zero.flat[0]).all():
            continue
        mask = graph.values[cast.inputs[0]]
        if mask.dtype == np.bool_ and mask.shape == graph.values[node.outputs[0]].shape == graph.values[maker.outputs[0]].shape:
            return maker, mask.name, graph.constant(zero.flat[0], zero.dtype)
    return None


def scale_codes(graph: Graph) -> bool:
    """Values times a factor for each channel: the same codes of another scale."""
    makers = _alone(graph)
    reshapes = {node.outputs[0]: node for node in graph.nodes if node.op == "Reshape"}

    def scaled(node: Node) -> list[Node] | None:
        found = _scaled(graph, node, makers, reshapes) if node.op == "Mul" else None
        if found is None:
            return None
        maker, factor, zero = found
        product = graph.declare(graph.fresh("mul"), factor.shape, factor.dtype)
        scale = graph.stands_for(node, Node("Mul", [maker.inputs[1], factor.name], [product.name], {}, node.module))
        zeros = graph.constant(np.full(factor.shape, zero))
        return [scale, Node("DequantizeLinear", [maker.inputs[0], product.name, zeros.name], node.outputs, {"axis": 1}, node.module)]

    return graph.rewrite(scaled)


def _scaled(graph: Graph, node: Node, makers: dict[str, Node], reshapes: dict[str, Node]) -> tuple[Node, Value, np.uint8] | None:
    """What makes the values, the factors (C,), and the code of zero."""
    for slot in (0, 1):
        maker, factor = makers.get(node.inputs[slot]), graph.values[node.inputs[1 - slot]]
        zero = graph.constants.get(maker.inputs[2]) if maker is not None and len(maker.inputs) > 2 else None
        if maker is None or zero is None or maker.inputs[0] in graph.constants or not (zero == zero.flat[0]).all():
            continue
        shape, vector = graph.values[node.outputs[0]].shape, reshapes.get(factor.name)
        flat = graph.values[vector.inputs[0]] if vector is not None else None
        if flat is None or len(shape) < 3 or flat.shape != (shape[1],) or factor.shape != (1, shape[1], *[1] * (len(shape) - 2)):
            continue
        if maker.attributes.get("axis", 1) == 1:
            return maker, flat, zero.flat[0]
    return None


def largest_code(graph: Graph) -> bool:
    """The largest magnitude of values made from codes is that of the largest code or of the smallest, whatever the sign of their scale."""
    makers = made_of_codes(graph)
    producers = {out: node for node in graph.nodes for out in node.outputs}

    def found(node: Node) -> list[Node] | None:
        ends = _ends(node, producers) if node.op == "Max" else None
        maker = makers.get(ends[0].inputs[0]) if ends is not None else None
        if ends is None or maker is None or not _of_channels(graph, ends[0], maker):
            return None
        made: list[Node] = []
        magnitudes = []
        for end in ends:
            value = graph.values[end.outputs[0]]
            code = graph.declare(graph.fresh("code"), value.shape, graph.values[maker.inputs[0]].dtype)
            end_value, magnitude = (graph.declare(graph.fresh("end"), value.shape, value.dtype) for _ in range(2))
            made.append(Node(end.op, [maker.inputs[0], *end.inputs[1:]], [code.name], dict(end.attributes), end.module))
            made.append(Node("DequantizeLinear", [code.name, *maker.inputs[1:]], [end_value.name], {"axis": 0}, end.module))
            made.append(Node("Abs", [end_value.name], [magnitude.name], {}, end.module))
            magnitudes.append(magnitude.name)
        return [*(graph.stands_for(node, item) for item in made), Node("Max", magnitudes, node.outputs, {}, node.module)]

    return graph.rewrite(found)


def _ends(node: Node, producers: dict[str, Node]) -> tuple[Node, Node] | None:
    """The two reductions of one tensor in Max(ReduceMax(x), Neg(ReduceMin(x)))."""
    if len(node.inputs) != 2:
        return None
    highest, negated = (producers.get(name) for name in node.inputs)
    lowest = producers.get(negated.inputs[0]) if negated is not None and negated.op == "Neg" else None
    if highest is None or lowest is None or (highest.op, lowest.op) != ("ReduceMax", "ReduceMin"):
        return None
    return (highest, lowest) if highest.inputs == lowest.inputs and highest.attributes == lowest.attributes else None


def _of_channels(graph: Graph, reduction: Node, maker: Node) -> bool:
    """Whether one number a channel is left, as many as the grid has scales."""
    shape, out = graph.values[reduction.inputs[0]].shape, graph.values[reduction.outputs[0]].shape
    axes = graph.constants.get(reduction.inputs[1]) if len(reduction.inputs) > 1 else None
    every = axes is not None and sorted(axes.tolist()) == [axis for axis in range(len(shape)) if axis != 1]
    return every and out == (shape[1],) and graph.values[maker.inputs[1]].shape in ((), out) and maker.attributes.get("axis", 1) == 1
