from __future__ import annotations

import colorsys
import importlib.util
import io
import itertools
import math
import subprocess
import sys
import tracemalloc
from fractions import Fraction
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeadapt.corruptions import (
    CORRUPTIONS,
    EXTRA,
    PROCEDURAL,
    corrupt,
    kernels,
)
from edgeadapt.errors import InputError, UsageError

ALL = CORRUPTIONS + EXTRA
NEEDS_PILLOW = {"pixelate", "jpeg_compression"}


def photographs(count: int, side: int = 32, seed: int = 0) -> np.ndarray:
    """Smooth colour pictures over the whole range, with some grain: like photographs, not like noise."""
    rng = np.random.default_rng(seed)
    coarse = rng.uniform(0, 1, (count, 3, side, side)).astype(np.float32)
    smooth = kernels.smooth(coarse, side / 16)
    smooth = (smooth - smooth.min()) / (smooth.max() - smooth.min()) + rng.normal(0, 0.02, smooth.shape)
    return np.ascontiguousarray(np.moveaxis((np.clip(smooth, 0, 1) * 255).astype(np.uint8), 1, -1))


def flat(value: int, count: int = 16, side: int = 64) -> np.ndarray:
    return np.full((count, side, side, 3), value, np.uint8)


# ------------------------------------------------------------------------------------------------- what holds for every corruption
def test_names_are_the_published_ones_in_their_order():
    assert CORRUPTIONS == (
        "gaussian_noise",
        "shot_noise",
        "impulse_noise",
        "defocus_blur",
        "glass_blur",
        "motion_blur",
        "zoom_blur",
        "snow",
        "frost",
        "fog",
        "brightness",
        "contrast",
        "elastic_transform",
        "pixelate",
        "jpeg_compression",
    )
    assert EXTRA == ("speckle_noise", "gaussian_blur", "spatter", "saturate")
    assert PROCEDURAL == {"frost"}


@given(
    name=st.sampled_from(ALL),
    severity=st.integers(0, 5),
    shape=st.tuples(st.integers(1, 40), st.integers(1, 40), st.sampled_from([1, 3])),
    count=st.sampled_from([None, 0, 1, 3]),
    scale=st.sampled_from([None, "cifar", "imagenet"]),
    seed=st.integers(0, 2**70),
)
def test_any_size_keeps_shape_and_type_and_leaves_the_input_alone(name, severity, shape, count, scale, seed):
    size = shape if count is None else (count, *shape)
    images = np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)
    before = images.copy()
    images.setflags(write=False)
    out = corrupt(images, name, severity, seed=seed, scale=scale)
    assert out.shape == images.shape
    assert out.dtype == np.uint8
    assert out.flags.writeable
    assert not np.shares_memory(out, images)
    assert np.array_equal(images, before)
    if severity == 0:
        assert np.array_equal(out, images)


@pytest.mark.parametrize("name", ALL)
def test_extremes_stay_in_range(name):
    """Black, white and one bright pixel: nothing wraps around, and white never turns dark by overflow."""
    images = np.zeros((3, 32, 32, 3), np.uint8)
    images[1], images[2, 16, 16] = 255, 255
    for scale in ("cifar", "imagenet"):
        black, white, _ = corrupt(images, name, 5, scale=scale).astype(int)
        assert white.mean() >= black.mean()


@pytest.mark.device
@pytest.mark.parametrize("name", [name for name in ALL if name not in NEEDS_PILLOW])
def test_an_image_does_not_depend_on_how_the_stream_is_cut(name):
    images = photographs(70)
    whole = corrupt(images, name, 4, seed=7)
    parts = [corrupt(images[a:b], name, 4, seed=7, start=a) for a, b in ((0, 1), (1, 20), (20, 66), (66, 70))]
    assert np.array_equal(whole, np.concatenate(parts))
    assert np.array_equal(whole[33], corrupt(images[33], name, 4, seed=7, start=33))
    assert np.array_equal(whole[::2], corrupt(images, name, 4, seed=7)[::2])


@pytest.mark.device
@pytest.mark.parametrize("name", ["gaussian_noise", "shot_noise", "impulse_noise", "glass_blur", "motion_blur", "snow", "fog", "elastic_transform"])
def test_seed_severity_and_index_each_change_the_random_draws_and_nothing_else_does(name):
    images = photographs(1).repeat(2, axis=0)
    first = corrupt(images, name, 5, seed=1)
    np.random.seed(0)  # the global generator plays no part
    assert np.array_equal(first, corrupt(images, name, 5, seed=1))
    assert not np.array_equal(first, corrupt(images, name, 5, seed=2))
    assert not np.array_equal(first[0], first[1])
    assert not np.array_equal(first, corrupt(images, name, 5, seed=1, start=1))


