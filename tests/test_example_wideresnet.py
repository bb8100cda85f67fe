"""The training of the WideResNet: network, augmentation, loss, that an interruption leaves no trace, and what is refused."""

from __future__ import annotations

import importlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from edgeadapt.errors import EdgeAdaptError, InputError, StateError, UsageError
from edgeadapt.exporters.load import load_factory, load_weights
from tests.child import environment
from tests.zoo.data import Pack, blobs, pack_fixture  # noqa: F401
from tests.zoo.named import wideresnet as reference_network

FOLDER = Path(__file__).resolve().parents[1] / "examples" / "wideresnet"
sys.path.insert(0, str(FOLDER))  # the example's modules import each other as a script's do; processes that it starts look here too
augmix, checkpoint, images, network, prefetch, train, training = (
    importlib.import_module(name) for name in ("augmix", "checkpoint", "images", "wideresnet", "prefetch", "train", "training")
)

TINY = ("--depth", "10", "--widen", "1", "--batch", "16", "--epochs", "4", "--rate", "0.05", "--threads", "1", "--device", "cpu")


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> Path:
    """72 images, of which 7 are held out: an epoch of four steps and one short one."""
    path = tmp_path_factory.mktemp("images") / "train.npz"
    x, y = blobs(72, 32, 4)
    np.savez(path, x=x, y=y)
    return path


@pytest.fixture(scope="module")
def uninterrupted(archive, tmp_path_factory) -> Path:
    """Weights of a training that was left alone."""
    path = tmp_path_factory.mktemp("whole") / "weights.safetensors"
    assert train.main(["--data", str(archive), "-o", str(path), *TINY]) == 0
    return path


def held_in(path: Path) -> dict:
    whole = path.read_bytes()  # once: safe_open opens the path twice, and a run that goes on puts another file there meanwhile
    metadata = json.loads(whole[8 : 8 + int.from_bytes(whole[:8], "little")])["__metadata__"]
    assert list(metadata) == [checkpoint.KEY]
    return json.loads(metadata[checkpoint.KEY])


# ------------------------------------------------------------------------------------------------ network


def test_the_network_is_the_one_that_the_benchmarks_know():
    mine, known = network.initial(16, 2, 10, seed=1).eval(), reference_network(16, 2)
    assert {name: value.shape for name, value in network.wrn40_2().state_dict().items()} == {
        name: value.shape for name, value in reference_network().state_dict().items()
    }
    known.load_state_dict(mine.state_dict())
    x = network.to_input(noise(3, 32, 32, 3))
    with torch.no_grad():
        torch.testing.assert_close(mine(x), known(x), atol=1e-5, rtol=0)


def test_initial_weights_follow_from_the_seed_alone():
    before = torch.random.get_rng_state()
    one, same, other = (network.initial(10, 1, 4, seed).state_dict() for seed in (3, 3, 4))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["conv1.weight"], other["conv1.weight"])


def test_the_input_is_what_the_export_makes_of_mean_and_deviation_one_half():
    x = noise(2, 32, 32, 3)
    samples = images.Samples(x, np.zeros(2, np.int64), images.SPEC)
    np.testing.assert_allclose(network.to_input(x).numpy(), samples.tensor([0, 1]), atol=1e-6)
    assert network.to_input(np.array([[[[0, 255, 51]]]], np.uint8)).flatten().tolist() == pytest.approx([-1, 1, -0.6])


@pytest.mark.data
def test_the_packs_weights_fit_and_say_the_same(pack):
    mine = load_factory(f"{FOLDER / 'wideresnet.py'}:wrn40_2")
    load_weights(mine, pack.weights("wrn40_2_cifar10"))
    known = reference_network()
    assert {name: value.shape for name, value in load_file(pack.weights("wrn40_2_cifar10")).items()} == {
        name: value.shape for name, value in mine.state_dict().items()
    }
    known.load_state_dict(load_file(pack.weights("wrn40_2_cifar10")))
    x, y = pack.images("cifar_holdout10k")
    with torch.no_grad():
        logits = mine(network.to_input(x[:64]))
        torch.testing.assert_close(logits, known(network.to_input(x[:64])), atol=1e-4, rtol=0)
    assert (logits.argmax(1).numpy() == y[:64]).mean() > 0.75


