"""Runs every emitted graph in onnxruntime beside the torch program it was made from, on real samples where there are any.

Each graph is run twice: from its initial state, and from a disturbed one, where no gradient is zero, moments are under way, and the entropy margin
lies between two samples. Logits are compared by their largest difference, updates by the length of the difference against the length of the
update: where an activation lies at a kink (ReLU, an absolute value) rounding may switch single elements. Deep models at batch 1 can be so sensitive
that PyTorch's own update in single precision is a few hundredths from the one in double precision: where an update is over tolerance, that distance
is measured, and twice as much is allowed, but never more than a tenth. Which elements lie at a kink for whom is chance, so where that is not enough,
what noise in the last bits of the inputs does is measured too, and twice as much is allowed within the same bound.

Where the frozen model is computed in 8 bits, the last bit of a float32 number may decide a code, and codes decide others: both give values that are
as right, some codes apart. So there too the distance between single and double precision is measured, and `SPREAD` times as much is allowed: logits,
statistics and metrics by that of the logits, each update by its own, each tensor of whole numbers by how many of them double precision rounds
otherwise. Where one is further off than that, single precision is also run on inputs with noise in their last bits: what a code more or less does is
rare and large, and a single other run may not show it. Updates have no bound, as those of a model that is too unstable for 8 bits may be all
rounding: the bundle says which were not checked.
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

from edgeadapt.bundle.roles import GUARD, STEPS
from edgeadapt.errors import ExportError
from edgeadapt.exporters.compile import Compiled, named_refusals
from edgeadapt.exporters.execution import open_session
from edgeadapt.exporters.ir import Array
from edgeadapt.exporters.methods.base import MEMORY, Tensors, entropy
from edgeadapt.exporters.programs import Program

LOGITS, UPDATES, STATISTICS, METRICS = 1e-3, 2e-2, 1e-3, 1e-3
ROOM, UNCERTAIN = 2.0, 0.1
"""How often an update over tolerance may be off by what single precision is from double, and the most it may be off in any case."""
SPREAD, SPREAD_MOST = 4.0, 0.5
"""How often a thing may be off by what single precision is from double, where codes of 8 bits hang on the last bit, and the most that logits,
statistics and metrics may be off then. A graph that is wrong is off by about 1: where updates may be off by more than this, they are not checked."""
CODE, CODE_UPDATES = 1e-2, 5e-2
"""What logits, statistics and metrics, and updates, may be off by in any case where there are codes: a few that lie on an edge are as much, and which
do is chance."""
NOISE, RUNS = 1e-6, 4
"""Noise in the inputs, of their size, and runs with it; `ROOM` times what they are off is allowed as well."""
ODD, ODD_MOST = 16, 4
"""Where there are codes, one of so many elements of an update does not count, the furthest off, and so many at most: where the sign of a small
gradient turns, Adam's first step of this element turns whole. What is wrong is wrong in more of them."""
TIES, DRAWS = 1e-5, 8
"""Noise in the inputs, of their size, that may not turn a choice of the method where a graph is checked, and other inputs that are tried for that."""
NOTHING = 1e-3
"""An update whose elements are this small against the largest tensor's is rounding, as before a layer that cancels it; under Adam, whose steps are
as large for small gradients, one whose first moments are."""

FLIPS = 0.1
"""The share of whole numbers that may be rounded to the other side. Ties come by rows, as Adam's first step is one and the same for all; on real
samples 3 % were seen. A rule that rounds otherwise changes a quarter to half of them."""
FIRST = "first."
"""What the names of first moments begin with."""
HALF = 1.001
"""Steps that a whole number may be off before it counts as more than rounding."""
FLIPS_ROOM = 1.5
"""Where codes of 8 bits hang on the last bit, how many times the share may be rounded otherwise that double precision rounds otherwise: a gradient
that is a hundredth off has most of its 8-bit moments on other codes. What is beyond a step counts as an update there as well."""
COUNTED, LEAST = 0.01, 100
"""Only elements of so much of the largest are counted as roundings: others' gradients may be rounding; a few in a small tensor are chance."""

Run = tuple[Tensors, dict[str, Array]]
"""Inputs of a program, and what onnxruntime made of them."""


