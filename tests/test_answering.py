"""Frames answered while a step runs, and the cap on what an answer may take."""

from __future__ import annotations

import gc
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from edgeadapt.bundle import Bundle
from edgeadapt.cli.main import main
from edgeadapt.devices import boards
from edgeadapt.devices.sources import Frame
from edgeadapt.errors import BudgetError, InputError, UsageError
from edgeadapt.memory.ledger import Setup, ledger
from edgeadapt.memory.simulation import simulate
from edgeadapt.runtime import beside as beside_module
from edgeadapt.runtime.adapter import Adapter
from edgeadapt.runtime.beside import Beside
from edgeadapt.runtime.memory import Needs, planned
from edgeadapt.runtime.pressure import Level
from edgeadapt.runtime.stream import Stream
from edgeadapt.runtime.turns import Turns
from tests.child import run_json
from tests.test_budget import ENOUGH, shaped, watched
from tests.toybundle import SIDE, Toy

pytestmark = pytest.mark.device

WINDOW = 4


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return shaped(Toy(batches=(1, WINDOW))).write(tmp_path_factory.mktemp("bundle") / "toy.edgeadapt")


def frames(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, SIDE, SIDE, 3), dtype=np.uint8)


def one_by_one(adapter: Adapter, x: np.ndarray) -> np.ndarray:
    return np.stack([adapter.predict(frame, update_statistics=False) for frame in x])


