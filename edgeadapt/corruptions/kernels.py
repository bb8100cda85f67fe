"""Linear filters without a signal library: every separable filter is one small matrix per axis, its border rule folded in.

A filter along an axis of n pixels is an (n, n) matrix, so blur, zoom and their sums are a few matrix products, whatever the kernel's width; this
suits model input sizes (an axis of 224 costs 200 kB). Products are taken image by image: a result never depends on what else is in the chunk.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache, wraps
from typing import Literal, ParamSpec, cast

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]
Border = Literal["edge", "reflect", "mirror"]

_P = ParamSpec("_P")
_KEPT_SIDE = 256  # longer axes are not cached: a matrix of 1920 x 1920 takes 15 MB


def _kept(build: Callable[_P, Floats]) -> Callable[_P, Floats]:
    cached = lru_cache(maxsize=64)(build)

    @wraps(build)
    def get(*args: _P.args, **kwargs: _P.kwargs) -> Floats:
        matrix = build(*args, **kwargs) if cast(int, args[0]) > _KEPT_SIDE else cached(*args, **kwargs)  # type: ignore[arg-type]
        matrix.setflags(write=False)
        return matrix

    return get


def fold(index: NDArray[np.int64], n: int, border: Border) -> NDArray[np.int64]:
    """Positions on an endless line as positions 0..n-1.

    Args:
        index: any integers.
        n: length of the axis, at least 1.
        border: `edge` repeats the last pixel, `reflect` mirrors behind it (b a | a b), `mirror` mirrors on it (c b | a b c).
    """
    if border == "edge" or n == 1:
        return np.clip(index, 0, n - 1)
    period = 2 * n if border == "reflect" else 2 * n - 2
    index = index % period
    return np.where(index < n, index, (period - 1 if border == "reflect" else period) - index)


def axis_filter(n: int, taps: Sequence[float], border: Border) -> Floats:
    """(n, n) matrix that correlates an axis with `taps` (odd count, centred)."""
    matrix = np.zeros((n, n))
    rows = np.arange(n)
    for k, tap in enumerate(taps):
        np.add.at(matrix, (rows, fold(rows + (k - len(taps) // 2), n, border)), tap)
    return matrix.astype(np.float32)


def gaussian_taps(sigma: float, radius: int) -> NDArray[np.float64]:
    """2 * radius + 1 samples of a Gaussian, summing to 1."""
    taps: NDArray[np.float64] = np.exp(-(np.arange(-radius, radius + 1, dtype=np.float64) ** 2) / (2 * sigma * sigma))
    taps /= taps.sum()
    return taps


@_kept
def gaussian_axis(n: int, sigma: float, border: Border = "edge", truncate: float = 4.0) -> Floats:
    """(n, n) Gaussian filter, cut after `truncate` sigmas; the identity where sigma is 0."""
    if sigma <= 0:
        return np.eye(n, dtype=np.float32)
    return axis_filter(n, gaussian_taps(sigma, int(truncate * sigma + 0.5)).tolist(), border)


@_kept
def zoom_axis(n: int, factor: float) -> Floats:
    """(n, n) matrix that enlarges the middle of an axis by `factor` >= 1 with linear interpolation and keeps n pixels."""
    crop = math.ceil(n / factor)
    full = round(crop * factor)
    at = (n - crop) // 2 + (np.arange(n) + (full - n) // 2) * ((crop - 1) / max(full - 1, 1))
    low = np.minimum(np.floor(at).astype(np.int64), n - 1)
    matrix = np.zeros((n, n))
    np.add.at(matrix, (np.arange(n), low), 1 - (at - low))
    np.add.at(matrix, (np.arange(n), np.minimum(low + 1, n - 1)), at - low)
    return matrix.astype(np.float32)


def separable(x: Floats, rows: Floats, columns: Floats) -> Floats:
    """`rows` (h, h) along the last axis but one of x (…, h, w), `columns` (w, w) along the last."""
    out: Floats = rows @ x @ columns.T
    return out


def smooth(x: Floats, sigma: float, border: Border = "edge", truncate: float = 4.0) -> Floats:
    """Gaussian blur of the last two axes of x (…, h, w)."""
    h, w = x.shape[-2:]
    return separable(x, gaussian_axis(h, sigma, border, truncate), gaussian_axis(w, sigma, border, truncate))


def clipped_zoom(x: Floats, factor: float) -> Floats:
    """The middle of the last two axes of x (…, h, w), enlarged by `factor`, the size kept."""
    return separable(x, zoom_axis(x.shape[-2], factor), zoom_axis(x.shape[-1], factor))


def disk(radius: float, alias_sigma: float) -> NDArray[np.float64]:
    """Disk of `radius` pixels smoothed by a small Gaussian of `alias_sigma`: the kernel of a lens out of focus, square, odd."""
    half, blur = (8, 1) if radius <= 8 else (int(radius), 2)
    line = np.arange(-half, half + 1)
    kernel = (line[:, None] ** 2 + line[None, :] ** 2 <= radius**2).astype(np.float64)
    soften = axis_filter(len(line), gaussian_taps(alias_sigma, blur).tolist(), "mirror").astype(np.float64)
    return cast(NDArray[np.float64], soften @ (kernel / kernel.sum()) @ soften.T)


@_kept
def disk_axes(n: int, radius: float, alias_sigma: float) -> Floats:
    """(r, n, n): one factor for each separable term of the `disk` kernel; the blur is the sum over r of factor · x · factor' · sign.

    The kernel is symmetric, so its eigenvectors are its separable terms; a negative one has its sign in `disk_signs`.
    """
    values, vectors = _disk_terms(radius, alias_sigma)
    return np.stack([axis_filter(n, (vectors[:, k] * abs(values[k]) ** 0.5).tolist(), "mirror") for k in range(len(values))])


def disk_signs(radius: float, alias_sigma: float) -> list[float]:
    """The sign (1 or -1) of each term of `disk_axes`."""
    return [float(np.sign(value)) for value in _disk_terms(radius, alias_sigma)[0]]


def _disk_terms(radius: float, alias_sigma: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    values, vectors = np.linalg.eigh(disk(radius, alias_sigma))
    kept = np.abs(values) > 1e-6 * np.abs(values).max()
    return values[kept], vectors[:, kept]


def motion_blur(image: Floats, radius: float, sigma: float, degrees: float) -> Floats:
    """One image (h, w, c) smeared along a line: weights fall off one-sidedly like a Gaussian, offsets are whole pixels, the edge is repeated.

    Follows the published use of ImageMagick's motion blur: 2 * ceil(radius) + 1 steps.
    """
    steps = np.arange(2 * math.ceil(radius) + 1)
    weights = np.exp(-(steps**2) / (2 * sigma * sigma))
    weights /= weights.sum()
    angle = math.radians(degrees)
    right = np.ceil(steps * math.cos(angle) - 0.5).astype(int)
    down = np.ceil(steps * math.sin(angle) - 0.5).astype(int)
    top, left = max(0, -int(down.min())), max(0, -int(right.min()))
    padded = np.pad(image, ((top, max(0, int(down.max()))), (left, max(0, int(right.max()))), (0, 0)), mode="edge")
    h, w = image.shape[:2]
    out = np.zeros_like(image)
    for weight, dy, dx in zip(weights.astype(np.float32), down + top, right + left, strict=True):
        if weight > 1e-7:
            out += weight * padded[dy : dy + h, dx : dx + w]
    return out


def bilinear(x: Floats, down: Floats, right: Floats, border: Border) -> Floats:
    """Values of x (n, h, w, c) at the pixel positions `down`, `right` (n, h, w), interpolated linearly."""
    n, h, w, c = x.shape
    low_y, low_x = np.floor(down), np.floor(right)
    part_y, part_x = (down - low_y)[..., None], (right - low_x)[..., None]
    ys = [fold(low_y.astype(np.int64) + k, h, border) * w for k in (0, 1)]
    xs = [fold(low_x.astype(np.int64) + k, w, border) for k in (0, 1)]
    flat, first = x.reshape(n * h * w, c), (np.arange(n) * (h * w))[:, None, None]
    upper = flat[first + ys[0] + xs[0]] * (1 - part_x) + flat[first + ys[0] + xs[1]] * part_x
    lower = flat[first + ys[1] + xs[0]] * (1 - part_x) + flat[first + ys[1] + xs[1]] * part_x
    out: Floats = upper * (1 - part_y) + lower * part_y
    return out


def planar(x: Bytes) -> Floats:
    """uint8 (n, h, w, c) as float32 (n, c, h, w) in 0..1, for filters along the last two axes."""
    out: Floats = np.ascontiguousarray(np.moveaxis(x, -1, 1), dtype=np.float32) / np.float32(255)
    return out


def interleaved(x: Floats) -> Floats:
    """(n, c, h, w) as (n, h, w, c), a view."""
    return np.moveaxis(x, 1, -1)


def to_bytes(x: Floats) -> Bytes:
    """float32 0..1 as uint8, cut to the range and truncated as the published sets are.

    A thousandth of a level is added first: else float32 rounding drops flat regions by one level at random.
    """
    out: Bytes = (np.clip(x * np.float32(255), 0, 255) + np.float32(2**-10)).astype(np.uint8)
    return out
