"""The bundle's file: written whole, read strictly, and refused with a reason when anything about it is off."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some
from onnx import TensorProto, helper

from edgeadapt.bundle import PLACEHOLDER, WEIGHTS_OFFSET, Bundle, InputSpec, Manifest, WeightsFile, onnxwire, write_bundle
from edgeadapt.bundle.digest import sha256
from edgeadapt.bundle.reference import Chance, Reference
from edgeadapt.errors import BundleError
from tests.toybundle import Toy

pytestmark = pytest.mark.device


@pytest.fixture(scope="module")
def toy() -> Toy:
    return Toy()


@pytest.fixture(scope="module")
def path(toy, tmp_path_factory) -> Path:
    return toy.write(tmp_path_factory.mktemp("bundle") / "toy.edgeadapt")


def members(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def packed(path: Path, parts: dict[str, bytes], align: bool = True, **options: Any) -> Path:
    """A zip file of those members, in that order, its first at the weights' offset."""
    with zipfile.ZipFile(path, "w", **options) as archive:
        for index, (name, data) in enumerate(parts.items()):
            info = zipfile.ZipInfo(name)
            info.compress_type = options.get("compression", zipfile.ZIP_STORED)
            if index == 0 and align:
                size = WEIGHTS_OFFSET - 30 - len(name)
                info.extra = struct.pack("<HH", 0xD935, size - 4) + bytes(size - 4)
            archive.writestr(info, data)
    return path


def sealed(parts: dict[str, bytes], change: Any = None) -> dict[str, bytes]:
    """The members with a manifest whose checksums are right, changed before by `change`."""
    content = json.loads(parts["manifest.json"])
    names = [name for name in parts if name != "manifest.json"]
    content["members"] = {name: {"sha256": sha256(parts[name]).hexdigest(), "size": len(parts[name])} for name in names}
    if change is not None:
        change(content)
    return {**parts, "manifest.json": json.dumps(content).encode()}


def refusal(path: Path, **options: Any) -> str:
    with pytest.raises(BundleError) as caught:
        Bundle.open(path, **options)
    assert caught.value.hint or "is not a sound bundle" in caught.value.message
    return str(caught.value)


# ------------------------------------------------------------------------------------------------ what is written and read


def test_what_is_written_is_read(toy, path):
    bundle = Bundle.open(path)
    manifest = bundle.manifest
    assert dataclasses.replace(manifest, members={}, model=toy.manifest().model) == toy.manifest()
    assert manifest.model.weights_sha256 == sha256(b"".join(toy.weights)).hexdigest()
    state = bundle.initial_state()
    assert list(state) == list(toy.state)
    assert all(np.array_equal(state[name], array) for name, array in toy.state.items())
    assert bundle.weights_size == len(toy.weights)
    for name, data in toy.graphs.items():
        assert len(bundle.graph_bytes(name)) == len(data)
        assert onnx.load_from_string(bundle.graph_bytes(name)).graph.node == onnx.load_from_string(data).graph.node


def test_zip_tools_read_it_and_nothing_is_compressed(path):
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}
        assert archive.namelist()[0] == "weights.bin"


def test_the_weights_lie_page_aligned_at_their_fixed_offset(toy, path):
    data = path.read_bytes()
    assert data[WEIGHTS_OFFSET : WEIGHTS_OFFSET + len(toy.weights)] == b"".join(toy.weights)
    view = Bundle.open(path).mapped()
    for name, (offset, nbytes) in toy.places.items():
        assert bytes(view[WEIGHTS_OFFSET + offset : WEIGHTS_OFFSET + offset + nbytes]) == toy.frozen[name].tobytes()


def test_equal_parts_give_an_equal_file(toy, path, tmp_path):
    assert toy.write(tmp_path / "other.edgeadapt").read_bytes() == path.read_bytes()


def test_the_digest_is_that_of_the_manifest(path):
    assert Bundle.open(path).digest == sha256(members(path)["manifest.json"]).hexdigest()


def test_a_bundle_without_frozen_weights(toy, tmp_path):
    source = Toy(batches=(1,), method="source")
    graphs = {name: without_external(data, source) for name, data in source.graphs.items()}
    write_bundle(tmp_path / "x", source.manifest(), WeightsFile(), graphs, source.state)
    bundle = Bundle.open(tmp_path / "x")
    assert bundle.weights_size == 0
    assert bundle.graph("predict.b1").external == ()


def without_external(data: bytes, toy: Toy) -> bytes:
    model = onnx.load_from_string(data)
    for tensor in model.graph.initializer:
        if tensor.external_data:
            tensor.CopyFrom(onnx.numpy_helper.from_array(toy.frozen[tensor.name], tensor.name))
    return model.SerializeToString()


def test_the_umask_decides_about_permissions(toy, tmp_path):
    for mask, mode in ((0o022, 0o644), (0o077, 0o600)):
        before = os.umask(mask)
        try:
            assert toy.write(tmp_path / f"{mask}").stat().st_mode & 0o777 == mode
        finally:
            os.umask(before)


