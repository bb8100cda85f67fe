"""Which convolutions are computed in 8 bits, what lies on grids because of it, and what becomes part of a convolution."""

from __future__ import annotations

import pytest
from torch import Tensor, nn
from torch.nn import functional as F

from edgeadapt.exporters.capture import Captured, capture
from edgeadapt.exporters.compile import lowered
from edgeadapt.exporters.methods import METHODS, Setup
from edgeadapt.exporters.programs import Model, build
from edgeadapt.exporters.quantise.choose import stand_in
from edgeadapt.exporters.quantise.layout import ENTRY, Layout, convolutions, layout
from tests.zoo import named
from tests.zoo.calibrate import calibrate, noise


def captured(model: nn.Module, size: int = 32) -> Captured:
    return capture(calibrate(model, (3, size, size)), (3, size, size), 2)


def by_module(found: Layout) -> dict[str, str]:
    """The node of each layer, by the user's module."""
    return {layer.module: layer.node for layer in found.layers.values()}


def kind(model: Captured, name: str) -> str:
    """The operator of a node."""
    return str(next(node for node in model.operators if node.name == name).target).split(".")[1]


class Small(nn.Module):
    """Two convolutions with what a case puts between them."""

    def __init__(self, between: nn.Module, first: nn.Module | None = None) -> None:
        super().__init__()
        self.one, self.between, self.two = first or nn.Conv2d(3, 8, 3, padding=1), between, nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.between(self.one(x))).mean((2, 3))


def test_a_residual_network_folds_all_its_normalisations() -> None:
    model = captured(named.resnet_cifar(8))
    found = layout(model)
    assert len(found.layers) == len(list(convolutions(model))) == 7
    for layer in found.layers.values():
        assert layer.norm
        assert layer.bare == layer.node
    layers = {layer.module: layer for layer in found.layers.values()}
    assert layers["conv1"].source == ENTRY + model.input
    assert kind(model, layers["layer1.0.conv1"].end) == "relu"
    assert "getitem" in layers["layer1.0.conv2"].end  # its normalisation's result: what is rectified is a sum
    assert layers["layer1.0.conv2"].source == layers["layer1.0.conv1"].end
    assert kind(model, layers["layer2.0.conv1"].source) == "relu"  # behind the sum
    assert layers["layer2.0.conv1"].source not in {layer.end for layer in layers.values()}
    assert found.positive >= {layer.source for name, layer in layers.items() if name != "conv1"}
    assert [layer.turns for layer in layers.values()] == [name not in ("layer2.0.conv1", "layer3.0.conv1") for name in layers]


def test_before_its_convolutions_a_norm_is_none_of_theirs() -> None:
    model = captured(named.wideresnet(10, 1))
    found = layout(model)
    layers = {layer.module: layer for layer in found.layers.values()}
    assert layers["b1.0.conv1"].norm  # the norm and ReLU before the second one are read by that alone
    assert kind(model, layers["b1.0.conv1"].end) == "relu"
    assert not layers["b1.0.conv2"].norm
    assert layers["b1.0.conv2"].end == layers["b1.0.conv2"].node
    assert layers["b2.0.conv1"].source == layers["b2.0.sc"].source  # one activation, two convolutions
    assert kind(model, layers["b2.0.sc"].source) == "relu"
    sums = [node.name for node in model.operators if "aten.add" in str(node.target)]
    assert sums
    assert set(sums) <= found.channels


def test_depthwise_convolutions_with_a_bounded_relu() -> None:
    model = captured(named.mobilenet_v2(0.25, 10))
    found = layout(model)
    assert len(found.layers) == len(list(convolutions(model)))
    layers = {layer.module: layer for layer in found.layers.values()}
    deep = layers["features.1.conv.0.0"]
    assert deep.how.groups > 1
    assert set(found.bounds.values()) == {6.0}
    assert found.bounds[deep.end] == 6.0
    assert all(found.relus[name] for name in found.relus)
    assert set(found.relus) == found.tensors & set(found.bounds)
    assert deep.end in found.positive
    assert not any(layer.turns for layer in layers.values() if layer.how.stride != (1, 1))


