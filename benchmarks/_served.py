"""A daemon as a process of its own, as a benchmark starts it, feeds it and asks it."""

from __future__ import annotations

import http.client
import io
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeadapt.errors import EdgeAdaptError
from edgeadapt.runtime.daemon.client import Client

ROOT = Path(__file__).resolve().parents[1]
TOKEN = "a-token-of-the-benchmark"


def free_port() -> int:
    """One of this machine that nobody listens at."""
    with socket.socket() as wire:
        wire.bind(("127.0.0.1", 0))
        return int(wire.getsockname()[1])


def web(folder: Path, port: int) -> str:
    """The section of a configuration that has HTTP at a port, with a token."""
    path = folder / "token"
    path.write_text(TOKEN)
    path.chmod(0o600)
    return f'[http]\nenabled = true\nport = {port}\ntoken_file = "{path}"\n'


class Served:
    """`edgeadapt serve`, started.

    Args:
        folder: where its configuration, its log and its socket are put.
        config: the text of it, without the control socket's.
        environment: variables beside ours.

    Attributes:
        run: the process. client: asks it. begun: when it was started, by the monotonic clock.
    """

    def __init__(self, folder: Path, config: str, environment: dict[str, str] | None = None) -> None:
        path, self.log = folder / "edgeadapt.toml", folder / "log"
        path.write_text(f'{config}\n[control]\nsocket = "{folder}/c.sock"\n')
        self.client, self.begun = Client(folder / "c.sock"), time.monotonic()
        command = [sys.executable, "-m", "edgeadapt", "serve", "--config", str(path)]
        with self.log.open("ab") as log:
            self.run = subprocess.Popen(command, stderr=log, cwd=ROOT, env={**os.environ, **(environment or {})})

    def __enter__(self) -> Served:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def kill(self) -> None:
        """SIGKILL, where it still runs."""
        self.run.kill()
        self.run.wait()

    def end(self) -> int:
        """SIGTERM; the exit code."""
        self.run.send_signal(signal.SIGTERM)
        return self.run.wait(120)

    def status(self) -> dict[str, Any]:
        """What it says of itself."""
        found: Any = self.client.call("status")
        return dict(found)

    def ready(self, seconds: float = 300.0) -> dict[str, Any]:
        """Its status as soon as it is not starting any more.

        Raises:
            SystemExit: it ended, or took longer.
        """
        return self.until(lambda status: status["mode"] != "starting" and status, seconds)

    def until(self, what: Callable[[dict[str, Any]], Any], seconds: float = 120.0) -> Any:
        """What that gives of its status, as soon as it is true.

        Raises:
            SystemExit: it ended, or took longer.
        """
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.run.poll() is None:
            with suppress(EdgeAdaptError):
                if found := what(self.status()):
                    return found
            time.sleep(0.01)
        raise SystemExit(f"the daemon {'takes too long' if self.run.poll() is None else 'has ended'}: {self.log.read_text()[-2000:]}")


class Feeder:
    """Posts frames from a thread of its own, until it is told to stop or the daemon has gone.

    Args:
        port: the daemon's.
        frames: arrays of frames, uint8 [N,H,W,C] each, one request each.
        pause: seconds between two requests.

    Attributes:
        sent: frames that it has taken.
    """

    def __init__(self, port: int, frames: Iterator[NDArray[Any]], pause: float) -> None:
        self._port, self._frames, self._pause, self._stop = port, frames, pause, threading.Event()
        self.sent = 0
        self._thread = threading.Thread(target=self._feed, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """No more."""
        self._stop.set()
        self._thread.join(60)

    def _feed(self) -> None:
        with closing(http.client.HTTPConnection("127.0.0.1", self._port, timeout=30)) as connection, suppress(OSError, http.client.HTTPException):
            while not self._stop.wait(self._pause):
                body, some = io.BytesIO(), next(self._frames)
                np.save(body, some)
                connection.request("POST", "/frames", body.getvalue(), {"Authorization": f"Bearer {TOKEN}"})
                answer = connection.getresponse()
                answer.read()
                self.sent += len(some) if answer.status == 202 else 0
