"""RoTTA and CoTTA beside plain PyTorch, step after step in double precision; their memory, their augmentation, and their bundles."""

from __future__ import annotations

import copy
import math
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgeadapt.corruptions.streams import correlated
from edgeadapt.errors import ExportError, UsageError
from edgeadapt.exporters import selfcheck
from edgeadapt.exporters.backbone import Normaliser
from edgeadapt.exporters.capture import Captured, capture
from edgeadapt.exporters.compile import PlacedWeights, compile_program, lowered
from edgeadapt.exporters.export import export
from edgeadapt.exporters.methods import METHODS, Setup
from edgeadapt.exporters.methods.augmentation import ANGLE, SCALE, SHIFT, STREAMS, augmented
from edgeadapt.exporters.methods.rotta import Rotta as OurRotta
from edgeadapt.exporters.noise import uniform
from edgeadapt.exporters.programs import Model, Program, build, last_parts
from edgeadapt.exporters.schedules import Schedules
from edgeadapt.exporters.storage import TIERS, Packed
from edgeadapt.runtime.adapter import Adapter
from tests.reference import Cotta, Rotta
from tests.reference.teachers import Item, Memory
from tests.test_reference import BATCH, CLASSES, SHAPE, disturbed, doubles, largest, network, stream
from tests.test_reliable import grouped, labelled, scalars, start_of, state_of, stepped
from tests.zoo.data import IMAGENET_MEAN, IMAGENET_STD, Pack, pack_fixture, to_float  # noqa: F401
from tests.zoo.named import load_weights, resnet_cifar

CAPACITY, AUGMENTATIONS = 12, 3
HYPER = {"mix": 0.3, "rate": 0.01, "teacher": 0.2}


@cache
def varied(name: str) -> nn.Module:
    """A small model whose predictions for the stream are of many classes."""
    model = copy.deepcopy(network(name))
    last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    x = torch.cat([x for x, _ in stream(6)]).float()
    with torch.no_grad():
        logits = model(x)
        last.weight.mul_(2.0 / logits.std(0).unsqueeze(1))
        last.bias.sub_(logits.mean(0)).mul_(2.0 / logits.std(0))
    return model


@cache
def traced(name: str) -> Captured:
    return capture(varied(name), SHAPE, BATCH)


def program_of(name: str, kind: str, role: str = "adapt", **settings: Any) -> Program:
    """A method's program over one of the models, its parameters away from where the model has them."""
    method = METHODS[kind](traced(name), Setup(CLASSES, settings=settings))
    parameters = disturbed({key: ("parameter", value) for key, value in method.parameters().items()}) if kind == "rotta" else method.parameters()
    model = Model(method, parameters, method.backbone.source_statistics(), "live", method.optimiser)
    return build(model, role, BATCH, torch.zeros(BATCH, *SHAPE), torch.zeros(BATCH, dtype=torch.int64))


def shown(x: Tensor, count: int, index: int = 0) -> Tensor:
    with doubles():
        return augmented(x, torch.tensor(count), 0, STREAMS * index)


def rotta_pair(name: str, role: str = "adapt", **hyper: float) -> tuple[Program, dict[str, Tensor], Rotta]:
    program = program_of(name, "rotta", role, capacity=CAPACITY)
    given = start_of(program, **{**HYPER, **hyper})
    plain = Rotta(varied(name), shown, CAPACITY, **scalars(given, "mix", "rate", "momentum", "teacher", "timeliness", "uncertainty")).double()
    plain.load(state_of(given))
    return program, given, plain


def agree(ours: dict[str, Tensor], theirs: dict[str, Tensor], within: float = 1e-8) -> None:
    assert set(ours) == set(theirs)
    for key, value in theirs.items():
        assert largest(ours[key] - value) <= within * max(largest(value), 1e-6), key


@pytest.mark.parametrize("name", ["resnet14", "wideresnet10"])
def test_rotta_follows_the_plain_implementation(name: str) -> None:
    """From an empty memory to one that is nearly full, and frames give way."""
    program, given, plain = rotta_pair(name)
    held = []
    for x, _ in stream(6):
        ours, logits = stepped(program, given, x), plain.adapt(x)
        agree(ours, {"logits": logits, **plain.state()})
        held.append([item.age for item in plain.memory.items])
    assert 0 < len(held[0]) < len(held[-1]) <= CAPACITY
    assert len(held[-1]) >= 8
    assert min(held[-1]) <= BATCH < max(held[-1])
    assert any(age + BATCH not in held[-1] for age in held[-2])


