"""Graphs beside the exported one on the same inputs: whether they compute the same, and how fast."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeadapt.bundle import Bundle, GraphSpec
from edgeadapt.memory import quantised
from edgeadapt.runtime import profiling
from edgeadapt.runtime.session import failure

LOGITS, UPDATES, STATISTICS, METRICS = 1e-3, 2e-2, 1e-3, 1e-3
"""What may differ, relative: as the exporter's self-check allows."""

BYTES = {"logits": 2e-2, "updates": 1e-1, "statistics": 1e-2, "metrics": 1e-2}
"""The same of a graph on bytes: where floats differ in rounding, a byte may come out as the next one, which is 1/255 of its tensor's range. One such
byte moved the logits of a small network by 1.4e-3 of the largest; five whole quanta of these are allowed."""

NOTHING = 1e-3  # an update whose elements are this small against the largest tensor's is rounding
_ON_BYTES = quantised.WEIGHTS.keys() | {"QuantizeLinear", "DynamicQuantizeLinear"}
SECONDS, MOST, LEAST = 1.0, 20, 3  # of one graph's timing, and rounds

Array = NDArray[Any]
Feeds = dict[str, Array]


def feeds(bundle: Bundle, name: str, session: Any) -> list[Feeds]:
    """Two sets of inputs of a graph: at the initial state, and at a disturbed one where no gradient is zero and moments are under way.

    Frames are noise. The entropy margin lies between two of their predictions, so that some are learned from and some are not.
    """
    manifest, spec = bundle.manifest, bundle.manifest.graphs[name]
    random = np.random.default_rng(0)
    shapes = {node.name: tuple(node.shape) for node in session.get_inputs()}
    start: Feeds = {"x": random.standard_normal(shapes["x"], np.float32)} if "x" in shapes else {}
    if "y" in shapes:
        start["y"] = random.integers(0, manifest.task.classes, shapes["y"])
    start |= {f"hyper.{key}": np.float32(spec.defaults.get(key, manifest.hyper[key].default)) for key in spec.hyper}
    initial = bundle.initial_state()
    start |= {f"state.{key}": initial[key] for key in spec.reads}
    start |= _sums(spec, shapes, random)
    if "hyper.margin" in start:
        start["hyper.margin"] = _between(run(session, start)["logits"])
    moved = {**start, **_sums(spec, shapes, random)}
    kinds = {state.name: state.kind for state in manifest.state}
    units = {f"{key}.unit" for key in spec.reads if initial[key].dtype.kind == "i"}
    for key in spec.reads:
        noise = np.float32(0.05) * random.standard_normal(initial[key].shape, np.float32)
        value = initial[key]
        if key in units:  # they never change
            continue
        if kinds[key] == "parameter" and value.dtype.kind == "i":
            most = np.iinfo(value.dtype).max
            moved[f"state.{key}"] = np.clip(np.rint(value + noise * (most / 2)), -most, most).astype(value.dtype)
        elif kinds[key] == "parameter":
            moved[f"state.{key}"] = value + noise * max(float(np.sqrt(np.mean(value**2))), 0.5)
        elif kinds[key] == "statistic":
            moved[f"state.{key}"] = value * (1 + noise) if value.min() > 0 else value + noise
    step = run(session, moved)
    moved |= {f"state.{key}": step[f"new.{key}"] for key in spec.writes if kinds[key] in ("moment", "memory") and f"state.{key}" in moved}
    return [start, moved]


def _sums(spec: GraphSpec, shapes: Mapping[str, tuple[int, ...]], random: np.random.Generator) -> Feeds:
    """Sums as some runs may have left them: small gradients, and counts of more than one."""
    given: Feeds = {}
    for key in spec.sums:
        noise = random.standard_normal(shapes[f"sum.{key}"], np.float32)
        given[f"sum.{key}"] = np.asarray(2 + np.abs(noise) if key.startswith("count.") else np.float32(0.05) * noise, np.float32)
    return given


