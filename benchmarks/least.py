"""The smallest budget in which a bundle predicts, and in which it predicts and adapts, at one batch size.

Budgets are tried by halves, to the MiB, each in a process of its own that opens the bundle in it and adapts (or predicts) six times. It must not be
refused, not pause, and not hold more than it was given. The floor is a process with numpy, onnxruntime and one trivial session.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
sys.path.insert(0, str(HERE.parents[1]))

MIB = 2**20


def child(setting: dict[str, Any]) -> None:
    """Whether it works, as one JSON line."""
    import numpy as np

    from edgeadapt.bundle import Bundle
    from edgeadapt.errors import BudgetError
    from edgeadapt.runtime.adapter import Adapter

    shape = (setting["batch"], *Bundle.open(setting["bundle"], verify=False).manifest.input.shape)
    window = np.sin(1e4 * np.arange(np.prod(shape), dtype=np.float32)).reshape(shape)
    try:
        adapter = Adapter.open(setting["bundle"], setting["budget"] * MIB, roles=setting["role"], batches=[setting["batch"]], strict=False)
        wanted = [name for name in adapter.memory["graphs"] if name.startswith(f"{setting['role']}.b{setting['batch']}")]
    except BudgetError:
        wanted = []
    if not wanted:
        print(json.dumps({"works": False}))
        return
    times = []
    for _ in range(6):
        begin = time.perf_counter()
        (adapter.adapt if setting["role"] == "adapt" else adapter.predict)(window)
        times.append(time.perf_counter() - begin)
    memory = adapter.memory
    works = not adapter.changes and memory["peak"] <= setting["budget"] * MIB
    print(json.dumps({"works": works, "peak": memory["peak"], "graph": wanted[0], "seconds": min(times)}))


def trial(setting: dict[str, Any]) -> dict[str, Any]:
    """What a child found."""
    import subprocess

    from benchmarks._turns import environment

    command = [sys.executable, str(HERE), "--setting", json.dumps(setting)]
    found: dict[str, Any] = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True, env=environment(1)).stdout)
    return found


def least(setting: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """The smallest budget in MiB that works, and what was found in it."""
    low, high = 32, 64
    while not (best := trial({**setting, "budget": high}))["works"]:
        low, high = high, 2 * high
        if high > 8192:
            raise SystemExit(f"{setting['role']} at batch {setting['batch']} does not work in 8 GiB")
    while high - low > 1:
        middle = (low + high) // 2
        found = trial({**setting, "budget": middle})
        if found["works"]:
            high, best = middle, found
        else:
            low = middle
    return high, best


def main() -> None:
    import argparse

    from benchmarks._floors import trivial_model
    from benchmarks._turns import Worker

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", nargs="+", type=Path)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--setting", help=argparse.SUPPRESS)
    choices = parser.parse_args()
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        model = str(Path(name, "trivial.onnx"))
        trivial_model(model)
        with Worker("floor", [sys.executable, str(HERE.with_name("_floors.py")), "onnxruntime", model], 1) as worker:
            floor = worker.peak / MIB
    print(f"smallest budgets at batch {choices.batch}, MiB; the floor is {floor:.1f} MiB")
    print(f"{'':28}{'budget':>8}{'peak':>8}{'ratio':>7}{'less floor':>12}{'ratio':>7}{'ms':>8}  graph")
    for bundle in choices.bundle:
        first: tuple[float, float] | None = None
        for role in ("predict", "adapt"):
            budget, found = least({"bundle": str(bundle), "batch": choices.batch, "role": role})
            peak = found["peak"] / MIB
            first = first or (peak, peak - floor)
            ratios = f"{peak:8.1f}{peak / first[0]:7.2f}{peak - floor:12.1f}{(peak - floor) / first[1]:7.2f}"
            print(f"{bundle.stem[:20] + ' ' + role:28}{budget:8}{ratios}{1e3 * found['seconds']:8.1f}  {found['graph']}", flush=True)


if __name__ == "__main__":
    if len(sys.argv) > 2 and sys.argv[1] == "--setting":
        child(json.loads(sys.argv[2]))
    else:
        main()
