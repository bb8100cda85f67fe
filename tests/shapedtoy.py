"""The toy bundle with what an exporter writes besides: the shape of every tensor, and nodes named after modules, here with names that are no HTML."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import onnx

from edgeadapt.bundle import Bundle
from tests.toybundle import Toy


class ShapedToy(Toy):
    """As `Toy`. lean: the step also has a lean variant (the same graph)."""

    def __init__(self, width: int = 8, depth: int = 1, batches: tuple[int, ...] = (1, 4), method: str = "toy", lean: bool = False) -> None:
        super().__init__(width, depth, batches, method)
        self.graphs = {name: shaped(data) for name, data in self.graphs.items()}
        for name, spec in [*self.specs.items()] if lean else []:
            if spec.role == "adapt":
                self.graphs[f"{name}.lean"] = self.graphs[name]
                self.specs[f"{name}.lean"] = replace(spec, path=f"graphs/{name}.lean.onnx", variant="lean")

    def bundle(self, path: Path) -> Bundle:
        """Written and opened."""
        return Bundle.open(self.write(path))


def shaped(data: bytes) -> bytes:
    """A graph with the shape of every tensor, and nodes named after modules."""
    model = onnx.shape_inference.infer_shapes(onnx.load_from_string(data), strict_mode=True, data_prop=True)
    for index, node in enumerate(model.graph.node):
        node.name = f"{index}:block<{index // 4}>.&conv" if index % 3 == 0 else f"{index}:"
    result: bytes = model.SerializeToString()
    return result
