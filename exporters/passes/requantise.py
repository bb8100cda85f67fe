"""Leaves codes alone: values that lie on a grid and are only rounded to it again, bounded, compared or pooled need not be made from their codes."""

from __future__ import annotations

import numpy as np

from edgeadapt.exporters.ir import Graph, Node
from edgeadapt.exporters.quantise.operators import CODES


def cut_codes(graph: Graph) -> bool:
    """What is cut from values along the batch is cut from their codes: the values of one piece at a time exist."""
    makers = made_of_codes(graph)

    def sliced(node: Node) -> list[Node] | None:
        maker = makers.get(node.inputs[0]) if node.op == "Slice" else None
        axes = graph.constants.get(node.inputs[3]) if maker is not None and len(node.inputs) > 3 else None
        if maker is None or axes is None or axes.tolist() != [0] or node.outputs[0] in graph.outputs:
            return None
        if maker.attributes.get("axis") == 0:  # each row has a scale of its own
            return None
        return _of_codes(graph, node, maker)

    return graph.rewrite(sliced)


def _of_codes(graph: Graph, node: Node, maker: Node) -> list[Node]:
    """A node that only picks from its first input, picking from the codes which that is made from, and what makes its values of them."""
    codes = graph.declare(graph.fresh(node.op.lower()), graph.values[node.outputs[0]].shape, graph.values[maker.inputs[0]].dtype)
    picked = graph.stands_for(node, Node(node.op, [maker.inputs[0], *node.inputs[1:]], [codes.name], node.attributes, node.module))
    return [picked, Node("DequantizeLinear", [codes.name, *maker.inputs[1:]], node.outputs, dict(maker.attributes), node.module)]


def make_late(graph: Graph) -> bool:
    """What a backward pass reads of the forward one's values is made from their codes again, so that between the two only codes are kept.

    For the last pass: equal nodes are merged by others.
    """
    early = {out for node in graph.nodes if not graph.late(node) for out in node.outputs}
    makers = {name: node for name, node in made_of_codes(graph).items() if name in early}
    late: dict[str, str] = {}
    nodes: list[Node] = []
    for node in graph.nodes:
        if graph.late(node):
            for name in (name for name in node.inputs if name in makers and name not in late):
                maker, value = makers[name], graph.values[name]
                late[name] = graph.declare(graph.fresh("late"), value.shape, value.dtype).name
                nodes.append(Node(maker.op, list(maker.inputs), [late[name]], dict(maker.attributes), maker.module))
            node.inputs = [late.get(name, name) for name in node.inputs]
        nodes.append(node)
    graph.nodes = nodes
    return bool(late)


def made_of_codes(graph: Graph) -> dict[str, Node]:
    """The nodes that make values from codes, by these values."""
    return {node.outputs[0]: node for node in graph.nodes if node.op == "DequantizeLinear" and node.inputs[0] not in graph.constants}


def _replace(graph: Graph, renamed: dict[str, str]) -> bool:
    """Has the values that are keys no longer made, and their readers read others."""

    def last(name: str) -> str:
        while name in renamed:
            name = renamed[name]
        return name

    if renamed:
        graph.nodes = [node for node in graph.nodes if node.outputs[0] not in renamed]
        for node in graph.nodes:
            node.inputs = [last(name) for name in node.inputs]
    return bool(renamed)


def skip_roundings(graph: Graph) -> bool:
    """Values rounded to the grid that they were made on are the codes they were made from."""
    makers, renamed = made_of_codes(graph), {}
    for node in graph.nodes:
        maker = makers.get(node.inputs[0]) if node.op == "QuantizeLinear" else None
        if maker is None or node.inputs[1:] != maker.inputs[1:] or node.outputs[0] in graph.outputs:
            continue
        if node.attributes.get("axis") == maker.attributes.get("axis"):
            renamed[node.outputs[0]] = maker.inputs[0]
    return _replace(graph, renamed)


def join_units(graph: Graph) -> bool:
    """Whole numbers of a byte that are cast and multiplied by a unit a row are made into values at once, without a tensor between."""
    makers = {out: node for node in graph.nodes for out in node.outputs if node.op == "Cast"}

    def joined(node: Node) -> list[Node] | None:
        maker = makers.get(node.inputs[0]) if node.op == "Mul" else None
        if maker is None:
            return None
        held, unit, out = graph.values[maker.inputs[0]], graph.values[node.inputs[1]], graph.values[node.outputs[0]]
        if held.dtype != np.int8 or out.dtype != np.float32 or held.rank != 2 or held.shape != out.shape or unit.shape != (held.shape[0], 1):
            return None
        rows = graph.declare(graph.fresh("unit"), unit.shape[:1], np.float32)
        flat = Node("Reshape", [unit.name, graph.ints(rows.shape).name], [rows.name], {}, node.module)
        zeros = graph.constant(np.zeros(rows.shape, np.int8)).name
        made = Node("DequantizeLinear", [held.name, rows.name, zeros], [out.name], {"axis": 0}, node.module)
        return [graph.stands_for(node, flat), made]

    return graph.rewrite(joined)


def skip_bounds(graph: Graph) -> bool:
    """Values on a grid that begins at zero are their own ReLU, and a bound that the grid does not pass bounds nothing."""
    makers, renamed = made_of_codes(graph), {}
    for node in graph.nodes:
        maker = makers.get(node.inputs[0]) if node.op in ("Relu", "Clip") else None
        if maker is None or node.outputs[0] in graph.outputs:
            continue
        scale, zero = (graph.constants.get(name) for name in maker.inputs[1:3])
        if scale is None or zero is None or zero.any() or (scale < 0).any():
            continue
        if node.op == "Relu" or _within(graph, node, np.float32(CODES) * np.float32(scale.max())):  # as the device computes it
            renamed[node.outputs[0]] = node.inputs[0]
    return _replace(graph, renamed)


def _within(graph: Graph, node: Node, most: np.float32) -> bool:
    """Whether a Clip leaves all of 0..most as it is."""
    ends = [graph.constants.get(name) if name else None for name in (*node.inputs[1:], "", "")[:2]]
    named = [bool(name) for name in (*node.inputs[1:], "", "")[:2]]
    if any(given and end is None for given, end in zip(named, ends, strict=True)):
        return False
    low, high = ends
    return (low is None or float(low) <= 0.0) and (high is None or most <= np.float32(high))


def compare_codes(graph: Graph) -> bool:
    """What is above zero has a code above zero's."""
    makers, changed = made_of_codes(graph), False
    for node in graph.nodes:
        maker = makers.get(node.inputs[0]) if node.op == "Greater" else None
        if maker is None:
            continue
        bound, scale, zero = (graph.constants.get(name) for name in (node.inputs[1], *maker.inputs[1:3]))
        if bound is None or scale is None or zero is None or bound.any() or not (scale > 0).all() or not (zero == zero.flat[0]).all():
            continue
        node.inputs = [maker.inputs[0], graph.constant(zero.flat[0], np.uint8).name]
        changed = True
    return changed


def pool_codes(graph: Graph) -> bool:
    """The largest value has the largest code."""
    makers = made_of_codes(graph)

    def pooled(node: Node) -> list[Node] | None:
        maker = makers.get(node.inputs[0]) if node.op == "MaxPool" and len(node.outputs) == 1 else None
        scale = graph.constants.get(maker.inputs[1]) if maker is not None else None
        if maker is None or scale is None or not (scale > 0).all() or node.outputs[0] in graph.outputs:
            return None
        return _of_codes(graph, node, maker)

    return graph.rewrite(pooled)
