"""onnxruntime's arena over one region of fixed size: best fit with coalescing, no waste kept in a block (`max_dead_bytes_per_chunk` = 1).

What is in use does not tell what size of region works: free space lies in pieces. The layout of one run is played through here; after it everything
is free again and the region whole, so the next run finds what the first found.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Sequence

from edgeadapt.memory.liveness import Plan
from edgeadapt.memory.rules import ALIGNMENT

TRIES = 32
"""How many sizes are tried where one must suit several graphs: up to a quarter more."""


class Region:
    """One region and what lies in it."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._next: dict[int, int] = {0: size}  # of every piece: where the next begins
        self._before: dict[int, int] = {size: 0}
        self._free: dict[int, list[tuple[int, int]]] = {}  # by bin: (bytes, offset), sorted
        self._place: dict[str, int] = {}
        self._open: dict[int, int] = {}  # bytes of free pieces by offset
        self._add(0, size)

    @staticmethod
    def _bin(size: int) -> int:
        return min(20, max(0, (size // 256).bit_length() - 1))

    def _add(self, offset: int, size: int) -> None:
        self._open[offset] = size
        insort(self._free.setdefault(self._bin(size), []), (size, offset))

    def _remove(self, offset: int) -> int:
        size = self._open.pop(offset)
        self._free[self._bin(size)].remove((size, offset))
        return size

    def allocate(self, name: str, size: int) -> bool:
        """Place a block of `size` bytes, a multiple of 256; whether there was room."""
        for number in range(self._bin(size), 21):
            for found, offset in self._free.get(number, ()):
                if found >= size:
                    self._remove(offset)
                    if found > size:
                        end = self._next[offset]
                        self._next[offset], self._next[offset + size] = offset + size, end
                        self._before[end], self._before[offset + size] = offset + size, offset
                        self._add(offset + size, found - size)
                    self._place[name] = offset
                    return True
        return False

    def free(self, name: str) -> None:
        """Give a block back and join it with free neighbours."""
        offset = self._place.pop(name)
        end = self._next[offset]
        if end in self._open:
            self._remove(end)
            end = self._next.pop(end)
        if (before := self._before.get(offset, -1)) in self._open:
            self._remove(before)
            del self._next[offset]
            offset = before
        self._next[offset], self._before[end] = end, offset
        self._add(offset, end - offset)

    def run(self, plan: Plan) -> bool:
        """Play one run through; whether there was room. What nobody read is given back at its end, as onnxruntime does."""
        for event in plan.events:
            outputs = [(name, plan.sizes[name]) for name in event.taken]
            scratch = [(f" {index}", size) for index, size in enumerate(event.pieces)]
            for name, size in scratch + outputs if event.before else outputs + scratch:
                if not self.allocate(name, size):
                    return False
            for index in range(len(event.pieces)):
                self.free(f" {index}")
            for name in event.freed:
                self.free(name)
        for name in list(self._place):
            self.free(name)
        return True


def fits(plan: Plan, size: int) -> bool:
    """Whether runs of the plan go through in a region of `size` bytes."""
    return Region(size // ALIGNMENT * ALIGNMENT).run(plan)


def smallest(plan: Plan) -> int:
    """A size of region that works and below which a search by halves found none that does, in bytes. What fits is not monotone in the size."""
    low, high = plan.peak // ALIGNMENT - 1, max(plan.peak // ALIGNMENT, 1)
    while not fits(plan, high * ALIGNMENT):
        low, high = high, high + max(high // 16, 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(plan, middle * ALIGNMENT) else (middle, high)
    return high * ALIGNMENT


def suited(base: int, plans: Sequence[Callable[[], Plan]]) -> int | None:
    """The first of a row of sizes, from `base` bytes on, in which all plans go through: what the device registers.

    What fits is not monotone in the size: a larger region may lead to other gaps, and fail (ResNet-20, a step at batch 8: 7,538,432 bytes work,
    7,613,696 do not, as counted and as run). So the very size is tried.

    Args:
        base: the size to begin with.
        plans: what runs there, one at a time; each is called anew when it is needed, so that not all are held at once.

    Returns:
        a multiple of 256; None where none of the row works.
    """
    first = -(-base // ALIGNMENT) * ALIGNMENT
    step = -(-max(first // 128, 4096) // ALIGNMENT) * ALIGNMENT
    tries, settled = 0, False
    while not settled:
        settled = True
        for make in plans:
            plan, before = make(), tries
            while not fits(plan, first + tries * step):
                tries += 1
                if tries > TRIES:
                    return None
            settled = settled and (tries == before or len(plans) == 1)
    return first + tries * step
