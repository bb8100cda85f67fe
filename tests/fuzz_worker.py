"""The process in which files from anywhere are opened: tasks come as lines of JSON, what became of each goes back. It may die: see bundle_fuzz."""

from __future__ import annotations

import faulthandler
import gc
import io
import json
import math
import os
import resource
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

BUDGET = 192 * 2**20
"""Bytes that the whole process may hold, where a bundle is opened within a budget."""
_SPACE = 6 * 2**30  # of addresses: whatever asks for more than any device has is refused it
_LONGEST = 4096  # characters of a message that people are to read

Outcome = dict[str, Any]


def held(what: str) -> int:
    """VmRSS or VmHWM, in bytes."""
    for line in Path("/proc/self/status").read_bytes().splitlines():
        if line.startswith(what.encode()):
            return int(line.split()[1]) * 1024
    return 0


def inspect(path: str) -> None:
    """As `edgeadapt inspect`, to a terminal that takes UTF-8 only."""
    from edgeadapt import errors
    from edgeadapt.cli.main import main

    said = io.TextIOWrapper(io.BytesIO(), "utf-8")
    with redirect_stdout(said), redirect_stderr(said):
        code = main(["inspect", path])
        said.flush()
    if code:
        kind = next(found for found in vars(errors).values() if getattr(found, "exit_code", None) == code)
        raise kind(said.buffer.getvalue().decode())  # type: ignore[attr-defined]


def run(path: str, budget: bool, state: Callable[[Any, Any], None] | None = None, serves: bool = True) -> None:
    """Opens a bundle, and has it predict and adapt where it `serves`."""
    import numpy as np

    from edgeadapt import Adapter
    from edgeadapt.runtime.guard import Guard

    with Adapter.open(path, budget=BUDGET if budget else None) as adapter:
        if state is not None:
            state(adapter, Guard(adapter) if adapter.manifest.reference is not None else None)
        shape = adapter.manifest.input.shape
        if serves and math.prod(shape) < 2**20:
            frames = np.zeros((max(adapter.batches["adapt"], default=1), *shape), np.float32)
            adapter.predict(frames[:1])
            adapter.adapt(frames)


def bundle(task: dict[str, Any], stage: list[str]) -> None:
    """A bundle alone."""
    stage.append("inspect")
    try:
        inspect(task["path"])
    finally:
        task["read"] = held("VmHWM:")
    stage.append("run")
    run(task["path"], task["budget"], serves=task["serves"])


def saved(task: dict[str, Any], stage: list[str]) -> None:
    """A file of a saved state."""

    def load(adapter: Any, guard: Any) -> None:
        stage.append("load")
        (adapter if guard is None else guard).load(task["path"])
        stage.append("run")

    run(task["sound"], task["budget"], load)


def folder(task: dict[str, Any], stage: list[str]) -> None:
    """A state folder, through a daemon's start: chosen, loaded, served, saved and proven."""
    from edgeadapt.runtime.daemon.store import Limits, Store

    stage.append("start")
    with Store.open(task["path"], Limits(spare=0, probation=0.0)) as store:
        boot = store.begin_boot()
        assert store.written_today >= 0
        assert all(isinstance(entry, dict) for entry in store.happened())

        def load(adapter: Any, guard: Any) -> None:
            stage.append("load")
            if boot.state is not None:
                adapter.load(boot.state)
            stage.append("run")
            store.commit(adapter.taken if guard is None else guard.taken, adapter.manifest, True)
            store.settled()
            store.stopped()

        run(str(boot.bundle), task["budget"], load)
    stage.append("start again")
    with Store.open(task["path"]) as store:
        store.begin_boot()


def _fills() -> None:
    assert bytearray(300 * 2**20).count(0)


FAULTS: dict[str, Callable[[], object]] = {"dies": os.abort, "hangs": lambda: time.sleep(600), "raises": lambda: 1 // 0, "fills": _fills}
"""What must not be, to see that it is noticed."""
TASKS = {"bundle": bundle, "saved": saved, "folder": folder, **{name: lambda _task, _stage, fault=fault: fault() for name, fault in FAULTS.items()}}


def done(task: dict[str, Any]) -> Outcome:
    """What became of a task.

    Returns:
        ended: "opened", or the kind of error with what was going on; fault: what must not be, or ""; seconds; peak: of resident bytes;
        grown, read: what of it came meanwhile, and while files were only read.
    """
    from edgeadapt.errors import EdgeAdaptError

    gc.collect()
    before = held("VmRSS:")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak begins anew
    begun, stage, ended, fault, said = time.monotonic(), [""], "opened", "", ""
    try:
        TASKS[task["what"]](task, stage)
    except EdgeAdaptError as reason:
        ended, said = f"{type(reason).__name__} at {stage[-1]}", str(reason)[:_LONGEST]
        if len(str(reason)) > _LONGEST:
            fault = f"a message of {len(str(reason))} characters, {str(reason)[:200]!r}"
        str(reason).encode()
    except BaseException as reason:
        ended, fault = f"{type(reason).__name__} at {stage[-1]}", "".join(traceback.format_exception(reason))[-3000:]
    peak = held("VmHWM:")
    read = task.get("read", peak) - before
    taken = {"seconds": time.monotonic() - begun, "peak": peak, "grown": peak - before, "read": read}
    return {"ended": ended, "stage": stage[-1], "said": said, "fault": fault, **taken}


def main() -> None:
    """Until the pipe ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints is no answer
    faulthandler.enable()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (_SPACE, _SPACE))
    for line in sys.stdin:
        answers.write(json.dumps(done(json.loads(line))) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
