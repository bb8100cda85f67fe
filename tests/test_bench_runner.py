"""Running a row over a stream: what is kept of every frame, in this process and through a child."""

from __future__ import annotations

import io
import os
import tracemalloc
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from edgeadapt import Adapter
from edgeadapt.bench import child as children
from edgeadapt.bench.child import Child, prepare
from edgeadapt.bench.frames import Samples
from edgeadapt.bench.runner import Answer, judged, run
from edgeadapt.bench.setting import ADAPT, INITIAL, SOURCE, Setting
from edgeadapt.bench.streams import Sizes, build, own
from edgeadapt.bench.wire import receive, send
from edgeadapt.devices.sources import Frame
from edgeadapt.errors import BudgetError, EdgeAdaptError, UsageError
from edgeadapt.runtime.benched import serve, windows
from edgeadapt.runtime.prepared import find
from tests.toybundle import CLASSES, SIDE, Toy

pytestmark = pytest.mark.device

COUNT = 20
IMAGES = np.random.default_rng(0).integers(0, 256, (COUNT, SIDE, SIDE, 3), dtype=np.uint8)
LABELS = np.random.default_rng(1).integers(0, CLASSES, COUNT)
DATA = Samples(IMAGES, LABELS)
SIZES = Sizes(frames=9, bad=4, corruptions=("contrast", "fog"))


class Plain:
    """Answers with the class of the first pixel."""

    def __init__(self, lose: int = 0) -> None:
        self._lose = lose

    def serve(self, frames: Iterator[np.ndarray]) -> Iterator[Answer]:
        answers = [Answer(np.eye(CLASSES, dtype=np.float32)[int(frame.flat[0]) % CLASSES], 0.5 * n, n % 2 == 0) for n, frame in enumerate(frames)]
        yield from answers[: len(answers) - self._lose] if self._lose >= 0 else [*answers, *answers]

    def facts(self) -> dict[str, Any]:
        return {"peak_bytes": 1234}


def test_what_came_of_every_frame_is_kept():
    stream, told = build("repeated", DATA, SIZES), []
    figures, columns = run(Plain(), stream, CLASSES, progress=lambda *a: told.append(a), stage="plain")
    x, y = stream.pixels(0, 13), stream.truth(0, 13)
    wrong = x[:, 0, 0, 0] % CLASSES != y
    assert columns["wrong"].tolist() == wrong.tolist()
    assert columns["confidence"] == pytest.approx(np.full(13, np.e / (np.e + CLASSES - 1)))
    assert columns["scored"].tolist() == [False] * 4 + [True] * 9
    assert columns["index"].tolist() == stream.index.tolist()
    assert figures["frames"] == 13
    assert figures["scored_frames"] == 9
    assert figures["adapted_frames"] == 7
    assert (figures["ms_p50"], figures["ms_p95"]) == pytest.approx((3.0, 5.7))
    assert figures["peak_bytes"] == 1234
    assert figures["joules_frame"] is None
    assert told[-1] == ("plain", 13, 13, f"error {100 * wrong[4:].mean():.1f} %")
    assert len(told) == 13


@pytest.mark.parametrize(("lose", "message"), [(1, "gave 12 answers to 13 frames"), (-1, "more answers than the 13 frames")])
def test_every_frame_has_one_answer(lose, message):
    with pytest.raises(EdgeAdaptError, match=message):
        run(Plain(lose), build("noise", DATA, SIZES), CLASSES)


def test_energy_is_counted_without_what_making_frames_takes():
    stream = build("continual", DATA, SIZES)
    joules = 0.0

    class Costly(Plain):
        def serve(self, frames: Iterator[np.ndarray]) -> Iterator[Answer]:
            nonlocal joules
            for frame in frames:
                joules += 3
                yield Answer(np.zeros(CLASSES, np.float32), 1.0, False)

    pixels = stream.pixels

    def dear(first: int, count: int) -> np.ndarray:
        nonlocal joules
        joules += 1000
        return pixels(first, count)

    stream.pixels = dear  # type: ignore[method-assign]
    figures, _ = run(Costly(), stream, CLASSES, energy=lambda: joules)
    assert figures["joules_frame"] == pytest.approx(3)
    assert run(Costly(), stream, CLASSES, energy=lambda: None)[0]["joules_frame"] is None


NAN, INF = np.float32("nan"), np.float32("inf")


