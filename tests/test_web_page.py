"""The page in a browser: it shows what the daemon says, follows it, changes something only with the token, and says so when the daemon has gone."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edgeadapt.runtime.daemon.web.live import CLIENTS
from edgeadapt.runtime.daemon.web.server import Web
from tests.browser import browser, until
from tests.toyweb import MIB, SENSOR, TOKEN, Toy, serving, token_file

pytestmark = pytest.mark.slow

IDS = ("pause", "mark-good", "rollback", "label", "label-send")


@pytest.fixture(scope="module")
def wide() -> Iterator[Any]:
    with browser(1280) as driver:
        yield driver


@contextmanager
def shown(driver: Any, toy: Toy, token: Path | None = None, port: int = 0) -> Iterator[Web]:
    """The page of that daemon, opened, without what was logged or kept before."""
    with serving(toy, token, port=port, linger=0.1) as web:
        driver.get_log("browser")
        driver.get(f"http://127.0.0.1:{web.address[1]}/")
        until(driver, lambda _: text(driver, "link-text") == "live")
        yield web


def text(driver: Any, name: str) -> str:
    return str(driver.execute_script("return document.getElementById(arguments[0]).innerText", name))


def disabled(driver: Any) -> set[str]:
    return {name for name in IDS if driver.execute_script("return document.getElementById(arguments[0]).disabled", name)}


def click(driver: Any, name: str) -> None:
    element = driver.find_element("id", name)
    until(driver, lambda _: element.is_enabled())
    driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
    element.click()


def unlock(driver: Any, given: str = TOKEN) -> None:
    until(driver, lambda _: driver.find_element("id", "token").is_displayed())
    driver.find_element("id", "token").send_keys(given)
    driver.find_element("css selector", "#token-form button").click()


def complaints(driver: Any) -> list[str]:
    return [entry["message"] for entry in driver.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]


def test_what_the_daemon_says_is_shown_without_a_complaint_of_the_browser(wide):
    toy = Toy()
    toy.events.tell("saved", "saved generation 38")
    with shown(wide, toy):
        assert text(wide, "name") == "camera-3"
        assert wide.title == "camera-3: learning"
        assert text(wide, "state-word") == "Learning"
        assert (text(wide, "rate"), text(wide, "memory-now"), text(wide, "heat")) == ("12.4", "84 MiB", "61 °C")
        assert "44 MiB free of the budget of 128 MiB" in text(wide, "memory-told")
        assert text(wide, "legend").split("\n")[:2] == ["Python and numpy", "31 MiB"]
        assert "Generation 38, being tested" in text(wide, "learned")
        assert "9.0 MiB written today, at most 64 MiB" in text(wide, "written")
        assert "saved generation 38" in text(wide, "events")
        assert complaints(wide) == []


def test_it_follows_by_itself(wide):
    toy = Toy()
    with shown(wide, toy):
        until(wide, lambda _: toy.events.wanted("prediction"))
        toy.show(toy.picture(3), 1, without=5)
        until(wide, lambda _: text(wide, "guess") == "bus")
        assert text(wide, "guess-sure") == "83 % sure"
        assert text(wide, "without").split("\n")[-4:] == ["With adaptation", "bus, 83 % sure", "Without", "tree, 41 % sure"]
        until(wide, lambda _: "frame-2" in wide.find_element("id", "frame").get_attribute("aria-label"))
        assert wide.execute_script("const c = document.getElementById('frame'); return [c.width, c.height]") == [128, 96]
        toy.status["guard"]["state"] = "rolled back"
        toy.status["guard"]["shift"] = 0.91
        toy.status["predictions"]["per_second"] = 3.25
        toy.status["memory"].update(resident=120 * MIB, level=1, reason="the system is short of memory")
        toy.status["source"].update(complaint="/dev/video0 is not there", live=True)
        toy.events.tell("rolled back", "put back: agreement 0.31")
        until(wide, lambda _: text(wide, "rate") == "3.3")
        assert text(wide, "state-word") == "Learning waits for memory"
        assert (text(wide, "shift"), text(wide, "shift-told")) == ("0.91", "very different from training")
        assert text(wide, "complaint") == "/dev/video0 is not there"
        assert "put back: agreement 0.31" in text(wide, "events")
        toy.status["memory"]["level"] = 0
        until(wide, lambda _: text(wide, "state-word") == "Put back")
        assert complaints(wide) == []


def test_windows_of_a_sensor_are_drawn(wide):
    toy = Toy(SENSOR)
    with shown(wide, toy):
        until(wide, lambda _: toy.events.wanted("prediction"))
        toy.show(np.random.default_rng(0).normal(size=(3, 128)).astype(np.float32))
        until(wide, lambda _: "signal" in wide.find_element("id", "frame").get_attribute("aria-label"))
        inked = "const c = document.getElementById('frame'); return c.getContext('2d').getImageData(0, 0, c.width, c.height).data.some((v) => v)"
        assert wide.execute_script(inked)


def test_without_a_token_nothing_can_be_pressed_and_the_page_says_why(wide, tmp_path):
    with shown(wide, Toy()):
        until(wide, lambda _: "has no token" in text(wide, "why-not"))
        assert disabled(wide) == set(IDS)
        assert not wide.find_element("id", "token").is_displayed()
    with shown(wide, Toy(), token_file(tmp_path)):
        until(wide, lambda _: "type the token" in text(wide, "why-not"))
        assert disabled(wide) == set(IDS)
        unlock(wide, "not-the-token-0123456789")
        until(wide, lambda _: "not the daemon's token" in text(wide, "why-not"))
        assert disabled(wide) == set(IDS)


def test_with_the_token_buttons_do_what_they_say(wide, tmp_path):
    toy = Toy()
    with shown(wide, toy, token_file(tmp_path)):
        unlock(wide)
        until(wide, lambda _: "pause" not in disabled(wide))
        click(wide, "pause")
        until(wide, lambda _: text(wide, "done") == "pause done")
        until(wide, lambda _: text(wide, "state-word") == "Paused" and text(wide, "pause") == "Resume learning")
        click(wide, "pause")
        until(wide, lambda _: text(wide, "state-word") == "Learning")
        click(wide, "mark-good")
        until(wide, lambda _: text(wide, "done") == "mark-good done")
        click(wide, "rollback")
        wide.find_element("css selector", "#sure button[value=no]").click()
        click(wide, "rollback")
        wide.find_element("css selector", "#sure button[value=yes]").click()
        until(wide, lambda _: text(wide, "done") == "rollback done")
        toy.show(toy.picture())
        until(wide, lambda _: "label" not in disabled(wide) and "frame-2" in wide.find_element("id", "frame").get_attribute("aria-label"))
        wide.find_element("id", "label").send_keys("4")
        click(wide, "label-send")
        until(wide, lambda _: text(wide, "done") == "label done")
        why = {"reason": "from the page"}
        asked = [("pause", why), ("resume", why), ("mark-good", why), ("rollback", why), ("label", {"frame": "frame-2", "label": 4})]
        assert toy.asked == asked
        assert wide.execute_script("return [sessionStorage.length, localStorage.length, document.cookie]") == [1, 0, ""]
        wide.refresh()
        until(wide, lambda _: "pause" not in disabled(wide))  # typed once
        click(wide, "forget")
        until(wide, lambda _: disabled(wide) == set(IDS))
        assert complaints(wide) == []


def test_safe_mode_is_shown_with_its_reason(wide):
    toy = Toy()
    with shown(wide, toy):
        assert not wide.find_element("id", "safe").is_displayed()
        toy.status.update(mode="safe", reason="three starts failed", guard=None, bundle=None)
        until(wide, lambda _: wide.find_element("id", "safe").is_displayed())
        assert "three starts failed" in text(wide, "safe")
        assert text(wide, "state-word") == "Safe mode"
        assert wide.find_element("id", "safe").get_attribute("role") == "alert"
        assert complaints(wide) == []


def test_a_daemon_that_goes_and_comes_back_is_seen(wide):
    toy = Toy()
    with shown(wide, toy) as web:
        port = web.address[1]
        web.close()
        until(wide, lambda _: wide.find_element("id", "gone").is_displayed())
        assert "does not answer" in text(wide, "gone")
        assert text(wide, "link-text") == "not connected"
    again = Toy()
    again.status["name"] = "camera-4"
    with serving(again, port=port, linger=0.1):
        until(wide, lambda _: text(wide, "name") == "camera-4" and text(wide, "link-text") == "live")
        assert not wide.find_element("id", "gone").is_displayed()


@contextmanager
def before(driver: Any, script: str) -> Iterator[None]:
    """Has pages run that before their own scripts."""
    added = driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": script})
    try:
        yield
    finally:
        driver.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", {"identifier": added["identifier"]})


def test_without_a_stream_it_asks_now_and_then(wide):
    toy = Toy()
    with before(wide, "Object.defineProperty(window, 'EventSource', {value: undefined});"), shown(wide, toy):
        toy.status["predictions"]["per_second"] = 77.0
        until(wide, lambda _: text(wide, "rate") == "77.0")
        assert not toy.events.wanted("prediction")


STREAMS = """
window.streams = [];
window.deaf = null; // of this stream nothing arrives, nor that it ended
window.EventSource = class extends EventSource {
  constructor(url) {
    super(url);
    window.streams.push(this);
  }
  addEventListener(kind, told) {
    super.addEventListener(kind, (message) => { if (window.deaf !== this) told(message); });
  }
};
"""


def test_a_stream_that_falls_silent_is_opened_again(wide):
    toy = Toy()
    with before(wide, STREAMS), shown(wide, toy):
        until(wide, lambda _: toy.events.wanted("prediction"))
        wide.execute_script("window.deaf = window.streams[0]")
        until(wide, lambda _: wide.execute_script("return window.streams.length") == 2)
        assert wide.execute_script("return window.streams.map((each) => each.readyState === EventSource.CLOSED)") == [True, False]
        toy.show(toy.picture(), 4)
        until(wide, lambda _: text(wide, "guess") == "person")
        assert text(wide, "link-text") == "live"


def test_a_page_without_a_place_among_the_streams_asks_in_peace(wide):
    toy = Toy()
    asked: list[float] = []
    status = toy._status
    toy._status = lambda params: (asked.append(time.monotonic()), status(params))[1]  # type: ignore[method-assign]
    with ExitStack() as stack, before(wide, STREAMS):
        web = stack.enter_context(serving(toy, linger=0.1))
        full = stack.enter_context(ExitStack())
        for _ in range(CLIENTS):
            wire = HTTPConnection("127.0.0.1", web.address[1])
            full.callback(wire.close)
            wire.request("GET", "/events?predictions=0")
            full.callback(wire.getresponse().close)
        wide.get(f"http://127.0.0.1:{web.address[1]}/")
        until(wide, lambda _: text(wide, "link-text") == "live")
        first = len(asked)
        until(wide, lambda _: len(asked) >= first + 4)
        assert min(second - one for one, second in zip(asked[first:], asked[first + 1 :])) > 1.0, "every two seconds, however slow the browser"
        assert wide.execute_script("return window.streams.length") <= 4
        full.close()
        until(wide, lambda _: toy.events.wanted("prediction"))
        toy.show(toy.picture(), 4)
        until(wide, lambda _: text(wide, "guess") == "person")


def test_requests_that_hang_are_made_again(wide, tmp_path):
    toy = Toy()
    hangs = """
    const asked = window.fetch, hung = new Set(["/frame.json", "/frame.png", "/access.json"]);
    window.hung = hung;
    window.fetch = (path, how = {}) => {
      if (!hung.delete(path)) return asked(path, how);
      return new Promise((_, ends) => how.signal && how.signal.addEventListener("abort", () => ends(how.signal.reason)));
    };
    """
    with before(wide, hangs), shown(wide, toy, token_file(tmp_path)):
        until(wide, lambda _: toy.events.wanted("prediction"))

        def drawn(_: Any) -> bool:
            toy.show(toy.picture())
            return "latest picture" in wide.find_element("id", "frame").get_attribute("aria-label")

        until(wide, drawn)
        until(wide, lambda _: "type the token" in text(wide, "why-not"))
        assert wide.execute_script("return window.hung.size") == 0


def test_nothing_that_comes_from_outside_becomes_markup(wide):
    toy = Toy()
    nasty = "<img src=x onerror=alert(1)>"
    toy.status.update(name=nasty, mode="safe", reason=nasty)
    toy.status["source"].update(complaint=nasty, name=nasty, counts={nasty: 1})
    toy.status["memory"]["lines"] = {nasty: MIB}
    toy.status["classes"] = [nasty]
    toy.events.tell(nasty, nasty)
    with shown(wide, toy):
        assert text(wide, "name") == nasty
        assert nasty in text(wide, "events")
        assert nasty in text(wide, "legend")
        assert wide.execute_script("return document.querySelectorAll('img').length") == 0
        assert complaints(wide) == []


def test_everything_has_a_name_and_the_keyboard_reaches_it(wide, tmp_path):
    toy = Toy()
    toy.events.tell("saved", "saved")
    with shown(wide, toy, token_file(tmp_path)):
        unlock(wide)
        until(wide, lambda _: not disabled(wide))
        unnamed = """return [...document.querySelectorAll('input, button, section, canvas, svg, [role=img], ol')].filter((e) => {
          const labels = e.labels && e.labels.length, named = e.getAttribute('aria-label'), by = e.getAttribute('aria-labelledby');
          return !(labels || named || (by && document.getElementById(by)) || e.textContent.trim());
        }).map((e) => e.outerHTML)"""
        assert wide.execute_script(unnamed) == []
        assert wide.execute_script("return document.documentElement.lang") == "en"
        ids = wide.execute_script("return [...document.querySelectorAll('[id]')].map((e) => e.id)")
        assert len(ids) == len(set(ids))
        for name in ("state-word", "done"):
            assert wide.find_element("id", name).get_attribute("aria-live") == "polite"
        from selenium.webdriver.common.keys import Keys

        wide.execute_script("document.body.tabIndex = -1; document.body.focus(); document.activeElement.blur()")
        reached = set()
        for _ in range(20):
            wide.switch_to.active_element.send_keys(Keys.TAB)
            reached.add(wide.switch_to.active_element.get_attribute("id"))
        assert {"pause", "mark-good", "rollback", "label", "label-send", "events", "forget"} <= reached


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390, 360])
def test_it_fits_and_follows_the_reader_s_choice_of_light_or_dark(tmp_path, width, scheme):
    toy = Toy()
    toy.status["source"]["name"] = "/dev/v4l/by-id/" + "a-name-without-a-break-" * 5
    with browser(width, scheme) as driver, shown(driver, toy, token_file(tmp_path)):
        until(driver, lambda _: toy.events.wanted("prediction"))
        toy.show(toy.picture(4), without=1)
        until(driver, lambda _: text(driver, "guess") == "car")
        assert driver.execute_script("return document.documentElement.scrollWidth") <= width
        wider = """return [...document.querySelectorAll('main *')].filter((e) => e.getBoundingClientRect().right > innerWidth + 1)
          .map((e) => e.id || e.outerHTML)"""
        assert driver.execute_script(wider) == []
        driver.save_screenshot(str(tmp_path / "page.png"))
        with Image.open(tmp_path / "page.png") as picture:
            corner = sum(picture.convert("RGB").getpixel((2, 2)))  # type: ignore[arg-type]
        assert corner > 600 if scheme == "light" else corner < 150
