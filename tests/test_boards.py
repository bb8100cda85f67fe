"""Board profiles, what a machine is, the memory cgroup, and saved calibrations."""

from __future__ import annotations

import dataclasses
import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import onnx
import pytest

from edgeadapt.bundle import atomic
from edgeadapt.cache import cache_folder
from edgeadapt.devices import boards
from edgeadapt.devices.boards import calibration, floor, probe
from edgeadapt.errors import EdgeAdaptError, InputError, UsageError
from tests import fakemachine as fake

pytestmark = pytest.mark.device

PROFILES = sorted(Path(boards.__file__).parent.glob("*.toml"))
MIB = 1 << 20

PLAIN = """
name = "My board"
arch = "aarch64"
cores = 2
isa = ["neon"]
page = "4KiB"
total = "1GiB"
usable = "900MiB"
unified_gpu = false
floor = "50MB"
floor_known = "measured"
gflops = 5
gbps = 2.5
rates_known = "estimated"
"""


def written(tmp_path: Path, text: str, name: str = "mine.toml") -> Path:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


# ---- profiles


def test_the_boards_that_are_promised_are_there():
    wanted = {"pi-zero-2w", "pi3b+", "pi4-1gb", "pi4-2gb", "pi4-4gb", "pi4-8gb", "pi5-8gb", "jetson-nano-4gb", "orin-nano-8gb", "orin-nx-16gb"}
    assert wanted | {"agx-orin-64gb", "x86-64-8gb", "aarch64-1gb"} <= set(boards.keys())
    assert len(boards.keys()) == len(set(boards.keys()))


@pytest.mark.parametrize("key", boards.keys())
def test_every_profile_is_sound(key):
    board = boards.load(key)
    assert board.key == key
    assert board.floor < 64_000_000 < board.memory < board.total
    assert board.arm == ("neon" in board.isa)
    assert set(board.isa) <= {*probe.ARM_SETS.values(), *probe.X86_SETS}
    assert board.rates_known == "estimated"
    assert board.floor_known == ("estimated" if board.arm else "measured")
    assert board.floor_from
    assert board.rates_from
    assert board.note


def test_facts_of_the_cores():
    assert boards.load("pi4").isa == ("neon",)
    assert boards.load("pi5").isa == ("neon", "dotprod", "fp16")
    assert boards.load("pi5").page == 16384
    assert boards.load("pi4").page == 4096
    assert boards.load("pi5").floor > boards.load("pi4").floor
    assert [boards.load(f"orin-nx-{size}").cores for size in ("8gb", "16gb")] == [6, 8]
    assert all(boards.load(key).unified_gpu for key in ("jetson-nano", "orin-nano", "orin-nx", "agx-orin"))


def test_a_key_without_a_size_is_the_smallest_and_memory_can_be_given():
    assert boards.load("pi4") == boards.load("pi4-1gb")
    assert boards.load("PI4-2GB").name == "Raspberry Pi 4, 2 GB"
    assert boards.load("pi4-8gb", memory=300 * MIB).memory == 300 * MIB
    assert boards.load("pi-zero-2w", memory=600 * MIB).total == 600 * MIB
    with pytest.raises(UsageError, match=r"onnxruntime alone take 48\.9 MiB"):
        boards.load("pi4", memory=40 * MIB)


def test_an_unknown_key_says_what_is_near():
    with pytest.raises(UsageError, match="did you mean pi4") as raised:
        boards.load("pi4-3gb")
    assert "here, aarch64-1gb" in raised.value.hint


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.stem)
def test_shipped_files_name_their_sources(path):
    text = path.read_text(encoding="utf-8")
    assert re.search(r"^floor_from = ", text, re.MULTILINE)
    assert re.search(r"^# .*MemTotal", text, re.MULTILINE)


