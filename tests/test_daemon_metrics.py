"""The text that Prometheus reads: by its own parser where that is installed, and byte for byte."""

from __future__ import annotations

import math
import os
import re
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as some

from edgeadapt.errors import UsageError
from edgeadapt.runtime.daemon import metrics
from edgeadapt.runtime.daemon.metrics import Measures, Registry

device = pytest.mark.device

TEXT = """\
# HELP edgeadapt_updates_total Steps,\\nby \\\\ outcome.
# TYPE edgeadapt_updates_total counter
edgeadapt_updates_total{outcome="kept"} 2.5
edgeadapt_updates_total{outcome="a\\"b\\\\c\\nd"} 1
# HELP edgeadapt_drift_score How far.
# TYPE edgeadapt_drift_score gauge
edgeadapt_drift_score 0.125
# HELP edgeadapt_inference_seconds Time.
# TYPE edgeadapt_inference_seconds histogram
edgeadapt_inference_seconds_bucket{le="0.5"} 2
edgeadapt_inference_seconds_bucket{le="2"} 3
edgeadapt_inference_seconds_bucket{le="+Inf"} 4
edgeadapt_inference_seconds_sum 11.75
edgeadapt_inference_seconds_count 4
# HELP edgeadapt_build_info What runs.
# TYPE edgeadapt_build_info gauge
edgeadapt_build_info{version="1.2.3",method="eata"} 1
"""


def samples(text: bytes) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """As Prometheus's own client reads them, each once."""
    from prometheus_client.parser import text_string_to_metric_families

    found: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
    for family in text_string_to_metric_families(text.decode()):
        for sample in family.samples:
            key = sample.name, frozenset(sample.labels.items())
            assert key not in found
            found[key] = sample.value
    return found


def sample(registry: Registry, name: str, **labels: str) -> float | None:
    return samples(registry.render()).get((name, frozenset(labels.items())))


def lines(registry: Registry) -> list[str]:
    return [line for line in registry.render().decode().splitlines() if not line.startswith("#")]


def filled() -> Registry:
    registry = Registry()
    updates = registry.counter("edgeadapt_updates_total", "Steps,\nby \\ outcome.", ["outcome"])
    updates.add(2, outcome="kept")
    updates.add(outcome='a"b\\c\nd')
    updates.add(0.5, outcome="kept")
    registry.gauge("edgeadapt_drift_score", "How far.").set(0.125)
    registry.gauge("edgeadapt_temperature_celsius", "Nothing was measured.")
    times = registry.histogram("edgeadapt_inference_seconds", "Time.", bounds=[0.5, 2])
    for value in (0.25, 0.5, 1, 10, math.nan):
        times.observe(value)
    registry.info("edgeadapt_build_info", "What runs.", version="1.2.3", method="eata")
    return registry


@device
def test_the_text_byte_for_byte():
    assert filled().render().decode() == TEXT


@device
def test_numbers():
    registry = Registry()
    gauge = registry.gauge("a", "A.", ["of"])
    values = [3.0, -0.1, 1e300, 2.0**60, math.inf, -math.inf, math.nan, True, 1e-7]
    for index, value in enumerate(values):
        gauge.set(value, of=index)
    shown = [line.split()[1] for line in lines(registry)]
    assert shown == ["3", "-0.1", "1e+300", "1.152921504606847e+18", "+Inf", "-Inf", "NaN", "1", "1e-07"]


def test_prometheus_reads_what_was_written():
    registry = filled()
    assert sample(registry, "edgeadapt_updates_total", outcome="kept") == 2.5
    assert sample(registry, "edgeadapt_updates_total", outcome='a"b\\c\nd') == 1
    assert sample(registry, "edgeadapt_inference_seconds_bucket", le="+Inf") == 4
    assert sample(registry, "edgeadapt_build_info", version="1.2.3", method="eata") == 1
    assert len(samples(registry.render())) == 9


