"""From a torch module to a bundle: the whole way on the workstation."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edgeadapt.bundle import InputSpec, Manifest
from edgeadapt.bundle.choice import Choice
from edgeadapt.devices import boards
from edgeadapt.errors import UsageError
from edgeadapt.exporters.beginning import left_to_train, mode_of, started
from edgeadapt.exporters.capture import Captured, capture
from edgeadapt.exporters.checks import check_auto, check_data, check_micro, check_rate, task_of
from edgeadapt.exporters.compile import Compiled, Lowered, PlacedWeights, lowered, scheduled
from edgeadapt.exporters.data import Samples, example_of, load_samples, spec_for
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
from edgeadapt.exporters.quantise.rounding import Quantisation
from edgeadapt.exporters.schedules import Schedules
from edgeadapt.exporters.selfcheck import Difference, check
from edgeadapt.exporters.table import table
from edgeadapt.exporters.training import Training, Warmed
from edgeadapt.exporters.writing import write
from edgeadapt.memory.rules import MOST_THREADS
from edgeadapt.memory.simulation import BoardLike
from edgeadapt.progress import Progress, quiet
from edgeadapt.units import format_shape, parse_bytes


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


def export(
    model: nn.Module,
    output: str | os.PathLike[str] | None,
    *,
    shape: Sequence[int],
    data: Any = None,
    mean: Sequence[float] | float | None = None,
    std: Sequence[float] | float | None = None,
    resize: bool = False,
    names: Sequence[str] | None = None,
    model_name: str = "",
    progress: Progress | None = None,
    budget: str | int | None = None,
    board: str | BoardLike | None = None,
    board_threads: int = 1,
    **choices: Any,
) -> ExportReport:
    """Compile `model` into a bundle.

        export(model, "net.edgeadapt", shape=(3, 32, 32), data="train.npz", mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), batches=(4, 16))
        export(model, "net.edgeadapt", shape=(6, 128), data=(x, y), method="side")

    Args:
        model: the trained module, float32; put into eval mode.
        output: the bundle's path; None compiles and checks without writing.
        shape: one input without the batch, channels first.
        data: source samples for the warm-up, the calibration and the self-check; optional for methods that have neither. The path of an .npz archive
            with x and y, or of a folder with a folder of images for each class; the arrays (x, y), y None without labels; a map-style torch Dataset;
            or `Samples`. x is uint8 (N, H, W, C), or float32 (N, *shape) as the model takes it; y int64 (N,), or (N, H, W) for segmentation.
        mean, std: of pixels in 0..1, one number a channel or one for all: what uint8 images are scaled by, here and on the device. `Samples` have
            their own.
        resize: whether uint8 images of another size are resized to the input, here and on the device.
        names: class names in the order of the outputs; without, those that the data has.
        model_name: what the manifest calls the model.
        progress: called with (stage, done, total, note).
        budget: the most bytes that the process on the device may hold, such as "96MiB". What of parts, train and batches was not given is then chosen
            so that adapting fits, before anything is trained; see `edgeadapt.exporters.planner`. With quantize="auto" also what numbers are held in.
        board: where that is: a key or profile as for `edgeadapt.devices.boards.load`, or a board; this machine by default.
        board_threads: threads of one operator that it will be served with there.
        choices: fields of `Options`: method, parts, cuts, kernel, width, train, batches, statistics, optimiser, rate, exact, epochs, warmup_rate,
            warmup_batch, max_drop, allow_drop, holdout, seed, threads, task, micro, quantize, gradient, saved, updates, settings (the method's own
            choices, by name). One that the method has no use for is refused.

    Returns:
        what was exported; `print(report.table())` shows it.

    Raises:
        ExportError: the model cannot be traced, cut or differentiated; the method needs data; the warm-up costs too much accuracy; the self-check
            fails; the bundle cannot be written, or not be opened afterwards.
        UsageError, InputError: a choice or the data is wrong, or quantize="auto" comes without a budget or data.
        BudgetError: nothing fits the budget, and nothing was trained; or, rarely, the bundle did not come out as planned.
    """
    if (board is not None or board_threads != 1) and budget is None:
        raise UsageError("a board is where a budget holds, and there is none", "give a budget too, or leave the board out")
    place = None if budget is None else _place(board, budget, board_threads)
    if choices.get("quantize") == AUTO:
        check_auto(budget is not None, data is not None)
    options, spec, progress = Options.of(choices, planned=budget is not None), spec_for(shape, mean, std, resize), progress or quiet
    samples: Samples | None = None
    if isinstance(data, Samples):
        if mean is not None or std is not None or resize:
            raise UsageError("these samples say themselves how images are scaled", "leave mean, std and resize out, or give the arrays")
        if data.spec.shape != spec.shape:
            raise UsageError(f"the samples are {format_shape(data.spec.shape)}, and shape says {format_shape(spec.shape)}", "give one and the same")
        samples, spec = data, data.spec
    elif data is not None:
        samples = load_samples(data, spec, names=names, seed=options.seed, progress=progress)
    job = _Export(model, spec, samples, options, progress, _named(choices))
    return job.run(output, names or (samples.names if samples is not None else None), model_name, place)


def plan_export(
    model: nn.Module,
    *,
    shape: Sequence[int],
    budget: str | int | None = None,
    board: str | BoardLike | None = None,
    board_threads: int = 1,
    progress: Progress | None = None,
    **choices: Any,
) -> Plan:
    """What an export could be and what it takes on a board, without data, warm-up or a bundle; with a budget also what it would be.

    Args:
        model, shape, budget, board, board_threads, progress, choices: as for `export`. Without a budget nothing is chosen.

    Raises:
        ExportError: the model cannot be traced, cut or differentiated.
        UsageError: a choice is wrong. That nothing fits is for `Plan.check` to raise.
    """
    if choices.get("quantize") == AUTO:
        raise UsageError("a plan is of one form of numbers, and quantize = 'auto' is of several", "list them with plan_numbers, or name one")
    place = _place(board, budget, board_threads)
    job = _Export(model, spec_for(shape, None, None, False), None, Options.of(choices, planned=True), progress or quiet, _named(choices))
    return job.list_candidates(place)


def plan_numbers(
    model: nn.Module,
    *,
    shape: Sequence[int],
    budget: str | int | None,
    board: str | BoardLike | None = None,
    board_threads: int = 1,
    progress: Progress | None = None,
    **choices: Any,
) -> Choice:
    """What each form of numbers that quantize="auto" would try takes within a budget, without data: nothing is measured, and nothing chosen.

    All layers that could be in 8 bits are taken to be.

    Args:
        model, shape, budget, board, board_threads, progress, choices: as for `export`, quantize being "auto".

    Raises:
        ExportError, UsageError: as `plan_export`; nothing of the model can be in 8 bits, or there is no budget.
    """
    check_auto(budget is not None, True)
    place, options = _place(board, budget, board_threads), Options.of({**choices, "quantize": AUTO}, planned=True)
    job = _Export(model, spec_for(shape, None, None, False), None, options, progress or quiet, _named(choices))
    return Auto(job.begun(None), place, job.progress).planned()


def _place(board: str | BoardLike | None, budget: str | int | None, threads: int) -> Place:
    if type(threads) is not int or not 1 <= threads <= MOST_THREADS:
        raise UsageError(f"board_threads = {threads!r} is not a number of threads", f"give 1 to {MOST_THREADS}, at most the cores of the board")
    where = boards.load(board or boards.HERE) if board is None or isinstance(board, str) else board
    return Place(where, None if budget is None else parse_bytes(budget), threads)


def _named(choices: Mapping[str, Any]) -> frozenset[str]:
    return frozenset(name for name, value in choices.items() if value is not None)


class _Export:
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
            return won.job.finish(output, name, won.ready, place, won.plan, won.choice)
        if self.options.quantize != "none":
            self.choose_layers()
        planned = None if place is None else self.plan(place)
        if planned is not None:
            planned.check()
        return self.finish(output, name, self.ready(self.warm()), place, planned)

    def like(self, options: Options) -> _Export:
        """An export of the same with other numbers; what these make no difference to is shared."""
        other = _Export(self.model, self.spec, self.data, options, self.progress, self.given)
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

    def stepping(self, ready: Ready) -> Compiled:
        """The graph that adapts at the largest batch, or that predicts, where nothing is trained. It is kept for `finish`."""
        key = ("adapt" if ready.model.method.trains else "predict", max(self.options.batches))
        program = self._program(ready.model, *key)
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

    def begun(self, names: Sequence[str] | None) -> _Export:
        """It, once what was given is seen to fit the model and the method."""
        self.task = task_of(self.options, self.capture(max(self.options.batches)).result.meta["val"], names, self.data)
        check_micro(self.options, self.method(self.options))
        return self

    def method(self, options: Options) -> Method:
        """The method over the model at the largest batch."""
        known = METHODS[options.method].settings
        own = {name: known[name].read(name, value) for name, value in options.settings.items()}
        setup = Setup(self.task.classes, options.parts or PARTS, options.cuts, options.kernel, options.width, options.seed, options.train, own)
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
        for name, value in batch_defaults(model.method, model.optimiser, self.options.rate, program.hyper, program.batch).items():
            program.example[f"hyper.{name}"] = torch.tensor(value)
        return program

    def example(self, batch: int, method: Method) -> tuple[Tensor, Tensor]:
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
