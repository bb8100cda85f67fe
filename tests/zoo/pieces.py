"""What the layer table is made of: the sandwich around a layer, and small layers that torch has no module for."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLASSES = 5
IMAGE, EVEN, SERIES, TOKENS, VECTOR = (3, 9, 7), (3, 8, 4), (3, 13), (6, 12), (12,)
CHANNELS = 8


class Apply(nn.Module):
    """A plain function as a layer."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Sandwich(nn.Module):
    """before -> layer -> flatten -> linear. `before` fits the input: 1x1 convolution to 8 channels, or linear to 8 features on the last axis."""

    def __init__(self, layer: nn.Module, shape: tuple[int, ...]) -> None:
        super().__init__()
        if shape == SERIES:
            self.before: nn.Module = nn.Conv1d(3, CHANNELS, 1)
        elif shape in (TOKENS, VECTOR):
            self.before = nn.Linear(shape[-1], CHANNELS)
        else:
            self.before = nn.Conv2d(3, CHANNELS, 1)
        self.layer = layer
        self.head = nn.Identity()
        with torch.no_grad():
            features = self.eval()(torch.zeros(2, *shape)).flatten(1).shape[1]
        self.head = nn.Linear(features, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.flatten(self.layer(self.before(x)), 1))


class Attention(nn.Module):
    """nn.MultiheadAttention of a sequence with itself."""

    def __init__(self, **options: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(CHANNELS, 2, batch_first=True, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class Residual(nn.Module):
    """x + body(x)."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class InplaceAdd(Residual):
    """body(x) += x."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.body(x)
        out += x
        return out


class Gate(nn.Module):
    """Squeeze and excite: x times a sigmoid of its pooled self."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(CHANNELS, 4, 1), nn.ReLU(), nn.Conv2d(4, CHANNELS, 1), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x)


class Concat(nn.Module):
    """Two branches side by side."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.left, self.right, self.dim = nn.Conv2d(CHANNELS, 4, 1), nn.Conv2d(CHANNELS, 4, 3, padding=1), dim

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.left(x), self.right(x)], self.dim)


class Bilinear(nn.Module):
    """A learned matrix applied by einsum or matmul to tokens."""

    def __init__(self, product: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.matrix, self.product = nn.Parameter(torch.randn(CHANNELS, CHANNELS) / 3), product

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self.matrix)


class Scale(nn.Module):
    """A learned scale and shift per channel, broadcast over positions."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.rand(CHANNELS, 1, 1) + 0.5), nn.Parameter(torch.randn(1, CHANNELS, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.shift


def shuffle(x: Tensor, groups: int = 2) -> Tensor:
    """Channel shuffle by view, transpose, reshape."""
    batch, channels, height, width = x.shape
    return x.view(batch, groups, channels // groups, height, width).transpose(1, 2).reshape(batch, channels, height, width)


def self_attention(x: Tensor, causal: bool = False, scale: float | None = None) -> Tensor:
    """Two-headed scaled_dot_product_attention of tokens with themselves."""
    split = x.view(x.shape[0], x.shape[1], 2, -1).transpose(1, 2)
    return F.scaled_dot_product_attention(split, split.flip(-2), split * 0.5, is_causal=causal, scale=scale).transpose(1, 2).flatten(2)


def attention_by_hand(x: Tensor) -> Tensor:
    """softmax(q k' / sqrt(d)) v in plain operators."""
    return torch.softmax(x @ x.transpose(-2, -1) / x.shape[-1] ** 0.5, dim=-1) @ x


def halves(x: Tensor) -> Tensor:
    """Gated linear unit by chunk."""
    left, right = x.chunk(2, dim=1)
    return left * torch.sigmoid(right)


def unequal(x: Tensor) -> Tensor:
    """Split in three unequal parts, one of them unused."""
    first, _, last = x.split([2, 3, 3], dim=1)
    return torch.cat([last, first * first], dim=1)


def patches(x: Tensor) -> Tensor:
    """Space to depth by strided slices."""
    return torch.cat([x[:, :, 0::2, 0::2], x[:, :, 1::2, 0::2], x[:, :, 0::2, 1::2], x[:, :, 1::2, 1::2]], dim=1)


def positive(x: Tensor) -> Tensor:
    """A smooth value above 0.1, away from the kinks of sqrt and log."""
    return x * x + 0.1