def test_a_profile_of_ones_own(tmp_path):
    board = boards.load(written(tmp_path, PLAIN))
    assert (board.key, board.memory, board.floor, board.gflops, board.note, board.arm) == ("mine", 900 * MIB, 50_000_000, 5.0, "", True)
    sized = PLAIN.replace('total = "1GiB"\nusable = "900MiB"\n', "") + '[sizes.2gb]\ntotal = 2000000000\nusable = "1.5GB"\ncores = 4\n'
    assert boards.load(written(tmp_path, sized)).name == "My board"
    assert [board.key for board in boards.read(tmp_path / "mine.toml").boards()] == ["mine-2gb"]
    assert boards.load(tmp_path / "mine.toml").cores == 4


@pytest.mark.parametrize(
    ("line", "instead", "told"),
    [
        ('name = "My board"', "", r"mine\.toml: name: expected a text, got nothing \(the field is missing\)"),
        ('name = "My board"', 'name = ""', "name: expected a text of at most 100 characters, got ''"),
        ('arch = "aarch64"', 'arch = "arm64"', """arch: expected "aarch64" or "x86-64", got 'arm64'"""),
        ("cores = 2", "cores = 2.5", r"cores: expected a whole number from 1 to 4096, got 2\.5"),
        ("cores = 2", "cores = true", "cores: expected a whole number"),
        ("cores = 2", "cores = 0", "cores: expected a whole number"),
        ('isa = ["neon"]', 'isa = "neon"', "isa: expected a list of texts"),
        ('isa = ["neon"]', 'isa = ["neon dotprod"]', "isa: expected a list of texts"),
        ('page = "4KiB"', 'page = "5KiB"', "page: expected 4KiB, 16KiB or another power of two"),
        ('page = "4KiB"', 'page = "1MiB"', "page: expected 4KiB"),
        ('usable = "900MiB"', 'usable = "2GiB"', "usable: expected at most the total of 1 GiB, got 2 GiB"),
        ('usable = "900MiB"', 'usable = "lots"', """usable: expected a size such as "906MiB", or bytes, got 'lots'"""),
        ('usable = "900MiB"', "usable = -1", "usable: expected a size"),
        ('usable = "900MiB"', "usable = 1.5", "usable: expected a size"),
        ('total = "1GiB"', 'total = "2000000GiB"', "total: expected less than 1 PiB"),
        ('floor = "50MB"', 'floor = "901MiB"', "floor: expected less than the usable memory of 900 MiB"),
        ('floor_known = "measured"', 'floor_known = "guessed"', 'floor_known: expected "measured" or "estimated"'),
        ("unified_gpu = false", 'unified_gpu = "no"', "unified_gpu: expected true or false, got 'no'"),
        ("gflops = 5", "gflops = nan", "gflops: expected a positive number"),
        ("gflops = 5", "gflops = 0", "gflops: expected a positive number"),
        ("gbps = 2.5", 'gbps = "2.5"', "gbps: expected a positive number"),
        ("gbps = 2.5", "gbps = 2.5\nclock = 1.8", "clock: there is no such field"),
        ("gbps = 2.5", "gbps = 2.5\ncode = '51MB'", "code: expected less than the floor of 47.7 MiB"),
        ("gbps = 2.5", "gbps = 2.5\ncode = 1.5", "code: expected a size"),
        ("gbps = 2.5", "gbps = 2.5\nmodel = ['x']", "model: there is no such field"),
        ("cores = 2", "cores = ", "is not TOML"),
        ("cores = 2", "cores = 2\ncores = 3", "is not TOML"),
        ("gbps = 2.5", "gbps = 2.5\n[calibration]\nmachine = 'x'", r"calibration\.date: expected a text"),
        ("gbps = 2.5", "gbps = 2.5\n[sizes.big]", r"sizes\.big: expected a size's name"),
        ("gbps = 2.5", "gbps = 2.5\n[sizes]", "sizes: expected a table for each memory size"),
        ("gbps = 2.5", "gbps = 2.5\nsizes = 3", "sizes: expected a table, got 3"),
        ("gbps = 2.5", "gbps = 2.5\n[sizes.1gb]\ntotal = '1GB'", r"sizes\.1gb\.usable: expected a size"),
        ("gbps = 2.5", "gbps = 2.5\n[sizes.1gb]\ntotal = '1GB'\nusable = '1GB'\nx = 1", r"sizes\.1gb\.x: there is no such field"),
    ],
)
def test_a_mistake_names_file_field_and_what_was_expected(tmp_path, line, instead, told):
    assert line in PLAIN
    text = PLAIN.replace(line + "\n", "") if instead.startswith(line) else PLAIN.replace(line, instead)
    if instead.startswith(line):  # what follows may be a table, which ends the fields before it
        text += instead + "\n"
    with pytest.raises(InputError, match=told) as raised:
        boards.load(written(tmp_path, text))
    assert str(tmp_path / "mine.toml") in raised.value.message
    assert "docs/boards.md" in raised.value.hint