def test_rotta_learns_from_labels_and_predicts_with_its_teacher() -> None:
    """A labelled step moves student and teacher and leaves the memory; a prediction changes nothing."""
    program, given, plain = rotta_pair("resnet14", "learn")
    for x, y in stream(3):
        given["y"] = y
        ours, logits = stepped(program, given, x), plain.learn(x, y)
        theirs = {key: value for key, value in plain.state().items() if not key.startswith(("memory.statistics", "memory.counter"))}
        agree(ours, {"logits": logits, **theirs})
    predict = program_of("resnet14", "rotta", "predict", capacity=CAPACITY)
    again = {**start_of(predict), **{key: value for key, value in given.items() if key.startswith("state.")}}
    with doubles():
        out = predict({**again, "x": x})
    assert set(out) == {"logits"}
    assert largest(out["logits"] - plain.predict(x)) < 1e-8


def test_rotta_trains_the_last_parts_alone_where_it_is_told_to() -> None:
    method = METHODS["rotta"](traced("wideresnet10"), Setup(CLASSES, train=1, settings={"capacity": CAPACITY}))
    model = last_parts(Model(method, method.parameters(), method.backbone.source_statistics(), "live", "adam"), 1)
    assert set(model.parameters) < set(method.parameters())
    step = build(model, "adapt", BATCH, torch.zeros(BATCH, *SHAPE))
    out = step({**step.example, "hyper.teacher": torch.tensor(0.5), "x": next(stream(1))[0].float()})
    for name, value in method.parameters().items():
        assert torch.equal(out[f"new.memory.teacher.{name}"], value) == (name not in model.parameters), name