def test_at_a_cut_another_tensor_enters() -> None:
    model = captured(named.resnet_cifar(8))
    whole = layout(model)
    cut = {layer.module: layer for layer in whole.layers.values()}["layer2.0.conv1"].source
    found = layout(model, (cut,))
    layers = {layer.module: layer for layer in found.layers.values()}
    assert layers["layer2.0.conv1"].source == ENTRY + cut
    assert ENTRY + cut in found.tensors
    assert ENTRY + cut not in whole.tensors | whole.channels
    inner = layers["layer1.0.conv1"]
    bisected = layout(model, (inner.node,))  # nothing is joined across it
    assert bisected.layers[inner.node].norm == ""
    assert bisected.layers[inner.node].end == inner.node


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize(
    ("kernel", "mode", "dilation", "taken"), [(3, "same", 1, True), (2, "same", 1, False), (2, "same", 2, True), (4, "valid", 1, True)]
)
def test_windows_that_pad_their_sides_unlike_stay_in_float(kernel: int, mode: str, dilation: int, taken: bool) -> None:
    model = captured(Small(nn.ReLU(), nn.Conv2d(3, 8, kernel, padding=mode, dilation=dilation)), 12)
    found = layout(model)
    assert ("one" in by_module(found)) == taken
    assert "two" in by_module(found)
    if taken:
        assert found.layers[by_module(found)["one"]].how.padding == ((dilation * (kernel - 1) // 2 if mode == "same" else 0),) * 2


def test_a_layer_that_is_to_stay_in_float_has_no_grids() -> None:
    model = captured(named.resnet_cifar(8))
    whole = layout(model)
    node = by_module(whole)["layer1.0.conv1"]
    found = layout(model, (), frozenset({node}))
    assert set(found.layers) == set(whole.layers) - {node}
    assert whole.layers[node].end in found.tensors  # the next one reads it
    assert found.relus[whole.layers[node].end] is False
    assert layout(model, (), frozenset(whole.layers)) == Layout({}, frozenset(), frozenset(), frozenset(), {})


@pytest.mark.parametrize(
    ("between", "bound", "rectifies"),
    [
        (nn.ReLU(), None, True),
        (nn.ReLU6(), 6.0, True),
        (nn.Hardtanh(0.0, 2.5), 2.5, True),
        (nn.Hardtanh(-1.0, 1.0), None, False),
        (nn.Sigmoid(), None, False),
        (nn.LeakyReLU(0.1), None, False),
    ],
)
def test_activations_that_are_flat_below_zero_are_part_of_a_convolution(between: nn.Module, bound: float | None, rectifies: bool) -> None:
    found = layout(captured(Small(between), 12))
    one, two = (found.layers[by_module(found)[name]] for name in ("one", "two"))
    assert (one.end != one.node) == rectifies
    assert (two.source == one.end) == rectifies
    assert (two.source in found.positive) == rectifies
    assert found.bounds == ({} if bound is None else {two.source: bound})


def test_a_pooling_between_keeps_the_grid() -> None:
    found = layout(captured(Small(nn.Sequential(nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.1))), 12))
    one, two = (found.layers[by_module(found)[name]] for name in ("one", "two"))
    assert two.source == one.end
    averaged = layout(captured(Small(nn.Sequential(nn.ReLU(), nn.AvgPool2d(2))), 12))
    one, two = (averaged.layers[by_module(averaged)[name]] for name in ("one", "two"))
    assert two.source != one.end


class Summed(nn.Module):
    """What is added up is rectified, and then convolved."""

    def __init__(self, relu: bool) -> None:
        super().__init__()
        self.a, self.b, self.c, self.relu = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), relu

    def forward(self, x: Tensor) -> Tensor:
        total = self.a(x) + self.b(x)
        return self.c(F.relu(total) if self.relu else total.tanh()).mean((2, 3)) + 1.0


@pytest.mark.parametrize("relu", [True, False])
def test_a_sum_lies_on_a_grid_unless_a_rounded_relu_alone_reads_it(relu: bool) -> None:
    model = captured(Summed(relu), 8)
    found = layout(model)
    total, plain = (node.name for node in model.operators if "aten.add" in str(node.target))
    assert (total in found.channels) == (not relu)
    assert plain not in found.channels | found.tensors  # a number is added to logits


@pytest.mark.parametrize("statistics", ["source", "live"])
def test_statistics_that_do_not_move_are_part_of_convolutions(statistics: str) -> None:
    net = captured(named.resnet_cifar(8))
    net = net.quantised(stand_in(net, (), frozenset(), False))
    method = METHODS["norm" if statistics == "live" else "source"](net, Setup(10))
    model = Model(method, {}, method.backbone.source_statistics(), statistics, "sgd")
    graph = lowered(build(model, "predict", 2, noise((2, 3, 32, 32))))
    kinds = [node.op for node in graph.nodes]
    assert kinds.count("QLinearConv") == 7
    assert "Conv" not in kinds
    assert kinds.count("BatchNormalization") == (7 if statistics == "live" else 0)
    makers = {out: node.op for node in graph.nodes for out in node.outputs}
    reads = [makers.get(node.inputs[0]) for node in graph.nodes if node.op == "QLinearConv"]
    if statistics == "source":
        assert kinds.count("Relu") == 1  # no convolution reads the last one
        assert reads.count("QLinearConv") == 4  # codes go from the stem to the first block, and on within each
    else:
        assert "QLinearConv" not in reads
