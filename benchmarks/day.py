"""A day of the daemon squeezed into minutes: real images that drift, as fast as it holds, over a serial line (a pty pair) or HTTP, under a guard.

    ./dev bench day resnet20.edgeadapt --frames 100000 --over serial
    ./dev bench day resnet20.edgeadapt --frames 20000 --over http

The rate is found as it goes: more while nothing is dropped, less when something is. Of ten blocks of frames two are without adaptation, so that
answers with and without it are timed in one run; the first of the two is not counted, as it begins with the frames that waited for the last step.
At the end every frame that was sent must have been answered or counted as lost, memory must have stayed flat and within the budget; the exit code is
1 where not. Needs the data pack (EDGEADAPT_DATA).
"""

from __future__ import annotations

import argparse
import http.client
import io
import json
import os
import sys
import tempfile
import time
import tty
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks._networks import data_pack
from benchmarks._served import TOKEN, Served, free_port, web
from edgeadapt.corruptions import CORRUPTIONS, corrupt
from edgeadapt.devices.framing import encode
from tests.zoo.data import Pack

BLOCK, REST = 1024, 10  # frames in a block, which the daemon's percentiles are of; of so many blocks the last two are without steps
STAGE = 2000  # frames of one shift


def drifting(count: int, seed: int) -> Iterator[tuple[np.ndarray, int]]:
    """Images and their classes: clean ones, then one shift after the other at severities 2 to 5, again and again."""
    x, y = Pack(data_pack()).images("cifar_test1000")
    random, made = np.random.default_rng(seed), 0
    stages = [("", 0), *((name, severity) for severity in (2, 3, 5) for name in CORRUPTIONS)]
    while True:
        for name, severity in stages:
            chosen = random.integers(len(x), size=STAGE)
            for begin in range(0, STAGE, 250):
                some = chosen[begin : begin + 250]
                images = x[some] if not name else corrupt(x[some], name, severity, seed + made)
                for image, label in zip(images, y[some]):
                    if made == count:
                        return
                    made += 1
                    yield image, int(label)


@dataclass
class Pace:
    """Frames a second: more while nothing is dropped, less when something is. Sleeps so that frames are sent at it."""

    rate: float = 50.0
    best: float = 0.0
    _next: float = field(default_factory=time.monotonic)

    def wait(self) -> None:
        self._next = max(self._next, time.monotonic() - 0.05) + 1 / self.rate
        time.sleep(max(0.0, self._next - time.monotonic()))

    def told(self, dropped: bool) -> None:
        self.best = self.best if dropped else max(self.best, self.rate)
        self.rate *= 0.8 if dropped else 1.05


class Run(Served):
    """A daemon as a process of its own, and what is seen of it. port: where it is posted to, with HTTP."""

    def __init__(self, folder: Path, bundle: Path, over: str, budget: str, cap: str) -> None:
        (folder / "state").mkdir()
        self.port = free_port()
        source = f'type = "serial"\nurl = "{folder}/tty"\nbaud = 4000000\n' if over == "serial" else f'type = "http"\n{web(folder, self.port)}'
        cap = f'cap = "{cap}"\n' if cap else ""
        config = (
            f'name = "day"\n[bundle]\npath = "{bundle}"\n[memory]\nbudget = "{budget}"\nslack = "12MiB"\n'
            f'[predict]\nqueue = 64\n{cap}[state]\nfolder = "{folder}/state"\nprobation = "1min"\n[source]\n{source}'
        )
        super().__init__(folder, config)
        self.held: list[int] = []
        self.times: dict[str, list[dict[str, float]]] = {"adapting": [], "paused": []}

    def noted(self) -> dict[str, Any]:
        """Its status, of which the memory is kept."""
        found = self.status()
        self.held.append(found["memory"]["resident"])
        return found

    def through(self, status: dict[str, Any]) -> int:
        """Frames that it has answered, or knows to be lost."""
        counts = status["source"]["counts"]
        lost = sum(counts.get(name, 0) for name in ("dropped", "lost", "crc", "cobs", "header", "oversize"))
        return int(status["predictions"]["count"] + status["predictions"]["bad"] + status["queue"]["dropped"] + lost)


def serial(folder: Path) -> Callable[[int, np.ndarray, int], None]:
    """What sends a frame over a line whose other end is a name in the folder."""
    ours, theirs = os.openpty()
    tty.setraw(theirs)
    tty.setraw(ours)
    (folder / "tty").symlink_to(os.ttyname(theirs))

    def send(number: int, image: np.ndarray, label: int) -> None:
        data = memoryview(encode(image, number, boot=7, label=label))
        while data:
            data = data[os.write(ours, data) :]

    return send