@pytest.mark.parametrize(("capacity", "classes", "turns"), [(12, 10, 5), (8, 3, 8), (5, 7, 4), (1, 2, 3), (6, 2, 16)])
def test_frames_come_into_the_memory_and_give_way_as_in_the_paper(capacity: int, classes: int, turns: int) -> None:
    """Against lists for each class, frame by frame, for streams of random classes, also in runs."""
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(4), nn.Linear(4, classes)).eval()
    method = METHODS["rotta"](capture(model, (4,), turns), Setup(classes, settings={"capacity": capacity}))
    assert isinstance(method, OurRotta)
    random = torch.Generator().manual_seed(capacity)
    plain = Memory(capacity, classes, 0.8, 1.3)
    hyper = {"timeliness": torch.tensor(0.8).double(), "uncertainty": torch.tensor(1.3).double()}
    bank = {name: value.double() for name, value in method.memory().items() if name in ("labels", "uncertainty", "ages")}
    tags, total = torch.zeros(capacity), 0
    with doubles():
        for step in range(30):
            logits = torch.randn(turns, classes, generator=random) * 2.0
            logits[:, step // 4 % classes] += 3.0 * (step % 3)
            total += turns
            mine = torch.arange(total - turns, total) + 1.0
            items, bank = method._taken(logits, bank, hyper)
            tags = torch.cat([tags, mine])[items]
            for tag, row in zip(mine, logits):
                plain.add(Item(tag, int(row.argmax()), float(torch.distributions.Categorical(logits=row).entropy())))
            wanted = plain.items
            count = len(wanted)
            assert bank["labels"].tolist() == [*(float(item.label) for item in wanted), *[-1.0] * (capacity - count)]
            assert bank["ages"].tolist() == [*(float(item.age) for item in wanted), *[0.0] * (capacity - count)]
            assert tags.tolist() == [float(wanted[slot % count].frame) for slot in range(capacity)]
            assert largest(bank["uncertainty"][:count] - torch.tensor([item.uncertainty for item in wanted])) < 1e-12
    assert count == capacity


def cotta_pair(name: str, role: str = "adapt", **hyper: float) -> tuple[Program, dict[str, Tensor], Cotta]:
    program = program_of(name, "cotta", role, augmentations=AUGMENTATIONS)
    given = start_of(program, **{**HYPER, "rate": 1e-3, "restore": 0.1, **hyper})
    own = scalars(given, "mix", "rate", "momentum", "teacher", "threshold", "restore")

    def draw(index: int, shape: torch.Size, count: int) -> Tensor:
        with doubles():
            drawn = uniform(torch.tensor(count), 0, STREAMS * AUGMENTATIONS + index, shape[0], math.prod(shape[1:]))
        return drawn.reshape(shape)

    plain = Cotta(varied(name), shown, draw, AUGMENTATIONS, **own)
    plain.double()
    plain.load(state_of(given))
    return program, given, plain


@pytest.mark.parametrize("name", ["resnet14", "wideresnet10"])
def test_cotta_follows_the_plain_implementation(name: str) -> None:
    """With the average over augmentations where the source is unsure, and without; every kind of weight is trained, and some return."""
    program, given, plain = cotta_pair(name)
    assert set(program.model.parameters) == {key for key, _ in varied(name).named_parameters()}
    for index, (x, _) in enumerate(stream(4)):
        plain.threshold = 1.0 if index % 2 else 0.0
        given["hyper.threshold"] = torch.tensor(plain.threshold, dtype=torch.float64)
        ours, logits = stepped(program, given, x), plain.adapt(x)
        agree(ours, {"logits": logits, **plain.state()}, 1e-6)
        start = {key: value.double() for key, value in varied(name).named_parameters()}
        share = [float((ours[key] == value).double().mean()) for key, value in start.items() if value.numel() > 1000]
        assert all(0.05 < value < 0.15 for value in share)
    assert plain.averaged == [False, True, False, True]


def test_cotta_learns_from_labels_and_predicts_with_its_teacher() -> None:
    program, given, plain = cotta_pair("resnet14", "learn")
    for x, y in stream(2):
        given["y"] = y
        ours, logits = stepped(program, given, x), plain.learn(x, y)
        theirs = {key: value for key, value in plain.state().items() if key != "memory.counter"}
        agree(ours, {"logits": logits, **theirs})
    predict = program_of("resnet14", "cotta", "predict", augmentations=AUGMENTATIONS)
    again = {**start_of(predict, mix=0.3), **{key: value for key, value in given.items() if key.startswith("state.")}}
    with doubles():
        out = predict({**again, "x": x})
    assert largest(out["logits"] - plain.predict(x)) < 1e-8
    assert {key for key in out if key != "logits"} == {f"new.{key}" for key in plain.state() if key.startswith("statistics.")}


def test_augmentation_moves_pixels_as_an_affine_map_does() -> None:
    """Against torch's own sampling of a grid, from the numbers that were drawn, without flip and noise or with."""
    x = torch.rand(6, 3, 9, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    count = torch.tensor(5)
    with doubles():
        drawn = uniform(count, 1, 4, 6, 7)
        for flip in (False, True):
            found = augmented(x, count, 1, 4, flip=flip)
            low, high = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
            y = torch.minimum(low + (0.6 + 0.8 * drawn[:, 0]).view(-1, 1, 1, 1) * (x - low), high)
            mean = y.mean((2, 3), keepdim=True)
            y = torch.minimum(torch.maximum(mean + (0.7 + 0.6 * drawn[:, 1]).view(-1, 1, 1, 1) * (y - mean), low), high)
            want = []
            for frame, row in zip(y, drawn):
                turn, scale = (2 * float(row[2]) - 1) * ANGLE, SCALE[0] + (SCALE[1] - SCALE[0]) * float(row[3])
                right, down = (2 * float(row[4]) - 1) * SHIFT * 12, (2 * float(row[5]) - 1) * SHIFT * 9
                side = -1.0 if flip and row[6] < 0.5 else 1.0
                rows, columns = torch.meshgrid(torch.arange(9.0) - 4.0, (torch.arange(12.0) - 5.5) * side, indexing="ij")
                across, along = columns - right, rows - down
                u = (math.cos(turn) * across + math.sin(turn) * along) / scale
                v = (math.cos(turn) * along - math.sin(turn) * across) / scale
                grid = torch.stack([u / 5.5, v / 4.0], -1)
                want.append(F.grid_sample(frame[None], grid[None], "bilinear", "border", align_corners=True)[0])
            away = (found - torch.stack(want)) / (high - low)
            assert largest(away) < 0.05
            inside = (found > low + 0.1 * (high - low)) & (found < high - 0.1 * (high - low))
            assert 0.003 < float(away[inside].std()) < 0.007
    assert float((uniform(count, 1, 4, 6, 7)[:, 6] < 0.5).double().mean()) not in (0.0, 1.0)


def test_augmentation_is_a_function_of_its_counter() -> None:
    """Others at each step and stream, the same again; within each frame's range; what is no image keeps its order; also in a graph's types."""
    x = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    one = augmented(x, torch.tensor(3.0), 0)
    assert torch.equal(one, augmented(x, torch.tensor(3), 0))
    for other in (augmented(x, torch.tensor(4), 0), augmented(x, torch.tensor(3), 1), augmented(x, torch.tensor(3), 0, STREAMS)):
        assert largest(other - one) > 0.1
    assert bool((one.amax((2, 3)) <= x.amax((2, 3))).all())
    assert bool((one.amin((2, 3)) >= x.amin((2, 3))).all())
    still = augmented(x, torch.tensor(3), 0, moves=False)
    wave = torch.linspace(-1.0, 1.0, 50).repeat(4, 6, 1)
    vector = torch.linspace(-1.0, 1.0, 50).repeat(4, 1)
    for given, found in ((x, still), (wave, augmented(wave, torch.tensor(3), 0)), (vector, augmented(vector, torch.tensor(3), 0))):
        assert found.shape == given.shape
        assert float(torch.corrcoef(torch.stack([given.flatten(), found.flatten()]))[0, 1]) > 0.8
        assert largest(found - given) > 0.01


def test_augmentation_noise_is_normal() -> None:
    flat = torch.zeros(64, 3, 32, 32)
    flat[:, :, 0, 0], flat[:, :, 0, 1] = -10.0, 10.0
    noise = augmented(flat, torch.tensor(1), 0, moves=False)[:, :, 1:] / 20.0
    noise = noise - noise.mean((1, 2, 3), keepdim=True)
    assert float(noise.std()) == pytest.approx(0.005, rel=0.02)
    assert float((noise.abs() > 0.01).double().mean()) == pytest.approx(0.0455, abs=0.003)


@pytest.mark.parametrize(("kind", "settings"), [("rotta", {"capacity": 6}), pytest.param("cotta", {"augmentations": 2}, marks=pytest.mark.slow)])
def test_bundles_predict_adapt_learn_and_go_on(kind: str, settings: dict[str, int], tmp_path: Path) -> None:
    """Batches other than the memory's size; a prediction alone leaves RoTTA's state; a saved state goes on to the bit. Models without batch
    normalisation, too: their normalisations' scale and shift are trained, and there are no statistics."""
    path = tmp_path / "toy.edgeadapt"
    x = torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    export(grouped(), path, shape=(3, 16, 16), data=labelled(x), method=kind, settings=settings, batches=(4,), micro="none")
    frames = x.numpy()
    with Adapter.open(path) as adapter:
        before = adapter.state
        adapter.predict(frames[:1])
        assert all(np.array_equal(before[name], value) for name, value in adapter.state.items())
        adapter.adapt(frames[:4])
        adapter.learn(frames[4:8], np.arange(4))
        held = adapter.state
        assert any(not np.array_equal(before[name], held[name]) for name in held if name.startswith("memory.teacher"))
        first = adapter.adapt(frames[8:12])
        assert float(adapter.state["memory.counter"]) == 2.0
        adapter.reset()
        adapter.adapt(frames[:4])
        adapter.learn(frames[4:8], np.arange(4))
        assert np.array_equal(adapter.adapt(frames[8:12]), first)


@pytest.mark.parametrize("tier", ["compact", "tiny"])
def test_rotta_in_small_forms(tier: str) -> None:
    """The teacher follows what the student computes with."""
    program = program_of("wideresnet10", "rotta", capacity=CAPACITY)
    model = program.model
    storage = Packed(TIERS[tier], model.parameters, 0)
    model = Model(model.method, storage.values(), model.values, "live", "adam", storage=storage)
    step = build(model, "adapt", BATCH, torch.zeros(BATCH, *SHAPE))
    given = {**step.example, "hyper.teacher": torch.tensor(1.0), "hyper.rate": torch.tensor(0.05), "x": next(stream(1))[0].float()}
    out = step(given)
    state = {name.removeprefix("new."): value for name, value in out.items() if name.startswith("new.")}
    read = storage.read(model.parameters, {**{key: value for key, (_, value) in model.held().items()}, **state}, {})
    for name, value in read.items():
        assert torch.equal(state[f"memory.teacher.{name}"], value)
    assert any(not torch.equal(value, model.parameters[name]) for name, value in read.items())
    assert lowered(step).nodes


def test_self_check_sees_a_frame_in_another_slot_and_no_ties() -> None:
    """One slot that holds another frame is refused; inputs for which rounding could choose otherwise are not checked with."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)).eval()
    method = METHODS["rotta"](capture(model, (6,), 4), Setup(3, settings={"capacity": 5}))
    ready = Model(method, method.parameters(), method.backbone.source_statistics(), "live", "adam")
    made = compile_program(build(ready, "adapt", 4, torch.randn(4, 6)), PlacedWeights(), Schedules(0.1, False))[0]
    found, runs = selfcheck.compare(made)
    selfcheck.refuse(found)
    example, got = runs[0]
    frames = got["new.memory.frames"].copy()
    frames[[0, 1]] = frames[[1, 0]]
    with pytest.raises(ExportError, match=r"updates differ .* worst in memory\.frames"):
        selfcheck.refuse(selfcheck.compare_at(made, example, {**got, "new.memory.frames": frames}))

    class Tied(SimpleNamespace):
        def __call__(self, given: dict[str, Tensor]) -> dict[str, Tensor]:
            return {"new.memory.labels": (given["x"][:, 0] > 0.0).float()}

    tied: Any = Tied(role="adapt", model=SimpleNamespace(method=SimpleNamespace(choosing=("labels",))))
    x = torch.ones(4, 6)
    assert selfcheck._decided(tied, {"x": x})["x"] is x
    x[2, 0] = 0.0
    assert float(selfcheck._decided(tied, {"x": x})["x"][:, 0].abs().min()) > 1e-3


REFUSED: dict[str, tuple[str, dict[str, Any], type[Exception], str]] = {
    "capacity": ("rotta", {"settings": {"capacity": 0}}, UsageError, "capacity = 0 is not possible"),
    "statistics": ("rotta", {"statistics": "source"}, UsageError, "rotta moves its statistics"),
    "augmentations": ("cotta", {"settings": {"augmentations": 65}}, UsageError, "augmentations = 65 is not possible"),
    "int8": ("cotta", {"quantize": "int8"}, UsageError, "cotta needs the model in float32"),
    "auto": ("cotta", {"quantize": "auto", "budget": "1GiB"}, UsageError, "cotta needs the model in float32"),
    "compact": ("cotta", {"updates": "compact"}, UsageError, "cotta sets parameters back"),
    "parts": ("cotta", {"train": 1}, UsageError, "cotta has no use for train"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused(case: str) -> None:
    kind, options, error, message = REFUSED[case]
    data = labelled(torch.randn(16, 3, 16, 16))
    with pytest.raises(error, match=message):
        export(grouped(), None, shape=(3, 16, 16), data=data, method=kind, **options)


class Pixels(nn.Module):
    """A class for every pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.conv(x)).relu())


