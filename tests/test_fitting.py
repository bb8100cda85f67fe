"""Pictures that are brought to the model's size as they are read: the same pixels, in memory that is known before."""

from __future__ import annotations

import io
import json
import struct
import subprocess
import sys
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from edgeadapt.bundle import InputSpec, Task
from edgeadapt.devices.sources import Wanted, fitting, pictures
from edgeadapt.devices.sources.arrays import Archive
from edgeadapt.devices.sources.base import PictureTooLarge
from edgeadapt.devices.sources.folder import Folder
from edgeadapt.devices.sources.stdin import Arrays, Paths
from edgeadapt.devices.sources.watch import Watch
from edgeadapt.errors import InputError
from edgeadapt.preprocess import fitted
from edgeadapt.runtime.daemon.config import Config, FolderSource, HttpConfig, HttpSource, MemoryConfig, NoSource, ReplaySource, StdinSource
from edgeadapt.runtime.daemon.model import beside
from tests.child import ROOT, environment
from tests.toybundle import Toy

pytestmark = pytest.mark.device

MIB = 2**20
MUCH = 2**30
TASK = Task("classification", 5)
SPECS = {
    "stretch": InputSpec((3, 24, 32), resize=(24, 32)),
    "cover": InputSpec((3, 24, 24), resize=(28, 28), fit="cover", crop=True),
    "cut": InputSpec((3, 20, 16), crop=True),
    "larger": InputSpec((3, 90, 120), resize=(90, 120)),
    "grey": InputSpec((1, 24, 32), resize=(24, 32)),
    "as it is": InputSpec((3, 50, 67)),
}


