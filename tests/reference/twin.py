"""The plain implementation of what a bundle does, from what the bundle says about itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, numpy_helper
from torch import nn

from edgeadapt.bundle import Bundle
from tests.reference.base import Adaptation, Norm, Source, Tent
from tests.reference.ecotta import EcoTTA
from tests.reference.parts import counts
from tests.reference.side import Side


def scalars(manifest: Mapping[str, Any], batch: int, role: str = "adapt") -> dict[str, float]:
    """Values of the step's scalars at a batch size: the graph's own defaults, before the bundle's."""
    graphs = manifest["graphs"]
    graph = graphs.get(f"{role}.b{batch}") or graphs[f"predict.b{batch}"]
    return {name: spec["default"] for name, spec in manifest["hyper"].items()} | graph.get("defaults", {})


def fixed(bundle: Bundle) -> dict[str, np.ndarray]:
    """The method's parameters that the bundle does not train, read from its first graph."""
    graph, mapped, prefix, found = onnx.load_from_string(bundle.graph_bytes("predict.b1")).graph, bundle.mapped(), "weights.fixed.", {}
    for tensor in graph.initializer:
        if not tensor.name.startswith(prefix):
            continue
        if tensor.data_location == TensorProto.EXTERNAL:
            place = {entry.key: entry.value for entry in tensor.external_data}
            start = int(place["offset"])
            array = np.frombuffer(mapped[start : start + int(place["length"])], np.float32).reshape(tuple(tensor.dims))
        else:
            array = numpy_helper.to_array(tensor)
        found[tensor.name.removeprefix(prefix)] = np.array(array)
    return found


def twin(
    model: nn.Module,
    manifest: Mapping[str, Any],
    state: Mapping[str, np.ndarray],
    batch: int,
    role: str = "adapt",
    frozen: Mapping[str, np.ndarray] | None = None,
    **options: Any,
) -> Adaptation:
    """A method around a copy of `model`, at the bundle's initial state.

    Args:
        model: the model that was exported.
        manifest: the bundle's manifest as plain JSON values.
        state: the bundle's initial tensors by name.
        batch, role: the graph whose scalars are taken.
        frozen: parameters that stay as they are, see `fixed`.
        options: scalars that differ, and options of the method's class.
    """
    method, chosen = manifest["method"]["name"], manifest["method"]["options"]
    settings: dict[str, Any] = {"live": manifest["statistics"]["mode"] == "live", "exact": bool(chosen.get("exact_gradient"))}
    settings |= {"optimiser": chosen.get("optimiser") or None, **scalars(manifest, batch, role), **options}
    kind: Any = {"source": Source, "norm": Norm, "tent": Tent, "ecotta": EcoTTA, "side": Side}[method]
    extra = {"counts": counts(model, [part["name"] for part in manifest["partition"][1:]])} if method == "ecotta" else {}
    plain = kind(model, **extra, **settings)
    plain.freeze({name: torch.from_numpy(value) for name, value in (frozen or {}).items()})
    plain.load({name: torch.from_numpy(np.array(value)) for name, value in state.items()})
    return plain
