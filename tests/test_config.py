"""Strict TOML into dataclasses: what each reader takes, where values come from, and that whatever is wrong is told, all of it, with its line."""

from __future__ import annotations

import os
import re
import string
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgeadapt import config
from edgeadapt.config import REQUIRED, Computed, Finding, Origin, chosen, section, setting, text
from edgeadapt.config.values import Choice, Duration, Either, FilePath, Flag, Integer, ListOf, Number, Reader, Size, TableOf, Text, UnfitError
from edgeadapt.config.words import printable, time_text, told, toml
from edgeadapt.errors import ConfigError, EdgeAdaptError, Fault

# ruff: noqa: RUF009 -- setting, section and chosen make fields

pytestmark = pytest.mark.device

MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class Server:
    """A section."""

    host: str = setting(Text(r"[a-z.]+", "a host"), "localhost", "where")
    port: int = setting(Integer(1, 65535), 8099, "which")
    token: str | None = setting(Text(), None, "who", "abc", secret=True)
    wait: float = setting(Duration(), 5.0, "how long")
    room: int = setting(Size(), 8 * MIB, "how much")
    keys: tuple[Path, ...] = setting(ListOf(FilePath()), (), "what with", ("/a",))
    rates: Mapping[str, float] = setting(TableOf(Number(0, 1)), {}, "how fast", {"a": 0.5})


@dataclass(frozen=True, kw_only=True)
class Nothing:
    """A type without keys."""

    type: ClassVar[str] = "nothing"


@dataclass(frozen=True, kw_only=True)
class Wire:
    """A type."""

    type: ClassVar[str] = "wire"
    url: str = setting(Text(), REQUIRED, "which", "/dev/a")
    rate: int = setting(Integer(1, 10), 1, "how fast")


@dataclass(frozen=True, kw_only=True)
class Place:
    """Another."""

    type: ClassVar[str] = "place"
    path: Path = setting(FilePath(), REQUIRED, "which", "/b")
    rate: float = setting(Number(0, 1), 0.5, "how often")


@dataclass(frozen=True, kw_only=True)
class Whole:
    """A schema."""

    name: str = setting(Text(r"[a-z0-9]+", "small letters"), Computed(lambda variables: variables.get("HOST", "me"), "the host's"), "who", "you")
    loud: bool = setting(Flag(), False, "whether")
    server: Server = section(Server, "A server.")
    source: Any = chosen("where from", "nothing", Nothing, Wire, Place)


def check(whole: Whole, is_given: Any) -> list[Finding]:
    """Of 1 as a port: a fault; of 2: a warning. Of a name that is given: a warning."""
    found = [Finding(("server.host", "server.port"), f"port {whole.server.port}", "mend", whole.server.port == 1)] if whole.server.port < 3 else []
    return found + ([Finding(("name",), "named", "", False)] if is_given("name") else [])


def load(folder: Path, content: str | bytes = "", environment: Mapping[str, str] | None = None, given: tuple[str, ...] = (), **parts: str) -> Any:
    path = folder / "main.toml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    for name, part in parts.items():
        (folder / "conf.d").mkdir(exist_ok=True)
        (folder / "conf.d" / f"{name}.toml").write_text(part, encoding="utf-8")
    return config.load(Whole, path, True, environment or {}, given, check)


def faults(folder: Path, *arguments: Any, **parts: str) -> list[str]:
    with pytest.raises(ConfigError) as raised:
        load(folder, *arguments, **parts)
    assert all(fault.fix for fault in raised.value.faults)
    return [fault.text.removeprefix(f"{folder}/") for fault in raised.value.faults]


SECONDS = Duration(0.001, 3600.0)
ADDRESS = Either(Integer(0, 9), Text(r"/\S+", "a path"))


