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
from edgeadapt.exporters.compile import PlacedWeights, compile_program, explain, named_refusals
from edgeadapt.exporters.emit import to_onnx
from edgeadapt.exporters.execution import open_session
from edgeadapt.exporters.ir import OPSET, Graph
from edgeadapt.exporters.lowering import Missing, Unsupported, registry
from edgeadapt.exporters.methods import METHODS, Setup
from edgeadapt.exporters.passes.simplify import simplify
from edgeadapt.exporters.programs import Model, Program, build
from edgeadapt.exporters.tracing import declare_inputs, emit, trace
from edgeadapt.memory import best_order, read
from edgeadapt.memory.cuda import lacking
from edgeadapt.memory.rules import uncounted
from tests.zoo import generated, layers, named
from tests.zoo.calibrate import calibrate

STANDARD = {""}
CPU_ONLY = {"Acos", "Asin", "Asinh", "Atan", "Atanh", "BitwiseAnd", "Cosh", "ReduceProd of int64", "Sinh"}
"""What of the zoo's graphs onnxruntime's CUDA provider has no kernel for: graphs with these are not for a GPU, all others are."""


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
    graph.nodes = [graph.nodes[index] for index in best_order(graph)]
    proto = to_onnx(graph)
    assert {node.domain for node in proto.graph.node} == STANDARD
    told = read(proto.SerializeToString())
    assert uncounted(told) == []
    assert set(lacking(told, OPSET)) <= CPU_ONLY
    session = open_session(proto, threads=1)
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


def lowered(function: Callable[[Tensor], Tensor], x: Tensor) -> np.ndarray:
    graph = Graph("one")
    traced = trace(lambda given: {"y": function(given["x"])}, {"x": x})
    graph.output("y", emit(traced, graph, {"x": graph.input("x", tuple(x.shape))})["y"])
    session = onnxruntime.InferenceSession(to_onnx(graph).SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": x.numpy()})[0])


WIDE = torch.tensor(
    [-120.0, -30, -20, -17, -3, -0.9, -0.5, -0.1, -1e-3, -1e-6, -1e-9, 0.0, 1e-9, 1e-7, 1e-4, 0.1, 0.49, 0.51, 2, 5, 10, 16, 20, 60, 85, 120]
)


@pytest.mark.parametrize(
    ("function", "relative", "absolute"),
    [
        (torch.expm1, 2e-6, 0),
        (lambda x: torch.log1p(x.abs() * x.sign().clamp(min=-0.0) - 0.9 * (x < -1)), 2e-6, 0),
        (lambda x: torch.log1p(x / 130), 2e-6, 0),
        (torch.nn.functional.softplus, 2e-6, 2e-7),
        (torch.nn.functional.mish, 2e-6, 5e-6),
        (torch.nn.functional.logsigmoid, 2e-6, 2e-7),
    ],
)
def test_exponentials_and_logarithms_hold_over_the_whole_range(function: Callable[[Tensor], Tensor], relative: float, absolute: float) -> None:
    np.testing.assert_allclose(lowered(function, WIDE), function(WIDE).numpy(), rtol=relative, atol=absolute)


def test_infinities_and_minus_one_pass_through_logarithms_and_exponentials() -> None:
    x = torch.tensor([-1.0, float("inf"), float("nan")])
    np.testing.assert_array_equal(lowered(torch.log1p, x), [-np.inf, np.inf, np.nan])
    np.testing.assert_array_equal(lowered(torch.expm1, torch.tensor([-float("inf"), float("inf")])), [-1, np.inf])


@pytest.mark.parametrize("divisor", [0.1, -0.1, 0.3, 1.0, 7.0])
def test_a_floored_division_goes_by_the_exact_remainder(divisor: float) -> None:
    x = torch.cat([torch.linspace(-3, 3, 61), torch.tensor([1e6, -1e6])])
    for function in (
        lambda v: torch.div(v, divisor, rounding_mode="floor"),
        lambda v: torch.div(v, divisor, rounding_mode="trunc"),
        lambda v: v % divisor,
    ):
        np.testing.assert_array_equal(lowered(function, x), function(x).numpy())


def test_a_division_by_zero_is_infinite_when_floored() -> None:
    x = torch.tensor([1.0, -2.0])
    np.testing.assert_array_equal(
        lowered(lambda v: torch.div(v, v * 0, rounding_mode="floor"), x), torch.div(x, x * 0, rounding_mode="floor").numpy()
    )


class _Layer(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class _Around(nn.Module):
    def __init__(self, odd: nn.Module) -> None:
        super().__init__()
        self.conv, self.norm, self.odd, self.head = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), odd, nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.odd(self.norm(self.conv(x))).mean((2, 3)))


