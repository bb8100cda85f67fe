"""The model as it was given: nothing adapts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from edgeadapt.errors import ExportError
from edgeadapt.exporters.backbone import BackboneRun
from edgeadapt.exporters.capture import Captured
from edgeadapt.exporters.methods.base import Method, Outcome, Setup


class Source(Method):
    """No adaptation."""

    name, summary = "source", "the model as it is, with the statistics it was trained with"
    statistics, trains = "source", False
    modes: ClassVar[tuple[str, ...]] = ("source",)

    def forward(self, run: BackboneRun, x: Tensor, tensors: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> Outcome:
        """The model's own forward pass."""
        return Outcome(run.whole(x))


class Norm(Source):
    """Statistics alone adapt (Schneider et al., arXiv 2006.16971; Nado et al., arXiv 2006.10963)."""

    name, summary = "norm", "normalisation statistics follow the stream; no gradients"
    statistics = "live"
    modes = ("live", "anchored")

    def __init__(self, captured: Captured, setup: Setup) -> None:
        super().__init__(captured, setup)
        if not captured.norms:
            raise ExportError("norm adapts the statistics of batch normalisation, and this model has none", "use --method side")
