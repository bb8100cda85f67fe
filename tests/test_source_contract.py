"""Every source of frames keeps the same promises."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import source_contract as contract
from tests import source_rigs as rigs
from tests.source_contract import Rig

# Whose library is no requirement of a device has no mark: it runs where everything for development is installed.
EVERY = [
    *(pytest.param(rig, marks=pytest.mark.device, id=rig.__name__) for rig in (
        rigs.FolderRig, rigs.ArchiveRig, rigs.PathsRig, rigs.ArraysRig, rigs.ReplayRig, rigs.ReplayFolderRig, rigs.CameraRig, rigs.AddressRig,
        rigs.RibbonRig, rigs.WatchRig, rigs.PostedRig, rigs.SerialRig,
    )),
    pytest.param(rigs.VideoRig, id="VideoRig"),
]  # fmt: skip


def those(**having: bool) -> list[object]:
    return [one for one in EVERY if all(getattr(one.values[0], name) is value for name, value in having.items())]


@pytest.fixture
def rig(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    kind: type[Rig] = request.param
    made = kind(tmp_path, monkeypatch)
    yield made
    made.done()


@pytest.mark.parametrize("rig", EVERY, indirect=True)
def test_frames_come_once_and_in_order(rig):
    contract.check_frames(rig)


@pytest.mark.parametrize("rig", EVERY, indirect=True)
def test_a_close_is_for_good_and_may_come_twice(rig):
    contract.check_close(rig)


@pytest.mark.parametrize("rig", those(live=True), indirect=True)
def test_nothing_is_opened_before_it_is_iterated(rig):
    contract.check_nothing_is_opened_before_it_is_iterated(rig)


@pytest.mark.parametrize("rig", those(stops=True), indirect=True)
def test_what_is_stopped_before_it_begins_gives_nothing(rig):
    contract.check_stop_before(rig)


@pytest.mark.parametrize("given", [0, 1])
@pytest.mark.parametrize("rig", those(live=True), indirect=True)
def test_a_stop_from_another_thread_ends_the_wait(rig, given):
    contract.check_stop_while_it_waits(rig, given)


@pytest.mark.parametrize("rig", those(breaks=True), indirect=True)
def test_a_broken_device_is_a_source_error_and_nothing_else(rig):
    contract.check_broken(rig)


@pytest.mark.parametrize("rig", EVERY, indirect=True)
def test_it_resumes_when_its_device_is_back(rig):
    contract.check_reopened(rig)
