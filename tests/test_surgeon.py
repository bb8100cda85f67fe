"""SURGEON beside plain PyTorch, step after step in double precision; what its graphs keep; and what is refused."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from edgeadapt.errors import ExportError, UsageError
from edgeadapt.exporters.capture import capture
from edgeadapt.exporters.compile import lowered
from edgeadapt.exporters.export import export
from edgeadapt.exporters.ir import Graph
from edgeadapt.exporters.methods import METHODS, Setup
from edgeadapt.exporters.methods.surgeon import NOISE, Surgeon
from edgeadapt.exporters.programs import Model, Program, build, last_parts
from edgeadapt.exporters.pruned import bits_for, from_bits, group, largest_of_groups, products_of_kept, spread_kept, to_bits
from edgeadapt.exporters.quantise.choose import stand_in
from edgeadapt.exporters.quantise.kept import SMALL
from tests.lowered import graph_of, run
from tests.reference.surgeon import Surgeon as Plain
from tests.reference.surgeon import pruned
from tests.test_reference import BATCH, CLASSES, SHAPE, captured, differences, disturbed, largest, network, stream
from tests.test_reliable import Grouped, grouped, labelled, scalars, start_of, state_of, stepped


def program_of(
    name: str, scope: str, optimiser: str = "adam", role: str = "adapt", statistics: str = "live", small: bool = False, train: int | None = None
) -> Program:
    """The program over one of the small models: parameters away from the model's, and layers pruned to a half, a quarter, an eighth in turn."""
    method = METHODS["surgeon"](captured(name), Setup(CLASSES, train=train, settings={"scope": scope}))
    assert isinstance(method, Surgeon)
    parameters = disturbed({key: ("parameter", value) for key, value in method.parameters().items()})
    method.shares.update({layer.node: 0.5 ** (1 + index % 3) for index, layer in enumerate(method.layers)})
    model = Model(method, parameters, method.backbone.source_statistics(), statistics, optimiser, small=small)
    model = model if train is None else last_parts(model, train)
    return build(model, role, BATCH, torch.zeros(BATCH, *SHAPE), torch.zeros(BATCH, dtype=torch.int64))


def apart_of(program: Program) -> dict[str, int]:
    """By module, one of how many numbers is kept."""
    method = program.model.method
    assert isinstance(method, Surgeon)
    return {layer.weight.removesuffix(".weight"): method.apart(layer) for layer in method.layers}


CASES: dict[str, dict[str, Any]] = {
    "norm": {"scope": "norm"},
    "norm-sgd": {"scope": "norm", "optimiser": "sgd"},
    "norm-source": {"scope": "norm", "statistics": "source"},
    "norm-learn": {"scope": "norm", "role": "learn"},
    "norm-last": {"scope": "norm", "train": 1},
    "full": {"scope": "full"},
    "full-sgd": {"scope": "full", "optimiser": "sgd"},
    "full-last": {"scope": "full", "train": 1, "optimiser": "sgd"},
}


@pytest.mark.parametrize(
    ("name", "case"),
    [("wideresnet10", case) for case in CASES] + [pytest.param("resnet14", case, marks=pytest.mark.slow) for case in ("norm", "full")],
)
def test_program_follows_the_plain_implementation(name: str, case: str) -> None:
    """Logits, parameters, moments and statistics; layers keep different shares."""
    program = program_of(name, **CASES[case])
    apart = apart_of(program)
    assert {1, 2, 4, 8} >= set(apart.values()) >= {2, 4, 8}
    given = start_of(program, mix=0.3, rate=0.01)
    plain = Plain(network(name), CASES[case]["scope"] == "full", apart, live=program.model.statistics == "live",
                  optimiser=program.model.optimiser,
                  **scalars(given, *({"mix", "rate", "momentum"} & {key.removeprefix("hyper.") for key in given})))  # fmt: skip
    plain.freeze(program.model.fixed)
    plain = plain.double()
    plain.load(state_of(given))
    before = state_of(given)
    for x, y in stream(3):
        given |= {"y": y} if program.role == "learn" else {}
        ours = stepped(program, given, x)
        logits = plain.learn(x, y) if program.role == "learn" else plain.adapt(x)
        theirs = {"logits": logits, **plain.state()}
        assert set(ours) == set(theirs)
        found = differences(ours, theirs, before)
        worst = max(found, key=lambda key: found[key])
        assert found[worst] < 1e-8, f"{worst}: {found[worst]:.1e}"
        assert all(largest(value - before[key]) > 0 for key, value in ours.items() if key != "logits"), "something never moves"


