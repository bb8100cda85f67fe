"""SURGEON: entropy minimisation with pruned saved activations (Ma et al., CVPR 2025, arXiv 2503.20354).

    G_i = root mean square of the gradients of layer i's parameters          (gradient importance)
    M_i = −log(layer i's share of all activations that are saved)            (memory importance)
    I_i = G_i · M_i,   p_i = 1 − I_i / max I                                 (pruning ratio)

Of what layer i reads the share 1 − p_i that is largest in magnitude is kept for the gradient of its weight; the rest counts as zero there, and there
alone. Differences from the paper: p_i is measured once, at export, on source samples with noise, and not on each batch anew, since graphs have static
shapes; what is kept is the largest of every group of g numbers of a channel, 1/g nearest to 1 − p_i (`exporters.pruned` says why); a normalisation
prunes x less its mean, which is what its scale's gradient is made of; kept values are bytes by default.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from edgeadapt.errors import ExportError, UsageError
from edgeadapt.exporters.backbone import BackboneRun, Normaliser
from edgeadapt.exporters.capture import NORMALISATION, Affine, Captured
from edgeadapt.exporters.methods.affine import AffineMethod
from edgeadapt.exporters.methods.base import Outcome, Setting, Setup, entropy, generator
from edgeadapt.exporters.operators import REPLACED
from edgeadapt.exporters.pruned import Convolution, Linear, group, scaled
from edgeadapt.exporters.quantise.layout import windows

NOISE = 0.5
"""Of the shift that importance is measured under: normal noise of so many standard deviations of the inputs."""
FEWEST = 8
"""Samples that importance is measured on, at least; with fewer, as in a plan before there is data, all is taken to be kept."""
aten = torch.ops.aten
_WEIGHTED = frozenset({aten.linear, aten.conv1d, aten.conv2d, aten.conv3d, aten.conv_transpose1d, aten.conv_transpose2d})


@dataclass(frozen=True)
class Layer(Affine):
    """A layer that is trained, of whatever kind.

    Attributes:
        size: numbers of a frame that it reads, and that it would save.
        channel: how many of them are a channel, whose largest are kept; 1 where they are not pruned.
    """

    size: int
    channel: int


class Surgeon(AffineMethod):
    """Scale and shift of the normalisations, or all weights, follow the entropy; of what their gradients need the most important part is kept."""

    name, summary = "surgeon", "as tent, or all weights; what is kept for their gradients is pruned layer by layer"
    optimiser, rate = "adam", 3e-4
    calibrates = True
    saves = "int8"
    layers: list[Layer]
    settings: ClassVar[Mapping[str, Setting]] = {
        "scope": Setting("norm", "train scale and shift of normalisations, or of all layers weights and biases", ("norm", "full")),
        "prune": Setting("measured", "keep what importance on source samples says, or everything", ("measured", "none")),
    }

    def __init__(self, captured: Captured, setup: Setup) -> None:
        self.shares: dict[str, float] = {}
        super().__init__(captured, setup)
        if setup.exact and self.setting("prune") == "measured":
            raise _unpruned()
        if self.setting("scope") == "full":
            self.rate = FULL_RATE

    def without_layers(self) -> ExportError:
        """Also what else could be trained."""
        if self.setting("scope") == "full":
            return ExportError(f"{self.name} trains the weights of layers, and this model has none", "use --method side")
        what = "the scale and shift of normalisation layers"
        return ExportError(f"{self.name} trains {what}, and this model has none", "use --setting scope=full, or --method side")

    def bind(self, captured: Captured) -> None:
        """Also find the layers that are trained, in the order of execution."""
        super().bind(captured)
        affine = {layer.node: layer for layer in captured.affines}
        self.layers = []
        self._instead: dict[str, Callable[..., Tensor]] = {}
        for node in captured.operators:
            names = (affine[node.name].weight, affine[node.name].bias) if node.name in affine else self._weights(captured, node)
            if any(names):
                shape = tuple(int(size) for size in _read(node).meta["val"].shape)
                self._instead |= {node.name: instead} if (instead := _instead(node)) is not None else {}
                channel = (shape[-1] if _packet(node) is aten.linear else math.prod(shape[2:])) if instead is not None else 1
                self.layers.append(Layer(node.name, *names, math.prod(shape[1:]), channel))
        if captured.quantisation is not None and self.setting("scope") == "full":
            raise ExportError(
                "surgeon with scope = 'full' trains the weights that 8 bits hold fixed",
                "export it with --quantize none, or with --setting scope=norm",
            )

    def _weights(self, captured: Captured, node: fx.Node) -> tuple[str, str]:
        """Names of the weight and the bias of a layer whose weights are trained; "" for none."""
        if self.setting("scope") != "full" or _packet(node) not in _WEIGHTED:
            return "", ""
        found = [captured.owner.get(arg.name, "") if isinstance(arg, fx.Node) else "" for arg in node.args[1:3]] + ["", ""]
        weight, bias = (name if name in captured.parameters else "" for name in found[:2])
        return weight, bias

    def calibrate(self, batches: Sequence[Tensor], tensors: Mapping[str, Tensor], statistics: Mapping[str, Tensor]) -> None:
        """Measure each layer's importance on source inputs with noise, by the gradients of a step, and from that what is kept of what it reads."""
        if self.setting("prune") == "none" or sum(map(len, batches)) < FEWEST:
            return
        random, start = generator(self.setup.seed), self.parameters()
        squares = dict.fromkeys(start, 0.0)
        for x in batches:
            noise = torch.randn(x.shape, generator=random)
            with torch.enable_grad():
                parameters = {name: value.detach().clone().requires_grad_() for name, value in start.items()}
                logits = self.backbone.run(tensors, Normaliser(statistics, "live"), parameters).whole(x + NOISE * x.std() * noise)
                gradients = torch.autograd.grad(entropy(logits).mean(), list(parameters.values()), allow_unused=True)
            for name, gradient in zip(parameters, gradients, strict=True):
                squares[name] += 0.0 if gradient is None else float(gradient.square().sum()) / len(batches)
        every, importance = sum(layer.size for layer in self.layers), {}
        for layer in self.layers:
            names = [name for name in (layer.weight, layer.bias) if name]
            root = math.sqrt(sum(squares[name] for name in names) / sum(start[name].numel() for name in names))
            importance[layer.node] = -root * math.log(layer.size / every)
        most = max(importance.values())
        self.shares.update({node: value / most if most > 0 else 1.0 for node, value in importance.items()})

    def apart(self, layer: Layer) -> int:
        """One of how many numbers that a layer reads is kept for the gradient of its weight; 1: all."""
        return group(layer.channel, self.shares.get(layer.node, 1.0)) if self.setting("prune") == "measured" else 1

    def forward(self, run: BackboneRun, x: Tensor, tensors: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> Outcome:
        """The model's own forward pass, of which trained layers keep what is left after pruning."""
        for layer in self.layers:
            if layer.weight and parameters[layer.weight].requires_grad and (apart := self.apart(layer)) > 1:
                run.instead[layer.node] = partial(self._instead[layer.node], apart=apart)
        if run.instead and run.normalise.exact:
            raise _unpruned()
        return Outcome(run.whole(x))


def _unpruned() -> UsageError:
    return UsageError(
        "gradients through the batch's statistics need all that a layer reads, and surgeon prunes it",
        "leave --exact-gradient out, or export with --setting prune=none",
    )


FULL_RATE = 1e-4
"""Learning rate at a batch of 64 where all weights are trained."""


def _packet(node: fx.Node) -> Any:
    return getattr(node.target, "overloadpacket", None)


def _read(node: fx.Node) -> fx.Node:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return source


def _instead(node: fx.Node) -> Callable[..., Tensor] | None:
    """What stands in for a layer that prunes, with `apart` besides its arguments; None where it keeps all that it reads for other gradients too."""
    if node.target is NORMALISATION:
        return _batch
    if node.target is aten.group_norm.default:
        return _group
    if node.target is aten.instance_norm.default:
        return _instance
    if _packet(node) is aten.linear:
        return lambda x, weight, bias=None, *, apart: Linear()(x, weight, bias, apart)
    how = windows(node) if _packet(node) in (aten.conv1d, aten.conv2d) else None
    if how is None:
        return None
    convolution = Convolution(how.stride, how.padding, how.dilation, how.groups)
    return lambda x, weight, bias=None, *_, apart: convolution(x, weight, bias, apart)


def _batch(x: Tensor, mean: Tensor | None, variance: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, *, apart: int) -> Tensor:
    if mean is None or variance is None:
        return scaled(x, weight, bias, apart=apart)
    return scaled(x, weight, bias, mean, (variance + eps).sqrt(), apart=apart)


def _group(x: Tensor, groups: int, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5, *_: Any, apart: int) -> Tensor:
    return scaled(REPLACED[aten.group_norm.default](x, groups, None, None, eps), weight, bias, apart=apart)


def _instance(x: Tensor, weight: Tensor, bias: Tensor | None, *how: Any, apart: int) -> Tensor:
    return scaled(REPLACED[aten.instance_norm.default](x, None, None, *how), weight, bias, apart=apart)
