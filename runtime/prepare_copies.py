"""Copies of 8-bit weights in the layout that this processor's kernels want, kept in the file of a prepared graph's own weights.

onnxruntime makes such copies whenever it loads a graph, in memory of each session. It can write them down instead, and maps what it wrote: clean
pages of a file, which go back to the system when another graph runs. It finds them by the operator and by a hash of the copy, so a graph that
does not find its own still makes it. Kernels that write bytes themselves keep theirs in memory whatever is asked for.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import onnxruntime

from edgeadapt.bundle import Bundle
from edgeadapt.bundle.digest import sha256
from edgeadapt.bundle.onnxwire import COPY
from edgeadapt.memory import quantised, read
from edgeadapt.memory.graph import OWN
from edgeadapt.runtime import region
from edgeadapt.runtime import session as sessions
from edgeadapt.runtime.prepared import BUNDLE, PreparedGraph, map_own

SMALL = 65536  # bytes: scales, zero points and sums, on whether which are constant it depends what copies are made
PAGE = 4096  # copies begin at one, so that no page belongs to two of them


def keep(bundle: Bundle, prepared: PreparedGraph, threads: int) -> PreparedGraph:
    """Writes the copies that loading a prepared graph makes into the weights file beside it, and tells the graph of them.

    Args:
        bundle: the bundle.
        prepared: the graph, in a folder of its own.
        threads: of one operator.

    Returns:
        what loads it now; the same where nothing can be kept.

    Raises:
        EdgeAdaptError: onnxruntime cannot load it.
        OSError: the folder cannot be written.
    """
    gone = quantised.released(read(prepared.model.read_bytes()))
    if not gone:
        return prepared
    folder = Path(prepared.folder)
    saved, raw = folder / "copies.onnx", folder / "copies.weights"
    _save(bundle, prepared, gone, saved, raw, threads)
    written = {tensor.name: tensor for tensor in onnx.load(str(saved), load_external_data=False).graph.initializer if tensor.name in gone}
    model = onnx.load(str(prepared.model), load_external_data=False)
    with raw.open("rb") as source, (folder / OWN).open("ab") as file:
        for tensor in model.graph.initializer:
            if not tensor.external_data:  # small ones lie in the graph, where nothing can be said of copies: they are made when it is loaded
                continue
            for key, value in _copies(written.get(tensor.name)):
                tensor.external_data.add(key=key, value=moved(value, lambda offset, length: append(file, _piece(source, offset, length))))
        size = file.tell()
    saved.unlink()
    raw.unlink()
    data = model.SerializeToString()
    prepared.model.write_bytes(data)
    return replace(prepared, own_bytes=size, digest=sha256(data).hexdigest())


def stored(prepared: PreparedGraph) -> int:
    """Bytes of the file beside a prepared graph that do not stay resident: weights that are only copied, and their copies."""
    graph = read(prepared.model.read_bytes())
    gone = quantised.released(graph)
    found = [tensor for tensor in graph.external if tensor.location == OWN and tensor.name in gone]
    return sum(tensor.length + sum(length for _, length in tensor.copies) for tensor in found)


def _save(bundle: Bundle, prepared: PreparedGraph, gone: Collection[str], saved: Path, raw: Path, threads: int) -> None:
    with region.using(region.Region()):
        chosen = sessions.options(threads)
        settings = {
            "session.model_external_initializers_file_folder_path": prepared.folder,
            "session.optimized_model_external_initializers_file_name": raw.name,
            "session.optimized_model_external_initializers_min_size_in_bytes": "0",
            "session.save_external_prepacked_constant_initializers": "1",
        }
        for key, value in settings.items():
            chosen.add_session_config_entry(key, value)
        chosen.optimized_model_filepath = str(saved)
        try:
            onnxruntime.InferenceSession(_alone(bundle, prepared, gone), chosen, providers=["CPUExecutionProvider"])
        except Exception as reason:  # onnxruntime's own types have no common base of theirs
            raise sessions.failure("copies of weights cannot be written", reason) from None


def _alone(bundle: Bundle, prepared: PreparedGraph, gone: Collection[str]) -> bytes:
    """The graph without the bundle, whose file onnxruntime cannot find: small tensors inside, large ones that are not copied as inputs."""
    model = onnx.load(str(prepared.model), load_external_data=False)
    files = {OWN: map_own(prepared), BUNDLE: bundle.mapped()}
    kept = []
    for tensor in model.graph.initializer:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        if entries and tensor.name not in gone:
            offset, length = int(entries["offset"]), int(entries["length"])
            if length > SMALL:
                model.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
                continue
            tensor.ClearField("external_data")
            tensor.ClearField("data_location")
            tensor.raw_data = bytes(files[entries["location"]][offset : offset + length])
        kept.append(onnx.TensorProto.FromString(tensor.SerializeToString()))
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    data: bytes = model.SerializeToString()
    return data


def _copies(tensor: Any) -> list[tuple[str, str]]:
    return [] if tensor is None else [(entry.key, entry.value) for entry in tensor.external_data if entry.key.startswith(COPY)]


def moved(value: str, place: Any) -> str:
    """What says where copies lie, with other places: "OPERATOR+HASH|offset;length;padding|..."; `place(offset, length)` gives the new offset."""
    key, *parts = value.split("|")
    found = []
    for part in parts:
        offset, length, padding = map(int, part.split(";"))
        found.append(f"{place(offset, length) if length else 0};{length};{padding}")
    return "|".join([key, *found])


def _piece(file: Any, offset: int, length: int) -> bytes:
    file.seek(offset)
    data: bytes = file.read(length)
    return data


def append(file: Any, data: bytes | memoryview) -> int:
    """Writes a copy at the next page, and says where."""
    file.write(bytes(-file.tell() % PAGE))
    offset: int = file.tell()
    file.write(data)
    return offset
