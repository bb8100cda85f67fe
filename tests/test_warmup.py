"""The warm-up against plain torch training, its schedule, what it leaves alone, and what a user reads when it fails."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgeadapt.bundle.inputspec import InputSpec
from edgeadapt.errors import ExportError, InputError, UsageError
from edgeadapt.exporters import warmup
from edgeadapt.exporters.backbone import Normaliser
from edgeadapt.exporters.capture import Captured, capture
from edgeadapt.exporters.data import Samples, load_samples
from edgeadapt.exporters.methods import METHODS, Method, Setup
from edgeadapt.exporters.methods.base import Tensors
from edgeadapt.exporters.warmup import accuracy, divergence, estimate_statistics, predictions, rate_at, warm_up
from tests.zoo import named
from tests.zoo.calibrate import calibrate
from tests.zoo.data import blobs, masks, windows

BATCH = 16
WINDOWS = InputSpec((6, 64))
IMAGES = InputSpec((3, 16, 16), None, (0.4, 0.5, 0.6), (0.2, 0.25, 0.3))


@cache
def sensor() -> nn.Module:
    return calibrate(named.sensor_net(length=64), (6, 64))


@cache
def vision() -> nn.Module:
    return calibrate(named.resnet_cifar(8, classes=4), (3, 16, 16))


@cache
def captured(kind: str, batch: int = BATCH) -> Captured:
    if kind == "dense":
        return capture(calibrate(named.segmentation_net(classes=3, width=4), (3, 16, 16)), (3, 16, 16), batch)
    return capture(sensor(), (6, 64), batch) if kind == "sensor" else capture(vision(), (3, 16, 16), batch)


def method(name: str, kind: str = "sensor") -> Method:
    return METHODS[name](captured(kind), Setup({"sensor": 6, "vision": 4, "dense": 3}[kind], parts=1 if kind == "sensor" else 2))


def frozen(given: Method) -> Tensors:
    return {**given.backbone.tensors, **given.frozen()}


@cache
def sensors(count: int = 120) -> Samples:
    return load_samples(windows(count, length=64), WINDOWS)


@cache
def images(count: int = 96) -> Samples:
    return load_samples(blobs(count, 16), IMAGES)


def loss_of(given: Method, parameters: Tensors, samples: Samples, count: int = 3) -> float:
    """Mean cross-entropy with the batches' own statistics."""
    total = 0.0
    for start in range(0, count * BATCH, BATCH):
        chosen = np.arange(start, start + BATCH)
        run = given.backbone.run(frozen(given), Normaliser({}, "batch"), given.affine(parameters))
        assert samples.y is not None
        with torch.no_grad():
            logits = given.forward(run, torch.from_numpy(samples.tensor(chosen)), frozen(given), parameters).logits
        total += float(F.cross_entropy(logits, torch.from_numpy(samples.y[chosen])))
    return total / count


# ------------------------------------------------------------------------------------------------ schedule


def test_the_rate_rises_over_the_first_epoch_and_falls_at_the_third_sixth_and_eighth_of_ten() -> None:
    rates = [rate_at(step, 200, 20, 0.05) for step in range(200)]
    assert rates[0] == pytest.approx(0.05 / 20)
    assert rates[9] == pytest.approx(0.025)
    assert rates[19] == rates[59] == pytest.approx(0.05)
    assert [rates[epoch * 20] for epoch in (3, 6, 8)] == pytest.approx([0.01, 0.002, 0.0004])
    assert [rates[epoch * 20 - 1] for epoch in (3, 6, 8)] == pytest.approx([0.05, 0.01, 0.002])
    assert rates[-1] == pytest.approx(0.0004)


def test_a_short_warm_up_rises_over_a_fifth_of_its_steps() -> None:
    rates = [rate_at(step, 50, 50, 1.0) for step in range(50)]
    assert rates[9] == 1.0
    assert max(rates) == 1.0
    assert rate_at(0, 1, 1, 0.5) > 0


# ------------------------------------------------------------------------------------------------ training


