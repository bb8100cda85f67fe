"""Runs every emitted graph in onnxruntime beside the torch program it was made from, on real samples where there are any.

Each graph is run twice: from its initial state, and from a disturbed one, where no gradient is zero, moments are under way, and the entropy margin
lies between two samples. Logits are compared by their largest difference, updates by the length of the difference against the length of the
update: where an activation lies at a kink (ReLU, an absolute value) rounding may switch single elements. Deep models at batch 1 can be so sensitive
that PyTorch's own update in single precision is a few hundredths from the one in double precision: where an update is over tolerance, that distance
is measured, and twice as much is allowed, but never more than a tenth.

Where the frozen model is computed in 8 bits, the last bit of a float32 number may decide a code, and codes decide others: both give values that are
as right, some codes apart. So there too the distance between single and double precision is measured, and `FLIPS` times as much is allowed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime
import torch

from edgeadapt.errors import ExportError
from edgeadapt.exporters.compile import Compiled, named_refusals
from edgeadapt.exporters.execution import open_session
from edgeadapt.exporters.ir import Array
from edgeadapt.exporters.methods.base import Tensors, entropy
from edgeadapt.exporters.programs import Program

LOGITS, UPDATES, STATISTICS, METRICS = 1e-3, 2e-2, 1e-3, 1e-3
ROOM, UNCERTAIN = 2.0, 0.1
"""How often an update over tolerance may be off by what single precision is from double, and the most it may be off in any case."""
FLIPS, FLIPPED = 4.0, 0.5
"""How often anything may be off by what single precision is from double, where codes of 8 bits hang on the last bit, and the most it may be off then.
A graph that is wrong is off by about 1."""
NOTHING = 1e-3
"""An update whose elements are this small against the largest tensor's is rounding, as before a layer that cancels it."""

Run = tuple[Tensors, dict[str, Array]]
"""Inputs of a program, and what onnxruntime made of them."""


@dataclass(frozen=True)
class Difference:
    """How far onnxruntime is from torch for one graph; each is relative, and None where the graph has no such outputs.

    logits: largest difference over the largest logit; updates: the worst tensor's ‖Δ‖/‖update‖, weighted by the gradient's size under Adam;
    statistics: the worst layer's largest difference over its largest mean or deviation; metrics: the worst scalar's difference over its size or 1;
    worst: the update that is furthest off; limit: what it may differ by, more than `UPDATES` where single precision leaves it uncertain; loose: what
    anything may differ by where codes of 8 bits do.
    """

    graph: str
    logits: float
    updates: float | None
    statistics: float | None
    metrics: float | None
    worst: str
    limit: float = UPDATES
    loose: float = 0.0

    def plain(self) -> dict[str, Any]:
        """As the manifest holds it."""
        return {
            "logits": self.logits,
            "updates": self.updates,
            "updates_limit": self.limit,
            "statistics": self.statistics,
            "metrics": self.metrics,
            "worst": self.worst,
            **({"limit": self.loose} if self.loose else {}),
        }

    def or_worse(self, other: Difference) -> Difference:
        """The larger of each."""

        def larger(a: float | None, b: float | None) -> float | None:
            return b if a is None else a if b is None else max(a, b)

        worst = self if (self.updates or 0.0) / self.limit >= (other.updates or 0.0) / other.limit else other
        statistics, metrics = larger(self.statistics, other.statistics), larger(self.metrics, other.metrics)
        loose = max(self.loose, other.loose)
        return Difference(self.graph, max(self.logits, other.logits), worst.updates, statistics, metrics, worst.worst, worst.limit, loose)


def kinds_of(compiled: Compiled) -> dict[str, str]:
    """Kind of each state tensor."""
    return {name: kind for name, (kind, _) in compiled.program.model.state().items()}


def compare(compiled: Compiled) -> tuple[Difference, list[Run]]:
    """Run both from the initial and from the disturbed state; the larger differences, and onnxruntime's runs."""
    with named_refusals():
        session = open_session(compiled.model, compiled.graph.constants)
    runs = [(example, _run(compiled, session, example)) for example in examples(compiled)]
    first, *more = (compare_at(compiled, *run) for run in runs)
    for result in more:
        first = first.or_worse(result)
    return first, runs


