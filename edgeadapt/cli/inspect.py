"""What a bundle holds: model, input, method, state, graphs and their memory, checks, sizes.

  edgeadapt inspect model.edgeadapt
  edgeadapt inspect model.edgeadapt --json | jq .graphs

Every byte is read and checked first. Nothing is run, and neither onnxruntime nor torch is loaded.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgeadapt.bundle import Bundle

NAME, HELP = "inspect", "show what a bundle holds"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("bundle", metavar="X.edgeadapt", help="the bundle")
    parser.add_argument("--json", action="store_true", help="print the manifest, the digest and the sizes as JSON")
    parser.add_argument("--no-verify", action="store_true", help="do not read and check every byte first")


def run(arguments: argparse.Namespace) -> int:
    """Prints the summary."""
    from edgeadapt.bundle import Bundle

    bundle = Bundle.open(arguments.bundle, verify=not arguments.no_verify)
    if arguments.json:
        json.dump(as_json(bundle), sys.stdout, indent=1)
        print()
    else:
        print(summary(bundle))
    return 0


def as_json(bundle: Bundle) -> dict[str, Any]:
    """The manifest, with `digest`, `file_bytes` and `path` besides."""
    return {"path": str(bundle.path), "digest": bundle.digest, "file_bytes": bundle.path.stat().st_size, **bundle.manifest.to_json()}


def summary(bundle: Bundle) -> str:
    """The bundle in words and tables."""
    from edgeadapt.bundle.checked import unchecked_lines
    from edgeadapt.bundle.updates import updates_of
    from edgeadapt.units import format_bytes, format_shape

    manifest = bundle.manifest
    sizes = {name: member.size for name, member in manifest.members.items()}
    task, model, method, statistics = manifest.task, manifest.model, manifest.method, manifest.statistics
    options = ", ".join(f"{key}={_value(value)}" for key, value in method.options.items())
    followed = {"live": "follow the stream", "source": "stay as in training", "none": "the model has none"}[statistics.mode]
    facts = [
        ("bundle", f"{bundle.path.name}, {format_bytes(bundle.path.stat().st_size)}, format {manifest.format}, by {manifest.producer}"),
        ("digest", bundle.digest),
        ("model", f"{model.name}, {model.parameters:,} parameters"),
        ("task", f"{task.kind}, {task.classes} classes{_some(task.names)}"),
        ("input", f"float32 {format_shape(manifest.input.shape)}; {_pictures(manifest.input)}"),
        ("method", f"{method.name}: {method.summary}{f' ({options})' if options else ''}"),
        ("statistics", f"{statistics.mode}: {followed}{f' (layers: {len(statistics.layers)})' if statistics.layers else ''}"),
        ("batches", ", ".join(map(str, manifest.batches))),
        ("onnx", f"opset {manifest.opset}, IR version {manifest.ir_version}"),
    ]
    if found := updates_of(manifest.state, method.options):
        facts.insert(7, ("updates", f"{found.tier}: {found.bytes:.1f} bytes a parameter with its moments, {found.parameters:,} parameters"))
    if manifest.quantisation is not None:
        facts.insert(6, ("backbone", manifest.quantisation.line()))
    parts = ["\n".join(f"{name:<11} {value}" for name, value in facts)]
    if manifest.partition:
        rows = [
            (part.name, part.from_, format_shape(part.shape), f"{part.parameters:,}", f"{part.trainable:,}" if part.trainable else "–")
            for part in manifest.partition
        ]
        parts.append(_titled("partition", table(("part ends at", "begins at", "output", "frozen", "trainable"), rows, left=2)))
    if manifest.hyper:
        hyper = [(name, _value(spec.default), f"{spec.low:g} to {spec.high:.3g}", spec.help) for name, spec in manifest.hyper.items()]
        text = table(("name", "default", "range", "what it is"), hyper, left=1, words=True)
        parts.append(_titled("scalars that may be changed on the device", text))
    if manifest.quantisation is not None:
        layers = [(row.layer, f"{row.weights:,}", f"{row.decibels:.1f}", row.choice, row.why) for row in manifest.quantisation.layers]
        text = table(("layer", "weights", "signal/error, dB", "computed in", "why"), layers, left=1, words=True)
        parts.append(_titled("the frozen model in 8 bits", text))
    if manifest.choice is not None:
        header, *tried = manifest.choice.table()
        parts.append(_titled(manifest.choice.title(), table(header, tried, left=4, words=True)))
    if manifest.searched is not None:
        header, *tried = manifest.searched.table()
        parts.append(_titled(manifest.searched.title(), table(header, tried, left=1, words=True)))
    parts.append(_titled("state", _state(manifest.state)))
    graphs = []
    for name, graph in manifest.graphs.items():
        size = format_bytes(sizes.get(graph.path, 0))
        graphs.append((name, graph.role, str(graph.batch or ""), str(graph.nodes), format_bytes(graph.peak_bytes), size, _own(graph)))
    parts.append(_titled("graphs", table(("graph", "role", "batch", "nodes", "peak", "file", "own defaults"), graphs, left=2, words=True)))
    for title, values in (("warm-up", manifest.warmup), ("self-check", manifest.selfcheck), ("source", manifest.source)):
        if values:
            told = [f"  {name:<40} {value}" for name, value in flat(values)]
            told += [f"  {line}" for line in (unchecked_lines(values) if title == "self-check" else ())]
            parts.append(_titled(title, "\n".join(told)))
    members = [(name, format_bytes(size), f"{size:,}") for name, size in sizes.items() if not name.startswith("graphs/")]
    members.append((f"graphs/ ({len(graphs)})", *_both(sum(size for name, size in sizes.items() if name.startswith("graphs/")))))
    parts.append(_titled("members", table(("member", "size", "bytes"), members, left=1)))
    return "\n\n".join(parts)


def table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int, words: bool = False) -> str:
    """Columns under a header, the first `left` of them (with `words` the last one too) aligned to the left, the others to the right."""
    widths = [max(len(row[index]) for row in (header, *rows)) for index in range(len(header))]
    leftish = {*range(left), *([len(header) - 1] if words else [])}
    lines = []
    for row in (header, *rows):
        cells = [cell.ljust(width) if index in leftish else cell.rjust(width) for index, (cell, width) in enumerate(zip(row, widths))]
        lines.append("  " + "  ".join(cells).rstrip())
    return "\n".join(lines)


def flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested JSON as (dotted name, value) rows; long lists are told by their length."""
    rows = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            rows += flat(value, f"{prefix}{name}.")
        elif isinstance(value, list) and (len(value) > 12 or any(isinstance(item, (dict, list)) for item in value)):
            rows.append((f"{prefix}{name}", f"{len(value)} values"))
        else:
            rows.append((f"{prefix}{name}", _value(value)))
    return rows


