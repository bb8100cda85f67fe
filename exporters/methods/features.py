"""What methods share that read the classifier's input and answer without a gradient."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from edgeadapt.errors import ExportError
from edgeadapt.exporters.backbone import BackboneRun
from edgeadapt.exporters.capture import Captured
from edgeadapt.exporters.classifier import after, classifier
from edgeadapt.exporters.methods.base import Method, Outcome, Setup


class FeatureMethod(Method):
    """Reads one vector of features a frame, the classifier's input, and changes the predictions alone."""

    statistics, trains = "source", False
    modes: ClassVar[tuple[str, ...]] = ("source", "live", "anchored")
    remembers = "passes"

    def __init__(self, captured: Captured, setup: Setup) -> None:
        super().__init__(captured, setup)
        shape, logits = self.features.meta["val"].shape[1:], captured.result.meta["val"].shape
        if len(logits) != 2 or math.prod(shape) != max(shape):
            raise ExportError(
                f"{self.name} reads one vector of features a frame, and here the classifier reads {tuple(shape)}",
                "use --method ecotta, tent, norm or side",
            )

    def bind(self, captured: Captured) -> None:
        """Also find the classifier."""
        super().bind(captured)
        self.classifier, self.features = classifier(captured)

    @property
    def width(self) -> int:
        """How many features there are."""
        return math.prod(self.features.meta["val"].shape[1:])

    def both(self, run: BackboneRun, x: Tensor) -> tuple[Tensor, Tensor]:
        """Features (N, D) and the model's own logits (N, C)."""
        z = run.segment(0, x, self.features)
        return z.flatten(1), after(run, self.classifier, self.features, z)

    def forward(self, run: BackboneRun, x: Tensor, tensors: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> Outcome:
        """The model's own forward pass, answered anew."""
        features, logits = self.both(run, x)
        return self.answered(features, logits, tensors)

    @abstractmethod
    def answered(self, features: Tensor, logits: Tensor, tensors: Mapping[str, Tensor]) -> Outcome:
        """The predictions from features (N, D) and the model's own logits (N, C); `tensors` as `forward` gets them."""
