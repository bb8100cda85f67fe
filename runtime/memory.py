"""What the process holds, what serving a bundle adds to it, and the one budget a process may have."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import onnxruntime

from edgeadapt.bundle import Bundle
from edgeadapt.errors import BudgetError
from edgeadapt.memory import Graph, Machine, Plan, costs, fits, footprint, read, smallest
from edgeadapt.memory.ledger import Ledger, Line
from edgeadapt.runtime.prepared import Prepared
from edgeadapt.runtime.region import Region
from edgeadapt.units import format_bytes

FIRST_GRAPH = "predict.b1"
"""The graph that is loaded at opening, because every adapter needs it."""

MARGIN, LEAST_MARGIN = 0.05, 65536
"""What a region gets over the size that the count says works: a share, or that many bytes where they are more."""

_SMALL = 8192  # bytes of a session's small constants and of rounding in what it keeps: 1 to 3 KiB measured
_NODE = 6144  # a session's structures, a node, where the graph is not read
_CODE = 2_000_000  # less than the ledger's: a session and an error of onnxruntime were there already
_ALLOWANCE = 2**20  # found resident at most, on three bundles, beyond the other lines: 0.6 MiB
_TRIES = 16
_GFLOPS, _GBPS = 30.0, 8.0  # with these, forms of a step compare as they were measured to: a quarter in pieces 1.01 to 1.1, single frames 1.2 to 1.4
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
    """What one graph takes, in bytes, and roughly how long.

    Attributes:
        region: the smallest one region that a run goes through.
        inside, beside: copies of its weights that are made while it loads, in the region and besides.
        structures: of its session.
        exact: whether `region` was counted; else it is the manifest's word, and nothing bounds it.
        seconds: of a run, roughly; only the ratio of two says anything. 0 where the graph is not read.
    """

    region: int
    inside: int
    beside: int
    structures: int
    exact: bool
    seconds: float = 0.0


class Needs:
    """What the graphs of a bundle take; each is read when it is first asked for, and only these figures are kept.

    A ledger of the whole bundle would keep all graphs in memory at once: 20 MB for ten graphs of a WideResNet-40-2.

    Args:
        bundle: the bundle.
        threads: of one operator.
        prepared: graphs that will run instead of the bundle's; None for none.
        counted: False takes the manifest's word, which costs nothing and bounds nothing.

    Attributes:
        bundle, threads: as given.
        weights: bytes of all files of weights.
    """

    def __init__(self, bundle: Bundle, threads: int, prepared: Prepared | None = None, counted: bool = True) -> None:
        self.bundle, self.threads, self._counted = bundle, threads, counted
        self._prepared = {} if prepared is None else prepared.graphs
        self.weights = bundle.weights_size + (0 if prepared is None else prepared.own_bytes)
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
            return Need(spec.peak_bytes, 0, 0, _NODE * spec.nodes, False)
        graph, ready = self.graph(name), self._prepared.get(name)
        inside, beside = footprint.prepacked(graph)
        if _PACKS_INSIDE:
            inside += beside
        structures = footprint.session_bytes(graph)
        took = 0.0 if graph.unknown() else costs.seconds(graph, _GFLOPS, _GBPS)
        if ready is not None:
            return Need(ready.region_bytes, ready.packed_bytes, ready.reserved_bytes, structures, True, took)
        if graph.unknown():
            return Need(spec.peak_bytes, inside, beside, structures, False)
        more = (self.threads - 1) * LEAST_MARGIN  # the workspace of a convolution, for each thread
        region = spec.region_bytes + more if spec.region_bytes else smallest(self.layout(graph))
        return Need(region, inside, beside, structures, True, took)

    def graph(self, name: str) -> Graph:
        """A graph as it will run."""
        where = f"{self.bundle.path.name}: {name}"
        if (ready := self._prepared.get(name)) is not None:
            try:
                return read(ready.model.read_bytes(), where)
            except OSError as reason:
                raise BudgetError(f"{ready.model}: the prepared graph has gone ({reason.strerror})", "open the bundle again") from None
        return read(self.bundle.graph_bytes(name), where)

    def layout(self, graph: Graph) -> Plan:
        """What it does to memory on this machine."""
        return Plan(graph, machine=self._machine)

    def correct(self, name: str) -> None:
        """Counts a graph's region anew, where what the bundle says has turned out too small."""
        self._found[name] = replace(self[name], region=smallest(self.layout(self.graph(name))))