def test_equal_weights_are_kept_once_and_aligned():
    weights = WeightsFile()
    first = weights.add(np.arange(5, dtype=np.float32))
    second = weights.add(np.arange(3, dtype=np.int8))
    assert (first, second) == ((0, 20), (64, 3))
    assert weights.add(np.arange(5, dtype=np.float32).reshape(5, 1)) == first
    assert weights.add(np.arange(5, dtype=">f4")) == first
    assert weights.add(np.arange(10, dtype=np.float32)[::2]) != first
    assert len(weights) == len(b"".join(weights)) == 128 + 20
    assert weights.sha256() == sha256(b"".join(weights)).hexdigest()


def test_a_renamed_bundle_points_at_its_new_name(toy, tmp_path):
    path = toy.write(tmp_path / "first.edgeadapt")
    for name in ("é" * 120, "x", "a" * 255):
        path = path.rename(tmp_path / name)
        bundle = Bundle.open(path)
        model = onnx.load_from_string(bundle.graph_bytes("predict.b1"))
        locations = {entry.value for tensor in model.graph.initializer for entry in tensor.external_data if entry.key == "location"}
        assert len(locations) == 1
        assert os.path.samefile(Path(bundle.folder, *locations), path)


def test_a_link_to_a_bundle_is_followed(path, tmp_path):
    (tmp_path / "link").symlink_to(path)
    assert Bundle.open(tmp_path / "link").path == path.resolve()


def test_a_replaced_file_is_refused_rather_than_mixed(toy, tmp_path):
    path = toy.write(tmp_path / "x.edgeadapt")
    bundle = Bundle.open(path)
    toy.write(path, producer="another")
    for use in (bundle.initial_state, bundle.mapped, bundle.verify, lambda: bundle.graph("predict.b1")):
        with pytest.raises(BundleError, match="replaced since it was opened"):
            use()


def test_a_failed_write_leaves_the_old_bundle_and_no_rubbish(toy, tmp_path, monkeypatch):
    path = toy.write(tmp_path / "x.edgeadapt")
    before = path.read_bytes()
    monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        toy.write(path, producer="another")
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda parts: parts["graphs"].pop("adapt.b4"), "the manifest names"),
        (lambda parts: parts["state"].pop("norm.mean"), "norm.mean"),
        (lambda parts: parts["state"].update({"norm.mean": np.zeros(9, np.float32)}), "norm.mean"),
        (lambda parts: parts["state"].update({"norm.mean": np.full(8, np.nan, np.float32)}), "NaN"),
        (lambda parts: parts["graphs"].update({"adapt.b4": b"nonsense"}), "adapt.b4"),
    ],
)
def test_parts_that_contradict_each_other_are_not_written(toy, tmp_path, change, reason):
    parts = {"graphs": dict(toy.graphs), "state": dict(toy.state)}
    change(parts)
    with pytest.raises(BundleError, match=reason):
        write_bundle(tmp_path / "x", toy.manifest(), toy.weights, parts["graphs"], parts["state"])
    assert list(tmp_path.iterdir()) == []


# --------------------------------------------------------------------------------------------------------- damaged files


def content(path: Path) -> tuple[Any, ...]:
    bundle = Bundle.open(path)
    weights = bytes(bundle.mapped()[WEIGHTS_OFFSET : WEIGHTS_OFFSET + bundle.weights_size])
    state = {name: array.tobytes() for name, array in bundle.initial_state().items()}
    return bundle.manifest, weights, state, {name: bundle._graph(name)[0] for name in bundle.manifest.graphs}


DAMAGED = settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])


@DAMAGED
@given(data=some.data())
def test_a_damaged_bundle_is_refused_or_holds_the_same(path, tmp_path, data):
    whole = bytearray(path.read_bytes())
    edges = [WEIGHTS_OFFSET, len(whole)]
    kind = data.draw(some.sampled_from(["flip", "flip near the end", "truncate", "cut out", "double", "insert"]))
    place = data.draw(some.integers(0, len(whole) - 1))
    if kind.startswith("flip"):
        place = data.draw(some.integers(len(whole) - 2000, len(whole) - 1)) if "end" in kind else place
        whole[place] ^= data.draw(some.integers(1, 255))
    elif kind == "truncate":
        del whole[place:]
    elif kind == "cut out":
        del whole[place : place + data.draw(some.integers(1, 5000))]
    elif kind == "double":
        whole[place:place] = whole[place : place + data.draw(some.integers(1, 5000))]
    else:
        whole[place:place] = data.draw(some.binary(min_size=1, max_size=40))
    damaged = tmp_path / "damaged"
    damaged.write_bytes(whole)
    try:
        found = content(damaged)
    except BundleError:
        return
    assert found == content(path), edges


def test_every_flipped_bit_of_the_structure_is_refused_or_harmless(path, tmp_path):
    whole = path.read_bytes()
    start = whole.rindex(b"PK\x05\x06")
    places = [
        *range(41),
        *range(start, len(whole)),
        *(match.start() + k for match in re.finditer(b"PK\x01\x02", whole) for k in (0, 6, 10, 16, 20, 24, 28, 42)),
    ]
    expected = content(path)
    refused = 0
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 0x41
        (tmp_path / "damaged").write_bytes(damaged)
        try:
            assert content(tmp_path / "damaged") == expected, place
        except BundleError:
            refused += 1
    assert refused > len(places) * 0.8


