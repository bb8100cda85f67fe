"""All frames of a source at once."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator

import numpy as np
import pytest

from edgeadapt.bundle import InputSpec
from edgeadapt.devices.sources import Frame, Source
from edgeadapt.devices.sources.gather import gather
from edgeadapt.errors import InputError, SourceError

pytestmark = pytest.mark.device

SPEC = InputSpec((3, 4, 4), (4, 4))


class Given(Source):
    name = "given"

    def __init__(self, *frames: Frame) -> None:
        self._frames = frames

    def __iter__(self) -> Iterator[Frame]:
        return iter(self._frames)


def image(height: int = 4, width: int = 4, value: int = 7) -> np.ndarray:
    return np.full((height, width, 3), value, np.uint8)


def test_frames_and_labels_are_collected_and_faults_told():
    x, y, faults = gather(Given(Frame(0, image(), 2), Frame("b.png", None, 1, "is no image"), Frame(2, image(value=9))), SPEC)
    assert (x.shape, x.dtype, x[:, 0, 0, 0].tolist()) == ((2, 4, 4, 3), np.uint8, [7, 9])
    assert (y.dtype, y.tolist()) == (np.int64, [2, -1])
    assert faults == ["b.png is no image"]


def test_sizes_differ_only_where_the_bundle_resizes():
    frames = (Frame(0, image(9, 5), 0), Frame(1, image(6, 8), 1))
    x, _, _ = gather(Given(*frames), SPEC)
    assert x.shape == (2, 4, 4, 3)
    assert (x == 7).all()
    assert gather(Given(*frames[:1]), SPEC)[0].shape == (1, 4, 4, 3)
    with pytest.raises(InputError, match="given holds frames of several sizes, such as 6x8x3 and 9x5x3"):
        gather(Given(*frames), InputSpec((3, 4, 4)))


def test_large_pictures_are_resized_as_they_come():
    """All of them in full size would take 40 MB."""

    class Many(Given):
        def __iter__(self) -> Iterator[Frame]:
            return (Frame(number, image(600, 555), 0) for number in range(40))

    tracemalloc.start()
    x, _, _ = gather(Many(), SPEC)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert x.shape == (40, 4, 4, 3)
    assert peak < 10**7


def test_labels_of_pixels_and_frames_without():
    mask = np.arange(16).reshape(4, 4)
    _, y, _ = gather(Given(Frame(0, image()), Frame(1, image(), mask)), SPEC)
    assert y.shape == (2, 4, 4)
    assert (y[0] == -1).all()
    assert np.array_equal(y[1], mask)
    with pytest.raises(InputError, match="labels of several sizes"):
        gather(Given(Frame(0, image(), mask), Frame(1, image(), mask[:2])), SPEC)


def test_other_frames_than_images():
    x, y, _ = gather(Given(Frame(0, np.zeros(5, np.float32), 1), Frame(1, np.ones(5, np.float32), 0)), InputSpec((5,)))
    assert (x.shape, x.dtype, y.tolist()) == ((2, 5), np.float32, [1, 0])
    x, _, _ = gather(Given(Frame(0, image()[..., 0])), InputSpec((1, 4, 4)))
    assert x.shape == (1, 4, 4, 1)


def test_nothing_to_collect():
    with pytest.raises(SourceError, match=r"given gave no frames that can be used; the first: a\.png is broken"):
        gather(Given(Frame("a.png", None, None, "is broken")), SPEC)
    with pytest.raises(SourceError, match="given gave no frames that can be used\n"):
        gather(Given(), SPEC)
