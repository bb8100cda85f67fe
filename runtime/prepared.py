"""Graphs that were prepared for this machine: finding them in the cache and checking them; `preparing` has them made.

An entry of the cache is a folder: `record.json` (what was decided and why, and the checksums of the rest), a graph `NAME.onnx` for each that is
kept, `weights.bin` with the tensors that the bundle does not have as they are wanted, `weights.json` which says where each lies, by its hash, and an
empty file that stands for the bundle. An entry need not know all graphs of its bundle: what was not yet looked at is added when it is wanted.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import stat
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from edgeadapt._version import __version__
from edgeadapt.bundle import WEIGHTS_OFFSET, Bundle, Figures, Graph, onnxwire
from edgeadapt.bundle.digest import sha256
from edgeadapt.bundle.graphspec import read_figures
from edgeadapt.bundle.reading import Node, parse
from edgeadapt.cache import cache_folder
from edgeadapt.errors import BundleError
from edgeadapt.memory import footprint, quantised
from edgeadapt.memory.graph import OWN, read
from edgeadapt.progress import Progress
from edgeadapt.units import format_bytes

FORMAT = 3
RECORD, BUNDLE, INDEX = "record.json", "bundle", "weights.json"
"""Files of an entry. Graphs name `OWN` and `BUNDLE` as the places of their tensors."""

DOMAINS = ("com.microsoft", "com.microsoft.nchwc")
"""Of operators that a prepared graph may use besides the standard's."""

TRIES = 3
"""How often a graph is tried whose process ended early."""

LOG = logging.getLogger("edgeadapt")

_LIMIT = 256 * 2**20  # bytes of a graph, as in a bundle
_CHUNK = 2**20
_FILES = r"[a-z-]{1,24}(\.[a-z0-9]{1,16}){0,3}\.onnx|weights\.(bin|json)"
_HASH = "[0-9a-f]{64}"
_CPU = ("model name", "flags", "CPU implementer", "CPU part", "Features")


@dataclass(frozen=True)
class PreparedGraph:
    """A graph to run instead of the bundle's.

    Attributes:
        model: its file.
        folder: of its external data; `OWN` and `BUNDLE` are there.
        level: of onnxruntime's optimisation: "extended", "all", "turned" or "light".
        nodes: how many it has.
        peak_bytes: its peak of live tensors, counted.
        region_bytes: a region for its tensors that it was seen to run in.
        packed_bytes: of weights in another layout, which lie in the region too once it is loaded.
        reserved_bytes: of small constants, which it takes outside the region.
        own_bytes: of its tensors that are not the bundle's.
        digest: SHA-256 of the file in hex.
        figures: for plans; None: the graph must be read for them.
        windows: of the bundle's file and of the entry's weights that its tensors lie in, as `weights.windows` says; None: not looked at.
        bytes: whether it has weights of 8 bits, of which operators keep copies; those that nothing else reads are not among its windows.
        stored_bytes: of the copies that the entry's weights have, in windows; they are mapped while it runs.
    """

    model: Path
    folder: str
    level: str
    nodes: int
    peak_bytes: int
    region_bytes: int
    packed_bytes: int
    reserved_bytes: int
    own_bytes: int
    digest: str
    figures: Figures | None = None
    windows: tuple[int, int] | None = None
    bytes: bool = False
    stored_bytes: int = 0

    @property
    def base_bytes(self) -> int:
        """What it takes of onnxruntime's memory when it is loaded."""
        return self.packed_bytes + self.reserved_bytes

    def read(self, weights_size: int, own_size: int) -> Graph:
        """The graph as onnxruntime may load it: its tensors lie inside the bundle's weights or the entry's own, its operators are known.

        Args:
            weights_size: bytes of the bundle's frozen weights.
            own_size: bytes of the entry's weights.

        Raises:
            BundleError: the file is missing, damaged, or not what was prepared.
        """
        try:
            with self.model.open("rb") as file:
                data = file.read(_LIMIT)
        except OSError as reason:
            raise _unusable(self.model, f"cannot be read ({reason.strerror})") from None
        if sha256(data).hexdigest() != self.digest:
            raise _unusable(self.model, "is damaged (its checksum differs)")
        facts = onnxwire.scan(data, str(self.model), DOMAINS)
        ends = {BUNDLE: (WEIGHTS_OFFSET, WEIGHTS_OFFSET + weights_size), OWN: (0, own_size)}
        for tensor in facts.external:
            begin, end = ends.get(tensor.location, (0, -1))
            if not tensor.outer or tensor.offset < begin or tensor.offset + tensor.length > end:
                raise _unusable(self.model, f"takes tensor {tensor.name!r} from a place that is not its own")
            if any(offset + length > own_size for offset, length in tensor.copies) or (tensor.copies and tensor.location != OWN):
                raise _unusable(self.model, f"takes a copy of tensor {tensor.name!r} from a place that is not its own")
        return Graph(data, facts.external)


