"""The daemon's configuration: its keys, what they need of each other, and that the document and the example say the same."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any, get_args

import pytest

from edgeadapt import config as configuration
from edgeadapt.cli import main
from edgeadapt.config import Described, described
from edgeadapt.config.schema import sections
from edgeadapt.devices.sources import STDIN_FORMATS
from edgeadapt.devices.sources.kinds import KINDS
from edgeadapt.errors import ConfigError
from edgeadapt.runtime.daemon import config
from edgeadapt.runtime.daemon.config import Config, SourceConfig, usable
from tests.test_imports import loaded_by

pytestmark = pytest.mark.device

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "configuration.md"
HEADS = (
    ["| key | takes | default | what it is |", "|---|---|---|---|"],
    ["| key | of type | takes | default | what it is |", "|---|---|---|---|---|"],
)


def row(one: Described) -> str:
    """A key's row in the document."""
    words = one.default in ("none", "required") or one.default.startswith(("$", "the "))
    default = one.default if words else f"`{one.default}`"
    types = [", ".join(one.types) or "all"] if one.section == "source" else []
    return f"| {' | '.join([f'`{one.key}`', *types, one.takes, default, one.help])} |"


def load(folder: Path, content: str, **environment: str) -> config.Loaded:
    path = folder / "edgeadapt.toml"
    path.write_text(content, encoding="utf-8")
    return config.load(path, environment)


def told(folder: Path, content: str) -> tuple[list[str], list[str]]:
    """Faults and warnings."""
    try:
        return [], [fault.text.partition("edgeadapt.toml:")[2] for fault in load(folder, content).warnings]
    except ConfigError as error:
        return [fault.text.partition("edgeadapt.toml:")[2] for fault in error.faults], []


def test_without_a_file_there_are_defaults(tmp_path, monkeypatch):
    monkeypatch.setattr(config, "DEFAULT_PATH", str(tmp_path / "absent.toml"))
    found = config.load(None, {})
    assert found.config == Config()
    assert found.warnings == ()
    assert found.config.source.type == "none"
    assert [found.config.http.enabled, found.config.mqtt.enabled, found.config.frames.keep] == [False, False, 0]


def test_a_file_that_is_named_must_be_there(tmp_path):
    with pytest.raises(ConfigError, match=r"absent\.toml: there is no such file"):
        config.load(tmp_path / "absent.toml", {})


def test_folders_of_a_service_are_where_systemd_made_them(tmp_path):
    found = load(tmp_path, "", STATE_DIRECTORY="/var/lib/private/a:/b", RUNTIME_DIRECTORY="/run/a")
    assert found.config.state.folder == Path("/var/lib/private/a")
    assert found.config.control.socket == Path("/run/a/control.sock")
    found = load(tmp_path, "")
    assert found.config.state.folder == Path("/var/lib/edgeadapt")
    assert found.config.control.socket == Path("/run/edgeadapt/control.sock")


@pytest.mark.parametrize(
    ("host", "name"), [("pi", "pi"), ("Camera_3.local", "camera-3"), ("-", "device"), ("", "device"), ("ä" * 70 + "b" * 70, "b" * 63)]
)
def test_the_name_is_the_hosts_made_plain(tmp_path, monkeypatch, host, name):
    monkeypatch.setattr("socket.gethostname", lambda: host)
    assert load(tmp_path, "").config.name == name
    load(tmp_path, f'name = "{name}"')


@pytest.mark.parametrize("name", ["", "A", "a_b", "-a", "a-", "a" * 64, "a.b"])
def test_names_that_are_none(tmp_path, name):
    assert told(tmp_path, f'name = "{name}"')[0][0].startswith("1: name: expected a name of at most 63 small letters, digits and -")