def test_pruned_gradients_are_others_and_the_forward_pass_is_the_same() -> None:
    """Else the cases above would hold of no pruning as well."""
    program = program_of("resnet14", "full", "sgd")
    given = start_of(program, mix=0.3)
    (x, _), *_ = stream(1)
    less = stepped(program, dict(given), x)
    method = program.model.method
    assert isinstance(method, Surgeon)
    method.shares.clear()
    exact = stepped(program, dict(given), x)
    torch.testing.assert_close(less["logits"], exact["logits"], rtol=0, atol=1e-12)
    for layer in method.layers:
        a, b = less[f"momentum.{layer.weight}"], exact[f"momentum.{layer.weight}"]
        assert largest(a - b) > 0.01 * largest(b)
        if layer.bias:
            torch.testing.assert_close(less[f"momentum.{layer.bias}"], exact[f"momentum.{layer.bias}"], rtol=1e-9, atol=1e-12)


def test_without_pruning_it_is_tent() -> None:
    setup = Setup(CLASSES, settings={"prune": "none"})
    methods = [METHODS["surgeon"](captured("wideresnet10"), setup), METHODS["tent"](captured("wideresnet10"), Setup(CLASSES))]
    assert methods[0].rate == methods[1].rate
    found = []
    for method in methods:
        method.calibrate([torch.randn(BATCH, *SHAPE)], method.backbone.tensors, method.backbone.source_statistics())
        model = Model(method, method.parameters(), method.backbone.source_statistics(), "live", "adam")
        program = build(model, "adapt", BATCH, torch.zeros(BATCH, *SHAPE))
        found.append(stepped(program, start_of(program), next(stream(1))[0]))
    assert set(found[0]) == set(found[1])
    assert all(torch.equal(value, found[1][key]) for key, value in found[0].items())


@pytest.mark.parametrize("scope", ["norm", "full"])
def test_importance_is_measured_as_in_the_plain_implementation(scope: str) -> None:
    method = METHODS["surgeon"](captured("wideresnet10"), Setup(CLASSES, seed=5, settings={"scope": scope}))
    assert isinstance(method, Surgeon)
    batches = [x.float() for x, _ in stream(2)]
    method.calibrate(batches, method.backbone.tensors, method.backbone.source_statistics())
    random = torch.Generator().manual_seed(5)
    noisy = [x + NOISE * x.std() * torch.randn(x.shape, generator=random) for x in batches]
    wanted = Plain(network("wideresnet10"), scope == "full").importance(noisy)
    found = {layer.weight.removesuffix(".weight"): method.shares[layer.node] for layer in method.layers}
    assert found.keys() == wanted.keys()
    assert max(found.values()) == 1.0
    assert len({method.apart(layer) for layer in method.layers}) > 1
    for key, value in wanted.items():
        assert abs(found[key] - value) < 1e-3, key


def test_a_plan_without_data_takes_all_to_be_kept() -> None:
    method = METHODS["surgeon"](captured("wideresnet10"), Setup(CLASSES))
    method.calibrate([torch.randn(2, *SHAPE)], method.backbone.tensors, method.backbone.source_statistics())
    assert isinstance(method, Surgeon)
    assert {method.apart(layer) for layer in method.layers} == {1}


@given(st.integers(1, 3000), st.floats(0, 1))
def test_groups_are_divisors_near_the_share(count: int, share: float) -> None:
    size = group(count, share)
    assert count % size == 0
    assert 1 <= size <= 256
    others = [other for other in range(1, 257) if count % other == 0]
    assert all(abs(math.log(size * max(share, 1 / 256))) <= abs(math.log(other * max(share, 1 / 256))) + 1e-12 for other in others)


