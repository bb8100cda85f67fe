"""Reductions, soft-max and matrix products."""

from __future__ import annotations

from typing import Any

import numpy as np

from edgeadapt.exporters.ir import Graph, Value
from edgeadapt.exporters.lowering.elementwise import BOOL, binary
from edgeadapt.exporters.lowering.registry import FLOAT, broadcast, cast, reduce, reduce_sum, reshape, rule
from edgeadapt.exporters.lowering.shapes import swap, unsqueeze


def _axes(dim: Any) -> list[int] | None:
    return None if dim is None or dim == [] else [dim] if isinstance(dim, int) else list(dim)


@rule("sum")
def total(graph: Graph, x: Value, dim: Any = None, keep: bool = False, dtype: Any = None) -> Value:
    """Sum over axes."""
    x = cast(graph, x, FLOAT if dtype is not None and "float" in str(dtype) else np.int64 if x.dtype == BOOL else x.dtype)
    return reduce_sum(graph, x, _axes(dim), keep)


@rule("mean")
def mean(graph: Graph, x: Value, dim: Any = None, keep: bool = False, dtype: Any = None) -> Value:
    """Mean over axes."""
    return reduce(graph, "ReduceMean", x, _axes(dim), keep)


@rule("amax")
def amax(graph: Graph, x: Value, dim: Any = (), keep: bool = False) -> Value:
    """Maximum over axes."""
    return reduce(graph, "ReduceMax", x, _axes(list(dim)), keep)


@rule("amin")
def amin(graph: Graph, x: Value, dim: Any = (), keep: bool = False) -> Value:
    """Minimum over axes."""
    return reduce(graph, "ReduceMin", x, _axes(list(dim)), keep)


def _extreme(name: str, value_op: str, index_op: str) -> None:
    @rule(name)
    def lowered(graph: Graph, x: Value, dim: int, keep: bool = False) -> tuple[Value, Value]:
        dim = dim % x.rank
        best = reduce(graph, value_op, x, [dim], keep)
        where = graph.op(index_op, [x], best.shape, np.int64, axis=dim, keepdims=int(keep))
        return best, where


_extreme("max.dim", "ReduceMax", "ArgMax")
_extreme("min.dim", "ReduceMin", "ArgMin")


@rule("argmax")
def argmax(graph: Graph, x: Value, dim: int, keep: bool = False) -> Value:
    """Position of the maximum along an axis."""
    dim = dim % x.rank
    shape = [1 if axis == dim else size for axis, size in enumerate(x.shape) if keep or axis != dim]
    return graph.op("ArgMax", [x], shape, np.int64, axis=dim, keepdims=int(keep))


@rule("any")
def any_(graph: Graph, x: Value, dim: Any = None, keep: bool = False) -> Value:
    """Whether any element along axes is true."""
    most = reduce(graph, "ReduceMax", cast(graph, cast(graph, x, BOOL), FLOAT), _axes(dim), keep)
    return cast(graph, most, BOOL)


@rule("prod")
def product(graph: Graph, x: Value, dim: Any = None, keep: bool = False, dtype: Any = None) -> Value:
    """Product over an axis."""
    return reduce(graph, "ReduceProd", x, _axes(dim), keep)


@rule("cumsum")
def cumsum(graph: Graph, x: Value, dim: int, dtype: Any = None) -> Value:
    """Cumulative sum along an axis."""
    return graph.op("CumSum", [x, graph.constant(dim % x.rank, np.int64)], x.shape)


@rule("cumprod")
def cumprod(graph: Graph, x: Value, dim: int, dtype: Any = None) -> Value:
    """Cumulative product along an axis, as products of growing slices (the axis is short where models use this)."""
    from edgeadapt.exporters.lowering.shapes import cat, cut

    dim = dim % x.rank
    parts = [cut(graph, x, dim, 0, 1)]
    for k in range(1, x.shape[dim]):
        parts.append(binary(graph, "Mul", parts[-1], cut(graph, x, dim, k, k + 1)))
    return cat(graph, parts, dim)


@rule("linalg_vector_norm")
def vector_norm(graph: Graph, x: Value, order: Any = 2, dim: Any = None, keep: bool = False, dtype: Any = None) -> Value:
    """Euclidean (or L1) length over axes."""
    if order == 1:
        return reduce(graph, "ReduceSum", graph.op("Abs", [x], x.shape), _axes(dim), keep)
    if order != 2:
        raise KeyError(f"linalg_vector_norm of order {order}")
    squares = reduce(graph, "ReduceSum", graph.op("Mul", [x, x], x.shape), _axes(dim), keep)
    return graph.op("Sqrt", [squares], squares.shape)


@rule("var.correction", "var")
def variance(graph: Graph, x: Value, dim: Any = None, *, correction: Any = 1, keepdim: bool = False) -> Value:
    """Variance over axes."""
    return var_mean(graph, x, dim, correction=correction, keepdim=keepdim)[0]


