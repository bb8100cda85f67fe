"""What a process holds besides a graph's live tensors: sessions, copies of weights, mapped pages, the state's two sets.

The constants were measured by `benchmarks/memory_constants.py` on models that no figure of this project is about: chains of one operator, and a
normalisation, a head and a few convolutions made by hand. onnxruntime 1.31.1, CPython 3.11, glibc 2.36, x86-64, 4 KiB pages. They are the same for
every graph.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

from edgeadapt.bundle import GraphSpec, Manifest, StateSpec
from edgeadapt.bundle.onnxwire import External
from edgeadapt.bundle.weights import WINDOW, windows
from edgeadapt.memory import quantised
from edgeadapt.memory.graph import OWN, GraphLike
from edgeadapt.memory.liveness import Plan
from edgeadapt.memory.region import Region
from edgeadapt.memory.rules import ALIGNMENT, SEGMENT, X86, Machine, rounded

SESSION = 28_000
"""Bytes of a session with one operator, as malloc counts them."""

NODE, EDGE, ATTRIBUTE, INITIALISER = 3_250, 165, 1_165, 1_505
"""Of a session, for each node, each of its inputs and outputs, each attribute and each initialiser: fitted to chains of 100 and 400 operators of 34
kinds, with constants of their own and with shared ones. The fit is within 15 % for every kind."""

FLOATS = {"BatchNormalization": 1, "Gemm": 2}
"""Attributes that the reader of graphs passes over because they are not whole numbers; the exporter writes them on these operators."""

STARTED = 17_100_000
"""Pages of onnxruntime's library that a process with a trivial session has resident, and that an adapter with a budget gives back."""

BEGINNING = 2_900_000
"""What an adapter's process takes at its beginning over one with a trivial session: modules, and the error with which onnxruntime answers when it is
asked how much of a region is left; what importing onnxruntime needs is given back before."""

LOADING = 11_000_000
"""Of those, what making a session of a whole network brings in again, given back after each: 8.5 MB for chains of an operator, 10.4 to 10.9 MB for
graphs of three networks."""

CODE = 9_500_000
"""Of those, and of other libraries beyond a trivial session's, what running graphs brings in again: 7.9 MB for one operator of each of those kinds,
and up to 1.6 MB more for kernels that only shapes of whole networks reach."""

BYTES_CODE = 400_000
"""As `CODE`, of operators on bytes: a WideResNet's prediction and step in 8 bits have 1.1 MB more than in float32, but 0.4 MB more than `CODE`."""

FUSED_CODE = 450_000
"""As `CODE`, of the fused and blocked operators that prepared graphs have: 0.2 to 0.43 MB measured."""

STEP_CODE = 700_000
"""As `CODE`, of a process that takes steps: on the digits of the demo adapting takes 0.45 MB more than predicting, and learning 0.8 MB, beyond all
that is counted."""

ADAPTER = 4_000_000
"""An adapter, within a budget, of a bundle of two nodes that has run, without its session and library pages: modules of ours and of the standard
library, buffers."""

PLANNED = 700
"""For each node of its largest graph: what stays, at most, of reading and planning graphs, beside sessions that are loaded then. 120 to 665 in nine
processes that read a graph of 48 operators of each kind: an arena of Python's stays or goes as a whole."""

NAME, TENSOR, BOUND, WEIGHT = 175, 2_450, 1_850, 3_260
"""What that grows by, for each tensor's name in each graph of the manifest, each state tensor, each graph in use that is bound to one, and each
frozen tensor; measured on bundles with 1,500 of them."""

THREAD = 65_536
"""Bytes of each thread beyond the first: its stack, and its own heap."""

MARGIN, LEAST_MARGIN = 0.02, 65_536
"""What a region gets over the size that works by count: a share, or that many bytes where they are more. The very size is laid out besides."""

TABLE_ENTRY = 8
"""Bytes that onnxruntime keeps for every 256 of a region; all are written when the region is made."""


def code(prepared: bool, step: bool, on_bytes: bool) -> int:
    """Pages of libraries that running graphs brings in, once those that only onnxruntime's start needs were given back.

    Args:
        prepared: some of the graphs are prepared ones.
        step: some adapt or learn.
        on_bytes: some have operators that multiply by 8-bit weights.
    """
    return CODE + FUSED_CODE * prepared + STEP_CODE * step + BYTES_CODE * on_bytes


