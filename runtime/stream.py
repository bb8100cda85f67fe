"""Frames in, predictions out: whole windows of frames are adapted on, what is left is predicted, and a bad frame is passed over.

A frame is answered with its window, or at once, while it waits for the window to fill that will be adapted on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgeadapt.bundle import Manifest
from edgeadapt.devices.sources import Frame
from edgeadapt.errors import InputError, SourceError, UsageError
from edgeadapt.preprocess import convert, staged
from edgeadapt.runtime.adapter import Adapter
from edgeadapt.runtime.following import together
from edgeadapt.runtime.guard import Guard
from edgeadapt.runtime.state import Floats

if TYPE_CHECKING:
    from edgeadapt.runtime.beside import Beside

_BAD_IN_A_ROW = 256  # then frames that wait are answered, lest a broken camera make us hoard its complaints


@dataclass(frozen=True, eq=False)
class Prediction:
    """What became of one frame.

    Attributes:
        index: the frame's number in the stream, bad frames counted.
        frame: its name and truth; without its pixels.
        logits: float32 [C] or [C,H,W]; None for a bad frame, whose `frame.fault` says why.
        milliseconds: of its window, a frame: preparing, predicting and adapting. One frame at a time: of the frame itself, and of
            the step before it, which it may have had to wait for; not with a cap.
        adapted: whether the model was changed by the window that it was part of; one frame at a time: changed just before it was predicted. With a
            cap it is told of the first frame after the step was seen to have ended.
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


def check_schedule(adapt: bool, single: bool, every: int, alike: float | None, guarded: bool = False, cap: float | None = None) -> None:
    """See that what a stream is told of its windows can be; see `Stream`.

    Raises:
        UsageError: it cannot, or would change nothing.
    """
    if every < 1:
        raise UsageError(f"every = {every} is no number of windows", "give 1 to take a step on each window, 2 on every second, and so on")
    if guarded and not adapt:
        raise UsageError("a guard watches over adaptation, and nothing is adapted", "leave one of them out")
    if not adapt and (every > 1 or alike is not None):
        raise UsageError("every and alike say what is adapted on, and nothing is", "leave them out, or adapt")
    if cap is not None and not adapt:
        raise UsageError("a cap bounds what each frame waits for steps, and there are none", "leave it out, or adapt")
    if cap is not None and not single:
        raise UsageError("a cap bounds what each frame waits, and frames of a window wait for each other", "answer frames one at a time")
    if cap is not None and not cap > 0:
        raise UsageError(f"cap = {cap:g} is no time", "give milliseconds above 0")
    if alike is not None and (not single or not alike >= 0):
        reason = f"alike = {alike:g} is no difference" if single else "frames of a window are answered together, so none can be left out of it"
        raise UsageError(reason, "give a number of at least 0" if single else "answer frames one at a time, or leave alike out")


