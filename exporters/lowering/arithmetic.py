"""Arithmetic of two values or numbers, with torch's broadcasting, promotion and rounding."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from edgeadapt.exporters.ir import Graph, Value
from edgeadapt.exporters.lowering.registry import BOOL, FLOAT, INT, broadcast, cast, promote, rule, typed

_OF_TRUTHS = {"Add": "Or", "Max": "Or", "Mul": "And", "Min": "And", "Equal": "Equal"}


def binary(graph: Graph, op: str, a: Any, b: Any, dtype: Any = None) -> Value:
    """An ONNX binary operator on values or numbers in the dtype that torch promotes them to; `dtype`: that of the result, where it is another."""
    kind = promote(a, b)
    if kind == BOOL and op in _OF_TRUTHS:
        op = _OF_TRUTHS[op]
    elif kind == BOOL:
        kind = INT
    a, b = typed(graph, a, kind), typed(graph, b, kind)
    return graph.op(op, [a, b], broadcast(a.shape, b.shape), dtype or kind)


def _times(graph: Graph, value: Any, alpha: Any) -> Any:
    if alpha == 1:
        return value
    return binary(graph, "Mul", value, alpha) if isinstance(value, Value) else value * alpha


@rule("add", "add_")
def add(graph: Graph, a: Any, b: Any, alpha: Any = 1) -> Value:
    """A + alpha·b."""
    return binary(graph, "Add", a, _times(graph, b, alpha))


@rule("sub", "sub_")
def sub(graph: Graph, a: Any, b: Any, alpha: Any = 1) -> Value:
    """A − alpha·b."""
    return binary(graph, "Sub", a, _times(graph, b, alpha))


@rule("rsub")
def rsub(graph: Graph, a: Any, b: Any, alpha: Any = 1) -> Value:
    """B − alpha·a."""
    return binary(graph, "Sub", b, _times(graph, a, alpha))


@rule("mul", "mul_")
def mul(graph: Graph, a: Any, b: Any) -> Value:
    """A·b; a boolean factor is a mask."""
    return binary(graph, "Mul", a, b)


@rule("div", "div_", "true_divide")
def div(graph: Graph, a: Any, b: Any, rounding_mode: str | None = None) -> Value:
    """A / b, as it is or rounded towards zero ("trunc") or down ("floor")."""
    kind = promote(a, b)
    if rounding_mode == "floor":
        return floor_divide(graph, a, b)
    if rounding_mode == "trunc" and kind.kind != "f":
        return binary(graph, "Div", a, b)  # ONNX divides integers towards zero
    if kind.kind != "f":
        a, b = typed(graph, a, FLOAT), typed(graph, b, FLOAT) if isinstance(b, Value) else float(b)
    if isinstance(b, (int, float)) and rounding_mode is None and math.frexp(b)[0] in (0.5, -0.5):
        return binary(graph, "Mul", a, 1.0 / b)
    quotient = binary(graph, "Div", a, b)
    return quotient if rounding_mode is None else trunc(graph, quotient)


@rule("trunc", "fix")
def trunc(graph: Graph, x: Value) -> Value:
    """X rounded towards zero."""
    if x.dtype.kind != "f":
        return x
    size = graph.op("Floor", [graph.op("Abs", [x], x.shape)], x.shape)
    return graph.op("Mul", [graph.op("Sign", [x], x.shape), size], x.shape)


def _against(graph: Graph, rest: Value, divisor: Value) -> Value:
    """Where a remainder is not zero and its sign is not the divisor's, as ones."""
    zero = graph.constant(0, rest.dtype)
    differ = graph.op("Xor", [binary(graph, "Less", rest, zero, BOOL), binary(graph, "Less", divisor, zero, BOOL)], rest.shape, BOOL)
    some = graph.op("Not", [binary(graph, "Equal", rest, zero, BOOL)], rest.shape, BOOL)
    return cast(graph, graph.op("And", [some, differ], rest.shape, BOOL), rest.dtype)


def _divided(graph: Graph, a: Any, b: Any) -> tuple[Value, Value, Value]:
    """Both as numbers of one kind, and Mod of them: of integers with the divisor's sign, of floats with the dividend's."""
    kind = promote(a, b)
    kind = INT if kind == BOOL else kind
    a, b = typed(graph, a, kind), typed(graph, b, kind)
    return a, b, graph.op("Mod", [a, b], broadcast(a.shape, b.shape), fmod=int(kind.kind == "f"))


@rule("floor_divide")
def floor_divide(graph: Graph, a: Any, b: Any) -> Value:
    """A / b rounded down, by way of the exact remainder, as torch: 1 // 0.1 is 9 although 1 / 0.1 rounds to 10."""
    a, b, rest = _divided(graph, a, b)
    kind = rest.dtype
    quotient = binary(graph, "Div", binary(graph, "Sub", a, rest), b)
    if kind.kind != "f":
        return quotient  # the integer remainder has the divisor's sign
    below = binary(graph, "Sub", quotient, _against(graph, rest, b))
    whole = graph.op("Round", [below], below.shape)
    if b.name in graph.constants and graph.constants[b.name].all():
        return whole
    by_zero = binary(graph, "Equal", b, 0.0, BOOL)
    return graph.op("Where", [by_zero, binary(graph, "Div", a, b), whole], whole.shape, kind)


@rule("remainder")
def remainder(graph: Graph, a: Any, b: Any) -> Value:
    """Remainder with the divisor's sign."""
    _, b, rest = _divided(graph, a, b)
    return rest if rest.dtype.kind != "f" else binary(graph, "Add", rest, binary(graph, "Mul", _against(graph, rest, b), b))


@rule("fmod")
def fmod(graph: Graph, a: Any, b: Any) -> Value:
    """Remainder with the dividend's sign."""
    kind = promote(a, b)
    a, b = typed(graph, a, kind), typed(graph, b, kind)
    return graph.op("Mod", [a, b], broadcast(a.shape, b.shape), fmod=1)


@rule("maximum", "fmax", "max.other")
def maximum(graph: Graph, a: Value, b: Value) -> Value:
    """Elementwise maximum."""
    return binary(graph, "Max", a, b)


@rule("minimum", "fmin", "min.other")
def minimum(graph: Graph, a: Value, b: Value) -> Value:
    """Elementwise minimum."""
    return binary(graph, "Min", a, b)


@rule("pow")
def power(graph: Graph, a: Any, b: Any) -> Value:
    """A to the power b; small integer powers as products."""
    if isinstance(a, Value) and isinstance(b, (int, float)):
        a = cast(graph, a, promote(a, b))
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
