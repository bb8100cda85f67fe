"""Methods whose predictions come from a slowly moving teacher: RoTTA and CoTTA, as their papers and their authors' code describe them."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.reference.base import EPSILON, Adaptation, Tent
from tests.reference.normalisation import LiveBatchNorm


@dataclass
class Item:
    """A frame in memory; anything may stand for it."""

    frame: Tensor
    label: int
    uncertainty: float
    age: int = 0


class Memory:
    """RoTTA's: a list of items for each class (arXiv 2303.13899, algorithm 1)."""

    def __init__(self, capacity: int, classes: int, timeliness: float = 1.0, uncertainty: float = 1.0) -> None:
        self.capacity, self.timeliness, self.uncertainty = capacity, timeliness, uncertainty
        self.lists: list[list[Item]] = [[] for _ in range(classes)]

    @property
    def items(self) -> list[Item]:
        """All, the oldest first."""
        return sorted((item for row in self.lists for item in row), key=lambda item: -item.age)

    def score(self, item: Item) -> float:
        """How much an item is to be given up."""
        old = 1.0 / (1.0 + math.exp(-item.age / self.capacity))
        return self.timeliness * old + self.uncertainty * item.uncertainty / math.log(len(self.lists))

    def add(self, item: Item) -> None:
        """Offer an item of age 0; then all are one older."""
        row = self.lists[item.label]
        if len(row) >= self.capacity / len(self.lists):
            taken = self.give_up([row], self.score(item))
        elif len(self.items) < self.capacity:
            taken = True
        else:
            most = max(map(len, self.lists))
            taken = self.give_up([other for other in self.lists if len(other) == most], self.score(item))
        if taken:
            row.append(item)
        for each in self.items:
            each.age += 1

    def give_up(self, rows: list[list[Item]], least: float) -> bool:
        """Remove the item of the highest score from these lists, if that is above `least`."""
        row, worst = max(((row, item) for row in rows for item in row), key=lambda pair: (self.score(pair[1]), pair[1].age))
        if self.score(worst) <= least:
            return False
        row[:] = [item for item in row if item is not worst]
        return True


def layers(model: nn.Module) -> dict[str, LiveBatchNorm]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, LiveBatchNorm)}


class _Taught(Tent):
    """A student, which is trained, and a teacher, which predicts.

    Args:
        teacher: the share of the student that the teacher takes over at a step.
    """

    def __init__(self, model: nn.Module, teacher: float = 0.001, **options: object) -> None:
        super().__init__(model, **options)  # type: ignore[arg-type]
        self.share, self.count = teacher, 0

    def begin(self) -> None:
        """Make the teacher a copy of the student as it is now, in its type."""
        self.__dict__["teacher"] = copy.deepcopy(self.model).requires_grad_(False)  # no submodule: it is not trained, and not the student's state

    def load(self, values: Mapping[str, Tensor]) -> None:
        """Also the teacher, which is made if there is none."""
        super().load(values)
        if "teacher" not in self.__dict__:
            self.begin()
        own = dict(self.teacher.named_parameters())
        with torch.no_grad():
            for name in self.trained:
                own[name].copy_(values[f"memory.teacher.{name}"])

    def descend(self, loss: Tensor) -> None:
        """One step of the optimiser, and the teacher follows."""
        trained = list(self.trained.values())
        if self.optimiser is None:
            self.optimiser = torch.optim.Adam(trained, self.rate, (self.momentum, 0.999), EPSILON)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        self.optimiser.step()
        own = dict(self.teacher.named_parameters())
        with torch.no_grad():
            for name, value in self.trained.items():
                own[name].copy_((1 - self.share) * own[name] + self.share * value)

    def taught(self) -> dict[str, Tensor]:
        """The teacher's parameters and the count of steps, as the bundle names them."""
        own = dict(self.teacher.named_parameters())
        table = {f"memory.teacher.{name}": own[name].clone() for name in self.trained}
        return {**table, "memory.counter": torch.tensor(float(self.count), dtype=torch.float64)}


def soft(student: Tensor, teacher: Tensor) -> Tensor:
    """Cross-entropy of each prediction to soft labels."""
    return F.cross_entropy(student, teacher.softmax(1), reduction="none")


