"""Layers that keep a part of what they read for the gradient of their weights; all other gradients are exact, and so is the result.

Kept is the largest in magnitude of every group of `apart` numbers of a channel, and which of them it is, in as few bits as tell: a static number, as
graphs need, and quick. `ArgMax` over groups took a fourth to a seventh of the time of `TopK` over blocks of 256 that keeps as many (2 million
numbers, groups of 2 to 16, in turns). Of the squares of normal numbers it keeps 82 % in pairs and 62 % in fours, where the largest of all would be
93 and 72 %. The numbers of a group lie evenly spread over the channel, so that a group is not one edge of a picture.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from edgeadapt.exporters.operators import channel_axes, per_channel, scale_shift

MOST = 256
"""Numbers in a group at most: a place in it is a byte."""
aten = torch.ops.aten


def group(count: int, share: float) -> int:
    """How many of a channel's `count` numbers make a group, so that one of each is nearest to `share` of all: a divisor, 256 at most.

    Nearest by ratio, the smaller group of two as near. share: 0 to 1.
    """
    sizes = [size for size in range(1, min(MOST, count) + 1) if count % size == 0]
    return min(sizes, key=lambda size: abs(math.log(size * max(share, 1 / MOST))))


def bits_for(apart: int, count: int) -> int:
    """In how many bits each of `count` places in groups of `apart` is kept: 1, 2, 4 or 8; whole bytes where they do not fill bytes."""
    return next(bits for bits in (1, 2, 4, 8) if apart <= 2**bits and count * bits % 8 == 0)


def to_bits(places: Tensor, bits: int) -> Tensor:
    """Whole numbers below 2**bits, int64 of any shape, as bytes (count·bits/8,) uint8, which they fill: stretches of them, one a slot of a byte."""
    shifts = torch.arange(0, 8, bits).unsqueeze(1)
    return (places.reshape(8 // bits, -1) << shifts).sum(0).to(torch.uint8)


def from_bits(packed: Tensor, bits: int) -> Tensor:
    """What `to_bits` was given, int64 in one row."""
    shifts = torch.arange(0, 8, bits).unsqueeze(1)
    return ((packed.to(torch.int64).unsqueeze(0) >> shifts) & (2**bits - 1)).flatten()


def in_groups(x: Tensor, rows: int, apart: int) -> Tensor:
    """x (N, …), of `rows` channels a frame, as (N, rows, apart, count / apart): group i of a channel is […, :, i]."""
    return x.reshape(x.shape[0], rows, apart, -1)


@torch.library.custom_op("edgeadapt::largest_of_groups", mutates_args=())
def largest_of_groups(x: Tensor, centre: Tensor | None, rows: int, apart: int) -> tuple[Tensor, Tensor]:
    """Of each group of x less `centre` (rows,): the number of largest magnitude, (N, rows, groups), and the first place where it stands.

    Places are packed, uint8 (N·rows·groups·bits / 8,), see `bits_for`.
    """
    grouped = in_groups(x, rows, apart)
    grouped = grouped if centre is None else grouped - centre.reshape(1, -1, 1, 1)
    places = grouped.abs().argmax(2, keepdim=True)
    return grouped.gather(2, places).squeeze(2), to_bits(places, bits_for(apart, places.numel()))


@largest_of_groups.register_fake
def _(x: Tensor, centre: Tensor | None, rows: int, apart: int) -> tuple[Tensor, Tensor]:
    count = x.numel() // apart
    values = x.new_empty((x.shape[0], rows, count // x.shape[0] // rows))
    return values, x.new_empty((count * bits_for(apart, count) // 8,), dtype=torch.uint8)


def _places(packed: Tensor, values: Tensor, apart: int) -> Tensor:
    return from_bits(packed, bits_for(apart, values.numel())).reshape(values.shape).unsqueeze(2)


@torch.library.custom_op("edgeadapt::products_of_kept", mutates_args=())
def products_of_kept(grad: Tensor, values: Tensor, packed: Tensor, apart: int) -> Tensor:
    """The sum of grad·x over frames and positions, (rows,), of an x of which `values` (N, rows, groups) are kept and the rest counts as zero."""
    there = in_groups(grad, values.shape[1], apart).gather(2, _places(packed, values, apart)).squeeze(2)
    return (there * values).sum([0, 2])


@products_of_kept.register_fake
def _(grad: Tensor, values: Tensor, packed: Tensor, apart: int) -> Tensor:
    return values.new_empty((values.shape[1],))


@torch.library.custom_op("edgeadapt::spread_kept", mutates_args=())
def spread_kept(values: Tensor, packed: Tensor, apart: int) -> Tensor:
    """`values` (N, rows, groups) where they stood, and zeros elsewhere: (N, rows, apart, groups)."""
    hollow = values.new_zeros((values.shape[0], values.shape[1], apart, values.shape[2]))
    return hollow.scatter(2, _places(packed, values, apart), values.unsqueeze(2))


@spread_kept.register_fake
def _(values: Tensor, packed: Tensor, apart: int) -> Tensor:
    return values.new_empty((values.shape[0], values.shape[1], apart, values.shape[2]))


class _Scaled(torch.autograd.Function):
    """x·weight/deviation + bias − mean·weight/deviation over channels (axis 1); of x − mean a part is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, mean: Tensor | None, deviation: Tensor | None, apart: int) -> Tensor:
        scale = weight if deviation is None else weight / deviation
        shift = torch.zeros_like(scale) if bias is None else bias
        shift = shift if mean is None else shift - mean * scale
        values, packed = largest_of_groups(x, mean, x.shape[1], apart)
        ctx.save_for_backward(values, packed, scale, deviation)
        ctx.apart = apart
        result: Tensor = scale_shift(x, scale, shift)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        values, packed, scale, deviation = ctx.saved_tensors
        to_x = grad * per_channel(scale, grad.dim()) if ctx.needs_input_grad[0] else None
        to_weight = products_of_kept(grad, values, packed, ctx.apart)
        to_bias = grad.sum(channel_axes(grad)) if ctx.needs_input_grad[2] else None
        return to_x, to_weight if deviation is None else to_weight / deviation, to_bias, None, None, None