@pytest.mark.parametrize(
    ("reader", "value", "expected"),
    [
        (Text(), "a b", "a b"),
        (Text(r"[a-z]+", "letters"), "ab", "ab"),
        (Choice("a", "b"), "b", "b"),
        (Flag(), True, True),
        (Integer(1, 9), 9, 9),
        (Number(0, 1), 1, 1.0),
        (Number(), -2.5, -2.5),
        (Size(), "48MiB", 48 * MIB),
        (Size(), "1.5 GB", 1_500_000_000),
        (Size(), 4096, 4096),
        (Size(0), 0, 0),
        (Size(0), "0", 0),
        (SECONDS, "40ms", 0.04),
        (SECONDS, "9ms", 0.009),
        (SECONDS, "2.5s", 2.5),
        (SECONDS, "5min", 300.0),
        (SECONDS, "1 h", 3600.0),
        (SECONDS, 2, 2.0),
        (SECONDS, 0.5, 0.5),
        (Duration(1, 10**6), "2d", 172800.0),
        (Duration(1, 2, off=True), 0, 0.0),
        (Duration(1, 2, off=True), "0s", 0.0),
        (FilePath(), "/a/b", Path("/a/b")),
        (FilePath(), "b.pub", Path("/base/b.pub")),
        (FilePath(), "../b", Path("/base/../b")),
        (ListOf(Integer(1, 3)), [1, 3], (1, 3)),
        (ListOf(FilePath()), [], ()),
        (TableOf(Number()), {"a": 1, "b_2": 0.5}, {"a": 1.0, "b_2": 0.5}),
        (ADDRESS, 3, 3),
        (ADDRESS, "/dev/a", "/dev/a"),
    ],
)
def test_what_a_reader_takes(reader: Reader[Any], value: object, expected: object):
    found = reader.read(value, "/base")
    assert found == expected
    assert type(found) is type(expected) or isinstance(found, Path)
    assert reader.read(text.parse(f"value = {reader.write(found)}")["value"], "/elsewhere") == found


@pytest.mark.parametrize(
    ("reader", "value", "said"),
    [
        (Text(), "", 'expected text, got ""'),
        (Text(), "a\nb", r'expected text, got "a\nb"'),
        (Text(), "a\x1b[2J", r'expected text, got "a\u001b[2J"'),
        (Text(), "a\x9b", r'expected text, got "a\u009b"'),
        (Text(), "a\ud800", r'expected text, got "a\ud800"'),
        (Text(), 3, "expected text, got 3"),
        (Text(r"[a-z]+", "letters"), "ab1", 'expected letters, got "ab1"'),
        (Choice("serial", "camera"), "seriel", 'expected "serial" or "camera", got "seriel"'),
        (Choice("a", "b"), ["a"], 'expected "a" or "b", got ["a"]'),
        (Flag(), "true", 'expected true or false, got "true"'),
        (Flag(), 1, "expected true or false, got 1"),
        (Integer(1, 9), 10, "expected a whole number from 1 to 9, got 10"),
        (Integer(1, 9), 0, "expected a whole number from 1 to 9, got 0"),
        (Integer(0, 9), True, "expected a whole number from 0 to 9, got true"),
        (Integer(1, 9), 2.0, "expected a whole number from 1 to 9, got 2.0"),
        (Integer(1, 9), "3", 'expected a whole number from 1 to 9, got "3"'),
        (Integer(1, 9), 2**100, "expected a whole number from 1 to 9, got a number of 101 bits"),
        (Number(0, 1), float("nan"), "expected a number from 0 to 1, got nan"),
        (Number(0), -0.5, "expected a number of at least 0, got -0.5"),
        (Number(), float("inf"), "expected a number, got inf"),
        (Number(), False, "expected a number, got false"),
        (Size(), "0", 'expected a size from 1 to 512GiB, got "0"'),
        (Size(0), False, "expected a size from 0 to 512GiB, got false"),
        (Size(), "5 parsecs", 'expected a size from 1 to 512GiB, got "5 parsecs"'),
        (Size(MIB), "1KiB", 'expected a size from 1MiB to 512GiB, got "1KiB"'),
        (Size(), -1, "expected a size from 1 to 512GiB, got -1"),
        (Size(), 1.5, "expected a size from 1 to 512GiB, got 1.5"),
        (SECONDS, "40", 'expected a time from 1ms to 1h, got "40"'),
        (SECONDS, "5m", 'expected a time from 1ms to 1h, got "5m"'),
        (SECONDS, "-5s", 'expected a time from 1ms to 1h, got "-5s"'),
        (SECONDS, -1, "expected a time from 1ms to 1h, got -1"),
        (SECONDS, "2h", 'expected a time from 1ms to 1h, got "2h"'),
        (SECONDS, float("nan"), "expected a time from 1ms to 1h, got nan"),
        (SECONDS, True, "expected a time from 1ms to 1h, got true"),
        (SECONDS, -(10**400), "expected a time from 1ms to 1h, got a number of 1329 bits"),
        (Duration(1, 2, off=True), "500ms", 'expected 0 or a time from 1s to 2s, got "500ms"'),
        (FilePath(), "", 'expected a path, got ""'),
        (FilePath(), "~/a", 'expected a path, got "~/a"'),
        (FilePath(), "a\0b", r'expected a path, got "a\u0000b"'),
        (ListOf(Integer(1, 3)), [1, 4], "expected a whole number from 1 to 3, got 4"),
        (ListOf(Integer(1, 3), 2), [1, 1, 1], "expected a list of at most 2, each a whole number from 1 to 3, got [1, 1, 1]"),
        (ListOf(FilePath()), "/a", 'expected a list of at most 64, each a path, got "/a"'),
        (TableOf(Number()), {"A b": 1}, 'expected names of small letters, digits and _, got "A b"'),
        (TableOf(Number()), {"a": "b"}, 'expected a number, got "b"'),
        (TableOf(Number()), 3, "expected a table, each value a number, got 3"),
        (ADDRESS, 10, "expected a whole number from 0 to 9, or a path, got 10"),
    ],
)
def test_what_a_reader_refuses(reader: Reader[Any], value: object, said: str):
    with pytest.raises(UnfitError) as raised:
        reader.read(value, "/base")
    assert str(raised.value) == said