class Rotta(_Taught):
    """Robust test-time adaptation with a memory (arXiv 2303.13899).

    Args:
        transform: (frames, number of the step) → augmented frames.
        capacity, timeliness, uncertainty: of the memory.
        classes: of the model.
    """

    def __init__(
        self,
        model: nn.Module,
        transform: Callable[[Tensor, int], Tensor],
        capacity: int = 64,
        timeliness: float = 1.0,
        uncertainty: float = 1.0,
        classes: int = 10,
        **options: object,
    ) -> None:
        super().__init__(model, **options)  # type: ignore[arg-type]
        self.transform, self.memory = transform, Memory(capacity, classes, timeliness, uncertainty)

    def load(self, values: Mapping[str, Tensor]) -> None:
        """Also the teacher's statistics."""
        super().load(values)
        for name, layer in layers(self.teacher).items():
            layer.mean, layer.variance = (values[f"memory.statistics.{name}.{kind}"].clone() for kind in ("mean", "variance"))

    def predict(self, x: Tensor, follow: bool = True) -> Tensor:
        """Of the teacher, with its statistics as they stand."""
        for layer in layers(self.teacher).values():
            layer.live = False
        with torch.no_grad():
            return self.teacher(x)

    def held(self) -> tuple[list[Item], list[Tensor]]:
        """What is in memory, and the frames that fill its slots."""
        items = self.memory.items
        return items, [items[slot % len(items)].frame for slot in range(self.memory.capacity)]

    def step(self, x: Tensor, y: Tensor | None) -> Tensor:
        logits = self.predict(x)
        if y is not None:
            self.descend(F.cross_entropy(self(x), y))
            self.commit()
            return logits
        shares = logits.softmax(1)
        for frame, share in zip(x, shares):
            self.memory.add(Item(frame, int(share.argmax()), float(torch.special.entr(share).sum())))
        items, slots = self.held()
        frames = torch.stack(slots)
        for layer in layers(self.teacher).values():
            layer.live = True
        with torch.no_grad():
            wanted = self.teacher(frames)
        for layer in layers(self.teacher).values():
            layer.commit()
        student = self(self.transform(frames, self.count))
        ages = torch.tensor([item.age / self.memory.capacity for item in items], dtype=x.dtype)
        weights = torch.exp(-ages) / (1 + torch.exp(-ages))
        self.descend((weights * soft(student, wanted)[: len(items)]).mean())
        self.commit()
        self.count += 1
        return logits

    def state(self) -> dict[str, Tensor]:
        """Also the teacher and the memory."""
        table = {**super().state(), **self.taught()}
        for name, layer in layers(self.teacher).items():
            table[f"memory.statistics.{name}.mean"], table[f"memory.statistics.{name}.variance"] = layer.mean.clone(), layer.variance.clone()
        if items := self.memory.items:
            empty = self.memory.capacity - len(items)
            table["memory.frames"] = torch.stack(self.held()[1])
            table["memory.labels"] = torch.tensor([*(float(item.label) for item in items), *[-1.0] * empty], dtype=torch.float64)
            table["memory.uncertainty"] = torch.tensor([*(item.uncertainty for item in items), *[0.0] * empty], dtype=torch.float64)
            table["memory.ages"] = torch.tensor([*(float(item.age) for item in items), *[0.0] * empty], dtype=torch.float64)
        return table


class Cotta(_Taught):
    """Continual test-time adaptation of all weights (arXiv 2203.13591).

    Args:
        source: the model that weights return to, and whose confidence decides.
        transform: (frames, number of the step, number of the augmentation) → augmented frames.
        draw: (parameter's name, its place among all, its shape, number of the step) → uniform numbers.
        augmentations, threshold, restore: how many, p_th, and the chance to return.
    """

    def __init__(
        self,
        model: nn.Module,
        transform: Callable[[Tensor, int, int], Tensor],
        draw: Callable[[int, torch.Size, int], Tensor],
        augmentations: int = 32,
        threshold: float = 0.92,
        restore: float = 0.01,
        **options: object,
    ) -> None:
        super().__init__(model, **options)  # type: ignore[arg-type]
        self.transform, self.draw, self.augmentations, self.threshold, self.restore = transform, draw, augmentations, threshold, restore
        self.averaged: list[bool] = []

    def build(self) -> None:
        self.model.requires_grad_(True)
        self.__dict__["source"] = copy.deepcopy(self.model).requires_grad_(False)

    def double(self) -> Adaptation:
        """The source too."""
        self.source.double()
        return super().double()

    def passed(self, model: nn.Module, x: Tensor) -> Tensor:
        """Logits of another model, with the statistics that the student stands at."""
        for (name, layer), own in zip(layers(model).items(), layers(self.model).values()):
            layer.mean, layer.variance, layer.mix, layer.live, layer.exact = own.mean, own.variance, own.mix, own.live, own.exact
        with torch.no_grad():
            return model(x)

    def keep(self, model: nn.Module) -> None:
        """Have the student stand at the statistics of a model's last pass."""
        for own, layer in zip(layers(self.model).values(), layers(model).values()):
            own.following = layer.following
        self.commit()

    def predict(self, x: Tensor, follow: bool = True) -> Tensor:
        """Of the teacher."""
        logits = self.passed(self.teacher, x)
        self.keep(self.teacher)
        return logits

    def step(self, x: Tensor, y: Tensor | None) -> Tensor:
        student = self(x)
        sure = self.passed(self.source, x).softmax(1).max(1)[0].mean()
        wanted = [self.passed(self.teacher, self.transform(x, self.count, index)) for index in range(self.augmentations)] if y is None else []
        logits = self.passed(self.teacher, x)
        if wanted:
            self.averaged.append(bool(sure < self.threshold))
            logits = torch.stack(wanted).mean(0) if self.averaged[-1] else logits
        self.descend(soft(student, logits).mean() if y is None else F.cross_entropy(student, y))
        self.keep(self.teacher)
        if y is None:
            start = dict(self.source.named_parameters())
            with torch.no_grad():
                for index, (name, value) in enumerate(self.trained.items()):
                    mask = (self.draw(index, value.shape, self.count) < self.restore).to(value.dtype)
                    value.copy_(start[name] * mask + value * (1 - mask))
            self.count += 1
        return logits

    def state(self) -> dict[str, Tensor]:
        """Also the teacher."""
        return {**super().state(), **self.taught()}
