"""Bundles and saved states as somebody who means ill would send them, and a process apart that opens them.

What is made follows from its kind and a number alone, so that whatever goes wrong can be had again: `make(kind, number, folder)`, or from the
command line `python benchmarks/bundle_fuzz.py --kind KIND --number N`.
"""

from __future__ import annotations

import json
import os
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from edgeadapt.bundle import WEIGHTS_OFFSET, Bundle, tensors
from edgeadapt.bundle.digest import sha256
from edgeadapt.bundle.reference import Chance, Reference
from edgeadapt.runtime import checkpoint
from edgeadapt.runtime.checkpoint import Snapshot
from edgeadapt.runtime.daemon.store import Limits, Store, pointer
from edgeadapt.runtime.kept import Copy, Kept
from tests.child import ROOT, environment
from tests.fuzz_worker import BUDGET, Outcome
from tests.graph_fuzz import mutated
from tests.piecestoy import PiecesToy
from tests.smalltoy import small_bundle
from tests.toybundle import Toy

READING = 96 * 2**20
"""Bytes that reading one of these small files may take at once."""
PATIENCE = 30.0
"""Seconds that one of them may take, on a machine that does other work too."""
OVER = 24 * 2**20
"""Bytes over the budget that are borne: what loading a session takes in passing."""

Parts = dict[str, bytes]
LEARNED = ("norm.gamma", "norm.beta", "gamma.m", "beta.m")


@dataclass(frozen=True)
class Made:
    """What the worker is to open, and what has been done to it."""

    kind: str
    number: int
    task: dict[str, Any]
    note: str


# ---------------------------------------------------------------------------------------------------------------- what is sound


def _folder() -> Path:
    found = Path(tempfile.mkdtemp(prefix="edgeadapt-fuzz-"))
    import atexit

    atexit.register(shutil.rmtree, found, ignore_errors=True)
    return found


@cache
def sound() -> dict[str, Path]:
    """Bundles that are in order, and a state folder with one of them, one state that is the last good and one that is on probation."""
    folder = _folder()
    reference = Reference(64, 3.0, 0.1, {"norm": Chance(0.1, 0.2)})
    found = {"plain": Toy(4, 0, (1, 2)).write(folder / "plain.edgeadapt", reference=reference)}
    found["pieces"] = PiecesToy(4, 0, (1, 4), (1, 2)).write(folder / "pieces.edgeadapt")
    found["small"] = small_bundle(folder / "small.edgeadapt")
    found["maps"] = Toy(4, 0, (1,), "norm", "segmentation").write(folder / "maps.edgeadapt")
    clock = [1000.0]
    with Store.open(folder / "state", Limits(spare=0), clock=lambda: clock[0]) as store:
        store.install(found["plain"])
        store.begin_boot()
        manifest = Bundle.open(found["plain"]).manifest
        for seed, kept in enumerate((Kept(True, False, start=_learned(1)), Kept(False, False, laid_by=_learned(2)))):
            store.commit(replace(_snapshot(seed), kept=kept).at_hand, manifest, True)
            if not seed:
                clock[0] += store.limits.probation
                store.settled()
        store.stopped()
    checkpoint.write(folder / "saved.safetensors", replace(_snapshot(3), kept=kept).at_hand, manifest)
    return {**found, "state": folder / "state", "saved": folder / "saved.safetensors"}


def _snapshot(seed: int) -> Snapshot:
    rng = np.random.default_rng(seed)
    state = {name: value + rng.random(value.shape, dtype=np.float32) for name, value in Toy(4, 0, (1, 2)).state.items()}
    return Snapshot(state, {"frames": seed}, {"rate": 0.01})


def _learned(seed: int) -> Copy:
    return Copy({name: value for name, value in _snapshot(seed).tensors.items() if name in LEARNED}, True)


@cache
def members(name: str) -> Parts:
    """Of a sound bundle."""
    with zipfile.ZipFile(sound()[name]) as archive:
        return {info.filename: archive.read(info) for info in archive.infolist()}


