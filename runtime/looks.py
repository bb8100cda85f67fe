"""Looks at a window that leave an adapter's state as it was."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np

from edgeadapt.runtime.adapter import Adapter
from edgeadapt.runtime.learned import unchanged
from edgeadapt.runtime.state import Floats

_LITTLE = 0.02  # of a window's statistics, where these are only looked at


def means(adapter: Adapter, names: Collection[str], passing: Collection[str], x: Floats, together: int) -> dict[str, Floats]:
    """Channel means of a window where layers are normalised as they are now: little of them is mixed in, and everything is put back.

    Args:
        adapter: the adapter.
        names: of the tensors that are those means.
        passing: names of all tensors that a pass changes.
        x: the window.
        together: frames in a pass. 0, or where passes would be of several sizes: it cannot be looked at, and the means are as they stand.
    """
    held = adapter.tensors(names)
    if not together or len(x) % together:
        return held
    passes = len(x) // together
    mixed = 1.0 - (1.0 - _LITTLE / passes) ** passes
    with unchanged(adapter, passing):
        adapter.predict(x, True, mix=_LITTLE / passes)
        after = adapter.tensors(names)
    return {name: value + (after[name] - value) / np.float32(mixed) for name, value in held.items()}


def natural(adapter: Adapter, source: Mapping[str, Floats], x: Floats) -> Floats:
    """Logits with the source's statistics: a window of one class, normalised by its own, looks as if it were of many."""
    with unchanged(adapter, source):
        adapter.put(source)
        return adapter.predict(x, update_statistics=False)
