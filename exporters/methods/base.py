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
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from edgeadapt.exporters.backbone import Backbone, BackboneRun
from edgeadapt.exporters.capture import Captured
from edgeadapt.exporters.partition import Partition

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Hyper:
    """A scalar the device may change without a new export."""

    default: float
    low: float
    high: float
    help: str


@dataclass(frozen=True)
class Setup:
    """The user's choices that shape a method."""

    classes: int
    parts: int = 4
    cuts: Sequence[str] = ()
    kernel: int = 0
    width: int = 64
    seed: int = 0
    train: int | None = None


@dataclass
class Outcome:
    """One forward pass: logits (N, C, …) and whatever else the objective reads."""

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
        calibrates: whether it measures source data before the export, and so needs some.
        modes: the statistics it can be exported with.
        choices: which of the options parts, cuts, kernel, width and train shape it.
        first: the cut at which its first part ends; what lies before belongs to no part, or is counted to the first.
        enters: whether it puts tensors of its own in place of the model's at the cuts.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    statistics: ClassVar[str] = "live"
    trains: ClassVar[bool] = True
    warms_up: ClassVar[bool] = False
    optimiser: ClassVar[str] = "sgd"
    rate: ClassVar[float] = 5e-4
    calibrates: ClassVar[bool] = False
    modes: ClassVar[tuple[str, ...]] = ("live", "source")
    choices: ClassVar[tuple[str, ...]] = ()
    first: ClassVar[int] = 1
    enters: ClassVar[bool] = False

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
    def parts(self) -> int:
        """How many parts there are that may be trained or left as they are."""
        return len(self.partition.cuts) - self.first if self.partition else 0

    def own_statistics(self) -> Tensors:
        """Statistics of normalisation layers that the method adds, as they start."""
        return {}

    def frozen(self) -> Tensors:
        """Fixed tensors that the method adds, by name."""
        return {}

    def calibrate(self, batches: Sequence[Tensor], tensors: Mapping[str, Tensor], statistics: Mapping[str, Tensor]) -> None:  # noqa: B027
        """Look at source inputs once before anything is trained; nothing by default."""

    @abstractmethod
    def forward(self, run: BackboneRun, x: Tensor, tensors: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> Outcome:
        """One forward pass for x (N, …); `run` holds the backbone, `tensors` all frozen ones."""

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