def examples(compiled: Compiled) -> Iterator[Tensors]:
    """The inputs that a graph is checked with: at its initial state, and at the disturbed one."""
    program = compiled.program
    start = _with_margin(program, dict(program.example))
    yield start
    if compiled.writes or program.model.parameters:
        yield _with_margin(program, disturbed(program, start))


def _run(compiled: Compiled, session: onnxruntime.InferenceSession, example: Tensors) -> dict[str, Array]:
    feeds = {entry.name: example[entry.name].numpy() for entry in session.get_inputs()}
    with named_refusals():
        return dict(zip(compiled.graph.outputs, session.run(None, feeds), strict=True))


def compare_variant(variant: Compiled, base: str, runs: Sequence[Run]) -> None:
    """See that a graph that saves memory gives what the quickest one, `base`, gave in its runs, to the last bit.

    Raises:
        ExportError: it does not.
    """
    with named_refusals():
        session = open_session(variant.model, variant.graph.constants)
    for example, wanted in runs:
        found = _run(variant, session, example)
        if differing := [name for name, value in wanted.items() if value.tobytes() != found[name].tobytes()]:
            raise ExportError(
                f"self-check of {variant.name}: {differing[0]} is not what {base} gives",
                "this is a fault of the exporter; please report it with the model",
            )


def disturbed(program: Program, example: Tensors) -> Tensors:
    """The example with parameters and statistics away from where they start, and moments as one step leaves them."""
    random = torch.Generator().manual_seed(1)
    moved = dict(example)
    for name, (kind, _) in program.model.state().items():
        value = example.get(f"state.{name}")
        if value is None or kind == "moment":
            continue
        noise = 0.05 * torch.randn(value.shape, generator=random)
        if name.endswith(".variance"):
            moved[f"state.{name}"] = value * (1 + noise)
        elif kind == "statistic":
            moved[f"state.{name}"] = value + noise * example[f"state.{name.removesuffix('.mean')}.variance"].sqrt()
        else:
            moved[f"state.{name}"] = value + noise * max(float(value.square().mean().sqrt()), 0.5)
    step = program({name: value.clone() for name, value in moved.items()})
    moments = [name for name, (kind, _) in program.model.state().items() if kind == "moment" and f"new.{name}" in step]
    return {**moved, **{f"state.{name}": step[f"new.{name}"].detach() for name in moments}}


def _with_margin(program: Program, example: Tensors) -> Tensors:
    """The example with its entropy margin in the widest gap between two samples around the median: some are learned from, some are not."""
    if "hyper.margin" not in example:
        return example
    logits = program({name: value.clone() for name, value in example.items()})["logits"]
    levels = (entropy(logits) / math.log(logits.shape[1])).flatten().sort().values
    count = len(levels)
    if count < 2:
        return {**example, "hyper.margin": torch.tensor(2.0)}
    low, high = count // 4, max(count // 4 + 1, (3 * count) // 4)
    gaps = levels[low + 1 : high + 1] - levels[low:high]
    at = low + int(gaps.argmax())
    return {**example, "hyper.margin": (levels[at] + levels[at + 1]) / 2}


