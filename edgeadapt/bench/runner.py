"""Drives one row of the bench, a model that serves frames, over one stream, and keeps what came of every frame."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from edgeadapt.bench.frames import Stream
from edgeadapt.bench.record import COLUMNS
from edgeadapt.errors import EdgeAdaptError
from edgeadapt.progress import Progress, quiet

AHEAD = 32  # frames that are made at once: a corruption of several costs less than of each


@dataclass(frozen=True, eq=False)
class Answer:
    """What a row says to one frame.

    Attributes:
        logits: float32 [C], [C,H,W] or [C,L]; None where it could not use the frame.
        milliseconds: of its window, a frame.
        adapted: whether the model was changed by the window that it was part of.
    """

    logits: NDArray[np.float32] | None
    milliseconds: float
    adapted: bool


class Row(Protocol):
    """A model that serves frames, in this process or in another."""

    def serve(self, frames: Iterator[NDArray[Any]]) -> Iterator[Answer]:
        """One answer a frame, in their order.

        Args:
            frames: one at a time, without a batch axis; taken only when they are wanted, so that making them costs the row no time.
        """

    def facts(self) -> Mapping[str, Any]:
        """After serving, as JSON values: "peak_bytes" of the process that served or None, and whatever else is worth keeping."""


def run(
    row: Row,
    stream: Stream,
    classes: int,
    energy: Callable[[], float | None] | None = None,
    progress: Progress = quiet,
    stage: str = "run",
) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """Serves a stream to its end.

    Args:
        row: who serves; it begins at its initial state.
        stream: the frames.
        classes: of the task.
        energy: the joules that the machine has taken since some moment, or None where it does not tell; called often.
        progress: told the frames that are done, with the error so far.
        stage: what progress is told.

    Returns:
        figures (frames, nonfinite, adapted_frames, ms_p50, ms_p95, joules_frame, which may be None, seconds, and the row's own) and the columns of
        `record.COLUMNS`. Joules and seconds are without those that making the frames took.

    Raises:
        EdgeAdaptError: the row gave fewer or more answers than it got frames; or as the row raises.
    """
    count, meter = len(stream), _Meter(energy)
    columns = {name: np.zeros(count, kind) for name, kind in COLUMNS.items()}
    columns |= {name: getattr(stream, name).astype(COLUMNS[name]) for name in ("index", "domain", "severity", "round", "scored")}
    done, off, known, nonfinite = 0, 0.0, 0, 0
    for answer in row.serve(_frames(stream, meter)):
        if done == count:
            raise EdgeAdaptError(f"the model gave more answers than the {count} frames it got")
        wrong, confidence = judged(answer.logits, stream.truth(done, 1)[0], classes)
        nonfinite += not np.isfinite(confidence)
        columns["wrong"][done], columns["confidence"][done] = wrong, confidence
        columns["milliseconds"][done], columns["adapted"][done] = answer.milliseconds, answer.adapted
        if stream.scored[done] and np.isfinite(wrong):
            off, known = off + wrong, known + 1
        done += 1
        progress(stage, done, count, f"error {100 * off / known:.1f} %" if known else "")
    if done < count:
        raise EdgeAdaptError(f"the model gave {done} answers to {count} frames")
    middle, slow = np.quantile(columns["milliseconds"], [0.5, 0.95]).tolist()
    joules, seconds = meter.total()
    figures = {
        "frames": count,
        "scored_frames": known,
        "nonfinite": nonfinite,
        "adapted_frames": int(columns["adapted"].sum()),
        "ms_p50": middle,
        "ms_p95": slow,
        "joules_frame": None if joules is None else joules / count,
        "seconds": seconds,
        **row.facts(),
    }
    return figures, columns


def judged(logits: NDArray[np.float32] | None, truth: NDArray[np.int64], classes: int) -> tuple[float, float]:
    """What logits say against the truth of one frame.

    Args:
        logits: float32 [C], [C,H,W] or [C,L]; None for no prediction.
        truth: int64 [], [H,W] or [L]; numbers outside 0..classes-1 are not counted.
        classes: C.

    Returns:
        the share that is wrong, NaN where there is no truth to compare with, and the mean probability of the chosen classes, NaN where any logit is
        not finite. What is not finite is wrong: the whole frame, or those pixels. Pixels without truth are left out of both, if others have one.

    Raises:
        EdgeAdaptError: the truth has another shape than the predictions.
    """
    counted = (truth >= 0) & (truth < classes)
    if logits is None:
        return (1.0 if counted.any() else float("nan")), float("nan")
    if logits.shape[1:] != truth.shape:
        raise EdgeAdaptError(
            f"the model decides {logits.shape[1:] or 'once'} a frame, and the labels are of shape {truth.shape or 'one a frame'}",
            "give one label a frame for classification, one a pixel for segmentation",
        )
    known = bool(counted.any())
    if known:
        logits, truth = logits[:, counted], truth[counted]
    finite = np.isfinite(logits).all(0)
    wrong = ~finite | (np.where(finite, logits, 0).argmax(0) != truth)
    share = float(wrong.mean()) if known else float("nan")
    if not finite.all():
        return share, float("nan")
    wide = logits.astype(np.float64)
    return share, float((1 / np.exp(wide - wide.max(0)).sum(0)).mean())


class _Meter:
    """Joules and seconds from the first frame's hand-over to the last answer, without what making frames took."""

    def __init__(self, energy: Callable[[], float | None] | None) -> None:
        self._energy = energy
        self._begin: tuple[float | None, float] | None = None
        self._joules, self._seconds, self._known = 0.0, 0.0, energy is not None

    def _now(self) -> tuple[float | None, float]:
        return (self._energy() if self._energy is not None else None), time.perf_counter()

    def pause(self) -> None:
        """From now on frames are being made."""
        if self._begin is None:
            return
        (was, began), (joules, now) = self._begin, self._now()
        self._known = self._known and was is not None and joules is not None
        self._joules += (joules or 0.0) - (was or 0.0)
        self._seconds += now - began
        self._begin = None

    def resume(self) -> None:
        """From now on the row works."""
        self._begin = self._now()

    def total(self) -> tuple[float | None, float]:
        """Joules, None where they are not known, and seconds."""
        self.pause()
        return (self._joules if self._known else None), self._seconds


def _frames(stream: Stream, meter: _Meter) -> Iterator[NDArray[Any]]:
    for first in range(0, len(stream), AHEAD):
        meter.pause()
        frames = stream.pixels(first, AHEAD)
        meter.resume()
        yield from frames
