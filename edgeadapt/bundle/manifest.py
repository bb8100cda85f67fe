"""What a bundle says about itself: manifest.json, format 1, as frozen dataclasses.

Reading is strict. Every key is typed, unknown and missing keys are refused by their path, and the parts are checked against each other,
so that whoever holds a `Manifest` need not check again.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from edgeadapt.bundle.reading import Node, parse
from edgeadapt.errors import BundleError

FORMAT = 1
ROLES = ("source", "predict", "adapt", "learn")
VARIANTS = ("", "lean", "least")
KINDS = ("parameter", "moment", "statistic")
WEIGHTS = "weights.bin"
STATE = "state.safetensors"

T = TypeVar("T")


@dataclass(frozen=True)
class ModelInfo:
    """The user's model: the factory it came from, its parameter count, and the hash of its frozen weights (hex)."""

    name: str
    parameters: int
    weights_sha256: str


@dataclass(frozen=True)
class Task:
    """`kind` is "classification" (logits N×C) or "segmentation" (N×C×H×W, or N×C×L); `names` has one entry a class, or is None."""

    kind: str
    classes: int
    names: tuple[str, ...] | None = None


@dataclass(frozen=True)
class InputSpec:
    """One frame as the graphs take it, and how uint8 images become it.

    Attributes:
        shape: float32 frame, channels first and without the batch.
        resize: (height, width) that uint8 frames are resized to; equals shape[1:]. None: they must come in that size.
        mean, std: one number a channel, applied after division by 255; None: not applied.
    """

    shape: tuple[int, ...]
    resize: tuple[int, int] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


@dataclass(frozen=True)
class MethodInfo:
    """The adaptation method, its options as given at export, and one line about it."""

    name: str
    options: dict[str, Any]
    summary: str


@dataclass(frozen=True)
class Part:
    """One part of the frozen model: its last layer, its first (`from_`, "from" in the file), its output's shape without the batch."""

    name: str
    from_: str
    shape: tuple[int, ...]
    parameters: int
    trainable: int


@dataclass(frozen=True)
class StatisticsInfo:
    """`mode`: "live" (normalisation statistics follow the stream), "source" (they stay), "none" (the model has none)."""

    mode: str
    layers: tuple[str, ...] = ()


@dataclass(frozen=True)
class HyperSpec:
    """A scalar that may be changed on the device between `low` and `high`, both included."""

    default: float
    low: float
    high: float
    help: str = ""


@dataclass(frozen=True)
class StateSpec:
    """A float32 tensor that outlives a step; `kind` is "parameter", "moment" (the optimiser's) or "statistic"."""

    name: str
    shape: tuple[int, ...]
    kind: str

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class GraphSpec:
    """One static graph: its member, role and batch, and the names it takes and gives.

    nodes: their number. peak_bytes: planned peak of live tensors. region_bytes: the one region of memory in which a run goes through.
    defaults: scalars whose best value depends on the batch; they go before the manifest's own defaults.
    variant: "" for the quickest form of a step; "lean" and "least" compute the same, bit for bit, in less memory and more time.
    """

    path: str
    role: str
    batch: int
    hyper: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ()
    nodes: int = 0
    peak_bytes: int = 0
    region_bytes: int = 0
    defaults: dict[str, float] = dataclasses.field(default_factory=dict)
    variant: str = ""

    @property
    def name(self) -> str:
        """Its name in the bundle: "adapt.b16", "adapt.b16.lean"."""
        return f"{self.role}.b{self.batch}" + (f".{self.variant}" if self.variant else "")


@dataclass(frozen=True)
class Member:
    """A member's SHA-256 (hex) and its size in bytes."""

    sha256: str
    size: int


