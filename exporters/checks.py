"""What an export sees to before any work: that the options, the names and the data fit the model and the method."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from edgeadapt.bundle import Task
from edgeadapt.errors import ExportError, UsageError
from edgeadapt.exporters.beginning import mode_of
from edgeadapt.exporters.data import Samples
from edgeadapt.exporters.methods import Method
from edgeadapt.exporters.options import Options
from edgeadapt.exporters.programs import Model
from edgeadapt.exporters.search import TRIED


def task_of(options: Options, logits: Tensor, names: Sequence[str] | None, data: Samples | None) -> Task:
    """What the model's logits are, checked against the options, the names and the data.

    Raises:
        ExportError, UsageError, InputError: they do not fit.
    """
    kind = options.task or ("classification" if logits.dim() == 2 else "segmentation")
    if (kind == "classification") != (logits.dim() == 2):
        raise ExportError(
            f"the model returns {tuple(logits.shape)}, which are no logits for {kind}", "choose the task that fits, or change the model's head"
        )
    if logits.dim() > 4:
        raise ExportError(f"the model returns {tuple(logits.shape)}, and logits have four sizes at most", "flatten the last ones into one")
    task = Task(kind, int(logits.shape[1]), tuple(names) if names else None)
    if task.names is not None and len(task.names) != task.classes:
        raise UsageError(f"there are {len(task.names)} class names, and the model has {task.classes} classes", "give one for each output, in order")
    if data is not None:
        data.check(tuple(int(size) for size in logits.shape[1:]))
    return task


def check_data(options: Options, method: Method, data: Samples | None) -> None:
    """See that there is source data where the method, or 8 bits, need some.

    Raises:
        ExportError: there is none.
    """
    if data is None and (method.warms_up or method.calibrates):
        raise ExportError(
            f"{method.name} is {'warmed up' if method.warms_up else 'calibrated'} on source data, and none was given",
            "give training samples with --data, or choose --method norm or tent",
        )
    if data is None and options.quantize != "none":
        raise ExportError("the ranges of 8 bits are measured on source data, and none was given", "give training samples with --data")


def check_rate(options: Options, method: Method) -> None:
    """See that the given learning rate is one that the device allows.

    Raises:
        UsageError: it is not.
    """
    allowed = Model(method, {}, {}, "none", options.optimiser or method.optimiser).hyper().get("rate")
    if options.rate is not None and allowed is not None and not allowed.low <= options.rate <= allowed.high:
        raise UsageError(f"rate = {options.rate:g} is out of range", f"give a number from {allowed.low:g} to {allowed.high:g}")


def check_micro(options: Options, method: Method) -> None:
    """See that micro-batches that were asked for can be.

    Raises:
        UsageError: they cannot.
    """
    if isinstance(options.micro, tuple) and not method.summable:
        raise UsageError(f"a step of {method.name} needs all of its frames at once, so it has no micro-batches", "leave micro out")
    if isinstance(options.micro, tuple) and mode_of(options, method) == "live":
        raise UsageError(
            "statistics that follow the stream need all frames of a step at once, so it has no micro-batches",
            "leave micro out, or keep the statistics as trained: --statistics source",
        )


def check_search(options: Options, model: Model, data: Samples | None) -> None:
    """See that a search that was asked for can be made.

    Raises:
        UsageError: there is no data to search on, or there are no scalars.
    """
    if not options.search:
        return
    if data is None:
        raise UsageError("scalars are searched for on held-out samples, and no data was given", "give --data, or leave --search out")
    if not set(TRIED) & set(model.hyper()):
        raise UsageError(f"{options.method} has no scalars that could be searched for", "leave --search out")


def check_auto(bounded: bool, measurable: bool) -> None:
    """See that numbers can be chosen.

    Raises:
        UsageError: there is no budget, or no data to measure on.
    """
    if not bounded:
        raise UsageError("quantize = 'auto' is the best that fits a budget, and there is none", "give --budget, or choose --quantize none or int8")
    if not measurable:
        raise UsageError("quantize = 'auto' is measured on source data, and none was given", "give samples with --data, or list with --plan")
