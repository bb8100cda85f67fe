"""What a saved state says beside its tensors of what was learned: whether it was proven, and what there is to go back to."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeadapt.bundle import Manifest, tensors
from edgeadapt.bundle.reading import strict
from edgeadapt.errors import StateError

Array = NDArray[Any]

_SETS = ("start", "laid_by")


@dataclass(frozen=True)
class Copy:
    """Tensors by name, and whether steps that made them were taken while statistics followed wholly."""

    tensors: Mapping[str, Array]
    wholly: bool


@dataclass(frozen=True)
class Kept:
    """What a guard knows of a state.

    Attributes:
        proven: whether what steps change in it is the last good; else it is what the model is taken to have started as.
        wholly: whether that was learned while statistics followed wholly.
        start: where it is the last good, what the model is taken to have started as; None: the bundle's own.
        laid_by: where it is not, what was proven and is not in use; None: nothing.
    """

    proven: bool
    wholly: bool
    start: Copy | None = None
    laid_by: Copy | None = None

    def arrays(self) -> dict[str, Array]:
        """Its tensors, by names that no state tensor has: these are without spaces."""
        return {f"{which} {name}": array for which, copy in self._copies() for name, array in copy.tensors.items()}

    def text(self) -> str:
        """All but its tensors, for a header."""
        return json.dumps({"proven": self.proven, "wholly": self.wholly, **{which: copy.wholly for which, copy in self._copies()}}, sort_keys=True)

    def at_hand(self) -> Kept:
        """The same with its tensors in memory."""
        copies = {which: Copy(dict(copy.tensors), copy.wholly) for which, copy in self._copies()}
        return Kept(self.proven, self.wholly, **copies)

    def _copies(self) -> Iterator[tuple[str, Copy]]:
        for which in _SETS:
            if (copy := getattr(self, which)) is not None:
                yield which, copy


class Named(Mapping[str, Array]):
    """Some of the arrays of another mapping, by names of their own, each asked for when it is asked for.

    Args:
        found: the other mapping.
        names: its names, by ours.
    """

    def __init__(self, found: Mapping[str, Array], names: Mapping[str, str]) -> None:
        self._found, self._names = found, names

    def __getitem__(self, name: str) -> Array:
        """The array of that name; KeyError where there is none."""
        return self._found[self._names[name]]

    def __iter__(self) -> Iterator[str]:
        """Our names."""
        return iter(self._names)

    def __len__(self) -> int:
        """How many there are."""
        return len(self._names)


def parted(found: Mapping[str, Array], text: str | None, manifest: Manifest, where: str) -> tuple[Mapping[str, Array], Kept | None]:
    """A file's arrays as those of the state itself and what is kept beside; None where no guard has saved it.

    Raises:
        StateError: the text is not what `Kept.text` gives, or the arrays do not go with it or with the manifest.
    """
    if text is None:
        return found, None
    wrong = StateError(f"{where} says of what was learned what cannot be read", "take an older save")
    try:
        said = strict(text.encode())
    except ValueError:
        raise wrong from None
    if not isinstance(said, dict) or not {"proven", "wholly"} <= set(said) <= {"proven", "wholly", *_SETS}:
        raise wrong
    if any(type(value) is not bool for value in said.values()) or ("laid_by" if said["proven"] else "start") in said:
        raise wrong
    names: dict[str, dict[str, str]] = {which: {} for which in ("", *_SETS)}
    for name in found:
        which, _, own = name.rpartition(" ")
        if which not in names:
            raise wrong
        names[which][own] = name
    copies = {}
    for which in _SETS:
        if bool(names[which]) and which not in said:
            raise wrong
        if which in said:
            copies[which] = Copy(Named(found, names[which]), said[which])
            check(copies[which].tensors, manifest, where)
    return Named(found, names[""]), Kept(said["proven"], said["wholly"], **copies)


def check(found: Mapping[str, Array], manifest: Manifest, where: str) -> None:
    """See that these are tensors of a bundle's state as it may be, some or all of them; each is asked for once and not kept.

    Raises:
        StateError: one is not, or is not finite.
    """
    specs = {spec.name: spec for spec in manifest.state}
    for name in found:
        array = np.asarray(found[name])
        if name not in specs or array.dtype != specs[name].dtype or array.shape != specs[name].shape or not tensors.finite(array):
            raise StateError(f"{where} holds a tensor {name[:80]!r} that is not one of this bundle's state, or not finite", "take an older save")
        del array  # before the next is read
