"""CoTTA: all weights follow a teacher, and return to the source by chance (Wang et al., CVPR 2022, arXiv 2203.13591, section 3).

    ŷ    = the mean of the teacher's logits over augmentations where the source model's mean confidence is below p_th, else its logits
    loss = cross-entropy of the student's soft-max to the teacher's
    teacher ← (1 − share)·teacher + share·student
    student ← source where a uniform number is below `restore`, element by element, after the teacher has followed

Logits are averaged and not probabilities, and the source model is normalised as the others are, both as in the authors' implementation; from a batch
of 64 on every pass is normalised with its own batch's statistics alone. The state has those of the teacher's plain pass. The mean confidence is known
only when a step runs, so every step makes all passes: of the student, of the source, of the teacher, and of the teacher over each augmentation. Where
every pixel has a label, augmented frames keep their pixels in place.

It is here to be compared with: the state has the model four times over, and a step costs tens of predictions.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from edgeadapt.errors import ExportError
from edgeadapt.exporters.backbone import BackboneRun
from edgeadapt.exporters.capture import Captured
from edgeadapt.exporters.methods.affine import OwnMethod
from edgeadapt.exporters.methods.augmentation import STREAMS, augmented
from edgeadapt.exporters.methods.base import Hyper, Outcome, Setting, Setup, Tensors, Term, Terms
from edgeadapt.exporters.methods.teacher import PREFIX, TEACHER, averaged, counted, disagreement, teacher
from edgeadapt.exporters.noise import uniform


class Cotta(OwnMethod):
    """All of the model's weights are trained toward an averaged teacher, which predicts."""

    name, summary = "cotta", "all weights follow an averaged teacher and return to the source by chance; takes tens of predictions a step"
    optimiser, rate = "adam", 1e-3
    whole, in_codes = True, False
    modes: ClassVar[tuple[str, ...]] = ("live", "source")
    averages: ClassVar[str] = PREFIX
    checked: ClassVar[Mapping[str, float]] = {"teacher": 0.5, "threshold": 1.0, "restore": 0.2}
    settings: ClassVar[Mapping[str, Setting]] = {
        "augmentations": Setting(32, "passes of the teacher over augmented frames, whose mean it predicts where the source is unsure", (1, 64)),
        "flip": Setting("yes", "whether images may be turned over left to right when they are augmented", ("yes", "no")),
    }

    def __init__(self, captured: Captured, setup: Setup) -> None:
        super().__init__(captured, setup)
        if not self.trained():
            raise ExportError("cotta trains the model's weights, and this model has none", "take --method source")

    def trained(self) -> list[str]:
        """Qualified names of the model's parameters, in the order of the model."""
        captured = self.backbone.captured
        used = dict.fromkeys(name for name in captured.owner.values() if name in captured.parameters)
        return [name for name in used if captured.tensors[name].is_floating_point()]

    def memory(self) -> Tensors:
        """The teacher, and `counter`, of steps."""
        return {**{PREFIX + name: value for name, value in self.parameters().items()}, "counter": torch.zeros(())}

    def hyper(self) -> dict[str, Hyper]:
        """The teacher's share, the source's confidence, and the chance to return."""
        return {
            "teacher": TEACHER,
            "threshold": Hyper(0.92, 0.0, 1.0, "mean confidence of the source model below which predictions are averaged over augmentations"),
            "restore": Hyper(0.01, 0.0, 1.0, "chance of each weight to return to the source model's after a step"),
        }

    def passed(
        self,
        role: str,
        run: BackboneRun,
        x: Tensor,
        tensors: Mapping[str, Tensor],
        parameters: Mapping[str, Tensor],
        hyper: Mapping[str, Tensor],
    ) -> Outcome:
        """Logits of the teacher, in a step without labels averaged where the source is unsure; terms: `student`'s logits, `counter` that follows."""
        mine, counter = teacher(tensors, self.trained()), tensors["memory.counter"]

        def apart(affine: Mapping[str, Tensor]) -> BackboneRun:
            """A pass whose statistics nothing follows from."""
            return run.beside(affine, dataclasses.replace(run.normalise, updated={}))

        with torch.no_grad():
            logits = run.beside(mine).whole(x)
        if role == "predict":
            return Outcome(logits)
        student = apart(run.affine).whole(x)
        if role == "learn":
            return Outcome(logits, {"student": student})
        with torch.no_grad():
            unsure = (apart({}).whole(x).softmax(1).amax(1).mean() < hyper["threshold"]).to(x.dtype)
            count, flip, moves = int(self.setting("augmentations")), self.setting("flip") == "yes", logits.dim() == 2
            total = torch.zeros_like(logits)
            for index in range(count):
                total = total + apart(mine).whole(augmented(x, counter, self.setup.seed, STREAMS * index, flip, moves))
            logits = unsure * (total / count) + (1.0 - unsure) * logits
        return Outcome(logits, {"student": student, "counter": counted(counter)})

    def unlabelled(self, outcome: Outcome, hyper: Mapping[str, Tensor]) -> Terms:
        """The student's disagreement with the teacher."""
        return (Term(disagreement(outcome.terms["student"], outcome.logits).mean()),)

    def labelled(self, outcome: Outcome, target: Tensor, hyper: Mapping[str, Tensor]) -> Terms:
        """Cross-entropy of the student."""
        return (Term(F.cross_entropy(outcome.terms["student"], target)),)

    def remembered(self, passes: Sequence[Outcome], hyper: Mapping[str, Tensor]) -> Tensors:
        """The counter; the teacher follows from the parameters."""
        return {"counter": passes[0].terms["counter"]}

    def settled(
        self, passes: Sequence[Outcome], parameters: Mapping[str, Tensor], tensors: Mapping[str, Tensor], hyper: Mapping[str, Tensor]
    ) -> tuple[Tensors, Tensors]:
        """The teacher follows; after a step without labels some weights then return to the source."""
        follows = averaged(teacher(tensors, parameters), parameters, hyper["teacher"])
        if "counter" not in passes[0].terms:
            return {}, follows
        stream = STREAMS * int(self.setting("augmentations"))
        put = {}
        for index, (name, value) in enumerate(parameters.items()):
            rows = value.shape[0] if value.dim() else 1
            drawn = uniform(tensors["memory.counter"].to(torch.int64), self.setup.seed, stream + index, rows, math.prod(value.shape) // max(rows, 1))
            back = drawn.reshape(value.shape) < hyper["restore"]
            put[name] = torch.where(back, tensors[name].to(value.dtype), value)
        return put, follows
