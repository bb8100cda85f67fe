"""`edgeadapt export` from the shell: what reaches the exporter, what is printed where, and the exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from edgeadapt.bundle import Bundle
from edgeadapt.bundle.inputspec import InputSpec
from edgeadapt.cli import export as command
from edgeadapt.cli.main import main
from edgeadapt.errors import ExportError
from edgeadapt.exporters.data import Samples
from tests.workplace import workplace
from tests.zoo.data import blobs
from tests.zoo.named import resnet_cifar

MODELS = """
from tests.zoo.calibrate import calibrate
from tests.zoo.named import resnet_cifar, tiny_vit

def tiny():
    return calibrate(resnet_cifar(8, classes=4), (3, 16, 16))

def broken():
    raise OSError("no disk")
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current directory with a model and data."""
    return workplace(tmp_path, monkeypatch, "user_models", MODELS, *blobs(96, 16))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Calls that would have reached the exporter."""
    seen: list[dict[str, Any]] = []

    def fake(model: Any, output: Path, *, progress: Any, **options: Any) -> Any:
        seen.append({"model": model, "output": output, **options})
        progress("warm-up", 1, 2, "loss 3")
        return SimpleNamespace(path=output, manifest={"format": 1, "method": {"name": "ecotta"}}, size=2048, plan=None, table=lambda: "THE TABLE")

    monkeypatch.setattr("edgeadapt.exporters.export.export", fake)
    return seen


def export(*words: str, model: str = "user_models.py:tiny", shape: str = "3x16x16") -> int:
    return main(["export", model, "--input", shape, *words])


# ------------------------------------------------------------------------------------------------ the whole way


def test_a_model_is_exported_and_can_be_opened(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"state_dict": resnet_cifar(8, classes=4, seed=1).state_dict()}, here / "w.pt")
    options = ["--weights", "w.pt", "--mean", "0.5", "--std", "0.25,0.25,0.3"]
    options += ["--method", "ecotta", "--parts", "2", "--epochs", "1", "--warmup-batch", "16"]
    code = export("--data", "train.npz", "--batch", "4", "--names", "a,b,c,d", "--allow-drop", *options, "-o", "net.edgeadapt")
    output = capsys.readouterr()
    assert code == 0, output.err
    manifest = Bundle.open("net.edgeadapt").manifest
    assert manifest.model.name == "user_models.py:tiny"
    assert manifest.task.names == tuple("abcd")
    assert manifest.input == InputSpec((3, 16, 16), None, (0.5, 0.5, 0.5), (0.25, 0.25, 0.3))
    assert manifest.batches == (1, 4)
    assert manifest.warmup is not None
    assert manifest.warmup["epochs"] == 1
    assert "wrote net.edgeadapt" in output.out
    assert "ecotta" in output.out
    assert "warm-up: 100%" in output.err
    assert "data: 96 images 16x16x3 uint8, of 4 classes, from train.npz" in output.err


