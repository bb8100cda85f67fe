"""A graph written out as an ONNX model, its large constants outside."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgeadapt.exporters.ir import IR_VERSION, OPSET, Array, Graph, Node

INLINE_BYTES = 1024


class Weights(Protocol):
    """Where large constants go: `add` stores an array and returns its absolute offset in the bundle and its length in bytes."""

    location: str

    def add(self, array: Array) -> tuple[int, int]:
        """Store an array once; equal arrays share one place."""
        ...


def _attribute(value: Any) -> Any:
    if isinstance(value, np.dtype):
        return helper.np_dtype_to_tensor_dtype(value)
    return [int(item) for item in value] if isinstance(value, (list, tuple)) else value


def _proto(node: Node, index: int) -> onnx.NodeProto:
    attributes = {key: _attribute(value) for key, value in node.attributes.items()}
    return helper.make_node(node.op, node.inputs, node.outputs, name=f"{index}:{node.module}" if node.module else str(index), **attributes)


def _external(name: str, array: Array, weights: Weights) -> TensorProto:
    offset, length = weights.add(array)
    tensor = TensorProto(name=name, data_type=helper.np_dtype_to_tensor_dtype(array.dtype), dims=array.shape, data_location=TensorProto.EXTERNAL)
    for key, value in (("location", weights.location), ("offset", str(offset)), ("length", str(length))):
        tensor.external_data.add(key=key, value=value)
    return tensor


def to_onnx(graph: Graph, weights: Weights | None = None) -> onnx.ModelProto:
    """The graph as a checked ONNX model; constants of 1 KiB and more go to `weights`, or stay inside where it is None.

    The sizes of a Split stay inside, however many these are: onnxruntime infers shapes from them before it has read what lies elsewhere.
    """
    used = {name for node in graph.nodes for name in node.inputs if name}
    sizes = {name for node in graph.nodes if node.op == "Split" for name in node.inputs[1:]}
    initialisers = []
    for name, array in graph.constants.items():
        if name not in used:
            continue
        if weights is None or name in sizes or array.nbytes < INLINE_BYTES:
            initialisers.append(numpy_helper.from_array(array, name))
        else:
            initialisers.append(_external(name, array, weights))

    def info(name: str) -> onnx.ValueInfoProto:
        value = graph.values[name]
        return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)

    produced = [out for node in graph.nodes for out in node.outputs if out not in graph.outputs]
    proto = helper.make_graph(
        [_proto(node, index) for index, node in enumerate(graph.nodes)],
        graph.name,
        [info(name) for name in graph.inputs],
        [info(name) for name in graph.outputs],
        initialisers,
        value_info=[info(name) for name in produced],
    )
    model = helper.make_model(proto, producer_name="edgeadapt", opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    onnx.checker.check_model(model if weights is None else _without_data(model), full_check=True)
    return model


def _without_data(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy whose external tensors are empty graph inputs, so that the checker need not find the weights."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    external = [tensor for tensor in copy.graph.initializer if tensor.data_location == TensorProto.EXTERNAL]
    for tensor in external:
        copy.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
        copy.graph.initializer.remove(tensor)
    return copy