def compare_at(compiled: Compiled, example: Tensors, got: dict[str, Array]) -> Difference:
    """How far what onnxruntime made of some inputs is from what the program makes of them."""
    program, kinds = compiled.program, kinds_of(compiled)
    want = {name: value.detach().numpy() for name, value in program({name: value.clone() for name, value in example.items()}).items()}
    logits = _farthest(got["logits"], want["logits"])
    trained = [name for name in compiled.writes if kinds[name] != "statistic"]
    rms = {name: float(np.sqrt(np.mean((want[f"new.{name}"] - example[f"state.{name}"].numpy()) ** 2))) for name in trained}
    largest = {kind: max((rms[name] for name in trained if kinds[name] == kind and name != "step"), default=0.0) for kind in ("parameter", "moment")}

    def apart(name: str, other: dict[str, Array]) -> float:
        theirs, before, weight = want[f"new.{name}"], example[f"state.{name}"].numpy(), _confidence(name, want)
        length = float(np.linalg.norm((theirs - before) * weight))
        floor = NOTHING * largest[kinds[name]] * theirs.size**0.5 + 1e-5 * float(np.linalg.norm(before)) + 1e-12
        return float(np.linalg.norm((other[f"new.{name}"] - theirs) * weight)) / max(length, floor)

    updates = {name: apart(name, got) for name in trained}
    limits, loose = dict.fromkeys(trained, UPDATES), 0.0
    over = [name for name in trained if updates[name] > UPDATES]
    rounded = program.model.method.backbone.captured.quantisation is not None
    if (over or rounded) and (exact := _in_double(program, example)):
        room, most = (FLIPS, FLIPPED) if rounded else (ROOM, UNCERTAIN)
        limits |= {name: min(max(UPDATES, room * apart(name, exact)), most) for name in over}
        loose = min(room * _farthest(exact["logits"], want["logits"]), UNCERTAIN) if rounded else 0.0
    statistics = []
    for name in (name for name in compiled.writes if kinds[name] == "statistic"):
        deviation = np.sqrt(np.abs(want[f"new.{name.rpartition('.')[0]}.variance"]).max())
        scale = max(float(np.abs(want[f"new.{name}"]).max()), float(deviation), 1e-6)
        statistics.append(float(np.abs(got[f"new.{name}"] - want[f"new.{name}"]).max()) / scale)
    metrics = [
        abs(float(got[f"metric.{name}"]) - float(want[f"metric.{name}"])) / max(1.0, abs(float(want[f"metric.{name}"]))) for name in compiled.metrics
    ]
    finite = all(np.isfinite(value).all() for value in got.values())
    worst = max(trained, key=lambda name: updates[name] / limits[name], default="")
    return Difference(
        program.name,
        logits if finite else float("inf"),
        updates.get(worst),
        max(statistics, default=None),
        max(metrics, default=None),
        worst,
        limits.get(worst, UPDATES),
        loose,
    )


def _farthest(found: Array, wanted: Array) -> float:
    """The largest difference over the largest value."""
    return float(np.abs(found - wanted).max() / max(float(np.abs(wanted).max()), 1e-6))


def _in_double(program: Program, example: Tensors) -> dict[str, Array] | None:
    """What the program gives in double precision; None where the model cannot run in it."""
    wide = {name: value.double() if value.is_floating_point() else value.clone() for name, value in example.items()}
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        return {name: value.detach().numpy() for name, value in program(wide).items()}
    except (RuntimeError, TypeError, ValueError):  # a type is written into the model
        return None
    finally:
        torch.set_default_dtype(usual)


def _confidence(name: str, want: dict[str, Array]) -> Array:
    """Under Adam an update's size does not tell its gradient's; elements whose gradient is lost in rounding must not count."""
    first = want.get(f"new.first.{name}")
    if first is None or not np.abs(first).max() > 0:
        return np.ones((), np.float32)
    return np.abs(first) / np.abs(first).max()


def check(compiled: Sequence[Compiled]) -> list[Difference]:
    """Compare every graph with PyTorch, and each variant with the graph it is a variant of, which stands before it.

    Raises:
        ExportError: a difference is over tolerance.
    """
    results: list[Difference] = []
    runs: list[Run] = []
    for item in compiled:
        if item.variant:
            compare_variant(item, item.program.name, runs)
            results.append(dataclasses.replace(results[-1], graph=item.name))
            continue
        with torch.no_grad():
            found, runs = compare(item)
        results.append(found)
        refuse(found)
    return results


def refuse(found: Difference) -> None:
    """Refuse differences that are over tolerance.

    Raises:
        ExportError: one is.
    """
    limits = (
        ("logits", found.logits, LOGITS),
        ("updates", found.updates, found.limit),
        ("statistics", found.statistics, STATISTICS),
        ("metrics", found.metrics, METRICS),
    )
    for what, value, limit in limits:
        limit = max(limit, found.loose)
        if value is not None and not value <= limit:
            raise ExportError(
                f"self-check of {found.graph}: {what} differ from PyTorch by {value:.1e} (relative), more than {limit:.0e}"
                + (f", worst in {found.worst}" if what == "updates" else ""),
                "the model may be numerically unstable on these samples; if it is not, please report it with the model",
            )