@pytest.mark.parametrize("name", ["weights.bin", "state.safetensors", "graphs/adapt.b4.onnx", "manifest.json"])
def test_a_flipped_byte_names_its_member(path, tmp_path, name):
    whole = bytearray(path.read_bytes())
    place = whole.index(members(path)[name]) + 40
    whole[place] ^= 1
    (tmp_path / "x").write_bytes(whole)
    assert name in refusal(tmp_path / "x")
    if name == "weights.bin":
        Bundle.open(tmp_path / "x", verify=False)  # the weights are the one thing it does not read


def test_without_verifying_a_damaged_graph_is_refused_when_it_is_read(path, tmp_path):
    whole = bytearray(path.read_bytes())
    whole[whole.index(members(path)["graphs/adapt.b4.onnx"]) + 40] ^= 1
    (tmp_path / "x").write_bytes(whole)
    bundle = Bundle.open(tmp_path / "x", verify=False)
    bundle.graph("predict.b1")
    with pytest.raises(BundleError, match=r"adapt\.b4.* is damaged"):
        bundle.graph("adapt.b4")


def test_no_graph_of_that_name(path):
    with pytest.raises(BundleError, match=r"no graph 'adapt\.b3'"):
        Bundle.open(path).graph("adapt.b3")


NOT_A_BUNDLE = {
    "empty": (b"", "too few"),
    "text": (b"hello, world; this is no zip file at all", "not a zip file"),
    "cut short": (b"PK\x03\x04" + bytes(200), "truncated"),
    "empty zip": (b"PK\x05\x06" + bytes(18), "no manifest.json"),
}


@pytest.mark.parametrize("name", NOT_A_BUNDLE)
def test_other_files_are_refused(tmp_path, name):
    data, reason = NOT_A_BUNDLE[name]
    (tmp_path / "x").write_bytes(data)
    assert reason in refusal(tmp_path / "x")


def test_missing_files_folders_and_pipes_are_refused(tmp_path):
    assert "No such file" in refusal(tmp_path / "gone")
    assert "is not a file" in refusal(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    assert "is not a file" in refusal(tmp_path / "pipe")
    assert "is not a file" in refusal(Path("/dev/zero"))


def test_repacked_bundles_are_refused(path, tmp_path):
    parts = members(path)
    assert "begins at byte 41, not at 4096" in refusal(packed(tmp_path / "x", parts, align=False))
    assert "is compressed" in refusal(packed(tmp_path / "x", parts, compression=zipfile.ZIP_DEFLATED))
    late = {name: parts[name] for name in reversed(parts)}
    assert "weights.bin begins at byte" in refusal(packed(tmp_path / "x", late))
    commented = packed(tmp_path / "x", parts)
    with zipfile.ZipFile(commented, "a") as archive:
        archive.comment = b"hello"
    assert "not a sound bundle" in refusal(commented)
    Bundle.open(packed(tmp_path / "x", parts))  # the packing of this test is itself in order


@pytest.mark.parametrize(
    "name", ["../evil.onnx", "/etc/passwd", "graphs/../../x.onnx", "graphs/evil.b1.onnx", "notes.txt", "graphs/adapt.b4.onnx/", "Manifest.json"]
)
def test_other_members_are_refused(path, tmp_path, name):
    parts = {**members(path), name: b"x"}
    assert "does not belong" in refusal(packed(tmp_path / "x", parts))


def test_members_that_are_missing_listed_or_unlisted(path, tmp_path):
    parts = members(path)
    for name in ("state.safetensors", "graphs/adapt.b4.onnx", "weights.bin"):
        less = {key: data for key, data in parts.items() if key != name}
        assert f"{name} is missing" in refusal(packed(tmp_path / "x", less))
    more = sealed({**parts, "graphs/adapt.b1.onnx": parts["graphs/adapt.b4.onnx"]})
    assert "adapt.b1.onnx does not belong there" in refusal(packed(tmp_path / "x", more))
    unlisted = sealed(parts, lambda manifest: manifest["members"].pop("weights.bin"))
    assert "weights.bin is not listed" in refusal(packed(tmp_path / "x", unlisted))


def test_sizes_are_limited_before_anything_is_allocated(path, tmp_path):
    """The directory claims sizes beyond the limits, in a sparse file that has room for them."""
    for name, size in (("manifest.json", 17 << 20), ("graphs/predict.b1.onnx", 257 << 20)):
        with open(tmp_path / "x", "wb") as file:
            raw = name.encode()
            file.write(struct.pack("<4s5H3I2H", b"PK\x03\x04", 20, 0, 0, 0, 33, 0, size, size, len(raw), 0) + raw)
            file.seek(30 + len(raw) + size)
            begin = file.tell()
            file.write(struct.pack("<4s6H3I5H2I", b"PK\x01\x02", 20, 20, 0, 0, 0, 33, 0, size, size, len(raw), 0, 0, 0, 0, 0, 0) + raw)
            file.write(struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 1, 1, file.tell() - begin, begin, 0))
        assert "at most" in refusal(tmp_path / "x")


