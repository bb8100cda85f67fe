"""The daemon over HTTP: what each path answers, and whom it lets change something."""

from __future__ import annotations

import io
import json
import logging
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgeadapt.errors import EdgeAdaptError, UsageError
from edgeadapt.runtime.daemon import verbs
from edgeadapt.runtime.daemon.config import HttpConfig
from edgeadapt.runtime.daemon.web import handler
from edgeadapt.runtime.daemon.web.png import png
from edgeadapt.runtime.daemon.web.routes import FILES, ROUTES
from edgeadapt.runtime.daemon.web.server import Web
from edgeadapt.runtime.daemon.web.token import read_token
from tests.asking import RIGHT, ask, error
from tests.toyweb import TOKEN, Toy, serving, token_file

pytestmark = pytest.mark.device

DOCS = Path(__file__).resolve().parents[1] / "docs" / "http.md"


@pytest.fixture
def toy() -> Toy:
    return Toy(posts=True)


@pytest.fixture
def web(toy: Toy, tmp_path: Path) -> Iterator[Web]:
    with serving(toy, token_file(tmp_path), linger=0.2) as found:
        yield found


# ------------------------------------------------------------------------------------------------------------ looking


@pytest.mark.parametrize("path", [path for path, route in ROUTES.items() if route.method == "GET" and path != "/events"])
def test_every_path_answers_and_head_says_the_same_without_a_body(web, path):
    status, headers, body = ask(web, "GET", path)
    assert status == 200
    assert int(headers["Content-Length"]) == len(body) > 0
    assert headers["Cache-Control"] == "no-store"
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert "default-src 'self'" in headers["Content-Security-Policy"]
    assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]
    assert headers["Referrer-Policy"] == "no-referrer"
    assert "Access-Control-Allow-Origin" not in headers
    status, again, nothing = ask(web, "HEAD", path)
    assert (status, nothing, again["Content-Type"]) == (200, b"", headers["Content-Type"])
    if path not in ("/status.json", "/metrics"):
        assert again["Content-Length"] == headers["Content-Length"]


def test_files_of_the_page_are_all_served_and_none_else():
    folder = Path(handler.__file__).with_name("page")
    assert {name for name, _ in FILES.values()} == {path.name for path in folder.iterdir()}


def test_page_asks_only_this_server_for_anything():
    for name, _ in FILES.values():
        text = (Path(handler.__file__).with_name("page") / name).read_text(encoding="utf-8")
        assert set(re.findall(r"https?://[^\"'\s<]+", text)) <= {"http://www.w3.org/2000/svg"}
        assert not re.search(r"<script>|<style|\sstyle=|\son[a-z]+=", text) or name != "index.html"


def test_status_is_what_the_verb_gives_with_numbers_that_json_has(web, toy):
    toy.status["board"]["temperature_c"] = float("nan")
    found = json.loads(ask(web, "GET", "/status.json")[2])
    assert found["board"]["temperature_c"] is None
    assert found == json.loads(json.dumps({**toy.status, "board": {**toy.status["board"], "temperature_c": None}, "events": []}))


def test_not_ready_is_503_with_reasons_and_alive_all_the_same(web, toy):
    assert json.loads(ask(web, "GET", "/readyz")[2]) == {"ready": True, "reasons": []}
    toy.unready = ["no frame for 30 s"]
    status, _, body = ask(web, "GET", "/readyz")
    assert (status, json.loads(body)) == (503, {"ready": False, "reasons": ["no frame for 30 s"]})
    assert ask(web, "GET", "/healthz")[0] == 200


@pytest.mark.parametrize("channels", [1, 3])
def test_latest_frame_is_a_picture_with_the_same_pixels(web, toy, channels):
    pixels = np.arange(5 * 7 * channels, dtype=np.uint8).reshape(5, 7, channels)
    toy.show(pixels)
    status, headers, body = ask(web, "GET", "/frame.png")
    assert (status, headers["Content-Type"], json.loads(headers["X-Frame-Id"])) == (200, "image/png", "frame-2")
    with Image.open(io.BytesIO(body)) as found:
        assert np.array_equal(np.asarray(found).reshape(pixels.shape), pixels)


