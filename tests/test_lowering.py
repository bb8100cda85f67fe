"""Every layer family and generated architecture, lowered with its gradients and run in onnxruntime beside torch."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from edgeadapt.errors import ExportError
from edgeadapt.exporters.backbone import Backbone, Normaliser
from edgeadapt.exporters.capture import capture
from edgeadapt.exporters.compile import explain
from edgeadapt.exporters.emit import to_onnx
from edgeadapt.exporters.ir import Graph
from edgeadapt.exporters.lowering import Unsupported
from edgeadapt.exporters.passes.schedule import schedule
from edgeadapt.exporters.passes.simplify import simplify
from edgeadapt.exporters.tracing import declare_inputs, emit, trace
from tests.zoo import generated, layers, named
from tests.zoo.calibrate import calibrate

STANDARD = {""}


def compare(model: nn.Module, x: Tensor) -> dict[str, tuple[float, float]]:
    """Largest difference and largest value of the logits and of each parameter's gradient, onnxruntime against torch's own module."""
    model.eval()
    captured = capture(model, tuple(x.shape[1:]), len(x))
    backbone = Backbone(captured)
    own = dict(model.named_parameters())
    parameters = {name: tensor for name, tensor in captured.tensors.items() if name in own and tensor.is_floating_point()}
    frozen = {name: tensor for name, tensor in captured.tensors.items() if name not in parameters}
    statistics = backbone.source_statistics()
    weight = torch.randn(captured.result.meta["val"].shape, generator=torch.Generator().manual_seed(3))

    def step(given: dict[str, Tensor]) -> dict[str, Tensor]:
        leaves = {name: given[name].detach().requires_grad_() for name in parameters}
        normalise = Normaliser({name: given[name] for name in statistics}, "source")
        logits = backbone.run({**{name: given[name] for name in frozen}, **leaves}, normalise).whole(given["x"])
        loss = (logits.log_softmax(1) * given["weight"]).sum()
        gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        return {"logits": logits.detach(), **{name: value for name, value in zip(leaves, gradients, strict=True) if value is not None}}

    example = {"x": x, "weight": weight, **statistics, **parameters, **frozen}
    graph = Graph("step")
    outputs = emit(trace(step, example), graph, declare_inputs(graph, example, frozen))
    for name, value in outputs.items():
        graph.output(f"out.{name}", value)
    simplify(graph)
    schedule(graph)
    proto = to_onnx(graph)
    assert {node.domain for node in proto.graph.node} == STANDARD
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    feeds = {entry.name: example[entry.name].numpy() for entry in session.get_inputs()}
    got = dict(zip(graph.outputs, session.run(None, feeds), strict=True))

    logits = model(x)
    loss = (logits.log_softmax(1) * weight).sum()
    gradients = torch.autograd.grad(loss, list(own.values()), allow_unused=True)
    want = {"logits": logits.detach(), **{name: value for name, value in zip(own, gradients, strict=True) if value is not None}}
    assert set(want) <= set(outputs)
    return {name: (float(np.abs(got[f"out.{name}"] - value.numpy()).max()), float(value.abs().max())) for name, value in want.items()}


def agree(model: nn.Module, x: Tensor, tolerance: float = 2e-4) -> None:
    found = compare(model, x)
    largest = max(size for name, (_, size) in found.items() if name != "logits")
    for name, (difference, size) in found.items():
        floor = 1e-3 * largest if name != "logits" else 1e-3
        assert difference <= tolerance * max(size, floor), f"{name}: {difference:.2e} of {size:.2e}"


@pytest.mark.parametrize("name", layers.LAYERS)
def test_every_layer_has_torchs_values_and_gradients(name: str) -> None:
    agree(*layers.example(name))


@pytest.mark.parametrize("seed", range(30))
def test_generated_architectures_have_torchs_values_and_gradients(seed: int) -> None:
    model, shape, _ = generated.generate(seed)
    agree(model, torch.randn((2, *shape), generator=torch.Generator().manual_seed(seed)), 1e-3)


@pytest.mark.parametrize(
    ("factory", "shape"),
    [
        (lambda: named.resnet_cifar(20), (3, 32, 32)),
        (lambda: named.wideresnet(16, 1), (3, 32, 32)),
        (lambda: named.mobilenet_v2(classes=10), (3, 64, 64)),
        (lambda: named.resnet18(classes=10), (3, 64, 64)),
        (named.sensor_net, (6, 128)),
        (named.segmentation_net, (3, 32, 32)),
        (named.tiny_vit, (3, 32, 32)),
    ],
)
def test_named_models_have_torchs_values_and_gradients(factory: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    model = factory()
    calibrate(model, shape, 0)
    agree(model, torch.randn((2, *shape), generator=torch.Generator().manual_seed(2)), 1e-3)


class _Determinant(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        matrix = x.mean(1)[:, :4, :4]
        return x.flatten(1)[:, :3] * torch.linalg.det(matrix)[:, None]


class _Hides(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.odd = nn.Conv2d(3, 4, 1), _Determinant()

    def forward(self, x: Tensor) -> Tensor:
        return self.odd(self.conv(x))


def test_an_operator_without_a_form_is_named_with_its_module() -> None:
    captured = capture(_Hides(), (3, 6, 6), 2)
    backbone = Backbone(captured)

    def forward(given: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"logits": backbone.run(captured.tensors, Normaliser({})).whole(given["x"])}

    graph = Graph("odd")
    with pytest.raises(Unsupported) as caught:
        emit(trace(forward, {"x": torch.zeros(2, 3, 6, 6)}), graph, {"x": graph.input("x", (2, 3, 6, 6))})
    error = explain(caught.value, captured, "predict")
    assert isinstance(error, ExportError)
    assert "'odd'" in error.message
    assert "det" in error.message
