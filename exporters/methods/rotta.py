"""RoTTA: a teacher over a class-balanced memory of recent frames (Yuan et al., CVPR 2023, arXiv 2303.13899, section 3).

    s ← (1 − α)·s + α·b in every normalisation, for prediction and gradient alike; `mix` is α
    score(x) = λ_t / (1 + exp(−age/N)) + λ_u · H(p(x)) / ln C, for N slots and C classes
    loss = mean over the memory of w(age) · cross-entropy of student(augmented x) to teacher(x),   w(age) = exp(−age/N) / (1 + exp(−age/N))
    teacher ← (1 − ν)·teacher + ν·student; `teacher` is ν

A frame comes into the memory (algorithm 1) under the class that the teacher predicts for it. While its class has less than N/C frames it takes a free
slot, or else the slot of the highest score among the largest classes; from then on that of the highest score in its class. Only a frame of a higher
score than its own gives way. Of equal scores the oldest does.

The teacher predicts, with its statistics as they stand. A step predicts its frames, takes them in one after the other, and then makes one update on
the memory, whatever the size of its batch: the authors make one every 64 frames. Labelled steps train the student on the frames they are given and
leave the memory alone; the teacher follows. Slots that are still empty hold frames of the others, over again in turn, with weight 0: they take part
in the statistics, and in nothing else.
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
from edgeadapt.exporters.backbone import Backbone, BackboneRun, Normaliser
from edgeadapt.exporters.capture import Captured
from edgeadapt.exporters.methods.affine import AffineMethod
from edgeadapt.exporters.methods.augmentation import augmented
from edgeadapt.exporters.methods.base import Hyper, Outcome, Setting, Setup, Tensors, Term, Terms, entropy
from edgeadapt.exporters.methods.teacher import PREFIX, TEACHER, averaged, counted, disagreement, teacher

_STATISTICS, _AFTER = "statistics.", "after."
_BANK = ("labels", "uncertainty", "ages")


class Rotta(AffineMethod):
    """Scale and shift are trained on a balanced memory of the stream, toward a teacher that predicts."""

    name, summary = "rotta", "scale and shift follow a teacher over a balanced memory of the stream's frames; for streams whose classes come in runs"
    optimiser, rate, mix = "adam", 1e-3, 0.05
    modes: ClassVar[tuple[str, ...]] = ("live",)
    choosing: ClassVar[tuple[str, ...]] = ("labels", "ages")
    averages: ClassVar[str] = PREFIX
    checked: ClassVar[Mapping[str, float]] = {"teacher": 0.5}
    settings: ClassVar[Mapping[str, Setting]] = {
        "capacity": Setting(64, "frames that the memory holds; each step's update is over all of them", (1, 4096)),
        "flip": Setting("yes", "whether images may be turned over left to right when they are augmented", ("yes", "no")),
    }

    def __init__(self, captured: Captured, setup: Setup) -> None:
        super().__init__(captured, setup)
        if captured.result.meta["val"].dim() != 2 or setup.classes < 2:
            raise ExportError("rotta keeps its memory balanced by one class a frame, of two or more", "take a method without a memory, such as eata")

    def bind(self, captured: Captured) -> None:
        """Also set up the model over the memory's frames at once."""
        super().bind(captured)
        self.bank = Backbone(captured.at(self.capacity))

    @property
    def capacity(self) -> int:
        """Slots of the memory."""
        return int(self.setting("capacity"))

    def memory(self) -> Tensors:
        """`frames` (N, …), `labels` (N,), −1 in empty slots, `uncertainty` and `ages` (N,); the teacher; `counter`, of steps.

        Frames are in the order of their ages, the oldest first, and empty slots last. Ages are in frames since they came.
        """
        size = self.capacity
        table = {"frames": torch.zeros(size, *self.backbone.captured.shape), "labels": -torch.ones(size)}
        table |= {"uncertainty": torch.zeros(size), "ages": torch.zeros(size), "counter": torch.zeros(())}
        table |= {PREFIX + name: value for name, value in self.parameters().items()}
        return table | {_STATISTICS + name: value.clone() for name, value in self.backbone.source_statistics().items()}

    def hyper(self) -> dict[str, Hyper]:
        """The teacher's share, and the weights of a frame's score."""
        return {
            "teacher": TEACHER,
            "timeliness": Hyper(1.0, 0.0, 100.0, "weight of a frame's age when a slot of the memory is to be given up"),
            "uncertainty": Hyper(1.0, 0.0, 100.0, "weight of a frame's uncertainty when a slot of the memory is to be given up"),
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
        """Logits of the teacher; terms: `student`'s logits, in a step without labels those of augmented frames of the memory.

        There also `wanted`, the teacher's logits of these frames, `weights` of each, `count` of those in the memory, and the memory that follows.
        """
        mine = teacher(tensors, self.parameters())
        statistics = {name: tensors[f"memory.{_STATISTICS}{name}"] for name in self.backbone.source_statistics()}
        with torch.no_grad():
            logits = run.beside(mine, Normaliser(statistics)).whole(x)
        if role == "predict":
            return Outcome(logits)
        if role == "learn":
            return Outcome(logits, {"student": run.whole(x)})
        with torch.no_grad():
            items, after = self._taken(logits, {name: tensors[f"memory.{name}"] for name in _BANK}, hyper)
            frames = torch.cat([tensors["memory.frames"], x]).index_select(0, items)
            follows = dataclasses.replace(run.normalise, statistics=statistics, updated={})
            wanted = run.beside(mine, follows, self.bank).whole(frames)
            counter = tensors["memory.counter"]
            shown = augmented(frames, counter, self.setup.seed, flip=self.setting("flip") == "yes")
        after |= {"frames": frames, "counter": counted(counter), **{_STATISTICS + name: value for name, value in follows.updated.items()}}
        valid = (after["labels"] >= 0.0).to(x.dtype)
        terms = {"wanted": wanted, "weights": valid * torch.sigmoid(-after["ages"] / self.capacity), "count": valid.sum()}
        terms["student"] = run.beside(run.affine, run.normalise, self.bank).whole(shown)
        return Outcome(logits, terms | {_AFTER + name: value.detach() for name, value in after.items()})

    def _taken(self, logits: Tensor, bank: Mapping[str, Tensor], hyper: Mapping[str, Tensor]) -> tuple[Tensor, Tensors]:
        """The frames of a step, taken in one after the other: which of [memory; step] then lies in each slot (N,), and what is known of it.

        Of each frame in each of the step's turns the score is computed at once; then turn by turn a vector of [memory; step] says which are held.
        """
        size, turns, kind = self.capacity, logits.shape[0], logits.dtype
        turn = torch.arange(turns, dtype=kind)
        labels = torch.cat([bank["labels"], logits.argmax(1).to(kind)])
        unsure = torch.cat([bank["uncertainty"], entropy(logits)])
        ages = torch.cat([bank["ages"], -turn])
        scores = hyper["timeliness"] * torch.sigmoid((ages.unsqueeze(0) + turn.unsqueeze(1)) / size)
        scores = 1.0 + scores + hyper["uncertainty"] / math.log(self.setup.classes) * unsure.unsqueeze(0)  # above 0, which stands for none
        held = torch.cat([(bank["labels"] >= 0.0).to(kind), torch.zeros(turns, dtype=kind)])
        held = _held(held, (labels.unsqueeze(0) == labels.unsqueeze(1)).to(kind), scores, size, size / self.setup.classes)
        places = torch.arange(size + turns, dtype=kind)
        order = (places + (1.0 - held) * (size + turns)).sort().indices[:size]
        slots = torch.arange(size)
        count = held.sum()
        valid = (slots.to(kind) < count).to(kind)
        known = {"labels": labels, "uncertainty": unsure, "ages": ages + turns}
        known = {name: value.index_select(0, order) * valid for name, value in known.items()}
        known["labels"] = known["labels"] - (1.0 - valid)
        return order.index_select(0, torch.remainder(slots, count.to(torch.int64))), known

    def unlabelled(self, outcome: Outcome, hyper: Mapping[str, Tensor]) -> Terms:
        """The student's disagreement with the teacher on augmented frames, weighted by their ages."""
        terms = outcome.terms
        return (Term((terms["weights"] * disagreement(terms["student"], terms["wanted"])).sum(), "memory", terms["count"]),)

    def labelled(self, outcome: Outcome, target: Tensor, hyper: Mapping[str, Tensor]) -> Terms:
        """Cross-entropy of the student."""
        return (Term(F.cross_entropy(outcome.terms["student"], target)),)

    def remembered(self, passes: Sequence[Outcome], hyper: Mapping[str, Tensor]) -> Tensors:
        """The memory, and the teacher's statistics."""
        return {name.removeprefix(_AFTER): value for name, value in passes[0].terms.items() if name.startswith(_AFTER)}

    def settled(
        self, passes: Sequence[Outcome], parameters: Mapping[str, Tensor], tensors: Mapping[str, Tensor], hyper: Mapping[str, Tensor]
    ) -> tuple[Tensors, Tensors]:
        """The teacher follows."""
        return {}, averaged(teacher(tensors, self.parameters()), parameters, hyper["teacher"])


def _held(held: Tensor, alike: Tensor, scores: Tensor, size: int, share: float) -> Tensor:
    """Which of M = size + turns frames are held after all turns; those of the step come last, one a turn.

    Args:
        held: which are held before, 0 or 1 (M,).
        alike: which have one class, 0 or 1 (M, M).
        scores: of each frame in each turn, positive (turns, M).
        size: slots.
        share: frames of a class from which on it gives way to itself.
    """
    places = torch.arange(len(held), dtype=held.dtype)
    total = held.sum()
    for turn, row in enumerate(scores.unbind(0)):
        me = size + turn
        mine = (places == float(me)).to(held.dtype)
        counts = torch.mv(alike, held) * held
        own = alike[me] * held
        room, full = (own.sum() < share).to(held.dtype), (total >= float(size)).to(held.dtype)
        often = (counts == counts.amax()).to(held.dtype)
        candidates = row * ((1.0 - room) * own + room * full * often)
        worst = candidates.amax()
        out = (worst > row[me]).to(held.dtype)
        free = room * (1.0 - full)
        held = held - out * (places == candidates.argmax().to(held.dtype)).to(held.dtype) + (out + free) * mine
        total = total + free
    return held
