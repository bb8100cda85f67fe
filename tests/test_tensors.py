"""Named arrays in a safetensors file: what is written can be read, by others too, and what is malformed is refused by name."""

from __future__ import annotations

import json
import os
from typing import Any

import hypothesis.extra.numpy as arrays
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as some

from edgeadapt.bundle import tensors
from edgeadapt.errors import BundleError, InputError, StateError

device = pytest.mark.device
DTYPES = ("float32", "float16", "int8", "int16", "int32", "int64", "uint8", "bool")
NAMES = some.text(some.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(lambda name: name != "__metadata__")
ARRAYS = some.sampled_from(DTYPES).flatmap(lambda dtype: arrays.arrays(dtype, arrays.array_shapes(min_dims=0, min_side=0, max_side=4)))
FILES = some.dictionaries(NAMES, ARRAYS, max_size=5)
METADATA = some.dictionaries(
    some.text(some.characters(exclude_categories=["Cs"]), max_size=8), some.text(some.characters(exclude_categories=["Cs"]), max_size=8)
)


def same(left: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> bool:
    """Names, dtypes, shapes and bytes, so that NaN equals itself."""
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and left[name].shape == right[name].shape and left[name].tobytes() == right[name].tobytes()
        for name in left
    )


@device
@given(FILES, METADATA)
def test_what_is_written_is_read(content, metadata):
    found, header = tensors.decode(tensors.encode(content, metadata))
    assert same(found, content)
    assert header == metadata


@given(FILES, some.none() | METADATA)
def test_the_safetensors_package_reads_ours_and_we_read_its(content, metadata):
    import safetensors.numpy

    assert same(safetensors.numpy.load(tensors.encode(content, metadata)), content)
    found, header = tensors.decode(safetensors.numpy.save(content, metadata or None))  # of nothing and {} it writes what it cannot read
    assert same(found, content)
    assert header == (metadata or {})


@device
def test_layouts_other_than_plain_ones_are_written_in_order(tmp_path):
    base = np.arange(12, dtype=np.float32).reshape(3, 4)
    content = {"transposed": base.T, "strided": base[::2, 1::2], "big-endian": base.astype(">f4"), "reversed": base[::-1]}
    with open(tmp_path / "x.safetensors", "wb") as file:
        size = tensors.write(file, content)
    assert (tmp_path / "x.safetensors").stat().st_size == size
    found, _ = tensors.read(tmp_path / "x.safetensors")
    assert {name: array.tolist() for name, array in found.items()} == {name: array.tolist() for name, array in content.items()}


@device
def test_equal_contents_give_equal_files_and_aligned_data():
    one = {"b": np.ones(3, np.int8), "a": np.ones((2, 2), np.float32), "c": np.ones(1, np.int64)}
    data = tensors.encode(one)
    assert data == tensors.encode(dict(reversed(one.items())))
    assert int.from_bytes(data[:8], "little") % 8 == 0
    assert list(tensors.decode(data)[0]) == ["c", "a", "b"]  # the widest first, so that all are aligned


@device
def test_arrays_are_views_of_what_was_given():
    data = bytearray(tensors.encode({"a": np.zeros(4, np.float32)}))
    found, _ = tensors.decode(data)
    data[-4:] = np.float32(5).tobytes()
    assert found["a"].tolist() == [0, 0, 0, 5]


@device
@pytest.mark.parametrize("array", [np.zeros(2, np.float64), np.zeros(2, np.complex64), np.array(["x"]), np.array([object()])])
def test_other_dtypes_are_refused_when_writing(array):
    with pytest.raises(InputError, match="'name' has dtype"):
        tensors.encode({"name": array})


@device
@pytest.mark.parametrize("name", ["", "__metadata__"])
def test_reserved_names_are_refused_when_writing(name):
    with pytest.raises(InputError, match="cannot be named"):
        tensors.encode({name: np.zeros(1, np.float32)})


def raw(header: Any, payload: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + payload


def one(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8), **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape) if isinstance(shape, tuple) else shape, "data_offsets": offsets, **more}