def test_a_near_miss_of_a_field_is_guessed(tmp_path):
    with pytest.raises(InputError) as raised:
        boards.load(written(tmp_path, PLAIN + "notes = 'x'\n"))
    assert raised.value.hint.startswith("did you mean note?")


@pytest.mark.parametrize("data", [b"\xff\xfe", b"name = 1\n" + b"#" * (1 << 17), b"[" * 40000])
def test_files_that_are_no_profiles(tmp_path, data):
    path = tmp_path / "odd.toml"
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"odd\.toml"):
        boards.load(path)
    with pytest.raises(InputError, match="cannot be read"):
        boards.load(f"{tmp_path}/")
    with pytest.raises(UsageError, match="there is no board profile"):
        boards.load(tmp_path / "none.toml")


# ---- machines


def test_a_raspberry_pi_as_it_boots(tmp_path):
    machine = probe.look(fake.pi4(tmp_path))
    assert machine.model == "Raspberry Pi 4 Model B Rev 1.4"
    assert (machine.cpu, machine.arch, machine.bits, machine.page, machine.cores) == ("Cortex-A72", "aarch64", 64, 4096, 4)
    assert machine.isa == ("neon",)
    assert machine.is_raspberry
    assert (machine.cgroup.version, machine.cgroup.state, machine.cgroup.disabled) == (2, "off", True)
    assert not machine.pressure
    assert machine.swaps == (probe.Swap("/var/swap", 524272 * 1024, 1024 * 1024, False),)
    assert (machine.memory_total, machine.usable) == (3884256 * 1024, 3500000 * 1024)
    assert (machine.overcommit, machine.address_limit, machine.gpu) == (0, None, "")


def test_the_last_word_on_the_kernels_command_line_counts(tmp_path):
    off = fake.pi4(tmp_path / "a", line="cgroup_enable=memory x cgroup_disable=cpu,memory")
    assert probe.look(off).cgroup.disabled
    pending = fake.pi4(tmp_path / "b", line=fake.PI_LINE + " cgroup_enable=memory")
    assert not probe.look(pending).cgroup.disabled


def test_a_pi_5_with_nested_limits(tmp_path):
    machine = probe.look(fake.pi5(tmp_path))
    assert (machine.page, machine.isa, machine.pressure) == (16384, ("neon", "dotprod", "fp16"), True)
    assert machine.swaps[0].zram
    group = machine.cgroup
    assert (group.version, group.state, group.limit, group.high, group.current) == (2, "on", 200 * MIB, 192 * MIB, 60 * MIB)
    assert group.room == 100 * MIB == machine.usable  # the slice above is the narrower: 200 - (180 - 80) of files that can be dropped
    assert group.pressure
    assert group.path == "/sys/fs/cgroup/edge.slice/edgeadapt.service"