def handmade(path: Path, entries: list[tuple[bytes, int, int]], body: bytes, count: int | None = None) -> Path:
    """A zip file of (name, header's place, size) entries over a body that the caller has laid out."""
    directory = b"".join(
        struct.pack("<4s6H3I5H2I", b"PK\x01\x02", 20, 20, 0, 0, 0, 33, 0, size, size, len(name), 0, 0, 0, 0, 0, place) + name
        for name, place, size in entries
    )
    count = len(entries) if count is None else count
    path.write_bytes(body + directory + struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, count, count, len(directory), len(body), 0))
    return path


def header(name: bytes, size: int) -> bytes:
    return struct.pack("<4s5H3I2H", b"PK\x03\x04", 20, 0, 0, 0, 33, 0, size, size, len(name), 0) + name


def test_members_inside_each_other_are_refused(tmp_path):
    inner = header(b"manifest.json", 4) + b"{}  "
    body = header(b"weights.bin", len(inner)) + inner
    entries = [(b"weights.bin", 0, len(inner)), (b"manifest.json", len(body) - len(inner), 4)]
    assert "overlaps the one before it" in refusal(handmade(tmp_path / "x", entries, body))


def test_a_member_that_has_another_name_in_its_own_header_is_refused(tmp_path):
    body = header(b"manifest.jsoN", 2) + b"{}"
    assert "is not where the directory says" in refusal(handmade(tmp_path / "x", [(b"manifest.json", 0, 2)], body))


def test_a_directory_with_more_than_it_says_is_refused(tmp_path):
    body = header(b"manifest.json", 2) + b"{}"
    assert "holds more than it says" in refusal(handmade(tmp_path / "x", [(b"manifest.json", 0, 2)] * 2, body, count=1))
    assert "cut short" in refusal(handmade(tmp_path / "x", [(b"manifest.json", 0, 2)], body, count=2))