SERIAL = '[source]\ntype = "serial"\nurl = "{}"\n'
CAMERA = '[source]\ntype = "camera"\n'
MQTT = '[mqtt]\nenabled = true\nhost = "broker"\n'


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ("[bundle]\nrequire_signature = true", "2: bundle.require_signature: signatures are required, and there is no key to check them with"),
        ('[memory]\nbudget = "64MiB"\nslack = "64MiB"', "3: memory.slack: expected less than the budget of 64MiB, got 64MiB"),
        (CAMERA + "width = 3", "3: source.width: a camera is asked for a width and a height, or for neither"),
        (CAMERA + 'device = "rtsp://c/1"\nfps = 3', "4: source.fps: a camera with an address cannot be asked for it"),
        ('[source]\ntype = "http"', "2: source.type: frames come over HTTP, which is not enabled"),
        ('[source]\ntype = "http"\n[http]\nenabled = true', "2: source.type: frames come over HTTP, which takes none without a token"),
        (f'[control]\nsocket = "/{"s" * 107}"', "2: control.socket: expected a path of at most 107 bytes, got 108"),
        ("[mqtt]\nenabled = true", "2: mqtt.enabled: MQTT is enabled, and there is no broker"),
        ('[mqtt]\npassword_file = "p"', "2: mqtt.password_file: a password is of somebody"),
        ('[mqtt]\nca = "p"', "2: mqtt.ca: certificates are for TLS, and this is not encrypted"),
    ],
)
def test_keys_that_need_each_other(tmp_path, content, fault):
    assert told(tmp_path, content) == ([fault], [])


@pytest.mark.parametrize(
    ("content", "warning"),
    [
        (
            '[memory]\nbudget = "50MiB"',
            "2: memory.budget: leaves less than the 48MiB that Python, numpy and onnxruntime take before a model is loaded",
        ),
        ('[memory]\nreserve = "1MiB"', "2: memory.reserve: does nothing without a budget"),
        ("[adapt]\nenabled = false\nguard = true", "3: adapt.guard: does nothing where adapt.enabled is false"),
        ("[adapt]\nenabled = false\nset.rate = 1", "3: adapt.set: does nothing where adapt.enabled is false"),
        (SERIAL.format("socket://10.0.0.1:99"), "3: source.url: socket:// is neither encrypted nor does it ask who is there"),
        (SERIAL.format("rfc2217://[::2]:99"), "3: source.url: rfc2217:// is neither encrypted nor does it ask who is there"),
        (SERIAL.format("/dev/ttyUSB0"), "3: source.url: /dev/ttyUSB0 may be another device after the next start"),
        (
            '[source]\ntype = "replay"\npath = "a.npz"\nloop = true',
            "4: source.loop: frames are replayed without end as fast as they are taken, which keeps a processor busy",
        ),
        ('[metrics]\ntextfile = "a.txt"', "2: metrics.textfile: node_exporter reads files that end in .prom, not a.txt"),
        (
            '[http]\nenabled = true\nhost = "0.0.0.0"',
            "3: http.host: everybody who reaches this machine can see the page, the status and the metrics",
        ),
        (MQTT + 'username = "u"\npassword_file = "p"', "5: mqtt.password_file: the password goes over the network as it stands"),
        (MQTT + "tls = true", "4: mqtt.tls: 1883 is the port of brokers without TLS"),
    ],
)
def test_what_is_hardly_meant_is_a_warning(tmp_path, content, warning):
    assert told(tmp_path, content) == ([], [warning])


