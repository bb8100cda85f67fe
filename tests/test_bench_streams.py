"""The bench's streams: their order, their frames, and that nothing but data, settings, seed and place decides a frame."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from edgeadapt.bench.frames import Samples, Stream
from edgeadapt.bench.streams import CORRUPTED, NAMES, Sizes, build, own
from edgeadapt.corruptions import continual, correlated, corrupt, gradual, mixed, recurring
from edgeadapt.errors import InputError, UsageError

pytestmark = pytest.mark.device

COUNT = 24
IMAGES = np.random.default_rng(0).integers(0, 256, (COUNT, 8, 8, 3), dtype=np.uint8)
LABELS = np.arange(COUNT) % 4
DATA = Samples(IMAGES, LABELS)
SIZES = Sizes(frames=10, step=2, visit=4, bad=5, rounds=3, corruptions=("fog", "contrast", "impulse_noise"))


def whole(stream: Stream) -> tuple[np.ndarray, np.ndarray]:
    return stream.pixels(0, len(stream)), stream.truth(0, len(stream))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("batch", [1, 4, 16])
def test_windows_of_any_size_show_the_same_frames(name, batch):
    stream = build(name, DATA, SIZES, seed=3)
    x, y = whole(stream)
    windows = list(build(name, DATA, SIZES, seed=3).windows(batch))
    assert np.array_equal(np.concatenate([window.x for window in windows]), x)
    assert np.array_equal(np.concatenate([window.y for window in windows]), y)
    assert [window.position for window in windows] == list(range(0, len(stream), batch))
    assert all(len(window.x) == batch for window in windows[:-1])
    for name in ("severity", "index", "scored"):
        assert np.array_equal(np.concatenate([getattr(window, name) for window in windows]), getattr(stream, name))
    assert [part for window in windows for part in window.domain] == [stream.domains[k] for k in stream.domain]


@pytest.mark.parametrize("name", NAMES)
def test_a_seed_gives_one_stream_and_another_seed_another(name):
    one, same, other = (build(name, DATA, SIZES, seed) for seed in (1, 1, 2))
    assert one.key == same.key != other.key
    assert np.array_equal(whole(one)[0], whole(same)[0])
    assert not np.array_equal(one.pixels(0, len(one)), other.pixels(0, len(other)))


@pytest.mark.parametrize("name", NAMES)
def test_truth_is_that_of_the_image(name):
    stream = build(name, DATA, SIZES, seed=1)
    truth = stream.truth(0, len(stream))
    known = stream.index >= 0
    assert np.array_equal(truth[known], LABELS[stream.index[known]])
    assert (truth[~known] == -1).all()
    assert not stream.scored[~known].any()


def batches(library, seed: int = 5, **options):
    options = {"names": SIZES.corruptions, "batch": 7, "seed": seed, **options}
    return list(library(IMAGES, LABELS, **options))


@pytest.mark.parametrize(
    ("name", "library", "options"),
    [
        ("continual", continual, {"per_corruption": 10}),
        ("gradual", gradual, {"per_corruption": 2}),
        ("mixed", mixed, {"per_corruption": 10}),
        ("sorted", correlated, {"per_corruption": 10}),
        ("dirichlet", correlated, {"per_corruption": 10, "delta": 0.1}),
        ("recurring", recurring, {"per_corruption": 4, "rounds": 3, "seed": 15}),
    ],
)
def test_streams_are_those_of_the_corruptions_frame_by_frame(name, library, options):
    stream, found = build(name, DATA, SIZES, seed=5), batches(library, **options)
    assert np.array_equal(stream.index, np.concatenate([batch.index for batch in found]))
    assert np.array_equal(stream.pixels(0, len(stream)), np.concatenate([batch.x for batch in found]))
    assert [stream.domains[k] for k in stream.domain] == [part for batch in found for part in batch.domains]
    assert stream.severity.tolist() == [batch.severity for batch in found for _ in batch.index]


def test_rounds_of_two_seeds_share_no_frame_order():
    rounds = [stream.index[stream.round == r].tolist() for stream in (build("recurring", DATA, SIZES, seed) for seed in (0, 1)) for r in range(3)]
    assert len({tuple(order) for order in rounds}) == 6


def test_forgetting_shows_the_same_clean_images_before_and_after():
    stream = build("forgetting", DATA, SIZES)
    assert stream.domains == ("clean", *SIZES.corruptions, "clean after shift")
    first, last = (stream.index[stream.domain == place] for place in (0, 4))
    assert np.array_equal(first, last)
    assert np.array_equal(stream.pixels(len(stream) - 10, 10), IMAGES[last])
    assert stream.scored.all()


def test_one_class_comes_alone_and_then_all():
    stream = build("single", DATA, SIZES)
    assert stream.domains == ("one class", "clean after shift")
    first = stream.truth(0, 5)
    assert len(set(first.tolist())) == 1
    assert len(set(stream.truth(5, 10).tolist())) > 1
    assert stream.scored.all()


@pytest.mark.parametrize("name", ["repeated", "noise"])
def test_frames_that_teach_nothing_are_not_scored_and_those_after_them_are(name):
    stream = build(name, DATA, SIZES)
    assert stream.scored.tolist() == [False] * 5 + [True] * 10
    frames = stream.pixels(0, 5)
    assert len(np.unique(frames, axis=0)) == (1 if name == "repeated" else 5)
    assert (stream.index[:5] == -1).all() == (name == "noise")
    assert np.array_equal(stream.pixels(5, 10), IMAGES[stream.index[5:]])


def test_images_come_again_corrupted_anew_when_more_are_asked_for_than_there_are():
    stream = build("continual", DATA, replace(SIZES, frames=COUNT + 6, corruptions=("impulse_noise",)))
    counts = Counter(stream.index.tolist())
    assert sorted(counts.values()) == [1] * 18 + [2] * 6
    image = next(number for number, count in counts.items() if count == 2)
    one, two = np.flatnonzero(stream.index == image).tolist()
    assert np.array_equal(stream.pixels(one, 1)[0], corrupt(IMAGES[image], "impulse_noise", start=image))
    assert not np.array_equal(stream.pixels(one, 1), stream.pixels(two, 1))
    library = list(continual(IMAGES, LABELS, ("impulse_noise",), batch=COUNT))
    assert np.array_equal(stream.pixels(0, COUNT), library[0].x)


def test_the_usual_sizes():
    sizes = Sizes().whole(1000)
    assert (sizes.frames, sizes.step, sizes.visit, sizes.bad) == (1000, 200, 100, 250)
    assert Sizes(frames=50, step=7).whole(1000) == Sizes(50, 7, 5, 12)
    assert Sizes(frames=1).whole(5) == Sizes(1, 1, 1, 1)


def test_a_key_tells_of_what_the_stream_uses_and_of_nothing_else():
    key = build("continual", DATA, SIZES).key
    assert build("continual", DATA, replace(SIZES, rounds=9, bad=1, step=1)).key == key
    assert build("continual", DATA, replace(SIZES, severity=4)).key != key
    assert build("continual", DATA, replace(SIZES, frames=9)).key != key
    assert build("mixed", DATA, SIZES).key != key
    changed = IMAGES.copy()
    changed[0, 0, 0, 0] ^= 1
    assert build("continual", Samples(changed, LABELS), SIZES).key != key
    assert build("continual", Samples(IMAGES, LABELS[::-1]), SIZES).key != key


@pytest.mark.parametrize(
    ("name", "sizes", "seed", "message"),
    [
        ("blurred", SIZES, 0, "unknown stream 'blurred'"),
        ("continual", SIZES, -1, "seed is a whole number"),
        ("continual", replace(SIZES, frames=0), 0, "frames is a whole number of 1 or more, not 0"),
        ("continual", replace(SIZES, rounds=0), 0, "rounds is a whole number"),
        ("continual", replace(SIZES, severity=6), 0, "severity is a whole number from 1"),
        ("continual", replace(SIZES, severity=0), 0, "severity is a whole number from 1"),
        ("continual", replace(SIZES, corruptions=("fogg",)), 0, "unknown corruption 'fogg'"),
        ("continual", replace(SIZES, corruptions=()), 0, "at least one corruption"),
    ],
)
def test_what_cannot_be_is_refused_in_words(name, sizes, seed, message):
    with pytest.raises(UsageError, match=message):
        build(name, DATA, sizes, seed)


def test_pillow_is_asked_for_before_anything_runs(monkeypatch):
    monkeypatch.setattr("edgeadapt.bench.streams.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"has pixelate in it, made by Pillow, .*\n.*or leave them out with --corruptions"):
        build("continual", DATA, replace(SIZES, corruptions=("fog", "pixelate")))
    assert len(build("continual", DATA, replace(SIZES, corruptions=("fog",))))
    assert len(build("clean", DATA, replace(SIZES, corruptions=("pixelate",))))


def test_a_key_tells_of_numpy_and_pillow(monkeypatch):
    import PIL

    found = [build("continual", DATA, SIZES).key]
    for library in (np, PIL):
        monkeypatch.setattr(library, "__version__", "0")
        found.append(build("continual", DATA, SIZES).key)
    assert len(set(found)) == 3


def test_recordings_without_labels_go_with_those_of_pixels():
    mask = np.ones((COUNT, 8, 8), np.int64)
    stream = own([Samples(IMAGES, np.full(COUNT, -1), "a"), Samples(IMAGES, mask, "b")])
    assert stream.truth(0, COUNT).shape == mask.shape
    assert stream.scored.tolist() == [False] * COUNT + [True] * COUNT
    assert len(stream.key) == 64
    with pytest.raises(InputError, match=r"b holds labels of shape \(8, 8\), a one label a frame"):
        own([Samples(IMAGES, np.zeros(COUNT, np.int64), "a"), Samples(IMAGES, mask, "b")])


def test_windows_have_a_size():
    with pytest.raises(UsageError, match="batch is a number of frames"):
        next(build("clean", DATA, SIZES).windows(0))


def test_sensor_frames_make_the_streams_that_corrupt_nothing():
    data = Samples(np.random.default_rng(1).standard_normal((12, 7)).astype(np.float32), LABELS[:12], "gas")
    for name in NAMES:
        if name in CORRUPTED:
            with pytest.raises(UsageError, match=f"the stream {name} corrupts images, and gas holds float32 frames"):
                build(name, data, SIZES)
        else:
            stream = build(name, data, SIZES)
            assert stream.pixels(0, len(stream)).dtype == np.float32
            assert np.array_equal(stream.pixels(len(stream) - 3, 3), data.x[stream.index[-3:]])
    noise = build("noise", data, SIZES).pixels(0, 5)
    assert data.x.min() <= noise.min() < noise.max() <= data.x.max()


def test_own_recordings_come_as_they_are():
    rng = np.random.default_rng(2)
    parts = [Samples(rng.standard_normal((n, 3)).astype(np.float32), np.arange(n) - (k == 1), "a" if k < 2 else "b") for k, n in enumerate((4, 5, 3))]
    stream = own(parts)
    assert stream.domains == ("a", "a (2)", "b")
    assert stream.domain.tolist() == [0] * 4 + [1] * 5 + [2] * 3
    assert stream.index.tolist() == list(range(12))
    assert stream.scored.tolist() == [True] * 4 + [False] + [True] * 7
    assert np.array_equal(stream.pixels(2, 9), np.concatenate([part.x for part in parts])[2:11])
    assert np.array_equal(stream.truth(0, 12), np.concatenate([part.y for part in parts]))
    assert own(parts).key == stream.key != own(parts[:2]).key


def test_own_recordings_must_go_together_and_know_something():
    one = Samples(np.zeros((2, 3), np.float32), np.zeros(2, int), "one")
    with pytest.raises(InputError, match="no recordings"):
        own([])
    with pytest.raises(InputError, match=r"two holds float32 frames of \(4,\), one float32 of \(3,\)"):
        own([one, Samples(np.zeros((2, 4), np.float32), np.zeros(2, int), "two")])
    with pytest.raises(InputError, match="none of the recordings has labels"):
        own([Samples(one.x, np.full(2, -1))])


@pytest.mark.parametrize(
    ("x", "y"),
    [
        (np.zeros((2, 8, 8, 3), np.float64), np.zeros(2, int)),
        (np.zeros((2, 8, 8, 4), np.uint8), np.zeros(2, int)),
        (np.zeros((2, 8, 8, 3), np.uint8), np.zeros(3, int)),
        (np.zeros((2, 8, 8, 3), np.uint8), np.zeros(2)),
        (np.zeros((0, 8, 8, 3), np.uint8), np.zeros(0, int)),
    ],
)
def test_samples_are_checked(x, y):
    with pytest.raises(InputError, match="data holds"):
        Samples(x, y)


def test_labels_of_pixels_go_where_they_can():
    data = Samples(IMAGES, np.zeros((COUNT, 8, 8), np.int64))
    assert build("continual", data, SIZES).truth(0, 3).shape == (3, 8, 8)
    for name in ("sorted", "dirichlet", "single"):
        with pytest.raises(InputError, match="needs one label a frame"):
            build(name, data, SIZES)
    assert build("noise", data, SIZES).truth(0, 1).max() == -1


def test_unknown_labels_are_no_class():
    with pytest.raises(InputError, match="has no labels"):
        build("single", Samples(IMAGES, np.full(COUNT, -1)), SIZES)
    assert build("single", Samples(IMAGES, np.where(np.arange(COUNT) % 2, -1, 3)), SIZES).truth(0, 5).tolist() == [3] * 5
