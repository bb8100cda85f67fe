"""Sources of frames: what each of them promises, and what they make of broken files and streams."""

from __future__ import annotations

import contextlib
import io
import json
import os
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some
from PIL import Image

from edgeadapt.bundle import InputSpec, Manifest, Task
from edgeadapt.devices.sources import Frame, Source, open_source
from edgeadapt.errors import InputError, SourceError, UsageError
from edgeadapt.preprocess import windows_of
from tests.toybundle import CLASSES, SIDE, Toy

pytestmark = pytest.mark.device

IMAGES = np.random.default_rng(3).integers(0, 256, (7, SIDE, SIDE, 3)).astype(np.uint8)
LABELS = np.array([0, 1, 2, 3, 4, 0, 1])


@pytest.fixture(scope="module")
def manifest() -> Manifest:
    return Toy().manifest()


def png(path: Path, image: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)
    return path


def saved(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, array, allow_pickle=True)
    return out.getvalue()


def as_folder(root: Path, manifest: Manifest) -> Source:
    for index, image in enumerate(IMAGES):
        png(root / "photos" / f"{index}.png", image)
    return open_source(str(root / "photos"), manifest)


def as_npz(root: Path, manifest: Manifest) -> Source:
    np.savez(root / "stored.npz", x=IMAGES, y=LABELS)
    return open_source(str(root / "stored.npz"), manifest)


def as_deflated_npz(root: Path, manifest: Manifest) -> Source:
    np.savez_compressed(root / "deflated.npz", x=IMAGES)
    return open_source(str(root / "deflated.npz"), manifest)


def as_npy(root: Path, manifest: Manifest) -> Source:
    np.save(root / "frames.npy", IMAGES)
    return open_source(str(root / "frames.npy"), manifest)


def as_paths(root: Path, manifest: Manifest) -> Source:
    lines = [str(png(root / "paths" / f"{index}.png", image)) for index, image in enumerate(IMAGES)]
    lines[3] = json.dumps({"path": lines[3], "label": 2})
    return open_source("-", manifest, stdin=io.BytesIO("\n".join(lines).encode() + b"\n"))


def as_arrays(root: Path, manifest: Manifest) -> Source:
    data = b"".join(saved(part) for part in (IMAGES[0], IMAGES[1:3], IMAGES[3:]))
    return open_source("-", manifest, "npy", io.BytesIO(data))


EVERY = [as_folder, as_npz, as_deflated_npz, as_npy, as_paths, as_arrays]


@pytest.mark.parametrize("make", EVERY)
def test_every_source_gives_its_frames_once_and_in_order(make: Callable[[Path, Manifest], Source], tmp_path, manifest):
    with make(tmp_path, manifest) as source:
        found = list(source)
        assert source.name
        assert source.count in (None, len(IMAGES))
    assert [frame.fault for frame in found] == [""] * len(IMAGES)
    assert np.array_equal([frame.pixels for frame in found], IMAGES)
    assert len({frame.id for frame in found}) == len(IMAGES)
    source.close()


@pytest.mark.parametrize("make", EVERY)
def test_every_source_can_be_left_early(make, tmp_path, manifest):
    with make(tmp_path, manifest) as source:
        assert next(iter(source)).pixels is not None


def folder(root: Path, names: list[str], files: int = 1) -> Path:
    for position, name in enumerate(names):
        for number in range(files):
            png(root / name / f"{number}.png", IMAGES[position])
    return root


def truths(path: Path, manifest: Manifest) -> list[object]:
    source = open_source(str(path), manifest)
    found = [frame.truth for frame in source]
    assert source.labelled == any(truth is not None for truth in found)
    return found


def test_folders_named_like_classes_give_the_truth(tmp_path, manifest):
    assert truths(folder(tmp_path, ["class 3", "class 1"]), manifest) == [1, 3]


