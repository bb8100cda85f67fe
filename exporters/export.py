"""From a torch module to a bundle: the whole way on the workstation."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from edgeadapt.bundle.choice import Choice
from edgeadapt.devices import boards
from edgeadapt.errors import UsageError
from edgeadapt.exporters.checks import check_auto
from edgeadapt.exporters.data import Samples, load_samples, spec_for
from edgeadapt.exporters.job import ExportReport, Job
from edgeadapt.exporters.options import AUTO, Options
from edgeadapt.exporters.planner import Place, Plan
from edgeadapt.exporters.quantise.auto import Auto
from edgeadapt.memory.rules import MOST_THREADS
from edgeadapt.memory.simulation import BoardLike
from edgeadapt.progress import Progress, quiet
from edgeadapt.units import format_shape, parse_bytes


def export(
    model: nn.Module,
    output: str | os.PathLike[str] | None,
    *,
    shape: Sequence[int],
    data: Any = None,
    mean: Sequence[float] | float | None = None,
    std: Sequence[float] | float | None = None,
    resize: bool | Sequence[int] = False,
    fit: str = "stretch",
    crop: bool = False,
    order: str = "rgb",
    raw: bool = False,
    hop: int | None = None,
    names: Sequence[str] | None = None,
    model_name: str = "",
    progress: Progress | None = None,
    budget: str | int | None = None,
    board: str | BoardLike | None = None,
    board_threads: int = 1,
    **choices: Any,
) -> ExportReport:
    """Compile `model` into a bundle.

        export(model, "net.edgeadapt", shape=(3, 32, 32), data="train.npz", mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), batches=(4, 16))
        export(model, "net.edgeadapt", shape=(6, 128), data=(x, y), method="side")

    Args:
        model: the trained module, float32; put into eval mode.
        output: the bundle's path; None compiles and checks without writing.
        shape: one input without the batch, channels first.
        data: source samples for the warm-up, the calibration and the self-check; optional for methods that have neither. The path of an .npz archive
            with x and y, or of a folder with a folder of images for each class; the arrays (x, y), y None without labels; a map-style torch Dataset;
            or `Samples`. x is uint8 (N, H, W, C), or float32 (N, *shape) as the model takes it (with `raw`: as the sensor gives
            it); y int64 (N,), or (N, H, W) for segmentation.
        mean, std, resize, fit, crop, order, raw, hop: how frames become the input, here and on the device: see `edgeadapt.exporters.data.spec_for`.
            `Samples` have their own.
        names: class names in the order of the outputs; without, those that the data has.
        model_name: what the manifest calls the model.
        progress: called with (stage, done, total, note).
        budget: the most bytes that the process on the device may hold, such as "96MiB". What of parts, train and batches was not given is then chosen
            so that adapting fits, before anything is trained; see `edgeadapt.exporters.planner`. With quantize="auto" also what numbers are held in.
        board: where that is: a key or profile as for `edgeadapt.devices.boards.load`, or a board; this machine by default.
        board_threads: threads of one operator that it will be served with there.
        choices: fields of `Options`: method, parts, cuts, kernel, width, train, batches, statistics, optimiser, rate, exact, epochs, warmup_rate,
            warmup_batch, max_drop, allow_drop, holdout, seed, threads, task, micro, quantize, gradient, saved, updates, settings (the method's own
            choices, by name), search (for defaults of scalars, on held-out samples). One that the method has no use for is refused. Without a method
            it is `eata` with anchored statistics and a search, or `side` where the model has no normalisation to train.

    Returns:
        what was exported; `print(report.table())` shows it.

    Raises:
        ExportError: the model cannot be traced, cut or differentiated; the method needs data; the warm-up costs too much accuracy; the self-check
            fails; the bundle cannot be written, or not be opened afterwards.
        UsageError, InputError: a choice or the data is wrong, or quantize="auto" comes without a budget or data.
        BudgetError: nothing fits the budget, and nothing was trained; or, rarely, the bundle did not come out as planned.
    """
    if (board is not None or board_threads != 1) and budget is None:
        raise UsageError("a board is where a budget holds, and there is none", "give a budget too, or leave the board out")
    place = None if budget is None else _place(board, budget, board_threads)
    if choices.get("quantize") == AUTO:
        check_auto(budget is not None, data is not None)
    spec = spec_for(shape, mean, std, resize, fit=fit, crop=crop, order=order, raw=raw, hop=hop)
    options, progress = Options.of(choices, planned=budget is not None), progress or quiet
    samples: Samples | None = None
    if isinstance(data, Samples):
        if spec != spec_for(shape):
            raise UsageError("these samples say themselves how frames become the input", "leave mean, std, resize and so on out, or give the arrays")
        if data.spec.shape != spec.shape:
            raise UsageError(f"the samples are {format_shape(data.spec.shape)}, and shape says {format_shape(spec.shape)}", "give one and the same")
        samples, spec = data, data.spec
    elif data is not None:
        samples = load_samples(data, spec, names=names, seed=options.seed, progress=progress)
    job = Job(model, spec, samples, options, progress, _named(choices))
    return job.run(output, names or (samples.names if samples is not None else None), model_name, place)


def plan_export(
    model: nn.Module,
    *,
    shape: Sequence[int],
    budget: str | int | None = None,
    board: str | BoardLike | None = None,
    board_threads: int = 1,
    progress: Progress | None = None,
    **choices: Any,
) -> Plan:
    """What an export could be and what it takes on a board, without data, warm-up or a bundle; with a budget also what it would be.

    Args:
        model, shape, budget, board, board_threads, progress, choices: as for `export`. Without a budget nothing is chosen.

    Raises:
        ExportError: the model cannot be traced, cut or differentiated.
        UsageError: a choice is wrong. That nothing fits is for `Plan.check` to raise.
    """
    if choices.get("quantize") == AUTO:
        raise UsageError("a plan is of one form of numbers, and quantize = 'auto' is of several", "list them with plan_numbers, or name one")
    place = _place(board, budget, board_threads)
    job = Job(model, spec_for(shape, None, None, False), None, Options.of(choices, planned=True), progress or quiet, _named(choices))
    return job.list_candidates(place)


def plan_numbers(
    model: nn.Module,
    *,
    shape: Sequence[int],
    budget: str | int | None,
    board: str | BoardLike | None = None,
    board_threads: int = 1,
    progress: Progress | None = None,
    **choices: Any,
) -> Choice:
    """What each form of numbers that quantize="auto" would try takes within a budget, without data: nothing is measured, and nothing chosen.

    All layers that could be in 8 bits are taken to be.

    Args:
        model, shape, budget, board, board_threads, progress, choices: as for `export`, quantize being "auto".

    Raises:
        ExportError, UsageError: as `plan_export`; nothing of the model can be in 8 bits, or there is no budget.
    """
    check_auto(budget is not None, True)
    place, options = _place(board, budget, board_threads), Options.of({**choices, "quantize": AUTO}, planned=True)
    job = Job(model, spec_for(shape, None, None, False), None, options, progress or quiet, _named(choices))
    return Auto(job.begun(None), place, job.progress).planned()


def _place(board: str | BoardLike | None, budget: str | int | None, threads: int) -> Place:
    if type(threads) is not int or not 1 <= threads <= MOST_THREADS:
        raise UsageError(f"board_threads = {threads!r} is not a number of threads", f"give 1 to {MOST_THREADS}, at most the cores of the board")
    where = boards.load(board or boards.HERE) if board is None or isinstance(board, str) else board
    return Place(where, None if budget is None else parse_bytes(budget), threads)


def _named(choices: Mapping[str, Any]) -> frozenset[str]:
    return frozenset(name for name, value in choices.items() if value is not None)