@dataclass(frozen=True)
class Manifest:
    """All of manifest.json. `members` is filled by the writer; `source`, `warmup`, `selfcheck` and `method.options` are free JSON."""

    producer: str
    model: ModelInfo
    task: Task
    input: InputSpec
    method: MethodInfo
    partition: tuple[Part, ...]
    statistics: StatisticsInfo
    hyper: dict[str, HyperSpec]
    state: tuple[StateSpec, ...]
    batches: tuple[int, ...]
    graphs: dict[str, GraphSpec]
    opset: int
    ir_version: int
    source: dict[str, Any] | None = None
    warmup: dict[str, Any] | None = None
    selfcheck: dict[str, Any] = dataclasses.field(default_factory=dict)
    members: dict[str, Member] = dataclasses.field(default_factory=dict)
    format: int = FORMAT

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, as they stand in the file."""
        plain = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        plain = {"format": plain.pop("format"), **{key: _plain(value) for key, value in plain.items()}}
        if self.source is None:
            del plain["source"]
        return plain

    @staticmethod
    def from_json(value: object, where: str = "manifest") -> Manifest:
        """Reads and checks plain JSON values.

        Raises:
            BundleError: a newer format, a missing, unknown or wrongly typed key (named by its path), or parts that contradict each other.
        """
        return _manifest(Node(value, where))

    def to_bytes(self) -> bytes:
        """The file's bytes: UTF-8 JSON."""
        return (json.dumps(self.to_json(), indent=1, allow_nan=False) + "\n").encode()

    @staticmethod
    def from_bytes(data: bytes, where: str = "manifest.json") -> Manifest:
        """Parses and checks the file's bytes.

        Raises:
            BundleError: not JSON, or as `from_json`.
        """
        return Manifest.from_json(parse(data, where), where)

    def spec(self, name: str) -> StateSpec:
        """The state tensor of that name; KeyError where there is none."""
        for spec in self.state:
            if spec.name == name:
                return spec
        raise KeyError(name)

    def planned(self, role: str) -> tuple[int, ...]:
        """The batch sizes that have a graph of this role, largest first."""
        return tuple(sorted({graph.batch for graph in self.graphs.values() if graph.role == role}, reverse=True))

    def variants(self, role: str, batch: int) -> tuple[str, ...]:
        """The names of the graphs of a role and batch, the quickest first, the one with the least memory last."""
        names = (f"{role}.b{batch}" + (f".{variant}" if variant else "") for variant in VARIANTS)
        return tuple(name for name in names if name in self.graphs)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name.rstrip("_"): _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


_HEX = r"[0-9a-f]{64}"
_NAME = r"[!-~]{1,256}"  # printable ASCII without blanks: they become names inside the graphs


def _manifest(root: Node) -> Manifest:
    form = root.child("format").integer(1)
    if form > FORMAT:
        raise BundleError(f"{root.path}: made by a newer edgeadapt: format {form}, this reads {FORMAT}", "upgrade edgeadapt on this machine")
    root.keys({field.name for field in dataclasses.fields(Manifest)}, optional={"source"})
    manifest = Manifest(
        format=form,
        producer=root.child("producer").text(),
        model=_model(root.child("model")),
        task=_task(root.child("task")),
        input=_input(root.child("input")),
        method=_method(root.child("method")),
        partition=root.child("partition").items(_part),
        statistics=_statistics(root.child("statistics")),
        hyper=root.child("hyper").mapping(_hyper, r"[a-z][a-z0-9_]*"),
        state=root.child("state").items(_state),
        batches=root.child("batches").items(lambda node: node.integer(1)),
        graphs=root.child("graphs").mapping(_graph, rf"({'|'.join(ROLES)})\.b[1-9][0-9]*(\.lean|\.least)?"),
        opset=root.child("opset").integer(1),
        ir_version=root.child("ir_version").integer(1),
        source=root.child("source").free() if root.has("source") else None,
        warmup=root.child("warmup").maybe(Node.free),
        selfcheck=root.child("selfcheck").free(),
        members=root.child("members").mapping(_member, r"[ -~]{1,200}"),
    )
    _agree(manifest, root)
    return manifest


def _model(node: Node) -> ModelInfo:
    node.keys({"name", "parameters", "weights_sha256"})
    return ModelInfo(node.child("name").text(), node.child("parameters").integer(0), node.child("weights_sha256").text(f"({_HEX})?"))


def _task(node: Node) -> Task:
    node.keys({"kind", "classes", "names"})
    classes = node.child("classes").integer(1)
    names = node.child("names").maybe(lambda found: found.items(Node.text))
    if names is not None and len(names) != classes:
        raise node.child("names").wrong(f"{classes} names, one a class", f"{len(names)}")
    return Task(node.child("kind").text("classification|segmentation"), classes, names)


def _input(node: Node) -> InputSpec:
    node.keys({"shape", "resize", "mean", "std"})
    shape = node.child("shape").items(lambda size: size.integer(1))
    if not 1 <= len(shape) <= 4:
        raise node.child("shape").wrong("one to four sizes, channels first", f"{len(shape)}")
    resize = node.child("resize").maybe(lambda found: found.items(lambda size: size.integer(1)))
    if resize is not None and (len(shape) != 3 or resize != shape[1:]):
        raise node.child("resize").wrong(f"the frame's height and width {list(shape[1:])}", str(list(resize)))
    mean, std = (node.child(key).maybe(lambda found: found.items(Node.number)) for key in ("mean", "std"))
    for key, values in (("mean", mean), ("std", std)):
        if values is not None and len(values) != shape[0]:
            raise node.child(key).wrong(f"{shape[0]} numbers, one a channel", f"{len(values)}")
    if std is not None and min(std) <= 0:
        raise node.child("std").wrong("numbers above 0", str(list(std)))
    return InputSpec(shape, None if resize is None else (resize[0], resize[1]), mean, std)