@pytest.mark.data
def test_the_packs_images_are_those_its_own_loaders_give(pack, monkeypatch):
    monkeypatch.setenv(images.VARIABLE, str(pack.folder))
    for found, name in zip(images.find(None, 0.1, 0), ("cifar_train20k", "cifar_holdout10k")):
        x, y = pack.images(name)
        assert len(found) == min(len(x), 20_000 if "train" in name else 2_000)
        np.testing.assert_array_equal(found.x, x[: len(found)])
        np.testing.assert_array_equal(found.y, y[: len(found)])


# ------------------------------------------------------------------------------------------------ augmentation


def test_operations_are_the_papers_nine():
    wanted = "autocontrast equalize posterize rotate solarize shear_x shear_y translate_x translate_y"
    assert set(augmix.OPERATIONS) == set(wanted.split())


@pytest.mark.parametrize("name", augmix.OPERATIONS)
def test_an_operation_keeps_size_and_type_and_its_input_and_has_no_chance_in_it(name):
    pixels = noise(20, 32, 3)
    image = Image.fromarray(pixels)
    for strength in (0.01, 0.3, 1.0):
        for sign in (1, -1):
            first, second = (np.asarray(augmix.OPERATIONS[name](image, strength, sign)) for _ in range(2))
            assert first.shape == pixels.shape
            assert first.dtype == np.uint8
            assert np.array_equal(first, second)
    assert np.array_equal(np.asarray(image), pixels)


def test_operations_do_what_they_are_called():
    pixels = noise(32, 32, 3)
    done = {name: np.asarray(operation(Image.fromarray(pixels), 0.3, 1)).astype(int) for name, operation in augmix.OPERATIONS.items()}
    np.testing.assert_array_equal(done["translate_x"][:, :29], pixels[:, 3:])
    np.testing.assert_array_equal(done["translate_y"][:29], pixels[3:])
    np.testing.assert_array_equal(done["posterize"], pixels & 0b11100000)
    np.testing.assert_array_equal(done["solarize"], np.where(pixels < 180, pixels, 255 - pixels))
    ramp = np.repeat(np.linspace(50, 100, 32).astype(np.uint8)[:, None, None], 32, 1).repeat(3, 2)
    stretched = np.asarray(augmix.OPERATIONS["autocontrast"](Image.fromarray(ramp), 0.3, 1))
    assert stretched.min() == 0
    assert stretched.max() >= 254
    dark = (pixels / 16.0) ** 2
    levelled = np.asarray(augmix.OPERATIONS["equalize"](Image.fromarray(dark.astype(np.uint8)), 0.3, 1))
    assert dark.mean() < 90
    assert levelled.mean() == pytest.approx(128, abs=10)


def test_views_follow_from_seed_epoch_and_index_alone():
    x = noise(5, 32, 32, 3)
    whole = augmix.views(x, np.arange(5), 7, 2)
    assert whole.shape == (3, 5, 32, 32, 3)
    assert whole.dtype == np.float32
    assert 0 <= whole.min() <= whole.max() <= 255.001
    np.testing.assert_array_equal(augmix.views(x[[4, 1]], [4, 1], 7, 2), whole[:, [4, 1]])
    for seed, epoch, index in ((8, 2, 4), (7, 3, 4), (7, 2, 5)):
        assert not np.array_equal(augmix.views(x[[4]], [index], seed, epoch), whole[:, [4]])
    assert not np.array_equal(whole[1], whole[2])


def test_no_two_purposes_share_random_numbers():
    keys = [(0, augmix.ORDER, 0, 0), (0, augmix.IMAGE, 0, 0), (0, augmix.IMAGE, 1, 0), (0, augmix.IMAGE, 0, 1), (1, augmix.IMAGE, 0, 0)]
    assert len({augmix.generator(*key).integers(2**63) for key in keys}) == len(keys)


def test_crops_come_from_every_place_of_the_frame():
    image = 1 + noise(32, 32, 3) // 2
    framed = np.pad(image, ((4, 4), (4, 4), (0, 0)))
    places = {framed[i : i + 32, j : j + 32][:, ::way].tobytes() for i in range(9) for j in range(9) for way in (1, -1)}
    random = np.random.default_rng(0)
    seen = {augmix.cropped(image, random).tobytes() for _ in range(1500)}
    assert seen == places
    assert len(places) == 162


def test_the_shares_of_a_mixture_sum_to_one(monkeypatch):
    monkeypatch.setattr(augmix, "_CHOICES", (lambda image, strength, sign: image,))
    x = noise(32, 32, 3)
    np.testing.assert_allclose(augmix.mixed(x, np.random.default_rng(0)), x, atol=1e-3)


