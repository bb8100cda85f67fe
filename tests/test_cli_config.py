"""`edgeadapt check-config` and `edgeadapt config`: what they print and end with, and what is looked at on this machine."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from edgeadapt.cli import main
from edgeadapt.runtime.daemon import config, config_here
from tests.smalltoy import small_bundle
from tests.toybundle import Toy

pytestmark = pytest.mark.device


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """An empty folder, no settings in the environment, and no file of the machine's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(config, "DEFAULT_PATH", str(tmp_path / "default.toml"))
    for name in [name for name in os.environ if name.startswith("EDGEADAPT_") and "__" in name]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("STATE_DIRECTORY", str(tmp_path / "state"))
    monkeypatch.setenv("RUNTIME_DIRECTORY", str(tmp_path / "run"))
    return tmp_path


def put(text: str, name: str = "e.toml") -> str:
    Path(name).write_text(text, encoding="utf-8")
    return name


@pytest.fixture
def say(capsys):
    """Runs a command; its exit code and the lines that it printed."""

    def run(*arguments: str) -> tuple[int, list[str]]:
        code = main.main(list(arguments))
        said = capsys.readouterr()
        assert said.err == "" or code == 9
        return code, (said.out + said.err).splitlines()

    return run


def test_a_file_that_is_fine(say):
    assert say("check-config", "--config", put("predict.threads = 2")) == (0, ["e.toml: fine"])


def test_no_file_is_fine_too(say):
    assert say("check-config") == (0, ["no file, and what is set without one is fine"])
    put("", "default.toml")
    code, lines = say("check-config")
    assert (code, len(lines)) == (0, 1)
    assert lines[0].endswith("/default.toml: fine")


def test_every_fault_is_printed_with_its_fix_and_the_code_is_nine(say):
    file = put('[http]\nprot = 1\nhost = "0.0.0.0"\nenabled = 3')
    assert say("check-config", "--config", file, "--set", "predict.threads=0") == (
        9,
        [
            "e.toml:2: http.prot: there is no such key",
            "  fix: did you mean port?",
            "e.toml:4: http.enabled: expected true or false, got 3",
            "  fix: write true or false, without quotes",
            "--set predict.threads: predict.threads: expected a whole number from 1 to 64, got 0",
            "  fix: write threads = 1",
        ],
    )


def test_warnings_leave_it_fine(say):
    code, lines = say("check-config", "--config", put('[http]\nhost = "0.0.0.0"\nenabled = true'))
    assert code == 0
    assert lines[0].startswith("e.toml:2: warning: http.host: everybody who reaches this machine")
    assert lines[1].startswith("  fix: ")
    assert lines[2] == "e.toml: fine"


def test_all_files_are_named(say):
    Path("conf.d").mkdir()
    put("", "conf.d/a.toml")
    assert say("check-config", "--config", put("")) == (0, ["e.toml: fine", "conf.d/a.toml: fine"])


def test_variables_are_settings(say, monkeypatch):
    monkeypatch.setenv("EDGEADAPT_HTTP__PORT", "0")
    code, lines = say("check-config")
    assert code == 9
    assert lines[0].startswith("EDGEADAPT_HTTP__PORT: http.port: expected a whole number from 1 to 65535, got 0")


def test_as_json(say):
    code, lines = say("check-config", "--json", "--config", put("http.port = 0"))
    assert code == 9
    message = "expected a whole number from 1 to 65535, got 0"
    fault = {"place": "e.toml", "line": 1, "key": "http.port", "message": message, "fix": "write port = 8099"}
    assert json.loads("\n".join(lines)) == {"valid": False, "files": [], "faults": [fault], "warnings": []}
    code, lines = say("check-config", "--json", "--config", put('metrics.textfile = "a.txt"'))
    found = json.loads("\n".join(lines))
    assert (code, found["valid"], found["files"], found["faults"]) == (0, True, ["e.toml"], [])
    assert [one["key"] for one in found["warnings"]] == ["metrics.textfile"]


def test_show(say):
    code, lines = say("config", "show", "--config", put("[http]\nport = 80"), "--set", "adapt.set.rate=0.5")
    assert code == 0
    assert "port = 80  # e.toml:2" in lines
    assert 'host = "127.0.0.1"  # default' in lines
    assert lines[lines.index("[adapt.set]") + 1] == "rate = 0.5  # command line"
    put("\n".join(lines), "again.toml")
    assert config.load("again.toml").config == config.load("e.toml", settings=["adapt.set.rate=0.5"]).config
    code, lines = say("config", "show", "--json", "--config", "e.toml")
    assert json.loads("\n".join(lines))["http.port"] == {"value": 80, "origin": "e.toml:2"}


