"""What 8-bit operators of onnxruntime's CPU provider take besides their outputs: scratch while they run, and copies of constant weights.

Compared with its profiler on 400 convolutions on x86-64 (1.31.1 and 1.23.2) and 300 on emulated Raspberry Pi 4 and 5: equal in all. Activations are
uint8; weights are int8 with zero points of zero, as quantisers write them, or uint8.

A convolution works on one image at a time, channels last. Where its weights suit a kernel that writes bytes itself ("symmetric"), it needs
pointers to the windows only; else 32-bit sums of the image, and a matrix of its windows.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from edgeadapt.memory.graph import GraphLike, NodeLike

if TYPE_CHECKING:
    from edgeadapt.memory.rules import Machine

CONVOLUTIONS = frozenset({"QLinearConv", "com.microsoft.QLinearConv"})
GEMM = "com.microsoft.QGemm"
WEIGHTS = {
    **dict.fromkeys((*CONVOLUTIONS, "QLinearMatMul", GEMM), 3),
    **dict.fromkeys(("MatMulInteger", "com.microsoft.MatMulIntegerToFloat", "com.microsoft.DynamicQuantizeMatMul"), 1),
}
"""Operators that multiply by weights of 8 bits, and which of their inputs these are."""

OVERRUN = 30
"""Bytes that Arm's kernels may read past an image or its windows."""

PLACES = 512
"""Places of a pooling over channels that come last, to whose windows pointers are kept at a time."""

POINTER = 8
PANEL = 16
"""Columns of a packed matrix of bytes are filled up to a multiple of this, and the sum of each stands beside them as 32 bits."""


_MARKS = (b"QLinear", b"QGemm", b"MatMulIntegerToFloat", b"DynamicQuantize")
ON_BYTES = frozenset(WEIGHTS) - {"MatMulInteger"}
"""Those of which an exported graph has constant weights. `MatMulInteger` makes bits of truth values there: none of its inputs has a copy."""


def present(data: bytes) -> bool:
    """Whether a serialised graph has operators that keep copies of 8-bit weights, or seems to: what it takes then depends on the machine.

    Of those `ON_BYTES`, and of what onnxruntime makes of them.
    """
    return any(mark in data for mark in _MARKS)


def scratch(graph: GraphLike, node: NodeLike, machine: Machine) -> list[int]:
    """The blocks, in bytes, that an 8-bit operator takes while it runs, in the order that it takes them in; none for any other."""
    values = graph.values
    if node.op in CONVOLUTIONS:
        return _convolution(graph, node, machine)
    if node.op == "QLinearMatMul":
        return [4 * math.prod(values[node.outputs[0]].shape)]
    if node.op == GEMM:
        sums = [] if len(node.inputs) < 8 or not node.inputs[7] else [4 * math.prod(values[node.outputs[0]].shape)]
        turned = node.attributes.get("transB") and not _packs(graph, node.inputs[3], machine)
        return [*([values[node.inputs[3]].nbytes] if turned else []), *sums]
    if node.op == "com.microsoft.DynamicQuantizeMatMul":
        return [math.prod(values[node.inputs[0]].shape)]
    if node.op == "com.microsoft.QLinearAveragePool":  # as floats
        return [4 * math.prod(values[node.inputs[0]].shape)]
    if node.op == "com.microsoft.NhwcMaxPool":
        return [POINTER * math.prod(node.attributes["kernel_shape"]) * min(math.prod(values[node.outputs[0]].shape[1:-1]), PLACES)]
    return []


def weight_of(node: NodeLike) -> str:
    """The weights that an 8-bit operator may keep a copy of; "" for any other operator."""
    slot = WEIGHTS.get(node.op, len(node.inputs))
    return node.inputs[slot] if slot < len(node.inputs) else ""


def copied(graph: GraphLike) -> bool:
    """Whether a graph has 8-bit weights that copies are kept of where weights are prepacked."""
    return any(weight_of(node) in graph.constants for node in graph.nodes)


def released(graph: GraphLike) -> frozenset[str]:
    """The 8-bit weights that nothing of a loaded graph reads any more, where weights are prepacked: each reader keeps a copy of its own."""
    readers: dict[str, bool] = {}
    for node in graph.nodes:
        for name in node.inputs:
            if name in graph.constants:
                readers[name] = readers.get(name, True) and name == weight_of(node) and len(graph.values[name].shape) > 1
    return frozenset(name for name, kept in readers.items() if kept)


def packed(graph: GraphLike, node: NodeLike, machine: Machine) -> tuple[int, int]:
    """Bytes of the copy of an 8-bit operator's constant weights that is made when a graph is loaded: in the region, and beside it.

    Also where the graph's file has it, and it is mapped.
    """
    if node.op in CONVOLUTIONS:
        return _packed_convolution(graph, node, machine)
    weight = weight_of(node)
    if not weight or not _packs(graph, weight, machine):
        return 0, 0
    shape = graph.values[weight].shape
    if len(shape) != 2:
        return 0, 0
    columns, depth = shape if node.attributes.get("transB") else shape[::-1]
    return 0, _panels(columns, depth, machine)