class _Itself(_Around):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.odd.function(self.norm(self.conv(x))).mean((2, 3)))


def program(model: nn.Module, role: str = "adapt") -> Program:
    method = METHODS["tent"](capture(model, (3, 6, 6), 2), Setup(3, 1))
    start = {**method.backbone.source_statistics(), **method.own_statistics()}
    return build(Model(method, method.parameters(), start, "live", "sgd"), role, 2, torch.randn(2, 3, 6, 6))


def _separated(x: Tensor) -> Tensor:
    return x + x[:, torch.tensor([0, 1]), :, torch.tensor([1, 2])].mean()


def _masked(x: Tensor) -> Tensor:
    return x + x[x > 0].mean()


def _steps(x: Tensor) -> Tensor:
    return x * torch.heaviside(x, torch.tensor(0.5))


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (_separated, "separated index tensors"),
        (_masked, "boolean mask"),
        (_steps, "heaviside"),
        (lambda x: x.median(1, keepdim=True).values * x, "median"),
    ],
)
def test_what_cannot_be_made_is_an_error_that_names_the_module(function: Callable[[Tensor], Tensor], words: str) -> None:
    for kind, name in ((_Around, "'odd'"), (_Itself, "the model")):
        with pytest.raises(ExportError, match=words) as caught:
            compile_program(program(kind(_Layer(function))), PlacedWeights())
        assert caught.value.message.startswith(name)


@pytest.mark.parametrize("raised", [KeyError("odd form"), TypeError("odd form"), ValueError("odd form"), AssertionError("odd form")])
def test_a_rule_that_fails_is_an_operator_without_a_form(raised: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise raised

    monkeypatch.setitem(registry.RULES, "atan", fails)
    with pytest.raises(ExportError, match=r"'odd': operator atan\.default.*odd form"):
        compile_program(program(_Around(_Layer(torch.atan)), "predict"), PlacedWeights())


def test_an_operator_of_the_root_module_is_the_models() -> None:
    error = explain(Unsupported([Missing("aten.mean.dim", "")]), capture(_Around(nn.ReLU()), (3, 6, 6), 2), "predict")
    assert error.message.startswith("the model: operator mean.dim")


def test_what_onnx_refuses_is_named_by_the_nodes_module(monkeypatch: pytest.MonkeyPatch) -> None:
    def doubles(graph: Graph, x: object) -> object:  # standard, but onnxruntime has no tangent of doubles
        wide = graph.op("Cast", [x], x.shape, np.float64, to=np.dtype(np.float64))  # type: ignore[attr-defined]
        return graph.op("Cast", [graph.op("Tan", [wide], wide.shape)], wide.shape, np.float32, to=np.dtype(np.float32))

    def constants(graph: Graph, x: object) -> object:
        mask = graph.constant(np.ones(x.shape, np.bool_))  # type: ignore[attr-defined]
        return graph.op("Tanh", [mask], mask.shape, np.float32)

    monkeypatch.setitem(registry.RULES, "atan", constants)
    with pytest.raises(ExportError, match=r"^'odd': an operator is refused"):
        compile_program(program(_Around(_Layer(torch.atan)), "predict"), PlacedWeights())
    monkeypatch.setitem(registry.RULES, "atan", doubles)
    made = compile_program(program(_Around(_Layer(torch.atan)), "predict"), PlacedWeights())[0]
    with pytest.raises(ExportError, match=r"^'odd': an operator is refused"), named_refusals():
        open_session(made.model, made.graph.constants)
