"""Warm-up of a method's parameters on source data, before the export (EcoTTA, arXiv 2303.01904, section 4 and appendix C).

The frozen model is run in training mode without being trained: every normalisation takes the batch's own statistics, gradients flow through them,
and the statistics it was trained with are neither read nor written. They are measured anew afterwards for the adapted network. A method that only
reads the model, and puts nothing into it, reads it with the statistics that it was trained with, and these stay.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from edgeadapt.errors import ExportError, InputError, UsageError
from edgeadapt.exporters.augment import augment
from edgeadapt.exporters.backbone import Normaliser
from edgeadapt.exporters.data import Indices, Samples
from edgeadapt.exporters.methods.base import Method, Tensors
from edgeadapt.progress import Progress, quiet

MILESTONES, DECAY = (0.3, 0.6, 0.8), 0.2
MEASURED = 1600
"""Samples that the statistics are measured on, at least; eight batches of 200."""
LEAST_BATCHES = 8


def rate_at(step: int, steps: int, an_epoch: int, rate: float) -> float:
    """Learning rate of a step: rises linearly over the first epoch (a fifth of all steps at most), then falls to a fifth at 30, 60 and 80 %."""
    rising = max(1, min(an_epoch, steps // 5))
    passed = sum(step >= round(share * steps) for share in MILESTONES)
    return float(rate * min(1.0, (step + 1) / rising) * DECAY**passed)


def warm_up(
    method: Method,
    parameters: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
    samples: Samples,
    indices: Indices | None = None,
    *,
    epochs: int = 10,
    rate: float = 5e-2,
    momentum: float = 0.9,
    batch: int = 64,
    seed: int = 0,
    progress: Progress = quiet,
) -> Tensors:
    """Train a method's parameters by cross-entropy on augmented source samples; without labels, toward the frozen model's predictions.

    SGD with momentum, no weight decay, the rate by `rate_at`. The last incomplete batch of an epoch is left out. Without labels the loss is
    KL(frozen ‖ adapted), where the frozen model sees the same samples without augmentation, with the statistics it was trained with.

    Args:
        method: bound to a capture of the model at `batch`.
        parameters: where to start; not modified.
        tensors: all frozen tensors, the model's and the method's; not modified.
        samples: source data; images are augmented (see `Samples.pixels`), anything else is taken as it is.
        indices: which samples to train on; all by default.
        epochs: 0 returns the parameters as they are.
        batch: samples a step.
        seed: of the order and the augmentation.
        progress: told every few steps, with the running loss.

    Returns:
        The trained parameters by name.

    Raises:
        UsageError: the rate is no rate.
        InputError: labels do not fit the model, or there are fewer samples than `batch`.
        ExportError: the loss or a parameter is no longer finite.
    """
    rows = np.arange(len(samples)) if indices is None else np.asarray(indices, np.intp)
    if not 0.0 < rate <= 100.0:
        raise UsageError(f"a warm-up rate of {rate:g} cannot work", "give a number above 0, such as 0.05")
    _bound(method, batch)
    samples.check(tuple(int(size) for size in method.backbone.captured.result.meta["val"].shape[1:]))
    an_epoch = len(rows) // batch
    if not an_epoch:
        raise InputError(
            f"the warm-up takes batches of {batch}, and there are {len(rows)} samples to train on", "give more samples, or a smaller warm-up batch"
        )
    trained = {name: value.detach().clone().requires_grad_() for name, value in parameters.items()}
    steps = an_epoch * epochs
    if not steps or not trained:
        return {name: value.detach() for name, value in trained.items()}
    order, random = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    optimiser = torch.optim.SGD(list(trained.values()), lr=rate, momentum=momentum)
    often = max(1, steps // 200)
    running = math.nan
    for step in range(steps):
        if step % an_epoch == 0:
            shuffled = order.permutation(rows)
        chosen = shuffled[step % an_epoch * batch :][:batch]
        target = _frozen(method, tensors, samples, chosen) if samples.y is None else torch.from_numpy(samples.y[chosen])
        run = method.backbone.run(tensors, _normaliser(method), method.affine(trained))
        taught = method.taught(method.forward(run, _augmented(samples, chosen, random), tensors, trained))
        loss = torch.stack([divergence(target, logits) if samples.y is None else F.cross_entropy(logits, target) for logits in taught]).sum()
        value = float(loss.detach())
        if not math.isfinite(value):
            raise _diverged(f"the loss is {value}", step, an_epoch, rate)
        for group in optimiser.param_groups:
            group["lr"] = rate_at(step, steps, an_epoch, rate)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        running = value if math.isnan(running) else 0.95 * running + 0.05 * value
        if (step + 1) % often == 0 or step + 1 == steps:
            progress("warm-up", step + 1, steps, f"epoch {step // an_epoch + 1}/{epochs}, loss {running:.3f}")
    broken = [name for name, value in trained.items() if not bool(torch.isfinite(value).all())]
    if broken:
        raise _diverged(f"{broken[0]} is not finite", steps - 1, an_epoch, rate)
    return {name: value.detach() for name, value in trained.items()}


def _normaliser(method: Method) -> Normaliser:
    """Training mode; where the method only reads the model, the statistics that it was trained with, as the device will."""
    return Normaliser(method.backbone.source_statistics(), "source") if method.reads else Normaliser({}, "batch")


def divergence(target: Tensor, logits: Tensor) -> Tensor:
    """KL of the soft-max of `logits` from that of `target`, both (N, C, …): summed over classes, mean over the rest."""
    wanted, given = target.log_softmax(1), logits.log_softmax(1)
    return (wanted.exp() * (wanted - given)).sum(1).mean()


def _frozen(method: Method, tensors: Mapping[str, Tensor], samples: Samples, chosen: NDArray[np.intp]) -> Tensor:
    x = torch.from_numpy(samples.tensor(chosen))
    with torch.no_grad():
        return method.backbone.run(tensors, Normaliser(method.backbone.source_statistics(), "source")).whole(x)


def _augmented(samples: Samples, chosen: NDArray[np.intp], random: torch.Generator) -> Tensor:
    pixels = samples.pixels(chosen)
    if pixels is None:
        return torch.from_numpy(samples.tensor(chosen))
    x = augment(torch.from_numpy(pixels), random)
    if samples.spec.mean is not None:
        x = x - torch.tensor(samples.spec.mean).reshape(1, -1, 1, 1)
    return x if samples.spec.std is None else x / torch.tensor(samples.spec.std).reshape(1, -1, 1, 1)


def _bound(method: Method, batch: int) -> None:
    captured = method.backbone.captured.batch
    if captured != batch:
        raise ExportError(f"the method is bound to the model at batch {captured}, not {batch}", f"bind it to a capture at batch {batch} first")


def _diverged(what: str, step: int, an_epoch: int, rate: float) -> ExportError:
    return ExportError(
        f"the warm-up diverged at epoch {step // an_epoch + 1}, step {step % an_epoch + 1} of {an_epoch}: {what}",
        f"give a smaller --warmup-rate than {rate:g}, such as {rate / 5:g}; or see whether the data is scaled as in training",
    )


def _batches(rows: NDArray[np.intp], batch: int, count: int, seed: int) -> Iterator[NDArray[np.intp]]:
    """`count` full batches: the samples in random order, over again as often as needed."""
    random = np.random.default_rng(seed)
    stream: list[NDArray[np.intp]] = []
    while sum(map(len, stream)) < count * batch:
        stream.append(random.permutation(rows))
    joined = np.concatenate(stream)
    for start in range(0, count * batch, batch):
        yield joined[start : start + batch]


def estimate_statistics(
    method: Method,
    parameters: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
    samples: Samples,
    indices: Indices | None = None,
    *,
    batch: int = 64,
    batches: int = 0,
    seed: int = 0,
    progress: Progress = quiet,
) -> Tensors:
    """Measure the statistics of every normalisation layer of the adapted network on source samples without augmentation.

    Args:
        method, tensors, samples, indices: as for `warm_up`.
        parameters: the trained ones.
        batch: samples at a time, those the method is bound to.
        batches: how many; by default as many as see every sample, up to 1600, and 8 at least; samples are taken again to fill them.

    Returns:
        `layer.mean` and `layer.variance`, each (C,): the mean over the batches of their means and of their population variances.

    Raises:
        ExportError: a statistic is not finite.
    """
    rows = np.arange(len(samples)) if indices is None else np.asarray(indices, np.intp)
    _bound(method, batch)
    count = batches or max(LEAST_BATCHES, -(-min(MEASURED, len(rows)) // batch))
    sums: dict[str, Tensor] = {}
    with torch.no_grad():
        for done, chosen in enumerate(_batches(rows, batch, count, seed)):
            normalise = Normaliser({}, "collect")
            x = torch.from_numpy(samples.tensor(chosen))
            method.forward(method.backbone.run(tensors, normalise, method.affine(parameters)), x, tensors, parameters)
            for name, value in normalise.updated.items():
                sums[name] = sums[name] + value.double() if name in sums else value.double()
            progress("statistics", done + 1, count)
    table = {name: (total / count).float() for name, total in sums.items()}
    broken = [name for name, value in table.items() if not bool(torch.isfinite(value).all())]
    if broken:
        raise ExportError(f"the statistic {broken[0]} of the adapted network is not finite", "give a smaller --warmup-rate")
    return table


def predictions(forward: Callable[[Tensor], Tensor], samples: Samples, indices: Indices, batch: int) -> NDArray[np.int64]:
    """Predicted classes (n, …) of the samples at `indices`.

    `forward` takes float32 (batch, …) to logits (batch, C, …) and always gets full batches: the last is filled up with the first samples.
    """
    rows = np.asarray(indices, np.intp)
    found: list[NDArray[Any]] = []
    for start in range(0, len(rows), batch):
        chosen = np.concatenate([rows[start : start + batch], np.resize(rows, max(0, start + batch - len(rows)))])
        with torch.no_grad():
            found.append(forward(torch.from_numpy(samples.tensor(chosen))).argmax(1).numpy())
    return np.concatenate(found)[: len(rows)] if found else np.zeros(0, np.int64)


def accuracy(forward: Callable[[Tensor], Tensor], samples: Samples, indices: Indices, batch: int) -> float:
    """Share of right predictions, 0 to 1, over the samples at `indices`; of right pixels for segmentation. `forward` as for `predictions`.

    Raises:
        InputError: there are no labels, or no samples.
    """
    if samples.y is None or not len(indices):
        raise InputError(f"there are no {'labels' if samples.y is None else 'samples'} to measure accuracy on", "give samples with labels")
    return float((predictions(forward, samples, indices, batch) == samples.y[np.asarray(indices, np.intp)]).mean())