def test_as_many_folders_as_classes_give_the_truth_in_sorted_order(tmp_path, manifest):
    assert truths(folder(tmp_path, ["e", "b", "a", "d", "c"]), manifest) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("names", [["one", "two"], ["class 1", "class 2", "other"], ["class 1", "class 2", "class 3", "class 4", "fifth"]])
def test_other_folders_are_only_folders(names, tmp_path, manifest):
    assert truths(folder(tmp_path, names), manifest) == [None] * len(names)


def test_segmentation_folders_are_only_folders(tmp_path, manifest):
    task = replace(manifest, task=Task("segmentation", CLASSES, manifest.task.names))
    assert truths(folder(tmp_path, ["class 3", "class 1"]), task) == [None, None]


def test_a_folder_is_walked_deep_in_sorted_order_past_what_is_no_image(tmp_path, manifest):
    for name in ("b/2.png", "b/10.PNG", "a/deep/er/x.jpg", "z.bmp", ".hidden/y.png", "b/.y.png"):
        png(tmp_path / name, IMAGES[0])
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "a" / "back").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "linked").symlink_to(tmp_path / "b", target_is_directory=True)
    assert [frame.id for frame in open_source(str(tmp_path), manifest)] == [
        "a/deep/er/x.jpg",
        "b/10.PNG",
        "b/2.png",
        "linked/10.PNG",
        "linked/2.png",
        "z.bmp",
    ]


def test_broken_files_are_told_and_passed_over(tmp_path, manifest):
    good = png(tmp_path / "a.png", IMAGES[0]).read_bytes()
    (tmp_path / "b.png").write_bytes(good[: len(good) // 2])
    (tmp_path / "c.png").write_bytes(b"")
    (tmp_path / "d.png").symlink_to(tmp_path / "gone")
    os.mkfifo(tmp_path / "e.png")
    Image.fromarray(np.zeros((SIDE, SIDE), np.uint16)).save(tmp_path / "f.png")
    png(tmp_path / "g.png", IMAGES[1])
    found = list(open_source(str(tmp_path), manifest))
    assert [bool(frame.fault) for frame in found] == [False, True, True, True, True, True, False]
    assert [frame.pixels is None for frame in found] == [bool(frame.fault) for frame in found]
    assert "No such file" in found[3].fault
    assert "not a file" in found[4].fault
    assert "8 bits" in found[5].fault


def test_links_that_cannot_be_followed_are_told_and_passed_over(tmp_path, manifest):
    folder(tmp_path, ["class 1", "class 3"])
    for name in ("class 1/a", "class 2", "b.png"):
        (tmp_path / name).symlink_to(tmp_path / name)
    source = open_source(str(tmp_path), manifest)
    found = list(source)
    assert [frame.id for frame in found] == ["b.png", "class 1/0.png", "class 1/a", "class 2", "class 3/0.png"]
    assert [frame.fault for frame in found if frame.pixels is None] == ["cannot be opened: Too many levels of symbolic links"] * 3
    assert [frame.truth for frame in found if frame.pixels is not None] == [1, 3]


def test_too_large_pictures_are_not_decoded(tmp_path, manifest, monkeypatch):
    monkeypatch.setattr("edgeadapt.devices.sources.pictures.PIXELS", SIDE * SIDE - 1)
    png(tmp_path / "a.png", IMAGES[0])
    assert "at most" in next(iter(open_source(str(tmp_path), manifest))).fault


def test_pictures_become_what_the_model_takes(tmp_path, manifest):
    grey = replace(manifest, input=InputSpec((1, SIDE, SIDE)))
    png(tmp_path / "a.png", IMAGES[0])
    Image.fromarray(IMAGES[0]).convert("P").save(tmp_path / "b.gif")
    Image.fromarray(IMAGES[0]).convert("LA").save(tmp_path / "c.png")
    assert [frame.pixels.shape for frame in open_source(str(tmp_path), grey)] == [(SIDE, SIDE, 1)] * 3
    assert [frame.pixels.shape for frame in open_source(str(tmp_path), manifest)] == [(SIDE, SIDE, 3)] * 3


def test_images_for_a_sensor_model_are_refused_at_once(tmp_path, manifest):
    sensor = replace(manifest, input=InputSpec((6, 128)))
    for stream in (str(tmp_path), "-"):
        with pytest.raises(SourceError, match="6x128"):
            open_source(stream, sensor, stdin=io.BytesIO())


def test_without_pillow_image_files_are_refused_with_the_way_out(tmp_path, manifest, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "PIL.Image", None)
    with pytest.raises(SourceError, match=r"edgeadapt\[images\]"):
        open_source(str(tmp_path), manifest)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"y": LABELS}, "no x.npy, but y.npy"),
        ({"x": IMAGES[:0]}, "no frames"),
        ({"x": IMAGES[0]}, "one frame"),
        ({"x": IMAGES, "y": LABELS[:3]}, "each of 7 frames"),
        ({"x": IMAGES, "y": LABELS.astype(float)}, "whole numbers"),
        ({"x": np.asfortranarray(IMAGES)}, "column by column"),
        ({"x": np.array([{}], object)}, "never unpickled"),
        ({"x": np.zeros(3, "u1,f4")}, "not numbers"),
    ],
)
def test_archives_that_cannot_be_a_stream(arrays, message, tmp_path, manifest):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(SourceError, match=message):
        open_source(str(tmp_path / "a.npz"), manifest)


