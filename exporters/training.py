"""A method's parameters and statistics from source data: calibrated, warmed up, and held against the frozen model."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from edgeadapt.errors import ExportError, InputError
from edgeadapt.exporters.backbone import Normaliser
from edgeadapt.exporters.capture import Captured
from edgeadapt.exporters.data import Samples
from edgeadapt.exporters.methods import Method
from edgeadapt.exporters.options import Options, calibration_rows
from edgeadapt.exporters.programs import Model, source_model
from edgeadapt.exporters.programs import held as hold
from edgeadapt.exporters.reference import reference_of
from edgeadapt.exporters.warmup import estimate_statistics, predictions, warm_up
from edgeadapt.progress import Progress


@dataclass(frozen=True)
class Warmed:
    """A method calibrated and, where it asks for that, warmed up. How parameters will be held, and what is in 8 bits, makes no difference to it.

    Attributes:
        model: its parameters in float32, its statistics as they were before a warm-up.
        kept, held: indices of the samples it was trained on, and of those held out.
        truth: what is right for `held`: labels, or the frozen model's own predictions.
        before: share of those that the frozen model gets right.
    """

    model: Model
    kept: Any
    held: Any
    truth: Any
    before: float


class Training:
    """Calibrates a method and, where it asks for that, warms it up.

    Args:
        start: the method before anything is trained.
        data: source samples.
        options: how.
        capture: gives the model traced at a batch size.
        progress: told of each stage.
    """

    def __init__(self, start: Model, data: Samples, options: Options, capture: Callable[[int], Captured], progress: Progress) -> None:
        self.start, self.data, self.options, self.capture, self.progress = start, data, options, capture, progress

    def run(self) -> tuple[Model, dict[str, Any] | None, dict[str, Any] | None]:
        """The model to compile, its parameters held as the options say, what the warm-up reports, and what holding them so costs.

        Raises:
            InputError, ExportError: as `warm` and `hold`.
        """
        return self.hold(self.warm())

    def warm(self) -> Warmed:
        """All that takes long.

        Raises:
            InputError: there are too few samples.
            ExportError: the model guesses on its own data, or the warm-up diverges.
        """
        options, start, method = self.options, self.start, self.start.method
        kept, held = self._split(method)
        batch = min(options.warmup_batch, len(kept))
        method = method.at(self.capture(batch))
        if method.calibrates:
            rows = calibration_rows(kept, batch, options.seed, method.calibration_batches)
            calibration = [torch.from_numpy(self.data.tensor(row)) for row in rows]
            method.calibrate(calibration, self._tensors(method), start.values)
        frozen = source_model(Model(method, {}, {}, "source", start.optimiser), method.backbone.source_statistics())
        truth = self.data.y[held] if self.data.y is not None else self._predictions(frozen, held, batch)
        before = self._agreement(frozen, held, truth, batch)
        self._not_by_chance(before, len(held), int(method.setup.classes))
        model = dataclasses.replace(start, method=method)
        if method.warms_up:
            chosen: dict[str, Any] = {**self._how(batch), "seed": options.seed, "progress": self.progress}
            parameters = warm_up(method, start.parameters, self._tensors(method), self.data, kept, **chosen)
            model = dataclasses.replace(model, parameters=parameters)
        return Warmed(model, kept, held, truth, before)

    def hold(self, warmed: Warmed) -> tuple[Model, dict[str, Any] | None, dict[str, Any] | None]:
        """The rest of `run`, for a method that was warmed here or for another export that differs in its numbers alone.

        Raises:
            ExportError: the warm-up, or rounding its parameters, costs too much accuracy.
        """
        exact = dataclasses.replace(warmed.model, small=self.start.small)
        if exact.method.warms_up:
            return self._measure(exact, warmed)
        rounded = hold(exact, self.options.tier, self.options.seed)
        cost = self._cost(exact, rounded, warmed.held, warmed.truth, exact.method.backbone.captured.batch)
        return self._referred(rounded, warmed.kept), None, cost

    def _referred(self, model: Model, kept: Any) -> Model:
        """The model with what it makes of windows of source samples."""
        rows = calibration_rows(kept, model.method.backbone.captured.batch, self.options.seed)
        batches = [torch.from_numpy(self.data.tensor(row)) for row in rows]
        return dataclasses.replace(model, reference=reference_of(model, batches, self._tensors(model.method)))

    def _how(self, batch: int) -> dict[str, Any]:
        return {"epochs": self.options.epochs, "rate": self.options.warmup_rate, "batch": batch}

    def _split(self, method: Method) -> tuple[Any, Any]:
        """Samples to train on and to hold out, enough of each for the method."""
        options = self.options
        kept, held = self.data.split(options.holdout, options.seed)
        if method.warms_up and not len(held):
            wanted = math.ceil(100 / options.max_drop / options.holdout)
            raise InputError(
                f"none of the {len(kept)} samples can be held out, and {method.name} needs some to measure what the warm-up costs",
                f"give at least two samples of a class; it takes {wanted} samples until one held-out sample counts {options.max_drop:g} points",
            )
        if method.calibrates and len(kept) < 2:
            raise InputError(f"{method.name} cannot be calibrated on {len(kept)} sample", "give 2 samples at least, better some hundreds")
        return kept, held

    def _not_by_chance(self, before: float, count: int, classes: int) -> None:
        """Refuse a model that guesses on its own data: then the inputs are not what it was trained on."""
        if self.data.y is None or self.options.allow_drop or classes < 2 or count < 50:
            return
        chance = 1 / classes
        if before < chance + 3 * (chance * (1 - chance) / count) ** 0.5:
            raise ExportError(
                f"the model, as it is, is right on {100 * before:.1f} % of {count} held-out samples, which is chance for {classes} classes",
                "give the inputs as in training (--mean, --std, --resize, the order of the classes) and the trained weights (--weights); "
                "or accept it with --allow-drop",
            )

    def _cost(self, exact: Model, rounded: Model, held: Any, truth: Any, batch: int) -> dict[str, Any] | None:
        """Accuracy with parameters as they are and as they are held; None where that is the same, or nothing can be measured.

        Raises:
            ExportError: rounding costs too much.
        """
        if rounded is exact or not len(held):
            return None
        before, after = (self._agreement(dataclasses.replace(model, statistics="source"), held, truth, batch) for model in (exact, rounded))
        if not self.options.allow_drop and not before - after <= self.options.max_drop / 100:
            raise ExportError(
                f"holding parameters as {self.options.updates} costs {100 * (before - after):.1f} points of clean accuracy "
                f"({100 * before:.1f} % before, {100 * after:.1f} % after, on {len(held)} held-out samples), more than {self.options.max_drop:g}",
                "take a larger form (--updates compact or reference); or accept it with --allow-drop",
            )
        return {"updates": self.options.updates, "held_out": len(held), "accuracy_before": before, "accuracy_after": after}

    def _measure(self, exact: Model, warmed: Warmed) -> tuple[Model, dict[str, Any], dict[str, Any] | None]:
        """Hold trained parameters as the device will, re-estimate all statistics, and compare accuracy."""
        options, method, tensors = self.options, exact.method, self._tensors(exact.method)
        kept, held, truth, before, batch = warmed.kept, warmed.held, warmed.truth, warmed.before, method.backbone.captured.batch

        def measured(model: Model) -> Model:
            if method.reads:  # the model's own values are as they were
                return model
            found = estimate_statistics(method, model.parameters, tensors, self.data, kept, batch=batch, progress=self.progress)
            return dataclasses.replace(model, values={name: found[name] for name in exact.values})  # in that order: the graph is the planned one

        rounded = hold(exact, options.tier, options.seed)
        trained = measured(rounded)
        rounding = None if rounded is exact else self._cost(measured(exact), trained, held, truth, batch)
        after = self._agreement(dataclasses.replace(trained, statistics="source"), held, truth, batch)
        if not options.allow_drop and not before - after <= options.max_drop / 100:
            raise ExportError(
                f"the warm-up costs {100 * (before - after):.1f} points of clean accuracy ({100 * before:.1f} % before, {100 * after:.1f} % after, "
                f"on {len(held)} held-out samples), more than {options.max_drop:g}",
                "warm up longer (--epochs), on more data, or at another rate (--warmup-rate); or accept it with --allow-drop",
            )
        known = {"samples": len(kept), "held_out": len(held), "clean_accuracy_before": before, "clean_accuracy_after": after}
        return self._referred(trained, kept), {**self._how(batch), **known, "labelled": self.data.y is not None}, rounding

    @staticmethod
    def _tensors(method: Method) -> dict[str, Tensor]:
        return method.tensors()

    def _agreement(self, model: Model, held: Any, truth: Any, batch: int) -> float:
        """Share of predictions that equal `truth`, with fixed statistics; the truth is the labels, or the frozen model's own predictions."""
        return float((self._predictions(model, held, batch) == truth).mean()) if len(held) else math.nan

    def _predictions(self, model: Model, held: Any, batch: int) -> Any:
        tensors = self._tensors(model.method)

        def forward(x: Tensor) -> Tensor:
            with torch.no_grad():
                run = model.method.backbone.run(tensors, Normaliser(model.values, "source"), model.method.affine(model.parameters))
                return model.method.forward(run, x, tensors, model.parameters).logits

        return predictions(forward, self.data, held, batch)
