"""The bench's figures: against slow plain versions, and intervals against what they promise."""

from __future__ import annotations

import math

import numpy as np
import pytest

from edgeadapt.bench.scores import Outcome, by_domain, by_round, calibration, error, forgetting, gain_kept, paired, slope, together
from edgeadapt.errors import UsageError

pytestmark = pytest.mark.device

DRAWS = 200


def outcome(wrong, index=None, domain=None, domains=("a",), confidence=None, rounds=None, seed=0) -> Outcome:
    wrong = np.asarray(wrong, np.float64)
    count = len(wrong)
    return Outcome(
        wrong,
        np.full(count, 0.5) if confidence is None else np.asarray(confidence, np.float64),
        np.arange(count) if index is None else np.asarray(index),
        np.zeros(count, np.int64) if domain is None else np.asarray(domain),
        np.zeros(count, np.int64) if rounds is None else np.asarray(rounds),
        np.full(count, seed),
        domains,
    )


def drawn(one: Outcome, statistic, seed: int = 0, draws: int = DRAWS) -> tuple[float, float]:
    """The interval by picking images and collecting their frames, one draw at a time."""
    rng, found = np.random.default_rng(seed), []
    images = np.unique(one.index)
    for chosen in rng.integers(0, len(images), (draws, len(images))):
        frames = np.concatenate([np.flatnonzero(one.index == images[k]) for k in chosen])
        found.append(statistic(frames))
    return tuple(np.quantile(found, [0.025, 0.975]).tolist())


def some_outcome(seed: int = 0, count: int = 90, images: int = 20) -> Outcome:
    rng = np.random.default_rng(seed)
    index = rng.integers(0, images, count) * 7 + 3  # frames an image differ in number, numbers have gaps
    domain = rng.integers(0, 3, count)
    return outcome(rng.random(count) < 0.3, index, domain, ("a", "b", "c"), rng.random(count), rng.integers(0, 4, count))


def test_the_error_and_its_interval_are_those_of_plain_loops():
    one = some_outcome()
    found = error(one, draws=DRAWS)
    assert found.value == pytest.approx(100 * one.wrong.mean())
    assert (found.low, found.high) == pytest.approx(drawn(one, lambda frames: 100 * one.wrong[frames].mean()))
    assert error(one, draws=DRAWS) == found != error(one, seed=1, draws=DRAWS)


def test_a_difference_and_its_interval_are_those_of_plain_loops():
    one = some_outcome()
    other = outcome(np.roll(one.wrong, 1), one.index, one.domain, one.domains, one.confidence, one.round)
    found = paired(one, other, draws=DRAWS)
    assert found.value == pytest.approx(100 * (one.wrong - other.wrong).mean())
    assert (found.low, found.high) == pytest.approx(drawn(one, lambda frames: 100 * (one.wrong - other.wrong)[frames].mean()))
    assert paired(one, one).low == paired(one, one).high == 0


def test_the_slope_over_rounds_and_its_interval_are_those_of_plain_loops():
    one = some_outcome(3, 400, 30)

    def line(frames):
        means = [100 * one.wrong[frames][one.round[frames] == r].mean() for r in range(4)]
        return np.polyfit(range(4), means, 1)[0]

    found = slope(one, draws=DRAWS)
    assert found.value == pytest.approx(line(np.arange(400)))
    assert (found.low, found.high) == pytest.approx(drawn(one, line))
    assert [value.value for value in by_round(one, draws=9)] == pytest.approx([100 * one.wrong[one.round == r].mean() for r in range(4)])
    assert slope(outcome([0, 1])) is None


def test_forgetting_is_what_clean_frames_lose():
    one = some_outcome(5, 300, 25)
    found = forgetting(one, "a", "c", draws=DRAWS)

    def rise(frames):
        wrong, domain = one.wrong[frames], one.domain[frames]
        return 100 * (wrong[domain == 2].mean() - wrong[domain == 0].mean())

    assert found.value == pytest.approx(rise(np.arange(300)))
    kept = one.where(one.domain != 1)

    def rise_of_kept(frames):
        wrong, domain = kept.wrong[frames], kept.domain[frames]
        return 100 * (wrong[domain == 2].mean() - wrong[domain == 0].mean())

    assert (found.low, found.high) == pytest.approx(drawn(kept, rise_of_kept))
    assert forgetting(one, "a", "d") is None
    assert forgetting(one.of("a"), "a", "c") is None


def test_errors_by_domain_are_those_of_its_frames():
    one = some_outcome()
    found = by_domain(one, draws=DRAWS)
    assert list(found) == ["a", "b", "c"]
    assert found["b"].value == pytest.approx(100 * one.wrong[one.domain == 1].mean())
    expected = drawn(one, lambda frames: 100 * one.wrong[frames][one.domain[frames] == 1].mean())
    assert (found["b"].low, found["b"].high) == pytest.approx(expected)
    assert found["b"].half == pytest.approx(error(one.of("b")).half, rel=0.2)
    assert list(by_domain(one.where(one.domain != 0), draws=9)) == ["b", "c"]


