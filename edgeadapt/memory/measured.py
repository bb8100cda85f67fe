"""A configuration run in a child process, and what the operating system counted there beside what was predicted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgeadapt.errors import BudgetError, EdgeAdaptError
from edgeadapt.memory.ledger import Ledger
from edgeadapt.memory.simulation import Choice

CHILD = "edgeadapt.runtime.measured"
"""The module that measures; it is run, not imported, because it needs onnxruntime."""

REGION = ("activations", "workspace", "gaps")
"""Lines of a ledger that lie in the region of memory for tensors."""


def measure(bundle: str | os.PathLike[str], choice: Choice, threads: int = 1, runs: int = 4, prepared: bool = False) -> dict[str, int]:
    """Opens a bundle in a process of its own, loads a configuration's graphs, and runs them.

    Args:
        bundle: the file.
        choice: what is run: each graph of it, the step last.
        threads: of one operator.
        runs: of each.
        prepared: run what was prepared for this machine, where there is such.

    Returns:
        bytes: "weights" (pages of the bundle's file, and of that of its prepared graphs), "region" (pages of the one region that were
        written to), "inside" (of that, weights in another layout), "state", "sums" of a step in pieces, and "peak".

    Raises:
        BudgetError: the child was killed, as the system does when memory runs out.
        EdgeAdaptError: it failed otherwise.
    """
    setting = {key: getattr(choice, key) for key in ("graphs", "prepacking", "role", "batch", "micro")}
    setting |= {"threads": threads, "runs": runs, "prepared": prepared}
    return _child([str(Path(bundle).resolve()), json.dumps(setting)])


def compare(ledger: Ledger, found: Mapping[str, int], floor: int) -> list[dict[str, Any]]:
    """Rows of {"name", "predicted", "measured"}: the lines that can be measured by themselves, the rest in one, and the peak.

    Args:
        ledger: what was predicted.
        found: what `measure` gave.
        floor: bytes of a process with one trivial session, without code that is given back, measured.
    """
    inside = found["inside"]
    rows: list[tuple[str, int, int]] = [
        ("Python and libraries", ledger["Python and libraries"].bytes, floor),
        ("weights", ledger["weights"].bytes, found["weights"]),
        ("region for tensors", sum(ledger[name].bytes for name in REGION) + inside, found["region"]),
        ("state", ledger["state"].bytes, found["state"]),
    ]
    if found["sums"]:
        rows.append(("sums", ledger["sums"].bytes, found["sums"]))
    total = ledger.total - sum(line.bytes for line in ledger.lines if line.name == "slack")  # nobody takes that here
    predicted, measured = total - sum(row[1] for row in rows), found["peak"] - sum(row[2] for row in rows)
    rows += [("all else", predicted, measured), ("process's peak", total, found["peak"])]
    return [{"name": name, "predicted": predicted, "measured": measured} for name, predicted, measured in rows]


def _child(arguments: Sequence[str]) -> dict[str, int]:
    environment = {**os.environ, "ORT_DISABLE_TELEMETRY": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    environment |= {f"{library}_NUM_THREADS": "1" for library in ("OMP", "OPENBLAS", "MKL")}
    ended = subprocess.run([sys.executable, "-m", CHILD, *arguments], check=False, capture_output=True, text=True, env=environment)
    if ended.returncode == 0:
        result: dict[str, int] = json.loads(ended.stdout.splitlines()[-1])
        return result
    if ended.returncode < 0:
        raise BudgetError(f"the measured process was ended by signal {-ended.returncode}", "there is not enough memory on this machine for it")
    reason = (ended.stderr.strip().splitlines() or ["it said nothing"])[-1]
    raise EdgeAdaptError(f"the measured process failed: {reason}", "run the bundle with edgeadapt run to see more")
