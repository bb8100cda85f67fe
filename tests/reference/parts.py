"""The CIFAR ResNets and WideResNets and torchvision's ResNets taken apart by hand: stem, residual blocks, classifier."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Split:
    """Pieces that share the model's own modules.

    pool and linear are the classifier: pool (N, C, H, W) → (N, C), linear (N, C) → logits. The kernel of meta networks is 3 for models that
    normalise before a convolution, and 1 for others (EcoTTA, Table 14).
    """

    stem: nn.Sequential
    blocks: list[nn.Module]
    names: list[str]
    pool: nn.Sequential
    linear: nn.Linear
    kernel: int

    def grouped(self, sizes: Sequence[int]) -> list[nn.Sequential]:
        """The blocks in parts of so many each."""
        if sum(sizes) != len(self.blocks):
            raise ValueError(f"{len(self.blocks)} blocks cannot be cut into {tuple(sizes)}")
        starts = [sum(sizes[:k]) for k in range(len(sizes))]
        return [nn.Sequential(*self.blocks[start : start + size]) for start, size in zip(starts, sizes)]


def split(model: nn.Module) -> Split:
    """Take a model apart; its modules may already be LiveBatchNorm."""
    pre_activation = hasattr(model, "b1")
    stages = [name for name in ("b1", "b2", "b3", "layer1", "layer2", "layer3", "layer4") if hasattr(model, name)]
    blocks = {f"{stage}.{name}": block for stage in stages for name, block in getattr(model, stage).named_children()}
    stem = [model.conv1] if pre_activation else [model.conv1, model.bn1, nn.ReLU()]
    stem += [model.maxpool] if hasattr(model, "maxpool") else []
    before = [model.bn, nn.ReLU()] if pre_activation else []
    pool = nn.Sequential(*before, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    linear, kernel = model.fc if hasattr(model, "fc") else model.linear, 3 if pre_activation else 1
    return Split(nn.Sequential(*stem), list(blocks.values()), list(blocks), pool, linear, kernel)


def counts(model: nn.Module, ends: Sequence[str]) -> tuple[int, ...]:
    """How many blocks each part has, from the names of their ends: a block ("layer1.1") or a whole stage ("layer1")."""
    names = split(model).names
    last = {name.rpartition(".")[0]: index for index, name in enumerate(names)} | {name: index for index, name in enumerate(names)}
    edges = [-1, *(last[end] for end in ends)]
    return tuple(after - before for before, after in zip(edges, edges[1:]))
