"""The self-check finds faults: graphs that are wrong in one place each do not pass it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from edgeadapt.errors import ExportError
from edgeadapt.exporters import selfcheck
from edgeadapt.exporters.capture import capture
from edgeadapt.exporters.compile import Compiled, PlacedWeights, compile_program
from edgeadapt.exporters.emit import to_onnx
from edgeadapt.exporters.ir import Array, Graph, Node
from edgeadapt.exporters.methods import METHODS, Setup
from edgeadapt.exporters.programs import Model, build, held
from edgeadapt.exporters.quantise.calibrate import bound_to, quantised, with_gradients
from edgeadapt.exporters.quantise.layout import layout
from edgeadapt.exporters.storage import TIERS
from tests.zoo import named
from tests.zoo.calibrate import calibrate


def compiled(kind: str, role: str = "adapt") -> Compiled:
    """The quickest graph of a role."""
    return every(kind, role)[0]


def steps() -> list[Compiled]:
    """A step and its lean variant."""
    return every("ecotta", "adapt")[:2]


def every(kind: str, role: str) -> list[Compiled]:
    """All graphs of a role, to be changed at will."""
    return [dataclasses.replace(item, graph=item.graph.copy()) for item in made(kind, role)]


@cache
def made(kind: str, role: str, codes: bool = False, tier: str = "") -> list[Compiled]:
    net = named.resnet_cifar(8)
    calibrate(net, (3, 16, 16), 0)
    captured = capture(net, (3, 16, 16), 6)
    method = METHODS[kind](captured, Setup(10, 2))
    values = {**method.backbone.source_statistics(), **method.own_statistics()}
    random = torch.Generator().manual_seed(0)
    x, y = torch.randn(6, 3, 16, 16, generator=random), torch.randint(10, (6,), generator=random)
    model = Model(method, method.parameters(), values, method.statistics, method.optimiser)
    if codes:
        model = bound_to(model, with_gradients(quantised(model, layout(captured, method.entries), [x])))
    program = build(held(model, TIERS.get(tier), 0), role, 6, x, y)
    return compile_program(program, PlacedWeights())


def scaled(graph: Graph, name: str, factor: float) -> None:
    """Multiply what is written into output `name`."""
    node = next(node for node in graph.nodes if name in node.outputs)
    inner = graph.declare(graph.fresh("wrong"), graph.values[name].shape, graph.values[name].dtype)
    node.outputs[node.outputs.index(name)] = inner.name
    graph.nodes.insert(graph.nodes.index(node) + 1, Node("Mul", [inner.name, graph.constant(factor, np.float32).name], [name]))


def fed(name: str, value: float) -> Callable[[Graph], None]:
    """The graph reads a number instead of an input."""

    def change(graph: Graph) -> None:
        constant = graph.constant(value, np.float32).name
        for node in graph.nodes:
            node.inputs = [constant if item == name else item for item in node.inputs]
        graph.inputs.remove(name)

    return change


def always(graph: Graph) -> None:
    """Every comparison with the margin holds."""
    node = next(node for node in graph.nodes if node.op == "Less")
    node.inputs[1] = graph.constant(1e9, np.float32).name


def one_mask(graph: Graph) -> None:
    """A ReLU's gradient is twice what it should be."""
    node = next(node for node in graph.nodes if node.op == "Cast" and any(p.op == "Greater" and node.inputs[0] in p.outputs for p in graph.nodes))
    inner = graph.declare(graph.fresh("wrong"), graph.values[node.outputs[0]].shape, np.float32)
    outer = node.outputs[0]
    node.outputs[0] = inner.name
    graph.nodes.insert(graph.nodes.index(node) + 1, Node("Add", [inner.name, inner.name], [outer]))


@pytest.mark.parametrize("kind", ["source", "norm", "tent", "ecotta", "side"])
def test_right_graphs_pass(kind: str) -> None:
    for role in ("adapt", "learn") if METHODS[kind].trains else ("predict",):
        found = selfcheck.check([compiled(kind, role)])[0]
        assert found.logits < 1e-5
        assert found.limit == selfcheck.UPDATES
        assert (found.updates or 0.0) < 5e-3
        assert (found.metrics or 0.0) < 1e-5


