"""Arithmetic in 8 bits as ATen-level operators: eagerly what onnxruntime computes, traced as one operator each, and differentiable.

Eager sums are float32: those below 2²⁴ are onnxruntime's to the last bit.

Tensors between operators stay float32, with values that lie on a grid: real = (code − zero)·scale, codes 0..255. Where an operator that gives such a
tensor meets one that wants it on the same grid, nothing is left between them on the device but the codes.

Gradients are straight-through (Bengio et al., arXiv 1308.3432): rounding counts as the identity. A ReLU that is part of a rounding keeps its own
gradient, by the codes: 0 where the code is 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from edgeadapt.exporters.operators import channel_axes, per_channel

CODES = 255
"""The largest code."""
MIDDLE, LEVELS = 128, 127
"""The code of zero where values lie on both sides of it alike, and how many codes there are on either side. Codes of weights are these less 128."""
TINY = 1e-30
"""The least range of a gradient."""

aten = torch.ops.aten


def codes_of(x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Codes of x as float32 of whole numbers 0..255: rounded to nearest, ties to even, both ends saturating; as ONNX's QuantizeLinear to uint8.

    scale () or (C,) float32, zero the same, uint8.
    """
    if scale.dim():
        scale, zero = per_channel(scale, x.dim()), per_channel(zero, x.dim())
    return (torch.round(x / scale) + zero.to(x.dtype)).clamp(0, CODES)


