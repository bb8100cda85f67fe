"""The order and the content of test streams."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from edgeadapt.corruptions import CORRUPTIONS, continual, correlated, corrupt, gradual, mixed, recurring
from edgeadapt.errors import InputError, UsageError

IMAGES, LABELS = np.random.default_rng(0).integers(0, 256, (50, 16, 16, 3), dtype=np.uint8), np.arange(50) % 5
TWO = ("fog", "contrast")


def runs(labels: np.ndarray) -> int:
    return 1 + int((labels[1:] != labels[:-1]).sum())


def test_continual_visits_each_corruption_once_with_every_image_once():
    batches = list(continual(IMAGES, LABELS, names=TWO, batch=16, seed=3))
    assert [b.domain for b in batches] == ["fog"] * 4 + ["contrast"] * 4
    assert [len(b.x) for b in batches] == [16, 16, 16, 2] * 2
    for name in TWO:
        index = np.concatenate([b.index for b in batches if b.domain == name])
        assert sorted(index) == list(range(50))
        assert index.tolist() != sorted(index)
    first, second = ([i for b in batches if b.domain == name for i in b.index] for name in TWO)
    assert first != second
    for b in batches:
        assert np.array_equal(b.y, LABELS[b.index])
        assert set(b.domains) == {b.domain}
        assert b.severity == 5
        for frame, k in zip(b.x, b.index):
            assert np.array_equal(frame, corrupt(IMAGES[k], b.domain, 5, seed=3, start=int(k)))


def test_the_fifteen_come_by_default_and_a_stream_is_the_same_twice():
    names = [b.domain for b in continual(IMAGES, LABELS, batch=8, per_corruption=8)]
    assert tuple(names) == CORRUPTIONS
    one, two = (np.concatenate([b.x for b in continual(IMAGES, LABELS, TWO, batch=size, per_corruption=20)]) for size in (7, 20))
    assert np.array_equal(one, two)


def test_clean_stands_for_the_images_themselves():
    batches = list(continual(IMAGES, LABELS, names=("fog", "clean"), batch=50))
    assert (batches[1].domain, batches[1].severity) == ("clean", 0)
    assert np.array_equal(batches[1].x, IMAGES[batches[1].index])


def test_streams_corrupt_one_batch_at_a_time():
    endless = np.broadcast_to(IMAGES[:1], (2_000_000, 16, 16, 3))  # 1.5 GB were it real
    stream = continual(endless, np.zeros(len(endless)), batch=4)
    assert next(stream).x.shape == (4, 16, 16, 3)


def test_gradual_swells_and_fades():
    batches = list(gradual(IMAGES, LABELS, names=TWO, batch=10, per_corruption=10))
    assert [b.severity for b in batches] == [1, 2, 3, 4, 5, 4, 3, 2, 1] * 2
    assert [b.domain for b in batches] == ["fog"] * 9 + ["contrast"] * 9
    k = int(batches[2].index[0])
    assert np.array_equal(batches[2].x[0], corrupt(IMAGES[k], "fog", 3, start=k))


def test_recurring_is_continual_with_the_next_seed():
    batches = list(recurring(IMAGES, LABELS, rounds=3, names=TWO, batch=25, seed=5))
    assert [b.domain for b in batches] == ["fog", "fog", "contrast", "contrast"] * 3
    for r in range(3):
        for got, expected in zip(batches[4 * r : 4 * r + 4], continual(IMAGES, LABELS, names=TWO, batch=25, seed=5 + r), strict=True):
            assert np.array_equal(got.x, expected.x)
    assert not np.array_equal(batches[0].x, batches[4].x)


def test_mixed_holds_every_pair_once_in_disorder():
    batches = list(mixed(IMAGES, LABELS, names=(*TWO, "clean"), batch=20))
    pairs = [(name, int(k)) for b in batches for name, k in zip(b.domains, b.index)]
    assert Counter(pairs) == Counter((name, k) for name in (*TWO, "clean") for k in range(50))
    assert {b.domain for b in batches} == {"mixed"}
    assert all(len(set(b.domains)) > 1 for b in batches[:-1])
    for b in batches:
        assert np.array_equal(b.y, LABELS[b.index])
        for frame, name, k in zip(b.x, b.domains, b.index):
            assert np.array_equal(frame, IMAGES[k] if name == "clean" else corrupt(IMAGES[k], name, 5, start=int(k)))


def test_correlated_sorts_by_label_or_spreads_by_dirichlet():
    def order(**options: float) -> np.ndarray:
        batches = list(correlated(IMAGES, LABELS, names=("fog",), batch=9, **options))
        assert sorted(k for b in batches for k in b.index) == list(range(50))
        return np.concatenate([b.y for b in batches])

    assert runs(order()) == 5
    assert runs(order(delta=0.1)) <= runs(order(delta=100.0))
    even = order(delta=100.0, slots=10)
    assert runs(even) > 25
    assert (even[1:] < even[:-1]).sum() > 9  # within a slot the classes come in random order
    assert runs(np.concatenate([b.y for b in continual(IMAGES, LABELS, names=("fog",))])) > 25


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"names": ("fogg",)}, UsageError, "fogg"),
        ({"names": ()}, UsageError, "at least one"),
        ({"severity": 7}, UsageError, "not 7"),
        ({"batch": 0}, UsageError, "batch"),
        ({"per_corruption": 51}, UsageError, "50"),
        ({"labels": LABELS[:3]}, InputError, "50 images"),
        ({"images": IMAGES[0]}, InputError, "(N, H, W, C)"),
        ({"images": IMAGES.astype(float)}, InputError, "float64"),
    ],
)
def test_a_wrong_stream_is_refused_at_the_call(options, error, message):
    with pytest.raises(error) as caught:
        continual(**{"images": IMAGES, "labels": LABELS, **options})
    assert message in str(caught.value)


@pytest.mark.parametrize("options", [{"delta": 0.0}, {"delta": -1.0}, {"slots": 0}])
def test_wrong_correlation_is_refused(options):
    with pytest.raises(UsageError):
        correlated(IMAGES, LABELS, **options)
    with pytest.raises(InputError):
        correlated(IMAGES, LABELS[:, None])
    with pytest.raises(UsageError):
        recurring(IMAGES, LABELS, rounds=0)
