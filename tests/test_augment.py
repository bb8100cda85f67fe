"""The warm-up's augmentation against values worked out by hand from torchvision's definitions of its transforms."""

from __future__ import annotations

import colorsys
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from edgeadapt.exporters import augment as module
from edgeadapt.exporters.augment import LUMA, augment, blur, brightness, contrast, greyscale, hue, jitter, saturation


def images(count: int = 4, channels: int = 3, height: int = 6, width: int = 5, seed: int = 0) -> Tensor:
    return torch.rand((count, channels, height, width), generator=torch.Generator().manual_seed(seed))


def one(*pixel: float) -> Tensor:
    return torch.tensor(pixel).reshape(1, -1, 1, 1)


def pixel(x: Tensor) -> list[float]:
    return [float(value) for value in x.flatten()]


def factors(*values: float) -> Tensor:
    return torch.tensor(values)


def test_brightness_scales_and_clamps() -> None:
    assert pixel(brightness(one(0.2, 0.5, 0.9), factors(1.4))) == pytest.approx([0.28, 0.7, 1.0])
    assert pixel(brightness(one(0.2, 0.5, 0.9), factors(0.6))) == pytest.approx([0.12, 0.3, 0.54])


def test_greyscale_is_the_luma_of_itu_601() -> None:
    assert pixel(greyscale(one(1.0, 0.0, 0.0))) == pytest.approx([0.2989])
    assert pixel(greyscale(one(0.5, 0.2, 0.4))) == pytest.approx([0.5 * 0.2989 + 0.2 * 0.587 + 0.4 * 0.114])


def test_contrast_blends_with_the_mean_luma_of_the_whole_image() -> None:
    x = torch.zeros((2, 3, 1, 2))
    x[0, 0, 0, 0] = 1.0  # one red pixel of two: mean luma 0.14945
    x[1] = 0.5
    y = contrast(x, factors(0.6, 1.4))
    assert pixel(y[0]) == pytest.approx([0.6 + 0.4 * 0.14945, 0.4 * 0.14945, *[0.4 * 0.14945] * 4])
    assert torch.allclose(y[1], torch.full_like(y[1], 0.5 * sum(LUMA) * -0.4 + 0.5 * 1.4))
    assert pixel(contrast(torch.tensor([0.2, 0.6]).reshape(1, 1, 1, 2), factors(0.5))) == pytest.approx([0.3, 0.5])


def test_saturation_blends_with_the_luma_of_each_pixel() -> None:
    grey = 0.8 * 0.2989 + 0.2 * 0.587 + 0.4 * 0.114
    assert pixel(saturation(one(0.8, 0.2, 0.4), factors(0.7))) == pytest.approx([0.7 * value + 0.3 * grey for value in (0.8, 0.2, 0.4)])
    assert pixel(saturation(one(0.9, 0.1, 0.1), factors(1.4)))[0] == 1.0


@given(st.tuples(*[st.floats(0, 1, width=32)] * 3), st.floats(-0.5, 0.5))
def test_hue_is_a_turn_in_hsv(rgb: tuple[float, float, float], turn: float) -> None:
    h, s, v = colorsys.rgb_to_hsv(*rgb)
    want = colorsys.hsv_to_rgb((h + turn) % 1.0, s, v)
    assert pixel(hue(one(*rgb), factors(turn))) == pytest.approx(want, abs=2e-5)


def test_hue_of_known_colours() -> None:
    third = factors(1 / 3)
    assert pixel(hue(one(1.0, 0.0, 0.0), third)) == pytest.approx([0.0, 1.0, 0.0], abs=1e-5)
    assert pixel(hue(one(0.0, 0.2, 0.0), third)) == pytest.approx([0.0, 0.0, 0.2], abs=1e-5)
    assert pixel(hue(one(0.4, 0.4, 0.4), third)) == pytest.approx([0.4, 0.4, 0.4])
    assert pixel(hue(one(1.0, 0.0, 0.0), factors(1 / 12))) == pytest.approx([1.0, 0.5, 0.0], abs=1e-5)


def test_blur_is_a_normalised_gaussian_of_three_pixels_a_side() -> None:
    x = torch.zeros((1, 1, 5, 5))
    x[0, 0, 2, 2] = 1.0
    sigma = 0.8
    line = np.exp(-0.5 * np.array([1.0, 0.0, 1.0]) / sigma**2)
    line /= line.sum()
    y = blur(x, factors(sigma))[0, 0].numpy()
    assert y[1:4, 1:4] == pytest.approx(np.outer(line, line), abs=1e-6)
    assert y[[0, 4]].max() == y[:, [0, 4]].max() == 0.0


