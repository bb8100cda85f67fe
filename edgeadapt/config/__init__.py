"""Configuration: strict TOML into frozen dataclasses, and where each value comes from.

A program declares a schema (`edgeadapt.config.schema`, with readers of `edgeadapt.config.values`) and calls `load`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from edgeadapt.config.building import Check, Finding, Loaded, build, in_order, placed
from edgeadapt.config.gathering import Gathered, Origin
from edgeadapt.config.schema import REQUIRED, Computed, chosen, section, setting
from edgeadapt.config.showing import Described, described, effective, example, shown
from edgeadapt.errors import ConfigError

__all__ = [
    "REQUIRED",
    "Check",
    "Computed",
    "Described",
    "Finding",
    "Loaded",
    "Origin",
    "chosen",
    "described",
    "effective",
    "example",
    "in_order",
    "load",
    "placed",
    "section",
    "setting",
    "shown",
    "usable",
]

C = TypeVar("C")


def load(
    schema: type[C],
    path: str | os.PathLike[str],
    needed: bool,
    environment: Mapping[str, str],
    settings: Sequence[str] = (),
    check: Check[C] | None = None,
) -> Loaded[C]:
    """A configuration from all its sources; a later one wins, key by key.

    They are: defaults, the file, `conf.d/*.toml` beside it sorted by name, variables `EDGEADAPT_SECTION__KEY`, and `settings`.

    Args:
        schema: a dataclass as `edgeadapt.config.schema` says.
        path: the file.
        needed: a fault where it is missing.
        environment: variables.
        settings: texts "section.key=value".
        check: looks at the whole for what no single key shows.

    Raises:
        ConfigError: with all faults of all sources.
    """
    gathered = _gathered(schema, path, needed, environment, settings)
    return build(schema, gathered, environment, check, str(path))


def usable(
    schema: type[C],
    path: str | os.PathLike[str],
    environment: Mapping[str, str],
    settings: Sequence[str] = (),
    check: Check[C] | None = None,
) -> tuple[C, tuple[str, ...], bool]:
    """What is left of a configuration with faults: sections in which there is one are as if nobody had given them. For who must go on all the same.

    Args:
        schema, path, environment, settings, check: as for `load`.

    Returns:
        the configuration; the names of the sections that were left out, sorted, of keys without a section the key; whether all files could be read.
    """
    gathered, without = _gathered(schema, path, False, environment, settings), set[str]()
    without |= {fault.key.split(".")[0] for fault in gathered.faults if fault.key}
    whole = all(fault.key for fault in gathered.faults)
    gathered.faults.clear()
    while True:
        gathered.given = [given for given in gathered.given if given.path[0] not in without]
        try:
            return build(schema, gathered, environment, check, str(path)).config, tuple(sorted(without)), whole
        except ConfigError as found:
            more = {fault.key.split(".")[0] for fault in found.faults} - without
            without |= more or {given.path[0] for given in gathered.given}
            if not more and not gathered.given:
                raise  # the defaults themselves are faulty, which a test sees


def _gathered(
    schema: type[C], path: str | os.PathLike[str], needed: bool, environment: Mapping[str, str], settings: Sequence[str]
) -> Gathered:
    gathered = Gathered(schema)
    gathered.file(path, needed)
    gathered.folder(Path(path).parent / "conf.d")
    gathered.environment(environment)
    gathered.settings(settings)
    return gathered
