"""Every line of a serving process's peak resident bytes, from a bundle and what is done with it, without running anything."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

from edgeadapt.bundle import Bundle
from edgeadapt.bundle.onnxwire import External
from edgeadapt.errors import BundleError, UsageError
from edgeadapt.memory import footprint
from edgeadapt.memory.graph import Graph, read
from edgeadapt.memory.liveness import Plan
from edgeadapt.memory.region import smallest
from edgeadapt.memory.rules import Machine
from edgeadapt.units import format_bytes

FIRST = "predict.b1"
"""The graph that every adapter loads when it is opened."""

ALLOWANCE = 0.005
"""Share of the sum that is added for what differs from run to run: which pages of libraries are mapped, and where malloc puts blocks."""


@dataclass(frozen=True)
class Line:
    """One line.

    Attributes:
        name: what it is for.
        bytes: resident at the peak.
        known: "counted" from the bundle to the byte or page, "measured" on models like it, or "estimated".
        note: how it came about.
    """

    name: str
    bytes: int
    known: str
    note: str = ""


@dataclass(frozen=True)
class Ledger:
    """All lines, none counted twice."""

    lines: tuple[Line, ...]

    @property
    def total(self) -> int:
        """Their sum: the process's peak."""
        return sum(line.bytes for line in self.lines)

    def __getitem__(self, name: str) -> Line:
        """The line of that name; KeyError where there is none."""
        for line in self.lines:
            if line.name == name:
                return line
        raise KeyError(name)

    def plain(self) -> dict[str, Any]:
        """For JSON: {"total": bytes, "lines": [{"name", "bytes", "known", "note"}, ...]}."""
        return {"total": self.total, "lines": [asdict(line) for line in self.lines]}

    def table(self) -> str:
        """Aligned text: name, bytes, the same rounded, how it is known, note; the sum last."""
        rows = [*self.lines, Line("process's peak", self.total, "")]
        width = max(len(line.name) for line in rows)
        shown = [f"  {line.name:<{width}} {line.bytes:>13,} B {format_bytes(line.bytes):>9}  {line.known:<9} {line.note}".rstrip() for line in rows]
        return "\n".join(shown)


@dataclass(frozen=True)
class Setup:
    """What is done with a bundle, and where.

    Attributes:
        graphs: names of the bundle's graphs in use. The one that every adapter loads at opening is added.
        threads: of one operator.
        floor: resident bytes of a Python process with numpy, onnxruntime and one trivial session.
        floor_known: "measured" or "estimated".
        page: the system's page, bytes.
        arm: 64-bit Arm, else x86-64.
        prepacking: whether onnxruntime keeps rearranged copies of constant weights.
        region: bytes of the one region of memory for tensors; 0 takes what the graphs need, with a margin.
        frames: that the caller gives at a time, where these are more than a graph takes at once, as for a step in pieces.
    """

    graphs: tuple[str, ...]
    floor: int
    floor_known: str = "measured"
    threads: int = 1
    page: int = 4096
    arm: bool = False
    prepacking: bool = True
    region: int = 0
    frames: int = 0

    @property
    def machine(self) -> Machine:
        """What the graphs' workspace depends on."""
        return Machine(self.threads, self.arm)


@dataclass(frozen=True)
class Layout:
    """A graph of a bundle, read and planned.

    Attributes:
        graph, plan: itself.
        peak: position in the order at which most bytes are in use.
        region: the smallest one region that a run goes through, bytes.
        external: its frozen tensors in the bundle's file.
    """

    graph: Graph
    plan: Plan
    peak: int
    region: int
    external: tuple[External, ...]


def layout(bundle: Bundle, name: str, machine: Machine) -> Layout:
    """The plan of one graph; kept for the next call.

    Raises:
        UsageError: there is no such graph.
        BundleError: it is damaged.
    """
    if name not in bundle.manifest.graphs:
        raise UsageError(f"{bundle.path.name} has no graph {name}", f"it has {', '.join(bundle.manifest.graphs)}")
    return _layout(bundle, bundle.digest, name, machine)


@lru_cache(maxsize=32)
def _layout(bundle: Bundle, digest: str, name: str, machine: Machine) -> Layout:
    data, external = bundle.graph(name)
    graph = read(data, f"{bundle.path.name}: {name}")
    if unknown := graph.unknown():
        raise BundleError(
            f"{bundle.path.name}: graph {name} does not state the shapes of {len(unknown)} tensors, of {unknown[0]!r} first",
            "export the bundle with this edgeadapt",
        )
    plan = Plan(graph, machine=machine)
    curve = plan.curve()
    peak = max(range(len(curve)), key=curve.__getitem__, default=0)
    return Layout(graph, plan, peak, smallest(plan), external)