def test_the_same_name_twice_is_refused(path, tmp_path):
    packed(tmp_path / "x", members(path))
    with zipfile.ZipFile(tmp_path / "x", "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("manifest.json", "{}")
    assert "stands twice" in refusal(tmp_path / "x")


def test_a_newer_format_asks_for_an_upgrade(path, tmp_path):
    newer = sealed(members(path), lambda manifest: manifest.update(format=2, unheard_of=1))
    text = refusal(packed(tmp_path / "x", newer))
    assert "made by a newer edgeadapt: format 2, this reads 1" in text
    assert "upgrade" in text


# ------------------------------------------------------------------------------------------------------------- manifests

DELETED = object()
PLAIN = {"shape": [3, 6, 6], "resize": None, "mean": None, "std": None}
LOOKS = {"window": 64, "classes": 3.0, "entropy": 0.1, "layers": {"norm": {"mixed": 0.1, "alike": 0.2}}}
WRONG = [
    (("format",), "1", "format"),
    (("format",), True, "format"),
    (("task", "classes"), 0, "task.classes"),
    (("task", "kind"), "regression", "task.kind"),
    (("task", "names"), ["one"], "task.names"),
    (("task", "names", 0), 3, "task.names[0]"),
    (("task",), DELETED, "task is missing"),
    (("model", "parameters"), 1.5, "model.parameters"),
    (("model", "weights_sha256"), "xyz", "model.weights_sha256"),
    (("model", "extra"), 1, "model.extra is not known"),
    (("input", "shape"), [3, 0, 6], "input.shape[1]"),
    (("input", "shape"), [], "input.shape"),
    (("input", "shape"), [3, 2**20, 2**20], "input.shape"),
    (("state", 0, "shape"), [2**30, 4], "state[0].shape"),
    (("input", "resize"), [7, 6], "input.resize"),
    (("input", "resize"), [6], "input.resize"),
    (("input", "fit"), "squeeze", "input.fit"),
    (("input", "fit"), "cover", "input.fit"),
    (("input", "crop"), 1, "input.crop"),
    (("input", "order"), "gbr", "input.order"),
    (("input", "raw"), True, "input.raw"),
    (("input", "hop"), 2, "input.hop"),
    (("input", "hop"), 0, "input.hop"),
    (("input",), {**PLAIN, "resize": [5, 9], "crop": True}, "input.resize"),
    (("input",), {**PLAIN, "resize": [2**15, 8], "crop": True}, "input.resize"),
    (("input",), {**PLAIN, "shape": [6, 128], "crop": True}, "input.crop"),
    (("input",), {**PLAIN, "shape": [1, 6, 6], "order": "bgr"}, "input.order"),
    (("input",), {**PLAIN, "crop": True, "raw": True}, "input.raw"),
    (("input", "mean"), [0.5], "input.mean"),
    (("input", "std"), [0.5, 0.0, 0.5], "input.std"),
    (("input", "std", 1), "0.5", "input.std[1]"),
    (("input", "std", 1), 1e300, "input.std[1]"),
    (("method", "name"), "", "method.name"),
    (("method", "options"), [], "method.options"),
    (("partition", 0, "from"), None, "partition[0].from"),
    (("statistics", "mode"), "both", "statistics.mode"),
    (("hyper", "rate", "low"), 7.0, "hyper.rate"),
    (("hyper", "rate", "default"), DELETED, "hyper.rate.default is missing"),
    (("hyper", "Rate!"), {}, "hyper"),
    (("state", 0, "kind"), "weight", "state[0].kind"),
    (("state", 0, "name"), "two words", "state[0].name"),
    (("state", 1, "name"), "norm.mean", "state"),
    (("state", 0, "shape"), [2] * 9, "state[0].shape"),
    (("batches",), [4], "batches"),
    (("batches",), [4, 1], "batches"),
    (("graphs", "predict.b1"), DELETED, "predict.b1"),
    (("graphs", "source.b1"), DELETED, "source.b1"),
    (("graphs", "adapt.b4", "path"), "graphs/../x.onnx", "adapt.b4.path"),
    (("graphs", "adapt.b4", "role"), "learn", "adapt.b4"),
    (("graphs", "adapt.b4", "batch"), 3, "adapt.b4"),
    (("graphs", "adapt.b4", "hyper"), ["unknown"], "adapt.b4.hyper"),
    (("graphs", "adapt.b4", "reads"), ["unknown"], "adapt.b4.reads"),
    (("graphs", "adapt.b4", "writes"), ["norm.mean", "norm.mean"], "adapt.b4.writes"),
    (("graphs", "adapt.b4", "metrics"), ["a b"], "adapt.b4.metrics"),
    (("graphs", "adapt.b4", "peak_bytes"), -1, "adapt.b4.peak_bytes"),
    (("graphs", "predict.b1", "writes"), ["norm.gamma"], "predict.b1.writes"),
    (("selfcheck",), None, "selfcheck"),
    (("selfcheck", "adapt.b4"), {"unchecked": 3}, "selfcheck.adapt.b4.unchecked"),
    (("selfcheck", "adapt.b4"), {"unchecked": []}, "selfcheck.adapt.b4.unchecked"),
    (("selfcheck", "adapt.b4"), {"unchecked": ["norm.mean", 1]}, "selfcheck.adapt.b4.unchecked[1]"),
    (("selfcheck", "adapt.b4"), {"unchecked": ["unknown"]}, "selfcheck.adapt.b4.unchecked"),
    (("source",), 3, "source"),
    (("warmup",), [], "warmup"),
    (("opset",), None, "opset"),
    (("members", "weights.bin", "size"), "many", "members.weights.bin.size"),
    (("unheard_of",), 1, "unheard_of is not known"),
    (("reference",), {}, "reference."),
    (("reference",), {**LOOKS, "window": 0}, "reference.window"),
    (("reference",), {**LOOKS, "classes": 0.5}, "reference.classes"),
    (("reference",), {**LOOKS, "entropy": -0.1}, "reference.entropy"),
    (("reference",), {**LOOKS, "layers": {"norm": {"mixed": 0.2, "alike": 0.1}}}, "reference.layers.norm.alike"),
    (("reference",), {**LOOKS, "layers": {"other": {"mixed": 0.2, "alike": 0.3}}}, "reference.layers"),
]


@pytest.mark.parametrize(("keys", "value", "named"), WRONG, ids=lambda value: ".".join(map(str, value)) if isinstance(value, tuple) else None)
def test_a_wrong_manifest_names_the_key(toy, path, keys, value, named):
    content = json.loads(members(path)["manifest.json"])
    place = content
    for key in keys[:-1]:
        place = place[key]
    if value is DELETED:
        del place[keys[-1]]
    else:
        place[keys[-1]] = value
    with pytest.raises(BundleError) as caught:
        Manifest.from_json(content, "manifest")
    assert named in caught.value.message


@pytest.mark.parametrize("text", ['"x": {}', "[], ", "1,", '"\\ud800"', '{"\\uDFFF": 1}'])
def test_a_manifest_of_millions_or_of_halves_is_refused_before_it_is_kept(path_of_manifest, text):
    """Values of two bytes take a hundred times as much once they are read, and half a character cannot be printed."""
    many = text if "\\u" in text else f"[{300_000 * text}0]" if ":" not in text else "{" + ",".join([text] * 300_000) + "}"
    with pytest.raises(BundleError, match=r"valid JSON: (more than 262144 values|.*surrogates not allowed)"):
        Manifest.from_bytes(path_of_manifest.replace(b'"summary": "', b'"summary": %s, "x": "' % many.encode()))


def test_a_whole_character_in_two_escapes_is_none_of_these(path_of_manifest):
    assert Manifest.from_bytes(path_of_manifest.replace(b'"summary": "', b'"summary": "\\ud83d\\ude00')).method.summary.startswith("\U0001f600")


def test_what_is_wrong_is_said_in_a_few_words(path_of_manifest):
    content = json.loads(path_of_manifest)
    for change in ({"batches": [1, *range(90_000, 1, -1)]}, {"hyper": {"x" * 10**6: {}}}, {"x" * 10**6: 1}, {"task": {"kind": "x" * 10**6}}):
        with pytest.raises(BundleError) as caught:
            Manifest.from_json({**content, **change})
        assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"format": 1, "format": 1}', '{"format": NaN}', '{"format": 1' + "0" * 5000 + "}", "[" * 100_000, "\xff", "3"]
)
def test_a_manifest_that_is_no_json_is_refused(text):
    with pytest.raises(BundleError):
        Manifest.from_bytes(text.encode("latin-1"))


