"""A bundle: one file that holds a model compiled for adaptation, written whole and checked before anything in it is used."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple
from zlib import crc32

from numpy.typing import NDArray

from edgeadapt import plainfile
from edgeadapt.bundle import atomic, onnxwire, storedzip, tensors
from edgeadapt.bundle.digest import sha256
from edgeadapt.bundle.graphspec import GraphSpec
from edgeadapt.bundle.manifest import STATE, WEIGHTS, Manifest, Member
from edgeadapt.bundle.roles import GRAPH
from edgeadapt.bundle.weights import WEIGHTS_OFFSET, WeightsFile, check_external, relocate, windows
from edgeadapt.errors import BundleError

MANIFEST = "manifest.json"
_NAMES = re.compile(rf"manifest\.json|weights\.bin|state\.safetensors|graphs/({GRAPH})\.onnx")
_LIMITS = {MANIFEST: 16 * 2**20, WEIGHTS: 2**32 - 2**24, STATE: 2**30}
_GRAPH_LIMIT = 256 * 2**20
_CHUNK = 2**20


def write_bundle(
    path: str | os.PathLike[str], manifest: Manifest, weights: WeightsFile, graphs: Mapping[str, bytes], state: Mapping[str, NDArray[Any]]
) -> Manifest:
    """Writes a bundle; the file at `path` is the old one or the whole new one, never a part.

    Args:
        path: the file to make or replace.
        manifest: all but `members`, which is filled here; an empty `model.weights_sha256` becomes the hash of weights.bin.
        weights: the frozen tensors that the graphs point into.
        graphs: serialised ONNX models by the names in `manifest.graphs`.
        state: the initial state, one array for every entry of `manifest.state`, of its type.

    Returns:
        the manifest as written.

    Raises:
        BundleError: the parts contradict each other, or the file would not pass `Bundle.open`.
        OSError: the file cannot be written.
    """
    import zipfile  # here only: 1.1 MB that a device does not need

    if set(graphs) != set(manifest.graphs):
        raise BundleError(f"graphs {sorted(graphs)} were given, but the manifest names {sorted(manifest.graphs)}")
    parts: dict[str, list[bytes]] = {WEIGHTS: list(weights), STATE: [tensors.encode(state)]}
    parts |= {manifest.graphs[name].path: [data] for name, data in graphs.items()}
    members = {name: Member(_hash(pieces), sum(map(len, pieces))) for name, pieces in parts.items()}
    model = dataclasses.replace(manifest.model, weights_sha256=manifest.model.weights_sha256 or members[WEIGHTS].sha256)
    manifest = dataclasses.replace(manifest, model=model, members=members)
    Manifest.from_json(manifest.to_json())
    parts[MANIFEST] = [manifest.to_bytes()]
    with atomic.replacing(path) as (file, temporary):
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=False) as archive:
            for name, pieces in parts.items():
                info = zipfile.ZipInfo(name)  # its date is fixed: equal parts give an equal file
                info.external_attr = 0o644 << 16
                info.file_size = sum(map(len, pieces))
                if name == WEIGHTS:
                    info.extra = _padding(WEIGHTS_OFFSET - 30 - len(name))
                with archive.open(info, "w") as member:
                    for piece in pieces:
                        member.write(piece)
        file.flush()
        Bundle.open(temporary)
    return manifest


def _padding(size: int) -> bytes:
    """An extra field of that many bytes; 0xD935 is the identifier zip tools use for alignment."""
    return (0xD935).to_bytes(2, "little") + (size - 4).to_bytes(2, "little") + (WEIGHTS_OFFSET).to_bytes(2, "little") + bytes(size - 6)


def _hash(pieces: list[bytes]) -> str:
    digest = sha256()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


class Graph(NamedTuple):
    """A graph as onnxruntime may load it: a serialised ModelProto, and where its frozen tensors lie in the bundle's file."""

    data: bytes
    external: tuple[onnxwire.External, ...]


