"""The flat state: two sets that swap, groups that need no copies, and files that a crash cannot take away."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some

from edgeadapt.bundle import GraphSpec, StateSpec, tensors
from edgeadapt.errors import StateError
from edgeadapt.runtime import checkpoint
from edgeadapt.runtime.checkpoint import Slots, Snapshot
from edgeadapt.runtime.state import FlatState
from tests.child import ROOT, environment
from tests.toybundle import Toy

pytestmark = pytest.mark.device

SPECS = (
    StateSpec("mean", (5,), "statistic"),
    StateSpec("gain", (3, 2), "parameter"),
    StateSpec("gain.m", (3, 2), "moment"),
    StateSpec("bias", (7,), "parameter"),
    StateSpec("scale", (), "parameter"),
    StateSpec("fixed", (4,), "parameter"),
)
GRAPHS = {
    "predict.b1": GraphSpec("", "predict", 1, (), ("mean", "gain", "fixed"), ("mean",)),
    "adapt.b4": GraphSpec("", "adapt", 4, (), ("mean", "gain", "gain.m", "fixed"), ("mean", "gain", "gain.m")),
    "learn.b4": GraphSpec("", "learn", 4, (), ("mean", "gain", "gain.m", "bias"), ("mean", "gain", "gain.m", "bias", "scale")),
}


def values(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {spec.name: np.asarray(rng.standard_normal(spec.shape), np.float32) for spec in SPECS}


def fill(state: FlatState, graph: str, seed: int) -> dict[str, np.ndarray]:
    """What a graph does: writes the following set of what it writes."""
    new = {name: array for name, array in values(seed).items() if name in GRAPHS[graph].writes}
    for name, array in new.items():
        state.views(name)[1 - state.current_set(name)][...] = array
    return new


def equal(left: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> bool:
    return left.keys() == right.keys() and all(left[name].tobytes() == right[name].tobytes() for name in left)


def test_every_tensor_is_an_aligned_view_of_one_buffer():
    state = FlatState(SPECS, GRAPHS, values())
    seen: list[tuple[int, int]] = []
    for spec in SPECS:
        views = state.views(spec.name)
        assert len(views) == (1 if spec.name == "fixed" else 2)
        for view in views:
            assert view.shape == spec.shape
            assert view.ctypes.data % 64 == 0
            assert view.base is not None
            assert state.buffer.ctypes.data <= view.ctypes.data < state.buffer.ctypes.data + state.nbytes
            seen.append((view.ctypes.data, view.ctypes.data + view.nbytes))
    seen.sort()
    assert all(end <= begin for (_, end), (begin, _) in zip(seen, seen[1:]))
    assert state.buffer.dtype == np.float32
    assert state.nbytes == sum(2 * 64 if name != "fixed" else 64 for name in ("mean", "gain", "gain.m", "bias", "scale", "fixed"))


def test_tensors_are_grouped_by_who_writes_them():
    state = FlatState(SPECS, GRAPHS, values())
    assert [group.names for group in state.groups] == [("mean",), ("gain", "gain.m"), ("bias", "scale"), ("fixed",)]
    assert state.written == {"predict.b1": (0,), "adapt.b4": (0, 1), "learn.b4": (0, 1, 2)}
    assert state.touched == {"predict.b1": (0, 1, 3), "adapt.b4": (0, 1, 3), "learn.b4": (0, 1, 2)}


@given(some.lists(some.tuples(some.sampled_from(sorted(GRAPHS)), some.booleans(), some.integers(1, 99)), max_size=12))
def test_any_order_of_kept_and_dropped_steps_matches_a_dictionary(steps):
    state, plain = FlatState(SPECS, GRAPHS, values()), values()
    for graph, kept, seed in steps:
        new = fill(state, graph, seed)
        if kept:
            state.swap(state.written[graph])
            plain.update(new)
        assert equal(state.current(), plain)


def test_current_gives_copies():
    state = FlatState(SPECS, GRAPHS, values())
    state.current()["mean"][...] = 9
    assert equal(state.current(), values())


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["mean", "gain", "scale"])
def test_a_value_that_is_not_finite_is_seen_wherever_it_is(bad, name):
    state = FlatState(SPECS, GRAPHS, values())
    fill(state, "learn.b4", 3)
    assert state.finite(state.written["learn.b4"])
    state.views(name)[1 - state.current_set(name)].reshape(-1)[-1] = bad
    assert not state.finite(state.written["learn.b4"])
    assert state.finite([group for group in range(3) if name not in state.groups[group].names])
    state.views(name)[1 - state.current_set(name)][...] = np.finfo(np.float32).max
    assert state.finite(state.written["learn.b4"])


def test_large_states_are_looked_at_to_the_end():
    specs = (StateSpec("w", (200_001,), "parameter"),)
    graphs = {"adapt.b1": GraphSpec("", "adapt", 1, (), ("w",), ("w",))}
    state = FlatState(specs, graphs, {"w": np.zeros(200_001, np.float32)})
    for place in (0, 65_535, 65_536, 200_000):
        state.views("w")[1][...] = 0
        assert state.finite((0,))
        state.views("w")[1][place] = np.inf
        assert not state.finite((0,))


def test_no_tensors_at_all():
    state = FlatState((), {"predict.b1": GraphSpec("", "predict", 1)}, {})
    assert state.current() == {}
    assert state.finite(state.written["predict.b1"])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda new: new.pop("mean"), "'mean' is missing"),
        (lambda new: new.update(extra=np.zeros(1, np.float32)), "'extra' is not known"),
        (lambda new: new.update(gain=np.zeros((2, 3), np.float32)), r"'gain' is float32 \[2, 3\], not float32 \[3, 2\]"),
        (lambda new: new.update(gain=np.zeros((3, 2))), "'gain' is float64"),
        (lambda new: new.update(fixed=np.full(4, np.nan, np.float32)), "'fixed' holds NaN"),
    ],
)
def test_replacing_takes_all_or_nothing(change, said):
    state, new = FlatState(SPECS, GRAPHS, values()), values(5)
    change(new)
    with pytest.raises(StateError, match=said):
        state.replace(new)
    assert equal(state.current(), values())


# ----------------------------------------------------------------------------------------------------------------- files


@pytest.fixture(scope="module")
def toy() -> Toy:
    return Toy()


def snapshot(toy: Toy, seed: int, generation: int = 0) -> Snapshot:
    rng = np.random.default_rng(seed)
    content = {name: rng.standard_normal(array.shape, dtype=np.float32) for name, array in toy.state.items()}
    return Snapshot(content, {"frames": seed, "steps": 2}, {"rate": 0.1 * seed, "mix": 1 / 3}, generation)


def same(left: Snapshot, right: Snapshot) -> bool:
    return equal(left.tensors, right.tensors) and (left.counters, left.hyper) == (right.counters, right.hyper)


def test_a_file_gives_back_what_was_saved(toy, tmp_path):
    saved = snapshot(toy, 7, 3)
    checkpoint.write(tmp_path / "x", saved.at_hand, toy.manifest())
    found = checkpoint.read(tmp_path / "x", toy.manifest())
    assert same(found, saved)
    assert found.generation == 3
    _, header = tensors.read(tmp_path / "x")
    assert header["compatible"] == checkpoint.compatible(toy.manifest())


def test_the_safetensors_header_is_plain_text_for_others(toy, tmp_path):
    checkpoint.write(tmp_path / "x", snapshot(toy, 1).at_hand, toy.manifest())
    found, header = tensors.read(tmp_path / "x")
    assert set(found) == set(toy.state)
    assert header["model"] == "tests.toybundle:Toy"


def test_the_state_of_another_bundle_is_refused_by_its_name(toy, tmp_path):
    checkpoint.write(tmp_path / "x", snapshot(toy, 1).at_hand, toy.manifest())
    manifest = toy.manifest()
    retrained = dataclasses.replace(manifest, model=dataclasses.replace(manifest.model, name="my.net", weights_sha256="e" * 64))
    with pytest.raises(StateError, match=r"is the state of tests\.toybundle:Toy .* this bundle is my\.net .*: other frozen weights"):
        checkpoint.read(tmp_path / "x", retrained)
    with pytest.raises(StateError, match="other trainable parts"):
        checkpoint.read(tmp_path / "x", dataclasses.replace(manifest, state=manifest.state[:-1]))


def test_a_new_export_with_other_batches_takes_the_same_state(toy, tmp_path):
    checkpoint.write(tmp_path / "x", snapshot(toy, 1).at_hand, toy.manifest())
    checkpoint.read(tmp_path / "x", Toy(batches=(1, 2, 8)).manifest())


def test_other_files_and_newer_formats_are_refused(toy, tmp_path):
    with pytest.raises(StateError, match="cannot be read"):
        checkpoint.read(tmp_path / "gone", toy.manifest())
    (tmp_path / "x").write_bytes(tensors.encode(dict(toy.state)))
    with pytest.raises(StateError, match="no saved state of edgeadapt"):
        checkpoint.read(tmp_path / "x", toy.manifest())
    checkpoint.write(tmp_path / "x", snapshot(toy, 1).at_hand, toy.manifest())
    content, header = tensors.read(tmp_path / "x")
    (tmp_path / "x").write_bytes(tensors.encode(content, {**header, "format": "2"}))
    with pytest.raises(StateError, match="state format '2', this reads 1"):
        checkpoint.read(tmp_path / "x", toy.manifest())


HEADERS = [
    ("counters", '{"frames": 1e999}'),
    ("counters", '{"frames": -1}'),
    ("counters", '{"frames": 9007199254740992}'),
    ("counters", '{"frames": "3"}'),
    ("counters", "[" * 9000),
    ("counters", "[]"),
    ("hyper", '{"mix": 1' + "0" * 400 + "}"),
    ("hyper", '{"mix": NaN}'),
    ("hyper", "3"),
    ("hyper", "[" + "[]," * 300_000 + "0]"),
    ("generation", "-1"),
    ("generation", "9007199254740992"),
    ("generation", "9" * 4000),
    ("generation", None),
    ("kept", "[" * 9000),
    ("model", None),
    ("weights_sha256", None),
    ("compatible", None),
]


@pytest.mark.parametrize(("key", "value"), HEADERS)
def test_a_header_that_lies_is_refused_though_its_checksum_knows_of_it(toy, tmp_path, key, value):
    checkpoint.write(tmp_path / "x", snapshot(toy, 1).at_hand, toy.manifest())
    content, header = tensors.read(tmp_path / "x")
    header = {name: text for name, text in {**header, key: value}.items() if name != "sha256" and text is not None}
    (tmp_path / "x").write_bytes(tensors.encode(content, {**header, "sha256": checkpoint._checksum(header, content)}))
    with pytest.raises(StateError) as caught:
        checkpoint.read(tmp_path / "x", toy.manifest())
    assert len(str(caught.value)) < 1000


def test_the_state_of_a_model_with_an_odd_name_is_refused_in_print(toy, tmp_path):
    manifest = toy.manifest()
    other = dataclasses.replace(manifest, model=dataclasses.replace(manifest.model, name="x\x1b[2J" + "y" * 10**5, weights_sha256="0" * 64))
    checkpoint.write(tmp_path / "x", snapshot(toy, 1).at_hand, other)
    with pytest.raises(StateError, match=r"state of 'x\\x1b\[2Jyy.*other frozen weights") as caught:
        checkpoint.read(tmp_path / "x", toy.manifest())
    assert len(str(caught.value)) < 1000


def test_a_file_larger_than_a_state_can_be_is_not_read(toy, tmp_path, monkeypatch):
    """It may be a sparse one of any size."""
    checkpoint.write(tmp_path / "x", snapshot(toy, 1).at_hand, toy.manifest())
    content, header = tensors.read(tmp_path / "x")
    content = {**content, "start norm.gamma": np.zeros(4096, np.float32)}
    (tmp_path / "x").write_bytes(tensors.encode(content, header))
    monkeypatch.setattr(tensors.Stored, "__getitem__", lambda *given: pytest.fail("it is read"))
    with pytest.raises(StateError, match=r"holds \d+ bytes of tensors; of this bundle's state it can be \d+ at most"):
        checkpoint.read(tmp_path / "x", toy.manifest())


def test_a_pipe_in_the_place_of_a_state_is_not_waited_for(toy, tmp_path):
    os.mkfifo(tmp_path / "a.safetensors")
    with pytest.raises(StateError, match="it is not a file"):
        checkpoint.read(tmp_path / "a.safetensors", toy.manifest())
    with pytest.raises(StateError, match="it is not a file"):
        Slots(tmp_path, toy.manifest()).newest()


FUZZ = settings(max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture])


@FUZZ
@given(data=some.data())
def test_a_damaged_file_is_refused_or_holds_the_same(toy, tmp_path, data):
    saved = snapshot(toy, 2)
    path = tmp_path / "x"
    checkpoint.write(path, saved.at_hand, toy.manifest())
    whole = bytearray(path.read_bytes())
    whole[data.draw(some.integers(0, len(whole) - 1))] ^= data.draw(some.integers(1, 255))
    size = data.draw(some.sampled_from([len(whole), data.draw(some.integers(0, len(whole)))]))
    path.write_bytes(whole[:size])
    try:
        assert same(checkpoint.read(path, toy.manifest()), saved)
    except StateError:
        return


def test_tampered_counters_are_noticed(toy, tmp_path):
    checkpoint.write(tmp_path / "x", snapshot(toy, 1).at_hand, toy.manifest())
    content, header = tensors.read(tmp_path / "x")
    (tmp_path / "x").write_bytes(tensors.encode(content, {**header, "counters": '{"frames": 0, "steps": 2}'}))
    with pytest.raises(StateError, match="checksum differs"):
        checkpoint.read(tmp_path / "x", toy.manifest())


def test_slots_take_turns_and_the_newest_counts(toy, tmp_path):
    slots = Slots(tmp_path / "s", toy.manifest())
    with pytest.raises(StateError, match="holds no saved state"):
        slots.newest()
    names = [slots.save(snapshot(toy, seed).at_hand).name for seed in range(1, 6)]
    assert names == ["a.safetensors", "b.safetensors"] * 2 + ["a.safetensors"]
    assert same(slots.newest(), snapshot(toy, 5))
    assert same(Slots(tmp_path / "s", toy.manifest()).newest(), snapshot(toy, 5))


@pytest.mark.parametrize(
    "damage", [lambda path: path.write_bytes(path.read_bytes()[:-9]), lambda path: path.write_bytes(b""), lambda path: path.unlink()]
)
def test_a_damaged_newest_slot_falls_back_to_the_one_before(toy, tmp_path, damage):
    slots = Slots(tmp_path, toy.manifest())
    for seed in (1, 2, 3):
        newest = slots.save(snapshot(toy, seed).at_hand)
    damage(newest)
    assert same(slots.newest(), snapshot(toy, 2))
    assert slots.save(snapshot(toy, 4).at_hand) == newest  # and never over the only sound one
    assert same(slots.newest(), snapshot(toy, 4))


def test_two_damaged_slots_say_why(toy, tmp_path):
    slots = Slots(tmp_path, toy.manifest())
    for seed in (1, 2):
        slots.save(snapshot(toy, seed).at_hand).write_bytes(b"x" * 99)
    with pytest.raises(StateError, match="not a sound safetensors file"):
        slots.newest()
    slots.save(snapshot(toy, 3).at_hand)
    assert same(slots.newest(), snapshot(toy, 3))


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_save_that_fails_leaves_the_one_before_and_no_rubbish(toy, tmp_path, monkeypatch, call):
    slots = Slots(tmp_path, toy.manifest())
    slots.save(snapshot(toy, 1).at_hand)

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(StateError, match="No space left on device"):
            slots.save(snapshot(toy, 2).at_hand)
    assert same(slots.newest(), snapshot(toy, 1))
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


CRASH = """
import os, sys
from pathlib import Path
from edgeadapt.runtime.checkpoint import Slots
from tests.test_state import snapshot
from tests.toybundle import Toy
toy = Toy()
setattr(os, sys.argv[2], lambda *_: os._exit(9))
Slots(Path(sys.argv[1]), toy.manifest()).save(snapshot(toy, 3).at_hand)
"""


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_process_that_dies_while_saving_loses_nothing(toy, tmp_path, call):
    slots = Slots(tmp_path, toy.manifest())
    for seed in (1, 2):
        slots.save(snapshot(toy, seed).at_hand)
    run = subprocess.run([sys.executable, "-c", CRASH, str(tmp_path), call], cwd=ROOT, env=environment())
    assert run.returncode == 9
    assert len(list(tmp_path.iterdir())) == 3  # the torn file is there
    assert same(slots.newest(), snapshot(toy, 2))
    slots.save(snapshot(toy, 4).at_hand)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]
    assert same(slots.newest(), snapshot(toy, 4))


def test_a_folder_that_cannot_be_written_is_named(toy, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StateError, match="cannot be saved"):
        Slots(tmp_path / "file", toy.manifest()).save(snapshot(toy, 1).at_hand)
    with pytest.raises(StateError, match="cannot be saved"):
        checkpoint.write(tmp_path / "no" / "folder" / "x", snapshot(toy, 1).at_hand, toy.manifest())