@dataclass(frozen=True)
class Prepared:
    """An entry of the cache, checked.

    Attributes:
        folder: the entry.
        graphs: those to run instead of the bundle's, by name; a graph that is not here runs as exported.
        own_bytes: size of its weights file, which is mapped when a graph is loaded.
        record: what was decided and why: see docs/prepare.md.
        seconds: of a run of each graph that was looked at, in the form that runs.
    """

    folder: Path
    graphs: dict[str, PreparedGraph]
    own_bytes: int
    record: dict[str, Any]
    seconds: dict[str, float] = field(default_factory=dict)

    def lacks(self, names: Iterable[str]) -> list[str]:
        """Those of a bundle's graphs that were not looked at yet, or whose process ended early, as for want of memory, and may be tried again."""
        found = self.record["graphs"]
        return [name for name in names if name not in found or 0 < found[name].get("tries", 0) < TRIES]

    def mapped(self) -> memoryview:
        """The weights file, mapped read-only; empty where no graph has tensors of its own.

        Raises:
            BundleError: it is not the file that was checked.
        """
        return _map(self.folder / OWN, self.own_bytes)


def map_own(graph: PreparedGraph) -> memoryview:
    """The weights file beside a graph that has no entry yet."""
    return _map(Path(graph.folder, OWN), graph.own_bytes)


def _map(path: Path, size: int) -> memoryview:
    import mmap

    if not size:
        return memoryview(b"")
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size < size:  # more is there where graphs were added since
                raise _unusable(path, "is damaged (it is too short)")
            return memoryview(mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ))
    except OSError as reason:
        raise _unusable(path, f"cannot be read ({reason.strerror})") from None


def find(bundle: Bundle, threads: int = 1, cache: str | os.PathLike[str] | None = None) -> Prepared | None:
    """What was prepared for this bundle, onnxruntime, CPU and number of threads, every byte of it checked; None where there is nothing sound.

    Args:
        bundle: the bundle.
        threads: of one operator.
        cache: the cache's folder; None for the usual places.
    """
    present = [folder for folder in places(bundle, cache) if _any(folder, bundle)]
    if not present:
        return None  # without asking onnxruntime for its version
    wanted = key(bundle, threads)
    for folder in present:
        entry = folder / entry_name(wanted)
        if os.path.isdir(entry):  # false also where the folder may not be entered
            try:
                return load(entry, bundle, wanted)
            except (BundleError, OSError) as reason:
                LOG.warning("%s is not used: %s", entry, getattr(reason, "message", reason))
    return None


def _any(folder: Path, bundle: Bundle) -> bool:
    """Whether a folder has entries of a bundle; not if it may not be read."""
    try:
        return any(name.startswith(bundle.digest[:16]) for name in os.listdir(folder))
    except OSError:
        return False


def places(bundle: Bundle, cache: str | os.PathLike[str] | None = None) -> list[Path]:
    """Where entries may lie, the first choice first: `cache`; $EDGEADAPT_CACHE; the user's cache folder, then BUNDLE.prepared beside the bundle."""
    if cache:
        return [Path(cache).absolute()]
    users = cache_folder()
    if os.environ.get("EDGEADAPT_CACHE"):
        return [users]
    beside = bundle.path.with_name(bundle.path.name + ".prepared")
    return [users, beside] if users.is_absolute() else [beside]


def entry_name(wanted: dict[str, Any]) -> str:
    """The folder's name: the bundle's digest and that of all that the result depends on, as `key` says."""
    return f"{wanted['bundle'][:16]}-{sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()[:16]}"


def key(bundle: Bundle, threads: int) -> dict[str, Any]:
    """What a prepared graph is good for; as plain JSON values."""
    return {"format": FORMAT, "producer": __version__, "bundle": bundle.digest, "onnxruntime": version(), "threads": threads, "cpu": cpu()}


def version() -> str:
    """onnxruntime's."""
    import onnxruntime

    return str(onnxruntime.__version__)


def cpu() -> str:
    """A fingerprint of what this processor can do."""
    found: set[str] = {platform.machine()}
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            found |= {line.strip() for line in file if line.split(":")[0].strip() in _CPU}
    except OSError:
        found.add(platform.processor())
    return sha256("\n".join(sorted(found)).encode()).hexdigest()