def test_scale_follows_the_longer_side_unless_told():
    small, large = photographs(1, 64), photographs(1, 65)
    assert np.array_equal(corrupt(small, "contrast"), corrupt(small, "contrast", scale="cifar"))
    assert np.array_equal(corrupt(large, "contrast"), corrupt(large, "contrast", scale="imagenet"))
    assert not np.array_equal(corrupt(large, "contrast"), corrupt(large, "contrast", scale="cifar"))


def change(images: np.ndarray, name: str, scale: str) -> list[float]:
    return [float(np.abs(corrupt(images, name, severity, scale=scale).astype(int) - images).mean()) for severity in range(1, 6)]


MONOTONE = [
    "gaussian_noise",
    "shot_noise",
    "impulse_noise",
    "defocus_blur",
    "zoom_blur",
    "brightness",
    "contrast",
    "jpeg_compression",
    "speckle_noise",
    "gaussian_blur",
]


@pytest.mark.parametrize("scale", ["cifar", "imagenet"])
@pytest.mark.parametrize("name", MONOTONE)
def test_damage_grows_with_every_severity(name, scale):
    images = photographs(24) if scale == "cifar" else photographs(2, 128)
    damage = change(images, name, scale)
    assert all(a < b for a, b in itertools.pairwise(damage)), damage


@pytest.mark.parametrize("name", [name for name in ALL if name not in MONOTONE and name not in ("saturate", "elastic_transform")])
def test_the_worst_severity_is_worse_than_the_mildest(name):
    for scale in ("cifar", "imagenet"):
        damage = change(photographs(24), name, scale)
        assert damage[-1] > damage[0] > 0, (scale, damage)


@pytest.mark.parametrize("name", ALL)
def test_grey_images_behave_like_colour_images_of_equal_channels(name):
    """Where the draws are per pixel, not per channel, and the colour steps keep grey grey, both must give the same."""
    grey = photographs(4)[..., :1]
    one = corrupt(grey, name, 3).astype(int)
    if name in ("brightness", "contrast", "defocus_blur", "gaussian_blur", "zoom_blur", "motion_blur", "glass_blur", "snow", "fog", "pixelate"):
        three = corrupt(grey.repeat(3, axis=-1), name, 3).astype(int)
        assert np.abs(one - three).max() <= 1
    elif name != "saturate":
        assert np.abs(one - grey).mean() > 0
    else:
        assert np.array_equal(one, grey)


def test_working_memory_is_bounded_however_many_images_come():
    images = np.zeros((2000, 32, 32, 3), np.uint8)
    corrupt(images[:40], "zoom_blur")  # its matrices are cached once
    for name in ("zoom_blur", "brightness", "elastic_transform", "shot_noise"):
        tracemalloc.start()
        corrupt(images, name)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < images.nbytes + 10 * 2**20, name


# -------------------------------------------------------------------------------------------------------------- exact definitions
def is_truncated(got: np.ndarray, exact: np.ndarray) -> bool:
    """Whether got is floor(exact); where exact is within 1e-9 of a whole number, rounding may have carried it to either side."""
    whole = np.rint(exact)
    return bool(np.where(np.abs(exact - whole) < 1e-9, (got == whole) | (got == whole - 1), got == np.floor(exact)).all())


@pytest.mark.parametrize(("scale", "shifts"), [("cifar", (0.05, 0.1, 0.15, 0.2, 0.3)), ("imagenet", (0.1, 0.2, 0.3, 0.4, 0.5))])
def test_brightness_shifts_the_value_of_hsv(scale, shifts):
    pixels = np.random.default_rng(3).integers(0, 256, (1, 20, 20, 3), dtype=np.uint8)
    pixels[0, 0] = pixels[0, 0, :, :1]  # greys
    pixels[0, 1, :, 1] = pixels[0, 1, :, 0]  # two equal channels
    for severity, shift in enumerate(shifts, 1):
        out = corrupt(pixels, "brightness", severity, scale=scale)
        for before, after in zip(pixels.reshape(-1, 3), out.reshape(-1, 3)):
            hue, saturation, value = colorsys.rgb_to_hsv(*(before / 255))
            exact = np.array(colorsys.hsv_to_rgb(hue, saturation, min(1, value + shift))) * 255
            assert is_truncated(after, exact)


@pytest.mark.parametrize(("scale", "factors"), [("cifar", ("0.75", "0.5", "0.4", "0.3", "0.15")), ("imagenet", ("0.4", "0.3", "0.2", "0.1", "0.05"))])
def test_contrast_shrinks_each_channel_about_its_mean(scale, factors):
    image = photographs(1, 16)[0]
    for severity, text in enumerate(factors, 1):
        out = corrupt(image, "contrast", severity, scale=scale)
        for channel in range(3):
            values = [int(v) for v in image[..., channel].ravel()]
            mean = Fraction(sum(values), len(values))
            for value, got in zip(values, out[..., channel].ravel()):
                exact = (value - mean) * Fraction(text) + mean
                assert int(got) == math.floor(exact) or abs(exact - round(exact)) < Fraction(1, 10**9)