def test_frames_that_are_no_pictures_come_as_numbers(web, toy):
    toy.show(np.ones((3, 4), np.float32))
    assert ask(web, "GET", "/frame.png")[0] == 409
    assert json.loads(ask(web, "GET", "/frame.json")[2])["values"] == [[1.0] * 4] * 3
    toy.shown = None
    for path in ("/frame.png", "/frame.json"):
        status, _, body = ask(web, "GET", path)
        assert status == 404
        assert "no frame" in error(body)["message"]


@pytest.mark.parametrize("frame", [{}, {"shape": [2, 2, 2], "pixels": "AAAA"}, {"shape": [2, 2, 3], "pixels": "AAAA"}, {"shape": 3, "pixels": ""}])
def test_what_is_no_picture_is_refused(frame):
    with pytest.raises(EdgeAdaptError):
        png(frame)


@pytest.mark.parametrize(
    "path",
    ["/nothing", "/../setup.cfg", "/..%2f..%2fserver.py", "/page.js/", "/page.js%00", "/api/status", "/api/frame", "/api/", "/%ff", "/index.html"],
)
def test_there_is_nothing_beside_the_table(web, path):
    status, _, body = ask(web, "GET", path)
    assert status == 404
    assert error(body)["name"] == "NotFound"


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "OPTIONS", "TRACE", "FOO", "post"])
def test_other_methods_are_told_which_there_are(web, method):
    status, headers, body = ask(web, method, "/api/pause")
    assert (status, headers["Allow"]) == (405, "POST")
    assert error(body)["name"] == "MethodNotAllowed"
    if method != "GET":
        assert ask(web, method, "/status.json")[1]["Allow"] == "GET, HEAD"


# ------------------------------------------------------------------------------------------------------------ changing


@pytest.mark.parametrize("name", [name for name, verb in verbs.VERBS.items() if verb.writes])
def test_every_verb_that_writes_is_there_and_wants_the_token(web, toy, name):
    params: dict[str, object] = {"label": 3, "frame": "frame-1"} if name == "label" else {}
    body = json.dumps(params).encode()
    for headers in ({}, {"Authorization": "Bearer wrong-token-of-the-same-"}, {"Authorization": f"Basic {TOKEN}"}, {"Authorization": "Bearer"}):
        status, told, reply = ask(web, "POST", f"/api/{name}", body, headers)
        assert (status, told["WWW-Authenticate"]) == (401, "Bearer")
        assert "token" in error(reply)["message"]
    assert toy.asked == []
    status, _, reply = ask(web, "POST", f"/api/{name}", body, RIGHT)
    assert (status, json.loads(reply)) == (200, {"text": f"{name} done"})
    assert toy.asked == [(name, params)]


def test_verbs_that_do_not_write_have_no_path():
    assert {path for path in ROUTES if path.startswith("/api/")} == {f"/api/{name}" for name, verb in verbs.VERBS.items() if verb.writes}
    assert all(route.writes for path, route in ROUTES.items() if route.method == "POST" and path != "/predict")


def test_without_a_token_file_nothing_can_be_changed(toy):
    with serving(toy) as web:
        for path in ("/api/pause", "/frames"):
            status, _, body = ask(web, "POST", path, b"{}", RIGHT)
            assert status == 403
            assert "token_file" in error(body)["hint"]
        assert json.loads(ask(web, "GET", "/access.json", headers=RIGHT)[2]) == {"writes": False, "allowed": False, "posts": True}
    assert toy.asked == []
    assert toy.posted == []


