"""The functions a bundle holds, in torch: source, predict, adapt and learn.

Each is a pure function from named tensors to named tensors, with the names that the bundle's graphs use. It is traced to make the graph, and run
eagerly to check it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from edgeadapt.bundle.reference import Chance, Reference
from edgeadapt.bundle.roles import STEPS
from edgeadapt.bundle.searched import FACTORS, Searched
from edgeadapt.exporters.backbone import Normaliser
from edgeadapt.exporters.blending import ASSUMED, blended
from edgeadapt.exporters.methods.base import MEMORY, START, Hyper, Method, Outcome, Tensors, Terms, entropy, loss, selected
from edgeadapt.exporters.methods.source import Source
from edgeadapt.exporters.operators import forward_ends
from edgeadapt.exporters.optimisers import MOMENTUM
from edgeadapt.exporters.quantise.kept import Kept
from edgeadapt.exporters.storage import COUNTER, Packed, Plain, Storage, Tier

STATISTICS, WEIGHTS, FIXED = "statistics.", "weights.", "fixed."


ANCHOR, MIXED, ALIKE = "anchor.", "chance.mixed", "chance.alike"
FOLLOWING = {
    "trust": Hyper(0.7, 0.0, 1.0, "the most that the stream's statistics count beside the source's, in the first layer"),
    "doubt": Hyper(0.005, 1e-6, 100.0, "distance beyond chance, in squared deviations, at which they count half of that"),
    "late": Hyper(0.3, 0.0, 1.0, "how much of that trust is left in the last layer"),
    "few": Hyper(0.5, 0.0, 10.0, "how much of what windows of few classes do at the source is no shift: 1 where classes come in runs, 0 where mixed"),
    "own": Hyper(0.4, 0.0, 1.0, "the most that a frame's own statistics count beside these"),
}
"""Scalars of statistics that are anchored at the source."""


@dataclass(frozen=True)
class Model:
    """A method with its trained tensors, ready to be compiled.

    statistics: the mode, "live", "source" or "none"; values: statistics by `layer.mean` and `layer.variance`; exact: gradients flow through the
    batch's statistics; shifted: layers whose variance is computed around the source mean; fixed: parameters that are not trained on the device;
    small: whether steps keep bytes of the forward pass for the backward one; storage: how parameters and moments are held between steps;
    anchored: statistics that follow the stream count as far as it has left the source, see `blending`; reference: what source data look like to it,
    None where there are none; searched: how the defaults of its scalars were found, None where they are the usual ones.
    """

    method: Method
    parameters: Tensors
    values: Tensors
    statistics: str
    optimiser: str
    exact: bool = False
    shifted: frozenset[str] = frozenset()
    fixed: Tensors = field(default_factory=dict)
    small: bool = False
    storage: Storage = field(default_factory=Plain)
    anchored: bool = False
    reference: Reference | None = None
    searched: Searched | None = None

    def state(self) -> dict[str, tuple[str, Tensor]]:
        """What changes on the device: name → (kind, initial value)."""
        table = self.held() | {MEMORY + name: ("memory", value) for name, value in self.method.memory().items()}
        if self.statistics == "live":
            table |= {STATISTICS + name: ("statistic", value) for name, value in self.values.items()}
        return table

    def normaliser(self) -> Normaliser:
        """How layers are normalised on the first frames of a stream, each scalar as it is by default at a batch of 64."""
        blend = blended(self.values, self.depths, *self._chances(), *(scalar.default for scalar in FOLLOWING.values())) if self.anchored else None
        mix = 1.0 if self.method.mix is None else self.method.mix
        return Normaliser(self.values, "live" if self.statistics == "live" else "source", mix, False, self.shifted, blend)

    def _chances(self) -> tuple[Tensor, Tensor]:
        """Of mixed windows and of those alike, each (layers,); assumed where they were not measured."""
        known, assumed = {} if self.reference is None else self.reference.layers, Chance(ASSUMED, ASSUMED)
        found = [known.get(name, assumed) for name in self.layers]
        return torch.tensor([item.mixed for item in found]), torch.tensor([item.alike for item in found])

    @property
    def depths(self) -> dict[str, float]:
        """How deep each layer that has statistics lies, from 0 to 1."""
        norms = [norm.name for norm in self.method.backbone.captured.norms]
        found = {name: index / max(1, len(norms) - 1) for index, name in enumerate(norms)}
        return {name: found[name] if name in found else self.method.depth(name) for name in self.layers}

    @property
    def layers(self) -> tuple[str, ...]:
        """Layers that have statistics."""
        return tuple(dict.fromkeys(name.rpartition(".")[0] for name in self.values))

    def held(self) -> dict[str, tuple[str, Tensor]]:
        """Parameters and moments as they start."""
        return self.storage.state(self.parameters, self.optimiser, self.method.trains)

    def frozen(self) -> Tensors:
        """What never changes: the backbone's tensors and the method's own, parameters that are fixed, and the statistics where they do not move."""
        table = {**self.method.backbone.tensors, **self.method.frozen(), **{FIXED + name: value for name, value in self.fixed.items()}}
        table |= self.storage.frozen()
        if self.statistics != "live":
            table |= {STATISTICS + name: value for name, value in self.values.items()}
        if self.anchored:
            table |= {ANCHOR + name: value for name, value in self.values.items()}
            table |= dict(zip((MIXED, ALIKE), self._chances(), strict=True))
        if self.method.remembers_start:
            table |= {START + name: value for name, value in self.parameters.items()}
        if self.method.restarts:
            table |= {START + name: value for name, (_, value) in self.held().items() if bool(value.any())}
        return table

    def hyper(self) -> dict[str, Hyper]:
        """Every scalar the device may set."""
        table: dict[str, Hyper] = {}
        if self.statistics == "live":
            mix = 1.0 if self.method.mix is None else self.method.mix
            table["mix"] = Hyper(mix, 0.0, 1.0, "weight of this batch's statistics: s ← (1 − mix)·s + mix·b")
        if self.anchored:
            table |= FOLLOWING
        if self.method.trains:
            table["rate"] = Hyper(self.method.rate, 0.0, 10.0, "learning rate")
            table["momentum"] = MOMENTUM
            table |= self.method.hyper()
        found = {name: value for name, value in self.tuned().items() if name in table and name not in FACTORS}
        return table | {name: replace(table[name], default=value) for name, value in found.items()}

    def tuned(self, role: str = "adapt") -> dict[str, float]:
        """Defaults that are this model's own; of `FACTORS` what the usual ones are multiplied by. The rate is that of steps without labels."""
        found = {} if self.searched is None else dict(self.searched.chosen.scalars)
        if self.anchored and self.method.anchored_rate != 1.0:
            found["rate"] = self.method.anchored_rate * found.get("rate", 1.0)
        return {name: value for name, value in found.items() if name != "rate" or not role.startswith("learn")}


