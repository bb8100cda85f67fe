"""Every line of a serving process's peak resident bytes, from a bundle and what is done with it, without running anything."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

from edgeadapt.bundle import Bundle
from edgeadapt.bundle.roles import STEPS
from edgeadapt.errors import BundleError, UsageError
from edgeadapt.memory import cuda, footprint, quantised
from edgeadapt.memory.graph import Graph, read
from edgeadapt.memory.liveness import Plan
from edgeadapt.memory.region import smallest, suited
from edgeadapt.memory.rules import Machine, uncounted
from edgeadapt.units import format_bytes

STARTING, CODE = "starting", "code"
"""Names of an adapter's lines that do not add up with those of others: what was taken at its start and is gone, and what all of them share."""

ANSWERING = "answering"
"""Name of the line of what answers frames while a step runs."""

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
        elsewhere: it lies in a GPU's own memory: shown, and not part of the sum.
    """

    name: str
    bytes: int
    known: str
    note: str = ""
    elsewhere: bool = False

    def plain(self) -> dict[str, Any]:
        """For JSON; "elsewhere" only where it is."""
        return {"name": self.name, "bytes": self.bytes, "known": self.known, "note": self.note, **({"elsewhere": True} if self.elsewhere else {})}


@dataclass(frozen=True)
class Ledger:
    """All lines, none counted twice."""

    lines: tuple[Line, ...]

    @property
    def total(self) -> int:
        """Their sum: the process's peak."""
        return sum(line.bytes for line in self.lines if not line.elsewhere)

    @property
    def passing(self) -> int:
        """Of the sum, what is taken at the start alone."""
        return sum(line.bytes for line in self.lines if line.name == STARTING)

    @property
    def shared(self) -> int:
        """Of the sum, what several adapters of a process take once: code."""
        return sum(line.bytes for line in self.lines if line.name == CODE)

    @property
    def on_device(self) -> int:
        """Of the sum, what lies in the GPU's share of the board's memory, which no system counts as the process's."""
        return sum(line.bytes for line in self.lines if line.name in cuda.LINES and not line.elsewhere)

    def __getitem__(self, name: str) -> Line:
        """The line of that name; KeyError where there is none."""
        for line in self.lines:
            if line.name == name:
                return line
        raise KeyError(name)

    def plain(self) -> dict[str, Any]:
        """For JSON: {"total": bytes, "lines": [{"name", "bytes", "known", "note"}, ...]}."""
        return {"total": self.total, "lines": [line.plain() for line in self.lines]}

    def table(self) -> str:
        """Aligned text: name, bytes, the same rounded, how it is known, note; then the sum, and after it what lies elsewhere."""
        here, away = ([line for line in self.lines if line.elsewhere is kind] for kind in (False, True))
        rows = [*here, Line("process's peak", self.total, ""), *away]
        width = max(len(line.name) for line in rows)
        shown = [f"  {line.name:<{width}} {line.bytes:>13,} B {format_bytes(line.bytes):>9}  {line.known:<9} {line.note}".rstrip() for line in rows]
        return "\n".join(shown)


class PreparedGraphLike(Protocol):
    """A graph that runs instead of the bundle's; `edgeadapt.runtime.prepared` makes them."""

    @property
    def model(self) -> Path:
        """Its file."""
        ...

    @property
    def region_bytes(self) -> int:
        """The region that its tensors were seen to run in."""
        ...

    @property
    def packed_bytes(self) -> int:
        """Of weights in another layout, which lie in the region too."""
        ...

    @property
    def reserved_bytes(self) -> int:
        """Of small constants, which lie beside it."""
        ...

    def __hash__(self) -> int:
        """It never changes."""
        ...