def margined(region: int) -> int:
    """A region with a margin over the size that the count says works."""
    return region + max(int(MARGIN * region), LEAST_MARGIN)


def stated(graph: GraphSpec, threads: int) -> int:
    """The region that the manifest states for a graph, with a convolution's workspace for each thread; 0 where it states none."""
    return graph.region_bytes + (threads - 1) * SEGMENT if graph.region_bytes else 0


def prepared_room(region: int, exported: int) -> int:
    """As `margined`, for a prepared graph: it was seen to run in its region, so that is enough where the `exported` graph's has no more."""
    return max(region, min(margined(region), margined(exported) if exported else margined(region)))


class Count(NamedTuple):
    """How many things of a graph a session keeps."""

    nodes: int
    edges: int
    attributes: int
    initialisers: int


def count(graph: GraphLike) -> Count:
    """Of a graph."""
    edges = attributes = 0
    for node in graph.nodes:
        edges += len(node.inputs) + len(node.outputs)
        attributes += len(node.attributes) + FLOATS.get(node.op, 0)
    return Count(len(graph.nodes), edges, attributes, len(graph.constants))


def session_bytes(of: Count) -> int:
    """What a loaded graph takes in the process's heap, without tensors."""
    return SESSION + NODE * of.nodes + EDGE * of.edges + ATTRIBUTE * of.attributes + INITIALISER * of.initialisers


