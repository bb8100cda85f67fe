"""Methods that choose which predictions to learn from: EATA and SAR, as their papers describe them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.reference.base import Tent, entropy


class Eata(Tent):
    """Reliable, non-redundant predictions, and a penalty by Fisher information (arXiv 2204.02610).

    Args:
        distance: largest cosine to the mean prediction.
        fisher: weight of the penalty.
        importance: Fisher information by the bundle's names; zeros by default.
    """

    optimiser_name = "sgd"

    def __init__(self, model: object, distance: float = 0.4, fisher: float = 1.0, importance: Mapping[str, Tensor] | None = None, **options: object):
        super().__init__(model, **options)  # type: ignore[arg-type]
        self.distance, self.weight = distance, fisher
        self.start = {name: value.detach().clone() for name, value in self.trained.items()}
        self.importance = dict(importance or {name: torch.zeros_like(value) for name, value in self.start.items()})
        self.mean: Tensor | None = None

    def step(self, x: Tensor, y: Tensor | None) -> Tensor:
        if y is not None:
            return super().step(x, y)
        if self.optimiser is None:
            kind = torch.optim.SGD if self.kind == "sgd" else torch.optim.Adam
            extra = {"momentum": self.momentum} if self.kind == "sgd" else {"betas": (self.momentum, 0.999), "eps": 1e-6}
            self.optimiser = kind(list(self.trained.values()), lr=self.rate, **extra)  # type: ignore[arg-type]
        self.optimiser.zero_grad(set_to_none=True)
        logits = self(x)
        least = self.margin * math.log(logits.shape[1])
        values = entropy(logits)
        chosen = torch.where(values < least)[0]
        if self.mean is not None:
            alike = F.cosine_similarity(self.mean.unsqueeze(0), logits[chosen].softmax(1), dim=1)
            chosen = chosen[alike.abs() < self.distance]
        with torch.no_grad():
            if len(chosen):
                shares = logits[chosen].softmax(1).mean(0)
                self.mean = shares if self.mean is None else 0.9 * self.mean + 0.1 * shares
        if len(chosen):
            picked = values[chosen]
            loss = (picked * torch.exp(least - picked.detach())).mean()
            for name, value in self.trained.items():
                loss = loss + self.weight * (self.importance[name] * (value - self.start[name]) ** 2).sum()
            loss.backward()
            self.optimiser.step()
        self.commit()
        return logits.detach()

    def measure(self, batches: Sequence[Tensor]) -> None:
        """Fisher information on source inputs: squares of each batch's gradient, averaged over the batches."""
        total = {name: torch.zeros_like(value) for name, value in self.trained.items()}
        for x in batches:
            self.zero_grad(set_to_none=True)
            logits = self(x)
            F.cross_entropy(logits, logits.max(1)[1]).backward()
            for name, value in self.trained.items():
                total[name] += value.grad.detach() ** 2  # type: ignore[union-attr]
        self.zero_grad(set_to_none=True)
        self.importance = {name: value / len(batches) for name, value in total.items()}

    def state(self) -> dict[str, Tensor]:
        """Also the mean prediction, zeros while there is none."""
        shape = torch.zeros(next(reversed(list(self.model.parameters()))).shape, dtype=next(self.model.parameters()).dtype)
        mean = shape if self.mean is None else self.mean.clone()
        return {**super().state(), "memory.mean": mean, "memory.known": torch.tensor(float(self.mean is not None))}


class Sar(Tent):
    """Sharpness-aware entropy minimisation with a reset (arXiv 2302.12400).

    Args:
        radius: of the perturbation.
        collapse: moving loss below which the model starts again.
        frozen: the bundle's names of parameters that are not trained.
    """

    optimiser_name = "sgd"

    def __init__(self, model: object, radius: float = 0.05, collapse: float = 0.2, frozen: Sequence[str] = (), **options: object):
        super().__init__(model, **options)  # type: ignore[arg-type]
        for name, value in list(self.trained.items()):
            value.requires_grad_(name not in frozen)
        self.radius, self.collapse = radius, collapse
        self.start = {name: value.detach().clone() for name, value in self.trained.items()}
        self.loss: float | None = None
        self.resets = 0

    def step(self, x: Tensor, y: Tensor | None) -> Tensor:
        if y is not None:
            return super().step(x, y)
        trained = self.trained
        if self.optimiser is None:
            self.optimiser = torch.optim.SGD(list(trained.values()), self.rate, self.momentum)
        self.optimiser.zero_grad(set_to_none=True)
        logits = self(x)
        least = self.margin * math.log(logits.shape[1])
        values = entropy(logits)
        sure = values < least
        (values[sure].mean() if sure.any() else 0.0 * values.sum()).backward()
        with torch.no_grad():
            length = torch.stack([value.grad.norm(2) for value in trained.values()]).norm(2)  # type: ignore[union-attr]
            moved = {name: self.radius / (length + 1e-12) * value.grad for name, value in trained.items()}  # type: ignore[operator]
            for name, value in trained.items():
                value.add_(moved[name])
        self.optimiser.zero_grad(set_to_none=True)
        held = {name: layer.following for name, layer in self.norms.items()}
        second = entropy(self(x))
        for name, layer in self.norms.items():  # the first pass is the one that was predicted with
            layer.following = held[name]
        first = second[sure]
        both = first[first < least]
        if len(both):
            mean = float(both.detach().mean())
            self.loss = mean if self.loss is None else 0.9 * self.loss + 0.1 * mean
        (both.mean() if len(both) else 0.0 * second.sum()).backward()
        with torch.no_grad():
            for name, value in trained.items():
                value.sub_(moved[name])
        self.optimiser.step()
        if self.loss is not None and self.loss < self.collapse:
            self.resets += 1
            self.loss, self.optimiser = None, torch.optim.SGD(list(trained.values()), self.rate, self.momentum)
            with torch.no_grad():
                for name, value in trained.items():
                    value.copy_(self.start[name])
                    self.optimiser.state[value]["momentum_buffer"] = torch.zeros_like(value)
        self.commit()
        return logits.detach()

    def state(self) -> dict[str, Tensor]:
        """Also the moving loss, 0 while there is none."""
        known = float(self.loss is not None)
        return {**super().state(), "memory.loss": torch.tensor(self.loss or 0.0, dtype=torch.float64), "memory.known": torch.tensor(known)}
