"""AugMix (Hendrycks et al., ICLR 2020, arXiv 1912.02781): an image mixed with chains of random operations on itself, and how it is drawn.

All that is random about an image follows from (seed, epoch, index of the image). So it does not matter in which order, in which process or after
how many interruptions an image is made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

WIDTH, DEPTH, SEVERITY, ALPHA = 3, 3, 3.0, 1.0
"""Chains mixed, the most operations in a chain, the most an operation's strength may be (of 10), and the parameter of the random shares."""
VIEWS = 3  # the clean image and two mixtures
PADDING = 4
ORDER, IMAGE = 1, 2  # what a generator is for: no two purposes share their numbers

Pixels = NDArray[np.uint8]
Operation = Callable[[Image.Image, float, int], Image.Image]
"""Takes an RGB image, a strength of 0..1 and a direction, 1 or -1; gives a new image of the same size."""


def _affine(image: Image.Image, *matrix: float) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, matrix, resample=Image.Resampling.BILINEAR)


OPERATIONS: dict[str, Operation] = {
    "autocontrast": lambda image, strength, sign: ImageOps.autocontrast(image),
    "equalize": lambda image, strength, sign: ImageOps.equalize(image),
    "posterize": lambda image, strength, sign: ImageOps.posterize(image, max(1, 4 - int(4 * strength))),
    "rotate": lambda image, strength, sign: image.rotate(sign * int(30 * strength), resample=Image.Resampling.BILINEAR),
    "solarize": lambda image, strength, sign: ImageOps.solarize(image, 256 - int(256 * strength)),
    "shear_x": lambda image, strength, sign: _affine(image, 1, sign * 0.3 * strength, 0, 0, 1, 0),
    "shear_y": lambda image, strength, sign: _affine(image, 1, 0, 0, sign * 0.3 * strength, 1, 0),
    "translate_x": lambda image, strength, sign: _affine(image, 1, 0, sign * int(image.width / 3 * strength), 0, 1, 0),
    "translate_y": lambda image, strength, sign: _affine(image, 1, 0, 0, 0, 1, sign * int(image.height / 3 * strength)),
}
"""By name. None of them is, or is like, a corruption that robustness is measured by (no noise, blur, weather, contrast, brightness or colour)."""
_CHOICES = tuple(OPERATIONS.values())


def generator(seed: int, purpose: int, epoch: int, index: int = 0) -> np.random.Generator:
    """The random numbers of one thing in one epoch. Always four words: shorter keys are filled with zeros and would meet others."""
    return np.random.default_rng((seed, purpose, epoch, index))


def cropped(image: Pixels, random: np.random.Generator) -> Pixels:
    """The image [H,W,3] at a random place of its black frame of 4 pixels, mirrored half of the time; a copy of the same size."""
    height, width = image.shape[:2]
    framed = np.zeros((height + 2 * PADDING, width + 2 * PADDING, 3), np.uint8)
    framed[PADDING : PADDING + height, PADDING : PADDING + width] = image
    top, left, mirrored = random.integers((2 * PADDING + 1, 2 * PADDING + 1, 2))
    crop = framed[top : top + height, left : left + width]
    return np.ascontiguousarray(crop[:, ::-1] if mirrored else crop)


def mixed(image: Pixels, random: np.random.Generator) -> NDArray[np.float32]:
    """The image [H,W,3] mixed with WIDTH chains of 1 to DEPTH operations on it, float32 of 0..255 (algorithm 1 of the paper).

    The chains' shares are drawn from a Dirichlet distribution, the share of the image itself from a Beta distribution.
    """
    start = Image.fromarray(image)
    shares = random.dirichlet((ALPHA,) * WIDTH)
    changed = random.beta(ALPHA, ALPHA)
    result = image * np.float32(1 - changed)
    for share in shares:
        chain = start
        for _ in range(random.integers(1, DEPTH + 1)):
            operation = _CHOICES[random.integers(len(_CHOICES))]
            chain = operation(chain, random.uniform(0.1, SEVERITY) / 10, 1 if random.random() < 0.5 else -1)
        result += np.float32(changed * share) * np.asarray(chain, np.float32)
    return result


def views(images: Pixels, indices: Sequence[int] | NDArray[np.intp], seed: int, epoch: int) -> NDArray[np.float32]:
    """What one epoch sees of some images.

    Args:
        images: uint8 [n,H,W,3].
        indices: their places in the training set, which decide what is random about them.
        seed: 0..2^32-1.
        epoch: counted from 0.

    Returns:
        float32 [VIEWS,n,H,W,3] of 0..255: each cropped and mirrored, then two different mixtures of that.
    """
    out = np.empty((VIEWS, *images.shape), np.float32)
    for place, (image, index) in enumerate(zip(images, indices)):
        random = generator(seed, IMAGE, epoch, int(index))
        crop = cropped(image, random)
        out[0, place] = crop
        out[1, place] = mixed(crop, random)
        out[2, place] = mixed(crop, random)
    return out
