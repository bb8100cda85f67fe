"""Code of onnxruntime that is given back, and saving, loading and resetting without a second copy of the state."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from edgeadapt import Adapter
from edgeadapt.errors import StateError
from edgeadapt.runtime import library, mappings, memory
from tests.child import run_json
from tests.toybundle import SIDE, Toy

pytestmark = pytest.mark.device

MIB = 2**20
ENOUGH = "8GiB"


def frames(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, 3, SIDE, SIDE), dtype=np.float32)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Toy(width=16).write(tmp_path_factory.mktemp("library") / "toy.edgeadapt")


# ---------------------------------------------------------------------------------------------------- code


MAPPED = """\
{begin:x}-{end:x} {permissions} 00000000 08:01 1 {path}
Size:                 64 kB
Rss:                {resident:>4} kB
Pss:                   4 kB
Anonymous:          {own:>4} kB
VmFlags: rd ex mr mw me
"""


def mapped(**changes: Any) -> str:
    given = {"begin": 0x7F0000000000, "end": 0x7F0000010000, "permissions": "r-xp", "resident": 48, "own": 0}
    return MAPPED.format(**{**given, "path": library._FOLDER + "capi/onnxruntime_pybind11_state.so", **changes})


@pytest.fixture
def advised(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    """What the system was asked for: address, size, advice."""
    calls: list[tuple[int, int, int]] = []

    def madvise(begin: Any, size: Any, advice: int) -> int:
        calls.append((begin.value, size.value, advice))
        return 0

    monkeypatch.setattr(mappings.ctypes, "CDLL", lambda _: SimpleNamespace(madvise=madvise))
    monkeypatch.setattr(library, "_LOADED", frozenset([(0x7F0000000000, 0x7F0000010000), (0x7E0000000000, 0x7E0000004000)]))
    return calls


def told(root: Path, *mappings: str) -> str:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/smaps").write_text("".join(mappings), encoding="ascii")
    return str(root)


@pytest.mark.parametrize(
    "changes",
    [
        {"permissions": "rw-p"},
        {"permissions": "r-xs"},
        {"permissions": "rwxp"},
        {"own": 4},  # a debugger's breakpoint, or what was relocated: gone for good if it were given back
        {"resident": 0},
        {"path": "/usr/lib/libc.so.6"},
        {"path": library._FOLDER + "capi/model.onnx"},
        {"path": library._FOLDER + "capi/libonnxruntime_providers_cuda.so"},
        {"begin": 0x7F0000002000},  # not where it was when it was imported
        {"path": ""},
        {"path": "[heap]"},
    ],
)
def test_only_clean_code_of_onnxruntime_is_given_back(tmp_path: Path, advised: list[tuple[int, int, int]], changes: dict[str, Any]) -> None:
    root = told(tmp_path, mapped(**changes), mapped(begin=0x7E0000000000, end=0x7E0000004000, permissions="r--p", resident=12))
    assert library.give_back(root) == 12 * 1024
    assert advised == [(0x7E0000000000, 0x4000, 4)]


def test_what_the_system_does_not_take_is_not_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a program has locked all of its memory."""
    monkeypatch.setattr(mappings.ctypes, "CDLL", lambda _: SimpleNamespace(madvise=lambda *_: -1))
    monkeypatch.setattr(library, "_LOADED", frozenset([(0x7F0000000000, 0x7F0000010000)]))
    assert library.give_back(told(tmp_path, mapped())) == 0


def test_what_is_held_of_it(tmp_path: Path) -> None:
    assert library.held(told(tmp_path, mapped(), mapped(own=8), mapped(path="/usr/lib/libc.so.6"))) == (48 + 40) * 1024


def test_where_the_system_does_not_tell(tmp_path: Path, advised: list[tuple[int, int, int]]) -> None:
    assert (library.give_back(str(tmp_path)), library.held(str(tmp_path)), advised) == (0, 0, [])


@pytest.mark.native
def test_runs_give_the_same_after_it_and_take_less_of_the_code(path: Path) -> None:
    with Adapter.open(path, ENOUGH) as adapter:
        before = adapter.predict(frames(4), update_statistics=False)
        with pytest.raises(Exception, match="Load model from nowhere"):  # brings in code of errors, too
            memory.onnxruntime.InferenceSession("nowhere")
        held, resident = library.held(), memory.resident()
        given = library.give_back()
        assert given > 2 * MIB
        assert library.held() < held - given + MIB
        assert memory.resident() <= resident - given + MIB
        assert np.array_equal(adapter.predict(frames(4), update_statistics=False), before)
        assert library.held() < 0.8 * held


HELD = """
import json, sys
import numpy as np
from edgeadapt import Adapter
from edgeadapt.runtime import library, memory
adapter = Adapter.open(sys.argv[1], "8GiB")
opened = library.held()
for _ in range(3):
    adapter.adapt(np.ones((4, 3, {side}, {side}), np.float32))
print(json.dumps({{"opened": opened, "served": library.held(), "code": adapter.memory["code"]}}))
"""


