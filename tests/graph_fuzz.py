"""ONNX graphs as somebody who means ill would write them; see bundle_fuzz."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import numpy as np
import onnx
from onnx import helper

HUGE = (0, -1, 1, 2, 2**31 - 1, 2**31, 2**33, 2**40, 2**62, 2**63 - 1, -(2**63))
INTS = (0, -1, 1, 2, 3, 7, 100, 2**16, 2**31 - 1, 2**31, 2**40, 2**63 - 1, -(2**31), -(2**63))
OPERATORS = sorted({schema.name for schema in onnx.defs.get_all_schemas() if schema.domain == ""})
_Change = Callable[[Random, onnx.ModelProto], str]


def _tensor(random: Random, model: onnx.ModelProto, outside: bool | None = None) -> onnx.TensorProto:
    found = [tensor for tensor in model.graph.initializer if outside is None or bool(tensor.external_data) == outside]
    return random.choice(found or [model.graph.initializer.add(name="more", data_type=1)])


def _node(random: Random, model: onnx.ModelProto) -> onnx.NodeProto:
    return random.choice(model.graph.node)


def _outside(random: Random, model: onnx.ModelProto) -> str:
    tensor = _tensor(random, model, True)
    key = random.choice(("location", "offset", "length", "more", "checksum"))
    places = ("/etc/passwd", "../x", "x.edgeadapt", "*/_ORT_MEM_ADDR_/*", "", "/dev/zero", "a" * 300)
    value = random.choice(
        places if key == "location" else ("0", "-1", "64", "4160", str(2**40), str(2**63), "9" * 14, "9" * 30, "1e3", "", " 1", "²")
    )
    entry = next((item for item in tensor.external_data if item.key == key), None) or tensor.external_data.add(key=key)
    entry.value = value
    return f"{key} of {tensor.name} is {value[:20]!r}"


def _dims(random: Random, model: onnx.ModelProto) -> str:
    tensor = _tensor(random, model)
    kind = random.choice(("one", "all", "many", "none", "grown"))
    if kind == "one" and tensor.dims:
        tensor.dims[random.randrange(len(tensor.dims))] = random.choice(HUGE)
    elif kind == "all":
        sizes = random.choice(([2**40] * 4, [2**31, 2**31, 4], [2**62, 4], [0, 2**62], [1] * 300, [2] * 70))
        del tensor.dims[:]
        tensor.dims.extend(sizes)
    elif kind == "many":
        tensor.dims.extend([1] * 100_000)
    elif kind == "none":
        del tensor.dims[:]
    else:
        tensor.dims.append(random.choice((2, 3, 2**31, 2**34)))
    return f"{kind} of the sizes of {tensor.name}"


def _data(random: Random, model: onnx.ModelProto) -> str:
    tensor = _tensor(random, model, False)
    kind = random.choice(("cut", "gone", "grown", "type", "floats", "ints", "strings", "both", "nan"))
    if kind == "cut":
        tensor.raw_data = tensor.raw_data[:-1]
    elif kind == "gone":
        tensor.ClearField("raw_data")
    elif kind == "grown":
        tensor.raw_data += bytes(random.choice((1, 4, 8, 10_000)))
    elif kind == "type":
        tensor.data_type = random.choice((*range(24), 99, -1, 2**31 - 1))
    elif kind == "nan":
        tensor.raw_data = np.full(len(tensor.raw_data) // 4, np.nan, np.float32).tobytes()
    else:
        if kind != "both":
            tensor.ClearField("raw_data")
        field: Any = {"floats": tensor.float_data, "ints": tensor.int64_data, "strings": tensor.string_data}.get(kind, tensor.int32_data)
        field.extend([b"x" if kind == "strings" else 1] * random.choice((1, 2, 3, 5000)))
        tensor.data_type = {"floats": 1, "ints": 7, "strings": 8}.get(kind, tensor.data_type)
    return f"{kind} of the data of {tensor.name}"


def _declared(random: Random, model: onnx.ModelProto) -> str:
    if not model.graph.value_info or random.random() < 0.2:
        model.graph.value_info.extend(
            [helper.make_tensor_value_info(random.choice([*_made(model), "x"]), random.choice((1, 7)), [random.choice(HUGE)])]
        )
    value = random.choice([*model.graph.input, *model.graph.output, *model.graph.value_info])
    tensor = value.type.tensor_type
    kind = random.choice(("size", "name", "type", "rank", "free", "none", "sequence"))
    if kind == "size" and tensor.shape.dim:
        random.choice(tensor.shape.dim).dim_value = random.choice(HUGE)
    elif kind == "name" and tensor.shape.dim:
        random.choice(tensor.shape.dim).dim_param = random.choice(("N", "", "x" * 9000))
    elif kind == "type":
        tensor.elem_type = random.choice((0, 2, 7, 8, 9, 16, 23, 99, 2**31 - 1))
    elif kind == "rank":
        for _ in range(random.choice((1, 8, 5000))):
            tensor.shape.dim.add(dim_value=random.choice((1, 2)))
    elif kind == "free":
        tensor.ClearField("shape")
    elif kind == "none":
        value.ClearField("type")
    else:
        value.type.sequence_type.elem_type.tensor_type.elem_type = 1
    return f"{kind} of {value.name}"


def _made(model: onnx.ModelProto) -> list[str]:
    return [name for node in model.graph.node for name in node.output]


def _wiring(random: Random, model: onnx.ModelProto) -> str:
    node, other = _node(random, model), _node(random, model)
    kind = random.choice(("loop", "self", "unknown", "input", "empty", "clash", "order", "more", "twice", "none", "many"))
    names = [*_made(model), *(value.name for value in model.graph.input), *(tensor.name for tensor in model.graph.initializer)]
    if kind == "loop" and node.input:
        node.input[random.randrange(len(node.input))] = model.graph.node[-1].output[0]
    elif kind == "self" and node.input:
        node.input[0] = node.output[0]
    elif kind == "unknown" and node.input:
        node.input[0] = random.choice(("nowhere", "x" * 9000, "\u202e", "a\0b"))
    elif kind == "input" and node.input:
        node.input[random.randrange(len(node.input))] = random.choice(names)
    elif kind == "empty":
        (node.input if random.random() < 0.5 and node.input else node.output)[0] = ""
    elif kind == "clash":
        node.output[0] = random.choice(names)
    elif kind == "order":
        at, to = sorted(random.sample(range(len(model.graph.node)), 2)) if len(model.graph.node) > 1 else (0, 0)
        kept = onnx.NodeProto()
        kept.CopyFrom(model.graph.node[at])
        model.graph.node[at].CopyFrom(model.graph.node[to])
        model.graph.node[to].CopyFrom(kept)
    elif kind == "more":
        node.input.extend([random.choice(names)] * random.choice((1, 3, 2000)))
    elif kind == "twice":
        model.graph.node.add().CopyFrom(other)
    elif kind == "none":
        del node.input[:]
    else:
        node.output.extend([f"o{index}" for index in range(random.choice((1, 3, 2000)))])
    return f"{kind} of {node.op_type}"


def _operator(random: Random, model: onnx.ModelProto) -> str:
    node, kind = _node(random, model), random.choice(("other", "other", "other", "domain", "unknown", "gone"))
    was = node.op_type
    if kind == "other":
        node.op_type = random.choice(OPERATORS)
        if random.random() < 0.5:
            del node.attribute[:]
        if random.random() < 0.5:
            _attribute(random, model, node)
    elif kind == "domain":
        node.domain = random.choice(("ai.onnx", "com.microsoft", "ai.onnx.ml", "evil", "x" * 9000, "com.microsoft.nchwc"))
    elif kind == "unknown":
        node.op_type = random.choice(("Evil", "", "x" * 9000, "Conv\0"))
    else:
        model.graph.node.remove(node)
    return f"{kind}, {was} to {node.op_type[:30]}"


NAMES = {
    "Conv": ("strides", "dilations", "pads", "group", "kernel_shape", "auto_pad"),
    "Softmax": ("axis",),
    "Transpose": ("perm",),
    "Cast": ("to",),
    "ReduceMean": ("keepdims", "axes", "noop_with_empty_axes"),
}
LISTS = (
    [0, 0],
    [-1, -1],
    [2**31, 2**31],
    [2**62, 2**62],
    [2**63 - 1] * 2,
    [],
    [1],
    [1] * 4,
    [0] * 4,
    [2**40] * 4,
    [-(2**62)] * 4,
    [1] * 9000,
    [0, 0, 0, 0, 0, 0],
)


def _attribute(random: Random, model: onnx.ModelProto, node: onnx.NodeProto | None = None) -> str:
    node = node or _node(random, model)
    schema: Any = onnx.defs.get_schema(node.op_type, 20) if node.op_type in OPERATORS and onnx.defs.has(node.op_type, 20, "") else None
    known = [*NAMES.get(node.op_type, ()), *(item.name for item in node.attribute), *([] if schema is None else schema.attributes)]
    name = random.choice([*known, random.choice(("axis", "blocksize", "group", "num_outputs", "more", ""))])
    for item in [item for item in node.attribute if item.name == name and random.random() < 0.9]:
        node.attribute.remove(item)
    kind = random.choice(("int", "int", "ints", "ints", "float", "text", "texts", "tensor", "graph", "none", "large", "typeless"))
    if kind == "graph":
        value: Any = helper.make_graph([], "g", [], [])
    elif kind == "tensor":
        value = helper.make_tensor("v", 7, [2], [random.choice(HUGE), 2])
    else:
        many = {
            "float": random.choice((0.0, -1.0, float("nan"), float("inf"), 1e30)),
            "text": random.choice((b"", b"SAME_UPPER", b"\xff", b"x" * 10**6)),
        }
        many |= {"int": random.choice(INTS), "ints": random.choice(LISTS), "texts": [b"a", b"b"], "large": [7] * 300_000}
        value = many.get(kind)
    if value is not None:
        node.attribute.append(helper.make_attribute(name or "a", value if value != [] else [1]))
        if value == []:
            del node.attribute[-1].ints[:]
    if kind == "typeless":
        node.attribute.add(name=name, i=3)
    return f"{kind} {name} of {node.op_type} is {str(value)[:30] if kind != 'graph' else 'a graph'}"


def _nest(random: Random, model: onnx.ModelProto) -> str:
    """Subgraphs in subgraphs, such as never end, or hold what must not be."""
    kind, depth = random.choice(("If", "Loop", "Loop", "Scan", "endless", "wide")), random.choice((1, 3, 15, 16, 17, 60))
    value = helper.make_tensor_value_info
    nodes, constants = [], [helper.make_tensor("yes", 9, [], [True]), helper.make_tensor("most", 7, [], [2**62])]
    if kind in ("If", "wide"):
        graph = helper.make_graph([helper.make_node("Constant", [], ["o"], value_float=1.0)], "leaf", [], [value("o", 1, [])])
        for index in range(depth):
            other = graph if kind == "wide" and index < 9 else helper.make_graph([], "none", [], [value("yes", 9, [])])
            node = helper.make_node("If", ["yes"], [f"o{index}"], then_branch=graph, else_branch=other)
            graph = helper.make_graph([node], f"g{index}", [], [value(f"o{index}", 1, [])])
        nodes = list(graph.node)
    else:
        inside = [helper.make_node("Identity", ["go"], ["on"]), helper.make_node("Identity", ["held"], ["kept"])]
        body = helper.make_graph(
            inside, "body", [value("turn", 7, []), value("go", 9, []), value("held", 1, [])], [value("on", 9, []), value("kept", 1, [])]
        )
        if kind == "Scan":
            body = helper.make_graph(inside[1:], "body", [value("held", 1, [])], [value("kept", 1, [])])
            nodes = [helper.make_node("Scan", [model.graph.input[0].name], ["left"], body=body, num_scan_inputs=random.choice((0, 1, 2**40)))]
        else:
            most = "" if kind == "endless" else "most"
            nodes = [
                helper.make_node("Constant", [], ["begin"], value_float=1.0),
                helper.make_node("Loop", [most, "yes", "begin"], ["left"], body=body),
            ]
    model.graph.initializer.extend(constants)
    kept = [*nodes, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(kept)
    return f"{kind}, {depth} deep"


def _large(random: Random, model: onnx.ModelProto) -> str:
    """What has to be allocated grows far beyond what the file holds."""
    kind = random.choice(
        ("ConstantOfShape", "Expand", "Tile", "Range", "Pad", "OneHot", "MatMul", "Resize", "chain", "nodes", "doc", "metadata", "initialisers")
    )
    size = random.choice((2**20, 2**28, 2**31, 2**33, 2**40, 2**62))
    add, node = model.graph.initializer.append, helper.make_node
    nodes: list[onnx.NodeProto] = []
    add(helper.make_tensor("f.one", 1, [1], [1.0]))
    add(helper.make_tensor("f.sizes", 7, [2], [size, random.choice((1, 2, 2**20))]))
    add(helper.make_tensor("f.size", 7, [1], [size]))
    add(helper.make_tensor("f.none", 7, [], [0]))
    add(helper.make_tensor("f.step", 7, [], [1]))
    add(helper.make_tensor("f.limit", 7, [], [size]))
    if kind in ("ConstantOfShape", "MatMul"):
        nodes = [node("ConstantOfShape", ["f.sizes"], ["f.o"])]
        nodes += [node("Transpose", ["f.o"], ["f.t"]), node("MatMul", ["f.o", "f.t"], ["f.p"])] if kind == "MatMul" else []
    elif kind == "Expand":
        nodes = [node("Expand", ["f.one", "f.sizes"], ["f.o"])]
    elif kind == "Tile":
        nodes = [node("Tile", ["f.one", "f.size"], ["f.o"])]
    elif kind == "Range":
        nodes = [node("Range", ["f.none", "f.limit", "f.step"], ["f.o"])]
    elif kind == "Pad":
        nodes = [node("Pad", ["f.one", "f.sizes"], ["f.o"])]
    elif kind == "OneHot":
        add(helper.make_tensor("f.values", 1, [2], [0.0, 1.0]))
        nodes = [node("OneHot", ["f.size", "f.limit", "f.values"], ["f.o"])]
    elif kind == "Resize":
        add(helper.make_tensor("f.scale", 1, [4], [1.0, 1.0, random.choice((1e9, float("inf"), float("nan"), -1.0)), 1e4]))
        nodes = [node("Resize", ["x", "", "f.scale"], ["f.o"], mode="nearest")]
    elif kind == "chain":
        nodes = [
            node("Concat", [f"f.o{index - 1}" if index else "f.one"] * 2, [f"f.o{index}"], axis=0) for index in range(random.choice((20, 31, 40)))
        ]
    elif kind == "nodes":
        nodes = [node("Identity", [f"f.o{index - 1}" if index else "f.one"], [f"f.o{index}"]) for index in range(random.choice((200, 3000)))]
    elif kind == "doc":
        model.graph.doc_string = "x" * 2**22
    elif kind == "metadata":
        for index in range(20_000):
            model.metadata_props.add(key=str(index), value="")
    else:
        for index in range(10_000):
            add(onnx.TensorProto(name=f"f.{index}", data_type=1, dims=[1], raw_data=bytes(4)))
    kept = [*nodes, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(kept)
    return f"{kind} of {size}"


def _names(random: Random, model: onnx.ModelProto) -> str:
    kind = random.choice(("outputs", "initialisers", "inputs", "gone", "none", "initialised", "long"))
    graph = model.graph
    if kind == "outputs":
        graph.output.add().CopyFrom(random.choice(graph.output))
    elif kind == "initialisers":
        graph.initializer.add().CopyFrom(_tensor(random, model))
    elif kind == "inputs":
        random.choice(graph.input).name = random.choice([*_made(model), "other", "state.norm.mean", "x"])
    elif kind == "gone":
        random.choice((graph.input, graph.output)).pop()
    elif kind == "none":
        del random.choice((graph.input, graph.output, graph.node, graph.initializer))[:]
    elif kind == "initialised":
        graph.initializer.append(helper.make_tensor(random.choice(graph.input).name, 1, [1], [0.0]))
    else:
        random.choice(graph.output).name = "x" * 100_000
    return f"names: {kind}"


def _model(random: Random, model: onnx.ModelProto) -> str:
    kind = random.choice(("opset", "ir", "imports", "twice", "function", "training", "quantisation", "no graph", "sparse"))
    if kind == "opset":
        model.opset_import[0].version = random.choice((0, -1, 1, 5, 7, 11, 13, 18, 99, 2**31, 2**62))
    elif kind == "ir":
        model.ir_version = random.choice((0, -1, 1, 3, 4, 99, 2**40))
    elif kind == "imports":
        del model.opset_import[:]
    elif kind == "twice":
        model.opset_import.add(domain=random.choice(("", "ai.onnx", "com.microsoft", "evil")), version=random.choice((1, 20, 2**40)))
    elif kind == "function":
        model.functions.add(name="f", domain="")
    elif kind == "training":
        model.training_info.add()
    elif kind == "quantisation":
        model.graph.quantization_annotation.add(tensor_name="x").quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="nowhere")
    elif kind == "sparse":
        tensor = helper.make_tensor("v", 1, [1], [1.0])
        model.graph.sparse_initializer.append(helper.make_sparse_tensor(tensor, helper.make_tensor("i", 7, [1], [2**40]), [2**62]))
    else:
        model.ClearField("graph")
    return kind


CHANGES: tuple[_Change, ...] = (
    _outside,
    _dims,
    _data,
    _declared,
    _wiring,
    _wiring,
    _operator,
    _operator,
    _attribute,
    _attribute,
    _nest,
    _large,
    _names,
    _model,
)


def mutated(random: Random, data: bytes) -> tuple[bytes, str]:
    """A serialised model that was changed, and how."""
    model, notes = onnx.load_from_string(data), []
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        change = random.choice(CHANGES)
        try:
            notes.append(f"{change.__name__[1:]}: {change(random, model)}")
        except Exception as reason:  # nothing is left to change so, or protobuf itself refuses it
            notes.append(f"{change.__name__[1:]} not: {str(reason)[:60]}")
    found = model.SerializeToString()
    if random.random() < 0.15:
        whole = bytearray(found)
        for _ in range(random.randint(1, 6)):
            whole[random.randrange(len(whole))] ^= 1 << random.randrange(8)
        return bytes(whole), ", ".join([*notes, "flips"])
    return found, ", ".join(notes)