@pytest.mark.parametrize(
    "content",
    [
        '[adapt]\nenabled = false\nguard = false\n[predict]\ncap = "40ms"',
        '[memory]\nbudget = "128MiB"\nreserve = "64MiB"\nslack = 0',
        '[memory]\nslack = "1MiB"',
        SERIAL.format("socket://localhost:99"),
        SERIAL.format("rfc2217://[::1]:99"),
        SERIAL.format("loop://"),
        SERIAL.format("/dev/serial/by-id/usb-a-if00"),
        CAMERA + 'device = "picamera2:"\nwidth = 640\nheight = 480\nfps = 5',
        CAMERA + "device = 2",
        '[source]\ntype = "replay"\npath = "a.npz"\nloop = true\nfps = 5',
        '[source]\ntype = "http"\n[http]\nenabled = true\ntoken_file = "t"',
        '[http]\nhost = "0.0.0.0"',
        MQTT + 'tls = true\nport = 8883\nca = "c"\nusername = "u"\npassword_file = "p"',
        '[mqtt]\nenabled = true\nhost = "localhost"\nusername = "u"\npassword_file = "p"',
        f'[control]\nsocket = "/{"s" * 106}"',
        "[predict]\ncompare = 0",
        '[metrics]\ntextfile = "a.prom"',
    ],
)
def test_what_is_meant_is_fine(tmp_path, content):
    assert told(tmp_path, content) == ([], [])


@pytest.mark.parametrize("device", ["picamera2", "ftp://a", "video0", ""])
def test_devices_that_are_no_camera(tmp_path, device):
    (fault,), _ = told(tmp_path, f'{CAMERA}device = "{device}"')
    assert fault.startswith("3: source.device: expected a whole number from 0 to 255, or a path, an address")


def test_a_key_of_another_type_says_which_have_it(tmp_path):
    faults, _ = told(tmp_path, '[source]\ntype = "stdin"\nfps = 3\nbaud = 9600')
    assert faults == [
        '3: source.fps: is for type "camera" or "replay", and the type is "stdin"',
        '4: source.baud: is for type "serial", and the type is "stdin"',
    ]


def classes() -> dict[str, Any]:
    """What the devices' sources are made with, by type."""
    from edgeadapt.devices.sources.camera import Camera
    from edgeadapt.devices.sources.replay import Replay
    from edgeadapt.devices.sources.serial import Serial
    from edgeadapt.devices.sources.watch import Watch

    return {"camera": Camera, "folder": Watch, "replay": Replay, "serial": Serial}


def test_the_sections_keys_are_the_arguments_of_the_sources_with_the_same_defaults():
    (part,) = (part for part in sections(Config) if part.name == "source")
    assert set(part.kinds) == set(KINDS) == {kind.type for kind in get_args(SourceConfig)}
    for kind, made in classes().items():
        arguments = {name: one.default for name, one in inspect.signature(made).parameters.items() if name != "wanted"}
        keys = part.settings(kind)
        assert keys.keys() == arguments.keys(), kind
        for name, default in arguments.items():
            if default is not inspect.Parameter.empty:
                assert keys[name].default == default, name
            else:
                assert keys[name].example is not None or keys[name].default is not None
    assert part.settings("stdin").keys() == {"format"}
    assert part.settings("stdin")["format"].reader.names == STDIN_FORMATS


def test_options_are_what_was_set(tmp_path):
    source = load(tmp_path, '[source]\ntype = "replay"\npath = "a.npz"').config.source
    assert config.options(source) == {"path": tmp_path / "a.npz", "loop": False}
    assert config.options(Config().source) == {}


def test_every_key_has_a_help_and_something_to_show():
    for part in sections(Config):
        assert part.help or not part.name
        for kind in part.kinds:
            for key, item in part.settings(kind).items():
                assert item.help, key
                assert not item.help.endswith("."), key
                assert item.sample, f"{part.name}.{key} has neither a default to show nor an example"


def test_the_example_is_right_and_is_the_defaults(tmp_path, capsys):
    assert main.main(["config", "example"]) == 0
    example = capsys.readouterr().out
    found = load(tmp_path, example)
    assert found.config == config.load(tmp_path / "edgeadapt.toml", {}).config
    assert found.config == Config()
    assert all(len(line) <= 102 for line in example.splitlines())


