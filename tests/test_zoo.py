"""The zoo itself: models build and run, weights load and score as they should, generated networks are deterministic and sane, data can be learned."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.zoo.calibrate import calibrate, noise
from tests.zoo.data import IMAGENET_MEAN, IMAGENET_STD, Pack, blobs, gratings, masks, pack_fixture, to_float, windows  # noqa: F401
from tests.zoo.generated import PARAMETERS, Generated, Rejected, _spread, generate
from tests.zoo.layers import CLASSES, LAYERS, example
from tests.zoo.named import NAMED, load_weights, resnet_cifar, segmentation_net, sensor_net, wideresnet

SEEDS = range(30)  # those that test_lowering compares with torch
network = cache(generate)


def accuracy(model: nn.Module, x: np.ndarray, y: np.ndarray) -> float:
    with torch.no_grad():
        guesses = torch.cat([model(part).argmax(1) for part in torch.from_numpy(x).split(100)])
    return float((guesses.numpy() == y).mean())


@pytest.mark.parametrize("name", NAMED)
def test_named_models_run(name: str) -> None:
    factory, shape = NAMED[name]
    size = (3, 64, 64) if shape == (3, 224, 224) else shape
    model = factory(classes=7)
    with torch.no_grad():
        out = model(noise((2, *size)))
    assert not model.training
    assert out.shape == ((2, 7, *size[1:]) if name == "segmentation_net" else (2, 7))
    assert torch.isfinite(out).all()
    assert out.std() > 0
    assert not torch.allclose(out[0], out[1])


@pytest.mark.parametrize(
    ("name", "parameters"), [("mobilenet_v2", 3_504_872), ("resnet18", 11_689_512), ("resnet50", 25_557_032), ("wideresnet", 2_243_546)]
)
def test_published_sizes(name: str, parameters: int) -> None:
    assert sum(p.numel() for p in NAMED[name][0]().parameters()) == parameters


def test_factories_are_deterministic_and_leave_the_random_state_alone() -> None:
    state = torch.get_rng_state()
    first, second, other = resnet_cifar(), resnet_cifar(), resnet_cifar(seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.conv1.weight, second.conv1.weight)
    assert not torch.equal(first.conv1.weight, other.conv1.weight)


def test_calibration_is_deterministic_and_is_the_mean_over_its_batches() -> None:
    model, again = calibrate(sensor_net(), (6, 128)), calibrate(sensor_net(), (6, 128))
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    norm = model.block1[1]
    assert norm.momentum == 0.1
    assert not norm.training
    seen: list[Tensor] = []
    handle = norm.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    generator = torch.Generator().manual_seed(0)
    for layer in (m for m in model.modules() if isinstance(m, nn.BatchNorm1d)):  # the scales and shifts come first from the same generator
        torch.rand(layer.weight.shape, generator=generator)
        torch.randn(layer.bias.shape, generator=generator)
    for _ in range(3):
        model(torch.randn(8, 6, 128, generator=generator))
    handle.remove()
    assert torch.allclose(norm.running_mean, torch.stack([x.mean((0, 2)) for x in seen]).mean(0), atol=1e-6)
    assert torch.allclose(norm.running_var, torch.stack([x.var((0, 2)) for x in seen]).mean(0), rtol=1e-5)


@pytest.mark.parametrize("name", LAYERS)
def test_layers_run_and_pass_gradients_both_ways(name: str) -> None:
    model, x = example(name)
    out = model(x)
    assert out.shape == (2, CLASSES)
    assert torch.isfinite(out).all()
    assert not torch.allclose(out[0], out[1])
    (out * noise(out.shape, 3)).sum().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert torch.isfinite(parameter.grad).all(), key
    for part in (model.before, model.head):
        assert part.weight.grad.abs().max() > 1e-6


@pytest.mark.parametrize("seed", SEEDS)
def test_generated_networks_are_sane_and_deterministic(seed: int) -> None:
    model, shape, text = network(seed)
    again, shape_again, text_again = generate(seed)
    assert (shape, text) == (shape_again, text_again)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    assert sum(p.numel() for p in model.parameters()) <= PARAMETERS
    assert 3 <= len(model.blocks) <= 12
    assert len(shape) in (2, 3)
    assert np.prod(shape) <= 3 * 32 * 32
    with torch.no_grad():
        x = noise((3, *shape), seed)
        out = model(x)
        alone = model(x[1:2])
    assert not model.training
    assert out.shape[0] == 3
    assert 2 <= out.shape[1] <= 10
    assert torch.isfinite(out).all()
    assert out.std(0).max() > 1e-2
    assert torch.allclose(out[1:2], alone, rtol=1e-4, atol=1e-4)  # no layer may mix the rows of a batch


def test_generated_networks_cover_what_they_should() -> None:
    text = " ".join(network(seed)[2] for seed in SEEDS)
    blocks = "residual parallel dense excite split bottleneck dropout upsample transposed interpolate"
    pools = "maxpool avgpool adaptive_avg adaptive_max ceil counted"
    norms = "batch group layer instance no-norm reflect replicate circular d2"
    activations = "relu6 leaky_relu elu gelu gelu_tanh silu hardswish hardsigmoid sigmoid tanh softplus mish prelu prelu_channels"
    heads = "mean pooled max conv hidden small flatten view"
    missing = [w for w in f"{blocks} {pools} {norms} {activations}".split() if w not in text] + [w for w in heads.split() if f"{w} head" not in text]
    assert not missing
    models = [network(seed)[0] for seed in SEEDS]
    convolutions = [m for model in models for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert any(m.groups == m.in_channels > 1 for m in convolutions)
    assert any(1 < m.groups < m.in_channels for m in convolutions)
    assert any(isinstance(m, nn.Conv1d) for model in models for m in model.modules())


@pytest.mark.parametrize("spoil", [lambda w: w.zero_(), lambda w: w.fill_(float("nan")), lambda w: w.fill_(1e30)], ids=["dead", "nan", "overflow"])
def test_the_filter_rejects_degenerate_networks(spoil: Callable[[Tensor], Tensor]) -> None:
    head = nn.Sequential()
    head.add_module("flatten", nn.Flatten())
    head.add_module("out", nn.Linear(4 * 36, 3))
    model = Generated([nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)], head).eval()
    _spread(model, (1, 10, 10), 0)
    with torch.no_grad():
        spoil(model.blocks[0].weight)
        spoil(model.blocks[2].weight)
    with pytest.raises(Rejected):
        _spread(model, (1, 10, 10), 0)


@pytest.mark.data
def test_resnet20_scores_as_published(pack: Pack) -> None:
    x, y = pack.images("cifar_test1000")
    model = load_weights(resnet_cifar(20), pack.weights("resnet20_cifar10"))
    assert accuracy(model, to_float(x[:500], IMAGENET_MEAN, IMAGENET_STD), y[:500]) > 0.89


@pytest.mark.data
@pytest.mark.parametrize("name", ["resnet20_cifar10", "resnet56_cifar10", "wrn40_2_cifar10"])
def test_weights_load_and_agree_with_the_reference_definition(pack: Pack, name: str) -> None:
    ours = wideresnet() if name.startswith("wrn") else resnet_cifar(int(name[6:8]))
    load_weights(ours, pack.weights(name))
    theirs = pack.loaders.wrn40_2() if name.startswith("wrn") else pack.loaders.cifar_resnet(int(name[6:8]))
    images, labels = pack.images("cifar_holdout10k")
    with torch.no_grad():
        x = theirs.prep(images[:50])
        out = ours(x)
        assert torch.allclose(out, theirs(x), atol=1e-4)
    assert (out.argmax(1).numpy() == labels[:50]).mean() > 0.8


@pytest.mark.data
def test_weights_of_another_model_do_not_load(pack: Pack) -> None:
    with pytest.raises(KeyError, match="unexpected"):
        load_weights(wideresnet(), pack.weights("resnet20_cifar10"))


@pytest.mark.data
def test_preprocessing_agrees_with_the_pack(pack: Pack) -> None:
    images, _ = pack.images("cifar_test1000")
    theirs = pack.loaders.cifar_resnet(20).prep(images[:4]).numpy()
    np.testing.assert_allclose(to_float(images[:4], IMAGENET_MEAN, IMAGENET_STD), theirs, atol=1e-6)


@pytest.mark.parametrize("make", [gratings, blobs])
def test_synthetic_images(make: Callable[..., tuple[np.ndarray, np.ndarray]]) -> None:
    x, y = make(30, size=(20, 24), classes=5)
    assert x.dtype == np.uint8
    assert x.shape == (30, 20, 24, 3)
    assert y.dtype == np.int64
    assert np.bincount(y).tolist() == [6] * 5
    assert np.array_equal(x, make(30, size=(20, 24), classes=5)[0])
    assert not np.array_equal(x, make(30, size=(20, 24), classes=5, seed=1)[0])
    assert 20 < x.std() < 90


def test_synthetic_windows_and_masks() -> None:
    x, y = windows(12, channels=3, length=50, classes=4)
    assert x.dtype == np.float32
    assert x.shape == (12, 3, 50)
    assert np.bincount(y).tolist() == [3] * 4
    images, labels = masks(6, size=(24, 32), classes=3)
    assert images.dtype == np.uint8
    assert images.shape == (6, 24, 32, 3)
    assert labels.dtype == np.int64
    assert labels.shape == (6, 24, 32)
    assert set(np.unique(labels)) == {0, 1, 2}


def fit(model: nn.Module, x: np.ndarray, y: np.ndarray, steps: int, rate: float = 5e-3) -> nn.Module:
    optimiser = torch.optim.Adam(model.parameters(), rate)
    generator = torch.Generator().manual_seed(0)
    inputs, targets = torch.from_numpy(x), torch.from_numpy(y)
    model.train()
    for _ in range(steps):
        rows = torch.randint(len(x), (32,), generator=generator)
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(inputs[rows]), targets[rows]).backward()
        optimiser.step()
    return model.eval()


def small_net(classes: int) -> nn.Module:
    layers = []
    for inside, outside in ((3, 16), (16, 32), (32, 32)):
        layers += [nn.Conv2d(inside, outside, 3, 2, 1, bias=False), nn.BatchNorm2d(outside), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, classes))


@pytest.mark.parametrize("make", [gratings, blobs])
def test_synthetic_images_can_be_learned(make: Callable[..., tuple[np.ndarray, np.ndarray]]) -> None:
    torch.manual_seed(0)
    x, y = make(400, size=24)
    held, truth = make(200, size=24, seed=1)
    assert accuracy(fit(small_net(4), to_float(x), y, 80), to_float(held), truth) > 0.9


def test_synthetic_windows_and_masks_can_be_learned() -> None:
    torch.manual_seed(0)
    x, y = windows(400)
    held, truth = windows(200, seed=1)
    assert accuracy(fit(sensor_net(), x, y, 60), held, truth) > 0.9
    scenes, labels = masks(200, size=24)
    held_scenes, held_labels = masks(50, size=24, seed=1)
    assert accuracy(fit(segmentation_net(), to_float(scenes), labels, 80), to_float(held_scenes), held_labels) > 0.85
