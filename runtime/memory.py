"""What the process holds, what serving a bundle adds to it, and the one budget a process may have."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import onnxruntime

from edgeadapt.bundle import Bundle
from edgeadapt.errors import BudgetError
from edgeadapt.memory import Graph, Machine, Plan, footprint, read, smallest, suited
from edgeadapt.memory.ledger import Ledger, Line
from edgeadapt.memory.rules import SEGMENT
from edgeadapt.runtime.prepared import Prepared
from edgeadapt.runtime.region import Region
from edgeadapt.units import format_bytes

FIRST_GRAPH = "predict.b1"
"""The graph that is loaded at opening, because every adapter needs it."""

_SMALL = 8192  # bytes of a session's small constants and of rounding in what it keeps: 1 to 3 KiB measured
_NODE = 6144  # a session's structures, a node, where the graph is not read
_CODE = 2_000_000  # less than the ledger's: a session and an error of onnxruntime were there already
_ALLOWANCE = 2**20  # found resident at most, on three bundles, beyond the other lines: 0.6 MiB
_PACKS_INSIDE = tuple(int(part) for part in onnxruntime.__version__.split(".")[:2]) < (1, 28)
"""Packed matrices lie in the region, as seen with 1.23; beside it with 1.31. In between there is room in both places."""
_PAGE = os.sysconf("SC_PAGE_SIZE")


def resident(root: str = "/") -> int:
    """The process's resident bytes now, as the operating system counts them. root: the folder that `proc` lies in."""
    return _statm(root)[1]


def mapped_files(root: str = "/") -> int:
    """Of the resident bytes, those of mapped files: libraries, and the bundle's weights."""
    return _statm(root)[2]


def _statm(root: str) -> list[int]:
    with open(os.path.join(root, "proc/self/statm"), "rb") as file:
        return [int(number) * _PAGE for number in file.read().split()]


def peak() -> int:
    """The most the process has held resident since it began, in bytes."""
    with open("/proc/self/status", "rb") as file:
        for line in file:
            if line.startswith(b"VmHWM:"):
                return int(line.split()[1]) * 1024
    return resident()


@dataclass(frozen=True)
class Need:
    """What one graph takes, in bytes.

    Attributes:
        region: the smallest one region that a run goes through.
        room: that with a margin.
        inside, beside: copies of its weights that are made while it loads, in the region and besides.
        structures: of its session.
        exact: whether `region` was counted; else it is the manifest's word, and nothing bounds it.
        places: windows of the bundle's file and of the prepared graphs' that its weights lie in, as `footprint.windows` has them; None: unknown.
    """

    region: int
    room: int
    inside: int
    beside: int
    structures: int
    exact: bool
    places: tuple[int, int] | None = None


def margined(region: int) -> int:
    """A region with a margin over the size that the count says works."""
    return region + max(int(footprint.MARGIN * region), footprint.LEAST_MARGIN)


