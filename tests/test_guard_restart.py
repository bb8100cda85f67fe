"""A guard over restarts: what was the last good is it again, what the model started as is that, and nothing unproven is kept."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from edgeadapt import Adapter
from edgeadapt.bundle import tensors
from edgeadapt.errors import StateError
from edgeadapt.runtime import checkpoint
from edgeadapt.runtime.daemon.store import Limits as StoreLimits
from edgeadapt.runtime.daemon.store import Store
from edgeadapt.runtime.guard import Guard
from edgeadapt.runtime.kept import Copy
from edgeadapt.runtime.phases import Limits, Phase
from tests.test_guard import OFTEN, WINDOW, bundles, committed, images, net, phases, shifted, wrong  # noqa: F401

Found = Mapping[str, np.ndarray]


def learned(guard: Guard) -> dict[str, np.ndarray]:
    return guard.adapter.tensors(guard._learned.names)


def same(left: Found, right: Found) -> bool:
    return left.keys() == right.keys() and all((left[name] == right[name]).all() for name in left)


def begun(path: Path, state: Path, limits: Limits = OFTEN) -> Guard:
    """A guard in another process, as far as it knows."""
    guard = Guard(Adapter.open(path, prepared=False), limits)
    guard.load(state)
    return guard


def saved(guard: Guard, path: Path) -> Path:
    checkpoint.write(path, guard.taken, guard.adapter.manifest)
    return path


def test_the_last_good_is_it_again_and_the_bundles_start_is_the_start(bundles: dict[str, Path], tmp_path: Path) -> None:  # noqa: F811
    with Adapter.open(bundles["tent"], prepared=False) as adapter:
        guard = committed(adapter)
        start, good, state = guard.adapter.bundle.initial_state(), learned(guard), adapter.state
        saved(guard, tmp_path / "x")
    guard = begun(bundles["tent"], tmp_path / "x")
    with guard.adapter:
        assert same(guard.adapter.state, state), "statistics too"
        assert guard.phase is Phase.WARM_UP
        assert guard._learned.good is not None
        assert guard._learned.away() > 0
        wrong(guard, 7, 400, shifted)
        guard.roll_back()
        assert same(learned(guard), good)
        guard.roll_back()
        assert same(learned(guard), {name: start[name] for name in good}), "the loaded state is not what it started as"
        assert guard._learned.away() == 0


def test_it_is_served_and_put_aside_as_before(bundles: dict[str, Path], tmp_path: Path) -> None:  # noqa: F811
    """Wholly from the first window on, where it was learned so; and on the source it is laid by, and taken up again."""
    with Adapter.open(bundles["tent"], prepared=False) as adapter:
        guard = committed(adapter)
        assert guard._learned.wholly
        scalars = dict(guard.scalars)
        saved(guard, tmp_path / "x")
    guard = begun(bundles["tent"], tmp_path / "x")
    with guard.adapter:
        assert guard.scalars == scalars
        wrong(guard, 1, 401, shifted)
        assert guard.scalars == scalars
        while guard._learned.laid_by is None:
            wrong(guard, 1, 410 + guard.windows)
            assert guard.windows < 20
        assert guard._learned.away() == 0
        laid_by = guard._learned.laid_by
        saved(guard, tmp_path / "y")
    guard = begun(bundles["tent"], tmp_path / "y")
    with guard.adapter:
        assert guard._learned.good is None
        assert guard._learned.laid_by is not None
        assert guard._learned.laid_by.wholly
        assert same(guard._learned.laid_by.tensors, laid_by.tensors)
        assert "trust" not in guard.scalars
        wrong(guard, 5, 480)  # until it is known that frames come shuffled
        while Phase.PROBATION not in [verdict.after for verdict in guard.verdicts]:
            wrong(guard, 1, 440 + guard.windows, shifted)
            assert guard.windows < 40
        assert any("taken up" in verdict.reason for verdict in guard.verdicts)


def test_what_was_marked_good_is_the_start_with_more_learned_or_not(bundles: dict[str, Path], tmp_path: Path) -> None:  # noqa: F811
    with Adapter.open(bundles["tent"], prepared=False) as adapter:
        guard = committed(adapter)
        guard.mark_good()
        marked = learned(guard)
        saved(guard, tmp_path / "x")
        while guard._learned.good is None:
            wrong(guard, 1, 420 + guard.windows, shifted)
            assert guard.windows < 80
        more = learned(guard)
        assert not same(more, marked)
        saved(guard, tmp_path / "y")
    guard = begun(bundles["tent"], tmp_path / "x")
    with guard.adapter:
        assert guard._learned.good is None
        assert guard._learned.away() == 0
        guard.roll_back()
        assert same(learned(guard), marked)
    guard = begun(bundles["tent"], tmp_path / "y")
    with guard.adapter:
        assert guard._learned.good is not None
        assert same(learned(guard), more)
        guard.roll_back()
        assert same(learned(guard), more)
        guard.roll_back()
        assert same(learned(guard), marked)


@pytest.mark.parametrize("before", [False, True])
def test_steps_not_proven_are_left_out_of_what_is_saved_and_go_on(bundles: dict[str, Path], tmp_path: Path, before: bool) -> None:  # noqa: F811
    """For the last good, or for the start where there is none."""
    with Adapter.open(bundles["tent"], prepared=False) as adapter:
        guard = committed(adapter) if before else Guard(adapter, OFTEN)
        proven = learned(guard)
        while not guard._learned.unproven:
            wrong(guard, 1, 430 + guard.windows, shifted)
            assert guard.windows < 60
        phase, unproven, told = guard.phase, learned(guard), len(guard.verdicts)
        saved(guard, tmp_path / "x")
        assert same(learned(guard), unproven)
        assert guard._learned.unproven
        assert (guard.phase, len(guard.verdicts)) == (phase, told)
        found = checkpoint.read(tmp_path / "x", adapter.manifest)
        assert same({name: found.tensors[name] for name in proven}, proven)
        assert found.kept is not None
        assert found.kept.proven == before
    guard = begun(bundles["tent"], tmp_path / "x")
    with guard.adapter:
        assert (guard._learned.good is not None) == before
        assert not guard._learned.unproven


def test_a_state_that_no_guard_saved_is_the_start(bundles: dict[str, Path], tmp_path: Path) -> None:  # noqa: F811
    """As it is for a guard of an adapter that loaded it, and as files were before they said more."""
    with Adapter.open(bundles["tent"], prepared=False) as adapter:
        for index in range(3):
            adapter.adapt(shifted(images(WINDOW, index)[0]))
        adapter.save(tmp_path / "x")
    assert "kept" not in tensors.read(tmp_path / "x")[1]
    guard = begun(bundles["tent"], tmp_path / "x")
    with guard.adapter:
        loaded = learned(guard)
        assert guard._learned.good is None
        wrong(guard, 7, 450, shifted)
        guard.roll_back()
        assert same(learned(guard), loaded)
        assert guard._learned.away() == 0


def test_an_adapter_alone_loads_what_a_guard_saved(bundles: dict[str, Path], tmp_path: Path) -> None:  # noqa: F811
    with Adapter.open(bundles["tent"], prepared=False) as adapter:
        guard = committed(adapter)
        guard.mark_good()
        while guard._learned.good is None:
            wrong(guard, 1, 460 + guard.windows, shifted)
        state, stats = adapter.state, adapter.stats
        saved(guard, tmp_path / "x")
    assert any(name.startswith("start ") for name in tensors.read(tmp_path / "x")[0])
    with Adapter.open(bundles["tent"], prepared=False) as adapter:
        adapter.load(tmp_path / "x")
        assert same(adapter.state, state)
        assert adapter.stats == stats


def test_a_load_that_fails_changes_nothing(bundles: dict[str, Path], tmp_path: Path) -> None:  # noqa: F811
    with Adapter.open(bundles["tent"], prepared=False) as adapter:
        guard = committed(adapter)
        saved(guard, tmp_path / "x")
        (tmp_path / "x").write_bytes((tmp_path / "x").read_bytes()[:-3])
        state, good, told = adapter.state, guard._learned.good, phases(guard)
        with pytest.raises(StateError):
            guard.load(tmp_path / "x")
        assert same(adapter.state, state)
        assert guard._learned.good is good
        assert phases(guard) == told


def test_what_other_steps_learned_is_refused(bundles: dict[str, Path], tmp_path: Path) -> None:  # noqa: F811
    """A bundle of the same state whose steps change other tensors could not put back what the file holds."""
    with Adapter.open(bundles["tent"], prepared=False) as adapter:
        guard = committed(adapter)
        guard.mark_good()
        while guard._learned.good is None:
            wrong(guard, 1, 470 + guard.windows, shifted)
        guard._learned._base = Copy(dict(list(learned(guard).items())[1:]), False)
        saved(guard, tmp_path / "x")
        with pytest.raises(StateError, match="change other tensors"):
            guard.load(tmp_path / "x")


def test_a_daemon_goes_on_where_it_was_after_a_power_cut(bundles: dict[str, Path], tmp_path: Path) -> None:  # noqa: F811
    """All the way: installed, started, learned, committed, and started again from what the disk holds."""
    with Store.open(tmp_path / "state", StoreLimits(spare=0)) as store:
        store.install(bundles["tent"])
        boot = store.begin_boot()
        with Adapter.open(boot.bundle, prepared=False, verify=False) as adapter:
            guard = committed(adapter)
            assert store.commit(guard.taken, adapter.manifest) == 0.0
            good = learned(guard)
            while not guard._learned.unproven:
                wrong(guard, 1, 490 + guard.windows, shifted)
    with Store.open(tmp_path / "state", StoreLimits(spare=0)) as store:
        boot = store.begin_boot()
        assert boot.state is not None
        guard = begun(boot.bundle, boot.state)
        with guard.adapter as adapter:
            assert same(learned(guard), good)
            guard.roll_back()
            guard.roll_back()
            assert guard._learned.away() == 0
            assert store.commit(guard.taken, adapter.manifest, always=True) == 0.0
        guard = begun(boot.bundle, boot.state)
        with guard.adapter:
            assert guard._learned.good is not None, "the last good of the disk is still there"
        after = store.begin_boot()
        assert after.state not in (None, boot.state)
        guard = begun(after.bundle, after.state)  # type: ignore[arg-type]
        with guard.adapter:
            assert guard._learned.good is None, "what was rolled back twice is not"
