"""Video files and network cameras, with the real OpenCV (the extra `camera`). Devices of V4L2 have a stand-in, in tests/test_camera.py."""

from __future__ import annotations

import http.server
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import cv2
import numpy as np
import pytest

from edgeadapt.bundle import InputSpec, Task
from edgeadapt.devices.sources import Wanted
from edgeadapt.devices.sources.camera import Camera
from edgeadapt.errors import SourceError
from tests.fakecamera import GENEROUS, readers, until
from tests.source_contract import Taking, descriptors

COLOUR = Wanted(InputSpec((3, 48, 64)), Task("classification", 5))
GREY = Wanted(InputSpec((1, 48, 64)), Task("classification", 5))
FRAMES = np.random.default_rng(5).integers(0, 256, (7, 48, 64, 3)).astype(np.uint8)  # RGB


def video(path: Path, codec: str, frames: np.ndarray = FRAMES) -> Path:
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*codec), 10, (frames.shape[2], frames.shape[1]))
    assert writer.isOpened()
    for frame in frames:
        writer.write(np.ascontiguousarray(frame[..., ::-1]))
    writer.release()
    return path


@pytest.mark.parametrize(("codec", "name"), [("FFV1", "a.avi"), ("FFV1", "a.mkv"), ("png ", "a.mov"), ("HFYU", "a.avi")])
def test_frames_of_a_lossless_file_are_those_that_were_written(codec, name, tmp_path):
    with Camera(str(video(tmp_path / name, codec)), COLOUR) as camera:
        found = list(camera)
        assert not camera.live
        assert camera.counts == {}
    assert [frame.id for frame in found] == list(range(len(FRAMES)))
    assert np.array_equal([frame.pixels for frame in found], FRAMES)


def test_a_file_loses_no_frame_to_a_slow_taker(tmp_path):
    camera = iter(Camera(str(video(tmp_path / "a.avi", "FFV1")), GREY))
    found = []
    for frame in camera:
        found.append(frame)
        threading.Event().wait(0.01)
    assert [frame.pixels.shape for frame in found] == [(48, 64, 1)] * len(FRAMES)


def test_a_file_can_be_stopped_between_two_frames(tmp_path):
    camera = Camera(str(video(tmp_path / "a.avi", "FFV1")), COLOUR)
    found = []
    for frame in camera:
        found.append(frame.id)
        if len(found) == 3:
            camera.stop()
    assert found == [0, 1, 2]


def test_a_lossy_file_is_near_what_was_written(tmp_path):
    smooth = np.stack([np.add.outer(np.arange(48), np.arange(64)) + shift for shift in range(0, 70, 10)])[..., None] + np.array([0, 30, 60])
    found = [frame.pixels for frame in Camera(str(video(tmp_path / "a.avi", "MJPG", smooth.astype(np.uint8))), COLOUR)]
    assert np.abs(np.array(found, int) - smooth).mean() < 4  # with red and blue exchanged it would be 40


@pytest.mark.parametrize("name", ["a.mp4", "a.avi", "a"])
def test_what_is_no_video_is_refused(name, tmp_path):
    (tmp_path / name).write_bytes(b"no video" * 500)
    with pytest.raises(SourceError, match=r"cannot be opened|no frame"):
        list(Camera(str(tmp_path / name), COLOUR))


@pytest.mark.parametrize("kept", [0.9, 0.5, 0.1])
def test_a_file_that_was_cut_short_gives_what_it_has_or_is_refused(kept, tmp_path):
    path = video(tmp_path / "a.mkv", "FFV1")
    data = path.read_bytes()
    path.write_bytes(data[: int(kept * len(data))])
    found = []
    with suppress(SourceError):
        found += list(Camera(str(path), COLOUR))
    for index, frame in enumerate(found[:-1]):
        assert np.array_equal(frame.pixels, FRAMES[index])


def test_a_file_that_is_left_is_closed(tmp_path):
    path = video(tmp_path / "a.avi", "FFV1")
    for frame in Camera(str(path), COLOUR):
        break
    assert not descriptors(str(path))


