"""From starting a process to its first prediction, and what the parts of that are.

Each round is a new process, with the files already in the system's page cache. Give a bundle, or one of ResNet-20 with random weights is made.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

PARTS = ("Python", "numpy", "onnxruntime", "edgeadapt", "open", "first prediction")


def child(setting: dict[str, Any]) -> None:
    """Marks of the system-wide monotonic clock, one after each part."""
    marks = [time.monotonic()]
    import numpy as np

    marks.append(time.monotonic())
    import onnxruntime  # noqa: F401

    marks.append(time.monotonic())
    import edgeadapt

    opening = edgeadapt.Adapter.open
    marks.append(time.monotonic())
    with opening(setting["bundle"], setting["budget"], setting["threads"], prepared=setting["prepared"]) as adapter:
        marks.append(time.monotonic())
        adapter.predict(np.zeros((1, *adapter.manifest.input.shape), np.float32))
        marks.append(time.monotonic())
        print(json.dumps({"marks": marks, "graphs": adapter.memory["graphs"]}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", nargs="?", type=Path)
    parser.add_argument("--budget", default="256MiB")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--setting", help=argparse.SUPPRESS)
    choices = parser.parse_args()
    if choices.setting:
        child(json.loads(choices.setting))
        return
    with tempfile.TemporaryDirectory() as name:
        bundle = choices.bundle
        if bundle is None:
            from benchmarks._pairs import make_bundle

            bundle, _ = make_bundle(Path(name), "resnet20", "ecotta", [16], 4)
        print(f"{bundle.name}, budget {choices.budget}, medians of {choices.rounds} processes, milliseconds")
        print(f"{'':10}" + "".join(f"{part:>18}" for part in (*PARTS, "all")))
        for prepared in (False, True):
            rows = []
            for _ in range(choices.rounds):
                setting = {"bundle": str(bundle), "budget": choices.budget, "threads": choices.threads, "prepared": prepared}
                begin = time.monotonic()
                found = json.loads(
                    subprocess.run([sys.executable, __file__, "--setting", json.dumps(setting)], capture_output=True, check=True).stdout
                )
                marks = [begin, *found["marks"]]
                rows.append([1e3 * (after - before) for before, after in zip(marks, marks[1:])] + [1e3 * (marks[-1] - begin)])
            medians = [statistics.median(column) for column in zip(*rows)]
            print(f"{'prepared' if prepared else 'exported':10}" + "".join(f"{value:18.0f}" for value in medians))


if __name__ == "__main__":
    main()
