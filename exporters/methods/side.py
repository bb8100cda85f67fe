"""A side network: reads pooled taps of the frozen backbone, mixes them, and adds a residual before the frozen classifier.

    t_i = pool(tap_i)                              maximum and average over the cells of one small grid, standardised, without gradient
    f   = Σ_i softmax(a)_i · (W_i t_i + b_i)       one projection per tap (as in UniPT, arXiv 2308.14316, without its attention)
    h   = f + V₂ ReLU(V₁ f)
    z'  = z + U h                                  U = 0 at the start, so that the first prediction is the model's own, bit for bit

Nothing is trained inside the backbone and no gradient enters it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from edgeadapt.errors import ExportError
from edgeadapt.exporters.backbone import BackboneRun, Normaliser
from edgeadapt.exporters.capture import Captured
from edgeadapt.exporters.classifier import after, classifier
from edgeadapt.exporters.methods.base import MARGIN, Hyper, Method, Outcome, Tensors, Term, Terms, confident_entropy, generator
from edgeadapt.exporters.operators import adaptive_max_pool, rectified
from edgeadapt.exporters.partition import Cut, Partition, candidates

GRID, TAPS = 4, 4
aten = torch.ops.aten


class Side(Method):
    """A small network beside the backbone adapts or learns; the backbone is only read."""

    name, summary = "side", "a side network reads the frozen model and adds a residual before its classifier"
    statistics = "source"
    optimiser, rate = "adam", 1e-3
    calibrates = standardises = True
    choices = ("cuts", "width", "train")
    first = 0

    def divide(self, captured: Captured) -> Partition:
        """Taps at the last place of each resolution, and one before the classifier."""
        places = candidates(captured)
        if not places:
            raise ExportError(
                "the model has no place where one tensor carries everything, so the side network finds nothing to read", "use --method norm or tent"
            )
        table = {cut.name: cut for cut in places}
        if self.setup.cuts:
            unknown = [name for name in self.setup.cuts if name not in table]
            if unknown:
                raise ExportError(f"{unknown[0]!r} is not a place where the model can be tapped", f"the places are: {', '.join(table)}")
            taps = [cut for cut in places if cut.name in self.setup.cuts]
        else:
            ends = {cut.spatial: cut for cut in places}  # the last of each size
            taps = [cut for cut in places if cut in ends.values()][-TAPS:] if len(ends) > 1 else places[-TAPS:]
        return Partition(tuple(taps), (1,) * len(taps))

    def bind(self, captured: Captured) -> None:
        """Also find the classifier: the last layer with weights that everything passes through."""
        super().bind(captured)
        self.classifier, self.features = classifier(captured)
        last = self.backbone.segments[-1]
        if self.features not in last and self.features is not self.backbone.ends[-2]:
            raise ExportError("the side network's taps must lie before the classifier", "name earlier taps with --cuts")
        self.frozen_tensors = getattr(self, "frozen_tensors", self._standard())

    @property
    def taps(self) -> tuple[Cut, ...]:
        """The places the side network reads."""
        assert self.partition is not None
        return self.partition.cuts

    @property
    def target(self) -> tuple[int, ...]:
        """Shape of the classifier's input without the batch."""
        return tuple(int(size) for size in self.features.meta["val"].shape[1:])

    @property
    def exact(self) -> frozenset[str]:
        """The classifier, which reads the residual: on a fixed grid small ones, and those below a ReLU's zero, would be lost."""
        return frozenset({self.classifier.name})

    def _last_axis(self) -> bool:
        return getattr(self.classifier.target, "overloadpacket", None) in (aten.linear, aten.addmm)

    def _depth(self) -> int:
        return self.target[-1] if self._last_axis() else self.target[0]

    def parameters(self) -> Tensors:
        """Projections `side.tap.i`, tap logits `side.mix`, `side.expand`, `side.contract`, and the zero `side.residual`."""
        random, width = generator(self.setup.seed), self.setup.width

        def layer(out: int, into: int) -> Tensor:
            return (torch.rand((out, into), generator=random) * 2 - 1) / math.sqrt(into)

        table: Tensors = {"side.mix": torch.zeros(len(self.taps))}
        for i in range(len(self.taps)):
            table[f"side.tap.{i}.weight"], table[f"side.tap.{i}.bias"] = layer(width, self._features(i)), torch.zeros(width)
        table["side.expand.weight"], table["side.expand.bias"] = layer(2 * width, width), torch.zeros(2 * width)
        table["side.contract.weight"], table["side.contract.bias"] = layer(width, 2 * width), torch.zeros(width)
        table["side.residual.weight"], table["side.residual.bias"] = torch.zeros(self._depth(), width), torch.zeros(self._depth())
        return table

    def prefix(self, index: int) -> str:
        """The projection of tap `index`."""
        return f"side.tap.{index}."

    def _standard(self) -> Tensors:
        table: Tensors = {}
        for i in range(len(self.taps)):
            table[f"side.tap.{i}.mean"], table[f"side.tap.{i}.scale"] = torch.zeros(self._features(i)), torch.ones(self._features(i))
        return table

    def frozen(self) -> Tensors:
        """Mean and inverse deviation of each pooled tap on source data."""
        return self.frozen_tensors

    def calibrate(self, batches: Sequence[Tensor], tensors: Mapping[str, Tensor], statistics: Mapping[str, Tensor]) -> None:
        """Measure the pooled taps on source data, so that the projections see standardised features."""
        sums: list[list[Tensor]] = [[] for _ in self.taps]
        with torch.no_grad():
            for x in batches:
                run = self.backbone.run(tensors, Normaliser(statistics, "source"))
                for i in range(len(self.taps)):
                    x = run.segment(i, x)
                    sums[i].append(self._pooled(i, x).flatten(0, 1))
        for i, rows in enumerate(sums):
            features = torch.cat(rows)
            self.frozen_tensors[f"side.tap.{i}.mean"] = features.mean(0)
            self.frozen_tensors[f"side.tap.{i}.scale"] = 1.0 / features.std(0).clamp(min=1e-3)

    def _dense(self) -> bool:
        return len(self.target) > 1 and not self._last_axis() and math.prod(self.target[1:]) > 1

    def _grid(self) -> tuple[int, ...]:
        if self._dense():
            return self.taps[-1].spatial
        return tuple(min(size, GRID) for size in self.taps[-1].spatial)

    def _pools(self, index: int) -> bool:
        """Whether a tap is pooled by maximum and average; dense outputs read averages alone, and a tap of the grid's own size is read as it is."""
        tap, grid = self.taps[index], self._grid()
        return not self._dense() and tuple(tap.spatial) != tuple(grid) and all(n >= g for n, g in zip(tap.spatial, grid, strict=True))

    def _features(self, index: int) -> int:
        return self.taps[index].channels * (2 if self._pools(index) else 1)

    def _pooled(self, index: int, x: Tensor) -> Tensor:
        """A tap as (N, positions, features) on the grid, without gradient."""
        tap, grid = self.taps[index], self._grid()
        x = x.detach()
        if tap.channels_last:
            x = x.transpose(1, 2)
        if not tap.spatial:
            return x.unsqueeze(1)
        if tuple(tap.spatial) != tuple(grid):
            flat = x if x.dim() == 4 else x.unsqueeze(2)
            cells = (grid[0], grid[1]) if len(grid) == 2 else (1, grid[0])
            if any(n < g for n, g in zip(tap.spatial, grid, strict=True)):
                x = F.interpolate(flat, size=list(cells), mode="nearest")
            else:
                average = F.adaptive_avg_pool2d(flat, cells)
                x = torch.cat([adaptive_max_pool(flat, list(cells))[0], average], 1) if self._pools(index) else average
        return x.flatten(2).transpose(1, 2)

    def forward(self, run: BackboneRun, x: Tensor, tensors: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> Outcome:
        """Backbone, side network, classifier; terms: `frozen`, the frozen model's own logits."""
        weights = parameters["side.mix"].softmax(0)
        mixed: Tensor | None = None
        for i in range(len(self.taps)):
            x = run.segment(i, x)
            standard = (self._pooled(i, x) - tensors[f"side.tap.{i}.mean"]) * tensors[f"side.tap.{i}.scale"]
            projected = F.linear(standard, parameters[f"side.tap.{i}.weight"], parameters[f"side.tap.{i}.bias"]) * weights[i]
            mixed = projected if mixed is None else mixed + projected
        assert mixed is not None
        hidden = rectified(F.linear(mixed, parameters["side.expand.weight"], parameters["side.expand.bias"]))
        hidden = mixed + F.linear(hidden, parameters["side.contract.weight"], parameters["side.contract.bias"])
        end = len(self.taps)
        z = run.segment(end, x, self.features) if self.features is not self.backbone.ends[-2] else x
        residual = self._residual(hidden, parameters)
        z = z.detach()
        return Outcome(after(run, self.classifier, self.features, z + residual), {"frozen": after(run, self.classifier, self.features, z)})

    def _residual(self, hidden: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        weight, bias = parameters["side.residual.weight"], parameters["side.residual.bias"]
        if not self._dense():
            vector = F.linear(hidden.mean(1), weight, bias)
            shape = (1,) * (len(self.target) - 1)
            return vector.reshape(-1, *((*shape, self._depth()) if self._last_axis() else (self._depth(), *shape)))
        grid, size = self._grid(), self.target[1:]
        plane = F.linear(hidden, weight, bias).transpose(1, 2).reshape(-1, self._depth(), *grid)
        mode = "bilinear" if len(size) == 2 else "linear"
        return plane if tuple(grid) == tuple(size) else F.interpolate(plane, size=list(size), mode=mode, align_corners=False)

    def hyper(self) -> dict[str, Hyper]:
        """Entropy margin and the weight of the divergence from the frozen model."""
        return {"margin": MARGIN, "regulariser": Hyper(1.0, 0.0, 100.0, "weight of the divergence from the frozen model's predictions")}

    def unlabelled(self, outcome: Outcome, hyper: Mapping[str, Tensor]) -> Terms:
        """Entropy of the confident predictions plus KL(frozen ‖ adapted)."""
        frozen, adapted = outcome.terms["frozen"].detach().log_softmax(1), outcome.logits.log_softmax(1)
        divergence = (frozen.exp() * (frozen - adapted)).sum(1).mean()
        return confident_entropy(outcome.logits, hyper["margin"]), Term(hyper["regulariser"] * divergence)
