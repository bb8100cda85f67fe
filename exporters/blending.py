"""Statistics of the stream that count as far as the stream has left the source, layer by layer.

For a layer with source statistics μ, σ² and the stream's m, v:

    D² = mean over channels of (m − μ)²/σ²                  Mahalanobis distance by a diagonal covariance, over C
    w  = t · e/(e + doubt), e = max(0, D² − n)              n: what D² is on source windows by their frames alone, measured at export
    n  = (1 − few) · mixed + few · alike                    of windows of frames drawn at random, and of frames that are predicted alike
    t  = trust at the first layer, falling evenly to trust · late at the last
    normalised with mean (1 − w)·μ + w·m and variance (1 − w)·σ² + w·v + w·(1 − w)·(m − μ)²

which are the moments of a mixture of both. On clean frames w is near 0, and the model is what it was. Early layers see what changes with light, lens
and noise; late ones see classes, and a window of few classes looks there like a shift: with few = 1 what such windows do at the source is no shift.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from edgeadapt.exporters.operators import per_channel

ASSUMED = 0.02
"""What both are taken for where there is no source data to measure them on."""
LEAST = 1e-12
"""Of D²: where it is 0 its root has no gradient."""


@dataclass(frozen=True)
class Blend:
    """How far to follow the stream, and each frame: made by `blended`.

    source: statistics by `layer.mean` and `layer.variance`; chance, trust: by layer, its n and its t, each (1,); doubt, own: see above.
    """

    source: Mapping[str, Tensor]
    chance: Mapping[str, Tensor]
    trust: Mapping[str, Tensor]
    doubt: Tensor | float
    own: Tensor | float

    def __call__(self, name: str, mean: Tensor, variance: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """The statistics (C,) to normalise layer `name` with, where the stream's are `mean` and `variance`."""
        centre, spread = self.source[f"{name}.mean"], self.source[f"{name}.variance"]
        away = mean - centre
        beyond = (distance(away, spread, eps) - self.chance[name]).clamp(min=0.0)
        share = self.trust[name] * beyond / (beyond + self.doubt)
        return mixture(centre, spread, away, variance, share)


def blended(
    source: Mapping[str, Tensor],
    depths: Mapping[str, float],
    mixed: Tensor,
    alike: Tensor,
    trust: Tensor | float,
    doubt: Tensor | float,
    late: Tensor | float,
    few: Tensor | float,
    own: Tensor | float,
) -> Blend:
    """What is the same for all frames is computed for all layers at once: what a graph holds grows with its nodes.

    source: statistics by `layer.mean` and `layer.variance`; depths: by layer, 0 for the first and 1 for the last; mixed, alike: (layers,), in that
    order; the others: see above.
    """
    deep, shallow = (torch.tensor(shares, dtype=mixed.dtype) for shares in (list(depths.values()), [1.0 - depth for depth in depths.values()]))
    chances, trusts = mixed + few * (alike - mixed), trust * (shallow + deep * late)
    chance, trusted = (dict(zip(depths, every.split(1), strict=True)) for every in (chances, trusts))
    return Blend(source, chance, trusted, doubt, own)


def mixture(mean: Tensor, variance: Tensor, away: Tensor, other: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of a mixture of which `share` has another variance, and a mean that is `away` from the first."""
    return mean + share * away, variance + share * (other - variance + (1.0 - share) * (away * away))


def distance(away: Tensor, variance: Tensor, eps: float) -> Tensor:
    """D² of means that are `away` from those of a layer with this variance, each (C,): a scalar."""
    return (away * away / (variance + eps)).mean()


def frame_statistics(x: Tensor, shift: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean and population variance of each frame of x (N, C, …) over its positions, each (N, C).

    shift: (C,), what x is moved by before it is squared; see `operators.batch_statistics`.
    """
    positions = list(range(2, x.dim()))
    centred = x if shift is None else x - per_channel(shift, x.dim())
    mean = centred.mean(positions)
    variance = ((centred * centred).mean(positions) - mean * mean).clamp(min=0.0)
    return (mean if shift is None else mean + shift), variance


def statistics_of(x: Tensor, shift: Tensor | None = None) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Mean and population variance of a batch x (N, C, …), each (C,), and those of its frames, each (N, C), in one reading of it.

    Those of a batch of one frame are the frame's own, in both forms.
    """
    means, variances = frame_statistics(x, shift)
    if x.shape[0] == 1:
        return (means[0], variances[0]), (means, variances)
    mean = means.mean(0)
    away = means - mean
    return (mean, (variances + away * away).mean(0)), (means, variances)


def by_frame(frames: tuple[Tensor, Tensor], statistics: tuple[Tensor, Tensor], eps: float, strength: Tensor | float) -> tuple[Tensor, Tensor]:
    """Mean and variance (N, C) to normalise each frame with: the moments of a mixture of `statistics` (C,) and of its own, `frames`, each (N, C).

    For a frame with means m and variances v, D² = mean over channels of (m − μ)²/σ², and w = strength · D/(1 + D) parts are its own. Of one frame
    they are (C,), as those that frames share: it takes a normalisation fewer nodes.
    """
    (mean, variance), (own, spread) = statistics, (item[0] if item.shape[0] == 1 else item for item in frames)
    away = own - mean
    far = (away * away / (variance + eps)).mean(-1, keepdim=True).clamp(min=LEAST).sqrt()
    return mixture(mean, variance, away, spread, strength * far / (1.0 + far))


def has_positions(x: Tensor) -> bool:
    """Whether a frame of x (N, C, …) has several values a channel, and so statistics of its own."""
    return x.numel() > x.shape[0] * x.shape[1]
