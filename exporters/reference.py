"""Measures what a model's own data look like to it: see `bundle.reference`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from edgeadapt.bundle.reference import EPS, FRAMES, Chance, Reference
from edgeadapt.exporters.backbone import Normaliser
from edgeadapt.exporters.blending import distance
from edgeadapt.exporters.methods.base import Tensors, entropy
from edgeadapt.exporters.programs import Model

NEIGHBOURS = 16
"""Frames that make a group of those predicted alike, at most."""
SHARE = 0.9
"""Of the groups, whose D² are to count as none."""
_GROUPS = 64


@dataclass
class _Watching(Normaliser):
    """Normalises as its base does, and keeps the channel means of every frame, (N, C), by layer."""

    frames: dict[str, Tensor] = field(default_factory=dict)

    def __call__(
        self, name: str, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, instead: Callable[..., Tensor] | None = None
    ) -> Tensor:
        self.frames[name] = x.flatten(2).mean(2) if x.dim() > 2 else x
        return super().__call__(name, x, weight, bias, eps, instead)


def reference_of(model: Model, batches: Sequence[Tensor], tensors: Tensors) -> Reference | None:
    """What the model makes of source frames, each batch (N, …) as it takes them; None where there are fewer than two frames.

    Windows of few classes are those of frames that are predicted alike: of every one of some frames, and the others whose predictions are nearest.
    So there need not be many frames of a class, nor classes.
    """
    if sum(len(x) for x in batches) < 2:
        return None
    method, follow = model.method, model.layers if model.statistics == "live" else ()
    found: dict[str, list[Tensor]] = {}
    predicted, unsure = [], []
    for x in batches:
        normalise = _Watching(model.values, "source")
        with torch.no_grad():
            run = method.backbone.run(tensors, normalise, method.affine(model.parameters))
            logits = method.forward(run, x, tensors, model.parameters).logits.float()
        shares = logits.softmax(1)
        flat = shares.flatten(2).mean(2) if shares.dim() > 2 else shares
        predicted.append(flat)
        unsure.append(float(entropy(logits).mean()))
        for name in follow:
            found.setdefault(name, []).append(normalise.frames[name])
    every = torch.cat(predicted)
    window = min(FRAMES, len(every))
    spread = [_classes(part) for part in every.split(window) if len(part) == window]
    groups = _groups(every)
    layers = {name: _chance(means, model.values[f"{name}.mean"], model.values[f"{name}.variance"], groups) for name, means in found.items()}
    return Reference(window, _mean(spread), _mean(unsure), layers)


def _chance(means: Sequence[Tensor], mean: Tensor, variance: Tensor, groups: Tensor) -> Chance:
    """From the frames' channel means in each batch. D² of a window is that of all frames together, and what so many of them vary by."""
    every = torch.cat(list(means))
    whole = float(distance(every.mean(0) - mean, variance, EPS))
    batches = _mean([float(distance(batch.mean(0) - mean, variance, EPS)) for batch in means])
    count, size = len(means[0]), groups.shape[1]
    varies = max(0.0, batches - whole) / (1.0 / count - 1.0 / len(every)) if len(means) > 1 else batches * count
    near = torch.stack([distance(every[group].mean(0) - mean, variance, EPS) for group in groups])
    mixed = max(0.0, batches + varies * (1.0 / FRAMES - 1.0 / count))
    alike = float(near.quantile(SHARE)) + varies * (1.0 / FRAMES - 1.0 / size)
    return Chance(mixed, max(mixed, alike))


def _groups(predicted: Tensor) -> Tensor:
    """Indices (groups, members) of frames whose predictions (N, C) are nearest to one another, by Bhattacharyya's coefficient."""
    size = min(NEIGHBOURS, max(1, len(predicted) // 2))
    root = predicted.sqrt()
    step = max(1, len(predicted) // _GROUPS)
    near: Tensor = (root[::step] @ root.T).topk(size, 1).indices
    return near


def _classes(shares: Tensor) -> float:
    mean = shares.mean(0)
    return max(1.0, math.exp(float(-(mean * mean.clamp(min=1e-12).log()).sum())))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
