"""Normalisation of each frame by itself, in the manner of LeanTTA (arXiv 2503.15889): no gradient, no state, and frames do not look at one another.

For a frame with channel means m and variances v over its positions, and a layer with source statistics μ, σ²:

    D  = √(mean over channels of (m − μ)²/σ²)          Mahalanobis distance by a diagonal covariance, over √C
    w  = strength · D/(1 + D)
    s  : mean (1 − w)·μ + w·m, variance (1 − w)·σ² + w·v + w·(1 − w)·(m − μ)²

which are the moments of a mixture of both. A frame like the source is normalised nearly as it was in training. The abstract says what is blended and
by what distance, and no code is public: the form of w is ours, by the error of ResNet-20 and WideResNet-40-2 under the fifteen corruptions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from edgeadapt.errors import ExportError
from edgeadapt.exporters.backbone import BackboneRun, Normaliser, normalised
from edgeadapt.exporters.blending import by_frame, frame_statistics, has_positions
from edgeadapt.exporters.capture import Captured
from edgeadapt.exporters.methods.base import Method, Outcome, Setting, Setup


@dataclass
class FrameNormaliser(Normaliser):
    """Blends the source statistics with each frame's own.

    strength: the most that a frame's own count.
    """

    strength: float = 0.4

    def fixed(self, name: str, weight: Tensor | None, bias: Tensor | None, eps: float) -> None:
        """No layer has a scale and shift that all frames share."""

    def __call__(
        self, name: str, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, instead: Callable[..., Tensor] | None = None
    ) -> Tensor:
        """Normalise x (N, C, …); of x (N, C) a frame has no statistics of its own, and the source's are used."""
        mean, variance = self.statistics[f"{name}.mean"], self.statistics[f"{name}.variance"]
        if has_positions(x):
            mean, variance = by_frame(frame_statistics(x), (mean, variance), eps, self.strength)
        return normalised(x, mean, variance, weight, bias, eps)


class Lean(Method):
    """Each frame is normalised by the source's statistics and its own."""

    name, summary = "lean", "each frame is normalised partly by its own statistics; no gradients, no state"
    statistics, trains = "source", False
    modes: ClassVar[tuple[str, ...]] = ("source",)
    in_codes = False
    settings: ClassVar[Mapping[str, Setting]] = {"strength": Setting(0.4, "the most that a frame's own statistics count", (0.0, 1.0))}

    def __init__(self, captured: Captured, setup: Setup) -> None:
        super().__init__(captured, setup)
        if not captured.norms:
            raise ExportError("lean blends the statistics of batch normalisation, and this model has none", "use --method side")

    def forward(self, run: BackboneRun, x: Tensor, tensors: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> Outcome:
        """The model's own forward pass, normalised frame by frame."""
        normalise = FrameNormaliser(run.normalise.statistics, strength=self.setting("strength"))
        return Outcome(run.beside(run.affine, normalise).whole(x))
