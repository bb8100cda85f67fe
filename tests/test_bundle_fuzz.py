"""Bundles, saved states and state folders from anywhere: served or refused with a reason, whatever is in them."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from benchmarks.bundle_fuzz import kinds
from tests.bundle_fuzz import KINDS, Worker, complaint, make, sound

pytestmark = pytest.mark.device

NUMBERS = some.integers(0, 2**32 - 1)


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    found = Worker()
    yield found
    found.close()


def became(worker: Worker, kind: str, number: int) -> str:
    """How it ended, where nothing went wrong."""
    folder = Path(tempfile.mkdtemp(prefix="edgeadapt-fuzz-"))
    try:
        made = make(kind, number, folder)
        outcome = worker.open(made)
    finally:
        shutil.rmtree(folder)
    if found := complaint(made, outcome):
        pytest.fail(found)
    return str(outcome["ended"])


@settings(max_examples=50)
@given(some.sampled_from([kind for kind, (what, _, _) in KINDS.items() if what == "bundle" and kind not in ("graph", "crowd")]), NUMBERS)
def test_any_bundle_is_served_or_refused(worker: Worker, kind: str, number: int) -> None:
    became(worker, kind, number)


@settings(max_examples=50)
@given(NUMBERS)
def test_any_graph_is_run_or_refused(worker: Worker, number: int) -> None:
    became(worker, "graph", number)


@settings(max_examples=5)
@given(NUMBERS)
def test_any_number_of_things_is_read_or_refused(worker: Worker, number: int) -> None:
    became(worker, "crowd", number)


@settings(max_examples=30)
@given(some.sampled_from([kind for kind, (what, _, _) in KINDS.items() if what != "bundle"]), NUMBERS)
def test_any_state_is_gone_on_from_or_passed_over(worker: Worker, kind: str, number: int) -> None:
    became(worker, kind, number)


def test_what_is_made_follows_from_its_kind_and_number(tmp_path: Path) -> None:
    for kind in KINDS:
        twice = []
        for name in ("one", "two"):
            (folder := tmp_path / kind / name).mkdir(parents=True)
            made = make(kind, 7, folder)
            path = folder / "x.edgeadapt"
            twice.append((made.note, path.read_bytes() if path.is_file() else b""))
        assert twice[0] == twice[1], kind


def test_a_benchmark_makes_every_kind() -> None:
    assert set(kinds(400, 0)) == set(KINDS)


@pytest.mark.parametrize("what", ["plain", "pieces", "small"])
@pytest.mark.parametrize("budget", [False, True])
def test_what_is_sound_is_served(worker: Worker, what: str, budget: bool, tmp_path: Path) -> None:
    """Or else that everything is refused would show nothing."""
    made = make("archive", 0, tmp_path)
    made.task.update(path=str(sound()[what]), budget=budget, serves=True)
    outcome = worker.open(made)
    assert (outcome["ended"], outcome["stage"], complaint(made, outcome)) == ("opened", "run", "")


def test_what_goes_wrong_is_told(worker: Worker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make("archive", 0, tmp_path)
    made.task.update(path=str(sound()["plain"]), budget=False, serves=True)
    worker.open(made)
    for what, told in (("raises", "ZeroDivisionError"), ("fills", " bytes"), ("dies", "died"), ("bundle", ""), ("hangs", "hangs"), ("bundle", "")):
        made.task.update(what=what)
        with monkeypatch.context() as patch:
            if what == "hangs":
                patch.setattr(worker, "_patience", 1.0)
            found = complaint(made, worker.open(made))
        assert told in found
        assert bool(found) == bool(told), "after the process has died another one goes on"
        assert not found or "--kind 'archive' --number 0" in found