def test_intervals_hold_the_truth_as_often_as_they_say():
    """Images of their own difficulty, three frames each: intervals over images cover, those that take frames for independent do not."""
    rng, covers, naive, times = np.random.default_rng(11), 0, 0, 300
    for number in range(times):
        hard = rng.random(60) < 0.3
        wrong = np.repeat(hard, 3) ^ (rng.random(180) < 0.05)
        truth = 100 * (0.3 * 0.95 + 0.7 * 0.05)
        found = error(outcome(wrong, np.repeat(np.arange(60), 3)), seed=number, draws=300)
        alone = error(outcome(wrong), seed=number, draws=300)
        covers += found.low <= truth <= found.high
        naive += alone.low <= truth <= alone.high
    assert 0.91 <= covers / times <= 0.98  # a standard error of 1.3 points around 95
    assert naive / times < 0.85


def test_a_paired_interval_is_narrower_than_two_apart():
    rng = np.random.default_rng(2)
    hard = rng.random(400) < 0.4
    a, b = outcome(hard ^ (rng.random(400) < 0.05)), outcome(hard)
    found = paired(a, b)
    assert found.half < 0.6 * math.hypot(error(a).half, error(b).half)


def test_only_the_same_frames_are_compared():
    one = some_outcome()
    for other in (some_outcome(1), one.of("a"), outcome(one.wrong, one.index, one.domain, ("a", "b", "d"), one.confidence, one.round)):
        with pytest.raises(UsageError, match="only over the same frames"):
            paired(one, other)
    with pytest.raises(UsageError, match="only over the same frames"):
        gain_kept(one, one, some_outcome(1))


def test_calibration_is_that_of_a_plain_loop_and_nought_for_the_calibrated():
    rng = np.random.default_rng(4)
    confidence = np.concatenate([rng.random(500), [0.0, 1.0, 1 / 15]])
    wrong = rng.random(503) < 0.4
    total = 0.0
    for b in range(15):
        mine = (confidence > b / 15) & (confidence <= (b + 1) / 15) | ((confidence == 0) & (b == 0))
        if mine.any():
            total += mine.mean() * abs((1 - wrong[mine]).mean() - confidence[mine].mean())
    assert calibration(outcome(wrong, confidence=confidence)) == pytest.approx(100 * total)
    many = np.repeat(np.arange(1, 10) / 10, 5000)
    assert calibration(outcome(rng.random(len(many)) >= many, confidence=many)) < 1.5
    assert calibration(outcome([1, 1], confidence=[0.9, 0.9])) == pytest.approx(90)


def test_predictions_that_are_not_finite_are_left_out_of_calibration_only():
    one = outcome([0, 1, 1], confidence=[1.0, np.nan, np.nan])
    assert calibration(one) == 0
    assert error(one).value == pytest.approx(200 / 3)
    assert calibration(outcome([1.0], confidence=[np.nan])) is None


def test_the_gain_that_a_guard_keeps():
    rng = np.random.default_rng(6)
    without = outcome(rng.random(2000) < 0.5)
    better = outcome(without.wrong * (rng.random(2000) < 0.6))
    between = outcome(np.where(rng.random(2000) < 0.5, better.wrong, without.wrong))
    assert gain_kept(better, better, without).value == 1
    assert gain_kept(without, better, without).value == 0
    found = gain_kept(between, better, without)
    assert found.value == pytest.approx((without.wrong.mean() - between.wrong.mean()) / (without.wrong.mean() - better.wrong.mean()))
    assert found.low < 0.5 < found.high
    assert gain_kept(better, without, better) is None  # adapting made it worse: there is no gain to keep
    assert gain_kept(without, without, without) is None


def test_a_gain_that_may_be_none_has_no_bounds():
    without, little = outcome([1, 0, 1, 0, 1]), outcome([1, 0, 1, 0, 0])
    found = gain_kept(little, little, without)
    assert found.value == 1
    assert math.isnan(found.low)
    assert math.isnan(found.high)


def test_nothing_scored_has_no_error():
    none = outcome([])
    assert error(none) is None
    assert paired(none, none) is None
    assert calibration(none) is None
    assert by_domain(none) == {}
    assert by_round(none) == []
    assert slope(none) is None


def test_shares_of_pixels_are_means_of_means():
    found = error(outcome([0.25, 0.75, 0.0], [0, 0, 1]))
    assert found.value == pytest.approx(100 / 3)
    assert (found.low, found.high) == (0, 50)


def test_runs_of_several_seeds_keep_an_images_frames_together():
    runs = [outcome([1, 0], seed=seed) for seed in (0, 1, 2)]
    both = together(runs)
    assert len(both) == 6
    assert both.seed.tolist() == [0, 0, 1, 1, 2, 2]
    assert (error(both).low, error(both).high) == (0, 100)  # two images, not six
    with pytest.raises(UsageError, match="cannot be taken together"):
        together([])
    with pytest.raises(UsageError, match="cannot be taken together"):
        together([runs[0], outcome([1], domains=("b",))])