def used(graphs: Sequence[str]) -> tuple[str, ...]:
    """The graphs that are loaded where those named are in use, each once."""
    return tuple(dict.fromkeys((FIRST, *graphs)))


def ledger(bundle: Bundle, setup: Setup) -> Ledger:
    """The process's peak, line by line.

    The process opens the bundle and runs each of the graphs several times, on float32 frames. Activations, workspace and gaps lie in one region of
    fixed size, that of the graph that needs most, because runs never overlap.

    Raises:
        UsageError: a graph that the bundle does not have.
        BundleError: the bundle is damaged.
    """
    names = used(setup.graphs)
    found = {name: layout(bundle, name, setup.machine) for name in names}
    largest = max(found, key=lambda name: found[name].region)
    top = found[largest]
    scratch = top.plan.events[top.peak].scratch if top.plan.events else 0
    inside, beside = (sum(parts) for parts in zip(*(footprint.prepacked(item.graph) if setup.prepacking else (0, 0) for item in found.values())))
    region = setup.region or top.region + max(int(footprint.MARGIN * top.region), footprint.LEAST_MARGIN)
    touched = footprint.touched((item.plan for item in found.values()), region, setup.page)
    frozen = {(tensor.offset, tensor.shape): tensor for item in found.values() for tensor in item.external}
    mapped = footprint.mapped_pages(frozen.values(), bundle.path.stat().st_size, setup.page)
    nodes = sum(len(item.graph.nodes) for item in found.values())
    lines = [
        Line("Python and libraries", setup.floor, setup.floor_known, "with numpy, onnxruntime and one trivial session"),
        Line("code of the first runs", footprint.CODE, "measured", "pages of the libraries that only real graphs reach"),
        Line(
            "adapter",
            _adapter(bundle, found, len(frozen)),
            "measured",
            f"Python's side of {len(names)} graphs and {len(bundle.manifest.state)} state tensors",
        ),
        Line("weights", mapped, "counted", "mapped from the bundle once for all graphs"),
        Line("prepacked weights", inside + beside, "counted", "copies that onnxruntime keeps of them" if setup.prepacking else "switched off"),
        Line("graph structures", sum(footprint.session_bytes(item.graph) for item in found.values()), "measured", f"{nodes:,} nodes"),
        Line("activations", top.plan.peak - scratch, "counted", f"live tensors at the peak of {largest}"),
        Line("workspace", scratch, "counted", "of the operator that runs then"),
        Line("gaps", max(touched - top.plan.peak, 0), "counted", "of the region, between tensors at the peak but used at other times"),
        Line("region's table", (region + inside) // 256 * footprint.TABLE_ENTRY, "counted", "onnxruntime's own list of the region's pieces"),
        Line(
            "state",
            footprint.state_bytes(bundle.manifest.state, bundle.manifest.graphs, names),
            "counted",
            "the set in use, and the one written next",
        ),
        Line("frames and logits", _buffers(bundle, found, setup.frames), "counted", "float32: the caller's batch, ours, and its scores"),
    ]
    if sums := footprint.sums_used(bundle.manifest, names):
        lines.insert(-1, Line("sums", sums, "counted", "what the runs of a step in pieces add up"))
    if setup.threads > 1:
        lines.append(Line("threads", footprint.THREAD * (setup.threads - 1), "measured", f"{setup.threads - 1} besides the first"))
    spread = math.ceil(ALLOWANCE * sum(line.bytes for line in lines)) // setup.page * setup.page
    lines.append(Line("allowance", spread, "estimated", f"{ALLOWANCE:.1%}, for what differs from run to run"))
    return Ledger(tuple(lines))


def _adapter(bundle: Bundle, found: Mapping[str, Layout], frozen: int) -> int:
    manifest = bundle.manifest
    named = sum(footprint.bound(graph) for graph in manifest.graphs.values())
    bound = sum(footprint.bound(manifest.graphs[name]) for name in found)
    parts = (footprint.NAME * named, footprint.TENSOR * len(manifest.state), footprint.BOUND * bound, footprint.WEIGHT * frozen)
    planned = footprint.PLANNED * max(len(item.graph.nodes) for item in found.values())
    return footprint.ADAPTER + planned + sum(parts)


def _buffers(bundle: Bundle, found: Mapping[str, Layout], frames: int) -> int:
    """Of the graph that takes most: the caller's frames and ours, the logits of the run and those handed over, labels."""
    graphs, frame = bundle.manifest.graphs, 4 * math.prod(bundle.manifest.input.shape)
    ours = theirs = 0
    for name, item in found.items():
        values, batch = item.graph.values, graphs[name].batch
        if batch:
            size = batch * frame + values["logits"].nbytes + (values["y"].nbytes if graphs[name].role.startswith("learn") else 0)
            ours, theirs = max(ours, size), max(theirs, size, size * frames // batch if graphs[name].sums else 0)
    return ours + theirs
