"""Frames through the graphs of a role: batch by batch, and within a step in pieces run by run, so that others get their turns between."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeadapt.bundle import Form, Manifest
from edgeadapt.bundle.roles import STEPS
from edgeadapt.errors import InputError
from edgeadapt.preprocess import batch_of, convert
from edgeadapt.runtime.engine import Outcome
from edgeadapt.runtime.pressure import Level
from edgeadapt.runtime.service import Service
from edgeadapt.runtime.state import Floats
from edgeadapt.runtime.turns import Turns
from edgeadapt.units import format_shape


@dataclass
class _Call:
    """Frames that are being served. position: how many are; ahead: up to where those of a step that is not taken are predicted."""

    role: str
    frames: NDArray[Any]
    labels: NDArray[Any] | None
    good: NDArray[np.intp] | None
    hyper: Mapping[str, float]
    commit: bool
    count: int
    logits: Floats | None = None
    position: int = 0
    ahead: int = 0

    def rows(self, size: int) -> Any:
        """Which frames are next."""
        end = self.position + size
        return slice(self.position, end) if self.good is None else self.good[self.position : end]


class Serving:
    """What several threads may do with one service.

    Args:
        manifest: of the bundle.
        service: its graphs.
        counters: those of an adapter, by name; all of frames and steps are counted there.

    Attributes:
        turn: the lock of one run.
        metrics: of the last step that came to its end.
    """

    def __init__(self, manifest: Manifest, service: Service, counters: dict[str, int]) -> None:
        self._manifest, self._service, self._counters = manifest, service, counters
        self.turn, self._step = Turns(), Turns()  # a step in pieces is many turns, and no other step may begin between them
        self._counting = threading.Lock()
        self.metrics: dict[str, float] = {}

    def seen(self, frames: int, bad: int) -> None:
        """Counts frames that were given, and those of them that hold NaN or infinite values."""
        with self._counting:
            self._counters["frames"] += frames
            self._counters["bad_frames"] += bad

    def __call__(self, x: NDArray[Any], role: str, hyper: Mapping[str, float], commit: bool, y: NDArray[Any] | None = None) -> Floats:
        """Runs frames through a role's graphs, batch by batch, in their order; see `Adapter`."""
        frames, single = batch_of(x, self._manifest.input)
        labels = None if y is None else self._labels(y, len(frames), single)
        good = _good(frames)
        call = _Call(role, frames, labels, good, hyper, commit, len(frames) if good is None else len(good))
        if good is not None:
            with self.turn():
                call.logits = np.full((len(frames), *self._service.live().output_shape()), np.nan, np.float32)
        if role != "source":
            self.seen(len(frames), len(frames) - call.count)
        while call.position < call.count:
            with self._step() if role in STEPS else nullcontext():
                self._next(call)
        if call.logits is None:
            raise InputError("there are no frames in the batch", "give at least one")
        return call.logits[0] if single else call.logits

    def _next(self, call: _Call) -> None:
        """Serves the next batch."""
        service = self._service
        with self.turn():
            service.look()
            if call.role in STEPS and call.ahead <= call.position and service.level >= Level.PAUSED:
                call.ahead = call.position + service.pass_over(call.role, call.count - call.position)
            passed = call.ahead - call.position
            form = service.pick("predict", passed) if passed > 0 else service.pick(call.role, call.count - call.position)
            if not form.micro:
                outcome = self._run(call, form.graphs[0], form.batch, call.hyper)
                if outcome is not None:
                    self._count(form.role, outcome, 0 if form.role == call.role or passed > 0 else form.batch)
                return
            mark = service.begin()
        self._pieces(call, form, mark)

    def _pieces(self, call: _Call, form: Form, mark: tuple[int, int]) -> None:
        """One step in pieces, each in a turn of its own. What is left of a step that is given up is predicted."""
        service, end = self._service, call.position + form.batch
        whole = self._manifest.graphs[f"{form.role}.b{form.batch}"]
        hyper = {**whole.defaults, **call.hyper}
        while call.position < end:
            with self.turn():
                service.look()
                given_up = "paused_steps" if service.level >= Level.PAUSED else "abandoned_steps" if service.mark != mark else ""
                if given_up:
                    self._counters[given_up] += 1
                    call.ahead = end
                    return
                if self._run(call, form.graphs[0], form.micro, hyper) is None or call.position < end:
                    continue
                outcome = service.run(form.graphs[1], hyper, call.commit)
                if outcome is None:
                    self._counters["paused_steps"] += 1
                    return
                self._count(form.role, outcome, 0)

    def _run(self, call: _Call, name: str, size: int, hyper: Mapping[str, float]) -> Outcome | None:
        """A run over the next frames; None, and nothing served, if memory was refused and the level went down for it."""
        rows = call.rows(size)
        convert(call.frames[rows], self._manifest.input, self._service.live().frames(size))
        if call.labels is not None and self._manifest.graphs[name].role.startswith("learn"):
            self._service.live().labels(name)[...] = call.labels[rows]
        outcome = self._service.run(name, hyper, call.commit)
        if outcome is None:
            return None
        if call.logits is None:
            call.logits = np.empty((len(call.frames), *outcome.logits.shape[1:]), np.float32)
        call.logits[rows] = outcome.logits
        call.position += size
        return outcome

    def _count(self, kind: str, outcome: Outcome, skipped: int) -> None:
        self._counters["rejected_steps"] += not outcome.finite
        self._counters["skipped_frames"] += skipped
        if kind in STEPS:
            self._counters["steps"] += outcome.finite
            self.metrics = outcome.metrics

    def _labels(self, y: NDArray[Any], count: int, single: bool) -> NDArray[Any]:
        """Labels [N,...], checked."""
        labels = np.asarray(y)
        labels = labels[None] if single else labels
        with self.turn():
            shape = (count, *self._service.live().label_shape())
        if labels.dtype.kind not in "iu" or labels.shape != shape:
            raise InputError(
                f"labels are whole numbers of shape {format_shape(shape)}, not {labels.dtype} of shape {format_shape(labels.shape)}",
                "give one class a frame" if len(shape) == 1 else "give one class a pixel of the logits",
            )
        classes = self._manifest.task.classes
        if int(labels.min()) < 0 or int(labels.max()) >= classes:
            raise InputError(
                f"labels are from 0 to {classes - 1}, but these go from {labels.min()} to {labels.max()}", "leave out frames without a class"
            )
        return labels


def _good(frames: NDArray[Any]) -> NDArray[np.intp] | None:
    """The indices of frames that are finite all over; None where all are."""
    if frames.dtype == np.uint8:
        return None
    finite = [bool(np.isfinite(frame).all()) for frame in frames]
    return None if all(finite) else np.flatnonzero(finite)
