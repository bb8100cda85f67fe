"""Steps over state in small forms, in torch and as graphs: what they keep, what they refuse, and what the self-check finds."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor

from edgeadapt.bundle.roles import GUARD
from edgeadapt.errors import ExportError
from edgeadapt.exporters import packing, selfcheck
from edgeadapt.exporters.capture import capture
from edgeadapt.exporters.compile import Compiled, PlacedWeights, compile_program
from edgeadapt.exporters.emit import to_onnx
from edgeadapt.exporters.execution import open_session
from edgeadapt.exporters.ir import Graph, Node
from edgeadapt.exporters.methods import METHODS, Setup
from edgeadapt.exporters.micro import sums_of, update_of
from edgeadapt.exporters.optimisers import OPTIMISERS
from edgeadapt.exporters.programs import Model, Program, build, held, last_parts
from edgeadapt.exporters.storage import COUNTER, TIERS, Packed, Plain, Storage
from tests.zoo import named
from tests.zoo.calibrate import calibrate

SHAPE, BATCH = (3, 16, 16), 4
KINDS, OPTIMS = ("side", "ecotta", "tent"), ("sgd", "adam")
PARAMETERS = {"a": (8, 16), "b": (8, 4, 3, 3), "bias": (8,)}
HYPER = {"rate": torch.tensor(0.01), "momentum": torch.tensor(0.9)}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@cache
def plain(kind: str, optimiser: str, statistics: str = "") -> Model:
    model = named.resnet_cifar(8)
    calibrate(model, SHAPE, 0)
    method = METHODS[kind](capture(model, SHAPE, BATCH), Setup(10, 2))
    values = {**method.backbone.source_statistics(), **method.own_statistics()}
    return Model(method, method.parameters(), values, statistics or method.statistics, optimiser)


def program(kind: str, tier: str, optimiser: str, role: str = "adapt", statistics: str = "") -> Program:
    model = held(plain(kind, optimiser, statistics), TIERS.get(tier), 0)
    return build(model, role, BATCH, draw(BATCH, *SHAPE, seed=3), torch.arange(BATCH))


@cache
def made(kind: str, tier: str, optimiser: str, role: str) -> tuple[Compiled, ...]:
    return tuple(compile_program(program(kind, tier, optimiser, role), PlacedWeights()))


def compiled(kind: str, tier: str, optimiser: str, role: str = "adapt") -> Compiled:
    item = made(kind, tier, optimiser, role)[0]
    return dataclasses.replace(item, graph=item.graph.copy())


class Alone:
    """A storage of some parameters with its state, and steps with given gradients."""

    def __init__(self, tier: str, optimiser: str, seed: int = 0) -> None:
        self.optimiser = optimiser
        parameters = {name: draw(*shape, seed=k) for k, (name, shape) in enumerate(PARAMETERS.items())}
        self.storage: Storage = Packed(TIERS[tier], parameters, seed) if tier in TIERS else Plain()
        self.state = {name: value.clone() for name, (_, value) in self.storage.state(parameters, optimiser, True).items()}

    def step(self, gradients: dict[str, Tensor], **hyper: float) -> dict[str, Tensor]:
        """The metrics; the state follows."""
        scalars = HYPER | {name: torch.tensor(value) for name, value in hyper.items()}
        following, metrics = self.storage.write(self.optimiser, gradients, self.state, self.storage.frozen(), scalars)
        self.state |= following
        return metrics

    def parameters(self) -> dict[str, Tensor]:
        return self.storage.read(gradients(), self.state, self.storage.frozen())

    def counts(self) -> dict[str, Tensor]:
        """What parameters are held as."""
        return {name: value for name, value in self.state.items() if name in ("parameters.rows", "parameters.vectors")}


def gradients(seed: int = 9, scale: float = 0.1) -> dict[str, Tensor]:
    return {name: scale * draw(*shape, seed=seed + k) for k, (name, shape) in enumerate(PARAMETERS.items())}


def nothing() -> dict[str, Tensor]:
    return {name: torch.zeros(shape) for name, shape in PARAMETERS.items()}


# ------------------------------------------------------------------------------------------------------------- the state


@pytest.mark.parametrize("optimiser", OPTIMS)
@pytest.mark.parametrize("tier", TIERS)
def test_nothing_but_scales_is_float32_between_steps(tier: str, optimiser: str) -> None:
    alone = Alone(tier, optimiser)
    alone.step(gradients())
    (pack,) = alone.storage.packs  # type: ignore[attr-defined]
    for name, value in alone.state.items():
        if value.is_floating_point():
            assert name == "step" or (name.endswith((".unit", ".scale")) and value.shape == (len(value), 1)), name
    wide = {"compact": 2, "tiny": 1}[tier]
    sizes = {name: value.nbytes for name, value in alone.state.items()}
    assert sizes["parameters.rows"] == wide * pack.divide * pack.width
    assert sizes["parameters.vectors"] == 2 * (pack.blocks - pack.divide) * pack.width
    for name in {"sgd": ("momentum",), "adam": ("first", "second")}[optimiser]:
        assert sizes[f"{name}.parameters"] == pack.blocks * pack.width
    assert pack.blocks * pack.width <= 1.1 * pack.elements
    assert (COUNTER in alone.state) is (tier == "tiny")


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("optimiser", OPTIMS)
def test_steps_follow_those_in_float32(tier: str, optimiser: str) -> None:
    """Over many steps of one direction with noise both go the same way, within what rounding allows."""
    small, plain = Alone(tier, optimiser), Alone("", optimiser)
    plain.state |= small.parameters()
    start = small.parameters()
    for k in range(100):
        given = {name: 0.05 * draw(*PARAMETERS[name], seed=50 + k) + 0.1 * value.sign() for name, value in start.items()}
        small.step(given, rate=0.01)
        plain.step(given, rate=0.01)
    after = small.parameters()
    for name, value in start.items():
        way = plain.state[name] - value
        assert float((after[name] - plain.state[name]).norm() / way.norm()) < (0.3 if tier == "tiny" else 0.1), name
        assert float(((after[name] - value) * way).sum() / (way * way).sum()) == pytest.approx(1.0, abs=0.08), name


@pytest.mark.parametrize("name", OPTIMS)
def test_an_optimisers_step_is_the_same_wherever_parameters_are(name: str) -> None:
    optimiser, given = OPTIMISERS[name], gradients()
    moments = optimiser.init(given)
    there, _ = optimiser.update(given, {key: torch.full_like(value, 2.0**-3) for key, value in given.items()}, moments, HYPER)
    zero, _ = optimiser.update(given, {key: torch.zeros(()) for key in given}, moments, HYPER)
    for key in given:
        torch.testing.assert_close(there[key] - 2.0**-3, zero[key], rtol=0, atol=2e-8)


def test_only_what_is_trained_is_held() -> None:
    model = last_parts(held(plain("ecotta", "sgd"), TIERS["tiny"], 0), 1)
    assert sum(pack.elements for pack in model.storage.packs) == sum(value.numel() for value in model.parameters.values())  # type: ignore[attr-defined]
    whole = held(plain("ecotta", "sgd"), TIERS["tiny"], 0)
    for name, value in model.parameters.items():
        assert torch.equal(value, whole.parameters[name])
    assert model.fixed.keys() == whole.parameters.keys() - model.parameters.keys()


def test_rows_of_zeros_can_grow_and_are_zero() -> None:
    storage = Packed(TIERS["tiny"], {"w": torch.zeros(4, 64), "v": torch.zeros(6)}, 0)
    assert not any(value.any() for value in storage.values().values())
    units = {name: value for name, (_, value) in storage.state({}, "sgd", False).items() if name.endswith(".unit")}
    assert torch.allclose(127 * units["parameters.rows.unit"], torch.tensor(2 / 8))
    assert torch.allclose(32767 * units["parameters.vectors.unit"], torch.tensor(2.0))


@pytest.mark.parametrize("tier", TIERS)
def test_what_was_hardly_moved_from_zero_can_grow_too(tier: str) -> None:
    """A warm-up leaves biases of 1e-9; a range made for these would be left by any step, and every step refused."""
    given = {"w": 1e-9 * draw(4, 64), "v": 1e-9 * draw(6)}
    storage = Packed(TIERS[tier], given, 0)
    state = {name: value for name, (_, value) in storage.state({}, "sgd", True).items()}
    steps = {name: 0.1 * draw(*value.shape, seed=1) for name, value in given.items()}
    following, metrics = storage.write("sgd", steps, state, storage.frozen(), {**HYPER, "rate": torch.tensor(1e-3)})
    assert np.isfinite(float(metrics[GUARD]))
    after = storage.read(given, state | following, storage.frozen())
    moved = (after["v"] + 1e-3 * steps["v"]).abs().max()
    assert float(moved) < 1e-5, "as far as the gradient says"


# -------------------------------------------------------------------------------------------------- steps that are no steps


@pytest.mark.parametrize("optimiser", OPTIMS)
@pytest.mark.parametrize("tier", TIERS)
def test_an_empty_batch_moves_no_parameter(tier: str, optimiser: str) -> None:
    """Neither at the start nor while moments are under way; float32 parameters go on by their momentum."""
    alone = Alone(tier, optimiser)
    for _ in range(2):
        before = {name: value.clone() for name, value in alone.counts().items()}
        for _ in range(5):
            metrics = alone.step(nothing())
            assert float(metrics["update"]) == 0.0
        for name, value in alone.counts().items():
            assert torch.equal(value, before[name])
        assert all(bool(torch.isfinite(value).all()) for value in alone.state.values())
        for k in range(4):
            alone.step(gradients(seed=k))
    faulty = Alone("", optimiser)
    faulty.state |= Alone(tier, optimiser).parameters()
    faulty.step(gradients())
    before = {name: value.clone() for name, value in faulty.parameters().items()}
    faulty.step(nothing())
    assert any(not torch.equal(value, before[name]) for name, value in faulty.parameters().items())


@pytest.mark.parametrize("tier", TIERS)
def test_a_vanished_gradient_beside_a_living_moment_does_not_explode(tier: str) -> None:
    """Small gradients beside large ones, then none of the small: no element goes faster than a few rates a step."""
    alone = Alone(tier, "adam")
    given = gradients(scale=1.0)
    given["a"][:, 1::2] *= 3e-4
    alone.step(given, rate=1e-3)
    for _ in range(3):
        given["a"][:, 1::2] = 0.0
        before = alone.parameters()
        alone.step(given, rate=1e-3)
        largest = max(float((value - before[name]).abs().max()) for name, value in alone.parameters().items())
        step = float(alone.state["parameters.rows.unit"].max()) * (1 if tier == "tiny" else 256)
        assert largest <= 5e-3 + step


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), -float("inf"), 1e30, 1e22])
@pytest.mark.parametrize("where", PARAMETERS)
@pytest.mark.parametrize("optimiser", OPTIMS)
@pytest.mark.parametrize("tier", TIERS)
def test_a_gradient_that_is_no_number_or_huge_is_told(tier: str, optimiser: str, where: str, odd: float) -> None:
    alone = Alone(tier, optimiser)
    assert np.isfinite(float(alone.step(gradients())["update"]))
    given = gradients()
    given[where].view(-1)[-1] = odd
    assert not np.isfinite(float(alone.step(given)["update"]))


@pytest.mark.parametrize("tier", TIERS)
def test_an_increment_beyond_its_range_is_told_and_saturates(tier: str) -> None:
    alone = Alone(tier, "sgd")
    given = {name: torch.full(shape, 1e4) for name, shape in PARAMETERS.items()}
    assert float(alone.step(given, rate=10.0)["update"]) == float("inf")
    for value in alone.counts().values():
        filled = value[value != 0]
        assert len(filled) > 7
        assert (filled == torch.iinfo(value.dtype).min).all(), "at the end of the range, not around it"


# -------------------------------------------------------------------------------------------------------- random numbers


def test_a_run_repeats_and_another_seed_is_another_run() -> None:
    runs = []
    for seed in (0, 0, 1):
        alone = Alone("tiny", "sgd", seed)
        for k in range(5):
            alone.step(gradients(seed=k))
        runs.append(alone.state)
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
    assert not torch.equal(runs[0]["parameters.rows"], runs[2]["parameters.rows"])
    assert int(runs[0][COUNTER]) == 5


@pytest.mark.parametrize("optimiser", OPTIMS)
@pytest.mark.parametrize("tier", TIERS)
def test_a_large_tensor_is_updated_a_slab_at_a_time_to_the_same_bits(monkeypatch: pytest.MonkeyPatch, tier: str, optimiser: str) -> None:
    whole, slabs = Alone(tier, optimiser), Alone(tier, optimiser)
    (pack,) = whole.storage.packs  # type: ignore[attr-defined]
    for k in range(3):
        metrics = whole.step(gradients(seed=k))
        with monkeypatch.context() as patch:
            patch.setattr(packing, "AT_ONCE", pack.blocks * pack.width // 3)  # one slab has rows and vectors
            assert len(pack.slabs()) > 2
            assert any(begin < pack.divide < end for begin, end in pack.slabs())
            others = slabs.step(gradients(seed=k))
        assert whole.state.keys() == slabs.state.keys()
        for name, value in whole.state.items():
            assert torch.equal(value, slabs.state[name]), name
        torch.testing.assert_close(metrics[GUARD], others[GUARD])


def test_what_an_update_makes_is_no_larger_than_a_slab(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of whole matrices there are the gradients and what is stored alone."""
    monkeypatch.setattr(packing, "AT_ONCE", 1024)
    graph = compile_program(program("ecotta", "tiny", "adam"), PlacedWeights())[0].graph
    (pack,) = held(plain("ecotta", "adam"), TIERS["tiny"], 0).storage.packs  # type: ignore[attr-defined]
    large = [node for node in graph.nodes for out in node.outputs if graph.values[out].shape == (pack.blocks, pack.width)]
    assert {node.op for node in large} == {"Concat"}
    kinds = [graph.values[node.outputs[0]].dtype for node in large]
    assert kinds.count(np.dtype(np.float32)) == 1  # gradients


