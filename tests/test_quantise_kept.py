"""What a step keeps for its backward pass: bytes on this very batch's ranges, and in the graph nothing larger between the two passes."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from edgeadapt.exporters.capture import capture
from edgeadapt.exporters.compile import lowered
from edgeadapt.exporters.ir import Graph
from edgeadapt.exporters.methods import METHODS, Setup
from edgeadapt.exporters.operators import magnitude, rectified
from edgeadapt.exporters.programs import Model, Program, build
from edgeadapt.exporters.quantise import kept as keeping
from edgeadapt.exporters.quantise.choose import stand_in
from edgeadapt.exporters.quantise.kept import Kept, range_of
from edgeadapt.exporters.quantise.operators import from_codes, quantise, quantised_relu, to_codes
from edgeadapt.exporters.schedules import ordered
from tests.lowered import run
from tests.zoo import named
from tests.zoo.calibrate import calibrate, noise

BATCH = 4
SHAPE = (BATCH, 16, 16, 16)
"""As many elements as are kept small at least."""


@pytest.fixture
def packed(monkeypatch: pytest.MonkeyPatch) -> list[keeping.Packed]:
    """What is kept, in order."""
    found: list[keeping.Packed] = []
    real = Kept._pack

    def pack(self: Kept, x: Tensor) -> keeping.Packed:
        found.append(real(self, x))
        return found[-1]

    monkeypatch.setattr(Kept, "_pack", pack)
    return found


def forms(packed: list[keeping.Packed]) -> list[torch.dtype]:
    return [(item if isinstance(item, Tensor) else item[0]).dtype for item in packed]


def restored(x: Tensor) -> Tensor:
    """What a backward pass finds of x."""
    grid = range_of(x)
    return from_codes(to_codes(x, grid.scale, grid.zero), grid.scale, grid.zero)


def test_each_channel_has_the_range_of_this_very_batch() -> None:
    size = torch.logspace(-6, 6, 16).reshape(1, 16, 1, 1)
    for seed, shift in ((0, 0.0), (1, 5.0), (2, -5.0)):
        x = size * (noise(SHAPE, seed) + shift)
        low, high = x.amin((0, 2, 3)).clamp(max=0.0), x.amax((0, 2, 3)).clamp(min=0.0)
        grid = range_of(x)
        torch.testing.assert_close(grid.scale, (high - low) / 255)
        step = grid.scale.reshape(1, 16, 1, 1)
        assert float(((restored(x) - x).abs() / step).max()) < 1.001  # zero lies on the grid, so the ends are off by half a step
        codes = to_codes(x, grid.scale, grid.zero)  # with zero they take up all there are
        assert codes.amin((0, 2, 3)).minimum(grid.zero).tolist() == [0] * 16
        assert codes.amax((0, 2, 3)).maximum(grid.zero).tolist() == [255] * 16


def test_nothing_of_the_batch_before_is_remembered() -> None:
    kept, weight = Kept(BATCH), torch.ones(16, 1, 1, requires_grad=True)
    with kept.hooks():
        (noise(SHAPE) * weight).sum().backward()
        weight.grad = None
        sudden = 1000 * noise(SHAPE, 1)
        (sudden * weight).sum().backward()
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad[:, 0, 0], sudden.sum((0, 2, 3)), rtol=0.02, atol=500.0)
    assert float(weight.grad.abs().max()) > 5e3


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_value_beyond_a_grid_that_was_told_saturates(sign: float, packed: list[keeping.Packed]) -> None:
    """Values lie on the grid that is told of; should some not, they are cut at its end and not made into others."""
    kept = Kept(BATCH)
    narrow = range_of(noise(SHAPE))
    x = sign * 100 * torch.rand(SHAPE, generator=torch.Generator().manual_seed(0))
    kept.lies_on(x, narrow)
    weight = torch.ones(16, 1, 1, requires_grad=True)
    with kept.hooks():
        y = x * weight
    y.sum().backward()
    assert weight.grad is not None
    end = narrow.high if sign > 0 else narrow.low
    codes = next(item[0] for item in packed if not isinstance(item, Tensor))
    assert float((codes == (255 if sign > 0 else 0)).float().mean()) > 0.9
    ratio = weight.grad.flatten() / (BATCH * 256 * end)
    assert 0.9 < float(ratio.min()) <= float(ratio.max()) < 1.001


def test_constant_and_zero_channels_come_back_exactly() -> None:
    x = noise(SHAPE)
    x[:, 0], x[:, 1], x[:, 2], x[:, 3] = 0.0, 2.0, -3.5, 1e-38
    got = restored(x)
    assert bool((range_of(x).scale > 0).all())
    assert torch.equal(got[:, 0], x[:, 0])
    torch.testing.assert_close(got[:, 1:3], x[:, 1:3], rtol=1e-6, atol=0.0)
    assert float(got[:, 3].abs().max()) < 1e-27
    assert bool(got.isfinite().all())
    assert torch.equal(restored(torch.zeros(SHAPE)), torch.zeros(SHAPE))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_does_not_become_finite(value: float) -> None:
    x = noise(SHAPE)
    x[1, 5, 3, 3] = value
    weight = torch.ones(16, 1, 1, requires_grad=True)
    with Kept(BATCH).hooks():
        y = x * weight
    y.sum().backward()
    assert weight.grad is not None
    finite = weight.grad.flatten().isfinite()
    assert finite.tolist() == [channel != 5 for channel in range(16)]


@pytest.mark.parametrize(
    ("shape", "small"),
    [
        (SHAPE, True),
        ((BATCH, 16, 256), True),
        ((BATCH, 16, 16, 15), False),  # too few
        ((2 * BATCH, 16, 16, 16), False),  # no batch's
        ((1, 16, 32, 32), False),
        ((64 * BATCH, 64), True),  # rows of several a sample
        ((64 * BATCH + 1, 64), False),
        ((BATCH, 8192), False),  # a row a sample
        ((65536,), False),
    ],
)
def test_tensors_of_a_batch_are_kept_small(shape: tuple[int, ...], small: bool, packed: list[keeping.Packed]) -> None:
    x, weight = noise(shape), torch.ones((), requires_grad=True)
    with Kept(BATCH).hooks():
        y = x * weight
    assert forms([packed[0]]) == [torch.uint8 if small else torch.float32]
    y.sum().backward()
    assert weight.grad is not None
    if not small:
        assert float(weight.grad) == pytest.approx(float(x.sum()), rel=1e-4)


def test_other_types_are_kept_as_they_are(packed: list[keeping.Packed]) -> None:
    weight = torch.ones((), dtype=torch.float64, requires_grad=True)
    with Kept(BATCH).hooks():
        _ = noise(SHAPE).double() * weight
    assert set(forms(packed)) == {torch.float64}


@pytest.mark.parametrize("told", [True, False])
def test_weights_stay_whole_even_of_a_batchs_size(told: bool, packed: list[keeping.Packed]) -> None:
    weight = noise((BATCH, 64, 8, 8), 1).requires_grad_()  # its first size is the batch's
    x = noise((BATCH, 64, 8, 8)).requires_grad_()
    kept = Kept(BATCH)
    if told:
        kept.whole([weight])
    with kept.hooks():
        y = F.conv2d(x, weight)
    shapes = [(item if isinstance(item, Tensor) else item[0]) for item in packed]
    assert sorted(item.dtype.itemsize for item in shapes) == ([1, 4] if told else [1, 1])
    exact = torch.autograd.grad(F.conv2d(x, weight).sum(), x)[0]
    got = torch.autograd.grad(y.sum(), x)[0]
    assert torch.equal(got, exact) == told


def test_vectors_and_matrices_of_a_row_a_sample_stay_float(packed: list[keeping.Packed]) -> None:
    x, vector = noise((BATCH, 65536)).requires_grad_(), noise((65536,)).requires_grad_()
    with Kept(BATCH).hooks():
        _ = x * vector
    assert forms(packed) == [torch.float32] * 2


def test_a_relu_keeps_truths_and_a_magnitude_signs(packed: list[keeping.Packed]) -> None:
    x = noise(SHAPE)
    x[0, 0, 0] = 0.0
    for function, kind in ((rectified, torch.bool), (magnitude, torch.int8)):
        packed.clear()
        leaf = x.clone().requires_grad_()
        with Kept(BATCH).hooks():
            y = function(leaf)
        assert forms(packed) == [kind]
        grad = noise(SHAPE, 3)
        plain = x.clone().requires_grad_()
        want = torch.autograd.grad((plain.relu() if function is rectified else plain.abs()), plain, grad)[0]
        assert torch.equal(torch.autograd.grad(y, leaf, grad)[0], want)
    packed.clear()
    leaf = x.clone().requires_grad_()
    with Kept(BATCH).hooks():
        quantised_relu(leaf, torch.tensor(0.02), torch.tensor(0, dtype=torch.uint8), True)
    assert forms(packed) == [torch.bool]


def test_what_lies_on_a_grid_is_kept_as_its_codes(packed: list[keeping.Packed]) -> None:
    scale, zero = torch.tensor(0.037), torch.tensor(100, dtype=torch.uint8)
    x = quantise(noise(SHAPE), scale, zero)
    kept, weight = Kept(BATCH), torch.ones((), requires_grad=True)
    grid = keeping.Grid(scale, zero)
    kept.lies_on(x, grid)
    with kept.hooks():
        y = x * weight
        z = x.reshape(BATCH, 16, -1) * weight  # another shape of the same values
    assert len(packed) == 2
    for item in packed:
        assert isinstance(item, tuple)
        assert torch.equal(item[0].flatten(), to_codes(x, scale, zero).flatten())
        assert item[1] is scale
    exact = x.sum()
    for result in (y, z):
        assert float(torch.autograd.grad(result.sum(), weight)[0]) == pytest.approx(float(exact), rel=1e-6)
        assert torch.equal(from_codes(*packed[0]), x)  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------- the graph of a step


def step(quantised: bool = True, small: bool = True, statistics: str = "live", gradients: bool = True) -> Program:
    """An adaptation step of EcoTTA over a small network."""
    net = calibrate(named.resnet_cifar(8), (3, 32, 32))
    captured = capture(net, (3, 32, 32), BATCH)
    method = METHODS["ecotta"](captured, Setup(10, parts=2))
    if quantised:
        method = method.at(captured.quantised(stand_in(captured, method.entries, frozenset(), gradients)))
    values = {**method.backbone.source_statistics(), **method.own_statistics()}
    model = Model(method, method.parameters(), values, statistics, "sgd", small=small)
    return build(model, "adapt", BATCH, noise((BATCH, 3, 32, 32)))


@cache
def _scheduled(quantised: bool, small: bool, statistics: str, gradients: bool) -> Graph:
    graph = lowered(step(quantised, small, statistics, gradients))
    ordered(graph, 0.1)
    return graph


def scheduled(quantised: bool = True, small: bool = True, statistics: str = "live", gradients: bool = True) -> Graph:
    """Its graph in its order."""
    return copy.deepcopy(_scheduled(quantised, small, statistics, gradients))


def crossing(graph: Graph, first: int) -> Iterator[str]:
    """Tensors of more than two dimensions that nodes before `first` make and nodes from it on read."""
    made = {out for node in graph.nodes[:first] for out in node.outputs}
    read = {name for node in graph.nodes[first:] for name in node.inputs} - set(graph.outputs)
    for name in sorted(made & read):
        if graph.values[name].rank > 2 and math.prod(graph.values[name].shape) > graph.values[name].shape[1]:  # a channel's vector is none
            yield name


def middle(graph: Graph) -> int:
    """Where the forward pass ends: behind the node that gives the logits."""
    return next(index for index, node in enumerate(graph.nodes) if "logits" in node.outputs) + 1


def backward_begins(graph: Graph) -> int:
    return next(index for index, node in enumerate(graph.nodes) if graph.late(node))


BYTES = {np.dtype(np.uint8), np.dtype(np.int8), np.dtype(np.bool_)}


@pytest.mark.parametrize("statistics", ["live", "source"])
@pytest.mark.parametrize("gradients", [True, False])
def test_between_the_passes_of_a_step_lie_only_bytes(statistics: str, gradients: bool) -> None:
    graph = scheduled(statistics=statistics, gradients=gradients)
    first = backward_begins(graph)
    names = list(crossing(graph, first))
    assert {graph.values[name].dtype for name in names} <= BYTES
    assert len(names) >= 4
    assert {graph.values[name].dtype for name in names} >= {np.dtype(np.uint8), np.dtype(np.bool_), np.dtype(np.int8)}


def test_a_model_in_float_keeps_bytes_too() -> None:
    graph = scheduled(quantised=False)
    names = list(crossing(graph, backward_begins(graph)))
    assert names
    assert {graph.values[name].dtype for name in names} <= BYTES


@pytest.mark.parametrize("quantised", [True, False])
def test_without_small_forms_the_same_walk_finds_floats(quantised: bool) -> None:
    graph = scheduled(quantised, small=False)
    names = list(crossing(graph, middle(graph)))
    assert np.dtype(np.float32) in {graph.values[name].dtype for name in names}


@pytest.mark.parametrize("quantised", [True, False])
def test_all_of_the_forward_pass_comes_before_the_backward_one(quantised: bool) -> None:
    graph = scheduled(quantised)
    first = backward_begins(graph)
    later = {out for node in graph.nodes[first:] for out in node.outputs if graph.late(node)}
    early = [node for node in graph.nodes[first:] if not graph.late(node)]
    for node in early:  # only what reads the backward pass's results may come behind
        assert later.intersection(node.inputs), node
        later.update(node.outputs)
    assert middle(graph) <= first
    assert 0.3 * len(graph.nodes) < first < 0.9 * len(graph.nodes)


def test_small_forms_change_gradients_by_little() -> None:
    """Of a model in float32, statistics as they were trained: the forward pass is the same, the gradients are nearly."""
    exact, rounded = (step(False, small, "source") for small in (False, True))
    one, other = (program(dict(program.example)) for program in (exact, rounded))
    assert torch.equal(one["logits"], other["logits"])
    names = [name for name in one if name.startswith("new.meta") and name.endswith("conv.weight")]
    assert names
    for name in names:
        before = exact.example[f"state.{name.removeprefix('new.')}"]
        moved, near = one[name] - before, other[name] - before
        assert not torch.equal(moved, near)
        assert float(F.cosine_similarity(moved.flatten(), near.flatten(), 0)) > 0.999


@pytest.mark.parametrize("quantised", [True, False])
def test_a_step_that_overflows_is_seen_although_codes_are_finite(quantised: bool) -> None:
    """onnxruntime's codes of NaN and infinite values are codes like others: the loss has to tell."""
    program = step(quantised, statistics="source")
    graph = scheduled(quantised, statistics="source")
    feeds = dict(program.example)
    assert np.isfinite(run(graph, feeds)["metric.loss"])
    for value in (3e38, float("nan")):
        feeds["state.meta.0.conv.weight"] = torch.full_like(feeds["state.meta.0.conv.weight"], value)
        assert not np.isfinite(run(graph, feeds)["metric.loss"])


def test_a_step_is_told_of_its_weights_and_of_what_lies_on_grids(packed: list[keeping.Packed], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeping, "SMALL", 1)
    shape = (64, 64, 3, 3)
    with monkeypatch.context() as patch:
        patch.setitem(globals(), "BATCH", shape[0])
        program = step(quantised=False, statistics="source")
        program(dict(program.example))
    assert not [item for item in packed if isinstance(item, tuple) and item[0].shape == shape]
    assert [item for item in packed if isinstance(item, Tensor) and item.shape == shape]
    packed.clear()
    program = step(statistics="source")
    program(dict(program.example))
    scales = {value.data_ptr() for name, value in program.example.items() if ".grid." in name}
    found = [item[1].data_ptr() in scales for item in packed if isinstance(item, tuple)]
    assert any(found)
    assert not all(found)