def test_a_warm_up_that_costs_accuracy_is_refused_and_nothing_is_written(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measured = iter([0.9, 0.5])
    monkeypatch.setattr("edgeadapt.exporters.training.Training._agreement", lambda *arguments: next(measured))
    (here / "net.edgeadapt").write_bytes(b"old")
    words = ["--method", "ecotta", "--parts", "1", "--epochs", "0", "--batch", "4", "--warmup-batch", "16"]
    code = export("--data", "train.npz", *words, "-o", "net.edgeadapt", "--quiet")
    output = capsys.readouterr()
    assert code == ExportError.exit_code
    assert "costs 40.0 points of clean accuracy" in output.err
    assert (here / "net.edgeadapt").read_bytes() == b"old"
    assert [path.name for path in here.iterdir() if path.name.startswith(".")] == []


# ------------------------------------------------------------------------------------------------ options


def test_only_what_is_given_is_passed_on(calls: list[dict[str, Any]]) -> None:
    assert export("--data", "train.npz", "-o", "net.edgeadapt") == 0
    call = calls[0]
    assert set(call) == {"model", "output", "shape", "data", "names", "model_name", "exact", "allow_drop"}
    assert call["shape"] == (3, 16, 16)
    assert isinstance(call["data"], Samples)
    assert (call["names"], call["exact"], call["allow_drop"]) == (None, False, False)


def test_every_option_reaches_the_exporter(calls: list[dict[str, Any]]) -> None:
    words = (
        "--method side --parts 3 --cuts relu,layer1 --kernel 3 --width 32 --batch 4,16 --batch 8 --statistics live --exact-gradient --optimiser adam"
        " --rate 0.001 --epochs 3 --warmup-rate 0.02 --warmup-batch 32 --holdout 0.2 --max-drop 1.5 --allow-drop --seed 7 --threads 1"
        " --task classification --classes 4 --resize 16x16 --samples 40"
    )
    assert export("--data", "train.npz", "-o", "net.edgeadapt", *words.split()) == 0
    call = calls[0]
    want = {"method": "side", "parts": 3, "cuts": ("relu", "layer1"), "kernel": 3, "width": 32, "batches": (4, 8, 16), "statistics": "live"}
    want |= {"exact": True, "optimiser": "adam", "rate": 0.001, "epochs": 3, "warmup_rate": 0.02, "warmup_batch": 32, "holdout": 0.2}
    want |= {"max_drop": 1.5, "allow_drop": True, "seed": 7, "threads": 1, "task": "classification"}
    assert {name: call[name] for name in want} == want
    assert len(call["data"]) == 40
    assert call["data"].spec.resize == (16, 16)


@pytest.mark.parametrize(("text", "wanted"), [("none", "none"), ("auto", "auto"), ("1,4", (1, 4))])
def test_micro_batches_reach_the_exporter(calls, text: str, wanted: Any) -> None:
    assert export("--micro", text, "-o", "net.edgeadapt") == 0
    assert calls[0]["micro"] == wanted


def test_micro_batches_that_are_none_are_refused(capsys) -> None:
    with pytest.raises(SystemExit):
        export("--micro", "some", "-o", "net.edgeadapt")
    assert "--micro" in capsys.readouterr().err


def test_every_option_exists_at_the_exporter() -> None:
    import dataclasses

    from edgeadapt.exporters.options import Options

    assert {*command.CHOICES, "batches", "exact", "allow_drop", "settings"} == {field.name for field in dataclasses.fields(Options)}


def test_without_labels_and_without_data(calls: list[dict[str, Any]]) -> None:
    assert export("--data", "train.npz", "--unlabelled", "-o", "net.edgeadapt") == 0
    assert calls[0]["data"].y is None
    assert export("--method", "norm", "-o", "net.edgeadapt") == 0
    assert calls[1]["data"] is None


def test_the_folder_of_a_file_stays_private(calls: list[dict[str, Any]], here: Path) -> None:
    assert export("-o", "net.edgeadapt", model=f"{here}/user_models.py:tiny") == 0
    assert calls[0]["model_name"] == "user_models.py:tiny"


def test_what_is_printed_where(calls: list[dict[str, Any]], here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export("--data", "train.npz", "-o", "net.edgeadapt")
    output = capsys.readouterr()
    assert output.out == "THE TABLE\n\nwrote net.edgeadapt (2 KiB)\n"
    assert "warm-up: 50%" in output.err
    (here / "net.edgeadapt").write_bytes(b"old")
    export("--data", "train.npz", "-o", "net.edgeadapt", "--json")
    output = capsys.readouterr()
    assert json.loads(output.out) == {"path": "net.edgeadapt", "file_bytes": 2048, "format": 1, "method": {"name": "ecotta"}}
    assert "net.edgeadapt exists; it stays until the new bundle is whole" in output.err
    export("--data", "train.npz", "-o", "net.edgeadapt", "--quiet")
    assert capsys.readouterr().err == ""


# ------------------------------------------------------------------------------------------------ cuts


def test_places_to_cut_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert export("--list-cuts", "--parts", "2") == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [row[1] for row in rows] == ["16x16x16", "16x16x16", "32x8x8", "64x4x4"]
    assert [row[2:] for row in rows] == [["stem"], ["part", "1"], [], ["part", "2"]]
    names = [row[0] for row in rows]
    assert export("--list-cuts", "--cuts", f"{names[1]},{names[2]}", "--json") == 0
    listed = json.loads(capsys.readouterr().out)
    assert [entry["ends"] for entry in listed] == ["", "stem", "part 1", ""]
    assert listed[2] == {"name": names[2], "shape": [32, 8, 8], "ends": "part 1"}
    assert export("--list-cuts", "--cuts", "layer9") == ExportError.exit_code


# ------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        ("", 2, "the bundle's path is missing"),
        ("-o nowhere/net.edgeadapt", 2, "mkdir -p nowhere"),
        ("-o .", 2, "is a folder"),
        ("-o n.edgeadapt --data train.npz --mean 0.5,0.5", 2, "--mean has 2 numbers for 3 channels"),
        ("-o n.edgeadapt --data train.npz --resize 32x32", 2, "write --resize 16x16"),
        ("-o n.edgeadapt --data train.npz --classes 10", 2, "so 4 classes, not 10"),
        ("-o n.edgeadapt --data train.npz --names a,b", 2, "--names gives 2 names, and the model has 4 classes"),
        ("-o n.edgeadapt --mean 0.5", 2, "give it with --data"),
        ("-o n.edgeadapt --data nowhere.npz", 3, "there is no such file"),
        ("-o n.edgeadapt --data train.npz --weights nowhere.pt", 3, "there is no such file"),
        ("-o n.edgeadapt --data train.npz --method magic", 2, "method = 'magic' is not known"),
        ("-o n.edgeadapt", 8, "give training samples with --data"),
        ("-o n.edgeadapt --data train.npz --task segmentation", 8, "no logits for segmentation"),
        ("-o n.edgeadapt --method side", 8, "side is calibrated on source data"),
        ("-o n.edgeadapt --method tent --cuts layer1", 2, "tent has no use for cuts"),
        ("-o n.edgeadapt --method tent --rate nan", 2, "rate = nan is no learning rate"),
        ("-o n.edgeadapt --method norm --threads -1", 2, "threads = -1 is too small"),
    ],
)
def test_errors_and_their_exit_codes(words: str, code: int, says: str, capsys: pytest.CaptureFixture[str], here: Path) -> None:
    assert export(*words.split()) == code
    output = capsys.readouterr()
    assert says in output.err
    assert "\n  fix: " in output.err
    assert output.out == ""
    assert not (here / "n.edgeadapt").exists()


