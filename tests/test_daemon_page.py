"""The page of a daemon that runs: a process of its own with a model, frames that are really sent, and a browser that has the page open meanwhile."""

from __future__ import annotations

import json
import os
import threading
import tty
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from benchmarks._served import TOKEN, Feeder, Served, free_port, web
from edgeadapt.bundle.reference import Chance, Reference
from edgeadapt.devices.framing import encode
from edgeadapt.runtime.daemon.seen import LATEST
from tests.browser import browser, until
from tests.toybundle import CLASSES, SIDE, Toy

pytestmark = pytest.mark.slow

WINDOW = 4
NAMES = {f"class {index}" for index in range(CLASSES)}


class Following(Toy):
    """Whose statistics are named as the exporter names them, so that their shift can be told."""

    def __init__(self) -> None:
        super().__init__(batches=(1, WINDOW))
        self.state = {_named(name): array for name, array in self.state.items()}
        self.kinds = {_named(name): kind for name, kind in self.kinds.items()}
        for name, spec in self.specs.items():
            self.specs[name] = replace(spec, reads=tuple(map(_named, spec.reads)), writes=tuple(map(_named, spec.writes)))
            model = onnx.load_from_string(self.graphs[name])
            for node in model.graph.node:
                node.input[:], node.output[:] = list(map(_named, node.input)), list(map(_named, node.output))
            for value in (*model.graph.input, *model.graph.output):
                value.name = _named(value.name)
            self.graphs[name] = model.SerializeToString()


def _named(name: str) -> str:
    return name.replace("norm.mean", "statistics.norm.mean").replace("norm.var", "statistics.norm.variance")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    looks = Reference(WINDOW, 2.0, 1.0, {"norm": Chance(0.01, 0.05)})
    return Following().write(tmp_path_factory.mktemp("bundle") / "toy.edgeadapt", reference=looks)


@pytest.fixture(scope="module")
def driver() -> Iterator[Any]:
    with browser(1280) as found:
        yield found


def config(place: Path, bundle: Path, port: int, source: str) -> str:
    (place / "state").mkdir(exist_ok=True)
    return f"""
name = "toy-1"
[bundle]
path = "{bundle}"
[memory]
budget = "512MiB"
[predict]
compare = "50ms"
[state]
folder = "{place}/state"
[source]
{source}
{web(place, port)}"""


def drifting() -> Iterator[Any]:
    """Frames [1,H,W,C] that get darker and brighter again; no two are alike."""
    rng, number = np.random.default_rng(0), 0
    while True:
        number += 1
        yield np.clip(rng.normal(128 + 110 * np.sin(number / 15), 60, (1, SIDE, SIDE, 3)), 0, 255).astype(np.uint8)


@contextmanager
def line(place: Path) -> Iterator[None]:
    """Somebody who sends them in packets over a line whose other end is a name in the folder."""
    ours, theirs = os.openpty()
    tty.setraw(theirs)
    tty.setraw(ours)
    (place / "tty").symlink_to(os.ttyname(theirs))
    os.set_blocking(ours, False)  # while nobody reads, what is full drops
    done = threading.Event()

    def send() -> None:
        for number, frame in enumerate(drifting()):
            with suppress(BlockingIOError):
                os.write(ours, encode(frame[0], number, boot=3))
            if done.wait(0.03):
                return

    thread = threading.Thread(target=send)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        os.close(ours)
        os.close(theirs)


def text(driver: Any, name: str) -> str:
    return str(driver.execute_script("return document.getElementById(arguments[0]).innerText", name))


def shown(driver: Any, port: int) -> None:
    driver.get_log("browser")
    driver.get(f"http://127.0.0.1:{port}/")
    until(driver, lambda _: text(driver, "link-text") == "live")


def failed(driver: Any) -> list[str]:
    """What the browser complains of, a request that failed among it."""
    return [entry["message"] for entry in driver.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]


def click(driver: Any, name: str) -> None:
    element = driver.find_element("id", name)
    until(driver, lambda _: element.is_enabled())
    driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
    element.click()


