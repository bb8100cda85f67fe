"""Factories and weights files: what is accepted, and what a user reads who gives something else."""

from __future__ import annotations

import os
import pickletools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from edgeadapt.errors import EdgeAdaptError, ExportError, InputError, UsageError
from edgeadapt.exporters.load import load_factory, load_weights, one_line, weights_sha256
from tests.zoo.named import resnet_cifar

FACTORIES = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, width=3):
        super().__init__()
        self.body = nn.Linear(width, 2)
    def forward(self, x):
        return self.body(x)

class Narrow(Net):
    def __init__(self, width, *, depth, extra=1, **rest):
        super().__init__(width)

def good():
    return Net().train()

def compiled():
    return torch.compile(nn.DataParallel(Net()))

def states():
    return Net().state_dict()

def number():
    return 3

def broken():
    return helper()

def helper():
    raise ValueError("no such\\ndepth")

def leaves():
    raise SystemExit(4)

def hollow():
    return Net().to("meta")

built = Net()
word = "Net"
class Family:
    @staticmethod
    def small():
        return Net(1)
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A module of factories in the current directory; its name."""
    name = f"factories_{abs(hash(tmp_path)) % 10**8}"
    (tmp_path / f"{name}.py").write_text(FACTORIES, encoding="utf-8")
    known = set(sys.modules)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield name
    for key in set(sys.modules) - known:
        if key.endswith(name) or key.startswith("user_"):
            del sys.modules[key]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.compile meets some of torch's own
@pytest.mark.parametrize("name", ["good", "Net", "built", "compiled", "Family.small"])
@pytest.mark.parametrize("form", ["{}:{}", "{}.py:{}", "./{}.py:{}"])
def test_factories(module: str, name: str, form: str) -> None:
    model = load_factory(form.format(module, name))
    assert type(model).__name__ == "Net"
    assert not model.training
    assert next(iter(model.state_dict())) == "body.weight"


def test_a_file_is_found_from_anywhere_and_finds_what_stands_beside_it(module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "user_beside.py").write_text(f"from {module} import Net\n\ndef factory():\n    return Net(5)\n", encoding="utf-8")
    monkeypatch.chdir("/")
    model = load_factory(f"{tmp_path}/user_beside.py:factory")
    assert model.state_dict()["body.weight"].shape == (2, 5)
    assert type(load_factory(f"{tmp_path}/user_beside.py:factory")) is type(model), "imported once"


def test_a_file_named_like_a_known_module_does_not_replace_it(module: str, tmp_path: Path) -> None:
    import json

    (tmp_path / "json.py").write_text(FACTORIES, encoding="utf-8")
    assert type(load_factory("json.py:good")).__name__ == "Net"
    assert sys.modules["json"] is json
    del sys.modules["edgeadapt_user_json"]


@pytest.mark.parametrize(
    ("text", "kind", "says"),
    [
        ("good", UsageError, "'good' does not name a factory"),
        (":good", UsageError, "write it as package.module:factory"),
        ("nowhere.at.all:good", UsageError, "there is no module 'nowhere'"),
        ("nowhere.py:good", UsageError, "there is no such file"),
        ("{}:godo", UsageError, "did you mean good"),
        ("{}:xyzzy", UsageError, "it has: Net, Narrow, good"),
        ("{}:Family.big", UsageError, "has no 'Family.big'"),
        ("{}:word.upper.x", UsageError, "has no 'word.upper.x'"),
        ("{}:Narrow", UsageError, "needs arguments: width, depth"),
        ("{}:Narrow", UsageError, "def edge(): return Narrow(width=…, depth=…)"),
        ("{}:word", UsageError, "is of type str, not a factory"),
        ("{}:number", ExportError, "gave an object of type int, expected a torch.nn.Module"),
        ("{}:states", ExportError, "give its weights by --weights"),
        ("{}:broken", ExportError, "raised ValueError: no such depth ({}.py:32)"),
        ("{}:leaves", ExportError, "raised SystemExit: 4"),
        ("{}:hollow", ExportError, "body.weight has no values"),
    ],
)
def test_wrong_factories(module: str, text: str, kind: type[EdgeAdaptError], says: str) -> None:
    with pytest.raises(kind) as caught:
        load_factory(text.format(module))
    assert says.replace("{}", module) in str(caught.value)


@pytest.mark.parametrize(
    ("source", "kind", "says"),
    [
        ("import not_a_library_at_all\n", ExportError, "install not_a_library_at_all"),
        ("x = 1\nraise RuntimeError('at import')\n", ExportError, "importing {} failed: RuntimeError: at import (user_bad.py:2)"),
        ("x = 1\ndef broken(:\n", ExportError, "(user_bad.py:2)"),
        ("import sys\nsys.exit('usage: …')\n", ExportError, "SystemExit"),
    ],
)
@pytest.mark.parametrize("form", ["user_bad:f", "user_bad.py:f"])
def test_modules_that_do_not_import(module: str, tmp_path: Path, source: str, kind: type[EdgeAdaptError], says: str, form: str) -> None:
    (tmp_path / "user_bad.py").write_text(source, encoding="utf-8")
    with pytest.raises(kind) as caught:
        load_factory(form)
    assert says.format(form.partition(":")[0]) in str(caught.value)
    assert "\n" not in caught.value.message


def test_an_exception_on_one_line_names_the_deepest_place() -> None:
    with pytest.raises(ValueError, match="cannot reshape") as caught:
        np.zeros(3).reshape(2, 2)
    assert one_line(caught.value).startswith("ValueError: cannot reshape array of size 3")
    assert "(test_load.py:" in one_line(caught.value)
    assert one_line(KeyError("x")) == "KeyError: 'x'"
    assert one_line(MemoryError()) == "MemoryError"


# ------------------------------------------------------------------------------------------------ weights


class Net(nn.Module):
    """Two layers, one normalisation."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, classes)


