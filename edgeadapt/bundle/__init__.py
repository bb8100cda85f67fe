"""The bundle: its file, its manifest, its weights and its tensors."""

from __future__ import annotations

from edgeadapt.bundle.container import Bundle, Graph, write_bundle
from edgeadapt.bundle.manifest import (
    GraphSpec,
    HyperSpec,
    InputSpec,
    Manifest,
    Member,
    MethodInfo,
    ModelInfo,
    Part,
    StateSpec,
    StatisticsInfo,
    Task,
)
from edgeadapt.bundle.weights import PLACEHOLDER, WEIGHTS_OFFSET, WeightsFile

__all__ = [
    "PLACEHOLDER",
    "WEIGHTS_OFFSET",
    "Bundle",
    "Graph",
    "GraphSpec",
    "HyperSpec",
    "InputSpec",
    "Manifest",
    "Member",
    "MethodInfo",
    "ModelInfo",
    "Part",
    "StateSpec",
    "StatisticsInfo",
    "Task",
    "WeightsFile",
    "write_bundle",
]
