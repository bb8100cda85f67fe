"""Cameras, with stand-ins for OpenCV and picamera2 (tests/fakecamera.py): what is taken of what they give, and what is made of their faults."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as some
from hypothesis.extra.numpy import arrays
from PIL import Image

from edgeadapt.bundle import InputSpec, Task
from edgeadapt.devices.sources import Wanted
from edgeadapt.devices.sources.camera import Camera
from edgeadapt.devices.sources.grabbers import as_pixels
from edgeadapt.devices.sources.live import Reopened
from edgeadapt.errors import InputError, SourceError, UsageError
from tests.fakecamera import NODE, Device, opencv, plugged, readers, until
from tests.source_contract import Taking

pytestmark = pytest.mark.device

MISSING = "/dev/edgeadapt-no-such-camera"
ADDRESS = "rtsp://user:p@ss@192.0.2.1:554/stream?token=secret"


def wanted(*shape: int) -> Wanted:
    return Wanted(InputSpec(shape), Task("classification", 5))


COLOUR, GREY = wanted(3, 4, 6), wanted(1, 4, 6)
SHAPES = some.tuples(some.integers(1, 5), some.integers(1, 5))


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    with plugged(monkeypatch) as camera:
        yield camera


def image(value: int) -> np.ndarray:
    return np.full((4, 6, 3), value, np.uint8)


def test_a_slow_taker_gets_the_newest_frame_and_the_rest_is_counted(device):
    frames = iter(camera := Camera(NODE, COLOUR))
    for first, last in ((0, 0), (1, 9), (10, 12)):
        for value in range(first, last + 1):
            device.put(image(value))
        device.drained() if first else None
        found = next(frames)
        assert found.pixels[0, 0, 0] == last
    assert found.id == 2
    assert camera.counts == {"dropped": 8 + 2, "stalls": 0}
    camera.close()


@pytest.mark.parametrize("name", [NODE, "picamera2:0"])
def test_blue_comes_first_from_a_camera_and_last_in_a_frame(name, device):
    blue_green_red = np.random.default_rng(0).integers(0, 256, (4, 6, 3)).astype(np.uint8)
    for spec, expected in ((COLOUR, blue_green_red[..., ::-1]), (GREY, None)):
        device.put(blue_green_red)
        with Camera(name, spec) as camera:
            pixels = next(iter(camera)).pixels
        device.put(image(0))  # lets the last reader go
        until(lambda: not readers())
        if expected is None:
            expected = np.asarray(Image.fromarray(blue_green_red[..., ::-1]).convert("L"))[..., None]
        assert pixels.dtype == np.uint8
        assert np.array_equal(pixels, expected)


@given(SHAPES.flatmap(lambda sides: arrays(np.uint8, (*sides, 3))))
def test_greys_are_those_that_image_files_become(found):
    assert np.array_equal(as_pixels(found, 1)[..., 0], np.asarray(Image.fromarray(np.ascontiguousarray(found[..., ::-1])).convert("L")))
    assert np.array_equal(as_pixels(np.dstack([found, found[..., :1]]), 1), as_pixels(found, 1))


@given(SHAPES.flatmap(lambda sides: arrays(np.uint8, sides)))
def test_a_grey_camera_is_grey_or_three_times_the_same(found):
    for form in (found, found[..., None]):
        assert np.array_equal(as_pixels(form, 1), found[..., None])
        assert np.array_equal(as_pixels(form, 3), np.dstack([found] * 3))


@pytest.mark.parametrize("found", [np.zeros((4, 6), np.uint16), np.zeros((4, 6, 2), np.uint8), np.zeros((1, 4, 6, 3), np.uint8)])
def test_what_is_no_image_is_a_frame_with_a_fault(found, device):
    device.put(found)
    with Camera(NODE, COLOUR) as camera:
        frames = iter(camera)
        bad = next(frames)
        device.put(image(7))
        good = next(frames)
        device.put(None)
    assert (bad.id, bad.pixels) == (0, None)
    assert "no image of 8 bits" in bad.fault
    assert (good.id, good.fault, good.pixels.max()) == (1, "", 7)


@pytest.mark.parametrize("name", [NODE, "picamera2:0"])
@pytest.mark.parametrize("end", [None, "error"])
def test_a_camera_that_breaks_off_is_a_source_error_after_the_frames_before(name, end, device):
    frames = iter(Camera(name, COLOUR))
    device.put(image(1))
    assert next(frames).pixels.max() == 1
    device.put(end if end is None else sys.modules["cv2"].error("device gone"))
    with pytest.raises(SourceError, match=r"no more frames|broke off"):
        next(frames)
    assert (device.opened, device.closed) == (1, 1)


def test_the_last_frame_before_a_break_is_given(device):
    frames = iter(Camera(NODE, COLOUR))
    device.put(image(1))
    next(frames)
    device.put(image(2))
    device.put(None)
    until(lambda: not readers())
    assert next(frames).pixels.max() == 2
    with pytest.raises(SourceError, match="no more frames"):
        next(frames)


@pytest.mark.parametrize("name", [MISSING, "7", 7])
def test_a_device_that_is_not_there(name, device):
    node = MISSING if name == MISSING else "/dev/video7"
    with pytest.raises(SourceError, match=f"{node} does not exist"):
        next(iter(Camera(name, COLOUR)))
    assert device.opened == 0


@pytest.mark.parametrize(("name", "message"), [(NODE, "no other program"), (ADDRESS, "the address"), ("picamera2:3", "index out of range.*cable")])
def test_a_device_that_cannot_be_opened(name, message, device):
    device.there = False
    with pytest.raises(SourceError, match=f"(?s)cannot be opened.*{message}"):
        next(iter(Camera(name, COLOUR)))
    assert not readers()


def test_a_device_that_may_not_be_used(device, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(SourceError, match=r"(?s)may not be used.*group video"):
        next(iter(Camera(NODE, COLOUR)))


def test_a_camera_that_stalls_and_never_comes_back_costs_one_thread(device):
    camera = Camera(NODE, COLOUR, stall=0.05)
    frames = iter(camera)
    device.put(image(1))
    next(frames)
    with pytest.raises(SourceError, match=r"no frame for 0\.05 s"):
        next(frames)
    assert camera.counts == {"dropped": 0, "stalls": 1}
    assert len(readers()) == 1
    for _ in range(3):
        with pytest.raises(SourceError, match="has not come back"):
            next(iter(Camera(NODE, COLOUR)))
    assert len(readers()) == device.opened == 1
    device.put(image(2))  # it comes back
    until(lambda: not readers())
    assert device.closed == 1
    device.put(image(3))
    with Camera(NODE, COLOUR) as again:
        assert next(iter(again)).pixels.max() == 3
    device.put(None)


def test_a_stop_does_not_wait_for_a_camera_that_does_not_come_back(device):
    with Taking(Camera(NODE, COLOUR)) as taking:
        device.drained()
        taking.source.stop()
        assert taking.ended()
        assert taking.failure is None
        assert len(readers()) == 1
    with Taking(Reopened(lambda: Camera(NODE, COLOUR), first=0.01, longest=0.02)) as taking:
        until(lambda: "has not come back" in taking.source.complaint)
        device.put(None)
        device.put(image(5))
        assert taking.frame().pixels.max() == 5
        device.put(None)


def test_a_camera_that_is_left_is_closed(device):
    device.put(image(1))
    for frame in Camera(NODE, COLOUR):
        device.put(image(2))
        break
    until(lambda: not readers())
    assert (device.opened, device.closed) == (1, 1)


def test_what_is_no_fault_of_the_camera_is_not_hidden(device, monkeypatch):
    monkeypatch.setattr(Device, "read", lambda self: {}["a defect"])
    with pytest.raises(KeyError):
        next(iter(Camera(NODE, COLOUR)))


def test_what_a_camera_is_asked_for(device, caplog, tmp_path):
    (tmp_path / "front").symlink_to(NODE)
    for name in (NODE, tmp_path / "front"):
        assert asked(device, Camera(str(name), COLOUR)) == {"node": NODE, "backend": 200, "options": None}
    some_of_it = {"node": NODE, "backend": 200, "options": None, 3: 320, 4: 240, 5: 15}
    assert asked(device, Camera(NODE, COLOUR, width=320, height=240, fps=15)) == some_of_it
    assert asked(device, Camera(ADDRESS, COLOUR, stall=2.5)) == {"node": ADDRESS, "backend": 1900, "options": [53, 2500, 54, 2500]}
    ribbon = asked(device, Camera("picamera2:", COLOUR, width=320, height=240, fps=50))
    assert ribbon["main"] == {"format": "RGB888", "size": (320, 240)}
    assert ribbon["controls"] == {"FrameDurationLimits": (20000, 20000)}
    assert asked(device, Camera("picamera2:", COLOUR))["main"] == {"format": "RGB888", "size": (1280, 720)}
    assert not caplog.records


def asked(device: Device, camera: Camera) -> dict[object, object]:
    device.asked = {}
    device.put(image(0))
    with camera:
        next(iter(camera))
    device.put(None)
    until(lambda: not readers())
    return device.asked


def test_what_a_camera_has_instead_is_told(device, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "cv2", opencv(device, {3: 640.0, 5: 29.97}))
    device.put(image(0))
    with caplog.at_level(logging.WARNING, "edgeadapt"), Camera(NODE, COLOUR, width=320, height=240, fps=30) as camera:
        next(iter(camera))
    assert [record.getMessage() for record in caplog.records] == ["/dev/null has no frame width of 320 and gives 640"]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (NODE, {"width": 320}, "a width and a height"),
        (NODE, {"width": 0, "height": 240}, "width is a number above 0"),
        (NODE, {"width": 320, "height": -1}, "height is a number above 0"),
        (NODE, {"fps": float("nan")}, "fps is a number above 0"),
        (NODE, {"fps": float("inf")}, "fps is a number above 0"),
        (NODE, {"stall": 0}, "stall is a number above 0"),
        (ADDRESS, {"width": 320, "height": 240}, "cannot be asked for a width"),
        ("clip.mp4", {"fps": 5}, "cannot be asked for a fps"),
        ("ftp://192.0.2.1/x", {}, "ftp:// is no address of a camera"),
        ("file:///etc/passwd", {}, "file:// is no address of a camera"),
        ("picamera2:front", {}, "names no camera of picamera2"),
        ("picamera2:-1", {}, "names no camera of picamera2"),
    ],
)
def test_what_cannot_be_asked_for(name, options, message, device):
    with pytest.raises(UsageError, match=message):
        Camera(name, COLOUR, **options)


@pytest.mark.parametrize("spec", [wanted(6, 128), wanted(4, 8, 8), wanted(3)])
def test_a_model_that_takes_no_images(spec, device):
    with pytest.raises(InputError, match="1 or 3 channels"):
        Camera(NODE, spec)


def test_no_such_file(device, tmp_path):
    with pytest.raises(SourceError, match="no video file"):
        Camera(str(tmp_path / "clip.mp4"), COLOUR)


@pytest.mark.parametrize(("name", "library", "hint"), [(NODE, "cv2", r"edgeadapt\[camera\]"), ("picamera2:", "picamera2", "apt install")])
def test_without_its_library_a_camera_is_refused_with_the_way_out(name, library, hint, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(UsageError, match=f"(?s){library}.*{hint}" if library != "cv2" else f"(?s)OpenCV.*{hint}"):
        Camera(name, COLOUR)


def test_neither_password_nor_key_of_an_address_is_told(device):
    device.there = False
    camera = Camera(ADDRESS, COLOUR)
    assert camera.name == "rtsp://192.0.2.1:554/stream"
    with pytest.raises(SourceError) as found:
        next(iter(camera))
    assert "p@ss" not in str(found.value)
    assert "secret" not in str(found.value)