def load(entry: Path, bundle: Bundle, wanted: dict[str, Any]) -> Prepared:
    """An entry, checked.

    Args:
        entry: the folder.
        bundle: the bundle.
        wanted: what it must be good for, as `key` says.

    Raises:
        BundleError: something is missing, damaged, or made for something else.
        OSError: a file cannot be read.
    """
    _trusted(entry, stat.S_ISDIR)
    _trusted(entry / RECORD, stat.S_ISREG)
    record = parse((entry / RECORD).read_bytes(), str(entry / RECORD))
    root = Node(record, str(entry / RECORD))
    if root.child("key").free() != wanted:
        raise _unusable(entry, "was made for another bundle, onnxruntime or machine")
    files = root.child("files").mapping(_file, _FILES)
    for name, (digest, size) in files.items():
        _trusted(entry / name, stat.S_ISREG)
        if _digest(entry / name) != (digest, size):
            raise _unusable(entry / name, "is damaged (its checksum differs)")
    own = files.get(OWN, ("", 0))[1]
    graphs, seconds = {}, {}
    for name, node in _entries(root.child("graphs"), bundle):
        runs = node.child("runs").text("emitted|extended|all|turned|light")
        if (version := node.child("versions")).has(runs) and (facts := version.child(runs)).has("milliseconds"):
            seconds[name] = facts.child("milliseconds").number() / 1e3
        if runs == "emitted":
            continue
        digest = files.get(f"{name}.onnx", ("", 0))[0]
        graph = _graph(entry, name, node, digest)
        whole = graph.read(bundle.weights_size, own)
        gone = quantised.released(read(whole.data)) if quantised.present(whole.data) else frozenset[str]()
        places, stored = footprint.places(whole.external, True, gone), footprint.copies_bytes(whole.external)
        graphs[name] = replace(graph, windows=places, bytes=quantised.present(whole.data), stored_bytes=stored)
    return Prepared(entry, graphs, own, root.free(), seconds)


def _trusted(path: Path, kind: Callable[[int], bool]) -> None:
    """Refuses what somebody else could have put there: checksums that lie beside the files prove nothing."""
    found = os.lstat(path)
    if not kind(found.st_mode) or found.st_uid not in (0, os.geteuid()) or found.st_mode & 0o002:
        raise _unusable(path, "belongs to another user, or others may write to it")


def _entries(graphs: Node, bundle: Bundle) -> Iterator[tuple[str, Node]]:
    for name in bundle.manifest.graphs:
        if graphs.has(name):
            yield name, graphs.child(name)


def _graph(entry: Path, name: str, node: Node, digest: str) -> PreparedGraph:
    level = node.child("runs").text("extended|all|turned|light")
    facts = node.child("versions").child(level)
    sizes = ("peak_bytes", "region_bytes", "packed_bytes", "reserved_bytes", "own_bytes")
    given: dict[str, Any] = {**{key: facts.child(key).integer(0) for key in sizes}, "digest": digest, "figures": read_figures(facts.child("figures"))}
    return PreparedGraph(entry / f"{name}.onnx", str(entry), level, facts.child("nodes").integer(1), **given)


def _file(node: Node) -> tuple[str, int]:
    return node.child("sha256").text(_HASH), node.child("size").integer(0)


def _digest(path: Path) -> tuple[str, int]:
    digest, size = sha256(), 0
    with path.open("rb") as file:
        while piece := file.read(_CHUNK):
            digest.update(piece)
            size += len(piece)
    return digest.hexdigest(), size


def table(record: dict[str, Any]) -> str:
    """What was decided and why, as text."""
    rows = [("graph", "runs", "nodes", "peak", "was", "region", "at load", "own", "ms", "was", "time")]
    reasons = []
    for name, graph in record["graphs"].items():
        was, now = graph["versions"].get("emitted", {}), graph["versions"].get(graph["runs"], {})
        cells = [_bytes(now.get("peak_bytes")), _bytes(graph["planned_bytes"]), _bytes(now.get("region_bytes")), _bytes(now.get("base_bytes"))]
        times = [f"{version['milliseconds']:.3g}" if "milliseconds" in version else "–" for version in (now, was)]
        ratio = f"{now['time_ratio']:.2f}" if "time_ratio" in now else "–"
        rows.append((name, graph["runs"], str(now.get("nodes", "–")), *cells, _bytes(now.get("own_bytes")), *times, ratio))
        reasons.append(f"  {name}: {graph['why']}")
    widths = [max(len(row[index]) for row in rows) for index in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) if index < 2 else cell.rjust(width) for index, (cell, width) in enumerate(zip(row, widths))) for row in rows]
    closing = (
        f"in {record['seconds']:.0f} s, at most {format_bytes(record['peak_of_preparing'])} held; own weights {format_bytes(record['own_bytes'])}"
    )
    return "\n".join([*(f"  {line}".rstrip() for line in lines), "", *reasons, "", closing])


def _bytes(size: int | None) -> str:
    return "–" if size is None else format_bytes(size)


def describe(folder: Path, names: list[str]) -> dict[str, dict[str, Any]]:
    """Checksums and sizes of files, as the record has them."""
    found = {name: _digest(folder / name) for name in names}
    return {name: {"sha256": digest, "size": size} for name, (digest, size) in found.items()}


def _unusable(path: Path, why: str) -> BundleError:
    return BundleError(f"{path} {why}", "prepare the bundle again")


def completed(bundle: Bundle, threads: int, progress: Progress, ready: Prepared | None, names: Collection[str]) -> Prepared | None:
    """What was prepared, with those of the graphs `names` that it lacks."""
    lacking = names if ready is None else ready.lacks(names)
    if not lacking:
        return ready
    from edgeadapt.runtime.preparing import ensure

    return ensure(bundle, threads, progress, names=lacking)
