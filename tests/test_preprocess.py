"""Frames made into batches: the formula, the layouts that are accepted, and the messages for those that are not."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as some

from edgeadapt.bundle import InputSpec
from edgeadapt.errors import InputError
from edgeadapt.preprocess import PREPROCESSING, Windows, batch_of, fingerprint, placed, prepare, unlike, windows_of

device = pytest.mark.device
RGB = InputSpec((3, 4, 6), None, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3))
GREY = InputSpec((1, 4, 6), None, None, None)
SENSOR = InputSpec((6, 128), None, None, None)
RESIZED = InputSpec((3, 4, 6), (4, 6), None, None)


def images(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8)


@device
def test_uint8_is_scaled_normalised_and_put_channels_first():
    x = images(5, 4, 6, 3)
    found = prepare(x, RGB)
    mean, std = np.array(RGB.mean, np.float32), np.array(RGB.std, np.float32)
    wanted = ((x.astype(np.float32) / np.float32(255) - mean) / std).transpose(0, 3, 1, 2)
    assert found.dtype == np.float32
    assert found.shape == (5, 3, 4, 6)
    assert np.array_equal(found, wanted)


@device
@given(some.integers(0, 255), some.booleans(), some.booleans())
def test_mean_and_std_are_each_optional(value, mean, std):
    spec = InputSpec((3, 4, 6), None, (0.1, 0.2, 0.3) if mean else None, (0.5, 2.0, 4.0) if std else None)
    found = prepare(np.full((1, 4, 6, 3), value, np.uint8), spec)[0, :, 0, 0]
    wanted = (value / 255 - np.array([0.1, 0.2, 0.3]) * mean) / (np.array([0.5, 2.0, 4.0]) if std else 1)
    assert np.allclose(found, wanted, atol=1e-6)


@device
def test_one_frame_and_many():
    x = images(2, 4, 6, 3)
    assert np.array_equal(prepare(x[1], RGB)[0], prepare(x, RGB)[1])
    assert [batch_of(frames, RGB)[1] for frames in (x, x[:1], x[0])] == [False, False, True]
    y = np.zeros((2, 3, 4, 6), np.float32)
    assert [batch_of(frames, RGB)[1] for frames in (y, y[:1], y[0])] == [False, False, True]


@device
def test_grey_frames_need_no_channel_axis():
    x = images(5, 4, 6)
    wanted = prepare(x[..., None], GREY)
    assert wanted.shape == (5, 1, 4, 6)
    assert np.array_equal(prepare(x, GREY), wanted)
    assert np.array_equal(prepare(x[0], GREY), wanted[:1])
    assert np.array_equal(prepare(x[0, :, :, None], GREY), wanted[:1])
    shapes = [(5, 4, 6, 1), (5, 4, 6), (4, 6), (4, 6, 1)]
    assert [batch_of(images(*shape), GREY)[1] for shape in shapes] == [False, False, True, True]


@device
def test_float32_is_taken_as_it_is():
    x = np.random.default_rng(0).standard_normal((2, 6, 128), dtype=np.float32)
    assert prepare(x, SENSOR) is x
    assert prepare(x[0], SENSOR).shape == (1, 6, 128)
    x[0, 0, 0] = np.nan  # whether values are usable is the adapter's affair
    assert np.isnan(prepare(x, SENSOR)[0, 0, 0])


@device
def test_the_result_is_put_where_it_is_wanted():
    out = np.zeros((2, 3, 4, 6), np.float32)
    for x in (images(2, 4, 6, 3), np.ones((2, 3, 4, 6), np.float32)):
        before = x.copy()
        assert prepare(x, RGB, out) is out
        assert np.array_equal(out, prepare(x, RGB))
        assert np.array_equal(x, before)


@device
def test_strided_frames_give_the_same():
    x = images(3, 4, 12, 4)
    assert np.array_equal(prepare(x[::2, :, ::2, :3], RGB), prepare(np.ascontiguousarray(x[::2, :, ::2, :3]), RGB))


def test_frames_of_another_size_are_resized_as_pillow_does():
    from PIL import Image

    x = images(2, 9, 17, 3)
    found = prepare(x, RESIZED)
    for frame, got in zip(x, found):
        wanted = np.asarray(Image.fromarray(frame).resize((6, 4), Image.Resampling.BILINEAR)).transpose(2, 0, 1) / np.float32(255)
        assert np.array_equal(got, wanted)
    assert np.array_equal(prepare(images(2, 4, 6, 3), RESIZED), prepare(images(2, 4, 6, 3), InputSpec((3, 4, 6))))


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5])
def test_resizing_treats_channels_alike(channels):
    spec = InputSpec((channels, 4, 6), (4, 6))
    x = images(1, 11, 7, channels)
    found = prepare(x, spec)
    assert found.shape == (1, channels, 4, 6)
    for channel in range(channels):
        alone = prepare(x[..., channel], InputSpec((1, 4, 6), (4, 6)))
        assert np.array_equal(found[:, channel], alone[:, 0])


def plainly(frame: np.ndarray, short: int, size: int) -> np.ndarray:
    """Resize(short) and CenterCrop(size) of torchvision, written anew for Pillow images."""
    from PIL import Image

    height, width = frame.shape[:2]
    tall, wide = (short, int(short * width / height)) if height <= width else (int(short * height / width), short)
    image = Image.fromarray(frame).resize((wide, tall), Image.Resampling.BILINEAR)
    top, left = round((tall - size) / 2.0), round((wide - size) / 2.0)
    return np.asarray(image.crop((left, top, left + size, top + size)))


@given(some.integers(8, 90), some.integers(8, 90), some.sampled_from([(8, 8), (9, 8), (16, 14), (23, 20)]))
def test_cover_and_crop_are_what_torchvision_does(height, width, sizes):
    short, size = sizes
    spec = InputSpec((3, size, size), (short, short), fit="cover", crop=True)
    x = images(height, width, 3)
    wanted = x if x.shape[:2] == (size, size) else plainly(x, short, size)
    assert np.array_equal(prepare(x, spec)[0], wanted.transpose(2, 0, 1) / np.float32(255))


@given(some.integers(1, 60), some.integers(1, 60), some.integers(4, 20), some.integers(6, 20))
def test_what_is_cut_lies_within_what_was_resized(height, width, tall, wide):
    for spec in (InputSpec((3, 4, 6), (tall, wide), fit="cover", crop=True), InputSpec((3, 4, 6), (tall, wide), crop=True)):
        grown, wider, top, left = placed(height, width, spec)
        assert grown >= tall
        assert wider >= wide
        assert 0 <= top <= grown - 4
        assert 0 <= left <= wider - 6
        assert abs(2 * top - (grown - 4)) <= 1
        assert abs(2 * left - (wider - 6)) <= 1
        if spec.fit == "cover":
            assert grown == tall or wider == wide
            assert abs(grown * width - wider * height) <= max(width, height), "the sides keep their ratio"


def test_an_image_that_would_become_huge_is_refused():
    spec = InputSpec((3, 224, 224), (256, 256), fit="cover", crop=True)
    for x in (images(1, 1000, 3), images(5000, 2, 3)):
        with pytest.raises(InputError, match="is too narrow: resized it would be"):
            prepare(x, spec)
    assert prepare(images(200, 1200, 3), spec).shape == (1, 3, 224, 224)


@device
def test_larger_images_are_cut_without_being_resized():
    spec = InputSpec((3, 4, 6), crop=True)
    x = images(2, 7, 9, 3)
    assert np.array_equal(prepare(x, spec), prepare(x[:, 2:6, 2:8], InputSpec((3, 4, 6))))
    with pytest.raises(InputError, match="at least 4 x 6, not 3 x 9"):
        prepare(images(1, 3, 9, 3), spec)


@device
def test_channels_are_put_in_the_order_that_the_model_takes():
    spec = InputSpec((3, 4, 6), None, (0.3, 0.4, 0.5), (0.3, 0.25, 0.2), order="bgr")
    x = images(2, 4, 6, 3)
    assert np.array_equal(prepare(x, spec), prepare(x, RGB)[:, ::-1])
    y = np.ones((1, 3, 4, 6), np.float32)
    assert prepare(y, spec) is y, "float32 is as the model takes it"


@device
def test_raw_values_are_scaled_by_channel_and_left_as_they_were():
    spec = InputSpec((2, 5), None, (100.0, -3.0), (4.0, 0.5), raw=True)
    x = np.random.default_rng(0).standard_normal((3, 2, 5)).astype(np.float32) * 50
    before, wanted = x.copy(), (x - np.float32([[100], [-3]])) / np.float32([[4], [0.5]])
    assert np.array_equal(prepare(x, spec), wanted)
    assert np.array_equal(prepare(x[1], spec)[0], wanted[1])
    assert prepare(x, spec, out := np.zeros((3, 2, 5), np.float32)) is out
    assert np.array_equal(out, wanted)
    assert np.array_equal(x, before)
    for bad, hint in ((np.zeros((1, 2, 5), np.uint8), "as the sensor gives them"), (np.zeros((1, 2, 5)), "as the sensor gives them")):
        with pytest.raises(InputError) as caught:
            prepare(bad, spec)
        assert hint in caught.value.hint


HOPPING = InputSpec((2, 6), hop=4)


@device
@given(some.integers(1, 9), some.integers(1, 12), some.lists(some.integers(1, 11), max_size=12))
def test_windows_are_the_same_however_samples_come(length, hop, parts):
    spec = InputSpec((2, length), hop=hop)
    recording = np.arange(2 * sum(parts), dtype=np.float32).reshape(-1, 2)
    windows, found, at = Windows(spec), [], 0
    for part in parts:
        found += windows.push(recording[at : at + part])
        at += part
    wanted = [recording[begin : begin + length].T for begin in range(0, len(recording) - length + 1, hop)]
    assert np.array_equal(np.array(found).reshape(-1, 2, length), np.array(wanted).reshape(-1, 2, length))
    assert np.array_equal(windows_of(recording, spec), np.array(wanted).reshape(-1, 2, length))


@device
def test_no_window_goes_across_a_gap():
    windows, samples = Windows(HOPPING), np.arange(16, dtype=np.float32).reshape(8, 2)
    assert windows.push(samples[:5]) == []
    windows.clear()
    assert np.array_equal(windows.push(samples), [samples[:6].T])


@device
def test_a_model_that_takes_no_samples_says_so():
    with pytest.raises(InputError, match="takes whole frames 6x128"):
        Windows(SENSOR)
    with pytest.raises(InputError) as caught:
        prepare(np.zeros((9, 2), np.float32), HOPPING)
    assert "windows_of" in caught.value.hint


EVERY = [
    RGB,
    RESIZED,
    SENSOR,
    HOPPING,
    InputSpec((3, 4, 6), (4, 6), crop=True, fit="cover"),
    InputSpec((3, 4, 6), crop=True),
    InputSpec((3, 4, 6), order="bgr"),
    InputSpec((3, 4, 6), (5, 6), crop=True),
    InputSpec((2, 6), None, (1.0, 2.0), None, raw=True),
    InputSpec((2, 6), None, (1.0, 2.5), None, raw=True),
]


def test_every_way_to_prepare_has_a_fingerprint_of_its_own():
    found = [fingerprint(spec) for spec in EVERY]
    assert found == [fingerprint(spec) for spec in EVERY]
    assert len({*found}) == len(EVERY)


def test_other_pixels_of_a_resized_image_are_told(monkeypatch):
    from edgeadapt import preprocess
    from tests.toybundle import Toy

    manifest = Toy().manifest()
    assert manifest.input.resize is not None
    assert unlike(manifest) == "", "nothing is said of it"
    manifest = replace(manifest, selfcheck={PREPROCESSING: fingerprint(manifest.input)})
    assert unlike(manifest) == ""
    usual = preprocess.resized
    monkeypatch.setattr(preprocess, "resized", lambda *given: usual(*given) ^ 1)
    assert unlike(manifest).startswith("Pillow ")
    assert unlike(replace(manifest, input=replace(manifest.input, resize=None))) == ""


def test_shrinking_averages_instead_of_dropping_pixels():
    x = np.zeros((1, 40, 60, 3), np.uint8)
    x[:, ::2] = 200
    found = prepare(x, RESIZED)
    assert np.allclose(found, 100 / 255, atol=0.05)


@device
@pytest.mark.parametrize(
    ("x", "spec", "said", "hint"),
    [
        ([[1, 2]], RGB, "numpy array, not list", "asarray"),
        (np.zeros((1, 3, 4, 6)), RGB, "not float64", "astype"),
        (np.zeros((1, 4, 6, 3), np.int32), RGB, "not int32", "astype"),
        (np.zeros((1, 3, 4, 5), np.float32), RGB, "N x 3x4x6 or one frame 3x4x6, not 1x3x4x5", "shape"),
        (np.zeros((1, 4, 6, 3), np.float32), RGB, "not 1x4x6x3", "channels come first"),
        (np.zeros((), np.float32), RGB, "not scalar", "shape"),
        (np.zeros((1, 1, 3, 4, 6), np.float32), RGB, "not 1x1x3x4x6", "shape"),
        (np.zeros((0, 3, 4, 6), np.float32), RGB, "no frames", "at least one"),
        (np.zeros((0, 4, 6, 3), np.uint8), RGB, "no frames", "at least one"),
        (images(1, 3, 4, 6), RGB, "not 1x3x4x6", "channels come last"),
        (images(1, 4, 6, 4), RGB, "not 1x4x6x4", "3 channel"),
        (images(4, 6), RGB, "not 4x6", "3 channel"),
        (images(1, 4, 6, 3), GREY, "not 1x4x6x3", "1 channel"),
        (images(1, 5, 6, 3), RGB, "images are 4 x 6, not 5 x 6", "resize them"),
        (images(1, 0, 6, 3), RESIZED, "no pixels", "camera"),
        (images(1, 6, 128), SENSOR, "uint8 is for images", "float32"),
    ],
)
def test_other_frames_are_refused_with_the_reason_and_a_way_out(x, spec, said, hint):
    with pytest.raises(InputError) as caught:
        prepare(x, spec)
    assert said in caught.value.message
    assert hint in caught.value.hint


@device
def test_without_pillow_resizing_says_what_to_install():
    code = """
import sys
sys.modules["PIL"] = None
import numpy as np
from edgeadapt.bundle import InputSpec
from edgeadapt.errors import InputError
from edgeadapt.preprocess import prepare
spec = InputSpec((3, 4, 6), (4, 6))
prepare(np.zeros((1, 4, 6, 3), np.uint8), spec)
try:
    prepare(np.zeros((1, 9, 9, 3), np.uint8), spec)
except InputError as error:
    print(error)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "an image of 9 x 9 must be resized to 4 x 6" in run.stdout
    assert "pip install edgeadapt[images]" in run.stdout
