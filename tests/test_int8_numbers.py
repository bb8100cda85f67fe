"""What convolutions of bytes give, to the last code, on every onnxruntime and processor: the forms that exports have, against whole numbers in numpy.

A session as an adapter has it, with copies of weights and without, and as `prepare` has onnxruntime optimise it. Sums, their rounding to codes with a
scale for each channel, and gradients are exact. Only what is normalised in float32 in between may come out as the next code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgeadapt.memory import Machine
from edgeadapt.memory.rules import _flags
from edgeadapt.runtime import region
from edgeadapt.runtime import session as sessions

pytestmark = pytest.mark.device

Array = Any
ENDS = 0, 255
MIDDLE = 128
WAYS = ("exported", "without copies", "optimised")


def levels() -> int:
    """The largest weight: kernels of x86 without dot products of bytes add two products in 16 bits, which holds no larger ones."""
    return 127 if Machine.here(1).arm or _flags() & {"avx512_vnni", "avx_vnni"} else 63


@dataclass(frozen=True)
class Case:
    """A convolution: channels in and out, window, size of its input, and how it goes over it."""

    into: int
    out: int
    window: tuple[int, ...] = (3, 3)
    size: tuple[int, ...] = (9, 8)
    stride: int = 1
    padding: int = 1
    dilation: int = 1
    groups: int = 1


CASES = {
    "first of an image": Case(3, 16),
    "wide": Case(64, 64),
    "odd": Case(22, 21),
    "of one place": Case(32, 48, (1, 1), padding=0),
    "strided": Case(16, 32, stride=2),
    "dilated": Case(16, 16, padding=2, dilation=2),
    "depthwise": Case(32, 32, groups=32),
    "grouped": Case(16, 24, groups=4),
    "over time": Case(12, 20, (5,), (30,), padding=2),
    "long sums": Case(512, 16),
}


def ran(nodes: list[Any], given: dict[str, Array], constants: dict[str, Array], outputs: list[str], way: str) -> list[Array]:
    """What a session makes of nodes."""
    inputs = [helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape) for name, array in given.items()]
    kinds = {"codes": TensorProto.UINT8}
    made = [helper.make_tensor_value_info(name, kinds.get(name.rstrip("0123456789"), TensorProto.FLOAT), None) for name in outputs]
    kept = [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, "g", inputs, made, kept)
    data = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9).SerializeToString()
    with region.using(region.Region(prepacking=way != "without copies")):
        chosen = sessions.options(1)
        if way == "optimised":
            chosen = onnxruntime.SessionOptions()
            chosen.log_severity_level = 4
        session = onnxruntime.InferenceSession(data, chosen, providers=["CPUExecutionProvider"])
        found: list[Array] = session.run(outputs, given)
    return found


def sums(x: Array, weight: Array, case: Case) -> Array:
    """A convolution of whole numbers, x (N, C_in, …) and weight (C_out, C_in / groups, …), window place by window place."""
    rank = len(case.window)
    padded = np.pad(x.astype(np.int64), [(0, 0), (0, 0), *[(case.padding, case.padding)] * rank])
    places = [(n + 2 * case.padding - case.dilation * (k - 1) - 1) // case.stride + 1 for n, k in zip(case.size, case.window)]
    grouped = padded.reshape(len(x), case.groups, -1, *padded.shape[2:])
    weights = weight.astype(np.int64).reshape(case.groups, -1, *weight.shape[1:])
    total = np.zeros((len(x), case.groups, weights.shape[1], *places), np.int64)
    for at in np.ndindex(*case.window):
        cut = tuple(slice(case.dilation * a, case.dilation * a + case.stride * (n - 1) + 1, case.stride) for a, n in zip(at, places))
        total += np.einsum("ngi...,goi->ngo...", grouped[(..., *cut)], weights[(..., *at)])
    return total.reshape(len(x), -1, *places)


def channels(values: Array, rank: int) -> Array:
    return np.reshape(values, (1, -1, *[1] * (rank - 2)))


def rounded(total: Array, unit: Array, zero: int = 0) -> Array:
    """Codes of sums that count `unit` (C,) each, in single precision; ties go to even ones."""
    scaled = total.astype(np.int32).astype(np.float32) * channels(unit, total.ndim)
    return np.clip(np.rint(scaled).astype(np.int64) + zero, *ENDS).astype(np.uint8)


def codes_of(x: Array, scale: Array, zero: int) -> Array:
    return np.clip(np.rint(x / np.float32(scale)).astype(np.int64) + zero, *ENDS).astype(np.uint8)


def attributes(case: Case) -> dict[str, Any]:
    rank = len(case.window)
    around = {"strides": [case.stride] * rank, "dilations": [case.dilation] * rank, "pads": [case.padding] * 2 * rank}
    return {**around, "kernel_shape": list(case.window), "group": case.groups}


def drawn(case: Case, seed: int = 0) -> tuple[np.random.Generator, Array]:
    """Weights, the largest at both ends in every channel."""
    random, most = np.random.default_rng(seed), levels()
    weight = random.integers(-most, most + 1, (case.out, case.into // case.groups, *case.window)).astype(np.int8)
    weight.reshape(case.out, -1)[:, :2] = -most, most
    return random, weight


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", CASES)
def test_a_convolution_of_codes_is_exact(name: str, way: str) -> None:
    """With a scale for each output channel, the zero of its grid in the bias, and both ends saturating."""
    case = CASES[name]
    random, weight = drawn(case)
    scale, zero = np.float32(0.0217), 113
    x = (2.5 * random.standard_normal((2, case.into, *case.size))).astype(np.float32)
    total = sums(codes_of(x, scale, zero).astype(np.int64) - zero, weight, case)
    reach = np.abs(total).max(tuple(axis for axis in range(total.ndim) if axis != 1)) + 1
    unit = (random.uniform(80, 200, case.out) / reach / scale).astype(np.float32)
    bias = np.rint(random.uniform(0, 200, case.out) / (scale * unit)).astype(np.int32)
    steps = random.uniform(0.01, 0.1, case.out).astype(np.float32)
    zeros = random.integers(0, 200, case.out).astype(np.uint8)
    constants = {"s": scale, "z": np.uint8(zero), "w": weight, "unit": unit, "b": bias, "steps": steps, "zeros": zeros}
    constants |= {"nothing": np.int8(0), "one": np.float32(1), "low": np.uint8(0)}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["c"]),
        helper.make_node("QLinearConv", ["c", "s", "z", "w", "unit", "nothing", "one", "low", "b"], ["codes"], **attributes(case)),
        helper.make_node("DequantizeLinear", ["codes", "steps", "zeros"], ["y"], axis=1),
    ]
    codes, y = ran(nodes, {"x": x}, constants, ["codes", "y"], way)
    want = rounded(total + channels(bias, total.ndim), scale * unit)
    assert np.array_equal(codes, want)
    assert set(ENDS) <= set(want.ravel().tolist())
    assert len(np.unique(want)) > 100
    assert np.array_equal(y, (want.astype(np.float32) - channels(zeros.astype(np.float32), y.ndim)) * channels(steps, y.ndim))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.stride == 1 and case.groups == 1])
def test_a_gradient_through_codes_is_exact(name: str, way: str) -> None:
    """With the step of this very gradient, and a reach for each channel that was measured before."""
    case = CASES[name]
    random, weight = drawn(case, 1)
    scale = random.uniform(0.5, 2, case.into).astype(np.float32)
    grad = (1e-4 * random.standard_normal((2, case.into, *case.size)) ** 3).astype(np.float32)
    scaled = grad * channels(scale, grad.ndim)
    step = np.maximum(scaled.max(), -scaled.min()) / np.float32(127)
    total = sums(codes_of(scaled, step, MIDDLE).astype(np.int64) - MIDDLE, weight, case)
    most = np.abs(total).max(tuple(axis for axis in range(total.ndim) if axis != 1))
    reach = (most / random.uniform(90, 140, case.out)).astype(np.float32)
    constants = {"scale": channels(scale, grad.ndim), "w": weight, "reach": reach, "levels": np.float32(127), "middle": np.uint8(MIDDLE)}
    constants |= {"one": np.float32(1), "nothing": np.int8(0), "middles": np.full(case.out, MIDDLE, np.uint8)}
    nodes = [
        helper.make_node("Mul", ["grad", "scale"], ["scaled"]),
        helper.make_node("ReduceMax", ["scaled"], ["high"], keepdims=0),
        helper.make_node("ReduceMin", ["scaled"], ["low"], keepdims=0),
        helper.make_node("Neg", ["low"], ["least"]),
        helper.make_node("Max", ["high", "least"], ["most"]),
        helper.make_node("Div", ["most", "levels"], ["step"]),
        helper.make_node("QuantizeLinear", ["scaled", "step", "middle"], ["c"]),
        helper.make_node("Reciprocal", ["reach"], ["unit"]),
        helper.make_node("QLinearConv", ["c", "one", "middle", "w", "unit", "nothing", "one", "middle"], ["codes"], **attributes(case)),
        helper.make_node("Mul", ["step", "reach"], ["steps"]),
        helper.make_node("DequantizeLinear", ["codes", "steps", "middles"], ["y"], axis=1),
    ]
    codes, y = ran(nodes, {"grad": grad}, constants, ["codes", "y"], way)
    want = rounded(total, np.float32(1) / reach, MIDDLE)
    assert np.array_equal(codes, want)
    assert len(np.unique(want)) > 100
    assert np.array_equal(y, (want.astype(np.float32) - MIDDLE) * channels(step * reach, y.ndim))


@pytest.mark.parametrize("way", WAYS)
def test_ties_go_to_even_codes(way: str) -> None:
    """Of values that are halves of a step, and of sums that count half a code."""
    x = np.arange(-300, 724, dtype=np.float32).reshape(1, 16, 8, 8) / 2
    weight = np.eye(16, dtype=np.int8).reshape(16, 16, 1, 1)
    constants: dict[str, Array] = {"one": np.float32(1), "low": np.uint8(0), "w": weight, "half": np.full(16, 0.5, np.float32), "nothing": np.int8(0)}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "one", "low"], ["codes0"]),
        helper.make_node("QLinearConv", ["codes0", "one", "low", "w", "half", "nothing", "one", "low"], ["codes1"], kernel_shape=[1, 1]),
    ]
    first, second = ran(nodes, {"x": x}, constants, ["codes0", "codes1"], way)
    assert np.array_equal(first, codes_of(x, 1.0, 0))
    assert np.array_equal(second, rounded(first, constants["half"]))
    assert {0, 2, 4, 254} <= set(first[x % 1 == 0.5].ravel().tolist()) <= set(range(0, 255, 2)) | {255}


@pytest.mark.parametrize("way", WAYS)
def test_codes_behind_a_normalisation_are_the_same_or_the_next(way: str) -> None:
    """A block as exports have it: values of codes, their statistics, codes with the ReLU in them, a sum with what came in, its mean."""
    case = Case(16, 16, size=(8, 8))
    random, weight = drawn(case, 2)
    x = random.standard_normal((8, 16, 8, 8)).astype(np.float32)
    into, made, grid = np.float32(0.03), random.uniform(0.02, 0.04, 16).astype(np.float32), np.float32(0.02)
    total = sums(codes_of(x, into, 128).astype(np.int64) - 128, weight, case)
    unit = (110 / np.abs(total).max((0, 2, 3)) / into).astype(np.float32)
    bias = np.rint(128 / (into * unit)).astype(np.int32)
    values = (rounded(total + channels(bias, 4), into * unit).astype(np.float64) - 128) * channels(made, 4)
    normal = (values - values.mean((0, 2, 3), keepdims=True)) / np.sqrt(values.var((0, 2, 3), keepdims=True) + 1e-5)
    behind = codes_of(normal.astype(np.float32), grid, 0)
    given = (codes_of(x, into, 128).astype(np.float64) - 128) * into
    want = (behind * np.float64(grid) + given).mean((2, 3))
    constants: dict[str, Array] = {"into": into, "middle": np.uint8(128), "w": weight, "unit": unit, "nothing": np.int8(0), "one": np.float32(1)}
    constants |= {"low": np.uint8(0), "b": bias, "made": made, "middles": np.full(16, 128, np.uint8), "grid": grid, "eps": np.float32(1e-5)}
    constants |= {"axes": np.array([0, 2, 3]), "places": np.array([2, 3])}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "into", "middle"], ["c"]),
        helper.make_node("QLinearConv", ["c", "into", "middle", "w", "unit", "nothing", "one", "low", "b"], ["d"], **attributes(case)),
        helper.make_node("DequantizeLinear", ["d", "made", "middles"], ["v"], axis=1),
        helper.make_node("ReduceMean", ["v", "axes"], ["mean"]),
        helper.make_node("Sub", ["v", "mean"], ["apart"]),
        helper.make_node("Mul", ["apart", "apart"], ["square"]),
        helper.make_node("ReduceMean", ["square", "axes"], ["variance"]),
        helper.make_node("Add", ["variance", "eps"], ["some"]),
        helper.make_node("Sqrt", ["some"], ["deviation"]),
        helper.make_node("Div", ["apart", "deviation"], ["normal"]),
        helper.make_node("QuantizeLinear", ["normal", "grid", "low"], ["codes"]),
        helper.make_node("DequantizeLinear", ["codes", "grid", "low"], ["e"]),
        helper.make_node("DequantizeLinear", ["c", "into", "middle"], ["f"]),
        helper.make_node("Add", ["e", "f"], ["sum"]),
        helper.make_node("ReduceMean", ["sum", "places"], ["y"], keepdims=0),
    ]
    codes, y = ran(nodes, {"x": x}, constants, ["codes", "y"], way)
    apart = np.abs(codes.astype(int) - behind)
    assert apart.max() <= 1
    assert (apart > 0).mean() <= 1e-3
    assert np.abs(y - want).max() <= grid / 64 + 1e-6  # one code of a channel's 64
