"""The daemon as a process that is killed while it learns, saves and starts: what it goes on with is what was last committed, to the bit."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import pytest

from benchmarks.killed_daemon import Rig, bundles, full_round, one_round, small_disk
from edgeadapt.bundle import Bundle
from edgeadapt.runtime.adapter import Adapter
from edgeadapt.runtime.daemon.saving import Saving
from edgeadapt.runtime.daemon.seen import LATEST, MOST, Answered, Seen
from edgeadapt.runtime.daemon.store import Store

pytestmark = pytest.mark.device


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return bundles(tmp_path_factory.mktemp("bundles"))


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path | None]:
    with small_disk(tmp_path_factory.mktemp("disk") / "small") as found:
        yield found


@pytest.mark.parametrize("guard", [False, True])
def test_whenever_it_is_killed_it_goes_on_with_what_was_committed(tmp_path: Path, made: list[Path], guard: bool) -> None:
    rig, rng = Rig(tmp_path, made, guard), random.Random(7)
    for number, moment in enumerate(("write", "install", "lasted")):
        one_round(rig, number, moment, rng)
    assert rig.wrong == []
    assert rig.seen["killed: write"] == rig.seen["killed: install"] == rig.seen["killed: lasted"] == 1
    assert rig.record().boots == 0, "the last one had lasted"


def test_on_a_disk_that_fills_up_it_answers_and_learns_and_says_so(tmp_path: Path, made: list[Path], disk: Path | None) -> None:
    """Where none can be mounted it is killed at its end instead; tests/test_store_disks.py then has a limit on files."""
    rig, rng = Rig(disk or tmp_path, made), random.Random(7)
    full_round(rig, 0, rng) if disk else one_round(rig, 0, "end", rng)
    assert rig.wrong == []


def test_what_is_saved_at_once_is_on_the_disk_whatever_is_learned_meanwhile(tmp_path: Path, made: list[Path]) -> None:
    manifest = Bundle.open(made[0]).manifest
    with Adapter.open(made[0]) as adapter, Store.open(tmp_path / "state") as store:
        boot = store.begin_boot(made[0])

        @contextmanager
        def taken() -> Iterator[object]:
            with adapter.taken() as snapshot:
                yield snapshot
            saving.wanted()  # a step, while the disk is waited for

        saving = Saving(store, taken, manifest, nullcontext, lambda kind, text: None)  # type: ignore[arg-type]
        saving.wanted()
        assert saving.at_once() == ""
        assert saving.pending
        assert store.now.states_of(boot.installed).active is not None
        saving.finish()


def test_a_frame_that_somebody_looks_at_is_remembered_before_others() -> None:
    now = [0.0]
    seen = Seen(lambda: now[0])
    for index in range(3 * LATEST):
        seen.answered(Answered(index, index, np.zeros((4, 4, 3), np.uint8), {}), 1.0)
        if index == 10:
            assert seen.frame() is seen.frame(10)
    assert seen.frame(10) is not None
    assert seen.frame(11) is None
    assert len(seen._latest) == LATEST
    seen.frame()
    seen.answered(Answered(999, 999, np.zeros((4, 4, 3), np.uint8), {}), 1.0)
    seen.frame()
    for index in range(1000, 1000 + LATEST):
        seen.answered(Answered(index, index, np.zeros((4, 4, 3), np.uint8), {}), 1.0)
    assert seen.frame(10) is not None, "others were looked at since, by somebody else"
    assert seen.frame(999) is not None
    now[0] += 61
    for index in range(2000, 2000 + LATEST):
        seen.answered(Answered(index, index, np.zeros((4, 4, 3), np.uint8), {}), 1.0)
    assert seen.frame(10) is seen.frame(999) is None


def test_frames_that_somebody_looks_at_never_keep_the_newest_out() -> None:
    seen = Seen()
    for index in range(20):
        seen.answered(Answered(index, index, np.zeros(MOST // 3, np.uint8), {}), 1.0)
        assert seen.frame().index == index  # type: ignore[union-attr]
        assert sum(frame.pixels.nbytes for frame in seen._latest.values()) <= MOST
