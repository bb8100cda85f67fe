"""From a torch module to a bundle: the whole way on the workstation."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from edgeadapt.bundle import InputSpec, Manifest, Task, write_bundle
from edgeadapt.errors import ExportError, UsageError
from edgeadapt.exporters.backbone import Normaliser
from edgeadapt.exporters.capture import Captured, capture
from edgeadapt.exporters.compile import Compiled, PlacedWeights, compile_program
from edgeadapt.exporters.data import Samples
from edgeadapt.exporters.describe import describe
from edgeadapt.exporters.methods import METHODS, Method, Setup
from edgeadapt.exporters.options import Options, batch_defaults
from edgeadapt.exporters.programs import Model, Program, build, source_model
from edgeadapt.exporters.selfcheck import Difference, check
from edgeadapt.exporters.table import table
from edgeadapt.exporters.warmup import estimate_statistics, predictions, warm_up
from edgeadapt.progress import Progress, quiet

SHIFTED = 1000.0
"""Where a channel's mean² over its variance is above this on source data, the variance is computed around the source mean."""


@dataclass(frozen=True)
class ExportReport:
    """What was exported: the bundle's path (None if none was written), its manifest as plain JSON values, and the self-check."""

    path: Path | None
    manifest: dict[str, Any]
    differences: tuple[Difference, ...]
    size: int

    def table(self) -> str:
        """What was cut where, parameters, bytes and the self-check, as text."""
        return table(self.manifest, self.differences, self.size)


def export(
    model: nn.Module,
    output: str | os.PathLike[str] | None,
    *,
    shape: Sequence[int],
    data: Samples | None = None,
    names: Sequence[str] | None = None,
    model_name: str = "",
    progress: Progress | None = None,
    **choices: Any,
) -> ExportReport:
    """Compile `model` into a bundle.

    Args:
        model: the trained module, float32; put into eval mode.
        output: the bundle's path; None compiles and checks without writing.
        shape: one input without the batch, channels first.
        data: source samples for the warm-up, the calibration and the self-check; optional for methods that have neither.
        names: class names.
        model_name: what the manifest calls the model.
        progress: called with (stage, done, total, note).
        choices: fields of `Options`: method, parts, cuts, kernel, width, batches, statistics, optimiser, rate, exact, epochs, warmup_rate,
            warmup_batch, max_drop, allow_drop, holdout, seed, threads, task.

    Raises:
        ExportError: the model cannot be traced, cut or differentiated; the warm-up costs too much accuracy; the self-check fails.
        UsageError, InputError: a choice or the data is wrong.
    """
    unknown = set(choices) - {field.name for field in dataclasses.fields(Options)}
    if unknown:
        raise UsageError(
            f"export has no option {sorted(unknown)[0]!r}", f"the options are {', '.join(field.name for field in dataclasses.fields(Options))}"
        )
    choices = {key: tuple(value) if isinstance(value, list) else value for key, value in choices.items()}
    return _Export(model, tuple(shape), data, Options(**choices).checked(), progress or quiet).run(output, names, model_name)


