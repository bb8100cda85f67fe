"""Whether this processor adds products of 8-bit numbers as it should."""

from __future__ import annotations

from functools import cache

import onnxruntime

CHANNELS, LARGEST, SCALE = 16, 127, 4096
PROBE = bytes.fromhex(
    "08093adb010a2e0a01780a0278730a02787a0a01770a0277730a02777a0a0279730a02797a120179220b514c696e656172436f6e76120373756d2a0c1001420278734a040000803f"
    "2a0910024202787a4a01002a1f080108100801080110034201774a107f7f7f7f7f7f7f7f7f7f7f7f7f7f7f7f2a0c1001420277734a040000803f2a0910034202777a4a01002a0c10"
    "01420279734a04000080452a0910024202797a4a01005a1b0a017812160a14080212100a0208010a0208100a0208010a020801621b0a017912160a14080212100a0208010a020801"
    "0a0208010a02080142040a001012"
)
"""An ONNX model without sizes or names from outside: a QLinearConv of uint8 with int8 weights, one position of `CHANNELS` channels, weights that are
all `LARGEST`, and an output's scale of `SCALE`. `tests/test_eightbit.py` makes it anew."""


@cache
def saturates() -> bool:
    """Whether sums of two products of a uint8 with an int8 end at 16 bits here, and convolutions on bytes with int8 weights come out wrong.

    x86-64 processors before VNNI do so (`vpmaddubsw`; see onnxruntime's documentation of quantization, U8S8). With uint8 weights nothing saturates.
    """
    import numpy as np

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(PROBE, options, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": np.full((1, CHANNELS, 1, 1), 255, np.uint8)})
    return int(found.item()) != round(255 * LARGEST * CHANNELS / SCALE)
