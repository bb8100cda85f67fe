"""Arithmetic in 8 bits (`edgeadapt.exporters.quantise.operators`) as QuantizeLinear, QLinearConv and DequantizeLinear."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from edgeadapt.exporters.ir import Graph, Value
from edgeadapt.exporters.lowering.arithmetic import binary
from edgeadapt.exporters.lowering.convolution import deconvolve
from edgeadapt.exporters.lowering.registry import BOOL, reduce, reshape, rule
from edgeadapt.exporters.lowering.shapes import cut
from edgeadapt.exporters.quantise.operators import CODES, LEVELS, MIDDLE, TINY
from edgeadapt.exporters.stretches import stretches

CODE = np.dtype(np.uint8)
ROWS = 2**18
"""Numbers of a stored weight that are made into float32 at once, where `PIECES` at most do."""
PIECES = 64


def _rows(graph: Graph, codes: Value, back: bool = False) -> list[tuple[int, int, Value]]:
    """Pieces of a stored weight, in float32, with the outputs that they begin and end at.

    back: for a gradient. Its nodes are written otherwise, and mean the same: merged with the forward pass's, every piece would live between the two.
    """
    one, nothing, found = graph.constant(1.0, np.float32), graph.constant(0, np.int8), []
    for start, end in stretches(codes.shape[0], int(np.prod(codes.shape)), ROWS, PIECES):
        piece = cut(graph, codes, -codes.rank if back else 0, start, end)
        how = {"axis": 0} if back else {}
        found.append((start, end, graph.op("DequantizeLinear", [piece, one, nothing], piece.shape, np.float32, **how)))
    return found


def _summed(graph: Graph, scaled: Value, codes: Value, product: Callable[[Value, Value], Value]) -> Value:
    """The gradient behind a stored weight: the products of its pieces with their channels of the gradient before it, which add up."""
    terms = (product(cut(graph, scaled, 1, start, end), piece) for start, end, piece in _rows(graph, codes, True))
    return functools.reduce(lambda total, term: graph.op("Add", [total, term], term.shape), terms)


@rule("to_codes")
def to_codes(graph: Graph, x: Value, scale: Value, zero: Value) -> Value:
    """uint8 codes of x on a grid, the same for all or one for each channel."""
    axis = {"axis": 1} if scale.rank else {}
    return graph.op("QuantizeLinear", [x, scale, zero], x.shape, CODE, **axis)


@rule("from_codes")
def to_values(graph: Graph, codes: Value, scale: Value, zero: Value, axis: int = 1) -> Value:
    """What codes stand for, float32."""
    where = {"axis": axis} if scale.rank else {}
    return graph.op("DequantizeLinear", [codes, scale, zero], codes.shape, scale.dtype, **where)


@rule("quantise")
def quantise(graph: Graph, x: Value, scale: Value, zero: Value) -> Value:
    """x rounded to a grid."""
    return to_values(graph, to_codes(graph, x, scale, zero), scale, zero)


@rule("quantised_relu")
def quantised_relu(graph: Graph, x: Value, scale: Value, zero: Value, both: bool) -> tuple[Value, Value]:
    """x rounded to a grid that begins at zero, and the mask of its gradient, which is made from the codes."""
    codes = to_codes(graph, x, scale, zero)
    mask = graph.op("Greater", [codes, graph.constant(0, CODE)], x.shape, BOOL)
    if both:
        mask = graph.op("And", [mask, graph.op("Less", [codes, graph.constant(CODES, CODE)], x.shape, BOOL)], x.shape, BOOL)
    return to_values(graph, codes, scale, zero), mask


@rule("quantised_convolution")
def quantised_convolution(
    graph: Graph,
    x: Value,
    weight: Value,
    weight_scale: Value,
    input_scale: Value,
    input_zero: Value,
    scale: Value,
    bias: Value,
    output_scale: Value,
    output_zero: Value,
    turned: Value | None,
    reach: Value | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
) -> Value:
    """Codes in, codes out; see the operator."""
    kernel = weight.shape[2:]
    size = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, p, d, k, s in zip(x.shape[2:], padding, dilation, kernel, stride, strict=True)]
    one, nothing = graph.constant(1.0, scale.dtype), graph.constant(0, CODE)
    codes = graph.op(
        "QLinearConv",
        [to_codes(graph, x, input_scale, input_zero), input_scale, input_zero, weight, scale, graph.constant(0, np.int8), one, nothing, bias],
        (x.shape[0], weight.shape[0], *size),
        CODE,
        kernel_shape=list(kernel),
        strides=list(stride),
        pads=[*padding, *padding],
        dilations=list(dilation),
        group=groups,
    )
    return to_values(graph, codes, output_scale, output_zero)


@rule("dequantised_convolution_backward")
def dequantised_convolution_backward(
    graph: Graph, grad: Value, weight: Value, weight_scale: Value, size: Any, stride: Any, padding: Any, dilation: Any, groups: int
) -> Value:
    """The gradient of the input, by a transposed convolution with the real weights, which exist for its time alone.

    Of a large weight a piece of the output's channels is made at a time, and the results add up.
    """
    count = int(np.prod(weight.shape))
    if groups == 1 and count > ROWS:
        scaled = binary(graph, "Mul", grad, reshape(graph, weight_scale, (1, weight_scale.shape[0], *[1] * (grad.rank - 2))))
        how = (None, stride, padding, dilation, groups, [int(n) for n in size])
        return _summed(graph, scaled, weight, lambda given, piece: deconvolve(graph, given, piece, *how))
    real = to_values(graph, weight, weight_scale, graph.constant(np.zeros(weight_scale.shape, np.int8)), 0)
    return deconvolve(graph, grad, real, None, stride, padding, dilation, groups, [int(n) for n in size])


@rule("quantised_convolution_backward")
def quantised_convolution_backward(
    graph: Graph, grad: Value, turned: Value, weight_scale: Value, reach: Value, padding: Any, dilation: Any, groups: int
) -> Value:
    """Codes in, codes out, with the step of this gradient; see the operator."""
    axes = [axis for axis in range(grad.rank) if axis != 1]
    highest, lowest = (reduce(graph, op, grad, axes, False) for op in ("ReduceMax", "ReduceMin"))
    largest = binary(graph, "Max", highest, graph.op("Neg", [lowest], lowest.shape))
    most = binary(graph, "Max", reduce(graph, "ReduceMax", binary(graph, "Mul", largest, weight_scale), None, False), TINY)
    step = binary(graph, "Div", most, float(LEVELS))
    grid = binary(graph, "Div", step, weight_scale)
    given = to_codes(graph, grad, grid, graph.constant(np.full(grid.shape, MIDDLE), CODE))
    kernel, middle = turned.shape[2:], graph.constant(MIDDLE, CODE)
    size = [n + 2 * p - d * (k - 1) for n, p, d, k in zip(grad.shape[2:], padding, dilation, kernel, strict=True)]
    one = graph.constant(1.0, grad.dtype)
    weight_step = graph.op("Reciprocal", [reach], reach.shape)
    codes = graph.op(
        "QLinearConv",
        [given, one, middle, turned, weight_step, graph.constant(0, np.int8), one, middle],
        (grad.shape[0], turned.shape[0], *size),
        CODE,
        kernel_shape=list(kernel),
        strides=[1] * len(size),
        pads=[*padding, *padding],
        dilations=list(dilation),
        group=groups,
    )
    scale = binary(graph, "Mul", step, reach)
    return to_values(graph, codes, scale, graph.constant(np.full(scale.shape, MIDDLE), CODE))


@rule("stored_linear")
def stored_linear(graph: Graph, x: Value, codes: Value, scale: Value, bias: Value | None) -> Value:
    """Products with a piece of the outputs at a time; scale and bias come last."""
    rows = reshape(graph, x, (int(np.prod(x.shape[:-1])), x.shape[-1]))
    count = rows.shape[0]
    parts = [graph.op("Gemm", [rows, piece], (count, end - start), transB=1) for start, end, piece in _rows(graph, codes)]
    y = parts[0] if len(parts) == 1 else graph.op("Concat", parts, (count, codes.shape[0]), axis=1)
    y = binary(graph, "Mul", y, scale)
    y = y if bias is None else binary(graph, "Add", y, bias)
    return reshape(graph, y, (*x.shape[:-1], codes.shape[0]))


@rule("stored_linear_backward")
def stored_linear_backward(graph: Graph, grad: Value, codes: Value, scale: Value) -> Value:
    """Products with a piece of the outputs at a time, which add up."""
    scaled = binary(graph, "Mul", reshape(graph, grad, (int(np.prod(grad.shape[:-1])), grad.shape[-1])), scale)
    total = _summed(graph, scaled, codes, lambda given, piece: graph.op("MatMul", [given, piece], (scaled.shape[0], codes.shape[1])))
    return reshape(graph, total, (*grad.shape[:-1], codes.shape[1]))