def test_blur_reflects_at_the_edges() -> None:
    x = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]).reshape(1, 1, 3, 3)
    side = math.exp(-0.5 / 4.0)
    centre, side = 1 / (1 + 2 * side), side / (1 + 2 * side)
    y = blur(x, factors(2.0))[0, 0]
    assert float(y[0, 0]) == pytest.approx(2 * side * centre)  # the neighbour to the right, and its mirror image to the left
    assert float(y[0, 1]) == pytest.approx(centre * centre)
    assert float(y[1, 1]) == pytest.approx(side * centre)


def test_a_very_narrow_blur_changes_nothing_and_lines_can_be_blurred() -> None:
    x = images()
    assert torch.allclose(blur(x, torch.full((4,), 0.1)), x)
    assert blur(x[:, :, :1], factors(1, 1, 1, 1)).shape == (4, 3, 1, 5)
    assert torch.equal(blur(x[:, :, :1, :1], factors(1, 1, 1, 1)), x[:, :, :1, :1])


@pytest.mark.parametrize("change", [brightness, contrast, saturation, hue, blur])
def test_every_image_has_its_own_factor(change: module.Change) -> None:
    x, values = images(), factors(0.5, 0.7, 0.9, 0.3)
    y = change(x, values)
    for k in range(4):
        assert torch.allclose(y[k : k + 1], change(x[k : k + 1], values[k : k + 1]), atol=1e-6)


@pytest.mark.parametrize("change", [brightness, contrast, saturation])
def test_a_factor_of_one_is_the_image(change: module.Change) -> None:
    x = images()
    assert torch.allclose(change(x, torch.ones(4)), x)
    assert torch.allclose(hue(x, torch.zeros(4)), x, atol=1e-6)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_augmentation_is_seeded_keeps_its_input_and_its_range(channels: int) -> None:
    x = images(64, channels)
    before = x.clone()
    first, second, other = (augment(x, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(x, before)
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert first.shape == x.shape
    assert float(first.min()) >= 0.0
    assert float(first.max()) <= 1.0


def test_the_shares_of_changed_images_are_as_published(monkeypatch: pytest.MonkeyPatch) -> None:
    x = images(4000, height=4, width=4)
    changed = {}
    for name in ("CHANCE_JITTER", "CHANCE_BLUR", "CHANCE_GREY"):
        with monkeypatch.context() as patch:
            for other in {"CHANCE_JITTER", "CHANCE_BLUR", "CHANCE_GREY"} - {name}:
                patch.setattr(module, other, 0.0)
            y = augment(x, torch.Generator().manual_seed(0))
        changed[name] = float((y != x).flatten(1).any(1).float().mean())
    assert changed == {
        "CHANCE_JITTER": pytest.approx(0.4, abs=0.03),
        "CHANCE_BLUR": pytest.approx(0.2, abs=0.03),
        "CHANCE_GREY": pytest.approx(0.1, abs=0.02),
    }


def test_grey_images_stay_grey_and_have_no_colours_to_change() -> None:
    x = images(200).mean(1, keepdim=True).expand(-1, 3, -1, -1)
    y = jitter(x, torch.Generator().manual_seed(0))
    assert float((y - y.mean(1, keepdim=True)).abs().max()) < 1e-3  # the luma weights sum to 0.9999
    assert not torch.allclose(x, y)


def test_the_order_of_the_changes_differs_between_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """With brightness and contrast as x + 1 and 2·x the order can be read from the result."""
    monkeypatch.setattr(module, "brightness", lambda x, factor: x + 1)
    monkeypatch.setattr(module, "contrast", lambda x, factor: x * 2)
    y = jitter(torch.zeros((400, 1, 1, 1)), torch.Generator().manual_seed(0)).flatten()
    assert set(y.tolist()) == {1.0, 2.0}
    assert float((y == 2.0).float().mean()) == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("shape", [(8, 6), (8, 6, 128)])
def test_what_is_no_image_is_not_changed(shape: tuple[int, ...]) -> None:
    x = torch.rand(shape)
    assert augment(x, torch.Generator().manual_seed(0)) is x


def test_an_empty_batch() -> None:
    assert augment(torch.zeros((0, 3, 4, 4)), torch.Generator().manual_seed(0)).shape == (0, 3, 4, 4)
