"""`edgeadapt bench --model`: a bundle a method, made once, and what the model does not fit is left out."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from edgeadapt.bundle import Bundle
from edgeadapt.cli import bench_export
from edgeadapt.cli.main import main
from tests.test_bench_cli import Here

MODEL = """
from torch import nn
import torch

def net():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)]
    return nn.Sequential(*layers).eval()

def plain():
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 4)).eval()
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder, random = tmp_path_factory.mktemp("model"), np.random.default_rng(0)
    (folder / "net.py").write_text(MODEL)
    for name, count in (("train", 160), ("test", 24)):
        np.savez(folder / f"{name}.npz", x=random.integers(0, 256, (count, 8, 8, 3), dtype=np.uint8), y=np.arange(count) % 4)
    return folder


@pytest.fixture
def bench(place, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("edgeadapt.bench.child.Child", Here)

    def call(*arguments: object, model: str = "net") -> tuple[int, str, str]:
        given = ["--model", f"{place / 'net.py'}:{model}", "--input", "3x8x8"]
        given += ["--source", str(place / "train.npz"), "--data", str(place / "test.npz")]
        quick = ["--no-prepared", "--streams", "clean", "--batch", "4", "--output", str(tmp_path / "out")]
        code = main(["bench", *given, *quick, *map(str, arguments)])
        told = capsys.readouterr()
        return code, told.out, told.err

    return call


def test_a_bundle_a_method_is_made_once(bench, tmp_path):
    """A row each; what there is already is not made again, what was damaged or is wanted otherwise is."""
    code, out, err = bench("--methods", "lean,eata,tent", "--setting", "lean.strength=0.3")
    assert code == 0, err
    assert [line.split("  ")[1].strip() for line in out.splitlines() if line.startswith("  ") and "±" in line] == [
        "source", "eata, step 0", "tent, step 0", "lean", "eata", "tent",
    ]  # fmt: skip
    folder = tmp_path / "out" / "bundles"
    files = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.edgeadapt")}
    assert set(files) == {"lean.edgeadapt", "eata.edgeadapt", "tent.edgeadapt"}
    assert Bundle.open(folder / "lean.edgeadapt").manifest.method.options["settings"] == {"strength": 0.3}
    data = bytearray((folder / "tent.edgeadapt").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "tent.edgeadapt").write_bytes(data)
    code, _, err = bench("--methods", "lean,eata,tent")
    assert code == 0, err
    again = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.edgeadapt")}
    assert again["eata.edgeadapt"] == files["eata.edgeadapt"]
    assert again["tent.edgeadapt"] != files["tent.edgeadapt"]
    assert Bundle.open(folder / "lean.edgeadapt").manifest.method.options["settings"] == {"strength": 0.4}


def test_methods_that_do_not_fit_are_left_out(bench, tmp_path):
    code, out, err = bench("--methods", "norm,lean,t3a", model="plain")
    assert code == 0, err
    assert "norm is left out: norm adapts the statistics of batch normalisation, and this model has none" in err
    assert "lean is left out" in err
    assert "t3a" in out
    told = json.loads((tmp_path / "out" / "bundles" / "norm.json").read_text())
    assert "this model has none" in told["left_out"]
    code, _, err = bench("--methods", "norm", model="plain")
    assert code != 0
    assert "none of the methods fits this model" in err


def test_all_is_every_method_but_yardsticks():
    from edgeadapt.exporters.methods import METHODS

    usual = bench_export._usual(METHODS)
    assert set(METHODS) - set(usual) == {"cotta"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--methods", "tant"), "unknown method 'tant'"),
        (("--methods", "tent", "--setting", "lean.strength=1"), "is of a method that is not benched"),
        (("--methods", "lean", "--setting", "strength=1"), "is not METHOD.NAME=VALUE"),
        (("x.edgeadapt",), "bundles are named, and --model would make others"),
        (("--methods", "lean", "--setting", "lean.strength=2"), "strength = '2' is not possible"),
    ],
)
def test_mistakes_are_told(bench, arguments, message):
    code, _, err = bench(*arguments)
    assert code == 2
    assert message in err
    assert "Traceback" not in err


def test_options_of_the_other_way_are_refused(capsys):
    assert main(["bench", "--data", "x.npz"]) == 2
    assert "there is nothing to bench" in capsys.readouterr().err
    assert main(["bench", "x.edgeadapt", "--data", "x.npz", "--epochs", "3"]) == 2
    assert "--epochs says how bundles are made from a model, and there is none" in capsys.readouterr().err
    assert main(["bench", "--model", "net.py:net", "--data", "x.npz"]) == 2
    assert "--model needs the shape of one input" in capsys.readouterr().err