@given(some.dictionaries(some.text(max_size=40), some.floats(), max_size=20), some.text(max_size=40))
def test_prometheus_reads_every_label_and_number(values, told):
    registry = Registry()
    gauge = registry.gauge("edgeadapt_memory_used_bytes", told, ["pool"])
    expected = {}
    for text, value in values.items():
        gauge.set(value, pool=text)
        expected[text.encode("utf-8", "replace").decode()] = value  # what cannot be encoded is a question mark
    found = {dict(labels)["pool"]: value for (_, labels), value in samples(registry.render()).items()}
    assert found.keys() == expected.keys()
    for text, value in expected.items():
        assert found[text] == value or (math.isnan(found[text]) and math.isnan(value))


@given(some.lists(some.floats(allow_nan=False), max_size=50), some.lists(some.floats(-1e9, 1e9), min_size=1, max_size=8, unique=True))
def test_a_histogram_counts_what_is_at_most_each_bound(values, bounds):
    registry = Registry()
    times = registry.histogram("edgeadapt_update_seconds", "Time.", bounds=sorted(bounds))
    for value in values:
        times.observe(value)
    found = samples(registry.render())
    for bound in (*bounds, math.inf):
        counted = [count for (name, labels), count in found.items() if name.endswith("_bucket") and float(dict(labels)["le"]) == bound]
        assert counted == [sum(value <= bound for value in values)]
    assert found["edgeadapt_update_seconds_count", frozenset()] == len(values)


@device
def test_values_are_asked_when_the_text_is_made_and_what_fails_is_left_out(caplog):
    registry = Registry()
    answers = [1.0, 2.0, None]
    registry.gauge("a", "A.").read(lambda: answers.pop(0))
    fails = registry.gauge("b", "B.", ["of"])
    fails.read(lambda: 1 / 0, of="x")
    fails.read(lambda: 5, of="y")
    counts = {("camera", "crc"): 3, ("camera", "gap"): 1}
    registry.counter("c_total", "C.", ["source", "kind"]).read_all(lambda: counts)
    registry.gauge("d", "D.", ["of"]).read_all(lambda: {("x", "y"): 1})  # too many labels
    whole = ['b{of="y"} 5', 'c_total{source="camera",kind="crc"} 3', 'c_total{source="camera",kind="gap"} 1']
    assert lines(registry) == ["a 1", *whole]
    counts["camera", "crc"] = 4
    assert lines(registry)[:3] == ["a 2", 'b{of="y"} 5', 'c_total{source="camera",kind="crc"} 4']
    assert lines(registry)[0] == 'b{of="y"} 5'
    assert [record.getMessage()[:16] for record in caplog.records] == ["b cannot be read", "d cannot be read"]


@device
def test_a_value_may_be_asked_of_who_holds_metrics_itself():
    registry = Registry()
    other = registry.gauge("a", "A.")

    def asks() -> float:
        other.set(1)
        return 2

    registry.gauge("b", "B.").read(asks)
    assert lines(registry) == ["b 2"]


@device
def test_labels_cannot_make_a_metric_grow(caplog):
    registry = Registry()
    counter, gauge = registry.counter("c_total", "C.", ["kind"]), registry.gauge("g", "G.", ["kind"])
    asked, every = registry.gauge("r", "R.", ["kind"]), registry.gauge("e", "E.", ["kind"])
    times = registry.histogram("h_seconds", "H.", ["kind"], [1])
    for index in range(1000):
        counter.add(kind=index)
        counter.add(kind=index)
        gauge.set(index, kind=index)
        asked.read(lambda: 1, kind=index)
        times.observe(0.5, kind=index)
    every.read_all(lambda: {(str(index),): 1 for index in range(1000)})
    found = lines(registry)
    for name in ("c_total{", "g{", "r{", "e{", "h_seconds_count{"):
        assert sum(line.startswith(name) for line in found) == metrics.SETS
    assert f'c_total{{kind="other"}} {2 * (1000 - metrics.SETS + 1)}' in found  # nothing that was counted is lost
    assert f'h_seconds_count{{kind="other"}} {1000 - metrics.SETS + 1}' in found
    counter.add(kind=0)
    assert 'c_total{kind="0"} 3' in lines(registry)
    assert len(caplog.records) == 5  # each tells it once
    gauge.set(1, kind="0" * 10_000)
    assert max(map(len, lines(registry))) < 200