class Held:
    """The next step of an adapter begins, tells, and waits until it is let go."""

    def __init__(self, adapter: Adapter, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun, self.go, service = threading.Event(), threading.Event(), adapter._service
        real = service.run

        def run(name: str, *rest: Any) -> Any:
            if name.startswith("adapt"):
                self.begun.set()
                assert self.go.wait(30)
            return real(name, *rest)

        monkeypatch.setattr(service, "run", run)


# ------------------------------------------------------------------------------------------------------------- answers


@pytest.mark.parametrize("budget", [None, ENOUGH])
def test_answers_are_of_the_state_as_it_was_made_known(path, budget):
    x = frames(9)
    with Adapter.open(path, budget, answering=True) as adapter, Adapter.open(path, budget) as plain:
        first = one_by_one(plain, x)
        assert np.array_equal(adapter.answer(x), first)
        adapter.adapt(x[:WINDOW])
        plain.adapt(x[:WINDOW])
        then = one_by_one(plain, x)
        assert not np.array_equal(then, first)
        assert np.array_equal(adapter.answer(x), first)
        adapter.publish()
        for _ in range(3):  # nothing of it changes with what is answered
            assert np.array_equal(adapter.answer(x), then)
        adapter.reset()
        assert np.array_equal(adapter.answer(x[0]), first[0])
        adapter.state = plain.state
        assert np.array_equal(adapter.answer(x), then)


def test_a_state_that_is_loaded_is_known(path, tmp_path):
    x = frames(WINDOW)
    with Adapter.open(path, answering=True) as adapter, Adapter.open(path) as plain:
        plain.adapt(x)
        adapter.load(plain.save(tmp_path / "state.safetensors"))
        assert np.array_equal(adapter.answer(x), one_by_one(plain, x))


def test_a_frame_is_answered_while_a_step_runs(path, monkeypatch):
    x = frames(WINDOW)
    with Adapter.open(path, ENOUGH, answering=True) as adapter, Adapter.open(path) as plain:
        held = Held(adapter, monkeypatch)
        step = threading.Thread(target=adapter.adapt, args=(x,))
        step.start()
        try:
            assert held.begun.wait(30)
            assert np.array_equal(adapter.answer(x), one_by_one(plain, x))  # else this waits for a step that waits for it
            assert adapter.stats["steps"] == 0
        finally:
            held.go.set()
            step.join()
        assert adapter.stats["steps"] == 1


def test_answers_beside_many_steps_are_each_of_a_state_that_was_made_known(path):
    """Two threads at once, and never a state that is half one and half another."""
    x = frames(64 * WINDOW)
    with Adapter.open(path, ENOUGH, answering=True) as adapter, Adapter.open(path) as plain:
        known = [plain.predict(x[0], False)]
        for begin in range(0, len(x), WINDOW):
            plain.adapt(x[begin : begin + WINDOW])
            known.append(plain.predict(x[0], False))

        def steps() -> None:
            for begin in range(0, len(x), WINDOW):
                adapter.adapt(x[begin : begin + WINDOW])
                adapter.publish()

        thread, found = threading.Thread(target=steps), []
        thread.start()
        while thread.is_alive():
            found.append(adapter.answer(x[0]))
        thread.join()
        found.append(adapter.answer(x[0]))
    place = [next(index for index, one in enumerate(known) if np.array_equal(one, logits)) for logits in found]
    assert place == sorted(place)
    assert place[-1] == len(known) - 1


def test_frames_are_counted_and_bad_ones_have_no_logits(path):
    x = np.random.default_rng(0).normal(size=(3, 3, SIDE, SIDE)).astype(np.float32)
    x[1, 0, 0, 0] = np.nan
    with Adapter.open(path, answering=True) as adapter:
        logits = adapter.answer(x)
        assert np.isfinite(logits).all(1).tolist() == [True, False, True]
        assert np.isfinite(adapter.answer(x[0])).all()
        assert (adapter.stats["frames"], adapter.stats["bad_frames"]) == (4, 1)
        with pytest.raises(InputError):
            adapter.answer(x[0, 0])


def test_scalars_that_are_made_known_are_the_bundles(path):
    with Adapter.open(path, answering=True) as adapter:
        for wrong, said in (({"nothing": 1.0}, "no scalar 'nothing'"), ({"rate": -1.0}, "out of range")):
            with pytest.raises(UsageError, match=said):
                adapter.publish(**wrong)
        assert adapter._service.answers.hyper == {}


def test_a_closed_adapter_answers_nobody(path):
    adapter, pressure = watched(path, answering=True)
    pressure.signs.grade = 2
    while adapter.level < Level.PREDICT:
        adapter.answer(frames(1))
    adapter.close()
    pressure.signs.grade = 0
    for call in (lambda: adapter.answer(frames(1)), lambda: adapter.predict(frames(1)), adapter.publish):
        with pytest.raises(UsageError, match="this adapter is closed"):
            call()
    assert adapter._service._engine is None
    assert adapter._service.answers._engine is None


def test_where_memory_is_refused_a_frame_is_predicted_as_any_other(path, monkeypatch):
    x = frames(2)
    with Adapter.open(path, ENOUGH, answering=True) as adapter:
        known = adapter.answer(x)

        def refused(*_: Any, **__: Any) -> Any:
            raise BudgetError("memory ran out", "give more")

        monkeypatch.setattr(adapter._service.answers._engine, "run", refused)
        assert np.array_equal(adapter.answer(x), known)
        assert adapter.stats["frames"] == 4


def test_who_did_not_ask_for_it_cannot_have_it(path):
    with Adapter.open(path) as adapter:
        for call in (adapter.publish, lambda: adapter.answer(frames(1))):
            with pytest.raises(UsageError, match="opened without answering"):
                call()
        with pytest.raises(UsageError, match="opened without answering"):
            Stream(adapter, window=WINDOW, single=True, cap=5.0)


def test_where_memory_is_short_frames_wait_for_their_turn_and_later_not(path):
    x = frames(WINDOW)
    adapter, pressure = watched(path, answering=True)
    with adapter, Adapter.open(path) as plain:
        adapter.adapt(x)
        adapter.publish()
        known = adapter.answer(x)
        pressure.signs.grade = 2
        while adapter.level < Level.PREDICT:
            adapter.answer(x[0])  # looks at memory too
        assert adapter._service.answers._engine is None
        assert np.array_equal(adapter.answer(x), one_by_one(adapter, x))
        pressure.signs.grade = 0
        while adapter.level:
            adapter.answer(x[0])
        assert adapter._service.answers._engine is not None
        assert np.array_equal(adapter.answer(x), known)
        plain.adapt(x)
        assert np.array_equal(known, one_by_one(plain, x))


# -------------------------------------------------------------------------------------------------------------- memory


def test_the_plan_has_a_line_of_it_and_the_simulator_the_same(path):
    bundle = Bundle.open(path)
    names = ["predict.b1", f"predict.b{WINDOW}", f"adapt.b{WINDOW}"]
    plan, without = (planned(Needs(bundle, 1), names, answering=answering) for answering in (True, False))
    assert "answering" not in without.lines()
    line = plan.lines()["answering"]
    assert plan.lines()["graph structures"] / 4 < line < plan.lines()["graph structures"]
    assert plan.answering is not None
    assert 0 < plan.answering.region.size < plan.region.size
    told = ledger(bundle, Setup(tuple(names), 40 * 2**20, answering=True))["answering"].bytes
    assert abs(told - line) < 0.02 * line


def test_a_budget_without_room_for_it_is_refused(path):
    with Adapter.open(path, ENOUGH, answering=True) as adapter:
        need = adapter.memory["answering"]
        budget = adapter._claim.filled
    found: dict[int, list[bool]] = {}
    for less in range(0, 8 * need, need // 2):
        found[less] = [opens(path, budget - less, answering) for answering in (True, False)]
        gc.collect()
    assert found[0] == [True, True]
    assert [False, True] in found.values()  # then it is this that is too much
    with pytest.raises(BudgetError, match=r"\n *answering +[\d,]+ B") as caught:
        Adapter.open(path, budget - 40 * 2**20, answering=True)
    assert "or do not answer frames while a step runs (--cap), which takes" in caught.value.hint


def opens(path: Any, budget: int, answering: bool) -> bool:
    """Whether all of a bundle fits."""
    try:
        Adapter.open(path, budget, strict=True, answering=answering).close()
    except BudgetError:
        return False
    return True


HELD = """
import json, re, sys
import numpy as np
from edgeadapt import Adapter
from edgeadapt.devices.sources import Frame
from edgeadapt.errors import BudgetError
from edgeadapt.runtime.stream import Stream
path, windows = sys.argv[1], int(sys.argv[2])
try:
    Adapter.open(path, "1MiB", roles="adapt", batches=[16], answering=True)
except BudgetError as refusal:
    budget = int(re.search(r"adapt at batch 16 needs ([0-9]+) MiB", refusal.hint)[1]) * 2**20
adapter = Adapter.open(path, budget, roles="adapt", batches=[16], answering=True)
x = np.random.default_rng(0).standard_normal((16, *adapter.manifest.input.shape), dtype=np.float32)
stream = Stream(adapter, window=16, single=True, cap=1e6)
count = sum(len(one) for one in stream.run(Frame(str(index), x[index % 16]) for index in range(16 * windows)))
print(json.dumps({"budget": budget, "peak": adapter.memory["peak"], "level": adapter.memory["level"], "answers": count, "steps": stream.steps}))
"""


@pytest.mark.native
def test_answers_beside_steps_stay_within_the_budget_that_a_refusal_names(tmp_path):
    path = shaped(Toy(width=64, depth=3, batches=(1, 16))).write(tmp_path / "toy")
    found = run_json([sys.executable, "-c", HELD, str(path), "100"])
    assert found["peak"] <= found["budget"]
    assert found["answers"] == 1600
    assert found["steps"] > 1
    assert found["level"] == 0


def test_simulate_says_what_it_takes(path, capsys):
    assert main(["simulate", str(path), "--answering", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [line["name"] for line in found["ledger"]["lines"]].count("answering") == 1
    board = boards.load("orin-nano-8gb")
    with pytest.raises(UsageError, match="on the processor only"):
        simulate(Bundle.open(path), board, provider="cuda", answering=True)


# --------------------------------------------------------------------------------------------------- windows beside


class Work:
    """What is done with windows, each only when it is let go; and what became of it."""

    def __init__(self) -> None:
        self.done: list[int] = []
        self.go = threading.Semaphore(0)
        self.fails = False

    def __call__(self, window: int) -> bool:
        assert self.go.acquire(timeout=30)
        if self.fails:
            raise BudgetError("memory ran out", "give more")
        self.done.append(window)
        return window % 2 == 0


def ended(beside: Beside) -> bool:
    """What it says of work that was let go."""
    limit = time.monotonic() + 30
    while beside._going is not None and not beside._going.done():
        assert time.monotonic() < limit
        time.sleep(0.001)
    return beside.ended()


def test_a_window_that_fills_before_the_last_is_done_is_passed_over():
    work = Work()
    beside = Beside(work)
    assert beside.full(0)
    assert not beside.ended()
    assert not beside.full(1)
    assert not beside.full(2)
    work.go.release()
    assert ended(beside)
    assert not beside.ended()  # told once
    assert beside.full(3)
    work.go.release()
    assert not ended(beside)
    assert (work.done, beside.passed, beside.late) == ([0, 3], 2, 0)
    beside.close()


def test_late_answers_have_ever_more_windows_passed_over_and_timely_ones_fewer():
    work = Work()
    beside = Beside(work)

    def one(late: bool) -> int:
        """Windows that were passed over until the next was begun, after work with such an answer beside it."""
        beside.answered(late)
        work.go.release()
        ended(beside)
        before = beside.passed
        while not beside.full(0):
            assert beside.passed < 1000
        return beside.passed - before

    assert beside.full(0)
    assert [one(True) for _ in range(8)] == [1, 2, 4, 8, 16, 32, 64, 64]
    assert [one(False) for _ in range(7)] == [32, 16, 8, 4, 2, 1, 0]
    assert beside.late == 8
    work.go.release()
    beside.close()


def test_an_answer_that_is_late_by_itself_changes_nothing():
    work = Work()
    beside = Beside(work)
    beside.answered(True)
    work.go.release()
    assert beside.full(0)
    ended(beside)
    assert beside.full(1)
    work.go.release()
    beside.close()
    assert (beside.late, beside.passed) == (1, 0)


def test_what_work_raises_is_raised_where_it_is_asked_for_or_at_the_end():
    for close in (False, True):
        work = Work()
        work.fails = True
        beside = Beside(work)
        assert beside.full(0)
        work.go.release()
        with pytest.raises(BudgetError, match="memory ran out"):
            beside.close() if close else ended(beside)
        if not close:
            beside.close()


def test_work_gives_way():
    found: list[int] = []
    beside = Beside(lambda _: bool(found.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))))
    assert beside.full(0)
    beside.close()
    assert found == [min(19, os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) + 10)]


def test_an_attempt_at_a_turn_waits_for_nobody():
    turns, inside, leave = Turns(), threading.Event(), threading.Event()

    def hold() -> None:
        with turns():
            inside.set()
            assert leave.wait(30)

    with turns.attempt() as mine:
        assert mine
    thread = threading.Thread(target=hold)
    thread.start()
    assert inside.wait(30)
    with turns.attempt() as mine:
        assert not mine
    leave.set()
    thread.join()
    with turns.attempt() as mine:
        assert mine
    with turns():
        pass


# -------------------------------------------------------------------------------------------------------------- stream


def served(x: np.ndarray, wait: Any = None) -> Iterator[Frame]:
    for index, row in enumerate(x):
        if wait is not None:
            wait(index)
        yield Frame(index, row)


@pytest.fixture
def working(monkeypatch: pytest.MonkeyPatch) -> list[Beside]:
    """What streams that are served meanwhile work with."""
    made: list[Beside] = []

    class Seen(Beside):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            made.append(self)

    monkeypatch.setattr(beside_module, "Beside", Seen)
    return made


def idle(made: list[Beside]) -> None:
    """Waits until nothing is worked on."""
    limit = time.monotonic() + 30
    while made and made[-1]._going is not None and not made[-1]._going.done():
        assert time.monotonic() < limit
        time.sleep(0.001)


def test_where_steps_end_before_the_next_frame_a_cap_changes_nothing(path, working):
    x = frames(5 * WINDOW + 2)
    with Adapter.open(path, ENOUGH, answering=True) as adapter, Adapter.open(path, ENOUGH) as plain:
        stream = Stream(adapter, window=WINDOW, single=True, cap=1e6)
        found = [one for (one,) in stream.run(served(x, lambda _: idle(working)))]
        wanted = [one for (one,) in Stream(plain, window=WINDOW, single=True).run(served(x))]
        assert all(np.array_equal(one.logits, other.logits) for one, other in zip(found, wanted, strict=True))
        assert [one.adapted for one in found] == [one.adapted for one in wanted]
        assert (stream.windows, stream.steps, stream.late, stream.passed) == (5, 5, 0, 0)
        assert all(np.array_equal(value, plain.state[name]) for name, value in adapter.state.items())


def test_frames_go_on_while_a_step_runs(path, monkeypatch, working):
    """Frames that come meanwhile are answered by the state before it, and the windows that they fill are passed over."""
    x = frames(3 * WINDOW + 2)
    with Adapter.open(path, answering=True) as adapter, Adapter.open(path) as plain:
        before = one_by_one(plain, x)
        held = Held(adapter, monkeypatch)
        stream = Stream(adapter, window=WINDOW, single=True, cap=1e6)
        answers = stream.run(served(x))
        found = [next(answers)[0] for _ in range(3 * WINDOW + 1)]
        assert held.begun.wait(30)
        assert np.array_equal(np.stack([one.logits for one in found]), before[: 3 * WINDOW + 1])
        assert not any(one.adapted for one in found)
        assert stream.windows == 1
        held.go.set()
        idle(working)
        ((last,),) = list(answers)
        plain.adapt(x[:WINDOW])
        assert np.array_equal(last.logits, plain.predict(x[-1], False))
        assert last.adapted
        assert (stream.windows, stream.passed) == (1, 2)
        assert adapter.stats["frames"] == len(x) + WINDOW
        more = [one.index for (one,) in stream.run(served(x[:2]), len(x))]
        assert (more, stream.windows, stream.passed) == ([len(x), len(x) + 1], 1, 2), "counts go on"


def test_a_cap_that_no_answer_keeps_has_few_windows_adapted_on(path, monkeypatch):
    """Each step here goes on until a frame was answered beside it, or there are none any more."""
    with Adapter.open(path, answering=True) as adapter:
        answered, over, real, run = threading.Semaphore(0), threading.Event(), adapter.answer, adapter._service.run

        def answer(x: np.ndarray) -> np.ndarray:
            logits = real(x)
            answered.release()
            return logits

        def slow(name: str, *rest: Any) -> Any:
            while name.startswith("adapt") and answered.acquire(blocking=False):
                pass
            while name.startswith("adapt") and not over.is_set() and not answered.acquire(timeout=0.05):
                pass
            return run(name, *rest)

        def all_frames() -> Iterator[Frame]:
            yield from served(frames(40 * WINDOW + 1))
            over.set()

        monkeypatch.setattr(adapter, "answer", answer)
        monkeypatch.setattr(adapter._service, "run", slow)
        stream = Stream(adapter, window=WINDOW, single=True, cap=1e-6)
        answers = [one for (one,) in stream.run(all_frames())]
        assert len(answers) == 40 * WINDOW + 1
        assert stream.late == 40 * WINDOW + 1
        assert stream.windows + stream.passed == 40
        assert stream.windows <= 7  # after the first 1, then 2, 4, 8, 16 are passed over


def test_bad_frames_and_a_source_that_breaks_off(path):
    x = frames(WINDOW + 1)

    def source() -> Iterator[Frame]:
        yield Frame("torn", None, fault="torn")
        yield from served(x)
        raise KeyboardInterrupt

    with Adapter.open(path, answering=True) as adapter:
        stream, found = Stream(adapter, window=WINDOW, single=True, cap=1e6), []
        with pytest.raises(KeyboardInterrupt):
            found.extend(one for (one,) in stream.run(source()))
        assert found[0].logits is None
        assert found[0].frame.fault == "torn"
        assert all(one.logits is not None for one in found[1:])
        assert adapter.stats["steps"] == 1  # the step that went on was waited for


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"single": False, "cap": 5.0}, "frames of a window wait for each other"),
        ({"adapt": False, "cap": 5.0}, "there are none"),
        ({"cap": 0.0}, "cap = 0 is no time"),
        ({"cap": float("nan")}, "cap = nan is no time"),
    ],
)
def test_a_cap_that_bounds_nothing_is_refused(path, options, said):
    with Adapter.open(path, answering=True) as adapter, pytest.raises(UsageError, match=said):
        Stream(adapter, window=WINDOW, **{"single": True, **options})


