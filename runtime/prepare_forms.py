"""Other forms of a graph's convolutions that onnxruntime is given to optimise, beside the exported one.

Blocked convolutions are faster and need a copy of their weight in another layout. A backward pass takes gradients through frozen convolutions by
`ConvTranspose`, which has no blocked kernel; with stride 1 it is a convolution with the weight turned round, which has. Preparing only: imports onnx.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from edgeadapt.bundle import Bundle
from edgeadapt.bundle.onnxwire import External
from edgeadapt.memory import Graph, read

LIGHT = 8192
"""Places (of the output, over all images) from which on the form "light" blocks a convolution: the time that is gained for each byte of its weight
goes by them. WideResNet-40-2 at batch 64: two thirds of its convolutions, a fifth of their weights."""


@dataclass
class Formed:
    """A graph to optimise.

    Attributes:
        data: as ONNX.
        held: initialisers that are inputs there, so that they are left as they are; by name, to be put back.
    """

    data: bytes
    held: dict[str, Any] = field(default_factory=dict)


def formed(bundle: Bundle, name: str, level: str) -> Formed:
    """A graph of the bundle in the form that a level begins with.

    Args:
        bundle: the bundle.
        name: the graph.
        level: "turned": every ConvTranspose that can be is a Conv with its weight turned round; "light": those with many places, and no others are
            blocked. Else the graph as it is.
    """
    data = bundle.graph_bytes(name)
    if level not in ("turned", "light"):
        return Formed(data)
    model, graph = onnx.load_from_string(data), read(data)
    least = LIGHT if level == "light" else 0
    stored, places = bundle.mapped(), {item.name: item for item in bundle.graph(name).external}
    for node in model.graph.node:
        if node.op_type == "ConvTranspose" and node.input[1] in places and _places(graph, node) >= least:
            _turn(model, node, places[node.input[1]], stored)
    if level != "light":
        return Formed(model.SerializeToString())
    small = {node.input[1] for node in model.graph.node if node.op_type == "Conv" and node.input[1] in places and _places(graph, node) < least}
    held = {tensor.name: tensor for tensor in model.graph.initializer if tensor.name in small}
    kept = [tensor for tensor in model.graph.initializer if tensor.name not in held]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    model.graph.input.extend(helper.make_tensor_value_info(key, tensor.data_type, list(tensor.dims)) for key, tensor in held.items())
    return Formed(model.SerializeToString(), held)


def restored(model: onnx.ModelProto, held: dict[str, Any]) -> None:
    """Makes what was held initialisers again."""
    inputs = [value for value in model.graph.input if value.name not in held]
    del model.graph.input[:]
    model.graph.input.extend(inputs)
    model.graph.initializer.extend(held.values())


def _places(graph: Graph, node: Any) -> int:
    shape = graph.values[node.output[0]].shape
    return shape[0] * math.prod(shape[2:])


def _turn(model: onnx.ModelProto, node: Any, weight: External, stored: memoryview) -> None:
    """Makes a ConvTranspose of stride 1 a Conv, where its paddings allow that."""
    given = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    kernel = list(weight.shape[2:])
    plain = all(set(given.get(key, [1])) == {1} for key in ("strides", "dilations")) and not any(given.get("output_padding", [0]))
    pads = given.get("pads", [0] * 2 * len(kernel))
    turned = [size - 1 - pad for size, pad in zip(kernel * 2, pads)]
    if given.get("group", 1) != 1 or not plain or min(turned) < 0 or given.get("auto_pad", b"NOTSET") != b"NOTSET" or "output_shape" in given:
        return
    name = f"{weight.name}.turned"
    if all(tensor.name != name for tensor in model.graph.initializer):
        array = np.frombuffer(stored[weight.offset : weight.offset + weight.length], "<f4").reshape(weight.shape)
        flipped = np.flip(array, tuple(range(2, array.ndim))).swapaxes(0, 1)
        model.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(flipped), name))
    node.op_type = "Conv"
    node.input[1] = name
    del node.attribute[:]
    ones = [1] * len(kernel)
    attributes = {"kernel_shape": kernel, "pads": turned, "strides": ones, "dilations": ones, "group": 1}
    node.attribute.extend(helper.make_attribute(key, value) for key, value in attributes.items())
