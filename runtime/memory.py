"""What the process holds, and what serving a bundle adds to it."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import onnxruntime

from edgeadapt.bundle import Bundle, Form
from edgeadapt.bundle.reading import shortened
from edgeadapt.bundle.roles import ROLES, STEPS
from edgeadapt.errors import BundleError
from edgeadapt.memory import Graph, Machine, Plan, cuda, footprint, quantised, read, smallest, suited
from edgeadapt.memory.figures import figures, structures
from edgeadapt.memory.ledger import CODE, Ledger, Line, answering_line, gpu_lines, slack_line, starting_line
from edgeadapt.runtime.prepared import Prepared
from edgeadapt.runtime.region import Region
from edgeadapt.runtime.session import Unprepared
from edgeadapt.units import format_bytes

FIRST_GRAPH = "predict.b1"
"""The graph that is loaded at opening, because every adapter needs it."""

_SMALL = 8192  # bytes of a session's small constants and of rounding in what it keeps: 1 to 3 KiB measured
_NODE = 6144  # a session's structures, a node, where nothing is counted
_ALLOWANCE = 3 * 2**19  # found resident at most, on seven bundles, beyond the other lines: 1.25 MiB
INEXACT = tuple(int(part) for part in onnxruntime.__version__.split(".")[:2]) < (1, 28)
"""Whether small constants and packed matrices lie in the region too, where is not known, as seen with 1.23 (with 1.31 they lie beside it): then what
was laid out is run once before it is relied on."""
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
        room: that with a margin.
        inside, beside: copies of its weights that are made while it loads, in the region and besides.
        structures: of its session.
        exact: whether `region` was counted; else it is an estimate, and nothing bounds it.
        places: windows of the bundle's file and of the prepared graphs' that its weights lie in, as `weights.windows` has them; None: unknown.
        device: the limit of what it takes of a GPU's memory; 0 on the CPU.
        lacking: its operators that run on the CPU because the GPU lacks them.
        seconds: of a run, roughly; only the ratio of two says anything. 0 where it is not known.
    """

    region: int
    room: int
    inside: int
    beside: int
    structures: int
    exact: bool
    places: tuple[int, int] | None = None
    device: int = 0
    lacking: tuple[str, ...] = ()
    seconds: float = 0.0


