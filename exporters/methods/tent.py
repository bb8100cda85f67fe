"""TENT: entropy minimisation over the affine parameters of normalisation (Wang et al., arXiv 2006.10726)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from edgeadapt.errors import ExportError
from edgeadapt.exporters.backbone import BackboneRun
from edgeadapt.exporters.capture import Captured
from edgeadapt.exporters.methods.base import Method, Outcome, Setup, Tensors


class Tent(Method):
    """Scale and shift of every batch normalisation are trained on the entropy of the predictions."""

    name, summary = "tent", "scale and shift of the normalisation layers follow the entropy of the predictions"
    optimiser, rate = "adam", 3e-4

    def __init__(self, captured: Captured, setup: Setup) -> None:
        super().__init__(captured, setup)
        if not any(norm.weight for norm in captured.norms):
            raise ExportError("tent trains the scale and shift of batch normalisation, and this model has none", "use --method side")

    def parameters(self) -> Tensors:
        """The affine parameters, by their names in the user's model."""
        names = [name for norm in self.backbone.captured.norms for name in (norm.weight, norm.bias) if name]
        return {name: self.backbone.tensors[name].clone() for name in names}

    def affine(self, parameters: Mapping[str, Tensor]) -> Tensors:
        """All of them stand in for the model's own."""
        return dict(parameters)

    def forward(self, run: BackboneRun, x: Tensor, tensors: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> Outcome:
        """The model's own forward pass, over the trained affine parameters."""
        return Outcome(run.whole(x))
