"""What files, the environment and the command line give: values by key, each with where it comes from, and what is wrong with the rest."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from edgeadapt.config.lines import Lines
from edgeadapt.config.schema import Section, sections
from edgeadapt.config.text import UnreadableError, parse, read
from edgeadapt.config.words import did_you_mean, dotted, printable, told
from edgeadapt.errors import Fault

PREFIX = "EDGEADAPT"
"""Variables that begin so and have two underscores further on are settings."""

FILE, ENVIRONMENT, COMMAND_LINE, DEFAULT = "file", "environment", "command line", "default"


class Origin(NamedTuple):
    """Where a value comes from.

    Attributes:
        kind: "default", "file", "environment" or "command line".
        place: the file, the variable or the option.
        line: of the file, if that is known.
    """

    kind: str = DEFAULT
    place: str = ""
    line: int | None = None

    def __str__(self) -> str:
        place = self.place if self.line is None else f"{self.place}:{self.line}"
        return place if self.kind == FILE else f"{self.kind}, {place}" if self.kind == ENVIRONMENT else self.kind


Find = Callable[[tuple[str | int, ...]], Origin]
"""Where a value, or an item in one, comes from, by its path."""


class Given(NamedTuple):
    """A value that a source gives a key, not yet read.

    Attributes:
        path: the key's.
        value: as tomllib gives it.
        find: where it, or an item in it, stands, by the path of that.
        rank: of its source; a later one has a higher.
        base: the folder that relative paths begin at.
        raw: the text itself, where it may be meant as one; else None.
    """

    path: tuple[str, ...]
    value: object
    find: Find
    rank: int
    base: str
    raw: str | None = None

    @property
    def origin(self) -> Origin:
        """Where it comes from."""
        return self.find(self.path)

    def fault(self, message: str, fix: str, inside: tuple[str | int, ...] = ()) -> Fault:
        """A fault of this value, or of what is `inside` it."""
        path = (*self.path, *inside)
        place = self.find(path)
        return Fault(place.place, place.line, dotted(path), message, fix)


@dataclass
class Gathered:
    """What all sources give.

    Attributes:
        given: values, those of later sources after those of earlier ones.
        faults: what could not be taken.
        files: that were read, in their order.
    """

    schema: type
    given: list[Given] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    _rank: int = 0

    def file(self, path: str | os.PathLike[str], needed: bool = True) -> None:
        """A TOML file. Where it is not `needed` it may be missing."""
        self._rank += 1
        place = printable(os.fspath(path))
        try:
            text = read(os.fspath(path))
            document = parse(text)
        except FileNotFoundError:
            if needed:
                fix = "check the path; edgeadapt config example prints a file to begin with"
                self.faults.append(Fault(place, None, "", "there is no such file", fix))
            return
        except UnreadableError as reason:
            self.faults.append(Fault(place, reason.line, "", str(reason), reason.fix))
            return
        self.files.append(place)
        lines = Lines(text, document, parse)
        self._walk(document, lambda key: Origin(FILE, place, lines.near(key)), os.path.dirname(os.path.abspath(path)))

    def folder(self, path: str | os.PathLike[str]) -> None:
        """The `*.toml` files of a folder, sorted by name, hidden ones left out; a folder that is not there holds none."""
        try:
            names = sorted(name for name in os.listdir(path) if name.endswith(".toml") and not name.startswith("."))
        except FileNotFoundError:
            return
        except OSError as reason:
            message, fix = f"cannot be listed: {reason.strerror}", "make it a folder that this user can read"
            self.faults.append(Fault(printable(os.fspath(path)), None, "", message, fix))
            return
        for name in names:
            self.file(Path(path, name))

    def environment(self, variables: Mapping[str, str]) -> None:
        """Variables `EDGEADAPT_SECTION__KEY`, and `EDGEADAPT__KEY` for keys without a section."""
        self._rank += 1
        for name in sorted(variables):
            if name.startswith(f"{PREFIX}_") and "__" in name:
                path = tuple(part.lower() for part in name.split("__"))
                path = path[1:] if path[0] == PREFIX.lower() else (path[0][len(PREFIX) + 1 :], *path[1:])
                self._one(path, variables[name], Origin(ENVIRONMENT, printable(name)))

    def settings(self, texts: Sequence[str]) -> None:
        """Texts `section.key=value`, as options `--set` give them."""
        self._rank += 1
        for text in texts:
            name, mark, value = text.partition("=")
            if not mark or not re.fullmatch(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*", name.strip()):
                self.faults.append(Fault("--set", None, "", f"expected SECTION.KEY=VALUE, got {told(text)}", "write --set http.port=8099"))
                continue
            self._one(tuple(name.strip().split(".")), value, Origin(COMMAND_LINE, f"--set {name.strip()}"))

    def _one(self, path: tuple[str, ...], text: str, origin: Origin) -> None:
        value = _word(text)
        document: dict[str, Any] = {path[-1]: value}
        for part in reversed(path[:-1]):
            document = {part: document}
        self._walk(document, lambda _: origin, "", None if isinstance(value, dict | list) else text)

    def _walk(self, document: Mapping[str, Any], origin: Find, base: str, raw: str | None = None) -> None:
        parts = {part.name: part for part in sections(self.schema)}
        own = parts.pop("")
        for name, value in document.items():
            if name in own.settings():
                self._add((name,), value, origin, base, raw)
            elif name not in parts:
                self._unknown((name,), origin, [*parts, *own.settings()], list(parts.values()), isinstance(value, dict))
            elif not isinstance(value, dict):
                wrong = Given((name,), value, origin, self._rank, base)
                self.faults.append(wrong.fault(f"expected a table, got {told(value)}", f"write [{name}] and its keys under it"))
            else:
                for key, item in value.items():
                    if key not in (keys := parts[name].holders()):
                        others = [part for part in parts.values() if part.name != name]
                        self._unknown((name, key), origin, list(keys), others)
                    elif isinstance(item, dict) and _is_table(parts[name], key):
                        for entry, inner in item.items():
                            self._add((name, key, entry), inner, origin, base, raw)
                    else:
                        self._add((name, key), item, origin, base, raw)

    def _add(self, path: tuple[str, ...], value: object, origin: Find, base: str, raw: str | None) -> None:
        self.given.append(Given(path, value, origin, self._rank, base, raw))

    def _unknown(self, path: tuple[str, ...], origin: Find, names: Sequence[str], others: Sequence[Section], table: bool = False) -> None:
        place = origin(path)
        fix = did_you_mean(path[-1], names)
        if holders := [f"[{part.name}]" for part in others if path[-1] in part.holders()]:
            fix = f"it is a key of {' and '.join(holders)}"
        where = f"[{path[0]}]" if len(path) > 1 else "a configuration"
        fix = fix or f"{where} has {', '.join(names)}"
        self.faults.append(Fault(place.place, place.line, dotted(path), "there is no such " + ("section" if table else "key"), fix))


def _word(text: str) -> object:
    """A TOML value; what is none is a text, as it stands."""
    try:
        document = parse(f"value = {text}")
    except UnreadableError:
        return text
    return document["value"] if len(document) == 1 else text


def _is_table(section: Section, key: str) -> bool:
    return any(kind.get(key) is not None and kind[key].is_table for kind in map(section.settings, section.kinds))
