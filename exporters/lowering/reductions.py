"""Reductions, soft-max and matrix products."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from edgeadapt.exporters.ir import Graph, Value
from edgeadapt.exporters.lowering.arithmetic import binary
from edgeadapt.exporters.lowering.registry import BOOL, FLOAT, INT, broadcast, cast, floating, numpy_dtype, reduce, reduce_sum, reshape, rule
from edgeadapt.exporters.lowering.shapes import cat, cut, swap, unsqueeze


def _axes(dim: Any) -> list[int] | None:
    return None if dim is None or dim == [] else [dim] if isinstance(dim, int) else list(dim)


def _accumulated(graph: Graph, x: Value, dtype: Any) -> Value:
    """What a sum or product is taken of: x in the dtype asked for, integers and truths as int64 where none is."""
    return cast(graph, x, numpy_dtype(dtype) if dtype is not None else x.dtype if x.dtype.kind == "f" else INT)


@rule("sum")
def total(graph: Graph, x: Value, dim: Any = None, keep: bool = False, dtype: Any = None) -> Value:
    """Sum over axes."""
    return reduce_sum(graph, _accumulated(graph, x, dtype), _axes(dim), keep)


@rule("mean")
def mean(graph: Graph, x: Value, dim: Any = None, keep: bool = False, dtype: Any = None) -> Value:
    """Mean over axes."""
    return reduce(graph, "ReduceMean", _accumulated(graph, x, dtype), _axes(dim), keep)


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


@rule("max")
def largest(graph: Graph, x: Value) -> Value:
    """Maximum of all elements."""
    return reduce(graph, "ReduceMax", x, None, False)


@rule("min")
def smallest(graph: Graph, x: Value) -> Value:
    """Minimum of all elements."""
    return reduce(graph, "ReduceMin", x, None, False)


def _position(name: str, op: str) -> None:
    @rule(name)
    def lowered(graph: Graph, x: Value, dim: int | None = None, keep: bool = False) -> Value:
        x = cast(graph, x, FLOAT) if x.dtype == BOOL else x
        if dim is None:
            flat = reshape(graph, x, (int(np.prod(x.shape)),))
            return reshape(graph, graph.op(op, [flat], (1,), INT, axis=0, keepdims=1), [1] * x.rank if keep else [])
        dim = dim % x.rank
        shape = [1 if axis == dim else size for axis, size in enumerate(x.shape) if keep or axis != dim]
        return graph.op(op, [x], shape, INT, axis=dim, keepdims=int(keep))


_position("argmax", "ArgMax")
_position("argmin", "ArgMin")


@rule("topk")
def topk(graph: Graph, x: Value, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> tuple[Value, Value]:
    """The k largest (or smallest) elements along an axis and their positions."""
    dim = dim % x.rank
    shape = [k if axis == dim else size for axis, size in enumerate(x.shape)]
    values, places = graph.add("TopK", [x, graph.ints([k])], [(shape, x.dtype), (shape, INT)], axis=dim, largest=int(largest), sorted=int(sorted))
    return values, places


@rule("sort")
def sort(graph: Graph, x: Value, dim: int = -1, descending: bool = False) -> tuple[Value, Value]:
    """All elements along an axis in order, and their positions; equal ones keep theirs."""
    return topk(graph, x, x.shape[dim], dim, descending)


@rule("sort.stable")
def sort_stable(graph: Graph, x: Value, *, stable: bool | None = None, dim: int = -1, descending: bool = False) -> tuple[Value, Value]:
    """As sort, which keeps the order of equal elements anyway."""
    return sort(graph, x, dim, descending)


@rule("any")
def any_(graph: Graph, x: Value, dim: Any = None, keep: bool = False) -> Value:
    """Whether any element along axes is true."""
    most = reduce(graph, "ReduceMax", cast(graph, cast(graph, x, BOOL), FLOAT), _axes(dim), keep)
    return cast(graph, most, BOOL)


@rule("prod")
def product(graph: Graph, x: Value, dim: Any = None, keep: bool = False, dtype: Any = None) -> Value:
    """Product over an axis."""
    return reduce(graph, "ReduceProd", _accumulated(graph, x, dtype), _axes(dim), keep)


@rule("cumsum")
def cumsum(graph: Graph, x: Value, dim: int, dtype: Any = None) -> Value:
    """Cumulative sum along an axis."""
    x = _accumulated(graph, x, dtype)
    return graph.op("CumSum", [x, graph.constant(dim % x.rank, np.int64)], x.shape)


@rule("cumprod")
def cumprod(graph: Graph, x: Value, dim: int, dtype: Any = None) -> Value:
    """Cumulative product along an axis, as products of growing slices (the axis is short where models use this)."""
    x = _accumulated(graph, x, dtype)
    dim = dim % x.rank
    parts = [cut(graph, x, dim, 0, 1)]
    for k in range(1, x.shape[dim]):
        parts.append(binary(graph, "Mul", parts[-1], cut(graph, x, dim, k, k + 1)))
    return cat(graph, parts, dim)


@rule("linalg_vector_norm")
def vector_norm(graph: Graph, x: Value, order: Any = 2, dim: Any = None, keep: bool = False, dtype: Any = None) -> Value:
    """Length over axes by the norm of any order but zero."""
    x, axes = floating(graph, x), _axes(dim)
    if order == 0:
        raise KeyError("order 0")
    if order == 2:
        squares = reduce(graph, "ReduceSum", graph.op("Mul", [x, x], x.shape), axes, keep)
        return graph.op("Sqrt", [squares], squares.shape)
    sizes = graph.op("Abs", [x], x.shape)
    if order in (1, math.inf, -math.inf):
        return reduce(graph, {1: "ReduceSum", math.inf: "ReduceMax"}.get(order, "ReduceMin"), sizes, axes, keep)
    return binary(graph, "Pow", reduce(graph, "ReduceSum", binary(graph, "Pow", sizes, float(order)), axes, keep), 1.0 / order)


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
