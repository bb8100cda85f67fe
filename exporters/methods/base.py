"""What an adaptation method is: trainable tensors, a forward pass over the backbone, and what is minimised.

A method is written in plain torch and used three times: eagerly in the warm-up, traced into the device's graphs, and eagerly again as the
reference of the self-check. It keeps no state of its own between calls; parameters and statistics come in as dictionaries of tensors.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from operator import add
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from edgeadapt.errors import UsageError
from edgeadapt.exporters.backbone import Backbone, BackboneRun
from edgeadapt.exporters.capture import Captured
from edgeadapt.exporters.partition import Partition

Tensors = dict[str, Tensor]
MEMORY = "memory."
"""What the names of the method's memory begin with, among the tensors that a pass gets."""
START = "start."
"""What the names of frozen tensors begin with that are what parameters and moments start at."""


@dataclass(frozen=True)
class Hyper:
    """A scalar the device may change without a new export."""

    default: float
    low: float
    high: float
    help: str


@dataclass(frozen=True)
class Setting:
    """A choice that one method alone has, made at export.

    Attributes:
        default: its value, and with that its type: text, a whole number, or a number.
        help: what it does, in a line.
        allowed: the texts that it may be; of a number the least and the most.
    """

    default: str | int | float
    help: str
    allowed: tuple[Any, ...] = ()

    def read(self, name: str, given: object) -> str | int | float:
        """A given value, in the setting's type.

        Raises:
            UsageError: it is none that the setting may have.
        """
        kind: type = type(self.default)
        number = "a whole number" if kind is int else "a number"
        fix = f"choose one of {', '.join(self.allowed)}" if kind is str else f"give {number} from {self.allowed[0]} to {self.allowed[1]}"
        if isinstance(given, bool):
            raise UsageError(f"{name} = {given!r} is not possible", fix)
        try:
            value = kind(given) if not isinstance(given, float) or kind is not int or given.is_integer() else None
        except (TypeError, ValueError):
            value = None
        if value is None or (value not in self.allowed if kind is str else not self.allowed[0] <= value <= self.allowed[1]):
            raise UsageError(f"{name} = {given!r} is not possible", fix)
        result: str | int | float = value
        return result


@dataclass(frozen=True)
class Setup:
    """The user's choices that shape a method; `settings` are its own, by name; `exact`: gradients go through the batch's statistics."""

    classes: int
    parts: int = 4
    cuts: Sequence[str] = ()
    kernel: int = 0
    width: int = 64
    seed: int = 0
    train: int | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    exact: bool = False


@dataclass
class Outcome:
    """One forward pass: logits (N, C, …), which are the predictions, and whatever else the objective or the method's memory reads."""

    logits: Tensor
    terms: Tensors = field(default_factory=dict)


@dataclass(frozen=True)
class Term:
    """One of the terms whose sum a method minimises, over the predictions of one run.

    Several runs over equally many frames can make one step: their values add up, their counts add up, and the term is Σ value / max(Σ count, 1).
    That is the term of all their frames at once, up to the rounding of sums.

    Attributes:
        value: a scalar with gradient: the mean over all predictions, which counts as one; with a `count` the sum over those that are counted.
        over: what it is the mean of; terms over the same have the same count, and share what is kept between runs.
        count: a scalar that may depend on the data, without gradient. None: `value` is the mean over all predictions.
    """

    value: Tensor
    over: str = "all"
    count: Tensor | None = None

    @property
    def mean(self) -> Tensor:
        """The term, where the run is the whole step."""
        return self.value if self.count is None else self.value / self.count.clamp(min=1.0)


Terms = tuple[Term, ...]


def loss(terms: Terms) -> Tensor:
    """The objective of a step that is one run: the sum of its terms, a scalar."""
    return reduce(add, (term.mean for term in terms))


