"""Early-exit heads on a frozen model, and the ensemble of their predictions with its own."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.reference.base import Adaptation, confident_entropy, entropy
from tests.reference.parts import split


class Head(nn.Module):
    """Features (N, F) to logits (N, C), over weights whose rows have mean 0 and length 1, but for 1e-5."""

    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        self.weight, self.gain, self.bias = (
            nn.Parameter(torch.ones(classes, features)),
            nn.Parameter(torch.ones(classes)),
            nn.Parameter(torch.zeros(classes)),
        )
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("scale", torch.ones(features))

    def forward(self, x: Tensor) -> Tensor:
        rows = []
        for row in self.weight:
            centred = row - row.mean()
            rows.append(centred / torch.sqrt((centred**2).sum() + 1e-5))
        return ((x - self.mean) * self.scale) @ torch.stack(rows).T * self.gain + self.bias


class Exits(Adaptation):
    """Entropy of each head's confident predictions; with labels, cross-entropy of each (TinyTTA, NeurIPS 2024).

    Args:
        counts: residual blocks of each part.
        teacher: "self", or "ensemble" to learn from the confident predictions of all together.
        grid, sharpness: cells along a side that a part's output is pooled to; weight of an exit's entropy.
        standard: mean and inverse deviation of each head's features by the bundle's names.
    """

    follows = False
    optimiser_name = "adam"

    def __init__(
        self,
        model: nn.Module,
        counts: Sequence[int],
        grid: int = 2,
        sharpness: float = 1.0,
        teacher: str = "self",
        standard: Mapping[str, Tensor] | None = None,
        **options: object,
    ) -> None:
        self.counts, self.grid, self.sharpness, self.teacher = counts, grid, sharpness, teacher
        super().__init__(model, **{"rate": 1e-3, **options})  # type: ignore[arg-type]
        for name, value in (standard or {}).items():
            _, index, kind = name.split(".")
            self.exit[int(index)].get_buffer(kind).copy_(value)

    def build(self) -> None:
        pieces = split(self.model)
        self.pieces, self.parts = [pieces], [pieces.grouped(self.counts)]
        with torch.no_grad():
            widths = [features.shape[1] for features in self.features(torch.zeros(1, 3, 32, 32))[0]]
        for layer in self.norms.values():
            layer.following = None
        self.exit = nn.ModuleList([Head(width, pieces.linear.out_features) for width in widths])

    def features(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """What each head reads, and the model's own logits, without gradient."""
        found = []
        with torch.no_grad():
            x = self.pieces[0].stem(x)
            for part in self.parts[0]:
                x = part(x)
                found.append(F.adaptive_avg_pool2d(x, self.grid).flatten(1))
            return found, self.pieces[0].linear(self.pieces[0].pool(x))

    def all(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """Each head's logits, and the model's own."""
        features, own = self.features(x)
        return [head(given) for head, given in zip(self.exit, features)], own

    def together(self, exits: Sequence[Tensor], own: Tensor) -> Tensor:
        """The logarithm of the weighted mean of all predictions."""
        every = [*exits, own]
        shares = torch.stack([torch.exp(-self.sharpness * entropy(one)) for one in every])
        shares = shares / shares.sum(0)
        return torch.log(sum(share.unsqueeze(1) * one.softmax(1) for share, one in zip(shares, every)))  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return self.together(*self.all(x))

    def backward(self, x: Tensor, y: Tensor | None) -> Tensor:
        exits, own = self.all(x)
        trained = [one for one, head in zip(exits, self.exit) if head.weight.requires_grad]
        answer = self.together(exits, own).detach()
        if y is None and self.teacher == "ensemble":
            sure = entropy(answer) < self.margin * math.log(answer.shape[1])
            losses = [F.cross_entropy(one[sure], answer[sure].softmax(1)) for one in trained]
        else:
            losses = [confident_entropy(one, self.margin) if y is None else F.cross_entropy(one, y) for one in trained]
        torch.stack(losses).sum().backward()
        return answer
