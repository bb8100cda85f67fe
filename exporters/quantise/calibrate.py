"""Looks at a model at work on source data, clean and shifted, and gives every tensor its grid; measures what each layer in 8 bits gets wrong.

Shifts are the four corruptions that the literature keeps for choosing things with (`EXTRA`), none of the fifteen that are reported on; samples that
are no images are made louder, offset and noisy instead.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgeadapt.bundle.roles import STEPS
from edgeadapt.corruptions import EXTRA, corrupt
from edgeadapt.exporters.data import Indices, Samples
from edgeadapt.exporters.programs import Model, build
from edgeadapt.exporters.quantise.layout import Layer, Layout
from edgeadapt.exporters.quantise.matrices import error_of
from edgeadapt.exporters.quantise.operators import turned_round, watched
from edgeadapt.exporters.quantise.ranges import Grid, Looks, weight_codes
from edgeadapt.exporters.quantise.rounding import Quantisation, convolved, gradient_name
from edgeadapt.preprocess import prepare

HEADROOM, LEAST, GUESS = 1.5, 1 / 16, 4 / 127
"""How much further than measured gradients may reach, how far each channel's do at least against the farthest, and how many times the length of a
weight's codes a gradient is taken to reach where nothing was measured."""
SEVERITY = 3
SENSOR = ("noisy", "louder", "offset", "fainter")
"""What is done to samples that are no images."""
CLEAN = 4
"""Batches of clean samples that are looked at, beside one of each shift."""


def looks_of(samples: Samples, rows: Indices, batch: int, seed: int) -> list[Tensor]:
    """Batches (batch, …) to look at, as the model takes them: clean ones, then shifted ones; fewer where there are few samples."""
    order = np.random.default_rng(seed).permutation(np.asarray(rows, np.intp))
    count = len(EXTRA) + CLEAN
    taken = [np.resize(order[start : start + batch] if start < len(order) else order, batch) for start in range(0, count * batch, batch)]
    clean = [torch.from_numpy(samples.tensor(chosen)) for chosen in taken[:CLEAN]]
    return clean + [torch.from_numpy(shifted(samples, chosen, index, seed)) for index, chosen in enumerate(taken[CLEAN:])]


def shifts_of(samples: Samples) -> tuple[str, ...]:
    """The names of the shifts that samples are put under."""
    return EXTRA if _pictures(samples) else SENSOR


def shifted(samples: Samples, rows: Any, index: int, seed: int, severity: int = SEVERITY) -> Any:
    """The samples `rows` under the shift `index` of `shifts_of`, as the model takes them. severity: 1 to 5; another one also has other noise."""
    if _pictures(samples):
        return prepare(corrupt(np.ascontiguousarray(samples.x[rows]), EXTRA[index], severity, seed), samples.spec)
    x = samples.tensor(rows)
    share = severity / 10
    far = np.float32(share * (float(np.std(x)) or 1.0))
    noise = np.random.default_rng([seed, index, severity]).standard_normal(x.shape).astype(np.float32)
    return np.ascontiguousarray((x + far * noise, np.float32(1 + share) * x, x + far, np.float32(1 - share) * x - far)[index % 4])


def _pictures(samples: Samples) -> bool:
    return samples.x.dtype == np.uint8 and samples.x.ndim == 4 and samples.x.shape[-1] in (1, 3)


def grids_of(model: Model, layout: Layout, batches: Sequence[Tensor]) -> dict[str, Grid]:
    """A grid for every tensor of a layout, by key: from the float model at work, with statistics that take over each batch's where they move.

    Args:
        model: in float32, bound to the batches' size.
        layout: of the same model with the method's cuts.
        batches: inputs.
    """
    looks = {key: Looks(False) for key in layout.tensors} | {key: Looks(True) for key in layout.channels | layout.ends}

    def observe(key: str, value: Tensor, _: Sequence[Any]) -> None:
        if key in looks:
            looks[key].add(value)

    for x in batches:
        _forward(model, x, observe)
    return {key: look.grid(0.0 if key in layout.positive else None, layout.bounds.get(key)) for key, look in looks.items()}


def _forward(model: Model, x: Tensor, observe: Any) -> None:
    method = model.method
    tensors = method.tensors()
    everything = {**model.fixed, **model.parameters}
    with torch.no_grad():
        run = method.backbone.run(tensors, model.normaliser(), method.affine(everything))
        run.observe = observe
        method.forward(run, x, tensors, everything)


