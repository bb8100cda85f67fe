"""Optimisers as pure functions over named tensors: `init` gives the moments, `update` the next parameters and moments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from edgeadapt.exporters.ir import VECTOR_BYTES, joinable
from edgeadapt.exporters.methods.base import Hyper, Tensors

_ALL = "*"
"""What the vectors are called, joined; no parameter is."""
MOMENTUM = Hyper(0.9, 0.0, 0.9999, "momentum of the updates")


class Optimiser(Protocol):
    """State is plain data; both functions are pure. A step is the same wherever the parameters are: it depends on gradients and moments alone.

    Where there is a scalar `go` among the scalars and it is 0, gradients are 0 too, and parameters and moments stay as they are, to the bit.

    squares: what the names of moments begin with that are never negative.
    """

    name: str
    squares: tuple[str, ...]

    def init(self, parameters: Mapping[str, Tensor]) -> Tensors:
        """Moments for these parameters, by name."""
        ...

    def update(
        self, gradients: Mapping[str, Tensor], parameters: Mapping[str, Tensor], moments: Mapping[str, Tensor], hyper: Mapping[str, Tensor]
    ) -> tuple[Tensors, Tensors]:
        """The next parameters and moments."""
        ...


class SGD:
    """Stochastic gradient descent with momentum: m ← μ·m + g, p ← p − η·m, as torch.optim.SGD."""

    name = "sgd"
    squares: tuple[str, ...] = ()

    def init(self, parameters: Mapping[str, Tensor]) -> Tensors:
        """One momentum a parameter."""
        return {f"momentum.{name}": torch.zeros_like(value) for name, value in parameters.items()}

    def update(
        self, gradients: Mapping[str, Tensor], parameters: Mapping[str, Tensor], moments: Mapping[str, Tensor], hyper: Mapping[str, Tensor]
    ) -> tuple[Tensors, Tensors]:
        """One step."""
        rate, momentum = _held(hyper, hyper["rate"], 0.0), _held(hyper, hyper["momentum"], 1.0)
        following = {f"momentum.{name}": momentum * moments[f"momentum.{name}"] + gradients[name] for name in parameters}
        return {name: value - rate * following[f"momentum.{name}"] for name, value in parameters.items()}, following


class Adam:
    """Adam (Kingma & Ba, arXiv 1412.6980, algorithm 1) with β₁ = momentum, β₂ = 0.999, ε = 1e-6, as torch.optim.Adam(eps=1e-6).

    The larger ε matters on a device: a batch without a confident prediction has gradients of rounding alone (about 1e-9), which ε = 1e-8 would
    blow up to steps of almost the full rate.
    """

    name, beta, eps = "adam", 0.999, 1e-6
    squares: tuple[str, ...] = ("second.",)

    def init(self, parameters: Mapping[str, Tensor]) -> Tensors:
        """First and second moment a parameter, and the step count."""
        table = {f"{kind}.{name}": torch.zeros_like(value) for kind in ("first", "second") for name, value in parameters.items()}
        return {**table, "step": torch.zeros(())}

    def update(
        self, gradients: Mapping[str, Tensor], parameters: Mapping[str, Tensor], moments: Mapping[str, Tensor], hyper: Mapping[str, Tensor]
    ) -> tuple[Tensors, Tensors]:
        """One step."""
        step = moments["step"] + hyper.get("go", 1.0)
        counted = step.clamp(min=1.0) if "go" in hyper else step
        rate = _held(hyper, hyper["rate"] / (1.0 - torch.pow(hyper["momentum"], counted)), 0.0)
        correction = (1.0 - torch.pow(torch.full((), self.beta), counted)).sqrt()
        beta1, beta2 = _held(hyper, hyper["momentum"], 1.0), _held(hyper, self.beta, 1.0)
        values: Tensors = {}
        following: Tensors = {"step": step}
        for name, value in parameters.items():
            gradient = gradients[name]
            first = beta1 * moments[f"first.{name}"] + (1.0 - beta1) * gradient
            second = beta2 * moments[f"second.{name}"] + (1.0 - beta2) * (gradient * gradient)
            values[name] = value - rate * first / (second.sqrt() / correction + self.eps)
            following[f"first.{name}"], following[f"second.{name}"] = first, second
        return values, following


def step(
    optimiser: Optimiser,
    gradients: Mapping[str, Tensor],
    parameters: Mapping[str, Tensor],
    moments: Mapping[str, Tensor],
    hyper: Mapping[str, Tensor],
) -> tuple[Tensors, Tensors]:
    """One step of an optimiser, with all small vectors among the parameters taken as one: what a graph holds grows with its nodes."""
    vectors = [name for name, value in parameters.items() if value.dim() == 1 and value.nbytes <= VECTOR_BYTES]
    others = [name for name in parameters if name not in vectors]
    if not joinable(parameters[name].nbytes for name in vectors):
        return optimiser.update(gradients, parameters, moments, hyper)
    kinds = [key.removesuffix(_ALL) for key in optimiser.init({_ALL: torch.zeros(())}) if key.endswith(_ALL)]
    sizes = [int(parameters[name].shape[0]) for name in vectors]

    def joined(table: Mapping[str, Tensor], kind: str = "") -> Tensors:
        return {kind + name: table[kind + name] for name in others} | {kind + _ALL: torch.cat([table[kind + name] for name in vectors])}

    def apart(table: Tensors, kind: str = "") -> Tensors:
        return dict(zip((kind + name for name in vectors), table.pop(kind + _ALL).split(sizes), strict=True))

    whole = {name: value for name, value in moments.items() if not name.startswith(tuple(kinds))}
    for kind in kinds:
        whole |= joined(moments, kind)
    values, following = optimiser.update(joined(gradients), joined(parameters), whole, hyper)
    for kind in kinds:
        following |= apart(following, kind)
    values |= apart(values)
    return {name: values[name] for name in parameters}, {name: following[name] for name in moments}


def _held(hyper: Mapping[str, Tensor], value: Tensor | float, still: float) -> Tensor | float:
    """A scalar of a step, or what it must be for nothing to change where the step is not to be."""
    if "go" not in hyper:
        return value
    return hyper["go"] * value + (1.0 - hyper["go"]) * still


OPTIMISERS: dict[str, Optimiser] = {"sgd": SGD(), "adam": Adam()}
