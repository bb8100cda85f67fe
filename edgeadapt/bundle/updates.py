"""What a bundle's state says of how parameters and moments are held between steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgeadapt.bundle.manifest import StateSpec


@dataclass(frozen=True)
class Updates:
    """The tier, how many parameters are trained, and bytes for each of them, moments included."""

    tier: str
    parameters: int
    bytes: float


def updates_of(state: Sequence[StateSpec], options: Mapping[str, Any]) -> Updates | None:
    """How a state's parameters and moments are held; None where nothing is trained. options: the method's, as the manifest has them."""
    held = [spec for spec in state if spec.kind in ("parameter", "moment")]
    told = options.get("trainable")
    count = told if isinstance(told, int) and told > 0 else sum(spec.size for spec in held if spec.kind == "parameter")
    return Updates(str(options.get("updates", "reference")), count, sum(spec.nbytes for spec in held) / count) if count else None