def claiming(path: Path, x: np.ndarray, shape: tuple[int, ...]) -> Path:
    """An archive whose labels say that they are so many, and are not there."""
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, {"descr": "<i8", "fortran_order": False, "shape": shape})
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.npy", saved(x))
        archive.writestr("y.npy", head.getvalue())
    return path


@pytest.mark.parametrize("kind", ["classification", "segmentation"])
def test_labels_of_another_shape_are_refused_before_they_are_read(kind, tmp_path, manifest):
    task = replace(manifest, task=Task(kind, CLASSES), input=InputSpec((3, SIDE, SIDE), resize=(SIDE, SIDE)))
    large = np.zeros((2, 20, 30, 3), np.uint8)
    for shape in ((2, 8192, 8192), (2, SIDE), (2, SIDE, SIDE, 1), (2, 3, SIDE, SIDE), ()):
        with pytest.raises(SourceError, match="one row for each of 2 frames"):
            open_source(str(claiming(tmp_path / "a.npz", large, shape)), task)
    for shape in ((2, 20, 30), (2, SIDE, SIDE)):
        path = str(claiming(tmp_path / "a.npz", large, shape))
        if kind == "segmentation":
            open_source(path, task).close()
        else:
            with pytest.raises(SourceError, match="one row for each of 2 frames"):
                open_source(path, task)
    open_source(str(claiming(tmp_path / "a.npz", large, (2,))), task).close()


def test_labels_of_a_sensor_may_be_one_a_sample(tmp_path, manifest):
    sensor = replace(manifest, task=Task("segmentation", CLASSES), input=InputSpec((2, 6)))
    open_source(str(claiming(tmp_path / "a.npz", np.zeros((3, 2, 6), np.float32), (3, 6))), sensor).close()
    with pytest.raises(SourceError, match="one row for each of 3 frames"):
        open_source(str(claiming(tmp_path / "a.npz", np.zeros((3, 2, 6), np.float32), (3, 2))), sensor)


def test_an_array_by_another_name_is_no_array(tmp_path, manifest):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("x", saved(IMAGES))
    with pytest.raises(SourceError, match=r"has no x\.npy, but x"):
        open_source(str(tmp_path / "a.npz"), manifest)
    with zipfile.ZipFile(tmp_path / "a.npz", "a") as archive:
        archive.writestr("x.npy", saved(IMAGES))
        archive.writestr("y", b"no labels")
    with open_source(str(tmp_path / "a.npz"), manifest) as source:
        assert not source.labelled