@pytest.mark.parametrize(
    ("kind", "change", "what"),
    [
        ("side", one_mask, "updates"),
        ("side", always, "updates"),
        ("side", fed("hyper.regulariser", 77.0), "updates|metrics"),
        ("side", fed("hyper.momentum", 0.5), "updates"),
        ("tent", fed("hyper.momentum", 0.123), "updates"),
        ("ecotta", one_mask, "updates"),
        ("ecotta", always, "updates"),
        ("ecotta", fed("hyper.momentum", 0.123), "updates"),
        ("ecotta", fed("hyper.regulariser", 77.0), "updates|metrics"),
        ("tent", lambda graph: scaled(graph, "new.second.bn1.weight", 0.0), "updates"),
        ("tent", lambda graph: scaled(graph, "metric.entropy", 1.1), "metrics"),
        ("norm", lambda graph: scaled(graph, "new.statistics.bn1.variance", 1.005), "statistics"),
        ("norm", lambda graph: scaled(graph, "logits", 1.01), "logits"),
        ("side", lambda graph: scaled(graph, "new.side.expand.weight", 1.01), "updates"),
    ],
)
def test_wrong_graphs_do_not(kind: str, change: Callable[[Graph], None], what: str) -> None:
    item = compiled(kind, "adapt" if METHODS[kind].trains else "predict")
    change(item.graph)
    item = dataclasses.replace(item, model=to_onnx(item.graph, PlacedWeights()))
    with pytest.raises(ExportError, match=rf"({what}) differ from PyTorch"):
        selfcheck.check([item])


def test_what_single_precision_leaves_uncertain_is_allowed_for_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    item = compiled("tent")
    monkeypatch.setattr(selfcheck, "UPDATES", 1e-12)
    monkeypatch.setattr(selfcheck, "ROOM", 10.0)
    found = selfcheck.check([item])[0]
    assert 1e-9 < found.limit < 1e-4  # ten times what double precision says of torch's own rounding
    monkeypatch.setattr(selfcheck, "_in_double", lambda *_: None)
    with pytest.raises(ExportError, match="more than 1e-12"):
        selfcheck.check([item])
    monkeypatch.undo()
    scaled(item.graph, "new.first.bn1.weight", 1.05)
    with pytest.raises(ExportError, match="updates differ from PyTorch"):
        selfcheck.check([dataclasses.replace(item, model=to_onnx(item.graph, PlacedWeights()))])


def test_kinks_that_double_precision_does_not_show_are_allowed_for_within_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """A ReLU at zero may switch for onnxruntime and neither for torch nor in double precision, but with noise in the inputs."""
    item, name = compiled("tent"), "first.bn1.weight"
    item = dataclasses.replace(item, graph=item.graph.copy())
    example = next(selfcheck.examples(item))
    got = {key: value.detach().numpy() for key, value in item.program({key: value.clone() for key, value in example.items()}).items()}
    start = example[f"state.{name}"].numpy()

    def off(share: float) -> dict[str, Array]:
        return {**got, f"new.{name}": got[f"new.{name}"] * (1 + share) - share * start}

    def refused(share: float) -> bool:
        try:
            selfcheck.refuse(selfcheck.compare_at(item, example, off(share)))
        except ExportError:
            return True
        return False

    assert [refused(share) for share in (0.01, 0.03)] == [False, True]
    monkeypatch.setattr(selfcheck, "_noisy", lambda *_: [off(0.0), off(0.04)])
    assert [refused(share) for share in (0.03, 0.07, 0.09)] == [False, False, True]
    monkeypatch.setattr(selfcheck, "_noisy", lambda *_: [off(0.5)])
    assert [refused(share) for share in (0.09, 0.11)] == [False, True]


def with_codes(tier: str = "") -> Compiled:
    """A step of EcoTTA over a frozen model in 8 bits, to be changed at will."""
    item = made("ecotta", "adapt", True, tier)[0]
    return dataclasses.replace(item, graph=item.graph.copy())


def written(item: Compiled) -> Compiled:
    """With what was changed of its graph."""
    return dataclasses.replace(item, model=to_onnx(item.graph, PlacedWeights()))


