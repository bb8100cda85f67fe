"""One export in progress: its stages in order, each from what those before it made."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edgeadapt.bundle import InputSpec, Manifest
from edgeadapt.bundle.choice import Choice
from edgeadapt.errors import UsageError
from edgeadapt.exporters.beginning import fitting, left_to_train, mode_of, started
from edgeadapt.exporters.capture import Captured, capture
from edgeadapt.exporters.checks import check_data, check_micro, check_rate, check_search, task_of
from edgeadapt.exporters.compile import Compiled, Lowered, PlacedWeights, lowered, scheduled
from edgeadapt.exporters.data import Samples, example_of
from edgeadapt.exporters.describe import describe
from edgeadapt.exporters.drafts import Drafts
from edgeadapt.exporters.methods import METHODS, Method, Setup
from edgeadapt.exporters.micro import Sums, sums_of
from edgeadapt.exporters.options import AUTO, Options, batch_defaults
from edgeadapt.exporters.pieces import Pieces, cut_steps
from edgeadapt.exporters.planner import PARTS, Candidate, Depth, Place, Plan, Wishes, plan
from edgeadapt.exporters.programs import Model, Program, build, source_model
from edgeadapt.exporters.quantise.auto import Auto, Ready
from edgeadapt.exporters.quantise.choose import ASSUMED, Chosen, Numbers, Quantising, places_of, stand_in
from edgeadapt.exporters.quantise.measure import Stream
from edgeadapt.exporters.quantise.rounding import Quantisation
from edgeadapt.exporters.schedules import Schedules
from edgeadapt.exporters.search import search
from edgeadapt.exporters.selfcheck import Difference, check
from edgeadapt.exporters.table import table
from edgeadapt.exporters.training import Training, Warmed
from edgeadapt.exporters.writing import write
from edgeadapt.progress import Progress


@dataclass(frozen=True)
class ExportReport:
    """What was exported: the bundle's path (None if none was written), its manifest as plain JSON values, the self-check, the plan."""

    path: Path | None
    manifest: dict[str, Any]
    differences: tuple[Difference, ...]
    size: int
    plan: Plan | None = None

    def table(self) -> str:
        """What was cut where, parameters, bytes, the self-check and what was planned, as text."""
        lines = [table(self.manifest, self.differences, self.size), *([self.plan.line()] if self.plan is not None else [])]
        return "\n".join(lines)


