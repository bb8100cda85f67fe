"""Operators that move data: views, slices, concatenation, padding, indexing, and the creation of constants."""

from __future__ import annotations

from typing import Any

import numpy as np

from edgeadapt.exporters.ir import Graph, Value, joinable
from edgeadapt.exporters.lowering.arithmetic import binary
from edgeadapt.exporters.lowering.elementwise import where
from edgeadapt.exporters.lowering.registry import BOOL, FLOAT, INT, cast, lift, numpy_dtype, reshape, rule, transpose

_END = np.iinfo(np.int64).max


@rule("view", "_unsafe_view", "reshape", "flatten")
def view(graph: Graph, x: Value, shape: Any) -> Value:
    """X in another shape; one size may be −1."""
    sizes = list(shape)
    if -1 in sizes:
        rest = int(np.prod([size for size in sizes if size != -1]))
        sizes[sizes.index(-1)] = int(np.prod(x.shape)) // max(rest, 1)
    return reshape(graph, x, sizes)


@rule("unsqueeze", "unsqueeze_")
def unsqueeze(graph: Graph, x: Value, dim: int) -> Value:
    """X with an axis of size one added."""
    dim = dim % (x.rank + 1)
    return reshape(graph, x, (*x.shape[:dim], 1, *x.shape[dim:]))


@rule("squeeze", "squeeze_")
def squeeze(graph: Graph, x: Value, dim: Any = None) -> Value:
    """X without (the given) axes of size one."""
    dims = range(x.rank) if dim is None else [dim] if isinstance(dim, int) else dim
    drop = {axis % x.rank for axis in dims if x.shape[axis] == 1}
    return reshape(graph, x, [size for axis, size in enumerate(x.shape) if axis not in drop])


@rule("permute")
def permute(graph: Graph, x: Value, dims: Any) -> Value:
    """X with its axes in another order."""
    return transpose(graph, x, dims)


@rule("transpose")
def swap(graph: Graph, x: Value, a: int, b: int) -> Value:
    """X with two axes swapped."""
    order = list(range(x.rank))
    order[a % x.rank], order[b % x.rank] = order[b % x.rank], order[a % x.rank]
    return transpose(graph, x, order)


@rule("t")
def matrix_transpose(graph: Graph, x: Value) -> Value:
    """A matrix transposed."""
    return swap(graph, x, 0, 1) if x.rank == 2 else x


@rule("expand", "expand_copy", "broadcast_to")
def expand(graph: Graph, x: Value, shape: Any, **_: Any) -> Value:
    """X repeated along axes of size one, without meaning to copy."""
    lead = len(shape) - x.rank
    target = tuple(x.shape[axis - lead] if size == -1 else int(size) for axis, size in enumerate(shape))
    x = reshape(graph, x, (*[1] * lead, *x.shape))
    return x if x.shape == target else graph.op("Expand", [x, graph.ints(target)], target)


@rule("repeat")
def repeat(graph: Graph, x: Value, repeats: Any) -> Value:
    """X tiled."""
    x = reshape(graph, x, (*[1] * (len(repeats) - x.rank), *x.shape))
    if all(count == 1 for count in repeats):
        return x
    return graph.op("Tile", [x, graph.ints(repeats)], [size * count for size, count in zip(x.shape, repeats, strict=True)])


def cut(graph: Graph, x: Value, axis: int, start: int, end: int, step: int = 1) -> Value:
    """x[…, start:end:step, …] along one axis; bounds within the axis."""
    if start == 0 and end >= x.shape[axis] and step == 1:
        return x
    shape = list(x.shape)
    shape[axis] = len(range(start, min(end, x.shape[axis]), step))
    return graph.op("Slice", [x, graph.ints([start]), graph.ints([end]), graph.ints([axis]), graph.ints([step])], shape)


def _bounds(size: int, start: int | None, end: int | None) -> tuple[int, int]:
    first, last, _ = slice(start, None if end is None or end >= _END else end).indices(size)
    return first, max(first, last)


