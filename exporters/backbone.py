"""The user's model, cut into segments and run node by node with normalisation under our control.

A segment is the stretch of operators between two cuts. One tensor crosses each cut, so a segment is a function of one tensor, and a method
decides what happens between segments: EcoTTA adds its meta networks there, a side network reads its taps.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx import traceback
from torch.nn import functional as F

from edgeadapt.exporters.blending import Blend, by_frame, has_positions, statistics_of
from edgeadapt.exporters.capture import NORMALISATION, Captured
from edgeadapt.exporters.operators import REPLACED, batch_statistics, channel_axes, magnitude, scale_shift
from edgeadapt.exporters.quantise.kept import Kept
from edgeadapt.exporters.quantise.layout import ENTRY
from edgeadapt.exporters.quantise.rounding import Rounding

Observe = Callable[[str, Tensor, Sequence[Any]], None]
"""Told of tensors as they are made: the node's name (`ENTRY` before that of a segment's start), the tensor, and what it was made from."""


@dataclass
class Normaliser:
    """How normalisation layers behave during one forward pass.

    mode: "source" uses the given statistics as they are; "live" first moves them toward this batch's by `mix`
    (s ← (1 − w)·s + w·b) and normalises with the result; "batch" is training mode, as in the warm-up, with gradients through the
    batch's statistics; "collect" is "batch" and also records the batch's statistics.
    exact: in "live", let gradients flow through the batch's statistics instead of taking them as constants.
    blend: what the statistics are before a layer is normalised with them; None: as they are. What is updated is not blended.
    """

    statistics: Mapping[str, Tensor]
    mode: str = "source"
    mix: Tensor | float = 1.0
    exact: bool = False
    shifted: frozenset[str] = frozenset()
    blend: Blend | None = None
    updated: dict[str, Tensor] = field(default_factory=dict)

    def fixed(self, name: str, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor] | None:
        """Scale and shift (C,) of layer `name`; None where its statistics move."""
        if self.mode != "source" or self.blend is not None:
            return None
        return scaling(self.statistics[f"{name}.mean"], self.statistics[f"{name}.variance"], weight, bias, eps)

    def __call__(
        self, name: str, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, instead: Callable[..., Tensor] | None = None
    ) -> Tensor:
        """Normalise x (N, C, …) as layer `name`, whose statistics are `name.mean` and `name.variance`, each (C,).

        instead: computes the result from (x, mean, variance, weight, bias, eps), where the statistics are constants, or None of what is normalised.
        """
        if self.mode in ("batch", "collect"):
            if self.mode == "collect":
                with torch.no_grad():
                    self.updated[f"{name}.variance"], self.updated[f"{name}.mean"] = torch.var_mean(x, channel_axes(x), correction=0)
            return F.batch_norm(x, None, None, weight, bias, training=True, eps=eps)
        mean, variance = self.statistics[f"{name}.mean"], self.statistics[f"{name}.variance"]
        frames = None
        if self.mode == "live":
            shift = mean.detach() if name in self.shifted else None
            seen = x if self.exact else x.detach()
            if self.blend is not None and has_positions(x):
                (batch_mean, batch_variance), frames = statistics_of(seen, shift)
            elif x.numel() == x.shape[1]:  # one value a channel has no variance: its square distance from the mean stands in, or s would run to 0
                batch_mean = seen.reshape(-1)
                batch_variance = (batch_mean - mean) ** 2
            else:
                batch_mean, batch_variance = batch_statistics(seen, shift)
            mean = (1.0 - self.mix) * mean + self.mix * batch_mean
            variance = (1.0 - self.mix) * variance + self.mix * batch_variance
            self.updated[f"{name}.mean"], self.updated[f"{name}.variance"] = mean.detach(), variance.detach()
        if self.blend is not None:
            mean, variance = self.blend(name, mean, variance, eps)
            if frames is not None:
                mean, variance = by_frame(frames, (mean, variance), eps, self.blend.own)
        if instead is None:
            return normalised(x, mean, variance, weight, bias, eps)
        if mean.dim() == 1:
            return instead(x, mean, variance, weight, bias, eps)
        return instead(normalised(x, mean, variance, None, None, eps), None, None, weight, bias, eps)


def normalised(x: Tensor, mean: Tensor, variance: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """x (N, C, …) normalised with statistics (C,), or (N, C), which are each frame's."""
    result: Tensor = scale_shift(x, *scaling(mean, variance, weight, bias, eps))
    return result


