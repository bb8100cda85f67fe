"""onnxruntime's CUDA provider as a plan sees it: which operators it has, and what its sessions take of the GPU's memory.

Nothing here was measured on a GPU. Kernels are those of onnxruntime's documentation (OperatorKernels), for the operators that graphs of bundles use
or could use. A node without a kernel runs on the CPU, and its tensors are copied there and back.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from edgeadapt.bundle import Form
from edgeadapt.bundle.onnxwire import KINDS
from edgeadapt.errors import UsageError
from edgeadapt.memory.graph import Graph, Node
from edgeadapt.memory.rules import rounded

_REAL = frozenset({"float", "double", "float16"})
_WIDE = _REAL | {"int32", "int64", "uint32", "uint64"}
_NUMBERS = _WIDE | {"int8", "int16", "uint8", "uint16"}
_ANY = _NUMBERS | {"bool"}
_TRUTH = frozenset({"bool"})
_SOME = _REAL | {"int32", "int64"}


def _each(names: str, since: int, types: frozenset[str]) -> dict[str, tuple[int, frozenset[str]]]:
    return dict.fromkeys(names.split(), (since, types))


KERNELS: dict[str, tuple[int, frozenset[str]]] = {
    **_each("Abs Sign", 13, _NUMBERS),
    **_each("Add Div Mul Sub", 14, _NUMBERS),
    **_each("And Or Xor", 7, _TRUTH),
    **_each("Not", 1, _TRUTH),
    **_each("ArgMax ArgMin Ceil Erf Exp Floor Gemm Log LogSoftmax MatMul Reciprocal Relu Sigmoid Softmax Sqrt Tanh", 13, _REAL),
    **_each("AveragePool Conv ConvTranspose Round", 11, _REAL),
    **_each("BatchNormalization", 9, _REAL),
    **_each("Cos Sin", 7, _REAL),
    **_each("Elu HardSigmoid InstanceNormalization Selu", 6, _REAL),
    **_each("Gelu IsInf", 20, _REAL),
    **_each("GlobalAveragePool GlobalMaxPool Softplus Softsign", 1, _REAL),
    **_each("HardSwish", 14, _REAL),
    **_each("IsNaN", 13, _REAL),
    **_each("LayerNormalization", 17, _REAL),
    **_each("LeakyRelu", 6, _REAL),
    **_each("PRelu", 7, _REAL),
    **_each("ThresholdedRelu", 10, _REAL),
    **_each("ReduceLogSum ReduceLogSumExp ReduceSumSquare", 1, _REAL),
    **_each("ReduceL1 ReduceL2 ReduceMean ReduceProd", 1, _REAL | {"int32"}),
    **_each("ReduceMax ReduceSum", 1, _SOME),
    **_each("ReduceMin", 1, _SOME | {"int8", "uint8"}),
    **_each("Clip", 12, _REAL | {"int64", "uint64", "int8", "uint8"}),
    **_each("CumSum", 14, _WIDE),
    **_each("Equal", 13, _WIDE | _TRUTH),
    **_each("Greater Less", 13, _WIDE),
    **_each("GreaterOrEqual LessOrEqual", 12, _WIDE),
    **_each("Max Min", 12, _WIDE),
    **_each("Mod", 13, _WIDE),
    **_each("MaxPool", 12, _REAL | {"int8", "uint8"}),
    **_each("Neg", 13, _REAL | {"int8", "int16", "int32", "int64"}),
    **_each("Pad", 13, _REAL | _TRUTH),
    **_each("Pow", 13, _SOME),
    **_each("Tile", 13, _SOME),
    **_each("TopK", 11, _SOME),
    **_each("Where", 9, _SOME | {"uint8"}),
    **_each("Cast Concat Expand Flatten Gather GatherElements Identity Reshape ScatterElements Slice Split Squeeze Transpose Unsqueeze", 13, _ANY),
    **_each("Trilu", 14, _ANY),
}
"""Of each operator: the oldest opset of which this is true, and the element types that its kernels take. Kernels of older opsets may take fewer.

bfloat16 and types below eight bits are left out: graphs of bundles have none."""

_TYPED = {"Where": 1}
"""Which input's type counts, where it is not the first."""

WORKSPACE = 32 * 2**20
"""Bytes that cuDNN may take for one convolution: the bound that onnxruntime gives it where `cudnn_conv_use_max_workspace` is off."""

