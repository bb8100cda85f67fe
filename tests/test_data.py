"""Source samples in every form they may come in, and every way they may be wrong."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import Dataset, IterableDataset

from edgeadapt.bundle.inputspec import InputSpec
from edgeadapt.errors import EdgeAdaptError, ExportError, InputError, UsageError
from edgeadapt.exporters.data import Samples, load_samples, spec_for
from edgeadapt.exporters.reading import draw
from edgeadapt.preprocess import Windows, prepare
from tests.zoo.data import blobs, masks, windows

SPEC = InputSpec((3, 8, 8), None, (0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
RESIZED = InputSpec((3, 8, 8), (8, 8))
X, Y = blobs(40, 8)


def saved(folder: Path, **arrays: Any) -> str:
    np.savez(folder / "train.npz", **arrays)
    return str(folder / "train.npz")


# ------------------------------------------------------------------------------------------------ archives and arrays


def test_an_archive_of_images(tmp_path: Path) -> None:
    samples = load_samples(saved(tmp_path, x=X, y=Y.astype(np.uint8), names=np.array(list("abcd"))), SPEC)
    assert len(samples) == 40
    assert samples.y is not None
    assert samples.y.dtype == np.int64
    assert np.array_equal(samples.y, Y)
    assert samples.names == list("abcd")
    assert samples.summary() == "40 images 8x8x3 uint8, of 4 classes, from train.npz"


def test_tensors_are_what_the_device_makes_of_the_images(tmp_path: Path) -> None:
    samples = load_samples(saved(tmp_path, x=X, y=Y), SPEC)
    chosen = [7, 3, 3]
    assert np.array_equal(samples.tensor(chosen), prepare(X[chosen], SPEC))
    assert samples.tensor(chosen).dtype == np.float32


def test_pixels_are_the_images_before_mean_and_deviation() -> None:
    samples = load_samples((X, Y), SPEC)
    pixels = samples.pixels([5])
    assert pixels is not None
    assert np.array_equal(pixels[0], X[5].transpose(2, 0, 1).astype(np.float32) / np.float32(255))


def test_float_images_are_taken_as_they_are_and_pixels_found_again_where_that_is_possible() -> None:
    x = prepare(X, SPEC)
    samples = load_samples((x, Y), SPEC)
    assert np.array_equal(samples.tensor([4, 2]), x[[4, 2]])
    pixels = samples.pixels([4, 2])
    assert pixels is not None
    assert pixels == pytest.approx(X[[4, 2]].transpose(0, 3, 1, 2) / 255, abs=1e-6)
    assert load_samples((x, Y), InputSpec((3, 8, 8))).pixels([0]) is None, "nobody said how they were scaled"
    assert load_samples((x * 9, Y), SPEC).pixels([0]) is None, "they were scaled in another way"


def test_tensors_are_copies() -> None:
    x = prepare(X, SPEC)
    samples = load_samples((x, Y), SPEC)
    samples.tensor(np.arange(40))[:] = 0
    assert np.array_equal(samples.x, x)
    assert x.any()


def test_sensor_windows_and_vectors() -> None:
    x, y = windows(20, channels=3, length=16, classes=4)
    samples = load_samples((x, y), InputSpec((3, 16)))
    assert samples.pixels([0]) is None
    assert samples.summary().startswith("20 samples 3x16 float32, of 4 classes")
    assert load_samples({"x": x.reshape(20, 48), "y": y}, InputSpec((48,))).tensor([1]).shape == (1, 48)


def test_torch_tensors_samples_and_masks_are_accepted() -> None:
    assert np.array_equal(load_samples((torch.from_numpy(X), torch.from_numpy(Y)), SPEC).x, X)
    samples = load_samples((X, Y), SPEC)
    assert load_samples(samples, SPEC) is samples
    x, y = masks(6, 8)
    dense = load_samples((x, y), SPEC)
    assert dense.y is not None
    assert dense.y.shape == (6, 8, 8)
    assert dense.summary() == "6 images 8x8x3 uint8, with a class for every pixel, up to 3, from arrays"


def test_grey_images_without_a_channel() -> None:
    samples = load_samples((X[..., 0], Y), InputSpec((1, 8, 8)))
    assert samples.x.shape == (40, 8, 8, 1)
    assert samples.tensor([0]).shape == (1, 1, 8, 8)


def test_images_are_resized_as_on_the_device(tmp_path: Path) -> None:
    x, y = blobs(300, (20, 14))
    seen: list[tuple[str, int, int]] = []
    samples = load_samples(saved(tmp_path, x=x, y=y), RESIZED, progress=lambda stage, done, total, note="": seen.append((stage, done, total)))
    assert samples.x.shape == (300, 8, 8, 3)
    assert np.array_equal(samples.tensor(np.arange(300)), prepare(x, RESIZED))
    assert seen[-1] == ("resizing", 300, 300)


def test_masks_are_resized_with_their_images() -> None:
    x, y = masks(4, 32)
    samples = load_samples((x, y), RESIZED)
    assert samples.y is not None
    assert samples.y.shape == (4, 8, 8)
    assert np.isin(samples.y, y[:, 1::4, 1::4]).all()
    assert float((samples.y == y[:, 2::4, 2::4]).mean()) > 0.95


def test_a_folder_of_npy_files_stays_on_the_disk(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", X)
    np.save(tmp_path / "y.npy", Y)
    samples = load_samples(str(tmp_path), SPEC, memory=100)
    base: Any = samples.x
    while not isinstance(base, np.memmap):
        assert base is not None, "x was read"
        base = base.base
    assert np.array_equal(samples.tensor([9]), prepare(X[9:10], SPEC))
    np.save(tmp_path / "x.npy", FLOATS)
    tensor = load_samples(str(tmp_path), SPEC).tensor([9, 9])
    assert type(tensor) is np.ndarray
    assert tensor.flags.writeable


def test_without_labels(tmp_path: Path) -> None:
    for data in (X, {"x": X}, (X, None), (X, Y), saved(tmp_path, x=X), saved(tmp_path, x=X, y=np.array(["text"]))):
        samples = load_samples(data, SPEC, labelled=False)
        assert samples.y is None
    assert "without labels" in samples.summary()
    train, held = samples.split(0.25, 0)
    assert (len(train), len(held)) == (30, 10)


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"y": Y}, "holds no array x, only y"),
        ({"x": X}, "holds no labels y"),
        ({"x": X, "y": Y[:-1]}, "40 samples and 39 labels"),
        ({"x": X, "y": np.int64(3)}, "40 samples and 1 labels"),
        ({"x": X, "y": Y.astype(np.float32)}, "labels are float32"),
        ({"x": X, "y": Y > 1}, "labels are bool"),
        ({"x": X, "y": np.array(["a"] * 40)}, "labels are <U1"),
        ({"x": X, "y": np.eye(4, dtype=np.int64)[Y]}, "labels are 40x4"),
        ({"x": X, "y": Y * 0 + 2}, "every label is 2"),
        ({"x": X, "y": Y - 1}, "label -1 of sample"),
        ({"x": X[:0], "y": Y[:0]}, "there are no samples"),
        ({"x": X.astype(np.float64), "y": Y}, "not float64"),
        ({"x": X.astype(np.int64), "y": Y}, "not int64"),
        ({"x": X.astype(np.float32), "y": Y}, "channels come first"),
        ({"x": X.transpose(0, 3, 1, 2), "y": Y}, "channels come last"),
        ({"x": X[:, :6], "y": Y}, "images are 6x8 (height x width), the model takes 8x8"),
        ({"x": X[:, :6], "y": Y}, "--resize 8x8"),
        ({"x": X[..., :1], "y": Y}, "uint8 images are"),
        ({"x": np.array([X[0], None], object), "y": Y[:2]}, "it holds Python objects"),
        ({"x": X, "y": Y, "names": np.array(list("abc"))}, "label 3 of sample"),
    ],
)
def test_wrong_archives(tmp_path: Path, arrays: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError) as caught:
        load_samples(saved(tmp_path, **arrays), SPEC)
    assert says in str(caught.value)
    assert "train.npz" in caught.value.message
    assert caught.value.hint


def test_labels_counted_from_one_are_recognised() -> None:
    with pytest.raises(InputError, match=r"label 4 of sample \d+ lies outside 0\.\.3") as caught:
        load_samples((X, Y + 1), SPEC, classes=4)
    assert "subtract 1" in caught.value.hint


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_samples_that_are_not_finite(value: float) -> None:
    x = np.zeros((600, 4), np.float32)
    x[513, 2] = value
    with pytest.raises(InputError, match="sample 513 holds NaN"):
        load_samples((x, np.arange(600) % 3), InputSpec((4,)))


@pytest.mark.parametrize("keep", [0, 30, 0.5, 0.99])
def test_damaged_archives(tmp_path: Path, keep: float) -> None:
    path = Path(saved(tmp_path, x=X, y=Y))
    whole = path.read_bytes()
    path.write_bytes(whole[: int(keep * len(whole)) if isinstance(keep, float) else keep])
    with pytest.raises(InputError, match=r"train\.npz: cannot be read"):
        load_samples(str(path), SPEC)


def test_an_archive_whose_bytes_changed(tmp_path: Path) -> None:
    path = Path(saved(tmp_path, x=X, y=Y))
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 2] ^= 1
    path.write_bytes(whole)
    with pytest.raises(InputError, match="cannot be read"):
        load_samples(str(path), SPEC)


def test_an_archive_of_another_kind(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "t.npz", "w") as archive:
        archive.writestr("readme.txt", "nothing")
    with pytest.raises(InputError, match=r"holds no array x, only readme\.txt"):
        load_samples(str(tmp_path / "t.npz"), SPEC)


def test_too_much_for_memory(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"takes 8.06 KiB, more than the 7 KiB"):
        load_samples(saved(tmp_path, x=X, y=Y), SPEC, memory=7 << 10)
    with pytest.raises(InputError, match="--samples"):
        load_samples(blobs(200, 20), RESIZED, memory=30 << 10)
    assert len(load_samples(blobs(200, 20), RESIZED, most=20, memory=30 << 10)) == 20


@pytest.mark.parametrize(
    ("text", "says"), [("nowhere", "there is no such file or folder"), ("nowhere.npz", "there is no such file"), (__file__, "not a data set")]
)
def test_no_data_set(text: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        load_samples(text, SPEC)


# ------------------------------------------------------------------------------------------------ folders


def folder(root: Path, names: str = "cat dog", count: int = 3, size: tuple[int, int] = (8, 8), mode: str = "RGB", ending: str = "png") -> Path:
    for index, name in enumerate(names.split()):
        (root / name).mkdir(parents=True)
        for k in range(count):
            picture = np.full((*size, 3), 20 * index + 5 * k, np.uint8)
            Image.fromarray(picture).convert(mode).save(root / name / f"{k}.{ending}")
    return root


def test_a_folder_of_images_for_each_class(tmp_path: Path) -> None:
    samples = load_samples(folder(tmp_path / "d", "dog cat"), SPEC)
    assert samples.names == ["cat", "dog"], "sorted"
    assert samples.y is not None
    assert samples.y.tolist() == [0, 0, 0, 1, 1, 1]
    assert samples.x[:, 0, 0, 0].tolist() == [20, 25, 30, 0, 5, 10]
    assert samples.x.shape == (6, 8, 8, 3)


def test_names_give_the_order_of_the_classes(tmp_path: Path) -> None:
    samples = load_samples(folder(tmp_path / "d"), SPEC, names=["dog", "owl", "cat"])
    assert samples.y is not None
    assert samples.y.tolist() == [2, 2, 2, 0, 0, 0]
    assert samples.names == ["dog", "owl", "cat"]


@pytest.mark.parametrize("ending", ["png", "bmp", "webp", "ppm", "JPG", "gif"])
def test_kinds_of_files(tmp_path: Path, ending: str) -> None:
    assert abs(int(load_samples(folder(tmp_path / "d", ending=ending), SPEC).x[-1, 0, 0, 0]) - 30) < 4


def test_images_of_a_folder_are_resized_and_converted(tmp_path: Path) -> None:
    root = folder(tmp_path / "d", size=(20, 14), mode="L")
    picture = np.random.default_rng(0).integers(256, size=(20, 14, 3), dtype=np.uint8)
    Image.fromarray(picture).save(root / "cat" / "deep.png")
    samples = load_samples(root, RESIZED)
    assert np.array_equal(samples.tensor([3]), prepare(picture[None], RESIZED))
    assert load_samples(root, InputSpec((1, 8, 8), (8, 8))).x.shape == (7, 8, 8, 1)


def test_files_that_are_no_images_and_hidden_ones_are_left_out(tmp_path: Path) -> None:
    root = folder(tmp_path / "d")
    (root / "cat" / "notes.txt").write_text("x", encoding="utf-8")
    (root / "cat" / "._0.png").write_bytes(b"x")
    (root / ".git").mkdir()
    (root / "dog" / "more").mkdir()
    (root / "dog" / "0.png").rename(root / "dog" / "more" / "0.png")
    assert len(load_samples(root, SPEC)) == 6


def test_a_part_of_a_folder(tmp_path: Path) -> None:
    samples = load_samples(folder(tmp_path / "d", "a b c", 9), SPEC, most=7)
    assert samples.y is not None
    assert sorted(np.bincount(samples.y)) == [2, 2, 3]


def test_images_without_classes(tmp_path: Path) -> None:
    root = folder(tmp_path / "d")
    Image.fromarray(X[0]).save(root / "loose.png")
    samples = load_samples(root, SPEC, labelled=False)
    assert (len(samples), samples.y, samples.names) == (7, None, None)


def broken_image(root: Path) -> None:
    whole = (root / "cat" / "1.png").read_bytes()
    (root / "cat" / "1.png").write_bytes(whole[: len(whole) // 2])


@pytest.mark.parametrize(
    ("spoil", "options", "says"),
    [
        (broken_image, {}, "1.png: cannot be decoded"),
        (lambda root: (root / "cat" / "9.png").write_bytes(b"no image"), {}, "9.png: cannot be decoded"),
        (lambda root: (root / "empty").mkdir(), {}, "empty: holds no images"),
        (lambda root: None, {"names": ["cat", "cow"]}, "folder 'dog' is none of the class names (cat, cow)"),
        (lambda root: None, {"classes": 10}, "holds 2 folders, and the model has 10 classes"),
        (lambda root: Image.fromarray(np.zeros((8, 9, 3), np.uint8)).save(root / "dog" / "0.png"), {}, "images are 8x9"),
        (lambda root: Image.fromarray(np.zeros((8, 8), np.uint16)).save(root / "dog" / "0.png"), {}, "has pixels of type I;16"),
        (lambda root: None, {"memory": 1000}, "--samples"),
    ],
)
def test_wrong_folders(tmp_path: Path, spoil: Callable[[Path], Any], options: dict[str, Any], says: str) -> None:
    root = folder(tmp_path / "d")
    spoil(root)
    with pytest.raises(InputError) as caught:
        load_samples(root, SPEC, **options)
    assert says in str(caught.value)


def test_folders_without_classes_or_for_another_kind_of_input(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no folders"):
        load_samples(tmp_path, SPEC)
    with pytest.raises(InputError, match="holds no images"):
        load_samples(tmp_path, SPEC, labelled=False)
    with pytest.raises(InputError, match="every label is 0"):
        load_samples(folder(tmp_path / "d", "cat"), SPEC)
    with pytest.raises(InputError, match="the model takes 6x128"):
        load_samples(tmp_path / "d", InputSpec((6, 128)))


# ------------------------------------------------------------------------------------------------ torch data sets


class Items(Dataset[Any]):
    """What a user's data set may give."""

    def __init__(self, give: Callable[[int], Any], count: int = 12) -> None:
        self.give, self.count = give, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        return self.give(index)