class Method(ABC):
    """An adaptation method over one captured model.

    Attributes:
        name, summary: how users know it.
        statistics: "live" or "source", the default behaviour of the normalisation layers.
        trains: whether it has parameters, and so an adapt and a learn step.
        warms_up: whether its parameters are trained on source data before the export.
        optimiser: "sgd" or "adam".
        rate: learning rate at a batch of 64; it scales with the batch.
        calibrates: whether it measures source data before the export, and so needs some; calibration_batches: at most so many batches of it.
        standardises: whether what it measures are ranges of the model's tensors, which 8 bits move, so that they are measured again.
        modes: the statistics it can be exported with.
        choices: which of the options parts, cuts, kernel, width and train shape it.
        first: the cut at which its first part ends; what lies before belongs to no part, or is counted to the first.
        enters: whether it puts tensors of its own in place of the model's at the cuts.
        in_codes: whether the frozen model may be computed in 8 bits.
        cut_to_train: whether parts serve only to say which of them are trained.
        settings: its own choices, by name.
        remembers: when its memory changes: "steps", by steps of adaptation alone; "passes", by every pass that predicts, those of steps too.
        restarts: whether parameters and moments may go back to where they started, as `start_again` says.
        checked: scalars at which its steps are first checked, where those by default could hide what a step does.
        skips: whether a step in which no prediction counts leaves parameters and moments as they are. Without, momentum goes on.
        reads: whether it only reads the model, so that a warm-up leaves the model's statistics as they were trained.
        saves: "float" or "int8", what a step keeps for its backward pass, where the user does not say.
        mix: the weight of a batch's statistics by default, at every batch size; None: it depends on the size.
        whole: whether its steps put parameters in place themselves (see `settled`): these are then held in float32.
        choosing: of its memory what is chosen and not computed, by name: rounding may turn a choice where two are as good.
        averages: what the names of averages of parameters begin with in its memory, before the parameters' own.
        anchored_rate: what `rate` is multiplied by in steps without labels where statistics are anchored, which leaves less for steps to do.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    statistics: ClassVar[str] = "live"
    trains: ClassVar[bool] = True
    warms_up: ClassVar[bool] = False
    optimiser: ClassVar[str] = "sgd"
    rate: float = 5e-4
    calibrates: ClassVar[bool] = False
    calibration_batches: ClassVar[int] = 8
    standardises: ClassVar[bool] = False
    modes: ClassVar[tuple[str, ...]] = ("live", "anchored", "source")
    choices: ClassVar[tuple[str, ...]] = ()
    first: ClassVar[int] = 1
    enters: ClassVar[bool] = False
    in_codes: ClassVar[bool] = True
    cut_to_train: ClassVar[bool] = False
    settings: ClassVar[Mapping[str, Setting]] = {}
    remembers: ClassVar[str] = "steps"
    restarts: ClassVar[bool] = False
    skips: ClassVar[bool] = False
    reads: ClassVar[bool] = False
    saves: ClassVar[str] = "float"
    checked: ClassVar[Mapping[str, float]] = {}
    mix: ClassVar[float | None] = None
    whole: ClassVar[bool] = False
    choosing: ClassVar[tuple[str, ...]] = ()
    averages: ClassVar[str] = ""
    anchored_rate: ClassVar[float] = 1.0

    def __init__(self, captured: Captured, setup: Setup) -> None:
        self.setup = setup
        self.partition = self.divide(captured)
        self.bind(captured)

    def divide(self, captured: Captured) -> Partition | None:
        """Where the method cuts the model, or None."""
        return None

    def at(self, captured: Captured) -> Method:
        """The same method over a capture of the same model at another batch size."""
        other = copy.copy(self)
        other.bind(captured)
        return other

    def bind(self, captured: Captured) -> None:
        """Set up what depends on the capture."""
        self.backbone = Backbone(captured, [cut.node for cut in self.partition.cuts] if self.partition else [])

    def parameters(self) -> Tensors:
        """Trainable tensors by name, as they start."""
        return {}

    def prefix(self, index: int) -> str:
        """What the names of the parameters that belong to the part ending at cut `index` begin with; "" for none."""
        return ""

    def owned(self, index: int, names: Iterable[str]) -> frozenset[str]:
        """Those of its parameters `names` that belong to the part ending at cut `index`. What belongs to no part is always trained."""
        prefix = self.prefix(index)
        return frozenset(name for name in names if prefix and name.startswith(prefix))

    @property
    def remembers_start(self) -> bool:
        """Whether its objective reads what its parameters start at, as `START` + name among the tensors that `forward` gets."""
        return False

    def setting(self, name: str) -> Any:
        """A choice of its own, as the user made it or by default."""
        return self.setup.settings.get(name, self.settings[name].default)

    @property
    def summable(self) -> bool:
        """Whether a step is the sum of its frames, so that it could be taken in pieces."""
        return not (self.memory() or self.restarts or self.skips)

    @property
    def parts(self) -> int:
        """How many parts there are that may be trained or left as they are."""
        return len(self.partition.cuts) - self.first if self.partition else 0

    def own_statistics(self) -> Tensors:
        """Statistics of normalisation layers that the method adds, as they start."""
        return {}

    def depth(self, layer: str) -> float:
        """How deep a layer of `own_statistics` lies in the model, from 0 to 1."""
        return 1.0

    def frozen(self) -> Tensors:
        """Fixed tensors that the method adds, by name."""
        return {}

    def memory(self) -> Tensors:
        """What it keeps of the stream besides statistics and parameters, float32 by name, as it starts."""
        return {}

    def tensors(self) -> Tensors:
        """What a pass gets besides parameters and statistics, as it starts: the model's tensors, the method's own fixed ones, and its memory."""
        return {**self.backbone.tensors, **self.frozen(), **{MEMORY + name: value for name, value in self.memory().items()}}

    def remembered(self, passes: Sequence[Outcome], hyper: Mapping[str, Tensor]) -> Tensors:
        """The memory after a step of these passes, by the names of `memory`; before, it is among the tensors that `forward` gets."""
        return {}

    def settled(
        self, passes: Sequence[Outcome], parameters: Mapping[str, Tensor], tensors: Mapping[str, Tensor], hyper: Mapping[str, Tensor]
    ) -> tuple[Tensors, Tensors]:
        """What follows from the parameters that a step, labelled or not, leaves: those to put in place of some of them, and memory.

        Args:
            passes: of the step.
            parameters: all of the method's after the update, those that are fixed too.
            tensors: as `forward` gets them, with the memory before.
            hyper: scalars of the step.

        Returns:
            parameters by name, possible only where these are held as they are; and memory, by the names of `memory`.
        """
        return {}, {}

    def start_again(self, passes: Sequence[Outcome], hyper: Mapping[str, Tensor]) -> Tensor | None:
        """Whether, after a step of these passes, parameters and moments go back to where they started: a scalar truth value. None: never."""
        return None

    def ascent(self, gradients: Mapping[str, Tensor | None], hyper: Mapping[str, Tensor]) -> Tensors:
        """What is added to the parameters for a second pass, whose gradients are then the step's; {}: there is one pass."""
        return {}

    def calibrate(self, batches: Sequence[Tensor], tensors: Mapping[str, Tensor], statistics: Mapping[str, Tensor]) -> None:  # noqa: B027
        """Look at source inputs once before anything is trained; nothing by default."""

    @abstractmethod
    def forward(self, run: BackboneRun, x: Tensor, tensors: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> Outcome:
        """One forward pass for x (N, …); `run` holds the backbone, `tensors` all frozen ones and, as "memory.NAME", the memory."""

    def passed(
        self,
        role: str,
        run: BackboneRun,
        x: Tensor,
        tensors: Mapping[str, Tensor],
        parameters: Mapping[str, Tensor],
        hyper: Mapping[str, Tensor],
    ) -> Outcome:
        """The pass of one role: `forward`, where it does not matter whether it predicts, adapts or learns.

        Where predictions leave the statistics as they stand, those of `run` are not used: none then follow from the pass.
        """
        return self.forward(run, x, tensors, parameters)

    @property
    def entries(self) -> tuple[str, ...]:
        """Where tensors of its own enter the model, by node."""
        return tuple(self.backbone.cuts) if self.enters else ()

    @property
    def exact(self) -> frozenset[str]:
        """Layers that read what the method adds to the model's values, by node: no grid of these would hold it, so they stay in float32."""
        return frozenset()

    def affine(self, parameters: Mapping[str, Tensor]) -> Tensors:
        """Weights and biases of the backbone's normalisation layers that are trained, by qualified name."""
        return {}

    def hyper(self) -> dict[str, Hyper]:
        """Scalars of the objectives, beyond the optimiser's and the statistics'."""
        return {}

    def unlabelled(self, outcome: Outcome, hyper: Mapping[str, Tensor]) -> Terms:
        """The objective of an adaptation step."""
        return (Term(entropy(outcome.logits).mean()),)

    def second(self, passes: Sequence[Outcome], hyper: Mapping[str, Tensor]) -> Terms:
        """The objective of the second pass of an adaptation step, where there is one; the first is among `passes`."""
        return self.unlabelled(passes[-1], hyper)

    def taught(self, outcome: Outcome) -> tuple[Tensor, ...]:
        """The logits, (N, C, …) each, that a warm-up trains: its loss is the sum of theirs."""
        return (outcome.logits,)

    def labelled(self, outcome: Outcome, target: Tensor, hyper: Mapping[str, Tensor]) -> Terms:
        """The objective of a learning step with targets (N, …) of class indices."""
        return (Term(F.cross_entropy(outcome.logits, target)),)


def entropy(logits: Tensor) -> Tensor:
    """Entropy in nats of the soft-max over axis 1: (N, C, …) → (N, …)."""
    logp = logits.log_softmax(1)
    return -(logp.exp() * logp).sum(1)


def confident_entropy(logits: Tensor, margin: Tensor | float) -> Term:
    """Mean entropy of the predictions whose entropy is below margin·ln C; 0 where there are none (EcoTTA, equation 3)."""
    values = entropy(logits)
    keep = selected(logits, margin)
    return Term((values * keep).sum(), "selected", keep.sum())


def selected(logits: Tensor, margin: Tensor | float) -> Tensor:
    """1 for each prediction whose entropy is below margin·ln C, else 0: (N, C, …) → (N, …), without gradient."""
    return (entropy(logits.detach()) < margin * math.log(logits.shape[1])).to(logits.dtype)


MARGIN = Hyper(0.4, 0.0, 10.0, "predictions with an entropy of at least margin·ln(classes) are not learned from")


def generator(seed: int) -> torch.Generator:
    """A seeded generator for initial weights."""
    return torch.Generator().manual_seed(seed)
