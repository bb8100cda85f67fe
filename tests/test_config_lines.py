"""Lines of keys: compared with where a generator put them, and with where a text first parses with them in it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from edgeadapt.config.lines import MOST, Lines
from edgeadapt.config.text import UnreadableError, parse

pytestmark = pytest.mark.device

Children = list[tuple[tuple[str | int, ...], int]]  # places inside a value, and how many lines after its beginning

SCALARS = (
    "1",
    "-0.5e3",
    "true",
    "nan",
    "1979-05-27 07:32:00",
    '""',
    '"a # [b] = {c = 1}"',
    "'it \" ] , } stays'",
    r'"\" \\"',
    '"""[x]\ny = 1\n\n"quoted" ""\n\\"""\n# no comment\n"""',
    '"""a""""',
    '""" \\\n   a"""',
    "'''\n[t]\nk = '' ''\n\\'''",
    "''''a'''''",
)


@st.composite
def values(draw: st.DrawFn, depth: int = 2) -> tuple[str, Children]:
    kind = draw(st.sampled_from(("scalar", "scalar", "list", "inline"))) if depth else "scalar"
    if kind == "scalar":
        return draw(st.sampled_from(SCALARS)), []
    if kind == "list":
        text, children, size = "[" + draw(gaps), Children(), draw(st.integers(0, 3))
        for number in range(size):
            inner, places = draw(values(depth - 1))
            children += [((number,), text.count("\n")), *(((number, *path), text.count("\n") + line) for path, line in places)]
            comma = "," if number + 1 < size else draw(st.sampled_from(("", ",")))
            text += inner + draw(gaps) + comma + draw(gaps)
        return text + "]", children
    parts, children, line = [], Children(), 0
    for number in range(draw(st.integers(0, 3))):
        inner, places = draw(values(depth - 1))
        key, name = draw(names(number))
        children += [((name,), line), *(((name, *path), line + more) for path, more in places)]
        parts.append(f"{key} = {inner}")
        line += inner.count("\n")
    return "{" + ", ".join(parts) + "}", children


@st.composite
def names(draw: st.DrawFn, number: int) -> tuple[str, str]:
    """A key as it is written and as it is, made its own by a number."""
    forms = (f"k{number}", f'"q.{number}"', f'"# [{number}]"', f"'l = {number}'", f'"\\" \\u00e9 {number}"', f'"{number}\\\\"', f"-_{number}")
    text = draw(st.sampled_from(forms))
    return text, next(iter(parse(f"{text} = 0")))


gaps = st.sampled_from(("", " ", "\n", "\n\n  ", " # ] } \"\n", "\t"))
between = st.sampled_from(("", "\n", "# [a] = 1\n", "   \n", "\t# \"\"\"\n"))


@st.composite
def documents(draw: st.DrawFn) -> tuple[str, dict[tuple[str | int, ...], int]]:
    """A TOML text, and the line of every table, key and item in it."""
    text, lines = "", dict[tuple[str | int, ...], int]()
    table: tuple[str | int, ...] = ()
    tables: list[tuple[str, tuple[str | int, ...]]] = [("", ())]  # that others may be in: as written, and where
    arrays: list[tuple[str, tuple[str | int, ...], int]] = []  # of tables: as written, where, how many
    for count in range(draw(st.integers(0, 8))):
        text += draw(between)
        here = text.count("\n") + 1
        key, name = draw(names(count))
        kind = draw(st.sampled_from(("pair", "pair", "pair", "dotted", "table", "array", "again" if arrays else "array")))
        if kind in ("pair", "dotted"):
            path = (*table, name)
            inner, places = draw(values())
            if kind == "dotted":
                second, last = draw(names(count + 100))
                lines[path] = here
                key, path = f"{key}{draw(st.sampled_from(('.', ' . ')))}{second}", (*path, last)
            lines |= {path: here, **{(*path, *inside): here + after for inside, after in places}}
            text += f"{draw(st.sampled_from(('', '  ')))}{key} = {inner}{draw(st.sampled_from(('', ' # = [')))}\n"
            continue
        if kind == "again":
            number = draw(st.integers(0, len(arrays) - 1))
            written, path, size = arrays[number]
            arrays[number] = (written, path, size + 1)
            before, table = (*path, size - 1), (*path, size)
            tables = [entry for entry in tables if entry[1][: len(before)] != before]  # no longer to be reached
            arrays = [entry for entry in arrays if entry[1][: len(before)] != before]
        else:
            outer, around = draw(st.sampled_from(tables))
            written, table = f"{outer}.{key}" if outer else key, (*around, name)
        if kind == "array":
            lines[table] = here
            arrays.append((written, table, 1))
            table = (*table, 0)
        lines[table] = here
        tables.append((written, table))
        text += draw(st.sampled_from((f"[{written}] # [[x]]\n", f"[ {written} ]\n"))) if kind == "table" else f"[[{written}]]\n"
    return text, lines