@dataclass(frozen=True)
class Difference:
    """How far onnxruntime is from torch for one graph; each is relative, and None where the graph has no such outputs.

    logits: largest difference over the largest logit; updates: the worst tensor's ‖Δ‖/‖update‖, weighted by the gradient's size under Adam;
    statistics: the worst layer's largest difference over its largest mean or deviation; metrics: the worst scalar's difference over its size or 1;
    worst: the update that is furthest beyond what it may differ by, which is limit, more than `UPDATES` where single precision leaves it uncertain;
    loose: what logits, statistics and metrics may differ by where codes of 8 bits do; unchecked: updates that single precision leaves so uncertain
    that a wrong graph could not be told from a right one.
    Where the state holds whole numbers, updates count what is beyond one of their steps; flips: the share of those that are one step apart in the
    tensor `flipped`, the one furthest beyond what it may be, which is flips_limit; step: the update metric at the initial state.
    """

    graph: str
    logits: float
    updates: float | None
    statistics: float | None
    metrics: float | None
    worst: str
    limit: float = UPDATES
    flips: float | None = None
    step: float | None = None
    loose: float = 0.0
    flips_limit: float = FLIPS
    flipped: str = ""
    unchecked: tuple[str, ...] = ()

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
            **({} if self.flips is None else {"flips": self.flips, "flips_limit": self.flips_limit}),
            **({} if self.step is None else {"step": self.step}),
            **({"unchecked": list(self.unchecked)} if self.unchecked else {}),
        }

    def or_worse(self, other: Difference) -> Difference:
        """The larger of each."""

        def larger(a: float | None, b: float | None) -> float | None:
            return b if a is None else a if b is None else max(a, b)

        worst = self if (self.updates or 0.0) / self.limit >= (other.updates or 0.0) / other.limit else other
        statistics, metrics = larger(self.statistics, other.statistics), larger(self.metrics, other.metrics)
        flipped = self if (self.flips or 0.0) / self.flips_limit >= (other.flips or 0.0) / other.flips_limit else other
        loose, unchecked = max(self.loose, other.loose), tuple(dict.fromkeys(self.unchecked + other.unchecked))
        limits = (worst.limit, flipped.flips, self.step, loose, flipped.flips_limit, flipped.flipped, unchecked)
        return Difference(self.graph, max(self.logits, other.logits), worst.updates, statistics, metrics, worst.worst, *limits)


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
    shown = {f"hyper.{name}": torch.tensor(value) for name, value in program.model.method.checked.items() if f"hyper.{name}" in program.example}
    start = _with_margin(program, dict(program.example))
    yield _decided(program, {**start, **shown})
    if compiled.writes or program.model.parameters:
        yield _decided(program, _with_margin(program, disturbed(program, start)))


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
    """The example with parameters and statistics away from where they start, and moments and the method's memory as one step leaves them."""
    random = torch.Generator().manual_seed(1)
    moved = dict(example)
    for name, (kind, _) in program.model.state().items():
        value = example.get(f"state.{name}")
        units = kind == "parameter" and value is not None and value.is_floating_point() and name not in program.model.parameters
        if value is None or kind in ("moment", "memory") or units:
            continue
        noise = 0.05 * torch.randn(value.shape, generator=random)
        if name.endswith(".variance"):
            moved[f"state.{name}"] = value * (1 + noise)
        elif kind == "statistic":
            moved[f"state.{name}"] = value + noise * example[f"state.{name.removesuffix('.mean')}.variance"].sqrt()
        elif not value.is_floating_point():
            most = torch.iinfo(value.dtype).max
            moved[f"state.{name}"] = (value + noise * (most / 2)).round().clamp(-most, most).to(value.dtype)
        else:
            moved[f"state.{name}"] = value + noise * max(float(value.square().mean().sqrt()), 0.5)
    step = program({name: value.clone() for name, value in moved.items()})
    moments = [name for name, (kind, _) in program.model.state().items() if kind in ("moment", "memory") and f"new.{name}" in step]
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