class _Export:
    """One export in progress."""

    def __init__(self, model: nn.Module, shape: tuple[int, ...], data: Samples | None, options: Options, progress: Progress) -> None:
        self.model, self.shape, self.data, self.options, self.progress = model.eval(), shape, data, options, progress
        self.captures: dict[int, Captured] = {}
        if options.threads:
            torch.set_num_threads(options.threads)

    def capture(self, batch: int) -> Captured:
        """The model traced at a batch size."""
        if batch not in self.captures:
            self.captures[batch] = capture(self.model, self.shape, batch)
        return self.captures[batch]

    def run(self, output: str | os.PathLike[str] | None, names: Sequence[str] | None, model_name: str) -> ExportReport:
        """All stages in order."""
        options = self.options
        adapted = sorted(set(options.batches))
        captured = self.capture(adapted[-1])
        logits = captured.result.meta["val"]
        kind = options.task or ("classification" if logits.dim() == 2 else "segmentation")
        if (kind == "classification") != (logits.dim() == 2):
            raise ExportError(
                f"the model returns {tuple(logits.shape)}, which are no logits for {kind}", "choose the task that fits, or change the model's head"
            )
        task = Task(kind, int(logits.shape[1]), tuple(names) if names else None)
        if self.data is not None:
            self.data.check(tuple(int(size) for size in logits.shape[1:]))
        method = METHODS[options.method](captured, Setup(task.classes, options.parts, options.cuts, options.kernel, options.width, options.seed))
        if method.warms_up and self.data is None:
            raise ExportError(
                f"{method.name} is warmed up on source data, and none was given", "give training samples with --data, or choose --method norm or tent"
            )
        trained, warmup = self._train(method)
        compiled, weights = self._compile(trained, adapted)
        self.progress("self-check", 0, len(compiled))
        differences = check(compiled)
        self.progress("self-check", len(compiled), len(compiled))
        name = model_name or type(self.model).__name__
        spec = self.data.spec if self.data is not None else InputSpec(self.shape)
        manifest = describe(trained, compiled, options, name, task, spec, warmup, differences)
        return self._write(output, manifest, trained, compiled, weights, differences)

    def _train(self, method: Method) -> tuple[Model, dict[str, Any] | None]:
        """Calibrate and, where the method asks for it, warm up; returns the model to compile and what the warm-up reports."""
        options = self.options
        optimiser = options.optimiser or method.optimiser
        backbone = method.backbone
        source = backbone.source_statistics()
        mode = options.statistics or method.statistics
        values = {**source, **method.own_statistics()}
        if not values:
            mode = "none"
        shifted = frozenset(
            name.removesuffix(".mean")
            for name, mean in source.items()
            if name.endswith(".mean") and float((mean**2 / (source[name.removesuffix(".mean") + ".variance"] + 1e-5)).max()) > SHIFTED
        )
        parameters = method.parameters()
        if self.data is None:
            return Model(method, parameters, values, mode, optimiser, options.exact, shifted), None
        kept, held = self.data.split(options.holdout, options.seed)
        batch = min(options.warmup_batch, len(kept))
        method = method.at(self.capture(batch))
        calibration = [
            torch.from_numpy(self.data.tensor(kept[start : start + batch])) for start in range(0, min(len(kept) // batch, 8) * batch, batch)
        ]
        method.calibrate(calibration, self._tensors(method), values)
        frozen = source_model(Model(method, {}, {}, "source", optimiser), source)
        truth = self.data.y[held] if self.data.y is not None else self._predictions(frozen, held, batch)
        before = self._agreement(frozen, held, truth, batch)
        self._not_by_chance(before, len(held), int(method.setup.classes))
        trained = Model(method, parameters, values, mode, optimiser, options.exact, shifted)
        return self._warm_up(trained, kept, held, truth, before) if method.warms_up else (trained, None)

    def _not_by_chance(self, before: float, count: int, classes: int) -> None:
        """Refuse a model that guesses on its own data: then the inputs are not what it was trained on."""
        assert self.data is not None
        if self.data.y is None or self.options.allow_drop or classes < 2 or count < 50:
            return
        chance = 1 / classes
        if before < chance + 3 * (chance * (1 - chance) / count) ** 0.5:
            raise ExportError(
                f"the model, as it is, is right on {100 * before:.1f} % of {count} held-out samples, which is chance for {classes} classes",
                "give the inputs as in training (--mean, --std, --resize, the order of the classes) and the trained weights (--weights); "
                "or accept it with --allow-drop",
            )

    def _warm_up(self, start: Model, kept: Any, held: Any, truth: Any, before: float) -> tuple[Model, dict[str, Any]]:
        """Train the method's parameters on source data, re-estimate all statistics, and hold accuracy against the frozen model's."""
        assert self.data is not None
        options, method, tensors = self.options, start.method, self._tensors(start.method)
        batch = method.backbone.captured.batch
        chosen: dict[str, Any] = {"epochs": options.epochs, "rate": options.warmup_rate, "batch": batch}
        parameters = warm_up(method, start.parameters, tensors, self.data, kept, **chosen, seed=options.seed, progress=self.progress)
        values = estimate_statistics(method, parameters, tensors, self.data, kept, batch=batch, progress=self.progress)
        trained = dataclasses.replace(start, parameters=parameters, values=values)
        after = self._agreement(dataclasses.replace(trained, statistics="source"), held, truth, batch)
        if not options.allow_drop and before - after > options.max_drop / 100:
            raise ExportError(
                f"the warm-up costs {100 * (before - after):.1f} points of clean accuracy ({100 * before:.1f} % before, {100 * after:.1f} % after, "
                f"on {len(held)} held-out samples), more than {options.max_drop:g}",
                "warm up longer (--epochs), on more data, or at another rate (--warmup-rate); or accept it with --allow-drop",
            )
        found = {"samples": len(kept), "held_out": len(held), "clean_accuracy_before": before, "clean_accuracy_after": after}
        return trained, {**chosen, **found, "labelled": self.data.y is not None}

    @staticmethod
    def _tensors(method: Method) -> dict[str, Tensor]:
        return {**method.backbone.tensors, **method.frozen()}

    def _agreement(self, model: Model, held: Any, truth: Any, batch: int) -> float:
        """Share of predictions that equal `truth`, with fixed statistics; the truth is the labels, or the frozen model's own predictions."""
        return float((self._predictions(model, held, batch) == truth).mean())

    def _predictions(self, model: Model, held: Any, batch: int) -> Any:
        assert self.data is not None
        tensors = self._tensors(model.method)

        def forward(x: Tensor) -> Tensor:
            with torch.no_grad():
                run = model.method.backbone.run(tensors, Normaliser(model.values, "source"), model.method.affine(model.parameters))
                return model.method.forward(run, x, tensors, model.parameters).logits

        return predictions(forward, self.data, held, batch)

    def _compile(self, trained: Model, adapted: list[int]) -> tuple[list[Compiled], PlacedWeights]:
        """Every program of the bundle: source and predict at each batch, adapt and learn where the method trains."""
        method, weights, compiled = trained.method, PlacedWeights(), []
        plans = [
            (batch, role)
            for batch in sorted({1, *adapted})
            for role in ("source", "predict", "adapt", "learn")
            if role in ("source", "predict") or (method.trains and batch in adapted)
        ]
        for done, (batch, role) in enumerate(plans):
            self.progress("compile", done, len(plans), f"{role} at batch {batch}")
            bound = dataclasses.replace(trained, method=method.at(self.capture(batch)))
            x, target = self._example(batch, bound.method)
            model = source_model(bound, method.backbone.source_statistics()) if role == "source" else bound
            program = build(model, role, batch, x, target)
            self._defaults(program)
            compiled.append(compile_program(program, weights))
        self.progress("compile", len(plans), len(plans))
        return compiled, weights

    def _defaults(self, program: Program) -> None:
        model = program.model
        for name, value in batch_defaults(model.method, model.optimiser, self.options.rate, program.hyper, program.batch).items():
            program.example[f"hyper.{name}"] = torch.tensor(value)

    def _example(self, batch: int, method: Method) -> tuple[Tensor, Tensor]:
        logits = method.backbone.captured.result.meta["val"]
        shape = (batch, *logits.shape[2:])
        if self.data is None:
            random = torch.Generator().manual_seed(self.options.seed)
            return torch.randn((batch, *self.shape), generator=random), torch.randint(int(logits.shape[1]), shape, generator=random)
        picked = np.random.default_rng(self.options.seed).permutation(len(self.data))
        indices = np.resize(picked, batch)
        x = torch.from_numpy(np.ascontiguousarray(self.data.tensor(indices)))
        target = torch.zeros(shape, dtype=torch.int64) if self.data.y is None else torch.from_numpy(self.data.y[indices].astype(np.int64))
        return x, target

    def _write(
        self,
        output: str | os.PathLike[str] | None,
        manifest: Manifest,
        trained: Model,
        compiled: list[Compiled],
        weights: PlacedWeights,
        differences: list[Difference],
    ) -> ExportReport:
        if output is None:
            return ExportReport(None, manifest.to_json(), tuple(differences), 0)
        state = {name: value.detach().numpy().astype(np.float32) for name, (_, value) in trained.state().items()}
        graphs = {item.program.name: item.model.SerializeToString(deterministic=True) for item in compiled}
        try:
            written = write_bundle(output, manifest, weights.file, graphs, state)
        except OSError as error:
            raise ExportError(
                f"{output}: cannot be written: {error.strerror or error}", "choose a path in an existing, writable folder with room"
            ) from error
        return ExportReport(Path(output), written.to_json(), tuple(differences), Path(output).stat().st_size)
