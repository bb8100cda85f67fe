"""Windows that are as the source, where a model with anchored statistics is to answer as the one that it was made from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from edgeadapt.runtime.adapter import Adapter
from edgeadapt.runtime.learned import Learned, unchanged
from edgeadapt.runtime.phases import Limits
from edgeadapt.runtime.recent import Recent
from edgeadapt.runtime.scores import Predicted
from edgeadapt.runtime.state import Floats

_HALF = 0.5  # of `own`: what frames' own statistics gain under a shift they may cost where there is none
_BEGINS, _LASTS = 0.1, 0.5  # of `Limits.shifted`: mixed shifts look like little of one, window by window


@dataclass(frozen=True, eq=False)
class Look:
    """At a window by the model as it started, from the source's statistics.

    Attributes:
        logits: its own. statistics: what they are after it.
        shift: `Scores.shift` of these. What was learned shapes the inputs of later layers, which then look shifted whatever the stream is.
        source: whether the window is as the source: it is not shifted, and the model as it started is as sure of it as of the source, or no less than
            with what it learned. Of a shift that channel means do not show it is less sure, and what was learned has made it surer.
    """

    logits: Floats
    statistics: dict[str, Floats]
    shift: float
    source: bool


class Calm:
    """Of one adapter.

    Args:
        adapter: the adapter.
        limits: see there.
        source: the tensors that passes change, as they were at the source.
        learned: what steps have changed.
        recent: what the latest predictions look like.
        shift: `Scores.shift` of channel means, by the frames of the window and whether these are of many classes.

    Attributes:
        now: whether the last window was as the source.
    """

    def __init__(
        self,
        adapter: Adapter,
        limits: Limits,
        source: Mapping[str, Floats],
        learned: Learned,
        recent: Recent,
        shift: Callable[[Mapping[str, Floats], int, bool], float],
    ) -> None:
        self._adapter, self._limits, self._source, self._learned, self._recent, self._shift = adapter, limits, source, learned, recent, shift
        self.now = False

    @property
    def possible(self) -> bool:
        """Whether frames have statistics of their own, and users leave it to the guard how much they count."""
        chosen = self._adapter.hyper.chosen
        return {"few", "own"} <= self._adapter.manifest.hyper.keys() and not {"few", "own"} & chosen.keys()

    @property
    def scalars(self) -> dict[str, float]:
        """What windows like the last one are predicted with besides; nothing where users have set such scalars themselves."""
        return self._half if self.now and self.possible else {}

    @property
    def _half(self) -> dict[str, float]:
        return {"own": _HALF * self._adapter.manifest.hyper["own"].default}

    def predict(self, x: Floats, given: Mapping[str, float], whole: bool, again: bool) -> Floats:
        """Logits of a window, which the state follows. With nothing learned in use, whether it is as the source is seen first.

        Args:
            x: its frames.
            given: scalars.
            whole: whether all frames can be used, and together.
            again: whether to predict it anew, with the state as it was, where it turns out to be as the source and the one before was not, or
                the other way round.
        """
        if self._learned.any or not whole or not self.possible:
            self.now = False
            return self._adapter.predict(x, True, **given)
        held = self._adapter.tensors(self._source)
        logits = self._adapter.predict(x, True, **given, **self.scalars)
        before, score = self.scalars, self._shift(self._adapter.tensors(self._source), len(x), self._recent.mixed)
        self.now = score < self._limits.shifted * (_LASTS if self.now else _BEGINS)
        if again and self.scalars != before:
            self._adapter.put(held)
            logits = self._adapter.predict(x, True, **given, **self.scalars)
        return logits

    def look(self, x: Floats, given: Mapping[str, float], trains: bool) -> Look | None:
        """At a window of usable frames. None where nothing learned is in use that is not the start by now, and where windows are of few classes.

        given: the scalars that it would be predicted with. trains: whether steps are taken at all.
        """
        if not (trains and self._learned.in_use) or not self._recent.mixed or not self.possible:
            return None
        adapter, reference = self._adapter, self._adapter.manifest.reference
        with unchanged(adapter, [*self._learned.names, *self._source]):
            self._learned.begin()
            adapter.put(self._source)
            logits = adapter.predict(x, True, few=0.0, **self._half)
            statistics = adapter.tensors(self._source)
        predicted = Predicted.of(logits)
        if reference is None or predicted.spread < self._limits.mixed * reference.classes:
            return None
        shift = self._shift(statistics, len(x), True)
        source = shift < _LASTS * self._limits.shifted
        if source and predicted.entropy - reference.entropy >= self._limits.unsure:
            with unchanged(adapter, self._source):
                source = predicted.entropy <= Predicted.of(adapter.predict(x, True, **given)).entropy
        return Look(logits, statistics, shift, source)

    def answer(self, look: Look) -> Floats:
        """Its logits; the state goes on from the statistics that it ended with, and what was learned stays."""
        self._adapter.put(look.statistics)
        self.now = True
        return look.logits