def test_a_container_sees_its_own_limit_and_the_hosts_memory(tmp_path):
    machine = probe.look(fake.container(tmp_path / "a"))
    assert (machine.cgroup.state, machine.cgroup.limit, machine.cgroup.room) == ("on", 512 * MIB, 452 * MIB)
    assert machine.usable == 452 * MIB < machine.memory_available
    free = probe.look(fake.container(tmp_path / "b", limit=None))
    assert (free.cgroup.limit, free.cgroup.room, free.usable) == (None, None, free.memory_available)
    assert (free.arch, free.cpu, free.isa[-1]) == ("x86-64", "Some CPU", "avx2")


def test_version_1(tmp_path):
    group = probe.look(fake.version1(tmp_path)).cgroup
    assert (group.version, group.state, group.limit, group.current) == (1, "on", 1 << 30, 300 * MIB)
    assert group.room == (1 << 30) - 220 * MIB
    (tmp_path / "sys/fs/cgroup/memory/memory.stat").write_text("cache 0\n")
    assert probe.look(tmp_path).cgroup.limit is None
    (tmp_path / "sys/fs/cgroup/memory/memory.usage_in_bytes").unlink()
    assert probe.look(tmp_path).cgroup.state == "idle"


def test_a_jetson(tmp_path):
    machine = probe.look(fake.jetson(tmp_path))
    assert (machine.cpu, machine.gpu, machine.cores, machine.cores_online) == ("Cortex-A78AE", "jetson", 4, 6)
    assert machine.cgroup.state == "idle"  # the root group counts nobody
    fake.put(tmp_path, "proc/self/cgroup", "0::/../elsewhere\n")
    assert probe.look(tmp_path).cgroup.path == "/sys/fs/cgroup"


def test_a_desktops_gpu_and_dmi(tmp_path):
    fake.container(tmp_path)
    fake.put(tmp_path, "proc/driver/nvidia/version", "NVRM version: 550\n")
    fake.put(tmp_path, "sys/class/dmi/id/sys_vendor", "ACME\n")
    fake.put(tmp_path, "sys/class/dmi/id/product_name", "Box 3\n")
    fake.put(tmp_path, "proc/self/limits", "Max address space         4294967296           unlimited            bytes\n")
    machine = probe.look(tmp_path)
    assert (machine.gpu, machine.model, machine.address_limit) == ("nvidia", "ACME Box 3", 1 << 32)
    assert not boards.here(tmp_path, tmp_path).unified_gpu


def test_a_32_bit_userland_on_a_64_bit_kernel(tmp_path):
    machine = probe.look(fake.machine(tmp_path, "Raspberry Pi 3 Model B Plus Rev 1.3", elf=fake.ARM32))
    assert (machine.arch, machine.bits) == ("arm", 32)


def test_a_machine_that_tells_nothing(tmp_path):
    machine = probe.look(tmp_path)
    assert (machine.model, machine.arch, machine.bits, machine.cores, machine.usable) == ("", "unknown", 0, 1, 0)
    assert (machine.cgroup.version, machine.cgroup.state) == (0, "off")
    assert boards.here(tmp_path, tmp_path).key == "x86-64"


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("proc/self/exe", "#!/bin/sh"),
        ("proc/self/auxv", "odd"),
        ("proc/self/status", "Cpus_allowed_list:\tx-y,3-\n"),
        ("proc/meminfo", "MemTotal: many kB\n:::\n"),
        ("proc/swaps", "a\nb c\n/x file y z 1\n"),
        ("proc/self/mountinfo", "- - -\n1 2 3\n - cgroup2\n"),
        ("proc/self/cgroup", "x\n::\n0:memory\n"),
        ("proc/self/limits", "Max address space\n"),
        ("proc/cpuinfo", "CPU implementer\t: 0xzz\nFeatures\n"),
        ("sys/fs/cgroup/cgroup.controllers", "\0\xff"),
    ],
)
def test_damaged_files_are_as_good_as_none(tmp_path, path, text):
    fake.put(fake.pi4(tmp_path), path, text.encode("latin-1"))
    assert probe.look(tmp_path).cores >= 1
    assert boards.here(tmp_path, tmp_path).memory > 0