def test_show_ends_with_the_faults(say):
    code, lines = say("config", "show", "--config", put("http.port = 0"))
    assert code == 9
    assert lines[0].startswith("edgeadapt: error: e.toml:1: http.port: expected")


def test_example_is_fine(say):
    code, lines = say("config", "example")
    assert code == 0
    assert say("check-config", "--config", put("\n".join(lines))) == (0, ["e.toml: fine"])
    assert not [line for line in lines if line and not line.startswith(("#", "["))]


def here(say, text: str) -> tuple[int, list[str]]:
    """What is found on this machine, without fixes."""
    code, lines = say("check-config", "--here", "--config", put(text))
    told = [line.partition("e.toml:")[2] for line in lines if not line.startswith("  fix: ")]
    assert len(lines) - len(told) == len(told) - told.count(FINE)
    return code, told


FINE = " fine"


def test_here_only_when_asked(say):
    file = put('bundle.path = "absent.edgeadapt"')
    assert say("check-config", "--config", file)[0] == 0
    code, lines = say("check-config", "--here", "--config", file)
    assert code == 9
    assert lines[0].startswith("e.toml:1: bundle.path: ")
    assert "absent.edgeadapt" in lines[0]
    assert here(say, "") == (0, [FINE])


def test_here_a_bundle_and_what_it_is_given(say, place):
    small_bundle(place / "small.edgeadapt")
    bundle = 'bundle.path = "small.edgeadapt"\n'
    assert here(say, bundle + "adapt.guard = false") == (0, [FINE])
    warning = "1: warning: bundle.path: a guard compares frames with the source, and this bundle does not say what that looks like"
    assert here(say, bundle) == (0, [warning, FINE])
    code, lines = here(say, bundle + "[adapt]\nguard = false\nwindow = 3\nset = {rate = 1, rat = 2}")
    assert code == 9
    assert lines[0].startswith("4: adapt.window: this bundle cannot adapt on 3 frames at a time")
    assert lines[1].startswith("5: adapt.set.rat: this bundle has no scalar 'rat'")
    camera = bundle + 'adapt.guard = false\n[source]\ntype = "{}"\n{}'
    (place / "pictures").mkdir()
    for kind, more in (("camera", ""), ("stdin", ""), ("replay", 'path = "pictures"')):
        code, lines = here(say, camera.format(kind, more))
        assert code == 9
        wrong = f'4: source.type: a source of type "{kind}" gives images of 1 or 3 channels, and one frame of this bundle is 4'
        assert wrong in lines
    assert here(say, camera.format("stdin", 'format = "npy"')) == (0, [FINE])


def test_here_a_bundle_that_does_not_adapt(say, place):
    Toy(method="source").write(place / "toy.edgeadapt")
    code, lines = here(say, 'bundle.path = "toy.edgeadapt"')
    assert (code, lines) == (0, ["1: warning: bundle.path: this bundle cannot adapt: it only predicts", FINE])
    assert here(say, 'bundle.path = "toy.edgeadapt"\nadapt.enabled = false') == (0, [FINE])


def test_here_a_file_that_is_no_bundle(say, place):
    (place / "b").write_bytes(b"nothing")
    code, lines = here(say, 'bundle.path = "b"')
    assert code == 9
    assert lines[0].startswith("1: bundle.path: ")


