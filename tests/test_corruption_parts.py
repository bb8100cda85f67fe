"""The building blocks of the corruptions, each against a slow version that shows what is meant."""

from __future__ import annotations

import colorsys
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeadapt.corruptions import blur, colour, corrupt, kernels, spatter, textures
from edgeadapt.corruptions.catalogue import generator


def flat(value: int, count: int, side: int) -> np.ndarray:
    return np.full((count, side, side, 3), value, np.uint8)


def grain(*shape: int) -> np.ndarray:
    return np.random.default_rng(10).integers(0, 256, shape, dtype=np.uint8)


def test_hsv_agrees_with_the_standard_library():
    pixels = np.random.default_rng(5).integers(0, 256, (500, 3)) / 255.0
    pixels[:20] = pixels[:20, :1]
    hue, saturation, value = colour.rgb_to_hsv(pixels)
    assert np.allclose(np.stack([hue, saturation, value], 1), [colorsys.rgb_to_hsv(*p) for p in pixels], atol=1e-12)
    assert np.allclose(colour.hsv_to_rgb(hue, saturation, value), pixels, atol=1e-12)


def test_a_flat_picture_stays_flat_under_every_blur():
    for name in ("gaussian_blur", "glass_blur", "motion_blur", "zoom_blur", "elastic_transform", "defocus_blur", "pixelate"):
        out = corrupt(flat(77, 2, 32), name, 5, scale="cifar")
        assert np.unique(out).tolist() in ([77], [76]), name


@pytest.mark.parametrize("border", ["edge", "reflect", "mirror"])
def test_axis_filters_fold_the_border_as_numpy_pads(border):
    rng = np.random.default_rng(6)
    for n, half in ((5, 1), (9, 4), (12, 11)):
        line, taps = rng.normal(size=n), rng.normal(size=2 * half + 1)
        padded = np.pad(line, half, mode={"edge": "edge", "reflect": "symmetric", "mirror": "reflect"}[border])
        assert np.allclose(kernels.axis_filter(n, taps.tolist(), border) @ line, np.correlate(padded, taps, "valid"), atol=1e-5)


def test_gaussian_axis_is_a_normalised_gaussian_cut_at_four_sigmas():
    middle = kernels.gaussian_axis(33, 2.0)[16]
    shape = np.exp(-(np.arange(-8, 9) ** 2) / 8)
    assert np.allclose(middle[8:25], shape / shape.sum(), atol=1e-6)
    assert middle[:8].sum() == 0
    assert np.array_equal(kernels.gaussian_axis(7, 0), np.eye(7))


def test_zoom_axis_enlarges_the_middle():
    ramp = np.arange(32, dtype=np.float64)
    assert np.array_equal(kernels.zoom_axis(32, 1.0), np.eye(32))
    twice = kernels.zoom_axis(32, 2.0) @ ramp  # the middle 16 pixels, 8..23, spread over 32
    assert np.allclose(twice, np.linspace(8, 23, 32), atol=1e-5)