@pytest.mark.parametrize("shape", [(40, 100), (64, 8, 3, 3), (3, 1037), (4001,)])
@pytest.mark.parametrize("tier", TIERS)
def test_a_large_parameter_is_read_a_stretch_at_a_time_to_the_same_bits(monkeypatch: pytest.MonkeyPatch, tier: str, shape: tuple[int, ...]) -> None:
    """Rows that are filled up and others, a vector, and every number that can be stored."""
    given = {"a": draw(*shape)}
    storage = Packed(TIERS[tier], given, 0)
    state = {name: value for name, (_, value) in storage.state(given, "sgd", True).items()}
    held = next(name for name in state if name in ("parameters.rows", "parameters.vectors"))
    ends = torch.iinfo(state[held].dtype)
    random = torch.randint(ends.min, ends.max + 1, state[held].shape, generator=torch.Generator().manual_seed(0))
    random.view(-1)[:6] = torch.tensor([ends.min, ends.max, 0, 127, min(128, ends.max), -128])
    for value in (state[held], random.to(state[held].dtype)):
        plain = storage.read(given, {**state, held: value}, {})["a"]
        with monkeypatch.context() as patch:
            patch.setattr(packing, "AT_ONCE", 1024)
            (pack,) = storage.packs
            assert pack.alone is not None
            assert len(pack.reads(pack.blocks)) > 3
            found = storage.read(given, {**state, held: value}, {})["a"]
        assert found.shape == shape
        assert torch.equal(found, plain)


