"""The corruptions by name, and `corrupt`, which applies one to images."""

from __future__ import annotations

import difflib
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import cast

import numpy as np

from edgeadapt.corruptions import blur, digital, noise, weather
from edgeadapt.corruptions.kernels import Bytes
from edgeadapt.corruptions.parameters import CIFAR_SIDE, CORRUPTIONS, EXTRA, PARAMETERS, Scale, Strength
from edgeadapt.corruptions.spatter import spatter
from edgeadapt.errors import InputError, UsageError

Corruption = Callable[[Bytes, Strength, Sequence[np.random.Generator]], Bytes]

_FUNCTIONS: dict[str, Corruption] = {
    "gaussian_noise": noise.gaussian_noise,
    "shot_noise": noise.shot_noise,
    "impulse_noise": noise.impulse_noise,
    "defocus_blur": blur.defocus_blur,
    "glass_blur": blur.glass_blur,
    "motion_blur": blur.motion_blur,
    "zoom_blur": blur.zoom_blur,
    "snow": weather.snow,
    "frost": weather.frost,
    "fog": weather.fog,
    "brightness": digital.brightness,
    "contrast": digital.contrast,
    "elastic_transform": digital.elastic_transform,
    "pixelate": digital.pixelate,
    "jpeg_compression": digital.jpeg_compression,
    "speckle_noise": noise.speckle_noise,
    "gaussian_blur": blur.gaussian_blur,
    "spatter": spatter,
    "saturate": digital.saturate,
}
_CHUNK_PIXELS = 2**15  # 32 CIFAR images: working memory stays under 8 MB however long the stream


def corrupt(images: Bytes, name: str, severity: int = 5, seed: int = 0, scale: str | None = None, start: int = 0) -> Bytes:
    """Images under one of the nineteen corruptions of Hendrycks & Dietterich (2019).

    Args:
        images: uint8 (N, H, W, C) or one image (H, W, C), C = 3 (RGB) or 1; any H and W from 1 up; never modified.
        name: one of `CORRUPTIONS` or `EXTRA`.
        severity: 1..5, or 0 for a plain copy.
        seed: 0 or more. Image i depends on (seed, name, severity, start + i) alone, however a stream is cut into calls.
        scale: the published parameters to use: "cifar" or "imagenet"; None takes "cifar" where the longer side is at most 64 pixels.
        start: index of the first image in its stream.

    Returns:
        A new uint8 array of the same shape.

    Raises:
        UsageError: unknown name, severity, scale, seed or start; Pillow missing for pixelate or jpeg_compression.
        InputError: images of another type or shape.
    """
    if not whole(start, 0):
        raise UsageError(f"start is the index of the first image, 0 or more, not {start!r}", "count images from 0")
    check_images(images)
    return corrupt_at(images, name, severity, seed, scale, range(int(start), int(start) + (len(images) if images.ndim == 4 else 1)))


def corrupt_at(images: Bytes, name: str, severity: int, seed: int, scale: str | None, indices: Iterable[int]) -> Bytes:
    """`corrupt` for images whose stream indices are not consecutive: one index for each image."""
    check(name, severity, seed, scale)
    check_images(images)
    if severity == 0 or images.size == 0:
        return np.array(images)
    batch = images[None] if images.ndim == 3 else images
    h, w = batch.shape[1:3]
    strength = PARAMETERS[name][cast(Scale, scale) if scale else "cifar" if max(h, w) <= CIFAR_SIDE else "imagenet"][severity - 1]
    keys = [int(index) for index in indices]
    out: Bytes = np.empty(batch.shape, np.uint8)
    size = max(1, _CHUNK_PIXELS // (h * w))
    for first in range(0, len(batch), size):
        draws = [generator(seed, name, severity, key) for key in keys[first : first + size]]
        out[first : first + size] = _FUNCTIONS[name](np.ascontiguousarray(batch[first : first + size]), strength, draws)
    return out.reshape(images.shape)


def generator(seed: int, name: str, severity: int, index: int) -> np.random.Generator:
    """The random numbers of one image of one corruption: a function of its arguments alone."""
    sequence = np.random.SeedSequence(int(seed), spawn_key=(zlib.crc32(name.encode()), int(severity), index))
    return np.random.Generator(np.random.Philox(sequence))


def check(name: str, severity: int, seed: int, scale: str | None) -> None:
    """Raises UsageError where one of the arguments is not what `corrupt` takes."""
    if name not in PARAMETERS:
        near = difflib.get_close_matches(str(name), PARAMETERS, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else "use one of " + ", ".join(CORRUPTIONS + EXTRA)
        raise UsageError(f"unknown corruption {name!r}", hint)
    if not whole(severity, 0) or severity > 5:
        raise UsageError(f"severity is a whole number from 1 (mild) to 5 (severe), or 0 for none, not {severity!r}", "use severity=5 if unsure")
    if not whole(seed, 0):
        raise UsageError(f"seed is a whole number of 0 or more, not {seed!r}", "use seed=0")
    if scale not in (None, "cifar", "imagenet"):
        raise UsageError(f"unknown scale {scale!r}", 'use "cifar", "imagenet", or None to choose by image side')


def whole(value: object, least: int) -> bool:
    """Whether `value` is an integer (numpy's too, no bool) of at least `least`."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool) and int(value) >= least


def check_images(images: object) -> None:
    """Raises InputError where images are not what `corrupt` takes."""
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8:
        got = f"{images.dtype} array" if isinstance(images, np.ndarray) else type(images).__name__
        raise InputError(f"expected images as a uint8 array, got {got}", "give pixels 0..255 as numpy uint8, before any scaling or normalisation")
    if images.ndim not in (3, 4) or images.shape[-1] not in (1, 3) or 0 in images.shape[-3:-1]:
        raise InputError(
            f"expected images of shape (N, H, W, C) or (H, W, C) with C = 1 or 3, got {images.shape}",
            "put channels last; a grey image (H, W) becomes image[..., None]",
        )