def packed(parts: Parts) -> bytes:
    """A bundle's bytes, whatever its members say."""
    path = _scratch() / "packed"
    with zipfile.ZipFile(path, "w") as archive:
        for index, (name, data) in enumerate(parts.items()):
            info = zipfile.ZipInfo(name)
            if not index and (size := WEIGHTS_OFFSET - 30 - len(name)) > 4:
                info.extra = struct.pack("<HH", 0xD935, size - 4) + bytes(size - 4)
            archive.writestr(info, data)
    return path.read_bytes()


@cache
def _scratch() -> Path:
    return _folder()


def sealed(parts: Parts) -> Parts:
    """The members with checksums and sizes that are right; where the manifest cannot be read, as they are."""
    with suppress(ValueError, KeyError, TypeError, AttributeError, RecursionError):
        content = json.loads(parts["manifest.json"])
        content["members"] = {name: {"sha256": _hash(data), "size": len(data)} for name, data in parts.items() if name != "manifest.json"}
        return {**parts, "manifest.json": json.dumps(content).encode()}
    return parts


def _hash(data: bytes) -> str:
    return sha256(data).hexdigest()


# ---------------------------------------------------------------------------------------------------------------- any bytes

NUMBERS = (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**48, 2**63 - 1, 2**63, 2**64 - 1)


def bent(random: Random, data: bytes, first: int = 0) -> tuple[bytes, str]:
    """Bytes changed behind `first` as a cable, a disk or a person does, and how."""
    whole = bytearray(data)

    def place() -> int:
        return random.randrange(min(first, len(whole)), len(whole) + 1)

    kind = random.choice(("flips", "flips", "cut", "grown", "swapped", "number", "number", "zeros", "doubled", "removed"))
    at, size = place(), random.choice((1, 4, 16, 300, 5000))
    if kind == "flips":
        for _ in range(random.randint(1, 12)):
            if at < len(whole):
                whole[at] ^= random.randint(1, 255)
            at = place()
    elif kind == "cut":
        del whole[at:]
    elif kind == "grown":
        whole += random.randbytes(size) if random.random() < 0.5 else bytes(size)
    elif kind == "swapped":
        other = place()
        whole[at : at + size], whole[other : other + size] = whole[other : other + size], whole[at : at + size]
    elif kind == "number":
        width = random.choice((1, 2, 4, 8))
        whole[at : at + width] = (random.choice(NUMBERS) % 2 ** (8 * width)).to_bytes(width, random.choice(("little", "big")))
    elif kind == "zeros":
        whole[at : at + size] = bytes(size)
    elif kind == "doubled":
        whole[at:at] = whole[at : at + size]
    else:
        del whole[at : at + size]
    return bytes(whole), f"{kind} at {at}"


# ---------------------------------------------------------------------------------------------------------------- any JSON

LITERAL = "@@"


def _nested(depth: int, inner: Any = 0) -> Any:
    for index in range(depth):
        inner = [inner] if index % 2 else {"a": inner}
    return inner


VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 3, 64, 10**6, 2**31, 2**53 - 1, 2**53, 2**63, -(2**63), 10**30, 10**400, 0.5, -0.0, 1e308, 5e-324),
    *(float("nan"), float("inf"), -float("inf"), "", "x", "\0", "../../x", "/etc/passwd", "a" * 100_000, "\ud800", "é\u202e", "9" * 5000, "\x1b[2J"),
    *([], {}, [[]], [0] * 2000, [1] * 9, [2**40] * 8, ["x"] * 3, {"": {}}, {"\ud800": 1}, {"a" * 9000: 1}),
    *(f"{LITERAL}1e999", f"{LITERAL}-", f"{LITERAL}" + "9" * 9000, f"{LITERAL}" + '{"a":1,"a":1}'),
    *(f"{LITERAL}" + "[" * 900 + "]" * 900, f"{LITERAL}" + "[" * 90_000, f"{LITERAL}" + '{"a":' * 9000 + "0" + "}" * 9000),
)


