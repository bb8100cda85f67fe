"""Processes that tests start."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TELLS = tuple(map(int, version("onnxruntime").split(".")[:2])) >= (1, 28)
"""Whether onnxruntime's profiler tells memory."""


def environment() -> dict[str, str]:
    """This process's, with the checkout found first and whatever was found before still found (under emulation the packages themselves)."""
    before = os.environ.get("PYTHONPATH")
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *([before] if before else [])])}


def heed_interrupts() -> None:
    """To be called in the child: what was started in the background ignores interrupts, and its children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def run_json(command: Sequence[str]) -> Any:
    """What a child prints, as JSON."""
    return json.loads(subprocess.run(list(command), capture_output=True, text=True, check=True, cwd=ROOT, env=environment()).stdout)
