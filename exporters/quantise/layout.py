"""Which convolutions of a captured model are computed in 8 bits, and which of its tensors lie on grids because of it.

A convolution takes codes of one grid, the same for all channels, and gives codes of a grid for each channel. What stands behind it and can be part of
it is: a normalisation whose statistics do not move, and a ReLU, which is the lower end of a grid that begins at zero. What a convolution reads and
what is added up along the way lies on grids too, so that between the operators of the frozen model only codes are kept.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from edgeadapt.exporters.capture import NORMALISATION, Captured, module_path
from edgeadapt.exporters.quantise.matrices import matrices

aten = torch.ops.aten
CONVOLUTIONS: dict[Any, int] = {aten.conv1d.default: 1, aten.conv2d.default: 2, aten.conv1d.padding: 1, aten.conv2d.padding: 2}
_RELUS = {aten.relu.default, aten.relu_.default}
_BOUNDED = {aten.hardtanh.default, aten.relu6.default, aten.clamp.default}
_PASSING = {aten.max_pool2d, aten.max_pool1d, aten.dropout, aten.alias, aten.clone, aten.channel_shuffle, aten.detach}
_SUMS = {aten.add}
ENTRY = "entry:"
"""What the key of a grid begins with that the tensor has which enters a segment at that node, in place of the node's own value."""


@dataclass(frozen=True)
class Convolution:
    """How a convolution's windows lie: one number for each spatial axis."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


@dataclass(frozen=True)
class Layer:
    """A convolution that can be computed in 8 bits.

    Attributes:
        node: its name in the captured graph.
        module: the path of the user's module.
        weight, bias: qualified names of its tensors; "" where there is no bias.
        source: the node whose grid its input lies on.
        norm: the node of the normalisation that alone reads it, or "".
        end: the last node that can be part of it where statistics do not move: itself, its normalisation's result or the ReLU behind.
        bare: the same where they do: itself, or the ReLU behind it.
        turns: whether the gradient of its input is a convolution too, with the weight turned round.
    """

    node: str
    module: str
    weight: str
    bias: str
    source: str
    norm: str
    end: str
    bare: str
    how: Convolution
    turns: bool


@dataclass(frozen=True)
class Layout:
    """What lies on grids in a model.

    Attributes:
        layers: the convolutions in 8 bits, by node.
        tensors: nodes whose value lies on one grid for all channels, because a convolution reads it.
        channels: nodes with a grid for each channel.
        ends: more such nodes: a convolution's last, where it is part of it.
        relus: those of `tensors` that are ReLUs, and whether they are flat above as well (ReLU6).
        bounds: upper ends that are known, by node.
        positive: nodes with a grid that begins at zero.
        stored: linear layers whose weight is stored in 8 bits, by node, and the weight's name.
    """

    layers: dict[str, Layer]
    tensors: frozenset[str]
    channels: frozenset[str]
    ends: frozenset[str]
    relus: dict[str, bool]
    bounds: dict[str, float] = field(default_factory=dict)
    positive: frozenset[str] = frozenset()
    stored: dict[str, str] = field(default_factory=dict)

    @property
    def weights(self) -> tuple[str, ...]:
        """The names of all weights in 8 bits."""
        return tuple(dict.fromkeys((*(layer.weight for layer in self.layers.values()), *self.stored.values())))


def weight_of(node: fx.Node) -> fx.Node:
    """The node of a layer's weight."""
    weight = node.args[1]
    assert isinstance(weight, fx.Node)
    return weight


def _moving(captured: Captured) -> set[str]:
    """The nodes whose values depend on the input; others are the same for every batch."""
    found = {captured.input}
    for node in captured.operators:
        if any(source.name in found for source in node.all_input_nodes):
            found.add(node.name)
    return found


def convolutions(captured: Captured) -> Iterator[fx.Node]:
    """The convolutions with a weight of the model's of what depends on the input."""
    moving = _moving(captured)
    for node in captured.operators:
        if node.name in moving and node.target in CONVOLUTIONS and isinstance(node.args[1], fx.Node) and node.args[1].name in captured.owner:
            yield node


