"""EcoTTA: meta networks between the parts of a frozen model, with self-distilled regularisation (Song et al., arXiv 2303.01904).

For part k with frozen function f_k and input x̃_{k−1}:

    x_k  = f_k(x̃_{k−1})
    x̃_k = BN_k(x_k) + ReLU(BN'_k(Conv_k(x̃_{k−1})))                        (figure 3)
    loss = entropy of confident predictions + λ Σ_k mean|x̃_k − sg(x_k)|     (equations 2–4)

With the setting anchor=start, sg(x_k) is what meta network k gave at step 0 of the same input and statistics, instead of x_k: the adapted network is
held near the warmed-up one, and not near the model without meta networks.

The regulariser of part k reaches the parameters of meta network k alone. The paper gets this by a second forward pass; here both gradients
share one pass (`split_gradient`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from edgeadapt.exporters.backbone import BackboneRun, Normaliser
from edgeadapt.exporters.capture import NORMALISATION, Captured
from edgeadapt.exporters.methods.base import MARGIN, START, Hyper, Method, Outcome, Setting, Tensors, Term, Terms, confident_entropy, generator
from edgeadapt.exporters.operators import rectified, split_gradient
from edgeadapt.exporters.partition import Cut, Partition, partition

EPS = 1e-5


class EcoTTA(Method):
    """Small meta networks adapt; the model's own weights stay frozen."""

    name, summary = "ecotta", "meta networks between the parts of the frozen model"
    warms_up = True
    enters = True
    choices = ("parts", "cuts", "kernel", "train")
    settings: ClassVar[Mapping[str, Setting]] = {
        "anchor": Setting("frozen", "hold each part near the frozen part's output (the paper's), or what it gave at the start", ("frozen", "start"))
    }

    @property
    def remembers_start(self) -> bool:
        """Where the start is what is held near."""
        return bool(self.setting("anchor") == "start")

    def divide(self, captured: Captured) -> Partition:
        """Cuts by EcoTTA's rule, or by name."""
        return partition(captured, self.setup.parts, self.setup.cuts)

    def bind(self, captured: Captured) -> None:
        """Also decide the meta networks' kernel: 3 for pre-activation models, 1 for others (Table 14)."""
        super().bind(captured)
        self.kernel = self.setup.kernel or (3 if self._pre_activation() else 1)

    def _pre_activation(self) -> bool:
        first = self.backbone.ends[0]
        seen: set[fx.Node] = set()
        queue = list(first.users)
        while queue:
            node = queue.pop()
            if node.target is NORMALISATION:
                return True
            if node not in seen and getattr(node.target, "overloadpacket", None) in (torch.ops.aten.relu, torch.ops.aten.clone):
                seen.add(node)
                queue += list(node.users)
        return False

    @property
    def cuts(self) -> tuple[Cut, ...]:
        """The stem's end, then each part's end."""
        assert self.partition is not None
        return self.partition.cuts

    def parameters(self) -> Tensors:
        """For each part: conv.weight (C_out, C_in, k…), and weight and bias (C_out,) of `norm` (BN_k) and `conv_norm` (BN'_k)."""
        random = generator(self.setup.seed)
        table: Tensors = {}
        for k, (before, after) in enumerate(zip(self.cuts[:-1], self.cuts[1:], strict=True)):
            kernel = [self.kernel] * len(after.spatial)
            shape = (after.channels, before.channels, *kernel)
            bound = 1 / math.sqrt(before.channels * math.prod(kernel))  # torch's default for a convolution
            table[f"meta.{k}.conv.weight"] = (torch.rand(shape, generator=random) * 2 - 1) * bound
            for norm in ("norm", "conv_norm"):
                table[f"meta.{k}.{norm}.weight"] = torch.ones(after.channels)
                table[f"meta.{k}.{norm}.bias"] = torch.zeros(after.channels)
        return table

    def prefix(self, index: int) -> str:
        """Meta network k belongs to the part that ends at cut k + 1; the stem has none."""
        return f"meta.{index - 1}." if index else ""

    def own_statistics(self) -> Tensors:
        """Mean and variance of each meta network's two normalisations."""
        table: Tensors = {}
        for k, cut in enumerate(self.cuts[1:]):
            for norm in ("norm", "conv_norm"):
                table[f"meta.{k}.{norm}.mean"], table[f"meta.{k}.{norm}.variance"] = torch.zeros(cut.channels), torch.ones(cut.channels)
        return table

    def depth(self, layer: str) -> float:
        """Where its part ends."""
        return (int(layer.split(".")[1]) + 1) / (len(self.cuts) - 1)

    def forward(self, run: BackboneRun, x: Tensor, tensors: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> Outcome:
        """Stem, parts with their meta networks, classifier; terms: `drift`, Σ_k mean|x̃_k − sg(x_k)| over the parts k that are trained."""
        x = run.segment(0, x)
        drift = x.new_zeros(())
        for k in range(len(self.cuts) - 1):
            y = run.segment(k + 1, x)
            through = self._meta(run, k, x, y, {name: value.detach() for name, value in parameters.items()})
            if not parameters[f"meta.{k}.conv.weight"].requires_grad:  # nothing that is trained could change this part's distance
                x = through
                continue
            local = self._meta(run, k, x.detach(), y.detach(), parameters)
            drift = drift + run.magnitude(local - self._anchor(run, k, x.detach(), y.detach(), tensors)).mean()
            x = split_gradient(through, local)
        return Outcome(run.segment(len(self.cuts), x), {"drift": drift})

    def _anchor(self, run: BackboneRun, k: int, x: Tensor, y: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """What part k is held near: the frozen part's output y, or what the meta network as it started makes of the same input and statistics."""
        start = {name.removeprefix(START): value for name, value in tensors.items() if name.startswith(f"{START}meta.{k}.")}
        if not self.remembers_start or not start:
            return y
        now = Normaliser({**run.normalise.statistics, **run.normalise.updated}, "source", blend=run.normalise.blend)
        return self._meta(run.beside(run.affine, now), k, x, y, start).detach()

    def _meta(self, run: BackboneRun, k: int, x: Tensor, y: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        before, after = self.cuts[k], self.cuts[k + 1]

        def get(name: str) -> Tensor:
            return parameters[f"meta.{k}.{name}"]

        if before.channels_last:
            x = x.transpose(1, 2)
        if after.channels_last:
            y = y.transpose(1, 2)
        branch = _shrink(x, get("conv.weight"), after.spatial)
        branch = rectified(run.normalise(f"meta.{k}.conv_norm", branch, get("conv_norm.weight"), get("conv_norm.bias"), EPS))
        result = run.normalise(f"meta.{k}.norm", y, get("norm.weight"), get("norm.bias"), EPS) + branch
        return result.transpose(1, 2) if after.channels_last else result

    def hyper(self) -> dict[str, Hyper]:
        """Entropy margin and the regulariser's weight."""
        return {"margin": MARGIN, "regulariser": Hyper(0.5, 0.0, 100.0, "weight of the distance from the frozen parts' outputs")}

    def unlabelled(self, outcome: Outcome, hyper: Mapping[str, Tensor]) -> Terms:
        """Equation 4."""
        return confident_entropy(outcome.logits, hyper["margin"]), Term(hyper["regulariser"] * outcome.terms["drift"])

    def labelled(self, outcome: Outcome, target: Tensor, hyper: Mapping[str, Tensor]) -> Terms:
        """Cross-entropy with the same regulariser."""
        return Term(F.cross_entropy(outcome.logits, target)), Term(hyper["regulariser"] * outcome.terms["drift"])


def _with_axes(x: Tensor, count: int) -> Tensor:
    """x (N, C, …) with so many axes after the channels: a part may end in another number of them, as where maps become a row."""
    here = x.dim() - 2
    return x.flatten(count + 1) if here > count else x.reshape(*x.shape, *[1] * (count - here))


def _shrink(x: Tensor, weight: Tensor, size: tuple[int, ...]) -> Tensor:
    """Convolve x to the given spatial size: by stride where the sizes allow, else by average pooling before, or repetition after."""
    x = _with_axes(x, len(size))
    here, kernel = list(x.shape[2:]), list(weight.shape[2:])
    convolve: Any = {0: F.linear, 1: F.conv1d, 2: F.conv2d}[len(here)]
    if not here:
        result: Tensor = convolve(x, weight)
        return result
    padding = [k // 2 for k in kernel]
    stride = [max(1, round(n / out)) for n, out in zip(here, size, strict=True)]
    reached = [(n + 2 * p - k) // s + 1 for n, p, k, s in zip(here, padding, kernel, stride, strict=True)]
    if reached != list(size):
        if all(n >= out for n, out in zip(here, size, strict=True)):
            pool: Any = F.adaptive_avg_pool1d if len(here) == 1 else F.adaptive_avg_pool2d
            x = pool(x, size if len(size) > 1 else size[0])
        stride = [1] * len(here)
    y: Tensor = convolve(x, weight, stride=stride, padding=padding)
    return y if tuple(y.shape[2:]) == tuple(size) else F.interpolate(y, size=list(size), mode="nearest")