def test_it_is_plain_training_of_a_module_in_training_mode() -> None:
    """TENT's parameters are the module's own, so torch's modules can do the same steps."""
    tent, samples = method("tent"), sensors()
    start = tent.parameters()
    got = warm_up(tent, start, frozen(tent), samples, epochs=2, batch=BATCH, seed=5, rate=0.1)

    model = calibrate(named.sensor_net(length=64), (6, 64)).train()
    chosen = {name: parameter for name, parameter in model.named_parameters() if name in start}
    assert len(chosen) == len(start)
    optimiser = torch.optim.SGD(chosen.values(), lr=0.1, momentum=0.9)
    order = np.random.default_rng(5)
    assert samples.y is not None
    for epoch in range(2):
        shuffled = order.permutation(np.arange(120))
        for k in range(7):
            rows = shuffled[k * BATCH : (k + 1) * BATCH]
            optimiser.param_groups[0]["lr"] = rate_at(epoch * 7 + k, 14, 7, 0.1)
            optimiser.zero_grad()
            F.cross_entropy(model(torch.from_numpy(samples.x[rows])), torch.from_numpy(samples.y[rows])).backward()
            optimiser.step()
    for name, value in got.items():
        assert torch.allclose(value, chosen[name], atol=1e-5), name
        assert not torch.allclose(value, start[name], atol=1e-4), name


@pytest.mark.parametrize(
    ("name", "kind", "rate", "share"),
    [("ecotta", "vision", 0.2, 0.9), ("ecotta", "sensor", 0.5, 0.97), ("side", "vision", 0.1, 0.9), ("tent", "vision", 0.5, 0.9)],
)
def test_it_learns_and_leaves_everything_else_alone(name: str, kind: str, rate: float, share: float) -> None:
    given, samples = method(name, kind), images() if kind == "vision" else sensors()
    start, tensors = given.parameters(), frozen(given)
    before = {key: value.clone() for key, value in {**start, **{f"frozen.{key}": value for key, value in tensors.items()}}.items()}
    trained = warm_up(given, start, tensors, samples, epochs=5, batch=BATCH, rate=rate)
    assert loss_of(given, trained, samples) < share * loss_of(given, start, samples)
    assert list(trained) == list(start)
    assert not any(value.requires_grad for value in trained.values())
    after = {**start, **{f"frozen.{key}": value for key, value in tensors.items()}}
    assert all(torch.equal(value, before[key]) for key, value in after.items())


def test_the_seed_decides_the_result() -> None:
    given = method("ecotta", "vision")
    runs = [warm_up(given, given.parameters(), frozen(given), images(), epochs=1, batch=BATCH, seed=seed) for seed in (1, 1, 2)]
    assert all(torch.equal(value, runs[1][name]) for name, value in runs[0].items())
    assert not all(torch.equal(value, runs[2][name]) for name, value in runs[0].items())


def test_progress_and_incomplete_batches() -> None:
    given, told = method("tent"), []
    warm_up(given, given.parameters(), frozen(given), sensors(), np.arange(50), epochs=2, batch=BATCH,
            progress=lambda stage, done, total, note="": told.append((stage, done, total, note)))  # fmt: skip
    assert [entry[:3] for entry in told] == [("warm-up", k, 6) for k in range(1, 7)]
    assert told[3][3].startswith("epoch 2/2, loss ")


def test_no_epochs_change_nothing() -> None:
    given = method("ecotta")
    start = given.parameters()
    got = warm_up(given, start, frozen(given), sensors(), epochs=0, batch=BATCH)
    assert all(torch.equal(value, start[name]) for name, value in got.items())
    assert warm_up(method("norm"), {}, frozen(given), sensors(), epochs=2, batch=BATCH) == {}


