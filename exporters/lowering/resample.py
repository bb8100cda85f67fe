"""Pooling, padding by reflection and resampling.

Everything here but max pooling is linear and separable: along each axis a fixed matrix. Where ONNX has the forward operator we use it; gradients
(and rarer forms) are products with those matrices, which are read off torch itself by feeding it unit vectors, so that every option and rounding
rule is exactly torch's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from edgeadapt.exporters.ir import Array, Graph, Value
from edgeadapt.exporters.lowering.reductions import matmul
from edgeadapt.exporters.lowering.registry import FLOAT, reduce, reshape, rule
from edgeadapt.exporters.lowering.shapes import expand, pad

aten = torch.ops.aten


def apply_matrices(graph: Graph, x: Value, matrices: Sequence[Array]) -> Value:
    """Multiply each trailing axis of x by its matrix (size out × size in)."""
    first = x.rank - len(matrices)
    for offset, matrix in enumerate(matrices):
        if matrix.shape[0] == matrix.shape[1] and np.array_equal(matrix, np.eye(len(matrix), dtype=matrix.dtype)):
            continue
        if first + offset == x.rank - 1:
            x = matmul(graph, x, graph.constant(np.ascontiguousarray(matrix.T), FLOAT))
        elif first + offset == x.rank - 2:
            x = matmul(graph, graph.constant(matrix, FLOAT), x)
        else:
            shape = x.shape
            flat = reshape(graph, x, (*shape[: first + offset + 1], int(np.prod(shape[first + offset + 1 :]))))
            x = matmul(graph, graph.constant(matrix, FLOAT), flat)
            x = reshape(graph, x, (*shape[: first + offset], len(matrix), *shape[first + offset + 1 :]))
    return x


def probe(operator: Any, spatial: Sequence[int], *args: Any) -> list[Array]:
    """The matrices of a separable torch operator whose weights sum to one, read off by unit vectors along each axis."""
    matrices = []
    for axis, size in enumerate(spatial):
        unit = torch.eye(size).reshape(size, 1, *[size if k == axis else 1 for k in range(len(spatial))])
        image = operator(unit.expand(size, 1, *spatial).contiguous(), *args)
        line = image.movedim(axis + 2, -1)[:, 0].reshape(size, -1, image.shape[axis + 2])[:, 0]
        matrices.append(line.T.contiguous().numpy().astype(np.float32))
    return matrices


def _average_matrix(size: int, kernel: int, stride: int, padding: int, ceil: bool, count_pad: bool) -> Array:
    out = -(-(size + 2 * padding - kernel) // stride) + 1 if ceil else (size + 2 * padding - kernel) // stride + 1
    if ceil and (out - 1) * stride >= size + padding:
        out -= 1
    matrix = np.zeros((out, size), np.float32)
    for row in range(out):
        start = row * stride - padding
        end = min(start + kernel, size + padding)
        inside = slice(max(start, 0), min(end, size))
        matrix[row, inside] = 1.0 / ((end - start) if count_pad else (inside.stop - inside.start))
    return matrix


def _windows(kernel: Any, stride: Any, padding: Any, rank: int) -> tuple[list[int], list[int], list[int]]:
    lists = [[int(v) for v in values] for values in (kernel, stride or kernel, padding)]
    full = [values * rank if len(values) == 1 else values for values in lists]
    return full[0], full[1], full[2]


def _averages(spatial: Sequence[int], kernel: Any, stride: Any, padding: Any, ceil: bool, count_pad: bool, divisor: Any) -> list[Array]:
    windows = _windows(kernel, stride, padding, len(spatial))
    matrices = [_average_matrix(n, k, s, p, ceil, True if divisor else count_pad) for n, k, s, p in zip(spatial, *windows, strict=True)]
    if divisor:
        matrices = [(matrix > 0).astype(np.float32) for matrix in matrices]
        matrices[0] /= divisor
    return matrices


@rule("avg_pool2d", "avg_pool3d", "avg_pool1d")
def avg_pool(
    graph: Graph, x: Value, kernel: Any, stride: Any = (), padding: Any = (0,), ceil: bool = False, count_pad: bool = True, divisor: Any = None
) -> Value:
    """Average pooling."""
    rank = len(kernel) if len(kernel) > 1 else x.rank - 2
    matrices = _averages(x.shape[-rank:], kernel, stride, padding, ceil, count_pad, divisor)
    size = [len(matrix) for matrix in matrices]
    if ceil or divisor or rank == 3:
        return apply_matrices(graph, x, matrices)
    windows = _windows(kernel, stride, padding, rank)
    return graph.op(
        "AveragePool",
        [x],
        (*x.shape[:-rank], *size),
        kernel_shape=windows[0],
        strides=windows[1],
        pads=windows[2] * 2,
        count_include_pad=int(count_pad),
    )


@rule("avg_pool2d_backward", "avg_pool3d_backward")
def avg_pool_backward(
    graph: Graph, grad: Value, x: Value, kernel: Any, stride: Any, padding: Any, ceil: bool, count_pad: bool, divisor: Any
) -> Value:
    """The gradient of average pooling."""
    rank = len(kernel) if len(kernel) > 1 else x.rank - 2
    matrices = _averages(x.shape[-rank:], kernel, stride, padding, ceil, count_pad, divisor)
    return apply_matrices(graph, grad, [np.ascontiguousarray(matrix.T) for matrix in matrices])


@rule("_adaptive_avg_pool2d", "adaptive_avg_pool2d")
def adaptive_avg_pool(graph: Graph, x: Value, size: Any) -> Value:
    """Adaptive average pooling; to one cell it is a mean."""
    spatial = x.shape[2:]
    if all(k == 1 for k in size):
        return reduce(graph, "ReduceMean", x, range(2, x.rank), True)
    if all(n % k == 0 for n, k in zip(spatial, size, strict=True)):
        kernel = [n // k for n, k in zip(spatial, size, strict=True)]
        return avg_pool(graph, x, kernel, kernel)
    return apply_matrices(graph, x, probe(aten.adaptive_avg_pool2d, spatial, list(size)))


@rule("_adaptive_avg_pool2d_backward")
def adaptive_avg_pool_backward(graph: Graph, grad: Value, x: Value) -> Value:
    """The gradient of adaptive average pooling."""
    if all(size == 1 for size in grad.shape[2:]):
        scaled = graph.op("Mul", [grad, graph.constant(1.0 / float(np.prod(x.shape[2:])), FLOAT)], grad.shape)
        return expand(graph, scaled, x.shape)
    matrices = probe(aten.adaptive_avg_pool2d, x.shape[2:], list(grad.shape[2:]))
    return apply_matrices(graph, grad, [np.ascontiguousarray(matrix.T) for matrix in matrices])


@rule("max_pool2d_with_indices")
def max_pool(
    graph: Graph, x: Value, kernel: Any, stride: Any = (), padding: Any = (0, 0), dilation: Any = (1, 1), ceil: bool = False
) -> tuple[Value, Value]:
    """Max pooling and the position of each maximum in its own plane; ONNX counts over the whole tensor, which the gradient below goes back to."""
    k, s, p = _windows(kernel, stride, padding, 2)
    d = [int(v) for v in dilation] * (2 // len(dilation))
    reach = [dil * (kk - 1) + 1 for dil, kk in zip(d, k, strict=True)]
    size = []
    for n, r, st, pd in zip(x.shape[-2:], reach, s, p, strict=True):
        out = -(-(n + 2 * pd - r) // st) + 1 if ceil else (n + 2 * pd - r) // st + 1
        size.append(out - 1 if ceil and (out - 1) * st >= n + pd else out)
    # ceil_mode as explicit padding at the end: runtimes disagree on the last window otherwise
    after = [max(pd, (out - 1) * st + r - n - pd) for n, r, st, pd, out in zip(x.shape[-2:], reach, s, p, size, strict=True)]
    flat = reshape(graph, x, (int(np.prod(x.shape[:-3])), *x.shape[-3:])) if x.rank != 4 else x
    shape = (*flat.shape[:-2], *size)
    y, index = graph.add("MaxPool", [flat], [(shape, FLOAT), (shape, np.int64)], kernel_shape=k, strides=s, pads=[*p, *after], dilations=d)
    index = reshape(graph, index, (*x.shape[:-2], *size))
    plane = graph.constant(int(np.prod(x.shape[-2:])), np.int64)
    return reshape(graph, y, (*x.shape[:-2], *size)), graph.op("Mod", [index, plane], index.shape)


@rule("max_pool2d_with_indices_backward")
def max_pool_backward(graph: Graph, grad: Value, x: Value, kernel: Any, stride: Any, padding: Any, dilation: Any, ceil: bool, index: Value) -> Value:
    """The gradient of max pooling: each output's gradient added where its maximum was."""
    k, s, _ = _windows(kernel, stride, padding, 2)
    overlapping = any(kk > st for kk, st in zip(k, s, strict=True)) or any(v != 1 for v in dilation)
    count = int(np.prod(x.shape))
    zeros = expand(graph, graph.constant(np.zeros((1,), FLOAT)), (count,))
    flat = int(np.prod(grad.shape))
    kind = {"reduction": "add"} if overlapping else {}
    position = next(graph.values[node.inputs[0]] for node in graph.nodes if index.name in node.outputs)  # before the Mod of `max_pool`
    result = graph.op("ScatterElements", [zeros, reshape(graph, position, (flat,)), reshape(graph, grad, (flat,))], (count,), axis=0, **kind)
    return reshape(graph, result, x.shape)


