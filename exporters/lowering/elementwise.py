"""Elementwise operators: arithmetic, activations, comparisons, selection."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from edgeadapt.exporters.ir import Graph, Value
from edgeadapt.exporters.lowering.registry import FLOAT, broadcast, cast, lift, reshape, rule

BOOL = np.dtype(np.bool_)


def binary(graph: Graph, op: str, a: Any, b: Any, dtype: Any = None) -> Value:
    """An ONNX binary operator on values or numbers, with numpy's broadcasting and torch's promotion to float."""
    like = a if isinstance(a, Value) else b
    if isinstance(a, Value) and isinstance(b, Value):
        like = a if FLOAT == a.dtype or FLOAT != b.dtype else b
    elif isinstance(a, float) or isinstance(b, float):
        like = like if like.dtype == FLOAT else Value("", (), FLOAT)
    a, b = lift(graph, a, like), lift(graph, b, like)
    return graph.op(op, [a, b], broadcast(a.shape, b.shape), dtype or a.dtype)


@rule("add", "add_")
def add(graph: Graph, a: Any, b: Any, alpha: Any = 1) -> Value:
    """A + alpha·b."""
    return binary(graph, "Add", a, b if alpha == 1 else binary(graph, "Mul", b, alpha))


@rule("sub", "sub_")
def sub(graph: Graph, a: Any, b: Any, alpha: Any = 1) -> Value:
    """A − alpha·b."""
    return binary(graph, "Sub", a, b if alpha == 1 else binary(graph, "Mul", b, alpha))


@rule("rsub")
def rsub(graph: Graph, a: Any, b: Any, alpha: Any = 1) -> Value:
    """B − alpha·a."""
    return binary(graph, "Sub", b, a if alpha == 1 else binary(graph, "Mul", a, alpha))


def _gate(graph: Graph, mask: Value, other: Value) -> Value | None:
    return binary(graph, "Mul", other, cast(graph, mask, FLOAT)) if mask.dtype == BOOL and other.dtype == FLOAT else None


@rule("mul", "mul_")
def mul(graph: Graph, a: Any, b: Any) -> Value:
    """A·b; a boolean factor is a mask."""
    if isinstance(a, Value) and isinstance(b, Value):
        gated = _gate(graph, a, b) or _gate(graph, b, a)
        if gated is not None:
            return gated
        if a.dtype == BOOL:
            return graph.op("And", [a, b], broadcast(a.shape, b.shape))
    return binary(graph, "Mul", a, b)


@rule("div", "div_", "true_divide")
def div(graph: Graph, a: Any, b: Any, rounding_mode: str | None = None) -> Value:
    """A / b."""
    if isinstance(a, Value) and FLOAT != a.dtype and rounding_mode is None:
        a = cast(graph, a, FLOAT)
    if isinstance(b, (int, float)) and isinstance(a, Value) and a.dtype == FLOAT and rounding_mode is None and math.frexp(b)[0] in (0.5, -0.5):
        return binary(graph, "Mul", a, 1.0 / b)
    result = binary(graph, "Div", a, b)
    return graph.op("Floor", [result], result.shape) if rounding_mode == "floor" and result.dtype == FLOAT else result


@rule("fmod")
def fmod(graph: Graph, a: Any, b: Any) -> Value:
    """Remainder with the dividend's sign."""
    like = a if isinstance(a, Value) else b
    a, b = lift(graph, a, like), lift(graph, b, like)
    return graph.op("Mod", [a, b], broadcast(a.shape, b.shape), fmod=1)


@rule("maximum", "fmax")
def maximum(graph: Graph, a: Value, b: Value) -> Value:
    """Elementwise maximum."""
    return binary(graph, "Max", a, b)


@rule("minimum", "fmin")
def minimum(graph: Graph, a: Value, b: Value) -> Value:
    """Elementwise minimum."""
    return binary(graph, "Min", a, b)


@rule("pow")
def power(graph: Graph, a: Any, b: Any) -> Value:
    """A to the power b; small integer powers as products."""
    if isinstance(a, Value) and isinstance(b, (int, float)):
        if b == 2:
            return graph.op("Mul", [a, a], a.shape)
        if b == 3:
            return graph.op("Mul", [graph.op("Mul", [a, a], a.shape), a], a.shape)
        if b == 0.5:
            return graph.op("Sqrt", [a], a.shape)
        if b == -0.5:
            return graph.op("Reciprocal", [graph.op("Sqrt", [a], a.shape)], a.shape)
        if b == 1:
            return a
        if b == 0:
            return graph.constant(np.ones(a.shape, a.dtype))
    return binary(graph, "Pow", a, b)


def _unary(op: str, *names: str) -> None:
    @rule(*names)
    def lowered(graph: Graph, x: Value) -> Value:
        return graph.op(op, [x], x.shape)


