"""What all adaptation methods share, and those that need no network of their own: source, norm, TENT."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.reference.normalisation import LiveBatchNorm, follow_stream

EPSILON = 1e-6  # of Adam; at torch's 1e-8 the rounding of a vanishing gradient would make full steps
RATES = {"sgd": 5e-4, "adam": 3e-4}


def entropy(logits: Tensor) -> Tensor:
    """Entropy of each prediction, in nats: (N, C) → (N,)."""
    return torch.distributions.Categorical(logits=logits).entropy()


def confident_entropy(logits: Tensor, margin: float) -> Tensor:
    """Mean over those predictions whose entropy is below margin·ln C; 0 where there is none."""
    values = entropy(logits)
    chosen = values[values.detach() < margin * math.log(logits.shape[1])]
    return chosen.mean() if len(chosen) else 0.0 * values.sum()


class Adaptation(nn.Module):
    """A method around a copy of a model.

    Args:
        model: a classifier in eval mode; frozen but for what the method trains.
        live: whether normalisation follows the stream.
        exact: gradients flow through the batch's statistics.
        mix: weight of the batch's statistics.
        rate, momentum, optimiser: of the step; "sgd" or "adam", where momentum is Adam's first beta.
        margin, regulariser: of the objective, where it has them.
    """

    follows = True
    optimiser_name = "sgd"

    def __init__(
        self,
        model: nn.Module,
        *,
        live: bool | None = None,
        exact: bool = False,
        mix: float = 1.0,
        rate: float | None = None,
        momentum: float = 0.9,
        optimiser: str | None = None,
        margin: float = 0.4,
        regulariser: float = 0.5,
    ) -> None:
        super().__init__()
        self.model = follow_stream(copy.deepcopy(model)).requires_grad_(False)
        self.margin, self.regulariser = margin, regulariser
        self.build()
        for layer in self.norms.values():
            layer.live, layer.exact, layer.mix = self.follows if live is None else live, exact, mix
        self.live = self.follows if live is None else live
        self.kind = optimiser or self.optimiser_name
        self.rate, self.momentum = RATES[self.kind] if rate is None else rate, momentum
        self.optimiser: torch.optim.Optimizer | None = None

    def build(self) -> None:
        """Make the method's own modules, and mark what trains."""

    def name_of(self, name: str) -> str:
        """The bundle's name of a module or parameter: the model's own names carry no prefix."""
        return name.removeprefix("model.")

    def freeze(self, values: Mapping[str, Tensor]) -> None:
        """Give parameters, by the bundle's names, these values for good: they are not trained, and their own objectives are not minimised."""
        parameters = self.trained
        with torch.no_grad():
            for name, value in values.items():
                parameters[name].requires_grad_(False).copy_(value)

    @property
    def norms(self) -> dict[str, LiveBatchNorm]:
        """Normalisation layers by the bundle's names."""
        return {self.name_of(name): layer for name, layer in self.named_modules() if isinstance(layer, LiveBatchNorm)}

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """What the step updates, by the bundle's names."""
        return {self.name_of(name): value for name, value in self.named_parameters() if value.requires_grad}

    def forward(self, x: Tensor) -> Tensor:
        """Logits of (N, 3, H, W)."""
        return self.model(x)

    def backward(self, x: Tensor, y: Tensor | None) -> Tensor:
        """One forward pass, its logits, and the gradients of the objective in `.grad`."""
        logits = self(x)
        self.objective(logits, y).backward()
        return logits

    def objective(self, logits: Tensor, y: Tensor | None) -> Tensor:
        """The loss of predictions, or with labels."""
        return entropy(logits).mean() if y is None else F.cross_entropy(logits, y)

    def predict(self, x: Tensor, follow: bool = True) -> Tensor:
        """Logits; the statistics follow the batch, or with follow=False stay and are used as they are."""
        if follow:
            with torch.no_grad():
                logits = self(x)
            self.commit()
            return logits
        with torch.no_grad(), self.still():
            return self(x)

    @contextmanager
    def still(self) -> Iterator[None]:
        """Inside, the statistics stay and are used as they are."""
        held = [(layer, layer.live) for layer in self.norms.values()]
        for layer, _ in held:
            layer.live = False
        try:
            yield
        finally:
            for layer, live in held:
                layer.live = live

    def adapt(self, x: Tensor) -> Tensor:
        """One step without labels: logits of its own forward pass, before the update."""
        return self.step(x, None)

    def learn(self, x: Tensor, y: Tensor) -> Tensor:
        """One step with class indices (N,)."""
        return self.step(x, y)

    def step(self, x: Tensor, y: Tensor | None) -> Tensor:
        trained = list(self.trained.values())
        if not trained:
            return self.predict(x)
        if self.optimiser is None and self.kind == "sgd":
            self.optimiser = torch.optim.SGD(trained, self.rate, self.momentum)
        elif self.optimiser is None:
            self.optimiser = torch.optim.Adam(trained, self.rate, (self.momentum, 0.999), EPSILON)
        self.optimiser.zero_grad(set_to_none=True)
        logits = self.backward(x, y)
        self.optimiser.step()
        self.commit()
        return logits.detach()

    def commit(self) -> None:
        """Keep the statistics of the last forward pass."""
        for layer in self.norms.values():
            layer.commit()

    def gradients(self) -> dict[str, Tensor]:
        """Gradients of the last `backward`, by the bundle's names; zeros where none came."""
        return {name: torch.zeros_like(value) if value.grad is None else value.grad.clone() for name, value in self.trained.items()}

    def state(self) -> dict[str, Tensor]:
        """Copies of all that changes, by the bundle's names: parameters, moments, statistics."""
        table = {name: value.detach().clone() for name, value in self.trained.items()}
        kinds = {"momentum_buffer": "momentum", "exp_avg": "first", "exp_avg_sq": "second"}
        for name, value in self.trained.items():
            held = self.optimiser.state.get(value, {}) if self.optimiser else {}
            for key, kind in kinds.items():
                if key in held:
                    table[f"{kind}.{name}"] = held[key].clone()
            if "step" in held:
                table["step"] = torch.as_tensor(held["step"]).clone()
        if self.live:
            for name, layer in self.norms.items():
                table[f"statistics.{name}.mean"], table[f"statistics.{name}.variance"] = layer.mean.clone(), layer.variance.clone()
        return table

    def load(self, values: Mapping[str, Tensor]) -> None:
        """Start from these parameters and statistics, by the bundle's names; moments among them are left out.

        Raises:
            KeyError: a parameter, or with live statistics a statistic, is missing.
        """
        with torch.no_grad():
            for name, value in self.trained.items():
                value.copy_(values[name])
            for name, layer in self.norms.items() if self.live else ():
                layer.mean = values[f"statistics.{name}.mean"].clone()
                layer.variance = values[f"statistics.{name}.variance"].clone()


class Source(Adaptation):
    """The model as it is."""

    follows = False


class Norm(Adaptation):
    """Statistics follow the stream; nothing is trained."""


class Tent(Adaptation):
    """Entropy minimisation over scale and shift of the normalisation layers, with Adam (arXiv 2006.10726)."""

    optimiser_name = "adam"

    def build(self) -> None:
        for layer in self.norms.values():
            layer.requires_grad_(True)
