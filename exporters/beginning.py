"""A method over a model as the options have it: before anything is trained, and what of it is left to train on the device afterwards."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

from edgeadapt.errors import UsageError
from edgeadapt.exporters.capture import Captured
from edgeadapt.exporters.methods import Method
from edgeadapt.exporters.options import ANCHORED, WITHOUT_LAYERS, Options
from edgeadapt.exporters.programs import Model, held, last_parts

SHIFTED = 1000.0
"""Where a channel's mean² over its variance is above this on source data, the variance is computed around the source mean."""


def fitting(options: Options, given: Collection[str], captured: Captured) -> Options:
    """The options for a model where no method was named: those for models without normalisation to train, where it has none.

    given: names of those that the user gave.

    Raises:
        UsageError: the method that is taken then has no use for one of them.
    """
    if captured.affines:
        return options
    statistics = options.statistics if "statistics" in given else None
    found = dataclasses.replace(options, method=WITHOUT_LAYERS, statistics=statistics)
    found.check_use(given)
    return found


def mode_of(options: Options, method: Method) -> str:
    """What normalisation statistics do: "live", "source", or "none" where there are none."""
    if not {**method.backbone.source_statistics(), **method.own_statistics()}:
        return "none"
    asked = options.statistics or method.statistics
    return "live" if asked == ANCHORED else asked


def started(options: Options, method: Method) -> Model:
    """The method before anything is trained."""
    source = method.backbone.source_statistics()
    shifted = frozenset(
        name.removesuffix(".mean")
        for name, mean in source.items()
        if name.endswith(".mean") and float((mean**2 / (source[name.removesuffix(".mean") + ".variance"] + 1e-5)).max()) > SHIFTED
    )
    values, optimiser = {**source, **method.own_statistics()}, options.optimiser or method.optimiser
    mode = mode_of(options, method)
    anchored = mode == "live" and (options.statistics or method.statistics) == ANCHORED
    return Model(
        method, method.parameters(), values, mode, optimiser, options.exact, shifted, small=options.saves_codes, anchored=anchored
    )


def left_to_train(options: Options, model: Model) -> Model:
    """The model with what is not to be trained on the device fixed; parameters are held as the options say.

    Raises:
        UsageError: nothing is left to train.
    """
    model = held(model, options.tier, options.seed)
    if options.train is None:
        return model
    left = last_parts(model, options.train)
    if not left.parameters:
        parts, name = model.method.parts, model.method.name
        raise UsageError(f"the last {options.train} of {parts} parts have nothing that {name} trains", "train more of them")
    return left
