"""What pruned layers keep (`exporters.pruned`): the largest of groups, by `ArgMax`, and its place, as bits.

A batch is taken in pieces, so that what stands between the layer's input and what is kept of it stays small.
"""

from __future__ import annotations

from functools import reduce

import numpy as np

from edgeadapt.exporters.ir import Graph, Value
from edgeadapt.exporters.lowering.registry import cast, reduce_sum, reshape, rule
from edgeadapt.exporters.lowering.shapes import cat, cut, expand
from edgeadapt.exporters.pruned import bits_for
from edgeadapt.exporters.stretches import stretches

_BYTE, _INDEX = np.dtype(np.uint8), np.dtype(np.int32)
NUMBERS, PIECES = 2**17, 4
"""Numbers of a layer's input that are looked at at once, where so many pieces at most do."""


def _pieces(batch: int, numbers: int) -> list[tuple[int, int]]:
    return list(stretches(batch, numbers, NUMBERS, PIECES))


def _packed(graph: Graph, places: Value, bits: int) -> Value:
    slots = 8 // bits
    rows = reshape(graph, places, (slots, int(np.prod(places.shape)) // slots))
    if slots > 1:
        rows = graph.op("BitShift", [rows, graph.constant(np.arange(0, 8, bits)[:, None], _BYTE)], rows.shape, _BYTE, direction="LEFT")
    parts = [cut(graph, rows, 0, slot, slot + 1) for slot in range(slots)]
    return reshape(graph, reduce(lambda a, b: graph.op("BitwiseOr", [a, b], a.shape, _BYTE), parts), (rows.shape[1],))


def _unpacked(graph: Graph, packed: Value, values: Value, apart: int) -> Value:
    bits, rows = bits_for(apart, int(np.prod(values.shape))), reshape(graph, packed, (1, packed.shape[0]))
    if bits < 8:
        shifts = graph.constant(np.arange(0, 8, bits)[:, None], _BYTE)
        rows = graph.op("BitShift", [rows, shifts], (8 // bits, packed.shape[0]), _BYTE, direction="RIGHT")
        rows = graph.op("BitwiseAnd", [rows, graph.constant(2**bits - 1, _BYTE)], rows.shape, _BYTE)
    return reshape(graph, rows, (values.shape[0], values.shape[1], 1, values.shape[2]))


def _grouped(graph: Graph, x: Value, rows: int, apart: int) -> Value:
    return reshape(graph, x, (x.shape[0], rows, apart, int(np.prod(x.shape[1:])) // rows // apart))


@rule("largest_of_groups")
def largest_of_groups(graph: Graph, x: Value, centre: Value | None, rows: int, apart: int) -> tuple[Value, Value]:
    """Values and packed places."""
    grouped, values, places = _grouped(graph, x, rows, apart), [], []
    for start, end in _pieces(x.shape[0], int(np.prod(x.shape))):
        piece = cut(graph, grouped, 0, start, end)
        if centre is not None:
            piece = graph.op("Sub", [piece, reshape(graph, centre, (1, rows, 1, 1))], piece.shape)
        shape = (end - start, rows, 1, grouped.shape[3])
        place = graph.op("ArgMax", [graph.op("Abs", [piece], piece.shape)], shape, np.int64, axis=2, keepdims=1)
        values.append(reshape(graph, graph.op("GatherElements", [piece, place], shape, axis=2), (end - start, rows, shape[3])))
        places.append(cast(graph, place, _BYTE))
    return cat(graph, values, 0), _packed(graph, cat(graph, places, 0), bits_for(apart, int(np.prod(x.shape)) // apart))


@rule("products_of_kept")
def products_of_kept(graph: Graph, grad: Value, values: Value, packed: Value, apart: int) -> Value:
    """What of the gradient meets a kept value, times that, in sum."""
    rows, places, total = values.shape[1], _unpacked(graph, packed, values, apart), None
    grouped = _grouped(graph, grad, rows, apart)
    for start, end in _pieces(grad.shape[0], int(np.prod(grad.shape))):
        place = cast(graph, cut(graph, places, 0, start, end), _INDEX)
        there = graph.op("GatherElements", [cut(graph, grouped, 0, start, end), place], place.shape, grad.dtype, axis=2)
        kept = cut(graph, values, 0, start, end)
        product = graph.op("Mul", [reshape(graph, there, kept.shape), kept], kept.shape)
        part = reduce_sum(graph, product, [0, 2])
        total = part if total is None else graph.op("Add", [total, part], part.shape)
    assert total is not None
    return total


@rule("spread_kept")
def spread_kept(graph: Graph, values: Value, packed: Value, apart: int) -> Value:
    """Zeros, written over where values are kept."""
    place = cast(graph, _unpacked(graph, packed, values, apart), _INDEX)
    shape = (*values.shape[:2], apart, values.shape[2])
    hollow = expand(graph, graph.constant(0, values.dtype), shape)
    source = reshape(graph, values, place.shape)
    return graph.op("ScatterElements", [hollow, place, source], shape, axis=2)