def is_literal(value: Any) -> bool:
    """Whether it is written as it is."""
    return isinstance(value, str) and value.startswith(LITERAL)


def text_of(value: Any) -> bytes:
    """JSON, with what begins with LITERAL written as it is."""
    found = json.dumps(value)
    for item in VALUES:
        if is_literal(item):
            found = found.replace(json.dumps(item), item[len(LITERAL) :])
    return found.encode()


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every place in a value: what holds it, and its key there."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield value, key
        yield from places(value[key])


def altered(random: Random, content: Any) -> str:
    """Changes a value in place, and says what."""
    every = list(places(content))
    holder, key = random.choice(every)
    if (numbers := [place for place in every if type(place[0][place[1]]) in (int, float)]) and random.random() < 0.3:
        holder, key = random.choice(numbers)
        holder[key] = random.choice((holder[key] + 1, -holder[key], holder[key] * 2, holder[key] * 2**20, float(holder[key]), 0, 10**6, 2**52))
        return f"another number at {key}"
    kind, was = random.choice(("value", "same type", "same type", "removed", "added", "renamed", "doubled", "moved")), str(key)[:40]
    if kind == "same type":
        holder[key] = random.choice([value for value in VALUES if type(value) is type(holder[key]) and not is_literal(value)])
        return f"value of the {kind} at {was}"
    if kind == "removed":
        del holder[key]
    elif kind == "added" and isinstance(holder, dict):
        holder[random.choice(("more", "", "a.b", "\ud800", "x" * 5000, "__metadata__", "__class__", "from_"))] = random.choice(VALUES)
    elif kind == "renamed" and isinstance(holder, dict):
        holder[random.choice(("../x", "other", "b" * 300, "\n"))] = holder.pop(key)
    elif kind == "doubled" and isinstance(holder, list):
        holder += holder[:1] * random.choice((1, 2, 3000))
    elif kind == "moved":
        holder[key] = json.loads(json.dumps(random.choice([other[inner] for other, inner in places(content)])))
    else:
        kind, holder[key] = "value", random.choice(VALUES)
    return f"{kind} at {was}"


# ---------------------------------------------------------------------------------------------------------------- bundles


def _archive(random: Random, path: Path, name: str) -> str:
    data = sound()[name].read_bytes()
    whole, note = bent(random, data, random.choice((0, 0, len(data) - 1500, len(data) - 22)))
    path.write_bytes(whole)
    return note


def _names(random: Random, path: Path, name: str) -> str:
    old, new = (
        random.choice(list(members(name))),
        random.choice(("../x.onnx", "/etc/passwd", "graphs/../../x", "x" * 60_000, "", "a\0b", "é", "weights.bin")),
    )
    parts = [(new if key == old else key, data) for key, data in members(name).items()]
    if random.random() < 0.3:
        parts.append((old, members(name)[old]))
    path.write_bytes(packed(sealed(dict(parts))))
    return f"{old} as {new[:20]!r}"


def _other_place(random: Random, path: Path, given: Path) -> str:
    """Something else than a file where there should be one."""
    kind = random.choice(("pipe", "folder", "loop", "zeros", "dangling", "link", "sparse", "sparse end", "empty", "socket"))
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "socket":
        import socket

        with suppress(OSError), socket.socket(socket.AF_UNIX) as made:
            made.bind(str(path))
    elif kind in ("sparse", "sparse end"):
        data = given.read_bytes()
        with open(path, "wb") as file:
            file.write(data if kind == "sparse" else b"")
            file.truncate(2**33)
            file.seek(0, os.SEEK_END)
            file.write(data[-3000:] if kind == "sparse end" else b"")
    elif kind == "empty":
        path.write_bytes(b"")
    else:
        path.symlink_to({"loop": path, "zeros": Path("/dev/zero"), "dangling": path.with_name("gone"), "link": given}[kind])
    return kind


def _bundle_place(random: Random, path: Path, name: str) -> str:
    return _other_place(random, path, sound()[name])


