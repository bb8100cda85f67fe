"""Convolutions and their gradients, in the forms that measured fastest on stock onnxruntime.

Input gradient: ConvTranspose with the weight as it is stored, so no flipped copy exists. Weight gradient: for each kernel tap one matrix
product of the shifted input with the output gradient (2 to 8 times faster than the textbook convolution with batch and channel swapped).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from edgeadapt.exporters.ir import Graph, Value
from edgeadapt.exporters.lowering.arithmetic import binary
from edgeadapt.exporters.lowering.registry import reduce, reduce_sum, reshape, rule, transpose
from edgeadapt.exporters.lowering.shapes import cat, cut, pad

PIECE = 2**22
"""Bytes of a batch that a weight gradient takes at once; larger ones take longer, as they leave the cache."""


def _spread(values: Any, rank: int) -> list[int]:
    values = [int(value) for value in values]
    return values * rank if len(values) == 1 and rank > 1 else values


def convolve(
    graph: Graph, x: Value, weight: Value, bias: Value | None, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int
) -> Value:
    """A Conv node; weight is (C_out, C_in / groups, …)."""
    kernel = weight.shape[2:]
    size = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, p, d, k, s in zip(x.shape[2:], padding, dilation, kernel, stride, strict=True)]
    return graph.op(
        "Conv",
        [x, weight, bias],
        (x.shape[0], weight.shape[0], *size),
        kernel_shape=list(kernel),
        strides=list(stride),
        pads=[*padding, *padding],
        dilations=list(dilation),
        group=groups,
    )


def deconvolve(
    graph: Graph,
    x: Value,
    weight: Value,
    bias: Value | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    size: Sequence[int],
) -> Value:
    """A ConvTranspose node with the given output size; weight is (C_in, C_out / groups, …).

    An output larger by a stride or more (which torch allows with a dilation) crops less at the end, and has the bias alone beyond that.
    """
    kernel = weight.shape[2:]
    natural = [(n - 1) * s - 2 * p + d * (k - 1) + 1 for n, s, p, d, k in zip(x.shape[2:], stride, padding, dilation, kernel, strict=True)]
    extra = [want - have for want, have in zip(size, natural, strict=True)]
    if any(e >= s for e, s in zip(extra, stride, strict=True)):
        wide = [(n - 1) * s + d * (k - 1) + 1 for n, s, d, k in zip(x.shape[2:], stride, dilation, kernel, strict=True)]
        whole = deconvolve(graph, x, weight, None, stride, [0] * len(wide), dilation, groups, wide)
        placed = pad(graph, whole, {axis + 2: (-p, want + p - n) for axis, (p, want, n) in enumerate(zip(padding, size, wide, strict=True))})
        return placed if bias is None else binary(graph, "Add", placed, reshape(graph, bias, (1, *bias.shape, *[1] * len(wide))))
    y = graph.op(
        "ConvTranspose",
        [x, weight, bias],
        (x.shape[0], weight.shape[1] * groups, *size),
        kernel_shape=list(kernel),
        strides=list(stride),
        pads=[*padding, *padding],
        dilations=list(dilation),
        group=groups,
        output_padding=[max(e, 0) for e in extra],
    )
    return y


@rule("convolution")
def convolution(
    graph: Graph,
    x: Value,
    weight: Value,
    bias: Value | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
) -> Value:
    """A convolution or transposed convolution."""
    rank = x.rank - 2
    stride, padding, dilation, output_padding = (_spread(values, rank) for values in (stride, padding, dilation, output_padding))
    if not transposed:
        return convolve(graph, x, weight, bias, stride, padding, dilation, groups)
    size = [
        (n - 1) * s - 2 * p + d * (k - 1) + 1 + o
        for n, s, p, d, k, o in zip(x.shape[2:], stride, padding, dilation, weight.shape[2:], output_padding, strict=True)
    ]
    return deconvolve(graph, x, weight, bias, stride, padding, dilation, groups, size)


def weight_gradient(
    graph: Graph, grad: Value, x: Value, shape: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int
) -> Value:
    """Gradient (C_out, C_in / groups, …) of a convolution's weight, given the output's gradient and the input.

    For each tap of the kernel the input is shifted and multiplied with the gradient. Large batches are taken in pieces that add up, so that what
    is padded, shifted and turned stays small. Of a kernel of one tap the product is the weight's own, and need not be turned.
    """
    batch, c_out, c_in, kernel, out = grad.shape[0], grad.shape[1], x.shape[1], list(shape[2:]), grad.shape[2:]
    positions, sizes = int(np.prod(out)), zip(padding, out, stride, dilation, kernel, x.shape[2:], strict=True)
    around = {axis + 2: (p, max(0, (o - 1) * s + d * (k - 1) + 1 - n - p)) for axis, (p, o, s, d, k, n) in enumerate(sizes)}
    largest = max(x.nbytes, grad.nbytes)
    pieces = next(count for count in range(1, batch + 1) if batch % count == 0 and (largest // count <= PIECE or count == batch))
    depthwise, rows, columns, piece = c_in == groups, c_in // groups, c_out // groups, batch // pieces
    single = not depthwise and math.prod(kernel) == 1
    total: Value | None = None
    for start in range(0, batch, piece):
        padded = pad(graph, cut(graph, x, 0, start, start + piece), around)
        part = cut(graph, grad, 0, start, start + piece)
        left = reshape(graph, part, (piece, groups, columns, positions)) if depthwise else reshape(graph, part, (piece * groups, columns, positions))
        if not (depthwise or single):
            left = transpose(graph, left, [0, 2, 1])  # once, shared by all taps
        taps = []
        for tap in itertools.product(*map(range, kernel)):
            window = _window(graph, padded, tap, out, stride, dilation)
            if depthwise:
                right = reshape(graph, window, (piece, groups, 1, positions))
                taps.append(reshape(graph, reduce_sum(graph, graph.op("Mul", [left, right], left.shape), [0, 3]), (1, groups, 1, columns)))
                continue
            right = reshape(graph, window, (piece * groups, rows, positions))
            pair, matrix = ([left, transpose(graph, right, [0, 2, 1])], (columns, rows)) if single else ([right, left], (rows, columns))
            product = graph.op("MatMul", pair, (piece * groups, *matrix))
            taps.append(reduce(graph, "ReduceSum", reshape(graph, product, (piece, groups, *matrix)), [0], True))
        stacked = cat(graph, taps, 0)  # (taps, groups, C_in / groups, C_out / groups), the last two exchanged for one tap
        total = stacked if total is None else binary(graph, "Add", total, stacked)
    assert total is not None
    return reshape(graph, total if single else transpose(graph, total, [1, 3, 2, 0]), shape)


def _window(graph: Graph, padded: Value, tap: Sequence[int], out: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> Value:
    """What a tap of the kernel meets of the padded input: (N, C, *out)."""
    starts = [t * d for t, d in zip(tap, dilation, strict=True)]
    ends = [start + (o - 1) * s + 1 for start, o, s in zip(starts, out, stride, strict=True)]
    if not any(start or end != n or s != 1 for start, end, n, s in zip(starts, ends, padded.shape[2:], stride, strict=True)):
        return padded
    axes = list(range(2, padded.rank))
    return graph.op("Slice", [padded, *(graph.ints(v) for v in (starts, ends, axes, stride))], (*padded.shape[:2], *out))


@rule("convolution_backward")
def convolution_backward(
    graph: Graph,
    grad: Value,
    x: Value,
    weight: Value,
    bias_sizes: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
    mask: Any,
) -> tuple[Value | None, ...]:
    """Gradients of a convolution's input, weight and bias, as far as `mask` asks."""
    rank = x.rank - 2
    stride, padding, dilation = (_spread(values, rank) for values in (stride, padding, dilation))
    to_input = to_weight = to_bias = None
    if mask[0] and not transposed:
        to_input = deconvolve(graph, grad, weight, None, stride, padding, dilation, groups, x.shape[2:])
    elif mask[0]:
        to_input = convolve(graph, grad, weight, None, stride, padding, dilation, groups)
        for axis in range(2, x.rank):  # an output padding of a stride or more reaches positions that no input has
            to_input = cut(graph, to_input, axis, 0, x.shape[axis])
    if mask[1]:
        pair = (x, grad) if transposed else (grad, x)
        to_weight = weight_gradient(graph, *pair, weight.shape, stride, padding, dilation, groups)
    if mask[2]:
        to_bias = reduce_sum(graph, grad, [0, *range(2, grad.rank)])
    return to_input, to_weight, to_bias
