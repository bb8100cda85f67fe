"""A Python function over tensors as a functional ATen graph, gradients included.

Autograd runs and what it calls is recorded, every operator without a lowering rule of its own decomposed. Some decompositions write into their
temporaries; where one did, a second pass removes that. Nothing is computed: tensors are fake.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx
from torch._decomp import core_aten_decompositions, get_decompositions
from torch.fx import traceback
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel

from edgeadapt.exporters.ir import Graph, Value
from edgeadapt.exporters.lowering.lower import lower, merge_duplicates
from edgeadapt.exporters.lowering.registry import find, numpy_dtype

Function = Callable[[dict[str, Tensor]], dict[str, Tensor]]
aten = torch.ops.aten


@dataclass(frozen=True)
class Trace:
    """A traced function: its graph, and the names of its inputs and outputs in order."""

    module: fx.GraphModule
    inputs: list[str]
    outputs: list[str]


def _mutates(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return bool(schema is not None and schema.is_mutable)


@cache
def _decompositions() -> dict[Any, Any]:
    extra = get_decompositions(
        [
            aten._scaled_dot_product_flash_attention_for_cpu,
            aten._safe_softmax,
            aten.native_batch_norm,
            aten.native_batch_norm_backward,
            aten.im2col,
            aten.col2im,
            aten.glu,
            aten.glu_backward,
            aten.lerp,
            aten.addcmul,
            aten.addcdiv,
            aten._prelu_kernel,
            aten._prelu_kernel_backward,
            aten.roll,
            aten.mish,
            aten.log_sigmoid_forward,
            aten.softplus,
            aten.softplus_backward,
            aten.hardsigmoid,
            aten.hardswish,
            aten.native_group_norm_backward,
            aten.logsumexp,
            aten.hardshrink,
            aten.softshrink,
            aten.hardshrink_backward,
            aten.softshrink_backward,
            aten.celu,
            aten.selu,
            aten.pixel_shuffle,
            aten.pixel_unshuffle,
        ]
    )
    table = {**core_aten_decompositions(), **extra}
    return {operator: function for operator, function in table.items() if find(str(operator)) is None}


def trace(function: Function, example: Mapping[str, Tensor]) -> Trace:
    """Trace `function`, which takes and returns dictionaries of named tensors; `example` gives shapes and dtypes."""
    names = list(example)
    outputs: list[str] = []

    def flat(*tensors: Tensor) -> list[Tensor]:
        result = function(dict(zip(names, tensors, strict=True)))
        outputs[:] = list(result)
        return list(result.values())

    tensors = [tensor.detach() for tensor in example.values()]
    with warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH), traceback.preserve_node_meta():
        warnings.simplefilter("ignore")
        table = _decompositions()
        module = make_fx(flat, decomposition_table=table, tracing_mode="fake", _allow_non_fake_inputs=True)(*tensors)
        if any(_mutates(node) for node in module.graph.nodes):
            module.recompile()

            def replay(*arguments: Tensor) -> Any:
                return fx.Interpreter(module).run(*arguments)

            functional = torch.func.functionalize(replay, remove="mutations")
            module = make_fx(functional, decomposition_table=table, tracing_mode="fake", _allow_non_fake_inputs=True)(*tensors)
    merge_duplicates(module.graph)
    return Trace(module, names, outputs)


def emit(traced: Trace, graph: Graph, inputs: Mapping[str, Value]) -> dict[str, Value]:
    """Lower a trace into `graph`; `inputs` gives a value for each of the trace's input names. Returns its outputs by name."""
    placeholders = [node.name for node in traced.module.graph.nodes if node.op == "placeholder"]
    results = lower(traced.module, graph, {place: inputs[name] for place, name in zip(placeholders, traced.inputs, strict=True)})
    return dict(zip(traced.outputs, results, strict=True))


def declare_inputs(graph: Graph, example: Mapping[str, Tensor], frozen: Mapping[str, Tensor]) -> dict[str, Value]:
    """Declare each example tensor as a graph input, or as a weight where it is frozen."""
    table: dict[str, Value] = {}
    for name, tensor in example.items():
        kind = numpy_dtype(tensor.dtype)
        if name in frozen:
            table[name] = graph.weight(name, frozen[name].detach().contiguous().numpy().astype(kind, copy=False))
        else:
            table[name] = graph.input(name, tuple(tensor.shape), kind)
    return table