def _decided(program: Program, example: Tensors) -> Tensors:
    """The example with inputs that no rounding could have the method choose otherwise for: those given, or like them with some noise."""
    names = [f"new.{MEMORY}{name}" for name in program.model.method.choosing]
    if not names or program.role != "adapt":
        return example
    x = example["x"]

    def chosen(x: torch.Tensor) -> list[torch.Tensor]:
        table = program({name: value.clone() for name, value in {**example, "x": x}.items()})
        return [table[name] for name in names]

    def noisy(x: torch.Tensor, share: float, seed: int) -> torch.Tensor:
        return x + share * x.square().mean().sqrt() * torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))

    for draw in range(DRAWS):
        given = noisy(x, 0.1, draw) if draw else x
        found = chosen(given)
        if all(torch.equal(one, other) for seed in range(2) for one, other in zip(found, chosen(noisy(given, TIES, seed)), strict=True)):
            return {**example, "x": given}
    return example


def compare_at(compiled: Compiled, example: Tensors, got: dict[str, Array]) -> Difference:
    """How far what onnxruntime made of some inputs is from what the program makes of them."""
    program, kinds = compiled.program, kinds_of(compiled)
    want = {name: value.detach().numpy() for name, value in program({name: value.clone() for name, value in example.items()}).items()}
    logits = _farthest(got["logits"], want["logits"])
    after, before = _seen(program, example, want), _seen(program, example, {})
    trained = [name for name in compiled.writes if name in after and kinds[name] != "statistic"]
    rms = {name: float(np.sqrt(np.mean((after[name][0] - before[name][0]) ** 2))) for name in trained}
    averages = tuple(f"{MEMORY}{program.model.method.averages}{name}" for name in kinds if kinds[name] == "parameter")
    alike = {name: "average" if name in averages else kinds[name] for name in trained}
    largest = {kind: max((rms[name] for name in trained if alike[name] == kind and name != "step"), default=0.0) for kind in ("parameter", "moment")}
    largest["average"] = max((rms[name] for name in averages if name in rms), default=0.0)
    slopes = {name: float(np.sqrt(np.mean(after[name][0] ** 2))) for name in trained if name.startswith(FIRST)}
    steepest = max(slopes.values(), default=0.0)

    def share(name: str) -> float:
        """How much of a parameter's update counts under Adam: less where its gradient is so small that it may be rounding."""
        slope = slopes.get(FIRST + name.removeprefix(f"{MEMORY}{program.model.method.averages}"))
        return 1.0 if slope is None or not steepest else min(1.0, slope / (NOTHING * steepest))

    rounded = program.model.method.backbone.captured.quantisation is not None

    def apart(name: str, other: dict[str, tuple[Array, Array, Array]]) -> float:
        (theirs, gaps, weight), start = after[name], before[name][0]
        length = float(np.linalg.norm((theirs - start) * weight))
        floor = NOTHING * largest.get(alike[name], 0.0) * theirs.size**0.5 + 1e-5 * float(np.linalg.norm(start)) + 1e-12
        difference = np.maximum(np.abs(other[name][0] - theirs) - HALF * gaps, 0.0) if gaps.any() else other[name][0] - theirs
        far = np.abs(difference * weight).ravel()
        odd = min(far.size // ODD, ODD_MOST) if rounded else 0
        return share(name) * float(np.linalg.norm(np.partition(far, far.size - odd)[: far.size - odd] if odd else far)) / max(length, floor)

    ours = _seen(program, example, got)
    updates = {name: apart(name, ours) for name in trained}
    stored = [name for name in trained if after[name][1].any()]
    flips = {name: _flips(after[name], ours[name]) for name in stored}
    limits, loose, flips_limits = dict.fromkeys(trained, UPDATES), 0.0, dict.fromkeys(stored, FLIPS)
    over = [name for name in trained if updates[name] > UPDATES]
    if (over or rounded) and (exact := _in_double(program, example)):
        double = _seen(program, example, exact)
        room, most = (SPREAD, math.inf) if rounded else (ROOM, UNCERTAIN)
        limits |= {name: min(max(CODE_UPDATES if rounded else UPDATES, room * apart(name, double)), most) for name in over}
        if rounded:
            loose = min(max(CODE, SPREAD * _farthest(exact["logits"], want["logits"])), SPREAD_MOST)
            flips_limits = {name: max(FLIPS, FLIPS_ROOM * _flips(after[name], double[name])) for name in stored}
        further = any(updates[name] > limits[name] for name in over)
        further = further or (rounded and (logits > loose or any(flips[name] > flips_limits[name] for name in stored)))
        for noisy in _noisy(program, example) if further else ():
            other = _seen(program, example, noisy)
            limits |= {name: max(limits[name], min(ROOM * apart(name, other), most)) for name in over}
            if rounded:
                flips_limits |= {name: max(flips_limits[name], FLIPS_ROOM * _flips(after[name], other[name])) for name in stored}
                loose = min(max(loose, ROOM * _farthest(noisy["logits"], want["logits"])), SPREAD_MOST)
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
    flipped = max(stored, key=lambda name: flips[name] / flips_limits[name], default="")
    return Difference(
        program.name,
        logits if finite else float("inf"),
        updates.get(worst),
        max(statistics, default=None),
        max(metrics, default=None),
        worst,
        limits.get(worst, UPDATES),
        flips.get(flipped),
        float(got[f"metric.{GUARD}"]) if GUARD in compiled.metrics else None,
        loose,
        flips_limits.get(flipped, FLIPS),
        flipped,
        tuple(name for name, limit in limits.items() if limit > SPREAD_MOST),
    )


def _farthest(found: Array, wanted: Array) -> float:
    """The largest difference over the largest value."""
    return float(np.abs(found - wanted).max() / max(float(np.abs(wanted).max()), 1e-6))


def _seen(program: Program, example: Tensors, table: dict[str, Array]) -> dict[str, tuple[Array, Array, Array]]:
    """Values, gaps and weights of the state after a run that gave `table`: of what it did not write, those before."""
    state = {name.removeprefix("state."): value for name, value in example.items() if name.startswith("state.")}
    state |= {name.removeprefix("new."): torch.from_numpy(np.asarray(value)) for name, value in table.items() if name.startswith("new.")}
    found = program.model.storage.seen(program.model.optimiser if program.role.startswith(STEPS) else "", state)
    seen = {name: (item.values.numpy(), item.gaps.numpy(), item.weights.numpy()) for name, item in found.items()}
    nothing, whole = np.zeros((), np.float32), np.ones((), np.float32)
    kept = {name.removeprefix(MEMORY): value.numpy() for name, value in state.items() if name.startswith(MEMORY)}
    averages = program.model.method.averages
    weights = {averages + name: item[2] for name, item in seen.items()} if averages else {}  # an average of parameters counts as these do
    return seen | {MEMORY + name: (value, nothing, weights.get(name, whole)) for name, value in kept.items()}


def _flips(theirs: tuple[Array, Array, Array], ours: tuple[Array, Array, Array]) -> float:
    """The share of elements that were rounded to another number, of those whose update counts and that are no rounding themselves."""
    values, gaps, weight = theirs
    counted = (weight > COUNTED) & (np.abs(values) >= COUNTED * np.abs(values).max(-1, keepdims=True))
    apart = np.abs(ours[0] - values) > 0.5 * gaps
    return float((apart & counted).sum() / max(int(counted.sum()), LEAST))


def _noisy(program: Program, example: Tensors) -> Iterator[dict[str, Array]]:
    """What the program gives for inputs with some noise."""
    x = example["x"]
    for seed in range(RUNS):
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
        given = {**example, "x": x + NOISE * x.square().mean().sqrt() * noise}
        yield {name: value.detach().numpy() for name, value in program({name: value.clone() for name, value in given.items()}).items()}


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
        ("logits", found.logits, max(LOGITS, found.loose), ""),
        ("updates", found.updates, found.limit, found.worst),
        ("statistics", found.statistics, max(STATISTICS, found.loose), ""),
        ("metrics", found.metrics, max(METRICS, found.loose), ""),
        ("roundings", found.flips, found.flips_limit, found.flipped),
    )
    for what, value, limit, worst in limits:
        if value is not None and not value <= limit:
            raise ExportError(
                f"self-check of {found.graph}: {what} differ from PyTorch by {value:.1e} (relative), more than {limit:.0e}"
                + (f", worst in {worst}" if worst else ""),
                "the model may be numerically unstable on these samples; if it is not, please report it with the model",
            )
