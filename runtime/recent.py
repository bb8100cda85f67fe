"""What the latest predictions of a stream look like together: of how many classes they are, and whether these come in runs."""

from __future__ import annotations

from collections import deque

import numpy as np

from edgeadapt.bundle.reference import Reference
from edgeadapt.runtime.phases import Limits
from edgeadapt.runtime.scores import Predicted, runs_of, spread_of

_FEWEST, _RUNS = 128, 256  # frames whose predictions tell whether classes come in runs, at least and at most


class Recent:
    """Of one stream.

    Args:
        reference: what windows of the source look like.
        classes: of the model.
        limits: see there.

    Attributes:
        spreads: of the latest windows, `Scores.spread`, as many as `Limits.recent` says.
        runs: `Scores.runs` as of the last window.
    """

    def __init__(self, reference: Reference, classes: int, limits: Limits) -> None:
        self._reference, self._limits, self._classes = reference, limits, classes
        self.spreads: deque[float] = deque(maxlen=limits.recent)
        self.clear()

    def clear(self) -> None:
        """They were another model's."""
        self.spreads.clear()
        self._shares = np.zeros((0, self._classes))
        self._labels = np.zeros(0, np.int32)
        self.runs = np.nan

    def add(self, predicted: Predicted, natural: Predicted) -> float:
        """One more window, by the predictions that were given and by those that its spread is to be taken of; gives its spread.

        That is over as many of the latest frames as a window of the reference has: fewer have fewer classes by themselves.
        """
        self._shares = np.concatenate([self._shares, natural.shares])[-max(self._reference.window, len(natural.shares)) :]
        self.spreads.append(spread_of(self._shares) / self._reference.classes)
        if predicted.labels.ndim == 1:
            self._labels = np.concatenate([self._labels, predicted.labels])[-_RUNS:]
        self.runs = runs_of(self._labels, _FEWEST)
        return self.spreads[-1]

    @property
    def known(self) -> bool:
        """Whether there were as many frames as a window of the reference has."""
        return len(self._shares) >= self._reference.window

    @property
    def mixed(self) -> bool:
        """Whether the latest windows are of many classes."""
        return min(self.spreads, default=0.0) >= self._limits.mixed

    @property
    def varied(self) -> bool:
        """Whether they are of so many that steps may be taken on them, and there were enough of them."""
        return len(self.spreads) == self._limits.recent and min(self.spreads) >= self._limits.varied