def test_here_files_of_secrets(say, place):
    text = '[http]\ntoken_file = "token"\n[mqtt]\nusername = "u"\npassword_file = "password"\ntls = true\nca = "ca"\n[bundle]\nkeys = ["key"]'
    code, lines = here(say, text)
    assert code == 9
    assert [line.partition(f"{place}/")[2] for line in lines] == [f"{name}: no such file or directory" for name in ("token", "password", "ca", "key")]
    for name in ("token", "password", "ca", "key"):
        (place / name).write_bytes(b"x")
        (place / name).chmod(0o644)
    code, lines = here(say, text)
    assert code == 0
    assert lines == [
        f"2: warning: http.token_file: {place}/token holds a secret and can be read by everybody",
        f"5: warning: mqtt.password_file: {place}/password holds a secret and can be read by everybody",
        FINE,
    ]
    on = text.replace("[http]", "[http]\nenabled = true").replace("[mqtt]", '[mqtt]\nenabled = true\nhost = "x"\nport = 8883')
    code, lines = here(say, on)
    assert code == 0, "systemd may hand it over"
    unless = "holds a secret and can be read by everybody: the daemon refuses it, unless systemd hands it a copy"
    assert lines == [f"3: warning: http.token_file: {place}/token {unless}", f"9: warning: mqtt.password_file: {place}/password {unless}", FINE]
    (place / "token").chmod(0o640)
    (place / "password").chmod(0o600)
    none = f"http.token_file: {place}/token holds no token: one line of 16 printable characters or more, without blanks"
    assert here(say, on) == (9, [f"3: {none}"])
    assert here(say, text) == (0, [f"2: warning: {none}", FINE])
    (place / "token").write_bytes(b"x" * 16)
    assert here(say, on) == (0, [FINE])
    assert here(say, text) == (0, [FINE])
    (place / "token").write_bytes(b"")
    (place / "password").unlink()
    (place / "password").mkdir()
    assert here(say, text) == (
        9,
        [
            f"2: http.token_file: {place}/token is empty",
            f"5: mqtt.password_file: {place}/password is no file that this user can read",
        ],
    )


def test_here_folders(say, place, monkeypatch):
    (place / "file").write_bytes(b"")
    text = '[state]\nfolder = "file/state"\n[control]\nsocket = "file/s.sock"\n'
    text += '[metrics]\ntextfile = "file/a.prom"\n[frames]\nkeep = 1\nfolder = "file/f"'
    code, lines = here(say, text)
    assert code == 9
    assert [line.partition(": ")[2].split(":")[0] for line in lines] == ["state.folder", "control.socket", "metrics.textfile", "frames.folder"]
    assert all(line.endswith(f"{place}/file is no folder") for line in lines)
    assert here(say, text.replace('"file', '"new/folder')) == (0, [FINE])
    monkeypatch.setattr(config_here.os, "access", lambda path, mode: False)  # this may run as root
    (place / "there").mkdir()
    code, lines = here(say, '[state]\nfolder = "there"\n[control]\nsocket = "not/s.sock"')
    assert code == 9
    assert lines == [
        f"2: state.folder: {place}/there cannot be written by this user",
        f"4: control.socket: {place}/not is not there and cannot be made in {place} by this user",
    ]


def test_here_sources_that_are_not_there_now(say, place, monkeypatch):
    monkeypatch.setattr(config_here, "find_spec", lambda name: None if name == "cv2" else SimpleNamespace())
    assert here(say, '[source]\ntype = "serial"\nurl = "/dev/absent"')[1] == ["3: warning: source.url: /dev/absent is not there now", FINE]
    assert here(say, '[source]\ntype = "serial"\nurl = "socket://localhost:9"') == (0, [FINE])
    assert here(say, '[source]\ntype = "folder"\npath = "absent"')[1] == [f"3: warning: source.path: {place}/absent is no folder now", FINE]
    assert here(say, '[source]\ntype = "replay"\npath = "absent"') == (9, [f"3: source.path: {place}/absent is not there"])
    assert here(say, '[source]\ntype = "camera"\ndevice = "picamera2:"') == (0, [FINE])
    code, lines = here(say, '[source]\ntype = "camera"\ndevice = 250')
    assert code == 9
    assert lines == [
        "3: source.device: this camera needs the module cv2, which is not installed",
        "3: warning: source.device: /dev/video250 is not there now",
    ]


def test_here_the_group_and_the_processors(say):
    code, lines = here(say, '[control]\ngroup = "no-such-group"\n[predict]\nthreads = 64')
    assert code == 9
    assert lines == [
        "2: control.group: there is no group no-such-group here",
        f"4: warning: predict.threads: 64 threads are more than the {len(os.sched_getaffinity(0))} processors here",
    ]
    assert here(say, '[control]\ngroup = "root"') == (0, [FINE])


def test_the_modules_that_cameras_need_are_called_so():
    """`find_spec` of a name that nothing has would always say that it is missing."""
    from edgeadapt.devices.sources import grabbers

    text = Path(importlib.util.find_spec(grabbers.__name__).origin).read_text(encoding="utf-8")
    assert 'import_module("cv2")' in text
    assert 'import_module("picamera2")' in text
