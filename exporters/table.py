"""The export's closing table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from edgeadapt.bundle import StateSpec
from edgeadapt.bundle.checked import unchecked_lines
from edgeadapt.bundle.choice import read_choice
from edgeadapt.bundle.quantised import Quantised, read_quantised
from edgeadapt.bundle.reading import Node
from edgeadapt.bundle.searched import read_searched
from edgeadapt.bundle.updates import Updates, updates_of
from edgeadapt.exporters.selfcheck import Difference
from edgeadapt.units import format_bytes, format_shape

WORST = 3
"""Layers in 8 bits that are named in the table: those with the largest error."""


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
    updates, steps = _updates(manifest)
    trainable = 0 if updates is None else updates.parameters
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
    lines += [f"({line}, by as much as it moves)" for line in unchecked_lines(manifest["selfcheck"])]
    lines += [f"left out: {name}: {' '.join(reason.split())}" for name, reason in _left_out(manifest)]
    warmup = manifest["warmup"]
    if warmup:
        what = "clean accuracy" if warmup["labelled"] else "agreement with the frozen model"
        lines += [
            "",
            f"warm-up: {warmup['epochs']} epochs on {warmup['samples']:,} samples; {what} {100 * warmup['clean_accuracy_before']:.1f} % "
            f"before, {100 * warmup['clean_accuracy_after']:.1f} % after, on {warmup['held_out']:,} held-out samples",
        ]
    if manifest.get("quantisation"):
        lines += ["", *_codes(read_quantised(Node(manifest["quantisation"], "quantisation")))]
    if manifest.get("choice"):
        choice = read_choice(Node(manifest["choice"], "choice"))
        lines += ["", choice.title(), *columns(choice.table(), right=range(4, len(choice.table()[0]) - 1))]
    if manifest.get("searched"):
        searched = read_searched(Node(manifest["searched"], "searched"))
        lines += ["", searched.title(), *columns(searched.table(), right=range(1, len(searched.table()[0]) - 1))]
    if updates is not None:
        lines += ["", f"updates: {updates.tier}, {updates.bytes:.1f} bytes a parameter with its moments"]
        lines += _rounding(manifest, differences)
        lines += [_noise(step) for step in steps if any(spec.dtype == "int8" for spec in _state(manifest))]
    if size:
        lines += ["", f"bundle: {format_bytes(size)}; state on the device: {format_bytes(sum(spec.nbytes for spec in _state(manifest)))}"]
    return "\n".join(lines)


def _codes(found: Quantised) -> list[str]:
    """What is in 8 bits, and the layers that are not, or that are the furthest off."""
    worst = sorted((layer for layer in found.layers if layer.choice == "int8"), key=lambda layer: layer.decibels)[:WORST]
    rows = [("layer", "weights", "signal/error, dB", "computed in", "why")]
    rows += [(row.layer, f"{row.weights:,}", f"{row.decibels:.1f}", row.choice, row.why) for row in (*found.floating, *worst)]
    more = len(found.layers) - len(rows) + 1
    return [f"frozen model in {found.line()}", *columns(rows, right=(1, 2)), *([f"and {more} more, all better (edgeadapt inspect)"] if more else [])]


def _state(manifest: dict[str, Any]) -> list[StateSpec]:
    return [StateSpec(**{**entry, "shape": tuple(entry["shape"])}) for entry in manifest["state"]]


def _updates(manifest: dict[str, Any]) -> tuple[Updates | None, list[float]]:
    """How parameters are held, and how far steps without labels moved them in the self-check, the least first."""
    steps = [found["step"] for name, found in manifest["selfcheck"].items() if name.startswith("adapt.") and "step" in found]
    return updates_of(_state(manifest), manifest["method"]["options"]), sorted(steps)[:1]


def _rounding(manifest: dict[str, Any], differences: Sequence[Difference]) -> list[str]:
    lines = []
    if flips := [item.flips for item in differences if item.flips is not None]:
        further = max(item.updates or 0.0 for item in differences if item.flips is not None)
        rest = f"what is further off is {further:.0e} of an update" if further else "none further off"
        lines.append(f"(self-check: {100 * max(flips):.2g} % of the stored numbers rounded to the other side, by one step; {rest})")
    if cost := manifest["selfcheck"].get("rounding"):
        before, after = 100 * cost["accuracy_before"], 100 * cost["accuracy_after"]
        lines.append(f"rounding the parameters: {before:.1f} % right before, {after:.1f} % after, on {cost['held_out']:,} held-out samples")
    return lines


def _noise(step: float) -> str:
    needed = f"after about {1 / step:,.0f} steps of one direction" if step > 0 else "never"
    return (
        f"warning: tiny suits learning from labels. A step without labels moved a parameter by {step:.1g} of its 8-bit steps in the self-check,\n"
        f"so what it moves outgrows the chance in its rounding {needed}; compact rounds 256 times finer"
    )


def _left_out(manifest: dict[str, Any]) -> list[tuple[str, str]]:
    return [(name, found["left_out"]) for name, found in manifest["selfcheck"].items() if isinstance(found, dict) and "left_out" in found]


def _relative(value: float | None) -> str:
    return "" if value is None else f"{value:.0e}"
