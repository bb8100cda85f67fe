"""Vectors of many layers are computed together: of what a session holds, a node's structures are often more than such a vector."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from edgeadapt.exporters.ir import MANY, Graph, Node, joinable

ELEMENTWISE = ("Add", "Sub", "Mul")


def join_products(graph: Graph) -> bool:
    """Products of one number with many vectors that the caller gives are one product, of the vectors joined, taken apart again."""
    groups: dict[tuple[str, bool], list[tuple[Node, str]]] = {}
    for node in graph.nodes:
        vector = _scaled_input(graph, node)
        if vector:
            factor = node.inputs[1 - node.inputs.index(vector)]
            groups.setdefault((factor, graph.late(node)), []).append((node, vector))
    joined = {id(members[0][0]): (factor, members) for (factor, _), members in groups.items() if len(members) >= MANY}
    gone = {id(node) for _, members in joined.values() for node, _ in members}
    nodes: list[Node] = []
    for node in graph.nodes:
        if id(node) in joined:
            nodes += _joined(graph, *joined[id(node)])
        elif id(node) not in gone:
            nodes.append(node)
    graph.nodes = nodes
    return bool(joined)


def _scaled_input(graph: Graph, node: Node) -> str:
    """The vector among the inputs of the graph that a node multiplies by one number; "" if it does something else."""
    if node.op != "Mul" or node.outputs[0] in graph.outputs:
        return ""
    for vector, factor in (node.inputs, node.inputs[::-1]):
        value = graph.values[vector]
        if vector in graph.inputs and len(value.shape) == 1 and value.dtype == np.float32 and graph.values[factor].shape == ():
            return vector
    return ""


def _joined(graph: Graph, factor: str, members: list[tuple[Node, str]]) -> list[Node]:
    sizes = [graph.values[vector].shape[0] for _, vector in members]
    whole, product = (graph.declare(graph.fresh(stem), (sum(sizes),), np.float32).name for stem in ("joined", "product"))
    first = members[0][0]
    made = [
        Node("Concat", [vector for _, vector in members], [whole], {"axis": 0}, first.module),
        Node("Mul", [factor, whole], [product], {}, first.module),
        Node("Split", [product, graph.ints(sizes).name], [node.outputs[0] for node, _ in members], {"axis": 0}, first.module),
    ]
    return [graph.stands_for(first, node) for node in made]


def compute_joined(graph: Graph) -> bool:
    """What one operator makes of many small vectors, joined, is what it makes of the vectors joined."""
    makers, readers = {out: node for node in graph.nodes for out in node.outputs}, graph.readers()

    def computed(node: Node) -> list[Node] | None:
        if node.op != "Concat" or graph.values[node.outputs[0]].rank != 1 or not joinable(graph.values[name].nbytes for name in node.inputs):
            return None
        made = [makers.get(name) for name in node.inputs]
        parts = [maker for maker in made if maker is not None and maker.op in ELEMENTWISE and maker.op == (made[0] or maker).op]
        alone = all(len(readers[name]) == 1 and name not in graph.outputs for name in node.inputs)
        if len(parts) < len(node.inputs) or not alone:
            return None
        left, right = (_side(graph, names, node, makers) for names in zip(*_pairs(graph, makers, parts), strict=True))
        if left is None or right is None:
            return None
        whole = Node(parts[0].op, [left[0], right[0]], node.outputs, {}, node.module)
        return [graph.stands_for(node, item) for item in (*left[1], *right[1], whole)]

    return graph.rewrite(computed)


def _pairs(graph: Graph, makers: Mapping[str, Node], parts: Sequence[Node]) -> list[list[str]]:
    """The inputs of each; where their order is free, what all share or what is cut out of one vector comes second."""

    def rank(name: str) -> int:
        maker = makers.get(name)
        return 2 if not graph.values[name].shape else 1 if maker is not None and maker.op in ("Slice", "Split") else 0

    return [list(part.inputs) if part.op == "Sub" else sorted(part.inputs, key=rank) for part in parts]


def _side(graph: Graph, names: Sequence[str], node: Node, makers: Mapping[str, Node]) -> tuple[str, list[Node]] | None:
    """One side of what is computed together, and the node that makes it: a number, a vector that was cut, or vectors that are joined; else None."""
    if len(set(names)) == 1 and not graph.values[names[0]].shape:
        return names[0], []
    if [graph.values[name].shape for name in names] != [graph.values[name].shape for name in node.inputs]:
        return None
    whole = _cut_from(graph, names, makers)
    if whole:
        return whole, []
    joined = graph.declare(graph.fresh("joined"), graph.values[node.outputs[0]].shape, graph.values[names[0]].dtype).name
    return joined, [Node("Concat", list(names), [joined], {"axis": 0}, node.module)]


def _cut_from(graph: Graph, names: Sequence[str], makers: Mapping[str, Node]) -> str:
    """The vector that all of these are, one after the other; "" if there is none."""
    cuts, at = [makers.get(name) for name in names], 0
    first = cuts[0]
    if first is None or first.op not in ("Slice", "Split"):
        return ""
    whole = first.inputs[0]
    if first.op == "Split":
        return whole if first.outputs == list(names) else ""
    for name, cut in zip(names, cuts):
        if cut is None or cut.op != "Slice" or cut.inputs[0] != whole or graph.values[whole].rank != 1:
            return ""
        given = [graph.constants.get(name) for name in cut.inputs[1:]]
        begin, *step = given[:1] + given[3:]
        if begin is None or begin.tolist() != [at] or any(one is None or one.tolist() != [1] for one in step):
            return ""
        at += graph.values[name].shape[0]
    return whole if (at,) == graph.values[whole].shape else ""
