"""Steps in pieces on the workstation: their programs are the whole step's, in double precision, and what is exported of them is what can be."""

from __future__ import annotations

import dataclasses
import math
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgeadapt.bundle import Bundle, Form
from edgeadapt.errors import ExportError, UsageError
from edgeadapt.exporters import pieces
from edgeadapt.exporters.capture import Captured, capture
from edgeadapt.exporters.compile import Compiled, PlacedWeights, compile_program
from edgeadapt.exporters.emit import to_onnx
from edgeadapt.exporters.export import export
from edgeadapt.exporters.ir import Node
from edgeadapt.exporters.methods import METHODS, Setup
from edgeadapt.exporters.methods.base import Term, entropy, loss
from edgeadapt.exporters.micro import Sums, sums_of, update_of
from edgeadapt.exporters.options import Options
from edgeadapt.exporters.pieces import suited
from edgeadapt.exporters.programs import Model, build
from edgeadapt.memory import read
from edgeadapt.memory.figures import figures
from edgeadapt.memory.rules import misplaced_sums
from edgeadapt.preprocess import PREPROCESSING
from edgeadapt.runtime import loading
from edgeadapt.runtime.adapter import Adapter
from edgeadapt.runtime.choice import Choice, alone
from edgeadapt.runtime.memory import Needs, planned
from edgeadapt.runtime.state import FlatState
from tests.reference import EcoTTA, Side, Tent, twin
from tests.test_reference import disturbed, doubles
from tests.zoo.calibrate import calibrate
from tests.zoo.named import resnet_cifar

BATCH, CLASSES, SHAPE, PARTS = 8, 10, (3, 32, 32), (1, 1, 1)


@cache
def network() -> nn.Module:
    """A random model with plausible statistics. Nobody changes it."""
    return calibrate(resnet_cifar(8), SHAPE)


@cache
def captured(batch: int) -> Captured:
    return capture(network(), SHAPE, batch)


def stream(seed: int = 0) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(BATCH, *SHAPE, generator=random, dtype=torch.float64), torch.randint(CLASSES, (BATCH,), generator=random)


def wide(table: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.double() if value.is_floating_point() else value for name, value in table.items()}