@pytest.mark.parametrize(("n", "factor"), [(9, 1.75), (32, 1.07), (33, 2.25), (40, 4.5), (1, 3.0)])
def test_zoom_axis_takes_the_crop_and_trims_as_published(n, factor):
    crop = math.ceil(n / factor)
    line = np.arange(n)[(n - crop) // 2 :][:crop]
    full = round(crop * factor)
    grown = np.interp(np.linspace(0, crop - 1, full), np.arange(crop), line)
    assert np.allclose(kernels.zoom_axis(n, factor) @ np.arange(n), grown[(full - n) // 2 :][:n], atol=1e-4)


def test_zoom_blur_is_the_mean_of_the_zooms_and_of_the_image_once_more():
    image = grain(32, 32, 3) / 255.0
    total, factors = image.copy(), [1 + k / 100 for k in range(7)]
    for factor in factors:
        matrix = kernels.zoom_axis(32, factor).astype(np.float64)
        total += np.einsum("ij,jkc,lk->ilc", matrix, image, matrix)
    out = corrupt(grain(32, 32, 3), "zoom_blur", 1)
    assert np.abs(out - np.floor(total / 8 * 255 + 1e-3)).max() <= 1


@pytest.mark.parametrize("radius", [1, 1.5, 3, 10])
def test_defocus_is_correlation_with_the_disk(radius):
    alias = 0.5
    kernel = kernels.disk(radius, alias)
    half = len(kernel) // 2
    image = np.random.default_rng(7).random((24, 30))
    padded = np.pad(image, half, mode="reflect")
    slow = sum(kernel[y, x] * padded[y : y + 24, x : x + 30] for y in range(2 * half + 1) for x in range(2 * half + 1))
    rows, columns = kernels.disk_axes(24, radius, alias), kernels.disk_axes(30, radius, alias)
    fast = sum(s * (rows[k] @ image @ columns[k].T) for k, s in enumerate(kernels.disk_signs(radius, alias)))
    assert np.allclose(fast, slow, atol=1e-5)
    assert kernel.sum() == pytest.approx(1, abs=0.02)
    assert kernel[half, half] == kernel.max() > kernel[0, 0]


@given(reach=st.integers(1, 4), h=st.integers(1, 14), w=st.integers(1, 14), seed=st.integers(0, 9))
def test_glass_displacement_equals_the_loop_that_overwrites(reach, h, w, seed):
    image = np.random.default_rng(seed).integers(0, 256, (h, w, 3), dtype=np.uint8)
    slow = image.copy()
    rows, columns = range(h - reach, reach, -1), range(w - reach, reach, -1)
    if rows and columns:
        move = np.random.default_rng(100 + seed).integers(-reach, reach, size=(2, len(rows), len(columns)))
        for y in rows:
            for x in columns:
                dy, dx = move[:, y - reach - 1, x - reach - 1]
                slow[y, x] = slow[y + dy, x + dx]
    assert np.array_equal(blur.displaced(image, reach, np.random.default_rng(100 + seed)), slow)


@pytest.mark.parametrize("degrees", [0, 30, -45, -90, -135, 200])
def test_motion_blur_is_a_one_sided_line(degrees):
    image = np.zeros((41, 41, 1), np.float32)
    image[20, 20] = 1
    out = kernels.motion_blur(image, 6, 2.0, degrees)[..., 0]
    weights = [math.exp(-(k * k) / 8) for k in range(13)]
    expected = np.zeros((41, 41))
    for k, weight in enumerate(weights):  # a pixel looks ahead along the angle, so that the point is smeared backwards
        dx = math.ceil(k * math.cos(math.radians(degrees)) - 0.5)
        dy = math.ceil(k * math.sin(math.radians(degrees)) - 0.5)
        expected[20 - dy, 20 - dx] += weight / sum(weights)
    assert np.allclose(out, expected, atol=1e-6)
    assert out.sum() == pytest.approx(1, abs=1e-5)


def test_bilinear_interpolates_and_folds():
    line = np.array([10, 20, 40, 80], np.float32).reshape(1, 1, 4, 1)
    at = np.array([-0.25, -1.0, 0.5, 2.75, 3.5], np.float32)
    row = np.zeros_like(at)
    for border, expected in (("reflect", [10, 10, 15, 70, 80]), ("mirror", [12.5, 20, 15, 70, 60])):
        got = [
            float(kernels.bilinear(line, np.full((1, 1, 4), y, np.float32), np.full((1, 1, 4), x, np.float32), border)[0, 0, 0, 0])
            for y, x in zip(row, at)
        ]
        assert got == pytest.approx(expected)


def test_plasma_sets_every_point_from_its_four_neighbours():
    side, decay = 8, 2.0
    noise = np.random.default_rng(8).random((1, side, side)).astype(np.float32)
    grid, step, reach = np.zeros((side, side)), side, 1.0
    wobble = noise[0].astype(np.float64) * 2 - 1
    while step > 1:
        half = step // 2
        squares = [(y, x) for y in range(half, side, step) for x in range(half, side, step)]
        for y, x in squares:
            grid[y, x] = sum(grid[(y + a) % side, (x + b) % side] for a in (-half, half) for b in (-half, half)) / 4 + reach * wobble[y, x]
        for y, x in [(y, x) for y in range(0, side, half) for x in range(0, side, half) if (y // half + x // half) % 2]:
            around = grid[(y - half) % side, x] + grid[(y + half) % side, x] + grid[y, (x - half) % side] + grid[y, (x + half) % side]
            grid[y, x] = around / 4 + reach * wobble[y, x]
        step, reach = half, reach / decay**2
    grid = (grid - grid.min()) / (grid.max() - grid.min())
    assert np.allclose(textures.plasma(noise, decay)[0], grid, atol=1e-5)


@pytest.mark.parametrize(("scale", "amounts"), [("cifar", (0.2, 0.5, 0.75, 1, 1.5)), ("imagenet", (1.5, 2, 2.5, 2.5, 3))])
def test_fog_scales_the_picture_back_to_its_own_maximum(scale, amounts):
    for severity, amount in enumerate(amounts, 1):
        out = corrupt(flat(200, 4, 32), "fog", severity, scale=scale)
        assert out.max() == 200  # where the cloud is thickest
        assert out.min() == int(200 * (200 / 255) / (200 / 255 + amount) + 1e-3)  # where there is none


@pytest.mark.parametrize(("scale", "sigmas"), [("cifar", (0.4, 0.6, 0.7, 0.8, 1)), ("imagenet", (1, 2, 3, 4, 6))])
def test_gaussian_blur_spreads_an_edge_by_its_sigma(scale, sigmas):
    step = np.zeros((64, 64, 1), np.uint8)
    step[:, 32:] = 255
    for severity, sigma in enumerate(sigmas, 1):
        line = corrupt(step, "gaussian_blur", severity, scale=scale)[30, :, 0]
        taps = np.exp(-(np.arange(-int(4 * sigma + 0.5), int(4 * sigma + 0.5) + 1) ** 2) / (2 * sigma**2))
        exact = np.convolve(np.pad(step[0, :, 0], len(taps) // 2, mode="edge"), taps / taps.sum(), "valid")
        assert np.abs(line - np.floor(exact + 1e-3)).max() <= 1


def test_ice_is_the_same_for_every_run_and_has_a_middling_level():
    for kind in range(5):
        ice = textures.ice(kind, textures.ice_side(32))
        assert ice.mean() == pytest.approx(0.55 * 255, rel=0.05)
        assert not ice.flags.writeable
    textures.ice.cache_clear()
    assert np.array_equal(ice, textures.ice(4, textures.ice_side(32)))


def test_distances_are_euclidean_up_to_twenty_pixels():
    edge = np.random.default_rng(9).random((2, 30, 37)) < 0.01
    points = [np.argwhere(layer) for layer in edge]
    ys, xs = np.mgrid[:30, :37]
    for layer, got in zip(points, spatter.distance(edge)):
        slow = np.sqrt(((ys[..., None] - layer[:, 0]) ** 2 + (xs[..., None] - layer[:, 1]) ** 2).min(-1))
        assert np.allclose(np.minimum(got, 20), np.minimum(slow, 20), atol=1e-4)
    assert spatter.distance(np.zeros((1, 5, 6), bool)).min() > 20


def test_edges_outline_a_square_and_weak_ones_need_a_strong_neighbour():
    picture = np.zeros((1, 24, 24), np.float32)
    picture[0, 8:16, 8:16] = 200
    found = spatter.edges(picture)[0]
    assert found[9:15, 7:9].any(axis=1).all()
    assert not found[10:14, 10:14].any()
    assert not found[:6].any()
    assert found.sum() <= 4 * 8 + 8  # one pixel thick
    assert not spatter.edges(picture * np.float32(0.11)).any()  # gradient 88, at corners 132: weak everywhere


def test_equalised_spreads_the_levels():
    image = np.repeat(np.array([10, 11, 12, 13], np.uint8), 8).reshape(4, 8)
    assert np.unique(spatter.equalised(image)).tolist() == [0, 85, 170, 255]
    assert np.array_equal(spatter.equalised(image[:1]), image[:1])


# ------------------------------------------------------------------------ whole corruptions, written out again from the same random numbers
def close(got: np.ndarray, unit: np.ndarray) -> None:
    """At most one level apart, and that seldom: float32 against float64 before truncation."""
    difference = np.abs(got.astype(int) - np.floor(np.clip(unit, 0, 1) * 255 + 1e-3))
    assert difference.max() <= 1
    assert difference.mean() < 0.02


def published(cifar: object, imagenet: object) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(("scale", "strength"), [("cifar", cifar), ("imagenet", imagenet)])


@published((9, 2.5), (20, 15))
def test_motion_blur_at_severity_five(scale, strength):
    image = grain(24, 31, 3)
    angle = generator(4, "motion_blur", 5, 6).uniform(-45, 45)
    got = corrupt(image, "motion_blur", 5, seed=4, scale=scale, start=6)
    assert np.abs(got - kernels.motion_blur(image.astype(np.float32), *strength, angle)).max() <= 0.51


@published((1.5, 0.1), (10, 0.5))
def test_defocus_blur_at_severity_five(scale, strength):
    image, kernel = grain(24, 31, 3), kernels.disk(*strength)
    half = len(kernel) // 2
    padded = np.pad(image / 255, ((half, half), (half, half), (0, 0)), mode="reflect")
    slow = sum(kernel[y, x] * padded[y : y + 24, x : x + 31] for y in range(2 * half + 1) for x in range(2 * half + 1))
    close(corrupt(image, "defocus_blur", 5, scale=scale), slow)


@published([1 + k / 100 for k in range(26)], [1 + 3 * k / 100 for k in range(11)])
def test_zoom_blur_at_severity_five(scale, strength):
    unit = np.moveaxis(grain(24, 31, 3), -1, 0).astype(np.float32) / 255
    slow = (unit + sum(kernels.clipped_zoom(unit, factor) for factor in strength)) / (len(strength) + 1)
    close(corrupt(grain(24, 31, 3), "zoom_blur", 5, scale=scale), np.moveaxis(slow, 0, -1))


@published((0.4, 1, 2), (1.5, 4, 2))
def test_glass_blur_at_severity_five(scale, strength):
    def smooth(image: np.ndarray) -> np.ndarray:
        return np.moveaxis(kernels.smooth(np.moveaxis(image, -1, 0).astype(np.float32) / np.float32(255), strength[0]), 0, -1)

    draw = generator(0, "glass_blur", 5, 0)
    image = (smooth(grain(24, 31, 3)) * 255 + 1e-3).astype(np.uint8)
    for _ in range(strength[2]):
        image = blur.displaced(image, strength[1], draw)
    close(corrupt(grain(24, 31, 3), "glass_blur", 5, scale=scale), smooth(image))


@published((0.3, 0.3, 1.25, 0.65, 14, 12, 0.8), (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55))
def test_snow_at_severity_five(scale, strength):
    mean, deviation, zoom, threshold, radius, sigma, weight = strength
    image, draw = grain(24, 31, 3) // 2, generator(0, "snow", 5, 0)
    layer = kernels.clipped_zoom(mean + deviation * draw.standard_normal((24, 31), dtype=np.float32), zoom)
    layer = (np.where(layer < threshold, 0, np.clip(layer, 0, 1)) * 255 + 1e-3).astype(np.uint8).astype(np.float32)[..., None]
    flakes = np.rint(kernels.motion_blur(layer, radius, sigma, draw.uniform(-135, -45))) / 255
    unit = image / 255
    grey = (0.299 * unit[..., 0] + 0.587 * unit[..., 1] + 0.114 * unit[..., 2])[..., None]
    close(corrupt(image, "snow", 5, scale=scale), weight * unit + (1 - weight) * np.maximum(unit, 1.5 * grey + 0.5) + flakes + np.rot90(flakes, 2))


@published((0.75, 0.45), (0.6, 0.75))
def test_frost_at_severity_five(scale, strength):
    image, draw = grain(24, 31, 3), generator(0, "frost", 5, 0)
    side = textures.ice_side(31)
    ice = textures.ice(int(draw.integers(5)), side)
    top, left = int(draw.integers(side - 23)), int(draw.integers(side - 30))
    crop = ice[top : top + 24, left : left + 31, None] / 255 * np.array([0.88, 0.97, 1.0])
    close(corrupt(image, "frost", 5, scale=scale), strength[0] * image / 255 + strength[1] * crop)


def test_the_five_ices_differ():
    assert len({textures.ice(kind, 128).tobytes() for kind in range(5)}) == 5


@published((0.65, 0.1, 0.5, 0.68, 0.6), (0.67, 0.4, 1, 0.65, 1.5))
def test_mud_spatter_at_severity_five(scale, strength):
    mean, deviation, sigma, threshold, outline = strength
    image = grain(40, 31, 3)
    noise = generator(0, "spatter", 5, 0).standard_normal((40, 31), dtype=np.float32)
    mask = kernels.smooth((kernels.smooth(mean + deviation * noise, sigma) > threshold).astype(np.float32), outline)[..., None]
    mask = np.where(mask < 0.8, 0, mask)
    assert mask.any()
    close(corrupt(image, "spatter", 5, scale=scale), image / 255 * (1 - mask) + mask * np.array([63, 42, 20]) / 255)


@published((0.62, 0.1, 0.7, 0.7, 0.5), (0.65, 0.3, 4, 0.69, 0.6))
def test_water_spatter_adds_pale_turquoise_up_to_its_intensity(scale, strength):
    mean, deviation, sigma, threshold, intensity = strength
    image = np.full((64, 64, 3), 10, np.uint8)
    layer = kernels.smooth(mean + deviation * generator(0, "spatter", 1, 0).standard_normal((64, 64), dtype=np.float32), sigma)
    added = corrupt(image, "spatter", 1, scale=scale).astype(int) - 10
    assert not added[layer < threshold].any()
    assert added[..., 1].max() == pytest.approx(intensity * 238, abs=1)
    assert added[..., 0].max() == pytest.approx(intensity * 175, abs=1)


def elastic_slowly(image: np.ndarray, draw: np.random.Generator, shift: float, sigma: float, corner: float) -> np.ndarray:
    """The elastic distortion pixel by pixel, the affine map by Cramer's rule."""
    h, w, _ = image.shape
    side = min(h, w) // 3
    before = [(w // 2 + side, h // 2 + side), (w // 2 + side, h // 2 - side), (w // 2 - side, h // 2 - side)]
    after = np.array(before) + draw.uniform(-corner, corner, size=(3, 2))
    (x0, y0), (x1, y1), (x2, y2) = after
    area = (x1 - x0) * (y2 - y0) - (x2 - x0) * (y1 - y0)
    field = kernels.smooth(draw.uniform(-1, 1, size=(2, h, w)).astype(np.float32), sigma, "reflect", 3.0) * shift
    warped, out = np.zeros(image.shape), np.zeros(image.shape)
    for y in range(h):
        for x in range(w):
            a = ((x - x0) * (y2 - y0) - (x2 - x0) * (y - y0)) / area
            b = ((x1 - x0) * (y - y0) - (x - x0) * (y1 - y0)) / area
            from_x, from_y = ((1 - a - b) * before[0][k] + a * before[1][k] + b * before[2][k] for k in (0, 1))
            warped[y, x] = pick(image / 255, from_y, from_x, "reflect")
    for y in range(h):
        for x in range(w):
            out[y, x] = pick(warped, y + field[1, y, x], x + field[0, y, x], "symmetric")
    return out


def pick(image: np.ndarray, y: float, x: float, border: str) -> np.ndarray:
    reach = 40
    padded = np.pad(image, ((reach, reach), (reach, reach), (0, 0)), mode=border)
    top, left = math.floor(y), math.floor(x)
    cell = padded[top + reach : top + reach + 2, left + reach : left + reach + 2]
    return np.einsum("i,j,ijc->c", [1 - (y - top), y - top], [1 - (x - left), x - left], cell)


@pytest.mark.parametrize(
    ("scale", "severity", "strength"),
    [("cifar", 2, (0.05, 0.2, 0.07)), ("cifar", 5, (0.1, 0.03, 0.03)), ("imagenet", 5, tuple(v * 244 / 224 for v in (0.12, 0.01, 0.02)))],
)
def test_elastic_transform(scale, severity, strength):
    image = grain(21, 18, 3)
    slow = elastic_slowly(image, generator(0, "elastic_transform", severity, 0), *(18 * v for v in strength))
    close(corrupt(image, "elastic_transform", severity, scale=scale), slow)