def boxes(image: np.ndarray, size: int) -> np.ndarray:
    """Means along the first axis: a new pixel takes the old ones whose centres lie in its box; where it is the smaller one, the nearest."""
    ratio = Fraction(len(image), size)
    half = max(ratio, Fraction(1)) / 2
    centres = [(i + Fraction(1, 2)) * ratio for i in range(size)]
    return np.stack([image[[j for j in range(len(image)) if -half < j + Fraction(1, 2) - c <= half]].mean(0) for c in centres])


@pytest.mark.parametrize(
    ("side", "scale", "sides"),
    [(32, "cifar", (30, 28, 27, 24, 20)), (224, "imagenet", (134, 112, 89, 67, 56)), (40, "imagenet", (24, 20, 16, 12, 10))],
)
def test_pixelate_averages_boxes_and_enlarges_them(side, scale, sides):
    image = photographs(1, side)[0]
    for severity, small in enumerate(sides, 1):
        expected = image.astype(float)
        for size in (small, side):
            for _ in "xy":  # columns first, rounded to whole levels in between
                expected = np.rint(boxes(expected.swapaxes(0, 1), size))
        assert np.abs(corrupt(image, "pixelate", severity, scale=scale) - expected).max() <= 1


@pytest.mark.parametrize(("scale", "qualities"), [("cifar", (80, 65, 58, 50, 40)), ("imagenet", (25, 18, 15, 10, 7))])
def test_jpeg_compression_is_the_codec_at_the_published_quality(scale, qualities):
    from PIL import Image

    image = photographs(1)[0]
    for severity, quality in enumerate(qualities, 1):
        file = io.BytesIO()
        Image.fromarray(image).save(file, format="JPEG", quality=quality)
        assert np.array_equal(np.asarray(Image.open(file)), corrupt(image, "jpeg_compression", severity, scale=scale))


@pytest.mark.parametrize(
    ("scale", "strengths"),
    [("cifar", ((0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2))), ("imagenet", ((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2)))],
)
def test_saturate_scales_and_shifts_saturation_only(scale, strengths):
    pixels = np.random.default_rng(4).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    for severity, (factor, shift) in enumerate(strengths, 1):
        out = corrupt(pixels, "saturate", severity, scale=scale)
        for before, after in zip(pixels.reshape(-1, 3), out.reshape(-1, 3)):
            hue, saturation, value = colorsys.rgb_to_hsv(*(before / 255))
            assert is_truncated(after, np.array(colorsys.hsv_to_rgb(hue, min(1, saturation * factor + shift), value)) * 255)


# -------------------------------------------------------------------------------------------------------------- statistics of noise
@pytest.mark.parametrize(("scale", "deviations"), [("cifar", (0.04, 0.06, 0.08, 0.09, 0.10)), ("imagenet", (0.08, 0.12))])
def test_gaussian_noise_has_its_mean_and_deviation(scale, deviations):
    for severity, deviation in enumerate(deviations, 1):
        noise = corrupt(flat(128), "gaussian_noise", severity, scale=scale) - 127.5  # truncation takes half a level
        assert abs(noise.mean()) < 0.5
        assert noise.std() == pytest.approx(deviation * 255, rel=0.02)
        neighbours = np.corrcoef(noise[..., 0].ravel(), noise[..., 1].ravel())[0, 1]
        assert abs(neighbours) < 0.03


@pytest.mark.parametrize(("scale", "deviations"), [("cifar", (0.06, 0.1, 0.12, 0.16, 0.2)), ("imagenet", (0.15, 0.2))])
def test_speckle_noise_grows_with_the_pixel(scale, deviations):
    for severity, deviation in enumerate(deviations, 1):
        for level in (40, 120):
            out = corrupt(flat(level), "speckle_noise", severity, scale=scale)
            assert out.std() == pytest.approx(math.hypot(deviation * level, 12**-0.5), rel=0.03)
    assert corrupt(flat(0), "speckle_noise").max() == 0


@pytest.mark.parametrize(("scale", "amounts"), [("cifar", (0.01, 0.02, 0.03, 0.05, 0.07)), ("imagenet", (0.03, 0.06, 0.09, 0.17, 0.27))])
def test_impulse_noise_hits_the_published_share_half_white_half_black(scale, amounts):
    for severity, amount in enumerate(amounts, 1):
        out = corrupt(flat(100), "impulse_noise", severity, scale=scale)
        white, black = (out == 255), (out == 0)
        assert white.mean() == pytest.approx(amount / 2, rel=0.08)
        assert black.mean() == pytest.approx(amount / 2, rel=0.08)
        assert (white | black | (out == 100)).all()
        assert (white | black).all(axis=-1).mean() < 3 * amount**3  # channels are hit independently


