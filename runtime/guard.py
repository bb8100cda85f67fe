"""Decides, window by window, what of adaptation a stream gets, so that a model does not end worse than it began.

`phases` says which states there are, and what leads from one to the next.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgeadapt.errors import UsageError
from edgeadapt.runtime import checkpoint, looks
from edgeadapt.runtime.adapter import Adapter
from edgeadapt.runtime.calm import Calm, Look
from edgeadapt.runtime.checkpoint import Snapshot
from edgeadapt.runtime.comparing import Comparing
from edgeadapt.runtime.following import Following, together
from edgeadapt.runtime.guarded import check_guarded, written
from edgeadapt.runtime.hand import by_hand
from edgeadapt.runtime.learned import Learned
from edgeadapt.runtime.phases import PUT_BACK, Limits, Phase, Trial, Verdict
from edgeadapt.runtime.recent import Recent
from edgeadapt.runtime.scores import Predicted, Scores, Shift
from edgeadapt.runtime.state import Floats

LOG = logging.getLogger("edgeadapt")

_REMEMBERED = 1000


class Guard:
    """Serves windows with an adapter, and decides what adaptation they get. Nobody else may change the adapter's state meanwhile.

    What it may be told by hand waits for the end of a window that is being served.

    Args:
        adapter: the adapter. Where what steps change differs from the bundle's, as that of a loaded state does, the guard takes it for what the model
            started as, and goes back to it.
        limits: when it does what.
        tell: told of every decision; None: nobody. All are in the log "edgeadapt" and in `verdicts` besides.

    Attributes:
        adapter: the adapter. phase: its state. windows: served so far. scores: of the last one. verdicts: the latest thousand decisions.
        between: the lock that is held while a window is served. changed: `time.monotonic()` when it went to its state.
        ahead: whether frames are answered before their window is served, as by a `Stream` one by one.

    Raises:
        UsageError: the bundle does not say what its source looks like, or the adapter was opened without what adapts.
    """

    def __init__(self, adapter: Adapter, limits: Limits | None = None, tell: Callable[[Verdict], None] | None = None) -> None:
        manifest = adapter.manifest
        check_guarded(manifest)
        assert manifest.reference is not None
        if manifest.planned("adapt") and not adapter.batches["adapt"]:
            hint = "open it with roles='adapt', or leave the guard out"
            raise UsageError("a guard watches over adaptation, and this adapter was opened without it", hint)
        self.adapter, self.limits, self.phase, self.windows = adapter, limits or Limits(), Phase.WARM_UP, 0
        self.scores: Scores | None = None
        self.between, self.changed = threading.RLock(), time.monotonic()
        self.verdicts: deque[Verdict] = deque(maxlen=_REMEMBERED)
        self._tell, self._reference, self.ahead = tell, manifest.reference, False
        passing, stepping = (written(manifest, role) for role in ("predict", "adapt"))
        with adapter.bundle.stored_state() as start:
            self._shift = Shift(manifest.reference, start)
            self._source = {spec.name: np.array(start[spec.name]) for spec in manifest.state if spec.name in passing}
        follows = bool(passing & set(self._shift.names))
        if not follows:
            self._shift = Shift(replace(manifest.reference, layers={}), {})
        self._learned = Learned(adapter, [spec.name for spec in manifest.state if spec.name in stepping - passing])
        self._trains = bool(manifest.planned("adapt"))
        self._ways = Following(adapter, self.limits, follows)
        self._following, self._apart, self._stale = False, "", False
        self._since, self._steps, self._idle, self._calm, self._failures, self._quiet, self._partly = 0, 0, 0, 0, 0, 0, 0
        self._recent = Recent(manifest.reference, manifest.task.classes, self.limits)
        self._as_source = Calm(adapter, self.limits, self._source, self._learned, self._recent, self._score)
        self._comparing = Comparing(adapter, self._learned, self._source, self._ways)

    @property
    def scalars(self) -> dict[str, float]:
        """What the adapter is to predict with until the next window, where it is not the user who set them."""
        return {**self._ways.scalars, **self._as_source.scalars}

    # ------------------------------------------------------------------------------------------------------------ serving

    def __call__(self, x: Floats, due: bool = True) -> tuple[Floats, bool]:
        """Logits [N,C] or [N,C,…] of a window, float32 [N,*input.shape], and whether the model was changed by it.

        due: whether a step may be taken on it.

        Raises:
            InputError, UsageError, BudgetError: as the adapter's.
        """
        with self.between:
            return self._served(x, due)

    def _served(self, x: Floats, due: bool) -> tuple[Floats, bool]:
        adapter, before = self.adapter, self.adapter.stats
        usable = np.isfinite(x).all(tuple(range(1, x.ndim)))
        self._ways.serves(len(x), int(usable.sum()), self.ahead)
        step = due and self._trains and self.phase in (Phase.ADAPTING, Phase.COMMITTED) and self._recent.varied
        whole = bool(usable.all()) and together(adapter, "adapt" if step else "predict", len(x))
        natural: Floats | None = None
        look: Look | None = None
        self._stale = False
        if self._ways.live and not self._following:
            means = looks.means(adapter, self._shift.names, self._source, x, self._ways.passes if usable.all() and self._ways.may_mix else ())
            logits = adapter.predict(x, update_statistics=False)
            changed = False
        else:
            held, mix = adapter.tensors(self._shift.names), self._ways.mixing(len(x)) if whole else {}
            given, rate = {**self._ways.scalars, **mix}, self._ways.rate(len(x)) if whole else {}
            look = self._as_source.look(x, given, self._trains) if whole and self._ways.prompt else None
            self._as_source.now &= not step
            try:
                if look is not None and look.source:
                    logits, self._comparing.trial = self._as_source.answer(look), Trial()
                else:
                    logits = adapter.adapt(x, **given, **rate) if step else self._as_source.predict(x, given, whole, not self.ahead)
            finally:
                self._stepped(adapter.stats["steps"] - before["steps"])
            means, after = adapter.tensors(self._shift.names), adapter.stats
            changed = after["steps"] > before["steps"] or (bool(self._source) and after["rejected_steps"] == before["rejected_steps"])
            if self._ways.live:
                natural = looks.natural(adapter, self._source, x)
            self._ways.renewed += 1
            if (look and look.source) or (mix and self._shift.apart(held, means, mix["mix"], len(x)) > self.limits.jump):
                self._ways.renewed = 0
        self.windows += 1
        self._idle = 0 if adapter.stats["steps"] > before["steps"] else self._idle + 1
        if usable.any():
            self._judge(x, logits, means, natural, look, int(usable.sum()), whole)
        if self._stale and not (look and look.source):  # the model that answered there is the one that is put in place
            self._follow(x, bool(usable.all()))
        return logits, changed

    def _follow(self, x: Floats, usable: bool) -> None:
        """Statistics follow a window by the model that was put in place after it: frames that are answered before the next are so by them."""
        if not self._source or (self._ways.live and not self._following):
            return
        mix = self._ways.mixing(len(x), 0) if usable and together(self.adapter, "predict", len(x)) else {}
        self.adapter.predict(x, True, **self.scalars, **mix)

    def _stepped(self, steps: int) -> None:
        if steps:
            self._steps += steps
            self._learned.stepped(self._ways.whole)

    # ------------------------------------------------------------------------------------------------------------ judging

    def _judge(
        self, x: Floats, logits: Floats, means: Mapping[str, Floats], natural: Floats | None, look: Look | None, usable: int, whole: bool
    ) -> None:
        predicted = Predicted.of(logits)
        if len(predicted.shares) < usable:
            self.roll_back("its predictions are not finite")
            return
        spread = self._recent.add(predicted, predicted if natural is None else Predicted.of(natural))
        runs, known = self._recent.runs, self._recent.known
        mixed = self._recent.mixed or (self._learned.wholly and not known)
        shift = self._score(means, len(x), mixed, None if whole else self._ways.passes[0]) if look is None else look.shift
        scores = Scores(shift, spread, predicted.entropy - self._reference.entropy, runs)
        if self.phase is Phase.PROBATION and (look is None or not look.source):
            scores = self._comparing.scored(x, predicted, scores, whole, self._stays, self.scalars)
        self.scores, shifted = scores, self._shifted(scores) if look is None else not look.source
        self._since += 1
        self._quiet = 0 if shifted or math.isnan(scores.shift) else self._quiet + 1  # what was learned makes surer, whatever the stream is
        self._apart = self._ways.apart(spread, runs) if known else ""
        self._partly = self._partly + 1 if self._apart else 0
        if self._ways.live:
            far = self.limits.far / 2 if self._following else self.limits.far
            self._following = self._shifted(scores) and (self._recent.varied or scores.shift > far) and self.phase is not Phase.PAUSED
            if not self._following:
                self.adapter.put(self._source)
        self._next(scores)
        enough = self.limits.least if runs < self.limits.runs else self.limits.narrow
        self._ways.choose(mixed, self._wholly(runs), shifted and spread >= enough)

    def _wholly(self, runs: float) -> bool:
        """Whether statistics are to follow wholly: for steps, where frames come as if shuffled, and for what such steps have made."""
        if self._learned.wholly:
            return not self._apart
        return self.phase in (Phase.ADAPTING, Phase.PROBATION, Phase.COMMITTED) and runs < self.limits.runs

    @property
    def _stays(self) -> bool:
        """Whether the model is normalised by the source's statistics now."""
        return not self._shift.names or (self._ways.live and not self._following)

    def _score(self, means: Mapping[str, Floats], frames: int, mixed: bool, together: int | None = None) -> float:
        """`Scores.shift` of means that follow windows of so many frames, `together` of them in a pass; None: all."""
        stands = frames if self._stays else self._ways.stand_for(together or frames)
        return self._shift(means, stands, 0.25 if mixed else 1.0)

    def _shifted(self, scores: Scores) -> bool:
        if math.isnan(scores.shift):
            return scores.entropy >= self.limits.unsure
        return scores.shift >= self.limits.shifted

    def _next(self, scores: Scores) -> None:
        """On to the next state, where it is time."""
        limits, phase = self.limits, self.phase
        if phase is Phase.WARM_UP:
            if self._since >= limits.warm_up:
                self._go(Phase.OBSERVING, f"after {limits.warm_up} windows", scores)
        elif phase is Phase.PROBATION and self._quiet < limits.back:
            trial = self._comparing.trial
            if trial.windows >= limits.probation and trial.frames >= self._reference.window:
                self._try(scores)
        elif self._learned.in_use and (why := self._of_no_use(scores)):
            self._put_aside(f"{why}; what was learned is put aside", scores)
        elif phase is Phase.PAUSED:
            return
        elif phase is Phase.ROLLED_BACK:
            if self._since >= self._calm:
                self._go(Phase.OBSERVING, f"after {self._calm} windows without steps", scores)
        elif phase is Phase.OBSERVING:
            if self._trains and self._shifted(scores) and self._recent.varied and not (self._learned.wholly and self._apart):
                self._begin("the stream is shifted, and its windows are of several classes", scores)
        elif self._learned.unproven and (why := self._to_be_proven()):
            self._go(Phase.PROBATION, why, scores)
        elif phase is Phase.COMMITTED:
            self._go(Phase.ADAPTING, "the stream is still shifted", scores)
        elif self._quiet >= limits.back:
            self._go(Phase.OBSERVING, "the stream is as the source again", scores)

    def _begin(self, reason: str, scores: Scores) -> None:
        """Steps, or what was learned before: what steps made while statistics followed wholly where these may do so again."""
        self._steps = 0
        before = self._learned.laid_by
        if before is None or (before.wholly and not (self._ways.may_whole and scores.runs < self.limits.runs)):
            self._go(Phase.ADAPTING, reason, scores)
            return
        self._learned.take_up()
        self._stale = True
        self._go(Phase.PROBATION, f"{reason}; what was learned before is taken up", scores)

    def _of_no_use(self, scores: Scores) -> str:
        """Why what was learned is of no use any more, or ""."""
        if self._quiet >= self.limits.back:
            return "the stream is as the source again"
        if not self._learned.wholly or self._partly < self.limits.recent:
            return ""
        narrow = scores.spread < self.limits.mixed  # perhaps for what was learned: a probation tells
        return "" if narrow and self._learned.unproven and self.phase is not Phase.PAUSED else f"{self._apart} for {self._partly} windows"

    def _to_be_proven(self) -> str:
        """Why steps are to be looked at now, or ""."""
        limits = self.limits
        if self._steps >= limits.trial:
            return f"after {self._steps} steps"
        if self._recent.spreads[-1] < limits.mixed:
            return f"predictions narrowed after {self._steps} steps"
        return f"no step for {self._idle} windows, after {self._steps}" if self._idle >= limits.idle else ""

    def _try(self, scores: Scores) -> None:
        """The end of a probation, or more of it where its windows show too little."""
        limits, trial = self.limits, self._comparing.trial
        found = replace(scores, agreement=trial.agreed / trial.frames, kept=trial.kept)
        if found.agreement < limits.agreement:
            self.roll_back(f"it agrees with what it started as on {100 * found.agreement:.0f} % of frames", found)
        elif found.kept < limits.kept:
            self.roll_back("its predictions are of fewer classes", found)
        elif found.moved > limits.most:
            self.roll_back(f"its parameters moved by {found.moved:.3g} times their norm", found)
        elif math.isnan(scores.shift) and trial.unsure / trial.frames - self._reference.entropy < limits.unsure:
            self._put_aside("what it started as is as sure as on the source; what was learned is put aside", found)
        elif trial.varied < limits.mixed * self._reference.classes:
            if trial.windows >= limits.calm or self._learned.wholly:
                self._unlearn()
                self._go(Phase.OBSERVING, f"{trial.windows} windows of few classes prove nothing; steps not yet proven are put aside", found)
        else:
            note = ""
            if found.moved > limits.box:
                self._learned.draw_back(limits.box / found.moved)
                self._stale = True
                note = f"; its parameters were drawn back to {limits.box:g} of their norm from where they started"
            self._keep()
            self._go(Phase.COMMITTED, f"it predicts as it should on {trial.windows} windows{note}", found)

    def _go(self, phase: Phase, reason: str, scores: Scores | None = None) -> None:
        verdict = Verdict(self.windows, self.phase, phase, reason, scores)
        self.changed = self.changed if phase is self.phase else time.monotonic()
        self.phase, self._since = phase, 0
        if phase is not Phase.PROBATION:
            self._comparing.trial = Trial()
        self.verdicts.append(verdict)
        LOG.info("guard: %s", verdict)
        if self._tell is not None:
            self._tell(verdict)

    # ------------------------------------------------------------------------------------------- what was learned, and by hand

    def _keep(self) -> None:
        """What was learned is the last good from now on."""
        self._learned.keep()
        self._steps, self._failures = 0, 0

    def _unlearn(self) -> None:
        """The last good, or what the model started as, is put back."""
        self._learned.put_back()
        self._steps, self._stale = 0, True
        self._ways.belong(self._learned.wholly)

    def _put_aside(self, reason: str, scores: Scores) -> None:
        self._learned.lay_by()
        self._unlearn()
        self._failures = 0
        self._go(self.phase if self.phase in (Phase.ROLLED_BACK, Phase.PAUSED) else Phase.OBSERVING, reason, scores)

    def _forget(self) -> None:
        """What was seen of the stream with another model."""
        self._recent.clear()
        self._ways.renewed = self._partly = 0

    def _begin_anew(self, reason: str) -> None:
        """With the warm-up, and a model that was put in place from outside."""
        self._following, self._failures, self._steps, self._quiet = False, 0, 0, 0
        self._forget()
        self._ways.scalars = {}
        if self._learned.wholly:
            self._ways.choose(True, True, True)
        self._go(Phase.WARM_UP, reason)

    @by_hand
    def roll_back(self, reason: str = "by hand", scores: Scores | None = None) -> None:
        """Puts the last good back; the second time in a row, or where there is none, what the model started as. A pause stays one."""
        self._failures += 1
        if self._failures > 1 or self._learned.taken_up:
            self._learned.drop()
        put = PUT_BACK[self._learned.good is None]
        self._unlearn()
        self._forget()
        self.adapter.put(self._source)
        self._stale = self._learned.good is not None
        self._calm = self.limits.calm * 2 ** min(self._failures - 1, 4)
        self._go(Phase.PAUSED if self.phase is Phase.PAUSED else Phase.ROLLED_BACK, f"{reason}; {put}", scores)

    @by_hand
    def mark_good(self) -> None:
        """Takes what was learned, as it is, for what the model started as: nothing goes back behind it but `reset`."""
        self._learned.keep_as_start()
        self._steps, self._failures = 0, 0
        self._go(Phase.PAUSED if self.phase is Phase.PAUSED else Phase.OBSERVING, "marked good by hand", self.scores)

    @by_hand
    def reset(self) -> None:
        """Puts the whole state back to what the bundle began with, and begins with the warm-up."""
        self.adapter.reset()
        self._learned.reset()
        self._begin_anew("reset by hand")

    @by_hand
    def learn(self, x: Floats, y: NDArray[np.int64]) -> int:
        """Learns from labelled frames, as `Adapter.learn`, and gives the steps that were taken; these are to be proven as any others."""
        before = self.adapter.stats["steps"]
        try:
            self.adapter.learn(x, y, **self.scalars)
        finally:
            self._stepped(self.adapter.stats["steps"] - before)
        return self.adapter.stats["steps"] - before

    @property
    def behind(self) -> str:
        """What a roll-back puts back, see `Learned.behind`."""
        return self._learned.behind

    @by_hand
    def pause(self) -> None:
        """No steps until `resume`; windows are scored as before."""
        self._go(Phase.PAUSED, "by hand", self.scores)

    @by_hand
    def resume(self) -> None:
        """Goes on with `observing` after a `pause`; what was not yet proven is put aside. Otherwise nothing."""
        if self.phase is Phase.PAUSED:
            aside = "; steps not yet proven are put aside" if self._learned.unproven else ""
            if self._learned.unproven:
                self._unlearn()
            self._go(Phase.OBSERVING, f"resumed by hand{aside}", self.scores)

    @by_hand
    def settle(self) -> None:
        """Before a state is saved: what was learned and not yet proven is put aside, for the last good or the start."""
        if self._learned.unproven:
            self._unlearn()
            self._go(Phase.PAUSED if self.phase is Phase.PAUSED else Phase.OBSERVING, "steps not yet proven are put aside", self.scores)

    # ----------------------------------------------------------------------------------------------------- across restarts

    @contextmanager
    def taken(self, apart: bool = False) -> Iterator[Snapshot]:
        """The state as it is to be saved, for `checkpoint.write`: steps that are not yet proven are left out of it, and go on.

        apart: windows and predictions wait only until it is copied; see `Adapter.taken`.
        """
        with ExitStack() as held, ExitStack() as waited:
            waited.enter_context(self.between)
            kept, instead = held.enter_context(self._learned.proven())
            snapshot = held.enter_context(self.adapter.taken(apart))
            if apart:
                waited.close()  # nothing of it changes any more: what is put away is only ever replaced as a whole
            yield replace(snapshot, tensors={**snapshot.tensors, **instead}, kept=kept)

    @by_hand
    def load(self, path: str | os.PathLike[str]) -> None:
        """Goes on from a saved state as the guard that saved it, beginning with the warm-up.

        What was the last good there is it again, and what the model started as, or what was laid by, is that. A state that no guard saved is taken
        for what the model started as.

        Raises:
            StateError: as `Adapter.load`; nothing is changed.
        """
        with checkpoint.opened(Path(path), self.adapter.manifest) as found:
            kept = None if found.kept is None else found.kept.at_hand()
        if kept is not None:
            self._learned.check(kept)
        self.adapter.load(path)
        self._learned.go_on(kept)
        self._begin_anew("goes on from a saved state" + ("" if self._learned.good is None else ", which is the last good"))
