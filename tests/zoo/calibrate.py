"""Deterministic starting points: seeded initial weights, and normalisation statistics that are not the trivial zero and one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import ParamSpec, TypeVar, cast

import torch
from torch import nn

P = ParamSpec("P")
M = TypeVar("M", bound=nn.Module)
RUNNING = (nn.BatchNorm1d, nn.BatchNorm2d, nn.InstanceNorm1d, nn.InstanceNorm2d)


def seeded(factory: Callable[P, M]) -> Callable[P, M]:
    """Make a factory deterministic: weights drawn from the keyword `seed` (default 0), the caller's random state kept, the model in eval mode."""

    @wraps(factory)
    def build(*args: P.args, **kwargs: P.kwargs) -> M:
        seed = cast(int, kwargs.pop("seed", 0))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return factory(*args, **kwargs).eval()

    return build


def noise(shape: Sequence[int], seed: int = 0) -> torch.Tensor:
    """Standard normal float32 of this shape, the same for the same seed."""
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed))


def calibrate(model: M, input_shape: Sequence[int], seed: int = 0, batches: int = 3, size: int = 8) -> M:
    """Give every layer with running statistics plausible ones, and a scale and shift that differ by channel.

    In place; returns the model in eval mode. Statistics are the plain average over `batches` noise batches of `size` inputs; dropout stays off, so
    the result depends on the seed only.
    """
    generator = torch.Generator().manual_seed(seed)
    model.eval()
    layers = [m for m in model.modules() if isinstance(m, RUNNING)]
    with torch.no_grad():
        for layer in layers:
            if layer.affine:
                layer.weight.copy_(0.7 + 0.6 * torch.rand(layer.weight.shape, generator=generator))
                layer.bias.copy_(0.2 * torch.randn(layer.bias.shape, generator=generator))
        tracked = [(layer, layer.momentum) for layer in layers if layer.track_running_stats]
        for layer, _ in tracked:
            layer.reset_running_stats()
            layer.train()
        for k in range(batches):
            for layer, _ in tracked:  # 1 / (k + 1) makes the running value the mean so far; InstanceNorm has no cumulative mode
                layer.momentum = 1.0 / (k + 1)
            model(torch.randn((size, *input_shape), generator=generator))
        for layer, momentum in tracked:
            layer.momentum = momentum
    return model.eval()
