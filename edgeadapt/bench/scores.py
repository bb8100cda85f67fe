"""From what came of each frame to figures with intervals. Images are what is sampled anew: all frames of one image stay together.

Intervals are percentile bootstrap intervals (Efron 1979) that hold 95 % of the draws. Frames of one image under several corruptions, rounds or seeds
are no independent samples, so a draw takes images, not frames (a cluster bootstrap). Errors are in percent of scored frames, or of their pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeadapt.errors import UsageError

DRAWS, LEVEL, BINS = 2000, 0.95, 15

Floats = NDArray[np.float64]
Statistic = Callable[[Floats, Floats], Floats]
"""From sums and counts of groups, both float64 (draws, groups), to values (draws, k); NaN where there is none."""

_CELLS = 2_000_000  # numbers in a block of draws: 16 MB


@dataclass(frozen=True)
class Estimate:
    """A value, and the bounds between which 95 % of the draws lie; they are NaN where too many draws have no value."""

    value: float
    low: float
    high: float

    @property
    def half(self) -> float:
        """Half the interval's width."""
        return (self.high - self.low) / 2


@dataclass(frozen=True, eq=False)
class Outcome:
    """What came of the scored frames of a run, or of several runs together.

    Attributes:
        wrong: float64 (F,), 0 or 1, or the share of a frame's pixels that is wrong.
        confidence: float64 (F,), the probability of what was chosen; NaN where the prediction was not finite.
        index: int64 (F,), each frame's image.
        domain: int64 (F,), place in `domains`.
        round: int64 (F,).
        seed: int64 (F,), the stream's.
        domains: names.
    """

    wrong: Floats
    confidence: Floats
    index: NDArray[np.int64]
    domain: NDArray[np.int64]
    round: NDArray[np.int64]
    seed: NDArray[np.int64]
    domains: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.wrong)

    def of(self, domain: str) -> Outcome:
        """The frames of one domain."""
        return self.where(self.domain == (self.domains.index(domain) if domain in self.domains else -1))

    def where(self, chosen: NDArray[np.bool_]) -> Outcome:
        """Some of the frames."""
        arrays: dict[str, Any] = {name: getattr(self, name)[chosen] for name in _COLUMNS}
        return replace(self, **arrays)


_COLUMNS = ("wrong", "confidence", "index", "domain", "round", "seed")


def together(outcomes: Sequence[Outcome]) -> Outcome:
    """Runs over the same images with other seeds, as one.

    Raises:
        UsageError: there are none, or their domains differ.
    """
    if not outcomes or any(one.domains != outcomes[0].domains for one in outcomes):
        raise UsageError("runs of different streams cannot be taken together", "give runs of one stream")
    arrays: dict[str, Any] = {name: np.concatenate([getattr(one, name) for one in outcomes]) for name in _COLUMNS}
    return replace(outcomes[0], **arrays)


def error(outcome: Outcome, seed: int = 0, draws: int = DRAWS) -> Estimate | None:
    """Percent wrong; None where nothing is scored."""
    return _resampled([outcome.wrong], outcome.index, np.zeros(len(outcome), np.int64), 1, _percent, seed, draws)[0]


def by_domain(outcome: Outcome, seed: int = 0, draws: int = DRAWS) -> dict[str, Estimate]:
    """`error` of each domain that has scored frames, in the order of the domains."""
    found = _resampled([outcome.wrong], outcome.index, outcome.domain, len(outcome.domains), _percent, seed, draws)
    return {name: value for name, value in zip(outcome.domains, found) if value is not None}


def by_round(outcome: Outcome, seed: int = 0, draws: int = DRAWS) -> list[Estimate]:
    """`error` of each round that has scored frames, from the first."""
    found = _resampled([outcome.wrong], outcome.index, outcome.round, int(outcome.round.max(initial=0)) + 1, _percent, seed, draws)
    return [value for value in found if value is not None]


def slope(outcome: Outcome, seed: int = 0, draws: int = DRAWS) -> Estimate | None:
    """Points of percent by which the error changes from round to round: the slope of a straight line by least squares. None for one round."""
    rounds = int(outcome.round.max(initial=0)) + 1
    if rounds < 2:
        return None
    steps = np.arange(rounds) - (rounds - 1) / 2

    def fitted(sums: Floats, counts: Floats) -> Floats:
        return (_percent(sums, counts) @ steps / (steps @ steps))[:, None]

    return _resampled([outcome.wrong], outcome.index, outcome.round, rounds, fitted, seed, draws)[0]


def forgetting(outcome: Outcome, before: str, after: str, seed: int = 0, draws: int = DRAWS) -> Estimate | None:
    """Points of percent by which the error on clean frames after a shift lies above that before it, in one run. None where either is missing."""
    kept = outcome.where(np.isin(outcome.domain, [place for place, name in enumerate(outcome.domains) if name in (before, after)]))
    if before not in kept.domains or after not in kept.domains:
        return None
    groups = (kept.domain == kept.domains.index(after)).astype(np.int64)

    def rise(sums: Floats, counts: Floats) -> Floats:
        return np.diff(_percent(sums, counts))

    return _resampled([kept.wrong], kept.index, groups, 2, rise, seed, draws)[0]