@dataclass(frozen=True)
class Judged:
    """What a layer in 8 bits gets wrong, and what it is computed in.

    Attributes:
        layer: the path of the user's module.
        node: the convolution in the captured graph.
        weights: their number.
        error: mean square of what its output is off, against that of its output without the channels' means; infinite where it was not tried.
        choice: "int8" or "float".
        why: what decided; "" where nothing spoke against 8 bits.
    """

    layer: str
    node: str
    weights: int
    error: float
    choice: str
    why: str = ""

    @property
    def decibels(self) -> float:
        """Signal over error; 0 where it was not tried."""
        return -10 * math.log10(max(self.error, 1e-12)) if math.isfinite(self.error) else 0.0


def errors_of(model: Model, layout: Layout, quantisation: Quantisation, x: Tensor) -> dict[str, float]:
    """For each layer in 8 bits, alone, what `Judged.error` says: fed by the float model, with its output rounded to the grid for each channel."""
    tensors = {**model.method.backbone.tensors, **quantisation.tensors}
    found: dict[str, float] = {}

    def observe(key: str, value: Tensor, given: Sequence[Any]) -> None:
        layer = layout.layers.get(key)
        if layer is not None and key not in found:
            found[key] = _error(layer, tensors, given[0], value)
        if key in layout.stored and key not in found:
            codes, scale = quantisation.weights[layout.stored[key]]
            found[key] = error_of(given[0], codes, scale, given[2] if len(given) > 2 else None, value)

    _forward(model, x, observe)
    return found


def _error(layer: Layer, tensors: Mapping[str, Tensor], x: Tensor, wanted: Tensor) -> float:
    looked = Looks(True)
    looked.add(wanted)
    to = looked.grid()
    got = convolved(layer, tensors, x, None, to)
    axes = [axis for axis in range(wanted.dim()) if axis != 1]
    varying = (wanted - wanted.mean(axes, keepdim=True)).square().mean()
    return float((got - wanted).square().mean() / varying.clamp(min=1e-12))


def quantised(model: Model, layout: Layout, batches: Sequence[Tensor]) -> Quantisation:
    """The numbers of a layout, from the float model at work on the batches."""
    tensors = model.method.backbone.captured.tensors
    weights = {weight: weight_codes(tensors[weight]) for weight in layout.weights}
    return Quantisation.of(layout, grids_of(model, layout, batches), weights)


def bound_to(model: Model, quantisation: Quantisation | None) -> Model:
    """The model over the same capture, with its numbers in 8 bits."""
    return replace(model, method=model.method.at(model.method.backbone.captured.quantised(quantisation)))


def with_gradients(quantisation: Quantisation, reaches: Mapping[str, Tensor] | None = None) -> Quantisation:
    """The numbers with those for gradients in 8 bits, through every convolution that can have them.

    reaches: measured, (C_in,) by node; a bound by the weights' size where one is missing.
    """
    tensors = dict(quantisation.tensors)
    for layer in quantisation.layout.layers.values():
        if not layer.turns:
            continue
        weight, reach = gradient_name(layer.node, layer.weight)
        tensors[weight] = turned_round(quantisation.weights[layer.weight][0], layer.how.groups)
        known = (reaches or {}).get(layer.node)
        tensors[reach] = tensors[weight].float().flatten(1).norm(dim=1).clamp(min=1.0) * GUESS if known is None else known
    return replace(quantisation, tensors=tensors)


def reaches_of(model: Model, batches: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """How far gradients reach behind each convolution against before it, (C_in,) by node: of steps with and without labels, in float32.

    Args:
        model: its frozen part in 8 bits, gradients through it in float32.
        batches: inputs and targets.
    """
    quantisation = model.method.backbone.captured.quantisation
    assert quantisation is not None
    nodes: dict[int, list[str]] = {}
    for layer in quantisation.layout.layers.values():
        nodes.setdefault(quantisation.weights[layer.weight][0].data_ptr(), []).append(layer.node)
    found: dict[str, Tensor] = {}

    def watch(weight: Tensor, scaled: Tensor, to_input: Tensor) -> None:
        most = scaled.abs().amax()
        if not most > 0:
            return
        reach = to_input.abs().amax([axis for axis in range(to_input.dim()) if axis != 1]) / most
        for node in nodes.get(weight.data_ptr(), ()):
            found[node] = torch.maximum(found[node], reach) if node in found else reach

    with watched(watch):
        for x, target in batches:
            for role in STEPS:
                program = build(model, role, x.shape[0], x, target)
                program(program.example)
    return {node: HEADROOM * torch.maximum(reach, LEAST * reach.max()).clamp(min=1e-6) for node, reach in found.items()}
