"""The device: a bundle's graphs on stock onnxruntime, the state they change, and the adapter that serves frames.

Importing this package loads nothing yet, but sets what must be set before numpy and onnxruntime load.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgeadapt.runtime.adapter import Adapter

__all__ = ["Adapter"]

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # else onnxruntime starts a thread that reports home: 1.8 MB, and frames are private
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # else numpy starts threads that we never use


def __getattr__(name: str) -> Any:
    """PEP 562: `Adapter` brings numpy and onnxruntime when it is first used."""
    if name != "Adapter":
        raise AttributeError(f"module 'edgeadapt.runtime' has no attribute {name!r}")
    return import_module("edgeadapt.runtime.adapter").Adapter