@rule("slice", "slice_copy")
def slice_(graph: Graph, x: Value, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> Value:
    """A slice along one axis."""
    first, last = _bounds(x.shape[dim], start, end)
    return cut(graph, x, dim % x.rank, first, last, step)


@rule("select", "select_copy")
def select(graph: Graph, x: Value, dim: int, index: int) -> Value:
    """One position along an axis, which is dropped."""
    dim, index = dim % x.rank, index % x.shape[dim]
    piece = cut(graph, x, dim, index, index + 1)
    return reshape(graph, piece, [size for axis, size in enumerate(x.shape) if axis != dim])


def spread(graph: Graph, x: Value, axis: int, start: int, step: int, size: int) -> Value:
    """The inverse of a slice: x placed at start, start + step, … of zeros of length `size`."""
    if step > 1:
        wide = reshape(graph, x, (*x.shape[: axis + 1], 1, *x.shape[axis + 1 :]))
        wide = pad(graph, wide, {axis + 1: (0, step - 1)})
        x = reshape(graph, wide, (*x.shape[:axis], x.shape[axis] * step, *x.shape[axis + 1 :]))
    return pad(graph, x, {axis: (start, size - start - x.shape[axis])})


def pad(graph: Graph, x: Value, amounts: dict[int, tuple[int, int]], value: Any = 0.0, mode: str = "constant") -> Value:
    """X padded (or cropped, by negative amounts) along axes."""
    if all(amount == (0, 0) for amount in amounts.values()):
        return x
    for axis, (before, after) in amounts.items():
        if before < 0 or after < 0:
            x = cut(graph, x, axis, max(-before, 0), x.shape[axis] - max(-after, 0))
    amounts = {axis: (max(before, 0), max(after, 0)) for axis, (before, after) in amounts.items()}
    if all(amount == (0, 0) for amount in amounts.values()):
        return x
    pads = [amounts.get(axis, (0, 0))[side] for side in (0, 1) for axis in range(x.rank)]
    shape = [size + sum(amounts.get(axis, (0, 0))) for axis, size in enumerate(x.shape)]
    return graph.op("Pad", [x, graph.ints(pads), lift(graph, value, x)], shape, mode=mode)


@rule("slice_backward")
def slice_backward(graph: Graph, grad: Value, sizes: Any, dim: int, start: int, end: int, step: int) -> Value:
    """The gradient of a slice: zeros elsewhere."""
    first, _ = _bounds(sizes[dim], start, end)
    return spread(graph, grad, dim % grad.rank, first, step, sizes[dim])


@rule("select_backward")
def select_backward(graph: Graph, grad: Value, sizes: Any, dim: int, index: int) -> Value:
    """The gradient of a selection: zeros elsewhere."""
    dim, index = dim % len(sizes), index % sizes[dim]
    return spread(graph, unsqueeze(graph, grad, dim), dim, index, 1, sizes[dim])


@rule("slice_scatter")
def slice_scatter(graph: Graph, x: Value, source: Value, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> Value:
    """X with a slice replaced."""
    dim = dim % x.rank
    first, last = _bounds(x.shape[dim], start, end)
    if step == 1:
        parts = [cut(graph, x, dim, 0, first)] if first else []
        parts += [source] + ([cut(graph, x, dim, last, x.shape[dim])] if last < x.shape[dim] else [])
        return parts[0] if len(parts) == 1 else graph.op("Concat", parts, x.shape, axis=dim)
    hole = np.ones(x.shape[dim], np.float32)
    hole[first:last:step] = 0
    shape = [1] * x.rank
    shape[dim] = -1
    kept = graph.op("Mul", [x, graph.constant(hole.reshape(shape))], x.shape)
    return graph.op("Add", [kept, spread(graph, source, dim, first, step, x.shape[dim])], x.shape)


@rule("constant_pad_nd")
def constant_pad_nd(graph: Graph, x: Value, pads: Any, value: Any = 0.0) -> Value:
    """Padding with a constant; the last axis comes first in `pads`."""
    amounts = {x.rank - 1 - k: (int(pads[2 * k]), int(pads[2 * k + 1])) for k in range(len(pads) // 2)}
    return pad(graph, x, amounts, value)


@rule("cat", "concat")
def cat(graph: Graph, values: Any, dim: int = 0) -> Value:
    """Values joined along an axis."""
    values = [value for value in values if value.shape != (0,)]
    if len(values) == 1:
        return values[0]
    dim = dim % values[0].rank
    shape = list(values[0].shape)
    shape[dim] = sum(value.shape[dim] for value in values)
    return graph.op("Concat", values, shape, axis=dim)


@rule("stack")
def stack(graph: Graph, values: Any, dim: int = 0) -> Value:
    """Values joined along a new axis."""
    dim = dim % (values[0].rank + 1)
    return cat(graph, [unsqueeze(graph, value, dim) for value in values], dim)


@rule("split_with_sizes", "split_with_sizes_copy")
def split_with_sizes(graph: Graph, x: Value, sizes: Any, dim: int = 0) -> tuple[Value, ...]:
    """Consecutive slices of the given sizes; of a vector into many small ones, by one node."""
    if x.rank == 1 and joinable(int(size) * x.dtype.itemsize for size in sizes):
        return tuple(graph.add("Split", [x, graph.ints(sizes)], [((int(size),), x.dtype) for size in sizes], axis=0))
    edges = np.cumsum([0, *sizes])
    return tuple(cut(graph, x, dim % x.rank, int(a), int(b)) for a, b in zip(edges[:-1], edges[1:], strict=True))


@rule("split", "chunk")
def split(graph: Graph, x: Value, size: int, dim: int = 0) -> tuple[Value, ...]:
    """Consecutive slices of one size, the last one smaller."""
    total = x.shape[dim]
    return split_with_sizes(graph, x, [min(size, total - start) for start in range(0, total, size)], dim)


@rule("unbind", "unbind_copy")
def unbind(graph: Graph, x: Value, dim: int = 0) -> tuple[Value, ...]:
    """Each position along an axis."""
    return tuple(select(graph, x, dim, index) for index in range(x.shape[dim]))


@rule("flip")
def flip(graph: Graph, x: Value, dims: Any) -> Value:
    """X reversed along axes."""
    axes = [axis % x.rank for axis in dims]
    count = len(axes)
    inputs = [x, graph.ints([-1] * count), graph.ints([-_END] * count), graph.ints(axes), graph.ints([-1] * count)]
    return graph.op("Slice", inputs, x.shape)


@rule("index_select")
def index_select(graph: Graph, x: Value, dim: int, index: Value) -> Value:
    """Positions along an axis, by index."""
    shape = list(x.shape)
    shape[dim] = index.shape[0]
    return graph.op("Gather", [x, index], shape, axis=dim % x.rank)


@rule("gather")
def gather(graph: Graph, x: Value, dim: int, index: Value, **_: Any) -> Value:
    """Elements along an axis, by an index of the result's shape."""
    return graph.op("GatherElements", [x, index], index.shape, axis=dim % x.rank)


def _scattered(graph: Graph, x: Value, dim: int, index: Value, source: Value, **kind: str) -> Value:
    for axis, size in enumerate(index.shape):
        source = cut(graph, source, axis, 0, size)  # torch reads only as much of the source as the index asks for
    return graph.op("ScatterElements", [x, index, source], x.shape, axis=dim % x.rank, **kind)


@rule("scatter.src")
def scatter(graph: Graph, x: Value, dim: int, index: Value, source: Value) -> Value:
    """X with elements along an axis replaced, by index."""
    return _scattered(graph, x, dim, index, source)


@rule("scatter_add")
def scatter_add(graph: Graph, x: Value, dim: int, index: Value, source: Value) -> Value:
    """X with elements along an axis added to, by index, as often as the index names them."""
    return _scattered(graph, x, dim, index, source, reduction="add")


@rule("scatter.value")
def scatter_value(graph: Graph, x: Value, dim: int, index: Value, value: Any) -> Value:
    """X with elements along an axis replaced by one number, by index."""
    source = expand(graph, graph.constant(np.asarray(value, x.dtype)), index.shape)
    return graph.op("ScatterElements", [x, index, source], x.shape, axis=dim % x.rank)


def _masks(index: Value) -> bool:
    return index.dtype in (BOOL, np.uint8)


def _advanced(x: Value, indices: Any) -> tuple[list[int], list[Value]]:
    axes = [axis for axis, index in enumerate(indices) if index is not None]
    if axes != list(range(axes[0], axes[0] + len(axes))):
        raise KeyError("separated index tensors")
    if any(_masks(indices[axis]) for axis in axes):
        raise KeyError("a boolean mask as index")
    return axes, [indices[axis] for axis in axes]


def _flat_index(graph: Graph, x: Value, axes: list[int], index: list[Value]) -> tuple[Value, Value, list[int], int]:
    """x with the indexed axes moved into one, and one index into it."""
    sizes = [x.shape[axis] for axis in axes]
    shape = [int(size) for size in np.broadcast_shapes(*[value.shape for value in index])]
    total: Value | None = None
    for value, size, stride in zip(index, sizes, [int(np.prod(sizes[k + 1 :])) for k in range(len(sizes))], strict=True):
        value = cast(graph, value, np.int64)
        wrapped = graph.op(
            "Mod", [graph.op("Add", [value, graph.constant(size, np.int64)], value.shape), graph.constant(size, np.int64)], value.shape
        )
        scaled = wrapped if stride == 1 else graph.op("Mul", [wrapped, graph.constant(stride, np.int64)], value.shape)
        total = scaled if total is None else graph.op("Add", [total, scaled], np.broadcast_shapes(total.shape, scaled.shape))
    assert total is not None
    flat = reshape(graph, x, (*x.shape[: axes[0]], int(np.prod(sizes)), *x.shape[axes[-1] + 1 :]))
    return flat, total, shape, axes[0]


@rule("index", "_unsafe_index")
def index(graph: Graph, x: Value, indices: Any) -> Value:
    """x[…, i, j, …] with integer index tensors on neighbouring axes."""
    flat, position, shape, axis = _flat_index(graph, x, *_advanced(x, indices))
    return graph.op("Gather", [flat, position], (*flat.shape[:axis], *shape, *flat.shape[axis + 1 :]), axis=axis)


def _put_masked(graph: Graph, x: Value, first: int, mask: Value, values: Value, accumulate: bool) -> Value:
    """x with `values` where a mask over its axes from `first` on holds; how many those are is known only when it runs."""
    after = x.rank - first - mask.rank
    shape = [*[1] * (first + 1 + after - values.rank), *values.shape]  # as torch sees x[mask]: the mask's axes as one
    if shape[first] != 1:
        raise KeyError("a boolean mask with a value for each element")
    spread = reshape(graph, values, (*shape[:first], *[1] * mask.rank, *shape[first + 1 :]))
    condition = reshape(graph, cast(graph, mask, BOOL), (*[1] * first, *mask.shape, *[1] * after))
    return where(graph, condition, binary(graph, "Add", x, spread) if accumulate else spread, x)


@rule("index_put", "_unsafe_index_put")
def index_put(graph: Graph, x: Value, indices: Any, values: Value, accumulate: bool = False) -> Value:
    """X with the indexed elements replaced or added to; a mask's by one value for all."""
    given = [index for index in indices if index is not None]
    if len(given) == 1 and _masks(given[0]):
        return _put_masked(graph, x, len(indices) - 1 - list(reversed(indices)).index(given[0]), given[0], values, accumulate)
    flat, position, shape, axis = _flat_index(graph, x, *_advanced(x, indices))
    count = int(np.prod(shape))
    target = (*flat.shape[:axis], *shape, *flat.shape[axis + 1 :])
    source = reshape(graph, expand(graph, values, target), (*flat.shape[:axis], count, *flat.shape[axis + 1 :]))
    position = reshape(graph, expand(graph, position, shape), [1] * axis + [count] + [1] * (flat.rank - axis - 1))
    position = expand(graph, position, source.shape)
    kind = {"reduction": "add"} if accumulate else {}
    return reshape(graph, graph.op("ScatterElements", [flat, position, source], flat.shape, axis=axis, **kind), x.shape)


@rule(
    "full",
    "zeros",
    "ones",
    "empty.memory_format",
    "empty",
    "full_like",
    "zeros_like",
    "ones_like",
    "empty_like",
    "new_zeros",
    "new_full",
    "new_ones",
    "new_empty",
    "empty_permuted",
    "empty_strided",
    "new_empty_strided",
)
def creation(graph: Graph, *args: Any, dtype: Any = None, operator: str = "", **_: Any) -> Value:
    """A tensor of one value: a scalar spread over the shape."""
    first = args[0]
    shape = first.shape if operator.endswith("_like") else args[1] if operator.startswith("new_") else first
    like = first.dtype if isinstance(first, Value) else FLOAT
    value = 1.0 if "ones" in operator else 0.0
    if "full" in operator:
        value = args[2] if operator == "new_full" else args[1]
        like = like if isinstance(first, Value) else BOOL if isinstance(value, bool) else FLOAT if isinstance(value, float) else INT
    kind = numpy_dtype(dtype) if dtype is not None else like
    return expand(graph, graph.constant(np.asarray(value, dtype=kind)), tuple(shape))


@rule("arange")
def arange(graph: Graph, *bounds: Any, dtype: Any = None, **_: Any) -> Value:
    """Consecutive numbers, as a constant."""
    kind = numpy_dtype(dtype) if dtype is not None else FLOAT if any(isinstance(bound, float) for bound in bounds) else INT
    return graph.constant(np.arange(*bounds).astype(kind))