@pytest.mark.parametrize(
    ("model", "code", "says"),
    [
        ("user_models.py:broken", 8, "OSError: no disk (user_models.py:9)"),
        ("user_models.py:tini", 2, "did you mean tiny"),
        ("nowhere:f", 2, "no module 'nowhere'"),
    ],
)
def test_errors_of_the_factory(model: str, code: int, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert export("-o", "n.edgeadapt", model=model) == code
    assert says in capsys.readouterr().err


def test_an_input_that_the_model_does_not_take(capsys: pytest.CaptureFixture[str]) -> None:
    assert export("-o", "n.edgeadapt", "--method", "norm", shape="4x16x16") == ExportError.exit_code
    assert "torch.export cannot trace" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        "--batch 4x",
        "--batch 0",
        "--batch ,",
        "--names a,,b",
        "--names a,a",
        "--mean 0.5,x",
        "--parts 0",
        "--samples -3",
        "--kernel 2",
        "--rate fast",
        "--input 3y3",
    ],
)
def test_options_that_cannot_be_read(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = export("-o", "n.edgeadapt", *words.split())
    except SystemExit as stop:  # argparse's own way
        code = int(stop.code or 0)
    assert code == 2
    error = capsys.readouterr().err.splitlines()[-2:]
    assert any(word in line for word in words.split() for line in error)


def test_without_torch_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(command, "find_spec", lambda name: None if name in ("torch", "PIL") else object())
    assert export("-o", "n.edgeadapt") == ExportError.exit_code
    error = capsys.readouterr().err
    assert "exporting needs PyTorch, Pillow, not installed here" in error
    assert "pip install edgeadapt[export]" in error


def test_help_does_not_load_torch() -> None:
    code = (
        "import sys; from edgeadapt.cli.main import main\ntry: main(['export', '--help'])\nexcept SystemExit: pass\nassert 'torch' not in sys.modules"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for word in ("--list-cuts", "MODULE:FACTORY", "--exact-gradient", "edgeadapt export models:resnet20"):
        assert word in run.stdout