@settings(max_examples=300, deadline=None)
@given(documents(), st.sampled_from(("\n", "\r\n")))
def test_every_line_is_where_the_generator_put_it(made, ending):
    text, expected = made
    text = text.replace("\n", ending)
    found = Lines(text, parse(text), parse)
    assert dict(found) == expected


SOUP = (
    *("a = 1", "b.c = 2", "[a]", "[d]", "[d.e]", "[[f]]", "[[f.g]]", "[f.h]", 'i = """', '"""', 'x """', "j = '''", "'''", "k = [", "]"),
    *("1, # ]", '"]",', "l = {m = 1, n = [", "1]}", "", "# o = 1", '"p.q" = "[r]"', "  's' = '#'", "t = [[1], [", "2]]", "u.'v' = 1"),
    *('w = "\\""', "[ 'x' ]", "[['y'] ]", "[z.a.b]", "[z.a]", "[z]"),
)


@settings(max_examples=400, deadline=None)
@given(st.lists(st.sampled_from(SOUP), min_size=1, max_size=12))
def test_a_key_begins_where_a_text_first_parses_with_it(rows):
    """What is cut off within a statement does not parse, so the lines that do show where each statement ends and the next begins."""
    good = [0, *(size for size in range(1, len(rows) + 1) if parsed("\n".join(rows[:size])) is not None)]
    assume(good[-1])
    text = "\n".join(rows[: good[-1]])
    document = parsed(text)
    assert document is not None
    found = Lines(text, document, parse)
    assert len(found) > 0 or not document
    for path in found:
        if value_at(document, path) == {} or isinstance(value_at(document, path), dict | list):
            continue
        end = next(size for size in good if holds(parsed("\n".join(rows[:size])), path))
        begin = max(size for size in good if size < end) + 1
        assert begin <= found[path] <= end
        if all(isinstance(name, str) for name in path) and rows[begin - 1].count("{") == 0:
            assert found[path] == begin


def parsed(text: str) -> dict[str, Any] | None:
    try:
        return parse(text)
    except UnreadableError:
        return None


def value_at(document: Any, path: tuple[str | int, ...]) -> Any:
    for name in path:
        document = document[name]
    return document


def holds(document: Any, path: tuple[str | int, ...]) -> bool:
    try:
        value_at(document, path)
    except (KeyError, IndexError, TypeError):
        return False
    return True


def test_a_table_is_where_its_header_is_wherever_it_was_mentioned_first():
    text = "[a.b.c]\n[a.b]\nd.e = 1\nd.f = 2\n[a]\n"
    expected = {("a",): 5, ("a", "b"): 2, ("a", "b", "c"): 1, ("a", "b", "d"): 3, ("a", "b", "d", "e"): 3, ("a", "b", "d", "f"): 4}
    assert dict(Lines(text, parse(text), parse)) == expected


def test_nearest_place_around():
    text = "a = 1\n[b]\nc = [\n1,\n2]\n"
    lines = Lines(text, parse(text), parse)
    assert lines.near(("b", "c", 1)) == 5
    assert lines.near(("b", "c", 7)) == 3
    assert lines.near(("b", "none", "at", "all")) == 2
    assert lines.near(("none",)) is None


def test_a_text_that_the_scanner_does_not_see_as_the_parser_did_has_no_lines():
    text = "a = 1\nb = 2\n"
    assert dict(Lines(text, parse(text), parse)) == {("a",): 1, ("b",): 2}
    assert dict(Lines(text, {"a": 1}, parse)) == {}
    assert dict(Lines(text, {"a": 1, "b": 2, "c": 3}, parse)) == {}
    assert dict(Lines("a = [", {"a": []}, parse)) == {}
    assert dict(Lines('a = "', {"a": ""}, parse)) == {}


def test_too_many_places_are_not_kept():
    text = f"a = [{'1,' * (MOST - 1)}]"
    assert len(Lines(text, parse(text), parse)) == MOST
    text = f"a = [{'1,' * MOST}]"
    assert len(Lines(text, parse(text), parse)) == 0