def values_of(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """What codes stand for; as ONNX's DequantizeLinear."""
    if scale.dim():
        scale, zero = per_channel(scale, codes.dim()), per_channel(zero, codes.dim())
    return (codes - zero.to(codes.dtype)) * scale


@torch.library.custom_op("edgeadapt::to_codes", mutates_args=())
def to_codes(x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Codes of x (N, C, …) on a grid, uint8; without gradient."""
    return codes_of(x, scale, zero).to(torch.uint8)


@to_codes.register_fake
def _(x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return torch.empty_like(x, dtype=torch.uint8)


@torch.library.custom_op("edgeadapt::from_codes", mutates_args=())
def from_codes(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """What codes (N, C, …) stand for, in the type of `scale`; without gradient."""
    return values_of(codes.to(scale.dtype), scale, zero)


@from_codes.register_fake
def _(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return torch.empty_like(codes, dtype=scale.dtype)


@torch.library.custom_op("edgeadapt::quantise", mutates_args=())
def quantise(x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """x (N, C, …) rounded to a grid; scale () or (C,) float32, zero the same, uint8. The gradient passes as it is."""
    return values_of(codes_of(x, scale, zero), scale, zero)


@quantise.register_fake
def _(x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return torch.empty_like(x)


quantise.register_autograd(lambda ctx, grad: (grad, None, None))


@torch.library.custom_op("edgeadapt::quantised_relu", mutates_args=())
def quantised_relu(x: Tensor, scale: Tensor, zero: Tensor, both: bool) -> tuple[Tensor, Tensor]:
    """ReLU and rounding in one: x (N, …) to a grid () whose zero is code 0, and the truth values that its gradient is masked by.

    both: the activation is flat at the grid's upper end too, as ReLU6 is.
    """
    codes = codes_of(x, scale, zero)
    mask = (codes > 0) & (codes < CODES) if both else codes > 0
    return values_of(codes, scale, zero), mask


@quantised_relu.register_fake
def _(x: Tensor, scale: Tensor, zero: Tensor, both: bool) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x, dtype=torch.bool)


def _keep_mask(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1])


def _masked(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor, None, None, None]:
    (mask,) = ctx.saved_tensors
    return grad * mask, None, None, None


quantised_relu.register_autograd(_masked, setup_context=_keep_mask)


def _convolve(x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int) -> Tensor:
    rank = x.dim() - 2
    result: Tensor = aten.convolution(x, weight, None, stride, padding, dilation, False, [0] * rank, groups)
    return result


@torch.library.custom_op("edgeadapt::quantised_convolution", mutates_args=())
def quantised_convolution(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    input_scale: Tensor,
    input_zero: Tensor,
    scale: Tensor,
    bias: Tensor,
    output_scale: Tensor,
    output_zero: Tensor,
    turned: Tensor | None,
    reach: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """A frozen convolution of codes by int8 weights with int32 sums, as ONNX's QLinearConv with the output's scale 1 and zero 0.

        code = saturate(round((Σ weight·(code(x) − input_zero) + bias)·input_scale·scale))
        y    = (code − output_zero)·output_scale

    Args:
        x: (N, C_in, …) float32; it is rounded to the grid (input_scale (), input_zero ()).
        weight: int8 (C_out, C_in / groups, …), the real ones divided by weight_scale (C_out,).
        scale: (C_out,), float32: what a unit of the sum counts in codes of the output, divided by input_scale.
        bias: int32 (C_out,), in units of the sum; the output's zero is part of it.
        output_scale, output_zero: () or (C_out,), float32 and uint8.
        turned, reach: for the gradient in 8 bits, see `quantised_convolution_backward`; None: it is computed in float32.

    Returns:
        float32 (N, C_out, …) on the output's grid. The gradient reaches x alone, through the weights as they are.
    """
    codes = codes_of(x, input_scale, input_zero)
    rank = x.dim()
    total = _convolve(codes - input_zero.to(x.dtype), weight.to(x.dtype), stride, padding, dilation, groups)
    unit = per_channel(input_scale * scale, rank)
    out = torch.round((total + per_channel(bias, rank).to(x.dtype)) * unit).clamp(0, CODES)
    return values_of(out, output_scale, output_zero)


@quantised_convolution.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    input_scale: Tensor,
    input_zero: Tensor,
    scale: Tensor,
    bias: Tensor,
    output_scale: Tensor,
    output_zero: Tensor,
    turned: Tensor | None,
    reach: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    size = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, p, d, k, s in zip(x.shape[2:], padding, dilation, weight.shape[2:], stride, strict=True)]
    return x.new_empty((x.shape[0], weight.shape[0], *size))


@torch.library.custom_op("edgeadapt::dequantised_convolution_backward", mutates_args=())
def dequantised_convolution_backward(
    grad: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """The gradient (N, C_in, *size) of a convolution's input in float32: of its output (N, C_out, …) through the weights weight·weight_scale."""
    real = weight.to(grad.dtype) * weight_scale.reshape(-1, *[1] * (weight.dim() - 1))
    x = grad.new_empty((grad.shape[0], weight.shape[1] * groups, *size))
    rank = grad.dim() - 2
    result: Tensor = aten.convolution_backward(
        grad, x, real, None, stride, padding, dilation, False, [0] * rank, groups, [True, False, False]
    )[0]
    return result


@dequantised_convolution_backward.register_fake
def _(
    grad: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    return grad.new_empty((grad.shape[0], weight.shape[1] * groups, *size))


@torch.library.custom_op("edgeadapt::quantised_convolution_backward", mutates_args=())
def quantised_convolution_backward(
    grad: Tensor, turned: Tensor, weight_scale: Tensor, reach: Tensor, padding: Sequence[int], dilation: Sequence[int], groups: int
) -> Tensor:
    """The gradient of the input of a convolution of stride 1, in 8 bits: a convolution with the weight turned round, as QLinearConv.

        g    = grad·weight_scale, rounded to codes around 128 with the step s = max|g| / 127 of this very gradient;
               code(g) = round(grad / (s / weight_scale)) + 128
        code = saturate(round(Σ turned·(code(g) − 128) / reach) + 128)
        dx   = (code − 128)·s·reach

    Args:
        grad: (N, C_out, …).
        turned: int8 (C_in, C_out / groups, …): the weight with its windows reversed and its channels exchanged.
        weight_scale: (C_out,).
        reach: (C_in,): how many units of the sum a code counts for; the ratio of the result's range to that of g, which was measured at export.
        padding: of this convolution: what the window spans, less what the forward one pads.
    """
    axes = channel_axes(grad)
    step = (torch.maximum(grad.amax(axes), -grad.amin(axes)) * weight_scale).amax().clamp(min=TINY) / LEVELS
    codes = (torch.round(grad / per_channel(step / weight_scale, grad.dim())) + MIDDLE).clamp(0, CODES)
    total = _convolve(codes - MIDDLE, turned.to(grad.dtype), [1] * len(padding), padding, dilation, groups)
    out = (torch.round(total * per_channel(1.0 / reach, grad.dim())) + MIDDLE).clamp(0, CODES)
    return (out - MIDDLE) * per_channel(step * reach, grad.dim())


@quantised_convolution_backward.register_fake
def _(
    grad: Tensor, turned: Tensor, weight_scale: Tensor, reach: Tensor, padding: Sequence[int], dilation: Sequence[int], groups: int
) -> Tensor:
    size = [n + 2 * p - d * (k - 1) for n, p, d, k in zip(grad.shape[2:], padding, dilation, turned.shape[2:], strict=True)]
    return grad.new_empty((grad.shape[0], turned.shape[0], *size))


def turned_round(weight: Tensor, groups: int) -> Tensor:
    """A weight (C_out, C_in / groups, …) for the gradient's convolution: (C_in, C_out / groups, …), windows reversed."""
    grouped = weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:]).transpose(1, 2)
    return grouped.flip(list(range(3, grouped.dim()))).flatten(0, 1).contiguous()


Watcher = Callable[[Tensor, Tensor, Tensor], None]
_watchers: list[Watcher] = []


@contextmanager
def watched(watcher: Watcher) -> Iterator[None]:
    """Has a function told of each gradient through a convolution: the weight's codes, grad·weight_scale, and the gradient of the input."""
    _watchers.append(watcher)
    try:
        yield
    finally:
        _watchers.remove(watcher)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, weight_scale = inputs[:3]
    ctx.in_codes = inputs[9] is not None
    ctx.save_for_backward(weight, weight_scale, *(inputs[9:11] if ctx.in_codes else ()))
    ctx.size, ctx.how = list(x.shape[2:]), inputs[11:]


def _through(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    weight, weight_scale, *more = ctx.saved_tensors
    stride, padding, dilation, groups = ctx.how
    if ctx.in_codes:
        turned, reach = more
        around = [d * (k - 1) - p for d, k, p in zip(dilation, weight.shape[2:], padding, strict=True)]
        to_input = quantised_convolution_backward(grad, turned, weight_scale, reach, around, dilation, groups)
    else:
        to_input = dequantised_convolution_backward(grad, weight, weight_scale, ctx.size, stride, padding, dilation, groups)
    for watcher in _watchers:
        watcher(weight, grad * per_channel(weight_scale, grad.dim()), to_input)
    return (to_input, *[None] * 14)


quantised_convolution.register_autograd(_through, setup_context=_remember)
