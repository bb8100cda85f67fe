"""Equal stretches of an axis: what they cover, how many there are, and that those that cut tensors use them."""

from __future__ import annotations

import numpy as np
import pytest

from edgeadapt.exporters import packing
from edgeadapt.exporters.ir import Graph
from edgeadapt.exporters.lowering import quantised
from edgeadapt.exporters.packing import packs_of
from edgeadapt.exporters.stretches import stretches


@pytest.mark.parametrize("parts", [None, 1, 3, 64])
@pytest.mark.parametrize(("length", "size"), [(1, 1), (1, 10_000), (7, 7), (7, 70), (64, 4096), (61, 61 * 99), (1000, 1000)])
@pytest.mark.parametrize("most", [1, 100, 1024, 10**6])
def test_they_cover_the_axis_and_are_as_equal_and_as_few_as_can_be(length: int, size: int, most: int, parts: int | None) -> None:
    found = stretches(length, size, most, parts)
    assert [end for _, end in found] == [*(begin for begin, _ in found[1:]), length]
    assert found[0][0] == 0
    sizes = [end - begin for begin, end in found]
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) >= 1
    bound = length if parts is None else min(parts, length)
    assert len(found) <= bound
    assert len(found) == bound or size <= most * len(found), "no more in one than there may be"
    assert len(found) == 1 or size > most * (len(found) - 1), "no more of them than needed"


def test_an_update_and_a_stored_weight_are_cut_so() -> None:
    (pack,) = packs_of("p", {"a": (3000, 300)})
    assert pack.blocks * pack.width > 3 * packing.AT_ONCE
    assert pack.slabs() == stretches(pack.blocks, pack.blocks * pack.width, packing.AT_ONCE)
    assert len(pack.slabs()) > 3
    for rows, count in ((1001, 4), (70, 35)):  # as many as the room asks for, or rows of their own
        graph = Graph("g")
        codes = graph.input("codes", (rows, quantised.ROWS * 4 // 1001 if count == 4 else quantised.ROWS // 2), np.int8)
        found = quantised._rows(graph, codes)
        assert [(start, end) for start, end, _ in found] == stretches(rows, rows * codes.shape[1], quantised.ROWS, quantised.PIECES)
        assert len(found) == count
    assert len(quantised._rows(graph, graph.input("more", (200, quantised.ROWS), np.int8))) == quantised.PIECES