class Needs:
    """What the graphs of a bundle take; each is read when it is first asked for, and only these figures are kept.

    A ledger of the whole bundle would keep all graphs in memory at once: 20 MB for ten graphs of a WideResNet-40-2.

    Args:
        bundle: the bundle.
        threads: of one operator.
        prepared: graphs that will run instead of the bundle's; None for none.
        counted: False takes the manifest's word, which costs nothing and bounds nothing.

    Attributes:
        bundle, threads, prepared: as given.
    """

    def __init__(self, bundle: Bundle, threads: int, prepared: Prepared | None = None, counted: bool = True) -> None:
        self.bundle, self.threads, self.prepared, self._counted = bundle, threads, prepared, counted
        self._prepared = {} if prepared is None else prepared.graphs
        self._sizes = (bundle.path.stat().st_size, 0 if prepared is None else prepared.own_bytes)
        self._machine = Machine.here(threads)
        self._found: dict[str, Need] = {}

    def __getitem__(self, name: str) -> Need:
        """The need of a graph, by its name.

        Raises:
            BundleError: it is damaged.
        """
        if name not in self._found:
            self._found[name] = self._read(name)
        return self._found[name]

    def _read(self, name: str) -> Need:
        spec = self.bundle.manifest.graphs[name]
        if not self._counted:
            return Need(spec.peak_bytes, margined(spec.peak_bytes), 0, 0, _NODE * spec.nodes, False)
        graph, ready = self.graph(name), self._prepared.get(name)
        places = footprint.places(graph, ready is not None, _PAGE)
        structures = footprint.session_bytes(graph)
        told = spec.region_bytes + (self.threads - 1) * SEGMENT if spec.region_bytes else 0  # a convolution's workspace, for each thread
        if ready is not None:  # it was seen to run in its region, and was kept because that is within what was planned for the exported graph
            region = ready.region_bytes
            room = max(region, min(margined(region), margined(told) if told else margined(region)))
            return Need(region, room, ready.packed_bytes, ready.reserved_bytes, structures, True, places)
        inside, beside = footprint.prepacked(graph)
        if _PACKS_INSIDE:
            inside += beside
        if graph.unknown():
            return Need(spec.peak_bytes, margined(spec.peak_bytes), inside, beside, structures, False, places)
        region = told or smallest(Plan(graph, machine=self._machine))
        return Need(region, margined(region), inside, beside, structures, True, places)

    def weights(self, names: Iterable[str]) -> int:
        """Bytes of the files of weights that are mapped once these graphs have run."""
        masks = [0, 0]
        for name in names:
            found = self[name].places
            if found is None:
                return sum(self._sizes)
            masks = [mask | more for mask, more in zip(masks, found)]
        return sum(footprint.mapped_pages(mask, size, _PAGE) for mask, size in zip(masks, self._sizes))

    def any_prepared(self, names: Iterable[str]) -> bool:
        """Whether one of these graphs runs as it was prepared."""
        return any(name in self._prepared for name in names)

    def graph(self, name: str) -> Graph:
        """A graph as it will run."""
        where = f"{self.bundle.path.name}: {name}"
        if (ready := self._prepared.get(name)) is not None:
            try:
                return read(ready.model.read_bytes(), where)
            except OSError as reason:
                raise BudgetError(f"{ready.model}: the prepared graph has gone ({reason.strerror})", "open the bundle again") from None
        return read(self.bundle.graph_bytes(name), where)

    def layout(self, name: str) -> Plan:
        """What a graph does to memory on this machine."""
        return Plan(self.graph(name), machine=self._machine)

    def correct(self, name: str) -> None:
        """Counts a graph's region anew, where what the bundle says has turned out too small."""
        region = smallest(self.layout(name))
        self._found[name] = replace(self[name], region=region, room=margined(region))


@dataclass(frozen=True)
class Planned:
    """Graphs that are loaded together.

    Attributes:
        graphs: their names.
        region: what they take their tensors from.
        ledger: what they add to a process in which onnxruntime has made its first session.
    """

    graphs: tuple[str, ...]
    region: Region
    ledger: Ledger

    @property
    def total(self) -> int:
        """Bytes added, at the peak."""
        return self.ledger.total

    def lines(self) -> dict[str, int]:
        """Bytes by line."""
        return {line.name: line.bytes for line in self.ledger.lines}


