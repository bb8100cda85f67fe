"""How a board is doing just now: temperature, throttling, load. What a board does not tell is None."""

from __future__ import annotations

import os
from dataclasses import dataclass

from edgeadapt.devices.boards.files import Files

_ZONES = "sys/class/thermal"
_PLATFORM, _HWMON = "sys/devices/platform", "sys/class/hwmon"
_NOW = 0xF  # of the Raspberry Pi's firmware: under-voltage, frequency capped, throttled, soft limit of temperature; the bits above say "since start"


@dataclass(frozen=True)
class Vitals:
    """temperature: the hottest zone, °C. throttled: whether it runs slower than it could. load: average of the last minute."""

    temperature: float | None
    throttled: bool | None
    load: float | None


def look(root: str | os.PathLike[str] = "/") -> Vitals:
    """Of this machine, or of the one whose files are below `root`."""
    files = Files(root)
    return Vitals(_temperature(files), _throttled(files), _load(files))


def _temperature(files: Files) -> float | None:
    found = []
    for zone in files.names(_ZONES):
        if zone.startswith("thermal_zone"):
            try:
                degrees = int(files.line(f"{_ZONES}/{zone}/temp")) / 1000
            except ValueError:
                continue
            if -50.0 < degrees < 200.0:  # a sensor that is off tells nonsense
                found.append(degrees)
    return max(found, default=None)


def _throttled(files: Files) -> bool | None:
    """A Raspberry Pi's firmware says it, or at least its alarm for too low a voltage."""
    for folder in files.names(_PLATFORM):
        for inner in files.names(f"{_PLATFORM}/{folder}") if folder.startswith("soc") else ():
            if inner.endswith("firmware"):
                try:
                    return bool(int(files.line(f"{_PLATFORM}/{folder}/{inner}/get_throttled"), 16) & _NOW)
                except ValueError:
                    continue
    for folder in files.names(_HWMON):
        if files.line(f"{_HWMON}/{folder}/name") == "rpi_volt":
            alarm = files.number(f"{_HWMON}/{folder}/in0_lcrit_alarm")
            return None if alarm is None else alarm != 0
    return None


def _load(files: Files) -> float | None:
    try:
        return float(files.text("proc/loadavg").split()[0])
    except (ValueError, IndexError):
        return None
