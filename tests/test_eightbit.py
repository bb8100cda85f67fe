"""Sums of products of bytes where the processor saturates them: they are exact in what the exporter runs, and the device says that they are not."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgeadapt.exporters import execution
from edgeadapt.runtime import eightbit, session
from edgeadapt.runtime.adapter import Adapter
from tests.int8toy import Int8Toy

CHANNELS, OUTPUTS = 32, 3
RANDOM = np.random.default_rng(0)


def test_the_probe_is_what_it_is_said_to_be() -> None:
    one, channels, zero = np.float32(1), eightbit.CHANNELS, np.uint8(0)
    weight = np.full((1, channels, 1, 1), eightbit.LARGEST, np.int8)
    given = {"xs": one, "xz": zero, "w": weight, "ws": one, "wz": np.int8(0), "ys": np.float32(eightbit.SCALE), "yz": zero}
    node = helper.make_node("QLinearConv", ["x", *given], ["y"])
    shapes = (helper.make_tensor_value_info(name, TensorProto.UINT8, [1, size, 1, 1]) for name, size in (("x", channels), ("y", 1)))
    known = [numpy_helper.from_array(np.asarray(value), name) for name, value in given.items()]
    graph = helper.make_graph([node], "sum", [next(shapes)], [next(shapes)], known)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    assert onnx.load_from_string(eightbit.PROBE) == model


@pytest.mark.parametrize("where", ["inside", "outside", "given"])
def test_sums_are_exact_in_what_the_exporter_runs(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of weights that lie in the graph, outside of it or are given to it; two convolutions share theirs."""
    monkeypatch.setattr(execution, "saturates", lambda: True)
    x = RANDOM.integers(0, 256, (1, CHANNELS, 4, 4), np.uint8)
    weight = RANDOM.choice(np.asarray([-128, -127, 100, 127], np.int8), (OUTPUTS, CHANNELS, 1, 1))
    x[:, ::2], weight[:, ::4] = 255, 127
    constants: dict[str, Any] = {"one": np.float32(1), "zero": np.uint8(0), "nothing": np.int8(0), "step": np.float32(8192), "middle": np.uint8(128)}
    constants |= {} if where == "given" else {"weight": weight}
    names = ["x", "one", "zero", "weight", "one", "nothing", "step", "middle"]
    nodes = [helper.make_node("QLinearConv", names, [name]) for name in "yz"]
    inputs = [helper.make_tensor_value_info("x", TensorProto.UINT8, x.shape)]
    inputs += [helper.make_tensor_value_info("weight", TensorProto.INT8, weight.shape)] if where == "given" else []
    outputs = [helper.make_tensor_value_info(name, TensorProto.UINT8, None) for name in "yz"]
    kept = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    if where == "outside":
        kept[-1] = TensorProto(name="weight", data_type=TensorProto.INT8, dims=weight.shape, data_location=TensorProto.EXTERNAL)
        for key, text in (("location", "weights"), ("offset", "0"), ("length", str(weight.nbytes))):
            kept[-1].external_data.add(key=key, value=text)
    model = helper.make_model(helper.make_graph(nodes, "g", inputs, outputs, kept), opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    before = model.SerializeToString()
    opened = execution.open_session(model, {"weight": weight}, threads=1)
    found = opened.run(None, {"x": x, **({"weight": weight} if where == "given" else {})})
    total = np.einsum("nchw,oc->nohw", x.astype(np.int64), weight[..., 0, 0].astype(np.int64))
    wanted = np.clip(np.rint(total.astype(np.float32) / np.float32(8192)) + 128, 0, 255)
    assert len(np.unique(wanted)) > 4
    assert all((item == wanted).all() for item in found)
    assert model.SerializeToString() == before


def test_the_device_says_once_that_some_answers_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(session, "saturates", lambda: True)
    path = tmp_path / "a: graph b.edgeadapt"
    Int8Toy().write(path)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            Adapter.open(path).close()
    told = [record.getMessage() for record in caplog.records if "end at 16 bits" in record.getMessage()]
    assert len(told) == 1
    assert told[0].startswith(f"{path} computes in 8 bits")


def test_of_a_processor_that_adds_as_it_should_nothing_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(session, "saturates", lambda: False)
    path = tmp_path / "m.edgeadapt"
    Int8Toy().write(path)
    with caplog.at_level(logging.WARNING):
        Adapter.open(path).close()
    assert not [record for record in caplog.records if "16 bits" in record.getMessage()]
