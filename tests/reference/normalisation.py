"""Batch normalisation that follows the stream."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class LiveBatchNorm(nn.Module):
    """Normalises (N, C, …) with running statistics s ← (1 − w)·s + w·b, where b is this batch's mean and population variance, and w is `mix`.

    Every forward pass starts from the statistics of the last `commit`, so that a second pass over the same batch finds the same ones.

    Attributes:
        live: otherwise the statistics stay as they are.
        exact: gradients flow through b; otherwise s is a constant.
        quick: take b from torch's own kernel for it, which in some versions is several times faster than `var_mean`; not with `exact`.
        lean: where scale and shift are frozen, multiply and add instead of calling `batch_norm`, which keeps its input; not with `exact`.
    """

    mean: Tensor
    variance: Tensor

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("variance", torch.ones(channels))
        self.eps, self.mix, self.live, self.exact = eps, 1.0, True, False
        self.quick, self.lean = False, False
        self.following: tuple[Tensor, Tensor] | None = None

    @classmethod
    def replacing(cls, norm: nn.BatchNorm1d | nn.BatchNorm2d) -> LiveBatchNorm:
        """A layer that starts where this one stands."""
        layer = cls(norm.num_features, norm.eps)
        with torch.no_grad():
            layer.weight.copy_(norm.weight)
            layer.bias.copy_(norm.bias)
            layer.mean.copy_(norm.running_mean)
            layer.variance.copy_(norm.running_var)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        mean, variance = self.mean, self.variance
        if self.live:
            batch_mean, batch_variance = self._statistics(x if self.exact else x.detach())
            mean = (1 - self.mix) * mean + self.mix * batch_mean
            variance = (1 - self.mix) * variance + self.mix * batch_variance
            self.following = mean.detach(), variance.detach()
        shape = (1, -1, *[1] * (x.dim() - 2))
        if self.lean and not self.exact and not self.weight.requires_grad:
            scale = self.weight / (variance + self.eps).sqrt()
            return torch.addcmul((self.bias - mean * scale).view(shape), x, scale.view(shape))
        if not (self.live and self.exact):
            return F.batch_norm(x, mean, variance, self.weight, self.bias, training=False, eps=self.eps)
        standard = (x - mean.view(shape)) / (variance.view(shape) + self.eps).sqrt()
        return standard * self.weight.view(shape) + self.bias.view(shape)

    def _statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.quick and not self.exact:
            mean, variance = torch.batch_norm_update_stats(x, None, None, 0.0)
            return mean, variance
        variance, mean = torch.var_mean(x, [axis for axis in range(x.dim()) if axis != 1], correction=0)
        return mean, variance

    def commit(self) -> None:
        """Keep the statistics of the last forward pass."""
        if self.following is not None:
            (self.mean, self.variance), self.following = self.following, None


def follow_stream(module: nn.Module) -> nn.Module:
    """Replace every BatchNorm inside a module, in place."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm1d | nn.BatchNorm2d):
            setattr(module, name, LiveBatchNorm.replacing(child))
        else:
            follow_stream(child)
    return module
