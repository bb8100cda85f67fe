"""The scalars that may be changed while an adapter runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping

from edgeadapt.bundle import HyperSpec
from edgeadapt.errors import UsageError


class Hyper(MutableMapping[str, float]):
    """A mapping from the bundle's scalars to their present values; what is set is checked. None can be added or removed.

    A scalar that was never set shows the manifest's default, but a graph may have one of its own for its batch. One that was set holds for all.

    Args:
        specs: the scalars of the manifest.
    """

    def __init__(self, specs: Mapping[str, HyperSpec]) -> None:
        self._specs = specs
        self._chosen: dict[str, float] = {}

    def __getitem__(self, name: str) -> float:
        return self._chosen[name] if name in self._chosen else self._specs[name].default

    def __setitem__(self, name: str, value: float) -> None:
        self._chosen[name] = self.checked(name, value)

    def __delitem__(self, name: str) -> None:
        raise UsageError(f"{name!r} cannot be removed", "set it to another value")

    def __iter__(self) -> Iterator[str]:
        return iter(self._specs)

    def __len__(self) -> int:
        return len(self._specs)

    def __repr__(self) -> str:
        return f"Hyper({dict(self)!r})"

    def checked(self, name: str, value: float) -> float:
        """The value as a float.

        Raises:
            UsageError: the bundle has no such scalar, or the value is not a number in its range.
        """
        spec = self._specs.get(name)
        if spec is None:
            raise UsageError(f"this bundle has no scalar {name!r}", f"it has {', '.join(self._specs) or 'none'}")
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise UsageError(f"{name} is a number, not {value!r}", f"give one from {spec.low:g} to {spec.high:g}") from None
        if not spec.low <= number <= spec.high:
            raise UsageError(f"{name} = {number:g} is out of range", f"give one from {spec.low:g} to {spec.high:g}")
        return number

    @property
    def chosen(self) -> dict[str, float]:
        """Those that were set."""
        return dict(self._chosen)

    def with_(self, changes: Mapping[str, float]) -> dict[str, float]:
        """Those that were set, with checked changes for one call.

        Raises:
            UsageError: as `checked`.
        """
        return {**self._chosen, **{name: self.checked(name, value) for name, value in changes.items()}}

    def restore(self, chosen: Mapping[str, float]) -> None:
        """Goes back to what `chosen` was, less what this bundle does not have or does not allow."""
        known = ((name, value, self._specs.get(name)) for name, value in chosen.items())
        self._chosen = {name: value for name, value, spec in known if spec is not None and spec.low <= value <= spec.high}
