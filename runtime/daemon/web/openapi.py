"""The HTTP interface as OpenAPI 3.1, made from what serves it: the routes, the verbs and the types of the status."""

from __future__ import annotations

import types
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin, get_type_hints, is_typeddict

from edgeadapt.runtime.daemon import metrics, status
from edgeadapt.runtime.daemon import verbs as known

if TYPE_CHECKING:
    from edgeadapt.runtime.daemon.web.routes import Route

VERSION = "1"
"""Goes up where a path, a parameter or a key goes, or means something else."""

_PLAIN: dict[Any, dict[str, Any]] = {
    str: {"type": "string"},
    int: {"type": "integer"},
    float: {"type": "number"},
    bool: {"type": "boolean"},
    type(None): {"type": "null"},
}
_JSON = "application/json"
_ERRORS = {
    400: "What was sent is wrong.",
    401: "The token is missing or wrong.",
    403: "Nothing can be changed over HTTP here: there is no token file.",
    404: "There is nothing, or nothing yet.",
    405: "Another method is for this path; Allow names it.",
    408: "The request did not come in time.",
    409: "It cannot be done as the daemon is now.",
    411: "The request does not say how long its body is.",
    413: "The body is too long.",
    414: "The first line is too long.",
    421: "The header Host names another server.",
    431: "The head is too long.",
    503: "Too much is asked at once, or no bundle is served.",
}
_ALWAYS = (400, 405, 408, 414, 421, 431, 503)
_ANY: dict[str, Any] = {}


def description(routes: Mapping[str, Route], files: Mapping[str, tuple[str, str]]) -> dict[str, Any]:
    """The OpenAPI document of these paths, some of which are files: their names and types."""
    paths: dict[str, Any] = {}
    for path, route in routes.items():
        good = {"202" if path == "/frames" else "200": {"description": "As asked.", "content": _good(path, files)}}
        operation: dict[str, Any] = {"operationId": _name(path), "summary": route.told}
        operation["responses"] = good | _errors(path, route.writes, route.method == "POST")
        operation |= _takes(path)
        if route.writes:
            operation["security"] = [{"token": []}]
        paths[path] = {route.method.lower(): operation}
        if route.method == "GET":
            paths[path]["head"] = {**operation, "operationId": f"{_name(path)}Head", "responses": _without_bodies(operation["responses"])}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "edgeadapt",
            "version": VERSION,
            "description": "A daemon that serves a model and adapts it. Who reaches it may look; who changes something needs the token.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": paths,
        "components": {"schemas": _schemas(), "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}}},
    }


def _name(path: str) -> str:
    words = path.strip("/").replace(".", "-").replace("/", "-").split("-")
    return "page" if path == "/" else "".join([words[0], *(word.title() for word in words[1:])])


def _takes(path: str) -> dict[str, Any]:
    """Parameters and bodies of an operation."""
    if path == "/events":
        told = {"status": "the status every second too", "predictions": "predictions too (default)", "latest": "predictions a few times a second"}
        bit = {"type": "string", "enum": ["0", "1"]}
        return {"parameters": [{"name": name, "in": "query", "description": text, "schema": bit} for name, text in told.items()]}
    if path in ("/predict", "/frames"):
        picture = {"schema": {"type": "string", "format": "binary"}}
        kinds = dict.fromkeys(("image/png", "image/jpeg", "application/octet-stream"), picture)
        return {"requestBody": {"required": True, "content": {_JSON: {"schema": _ref("Numbers")}, **kinds}}}
    if path.startswith("/api/"):
        verb = known.VERBS[path.removeprefix("/api/")]
        needed = [key for key, parameter in verb.parameters.items() if parameter.needed]
        schema: dict[str, Any] = {"type": "object", "properties": {key: _parameter(one) for key, one in verb.parameters.items()}}
        schema["additionalProperties"] = False
        if needed:
            schema["required"] = needed
        return {"requestBody": {"required": bool(needed), "content": {_JSON: {"schema": schema}}}}
    return {}


