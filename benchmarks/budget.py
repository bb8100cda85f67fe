"""A bundle held to budgets: the most it ever had resident against what it was given, and what happens when the system runs short.

Each budget has a process of its own that adapts on as many frames as the largest step that fits takes, predicts one, and says what it held after 1,
10, 100 ... steps. With --hog another process then takes memory for a while; the adapter is told to leave the system so much that this makes it short
(--reserve), so it works anywhere.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
sys.path.insert(0, str(HERE.parents[1]))

# What only the parent needs is imported in its functions: argparse, subprocess and hashlib would be part of what is measured.
MIB = 2**20


def child(setting: dict[str, Any]) -> None:
    """Serve under one budget; one JSON line of results, or of the refusal."""
    from edgeadapt.errors import BudgetError
    from edgeadapt.runtime.adapter import Adapter

    window, one = frames(setting)
    begun = time.perf_counter()
    try:
        adapter = Adapter.open(setting["bundle"], setting["budget"], roles=("predict", "adapt"))
    except BudgetError as refusal:
        say({"refused": refusal.hint, "seconds": time.perf_counter() - begun})
        return
    opened = time.perf_counter() - begun
    window = window[: adapter.batches["adapt"][0]]  # a step of the largest batch that was loaded
    held: dict[int, int] = {}
    for step in range(1, setting["steps"] + 1):
        adapter.adapt(window)
        adapter.predict(one)
        if step in (1, 10, 100, 1000, 10000, setting["steps"]):
            held[step] = adapter.memory["resident"]
    found = {key: adapter.memory[key] for key in ("graphs", "missing", "level", "reason")}
    planned = setting["budget"] if adapter._claim is None else adapter._claim.filled
    say({"opened": opened, "peak": adapter.memory["peak"], "planned": planned, "held": held, "stats": adapter.stats, **found})


def hogged(setting: dict[str, Any]) -> None:
    """Serve while another process takes memory and gives it back; one JSON line for each change, the last with what became of the state."""
    import subprocess
    import zlib

    import numpy as np

    from edgeadapt.runtime.adapter import Adapter

    window, one = frames(setting)
    adapter = Adapter.open(setting["bundle"], setting["budget"], roles=("predict", "adapt"), reserve=setting["reserve"])
    parameters = [spec.name for spec in adapter.manifest.state if spec.kind != "statistic"]

    def digest() -> int:
        state = adapter.state
        return zlib.crc32(b"".join(state[name].tobytes() for name in parameters))

    begun = time.monotonic()
    taken, level, kept, answered, lost = 0, 0, 0, 0, 0
    process: subprocess.Popen[bytes] | None = None
    for _ in range(20):
        adapter.adapt(window)
    while time.monotonic() - begun < setting["seconds"]:
        if process is None:
            process = subprocess.Popen([sys.executable, str(HERE), "--take", str(setting["hog"]), str(setting["hold"])])
            taken = adapter.stats["steps"]
        answered += int(np.isfinite(adapter.adapt(window)).all() and np.isfinite(adapter.predict(one)).all())
        report = adapter.memory
        if report["level"] != level:
            say({"at": time.monotonic() - begun, "level": report["level"], "reason": report["reason"], "resident": report["resident"]})
            if report["level"] and not level:
                kept = digest()
            elif level and not report["level"]:
                break
            level = report["level"]
        if level and digest() != kept:
            lost += 1
        time.sleep(0.01)
    if process is not None:
        process.wait()
    before = adapter.stats["steps"]
    adapter.adapt(window)
    say(
        {
            "answered": answered,
            "lost": lost,
            "steps": [taken, before, adapter.stats["steps"]],
            "stats": adapter.stats,
            "level": adapter.memory["level"],
        }
    )


def say(values: dict[str, Any]) -> None:
    print(json.dumps(values), flush=True)


def frames(setting: dict[str, Any]) -> tuple[Any, Any]:
    """A window and a single frame, made before the bundle is opened: what a program takes later it must leave room for. numpy.random takes 6 MB."""
    import numpy as np

    from edgeadapt.bundle import Bundle

    manifest = Bundle.open(setting["bundle"]).manifest
    shape = (max(manifest.planned("adapt")), *manifest.input.shape)
    window = np.sin(1e4 * np.arange(np.prod(shape), dtype=np.float64) ** 1.5).astype(np.float32).reshape(shape)
    return window, window[0].copy()


def take(size: int, seconds: float) -> None:
    """Hold that many bytes for so long."""
    held = bytearray(size)
    held[::4096] = b"x" * len(held[::4096])
    time.sleep(seconds)


def available() -> int:
    """The system's MemAvailable in bytes."""
    with open("/proc/meminfo", encoding="ascii") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))


def ask(setting: dict[str, Any]) -> list[dict[str, Any]]:
    """What a child says."""
    import subprocess

    from benchmarks._turns import environment

    command = [sys.executable, str(HERE), "--setting", json.dumps(setting)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment(1))
    return [json.loads(line) for line in done.stdout.splitlines()]


def show(budget: int, result: dict[str, Any]) -> None:
    if "refused" in result:
        print(f"{budget / MIB:6.0f} MiB  refused in {result['seconds']:.2f} s: {result['refused']}", flush=True)
        return
    held = ", ".join(f"{int(step):,}: {size / MIB:.2f}" for step, size in result["held"].items())
    left = f"; left out: {', '.join(result['missing'])}" if result["missing"] else ""
    inside = "inside" if result["peak"] <= budget else "OVER"
    print(f"{budget / MIB:6.0f} MiB  peak {result['peak'] / MIB:.2f} MiB, {inside}; planned {result['planned'] / MIB:.2f}; level {result['level']}")
    print(f"{'':12}{', '.join(result['graphs'])}{left}; opened in {result['opened']:.2f} s; resident MiB after steps {held}", flush=True)


def main() -> None:
    if sys.argv[1:2] == ["--setting"]:
        setting = json.loads(sys.argv[2])
        (hogged if "hog" in setting else child)(setting)
    elif sys.argv[1:2] == ["--take"]:
        take(int(sys.argv[2]), float(sys.argv[3]))
    else:
        measure()


def measure() -> None:
    import argparse
    import tempfile

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, help="default: random weights of --model with EcoTTA")
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--budgets", type=int, nargs="+", default=[64, 96, 128, 192], metavar="MIB")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--hog", type=int, default=0, metavar="MIB", help="afterwards, another process takes so much for 5 s")
    parser.add_argument("--json", type=Path, help="write the results here")
    choices = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory() as name:
        bundle = choices.bundle
        if bundle is None:
            from benchmarks._pairs import make_bundle

            bundle, _ = make_bundle(Path(name), choices.model, "ecotta", choices.batches, 4)
        for budget in choices.budgets:
            (result,) = ask({"bundle": str(bundle), "budget": budget * MIB, "steps": choices.steps})
            results.append({"budget": budget * MIB, **result})
            show(budget * MIB, result)
        if choices.hog:
            reserve = max(available() - choices.hog * MIB // 2, MIB)
            setting = {"bundle": str(bundle), "budget": choices.budgets[-1] * MIB, "reserve": reserve, "seconds": 90, "hold": 5}
            for line in ask({**setting, "hog": choices.hog * MIB}):
                print(json.dumps(line), flush=True)
                results.append(line)
    if choices.json:
        choices.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
