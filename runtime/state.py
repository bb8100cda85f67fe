"""The state: every tensor that outlives a step, in one flat buffer, each as small as it is held between steps.

Graphs read the current set of a tensor and write the next one; a step that turns out finite swaps the two, any other is forgotten by not
swapping. Tensors are grouped by *which graphs write them*, and a group is swapped as a whole: a graph writes all of a group or none of it,
so the tensors it leaves alone never need copying from set to set, and tensors that no graph writes exist once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeadapt.bundle import GraphSpec, Manifest, StateSpec, tensors
from edgeadapt.errors import StateError

Floats = NDArray[np.float32]
Array = NDArray[Any]

_ALIGNMENT = 16  # floats: 64 bytes


@dataclass(frozen=True)
class Group:
    """Tensors that the same graphs write: their names, and the flat region of each set, whose first `floats` numbers are all that is float32."""

    names: tuple[str, ...]
    sets: tuple[Floats, ...]
    floats: int


class FlatState:
    """Named tensors in one buffer, one or two sets of each. Those that are not float32 hold whole numbers.

    Args:
        specs: the tensors.
        graphs: the graphs that read and write them.
        initial: their values, one array for every spec, of its type.

    Attributes:
        buffer: the whole memory.
        groups: the groups; `parity` has for each the set that is current.
        replaced: how often the whole state was put in place from outside.
        written: for every graph the indices of the groups it writes.
        touched: for every graph the indices of the groups it reads or writes.
    """

    def __init__(self, specs: Sequence[StateSpec], graphs: Mapping[str, GraphSpec], initial: Mapping[str, Array]) -> None:
        self._specs = {spec.name: spec for spec in specs}
        writers = {spec.name: frozenset(name for name, graph in graphs.items() if spec.name in set(graph.writes)) for spec in specs}
        members: dict[frozenset[str], list[str]] = {}
        for spec in sorted(specs, key=lambda spec: spec.dtype != "float32"):
            members.setdefault(writers[spec.name], []).append(spec.name)
        sizes = {spec.name: _rounded(-(-spec.nbytes // 4)) for spec in specs}
        total = sum(sizes[name] * (2 if who else 1) for who, names in members.items() for name in names)
        self.buffer = _aligned(total)
        self._views: dict[str, tuple[Array, ...]] = {}
        groups, position = [], 0
        for who, names in members.items():
            length = sum(sizes[name] for name in names)
            sets = tuple(self.buffer[position + k * length : position + (k + 1) * length] for k in range(2 if who else 1))
            position += length * len(sets)
            groups.append(Group(tuple(names), sets, sum(sizes[name] for name in names if self._specs[name].dtype == "float32")))
            begin = 0
            for name in names:
                self._views[name] = tuple(_view(region[begin : begin + sizes[name]], self._specs[name]) for region in sets)
                begin += sizes[name]
        self.groups = tuple(groups)
        self.parity = [0] * len(groups)
        place = {name: index for index, group in enumerate(groups) for name in group.names}
        self.written = {name: tuple(sorted({place[item] for item in graph.writes})) for name, graph in graphs.items()}
        self.touched = {name: tuple(sorted({place[item] for item in (*graph.reads, *graph.writes)})) for name, graph in graphs.items()}
        self._place = place
        self.replaced = 0
        self._check(initial)
        for name in self._specs:
            self._views[name][0][...] = initial[name]

    @property
    def nbytes(self) -> int:
        """Bytes of all sets."""
        return int(self.buffer.nbytes)

    @property
    def untouched(self) -> int:
        """Bytes of sets that only a run fills: the following ones."""
        return sum(4 * len(group.sets[1 - parity]) for group, parity in zip(self.groups, self.parity) if len(group.sets) == 2)

    def views(self, name: str) -> tuple[Array, ...]:
        """A tensor's memory itself, in each of its sets; one that no graph writes has only one."""
        return self._views[name]

    def current_set(self, name: str) -> int:
        """Which of a tensor's sets is current."""
        return self.parity[self._place[name]]

    def current(self) -> dict[str, Array]:
        """Copies of the current tensors, in the order of the specs."""
        return {name: array.copy() for name, array in self.seen().items()}

    def seen(self) -> dict[str, Array]:
        """The current tensors' memory itself, in the order of the specs: good until the next step or `replace`."""
        return {name: self._views[name][self.current_set(name)] for name in self._specs}

    def replace(self, values: Mapping[str, Array]) -> None:
        """Makes copies of `values` the current tensors, all of them or none.

        Each value is asked for twice, one after the other, and not kept; only of tensors that no graph writes, which have no following set, copies
        are held until all were read.

        Raises:
            StateError: names, shapes or dtypes differ from the specs, or a value is not finite; or what asking for a value raises.
        """
        self._check(values)
        single = {name: values[name] for group in self.groups if len(group.sets) == 1 for name in group.names}
        double = [index for index, group in enumerate(self.groups) if len(group.sets) == 2]
        for name in (name for index in double for name in self.groups[index].names):
            self._views[name][1 - self.current_set(name)][...] = values[name]
        for name, array in single.items():
            self._views[name][0][...] = array
        self.swap(double)
        self.replaced += 1

    def _check(self, values: Mapping[str, Array]) -> None:
        if odd := sorted(set(values) ^ set(self._specs)):
            raise StateError(f"state tensor {odd[0]!r} {'is missing' if odd[0] in self._specs else 'is not known'}", "take the state of this bundle")
        for name, spec in self._specs.items():
            array = np.asarray(values[name])
            if array.dtype != spec.dtype or array.shape != spec.shape:
                raise StateError(
                    f"state tensor {name!r} is {array.dtype} {list(array.shape)}, not {spec.dtype} {list(spec.shape)}",
                    "take the state of this bundle",
                )
            if not tensors.finite(array):
                raise StateError(f"state tensor {name!r} holds NaN or infinite values", "go back to an older state, or reset")
            del array  # before the next is read

    def finite(self, groups: Sequence[int]) -> bool:
        """Whether the following set of these groups holds finite values only. Whole numbers always are: of what made them the graph itself tells."""
        following = ((self.groups[index], 1 - self.parity[index]) for index in groups)
        return all(tensors.finite(group.sets[which][: group.floats]) for group, which in following)

    def swap(self, groups: Sequence[int]) -> None:
        """Makes the following set of these groups the current one."""
        for index in groups:
            self.parity[index] ^= 1


