"""Where a model can be cut, and where it is.

A cut is a tensor that everything after it depends on and that nothing bypasses: at that point one tensor carries the whole computation. Between
two neighbouring such points stands either light work (normalisation, activation, pooling) or a *unit*: a layer with weights or a whole residual
block. Parts are runs of units; EcoTTA (arXiv 2303.01904, Table 13) gives early parts fewer of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import torch
from torch import fx

from edgeadapt.errors import ExportError
from edgeadapt.exporters.capture import NORMALISATION, Captured, module_path

aten = torch.ops.aten
HEAVY = {
    aten.conv1d,
    aten.conv2d,
    aten.conv_transpose1d,
    aten.conv_transpose2d,
    aten.linear,
    aten.matmul,
    aten.bmm,
    aten.mm,
    aten.addmm,
    aten.einsum,
    aten.scaled_dot_product_attention,
    aten.convolution,
}
SHARES = {1: (1,), 2: (1, 2), 3: (1, 1, 2), 4: (1, 1, 2, 2), 5: (1, 1, 1, 1, 2)}


@dataclass(frozen=True)
class Cut:
    """A place where the model can be cut: the node, its name for users, its shape without the batch, and whether channels come last."""

    node: str
    name: str
    shape: tuple[int, ...]
    channels_last: bool

    @property
    def channels(self) -> int:
        """Number of channels."""
        return self.shape[-1] if self.channels_last else self.shape[0]

    @property
    def spatial(self) -> tuple[int, ...]:
        """Sizes other than the channels."""
        return self.shape[:-1] if self.channels_last else self.shape[1:]


@dataclass(frozen=True)
class Partition:
    """The chosen cuts in order: cuts[0] ends the stem, cuts[k] ends part k; `units` is how many units each part holds."""

    cuts: tuple[Cut, ...]
    units: tuple[int, ...]


def is_heavy(node: fx.Node) -> bool:
    """Whether a node is a layer with weights, or a product that mixes what came before."""
    return getattr(node.target, "overloadpacket", None) in HEAVY


def _crossings(captured: Captured) -> list[fx.Node]:
    """Nodes after which one tensor carries everything, in order."""
    moving: set[fx.Node] = set()
    remaining: dict[fx.Node, int] = {}
    live: set[fx.Node] = set()
    order = [node for node in captured.graph.nodes if node.op in ("placeholder", "call_function", "output")]
    found = []
    for node in order:
        if node.op == "placeholder":
            if node.name != captured.input:
                continue
        elif not any(source in moving for source in node.all_input_nodes):
            continue
        moving.add(node)
        if node.op == "output":
            break
        remaining[node] = len(node.users)
        live.add(node)
        for source in node.all_input_nodes:
            if source in moving:
                remaining[source] -= 1
                if remaining[source] == 0:
                    live.discard(source)
        if live == {node} and node.op == "call_function" and isinstance(node.meta.get("val"), torch.Tensor):
            found.append(node)
    return found


def _stack(node: fx.Node) -> list[tuple[str, str]]:
    return [(str(path), str(kind)) for path, kind in (node.meta.get("nn_module_stack") or {}).values()]


def _between(captured: Captured, nodes: Sequence[fx.Node]) -> list[list[fx.Node]]:
    """Operators from one crossing (exclusive) to the next (inclusive)."""
    marks = {node: index for index, node in enumerate(nodes)}
    groups: list[list[fx.Node]] = [[] for _ in nodes]
    current = 0
    for node in captured.operators:
        if current < len(nodes):
            groups[current].append(node)
            current = marks[node] + 1 if node in marks else current
    return groups


def _block_classes(groups: Sequence[list[fx.Node]]) -> set[str]:
    """Classes of the modules that hold a whole bypassed stretch of weighted layers: the model's residual blocks."""
    classes = set()
    for group in groups:
        heavy = [node for node in group if is_heavy(node)]
        if len(heavy) < 2:
            continue
        stacks = [_stack(node)[:-1] for node in heavy]
        shared = [
            entry for entry in stacks[0] if all(entry in stack for stack in stacks[1:]) and not entry[1].startswith("torch.nn.modules.container")
        ]
        if shared and shared[-1][0]:
            classes.add(shared[-1][1])
    return classes


def _last_nodes(captured: Captured) -> dict[str, fx.Node]:
    """The last operator of each module, by module path."""
    table: dict[str, fx.Node] = {}
    for node in captured.operators:
        for path, _ in _stack(node):
            table[path] = node
    return table


LIGHT = {aten.add, aten.mul, aten.relu, aten.gelu, aten.silu, aten.dropout, aten.clone, aten.sub, aten.div}


def _channels_last(node: fx.Node) -> bool:
    """Whether a rank-3 tensor holds its channels in the last axis, as transformers' tokens do: its makers or readers mix that axis."""

    def verdict(other: fx.Node) -> bool | None:
        packet = getattr(other.target, "overloadpacket", None)
        if packet in (aten.linear, aten.layer_norm, aten.rms_norm):
            return True
        if (
            packet in (aten.conv1d, aten.conv2d, aten.conv_transpose1d, aten.group_norm, aten.max_pool1d, aten.avg_pool1d)
            or other.target is NORMALISATION
        ):
            return False
        return None

    def walk(start: fx.Node, forward: bool) -> bool | None:
        seen: set[fx.Node] = set()
        queue = [start] if not forward else list(start.users)
        while queue:
            other = queue.pop(0)
            if other in seen or other.op != "call_function":
                continue
            seen.add(other)
            found = verdict(other)
            if found is not None:
                return found
            if getattr(other.target, "overloadpacket", None) in LIGHT:
                queue += list(other.users) if forward else list(other.all_input_nodes)
            elif not forward and getattr(other.target, "overloadpacket", None) in (aten.transpose, aten.permute):
                return _turned(other)
        return None

    behind = walk(node, forward=False)
    ahead = walk(node, forward=True) if behind is None else behind
    return bool(ahead)