@pytest.mark.parametrize(
    ("reader", "value", "fix"),
    [
        (Choice("serial", "camera"), "Seriel", 'did you mean "serial"?'),
        (Integer(1, 9), "3", "write the number without quotes"),
        (Flag(), "yes", "write true or false, without quotes"),
        (Size(MIB), 5, "give at least 1MiB"),
        (Size(), 2**50, "give at most 512GiB"),
        (SECONDS, 0, "give at least 1ms"),
        (SECONDS, "2h", "give at most 1h"),
        (ListOf(FilePath()), "/a", 'write it in brackets, such as ["/a"]'),
        (FilePath(), "~/a", "write the whole path: ~ is no folder to a service"),
    ],
)
def test_the_fix_is_of_the_mistake(reader: Reader[Any], value: object, fix: str):
    with pytest.raises(UnfitError) as raised:
        reader.read(value, "/base")
    assert raised.value.fix == fix


@pytest.mark.parametrize("reader", [Integer(1, 9), Number(), Size(), SECONDS, Text(), Flag(), Choice("a"), FilePath(), ADDRESS])
def test_a_number_too_long_to_be_written_is_refused_too(reader):
    with pytest.raises(UnfitError, match="got a number of 20001 bits"):
        reader.read(2**20000, "")


@given(st.floats(0.001, 1e9) | st.integers(1, 10**9).map(float) | st.integers(1, 10**6).map(lambda count: count / 1000))
def test_a_time_is_read_as_it_was_written(seconds):
    reader = Duration(0.001, 1e9)
    assert reader.read(text.parse(f"value = {reader.write(seconds)}")["value"], "") == seconds


def test_times_for_people():
    assert [time_text(seconds) for seconds in (0.04, 1, 2.5, 90, 600, 3600, 172800, 0)] == ["40ms", "1s", "2.5s", "90s", "10min", "1h", "2d", "0s"]


@given(st.integers(1, 2**39))
def test_a_size_is_read_as_it_was_written(size):
    assert Size().read(text.parse(f"value = {Size().write(size)}")["value"], "") == size


@given(st.text())
def test_text_that_is_taken_is_read_as_it_was_written(words):
    try:
        found = Text().read(words, "")
    except UnfitError as reason:
        said = str(reason)
        assert printable(said) == said
    else:
        assert "://" in words or text.parse(f"value = {toml(found)}")["value"] == words


def test_an_example_of_everything(tmp_path):
    content = """
name = "cam"
server.port = 80
server.keys = ["key.pub", "/etc/key.pub"]
[server.rates]
b = 0.25
[source]
type = "wire"
url = "/dev/x"
"""
    found = load(tmp_path, content)
    keys = (tmp_path / "key.pub", Path("/etc/key.pub"))
    assert found.config == Whole(name="cam", server=Server(port=80, keys=keys, rates={"b": 0.25}), source=Wire(url="/dev/x"))
    assert found.origins["server.port"] == Origin("file", str(tmp_path / "main.toml"), 3)
    assert found.origins["server.rates.b"].line == 6
    assert found.origins["server.wait"] == Origin()
    assert found.files == (str(tmp_path / "main.toml"),)
    assert [str(warning) for warning in found.warnings] == [f"{tmp_path}/main.toml:2: name: named"]


