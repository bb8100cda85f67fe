"""Runs every emitted graph in onnxruntime beside the torch program it was made from, on real samples.

Logits are compared by their largest difference, updates by the length of the difference against the length of the update: where an activation
lies at a kink (ReLU, an absolute value) rounding may switch single elements.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime
import torch

from edgeadapt.errors import ExportError
from edgeadapt.exporters.compile import Compiled
from edgeadapt.exporters.emit import to_onnx
from edgeadapt.exporters.ir import Array

LOGITS, UPDATES, STATISTICS = 1e-3, 2e-2, 1e-3
NOTHING = 1e-3
"""An update whose elements are this small against the largest tensor's is rounding, as before a layer that cancels it."""


@dataclass(frozen=True)
class Difference:
    """How far onnxruntime is from torch for one graph; each is relative, and None where the graph has no such outputs.

    logits: largest difference over the largest logit; updates: the worst tensor's ‖Δ‖/‖update‖, weighted by the gradient's size under Adam;
    statistics: the worst tensor's largest difference over its largest value; worst: that update's name.
    """

    graph: str
    logits: float
    updates: float | None
    statistics: float | None
    worst: str

    def plain(self) -> dict[str, Any]:
        """As the manifest holds it."""
        return {"logits": self.logits, "updates": self.updates, "statistics": self.statistics, "worst": self.worst}


def kinds_of(compiled: Compiled) -> dict[str, str]:
    """Kind of each state tensor."""
    return {name: kind for name, (kind, _) in compiled.program.model.state().items()}


def _run(compiled: Compiled) -> dict[str, Array]:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED
    options.log_severity_level, options.enable_mem_pattern = 3, False
    session = onnxruntime.InferenceSession(to_onnx(compiled.graph).SerializeToString(), options, providers=["CPUExecutionProvider"])
    example = compiled.program.example
    feeds = {entry.name: example[entry.name].numpy() for entry in session.get_inputs()}
    return dict(zip(compiled.graph.outputs, session.run(None, feeds), strict=True))


def compare(compiled: Compiled) -> Difference:
    """Run both on the program's example inputs."""
    program = compiled.program
    example = program.example
    if "hyper.margin" in example:  # learn from all samples: none may be confident, and those at the margin would switch by rounding
        example["hyper.margin"] = torch.tensor(2.0)
    got = _run(compiled)
    want = {name: value.detach().numpy() for name, value in program({name: value.clone() for name, value in example.items()}).items()}
    logits = float(np.abs(got["logits"] - want["logits"]).max() / max(float(np.abs(want["logits"]).max()), 1e-6))
    kinds = kinds_of(compiled)
    updates: list[tuple[float, str]] = []
    statistics: list[tuple[float, str]] = []
    rms = {name: float(np.sqrt(np.mean((want[f"new.{name}"] - example[f"state.{name}"].numpy()) ** 2))) for name in compiled.writes}
    largest = {kind: max((value for name, value in rms.items() if kinds_of(compiled)[name] == kind), default=0.0) for kind in ("parameter", "moment")}
    for name in compiled.writes:
        mine, theirs, before = got[f"new.{name}"], want[f"new.{name}"], example[f"state.{name}"].numpy()
        if kinds[name] == "statistic":
            statistics.append((float(np.abs(mine - theirs).max() / max(float(np.abs(theirs).max()), 1e-6)), name))
            continue
        weight = _confidence(name, want)
        length = float(np.linalg.norm((theirs - before) * weight))
        floor = NOTHING * largest[kinds[name]] * theirs.size**0.5 + 1e-6 * float(np.linalg.norm(before)) + 1e-12
        updates.append((float(np.linalg.norm((mine - theirs) * weight)) / max(length, floor), name))
    finite = all(np.isfinite(value).all() for value in got.values())
    worst = max(updates, default=(0.0, ""))
    return Difference(
        program.name,
        logits if finite else float("inf"),
        worst[0] if updates else None,
        max(statistics, default=(0.0, ""))[0] if statistics else None,
        worst[1],
    )


def _confidence(name: str, want: dict[str, Array]) -> Array:
    """Under Adam an update's size does not tell its gradient's; elements whose gradient is lost in rounding must not count."""
    first = want.get(f"new.first.{name}")
    if first is None or not np.abs(first).max() > 0:
        return np.ones((), np.float32)
    return np.abs(first) / np.abs(first).max()


def check(compiled: Sequence[Compiled]) -> list[Difference]:
    """Compare every graph.

    Raises:
        ExportError: a difference is over tolerance.
    """
    results = []
    for item in compiled:
        with torch.no_grad():
            found = compare(item)
        results.append(found)
        limits = (("logits", found.logits, LOGITS), ("updates", found.updates, UPDATES), ("statistics", found.statistics, STATISTICS))
        for what, value, limit in limits:
            if value is not None and not value <= limit:
                raise ExportError(
                    f"self-check of {found.graph}: {what} differ from PyTorch by {value:.1e} (relative), more than {limit:.0e}"
                    + (f", worst in {found.worst}" if what == "updates" else ""),
                    "the model may be numerically unstable on these samples; if it is not, please report it with the model",
                )
    return results
