"""What a guard is told by hand, from any thread: between two windows, and known to frames that are answered while steps run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import wraps
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

from edgeadapt.runtime.adapter import Adapter


class _Guarding(Protocol):
    adapter: Adapter

    @property
    def between(self) -> AbstractContextManager[Any]: ...
    @property
    def scalars(self) -> Mapping[str, float]: ...


_Guard = TypeVar("_Guard", bound=_Guarding)
_Given = ParamSpec("_Given")
_Found = TypeVar("_Found")


def by_hand(call: Callable[Concatenate[_Guard, _Given], _Found]) -> Callable[Concatenate[_Guard, _Given], _Found]:
    """Between two windows, whoever calls; frames that are answered while steps run are answered by what came of it."""

    @wraps(call)
    def alone(guard: _Guard, /, *given: _Given.args, **named: _Given.kwargs) -> _Found:
        with guard.between:
            found = call(guard, *given, **named)
            if guard.adapter.answering:
                guard.adapter.publish(**guard.scalars)
            return found

    return alone