@pytest.mark.native
def test_an_adapter_with_a_budget_holds_the_code_that_it_runs(path: Path) -> None:
    found = run_json([sys.executable, "-c", HELD.format(side=SIDE), str(path)])
    assert found["opened"] < 4 * MIB
    assert MIB < found["served"] <= found["code"]


# ---------------------------------------------------------------------------------------------------- state


KEPT = """
import json, sys
import numpy as np
from edgeadapt import Adapter
from edgeadapt.runtime import memory
adapter = Adapter.open(sys.argv[1], "8GiB")
x = np.ones((4, 3, {side}, {side}), np.float32)
def again():
    for _ in range(3):
        adapter.adapt(x)
    adapter.save(); adapter.save(); adapter.save(sys.argv[2]); adapter.load(); adapter.load(sys.argv[2]); adapter.reset()
again() if len(sys.argv) > 3 else [adapter.adapt(x) for _ in range(3)]
before = memory.peak()
again()
print(json.dumps({{"more": memory.peak() - before, "state": adapter._state.nbytes}}))
"""


def large(folder: Path) -> Path:
    """A bundle with twelve megabytes of state in five tensors, none of them nearly all of it."""
    toy = Toy(width=600_000, depth=0)
    return toy.write(folder / "large.edgeadapt")


@pytest.mark.native
def test_saving_loading_and_resetting_make_no_second_copy_of_the_state(tmp_path: Path) -> None:
    found = run_json([sys.executable, "-c", KEPT.format(side=SIDE), str(large(tmp_path)), str(tmp_path / "saved")])
    assert found["state"] > 24 * MIB
    assert found["more"] < 5 * MIB  # one tensor of 2.4 MB, a little code


WITHIN = """
import json, re, sys
import numpy as np
from edgeadapt import Adapter
from edgeadapt.errors import BudgetError
path, saved, roles = sys.argv[1:]
try:
    Adapter.open(path, "1MiB", roles=roles, batches=[4])
except BudgetError as refusal:
    needed = re.search(r"predict only, at batch 1, needs (\\d+)" if roles == "predict" else r"adapt at batch 4 needs (\\d+)", refusal.hint)
adapter = Adapter.open(path, int(needed[1]) << 20, roles=roles, batches=[4])
x = np.ones((4, 3, {side}, {side}), np.float32)
for _ in range(3):
    adapter.adapt(x) if roles == "adapt" else adapter.predict(x[:1])
adapter.load(saved)
adapter.reset()
adapter.load(saved)
print(json.dumps({{"budget": int(needed[1]) << 20, "peak": adapter.memory["peak"], "graphs": adapter.memory["graphs"]}}))
"""


@pytest.mark.native
@pytest.mark.parametrize("roles", ["predict", "adapt"])
def test_a_budget_is_kept_while_states_are_loaded(tmp_path: Path, roles: str) -> None:
    """Also by an adapter that only predicts, whose graphs write no parameter."""
    path, saved = large(tmp_path), tmp_path / "saved"
    with Adapter.open(path) as adapter:
        adapter.adapt(frames(4))
        adapter.save(saved)
    found = run_json([sys.executable, "-c", WITHIN.format(side=SIDE), str(path), str(saved), roles])
    assert (f"{roles}.b4" in found["graphs"]) or roles == "predict"
    assert 0.8 * found["budget"] < found["peak"] <= found["budget"]


def test_a_state_that_cannot_be_read_to_its_end_changes_nothing(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All was checked, and then the disk fails."""
    from edgeadapt.bundle import tensors

    with Adapter.open(path) as adapter:
        adapter.adapt(frames(4))
        saved = adapter.save(tmp_path / "saved")
        adapter.adapt(frames(4, 1))
        before, counts = adapter.state, adapter.stats
        asked, real = [], tensors.Stored._read

        def failing(self: Any, begin: int, size: int) -> bytes:
            asked.append(begin)
            if len(asked) == fails:
                raise StateError("the disk is gone", "get another")
            return real(self, begin, size)

        monkeypatch.setattr(tensors.Stored, "_read", failing)
        fails = -1
        adapter.load(saved)
        reads = len(asked)
        adapter.load(saved)
        assert reads >= 2 + 3 * len(before)
        restored = adapter.state
        assert any(not np.array_equal(restored[name], before[name]) for name in before)
        monkeypatch.setattr(tensors.Stored, "_read", real)
        adapter.adapt(frames(4, 2))
        now, counts = adapter.state, adapter.stats
        monkeypatch.setattr(tensors.Stored, "_read", failing)
        for fails in range(1, reads + 1):
            asked.clear()
            with pytest.raises(StateError, match="the disk is gone"):
                adapter.load(saved)
            assert adapter.stats == counts
            assert all(np.array_equal(adapter.state[name], now[name]) for name in now)
        fails = -1
        adapter.load(saved)
        assert all(np.array_equal(adapter.state[name], restored[name]) for name in now)
