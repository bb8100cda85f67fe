"""The configuration that a schema's sources make together: every value read, and what is wrong told all at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from edgeadapt.config.gathering import DEFAULT, Gathered, Given, Origin
from edgeadapt.config.schema import REQUIRED, TYPE, Section, Setting, sections
from edgeadapt.config.values import UnfitError
from edgeadapt.config.words import did_you_mean
from edgeadapt.errors import ConfigError, Fault

C = TypeVar("C")


@dataclass(frozen=True)
class Loaded(Generic[C]):
    """A configuration and how it came about.

    Attributes:
        config: the schema's dataclass.
        warnings: what is allowed and hardly meant.
        origins: where each value comes from, by dotted key; those of a table by its names too.
        files: that were read, in their order.
    """

    config: C
    warnings: tuple[Fault, ...]
    origins: Mapping[str, Origin]
    files: tuple[str, ...]


@dataclass(frozen=True)
class Finding:
    """What a look at several keys together found.

    Attributes:
        keys: dotted; the first that was given says where it is told. With a fault in one of them it is not told at all.
        message: what was expected and what came.
        fix: how to mend it.
        fatal: a fault; else a warning.
    """

    keys: tuple[str, ...]
    message: str
    fix: str
    fatal: bool = True


Check = Callable[[C, Callable[[str], bool]], Iterable[Finding]]
"""Looks at a whole configuration; the second argument says of a dotted key whether a source gave it."""


def build(schema: type[C], gathered: Gathered, environment: Mapping[str, str], check: Check[C] | None = None, place: str = "") -> Loaded[C]:
    """Reads what was gathered.

    Args:
        schema: the dataclass.
        gathered: what the sources give.
        environment: variables, for defaults that depend on them.
        check: looks at the whole.
        place: told where a finding is of no key that was given.

    Raises:
        ConfigError: with all faults.
    """
    work = _Work(gathered, environment)
    made: dict[str, Any] = {}
    for part in sections(schema):
        kind = work.kind(part)
        values = {key: work.value(part, kind, key, item) for key, item in part.settings(kind).items()}
        work.strangers(part, kind)
        if part.name:
            made[part.name] = part.kinds[kind](**values)
        else:
            made |= values
    config = schema(**made)
    for found in check(config, lambda key: key in work.given_keys) if check is not None else ():
        work.finding(found, place)
    if work.faults:
        raise ConfigError.of(in_order(work.faults, gathered.files))
    return Loaded(config, tuple(in_order(work.warnings, gathered.files)), work.origins, tuple(gathered.files))


def in_order(faults: Iterable[Fault], files: Sequence[str]) -> list[Fault]:
    """Those of files by their place in them, then the others."""
    order = {file: number for number, file in enumerate(files)}
    return sorted(faults, key=lambda fault: (order.get(fault.place, len(order)), fault.line or 0))


def placed(found: Finding, origins: Mapping[str, Origin], place: str) -> Fault:
    """A finding where the first of its keys was given that was; at `place`, for the first of all, where none was."""
    given = [key for key in found.keys if key in origins and origins[key].kind != DEFAULT]
    key, origin = (given[0], origins[given[0]]) if given else (found.keys[0], Origin(place=place))
    return Fault(origin.place, origin.line, key, found.message, found.fix)


class _Work:
    def __init__(self, gathered: Gathered, environment: Mapping[str, str]) -> None:
        self.faults, self.warnings = list(gathered.faults), list[Fault]()
        self.origins: dict[str, Origin] = {}
        self.given_keys = {".".join(given.path[:2]) for given in gathered.given}
        self._given: dict[tuple[str, ...], list[Given]] = {}
        for given in gathered.given:
            self._given.setdefault(given.path[:2], []).append(given)
        self._environment = environment
        self._faulty = {fault.key for fault in self.faults}
        self._whole = "" not in self._faulty  # else a file could not be read, and what seems to be missing may be in it
        self._types: dict[str, Given | None] = {}

    def kind(self, part: Section) -> str:
        """The section's type; "" where it has none or says none that there is."""
        if not part.chosen:
            return ""
        kind = self.value(part, "", TYPE, part.type_setting())
        self._types[part.name] = self._given[part.name, TYPE][-1] if (part.name, TYPE) in self._given else None
        return str(kind)

    def value(self, part: Section, kind: str, key: str, item: Setting) -> Any:
        """A key's value by the last source that gives it, else its default."""
        path = (part.name, key) if part.name else (key,)
        name = ".".join(path)
        value = item.value(self._environment)
        self.origins[name] = Origin()
        given = self._given.get(path, [])
        if not given and item.default is REQUIRED and self._whole:
            self._missing(part, kind, name, item)
        for one in given:
            self.origins[".".join(one.path)] = self.origins[name] = one.origin
            try:
                found = self._read(item, one)
            except UnfitError as reason:
                got = "another" if item.secret else reason.got
                inside = reason.inside[1:] if len(one.path) > 2 else reason.inside
                self._fault(name, one.fault(f"expected {reason.expected}, got {got}", reason.fix or self._fix(name, item), inside))
                continue
            value = {**value, **found} if item.is_table else found
        return value

    def _read(self, item: Setting, given: Given) -> Any:
        def read(value: object) -> Any:
            return item.reader.read({given.path[2]: value} if len(given.path) > 2 else value, given.base)

        try:
            return read(given.value)
        except UnfitError as reason:
            if given.raw is None:
                raise
            try:
                return read(given.raw)  # a user's name may be 1234
            except UnfitError:
                raise reason from None

    def strangers(self, part: Section, kind: str) -> None:
        """Keys of a section that other types have and this has not."""
        chosen_by = self._types.get(part.name)
        if not part.chosen or f"{part.name}.{TYPE}" in self._faulty:
            return
        own = part.settings(kind)
        for key, kinds in part.holders().items():
            holders = " or ".join(f'"{name}"' for name in kinds)
            for one in self._given.get((part.name, key), []) if key != TYPE and key not in own else []:
                if chosen_by is not None and one.rank < chosen_by.rank:
                    message = f'is not used: it is for {TYPE} {holders}, and {chosen_by.origin} made that "{kind}"'
                    self.warnings.append(one.fault(message, f"leave it out, or take the other {TYPE}"))
                    continue
                fix = did_you_mean(key, list(own)) or f'take it out, or write {TYPE} = "{kinds[0]}"'
                self._fault(f"{part.name}.{key}", one.fault(f'is for {TYPE} {holders}, and the {TYPE} is "{kind}"', fix))

    def finding(self, found: Finding, place: str) -> None:
        """A fault or a warning of several keys, unless one of them is faulty already."""
        if not self._whole or self._faulty.intersection(found.keys):
            return
        (self.faults if found.fatal else self.warnings).append(placed(found, self.origins, place))

    def _missing(self, part: Section, kind: str, name: str, item: Setting) -> None:
        by = self._types.get(part.name)
        origin = by.origin if by is not None else Origin()
        owner = f'a {part.name} of type "{kind}"' if kind else f"[{part.name}]" if part.name else "a configuration"
        self._fault(name, Fault(origin.place, origin.line, name, f"is missing, and {owner} needs it", self._fix(name, item)))

    def _fix(self, name: str, item: Setting) -> str:
        return f"write {name.rpartition('.')[2]} = {item.sample}" if item.sample else ""

    def _fault(self, name: str, fault: Fault) -> None:
        self._faulty.add(name)
        self.faults.append(fault)
