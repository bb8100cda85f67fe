"""A bundle's file: written whole beside its place and opened as a device will, or written for a moment to be counted."""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from edgeadapt.bundle import Bundle, Manifest, atomic, write_bundle
from edgeadapt.errors import BundleError, ExportError
from edgeadapt.exporters.compile import Compiled, PlacedWeights
from edgeadapt.exporters.lowering.registry import numpy_dtype
from edgeadapt.exporters.programs import Model
from edgeadapt.memory import read
from edgeadapt.memory.figures import figures


def write(
    output: str | os.PathLike[str], manifest: Manifest, trained: Model, compiled: Sequence[Compiled], weights: PlacedWeights
) -> tuple[Path, Manifest]:
    """Write a bundle that a device can open; its path, and the manifest as written.

    Raises:
        ExportError: it cannot be written, or not be opened afterwards.
    """
    target = Path(output)
    try:
        with tempfile.TemporaryDirectory(prefix=atomic.temporary_prefix(target.name), dir=target.parent) as folder:
            draft = Path(folder) / target.name
            written = _put(draft, manifest, trained, compiled, weights, counted=True)
            _rehearse(draft)
            os.replace(draft, target)
        atomic.sync_folder(target.parent)
    except OSError as error:
        raise ExportError(
            f"{output}: cannot be written: {error.strerror or error}", "choose a path in an existing, writable folder with room"
        ) from error
    return target, written


@contextmanager
def opened(manifest: Manifest, model: Model, compiled: Sequence[Compiled], weights: PlacedWeights) -> Iterator[Bundle]:
    """The same as a bundle in a temporary file, which is there inside the context."""
    with tempfile.TemporaryDirectory(prefix="edgeadapt-") as folder:
        path = Path(folder) / "draft.edgeadapt"
        _put(path, manifest, model, compiled, weights)
        yield Bundle.open(path, verify=False)


def _put(path: Path, manifest: Manifest, trained: Model, compiled: Sequence[Compiled], weights: PlacedWeights, counted: bool = False) -> Manifest:
    """`counted`: with the figures that a device plans by."""
    state = {name: value.detach().numpy().astype(numpy_dtype(value.dtype)) for name, (_, value) in trained.state().items()}
    graphs = {item.name: item.model.SerializeToString(deterministic=True) for item in compiled}
    if counted:
        specs = {name: dataclasses.replace(spec, figures=figures(read(graphs[name], name))) for name, spec in manifest.graphs.items()}
        manifest = dataclasses.replace(manifest, graphs=specs)
    return write_bundle(path, manifest, weights.file, graphs, state)


def _rehearse(path: Path) -> None:
    """Open the bundle as the device will, before it takes its place.

    Raises:
        ExportError: the device would refuse it.
    """
    from edgeadapt.runtime.engine import rehearse  # here, as the device's memory settings would slow the warm-up down

    try:
        rehearse(path)
    except BundleError as error:
        raise ExportError(f"the bundle was compiled, but a device could not open it: {error.message}", "it was not written; report this") from error
