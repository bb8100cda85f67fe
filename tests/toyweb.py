"""A toy of a daemon's core for tests of its HTTP interface: a status that can be changed, frames, events, and what was asked."""

from __future__ import annotations

import base64
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeadapt.bundle import InputSpec
from edgeadapt.devices.sources.base import Frame
from edgeadapt.errors import StateError
from edgeadapt.preprocess import prepare
from edgeadapt.runtime.daemon.config import HttpConfig
from edgeadapt.runtime.daemon.events import Events
from edgeadapt.runtime.daemon.metrics import Registry
from edgeadapt.runtime.daemon.status import Status
from edgeadapt.runtime.daemon.web.server import Gives, Web

MIB = 2**20
TOKEN = "a-token-of-tests-0123456789"
IMAGES, SENSOR = InputSpec((3, 32, 32), resize=(32, 32)), InputSpec((3, 128))
NAMES = ("bicycle", "bus", "car", "dog", "person", "tree")


def status() -> Status:
    """A daemon that serves and adapts."""
    lines = {"Python and numpy": 31 * MIB, "onnxruntime": 22 * MIB, "weights": 9 * MIB, "activations": 14 * MIB, "optimiser": 2 * MIB}
    collapse: Any = {"spread": 0.94, "entropy": 0.12, "runs": 0.88, "agreement": 0.91, "kept": 0.97, "moved": 0.03}
    return {
        "version": 1,
        "name": "camera-3",
        "edgeadapt": "0.1.0",
        "uptime_s": 93784.0,
        "mode": "serving",
        "reason": "",
        "bundle": {"name": "street.edgeadapt", "digest": "9f2c4a1be0", "method": "anchored", "compatible": "77aa01", "on_trial": False},
        "guard": {"state": "adapting", "since_s": 421.0, "windows": 5120, "shift": 0.43, "collapse": collapse, "last": "took a step"},
        "adaptation": {"enabled": True, "paused": False, "steps": 1844, "rejected": 2, "paused_steps": 0, "windows": 5120, "passed": 12, "late": 3},
        "source": {"type": "camera", "name": "/dev/video0", "live": True, "complaint": "", "last_frame_s": 0.08, "counts": {"breaks": 1}},
        "queue": {"length": 2, "limit": 64, "dropped": 17},
        "predictions": {"count": 81920, "bad": 4, "per_second": 12.4, "latency_ms": {"p50": 21.4, "p95": 34.8, "p99": 41.0}},
        "compare": {"frames": 81000, "agreement": 0.871},
        "memory": {"resident": 84 * MIB, "peak": 91 * MIB, "budget": 128 * MIB, "level": 0, "reason": "", "lines": lines},
        "state": {
            "generation": 38,
            "active": 38,
            "last_good": 36,
            "on_probation": True,
            "written_today": 9 * MIB,
            "bytes_per_day": 64 * MIB,
            "degraded": "",
        },
        "board": {"model": "Raspberry Pi 4 Model B Rev 1.4", "temperature_c": 61.3, "throttled": False, "load": 1.12},
        "interfaces": {"http": ""},
        "events": [],
        "classes": list(NAMES),
    }


