"""Textures made by procedure: plasma clouds (diamond-square) and fern-like ice."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from edgeadapt.corruptions import kernels
from edgeadapt.corruptions.kernels import Bytes, Floats

# Chosen so that a ResNet-20's CIFAR-10 error under frost at severity 5 (42 %) is near what is published for a WideResNet-28 and photographs (41 %).
_ICE_MEAN, _ICE_DEVIATION = 0.55, 0.25


def plasma(noise: Floats, decay: float) -> Floats:
    """Diamond-square height maps on a torus, one for each layer of `noise`.

    Args:
        noise: (n, side, side) uniform in 0..1, side a power of two: the random part of every point.
        decay: the range of the random part shrinks by decay² from one step size to its half (the published generator applies its decay twice).

    Returns:
        New array of the same shape, every map scaled to 0..1.
    """
    wobble = noise * 2 - 1
    side = noise.shape[-1]
    grid = np.zeros_like(noise)
    step, reach = side, np.float32(1)
    while step >= 2:
        half = step // 2
        corner = grid[:, ::step, ::step]
        pair = corner + np.roll(corner, -1, axis=1)
        centre = (pair + np.roll(pair, -1, axis=2)) / 4 + reach * wobble[:, half::step, half::step]
        grid[:, half::step, half::step] = centre
        across = corner + np.roll(corner, -1, axis=2) + centre + np.roll(centre, 1, axis=1)
        grid[:, ::step, half::step] = across / 4 + reach * wobble[:, ::step, half::step]
        down = corner + np.roll(corner, -1, axis=1) + centre + np.roll(centre, 1, axis=2)
        grid[:, half::step, ::step] = down / 4 + reach * wobble[:, half::step, ::step]
        step, reach = half, np.float32(reach / decay**2)
    grid -= grid.min(axis=(1, 2), keepdims=True)
    grid /= np.maximum(grid.max(axis=(1, 2), keepdims=True), np.float32(1e-12))
    return grid


def ice_side(side: int) -> int:
    """Side of the texture from which frost on an image of this side is cropped: a power of two, four images wide, but past 1024 just wide enough."""
    return max(min(_power(4 * max(side, 16)), 1024), _power(side))


def _power(least: int) -> int:
    return 1 << (least - 1).bit_length()


@lru_cache(maxsize=5)
def ice(kind: int, side: int) -> Bytes:
    """Frost on glass, uint8 (side, side), read-only: the `kind`-th of a fixed set, the same for every seed and run.

    Ferns (a stem with branches at about 60 degrees, which branch again) grow from random points; they are drawn as anti-aliased dots, thickened by a
    blur, and laid over a cloud of rime.
    """
    draw = np.random.Generator(np.random.Philox(np.random.SeedSequence(kind, spawn_key=(side,))))
    rime = plasma(draw.random((1, side, side), dtype=np.float32), 1.35)[0]
    picture = np.zeros((side, side), np.float32)
    for _ in range(60):
        length = side * draw.uniform(0.08, 0.45)
        _draw(picture, _fern(draw, draw.uniform(0, side, 2), draw.uniform(0, 2 * np.pi), length, max(2.0, side / 150)), side)
    lines = kernels.smooth(np.minimum(picture, 1), side / 800)
    texture = rime + lines * (np.float32(0.7) + rime) * np.float32(2) + np.minimum(kernels.smooth(picture, side / 100) * np.float32(2), 1)
    texture = _ICE_MEAN + (texture - texture.mean()) * (_ICE_DEVIATION / texture.std())
    texture = kernels.to_bytes(texture.astype(np.float32))
    texture.setflags(write=False)
    return texture


def _fern(draw: np.random.Generator, root: NDArray[np.float64], angle: float, length: float, spacing: float) -> NDArray[np.float64]:
    """Points (m, 3) of one fern: y, x, brightness; half a pixel apart. Branches leave about every `spacing` pixels, a third as long as their stem."""
    stems = np.array([[root[0], root[1], angle, length, 1.0]])
    points = []
    while len(stems):
        per = np.maximum(2, (stems[:, 3] * 2).astype(int))
        which = np.repeat(np.arange(len(stems)), per)
        along = (np.arange(per.sum()) - np.repeat(np.cumsum(per) - per, per)) / per[which]
        y, x, turn, size, light = stems[which].T
        bend = turn + 0.3 * along
        points.append(np.stack([y + along * size * np.sin(bend), x + along * size * np.cos(bend), light * (1 - 0.6 * along)], axis=1))
        buds = np.flatnonzero((draw.random(len(which)) < 0.5 / spacing) & (size > 3 * spacing))
        way = np.where(draw.random(len(buds)) < 0.5, -1, 1) * draw.normal(np.pi / 3, 0.08, len(buds))
        grown = size[buds] * (1 - along[buds]) * draw.uniform(0.25, 0.45, len(buds))
        stems = np.column_stack([points[-1][buds, :2], bend[buds] + way, grown, light[buds] * 0.75])
        stems = stems[grown > spacing]
    return np.concatenate(points)


def _draw(picture: Floats, points: NDArray[np.float64], side: int) -> None:
    low = np.floor(points[:, :2]).astype(np.int64)
    part = points[:, :2] - low
    for dy in (0, 1):
        for dx in (0, 1):
            share = np.abs(1 - dy - part[:, 0]) * np.abs(1 - dx - part[:, 1]) * points[:, 2]
            np.maximum.at(picture, ((low[:, 0] + dy) % side, (low[:, 1] + dx) % side), share.astype(np.float32))
