"""What a saved state says beside its tensors: it comes back, is checked, and files without it are read as before."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some

from edgeadapt.bundle import tensors
from edgeadapt.errors import StateError
from edgeadapt.runtime import checkpoint
from edgeadapt.runtime.checkpoint import Snapshot
from edgeadapt.runtime.kept import Copy, Kept
from tests.toybundle import Toy

pytestmark = pytest.mark.device

LEARNED = ("norm.gamma", "norm.beta", "gamma.m", "beta.m")


@pytest.fixture(scope="module")
def toy() -> Toy:
    return Toy(batches=(1,))


def drawn(toy: Toy, seed: int, names: tuple[str, ...] | None = None) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(toy.state[name].shape, dtype=np.float32) for name in names or toy.state}


def equal(left: Any, right: Any) -> bool:
    return left.keys() == right.keys() and all((left[name] == right[name]).all() for name in left)


KINDS = [
    lambda toy: Kept(True, False),
    lambda toy: Kept(True, True),
    lambda toy: Kept(False, True),
    lambda toy: Kept(True, False, start=Copy(drawn(toy, 1, LEARNED), True)),
    lambda toy: Kept(False, False, laid_by=Copy(drawn(toy, 2, LEARNED), True)),
]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_kept_comes_back(toy: Toy, tmp_path: Path, kind: Any) -> None:
    kept, state = kind(toy), drawn(toy, 0)
    digest = checkpoint.write(tmp_path / "x", Snapshot(state, {"frames": 3}, {"rate": 0.5}, kept=kept).at_hand, toy.manifest(), 7)
    found = checkpoint.read(tmp_path / "x", toy.manifest())
    assert equal(found.tensors, state)
    assert (found.counters, found.hyper, found.generation, found.sha256) == ({"frames": 3}, {"rate": 0.5}, 7, digest)
    assert found.kept is not None
    assert (found.kept.proven, found.kept.wholly) == (kept.proven, kept.wholly)
    for mine, theirs in ((found.kept.start, kept.start), (found.kept.laid_by, kept.laid_by)):
        assert (mine is None) == (theirs is None)
        assert mine is None or (mine.wholly == theirs.wholly and equal(mine.tensors, theirs.tensors))


def test_files_that_say_nothing_of_it_are_read_as_before(toy: Toy, tmp_path: Path) -> None:
    """Byte for byte what was written before there was anything to say."""
    checkpoint.write(tmp_path / "x", Snapshot(drawn(toy, 0), {}, {}).at_hand, toy.manifest())
    found, header = tensors.read(tmp_path / "x")
    assert set(header) == {"format", "model", "weights_sha256", "compatible", "generation", "counters", "hyper", "sha256"}
    assert header["format"] == "1"
    assert set(found) == set(toy.state)
    assert checkpoint.read(tmp_path / "x", toy.manifest()).kept is None


def rewritten(path: Path, toy: Toy, text: str, more: dict[str, np.ndarray]) -> None:
    """A whole file with this said of it, its checksum right."""
    snapshot = Snapshot({**drawn(toy, 0), **more}, {}, {})
    checkpoint.write(path, replace(snapshot, kept=Said(text)).at_hand, toy.manifest())


class Said(Kept):
    """With a text of its own."""

    def __init__(self, text: str) -> None:
        super().__init__(True, False)
        object.__setattr__(self, "_text", text)

    def text(self) -> str:
        return self._text  # type: ignore[attr-defined]


GOOD = {"proven": True, "wholly": False}


@pytest.mark.parametrize(
    ("text", "more"),
    [
        ("", {}),
        ("{", {}),
        ("[]", {}),
        ("[" * 100_000, {}),
        (json.dumps({"proven": True}), {}),
        (json.dumps({**GOOD, "wholly": 1}), {}),
        (json.dumps({**GOOD, "other": True}), {}),
        (json.dumps({**GOOD, "laid_by": True}), {}),
        (json.dumps({"proven": False, "wholly": False, "start": True}), {}),
        (json.dumps(GOOD), {"start norm.gamma": np.zeros(8, np.float32)}),
        (json.dumps(GOOD), {"other norm.gamma": np.zeros(8, np.float32)}),
        (json.dumps({**GOOD, "start": True}), {"start norm.gamma": np.zeros(7, np.float32)}),
        (json.dumps({**GOOD, "start": True}), {"start norm.gamma": np.zeros(8, np.float16)}),
        (json.dumps({**GOOD, "start": True}), {"start nothing": np.zeros(8, np.float32)}),
        (json.dumps({**GOOD, "start": True}), {"start norm.gamma": np.full(8, np.nan, np.float32)}),
    ],
)
def test_what_cannot_be_is_refused(toy: Toy, tmp_path: Path, text: str, more: dict[str, np.ndarray]) -> None:
    rewritten(tmp_path / "x", toy, text, more)
    with pytest.raises(StateError, match=r"cannot be read|not one of this bundle's state"):
        checkpoint.read(tmp_path / "x", toy.manifest())


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(some.text(max_size=40) | some.dictionaries(some.sampled_from(["proven", "wholly", "start", "laid_by", "x"]), some.booleans()).map(json.dumps))
def test_any_text_is_read_or_refused(toy: Toy, tmp_path: Path, text: str) -> None:
    try:
        rewritten(tmp_path / "x", toy, text, {})
        checkpoint.read(tmp_path / "x", toy.manifest())
    except (StateError, UnicodeEncodeError):
        return


@pytest.mark.parametrize("size", [1, 50, 400, 800])
def test_a_damaged_file_is_refused(toy: Toy, tmp_path: Path, size: int) -> None:
    kept = Kept(True, False, start=Copy(drawn(toy, 1, LEARNED), True))
    checkpoint.write(tmp_path / "x", Snapshot(drawn(toy, 0), {}, {}, kept=kept).at_hand, toy.manifest())
    data = bytearray((tmp_path / "x").read_bytes())
    data[-size] ^= 1
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(StateError):
        checkpoint.read(tmp_path / "x", toy.manifest())
