"""The model beside the one that it started as, on the same frames, while it is on probation."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from edgeadapt.runtime.adapter import Adapter
from edgeadapt.runtime.following import Following
from edgeadapt.runtime.learned import Learned, unchanged
from edgeadapt.runtime.phases import Trial
from edgeadapt.runtime.scores import Predicted, Scores
from edgeadapt.runtime.state import Floats

_FOREIGN = 0.25  # of the statistics of a model that learned nothing may come from one that did, where both are compared
_PATIENCE = 48  # windows after which they are compared all the same


class Comparing:
    """Of one adapter.

    Args:
        adapter: the adapter.
        learned: what steps have changed. passing: names of the tensors that passes change.
        ways: how statistics follow.

    Attributes:
        trial: what the probation has seen that goes on.
    """

    def __init__(self, adapter: Adapter, learned: Learned, passing: Collection[str], ways: Following) -> None:
        self._adapter, self._learned, self._passing, self._ways = adapter, learned, passing, ways
        self.trial = Trial()

    def scored(self, x: Floats, predicted: Predicted, scores: Scores, whole: bool, stays: bool, given: Mapping[str, float]) -> Scores:
        """Scores of a window with what the model would predict on its frames, had it learned nothing.

        Args:
            x, predicted, scores: the window, and what is known of it.
            whole: whether all frames can be used, and together.
            stays: whether the model is normalised by the source's statistics.
            given: scalars.
        """
        moved = self._learned.away()
        with unchanged(self._adapter, [*self._learned.names, *self._passing]):
            self._learned.begin()
            first = Predicted.of(self._unlearned(x, whole, stays, given))
        if self.trial.foreign <= _FOREIGN or self.trial.looked >= _PATIENCE:
            self.trial.add(predicted, first)
        return replace(scores, moved=moved, agreement=predicted.agreement(first), kept=predicted.spread / first.spread)

    def _unlearned(self, x: Floats, whole: bool, stays: bool, given: Mapping[str, float]) -> Floats:
        """Logits of what the model started as, by statistics that follow the windows of a probation by themselves.

        What steps have changed shapes the inputs of later layers, whose statistics are then no more those of a model without these steps.
        """
        adapter, trial = self._adapter, self.trial
        if stays:
            trial.passed, trial.looked, trial.foreign = None, 0, 0.0
            return adapter.predict(x, update_statistics=False, **given)
        if trial.passed is None:
            trial.foreign = 1.0
        else:
            adapter.put(trial.passed)
            trial.passed = None  # before there is another
        mix = self._ways.mixing(len(x), trial.looked) if whole else {}
        logits = adapter.predict(x, True, **given, **mix)
        trial.passed = adapter.tensors(self._passing)
        trial.foreign *= 1.0 - mix["mix"] if mix else self._ways.remains
        trial.looked = trial.looked + 1 if self._ways.renewed else 0  # the stream has jumped, and the other's begin anew as well
        return logits
