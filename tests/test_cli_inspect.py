"""`edgeadapt inspect`, and what all commands share: help, version, errors, exit codes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import edgeadapt
from edgeadapt.bundle import Bundle, Task
from edgeadapt.bundle.checked import unchecked_lines, unchecked_of
from edgeadapt.cli import inspect, main
from edgeadapt.errors import BudgetError, UsageError
from tests.toybundle import Toy

pytestmark = pytest.mark.device


@pytest.fixture(scope="module")
def toy() -> Toy:
    return Toy()


@pytest.fixture(scope="module")
def path(toy, tmp_path_factory) -> Path:
    check = {"adapt.b4": {"logits": 1.25e-6}}
    warmup = {"epochs": 3, "losses": [0.5] * 20}
    return toy.write(tmp_path_factory.mktemp("toy") / "toy.edgeadapt", selfcheck=check, warmup=warmup)


def test_what_the_self_check_could_not_check_is_told(toy, tmp_path, capsys):
    """A line for graphs that share it; the names stand in the JSON."""
    check = {"adapt.b4": {"unchecked": ["norm.gamma"]}, "learn.b4": {"unchecked": ["norm.gamma"]}, "predict.b4": {"logits": 0.0}, "left": "x"}
    path = toy.write(tmp_path / "toy.edgeadapt", selfcheck=check)
    assert main.main(["inspect", str(path)]) == 0
    told = [line for line in capsys.readouterr().out.splitlines() if "not checked" in line]
    assert told == ["  not checked in adapt.b4, learn.b4: the update of norm.gamma, which hangs on rounding in PyTorch too"]
    assert unchecked_of(Bundle.open(path).manifest.selfcheck) == {"adapt.b4": ("norm.gamma",), "learn.b4": ("norm.gamma",)}
    many = unchecked_lines({"a": {"unchecked": list("pqrs")}, "b": {"unchecked": list("pqrst")}})
    assert ["the update of p, q, r and 1 more tensor," in many[0], "p, q, r and 2 more tensors," in many[1]] == [True, True]


def test_the_summary_has_everything(path, capsys):
    assert main.main(["inspect", str(path)]) == 0
    text = capsys.readouterr().out
    bundle = Bundle.open(path)
    for part in (
        "tests.toybundle:Toy, 832 parameters",
        "classification, 5 classes (class 0, class 1",
        "float32 3x6x6; pictures: resized to 6 x 6, divided by 255, less 0.5 0.4 0.3, over 0.2 0.25 0.3",
        "toy: scale and shift by entropy (K=1)",
        "live: follow the stream (layers: 1)",
        bundle.digest,
        "conv0         stem        8x6x6   1,000         16",
        "adapt.b4.logits                          1.25e-06",
        "losses                                   20 values",
        "learning rate",
        "opset 20",
    ):
        assert part in text, part
    rows = {line.split()[0]: line.split() for line in text.splitlines() if line.startswith("  ")}
    assert rows["rate"][1] == "0.05"
    assert rows["parameters"][1:] == ["3", "84", "B", "84"]
    assert rows["all"][1] == "7"
    assert rows["weights.bin"][-1] == f"{bundle.manifest.members['weights.bin'].size:,}"
    graph = bundle.manifest.graphs["learn.b4"]
    assert rows["learn.b4"][1:5] == ["learn", "4", str(graph.nodes), "18"]
    assert all(line == line.rstrip() for line in text.splitlines())


def test_json_is_the_manifest_with_digest_and_size(path, capsys):
    assert main.main(["inspect", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    bundle = Bundle.open(path)
    assert found == {**bundle.manifest.to_json(), "path": str(path), "digest": bundle.digest, "file_bytes": path.stat().st_size}


def test_a_bundle_without_names_parts_or_scalars(toy, tmp_path):
    bare = Toy(method="source")
    plain = replace(toy.manifest().input, resize=None, mean=None)
    path = bare.write(tmp_path / "bare.edgeadapt", task=Task("classification", 5), partition=(), input=plain)
    text = inspect.summary(Bundle.open(path))
    assert "5 classes\n" in text
    assert "of 6 x 6, divided by 255, over" in text
    assert "partition" not in text


def test_a_damaged_bundle_is_an_error_with_its_code_and_no_traceback(path, tmp_path, capsys):
    data = bytearray(path.read_bytes())
    data[5000] ^= 1
    damaged = tmp_path / "damaged.edgeadapt"
    damaged.write_bytes(data)
    assert main.main(["inspect", str(damaged)]) == 4
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("edgeadapt: error: ")
    assert "weights.bin is damaged" in told.err
    assert "\n  fix: copy or export the bundle again\n" in told.err
    assert main.main(["inspect", str(damaged), "--no-verify"]) == 0


@pytest.mark.parametrize(("text", "code"), [("", 2), ("nonsense", 2), ("inspect", 2), ("--help", 0), ("inspect --help", 0), ("--version", 0)])
def test_usage(text, code, capsys):
    with pytest.raises(SystemExit) as ended:
        main.main(text.split())
    assert ended.value.code == code
    told = capsys.readouterr()
    assert "edgeadapt" in (told.err if code else told.out)


def test_help_lists_every_command_and_each_has_an_example(capsys):
    with pytest.raises(SystemExit):
        main.main(["--help"])
    overview = capsys.readouterr().out
    for name in main.COMMANDS:
        with pytest.raises(SystemExit):
            main.main([name, "--help"])
        assert f"\n  edgeadapt {name} " in capsys.readouterr().out
        assert re.search(rf"^    {name}\s", overview, re.MULTILINE)  # argparse gives the help of longer names a line of its own


@pytest.mark.parametrize(
    ("raised", "code", "told"),
    [
        (UsageError("wrong", "mend"), 2, "edgeadapt: error: wrong\n  fix: mend\n"),
        (BudgetError("full"), 5, "edgeadapt: error: full\n"),
        (KeyboardInterrupt(), 130, "edgeadapt: interrupted\n"),
    ],
)
def test_errors_become_exit_codes(raised, code, told, monkeypatch, capsys):
    def run(arguments):
        raise raised

    monkeypatch.setattr(inspect, "run", run)
    assert main.main(["inspect", "x"]) == code
    assert capsys.readouterr().err == told


def test_a_defect_of_ours_shows_its_traceback(monkeypatch):
    monkeypatch.setattr(inspect, "run", lambda arguments: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        main.main(["inspect", "x"])


def started(*arguments: str) -> str:
    return subprocess.run([sys.executable, "-m", "edgeadapt", *arguments], capture_output=True, text=True, check=True).stdout


def test_the_module_is_the_command_line():
    assert started("--version") == f"edgeadapt {edgeadapt.__version__}\n"


def test_a_reader_that_goes_away_ends_us_quietly(path):
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "edgeadapt", "inspect", str(path), "--json"]
    ended = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (ended.returncode, ended.stderr) == (main.PIPE_CLOSED, "")


def test_a_command_loads_only_what_it_uses(path):
    heavy = "{'torch', 'onnx', 'onnxruntime', 'PIL'}"
    code = f"import sys; from edgeadapt.cli.main import main; main(sys.argv[1:]); print(sorted({heavy} & {{*sys.modules}}))"
    ended = subprocess.run([sys.executable, "-c", code, "inspect", str(path)], capture_output=True, text=True, check=True)
    assert ended.stdout.splitlines()[-1] == "[]"
