"""The export's closing table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from edgeadapt.exporters.selfcheck import Difference
from edgeadapt.units import format_bytes, format_shape


def columns(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> list[str]:
    """Rows as aligned text; `right` are the columns aligned to the right."""
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    return [
        "  ".join(cell.rjust(width) if k in right else cell.ljust(width) for k, (cell, width) in enumerate(zip(row, widths, strict=True))).rstrip()
        for row in rows
    ]


def table(manifest: dict[str, Any], differences: Sequence[Difference], size: int) -> str:
    """What was cut where, parameters, bytes, the self-check, and what was left out for it."""
    lines = []
    method, model = manifest["method"], manifest["model"]
    trainable = sum(_count(entry["shape"]) for entry in manifest["state"] if entry["kind"] == "parameter")
    lines.append(f"{model['name']}: {model['parameters']:,} parameters, {method['name']} ({method['summary']}), {trainable:,} trainable")
    if manifest["partition"]:
        rows = [("part", "from", "to", "output", "frozen", "trainable")]
        rows += [
            (str(k), part["from"], part["name"], format_shape(part["shape"]), f"{part['parameters']:,}", f"{part['trainable']:,}")
            for k, part in enumerate(manifest["partition"])
        ]
        lines += ["", *columns(rows, right=(4, 5))]
    if "parts_asked" in method["options"]:
        lines.append(f"asked for {method['options']['parts_asked']} parts, the model has room for {method['options']['parts']}")
    by_graph = {item.graph: item for item in differences}
    rows = [("graph", "nodes", "live peak", "logits", "updates", "statistics")]
    for name, graph in manifest["graphs"].items():
        found = by_graph[name]
        rows.append(
            (name, str(graph["nodes"]), format_bytes(graph["peak_bytes"]), *(_relative(v) for v in (found.logits, found.updates, found.statistics)))
        )
    lines += ["", *columns(rows, right=(1, 2, 3, 4, 5)), "(self-check: largest relative difference from PyTorch)"]
    lines += [f"left out: {name}: {' '.join(reason.split())}" for name, reason in _left_out(manifest)]
    warmup = manifest["warmup"]
    if warmup:
        what = "clean accuracy" if warmup["labelled"] else "agreement with the frozen model"
        lines += [
            "",
            f"warm-up: {warmup['epochs']} epochs on {warmup['samples']:,} samples; {what} {100 * warmup['clean_accuracy_before']:.1f} % "
            f"before, {100 * warmup['clean_accuracy_after']:.1f} % after, on {warmup['held_out']:,} held-out samples",
        ]
    if size:
        lines += [
            "",
            f"bundle: {format_bytes(size)}; state on the device: {format_bytes(sum(4 * _count(entry['shape']) for entry in manifest['state']))}",
        ]
    return "\n".join(lines)


def _left_out(manifest: dict[str, Any]) -> list[tuple[str, str]]:
    return [(name, found["left_out"]) for name, found in manifest["selfcheck"].items() if "left_out" in found]


def _count(shape: Sequence[int]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def _relative(value: float | None) -> str:
    return "" if value is None else f"{value:.0e}"