def _turned(node: fx.Node) -> bool | None:
    """Whether a transposition brought a convolution's channels to the end, as patches become tokens."""
    source = node.all_input_nodes[0]
    while getattr(source.target, "overloadpacket", None) in (aten.view, aten.reshape, aten.flatten):
        source = source.all_input_nodes[0]
    return True if getattr(source.target, "overloadpacket", None) in (aten.conv1d, aten.conv2d) else None


def candidates(captured: Captured) -> list[Cut]:
    """Every place to cut, one for each unit: the first ends the stem, the last ends the encoder.

    Of the places with only light work between them one is taken: the output of a module that holds others, if there is such a one (a block's own
    end), else the last.
    """
    crossings = [node for node in _crossings(captured) if 3 <= node.meta["val"].dim() <= 4 or node.meta["val"].dim() == 2]
    if not crossings:
        return []
    groups = _between(captured, crossings)
    blocks = _block_classes(groups)
    last = _last_nodes(captured)
    chains: list[list[fx.Node]] = []
    for node, group in zip(crossings, groups, strict=True):
        if any(is_heavy(inner) for inner in group) or not chains:
            chains.append([])
        chains[-1].append(node)
    chains = [chain for chain in chains if chain]
    result = captured.result
    chosen: list[fx.Node] = []
    for chain in chains:
        if result in chain:
            continue
        outside = [node for node in chain if not any(kind in blocks and last[path] is not node for path, kind in _stack(node))]
        spatial = [node for node in outside if node.meta["val"].dim() > 2] or outside
        wide = [node for node in spatial if node.meta["val"][0, 0].numel() > 1] or spatial
        ends = [node for node in wide if any(last[path] is node and kind in blocks for path, kind in _stack(node))]
        if wide:  # else the whole chain lies inside a block's module
            chosen.append((ends or wide)[-1])
    deepest = max((node.meta["val"].dim() for node in chosen), default=0)
    if deepest > 2:
        chosen = [node for node in chosen if node.meta["val"].dim() > 2]
    names: dict[str, int] = {}
    cuts = []
    for node in chosen:
        paths = [path for path, _ in _stack(node) if last[path] is node and path]
        name = paths[0] if paths else module_path(node) or node.name
        name = name if name not in names else node.name
        names[name] = 1
        shape = tuple(int(size) for size in node.meta["val"].shape[1:])
        cuts.append(Cut(node.name, name, shape, len(shape) == 2 and _channels_last(node)))
    return cuts


def shares(units: int, parts: int) -> tuple[int, ...]:
    """How many of `units` each of `parts` gets: early parts about half as many as late ones, at least one each."""
    weights = SHARES.get(parts, (1,) * (parts - parts // 3) + (2,) * (parts // 3))
    exact = [units * weight / sum(weights) for weight in weights]
    counts = [max(1, int(value)) for value in exact]
    by_remainder = sorted(range(parts), key=lambda k: (-(exact[k] - int(exact[k])), -k))  # a tie goes to the later part
    position = 0
    while sum(counts) < units:
        counts[by_remainder[position % parts]] += 1
        position += 1
    while sum(counts) > units:
        largest = max(range(parts), key=lambda k: (counts[k], k))
        counts[largest] -= 1
    return tuple(counts)


def partition(captured: Captured, parts: int, names: Sequence[str] = ()) -> Partition:
    """Cut a model into a stem, `parts` parts and a classifier.

    Args:
        captured: the traced model.
        parts: number of parts, at least 1.
        names: places to cut, by the names that `candidates` gives, the stem's end first; found by the rule of shares where empty.

    Raises:
        ExportError: fewer places than needed; names that are none.
    """
    places = candidates(captured)
    if names:
        table = {cut.name: cut for cut in places}
        for name in names:
            if name not in table:
                near = get_close_matches(name, list(table), 3)
                raise ExportError(
                    f"{name!r} is not a place where the model can be cut",
                    f"did you mean {', '.join(near)}?" if near else f"the places are: {', '.join(table) or 'none'}",
                )
        positions = sorted(places.index(table[name]) for name in names)
        if len(positions) < 2:
            raise ExportError("one cut gives no part", "name at least two places: the end of the stem and the end of a part")
        counts = tuple(b - a for a, b in zip(positions[:-1], positions[1:], strict=True))
        return Partition(tuple(places[index] for index in positions), counts)
    if len(places) < 2:
        raise ExportError(
            _why_not(captured, places), "use --method tent or norm, which need no cuts, or let one tensor carry everything between blocks"
        )
    parts = min(parts, len(places) - 1)
    counts = shares(len(places) - 1, parts)
    positions = [0]
    for count in counts:
        positions.append(positions[-1] + count)
    return Partition(tuple(places[index] for index in positions), counts)


def _why_not(captured: Captured, places: Sequence[Any]) -> str:
    heavy = [node for node in captured.operators if is_heavy(node)]
    where = module_path(heavy[0]) if heavy else ""
    if len(heavy) < 3:
        return f"the model has {len(heavy)} layers with weights, too few to cut into a stem, a part and a classifier"
    return (
        f"the model can be cut at {len(places)} place(s), needs 2: from {where or heavy[0].name!r} on, connections bypass every layer, so that "
        "no single tensor carries everything"
    )