@device
def test_long_label_values_are_cut():
    registry = Registry()
    registry.gauge("g", "G.", ["kind"]).set(1, kind="é" * 1000)
    assert lines(registry) == [f'g{{kind="{"é" * metrics.LONGEST}"}} 1']


@device
def test_label_values_that_look_the_same_are_the_same():
    """Two samples of one name would have Prometheus refuse all of them."""
    registry = Registry()
    gauge = registry.gauge("g", "G.", ["kind"])
    for value, kind in enumerate(["\ud800", "\udfff", "?"]):
        gauge.set(value, kind=kind)
    assert lines(registry) == ['g{kind="?"} 2']


@device
def test_what_a_programmer_gets_wrong():
    registry = Registry()
    counter = registry.counter("a_total", "A.", ["kind"])
    for wrong in (
        lambda: registry.gauge("a_total", "again"),
        lambda: registry.counter("a", "no total"),
        lambda: registry.info("a", "no info"),
        lambda: registry.gauge("1a", "a digit first"),
        lambda: registry.gauge("a b", "a blank"),
        lambda: registry.gauge("b", "B.", ["__name__"]),
        lambda: registry.gauge("b", "B.", ["a-b"]),
        lambda: registry.gauge("b", "B.", ["x", "x"]),
        lambda: registry.histogram("h", "H.", ["le"]),
        lambda: registry.histogram("h", "H.", bounds=[2, 1]),
        lambda: registry.histogram("h", "H.", bounds=[1, math.inf]),
        lambda: registry.histogram("h", "H.", bounds=[]),
        lambda: counter.add(-1, kind="x"),
        lambda: counter.add(math.nan, kind="x"),
        lambda: counter.add(1),
        lambda: counter.add(1, sort="x"),
        lambda: counter.add(1, kind="x", more="y"),
    ):
        with pytest.raises(ValueError, match=r"."):
            wrong()
    assert registry.render() == b""


@device
def test_threads_that_count_lose_nothing():
    registry = Registry()
    counter, times = registry.counter("a_total", "A.", ["of"]), registry.histogram("b_seconds", "B.", bounds=[1])

    def count() -> None:
        for _ in range(2000):
            counter.add(of="x")
            times.observe(0.5)

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        found = lines(registry)
        assert found[-1] == "b_seconds_count " + found[-3].split()[1]
    counted = ['a_total{of="x"} 8000', 'b_seconds_bucket{le="1"} 8000', 'b_seconds_bucket{le="+Inf"} 8000']
    assert lines(registry) == [*counted, "b_seconds_sum 4000", "b_seconds_count 8000"]


@device
def test_a_text_file_is_replaced_whole(tmp_path):
    registry = filled()
    path = tmp_path / "edgeadapt.prom"
    registry.write_textfile(path)
    assert path.read_text() == TEXT
    (tmp_path / ".edgeadapt.prom.tmp").write_text("what a crash left, and longer than what is written" * 100)
    before = path.stat().st_ino
    registry.write_textfile(path)
    assert path.read_text() == TEXT
    assert path.stat().st_ino != before
    assert os.listdir(tmp_path) == ["edgeadapt.prom"]


