"""LAME: predictions of a batch are re-assigned so that neighbours in feature space agree (Boudiaf et al., CVPR 2022, arXiv 2201.05718).

    W_ij = 1 where j is one of the k nearest neighbours of i by normalised features, else 0; with k = 5
    z_i ← softmax(log p_i + Σ_j W_ij z_j), from z = p                       (equation 6), until it stays

Nothing is kept between batches, so a batch of one is the model's own prediction. It assumes that classes are correlated within a batch; where they
are not, it can do great harm.

The paper stops earlier where an energy changes by less than 1e-8 of itself. A graph has a fixed number of iterations, and what comes after changes
answers by no more than that.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from edgeadapt.exporters.methods.base import Outcome, Setting
from edgeadapt.exporters.methods.features import FeatureMethod


class Lame(FeatureMethod):
    """Answers of neighbours in a batch are drawn together."""

    name, summary = "lame", "answers of neighbouring frames in a batch are drawn together; no gradients"
    settings: ClassVar[Mapping[str, Setting]] = {
        "neighbours": Setting(5, "nearest neighbours of a frame", (1, 64)),
        "iterations": Setting(100, "how often answers are drawn together", (1, 100)),
    }

    def answered(self, features: Tensor, logits: Tensor, tensors: Mapping[str, Tensor]) -> Outcome:
        """The fixed point, as logarithms of probabilities."""
        count = features.shape[0]
        near = min(self.setting("neighbours"), count - 1)
        if not near:
            return Outcome(logits)
        unary = torch.log(logits.softmax(1) + 1e-10)
        standard = F.normalize(features, dim=1)
        # of points on a sphere the nearest has the largest product; the frame itself is no neighbour
        alike = standard @ standard.transpose(0, 1) - 4.0 * torch.eye(count)
        chosen = alike.topk(near, 1).indices
        kernel = (chosen.unsqueeze(2) == torch.arange(count)).to(logits.dtype).sum(1)
        answers = unary.softmax(1)
        for _ in range(self.setting("iterations") - 1):
            answers = (unary + kernel @ answers).softmax(1)
        return Outcome((unary + kernel @ answers).log_softmax(1))