class Sums:
    """What the runs of a step in pieces add up, in one buffer that is no part of the state: each run adds in place, and the next step begins anew.

    Args:
        manifest: of the bundle.
        names: the graphs that are run; only the sums of these have memory.

    Attributes:
        buffer: the whole memory.
    """

    def __init__(self, manifest: Manifest, names: Iterable[str]) -> None:
        used = {name for graph in names for name in manifest.graphs[graph].sums}
        specs = [spec for spec in manifest.sums if spec.name in used]
        self.buffer = _aligned(sum(_rounded(math.prod(spec.shape)) for spec in specs))
        self._views: dict[str, Floats] = {}
        begin = 0
        for spec in specs:
            count = math.prod(spec.shape)
            self._views[spec.name] = self.buffer[begin : begin + count].reshape(spec.shape)
            begin += _rounded(count)

    def view(self, name: str) -> Floats:
        """A sum's memory itself."""
        return self._views[name]


def _view(region: Floats, spec: StateSpec) -> Array:
    """The tensor at the beginning of a region."""
    return region.view(np.uint8)[: spec.nbytes].view(spec.dtype).reshape(spec.shape)


def _rounded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _aligned(size: int) -> Floats:
    """Zeros whose first lies at a multiple of 64 bytes; the gaps between tensors stay zero, hence finite."""
    memory = np.zeros(size + _ALIGNMENT, np.float32)
    skip = -(memory.ctypes.data // 4) % _ALIGNMENT
    return memory[skip : skip + size]