def test_images_are_augmented_before_mean_and_deviation(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []

    def keep(x: Tensor, random: torch.Generator) -> Tensor:
        seen.append(x)
        return x

    monkeypatch.setattr(warmup, "augment", keep)
    samples, chosen = images(), np.array([4, 9])
    x = warmup._augmented(samples, chosen, torch.Generator())
    assert np.array_equal(x.numpy(), samples.tensor(chosen)), "without a change in between they are what the device sees"
    assert 0.0 <= float(seen[0].min()) < float(seen[0].max()) <= 1.0
    warm_up(method("ecotta"), method("ecotta").parameters(), frozen(method("ecotta")), sensors(), epochs=1, batch=BATCH)
    assert len(seen) == 1, "sensor windows are not augmented"


# ------------------------------------------------------------------------------------------------ without labels


def test_divergence_is_that_of_torch() -> None:
    a, b = torch.randn(5, 4, 3), torch.randn(5, 4, 3)
    want = F.kl_div(b.log_softmax(1), a.log_softmax(1), reduction="none", log_target=True).sum(1).mean()
    assert float(divergence(a, b)) == pytest.approx(float(want), abs=1e-6)
    assert float(divergence(a, a + 3.0)) == pytest.approx(0.0, abs=1e-6)


def test_without_labels_it_learns_what_the_frozen_model_says() -> None:
    given = method("ecotta", "vision")
    start = given.parameters()
    labelled = images()
    unlabelled = Samples(labelled.x, None, labelled.spec)
    trained = warm_up(given, start, frozen(given), unlabelled, epochs=6, batch=BATCH, rate=0.2)
    x = torch.from_numpy(labelled.tensor(np.arange(BATCH)))
    with torch.no_grad():
        target = vision()(x)
        assert torch.allclose(warmup._frozen(given, frozen(given), unlabelled, np.arange(BATCH)), target, atol=1e-4)
        logits = [given.forward(given.backbone.run(frozen(given), Normaliser({}, "batch")), x, frozen(given), p).logits for p in (start, trained)]
    assert float(divergence(target, logits[1])) < 0.7 * float(divergence(target, logits[0]))


# ------------------------------------------------------------------------------------------------ what goes wrong


def test_a_warm_up_that_diverges_says_where_and_what_to_do() -> None:
    given = method("tent")
    start = {name: value * 1e38 for name, value in given.parameters().items()}
    with pytest.raises(ExportError, match=r"diverged at epoch 1, step 1 of 7: the loss is nan") as caught:
        warm_up(given, start, frozen(given), sensors(), epochs=2, batch=BATCH, rate=0.5)
    assert "--warmup-rate than 0.5, such as 0.1" in caught.value.hint
    with pytest.raises(ExportError, match=r"diverged at epoch 2, step 7 of 7: beside is not finite"):
        warm_up(given, {**given.parameters(), "beside": torch.full((2,), math.inf)}, frozen(given), sensors(), epochs=2, batch=BATCH)


@pytest.mark.parametrize("rate", [0.0, -1.0, 1e300, math.inf, math.nan])
def test_rates_that_make_no_sense(rate: float) -> None:
    given = method("tent")
    with pytest.raises(UsageError, match="warm-up rate"):
        warm_up(given, given.parameters(), frozen(given), sensors(), batch=BATCH, rate=rate)


def test_samples_that_cannot_be_trained_on() -> None:
    given = method("tent")
    arguments = (given, given.parameters(), frozen(given))
    with pytest.raises(InputError, match="batches of 16, and there are 15 samples"):
        warm_up(*arguments, sensors(), np.arange(15), batch=BATCH)
    with pytest.raises(InputError, match="label 6 of sample"):
        warm_up(*arguments, Samples(sensors().x, np.arange(120) % 7, WINDOWS), batch=BATCH)
    with pytest.raises(ExportError, match="bound to the model at batch 16, not 8"):
        warm_up(*arguments, sensors(), batch=8)


# ------------------------------------------------------------------------------------------------ statistics


def test_statistics_are_the_means_over_batches_of_what_each_layer_meets() -> None:
    tent, samples = method("tent"), sensors()
    got = estimate_statistics(tent, tent.parameters(), frozen(tent), samples, batch=BATCH, batches=8, seed=3)
    assert set(got) == set(tent.backbone.source_statistics())

    model = calibrate(named.sensor_net(length=64), (6, 64)).train()
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.BatchNorm1d)}
    sums = {name: [torch.zeros(layer.num_features), torch.zeros(layer.num_features)] for name, layer in layers.items()}

    def record(name: str, x: Tensor) -> None:
        sums[name][0] += x.mean((0, 2)) / 8
        sums[name][1] += x.var((0, 2), unbiased=False) / 8

    for name, layer in layers.items():
        layer.register_forward_pre_hook(lambda _, inputs, name=name: record(name, inputs[0]))
    order = np.random.default_rng(3)
    rows = np.concatenate([order.permutation(np.arange(120)), order.permutation(np.arange(120))])
    with torch.no_grad():
        for k in range(8):
            model(torch.from_numpy(samples.x[rows[k * BATCH : (k + 1) * BATCH]]))
    for name, (mean, variance) in sums.items():
        assert torch.allclose(got[f"{name}.mean"], mean, atol=1e-5), name
        assert torch.allclose(got[f"{name}.variance"], variance, atol=1e-5), name


