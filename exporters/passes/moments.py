"""Fewer nodes around statistics that follow the stream: of what a session holds, a node's structures are often more than its tensors.

Where all statistics of a layer are constant, the same is done, so that they give the bits of those that move; it costs two small constants a layer.
"""

from __future__ import annotations

import numpy as np

from edgeadapt.exporters.ir import Graph, Node

FEW = 4
"""Products of a factor are joined from this many on: three nodes take their place."""


def absorb_moments(graph: Graph) -> bool:
    """x·scale + shift, with scale and shift made of a mean and a variance, is a BatchNormalization of these, which computes the rest itself."""
    makers = {out: node for node in graph.nodes for out in node.outputs}

    def absorbed(node: Node) -> list[Node] | None:
        found = _moments(graph, node, makers) if node.op == "BatchNormalization" and node.attributes.get("epsilon") == 0.0 else None
        if found is None:
            return None
        *given, epsilon = found
        return [Node(node.op, [node.inputs[0], *given], node.outputs, {"epsilon": epsilon}, node.module)]

    return graph.rewrite(absorbed)


def _moments(graph: Graph, node: Node, makers: dict[str, Node]) -> tuple[str, str, str, str, float] | None:
    """Weight, bias, mean, variance and epsilon of what makes a node's scale and shift."""
    scale, shift, zeros, ones = node.inputs[1:]
    given = [graph.constants.get(name) for name in (zeros, ones)]
    if scale not in makers or given[0] is None or given[1] is None or given[0].any() or (given[1] != 1).any():
        return None
    divided = _made(makers, scale, "Div")
    raised = _made(makers, divided.inputs[1], "Sqrt") if divided is not None else None
    added = _made(makers, raised.inputs[0], "Add") if raised is not None else None
    if divided is None or added is None:
        return None
    variance, epsilon = _and_constant(graph, added)
    taken = _made(makers, shift, "Sub")
    product = _made(makers, taken.inputs[1], "Mul") if taken is not None else _made(makers, _negated(makers, shift), "Mul")
    if not variance or product is None or scale not in product.inputs:
        return None
    mean = product.inputs[1 - product.inputs.index(scale)]
    shape = graph.values[scale].shape
    weight, bias = divided.inputs[0], taken.inputs[0] if taken is not None else ""
    if any(graph.values[name].shape != shape for name in (weight, bias, mean, variance) if name):
        return None
    return weight, bias or graph.constant(np.zeros(shape, np.float32)).name, mean, variance, epsilon


def _made(makers: dict[str, Node], name: str, op: str) -> Node | None:
    maker = makers.get(name)
    return maker if maker is not None and maker.op == op else None


def _negated(makers: dict[str, Node], name: str) -> str:
    maker = _made(makers, name, "Neg")
    return maker.inputs[0] if maker is not None else ""


def _and_constant(graph: Graph, added: Node) -> tuple[str, float]:
    """The other input of a sum with one number, and that number; "" if it is no such sum."""
    for slot in (0, 1):
        found = graph.constants.get(added.inputs[slot])
        if found is not None and found.size == 1:
            return added.inputs[1 - slot], float(found.reshape(-1)[0])
    return "", 0.0


def join_products(graph: Graph) -> bool:
    """Products of one number with many vectors that the caller gives are one product, of the vectors joined, taken apart again."""
    groups: dict[tuple[str, bool], list[tuple[Node, str]]] = {}
    for node in graph.nodes:
        vector = _scaled_input(graph, node)
        if vector:
            factor = node.inputs[1 - node.inputs.index(vector)]
            groups.setdefault((factor, graph.late(node)), []).append((node, vector))
    joined = {id(members[0][0]): (factor, members) for (factor, _), members in groups.items() if len(members) >= FEW}
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