def drawn(width: int = 67, height: int = 50) -> Image.Image:
    rng = np.random.default_rng(3)
    return Image.fromarray(rng.integers(0, 256, (-(-height // 8), -(-width // 8), 3), np.uint8)).resize((width, height))


def made(kind: str, width: int = 67, height: int = 50) -> bytes:
    """A picture of one of the kinds that decoders treat differently."""
    image, file, (form, _, how) = drawn(width, height), io.BytesIO(), kind.partition(" ")
    options: dict[str, object] = {"JPEG progressive": {"progressive": True, "subsampling": 0}, "WEBP lossless": {"lossless": True}}.get(kind, {})  # type: ignore[assignment]
    if how == "strip":
        options = {"compression": "tiff_adobe_deflate", "strip_size": 1 << 30}
    if how in ("L", "LA", "RGBA", "CMYK", "1"):
        image = image.convert(how)
    if how == "P":
        image = image.quantize(64)
    image.save(file, form, **options)
    return file.getvalue()


KINDS = [
    *("JPEG", "JPEG progressive", "JPEG L", "JPEG CMYK", "PNG", "PNG L", "PNG 1", "PNG LA", "PNG RGBA", "PNG P", "GIF P", "BMP", "PPM", "TIFF"),
    *("TIFF strip", "WEBP", "WEBP lossless"),
]


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_pixels_are_those_of_the_export_to_the_byte(kind: str, name: str) -> None:
    spec, data = SPECS[name], made(kind)
    whole = pictures.decoded(io.BytesIO(data), spec.shape[0])
    wanted = whole if whole.shape[:2] == spec.shape[1:] else fitted(whole, spec)
    found = pictures.bounded(io.BytesIO(data), spec, MUCH, pictures.KNOWN)
    assert found.dtype == np.uint8
    assert found.shape == (*spec.shape[1:], spec.shape[0])
    assert np.array_equal(found, wanted)


def test_a_picture_in_the_models_size_stays_as_it_is_though_others_are_resized_and_cut() -> None:
    spec = InputSpec((3, 50, 67), resize=(60, 80), crop=True)
    assert np.array_equal(pictures.bounded(io.BytesIO(made("PNG")), spec, MUCH), np.asarray(drawn()))


CHILD = """
import io, json, sys
from PIL import Image
from edgeadapt.bundle import InputSpec
from edgeadapt.devices.sources import fitting, pictures

def held(what):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(what))

spec, found = InputSpec((3, 224, 224), resize=(224, 224)), {}
for name in sys.argv[2:]:
    with open(f"{sys.argv[1]}/small {name}", "rb") as file:
        pictures.bounded(io.BytesIO(file.read()), spec, 2**30, pictures.KNOWN)
for name in sys.argv[2:]:
    path = f"{sys.argv[1]}/{name}"
    with Image.open(path) as image:
        said = fitting.cost(image, spec)
        pixels = image.width * image.height
    del image
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = held("VmRSS")
    pictures.bounded(path, spec, 2**30, pictures.KNOWN)
    found[name] = [said, held("VmHWM") - before, pixels]
print(json.dumps(found))
"""


def test_no_picture_takes_more_than_was_said_before(tmp_path: Path) -> None:
    for kind in KINDS:
        (tmp_path / kind).write_bytes(made(kind, 1000, 800))
        (tmp_path / f"small {kind}").write_bytes(made(kind, 32, 32))
    command = [sys.executable, "-c", CHILD, str(tmp_path), *KINDS]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, env=environment()).stdout)
    assert {kind: (said, taken) for kind, (said, taken, _) in found.items() if taken > said} == {}
    for kind in ("JPEG", "PNG", "BMP"):  # an array of it, as it was decoded before, would take 14
        assert found[kind][1] / found[kind][2] < 7
        assert found[kind][0] / found[kind][2] < 7


def test_what_is_too_large_is_refused_by_its_head_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("it was decoded"))
    head = struct.pack(">IIBBBBB", 3000, 2000, 8, 2, 0, 0, 0)
    body = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    with pytest.raises(PictureTooLarge, match="3000 x 2000 pixels") as refused:
        pictures.bounded(io.BytesIO(body), SPECS["stretch"], 24 * MIB)
    assert "memory.picture" in refused.value.hint
    with pytest.raises(InputError, match="does not resize"):
        pictures.bounded(io.BytesIO(body), SPECS["as it is"], MUCH)


def test_jpeg_files_whose_coefficients_are_held_cost_more() -> None:
    def said(data: bytes) -> int:
        with Image.open(io.BytesIO(data)) as image:
            return fitting.cost(image, SPECS["stretch"])

    plain, progressive = made("JPEG", 640, 480), made("JPEG progressive", 640, 480)
    assert said(progressive) - said(plain) > 5 * 640 * 480
    scan = plain.index(b"\xff\xda")
    apart = bytearray(plain)
    apart[scan + 4] = 1  # its first scan has one component
    assert said(bytes(apart)) == said(progressive)
    assert said(plain[:2] + b"\xff\xfe\x00\x05abc" + plain[2:]) == said(plain)  # a comment
    after = plain.index(b"\xff\xdb")
    assert said(plain[:after] + b"\x00" + plain[after:]) == said(progressive)  # what is between segments is not looked through


def test_a_note_in_a_png_file_is_bounded() -> None:
    from PIL import PngImagePlugin

    notes = PngImagePlugin.PngInfo()
    for number in range(8):
        notes.add_text(f"note{number}", "x" * 500_000, zip=True)
    file = io.BytesIO()
    drawn().save(file, "PNG", pnginfo=notes)
    pictures.bounded(io.BytesIO(made("PNG")), SPECS["stretch"], MUCH)
    with pytest.raises(InputError, match="cannot be read as an image"):
        pictures.bounded(io.BytesIO(file.getvalue()), SPECS["stretch"], MUCH)


def test_one_picture_is_read_at_a_time() -> None:
    done = threading.Event()

    def read() -> None:
        pictures.bounded(io.BytesIO(made("PNG")), SPECS["stretch"], MUCH)
        done.set()

    with fitting._TURN:
        thread = threading.Thread(target=read)
        thread.start()
        assert not done.wait(0.2)
    thread.join(60)
    assert done.is_set()


# ------------------------------------------------------------------------------------------------------------ sources


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    drawn(1200, 900).save(tmp_path / "in/a.png")
    drawn(60, 40).save(tmp_path / "in/b.png")
    return tmp_path / "in"


WANTED = Wanted(SPECS["stretch"], TASK, 2 * MIB)


def test_a_folder_gives_what_is_too_large_as_a_bad_frame(folder: Path) -> None:
    np.save(folder / "c.npy", np.zeros((1200, 900, 3), np.uint8))
    np.save(folder / "d.npy", np.asarray(drawn(60, 40)))
    source = Watch(folder, WANTED, existing=True, poll=0.01, remove=True)
    found = []
    for frame in source:
        found.append(frame)
        if len(found) == 4:
            source.stop()
    assert [frame.id for frame in found] == ["a.png", "b.png", "c.npy", "d.npy"]
    assert [bool(frame.fault) for frame in found] == [True, False, True, False]
    assert "memory.picture" in found[0].fault
    assert np.array_equal(found[1].pixels, fitted(np.asarray(drawn(60, 40)), SPECS["stretch"]))
    assert np.array_equal(found[3].pixels, found[1].pixels)
    assert (folder / "a.png").is_file()
    assert not (folder / "b.png").exists()


def test_other_sources_do_too(folder: Path, tmp_path: Path) -> None:
    assert [bool(frame.fault) for frame in Folder(folder, WANTED)] == [True, False]
    lines = io.BytesIO(f"{folder}/a.png\n{folder}/b.png\n".encode())
    assert [bool(frame.fault) for frame in Paths(lines, WANTED)] == [True, False]
    large, small = np.zeros((2, 1200, 900, 3), np.uint8), np.asarray(drawn(60, 40))[None]
    data = io.BytesIO()
    np.save(data, large)
    np.save(data, small)
    data.seek(0)
    found = list(Arrays(data, WANTED))
    assert [bool(frame.fault) for frame in found] == [True, False]
    assert found[1].pixels is not None
    assert found[1].pixels.shape == (24, 32, 3)
    np.savez(tmp_path / "large.npz", x=large)
    with pytest.raises(InputError, match=r"a frame of .*large.npz has 900 x 1200 pixels"):
        Archive(tmp_path / "large.npz", WANTED)
    np.savez(tmp_path / "small.npz", x=small)
    assert [frame.pixels.shape for frame in Archive(tmp_path / "small.npz", WANTED)] == [(24, 32, 3)]  # type: ignore[union-attr]


def test_without_a_bound_pictures_come_as_they_are(folder: Path) -> None:
    found = list(Folder(folder, Wanted(SPECS["stretch"], TASK)))
    assert [frame.pixels.shape for frame in found] == [(900, 1200, 3), (40, 60, 3)]  # type: ignore[union-attr]


def test_what_a_picture_may_take_is_taken_off_the_budget_where_pictures_come() -> None:
    from dataclasses import replace

    manifest = replace(Toy(batches=(1, 4)).manifest(), input=InputSpec((3, 32, 32)))
    resizing = replace(manifest, input=SPECS["stretch"])
    much, little = MemoryConfig(picture=40 * MIB), MemoryConfig(picture=10 * MIB)

    def more(config: Config, manifest: object = resizing) -> int:
        return beside(replace(config, memory=much), manifest) - beside(replace(config, memory=little), manifest)  # type: ignore[arg-type]

    for source in (FolderSource(path=Path("/a")), HttpSource(), ReplaySource(path=Path("/a")), StdinSource()):
        assert more(Config(source=source)) == 30 * MIB, source
    assert more(Config(http=HttpConfig(enabled=True))) == 30 * MIB
    for none in (NoSource(), StdinSource(format="csv")):
        assert more(Config(source=none)) == 0
    assert more(Config(source=FolderSource(path=Path("/a"))), manifest) == 0  # only pictures of its own size are read
    assert more(Config(source=FolderSource(path=Path("/a"))), replace(manifest, input=InputSpec((6, 16)))) == 0
