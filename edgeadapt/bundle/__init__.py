"""The bundle: its file, its manifest, its weights and its tensors."""

from __future__ import annotations

from edgeadapt.bundle.container import Bundle, Graph, write_bundle
from edgeadapt.bundle.graphspec import Figures, GraphSpec
from edgeadapt.bundle.inputspec import InputSpec
from edgeadapt.bundle.manifest import (
    HyperSpec,
    Manifest,
    Member,
    MethodInfo,
    ModelInfo,
    Part,
    StateSpec,
    StatisticsInfo,
    SumSpec,
    Task,
)
from edgeadapt.bundle.roles import Form
from edgeadapt.bundle.weights import PLACEHOLDER, WEIGHTS_OFFSET, WeightsFile

__all__ = [
    "PLACEHOLDER",
    "WEIGHTS_OFFSET",
    "Bundle",
    "Figures",
    "Form",
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
    "SumSpec",
    "Task",
    "WeightsFile",
    "write_bundle",
]
