"""A step in pieces, in torch: runs over a few of its frames each, which add to sums, and one update of all.

Exact up to the rounding of sums where nothing but the objective looks at more than one frame, hence where normalisation statistics do not follow the
stream. `ROLE-sums` takes M frames and the sums so far, `ROLE-update` the sums of a whole step; neither knows how many frames a step has.

Kept between runs are, for each kind of mean in the objective, its value, what it is divided by, and the gradients of the parameters that it
reaches; and what the step reports.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import reduce
from operator import add

import torch
from torch import Tensor

from edgeadapt.bundle.roles import SUMS, UPDATE
from edgeadapt.errors import ExportError
from edgeadapt.exporters.ir import Graph
from edgeadapt.exporters.methods.base import Tensors, Term
from edgeadapt.exporters.programs import WEIGHTS, Model, Program, build
from edgeadapt.memory.rules import misplaced_sums

_OPTIMISER = ("rate", "momentum")


@dataclass
class Sums(Program):
    """Adds a run's share to the sums: `sum.NAME` → `added.NAME`; gives the logits of its own frames."""

    def __call__(self, given: Mapping[str, Tensor]) -> Tensors:
        """Run it."""
        logits, shares = self.shares(given)
        return {"logits": logits, **{f"added.{name}": given[f"sum.{name}"] + share for name, share in shares.items()}}

    def shares(self, given: Mapping[str, Tensor]) -> tuple[Tensor, Tensors]:
        """Logits, and what the run adds to each sum."""
        with torch.enable_grad():
            done = self.forward(given, True)
            logits = self.ended(done)
            kinds: dict[str, list[Term]] = {}
            for term in done.terms:
                kinds.setdefault(term.over, []).append(term)
            table: Tensors = {"count.all": torch.ones(())}  # runs: each has as many predictions
            for over, terms in kinds.items():
                value, count = reduce(add, (term.value for term in terms)), terms[0].count
                found = torch.autograd.grad(value, list(done.parameters.values()), retain_graph=True, allow_unused=True)
                table[f"loss.{over}"] = value.detach()
                table |= {} if count is None else {f"count.{over}": count.detach()}
                table |= {f"gradient.{over}.{name}": part.detach() for name, part in zip(done.parameters, found, strict=True) if part is not None}
        return logits, table | {f"metric.{name}": value for name, value in done.measures().items()}


@dataclass
class Update(Program):
    """Divides the sums of a step by what they are means of, and gives its metrics, and the parameters and moments that follow."""

    @property
    def name(self) -> str:
        """Its name in the bundle: it takes no frames, so it has no batch."""
        return self.role

    def __call__(self, given: Mapping[str, Tensor]) -> Tensors:
        """Run it."""
        sums = {name.removeprefix("sum."): value for name, value in given.items() if name.startswith("sum.")}
        counts = {name.removeprefix("count."): value.clamp(min=1.0) for name, value in sums.items() if name.startswith("count.")}
        gradients: dict[str, Tensor | None] = {}
        for over, count in counts.items():
            prefix = f"gradient.{over}."
            for name, value in ((name.removeprefix(prefix), value) for name, value in sums.items() if name.startswith(prefix)):
                before = gradients.get(name)
                gradients[name] = value / count if before is None else before + value / count
        losses = [sums[f"loss.{over}"] / count for over, count in counts.items() if f"loss.{over}" in sums]
        measures = {name: value / counts["all"] for name, value in sums.items() if name.startswith("metric.")}
        return {"metric.loss": reduce(add, losses), **measures, **self.updated(given, gradients)}


def sums_of(model: Model, role: str, batch: int, x: Tensor, target: Tensor | None = None) -> Sums:
    """The program of role `role`-sums over `batch` frames, with example inputs as `build` takes them.

    Raises:
        ExportError: statistics follow the stream, so that a step needs all of its frames at once.
    """
    if model.statistics == "live":
        raise ExportError("normalisation statistics that follow the stream need all frames of a step at once", 'export with statistics="source"')
    if not model.method.summable:
        raise ExportError(f"a step of {model.method.name} needs all of its frames at once", "leave micro-batches out: --micro none")
    plain = build(model, role, batch, x, target)
    moments = {name for name, (kind, _) in model.state().items() if kind == "moment"}
    unused = {f"hyper.{name}" for name in _OPTIMISER} | {f"state.{name}" for name in moments}
    example = {name: value for name, value in plain.example.items() if name not in unused}
    program = Sums(model, role + SUMS, batch, example, plain.frozen, [name for name in plain.hyper if name not in _OPTIMISER])
    try:
        _, shares = program.shares({name: value.clone() for name, value in example.items()})
    except Exception as error:  # a layer may refuse so few frames, in words of its own
        raise ExportError(f"the step cannot be run on {batch} of its frames: {error}", "leave this micro-batch out") from error
    program.example |= {f"sum.{name}": torch.zeros_like(value) for name, value in shares.items()}
    return program


def update_of(sums: Sums) -> Update:
    """The program that ends a step of such runs, of any number."""
    model, hyper = sums.model, [name for name in _OPTIMISER if name in sums.model.hyper()]
    example = {f"hyper.{name}": torch.tensor(model.hyper()[name].default) for name in hyper}
    example |= {f"state.{name}": value for name, (_, value) in model.state().items()}
    example |= {name: torch.ones_like(value) for name, value in sums.example.items() if name.startswith("sum.")}
    frozen = {WEIGHTS + name: value for name, value in model.storage.frozen().items()}
    return Update(model, sums.role.removesuffix(SUMS) + UPDATE, 0, {**example, **frozen}, frozen, hyper)


def check_in_place(graph: Graph, names: Iterable[str]) -> None:
    """See that a graph may write each sum over the one it is given, as the device has it do.

    Raises:
        ExportError: it may not.
    """
    if wrong := misplaced_sums(graph, names):
        raise ExportError(f"{graph.name}: the sum {wrong[0]} is not added to in one place", "this is a fault of the exporter; please report it")