def posting(port: int) -> Callable[[int, np.ndarray, int], None]:
    """What posts a frame."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)

    def send(number: int, image: np.ndarray, label: int) -> None:
        body = io.BytesIO()
        np.save(body, image)
        headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/x-npy"}
        connection.request("POST", "/frames", body.getvalue(), headers)
        answer = connection.getresponse()
        answer.read()
        if answer.status != 202:
            raise SystemExit(f"frame {number} was refused: {answer.status}")

    return send


def day(choices: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Runs it; all that was seen."""
    send = serial(folder) if choices.over == "serial" else None
    run = Run(folder, Path(choices.bundle).resolve(), choices.over, choices.budget, choices.cap)
    try:
        if (status := run.ready(900))["mode"] != "serving":
            raise SystemExit(f"the daemon does not serve: {status['reason']}")
        send = send or posting(run.port)
        pace, lost, sent, begun, looked = Pace(), 0, 0, time.monotonic(), time.monotonic()
        for image, label in drifting(choices.frames, choices.seed):
            pace.wait()
            send(sent, image, label)
            sent += 1
            if time.monotonic() - looked > 1.0:
                status, looked = run.noted(), time.monotonic()
                now = run.through(status) - status["predictions"]["count"]
                pace.told(now > lost)
                lost = now
            if sent % BLOCK == 0:
                _turn_block(run, sent // BLOCK)
        status = _settled(run, sent)
        seconds = time.monotonic() - begun
        peak = next(int(line.split()[1]) for line in Path(f"/proc/{run.run.pid}/status").read_text().splitlines() if line.startswith("VmHWM"))
        return _told(choices, run, status, sent, seconds, pace, 1024 * peak)
    finally:
        with run:
            run.end()


def _turn_block(run: Run, number: int) -> None:
    """Notes how long the answers of a block took, and has the next one with or without steps."""
    kind = {REST - 1: None, 0: "paused"}.get(number % REST, "adapting")
    found = run.noted()["predictions"]["latency_ms"]
    if kind is not None and found["p50"] is not None:
        run.times[kind].append(found)
    if number % REST == REST - 2:
        run.client.call("pause")
    elif number % REST == 0:
        run.client.call("resume")


def _settled(run: Run, sent: int) -> dict[str, Any]:
    """The status once nothing more comes."""
    until = time.monotonic() + 60
    while (status := run.noted()) and run.through(status) < sent and time.monotonic() < until:
        time.sleep(0.1)
    return status


def _told(choices: argparse.Namespace, run: Run, status: dict[str, Any], sent: int, seconds: float, pace: Pace, peak: int) -> dict[str, Any]:
    held = np.array(run.held)
    half, quarter = len(held) // 2, 3 * len(held) // 4
    grown = int(np.median(held[quarter:]) - np.median(held[half:quarter])) if len(held) > 8 else 0
    middle = {
        kind: {name: round(float(np.median([one[name] for one in found])), 2) for name in ("p50", "p95", "p99")} if found else None
        for kind, found in run.times.items()
    }
    budget = status["memory"]["budget"]
    return {
        "over": choices.over,
        "frames": {
            "sent": sent, "answered": status["predictions"]["count"], "bad": status["predictions"]["bad"],
            "dropped": status["queue"]["dropped"], "counts": status["source"]["counts"], "unaccounted": sent - run.through(status),
        },
        "seconds": round(seconds, 1),
        "per_second": round(status["predictions"]["count"] / seconds, 1),
        "held_rate": round(pace.best, 1),
        "latency_ms": middle,
        "memory": {"budget": budget, "peak": peak, "resident": [int(held.min()), int(np.median(held)), int(held.max())], "grown": grown},
        "adaptation": {name: status["adaptation"][name] for name in ("steps", "windows", "passed", "late")},
        "compare": status["compare"],
        "guard": status["guard"] and status["guard"]["state"],
        "written": status["state"]["written_today"],
        "well": sent == run.through(status) and peak <= budget and grown < 2**20,
    }  # fmt: skip


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", help="a bundle of 3x32x32 images, exported with --data")
    parser.add_argument("--frames", type=int, default=100_000)
    parser.add_argument("--over", choices=("serial", "http"), default="serial")
    parser.add_argument("--budget", default="192MiB")
    parser.add_argument("--cap", default="", help="predict.cap, such as 20ms: steps beside the answers")
    parser.add_argument("--seed", type=int, default=0)
    choices = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="day-") as folder:
        found = day(choices, Path(folder))
        if not found["well"]:
            print((Path(folder) / "log").read_text()[-2000:], file=sys.stderr)
    print(json.dumps(found, indent=1))
    return 0 if found["well"] else 1


if __name__ == "__main__":
    sys.exit(main())