class Bundle:
    """An opened bundle. It holds no open file; if the file is replaced on disk, later reads are refused rather than mixed.

    Attributes:
        path: the file, symbolic links resolved.
        manifest: what the bundle says about itself, checked.
        digest: SHA-256 of the manifest's bytes in hex; as the manifest holds the hashes of all other members, it names the bundle.
    """

    path: Path
    manifest: Manifest
    digest: str

    def __init__(self, path: Path, identity: tuple[int, ...], places: dict[str, storedzip.Place], manifest: Manifest, digest: str) -> None:
        self.path = path
        self.manifest = manifest
        self.digest = digest
        self._identity = identity
        self._places = places
        self._windows: dict[str, int] = {}
        self._operators: dict[str, frozenset[str]] = {}

    @classmethod
    def open(cls, path: str | os.PathLike[str], verify: bool = True) -> Bundle:
        """Opens a bundle.

        Args:
            path: the file.
            verify: also read every member once and check it: hashes, graphs, initial state. Otherwise graphs and state are checked when
                they are read, and the frozen weights are not. Weights are read in pieces: resident memory does not grow by their size.

        Raises:
            BundleError: the file is missing, truncated, damaged, edited, or made by a newer edgeadapt.
        """
        real = Path(os.path.realpath(path))
        with _opened(real) as file:
            identity = _identity(file)
            places = storedzip.places(file, str(path))
            for name, place in places.items():
                _check_member(name, place, path)
            if MANIFEST not in places:
                raise BundleError(f"{path} has no {MANIFEST}", "this zip file is no bundle; export one")
            data = _read(file, places[MANIFEST])
            if crc32(data) != places[MANIFEST].crc:
                raise BundleError(f"{path}: {MANIFEST} is damaged (its checksum differs)", "copy or export the bundle again")
        bundle = cls(real, identity, places, Manifest.from_bytes(data, f"{path}: {MANIFEST}"), sha256(data).hexdigest())
        bundle._check_places()
        if verify:
            bundle.verify()
        return bundle

    def verify(self) -> None:
        """Reads every member and checks it against the manifest.

        Raises:
            BundleError: one differs; the message names it.
        """
        with self._file() as file:
            self._compare(WEIGHTS, *_digest(file, self._places[WEIGHTS]))
            self._stored_state(file)
        for name in self.manifest.graphs:
            self._graph(name)

    def graph(self, name: str) -> Graph:
        """A graph, its external data pointing at this file by its name; load it with `folder` as the folder of external data.

        Raises:
            BundleError: there is no such graph, or it is damaged.
        """
        data, facts = self._graph(name)
        return Graph(relocate(data, facts, self.path.name), facts.external)

    def graph_bytes(self, name: str) -> bytes:
        """`graph(name).data`."""
        return self.graph(name).data

    def windows(self, name: str) -> int:
        """Which windows of this file a graph's frozen tensors lie in, as `weights.windows` says; known without reading once the graph was checked.

        Raises:
            BundleError: there is no such graph, or it is damaged.
        """
        if name not in self._windows:
            self._graph(name)
        return self._windows[name]

    def operators(self, name: str) -> frozenset[str]:
        """The operators that a graph uses; known without reading once the graph was checked.

        Raises:
            BundleError: there is no such graph, or it is damaged.
        """
        if name not in self._operators:
            self._graph(name)
        return self._operators[name]

    def mapped(self) -> memoryview:
        """The whole file, mapped read-only: `External.offset` counts from its start. Pages become resident when they are touched.

        Raises:
            BundleError: the file was replaced since it was opened.
        """
        import mmap

        with self._file() as file:
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))

    def initial_state(self) -> dict[str, NDArray[Any]]:
        """The state tensors at the start, in the manifest's order: read-only arrays of the manifest's types.

        Raises:
            BundleError: they are damaged or not what the manifest says.
        """
        with self.stored_state() as found:
            return {spec.name: found[spec.name] for spec in self.manifest.state}

    @contextmanager
    def stored_state(self) -> Iterator[Mapping[str, NDArray[Any]]]:
        """As `initial_state`, but each tensor is read from the file when it is asked for; all of it was checked before.

        Raises:
            BundleError: as `initial_state`; reading a tensor raises it too where the file cannot be read any more.
        """
        with self._file() as file:
            yield self._stored_state(file)

    def _stored_state(self, file: BufferedReader) -> Mapping[str, NDArray[Any]]:
        """The state in the open file, checked."""
        place, where = self._places[STATE], f"{self.path}: {STATE}"
        self._compare(STATE, *_digest(file, place))
        found = tensors.Stored(file, where, BundleError, place.offset, place.size)
        if set(found) != {spec.name for spec in self.manifest.state}:
            odd = sorted(set(found) ^ {spec.name for spec in self.manifest.state})
            raise BundleError(f"{where}: its tensors are not those of the manifest (first difference: {odd[0][:80]!r})", "export the bundle again")
        for spec in self.manifest.state:
            dtype, shape = found.form(spec.name)
            if dtype != spec.dtype or shape != spec.shape:
                raise BundleError(
                    f"{where}: {spec.name!r} is {dtype} {list(shape)}, but the manifest says {spec.dtype} {list(spec.shape)}",
                    "export the bundle again",
                )
            array = found[spec.name]
            if not tensors.finite(array):
                raise BundleError(f"{where}: {spec.name!r} holds NaN or infinite values", "export the bundle again")
            del array  # before the next is read
        return found

    @property
    def folder(self) -> str:
        """The folder that graphs' external data is relative to."""
        return str(self.path.parent)

    @property
    def weights_size(self) -> int:
        """Bytes of frozen weights."""
        return self._places[WEIGHTS].size

    def _graph(self, name: str) -> tuple[bytes, onnxwire.Facts]:
        spec: GraphSpec | None = self.manifest.graphs.get(name)
        if spec is None:
            raise BundleError(f"{self.path} has no graph {name!r}; it has {', '.join(self.manifest.graphs)}", "export it with that batch size")
        data = self._member(spec.path)
        facts = onnxwire.scan(data, f"{self.path}: {spec.path}")
        check_external(facts, self.weights_size, f"{self.path}: {spec.path}")
        self._windows[name], self._operators[name] = windows(facts.external), facts.operators
        return data, facts

    def _member(self, name: str) -> bytes:
        with self._file() as file:
            data = _read(file, self._places[name])
        self._compare(name, sha256(data).hexdigest(), len(data))
        return data

    def _compare(self, name: str, digest: str, size: int) -> None:
        expected = self.manifest.members[name]
        if (digest, size) != (expected.sha256, expected.size):
            raise BundleError(f"{self.path}: {name} is damaged (its checksum differs from the manifest's)", "copy or export the bundle again")

    def _check_places(self) -> None:
        """The members present are those the manifest lists, in size too, and the weights lie where graphs expect them."""
        expected = {WEIGHTS, STATE, *(graph.path for graph in self.manifest.graphs.values())}
        listed, present = set(self.manifest.members), set(self._places) - {MANIFEST}
        for names, fault in ((expected - present, "is missing"), (present - expected, "does not belong there"), (expected ^ listed, "is not listed")):
            if names:
                raise BundleError(f"{self.path}: member {sorted(names)[0]} {fault}", "copy or export the bundle again")
        for name in sorted(present):
            if self._places[name].size != self.manifest.members[name].size:
                raise BundleError(
                    f"{self.path}: {name} has {self._places[name].size} bytes, but the manifest says {self.manifest.members[name].size}",
                    "copy or export the bundle again",
                )
        if self._places[WEIGHTS].offset != WEIGHTS_OFFSET:
            raise BundleError(
                f"{self.path}: {WEIGHTS} begins at byte {self._places[WEIGHTS].offset}, not at {WEIGHTS_OFFSET}",
                "export the bundle again; a bundle cannot be repacked with a zip tool",
            )

    def _file(self) -> BufferedReader:
        file = _opened(self.path)
        if _identity(file) != self._identity:
            file.close()
            raise BundleError(f"{self.path} was replaced since it was opened", "open the new bundle in a new process")
        return file


