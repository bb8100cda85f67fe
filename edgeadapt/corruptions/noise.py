"""Noise: each pixel and channel is disturbed on its own.

Every corruption here and in the sibling modules has one form: `f(x, strength, draws)` takes a chunk x uint8 (n, h, w, c), one severity's numbers from
`parameters`, and one random generator for each image, and returns a new uint8 array of the same shape.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edgeadapt.corruptions.kernels import Bytes, Floats, to_bytes
from edgeadapt.corruptions.parameters import Strength


def _unit(x: Bytes) -> Floats:
    out: Floats = x.astype(np.float32) / np.float32(255)
    return out


def _normal(x: Bytes, draws: Sequence[np.random.Generator]) -> Floats:
    return np.stack([draw.standard_normal(x.shape[1:], dtype=np.float32) for draw in draws])


def gaussian_noise(x: Bytes, strength: Strength, draws: Sequence[np.random.Generator]) -> Bytes:
    """Adds normal noise; strength (standard deviation in units of full scale,)."""
    return to_bytes(_unit(x) + np.float32(strength[0]) * _normal(x, draws))


def shot_noise(x: Bytes, strength: Strength, draws: Sequence[np.random.Generator]) -> Bytes:
    """Photon counting: Poisson with the pixel as its mean; strength (photons at full scale,)."""
    photons = strength[0]
    counts = np.stack([draw.poisson(image / 255.0 * photons) for image, draw in zip(x, draws, strict=True)])
    return (np.clip(counts / photons, 0, 1) * 255).astype(np.uint8)


def impulse_noise(x: Bytes, strength: Strength, draws: Sequence[np.random.Generator]) -> Bytes:
    """Salt and pepper on single channel values, half each; strength (share of values hit,)."""
    amount = np.float32(strength[0])
    chance = np.stack([draw.random(x.shape[1:], dtype=np.float32) for draw in draws])
    return np.where(chance < amount / 2, np.uint8(0), np.where(chance < amount, np.uint8(255), x))


def speckle_noise(x: Bytes, strength: Strength, draws: Sequence[np.random.Generator]) -> Bytes:
    """Adds normal noise in proportion to the pixel; strength (standard deviation at full scale,)."""
    unit = _unit(x)
    return to_bytes(unit + unit * (np.float32(strength[0]) * _normal(x, draws)))