def test_access_says_whether_the_token_is_right(web):
    assert json.loads(ask(web, "GET", "/access.json")[2]) == {"writes": True, "allowed": False, "posts": True}
    assert json.loads(ask(web, "GET", "/access.json", headers=RIGHT)[2])["allowed"] is True
    assert json.loads(ask(web, "GET", "/access.json", headers={"Authorization": "Bearer \u00e9"})[2])["allowed"] is False


@pytest.mark.parametrize(
    ("body", "status", "told"),
    [
        (b'{"reason": "fail"}', 409, "nothing to put back"),
        (b'{"to": "the moon"}', 400, "the moon"),
        (b'{"wrong": 1}', 400, "wrong"),
        (b"[1]", 400, "a list"),
        (b'{"to"', 400, "not JSON"),
        (b'{"to": NaN}', 400, "NaN"),
        (b"[" * 100000, 400, "not JSON"),
        (b"\xff", 400, "not JSON"),
    ],
)
def test_what_a_verb_cannot_do_is_told(web, body, status, told):
    found, _, reply = ask(web, "POST", "/api/rollback", body, RIGHT)
    assert found == status
    assert told in error(reply)["message"]


def test_defects_of_a_verb_end_nothing(toy, tmp_path, caplog):
    gives = replace(toy.gives(), verbs={"pause": lambda params: 1 // 0, "reload": lambda params: os.stat("/nothing/there")})
    with Web(HttpConfig(port=0, token_file=token_file(tmp_path)), gives) as web, caplog.at_level(logging.CRITICAL, "edgeadapt"):
        status, _, body = ask(web, "POST", "/api/pause", b"{}", RIGHT)
        assert status == 500
        assert "ZeroDivisionError" in error(body)["message"]
        status, _, body = ask(web, "POST", "/api/reload", b"{}", RIGHT)
        assert status == 500
        assert "/nothing/there" in error(body)["message"]
        status, _, body = ask(web, "POST", "/api/resume", b"{}", RIGHT)
        assert status == 404
        assert ask(web, "GET", "/healthz")[0] == 200


# ------------------------------------------------------------------------------------------------------------ the token


@pytest.mark.parametrize("text", [TOKEN, TOKEN + "\n", TOKEN + "\r\n"])
def test_token_is_the_file_s_line(tmp_path, text):
    path = tmp_path / "token"
    path.write_bytes(text.encode())
    path.chmod(0o640)
    assert read_token(path) == TOKEN.encode()


@pytest.mark.parametrize("text", ["", "\n", "short", "two words of a token", TOKEN + "\n" + TOKEN, "t\u00f6ken-of-tests-0123456789", "x" * 600])
def test_what_is_no_token_is_refused(tmp_path, text):
    path = tmp_path / "token"
    path.write_text(text, encoding="utf-8")
    path.chmod(0o600)
    with pytest.raises(UsageError, match="holds no token"):
        read_token(path)


def test_token_that_everybody_can_read_is_refused_and_so_is_none(tmp_path):
    path = token_file(tmp_path)
    for mode in (0o644, 0o602):
        path.chmod(mode)
        with pytest.raises(UsageError, match="by everybody") as caught:
            Web(HttpConfig(token_file=path), Toy().gives())
        assert "chmod o=" in caught.value.hint
        assert TOKEN not in str(caught.value)
    with pytest.raises(UsageError, match="cannot be read"):
        read_token(tmp_path / "none")
    with pytest.raises(UsageError, match="is no file"):
        read_token(tmp_path)


def test_document_has_the_table_of_the_routes():
    rows = re.findall(r"^\| `(GET|POST)` \| `([^`]+)` \| (yes|no) \|", DOCS.read_text(encoding="utf-8"), re.MULTILINE)
    files = set(FILES) - {"/"}
    assert {(method, path, token) for method, path, token in rows} == {
        (route.method, path, "yes" if route.writes else "no") for path, route in ROUTES.items() if path not in files
    }
    assert len(rows) == len(ROUTES) - len(files)
