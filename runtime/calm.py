"""Windows that are as the source, where a model with anchored statistics is to answer as the one that it was made from."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

from edgeadapt.runtime.adapter import Adapter
from edgeadapt.runtime.phases import Limits
from edgeadapt.runtime.state import Floats

_HALF = 0.5  # of `own`: what frames' own statistics gain under a shift they may cost where there is none
_BEGINS, _LASTS = 0.1, 0.5  # of `Limits.shifted`: mixed shifts look like little of one, window by window


class Calm:
    """Of one adapter with nothing learned in use.

    Args:
        adapter: the adapter.
        limits: see there.
        names: of the tensors that passes change.

    Attributes:
        now: whether the last window was as the source.
    """

    def __init__(self, adapter: Adapter, limits: Limits, names: Collection[str]) -> None:
        self._adapter, self._limits, self._names = adapter, limits, names
        self.now = False

    @property
    def possible(self) -> bool:
        """Whether frames have statistics of their own, and users leave it to the guard how much they count."""
        chosen = self._adapter.hyper.chosen
        return {"few", "own"} <= self._adapter.manifest.hyper.keys() and not {"few", "own"} & chosen.keys()

    @property
    def scalars(self) -> dict[str, float]:
        """What windows like the last one are predicted with besides; nothing where users have set such scalars themselves."""
        return {"own": _HALF * self._adapter.manifest.hyper["own"].default} if self.now and self.possible else {}

    def predict(self, x: Floats, given: Mapping[str, float], shift: Callable[[], float], again: bool) -> Floats:
        """Logits of a window, which the state follows.

        Args:
            x: its frames.
            given: scalars.
            shift: gives the window's `Scores.shift` once the state has followed it.
            again: whether to predict it anew, with the state as it was, where it turns out to be as the source and the one before was not, or
                the other way round.
        """
        held = self._adapter.tensors(self._names)
        logits = self._adapter.predict(x, True, **given, **self.scalars)
        before, score = self.scalars, shift()
        self.now = score < self._limits.shifted * (_LASTS if self.now else _BEGINS)
        if again and self.scalars != before:
            self._adapter.put(held)
            logits = self._adapter.predict(x, True, **given, **self.scalars)
        return logits