@pytest.mark.parametrize(
    "spec",
    [
        InputSpec((3, 6, 6), (8, 9), crop=True),
        InputSpec((3, 6, 6), (8, 9), (0.5, 0.4, 0.3), None, fit="cover", crop=True, order="bgr"),
        InputSpec((3, 6, 6), None, (2.0, 3.0, 4.0), (9.0, 9.0, 9.0), raw=True),
        InputSpec((3, 128), hop=32),
    ],
)
def test_how_frames_become_the_input_survives_the_file(toy, spec):
    manifest = dataclasses.replace(toy.manifest(), input=spec)
    assert Manifest.from_bytes(manifest.to_bytes()).input == spec


def test_what_is_usual_of_an_input_is_left_out(toy):
    manifest = dataclasses.replace(toy.manifest(), input=InputSpec((3, 6, 6)))
    assert manifest.to_json()["input"] == PLAIN, "as bundles of before have it"


def test_a_manifest_survives_its_file(toy, path):
    manifest = Bundle.open(path).manifest
    assert Manifest.from_bytes(manifest.to_bytes()) == manifest
    looks = Reference(64, 3.0, 0.1, {"norm": Chance(0.1, 0.2)})
    full = dataclasses.replace(manifest, source={"state": "x"}, warmup={"steps": 3}, selfcheck={"a": [1, None, True]}, reference=looks)
    assert Manifest.from_bytes(full.to_bytes()) == full
    assert manifest.planned("predict") == (4, 1)
    assert manifest.planned("learn") == (4,)


@settings(max_examples=100)
@given(some.data())
def test_any_value_anywhere_is_read_or_refused(path_of_manifest, data):
    content = json.loads(path_of_manifest)
    place, key = content, data.draw(some.sampled_from(sorted(content)))
    while isinstance(place[key], (dict, list)) and place[key] and data.draw(some.booleans()):
        place = place[key]
        key = data.draw(some.sampled_from(sorted(place))) if isinstance(place, dict) else data.draw(some.integers(0, len(place) - 1))
    simple = some.none() | some.booleans() | some.integers() | some.floats() | some.text(max_size=5)
    place[key] = data.draw(
        some.recursive(simple, lambda inner: some.lists(inner, max_size=3) | some.dictionaries(some.text(max_size=3), inner, max_size=3))
    )
    try:
        Manifest.from_json(content)
    except BundleError:
        return


@pytest.fixture(scope="module")
def path_of_manifest(path) -> bytes:
    return members(path)["manifest.json"]


# ------------------------------------------------------------------------------------------------------- hostile graphs


def forged(toy: Toy, change: Any) -> bytes:
    model = onnx.load_from_string(toy.graphs["predict.b1"])
    change(model)
    return model.SerializeToString()


def external(model: onnx.ModelProto) -> onnx.TensorProto:
    return next(tensor for tensor in model.graph.initializer if tensor.external_data)


def set_external(key: str, value: str) -> Any:
    def change(model: onnx.ModelProto) -> None:
        next(entry for entry in external(model).external_data if entry.key == key).value = value

    return change


def add_subgraph(location: str) -> Any:
    """An If node with a branch that keeps a tensor of its own outside."""

    def change(model: onnx.ModelProto) -> None:
        tensor = onnx.TensorProto()
        tensor.CopyFrom(external(model))
        tensor.name = "inner"
        next(entry for entry in tensor.external_data if entry.key == "location").value = location
        branch = helper.make_graph([helper.make_node("Identity", ["inner"], ["z"])], "b", [], [helper.make_tensor_value_info("z", 1, None)], [tensor])
        model.graph.node.append(helper.make_node("If", ["flag"], ["unused"], then_branch=branch, else_branch=branch))

    return change


def add_attribute_tensor(model: onnx.ModelProto) -> None:
    tensor = onnx.TensorProto()
    tensor.CopyFrom(external(model))
    model.graph.node.append(helper.make_node("Constant", [], ["unused"], value=tensor))


def add_sparse(model: onnx.ModelProto) -> None:
    values = helper.make_tensor("v", 1, [1], [1.0])
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, helper.make_tensor("i", 7, [1], [0]), [3]))


def nest(depth: int) -> Any:
    def change(model: onnx.ModelProto) -> None:
        graph = helper.make_graph([], "leaf", [], [])
        for _ in range(depth):
            graph = helper.make_graph([helper.make_node("If", ["f"], ["o"], then_branch=graph)], "g", [], [])
        model.graph.node.append(graph.node[0])

    return change


def inside(model: onnx.ModelProto, **values: Any) -> onnx.TensorProto:
    return model.graph.initializer.add(name="inside", **{"data_type": 1, **values})