def test_without_anything_all_are_defaults(tmp_path):
    found = config.load(Whole, tmp_path / "absent.toml", False, {"HOST": "box"}, (), check)
    assert found.config == Whole(name="box")
    assert found.files == ()
    assert Whole().server == Server()
    assert isinstance(Whole().source, Nothing)


def test_later_sources_win_key_by_key(tmp_path):
    first = '[server]\nport = 10\nhost = "main"\nwait = 1\nroom = 1\n[server.rates]\na = 0.1\nb = 0.1\n'
    parts = {"10-a": '[server]\nhost = "a"\nwait = 2\nroom = 2', "20-b": "[server]\nwait = 3\nroom = 3\n[server.rates]\nb = 0.2\nc = 0.2"}
    environment = {"EDGEADAPT_SERVER__ROOM": "4", "EDGEADAPT_SERVER__RATES__C": "0.4", "EDGEADAPT_SERVER__HOST": "env", "EDGEADAPT__NAME": "env"}
    found = load(tmp_path, first, environment, ("server.host=line", "server.rates={d = 0.5}"), **parts)
    server = found.config.server
    assert (server.port, server.wait, server.room, server.host, found.config.name) == (10, 3.0, 4, "line", "env")
    assert server.rates == {"a": 0.1, "b": 0.2, "c": 0.4, "d": 0.5}
    told_ = {key: str(found.origins[f"server.{key}"]).rpartition("/")[2] for key in ("port", "wait", "room", "host")}
    assert told_ == {"port": "main.toml:2", "wait": "20-b.toml:2", "room": "environment, EDGEADAPT_SERVER__ROOM", "host": "command line"}
    assert [Path(file).name for file in found.files] == ["main.toml", "10-a.toml", "20-b.toml"]


def test_only_visible_toml_files_of_the_folder_are_read_sorted(tmp_path):
    (tmp_path / "conf.d").mkdir()
    for number, name in enumerate(("b.toml", "a.toml", ".z.toml", "c.toml~", "d.conf")):
        (tmp_path / "conf.d" / name).write_text(f"server.port = {10 + number}", encoding="utf-8")
    found = load(tmp_path)
    assert found.config.server.port == 10
    assert [Path(file).name for file in found.files] == ["main.toml", "a.toml", "b.toml"]


