"""Drops on the lens: water (lighter, with a bright rim) or mud (opaque). The function's common form is described in `noise`.

Approximate in one step: the published form takes edges and distances from an image library; here the edges are Canny's, written out in numpy, and the
distances are exact Euclidean ones, where the library's are a 5 x 5 chamfer's (at most a few hundredths of a pixel away).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edgeadapt.corruptions import kernels
from edgeadapt.corruptions.colour import tinted
from edgeadapt.corruptions.kernels import Border, Bytes, Floats, to_bytes
from edgeadapt.corruptions.parameters import Strength

Mask = NDArray[np.bool_]

_WATER = (175 / 255, 238 / 255, 238 / 255)
_MUD = (63 / 255, 42 / 255, 20 / 255)
_FAR = 20  # pixels; distances from a drop's edge are cut there
_RELIEF = ((-2, -1, 0), (-1, 1, 1), (0, 1, 2))
_MEAN = ((1 / 9,) * 3,) * 3


def spatter(x: Bytes, strength: Strength, draws: Sequence[np.random.Generator]) -> Bytes:
    """Drops of water or mud.

    strength: mean and standard deviation of the liquid's noise layer, sigma of its blur, the threshold above which it wets the lens, intensity of the
    water or sigma of the mud's outline, and 0 for water or 1 for mud.
    """
    mean, deviation, sigma, threshold, amount, mud = strength
    layer = np.stack([draw.standard_normal(x.shape[1:3], dtype=np.float32) for draw in draws]) * np.float32(deviation) + np.float32(mean)
    layer = kernels.smooth(layer, sigma)
    unit = x.astype(np.float32) / np.float32(255)
    if mud:
        mask = kernels.smooth((layer > threshold).astype(np.float32), amount)[..., None]
        mask[mask < 0.8] = 0
        return to_bytes(unit * (1 - mask) + mask * tinted(_MUD, x.shape[-1]))
    layer[layer < threshold] = 0
    liquid = to_bytes(layer).astype(np.float32)
    film = liquid * _relief(np.minimum(distance(edges(liquid)), _FAR))
    peak = np.maximum(film.max(axis=(1, 2), keepdims=True), np.float32(1e-12))
    return to_bytes(unit + (film / peak * np.float32(amount))[..., None] * tinted(_WATER, x.shape[-1]))


def _relief(far: Floats) -> Floats:
    """Distances (n, h, w) as a lit surface, 0..255: smoothed, histogram-equalised, embossed, smoothed."""
    levels = np.floor(_correlate(far, _MEAN) + np.float32(1e-4)).astype(np.uint8)
    even = np.stack([equalised(level) for level in levels]).astype(np.float32)
    return np.rint(_correlate(np.clip(_correlate(even, _RELIEF), 0, 255), _MEAN))


def equalised(image: Bytes) -> Bytes:
    """uint8 (h, w) with its histogram spread evenly over 0..255; an image of one level is returned as it is."""
    counts = np.bincount(image.ravel(), minlength=256)
    first = int(counts[int(image.min())])
    if first == image.size:
        return image
    table = np.rint((np.cumsum(counts) - first) * (255 / (image.size - first)))
    out: Bytes = np.clip(table, 0, 255).astype(np.uint8)[image]
    return out


def _correlate(x: Floats, kernel: Sequence[Sequence[float]], border: Border = "mirror") -> Floats:
    """3 x 3 correlation over the last two axes of (n, h, w)."""
    h, w = x.shape[1:]
    rows, columns = kernels.fold(np.arange(-1, h + 1), h, border), kernels.fold(np.arange(-1, w + 1), w, border)
    padded = x[:, rows][:, :, columns]
    out = np.zeros_like(x)
    for dy, line in enumerate(kernel):
        for dx, tap in enumerate(line):
            if tap:
                out += np.float32(tap) * padded[:, dy : dy + h, dx : dx + w]
    return out


def edges(x: Floats, low: float = 50, high: float = 150) -> Mask:
    """Canny's edges of x (n, h, w) in 0..255: Sobel gradient |gx| + |gy|, thinned across the edge, weak ones kept where they touch strong ones."""
    gx = _correlate(x, ((-1, 0, 1), (-2, 0, 2), (-1, 0, 1)), "edge")
    gy = _correlate(x, ((-1, -2, -1), (0, 0, 0), (1, 2, 1)), "edge")
    size = np.abs(gx) + np.abs(gy)
    h, w = x.shape[1:]
    around = np.pad(size, ((0, 0), (1, 1), (1, 1)))

    def at(dy: int, dx: int) -> Floats:
        return around[:, 1 + dy : 1 + dy + h, 1 + dx : 1 + dx + w]

    flat, steep = np.abs(gy) < 0.41421356 * np.abs(gx), np.abs(gy) > 2.41421356 * np.abs(gx)
    slash = gx * gy < 0
    peak = np.where(slash, (size > at(-1, 1)) & (size > at(1, -1)), (size > at(-1, -1)) & (size > at(1, 1)))
    peak = np.where(steep, (size > at(-1, 0)) & (size >= at(1, 0)), peak)
    peak = np.where(flat, (size > at(0, -1)) & (size >= at(0, 1)), peak)
    weak = peak & (size > low)
    strong = weak & (size > high)
    while True:
        wide = np.pad(strong, ((0, 0), (1, 1), (1, 1)))
        touched = np.zeros_like(strong)
        for dy in range(3):
            for dx in range(3):
                touched |= wide[:, dy : dy + h, dx : dx + w]
        grown = weak & touched
        if np.array_equal(grown, strong):
            return strong
        strong = grown


def distance(edge: Mask) -> Floats:
    """Euclidean distance in pixels from each pixel of (n, h, w) to the nearest edge pixel, exact up to 20, some larger number beyond."""
    h, w = edge.shape[1:]
    column = np.arange(w, dtype=np.float32)
    none = np.float32(2 * (w + h + _FAR))
    before = np.maximum.accumulate(np.where(edge, column, -none), axis=2)
    behind = np.minimum.accumulate(np.where(edge, column, 2 * none)[:, :, ::-1], axis=2)[:, :, ::-1]
    along = np.minimum(column - before, behind - column) ** 2
    nearest: Floats = along.copy()
    for step in range(1, min(_FAR, h - 1) + 1):
        square = np.float32(step * step)
        np.minimum(nearest[:, step:], along[:, :-step] + square, out=nearest[:, step:])
        np.minimum(nearest[:, :-step], along[:, step:] + square, out=nearest[:, :-step])
    np.sqrt(nearest, out=nearest)
    return nearest