class PreparedLike(Protocol):
    """What was prepared of a bundle for one machine and number of threads."""

    @property
    def graphs(self) -> Mapping[str, PreparedGraphLike]:
        """Those that run instead of the bundle's, by name."""
        ...

    @property
    def own_bytes(self) -> int:
        """Size of the file with the tensors that the bundle does not have."""
        ...

    @property
    def seconds(self) -> Mapping[str, float]:
        """Of a run of each graph that was looked at, as it was measured there."""
        ...


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
        prepared: what runs instead of the bundle's graphs; None: they run as exported.
        device: the GPU that graphs run on; None for the CPU.
        slack: bytes kept free for the program around it.
        frames: that the caller gives at a time, where these are more than a graph takes at once, as for a step in pieces.
        started: of the floor, bytes of onnxruntime's code that is given back; None: as measured on x86-64 with onnxruntime 1.31.
        answering: frames are answered while a step runs.
    """

    graphs: tuple[str, ...]
    floor: int
    floor_known: str = "measured"
    threads: int = 1
    page: int = 4096
    arm: bool = False
    prepacking: bool = True
    region: int = 0
    prepared: PreparedLike | None = None
    device: cuda.Device | None = None
    slack: int = 0
    frames: int = 0
    started: int | None = None
    answering: bool = False

    @property
    def machine(self) -> Machine:
        """What the graphs' workspace depends on."""
        return Machine(self.threads, self.arm, prepacking=self.prepacking and self.device is None)


@dataclass(frozen=True)
class Layout:
    """A graph of a bundle, read and planned.

    Attributes:
        graph, plan: itself.
        peak: position in the order at which most bytes are in use.
        region: the smallest one region that a run goes through, bytes.
        room: that with a margin.
        inside, beside: bytes of the copies of its weights that are made while it loads, in the region and besides.
        prepared: whether it is not the bundle's own.
    """

    graph: Graph
    plan: Plan
    peak: int
    region: int
    room: int
    inside: int
    beside: int
    prepared: bool = False

    def again(self) -> Plan:
        """The plan."""
        return self.plan


def layout(bundle: Bundle, name: str, machine: Machine, prepared: PreparedLike | None = None) -> Layout:
    """The plan of one graph as it will run; kept for the next call.

    Raises:
        UsageError: there is no such graph.
        BundleError: it is damaged.
    """
    if name not in bundle.manifest.graphs:
        raise UsageError(f"{bundle.path.name} has no graph {name}", f"it has {', '.join(bundle.manifest.graphs)}")
    return _layout(bundle, bundle.digest, name, machine, None if prepared is None else prepared.graphs.get(name))