def test_what_comes_over_a_line_is_on_the_page_as_it_comes(driver: Any, bundle: Path, tmp_path: Path) -> None:
    port = free_port()
    source = f'type = "serial"\nurl = "{tmp_path}/tty"\nbaud = 1000000'
    with line(tmp_path), Served(tmp_path, config(tmp_path, bundle, port, source)) as daemon:
        assert daemon.ready()["mode"] == "serving"
        shown(driver, port)
        assert text(driver, "name") == "toy-1"
        seen: dict[str, set[str]] = {"guess": set(), "guess-sure": set(), "frame": set(), "pixels": set(), "shift": set(), "events": set()}
        pixels = "const c = document.getElementById('frame'); return c.toDataURL()"

        def enough(_: Any) -> bool:
            for name in ("guess", "guess-sure", "shift", "events"):
                seen[name].add(text(driver, name))
            seen["frame"].add(driver.find_element("id", "frame").get_attribute("aria-label"))
            seen["pixels"].add(driver.execute_script(pixels))
            return len(seen["guess"] & NAMES) >= 2 and all(len(found) >= 3 for name, found in seen.items() if name not in ("guess", "events"))

        until(driver, lambda _: "start 1 in a row" in text(driver, "events"))  # before twenty others have come
        until(driver, enough)
        assert driver.execute_script("const c = document.getElementById('frame'); return [c.width, c.height]") == [SIDE, SIDE]
        until(driver, lambda _: all(text(driver, name).startswith("class ") for name in ("with-guess", "without-guess")))
        until(driver, lambda _: " frames" in text(driver, "agreement"))
        until(driver, lambda _: float(text(driver, "rate")) > 1)
        legend = text(driver, "legend")
        assert "the graphs themselves" in legend, "the ledger"
        assert "512 MiB" in text(driver, "memory-told")
        assert text(driver, "source") == f"Serial line: {tmp_path}/tty"
        script = """const done = arguments[0];
            fetch('/frame.png').then(({ headers }) => done([headers.get('X-Frame-Id'), headers.get('X-Frame-Prediction')]))"""
        name, predicted = map(json.loads, driver.execute_async_script(script))
        assert (predicted["id"], predicted["name"] in NAMES) == (name, True)
        answered = daemon.status()["predictions"]["count"]
        until(driver, lambda _: int(driver.find_element("css selector", "#source-facts dd:nth-of-type(2)").text.replace(",", "")) > answered)
        assert failed(driver) == []


def test_buttons_do_what_the_control_socket_shows(driver: Any, bundle: Path, tmp_path: Path) -> None:
    port = free_port()
    with Served(tmp_path, config(tmp_path, bundle, port, 'type = "http"')) as daemon:
        daemon.ready()
        feeder = Feeder(port, drifting(), 0.03)
        daemon.until(lambda status: status["guard"]["windows"] >= 3)
        shown(driver, port)
        driver.execute_script("sessionStorage.clear()")
        until(driver, lambda _: driver.find_element("id", "token").is_displayed())
        driver.find_element("id", "token").send_keys(TOKEN)
        driver.find_element("css selector", "#token-form button").click()
        click(driver, "pause")
        assert daemon.until(lambda status: status["adaptation"]["paused"] and status["guard"]["state"] == "paused")
        until(driver, lambda _: text(driver, "state-word") == "Paused" and "from the page" in text(driver, "events"))
        click(driver, "pause")
        assert daemon.until(lambda status: not status["adaptation"]["paused"])
        until(driver, lambda _: text(driver, "state-word") != "Paused")
        click(driver, "mark-good")
        kept = daemon.until(lambda status: status["state"]["last_good"] is not None and status["state"])
        assert kept["active"] == kept["last_good"]
        until(driver, lambda _: f"Generation {kept['active']}" in text(driver, "learned"))
        click(driver, "rollback")
        driver.find_element("css selector", "#sure button[value=yes]").click()
        assert daemon.until(lambda status: any(event["kind"] == "rolled back" for event in status["events"]))
        until(driver, lambda _: "put back" in text(driver, "done") or "as it started" in text(driver, "done"))
        driver.find_element("id", "label").send_keys("class 3")
        held, count = driver.find_element("id", "frame").get_attribute("aria-label"), daemon.status()["predictions"]["count"]
        assert daemon.until(lambda status: status["predictions"]["count"] > count + LATEST)
        assert driver.find_element("id", "frame").get_attribute("aria-label") == held, "the frame stands still while it is named"
        click(driver, "label-send")
        told = daemon.until(lambda status: [event["text"] for event in status["events"] if event["kind"] == "label"])
        assert told[0].startswith(f"frame {held.rpartition(' ')[2]} is class 3, ")
        until(driver, lambda _: told[0] in text(driver, "done"))
        feeder.stop()
        assert failed(driver) == []


def test_a_daemon_that_is_killed_and_started_again_is_seen(driver: Any, bundle: Path, tmp_path: Path) -> None:
    port = free_port()
    told = config(tmp_path, bundle, port, 'type = "http"')
    with Served(tmp_path, told) as daemon:
        daemon.ready()
        shown(driver, port)
        assert "no frame yet" in driver.find_element("id", "frame").get_attribute("aria-label")
        feeder = Feeder(port, drifting(), 0.03)
        until(driver, lambda _: text(driver, "guess") in NAMES)
        assert failed(driver) == []
        daemon.kill()
        feeder.stop()
        until(driver, lambda _: driver.find_element("id", "gone").is_displayed())
        assert text(driver, "link-text") == "not connected"
        assert set(driver.execute_script("return [...document.querySelectorAll('[data-verb]')].map((e) => e.disabled)")) == {True}
    with Served(tmp_path, told.replace("toy-1", "toy-2")) as daemon:
        daemon.ready()
        feeder = Feeder(port, drifting(), 0.03)
        until(driver, lambda _: text(driver, "link-text") == "live" and text(driver, "name") == "toy-2")
        assert not driver.find_element("id", "gone").is_displayed()
        until(driver, lambda _: "start 2 in a row" in text(driver, "events"))
        before = driver.find_element("id", "frame").get_attribute("aria-label")
        until(driver, lambda _: driver.find_element("id", "frame").get_attribute("aria-label") != before)
        feeder.stop()
        left = [each for each in failed(driver) if not any(net in each for net in ("ERR_CONNECTION", "ERR_INCOMPLETE", "ERR_EMPTY_RESPONSE"))]
        assert left == []
