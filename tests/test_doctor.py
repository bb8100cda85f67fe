"""`edgeadapt doctor`: what it says of machines we do not have, and of this one."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from edgeadapt.cli import doctor, main
from edgeadapt.devices import boards
from edgeadapt.devices.boards import examine
from edgeadapt.devices.boards.floor import Floor
from edgeadapt.runtime.daemon import config
from tests import child
from tests import fakemachine as fake
from tests.test_boards import calibrated

pytestmark = pytest.mark.device

GOOD = Floor(
    "3.11.2", "2.4.6", "1.31.1", bare=11 << 20, with_numpy=26 << 20, with_onnxruntime=42 << 20, floor=50 << 20, providers=("CPUExecutionProvider",)
)


@pytest.fixture(autouse=True)
def no_daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No configuration of the machine's own; tests/test_examine.py has what is said of a daemon."""
    monkeypatch.setattr(config, "DEFAULT_PATH", str(tmp_path / "none.toml"))


def problems(report: examine.Report) -> dict[str, str]:
    return {problem.text: problem.fix for problem in report.problems}


def ability(report: examine.Report, subject: str) -> examine.Ability:
    return next(found for found in report.abilities if found.subject.startswith(subject))


def test_raspberry_pi_os_as_it_boots(tmp_path):
    report = examine.look(fake.pi4(tmp_path), tmp_path / "cache", GOOD)
    assert report.usable
    texts = problems(report)
    fix = next(fix for text, fix in texts.items() if "memory cgroup is off, as Raspberry Pi OS boots" in text)
    assert fix == "add cgroup_enable=memory cgroup_memory=1 to /boot/firmware/cmdline.txt (one line) and reboot"
    assert any(fix.startswith("add psi=1 to") for fix in texts.values())
    assert not ability(report, "limit").able
    assert ability(report, "pressure").text == "not available: memory shortage of the system is seen by MemAvailable only"
    assert "512 MiB on a disk" in ability(report, "no swapping").text
    text = doctor.summary(report)
    assert "Raspberry Pi 4 Model B Rev 1.4; profile pi4" in text
    assert "Cortex-A72, 4 of 4 cores; neon; without dotprod, fp16, i8mm" in text
    assert "memory cgroup" in text
    assert all(len(line) <= 118 and line == line.rstrip() for line in text.splitlines())


def test_a_pi_with_everything_turned_on_has_no_problems(tmp_path):
    report = examine.look(fake.pi5(tmp_path), tmp_path / "cache", GOOD)
    assert problems(report) == {}
    assert ability(report, "limit").text == "version 2, ends the process above 200 MiB, reclaims from 192 MiB, 60 MiB held now"
    assert ability(report, "pressure").text == "of the system and of this group"
    assert "compressed memory (zram)" in ability(report, "no swapping").text
    assert "pages of 16 KiB" in doctor.summary(report)
    assert "no problems" in doctor.summary(report)


def test_a_jetson_and_its_gpu(tmp_path):
    report = examine.look(fake.jetson(tmp_path), tmp_path / "cache", GOOD)
    assert ability(report, "GPU").text.startswith("CUDA memory comes out of the same memory and is not counted by cgroups")
    assert "this onnxruntime has no CUDA provider: onnxruntime-gpu has" in ability(report, "CUDA").text
    assert "in no group that is counted" in ability(report, "limit").text
    assert "4 of 6 cores" in doctor.summary(report)


def test_a_cuda_provider_is_started(tmp_path):
    with_cuda = dataclasses.replace(GOOD, providers=("CUDAExecutionProvider", "CPUExecutionProvider"))
    asked = []

    def fails(name: str) -> str:
        asked.append(name)
        return "libcudnn.so.9 is not there"

    report = examine.look(fake.jetson(tmp_path), tmp_path, with_cuda, fails)
    assert asked == ["CUDAExecutionProvider"]
    assert ability(report, "CUDA provider").text == "does not start: libcudnn.so.9 is not there"
    assert "onnxruntime's CUDA provider does not start: libcudnn.so.9 is not there" in problems(report)
    assert report.usable  # on the processor
    assert "providers   CUDA, CPU" in doctor.summary(report)
    works = examine.look(fake.jetson(tmp_path), tmp_path, with_cuda, lambda _: "")
    assert ability(works, "CUDA provider").able
    assert not any("CUDA" in text for text in problems(works))
    assert not any(entry.subject == "CUDA provider" for entry in examine.look(fake.pi5(tmp_path / "pi"), tmp_path, GOOD, fails).abilities)


