"""Colour spaces on arrays whose last axis is red, green, blue (or a single grey channel where that makes sense)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Doubles = NDArray[np.float64]


def luma(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """(…, 3) or (…, 1) to (…, 1): 0.299 R + 0.587 G + 0.114 B; a single channel is its own luma."""
    if x.shape[-1] == 1:
        return x
    return (x @ np.array([0.299, 0.587, 0.114], np.float32))[..., None]


def tinted(colour: tuple[float, float, float], channels: int) -> NDArray[np.float32]:
    """An RGB colour as a vector of 3 channels, or of 1 holding its luma."""
    vector = np.array(colour, np.float32)
    return vector if channels == 3 else luma(vector)


def rgb_to_hsv(x: Doubles) -> tuple[Doubles, Doubles, Doubles]:
    """Hue, saturation and value in 0..1 of RGB in 0..1, shape (…, 3) to three arrays (…); greys have hue and saturation 0."""
    red, green, blue = x[..., 0], x[..., 1], x[..., 2]
    value = x.max(axis=-1)
    delta = value - x.min(axis=-1)
    safe = np.where(delta == 0, 1.0, delta)
    hue = np.where(value == blue, 4 + (red - green) / safe, np.where(value == green, 2 + (blue - red) / safe, (green - blue) / safe))
    hue = np.where(delta == 0, 0.0, (hue / 6) % 1)
    return hue, delta / np.where(value == 0, 1.0, value), value


def hsv_to_rgb(hue: Doubles, saturation: Doubles, value: Doubles) -> Doubles:
    """The inverse of `rgb_to_hsv`: three arrays (…) to (…, 3)."""
    sextant = np.floor(hue * 6)
    part = hue * 6 - sextant
    low = value * (1 - saturation)
    falling = value * (1 - part * saturation)
    rising = value * (1 - (1 - part) * saturation)
    which = sextant.astype(np.int64) % 6
    red = np.choose(which, [value, falling, low, low, rising, value])
    green = np.choose(which, [rising, value, value, falling, low, low])
    blue = np.choose(which, [low, low, rising, value, value, falling])
    return np.stack([red, green, blue], axis=-1)