_PADS = {"reflection_pad1d": "reflect", "reflection_pad2d": "reflect", "replication_pad1d": "edge", "replication_pad2d": "edge"}


def _mirrored(name: str, mode: str) -> None:
    operator = getattr(aten, name)

    @rule(name)
    def forward(graph: Graph, x: Value, pads: Any) -> Value:
        return pad(graph, x, {x.rank - 1 - k: (int(pads[2 * k]), int(pads[2 * k + 1])) for k in range(len(pads) // 2)}, mode=mode)

    @rule(f"{name}_backward")
    def backward(graph: Graph, grad: Value, x: Value, pads: Any) -> Value:
        matrices: list[Array] = []
        for axis in range(len(pads) // 2):
            size, amount = x.shape[x.rank - 1 - axis], [int(v) for v in pads[2 * axis : 2 * axis + 2]]
            one = aten.reflection_pad1d if "reflection" in str(operator) else aten.replication_pad1d
            matrices.insert(0, one(torch.eye(size)[:, None], amount)[:, 0].numpy().astype(np.float32))
        return apply_matrices(graph, grad, matrices)


for _name, _mode in _PADS.items():
    _mirrored(_name, _mode)


def _repeats(name: str, size: Sequence[int], spatial: Sequence[int], scales: Sequence[Any]) -> list[int] | None:
    """How often a nearest upsampling repeats each position along each axis; None where it does not do so evenly.

    A given scale that is not the quotient of the sizes (2.1 for 8 to 16) decides which positions are read.
    """
    factors = [int(out) // int(n) for out, n in zip(size, spatial, strict=True)]
    whole = all(out == n * factor for out, n, factor in zip(size, spatial, factors, strict=True))
    scaled = any(scale is not None and scale != factor for scale, factor in zip(scales, factors, strict=False))
    return factors if "nearest" in name and whole and not scaled else None


def _upsampling(name: str, rank: int) -> None:
    operator = getattr(aten, name)

    @rule(name)
    def forward(graph: Graph, x: Value, size: Any, *args: Any) -> Value:
        spatial = x.shape[2:]
        factors = _repeats(name, size, spatial, args)
        if factors is not None:
            shape: list[int] = list(x.shape[:2])
            wide: list[int] = list(x.shape[:2])
            for n, factor in zip(spatial, factors, strict=True):
                shape += [n, 1]
                wide += [n, factor]
            return reshape(graph, expand(graph, reshape(graph, x, shape), wide), (*x.shape[:2], *size))
        return apply_matrices(graph, x, probe(operator, spatial, list(size), *args))

    @rule(f"{name}_backward")
    def backward(graph: Graph, grad: Value, size: Any, input_size: Any, *args: Any) -> Value:
        spatial = [int(n) for n in input_size[2:]]
        factors = _repeats(name, size, spatial, args)
        if factors is not None:
            shape: list[int] = list(grad.shape[:2])
            for n, factor in zip(spatial, factors, strict=True):
                shape += [n, factor]
            return reduce(graph, "ReduceSum", reshape(graph, grad, shape), [3 + 2 * axis for axis in range(rank)], False)
        return apply_matrices(graph, grad, [np.ascontiguousarray(matrix.T) for matrix in probe(operator, spatial, list(size), *args)])


for _name, _rank in (
    ("upsample_nearest1d", 1),
    ("upsample_nearest2d", 2),
    ("_upsample_nearest_exact1d", 1),
    ("_upsample_nearest_exact2d", 2),
    ("upsample_linear1d", 1),
    ("upsample_bilinear2d", 2),
    ("upsample_bicubic2d", 2),
    ("upsample_nearest3d", 3),
    ("_upsample_nearest_exact3d", 3),
    ("upsample_trilinear3d", 3),
    ("_upsample_bilinear2d_aa", 2),
    ("_upsample_bicubic2d_aa", 2),
):
    _upsampling(_name, _rank)