for _op, _names in {
    "Abs": ("abs",),
    "Neg": ("neg",),
    "Sqrt": ("sqrt",),
    "Reciprocal": ("reciprocal", "reciprocal_"),
    "Exp": ("exp",),
    "Log": ("log",),
    "Erf": ("erf",),
    "Tanh": ("tanh",),
    "Sigmoid": ("sigmoid",),
    "Sin": ("sin",),
    "Cos": ("cos",),
    "Tan": ("tan",),
    "Atan": ("atan",),
    "Floor": ("floor",),
    "Ceil": ("ceil",),
    "Round": ("round",),
    "Sign": ("sign", "sgn"),
    "Relu": ("relu", "relu_"),
}.items():
    _unary(_op, *_names)


@rule("rsqrt")
def rsqrt(graph: Graph, x: Value) -> Value:
    """1/√x."""
    return graph.op("Reciprocal", [graph.op("Sqrt", [x], x.shape)], x.shape)


@rule("square")
def square(graph: Graph, x: Value) -> Value:
    """X²."""
    return graph.op("Mul", [x, x], x.shape)


@rule("exp2")
def exp2(graph: Graph, x: Value) -> Value:
    """2 to the power x."""
    return graph.op("Exp", [binary(graph, "Mul", x, math.log(2))], x.shape)


@rule("expm1")
def expm1(graph: Graph, x: Value) -> Value:
    """e^x − 1, as 2·tanh(x/2)/(1 − tanh(x/2)), which is exact near zero."""
    t = graph.op("Tanh", [binary(graph, "Mul", x, 0.5)], x.shape)
    return binary(graph, "Div", binary(graph, "Mul", t, 2.0), binary(graph, "Sub", 1.0, t))


@rule("log1p")
def log1p(graph: Graph, x: Value) -> Value:
    """log(1 + x)."""
    return graph.op("Log", [binary(graph, "Add", x, 1.0)], x.shape)


@rule("log2")
def log2(graph: Graph, x: Value) -> Value:
    """Base-2 logarithm."""
    return binary(graph, "Mul", graph.op("Log", [x], x.shape), 1 / math.log(2))


@rule("clamp", "clamp_min")
def clamp(graph: Graph, x: Value, low: Any = None, high: Any = None, min: Any = None, max: Any = None) -> Value:
    """X limited to [low, high]; either end may be missing."""
    low, high = low if low is not None else min, high if high is not None else max
    bounds = [None if bound is None else lift(graph, bound, x) for bound in (low, high)]
    return graph.op("Clip", [x, *bounds], x.shape)


@rule("clamp_max")
def clamp_max(graph: Graph, x: Value, high: Any) -> Value:
    """X limited from above."""
    return clamp(graph, x, None, high)


@rule("hardtanh")
def hardtanh(graph: Graph, x: Value, low: float = -1.0, high: float = 1.0) -> Value:
    """X limited to [−1, 1]."""
    return clamp(graph, x, low, high)


@rule("gelu")
def gelu(graph: Graph, x: Value, approximate: str = "none") -> Value:
    """GELU, exact or by tanh."""
    return graph.op("Gelu", [x], x.shape, approximate=approximate)


@rule("silu")
def silu(graph: Graph, x: Value) -> Value:
    """X·sigmoid(x)."""
    return graph.op("Mul", [x, graph.op("Sigmoid", [x], x.shape)], x.shape)


@rule("leaky_relu")
def leaky_relu(graph: Graph, x: Value, slope: float = 0.01) -> Value:
    """Leaky ReLU."""
    return graph.op("LeakyRelu", [x], x.shape, alpha=float(slope))


@rule("elu")
def elu(graph: Graph, x: Value, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0) -> Value:
    """scale·ELU(x)."""
    inner = x if input_scale == 1 else binary(graph, "Mul", x, input_scale)
    y = graph.op("Elu", [inner], x.shape, alpha=float(alpha) if input_scale == 1 else 1.0)
    if input_scale != 1:  # torch scales only the negative side's exponent: alpha·(exp(x·input_scale) − 1) below zero, x above
        negative = binary(graph, "Mul", graph.op("Min", [y, graph.constant(0.0, FLOAT)], x.shape), alpha)
        y = binary(graph, "Add", negative, graph.op("Relu", [x], x.shape))
    return y if scale == 1 else binary(graph, "Mul", y, scale)


@rule("threshold_backward")
def threshold_backward(graph: Graph, grad: Value, y: Value, threshold: Any) -> Value:
    """ReLU's gradient, by a boolean mask: a quarter of the saved bytes of y, and faster than Where."""
    mask = graph.op("Greater", [y, lift(graph, threshold, y)], y.shape, BOOL)
    return graph.op("Mul", [grad, cast(graph, mask, FLOAT)], grad.shape)


