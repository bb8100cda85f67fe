"""What stock onnxruntime's CPU provider does with memory, as measured: optimisation off, nodes in file order, no memory pattern, no buffer reuse.

A tensor takes its bytes rounded up to 256, and a node's outputs are allocated before its inputs are freed; inputs, initialisers and outputs of the
graph lie outside; views share their input's buffer; a few operators write over an input that nobody needs any more; convolutions need workspace.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from edgeadapt.memory import quantised
from edgeadapt.memory.graph import GraphLike, NodeLike

ALIGNMENT = 256
"""Bytes that every block is rounded up to."""

VIEWS = frozenset({"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity"})

_ACTIVATIONS = ("Relu", "LeakyRelu", "ThresholdedRelu", "Elu", "Celu", "Selu", "Sigmoid", "HardSigmoid", "Tanh", "Softplus", "Softsign")

IN_PLACE = {
    **dict.fromkeys(_ACTIVATIONS, 0),
    "Softmax": 0,
    "LogSoftmax": 0,
    "Clip": 0,
    "Cast": 0,  # between types of one size, such as bytes and masks
    "Trilu": 0,
    "ScatterElements": 0,
    "com.microsoft.nchwc.Conv": 3,
    "com.microsoft.FusedConv": 3,
}
"""Operators that write over an input of the output's shape and size on its last use, and which. Arithmetic, Exp, Sqrt, Gelu and the like do not."""

CONVOLUTIONS = frozenset({"Conv", "com.microsoft.FusedConv"})
MOST_THREADS = 1024
"""Threads of one operator that are planned for and served with."""

BEFORE = frozenset({"Where", "com.microsoft.QLinearWhere"})
"""Operators that take their scratch before their outputs, so that these come to lie behind it; all others take it after."""

SEGMENT = 65536
"""Bytes a thread that a convolution copies its windows through."""

_EMITTED = """
Abs Acos Acosh Add And ArgMax ArgMin Asin Asinh Atan Atanh AveragePool BatchNormalization BitShift BitwiseAnd BitwiseNot BitwiseOr
BitwiseXor Cast Ceil Clip Concat Conv ConvTranspose Cos Cosh CumSum Div Elu Equal Erf Exp Expand Flatten Floor Gather GatherElements Gelu
Gemm Greater GreaterOrEqual Identity IsInf IsNaN LayerNormalization LeakyRelu Less LessOrEqual Log LogSoftmax MatMul Max MaxPool Min Mod Mul
Neg Not Or Pad Pow Reciprocal ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum Relu Reshape Round ScatterElements Sigmoid Sign Sin Sinh
Slice Softmax Softplus Sqrt Squeeze Sub Tan Tanh Tile TopK Transpose Unsqueeze Where Xor
"""
_OTHERS = "Celu HardSigmoid Selu Softsign Split ThresholdedRelu Trilu"
_BYTES = "QuantizeLinear DequantizeLinear DynamicQuantizeLinear QLinearConv QLinearMatMul MatMulInteger"
_FUSED = """
FusedConv FusedGemm FusedMatMul nchwc.AveragePool nchwc.Conv nchwc.GlobalAveragePool nchwc.MaxPool nchwc.ReorderInput nchwc.ReorderOutput
QuantizeLinear DequantizeLinear QLinearConv QLinearAdd QLinearMul QLinearConcat QLinearSigmoid QLinearLeakyRelu QLinearSoftmax QLinearWhere
QLinearGlobalAveragePool QLinearAveragePool NhwcMaxPool QGemm MatMulIntegerToFloat DynamicQuantizeMatMul
"""
KNOWN = frozenset([*_EMITTED.split(), *_OTHERS.split(), *_BYTES.split(), *(f"com.microsoft.{name}" for name in _FUSED.split())])
"""Operators whose outputs, scratch and writing in place were compared with onnxruntime's profiler: those that the exporter emits, a few besides, and
what onnxruntime makes of them when graphs are prepared. Of any other, what it takes besides its outputs is not known."""


