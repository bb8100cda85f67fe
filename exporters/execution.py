"""A graph in onnxruntime on the workstation, run as it was emitted: for folding constants and for the self-check."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import onnx
import onnxruntime
from onnx import TensorProto

from edgeadapt.exporters.ir import Array


def open_session(model: onnx.ModelProto, constants: Mapping[str, Array] | None = None, threads: int = 0) -> onnxruntime.InferenceSession:
    """A session without optimisation that runs the nodes in file order, as on the device.

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
