"""From what cameras and sensors give to predictions: through an export, a bundle and a stream as in PyTorch with the preprocessing by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from edgeadapt.bundle import Bundle
from edgeadapt.cli.main import main
from edgeadapt.exporters.load import load_factory
from edgeadapt.preprocess import PREPROCESSING, fingerprint

FACTORIES = '''
import torch
from torch import nn

def sensor():
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv1d(2, 8, 3), nn.BatchNorm1d(8), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(8, 3)).eval()

def camera():
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)).eval()
'''


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "factories.py").write_text(FACTORIES)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def served(bundle: str, source: str, capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    capsys.readouterr()
    assert main(["run", bundle, "--source", source, "--no-adapt"]) == 0
    output = capsys.readouterr()
    assert "warning" not in output.err
    return [json.loads(line) for line in output.out.splitlines()]


def check(lines: list[dict[str, Any]], x: np.ndarray, model: nn.Module) -> None:
    with torch.no_grad():
        shares = model(torch.from_numpy(np.ascontiguousarray(x))).softmax(1).numpy()
    assert len(lines) == len(x)
    assert [line["label"] for line in lines] == shares.argmax(1).tolist()
    assert np.allclose([line["confidence"] for line in lines], shares.max(1), atol=2e-4)


def test_a_recording_of_a_sensor(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    random = np.random.default_rng(0)
    recording = (random.standard_normal((400, 2)) * [30, 0.2] + [500, -2]).astype(np.float32)
    np.savez("recording.npz", x=recording, y=np.repeat([0, 1, 2, 0], 100))
    words = "--input 2x16 --raw --mean 500,-2 --std 30,0.2 --hop 8 --method norm --batch 4 --quiet --allow-drop"
    assert main(["export", "factories.py:sensor", *words.split(), "--data", "recording.npz", "-o", "s.edgeadapt"]) == 0
    manifest = Bundle.open("s.edgeadapt").manifest
    assert (manifest.input.raw, manifest.input.hop) == (True, 8)
    assert manifest.selfcheck[PREPROCESSING] == fingerprint(manifest.input)
    scaled = (recording - np.float32([500, -2])) / np.float32([30, 0.2])
    windows = np.stack([scaled[begin : begin + 16].T for begin in range(0, 385, 8)])
    lines = served("s.edgeadapt", "recording.npz", capsys)
    check(lines, windows, load_factory("factories.py:sensor"))
    assert [line.get("truth") for line in lines[:3]] == [0, 0, 0]
    assert main(["inspect", "s.edgeadapt"]) == 0
    assert "as the sensor gives it, less 500 -2, over 30 0.2; of single samples a window every 8" in capsys.readouterr().out


def test_photographs_that_are_resized_cut_and_turned(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    random, found = np.random.default_rng(1), []
    for index in range(48):
        height, width = random.integers(20, 60, 2)
        pixels = random.integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8)
        image = Image.fromarray(pixels).resize((int(width), int(height)))
        folder = here / "photos" / "abc"[index % 3]
        folder.mkdir(parents=True, exist_ok=True)
        image.save(folder / f"{index:02}.png")
        tall, wide = (20, int(20 * width / height)) if height <= width else (int(20 * height / width), 20)
        top, left = round((tall - 16) / 2), round((wide - 16) / 2)
        shown = np.asarray(image.resize((wide, tall), Image.Resampling.BILINEAR).crop((left, top, left + 16, top + 16)))
        found.append(((shown[..., ::-1] / np.float32(255) - np.float32(0.5)) / np.float32(0.25)).transpose(2, 0, 1))
    order = [*range(0, 48, 3), *range(1, 48, 3), *range(2, 48, 3)]  # folder by folder
    words = "--input 3x16x16 --resize 20x20 --fit cover --order bgr --mean 0.5 --std 0.25 --method norm --batch 4 --quiet --allow-drop"
    assert main(["export", "factories.py:camera", *words.split(), "--data", "photos", "-o", "c.edgeadapt"]) == 0
    check(served("c.edgeadapt", "photos", capsys), np.stack(found)[order], load_factory("factories.py:camera"))
    assert main(["inspect", "c.edgeadapt"]) == 0
    told = "pictures: resized to as small as covers 20 x 20, cut to 16 x 16, divided by 255, blue first, less 0.5 0.5 0.5, over 0.25 0.25 0.25"
    assert told in capsys.readouterr().out