@pytest.mark.parametrize(
    ("logits", "truth", "wrong", "confident"),
    [
        ([1.0, 3.0, 0.0], 1, 0.0, True),
        ([1.0, 3.0, 0.0], 0, 1.0, True),
        ([1.0, 3.0, 0.0], -1, None, True),
        ([1.0, 3.0, 0.0], 3, None, True),
        ([NAN, 3.0, 0.0], 1, 1.0, False),
        ([0.0, INF, 0.0], 1, 1.0, False),
        ([NAN, NAN, NAN], -1, None, False),
        (None, 1, 1.0, False),
        (None, -1, None, False),
        ([1e4, -1e4, 0.0], 0, 0.0, True),
    ],
)
def test_a_decision_is_right_wrong_or_not_known(logits, truth, wrong, confident):
    found, confidence = judged(None if logits is None else np.array(logits, np.float32), np.array(truth), 3)
    assert found == wrong if wrong is not None else np.isnan(found)
    assert np.isfinite(confidence) == confident


def test_confidence_is_the_probability_of_the_chosen_class():
    logits = np.array([0.3, 1.5, -2.0], np.float32)
    assert judged(logits, np.array(0), 3)[1] == pytest.approx(np.exp(1.5) / np.exp(logits.astype(float)).sum())


def test_of_pixels_the_share_counts():
    logits = np.zeros((3, 2, 2), np.float32)
    logits[1] = 1
    truth = np.array([[1, 1], [0, -1]])
    assert judged(logits, truth, 3)[0] == pytest.approx(1 / 3)
    confident = judged(logits, truth, 3)[1]
    logits[:, 1, 1] = [np.nan, 9, 0]  # of no class: it does not count
    assert judged(logits, truth, 3) == (pytest.approx(1 / 3), confident)
    logits[1, 0, 0] = np.nan
    wrong, confidence = judged(logits, truth, 3)
    assert wrong == pytest.approx(2 / 3)
    assert np.isnan(confidence)
    with pytest.raises(EdgeAdaptError, match="labels are of shape one a frame"):
        judged(logits, np.array(1), 3)
    with pytest.raises(EdgeAdaptError, match=r"the model decides once a frame, and the labels are of shape \(2, 2\)"):
        judged(logits[:, 0, 0], truth, 3)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return Toy(batches=(1, 4)).write(tmp_path_factory.mktemp("bundle") / "toy.edgeadapt")


def setting(path: Any, mode: str, **options: Any) -> Setting:
    return Setting(str(path), mode, **{"batch": 4, "prepared": False, **options})


@pytest.mark.parametrize("mode", [SOURCE, INITIAL, ADAPT])
def test_a_child_answers_as_an_adapter_does_here(mode, path):
    stream = build("continual", DATA, SIZES)
    figures, columns = run(Child(setting(path, mode)), stream, CLASSES)
    x = stream.pixels(0, len(stream))
    with Adapter.open(path) as adapter:
        calls = {SOURCE: adapter.source, INITIAL: lambda part: adapter.predict(part, update_statistics=False), ADAPT: adapter.adapt}
        logits = np.concatenate([calls[mode](x[k : k + 4]) for k in range(0, 16, 4)] + [(adapter.predict if mode == ADAPT else calls[mode])(x[16:])])
    expected = [judged(row, truth, CLASSES) for row, truth in zip(logits, stream.truth(0, 18))]
    assert columns["wrong"].tolist() == [wrong for wrong, _ in expected]
    assert columns["confidence"] == pytest.approx([confidence for _, confidence in expected], abs=1e-6)
    assert columns["adapted"].tolist() == [mode == ADAPT] * 16 + [False] * 2
    assert (columns["milliseconds"] > 0).all()
    assert figures["peak_bytes"] > 10**7
    assert figures["counters"]["steps"] == (4 if mode == ADAPT else 0)


def test_a_bundle_that_only_predicts_is_served_in_the_batches_that_are_loaded(path):
    x = DATA.x[:6]
    with Adapter.open(path, roles="predict", batches=[1], prepared=False) as adapter:
        served = list(windows(adapter, setting(path, INITIAL), (Frame(k, one) for k, one in enumerate(x))))
        assert [len(window) for window in served] == [4, 2]
        expected = adapter.predict(x, update_statistics=False)
    assert np.allclose([one.logits for window in served for one in window], expected, atol=1e-6)


def test_what_cannot_be_served_is_refused_when_it_is_prepared(path, monkeypatch):
    whole = Adapter.open
    monkeypatch.setattr(Adapter, "open", lambda *_, **__: whole(path, batches=[1], prepared=False))
    with pytest.raises(UsageError, match="this adapter was opened without adapt at batch 4"):
        serve(setting(path, ADAPT, prepare=True), io.BytesIO(), io.BytesIO())


