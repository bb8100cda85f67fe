"""The power goes at every moment of everything that the store writes, and each time there is a good state to start from."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from edgeadapt.runtime.daemon.store import Limits, Store
from tests.powercut import Cut, Watched
from tests.stored import Files, seed_of, snapshot

pytestmark = pytest.mark.device

LIMITS = Limits(probation=1.0, boots=2, history=3, spare=0)
Ladder = tuple[int, tuple[tuple[str, int | None], ...]]
"""How many starts in a row there were, and all that is started with, one after another, where nothing proves itself: bundles and seeds of states."""


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("bundles"))


def ladder(folder: Path, files: Files) -> Ladder | None:
    """All that would be started with; it changes the folder. None where there is nothing to start with."""
    found: list[tuple[str, int | None]] = []
    attempts = 0
    for boots in (99, *[1] * 9):  # the first does not give up, each of the others does
        with Store.open(folder, Limits(boots=boots)) as store:
            if store.read().serving is None:
                return None
            boot = store.begin_boot()
        attempts = attempts or boot.attempt
        name = files.names[boot.installed.digest]
        start = (name, seed_of(boot.state, files.manifests[name]))
        if found and start == found[-1]:
            return attempts, tuple(found)
        found.append(start)
    raise AssertionError("it never ends")


class Scenario:
    """A life of a store, step by step; each is acknowledged when it returns."""

    def __init__(self, root: Path, files: Files) -> None:
        self.root, self.files, self.time, self.bundle = root, files, 0.0, "a"
        self.store = Store.open(root, LIMITS, clock=lambda: self.time)

    def install(self, name: str) -> Callable[[], object]:
        return lambda: self.store.install(self.files.paths[name])

    def boot(self, name: str) -> Callable[[], object]:
        def begin() -> None:
            self.store.begin_boot()
            self.bundle = name

        return begin

    def commit(self, seed: int, alone: bool = False) -> Callable[[], object]:
        def commit() -> None:
            manifest = self.files.manifests[self.bundle]
            assert self.store.commit(snapshot(manifest, seed).at_hand, manifest, True, alone) == 0.0

        return commit

    def steps(self) -> Iterator[Callable[[], object]]:
        store = self.store
        install, boot, commit = self.install, self.boot, self.commit
        yield from (install("a"), boot("a"), commit(1), commit(2), store.settled, commit(3), store.settled, commit(4), commit(5))
        yield from (store.roll_back, commit(6), store.mark_good, store.roll_back, commit(7), store.settled)
        yield from (commit(13, alone=True), store.settled)
        yield from (install("b"), boot("b"), commit(8), store.settled, commit(9), install("c"), boot("c"), commit(10))
        yield from (store.undo, boot("b"), store.stopped, store.settled, install("c"), boot("c"), store.settled, commit(11))
        yield from (boot("c"),) * 4  # which gives up twice
        yield from (install("a"), boot("a"), boot("a"), boot("c"), commit(12), store.settled)


def lived(root: Path, files: Files) -> tuple[list[Ladder | None], list[tuple[int, Cut]]]:
    """What would be started with after each step, from none on, and each moment with the number of the step that it is in."""
    root.mkdir()
    scenario, watched = Scenario(root, files), Watched(root)
    expected: list[Ladder | None] = [None]
    cuts: list[tuple[int, Cut]] = []
    for number, step in enumerate(scenario.steps()):
        with watched.watching():
            step()
        cuts += [(number, cut) for cut in watched.cuts]
        watched.cuts.clear()
        expected.append(looked_at(root, files))
    scenario.store.close()
    return expected, cuts


def looked_at(root: Path, files: Files) -> Ladder | None:
    copy = root.with_name("copy")
    shutil.copytree(root, copy)
    try:
        return ladder(copy, files)
    finally:
        shutil.rmtree(copy)


@pytest.fixture(scope="module")
def life(tmp_path_factory: pytest.TempPathFactory, files: Files) -> tuple[list[Ladder | None], list[tuple[int, Cut]]]:
    return lived(tmp_path_factory.mktemp("life") / "state", files)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is only looked at need not be on the disk."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def test_the_life_that_is_cut_short_is_full(life: tuple[list[Ladder | None], list[tuple[int, Cut]]]) -> None:
    """Else the tests below would test little."""
    expected, cuts = life
    starts = {ladder[1][0] for ladder in expected if ladder is not None}
    assert starts >= {("a", None), ("a", 2), ("a", 7), ("b", None), ("b", 9), ("c", 10), ("c", 11), ("c", 12)}
    assert any(len(ladder[1]) >= 4 for ladder in expected if ladder is not None)
    kinds = {cut.call.partition(" ")[0] for _, cut in cuts}
    assert kinds >= {"open", "fsync", "replace", "unlink", "mkdir", "rmdir", "the"}
    assert len(cuts) > 200


KNOWN: dict[tuple[tuple[str, bytes], ...], Ladder | None] = {}
"""What is started with by what there is: many moments leave the same."""


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("how", ["killed", "sure", "random"])
def test_a_cut_at_any_moment_leaves_what_was_or_what_was_to_be(
    life: tuple[list[Ladder | None], list[tuple[int, Cut]]], files: Files, tmp_path: Path, how: str
) -> None:
    expected, cuts = life
    for place, (number, cut) in enumerate(cuts):
        folder = tmp_path / str(place)
        cut.left(folder, random.Random(place) if how == "random" else None, how == "killed")
        content = tuple((str(path.relative_to(folder)), path.read_bytes() if path.is_file() else b"/") for path in sorted(folder.rglob("*")))
        if content not in KNOWN:
            KNOWN[content] = ladder(folder, files)
            if len(KNOWN) % 4 == 0:
                check_usable(folder, files)
        assert KNOWN[content] in expected[number : number + 2], f"step {number}, before {cut.call}"
        shutil.rmtree(folder)


def check_usable(folder: Path, files: Files) -> None:
    """It can be gone on with, and nothing is left lying about."""
    with Store.open(folder, LIMITS, clock=lambda: 0.0) as store:
        store.install(files.paths["a"])
        boot = store.begin_boot()
        assert files.names[boot.installed.digest] == "a"
        assert store.commit(snapshot(files.manifests["a"], 99).at_hand, files.manifests["a"], True) == 0.0
        store.settled()
        named = store.now
        assert len(store.happened()) <= LIMITS.history
    with Store.open(folder, LIMITS) as store:
        assert seed_of(store.begin_boot().state, files.manifests["a"]) == 99
    digests = {bundle.digest[:16] for bundle in (named.active, named.previous) if bundle is not None}
    assert {path.name for path in (folder / "bundles").iterdir()} == digests
    assert {path.name for path in folder.iterdir()} <= {"bundles", "slots", "lock", "pointer.a", "pointer.b", "history.jsonl"}
    assert not list(folder.rglob(".*"))


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("damage", [b"", b"\0" * 600, b"rubbish" * 50, None])
def test_a_copy_of_the_record_that_is_lost_costs_one_step(
    life: tuple[list[Ladder | None], list[tuple[int, Cut]]], files: Files, tmp_path: Path, damage: bytes | None
) -> None:
    """At the end of every step, the newer or the older one; and what comes next mends it."""
    expected, cuts = life
    ends = [(number, cut) for number, cut in cuts if cut.call == "the end"]
    for number, cut in ends:
        for name in ("pointer.a", "pointer.b"):
            folder = tmp_path / f"{number}{name}"
            cut.left(folder, None, True)
            if damage is None:
                (folder / name).unlink()
            else:
                (folder / name).write_bytes(damage)
            found = ladder(folder, files)
            starts = [step[1] for step in expected[max(0, number - 2) : number + 2] if step is not None]
            assert found is not None
            assert found[1] in starts or found[1][0] in [start for ladder in starts for start in ladder], (number, found)
            if number % 4 == 0:
                check_usable(folder, files)
            shutil.rmtree(folder)