def _parameter(parameter: known.Parameter) -> dict[str, Any]:
    kinds: list[dict[str, Any]] = []
    for kind in parameter.types:
        schema = dict(_PLAIN[kind])
        if kind is str:
            schema |= {"enum": list(parameter.choices)} if parameter.choices else {"minLength": 1, "maxLength": parameter.longest}
        elif kind is int:
            schema |= {"minimum": parameter.least, "maximum": 2**63 - 1}
        kinds.append(schema)
    return {"description": parameter.told, **kinds[0]} if len(kinds) == 1 else {"description": parameter.told, "anyOf": kinds}


def _errors(path: str, writes: bool, body: bool) -> dict[str, Any]:
    codes = {*_ALWAYS, *((401, 403) if writes else ()), *((409, 411, 413) if body else ())}
    if path.startswith(("/frame.", "/api/", "/status")):
        codes |= {404, 409}
    found = {str(code): {"description": _ERRORS[code], "content": {_JSON: {"schema": _ref("Error")}}} for code in sorted(codes)}
    if path == "/readyz":
        found["503"] = {"description": "It is not ready, and why.", "content": {_JSON: {"schema": {"anyOf": [_ref("Ready"), _ref("Error")]}}}}
    return found


def _good(path: str, files: Mapping[str, tuple[str, str]]) -> dict[str, Any]:
    text = {"type": "string"}
    content: dict[str, Any]
    if path == "/frame.png":
        content = {"image/png": {"schema": {**text, "format": "binary"}}}
    elif path == "/metrics":
        content = {metrics.CONTENT_TYPE: {"schema": text}}
    elif path == "/events":
        content = {"text/event-stream; charset=utf-8": {"schema": text}}
    elif path in files:
        content = {files[path][1]: {"schema": text}}
    else:
        names = {"/healthz": "Alive", "/readyz": "Ready", "/status.json": "Status", "/frame.json": "Frame", "/access.json": "Access"}
        names |= {"/predict": "Predictions", "/frames": "Accepted"}
        content = {_JSON: {"schema": {"type": "object"} if path == "/openapi.json" else _ref(names.get(path, "Done"))}}
    return content


def _without_bodies(responses: dict[str, Any]) -> dict[str, Any]:
    return {code: {"description": one["description"]} for code, one in responses.items()}


def _ref(name: str) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{name}"}


def _object(needed: dict[str, Any], more: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"type": "object", "required": list(needed), "properties": {**needed, **(more or {})}}


def _schemas() -> dict[str, Any]:
    text, number, flag = _PLAIN[str], _PLAIN[int], _PLAIN[bool]
    whole = {**number, "minimum": 0}
    either = {"type": ["string", "integer"]}
    code = {**number, "description": "the exit code that the command line has for it"}
    error = _object({"code": code, "name": text, "message": text, "hint": text})
    numbers = {"description": "one frame or several, as the model takes them, in lists of lists", "type": ["array", "number"], "items": _ANY}
    shown = {"shape": {"type": "array", "items": whole}, "pixels": text, "values": {"type": "array"}, "every": whole}
    frame = _object({"id": either, "index": whole}, shown)
    return {
        "Error": _object({"error": error}),
        "Alive": _object({"alive": flag}),
        "Ready": _object({"ready": flag, "reasons": {"type": "array", "items": text}}),
        "Access": _object({"writes": flag, "allowed": flag, "posts": flag}),
        "Done": _object({"text": text}),
        "Frame": frame,
        "Numbers": _object({"x": numbers}, {"label": {"description": "the class, where it is known", "type": ["integer", "null"]}}),
        "Predictions": _object({"predictions": {"type": "array", "items": {"type": "object"}}}),
        "Accepted": _object({"accepted": whole, "ids": {"type": "array", "items": text}}),
        "Status": _of(status.Status),
    }


def _of(kind: Any) -> dict[str, Any]:
    """The schema of a type of the status."""
    origin, inner = get_origin(kind), get_args(kind)
    if is_typeddict(kind):
        return _object({key: _of(one) for key, one in get_type_hints(kind).items()})
    if origin in (Union, types.UnionType):
        return {"anyOf": [_of(one) for one in inner]}
    if origin is Literal:
        return {"enum": list(inner)}
    if origin is list:
        return {"type": "array", "items": _of(inner[0])}
    if origin is dict:
        return {"type": "object", "additionalProperties": _of(inner[1])}
    return dict(_PLAIN[kind])
