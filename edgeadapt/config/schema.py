"""How a dataclass says what its settings are, and what a whole schema holds.

A schema is a frozen dataclass whose fields are settings, sections (dataclasses of settings), or sections whose keys depend on their `type`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Generic, TypeVar, overload

from edgeadapt.config.values import Choice, Reader, TableOf

T = TypeVar("T")

TYPE = "type"
"""The key that says which of its dataclasses a section is."""

_KEY = "edgeadapt"  # of our entry in a field's metadata


@dataclass(frozen=True)
class Computed(Generic[T]):
    """A default that depends on where the program runs.

    Attributes:
        make: the value, from the environment's variables.
        text: what it is, for people.
    """

    make: Callable[[Mapping[str, str]], T]
    text: str


@dataclass(frozen=True)
class Required:
    """No default: a fault where the value is missing."""


REQUIRED = Required()


@dataclass(frozen=True)
class Setting:
    """What a field says of itself; see `setting`."""

    reader: Reader[Any]
    default: Any
    help: str
    example: Any
    secret: bool

    @property
    def is_table(self) -> bool:
        """Whether its names are free."""
        return isinstance(self.reader, TableOf)

    @property
    def sample(self) -> str:
        """TOML of the default, or of the example where that is none, empty or computed; "" where there is neither."""
        plain = self.default is not None and self.default != {} and not isinstance(self.default, Computed | Required)
        value = self.default if plain else self.example
        return "" if value is None else self.reader.write(value)

    def value(self, environment: Mapping[str, str]) -> Any:
        """The default's value, or the example where a value is required."""
        if isinstance(self.default, Computed):
            return self.default.make(environment)
        return self.example if self.default is REQUIRED else dict(self.default) if self.is_table else self.default

    def default_text(self) -> str:
        """The default for people: TOML, words, "none" or "required"."""
        if isinstance(self.default, Computed):
            return self.default.text
        return "required" if self.default is REQUIRED else "none" if self.default is None else self.reader.write(self.default)


@dataclass(frozen=True)
class Section:
    """A section of a schema.

    Attributes:
        name: its table in TOML; "" for the settings that are in none.
        help: a sentence.
        kinds: dataclasses of settings by `type`; one under "" where there is no such key.
        default: the type that is taken where none is given.
    """

    name: str
    help: str
    kinds: Mapping[str, type]
    default: str = ""

    @property
    def chosen(self) -> bool:
        """Whether it has a `type`."""
        return "" not in self.kinds

    def settings(self, kind: str = "") -> dict[str, Setting]:
        """Those of a type, by key; `type` itself is none."""
        return {item.name: item.metadata[_KEY] for item in fields(self.kinds[kind]) if isinstance(item.metadata.get(_KEY), Setting)}

    def holders(self) -> dict[str, tuple[str, ...]]:
        """All keys, and of which types each is; `type` first."""
        found: dict[str, tuple[str, ...]] = {TYPE: tuple(self.kinds)} if self.chosen else {}
        for kind in self.kinds:
            for key in self.settings(kind):
                found[key] = (*found.get(key, ()), kind)
        return found

    def type_setting(self) -> Setting:
        """That of the key `type`."""
        return Setting(Choice(*self.kinds), self.default, self.help, self.default, False)


@overload
def setting(reader: Reader[T], default: Computed[T] | Required, help: str, example: Any = ..., secret: bool = ...) -> T: ...
@overload
def setting(reader: Reader[T], default: None, help: str, example: Any = ..., secret: bool = ...) -> T | None: ...
@overload
def setting(reader: Reader[T], default: T, help: str, example: Any = ..., secret: bool = ...) -> T: ...
def setting(reader: Reader[Any], default: Any, help: str, example: Any = None, secret: bool = False) -> Any:
    """A field that is a setting.

    Args:
        reader: what its value may be.
        default: the value where none is given, as the program holds it; None for no value, `REQUIRED` where there must be one.
        help: a sentence for people, without a full stop.
        example: a value for the example file, and for the fix of a fault, where the default is none that could be shown; needed with `REQUIRED`.
        secret: its value is never shown.
    """
    found = Setting(reader, default, help, example, secret)
    metadata = {_KEY: found}
    if default is REQUIRED:
        return field(metadata=metadata)
    if found.is_table or isinstance(default, Computed):
        return field(default_factory=lambda: found.value(os.environ), metadata=metadata)
    return field(default=default, metadata=metadata)


def section(cls: type[T], help: str) -> T:
    """A field that is a section of settings."""
    made: Any = field(default_factory=cls, metadata={_KEY: ("", help, {"": cls})})
    return made


def chosen(help: str, default: str, *kinds: type) -> Any:
    """A field that is a section whose keys depend on its `type`.

    Args:
        help: a sentence.
        default: the type that is taken where none is given.
        kinds: dataclasses, each with its type's name as the class attribute `type`.
    """
    by_name = {getattr(kind, TYPE): kind for kind in kinds}
    return field(default_factory=by_name[default], metadata={_KEY: (default, help, by_name)})


def sections(schema: type) -> Iterator[Section]:
    """The sections of a schema in their order; first that without a name."""
    yield Section("", "", {"": schema})
    for item in fields(schema):
        entry = item.metadata.get(_KEY)
        if isinstance(entry, tuple):
            default, help, kinds = entry
            yield Section(item.name, help, kinds, default)