def trained() -> dict[str, Tensor]:
    torch.manual_seed(3)
    return Net().state_dict()


def save(folder: Path, name: str, value: Any) -> Path:
    path = folder / name
    if name.endswith("safetensors"):
        safetensors.torch.save_file(value, path)
    else:
        torch.save(value, path)
    return path


SHAPES: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "plain": lambda state: state,
    "state_dict": lambda state: {"state_dict": state, "epoch": 7, "optimizer": {"lr": 0.1}},
    "model": lambda state: {"model": state},
    "both": lambda state: {"model": {"state_dict": state}},
    "module.": lambda state: {f"module.{name}": value for name, value in state.items()},
    "lightning": lambda state: {"state_dict": {f"model._orig_mod.{name}": value for name, value in state.items()}},
    "no counters": lambda state: {name: value for name, value in state.items() if "tracked" not in name},
    "a number beside": lambda state: {**state, "epoch": 3},
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("ending", ["pt", "pth", "bin", "ckpt", "safetensors"])
def test_weights_in_every_wrapping(tmp_path: Path, shape: str, ending: str) -> None:
    state, model = trained(), Net()
    value = SHAPES[shape](state)
    if ending == "safetensors" and not all(isinstance(entry, Tensor) for entry in value.values()):
        value = state
    digest = load_weights(model, save(tmp_path, f"w.{ending}", value))
    assert all(torch.equal(model.state_dict()[name], entry) for name, entry in state.items())
    assert digest == weights_sha256(model) != weights_sha256(Net())


def test_the_hash_is_of_the_tensors_not_of_the_file(tmp_path: Path) -> None:
    state = trained()
    files = [
        save(tmp_path, "a.pt", state),
        save(tmp_path, "b.safetensors", state),
        save(tmp_path, "c.pt", {"module." + k: v for k, v in state.items()}),
    ]
    assert len({load_weights(Net(), path) for path in files}) == 1
    state["fc.bias"][0] += 1e-6
    assert load_weights(Net(), save(tmp_path, "d.pt", state)) != load_weights(Net(), files[0])


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floats_become_float32_in_the_model_too(tmp_path: Path, kind: torch.dtype) -> None:
    state = {name: value.to(kind) if value.is_floating_point() else value for name, value in trained().items()}
    model = Net().to(kind)
    load_weights(model, save(tmp_path, "w.safetensors", state))
    assert {value.dtype for value in model.parameters()} == {torch.float32}
    assert torch.equal(model.fc.weight, state["fc.weight"].float())


def test_tied_weights_may_be_stored_once(tmp_path: Path) -> None:
    def tied() -> nn.Module:
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        model[1].weight = model[0].weight
        return model

    first, second = tied(), tied()
    path = tmp_path / "w.safetensors"
    safetensors.torch.save_model(first, str(path))
    load_weights(second, path)
    assert torch.equal(second[1].weight, first[0].weight)