@lru_cache(maxsize=32)
def _layout(bundle: Bundle, digest: str, name: str, machine: Machine, prepared: PreparedGraphLike | None) -> Layout:
    where = f"{bundle.path.name}: {name}"
    try:
        graph = read(bundle.graph(name).data if prepared is None else prepared.model.read_bytes(), where)
    except OSError as reason:
        raise BundleError(f"{where}: the prepared graph cannot be read ({reason.strerror})", "prepare the bundle again, or leave it out") from None
    if unknown := graph.unknown():
        raise BundleError(
            f"{bundle.path.name}: graph {name} does not state the shapes of {len(unknown)} tensors, of {unknown[0]!r} first",
            "export the bundle with this edgeadapt",
        )
    if not machine.prepacking and not quantised.copied(graph):  # then it makes no difference to its tensors
        return _layout(bundle, digest, name, replace(machine, prepacking=True), prepared)
    plan = Plan(graph, machine=machine)
    curve = plan.curve()
    peak = max(range(len(curve)), key=curve.__getitem__, default=0)
    if prepared is not None:
        own = prepared.region_bytes if machine.prepacking else smallest(plan)
        room = footprint.prepared_room(own, footprint.stated(bundle.manifest.graphs[name], machine.threads))
        return Layout(graph, plan, peak, own, room, prepared.packed_bytes, prepared.reserved_bytes, True)
    region = smallest(plan)
    return Layout(graph, plan, peak, region, footprint.margined(region), *footprint.prepacked(graph, machine))


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
    found = {name: layout(bundle, name, setup.machine, setup.prepared) for name in names}
    kept = setup.prepacking and setup.device is None
    inside, beside = ((sum(item.inside for item in found.values()), sum(item.beside for item in found.values())) if kept else (0, 0))
    frozen = {(tensor.location, tensor.offset, tensor.shape) for item in found.values() for tensor in item.graph.external}
    mapped = _mapped(bundle, found.values(), setup)
    counts = [footprint.count(item.graph) for item in found.values()]
    given = footprint.STARTED if setup.started is None else setup.started
    step = any(bundle.manifest.graphs[name].role.startswith(STEPS) for name in names)
    on_bytes = any(node.op in quantised.ON_BYTES for item in found.values() for node in item.graph.nodes)
    code, ours = footprint.code(any(item.prepared for item in found.values()), step, on_bytes), _adapter(bundle, found, len(frozen))
    lines = [
        Line(
            "Python and libraries",
            setup.floor - given,
            setup.floor_known,
            f"of {format_bytes(setup.floor)} with numpy, onnxruntime and one trivial session; the rest is code that is given back",
        ),
        Line("code of the first runs", code, "measured", "pages of the libraries that running graphs reach"),
        Line(
            "adapter",
            ours,
            "measured",
            f"Python's side of {len(names)} graphs and {len(bundle.manifest.state)} state tensors",
        ),
        Line("weights", mapped, "counted", "mapped once for all graphs"),
        Line("prepacked weights", inside + beside, "counted", "copies that onnxruntime keeps of them" if kept else "switched off"),
        Line("graph structures", sum(map(footprint.session_bytes, counts)), "measured", f"{sum(of.nodes for of in counts):,} nodes"),
        *_tensors(bundle, found, setup, inside),
        Line(
            "state",
            footprint.state_bytes(bundle.manifest.state, bundle.manifest.graphs, names),
            "counted",
            "the set in use, and the one written next",
        ),
        Line("restoring", footprint.restoring_bytes(bundle.manifest.state, bundle.manifest.graphs, names), "counted", "of a state: loading it"),
        Line("frames and logits", _buffers(bundle, found, setup.frames), "counted", "float32: the caller's batch, ours, and its scores"),
    ]
    if sums := footprint.sums_used(bundle.manifest, names):
        lines.insert(-1, Line("sums", sums, "counted", "what the runs of a step in pieces add up"))
    if setup.answering:
        lines.append(answering_line(_answering(bundle, found[FIRST], setup)))
    if setup.threads > 1:
        lines.append(Line("threads", footprint.THREAD * (setup.threads - 1), "measured", f"{setup.threads - 1} besides the first"))
    spread = math.ceil(ALLOWANCE * Ledger(tuple(lines)).total) // setup.page * setup.page
    lines.append(Line("allowance", spread, "estimated", f"{ALLOWANCE:.1%}, for what differs from run to run"))
    started = starting_line(lines[1:], given + footprint.BEGINNING)
    return Ledger((*lines, *started, *slack_line(setup.slack)))


def starting_line(lines: Sequence[Line], given: int) -> tuple[Line, ...]:
    """The line of what starting takes over what is held later; none where that is more.

    Args:
        lines: of what is added to a process that has given back what only onnxruntime's start needs.
        given: bytes that it held besides before that.
    """
    kept = ("weights", "prepacked weights", "region's table", "graph structures")
    there = {*kept, "adapter", "state", "frames and logits", "sums", "allowance", ANSWERING}
    made = footprint.LOADING + sum(line.bytes for line in lines if line.name in there)
    more = max(given, made) - Ledger(tuple(lines)).total
    return (Line(STARTING, more, "measured", "code of onnxruntime that is given back after its start, or after each session"),) if more > 0 else ()


def answering_line(size: int) -> Line:
    """The line of what answers frames while a step runs."""
    return Line(ANSWERING, size, "counted", "of frames while a step runs: a second session, its state and its memory")


