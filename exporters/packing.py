"""Named tensors as one matrix of blocks, row after row, and back.

A state of few large tensors costs a device less than one of many small ones, and a step that works on all of them at once has fewer nodes. Blocks
have one width, and a row of a tensor begins a new block: what a block shares, its unit or its scale, is never shared by two rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from edgeadapt.exporters.stretches import stretches

WIDEST, NARROWEST = 256, 8
SCALES = 8
"""Bytes a block for what its elements share: the parameters' unit and the moment's scale."""

MOST = 65536
"""Elements of one matrix, if no tensor alone has more: an update holds up to 32 bytes an element of it while it works, and every further matrix takes
about a hundred nodes, 0.3 MB of a session. So many balance the two up to some hundred thousand parameters."""

AT_ONCE = 2**18
"""Elements of a matrix that an update works on at once, at most: a large tensor alone may have more, and what holds 32 bytes an element would be the
peak of the whole step."""


@dataclass(frozen=True)
class Place:
    """Where a tensor lies: `rows` rows of `length` elements, `blocks` blocks each, from block `first` on."""

    name: str
    shape: tuple[int, ...]
    rows: int
    length: int
    blocks: int
    first: int


@dataclass(frozen=True)
class Pack:
    """A matrix (blocks, width) of several tensors: those with rows first, then the vectors."""

    name: str
    width: int
    places: tuple[Place, ...]

    @property
    def blocks(self) -> int:
        """Its rows."""
        last = self.places[-1]
        return last.first + last.rows * last.blocks

    @property
    def divide(self) -> int:
        """Where the vectors begin."""
        return next((place.first for place in self.places if len(place.shape) < 2), self.blocks)

    @property
    def elements(self) -> int:
        """Of the tensors, without what rows are filled up with."""
        return sum(place.rows * place.length for place in self.places)

    @property
    def alone(self) -> Place | None:
        """Its only tensor, where that is larger than what is worked on at once; such a one shares its matrix with no other."""
        return self.places[0] if len(self.places) == 1 and self.elements > AT_ONCE else None

    def slabs(self) -> list[tuple[int, int]]:
        """Blocks that an update works on at once, as equal as can be: where each slab begins and ends."""
        return stretches(self.blocks, self.blocks * self.width, AT_ONCE)

    def reads(self, rows: int) -> list[tuple[int, int]]:
        """Rows that are made into what the model computes with at once, of `rows` that hold its elements.

        Half of what an update works on: equal pieces would be merged with those of the update, and live in float32 until then.
        """
        return stretches(rows, self.elements, AT_ONCE // 2)

    def gather(self, values: Mapping[str, Tensor]) -> Tensor:
        """The matrix of the named tensors; rows are filled up with zeros."""
        parts = [_filled(values[place.name].reshape(place.rows, place.length), place.blocks * self.width) for place in self.places]
        return torch.cat([part.reshape(-1, self.width) for part in parts])

    def scatter(self, matrices: Sequence[Tensor], begins: Sequence[int]) -> dict[str, Tensor]:
        """The tensors by name, from pieces of the matrix and the blocks that these begin at."""
        table = {}
        for place in self.places:
            piece, begin = next((piece, begin) for piece, begin in zip(reversed(matrices), reversed(begins), strict=True) if begin <= place.first)
            rows = piece.narrow(0, place.first - begin, place.rows * place.blocks).reshape(place.rows, place.blocks * self.width)
            table[place.name] = rows.narrow(1, 0, place.length).reshape(place.shape)
        return table

    def spread(self, rows: Mapping[str, Tensor]) -> Tensor:
        """A number a row of each tensor, (rows,), as one a block, (blocks, 1)."""
        return torch.cat([rows[place.name].reshape(-1).repeat_interleave(place.blocks) for place in self.places]).unsqueeze(1)


def rows_of(shape: Sequence[int]) -> tuple[int, int]:
    """Rows of a parameter and their length: those of a matrix, the output channels of a convolution; a vector is one row."""
    return (int(shape[0]), math.prod(shape[1:])) if len(shape) > 1 else (1, math.prod(shape))


def packs_of(stem: str, shapes: Mapping[str, Sequence[int]]) -> list[Pack]:
    """Packs of tensors of these shapes, about in their order. `stem`: their name; with a number, where there are several."""
    groups: list[list[str]] = []
    held = MOST
    for name, shape in shapes.items():
        size = math.prod(shape)
        if held + size > MOST:
            groups.append([])
            held = 0
        groups[-1].append(name)
        held += size
    table = {}
    for k, group in enumerate(groups):
        ordered = sorted(group, key=lambda name: len(shapes[name]) < 2)
        table[stem if len(groups) == 1 else f"{stem}.{k}"] = {name: tuple(shapes[name]) for name in ordered}
    return [_pack(name, found) for name, found in table.items()]


def _pack(name: str, shapes: Mapping[str, tuple[int, ...]]) -> Pack:
    sizes = [rows_of(shape) for shape in shapes.values()]

    def cost(width: int) -> tuple[int, int]:
        """Bytes beyond one an element, and, of equal ones, the wider first."""
        blocks = sum(rows * -(-length // width) for rows, length in sizes)
        return blocks * (2 * width + SCALES), -width

    width = min(range(NARROWEST, WIDEST + 1), key=cost)
    places, first = [], 0
    for (tensor, shape), (rows, length) in zip(shapes.items(), sizes, strict=True):
        blocks = -(-length // width)
        places.append(Place(tensor, shape, rows, length, blocks, first))
        first += rows * blocks
    return Pack(name, width, tuple(places))


def _filled(rows: Tensor, length: int) -> Tensor:
    missing = length - rows.shape[1]
    return F.pad(rows, [0, missing]) if missing else rows
