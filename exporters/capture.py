"""The user's module as a flat graph of ATen operators.

torch.export traces the module; what it cannot trace (control flow that depends on data, calls out of torch) is the user's to mend, so the
error names the reason. The result is functional: no operator writes into its inputs.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import fx, nn

from edgeadapt.errors import ExportError

if TYPE_CHECKING:
    from edgeadapt.exporters.quantise.rounding import Quantisation

_SCALED = {torch.ops.aten.layer_norm: 2, torch.ops.aten.group_norm: 2, torch.ops.aten.instance_norm: 1}
"""Normalisations over a frame alone, and which argument their scale is; their shift is the next."""
NORMALISATION = torch.ops.aten._native_batch_norm_legit_no_training.default


@dataclass(frozen=True)
class Norm:
    """One batch normalisation of the user's model: where it stands and the names of its tensors ("" where it has none)."""

    name: str
    node: str
    weight: str
    bias: str
    mean: str
    variance: str
    eps: float


@dataclass(frozen=True)
class Affine:
    """The scale and shift of one normalisation of whatever kind: its operator's node, and their qualified names ("" where it has none)."""

    node: str
    weight: str
    bias: str


@dataclass(frozen=True)
class Captured:
    """A traced module at one batch size.

    graph: functional ATen operators; tensors: parameters, buffers and constants by qualified name; owner: qualified name of each
    placeholder that stands for one of them; parameters: the names among them that are parameters; quantisation: what of it is computed in 8 bits;
    again: traces the same module at another batch size.
    """

    graph: fx.Graph
    tensors: dict[str, torch.Tensor]
    owner: dict[str, str]
    input: str
    batch: int
    norms: tuple[Norm, ...]
    parameters: frozenset[str]
    quantisation: Quantisation | None = None
    again: Callable[[int], Captured] | None = dataclasses.field(default=None, compare=False, repr=False)

    def at(self, batch: int) -> Captured:
        """The same model, in the same numbers, at another batch size; traced once for each, where it is not the one it has.

        Raises:
            ExportError: it was made by hand, and cannot be traced again.
        """
        if batch == self.batch:
            return self
        if self.again is None:
            raise ExportError(f"the model is traced at batch {self.batch}, and is needed at {batch}", "trace it with capture()")
        return self.again(batch).quantised(self.quantisation)

    @property
    def shape(self) -> tuple[int, ...]:
        """One input, without the batch."""
        node = next(node for node in self.graph.nodes if node.op == "placeholder" and node.name == self.input)
        return tuple(int(size) for size in node.meta["val"].shape[1:])

    def quantised(self, quantisation: Quantisation | None) -> Captured:
        """The same model with its numbers in 8 bits."""
        return dataclasses.replace(self, quantisation=quantisation)

    @property
    def result(self) -> fx.Node:
        """The node that computes the logits."""
        output = next(node for node in self.graph.nodes if node.op == "output")
        value = output.args[0]
        while isinstance(value, (tuple, list)):
            value = value[0]
        assert isinstance(value, fx.Node)
        return value

    @property
    def affines(self) -> tuple[Affine, ...]:
        """Scale and shift of every batch, group, layer and instance normalisation that has them, in the order of execution."""
        found = []
        for node in self.operators:
            packet = getattr(node.target, "overloadpacket", None)
            place = 1 if node.target is NORMALISATION else _SCALED.get(packet) if packet is not None else None
            if place is None:
                continue
            names = [self.owner.get(arg.name, "") if isinstance(arg, fx.Node) else "" for arg in node.args[place : place + 2]]
            names += [""] * (2 - len(names))
            if any(name in self.parameters for name in names):
                found.append(Affine(node.name, *(name if name in self.parameters else "" for name in names)))
        return tuple(found)

    @property
    def operators(self) -> list[fx.Node]:
        """The operator nodes, in execution order."""
        return [node for node in self.graph.nodes if node.op == "call_function"]


