"""Operators in 8 bits: onnxruntime against torch to the last bit, and their gradients against torch's own."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from edgeadapt.exporters.quantise import operators
from edgeadapt.exporters.quantise.operators import (
    dequantised_convolution_backward,
    from_codes,
    quantise,
    quantised_convolution,
    quantised_convolution_backward,
    quantised_relu,
    to_codes,
    turned_round,
    watched,
)
from tests.lowered import graph_of, run, same_bits
from tests.zoo.calibrate import noise

Tensors = dict[str, Tensor]


def byte(*values: int) -> Tensor:
    return torch.tensor(values if len(values) > 1 else values[0], dtype=torch.uint8)


def wrong(function: Callable[[Tensors], Tensors], example: Tensors) -> list[str]:
    """The outputs that onnxruntime gives otherwise than torch."""
    return same_bits(run(graph_of(function, example), example), function(example))


# Beyond both ends, at them, and halfway between two values of the grid, where ties go to the even one.
EDGES = torch.tensor([-1e9, -200.0, -128.5, -128.0, -1.5, -0.5, 0.0, 0.5, 1.5, 2.5, 126.5, 127.0, 127.5, 300.0, 1e9, 0.1])
GRIDS = {
    "one": (torch.tensor(1.0), byte(128)),
    "from zero": (torch.tensor(0.37), byte(0)),
    "channels": (torch.tensor([1.0, 0.013, 2.5]), byte(128, 0, 255)),
}


def spread(scale: Tensor) -> Tensor:
    """(2, 3, …): the edges, noise, and what lies about halfway between two values of the grid, where the last bit decides."""
    halves = (torch.arange(-120, 120) + 0.5) * scale.expand(3)[:, None]
    return torch.cat([torch.cat([EDGES, 40 * noise((32,))]).repeat(3, 1), halves], 1).repeat(2, 1, 1)


@pytest.mark.parametrize("name", GRIDS)
def test_codes_and_values_are_onnxruntimes(name: str) -> None:
    scale, zero = GRIDS[name]
    x = spread(scale)

    def both(given: Tensors) -> Tensors:
        codes = to_codes(given["x"], given["scale"], given["zero"])
        values = from_codes(codes, given["scale"], given["zero"])
        return {"codes": codes, "values": values, "whole": quantise(given["x"], given["scale"], given["zero"])}

    example = {"x": x, "scale": scale, "zero": zero}
    assert wrong(both, example) == []
    found = both(example)
    assert torch.equal(found["values"], found["whole"])
    assert {int(found["codes"][:, 0].min()), int(found["codes"][:, 0].max())} == {0, 255}
    again = quantise(found["whole"], scale, zero)
    assert torch.equal(again, found["whole"])  # what lies on a grid stays where it is


def test_ties_go_to_even_codes_and_both_ends_saturate() -> None:
    codes = to_codes(EDGES[None, None], torch.tensor(1.0), byte(128))
    assert codes.flatten().tolist()[:-1] == [0, 0, 0, 0, 126, 128, 128, 128, 130, 130, 254, 255, 255, 255, 255]


def wraps(x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return (torch.round(x / scale) + zero) % 256


def truncates(x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return (torch.trunc(x / scale) + zero).clamp(0, 255)


def halves_up(x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return (torch.floor(x / scale + 0.5) + zero).clamp(0, 255)


def low_side_only(x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return (torch.round(x / scale) + zero).clamp(min=0) % 256


@pytest.mark.parametrize("fault", [wraps, truncates, halves_up, low_side_only])
def test_faulty_roundings_are_seen(monkeypatch: pytest.MonkeyPatch, fault: Any) -> None:
    example = {"x": spread(torch.tensor(1.0)), "scale": torch.tensor(1.0), "zero": byte(128)}

    def whole(given: Tensors) -> Tensors:
        return {"y": quantise(given["x"], given["scale"], given["zero"])}

    graph = graph_of(whole, example)
    assert same_bits(run(graph, example), whole(example)) == []
    monkeypatch.setattr(operators, "codes_of", fault)
    assert same_bits(run(graph, example), whole(example)) == ["y"]


@pytest.mark.parametrize("name", GRIDS)
def test_the_gradient_passes_a_rounding_as_it_is(name: str) -> None:
    scale, zero = GRIDS[name]
    x = spread(scale)
    grad = noise(x.shape, 1)

    def backward(given: Tensors) -> Tensors:
        leaf = given["x"].detach().requires_grad_()
        y = quantise(leaf, given["scale"], given["zero"])
        return {"grad": torch.autograd.grad(y, leaf, given["grad"])[0] * 1.0}

    example = {"x": x, "scale": scale, "zero": zero, "grad": grad}
    assert torch.equal(backward(example)["grad"], grad)
    assert wrong(backward, example) == []


@pytest.mark.parametrize("both", [False, True])
def test_a_rounded_relu_masks_its_gradient_by_codes(both: bool) -> None:
    scale = torch.tensor(6.0 / 255)
    x = torch.tensor([-1.0, 0.0, 0.4, 0.6, 1.0, 254.0, 254.4, 254.6, 255.0, 300.0]).repeat(2, 3, 1) * scale
    grad = noise(x.shape, 1)

    def whole(given: Tensors) -> Tensors:
        leaf = given["x"].detach().requires_grad_()
        y, mask = quantised_relu(leaf, given["scale"], given["zero"], both)
        return {"y": y.detach(), "mask": mask, "grad": torch.autograd.grad(y, leaf, given["grad"])[0]}

    example = {"x": x, "scale": scale, "zero": byte(0), "grad": grad}
    found = whole(example)
    passes = [False, False, False, True, True, True, True, not both, not both, not both]
    assert found["mask"][0, 0].tolist() == passes
    assert torch.equal(found["grad"], grad * torch.tensor(passes))
    assert wrong(whole, example) == []


@dataclass(frozen=True)
class Case:
    """A convolution."""

    weight: tuple[int, ...]
    size: tuple[int, ...]
    stride: int = 1
    padding: int = 0
    dilation: int = 1
    groups: int = 1
    zero: int = 0
    negative: bool = False
    per_channel: bool = True

    @property
    def how(self) -> tuple[list[int], list[int], list[int], int]:
        rank = len(self.size)
        return [self.stride] * rank, [self.padding] * rank, [self.dilation] * rank, self.groups

    @property
    def turns(self) -> bool:
        return self.stride == 1

    def numbers(self) -> Tensors:
        """Random ones; of the output some codes saturate at both ends, and channel 1 is dead: its weight is zero."""
        random = torch.Generator().manual_seed(5)
        outside, inside = self.weight[0], self.weight[1] * self.groups
        weight = torch.randint(-127, 128, self.weight, generator=random, dtype=torch.int8)
        weight[1] = 0
        scale = 0.002 + 0.004 * torch.rand(outside, generator=random)
        if self.negative:
            scale = scale * torch.tensor([1.0, -1.0]).repeat(outside)[:outside]
        grids = outside if self.per_channel else ()
        taps = math.prod(self.weight[1:])
        output_scale = taps**0.5 * (0.002 + 0.001 * torch.rand(grids, generator=random))
        output_zero = torch.randint(0, 256, torch.empty(grids).shape, generator=random, dtype=torch.uint8)
        input_scale = torch.tensor(0.013)
        shift = 0.3 * torch.randn(outside, generator=random)
        bias = torch.round((shift + output_zero.float() * output_scale) / (input_scale * scale)).to(torch.int32)
        return {
            "x": 1.5 * torch.randn((2, inside, *self.size), generator=random),
            "weight": weight,
            "weight_scale": scale,
            "input_scale": input_scale,
            "input_zero": byte(self.zero),
            "scale": scale / output_scale,
            "bias": bias,
            "output_scale": output_scale,
            "output_zero": output_zero,
        }


ORDER = ("x", "weight", "weight_scale", "input_scale", "input_zero", "scale", "bias", "output_scale", "output_zero")
CASES = {
    "1-D": Case((5, 3, 3), (17,), padding=1),
    "1-D strided": Case((4, 3, 5), (18,), stride=2, padding=2, zero=128),
    "2-D": Case((6, 4, 3, 3), (7, 9), padding=1),
    "2-D zero point": Case((6, 4, 3, 3), (7, 9), padding=1, zero=111),
    "one grid": Case((6, 4, 3, 3), (7, 9), padding=1, zero=128, per_channel=False),
    "1x1": Case((8, 5, 1, 1), (6, 6), zero=40),
    "strided": Case((6, 4, 3, 3), (9, 8), stride=2, padding=1),
    "dilated": Case((6, 4, 3, 3), (9, 8), padding=2, dilation=2, zero=3),
    "groups": Case((6, 2, 3, 3), (7, 9), padding=1, groups=3, zero=90),
    "groups strided": Case((4, 3, 3, 3), (8, 8), stride=2, padding=1, groups=2),
    "depthwise": Case((8, 1, 3, 3), (7, 9), padding=1, groups=8, zero=17),
    "depthwise 1-D": Case((6, 1, 5), (20,), padding=2, groups=6),
    "negative scales": Case((6, 4, 3, 3), (7, 9), padding=1, zero=60, negative=True),
}


def convolved(case: Case, given: Tensors, x: Tensor | None = None, turned: Tensor | None = None, reach: Tensor | None = None) -> Tensor:
    first = given["x"] if x is None else x
    y: Tensor = quantised_convolution(first, *(given[name] for name in ORDER[1:]), turned, reach, *case.how)
    return y


def plain(case: Case, given: Tensors, x: Tensor) -> Tensor:
    """The convolution of the real numbers that the codes stand for, by torch."""
    weight = given["weight"].to(x.dtype) * given["weight_scale"].to(x.dtype).reshape(-1, *[1] * (x.dim() - 1))
    stride, padding, dilation, groups = case.how
    return torch.ops.aten.convolution(x, weight, None, stride, padding, dilation, False, [0] * len(stride), groups)


@pytest.mark.parametrize("name", CASES)
def test_a_convolution_is_onnxruntimes_to_the_bit(name: str) -> None:
    case = CASES[name]
    example = case.numbers()
    assert wrong(lambda given: {"y": convolved(case, given)}, example) == []
    y = convolved(case, example)
    codes = to_codes(y, example["output_scale"], example["output_zero"])
    assert {int(codes.min()), int(codes.max())} == {0, 255}
    assert len(codes[:, 1].unique()) == 1
    assert len(codes.unique()) > 20


@pytest.mark.parametrize("name", CASES)
def test_a_convolution_is_within_a_step_of_the_real_one(name: str) -> None:
    case = CASES[name]
    given = case.numbers()
    x = quantise(given["x"], given["input_scale"], given["input_zero"]).double()
    view = (1, -1, *[1] * len(case.size))
    step = given["output_scale"].expand(case.weight[0]).reshape(view).double()
    zero = given["output_zero"].expand(case.weight[0]).reshape(view).double()
    unit = (given["input_scale"] * given["weight_scale"]).double().reshape(view)
    real = plain(case, given, x) + unit * given["bias"].reshape(view) - zero * step
    wanted = torch.minimum(torch.maximum(real, -zero * step), (255 - zero) * step)
    assert float(((convolved(case, given) - wanted).abs() / step).max()) < 0.501


def test_a_convolution_that_wraps_or_truncates_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["2-D zero point"]
    example = case.numbers()
    want = run(graph_of(lambda given: {"y": convolved(case, given)}, example), example)
    real = torch.round
    for fault in (torch.trunc, lambda x: real(x) % 256):
        with monkeypatch.context() as patch:
            patch.setattr(operators.torch, "round", fault)
            assert same_bits(want, {"y": convolved(case, example)}) == ["y"]
    assert same_bits(want, {"y": convolved(case, example)}) == []


def cosine(one: Tensor, other: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(one.flatten().double(), other.flatten().double(), 0))


def through_torch(case: Case, given: Tensors, grad: Tensor) -> Tensor:
    """The gradient of the input, by torch's own convolution."""
    x = given["x"].detach().requires_grad_()
    return torch.autograd.grad(plain(case, given, x), x, grad)[0]


