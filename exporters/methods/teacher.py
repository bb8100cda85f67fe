"""What methods share whose predictions come from a teacher: a slow average of the parameters that are trained."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from edgeadapt.exporters.methods.base import Hyper, Tensors

PREFIX = "teacher."
"""What the names of its parameters begin with, in the method's memory."""
TEACHER = Hyper(1e-3, 0.0, 1.0, "share of the trained parameters that the teacher takes over at each step")
LARGEST = float(2**24)
"""A counter in float32 starts again here."""


def teacher(tensors: Mapping[str, Tensor], names: Iterable[str]) -> Tensors:
    """The teacher's parameters, by the names of those that are trained, from the tensors that a pass gets."""
    return {name: tensors[f"memory.{PREFIX}{name}"] for name in names}


def averaged(before: Mapping[str, Tensor], parameters: Mapping[str, Tensor], share: Tensor) -> Tensors:
    """The teacher after a step, as memory: t ← (1 − share)·t + share·p."""
    return {PREFIX + name: (1.0 - share) * value + share * parameters[name] for name, value in before.items()}


def disagreement(student: Tensor, wanted: Tensor) -> Tensor:
    """Cross-entropy of the student's soft-max to the teacher's, in nats: logits (N, C, …) twice → (N, …); none reaches the teacher."""
    return -(wanted.detach().softmax(1) * student.log_softmax(1)).sum(1)


def counted(counter: Tensor) -> Tensor:
    """The next value of a counter."""
    following = counter + 1.0
    return following * (following < LARGEST).to(counter.dtype)