def module_path(node: fx.Node) -> str:
    """Dotted path of the user's module that a node came from; "" for the outermost module."""
    stack = node.meta.get("nn_module_stack") or {}
    return str(list(stack.values())[-1][0]) if stack else ""


def _norms(graph: fx.Graph, owner: dict[str, str]) -> tuple[Norm, ...]:
    found: list[Norm] = []
    taken: set[str] = set()
    for node in graph.nodes:
        if node.target is not NORMALISATION:
            continue
        names = [owner.get(arg.name, "") if isinstance(arg, fx.Node) else "" for arg in node.args[1:5]]
        if not names[2] or not names[3]:
            raise ExportError(
                f"the batch normalisation {module_path(node) or node.name!r} takes its statistics from a computation",
                "give it ordinary running_mean and running_var buffers",
            )
        name = module_path(node) or names[2].rpartition(".")[0] or node.name
        if name in taken:
            name = f"{name}@{node.name}"
        taken.add(name)
        found.append(Norm(name, node.name, names[0], names[1], names[2], names[3], float(node.args[6])))
    return tuple(found)


def capture(model: nn.Module, shape: tuple[int, ...], batch: int) -> Captured:
    """Trace `model` in eval mode for float32 input (batch, *shape).

    Raises:
        ExportError: the module cannot be traced, does not take one tensor, or does not return logits N×C or N×C×….
    """

    @cache
    def again(batch: int) -> Captured:
        return dataclasses.replace(_traced(model, shape, batch), again=again)

    return again(batch)


def _traced(model: nn.Module, shape: tuple[int, ...], batch: int) -> Captured:
    model.eval()
    sample = torch.zeros((batch, *shape))
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            program = torch.export.export(model, (sample,)).run_decompositions({})
    except Exception as error:  # torch.export raises many kinds; each is the user's model
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ExportError(
            f"torch.export cannot trace {type(model).__name__} for input {(batch, *shape)}: {reason[0]}",
            "the forward pass must be plain tensor operations, without branches or sizes that depend on the data",
        ) from error
    signature = program.graph_signature
    owner = {**signature.inputs_to_parameters, **signature.inputs_to_buffers, **signature.inputs_to_lifted_tensor_constants}
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    first: dict[int, str] = {}
    for name, tensor in named:
        first.setdefault(id(tensor), name)
    shared = {name: first[id(tensor)] for name, tensor in named}
    owner = {place: shared.get(name, name) for place, name in owner.items()}  # a module registered twice has one set of tensors
    tensors = {
        name: tensor.detach()
        for name, tensor in {**program.state_dict, **program.constants}.items()
        if isinstance(tensor, torch.Tensor) and shared.get(name, name) == name
    }
    if signature.buffers_to_mutate:
        names = ", ".join(sorted(signature.buffers_to_mutate.values())[:3])
        raise ExportError(f"the model writes into its own buffers in eval mode ({names})", "remove the update from the forward pass")
    for node in reversed(list(program.graph.nodes)):
        if node.op == "call_function" and not node.users:  # also checks that tracing left behind, as by x.float()
            program.graph.erase_node(node)
    captured = Captured(
        program.graph, tensors, owner, signature.user_inputs[0], batch, _norms(program.graph, owner), frozenset(dict(model.named_parameters()))
    )
    if len(signature.user_outputs) != 1:
        raise ExportError(
            f"the model returns {len(signature.user_outputs)} values, expected the logits alone", "wrap it in a module that returns the logits"
        )
    value = captured.result.meta["val"]
    if value.dim() < 2 or value.shape[0] != batch or value.dtype != torch.float32:
        raise ExportError(
            f"the model returns {tuple(value.shape)} {value.dtype}, expected float32 logits (batch, classes) or (batch, classes, …)",
            "return the logits with the batch first and the classes second",
        )
    foreign = [name for name, tensor in tensors.items() if tensor.dtype in (torch.float16, torch.bfloat16, torch.float64)]
    if foreign:
        raise ExportError(f"{foreign[0]!r} is {tensors[foreign[0]].dtype}, expected float32", "call model.float() in the factory")
    return captured
