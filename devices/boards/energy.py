"""The energy that a board says it takes: counters of the processor's packages (RAPL), or the power sensors of a Jetson, summed up over time.

Both are of the whole machine or package, whatever runs on it, idle power included.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable

from edgeadapt.devices.boards.files import Files

PERIOD = 0.1  # seconds between two looks at a power sensor

_RAPL = "sys/class/powercap"
_HWMON = "sys/class/hwmon"
_IIO = "sys/bus/iio/devices"  # INA3221 under the kernels 4.x of JetPack 4
_WHOLE = ("VDD_IN", "POM_5V_IN", "5V_IN")
"""Rails that carry the whole board, where it has one; else all rails of the sensor are added."""
_WITHIN = {"VDDQ_VDD2_1V8AO": "VIN_SYS_5V0"}
"""Rails that are fed by another one, and count as part of it where that is there."""


class Energy:
    """Joules since it was made; a context manager, because power is looked at by a thread of its own.

    Args:
        root: where /sys is.
        clock: seconds.
        period: seconds between two looks at power sensors. 0: only when asked for joules.

    Attributes:
        kind: "rapl", "ina3221", or "" where this machine tells nothing, or not to this user.
    """

    def __init__(self, root: str | os.PathLike[str] = "/", clock: Callable[[], float] = time.monotonic, period: float = PERIOD) -> None:
        self._files, self._clock, self._period = Files(root), clock, period
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._thread: threading.Thread | None = None
        self._joules = 0.0
        self._counters = {zone: value for zone in _zones(self._files) if (value := self._files.number(f"{zone}/energy_uj")) is not None}
        self._spans = {zone: self._files.number(f"{zone}/max_energy_range_uj") or 0 for zone in self._counters}
        self._rails = [] if self._counters else _rails(self._files)
        self._last = (self._clock(), self._watts())
        self.kind = "rapl" if self._counters else "ina3221" if self._last[1] is not None else ""

    def joules(self) -> float | None:
        """Joules so far; None where the machine does not tell, or has stopped telling."""
        with self._lock:
            if self.kind == "rapl":
                self._count()
            elif self.kind:
                self._integrate()
            return self._joules if self.kind else None

    def __enter__(self) -> Energy:
        if self.kind and self._period > 0:
            self._thread = threading.Thread(target=self._watch, name="energy", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _watch(self) -> None:
        period = self._period if self.kind == "ina3221" else 100 * self._period  # a counter must only be seen once before it is full
        while not self._stop.wait(period):
            self.joules()

    def _count(self) -> None:
        for zone, before in self._counters.items():
            now = self._files.number(f"{zone}/energy_uj")
            if now is None:
                self.kind = ""
                return
            # the counter begins again at 0 once it has reached its range
            self._joules += (now - before + (self._spans[zone] if now < before else 0)) / 1e6
            self._counters[zone] = now

    def _integrate(self) -> None:
        now, watts = self._clock(), self._watts()
        before, last = self._last
        if watts is None or last is None:
            self.kind = ""
            return
        self._joules += (now - before) * (watts + last) / 2
        self._last = now, watts

    def _watts(self) -> float | None:
        found = [_power(self._files, rail) for rail in self._rails]
        known = [watts for watts in found if watts is not None]
        return sum(known) if known and len(known) == len(found) else None


def _zones(files: Files) -> list[str]:
    """The folders of counters that do not contain one another: packages, and memory where it is counted beside them."""
    found = []
    for name in files.names(_RAPL):
        if not re.fullmatch(r"intel-rapl:\d+(:\d+)?", name):
            continue
        label, inner = files.line(f"{_RAPL}/{name}/name"), name.count(":") == 2
        if (label == "dram") if inner else label.startswith("package"):
            found.append(f"{_RAPL}/{name}")
    return found


def _rails(files: Files) -> list[tuple[str, ...]]:
    """For each rail the files whose product is its power in µW, or the one file that has it in mW."""
    rails: dict[tuple[str, ...], str] = {}
    for name in files.names(_HWMON):
        folder = f"{_HWMON}/{name}"
        if files.line(f"{folder}/name") != "ina3221":
            continue
        for channel in (1, 2, 3):
            paths = (f"{folder}/in{channel}_input", f"{folder}/curr{channel}_input")
            if files.exists(paths[0]) and files.exists(paths[1]) and files.line(f"{folder}/in{channel}_enable") != "0":
                rails[paths] = files.line(f"{folder}/in{channel}_label")
    if not rails:
        for name in files.names(_IIO):
            for channel in (0, 1, 2):
                path = f"{_IIO}/{name}/in_power{channel}_input"
                if files.exists(path):
                    rails[(path,)] = files.line(f"{_IIO}/{name}/rail_name_{channel}")
    whole = [paths for paths, label in rails.items() if label in _WHOLE]
    return whole[:1] or [paths for paths, label in rails.items() if _WITHIN.get(label) not in rails.values()]


def _power(files: Files, rail: tuple[str, ...]) -> float | None:
    """Watts."""
    values = [files.number(path) for path in rail]
    if len(values) == 1:
        return None if values[0] is None else values[0] / 1e3
    return None if values[0] is None or values[1] is None else values[0] * values[1] / 1e6