@contextmanager
def serving(answer: Callable[[http.server.BaseHTTPRequestHandler, threading.Event], None]) -> Iterator[tuple[str, threading.Event]]:
    """A network camera: its address, and what ends it."""
    ended = threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            with suppress(OSError):  # whoever looked is gone
                answer(self, ended)

        def log_message(self, *_: object) -> None:
            pass

    class Server(http.server.ThreadingHTTPServer):
        daemon_threads = True

    with Server(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/stream.mjpg", ended
        finally:
            ended.set()
            server.shutdown()
            thread.join()
    until(lambda: not readers())


def pictures(count: int | None) -> Callable[[http.server.BaseHTTPRequestHandler, threading.Event], None]:
    """Sends so many pictures, grey by their number; then, for None never, says nothing more."""

    def answer(handler: http.server.BaseHTTPRequestHandler, ended: threading.Event) -> None:
        handler.send_response(200)
        handler.send_header("Content-Type", "multipart/x-mixed-replace; boundary=next")
        handler.end_headers()
        number = 0
        while not ended.is_set() and (count is None or number < count):
            data = cv2.imencode(".jpg", np.full((48, 64, 3), min(8 * number, 255), np.uint8))[1].tobytes()
            handler.wfile.write(b"--next\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n%b\r\n" % (len(data), data))
            handler.wfile.flush()
            number += 1
            ended.wait(0.02)
        ended.wait(GENEROUS)

    return answer


def test_a_network_camera_gives_newer_and_newer_frames_until_it_is_stopped():
    with serving(pictures(None)) as (address, _), Taking(Camera(address, COLOUR, stall=GENEROUS)) as taking:
        assert taking.source.live
        found = [taking.frame() for _ in range(5)]
        taking.source.stop()
        assert taking.ended()
    assert taking.failure is None
    greys = [int(frame.pixels.mean()) for frame in found]
    assert greys == sorted(greys)
    assert [frame.id for frame in found] == [0, 1, 2, 3, 4]


def test_a_network_camera_that_breaks_off():
    with serving(pictures(60)) as (address, ended), Taking(Camera(address, COLOUR, stall=GENEROUS)) as taking:
        taking.frame()
        ended.set()
        assert taking.ended()
        assert isinstance(taking.failure, SourceError)
        assert "no more frames" in str(taking.failure)


def test_a_network_camera_that_says_nothing_more_has_stalled():
    with serving(pictures(60)) as (address, _):
        camera = Camera(address, COLOUR, stall=4.0)
        with Taking(camera) as taking:
            taking.frame()
            assert taking.ended()
        assert isinstance(taking.failure, SourceError)
        assert "no frame for 4 s" in str(taking.failure) or "no more frames" in str(taking.failure)


def test_a_stop_ends_the_wait_for_a_network_camera_that_never_answers():
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"rtsp://127.0.0.1:{server.getsockname()[1]}/x"
        with Taking(Camera(address, COLOUR, stall=20.0)) as taking:
            caller, _ = server.accept()
            taking.source.stop()
            assert taking.ended()
            assert taking.failure is None
            caller.close()
        until(lambda: not readers())


def test_a_network_camera_that_is_not_there():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(SourceError, match="cannot be opened"):
        list(Camera(f"rtsp://127.0.0.1:{port}/x", COLOUR))


def test_a_camera_that_never_comes_back_does_not_keep_the_program_from_ending():
    with socket.create_server(("127.0.0.1", 0)) as server:
        code = (
            "import sys, threading\n"
            "from edgeadapt.bundle import InputSpec, Task\n"
            "from edgeadapt.devices.sources import Wanted\n"
            "from edgeadapt.devices.sources.camera import Camera\n"
            "camera = Camera(sys.argv[1], Wanted(InputSpec((3, 48, 64)), Task('classification', 5)), stall=500.0)\n"
            "threading.Thread(target=lambda: (sys.stdin.readline(), camera.stop())).start()\n"
            "print(len(list(camera)), [thread.name.split()[0] for thread in threading.enumerate() if thread.daemon])\n"
        )
        address = f"http://127.0.0.1:{server.getsockname()[1]}/x"
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        child = subprocess.Popen([sys.executable, "-c", code, address], text=True, **pipes)
        caller, _ = server.accept()
        out, err = child.communicate("stop\n", timeout=GENEROUS)
        caller.close()
    assert (child.returncode, out) == (0, "0 ['camera']\n"), err


def test_cv2_is_loaded_only_where_a_camera_is_made():
    code = "import sys, edgeadapt.devices.sources.camera\nprint('cv2' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ})
    assert run.stdout == "False\n"
