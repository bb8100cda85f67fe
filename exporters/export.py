"""From a torch module to a bundle: the whole way on the workstation."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from edgeadapt.bundle import InputSpec, Manifest, Task
from edgeadapt.devices import boards
from edgeadapt.errors import ExportError, UsageError
from edgeadapt.exporters.capture import Captured, capture
from edgeadapt.exporters.compile import Compiled, Lowered, PlacedWeights, lowered, scheduled
from edgeadapt.exporters.data import Samples, load_samples, spec_for
from edgeadapt.exporters.describe import describe
from edgeadapt.exporters.drafts import Drafts
from edgeadapt.exporters.methods import METHODS, Method, Setup
from edgeadapt.exporters.micro import Sums, sums_of
from edgeadapt.exporters.options import Options, batch_defaults
from edgeadapt.exporters.pieces import Pieces, cut_steps
from edgeadapt.exporters.planner import PARTS, Place, Plan, plan
from edgeadapt.exporters.programs import Model, Program, build, held, last_parts, source_model
from edgeadapt.exporters.quantise.choose import Chosen, Numbers, Quantising, stand_in
from edgeadapt.exporters.quantise.rounding import Quantisation
from edgeadapt.exporters.schedules import Schedules
from edgeadapt.exporters.selfcheck import Difference, check
from edgeadapt.exporters.table import table
from edgeadapt.exporters.training import Training
from edgeadapt.exporters.writing import write
from edgeadapt.memory.rules import MOST_THREADS
from edgeadapt.memory.simulation import BoardLike
from edgeadapt.progress import Progress, quiet
from edgeadapt.units import format_shape, parse_bytes

SHIFTED = 1000.0
"""Where a channel's mean² over its variance is above this on source data, the variance is computed around the source mean."""


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
            so that adapting fits, before anything is trained; see `edgeadapt.exporters.planner`.
        board: where that is: a key or profile as for `edgeadapt.devices.boards.load`, or a board; this machine by default.
        board_threads: threads of one operator that it will be served with there.
        choices: fields of `Options`: method, parts, cuts, kernel, width, train, batches, statistics, optimiser, rate, exact, epochs, warmup_rate,
            warmup_batch, max_drop, allow_drop, holdout, seed, threads, task, micro, quantize, gradient, saved, updates. One that the method has no
            use for is refused.

    Returns:
        what was exported; `print(report.table())` shows it.

    Raises:
        ExportError: the model cannot be traced, cut or differentiated; the method needs data; the warm-up costs too much accuracy; the self-check
            fails; the bundle cannot be written, or not be opened afterwards.
        UsageError, InputError: a choice or the data is wrong.
        BudgetError: nothing fits the budget, and nothing was trained; or, rarely, the bundle did not come out as planned.
    """
    if (board is not None or board_threads != 1) and budget is None:
        raise UsageError("a board is where a budget holds, and there is none", "give a budget too, or leave the board out")
    place = None if budget is None else _place(board, budget, board_threads)
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
    place = _place(board, budget, board_threads)
    job = _Export(model, spec_for(shape, None, None, False), None, Options.of(choices, planned=True), progress or quiet, _named(choices))
    return job.list_candidates(place)


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
        self.schedules, self.drafts = Schedules(), Drafts(self, given)
        self.chosen: Chosen | None = None
        self.numbers: Numbers | None = None
        self._stands: dict[tuple[str, ...], Quantisation] = {}
        if options.threads:
            torch.set_num_threads(options.threads)

    def capture(self, batch: int) -> Captured:
        """The model traced at a batch size."""
        if batch not in self.captures:
            self.captures[batch] = capture(self.model, self.shape, batch)
        return self.captures[batch]

    def run(
        self,
        output: str | os.PathLike[str] | None,
        names: Sequence[str] | None,
        model_name: str,
        place: Place | None = None,
    ) -> ExportReport:
        """All stages in order; `place` is what to plan for, with a budget."""
        self.task = self._task(names)
        method, planned = self.method(self.options), None
        if self.data is None and (method.warms_up or method.calibrates):
            raise ExportError(
                f"{method.name} is {'warmed up' if method.warms_up else 'calibrated'} on source data, and none was given",
                "give training samples with --data, or choose --method norm or tent",
            )
        self._check_rate(method)
        self._check_micro(method)
        quantising = self._quantising(method)
        if place is not None:
            planned = plan(self.drafts, place, self.drafts.wishes(method), self.progress)
            self.options = self.drafts.options(planned.check())
            method = self.method(self.options)
            self.progress("plan", 1, 1, planned.line())
        options, adapted = self.options, sorted(set(self.options.batches))
        trained, warmup, rounding = self.start(method), None, None
        if self.data is not None:
            trained, warmup, rounding = Training(trained, self.data, options, self.capture, self.progress).run()
        trained = self.last_parts(trained, options)
        if quantising is not None and self.chosen is not None:
            trained, self.numbers = quantising.finish(trained, self.chosen)
        compiled, weights = self.compile(trained, adapted, self.schedules, self.progress)
        self.progress("self-check", 0, len(compiled))
        differences = check(compiled)
        self.progress("self-check", len(compiled), len(compiled))
        pieces = self.cut(trained, compiled, weights, self.schedules, self.progress)
        compiled, differences = compiled + pieces.compiled, differences + pieces.differences
        if place is not None:
            self.drafts.keep(trained, compiled, weights, place, pieces.left_out)
        name = model_name or type(self.model).__name__
        codes = None if self.numbers is None else self.numbers.report
        manifest = describe(trained, compiled, options, name, self.task, self.spec, warmup, differences, pieces.left_out, rounding, codes)
        return dataclasses.replace(self._write(output, manifest, trained, compiled, weights, differences), plan=planned)

    def _quantising(self, method: Method) -> Quantising | None:
        """What puts the frozen model into 8 bits, with the layers chosen; None where it stays in float32."""
        if self.options.quantize == "none":
            return None
        if self.data is None:
            raise ExportError("the ranges of 8 bits are measured on source data, and none was given", "give training samples with --data")
        found = Quantising(self.data, self.options, self.capture, self.progress)
        self.chosen = found.choose(method, self._mode(method))
        return found

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
        self.task = self._task(None)
        method = self.method(self.options)
        self._check_micro(method)
        return plan(self.drafts, place, self.drafts.wishes(method), self.progress, listing=True)

    def _task(self, names: Sequence[str] | None) -> Task:
        """What the model's logits are, checked against the options, the names and the data."""
        options, logits = self.options, self.capture(max(self.options.batches)).result.meta["val"]
        kind = options.task or ("classification" if logits.dim() == 2 else "segmentation")
        if (kind == "classification") != (logits.dim() == 2):
            raise ExportError(
                f"the model returns {tuple(logits.shape)}, which are no logits for {kind}", "choose the task that fits, or change the model's head"
            )
        if logits.dim() > 4:
            raise ExportError(f"the model returns {tuple(logits.shape)}, and logits have four sizes at most", "flatten the last ones into one")
        task = Task(kind, int(logits.shape[1]), tuple(names) if names else None)
        if task.names is not None and len(task.names) != task.classes:
            raise UsageError(
                f"there are {len(task.names)} class names, and the model has {task.classes} classes", "give one for each output, in order"
            )
        if self.data is not None:
            self.data.check(tuple(int(size) for size in logits.shape[1:]))
        return task

    def method(self, options: Options) -> Method:
        """The method over the model at the largest batch."""
        setup = Setup(self.task.classes, options.parts or PARTS, options.cuts, options.kernel, options.width, options.seed, options.train)
        method = METHODS[options.method](self.capture(max(options.batches)), setup)
        if options.train is not None and options.train > method.parts:
            raise UsageError(f"train = {options.train}, and the model has {method.parts} parts", f"give at most {method.parts}, or leave it out")
        return method

    @staticmethod
    def last_parts(model: Model, options: Options) -> Model:
        """Fix what is not to be trained on the device; parameters are held as the options say."""
        model = held(model, options.tier, options.seed)
        if options.train is None:
            return model
        left = last_parts(model, options.train)
        if not left.parameters:
            parts, name = model.method.parts, model.method.name
            raise UsageError(f"the last {options.train} of {parts} parts have nothing that {name} trains", "train more of them")
        return left

    def _mode(self, method: Method) -> str:
        """What normalisation statistics do."""
        if not {**method.backbone.source_statistics(), **method.own_statistics()}:
            return "none"
        return self.options.statistics or method.statistics

    def _check_micro(self, method: Method) -> None:
        """See that micro-batches that were asked for can be."""
        if isinstance(self.options.micro, tuple) and self._mode(method) == "live":
            raise UsageError(
                "statistics that follow the stream need all frames of a step at once, so it has no micro-batches",
                "leave micro out, or keep the statistics as trained: --statistics source",
            )

    def cuts(self, method: Method) -> bool:
        """Whether steps may be taken in pieces: what was asked for, and where statistics do not follow the stream."""
        return method.trains and self.options.micro != "none" and self._mode(method) != "live"

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

    def _check_rate(self, method: Method) -> None:
        """See that the given learning rate is one that the device allows."""
        allowed = Model(method, {}, {}, "none", self.options.optimiser or method.optimiser).hyper().get("rate")
        if self.options.rate is not None and allowed is not None and not allowed.low <= self.options.rate <= allowed.high:
            raise UsageError(f"rate = {self.options.rate:g} is out of range", f"give a number from {allowed.low:g} to {allowed.high:g}")

    def start(self, method: Method) -> Model:
        """The method before anything is trained."""
        options = self.options
        backbone = method.backbone
        source = backbone.source_statistics()
        values, mode = {**source, **method.own_statistics()}, self._mode(method)
        shifted = frozenset(
            name.removesuffix(".mean")
            for name, mean in source.items()
            if name.endswith(".mean") and float((mean**2 / (source[name.removesuffix(".mean") + ".variance"] + 1e-5)).max()) > SHIFTED
        )
        small = options.saves_codes
        return Model(method, method.parameters(), values, mode, options.optimiser or method.optimiser, options.exact, shifted, small=small)

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
            bound = self.bound(trained, batch, role == "source")
            x, target = self.example(batch, bound.method)
            values = method.backbone.source_statistics() if self.numbers is None else self.numbers.values
            model = source_model(bound, values) if role == "source" else bound
            program = build(model, role, batch, x, target)
            self._defaults(program)
            if (role, batch) not in known:
                known[role, batch] = lowered(program)
            compiled += scheduled(program, known[role, batch].copy(), weights, schedules)
        progress("compile", len(plans), len(plans))
        return compiled, weights

    def _defaults(self, program: Program) -> None:
        model = program.model
        for name, value in batch_defaults(model.method, model.optimiser, self.options.rate, program.hyper, program.batch).items():
            program.example[f"hyper.{name}"] = torch.tensor(value)

    def example(self, batch: int, method: Method) -> tuple[Tensor, Tensor]:
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
        target, written = write(output, manifest, trained, compiled, weights)
        return ExportReport(target, written.to_json(), tuple(differences), target.stat().st_size)
