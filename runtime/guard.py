"""Decides, window by window, what of adaptation a stream gets, so that a model does not end worse than it began.

The states and what leads from one to the next:

    warm-up      statistics follow where that is safe; nothing is judged yet
    observing    the same, and every window is scored; on to `adapting` where the stream is shifted and its windows are of several classes
    adapting     a step on each window of several classes; after `trial` of them, or where predictions narrow, on to `probation`
    probation    no steps; the model is compared, on the same frames, with the one that it started as; on to `committed` or `rolled back`
    committed    for one window: what was learned is the last good from now on; then `adapting` again
    rolled back  the last good, or after two in a row the start, is put back; no steps for a while, twice as long after each; then `observing`
    paused       by whoever uses it, until `resume`

Where the stream is the source again, what was learned is put aside, and it goes on with `observing` from the start.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import numpy as np

from edgeadapt.bundle import Manifest
from edgeadapt.errors import UsageError
from edgeadapt.runtime.adapter import Adapter
from edgeadapt.runtime.scores import Predicted, Scores, Shift, distance, spread_of
from edgeadapt.runtime.state import Floats

LOG = logging.getLogger("edgeadapt")

LEARNED = ("parameter", "moment")
"""Kinds of state that steps change, and that are rolled back."""
_REMEMBERED = 1000


class Phase(Enum):
    """A state of the guard; see above."""

    WARM_UP = "warm-up"
    OBSERVING = "observing"
    ADAPTING = "adapting"
    PROBATION = "probation"
    COMMITTED = "committed"
    ROLLED_BACK = "rolled back"
    PAUSED = "paused"


@dataclass(frozen=True)
class Limits:
    """When the guard does what.

    Attributes:
        warm_up: windows before anything is judged.
        shifted: `Scores.shift` from which a stream counts as shifted; below it for `back` windows, as the source again.
        unsure: for models whose statistics do not follow, entropy in nats above the source's that counts as shifted.
        varied: `Scores.spread` of windows that steps may be taken on.
        mixed: of windows that statistics may follow in all layers; below, predictions are narrow.
        few: the scalar of anchored statistics where the stream is shifted and its windows are of few classes. It is 0 where they are mixed, and 1
            where they are of few classes, and not shifted.
        recent: windows that must be so, one after the other.
        trial: steps between two probations.
        probation: windows of a probation.
        agreement, kept: the least of these scores with which a probation is passed; see `Scores`.
        box: the most that parameters may be away from where they started, `Scores.moved`; beyond, they are drawn back.
        calm: windows without steps after a roll-back; twice as many after each one that follows, up to 16 times.
        back: see `shifted`.
        jump: distance of a window's statistics from those that are followed, of the kind of `Scores.shift`, from which these are taken anew.
        before: frames that statistics count as when others are taken anew.
    """

    warm_up: int = 2
    shifted: float = 0.02
    unsure: float = 0.1
    varied: float = 0.85
    mixed: float = 0.75
    few: float = 0.4
    recent: int = 3
    trial: int = 16
    probation: int = 3
    agreement: float = 0.5
    kept: float = 0.8
    box: float = 0.2
    calm: int = 16
    back: int = 3
    jump: float = 0.3
    before: int = 16


@dataclass(frozen=True)
class Verdict:
    """A decision: after which window, from which state to which, why, and the scores that it was made by."""

    window: int
    before: Phase
    after: Phase
    reason: str
    scores: Scores | None = None

    def plain(self) -> dict[str, Any]:
        """As JSON values."""
        scores = {} if self.scores is None else self.scores.plain()
        return {"window": self.window, "before": self.before.value, "after": self.after.value, "reason": self.reason, **scores}

    def __str__(self) -> str:
        return f"window {self.window}: {self.after.value}: {self.reason}" + ("" if self.scores is None else f" ({self.scores})")


class Guard:
    """Serves windows with an adapter, and decides what adaptation they get.

    Args:
        adapter: the adapter. Parameters that differ from the bundle's, as those of a loaded state do, are the first last good.
        limits: when it does what.
        tell: told of every decision; None: nobody. All are in the log "edgeadapt" and in `verdicts` besides.

    Attributes:
        phase: its state. windows: served so far. scores: of the last one. verdicts: the latest thousand decisions. scalars: what the adapter is to
            predict with until the next window, if it is not the user who set them.

    Raises:
        UsageError: the bundle does not say what its source looks like, or its adapter was opened for predicting only.
    """

    def __init__(self, adapter: Adapter, limits: Limits | None = None, tell: Callable[[Verdict], None] | None = None) -> None:
        manifest = adapter.manifest
        check_guarded(manifest)
        assert manifest.reference is not None
        self.limits, self.phase, self.windows = limits or Limits(), Phase.WARM_UP, 0
        self.scores: Scores | None = None
        self.scalars: dict[str, float] = {}
        self.verdicts: deque[Verdict] = deque(maxlen=_REMEMBERED)
        self._adapter, self._tell, self._reference = adapter, tell, manifest.reference
        with adapter.bundle.stored_state() as start:
            self._shift = Shift(manifest.reference, start)
        self._anchored = "few" in manifest.hyper
        self._follows = manifest.statistics.mode == "live" and not self._anchored  # wholly, with each window
        self._statistics = [spec.name for spec in manifest.state if spec.kind == "statistic"]
        self._learned = [spec.name for spec in manifest.state if spec.kind in LEARNED]
        self._floats = [spec.name for spec in manifest.state if spec.kind == "parameter" and spec.dtype == "float32"]
        self._trains = bool(manifest.planned("adapt")) and bool(adapter.batches["adapt"])
        self._choose_few = self._anchored and "few" not in adapter.hyper.chosen
        self._good: dict[str, Floats] | None = adapter.tensors(self._learned) if self._trains and self._away() > 0 else None
        self._since, self._steps, self._calm, self._failures = 0, 0, 0, 0
        self._shares = np.zeros((0, manifest.task.classes))
        self._spreads: deque[float] = deque(maxlen=self.limits.recent)
        self._quiet, self._renewed = 0, 0
        self._trials: list[Scores] = []
        self._following = False

    # ------------------------------------------------------------------------------------------------------------ serving

    def __call__(self, x: Floats, due: bool = True) -> tuple[Floats, bool]:
        """Logits [N,C] or [N,C,…] of a window, float32 [N,*input.shape], and whether the model was changed by it.

        due: whether a step may be taken on it.

        Raises:
            InputError, UsageError, BudgetError: as the adapter's.
        """
        adapter, before = self._adapter, self._adapter.stats
        step = due and self._trains and self.phase in (Phase.ADAPTING, Phase.COMMITTED) and self._varied()
        held = adapter.tensors(self._statistics)
        mix = self._mixing(len(x))
        natural: Floats | None = None
        if self._follows and not self._following:
            # statistics stay as they are, and those of the window are only looked at
            adapter.predict(x, True, **mix)
            means = adapter.tensors(self._shift.names)
            adapter.put(held)
            natural = logits = adapter.predict(x, update_statistics=False)
            changed = False
        else:
            logits = adapter.adapt(x, **self.scalars, **mix) if step else adapter.predict(x, True, **self.scalars, **mix)
            means = adapter.tensors(self._shift.names)
            after = adapter.stats
            changed = after["steps"] > before["steps"] or (bool(self._statistics) and after["rejected_steps"] == before["rejected_steps"])
            natural = self._natural(x) if self._follows else None
            self._renewed += 1
            if mix and self._shift.apart(held, means, mix["mix"], len(x)) > self.limits.jump:
                self._renewed = 0
        self.windows += 1
        self._steps += adapter.stats["steps"] - before["steps"]
        self._judge(x, logits, means, natural)
        return logits, changed

    def _mixing(self, frames: int) -> dict[str, float]:
        """The weight of a window's statistics, while there is reason to follow it faster than usual: at the beginning and after a jump of the stream.

        The frames since then count as they are many, and what was there before as so many frames as `Limits.before` says.
        """
        if not self._statistics or "mix" not in self._adapter.manifest.hyper or "mix" in self._adapter.hyper.chosen:
            return {}
        usual = self._usual(frames)
        if usual >= 1.0:
            return {}
        return {"mix": max(usual, frames / (self.limits.before + frames * (self._renewed + 1)))}

    def _usual(self, frames: int) -> float:
        manifest = self._adapter.manifest
        graph = manifest.graphs.get(f"predict.b{frames}")
        return manifest.hyper["mix"].default if graph is None else graph.defaults.get("mix", manifest.hyper["mix"].default)

    def _natural(self, x: Floats) -> Floats:
        """Logits with the source's statistics: a window of one class, normalised by its own, looks as if it were of many."""
        adapter = self._adapter
        held = adapter.tensors(self._statistics)
        self._start_of(self._statistics)
        logits = adapter.predict(x, update_statistics=False)
        adapter.put(held)
        return logits

    def _start_of(self, names: list[str]) -> None:
        with self._adapter.bundle.stored_state() as start:
            self._adapter.put({name: start[name] for name in names})

    def _away(self) -> float:
        """How far parameters are from where they started; of those that are held in whole numbers, only whether they are."""
        with self._adapter.bundle.stored_state() as start:
            if self._floats:
                return distance(self._adapter.tensors(self._floats), {name: start[name] for name in self._floats})
            now = self._adapter.tensors(self._learned)
            return math.nan if any((now[name] != start[name]).any() for name in now) else 0.0

    # ------------------------------------------------------------------------------------------------------------ judging

    def _judge(self, x: Floats, logits: Floats, means: Mapping[str, Floats], natural: Floats | None) -> None:
        predicted = Predicted.of(logits)
        if not len(predicted.labels):
            return
        spread = self._spread(predicted if natural is None else Predicted.of(natural))
        mixed = min([spread, *self._spreads]) >= self.limits.mixed
        scores = Scores(self._shift(means, self._frames(len(x)), 0.25 if mixed else 1.0), spread, predicted.entropy - self._reference.entropy)
        if self.phase is Phase.PROBATION:
            scores = self._compared(x, predicted, scores)
        self.scores = scores
        self._spreads.append(spread)
        self._since += 1
        self._quiet = 0 if self._shifted(scores) else self._quiet + 1
        if self._choose_few:
            correlated = self.limits.few if self._shifted(scores) else 1.0
            self.scalars["few"] = 0.0 if min(self._spreads) >= self.limits.mixed else correlated
        if self._follows:
            self._following = self._shifted(scores) and (self._varied() or scores.shift > 0.5) and self.phase is not Phase.PAUSED
            if not self._following:
                self._start_of(self._statistics)
        self._next(scores)

    def _spread(self, predicted: Predicted) -> float:
        """Over as many of the latest frames as a window of the reference has: fewer have fewer classes by themselves."""
        self._shares = np.concatenate([self._shares, predicted.shares])[-max(self._reference.window, len(predicted.shares)) :]
        return spread_of(self._shares) / self._reference.classes

    def _frames(self, frames: int) -> int:
        """Frames that the statistics stand for, where they follow windows of so many: those of a moving average vary as the mean of so many does."""
        if not self._statistics or (self._follows and not self._following):
            return frames
        mix = self._adapter.hyper.chosen.get("mix", self._usual(frames)) if "mix" in self._adapter.manifest.hyper else 1.0
        return round(frames * (2.0 - mix) / max(mix, 1e-3))

    def _shifted(self, scores: Scores) -> bool:
        if math.isnan(scores.shift):
            return scores.entropy >= self.limits.unsure
        return scores.shift >= self.limits.shifted

    def _varied(self) -> bool:
        return len(self._spreads) == self.limits.recent and min(self._spreads) >= self.limits.varied

    def _compared(self, x: Floats, predicted: Predicted, scores: Scores) -> Scores:
        """With what the model would predict on the same frames, with the same statistics, had it learned nothing."""
        adapter = self._adapter
        now, moved = adapter.tensors(self._learned), self._away()
        self._start_of(self._learned)
        first = Predicted.of(adapter.predict(x, update_statistics=False, **self.scalars))
        adapter.put(now)
        same = float((first.labels == predicted.labels).mean())
        found = replace(scores, moved=moved, agreement=same, kept=predicted.spread / first.spread)
        self._trials.append(found)
        return found

    def _next(self, scores: Scores) -> None:
        """On to the next state, where it is time."""
        limits, phase = self.limits, self.phase
        if phase is Phase.WARM_UP:
            if self._since >= limits.warm_up:
                self._go(Phase.OBSERVING, f"after {limits.warm_up} windows", scores)
        elif phase is Phase.PAUSED:
            return
        elif phase is Phase.ROLLED_BACK:
            if self._since >= self._calm:
                self._go(Phase.OBSERVING, f"after {self._calm} windows without steps", scores)
        elif phase is Phase.OBSERVING:
            if self._trains and self._shifted(scores) and self._varied():
                self._steps = 0
                self._go(Phase.ADAPTING, "the stream is shifted, and its windows are of several classes", scores)
        elif phase is Phase.PROBATION:
            if len(self._trials) >= limits.probation:
                self._try(scores)
        elif self._quiet >= limits.back:
            self._start_of(self._learned)
            self._good, self._failures = None, 0
            self._go(Phase.OBSERVING, "the stream is as the source again; what was learned is put aside", scores)
        elif self._steps >= limits.trial or (self._steps and self._spreads[-1] < limits.mixed):
            self._trials = []
            why = f"after {self._steps} steps" if self._steps >= limits.trial else f"predictions narrowed after {self._steps} steps"
            self._go(Phase.PROBATION, why, scores)
        elif phase is Phase.COMMITTED:
            self._go(Phase.ADAPTING, "the stream is still shifted", scores)

    def _try(self, scores: Scores) -> None:
        """The end of a probation."""
        limits, count = self.limits, len(self._trials)
        same, kept = (sum(getattr(one, name) for one in self._trials) / count for name in ("agreement", "kept"))
        found = replace(scores, agreement=same, kept=kept)
        if same >= limits.agreement and kept >= limits.kept:
            note = ""
            if found.moved > limits.box:
                self._draw_back(limits.box / found.moved)
                note = f"; its parameters were drawn back to {limits.box:g} of their norm from where they started"
            self._good, self._steps, self._failures = self._adapter.tensors(self._learned), 0, 0
            self._go(Phase.COMMITTED, f"it predicts as it should on {count} windows{note}", found)
            return
        why = "its predictions are of fewer classes"
        if same < limits.agreement:
            why = f"it agrees with what it started as on {100 * same:.0f} % of frames"
        self.roll_back(why, found)

    def _draw_back(self, share: float) -> None:
        now = self._adapter.tensors(self._floats)
        with self._adapter.bundle.stored_state() as start:
            self._adapter.put({name: start[name] + (now[name] - start[name]) * now[name].dtype.type(share) for name in now})

    def _go(self, phase: Phase, reason: str, scores: Scores | None = None) -> None:
        verdict = Verdict(self.windows, self.phase, phase, reason, scores)
        self.phase, self._since = phase, 0
        self.verdicts.append(verdict)
        LOG.info("guard: %s", verdict)
        if self._tell is not None:
            self._tell(verdict)

    # ------------------------------------------------------------------------------------------------------------ by hand

    def roll_back(self, reason: str = "by hand", scores: Scores | None = None) -> None:
        """Puts the last good parameters back; the second time in a row, or where there are none, those that the bundle began with."""
        self._failures += 1
        if self._good is None or self._failures > 1:
            self._good = None
            self._start_of(self._learned)
            put = "it is as it started"
        else:
            self._adapter.put(self._good)
            put = "the last good is put back"
        self._steps, self._renewed = 0, 0
        self._forget()  # it was of what is put aside, and so are statistics
        self._start_of(self._statistics)
        self._calm = self.limits.calm * 2 ** min(self._failures - 1, 4)
        self._go(Phase.ROLLED_BACK, f"{reason}; {put}", scores)

    def _forget(self) -> None:
        self._spreads.clear()
        self._shares = self._shares[:0]

    def mark_good(self) -> None:
        """Takes the parameters as they are for the last good."""
        self._good, self._failures, self._steps = self._adapter.tensors(self._learned), 0, 0
        self._go(Phase.COMMITTED if self.phase is not Phase.PAUSED else Phase.PAUSED, "marked good by hand", self.scores)

    def reset(self) -> None:
        """Puts the whole state back to what the bundle began with, and begins with the warm-up."""
        self._adapter.reset()
        self._good, self._failures, self._steps, self._quiet, self._renewed, self._following = None, 0, 0, 0, 0, False
        self._forget()
        self._go(Phase.WARM_UP, "reset by hand")

    def pause(self) -> None:
        """No steps until `resume`; windows are scored as before."""
        self._go(Phase.PAUSED, "by hand", self.scores)

    def resume(self) -> None:
        """Goes on with `observing` after a `pause`; otherwise nothing."""
        if self.phase is Phase.PAUSED:
            self._steps = 0
            self._go(Phase.OBSERVING, "resumed by hand", self.scores)

    def settle(self) -> None:
        """Before a state is saved: what was learned and not yet proven is put aside, for the last good or the start."""
        if self.phase not in (Phase.ADAPTING, Phase.PROBATION) or not self._steps:
            return
        if self._good is None:
            self._start_of(self._learned)
        else:
            self._adapter.put(self._good)
        steps, self._steps = self._steps, 0
        self._go(Phase.OBSERVING, f"{steps} steps not yet proven are put aside", self.scores)


def check_guarded(manifest: Manifest) -> None:
    """See that a bundle can be served with a guard.

    Raises:
        UsageError: it does not say what its source looks like.
    """
    if manifest.reference is None:
        raise UsageError("a guard compares a stream with the source, and this bundle does not say what that looks like", "export it with --data")


def guarding_bytes(manifest: Manifest) -> int:
    """The most bytes that a guard holds beside the adapter: copies of what steps change, and of statistics."""
    learned = sum(spec.nbytes for spec in manifest.state if spec.kind in LEARNED)
    statistics = sum(spec.nbytes for spec in manifest.state if spec.kind == "statistic")
    return 3 * learned + 3 * statistics + 2**16