def test_relative_paths_begin_at_the_file_or_where_the_program_was_started(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load(tmp_path, b1='server.keys = ["k"]').config.server.keys == (tmp_path / "conf.d" / "k",)
    assert load(tmp_path, "", {}, ('server.keys = ["k"]',)).config.server.keys == (Path("k"),)


@pytest.mark.parametrize(
    ("word", "key", "value"),
    [
        ("8099", "port", 8099),
        ("40ms", "wait", 0.04),
        ("48MiB", "room", 48 * MIB),
        ('"quoted.host"', "host", "quoted.host"),
        ("bare.host", "host", "bare.host"),
        ("1234", "token", "1234"),
        ("2024-01-01", "token", "2024-01-01"),
        ("a = 1", "token", "a = 1"),
        ('["/a", "/b"]', "keys", (Path("/a"), Path("/b"))),
        ("{a = 1}", "rates", {"a": 1.0}),
    ],
)
def test_words_of_the_environment_and_the_command_line(tmp_path, word, key, value):
    assert getattr(load(tmp_path, "", {f"EDGEADAPT_SERVER__{key.upper()}": word}).config.server, key) == value
    assert getattr(load(tmp_path, "", {}, (f"server.{key}={word}",)).config.server, key) == value


def test_other_variables_are_no_settings(tmp_path):
    others = {"EDGEADAPT_DATA": "x", "EDGEADAPT_CACHE": "/y", "EDGEADAPTSERVER__PORT": "1", "OTHER_SERVER__PORT": "x", "SERVER__PORT": "x"}
    assert load(tmp_path, "", others).config == Whole()


def test_faults_of_variables_name_the_variable(tmp_path):
    environment = {"EDGEADAPT_SERVER__PORT": "many", "EDGEADAPT_SERVR__PORT": "1", "EDGEADAPT_SERVER__PROT": "1", "EDGEADAPT__NAME": "A"}
    assert sorted(faults(tmp_path, "", environment)) == [
        'EDGEADAPT_SERVER__PORT: server.port: expected a whole number from 1 to 65535, got "many"',
        "EDGEADAPT_SERVER__PROT: server.prot: there is no such key",
        "EDGEADAPT_SERVR__PORT: servr: there is no such section",
        'EDGEADAPT__NAME: name: expected small letters, got "A"',
    ]


@pytest.mark.parametrize(("key", "word"), [("PORT", "1\nb = 2"), ("TOKEN", '["a"]'), ("TOKEN", "{a = 1}"), ("RATES__A", '"1"'), ("RATES", "fast")])
def test_a_word_is_text_only_where_it_is_no_other_value(tmp_path, key, word):
    assert len(faults(tmp_path, "", {f"EDGEADAPT_SERVER__{key}": word})) == 1


def test_faults_of_the_command_line_name_the_option(tmp_path):
    assert faults(tmp_path, "", {}, ("server.port", "=3", "server.port=0", "a b=1", "server.x=1")) == [
        '--set: expected SECTION.KEY=VALUE, got "server.port"',
        '--set: expected SECTION.KEY=VALUE, got "=3"',
        '--set: expected SECTION.KEY=VALUE, got "a b=1"',
        "--set server.x: server.x: there is no such key",
        "--set server.port: server.port: expected a whole number from 1 to 65535, got 0",
    ]


def test_all_faults_of_all_files_are_told_together_each_with_its_line(tmp_path):
    main = """
nam = "x"
loud = "yes"
server = 3
[source]
type = "wire"
rate = 20
path = "/x"
"""
    other = """
[server]
prt = 1
port = 0
keys = [
  "/a",
  "~/b",
]
[servers]
x = 1
[server.rates]
ok = 0.5
a = 2
[server.port]
"""
    assert faults(tmp_path, main, a=other.replace("[server.port]\n", "")) == [
        "main.toml:2: nam: there is no such key",
        'main.toml:3: loud: expected true or false, got "yes"',
        "main.toml:4: server: expected a table, got 3",
        'main.toml:6: source.url: is missing, and a source of type "wire" needs it',
        "main.toml:7: source.rate: expected a whole number from 1 to 10, got 20",
        'main.toml:8: source.path: is for type "place", and the type is "wire"',
        "conf.d/a.toml:3: server.prt: there is no such key",
        "conf.d/a.toml:4: server.port: expected a whole number from 1 to 65535, got 0",
        'conf.d/a.toml:7: server.keys[1]: expected a path, got "~/b"',
        "conf.d/a.toml:9: servers: there is no such section",
        "conf.d/a.toml:13: server.rates.a: expected a number from 0 to 1, got 2",
    ]


def test_a_fault_that_a_later_source_hides_is_told_all_the_same(tmp_path):
    assert faults(tmp_path, "server.port = 0", {}, ("server.port=5",)) == ["main.toml:1: server.port: expected a whole number from 1 to 65535, got 0"]


def test_the_error_is_one_text_with_every_fix(tmp_path):
    with pytest.raises(ConfigError) as raised:
        load(tmp_path, "server.prt = 1\nsrver.port = 1")
    where = tmp_path / "main.toml"
    assert str(raised.value) == (
        f"2 faults in the configuration\n{where}:1: server.prt: there is no such key\n  fix: did you mean port?\n"
        f"{where}:2: srver: there is no such section\n  fix: did you mean server?"
    )
    assert isinstance(raised.value, EdgeAdaptError)
    assert raised.value.exit_code == 9
    assert str(ConfigError.of([Fault("a", None, "", "wrong", "mend")])) == "a: wrong\n  fix: mend"


@pytest.mark.parametrize(
    ("content", "fix"),
    [
        ("server.Port = 1", "did you mean port?"),
        ("[server]\nrate = 1", "it is a key of [source]"),
        ("port = 1", "it is a key of [server]"),
        ("[server]\nzzz = 1", "[server] has host, port, token, wait, room, keys, rates"),
        ("zzz = 1", "a configuration has server, source, name, loud"),
        ("[source]\nurk = 1", "did you mean url?"),
        ('[source]\ntype = "wyre"', 'did you mean "wire"?'),
        ("server = 3", "write [server] and its keys under it"),
        ('[source]\ntype = "wire"', 'write url = "/dev/a"'),
        ('[source]\npath = "/x"', 'take it out, or write type = "place"'),
        ("[server]\nport = 0", "write port = 8099"),
    ],
)
def test_unknown_and_misplaced_keys_get_their_fix(tmp_path, content, fix):
    with pytest.raises(ConfigError) as raised:
        load(tmp_path, content)
    assert [fault.fix for fault in raised.value.faults] == [fix]


def test_keys_of_a_type_that_a_later_source_replaced_are_put_aside(tmp_path):
    found = load(tmp_path, '[source]\ntype = "wire"\nurl = "/dev/x"\nrate = 1', {"EDGEADAPT_SOURCE__TYPE": "place"}, ("source.path=/y",))
    assert found.config.source == Place(path=Path("/y"), rate=1.0)
    assert [warning.text.removeprefix(f"{tmp_path}/") for warning in found.warnings] == [
        'main.toml:3: source.url: is not used: it is for type "wire", and environment, EDGEADAPT_SOURCE__TYPE made that "place"'
    ]
    assert faults(tmp_path, '[source]\ntype = "place"', {"EDGEADAPT_SOURCE__URL": "/z"}, ("source.path=/y",)) == [
        'EDGEADAPT_SOURCE__URL: source.url: is for type "wire", and the type is "place"'
    ]


def test_a_wrong_type_says_nothing_of_its_keys(tmp_path):
    assert faults(tmp_path, '[source]\ntype = "wyre"\nurl = "/dev/x"') == [
        'main.toml:2: source.type: expected "nothing", "wire" or "place", got "wyre"'
    ]


def test_findings_of_several_keys_are_told_where_one_was_given(tmp_path):
    assert faults(tmp_path, "[server]\n\nport = 1") == ["main.toml:3: server.host: port 1".replace("host", "port")]
    assert faults(tmp_path, '[server]\nhost = "a"\nport = 1') == ["main.toml:2: server.host: port 1"]
    assert faults(tmp_path, '[server]\nhost = 5\nport = 1') == ["main.toml:2: server.host: expected a host, got 5"]
    found = load(tmp_path, "", {"EDGEADAPT_SERVER__PORT": "2"})
    assert [str(warning) for warning in found.warnings] == ["EDGEADAPT_SERVER__PORT: server.port: port 2\n  fix: mend"]
    placed = config.placed(Finding(("server.host",), "wrong", ""), found.origins, "somewhere")
    assert placed.text == "somewhere: server.host: wrong"


@pytest.mark.parametrize(
    ("content", "said", "fix"),
    [
        ("a = 1\nb = yellow\n", "main.toml:2: this is no TOML in column 5: invalid value", 'write "yellow"'),
        ("loud = True", "main.toml:1: this is no TOML in column 8: invalid value", "write true:"),
        ("room = 48MiB", "main.toml:1: this is no TOML in column 10: expected", 'such as "48MiB"'),
        ("name: x", "main.toml:1: this is no TOML in column 5: expected", "with = and not :"),
        ("\r\n\r\n[server", "main.toml:3: this is no TOML in column 8: expected", "write key = value"),
        ("name = '''\nx", "main.toml:2: this is no TOML in column 2: ", "write key = value"),
        ("name = 'a'\nname = 'b'", "main.toml:2: this is no TOML in column 11: cannot overwrite", "no key or section stands twice"),
        ("\ufeffname = 'a'", "main.toml:1: this is no TOML in column 1: invalid statement", "without a byte order mark"),
        ("port = " + "9" * 5000, "main.toml: this is no TOML: exceeds the limit", "write key = value"),
        ("a = " + "[" * 20000, "main.toml: this is no TOML that can be read: too many brackets", "leave brackets out"),
        (b"# caf\xc3\xa9\nname = 'caf\xe9'", "main.toml:2: expected UTF-8, got the byte 0xe9", "save the file as UTF-8"),
        (b" " * (text.LARGEST_FILE + 1), "main.toml: expected at most 1048576 bytes, got more", "check the path"),
    ],
)
def test_what_is_no_toml_is_told_with_line_and_column(tmp_path, content, said, fix):
    with pytest.raises(ConfigError) as raised:
        load(tmp_path, content)
    (fault,) = raised.value.faults
    assert fault.text.removeprefix(f"{tmp_path}/").startswith(said)
    assert fix in fault.fix


def test_the_largest_file_is_read(tmp_path):
    assert load(tmp_path, b"name = 'a' #".ljust(text.LARGEST_FILE, b" ")).config.name == "a"


def test_after_a_file_that_cannot_be_read_nothing_is_called_missing(tmp_path):
    assert faults(tmp_path, "[", {"EDGEADAPT_SOURCE__TYPE": "wire", "EDGEADAPT_SERVER__PORT": "1"})[1:] == []
    assert len(faults(tmp_path, "[", {"EDGEADAPT_SERVER__PORT": "0"}, a="x", b="loud = 1")) == 4


@pytest.mark.parametrize("kind", ["folder", "pipe", "absent", "nul", "device"])
def test_what_is_no_file_is_a_fault_at_once(tmp_path, kind):
    path = tmp_path / "main.toml"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "nul":
        path = Path(f"{path}\0x")
    elif kind == "device":
        path = Path("/dev/zero")
    found: list[Fault] = []

    def look() -> None:
        try:
            config.load(Whole, path, True, {})
        except ConfigError as error:
            found.extend(error.faults)

    thread = threading.Thread(target=look, daemon=True)  # a pipe that is opened for reading waits for a writer
    thread.start()
    thread.join(30)
    assert [fault.place for fault in found] == [str(path).replace("\0", "\\u0000")]
    assert found[0].fix


def test_a_conf_d_that_is_no_folder_is_a_fault(tmp_path):
    (tmp_path / "conf.d").write_text("", encoding="utf-8")
    assert faults(tmp_path, "loud = 1") == ["conf.d: cannot be listed: Not a directory", "main.toml:1: loud: expected true or false, got 1"][::-1]


def test_a_file_may_be_a_link(tmp_path):
    (tmp_path / "real.toml").write_text('server.keys = ["k"]', encoding="utf-8")
    (tmp_path / "link").mkdir()
    (tmp_path / "link" / "main.toml").symlink_to(tmp_path / "real.toml")
    found = config.load(Whole, tmp_path / "link" / "main.toml", True, {})
    assert found.config.server.keys == (tmp_path / "link" / "k",)


def test_names_that_are_no_utf8_can_be_printed(tmp_path):
    (tmp_path / "conf.d").mkdir()
    (tmp_path / "conf.d" / os.fsdecode(b"\xff.toml")).write_text("x = 1", encoding="utf-8")
    variables = {os.fsdecode(b"EDGEADAPT_SERVER__\xff"): "1", "EDGEADAPT_SERVER__HOST": os.fsdecode(b"\xff")}
    found = faults(tmp_path, "", variables)
    assert len(found) == 3
    assert "\n".join(found).encode()


def test_secrets_are_shown_nowhere(tmp_path):
    found = load(tmp_path, 'server.token = "sesame"')
    assert found.config.server.token == "sesame"
    assert "sesame" not in config.shown(found)
    assert f"# token is set, and not shown  # {tmp_path}/main.toml:1\n" in config.shown(found)
    assert "# token is not set  # default\n" in config.shown(load(tmp_path))
    assert config.effective(found)["server.token"]["value"] is None
    for arguments in (("server.token = [\"sesame\"]",), ("", {"EDGEADAPT_SERVER__TOKEN": "sesame\n"}), ("", {}, ("server.token=sesame\x07",))):
        (said,) = faults(tmp_path, *arguments)
        assert said.endswith("server.token: expected text, got another")


def test_passwords_in_addresses_are_shown_nowhere(tmp_path):
    address = "rtsp://me:se/s@me@camera/1"
    found = load(tmp_path, f'source = {{type = "wire", url = "{address}"}}')
    assert found.config.source.url == address
    assert 'url = "rtsp://…@camera/1"' in config.shown(found)
    assert config.effective(found)["source.url"]["value"] == "rtsp://…@camera/1"
    assert faults(tmp_path, f'server.host = "{address}"') == ['main.toml:1: server.host: expected a host, got "rtsp://…@camera/1"']
    long = faults(tmp_path, f'server.host = "rtsp://{"x" * 100}:sesame@{"y" * 100}"')
    assert "sesame" not in long[0]
    assert len(long[0]) < 200


def test_what_is_shown_can_be_loaded_again(tmp_path):
    content = 'name = "a"\nserver = {wait = "90s", room = 1000, keys = ["/a b", "/\\"c"], rates = {x = 0.1, y = 1}}\n'
    content += '[source]\ntype = "place"\npath = "p"'
    found = load(tmp_path, content)
    shown = config.shown(found)
    assert load(tmp_path / ".", shown).config == found.config
    assert "[server.rates]\nx = 0.1  # " in shown
    assert 'wait = "90s"  # ' in shown
    assert config.effective(found)["server.rates"]["value"] == {"x": 0.1, "y": 1.0}
    assert config.effective(found)["source.type"] == {"value": "place", "origin": f"{tmp_path}/main.toml:4"}


def test_the_example_is_the_defaults_and_shows_every_key(tmp_path):
    example = config.example(Whole, "A head.\n\nMore.")
    assert example.startswith("# A head.\n#\n# More.\n")
    assert load(tmp_path, example).config == Whole()
    for one in config.described(Whole):
        assert f"#{one.key} = " in example
        assert one.help in example
    assert '#token = "abc"' in example


def test_every_key_is_described():
    found = {(one.section, one.key, one.types): one for one in config.described(Whole)}
    assert found["source", "rate", ("wire",)].takes == "a whole number from 1 to 10"
    assert found["source", "rate", ("place",)].takes == "a number from 0 to 1"
    assert found["source", "type", ()].default == '"nothing"'
    assert found["source", "url", ("wire",)].default == "required"
    assert found["", "name", ()].default == "the host's"
    assert found["server", "token", ()].default == "none"
    assert len(found) == 14


def test_a_value_for_a_message_is_short_and_plain():
    assert told({"a": 1}) == "a table"
    assert told([1] * 5) == "a list of 5"
    assert told([[1]]) == "a list of 1"
    assert told("x" * 1000) == '"' + "x" * 78 + "…"
    assert told(True) == "true"


KEYS = st.sampled_from(["name", "loud", "server", "source", "host", "port", "token", "wait", "keys", "rates", "type", "url", "path", "rate", "a"])
LEAVES = st.sampled_from((1, 0, -1, 2.5, True, "wire", "place", "nothing", "a", "5min", "48MiB", "", "\x00", "/x", 10**30)) | st.text(max_size=5)
TREES = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4), max_leaves=8)


