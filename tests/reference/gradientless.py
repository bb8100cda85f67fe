"""Methods that need no gradient, as their papers' programs compute them: functions of features, logits and the classifier."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.reference.base import entropy


def lame(features: Tensor, logits: Tensor, neighbours: int = 5, most: int = 100) -> Tensor:
    """Probabilities (N, C) that LAME assigns (arXiv 2201.05718), with the kNN affinity and its rule for when to stop."""
    unary = -torch.log(logits.softmax(1) + 1e-10)
    unit = F.normalize(features, p=2, dim=-1)
    count = len(unit)
    near = torch.cdist(unit, unit).topk(min(neighbours + 1, count), -1, largest=False).indices[:, 1:]
    kernel = torch.zeros(count, count, dtype=unit.dtype).scatter_(-1, near, 1.0)
    answers, before = (-unary).softmax(-1), float("inf")
    for index in range(most):
        pairwise = kernel.matmul(answers)
        answers = (pairwise - unary).softmax(-1)
        energy = float((unary * answers - pairwise * answers + answers * torch.log(answers.clip(1e-20))).sum())
        if index > 1 and abs(energy - before) <= 1e-8 * abs(before):
            break
        before = energy
    return answers


class T3A:
    """The support sets of T3A (Iwasawa & Matsuo, NeurIPS 2021) as lists that only grow and are chosen from.

    Args:
        weight, bias: of the classifier, (C, D) and (C,).
        most: members of a class.
    """

    def __init__(self, weight: Tensor, bias: Tensor, most: int) -> None:
        logits = F.linear(weight, weight, bias)
        self.supports, self.labels = weight, F.one_hot(logits.argmax(1), len(weight)).to(weight.dtype)
        self.entropies, self.most, self.classes = entropy(logits), most, len(weight)

    def __call__(self, features: Tensor, logits: Tensor) -> Tensor:
        """Logits of a batch, which joins the sets first."""
        self.supports = torch.cat([self.supports, features])
        self.labels = torch.cat([self.labels, F.one_hot(logits.argmax(1), self.classes).to(features.dtype)])
        self.entropies = torch.cat([self.entropies, entropy(logits)])
        chosen = []
        for label in range(self.classes):
            own = torch.where(self.labels.argmax(1) == label)[0]
            chosen.append(own[self.entropies[own].sort().indices][: self.most])
        rows = torch.cat(chosen)
        self.supports, self.labels, self.entropies = self.supports[rows], self.labels[rows], self.entropies[rows]
        weights = F.normalize(self.supports, dim=1).T @ self.labels
        return features @ F.normalize(weights, dim=0)
