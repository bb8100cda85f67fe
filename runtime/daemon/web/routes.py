"""What is served at which path. The table `ROUTES` is the whole of it: nothing else is looked up, in folders least of all."""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from urllib.parse import parse_qsl

from edgeadapt.bundle import InputSpec
from edgeadapt.devices.sources.base import Frame
from edgeadapt.devices.sources.posted import MOST
from edgeadapt.errors import EdgeAdaptError, UsageError
from edgeadapt.runtime.daemon import verbs as known
from edgeadapt.runtime.daemon.metrics import CONTENT_TYPE
from edgeadapt.runtime.daemon.plain import as_json, one_line
from edgeadapt.runtime.daemon.web import token
from edgeadapt.runtime.daemon.web.bodies import frames_in, json_in
from edgeadapt.runtime.daemon.web.gives import Gives
from edgeadapt.runtime.daemon.web.handler import Reply, Request, json_reply
from edgeadapt.runtime.daemon.web.live import Live
from edgeadapt.runtime.daemon.web.png import png
from edgeadapt.runtime.daemon.web.refusals import Refusal

LOG = logging.getLogger("edgeadapt")

FILES: Mapping[str, tuple[str, str]] = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/charts.js": ("charts.js", "text/javascript; charset=utf-8"),
    "/words.js": ("words.js", "text/javascript; charset=utf-8"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}
"""The page's files by path, and their types."""

_PAGE = Path(__file__).with_name("page")
_API = "/api/"


@dataclass(frozen=True)
class Route:
    """A path: the method it takes, what it is for, whether the token is needed, and what of `Routes` answers."""

    method: str
    told: str
    work: str
    writes: bool = False


ROUTES: Mapping[str, Route] = {
    **{path: Route("GET", "the page" if path == "/" else "a file of the page", "file") for path in FILES},
    "/healthz": Route("GET", "whether the process answers", "health"),
    "/readyz": Route("GET", "whether frames can be answered; 503 with reasons where not", "ready"),
    "/metrics": Route("GET", "the metrics, for Prometheus", "metrics"),
    "/status.json": Route("GET", "all that the daemon says of itself", "status"),
    "/frame.png": Route("GET", "the latest frame, where frames are pictures", "picture"),
    "/frame.json": Route("GET", "the latest frame's numbers", "frame"),
    "/events": Route("GET", "what happens, as server-sent events", "events"),
    "/access.json": Route("GET", "whether anything can be changed over HTTP, and whether the token sent is the right one", "access"),
    "/openapi.json": Route("GET", "this interface, as OpenAPI 3.1", "described"),
    "/predict": Route("POST", "predictions for the frames sent, which change nothing", "predict"),
    "/frames": Route("POST", 'frames for the source "http", to be answered and adapted on in their turn', "frames", writes=True),
    **{_API + name: Route("POST", verb.told, "verb", writes=True) for name, verb in known.VERBS.items() if verb.writes},
}
"""Every path that there is. Where GET is taken HEAD is too."""


