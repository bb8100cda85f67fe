"""Snow, frost and fog. The functions' common form is described in `noise`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edgeadapt.corruptions import kernels
from edgeadapt.corruptions.colour import luma, tinted
from edgeadapt.corruptions.kernels import Bytes, Floats, to_bytes
from edgeadapt.corruptions.parameters import Strength
from edgeadapt.corruptions.textures import ice, ice_side, plasma

_ICE_TINT = (0.88, 0.97, 1.0)


def snow(x: Bytes, strength: Strength, draws: Sequence[np.random.Generator]) -> Bytes:
    """Flakes driven by the wind over a paler picture.

    strength: mean and standard deviation of the noise layer, its zoom, the threshold below which no flake is seen, radius and sigma of the
    flakes' motion blur in pixels, weight of the picture against its whitened form.
    """
    mean, deviation, zoom, threshold, radius, sigma, weight = strength
    h, w = x.shape[1:3]
    layer = np.stack([draw.standard_normal((h, w), dtype=np.float32) for draw in draws]) * np.float32(deviation) + np.float32(mean)
    layer = kernels.clipped_zoom(layer, zoom)
    layer[layer < threshold] = 0
    flakes = to_bytes(layer).astype(np.float32)[..., None]
    for k, draw in enumerate(draws):
        flakes[k] = np.rint(kernels.motion_blur(flakes[k], radius, sigma, draw.uniform(-135, -45)))
    flakes /= 255
    unit = x.astype(np.float32) / np.float32(255)
    whitened = np.maximum(unit, luma(unit) * np.float32(1.5) + np.float32(0.5))
    pale = np.float32(weight) * unit + np.float32(1 - weight) * whitened
    return to_bytes(pale + flakes + flakes[:, ::-1, ::-1])


def frost(x: Bytes, strength: Strength, draws: Sequence[np.random.Generator]) -> Bytes:
    """Ice on the lens, added to the picture; strength (weight of the picture, weight of the ice).

    The published form crops photographs of ice. These are not shipped: the ice comes from `textures.ice`, so figures are comparable in kind only.
    """
    h, w, channels = x.shape[1:]
    side = ice_side(max(h, w))
    tint = tinted(_ICE_TINT, channels)
    out = np.empty_like(x)
    for k, draw in enumerate(draws):
        texture = ice(int(draw.integers(5)), side)
        top, left = int(draw.integers(side - h + 1)), int(draw.integers(side - w + 1))
        crop: Floats = texture[top : top + h, left : left + w, None] * tint
        out[k] = to_bytes(np.float32(strength[0] / 255) * x[k] + np.float32(strength[1] / 255) * crop)
    return out


def fog(x: Bytes, strength: Strength, draws: Sequence[np.random.Generator]) -> Bytes:
    """A plasma cloud added to the picture, which is then scaled back to its own maximum; strength (amount, roughness decay)."""
    amount = np.float32(strength[0])
    h, w = x.shape[1:3]
    side = 1 << (max(h, w, 2) - 1).bit_length()
    cloud = plasma(np.stack([draw.random((side, side), dtype=np.float32) for draw in draws]), strength[1])[:, :h, :w, None]
    unit = x.astype(np.float32) / np.float32(255)
    peak = unit.max(axis=(1, 2, 3), keepdims=True)
    return to_bytes((unit + amount * cloud) * (peak / (peak + amount)))