class Toy:
    """What a `Web` is given.

    Args:
        spec: the bundle's input.
        posts: whether the source is "http".
    """

    def __init__(self, spec: InputSpec | None = IMAGES, posts: bool = False) -> None:
        self.status, self.spec, self.events = status(), spec, Events()
        self.asked: list[tuple[str, Mapping[str, object]]] = []
        self.posted: list[Frame] = []
        self.unready: list[str] = []
        self.shown: NDArray[Any] | None = None
        self.go = threading.Event()
        self.go.set()
        self._posts, self._index = posts, 0
        registry = Registry()
        registry.gauge("edgeadapt_up_seconds", "how long").set(12.0)
        self.text = registry.render
        self.show(self.picture() if spec is IMAGES else np.zeros((3, 128), np.float32))

    def gives(self) -> Gives:
        verbs = {name: self._verb(name) for name in ("pause", "resume", "rollback", "mark-good", "label", "reload")}
        verbs |= {"status": self._status, "frame": self._frame}
        return Gives(verbs, lambda: self.unready, self.text, self.predict, self.posted.append if self._posts else None, self.events, self.spec)

    def predict(self, frames: NDArray[Any]) -> list[dict[str, Any]]:
        assert self.spec is not None
        self.go.wait(10)
        found = prepare(frames, self.spec)
        return [{"index": index, "id": index, "label": int(abs(one.sum())) % 6, "confidence": 0.5} for index, one in enumerate(np.nan_to_num(found))]

    def show(self, pixels: NDArray[Any], label: int = 2, without: int | None = None) -> None:
        """The next frame, and the prediction for it."""
        self.shown, self._index = pixels, self._index + 1
        facts: dict[str, object] = {"index": self._index, "id": f"frame-{self._index}", "label": label, "name": NAMES[label], "confidence": 0.83}
        facts |= {"entropy": 0.4, "ms": 21.5, "adapted": True}
        if without is not None:
            facts["without"] = {"label": without, "name": NAMES[without], "confidence": 0.41}
        self.events.pass_on("prediction", f"{NAMES[label]} (0.83)", facts)

    @staticmethod
    def picture(phase: int = 0, side: int = 96) -> NDArray[np.uint8]:
        """Something to look at, uint8 [side,side * 4 / 3,3]: sky, a road, and a box that moves."""
        wide = side * 4 // 3
        y, x = np.mgrid[:side, :wide] / side
        sky = np.stack([0.45 + 0.3 * y, 0.62 + 0.2 * y, 0.82 + 0.05 * y], axis=2)
        road = np.stack([0.33 + 0.1 * y, 0.34 + 0.1 * y, 0.37 + 0.1 * y], axis=2)
        made = np.where((y > 0.55)[..., None], road, sky)
        made[(y > 0.55) & (abs(x - 0.667) < 0.02) & ((y * 10 + phase).astype(int) % 2 == 0)] = 0.92
        left = 0.15 + 0.05 * (phase % 12)
        made[(y > 0.45) & (y < 0.72) & (x > left) & (x < left + 0.4)] = (0.76, 0.27, 0.2)
        made[(y > 0.36) & (y < 0.47) & (x > left + 0.08) & (x < left + 0.32)] = (0.55, 0.2, 0.16)
        return (255 * np.clip(made, 0, 1)).astype(np.uint8)

    def _verb(self, name: str) -> Any:
        def work(params: Mapping[str, object]) -> object:
            self.asked.append((name, params))
            if name in ("pause", "resume"):
                self.status["adaptation"]["paused"] = name == "pause"
            if params.get("reason") == "fail":
                raise StateError("there is nothing to put back", "let it learn first")
            self.events.tell(name, f"{name}: as asked over HTTP", {})
            return {"text": f"{name} done"}

        return work

    def _status(self, params: Mapping[str, object]) -> object:
        told = [{"time": event.time, "kind": event.kind, "text": event.text} for event in self.events.latest(20)]
        return {**self.status, "events": told}

    def _frame(self, params: Mapping[str, object]) -> object:
        if self.shown is None:
            raise StateError("there is no frame yet", "wait for one")
        head = {"id": f"frame-{self._index}", "index": self._index}
        if self.shown.dtype == np.uint8:
            return {**head, "shape": list(self.shown.shape), "pixels": base64.b64encode(self.shown.tobytes()).decode()}
        return {**head, "values": self.shown.tolist()}


def token_file(folder: Path) -> Path:
    """A file with the token that only we can read."""
    path = folder / "token"
    with open(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), "w") as file:
        file.write(TOKEN + "\n")
    return path


@contextmanager
def serving(toy: Toy, token: Path | None = None, host: str = "127.0.0.1", port: int = 0, **more: Any) -> Iterator[Web]:
    """A server on a free port."""
    body, names = more.pop("body", 8 * MIB), more.pop("names", ())
    web = Web(HttpConfig(enabled=True, host=host, port=port, token_file=token, body=body, names=names), toy.gives(), **more)
    web.start()
    try:
        yield web
    finally:
        toy.events.close()
        web.close()
