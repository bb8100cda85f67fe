"""Finds defaults for the scalars of one model: by what it predicts of held-out source samples under shifts, as the device would run it.

One scalar after the other is tried at a few values, and the next one with what was best so far. What is usual stays unless something else is better
beyond chance, and no worse on clean samples. Frames come shuffled, as a guard would take them: with `few` at 0.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from edgeadapt.bundle.searched import FACTORS, Searched, Try
from edgeadapt.exporters.compile import Compiled
from edgeadapt.exporters.quantise.measure import NOISE, Errors, Stream, errors_of

TRIED: Mapping[str, tuple[float, ...]] = {"own": (0.2, 0.6), "trust": (0.4, 1.0), "rate": (0.25, 4.0), "mix": (0.5, 2.0)}
"""Values of each scalar besides the usual one; of `rate` and `mix` what that is multiplied by."""
SAMPLES = 192
"""Of each shift, at most."""
SURE = 2.0
"""Standard errors that something must be better by."""


def search(
    compiled: Compiled, stream: Stream, labelled: bool, threads: int, told: Callable[[int, int, str], None], fixed: Collection[str] = ()
) -> Searched | None:
    """What was tried, and what of it is best. None where the graph has none of these scalars.

    Args:
        compiled: a step, or a prediction where nothing is trained.
        stream: held-out samples under shifts.
        labelled: whether its truth are labels.
        threads: of onnxruntime.
        told: called with trials that are done, their number, and what is tried.
        fixed: scalars that the user set.
    """
    program = compiled.program
    usual = {name: float(program.example[f"hyper.{name}"]) for name in compiled.hyper}
    free = {name: values for name, values in TRIED.items() if name in usual and name not in fixed}
    if "mix" in free and usual["mix"] >= 1.0:
        free["mix"] = tuple(value for value in free["mix"] if value < 1.0)
    if not free:
        return None
    count = min(stream.counted([program.batch]), max(program.batch, SAMPLES // program.batch * program.batch))
    total, tried = 1 + sum(len(values) for values in free.values()), dict[tuple[tuple[str, float], ...], Errors]()

    def measured(scalars: Mapping[str, float]) -> Errors:
        told(len(tried), total, Try(dict(scalars), (0.0,), 0.0).words)
        found = errors_of(compiled, stream, count, threads, lambda *_: None, dict(_set(usual, scalars)))
        tried[tuple(scalars.items())] = found
        return found

    first = best = measured({})
    chosen: dict[str, float] = {}
    for name, values in free.items():
        here, found = chosen, best
        for value in values:
            errors = measured({**chosen, name: value})
            if _better(errors, found, first):
                here, found = {**chosen, name: value}, errors
        chosen, best = here, found
    told(total, total, "")
    rows = tuple(
        Try(dict(key), tuple(float(share) for share in errors[:-1].mean(1)), float(errors[-1].mean()), dict(key) == chosen)
        for key, errors in tried.items()
    )
    return Searched(program.batch, labelled, count, stream.shifts, rows)


def _set(usual: Mapping[str, float], scalars: Mapping[str, float]) -> Iterator[tuple[str, float]]:
    """Scalars of the graph, for a trial."""
    for name, value in scalars.items():
        yield name, min(value * usual[name], 1.0 if name == "mix" else np.inf) if name in FACTORS else value
    if "few" in usual:
        yield "few", 0.0


def _better(errors: Errors, best: Errors, first: Errors) -> bool:
    """Whether predictions are wrong less often under shifts, beyond chance, and on clean samples no more often than with what is usual."""
    gain = (best[:-1] - errors[:-1]).mean(0)
    clean = (errors[-1] - first[-1]).mean()
    return bool(gain.mean() > max(NOISE, SURE * _deviation(gain)) and clean <= NOISE)


def _deviation(values: NDArray[np.float64]) -> float:
    return float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else np.inf
