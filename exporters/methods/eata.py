"""EATA: entropy of reliable and non-redundant predictions, kept near the source by Fisher information (Niu et al., ICML 2022, arXiv 2204.02610).

    S(x) = exp(E0 − H(x)) · [H(x) < E0] · [|cos(p(x), m)| < d]              (equations 3–6), E0 = margin · ln C
    loss = mean over selected x of S(x)·H(x) + β Σ_i ω_i (θ_i − θ⁰_i)²      (equations 7, 8)
    m    ← the mean prediction of the first selected ones, then 0.9·m + 0.1·(mean prediction of the selected)
    ω_i  = mean over source batches of (∂ cross-entropy with the predicted class / ∂θ_i)²

Where nothing is selected there is no step. S is a weight without gradient.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from edgeadapt.exporters.backbone import BackboneRun, Normaliser
from edgeadapt.exporters.methods.affine import AffineMethod
from edgeadapt.exporters.methods.base import MARGIN, Hyper, Outcome, Tensors, Term, Terms, entropy, selected

_FISHER = "fisher."
_MOVING = 0.9


class Eata(AffineMethod):
    """Scale and shift are trained on predictions that are confident and unlike the average one, and held where the source needs them."""

    name, summary = "eata", "scale and shift follow confident, varied predictions and stay where the source data needs them"
    optimiser, rate = "sgd", 1.6e-3
    calibrates, calibration_batches = True, 32
    skips = True
    anchored_rate = 0.25

    def frozen(self) -> Tensors:
        """Fisher information of each parameter, zeros before it was measured."""
        if not hasattr(self, "fisher"):
            self.fisher = {_FISHER + name: torch.zeros_like(value) for name, value in self.parameters().items()}
        return self.fisher

    def calibrate(self, batches: Sequence[Tensor], tensors: Mapping[str, Tensor], statistics: Mapping[str, Tensor]) -> None:
        """Measure the Fisher information on source inputs, with the model's own predictions as labels and the batches' own statistics."""
        total = {name: torch.zeros_like(value) for name, value in self.parameters().items()}
        for x in batches:
            with torch.enable_grad():
                parameters = {name: value.requires_grad_() for name, value in self.parameters().items()}
                logits = self.backbone.run(tensors, Normaliser(statistics, "batch"), parameters).whole(x)
                gradients = torch.autograd.grad(F.cross_entropy(logits, logits.argmax(1)), list(parameters.values()), allow_unused=True)
            for name, gradient in zip(parameters, gradients, strict=True):
                if gradient is not None:
                    total[name] += gradient.detach() ** 2 / len(batches)
        self.frozen().update({_FISHER + name: value for name, value in total.items()})

    def memory(self) -> Tensors:
        """`mean` (C,), the moving mean of selected predictions, and `known`, whether there is one: 0 or 1."""
        return {"mean": torch.zeros(self.setup.classes), "known": torch.zeros(())}

    def forward(self, run: BackboneRun, x: Tensor, tensors: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> Outcome:
        """The model's own forward pass; terms: the memory, and `away`, Σ ω (θ − θ⁰)²."""
        away, names = x.new_zeros(()), [name for name, value in parameters.items() if value.requires_grad]
        if names:
            found = ((parameters, ""), (tensors, ""), (tensors, _FISHER))
            now, start, weight = (torch.cat([table[prefix + name].flatten() for name in names]) for table, prefix in found)
            away = (weight * (now - start) ** 2).sum()
        return Outcome(run.whole(x), {"mean": tensors["memory.mean"], "known": tensors["memory.known"], "away": away})

    def hyper(self) -> dict[str, Hyper]:
        """Margin, redundancy threshold and the weight of what is held; the paper's for CIFAR-10 and for ImageNet."""
        classes = self.setup.classes
        distance, weight = (0.4 if classes <= 10 else 0.1 if classes <= 100 else 0.05), (1.0 if classes <= 100 else 2000.0)
        return {
            "margin": MARGIN,
            "distance": Hyper(distance, 0.0, 1.1, "predictions whose cosine to the mean prediction is at least this are not learned from"),
            "fisher": Hyper(weight, 0.0, 1e5, "weight of the distance from the source parameters, by their Fisher information"),
        }

    def _kept(self, outcome: Outcome, hyper: Mapping[str, Tensor]) -> Tensor:
        """1 for each prediction that is reliable and not redundant, else 0: (N, …), without gradient."""
        shares, mean = outcome.logits.detach().softmax(1), outcome.terms["mean"]
        along = (shares * mean.reshape(1, -1, *[1] * (shares.dim() - 2))).sum(1)
        cosine = along / (shares.square().sum(1).sqrt() * mean.square().sum().sqrt()).clamp(min=1e-8)
        new = (cosine.abs() < hyper["distance"]).to(shares.dtype)
        known = outcome.terms["known"]
        return selected(outcome.logits, hyper["margin"]) * (known * new + (1.0 - known))

    def unlabelled(self, outcome: Outcome, hyper: Mapping[str, Tensor]) -> Terms:
        """Weighted entropy of what is kept, and the distance from the source."""
        kept, values = self._kept(outcome, hyper), entropy(outcome.logits)
        weights = kept * (hyper["margin"] * math.log(outcome.logits.shape[1]) - values.detach()).clamp(max=50.0).exp()
        return Term((weights * values).sum(), "selected", kept.sum()), Term(hyper["fisher"] * outcome.terms["away"])

    def remembered(self, passes: Sequence[Outcome], hyper: Mapping[str, Tensor]) -> Tensors:
        """The moving mean, where something was selected."""
        outcome = passes[0]
        kept, before, known = self._kept(outcome, hyper), outcome.terms["mean"], outcome.terms["known"]
        shares, count = outcome.logits.detach().softmax(1), kept.sum()
        mean = (shares * kept.unsqueeze(1)).transpose(0, 1).flatten(1).sum(1) / count.clamp(min=1.0)
        found = (count > 0.0).to(mean.dtype)
        moved = known * (_MOVING * before + (1.0 - _MOVING) * mean) + (1.0 - known) * mean
        return {"mean": found * moved + (1.0 - found) * before, "known": torch.maximum(known, found)}
