"""Results on disk: whole or not there, and only under their own key."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from edgeadapt.bench.record import COLUMNS, Record, key_of, read, write
from edgeadapt.errors import UsageError

pytestmark = pytest.mark.device

COUNT = 20


@pytest.fixture
def record() -> Record:
    rng = np.random.default_rng(0)
    columns = {name: rng.integers(0, 2, COUNT).astype(kind) for name, kind in COLUMNS.items()}
    columns["confidence"] = rng.random(COUNT).astype(np.float32)
    columns["wrong"][3] = np.nan
    return Record("a" * 64, {"seed": 2, "domains": ["fog", "clean"], "ms_p50": 1.5, "joules_frame": None}, columns)


def test_a_run_comes_back_as_it_was_written(record, tmp_path):
    path = write(tmp_path / "runs", "row", record)
    assert path == tmp_path / "runs" / "row.json"
    found = read(tmp_path / "runs", "row", record.key)
    assert found is not None
    assert found.facts == record.facts
    for name, kind in COLUMNS.items():
        assert found.columns[name].dtype == kind
        assert np.array_equal(found.columns[name], record.columns[name], equal_nan=name == "wrong")
    assert sorted(os.listdir(tmp_path / "runs")) == ["row.json", "row.npz"]


def test_only_scored_frames_with_a_truth_are_outcomes(record):
    found = record.outcome()
    kept = record.columns["scored"] & np.isfinite(record.columns["wrong"])
    assert not kept[3]
    assert found.wrong.tolist() == record.columns["wrong"][kept].tolist()
    assert found.index.tolist() == record.columns["index"][kept].tolist()
    assert found.domains == ("fog", "clean")
    assert set(found.seed.tolist()) == {2}


def test_another_key_is_another_run(record, tmp_path):
    write(tmp_path, "row", record)
    assert read(tmp_path, "row", "b" * 64) is None
    assert read(tmp_path, "other", record.key) is None


def parts(folder: Path) -> list[Path]:
    return [folder / "row.json", folder / "row.npz"]


@pytest.mark.parametrize("which", [0, 1])
def test_a_file_that_is_gone_or_cut_short_is_no_result(which, record, tmp_path):
    write(tmp_path, "row", record)
    path = parts(tmp_path)[which]
    data = path.read_bytes()
    for size in (0, 1, len(data) // 2, len(data) - 2):
        path.write_bytes(data[:size])
        assert read(tmp_path, "row", record.key) is None
    path.unlink()
    assert read(tmp_path, "row", record.key) is None
    write(tmp_path, "row", record)
    assert read(tmp_path, "row", record.key) is not None


@pytest.mark.parametrize("which", [0, 1])
def test_a_file_with_a_changed_byte_is_no_result(which, record, tmp_path):
    write(tmp_path, "row", record)
    path = parts(tmp_path)[which]
    data = path.read_bytes()
    for place in range(5, len(data) - 2, max(1, len(data) // 50)):
        if data[place : place + 1].isspace():
            continue
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        assert read(tmp_path, "row", record.key) is None, place


@pytest.mark.parametrize("text", ["[]", "null", "3", '{"key": 1}', "{" * 100_000, "\ud800"])
def test_other_json_is_no_result(text, record, tmp_path):
    write(tmp_path, "row", record)
    (tmp_path / "row.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    assert read(tmp_path, "row", record.key) is None


def test_frames_of_another_run_do_not_pass_for_this_ones(record, tmp_path):
    write(tmp_path, "row", record)
    columns = {**record.columns, "wrong": 1 - record.columns["wrong"]}
    write(tmp_path, "other", Record(record.key, record.facts, columns))
    (tmp_path / "row.npz").write_bytes((tmp_path / "other.npz").read_bytes())
    assert read(tmp_path, "row", record.key) is None


def test_a_key_follows_from_all_that_matters():
    key = key_of("stream", {"batch": 4, "budget": None})
    assert key == key_of("stream", {"budget": None, "batch": 4})
    assert len({key, key_of("other", {"batch": 4, "budget": None}), key_of("stream", {"batch": 5, "budget": None})}) == 3


def test_a_place_that_cannot_be_written_is_told(record, tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(UsageError, match="results cannot be written to"):
        write(tmp_path / "file", "row", record)


def test_numbers_are_plain_json(record, tmp_path):
    told = json.loads(write(tmp_path, "row", record).read_text(encoding="utf-8"))
    assert set(told) == {"sha256", "key", "frames", "facts"}
