"""What a bundle says about itself: manifest.json, format 1, as frozen dataclasses.

Reading is strict. Every key is typed, unknown and missing keys are refused by their path, and the parts are checked against each other,
so that whoever holds a `Manifest` need not check again.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edgeadapt.bundle.agreement import agree
from edgeadapt.bundle.checked import read_selfcheck
from edgeadapt.bundle.choice import Choice, read_choice
from edgeadapt.bundle.graphspec import NAME, OPTIONAL, GraphSpec, read_graph
from edgeadapt.bundle.inputspec import MOST_ELEMENTS, InputSpec, plain_input, read_input
from edgeadapt.bundle.quantised import Quantised, read_quantised
from edgeadapt.bundle.reading import Node, parse
from edgeadapt.bundle.reference import Reference, read_reference
from edgeadapt.bundle.roles import GRAPH, SUMS, UPDATE, VARIANTS, Form
from edgeadapt.bundle.searched import Searched, read_searched
from edgeadapt.errors import BundleError

FORMAT = 1
KINDS = ("parameter", "moment", "statistic", "memory")
ITEMSIZES = {"float32": 4, "int8": 1, "uint8": 1, "int16": 2, "int64": 8}
"""Bytes of an element of each type that state may have; anything but float32 holds whole numbers whose meaning is the graphs' own affair."""
# keys that are not there where there is nothing in them
_OPTIONAL = {"sums", "quantisation", "choice", "reference", "searched"}
WEIGHTS = "weights.bin"
STATE = "state.safetensors"


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
    """A tensor that outlives a step.

    Attributes:
        kind: "parameter", "moment" (the optimiser's), "statistic" (of a normalisation), or "memory" (what else the method keeps of the stream).
        dtype: a key of `ITEMSIZES`; statistics and memory are float32.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    dtype: str = "float32"

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of one set of it."""
        return self.size * ITEMSIZES[self.dtype]


@dataclass(frozen=True)
class SumSpec:
    """A float32 tensor that the runs of one step in pieces add to, and that is thrown away after it."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Member:
    """A member's SHA-256 (hex) and its size in bytes."""

    sha256: str
    size: int


@dataclass(frozen=True)
class Manifest:
    """All of manifest.json. `members` is filled by the writer; `source`, `warmup`, `method.options` and, save `unchecked`, `selfcheck` are free."""
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
    sums: tuple[SumSpec, ...] = ()
    quantisation: Quantised | None = None
    choice: Choice | None = None
    reference: Reference | None = None
    searched: Searched | None = None
    format: int = FORMAT

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, as they stand in the file."""
        plain = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        plain = {"format": plain.pop("format"), **{key: _plain(value) for key, value in plain.items()}}
        return {key: value for key, value in plain.items() if (key != "source" or value is not None) and (key not in _OPTIONAL or value)}

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

    def forms(self, role: str, batch: int) -> tuple[Form, ...]:
        """The ways to run a role at a batch: its variants, then in pieces, the largest first."""
        whole = tuple(Form(role, batch, (name,)) for name in self.variants(role, batch))
        sizes = [size for size in self.planned(role + SUMS) if size < batch and batch % size == 0] if whole else []
        return whole + tuple(Form(role, batch, (f"{role}{SUMS}.b{size}", role + UPDATE), size) for size in sizes)


def _plain(value: Any) -> Any:
    if isinstance(value, InputSpec):
        return plain_input(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        found = {field.name.rstrip("_"): _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {key: item for key, item in found.items() if (key not in OPTIONAL or item) and (key, item) != ("dtype", "float32")}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


_HEX = r"[0-9a-f]{64}"


def _manifest(root: Node) -> Manifest:
    form = root.child("format").integer(1)
    if form > FORMAT:
        raise BundleError(f"{root.path}: made by a newer edgeadapt: format {form}, this reads {FORMAT}", "upgrade edgeadapt on this machine")
    root.keys({field.name for field in dataclasses.fields(Manifest)}, optional={"source", *_OPTIONAL})
    manifest = Manifest(
        format=form,
        producer=root.child("producer").text(),
        model=_model(root.child("model")),
        task=_task(root.child("task")),
        input=read_input(root.child("input")),
        method=_method(root.child("method")),
        partition=root.child("partition").items(_part),
        statistics=_statistics(root.child("statistics")),
        hyper=root.child("hyper").mapping(_hyper, r"[a-z][a-z0-9_]*"),
        state=root.child("state").items(_state),
        batches=root.child("batches").items(lambda node: node.integer(1)),
        graphs=root.child("graphs").mapping(read_graph, GRAPH),
        opset=root.child("opset").integer(1),
        ir_version=root.child("ir_version").integer(1),
        source=root.child("source").free() if root.has("source") else None,
        warmup=root.child("warmup").maybe(Node.free),
        selfcheck=read_selfcheck(root.child("selfcheck")),
        members=root.child("members").mapping(_member, r"[ -~]{1,200}"),
        sums=root.child("sums").items(_sum) if root.has("sums") else (),
        quantisation=read_quantised(root.child("quantisation")) if root.has("quantisation") else None,
        choice=read_choice(root.child("choice")) if root.has("choice") else None,
        reference=read_reference(root.child("reference")) if root.has("reference") else None,
        searched=read_searched(root.child("searched")) if root.has("searched") else None,
    )
    agree(manifest, root)
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
    node.keys({"name", "shape", "kind"}, optional={"dtype"})
    dtype = node.child("dtype").text("|".join(ITEMSIZES)) if node.has("dtype") else "float32"
    kind = node.child("kind").text("|".join(KINDS))
    if kind in ("statistic", "memory") and dtype != "float32":
        raise node.child("dtype").wrong(f"float32, of a {kind}", dtype)
    return StateSpec(node.child("name").text(NAME), _shape(node), kind, dtype)


def _sum(node: Node) -> SumSpec:
    node.keys({"name", "shape"})
    return SumSpec(node.child("name").text(NAME), _shape(node))


def _shape(node: Node) -> tuple[int, ...]:
    shape = node.child("shape").items(lambda size: size.integer(1))
    if len(shape) > 8:
        raise node.child("shape").wrong("at most 8 sizes", f"{len(shape)}")
    if math.prod(shape) > MOST_ELEMENTS:
        raise node.child("shape").wrong(f"at most {MOST_ELEMENTS} elements", f"{list(shape)}")
    return shape


def _member(node: Node) -> Member:
    node.keys({"sha256", "size"})
    return Member(node.child("sha256").text(_HEX), node.child("size").integer(0))