@dataclass(frozen=True)
class Machine:
    """What of the processor, and of how graphs are loaded, the workspace depends on.

    Attributes:
        threads: of one operator.
        arm: 64-bit Arm, else x86-64.
        wide: whether it has the wider instructions that convolutions of bytes choose their kernel by: dot products on Arm, AVX-512 on x86-64. None:
            not known, so what takes more is counted.
        prepacking: whether onnxruntime keeps rearranged copies of constant weights.
        direct: whether there are kernels for it that convolve bytes and write bytes themselves; x86-64 without AVX2 has none.
    """

    threads: int = 1
    arm: bool = False
    wide: bool | None = None
    prepacking: bool = True
    direct: bool = True

    @classmethod
    def here(cls, threads: int, prepacking: bool = True) -> Machine:
        """The one that this runs on."""
        arm, flags = os.uname().machine in ("aarch64", "arm64"), _flags()
        wide = bool(flags & {"avx512bw", "asimddp"}) if flags else None
        return cls(threads, arm, wide, prepacking, arm or not flags or "avx2" in flags)


@lru_cache(maxsize=1)
def _flags() -> frozenset[str]:
    """What the processor has, as the kernel names it; empty where it does not say."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            lines = [line.partition(":") for line in file]
    except OSError:
        return frozenset()
    return frozenset(flag for key, _, flags in lines if key.strip().lower() in ("flags", "features") for flag in flags.split())


X86 = Machine()


def uncounted(graph: GraphLike) -> list[str]:
    """The operators of a graph of which it is not known what they do to memory, each once."""
    return sorted({node.op for node in graph.nodes if node.op not in KNOWN or (node.op in ("Max", "Min") and len(node.inputs) > 2)})


def misplaced_sums(graph: GraphLike, names: Iterable[str]) -> list[str]:
    """Those of the sums `names` that a run may not write over where they were read.

    Input `sum.NAME` and output `added.NAME` may share their memory if the one node that reads the input is an `Add` of two tensors of one shape that
    gives the output, and nothing reads that: it works element by element.
    """
    readers: dict[str, list[NodeLike]] = {}
    for node in graph.nodes:
        for name in node.inputs:
            readers.setdefault(name, []).append(node)
    wrong = []
    for name in names:
        given, result = f"sum.{name}", f"added.{name}"
        nodes = readers.get(given, [])
        right = len(nodes) == 1 and nodes[0].op == "Add" and list(nodes[0].outputs) == [result] and result not in readers
        if not right or any(graph.values[other].shape != graph.values[result].shape for other in nodes[0].inputs):
            wrong.append(name)
    return wrong


def rounded(size: int) -> int:
    """Bytes as the arena counts them."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def workspace(graph: GraphLike, node: NodeLike, machine: Machine = X86) -> int:
    """Scratch bytes of one node while it runs, rounded."""
    return sum(blocks(graph, node, machine))


def blocks(graph: GraphLike, node: NodeLike, machine: Machine = X86) -> tuple[int, ...]:
    """The same, block by block in the order that they are taken in: all are held at once."""
    if node.op in CONVOLUTIONS:
        return (rounded(_convolution(graph, node, machine)),)
    if node.op == "ConvTranspose":  # one image's columns
        weight, image = graph.values[node.inputs[1]].shape, graph.values[node.inputs[0]].shape
        return (rounded(4 * math.prod(weight[1:]) * math.prod(image[2:])),)
    if node.op in BEFORE:  # either side, chosen and else empty
        return (rounded(graph.values[node.outputs[0]].nbytes),) * 2
    if node.op in ("Softmax", "LogSoftmax"):  # over another axis than the last: turned there and back
        out = graph.values[node.outputs[0]]
        return () if int(node.attributes.get("axis", -1)) in (-1, len(out.shape) - 1) else (2 * rounded(out.nbytes),)
    return tuple(rounded(size) for size in quantised.scratch(graph, node, machine) if size)


def _convolution(graph: GraphLike, node: NodeLike, machine: Machine) -> int:
    weight, image, out = (graph.values[name].shape for name in (node.inputs[1], node.inputs[0], node.outputs[0]))
    attributes = node.attributes
    kernel, group = weight[2:], int(attributes.get("group", 1))
    strides, pads = attributes.get("strides", [1]), attributes.get("pads", [0])
    unit = all(stride == 1 for stride in strides)
    if all(size == 1 for size in kernel) and unit and not any(pads):
        return 0
    if machine.arm and group == image[1] == weight[0] and list(kernel) == [3, 3] and unit and all(pad == 1 for pad in pads):
        return 4 * (image[-1] + 2)
    if weight[0] > math.prod(out[2:]) and group == 1:
        return 4 * math.prod(weight[1:]) * math.prod(out[2:])
    return SEGMENT * machine.threads