def _value(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, float):
        return f"{value:.6g}"
    return " ".join(_value(item) for item in value) if isinstance(value, list) else str(value)


def _some(names: Sequence[str] | None) -> str:
    if not names:
        return ""
    return f" ({', '.join(names[:6])}{', …' if len(names) > 6 else ''})"


def _pictures(spec: Any) -> str:
    scaling = [f"{word} {_value(list(values))}" for word, values in (("less", spec.mean), ("over", spec.std)) if values is not None]
    if len(spec.shape) != 3 or spec.raw:
        steps = ["as the sensor gives it", *scaling] if spec.raw else ["taken as it is"]
        return ", ".join(steps) + ("" if spec.hop is None else f"; of single samples a window every {spec.hop}")
    size = f"{spec.shape[1]} x {spec.shape[2]}"
    covers = "as small as covers " if spec.fit == "cover" else ""
    steps = [f"resized to {covers}{spec.resize[0]} x {spec.resize[1]}"] if spec.resize else [] if spec.crop else [f"of {size}"]
    steps += [f"cut to {size}"] if spec.crop else []
    steps += ["divided by 255", *(["blue first"] if spec.order == "bgr" else []), *scaling]
    return f"pictures: {', '.join(steps)}"


def _state(specs: Sequence[Any]) -> str:
    kinds: dict[str, list[int]] = {}
    for spec in specs:
        kinds.setdefault(spec.kind, []).append(spec.nbytes)
    rows = [(f"{kind}s", str(len(found)), *_both(sum(found))) for kind, found in kinds.items()]
    rows.append(("all", str(len(specs)), *_both(sum(map(sum, kinds.values())))))
    return table(("kind", "tensors", "size", "bytes"), rows, left=1)


def _both(size: int) -> tuple[str, str]:
    from edgeadapt.units import format_bytes

    return format_bytes(size), f"{size:,}"


def _own(graph: Any) -> str:
    return ", ".join(f"{name} {_value(value)}" for name, value in getattr(graph, "defaults", {}).items())


def _titled(title: str, body: str) -> str:
    return f"{title}\n{body}"