def test_a_provider_that_this_onnxruntime_lacks_does_not_start():
    """A real child: onnxruntime takes the CPU instead and says nothing, which counts as not started."""
    assert examine.floor.start("CPUExecutionProvider") == ""
    assert examine.floor.start("NoSuchExecutionProvider") != ""
    assert examine.floor.start("CPUExecutionProvider", python="/no/such/python").startswith("/no/such/python does not start")
    assert "within 0.001 seconds" in examine.floor.start("CPUExecutionProvider", timeout=0.001)


def test_a_container(tmp_path):
    report = examine.look(fake.container(tmp_path), tmp_path / "cache", GOOD)
    assert problems(report) == {}
    assert "ends the process above 512 MiB" in ability(report, "limit").text
    tight = examine.look(fake.container(tmp_path / "tight", limit=80 << 20), tmp_path / "cache", GOOD)
    assert any(text.startswith("only 20 MiB are usable now") for text in problems(tight))


def test_other_kernels_without_a_memory_cgroup(tmp_path):
    root = fake.machine(tmp_path / "a", "Radxa ROCK 5B")
    assert any("has no memory cgroup" in text for text in problems(examine.look(root, tmp_path, GOOD)))
    fake.put(root, "proc/cmdline", "cgroup_disable=memory")
    fake.put(root, "proc/self/mountinfo", fake.CGROUP2.format(base="/") + "\n")
    assert any("off by the kernel's command line" in text for text in problems(examine.look(root, tmp_path, GOOD)))
    fake.put(root, "proc/self/limits", "Max address space         268435456            unlimited            bytes\n")
    fake.put(root, "proc/sys/vm/overcommit_memory", "2\n")
    report = examine.look(root, tmp_path, GOOD)
    assert any("limited to 256 MiB" in text for text in problems(report))
    assert ability(report, "strict allocation").able


@pytest.mark.parametrize(
    ("loaded", "told"),
    [
        (Floor("3.11.2", "2.4.6", error="ImportError: libgomp.so.1: cannot open"), "onnxruntime does not work: ImportError: libgomp.so.1"),
        (dataclasses.replace(GOOD, onnxruntime="1.22.1"), "onnxruntime 1.22.1 is too old: at least 1.23 is needed"),
    ],
)
def test_without_a_working_onnxruntime_it_cannot_be_used(tmp_path, loaded, told):
    report = examine.look(fake.pi5(tmp_path), tmp_path, loaded)
    assert not report.usable
    assert report.problems[0].fatal
    assert report.problems[0].text.startswith(told)
    text = doctor.summary(report)
    assert f"  ! {told}" in text
    assert text.endswith("until the problems marked ! are mended")


def test_a_32_bit_userland_cannot_be_used(tmp_path):
    report = examine.look(fake.machine(tmp_path, "Raspberry Pi 4 Model B", elf=fake.ARM32), tmp_path, GOOD)
    assert not report.usable
    assert "32-bit userland (arm)" in report.problems[0].text


def test_a_machine_without_proc_cannot_be_used(tmp_path):
    report = examine.look(tmp_path, tmp_path, GOOD)
    assert "mount /proc" in report.problems[0].fix
    assert doctor.summary(report)


def test_an_older_onnxruntime_tells_no_memory(tmp_path):
    older = examine.look(fake.pi5(tmp_path), tmp_path, dataclasses.replace(GOOD, onnxruntime="1.23.2"))
    assert older.usable
    assert not ability(older, "memory per node").able
    assert "(from 1.28)" in ability(older, "memory per node").text
    assert ability(examine.look(tmp_path, tmp_path, GOOD), "memory per node").able


@pytest.mark.parametrize(("flags", "exact"), [("avx2", False), ("avx2 avx_vnni", True), ("avx2 avx512f avx512_vnni", True)])
def test_sums_of_8_bit_products_are_exact_with_vnni(tmp_path, flags, exact):
    fake.put(fake.container(tmp_path), "proc/cpuinfo", f"processor\t: 0\nmodel name\t: Some CPU\nflags\t\t: fpu sse4_2 {flags}\n\n")
    found = ability(examine.look(tmp_path, tmp_path, GOOD), "exact 8-bit sums")
    assert (found.able, "--quantize" in found.text) == (exact, not exact)