class Stream:
    """Serves a stream of frames with an adapter.

    Args:
        adapter: the adapter.
        adapt: adapt on whole windows; otherwise predict and leave the state alone.
        window: frames that are taken together; None takes what was found best when the bundle was made, else the largest batch that is loaded.
        single: answer every frame at once, by the state as it stands; it then waits in a window that is adapted on when it is full, before the next
            frame is taken. What is in a window that never fills is not adapted on.
        every: take a step on the first of every so many windows. Of the others predictions are made anew, and what predictions change follows: live
            statistics do, a memory that steps fill, as RoTTA's, does not.
        guard: decides for each window what of adaptation it gets, within what the other arguments allow; of the same adapter. What is left at the
            end is answered as a window without a step, filled up with frames that came before.
        alike: with `single`, a frame that differs from the last one in the window by no more than this joins no window: the mean absolute difference
            of what the model is given. 0 leaves out exact repetitions; None none.
        cap: with `single`, the most milliseconds that an answer may take. Windows are then adapted on beside the answers, which go on by the state
            as it was until that is done; see `runtime.beside` for those that are passed over. What comes out depends on how fast frames come. The
            adapter must have been opened with `answering`.

    Attributes:
        windows: those that were whole; steps: those that a step was to be taken on; repeated: frames that joined no window.
        late, passed: with a cap, answers that took longer, and windows that were passed over, for that or because one before was not done.
        resting: may be set: no steps are taken meanwhile; windows are predicted as those that `every` leaves out.
        working: may be set: makes what is entered while a window is worked on between two answers, with `single` and without a cap.

    Raises:
        UsageError: there is no graph for windows of that size, or the bundle adapts but was opened without; `every` is below 1; `alike` is below 0,
            or given without `single`; there is a guard of another adapter, or one and nothing is adapted; a cap is no time, or cannot be kept.
    """

    def __init__(
        self,
        adapter: Adapter,
        adapt: bool = True,
        window: int | None = None,
        *,
        single: bool = False,
        every: int = 1,
        alike: float | None = None,
        guard: Guard | None = None,
        cap: float | None = None,
    ) -> None:
        manifest = adapter.manifest
        check_schedule(adapt, single, every, alike, guard is not None, cap)
        if guard is not None and guard.adapter is not adapter:
            raise UsageError("the guard is another adapter's", "make one with Guard(adapter)")
        role = served_as(manifest, adapt, window)
        sizes = adapter.batches[role]
        if not sizes or (window is not None and window not in sizes):
            at = "" if window is None else f" at batch {window}"
            raise UsageError(f"this adapter was opened without {role}{at}", "name it when opening, or give a larger budget")
        found = manifest.searched.window if manifest.searched is not None and adapt else None
        self.window = window or (found if found in sizes else sizes[0])
        self._adapter, self._adapt = adapter, adapt
        self._follows = bool(manifest.graphs[f"predict.b{self.window}"].writes) if f"predict.b{self.window}" in manifest.graphs else False
        self._single, self._every, self._alike, self._guard = single, every, alike, guard
        if guard is not None:
            guard.ahead = single
        self.windows = self.steps = self.repeated = self.late = self.passed = 0
        self._last: Floats | None = None
        self._buffer = np.zeros((self.window, *manifest.input.shape), np.float32)
        self._cap, self.resting = cap, False
        self.working: Callable[[], AbstractContextManager[object]] = nullcontext
        self._beside: Beside | None = None
        if cap is not None:
            adapter.publish(**self._scalars())

    def run(self, frames: Iterable[Frame], first: int = 0) -> Generator[list[Prediction], None, None]:
        """Predictions in the frames' order, one list a window, or with `single` one list a frame.

        With a cap, whoever does not take them to the end closes this before the adapter, which waits for a step that goes on.

        Args:
            frames: may be endless. What they raise is raised here, after the frames that came before have been answered if it is a SourceError.
            first: index of the first of them, for a stream that goes on.

        Raises:
            SourceError: the source broke off.
            BudgetError, BundleError: as the adapter's.
        """
        if self._single:
            yield from self._singly(frames, first) if self._cap is None else self._capped(frames, first, self._cap)
            return
        waiting: list[tuple[int, Frame]] = []
        good, begin, spent, broken = 0, 0.0, 0.0, None
        source = enumerate(frames, first)
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

    def _singly(self, frames: Iterable[Frame], first: int) -> Iterator[list[Prediction]]:
        """One frame at a time; the window is adapted on between an answer and the next frame."""
        good, changed, waited = 0, False, 0.0
        for index, frame in enumerate(frames, first):
            begin = time.perf_counter() - waited
            waited = 0.0
            fault = frame.fault or self._take(frame.pixels, good)
            known = Frame(frame.id, None, frame.truth, fault)
            if fault:
                yield [Prediction(index, known, None, 1000 * (time.perf_counter() - begin), False)]
                continue
            logits = self._adapter.predict(self._buffer[good], update_statistics=False, **self._scalars())
            yield [Prediction(index, known, logits, 1000 * (time.perf_counter() - begin), changed)]
            changed = False
            if not self._adapt or self._repeats(good):
                continue
            good += 1
            if good == self.window:
                begin, good = time.perf_counter(), 0
                with self.working():
                    _, changed = self._step(self._buffer)
                waited = time.perf_counter() - begin

    def _capped(self, frames: Iterable[Frame], first: int, cap: float) -> Iterator[list[Prediction]]:
        """One frame at a time; windows are adapted on beside the answers."""
        from edgeadapt.runtime.beside import Beside  # brings in what no other stream needs

        buffers = (self._buffer, np.zeros_like(self._buffer))

        def work(which: int) -> bool:
            changed = self._step(buffers[which])[1]
            self._adapter.publish(**self._scalars())
            return changed

        beside, which, good, changed, ended = Beside(work), 0, 0, False, False
        self._beside, late, passed = beside, self.late, self.passed
        try:
            for index, frame in enumerate(frames, first):
                begin = time.perf_counter()
                changed |= beside.ended()
                fault = frame.fault or self._take(frame.pixels, good)
                logits = None if fault else self._adapter.answer(self._buffer[good])
                spent = 1000 * (time.perf_counter() - begin)
                beside.answered(spent > cap)
                self.late, self.passed = late + beside.late, passed + beside.passed
                yield [Prediction(index, Frame(frame.id, None, frame.truth, fault), logits, spent, changed and not fault)]
                if fault:
                    continue
                changed = False
                if self._repeats(good):
                    continue
                good += 1
                if good == self.window:
                    changed, good = beside.ended(), 0
                    which ^= beside.full(which)
                    self._buffer = buffers[which]
            ended = True
        finally:
            self.passed = passed + beside.passed
            beside.close(quietly=not ended)

    @property
    def busy(self) -> bool:
        """Whether a step goes on beside the answers, so that what else is asked of the adapter would wait for it."""
        return self._beside is not None and self._beside.going

    def _scalars(self) -> dict[str, float]:
        return {} if self._guard is None else self._guard.scalars

    def _repeats(self, place: int) -> bool:
        """Whether the frame at this place of the window is hardly another than the one before it."""
        if self._alike is None:
            return False
        taken = convert(self._buffer[place : place + 1], self._adapter.manifest.input)[0]
        if self._last is not None and float(np.abs(taken - self._last).mean()) <= self._alike:
            self.repeated += 1
            return True
        self._last = taken.copy()
        return False

    def _step(self, x: Floats) -> tuple[Floats, bool]:
        """Logits of a whole window, and whether the model was changed by it."""
        due = self.windows % self._every == 0 and not self.resting
        self.windows += 1
        self.steps += due
        if self._guard is not None:
            return self._guard(x, due)
        before = self._adapter.stats
        logits = self._adapter.adapt(x) if due else self._adapter.predict(x)
        after = self._adapter.stats
        if due and self._adapter.manifest.planned("adapt"):
            return logits, after["steps"] > before["steps"]
        return logits, self._follows and after["rejected_steps"] == before["rejected_steps"]

    def _take(self, pixels: NDArray[Any] | None, place: int) -> str:
        """Puts a frame into the window, or says what is wrong with it."""
        if pixels is None:
            return "has no pixels"
        spec = self._adapter.manifest.input
        try:
            if pixels.dtype == np.float32 and not np.isfinite(pixels).all():
                return "holds NaN or infinite values"
            made = staged(pixels, spec)
        except InputError as reason:
            return reason.message
        except (MemoryError, OverflowError, ValueError) as reason:  # whatever a library makes of a strange frame, the next one is served
            return f"cannot be prepared: {reason!r}"
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
        if good == self.window:
            return self._step(x)
        if self._guard is None:
            return self._adapter.predict(x), False
        if self.windows and together(self._adapter, "predict", self.window):
            x = self._buffer  # the rest of it are frames of before
        logits, changed = self._guard(x, False)
        return logits[:good], changed


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
