"""Elementwise operators: functions of one value, activations, comparisons, selection."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from edgeadapt.exporters.ir import Graph, Value
from edgeadapt.exporters.lowering.arithmetic import binary
from edgeadapt.exporters.lowering.registry import BOOL, FLOAT, broadcast, cast, floating, lift, numpy_dtype, promote, reshape, rule, typed

_ANY_NUMBER = ("Abs", "Neg", "Sign", "Relu")
_WHOLE = ("Floor", "Ceil", "Round")


def _unary(op: str, *names: str) -> None:
    @rule(*names)
    def lowered(graph: Graph, x: Value) -> Value:
        if op in _WHOLE and x.dtype.kind != "f":
            return x
        x = x if op in _ANY_NUMBER else floating(graph, x)
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
    "Asin": ("asin",),
    "Acos": ("acos",),
    "Atan": ("atan",),
    "Sinh": ("sinh",),
    "Cosh": ("cosh",),
    "Asinh": ("asinh",),
    "Acosh": ("acosh",),
    "Atanh": ("atanh",),
    "Floor": ("floor",),
    "Ceil": ("ceil",),
    "Round": ("round",),
    "Sign": ("sign", "sgn"),
    "Relu": ("relu", "relu_"),
}.items():
    _unary(_op, *_names)


@rule("round.decimals")
def round_decimals(graph: Graph, x: Value, *, decimals: int = 0) -> Value:
    """X rounded to a number of decimal digits; half to even, as torch."""
    if x.dtype.kind != "f":
        return x
    power = graph.constant(10.0 ** abs(decimals), FLOAT)
    up, down = ("Mul", "Div") if decimals >= 0 else ("Div", "Mul")
    whole = graph.op("Round", [graph.op(up, [x, power], x.shape)], x.shape)
    return graph.op(down, [whole, power], x.shape)


@rule("isnan")
def isnan(graph: Graph, x: Value) -> Value:
    """Whether each element is NaN."""
    return graph.op("IsNaN", [floating(graph, x)], x.shape, BOOL)


@rule("isinf")
def isinf(graph: Graph, x: Value) -> Value:
    """Whether each element is infinite."""
    return graph.op("IsInf", [floating(graph, x)], x.shape, BOOL)


@rule("rsqrt")
def rsqrt(graph: Graph, x: Value) -> Value:
    """1/√x."""
    x = floating(graph, x)
    return graph.op("Reciprocal", [graph.op("Sqrt", [x], x.shape)], x.shape)


@rule("square")
def square(graph: Graph, x: Value) -> Value:
    """X²."""
    return graph.op("Mul", [x, x], x.shape)


@rule("exp2")
def exp2(graph: Graph, x: Value) -> Value:
    """2 to the power x."""
    return graph.op("Exp", [binary(graph, "Mul", floating(graph, x), math.log(2))], x.shape, FLOAT)


def _near_zero(graph: Graph, x: Value, near: Value, far: Value) -> Value:
    small = graph.op("Less", [graph.op("Abs", [x], x.shape), graph.constant(0.5, FLOAT)], x.shape, BOOL)
    return graph.op("Where", [small, near, far], x.shape, FLOAT)


@rule("expm1")
def expm1(graph: Graph, x: Value) -> Value:
    """e^x − 1; near zero as 2·tanh(x/2)/(1 − tanh(x/2)), where the subtraction would lose the digits."""
    x = floating(graph, x)
    t = graph.op("Tanh", [binary(graph, "Mul", x, 0.5)], x.shape)
    near = binary(graph, "Div", binary(graph, "Mul", t, 2.0), binary(graph, "Sub", 1.0, t))
    return _near_zero(graph, x, near, binary(graph, "Sub", graph.op("Exp", [x], x.shape), 1.0))


@rule("log1p")
def log1p(graph: Graph, x: Value) -> Value:
    """log(1 + x); near zero u = 1 + x is rounded, so what the rounding lost, over u, is added."""
    x = floating(graph, x)
    u = binary(graph, "Add", x, 1.0)
    log = graph.op("Log", [u], x.shape)
    lost = binary(graph, "Sub", x, binary(graph, "Sub", u, 1.0))
    return _near_zero(graph, x, binary(graph, "Add", log, binary(graph, "Div", lost, u)), log)


@rule("log2")
def log2(graph: Graph, x: Value) -> Value:
    """Base-2 logarithm."""
    return binary(graph, "Mul", graph.op("Log", [floating(graph, x)], x.shape), 1 / math.log(2))


@rule("log10")
def log10(graph: Graph, x: Value) -> Value:
    """Base-10 logarithm."""
    return binary(graph, "Mul", graph.op("Log", [floating(graph, x)], x.shape), 1 / math.log(10))


@rule("clamp", "clamp_min")
def clamp(graph: Graph, x: Value, low: Any = None, high: Any = None, min: Any = None, max: Any = None) -> Value:
    """X limited to [low, high]; either end may be missing, a number or a tensor."""
    low, high = low if low is not None else min, high if high is not None else max
    for bound in (low, high):
        x = x if bound is None else cast(graph, x, promote(x, bound))
    if isinstance(low, Value) or isinstance(high, Value):
        x = x if low is None else binary(graph, "Max", x, low)
        return x if high is None else binary(graph, "Min", x, high)
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


@rule("softplus")
def softplus(graph: Graph, x: Value, beta: Any = 1, threshold: Any = 20) -> Value:
    """log(1 + e^(beta·x)) / beta, and x itself above the threshold; from 20 on float32 holds no difference, so that one node does."""
    scaled = x if beta == 1 else binary(graph, "Mul", x, beta)
    y = graph.op("Softplus", [scaled], x.shape)
    y = y if beta == 1 else binary(graph, "Div", y, beta)
    return y if threshold >= 20 else where(graph, binary(graph, "Greater", scaled, threshold, BOOL), x, y)


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


def _logical(op: str, logical: tuple[str, ...], bitwise: tuple[str, ...]) -> None:
    @rule(*logical)
    def of_truths(graph: Graph, a: Value, b: Any) -> Value:
        a, b = typed(graph, a, BOOL), typed(graph, b, BOOL)
        return graph.op(op, [a, b], broadcast(a.shape, b.shape), BOOL)

    @rule(*bitwise)
    def of_bits(graph: Graph, a: Value, b: Any) -> Value:
        return of_truths(graph, a, b) if promote(a, b) == BOOL else binary(graph, f"Bitwise{op}", a, b)


_logical("And", ("logical_and", "logical_and_"), ("bitwise_and", "__and__"))
_logical("Or", ("logical_or",), ("bitwise_or", "__or__"))
_logical("Xor", ("logical_xor",), ("bitwise_xor", "__xor__"))


@rule("logical_not")
def logical_not(graph: Graph, a: Value) -> Value:
    """Not a."""
    return graph.op("Not", [cast(graph, a, BOOL)], a.shape, BOOL)


@rule("bitwise_not")
def bitwise_not(graph: Graph, a: Value) -> Value:
    """Every bit of a inverted."""
    return graph.op("Not" if a.dtype == BOOL else "BitwiseNot", [a], a.shape)


@rule("where")
def where(graph: Graph, condition: Value, a: Any, b: Any) -> Value:
    """A where the condition holds, b elsewhere, in the dtype torch promotes the two to."""
    kind = promote(a, b)
    a, b = typed(graph, a, kind), typed(graph, b, kind)
    shape = broadcast(condition.shape, a.shape, b.shape)
    if kind != BOOL:
        return graph.op("Where", [condition, a, b], shape, kind)
    chosen = graph.op("And", [condition, a], broadcast(condition.shape, a.shape))
    other = graph.op("And", [logical_not(graph, condition), b], broadcast(condition.shape, b.shape))
    return graph.op("Or", [chosen, other], shape)


@rule("masked_fill")
def masked_fill(graph: Graph, x: Value, mask: Value, value: Any) -> Value:
    """X with `value` where the mask holds."""
    return where(graph, mask, lift(graph, value, x), x)


@rule("_to_copy", "_to_dtype", "convert_element_type")
def to_copy(graph: Graph, x: Value, dtype: Any = None, **_: Any) -> Value:
    """X in another dtype."""
    return x if dtype is None else cast(graph, x, numpy_dtype(dtype))


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
    """x·scale + shift per channel, in one pass: an inference BatchNormalization with mean 0 and variance 1.

    Of numbers of each frame's own, the channels are those of all frames side by side.
    """
    if scale.rank == 2:
        count = x.shape[0] * x.shape[1]
        flat = (reshape(graph, value, (count,)) for value in (scale, shift))
        return reshape(graph, scale_shift(graph, reshape(graph, x, (1, count, *x.shape[2:])), *flat), x.shape)
    zeros, ones = graph.constant(np.zeros(scale.shape, FLOAT)), graph.constant(np.ones(scale.shape, FLOAT))
    spatial = x if x.rank > 2 else reshape(graph, x, (*x.shape, 1))
    y = graph.op("BatchNormalization", [spatial, scale, shift, zeros, ones], spatial.shape, epsilon=0.0)
    return reshape(graph, y, x.shape)


@rule("forward_ends")
def forward_ends(graph: Graph, x: Value) -> Value:
    """Nothing on the device; the graph remembers what was made before."""
    graph.end_forward()
    return x