def test_segmentation_has_no_memory_of_frames() -> None:
    """CoTTA takes it, and keeps pixels in place."""
    torch.manual_seed(0)
    with pytest.raises(ExportError, match="one class a frame"):
        export(Pixels().eval(), None, shape=(3, 8, 8), method="rotta")
    report = export(Pixels().eval(), None, shape=(3, 8, 8), method="cotta", batches=(2,), settings={"augmentations": 1})
    assert all(item.logits < 1e-3 for item in report.differences)


@pytest.mark.parametrize(
    ("kind", "model", "message"),
    [
        ("rotta", nn.Sequential(nn.Flatten(), nn.Linear(12, 5)), "rotta trains the scale and shift of normalisation layers, and this model has none"),
        ("cotta", nn.Sequential(nn.Flatten(), nn.ReLU()), "cotta trains the model's weights, and this model has none"),
    ],
)
def test_a_model_without_anything_to_train_is_refused(kind: str, model: nn.Module, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        export(model, None, shape=(3, 2, 2), method=kind)


@pytest.mark.data
@pytest.mark.slow
def test_rotta_withstands_a_stream_sorted_by_class(pack: Pack) -> None:
    """Where batches hold one class or two, statistics of the batch ruin the model, and RoTTA keeps it."""
    trained = load_weights(resnet_cifar(20), pack.weights("resnet20_cifar10"))
    method = METHODS["rotta"](capture(trained, SHAPE, 32), Setup(CLASSES, settings={"capacity": 32}))
    model = Model(method, method.parameters(), method.backbone.source_statistics(), "live", method.optimiser)
    step = build(model, "adapt", 32, torch.zeros(32, *SHAPE))
    given, wrong = dict(step.example), {"norm": 0, "rotta": 0}
    x, y = pack.images("cifar_test1000")
    for batch in correlated(x[:256], y[:256], names=("brightness", "jpeg_compression"), severity=3, batch=32):
        shown = torch.from_numpy(to_float(batch.x, IMAGENET_MEAN, IMAGENET_STD))
        out = step({**given, "x": shown})
        given |= {f"state.{name.removeprefix('new.')}": value.detach() for name, value in out.items() if name.startswith("new.")}
        with torch.no_grad():
            alone = method.backbone.run(method.backbone.tensors, Normaliser({}, "batch")).whole(shown)
        for name, logits in (("norm", alone), ("rotta", out["logits"])):
            wrong[name] += int((logits.argmax(1).numpy() != batch.y).sum())
    assert wrong["rotta"] < 0.6 * wrong["norm"], wrong
    assert int((given["state.memory.labels"] >= 0).sum()) > 16
