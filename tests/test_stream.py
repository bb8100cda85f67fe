"""Frames answered one at a time, steps on every n-th window, and frames that hardly differ."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from edgeadapt.cli.main import main
from edgeadapt.devices.sources import Frame
from edgeadapt.errors import UsageError
from edgeadapt.preprocess import prepare
from edgeadapt.runtime.adapter import Adapter
from edgeadapt.runtime.stream import Stream
from tests.toybundle import SIDE, Toy

pytestmark = pytest.mark.device

WINDOW = 4


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return Toy(batches=(1, 2, 4)).write(tmp_path_factory.mktemp("bundle") / "toy.edgeadapt")


def frames(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, SIDE, SIDE, 3), dtype=np.uint8)


def served(x: np.ndarray) -> Iterator[Frame]:
    return (Frame(index, row) for index, row in enumerate(x))


def test_each_frame_is_answered_by_the_state_as_it_stands(path):
    """The same logits and the same state, to the bit, as predicting frame by frame and adapting on what has come."""
    x = frames(3 * WINDOW + 2)
    with Adapter.open(path) as adapter, Adapter.open(path) as plain:
        stream = Stream(adapter, window=WINDOW, single=True)
        found = list(stream.run(served(x)))
        assert [len(one) for one in found] == [1] * len(x)
        for index, (one,) in enumerate(found):
            if index and index % WINDOW == 0:
                plain.adapt(x[index - WINDOW : index])
            assert np.array_equal(one.logits, plain.predict(x[index], update_statistics=False))
            assert one.adapted == (index > 0 and index % WINDOW == 0)
            assert one.index == index
        assert all(np.array_equal(value, plain.state[name]) for name, value in adapter.state.items())
        assert (stream.windows, stream.steps, adapter.stats["steps"]) == (3, 3, 3)


@pytest.mark.parametrize("single", [False, True])
def test_raw_values_are_scaled_once(tmp_path, single):
    """A bundle that scales what the sensor gives answers raw values as one that does not answers scaled ones."""
    toy = Toy(batches=(1, 2, 4))
    plain = toy.write(tmp_path / "plain.edgeadapt", input=replace(toy.manifest().input, resize=None, mean=None, std=None))
    spec = replace(toy.manifest().input, resize=None, mean=(4.0, 5.0, 6.0), std=(2.0, 0.5, 8.0), raw=True)
    raw = toy.write(tmp_path / "raw.edgeadapt", input=spec)
    x = 3 * np.random.default_rng(0).standard_normal((2 * WINDOW + 1, 3, SIDE, SIDE)).astype(np.float32)
    scaled, found = prepare(x, spec), []
    for path, given in ((plain, scaled), (raw, x)):
        with Adapter.open(path, answering=True) as adapter:
            stream = Stream(adapter, window=WINDOW, single=single, alike=0.0 if single else None)
            found.append([one.logits for some in stream.run(served(given)) for one in some])
            found[-1] += [adapter.predict(given), adapter.adapt(given[:4]), adapter.answer(given[0]), adapter.source(given[:2])]
            assert adapter.stats["steps"] == 3
    assert all(np.array_equal(one, other) for one, other in zip(*found, strict=True))
    assert np.isfinite(found[0][0]).all()


def test_no_steps_are_taken_while_it_rests(path):
    x = frames(4 * WINDOW + 1)
    with Adapter.open(path) as adapter, Adapter.open(path) as plain:
        stream = Stream(adapter, window=WINDOW, single=True)
        for index, _ in enumerate(stream.run(served(x))):
            stream.resting = WINDOW <= index < 3 * WINDOW
            if index and index % WINDOW == 0:
                given = x[index - WINDOW : index]
                (plain.predict if index in (2 * WINDOW, 3 * WINDOW) else plain.adapt)(given)
        assert (stream.windows, stream.steps, adapter.stats["steps"]) == (4, 2, 2)
        assert all(np.array_equal(value, plain.state[name]) for name, value in adapter.state.items())
        assert not stream.busy


def test_bad_frames_join_no_window(path):
    x = frames(9)
    given = [Frame(index, None if index in (1, 5) else x[index], fault="torn" if index == 1 else "") for index in range(9)]
    with Adapter.open(path) as adapter, Adapter.open(path) as plain:
        found = [one for (one,) in Stream(adapter, window=WINDOW, single=True).run(given)]
        plain.adapt(x[[0, 2, 3, 4]])
        assert np.array_equal(found[6].logits, plain.predict(x[6], update_statistics=False))
    assert [one.logits is None for one in found] == [index in (1, 5) for index in range(9)]
    assert found[5].frame.fault == "has no pixels"


def test_a_window_is_adapted_on_after_its_last_answer(path):
    """Whoever has that answer has not waited for the step."""
    with Adapter.open(path) as adapter:
        answers = Stream(adapter, window=WINDOW, single=True).run(served(frames(WINDOW)))
        for _ in range(WINDOW):
            next(answers)
        assert adapter.stats["steps"] == 0
        assert list(answers) == []
        assert adapter.stats["steps"] == 1


def test_only_predicting_changes_nothing(path):
    with Adapter.open(path) as adapter:
        before = adapter.state
        stream = Stream(adapter, False, single=True)
        list(stream.run(served(frames(9))))
        assert all(np.array_equal(value, before[name]) for name, value in adapter.state.items())
        assert stream.windows == 0


@pytest.mark.parametrize("single", [False, True])
def test_steps_on_every_third_window(path, single):
    """Statistics follow the windows between."""
    x = frames(7 * WINDOW)
    with Adapter.open(path) as adapter, Adapter.open(path) as plain:
        stream = Stream(adapter, window=WINDOW, single=single, every=3)
        list(stream.run(served(x)))
        for index in range(7):
            window = x[index * WINDOW : (index + 1) * WINDOW]
            plain.adapt(window) if index % 3 == 0 else plain.predict(window)
        assert all(np.array_equal(value, plain.state[name]) for name, value in adapter.state.items())
        assert (stream.windows, stream.steps, adapter.stats["steps"]) == (7, 3, 3)


def test_frames_that_hardly_differ_join_no_window(path):
    """Repetitions are answered, and neither they nor small changes fill a window; what differs from the last one in it does."""
    x = frames(WINDOW)
    near = np.clip(x.astype(np.int16) + 1, 0, 255).astype(np.uint8)
    given = np.concatenate([np.stack([one, other, one]) for one, other in zip(x, near)])
    with Adapter.open(path) as adapter, Adapter.open(path) as plain:
        stream = Stream(adapter, window=WINDOW, single=True, alike=0.02)
        assert len(list(stream.run(served(given)))) == 3 * WINDOW
        plain.adapt(x)
        assert all(np.array_equal(value, plain.state[name]) for name, value in adapter.state.items())
        assert (stream.windows, stream.repeated) == (1, 2 * WINDOW)
        exact = Stream(adapter, window=WINDOW, single=True, alike=0.0)
        list(exact.run(served(np.concatenate([x[:1]] * 9 + [x[1:2]]))))
        assert exact.repeated == 8


@pytest.mark.parametrize(
    ("choices", "message"),
    [({"every": 0}, "every = 0"), ({"alike": 0.1}, "answered together"), ({"single": True, "alike": -1.0}, "alike = -1 is no difference")],
)
def test_what_cannot_be_is_refused(path, choices, message):
    with Adapter.open(path) as adapter, pytest.raises(UsageError, match=message):
        Stream(adapter, **choices)


def test_the_command_line_serves_frame_by_frame(path, tmp_path, capsys):
    np.savez(tmp_path / "x.npz", x=frames(10))
    given = ["run", str(path), "--source", str(tmp_path / "x.npz"), "--batch", str(WINDOW), "--single", "--every", "2", "--no-prepared"]
    assert main(given) == 0
    told = capsys.readouterr()
    lines = [json.loads(line) for line in told.out.splitlines()]
    assert [line["index"] for line in lines] == list(range(10))
    assert [line["adapted"] for line in lines] == [index in (4, 8) for index in range(10)]
    assert main([*given[:4], "--alike", "0.1"]) == 2
    assert "answered together" in capsys.readouterr().err