def test_the_real_machine():
    machine = probe.look()
    assert machine.bits == 64
    assert machine.page == os.sysconf("SC_PAGE_SIZE")
    assert machine.cores == len(os.sched_getaffinity(0))
    assert 0 < machine.usable <= machine.memory_total
    assert machine.isa
    assert boards.load("here").arm == (machine.arch == "aarch64")


# ---- this machine as a board


@pytest.mark.parametrize(
    ("make", "key", "cores"),
    [(fake.pi4, "pi4", 4), (fake.pi5, "pi5", 4), (fake.jetson, "orin-nano", 4), (fake.container, "x86-64", 4), (fake.version1, "x86-64", 4)],
)
def test_here_is_recognised(tmp_path, make, key, cores):
    board = boards.here(make(tmp_path), tmp_path)
    machine = probe.look(tmp_path)
    assert (board.key, board.cores, board.page, board.memory, board.isa) == (key, cores, machine.page, machine.usable, machine.isa)
    assert board.name == (machine.model or machine.cpu)
    assert (board.floor, board.floor_known, board.gflops) == (boards.load(key).floor, "estimated", boards.load(key).gflops)


@pytest.mark.parametrize(
    ("model", "key"),
    [
        ("Raspberry Pi Zero 2 W Rev 1.0", "pi-zero-2w"),
        ("Raspberry Pi 3 Model B Plus Rev 1.3", "pi3b+"),
        ("Raspberry Pi Compute Module 4 Rev 1.1", "pi4"),
        ("Raspberry Pi 400 Rev 1.0", "pi4"),
        ("Raspberry Pi Compute Module 5 Rev 1.0", "pi5"),
        ("NVIDIA Jetson Nano Developer Kit", "jetson-nano"),
        ("NVIDIA Jetson Orin NX Engineering Reference Developer Kit", "orin-nx"),
        ("NVIDIA Jetson AGX Orin Developer Kit", "agx-orin"),
        ("Radxa ROCK 5B", "aarch64"),
    ],
)
def test_models_of_the_device_tree(tmp_path, model, key):
    assert boards.here(fake.machine(tmp_path, model), tmp_path).key == key


def test_other_pages_than_the_profiles_change_the_floor(tmp_path):
    small = boards.here(fake.machine(tmp_path / "a", "Raspberry Pi 5 Model B", page=4096), tmp_path)
    assert small.floor < boards.load("pi5").floor
    assert boards.here(fake.machine(tmp_path / "b", "Radxa ROCK 5B", page=65536), tmp_path).floor > small.floor


# ---- calibrations


MADE = boards.Calibration(
    machine="", date="2026-01-01T00:00:00+00:00", edgeadapt="0.1.0", python="3.11.2", numpy="2.4.6", onnxruntime="1.31.1",
    threads=4, gflops_all=30.5, matmul=12.25, matmul_all=40.0,
)  # fmt: skip


def calibrated(root: Path, cache: Path) -> Path:
    """Writes a calibration for the machine under a root, with figures of its own."""
    machine = probe.look(root)
    board = dataclasses.replace(
        boards.here(root, cache), floor=61_000_000, floor_known="measured", floor_from='a "test"', gflops=9.5, gbps=4.25, rates_known="measured",
        code=12_345_678,
    )  # fmt: skip
    path = calibration.place(machine, cache)
    calibration.prepare_folder(path)
    calibration.write(path, board, dataclasses.replace(MADE, machine=machine.fingerprint))
    return path


def test_a_calibration_is_used_here_and_is_a_profile_elsewhere(tmp_path):
    root, cache = fake.pi4(tmp_path / "root"), tmp_path / "cache"
    path = calibrated(root, cache)
    board = boards.here(root, cache)
    assert (board.floor, board.floor_known, board.floor_from, board.gflops, board.gbps, board.rates_known) == (
        61_000_000, "measured", 'a "test"', 9.5, 4.25, "measured",
    )  # fmt: skip
    assert board.code == 12_345_678
    assert board.memory == probe.look(root).usable
    elsewhere = boards.load(path)
    assert dataclasses.replace(elsewhere, key="pi4") == board
    assert boards.read(path).calibration == dataclasses.replace(MADE, machine=probe.look(root).fingerprint)
    assert not list(path.parent.glob(".*"))


