"""What a daemon can be asked, whichever way: over its control socket, HTTP (those that change nothing) or MQTT.

A verb is a function of its parameters, a mapping of JSON values that `checked` has seen. It gives a JSON value, or an iterator of many; one of those
that write gives a mapping with "text", which says in words what came of it. It is called from threads of whoever asks, several at once.

What the verbs give:
    status                                    a `status.Status`
    pause, resume, rollback, mark-good, label, reload   {"text": …, …}
    tail                                      an iterator of `events.Event.plain`, predictions among them with the kind "prediction"
    frame                                     {"id": …, "index": …, "shape": [H, W, C], "pixels": base64 of uint8}
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from edgeadapt.errors import UsageError
from edgeadapt.runtime.daemon.plain import one_line

Function = Callable[[Mapping[str, object]], object]
"""Does what a verb says."""

PREDICTION = "prediction"
"""Kind of the events that are predictions."""


@dataclass(frozen=True)
class Parameter:
    """A parameter of a verb.

    Attributes:
        types: of its value: str, int, bool.
        told: what it means.
        needed: whether it must be given.
        choices: of a text; empty: any, but not the empty one.
        longest: characters of a text. least: of a number.
    """

    types: tuple[type, ...]
    told: str
    needed: bool = False
    choices: tuple[str, ...] = ()
    longest: int = 200
    least: int = 0


@dataclass(frozen=True)
class Verb:
    """A verb: what it does, its parameters, whether it changes something, and whether it gives many values, one after another."""

    told: str
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    writes: bool = False
    streams: bool = False


_WHY = Parameter((str,), "why, for the log")
_FRAME = Parameter((int, str), "a frame's id, as `tail` shows it; the latest frame where it is left out")

VERBS: Mapping[str, Verb] = {
    "status": Verb("how the daemon is"),
    "pause": Verb("take no steps of adaptation until `resume`", {"reason": _WHY}, writes=True),
    "resume": Verb("go on adapting", {"reason": _WHY}, writes=True),
    "rollback": Verb(
        "put back what was learned before",
        {"to": Parameter((str,), "what is put back: the last good (default), or the start", choices=("last-good", "start")), "reason": _WHY},
        writes=True,
    ),
    "mark-good": Verb("take what was learned, as it is, for good", {"reason": _WHY}, writes=True),
    "label": Verb("say of what class a frame is", {"frame": _FRAME, "label": Parameter((int, str), "a class's number or name", True)}, writes=True),
    "tail": Verb(
        "what happens, as it happens",
        {
            "events": Parameter((bool,), "whether events are told (default)"),
            "predictions": Parameter((bool,), "whether predictions are told (default)"),
            "count": Parameter((int,), "end after so many", least=1),
        },
        streams=True,
    ),
    "reload": Verb("read the configuration again", writes=True),
    "frame": Verb("a frame's picture", {"frame": _FRAME}),
}
"""All verbs by name. HTTP serves only those that do not write."""


def find(name: object, names: Mapping[str, object] = VERBS) -> str:
    """The name, where it is one.

    Raises:
        UsageError: it is not; says which one may be meant.
    """
    if isinstance(name, str) and name in names:
        return name
    raise UsageError(f"{_shown(name)} is no verb", f"{_meant(name, names)}there are: {', '.join(names)}")


def checked(name: str, given: object) -> dict[str, object]:
    """The parameters of the verb `name`, where they are what it takes.

    Args:
        name: a verb. One that is not of `VERBS` takes whatever is given.
        given: a mapping from parameters to values; None: none. A value None counts as left out.

    Raises:
        UsageError: it is no mapping, or a parameter is unknown, lacks, or has a value that it cannot have.
    """
    if given is None:
        given = {}
    if not isinstance(given, Mapping):
        raise UsageError(f"{name}: its parameters are {_shown(given)}", 'give a mapping: {"name": value}')
    if name not in VERBS:
        return dict(given)
    parameters = VERBS[name].parameters
    for key in given:
        if key not in parameters:
            takes = ", ".join(parameters) or "none"
            raise UsageError(f"{name} has no parameter {_shown(key)}", f"{_meant(key, parameters)}it takes: {takes}")
    found = {key: value for key, value in given.items() if value is not None}
    for key, parameter in parameters.items():
        if key in found:
            _check(f"{name}: {key}", found[key], parameter)
        elif parameter.needed:
            raise UsageError(f"{name} lacks its parameter {key}", f"give {key}: {parameter.told}")
    return found


def _check(where: str, value: object, parameter: Parameter) -> None:
    told = f"{where} is {_shown(value)}"
    if type(value) not in parameter.types:  # True is no number here
        words = {str: "a text", int: "a whole number", bool: "true or false"}
        raise UsageError(told, f"give {' or '.join(words[kind] for kind in parameter.types)}: {parameter.told}")
    if isinstance(value, str):
        if parameter.choices and value not in parameter.choices:
            raise UsageError(told, f"{_meant(value, dict.fromkeys(parameter.choices))}give {' or '.join(parameter.choices)}")
        if not value or len(value) > parameter.longest:
            raise UsageError(told, f"give 1 to {parameter.longest} characters: {parameter.told}")
    elif isinstance(value, int) and not isinstance(value, bool) and not parameter.least <= value < 2**63:
        raise UsageError(told, f"give {parameter.least} or more: {parameter.told}")


def _shown(value: object) -> str:
    if isinstance(value, Mapping | list):
        return "a list" if isinstance(value, list) else "a mapping"
    return one_line(ascii(value), 60)


def _meant(given: object, names: Mapping[str, object]) -> str:
    close = difflib.get_close_matches(given[:60], list(names), 1) if isinstance(given, str) else []
    return f"did you mean {close[0]}? " if close else ""
