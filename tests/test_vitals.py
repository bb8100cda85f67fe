"""How a board is doing, from files that look like those of boards we do not have."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgeadapt.devices.boards import vitals
from edgeadapt.devices.boards.vitals import Vitals
from tests.fakemachine import put

pytestmark = pytest.mark.device

ZONE = "sys/class/thermal/thermal_zone{}/temp"
FIRMWARE = "sys/devices/platform/soc/soc:firmware/get_throttled"


def test_the_hottest_zone_counts_and_sensors_that_are_off_do_not(tmp_path: Path) -> None:
    for number, text in enumerate(["48312\n", "61000\n", "-273150\n", "", "off\n", "250000\n"]):
        put(tmp_path, ZONE.format(number), text)
    put(tmp_path, "sys/class/thermal/cooling_device0/temp", "99000\n")
    put(tmp_path, "proc/loadavg", "1.25 0.80 0.60 2/345 6789\n")
    assert vitals.look(tmp_path) == Vitals(61.0, None, 1.25)


@pytest.mark.parametrize(("text", "now"), [("0\n", False), ("0x50000\n", False), ("50005\n", True), ("8\n", True), ("", None), ("none\n", None)])
def test_a_raspberry_pi_says_whether_it_is_throttled_now(tmp_path: Path, text: str, now: bool | None) -> None:
    """Bits from the sixteenth on say what was since the start."""
    put(tmp_path, FIRMWARE, text)
    assert vitals.look(tmp_path).throttled is now


@pytest.mark.parametrize(("alarm", "now"), [("0\n", False), ("1\n", True), ("", None)])
def test_where_only_the_voltage_has_an_alarm_that_is_told(tmp_path: Path, alarm: str, now: bool | None) -> None:
    put(tmp_path, "sys/class/hwmon/hwmon0/name", "cpu_thermal\n")
    put(tmp_path, "sys/class/hwmon/hwmon0/in0_lcrit_alarm", "1\n")
    put(tmp_path, "sys/class/hwmon/hwmon1/name", "rpi_volt\n")
    put(tmp_path, "sys/class/hwmon/hwmon1/in0_lcrit_alarm", alarm)
    assert vitals.look(tmp_path).throttled is now


def test_a_board_that_tells_nothing(tmp_path: Path) -> None:
    assert vitals.look(tmp_path) == Vitals(None, None, None)


def test_this_machine_has_a_load() -> None:
    assert vitals.look().load is not None