MALFORMED = {
    "empty": (b"", "0 bytes"),
    "short": (b"\0\0\0", "3 bytes"),
    "header longer than the file": (raw({}, length=100), "truncated in its header"),
    "huge header": (b"\xff" * 8, "at most"),
    "no brace": (raw(b" {}"), "brace"),
    "no JSON": (raw(b"{nothing"), "not JSON"),
    "not UTF-8": (raw(b'{"\xff": 1}'), "not JSON"),
    "deep": (raw(b'{"a":' + b"[" * 100_000), "not JSON"),
    "name twice": (raw(b'{"a": ' + json.dumps(one()).encode() + b', "a": ' + json.dumps(one()).encode() + b"}", bytes(8)), "stands twice"),
    "entry no mapping": (raw({"a": 3}), "'a' needs"),
    "entry with more": (raw({"a": one(stride=[1])}, bytes(8)), "'a' needs"),
    "entry with less": (raw({"a": {"dtype": "F32", "shape": [2]}}, bytes(8)), "'a' needs"),
    "unknown dtype": (raw({"a": one("F64", (1,))}, bytes(8)), "'a' has dtype 'F64'"),
    "dtype no text": (raw({"a": one(["F32"])}, bytes(8)), "'a' has dtype"),
    "negative size": (raw({"a": one(shape=(-2, -1))}, bytes(8)), "'a' has shape"),
    "size true": (raw({"a": one(shape=(True, 2))}, bytes(8)), "'a' has shape"),
    "size a fraction": (raw({"a": one(shape=(2.0,))}, bytes(8)), "'a' has shape"),
    "shape no list": (raw({"a": one(shape="2")}, bytes(8)), "'a' has shape"),
    "too many sizes": (raw({"a": one(shape=(1,) * 40, offsets=[0, 4])}, bytes(4)), "'a' has shape"),
    "sizes that overflow": (raw({"a": one(shape=(2**62, 4))}, bytes(8)), "needs"),
    "nothing of more than can be addressed": (raw({"a": one(shape=(0, 2**62), offsets=[0, 0])}), "'a' has shape"),
    "nothing of a few bytes more": (raw({"a": one("I8", (2**62, 0, 2), [0, 0])}), "more than can be addressed"),
    "bytes that do not fit the shape": (raw({"a": one(offsets=[0, 4])}, bytes(4)), "needs 8 bytes, but 4"),
    "offsets reversed": (raw({"a": one(offsets=[8, 0])}, bytes(8)), "'a' has data_offsets"),
    "offsets beyond": (raw({"a": one(offsets=[0, 8])}, bytes(7)), "'a' has data_offsets"),
    "three offsets": (raw({"a": one(offsets=[0, 8, 8])}, bytes(8)), "'a' has data_offsets"),
    "hole at the start": (raw({"a": one(offsets=[4, 12])}, bytes(12)), "'a' begins at byte 4"),
    "hole between": (raw({"a": one(), "b": one(offsets=[12, 20])}, bytes(20)), "'b' begins at byte 12"),
    "overlap": (raw({"a": one(), "b": one(offsets=[4, 12])}, bytes(12)), "'b' begins at byte 4"),
    "bytes left over": (raw({"a": one()}, bytes(9)), "9 follow"),
    "metadata no mapping": (raw({"__metadata__": 3}), "__metadata__"),
    "metadata no strings": (raw({"__metadata__": {"a": 1}}), "__metadata__"),
    "millions": (raw({"__metadata__": {"a": [[]] * 300_000}}), "more than 262144 values"),
    "halves": (raw({"__metadata__": {"a": "\ud800"}}), "surrogates not allowed"),
    "a long name": (raw({"x" * 10**6: 3}), "xxx…"),
    "a long shape": (raw({"a": one(shape=(1,) * 9000)}), "…"),
    "neither true nor false": (raw({"a": one("BOOL", (2,), [0, 2])}, b"\x01\x02"), "neither true nor false"),
}


@device
@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_files_are_refused_with_the_reason(name):
    data, reason = MALFORMED[name]
    for error in (InputError, BundleError, StateError):
        with pytest.raises(error) as caught:
            tensors.decode(data, "state.safetensors", error)
        assert reason in str(caught.value)
        assert "state.safetensors" in str(caught.value)
        assert len(str(caught.value)) < 1000, "people are to read it"


@device
@given(FILES, some.data())
def test_a_damaged_file_is_read_or_refused_but_never_anything_else(content, data):
    whole = bytearray(tensors.encode(content))
    for _ in range(data.draw(some.integers(1, 3))):
        place = data.draw(some.integers(0, len(whole) - 1))
        whole[place] ^= data.draw(some.integers(1, 255))
    damaged = bytes(whole[: data.draw(some.integers(0, len(whole)))]) if data.draw(some.booleans()) else bytes(whole)
    try:
        tensors.decode(damaged)
    except InputError:
        return


@device
@given(FILES.filter(bool))
def test_every_truncation_is_refused(content):
    whole = tensors.encode(content)
    for size in range(0, len(whole), max(1, len(whole) // 40)):
        with pytest.raises(InputError):
            tensors.decode(whole[:size])


@device
def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(StateError, match=r"gone\.safetensors cannot be read"):
        tensors.read(tmp_path / "gone.safetensors", StateError)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(StateError, match="pipe cannot be read: it is not a file"):
        tensors.read(tmp_path / "pipe", StateError)


@device
@given(some.lists(some.sampled_from([0, 1, 2, 2**29, 2**31, 2**32, 2**60, 2**61, 2**62, 2**63 - 1]), max_size=4), some.sampled_from(["I8", "F32"]))
def test_an_array_of_nothing_has_every_shape_that_numpy_has(shape, code):
    data = raw({"a": one(code, [*shape, 0], [0, 0])})
    try:
        found = np.empty((*shape, 0), np.int8 if code == "I8" else np.float32)
    except ValueError:
        with pytest.raises(InputError, match="can be addressed"):
            tensors.decode(data)
    else:
        assert tensors.decode(data)[0]["a"].shape == found.shape


@device
def test_what_an_array_is_is_known_without_reading_it(tmp_path):
    (tmp_path / "x").write_bytes(tensors.encode({"a": np.zeros((2, 3), np.int8), "b": np.zeros((), np.float32)}))
    with open(tmp_path / "x", "rb") as file:
        found = tensors.Stored(file, "x", StateError)
        assert (found.form("a"), found.form("b"), found.nbytes) == ((np.int8, (2, 3)), (np.float32, ()), 10)