@pytest.mark.parametrize("role", ["predict", "adapt"])
@pytest.mark.parametrize("tier", TIERS)
def test_of_a_large_parameter_there_is_one_float32_while_it_is_read(monkeypatch: pytest.MonkeyPatch, tier: str, role: str) -> None:
    """And no stretch of it is kept for the update."""
    monkeypatch.setattr(packing, "MOST", 256)
    monkeypatch.setattr(packing, "AT_ONCE", 256)
    item = compile_program(program("ecotta", tier, "sgd", role), PlacedWeights())[0]
    assert (selfcheck.check([item])[0].flips or 0.0) < 0.02
    graph, storage = item.graph, held(plain("ecotta", "sgd"), TIERS[tier], 0).storage
    large = {math.prod(place.shape) for pack in storage.packs if (place := pack.alone)}  # type: ignore[attr-defined]
    assert large
    made = [node for node in graph.nodes if node.op == "DequantizeLinear"]
    assert {math.prod(graph.values[node.outputs[0]].shape) for node in made} >= large
    if role == "predict":
        shapes = {graph.values[node.outputs[0]].shape for node in made}
        assert {node.op for node in graph.nodes if (value := graph.values[node.outputs[0]]).shape in shapes and value.dtype == np.float32} == {
            "DequantizeLinear"
        }
    readers = graph.readers()
    sliced = {out for node in graph.nodes if node.op == "Slice" for out in node.outputs if graph.values[out].dtype == np.int16}
    casts = [node.outputs[0] for node in graph.nodes if node.op == "Cast" and node.inputs[0] in sliced]
    assert bool(casts) is (tier == "compact")
    assert all(len(readers[name]) == 1 for name in casts)


