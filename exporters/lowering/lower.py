"""Walks a traced step and lowers each operator by its rule."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from edgeadapt.exporters.capture import module_path
from edgeadapt.exporters.ir import Graph, Value
from edgeadapt.exporters.lowering.registry import find, numpy_dtype


@dataclass(frozen=True)
class Missing:
    """An operator without a rule, the user's module it came from ("" where that is not known), and why, where there is a rule that does not fit."""

    operator: str
    module: str
    reason: str = ""


class Unsupported(Exception):
    """Operators of a traced graph that have no rule, or none for their arguments."""

    def __init__(self, missing: Sequence[Missing]) -> None:
        super().__init__(", ".join(sorted({item.operator for item in missing})))
        self.missing = list(missing)


def _merge_key(node: fx.Node) -> Any:
    def freeze(argument: Any) -> Any:
        if isinstance(argument, (list, tuple)):
            return tuple(freeze(item) for item in argument)
        if isinstance(argument, dict):
            return tuple(sorted((key, freeze(item)) for key, item in argument.items()))
        return argument if isinstance(argument, fx.Node) else (type(argument).__name__, str(argument))

    return node.target, freeze(node.args), freeze(node.kwargs)


def merge_duplicates(graph: fx.Graph) -> None:
    """Give equal computations one node (common subexpression elimination), then drop what nothing reads."""
    seen: dict[Any, fx.Node] = {}
    transparent = {torch.ops.aten.detach.default, torch.ops.aten.alias.default, torch.ops.aten.clone.default}
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if node.target in transparent:
            node.replace_all_uses_with(node.args[0])
            continue
        if node.target is torch.ops.aten.view.default and tuple(node.args[0].meta["val"].shape) == tuple(node.meta["val"].shape):
            node.replace_all_uses_with(node.args[0])
            continue
        first = seen.setdefault(_merge_key(node), node)
        if first is not node:
            node.replace_all_uses_with(first)
    graph.eliminate_dead_code()


def lower(trace: fx.GraphModule, graph: Graph, inputs: Mapping[str, Value]) -> list[Value]:
    """Emit a traced function into `graph`; `inputs` maps placeholder names to values. Returns the function's outputs, flat.

    Raises:
        Unsupported: with every operator that has no rule, or whose rule fails for its arguments, whatever it raises.
    """
    values: dict[fx.Node, Any] = {}
    missing: list[Missing] = []

    def fetch(argument: Any) -> Any:
        return fx.node.map_arg(argument, lambda source: values[source])

    for node in trace.graph.nodes:
        if node.op == "placeholder":
            values[node] = inputs.get(node.name)
        elif node.op == "get_attr":
            tensor = getattr(trace, str(node.target))
            values[node] = graph.constant(tensor.detach().numpy().astype(numpy_dtype(tensor.dtype)))
        elif node.op == "call_function":
            graph.module = module_path(node)
            if node.target is operator.getitem:
                source = values[node.args[0]]
                values[node] = source[node.args[1]] if source is not None else None
                continue
            found = find(str(node.target))
            if found is None or any(isinstance(source.meta.get("val"), torch.Tensor) and values[source] is None for source in node.all_input_nodes):
                if found is None:
                    missing.append(Missing(str(node.target), graph.module))
                values[node] = None
                continue
            extra = {"operator": str(node.target).split(".")[1]} if found.__name__ == "creation" else {}
            kwargs = {
                key: value for key, value in node.kwargs.items() if key not in ("layout", "device", "pin_memory", "memory_format", "non_blocking")
            }
            try:
                values[node] = found(graph, *fetch(node.args), **fetch(kwargs), **extra)
            except Exception as error:  # a rule knows the forms that models use; another is the user's to replace, not ours to crash on
                missing.append(Missing(str(node.target), graph.module, _reason(error)))
                values[node] = None
        elif node.op == "output":
            if missing:
                raise Unsupported(missing)
            return _flat(node.args[0], values)
    raise Unsupported(missing)


def _flat(argument: Any, values: Mapping[fx.Node, Any]) -> list[Value]:
    found: list[Value] = []
    fx.node.map_arg(argument, lambda source: found.append(values[source]))
    return found


def _reason(error: Exception) -> str:
    """The first line of what a rule raised; with its kind where a rule did not foresee it."""
    text = str(error.args[0] if isinstance(error, KeyError) and error.args else error).strip().partition("\n")[0]
    return text if isinstance(error, KeyError) else f"{type(error).__name__}: {text}" if text else type(error).__name__
