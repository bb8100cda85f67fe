"""TENT: entropy minimisation over the affine parameters of normalisation (Wang et al., arXiv 2006.10726)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from edgeadapt.errors import ExportError
from edgeadapt.exporters.backbone import BackboneRun
from edgeadapt.exporters.capture import Captured
from edgeadapt.exporters.methods.base import Method, Outcome, Setup, Tensors
from edgeadapt.exporters.partition import Partition, partition


class Tent(Method):
    """Scale and shift of every batch normalisation are trained on the entropy of the predictions."""

    name, summary = "tent", "scale and shift of the normalisation layers follow the entropy of the predictions"
    optimiser, rate = "adam", 3e-4
    choices = ("parts", "cuts", "train")

    def __init__(self, captured: Captured, setup: Setup) -> None:
        super().__init__(captured, setup)
        if not any(norm.weight for norm in captured.norms):
            raise ExportError("tent trains the scale and shift of batch normalisation, and this model has none", "use --method side")

    def divide(self, captured: Captured) -> Partition | None:
        """EcoTTA's cuts, only where it must be said which parts are trained: many models that cannot be cut can be adapted whole."""
        return None if self.setup.train is None else partition(captured, self.setup.parts, self.setup.cuts)

    def owned(self, index: int, names: Iterable[str]) -> frozenset[str]:
        """The affine parameters of the layers between the cut before and cut `index`; those after the last one always train."""
        nodes = {node.name for node in self.backbone.segments[index]}
        inside = {name for norm in self.backbone.captured.norms if norm.node in nodes for name in (norm.weight, norm.bias)}
        return frozenset(inside & set(names))

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
