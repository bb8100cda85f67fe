"""A bundle and PyTorch eager in two processes that take turns: what `step.py` and `predict.py` share."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._floors import trivial_model
from benchmarks._turns import Worker, paired_ratio, rounds, serve

TORCH = ("plain", "lean", "plain-channels-last", "lean-channels-last")
KINDS = ("bundle", *TORCH)
FORMS: dict[str, dict[str, Any]] = {
    "": {},
    "int8": {"quantize": "int8"},
    "int8-compact": {"quantize": "int8", "updates": "compact"},
    "int8-tiny": {"quantize": "int8", "updates": "tiny"},
}
"""What a bundle may be exported with besides; "": float32."""
MOMENTS = ("momentum.", "first.", "second.", "step")


@lru_cache(maxsize=1)
def batches(count: int, batch: int, seed: int = 0, shape: tuple[int, ...] = (3, 32, 32)) -> list[np.ndarray]:
    """Noise, float32 (batch, *shape), a little different in mean and deviation from one to the next.

    Of a sine of large numbers, as numpy's random module would take 5 MB of the process that is measured.
    """
    size, found = batch * int(np.prod(shape)), []
    for k in range(count):
        noise = np.sin(np.arange(1 + size * (k + count * seed), 1 + size * (k + 1 + count * seed)) ** 2 * 0.1).astype(np.float32)
        found.append(noise.reshape(batch, *shape) * np.float32(1.4 * (1 + 0.1 * k)) + np.float32(0.05 * k))
    return found


def turns(
    run: Callable[[np.ndarray], np.ndarray], state: Callable[[], dict[str, np.ndarray]], batch: int, shape: Sequence[int] = (3, 32, 32)
) -> None:
    """Serve runs over four batches in a circle; "finish PATH" saves the last logits and the state."""
    given, last = batches(4, batch, 0, tuple(shape)), [np.zeros(0)]
    position = [0]

    def turn() -> None:
        last[0] = run(given[position[0] % len(given)])
        position[0] += 1

    serve(turn, lambda path: np.savez(path, logits=last[0], **state()))


def make_bundle(folder: Path, model: str, method: str, sizes: Sequence[int], parts: int, form: str = "") -> tuple[Path, Path]:
    """Export without warm-up in one of the forms, unless it is in the folder; the bundle, and its initial state as .npz.

    Weights are random. In 8 bits they are the pack's, and so are the samples, as which layers bear 8 bits hangs on them.
    """
    from benchmarks._networks import EVERY, NETWORKS, data_pack
    from benchmarks.cifar_stream import source_samples
    from edgeadapt.bundle import Bundle, InputSpec
    from edgeadapt.exporters.data import Samples
    from edgeadapt.exporters.export import export
    from tests.zoo.data import Pack

    stem = f"{model}-{method}-{parts}-{'-'.join(map(str, sizes))}{form and f'-{form}'}"
    path, state = folder / f"{stem}.edgeadapt", folder / f"{stem}.npz"
    if path.exists() and state.exists():
        return path, state
    network = EVERY[model]
    if form and model in NETWORKS:
        pack = Pack(data_pack())
        net, data = network.trained(pack.folder), source_samples(pack, model, 1000, 0)
    else:
        x = np.concatenate(batches(8 if model in NETWORKS else 2, 32, 0, network.shape))
        net, data = network.random(), Samples(x, np.arange(len(x)) % 10, InputSpec(network.shape))
    options: dict[str, Any] = {"method": method, "batches": tuple(sizes), "allow_drop": True, "threads": 1}
    options |= {} if method in ("source", "norm") else {"rate": 5e-3}  # a rate whose steps stand out from rounding, for the comparison
    options |= {"epochs": 0, "parts": parts} if method == "ecotta" else {}
    options |= {} if model in NETWORKS else {"warmup_batch": 8}
    export(net, path, shape=network.shape, data=data, **options, **FORMS[form])
    np.savez(state, **Bundle.open(path).initial_state())
    return path, state


def settings_of(bundle: Path, state: Path, model: str, method: str, batch: int, threads: int) -> dict[str, Any]:
    """What both processes are told, as plain JSON values."""
    from benchmarks._networks import EVERY
    from edgeadapt.bundle import Bundle

    manifest = Bundle.open(bundle).manifest.to_json()
    wanted = {key: manifest[key] for key in ("method", "statistics", "hyper", "partition", "graphs")}
    told = {"model": model, "shape": EVERY[model].shape, "method": method, "batch": batch, "threads": threads}
    return {**told, "bundle": str(bundle), "state": str(state), "manifest": wanted}


def plain_side(model: Any, setting: dict[str, Any], role: str, **options: Any) -> Any:
    """The PyTorch side at the bundle's initial state, with the quickest kernels for its statistics.

    "lean" spares the inputs that `batch_norm` keeps although frozen layers need none; "channels-last" is the other memory format.
    """
    import torch

    from tests.reference import twin

    with np.load(setting["state"]) as archive:
        state = {name: archive[name] for name in archive.files}
    plain = twin(model, setting["manifest"], state, setting["batch"], role, **options)
    for layer in plain.norms.values():
        layer.quick, layer.lean = True, "lean" in setting["kind"]
    return plain.to(memory_format=torch.channels_last) if "channels-last" in setting["kind"] else plain


def measure(
    script: Path,
    folder: Path,
    setting: dict[str, Any],
    kinds: Sequence[str],
    count: int,
    budgets: Sequence[str] = (),
    others: Mapping[str, Path] | None = None,
) -> dict[str, Any]:
    """Times, peaks and floors of the bundle and of some kinds of PyTorch at one setting, and how far apart the first kind and the bundle end.

    With budgets the bundle is also run inside each of them, and so are the `others`, bundles by name, which are run beside.
    """
    trivial = folder / "trivial.onnx"
    trivial_model(str(trivial))
    floors = {}
    for library, command in (("torch", ["torch"]), ("onnxruntime", ["onnxruntime", str(trivial)])):
        with Worker(f"floor of {library}", [sys.executable, str(script.with_name("_floors.py")), *command], setting["threads"]) as floor:
            floors[library] = floor.peak
    workers = []
    sides: list[tuple[str, dict[str, Any]]] = [(kind, {"kind": kind}) for kind in kinds]
    for form, path in {**(others or {}), "bundle": Path(setting["bundle"])}.items():
        side = {"kind": "bundle", "bundle": str(path)}
        sides += [(f"{form} in {budget}", {**side, "budget": budget}) for budget in budgets] + [(form, side)]
    for name, side in sides:
        chosen = json.dumps({**setting, **side})
        workers.append(Worker(name, [sys.executable, str(script), "--setting", chosen], setting["threads"]))
    with ExitStack() as stack:
        for worker in workers:
            stack.enter_context(worker)
        rounds(workers, count)
        peaks = [worker.peak for worker in workers]  # before the comparison, which copies the state
        apart = agreement(folder, workers[0], workers[-1], Path(setting["state"]))
    rows = {}
    for worker, peak in zip(workers, peaks):
        floor = floors["torch" if worker.name in kinds else "onnxruntime"]
        times = {"seconds": worker.median, "all": worker.seconds, "time_ratio": paired_ratio(worker, workers[0])}
        rows[worker.name] = {**times, "peak": peak, "floor": floor}
    return {"threads": setting["threads"], "rows": rows, "apart": apart}


def agreement(folder: Path, one_side: Worker, other_side: Worker, initial: Path) -> dict[str, float]:
    """How far the two are apart after all rounds.

    Logits and statistics: the largest difference against the largest value. Updates: the length of the difference of all parameters against the
    length of their way since the start.
    """
    found = []
    for worker in (one_side, other_side):
        path = folder / f"{worker.name}.npz"
        worker.ask(f"finish {path}")
        with np.load(path) as archive:
            found.append({name: archive[name] for name in archive.files})
    one, other = found
    with np.load(initial) as archive:
        start = {name: archive[name] for name in archive.files}
    moved = [name for name in one if name in start and not name.startswith(("statistics.", *MOMENTS))]
    apart = sum(float(((one[name] - other[name]) ** 2).sum()) for name in moved)
    way = sum(float(((one[name] - start[name]) ** 2).sum()) for name in moved)
    far = {name: float(np.abs(one[name] - other[name]).max() / np.abs(one[name]).max()) for name in one if name.startswith(("statistics.", "logits"))}
    return {"logits": far.pop("logits"), "statistics": max(far.values(), default=0.0), "updates": (apart / way) ** 0.5 if way else apart**0.5}


def show(result: dict[str, Any]) -> None:
    """Print a table of one setting; times are of one run, or of each of `per` frames in it."""
    rows, million, unit = result["rows"], 1e6, result["unit"]
    base, per = next(iter(rows.values())), result["per"]
    print(f"\n{result['title']}, {result['threads']} thread(s), medians of {len(base['all'])} rounds")
    print(f"{'':28}{unit:>12}{'ratio':>8}{'peak, MB':>10}{'ratio':>8}{'floor, MB':>11}{'peak - floor':>14}{'ratio':>8}")
    for name, row in rows.items():
        above = row["peak"] - row["floor"]
        time = f"{1e3 * row['seconds'] / per:12.3f}{row['time_ratio']:8.2f}"
        memory = f"{row['peak'] / million:10.1f}{row['peak'] / base['peak']:8.2f}"
        print(f"{name:28}{time}{memory}{row['floor'] / million:11.1f}{above / million:14.1f}{above / (base['peak'] - base['floor']):8.2f}")
    print("apart at the end, relative: " + ", ".join(f"{name} {value:.1e}" for name, value in result["apart"].items()), flush=True)