def _between(logits: Array) -> Array:
    """A margin in the widest gap between two samples' entropies around the median, as a share of the largest entropy."""
    shifted = logits - logits.max(1, keepdims=True)
    weights = np.exp(shifted)
    shares = weights / weights.sum(1, keepdims=True)
    levels = np.sort(-(shares * np.log(np.maximum(shares, 1e-30))).sum(1).ravel() / math.log(logits.shape[1]))
    if len(levels) < 2:
        return np.float32(2.0) * np.ones((), np.float32)
    low, high = len(levels) // 4, max(len(levels) // 4 + 1, 3 * len(levels) // 4)
    gaps = levels[low + 1 : high + 1] - levels[low:high]
    at = low + int(gaps.argmax())
    return np.asarray((levels[at] + levels[at + 1]) / 2, np.float32)


def run(session: Any, given: Feeds) -> Feeds:
    """A graph's outputs by name, copied.

    Raises:
        EdgeAdaptError: it does not run.
    """
    binding, outputs = bound(session, given)
    try:
        session.run_with_iobinding(binding)
    except Exception as reason:  # RuntimeError today, but the type has changed between releases
        raise failure("a run to compare with", reason) from None
    return {name: array.copy() for name, array in outputs.items()}


def bound(session: Any, given: Mapping[str, Array]) -> tuple[Any, Feeds]:
    """A binding of inputs and of memory for every output; onnxruntime keeps what is bound alive."""
    binding = session.io_binding()
    for node in session.get_inputs():
        binding.bind_ortvalue_input(node.name, profiling.value(np.asarray(given[node.name], order="C"), node.type))
    outputs = {node.name: np.zeros(node.shape, profiling.TYPES[node.type]) for node in session.get_outputs()}
    for node in session.get_outputs():
        binding.bind_ortvalue_output(node.name, profiling.value(outputs[node.name], node.type))
    return binding, outputs


def apart(spec: GraphSpec, kinds: Mapping[str, str], given: Feeds, want: Feeds, got: Feeds) -> dict[str, float]:
    """How far two graphs' outputs are apart, relative; infinite where one is finite and the other is not.

    logits: the largest difference against the largest logit. updates: the worst tensor's difference against its update, both as lengths.
    statistics: the worst tensor's largest difference against its largest value, or the deviation. metrics: the worst scalar's, against its size or 1.
    Of sums, gradients are updates and all else metrics, each by what the run adds. Of whole numbers, updates are the share that differs.
    """
    if any(np.isfinite(want[name]).all() != np.isfinite(got[name]).all() for name in want):
        return {"logits": math.inf}
    found = {"logits": _relative(got["logits"], want["logits"], 1e-6)} if "logits" in want else {}
    for key in (key for key in spec.sums if f"added.{key}" in want):  # what a run adds is a gradient, or a number to report
        share, theirs = (table[f"added.{key}"] - given[f"sum.{key}"] for table in (want, got))
        if key.startswith("gradient."):
            floor = 1e-5 * float(np.linalg.norm(given[f"sum.{key}"])) + 1e-12
            found["updates"] = max(found.get("updates", 0.0), float(np.linalg.norm(theirs - share)) / max(float(np.linalg.norm(share)), floor))
        else:
            found["metrics"] = max(found.get("metrics", 0.0), _relative(theirs, share, 1.0))
    whole = [key for key in spec.writes if want[f"new.{key}"].dtype.kind != "f"]
    for key in whole:  # that much of a rounding falls to the other side
        found["updates"] = max(found.get("updates", 0.0), _differing(want[f"new.{key}"], got[f"new.{key}"]))
    trained = [key for key in spec.writes if kinds[key] != "statistic" and key not in whole]
    rms = {key: float(np.sqrt(np.mean((want[f"new.{key}"] - given[f"state.{key}"]) ** 2))) for key in trained}
    for key in trained:
        theirs, before, weight = want[f"new.{key}"], given[f"state.{key}"], _confidence(key, want)
        alike = [rms[other] for other in trained if kinds[other] == kinds[key] != "memory" and other != "step"]  # a memory's have units of their own
        largest = max(alike, default=0.0)
        floor = NOTHING * largest * theirs.size**0.5 + 1e-5 * float(np.linalg.norm(before)) + 1e-12
        length = max(float(np.linalg.norm((theirs - before) * weight)), floor)
        found["updates"] = max(found.get("updates", 0.0), float(np.linalg.norm((got[f"new.{key}"] - theirs) * weight)) / length)
    for key in (key for key in spec.writes if kinds[key] == "statistic"):
        twin = want.get(f"new.{key.rpartition('.')[0]}.variance", want[f"new.{key}"])
        least = max(float(np.sqrt(np.abs(twin).max())), 1e-6)
        found["statistics"] = max(found.get("statistics", 0.0), _relative(got[f"new.{key}"], want[f"new.{key}"], least))
    for key in spec.metrics:
        found["metrics"] = max(found.get("metrics", 0.0), _relative(got[f"metric.{key}"], want[f"metric.{key}"], 1.0))
    return found