@rule("var_mean.correction", "var_mean")
def var_mean(graph: Graph, x: Value, dim: Any = None, *, correction: Any = 1, keepdim: bool = False) -> tuple[Value, Value]:
    """Variance and mean over axes."""
    axes = _axes(dim)
    centre = reduce(graph, "ReduceMean", x, axes, True)
    away = binary(graph, "Sub", x, centre)
    spread = reduce(graph, "ReduceMean", graph.op("Mul", [away, away], away.shape), axes, keepdim)
    count = int(np.prod(x.shape)) // int(np.prod(centre.shape))
    correction = 1 if correction is None else correction
    if correction:
        spread = binary(graph, "Mul", spread, count / (count - correction))
    return spread, reshape(graph, centre, spread.shape)


@rule("_softmax", "softmax", "_safe_softmax")
def softmax(graph: Graph, x: Value, dim: int, *_: Any) -> Value:
    """Soft-max along an axis."""
    return graph.op("Softmax", [x], x.shape, axis=dim % x.rank)


@rule("_log_softmax", "log_softmax")
def log_softmax(graph: Graph, x: Value, dim: int, *_: Any) -> Value:
    """Logarithm of the soft-max along an axis."""
    return graph.op("LogSoftmax", [x], x.shape, axis=dim % x.rank)


def matmul(graph: Graph, a: Value, b: Value) -> Value:
    """Matrix product over the last two axes, with broadcasting before them."""
    shape = (*broadcast(a.shape[:-2], b.shape[:-2]), a.shape[-2], b.shape[-1])
    return graph.op("MatMul", [a, b], shape)


@rule("mm", "bmm", "matmul")
def mm(graph: Graph, a: Value, b: Value) -> Value:
    """Matrix product."""
    if a.rank == 1 or b.rank == 1:
        left, right = (reshape(graph, a, (1, *a.shape)) if a.rank == 1 else a), (reshape(graph, b, (*b.shape, 1)) if b.rank == 1 else b)
        result = matmul(graph, left, right)
        drop = [k for k, gone in ((result.rank - 2, a.rank == 1), (result.rank - 1, b.rank == 1)) if gone]
        return reshape(graph, result, [size for axis, size in enumerate(result.shape) if axis not in drop])
    return matmul(graph, a, b)


@rule("addmm")
def addmm(graph: Graph, c: Value, a: Value, b: Value, beta: float = 1, alpha: float = 1) -> Value:
    """beta·c + alpha·a·b."""
    return graph.op("Gemm", [a, b, c], (a.shape[0], b.shape[1]), alpha=float(alpha), beta=float(beta))


@rule("baddbmm")
def baddbmm(graph: Graph, c: Value, a: Value, b: Value, beta: float = 1, alpha: float = 1) -> Value:
    """beta·c + alpha·a·b over a batch."""
    product_ = matmul(graph, a, b)
    product_ = product_ if alpha == 1 else binary(graph, "Mul", product_, alpha)
    return product_ if beta == 0 else binary(graph, "Add", product_, c if beta == 1 else binary(graph, "Mul", c, beta))


@rule("linear")
def linear(graph: Graph, x: Value, weight: Value, bias: Value | None = None) -> Value:
    """x·Wᵀ + b; a Gemm over the last axis, so that the weight is read as it is stored."""
    rows = reshape(graph, x, (int(np.prod(x.shape[:-1])), x.shape[-1]))
    y = graph.op("Gemm", [rows, weight, bias], (rows.shape[0], weight.shape[0]), transB=1)
    return reshape(graph, y, (*x.shape[:-1], weight.shape[0]))


@rule("dot", "mv")
def dot(graph: Graph, a: Value, b: Value) -> Value:
    """Product with a vector."""
    return mm(graph, a, b)


@rule("native_layer_norm")
def native_layer_norm(graph: Graph, x: Value, normalized: Any, weight: Value | None, bias: Value | None, eps: float) -> tuple[Value, Value, Value]:
    """Layer normalisation with its mean and inverse deviation, which the gradient needs."""
    axis = x.rank - len(normalized)
    scale = weight or graph.constant(np.ones(tuple(normalized), FLOAT))
    stats = [*x.shape[:axis], *[1] * len(normalized)]
    y, centre, inverse = graph.add(
        "LayerNormalization", [x, scale, bias], [(x.shape, FLOAT), (stats, FLOAT), (stats, FLOAT)], axis=axis, epsilon=float(eps)
    )
    return y, centre, inverse


@rule("nll_loss_forward", "nll_loss2d_forward")
def nll_loss(graph: Graph, logp: Value, target: Value, weight: Any, reduction: int, ignore: int) -> tuple[Value, Value]:
    """Mean negative log-likelihood of the targets, and their number."""
    picked = graph.op("GatherElements", [logp, unsqueeze(graph, target, 1)], (target.shape[0], 1, *target.shape[1:]), axis=1)
    loss = graph.op("Neg", [reduce(graph, "ReduceMean", picked, None, False)], ())
    return loss, graph.constant(float(np.prod(target.shape)), FLOAT)


__all__ = ["linear", "matmul", "mm", "swap"]
