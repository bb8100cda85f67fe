"""An answer as one JSON object: what `edgeadapt run` prints, and what a daemon tells."""

from __future__ import annotations

from typing import Any

from edgeadapt.bundle import Task
from edgeadapt.report.stream import wrong
from edgeadapt.runtime.stream import Decision, Prediction


def line(prediction: Prediction, decision: Decision | None, task: Task, top: int = 1) -> dict[str, Any]:
    """One frame's line as plain JSON values.

    Args:
        prediction: what became of the frame.
        decision: on its logits; None for a bad frame.
        task: the bundle's.
        top: with 2 or more, classification also lists that many classes, and segmentation lists no more than that.
    """
    head: dict[str, Any] = {"index": prediction.index, "id": prediction.frame.id}
    if decision is None:
        return {**head, "error": prediction.frame.fault}
    numbers = {"confidence": round(decision.confidence, 4), "entropy": round(decision.entropy, 4)}
    numbers |= {"ms": round(prediction.milliseconds, 3), "adapted": prediction.adapted}
    ranked = decision.shares.argsort(kind="stable")[::-1].tolist()
    if task.kind == "segmentation":
        kept = [label for label in (ranked if top == 1 else ranked[:top]) if decision.shares[label] > 0]
        head["shares"] = {_name(task, label) or str(label): round(float(decision.shares[label]), 4) for label in kept}
        off = wrong(decision.classes, prediction.frame.truth, task.classes)
        return {**head, **numbers, **({} if off is None else {"error": round(off, 4)})}
    head |= {"label": decision.label, "name": _name(task, decision.label), **numbers}
    if top > 1:
        head["top"] = [{"label": label, "name": _name(task, label), "confidence": round(float(decision.shares[label]), 4)} for label in ranked[:top]]
    if isinstance(prediction.frame.truth, int) and prediction.frame.truth in range(task.classes):
        head["truth"] = prediction.frame.truth
    return head


def _name(task: Task, label: int) -> str | None:
    return None if task.names is None else task.names[label]
