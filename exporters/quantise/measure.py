"""Measures what an export would do on its device: frames arrive under one shift after the other, are predicted, and are adapted on.

The graph is the one that the bundle would have, in its order, run by onnxruntime: what is measured is the arithmetic that is delivered.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeadapt.errors import InputError
from edgeadapt.exporters.compile import Compiled, named_refusals
from edgeadapt.exporters.data import Samples
from edgeadapt.exporters.execution import open_session
from edgeadapt.exporters.ir import Array
from edgeadapt.exporters.quantise.calibrate import shifted, shifts_of
from edgeadapt.exporters.quantise.choose import most_samples

SEVERITY = 5
"""Of a corruption: the strongest, where adapting has most to do, and where ranges that were looked at under a weaker one must hold."""
NOISE = 0.001
"""Errors that are no further apart than this are as good as equal, however sure the difference is: a tenth of a point."""
Errors = NDArray[np.float64]
"""(shifts + 1, samples): how wrong each prediction was, 0 or 1, or the share of wrong pixels; the last row is of clean samples."""


@dataclass(frozen=True)
class Stream:
    """What all candidates are measured on, in the same order.

    Attributes:
        shifts: names.
        frames: for each shift, and at last clean, the samples as the model takes them.
        truth: what is right, of each sample.
    """

    shifts: tuple[str, ...]
    frames: tuple[NDArray[np.float32], ...]
    truth: Array

    @staticmethod
    def of(data: Samples, held: Array, truth: Array, seed: int) -> Stream:
        """From held-out samples, in a random order: they may be sorted by class, and no stream to adapt to is.

        Args:
            data: source samples.
            held: indices of those that were held out.
            truth: what is right for them.

        Raises:
            InputError: none were held out.
        """
        check_held(held)
        order = np.random.default_rng(seed).permutation(len(held))[: most_samples(data)]
        rows, shifts = held[order], shifts_of(data)
        moved = (shifted(data, rows, index, seed, SEVERITY) for index in range(len(shifts)))
        return Stream(shifts, (*moved, data.tensor(rows)), truth[order])

    def counted(self, batches: Sequence[int]) -> int:
        """Samples that every candidate predicts in whole batches; all of them where there are too few for one."""
        count = len(self.truth)
        return min(count if batch > count else count // batch * batch for batch in batches)


def check_held(held: Array) -> None:
    """See that there is something to measure on.

    Args:
        held: indices of the samples that are held out.

    Raises:
        InputError: none are.
    """
    if not len(held):
        raise InputError("no sample is held out, and how well numbers do is measured on such", "give more samples, or a larger --holdout")


def errors_of(
    compiled: Compiled,
    stream: Stream,
    count: int,
    threads: int,
    told: Callable[[int, int], None],
    scalars: Mapping[str, float] | None = None,
) -> Errors:
    """How wrong a graph is on a stream: from its initial state through all shifts, then, from there again, on clean samples.

    Its state follows as on the device: what is not finite is not taken over.

    Args:
        compiled: a step, or a prediction where nothing is trained.
        count: samples of each shift that are counted. Batches that they do not fill are filled up with others.
        told: called with passes that are done, and their number.
        scalars: of the graph, other than by default.
    """
    program, batch = compiled.program, compiled.program.batch
    with named_refusals():
        session = open_session(compiled.model, compiled.graph.constants, threads)
    given = {entry.name: program.example[entry.name].numpy() for entry in session.get_inputs()}
    given |= {f"hyper.{name}": np.array(value, np.float32) for name, value in (scalars or {}).items() if f"hyper.{name}" in given}
    state, found = dict(given), []
    for index, frames in enumerate(stream.frames):
        told(index, len(stream.frames))
        if index == len(stream.shifts):
            state = dict(given)
        guesses = []
        for start in range(0, count, batch):
            x = np.ascontiguousarray(np.take(frames, np.arange(start, start + batch), axis=0, mode="wrap"))
            with named_refusals():
                made = dict(zip(compiled.graph.outputs, session.run(None, {**state, "x": x}), strict=True))
            guesses.append(made["logits"].argmax(1))
            if all(np.isfinite(value).all() for name, value in made.items() if name.startswith(("new.", "metric."))):
                state |= {name: made[f"new.{name.removeprefix('state.')}"] for name in state if f"new.{name.removeprefix('state.')}" in made}
        wrong = np.concatenate(guesses)[:count] != stream.truth[:count]
        found.append(wrong.reshape(count, -1).mean(1))
    told(len(stream.frames), len(stream.frames))
    return np.stack(found)


def as_good(errors: Sequence[Errors]) -> list[int]:
    """Those whose mean error over the shifts is the lowest, or no worse than what chance makes of it.

    That is: worse by no more than the standard error of the difference, sample by sample, or than `NOISE`.
    """
    each: list[Any] = [item[:-1].mean(0) for item in errors]
    best = each[min(range(len(each)), key=lambda index: each[index].mean())]
    return [index for index, item in enumerate(each) if (item - best).mean() <= max(NOISE, _standard_error(item - best))]


def _standard_error(values: Any) -> float:
    return float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else 0.0
