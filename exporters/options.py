"""What a user may choose at export, and the defaults that depend on the batch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeadapt.errors import UsageError
from edgeadapt.exporters.methods import METHODS, Method
from edgeadapt.exporters.optimisers import OPTIMISERS
from edgeadapt.exporters.storage import TIERS, Tier

REFERENCE_BATCH = 64
CALIBRATION_BATCHES = 8
AUTO = "auto"
ANCHORED = "anchored"
"""Statistics that follow the stream as far as it has left the source; see `blending`."""
DEFAULT, WITHOUT_LAYERS = "eata", "side"
"""The method where none is named, with anchored statistics; and the one for models that have no normalisation which it could train."""
QUANTIZE = ("none", "int8", AUTO)
"""What the frozen model may be computed in: float32, or 8 bits; or what is best within a budget, see `exporters.quantise.auto`."""
REFERENCE = "reference"
"""The tier of updates that is no small one: parameters and moments in float32."""
_TRAINING = ("optimiser", "rate", "exact", "micro", "gradient", "saved", "updates")
_WARMUP = ("epochs", "warmup_rate", "max_drop")


@dataclass(frozen=True)
class Options:
    """What a user may choose; see `export`. Made by `Options.of`."""

    method: str = DEFAULT
    parts: int | None = None
    cuts: tuple[str, ...] = ()
    kernel: int = 0
    width: int = 64
    train: int | None = None
    batches: tuple[int, ...] = (16,)
    statistics: str | None = None
    optimiser: str | None = None
    rate: float | None = None
    exact: bool = False
    epochs: int = 10
    warmup_rate: float = 0.05
    warmup_batch: int = 64
    max_drop: float = 5.0
    allow_drop: bool = False
    holdout: float = 0.1
    seed: int = 0
    threads: int = 0
    task: str | None = None
    micro: str | tuple[int, ...] = "auto"
    quantize: str = "none"
    gradient: str | None = None
    saved: str | None = None
    updates: str = REFERENCE
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    search: bool = False

    @staticmethod
    def of(choices: Mapping[str, Any], planned: bool = False) -> Options:
        """Checked options from those that a user gave, by name; None takes the default.

        Args:
            choices: by name.
            planned: whether batches that are not given are still to be chosen.

        Raises:
            UsageError: a choice is unknown or out of range, or the method has no use for it.
        """
        known = [field.name for field in dataclasses.fields(Options)]
        unknown = sorted(set(choices) - set(known))
        if unknown:
            raise UsageError(f"export has no option {unknown[0]!r}", f"the options are {', '.join(known)}")
        given: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in choices.items() if value is not None}
        if "method" not in given:
            given = {"statistics": ANCHORED, "search": True, **given}
        options = Options(**given)
        options._check(planned and "batches" not in given)
        options.check_use([name for name, value in given.items() if value is not False and value != ()], named="method" in given)
        return options

    @property
    def gradient_in_codes(self) -> bool:
        """Whether gradients pass the frozen model in 8 bits: by default where it is computed in them."""
        return self.quantize != "none" and self.gradient != "float"

    @property
    def saves_codes(self) -> bool:
        """Whether a step keeps bytes for its backward pass: by default where the frozen model is computed in 8 bits, or the method has it so."""
        return self.saved == "int8" or (self.saved is None and (self.quantize != "none" or METHODS[self.method].saves == "int8"))

    @property
    def tier(self) -> Tier | None:
        """The small forms of parameters and moments; None for float32."""
        return TIERS.get(self.updates)

    def _check(self, planned: bool) -> None:
        """Values alone."""
        choices = {
            "method": (self.method, tuple(METHODS)),
            "statistics": (self.statistics, (None, "live", ANCHORED, "source")),
            "optimiser": (self.optimiser, (None, *OPTIMISERS)),
            "task": (self.task, (None, "classification", "segmentation")),
            "kernel": (self.kernel, (0, 1, 3, 5)),
            "quantize": (self.quantize, QUANTIZE),
            "gradient": (self.gradient, (None, "float", "int8")),
            "saved": (self.saved, (None, "float", "int8")),
            "updates": (self.updates, (REFERENCE, *TIERS)),
        }
        for name, (value, allowed) in choices.items():
            if value not in allowed:
                raise UsageError(f"{name} = {value!r} is not known", f"choose one of {', '.join(str(item) for item in allowed if item is not None)}")
        if not isinstance(self.settings, Mapping):
            raise UsageError(f"settings = {self.settings!r} is no mapping", 'give the method\'s own choices by name, such as {"freeze": "none"}')
        own = METHODS[self.method].settings
        for name, value in self.settings.items():
            if name not in own:
                raise UsageError(f"{self.method} has no setting {name!r}", f"it has {', '.join(own)}" if own else "it has none: leave settings out")
            own[name].read(name, value)
        for name, least in {"parts": 1, "train": 1, "width": 1, "epochs": 0, "warmup_batch": 2, "seed": 0, "threads": 0}.items():
            number = getattr(self, name)
            if number is None:
                continue
            if not _whole(number):
                raise UsageError(f"{name} = {number!r} is not a whole number", f"give at least {least}")
            if number < least:
                raise UsageError(f"{name} = {number} is too small", f"give at least {least}")
        if not isinstance(self.batches, tuple) or not self.batches or not all(_whole(size) and size > 0 for size in self.batches):
            raise UsageError(f"batches = {self.batches!r} is no list of batch sizes", "give whole numbers, each at least 1, such as (4, 16)")
        if self.micro not in ("auto", "none"):
            self._check_micro(planned)
        if not isinstance(self.search, bool):
            raise UsageError(f"search = {self.search!r} is neither true nor false", "give True or False, or leave it out")
        if not isinstance(self.cuts, tuple) or not all(isinstance(name, str) for name in self.cuts):
            raise UsageError(f"cuts = {self.cuts!r} is no list of names", 'give the names of places, such as ("layer1", "layer2")')
        if not _real(self.holdout) or not 0.0 < self.holdout < 0.9:
            raise UsageError(f"holdout = {self.holdout!r} is no share of the data", "give a number between 0 and 0.9")
        for name in ("max_drop", "warmup_rate"):
            value = getattr(self, name)
            if not _real(value) or value <= 0:
                raise UsageError(f"{name} = {value!r} is not a number above 0", f"leave it out for {getattr(Options, name):g}")
        if self.rate is not None and (not _real(self.rate) or self.rate < 0):
            raise UsageError(f"rate = {self.rate!r} is no learning rate", "give a number of at least 0, or leave it out for the method's own")

    def _check_micro(self, planned: bool) -> None:
        """Micro-batches that were named."""
        if not isinstance(self.micro, tuple) or not self.micro or not all(_whole(size) and size > 0 for size in self.micro):
            raise UsageError(f"micro = {self.micro!r} is no choice of micro-batches", 'give "auto", "none", or whole numbers such as (1, 4)')
        for size in self.micro:
            if not planned and not any(divides(size, batch) for batch in self.batches):
                sizes = " or ".join(map(str, sorted(set(self.batches))))
                raise UsageError(f"a micro-batch of {size} is no part of a batch of {sizes}", "give one that divides a batch")

    def check_use(self, given: Iterable[str], named: bool = False) -> None:
        """See that the method makes something of what was given.

        Args:
            given: names of options.
            named: whether the method is among them.

        Raises:
            UsageError: it does not.
        """
        method, who = METHODS[self.method], self.method if named else f"{self.method}, the method where none is named,"
        used = {*method.choices, *(_TRAINING if method.trains else ()), *(_WARMUP if method.warms_up else ())}
        for name in given:
            if name in {"parts", "cuts", "kernel", "width", "train", *_TRAINING, *_WARMUP} - used:
                users = [key for key, other in METHODS.items() if name in other.choices]
                users = users or [key for key, other in METHODS.items() if (other.warms_up if name in _WARMUP else other.trains)]
                raise UsageError(f"{who} has no use for {name}", f"leave it out, or take a method that has: {', '.join(users)}")
        if self.quantize != "none" and not method.in_codes:
            raise UsageError(f"{self.method} needs the model in float32, and quantize={self.quantize!r} contradicts that", "leave quantize out")
        if self.gradient == "int8" and self.quantize == "none":
            raise UsageError("gradients in 8 bits are of convolutions in 8 bits", 'give quantize="int8" too, or leave gradient out')
        if method.whole and self.updates != REFERENCE:
            raise UsageError(f"{self.method} sets parameters back to the model's own, which {self.updates} updates cannot hold", "leave updates out")
        if self.parts is not None and self.cuts:
            raise UsageError("cuts already say how many parts there are", "give cuts or parts, not both")
        if method.cut_to_train and self.train is None and (self.parts is not None or self.cuts):
            shape = "parts" if self.parts is not None else "cuts"
            fix = "say with train how many of the last parts to train, or leave it out; ecotta trains something in every part"
            raise UsageError(f"{who} has no use for {shape} without train", fix)
        if self.statistics is not None and self.statistics not in method.modes:
            why = "adapts nothing but its statistics" if self.method == "norm" else "moves its statistics" if method.trains else "does not adapt"
            raise UsageError(f"{self.method} {why}, so {self.statistics!r} statistics contradict it", f"use {method.modes[0]!r}, or another method")


def divides(micro: int, batch: int) -> bool:
    """Whether a step over a batch can be taken in pieces of so many frames."""
    return batch % micro == 0 and batch > micro


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _real(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def calibration_rows(kept: NDArray[np.intp], batch: int, seed: int, batches: int = CALIBRATION_BATCHES) -> list[NDArray[np.intp]]:
    """Which samples a method is calibrated on: at most so many batches, drawn by `seed` from all of `kept`, which may be sorted by class.

    Args:
        kept: indices of the samples to choose from.
        batch: samples in a batch, at most as many as there are.

    Returns:
        the indices of each batch, (batch,).
    """
    mixed = np.random.default_rng(seed).permutation(kept)
    return [mixed[start : start + batch] for start in range(0, min(len(mixed) // batch, batches) * batch, batch)]


def mixing_weight(batch: int) -> float:
    """Default weight of a batch's statistics: the smaller the batch, the less it says (0.02 at 1, 0.05 at 4, 0.2 at 16, 1 from 64 on)."""
    return 1.0 if batch >= REFERENCE_BATCH else 0.02 if batch == 1 else min(1.0, 0.0125 * batch)


def rate_for(method: Method, optimiser: str, rate: float | None, batch: int) -> float:
    """Default learning rate at a batch size: linear in the batch for SGD, by its square root for Adam; a given rate holds at every size."""
    if rate is not None:
        return rate
    share = batch / REFERENCE_BATCH
    return float(method.rate * (share if optimiser == "sgd" else share**0.5))


def batch_defaults(
    method: Method, optimiser: str, rate: float | None, names: Iterable[str], batch: int, tuned: Mapping[str, float] | None = None
) -> dict[str, float]:
    """The scalars among `names` whose default depends on the batch. tuned: what the usual ones are multiplied by, but for a given rate."""
    values = {"mix": mixing_weight(batch) if method.mix is None else method.mix, "rate": rate_for(method, optimiser, rate, batch)}
    factors = {name: value for name, value in (tuned or {}).items() if name != "rate" or rate is None}
    values = {name: value * factors.get(name, 1.0) for name, value in values.items()}
    return {name: min(values[name], 1.0) if name == "mix" else values[name] for name in names if name in values}
