"""What a user may choose at export, and the defaults that depend on the batch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from edgeadapt.errors import UsageError
from edgeadapt.exporters.methods import METHODS, Method
from edgeadapt.exporters.optimisers import OPTIMISERS

REFERENCE_BATCH = 64


@dataclass(frozen=True)
class Options:
    """What a user may choose; see `export`."""

    method: str = "ecotta"
    parts: int = 4
    cuts: tuple[str, ...] = ()
    kernel: int = 0
    width: int = 64
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

    def checked(self) -> Options:
        """Itself.

        Raises:
            UsageError: a choice is out of range.
        """
        choices = {
            "method": (self.method, tuple(METHODS)),
            "statistics": (self.statistics, (None, "live", "source")),
            "optimiser": (self.optimiser, (None, *OPTIMISERS)),
            "task": (self.task, (None, "classification", "segmentation")),
            "kernel": (self.kernel, (0, 1, 3, 5)),
        }
        for name, (value, allowed) in choices.items():
            if value not in allowed:
                raise UsageError(f"{name} = {value!r} is not known", f"choose one of {', '.join(str(item) for item in allowed if item is not None)}")
        ranges = {"parts": (self.parts, 1), "width": (self.width, 1), "epochs": (self.epochs, 0), "warmup_batch": (self.warmup_batch, 2)}
        for name, (number, least) in ranges.items():
            if number < least:
                raise UsageError(f"{name} = {number} is too small", f"give at least {least}")
        if not self.batches or min(self.batches) < 1:
            raise UsageError(f"batches = {list(self.batches)} is no list of batch sizes", "give at least one, each at least 1")
        if not 0.0 < self.holdout < 0.9:
            raise UsageError(f"holdout = {self.holdout} is no share of the data", "give a number between 0 and 0.9")
        return self


def mixing_weight(batch: int) -> float:
    """Default weight of a batch's statistics: the smaller the batch, the less it says (0.02 at 1, 0.05 at 4, 0.2 at 16, 1 from 64 on)."""
    return 1.0 if batch >= REFERENCE_BATCH else 0.02 if batch == 1 else min(1.0, 0.0125 * batch)


def rate_for(method: Method, optimiser: str, rate: float | None, batch: int) -> float:
    """Default learning rate at a batch size: linear in the batch for SGD, by its square root for Adam; a given rate holds at every size."""
    if rate is not None:
        return rate
    share = batch / REFERENCE_BATCH
    return float(method.rate * (share if optimiser == "sgd" else share**0.5))


def batch_defaults(method: Method, optimiser: str, rate: float | None, names: Iterable[str], batch: int) -> dict[str, float]:
    """The scalars among `names` whose default depends on the batch."""
    values = {"mix": mixing_weight(batch), "rate": rate_for(method, optimiser, rate, batch)}
    return {name: values[name] for name in names if name in values}
