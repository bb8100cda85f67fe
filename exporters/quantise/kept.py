"""What a step keeps of its forward pass for the backward one, as bytes.

The idea is Mesa's (Pan et al., arXiv 2111.11124): compute with exact values, keep rounded ones. Ranges here are those of this very tensor, channel by
channel, so that nothing lies outside them; codes saturate at both ends all the same. What lies on a grid already is kept as the codes that it is
made from. Vectors, matrices of a row a sample, and weights are kept as they are; ReLUs keep truth values, absolute values their signs.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from edgeadapt.exporters.quantise.operators import from_codes, to_codes
from edgeadapt.exporters.quantise.ranges import Grid, grid_between

SMALL = 16384
"""Tensors of fewer elements are kept as they are: the nodes cost more than the bytes."""

Packed = Tensor | tuple[Tensor, Tensor, Tensor]


class Kept:
    """The hooks of one forward pass over a batch; see `torch.autograd.graph.saved_tensors_hooks`.

    Args:
        batch: samples in it.
    """

    def __init__(self, batch: int) -> None:
        self.batch = batch
        self._held: set[int] = set()
        self._grids: dict[tuple[object, ...], Grid] = {}
        self._even: dict[int, Grid] = {}
        self._alive: list[Tensor] = []

    def whole(self, tensors: Iterable[Tensor]) -> None:
        """Told of tensors that are kept as they are, as they are there anyway: weights."""
        for tensor in tensors:
            self._held.add(_storage(tensor))
            self._alive.append(tensor)

    def lies_on(self, value: Tensor, grid: Grid) -> None:
        """Told of a tensor whose values lie on a grid."""
        self._grids[_place(value)] = grid
        if not grid.scale.dim():  # one for all: views of it lie there too
            self._even[_storage(value)] = grid
        self._alive.append(value)  # or another would take its place in memory, and its name here

    def hooks(self) -> saved_tensors_hooks:
        """A context for the forward pass."""
        return saved_tensors_hooks(self._pack, self._unpack)

    def _pack(self, x: Tensor) -> Packed:
        if x.dtype != torch.float32 or not self._large(x) or _storage(x) in self._held:
            return x
        with torch.no_grad():
            grid = self._grids.get(_place(x)) or self._even.get(_storage(x)) or range_of(x)
            return to_codes(x, grid.scale, grid.zero), grid.scale, grid.zero

    @staticmethod
    def _unpack(packed: Packed) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        with torch.no_grad():
            return from_codes(*packed)

    def _large(self, x: Tensor) -> bool:
        """Whether it is a batch's: samples by channels, or rows of several a sample, and not small."""
        rows = x.shape[0] if x.dim() else 0
        return x.numel() >= SMALL and ((x.dim() > 2 and rows == self.batch) or (x.dim() == 2 and rows > self.batch and rows % self.batch == 0))


def range_of(x: Tensor) -> Grid:
    """The grid of each channel (axis 1) from its least to its largest value, with zero among its values."""
    axes = [axis for axis in range(x.dim()) if axis != 1]
    return grid_between(x.amin(axes), x.amax(axes), LEAST)


LEAST = 1e-30
"""The least step, of a channel that is zero throughout."""


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _place(tensor: Tensor) -> tuple[object, ...]:
    """What tells a tensor from views of it, whose axes may be others: a turned one has no channels where the tensor has."""
    return _storage(tensor), tuple(tensor.shape), tensor.stride(), tensor.storage_offset()
