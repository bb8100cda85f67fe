"""A guard beside answers: frames are answered by what it last decided, never by what it only compares with."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeadapt.devices.sources import Frame
from edgeadapt.runtime.adapter import Adapter
from edgeadapt.runtime.beside import Beside
from edgeadapt.runtime.guard import Guard
from edgeadapt.runtime.phases import Phase
from edgeadapt.runtime.stream import Prediction, Stream
from tests.test_answering import Held, idle, served, working  # noqa: F401
from tests.test_guard import OFTEN, WINDOW, bundles, images, net, shifted  # noqa: F401


def stream_of(windows: int) -> np.ndarray:
    """A shift, then one class of it alone."""
    x, _ = images(WINDOW * windows, 5)
    few, _ = images(WINDOW * 4, 6, (1,))
    return shifted(np.concatenate([x, few]))


@pytest.mark.parametrize("name", ["tent", "live"])
def test_with_time_enough_a_cap_changes_nothing(bundles: Mapping[str, Path], name: str, working: list[Beside]) -> None:  # noqa: F811
    """Logits, decisions and state are those without one, to the bit: with `few` as the guard has it."""
    x = stream_of(14)
    with Adapter.open(bundles[name], answering=True) as one, Adapter.open(bundles[name]) as other:
        found, decided = everything(one, x, 1e6, working)
        wanted, usual = everything(other, x, None, working)
        assert all(np.array_equal(left.logits, right.logits) for left, right in zip(found, wanted, strict=True))
        assert [left.adapted for left in found] == [right.adapted for right in wanted]
        assert decided == usual
        assert ("adapting" if name == "tent" else "observing") in decided
        assert all(np.array_equal(value, other.state[key]) for key, value in one.state.items())


def everything(adapter: Adapter, x: np.ndarray, cap: float | None, made: list[Beside]) -> tuple[list[Prediction], list[str]]:
    guard = Guard(adapter, OFTEN)
    frames = (Frame(frame.id, frame.pixels) for frame in served(x, (lambda _: idle(made)) if cap else None))
    found = [one for (one,) in Stream(adapter, window=WINDOW, single=True, guard=guard, cap=cap).run(frames)]
    return found, [verdict.after.value for verdict in guard.verdicts]


@pytest.mark.parametrize("name", ["tent", "live"])
def test_answers_do_not_see_what_a_guard_only_compares_with(bundles: Mapping[str, Path], name: str, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    x = stream_of(14)
    with Adapter.open(bundles[name], answering=True) as adapter:
        guard, known, puts, put = Guard(adapter, OFTEN), adapter.answer(x[0]), 0, adapter.put

        def looked_at(values: Mapping[str, Any]) -> None:
            nonlocal puts
            put(values)
            puts += 1
            if guard.phase is not Phase.ROLLED_BACK:
                assert np.array_equal(adapter.answer(x[0]), known)

        monkeypatch.setattr(adapter, "put", looked_at)
        for begin in range(0, 14 * WINDOW, WINDOW):
            guard(x[begin : begin + WINDOW])
            adapter.publish(**guard.scalars)
            known = adapter.answer(x[0])
        assert puts > 4


def test_what_is_done_by_hand_is_known_at_once(bundles: Mapping[str, Path]) -> None:  # noqa: F811
    x = stream_of(14)
    with Adapter.open(bundles["tent"], answering=True) as adapter:
        guard = Guard(adapter, OFTEN)
        while guard.phase is not Phase.ADAPTING or not adapter.stats["steps"]:
            guard(x[:WINDOW])
        adapter.publish(**guard.scalars)
        learned = adapter.answer(x[0])
        guard.roll_back()
        put_back = adapter.answer(x[0])
        assert not np.array_equal(put_back, learned)
        assert np.array_equal(put_back, adapter.predict(x[0], update_statistics=False, **guard.scalars))
        assert guard.scalars["few"] != adapter.hyper["few"]  # which goes with it, also after
        guard.reset()
        assert np.array_equal(adapter.answer(x[0]), adapter.predict(x[0], update_statistics=False, **guard.scalars))


def test_what_is_done_by_hand_waits_for_the_window(bundles: Mapping[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    x = stream_of(14)
    with Adapter.open(bundles["tent"], answering=True) as adapter:
        guard = Guard(adapter, OFTEN)
        while guard.phase is not Phase.ADAPTING:
            guard(x[:WINDOW])
        held = Held(adapter, monkeypatch)
        window = threading.Thread(target=guard, args=(x[:WINDOW],))
        window.start()
        assert held.begun.wait(30)
        pause = threading.Thread(target=guard.pause)
        pause.start()
        pause.join(0.05)
        assert pause.is_alive()
        assert guard.phase is Phase.ADAPTING
        held.go.set()
        window.join()
        pause.join()
        assert guard.phase is Phase.PAUSED
