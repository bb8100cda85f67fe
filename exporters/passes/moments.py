"""Fewer nodes around statistics that follow the stream: of what a session holds, a node's structures are often more than its tensors.

Where all statistics of a layer are constant, the same is done, so that they give the bits of those that move; it costs two small constants a layer.
"""

from __future__ import annotations

import numpy as np

from edgeadapt.exporters.ir import Graph, Node


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
