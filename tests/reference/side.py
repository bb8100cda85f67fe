"""A side network that reads pooled taps of the frozen model and adds a residual before its linear classifier."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.reference.base import Adaptation, confident_entropy
from tests.reference.parts import split


class SideNetwork(nn.Module):
    """Taps (N, cells, 2·C_i) to a residual (N, features), averaged over the cells.

    f = Σ_i softmax(mix)_i · tap_i(standardised t_i), h = f + contract(ReLU(expand(f))), residual(mean over cells of h), which starts at zero.
    """

    def __init__(self, channels: Sequence[int], features: int, width: int) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.zeros(len(channels)))
        self.tap = nn.ModuleList([nn.Linear(2 * count, width) for count in channels])
        self.expand, self.contract = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.residual = nn.Linear(width, features)
        for layer in (*self.tap, self.expand, self.contract, self.residual):
            nn.init.zeros_(layer.bias)
        nn.init.zeros_(self.residual.weight)
        for index, count in enumerate(channels):
            self.register_buffer(f"mean{index}", torch.zeros(2 * count))
            self.register_buffer(f"scale{index}", torch.ones(2 * count))

    def forward(self, taps: Sequence[Tensor]) -> Tensor:
        shares = self.mix.softmax(0)
        f = torch.stack([share * layer((t - self.get_buffer(f"mean{i}")) * self.get_buffer(f"scale{i}"))
                         for i, (share, layer, t) in enumerate(zip(shares, self.tap, taps))]).sum(0)  # fmt: skip
        h = f + self.contract(F.relu(self.expand(f)))
        return self.residual(h.mean(1))


class Side(Adaptation):
    """Entropy of the confident predictions + λ·KL(frozen model ‖ adapted); with labels, cross-entropy. The taps are the ends of the three stages.

    Args:
        width: channels of the side network.
        grid: the taps are pooled to grid × grid cells.
        standard: mean and inverse deviation of each pooled tap by the bundle's names ("side.tap.0.mean", "side.tap.0.scale"); none by default.
        options: see `Adaptation`.
    """

    follows = False
    optimiser_name = "adam"

    def __init__(self, model: nn.Module, width: int = 64, grid: int = 4, standard: Mapping[str, Tensor] | None = None, **options: object) -> None:
        self.width, self.grid = width, grid
        super().__init__(model, **{"rate": 1e-3, "regulariser": 1.0, **options})  # type: ignore[arg-type]
        for name, value in (standard or {}).items():
            _, _, index, kind = name.split(".")
            self.side.get_buffer(f"{kind}{index}").copy_(value)

    def build(self) -> None:
        pieces = split(self.model)
        stages = [getattr(self.model, name) for name in dict.fromkeys(name.partition(".")[0] for name in pieces.names)]
        self.pieces, self.stages = [pieces], [stages]
        with torch.no_grad():
            shapes = [tap.shape[1] for tap in self.taps(torch.zeros(1, 3, 32, 32))[0]]
        for layer in self.norms.values():
            layer.following = None
        self.side = SideNetwork(shapes, pieces.linear.in_features, self.width)

    def taps(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """Ends of the stages (N, C, H, W), and the classifier's input (N, features), without gradient."""
        pieces, found = self.pieces[0], []
        with torch.no_grad():
            x = pieces.stem(x)
            for stage in self.stages[0]:
                x = stage(x)
                found.append(x)
            return found, pieces.pool(x)

    def pooled(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, cells, 2·C): maximum, then average of each cell."""
        both = torch.cat([F.adaptive_max_pool2d(x, self.grid), F.adaptive_avg_pool2d(x, self.grid)], 1)
        return both.flatten(2).transpose(1, 2)

    def calibrate(self, batches: Sequence[Tensor]) -> None:
        """Measure mean and inverse deviation (n − 1; at least 1e-3) of the pooled taps on source inputs, with source statistics."""
        rows: list[list[Tensor]] = [[] for _ in self.side.tap]
        with self.still():
            for x in batches:
                for found, tap in zip(rows, self.taps(x)[0]):
                    found.append(self.pooled(tap).flatten(0, 1))
        for index, found in enumerate(rows):
            features = torch.cat(found)
            self.side.get_buffer(f"mean{index}").copy_(features.mean(0))
            self.side.get_buffer(f"scale{index}").copy_(1 / features.std(0).clamp(min=1e-3))

    def forward(self, x: Tensor) -> Tensor:
        return self.both(x)[0]

    def both(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits, adapted and of the frozen model."""
        taps, z = self.taps(x)
        linear = self.pieces[0].linear
        return linear(z + self.side([self.pooled(tap) for tap in taps])), linear(z)

    def backward(self, x: Tensor, y: Tensor | None) -> Tensor:
        logits, frozen = self.both(x)
        if y is not None:
            F.cross_entropy(logits, y).backward()
            return logits
        divergence = F.kl_div(logits.log_softmax(1), frozen.log_softmax(1), log_target=True, reduction="batchmean")
        (confident_entropy(logits, self.margin) + self.regulariser * divergence).backward()
        return logits
