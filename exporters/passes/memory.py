"""How many bytes of tensors stock onnxruntime holds while it runs a graph, node by node.

The rules are those measured for the CPU provider with optimisation off, file-order execution, no memory pattern and no buffer reuse, and every
output bound: a tensor takes its bytes rounded up to 256; a node's outputs are allocated before its inputs are freed; views share their input's
buffer; a few operators write in place; convolutions need workspace.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from edgeadapt.exporters.ir import Graph, Node

VIEWS = {"Reshape", "Flatten", "Squeeze", "Unsqueeze"}
IN_PLACE = {"Relu", "Softmax", "LogSoftmax", "Clip"}


def rounded(size: int) -> int:
    """Bytes as the allocator counts them."""
    return -(-size // 256) * 256


def workspace(graph: Graph, node: Node, threads: int = 1) -> int:
    """Scratch bytes of one node."""
    if node.op == "Conv":
        weight, out = graph.values[node.inputs[1]].shape, graph.values[node.outputs[0]].shape
        plain = all(k == 1 for k in weight[2:]) and not any(node.attributes["pads"]) and all(s == 1 for s in node.attributes["strides"])
        if plain:
            return 0
        if weight[0] > math.prod(out[2:]) and node.attributes["group"] == 1:
            return 4 * math.prod(weight[1:]) * math.prod(out[2:])
        return 65536 * threads
    if node.op == "ConvTranspose":
        weight, image = graph.values[node.inputs[1]].shape, graph.values[node.inputs[0]].shape
        return 4 * math.prod(weight[1:]) * math.prod(image[2:])
    return 0


class Buffers:
    """Which tensor stands in which buffer."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.outside = {*graph.inputs, *graph.constants, *graph.outputs}
        self.root: dict[str, str] = {}
        readers: dict[str, int] = {}
        for node in graph.nodes:
            for name in node.inputs:
                readers[name] = readers.get(name, 0) + 1
        for node in graph.nodes:
            if node.op in VIEWS:
                self.root[node.outputs[0]] = self.owner(node.inputs[0])
        self.readers = readers

    def owner(self, name: str) -> str:
        """The tensor whose buffer `name` uses."""
        return self.root.get(name, name)

    def size(self, name: str) -> int:
        """Bytes that `name` itself allocates."""
        return 0 if name in self.outside or name in self.root else rounded(self.graph.values[name].nbytes)


def curve(graph: Graph, order: Sequence[int] | None = None) -> list[int]:
    """Bytes in use while each node runs, workspace included, in the given order (file order by default)."""
    nodes = [graph.nodes[index] for index in (order if order is not None else range(len(graph.nodes)))]
    buffers = Buffers(graph)
    remaining: dict[str, int] = {}
    for node in nodes:
        for name in node.inputs:
            remaining[buffers.owner(name)] = remaining.get(buffers.owner(name), 0) + 1
    used, points = 0, []
    taken: dict[str, int] = {}
    moved: dict[str, str] = {}

    def real(name: str) -> str:
        name = buffers.owner(name)
        while name in moved:
            name = moved[name]
        return name

    for node in nodes:
        inplace = (
            node.op in IN_PLACE
            and node.outputs[0] not in buffers.outside
            and real(node.inputs[0]) in taken
            and remaining[real(node.inputs[0])] == 1
            and graph.values[node.inputs[0]].nbytes == graph.values[node.outputs[0]].nbytes
        )
        for out in node.outputs:
            if inplace:
                moved[out] = real(node.inputs[0])
                remaining[moved[out]] += remaining.pop(out, 0)
            elif buffers.size(out):
                taken[out] = buffers.size(out)
                used += taken[out]
        points.append(used + rounded(workspace(graph, node)))
        for name in [*map(real, node.inputs)]:
            if name in remaining:
                remaining[name] -= 1
        for name in {*map(real, node.inputs), *map(real, node.outputs)}:
            if name in taken and remaining.get(name, 0) <= 0:
                used -= taken.pop(name)
    return points


def peak(graph: Graph, order: Sequence[int] | None = None) -> int:
    """The largest point of the curve, in bytes."""
    return max(curve(graph, order), default=0)