@rule("hardtanh_backward")
def hardtanh_backward(graph: Graph, grad: Value, x: Value, low: float, high: float) -> Value:
    """The gradient of a clamp, by a boolean mask over the open interval."""
    above = graph.op("Greater", [x, lift(graph, low, x)], x.shape, BOOL)
    below = graph.op("Less", [x, lift(graph, high, x)], x.shape, BOOL)
    mask = graph.op("And", [above, below], x.shape)
    return graph.op("Mul", [grad, cast(graph, mask, FLOAT)], grad.shape)


def _compare(op: str, *names: str) -> None:
    @rule(*names)
    def lowered(graph: Graph, a: Value, b: Any) -> Value:
        return binary(graph, op, a, b, BOOL)


for _op, _names in {"Greater": ("gt",), "GreaterOrEqual": ("ge",), "Less": ("lt",), "LessOrEqual": ("le",), "Equal": ("eq",)}.items():
    _compare(_op, *_names)


@rule("ne")
def not_equal(graph: Graph, a: Value, b: Any) -> Value:
    """A ≠ b."""
    equal = binary(graph, "Equal", a, b, BOOL)
    return graph.op("Not", [equal], equal.shape)


def _logical(op: str, *names: str) -> None:
    @rule(*names)
    def lowered(graph: Graph, a: Value, b: Value) -> Value:
        a, b = cast(graph, a, BOOL), cast(graph, b, BOOL)
        return graph.op(op, [a, b], broadcast(a.shape, b.shape), BOOL)


for _op, _names in {
    "And": ("logical_and", "logical_and_", "bitwise_and", "__and__"),
    "Or": ("logical_or", "bitwise_or", "__or__"),
    "Xor": ("logical_xor", "bitwise_xor"),
}.items():
    _logical(_op, *_names)


@rule("logical_not", "bitwise_not")
def logical_not(graph: Graph, a: Value) -> Value:
    """Not a."""
    return graph.op("Not", [cast(graph, a, BOOL)], a.shape, BOOL)


@rule("where")
def where(graph: Graph, condition: Value, a: Any, b: Any) -> Value:
    """A where the condition holds, b elsewhere."""
    like = a if isinstance(a, Value) and a.rank >= getattr(b, "rank", 0) else b if isinstance(b, Value) else a
    like = like if isinstance(like, Value) else Value("", (), FLOAT)
    a, b = lift(graph, a, like), lift(graph, b, like)
    return graph.op("Where", [condition, a, b], broadcast(condition.shape, a.shape, b.shape), a.dtype)


@rule("masked_fill")
def masked_fill(graph: Graph, x: Value, mask: Value, value: Any) -> Value:
    """X with `value` where the mask holds."""
    return where(graph, mask, lift(graph, value, x), x)


@rule("_to_copy", "_to_dtype", "convert_element_type")
def to_copy(graph: Graph, x: Value, dtype: Any = None, **_: Any) -> Value:
    """X in another dtype."""
    return x if dtype is None else cast(graph, x, numpy_dtype(dtype))


def numpy_dtype(dtype: Any) -> np.dtype[Any]:
    """A torch dtype as numpy's; double is lowered as float, which is what the device computes in."""
    name = str(dtype).removeprefix("torch.")
    return np.dtype({"bool": "bool", "float64": "float32", "float": "float32", "double": "float32"}.get(name, name))


@rule("clone", "detach", "alias", "lift_fresh_copy", "lift_fresh", "contiguous", "view_of", "detach_")
def identity(graph: Graph, x: Value, **_: Any) -> Value:
    """No node: values are never written into."""
    return x


@rule("copy", "copy_")
def copy(graph: Graph, destination: Value, source: Value, *_: Any) -> Value:
    """The source, broadcast to the destination's shape."""
    source = cast(graph, source, destination.dtype)
    if source.shape == destination.shape:
        return source
    return graph.op("Expand", [source, graph.ints(destination.shape)], destination.shape)


@rule("_assert_tensor_metadata", "_assert_scalar")
def nothing(graph: Graph, *_: Any, **__: Any) -> None:
    """A check made when the model was traced."""


@rule("scalar_tensor")
def scalar_tensor(graph: Graph, value: Any, dtype: Any = None, **_: Any) -> Value:
    """A scalar constant."""
    return graph.constant(np.asarray(value, dtype=numpy_dtype(dtype) if dtype is not None else FLOAT))


@rule("scale_shift")
def scale_shift(graph: Graph, x: Value, scale: Value, shift: Value) -> Value:
    """x·scale + shift per channel, in one pass: an inference BatchNormalization with mean 0 and variance 1."""
    zeros, ones = graph.constant(np.zeros(scale.shape, FLOAT)), graph.constant(np.ones(scale.shape, FLOAT))
    spatial = x if x.rank > 2 else reshape(graph, x, (*x.shape, 1))
    y = graph.op("BatchNormalization", [spatial, scale, shift, zeros, ones], spatial.shape, epsilon=0.0)
    return reshape(graph, y, x.shape)
