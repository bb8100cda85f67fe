"""The classifier of a model: its last layer with weights, and what that reads."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from edgeadapt.errors import ExportError
from edgeadapt.exporters.backbone import BackboneRun
from edgeadapt.exporters.capture import Captured

aten = torch.ops.aten
_WEIGHTED = {aten.linear: 1, aten.conv1d: 1, aten.conv2d: 1, aten.addmm: 2, aten.conv_transpose2d: 1, aten.conv_transpose1d: 1}


def classifier(captured: Captured) -> tuple[fx.Node, fx.Node]:
    """The last layer with weights, and the node of its input, between which and the logits nothing else depends on the input.

    Raises:
        ExportError: the model ends without one.
    """
    for node in reversed(captured.operators):
        packet = getattr(node.target, "overloadpacket", None)
        if packet in _WEIGHTED:
            position = _WEIGHTED[packet] - 1
            features, weight = node.args[position], node.args[position + 1]
            if isinstance(features, fx.Node) and isinstance(weight, fx.Node) and weight.name in captured.owner:
                return node, features
    raise ExportError(
        "the model ends without a layer with weights, so there is no classifier that a method could stand before",
        "use --method ecotta, tent or norm",
    )


def after(run: BackboneRun, layer: fx.Node, features: fx.Node, z: Tensor) -> Tensor:
    """Logits from the classifier's input z: its layer and what follows, of the last segment."""
    values = dict(run.known)
    values[features] = z
    started = False
    for node in run.backbone.segments[-1]:
        started = started or node is layer
        if started:
            run.execute(node, values)
    result: Tensor = values[run.backbone.captured.result]
    return result