def _differing(want: Array, got: Array) -> float:
    """The share of whole numbers that differ; all of them if one differs by more than a step, unless they are codes, which are finer than noise."""
    apart = np.abs(want.astype(np.int64) - got.astype(np.int64))
    codes = want.dtype == np.uint8
    return float((apart > (1 if codes else 0)).mean()) if codes or apart.max() <= 1 else 1.0


def _relative(got: Array, want: Array, least: float) -> float:
    return float(np.abs(got - want).max()) / max(float(np.abs(want).max()), least)


def _confidence(key: str, want: Feeds) -> Array:
    """Under Adam an update's size does not tell its gradient's; elements whose gradient is lost in rounding must not count."""
    first = want.get(f"new.first.{key}")
    if first is None or not np.abs(first).max() > 0:
        return np.ones((), np.float32)
    return np.abs(first) / np.abs(first).max()


def limits(bundle: Bundle, name: str) -> dict[str, float]:
    """What may differ; the updates of a deep model by as much as the export's own self-check had to allow."""
    check: Any = bundle.manifest.selfcheck or {}
    told = check.get(name, {}).get("updates_limit", UPDATES) if isinstance(check.get(name, {}), dict) else UPDATES
    usual = {"logits": LOGITS, "updates": max(UPDATES, min(float(told), 0.1)), "statistics": STATISTICS, "metrics": METRICS}
    return BYTES if bundle.operators(name) & _ON_BYTES else usual


def fault(found: Mapping[str, float], allowed: Mapping[str, float]) -> str:
    """What is too far apart, in words; "" if nothing is."""
    return "; ".join(f"its {what} differ by {value:.1e} of their size" for what, value in found.items() if not value <= allowed[what])


def times(sessions: Sequence[Any], given: Feeds) -> list[list[float]]:
    """Seconds of a number of runs of each, in turns, after one run that does not count."""
    bindings = [bound(session, given)[0] for session in sessions]
    taken: list[list[float]] = [[] for _ in sessions]
    rounds, done = LEAST, 0
    while done <= rounds:
        begun = time.perf_counter()
        for session, binding, list_ in zip(sessions, bindings, taken):
            start = time.perf_counter()
            session.run_with_iobinding(binding)
            list_.append(time.perf_counter() - start)
        if done == 0:
            passed = time.perf_counter() - begun
            rounds = max(LEAST, min(MOST, int(SECONDS * len(sessions) / max(passed, 1e-6))))
        done += 1
    return [list_[1:] for list_ in taken]


def ratio(one: Sequence[float], other: Sequence[float]) -> float:
    """The median of what `one` took against `other`, run by run."""
    return statistics.median(a / b for a, b in zip(one, other))