def test_a_mixture_takes_one_to_three_operations_in_each_of_three_chains(monkeypatch):
    calls = []

    def note(image, strength, sign):
        calls.append((strength, sign))
        return image

    monkeypatch.setattr(augmix, "_CHOICES", (note,))
    random, lengths = np.random.default_rng(0), set()
    for _ in range(60):
        before = len(calls)
        augmix.mixed(noise(32, 32, 3), random)
        lengths.add(len(calls) - before)
    assert lengths <= set(range(3, 10))
    assert min(lengths) < 5 < 7 < max(lengths)
    assert {sign for _, sign in calls} == {1, -1}
    assert 0.01 <= min(calls)[0] < 0.03 < 0.28 < max(calls)[0] <= 0.3


def test_processes_that_augment_change_nothing():
    x = noise(10, 32, 32, 3)
    batches = [np.array(part) for part in ([3, 1, 2], [0, 9], [4], [5, 6], [7, 8])]
    with prefetch.Prefetch(x, 5, 0) as alone, prefetch.Prefetch(x, 5, 1) as helped:
        for one, other in zip(alone(1, batches), helped(1, batches), strict=True):
            np.testing.assert_array_equal(one, other)


def test_a_process_that_ends_before_its_time_is_an_error_that_says_so():
    with prefetch.Prefetch(noise(4, 32, 32, 3), 0, 1) as helped:
        found = helped(0, [np.array([0])] * 50)
        next(found)
        for child in list(helped._pool._processes.values()):
            child.kill()
        with pytest.raises(EdgeAdaptError, match="ended before its time"):
            list(found)


# ------------------------------------------------------------------------------------------------ loss and steps


def plain_divergence(*logits: torch.Tensor) -> float:
    """The definition, in float64, one sample at a time."""
    total = 0.0
    for rows in zip(*(part.double().softmax(1).numpy() for part in logits)):
        mean = sum(rows) / len(rows)
        total += sum(float(p * math.log(p / m)) for row in rows for p, m in zip(row, mean) if p > 0) / len(rows)
    return total / len(logits[0])


def test_the_divergence_is_that_of_the_definition():
    random = torch.Generator().manual_seed(0)
    for scale in (0.1, 1.0, 10.0):
        logits = [scale * torch.randn(6, 5, generator=random) for _ in range(3)]
        found = float(training.jensen_shannon(*logits))
        assert found == pytest.approx(plain_divergence(*logits), abs=1e-6)
        assert found == pytest.approx(float(training.jensen_shannon(*reversed(logits))), abs=1e-6)


def test_the_divergence_stays_finite_and_within_its_bounds():
    same = torch.randn(4, 3)
    assert float(training.jensen_shannon(same, same, same)) == pytest.approx(0, abs=1e-6)
    apart = [(1000.0 * torch.eye(3)[[k]]).requires_grad_() for k in range(3)]
    found = training.jensen_shannon(*apart)
    assert found.item() == pytest.approx(math.log(3))
    found.backward()
    assert all(torch.isfinite(part.grad).all() for part in apart)


def test_the_rate_falls_along_half_a_cosine():
    assert [round(training.rate_at(step, 4, 0.1), 6) for step in range(5)] == [0.1, 0.085355, 0.05, 0.014645, 0.0]


def made(archive: Path, **other) -> tuple:
    data, held = images.find(str(archive), 0.1, 0)
    given = {"depth": 10, "widen": 1, "classes": 4, "epochs": 2, "batch": 16, "rate": 0.1, "seed": 0, "precision": "float32", **other}
    return training.Trainer(training.Settings(images=images.identity(data), **given), data, torch.device("cpu")), data, held