PIECES = 2
"""How often the smallest region: an arena that grows by request keeps every piece it ever took. On the CPU, such a one held up to 1.7 times what was
in use; and which operators write in place differs."""

LEAST = 2**20
"""Bytes for rounding and for what a session takes besides tensors."""

LIBRARIES = 384 * 2**20
"""Resident pages and heap of driver, cuDNN and cuBLAS in the process. An estimate: public reports say 250 to 650 MB."""

CONTEXT = 384 * 2**20
"""What a process takes of the GPU's memory before any tensor: the driver's context, kernels, cuBLAS's own workspace. An estimate, from the same."""

LINES = ("GPU memory", "CUDA context")
"""The ledger's lines that lie in the GPU's memory."""


PROVIDERS = ("cpu", "cuda")
"""What graphs may run on."""


def is_cuda(provider: str) -> bool:
    """Whether it is "cuda".

    Raises:
        UsageError: it is neither that nor "cpu".
    """
    if provider not in PROVIDERS:
        raise UsageError(f"there is no provider {provider!r}", f"give {' or '.join(PROVIDERS)}")
    return provider == "cuda"


@dataclass(frozen=True)
class Device:
    """The GPU that graphs run on.

    Attributes:
        unified: it takes its memory from the board's own, so that it counts against a budget.
        started: this process has loaded CUDA's libraries already, which stay resident. So does its context, but that is not resident, and whoever
            counted it may have gone: each plan counts it.
    """

    unified: bool
    started: bool = False


def lacking(graph: Graph, opset: int) -> tuple[str, ...]:
    """What of a graph the CUDA provider has no kernel for, each kind once: "BitShift", or with the type that is the matter: "Where of bool".

    Args:
        graph: the graph, as `edgeadapt.memory.read` gives it.
        opset: of the standard operators in its file.
    """
    found: dict[str, None] = {}
    for node in graph.nodes:
        reason = _reason(graph, node, opset)
        if reason:
            found[reason] = None
    return tuple(sorted(found))


def _reason(graph: Graph, node: Node, opset: int) -> str:
    since, types = KERNELS.get(node.op, (0, frozenset()))
    if not types:
        return node.op
    if opset < since:
        return f"{node.op} of opset {opset}"
    if node.op == "BatchNormalization" and node.attributes.get("training_mode"):
        return "BatchNormalization in training"
    names = [node.inputs[_TYPED.get(node.op, 0)], *(node.outputs[:1] if node.op == "Cast" else [])]
    odd = [KINDS.get(graph.values[name].kind, "an odd type") for name in names if name in graph.values]
    return next((f"{node.op} of {kind}" for kind in odd if kind not in types), "")


def limit(graph: Graph, region: int) -> int:
    """Bytes of the GPU's memory that one session of a graph may take: its tensors, weights, inputs and outputs, and the largest workspace.

    Each session has an arena of its own, with the weights in it, and inputs and outputs are copied there.

    Args:
        graph: the graph.
        region: the smallest one region that its tensors fit on the CPU.
    """
    weights = sum(rounded(size) for size in graph.constants.values())
    given = sum(rounded(graph.values[name].nbytes) for name in (*graph.inputs, *graph.outputs))
    scratch = WORKSPACE if any(node.op in ("Conv", "ConvTranspose") for node in graph.nodes) else 0
    return -(-(PIECES * region + weights + given + scratch + LEAST) // LEAST) * LEAST


def on_host(graph: Graph, region: int, opset: int) -> int:
    """Bytes of the processor's memory for tensors of nodes that run there: as much as if all did, if any does."""
    return region if lacking(graph, opset) else LEAST


def fitting(forms: Iterable[Form], missing: Mapping[str, tuple[str, ...]]) -> tuple[tuple[Form, ...], tuple[str, ...]]:
    """Of the forms of a step, quickest first: those to use, and the graphs passed over because others have every node on the GPU.

    Args:
        forms: the forms.
        missing: what of each graph the provider lacks, as `lacking` tells.
    """
    forms = tuple(forms)
    whole = tuple(form for form in forms if not any(missing[name] for name in form.graphs))
    if not whole:
        return forms, ()
    used = {name for form in whole for name in form.graphs}
    return whole, tuple(dict.fromkeys(name for form in forms for name in form.graphs if name not in used))