def test_parameters_of_a_byte_are_made_into_values_at_once() -> None:
    """Of the pack there is no float32 but what the model reads: no cast beside the product."""
    graph = compile_program(program("ecotta", "tiny", "sgd", "predict"), PlacedWeights())[0].graph
    (pack,) = held(plain("ecotta", "sgd"), TIERS["tiny"], 0).storage.packs  # type: ignore[attr-defined]
    whole = [node for node in graph.nodes for out in node.outputs if graph.values[out].shape == (pack.divide, pack.width)]
    assert [node.op for node in whole] == ["DequantizeLinear"]


def test_a_state_that_is_put_back_goes_on_as_it_went() -> None:
    alone = Alone("tiny", "adam")
    alone.step(gradients())
    kept = {name: value.clone() for name, value in alone.state.items()}
    ends = []
    for _ in range(2):
        alone.state = {name: value.clone() for name, value in kept.items()}
        for k in range(4):
            alone.step(gradients(seed=k))
        ends.append(alone.state)
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in kept)
    alone.state = {name: value.clone() for name, value in kept.items()} | {COUNTER: kept[COUNTER] + 7}
    for k in range(4):
        alone.step(gradients(seed=k))
    assert not torch.equal(alone.state["parameters.rows"], ends[0]["parameters.rows"]), "the count of steps is what the numbers come from"


