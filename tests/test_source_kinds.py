"""Sources by the names of their kinds, frames that are put by other threads, and the box that they wait in."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import threading

import numpy as np
import pytest

from edgeadapt.bundle import InputSpec, Task
from edgeadapt.devices.sources import Frame, Wanted
from edgeadapt.devices.sources.kinds import KINDS
from edgeadapt.devices.sources.mailbox import Mailbox
from edgeadapt.devices.sources.posted import Posted
from edgeadapt.errors import UsageError
from tests.fakecamera import NODE, plugged
from tests.source_contract import Taking

pytestmark = pytest.mark.device

WANTED = Wanted(InputSpec((3, 8, 8)), Task("classification", 5))
PIXELS = np.zeros((8, 8, 3), np.uint8)


def test_each_kind_makes_its_source_of_its_options(tmp_path, monkeypatch):
    np.savez(tmp_path / "a.npz", x=PIXELS[None])
    with plugged(monkeypatch):
        options = {
            "camera": {"device": NODE, "width": 320, "height": 240, "fps": 5, "stall": 3},
            "folder": {"path": tmp_path, "existing": True, "poll": 2, "remove": True},
            "http": {"size": 3},
            "none": {},
            "replay": {"path": tmp_path / "a.npz", "fps": 3, "loop": True},
            "serial": {"url": "/dev/ttyUSB9", "format": "csv", "baud": 9600, "stall": 3},
            "stdin": {"format": "npy"},
        }
        assert options.keys() == KINDS.keys()
        found = {kind: KINDS[kind](given, WANTED) for kind, given in options.items()}
    assert {kind: type(source).__name__ for kind, source in found.items()} == {
        "camera": "Camera",
        "folder": "Watch",
        "http": "Posted",
        "none": "Posted",
        "replay": "Replay",
        "serial": "Serial",
        "stdin": "Arrays",
    }
    assert [kind for kind, source in found.items() if source.live] == ["camera", "folder", "http", "none", "serial"]
    assert found["none"].name == "none"
    for source in found.values():
        source.close()


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("camera", {}, "camera needs the option 'device'.*it takes device, width, height, fps, stall"),
        ("folder", {"path": ".", "pol": 1}, "folder has no option 'pol'.*it takes path, existing, poll, remove"),
        ("http", {"name": "x"}, "http has no option 'name'.*it takes size"),
        ("none", {"size": 3}, "none has no option 'size'.*it takes none"),
        ("replay", {"fps": 3}, "replay needs the option 'path'"),
        ("replay", {"path": ".", "wanted": 3}, "replay has no option 'wanted'"),
        ("serial", {"baud": 3}, "serial needs the option 'url'"),
        ("stdin", {"file": 3}, "stdin has no option 'file'"),
        ("stdin", {"format": "jpeg"}, "'jpeg' is no format of standard input.*paths, npy"),
    ],
)
def test_options_that_a_kind_does_not_have_or_lacks(kind, options, message):
    with pytest.raises(UsageError, match=f"(?s){message}"):
        KINDS[kind](options, WANTED)


def test_standard_input_is_read(monkeypatch):
    out = io.BytesIO()
    np.save(out, PIXELS + 7)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(out.getvalue())))
    assert [frame.pixels.max() for frame in KINDS["stdin"]({"format": "npy"}, WANTED)] == [7]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"1," * 191 + b"1\n")))
    assert [frame.pixels.shape for frame in KINDS["stdin"]({"format": "csv"}, WANTED)] == [(3, 8, 8)]


def test_only_what_a_kind_needs_is_loaded():
    code = "import json, sys, edgeadapt.devices.sources.kinds\nprint(json.dumps(sorted(sys.modules)))"
    loaded = set(json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout))
    ours = {name.removeprefix("edgeadapt.devices.sources.") for name in loaded if name.startswith("edgeadapt.devices.sources.")}
    assert ours == {"base", "kinds"}
    assert not loaded & {"cv2", "serial", "PIL", "zipfile"}


def test_frames_that_were_put_are_taken_in_order_and_the_oldest_give_way():
    source = Posted(size=3)
    for number in range(5):
        source.put(Frame(number, PIXELS))
    with Taking(source) as taking:
        assert [taking.frame().id for _ in range(3)] == [2, 3, 4]
        assert source.counts == {"dropped": 2}
        source.put(Frame("a", None, None, "it was broken"))
        assert taking.frame().fault == "it was broken"
        source.stop()
        assert taking.ended()
    source.put(Frame(5, PIXELS))
    assert list(source) == []
    assert source.counts == {"dropped": 2}


def test_what_waits_at_a_stop_is_not_given():
    source = Posted()
    source.put(Frame(0, PIXELS))
    source.stop()
    assert list(source) == []
    with pytest.raises(UsageError, match="at least one"):
        Posted(size=0)


def test_putting_never_waits_and_loses_nothing_but_what_is_counted():
    source, found = Posted(size=4), []
    threads = [threading.Thread(target=lambda first=first: [source.put(Frame(first + n, PIXELS)) for n in range(200)]) for first in (0, 1000, 2000)]
    taker = threading.Thread(target=lambda: found.extend(frame.id for frame in source))
    for thread in (taker, *threads):
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    source._box.end()  # what waits is still taken
    taker.join(60)
    assert len(found) + source.counts["dropped"] == 600
    for first in (0, 1000, 2000):
        part = [number for number in found if first <= number < first + 1000]
        assert part == sorted(part)


def test_a_box_gives_what_is_in_it_after_its_end_but_not_after_a_stop():
    box: Mailbox[int] = Mailbox(2)
    assert box.take(0.001) is None
    assert not box.over
    box.put(1)
    box.end()
    box.put(2)
    assert box.over
    assert [box.take(), box.take()] == [1, None]
    other: Mailbox[int] = Mailbox(2)
    other.put(1)
    other.stop()
    assert other.take() is None