def slack_line(size: int) -> tuple[Line, ...]:
    """The line of what is kept free for the program around an adapter; none for nothing."""
    return (Line("slack", size, "estimated", "kept free for the program, as asked"),) if size else ()


def _tensors(bundle: Bundle, found: Mapping[str, Layout], setup: Setup, inside: int) -> list[Line]:
    """What graphs compute with: in the one region, or in the GPU's memory and in what its sessions need beside it."""
    if setup.device is not None:
        opset = bundle.manifest.opset
        limits = [cuda.limit(item.graph, item.region) for item in found.values()]
        host = max(cuda.on_host(item.graph, item.region, opset) for item in found.values())
        return [Line("region", host, "estimated", "of nodes that run on the processor"), *gpu_lines(setup.device, limits)]
    largest = max(found, key=lambda name: found[name].region)
    top = found[largest]
    scratch = top.plan.events[top.peak].scratch if top.plan.events else 0
    region = setup.region or region_of(list(found.values()))
    touched = footprint.touched((item.plan for item in found.values()), region, setup.page)
    odd = sorted({name for item in found.values() for name in uncounted(item.graph)})
    known = "estimated" if odd else "counted"
    unknown = f", without that of {', '.join(odd)}, which is not known" if odd else ""
    return [
        Line("activations", top.plan.peak - scratch, known, f"live tensors at the peak of {largest}"),
        Line("workspace", scratch, known, f"of the operator that runs then{unknown}"),
        Line("gaps", max(touched - top.plan.peak, 0), known, "of the region, between tensors at the peak but used at other times"),
        Line("region's table", (region + inside) // 256 * footprint.TABLE_ENTRY, known, "onnxruntime's own list of the region's pieces"),
    ]


def _answering(bundle: Bundle, first: Layout, setup: Setup) -> int:
    copies = first.inside + first.beside + footprint.copies_bytes(first.graph.external) if setup.prepacking else 0
    structures = footprint.session_bytes(footprint.count(first.graph))
    frames = max(setup.frames, *(bundle.manifest.graphs[name].batch for name in used(setup.graphs)))
    return footprint.answering(bundle.manifest, FIRST, region_of([first]), copies, structures, frames, setup.threads)


def gpu_lines(device: cuda.Device, limits: Sequence[int], known: str = "counted") -> list[Line]:
    """What sessions of the CUDA provider take: of the GPU's memory, within the limits that they are made with, and of the process's.

    Args:
        device: the GPU. What lies in a memory of its own is not part of a ledger's sum.
        limits: bytes, one a session.
        known: how they are.
    """
    apart = not device.unified
    where = "in memory of its own, not in the sum" if apart else "of the board's memory"
    return [
        Line("CUDA libraries", 0 if device.started else cuda.LIBRARIES, "estimated", "pages of driver, cuDNN and cuBLAS"),
        Line("GPU memory", sum(limits), known, f"{where}: the limit of each session, weights included", apart),
        Line("CUDA context", cuda.CONTEXT, "estimated", f"{where}: kernels, and what cuBLAS takes", apart),
    ]


def region_of(found: Sequence[Layout]) -> int:
    """Bytes of the one region in which these graphs run, without copies of weights: with a margin, and such that each goes through in it."""
    base = max(item.room for item in found)
    return suited(base, [item.again for item in found if 2 * item.region > base]) or base


def _mapped(bundle: Bundle, found: Iterable[Layout], setup: Setup) -> int:
    """Bytes that are mapped of the bundle's file, and of the file of its prepared graphs, once these graphs have run."""
    sizes = (bundle.path.stat().st_size, 0 if setup.prepared is None else setup.prepared.own_bytes)
    gone = quantised.released if setup.machine.prepacking else lambda _: frozenset[str]()
    found = list(found)
    own = max(footprint.copies_bytes(item.graph.external) for item in found) if setup.machine.prepacking else 0
    return own + footprint.mapped((footprint.places(item.graph.external, item.prepared, gone(item.graph)) for item in found), sizes, setup.page)


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