@pytest.mark.parametrize(("scale", "photons"), [("cifar", (500, 250, 100, 75, 50)), ("imagenet", (60, 25, 12, 5, 3))])
def test_shot_noise_counts_photons(scale, photons):
    for severity, full in enumerate(photons, 1):
        level = 60 if full > 12 else 20
        out = corrupt(flat(level), "shot_noise", severity, scale=scale)
        counts = np.ceil(out * (full / 255) - 1e-6) if full < 255 else (out + 0.495) * (full / 255)
        expected = level / 255 * full
        assert abs(counts.mean() - expected) < 4.5 * math.sqrt(expected / counts.size)
        assert counts.var() == pytest.approx(expected, rel=0.06)
        if full <= 100:
            assert set(np.unique(out)) <= {int(k / full * 255) for k in range(full + 1)}


# --------------------------------------------------------------------------------------------------------------------------- errors
@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        ({"name": "gausian_noise"}, "gausian_noise", "did you mean 'gaussian_noise'"),
        ({"name": "xyz"}, "xyz", "gaussian_noise, shot_noise"),
        ({"severity": 6}, "1 (mild) to 5", "severity=5"),
        ({"severity": -1}, "not -1", "severity=5"),
        ({"severity": 2.5}, "not 2.5", "severity=5"),
        ({"severity": True}, "not True", "severity=5"),
        ({"seed": -1}, "not -1", "seed=0"),
        ({"scale": "mnist"}, "mnist", "imagenet"),
        ({"start": -3}, "not -3", "from 0"),
    ],
)
def test_wrong_arguments_say_what_is_wrong_and_how_to_mend_it(arguments, message, hint):
    with pytest.raises(UsageError) as caught:
        corrupt(photographs(1), **{"name": "fog", **arguments})
    assert message in caught.value.message
    assert hint in caught.value.hint


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((2, 8, 8, 3), np.float32), "float32 array"),
        ([[1, 2]], "list"),
        (np.zeros((8, 8), np.uint8), "(8, 8)"),
        (np.zeros((2, 3, 8, 8), np.uint8), "(2, 3, 8, 8)"),
        (np.zeros((0, 8, 3), np.uint8), "(0, 8, 3)"),
    ],
)
def test_wrong_images_say_what_came(images, message):
    with pytest.raises(InputError, match="expected images") as caught:
        corrupt(images, "fog")
    assert message in caught.value.message


@pytest.mark.parametrize("name", sorted(NEEDS_PILLOW))
def test_without_pillow_the_error_names_the_extra(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(UsageError, match=r"edgeadapt\[images\]"):
        corrupt(photographs(1), name)


@pytest.mark.device
def test_importing_and_noise_load_no_heavy_library():
    code = (
        "import sys, numpy; from edgeadapt.corruptions import corrupt; corrupt(numpy.zeros((32, 32, 3), 'uint8'), 'snow')\n"
        "print([m for m in ('PIL', 'torch', 'onnxruntime', 'scipy', 'cv2') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


# ------------------------------------------------------------------------------------------------------------------------ real data
@pytest.fixture(scope="module")
def pack(data_pack) -> ModuleType:
    spec = importlib.util.spec_from_file_location("pack_loaders", data_pack / "loaders.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.data
def test_real_images_are_damaged_but_still_pictures(pack):
    images = pack.cifar_test1000()[0][:64]
    for name in ALL:
        out = corrupt(images, name)
        likeness = [np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in zip(images.astype(float), out.astype(float))]
        assert 0.4 < np.mean(likeness) < 0.9999, name
        assert out.std() > 8, name


@pytest.mark.data
def test_a_plain_network_errs_as_published(pack):
    """ResNet-20, severity 5: bounds around the pattern of CIFAR-10-C; on 500 images the errors are 76, 58, 40, 42, 13 and 32 %."""
    import torch

    (images, labels), network = pack.cifar_test1000(), pack.cifar_resnet(20)
    images, labels = images[:200], labels[:200]
    bounds = {
        "gaussian_noise": (60, 88),
        "glass_blur": (42, 72),
        "motion_blur": (25, 55),
        "frost": (25, 58),
        "brightness": (4, 22),
        "jpeg_compression": (20, 45),
    }
    for name, (low, high) in bounds.items():
        with torch.no_grad():
            guess = network(network.prep(corrupt(images, name))).argmax(1).numpy()
        assert low < 100 * np.mean(guess != labels) < high, name