def test_steps_are_those_of_the_papers_recipe(archive):
    trainer, data, _ = made(archive)
    plain = network.initial(10, 1, 4, 0).train()
    optimiser = torch.optim.SGD(plain.parameters(), 0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    for step, (batch, tolerance) in enumerate(zip(trainer.batches(), (1e-5, 5e-4))):  # ReLUs make more and more of the last bits
        views = augmix.views(data.x[batch], batch, 0, 0)
        trainer.take(batch, views)
        logits = plain(torch.cat([torch.from_numpy(part).permute(0, 3, 1, 2) / 127.5 - 1 for part in views])).split(len(batch))
        chances = [part.softmax(1) for part in logits]
        middle = (sum(chances) / 3).clamp(1e-7, 1).log()
        apart = sum(F.kl_div(middle, part, reduction="batchmean") for part in chances) / 3
        optimiser.param_groups[0]["lr"] = 0.05 * (1 + math.cos(math.pi * step / 10))
        optimiser.zero_grad()
        (F.cross_entropy(logits[0], torch.from_numpy(data.y[batch])) + 12 * apart).backward()
        optimiser.step()
        for name, value in plain.state_dict().items():
            torch.testing.assert_close(trainer.net.state_dict()[name], value, atol=tolerance, rtol=0)


def test_an_epoch_sees_every_image_once_in_an_order_of_its_own(archive):
    trainer, data, held = made(archive)
    assert (len(data), len(held), trainer.steps) == (65, 7, 5)
    first = np.concatenate(trainer.batches())
    trainer.step = 2
    np.testing.assert_array_equal(np.concatenate(trainer.batches()), first[32:])
    trainer.finish_epoch(0.0)
    second = np.concatenate(trainer.batches())
    assert sorted(first) == sorted(second) == list(range(65))
    assert not np.array_equal(first, second)


def test_convolutions_in_sixteen_bits_leave_weights_and_loss_in_float32(archive):
    trainer, data, _ = made(archive, precision="bfloat16")
    exact, _, _ = made(archive)
    batch = trainer.batches()[0]
    for each in (trainer, exact):
        each.take(batch, augmix.views(data.x[batch], batch, 0, 0))
    assert all(value.dtype == torch.float32 for name, value in trainer.net.state_dict().items() if "tracked" not in name)
    assert trainer.losses != exact.losses
    assert trainer.losses == pytest.approx(exact.losses, abs=0.05)


def test_a_loss_that_is_not_finite_ends_the_training(archive):
    trainer, _, _ = made(archive)
    batch = trainer.batches()[0]
    with pytest.raises(EdgeAdaptError, match=r"step 1 in epoch 1 is nan(.|\n)*lower --rate"):
        trainer.take(batch, np.full((3, len(batch), 32, 32, 3), np.nan, np.float32))


# ------------------------------------------------------------------------------------------------ the command


def test_loss_falls_and_weights_load_elsewhere(archive, tmp_path, capsys):
    path = tmp_path / "weights.safetensors"
    assert train.main(["--data", str(archive), "-o", str(path), *TINY, "--epochs", "8", "--rate", "0.1"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch ")]
    held = held_in(path)
    losses = [loss for loss, _ in held["history"]]
    assert [line.partition(" (")[0] for line in lines] == [f"epoch {k}/8: loss {loss:.4f}" for k, loss in enumerate(losses, 1)]
    assert losses[-1] < 0.6 * losses[0]
    assert held["settings"]["epochs"] == 8
    net = reference_network(10, 1, 4)
    net.load_state_dict(load_file(path))
    x, y = (np.load(archive)[name] for name in "xy")
    with torch.no_grad():
        assert (net.eval()(network.to_input(x)).argmax(1).numpy() == y).mean() > 0.7


def test_stopped_after_every_single_step_it_ends_with_the_same_weights(uninterrupted, archive, tmp_path, capsys):
    path = tmp_path / "weights.safetensors"
    command = ["--data", str(archive), "-o", str(path), *TINY, "--limit-minutes", "1e-9"]
    for _ in range(4 * 5):
        assert train.main(command) == 0
        assert "stopped after 1e-09 minutes; the same command goes on from" in capsys.readouterr().out
        assert not path.exists()
    assert train.main(command) == 0
    assert "going on from" in capsys.readouterr().out
    assert path.read_bytes() == uninterrupted.read_bytes()
    assert train.main(command) == 0  # once more, when all is done
    assert path.read_bytes() == uninterrupted.read_bytes()


def place(path: Path) -> tuple[int, int]:
    try:
        found = held_in(path)
    except FileNotFoundError:
        return 0, 0
    return found["epoch"], found["step"]


def children(parent: int) -> list[int]:
    """Processes whose parent is this one."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and int((entry / "stat").read_text().rpartition(")")[2].split()[1]) == parent:
                found.append(int(entry.name))
        except OSError:  # ended meanwhile
            continue
    return found


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_killed_in_the_middle_of_an_epoch_it_ends_with_the_same_weights_and_leaves_nothing_running(uninterrupted, archive, tmp_path):
    path, saved = tmp_path / "weights.safetensors", tmp_path / "weights.checkpoint.safetensors"
    command = ["--data", str(archive), "-o", str(path), *TINY]
    script = [sys.executable, str(FOLDER / "train.py"), *command, "--save-seconds", "0", "--workers", "1"]
    child = subprocess.Popen(script, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment())
    try:
        while True:
            assert child.poll() is None, "ended before it could be killed"
            epoch, step = place(saved)
            if epoch >= 1 and 0 < step < 5:
                os.kill(child.pid, signal.SIGSTOP)
                if 0 < place(saved)[1] < 5:
                    break
                os.kill(child.pid, signal.SIGCONT)
            time.sleep(0.005)
        helpers = children(child.pid)
    finally:
        child.kill()
        child.wait()
    assert helpers
    until = time.monotonic() + 30
    while any(map(is_running, helpers)) and time.monotonic() < until:
        time.sleep(0.02)
    assert not any(map(is_running, helpers))
    assert not path.exists()
    (tmp_path / f".{saved.name}.0123456789ab.tmp").write_bytes(b"left by a writer that was killed")
    assert train.main(command) == 0
    assert path.read_bytes() == uninterrupted.read_bytes()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [saved.name, path.name]


def test_interrupted_from_the_keyboard_it_says_how_to_go_on(archive, tmp_path, capsys, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(training.Trainer, "take", interrupt)
    assert train.main(["--data", str(archive), "-o", str(tmp_path / "w.safetensors"), *TINY]) == 130
    assert "the same command goes on from the last checkpoint" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ what is refused


@pytest.fixture
def stopped(archive, tmp_path) -> tuple[Path, Path]:
    """Output and checkpoint of a training that was stopped after one step."""
    path = tmp_path / "weights.safetensors"
    assert train.main(["--data", str(archive), "-o", str(path), *TINY, "--limit-minutes", "1e-9"]) == 0
    return path, path.with_suffix(".checkpoint.safetensors")


def refused(capsys, *command: str) -> tuple[int, str]:
    capsys.readouterr()
    code = train.main(command)
    message = capsys.readouterr().err
    assert message.startswith("train.py: error: ")
    assert "\n  fix: " in message
    return code, message


def test_a_checkpoint_of_other_settings_is_refused(stopped, archive, capsys):
    path, saved = stopped
    before = saved.read_bytes()
    code, message = refused(capsys, "--data", str(archive), "-o", str(path), *TINY, "--epochs", "5", "--seed", "1", "--precision", "bfloat16")
    assert code == StateError.exit_code
    for part in (str(saved), "epochs is 4 there, 5 here", "seed is 0 there, 1 here", "precision is 'float32' there", f"delete {saved.name}"):
        assert part in message
    assert "rate is" not in message
    assert saved.read_bytes() == before


def test_a_checkpoint_of_other_images_is_refused(stopped, tmp_path, capsys):
    x, y = blobs(72, 32, 4, seed=1)
    np.savez(tmp_path / "other.npz", x=x, y=y)
    code, message = refused(capsys, "--data", str(tmp_path / "other.npz"), "-o", str(stopped[0]), *TINY)
    assert code == StateError.exit_code
    assert "images is '65 with SHA-256" in message
    assert message.count(" is ") == 1


def rewritten(saved: Path, **changes) -> None:
    header = held_in(saved)
    tensors = load_file(saved)
    for name in changes.pop("without", ()):
        del tensors[name]
    save_file(tensors, saved, {checkpoint.KEY: json.dumps({**header, **changes})})


DAMAGE = {
    "cut short": lambda saved: saved.write_bytes(saved.read_bytes()[:-100]),
    "empty": lambda saved: saved.write_bytes(b""),
    "another program's": lambda saved: save_file({"x": torch.zeros(1)}, saved),
    "no JSON": lambda saved: save_file({"x": torch.zeros(1)}, saved, {checkpoint.KEY: "{"}),
    "a list": lambda saved: save_file({"x": torch.zeros(1)}, saved, {checkpoint.KEY: "[]"}),
    "no settings": lambda saved: rewritten(saved, settings=None),
    "a tensor too few": lambda saved: rewritten(saved, without=["momentum.fc.bias"]),
    "no place": lambda saved: rewritten(saved, step=None),
    "a place outside": lambda saved: rewritten(saved, step=6),
    "no history": lambda saved: rewritten(saved, epoch=1),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_refused(stopped, archive, capsys, damage):
    path, saved = stopped
    DAMAGE[damage](saved)
    code, message = refused(capsys, "--data", str(archive), "-o", str(path), *TINY)
    assert code == StateError.exit_code
    assert f"{saved}: not a whole checkpoint" in message
    assert f"delete {saved.name} to start over" in message


def test_another_number_of_threads_goes_on_and_is_told(stopped, archive, capsys):
    path, saved = stopped
    rewritten(saved, machine="torch 1 on cpu, 7 threads")
    assert train.main(["--data", str(archive), "-o", str(path), *TINY, "--limit-minutes", "1e-9"]) == 0
    assert "note: it was written with torch 1 on cpu, 7 threads" in capsys.readouterr().out


X, Y = blobs(8, 32, 4)
BAD = {
    "no y": ({"x": X}, "holds no labels y"),
    "of another size": ({"x": X[:, :16, :16], "y": Y}, "16x16"),
    "grey": ({"x": X[..., :1], "y": Y}, "channel|8x32x32x1|32x32x1"),
    "floats": ({"x": X.transpose(0, 3, 1, 2).astype(np.float32), "y": Y}, "float32, expected uint8"),
    "fractions": ({"x": X, "y": Y + 0.5}, "labels are float64"),
    "negative": ({"x": X, "y": Y - 1}, "label -1"),
    "a gap": ({"x": X, "y": np.where(Y == 1, 2**40, Y)}, "class 1 has no image"),
    "one class": ({"x": X, "y": np.zeros(8, np.int64)}, "every label is 0"),
    "masks": ({"x": X, "y": np.zeros((8, 32, 32), np.int64) + np.arange(32)}, "expected one class"),
    "too few to hold out": ({"x": X[:4], "y": np.arange(4)}, "none of its 4 images can be held out"),
}


@pytest.mark.parametrize("case", BAD)
def test_images_that_cannot_be_trained_on_are_refused(case, tmp_path):
    arrays, reason = BAD[case]
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(InputError, match=reason) as caught:
        images.find(str(tmp_path / "bad.npz"), 0.1, 0)
    assert "bad.npz" in caught.value.message
    assert caught.value.hint
    assert "--unlabelled" not in caught.value.hint


def test_a_missing_archive_and_a_missing_pack_are_named(tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"nowhere\.npz.*no such file"):
        images.find(str(tmp_path / "nowhere.npz"), 0.1, 0)
    monkeypatch.delenv(images.VARIABLE, raising=False)
    with pytest.raises(UsageError, match=r"no images to train on(.|\n)*--data train\.npz"):
        images.find(None, 0.1, 0)
    monkeypatch.setenv(images.VARIABLE, str(tmp_path))
    with pytest.raises(InputError, match=r"EDGEADAPT_DATA=.*train20k cannot be read"):
        images.find(None, 0.1, 0)


@pytest.mark.parametrize(
    "given",
    [
        *("--holdout 0.0", "--holdout 1.0", "--rate 0.0", "--rate nan", "--seed -1", "--depth 12", "--depth 4", "--workers -1"),
        *("--save-seconds nan", "--limit-minutes 0.0", "--output weights.pt", "--output nowhere/weights.safetensors"),
    ],
)
def test_options_that_cannot_be_used_are_named(given, capsys):
    code, message = refused(capsys, *given.split())
    assert code == UsageError.exit_code
    assert f"{given} cannot be used" in message


def test_a_gpu_that_is_not_there_is_an_error(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, message = refused(capsys, "--device", "cuda")
    assert code == UsageError.exit_code
    assert "finds no GPU" in message


def test_a_folder_that_cannot_be_written_is_found_out_before_training(archive, capsys):
    code, message = refused(capsys, "--data", str(archive), "-o", "/proc/weights.safetensors", *TINY)
    assert code == UsageError.exit_code
    assert "/proc/weights.checkpoint.safetensors: cannot be written" in message


def test_help_needs_no_torch():
    script = f"import runpy, sys; sys.argv = ['train.py', '--help']; runpy.run_path({str(FOLDER / 'train.py')!r}, run_name='__main__')"
    watched = f"import atexit, sys; atexit.register(lambda: print('torch' in sys.modules)); {script}"
    run = subprocess.run([sys.executable, "-c", watched], capture_output=True, text=True, env=environment())
    assert run.stdout.endswith("False\n")
    assert "--limit-minutes" in run.stdout
