"""The manifest of a bundle: what was compiled, from what, and how it was checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from edgeadapt._version import __version__
from edgeadapt.bundle import GraphSpec, HyperSpec, InputSpec, Manifest, MethodInfo, ModelInfo, Part, StateSpec, StatisticsInfo, SumSpec, Task
from edgeadapt.bundle.choice import Choice
from edgeadapt.bundle.quantised import Quantised
from edgeadapt.exporters.compile import Compiled
from edgeadapt.exporters.ir import IR_VERSION, OPSET
from edgeadapt.exporters.lowering.registry import numpy_dtype
from edgeadapt.exporters.options import Options, batch_defaults
from edgeadapt.exporters.programs import Model
from edgeadapt.exporters.selfcheck import Difference
from edgeadapt.preprocess import PREPROCESSING, fingerprint


def describe(
    model: Model,
    compiled: Sequence[Compiled],
    options: Options,
    name: str,
    task: Task,
    spec: InputSpec,
    warmup: dict[str, Any] | None,
    differences: Sequence[Difference],
    left_out: Mapping[str, str],
    rounding: dict[str, Any] | None = None,
    quantisation: Quantised | None = None,
    choice: Choice | None = None,
) -> Manifest:
    """The manifest, all but the members' checksums.

    left_out: graphs that were tried and are not there, and why. rounding: what holding parameters in few bits costs, where it was measured.
    quantisation: what of the frozen model is computed in 8 bits. choice: how its numbers were chosen, where they were.
    """
    method, captured = model.method, model.method.backbone.captured
    adapted = sorted(set(options.batches))

    def defaults(names: Sequence[str], batch: int, role: str = "adapt") -> dict[str, float]:
        if not batch:
            return {}
        return batch_defaults(method, model.optimiser, options.rate, names, batch, model.tuned(role))

    hyper = {key: HyperSpec(found.default, found.low, found.high, found.help) for key, found in model.hyper().items()}
    for key, value in defaults(list(hyper), adapted[-1]).items():
        hyper[key] = dataclasses.replace(hyper[key], default=value)
    chosen = {**_shape(model, options), "optimiser": model.optimiser if method.trains else "", "exact_gradient": model.exact, "seed": options.seed}
    if model.anchored:
        chosen |= {"statistics": "anchored", "chance": "assumed" if model.reference is None else "measured"}
    if method.settings:
        chosen["settings"] = {key: method.setting(key) for key in method.settings}
    if options.tier is not None:
        chosen |= {"updates": options.updates, "trainable": sum(value.numel() for value in model.parameters.values())}
    return Manifest(
        producer=f"edgeadapt {__version__}",
        model=ModelInfo(name, sum(tensor.numel() for key, tensor in captured.tensors.items() if key in captured.parameters), ""),
        task=task,
        input=spec,
        method=MethodInfo(method.name, chosen, method.summary),
        partition=_parts(model),
        statistics=StatisticsInfo(model.statistics, tuple(sorted({key.rpartition(".")[0] for key in model.values}))),
        hyper=hyper,
        state=tuple(StateSpec(key, tuple(value.shape), kind, numpy_dtype(value.dtype).name) for key, (kind, value) in model.state().items()),
        sums=tuple(SumSpec(key, shape) for key, shape in {key: shape for item in compiled for key, shape in item.sums.items()}.items()),
        batches=tuple(sorted({1, *adapted})),
        graphs={item.name: _graph(item, defaults(item.hyper, item.program.batch, item.program.role)) for item in compiled},
        opset=OPSET,
        ir_version=IR_VERSION,
        warmup=warmup,
        quantisation=quantisation,
        choice=choice,
        reference=model.reference,
        searched=model.searched,
        selfcheck={**{item.graph: item.plain() for item in differences}, **{key: {"left_out": why} for key, why in left_out.items()}}
        | ({} if rounding is None else {"rounding": rounding})
        | {PREPROCESSING: fingerprint(spec)},
    )


def _shape(model: Model, options: Options) -> dict[str, Any]:
    """The choices that shaped the method, as they came to be; `parts_asked` where the model has no room for so many."""
    method, found = model.method, {}
    if "parts" in method.choices and method.partition is not None:
        found["parts"] = len(method.partition.cuts) - 1
        if options.parts is not None and options.parts != found["parts"]:
            found["parts_asked"] = options.parts
    if "train" in method.choices and method.parts:
        found["train"] = method.parts if options.train is None else options.train
    if "kernel" in method.choices:
        found["kernel"] = getattr(method, "kernel", options.kernel)
    if "width" in method.choices:
        found["width"] = options.width
    return found


def _graph(item: Compiled, defaults: dict[str, float]) -> GraphSpec:
    program = item.program
    return GraphSpec(
        path=f"graphs/{item.name}.onnx",
        role=program.role,
        batch=program.batch,
        hyper=tuple(item.hyper),
        reads=tuple(item.reads),
        writes=tuple(item.writes),
        metrics=tuple(item.metrics),
        nodes=len(item.graph.nodes),
        peak_bytes=item.peak,
        region_bytes=item.region,
        defaults=defaults,
        variant=item.variant,
        sums=tuple(item.sums),
    )


def _parts(model: Model) -> tuple[Part, ...]:
    method = model.method
    if method.partition is None:
        return ()
    cuts, backbone = method.partition.cuts, method.backbone
    captured = backbone.captured
    rows = []
    for index, cut in enumerate(cuts):
        owned = {captured.owner.get(source.name, "") for node in backbone.segments[index] for source in node.all_input_nodes}
        frozen = sum(captured.tensors[name].numel() for name in owned if name in captured.parameters)
        trainable = sum(model.parameters[name].numel() for name in method.owned(index, model.parameters))
        rows.append(Part(cut.name, cuts[index - 1].name if index else "input", cut.shape, frozen, trainable))
    return tuple(rows)
