"""What can be told, without labels, of how a stream differs from the source and of what adaptation has done to a model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeadapt.bundle.reference import EPS, FRAMES, Reference
from edgeadapt.runtime.state import Floats

DOUBT = 0.02
"""Distance beyond chance at which a layer counts as half shifted."""
STATISTICS = "statistics."
_BLOCK = 2**14


@dataclass(frozen=True)
class Scores:
    """Of one window.

    Attributes:
        shift: from 0 (as the source, whatever the classes) to 1: the mean over layers of e/(e + 0.02), e being D² of the stream's channel means from
            the source's beyond what such windows have there. NaN where statistics do not follow the stream.
        spread: how many classes the mean prediction of the window, or of the latest 64 frames where it has fewer, is spread over (exponential of its
            entropy), as a share of that on the source.
        entropy: mean entropy of the predictions in nats, less that on the source.
        runs: of the latest 256 predictions, see `runs_of`. NaN where there are fewer than 128, or a frame has many.
        moved: distance of the parameters from where they started, as a share of their norm there. NaN where it was not looked at.
        agreement: share of frames on which the model and the one that it started as predict the same. NaN where it was not looked at.
        kept: spread, as a share of that of the model that it started as on the same frames. NaN where it was not looked at.
    """

    shift: float
    spread: float
    entropy: float
    runs: float = math.nan
    moved: float = math.nan
    agreement: float = math.nan
    kept: float = math.nan

    def plain(self) -> dict[str, float]:
        """Those that were looked at, rounded, for a log."""
        return {name: round(value, 4) for name, value in vars(self).items() if not math.isnan(value)}

    def __str__(self) -> str:
        return ", ".join(f"{name} {value:.3g}" for name, value in self.plain().items())


class Shift:
    """How far normalisation statistics have left the source's.

    Args:
        reference: what windows of the source look like.
        start: the statistics as they were at the source, by their names in the state.
    """

    def __init__(self, reference: Reference, start: Mapping[str, NDArray[Any]]) -> None:
        named = {f"{STATISTICS}{name}": chance for name, chance in reference.layers.items()}
        self._layers = [
            (f"{name}.mean", np.array(start[f"{name}.mean"]), 1.0 / (start[f"{name}.variance"] + EPS), chance)
            for name, chance in named.items()
            if f"{name}.mean" in start
        ]

    @property
    def names(self) -> tuple[str, ...]:
        """Of the tensors that it reads."""
        return tuple(name for name, *_ in self._layers)

    def __call__(self, means: Mapping[str, Floats], frames: int, few: float = 1.0) -> float:
        """The score of channel means of so many frames; see `Scores.shift`. NaN without layers.

        few: how much of what windows of few classes have by themselves is no shift, from 0 to 1.
        """
        return self._score({name: means[name] - centre for name, centre, *_ in self._layers}, frames, few)

    def apart(self, before: Mapping[str, Floats], after: Mapping[str, Floats], mix: float, frames: int) -> float:
        """The same score of how far a window's own channel means lie from those that were followed until then.

        Args:
            before: means that were followed.
            after: what they are with the window's, whose weight is `mix`.
            mix: above 0.
            frames: in the window.
        """
        return self._score({name: (after[name] - before[name]) / np.float32(mix) for name, *_ in self._layers}, frames, 1.0)

    def _score(self, aways: Mapping[str, Floats], frames: int, few: float) -> float:
        if not self._layers:
            return math.nan
        total = 0.0
        for name, _, precision, chance in self._layers:
            away = aways[name]
            # fewer frames than the reference's windows differ more by chance
            known = chance.mixed + few * (chance.alike - chance.mixed) + chance.mixed * max(0.0, FRAMES / frames - 1.0)
            beyond = max(0.0, float((away * away * precision).mean()) - known)
            total += beyond / (beyond + DOUBT)
        return total / len(self._layers)


@dataclass(frozen=True)
class Predicted:
    """What logits [N,C] or [N,C,…] say.

    Attributes:
        shares: float64 [M,C]: soft-max, and the mean over positions, of the M frames whose logits are finite.
        labels: int32 [N] or [N,…]; -1 where they are not.
        entropy: in nats, the mean of all; NaN of none.
    """

    shares: NDArray[np.float64]
    labels: NDArray[np.int32]
    entropy: float

    @classmethod
    def of(cls, logits: Floats) -> Predicted:
        """Of a window's logits; frame by frame, so that little is held beside them."""
        count, classes = logits.shape[:2]
        shares, labels, unsure = np.zeros((count, classes)), np.full((count, *logits.shape[2:]), -1, np.int32), np.zeros(count)
        good = np.array([bool(np.isfinite(frame).all()) for frame in logits])
        for index in np.flatnonzero(good):
            made = np.exp(logits[index] - logits[index].max(0))
            made /= made.sum(0)
            labels[index] = made.argmax(0)
            shares[index] = made.reshape(classes, -1).mean(1, dtype=np.float64)
            unsure[index] = -(made * np.log(np.maximum(made, 1e-12))).sum(0).mean(dtype=np.float64)
        return cls(shares[good], labels, float(unsure[good].mean()) if good.any() else math.nan)

    @property
    def spread(self) -> float:
        """Of these frames; see `spread_of`."""
        return spread_of(self.shares)

    def agreement(self, other: Predicted) -> float:
        """Share of places where both say the same, of those where one says anything; where only one does they do not. NaN of none."""
        known = (self.labels >= 0) | (other.labels >= 0)
        return float((self.labels == other.labels)[known].mean()) if known.any() else math.nan


def spread_of(shares: NDArray[np.float64]) -> float:
    """How many classes the mean of predictions [N,C] is spread over: the exponential of its entropy, from 1 to C. NaN of none."""
    if not len(shares):
        return math.nan
    mean = shares.mean(0)
    return float(np.exp(-(mean * np.log(np.maximum(mean, 1e-12))).sum()))


def distance(now: Mapping[str, Floats], start: Mapping[str, NDArray[Any]]) -> float:
    """Distance of all tensors together from where they started, as a share of their norm there."""
    away, size = 0.0, 0.0
    for name, value in now.items():
        one, other = value.reshape(-1), np.reshape(start[name], -1)
        for at in range(0, len(one), _BLOCK):  # in double precision, and little of it held
            begun = other[at : at + _BLOCK].astype(np.float64)
            gone = one[at : at + _BLOCK] - begun
            away, size = away + float(gone @ gone), size + float(begun @ begun)
    return math.sqrt(away / max(size, 1e-12))


def runs_of(labels: NDArray[np.int32], fewest: int = 2) -> float:
    """How much more often neighbours among predictions [N] are the same than if these came in any order, as a share of the most.

    0 where they are shuffled, 1 in runs, and where all are the same. NaN of fewer than `fewest`. Frames without a prediction, -1, are left out. One
    class that lasts longer than all of them, mistaken here and there for others, looks shuffled.
    """
    known = labels[labels >= 0]
    if len(known) < fewest:
        return math.nan
    shares = np.bincount(known) / len(known)
    chance = float(shares @ shares)
    return 1.0 if chance == 1.0 else (float((known[1:] == known[:-1]).mean()) - chance) / (1.0 - chance)
