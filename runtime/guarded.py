"""What a guard needs of a bundle, and what it takes beside the adapter."""

from __future__ import annotations

import math

from edgeadapt.bundle import Manifest
from edgeadapt.errors import UsageError


def check_guarded(manifest: Manifest) -> None:
    """See that a bundle can be served with a guard.

    Raises:
        UsageError: it does not say what its source looks like.
    """
    if manifest.reference is None:
        raise UsageError("a guard compares a stream with the source, and this bundle does not say what that looks like", "export it with --data")


def guarding_bytes(manifest: Manifest) -> int:
    """The most bytes that a guard holds beside the adapter: copies of what steps and passes change, and what it makes of a window's logits.

    Of what steps alone change: what the model started as, the last good or what is laid by, and what is put back after a look. Of what passes change:
    the source's, its means and precisions, what is put back, the statistics of the model that learned nothing on the windows of a probation and on
    this one, and means before and after a window.
    """
    passing, stepping = (written(manifest, role) for role in ("predict", "adapt"))
    sizes = {spec.name: spec.nbytes for spec in manifest.state}
    state = 3 * sum(size for name, size in sizes.items() if name in stepping - passing)
    state += 6 * sum(size for name, size in sizes.items() if name in passing)
    places = 1 if manifest.task.kind == "classification" else math.prod(manifest.input.shape[1:])
    classes, frames = manifest.task.classes, max(manifest.batches)
    logits = frames * (3 * 8 * classes + 4 * 4 * classes * places + 3 * 4 * places) + 4 * 4 * classes * places  # shares, logits, labels; one frame's
    return state + logits + 2**20  # as much is read at a time of what the bundle began with


def saving_bytes(manifest: Manifest) -> int:
    """The most bytes that are held while a state is saved apart: its copy, and what the guard puts away and replaces before it is written."""
    passing, stepping = (written(manifest, role) for role in ("predict", "adapt"))
    sizes = {spec.name: spec.nbytes for spec in manifest.state}
    return sum(sizes.values()) + 2 * sum(size for name, size in sizes.items() if name in stepping - passing)


def written(manifest: Manifest, role: str) -> set[str]:
    """State that graphs of a role change, its steps in pieces among them."""
    return {name for graph in manifest.graphs.values() if graph.role.partition("-")[0] == role for name in graph.writes}