def written(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {written(item)}" for key, item in value.items()) + "}"
    return f"[{', '.join(map(written, value))}]" if isinstance(value, list) else toml(value) if value != 10**30 else str(value)


def loads_or_tells(folder: Path, *arguments: Any) -> None:
    """Either a whole configuration, or a ConfigError whose text is plain."""
    try:
        found = load(folder, *arguments)
    except ConfigError as error:
        said, places = str(error).replace("\n", ""), [fault.place.rpartition("/")[2] for fault in error.faults]
        assert printable(said) == said
        assert all(re.match(r"main\.toml|EDGEADAPT_|--set", place) for place in places)
        assert places
    else:
        assert isinstance(found.config, Whole)
        assert config.shown(found).encode()


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(KEYS, TREES, max_size=5))
def test_any_toml_loads_or_is_a_config_error(tmp_path, tree):
    loads_or_tells(tmp_path, "\n".join(f"{key} = {written(value)}" for key, value in tree.items()).encode("utf-8", "replace"))


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=60) | st.text(string.printable, max_size=60).map(str.encode))
def test_any_bytes_load_or_are_a_config_error(tmp_path, data):
    loads_or_tells(tmp_path, data)


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(KEYS, max_size=4), st.text(max_size=20) | st.sampled_from(("{a = 1}", "[1]", "5", '"a"', "1\nb = 2", "{", "{port = 1}")))
def test_any_word_loads_or_is_a_config_error(tmp_path, path, word):
    loads_or_tells(tmp_path, "", {f"EDGEADAPT_{'__'.join(path).upper()}__": word, f"EDGEADAPT_{'__'.join(path).upper()}": word})
    loads_or_tells(tmp_path, "", {}, (f"{'.'.join(path)}={word}", word))