def scaling(mean: Tensor, variance: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """A normalisation as a scale and a shift, each of the form of the statistics, (C,) or (N, C)."""
    deviation = (variance + eps).sqrt()
    scale = (torch.ones_like(deviation) if weight is None else weight) / deviation
    return scale, -mean * scale if bias is None else bias - mean * scale


class Backbone:
    """A captured model in segments.

    Args:
        captured: the traced model.
        cuts: names of the nodes to cut after, in execution order.
    """

    def __init__(self, captured: Captured, cuts: Sequence[str] = ()) -> None:
        self.captured = captured
        self.cuts = list(cuts)
        self.norms = {norm.node: norm for norm in captured.norms}
        moving = {captured.input}
        self.still: list[fx.Node] = []
        self.segments: list[list[fx.Node]] = [[]]
        for node in captured.operators:
            if not any(source.name in moving for source in node.all_input_nodes):
                self.still.append(node)
                continue
            moving.add(node.name)
            self.segments[-1].append(node)
            if node.name in self.cuts:
                self.segments.append([])
        self.ends = [next(node for node in captured.operators if node.name == name) for name in self.cuts] + [captured.result]
        last = {source: node for node in captured.operators for source in node.all_input_nodes}
        self.done: dict[fx.Node, list[fx.Node]] = {}
        for source, node in last.items():
            self.done.setdefault(node, []).append(source)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Frozen parameters, buffers and constants by qualified name, int8 weights and grids among them."""
        more = self.captured.quantisation
        return self.captured.tensors if more is None else {**self.captured.tensors, **more.tensors}

    def run(
        self, tensors: Mapping[str, Tensor], normalise: Normaliser, affine: Mapping[str, Tensor] | None = None, kept: Kept | None = None
    ) -> BackboneRun:
        """Prepare one forward pass over `tensors`; `affine` stands in for those of the same qualified name.

        kept: in what form the pass keeps tensors for the gradient; None: as they are.
        """
        return BackboneRun(self, tensors, normalise, affine or {}, kept)

    def source_statistics(self) -> dict[str, Tensor]:
        """The statistics the model was trained with, as `layer.mean` and `layer.variance`."""
        table: dict[str, Tensor] = {}
        for norm in self.captured.norms:
            table[f"{norm.name}.mean"] = self.tensors[norm.mean].float()
            table[f"{norm.name}.variance"] = self.tensors[norm.variance].float()
        return table


class BackboneRun:
    """One forward pass, segment by segment.

    instead: what stands in for the operators of nodes, by name, with the same arguments; of a batch normalisation see `Normaliser`.
    """

    def __init__(
        self, backbone: Backbone, tensors: Mapping[str, Tensor], normalise: Normaliser, affine: Mapping[str, Tensor], kept: Kept | None = None
    ) -> None:
        self.backbone, self.tensors, self.normalise, self.affine, self.kept = backbone, tensors, normalise, affine, kept
        self.magnitude = torch.abs if kept is None else magnitude
        self.observe: Observe | None = None
        self.instead: dict[str, Callable[..., Tensor]] = {}
        quantisation = backbone.captured.quantisation
        self.rounding = None if quantisation is None else Rounding(quantisation, tensors, backbone.norms, normalise, affine, kept)
        owner = backbone.captured.owner
        self.known: dict[fx.Node, Any] = {}
        for node in backbone.captured.graph.nodes:
            if node.op == "placeholder" and node.name in owner:
                name = owner[node.name]
                self.known[node] = affine[name] if name in affine else tensors[name]
        for node in backbone.still:
            self.execute(node, self.known)

    def beside(self, affine: Mapping[str, Tensor], normalise: Normaliser | None = None, backbone: Backbone | None = None) -> BackboneRun:
        """Another pass over the same frozen tensors, with other trained ones, and with statistics of its own or the same.

        backbone: the model at another batch size, which is then the one whose tensors are kept for the gradient; None: the same.
        """
        if backbone is not None and self.kept is not None:
            self.kept.batch = backbone.captured.batch
        return BackboneRun(backbone or self.backbone, self.tensors, normalise or self.normalise, affine, self.kept)

    def segment(self, index: int, x: Tensor, stop: fx.Node | None = None) -> Tensor:
        """Run segment `index` on the tensor that crosses the cut before it; stop early at node `stop`, inclusive."""
        backbone = self.backbone
        values = dict(self.known)
        start = (
            backbone.ends[index - 1]
            if index
            else next(node for node in backbone.captured.graph.nodes if node.op == "placeholder" and node.name == backbone.captured.input)
        )
        values[start] = x if self.rounding is None else self.rounding.entry(start, x)
        if self.observe is not None:
            self.observe(ENTRY + start.name, x, ())
        end = stop or backbone.ends[index]
        for node in backbone.segments[index]:
            self.execute(node, values)
            if node is stop:
                break
            for source in backbone.done.get(node, ()):
                if source is not end:  # what nobody reads again is let go: a pass over large images would hold gigabytes
                    values.pop(source, None)
        result: Tensor = values[end]
        return result

    def whole(self, x: Tensor) -> Tensor:
        """Run all segments."""
        for index in range(len(self.backbone.segments)):
            x = self.segment(index, x)
        return x

    def execute(self, node: fx.Node, values: dict[fx.Node, Any]) -> None:
        """Run one node on the values of its inputs, and store its own."""

        def fetch(argument: Any) -> Any:
            return fx.node.map_arg(argument, lambda source: values[source])

        args, kwargs = fetch(node.args), fetch(node.kwargs)
        with traceback.set_current_meta(node):
            values[node] = self._computed(node, args, kwargs)
        if self.observe is not None and isinstance(values[node], Tensor):
            self.observe(node.name, values[node], args)

    def _computed(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        rounding = self.rounding
        if node.target is NORMALISATION:
            folded = rounding is not None and node.name in rounding.folded
            return (args[0] if folded else self._normalisation(node, args), None, None)
        if rounding is not None and node.op == "call_function" and args and isinstance(args[0], Tensor):
            done = rounding.convolution(node, args[0])
            if done is None:
                done = rounding.relu(node, args[0])
            if done is None:
                done = rounding.linear(node, args)
            if done is not None:
                return done
        if node.target is operator.getitem:
            value = args[0][args[1]]
        else:
            target: Any = self.instead[node.name] if node.name in self.instead else REPLACED.get(node.target, node.target)
            value = target(*args, **kwargs)
        return rounding.settled(node, value) if rounding is not None and isinstance(value, Tensor) else value

    def _normalisation(self, node: fx.Node, args: Any) -> Tensor:
        norm = self.backbone.norms[node.name]
        return self.normalise(norm.name, args[0], args[1], args[2], norm.eps, self.instead.get(node.name))