# ---------------------------------------------------------------------------------------------------------------- graphs


@pytest.mark.parametrize("optimiser", OPTIMS)
@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("kind", KINDS)
def test_graphs_compute_what_the_programs_do(kind: str, tier: str, optimiser: str) -> None:
    for role in ("adapt", "learn"):
        found = selfcheck.check(made(kind, tier, optimiser, role))[0]
        assert found.flips is not None
        assert found.flips < 0.02
        assert found.step is not None
        assert found.updates is not None
        assert found.updates < 1e-3


@pytest.mark.parametrize("optimiser", OPTIMS)
@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("kind", KINDS)
def test_steps_in_pieces_are_the_whole_step_but_for_ties(kind: str, tier: str, optimiser: str) -> None:
    whole = program(kind, tier, optimiser, statistics="source")
    sums = sums_of(dataclasses.replace(whole.model, method=whole.model.method.at(capture_at(2))), "adapt", 2, whole.example["x"][:2])
    update = update_of(sums)
    given = selfcheck.disturbed(whole, dict(whole.example))
    want = whole({name: value.clone() for name, value in given.items()})
    totals = {name: torch.zeros_like(value) for name, value in sums.example.items() if name.startswith("sum.")}
    for begin in (0, 2):
        got = sums({**given, "x": given["x"][begin : begin + 2], **totals})
        totals = {f"sum.{name.removeprefix('added.')}": value for name, value in got.items() if name.startswith("added.")}
    got = update({**given, **totals})
    for name, value in want.items():
        if name.startswith("new.") and not value.is_floating_point() and "second" not in name and "first" not in name and "momentum" not in name:
            apart = (value.long() - got[name].long()).abs()
            assert int(apart.max()) <= 1, name
            assert float((apart > 0).float().mean()) < 0.02
    torch.testing.assert_close(got["metric.update"], want["metric.update"], rtol=1e-3, atol=1e-6)


