"""SAR: sharpness-aware entropy of reliable predictions, with a reset (Niu et al., ICLR 2023, arXiv 2302.12400).

    ε    = ρ · g/‖g‖, where g is the gradient of the mean entropy of predictions with H < E0      (equations 2–4), E0 = margin · ln C
    step = the gradient at θ + ε of the mean entropy of those that are still below E0 there
    e    ← 0.9·e + 0.1·(the same mean); where e < e0, the model and the optimiser start again

The last stage is not trained (section 4, "stable" layers): normalisations behind the last change of resolution, or the last quarter of them where the
resolution never changes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from edgeadapt.exporters.backbone import BackboneRun
from edgeadapt.exporters.capture import Captured
from edgeadapt.exporters.methods.affine import AffineMethod
from edgeadapt.exporters.methods.base import MARGIN, Hyper, Outcome, Setting, Tensors, Term, Terms, confident_entropy, entropy, selected
from edgeadapt.exporters.partition import candidates

_MOVING = 0.9


class Sar(AffineMethod):
    """Scale and shift are trained on confident predictions toward flat minima, and start again when predictions collapse."""

    name, summary = "sar", "scale and shift follow confident predictions toward flat minima, and start again on collapse"
    optimiser, rate = "sgd", 1e-3
    restarts = True
    checked: ClassVar[Mapping[str, float]] = {"collapse": 0.0}
    settings: ClassVar[Mapping[str, Setting]] = {
        "freeze": Setting("last", "leave the last stage as it is, as in the paper, or nothing", ("last", "none"))
    }

    def trained(self) -> list[str]:
        """All but the last stage's, where that leaves any."""
        every = super().trained()
        if self.setting("freeze") == "none":
            return every
        stable = _last_stage(self.backbone.captured)
        return [name for name in every if name not in stable] or every

    def memory(self) -> Tensors:
        """`loss`, the moving mean of the second pass's entropy, and `known`, whether there is one: 0 or 1."""
        return {"loss": torch.zeros(()), "known": torch.zeros(())}

    def forward(self, run: BackboneRun, x: Tensor, tensors: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> Outcome:
        """The model's own forward pass; terms: the memory."""
        return Outcome(run.whole(x), {"loss": tensors["memory.loss"], "known": tensors["memory.known"]})

    def hyper(self) -> dict[str, Hyper]:
        """Margin, radius, and the loss below which it starts again."""
        return {
            "margin": MARGIN,
            "radius": Hyper(0.05, 0.0, 10.0, "how far the second pass lies from the parameters, ρ"),
            "collapse": Hyper(0.2, 0.0, 10.0, "the moving mean entropy, in nats, below which everything starts again"),
        }

    def unlabelled(self, outcome: Outcome, hyper: Mapping[str, Tensor]) -> Terms:
        """Mean entropy of the confident predictions."""
        return (confident_entropy(outcome.logits, hyper["margin"]),)

    def ascent(self, gradients: Mapping[str, Tensor | None], hyper: Mapping[str, Tensor]) -> Tensors:
        """ρ·g/‖g‖ over all parameters together."""
        found = {name: value for name, value in gradients.items() if value is not None}
        if not found:
            return {}
        length = torch.stack([value.square().sum() for value in found.values()]).sum().sqrt()
        return {name: value * (hyper["radius"] / (length + 1e-12)) for name, value in found.items()}

    def second(self, passes: Sequence[Outcome], hyper: Mapping[str, Tensor]) -> Terms:
        """Mean entropy of the predictions that were confident in both passes."""
        first, again = passes
        both = selected(first.logits, hyper["margin"]) * selected(again.logits, hyper["margin"])
        return (Term((entropy(again.logits) * both).sum(), "selected", both.sum()),)

    def remembered(self, passes: Sequence[Outcome], hyper: Mapping[str, Tensor]) -> Tensors:
        """The moving mean; nothing is known where all starts again."""
        loss, known = self._moved(passes, hyper)
        stays = 1.0 - self._collapsed(loss, known, hyper)
        return {"loss": loss * stays, "known": known * stays}

    def start_again(self, passes: Sequence[Outcome], hyper: Mapping[str, Tensor]) -> Tensor:
        """Where the moving mean has become too small."""
        return self._collapsed(*self._moved(passes, hyper), hyper) > 0.5

    @staticmethod
    def _collapsed(loss: Tensor, known: Tensor, hyper: Mapping[str, Tensor]) -> Tensor:
        return known * (loss < hyper["collapse"]).to(loss.dtype)

    @staticmethod
    def _moved(passes: Sequence[Outcome], hyper: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The moving mean after a step, as before where nothing counted in both passes, and whether it is one."""
        first, again = passes
        before, known = first.terms["loss"], first.terms["known"]
        both = selected(first.logits, hyper["margin"]) * selected(again.logits, hyper["margin"])
        value = (entropy(again.logits.detach()) * both).sum() / both.sum().clamp(min=1.0)
        found = (both.sum() > 0.0).to(value.dtype)
        moved = known * (_MOVING * before + (1.0 - _MOVING) * value) + (1.0 - known) * value
        return found * moved + (1.0 - found) * before, torch.maximum(known, found)


def _last_stage(captured: Captured) -> frozenset[str]:
    """Qualified names of the affine parameters behind the last change of resolution; else of the last quarter of the normalisations."""
    order = {node.name: index for index, node in enumerate(captured.operators)}
    layers, places = captured.affines, candidates(captured)
    maps = [cut for cut in places if math.prod(cut.spatial) > 1]
    before = [order[cut.node] for cut in maps if cut.spatial != maps[-1].spatial]
    if before:
        last = [layer for layer in layers if order[layer.node] > max(before)]
    else:
        last = list(layers[len(layers) - max(1, len(layers) // 4) :])
    return frozenset(name for layer in last for name in (layer.weight, layer.bias))
