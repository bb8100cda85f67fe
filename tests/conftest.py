"""What holds for every test: one thread, caches of its own, no silent skips, and a collection that works without torch.

A file with tests marked `device` must import without torch, because such tests also run on a device and under emulation: there every other
file is left out.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Generator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import hypothesis
import pytest

from edgeadapt.devices.boards import probe
from edgeadapt.memory import schedule

HAS_TORCH = importlib.util.find_spec("torch") is not None
CACHES = pytest.StashKey[Path]()
SEARCH = pytest.StashKey[tuple[int, int]]()
COUNTED = pytest.StashKey[bool]()
SATURATES = "sums of 8-bit products saturate on this processor"
Report = TypeVar("Report", pytest.TestReport, pytest.CollectReport)

# Read when the libraries load, hence here and not in a fixture; child processes inherit them.
os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", ORT_DISABLE_TELEMETRY="1")

# A deadline measures the machine's load; CI looks at the same examples every time.
hypothesis.settings.register_profile("edgeadapt", deadline=None, derandomize=os.environ.get("CI") == "true")
hypothesis.settings.load_profile("edgeadapt")


def pytest_configure(config: pytest.Config) -> None:
    """Keeps what tests cache, and the processes they start, out of the user's own folders."""
    pack = os.environ.get("EDGEADAPT_DATA")
    if pack and not Path(pack, "README.md").is_file():
        raise pytest.UsageError(f"EDGEADAPT_DATA={pack} holds no data pack (no README.md in it): mend it or unset it")
    caches = config.stash[CACHES] = Path(tempfile.mkdtemp(prefix="edgeadapt-tests-"))
    for kind in ("CACHE", "STATE", "CONFIG", "DATA"):
        os.environ[f"XDG_{kind}_HOME"] = str(caches / kind.lower())
    config.stash[SEARCH] = schedule.VISITS, schedule.LAYOUTS
    schedule.VISITS //= 100  # exports by the hundred: their orders need not be the very best
    schedule.LAYOUTS //= 100


@pytest.fixture
def whole_search(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The search for an order of nodes does all the work that it does for users."""
    for name, value in zip(("VISITS", "LAYOUTS"), request.config.stash[SEARCH]):
        monkeypatch.setattr(schedule, name, value)


def pytest_unconfigure(config: pytest.Config) -> None:
    """Removes those folders."""
    if CACHES in config.stash:
        shutil.rmtree(config.stash[CACHES], ignore_errors=True)


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Without torch, only files that hold device tests are imported."""
    if HAS_TORCH or collection_path.suffix != ".py" or not collection_path.name.startswith("test_"):
        return None
    return True if "mark.device" not in collection_path.read_text(encoding="utf-8") else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselects what this machine cannot hold: no data pack, no torch, no GPU. The closing line counts them."""
    absent = [item for item in items if _absent(item)]
    if absent:
        config.hook.pytest_deselected(items=absent)
        items[:] = [item for item in items if not _absent(item)]
    if hasattr(config, "workeroutput"):
        config.workeroutput["absent"] = len(absent)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """With workers, each deselects for itself, and all the same; the process that writes the closing line counts what the first tells."""
    counted = node.config.stash.setdefault(COUNTED, False)
    if not counted and (absent := getattr(node, "workeroutput", {}).get("absent")):
        node.config.stash[COUNTED] = True
        node.config.pluginmanager.get_plugin("terminalreporter").pytest_deselected([SimpleNamespace()] * absent)


@cache
def _has_cuda() -> bool:
    """Whether there is a GPU, and an onnxruntime that could use it. Whether it does, is for the tests to find out."""
    import onnxruntime

    return bool(probe.look().gpu) and "CUDAExecutionProvider" in onnxruntime.get_available_providers()


def _saturates() -> bool:
    from edgeadapt.runtime.eightbit import saturates

    return saturates()


def _absent(item: pytest.Item) -> bool:
    without_data = item.get_closest_marker("data") is not None and not os.environ.get("EDGEADAPT_DATA")
    without_cuda = item.get_closest_marker("cuda") is not None and not _has_cuda()
    return without_data or without_cuda or (not HAS_TORCH and item.get_closest_marker("device") is None)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """In CI a skipped test is a failed one: nothing may go untested unseen.

    Where this processor cannot add products of codes, a test of what a device computes with them that fails is an expected failure, and shown as one.
    """
    report = yield
    if report.failed and not hasattr(report, "wasxfail") and item.get_closest_marker("codes") and _saturates():
        report.outcome, report.wasxfail = "skipped", SATURATES
    return _refuse_skip(report)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """The same for a file that skips itself as a whole."""
    report = yield
    return _refuse_skip(report)


def _refuse_skip(report: Report) -> Report:
    if os.environ.get("CI") == "true" and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"skipped in CI: {report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr}"
    return report


@pytest.fixture(scope="session")
def data_pack() -> Path:
    """The data pack's folder; for tests marked `data`."""
    return Path(os.environ["EDGEADAPT_DATA"])


@pytest.fixture
def light_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Starting takes no more than serving: toys are so small that whatever they do would take the same otherwise."""
    from edgeadapt.memory import footprint

    monkeypatch.setattr(footprint, "BEGINNING", -footprint.STARTED)
    monkeypatch.setattr(footprint, "LOADING", 0)