FLOATS = prepare(X, SPEC)
FORMS: dict[str, Callable[[int], Any]] = {
    "pillow": lambda k: (Image.fromarray(X[k]), int(Y[k])),
    "byte tensor": lambda k: (torch.from_numpy(X[k].transpose(2, 0, 1).copy()), torch.tensor(Y[k])),
    "byte array": lambda k: [X[k], Y[k]],
    "float tensor": lambda k: (torch.from_numpy(FLOATS[k]), int(Y[k])),
    "double tensor": lambda k: (torch.from_numpy(FLOATS[k]).double(), int(Y[k])),
    "float array": lambda k: (FLOATS[k], np.int32(Y[k])),
}


@pytest.mark.parametrize("form", FORMS)
def test_torch_data_sets(form: str) -> None:
    samples = load_samples(Items(FORMS[form]), SPEC)
    assert samples.x.dtype == (np.float32 if form.startswith(("float", "double")) else np.uint8)
    assert np.array_equal(samples.tensor(np.arange(12)), FLOATS[:12])
    assert samples.y is not None
    assert np.array_equal(samples.y, Y[:12])


def test_a_data_set_with_masks_or_without_labels_and_a_part_of_it() -> None:
    x, y = masks(12, 8)
    assert (
        load_samples(Items(lambda k: (x[k], torch.from_numpy(y[k]))), SPEC)
        .summary()
        .startswith("12 images 8x8x3 uint8, with a class for every pixel")
    )
    assert load_samples(Items(lambda k: x[k]), SPEC, labelled=False).y is None
    asked: list[int] = []

    def ask(index: int) -> Any:
        asked.append(index)
        return FORMS["pillow"](index)

    assert len(load_samples(Items(ask), SPEC, most=5)) == len(asked) == 5


