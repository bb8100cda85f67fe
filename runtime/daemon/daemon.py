"""The daemon: frames of a source are answered one by one, the model adapts beside that, and whoever may ask is told how it goes.

One loop does the work: it takes a frame, answers it, and looks after everything else between two frames, so that its own pings of the watchdog show
that frames are answered. What could hold it up has threads of its own: the source, steps (with a latency cap), writing to the disk, who asks.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from edgeadapt._version import __version__
from edgeadapt.bundle import Bundle, signing
from edgeadapt.devices.sources import Frame, Source, Wanted
from edgeadapt.devices.sources.kinds import KINDS
from edgeadapt.devices.sources.live import Reopened
from edgeadapt.errors import BundleError, EdgeAdaptError, StateError, UsageError
from edgeadapt.runtime.daemon import asked, model, notify, reports
from edgeadapt.runtime.daemon.config import Config, options
from edgeadapt.runtime.daemon.control import Control
from edgeadapt.runtime.daemon.events import Events
from edgeadapt.runtime.daemon.feed import Feed
from edgeadapt.runtime.daemon.keeping import Keeping
from edgeadapt.runtime.daemon.metrics import Measures
from edgeadapt.runtime.daemon.saving import Saving
from edgeadapt.runtime.daemon.seen import Answered, Seen
from edgeadapt.runtime.daemon.store import Boot, Limits, Store
from edgeadapt.runtime.daemon.verbs import PREDICTION
from edgeadapt.runtime.lines import line
from edgeadapt.runtime.phases import Phase, Verdict
from edgeadapt.runtime.stream import Prediction, decide

if TYPE_CHECKING:
    from edgeadapt.runtime.daemon.logs import LogHandler

LOG = logging.getLogger("edgeadapt")

STATES = (*(phase.value for phase in Phase), "predicting", "starting", "safe", "stopping")
"""Those of the metric `edgeadapt_state`: a guard's, or what there is instead."""

_TURN = 0.25  # seconds between two looks after everything else, at least
_PREPARING = 900.0  # seconds that one stage of preparing graphs may take, on a slow board
_IN_A_ROW = 20  # frames without an answer after which it gives up, so that the next start may begin with something else