@dataclasses.dataclass
class Case:
    """One step's programs over one model in double precision: at once, by `micro`, and the end."""

    whole: Any
    sums: Sums
    update: Any
    given: dict[str, Tensor]

    def in_pieces(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        size, held, logits = self.sums.batch, {}, []
        for name, value in self.sums.example.items():
            if name.startswith("sum."):
                held[name] = torch.zeros_like(value, dtype=torch.float64)
        for begin in range(0, BATCH, size):
            rows = slice(begin, begin + size)
            out = self.sums({**self.given, "x": x[rows], **({"y": y[rows]} if "y" in self.given else {}), **held})
            logits.append(out.pop("logits"))
            held = {f"sum.{name.removeprefix('added.')}": value for name, value in out.items()}
        return {"logits": torch.cat(logits), **self.update({**self.given, **held})}


def case(kind: str, role: str, micro: int, optimiser: str, **hyper: float) -> Case:
    """Of a method whose statistics stay."""

    def model(batch: int) -> Model:
        method = METHODS[kind](captured(batch), Setup(CLASSES, 3))
        values = {**method.backbone.source_statistics(), **method.own_statistics()}
        return Model(method, method.parameters(), values, "source", optimiser)

    x, y = torch.zeros(BATCH, *SHAPE), torch.zeros(BATCH, dtype=torch.int64)
    whole = build(model(BATCH), role, BATCH, x, y)
    sums = sums_of(model(micro), role, micro, x[:micro], y[:micro])
    given = wide(dict(whole.example))
    given |= {f"state.{name}": value.double() for name, value in disturbed(whole.model.state()).items() if f"state.{name}" in given}
    given |= {f"hyper.{name}": torch.tensor(value, dtype=torch.float64) for name, value in hyper.items() if f"hyper.{name}" in given}
    return Case(whole, sums, update_of(sums), given)


def margin(of: Case, x: Tensor, selected: int) -> Tensor:
    """That selects so many of the frames."""
    with doubles():
        levels = (entropy(of.whole({**of.given, "x": x})["logits"]) / math.log(CLASSES)).sort().values
    edges = [0.0, *((levels[1:] + levels[:-1]) / 2).tolist(), 2.0]
    return torch.tensor(edges[selected], dtype=torch.float64)


@pytest.mark.parametrize("micro", [1, 2, 4])
@pytest.mark.parametrize("optimiser", ["sgd", "adam"])
@pytest.mark.parametrize("kind", ["side", "tent", "ecotta"])
def test_runs_and_an_update_are_the_whole_step(kind: str, optimiser: str, micro: int) -> None:
    """Steps one after the other, where no frame, one, some and all are selected."""
    both = case(kind, "adapt", micro, optimiser, rate=0.01)
    has_margin = "hyper.margin" in both.given
    for step, selected in enumerate((0, 1, 5, BATCH) if has_margin else (BATCH,) * 2):
        x, y = stream(step)
        if has_margin:
            both.given["hyper.margin"] = margin(both, x, selected)
        with doubles():
            want, got = both.whole({**both.given, "x": x}), both.in_pieces(x, y)
        assert want.keys() == got.keys()
        for name, value in want.items():
            assert torch.allclose(value, got[name], rtol=1e-9, atol=1e-11), (step, name)
        if has_margin:
            assert float(want["metric.selected"]) == selected / BATCH
        both.given |= {f"state.{name.removeprefix('new.')}": value for name, value in want.items() if name.startswith("new.")}


@pytest.mark.parametrize("micro", [1, 4])
@pytest.mark.parametrize("kind", ["side", "tent", "ecotta"])
def test_runs_and_an_update_learn_as_the_whole_step(kind: str, micro: int) -> None:
    both = case(kind, "learn", micro, METHODS[kind].optimiser, rate=0.01)
    for step in range(2):
        x, y = stream(step)
        with doubles():
            want, got = both.whole({**both.given, "x": x, "y": y}), both.in_pieces(x, y)
        for name, value in want.items():
            assert torch.allclose(value, got[name], rtol=1e-9, atol=1e-11), (step, name)
        both.given |= {f"state.{name.removeprefix('new.')}": value for name, value in want.items() if name.startswith("new.")}


@pytest.mark.parametrize("kind", ["side", "tent", "ecotta"])
def test_runs_and_an_update_are_the_plain_implementation_in_torch(kind: str) -> None:
    both = case(kind, "adapt", 2, METHODS[kind].optimiser, rate=0.01)
    x, y = stream(3)
    if "hyper.margin" in both.given:
        both.given["hyper.margin"] = margin(both, x, 3)
    scalars = {name.removeprefix("hyper."): float(value) for name, value in both.given.items() if name.startswith("hyper.")}
    options = {"live": False, "optimiser": METHODS[kind].optimiser, **scalars}
    plain = (EcoTTA(network(), PARTS, **options) if kind == "ecotta" else {"tent": Tent, "side": Side}[kind](network(), **options)).double()
    own = both.sums.model.method.own_statistics()  # which do not move here either
    for name, layer in plain.norms.items():
        if f"{name}.mean" in own:
            layer.mean, layer.variance = own[f"{name}.mean"].double(), own[f"{name}.variance"].double()
    plain.load({name.removeprefix("state."): value for name, value in both.given.items() if name.startswith("state.")})
    for _ in range(2):
        with doubles():
            ours, theirs = both.in_pieces(x, y), plain.adapt(x)
        assert torch.allclose(ours["logits"], theirs, rtol=1e-7, atol=1e-8)
        both.given |= {f"state.{name.removeprefix('new.')}": value for name, value in ours.items() if name.startswith("new.")}
    after = plain.state()
    for name in plain.trained:
        assert torch.allclose(ours[f"new.{name}"], after[name], rtol=1e-6, atol=1e-8), name


def test_the_regulariser_of_ecotta_keeps_no_sums_of_what_it_does_not_reach() -> None:
    """And a kind of mean has one gradient sum a parameter, whatever terms it has."""
    both = case("ecotta", "adapt", 2, "sgd")
    kept = {name.removeprefix("sum.") for name in both.sums.example if name.startswith("sum.gradient.")}
    parameters = set(both.whole.model.parameters)
    assert kept == {f"gradient.{over}.{name}" for over in ("selected", "all") for name in parameters}
    learned = {name for name in case("ecotta", "learn", 2, "sgd").sums.example if name.startswith("sum.gradient.")}
    assert learned == {f"sum.gradient.all.{name}" for name in parameters}


def test_terms() -> None:
    one, other = Term(torch.tensor(6.0), "selected", torch.tensor(3.0)), Term(torch.tensor(0.5))
    assert (float(one.mean), float(other.mean), float(loss((one, other)))) == (2.0, 0.5, 2.5)
    assert float(Term(torch.tensor(0.0), "selected", torch.tensor(0.0)).mean) == 0.0


def test_live_statistics_have_no_pieces() -> None:
    method = METHODS["tent"](captured(2), Setup(CLASSES))
    live = Model(method, method.parameters(), method.backbone.source_statistics(), "live", "adam")
    with pytest.raises(ExportError, match="need all frames of a step at once"):
        sums_of(live, "adapt", 2, torch.zeros(2, *SHAPE))


# ------------------------------------------------------------------------------------------------------- what is exported


@pytest.mark.parametrize(("batch", "sizes"), [(1, []), (2, [1]), (4, [1]), (6, [1]), (8, [2, 1]), (10, [2, 1]), (16, [4, 1]), (64, [16, 1])])
def test_a_quarter_and_a_single_frame_are_tried(batch: int, sizes: list[int]) -> None:
    assert suited(batch) == sizes


SMALL = SHAPE


def data(count: int = 48) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    return random.standard_normal((count, *SMALL)).astype(np.float32), random.integers(0, CLASSES, count)


def exported(output: Path | None, model: nn.Module | None = None, **choices: Any) -> Any:
    chosen = {"method": "side", "batches": (8,), "allow_drop": True, "width": 16, "threads": 1} | choices
    return export(model or calibrate(resnet_cifar(8), SMALL), output, shape=SMALL, data=data(), **chosen)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("micro") / "side.edgeadapt"
    report = exported(path)
    assert "left out" not in report.table()
    return path


def test_what_saves_memory_is_exported(place: Path) -> None:
    manifest = Bundle.open(place).manifest
    assert [form.micro for form in manifest.forms("adapt", 8)][-2:] == [2, 1]
    whole, *forms = (max(manifest.graphs[name].region_bytes for name in form.graphs) for form in manifest.forms("adapt", 8))
    for need in forms:
        assert need < 0.9 * whole
        whole = need
    assert {"adapt-sums.b1", "adapt-update", "learn-sums.b2"} < set(manifest.selfcheck)
    checks = [found for name, found in manifest.selfcheck.items() if name != PREPROCESSING]
    assert all(found["updates"] <= found["updates_limit"] for found in checks if found["updates"] is not None)


def test_an_exported_bundle_says_of_each_graph_what_reading_it_says(place: Path) -> None:
    bundle = Bundle.open(place)
    assert {spec.role for spec in bundle.manifest.graphs.values()} >= {"adapt", "adapt-sums", "adapt-update", "learn", "predict", "source"}
    for name, spec in bundle.manifest.graphs.items():
        assert spec.figures == figures(read(bundle.graph_bytes(name))), name
        assert spec.figures is not None
        assert spec.figures.exact


@pytest.mark.parametrize("role", ["adapt", "learn"])
def test_a_bundle_adapts_in_pieces_as_torch_does_at_once(place: Path, role: str) -> None:
    bundle = Bundle.open(place)
    manifest, needs = bundle.manifest, Needs(bundle, 1)
    for form in (form for form in manifest.forms(role, 8) if form.micro):
        names = ["predict.b1", *form.graphs]
        forms: tuple[Form, ...] = (*alone(manifest, names[:1]), form)
        plan = planned(needs, names, frames=8)
        state = FlatState(manifest.state, {name: manifest.graphs[name] for name in names}, bundle.initial_state())
        adapter = Adapter(bundle, loading.Loaded(Choice(plan, plan, (), forms), state, loading.load(bundle, state, 1, plan)), None, 1)
        x, y = data(40)
        levels = entropy(torch.from_numpy(adapter.predict(x))) / math.log(CLASSES)
        adapter.hyper = {"margin": float(levels.median())}
        plain = twin_of(bundle, role, float(levels.median()))
        for begin in range(0, 40, 8):
            rows = slice(begin, begin + 8)
            told = (torch.from_numpy(x[rows]), torch.from_numpy(y[rows]))
            want = plain.learn(*told) if role == "learn" else plain.adapt(told[0])
            got = adapter.learn(x[rows], y[rows]) if role == "learn" else adapter.adapt(x[rows])
            assert np.allclose(got, want.numpy(), atol=2e-3)
        after, start, ours = plain.state(), bundle.initial_state(), adapter.state
        for name in plain.trained:
            update = np.linalg.norm(after[name].numpy() - start[name])
            assert np.linalg.norm(ours[name] - after[name].numpy()) <= 2e-2 * update + 1e-6, name
        assert adapter.stats["steps"] == 5


def twin_of(bundle: Bundle, role: str, margin: float) -> Any:
    manifest = bundle.manifest
    model = calibrate(resnet_cifar(8), SMALL)
    plain = twin(model, manifest.to_json(), bundle.initial_state(), 8, role, width=16, margin=margin)
    indices = [torch.from_numpy(data()[0][rows]) for rows in calibration(manifest)]
    plain.calibrate(indices)
    return plain


def calibration(manifest: Any) -> list[np.ndarray]:
    """The rows that the export calibrated on."""
    from edgeadapt.bundle import InputSpec
    from edgeadapt.exporters.data import Samples
    from edgeadapt.exporters.options import calibration_rows

    samples = Samples(*data(), InputSpec(SMALL))
    kept, _ = samples.split(Options.holdout, 0)
    return calibration_rows(kept, min(Options.warmup_batch, len(kept)), 0)


def test_sizes_may_be_chosen() -> None:
    graphs = exported(None, micro=(4,)).manifest["graphs"]
    assert {name for name in graphs if "-" in name} == {"adapt-sums.b4", "adapt-update", "learn-sums.b4", "learn-update"}
    assert not {name for name in exported(None, micro="none").manifest["graphs"] if "-" in name}


class Mixing(nn.Module):
    """Looks at several frames at once: each sees the mean of all."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.linear = nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)).relu()
        x = x - x.mean(0, keepdim=True)
        return self.linear(x.mean((2, 3)))


def test_what_is_not_the_whole_step_is_left_out_with_a_note() -> None:
    report = exported(None, Mixing())
    assert not {name for name in report.manifest["graphs"] if "-" in name}
    assert report.manifest["statistics"]["mode"] == "none"
    left_out = {"adapt-sums.b2", "adapt-sums.b1", "learn-sums.b2", "learn-sums.b1"}
    assert set(report.manifest["selfcheck"]) - set(report.manifest["graphs"]) == {PREPROCESSING, *left_out}
    assert "left out: adapt-sums.b2: self-check of adapt-sums.b2 at batch 8: logits differ" in report.table()


@dataclasses.dataclass
class Steps:
    """The adapt graph of a side network, and what gives the programs of its pieces."""

    compiled: list[Compiled]

    def made(self, role: str, size: int) -> Sums:
        program = self.compiled[0].program
        model = dataclasses.replace(program.model, method=program.model.method.at(captured(size)))
        return sums_of(model, role, size, program.example["x"][:size])

    def cut(self, *sizes: int) -> pieces.Pieces:
        return pieces.cut_steps(self.compiled, self.made, sizes or None, PlacedWeights())


@pytest.fixture(scope="module")
def steps() -> Steps:
    method = METHODS["side"](captured(BATCH), Setup(CLASSES, width=8))
    model = Model(method, method.parameters(), method.backbone.source_statistics(), "source", "sgd")
    x = torch.randn(BATCH, *SHAPE, generator=torch.Generator().manual_seed(0))
    return Steps(compile_program(build(model, "adapt", BATCH, x), PlacedWeights()))


def test_pieces_of_any_size_share_the_graph_that_ends_the_step(steps: Steps) -> None:
    found = steps.cut(2, 4)
    assert [item.name for item in found.compiled] == ["adapt-sums.b4", "adapt-sums.b2", "adapt-update"] == [item.graph for item in found.differences]
    assert found.left_out == {}
    assert found.compiled[0].sums == found.compiled[2].sums
    assert found.compiled[2].writes == steps.compiled[0].writes
    assert not misplaced_sums(found.compiled[0].graph, found.compiled[0].sums)


def test_a_micro_batch_that_cannot_be_run_is_left_out_with_a_note(steps: Steps, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Sums.shares

    def shares(self: Sums, given: Any) -> Any:
        if self.batch == 1:
            raise ValueError("Expected more than 1 value per channel")
        return real(self, given)

    monkeypatch.setattr(Sums, "shares", shares)
    found = steps.cut()
    assert [item.name for item in found.compiled] == ["adapt-sums.b2", "adapt-update"]
    assert found.left_out == {"adapt-sums.b1": "the step cannot be run on 1 of its frames: Expected more than 1 value per channel"}


def test_what_saves_too_little_is_not_kept(steps: Steps, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "sums_bytes", lambda shapes: steps.compiled[0].region)
    assert steps.cut() == pieces.Pieces()
    assert [item.name for item in steps.cut(2).compiled] == ["adapt-sums.b2", "adapt-update"]  # asked for


WRONG = ("added.gradient.selected.side.residual.weight", "added.count.selected", "added.loss.selected", "new.side.residual.weight")


@pytest.mark.parametrize("wrong", WRONG)
def test_the_self_check_finds_pieces_that_add_up_to_something_else(steps: Steps, monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    """What is added last in one place is half as much again."""
    real = pieces._Cutter.make

    def compiled(self: Any, program: Any) -> Any:
        found = real(self, program)
        if wrong not in found.graph.outputs:
            return found
        graph = found.graph
        node = next(node for node in graph.nodes if wrong in node.outputs)
        inner = graph.declare(graph.fresh("wrong"), graph.values[node.inputs[1]].shape, np.float32)
        graph.nodes.insert(graph.nodes.index(node), Node("Mul", [node.inputs[1], graph.constant(1.5, np.float32).name], [inner.name]))
        node.inputs[1] = inner.name
        return dataclasses.replace(found, model=to_onnx(graph, PlacedWeights()))

    monkeypatch.setattr(pieces._Cutter, "make", compiled)
    found = steps.cut(2)
    assert found.compiled == []
    assert list(found.left_out) == ["adapt-sums.b2"]
    assert "self-check of adapt-sums.b2 at batch 8: " in found.left_out["adapt-sums.b2"]


@pytest.mark.parametrize(
    ("choices", "told"),
    [
        ({"micro": (3,)}, "a micro-batch of 3 is no part of a batch of 8"),
        ({"micro": (8,)}, "a micro-batch of 8 is no part of a batch of 8"),
        ({"micro": (0,)}, "no choice of micro-batches"),
        ({"micro": ()}, "no choice of micro-batches"),
        ({"micro": "some"}, "no choice of micro-batches"),
        ({"micro": (2,), "method": "norm", "width": None}, "norm has no use for micro"),
        ({"micro": (2,), "method": "tent", "width": None}, "statistics that follow the stream need all frames of a step at once"),
    ],
)
def test_choices_that_cannot_be(choices: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError) as refused:
        exported(None, **choices)
    assert told in refused.value.message