@dataclass
class Program:
    """One function of the bundle: call it with a dictionary of tensors named as in `example`."""

    model: Model
    role: str
    batch: int
    example: Tensors
    frozen: Tensors
    hyper: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Its name in the bundle."""
        return f"{self.role}.b{self.batch}"

    def __call__(self, given: Mapping[str, Tensor]) -> Tensors:
        """Run it; gradients are computed where the role needs them."""
        steps, method = self.role in STEPS, self.model.method
        with torch.set_grad_enabled(steps):
            done = self.forward(given, steps)
            passes = [done]
            logits = self.ended(done)
            if steps:
                objective, gradients = _descent(done)
                if "y" not in given and (away := method.ascent(gradients, done.hyper)):
                    passes.append(self.forward(given, steps, away, [done.outcome]))
                    objective, gradients = _descent(passes[-1])
        result = {"logits": logits}
        memory, again = {}, None
        with torch.no_grad():
            outcomes = [item.outcome for item in passes]
            if self.role == "adapt" or (self.role != "source" and method.remembers == "passes"):
                memory = method.remembered(outcomes, done.hyper)
            if self.role == "adapt" and method.restarts:
                again = method.start_again(outcomes, done.hyper)
        if steps:
            result |= {"metric.loss": objective.detach(), **{f"metric.{name}": value for name, value in done.measures().items()}}
            result |= self.updated(given, gradients, passes[-1].counted() if method.skips else None)
            result |= self.begun(given, result, again)
            put, follows = self.settled(given, result, passes)
            result |= put
            memory |= follows
        result |= {f"new.{MEMORY}{name}": value.detach() for name, value in memory.items()}
        return result | {f"new.{STATISTICS}{name}": value for name, value in done.statistics.items()}

    def forward(
        self, given: Mapping[str, Tensor], steps: bool, away: Mapping[str, Tensor] | None = None, before: Sequence[Outcome] = ()
    ) -> Pass:
        """One forward pass, and with `steps` the terms of the objective: of labelled frames if there are labels.

        away: what is added to the parameters; before: the pass that this is the second to.
        """
        model, method = self.model, self.model.method
        tensors, state, hyper = (_named(given, prefix) for prefix in (WEIGHTS, "state.", "hyper."))
        tensors |= {name: value for name, value in state.items() if name.startswith(MEMORY)}
        read = model.storage.read(model.parameters, state, tensors)
        read = {name: value + away[name] if name in away else value for name, value in read.items()} if away else read
        parameters = {name: value.detach().requires_grad_(steps) for name, value in read.items()}
        live = model.statistics == "live"
        values = {name: (state if live else tensors)[STATISTICS + name] for name in model.values}
        blend = None
        if model.anchored:
            blend = blended(_named(tensors, ANCHOR), model.depths, tensors[MIXED], tensors[ALIKE], *(hyper[name] for name in FOLLOWING))
        normalise = Normaliser(values, "live" if live else "source", hyper.get("mix", 1.0), model.exact, model.shifted, blend)
        everything = {**{name: tensors[FIXED + name] for name in model.fixed}, **parameters}
        kept = Kept(given["x"].shape[0]) if steps and model.small else None
        with nullcontext() if kept is None else kept.hooks():
            if kept is not None:
                kept.whole([*given.values(), *everything.values()])
            run = method.backbone.run(tensors, normalise, method.affine(everything), kept)
            outcome = method.passed(self.role, run, given["x"], tensors, everything, hyper)
            terms: Terms = ()
            if steps:
                if "y" in given:
                    terms = method.labelled(outcome, given["y"], hyper)
                else:
                    terms = method.second([*before, outcome], hyper) if before else method.unlabelled(outcome, hyper)
        return Pass(outcome, terms, parameters, hyper, tensors, normalise.updated if live else {})

    def ended(self, done: Pass) -> Tensor:
        """The logits without gradient, at the end of the forward pass; it is marked where what the backward pass needs of it is kept small."""
        logits = done.outcome.logits.detach()
        return forward_ends(logits) if self.model.small and done.terms else logits

    def updated(self, given: Mapping[str, Tensor], gradients: Mapping[str, Tensor | None], counted: Tensor | None = None) -> Tensors:
        """What the optimiser makes of gradients: the next parameters and moments, and the metrics of that, as the graphs name them.

        No gradient counts as zeros. counted: how many predictions count; where none does, everything stays. None: it does not depend on that.
        """
        model, state = self.model, _named(given, "state.")
        found = ((name, gradients.get(name)) for name in model.parameters)
        known = {name: torch.zeros_like(model.parameters[name]) if gradient is None else gradient for name, gradient in found}
        hyper = _named(given, "hyper.")
        if counted is not None:
            hyper["go"] = (counted > 0.0).to(counted.dtype)
            known = {name: value * hyper["go"] for name, value in known.items()}
        following, metrics = model.storage.write(model.optimiser, known, state, _named(given, WEIGHTS), hyper)
        return {f"metric.{name}": value for name, value in metrics.items()} | {f"new.{name}": value for name, value in following.items()}

    def settled(self, given: Mapping[str, Tensor], following: Mapping[str, Tensor], passes: Sequence[Pass]) -> tuple[Tensors, Tensors]:
        """What the method puts in place of parameters after a step, and memory that follows from them."""
        model, last = self.model, passes[-1]
        state = {**_named(given, "state."), **_named(following, "new.")}
        with torch.no_grad():
            read = model.storage.read(model.parameters, state, last.tensors)
            everything = {**{name: last.tensors[FIXED + name] for name in model.fixed}, **{name: value.detach() for name, value in read.items()}}
            put, memory = model.method.settled([item.outcome for item in passes], everything, last.tensors, last.hyper)
        return {f"new.{name}": value for name, value in put.items() if name in model.parameters}, memory

    def begun(self, given: Mapping[str, Tensor], following: Mapping[str, Tensor], again: Tensor | None) -> Tensors:
        """Of what follows a step, parameters and moments as they start, where `again` says so."""
        if again is None:
            return {}
        start = _named(given, WEIGHTS + START)
        moved = {name: following[f"new.{name}"] for name in self.model.held() if name != COUNTER and f"new.{name}" in following}
        return {f"new.{name}": _either(again, start.get(name, _zero(value)), value) for name, value in moved.items()}


@dataclass
class Pass:
    """A forward pass: what the method made of it, the terms of its objective, what it used, and the statistics that follow.

    parameters: as leaves of the gradient; tensors: the frozen ones and the method's memory.
    """

    outcome: Outcome
    terms: Terms
    parameters: Tensors
    hyper: Tensors
    tensors: Tensors
    statistics: Tensors

    def counted(self) -> Tensor:
        """How many predictions count, in the terms that say so."""
        found = [term.count for term in self.terms if term.count is not None]
        return found[0] if found else torch.ones(())

    def measures(self) -> Tensors:
        """Means over all predictions that a step reports besides its loss, without gradient."""
        logits = self.outcome.logits.detach()
        return {"entropy": entropy(logits).mean(), "selected": selected(logits, self.hyper.get("margin", 0.4)).mean()}


def _descent(done: Pass) -> tuple[Tensor, dict[str, Tensor | None]]:
    """The objective of a pass, and its gradients by parameter."""
    objective = loss(done.terms)
    found = torch.autograd.grad(objective, list(done.parameters.values()), allow_unused=True)
    return objective, dict(zip(done.parameters, found, strict=True))


def _either(which: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """`one` where a scalar is true, else `other`; onnxruntime selects among neither int8 nor int16."""
    if other.dtype in (torch.int8, torch.int16):
        return torch.where(which, one.to(torch.int32), other.to(torch.int32)).to(other.dtype)
    return torch.where(which, one, other)


def _zero(like: Tensor) -> Tensor:
    return torch.zeros((), dtype=like.dtype)


def _named(given: Mapping[str, Tensor], prefix: str) -> Tensors:
    return {name.removeprefix(prefix): value for name, value in given.items() if name.startswith(prefix)}


def build(model: Model, role: str, batch: int, x: Tensor, target: Tensor | None = None) -> Program:
    """The program for a role, with example inputs: x (batch, …), and the target for "learn"."""
    example: Tensors = {"x": x}
    if role == "learn":
        assert target is not None
        example["y"] = target
    names = [name for name in model.hyper() if name in ("mix", *FOLLOWING) or role in STEPS]
    example |= {f"hyper.{name}": torch.tensor(model.hyper()[name].default) for name in names}
    steps = role in STEPS
    example |= {f"state.{name}": value for name, (kind, value) in model.state().items() if kind != "moment" or steps}
    frozen = {WEIGHTS + name: value for name, value in model.frozen().items()}
    return Program(model, role, batch, {**example, **frozen}, frozen, names)


def last_parts(model: Model, count: int) -> Model:
    """The model with only the last `count` parts trained: the parameters of earlier ones are fixed as they are, those of no part still train.

    The backward pass then ends at the first trained part, and nothing is kept for it before. Parameters that lie before the first part (TENT's, in
    the stem) go with it. The loss that is reported is what is minimised: of EcoTTA's regulariser only the terms of trained parts.
    """
    method = model.method
    names = frozenset[str]()
    if count < method.parts:
        names = names.union(*(method.owned(index, model.parameters) for index in range(method.parts + method.first - count)))
    kept = {name: value for name, value in model.parameters.items() if name not in names}
    fixed = {name: model.parameters[name] for name in model.parameters if name in names}
    return replace(model, parameters=kept, fixed=fixed, storage=model.storage.only(kept))


def held(model: Model, tier: Tier | None, seed: int) -> Model:
    """The model with its parameters in the forms of a tier, rounded as these hold them; as it is without one, or where it is so already.

    seed: of rounding by chance.
    """
    if tier is None or not model.method.trains or isinstance(model.storage, Packed):
        return model
    storage = Packed(tier, model.parameters, seed)
    return replace(model, parameters=storage.values(), storage=storage)


def source_model(model: Model, values: Tensors) -> Model:
    """The frozen model itself, with the statistics it was trained with."""
    captured = model.method.backbone.captured
    return Model(Source(captured, model.method.setup), {}, values, "source", model.optimiser)