def test_every_line_of_the_example_is_right_when_it_is_taken_in(tmp_path, capsys):
    assert main.main(["config", "example"]) == 0
    example = capsys.readouterr().out
    begin = example.index('\n# with type = "')
    end = example.index("\n\n\n", begin)
    kinds = re.split(r'\n# with type = "(.*)":\n', example[begin:end])
    assert len(kinds) == 11
    for kind, keys in zip(kinds[1::2], kinds[2::2]):
        one = example[:begin].replace('#type = "none"', f'#type = "{kind}"') + keys + example[end:].replace("#tls = false", "#tls = true")
        found = load(tmp_path, re.sub(r"^#(?=[a-z])", "", one, flags=re.MULTILINE))
        assert found.config.source.type == kind
        assert found.config.adapt.set == {"rate": 0.001}
        assert {key for key, origin in found.origins.items() if origin.kind == "default"} == set()


def test_the_document_has_every_key():
    text = DOCUMENT.read_text(encoding="utf-8").split("\n## Keys\n")[1].split("\n## ")[0]
    found = {}
    for part in text.split("\n### ")[1:]:
        name, _, rest = part.partition("\n")
        found["" if name == "Without a section" else name.strip("[]")] = [line for line in rest.splitlines() if line.startswith("| `")]
    expected = {part.name: [row(one) for one in described(Config) if one.section == part.name] for part in sections(Config)}
    assert found == expected
    assert list(found) == list(expected)


def test_what_the_document_shows_of_check_config_is_what_it_says(tmp_path, monkeypatch, capsys):
    text = DOCUMENT.read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    Path("edgeadapt.toml").write_text(text.split("```toml\n")[1].split("```")[0], encoding="utf-8")
    assert main.main(["check-config", "--config", "edgeadapt.toml"]) == 9
    assert capsys.readouterr().out == text.split("```text\n")[1].split("```")[0]


@pytest.mark.parametrize("code", ["import edgeadapt.config", "from edgeadapt.runtime.daemon import config; config.load(environment={})"])
def test_a_configuration_costs_no_library(code):
    assert loaded_by(code) & {"numpy", "onnxruntime", "onnx", "serial", "PIL", "torch", "asyncio", "ssl", "http.server"} == set()


def test_shown_hides_a_cameras_password(tmp_path):
    found = load(tmp_path, CAMERA + 'device = "rtsp://me:sesame@camera/1"')
    assert "sesame" not in configuration.shown(found)
    assert config.options(found.config.source)["device"] == "rtsp://me:sesame@camera/1"


def test_what_has_no_fault_of_a_faulty_configuration_can_be_used(tmp_path):
    path = tmp_path / "e.toml"
    path.write_text('name = "line-3"\n[http]\nenabled = true\nport = 99999\n[predict]\nqueue = 7\n[sauce]\ntype = "x"\n[source]\ntype = "folder"\n')
    found, without = usable(path, {"EDGEADAPT_MEMORY__BUDGET": "much"}, ["state.history=5", "adapt.every=2"])
    assert without == ("http", "memory", "sauce", "source")
    assert (found.name, found.predict.queue, found.state.history, found.adapt.every) == ("line-3", 7, 5, 2)
    assert (found.http.enabled, found.memory.budget, found.source.type) == (False, None, "none")
    assert not found.adapt.enabled, "nothing is adapted by what somebody did not mean"
    assert not found.bundle.require_signature
    for content in ("name = ", '[bundle]\nkeys = 3\nrequire_signature = true'):
        path.write_text(content)
        found, without = usable(path, {}, [])
        assert (found.source.type, without) == ("none", ("bundle",) if "bundle" in content else ())
        assert found.bundle.require_signature, "it may have said so: without keys no bundle is served"
        assert found.bundle.keys == ()
    path.write_text('[mqtt]\nenabled = true\n[log]\nlevel = "debug"\n')
    found, without = usable(path, {}, [])
    assert (without, found.mqtt.enabled, found.log.level) == (("mqtt",), False, "debug"), "keys that need each other"