def planned(needs: Needs, names: Sequence[str], prepacking: bool = True, bounded: bool = True, more: int = 0) -> Planned:
    """What serving with these graphs adds to a process in which onnxruntime has made its first session.

    Args:
        needs: the bundle's.
        names: the graphs.
        prepacking: let onnxruntime keep copies of weights in the layout that its operators like.
        bounded: in one region that never grows, if all of them can be counted.
        more: bytes to make that region larger.
    """
    bundle, found = needs.bundle, [needs[name] for name in names]
    manifest = bundle.manifest
    inside = sum(need.inside for need in found) if prepacking else 0
    beside = sum(need.beside for need in found) if prepacking else 0
    largest = max(found, key=lambda need: need.room)
    top, margin = largest.region, largest.room - largest.region + more
    fixed = bounded and all(need.exact for need in found)
    region = Region(_up(top + margin + inside), _up(beside + _SMALL * len(names)), prepacking) if fixed else Region()
    code = _CODE + (footprint.FUSED_CODE if needs.any_prepared(names) else 0)
    bound = sum(len(manifest.graphs[name].reads) + len(manifest.graphs[name].writes) for name in names)
    lines = [
        Line("region", top + margin, "counted", f"tensors and workspace, with a margin of {format_bytes(margin)}"),
        Line("region's table", (top + margin + inside) // 256 * footprint.TABLE_ENTRY, "counted", "onnxruntime's own list of its pieces"),
        Line("prepacked weights", inside + beside, "counted", "copies that onnxruntime keeps" if prepacking else "switched off"),
        Line("weights", needs.weights(names), "counted", "mapped once for all graphs"),
        Line("graph structures", sum(need.structures for need in found), "measured", f"of {len(names)} graphs"),
        Line("code", code, "measured", "pages of the libraries that only real graphs reach"),
        Line("adapter", footprint.TENSOR * len(manifest.state) + footprint.BOUND * bound, "measured", "views and bindings"),
        Line("state", footprint.state_bytes(manifest.state, manifest.graphs, names), "counted", "the set in use, and the one written next"),
        Line("frames and logits", _buffers(bundle, names), "counted", "of the largest batch, the caller's and ours"),
        Line("allowance", _ALLOWANCE, "estimated", "for what differs from run to run"),
    ]
    return Planned(tuple(names), region, Ledger(tuple(lines)))


def laid_out(needs: Needs, plan: Planned) -> Planned:
    """The same plan with a region in which all of its graphs were laid out, as onnxruntime will do it: see `suited`."""
    if not plan.region.size:
        return plan
    names, prepacking = plan.graphs, plan.region.prepacking
    inside = sum(needs[name].inside for name in names) if prepacking else 0
    for corrected in (False, True):
        base = plan.region.size - inside
        large = [name for name in names if 2 * needs[name].region > base]
        size = suited(base, [partial(needs.layout, name) for name in large])
        if size is not None or corrected:
            break
        for name in large:  # what the bundle says of them is too small
            needs.correct(name)
        plan = planned(needs, names, prepacking)
    return plan if size in (None, base) else planned(needs, names, prepacking, more=size - base)


def _up(size: int) -> int:
    return -(-size // 256) * 256


def _buffers(bundle: Bundle, names: Iterable[str]) -> int:
    manifest = bundle.manifest
    frame, output = 4, 4 * manifest.task.classes
    for size in manifest.input.shape:
        frame *= size
    if manifest.task.kind == "segmentation":
        for size in manifest.input.shape[1:]:
            output *= size  # at most one score a pixel and class
    return 2 * max(manifest.graphs[name].batch for name in names) * (frame + output)


class Claim:
    """One adapter's claim on the process's budget, until it is released or collected.

    Attributes:
        budget: the most bytes the process may hold resident.
        filled: what it may come to hold by what was opened under this claim.
    """

    def __init__(self, owner: Claims, budget: int) -> None:
        self._owner, self.budget, self.filled = owner, budget, 0

    def promised(self) -> int:
        """What the process may come to hold by what was opened under any claim, in bytes."""
        return max((claim.filled for claim in self._owner.living()), default=0)

    def release(self) -> None:
        """Gives it back; a second time nothing happens."""
        self._owner.drop(self)


class Claims:
    """The budgets of a process's living adapters. The budget bounds the process, so they must all have the same one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: weakref.WeakSet[Claim] = weakref.WeakSet()

    @contextmanager
    def taken(self, budget: int) -> Iterator[Claim]:
        """A claim, released again if what is done with it raises.

        Raises:
            BudgetError: another budget is claimed in this process.
        """
        with self._lock:
            for other in self._held:
                if other.budget != budget:
                    raise BudgetError(
                        f"this process has an adapter with a budget of {format_bytes(other.budget)}; a second one cannot have {format_bytes(budget)}",
                        "close the first, give both the same budget, or open the second in another process",
                    )
            claim = Claim(self, budget)
            self._held.add(claim)
        try:
            yield claim
        except BaseException:
            claim.release()
            raise

    def living(self) -> list[Claim]:
        """All that are held."""
        with self._lock:
            return list(self._held)

    def drop(self, claim: Claim) -> None:
        """Lets go of one."""
        with self._lock:
            self._held.discard(claim)


CLAIMS = Claims()
"""Those of this process."""
