"""Energy of boards, read from trees that stand for /sys."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from edgeadapt.devices.boards.energy import Energy

pytestmark = pytest.mark.device


def put(root: Path, path: str, value: object) -> None:
    place = root / "sys" / path
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(f"{value}\n", encoding="utf-8")


def zone(root: Path, name: str, label: str, microjoules: int, span: int = 1_000_000_000) -> None:
    for file, value in (("name", label), ("energy_uj", microjoules), ("max_energy_range_uj", span)):
        put(root, f"class/powercap/{name}/{file}", value)


def rail(root: Path, channel: int, label: str, millivolts: int, milliamperes: int, monitor: int = 0) -> None:
    folder = f"class/hwmon/hwmon{monitor}"
    put(root, f"{folder}/name", "ina3221")
    for file, value in ((f"in{channel}_label", label), (f"in{channel}_input", millivolts), (f"curr{channel}_input", milliamperes)):
        put(root, f"{folder}/{file}", value)


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_machine_that_tells_nothing_has_no_energy(tmp_path):
    with Energy(tmp_path) as energy:
        assert energy.kind == ""
        assert energy.joules() is None


def test_packages_are_counted_and_what_lies_in_them_is_not_counted_twice(tmp_path):
    zone(tmp_path, "intel-rapl:0", "package-0", 5_000_000)
    zone(tmp_path, "intel-rapl:0:0", "core", 1)
    zone(tmp_path, "intel-rapl:0:1", "dram", 0)
    zone(tmp_path, "intel-rapl:1", "package-1", 7_000_000)
    zone(tmp_path, "intel-rapl:2", "psys", 0)
    zone(tmp_path, "intel-rapl-mmio:0", "package-0", 0)
    energy = Energy(tmp_path)
    assert energy.kind == "rapl"
    assert energy.joules() == 0
    zone(tmp_path, "intel-rapl:0", "package-0", 6_500_000)
    zone(tmp_path, "intel-rapl:0:0", "core", 900_000)
    zone(tmp_path, "intel-rapl:0:1", "dram", 250_000)
    zone(tmp_path, "intel-rapl:1", "package-1", 7_100_000)
    zone(tmp_path, "intel-rapl:2", "psys", 9_000_000)
    zone(tmp_path, "intel-rapl-mmio:0", "package-0", 9_000_000)
    assert energy.joules() == pytest.approx(1.5 + 0.25 + 0.1)
    assert energy.joules() == pytest.approx(1.85)


def test_a_counter_that_begins_again_is_followed(tmp_path):
    zone(tmp_path, "intel-rapl:0", "package-0", 9_000_000, 10_000_000)
    energy = Energy(tmp_path)
    for value, joules in ((9_900_000, 0.9), (400_000, 1.4), (200_000, 11.2)):
        zone(tmp_path, "intel-rapl:0", "package-0", value, 10_000_000)
        assert energy.joules() == pytest.approx(joules)


def test_a_counter_that_may_not_be_read_is_none(tmp_path):
    put(tmp_path, "class/powercap/intel-rapl:0/name", "package-0")
    assert Energy(tmp_path).kind == ""
    zone(tmp_path, "intel-rapl:0", "package-0", 1)
    energy = Energy(tmp_path)
    (tmp_path / "sys/class/powercap/intel-rapl:0/energy_uj").unlink()
    assert energy.joules() is None


def test_the_power_of_a_jetson_is_summed_up_over_time(tmp_path):
    rail(tmp_path, 1, "VDD_IN", 5000, 1000)
    rail(tmp_path, 2, "VDD_CPU_GPU_CV", 5000, 400)
    put(tmp_path, "class/hwmon/hwmon1/name", "nvme")
    clock = Clock()
    energy = Energy(tmp_path, clock, 0)
    assert energy.kind == "ina3221"
    clock.now += 2
    assert energy.joules() == pytest.approx(10)
    rail(tmp_path, 1, "VDD_IN", 5000, 2000)
    clock.now += 1
    assert energy.joules() == pytest.approx(10 + 7.5)


def test_without_a_rail_for_the_whole_board_all_rails_are_added(tmp_path):
    rail(tmp_path, 1, "VDD_GPU_SOC", 20_000, 100)
    rail(tmp_path, 2, "VDD_CPU_CV", 20_000, 50)
    rail(tmp_path, 3, "VIN_SYS_5V0", 5000, 200)
    rail(tmp_path, 1, "VDDQ_VDD2_1V8AO", 5000, 300, 1)  # fed by VIN_SYS_5V0
    rail(tmp_path, 2, "CV", 5000, 300, 1)
    put(tmp_path, "class/hwmon/hwmon0/in7_label", "sum of shunt voltages")
    put(tmp_path, "class/hwmon/hwmon0/in7_input", 99999)
    put(tmp_path, "class/hwmon/hwmon1/in2_enable", 0)
    clock = Clock()
    energy = Energy(tmp_path, clock, 0)
    clock.now += 1
    assert energy.joules() == pytest.approx(2 + 1 + 1)
    put(tmp_path, "class/hwmon/hwmon0/in3_enable", 0)
    energy = Energy(tmp_path, clock, 0)
    clock.now += 1
    assert energy.joules() == pytest.approx(2 + 1 + 1.5)


def test_older_kernels_tell_power_itself(tmp_path):
    for channel, label, milliwatts in ((0, "POM_5V_IN", 4000), (1, "POM_5V_GPU", 500)):
        put(tmp_path, f"bus/iio/devices/iio:device0/rail_name_{channel}", label)
        put(tmp_path, f"bus/iio/devices/iio:device0/in_power{channel}_input", milliwatts)
    clock = Clock()
    energy = Energy(tmp_path, clock, 0)
    clock.now += 3
    assert energy.joules() == pytest.approx(12)


def test_a_sensor_that_stops_telling_gives_none(tmp_path):
    rail(tmp_path, 1, "VDD_IN", 5000, 1000)
    energy = Energy(tmp_path, period=0)
    put(tmp_path, "class/hwmon/hwmon0/curr1_input", "")
    assert energy.joules() is None


def test_power_is_looked_at_meanwhile(tmp_path):
    rail(tmp_path, 1, "VDD_IN", 5000, 1000)
    calls: list[float] = []

    def clock() -> float:
        calls.append(0.0)
        return float(len(calls))

    with Energy(tmp_path, clock, 0.001) as energy:
        while len(calls) < 5:
            time.sleep(0.001)
        assert energy.joules() > 5