@cache
def capture_at(batch: int):  # type: ignore[no-untyped-def]
    model = named.resnet_cifar(8)
    calibrate(model, SHAPE, 0)
    return capture(model, SHAPE, batch)


def test_the_side_network_starts_as_the_model_itself() -> None:
    for tier in TIERS:
        given = program("side", tier, "adam", "predict")
        model = plain("side", "adam")
        source = build(dataclasses.replace(model, parameters={**model.parameters}), "predict", BATCH, given.example["x"])
        assert torch.equal(given(given.example)["logits"], source(source.example)["logits"])


def test_a_nan_reaches_no_table_and_the_graph_tells() -> None:
    item = compiled("side", "tiny", "adam")
    session = open_session(item.model, item.graph.constants)
    given = {entry.name: item.program.example[entry.name].numpy() for entry in session.get_inputs()}
    for odd in (np.nan, np.inf, 3e38):
        x = given["x"].copy()
        x[0, 0, 0, 0] = odd
        got = dict(zip(item.graph.outputs, session.run(None, {**given, "x": x}), strict=True))
        assert not np.isfinite(got["metric.update"])


def replaced(op: str, other: str) -> Callable[[Graph], None]:
    """The last node of a kind before what is stored is another."""

    def change(graph: Graph) -> None:
        node = next(node for node in reversed(graph.nodes) if node.op == op)
        node.op = other

    return change


def counts_from(value: int) -> Callable[[Graph], None]:
    """Random numbers of another step."""

    def change(graph: Graph) -> None:
        constant = graph.constant(value, np.int64).name
        reader = next(node for node in graph.nodes if "state.counter" in node.inputs and node.op != "Add")
        reader.inputs = [constant if name == "state.counter" else name for name in reader.inputs]

    return change


def other_unit(graph: Graph) -> None:
    """Increments are divided by a unit that is a tenth too large."""
    node = next(node for node in reversed(graph.nodes) if node.op == "Div" and "state.parameters.rows.unit" in node.inputs)
    scaled = graph.declare(graph.fresh("wrong"), graph.values["state.parameters.rows.unit"].shape, np.float32)
    graph.nodes.insert(0, Node("Mul", ["state.parameters.rows.unit", graph.constant(1.1, np.float32).name], [scaled.name]))
    node.inputs = [scaled.name if name == "state.parameters.rows.unit" else name for name in node.inputs]


@pytest.mark.parametrize(
    ("tier", "change"),
    [
        ("compact", replaced("Round", "Floor")),
        ("tiny", counts_from(77)),
        ("compact", other_unit),
        ("tiny", other_unit),
    ],
)
def test_the_self_check_finds_other_rounding_other_numbers_and_other_units(tier: str, change: Callable[[Graph], None]) -> None:
    item = compiled("side", tier, "adam")
    selfcheck.check([item])
    change(item.graph)
    item = dataclasses.replace(item, model=to_onnx(item.graph, PlacedWeights()))
    with pytest.raises(ExportError, match=r"(updates|roundings|metrics) differ from PyTorch"):
        selfcheck.check([item])