def repeat(kind: str) -> Any:
    """A node that runs a subgraph as often as a number in the graph says."""

    def change(model: onnx.ModelProto) -> None:
        model.graph.node.append(helper.make_node(kind, ["most", "go"], ["z"], body=helper.make_graph([], "b", [], [])))

    return change


HOSTILE = {
    "another file": (set_external("location", "/etc/passwd"), "/etc/passwd"),
    "memory": (set_external("location", "*/_ORT_MEM_ADDR_/*"), "_ORT_MEM_ADDR_"),
    "nearly the placeholder": (set_external("location", PLACEHOLDER[:-1]), "edgeadapt-weights-"),
    "before the weights": (set_external("offset", "0"), "outside weights.bin"),
    "behind the weights": (set_external("offset", str(1 << 40)), "outside weights.bin"),
    "misaligned": (set_external("offset", str(WEIGHTS_OFFSET + 4)), "multiple of 64"),
    "negative offset": (set_external("offset", "-64"), "number of bytes"),
    "offset in words": (set_external("offset", "4096.0"), "number of bytes"),
    "wrong length": (set_external("length", "4"), "has 4 bytes"),
    "location twice": (lambda model: external(model).external_data.add(key="location", value="/etc/passwd"), "each once"),
    "checksum": (lambda model: external(model).external_data.add(key="checksum", value="x"), "each once"),
    "no location": (lambda model: external(model).external_data.pop(0), "each once"),
    "not said to be outside": (lambda model: external(model).ClearField("data_location"), "each once"),
    "said to be outside without place": (lambda model: external(model).ClearField("external_data"), "each once"),
    "unknown type": (lambda model: setattr(external(model), "data_type", 8), "unknown type"),
    "negative shape": (lambda model: external(model).dims.__setitem__(0, -1), "shape"),
    "in a subgraph": (add_subgraph("/etc/passwd"), "/etc/passwd"),
    "in an attribute": (add_attribute_tensor, "an attribute's data"),
    "sparse": (add_sparse, "sparse"),
    "a function": (lambda model: model.functions.add(name="f"), "functions"),
    "training section": (lambda model: model.training_info.add(), "training"),
    "own operator": (lambda model: setattr(model.graph.node[0], "domain", "evil.ops"), "'evil.ops'"),
    "deep": (nest(18), "nested deeper"),
    "placeholder elsewhere": (lambda model: setattr(model, "doc_string", PLACEHOLDER), "placeholder"),
    "again and again": (repeat("Loop"), "Loop may run without end"),
    "row by row": (repeat("Scan"), "Scan may run without end"),
    "more than is there": (lambda model: inside(model, dims=[2**38], raw_data=bytes(4)), "more or fewer data"),
    "less than is there": (lambda model: inside(model, dims=[1], raw_data=bytes(8)), "more or fewer data"),
    "nothing is there": (lambda model: inside(model, dims=[3]), "more or fewer data"),
    "numbers one by one": (lambda model: inside(model, dims=[3], float_data=[1.0, 2.0]), "more or fewer data"),
    "half bytes": (lambda model: inside(model, dims=[7], data_type=TensorProto.INT4, int32_data=[1, 2, 3]), "more or fewer data"),
    "texts": (lambda model: inside(model, dims=[2], data_type=TensorProto.STRING, string_data=[b"x"]), "more or fewer data"),
    "a type that is none": (lambda model: inside(model, dims=[1], data_type=99, raw_data=bytes(4)), "unknown type (99)"),
    "below nothing": (lambda model: inside(model, dims=[-1, -1], raw_data=bytes(4)), "cannot be, [-1, -1]"),
    "beyond all": (lambda model: inside(model, dims=[0, 2**40]), "cannot be"),
    "sizes one by one": (lambda model: inside(model, dims=[1] * 65, raw_data=bytes(4)), "cannot be"),
    "a shape by the thousand": (lambda model: inside(model, dims=[513], data_type=7, raw_data=bytes(8 * 513)), "belong into weights.bin"),
    "numbers by the thousand": (lambda model: model.graph.node[0].attribute.append(helper.make_attribute("a", [1] * 9000)), "too many numbers"),
    "a long name": (lambda model: setattr(model.graph.node[0], "domain", "x" * 10**6), "only standard ONNX operators"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_graphs_are_refused(toy, path, tmp_path, name):
    change, reason = HOSTILE[name]
    parts = sealed({**members(path), "graphs/predict.b1.onnx": forged(toy, change)})
    packed(tmp_path / "x", parts)
    if name == "placeholder elsewhere":  # found when the name is put in
        with pytest.raises(BundleError, match=reason):
            Bundle.open(tmp_path / "x").graph("predict.b1")
    else:
        found = refusal(tmp_path / "x")
        assert reason in found
        assert len(found) < 1000, "people are to read it"


def test_data_inside_a_graph_are_read_in_every_form(toy):
    def change(model: onnx.ModelProto) -> None:
        inside(model, dims=[2], float_data=[1.0, 2.0])
        inside(model, dims=[2], data_type=7, int64_data=[-1, 1])
        inside(model, dims=[2], data_type=11, double_data=[-1, 1])
        inside(model, dims=[2], data_type=9, int32_data=[0, 1])
        inside(model, dims=[3], data_type=TensorProto.INT4, int32_data=[1, 2])
        inside(model, dims=[3], data_type=TensorProto.UINT4, raw_data=bytes(2))
        inside(model, dims=[2], data_type=TensorProto.STRING, string_data=[b"x", b""])
        inside(model, dims=[0, 5])
        inside(model, raw_data=bytes(4))
        inside(model, dims=[512], data_type=7, raw_data=bytes(8 * 512))

    onnxwire.scan(forged(toy, change))


def test_a_graph_is_walked_for_a_bounded_time(toy, monkeypatch):
    data = toy.graphs["predict.b1"]
    onnxwire.scan(data)
    monkeypatch.setattr(onnxwire, "_MAX_FIELDS", 50)
    with pytest.raises(BundleError, match="more than 50 fields"):
        onnxwire.scan(data)


def test_a_subgraph_may_use_the_weights(toy, path, tmp_path):
    parts = sealed({**members(path), "graphs/predict.b1.onnx": forged(toy, add_subgraph(PLACEHOLDER))})
    found = Bundle.open(packed(tmp_path / "x", parts)).graph("predict.b1").external
    assert [tensor.outer for tensor in found if tensor.name == "inner"] == [False, False]


def test_the_wire_reader_finds_what_onnx_finds(toy):
    for data in toy.graphs.values():
        model, facts = onnx.load_from_string(data), onnxwire.scan(data)
        assert facts.nodes == len(model.graph.node)
        assert facts.operators == {node.op_type for node in model.graph.node}
        wanted = [tensor for tensor in model.graph.initializer if tensor.external_data]
        assert [(found.name, found.shape, found.kind) for found in facts.external] == [(tensor.name, tuple(tensor.dims), 1) for tensor in wanted]


@settings(max_examples=300)
@given(some.data())
def test_damaged_graphs_are_refused_or_read(toy_graph, data):
    whole = bytearray(toy_graph)
    for _ in range(data.draw(some.integers(1, 4))):
        whole[data.draw(some.integers(0, len(whole) - 1))] = data.draw(some.integers(0, 255))
    try:
        onnxwire.scan(bytes(whole[: data.draw(some.integers(0, len(whole)))]))
    except BundleError:
        return


@pytest.fixture(scope="module")
def toy_graph(toy) -> bytes:
    return toy.graphs["predict.b1"]


def test_packed_and_unpacked_sizes_mean_the_same():
    def tensor(dims: bytes) -> bytes:
        entries = b"".join(
            b"\x6a" + bytes([len(entry)]) + entry for entry in (b"\x0a\x08location\x12\x01x", b"\x0a\x06offset\x12\x014", b"\x0a\x06length\x12\x0224")
        )
        return dims + b"\x10\x01" + entries + b"\x70\x01"

    def model(body: bytes) -> bytes:
        graph = b"\x2a" + bytes([len(body)]) + body
        return b"\x3a" + bytes([len(graph)]) + graph

    one_by_one, together = (onnxwire.scan(model(tensor(dims))) for dims in (b"\x08\x02\x08\x03", b"\x0a\x02\x02\x03"))
    assert one_by_one.external == together.external
    assert one_by_one.external[0].shape == (2, 3)


def test_sizes_are_counted_before_they_are_kept():
    def field(number: int, body: bytes) -> bytes:
        return bytes([number << 3 | 2]) + onnxwire._encoded(len(body)) + body

    with pytest.raises(BundleError, match="more than 64 sizes"):
        onnxwire.scan(field(7, field(5, field(1, bytes([1]) * 10**6))))


def test_reading_weights_in_pieces_does_not_keep_them(path, monkeypatch):
    """Verifying reads them and the state through one small buffer, whatever their size."""
    sizes = []
    real = io.BufferedReader

    class Watched(real):
        def readinto(self, buffer: Any) -> int:
            sizes.append(len(buffer))
            return super().readinto(buffer)

    monkeypatch.setattr("edgeadapt.bundle.container._opened", lambda where: Watched(io.FileIO(where)))
    monkeypatch.setattr("edgeadapt.bundle.container._CHUNK", 1000)
    bundle = Bundle.open(path)
    assert bundle.weights_size > 3000
    assert max(sizes) <= 1000
    assert sum(sizes) == bundle.weights_size + bundle.manifest.members["state.safetensors"].size


def test_declared_shapes_are_left_out_and_nothing_else(tmp_path):
    bundle = Bundle.open(Toy(batches=(1, 4)).write(tmp_path / "toy.edgeadapt"))
    model = onnx.shape_inference.infer_shapes(onnx.load_from_string(bundle.graph("adapt.b4").data), data_prop=True)
    assert model.graph.value_info
    left = onnx.load_from_string(onnxwire.without_declarations(model.SerializeToString()))
    del model.graph.value_info[:]
    assert left == model
    with pytest.raises(onnxwire.Malformed):
        onnxwire.without_declarations(model.SerializeToString()[:-3])
