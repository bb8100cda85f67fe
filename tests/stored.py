"""Bundles for tests of the state folder, and states whose bytes tell what they are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from edgeadapt.bundle import Bundle, Manifest, tensors
from edgeadapt.runtime import checkpoint
from edgeadapt.runtime.checkpoint import Snapshot
from edgeadapt.runtime.daemon.store import Limits, Store
from tests.toybundle import Toy

LIMITS = Limits(spare=0)


class Files:
    """Bundles: `b` takes other states than `a`; `c` is another one that takes b's."""

    def __init__(self, folder: Path) -> None:
        made = {"a": Toy(4, 0, (1,), "norm"), "b": Toy(5, 0, (1,), "norm"), "c": Toy(5, 0, (1, 2), "norm")}
        self.paths = {name: toy.write(folder / f"{name}.edgeadapt") for name, toy in made.items()}
        self.manifests: dict[str, Manifest] = {}
        self.names = {}
        for name, path in self.paths.items():
            bundle = Bundle.open(path)
            self.manifests[name], self.names[bundle.digest] = bundle.manifest, name


def snapshot(manifest: Manifest, seed: int) -> Snapshot:
    """A state that its seed can be read from."""
    rng = np.random.default_rng(seed)
    return Snapshot({spec.name: rng.standard_normal(spec.shape, dtype=np.float32) for spec in manifest.state}, {"frames": seed}, {})


def seed_of(path: Path | None, manifest: Manifest) -> int | None:
    """The seed, where all of the state is of it."""
    if path is None:
        return None
    found, header = tensors.read(path)
    seed = int(header["counters"].split(":")[1].rstrip(" }"))
    assert all((found[name] == value).all() for name, value in snapshot(manifest, seed).tensors.items()), "a mixture"
    return seed


class Daemon:
    """A store with a clock of its own, as its daemon uses it."""

    def __init__(self, folder: Path, files: Files, limits: Limits = LIMITS) -> None:
        self.folder, self.files, self.time = folder, files, 1000.0
        self.store = Store.open(folder, limits, clock=lambda: self.time)

    @property
    def serving(self) -> str:
        assert self.store._bundle is not None
        return self.files.names[self.store._bundle.digest]

    def boot(self) -> tuple[str, int | None]:
        """The name of the bundle that is started with, and the seed of the state."""
        found = self.store.begin_boot()
        name = self.files.names[found.installed.digest]
        return name, seed_of(found.state, self.files.manifests[name])

    def boots(self, count: int) -> list[tuple[str, int | None]]:
        return [self.boot() for _ in range(count)]

    def commit(self, seed: int, always: bool = False) -> float:
        manifest = self.files.manifests[self.serving]
        return self.store.commit(snapshot(manifest, seed).at_hand, manifest, always)

    def proven(self, seed: int) -> None:
        """A state that is the last good."""
        assert self.commit(seed, True) == 0.0
        self.time += LIMITS.probation
        assert self.store.left == 0.0
        assert self.store.settled()

    def slot(self, seed: int) -> Path:
        """The file that a state is in."""
        manifest = self.files.manifests[self.serving]
        paths = sorted((self.folder / "slots" / checkpoint.compatible(manifest)[:16]).iterdir())
        return next(path for path in paths if f'"frames": {seed}}}' in tensors.read(path)[1]["counters"])

    def events(self) -> list[str]:
        return [entry["event"] for entry in self.store.happened()]


@contextmanager
def begun(folder: Path, files: Files) -> Iterator[Daemon]:
    """With bundle a installed, started and proven."""
    found = Daemon(folder, files)
    with found.store:
        found.store.install(files.paths["a"])
        assert found.boot() == ("a", None)
        found.time += LIMITS.probation
        assert found.store.settled()
        yield found