def scaled(x: Tensor, weight: Tensor, bias: Tensor | None, mean: Tensor | None = None, deviation: Tensor | None = None, *, apart: int) -> Tensor:
    """x (N, C, …) less mean, over deviation, times weight, plus bias, each (C,); mean and deviation are constants.

    The gradient of weight is that of the largest |x − mean| of every group of `apart` numbers of a channel.
    """
    result: Tensor = _Scaled.apply(x, weight, bias, mean, deviation, apart)  # type: ignore[no-untyped-call]
    return result


class _Weighted(torch.autograd.Function):
    """A layer of x and a weight, of whose x a part is kept; `to_input` and `to_weight` are its gradients by the one and by the other."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, layer: Weighted, apart: int) -> Tensor:
        values, packed = largest_of_groups(x, None, layer.rows(x), apart)
        ctx.save_for_backward(values, packed, weight)
        ctx.layer, ctx.apart, ctx.shape = layer, apart, list(x.shape)
        return layer.result(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        values, packed, weight = ctx.saved_tensors
        layer = ctx.layer
        to_x = layer.to_input(grad, weight, ctx.shape) if ctx.needs_input_grad[0] else None
        to_weight = layer.to_weight(grad, spread_kept(values, packed, ctx.apart).reshape(ctx.shape), weight)
        return to_x, to_weight, layer.to_bias(grad) if ctx.needs_input_grad[2] else None, None, None


class Weighted(ABC):
    """A layer with weights: how its result and its gradients are computed."""

    @abstractmethod
    def rows(self, x: Tensor) -> int:
        """Channels a frame."""

    @abstractmethod
    def result(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """What it gives."""

    @abstractmethod
    def to_input(self, grad: Tensor, weight: Tensor, shape: Sequence[int]) -> Tensor:
        """The gradient of its input, of that shape."""

    @abstractmethod
    def to_weight(self, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """The gradient of its weight."""

    @abstractmethod
    def to_bias(self, grad: Tensor) -> Tensor:
        """The gradient of its bias."""

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None, apart: int) -> Tensor:
        """Its result; the gradient of weight is that of the largest |x| of every group of `apart` numbers of a channel."""
        result: Tensor = _Weighted.apply(x, weight, bias, self, apart)  # type: ignore[no-untyped-call]
        return result


class Convolution(Weighted):
    """A convolution over (N, C, …). how: stride, padding, dilation, one number an axis each, and groups."""

    def __init__(self, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int) -> None:
        self.how = (list(stride), list(padding), list(dilation), False, [0] * len(stride), groups)

    def rows(self, x: Tensor) -> int:
        """Its input channels."""
        return x.shape[1]

    def result(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """(N, C_out, …)."""
        found: Tensor = aten.convolution(x, weight, bias, *self.how)
        return found

    def to_input(self, grad: Tensor, weight: Tensor, shape: Sequence[int]) -> Tensor:
        """Of the input's values nothing is read."""
        found: Tensor = aten.convolution_backward(grad, grad.new_empty(list(shape)), weight, None, *self.how, [True, False, False])[0]
        return found

    def to_weight(self, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """(C_out, C_in / groups, …)."""
        found: Tensor = aten.convolution_backward(grad, x, weight, None, *self.how, [False, True, False])[1]
        return found

    def to_bias(self, grad: Tensor) -> Tensor:
        """(C_out,)."""
        return grad.sum(channel_axes(grad))


class Linear(Weighted):
    """A linear layer over the last axis of (N, …, F)."""

    def rows(self, x: Tensor) -> int:
        """Vectors a frame."""
        return math.prod(x.shape[1:-1])

    def result(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """(N, …, F_out)."""
        return torch.nn.functional.linear(x, weight, bias)

    def to_input(self, grad: Tensor, weight: Tensor, shape: Sequence[int]) -> Tensor:
        """A product with the weight."""
        return grad @ weight

    def to_weight(self, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """(F_out, F)."""
        return grad.reshape(-1, grad.shape[-1]).transpose(0, 1) @ x.reshape(-1, x.shape[-1])

    def to_bias(self, grad: Tensor) -> Tensor:
        """(F_out,)."""
        return grad.reshape(-1, grad.shape[-1]).sum(0)


Instead = Callable[..., Tensor]
"""What a node computes in place of its operator, from the same arguments."""
