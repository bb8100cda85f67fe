"""The adapter: a bundle that predicts, follows its stream, and can be stopped and resumed."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeadapt.bundle import Bundle, Manifest
from edgeadapt.errors import InputError, UsageError
from edgeadapt.preprocess import batch_of, convert
from edgeadapt.runtime import checkpoint, memory
from edgeadapt.runtime.engine import Engine, Outcome
from edgeadapt.runtime.hyper import Hyper
from edgeadapt.runtime.state import FlatState, Floats
from edgeadapt.units import format_shape, parse_bytes

_COUNTERS = ("frames", "steps", "skipped_frames", "rejected_steps", "bad_frames")


class Adapter:
    """Made by `Adapter.open`. Safe to use from several threads: runs never overlap, and a call that waits gets its turn between two runs.

    Frames are uint8 [N,H,W,C], preprocessed as the manifest says, or float32 [N,*input.shape]; one frame may come without N, and its logits
    then come without N. Frames with NaN or infinite values never reach a graph: their logits are NaN.
    """

    def __init__(self, bundle: Bundle, budget: int | None, threads: int) -> None:
        manifest = bundle.manifest
        self._bundle, self._budget = bundle, budget
        self._state = FlatState(manifest.state, manifest.graphs, bundle.initial_state())
        self._planned = memory.planned(bundle, self._state.nbytes)
        if budget is not None:
            memory.check(budget, memory.resident(), self._planned)
            memory.CLAIMS.take(self, budget)
        try:
            self._engine: Engine | None = Engine(bundle, self._state, threads)
            self._engine.prepare(memory.FIRST_GRAPH)
            if budget is not None:  # again, as only now the libraries' own pages are in
                memory.check(budget, memory.resident(), self._planned)
        except BaseException:
            memory.CLAIMS.release(self)
            raise
        self._hyper = Hyper(manifest.hyper)
        self._counters = dict.fromkeys(_COUNTERS, 0)
        self._metrics: dict[str, float] = {}
        self._slots = checkpoint.Slots(bundle.path.with_name(bundle.path.name + ".state"), manifest)
        self._gate, self._lock, self._saving = threading.Lock(), threading.Lock(), threading.Lock()
        self._batches = {role: manifest.planned(role) for role in ("source", "predict", "adapt", "learn")}

    @classmethod
    def open(cls, path: str | os.PathLike[str], budget: str | int | None = None, threads: int = 1, verify: bool = True) -> Adapter:
        """Opens a bundle at its initial state; `load` continues from a saved one.

        Args:
            path: the bundle.
            budget: the most bytes the whole process may hold resident, as a number or like "128MiB". None: no bound. All adapters of a process
                that have one have the same.
            threads: that one operator may use.
            verify: check every byte of the bundle first.

        Raises:
            BundleError: the bundle is missing, damaged, or made by a newer edgeadapt.
            BudgetError: it does not fit, or another adapter of this process has another budget.
            UsageError: `budget` is no size, or `threads` is below 1.
        """
        if type(threads) is not int or threads < 1:
            raise UsageError(f"threads = {threads!r} is not a number of threads", "give 1 or more")
        return cls(Bundle.open(path, verify), None if budget is None else parse_bytes(budget), threads)

    def predict(self, x: NDArray[Any], update_statistics: bool = True) -> Floats:
        """Logits of the adapted network.

        The frames are split over the planned batches, the largest that fits first. Normalisation statistics follow them, as they do in
        `adapt`; parameters stay.

        Args:
            x: frames.
            update_statistics: False leaves the state exactly as it is, and normalises with the statistics as they stand.

        Returns:
            float32 [N,C], or [N,C,...] for segmentation, a new array.

        Raises:
            InputError: the frames have another dtype or shape than the model takes, or there are none.
        """
        changes = {} if update_statistics else {"mix": 0.0}
        return self._serve(x, "predict", {**self._hyper.chosen, **changes}, update_statistics)

    def adapt(self, x: NDArray[Any], **hyper: float) -> Floats:
        """Adapts to unlabelled frames and gives the logits of each step's own forward pass, before its update.

        The frames are split over the batches that have an adapt graph, the largest that fits first. A remainder is predicted one by one and
        not adapted on (counted as skipped_frames). A step that does not turn out finite is dropped (rejected_steps). A method whose only
        adaptation is its statistics, or that has none, predicts.

        Args:
            x: frames.
            hyper: scalars for this call, such as rate=0.01.

        Raises:
            InputError: as `predict`.
            UsageError: an unknown scalar, or one out of range.
        """
        return self._serve(x, "adapt" if self._batches["adapt"] else "predict", self._hyper.with_(hyper), True)

    def learn(self, x: NDArray[Any], y: NDArray[Any], **hyper: float) -> Floats:
        """Adapts to labelled frames, split as in `adapt`; gives the logits before each update.

        Args:
            x: frames.
            y: whole numbers below the number of classes: [N], or [N,H,W] for segmentation ([N,L] of sequences); without N for one frame.
            hyper: scalars for this call.

        Raises:
            InputError: as `predict`; labels of another shape, dtype or range.
            UsageError: the bundle has no learn graph, or as `adapt`.
        """
        if not self._batches["learn"]:
            raise UsageError(
                f"this bundle ({self.manifest.method.name}) cannot learn from labels", "export with a method and a batch that have a learn graph"
            )
        return self._serve(x, "learn", self._hyper.with_(hyper), True, y)

    def source(self, x: NDArray[Any]) -> Floats:
        """Logits of the frozen model with its source statistics, whatever was adapted since; nothing changes.

        Raises:
            InputError: as `predict`.
        """
        return self._serve(x, "source", {"mix": 0.0}, False)

    def save(self, path: str | os.PathLike[str] | None = None) -> Path:
        """Saves state, counters and scalars; they are on disk when this returns.

        Args:
            path: a file to make or replace. None: one of two slots in the folder BUNDLE.state beside the bundle, in turn, so that a write
                that is cut short never loses the save before it.

        Returns:
            the file written.

        Raises:
            StateError: it cannot be written.
        """
        with self._saving:
            with self._turn():
                snapshot = checkpoint.Snapshot(self._state.current(), dict(self._counters), self._hyper.chosen)
            if path is None:
                return self._slots.save(snapshot)
            checkpoint.write(Path(path), snapshot, self.manifest)
            return Path(path)

    def load(self, path: str | os.PathLike[str] | None = None) -> None:
        """Continues from a saved state: what follows is the same, bit for bit, as if the process had not stopped.

        Args:
            path: a file that `save` wrote, or a folder with two slots. None: the newest sound slot beside the bundle.

        Raises:
            StateError: there is none, it is damaged, or it belongs to another bundle. The adapter is as it was.
        """
        if path is None:
            snapshot = self._slots.newest()
        elif Path(path).is_dir():
            snapshot = checkpoint.Slots(Path(path), self.manifest).newest()
        else:
            snapshot = checkpoint.read(Path(path), self.manifest)
        with self._turn():
            self._state.replace(snapshot.tensors)
            self._hyper.restore(snapshot.hyper)
            self._counters.update({name: snapshot.counters.get(name, 0) for name in _COUNTERS})

    def reset(self) -> None:
        """Goes back to the bundle's initial state. Counters and scalars stay, and so do saved states."""
        initial = self._bundle.initial_state()
        with self._turn():
            self._state.replace(initial)

    def close(self) -> None:
        """Lets go of the sessions and of the process's budget. Predicting afterwards is an error; a second close is not."""
        with self._turn():
            self._engine = None
        memory.CLAIMS.release(self)

    def __enter__(self) -> Adapter:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    @property
    def manifest(self) -> Manifest:
        """What the bundle says about itself."""
        return self._bundle.manifest

    @property
    def bundle(self) -> Bundle:
        """The bundle."""
        return self._bundle

    @property
    def state(self) -> dict[str, Floats]:
        """Copies of the state tensors. Assigning such a dictionary puts it in place, all of it or, with a StateError, nothing."""
        with self._turn():
            return self._state.current()

    @state.setter
    def state(self, values: Mapping[str, Floats]) -> None:
        with self._turn():
            self._state.replace(values)

    @property
    def hyper(self) -> Hyper:
        """The scalars' present values, to read and to set: adapter.hyper["rate"] = 0.01."""
        return self._hyper

    @hyper.setter
    def hyper(self, values: Mapping[str, float]) -> None:
        self._hyper.restore(self._hyper.with_(values))

    @property
    def stats(self) -> dict[str, int]:
        """Counters since opening, or since the loaded state's own beginning.

        frames: given to predict, adapt and learn. steps: updates of parameters that were kept. skipped_frames: the remainders of adapt and learn.
        rejected_steps: runs whose state or loss was not finite and was dropped. bad_frames: frames with NaN or infinite values.
        """
        return dict(self._counters)

    @property
    def metrics(self) -> dict[str, float]:
        """The scalars of the last adapt or learn step, such as its loss; empty before the first."""
        return dict(self._metrics)

    @property
    def memory(self) -> dict[str, int | None]:
        """Bytes: resident now, the process's peak so far, the budget, what was planned at opening, and the plan's lines."""
        plan: dict[str, int | None] = {**self._planned}
        return {"resident": memory.resident(), "peak": memory.peak(), "budget": self._budget, "planned": sum(self._planned.values()), **plan}

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """The lock of one run. Whoever waits holds the gate, so a thread that runs many batches cannot take the next turn over its head."""
        with self._gate:
            self._lock.acquire()
        try:
            yield
        finally:
            self._lock.release()

    def _plan(self, role: str, count: int) -> Iterator[tuple[str, str, int]]:
        """(graph, its role, its batch) for that many frames: the largest batch that fits, and what no batch fits, predicted one by one."""
        for batch in self._batches[role]:
            while count >= batch:
                yield f"{role}.b{batch}", role, batch
                count -= batch
        yield from (("predict.b1", "predict", 1) for _ in range(count))

    def _serve(self, x: NDArray[Any], role: str, hyper: Mapping[str, float], commit: bool, y: NDArray[Any] | None = None) -> Floats:
        """Runs frames through a role's graphs, batch by batch, in their order."""
        frames, single = batch_of(x, self.manifest.input)
        labels = None if y is None else self._labels(y, len(frames), single)
        good = _good(frames)
        logits: Floats | None = None
        if good is not None:
            with self._turn():
                logits = np.full((len(frames), *self._live().output_shape()), np.nan, np.float32)
        if role != "source":
            self._counters["frames"] += len(frames)
            self._counters["bad_frames"] += 0 if good is None else len(frames) - len(good)
        position = 0
        for name, kind, batch in self._plan(role, len(frames) if good is None else len(good)):
            rows: Any = slice(position, position + batch) if good is None else good[position : position + batch]
            position += batch
            with self._turn():
                engine = self._live()
                convert(frames[rows], self.manifest.input, engine.frames(batch))
                if kind == "learn" and labels is not None:
                    engine.labels(name)[...] = labels[rows]
                outcome = engine.run(name, hyper, commit)
                if logits is None:
                    logits = np.empty((len(frames), *outcome.logits.shape[1:]), np.float32)
                logits[rows] = outcome.logits
                self._count(role, kind, batch, outcome)
        if logits is None:
            raise InputError("there are no frames in the batch", "give at least one")
        return logits[0] if single else logits

    def _count(self, role: str, kind: str, batch: int, outcome: Outcome) -> None:
        self._counters["rejected_steps"] += not outcome.finite
        if kind in ("adapt", "learn"):
            self._counters["steps"] += outcome.finite
            self._metrics = outcome.metrics
        elif kind != role:
            self._counters["skipped_frames"] += batch

    def _live(self) -> Engine:
        if self._engine is None:
            raise UsageError("this adapter is closed", "open the bundle again")
        return self._engine

    def _labels(self, y: NDArray[Any], count: int, single: bool) -> NDArray[Any]:
        """Labels [N,...], checked."""
        labels = np.asarray(y)
        labels = labels[None] if single else labels
        with self._turn():
            shape = (count, *self._live().labels(f"learn.b{self._batches['learn'][0]}").shape[1:])
        if labels.dtype.kind not in "iu" or labels.shape != shape:
            raise InputError(
                f"labels are whole numbers of shape {format_shape(shape)}, not {labels.dtype} of shape {format_shape(labels.shape)}",
                "give one class a frame" if len(shape) == 1 else "give one class a pixel of the logits",
            )
        classes = self.manifest.task.classes
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