@dataclass(frozen=True)
class Planned:
    """Graphs that are loaded together.

    Attributes:
        graphs: their names.
        region: what they take their tensors from.
        ledger: what they add to a process in which onnxruntime has made its first session.
        frames: the most that the caller gives at a time.
    """

    graphs: tuple[str, ...]
    region: Region
    ledger: Ledger
    frames: int = 0

    @property
    def total(self) -> int:
        """Bytes added, at the peak."""
        return self.ledger.total

    def lines(self) -> dict[str, int]:
        """Bytes by line."""
        return {line.name: line.bytes for line in self.ledger.lines}


def planned(needs: Needs, names: Sequence[str], prepacking: bool = True, bounded: bool = True, more: int = 0, frames: int = 0) -> Planned:
    """What serving with these graphs adds to a process in which onnxruntime has made its first session.

    Args:
        needs: the bundle's.
        names: the graphs.
        prepacking: let onnxruntime keep copies of weights in the layout that its operators like.
        bounded: in one region that never grows, if all of them can be counted.
        more: bytes to make that region larger.
        frames: that the caller gives at a time, where these are more than a graph takes at once, as for a step in pieces.
    """
    bundle, found = needs.bundle, [needs[name] for name in names]
    manifest = bundle.manifest
    inside = sum(need.inside for need in found) if prepacking else 0
    beside = sum(need.beside for need in found) if prepacking else 0
    top = max(need.region for need in found)
    margin = max(int(MARGIN * top), LEAST_MARGIN) + more
    fixed = bounded and all(need.exact for need in found)
    region = Region(_up(top + margin + inside), _up(beside + _SMALL * len(names)), prepacking) if fixed else Region()
    bound = sum(footprint.bound(manifest.graphs[name]) for name in names)
    lines = [
        Line("region", top + margin, "counted", f"tensors and workspace, with a margin of {format_bytes(margin)}"),
        Line("region's table", (top + margin + inside) // 256 * footprint.TABLE_ENTRY, "counted", "onnxruntime's own list of its pieces"),
        Line("prepacked weights", inside + beside, "counted", "copies that onnxruntime keeps" if prepacking else "switched off"),
        Line("weights", needs.weights, "counted", "mapped from the bundle once for all graphs"),
        Line("graph structures", sum(need.structures for need in found), "measured", f"of {len(names)} graphs"),
        Line("code", _CODE, "measured", "pages of the libraries that only real graphs reach"),
        Line("adapter", footprint.TENSOR * len(manifest.state) + footprint.BOUND * bound, "measured", "views and bindings"),
        Line("state", footprint.state_bytes(manifest.state, manifest.graphs, names), "counted", "the set in use, and the one written next"),
        Line("frames and logits", _buffers(bundle, names, frames), "counted", "of the largest batch, the caller's and ours"),
        Line("allowance", _ALLOWANCE, "estimated", "for what differs from run to run"),
    ]
    if sums := footprint.sums_used(manifest, names):
        lines.insert(-2, Line("sums", sums, "counted", "what the runs of a step in pieces add up"))
    return Planned(tuple(names), region, Ledger(tuple(lines)), frames)


def laid_out(needs: Needs, plan: Planned) -> Planned:
    """The same plan with a region in which all of its graphs were laid out, as onnxruntime will do it.

    What fits is not monotone in the size: a larger region may lead to other gaps, and fail (ResNet-20, a step at batch 8: 7,538,432 bytes work,
    7,613,696 do not, as counted and as run). So the very size that is registered is tried, and if need be another a little larger.
    """
    size = plan.region.size
    if not size:
        return plan
    names, tries = plan.graphs, 0
    while True:
        inside = sum(needs[name].inside for name in names) if plan.region.prepacking else 0
        refused = next((name for name in names if 2 * needs[name].region > size - inside and not _fits(needs, name, size - inside)), None)
        if refused is None:
            return plan
        tries += 1
        if tries == _TRIES:
            needs.correct(refused)
        elif tries > 2 * _TRIES:
            return plan
        plan = planned(needs, names, plan.region.prepacking, more=(tries % _TRIES) * max(size // 128, 4096), frames=plan.frames)
        size = plan.region.size


def _fits(needs: Needs, name: str, size: int) -> bool:
    graph = needs.graph(name)
    return bool(graph.unknown()) or fits(needs.layout(graph), size)


def _up(size: int) -> int:
    return -(-size // 256) * 256


def _buffers(bundle: Bundle, names: Iterable[str], frames: int) -> int:
    manifest = bundle.manifest
    frame, output = 4, 4 * manifest.task.classes
    for size in manifest.input.shape:
        frame *= size
    if manifest.task.kind == "segmentation":
        for size in manifest.input.shape[1:]:
            output *= size  # at most one score a pixel and class
    ours = max(manifest.graphs[name].batch for name in names)
    return (ours + max(ours, frames)) * (frame + output)


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
