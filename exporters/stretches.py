"""Where work on a large tensor is cut, so that only a part of it exists in float32 at a time."""

from __future__ import annotations


def stretches(length: int, size: int, most: int, parts: int | None = None) -> list[tuple[int, int]]:
    """Where each stretch of an axis begins and ends, as equal as can be; one stretch: it is not cut.

    Args:
        length: of the axis, at least 1.
        size: of all of the tensor, in elements or bytes.
        most: of what lies in one stretch, in the same, but that stretches are whole numbers and `parts` bounds them.
        parts: stretches, at most; None: as many as it takes.
    """
    count = max(1, min(-(-size // most), length, length if parts is None else parts))
    ends = [length * index // count for index in range(count + 1)]
    return list(zip(ends, ends[1:]))
