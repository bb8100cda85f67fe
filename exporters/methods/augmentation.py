"""Strong augmentation of frames inside a graph: a pure function of the frames and of a counter, which is state.

The parts of the pipeline of test-time augmentations that CoTTA (arXiv 2203.13591, section 4) and RoTTA (arXiv 2303.13899, section 4.1) use, in their
order and ranges: brightness 0.6 to 1.4, contrast 0.7 to 1.3, rotation by up to 15°, scale 0.9 to 1.1, translation by up to a sixteenth of the frame
padded to twice its size, with bilinear sampling and the edge repeated, a horizontal flip of every other frame, Gaussian noise of 0.005, all
clipped. Left out are saturation, hue and gamma, which are defined for pixels in 0..1, and the blur, which at σ ≤ 0.5 does less than the sampling.

Differences: numbers are drawn for each frame, not for a batch; and a graph sees frames as the model takes them, scaled and shifted channel by
channel, so black is the least value of a channel in its frame, white the largest, and contrast turns around the channel's mean.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from edgeadapt.exporters.noise import uniform

BRIGHTNESS, CONTRAST, ANGLE, SCALE, SHIFT, NOISE = (0.6, 1.4), (0.7, 1.3), math.radians(15.0), (0.9, 1.1), 1 / 8, 0.005
STREAMS = 2
"""How many streams of random numbers one augmentation takes."""
_DRAWN = 7


def is_image(shape: tuple[int, ...]) -> bool:
    """Whether inputs of this shape, without the batch, are taken to be images: C×H×W with one, three or four channels, and more than one row."""
    return len(shape) == 3 and shape[0] in (1, 3, 4) and min(shape[1:]) > 1


def augmented(x: Tensor, counter: Tensor, seed: int, stream: int = 0, flip: bool = True, moves: bool = True) -> Tensor:
    """Frames as they might have been.

    What is no image (see `is_image`) gets contrast and noise alone, around the mean over time of each channel, or over all of a vector.

    Args:
        x: float frames (N, C, …).
        counter: scalar, whole numbers in any type: the same one, seed and stream give the same frames.
        seed, stream: that tell runs, and augmentations of one step, apart; it takes `STREAMS` streams.
        flip: whether frames may be turned over left to right.
        moves: whether pixels may move at all; not where each has a label.

    Returns:
        the same shape, without gradient, each frame and channel within its own range.
    """
    count = counter.to(torch.int64)
    with torch.no_grad():
        x = x.detach()
        drawn = uniform(count, seed, stream, x.shape[0], _DRAWN).to(x.dtype)
        axes = list(range(2, x.dim())) or [1]
        low, high = x.amin(axes, keepdim=True), x.amax(axes, keepdim=True)
        image = is_image(tuple(x.shape[1:]))
        y = _jittered(x, low, high, drawn, axes, image)
        if image and moves:
            y = _moved(y, drawn, flip)
        noise = _gaussian(count, seed, stream + 1, x.shape[0], math.prod(x.shape[1:])).to(x.dtype).reshape(x.shape)
        return _between(y + NOISE * (high - low) * noise, low, high)


def _between(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    return torch.minimum(torch.maximum(x, low), high)


def _column(drawn: Tensor, index: int, bounds: tuple[float, float], rank: int) -> Tensor:
    """One drawn number a frame, within bounds, to broadcast over frames of a rank."""
    return (bounds[0] + (bounds[1] - bounds[0]) * drawn[:, index]).reshape(-1, *[1] * (rank - 1))


def _jittered(x: Tensor, low: Tensor, high: Tensor, drawn: Tensor, axes: list[int], image: bool) -> Tensor:
    if image:
        x = _between(low + _column(drawn, 0, BRIGHTNESS, x.dim()) * (x - low), low, high)
    mean = x.mean(axes, keepdim=True)
    return _between(mean + _column(drawn, 1, CONTRAST, x.dim()) * (x - mean), low, high)


def _moved(x: Tensor, drawn: Tensor, flip: bool) -> Tensor:
    """x (N, C, H, W) turned, scaled, shifted and flipped about its centre; what lies outside is the nearest edge."""
    frames, channels, height, width = x.shape
    angle, scale = _column(drawn, 2, (-ANGLE, ANGLE), 3), _column(drawn, 3, SCALE, 3)
    right, down = _column(drawn, 4, (-SHIFT * width, SHIFT * width), 3), _column(drawn, 5, (-SHIFT * height, SHIFT * height), 3)
    side = 1.0 - 2.0 * (_column(drawn, 6, (0.0, 1.0), 3) < 0.5).to(x.dtype) if flip else 1.0
    middle, centre = (height - 1) / 2, (width - 1) / 2
    rows = (torch.arange(height, dtype=x.dtype) - middle).reshape(1, -1, 1)
    columns = (torch.arange(width, dtype=x.dtype) - centre).reshape(1, 1, -1) * side
    cos, sin = angle.cos() / scale, angle.sin() / scale
    top, above, below = _neighbours(middle + cos * (rows - down) - sin * (columns - right), height)
    across, left, beyond = _neighbours(centre + sin * (rows - down) + cos * (columns - right), width)
    flat = x.reshape(frames, channels, -1).transpose(1, 2).reshape(-1, channels)
    start = (torch.arange(frames) * (height * width)).reshape(-1, 1, 1)

    def at(row: Tensor, column: Tensor) -> Tensor:
        return flat.index_select(0, (start + row * width + column).reshape(-1))

    across, top = across.reshape(-1, 1), top.reshape(-1, 1)
    upper = at(above, left) * (1.0 - across) + at(above, beyond) * across
    lower = at(below, left) * (1.0 - across) + at(below, beyond) * across
    result = (upper * (1.0 - top) + lower * top).reshape(frames, -1, channels).transpose(1, 2).reshape(x.shape)
    return result.contiguous()  # torch's kernels would keep channels last from here on, and one that pools writes into its result then


def _neighbours(place: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """How far places along an axis lie behind a pixel, 0 to 1, that pixel and the next; places outside are those at the edge."""
    place = place.clamp(0.0, float(size - 1))
    first = place.floor()
    whole = first.to(torch.int64)
    return place - first, whole, (whole + 1).clamp(max=size - 1)


def _gaussian(count: Tensor, seed: int, stream: int, rows: int, columns: int) -> Tensor:
    """Standard normal numbers (rows, columns), by Box and Muller's transform of pairs."""
    half = -(-columns // 2)
    drawn = uniform(count, seed, stream, rows, 2 * half)
    length = (-2.0 * (1.0 - drawn[:, :half]).log()).sqrt()
    angle = 2.0 * math.pi * drawn[:, half:]
    return torch.cat([length * angle.cos(), length * angle.sin()], 1)[:, :columns]
