"""The commands that ask a daemon, against a control socket with toy verbs."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from edgeadapt.cli import main
from edgeadapt.cli import status as command
from edgeadapt.errors import EdgeAdaptError, StateError
from edgeadapt.runtime.daemon.control import Control
from edgeadapt.runtime.daemon.status import VERSION, Status
from tests import child

pytestmark = pytest.mark.device

STATUS: Status = {
    "version": VERSION,
    "name": "kitchen",
    "edgeadapt": "1.2.3",
    "uptime_s": 11530.0,
    "mode": "serving",
    "reason": "",
    "bundle": {"name": "model.edgeadapt", "digest": "0123456789abcdef", "method": "eata", "compatible": "fedcba", "on_trial": True},
    "guard": {
        "state": "adapting",
        "since_s": 130.0,
        "windows": 431,
        "shift": 0.3416,
        "collapse": {"spread": 0.93, "entropy": 0.1, "runs": None, "agreement": None, "kept": None, "moved": 0.02},
        "last": "window 420: adapting: the stream is shifted",
    },
    "adaptation": {
        "enabled": True,
        "paused": False,
        "steps": 120,
        "rejected": 1,
        "paused_steps": 0,
        "windows": 431,
        "passed": 2,
        "late": 0,
    },
    "source": {
        "type": "serial",
        "name": "/dev/edgeadapt/imu0",
        "live": True,
        "complaint": "",
        "last_frame_s": 0.1,
        "counts": {"crc": 3, "gaps": 0, "breaks": 1},
    },
    "queue": {"length": 1, "limit": 8, "dropped": 12},
    "predictions": {"count": 4312, "bad": 1, "per_second": 9.83, "latency_ms": {"p50": 12.3, "p95": 15.16, "p99": 22.0}},
    "compare": {"frames": 400, "agreement": 0.9325},
    "memory": {"resident": 96 << 20, "peak": 100 << 20, "budget": 128 << 20, "level": 0, "reason": "", "lines": {"weights": 1 << 20}},
    "state": {
        "generation": 12,
        "active": 12,
        "last_good": 11,
        "on_probation": True,
        "written_today": 3 << 20,
        "bytes_per_day": 64 << 20,
        "degraded": "",
    },
    "interfaces": {"http": "", "mqtt": "broker:1883 cannot be reached: Connection refused"},
    "board": {"model": "Raspberry Pi 4 Model B Rev 1.4", "temperature_c": 61.24, "throttled": False, "load": 0.61},
    "events": [
        {"time": 1.7e9, "kind": "started", "text": "edgeadapt 1.2.3"},
        {"time": 1.7e9 + 60, "kind": "rolled back", "text": "its predictions narrow\x1b[31m\nand more"},
    ],
}

SUMMARY = """\
device      kitchen, serving, for 3 h 12 min; edgeadapt 1.2.3
bundle      model.edgeadapt (0123456789ab), eata, on trial
guard       adapting for 2 min, 431 windows, shift 0.342, spread 0.93, entropy 0.1, moved 0.02
            window 420: adapting: the stream is shifted
adaptation  120 steps on 431 windows, 1 dropped as not finite, 2 windows passed over
compared    agrees with the model as it began on 93.2 % of 400 frames
source      serial /dev/edgeadapt/imu0: last frame 0.1 s ago, crc 3, breaks 1
queue       1 of 8 frames wait, 12 dropped
predictions 4312 and 1 bad frame, 9.83 a second; half within 12.3 ms, 95 % within 15.2 ms, 99 % within 22 ms
memory      96 MiB held, 100 MiB at most so far, budget 128 MiB
state       generation 12, active 12 on probation, last good 11; 3 MiB of 64 MiB written today
board       Raspberry Pi 4 Model B Rev 1.4, 61.2 °C, not throttled, load 0.61
http        there
mqtt        broker:1883 cannot be reached: Connection refused
events      14 Nov 22:13:20  started: edgeadapt 1.2.3
            14 Nov 22:14:20  rolled back: its predictions narrow [31m and more"""


class Daemon:
    """Toy verbs, and what they were asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, Mapping[str, object]]] = []
        self.answer: object = {"text": "it is as it started", "window": 3}

    def verbs(self) -> dict[str, Any]:
        def writing(name: str) -> Any:
            def asked(params: Mapping[str, object]) -> object:
                self.asked.append((name, params))
                return self.answer

            return asked

        return {
            "status": lambda params: STATUS,
            "tail": self.tail,
            **{name: writing(name) for name in ("pause", "resume", "rollback", "mark-good", "label")},
        }

    def tail(self, params: Mapping[str, object]) -> Iterator[object]:
        self.asked.append(("tail", params))
        number = 0
        while number < 3 or not params.get("count"):
            number += 1
            yield {"number": number, "kind": "prediction", "text": "é", "facts": {"label": 3}} if number <= 3 else None
            if number > 3:
                time.sleep(0.005)


