"""A graph in onnxruntime on the workstation, run as it was emitted: for folding constants and for the self-check."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from edgeadapt.exporters.ir import Array
from edgeadapt.runtime.eightbit import saturates

UNSIGNED, MIDDLE = ".unsigned", 128


def open_session(model: onnx.ModelProto, constants: Mapping[str, Array] | None = None, threads: int = 0) -> onnxruntime.InferenceSession:
    """A session without optimisation that runs the nodes in file order, as on the device.

    Where this processor saturates sums of products of bytes, convolutions on bytes run with weights of the same value as uint8, which is exact: what
    is computed here is what a device computes that does not saturate them.

    Args:
        model: the graph as ONNX.
        constants: its external tensors by name. They are viewed, not copied, and must outlive the session.
        threads: threads of one operator; 0 leaves the choice to onnxruntime.
    """
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED
    options.intra_op_num_threads = threads
    options.log_severity_level, options.enable_mem_pattern = 3, False
    handed = onnx.ModelProto()
    handed.CopyFrom(model)
    if any(node.op_type == "QLinearConv" for node in handed.graph.node) and saturates():
        _unsign(handed, constants or {})
    values = {}
    for tensor in handed.graph.initializer:
        if tensor.data_location == TensorProto.EXTERNAL:
            values[tensor.name] = onnxruntime.OrtValue.ortvalue_from_numpy((constants or {})[tensor.name])  # read while the session is made
            options.add_initializer(tensor.name, values[tensor.name])
            tensor.external_data[0].value = "empty"
    with tempfile.TemporaryDirectory() as folder:  # onnxruntime wants to see the file even of tensors that it is handed
        Path(folder, "empty").touch()
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
        return onnxruntime.InferenceSession(handed.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _unsign(model: onnx.ModelProto, constants: Mapping[str, Array]) -> None:
    """Gives convolutions on bytes their int8 weights and zero points as uint8, 128 more each."""
    graph, nodes = model.graph, []
    known = {tensor.name: tensor for tensor in graph.initializer}
    kinds = {value.name: value.type.tensor_type.elem_type for value in (*graph.input, *graph.value_info)}
    kinds |= {name: tensor.data_type for name, tensor in known.items()}
    done: set[str] = set()
    for node in graph.node:
        slots = (3, 5) if node.op_type == "QLinearConv" and kinds[node.input[3]] == kinds[node.input[5]] == TensorProto.INT8 else ()
        for slot in slots:
            name = node.input[slot]
            node.input[slot] = name + UNSIGNED
            if name in done:
                continue
            done.add(name)
            if name in known:
                values = constants[name] if known[name].data_location == TensorProto.EXTERNAL else numpy_helper.to_array(known[name])
                graph.initializer.append(numpy_helper.from_array((values.astype(np.int16) + MIDDLE).astype(np.uint8), name + UNSIGNED))
            else:
                nodes += _raised(graph, name)
        nodes.append(onnx.NodeProto.FromString(node.SerializeToString()))
    del graph.node[:]
    graph.node.extend(nodes)


def _raised(graph: onnx.GraphProto, name: str) -> list[onnx.NodeProto]:
    """Nodes that make uint8 of an int8 value, 128 more."""
    wide, higher, more = (f"{name}{UNSIGNED}.{part}" for part in ("wide", "higher", "more"))
    graph.initializer.append(numpy_helper.from_array(np.asarray(MIDDLE, np.int32), more))
    return [
        helper.make_node("Cast", [name], [wide], to=TensorProto.INT32),
        helper.make_node("Add", [wide, more], [higher]),
        helper.make_node("Cast", [higher], [name + UNSIGNED], to=TensorProto.UINT8),
    ]