class Needs:
    """What the graphs of a bundle take. One that does not state all of it, or not exactly, is read when it is first asked for.

    Only figures are kept of it. A ledger of the whole bundle would keep all graphs in memory at once: 20 MB for ten graphs of a WideResNet-40-2.

    Args:
        bundle: the bundle.
        threads: of one operator.
        prepared: graphs that will run instead of the bundle's; None for none.
        counted: False takes the manifest's word, which costs nothing and bounds nothing.
        device: the GPU that they run on; None for the CPU.
        slack: bytes of a budget that are kept free for the program.
        given: bytes of onnxruntime's library that were given back before what the process holds was looked at.
        answering: frames are to be answered while a step runs.

    Attributes:
        bundle, threads, prepared, device, slack, given, answering: as given.
    """

    def __init__(
        self,
        bundle: Bundle,
        threads: int,
        prepared: Prepared | None = None,
        counted: bool = True,
        device: cuda.Device | None = None,
        slack: int = 0,
        given: int = 0,
        answering: bool = False,
    ) -> None:
        self.bundle, self.threads, self.prepared, self.device, self.slack, self._counted = bundle, threads, prepared, device, slack, counted
        self.given, self.answering = given, answering
        self._prepared = {} if prepared is None else prepared.graphs
        self._sizes = (bundle.path.stat().st_size, 0 if prepared is None else prepared.own_bytes)
        self._machine = Machine.here(threads)
        self._found: dict[str, Need] = {}
        self._stored: dict[str, Need] = {}
        self._apart: dict[tuple[bool, bool], Planned] = {}

    def __getitem__(self, name: str) -> Need:
        """The need of a graph, by its name.

        Raises:
            BundleError: it is damaged.
        """
        if name not in self._found:
            with self._followed(name):
                self._found[name] = self._read(name)
        return self._found[name]

    @contextmanager
    def _followed(self, name: str) -> Iterator[None]:
        """Refuses a graph that our rules cannot follow: they take operators to have the inputs, attributes and shapes that ONNX gives them."""
        try:
            yield
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as reason:
            where = f"{self.bundle.path.name}: {name}"
            raise BundleError(f"{where} is no graph that memory can be planned for ({shortened(str(reason))})", "export the bundle again") from None

    def need(self, name: str, prepacking: bool) -> Need:
        """As the need of a graph, with or without copies of weights: without them, operators on bytes take more scratch, and read weights as stored.

        Raises:
            BundleError: it is damaged.
        """
        kept = self[name]
        if prepacking or not kept.exact or not self.on_bytes(name):
            return kept
        if name not in self._stored:
            region = smallest(self.layout(name, False))
            self._stored[name] = replace(kept, region=region, room=footprint.margined(region), places=self._places(self.graph(name), name, False))
        return self._stored[name]

    def on_bytes(self, name: str) -> bool:
        """Whether a graph has operators that multiply by 8-bit weights: what it takes then depends on the processor, and on copies of these."""
        ready = self._prepared.get(name)
        return not quantised.ON_BYTES.isdisjoint(self.bundle.operators(name)) if ready is None else ready.bytes

    def _places(self, graph: Graph, name: str, prepacking: bool) -> tuple[int, int]:
        return footprint.places(graph.external, name in self._prepared, quantised.released(graph) if prepacking else ())

    def _read(self, name: str) -> Need:
        spec = self.bundle.manifest.graphs[name]
        if self.device is not None:
            return self._on_device(name)
        if not self._counted:
            return Need(spec.peak_bytes, footprint.margined(spec.peak_bytes), 0, 0, _NODE * spec.nodes, False)
        ready, told = self._prepared.get(name), self._told(name)
        found, nodes, region = (spec.figures, spec.nodes, told) if ready is None else (ready.figures, ready.nodes, ready.region_bytes)
        where = (0, 0) if ready is not None else (self.bundle.windows(name), 0)
        own = ready is None and self.on_bytes(name)  # nobody else's word does
        if found is None or own or (ready is None and not (region and found.exact)):  # that a region cannot be bounded is no word to be taken
            graph = self.graph(name)
            found, nodes = figures(graph, self._machine), len(graph.nodes)
            region = region if ready is not None else self._region(name, graph, not own)
            where = self._places(graph, name, True) if own else where
        held = structures(nodes, found)
        if ready is not None:
            room = footprint.prepared_room(region, told)
            return Need(region, room, ready.packed_bytes, ready.reserved_bytes, held, True, ready.windows, seconds=found.seconds)
        inside = found.inside + (found.beside if INEXACT else 0)
        return Need(region, footprint.margined(region), inside, found.beside, held, found.exact, where, seconds=found.seconds)

    def _region(self, name: str, graph: Graph, told: bool = True) -> int:
        spec = self.bundle.manifest.graphs[name]
        if graph.unknown():
            return spec.peak_bytes
        return (self._told(name) if told else 0) or smallest(Plan(graph, machine=self._machine))

    def _told(self, name: str) -> int:
        """The manifest's word on a graph's region; 0 where it has none."""
        return footprint.stated(self.bundle.manifest.graphs[name], self.threads)

    def _on_device(self, name: str) -> Need:
        """On a GPU; what its sessions need of the process's memory is an estimate, and nothing bounds it."""
        graph = self.graph(name)
        region, lacking = self._region(name, graph), cuda.lacking(graph, self.bundle.manifest.opset)
        host = region if lacking else footprint.LEAST_MARGIN
        held, where, seconds = footprint.session_bytes(footprint.count(graph)), (self.bundle.windows(name), 0), figures(graph).seconds
        return Need(host, footprint.margined(host), 0, 0, held, False, where, cuda.limit(graph, region), lacking, seconds)

    def apart(self, prepacking: bool, bounded: bool) -> Planned:
        """A second session of the first graph by itself, laid out: what answers frames while a step runs. Of its ledger some is shared."""
        key = prepacking, bounded
        if key not in self._apart:
            self._apart[key] = laid_out(self, planned(self, [FIRST_GRAPH], prepacking, bounded))
        return self._apart[key]

    def answering_bytes(self, apart: Planned, frames: int) -> int:
        """Bytes that this session adds to others, where windows have that many frames."""
        need, lines = self.need(FIRST_GRAPH, apart.region.prepacking), apart.lines()
        stored = self._prepared[FIRST_GRAPH].stored_bytes if FIRST_GRAPH in self._prepared and apart.region.prepacking else 0
        copies = lines["prepacked weights"] + stored
        return footprint.answering(self.bundle.manifest, FIRST_GRAPH, lines["region"], copies, need.structures, frames, self.threads)

    def forms(self, role: str, batch: int) -> tuple[Form, ...]:
        """As `Manifest.forms`, but on a GPU only those of which it has every operator, if there are any."""
        forms = self.bundle.manifest.forms(role, batch)
        return forms if self.device is None else cuda.fitting(forms, self._lacking(forms))[0]

    def _lacking(self, forms: Iterable[Form]) -> dict[str, tuple[str, ...]]:
        return {name: self[name].lacking for form in forms for name in form.graphs}

    def passed_over(self) -> tuple[str, ...]:
        """The graphs that are not used because the GPU lacks operators of theirs, and another form's not; with the operators."""
        if self.device is None:
            return ()
        manifest = self.bundle.manifest
        steps = [manifest.forms(role, batch) for role in ROLES for batch in manifest.planned(role)]
        names = dict.fromkeys(name for forms in steps for name in cuda.fitting(forms, self._lacking(forms))[1])
        return tuple(f"{name} ({', '.join(self[name].lacking)})" for name in names)

    def weights(self, names: Collection[str], prepacking: bool = True) -> int:
        """Bytes of the files of weights that are mapped once these graphs have run."""
        found = [self.need(name, prepacking).places for name in names]
        known = [places for places in found if places is not None]
        own = max((self._prepared[name].stored_bytes for name in names if name in self._prepared), default=0) if prepacking else 0
        return own + (footprint.mapped(known, self._sizes, _PAGE) if len(known) == len(found) else sum(self._sizes))

    def any_prepared(self, names: Iterable[str]) -> bool:
        """Whether one of these graphs runs as it was prepared."""
        return any(name in self._prepared for name in names)

    def graph(self, name: str) -> Graph:
        """A graph as it will run.

        Raises:
            BundleError: it is damaged.
            Unprepared: it was prepared, and has gone.
        """
        where = f"{self.bundle.path.name}: {name}"
        if (ready := self._prepared.get(name)) is not None:
            try:
                return read(ready.model.read_bytes(), where)
            except OSError as reason:
                raise Unprepared(f"{ready.model}: the prepared graph has gone ({reason.strerror})", "open the bundle again") from None
        return read(self.bundle.graph_bytes(name), where)

    def layout(self, name: str, prepacking: bool = True) -> Plan:
        """What a graph does to memory on this machine.

        Raises:
            BundleError: it does not state the shapes of all its tensors, against what its figures say.
        """
        graph = self.graph(name)
        if unknown := graph.unknown():
            raise BundleError(
                f"{self.bundle.path.name}: {name} does not state the shape of {unknown[0]!r}, though its figures say that it is countable",
                "take the bundle from its exporter; this one was edited",
            )
        with self._followed(name):
            return Plan(graph, machine=replace(self._machine, prepacking=prepacking))

    def correct(self, name: str, prepacking: bool = True) -> None:
        """Counts a graph's region anew, where what the bundle says has turned out too small."""
        region = smallest(self.layout(name, prepacking))
        found = self._stored if name in self._stored and not prepacking else self._found
        found[name] = replace(self.need(name, prepacking), region=region, room=footprint.margined(region))


