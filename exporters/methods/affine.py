"""What methods share that train the scale and shift of normalisation layers, and nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from edgeadapt.errors import ExportError
from edgeadapt.exporters.backbone import BackboneRun
from edgeadapt.exporters.capture import Captured
from edgeadapt.exporters.methods.base import Method, Outcome, Setup, Tensors
from edgeadapt.exporters.partition import Partition, partition


class AffineMethod(Method):
    """Scale and shift of batch, group, layer and instance normalisation are trained, as far as they have them."""

    choices = ("parts", "cuts", "train")
    cut_to_train = True

    def __init__(self, captured: Captured, setup: Setup) -> None:
        super().__init__(captured, setup)
        if not captured.affines:
            raise ExportError(f"{self.name} trains the scale and shift of normalisation layers, and this model has none", "use --method side")

    def divide(self, captured: Captured) -> Partition | None:
        """EcoTTA's cuts, only where it must be said which parts are trained: many models that cannot be cut can be adapted whole."""
        return None if self.setup.train is None else partition(captured, self.setup.parts, self.setup.cuts)

    def owned(self, index: int, names: Iterable[str]) -> frozenset[str]:
        """The affine parameters of the layers between the cut before and cut `index`; those after the last one always train."""
        nodes = {node.name for node in self.backbone.segments[index]}
        inside = {name for layer in self.backbone.captured.affines if layer.node in nodes for name in (layer.weight, layer.bias)}
        return frozenset(inside & set(names))

    def trained(self) -> list[str]:
        """Qualified names of what is trained, in the order of execution."""
        return list(dict.fromkeys(name for layer in self.backbone.captured.affines for name in (layer.weight, layer.bias) if name))

    def parameters(self) -> Tensors:
        """The affine parameters, by their names in the user's model."""
        return {name: self.backbone.tensors[name].clone() for name in self.trained()}

    def affine(self, parameters: Mapping[str, Tensor]) -> Tensors:
        """All of them stand in for the model's own."""
        return dict(parameters)

    def forward(self, run: BackboneRun, x: Tensor, tensors: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> Outcome:
        """The model's own forward pass, over the trained affine parameters."""
        return Outcome(run.whole(x))