def test_statistics_of_the_methods_own_layers_too_and_from_few_samples() -> None:
    given, told = method("ecotta", "vision"), []
    got = estimate_statistics(
        given, given.parameters(), frozen(given), images(), np.arange(20), batch=BATCH, progress=lambda *entry: told.append(entry)
    )
    assert set(got) == set(given.backbone.source_statistics()) | set(given.own_statistics())
    assert told[-1] == ("statistics", 8, 8), "no fewer than eight batches"
    assert all(value.dtype == torch.float32 and not value.requires_grad for value in got.values())


def test_statistics_that_are_not_finite() -> None:
    given = method("ecotta", "vision")
    parameters = {name: value * math.inf if name.endswith("norm.weight") else value for name, value in given.parameters().items()}
    with pytest.raises(ExportError, match="is not finite"):
        estimate_statistics(given, parameters, frozen(given), images(), batch=BATCH, batches=1)


# ------------------------------------------------------------------------------------------------ accuracy


@pytest.mark.parametrize("count", [1, 15, 16, 17, 50])
def test_accuracy_counts_every_sample_once_and_gives_full_batches(count: int) -> None:
    samples, chosen = sensors(), np.random.default_rng(0).permutation(120)[:count]
    sizes: list[int] = []

    def forward(x: Tensor) -> Tensor:
        sizes.append(len(x))
        return sensor()(x)

    with torch.no_grad():
        guesses = sensor()(torch.from_numpy(samples.x[chosen])).argmax(1).numpy()
    assert samples.y is not None
    assert np.array_equal(predictions(forward, samples, chosen, BATCH), guesses)
    assert accuracy(forward, samples, chosen, BATCH) == pytest.approx(float((guesses == samples.y[chosen]).mean()))
    assert set(sizes) == {BATCH}


def test_accuracy_of_segmentation_is_that_of_pixels() -> None:
    x, y = masks(6, 16, classes=3)
    samples = load_samples((x, y), IMAGES)
    always = {0: float((y == 0).mean()), 2: float((y == 2).mean())}
    for label, share in always.items():
        assert accuracy(
            lambda z, label=label: F.one_hot(torch.full((len(z), 16, 16), label), 3).permute(0, 3, 1, 2), samples, np.arange(6), 4
        ) == pytest.approx(share)


def test_a_dense_model_is_warmed_up_too() -> None:
    x, y = masks(48, 16, classes=3)
    given, samples = method("ecotta", "dense"), load_samples((x, y), IMAGES)
    trained = warm_up(given, given.parameters(), frozen(given), samples, epochs=3, batch=BATCH, rate=0.02)
    assert loss_of(given, trained, samples) < loss_of(given, given.parameters(), samples)


def test_no_accuracy_without_labels_or_samples() -> None:
    with pytest.raises(InputError, match="no labels"):
        accuracy(sensor(), Samples(sensors().x, None, WINDOWS), [0], BATCH)
    with pytest.raises(InputError, match="no samples"):
        accuracy(sensor(), sensors(), [], BATCH)
    assert predictions(sensor(), sensors(), [], BATCH).shape == (0,)
