"""Counters, gauges and histograms, and the text that Prometheus reads them from (exposition format 0.0.4), over HTTP or from a file.

Times are in seconds and sizes in bytes, whatever the rest of the program uses. A value may be a function, which is called when the text is made,
without a lock held. Each metric has at most so many sets of labels, so that nothing which comes from outside can make it grow: what is counted or
observed beyond them counts as "other", and other values beyond them are left out.
"""

from __future__ import annotations

import logging
import math
import os
import re
import threading
import time
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from edgeadapt.errors import UsageError

LOG = logging.getLogger("edgeadapt")

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

SETS, LONGEST = 64, 128
"""Sets of labels that a metric has at most, and characters of a label's value."""

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""Bounds of a histogram of times."""

_OTHER = "other"
_METRIC, _LABEL = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*"), re.compile(r"(?!__)[a-zA-Z_][a-zA-Z0-9_]*")
_Key = tuple[str, ...]
_Line = tuple[str, Sequence[tuple[str, str]], float]  # what is appended to the metric's name, labels, value


class Metric(ABC):
    """A metric: its name, what it tells, the names of its labels. Made by a `Registry`; may be used from any thread."""

    kind = "gauge"

    def __init__(self, name: str, told: str, labels: Sequence[str] = ()) -> None:
        if not _METRIC.fullmatch(name) or not all(_LABEL.fullmatch(label) for label in labels) or len(set(labels)) < len(labels):
            raise ValueError(f"{name}{{{', '.join(labels)}}} is no name of a metric with labels")
        self.name, self.told, self.labels = name, told, tuple(labels)
        self._lock = threading.Lock()
        self._complained = False

    @abstractmethod
    def lines(self) -> Iterator[_Line]:
        """Its samples."""

    def _key(self, given: Mapping[str, object]) -> _Key:
        """The labels' values in their order.

        Raises:
            ValueError: they are not those of the metric.
        """
        if given.keys() != set(self.labels):
            raise ValueError(f"{self.name} has the labels {', '.join(self.labels) or 'none'}, not {', '.join(given) or 'none'}")
        return tuple(str(given[label])[:LONGEST].encode("utf-8", "replace").decode() for label in self.labels)

    def _complain(self, text: str, *facts: object) -> None:
        if not self._complained:
            LOG.warning(text, *facts)
        self._complained = True

    def _full(self) -> None:
        self._complain("%s has %d sets of labels already; there are no more", self.name, SETS)


class _Values(Metric):
    """A number for each set of labels: one that is held, one that is asked for, or several that are."""

    def __init__(self, name: str, told: str, labels: Sequence[str] = ()) -> None:
        super().__init__(name, told, labels)
        self._held: dict[_Key, float] = {}
        self._asked: dict[_Key, Callable[[], float | None]] = {}
        self._all: Callable[[], Mapping[_Key, float]] | None = None

    def read(self, value: Callable[[], float | None], /, **labels: object) -> None:
        """Has `value` asked each time the text is made. What it raises is told in the log once; without a number there is no sample."""
        key = self._key(labels)
        with self._lock:
            if key not in self._asked and len(self._asked) >= SETS:
                self._full()
            else:
                self._asked[key] = value

    def read_all(self, values: Callable[[], Mapping[_Key, float]]) -> None:
        """Has samples asked all at once, as a mapping of the labels' values, in the metric's order, to numbers."""
        self._all = values

    def lines(self) -> Iterator[_Line]:
        for key, value in self._now().items():
            yield "", tuple(zip(self.labels, key)), value

    def _now(self) -> dict[_Key, float]:
        with self._lock:
            found, asked, every = dict(self._held), dict(self._asked), self._all
        for key, ask in asked.items():
            try:
                value = ask()
                if value is not None:
                    found[key] = float(value)
            except Exception as reason:
                self._complain("%s cannot be read: %r", self.name, reason)
        if every is not None:
            try:
                for given, value in every().items():
                    self._place(found, self._key(dict(zip(self.labels, given, strict=True))), float(value))
            except Exception as reason:
                self._complain("%s cannot be read: %r", self.name, reason)
        return found

    def _place(self, found: dict[_Key, float], key: _Key, value: float) -> None:
        if key not in found and len(found) >= SETS:
            self._full()
        else:
            found[key] = value


class Gauge(_Values):
    """A value that goes up and down."""

    def set(self, value: float, /, **labels: object) -> None:
        """Holds the value from now on."""
        key = self._key(labels)
        with self._lock:
            self._place(self._held, key, float(value))


class Counter(_Values):
    """A count, which only goes up."""

    kind = "counter"

    def __init__(self, name: str, told: str, labels: Sequence[str] = ()) -> None:
        if not name.endswith("_total"):
            raise ValueError(f"{name} counts, so its name ends with _total")
        super().__init__(name, told, labels)

    def add(self, amount: float = 1.0, /, **labels: object) -> None:
        """Adds to the count.

        Raises:
            ValueError: the amount is negative or no number.
        """
        if not amount >= 0:
            raise ValueError(f"{self.name} only goes up, not by {amount}")
        key = self._key(labels)
        with self._lock:
            if key not in self._held and len(self._held) >= SETS - 1 and key != (_OTHER,) * len(key):
                self._full()
                key = (_OTHER,) * len(key)
            self._held[key] = self._held.get(key, 0.0) + amount


@dataclass
class _Spread:
    counts: list[int]
    sum: float = 0.0


class Histogram(Metric):
    """How many of the values that were observed are at most each of some bounds."""

    kind = "histogram"

    def __init__(self, name: str, told: str, labels: Sequence[str] = (), bounds: Sequence[float] = SECONDS) -> None:
        super().__init__(name, told, labels)
        if "le" in labels or not bounds or list(bounds) != sorted(set(bounds)) or not all(map(math.isfinite, bounds)):
            raise ValueError(f"{name} needs bounds that rise, and no label le")
        self._bounds = tuple(map(float, bounds))
        self._held: dict[_Key, _Spread] = {}
        if not labels:
            self._held[()] = self._new()

    def observe(self, value: float, /, **labels: object) -> None:
        """One more value; one that is no number is passed over."""
        if math.isnan(value):
            return
        key = self._key(labels)
        with self._lock:
            if key not in self._held and len(self._held) >= SETS - 1:
                self._full()
                key = (_OTHER,) * len(key)
            spread = self._held.setdefault(key, self._new())
            spread.counts[bisect_left(self._bounds, value)] += 1
            spread.sum += value

    def lines(self) -> Iterator[_Line]:
        with self._lock:
            held = {key: _Spread(list(spread.counts), spread.sum) for key, spread in self._held.items()}
        for key, spread in held.items():
            labels, total = tuple(zip(self.labels, key)), 0
            for bound, count in zip((*self._bounds, math.inf), spread.counts):
                total += count
                yield "_bucket", (*labels, ("le", _number(bound))), total
            yield "_sum", labels, spread.sum
            yield "_count", labels, total

    def _new(self) -> _Spread:
        return _Spread([0] * (len(self._bounds) + 1))


_Made = TypeVar("_Made", bound=Metric)


class Registry:
    """Metrics in the order in which they were made."""

    def __init__(self) -> None:
        self._metrics: dict[str, Metric] = {}

    def counter(self, name: str, told: str, labels: Sequence[str] = ()) -> Counter:
        """A new counter; its name ends with _total."""
        return self._added(Counter(name, told, labels))

    def gauge(self, name: str, told: str, labels: Sequence[str] = ()) -> Gauge:
        """A new gauge."""
        return self._added(Gauge(name, told, labels))

    def histogram(self, name: str, told: str, labels: Sequence[str] = (), bounds: Sequence[float] = SECONDS) -> Histogram:
        """A new histogram with those upper bounds, the one of all values left out."""
        return self._added(Histogram(name, told, labels, bounds))

    def info(self, name: str, told: str, /, **facts: object) -> None:
        """Facts that do not change, as labels of a gauge that is always 1; its name ends with _info.

        Raises:
            ValueError: it does not.
        """
        if not name.endswith("_info"):
            raise ValueError(f"{name} holds facts, so its name ends with _info")
        self.gauge(name, told, tuple(facts)).set(1, **facts)

    def _added(self, metric: _Made) -> _Made:
        if metric.name in self._metrics:
            raise ValueError(f"{metric.name} is there already")
        self._metrics[metric.name] = metric
        return metric

    def render(self) -> bytes:
        """All metrics that have samples, as Prometheus reads them; serve them as CONTENT_TYPE."""
        text: list[str] = []
        for metric in tuple(self._metrics.values()):
            samples = [f"{metric.name}{more}{_labels(labels)} {_number(value)}\n" for more, labels, value in metric.lines()]
            if samples:
                told = metric.told.replace("\\", r"\\").replace("\n", r"\n")
                text += [f"# HELP {metric.name} {told}\n# TYPE {metric.name} {metric.kind}\n", *samples]
        return "".join(text).encode("utf-8", "replace")

    def write_textfile(self, path: str | os.PathLike[str]) -> None:
        """Writes the text where node_exporter's textfile collector looks: readers see the old or the new text, never a part.

        It is not forced to the disk: after a loss of power it is of no use anyway. Only one thread may write to a path.

        Raises:
            UsageError: the collector would pass it over, because it does not end with .prom.
            OSError: it cannot be written; the text of before is still there.
        """
        target = Path(path)
        if target.suffix != ".prom":
            raise UsageError(f"{target} would not be read: node_exporter takes files that end with .prom", f"name it {target.with_suffix('.prom')}")
        temporary = target.with_name(f".{target.name}.tmp")
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            with os.fdopen(os.open(temporary, flags, 0o666), "wb") as file:
                file.write(self.render())
            os.replace(temporary, target)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise


class Measures:
    """The daemon's own metrics.

    Args:
        version: edgeadapt's.
        states: all that `enter` may be called with.
        facts: more of what does not change, such as the bundle's digest and its method.
        clock: monotonic seconds.

    Attributes:
        registry: holds them all, and may be given more.
        budget, used, resident: bytes: the budget, what of it is used by `pool`, and what the process holds.
        inference, update: seconds of a prediction and of a step.
        updates, rollbacks: steps by `outcome`, and roll-backs by `reason`, which is one of a few words.
        drift: how far the stream is from the source, 0 to 1.
        frames, frame_errors: frames by `source`; what else came of it by `source` and `kind`.
        checkpoint: when the state was last written, in seconds of Unix time.
        temperature, throttled: of the board, °C and 0 or 1.
    """

    def __init__(
        self, version: str, states: Sequence[str], facts: Mapping[str, str] | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.registry = registry = Registry()
        begun = clock()
        registry.info("edgeadapt_build_info", "What is running.", version=version, **(facts or {}))
        registry.gauge("edgeadapt_up_seconds", "Seconds since the daemon started.").read(lambda: clock() - begun)
        self.budget = registry.gauge("edgeadapt_memory_budget_bytes", "The most that the process may hold.")
        self.used = registry.gauge("edgeadapt_memory_used_bytes", "What of the budget is used, by what for.", ["pool"])
        self.resident = registry.gauge("edgeadapt_process_resident_bytes", "What the process holds.")
        self.inference = registry.histogram("edgeadapt_inference_seconds", "Time of a prediction.")
        self.update = registry.histogram("edgeadapt_update_seconds", "Time of a step of adaptation.")
        self.updates = registry.counter("edgeadapt_updates_total", "Steps of adaptation, by what became of them.", ["outcome"])
        self.rollbacks = registry.counter("edgeadapt_rollbacks_total", "How often what was learned was put back, by why.", ["reason"])
        self._states, self._state = tuple(states), registry.gauge("edgeadapt_state", "1 for the state that it is in, else 0.", ["state"])
        self.drift = registry.gauge("edgeadapt_drift_score", "How far the stream is from the source: 0 as the source, at most 1.")
        self.frames = registry.counter("edgeadapt_sensor_frames_total", "Frames that came.", ["source"])
        self.frame_errors = registry.counter("edgeadapt_sensor_frame_errors_total", "What was no usable frame, by kind.", ["source", "kind"])
        self.checkpoint = registry.gauge("edgeadapt_checkpoint_timestamp_seconds", "When the state was last written, in Unix time.")
        self.temperature = registry.gauge("edgeadapt_temperature_celsius", "Of the processor.")
        self.throttled = registry.gauge("edgeadapt_throttled", "1 while the board runs slower than it could, else 0.")

    def enter(self, state: str) -> None:
        """From now on it is in that state.

        Raises:
            ValueError: it is none of those that were named.
        """
        if state not in self._states:
            raise ValueError(f"{state} is none of {', '.join(self._states)}")
        for name in self._states:
            self._state.set(name == state, state=name)


def _labels(labels: Sequence[tuple[str, str]]) -> str:
    return "{" + ",".join(f'{name}="{_escaped(value)}"' for name, value in labels) + "}" if labels else ""


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")


def _number(value: float) -> str:
    if math.isfinite(value):
        return str(int(value)) if value == int(value) and abs(value) < 2**53 else repr(float(value))
    return "NaN" if math.isnan(value) else "+Inf" if value > 0 else "-Inf"