@pytest.fixture
def daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Daemon]:
    """It listens where the environment says."""
    found = Daemon()
    path = tmp_path / "control.sock"
    monkeypatch.setenv("EDGEADAPT_CONTROL__SOCKET", str(path))
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    with Control(path, found.verbs()):
        yield found
    monkeypatch.undo()
    time.tzset()


def test_status_in_words(daemon, capsys):
    assert main.main(["status"]) == 0
    assert capsys.readouterr() == (SUMMARY + "\n", "")


def test_status_as_json(daemon, capsys):
    assert main.main(["status", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == STATUS


def changed(**parts: Any) -> str:
    """The summary of the status with other values; those of a part that is a mapping are put into it."""
    status: Any = deepcopy(STATUS)
    for name, value in parts.items():
        status[name] = {**status[name], **value} if isinstance(value, dict) and isinstance(status[name], dict) else value
    return command.read(json.loads(json.dumps(status)))


NONE_YET = {"count": 0, "bad": 0, "per_second": None, "latency_ms": {"p50": None, "p95": None, "p99": None}}
FULL = {"active": None, "last_good": None, "on_probation": False, "bytes_per_day": None, "degraded": "the disk is full"}


@pytest.mark.parametrize(
    ("parts", "begin", "end"),
    [
        ({"mode": "safe", "reason": "state is corrupt", "uptime_s": 8.25}, "device ", ", safe (state is corrupt), for 8.2 s; edgeadapt 1.2.3"),
        ({"uptime_s": 200_000}, "device ", " for 2 d 7 h; edgeadapt 1.2.3"),
        ({"uptime_s": 59.9}, "device ", " for 59 s; edgeadapt 1.2.3"),
        ({"bundle": None}, "bundle ", " none"),
        ({"adaptation": {"enabled": False}}, "adaptation ", " off"),
        ({"adaptation": {"paused": True, "passed": 0, "late": 3}}, "adaptation  paused by hand; 120 steps on ", " finite, 3 answers late"),
        ({"adaptation": {"paused_steps": 4, "passed": 0}}, "adaptation  120 steps on ", ", 1 dropped as not finite, 4 not taken for want of memory"),
        ({"source": {"live": False, "complaint": "it broke"}}, "source ", " now: it broke; last frame 0.1 s ago, crc 3, breaks 1"),
        ({"source": {"live": False, "last_frame_s": None, "counts": {}}}, "source ", "/dev/edgeadapt/imu0: no frames now; no frame yet"),
        ({"predictions": NONE_YET}, "predictions ", " 0"),
        ({"memory": {"resident": None, "budget": None}}, "memory ", " unknown held, 100 MiB at most so far, no budget"),
        ({"memory": {"level": 1, "reason": "the system has 20 MiB left"}}, "memory ", "; level 1: the system has 20 MiB left"),
        ({"state": FULL}, "state ", " active none, last good none; 3 MiB written today; not written now: the disk is full"),
        ({"board": {"model": "", "temperature_c": None, "throttled": None, "load": None}}, "board ", " unknown"),
        ({"board": {"throttled": True}}, "board ", "61.2 °C, throttled, load 0.61"),
    ],
)
def test_other_states_in_words(parts, begin, end):
    (line,) = [line for line in changed(**parts).splitlines() if line.startswith(begin)]
    assert line.endswith(end), line


def test_what_is_not_there_has_no_line():
    text = changed(guard=None, compare={"frames": 0, "agreement": None}, events=[])
    assert not re.search(r"^(guard|compared|events)", text, re.MULTILINE)


def test_the_summary_fits_a_terminal_and_obeys_nobody():
    evil = "\x1b]0;title\x07\n\u202e" + "word " * 300
    source = {"name": evil, "complaint": evil, "live": False}
    text = changed(name=evil, source=source, events=[{"time": 0, "kind": evil, "text": evil}])
    assert all(len(line) <= 118 and line.isprintable() for line in text.splitlines())


@pytest.mark.parametrize("found", [None, [], {}, {"version": 2}, {"version": 1}, {**STATUS, "guard": 3}, {**STATUS, "uptime_s": "long"}])
def test_a_status_of_something_else_is_no_traceback(found):
    with pytest.raises(EdgeAdaptError, match="the daemon's status") as caught:
        command.read(found)
    assert "--json" in caught.value.hint


@pytest.mark.parametrize(
    ("given", "asked"),
    [
        ("pause", ("pause", {})),
        ("pause --reason cleaning", ("pause", {"reason": "cleaning"})),
        ("resume", ("resume", {})),
        ("rollback", ("rollback", {"to": "last-good"})),
        ("rollback --to start --reason moved", ("rollback", {"to": "start", "reason": "moved"})),
        ("mark-good", ("mark-good", {})),
        ("label 4711 cat", ("label", {"frame": 4711, "label": "cat"})),
        ("label a.png 3", ("label", {"frame": "a.png", "label": 3})),
        ("label 007 03", ("label", {"frame": "007", "label": "03"})),
        ("label --latest 3", ("label", {"label": 3})),
        ("label 3 --latest", ("label", {"label": 3})),
    ],
)
def test_commands_that_change_something(daemon, capsys, given, asked):
    assert main.main(given.split()) == 0
    assert daemon.asked == [asked]
    assert capsys.readouterr() == ("it is as it started\n", "")
    assert main.main([*given.split(), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == daemon.answer


def test_an_answer_without_words(daemon, capsys):
    daemon.answer = None
    assert main.main(["pause"]) == 0
    daemon.answer = {"text": "two\nlines"}
    assert main.main(["pause"]) == 0
    assert capsys.readouterr().out == "null\ntwo lines\n"


@pytest.mark.parametrize(
    ("given", "code", "told"),
    [
        ("label cat", 2, "no frame is named\n  fix: give FRAME or --latest"),
        ("label 3 cat --latest", 2, "which frame is meant is said twice"),
        ("pause --reason " + "x" * 201, 2, "pause: reason is 'xxx"),
        ("status --socket /" + "x" * 200, 2, "cannot be a socket's path: it is 201 bytes long"),
        ("status --socket /no/such/socket", 1, "no daemon listens at /no/such/socket\n  fix: start it with"),
        ("tail --socket /no/such/socket", 1, "no daemon listens at /no/such/socket"),
    ],
)
def test_mistakes(daemon, capsys, given, code, told):
    assert main.main(given.split()) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert told in err
    assert daemon.asked == []


def test_what_the_daemon_refuses_has_the_daemons_exit_code(tmp_path, capsys):
    def refuses(params: Mapping[str, object]) -> object:
        raise StateError("nothing was marked good yet", "wait for it")

    with Control(tmp_path / "s", {"rollback": refuses}):
        assert main.main(["rollback", "--socket", str(tmp_path / "s")]) == 7
    assert capsys.readouterr().err == "edgeadapt: error: nothing was marked good yet\n  fix: wait for it\n"


@pytest.mark.parametrize(
    ("given", "events", "predictions"),
    [("", True, True), ("--events", True, False), ("--predictions", False, True), ("--events --predictions", True, True)],
)
def test_tail_ends_after_so_many(daemon, capsys, given, events, predictions):
    assert main.main(["tail", *given.split(), "--count", "2"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["number"] for line in lines] == [1, 2]
    assert lines[0] == {"number": 1, "kind": "prediction", "text": "é", "facts": {"label": 3}}
    assert daemon.asked == [("tail", {"events": events, "predictions": predictions, "count": 2})]


@pytest.mark.parametrize("count", ["0", "-1", "1.5", "x", "9" * 30, "²"])
def test_tail_of_no_number(count, capsys):
    with pytest.raises(SystemExit) as ended:
        main.main(["tail", "--count", count])
    assert ended.value.code == 2
    assert "is not a whole number above 0" in capsys.readouterr().err or count == "-1"


def test_tail_shows_lines_as_they_come_until_it_is_interrupted(daemon):
    command = [sys.executable, "-m", "edgeadapt", "tail", "--predictions"]
    environment = {**child.environment(), "PYTHONUNBUFFERED": ""}  # it is to write at once by itself
    options: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": child.ROOT, "env": environment}
    with subprocess.Popen(command, preexec_fn=child.heed_interrupts, **options) as process:  # noqa: PLW1509 - only sets a signal
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            assert [json.loads(process.stdout.readline())["number"] for _ in range(3)] == [1, 2, 3]
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 130
        finally:
            process.kill()
        assert process.stderr.read() == "edgeadapt: interrupted\n"


@pytest.mark.parametrize("given", ["status", "pause", "tail --count 1", "label --latest 3"])
def test_asking_loads_neither_numpy_nor_onnxruntime(daemon, given):
    code = f"import sys; from edgeadapt.cli.main import main; main({given.split()}); print(*({{'numpy', 'onnxruntime', 'ssl'}} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=child.ROOT, env=child.environment())
    assert run.stdout.splitlines()[-1] == ""
    assert daemon.asked or given == "status"