def test_scalars_reach_the_child(path):
    stream = build("mixed", DATA, SIZES)
    _, usual = run(Child(setting(path, ADAPT)), stream, CLASSES)
    _, still = run(Child(setting(path, ADAPT, hyper={"rate": 0.0, "mix": 0.0})), stream, CLASSES)
    _, initial = run(Child(setting(path, INITIAL)), stream, CLASSES)
    assert usual["confidence"].tolist() != still["confidence"].tolist()
    assert still["confidence"] == pytest.approx(initial["confidence"], abs=1e-6)


def test_a_frame_that_cannot_be_used_is_wrong_and_counted(path):
    x = np.random.default_rng(3).standard_normal((7, 3, SIDE, SIDE)).astype(np.float32)
    x[[0, 2, 6], 0, 0, 0] = np.nan
    for mode in (SOURCE, ADAPT):
        figures, columns = run(Child(setting(path, mode)), own([Samples(x, LABELS[:7])]), CLASSES)
        assert figures["nonfinite"] == 3
        assert columns["wrong"][[0, 2, 6]].tolist() == [1, 1, 1]
        assert np.isnan(columns["confidence"]).tolist() == [True, False, True, False, False, False, True]


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"batch": 3}, UsageError, "no graph for batch 3"),
        ({"budget": 10**6}, BudgetError, "budget"),
        ({"hyper": {"speed": 1.0}}, UsageError, "speed"),
    ],
)
def test_errors_of_the_child_are_those_of_the_adapter(options, kind, message, path):
    with pytest.raises(kind, match=message):
        run(Child(setting(path, ADAPT, **options)), build("clean", DATA, SIZES), CLASSES)


def test_a_child_that_dies_is_told(path, monkeypatch):
    monkeypatch.setattr(children, "CHILD", "edgeadapt.no_such_module")
    with pytest.raises(EdgeAdaptError, match=r"the serving process ended with 1: .*No module named"):
        run(Child(setting(path, ADAPT)), build("clean", DATA, SIZES), CLASSES)


def test_a_bench_that_stops_half_way_leaves_no_child(path):
    served = Child(setting(path, ADAPT)).serve(iter(IMAGES))
    assert next(served).logits is not None
    served.close()


def test_preparing_serves_nothing_and_is_done_once(path, tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEADAPT_CACHE", str(tmp_path))
    from edgeadapt.bundle import Bundle

    told: list[str] = []
    for _ in range(2):
        prepare(setting(path, INITIAL, prepared=True), lambda stage, done, total, note="": told.append(stage))
    assert told
    assert find(Bundle.open(path), 1) is not None
    before = len(told)
    prepare(setting(path, INITIAL, prepared=True), lambda stage, done, total, note="": told.append(stage))
    assert len(told) == before


@pytest.mark.parametrize("array", [None, IMAGES[0], np.zeros((2, 0), np.float32), np.float32([1.5, np.nan])])
def test_messages_come_back_as_they_were_sent(array):
    pipe = io.BytesIO()
    send(pipe, "frame", {"n": 1}, array)
    send(pipe, "end")
    pipe.seek(0)
    kind, values, found = receive(pipe)
    assert (kind, values) == ("frame", {"n": 1})
    assert found is None if array is None else np.array_equal(found, array, equal_nan=array.dtype == np.float32) and found.shape == array.shape
    assert receive(pipe) == ("end", {}, None)
    assert receive(pipe) is None


def test_a_message_is_sent_without_copies_of_its_array():
    array = np.zeros((4, 256, 256), np.float32)
    with open(os.devnull, "wb") as file:
        tracemalloc.start()
        send(file, "answer", {}, array)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < array.nbytes / 4


@pytest.mark.parametrize("data", [b"hello\n", b"{}\n", b'{"kind": 1, "bytes": 4, "values": {}, "dtype": "object", "shape": [1]}\nabcd', b"[]\n"])
def test_what_is_no_message_is_refused(data):
    with pytest.raises(EdgeAdaptError, match="cannot be read"):
        receive(io.BytesIO(data))


def test_a_message_that_is_cut_short_is_the_end():
    pipe = io.BytesIO()
    send(pipe, "frame", None, IMAGES[0])
    for size in (0, 10, len(pipe.getvalue()) - 1):
        assert receive(io.BytesIO(pipe.getvalue()[:size])) is None
