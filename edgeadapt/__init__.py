"""Keeps a PyTorch model accurate after it is deployed: compile it once into a bundle, adapt it on the device with stock onnxruntime.

`import edgeadapt` loads nothing heavy; `Adapter` brings numpy and onnxruntime, `export` brings torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from edgeadapt._version import __version__
from edgeadapt.errors import (
    BudgetError,
    BundleError,
    ConfigError,
    EdgeAdaptError,
    ExportError,
    InputError,
    SourceError,
    StateError,
    UsageError,
)

if TYPE_CHECKING:
    from edgeadapt.exporters.export import export
    from edgeadapt.runtime.adapter import Adapter

__all__ = [
    "Adapter",
    "BudgetError",
    "BundleError",
    "ConfigError",
    "EdgeAdaptError",
    "ExportError",
    "InputError",
    "SourceError",
    "StateError",
    "UsageError",
    "__version__",
    "export",
]

_LAZY = {"Adapter": "edgeadapt.runtime.adapter", "export": "edgeadapt.exporters.export"}


def __getattr__(name: str) -> Any:
    """PEP 562: the heavy names are imported when they are first used."""
    if name not in _LAZY:
        raise AttributeError(f"module 'edgeadapt' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_LAZY[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