@pytest.mark.parametrize("x", [IMAGES.astype(float), IMAGES[..., :2], IMAGES.transpose(0, 3, 1, 2), np.zeros((3, 9, 9, 9), np.float32)])
def test_frames_of_another_kind_are_refused_at_once(x, tmp_path, manifest):
    np.savez(tmp_path / "a.npz", x=np.ascontiguousarray(x))
    with pytest.raises(InputError):
        open_source(str(tmp_path / "a.npz"), manifest)


def test_archives_of_floats_in_another_byte_order_and_with_maps_of_labels(tmp_path, manifest):
    x = np.random.default_rng(0).standard_normal((3, 3, SIDE, SIDE)).astype(np.float32)
    y = np.arange(3 * SIDE * SIDE, dtype=np.int16).reshape(3, SIDE, SIDE)
    np.savez(tmp_path / "a.npz", x=x.astype(">f4"), y=y)
    found = list(open_source(str(tmp_path / "a.npz"), replace(manifest, task=Task("segmentation", CLASSES))))
    assert np.array_equal([frame.pixels for frame in found], x)
    assert {frame.pixels.dtype for frame in found} == {np.dtype(np.float32)}
    assert np.array_equal([frame.truth for frame in found], y)
    assert np.array_equal([frame.truth for frame in as_npz(tmp_path, manifest)], LABELS)


@pytest.mark.parametrize("data", [b"", b"PK", b"no archive", saved(IMAGES)])
def test_what_is_no_archive_is_refused(data, tmp_path, manifest):
    (tmp_path / "a.npz").write_bytes(data)
    with pytest.raises(SourceError, match="not an"):
        open_source(str(tmp_path / "a.npz"), manifest)


def test_a_damaged_archive_breaks_off_where_it_is_damaged(tmp_path, manifest):
    np.savez(tmp_path / "a.npz", x=np.zeros((4000, SIDE, SIDE, 3), np.uint8))
    data = bytearray((tmp_path / "a.npz").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "a.npz").write_bytes(data)
    with pytest.raises(SourceError, match="damaged at row"):
        list(open_source(str(tmp_path / "a.npz"), manifest))
    (tmp_path / "b.npy").write_bytes(saved(IMAGES)[:-10])
    with open_source(str(tmp_path / "b.npy"), manifest) as source:
        frames = iter(source)
        assert len([next(frames) for _ in range(6)]) == 6
        with pytest.raises(SourceError, match="ended in row 6"):
            next(frames)


@pytest.mark.parametrize("stream", ["gone", "gone.npz", "gone.npy", "notes.txt"])
def test_no_such_source(stream, tmp_path, manifest):
    (tmp_path / "notes.txt").write_text("no source")
    with pytest.raises(SourceError, match=stream):
        open_source(str(tmp_path / stream), manifest)
    with pytest.raises(UsageError, match="paths, npy"):
        open_source("-", manifest, "jpeg")


def test_lines_that_name_no_image_are_told_and_passed_over(tmp_path, manifest):
    good = png(tmp_path / "ä.png", IMAGES[0])
    lines = ["", "  ", str(tmp_path / "gone.png"), "{broken", '{"label": 1}', '{"path": 3}', "nul\0byte"]
    lines += [json.dumps({"path": str(good), "label": label}) for label in ("class 2", 9, "other", None)] + [f"{good}\r"]
    found = list(open_source("-", manifest, stdin=io.BytesIO("\n".join(lines).encode())))
    assert [bool(frame.fault) for frame in found] == [True] * 5 + [False] * 5
    assert [frame.truth for frame in found[5:]] == [2, None, None, None, None]
    odd = list(open_source("-", manifest, stdin=io.BytesIO(b"\xff\xfe.png\n")))
    assert odd[0].fault
    json.dumps(odd[0].id).encode()
    with pytest.raises(SourceError, match="a line of more"):
        list(open_source("-", manifest, stdin=io.BytesIO(b"x" * 70_000)))


