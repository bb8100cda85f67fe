"""Large products that are only read in stretches of their rows are made so.

A weight's gradient is one: an update takes a stretch of it at a time, and beside the stretches the whole need not exist.
"""

from __future__ import annotations

from edgeadapt.exporters.ir import Graph, Node, Value

LARGE = 2**20
"""Bytes of a product from which on it is cut."""

_Cut = tuple[Node, int, int]
"""A node that cuts, and the rows of the product that it begins and ends at."""


def cut_products(graph: Graph) -> bool:
    """Stretches of a product's rows are products of the stretches of its first factor."""
    readers = graph.readers()
    cuts: dict[int, tuple[Node, int, int]] = {}  # by the node that cuts: the product and its rows
    for node in graph.nodes:
        if node.op == "MatMul":
            for cut, begin, end in _cuts(graph, node, readers):
                cuts[id(cut)] = node, begin, end

    def replaced(node: Node) -> list[Node] | None:
        return None if id(node) not in cuts else _stretch(graph, node, *cuts[id(node)])

    return graph.rewrite(replaced)


def _cuts(graph: Graph, product: Node, readers: dict[str, list[int]]) -> list[_Cut]:
    """All that reads a product, if it cuts whole rows out of views of it; nothing else does."""
    out, (left, right) = graph.values[product.outputs[0]], (graph.values[name] for name in product.inputs)
    if out.nbytes < LARGE or out.name in graph.outputs or not len(left.shape) == len(right.shape) == len(out.shape):
        return []
    if any(size != 1 for size in out.shape[:-2]):
        return []
    found: list[_Cut] = []
    for view in (graph.nodes[index] for index in readers.get(out.name, ())):
        if view.op != "Reshape" or view.outputs[0] in graph.outputs or view.inputs[0] != out.name:
            return []
        for node in (graph.nodes[index] for index in readers.get(view.outputs[0], ())):
            bounds = _rows(graph, node, graph.values[view.outputs[0]], out.shape[-1])
            if bounds is None or node.outputs[0] in graph.outputs:
                return []
            found.append((node, *bounds))
    return found


def _rows(graph: Graph, node: Node, view: Value, width: int) -> tuple[int, int] | None:
    """The rows, of so many columns, that a node cuts out of a view along its first axis; None if it does not, or not whole ones."""
    given = [graph.constants.get(name) for name in node.inputs[1:]]
    if node.op != "Slice" or len(given) < 3 or any(item is None or item.size != 1 for item in given):
        return None
    begin, end, axis, *step = (int(item.reshape(-1)[0]) for item in given if item is not None)
    if axis != 0 or any(one != 1 for one in step) or not 0 <= begin < end <= view.shape[0]:
        return None
    size = view.nbytes // view.dtype.itemsize // view.shape[0]
    return None if begin * size % width or end * size % width else (begin * size // width, end * size // width)


def _stretch(graph: Graph, node: Node, product: Node, begin: int, end: int) -> list[Node]:
    left, out = graph.values[product.inputs[0]], graph.values[node.outputs[0]]
    axis, stem = len(left.shape) - 2, [*left.shape[:-2], end - begin]
    part = graph.declare(graph.fresh("slice"), (*stem, left.shape[-1]), left.dtype)
    made = graph.declare(graph.fresh("matmul"), (*stem, graph.values[product.outputs[0]].shape[-1]), out.dtype)
    bounds = [graph.ints([number]).name for number in (begin, end, axis)]
    nodes = [
        Node("Slice", [left.name, *bounds], [part.name], {}, product.module),
        Node("MatMul", [part.name, product.inputs[1]], [made.name], dict(product.attributes), product.module),
        Node("Reshape", [made.name, graph.ints(out.shape).name], [out.name], {}, product.module),
    ]
    return [graph.stands_for(node, item) for item in nodes[:2]] + nodes[2:]