def _opened(path: Path) -> BufferedReader:
    try:
        return plainfile.opened(path)
    except plainfile.NotAFileError:
        raise BundleError(f"{path} is not a file", "give the path of an .edgeadapt file") from None
    except OSError as reason:
        raise BundleError(f"{path} cannot be opened: {reason.strerror}", "check the path and its permissions") from None


def _identity(file: BinaryIO) -> tuple[int, ...]:
    found = os.fstat(file.fileno())
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _digest(file: BufferedReader, place: storedzip.Place) -> tuple[str, int]:
    """SHA-256 of a member, in hex, and how many bytes of it there are; read in pieces."""
    digest = sha256()
    file.seek(place.offset)
    buffer, left = memoryview(bytearray(_CHUNK)), place.size
    while left and (count := file.readinto(buffer[: min(left, _CHUNK)])):
        digest.update(buffer[:count])
        left -= count
    return digest.hexdigest(), place.size - left


def _read(file: BinaryIO, place: storedzip.Place) -> bytes:
    file.seek(place.offset)
    return file.read(place.size)


def _check_member(name: str, place: storedzip.Place, path: str | os.PathLike[str]) -> None:
    if not _NAMES.fullmatch(name):
        raise BundleError(f"{path}: member {name[:120]!r} does not belong in a bundle", "copy or export the bundle again")
    limit = _LIMITS.get(name, _GRAPH_LIMIT)
    if place.size > limit:
        raise BundleError(f"{path}: {name} has {place.size} bytes; at most {limit} are allowed", "copy or export the bundle again")
