"""A process that runs one configuration of a bundle and says what memory it took; `edgeadapt.memory.measured` starts it.

Arguments: a bundle and a setting as JSON ({"graphs", "prepacking", "role", "batch", "micro", "threads", "runs", "prepared"}). It prints JSON. What is
imported here, an adapter's process has too.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnxruntime

_PAGE = os.sysconf("SC_PAGE_SIZE")


def present(begin: int, end: int) -> int:
    """Resident bytes of the pages from one address to another."""
    first, last = begin // _PAGE, -(-end // _PAGE)
    with open("/proc/self/pagemap", "rb") as file:
        file.seek(8 * first)
        entries = np.frombuffer(file.read(8 * (last - first)), "<u8")
    return int((entries >> np.uint64(63)).sum()) * _PAGE


@contextmanager
def regions_made() -> Iterator[list[tuple[int, int]]]:
    """The addresses of the regions that onnxruntime makes meanwhile, as it tells in its log; other messages are lost."""
    found: list[tuple[int, int]] = []
    kept = os.dup(2)
    with os.fdopen(os.memfd_create("log"), "rb+") as file:
        os.dup2(file.fileno(), 2)
        onnxruntime.set_default_logger_severity(1)
        try:
            yield found
        finally:
            onnxruntime.set_default_logger_severity(3)
            os.dup2(kept, 2)
            os.close(kept)
        file.seek(0)
        for line in file:
            if match := re.search(rb"Allocated memory at 0x([0-9a-f]+) to 0x([0-9a-f]+)", line):
                found.append((int(match[1], 16), int(match[2], 16)))


def peak() -> int:
    """The most this process has had resident, in bytes."""
    from edgeadapt.runtime import memory

    return memory.peak()


def served(path: str, setting: dict[str, Any]) -> dict[str, int]:
    """What running a configuration takes."""
    from edgeadapt.bundle import Bundle, Form
    from edgeadapt.memory.graph import OWN
    from edgeadapt.runtime import loading, prepared
    from edgeadapt.runtime.adapter import Adapter
    from edgeadapt.runtime.choice import Choice, alone
    from edgeadapt.runtime.mappings import mappings
    from edgeadapt.runtime.memory import Needs, laid_out, planned
    from edgeadapt.runtime.state import FlatState

    loading.begin()
    bundle = Bundle.open(path)
    graphs = bundle.manifest.graphs
    names, threads = setting["graphs"], setting["threads"]
    forms = alone(bundle.manifest, names)
    if setting["micro"]:
        forms += (Form(setting["role"], setting["batch"], tuple(names[-2:]), setting["micro"]),)
    ready = prepared.find(bundle, threads) if setting["prepared"] else None
    needs = Needs(bundle, threads, ready)
    plan = laid_out(needs, planned(needs, names, setting["prepacking"], frames=max(form.batch for form in forms)))
    loading.give_back()  # as opening an adapter does
    with regions_made() as regions:
        with bundle.stored_state() as initial:
            state = FlatState(bundle.manifest.state, {name: graphs[name] for name in names}, initial)
        engine = loading.load(bundle, state, threads, plan, ready)
        adapter = Adapter(bundle, loading.Loaded(Choice(plan, plan, (), forms), state, engine), None, threads)
        for form in forms:
            labels = np.zeros((form.batch, *engine.label_shape()), np.int64)
            _run(adapter, form.role, labels, setting["runs"])
        adapter.reset()  # it may be asked for at any time, and takes room
    found = {"peak": peak()}  # before anything is counted here
    files = {str(bundle.path), *([] if ready is None else [str(ready.folder / OWN)])}
    weights = sum(item.resident for item in mappings() if item.path in files)
    region = max(regions, key=lambda item: item[1] - item[0], default=(0, 0))
    buffers = [(buffer.ctypes.data, buffer.nbytes) for buffer in (state.buffer, engine.sums)]
    held, sums = (present(begin, begin + size) if size else 0 for begin, size in buffers)
    inside = int(plan.region.size - plan.lines()["region"]) // 256 * 256
    return {**found, "weights": weights, "region": present(*region), "inside": inside, "state": held, "sums": sums}


def _run(adapter: Any, role: str, labels: Any, runs: int) -> None:
    shape = (len(labels), *adapter.manifest.input.shape)
    x = np.arange(math.prod(shape), dtype=np.float32).reshape(shape)
    np.sin(x, out=x)  # in place: the caller's one batch is all that is counted
    for _ in range(runs):
        if role == "learn":
            adapter.learn(x, labels)
        else:
            getattr(adapter, role)(x)


def main(arguments: list[str]) -> int:
    """Prints what was found."""
    from edgeadapt.errors import EdgeAdaptError

    try:
        print(json.dumps(served(arguments[0], json.loads(arguments[1]))))
    except EdgeAdaptError as error:
        print(" ".join(error.message.split()), file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