def calibration(outcome: Outcome, bins: int = BINS) -> float | None:
    """Expected calibration error in percent: over bins of equal width, the mean distance of confidence and accuracy, weighted by frames.

    Guo et al. 2017, "On Calibration of Modern Neural Networks", equation 5.
    Bin b holds confidences in (b / bins, (b + 1) / bins], the first 0 too. Frames without a finite prediction are left out; None where none is left.
    """
    known = np.isfinite(outcome.confidence)
    confidence, right = outcome.confidence[known], 1 - outcome.wrong[known]
    if not len(confidence):
        return None
    places = np.clip(np.ceil(confidence * bins).astype(np.int64) - 1, 0, bins - 1)
    gap = np.bincount(places, right - confidence, bins)
    return float(100 * np.abs(gap).sum() / len(confidence))


def paired(a: Outcome, b: Outcome, seed: int = 0, draws: int = DRAWS) -> Estimate | None:
    """Points of percent by which the error of `a` lies above that of `b`, frame by frame over the same frames. None where nothing is scored.

    Raises:
        UsageError: the two did not see the same frames.
    """
    _same(a, b)
    return _resampled([a.wrong - b.wrong], a.index, np.zeros(len(a), np.int64), 1, _percent, seed, draws)[0]


def gain_kept(guarded: Outcome, unguarded: Outcome, without: Outcome, seed: int = 0, draws: int = DRAWS) -> Estimate | None:
    """The share of adaptation's gain that is left with a guard: (E_without - E_guarded) / (E_without - E_unguarded).

    1 keeps all of it; below 0 the guarded model is worse than one that does not adapt.

    Args:
        guarded: adapting with the guard.
        unguarded: adapting without it.
        without: not adapting.
        seed: of the draws.
        draws: their number.

    Returns:
        None where adapting without a guard gains nothing, so that there is nothing to keep. Its bounds are NaN where more than a 40th of the draws
        have no gain.

    Raises:
        UsageError: the three did not see the same frames.
    """
    _same(guarded, without)
    _same(unguarded, without)
    gains = [without.wrong - guarded.wrong, without.wrong - unguarded.wrong]

    def ratio(sums: Floats, _: Floats) -> Floats:
        return np.divide(sums[:, :1], sums[:, 1:], out=np.full((len(sums), 1), np.nan), where=sums[:, 1:] > 0)

    return _resampled(gains, without.index, np.zeros(len(without), np.int64), 1, ratio, seed, draws)[0]


def _same(a: Outcome, b: Outcome) -> None:
    alike = a.domains == b.domains and all(np.array_equal(getattr(a, name), getattr(b, name)) for name in ("index", "domain", "round", "seed"))
    if not alike:
        raise UsageError("two runs can be compared only over the same frames", "give runs of one stream with one seed")


def _percent(sums: Floats, counts: Floats) -> Floats:
    return 100 * np.divide(sums, counts, out=np.full(sums.shape, np.nan), where=counts > 0)


def _resampled(
    values: Sequence[Floats], index: NDArray[np.int64], group: NDArray[np.int64], groups: int, statistic: Statistic, seed: int, draws: int
) -> list[Estimate | None]:
    """Statistics of sums over groups of frames, with the intervals that drawing images with replacement gives; None for one that has no value.

    Args:
        values: each (F,); their sums stand one after another in what the statistic is given, `groups` of each.
        index: (F,), each frame's image.
        group: (F,), 0 to groups - 1.
        groups: their number.
        statistic: of sums and counts.
        seed: of the draws.
        draws: their number.
    """
    images, places = np.unique(index, return_inverse=True)
    size = len(images)
    cells = places.reshape(-1) * groups + group
    sums = np.concatenate([np.bincount(cells, value, size * groups).reshape(size, groups) for value in values], axis=1)
    counts = np.bincount(cells, minlength=size * groups).reshape(size, groups).astype(np.float64)
    whole = statistic(sums.sum(0, keepdims=True), counts.sum(0, keepdims=True))[0]
    if not np.isfinite(whole).any():
        return [None] * len(whole)
    drawn = np.concatenate([statistic(times @ sums, times @ counts) for times in _times(size, seed, draws)])
    return [Estimate(float(value), *_bounds(column)) if np.isfinite(value) else None for value, column in zip(whole, drawn.T)]


def _times(size: int, seed: int, draws: int) -> Iterator[Floats]:
    """How often each of `size` images is in each draw, float64 (n, size), block by block."""
    rng, block = np.random.default_rng(seed), max(1, _CELLS // size)
    for first in range(0, draws, block):
        count = min(block, draws - first)
        chosen = rng.integers(0, size, (count, size)) + size * np.arange(count)[:, None]
        yield np.bincount(chosen.reshape(-1), minlength=count * size).reshape(count, size).astype(np.float64)


def _bounds(drawn: Floats) -> tuple[float, float]:
    known = drawn[np.isfinite(drawn)]
    if len(known) < len(drawn) * (1 + LEVEL) / 2:
        return float("nan"), float("nan")
    low, high = np.quantile(known, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