def windows(node: fx.Node) -> Convolution | None:
    """How its windows lie; None where it pads its two sides unlike, as "same" does with an even window."""
    rank, kernel = CONVOLUTIONS[node.target], weight_of(node).meta["val"].shape[2:]
    given: list[Any] = [*node.args[3:], *[None] * 4]

    def spread(values: Any, default: int) -> tuple[int, ...]:
        values = [default] if values is None else list(values) if isinstance(values, (list, tuple)) else [values]
        return tuple(int(value) for value in (values * rank if len(values) == 1 else values))

    stride, dilation, groups = spread(given[0], 1), spread(given[2], 1), given[3]
    wide = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    padding = [total // 2 for total in wide] if given[1] == "same" else spread(None if given[1] == "valid" else given[1], 0)
    if given[1] == "same" and any(total % 2 for total in wide):
        return None
    return Convolution(stride, tuple(padding), dilation, 1 if groups is None else int(groups))


def _only(node: fx.Node) -> fx.Node | None:
    """The one node that reads it."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def _bound(node: fx.Node) -> float | None:
    """The upper end of an activation that is flat below zero and above some number; None for others."""
    if node.target not in _BOUNDED:
        return None
    if node.target is aten.relu6.default:
        return 6.0
    ends: list[Any] = [*node.args[1:], None, None][:2]
    if node.target is aten.hardtanh.default:
        ends = [-1.0 if ends[0] is None else ends[0], 1.0 if ends[1] is None else ends[1]]
    return float(ends[1]) if ends[0] == 0 and isinstance(ends[1], (int, float)) and ends[1] > 0 else None


def _rectifies(node: fx.Node | None) -> bool:
    return node is not None and (node.target in _RELUS or _bound(node) is not None)


def _origin(node: fx.Node, stops: set[str]) -> str:
    """The key of the grid that a tensor lies on: what only picks or moves values is passed over; at a cut another tensor enters."""
    while node.op == "call_function" and node.name not in stops and getattr(node.target, "overloadpacket", None) in _PASSING:
        node = node.all_input_nodes[0]
    return ENTRY + node.name if node.op == "placeholder" or node.name in stops else node.name


def layout(captured: Captured, cuts: Sequence[str] = (), floating: frozenset[str] = frozenset()) -> Layout:
    """What lies on grids.

    Args:
        captured: the traced model.
        cuts: nodes at which a method may put another tensor in place of the model's: nothing is joined across them.
        floating: layers that stay in float32, by node.
    """
    stops = set(cuts)
    found: dict[str, Layer] = {}
    for node in convolutions(captured):
        how = windows(node)
        if node.name in floating or how is None or not isinstance(node.args[0], fx.Node):
            continue
        bias = node.args[2] if len(node.args) > 2 else None
        if isinstance(bias, fx.Node) and bias.name not in captured.owner:
            continue
        reader = _only(node) if node.name not in stops else None
        norm = reader if reader is not None and reader.target is NORMALISATION else None
        after = node
        if norm is not None:
            picked = _only(norm)
            if picked is None or picked.target is not operator.getitem or norm.name in stops:
                norm = None
            else:
                after = picked
        behind = _only(after) if after.name not in stops else None
        end = behind if _rectifies(behind) else after
        assert end is not None
        owner, kernel = captured.owner, weight_of(node).meta["val"].shape[2:]
        found[node.name] = Layer(
            node.name,
            module_path(node) or node.name,
            owner[weight_of(node).name],
            owner[bias.name] if isinstance(bias, fx.Node) else "",
            _origin(node.args[0], stops),
            "" if norm is None else norm.name,
            end.name,
            node.name if norm is not None else end.name,
            how,
            all(s == 1 for s in how.stride) and all(d * (k - 1) >= p for d, k, p in zip(how.dilation, kernel, how.padding, strict=True)),
        )
    readers: dict[str, list[str]] = {}
    for node in matrices(captured):
        readers.setdefault(captured.owner[weight_of(node).name], []).append(node.name)
    stored = {name: weight for weight, names in readers.items() for name in names if floating.isdisjoint(names)}
    return replace(_around(captured, found, stops), stored=stored)


def _around(captured: Captured, layers: dict[str, Layer], stops: set[str]) -> Layout:
    """The grids that go with these convolutions."""
    tensors = {layer.source for layer in layers.values()}
    channels = {layer.bare for layer in layers.values()} - tensors
    ends = {layer.end for layer in layers.values()} - tensors - channels
    ranks, moving = {len(layer.how.stride) + 2 for layer in layers.values()}, _moving(captured)
    relus: dict[str, bool] = {}
    bounds: dict[str, float] = {}
    for segment in _segments(captured, stops):
        if not any(node.name in layers for node in segment.nodes):
            continue
        if segment.start.meta["val"].dim() in ranks and segment.start.name in stops and ENTRY + segment.start.name not in tensors:
            channels.add(ENTRY + segment.start.name)
        sums = [node for node in segment.nodes if _sums(node, ranks, moving) and node.name not in tensors]
        channels |= {node.name for node in sums if not _rectified(node, tensors, stops)}
    positive: set[str] = set()
    for node in captured.operators:
        if node.name in tensors | channels | ends and _rectifies(node):
            positive.add(node.name)
            bound = _bound(node)
            if node.name in tensors:
                relus[node.name] = bound is not None
            if bound is not None:
                bounds[node.name] = bound
    return Layout(layers, frozenset(tensors), frozenset(channels), frozenset(ends), relus, bounds, frozenset(positive))


@dataclass(frozen=True)
class _Segment:
    start: fx.Node
    nodes: list[fx.Node]


def _segments(captured: Captured, stops: set[str]) -> list[_Segment]:
    """The stretches between cuts, in order, each with the node whose tensor enters it."""
    first = next(node for node in captured.graph.nodes if node.op == "placeholder" and node.name == captured.input)
    found = [_Segment(first, [])]
    for node in captured.operators:
        found[-1].nodes.append(node)
        if node.name in stops:
            found.append(_Segment(node, []))
    return found


def _sums(node: fx.Node, ranks: set[int], moving: set[str]) -> bool:
    """Whether it adds two tensors that depend on the input, not a number or a constant to one."""
    if getattr(node.target, "overloadpacket", None) not in _SUMS:
        return False
    return all(isinstance(source, fx.Node) and source.name in moving and source.meta["val"].dim() in ranks for source in node.args[:2])


def _rectified(node: fx.Node, tensors: set[str], stops: set[str]) -> bool:
    """Whether only a ReLU reads it, whose result lies on a grid."""
    reader = _only(node) if node.name not in stops else None
    return reader is not None and _rectifies(reader) and reader.name in tensors
