"""Bundles of candidates, made before anything is trained: with what is known of the memory of the bundle that they would become."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from edgeadapt.bundle import Bundle, InputSpec, Task
from edgeadapt.errors import BudgetError, ExportError
from edgeadapt.exporters.capture import Captured
from edgeadapt.exporters.compile import Compiled, Lowered, PlacedWeights
from edgeadapt.exporters.describe import describe
from edgeadapt.exporters.methods import METHODS, Method
from edgeadapt.exporters.options import Options
from edgeadapt.exporters.pieces import Pieces
from edgeadapt.exporters.planner import MOST_PARTS, PARTS, Candidate, Depth, Place, Wishes
from edgeadapt.exporters.programs import Model
from edgeadapt.exporters.schedules import Schedules
from edgeadapt.exporters.writing import opened
from edgeadapt.memory import simulate
from edgeadapt.progress import Progress, quiet

HURRY = 0.1
"""Effort of the search for an order when candidates are compared: within some per cent of the whole search's."""


class Job(Protocol):
    """What is needed of an export in progress."""

    options: Options
    spec: InputSpec
    task: Task
    schedules: Schedules

    def capture(self, batch: int) -> Captured:
        """The model traced at a batch size."""
        ...

    def method(self, options: Options) -> Method:
        """The method over the model."""
        ...

    def start(self, method: Method) -> Model:
        """It before anything is trained."""
        ...

    def last_parts(self, model: Model, options: Options) -> Model:
        """It with the parameters fixed that are not trained on the device."""
        ...

    def compile(
        self, trained: Model, adapted: Sequence[int], schedules: Schedules, progress: Progress, whole: bool = True, known: Lowered | None = None
    ) -> tuple[list[Compiled], PlacedWeights]:
        """The graphs of the bundle; or only those that adapting needs."""
        ...

    def cuts(self, method: Method) -> bool:
        """Whether steps may be taken in pieces."""
        ...

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
        """The graphs for steps in pieces, where there can be any."""
        ...

    def example(self, batch: int, method: Method) -> tuple[Tensor, Tensor]:
        """Inputs and targets."""
        ...


class Drafts:
    """What the planner asks for; see `planner.Drafts`.

    Args:
        job: the export.
        given: names of the options that the user gave.
    """

    def __init__(self, job: Job, given: frozenset[str]) -> None:
        self.job, self.given = job, given
        self.hurried = Schedules(HURRY, variants=False)
        self._lowered: dict[tuple[int | None, int | None], Lowered] = {}

    def wishes(self, method: Method) -> Wishes:
        """What the user has said."""
        options = self.job.options
        parts = (method.parts or options.parts) if "parts" in self.given else None
        micro = options.micro if isinstance(options.micro, tuple) else ()
        return Wishes(parts, options.train, tuple(sorted(set(options.batches))) if "batches" in self.given else (), micro)

    def divisions(self) -> tuple[int, ...]:
        """Numbers of parts that can be chosen: EcoTTA's all differ in what they can learn; of TENT's, which only say what is trained, one will do."""
        options, chosen = self.job.options, METHODS[self.job.options.method].choices
        if "train" not in chosen:
            return ()
        free = "kernel" in chosen and not options.cuts
        try:
            parts = options.parts or (MOST_PARTS if free else PARTS)
            room = self.job.method(dataclasses.replace(options, parts=parts, train=options.train or 1)).parts
        except ExportError:
            if options.train is not None or METHODS[options.method].warms_up:
                raise
            return ()  # TENT of a model that cannot be cut: all of it is trained
        return tuple(range(room, 0, -1)) if free else (room,)

    def in_pieces(self) -> bool:
        """Whether steps may be taken in pieces."""
        return self.job.cuts(self.job.method(self.job.options))

    def options(self, candidate: Candidate) -> Options:
        """The options with a candidate's; where all parts are trained, nothing needs to be said of it."""
        given = self.job.options
        train = candidate.trained if candidate.trained != candidate.parts else given.train
        parts = given.parts if given.cuts or candidate.parts is None else candidate.parts
        return dataclasses.replace(given, parts=parts, train=train, batches=candidate.batches)

    @contextmanager
    def draft(self, candidate: Candidate, depth: Depth) -> Iterator[Bundle]:
        """The bundle that a candidate would become, in a temporary file."""
        options = self.options(candidate)
        model = self.job.last_parts(self._untrained(self.job.method(options)), options)
        schedules = self.hurried if depth == "hurried" else self.job.schedules
        known = self._lowered.setdefault((candidate.parts, candidate.trained), {})
        compiled, weights = self.job.compile(model, candidate.batches, schedules, quiet, depth == "whole", known)
        if depth != "hurried":
            compiled += self.job.cut(model, compiled, weights, schedules, quiet, known, depth == "whole").compiled
        manifest = describe(model, compiled, options, "draft", self.job.task, self.job.spec, None, [], {})
        with opened(manifest, model, compiled, weights) as bundle:
            yield bundle

    def keep(self, model: Model, compiled: Sequence[Compiled], weights: PlacedWeights, place: Place, left_out: Mapping[str, str]) -> None:
        """See that what was compiled after the warm-up fits as planned: the value of a weight may have changed a graph.

        Args:
            model, compiled, weights: what would be written.
            place: what it was planned for.
            left_out: graphs that were tried and are not there, and why.

        Raises:
            BudgetError: it does not.
        """
        manifest = describe(model, compiled, self.job.options, "draft", self.job.task, self.job.spec, None, [], {})
        with opened(manifest, model, compiled, weights) as bundle:
            for batch in self.job.options.batches:
                try:
                    simulate(bundle, place.board, None, batch, place.budget, place.threads).check()
                except BudgetError as error:
                    reasons = "; ".join(f"{name} was left out: {why}" for name, why in left_out.items())
                    told = f" ({reasons})" if reasons else ""
                    raise BudgetError(f"the bundle did not come out as planned{told}: {error.message}", error.hint) from None

    def _untrained(self, method: Method) -> Model:
        """The method with values as unlike one another as a warm-up or a calibration leaves them: equal tensors are stored once."""
        start, random = self.job.start(method), torch.Generator().manual_seed(self.job.options.seed)
        if method.calibrates:
            bound = method.at(self.job.capture(2))  # at every batch the same: graphs are shared by candidates of several
            x, _ = self.job.example(2, bound)
            bound.calibrate([x], {**bound.backbone.tensors, **bound.frozen()}, start.values)
        if not method.warms_up:
            return start

        def moved(table: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name: value + 0.1 * torch.rand(value.shape, generator=random) for name, value in table.items()}

        return dataclasses.replace(start, parameters=moved(start.parameters), values={**start.values, **moved(method.own_statistics())})
