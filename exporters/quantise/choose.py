"""The stages of an export that put the frozen model into 8 bits: which layers, before anything is trained; the numbers, once all is trained."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgeadapt.bundle.quantised import Quantised, QuantisedLayer
from edgeadapt.errors import ExportError
from edgeadapt.exporters.capture import Captured, module_path
from edgeadapt.exporters.data import Samples
from edgeadapt.exporters.methods import Method
from edgeadapt.exporters.methods.source import Norm, Source
from edgeadapt.exporters.options import Options
from edgeadapt.exporters.programs import Model, source_model
from edgeadapt.exporters.quantise.calibrate import CLEAN, Judged, bound_to, errors_of, grids_of, looks_of, quantised, reaches_of, with_gradients
from edgeadapt.exporters.quantise.layout import Layout, convolutions, layout, weight_of
from edgeadapt.exporters.quantise.matrices import matrices
from edgeadapt.exporters.quantise.ranges import Grid, weight_codes
from edgeadapt.exporters.quantise.rounding import Quantisation, grid_name
from edgeadapt.exporters.warmup import estimate_statistics, predictions
from edgeadapt.progress import Progress

LIMIT = 10**-3.0
"""A layer whose output is further off than this, mean square against mean square, stays in float32: 30 dB.

With statistics that move it is also looked at on faint inputs, whose differences are `FAINT` of the usual: what follows scales them up again, and a
fixed grid before that would be too coarse.
"""
FAINT = 0.15
DROP, CHANGED = 0.005, 0.02
"""Share of held-out samples that 8 bits may cost; without labels, whose prediction they may change.

