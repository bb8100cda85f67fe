"""What each frame waits where frames come at a steady pace: answered one by one, without a cap and with one.

A frame's time is from when it was due until it was answered, so that one that comes while a step runs waits for it too. Each mode is a process of its
own with the same budget, again and again in turn; medians over rounds. Frames are noise: what they are makes no difference to times.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

MODES = {"only predicting": {"adapt": False}, "adapting": {}, "adapting, with a cap": {"cap": True}}


def served(choices: argparse.Namespace, mode: str) -> dict[str, float]:
    """One mode, in this process: times in milliseconds, bytes at the peak, windows that were adapted on."""
    from edgeadapt.devices.sources import Frame
    from edgeadapt.runtime.adapter import Adapter
    from edgeadapt.runtime.stream import Stream

    options = dict(MODES[mode])
    cap = choices.cap if options.pop("cap", False) else None
    with Adapter.open(choices.bundle, choices.budget, choices.threads, roles="adapt", answering=cap is not None) as adapter:
        x = np.random.default_rng(0).standard_normal((choices.batch, *adapter.manifest.input.shape), dtype=np.float32)
        for _ in range(2):
            adapter.adapt(x)  # what first runs take is not of interest
        stream = Stream(adapter, window=choices.batch, single=True, cap=cap, **options)
        due: list[float] = []

        def frames() -> Iterator[Frame]:
            first = time.perf_counter() + 0.05
            for index in range(choices.frames):
                due.append(first + index * choices.pace / 1000)
                time.sleep(max(0.0, due[-1] - time.perf_counter()))
                yield Frame(str(index), x[index % len(x)])

        waited = []
        for (one,) in stream.run(frames()):
            waited.append(1000 * (time.perf_counter() - due[one.index]))
        found = dict(zip(("p50", "p95", "p99", "most"), np.percentile(waited, [50, 95, 99, 100]).tolist()))
        found |= {name: adapter.memory[name] / 2**20 for name in ("peak", "planned")}
        return {**found, "steps": stream.steps, "passed": stream.passed}


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--batch", type=int, default=64, help="frames of a window")
    parser.add_argument("--pace", type=float, default=40.0, help="milliseconds from one frame to the next")
    parser.add_argument("--cap", type=float, default=40.0, help="milliseconds")
    parser.add_argument("--frames", type=int, default=640)
    parser.add_argument("--budget", default="1GiB")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="also write all rounds there")
    parser.add_argument("--mode", help=argparse.SUPPRESS)
    choices = parser.parse_args()
    if choices.mode:
        print(json.dumps(served(choices, choices.mode)))
        return
    found: dict[str, list[dict[str, float]]] = {mode: [] for mode in MODES}
    for _ in range(choices.rounds):
        for mode, seen in found.items():
            words = [sys.executable, __file__, *sys.argv[1:], "--mode", mode]
            seen.append(json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout))
    if choices.json:
        choices.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    names = list(next(iter(found.values()))[0])
    print(f"{'':<22}" + "".join(f"{name:>10}" for name in names) + "   (ms; MiB)")
    for mode, seen in found.items():
        print(f"{mode:<22}" + "".join(f"{median(one[name] for one in seen):>10.1f}" for name in names))


if __name__ == "__main__":
    main()
