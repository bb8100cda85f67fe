"""Looks at a window that leave an adapter's state as it was."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np

from edgeadapt.runtime.adapter import Adapter
from edgeadapt.runtime.learned import unchanged
from edgeadapt.runtime.state import Floats

_LITTLE = 0.02  # of a window's statistics, where these are only looked at


def means(adapter: Adapter, names: Collection[str], passing: Collection[str], x: Floats, passes: Sequence[int]) -> dict[str, Floats]:
    """Channel means of a window where layers are normalised as they are now: little of them is mixed in, and everything is put back.

    Args:
        adapter: the adapter.
        names: of the tensors that are those means.
        passing: names of all tensors that a pass changes.
        x: the window.
        passes: frames of each pass in which it is predicted; none: it cannot be looked at, and the means are as they stand.

    So they are, too, where memory is short: passes may then be smaller than these.
    """
    held = adapter.tensors(names)
    if not passes or adapter.level:
        return held
    begin, remains = 0, 1.0
    with unchanged(adapter, passing):
        for size in passes:
            little = _LITTLE * size / len(x)
            adapter.predict(x[begin : begin + size], True, mix=little)
            begin, remains = begin + size, remains * (1.0 - little)
        after = adapter.tensors(names)
    return held if adapter.level else {name: value + (after[name] - value) / np.float32(1.0 - remains) for name, value in held.items()}


def natural(adapter: Adapter, source: Mapping[str, Floats], x: Floats) -> Floats:
    """Logits with the source's statistics: a window of one class, normalised by its own, looks as if it were of many."""
    with unchanged(adapter, source):
        adapter.put(source)
        return adapter.predict(x, update_statistics=False)