class Daemon:
    """Made, then `run` by the thread that is to do the work; everything else may be called from any thread, or a signal's handler.

    Args:
        config: what it was told.
        reason: why it is safe mode: the configuration could not be used as it is; "" where it could.
        logs: what tells repeated messages; None: nobody.
        notifier: tells the service manager; None: one by the environment.
    """

    def __init__(self, config: Config, reason: str = "", logs: LogHandler | None = None, notifier: notify.Notifier | None = None) -> None:
        self.config, self.reason = config, reason
        self.events, self.seen = Events(), Seen()
        self.measures = Measures(__version__, STATES, {"device": config.name})
        self.model: model.Model | None = None
        self.boot: Boot | None = None
        self.store: Store | None = None
        self.saving: Saving | None = None
        self.keeping = Keeping(config.frames, config.state.folder) if config.frames.keep else None
        self.feed: Feed | None = None
        self.posted: Callable[[Frame], None] | None = None
        self.begun = time.monotonic()
        self.ending, self._starting = "", True
        self._logs, self._notifier = logs, notifier or notify.Notifier()
        self._hearts = notify.Heartbeats(resting=("source", "adapt", "store"))
        self._watchdog = notify.Watchdog(self._notifier, self._hearts, notify.watchdog_seconds())
        self._turned, self._compared = 0.0, 0.0
        self._saved: float | None = None
        self._now: Frame | None = None
        self._failures, self._counted, self._taken, self._orderly = 0, 0, 0, False
        self._step: int | None = None
        self.reports = reports.Reports(self)
        self.asked = asked.Asked(self)

    # ---------------------------------------------------------------------------------------------------- from anywhere

    def stop(self) -> None:
        """Has `run` finish what it is doing and return "stop"."""
        self.ending = "stop"  # no lock: a signal's handler may have interrupted who holds it

    def reload(self) -> None:
        """Has `run` finish what it is doing and return "reload"; a stop goes before."""
        self.ending = self.ending or "reload"

    def post(self, frame: Frame) -> None:
        """A frame of the source "http".

        Raises:
            UsageError: there is no model to answer it.
        """
        if self.posted is None:
            raise UsageError(f"no frames can be taken: {self.why_safe or 'the source is another one'}", "edgeadapt status says more")
        self.posted(frame)

    def tell_manager(self, sentence: str) -> None:
        """One line for the service manager."""
        self._notifier.status(sentence)

    def stepping(self) -> AbstractContextManager[None]:
        """To be entered while a step is taken that the loop may have to wait for."""
        return self._watchdog.step()

    def wants_save(self, always: bool = False) -> None:
        """What is learned has changed for good, and is to be on the disk."""
        if self.saving is not None:
            self.saving.wanted(always)

    @property
    def mode(self) -> Literal["starting", "serving", "safe", "stopping"]:
        """Of `Status`."""
        return "stopping" if self.ending else "starting" if self._starting else "safe" if self.why_safe else "serving"

    @property
    def why_safe(self) -> str:
        """Why less is done than was asked for; "" where all is."""
        if self._starting:
            return self.reason or "it is starting"
        return self.reason or ("there is no model" if self.model is None else self.model.reason)

    # --------------------------------------------------------------------------------------------------------- the work

    def run(self) -> str:
        """Serves until `stop` or `reload`, and says which it was. Whatever is wrong with the bundle, the disk or the source, it can be asked.

        Raises:
            EdgeAdaptError: it cannot even be asked: the control socket cannot be made, or another daemon serves from the state folder; or too many
                frames in a row could not be answered.
        """
        self._watchdog.waits(_PREPARING)
        with ExitStack() as stack:
            control = Control(self.config.control.socket, self.asked.verbs, self.config.control.group)
            self.store = self._opened()
            if self.store is not None:
                stack.callback(self.store.close)
            stack.enter_context(control)
            stack.callback(self.events.close)
            try:
                self._load(stack)
                self.reports.start(stack)
                self._take(stack)
                self._starting = False
                self._watchdog.waits()
                self._notifier.ready(self.reports.sentence())
                LOG.info("%s: %s", self.config.name, self.reports.sentence())
                self._serve()
                self._orderly = True
            except _ToldToEnd:
                self._orderly = True
            finally:
                if self.ending == "reload":
                    self._watchdog.waits(_PREPARING, well=True)  # it goes on meanwhile, until the next start
                    self._notifier.reloading()
                else:
                    self._notifier.stopping()
                self._notifier.extend(60)
                self._finish()
        return self.ending or "stop"

    def _opened(self) -> Store | None:
        state = self.config.state
        limits = Limits(state.probation, state.boots, state.bytes_per_day, state.history)
        keys = self.config.bundle.keys if self.config.bundle.require_signature else ()
        try:
            return Store.open(state.folder, limits, keys)
        except StateError as fault:
            if "another daemon" in fault.message:
                raise
            self._wrong("disk", fault)
            return None

    def _load(self, stack: ExitStack) -> None:
        """The model, or the reason why there is none."""
        try:
            path, state = self._chosen()
            digest = None if self.boot is None else self.boot.installed.digest
            found = model.opened(path, state, self.config, self._decided, self._prepares, digest)
        except (EdgeAdaptError, OSError, MemoryError) as fault:
            self.reason = self.reason or _first_line(fault)
            self._wrong("bundle", fault)
            return
        stack.callback(found.close)
        found.stream.working = self.stepping
        self.model = found
        if found.reason:
            self.events.tell("safe", f"it only predicts: {found.reason}")
        if self.store is not None and self.boot is not None:
            learns = None if not found.adapts else found.guard or found.adapter
            taken = None if learns is None else lambda: learns.taken(apart=True)  # no frame waits for the disk
            self.saving = Saving(self.store, taken, found.adapter.manifest, lambda: self._hearts.working("store"), self.events.tell)

    def _chosen(self) -> tuple[Path, Path | None]:
        """The bundle and the saved state to begin with."""
        section = self.config.bundle
        outside, keys = section.path, section.keys if section.require_signature else ()
        if section.require_signature and not keys:
            raise BundleError("bundles must be signed, and there is no key to check them with", "mend [bundle] in the configuration")
        if self.store is None:
            if outside is None:
                raise StateError("no bundle is named, and the state folder cannot be read", "name one: bundle.path")
            found = signing.check(outside, keys) if keys else Bundle.open(outside)
            return found.path, None
        self.boot = boot = self.store.begin_boot(outside)
        if boot.why:
            self.events.tell("gave up", boot.why)
        self.events.tell("start", f"with the {boot.choice}, start {boot.attempt} in a row")
        return boot.bundle, boot.state

    def _prepares(self, stage: str, done: int, total: int, note: str = "") -> None:
        if self.ending:
            raise _ToldToEnd
        self._hearts.beat("predict")
        self._notifier.extend(_PREPARING)
        self._notifier.status(f"{stage}: {done} of {total} {note}")

    def _take(self, stack: ExitStack) -> None:
        """Begins to take frames."""
        if self.model is None:
            return
        manifest = self.model.adapter.manifest
        kind, given, wanted = self.config.source.type, options(self.config.source), Wanted(manifest.input, manifest.task, self.config.memory.picture)
        try:
            source: Source = KINDS[kind](given, wanted)
            if source.live and kind not in ("http", "none"):
                source = Reopened(lambda: KINDS[kind](given, wanted))
        except EdgeAdaptError as fault:
            self.reason = self.reason or fault.message
            self._wrong("source", fault)
            return
        except Exception as fault:  # a defect of a source, or no memory, must not end the daemon, which can be asked what is wrong
            told = f"a defect of the source: {fault!r}"
            self.reason = self.reason or told
            LOG.exception("there is no source")
            self.events.tell("source", told)
            return
        self.posted = getattr(source, "put", None) if kind == "http" else None
        self.feed = feed = Feed(source, 1 if kind == "camera" else self.config.predict.queue)
        feed.start()
        stack.callback(feed.close)

    def _wrong(self, kind: str, fault: BaseException) -> None:
        LOG.error("%s", str(fault) or repr(fault))
        self.events.tell(kind, _first_line(fault))

    def _serve(self) -> None:
        if self.model is None or self.feed is None:
            while not self.ending:
                self._turn()
                time.sleep(_TURN)
            return
        while not self.ending:
            try:
                with closing(self.model.stream.run(self._frames(), self._taken)) as answers:
                    for some in answers:
                        for answer in some:
                            self._answered(answer)
            except (EdgeAdaptError, MemoryError) as fault:  # of one run; the next may go well
                if self._now is not None:
                    self.seen.faulty()
                    self.feed.source.spare()
                self._now, self._failures = None, self._failures + 1
                if self._failures == _IN_A_ROW:
                    raise
                self._wrong("predict", fault)
                time.sleep(min(1.0, 0.05 * self._failures))

    def _frames(self) -> Iterator[Frame]:
        assert self.feed is not None
        while not self.ending:
            self._turn()
            if self.feed.ended:
                time.sleep(_TURN)
                continue
            frame = self.feed.take(_TURN)
            if frame is not None and not self.ending:
                self._now, self._taken = frame, self._taken + 1
                yield frame

    def _answered(self, answer: Prediction) -> None:
        assert self.model is not None
        frame, self._now = self._now, None
        self.measures.frames.add(source=self.config.source.type)
        task = self.model.adapter.manifest.task
        if answer.logits is None or frame is None or frame.pixels is None:
            self.seen.faulty()
            told: Mapping[str, Any] = line(answer, None, task)
        else:
            self._failures = 0
            decision = decide(answer.logits)
            told = line(answer, decision, task)
            self.seen.answered(Answered(answer.index, answer.frame.id, frame.pixels, told), answer.milliseconds)
            if self.keeping is not None:
                self.keeping.keep(frame.pixels, decision.label)
            self.measures.inference.observe(answer.milliseconds / 1000)
            told = {**told, **self._compare(frame, decision.label)}
        if self.events.wanted(PREDICTION):
            self.events.pass_on(PREDICTION, str(told.get("name") or told.get("label", "")), told)

    def _compare(self, frame: Frame, label: int) -> dict[str, Any]:
        """Asks the model as it was exported too, now and then, where that holds nothing up; what it says, as "without"."""
        assert self.model is not None
        adapter, every, now = self.model.adapter, self.config.predict.compare, time.monotonic()
        if not every or now - self._compared < every or not adapter.batches["source"] or self.model.stream.busy or frame.pixels is None:
            return {}
        self._compared = now
        try:
            found = decide(adapter.source(frame.pixels))
        except EdgeAdaptError as fault:
            LOG.warning("the model as exported cannot be asked: %s", fault)
            return {}
        self.seen.compare(found.label == label)
        names = adapter.manifest.task.names
        without = {"label": found.label, "name": None if names is None else names[found.label], "confidence": round(found.confidence, 4)}
        return {"without": without}

    # ------------------------------------------------------------------------------------------------- everything else

    def _turn(self) -> None:
        self._hearts.beat("predict")
        now = time.monotonic()
        if now - self._turned < _TURN:
            return
        self._turned = now
        stream = None if self.model is None else self.model.stream
        step = stream.windows if stream is not None and stream.busy else None
        if step != self._step:  # its silence is how long one step takes; between two no look may fall
            self._step = step
            (self._hearts.rest if step is None else self._hearts.beat)("adapt")
        self._watchdog.turn()
        self.reports.turn(now)
        if self._logs is not None:
            self._logs.tell_repeated()
        if self.saving is not None:
            self.saving.turn(self._well())

    def _well(self) -> bool:
        """Whether what is served proves itself just now: it has answered since it was last saved, and nothing went wrong."""
        guard = None if self.model is None else self.model.guard
        if self.saving is not None and self.saving.saved != self._saved:
            self._saved, self._counted = self.saving.saved, self.seen.count
        answers = self.seen.count > self._counted or self.config.source.type in ("none", "http")
        return answers and not self._failures and (guard is None or guard.phase not in (Phase.ROLLED_BACK, Phase.WARM_UP) or not guard.windows)

    def _decided(self, verdict: Verdict) -> None:
        """The guard has decided something, on whichever thread serves its windows."""
        self.events.tell("guard", str(verdict), verdict.plain())
        if verdict.rolled_back:  # also while paused
            self.measures.rollbacks.add(reason="by hand" if verdict.reason.startswith("by hand") else "guard")
            self.wants_save(always=True)
        elif verdict.after is Phase.COMMITTED:
            self.wants_save()

    def _finish(self) -> None:
        """What is learned is on the disk when this returns, where the disk takes it."""
        self.reports.count()
        if self.model is not None and self.model.adapts and not self.model.adapter.manifest.planned("adapt") and self.seen.count:
            self.wants_save()  # nothing is ever proven of methods without steps, but what they keep of the stream goes on
        left: list[Callable[[], None]] = [] if self.feed is None else [self.feed.close]
        left += [] if self.saving is None else [self.saving.finish]
        left += [self.store.stopped] if self._orderly and self.store is not None and self.boot is not None else []
        left += [] if self.keeping is None else [self.keeping.close]
        for done in left:
            try:
                done()
            except Exception as fault:  # what is left is done all the same
                LOG.warning("at the end: %s", _first_line(fault))


class _ToldToEnd(BaseException):
    """While graphs were being prepared."""


def _first_line(fault: BaseException) -> str:
    return next(iter(str(fault).splitlines()), "") or repr(fault)

