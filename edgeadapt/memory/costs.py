"""What a graph's nodes compute and move, from their shapes alone, and roughly how long that takes."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from edgeadapt.memory import quantised
from edgeadapt.memory.graph import GraphLike, NodeLike
from edgeadapt.memory.rules import VIEWS

NODE_SECONDS = 3e-6
"""What onnxruntime spends on a node besides its kernel, on a core of the workstation that this was measured on (1.31.1, chains of tiny operators)."""

MATRICES = frozenset({"MatMul", "com.microsoft.FusedMatMul"})
PRODUCTS = frozenset({"Gemm", "com.microsoft.FusedGemm"})
CONVOLUTIONS = frozenset({"Conv", "com.microsoft.FusedConv", "com.microsoft.nchwc.Conv"})


BYTES = 2
"""How many operations on bytes take the time of one on floats, at least, with the dot products of newer processors: 2 to 3 measured."""


@dataclass(frozen=True)
class Cost:
    """Operations (a multiply-add is two) and bytes that are read and written."""

    operations: int
    bytes: int


def cost(graph: GraphLike, node: NodeLike) -> Cost:
    """Of one node. Operators other than products count one operation for each element of their largest tensor; views cost nothing.

    A convolution over windows also writes and reads its columns, as onnxruntime's kernels do.
    """
    if node.op in VIEWS:
        return Cost(0, 0)
    values = graph.values
    shapes = [values[name].shape for name in (*node.inputs, *node.outputs) if name and name in values]
    moved = sum(values[name].nbytes for name in (*node.inputs, *node.outputs) if name and name in values)
    if node.op in CONVOLUTIONS or node.op == "ConvTranspose":
        weight = values[node.inputs[1]].shape
        places = values[node.inputs[0] if node.op == "ConvTranspose" else node.outputs[0]].shape
        positions = places[0] * math.prod(places[2:])
        group = int(node.attributes.get("group", 1))
        columns = 4 * positions * math.prod(weight[1:]) * (group if node.op in CONVOLUTIONS else 1) if math.prod(weight[2:]) > 1 else 0
        return Cost(2 * positions * math.prod(weight), moved + 2 * columns)
    if weight_name := quantised.weight_of(node):
        weight, out = values[weight_name].shape, values[node.outputs[0]].shape
        depth = math.prod(weight[1:]) if node.op in quantised.CONVOLUTIONS else math.prod(weight) // out[-1]
        return Cost(2 * depth * math.prod(out) // BYTES, moved)
    if node.op in MATRICES:
        first, out = values[node.inputs[0]].shape, values[node.outputs[0]].shape
        depth = first[-2] if node.attributes.get("transA") and len(first) > 1 else first[-1]
        return Cost(2 * depth * math.prod(out), moved)
    if node.op in PRODUCTS:
        first, out = values[node.inputs[0]].shape, values[node.outputs[0]].shape
        return Cost(2 * first[0 if node.attributes.get("transA") else 1] * math.prod(out), moved)
    return Cost(max((math.prod(shape) for shape in shapes), default=0), moved)


def seconds(graph: GraphLike, gflops: float, gbps: float, threads: int = 1) -> float:
    """A rough time of one run: each node takes as long as its arithmetic or its memory, whichever is longer.

    Args:
        graph: the graph.
        gflops: 1e9 float32 operations a second of one core in a convolution.
        gbps: 1e9 bytes a second, read and written.
        threads: of one operator; they share the memory's rate.
    """
    return sum(_time(item, gflops * threads, gbps) for item in costs(graph)) + NODE_SECONDS * len(graph.nodes)


def costs(graph: GraphLike) -> Iterable[Cost]:
    """Of every node, in order."""
    return (cost(graph, node) for node in graph.nodes)


def _time(item: Cost, gflops: float, gbps: float) -> float:
    return max(item.operations / (gflops * 1e9), item.bytes / (gbps * 1e9))