class Job:
    """One export in progress."""

    def __init__(
        self, model: nn.Module, spec: InputSpec, data: Samples | None, options: Options, progress: Progress, given: frozenset[str] = frozenset()
    ) -> None:
        self.model, self.shape, self.spec, self.data, self.options, self.progress = model.eval(), spec.shape, spec, data, options, progress
        self.captures: dict[int, Captured] = {}
        self.given, self.schedules, self.drafts = given, Schedules(), Drafts(self, given)
        self.quantising: Quantising | None = None
        self.chosen: Chosen | None = None
        self.numbers: Numbers | None = None
        self.lowered: Lowered = {}
        self._stands: dict[tuple[str, ...], Quantisation] = {}
        if options.threads:
            torch.set_num_threads(options.threads)

    def capture(self, batch: int) -> Captured:
        """The model traced at a batch size."""
        if batch not in self.captures:
            known = next(iter(self.captures.values()), None)
            self.captures[batch] = capture(self.model, self.shape, batch) if known is None else known.at(batch)
        return self.captures[batch]

    def run(
        self,
        output: str | os.PathLike[str] | None,
        names: Sequence[str] | None,
        model_name: str,
        place: Place | None = None,
    ) -> ExportReport:
        """All stages in order; `place` is what to plan for, with a budget."""
        method, name = self.begun(names).method(self.options), model_name or type(self.model).__name__
        check_rate(self.options, method)
        check_data(self.options, method, self.data)
        if self.options.quantize == AUTO and place is not None:
            won = Auto(self, place, self.progress).run()
            return won.job.finish(output, name, won.job.tuned(won.ready, won.warmed), place, won.plan, won.choice)
        if self.options.quantize != "none":
            self.choose_layers()
        planned = None if place is None else self.plan(place)
        if planned is not None:
            planned.check()
        warmed = self.warm()
        return self.finish(output, name, self.tuned(self.ready(warmed), warmed), place, planned)

    def like(self, options: Options) -> Job:
        """An export of the same with other numbers; what these make no difference to is shared."""
        other = Job(self.model, self.spec, self.data, options, self.progress, self.given)
        other.captures, other.schedules, other.drafts.hurried, other.task = self.captures, self.schedules, self.drafts.hurried, self.task
        if options.quantize != "none":
            other.chosen, other.quantising = self.chosen, None if self.quantising is None else self.quantising.like(options)
        return other

    def choose_layers(self) -> bool:
        """Which layers are in 8 bits, and whether any is; without data, as for a list, only that some could be.

        Raises:
            ExportError: none could be.
        """
        method = self.method(self.options)
        if self.data is None:
            places_of(method.backbone.captured)
            return True
        self.quantising = Quantising(self.data, self.options, self.capture, self.progress)
        self.chosen = self.quantising.choose(method, mode_of(self.options, method))
        return any(row.choice == "int8" for row in self.chosen.rows)

    def plan(self, place: Place, depth: Depth = "whole", settled: Candidate | None = None) -> Plan:
        """What of it fits; its options are then those of what was chosen. settled: what is to be, with nothing left to choose."""
        wishes = self.drafts.wishes(self.method(self.options))
        if settled is not None:
            wishes = Wishes(settled.parts, settled.trained, settled.batches, wishes.micro)
        planned = plan(self.drafts, place, wishes, self.progress, depth=depth)
        if planned.chosen is not None:
            self.options = self.drafts.options(planned.chosen)
            self.progress("plan", 1, 1, planned.line())
        return planned

    def warm(self) -> Warmed | None:
        """All of its training that takes long; None without data."""
        return None if self.data is None else self._training(self.data).warm()

    def _training(self, data: Samples) -> Training:
        return Training(self.start(self.method(self.options)), data, self.options, self.capture, self.progress)

    def ready(self, warmed: Warmed | None) -> Ready:
        """The model to compile, in its numbers; `warmed` may come from an export that differs in these alone."""
        warmup = rounding = None
        if self.data is None or warmed is None:
            trained = self.start(self.method(self.options))
        else:
            trained, warmup, rounding = self._training(self.data).hold(warmed)
        trained = self.last_parts(trained, self.options)
        if self.quantising is not None and self.chosen is not None:
            trained, self.numbers = self.quantising.finish(trained, self.chosen)
        return Ready(trained, warmup, rounding)

    def tuned(self, ready: Ready, warmed: Warmed | None) -> Ready:
        """The model with defaults of its scalars that were searched for, where that was asked for, and samples are held out."""
        options, data = self.options, self.data
        if not options.search or data is None or warmed is None or not len(warmed.held):
            return ready
        stream = Stream.of(data, warmed.held, warmed.truth, options.seed)
        told = functools.partial(self.progress, "scalars")
        fixed = () if options.rate is None else ("rate",)
        sizes = sorted((batch for batch in set(options.batches) if batch > 1 or batch == max(options.batches)), reverse=True)
        graphs = [functools.partial(self.stepping, ready, batch) for batch in sizes]
        found = search(graphs, stream, data.y is not None, options.threads, told, fixed)
        return dataclasses.replace(ready, model=dataclasses.replace(ready.model, searched=found))

    def stepping(self, ready: Ready, batch: int | None = None) -> Compiled:
        """The graph that adapts at a batch, or that predicts, where nothing is trained. It is kept for `finish`. batch: None: the largest."""
        key = ("adapt" if ready.model.method.trains else "predict", batch or max(self.options.batches))
        program = self._program(ready.model, *key)
        if key not in self.lowered:
            self.lowered[key] = lowered(program)
        return scheduled(program, self.lowered[key].copy(), PlacedWeights(), self.schedules)[0]

    def finish(
        self,
        output: str | os.PathLike[str] | None,
        name: str,
        ready: Ready,
        place: Place | None = None,
        planned: Plan | None = None,
        choice: Choice | None = None,
    ) -> ExportReport:
        """Everything that follows once the model is as it will be."""
        trained = ready.model
        compiled, weights = self.compile(trained, sorted(set(self.options.batches)), self.schedules, self.progress, known=self.lowered)
        self.progress("self-check", 0, len(compiled))
        differences = check(compiled)
        self.progress("self-check", len(compiled), len(compiled))
        pieces = self.cut(trained, compiled, weights, self.schedules, self.progress)
        compiled, differences = compiled + pieces.compiled, differences + pieces.differences
        if place is not None:
            self.drafts.keep(trained, compiled, weights, place, pieces.left_out)
        codes = None if self.numbers is None else self.numbers.report
        told = (ready.warmup, differences, pieces.left_out, ready.rounding, codes, choice)
        manifest = describe(trained, compiled, self.options, name, self.task, self.spec, *told)
        return dataclasses.replace(self._write(output, manifest, trained, compiled, weights, differences), plan=planned)

    def bound(self, model: Model, batch: int, frozen: bool = False) -> Model:
        """The model traced at a batch size, its frozen part in the numbers that it is to have. frozen: as the frozen model by itself has them."""
        captured = self.capture(batch)
        if self.options.quantize != "none":
            floating = model.method.exact if self.chosen is None else self.chosen.floating
            cuts = () if frozen else model.method.entries
            ready = None if self.numbers is None else self.numbers.frozen if frozen else self.numbers.model
            captured = captured.quantised(ready or self._stand_in(captured, cuts, floating))
        return dataclasses.replace(model, method=model.method.at(captured))

    def _stand_in(self, captured: Captured, cuts: tuple[str, ...], floating: frozenset[str]) -> Quantisation:
        if cuts not in self._stands:
            self._stands[cuts] = stand_in(captured, cuts, floating, self.options.gradient_in_codes)
        return self._stands[cuts]

    def list_candidates(self, place: Place) -> Plan:
        """The plan alone, with all that could be chosen."""
        method, codes = self.begun(None).method(self.options), self.options.quantize != "none"
        if codes:
            self.choose_layers()
        found = plan(self.drafts, place, self.drafts.wishes(method), self.progress, listing=True)
        return dataclasses.replace(found, note=ASSUMED if codes else "")

    def begun(self, names: Sequence[str] | None) -> Job:
        """It, once what was given is seen to fit the model and the method."""
        if "method" not in self.given:
            self.options = fitting(self.options, self.given, self.capture(max(self.options.batches)))
        self.task = task_of(self.options, self.capture(max(self.options.batches)).result.meta["val"], names, self.data)
        method = self.method(self.options)
        check_micro(self.options, method)
        if "search" in self.given:
            check_search(self.options, self.start(method), self.data)
        return self

    def method(self, options: Options) -> Method:
        """The method over the model at the largest batch."""
        known = METHODS[options.method].settings
        own = {name: known[name].read(name, value) for name, value in options.settings.items()}
        parts, shape = options.parts or PARTS, (options.cuts, options.kernel, options.width)
        setup = Setup(self.task.classes, parts, *shape, options.seed, options.train, own, options.exact)
        method = METHODS[options.method](self.capture(max(options.batches)), setup)
        if options.train is not None and options.train > method.parts:
            raise UsageError(f"train = {options.train}, and the model has {method.parts} parts", f"give at most {method.parts}, or leave it out")
        return method

    @staticmethod
    def last_parts(model: Model, options: Options) -> Model:
        """What of the model is trained on the device."""
        return left_to_train(options, model)

    def cuts(self, method: Method) -> bool:
        """Whether steps may be taken in pieces: what was asked for, where statistics do not follow the stream and a step is the sum of its frames."""
        return method.trains and method.summable and self.options.micro != "none" and mode_of(self.options, method) != "live"

    def cut(
        self,
        trained: Model,
        compiled: Sequence[Compiled],
        weights: PlacedWeights,
        schedules: Schedules,
        progress: Progress,
        known: Lowered | None = None,
        checked: bool = True,
    ) -> Pieces:
        """The graphs for steps in pieces, where there can be any; see `cut_steps`."""
        chosen = self.options.micro
        if not self.cuts(trained.method):
            return Pieces()

        def made(role: str, size: int) -> Sums:
            progress("micro-batches", 0, 0, f"{role} by {size}")
            bound = self.bound(trained, size)
            return sums_of(bound, role, size, *self.example(size, bound.method))

        return cut_steps(compiled, made, None if isinstance(chosen, str) else chosen, weights, schedules, known, checked)

    def start(self, method: Method) -> Model:
        """The method before anything is trained."""
        return started(self.options, method)

    def compile(
        self, trained: Model, adapted: Sequence[int], schedules: Schedules, progress: Progress, whole: bool = True, known: Lowered | None = None
    ) -> tuple[list[Compiled], PlacedWeights]:
        """Every program of the bundle: source and predict at each batch, adapt and learn where the method trains; or only what adapting needs.

        Graphs are taken from `known` where they are there, and kept in it.
        """
        known = {} if known is None else known
        method, weights, compiled = trained.method, PlacedWeights(), []
        plans = [
            (batch, role)
            for batch in sorted({1, *adapted})
            for role in ("source", "predict", "adapt", "learn")
            if role in ("source", "predict") or (method.trains and batch in adapted)
            if whole or role in ("predict", "adapt") or (role == "source" and batch == 1)
        ]
        for done, (batch, role) in enumerate(plans):
            progress("compile", done, len(plans), f"{role} at batch {batch}")
            program = self._program(trained, role, batch)
            if (role, batch) not in known:
                known[role, batch] = lowered(program)
            compiled += scheduled(program, known[role, batch].copy(), weights, schedules)
        progress("compile", len(plans), len(plans))
        return compiled, weights

    def _program(self, trained: Model, role: str, batch: int) -> Program:
        """A function of the bundle, with the scalars that it has at this batch."""
        bound = self.bound(trained, batch, role == "source")
        x, target = self.example(batch, bound.method)
        values = trained.method.backbone.source_statistics() if self.numbers is None else self.numbers.values
        program = build(source_model(bound, values) if role == "source" else bound, role, batch, x, target)
        model = program.model
        tuned = trained.tuned(role)
        for name, value in batch_defaults(model.method, model.optimiser, self.options.rate, program.hyper, program.batch, tuned).items():
            program.example[f"hyper.{name}"] = torch.tensor(value)
        return program

    def example(self, batch: int, method: Method) -> tuple[Tensor, Tensor]:
        """Inputs and targets of a batch: source samples, or random ones where there are none."""
        return example_of(self.data, self.shape, method.backbone.captured.result.meta["val"], batch, self.options.seed)

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
        target, written = write(output, manifest, trained, compiled, weights)
        return ExportReport(target, written.to_json(), tuple(differences), target.stat().st_size)
