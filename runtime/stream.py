"""Frames in, predictions out: whole windows of frames are adapted on, what is left is predicted, and a bad frame is passed over."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeadapt.bundle import Manifest
from edgeadapt.devices.sources import Frame
from edgeadapt.errors import InputError, SourceError, UsageError
from edgeadapt.preprocess import prepare
from edgeadapt.runtime.adapter import Adapter
from edgeadapt.runtime.state import Floats

_BAD_IN_A_ROW = 256  # then frames that wait are answered, lest a broken camera make us hoard its complaints


@dataclass(frozen=True, eq=False)
class Prediction:
    """What became of one frame.

    Attributes:
        index: the frame's number in the stream, bad frames counted.
        frame: its name and truth; without its pixels.
        logits: float32 [C] or [C,H,W]; None for a bad frame, whose `frame.fault` says why.
        milliseconds: of its window, a frame: preparing, predicting and adapting.
        adapted: whether the model was changed by the window that it was part of.
    """

    index: int
    frame: Frame
    logits: Floats | None
    milliseconds: float
    adapted: bool


def served_as(manifest: Manifest, adapt: bool, window: int | None) -> str:
    """The role in which a stream is served: "adapt" if it is asked for and the bundle can, else "predict".

    Raises:
        UsageError: the bundle has no graph of that role for windows of `window` frames.
    """
    role = "adapt" if adapt and manifest.planned("adapt") else "predict"
    if window is not None and window not in manifest.planned(role):
        sizes = " or ".join(str(size) for size in reversed(manifest.planned(role)))
        raise UsageError(
            f"this bundle cannot {'adapt on' if adapt else 'predict'} {window} frames at a time",
            f"use --batch {sizes}, or export with another batch",
        )
    return role


class Stream:
    """Serves a stream of frames with an adapter.

    Args:
        adapter: the adapter.
        adapt: adapt on whole windows; otherwise predict and leave the state alone.
        window: frames that are taken together; None takes the largest batch that is loaded.

    Raises:
        UsageError: there is no graph for windows of that size, or the bundle adapts but was opened without.
    """

    def __init__(self, adapter: Adapter, adapt: bool = True, window: int | None = None) -> None:
        manifest = adapter.manifest
        role = served_as(manifest, adapt, window)
        sizes = adapter.batches[role]
        if not sizes or (window is not None and window not in sizes):
            at = "" if window is None else f" at batch {window}"
            raise UsageError(f"this adapter was opened without {role}{at}", "name it when opening, or give a larger budget")
        self.window = window or sizes[0]
        self._adapter, self._adapt = adapter, adapt
        self._follows = bool(manifest.graphs[f"predict.b{self.window}"].writes) if f"predict.b{self.window}" in manifest.graphs else False
        self._buffer = np.zeros((self.window, *manifest.input.shape), np.float32)

    def run(self, frames: Iterable[Frame]) -> Iterator[list[Prediction]]:
        """Predictions in the frames' order, one list a window.

        Args:
            frames: may be endless. What they raise is raised here, after the frames that came before have been answered if it is a SourceError.

        Raises:
            SourceError: the source broke off.
            BudgetError, BundleError: as the adapter's.
        """
        waiting: list[tuple[int, Frame]] = []
        good, begin, spent, broken = 0, 0.0, 0.0, None
        source = enumerate(frames)
        while True:
            try:
                index, frame = next(source)
            except StopIteration:
                break
            except SourceError as reason:
                broken = reason
                break
            begin = time.perf_counter()
            fault = frame.fault or self._take(frame.pixels, good)
            spent += time.perf_counter() - begin
            waiting.append((index, Frame(frame.id, None, frame.truth, fault)))
            good += not fault
            if good == self.window or len(waiting) - good >= _BAD_IN_A_ROW or not good:
                yield self._answer(waiting, good, spent)
                waiting, good, spent = [], 0, 0.0
        if waiting:
            yield self._answer(waiting, good, spent)
        if broken:
            raise broken

    def _take(self, pixels: NDArray[Any] | None, place: int) -> str:
        """Puts a frame into the window, or says what is wrong with it."""
        if pixels is None:
            return "has no pixels"
        spec = self._adapter.manifest.input
        try:
            if pixels.dtype == np.float32 and not np.isfinite(pixels).all():
                return "holds NaN or infinite values"
            made = prepare(pixels, spec)
        except InputError as reason:
            return reason.message
        if len(made) != 1:
            return f"is {len(made)} frames, not one"
        self._buffer[place] = made[0]
        return ""

    def _answer(self, waiting: list[tuple[int, Frame]], good: int, spent: float) -> list[Prediction]:
        begin = time.perf_counter()
        logits, adapted = self._logits(good)
        each = 1000 * (spent + time.perf_counter() - begin) / max(good, 1)
        rows = iter(logits)
        return [Prediction(index, frame, None if frame.fault else next(rows), each, adapted and not frame.fault) for index, frame in waiting]

    def _logits(self, good: int) -> tuple[Floats, bool]:
        x = self._buffer[:good]
        if not good:
            return x, False
        if not self._adapt:
            return self._adapter.predict(x, update_statistics=False), False
        if good < self.window:
            return self._adapter.predict(x), False
        before = self._adapter.stats
        logits = self._adapter.adapt(x)
        after = self._adapter.stats
        if self._adapter.manifest.planned("adapt"):
            return logits, after["steps"] > before["steps"]
        return logits, self._follows and after["rejected_steps"] == before["rejected_steps"]


@dataclass(frozen=True)
class Decision:
    """What logits say.

    Attributes:
        label: the likeliest class; for segmentation the one that covers most.
        confidence: its soft-max probability; for segmentation the mean over pixels of each pixel's highest.
        entropy: of the soft-max in nats; for segmentation the mean over pixels.
        shares: for segmentation the share of pixels of every class, float64 [C]; else the probabilities.
        classes: the class, int64 of shape () or [H,W].
    """

    label: int
    confidence: float
    entropy: float
    shares: NDArray[np.float64]
    classes: NDArray[np.int64]


def decide(logits: Floats) -> Decision:
    """The decision that logits [C] or [C,H,W] of one frame stand for."""
    shifted = logits.astype(np.float64) - logits.max(0)
    exponential = np.exp(shifted)
    total = exponential.sum(0)
    probability = exponential / total
    entropy = np.log(total) - (probability * shifted).sum(0)
    classes = np.asarray(logits.argmax(0))
    shares = probability if logits.ndim == 1 else np.bincount(classes.ravel(), minlength=len(logits)) / classes.size
    return Decision(int(shares.argmax()), float(probability.max(0).mean()), max(0.0, float(entropy.mean())), shares, classes)