def unsure(monkeypatch: pytest.MonkeyPatch, changed: Callable[[str, Array, Array], Array]) -> None:
    """Double precision gives something else; changed: of an output's name, its value, and that before the step."""
    exact = selfcheck._in_double

    def other(program: Any, example: Any) -> Any:
        found = exact(program, example)
        before = {f"new.{name.removeprefix('state.')}": value.numpy() for name, value in example.items()}
        return found and {name: changed(name, value, before.get(name, value)) for name, value in found.items()}

    monkeypatch.setattr(selfcheck, "_in_double", other)


def test_updates_of_codes_that_hang_on_rounding_are_let_pass_and_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where single precision is itself half an update from double, nothing can be said of a graph; where it is near, a wrong one is refused."""
    item = with_codes()
    assert not selfcheck.check([item])[0].unchecked
    scaled(item.graph, "new.momentum.meta.0.conv.weight", 1.8)
    item = written(item)
    with pytest.raises(ExportError, match=r"updates differ from PyTorch.*worst in momentum\.meta\.0\.conv\.weight"):
        selfcheck.check([item])
    unsure(monkeypatch, lambda name, value, before: value + 0.5 * (value - before) if "meta.0.conv" in name else value)
    found = selfcheck.check([item])[0]
    assert found.unchecked == ("meta.0.conv.weight", "momentum.meta.0.conv.weight")
    assert found.plain()["unchecked"] == list(found.unchecked)
    assert "unchecked" not in selfcheck.Difference("adapt.b6", 0.0, 0.0, None, None, "").plain()
    other = dataclasses.replace(item, graph=item.graph.copy())
    scaled(other.graph, "new.momentum.meta.1.conv.weight", 1.8)  # one that cannot be checked excuses no other
    with pytest.raises(ExportError, match=r"updates differ from PyTorch.*worst in momentum\.meta\.1\.conv\.weight"):
        selfcheck.check([written(other)])
    scaled(item.graph, "logits", 2.0)  # the rest is checked all the same
    with pytest.raises(ExportError, match="logits differ from PyTorch"):
        selfcheck.check([written(item)])


def test_logits_that_hang_on_rounding_excuse_no_update(monkeypatch: pytest.MonkeyPatch) -> None:
    item = with_codes()
    unsure(monkeypatch, lambda name, value, before: 1.2 * value if name == "logits" else value)
    assert selfcheck.check([item])[0].loose == selfcheck.SPREAD_MOST
    scaled(item.graph, "new.momentum.meta.1.conv.weight", 1.3)
    with pytest.raises(ExportError, match=r"updates differ from PyTorch by .* more than 5e-02, worst in momentum\.meta\.1\.conv\.weight"):
        selfcheck.check([written(item)])


def test_what_is_rounded_otherwise_is_counted_tensor_by_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    """That double precision rounds the momentum otherwise says nothing of the parameters, nor do logits that hang on rounding."""
    item = with_codes("compact")
    right = selfcheck.check([item])[0]
    assert right.flips_limit < 0.2
    node = next(node for node in reversed(item.graph.nodes) if node.op == "Round")  # of the parameters
    node.op = "Floor"
    item = written(item)
    with pytest.raises(ExportError, match=r"roundings differ from PyTorch.*worst in parameters\."):
        selfcheck.check([item])
    random = np.random.default_rng(0)

    def other(name: str, value: Array, before: Array) -> Array:
        if name == "new.momentum.parameters":
            return np.where(random.random(value.shape) < 0.6, value + np.where(value > 100, -1, 1).astype(value.dtype), value)
        return 1.2 * value if name == "logits" else value

    unsure(monkeypatch, other)
    with pytest.raises(ExportError, match=r"roundings differ from PyTorch.*worst in parameters\."):
        selfcheck.check([item])


def test_what_noise_in_the_inputs_does_is_allowed_for_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """A code more or less may be rare, and double precision not show it. What noise does not do to an update stays refused."""
    item, names = with_codes(), ("meta.1.conv.weight", "momentum.meta.1.conv.weight")
    scaled(item.graph, f"new.{names[1]}", 1.3)
    item, real = written(item), selfcheck._noisy

    def once(program: Any, example: Any) -> Any:
        first, *more = real(program, example)
        moved = {f"new.{name}": first[f"new.{name}"] * 1.4 - 0.4 * example[f"state.{name}"].numpy() for name in names}
        return [{**first, **moved}, *more]

    monkeypatch.setattr(selfcheck, "_noisy", once)
    found = selfcheck.check([item])[0]
    assert found.unchecked == names
    monkeypatch.undo()
    with pytest.raises(ExportError, match="updates differ from PyTorch"):
        selfcheck.check([item])


@pytest.mark.parametrize("codes", [True, False])
def test_single_elements_of_an_update_may_turn_where_there_are_codes(codes: bool) -> None:
    """Of a tensor of 144 elements four may, and eight may not."""
    item = with_codes() if codes else compiled("ecotta")
    example = next(selfcheck.examples(item))
    got = {name: value.detach().numpy() for name, value in item.program({name: value.clone() for name, value in example.items()}).items()}
    name = max((name for name in item.writes if name.endswith("meta.1.conv.weight")), key=len)
    refused = []
    for count in (0, 4, 8):
        turned = got[f"new.{name}"].copy()
        turned.flat[np.argsort(-np.abs(turned - example[f"state.{name}"].numpy()), axis=None)[:count]] *= -1.0
        try:
            selfcheck.refuse(selfcheck.compare_at(item, example, {**got, f"new.{name}": turned}))
        except ExportError:
            refused.append(count)
    assert refused == ([8] if codes else [4, 8])


class Ranks(nn.Module):
    """Maps, then a row of them, then maps again."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv, self.conv_norm = nn.Conv2d(8, 12, 3, padding=1, stride=2), nn.BatchNorm2d(12)
        self.row, self.row_norm = nn.Conv1d(12, 12, 3, padding=1), nn.BatchNorm1d(12)
        self.last, self.last_norm, self.head = nn.Conv2d(12, 12, 1), nn.BatchNorm2d(12), nn.Linear(12, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem_norm(self.stem(x)).relu()
        x = self.conv_norm(self.conv(x)).relu().flatten(2)
        x = self.row_norm(self.row(x)).relu().unflatten(2, (4, 4))
        x = self.last_norm(self.last(x)).relu()
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]


