"""A model's numbers in 8 bits, and one forward pass over the frozen backbone with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, fx

from edgeadapt.exporters.capture import Norm
from edgeadapt.exporters.quantise.kept import Kept
from edgeadapt.exporters.quantise.layout import ENTRY, Layer, Layout
from edgeadapt.exporters.quantise.matrices import stored_linear
from edgeadapt.exporters.quantise.operators import CODES, quantise, quantised_convolution, quantised_relu
from edgeadapt.exporters.quantise.ranges import Grid

MOST = 2.0**30
"""Of a convolution's bias, in units of its sum: half of what an int32 holds, so that the sum fits as well."""


def weight_name(weight: str) -> tuple[str, str]:
    """The names of a weight's int8 codes and of their scales."""
    return f"{weight}.int8", f"{weight}.scale"


def grid_name(key: str) -> tuple[str, str]:
    """The names of a grid's scale and zero."""
    return f"grid.{key}.scale", f"grid.{key}.zero"


def gradient_name(node: str, weight: str) -> tuple[str, str]:
    """The names of a weight turned round and of how far the gradient behind a convolution reaches."""
    return f"{weight}.turned", f"reach.{node}"


@dataclass(frozen=True)
class Quantisation:
    """What lies on which grids. tensors: int8 weights, scales and grids by name, frozen tensors of the bundle."""

    layout: Layout
    tensors: dict[str, Tensor]

    @staticmethod
    def of(layout: Layout, grids: Mapping[str, Grid], weights: Mapping[str, tuple[Tensor, Tensor]]) -> Quantisation:
        """From grids by key, and codes and scales by the weight's name."""
        tensors: dict[str, Tensor] = {}
        for key, grid in grids.items():
            tensors.update(zip(grid_name(key), (grid.scale, grid.zero), strict=True))
        for name, pair in weights.items():
            tensors.update(zip(weight_name(name), pair, strict=True))
        return Quantisation(layout, tensors)

    @property
    def weights(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Codes and scales of each weight, by its name."""
        names = {weight: weight_name(weight) for weight in self.layout.weights}
        return {weight: (self.tensors[codes], self.tensors[scale]) for weight, (codes, scale) in names.items()}


class Scaling(Protocol):
    """How a normalisation that does not move scales and shifts its channels."""

    def fixed(self, name: str, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor] | None:
        """Scale and shift (C,) of layer `name`; None where its statistics move."""
        ...


class Rounding:
    """One forward pass.

    Args:
        quantisation: what is rounded to what.
        tensors: all frozen tensors, those of the quantisation among them.
        norms: the model's normalisations by node.
        normalise: how they behave.
        affine: weights and biases of normalisations that are trained, by qualified name.
        kept: told of what lies on grids, if the pass keeps tensors in a small form.
    """

    def __init__(
        self,
        quantisation: Quantisation,
        tensors: Mapping[str, Tensor],
        norms: Mapping[str, Norm],
        normalise: Scaling,
        affine: Mapping[str, Tensor],
        kept: Kept | None = None,
    ) -> None:
        self.kept = kept
        self.layout, self.tensors, self.norms, self.normalise, self.affine = quantisation.layout, tensors, norms, normalise, affine
        self.folded: set[str] = set()
        self._round: set[str] = set()

    def entry(self, start: fx.Node, x: Tensor) -> Tensor:
        """The tensor that enters a segment at `start`, on its grid."""
        key = ENTRY + start.name
        return self._on_grid(key, x) if key in self.layout.tensors or key in self.layout.channels else x

    def convolution(self, node: fx.Node, x: Tensor) -> Tensor | None:
        """The result of a convolution in 8 bits, with what could be made part of it; None if it stays in float32."""
        layer = self.layout.layers.get(node.name)
        if layer is None:
            return None
        scaling = self._scaling(layer)
        joined = scaling is not None or not layer.norm
        end = layer.end if joined else layer.bare
        if layer.norm and joined:
            self.folded.add(layer.norm)
        self._round |= {end, node.name}
        return self._convolve(layer, x, scaling, self._grid(end))

    def linear(self, node: fx.Node, args: Sequence[Any]) -> Tensor | None:
        """The result of a linear layer whose weight is stored in 8 bits; None for others."""
        weight = self.layout.stored.get(node.name)
        if weight is None:
            return None
        codes, scale = (self.tensors[name] for name in weight_name(weight))
        return stored_linear(args[0], codes, scale, args[2] if len(args) > 2 else None)

    def settled(self, node: fx.Node, value: Tensor) -> Tensor:
        """The value of a node that is no convolution in 8 bits: on its grid, if it has one and does not lie there already."""
        if node.name in self._round:
            return self._known(value, self._grid(node.name))
        return self._on_grid(node.name, value) if node.name in self.layout.tensors | self.layout.channels else value

    def relu(self, node: fx.Node, x: Tensor) -> Tensor | None:
        """A ReLU and its rounding in one; None if the node is none whose result lies on a grid, or its input lies there already."""
        if node.name not in self.layout.relus or node.name in self._round:
            return None
        grid = self._grid(node.name)
        return self._known(quantised_relu(x, grid.scale, grid.zero, self.layout.relus[node.name])[0], grid)

    def _grid(self, key: str) -> Grid:
        scale, zero = grid_name(key)
        return Grid(self.tensors[scale], self.tensors[zero])

    def _on_grid(self, key: str, x: Tensor) -> Tensor:
        grid = self._grid(key)
        return self._known(quantise(x, grid.scale, grid.zero), grid)

    def _known(self, value: Tensor, grid: Grid) -> Tensor:
        if self.kept is not None:
            self.kept.lies_on(value, grid)
        return value

    def _scaling(self, layer: Layer) -> tuple[Tensor, Tensor] | None:
        """Scale and shift of the normalisation behind, where it can be part of the convolution."""
        norm = self.norms.get(layer.norm)
        if norm is None or norm.weight in self.affine or norm.bias in self.affine:
            return None
        weight, bias = (self.tensors[name] if name else None for name in (norm.weight, norm.bias))
        return self.normalise.fixed(norm.name, weight, bias, norm.eps)

    def _convolve(self, layer: Layer, x: Tensor, scaling: tuple[Tensor, Tensor] | None, to: Grid) -> Tensor:
        return self._known(convolved(layer, self.tensors, x, scaling, to, gradient_name(layer.node, layer.weight)), to)


def convolved(
    layer: Layer,
    tensors: Mapping[str, Tensor],
    x: Tensor,
    scaling: tuple[Tensor, Tensor] | None,
    to: Grid,
    gradient: tuple[str, str] = ("", ""),
) -> Tensor:
    """A convolution in 8 bits.

    Args:
        layer: which.
        tensors: the numbers, by name.
        x: its input (N, C_in, …).
        scaling: scale and shift (C_out,) of what follows and is part of it; None: nothing.
        to: the grid of the result.
        gradient: names of the numbers for the gradient in 8 bits, where there are any.
    """
    codes, weight_scale = (tensors[name] for name in weight_name(layer.weight))
    source, how = Grid(*(tensors[name] for name in grid_name(layer.source))), layer.how
    unit, shift = weight_scale, tensors[layer.bias] if layer.bias else torch.zeros_like(weight_scale)
    if scaling is not None:
        unit, shift = unit * scaling[0], shift * scaling[0] + scaling[1]
    real = unit
    least = (shift.abs() + CODES * to.scale) / (source.scale * MOST)  # a channel that is scaled to nothing still has its shift
    unit = torch.where(unit.abs() < least, torch.where(unit < 0, -least, least), unit)
    bias = torch.round((shift + to.zero.to(shift.dtype) * to.scale) / (source.scale * unit)).to(torch.int32)
    turned, reach = (tensors.get(name) for name in gradient)
    return quantised_convolution(
        x, codes, real, source.scale, source.zero, unit / to.scale, bias, to.scale, to.zero, turned, reach,
        how.stride, how.padding, how.dilation, how.groups,
    )  # fmt: skip