@dataclass(frozen=True)
class Planned:
    """Graphs that are loaded together.

    Attributes:
        graphs: their names.
        region: what they take their tensors from.
        ledger: what they add to a process in which onnxruntime has made its first session.
        limits: on a GPU, of what each graph's session may take of its memory, 0 for no limit; None on the CPU.
        frames: the most that the caller gives at a time.
        answering: the session that answers frames while a step runs, by itself; None for none.
    """

    graphs: tuple[str, ...]
    region: Region
    ledger: Ledger
    limits: Mapping[str, int] | None = None
    frames: int = 0
    answering: Planned | None = None

    @property
    def total(self) -> int:
        """Bytes added, at the peak."""
        return self.ledger.total

    def lines(self) -> dict[str, int]:
        """Bytes by line."""
        return {line.name: line.bytes for line in self.ledger.lines}


def planned(
    needs: Needs, names: Sequence[str], prepacking: bool = True, bounded: bool = True, more: int = 0, frames: int = 0, answering: bool = False
) -> Planned:
    """What serving with these graphs adds to a process in which onnxruntime has made its first session.

    Args:
        needs: the bundle's.
        names: the graphs.
        prepacking: let onnxruntime keep copies of weights in the layout that its operators like.
        bounded: in one region that never grows, if all of them can be counted.
        more: bytes to make that region larger.
        frames: that the caller gives at a time, where these are more than a graph takes at once, as for a step in pieces.
        answering: frames are answered while a step runs.
    """
    bundle, found = needs.bundle, [needs.need(name, prepacking) for name in names]
    manifest = bundle.manifest
    inside = sum(need.inside for need in found) if prepacking else 0
    beside = sum(need.beside for need in found) if prepacking else 0
    largest = max(found, key=lambda need: need.room)
    top, margin = largest.region, largest.room - largest.region + more
    fixed = bounded and all(need.exact for need in found)
    region = Region(_up(top + margin + inside), _up(beside + _SMALL * len(names)), prepacking) if fixed else Region(prepacking=prepacking)
    step = any(manifest.graphs[name].role.startswith(STEPS) for name in names)
    code = footprint.code(needs.any_prepared(names), step, any(map(needs.on_bytes, names)))
    known = "counted" if all(need.exact for need in found) else "estimated"
    limits = None if needs.device is None else {name: need.device if bounded else 0 for name, need in zip(names, found)}
    bound = sum(footprint.bound(manifest.graphs[name]) for name in names)
    lines = [
        Line("region", top + margin, known, f"tensors and workspace, with a margin of {format_bytes(margin)}"),
        Line("region's table", (top + margin + inside) // 256 * footprint.TABLE_ENTRY, "counted", "onnxruntime's own list of its pieces"),
        Line("prepacked weights", inside + beside, "counted", "copies that onnxruntime keeps" if prepacking else "switched off"),
        Line("weights", needs.weights(names, prepacking), "counted", "mapped once for all graphs"),
        Line("graph structures", sum(need.structures for need in found), "measured", f"of {len(names)} graphs"),
        Line(CODE, code, "measured", "pages of the libraries that running graphs reach"),
        Line("adapter", footprint.TENSOR * len(manifest.state) + footprint.BOUND * bound, "measured", "views and bindings"),
        Line("state", footprint.state_bytes(manifest.state, manifest.graphs, names), "counted", "the set in use, and the one written next"),
        Line("restoring", footprint.restoring_bytes(manifest.state, manifest.graphs, names), "counted", "of a state, when it is loaded"),
        Line("frames and logits", _buffers(bundle, names, frames), "counted", "of the largest batch, the caller's and ours"),
        Line("allowance", _ALLOWANCE, "estimated", "for what differs from run to run"),
        *([] if needs.device is None else gpu_lines(needs.device, [need.device for need in found], "counted" if bounded else "estimated")),
    ]
    if sums := footprint.sums_used(manifest, names):
        lines.insert(9, Line("sums", sums, "counted", "what the runs of a step in pieces add up"))
    apart = needs.apart(prepacking, bounded) if answering else None
    if apart is not None:
        window = max(frames, *(manifest.graphs[name].batch for name in names))
        lines.append(answering_line(needs.answering_bytes(apart, window)))
    ledger = Ledger((*lines, *starting_line(lines, needs.given), *slack_line(needs.slack)))
    return Planned(tuple(names), region, ledger, limits, frames, apart)


def laid_out(needs: Needs, plan: Planned) -> Planned:
    """The same plan with a region in which all of its graphs were laid out, as onnxruntime will do it: see `suited`."""
    if not plan.region.size:
        return plan
    names, prepacking = plan.graphs, plan.region.prepacking
    anew = partial(planned, needs, names, prepacking, frames=plan.frames, answering=plan.answering is not None)
    inside = sum(needs[name].inside for name in names) if prepacking else 0
    for corrected in (False, True):
        base = plan.region.size - inside
        large = [name for name in names if 2 * needs.need(name, prepacking).region > base]
        size = suited(base, [partial(needs.layout, name, prepacking) for name in large])
        if size is not None or corrected:
            break
        for name in large:  # what the bundle says of them is too small
            needs.correct(name, prepacking)
        plan = anew()
    return plan if size in (None, base) else anew(more=size - base)


def _up(size: int) -> int:
    return -(-size // 256) * 256


def _buffers(bundle: Bundle, names: Iterable[str], frames: int) -> int:
    ours = max(bundle.manifest.graphs[name].batch for name in names)
    return (ours + max(ours, frames)) * sum(footprint.frame_bytes(bundle.manifest))