While they cost more, the worst `STEP` of the layers go back to float32, `ROUNDS` times at most.
"""
STEP, ROUNDS = 0.1, 4
MOST, FEWEST = 512, 64
"""Held-out samples that this is measured on: the most, and how many at least where samples are large."""
BACK = 2
"""Clean and shifted batches that gradients are looked at on."""
MEASURED = 8
"""Batches that statistics are measured on in both precisions."""
ASSUMED = "every convolution that could be is taken to be in 8 bits; those that would suffer stay in float32 at export, which takes more"
"""What a plan without data takes for granted."""
AT_ONCE, SEEN = 8 * 3 * 224 * 224, 128 * 3 * 224 * 224
"""Numbers of a batch, and of all samples that are held out: an image of 224×224 has as many as fifty of 32×32, and takes as much time and memory."""


@dataclass(frozen=True)
class Chosen:
    """What was chosen: a row for each convolution and each large matrix of the model."""

    rows: tuple[Judged, ...]

    @property
    def floating(self) -> frozenset[str]:
        """Layers that stay in float32, by node."""
        return frozenset(row.node for row in self.rows if row.choice == "float")


@dataclass
class Numbers:
    """The numbers of a bundle: of its model, and of the frozen model by itself, whose statistics in 8 bits are `values`."""

    model: Quantisation
    frozen: Quantisation
    values: dict[str, Tensor]
    report: Quantised


class Quantising:
    """Puts a model into 8 bits.

    Args:
        data: source samples.
        options: of the export.
        capture: gives the float model traced at a batch size.
        progress: told of each stage.
    """

    def __init__(self, data: Samples, options: Options, capture: Callable[[int], Captured], progress: Progress) -> None:
        self.data, self.options, self.capture, self.progress = data, options, capture, progress
        self.kept, self.held = data.split(options.holdout, options.seed)
        self.batch = min(options.warmup_batch, len(self.kept), max(2, AT_ONCE // int(np.prod(data.spec.shape))))
        self.most = most_samples(data)
        self.looks = looks_of(data, self.kept, self.batch, options.seed)

    def like(self, options: Options) -> Quantising:
        """The same for an export that differs in its numbers alone."""
        other = copy.copy(self)
        other.options = options
        return other

    def choose(self, method: Method, statistics: str) -> Chosen:
        """Which layers, from the frozen model as the method normalises it.

        Where every layer is too far off, all stay in float32, and the rows say why.

        Raises:
            ExportError: the model has no convolution that could be in 8 bits.
        """
        captured = self.capture(self.batch)
        live = statistics == "live" and bool(captured.norms)  # the statistics that move may be the method's own alone
        alone = (Norm if live else Source)(captured, method.setup)
        model = Model(alone, {}, alone.backbone.source_statistics(), "live" if live else "source", "sgd")
        self.progress("8 bits", 0, 0, "looking at every layer")
        faint = self.looks[0].mean() + FAINT * (self.looks[0] - self.looks[0].mean())
        places = places_of(captured)
        found = quantised(model, places, self.looks)
        errors = errors_of(model, places, found, self.looks[0])
        if live:
            others = errors_of(model, places, found, faint)
            errors = {node: max(error, others[node]) for node, error in errors.items()}
        floating = {node for node, error in errors.items() if not error <= LIMIT}
        why = dict.fromkeys(floating, "its error") | dict.fromkeys(method.exact & set(errors), f"{method.name} adapts what it reads")
        floating |= method.exact & set(errors)
        rows = self._rows_held()
        plain = self._predicted(model, rows)
        truth = plain if self.data.y is None else self.data.y[rows]
        right, accuracy = float((plain == truth).mean()), self._accuracy(model, found, floating, rows, truth)
        for _ in range(ROUNDS):
            if right - accuracy <= max(CHANGED if self.data.y is None else DROP, 1.0 / len(rows)) or len(floating) == len(errors):
                break
            worst = sorted((node for node in errors if node not in floating), key=lambda node: -errors[node])
            for node in worst[: max(1, round(STEP * len(errors)))]:
                floating.add(node)
                why[node] = "accuracy of the whole"
            accuracy = self._accuracy(model, found, floating, rows, truth)
        return Chosen(tuple(self._rows(captured, errors, floating, why)))

    def _rows(self, captured: Captured, errors: dict[str, float], floating: set[str], why: dict[str, str]) -> Sequence[Judged]:
        rows = []
        for node in (*convolutions(captured), *matrices(captured)):
            weights = int(np.prod(weight_of(node).meta["val"].shape))
            known = node.name in errors
            choice = "int8" if known and node.name not in floating else "float"
            reason = why.get(node.name, "") if known else "its form"
            rows.append(Judged(module_path(node) or node.name, node.name, weights, errors.get(node.name, math.inf), choice, reason))
        return rows

    def _accuracy(self, model: Model, found: Quantisation, floating: set[str], rows: Any, truth: Any) -> float:
        """How often the model in 8 bits is right."""
        places = layout(model.method.backbone.captured, (), frozenset(floating))
        grids = {grid_name(key)[0] for key in places.tensors | places.channels | places.ends}
        if not grids <= found.tensors.keys():  # behind a layer in float32, others may be rounded than behind it in 8 bits
            found = quantised(model, places, self.looks)
        rounded = self._predicted(bound_to(model, dataclasses.replace(found, layout=places)), rows)
        return float((rounded == truth).mean())

    def _predicted(self, model: Model, rows: Any) -> Any:
        return predictions(lambda x: self._logits(model, x), self.data, rows, self.batch)

    def finish(self, trained: Model, chosen: Chosen) -> tuple[Model, Numbers]:
        """The model with the statistics that it has in 8 bits, and the numbers.

        Raises:
            ExportError: 8 bits cost more accuracy than the options allow.
        """
        captured = self.capture(self.batch)
        model = dataclasses.replace(trained, method=trained.method.at(captured))
        self.progress("8 bits", 0, 0, "looking at the trained model")
        found = quantised(model, layout(captured, model.method.entries, chosen.floating), self.looks)
        if model.method.standardises:
            method = bound_to(model, found).method
            method.calibrate(self.looks[:CLEAN], method.tensors(), model.values)
        values = self._statistics(model, found)
        if self.options.gradient_in_codes:
            found = with_gradients(found, self._reaches(dataclasses.replace(model, values=values), found) if model.method.trains else None)
        frozen = source_model(model, model.method.backbone.source_statistics())
        alone = layout(captured, (), chosen.floating)
        if model.statistics != "live" and found.layout == alone:
            own, still = found, values  # a method that leaves the frozen model as it is must begin where it is, to the last bit
        else:
            own = Quantisation.of(alone, grids_of(frozen, alone, self.looks), found.weights)
            still = self._statistics(frozen, own)
        fixed = dataclasses.replace(model, values=values)
        rows = self._rows_held()
        plain, rounded = self._predicted(model, rows), self._predicted(bound_to(fixed, found), rows)
        truth = plain if self.data.y is None else self.data.y[rows]
        right, accuracy = (float((guess == truth).mean()) if len(self.held) else None for guess in (plain, rounded))
        layers = [QuantisedLayer(row.layer, row.weights, round(row.decibels, 1), row.choice, row.why) for row in chosen.rows]
        options = self.options
        gradient, saved = ("int8" if small else "float" for small in (options.gradient_in_codes, options.saves_codes))
        gradient, saved = (gradient, saved) if model.method.trains else ("none", "none")
        if gradient == "int8" and not any(layer.turns for layer in found.layout.layers.values()):
            gradient = "float"
        self._check(right, accuracy, len(rows))
        report = Quantised("int8", gradient, saved, len(rows) if len(self.held) else 0, self.data.y is not None, right, accuracy, tuple(layers))
        return dataclasses.replace(trained, values=values), Numbers(found, own, still, report)

    def _check(self, right: float | None, accuracy: float | None, count: int) -> None:
        """See that 8 bits do not cost more than is allowed, as the warm-up may not."""
        options = self.options
        if right is None or accuracy is None or options.allow_drop or right - accuracy <= options.max_drop / 100:
            return
        raise ExportError(
            f"8 bits cost {100 * (right - accuracy):.1f} points of clean accuracy ({100 * right:.1f} % before, {100 * accuracy:.1f} % after, "
            f"on {count} held-out samples), more than {options.max_drop:g}",
            "leave --quantize out, or give more samples that are like those it was trained on; or accept it with --allow-drop",
        )

    def _reaches(self, model: Model, found: Quantisation) -> dict[str, Tensor]:
        """How far gradients reach, on some clean and some shifted samples; the classes to learn are the model's own."""
        self.progress("8 bits", 0, 0, "looking at gradients")
        rounded, batches = bound_to(model, found), []
        for x in self.looks[:BACK] + self.looks[-BACK:]:
            batches.append((x, self._logits(rounded, x).argmax(1)))
        return reaches_of(rounded, batches)

    @staticmethod
    def _logits(model: Model, x: Tensor) -> Tensor:
        method = model.method
        tensors, everything = method.tensors(), {**model.fixed, **model.parameters}
        with torch.no_grad():
            return method.forward(method.backbone.run(tensors, model.normaliser(), method.affine(everything)), x, tensors, everything).logits

    def _rows_held(self) -> Any:
        """Samples that are measured on, from all over those that are held out: these may be sorted by class."""
        rows = self.held if len(self.held) else self.kept
        return rows[:: max(1, len(rows) // self.most)][: self.most]

    def _statistics(self, model: Model, found: Quantisation) -> dict[str, Tensor]:
        """The model's statistics, moved by what 8 bits move those of the same batches."""
        if not model.values:
            return dict(model.values)
        everything = {**model.fixed, **model.parameters}
        tensors = {**model.method.tensors(), **found.tensors}

        def measured(of: Model) -> dict[str, Tensor]:
            chosen: dict[str, Any] = {"batch": self.batch, "batches": MEASURED, "progress": self.progress}
            return estimate_statistics(of.method, everything, tensors, self.data, self.kept, **chosen)

        plain, rounded = measured(model), measured(bound_to(model, found))
        values = {}
        for name, value in model.values.items():
            if name.endswith(".mean"):
                value = value + rounded[name] - plain[name]
            elif model.statistics == "live":  # where they stay, a scale for the clean samples' rounding is worse on others than none
                value = value * (rounded[name] + 1e-6) / (plain[name] + 1e-6)
            values[name] = value
        return values


def most_samples(data: Samples) -> int:
    """Held-out samples to measure on, at most: fewer where they are large."""
    return min(MOST, max(FEWEST, SEEN // int(np.prod(data.spec.shape))))


def places_of(captured: Captured) -> Layout:
    """Where numbers would be rounded if all that could be were in 8 bits.

    Raises:
        ExportError: the model has no convolution that could be.
    """
    places = layout(captured)
    if not places.layers:
        raise ExportError(
            "8 bits are for convolutions over one or two axes with fixed weights, and this model has none that could be in them",
            "leave quantize out; for bytes between the passes of a step alone, give saved=\"int8\" (--saved int8)",
        )
    return places


def stand_in(captured: Captured, cuts: Sequence[str], floating: frozenset[str], gradients: bool) -> Quantisation:
    """Numbers that make the same graph as the real ones will, all unlike one another: equal tensors are stored once."""
    places = layout(captured, cuts, floating)
    random = torch.Generator().manual_seed(0)

    def grid(key: str) -> Grid:
        one = key in places.tensors
        channels = 1 if one else int(_value(captured, key).shape[1])
        scale = (0.01 + 0.001 * torch.rand((), generator=random)) if one else 0.01 + 0.001 * torch.rand(channels, generator=random)
        zero = torch.zeros_like(scale) if key in places.positive else torch.randint(1, 255, scale.shape, generator=random).float()
        return Grid(scale, zero.to(torch.uint8))

    keys = sorted(places.tensors | places.channels | places.ends)
    weights = {weight: weight_codes(captured.tensors[weight]) for weight in places.weights}
    made = Quantisation.of(places, {key: grid(key) for key in keys}, weights)
    return with_gradients(made) if gradients else made


def _value(captured: Captured, key: str) -> Any:
    name = key.rpartition(":")[2]
    return next(node for node in captured.graph.nodes if node.name == name).meta["val"]

