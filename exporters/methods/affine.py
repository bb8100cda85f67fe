"""What methods share that train tensors of the model's own, most of them the scale and shift of its normalisation layers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from edgeadapt.errors import ExportError
from edgeadapt.exporters.backbone import BackboneRun
from edgeadapt.exporters.capture import Affine, Captured
from edgeadapt.exporters.methods.base import Method, Outcome, Setup, Tensors
from edgeadapt.exporters.partition import Partition, partition


class OwnMethod(Method):
    """Some of the model's own tensors are trained, and stand in for what they were."""

    @abstractmethod
    def trained(self) -> list[str]:
        """Qualified names of what is trained, in the order of execution."""

    def parameters(self) -> Tensors:
        """As the model has them, by their names in the user's model."""
        return {name: self.backbone.tensors[name].clone() for name in self.trained()}

    def affine(self, parameters: Mapping[str, Tensor]) -> Tensors:
        """All of them stand in for the model's own."""
        return dict(parameters)

    def forward(self, run: BackboneRun, x: Tensor, tensors: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> Outcome:
        """The model's own forward pass, over what is trained."""
        return Outcome(run.whole(x))


class AffineMethod(OwnMethod):
    """Scale and shift of batch, group, layer and instance normalisation are trained, as far as they have them.

    layers: those that are trained, in the order of execution.
    """

    choices = ("parts", "cuts", "train")
    cut_to_train = True
    layers: Sequence[Affine]

    def __init__(self, captured: Captured, setup: Setup) -> None:
        super().__init__(captured, setup)
        if not self.layers:
            raise self.without_layers()

    def without_layers(self) -> ExportError:
        """What is said where the model has no layer to train."""
        return ExportError(f"{self.name} trains the scale and shift of normalisation layers, and this model has none", "use --method side")

    def bind(self, captured: Captured) -> None:
        """Also find the layers that are trained."""
        super().bind(captured)
        self.layers = captured.affines

    def divide(self, captured: Captured) -> Partition | None:
        """EcoTTA's cuts, only where it must be said which parts are trained: many models that cannot be cut can be adapted whole."""
        return None if self.setup.train is None else partition(captured, self.setup.parts, self.setup.cuts)

    def owned(self, index: int, names: Iterable[str]) -> frozenset[str]:
        """The parameters of the layers between the cut before and cut `index`; those after the last one always train."""
        nodes = {node.name for node in self.backbone.segments[index]}
        inside = {name for layer in self.layers if layer.node in nodes for name in (layer.weight, layer.bias)}
        return frozenset(inside & set(names))

    def trained(self) -> list[str]:
        """Qualified names of what is trained, in the order of execution."""
        return list(dict.fromkeys(name for layer in self.layers for name in (layer.weight, layer.bias) if name))
