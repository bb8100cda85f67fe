"""Early exits: small heads at the ends of the parts of a frozen model, after TinyTTA (Jia et al., NeurIPS 2024).

    f_k = pooled output of part k, standardised as on source data, without gradient
    z_k = g_k · Ŵ_k f_k + b_k,   Ŵ = each row less its mean, over its length           (weight standardisation, arXiv 1903.10520)
    p   = Σ_k a_k softmax(z_k),  a = softmax over k of −sharpness · H(softmax(z_k))    the model's own logits are one of the z_k
    loss = Σ_k mean entropy of those predictions of exit k that are confident,
        or Σ_k mean cross-entropy of exit k with p, where p is confident

A warm-up trains all heads by cross-entropy. The second loss is not of the paper: weak heads are surer than they are right, and their own entropy
makes them worse (docs/methods.md has figures). Nothing inside the model is trained, and no gradient enters it; nothing depends on other frames, so a
batch of one works. Unlike in the paper no frame leaves early: a graph computes all exits.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from edgeadapt.errors import ExportError
from edgeadapt.exporters.backbone import BackboneRun, Normaliser
from edgeadapt.exporters.capture import Captured
from edgeadapt.exporters.methods.base import (
    MARGIN,
    Hyper,
    Method,
    Outcome,
    Setting,
    Setup,
    Tensors,
    Term,
    Terms,
    confident_entropy,
    entropy,
    generator,
    selected,
)
from edgeadapt.exporters.partition import Cut, Partition, partition

LEAST = 1e-5
"""Of the length of a row of weights that is divided by."""
TAUGHT_RATE = 1e-3
"""Learning rate at a batch of 64 where the ensemble is the teacher."""


class Exits(Method):
    """A head at the end of each part learns; the prediction is all exits' and the model's own, the more the surer they are."""

    name, summary = "exits", "early-exit heads at the ends of the frozen parts, and their ensemble with the model itself"
    statistics = "source"
    optimiser, rate = "adam", 1e-4
    calibrates = warms_up = reads = True
    choices = ("parts", "cuts", "train")
    settings: ClassVar[Mapping[str, Setting]] = {
        "teacher": Setting("self", "what a head learns from: its own confident predictions, or those of all exits together", ("self", "ensemble")),
        "grid": Setting(2, "cells that a part's output is pooled to, along each side", (1, 8)),
        "sharpness": Setting(1.0, "how much more the surer exits count, by their entropy in nats", (0.0, 100.0)),
    }

    def __init__(self, captured: Captured, setup: Setup) -> None:
        super().__init__(captured, setup)
        logits = tuple(int(size) for size in captured.result.meta["val"].shape)
        if len(logits) != 2:
            raise ExportError(f"exits predict one class a frame, and this model's logits are {logits}", "use --method ecotta, side, tent or norm")
        if self.setting("teacher") == "ensemble":
            self.rate = TAUGHT_RATE

    def divide(self, captured: Captured) -> Partition:
        """EcoTTA's cuts, or those that are named."""
        return partition(captured, self.setup.parts, self.setup.cuts)

    @property
    def ends(self) -> tuple[Cut, ...]:
        """Where the heads stand: the end of each part."""
        assert self.partition is not None
        return self.partition.cuts[1:]

    def _cells(self, cut: Cut) -> tuple[int, ...]:
        return tuple(min(size, self.setting("grid")) for size in cut.spatial)

    def _width(self, cut: Cut) -> int:
        return cut.channels * math.prod(self._cells(cut))

    def parameters(self) -> Tensors:
        """Of head k, over F features: `exit.k.weight` (C, F), `exit.k.gain` (C,), `exit.k.bias` (C,)."""
        random, table = generator(self.setup.seed), {}
        for k, cut in enumerate(self.ends):
            table[f"exit.{k}.weight"] = torch.randn((self.setup.classes, self._width(cut)), generator=random) / math.sqrt(self._width(cut))
            table[f"exit.{k}.gain"], table[f"exit.{k}.bias"] = torch.ones(self.setup.classes), torch.zeros(self.setup.classes)
        return table

    def prefix(self, index: int) -> str:
        """Head k belongs to the part that ends at cut k + 1; the stem has none."""
        return f"exit.{index - 1}." if index else ""

    def frozen(self) -> Tensors:
        """Mean and inverse deviation of each head's features on source data, (F,)."""
        if not hasattr(self, "standard"):
            self.standard: Tensors = {}
            for k, cut in enumerate(self.ends):
                self.standard[f"exit.{k}.mean"], self.standard[f"exit.{k}.scale"] = torch.zeros(self._width(cut)), torch.ones(self._width(cut))
        return self.standard

    def calibrate(self, batches: Sequence[Tensor], tensors: Mapping[str, Tensor], statistics: Mapping[str, Tensor]) -> None:
        """Measure the heads' features on source inputs."""
        rows: list[list[Tensor]] = [[] for _ in self.ends]
        with torch.no_grad():
            for x in batches:
                run = self.backbone.run(tensors, Normaliser(statistics, "source"))
                x = run.segment(0, x)
                for k, cut in enumerate(self.ends):
                    x = run.segment(k + 1, x)
                    rows[k].append(self._pooled(cut, x))
        for k, found in enumerate(rows):
            features = torch.cat(found)
            self.frozen()[f"exit.{k}.mean"] = features.mean(0)
            self.frozen()[f"exit.{k}.scale"] = 1.0 / features.std(0).clamp(min=1e-3)

    def _pooled(self, cut: Cut, x: Tensor) -> Tensor:
        """A part's output as (N, F), without gradient."""
        x, cells = x.detach(), self._cells(cut)
        if cut.channels_last:
            x = x.transpose(1, 2)
        if len(cells) == 1:
            x = F.adaptive_avg_pool2d(x.unsqueeze(2), (1, cells[0]))
        elif cells:
            x = F.adaptive_avg_pool2d(x, (cells[0], cells[1]))
        return x.flatten(1)

    def forward(self, run: BackboneRun, x: Tensor, tensors: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> Outcome:
        """All exits; terms: `exit.k`, the logits of each head that is trained."""
        x = run.segment(0, x)
        exits: Tensors = {}
        for k, cut in enumerate(self.ends):
            x = run.segment(k + 1, x)
            features = (self._pooled(cut, x) - tensors[f"exit.{k}.mean"]) * tensors[f"exit.{k}.scale"]
            weight, gain, bias = (parameters[f"exit.{k}.{name}"] for name in ("weight", "gain", "bias"))
            centred = weight - weight.mean(1, keepdim=True)
            length = (centred.square().sum(1, keepdim=True) + LEAST).sqrt()
            exits[f"exit.{k}"] = F.linear(features, centred / length) * gain + bias
        every = torch.stack([*(value.detach() for value in exits.values()), run.segment(len(self.ends) + 1, x).detach()], 2)  # (N, C, exits)
        weights = (-self.setting("sharpness") * entropy(every)).log_softmax(1)
        logits = (every.log_softmax(1) + weights.unsqueeze(1)).logsumexp(2)
        return Outcome(logits, {name: value for name, value in exits.items() if value.requires_grad})

    def taught(self, outcome: Outcome) -> tuple[Tensor, ...]:
        """Every head by itself."""
        return tuple(outcome.terms.values())

    def hyper(self) -> dict[str, Hyper]:
        """Entropy margin."""
        return {"margin": MARGIN}

    def unlabelled(self, outcome: Outcome, hyper: Mapping[str, Tensor]) -> Terms:
        """Entropy of each head's own confident predictions; or cross-entropy with those of the ensemble."""
        if self.setting("teacher") == "ensemble":
            kept, wanted = selected(outcome.logits, hyper["margin"]), outcome.logits.softmax(1)
            values = torch.stack([-(wanted * value.log_softmax(1)).sum(1) for value in outcome.terms.values()]).sum(0)
            return (Term((values * kept).sum(), "selected", kept.sum()),)
        found = {name: confident_entropy(value, hyper["margin"]) for name, value in outcome.terms.items()}
        return tuple(dataclasses.replace(term, over=f"{term.over}.{name}") for name, term in found.items())

    def labelled(self, outcome: Outcome, target: Tensor, hyper: Mapping[str, Tensor]) -> Terms:
        """Cross-entropy of each head."""
        return tuple(Term(F.cross_entropy(value, target)) for value in outcome.terms.values())