class Routes:
    """Answers requests.

    Args:
        gives: what is served.
        secret: the token; None: nothing can be changed.
    """

    def __init__(self, gives: Gives, secret: bytes | None) -> None:
        self._gives, self._secret = gives, secret
        self._live = Live(gives)
        self._working, self._showing = threading.Lock(), threading.Lock()
        self._numbers = itertools.count()

    def answer(self, method: str, request: Request) -> Reply:
        """The reply.

        Raises:
            EdgeAdaptError: there is none; `Refusal` where HTTP is why.
        """
        route = ROUTES.get(request.path)
        if route is None:
            close = known.find(request.path[len(_API) :]) if request.path[len(_API) :] in known.VERBS and request.path.startswith(_API) else ""
            hint = f"GET /status.json, /frame.json and /events answer what {close} would" if close else "/openapi.json lists all paths"
            raise Refusal(HTTPStatus.NOT_FOUND, f"there is nothing at {one_line(ascii(request.path), 80)}", hint)
        allowed = ("GET", "HEAD") if route.method == "GET" else (route.method,)
        if method not in allowed:
            told = f"{one_line(ascii(method), 20)} is not for {request.path}"
            raise Refusal(HTTPStatus.METHOD_NOT_ALLOWED, told, f"use {' or '.join(allowed)}", {"Allow": ", ".join(allowed)})
        if route.writes:
            token.check(request.authorization, self._secret)
        work: Callable[[Request], Reply] = getattr(self, f"_{route.work}")
        return work(request)

    def _file(self, request: Request) -> Reply:
        name, kind = FILES[request.path]
        return Reply(kind=kind, body=(_PAGE / name).read_bytes())

    def _health(self, request: Request) -> Reply:
        return json_reply({"alive": True})

    def _ready(self, request: Request) -> Reply:
        reasons = self._gives.ready()
        return json_reply({"ready": not reasons, "reasons": reasons}, HTTPStatus.SERVICE_UNAVAILABLE if reasons else HTTPStatus.OK)

    def _metrics(self, request: Request) -> Reply:
        return Reply(kind=CONTENT_TYPE, body=self._gives.metrics())

    def _status(self, request: Request) -> Reply:
        return json_reply(self._ask("status", {}))

    def _picture(self, request: Request) -> Reply:
        with self._showing:  # copies of a large frame, made one after the other
            frame = self._latest()
            headers = {"X-Frame-Id": as_json(frame.get("id")), "X-Frame-Index": as_json(frame.get("index"))}
            if (prediction := frame.get("prediction")) is not None:
                headers["X-Frame-Prediction"] = as_json(prediction)
            return Reply(kind="image/png", body=png(frame), headers=headers)

    def _frame(self, request: Request) -> Reply:
        with self._showing:
            return json_reply(self._latest())

    def _events(self, request: Request) -> Reply:
        wanted = {"status": False, "predictions": True, "latest": False}
        for name, value in parse_qsl(request.query, keep_blank_values=True):
            if name not in wanted or value not in ("0", "1"):
                told = f"{one_line(ascii(name), 40)} cannot be asked of /events so"
                raise Refusal(HTTPStatus.BAD_REQUEST, told, f"give {', '.join(wanted)}: 0 or 1")
            wanted[name] = value == "1"
        return Reply(kind="text/event-stream; charset=utf-8", headers={"X-Accel-Buffering": "no"}, stream=self._live.stream(**wanted))

    def _access(self, request: Request) -> Reply:
        allowed = self._secret is not None and token.matches(request.authorization, self._secret)
        return json_reply({"writes": self._secret is not None, "allowed": allowed, "posts": self._gives.post is not None})

    def _described(self, request: Request) -> Reply:
        from edgeadapt.runtime.daemon.web import openapi

        return json_reply(openapi.description(ROUTES, FILES))

    def _predict(self, request: Request) -> Reply:
        spec = self._input()
        with request.body() as body, self._one_at_a_time():
            frames, _ = frames_in(body, request.kind, spec, self._gives.picture)
            return json_reply({"predictions": self._gives.predict(frames)})

    def _frames(self, request: Request) -> Reply:
        post = self._gives.post
        if post is None:
            message = "frames come from another source here, and none are taken over HTTP"
            raise Refusal(HTTPStatus.CONFLICT, message, 'write type = "http" under [source], or send them to /predict')
        spec = self._input()
        with request.body() as body, self._one_at_a_time():
            frames, label = frames_in(body, request.kind, spec, self._gives.picture, MOST)
            if label is not None and (type(label) is not int or not 0 <= label < 2**31):
                raise UsageError("label is no class", "send a class's number, or send the frame and then name its class with /api/label")
            ids = [f"http-{next(self._numbers)}" for _ in frames]
            for name, pixels in zip(ids, frames):
                post(Frame(name, pixels if len(frames) == 1 else pixels.copy(), label))  # or the last that waits would hold all of them
        return json_reply({"accepted": len(ids), "ids": ids}, HTTPStatus.ACCEPTED)

    def _verb(self, request: Request) -> Reply:
        name = request.path[len(_API) :]
        with request.body() as body:
            params = known.checked(name, json_in(body))
        LOG.info("http: %s by %s: %s", name, request.peer, one_line(as_json(params), 200))
        return json_reply(self._ask(name, params))

    def _ask(self, name: str, params: Mapping[str, object]) -> object:
        verb = self._gives.verbs.get(name)
        if verb is None:
            raise Refusal(HTTPStatus.NOT_FOUND, f"this daemon cannot {name}", "it may be another version")
        return verb(params)

    def _latest(self) -> Mapping[str, object]:
        try:
            frame = self._ask("frame", {})
        except Refusal:
            raise
        except EdgeAdaptError as error:
            raise Refusal(HTTPStatus.NOT_FOUND, error.message, error.hint) from None
        if not isinstance(frame, Mapping):
            raise Refusal(HTTPStatus.NOT_FOUND, "there is no frame yet", "wait for one")
        return frame

    def _input(self) -> InputSpec:
        if self._gives.input is None:
            message = "no bundle is served, so that no frame can be answered"
            raise Refusal(HTTPStatus.SERVICE_UNAVAILABLE, message, "install one: edgeadapt install model.edgeadapt")
        return self._gives.input

    def _one_at_a_time(self) -> _Turn:
        return _Turn(self._working)


class _Turn:
    """A lock that is not waited for without end."""

    def __init__(self, lock: threading.Lock, seconds: float = 10.0) -> None:
        self._lock, self._seconds = lock, seconds

    def __enter__(self) -> None:
        if not self._lock.acquire(timeout=self._seconds):
            message = "other frames are answered already"
            raise Refusal(HTTPStatus.SERVICE_UNAVAILABLE, message, "try again in a moment", {"Retry-After": "1"})

    def __exit__(self, *_: object) -> None:
        self._lock.release()
