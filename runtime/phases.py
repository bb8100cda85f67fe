"""The states of a guard, when it goes from one to another, and what it says and remembers of that.

The states and what leads from one to the next:

    warm-up      statistics follow where that is safe; nothing is judged yet
    observing    the same, and every window is scored; on to `adapting` where the stream is shifted and its windows are of several classes, or with
                 what is laid by to `probation`
    adapting     a step on each window of several classes; after `trial` of them, where predictions narrow, or where no step was possible for long, on
                 to `probation`
    probation    no steps; the model is compared, on the same frames, with the one that it started as; on to `committed` or `rolled back`, or, where
                 its frames are of few classes for too long, back to `observing` without what was not proven
    committed    for one window: what was learned is the last good from now on; then `adapting` again
    rolled back  the last good, or after two in a row the start, is put back; no steps for a while, twice as long after each; then `observing`
    paused       by whoever uses it, until `resume`

Where the stream is the source again, or what was learned is of no use on it, that is put aside, and it goes on with `observing` from the start; what
was proven is laid by, and goes from `observing` to `probation` when it may be of use again.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np

from edgeadapt.runtime.scores import Predicted, Scores, spread_of


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
        far: `Scores.shift` from which statistics that follow a window wholly do so whatever its classes; half of that once they do.
        unsure: for models whose statistics do not follow, entropy in nats above the source's that counts as shifted.
        varied: `Scores.spread` of windows that steps may be taken on.
        mixed: of windows that statistics may follow in all layers; below, predictions are narrow.
        runs: `Scores.runs` below which frames come as if shuffled.
        least, narrow: of windows that statistics may follow at all, where these are anchored: `least` where frames come as if shuffled, and else
            `narrow`.
        few: the scalar `few` of anchored statistics where the stream is shifted and its windows are between that and `mixed`. It is 0 where windows
            are mixed.
        none: the same otherwise: only what is so many times as far as windows of few classes go at the source is followed.
        recent: windows that must be so, one after the other.
        trial: steps between two probations.
        probation: windows of a probation.
        agreement, kept: the least of these scores with which a probation is passed; see `Scores`.
        box: the most that parameters may be away from where they started, `Scores.moved`; beyond, they are drawn back.
        most: `Scores.moved` beyond which they are not drawn back but rolled back, whatever they predict.
        calm: windows without steps after a roll-back; twice as many after each one that follows, up to 16 times. Also windows of few classes after
            which a probation ends without having proven anything; with what was learned while statistics followed wholly it ends at once.
        back: see `shifted`.
        idle: windows without a step after which what was learned is to be proven all the same.
        jump: distance of a window's statistics from those that are followed, of the kind of `Scores.shift`, from which these are taken anew.
        before: frames that statistics count as when others are taken anew.
    """

    warm_up: int = 2
    shifted: float = 0.02
    far: float = 0.5
    unsure: float = 0.1
    varied: float = 0.85
    mixed: float = 0.75
    runs: float = 0.1
    least: float = 0.3
    narrow: float = 0.65
    few: float = 0.4
    none: float = 10.0
    recent: int = 3
    trial: int = 16
    probation: int = 3
    agreement: float = 0.5
    kept: float = 0.8
    box: float = 0.2
    most: float = 1.0
    calm: int = 16
    back: int = 3
    idle: int = 8
    jump: float = 0.3
    before: int = 16


PUT_BACK = ("the last good is put back", "it is as it started")
"""What reasons of roll-backs end with."""


@dataclass(frozen=True)
class Verdict:
    """A decision: after which window, from which state to which, why, and the scores that it was made by."""

    window: int
    before: Phase
    after: Phase
    reason: str
    scores: Scores | None = None

    @property
    def rolled_back(self) -> bool:
        """Whether what was learned was put back, for the last good or the start; a pause stays one where it is."""
        return self.after is Phase.ROLLED_BACK or self.reason.endswith(PUT_BACK)

    def plain(self) -> dict[str, Any]:
        """As JSON values."""
        scores = {} if self.scores is None else self.scores.plain()
        return {"window": self.window, "before": self.before.value, "after": self.after.value, "reason": self.reason, **scores}

    def __str__(self) -> str:
        return f"window {self.window}: {self.after.value}: {self.reason}" + ("" if self.scores is None else f" ({self.scores})")


@dataclass
class Trial:
    """What a probation has seen, of the model and of the one that learned nothing: sums of their predictions, entropies, agreement.

    looked, passed, foreign: of the model that learned nothing, windows that its statistics have followed, these and all else that passes change, and
    how much of them is still from the model that learned. Windows in which that is much are not among `windows`, unless it does not become less.
    """

    looked: int = 0
    passed: Any = None
    foreign: float = 1.0
    windows: int = 0
    frames: int = 0
    mine: Any = 0.0
    first: Any = 0.0
    agreed: float = 0.0
    unsure: float = 0.0

    def add(self, mine: Predicted, first: Predicted) -> None:
        """One more window."""
        count = len(mine.shares)
        self.windows, self.frames = self.windows + 1, self.frames + count
        self.mine, self.first = self.mine + mine.shares.sum(0), self.first + first.shares.sum(0)
        self.agreed += count * mine.agreement(first)
        self.unsure += count * first.entropy

    @property
    def kept(self) -> float:
        """`Scores.kept` of all windows."""
        return spread_of(np.asarray([self.mine / self.frames])) / self.varied

    @property
    def varied(self) -> float:
        """Classes that the model that learned nothing sees."""
        return spread_of(np.asarray([self.first / self.frames]))