def _method(node: Node) -> MethodInfo:
    node.keys({"name", "options", "summary"})
    return MethodInfo(node.child("name").text("[a-z][a-z0-9_-]*"), node.child("options").free(), node.child("summary").text())


def _part(node: Node) -> Part:
    node.keys({"name", "from", "shape", "parameters", "trainable"})
    shape = node.child("shape").items(lambda size: size.integer(1))
    return Part(node.child("name").text(), node.child("from").text(), shape, node.child("parameters").integer(0), node.child("trainable").integer(0))


def _statistics(node: Node) -> StatisticsInfo:
    node.keys({"mode", "layers"})
    return StatisticsInfo(node.child("mode").text("live|source|none"), node.child("layers").items(Node.text))


def _hyper(node: Node) -> HyperSpec:
    node.keys({"default", "low", "high", "help"})
    default, low, high = (node.child(key).number() for key in ("default", "low", "high"))
    if not low <= default <= high:
        raise node.wrong("low <= default <= high", f"{low}, {default}, {high}")
    return HyperSpec(default, low, high, node.child("help").text())


def _state(node: Node) -> StateSpec:
    node.keys({"name", "shape", "kind"})
    shape = node.child("shape").items(lambda size: size.integer(1))
    if len(shape) > 8:
        raise node.child("shape").wrong("at most 8 sizes", f"{len(shape)}")
    return StateSpec(node.child("name").text(_NAME), shape, node.child("kind").text("|".join(KINDS)))


def _graph(node: Node) -> GraphSpec:
    node.keys({field.name for field in dataclasses.fields(GraphSpec)})
    names = {key: node.child(key).items(_name) for key in ("hyper", "reads", "writes", "metrics")}
    for key, values in names.items():
        if len(set(values)) != len(values):
            raise node.child(key).wrong("every name once", "a name twice")
    return GraphSpec(
        path=node.child("path").text(),
        role=node.child("role").text("|".join(ROLES)),
        batch=node.child("batch").integer(1),
        nodes=node.child("nodes").integer(0),
        peak_bytes=node.child("peak_bytes").integer(0),
        region_bytes=node.child("region_bytes").integer(0),
        defaults=node.child("defaults").mapping(Node.number, r"[a-z][a-z0-9_]*"),
        variant=node.child("variant").text("|".join(VARIANTS)),
        **names,
    )


def _name(node: Node) -> str:
    return node.text(_NAME)


def _member(node: Node) -> Member:
    node.keys({"sha256", "size"})
    return Member(node.child("sha256").text(_HEX), node.child("size").integer(0))


def _agree(manifest: Manifest, root: Node) -> None:
    """The checks between parts of a manifest."""

    def check(known: Callable[[T], bool], values: tuple[T, ...], node: Node, expected: str) -> None:
        for value in values:
            if not known(value):
                raise node.wrong(expected, repr(value))

    kinds = {spec.name: spec.kind for spec in manifest.state}
    if len(kinds) != len(manifest.state):
        raise root.child("state").wrong("every name once", "a name twice")
    if 1 not in manifest.batches or list(manifest.batches) != sorted(set(manifest.batches)):
        raise root.child("batches").wrong("rising batch sizes, 1 among them", str(list(manifest.batches)))
    graphs = root.child("graphs")
    for name, graph in manifest.graphs.items():
        node = graphs.child(name)
        if name != graph.name:
            raise node.wrong(f"the name {graph.name}, as its role, batch and variant say", name)
        if graph.variant and f"{graph.role}.b{graph.batch}" not in manifest.graphs:
            raise node.wrong(f"a graph {graph.role}.b{graph.batch}, which it is a variant of", "none")
        if graph.path != f"graphs/{name}.onnx":
            raise node.child("path").wrong(f"graphs/{name}.onnx", repr(graph.path))
        if graph.batch not in manifest.batches:
            raise node.child("batch").wrong(f"one of {list(manifest.batches)}", str(graph.batch))
        check(manifest.hyper.__contains__, graph.hyper, node.child("hyper"), "names that stand in hyper")
        check(graph.hyper.__contains__, tuple(graph.defaults), node.child("defaults"), "names that stand in this graph's hyper")
        check(kinds.__contains__, graph.reads, node.child("reads"), "names that stand in state")
        check(kinds.__contains__, graph.writes, node.child("writes"), "names that stand in state")
        check(lambda value: re.fullmatch("[a-z][a-z0-9_]*", value) is not None, graph.metrics, node.child("metrics"), "lower-case words")
        if graph.role in ("source", "predict"):
            check(lambda value: kinds[value] == "statistic", graph.writes, node.child("writes"), f"only statistics, in a {graph.role} graph")
    if "predict.b1" not in manifest.graphs:
        raise graphs.wrong("a graph predict.b1", ", ".join(manifest.graphs) or "none")
    if "source.b1" not in manifest.graphs:
        raise graphs.wrong("a graph source.b1", ", ".join(manifest.graphs))
