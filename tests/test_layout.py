"""Where onnxruntime lays what operators take: in which sizes of region a graph runs, counted and tried."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
import pytest
from onnx import helper

from edgeadapt.memory import Machine, Plan, fits, footprint, quantised, read
from edgeadapt.runtime import region, session
from edgeadapt.runtime.memory import INEXACT
from tests.test_quantised import MICROSOFT, model

pytestmark = pytest.mark.device

SHAPE = [2, 16, 72, 72]
GRID = {"scale": np.float32(0.02), "zero": np.uint8(3)}
SIZES = 16


def node(op: str, inputs: list[str], outputs: list[str], **attributes: Any) -> Any:
    return helper.make_node(op, inputs, outputs, **attributes)


def bytes_of() -> Any:
    return node("QuantizeLinear", ["x", "scale", "zero"], ["q"])


def mask() -> Any:
    return node("Greater", ["x", "none"], ["mask"])


def in_bytes(out: int, kernel: int, stride: int = 1, group: int = 1) -> tuple[list[Any], dict[str, Any]]:
    weight = np.random.default_rng(0).integers(-90, 90, (out, 16 // group, kernel, kernel)).astype(np.int8)
    names = ["q", "scale", "zero", "weight", "weight_scale", "weight_zero", "scale", "zero", "bias"]
    attributes = {"kernel_shape": [kernel] * 2, "strides": [stride] * 2, "pads": [kernel // 2] * 4, "group": group}
    given = {"weight": weight, "weight_scale": np.full(out, 0.01, np.float32), "weight_zero": np.zeros(out, np.int8), "bias": np.zeros(out, np.int32)}
    return [bytes_of(), node("QLinearConv", names, ["r"], **attributes)], GRID | given


def in_floats(op: str, kernel: int, **attributes: Any) -> tuple[list[Any], dict[str, Any]]:
    weight = np.ones((16, 16, kernel, kernel), np.float32)
    return [node(op, ["x", "weight"], ["r"], pads=[kernel // 2] * 4, **attributes)], {"weight": weight}


NONE = {"none": np.float32(0)}
CASES: dict[str, tuple[list[Any], dict[str, Any]]] = {
    "of a mask and nothing": ([mask(), node("Where", ["mask", "x", "none"], ["r"])], NONE),
    "of bytes": ([bytes_of(), mask(), node("Where", ["mask", "q", "zero"], ["r"])], NONE | GRID),
    "of two tensors": ([mask(), node("Neg", ["x"], ["n"]), node("Where", ["mask", "x", "n"], ["r"])], NONE),
    "of bytes of two grids": (
        [bytes_of(), mask(), node("QLinearWhere", ["mask", "q", "scale", "zero", "q", "scale", "zero", "scale", "zero"], ["r"], domain=MICROSOFT)],
        NONE | GRID,
    ),
    "convolution": in_floats("Conv", 3),
    "strided convolution": in_floats("Conv", 3, strides=[2, 2]),
    "transposed convolution": in_floats("ConvTranspose", 3, strides=[2, 2]),
    "softmax across": ([node("Neg", ["x"], ["n"]), node("LogSoftmax", ["n"], ["r"], axis=1)], {}),
    "in place": ([node("Neg", ["x"], ["n"]), node("Clip", ["n", "none"], ["r"])], NONE),
    "two outputs": ([node("Split", ["x"], ["r", "other"], num_outputs=2, axis=1)], {}),
    "convolution of bytes": in_bytes(16, 3),
    "strided convolution of bytes": in_bytes(16, 3, 2),
    "depthwise convolution of bytes": in_bytes(16, 3, 1, 16),
    "pointwise convolution of bytes": in_bytes(16, 1),
}


TOLD = [name for name, (_, constants) in CASES.items() if not (INEXACT and "weight" in constants)]
"""Where weights are packed to is not known of onnxruntime before 1.28, so a region is tried there before it is relied on."""


@pytest.mark.parametrize("copies", [1, 3])
@pytest.mark.parametrize("name", TOLD)
def test_outputs_and_scratch_lie_where_they_are_laid_out(name: str, copies: int) -> None:
    """After the operator, something large is made: whether there is room depends on where the result came to lie."""
    nodes, constants = CASES[name]
    after = [
        node("Concat", ["x"] * copies, ["large"], axis=0),
        node("ReduceMax", ["large"], ["most"], keepdims=0),
        node("Cast", ["r"], ["floats"], to=1),
        node("ReduceMax", ["floats"], ["of_it"], keepdims=0),
        node("Add", ["most", "of_it"], ["y"]),
    ]
    data = model([*nodes, *after], {"x": (1, SHAPE)}, constants, ["y"])
    machine = Machine.here(1)
    plan, (inside, beside) = Plan(read(data), machine=machine), footprint.prepacked(read(data), machine)
    frames = {"x": np.ones(SHAPE, np.float32)}
    step = int(plan.peak * 0.8 / SIZES) // 256 * 256
    sizes = [plan.peak + 4096 * INEXACT + index * step for index in range(SIZES)]  # small constants are in it too
    counted = [fits(plan, size) for size in sizes]
    assert counted[-1]
    assert counted == [runs(data, size + inside, beside, frames) for size in sizes]


def runs(data: bytes, size: int, beside: int, frames: dict[str, Any]) -> bool:
    """Whether a graph runs in a region of that size."""
    with region.using(region.Region(size, beside + 2048)), region.LOCK:
        found = onnxruntime.InferenceSession(data, session.options(1), providers=["CPUExecutionProvider"])
        try:
            found.run(None, frames)
        except Exception as reason:  # onnxruntime's own types have no common base of theirs
            if "Available memory of" not in str(reason):
                raise
            return False
    return True


@pytest.mark.parametrize("count", [8, 120, 8 * 4099])
def test_truth_values_become_bits_and_come_back(count: int) -> None:
    """As leaner steps keep masks: eight stretches of one, a bit each. No copies are kept, so such a graph is not one on bytes."""
    truths = np.random.default_rng(count).random(count) < 0.5
    given = {
        "rows": np.array([8, count // 8], np.int64),
        "powers": (2 ** np.arange(8)[None]).astype(np.uint8),
        "each": (2 ** np.arange(8)[:, None]).astype(np.uint8),
        "flat": np.array([count], np.int64),
    }
    nodes = [
        node("Greater", ["x", "none"], ["truths"]),
        node("Reshape", ["truths", "rows"], ["shaped"]),
        node("Cast", ["shaped"], ["signed"], to=3),
        node("MatMulInteger", ["powers", "signed"], ["sums"]),
        node("Cast", ["sums"], ["bits"], to=2),
        node("BitwiseAnd", ["bits", "each"], ["masked"]),
        node("Cast", ["masked"], ["again"], to=9),
        node("Reshape", ["again", "flat"], ["flattened"]),
        node("Cast", ["flattened"], ["y"], to=1),
    ]
    data = model(nodes, {"x": (1, [count])}, NONE | given, ["y"])
    assert not quantised.present(data)
    assert "MatMulInteger" not in quantised.ON_BYTES
    found = onnxruntime.InferenceSession(data, session.options(1), providers=["CPUExecutionProvider"])
    (y,) = found.run(None, {"x": truths.astype(np.float32)})
    assert np.array_equal(y, truths.astype(np.float32))
