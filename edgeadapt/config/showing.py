"""A configuration as TOML: what is in effect and where each value comes from, or an example with everything explained."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from edgeadapt.config.building import Loaded
from edgeadapt.config.schema import TYPE, Setting, sections
from edgeadapt.config.values import TableOf
from edgeadapt.config.words import without_login

_WIDTH = 100


class Described(NamedTuple):
    """A key for people.

    Attributes:
        section: "" for none.
        key: its name.
        types: the section's types that have it; empty for all.
        takes: what its value may be.
        default: TOML, words, "none" or "required".
        help: a sentence.
    """

    section: str
    key: str
    types: tuple[str, ...]
    takes: str
    default: str
    help: str


def described(schema: type) -> Iterator[Described]:
    """Every key of a schema; one that several types have is told for each wording once."""
    for part in sections(schema):
        if part.chosen:
            item = part.type_setting()
            yield Described(part.name, TYPE, (), item.reader.takes, item.default_text(), item.help)
        found: dict[tuple[str, str, str, str], tuple[str, ...]] = {}
        for kind in part.kinds:
            for key, item in part.settings(kind).items():
                words = (key, item.reader.takes, item.default_text(), item.help)
                found[words] = (*found.get(words, ()), *([kind] if kind else []))
        for (key, takes, default, help), types in found.items():
            yield Described(part.name, key, types, takes, default, help)


def shown(loaded: Loaded[Any]) -> str:
    """The whole configuration as TOML, behind each key where its value comes from. Values of secret settings are left out."""
    lines = []
    for part in sections(type(loaded.config)):
        holder = getattr(loaded.config, part.name) if part.name else loaded.config
        lines += ["", f"[{part.name}]"] if part.name else []
        kind = getattr(holder, TYPE) if part.chosen else ""
        if part.chosen:
            lines.append(f'{TYPE} = "{kind}"  # {loaded.origins[f"{part.name}.{TYPE}"]}')
        tables = []
        for key, item in part.settings(kind).items():
            value, name = getattr(holder, key), f"{part.name}.{key}" if part.name else key
            if isinstance(item.reader, TableOf) and value and not item.secret:
                behind = [str(loaded.origins[f"{name}.{entry}"]) for entry in value]
                tables += ["", f"[{name}]", *(f"{line}  # {origin}" for line, origin in zip(item.reader.lines(value), behind))]
            else:
                lines.append(f"{_shown(key, item, value)}  # {loaded.origins[name]}")
        lines += tables
    return "\n".join(lines) + "\n"


def effective(loaded: Loaded[Any]) -> dict[str, dict[str, Any]]:
    """The same as plain data: by dotted key, `value` in the program's units (bytes, seconds), and `origin`; `value` is null for secrets."""
    found = {}
    for part in sections(type(loaded.config)):
        holder = getattr(loaded.config, part.name) if part.name else loaded.config
        kind = getattr(holder, TYPE) if part.chosen else ""
        settings = {**({TYPE: part.type_setting()} if part.chosen else {}), **part.settings(kind)}
        for key, item in settings.items():
            name = f"{part.name}.{key}" if part.name else key
            found[name] = {"value": None if item.secret else _plain(getattr(holder, key)), "origin": str(loaded.origins[name])}
    return found


def example(schema: type, head: str) -> str:
    """A file with every key, each behind a comment sign with its default (or an example where it has none) and what it is for.

    Args:
        schema: the dataclass.
        head: the first lines, without comment signs.
    """
    lines = [f"# {line}".rstrip() for line in head.splitlines()]
    for part in sections(schema):
        if part.name:
            lines += ["", "", *_comment(part.help), f"[{part.name}]"]
        if part.chosen:
            lines.append(f'#{TYPE} = "{part.default}"')
        for kind in part.kinds:
            settings = part.settings(kind)
            if kind and settings:
                lines += ["", f'# with {TYPE} = "{kind}":']
            for key, item in settings.items():
                lines += [*([] if kind else [""]), *_comment(_explained(item)), f"#{key} = {item.sample}"]
    return "\n".join(lines) + "\n"


def _explained(item: Setting) -> str:
    default = item.default_text()
    return f"{item.help} ({item.reader.takes}; {default if default == 'required' else f'by default {default}'})"


def _comment(text: str) -> list[str]:
    return [f"# {line}" for line in textwrap.wrap(text, _WIDTH, break_long_words=False, break_on_hyphens=False)]


def _shown(key: str, item: Setting, value: Any) -> str:
    if item.secret:
        return f"# {key} is {'not set' if value is None else 'set, and not shown'}"
    return f"# {key} is not set" if value is None else f"{key} = {item.reader.write(value)}"


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, bool | int | float) else without_login(str(value))
