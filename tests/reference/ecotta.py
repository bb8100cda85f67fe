"""EcoTTA (arXiv 2303.01904): meta networks beside the parts of a frozen model, and a regulariser that distils each part from itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.reference.base import Adaptation, confident_entropy
from tests.reference.normalisation import LiveBatchNorm
from tests.reference.parts import split


class MetaNetwork(nn.Module):
    """BN(x) + ReLU(BN'(Conv(before))): `before` is what the part was given, x what it made of it (figure 3)."""

    def __init__(self, inside: int, outside: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inside, outside, kernel, stride, kernel // 2, bias=False)
        self.conv_norm = LiveBatchNorm(outside)
        self.norm = LiveBatchNorm(outside)

    def forward(self, before: Tensor, x: Tensor) -> Tensor:
        return self.norm(x) + F.relu(self.conv_norm(self.conv(before)))


def trains(module: nn.Module) -> bool:
    """Whether anything in it is trained."""
    return any(parameter.requires_grad for parameter in module.parameters())


class EcoTTA(Adaptation):
    """Entropy of the confident predictions + λ Σ_k mean|x̃_k − sg(x_k)|, the latter for each part's own meta network only, if that is trained.

    Args:
        counts: residual blocks of each part.
        single: take the regulariser's gradients from the one forward pass, part by part, instead of a second pass of the meta networks over
            detached inputs as in the paper's Algorithm 1. The gradients are the same and it costs less.
        options: see `Adaptation`.
    """

    def __init__(self, model: nn.Module, counts: Sequence[int], single: bool = False, **options: object) -> None:
        self.counts, self.single = tuple(counts), single
        super().__init__(model, **options)  # type: ignore[arg-type]

    def build(self) -> None:
        pieces = split(self.model)
        parts = pieces.grouped(self.counts)
        self.meta = nn.ModuleList()
        with torch.no_grad():
            x = pieces.stem(torch.zeros(1, 3, 32, 32))
            for part in parts:
                y = part(x)
                self.meta.append(MetaNetwork(x.shape[1], y.shape[1], pieces.kernel, x.shape[2] // y.shape[2]))
                x = y
        for layer in self.norms.values():
            layer.following = None
        # Lists, so that modules of the model are not registered a second time.
        self.pieces, self.parts = [pieces], [parts]

    def walk(self, x: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor, Tensor]]]:
        """Logits, and for each part its input, its output, and the adapted output."""
        pieces, between = self.pieces[0], []
        x = pieces.stem(x)
        for part, meta in zip(self.parts[0], self.meta):
            y = part(x)
            adapted = meta(x, y)
            between.append((x, y, adapted))
            x = adapted
        return pieces.linear(pieces.pool(x)), between

    def forward(self, x: Tensor) -> Tensor:
        return self.walk(x)[0]

    def objective(self, logits: Tensor, y: Tensor | None) -> Tensor:
        return confident_entropy(logits, self.margin) if y is None else F.cross_entropy(logits, y)

    def drifts(self, between: list[tuple[Tensor, Tensor, Tensor]]) -> list[Tensor]:
        """mean|x̃_k − sg(x_k)| of each part, from a second pass of its meta network over detached inputs."""
        return [(meta(x.detach(), y.detach()) - y.detach()).abs().mean() for meta, (x, y, _) in zip(self.meta, between) if trains(meta)]

    def backward(self, x: Tensor, y: Tensor | None) -> Tensor:
        if self.single:
            return self._backward_single(x, y)
        logits, between = self.walk(x)
        self.objective(logits, y).backward()
        (self.regulariser * sum(self.drifts(between))).backward()
        return logits

    def _backward_single(self, x: Tensor, y: Tensor | None) -> Tensor:
        pieces = self.pieces[0]
        x = pieces.stem(x)
        local: list[tuple[nn.Parameter, Tensor]] = []
        for part, meta in zip(self.parts[0], self.meta):
            frozen = part(x)
            x = meta(x, frozen)
            mine = [parameter for parameter in meta.parameters() if parameter.requires_grad]
            if not mine:
                continue
            drift = self.regulariser * (x - frozen.detach()).abs().mean()
            local += zip(mine, torch.autograd.grad(drift, mine, retain_graph=True))
        logits = pieces.linear(pieces.pool(x))
        del x, frozen, drift
        self.objective(logits, y).backward()
        for parameter, gradient in local:
            parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
        return logits