@pytest.mark.parametrize("name", CASES)
def test_the_float_gradient_of_a_convolution_is_torchs(name: str) -> None:
    case = CASES[name]
    given = case.numbers()
    grad = noise(convolved(case, given).shape, 2)

    def backward(table: Tensors) -> Tensors:
        x = table["x"].detach().requires_grad_()
        return {"grad": torch.autograd.grad(convolved(case, table, x), x, table["grad"])[0]}

    example = {**given, "grad": grad}
    want = through_torch(case, given, grad)
    torch.testing.assert_close(backward(example)["grad"], want, rtol=1e-5, atol=1e-5)
    got = run(graph_of(backward, example), example)["grad"]
    torch.testing.assert_close(torch.from_numpy(got), want, rtol=1e-4, atol=1e-5)
    stride, padding, dilation, groups = case.how
    direct = dequantised_convolution_backward(grad, given["weight"], given["weight_scale"], given["x"].shape[2:], stride, padding, dilation, groups)
    torch.testing.assert_close(direct, want, rtol=1e-5, atol=1e-5)


TURNING = [name for name, case in CASES.items() if case.turns]


@pytest.mark.parametrize("name", TURNING)
def test_a_weight_turned_round_makes_the_gradient_a_convolution(name: str) -> None:
    case = CASES[name]
    given = case.numbers()
    grad = noise(convolved(case, given).shape, 2)
    scaled = grad * given["weight_scale"].reshape(1, -1, *[1] * len(case.size))
    turned = turned_round(given["weight"], case.groups)
    assert turned.shape[:2] == (given["x"].shape[1], case.weight[0] // case.groups)
    around = [case.dilation * (k - 1) - case.padding for k in case.weight[2:]]
    rank = len(case.size)
    got = torch.ops.aten.convolution(scaled, turned.float(), None, [1] * rank, around, [case.dilation] * rank, False, [0] * rank, case.groups)
    torch.testing.assert_close(got, through_torch(case, given, grad), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", TURNING)
@pytest.mark.parametrize("size", [1.0, 1e-6])
def test_the_gradient_in_8_bits_is_onnxruntimes_to_the_bit_and_close_to_the_float_one(name: str, size: float) -> None:
    case = CASES[name]
    given = case.numbers()
    grad = size * noise(convolved(case, given).shape, 2)
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    x = given["x"].detach().requires_grad_()
    with watched(lambda *found: seen.append(found)):
        float_gradient = torch.autograd.grad(convolved(case, given, x), x, grad)[0]
    weight, scaled, to_input = seen[0]
    assert (weight.data_ptr(), len(seen)) == (given["weight"].data_ptr(), 1)
    assert torch.equal(to_input, float_gradient)
    axes = [axis for axis in range(grad.dim()) if axis != 1]
    reach = 1.1 * to_input.abs().amax(axes) / scaled.abs().max()
    reach = reach.maximum(reach.max() / 16)

    def backward(table: Tensors) -> Tensors:
        leaf = table["x"].detach().requires_grad_()
        y = convolved(case, table, leaf, table["turned"], table["reach"])
        return {"grad": torch.autograd.grad(y, leaf, table["grad"])[0]}

    example = {**given, "grad": grad, "turned": turned_round(given["weight"], case.groups), "reach": reach}
    assert wrong(backward, example) == []
    found = backward(example)["grad"]
    assert cosine(found, float_gradient) > 0.999
    assert float(found.norm() / float_gradient.norm()) == pytest.approx(1.0, abs=0.02)
    without = {**example, "turned": turned_round(given["weight"].flip(0), case.groups)}
    assert cosine(backward(without)["grad"], float_gradient) < 0.9  # so the bound above can be missed


def test_a_gradient_in_8_bits_saturates_and_may_be_zero() -> None:
    case = CASES["2-D"]
    given = case.numbers()
    grad = noise(convolved(case, given).shape, 2)
    turned, around = turned_round(given["weight"], 1), [1, 1]
    scale, reach = given["weight_scale"], torch.full((4,), 0.05)

    def backward(table: Tensors) -> Tensors:
        return {"grad": quantised_convolution_backward(table["grad"], table["turned"], table["scale"], table["reach"], around, [1, 1], 1)}

    example = {"grad": grad, "turned": turned, "scale": scale, "reach": reach}
    assert wrong(backward, example) == []
    step = (grad * scale.reshape(1, -1, 1, 1)).abs().max() / 127
    codes = backward(example)["grad"] / (step * 0.05)
    assert (round(float(codes.min())), round(float(codes.max()))) == (-128, 127)
    nothing = {**example, "grad": torch.zeros_like(grad)}
    assert wrong(backward, nothing) == []
    assert not backward(nothing)["grad"].any()