def prepacked(graph: GraphLike, machine: Machine = X86) -> tuple[int, int]:
    """Bytes of the copies that loading a graph makes of its constant weights: inside the region, and beside it.

    `ConvTranspose` keeps its weight transposed, in a block of the region, unless a group has one channel going in or one number coming out of it.
    `Gemm` and `MatMul` pack a matrix in panels of 16 columns, in memory that the arena counts but takes from malloc. Of 8-bit operators see
    `quantised.packed`.
    """
    inside = beside = 0
    shared: dict[tuple[str, str], int] = {}
    stored: frozenset[str] = getattr(graph, "stored", frozenset())  # those are mapped
    for node in graph.nodes:
        block, apart = quantised.packed(graph, node, machine)
        inside += rounded(block)
        if apart and quantised.weight_of(node) not in stored:  # once for all nodes of a kind that read it, as where something is computed twice
            shared[node.op, quantised.weight_of(node)] = apart
        if len(node.inputs) < 2 or node.inputs[1] not in graph.constants:
            continue
        weight = graph.values[node.inputs[1]]
        if node.op == "ConvTranspose":
            if weight.shape[0] // int(node.attributes.get("group", 1)) > 1 and math.prod(weight.shape[1:]) > 1:
                inside += rounded(weight.nbytes)
        elif node.op in ("Gemm", "MatMul", "com.microsoft.FusedGemm", "com.microsoft.FusedMatMul") and len(weight.shape) == 2:
            depth, columns = reversed(weight.shape) if node.attributes.get("transB") else weight.shape
            beside += 4 * depth * -(-columns // 16) * 16
    return inside, beside + sum(shared.values())


def places(external: Iterable[External], prepared: bool, without: Collection[str] = ()) -> tuple[int, int]:
    """The windows of the bundle's file and of that of its prepared graphs that a graph's tensors lie in, but for those named in `without`."""
    found: tuple[list[External], list[External]] = ([], [])
    for tensor in external:
        if tensor.name not in without:
            found[prepared and tensor.location == OWN].append(tensor)
    return windows(found[0]), windows(found[1])


def copies_bytes(external: Iterable[External]) -> int:
    """Bytes that are mapped, while a prepared graph runs, of the copies of its weights that its file has."""
    return sum(-(-length // WINDOW) * WINDOW for tensor in external for _, length in tensor.copies)


def mapped_pages(found: int, size: int, page: int) -> int:
    """Bytes of those windows of a file of `size`, as `windows` gives them."""
    whole, last = divmod(-(-size // page) * page, WINDOW)
    return (found & ((1 << whole) - 1)).bit_count() * WINDOW + (last if found >> whole & 1 else 0)


def mapped(found: Iterable[tuple[int, int]], sizes: tuple[int, int], page: int) -> int:
    """Bytes that are mapped of the bundle's file and of its prepared graphs', of these `sizes`, by graphs that lie in those `places`."""
    masks = [0, 0]
    for pair in found:
        masks = [mask | more for mask, more in zip(masks, pair)]
    return sum(mapped_pages(mask, size, page) for mask, size in zip(masks, sizes))


def state_bytes(specs: Iterable[StateSpec], graphs: Mapping[str, GraphSpec], names: Iterable[str]) -> int:
    """Bytes of the state where the graphs `names` run: the current set, and the following set of what they write."""
    written = {tensor for name in names for tensor in graphs[name].writes}
    return sum(-(-spec.nbytes // 64) * 64 * (2 if spec.name in written else 1) for spec in specs)


def frame_bytes(manifest: Manifest) -> tuple[int, int]:
    """Bytes of a frame and of its logits, of segmentation at most one score a pixel and class."""
    places = math.prod(manifest.input.shape[1:]) if manifest.task.kind == "segmentation" else 1
    return 4 * math.prod(manifest.input.shape), 4 * manifest.task.classes * places


def answering(manifest: Manifest, name: str, region: int, copies: int, structures: int, frames: int, threads: int) -> int:
    """Bytes of a second session of the graph `name`, and of what it needs to answer frames while a step runs: a state and memory of its own.

    Args:
        manifest: of the bundle.
        name: the graph.
        region: that a run takes its tensors from.
        copies: of its weights, in another layout.
        structures: of the session.
        frames: of the window that fills meanwhile.
        threads: of one operator.
    """
    graph = manifest.graphs[name]
    own = [spec for spec in manifest.state if spec.name in {*graph.reads, *graph.writes}]
    frame, scores = frame_bytes(manifest)
    ours = TENSOR * len(own) + BOUND * bound(graph) + state_bytes(own, manifest.graphs, [name])
    return region + (region + copies) // 256 * TABLE_ENTRY + copies + structures + ours + (1 + frames) * frame + 2 * scores + threads * THREAD


def restoring_bytes(specs: Iterable[StateSpec], graphs: Mapping[str, GraphSpec], names: Iterable[str]) -> int:
    """Bytes that loading or resetting a state holds at once: its largest tensor, and copies of those that no graph of `names` writes."""
    written = {tensor for name in names for tensor in graphs[name].writes}
    sizes = {spec.name: spec.nbytes for spec in specs}
    return max(sizes.values(), default=0) + sum(size for name, size in sizes.items() if name not in written)


def sums_bytes(shapes: Iterable[Sequence[int]]) -> int:
    """Bytes of what is kept between the runs of a step in pieces, from the sums' shapes; each run adds to it in place."""
    return sum(-(-math.prod(shape) // 16) * 64 for shape in shapes)


def sums_used(manifest: Manifest, names: Iterable[str]) -> int:
    """Bytes of the sums of a bundle that the graphs `names` add to or end with."""
    used = {name for graph in names for name in manifest.graphs[graph].sums}
    return sums_bytes(spec.shape for spec in manifest.sums if spec.name in used)


def bound(graph: GraphSpec) -> int:
    """How many tensors of ours a graph's session is bound to, those of a sum once."""
    return len(graph.reads) + len(graph.writes) + len(graph.sums)


class _Traced(Region):
    """A region that remembers which of its bytes were ever part of a block."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.blocks: set[tuple[int, int]] = set()

    def allocate(self, name: str, size: int) -> bool:
        """As a region does."""
        found = super().allocate(name, size)
        if found:
            self.blocks.add((self._place[name], self._place[name] + size))
        return found


def touched(plans: Iterable[Plan], size: int, page: int) -> int:
    """Bytes of the pages of one region of `size` that runs of the plans write to; no others are resident. All of it if a plan does not fit."""
    blocks: set[tuple[int, int]] = set()
    for plan in plans:
        region = _Traced(size // ALIGNMENT * ALIGNMENT)
        if not region.run(plan):
            return size
        blocks |= region.blocks
    total = end = 0
    for begin, stop in sorted((begin // page * page, -(-stop // page) * page) for begin, stop in blocks):
        total += max(stop - max(begin, end), 0)
        end = max(end, stop)
    return min(total, size)
