"""Our own ATen-level operators, and replacements for operators that have no standard ONNX form or no decomposed gradient.

They are used while the captured graph runs, eagerly in the warm-up and symbolically when the step is traced, so that both compute the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

aten = torch.ops.aten


def per_channel(vector: Tensor, rank: int) -> Tensor:
    """A vector (C,) shaped to broadcast over (N, C, …) of `rank` dimensions."""
    return vector.reshape(1, -1, *[1] * (rank - 2)) if rank > 2 else vector.reshape(1, -1)


def channel_axes(x: Tensor) -> list[int]:
    """All axes of x (N, C, …) but the channels'."""
    return [axis for axis in range(x.dim()) if axis != 1]


@torch.library.custom_op("edgeadapt::forward_ends", mutates_args=())
def forward_ends(x: Tensor) -> Tensor:
    """x itself, where the forward pass of a step ends: what is computed after it belongs to the backward pass."""
    return x.clone()


@forward_ends.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def _spread(value: Tensor, rank: int) -> Tensor:
    """Numbers (C,), or (N, C) of each frame's own, shaped to broadcast over (N, C, …) of `rank` dimensions."""
    return per_channel(value, rank) if value.dim() == 1 else value.reshape(*value.shape, *[1] * (rank - 2))


@torch.library.custom_op("edgeadapt::scale_shift", mutates_args=())
def scale_shift(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """x (N, C, …) times scale plus shift, each (C,) or (N, C): one pass on the device (an inference BatchNormalization node)."""
    return x * _spread(scale, x.dim()) + _spread(shift, x.dim())


@scale_shift.register_fake
def _(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return torch.empty_like(x)


def _remember(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    x, scale, _ = inputs
    ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, scale)


def _scale_shift_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, scale = ctx.saved_tensors
    axes = channel_axes(grad) if scale.dim() == 1 else list(range(2, grad.dim()))
    return (
        grad * _spread(scale, grad.dim()) if ctx.needs_input_grad[0] else None,
        (grad * x).sum(axes) if ctx.needs_input_grad[1] else None,
        grad.sum(axes) if ctx.needs_input_grad[2] else None,
    )


scale_shift.register_autograd(_scale_shift_backward, setup_context=_remember)


def batch_statistics(x: Tensor, shift: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean and population variance over all but the channel axis of x (N, C, …), each (C,).

    The variance is E[(x−k)²] − E[x−k]² with k = `shift` (C,), 0 by default: one elementwise pass instead of two. A layer whose mean is large
    against its deviation passes its source mean as the shift, which keeps the subtraction exact enough.
    """
    axes = channel_axes(x)
    centred = x if shift is None else x - per_channel(shift, x.dim())
    mean = centred.mean(axes)
    variance = ((centred * centred).mean(axes) - mean * mean).clamp(min=0.0)
    return (mean if shift is None else mean + shift), variance


class _Split(torch.autograd.Function):
    """Value of `through`; its gradient reaches both arguments (see `split_gradient`)."""

    @staticmethod
    def forward(ctx: Any, through: Tensor, local: Tensor) -> Tensor:
        return through.view_as(through)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, grad


def split_gradient(through: Tensor, local: Tensor) -> Tensor:
    """Join two evaluations of equal value, one that carries the gradient to the inputs and one that carries it to the parameters.

    Lets a loss on `local` reach the parameters alone in the same backward pass: the duplicate forward is merged when the graph is lowered.
    """
    result: Tensor = _Split.apply(through, local)  # type: ignore[no-untyped-call]
    return result


class _Relu(torch.autograd.Function):
    """ReLU that keeps truth values for its gradient instead of its result."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = x.relu()
        ctx.save_for_backward(y > 0)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (mask,) = ctx.saved_tensors
        return grad * mask


def rectified(x: Tensor) -> Tensor:
    """ReLU; truth values are kept for its gradient, a quarter of the bytes of its result."""
    result: Tensor = _Relu.apply(x)  # type: ignore[no-untyped-call]
    return result


class _Magnitude(torch.autograd.Function):
    """Absolute value that keeps signs as bytes for its gradient instead of its argument."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x.sign().to(torch.int8))
        return x.abs()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (sign,) = ctx.saved_tensors
        return grad * sign.to(grad.dtype)


def magnitude(x: Tensor) -> Tensor:
    """Absolute value; signs are kept for its gradient, as bytes."""
    result: Tensor = _Magnitude.apply(x)  # type: ignore[no-untyped-call]
    return result


def _instance_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    use_input: bool,
    momentum: float,
    eps: float,
    *_: Any,
) -> Tensor:
    if use_input or mean is None or variance is None:
        axes = list(range(2, x.dim()))
        centre = x - x.mean(axes, keepdim=True)
        y = centre * ((centre * centre).mean(axes, keepdim=True) + eps).rsqrt()
    else:
        y = (x - per_channel(mean, x.dim())) * per_channel((variance + eps).rsqrt(), x.dim())
    if weight is not None:
        y = y * per_channel(weight, x.dim())
    return y if bias is None else y + per_channel(bias, x.dim())


def _group_norm(x: Tensor, groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5, *_: Any) -> Tensor:
    grouped = x.reshape(x.shape[0], groups, -1)
    centre = grouped - grouped.mean(2, keepdim=True)
    y = (centre * ((centre * centre).mean(2, keepdim=True) + eps).rsqrt()).reshape(x.shape)
    if weight is not None:
        y = y * per_channel(weight, x.dim())
    return y if bias is None else y + per_channel(bias, x.dim())


def _batch_norm_of_batch(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, training: bool, momentum: float, eps: float
) -> tuple[Tensor, None, None]:
    mean, variance = batch_statistics(x)
    y = (x - per_channel(mean, x.dim())) * per_channel((variance + eps).rsqrt(), x.dim())
    if weight is not None:
        y = y * per_channel(weight, x.dim())
    return (y if bias is None else y + per_channel(bias, x.dim())), None, None


def adaptive_max_pool(x: Tensor, size: Any) -> tuple[Tensor, None]:
    """Adaptive max pooling as max pools over each cell, so that ties resolve as in torch and the gradient is an ordinary max pool's."""
    size = [size] if isinstance(size, int) else list(size)
    spatial = list(x.shape[-len(size) :])
    flat = x if len(size) == 2 else x.unsqueeze(-2)
    spatial, size = ([1, *spatial], [1, *size]) if len(size) == 1 else (spatial, size)
    if all(n % k == 0 for n, k in zip(spatial, size, strict=True)):
        kernel = [n // k for n, k in zip(spatial, size, strict=True)]
        y = F.max_pool2d(flat, kernel, kernel)
    else:
        edges = [[(i * n // k, -(-(i + 1) * n // k)) for i in range(k)] for n, k in zip(spatial, size, strict=True)]
        rows = []
        for top, bottom in edges[0]:
            cells = [F.max_pool2d(flat[..., top:bottom, left:right], [bottom - top, right - left]) for left, right in edges[1]]
            rows.append(torch.cat(cells, -1))
        y = torch.cat(rows, -2)
    return (y if x.dim() == flat.dim() and y.dim() == x.dim() and flat is x else y.squeeze(-2)), None


def _pad(x: Tensor, pad: list[int], mode: str = "constant", value: float | None = None) -> Tensor:
    if mode != "circular":
        return F.pad(x, pad, mode, value)
    for axis, (before, after) in enumerate(zip(pad[::2], pad[1::2], strict=True)):
        dim = x.dim() - 1 - axis
        size = x.shape[dim]
        parts = [x.narrow(dim, size - before, before)] if before else []
        parts += [x] + ([x.narrow(dim, 0, after)] if after else [])
        x = torch.cat(parts, dim) if len(parts) > 1 else x
    return x


REPLACED: dict[Any, Callable[..., Any]] = {
    aten.relu.default: rectified,
    aten.instance_norm.default: _instance_norm,
    aten.group_norm.default: _group_norm,
    aten._native_batch_norm_legit.no_stats: _batch_norm_of_batch,
    aten.adaptive_max_pool2d.default: adaptive_max_pool,
    aten.adaptive_max_pool1d.default: adaptive_max_pool,
    aten.pad.default: _pad,
    aten.view.default: torch.reshape,  # the strides seen at export may differ from those met here
}
