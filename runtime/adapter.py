"""The adapter: a bundle that predicts, follows its stream, and can be stopped and resumed."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

from numpy.typing import NDArray

from edgeadapt.bundle import Bundle, Manifest
from edgeadapt.errors import BudgetError, UsageError
from edgeadapt.memory.rules import MOST_THREADS
from edgeadapt.progress import Progress
from edgeadapt.runtime import checkpoint, loading, memory, providers
from edgeadapt.runtime import choice as choices
from edgeadapt.runtime.answers import Answers
from edgeadapt.runtime.choice import Item, wanted
from edgeadapt.runtime.claims import CLAIMS, Claim
from edgeadapt.runtime.hyper import Hyper
from edgeadapt.runtime.prepared import Prepared, completed, find
from edgeadapt.runtime.pressure import Change, Marks, Pressure, Signs
from edgeadapt.runtime.service import Service
from edgeadapt.runtime.serving import Serving
from edgeadapt.runtime.state import Array, Floats
from edgeadapt.units import parse_bytes

LOG = logging.getLogger("edgeadapt")

_COUNTERS = ("frames", "steps", "skipped_frames", "rejected_steps", "bad_frames", "paused_steps", "pressure_events", "abandoned_steps")

_OPENING = threading.Lock()  # one after the other: each looks at what is held, and promises more


class Adapter:
    """Made by `Adapter.open`. Safe to use from several threads: runs never overlap, and a call that waits gets its turn between two runs.

    Frames are uint8 [N,H,W,C], preprocessed as the manifest says, or float32 [N,*input.shape]; one frame may come without N, and its logits
    then come without N. Frames with NaN or infinite values never reach a graph: their logits are NaN.

    A budget may have a step taken in pieces, run by run. Predictions of other threads are served between its runs, steps of theirs wait for its
    end, and `load`, `reset` and an assignment to `state` end it: what is left of its frames is predicted.
    """

    def __init__(self, bundle: Bundle, loaded: loading.Loaded, claim: Claim | None, threads: int, pressure: Pressure | None = None) -> None:
        manifest = bundle.manifest
        self._bundle, self._claim = bundle, claim
        self._counters = dict.fromkeys(_COUNTERS, 0)
        self._service = Service(bundle, loaded, threads, pressure, self._counters)
        self._state = loaded.state
        self._hyper = Hyper(manifest.hyper)
        self._slots = checkpoint.Slots(bundle.path.with_name(bundle.path.name + ".state"), manifest)
        self._serving, self._saving = Serving(manifest, self._service, self._counters), threading.Lock()

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        budget: str | int | None = None,
        threads: int = 1,
        verify: bool = True,
        *,
        roles: Collection[str] | str | None = None,
        batches: Collection[int] | None = None,
        strict: bool = False,
        reserve: str | int | None = None,
        prepared: bool = True,
        prepare: Progress | None = None,
        provider: str = "cpu",
        slack: str | int = 0,
        answering: bool = False,
    ) -> Adapter:
        """Opens a bundle at its initial state; `load` continues from a saved one.

        With a budget everything is loaded now, into memory of fixed size, and nothing grows later. What does not fit is left out, `learn` first, then
        `source`, then batches; a line in the log and `memory["missing"]` say so. Neither predicting nor, if the bundle adapts, adapting is ever left
        out: rather the bundle is refused, and who wants to predict only says so with roles="predict".

        Args:
            path: the bundle.
            budget: the most bytes the whole process may hold resident, as a number or like "128MiB". None: no bound. All adapters of a process
                that have one have the same.
            threads: that one operator may use.
            verify: check every byte of the bundle first.
            roles: what it will be used for: some of predict, adapt, source, learn. Predicting is always possible, and each of those named must
                fit at some batch. None: predict and adapt as far as the bundle can, the others if there is room.
            batches: numbers of frames that will be taken at a time; 1 always is. None: all that the bundle has.
            strict: refuse if anything would be left out.
            reserve: with a budget, the bytes that the system should have left; below that, adaptation gives way. None: a twentieth of its memory.
            prepared: run what `edgeadapt prepare` made of the bundle for this machine, where there is such; False: the graphs as exported.
            prepare: have those graphs that will be used, and that were not yet, prepared first; called with (stage, done, total, note) as that goes
                on, for seconds to minutes. None: take what is there.
            provider: what graphs run on: "cpu", or "cuda" for onnxruntime's CUDA provider (docs/providers.md). Never another than was asked for.
            slack: with a budget, the bytes of it that are kept free for what the program itself takes after opening.
            answering: make `answer` possible, which takes a second session of the smallest graph and memory of its own.

        Raises:
            BundleError: the bundle is missing, damaged, or made by a newer edgeadapt.
            BudgetError: it does not fit, or another adapter of this process has another budget.
            UsageError: `budget` is no size, `threads` is below 1, the bundle has no such role or batch, `reserve` or `slack` come without a
                budget, `answering` is asked for on a GPU, or this onnxruntime has no such provider.
            EdgeAdaptError: the provider does not start.
        """
        if type(threads) is not int or not 1 <= threads <= MOST_THREADS:
            raise UsageError(f"threads = {threads!r} is not a number of threads", f"give 1 to {MOST_THREADS}, at most the cores there are")
        limit, spare = (None if size is None else parse_bytes(size) for size in (budget, reserve))
        kept = parse_bytes(slack) if slack else 0
        if limit is None and (odd := "reserve" if spare is not None else "slack" if kept else ""):
            raise UsageError(f"{odd} without a budget bounds nothing", f"give a budget too, or leave {odd} out")
        cuda = providers.require(provider)
        if cuda and answering:
            raise UsageError("frames are answered while a step runs on the processor only", "leave out answering, or the provider")
        bundle = Bundle.open(path, verify)
        items = wanted(bundle.manifest, roles, batches)
        ready = find(bundle, threads) if prepared and not cuda else None
        progress = prepare if prepared and not cuda else None
        terms = loading.Terms(threads, providers.device() if cuda else None, kept, answering, strict)
        if limit is None:
            if progress is not None:
                ready = completed(bundle, threads, progress, ready, choices.everything(terms.needs(bundle, counted=False), items).plan.graphs)
            return cls(bundle, loading.everything(bundle, items, terms, ready), None, threads)
        with CLAIMS.taken(limit) as claim:
            return cls._within(bundle, items, claim, terms, ready, progress, spare)

    @classmethod
    def _within(
        cls,
        bundle: Bundle,
        items: list[Item],
        claim: Claim,
        terms: loading.Terms,
        ready: Prepared | None,
        progress: Progress | None,
        spare: int | None,
    ) -> Adapter:
        """Opens within a budget. Graphs are prepared before anything is loaded, while others may open bundles."""
        begun = None
        if progress is not None and (ready is None or ready.lacks(bundle.manifest.graphs)):  # else which are used makes no difference
            with _OPENING:
                begun = loading.start(claim)
                names = loading.names(bundle, items, claim, begun, terms, ready)
            ready = completed(bundle, terms.threads, progress, ready, names)
        with _OPENING:
            loaded = loading.fit(bundle, items, claim, terms, ready, begun)
            marks = Marks(reserve=spare)
            bound, promised = claim.resident()
            signs = Signs(bound, promised, marks)
            if (sign := signs.read(max(0, promised - memory.resident()))).grade:
                LOG.warning("%s: memory may run short: with what is planned, %s", bundle.path.name, sign.reason)
            return cls(bundle, loaded, claim, terms.threads, Pressure(signs, marks))

    def predict(self, x: NDArray[Any], update_statistics: bool = True, **hyper: float) -> Floats:
        """Logits of the adapted network.

        The frames are split over the planned batches, the largest that fits first. Normalisation statistics follow them, as they do in
        `adapt`, and so does what a method without gradients keeps of them, as T3A its supports, by which a batch is answered that is among them
        already; parameters stay. Under memory pressure it goes on, in smaller batches in the end.

        Args:
            x: frames.
            update_statistics: False leaves the state exactly as it is, and normalises with the statistics as they stand.
            hyper: scalars for this call, such as few=1.

        Returns:
            float32 [N,C], or [N,C,...] for segmentation, a new array.

        Raises:
            InputError: the frames have another dtype or shape than the model takes, or there are none.
            UsageError: an unknown scalar, or one out of range.
        """
        changes = {} if update_statistics else {"mix": 0.0}
        return self._serving(x, "predict", {**self._hyper.with_(hyper), **changes}, update_statistics)

    def adapt(self, x: NDArray[Any], **hyper: float) -> Floats:
        """Adapts to unlabelled frames and gives the logits of each step's own forward pass, before its update.

        The frames are split over the batches that have an adapt graph, the largest that fits first. A remainder is predicted one by one and
        not adapted on (counted as skipped_frames). A step that does not turn out finite is dropped (rejected_steps). A method whose only
        adaptation is its statistics, or that has none, predicts. So does any under memory pressure: each step that is not taken for it counts
        as paused_steps, and statistics still follow.

        Args:
            x: frames.
            hyper: scalars for this call, such as rate=0.01.

        Raises:
            InputError: as `predict`.
            UsageError: an unknown scalar, one out of range, or the bundle was opened without this role.
        """
        if not self.manifest.planned("adapt"):
            return self._serving(x, "predict", self._hyper.with_(hyper), True)
        self._service.require("adapt")
        return self._serving(x, "adapt", self._hyper.with_(hyper), True)

    def learn(self, x: NDArray[Any], y: NDArray[Any], **hyper: float) -> Floats:
        """Adapts to labelled frames, split as in `adapt`; gives the logits before each update.

        Under memory pressure the labels are passed over and the frames predicted, as by `adapt`. Whoever must not lose labels compares
        stats["paused_steps"] before and after, and gives those frames again later.

        Args:
            x: frames.
            y: whole numbers below the number of classes: [N], or [N,H,W] for segmentation ([N,L] of sequences); without N for one frame.
            hyper: scalars for this call.

        Raises:
            InputError: as `predict`; labels of another shape, dtype or range.
            UsageError: the bundle has no learn graph, or as `adapt`.
            BudgetError: its learn graphs were left out at opening, for want of room.
        """
        if not self.manifest.planned("learn"):
            raise UsageError(
                f"this bundle ({self.manifest.method.name}) cannot learn from labels", "export with a method and a batch that have a learn graph"
            )
        self._service.require("learn")
        return self._serving(x, "learn", self._hyper.with_(hyper), True, y)

    def answer(self, x: NDArray[Any]) -> Floats:
        """Logits of frames, at once, even while a step of another thread runs: by the state as it was last made known, which stays as it is.

        That is the state at opening, or of the last `load`, `reset`, assignment to `state` or `publish`. Frames are predicted one by one, as by
        `predict` with update_statistics=False. While memory is so short that there is only predicting, they wait for their turn, and the state as it
        stands answers them.

        Raises:
            InputError: as `predict`.
            UsageError: the adapter was opened without `answering`.
        """
        answers = self._answers()
        with self._serving.turn.attempt() as mine:
            if mine:
                self._service.look()
        try:
            found = answers(x, self._hyper.chosen)
        except BudgetError:  # memory was refused: then as any prediction, which gives way
            found = None
        if found is None:
            return self._serving(x, "predict", {**self._hyper.chosen, **answers.hyper, "mix": 0.0}, False)
        logits, count, bad = found
        self._serving.seen(count, bad)
        return logits

    def publish(self, **hyper: float) -> None:
        """Makes the state known as it is now, and scalars that go with it: frames that `answer` is given from now on are answered by them.

        Raises:
            UsageError: an unknown scalar, one out of range, or the adapter was opened without `answering`.
        """
        self._hyper.with_(hyper)
        with self._serving.turn():
            self._answers().publish(self._state.seen(), hyper)

    @property
    def answering(self) -> bool:
        """Whether it was opened so that `answer` is possible."""
        return self._service.answers is not None

    def _answers(self) -> Answers:
        self._service.check_open()
        if self._service.answers is None:
            raise UsageError("this adapter was opened without answering", "open it with answering=True")
        return self._service.answers

    def source(self, x: NDArray[Any]) -> Floats:
        """Logits of the frozen model with its source statistics, whatever was adapted since; nothing changes.

        Raises:
            InputError: as `predict`.
            UsageError: the bundle was opened without this role.
            BudgetError: its source graphs were left out at opening, for want of room.
        """
        self._service.require("source")
        return self._serving(x, "source", {"mix": 0.0}, False)

    def save(self, path: str | os.PathLike[str] | None = None) -> Path:
        """Saves state, counters and scalars; they are on disk when this returns.

        Predictions wait meanwhile: with a budget until the system has taken the state, which makes no copy of it, without one until it is copied.

        Args:
            path: a file to make or replace. None: one of two slots in the folder BUNDLE.state beside the bundle, in turn, so that a write
                that is cut short never loses the save before it.

        Returns:
            the file written.

        Raises:
            StateError: it cannot be written.
        """
        with self._saving:
            if path is None:
                return self._slots.save(self.taken)
            checkpoint.write(Path(path), self.taken, self.manifest)
            return Path(path)

    @contextmanager
    def taken(self, apart: bool = False) -> Iterator[checkpoint.Snapshot]:
        """The state to be saved: a copy; with a budget, unless `apart` (keep its bytes free as `slack`), it is none, and predictions wait."""
        with self._serving.turn():
            now = checkpoint.Snapshot(self._state.seen(), dict(self._counters), self._hyper.chosen)
            if self._claim is not None and not apart:
                yield now
                return
            now = replace(now, tensors=self._state.current())
        yield now

    def load(self, path: str | os.PathLike[str] | None = None) -> None:
        """Continues from a saved state: what follows is the same, bit for bit, as if the process had not stopped.

        Args:
            path: a file that `save` wrote, or a folder with two slots. None: the newest sound slot beside the bundle.

        Raises:
            StateError: there is none, it is damaged, or it belongs to another bundle. The adapter is as it was.
        """
        if path is None:
            file = self._slots.newest_path()
        elif Path(path).is_dir():
            file = checkpoint.Slots(Path(path), self.manifest).newest_path()
        else:
            file = Path(path)
        with checkpoint.opened(file, self.manifest) as snapshot, self._serving.turn():
            self._put(snapshot.tensors)
            self._hyper.restore(snapshot.hyper)
            self._counters.update({name: snapshot.counters.get(name, 0) for name in _COUNTERS})

    def reset(self) -> None:
        """Goes back to the bundle's initial state. Counters and scalars stay, and so do saved states."""
        with self._bundle.stored_state() as initial, self._serving.turn():
            self._put(initial)

    def close(self) -> None:
        """Lets go of the sessions and of the process's budget. Predicting afterwards is an error; a second close is not."""
        with self._serving.turn():
            self._service.close()
            if self._claim is not None:
                loading.give_back()
                self._claim.release()

    def register_cache(self, name: str, release: Callable[[], object]) -> None:
        """Has a cache let go of its memory when memory is short, after adaptation was paused and before predictions are served one by one.

        Args:
            name: for the log; a cache of the same name is replaced.
            release: called with the adapter's lock held, possibly several times; must not call the adapter.
        """
        with self._serving.turn():
            self._service.caches[name] = release

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
        with self._serving.turn():
            return self._state.current()

    @state.setter
    def state(self, values: Mapping[str, Floats]) -> None:
        with self._serving.turn():
            self._put(values)

    def _put(self, values: Mapping[str, Array]) -> None:
        """Puts a whole state in place, and makes it known."""
        self._state.replace(values)
        if self._service.answers is not None:
            self._service.answers.publish(self._state.seen(), {})

    def tensors(self, names: Collection[str]) -> dict[str, Floats]:
        """Copies of some of the state's tensors."""
        with self._serving.turn():
            seen = self._state.seen()
            return {name: seen[name].copy() for name in names}

    def put(self, values: Mapping[str, Floats]) -> None:
        """Puts some of the state's tensors in place, all of `values` or, with a StateError, nothing; the others stay as they are."""
        with self._serving.turn():
            self._state.replace({**self._state.seen(), **values})

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
        paused_steps: of adapt and learn, not taken because memory was short. pressure_events: how often it was, each step down counted.
        abandoned_steps: steps in pieces that were given up half-way, because another thread put a state in place.
        """
        return dict(self._counters)

    @property
    def metrics(self) -> dict[str, float]:
        """The scalars of the last adapt or learn step, such as its loss; empty before the first."""
        return dict(self._serving.metrics)

    @property
    def batches(self) -> dict[str, tuple[int, ...]]:
        """For predict, adapt, source and learn the batches that are loaded when memory is not short, the largest first."""
        return dict(self._service.batches)

    @property
    def level(self) -> int:
        """How short memory is; see `memory`."""
        return int(self._service.level)

    @property
    def memory(self) -> dict[str, Any]:
        """How memory stands.

        In bytes: "resident" now, the process's "peak" so far, the "budget" or None, what was "planned" on top of the process as it was, and that
        plan's lines by name. "level" is 0 normal, 1 adaptation paused, 2 caches released, 3 predicting only, and "reason" says why, or is "".
        "graphs" are those in use, "missing" what was left out because it did not fit. On a GPU, "passed_over" are those that it lacks operators of,
        and of the lines "GPU memory" and "CUDA context" are not part of what was planned where it has memory of its own.
        """
        return self._service.memory(None if self._claim is None else self._claim.budget)

    @property
    def changes(self) -> tuple[Change, ...]:
        """The latest hundred changes of the memory's level."""
        return self._service.changes()
