"""Brightness, contrast, saturation, elastic distortion, pixelation and JPEG. The functions' common form is described in `noise`.

Where the published definition is exact, so is this one, to the bit: the arithmetic is float64 in the published order, and the result is truncated.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from types import ModuleType

import numpy as np
from numpy.typing import NDArray

from edgeadapt.corruptions import kernels
from edgeadapt.corruptions.colour import hsv_to_rgb, rgb_to_hsv
from edgeadapt.corruptions.kernels import Bytes, to_bytes
from edgeadapt.corruptions.parameters import Strength
from edgeadapt.errors import UsageError


def brightness(x: Bytes, strength: Strength, draws: Sequence[np.random.Generator]) -> Bytes:
    """Raises the value of HSV; strength (shift in units of full scale,). A single channel is its own value."""
    unit = x / 255.0
    if x.shape[-1] == 1:
        return _truncated(unit + strength[0])
    hue, saturation, value = rgb_to_hsv(unit)
    return _truncated(hsv_to_rgb(hue, saturation, np.clip(value + strength[0], 0, 1)))


def saturate(x: Bytes, strength: Strength, draws: Sequence[np.random.Generator]) -> Bytes:
    """Scales and shifts the saturation of HSV; strength (factor, shift). A single channel has no saturation and stays as it is."""
    if x.shape[-1] == 1:
        return np.array(x)
    hue, saturation, value = rgb_to_hsv(x / 255.0)
    return _truncated(hsv_to_rgb(hue, np.clip(saturation * strength[0] + strength[1], 0, 1), value))


def contrast(x: Bytes, strength: Strength, draws: Sequence[np.random.Generator]) -> Bytes:
    """Shrinks the distance to each channel's mean over the image; strength (factor,)."""
    out = np.empty_like(x)
    for k, image in enumerate(x):
        unit = image / 255.0
        means = unit.mean(axis=(0, 1), keepdims=True)
        out[k] = _truncated((unit - means) * strength[0] + means)
    return out


def elastic_transform(x: Bytes, strength: Strength, draws: Sequence[np.random.Generator]) -> Bytes:
    """A random affine map, then a smooth random displacement of every pixel, both interpolated linearly.

    strength: displacement before smoothing, sigma of the smoothing, reach of the affine map's three random corners; each in shorter image sides.
    """
    n, h, w, _ = x.shape
    shift, sigma, corner = (part * min(h, w) for part in strength)
    across = max(min(h, w) // 3, 1)
    corners = np.array([[1, 1], [1, -1], [-1, -1]]) * across + np.array([w // 2, h // 2])
    moved = corners + np.stack([draw.uniform(-corner, corner, size=(3, 2)) for draw in draws])
    back = np.linalg.solve(np.concatenate([moved, np.ones((n, 3, 1))], axis=2), np.broadcast_to(corners.astype(np.float64), (n, 3, 2)))
    ys, xs = np.arange(h)[:, None], np.arange(w)[None, :]
    right, down = (back[:, 0, k, None, None] * xs + back[:, 1, k, None, None] * ys + back[:, 2, k, None, None] for k in (0, 1))
    warped = kernels.bilinear(x.astype(np.float32) / np.float32(255), down.astype(np.float32), right.astype(np.float32), "mirror")
    field = np.stack([draw.uniform(-1, 1, size=(2, h, w)) for draw in draws]).astype(np.float32)
    field = kernels.smooth(field, sigma, "reflect", 3.0) * np.float32(shift)
    return to_bytes(kernels.bilinear(warped, ys + field[:, 1], xs + field[:, 0], "reflect"))


def pixelate(x: Bytes, strength: Strength, draws: Sequence[np.random.Generator]) -> Bytes:
    """Shrinks by a box filter and enlarges again; strength (factor,)."""
    image_module = _pillow("pixelate")
    h, w = x.shape[1:3]
    small = (max(1, int(w * strength[0])), max(1, int(h * strength[0])))
    out = np.empty_like(x)
    for k, image in enumerate(x):
        picture = image_module.fromarray(image if x.shape[-1] == 3 else image[..., 0])
        picture = picture.resize(small, image_module.Resampling.BOX).resize((w, h), image_module.Resampling.BOX)
        out[k] = np.asarray(picture).reshape(x.shape[1:])
    return out


def jpeg_compression(x: Bytes, strength: Strength, draws: Sequence[np.random.Generator]) -> Bytes:
    """Writes and reads a JPEG; strength (quality 1..95,)."""
    image_module = _pillow("jpeg_compression")
    out = np.empty_like(x)
    for k, image in enumerate(x):
        file = io.BytesIO()
        image_module.fromarray(image if x.shape[-1] == 3 else image[..., 0]).save(file, "JPEG", quality=int(strength[0]))
        out[k] = np.asarray(image_module.open(file)).reshape(x.shape[1:])
    return out


def _truncated(unit: NDArray[np.float64]) -> Bytes:
    out: Bytes = (np.clip(unit, 0, 1) * 255).astype(np.uint8)
    return out


def _pillow(name: str) -> ModuleType:
    try:
        from PIL import Image
    except ImportError:
        raise UsageError(f"the corruption {name} needs Pillow, which is not installed", "pip install 'edgeadapt[images]'") from None
    return Image
