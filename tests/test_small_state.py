"""State in small forms on the device: its bytes, its files, what is refused, and steps that must not be kept."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from edgeadapt.bundle import Bundle, GraphSpec, Manifest, StateSpec, tensors
from edgeadapt.cli.inspect import summary
from edgeadapt.errors import BundleError, StateError
from edgeadapt.memory import footprint
from edgeadapt.runtime import checkpoint, prepare_compare, profiling
from edgeadapt.runtime import session as sessions
from edgeadapt.runtime.adapter import Adapter
from edgeadapt.runtime.checkpoint import Snapshot
from edgeadapt.runtime.state import FlatState
from tests.smalltoy import BATCH, FEATURES, STATE, follow, small_bundle

pytestmark = pytest.mark.device

START = {name: value for name, (_, value) in STATE.items()}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Bundle:
    return Bundle.open(small_bundle(tmp_path_factory.mktemp("small") / "small.edgeadapt"))


def frames(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((BATCH, FEATURES)).astype(np.float32)


def same(left: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> bool:
    return left.keys() == right.keys() and all(left[name].dtype == right[name].dtype and np.array_equal(left[name], right[name]) for name in left)


def test_steps_over_small_state_are_those_of_plain_arithmetic(bundle):
    with Adapter.open(bundle.path) as adapter:
        want = START
        for seed in range(40):
            logits = adapter.adapt(frames(seed), rate=9.0)
            weights = want["w"] * want["w.unit"]
            np.testing.assert_allclose(logits, frames(seed) @ weights.T + want["bias"] * 1e-3, rtol=1e-5, atol=1e-5)
            want = follow(want, frames(seed), 9.0)
            assert same(adapter.state, want), seed
        assert want["w"].max() > 100, "it went somewhere"


def test_a_state_holds_the_small_bytes_and_no_others(bundle):
    manifest = bundle.manifest
    state = FlatState(manifest.state, manifest.graphs, bundle.initial_state())
    sizes = {"w": 12, "w.unit": 12, "bias": 6, "m": 12, "m.scale": 12, "counter": 8}
    assert {spec.name: spec.nbytes for spec in manifest.state} == sizes
    assert {name: view.nbytes for name in sizes for view in state.views(name)} == sizes
    assert state.nbytes == 64 * (2 * 5 + 1), "units are written by no graph, so they are there once"
    assert state.nbytes == footprint.state_bytes(manifest.state, manifest.graphs, manifest.graphs)
    for name in sizes:
        for view in state.views(name):
            assert view.ctypes.data % 64 == 0
            assert state.buffer.ctypes.data <= view.ctypes.data < state.buffer.ctypes.data + state.nbytes


def test_larger_tensors_are_counted_by_their_bytes():
    specs = tuple(StateSpec(kind, (1000,), "parameter", kind) for kind in ("int8", "uint8", "int16", "int64", "float32"))
    graphs = {"adapt.b2": GraphSpec("", "adapt", 2, (), (), ("int16", "int8"))}
    state = FlatState(specs, graphs, {spec.name: np.zeros(1000, spec.dtype) for spec in specs})
    assert state.nbytes == 2 * 1024 + 1024 + 2 * 2048 + 8000 + 4032 == footprint.state_bytes(specs, graphs, graphs)


def test_the_state_of_a_bundle_of_other_types_is_refused(bundle, tmp_path):
    manifest = bundle.manifest
    path = tmp_path / "x"
    checkpoint.write(path, Snapshot(dict(START), {}, {}).at_hand, manifest)
    other = replace(manifest, state=tuple(replace(spec, dtype="uint8") if spec.name == "w" else spec for spec in manifest.state))
    with pytest.raises(StateError, match="other trainable parts"):
        checkpoint.read(path, other)
    assert same(checkpoint.read(path, manifest).tensors, START)


def test_whole_numbers_are_never_taken_for_what_is_not_finite(bundle):
    """0x7fc0 twice is NaN to whoever reads it as float32."""
    manifest = bundle.manifest
    state = FlatState(manifest.state, manifest.graphs, bundle.initial_state())
    written = state.written["adapt.b2"]
    for name, value in (("bias", 0x7FC0), ("m", 0xFF), ("w", -1)):
        state.views(name)[1][...] = value
    assert state.finite(written)
    state.views("m.scale")[1][2] = np.nan
    assert not state.finite(written)


@pytest.mark.parametrize("rate", [1e20, 1e30])
def test_a_step_that_the_graph_says_is_not_finite_is_dropped(bundle, rate):
    with Adapter.open(bundle.path) as adapter:
        adapter.adapt(frames(0))
        before = adapter.state
        adapter.adapt(frames(1), rate=rate)
        assert adapter.stats["rejected_steps"] == 1
        assert not np.isfinite(adapter.metrics["update"])
        assert same(adapter.state, before)
        adapter.adapt(frames(2))
        assert same(adapter.state, follow(before, frames(2), 1.0))


def test_saved_and_rolled_back_states_go_on_as_they_went(bundle, tmp_path):
    with Adapter.open(bundle.path) as adapter:
        for seed in range(3):
            adapter.adapt(frames(seed), rate=5.0)
        path, middle = adapter.save(tmp_path / "state"), adapter.state
        for seed in range(3, 6):
            adapter.adapt(frames(seed), rate=5.0)
        end = adapter.state
        adapter.state = middle
        for seed in range(3, 6):
            adapter.adapt(frames(seed), rate=5.0)
        assert same(adapter.state, end)
    found, _ = tensors.read(path)
    assert {name: value.dtype for name, value in found.items()} == {name: value.dtype for name, value in START.items()}
    assert b'"dtype":"I8"' in path.read_bytes()
    assert b'"dtype":"U8"' in path.read_bytes()
    assert b'"dtype":"I16"' in path.read_bytes()
    with Adapter.open(bundle.path) as adapter:
        adapter.load(path)
        for seed in range(3, 6):
            adapter.adapt(frames(seed), rate=5.0)
        assert same(adapter.state, end)
        assert adapter.state["counter"] == 6


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("w", np.zeros((3, 4), np.float32), r"'w' is float32 \[3, 4\], not int8 \[3, 4\]"),
        ("m", np.zeros((3, 4), np.int8), r"'m' is int8 \[3, 4\], not uint8"),
        ("counter", np.zeros((1,), np.int64), r"'counter' is int64 \[1\], not int64 \[\]"),
        ("w.unit", np.full((3, 1), np.nan, np.float32), "'w.unit' holds NaN"),
    ],
)
def test_state_of_another_type_is_refused(bundle, name, value, said):
    with Adapter.open(bundle.path) as adapter, pytest.raises(StateError, match=said):
        adapter.state = {**START, name: value}


def edited(bundle: Bundle, change) -> Manifest:
    plain = json.loads(bundle.manifest.to_bytes())
    change(plain)
    return Manifest.from_json(plain)


def test_types_stand_in_the_manifest_where_they_are_not_float32(bundle):
    plain = bundle.manifest.to_json()
    assert {entry["name"]: entry.get("dtype") for entry in plain["state"]} == {
        "w": "int8",
        "w.unit": None,
        "bias": "int16",
        "m": "uint8",
        "m.scale": None,
        "counter": "int64",
    }
    assert Manifest.from_json(plain) == bundle.manifest
    assert edited(bundle, lambda plain: plain["state"][1].update(dtype="float32")) == bundle.manifest


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda plain: plain["state"][0].update(dtype="int4"), r"state\[0\]\.dtype: expected text like float32\|int8\|uint8\|int16\|int64"),
        (lambda plain: plain["state"][0].update(dtype=8), r"state\[0\]\.dtype: expected text"),
        (lambda plain: plain["state"][0].update(kind="statistic"), r"state\[0\]\.dtype: expected float32, of a statistic"),
        (lambda plain: plain["state"][0].update(type="int8"), r"state\[0\]\.type is not known"),
        (lambda plain: plain["graphs"]["adapt.b2"].update(metrics=["loss"]), r"adapt\.b2\.metrics: expected update, in a graph that writes whole"),
    ],
)
def test_manifests_with_other_types_are_refused(bundle, change, said):
    with pytest.raises(BundleError, match=said):
        edited(bundle, change)


def test_a_graph_of_another_type_than_the_manifest_says_is_refused(bundle):
    state = tuple(replace(spec, dtype="uint8") if spec.name == "w" else spec for spec in bundle.manifest.state)
    other = Bundle.open(bundle.path, verify=False)
    other.manifest = replace(bundle.manifest, state=state)
    with pytest.raises(BundleError, match=r"input state\.w: expected tensor\(uint8\) \[3, 4\], got tensor\(int8\)"):
        sessions.open_graph(other, "predict.b1", 1, sessions.Weights(other), None)
    with pytest.raises(BundleError, match=r"'w' is int8 \[3, 4\], but the manifest says uint8"):
        other.initial_state()


def test_what_is_prepared_is_compared_in_whole_numbers(bundle):
    spec, kinds = bundle.manifest.graphs["adapt.b2"], {item.name: item.kind for item in bundle.manifest.state}
    session = sessions.open_graph(bundle, "adapt.b2", 1, sessions.Weights(bundle), None)
    _, given = prepare_compare.feeds(bundle, "adapt.b2", session)
    assert given["state.w"].dtype == np.int8
    assert not np.array_equal(given["state.w"], START["w"])
    assert np.array_equal(given["state.w.unit"], START["w.unit"])
    want = prepare_compare.run(session, given)
    limits = prepare_compare.limits(bundle, "adapt.b2")

    def fault(name: str, change) -> str:
        got = {**want, name: change(want[name].copy())}
        return prepare_compare.fault(prepare_compare.apart(spec, kinds, given, want, got), limits)

    def off(value: np.ndarray, by: int) -> np.ndarray:
        value.flat[3] += by
        return value

    assert not fault("new.w", lambda value: value)
    assert not fault("new.m", lambda value: value - value.dtype.type(1)), "codes are finer than noise"
    assert fault("new.m", lambda value: value - value.dtype.type(2))
    assert fault("new.w", lambda value: off(value, 2))
    assert fault("new.w", lambda value: value - value.dtype.type(1)), "a rule that rounds otherwise"
    assert fault("new.counter", lambda value: value + 1)
    assert fault("new.m.scale", lambda value: value * np.float32(1.1))
    profiling.bind(session)  # every type is known to it


def test_inspect_says_what_a_parameter_takes(bundle):
    text = summary(bundle)
    assert "updates     tiny: 4.1 bytes a parameter with its moments, 15 parameters" in text
    assert f"{12 + 12 + 6 + 12 + 12 + 8}" in text
