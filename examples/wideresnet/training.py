"""Training with AugMix's loss, as steps that depend on the settings and on what is in a checkpoint, and on nothing else."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import augmix
import checkpoint
import numpy as np
import torch
from numpy.typing import NDArray
from prefetch import Prefetch
from torch import Tensor
from torch.nn import functional as F
from wideresnet import initial, to_input

from edgeadapt.errors import EdgeAdaptError
from edgeadapt.exporters.data import Samples
from edgeadapt.progress import Progress, quiet
from edgeadapt.units import format_count

CONSISTENCY = 12.0
MOMENTUM, WEIGHT_DECAY = 0.9, 5e-4
CHUNK = 500  # images predicted at a time when accuracy is measured


@dataclass(frozen=True)
class Settings:
    """All that the result depends on. A checkpoint goes on only under the same.

    Attributes:
        depth, widen, classes: of the network.
        epochs, batch, rate: times that every image is seen, images a step (of three views each), learning rate at the start.
        seed: of the initial weights, the order, and the augmentation.
        precision: what convolutions are computed in, "float32" or "bfloat16"; weights and sums are float32 always.
        images: the training set, as `images.identity` tells it from others.
    """

    depth: int
    widen: int
    classes: int
    epochs: int
    batch: int
    rate: float
    seed: int
    precision: str
    images: str


def jensen_shannon(*logits: Tensor) -> Tensor:
    """Jensen-Shannon divergence of the distributions that several logits [n,C] stand for, in nats, averaged over n: 0..log(len(logits)).

    The mean of their Kullback-Leibler divergences from their mean (section 3 of the AugMix paper), through logarithms throughout, so that it stays
    finite where a probability rounds to zero.
    """
    each = torch.stack([F.log_softmax(part, 1) for part in logits])
    mean = each.logsumexp(0) - math.log(len(logits))
    return (each.exp() * (each - mean)).sum(2).mean()


def rate_at(step: int, steps: int, rate: float) -> float:
    """The learning rate of a step (from 0) of `steps`: from `rate` down half a cosine, to zero after the last."""
    return rate * 0.5 * (1 + math.cos(math.pi * step / steps))


class Trainer:
    """A network, its optimiser, and the place in the training that they have reached.

    Args:
        settings: what to do.
        data: the training set, to which settings.classes and settings.images belong.
        device: where to compute.

    Attributes:
        net: the network.
        epoch, step: epochs finished, and steps taken in the one that runs.
        history: [mean loss, accuracy] of each finished epoch.
        seconds: time that the epoch which runs has taken, in all the runs that took part in it; for whoever runs it to add to.
    """

    def __init__(self, settings: Settings, data: Samples, device: torch.device) -> None:
        self.settings, self._data, self._device = settings, data, device
        net = initial(settings.depth, settings.widen, settings.classes, settings.seed)
        self.net = net.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._optimiser = torch.optim.SGD(self.net.parameters(), settings.rate, MOMENTUM, weight_decay=WEIGHT_DECAY, nesterov=True)
        # Made here and not by the first step, so that a resumed training holds them in the same memory layout.
        self._momentum = {name: torch.zeros_like(parameter) for name, parameter in self.net.named_parameters()}
        for name, parameter in self.net.named_parameters():
            self._optimiser.state[parameter]["momentum_buffer"] = self._momentum[name]
        self._labels = torch.from_numpy(np.asarray(data.y))
        self.epoch, self.step, self.history, self.seconds = 0, 0, list[list[float]](), 0.0
        self._sums = [0.0, 0.0, 0]  # of this epoch: cross-entropy, divergence, images

    @property
    def steps(self) -> int:
        """Steps of an epoch."""
        return math.ceil(len(self._data) / self.settings.batch)

    @property
    def rate(self) -> float:
        """The learning rate of the next step."""
        return rate_at(self.epoch * self.steps + self.step, self.settings.epochs * self.steps, self.settings.rate)

    @property
    def losses(self) -> tuple[float, float, float]:
        """Mean loss, cross-entropy and divergence of this epoch so far."""
        entropy, divergence, count = self._sums
        entropy, divergence = entropy / max(1, count), divergence / max(1, count)
        return entropy + CONSISTENCY * divergence, entropy, divergence

    def batches(self) -> list[NDArray[np.intp]]:
        """Indices of the batches of this epoch that are still to come."""
        order = augmix.generator(self.settings.seed, augmix.ORDER, self.epoch).permutation(len(self._data))
        return [order[start : start + self.settings.batch] for start in range(0, len(order), self.settings.batch)][self.step :]

    def take(self, batch: NDArray[np.intp], views: NDArray[np.float32]) -> None:
        """One step on the views [VIEWS,n,H,W,3] of a batch.

        Raises:
            EdgeAdaptError: the loss is NaN or infinite; what is on disk is better than the network then.
        """
        for group in self._optimiser.param_groups:
            group["lr"] = self.rate
        self.net.train()
        clean, first, second = self._logits(views.reshape(-1, *views.shape[2:])).chunk(len(views))
        entropy = F.cross_entropy(clean, self._labels[batch].to(self._device))
        divergence = jensen_shannon(clean, first, second)
        loss = entropy + CONSISTENCY * divergence
        if not math.isfinite(loss.item()):
            raise EdgeAdaptError(
                f"the loss of step {self.step + 1} in epoch {self.epoch + 1} is {loss.item()}: the training has diverged",
                "start over with a lower --rate and another --output",
            )
        self._optimiser.zero_grad()
        loss.backward()
        self._optimiser.step()
        self.step += 1
        self._sums = [total + value * len(batch) for total, value in zip(self._sums, (entropy.item(), divergence.item(), 1))]

    def accuracy(self, held: Samples) -> float:
        """Share of images that the network classifies right, in percent."""
        self.net.eval()
        with torch.no_grad():
            found = [self._logits(held.x[start : start + CHUNK]).argmax(1).cpu().numpy() for start in range(0, len(held), CHUNK)]
        return 100 * float((np.concatenate(found) == held.y).mean())

    def finish_epoch(self, accuracy: float) -> None:
        """Note how the epoch went, and begin the next."""
        self.history.append([self.losses[0], accuracy])
        self.epoch, self.step, self.seconds, self._sums = self.epoch + 1, 0, 0.0, [0.0, 0.0, 0]

    def _logits(self, pixels: NDArray[Any]) -> Tensor:
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self.settings.precision == "bfloat16"):
            logits: Tensor = self.net(to_input(pixels, self._device))
        return logits.float()

    # ---------------------------------------------------------------------------------------- on disk

    def write(self, path: Path) -> None:
        """Save a checkpoint.

        Raises:
            UsageError: it cannot be written.
        """
        place = {"epoch": self.epoch, "step": self.step, "sums": self._sums, "seconds": self.seconds, "history": self.history}
        checkpoint.write(path, self._tensors(), {"settings": dataclasses.asdict(self.settings), **place, "machine": self.machine()})

    def read(self, path: Path) -> str:
        """Go on from a checkpoint.

        Returns:
            the `machine` that wrote it. On another the result differs from an uninterrupted training's in the last bits.

        Raises:
            StateError: it is damaged, or was made under other settings. The trainer is then as before.
        """
        tensors, header = checkpoint.read(path)
        checkpoint.refuse_others(path, header.get("settings"), dataclasses.asdict(self.settings))
        mine = self._tensors()
        wrong = sorted(mine.keys() ^ tensors.keys()) or [name for name, tensor in mine.items() if tensor.shape != tensors[name].shape]
        try:
            epoch, step = int(header["epoch"]), int(header["step"])
            history = [[float(loss), float(accuracy)] for loss, accuracy in header["history"]]
            sums, seconds, machine = [float(value) for value in header["sums"]], float(header["seconds"]), str(header["machine"])
            sound = 0 <= epoch == len(history) <= self.settings.epochs and 0 <= step <= self.steps and len(sums) == len(self._sums)
        except (KeyError, TypeError, ValueError):
            sound = False
        if wrong or not sound:
            reason = f"{wrong[0]} is missing, unknown or of another shape" if wrong else "its header does not say how far it is"
            raise checkpoint.damaged(path, reason)
        for name, tensor in mine.items():
            tensor.copy_(tensors[name])
        self.epoch, self.step, self.history, self.seconds, self._sums = epoch, step, history, seconds, sums
        return machine

    def machine(self) -> str:
        """What the last bits depend on beside the settings."""
        return f"torch {torch.__version__} on {self._device.type}, {format_count(torch.get_num_threads(), 'thread')}"

    def write_weights(self, path: Path) -> None:
        """Save the network alone, under its own names, with the settings and the history in the header.

        Raises:
            UsageError: it cannot be written.
        """
        checkpoint.write(path, self.net.state_dict(), {"settings": dataclasses.asdict(self.settings), "history": self.history})

    def _tensors(self) -> dict[str, Tensor]:
        """All that changes, not copied."""
        weights = {f"net.{name}": tensor for name, tensor in self.net.state_dict().items()}
        return {**weights, **{f"momentum.{name}": tensor for name, tensor in self._momentum.items()}}


@dataclass(frozen=True)
class Pace:
    """How a run goes about it; none of this changes the result.

    Attributes:
        workers: processes that augment; 0: this one.
        save_seconds: time between two checkpoints; there is one more after every epoch.
        limit_seconds: stop after this time; infinity: when it is done.
    """

    workers: int
    save_seconds: float
    limit_seconds: float


def run(trainer: Trainer, data: Samples, held: Samples, path: Path, pace: Pace, say: Callable[[str], None], progress: Progress = quiet) -> bool:
    """Train to the end, or to the limit, with checkpoints at `path`.

    Args:
        say: told a line about each epoch.
        progress: told of each step.

    Returns:
        whether it came to the end. Either way the checkpoint holds all that was done.

    Raises:
        EdgeAdaptError: the training diverges, or a process that augments ends; UsageError: a checkpoint cannot be written.
    """
    begun = saved = last = time.monotonic()
    epochs = trainer.settings.epochs
    trainer.write(path)  # a folder that cannot be written is found out now
    with Prefetch(data.x, trainer.settings.seed, pace.workers) as prefetch:
        while trainer.epoch < epochs:
            batches = trainer.batches()
            for batch, views in zip(batches, prefetch(trainer.epoch, batches)):
                trainer.take(batch, views)
                progress(f"epoch {trainer.epoch + 1}/{epochs}", trainer.step, trainer.steps, f"loss {trainer.losses[0]:.4f}")
                now = time.monotonic()
                trainer.seconds, last = trainer.seconds + now - last, now
                if now - begun >= pace.limit_seconds:
                    trainer.write(path)
                    return False
                if now - saved >= pace.save_seconds:
                    trainer.write(path)
                    saved = time.monotonic()
            accuracy = trainer.accuracy(held)
            now = time.monotonic()
            trainer.seconds, last = trainer.seconds + now - last, now
            say(_line(trainer, accuracy))
            trainer.finish_epoch(accuracy)
            trainer.write(path)
            saved = time.monotonic()
    return True


def _line(trainer: Trainer, accuracy: float) -> str:
    loss, entropy, divergence = trainer.losses
    return (
        f"epoch {trainer.epoch + 1}/{trainer.settings.epochs}: loss {loss:.4f} (cross-entropy {entropy:.4f}, divergence {divergence:.5f}), "
        f"held-out {accuracy:.2f} %, rate now {trainer.rate:.5f}, {trainer.seconds:.0f} s"
    )