@device
def test_a_text_file_that_cannot_be_written_leaves_the_one_before(tmp_path, monkeypatch):
    registry = filled()
    path = tmp_path / "edgeadapt.prom"
    path.write_text("before")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        registry.write_textfile(path)
    assert path.read_text() == "before"
    assert os.listdir(tmp_path) == ["edgeadapt.prom"]
    with pytest.raises(UsageError, match=r"name it .*/edgeadapt\.prom"):
        registry.write_textfile(tmp_path / "edgeadapt.txt")


@device
def test_a_link_that_somebody_laid_is_not_followed(tmp_path):
    (tmp_path / "other").write_text("of somebody else")
    (tmp_path / ".edgeadapt.prom.tmp").symlink_to(tmp_path / "other")
    with pytest.raises(OSError, match=r"."):
        filled().write_textfile(tmp_path / "edgeadapt.prom")
    assert (tmp_path / "other").read_text() == "of somebody else"


NAMES = [
    "edgeadapt_build_info",
    "edgeadapt_up_seconds",
    "edgeadapt_memory_budget_bytes",
    "edgeadapt_memory_used_bytes",
    "edgeadapt_process_resident_bytes",
    "edgeadapt_inference_seconds",
    "edgeadapt_update_seconds",
    "edgeadapt_updates_total",
    "edgeadapt_rollbacks_total",
    "edgeadapt_state",
    "edgeadapt_drift_score",
    "edgeadapt_sensor_frames_total",
    "edgeadapt_sensor_frame_errors_total",
    "edgeadapt_checkpoint_timestamp_seconds",
    "edgeadapt_temperature_celsius",
    "edgeadapt_throttled",
]


def measured() -> Measures:
    now = [100.0]
    found = Measures("1.2.3", ["observing", "adapting"], {"method": "eata"}, lambda: now[0])
    now[0] += 2.5
    found.enter("observing")
    found.enter("adapting")
    found.budget.set(128 << 20)
    found.used.set(7 << 20, pool="weights")
    found.resident.set(64 << 20)
    found.inference.observe(0.012)
    found.update.observe(0.25)
    found.updates.add(outcome="kept")
    found.rollbacks.add(reason="collapse")
    found.drift.set(0.3)
    found.frames.add(5, source="camera")
    found.frame_errors.add(source="camera", kind="crc")
    found.checkpoint.set(1.7e9)
    found.temperature.set(61.2)
    found.throttled.set(False)
    return found


@device
def test_the_daemons_metrics_have_the_names_that_dashboards_know():
    text = measured().registry.render().decode()
    assert re.findall(r"^# TYPE (\w+) ", text, re.MULTILINE) == NAMES
    assert not re.search(r"_(ms|milliseconds|kb|mb|kib|mib|percent)\b", " ".join(NAMES))
    with pytest.raises(ValueError, match="dreaming is none of observing, adapting"):
        measured().enter("dreaming")


def test_prometheus_reads_the_daemons_metrics():
    registry = measured().registry
    assert sample(registry, "edgeadapt_build_info", version="1.2.3", method="eata") == 1
    assert sample(registry, "edgeadapt_up_seconds") == 2.5
    assert sample(registry, "edgeadapt_state", state="observing") == 0
    assert sample(registry, "edgeadapt_state", state="adapting") == 1
    assert sample(registry, "edgeadapt_memory_used_bytes", pool="weights") == 7 << 20
    assert sample(registry, "edgeadapt_inference_seconds_bucket", le="0.01") == 0
    assert sample(registry, "edgeadapt_inference_seconds_bucket", le="0.025") == 1
    assert sample(registry, "edgeadapt_sensor_frame_errors_total", source="camera", kind="crc") == 1
    assert sample(registry, "edgeadapt_checkpoint_timestamp_seconds") == 1.7e9
    assert sample(registry, "edgeadapt_throttled") == 0


def test_the_parser_that_these_tests_use_refuses_what_is_wrong(tmp_path: Path):
    with pytest.raises(ValueError, match=r"."):
        samples(b'a{b="c} 1\n')