def test_parts_may_end_in_another_number_of_axes() -> None:
    net = calibrate(Ranks(), (3, 8, 8), 0)
    method = METHODS["ecotta"](capture(net, (3, 8, 8), 5), Setup(4, 3, ("relu", "view", "view_1", "relu_3")))
    assert [len(cut.spatial) for cut in method.cuts] == [2, 1, 2, 2]  # type: ignore[attr-defined]
    values = {**method.backbone.source_statistics(), **method.own_statistics()}
    random = torch.Generator().manual_seed(0)
    x, y = torch.randn(5, 3, 8, 8, generator=random), torch.randint(4, (5,), generator=random)
    program = build(Model(method, method.parameters(), values, method.statistics, method.optimiser), "adapt", 5, x, y)
    found = selfcheck.check(compile_program(program, PlacedWeights())[:1])[0]
    assert (found.updates or 0.0) < selfcheck.UPDATES


def test_a_variant_that_gives_other_bits_does_not_pass() -> None:
    base, variant = steps()
    selfcheck.check([base, variant])
    scaled(variant.graph, "new.momentum.meta.0.conv.weight", 1.0 + 2.0**-23)
    with pytest.raises(ExportError, match=r"adapt\.b6\.lean: new\.momentum\.meta\.0\.conv\.weight is not what adapt\.b6 gives"):
        selfcheck.check([base, dataclasses.replace(variant, model=to_onnx(variant.graph, PlacedWeights()))])


def test_more_roundings_may_differ_where_double_precision_rounds_otherwise_too_and_no_more() -> None:
    def of(flips: float, limit: float) -> selfcheck.Difference:
        return selfcheck.Difference("adapt.b6", 0.0, 0.0, None, None, "head", flips=flips, flips_limit=limit)

    selfcheck.refuse(of(0.8, 1.2))
    for flips, limit in ((0.8, 0.7), (0.11, selfcheck.FLIPS)):
        with pytest.raises(ExportError, match="roundings differ"):
            selfcheck.refuse(of(flips, limit))
    for pair in ((of(0.8, 1.2), of(0.11, 0.1)), (of(0.11, 0.1), of(0.8, 1.2))):
        with pytest.raises(ExportError, match="roundings differ"):
            selfcheck.refuse(pair[0].or_worse(pair[1]))
