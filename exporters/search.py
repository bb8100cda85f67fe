"""Finds defaults for the scalars of one model: by what it predicts of held-out source samples under shifts, as the device would run it.

One scalar after the other is tried at a few values, and the next one with what was best so far; then the smaller windows that the bundle will have.
What is usual stays unless something else is better by two standard errors, and on clean samples no worse by more than one.

Frames come as on a device that a guard watches: one shift after the other, and all of them mixed, with `few` at 0, as windows are of all
classes; and, where statistics are anchored, once hardly following them and without steps, as where classes come in runs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from edgeadapt.bundle.searched import FACTORS, Searched, Try
from edgeadapt.exporters.compile import Compiled
from edgeadapt.exporters.quantise.measure import NOISE, Errors, Stream, errors_of

TRIED: Mapping[str, tuple[float, ...]] = {"own": (0.2, 0.6), "trust": (0.4, 1.0), "rate": (0.25, 4.0), "mix": (0.5, 2.0)}
"""Values of each scalar besides the usual one; of `rate` and `mix` what that is multiplied by."""
FOLLOWED, STILL = {"few": 0.0}, {"few": 10.0, "rate": 0.0}
"""Scalars while statistics follow windows of all classes, and while they hardly follow."""
SAMPLES = 256
"""Of each shift, at most; a batch, where that is more."""
SURE = 2.0
"""Standard errors that something must be better by."""


def search(
    graphs: Sequence[Callable[[], Compiled]],
    stream: Stream,
    labelled: bool,
    threads: int,
    told: Callable[[int, int, str], None],
    fixed: Collection[str] = (),
) -> Searched | None:
    """What was tried, and what of it is best. None where the graph has none of these scalars.

    Args:
        graphs: a step, or a prediction where nothing is trained: at the largest batch first, then at others that windows may have.
        stream: held-out samples under shifts.
        labelled: whether its truth are labels.
        threads: of onnxruntime.
        told: called with trials that are done, their number, and what is tried.
        fixed: scalars that the user set.
    """
    compiled = graphs[0]()
    program = compiled.program
    usual = _usual(compiled)
    free = {name: values for name, values in TRIED.items() if name in usual and name not in fixed}
    if "mix" in free and usual["mix"] >= 1.0:
        free["mix"] = tuple(value for value in free["mix"] if value < 1.0)
    if not free:
        return None
    count = min(stream.counted([program.batch]), max(program.batch, SAMPLES // program.batch * program.batch))
    total, tried = len(graphs) + sum(len(values) for values in free.values()), list[tuple[dict[str, float], int, Errors]]()
    shifts = Stream(stream.shifts, stream.frames[:-1], stream.truth)
    ways = {"one by one": (stream, FOLLOWED), "mixed": (_mixed(shifts), FOLLOWED)}
    if "few" in usual:
        ways["hardly following"] = (shifts, STILL)
    known: dict[tuple[int, str, tuple[tuple[str, float], ...]], Errors] = {}

    def measured(scalars: Mapping[str, float], compiled: Compiled = compiled) -> Errors:
        batch, found = compiled.program.batch, []
        told(len(tried), total, Try(dict(scalars), batch, (0.0,), 0.0).words(program.batch))
        usual = _usual(compiled)
        for name, (way, always) in ways.items():
            given = {**dict(_set(usual, scalars)), **always}
            key = batch, name, tuple(sorted(given.items()))
            if key not in known:
                known[key] = errors_of(compiled, way, count, threads, lambda *_: None, given)
            found.append(known[key])
        shifted = (one[: len(stream.shifts)].mean(0) for one in found)
        errors = np.stack([*shifted, found[0][-1]])
        tried.append((dict(scalars), batch, errors))
        return errors

    first = best = measured({})
    chosen: dict[str, float] = {}
    for name, values in free.items():
        here, found = chosen, best
        for value in values:
            errors = measured({**chosen, name: value})
            if _better(errors, found, first):
                here, found = {**chosen, name: value}, errors
        chosen, best = here, found
    window = program.batch
    for make in graphs[1:]:
        other = make()
        errors = measured(chosen, other)
        if _better(errors, best, first):
            window, best = other.program.batch, errors
    told(total, total, "")
    rows = tuple(
        Try(scalars, batch, tuple(float(share) for share in errors[:-1].mean(1)), float(errors[-1].mean()), (scalars, batch) == (chosen, window))
        for scalars, batch, errors in tried
    )
    return Searched(labelled, count, stream.shifts, tuple(ways), rows)


def _usual(compiled: Compiled) -> dict[str, float]:
    """Values of a graph's scalars at its batch."""
    return {name: float(compiled.program.example[f"hyper.{name}"]) for name in compiled.hyper}


def _mixed(stream: Stream) -> Stream:
    """The same shifted frames, with every shift in each window: sample i comes under one shift after the other, each time beside the others."""
    moved = stream.frames
    turns = np.arange(len(stream.truth))[:, None] + np.arange(len(moved))
    frames = (np.stack([moved[turn % len(moved)][place] for place, turn in enumerate(turns[:, index])]) for index in range(len(moved)))
    return Stream(stream.shifts, tuple(frames), stream.truth)


def _set(usual: Mapping[str, float], scalars: Mapping[str, float]) -> Iterator[tuple[str, float]]:
    """Scalars of the graph, for a trial."""
    for name, value in scalars.items():
        yield name, min(value * usual[name], 1.0 if name == "mix" else np.inf) if name in FACTORS else value


def _better(errors: Errors, best: Errors, first: Errors) -> bool:
    """Whether predictions are wrong less often under shifts, and on clean samples no more often than with what is usual, as far as can be told.

    Args:
        errors, best, first: of each stream, at last the clean one, and of each sample.
    """
    gain, cost = (best[:-1] - errors[:-1]).mean(0), errors[-1] - first[-1]
    return bool(gain.mean() > max(NOISE, SURE * _deviation(gain)) and cost.mean() <= max(NOISE, _deviation(cost)))


def _deviation(values: NDArray[np.float64]) -> float:
    return float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else np.inf