DATASETS = """
from tests.test_data import FORMS, Items, X, Y

def training():
    return Items(FORMS["pillow"])

def named():
    items = training()
    items.classes = ["ant", "bee", "cat", "dog"]
    return items

def arrays():
    return X, Y

ready = Items(FORMS["pillow"])

def broken():
    raise OSError("no disk")

def number():
    return 3
"""


def test_a_function_that_gives_a_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "user_sets.py").write_text(DATASETS, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    for name in ("training", "named", "arrays", "ready"):
        samples = load_samples(f"user_sets.py:{name}", SPEC)
        assert np.array_equal(samples.x[:12], X[:12])
        assert samples.names == (["ant", "bee", "cat", "dog"] if name == "named" else None)
    for name, kind, says in (
        ("broken", ExportError, "OSError: no disk"),
        ("number", InputError, "is of type int"),
        ("nothing", UsageError, "has no 'nothing'"),
    ):
        with pytest.raises(kind, match=says):
            load_samples(f"user_sets.py:{name}", SPEC)


class Stream(IterableDataset[Any]):
    """A data set without places."""

    def __iter__(self) -> Any:
        return iter(())


def fails(index: int) -> Any:
    if index == 3:
        raise KeyError("frame_3")
    return FORMS["pillow"](index)


@pytest.mark.parametrize(
    ("items", "says"),
    [
        (Stream(), "map-style"),
        (Items(FORMS["pillow"], 0), "there are no samples"),
        (Items(fails), r"Items[3] raised KeyError: 'frame_3' (test_data.py:"),
        (Items(lambda k: X[k]), "Items[0] is no pair"),
        (Items(lambda k: ("path.png", 1)), "Items[0] is of type str"),
        (Items(lambda k: (X[k][:5], 1)), "Items[0]: images are 5x8"),
        (Items(lambda k: (torch.zeros(3, 8, 8, dtype=torch.int64), 1)), "not int64"),
        (Items(lambda k: (X[k] if k else FLOATS[k], k)), "Items[1] is uint8, the samples before it are float32"),
        (Items(lambda k: (X[k], [1] * k)), "labels differ in shape"),
        (Items(lambda k: (X[k], 0.5)), "labels are float64"),
        (Items(lambda k: (X[k], 1)), "every label is 1"),
    ],
)
def test_wrong_data_sets(items: Any, says: str) -> None:
    with pytest.raises(InputError) as caught:
        load_samples(items, SPEC)
    assert says in str(caught.value)


# ------------------------------------------------------------------------------------------------ splits and checks


@given(st.lists(st.integers(0, 5), min_size=2, max_size=200), st.floats(0.0, 0.89), st.integers(0, 3))
def test_splits_are_stratified_and_use_every_sample_once(labels: list[int], holdout: float, seed: int) -> None:
    y = np.array(labels)
    samples = Samples(np.zeros((len(y), 2), np.float32), y, InputSpec((2,)))
    train, held = samples.split(holdout, seed)
    assert np.array_equal(np.sort(np.concatenate([train, held])), np.arange(len(y)))
    assert np.array_equal(train, np.sort(train))
    again = samples.split(holdout, seed)
    assert np.array_equal(held, again[1])
    for label in set(labels):
        count = int((y == label).sum())
        inside = int((y[held] == label).sum())
        assert abs(inside - holdout * count) <= 1.0 or count == 1
        assert inside < count
    if holdout == 0:
        assert not len(held)


def test_another_seed_gives_another_split() -> None:
    samples = load_samples((X, Y), SPEC)
    assert not np.array_equal(samples.split(0.2, 0)[1], samples.split(0.2, 1)[1])
    assert len(samples.split(0.2, 0)[1]) == 8
    assert len(samples.split(0.001, 0)[1]) == 1, "something to measure accuracy on"


def test_a_part_has_equal_shares_of_the_classes() -> None:
    y = np.array([0] * 90 + [1] * 8 + [2] * 2)
    chosen = draw(y, 100, 12, 0)
    assert np.bincount(y[chosen]).tolist() == [5, 5, 2]
    assert np.array_equal(chosen, np.sort(chosen))
    assert len(set(chosen.tolist())) == 12


@pytest.mark.parametrize(
    ("labels", "names", "logits", "says"),
    [
        (Y, None, (3,), "label 3 of sample"),
        (Y, list("abcd"), (5,), "there are 4 class names, and the model has 5 classes"),
        (Y, None, (4, 8, 8), "the labels of a sample are one class, expected 8x8, as the model's logits"),
        (np.zeros((40, 8, 8), np.int64), None, (4,), "the labels of a sample are 8x8, expected one class"),
        (np.zeros((40, 8, 8), np.int64), None, (4, 2, 2), "expected 2x2, as the model's logits"),
        (np.full((40, 8, 8), 255), None, (4, 8, 8), "label 255 of sample 0 lies outside 0..3"),
    ],
)
def test_samples_that_do_not_fit_the_model(labels: Any, names: list[str] | None, logits: tuple[int, ...], says: str) -> None:
    with pytest.raises(InputError) as caught:
        Samples(X, labels, SPEC, names).check(logits)
    assert says in caught.value.message


def test_samples_that_fit_the_model() -> None:
    Samples(X, Y, SPEC, list("abcd")).check((4,))
    Samples(X, None, SPEC).check((4, 8, 8))
    Samples(X, np.zeros((40, 8, 8), np.int64), SPEC).check((4, 8, 8))


def test_the_input_as_a_user_says_it() -> None:
    assert spec_for((3, 32, 32)) == InputSpec((3, 32, 32))
    assert spec_for((3, 32, 32), 0.5, 0.25) == InputSpec((3, 32, 32), None, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    assert spec_for((3, 32, 32), [0.5], [0.1, 0.2, 0.3], True) == InputSpec((3, 32, 32), (32, 32), (0.5, 0.5, 0.5), (0.1, 0.2, 0.3))
    for half in (np.float32(0.5), np.float64(0.5), np.array(0.5), np.array([0.5], np.float32), [np.float32(0.5)] * 3, 0.5):
        found = spec_for((3, 32, 32), half)
        assert found == InputSpec((3, 32, 32), None, (0.5, 0.5, 0.5))
        assert found.mean is not None
        assert {type(value) for value in found.mean} == {float}, "as the manifest holds it"
    assert spec_for((3, 32, 32), 1).mean == (1.0, 1.0, 1.0)
    assert spec_for((3, 32, 32), resize=(40, 36), fit="cover", order="bgr") == InputSpec(
        (3, 32, 32), (40, 36), fit="cover", crop=True, order="bgr"
    )
    assert spec_for((2, 128), [-9.81, 300], 4, raw=True, hop=64) == InputSpec((2, 128), None, (-9.81, 300.0), (4.0, 4.0), raw=True, hop=64)


def test_recordings_become_the_windows_that_the_device_makes_of_samples() -> None:
    spec = InputSpec((2, 8), None, (1.0, 2.0), (3.0, 4.0), raw=True, hop=4)
    recording = np.random.default_rng(2).standard_normal((600, 2)).astype(np.float32)
    labels = np.repeat(np.arange(4), 150)
    samples = load_samples((recording, labels), spec)
    begins = [begin for begin in range(0, 593, 4) if labels[begin] == labels[begin + 7]]
    assert len(begins) < 149, "some windows are of two classes"
    assert samples.y is not None
    assert np.array_equal(samples.y, labels[begins])
    assert np.array_equal(samples.x, [recording[begin : begin + 8].T for begin in begins])
    windows = Windows(spec)
    on_device = [prepare(window, spec)[0] for window in windows.push(recording)]
    assert np.array_equal(samples.tensor([0, 5]), [on_device[begins[0] // 4], on_device[begins[5] // 4]])
    assert samples.pixels([0]) is None
    assert len(load_samples(recording, spec, labelled=False)) == 149
    assert len(load_samples((recording, labels), spec, most=20)) == 20
    with pytest.raises(InputError, match="7 samples, and a window is 8"):
        load_samples((recording[:7], labels[:7]), spec)
    with pytest.raises(InputError, match="has one class all over"):
        load_samples((recording, np.arange(600) % 4), spec)
    whole = load_samples((np.zeros((40, 2, 8), np.float32), np.arange(40) % 4), spec)
    assert whole.x.shape == (40, 2, 8), "windows may come as such too"


def test_images_and_masks_are_resized_and_cut_alike() -> None:
    spec = InputSpec((3, 8, 8), (10, 12), fit="cover", crop=True)
    x = np.zeros((30, 20, 40, 3), np.uint8)
    x[:, 6:14, 16:24] = 255
    y = (x[..., 0] > 0).astype(np.int64)
    samples = load_samples((x, y), spec)
    assert samples.x.shape == (30, 8, 8, 3)
    assert samples.y is not None
    inside = samples.x[0, ..., 0] > 127
    assert 8 < inside.sum() < 64
    assert np.array_equal(inside, samples.y[0] == 1)
    assert np.array_equal(samples.tensor([0]), prepare(x[0], spec))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (((6, 128), [0.5]), "or add --raw"),
        (((6, 128), None, None, True), "--resize: for images, but the input is 6x128"),
        (((3, 8, 8), None, None, (9, 9)), "or add --crop"),
        (((3, 8, 8), None, None, (9,)), "is not the input's size"),
        (((3, 8, 8), None, None, (9, 7), {"crop": True}), "--resize 9x7 is smaller than the input 8x8"),
        (((3, 8, 8), None, None, False, {"fit": "cover"}), "add --resize 8x8"),
        (((3, 8, 8), None, None, True, {"fit": "squeeze"}), "use stretch or cover"),
        (((3, 8, 8), None, None, False, {"order": "gbr"}), "use rgb or bgr"),
        (((1, 8, 8), None, None, False, {"order": "bgr"}), "the input has 1"),
        (((6, 128), None, None, False, {"crop": True}), "--crop: for images"),
        (((3, 8, 8), 0.5, None, True, {"raw": True}), "with --raw frames are no images"),
        (((6, 128), None, None, False, {"raw": True}), "nothing says how"),
        (((6, 128), 3.0, 0.0, False, {"raw": True}), "--std 0, 0, 0, 0, 0, 0 lies outside"),
        (((3, 8, 8), None, None, False, {"hop": 4}), "no window C x L"),
        (((6, 128), None, None, False, {"hop": 0}), "at least one sample apart"),
        (((3, 8, 8), [0.5, 0.5]), "--mean has 2 numbers for 3 channels"),
        (((3, 8, 8), [123.7, 116.3, 103.5]), "divide that of pixels in 0..255 by 255"),
        (((3, 8, 8), None, [58.4]), "--std 58.4"),
        (((3, 8, 8), None, [0.0]), "--std 0"),
        (((3, 8, 8), [float("nan")]), "--mean nan"),
        (((3, 8, 8), "half"), "--mean 'half' is no list of numbers"),
        (((3, 8, 8), [[0.5], [0.5, 0.5]]), "is no list of numbers"),
        (((3, 8, 8), []), "--mean has 0 numbers for 3 channels"),
    ],
)
def test_wrong_inputs(arguments: Any, says: str) -> None:
    words = arguments[4] if len(arguments) > 4 else {}
    with pytest.raises(EdgeAdaptError) as caught:
        spec_for(*arguments[:4], **words)
    assert says in str(caught.value)
    assert caught.value.exit_code == 2
