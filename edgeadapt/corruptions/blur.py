"""Blurs of the lens, the pane, the camera's movement and the zoom. The functions' common form is described in `noise`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edgeadapt.corruptions import kernels
from edgeadapt.corruptions.kernels import Bytes, interleaved, planar, to_bytes
from edgeadapt.corruptions.parameters import Strength


def gaussian_blur(x: Bytes, strength: Strength, draws: Sequence[np.random.Generator]) -> Bytes:
    """Gaussian blur, edge repeated; strength (sigma in pixels,)."""
    return to_bytes(interleaved(kernels.smooth(planar(x), strength[0])))


def defocus_blur(x: Bytes, strength: Strength, draws: Sequence[np.random.Generator]) -> Bytes:
    """Disk kernel, softened against aliasing; strength (radius, sigma of the softening), in pixels."""
    radius, alias = strength
    rows, columns = (kernels.disk_axes(n, radius, alias) for n in x.shape[1:3])
    source = planar(x)
    out = np.zeros_like(source)
    for k, sign in enumerate(kernels.disk_signs(radius, alias)):
        out += np.float32(sign) * kernels.separable(source, rows[k], columns[k])
    return to_bytes(interleaved(out))


def glass_blur(x: Bytes, strength: Strength, draws: Sequence[np.random.Generator]) -> Bytes:
    """Frosted glass: Gaussian blur, pixels displaced at random, Gaussian blur; strength (sigma, reach in pixels, rounds).

    The published loop means to swap pixels but overwrites the first before it reads it, so that each pixel takes a neighbour's value; the published
    images and error rates are those of the overwriting form, and so are these.
    """
    sigma, reach, rounds = strength[0], int(strength[1]), int(strength[2])
    out = to_bytes(interleaved(kernels.smooth(planar(x), sigma)))
    for k, draw in enumerate(draws):
        for _ in range(rounds):
            out[k] = displaced(out[k], reach, draw)
    return to_bytes(interleaved(kernels.smooth(planar(out), sigma)))


def displaced(image: Bytes, reach: int, draw: np.random.Generator) -> Bytes:
    """Each pixel of image (h, w, c) overwritten by a neighbour -reach..reach-1 away in y and x, visited from the last pixel to the first.

    A neighbour that was visited earlier has already got its new value. Following such links back to an unvisited pixel, all pixels at once and
    with doubled stride, gives the loop's result without the loop. Pixels within about `reach` of the border stay.
    """
    h, w, c = image.shape
    ys, xs = np.arange(reach + 1, h - reach + 1), np.arange(reach + 1, w - reach + 1)
    if not len(ys) or not len(xs):
        return image
    move = draw.integers(-reach, reach, size=(2, len(ys), len(xs)))
    here = ys[:, None] * w + xs[None, :]
    there = here + move[0] * w + move[1]
    row, column = there // w, there % w
    visited = (there > here) & (row >= ys[0]) & (row <= ys[-1]) & (column >= xs[0]) & (column <= xs[-1])
    size = h * w
    link: NDArray[np.int64] = np.concatenate([np.arange(size), np.arange(size)])  # 0..size-1: old values; size + p: the new value of p
    link[size + here.ravel()] = np.where(visited, there + size, there).ravel()
    while True:
        further = link[link]
        if np.array_equal(further, link):
            return image.reshape(size, c)[link[size:]].reshape(h, w, c)
        link = further


def motion_blur(x: Bytes, strength: Strength, draws: Sequence[np.random.Generator]) -> Bytes:
    """Movement at a random angle within 45 degrees of the horizontal; strength (radius, sigma) in pixels."""
    out = np.empty_like(x)
    for k, draw in enumerate(draws):
        blurred = kernels.motion_blur(x[k].astype(np.float32), strength[0], strength[1], draw.uniform(-45, 45))
        out[k] = np.clip(np.rint(blurred), 0, 255)
    return out


def zoom_blur(x: Bytes, strength: Strength, draws: Sequence[np.random.Generator]) -> Bytes:
    """Mean of the image and of its enlargements by 1, 1 + step, …; strength (end, step)."""
    factors = np.arange(1, strength[0], strength[1])
    source = planar(x)
    total = source.copy()
    for factor in factors.tolist():
        total += kernels.clipped_zoom(source, factor)
    return to_bytes(interleaved(total / np.float32(len(factors) + 1)))
