"""SURGEON: entropy minimisation where the gradients of weights see pruned inputs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.reference.base import Adaptation, entropy
from tests.reference.normalisation import LiveBatchNorm


def pruned(x: Tensor, rows: int, apart: int) -> Tensor:
    """x (N, …) with all but the largest in magnitude of every `apart` numbers of a channel at zero; those of a group are count / apart apart."""
    grouped = x.reshape(x.shape[0], rows, apart, -1)
    kept = torch.zeros_like(grouped, dtype=torch.bool).scatter(2, grouped.abs().argmax(2, keepdim=True), True)
    return torch.where(kept, grouped, torch.zeros_like(grouped)).reshape(x.shape)


class Surgeon(Adaptation):
    """Adam on the entropy, over scale and shift of the normalisations or over all layers with weights (CVPR 2025).

    Args:
        full: whether all layers are trained.
        apart: by module, one of how many numbers that it reads is kept; 1 by default.
    """

    optimiser_name = "adam"

    def __init__(self, model: nn.Module, full: bool = False, apart: Mapping[str, int] | None = None, **options: object) -> None:
        self.full, self.apart = full, dict(apart or {})
        super().__init__(model, **options)  # type: ignore[arg-type]

    def build(self) -> None:
        self.layers: dict[str, nn.Module] = {}
        self.sizes: dict[str, int] = {}
        kinds = (LiveBatchNorm, nn.Conv2d, nn.Linear) if self.full else (LiveBatchNorm,)
        for name, layer in self.model.named_modules():
            if isinstance(layer, kinds):
                layer.requires_grad_(True)
                layer.register_forward_hook(self.instead)
                self.layers[name] = layer

    def instead(self, layer: nn.Module, given: tuple[Tensor], result: Tensor) -> Tensor:
        """The layer's result: its gradient to the input as it is, that to the weights through the pruned input."""
        name, x = next(name for name, other in self.layers.items() if other is layer), given[0]
        self.sizes[name] = x[0].numel()
        if self.apart.get(name, 1) == 1:
            return result
        weight, bias = layer.weight, layer.bias
        fixed = weight.detach(), None if bias is None else bias.detach()
        if isinstance(layer, LiveBatchNorm):
            mean, variance = layer.following if layer.live and layer.following is not None else (layer.mean, layer.variance)
            centre = mean.view(1, -1, 1, 1)
            less = pruned(x.detach() - centre, x.shape[1], self.apart[name]) + centre
            through = F.batch_norm(x, mean, variance, *fixed, eps=layer.eps)
            local = F.batch_norm(less, mean, variance, weight, bias, eps=layer.eps)
        elif isinstance(layer, nn.Conv2d):
            less = pruned(x.detach(), x.shape[1], self.apart[name])
            how = layer.stride, layer.padding, layer.dilation, layer.groups
            through, local = F.conv2d(x, *fixed, *how), F.conv2d(less, weight, bias, *how)
        else:
            less = pruned(x.detach(), 1, self.apart[name])
            through, local = F.linear(x, *fixed), F.linear(less, weight, bias)
        return through + local - local.detach()

    def importance(self, batches: Sequence[Tensor]) -> dict[str, float]:
        """I_i over the largest, by module: what share of each layer's input is to be kept."""
        squares = dict.fromkeys(self.layers, 0.0)
        for x in batches:
            self.zero_grad(set_to_none=True)
            entropy(self(x)).mean().backward()
            for name, layer in self.layers.items():
                squares[name] += sum(float((value.grad**2).sum()) for value in layer.parameters()) / len(batches)
        every, found = sum(self.sizes.values()), {}
        for name, layer in self.layers.items():
            count = sum(value.numel() for value in layer.parameters())
            found[name] = math.sqrt(squares[name] / count) * math.log(every / self.sizes[name])
        self.zero_grad(set_to_none=True)
        return {name: value / max(found.values()) for name, value in found.items()}
