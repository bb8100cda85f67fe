"""`edgeadapt bench --model`: a bundle a method, made once, and what the model does not fit is left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgeadapt.bundle import Bundle
from edgeadapt.cli import bench_export
from edgeadapt.cli.main import main
from edgeadapt.errors import ExportError
from edgeadapt.exporters import export
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
    code, _, err = bench("--methods", "norm", model="plain")
    assert code != 0
    assert "none of the methods fits this model" in err


def test_what_failed_once_is_tried_again(bench, monkeypatch):
    """The reason may have been a full disk."""
    whole, full = export.export, True

    def fails(*arguments: Any, **options: Any) -> Any:
        if full and options["method"] == "tent":
            raise ExportError("no space is left on the disk")
        return whole(*arguments, **options)

    monkeypatch.setattr(export, "export", fails)
    assert "tent is left out: no space is left" in bench("--methods", "t3a,tent")[2]
    full = False
    code, out, err = bench("--methods", "t3a,tent")
    assert (code, "left out" in err, "\n  tent " in out) == (0, False, True)


def test_fresh_makes_bundles_anew(bench, tmp_path):
    assert bench("--methods", "t3a")[0] == 0
    bundle = tmp_path / "out" / "bundles" / "t3a.edgeadapt"
    before = bundle.stat().st_mtime_ns
    assert bench("--methods", "t3a")[0] == 0
    assert bundle.stat().st_mtime_ns == before
    assert bench("--methods", "t3a", "--fresh")[0] == 0
    assert bundle.stat().st_mtime_ns != before


def test_a_models_key_is_of_its_code_its_tensors_and_torch(tmp_path, monkeypatch):
    file = tmp_path / "other.py"
    file.write_text("one")
    model = torch.nn.Linear(2, 2).bfloat16()

    def digest() -> str:
        return bench_export._model_digest(model, f"{file}:net")

    found = [digest()]
    file.write_text("two")
    found.append(digest())
    with torch.no_grad():
        model.weight += 1
    found.append(digest())
    monkeypatch.setattr(torch, "__version__", "0")
    found.append(digest())
    assert len(set(found)) == 4
    assert found[-1] == digest()
    assert bench_export._model_digest(model, "no.such.module:net") == bench_export._model_digest(model, "__main__.nothing:net")


def test_resizing_is_kept_without_source(place, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("edgeadapt.bench.child.Child", Here)
    given = ["--model", f"{place / 'net.py'}:net", "--input", "3x8x8", "--data", str(place / "test.npz"), "--methods", "norm", "--batch", "4"]
    quick = ["--no-prepared", "--streams", "clean", "--output", str(tmp_path / "out")]
    assert main(["bench", *given, *quick, "--resize", "8x8"]) == 0
    assert Bundle.open(tmp_path / "out" / "bundles" / "norm.edgeadapt").manifest.input.resize == (8, 8)
    assert main(["bench", *given, *quick, "--resize", "9x8"]) == 2
    assert "--resize 9x8 is not the input's size\n  fix: write --resize 8x8" in capsys.readouterr().err


def test_all_is_every_method_but_yardsticks():
    from edgeadapt.exporters.methods import METHODS

    usual = bench_export._usual(METHODS)
    assert set(METHODS) - set(usual) == {"cotta"}
    assert set(usual) - set(METHODS) == {"default"}


def test_default_is_what_an_export_without_a_method_is(bench):
    code, out, err = bench("--methods", "eata,default")
    assert code == 0, err
    assert "default" in out
    folder = Path(out.split("report")[1].split()[0]).parent / "bundles"
    default, eata = (Bundle.open(folder / f"{name}.edgeadapt").manifest for name in ("default", "eata"))
    assert default.method.name == eata.method.name == "eata"
    assert default.method.options["statistics"] == "anchored"
    assert default.searched is not None
    assert eata.searched is None


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