def _manifest(random: Random, path: Path, name: str) -> str:
    parts = members(name)
    content = json.loads(parts["manifest.json"])
    note = ", ".join(altered(random, content) for _ in range(random.choice((1, 1, 1, 2, 3))))
    path.write_bytes(packed({**parts, "manifest.json": text_of(content)}))
    return note


def _crowd(random: Random, path: Path, name: str) -> str:
    """Far more of something than any model has."""
    parts, count = members(name), random.choice((3000, 20_000, 60_000))
    content = json.loads(parts["manifest.json"])
    graph, row = content["graphs"]["predict.b1"], {"name": "s", "shape": [1], "kind": "memory"}
    names = [f"n{index}" for index in range(count)]
    kind = random.choice(
        ("graphs", "state", "layers", "batches", "hyper", "defaults", "partition", "members", "lists", "mappings", "pairs", "text", "depth")
    )
    if kind == "graphs":
        content["graphs"] |= {f"adapt-sums.b{size}": {**graph, "role": "adapt-sums", "batch": size} for size in range(1, count // 3)}
    elif kind == "state":
        content["state"] += [{**row, "name": text} for text in names]
    elif kind == "layers":
        content["statistics"] = {"mode": "live", "layers": names}
        layers = {text: {"mixed": 0, "alike": 0} for text in reversed(names)}
        content["reference"] = {"window": 64, "classes": 3.0, "entropy": 0.1, "layers": layers}
    elif kind == "batches":
        content["batches"] = list(range(1, count))
    elif kind in ("hyper", "defaults"):
        content["hyper"] |= {text: {"default": 0, "low": 0, "high": 0, "help": ""} for text in names}
        graph |= {"hyper": names, "defaults": dict.fromkeys(reversed(names), 0)} if kind == "defaults" else {}
    elif kind == "partition":
        content["partition"] = content["partition"][:1] * count
    elif kind == "members":
        content["members"] |= {f"graphs/{text}": {"sha256": "0" * 64, "size": 0} for text in names}
    else:
        filler: Any = {"lists": [[]] * (40 * count), "mappings": [{}] * (40 * count), "text": "\x7f" * (80 * count), "depth": _nested(90, "x")}.get(
            kind
        )
        content[random.choice(("warmup", "selfcheck"))] = {"x": filler if kind != "pairs" else {f"{index:x}": index for index in range(8 * count)}}
    path.write_bytes(packed({**parts, "manifest.json": text_of(content)}))
    return f"{count} {kind}"


def _text(random: Random, path: Path, name: str) -> str:
    parts = members(name)
    data, note = bent(random, parts["manifest.json"])
    if random.random() < 0.3:
        data, note = random.choice(
            ((b"\xef\xbb\xbf" + data, "a mark"), (data.replace(b"1", b"NaN", 1), "NaN"), (b"[" * 10**6, "deep"), (data + b"{}", "two"))
        )
    path.write_bytes(packed({**parts, "manifest.json": data}))
    return note


def _members(random: Random, path: Path, name: str) -> str:
    """Any bytes changed in a member, in half of the cases with checksums that know of it."""
    parts, member = members(name), random.choice([key for key in members(name) if key != "manifest.json"])
    data, note = bent(random, parts[member])
    parts = {**parts, member: data}
    again = random.random() < 0.5
    path.write_bytes(packed(sealed(parts) if again else parts))
    return f"{member}: {note}{', sealed' if again else ''}"


def _state(random: Random, path: Path, name: str) -> str:
    parts = members(name)
    data, note = _tensors(random, parts["state.safetensors"])
    parts = {**parts, "state.safetensors": data}
    again = random.random() < 0.8
    path.write_bytes(packed(sealed(parts) if again else parts))
    return note


def _graph(random: Random, path: Path, name: str) -> str:
    parts, graphs = dict(members(name)), [key for key in members(name) if key.endswith(".onnx")]
    notes = []
    first = random.choice(("graphs/predict.b1.onnx", "graphs/predict.b1.onnx", random.choice(graphs)))
    others = [key for key in graphs if key != first]
    for member in (first, *random.sample(others, random.choice((0, 0, 1)))):
        parts[member], note = mutated(random, parts[member])
        notes.append(f"{member}: {note}")
    again = random.random() < 0.9
    path.write_bytes(packed(sealed(parts) if again else parts))
    return "; ".join(notes)


# ---------------------------------------------------------------------------------------------------------------- tensors


def _opened(data: bytes) -> tuple[dict[str, Any], bytes]:
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def _closed(header: Any, payload: bytes) -> bytes:
    text = text_of(header)
    return len(text).to_bytes(8, "little") + text + payload


def _tensors(random: Random, data: bytes) -> tuple[bytes, str]:
    """A safetensors file whose header lies."""
    header, payload = _opened(data)
    names = [name for name in header if name != "__metadata__"]
    entry = header[random.choice(names)]
    kind = random.choice(("value", "shape", "offsets", "overlap", "gap", "type", "length", "values", "crowd", "metadata", "payload", "name"))
    if kind == "value":
        return _closed(header, payload), altered(random, header)
    if kind == "shape":
        entry["shape"] = random.choice(
            ([2**62, 4], [2**40], [-1], [0, 2**60], [1] * 70, [1] * 10**5, [1.0], [True], [], None, [entry["data_offsets"][1]])
        )
    elif kind == "offsets":
        entry["data_offsets"] = random.choice(
            ([0, 2**63], [-8, 8], [8, 0], [2**62, 2**62 + 8], [0], [0, 0, 0], [0.0, 8.0], "ab", [[], []], [0, 10**30])
        )
    elif kind in ("overlap", "gap"):
        step = random.choice((1, 4, 8)) * (1 if kind == "gap" else -1)
        entry["data_offsets"] = [place + step for place in entry["data_offsets"]]
    elif kind == "type":
        entry["dtype"] = random.choice(("F64", "BF16", "F16", "I64", "U8", "BOOL", "F8_E4M3", "O", "f32", "", 3, None, [], {}, "x" * 9000))
    elif kind == "length":
        size = random.choice((2**63, 2**64 - 1, 2**32, 0, 1, 7, len(data), 16 * 2**20, 16 * 2**20 + 1))
        return size.to_bytes(8, "little") + data[8:], f"{kind} {size}"
    elif kind == "values":
        pieces = np.frombuffer(payload[: len(payload) // 4 * 4], "<f4").copy()
        pieces[random.randrange(len(pieces))] = random.choice((np.nan, np.inf, -np.inf, 3e38, 1e-45))
        payload = pieces.tobytes() + payload[len(payload) // 4 * 4 :]
    elif kind == "crowd":
        header |= {f"t{index}": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for index in range(random.choice((200, 20_000, 120_000)))}
    elif kind == "metadata":
        header["__metadata__"] = random.choice(({"a": 1}, {"a": "\ud800"}, [], None, {"a" * 10**6: ""}, dict.fromkeys(map(str, range(90_000)), "")))
    elif kind == "payload":
        payload = random.choice((payload[:-1], payload + b"\0", b"", payload * 2))
    else:
        header[random.choice(("../x", "\ud800", "", "a" * 10**5, "__metadata__ ", " "))] = header.pop(random.choice(names))
    return _closed(header, payload), kind


# ---------------------------------------------------------------------------------------------------------------- saved states

HEADER = {
    "counters": (
        '{"frames": 1e999}',
        '{"frames": NaN}',
        "[" * 9000,
        "[]",
        '{"frames": "9"}',
        "{}",
        '{"frames": null}',
        '{"frames": [1]}',
        "",
        '{"\\ud800": 1}',
    ),
    "hyper": (
        '{"rate": NaN}',
        '{"rate": 1e999}',
        '{"rate": 1' + "0" * 400 + "}",
        "[" * 9000,
        "3",
        '{"rate": "x"}',
        '{"unheard": 1}',
        '{"rate": [1]}',
    ),
    "generation": ("-1", "9" * 5000, "9" * 4000, "1e9", "", "٣", " 7 ", "1_0", "nan"),
    "kept": (
        "{}",
        "[" * 9000,
        '{"proven": true, "wholly": 1}',
        '{"proven": false, "wholly": true, "start": true}',
        "null",
        '{"proven": NaN}',
        "\ud800",
    ),
    "format": ("2", "", "1.0", "x" * 9000),
    "model": ("", "x" * 10**5, "\ud800", "\x1b[2J"),
    "weights_sha256": ("", "0" * 64, "x" * 10**5),
    "compatible": ("", "0" * 64, "x" * 10**5),
    "more": ("1",),
}


def _saved_file(random: Random, data: bytes) -> tuple[bytes, str]:
    """A saved state that lies, mostly with a checksum that knows of it."""
    kind = random.choice(("bytes", "tensors", "header", "header", "header", "missing", "tensor", "tensor"))
    if kind == "bytes":
        return bent(random, data)
    if kind == "tensors":
        return _tensors(random, data)
    values, header = tensors.decode(data)
    values, header = dict(values), dict(header)
    note = kind
    if kind == "header":
        key = random.choice(list(HEADER))
        header[key] = random.choice(HEADER[key])
        note = f"{key} {header[key][:40]!r}"
    elif kind == "missing":
        key = random.choice([*HEADER, *values])
        header.pop(key, None)
        values.pop(key, None)
        note = f"no {key}"
    else:
        name = random.choice(list(values))
        old = values.pop(name)
        way = random.choice(("nan", "shape", "type", "name", "twice"))
        changed = {"nan": np.full_like(old, np.nan), "shape": np.zeros((*old.shape, 2), np.float32), "type": old.astype(np.float16)}.get(way, old)
        values[random.choice(("x", "start x", "a b c", "laid_by norm.gamma")) if way == "name" else name] = changed
        values |= {f"start {name}": old, f"laid_by {name}": old} if way == "twice" else {}
        note = f"{way} of {name}"
    if "generation" in header and random.random() < 0.5 and kind != "header":
        header["generation"] = "99"  # newer than what is recorded: it is taken for one that was being committed
    header.pop("sha256", None)
    with suppress(UnicodeEncodeError):
        header["sha256"] = checkpoint._checksum(header, values)
        return tensors.encode(values, header), note
    return _closed({**_opened(data)[0], "__metadata__": header}, _opened(data)[1]), note


def _rewrite(random: Random, path: Path, data: bytes) -> str:
    """Makes a saved state of another: one that lies, or one with a tensor that is far larger than any of the bundle's."""
    if random.random() > 0.1:
        data, note = _saved_file(random, data)
        path.write_bytes(data)
        return note
    header, payload = _opened(data)
    name, size = random.choice(("start norm.gamma", "more", "laid_by gamma.m")), random.choice((2**28, 2**36))
    header[name] = {"dtype": "F32", "shape": [size // 4], "data_offsets": [len(payload), len(payload) + size]}
    path.write_bytes(_closed(header, payload))
    os.truncate(path, path.stat().st_size + size)
    return f"{name} of {size}"


def _saved(random: Random, path: Path, name: str) -> str:
    return _rewrite(random, path, sound()["saved"].read_bytes())


def _saved_place(random: Random, path: Path, name: str) -> str:
    return _other_place(random, path, sound()["saved"])


def _slots(folder: Path) -> list[Path]:
    return sorted((folder / "slots").glob("*/*.safetensors"))


def _slot(random: Random, path: Path, name: str) -> str:
    shutil.copytree(sound()["state"], path)
    notes = []
    for slot in random.sample(_slots(path), random.choice((1, 1, 2))):
        notes.append(f"{slot.name}: {_rewrite(random, slot, slot.read_bytes())}")
    if random.random() < 0.5 and all(slot.stat().st_size < 2**26 for slot in _slots(path)):
        _rerecorded(path)
    return "; ".join(notes)


def _rerecorded(folder: Path) -> None:
    """Has the record name the slots' contents as they are."""
    for copy in pointer.COPIES:
        found = pointer.decode((folder / copy).read_bytes(), copy)
        states = dict(found.states)
        for key, value in states.items():
            changed = {}
            for which in ("active", "last_good"):
                if (mark := getattr(value, which)) is not None:
                    with suppress(Exception):
                        digest = tensors.read(folder / "slots" / key[:16] / f"{mark.slot}.safetensors")[1]["sha256"]
                        if re.fullmatch("[0-9a-f]{64}", digest):  # else the record itself would be damaged
                            changed[which] = replace(mark, sha256=digest)
            states[key] = replace(value, **changed)
        with suppress(UnicodeEncodeError):
            (folder / copy).write_bytes(pointer.encode(replace(found, states=states)))


def _record(random: Random, path: Path, name: str) -> str:
    shutil.copytree(sound()["state"], path)
    notes = []
    for copy in random.sample(pointer.COPIES, random.choice((1, 2, 2))):
        data = (path / copy).read_bytes()
        kind = random.choice(("bytes", "value", "value", "value", "place", "bundle"))
        if kind == "bytes":
            data, note = bent(random, data)
        elif kind == "value":
            content = json.loads(data)
            note = altered(random, content)
            if isinstance(content, dict):
                content.pop("sha256", None)
                with suppress(RecursionError, ValueError):
                    content["sha256"] = pointer._checksum(json.loads(text_of(content)))
            data = text_of(content)
        elif kind == "bundle":
            bundle = next(path.glob("bundles/*/*.edgeadapt"))
            bundle.unlink()
            return f"bundle: {_other_place(random, bundle, sound()['plain'])}"
        else:
            (path / copy).unlink()
            notes.append(_other_place(random, path / copy, sound()["state"] / copy))
            continue
        (path / copy).write_bytes(data)
        notes.append(f"{copy}: {note}")
    return "; ".join(notes)


def _beside(random: Random, path: Path, name: str) -> str:
    """What nothing depends on, and what is missing."""
    shutil.copytree(sound()["state"], path)
    kind = random.choice(("history", "history", "slot", "temporary", "slots"))
    slot = random.choice(_slots(path))
    if kind == "history":
        history = path / "history.jsonl"
        data, note = bent(random, history.read_bytes())
        history.write_bytes(random.choice((data, data, text_of(random.choice(VALUES)) + b"\n", b"[" * 10**6)))
        return f"history: {note}"
    if kind == "slot":
        slot.unlink()
        return f"{slot.name}: {_other_place(random, slot, sound()['saved'])}"
    if kind == "temporary":
        (slot.parent / f".{slot.name}.0123.tmp").mkdir()
        (path / ".pointer.a.0123.tmp").symlink_to("/etc/passwd")
    else:
        shutil.rmtree(path / "slots")
        (path / "slots").write_bytes(b"") if random.random() < 0.5 else (path / "slots").symlink_to("/")
    return kind


KINDS: dict[str, tuple[str, Callable[[Random, Path, str], str], float]] = {
    "archive": ("bundle", _archive, 2),
    "names": ("bundle", _names, 0.5),
    "place": ("bundle", _bundle_place, 0.5),
    "manifest": ("bundle", _manifest, 3),
    "manifest text": ("bundle", _text, 1),
    "crowd": ("bundle", _crowd, 0.3),
    "members": ("bundle", _members, 2),
    "tensors": ("bundle", _state, 1.5),
    "graph": ("bundle", _graph, 7),
    "saved": ("saved", _saved, 2),
    "saved place": ("saved", _saved_place, 0.3),
    "slot": ("folder", _slot, 2),
    "record": ("folder", _record, 2),
    "beside": ("folder", _beside, 1),
}
"""What is made: for which task, how, and how often beside the others."""
STARTS = ("slot", "beside")
"""Where what is damaged is passed over, and a start follows whatever was done."""


def make(kind: str, number: int, folder: Path) -> Made:
    """One of them, in an empty folder."""
    random = Random(f"{kind} {number}")
    what, maker, _ = KINDS[kind]
    name = random.choice(("plain", "plain", "pieces", "small", "maps"))
    path = folder / "x.edgeadapt"
    note = maker(random, path, name)
    task = {"what": what, "path": str(path), "budget": random.random() < 0.5, "sound": str(sound()["plain"])}
    task["serves"] = kind != "graph" or task["budget"]  # without one nothing bounds what a graph may do
    return Made(kind, number, task, f"{name if what == 'bundle' else what}: {note}")


# ---------------------------------------------------------------------------------------------------------------- opening them


class Worker:
    """A process that opens what it is told to, started anew after it has died, and now and then."""

    def __init__(self, each: int = 400, patience: float = PATIENCE) -> None:
        self._each, self._patience, self._count = each, patience, 0
        self._process: subprocess.Popen[bytes] | None = None
        self._said = Path()

    def open(self, made: Made) -> Outcome:
        """What became of it."""
        if self._process is None or self._count >= self._each:
            self.close()
            self._start()
        assert self._process is not None
        self._count += 1
        try:
            found = self._asked(made.task)
        except (OSError, EOFError):
            return self._dead("died")
        return found if found is not None else self._dead("hangs")

    def close(self) -> None:
        """Ends the process."""
        if self._process is not None:
            assert self._process.stdin is not None
            assert self._process.stdout is not None
            with suppress(OSError):
                self._process.stdin.close()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(10)
            self._process.kill()
            self._process.wait()
            self._process.stdout.close()
            self._process = None

    def _start(self) -> None:
        command = [sys.executable, "-m", "tests.fuzz_worker"]
        pipe, self._said = subprocess.PIPE, _scratch() / "said"
        with self._said.open("wb") as said:
            self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=said, cwd=ROOT, env=environment(), bufsize=0)
        self._count = 0
        for budget in (False, True):  # what the first time takes is no example's
            self._asked({"what": "bundle", "path": str(sound()["plain"]), "budget": budget, "serves": True})

    def _asked(self, task: dict[str, Any]) -> Outcome | None:
        assert self._process is not None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(task).encode() + b"\n")
        line = b""
        while not line.endswith(b"\n"):
            if not select.select([self._process.stdout], [], [], self._patience)[0]:
                return None
            if not (piece := os.read(self._process.stdout.fileno(), 65_536)):
                raise EOFError
            line += piece
        found: Outcome = json.loads(line)
        return found

    def _dead(self, how: str) -> Outcome:
        assert self._process is not None
        if how == "hangs":
            self._process.send_signal(signal.SIGABRT)  # it says where it stood
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(5)
            self._process.kill()
        code = self._process.wait()
        told = self._said.read_bytes()[-3000:].decode(errors="replace")
        self.close()
        nothing = {"stage": "", "said": "", "peak": 0, "grown": 0, "read": 0}
        return {**nothing, "ended": how, "fault": f"{how}, {code}: {told}", "seconds": self._patience * (how == "hangs")}


def complaint(made: Made, outcome: Outcome) -> str:
    """What must not have become of it; "" where all is well."""
    fault = outcome["fault"]
    if not fault and outcome["read"] > READING:
        fault = f"reading took {outcome['read']} bytes"
    if not fault and made.task["budget"] and outcome["peak"] > BUDGET + OVER:
        fault = f"{outcome['peak']} bytes, within a budget of {BUDGET}"
    if not fault and made.kind in STARTS and outcome["stage"].startswith("start") and outcome["ended"] != "opened":
        fault = f"no start: {outcome['ended']}"
    where = f"python benchmarks/bundle_fuzz.py --kind {made.kind!r} --number {made.number}"
    return f"{made.kind} {made.number} ({made.note[:300]}): {fault}\n  again: {where}" if fault else ""