@given(st.sampled_from([2, 3, 4, 7, 16, 49, 256]), st.integers(1, 40), st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_places_fit_bits(apart: int, count: int, seed: int) -> None:
    bits = bits_for(apart, count)
    assert apart <= 2**bits
    places = torch.randint(0, apart, (count,), generator=torch.Generator().manual_seed(seed))
    packed = to_bits(places, bits)
    assert packed.dtype == torch.uint8
    assert packed.numel() == count * bits // 8
    assert torch.equal(from_bits(packed, bits), places)


@pytest.mark.parametrize(
    ("shape", "rows", "apart"), [((64, 16, 32, 32), 16, 2), ((3, 5, 7, 7), 5, 7), ((3, 4, 6), 4, 3), ((4, 2, 96), 2, 32), ((2, 512), 1, 256)]
)
@pytest.mark.parametrize("centred", [False, True])
def test_what_is_kept_is_lowered_to_the_last_bit(shape: tuple[int, ...], rows: int, apart: int, centred: bool) -> None:
    random = torch.Generator().manual_seed(0)
    x, centre = torch.randn(shape, generator=random), torch.randn(rows, generator=random)
    example = {"x": x, "grad": torch.randn(shape, generator=random), "centre": centre}

    def function(given: dict[str, Tensor]) -> dict[str, Tensor]:
        values, packed = largest_of_groups(given["x"], given["centre"] if centred else None, rows, apart)
        sums = products_of_kept(given["grad"], values, packed, apart)
        return {"values": values, "packed": packed, "sums": sums, "spread": spread_kept(values, packed, apart)}

    graph = graph_of(function, example, simple=True)
    found, wanted = run(graph, example), function(example)
    assert not any("TopK" in node.op for node in graph.nodes)
    for name in ("values", "packed", "spread"):
        assert found[name].tobytes() == wanted[name].numpy().tobytes(), name
    np.testing.assert_allclose(found["sums"], wanted["sums"].numpy(), rtol=1e-4, atol=1e-3)
    less = pruned(x - centre.reshape(1, rows, *[1] * (x.dim() - 2)) if centred and rows > 1 else x - centre if centred else x, rows, apart)
    assert torch.equal(wanted["spread"].reshape(shape), less)
    assert torch.allclose(wanted["sums"], (less * example["grad"]).reshape(shape[0], rows, -1).sum((0, 2)), rtol=1e-4, atol=1e-3)


def crossing(graph: Graph) -> dict[str, Any]:
    """What the forward pass makes and the backward pass reads, by name."""
    made = {out for node in graph.nodes if not graph.late(node) for out in node.outputs if out}
    kept = {name for node in graph.nodes if graph.late(node) for name in node.inputs if name in made}
    return {name: graph.values[name] for name in kept if name not in graph.outputs}


@pytest.mark.parametrize("scope", ["full", pytest.param("norm", marks=pytest.mark.slow)])
def test_only_bytes_cross_from_the_forward_pass_to_the_backward_one(scope: str) -> None:
    """The dense input of a pruned layer is not kept as well; what is kept is what the shares say."""
    program = program_of("wideresnet10", scope, small=True)
    method = program.model.method
    assert isinstance(method, Surgeon)
    less = crossing(lowered(program))

    def of(count: int) -> int:
        return count * (1 if count >= SMALL else 4)

    assert all(value.nbytes < 2**16 for value in less.values() if value.dtype == np.float32)
    layers = [(BATCH * layer.size, method.apart(layer)) for layer in method.layers]
    kept = sum(of(size // apart) + size // apart * bits_for(apart, size // apart) // 8 for size, apart in layers if apart > 1)
    whole = sum(of(size) for size, apart in layers if apart == 1)
    masks = sum(value.nbytes for value in less.values() if value.dtype == np.bool_)
    assert sum(value.nbytes for value in less.values()) <= kept + whole + masks + 2**16
    method.shares.clear()
    dense = crossing(lowered(program))
    assert sum(value.nbytes for value in less.values()) - masks < 0.6 * (sum(value.nbytes for value in dense.values()) - masks)


@pytest.mark.parametrize(
    ("name", "scope"),
    [
        ("grouped", "full"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("grouped", "norm"), ("wideresnet10", "norm"), ("wideresnet10", "full"))),
    ],
)
def test_bundles_are_checked(name: str, scope: str) -> None:
    """The self-check runs every graph beside PyTorch."""
    model, shape, batch = (grouped(), (3, 16, 16), 4) if name == "grouped" else (network(name), SHAPE, 16)
    x, y = labelled(torch.randn(64, *shape, generator=torch.Generator().manual_seed(2)))
    report = export(model, None, shape=shape, data=(x, y), method="surgeon", batches=(batch,), micro="none", threads=1, settings={"scope": scope})
    assert report.manifest["method"]["options"]["settings"] == {"scope": scope, "prune": "measured"}
    trained = {row["name"] for row in report.manifest["state"] if row["kind"] == "parameter"}
    named = dict(model.named_parameters())
    affine = {key for key, layer in model.named_modules() if isinstance(layer, nn.BatchNorm2d | nn.GroupNorm | nn.InstanceNorm2d | nn.LayerNorm)}
    assert trained == (set(named) if scope == "full" else {key for key in named if key.rpartition(".")[0] in affine})


@pytest.mark.slow
def test_resnets_are_checked_and_pieces_too() -> None:
    x, y = labelled(torch.randn(64, *SHAPE, generator=torch.Generator().manual_seed(2)))
    report = export(network("resnet14"), None, shape=SHAPE, data=(x, y), method="surgeon", batches=(8,), statistics="source", micro=(4,), threads=1)
    assert "adapt-sums.b4" in report.manifest["graphs"]


@pytest.mark.slow
def test_the_frozen_model_may_be_in_8_bits_where_only_normalisations_are_trained() -> None:
    x, y = labelled(torch.randn(128, *SHAPE, generator=torch.Generator().manual_seed(2)))
    report = export(
        network("wideresnet10"), None, shape=SHAPE, data=(x, y), method="surgeon", batches=(8,), quantize="int8", allow_drop=True, threads=1
    )
    assert report.manifest["quantisation"]["saved"] == "int8"


def test_group_and_instance_normalisation_prune_what_they_scale() -> None:
    """Beside autograd over the model itself, with pruned standardised values in the gradient of the scale."""
    model, x = grouped(), torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    method = METHODS["surgeon"](capture(model, (3, 16, 16), 4), Setup(5))
    assert isinstance(method, Surgeon)
    method.shares.update({layer.node: 0.25 for layer in method.layers})
    assert {layer.weight: method.apart(layer) for layer in method.layers} == {"na.weight": 4, "nb.weight": 4, "nc.weight": 4, "nd.weight": 1}
    out = build(Model(method, method.parameters(), {}, "none", "sgd"), "adapt", 4, x)
    found = out(dict(out.example))
    seen: dict[str, Tensor] = {}

    def hook(name: str) -> Any:
        def remember(layer: nn.Module, given: tuple[Tensor], result: Tensor) -> None:
            result.retain_grad()
            seen[name] = result

        return remember

    for name in ("na", "nb", "nc"):
        getattr(model, name).register_forward_hook(hook(name))
    assert isinstance(model, Grouped)
    shares = model(x).log_softmax(1)
    (-(shares.exp() * shares).sum(1).mean()).backward()
    for name in ("na", "nb", "nc"):
        layer, result = getattr(model, name), seen[name]
        shape = (1, -1, 1, 1)
        standard = (result.detach() - layer.bias.view(shape)) / layer.weight.view(shape)
        wanted = (result.grad * pruned(standard.detach(), 8, 4)).sum((0, 2, 3))
        torch.testing.assert_close(found[f"new.momentum.{name}.weight"], wanted, rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(found[f"new.momentum.{name}.bias"], layer.bias.grad, rtol=1e-4, atol=1e-6)


class Bare(nn.Module):
    """Nothing that has weights."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


@pytest.mark.parametrize(
    ("model", "choices", "error", "message"),
    [
        (
            nn.Sequential(nn.Conv2d(3, 5, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
            {},
            ExportError,
            "trains the scale and shift of normalisation layers",
        ),
        (Bare(), {"settings": {"scope": "full"}}, ExportError, "trains the weights of layers, and this model has none"),
        (grouped(), {"settings": {"scope": "some"}}, UsageError, "scope = 'some' is not possible"),
        (grouped(), {"exact": True}, UsageError, "need all that a layer reads, and surgeon prunes it"),
    ],
)
def test_models_and_choices_that_do_not_fit_are_refused(model: nn.Module, choices: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        export(model, None, shape=(3, 8, 8), data=(torch.randn(16, 3, 8, 8).numpy(), np.arange(16) % 3), method="surgeon", **choices)


def test_all_weights_are_not_for_8_bits() -> None:
    rounded = captured("wideresnet10").quantised(stand_in(captured("wideresnet10"), (), frozenset(), False))
    METHODS["surgeon"](rounded, Setup(CLASSES))
    with pytest.raises(ExportError, match="trains the weights that 8 bits hold fixed"):
        METHODS["surgeon"](rounded, Setup(CLASSES, settings={"scope": "full"}))


def test_gradients_through_statistics_are_not_pruned() -> None:
    program = program_of("wideresnet10", "norm")
    method = program.model.method
    exact = Model(method, program.model.parameters, program.model.values, "live", "adam", exact=True)
    with pytest.raises(UsageError, match="need all that a layer reads"):
        METHODS["surgeon"](captured("wideresnet10"), Setup(CLASSES, exact=True))
    METHODS["surgeon"](captured("wideresnet10"), Setup(CLASSES, settings={"prune": "none"}, exact=True))
    with pytest.raises(UsageError, match="need all that a layer reads"):
        build(exact, "adapt", BATCH, torch.zeros(BATCH, *SHAPE))(dict(program.example))