def test_arrays_that_do_not_fit_are_told_and_passed_over(manifest):
    wrong = [IMAGES[0, :, :, :2], IMAGES.astype(float), np.zeros(0), np.zeros((2, 3, 9, 9), np.float32), np.array(7)]
    for array in wrong:
        found = list(open_source("-", manifest, "npy", io.BytesIO(saved(IMAGES[0]) + saved(array) + saved(IMAGES[:2]))))
        assert [bool(frame.fault) for frame in found] == [False, True, False, False]
        assert [frame.id for frame in found] == [0, 1, 2, 3]


@pytest.mark.parametrize("tail", [b"x", saved(IMAGES)[:-1], saved(IMAGES)[:60], saved(np.array([{}], object)), b"\x93NUMPY\x01\x00\x03\x00((("])
def test_a_garbled_stream_of_arrays_breaks_off(tail, manifest):
    source = iter(open_source("-", manifest, "npy", io.BytesIO(saved(IMAGES[0]) + tail)))
    assert next(source).pixels is not None
    with pytest.raises(SourceError):
        list(source)


def test_an_array_larger_than_any_memory_breaks_off(manifest):
    header = repr({"descr": "|u1", "fortran_order": False, "shape": (2**40, 2**40, 6, 3)})
    data = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + bytes(100)
    with pytest.raises(SourceError, match="ended in"):
        list(open_source("-", manifest, "npy", io.BytesIO(data)))


def headers() -> some.SearchStrategy[bytes]:
    entries = some.fixed_dictionaries(
        {
            "descr": some.sampled_from(["|u1", "<f4", ">f4", "<f8", "|O", "<U3", "|V0", "", "<i8"]),
            "fortran_order": some.sampled_from([True, False, 1]),
            "shape": some.lists(some.integers(-2, 2**40), max_size=5).map(tuple) | some.just((6, 6, 3)),
        }
    )
    texts = entries.map(repr) | some.text(max_size=40)
    return some.builds(
        lambda version, text, data: b"\x93NUMPY" + version + len(text.encode()).to_bytes(2, "little") + text.encode() + data,
        some.sampled_from([b"\x01\x00", b"\x02\x00", b"\x03\x00", b"\x09\x00"]),
        texts,
        some.binary(max_size=200),
    )


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=some.binary(max_size=64) | headers())
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_any_bytes_are_frames_faults_or_a_source_error(data, manifest):
    found: list[Frame] = []
    with contextlib.suppress(SourceError):  # any other error fails the test
        found += open_source("-", manifest, "npy", io.BytesIO(data))
    assert all((frame.pixels is None) == bool(frame.fault) for frame in found)


def test_a_recording_gives_the_windows_of_its_samples(tmp_path, manifest):
    spec = replace(manifest, input=InputSpec((2, 6), hop=4))
    recording, labels = np.arange(40, dtype=np.float32).reshape(20, 2), np.repeat([3, 1], 10)
    np.savez(tmp_path / "r.npz", x=recording, y=labels)
    with open_source(str(tmp_path / "r.npz"), spec) as source:
        assert source.count is None
        found = list(source)
    assert np.array_equal([frame.pixels for frame in found], windows_of(recording, spec.input))
    assert [frame.truth for frame in found] == [3, 3, None, 1]
    np.savez(tmp_path / "whole.npz", x=np.zeros((3, 2, 6), np.float32))
    assert len(list(open_source(str(tmp_path / "whole.npz"), spec))) == 3
    np.savez(tmp_path / "double.npz", x=recording.astype(np.float64))
    with pytest.raises(InputError, match="are float64, not float32"):
        open_source(str(tmp_path / "double.npz"), spec)
    np.savez(tmp_path / "odd.npz", x=recording, y=np.zeros((20, 2), int))
    with pytest.raises(SourceError, match="not whole numbers, one row for each of 20 frames"):
        open_source(str(tmp_path / "odd.npz"), spec)
