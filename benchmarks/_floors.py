"""What a process costs before it does anything: interpreter, numpy and one library, with a trivial piece of work done.

Arguments: torch, or onnxruntime and the path of a trivial model.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks._turns import serve


def torch_floor() -> None:
    import numpy as np
    import torch

    torch.from_numpy(np.ones(4, np.float32)).add(1)


def onnxruntime_floor(path: str) -> None:
    import numpy as np
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    session.run(None, {"x": np.ones(4, np.float32)})


def trivial_model(path: str) -> None:
    """Write a graph of one operator."""
    import onnx
    from onnx import TensorProto, helper

    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [4]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "trivial", [x], [y])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), path)


if __name__ == "__main__":
    if sys.argv[1] == "torch":
        torch_floor()
    else:
        onnxruntime_floor(sys.argv[2])
    serve(lambda: None)