def _packs(graph: GraphLike, weight: str, machine: Machine) -> bool:
    return machine.prepacking and weight in graph.constants


def _panels(columns: int, depth: int, machine: Machine) -> int:
    step = 4 if not machine.arm else 8 if machine.wide else 16
    return _up(columns, PANEL) * (_up(depth, step) + 4)


def _up(size: int, step: int) -> int:
    return -(-size // step) * step


def _symmetric(graph: GraphLike, node: NodeLike, machine: Machine) -> bool:
    """Whether a convolution's weights are packed for the kernel that writes bytes itself, which needs less.

    Where it is not known what the processor has: whether they would be on each.
    """
    return not _moving_bias(graph, node) and _suits(graph, node, machine)


def bias_left_out(graph: GraphLike, machine: Machine) -> list[str]:
    """Outputs of convolutions whose bias onnxruntime before 1.31 leaves out, without a word (1.23 to 1.28 do).

    It folds bias and zero point into sums over weights that it prepacks, and looks at whether the zero point is constant, but not the bias.
    """
    nodes = [node for node in graph.nodes if node.op in CONVOLUTIONS and _moving_bias(graph, node)]
    return [node.outputs[0] for node in nodes if _suits(graph, node, machine)]


def _moving_bias(graph: GraphLike, node: NodeLike) -> bool:
    return any(name and name not in graph.constants for name in node.inputs[8:9])


def _suits(graph: GraphLike, node: NodeLike, machine: Machine) -> bool:
    source, zero, weight = node.inputs[0], node.inputs[2], node.inputs[3]
    if not machine.direct or not _packs(graph, weight, machine) or zero not in graph.constants or not _signed(graph, weight):
        return False
    if _signed(graph, source) and not machine.arm:
        return False
    (out, going, *sizes), group = graph.values[weight].shape, int(node.attributes.get("group", 1))
    if group > 1:
        return going == 1 and out == group and group % (8 if machine.arm else 16) == 0
    if not machine.arm:
        return out >= 16 and going % 4 == 0 and out % (4 if machine.wide else 8) == 0
    found = {True: going % 4 == 0 and out % 16 == 0, False: going % 8 == 0 and out % 8 == 0}
    fits = all(found.values()) if machine.wide is None else found[machine.wide]
    return math.prod(sizes) > 1 and going >= 64 and fits


def _signed(graph: GraphLike, name: str) -> bool:
    """Whether a tensor is of int8; TensorProto says 3."""
    value = graph.values[name]
    return bool(getattr(value, "kind", 0) == 3 or getattr(value, "dtype", "") == "int8")


def _depthwise(graph: GraphLike, node: NodeLike) -> bool:
    out, going = graph.values[node.inputs[3]].shape[:2]
    return going == 1 and out == int(node.attributes.get("group", 1))


def _convolution(graph: GraphLike, node: NodeLike, machine: Machine) -> list[int]:
    image, result = graph.values[node.inputs[0]].shape, graph.values[node.outputs[0]].shape
    out, going, *sizes = graph.values[node.inputs[3]].shape
    last = bool(node.attributes.get("channels_last"))
    places, kernel = math.prod(result[1:-1] if last else result[2:]), math.prod(sizes)
    over = OVERRUN if machine.arm else 0
    symmetric = _symmetric(graph, node, machine)
    blocks = [] if _packs(graph, node.inputs[3], machine) else [graph.values[node.inputs[3]].nbytes]
    if not symmetric:
        blocks.append(4 * out * places)
    if not last:
        blocks += [math.prod(image[1:]) + over, out * places]
    unit = all(stride == 1 for stride in node.attributes.get("strides", [1])) and not any(node.attributes.get("pads", [0]))
    if _depthwise(graph, node) or (symmetric and not (kernel == 1 and unit)):
        blocks.append(POINTER * kernel * places * (image[0] if symmetric and last else 1))  # of all images where these are worked on side by side
    elif not (kernel == 1 and unit):
        blocks.append(kernel * going * places + over)
    return blocks


def _packed_convolution(graph: GraphLike, node: NodeLike, machine: Machine) -> tuple[int, int]:
    if not _packs(graph, node.inputs[3], machine):
        return 0, 0
    weight, group = graph.values[node.inputs[3]], int(node.attributes.get("group", 1))
    out, depth = weight.shape[0], math.prod(weight.shape[1:])
    if _symmetric(graph, node, machine):
        step = 1 if group > 1 else 16 if not machine.arm or machine.wide else 8
        return _up(out, step) * depth, 0
    if _depthwise(graph, node):
        return 0, weight.nbytes
    return 0, group * _panels(out // group, depth, machine)
