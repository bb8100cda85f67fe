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

from torch import Tensor

ASSUMED = 0.02
"""What both are taken for where there is no source data to measure them on."""


@dataclass(frozen=True)
class Blend:
    """How far to follow the stream.

    source: statistics by `layer.mean` and `layer.variance`; mixed, alike: by layer, a scalar; depth: by layer, 0 for the first and 1 for the last;
    trust, doubt, late, few: see above.
    """

    source: Mapping[str, Tensor]
    mixed: Mapping[str, Tensor]
    alike: Mapping[str, Tensor]
    depth: Mapping[str, float]
    trust: Tensor | float
    doubt: Tensor | float
    late: Tensor | float
    few: Tensor | float

    def __call__(self, name: str, mean: Tensor, variance: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """The statistics (C,) to normalise layer `name` with, where the stream's are `mean` and `variance`."""
        centre, spread = self.source[f"{name}.mean"], self.source[f"{name}.variance"]
        away = mean - centre
        mixed, alike = self.mixed[name], self.alike[name]
        beyond = (distance(away, spread, eps) - (mixed + self.few * (alike - mixed))).clamp(min=0.0)
        depth = self.depth[name]
        share = self.trust * ((1.0 - depth) + depth * self.late) * beyond / (beyond + self.doubt)
        return centre + share * away, (1.0 - share) * spread + share * variance + share * (1.0 - share) * (away * away)


def distance(away: Tensor, variance: Tensor, eps: float) -> Tensor:
    """D² of means that are `away` from those of a layer with this variance, each (C,): a scalar."""
    return (away * away / (variance + eps)).mean()
