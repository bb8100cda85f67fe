"""Processes that wait on a pipe and take turns, so that a machine's changing load falls on all of them alike.

The side that is measured calls `serve`; the side that measures starts a `Worker` for each and gives them turns with `rounds`.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any


def peak_bytes() -> int:
    """The most bytes this process has had resident (VmHWM)."""
    with open("/proc/self/status", encoding="ascii") as file:
        line = next(line for line in file if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def serve(turn: Callable[[], None], finish: Callable[[str], None] | None = None) -> None:
    """Answer "turn" with its seconds and the process's peak, and "finish TEXT" by finish(TEXT), until standard input ends."""
    say({"peak": peak_bytes()})
    for line in sys.stdin:
        word, _, rest = line.rstrip("\n").partition(" ")
        seconds = 0.0
        if word == "turn":
            start = time.perf_counter()
            turn()
            seconds = time.perf_counter() - start
        elif finish:
            finish(rest)
        say({"seconds": seconds, "peak": peak_bytes()})


def say(values: Mapping[str, Any]) -> None:
    print(json.dumps(values), flush=True)


def environment(threads: int) -> dict[str, str]:
    """This process's environment with the allocator as users have it and the number of threads of every library set."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "OMP_", "MKL_", "GLIBC_", "KMP_", "LD_PRELOAD"))}
    return {**kept, **{f"{library}_NUM_THREADS": str(threads) for library in ("OMP", "MKL", "OPENBLAS")}, "PYTHONDONTWRITEBYTECODE": "1"}


@dataclass
class Worker:
    """A process that waits for its turn."""

    name: str
    command: Sequence[str]
    threads: int
    seconds: list[float] = field(default_factory=list)
    peak: int = 0

    def __enter__(self) -> Worker:
        self.process = subprocess.Popen(self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment(self.threads))
        self._hear()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        assert self.process.stdin
        try:
            self.process.stdin.close()
        finally:
            self.process.wait()

    def _hear(self) -> dict[str, Any]:
        assert self.process.stdout
        for line in self.process.stdout:
            if line.startswith("{"):
                heard = json.loads(line)
                self.peak = max(self.peak, heard["peak"])
                return heard
        raise SystemExit(f"{self.name} ended early: {' '.join(self.command)[:200]}")

    def ask(self, text: str) -> float:
        """Send a word and wait for the answer: seconds."""
        assert self.process.stdin
        self.process.stdin.write(text + "\n")
        self.process.stdin.flush()
        return float(self._hear()["seconds"])

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def rounds(workers: Sequence[Worker], count: int, warm: int = 1) -> None:
    """Let the workers take turns: `warm` rounds that do not count, then `count` that do; every other round in the opposite order."""
    for index in range(warm + count):
        for worker in workers if index % 2 == 0 else reversed(workers):
            seconds = worker.ask("turn")
            if index >= warm:
                worker.seconds.append(seconds)


def paired_ratio(worker: Worker, base: Worker) -> float:
    """Median over the rounds of the ratio of times."""
    return statistics.median(mine / its for mine, its in zip(worker.seconds, base.seconds))