def test_run_tells_of_its_cap(path, tmp_path, capsys):
    np.savez(tmp_path / "frames.npz", x=frames(6 * WINDOW))
    words = ["run", str(path), "--source", str(tmp_path / "frames.npz"), "--single", "--batch", str(WINDOW), "--budget", ENOUGH, "--no-prepared"]
    assert main([*words, "--cap", "1e6", "--report", str(tmp_path / "report")]) == 0
    seen = capsys.readouterr()
    assert len(seen.out.splitlines()) == 6 * WINDOW
    assert "0 of 24 answers took more than 1e+06 ms" in seen.err
    told = json.loads((tmp_path / "report" / "report.json").read_text())
    assert told["cap_ms"] == 1e6
    assert told["late"] == 0
    assert main([*words, "--cap", "9", "--provider", "cuda"]) == 2
    assert "--cap answers frames on the processor only" in capsys.readouterr().err
    assert main([*words, "--cap", "0"]) == 2
    assert "cap = 0 is no time" in capsys.readouterr().err


def test_who_interrupts_has_a_step_that_goes_on_waited_for(path, tmp_path, monkeypatch, capsys):
    """What is saved then is what came of it, and nothing of it fails."""
    np.savez(tmp_path / "frames.npz", x=frames(WINDOW + 2))
    real, begun, told = Adapter.adapt, threading.Event(), []

    def adapt(adapter: Adapter, x: np.ndarray, **scalars: float) -> np.ndarray:
        begun.set()
        time.sleep(0.2)
        found = real(adapter, x, **scalars)
        told.append(adapter.state)
        return found

    class Gone:
        def write(self, text: str) -> int:
            if f'"index": {WINDOW},' in text:
                assert begun.wait(30)
                raise KeyboardInterrupt
            return len(text)

        def flush(self) -> None:
            pass

    monkeypatch.setattr(Adapter, "adapt", adapt)
    monkeypatch.setattr(sys, "stdout", Gone())
    saved = tmp_path / "state.safetensors"
    main(["run", str(path), "--source", str(tmp_path / "frames.npz"), "--single", "--batch", str(WINDOW), "--cap", "1e6", "--save", str(saved)])
    monkeypatch.undo()
    (state,) = told
    with Adapter.open(path) as adapter:
        adapter.load(saved)
        assert all(np.array_equal(value, state[name]) for name, value in adapter.state.items())
        assert adapter.stats["steps"] == 1


def test_what_a_step_raises_does_not_hide_what_was_raised_before(path, monkeypatch, caplog):
    def fails(*_: Any, **__: Any) -> Any:
        raise BudgetError("memory ran out", "give more")

    def source() -> Iterator[Frame]:
        yield from served(frames(WINDOW))
        raise KeyboardInterrupt

    with Adapter.open(path, answering=True) as adapter:
        monkeypatch.setattr(adapter, "adapt", fails)
        with pytest.raises(KeyboardInterrupt), caplog.at_level("ERROR", "edgeadapt"):
            list(Stream(adapter, window=WINDOW, single=True, cap=1e6).run(source()))
        assert "failed: memory ran out" in caplog.text
        with pytest.raises(BudgetError, match="memory ran out"):
            list(Stream(adapter, window=WINDOW, single=True, cap=1e6).run(served(frames(WINDOW))))
