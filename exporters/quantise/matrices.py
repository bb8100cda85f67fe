"""Matrix products with weights that are stored in 8 bits: int8 codes, one scale for each output, products in float32.

A classifier's weight is often the largest tensor of a model, and what it is multiplied with is small. So what counts is the room that it takes, which
is a quarter; neither inputs nor results are rounded. On the device a piece of the codes at a time is made into numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx

from edgeadapt.exporters.capture import Captured

aten = torch.ops.aten
LARGE = 2**16
"""Numbers of a weight that is stored in 8 bits, at least: 256 KiB in float32. Smaller ones are not worth their nodes."""


def matrices(captured: Captured) -> Iterator[fx.Node]:
    """The linear layers with a large weight of the model's that nothing else reads."""
    for node in captured.operators:
        weight = node.args[1] if node.target is aten.linear.default else None
        if not isinstance(weight, fx.Node) or weight.name not in captured.owner or weight.meta["val"].numel() < LARGE:
            continue
        bias = node.args[2] if len(node.args) > 2 else None
        if isinstance(bias, fx.Node) and bias.name not in captured.owner:
            continue  # its gradient would be lost
        if all(reader.target is aten.linear.default for reader in weight.users):
            yield node


@torch.library.custom_op("edgeadapt::stored_linear", mutates_args=())
def stored_linear(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """(x·codesᵀ)·scale + bias.

    Args:
        x: (…, in), float32.
        codes: int8 (out, in).
        scale: (out,), float32.
        bias: (out,), or None.

    Returns:
        (…, out). The gradient reaches x alone.
    """
    y = torch.matmul(x, codes.to(x.dtype).t()) * scale
    return y if bias is None else y + bias


@stored_linear.register_fake
def _(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


@torch.library.custom_op("edgeadapt::stored_linear_backward", mutates_args=())
def stored_linear_backward(grad: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """The gradient (…, in) of the input, of that of the output (…, out)."""
    return torch.matmul(grad * scale, codes.to(grad.dtype))


@stored_linear_backward.register_fake
def _(grad: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    return grad.new_empty((*grad.shape[:-1], codes.shape[1]))


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:3])


def _through(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    return stored_linear_backward(grad, *ctx.saved_tensors), None, None, None


stored_linear.register_autograd(_through, setup_context=_remember)


def error_of(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, wanted: Tensor) -> float:
    """Mean square of what the result is off, against that of the wanted one without the outputs' means; of a single row, without its mean."""
    apart = (stored_linear(x, codes, scale, bias) - wanted).square().mean()
    rows = wanted.reshape(-1, wanted.shape[-1])
    varying = (rows - (rows.mean(0) if len(rows) > 1 else rows.mean())).square().mean()
    return float(apart / varying.clamp(min=1e-12))
