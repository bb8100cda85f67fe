"""The image augmentation of EcoTTA's warm-up (arXiv 2303.01904, appendix C), on whole batches with parameters of their own for every image.

    colour jitter 0.4 / 0.4 / 0.4 / 0.1 with probability 0.4, its four changes in random order
    3 × 3 Gaussian blur, σ from 0.1 to 2, with probability 0.2
    greyscale with probability 0.1

Each change is defined as torchvision's transform of that name on float tensors. Images are float32 (N, C, H, W) in 0..1, before any mean and
deviation is applied; factors are one number an image, (N,).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

LUMA = (0.2989, 0.587, 0.114)
JITTER = 0.4
HUE = 0.1
SIGMA = (0.1, 2.0)
CHANCE_JITTER, CHANCE_BLUR, CHANCE_GREY = 0.4, 0.2, 0.1
Change = Callable[[Tensor, Tensor], Tensor]


def _each(vector: Tensor) -> Tensor:
    return vector.reshape(-1, 1, 1, 1)


def _blend(x: Tensor, other: Tensor | float, factor: Tensor) -> Tensor:
    weight = _each(factor)
    return (weight * x + (1.0 - weight) * other).clamp(0.0, 1.0)


def greyscale(x: Tensor) -> Tensor:
    """Luma of RGB images (N, 3, H, W) as (N, 1, H, W); images of another depth: the mean of their channels."""
    if x.shape[1] != 3:
        return x.mean(1, keepdim=True)
    red, green, blue = x.split(1, 1)
    return LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue


def brightness(x: Tensor, factor: Tensor) -> Tensor:
    """Blend with black: 0 is black, 1 the image."""
    return _blend(x, 0.0, factor)


def contrast(x: Tensor, factor: Tensor) -> Tensor:
    """Blend with the mean of the image's luma: 0 is that grey, 1 the image."""
    return _blend(x, greyscale(x).mean((1, 2, 3), keepdim=True), factor)


def saturation(x: Tensor, factor: Tensor) -> Tensor:
    """Blend with the greyscale image (N, 3, H, W): 0 is grey, 1 the image."""
    return _blend(x, greyscale(x), factor)


def hue(x: Tensor, turn: Tensor) -> Tensor:
    """Turn the hue of RGB images in HSV space by a share of the circle, -0.5 to 0.5."""
    red, green, blue = x.unbind(1)
    value, least = x.amax(1), x.amin(1)
    chroma = value - least
    divisor = torch.where(chroma == 0, 1.0, chroma)
    sixth = torch.where(
        value == red, (green - blue) / divisor, torch.where(value == green, 2.0 + (blue - red) / divisor, 4.0 + (red - green) / divisor)
    )
    angle = torch.where(chroma == 0, 0.0, sixth) + 6.0 * turn.reshape(-1, 1, 1)
    channels = []
    for offset in (5.0, 3.0, 1.0):  # v − c·max(0, min(k, 4 − k, 1)) with k = offset + angle in sixths of the circle
        k = torch.remainder(offset + angle, 6.0)
        channels.append(value - chroma * torch.minimum(k, 4.0 - k).clamp(0.0, 1.0))
    return torch.stack(channels, 1)


def blur(x: Tensor, sigma: Tensor) -> Tensor:
    """3 × 3 Gaussian blur with a deviation in pixels for each image, edges reflected; an axis of one pixel stays as it is."""
    side = torch.exp(-0.5 / (sigma * sigma))
    centre = _each(1.0 / (1.0 + 2.0 * side))
    side = _each(side) * centre
    height, width = x.shape[2:]
    if width > 1:
        wide = F.pad(x, (1, 1, 0, 0), "reflect")
        x = centre * x + side * (wide[..., :-2] + wide[..., 2:])
    if height > 1:
        high = F.pad(x, (0, 0, 1, 1), "reflect")
        x = centre * x + side * (high[..., :-2, :] + high[..., 2:, :])
    return x


def _uniform(count: int, low: float, high: float, random: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(count, generator=random)


def jitter(x: Tensor, random: torch.Generator) -> Tensor:
    """Colour jitter: brightness, contrast, saturation and hue in an order of its own for each image; without colours the first two."""
    count = len(x)
    blends = (brightness, contrast, saturation)
    changes: list[tuple[Change, Tensor]] = [(blend, _uniform(count, 1.0 - JITTER, 1.0 + JITTER, random)) for blend in blends]
    changes.append((hue, _uniform(count, -HUE, HUE, random)))
    if x.shape[1] != 3:
        changes = changes[:2]
    order = torch.rand((count, len(changes)), generator=random).argsort(1)
    x = x.clone()
    for place in range(len(changes)):
        for index, (change, factor) in enumerate(changes):
            rows = (order[:, place] == index).nonzero().flatten()
            if len(rows):
                x[rows] = change(x[rows], factor[rows])
    return x


def augment(x: Tensor, random: torch.Generator) -> Tensor:
    """Augment a batch of images.

    Args:
        x: float32 (N, C, H, W) in 0..1; never modified. Without three channels only brightness, contrast and blur change. Anything that is no
            batch of images (another rank) is returned as it is: what sensors measure has no such invariances.
        random: source of the parameters; the same state gives the same result.

    Returns:
        A new tensor of the same shape in 0..1.
    """
    if x.dim() != 4:
        return x
    count = len(x)
    draws = torch.rand((3, count), generator=random)
    chosen = [(draw < chance).nonzero().flatten() for draw, chance in zip(draws, (CHANCE_JITTER, CHANCE_BLUR, CHANCE_GREY), strict=True)]
    sigma = _uniform(count, *SIGMA, random)
    x = x.clone()
    if len(chosen[0]):
        x[chosen[0]] = jitter(x[chosen[0]], random)
    if len(chosen[1]):
        x[chosen[1]] = blur(x[chosen[1]], sigma[chosen[1]])
    if len(chosen[2]) and x.shape[1] == 3:
        x[chosen[2]] = greyscale(x[chosen[2]]).expand(-1, 3, -1, -1)
    return x