def test_calibrations_are_told(tmp_path):
    root, cache = fake.pi4(tmp_path / "root"), tmp_path / "cache"
    assert examine.look(root, cache, GOOD).calibration.startswith("none: speeds and the floor are estimates")
    path = calibrated(root, cache)
    fresh = examine.look(root, cache, GOOD)
    assert fresh.calibration.startswith("2026-01-01")
    assert not any("calibration" in text for text in problems(fresh))
    stale = examine.look(root, cache, dataclasses.replace(GOOD, onnxruntime="1.32.0"))
    assert problems(stale)["the calibration is of other versions: onnxruntime 1.31.1 then, 1.32.0 now"] == "run edgeadapt calibrate again"
    path.write_text("floor = 3\n")
    damaged = examine.look(root, cache, GOOD)
    assert any(text.startswith(f"the saved calibration is not used: {path}: cores") for text in problems(damaged))
    assert damaged.board.floor_known == "estimated"


def test_a_cache_folder_that_cannot_be_used(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    report = examine.look(fake.pi5(tmp_path / "root"), tmp_path / "file" / "cache", GOOD)
    assert any("is not a folder" in text for text in problems(report))
    monkeypatch.setattr(examine, "LEAST_FREE", 1 << 60)
    full = examine.look(tmp_path / "root", tmp_path / "cache", GOOD)
    assert any(text.startswith("only ") and "free for the cache folder" in text for text in problems(full))


def test_libraries_that_are_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr(examine, "_installed", lambda name: "")
    texts = problems(examine.look(fake.pi5(tmp_path), tmp_path, GOOD))
    assert list(texts.values()) == ["pip install onnx", "pip install pyserial"]


def test_the_real_machine(capsys):
    assert main.main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "what can be enforced or seen here" in text
    assert f"onnxruntime {examine.floor.look().onnxruntime}" in text
    assert main.main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["usable"] is True
    assert found["floor"]["floor"] > found["floor"]["bare"] > 0
    assert found["machine"]["cgroup"]["state"] in ("on", "idle", "off")
    assert {entry["subject"] for entry in found["abilities"]} >= {"limit (memory cgroup)", "pressure (PSI)"}


def test_the_exit_code_says_that_it_cannot_be_used(tmp_path, monkeypatch, capsys):
    look = examine.look
    root = fake.machine(tmp_path, elf=fake.ARM32)
    monkeypatch.setattr(examine, "look", lambda: look(root, tmp_path, GOOD))
    assert main.main(["doctor"]) == 1
    assert "cannot be used here" in capsys.readouterr().out
    assert main.main(["doctor", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["problems"][0]["fatal"] is True


def test_boards_are_listed(capsys):
    assert main.main(["doctor", "--boards"]) == 0
    rows = [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]]
    assert rows == boards.keys()
    assert main.main(["doctor", "--boards", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [entry["key"] for entry in listed] == boards.keys()


def test_the_examples_of_the_documentation_are_true(tmp_path):
    """The profile in docs/boards.md is one, and its table of fields is complete."""
    document = Path(__file__).resolve().parents[1] / "docs" / "boards.md"
    text = document.read_text(encoding="utf-8")
    example = tmp_path / "example.toml"
    example.write_text(text.split("```toml\n")[1].split("```")[0], encoding="utf-8")
    board = boards.load(example)
    assert board.memory < board.total
    for entry in dataclasses.fields(board):
        name = {"memory": "usable", "arm": "arch"}.get(entry.name, entry.name)
        assert entry.name == "key" or f"`{name}`" in text, name


def test_it_runs_where_numpy_and_onnxruntime_do_not_load(tmp_path):
    """The child finds the same broken libraries as the command, and the command needs neither."""
    for name in ("numpy", "onnxruntime"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('made for another processor')\n")
    paths = [str(tmp_path), child.environment()["PYTHONPATH"]]
    environment = {**child.environment(), "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-m", "edgeadapt", "doctor"]
    ended = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 1
    assert "! onnxruntime does not work: ImportError: made for another processor" in ended.stdout
    assert ended.stderr == ""