def test_a_calibration_of_another_machine_or_a_damaged_one_is_not_used(tmp_path):
    root, cache = fake.pi4(tmp_path / "root"), tmp_path / "cache"
    path = calibrated(root, cache)
    other = calibration.place(probe.look(fake.pi5(tmp_path / "five")), cache)
    assert other != path
    path.rename(other)
    with pytest.raises(InputError, match="no calibration of this machine"):
        calibration.saved(probe.look(tmp_path / "five"), cache)
    assert boards.here(root, cache).floor_known == "estimated"
    path.write_bytes(other.read_bytes()[:200])
    assert boards.here(root, cache).floor_known == "estimated"
    with pytest.raises(InputError, match=re.escape(str(path))):
        calibration.saved(probe.look(root), cache)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_full_or_read_only_disk_leaves_what_was_there(tmp_path, monkeypatch, number):
    root, cache = fake.pi4(tmp_path / "root"), tmp_path / "cache"
    path = calibrated(root, cache)
    before = path.read_bytes()

    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(atomic.os, "fsync", refuse)
    board = boards.load(path)
    with pytest.raises(EdgeAdaptError, match=re.escape(os.strerror(number))) as raised:
        calibration.write(path, board, MADE)
    assert "XDG_CACHE_HOME" in raised.value.hint
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_folder_that_cannot_be_made_is_refused_before_anything_is_measured(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(EdgeAdaptError, match="cannot be written to"):
        calibration.prepare_folder(tmp_path / "file" / "boards" / "x.toml")


def test_where_calibrations_are_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("EDGEADAPT_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"
    monkeypatch.delenv("EDGEADAPT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "edgeadapt"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert cache_folder() == Path("/home/somebody/.cache/edgeadapt")
    monkeypatch.delenv("HOME")
    assert cache_folder().parts[-2:] == (".cache", "edgeadapt")


def test_storage(tmp_path):
    state = probe.storage(tmp_path / "a" / "b")
    assert state.path == str(tmp_path / "a" / "b")
    assert state.free > 0
    assert not state.refused
    (tmp_path / "file").write_text("x")
    assert "is not a folder" in probe.storage(tmp_path / "file" / "a").refused


# ---- the floor's child


def test_the_trivial_model_is_one():
    model = onnx.load_model_from_string(floor.TRIVIAL)
    onnx.checker.check_model(model, full_check=True)
    assert [node.op_type for node in model.graph.node] == ["Relu"]


def test_the_floor_is_measured_in_a_child():
    found = floor.look()
    assert found.error == ""
    assert 0 < found.bare < found.with_numpy < found.with_onnxruntime <= found.floor
    assert 0 <= found.code < found.floor
    assert "CPUExecutionProvider" in found.providers
    assert found.python == sys.version.split()[0]


@pytest.mark.parametrize(
    ("script", "told"),
    [
        ("kill -ILL $$", "SIGILL"),
        ("echo broken >&2; exit 3", "ended with code 3: broken"),
        ("sleep 20", "did not load within 0.2 seconds"),
        ("""echo '{"python": "3.11.2", "error": "ImportError: no wheel"}'""", "ImportError: no wheel"),
    ],
)
def test_a_child_that_fails_says_why(tmp_path, script, told):
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{script.replace('sleep', 'exec sleep')}\n")
    python.chmod(0o755)
    assert told in floor.look(str(python), 0.2 if "sleep" in script else 60).error
    assert "does not start" in floor.look(str(tmp_path / "none")).error


def test_boards_load_no_heavy_library():
    code = "import sys, edgeadapt.devices.boards as b; b.here(); print(sorted({'numpy', 'onnx', 'onnxruntime', 'torch'} & {*sys.modules}))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
