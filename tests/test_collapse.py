"""The known ways in which adaptation ruins a model, on a real network and real images: it does so without a guard, and does not with one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from benchmarks._networks import NETWORKS, SHAPE
from benchmarks.cifar_stream import source_samples
from edgeadapt import Adapter
from edgeadapt.corruptions import streams
from edgeadapt.corruptions.streams import Batch
from edgeadapt.exporters.export import export
from edgeadapt.runtime.guard import Guard, Phase
from edgeadapt.runtime.state import Floats
from tests.zoo.data import Pack, pack_fixture  # noqa: F401

pytestmark = pytest.mark.data

IMAGES = 192
SHIFTS = ("gaussian_noise", "defocus_blur", "fog", "contrast", "pixelate")
ALLOWED = 0.005
"""More wrong predictions than without adapting, as a share: half a point."""

Stream = list[Batch]


def bundle(pack: Pack, folder: Path, method: str, statistics: str, batch: int) -> Path:
    """A ResNet-20 that adapts so."""
    path = folder / f"{method}-{statistics}-{batch}.edgeadapt"
    data, model = source_samples(pack, "resnet20", 768, 0), NETWORKS["resnet20"].trained(pack.folder)
    export(model, path, shape=SHAPE, data=data, method=method, statistics=statistics, batches=(batch,), allow_drop=True)
    return path


def made(pack: Pack, count: int = IMAGES) -> tuple[np.ndarray, np.ndarray]:
    x, y = pack.images("cifar_test1000")
    return x[:count], y[:count]


def error(path: Path, stream: Stream, how: str, counted: Callable[[int], bool] = lambda _: True, **hyper: float) -> float:
    """Share of wrong predictions: not adapting ("source"), "adapting", or "guarded"."""
    wrong: list[np.ndarray] = []
    with Adapter.open(path, prepared=False) as adapter:
        adapter.hyper = hyper
        guard = Guard(adapter) if how == "guarded" else None
        serve: dict[str, Callable[[Floats], Floats]] = {"source": adapter.source, "adapting": adapter.adapt}
        for number, batch in enumerate(stream):
            logits = guard(batch.x)[0] if guard is not None else serve[how](batch.x)
            if counted(number):
                wrong.append(logits.argmax(1) != batch.y)
        if guard is not None and guard.phase is Phase.PAUSED:
            raise AssertionError("a paused guard shows nothing")
    return float(np.concatenate(wrong).mean())


def compare(path: Path, stream: Stream, counted: Callable[[int], bool] = lambda _: True, **hyper: float) -> tuple[float, float, float]:
    """Not adapting, adapting, guarded; the last is held to the claim."""
    without, adapting, guarded = (error(path, stream, how, counted, **hyper) for how in ("source", "adapting", "guarded"))
    assert guarded <= without + ALLOWED, f"without {without:.3f}, adapting {adapting:.3f}, guarded {guarded:.3f}"
    return without, adapting, guarded


def rounds(x: np.ndarray, y: np.ndarray, count: int) -> Stream:
    return [batch for seed in range(count) for batch in streams.continual(x, y, names=SHIFTS, batch=64, seed=seed)]


def test_entropy_at_a_high_rate_collapses(pack: Pack, tmp_path: Path) -> None:
    """TENT at twenty times its rate: over shifts one after the other, again and again, and mixed; predictions end in few classes."""
    path = bundle(pack, tmp_path, "tent", "anchored", 64)
    x, y = made(pack)
    for stream in (rounds(x, y, 2), list(streams.mixed(x, y, names=SHIFTS * 2, batch=64))):
        without, adapting, guarded = compare(path, stream, rate=0.01)
        assert adapting > without + 0.1
        assert guarded < without, "it still adapts"


def test_statistics_of_windows_of_few_classes_ruin_a_model(pack: Pack, tmp_path: Path) -> None:
    """Batch statistics with frames sorted by class, shifted and clean; anchored ones with a guard gain even there."""
    live, anchored = (bundle(pack, tmp_path, "norm", statistics, 64) for statistics in ("live", "anchored"))
    x, y = made(pack, 640)

    def stream(*names: str) -> Stream:
        return list(streams.correlated(x, y, names=names, batch=64))

    for names in (("brightness", "jpeg_compression"), ("clean",)):
        without, adapting, _ = compare(live, stream(*names))
        assert adapting > without + 0.2
    compare(anchored, stream("clean"))
    without, _, guarded = compare(anchored, stream("gaussian_noise", "contrast"))
    assert guarded < without - 0.05


def test_statistics_of_one_frame_ruin_a_model(pack: Pack, tmp_path: Path) -> None:
    """Batch statistics of single frames, as published; the guard holds on to the source's."""
    path = bundle(pack, tmp_path, "norm", "live", 1)
    x, y = made(pack, 128)
    stream = list(streams.continual(x, y, names=("clean",), batch=1))
    without, adapting = (error(path, stream, how, mix=1.0) for how in ("source", "adapting"))
    assert adapting > without + 0.3
    assert error(path, stream, "guarded", mix=1.0) <= without + ALLOWED


def test_one_class_for_long_is_not_learned(pack: Pack, tmp_path: Path) -> None:
    """Steps on hundreds of noisy frames of one class, then clean frames of all."""
    path = bundle(pack, tmp_path, "tent", "anchored", 64)
    x, y = made(pack)
    one = np.resize(np.flatnonzero(y == 3), 64 * 24)
    stream = list(streams.continual(x[one], y[one], names=("gaussian_noise",), batch=64))
    stream += streams.continual(x, y, names=("clean",), batch=64)
    without, adapting, _ = compare(path, stream, lambda number: number >= 24, rate=0.01)
    assert adapting > without + 0.1
