"""A small reader of the ONNX wire format: enough to find where a graph's tensors lie and to refuse what a bundle may not hold.

A device does not import `onnx` (and protobuf with it), yet must know, before onnxruntime sees a graph, that all of its external data
points into this bundle's own weights and that it uses standard operators only. Field numbers are those of onnx.proto.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from edgeadapt.bundle.reading import shortened
from edgeadapt.errors import BundleError

BITS = {1: 32, 2: 8, 3: 8, 4: 16, 5: 16, 6: 32, 7: 64, 9: 8, 10: 16, 11: 64, 12: 32, 13: 64, 16: 16, 17: 8, 18: 8, 19: 8, 20: 8, 21: 4, 22: 4}
KINDS = {
    **{1: "float", 2: "uint8", 3: "int8", 4: "uint16", 5: "int16", 6: "int32", 7: "int64"},
    **{9: "bool", 10: "float16", 11: "double", 12: "uint32", 13: "uint64", 16: "bfloat16"},
}
"""What onnxruntime calls each TensorProto.DataType of a whole number of bytes."""

_MAX_DEPTH = 16  # of subgraphs
_MAX_FIELDS = 4_000_000  # in all: three seconds of walking; exported graphs have tens of thousands
_MAX_SIZES = 64  # of one tensor
_MAX_WHOLE = 512  # elements of a tensor of whole numbers inside the graph, and of an attribute: onnxruntime makes shapes of them for each node behind
_REPEATING = frozenset({"Loop", "Scan", "SequenceMap"})  # without them each node runs once at most, and a run ends
_STRING = 8
_WHOLE = (6, 7)  # int32 and int64
_VALUES = {4: 4, 5: 1, 6: 1, 7: 1, 10: 8, 11: 1}  # fields with a tensor's elements one by one, and the bytes that each takes at least

Data = memoryview | bytes
Value = int | Data

COPY = "prepacked_"
"""What the keys begin with by which external data says where such copies lie; only graphs that were prepared have them."""

_SMALL = 4096  # messages of fewer bytes are copied: reading bytes takes half the time of reading a view


@dataclass(frozen=True, slots=True)
class External:
    """An initialiser whose bytes lie in another file.

    Attributes:
        name: the initialiser.
        kind: its TensorProto.DataType.
        shape: its sizes.
        location: the other file, as written.
        offset, length: its place there, in bytes.
        outer: whether it belongs to the model's own graph, not to a subgraph.
        copies: places in that file, in bytes from and how many, of what onnxruntime has made of it for its kernels.
    """

    name: str
    kind: int
    shape: tuple[int, ...]
    location: str
    offset: int
    length: int
    outer: bool
    copies: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Facts:
    """What `scan` found: external tensors, the number of nodes (subgraphs included), and the operators used."""

    external: tuple[External, ...]
    nodes: int
    operators: frozenset[str]


class Malformed(Exception):
    """The bytes are no ONNX file that a bundle may hold; the reason is for people."""


def scan(data: bytes | memoryview, where: str = "the graph", domains: Collection[str] = ()) -> Facts:
    """Walks a serialised ModelProto.

    Args:
        data: the model.
        where: what it is, for messages.
        domains: of operators that it may use besides ONNX's own.

    Raises:
        BundleError: not a well-formed model; model-local functions, training sections or sparse tensors; a node of another
            domain, or one that runs a subgraph again and again; external data that is incomplete, contradicts its tensor's shape, or is used
            outside initialisers; data inside that are not as many as their tensor's shape says; far more of something than any model has.
    """
    walker = _Walker(domains)
    try:
        walker.model(memoryview(data))
    except Malformed as reason:
        fix = "export the bundle again; if it was edited, take the original"
        raise BundleError(f"{where} cannot be used: {shortened(str(reason))}", fix) from None
    return Facts(tuple(walker.external), walker.nodes, frozenset(walker.operators))


def _varint(data: Data, position: int) -> tuple[int, int]:
    result = shift = 0
    while True:
        if position >= len(data) or shift > 63:
            raise Malformed("it is not a well-formed ONNX file (a number runs past its end)")
        byte = data[position]
        position += 1
        result |= (byte & 0x7F) << shift
        if byte < 0x80:
            return result & 0xFFFFFFFFFFFFFFFF, position
        shift += 7


def fields(data: Data) -> Iterator[tuple[int, Value]]:
    """Field numbers and values; numbers as int, everything with a length as a view. Fixed-width values are skipped (we need none)."""
    return ((field, value) for field, value, _, _ in _spans(data) if value is not None)


def _spans(data: Data) -> Iterator[tuple[int, Value | None, int, int]]:
    """As `fields`, with where each begins, its key included, and ends; the value of a fixed-width one is None."""
    position, end = 0, len(data)
    data = bytes(data) if end < _SMALL else data
    while position < end:
        begin = position
        key = data[position]  # nearly all keys and lengths are of one byte
        if key < 0x80:
            position += 1
        else:
            key, position = _varint(data, position)
        field, kind = key >> 3, key & 7
        if field == 0:
            raise Malformed("it is not a well-formed ONNX file (field number 0)")
        if kind == 0:
            value, position = _varint(data, position)
            yield field, value, begin, position
            continue
        if kind == 2:
            if position < end and (size := data[position]) < 0x80:
                position += 1
            else:
                size, position = _varint(data, position)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise Malformed("it is not a well-formed ONNX file (unknown wire type)")
        if size > end - position:
            raise Malformed("it is not a well-formed ONNX file (a field runs past its end)")
        position += size
        yield field, data[position - size : position] if kind == 2 else None, begin, position


def without_declarations(data: bytes) -> bytes:
    """A model without the declared shapes of its inner tensors, which a session would keep for each: 0.5 KB of 5 KB a node.

    Raises:
        Malformed: not a well-formed model.
    """
    whole = memoryview(data)
    pieces: list[Data] = []
    for field, value, begin, end in _spans(whole):
        if field != 7:
            pieces.append(whole[begin:end])
            continue
        graph = view(value if value is not None else 0, "the graph")
        kept = [graph[start:stop] for number, _, start, stop in _spans(graph) if number != 13]
        size = sum(map(len, kept))
        pieces += [b"\x3a", _encoded(size), *kept]
    return b"".join(pieces)


def _encoded(number: int) -> bytes:
    result = bytearray()
    while number > 0x7F:
        result.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*result, number])


def view(value: Value, what: str) -> Data:
    """A field that has a length; `what` names it in the Malformed that is raised otherwise."""
    if isinstance(value, int):
        raise Malformed(f"it is not a well-formed ONNX file ({what} is a number)")
    return value


def text(value: Value, what: str) -> str:
    """A field of UTF-8."""
    try:
        return str(view(value, what), "utf-8")
    except UnicodeDecodeError:
        raise Malformed(f"it is not a well-formed ONNX file ({what} is not UTF-8)") from None


class _Walker:
    def __init__(self, domains: Collection[str]) -> None:
        self.domains = frozenset(domains)
        self.left = _MAX_FIELDS
        self.external: list[External] = []
        self.nodes = 0
        self.operators: set[str] = set()

    def fields(self, data: Data) -> Iterator[tuple[int, Value]]:
        """As `fields`, counted."""
        for found in fields(data):
            self.left -= 1
            if self.left < 0:
                raise Malformed(f"it has more than {_MAX_FIELDS} fields")
            yield found

    def model(self, data: Data) -> None:
        graphs = 0
        for field, value in self.fields(data):
            if field == 7:
                graphs += 1
                self.graph(view(value, "the graph"), 0)
            elif field == 20:
                raise Malformed("it has a training section")
            elif field == 25:
                raise Malformed("it has model-local functions")
        if graphs != 1:
            raise Malformed(f"it holds {graphs} graphs, not one")

    def graph(self, data: Data, depth: int) -> None:
        if depth > _MAX_DEPTH:
            raise Malformed(f"its subgraphs are nested deeper than {_MAX_DEPTH}")
        for field, value in self.fields(data):
            if field == 1:
                self.node(view(value, "a node"), depth)
            elif field == 5:
                self.tensor(view(value, "an initialiser"), depth)
            elif field == 15:
                raise Malformed("it has sparse initialisers")

    def node(self, data: Data, depth: int) -> None:
        self.nodes += 1
        operator = domain = ""
        for field, value in self.fields(data):
            if field == 4:
                operator = text(value, "an operator's name")
            elif field == 7:
                domain = text(value, "a domain")
            elif field == 5:
                self.attribute(view(value, "an attribute"), depth)
        if domain and domain not in self.domains:
            raise Malformed(f"its operator {operator[:80]!r} is of domain {domain[:80]!r}; only standard ONNX operators are allowed")
        if operator in _REPEATING:
            raise Malformed(f"its operator {operator} may run without end")
        self.operators.add(f"{domain}.{operator}" if domain else operator)

    def attribute(self, data: Data, depth: int) -> None:
        many = 0
        for field, value in self.fields(data):
            if field == 8:
                many += 1 if isinstance(value, int) else len(value)
                if many > 10 * _MAX_WHOLE:  # a number takes ten bytes at most
                    raise Malformed("it has an attribute of too many numbers")
            elif field in (5, 10):
                self.tensor(view(value, "a tensor"), None)
            elif field in (6, 11):
                self.graph(view(value, "a subgraph"), depth + 1)
            elif field in (22, 23):
                raise Malformed("it has sparse tensors")

    def tensor(self, data: Data, depth: int | None) -> None:
        """`depth` is that of the graph it initialises; None in an attribute, where its data may not lie outside."""
        name, kind, stored = "", 0, False
        dims: list[int] = []
        entries: list[tuple[str, str]] = []
        inside = _Inside()
        for field, value in self.fields(data):
            if field == 8:
                name = text(value, "a tensor's name")
            elif field == 1:
                if not isinstance(value, int) and len(value) > 10 * _MAX_SIZES:
                    raise Malformed(f"it has a tensor of more than {_MAX_SIZES} sizes")
                dims.extend(numbers(value))
            elif field == 2:
                kind = value if isinstance(value, int) else 0
            elif field == 13:
                entries.append(entry(view(value, "external data")))
            elif field == 14:
                stored = stored or value != 0
            elif field == 9 or field in _VALUES:
                inside.add(field, value)
        if impossible(dims):
            raise Malformed(f"the tensor {name[:80]!r} has a shape that cannot be, {[size - 2**64 if size >= 2**63 else size for size in dims[:8]]}")
        if not entries and not stored:
            inside.check(name[:80], kind, dims)
            if kind in _WHOLE and not self.domains and math.prod(dims) > _MAX_WHOLE:
                raise Malformed(f"the tensor {name[:80]!r} has {math.prod(dims)} whole numbers; more than {_MAX_WHOLE} belong into weights.bin")
            return
        if depth is None:
            raise Malformed("an attribute's data lies in another file")
        found = dict(entries)
        held = [copies(found.pop(key), name) for key in sorted(found) if self.domains and key.startswith(COPY)]
        if not stored or len(found) + len(held) != len(entries) or set(found) != {"location", "offset", "length"}:
            raise Malformed(f"the external data of {name!r} needs location, offset and length, each once and nothing else")
        offset, length = (_decimal(found[key], name) for key in ("offset", "length"))
        if kind not in BITS:
            raise Malformed(f"the external tensor {name!r} has an unknown type ({kind})")
        if length != (math.prod(dims) * BITS[kind] + 7) // 8:
            raise Malformed(f"the external tensor {name!r} of shape {dims} has {length} bytes")
        apart = tuple(place for places in held for place in places)
        self.external.append(External(name, kind, tuple(dims), found["location"], offset, length, depth == 0, apart))


def impossible(sizes: Sequence[int]) -> bool:
    """Whether no tensor has these sizes. Those below 0 come as very large ones."""
    return len(sizes) > _MAX_SIZES or any(size >= 2**40 for size in sizes) or math.prod(sizes) >= 2**53


class _Inside:
    """What a tensor has of elements in the graph itself."""

    def __init__(self) -> None:
        self.raw: int | None = None
        self.most = self.texts = 0

    def add(self, field: int, value: Value) -> None:
        """A field of it."""
        size = 1 if isinstance(value, int) else len(value)
        if field == 9:
            self.raw = size
        elif field == 6:
            self.texts += 1
        else:
            self.most += size // _VALUES[field] if not isinstance(value, int) else 1

    def check(self, name: str, kind: int, dims: Sequence[int]) -> None:
        """That there are as many as the sizes say, before anybody makes room for them."""
        count = math.prod(dims)
        if kind == _STRING:
            right = count == self.texts
        elif kind not in BITS:
            raise Malformed(f"the tensor {name!r} has an unknown type ({kind})")
        elif self.raw is not None:
            right = (count * BITS[kind] + 7) // 8 == self.raw
        else:
            right = count <= self.most * (8 // BITS[kind] if BITS[kind] < 8 else 1)
        if not right:
            raise Malformed(f"the tensor {name!r} of shape {list(dims[:8])} has more or fewer data than that")


def numbers(value: Value) -> list[int]:
    """A repeated int64, written one by one or packed."""
    if isinstance(value, int):
        return [value]
    result, position = [], 0
    while position < len(value):
        number, position = _varint(value, position)
        result.append(number)
    return result


def entry(data: Data) -> tuple[str, str]:
    """Key and value of a StringStringEntryProto."""
    texts = {1: "", 2: ""}
    for field, value in fields(data):
        if field in texts:
            texts[field] = text(value, "external data")
    return texts[1], texts[2]


def copies(value: str, name: str) -> list[tuple[int, int]]:
    """Places of copies of a tensor, from "OPERATOR+HASH|offset;length;padding|...".

    Raises:
        Malformed: it is nothing like that.
    """
    found = []
    for part in value.split("|")[1:]:
        offset, length, _ = (_decimal(number, name) for number in part.split(";")) if part.count(";") == 2 else (_decimal(part, name), 0, 0)
        if length:
            found.append((offset, length))
    return found


def _decimal(text: str, name: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 16):
        raise Malformed(f"the external data of {name!r} has {text[:40]!r} where a number of bytes belongs")
    return int(text)
