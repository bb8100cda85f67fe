"""T3A: the classifier is replaced by the centres of confident features (Iwasawa & Matsuo, NeurIPS 2021).

    S_c  starts with the classifier's own weight vectors that it takes for class c; each frame's features z join the class they are predicted as
    S_c ← the M members with the smallest entropy                            (section 3.2)
    ω_c  = Σ_{s ∈ S_c} s/‖s‖,  logits_c = zᵀ ω_c/‖ω_c‖                        (algorithm 1)

A member that is passed over once would be passed over for good, so nothing else is kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from edgeadapt.errors import ExportError
from edgeadapt.exporters.capture import Captured
from edgeadapt.exporters.methods.base import Outcome, Setting, Setup, Tensors, entropy
from edgeadapt.exporters.methods.features import FeatureMethod

_NONE = 1e4
"""Entropy that stands for an empty place."""
_MOST = 16 << 20
"""Numbers that the support sets may hold together."""


class T3A(FeatureMethod):
    """Centres of confident features stand in for the classifier."""

    name, summary = "t3a", "centres of confident features stand in for the classifier; no gradients"
    settings: ClassVar[Mapping[str, Setting]] = {"supports": Setting(20, "members of a class's support set", (1, 1000))}

    def __init__(self, captured: Captured, setup: Setup) -> None:
        super().__init__(captured, setup)
        size = setup.classes * self.setting("supports") * self.width
        if size > _MOST:
            most = _MOST // (setup.classes * self.width)
            raise ExportError(f"the support sets of t3a would hold {size:,} numbers, more than {_MOST:,}", f"give at most --setting supports={most}")

    def _weight(self) -> tuple[Tensor, Tensor]:
        """The classifier's weight (C, D) and bias (C,)."""
        captured = self.backbone.captured
        node: Any = self.classifier
        sources = [captured.owner.get(arg.name, "") if isinstance(arg, fx.Node) else "" for arg in node.args[:3]]
        first = 0 if getattr(node.target, "overloadpacket", None) is torch.ops.aten.addmm else 1
        matrix = captured.tensors[sources[2 if first == 0 else 1]]
        weight = matrix.transpose(0, 1) if first == 0 else matrix.reshape(matrix.shape[0], -1)
        bias = sources[0] if first == 0 else sources[2] if len(sources) > 2 else ""
        if tuple(weight.shape) != (self.setup.classes, self.width):
            raise ExportError(f"t3a needs a classifier that gives the {self.setup.classes} logits itself", "use --method ecotta, tent, norm or side")
        return weight, captured.tensors[bias] if bias else torch.zeros(len(weight))

    def memory(self) -> Tensors:
        """`supports` (C·M, D), members of each class in turn, and `entropy` (C, M) of each, large where a place is empty."""
        weight, bias = self._weight()
        classes, most = self.setup.classes, self.setting("supports")
        supports, values = torch.zeros(classes * most, self.width), torch.full((classes, most), _NONE)
        logits = weight @ weight.transpose(0, 1) + bias
        order = entropy(logits).argsort(stable=True)
        for index in order.tolist():
            own = int(logits[index].argmax())
            free = int((values[own] < _NONE).sum())
            if free < most:
                supports[own * most + free], values[own, free] = weight[index], entropy(logits)[index]
        return {"supports": supports, "entropy": values}

    def answered(self, features: Tensor, logits: Tensor, tensors: Mapping[str, Tensor]) -> Outcome:
        """Cosine to the centres, times the features' length; terms: the memory that follows."""
        classes, most = self.setup.classes, self.setting("supports")
        label, spread = logits.argmax(1), entropy(logits)
        mine = label.unsqueeze(0) == torch.arange(classes).unsqueeze(1)  # (C, N)
        values = torch.cat([tensors["memory.entropy"], torch.where(mine, spread.unsqueeze(0), torch.full((), _NONE))], 1)
        kept, places = values.topk(most, 1, largest=False)
        start = most * torch.arange(classes).unsqueeze(1)
        rows = torch.where(places < most, start + places, classes * most + places - most).reshape(-1)
        there = (kept < 0.5 * _NONE).to(features.dtype).reshape(-1, 1)  # which of equal empty places is taken is anyone's choice
        supports = torch.cat([tensors["memory.supports"], features]).index_select(0, rows) * there
        centres = F.normalize(supports, dim=1).reshape(classes, most, -1).sum(1)
        return Outcome(features @ F.normalize(centres, dim=1).transpose(0, 1), {"supports": supports, "entropy": kept})

    def remembered(self, passes: Sequence[Outcome], hyper: Mapping[str, Tensor]) -> Tensors:
        """What the pass has kept."""
        return dict(passes[0].terms)