class Runs:
    """What a malicious file holds."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_file_with_code_is_refused_and_never_run(tmp_path: Path, legacy: bool) -> None:
    mark = tmp_path / "ran"
    torch.save({"fc.bias": Runs(mark)}, tmp_path / "w.pt", _use_new_zipfile_serialization=not legacy)
    assert b"mkdir" in (tmp_path / "w.pt").read_bytes(), "or this test shows nothing"
    with pytest.raises(InputError, match=r"would run (posix|nt)\.mkdir, which edgeadapt never does") as caught:
        load_weights(Net(), tmp_path / "w.pt")
    assert "torch.save(model.state_dict()" in caught.value.hint
    assert not mark.exists()


def test_a_bare_pickle_is_refused_and_never_run(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    code = b"cos\nmkdir\n(V" + str(mark).encode() + b"\ntR."
    assert sum(1 for _ in pickletools.genops(code)) == 6
    (tmp_path / "w.bin").write_bytes(code)
    with pytest.raises(InputError, match=r"w\.bin"):
        load_weights(Net(), tmp_path / "w.bin")
    assert not mark.exists()


def test_a_whole_pickled_model_is_refused_with_the_way_to_convert_it(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"would run torch\.nn\.modules\.linear\.Linear") as caught:
        load_weights(Net(), save(tmp_path, "w.pt", nn.Linear(2, 2)))
    assert "save the tensors alone" in caught.value.hint


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_torchscript_archive_is_refused(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), str(tmp_path / "w.pt"))
    with pytest.raises(InputError, match="TorchScript"):
        load_weights(Net(), tmp_path / "w.pt")


@pytest.mark.parametrize("ending", ["pt", "safetensors"])
@pytest.mark.parametrize("keep", [0, 5, 100, 0.5, 0.99])
def test_damaged_files(tmp_path: Path, ending: str, keep: float) -> None:
    path = save(tmp_path, f"w.{ending}", trained())
    whole = path.read_bytes()
    path.write_bytes(whole[: int(keep * len(whole)) if isinstance(keep, float) else keep])
    with pytest.raises(InputError, match=rf"w\.{ending}") as caught:
        load_weights(Net(), path)
    assert "copy it again" in caught.value.hint


@pytest.mark.parametrize(
    ("name", "says"), [("missing.pt", "there is no such file"), ("folder.pt", "is a folder"), ("w.onnx", "not .onnx"), ("w", "one without an ending")]
)
def test_no_weights_file(tmp_path: Path, name: str, says: str) -> None:
    if name == "folder.pt":
        (tmp_path / name).mkdir()
    elif name != "missing.pt":
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(InputError, match=says):
        load_weights(Net(), tmp_path / name)


@pytest.mark.parametrize(
    ("value", "says"), [([1, 2], "of type list"), (torch.zeros(3), "of type Tensor"), ({"lr": 3}, "only 'lr'"), ({}, "only nothing")]
)
def test_no_state_dict(tmp_path: Path, value: Any, says: str) -> None:
    with pytest.raises(InputError, match=says):
        load_weights(Net(), save(tmp_path, "w.pt", value))


def test_keys_that_do_not_fit_are_named_and_counted(tmp_path: Path) -> None:
    state = trained()
    del state["conv.bias"], state["bn.running_var"]
    state |= {f"extra.{k}": torch.zeros(1) for k in range(6)} | {"fc.weight": torch.zeros(10, 8), "fc.bias": torch.zeros(10)}
    with pytest.raises(InputError) as caught:
        load_weights(Net(), save(tmp_path, "w.safetensors", state))
    message = caught.value.message
    assert "2 of the model's 9 tensors are missing (conv.bias, bn.running_var)" in message
    assert "6 in the file are unknown to the model (extra.0, extra.1, extra.2, extra.3, …)" in message
    assert "2 have another shape" in message
    assert "fc.weight: 10x8 in the file, 4x8 in the model" in message
    assert "number of classes" in caught.value.hint


def test_another_architecture(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        load_weights(Net(), save(tmp_path, "w.pt", nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).state_dict()))
    assert "its names differ: '0.weight' there, 'conv.weight' here" in caught.value.hint


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(tmp_path: Path, value: float) -> None:
    state = trained()
    state["fc.weight"][1, 2:4] = value
    with pytest.raises(InputError, match=r"fc\.weight holds 2 values"):
        load_weights(Net(), save(tmp_path, "w.pt", state))


@pytest.mark.data
def test_weights_of_the_data_pack(data_pack: Path) -> None:
    model = resnet_cifar()
    digest = load_weights(model, data_pack / "weights" / "resnet20_cifar10.safetensors")
    assert digest == weights_sha256(model)
    assert not torch.equal(model.state_dict()["conv1.weight"], resnet_cifar().state_dict()["conv1.weight"])
