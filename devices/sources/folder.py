"""A folder of image files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from edgeadapt.devices.sources import pictures
from edgeadapt.devices.sources.base import Frame, Source, Wanted
from edgeadapt.errors import InputError, SourceError


class Folder(Source):
    """The image files below a folder, sorted by name level by level; hidden ones are left out.

    If the folder holds one folder a class, frames come with their truth: where all names of these folders are names of classes, or where none is
    and there are as many folders as classes (then in sorted order).

    Args:
        path: the folder.
        wanted: what the bundle takes.

    Raises:
        SourceError: no such folder, or no image files can be read for this model.
    """

    def __init__(self, path: str | os.PathLike[str], wanted: Wanted) -> None:
        pictures.check(wanted.input)
        self.name, self._root, self._wanted = str(path), Path(path), wanted
        try:
            entries = _entries(self.name)
        except OSError as reason:
            raise SourceError(f"{path} cannot be opened: {reason.strerror}", "check the path and its permissions") from None
        self._classes = _classes([entry.name for entry in entries if _is_folder(entry)], wanted)
        self.labelled = bool(self._classes)

    def __iter__(self) -> Iterator[Frame]:
        for file, fault in _files(self.name, ()):
            parts = Path(file).relative_to(self._root).parts
            truth = self._classes.get(parts[0]) if len(parts) > 1 else None
            name = "/".join(parts)
            if fault:
                yield Frame(name, None, truth, fault)
                continue
            try:
                pixels = pictures.taken(file, self._wanted)
            except InputError as reason:
                yield Frame(name, None, truth, reason.message)
            else:
                yield Frame(name, pixels, truth)


def _classes(folders: list[str], wanted: Wanted) -> dict[str, int]:
    """Folder name to class, empty where the folders are no classes."""
    if wanted.task.kind != "classification" or not folders:
        return {}
    known = {name: label for name in folders if (label := wanted.label(name)) is not None}
    if known:
        return known if len(known) == len(folders) else {}
    return {name: index for index, name in enumerate(folders)} if len(folders) == wanted.task.classes else {}


def _entries(folder: str) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as found:
        return sorted((entry for entry in found if not entry.name.startswith(".")), key=lambda entry: entry.name)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


def _files(folder: str, above: tuple[tuple[int, int], ...]) -> Iterator[tuple[str, str]]:
    """(path, fault) of each image file; links are followed, but not into a folder that one is in already."""
    try:
        here = os.stat(folder)
        entries = _entries(folder)
    except OSError as reason:
        yield folder, f"cannot be opened: {reason.strerror}"
        return
    identity = (here.st_dev, here.st_ino)
    if identity in above:
        return
    for entry in entries:
        try:
            deeper = entry.is_dir()
        except OSError as reason:  # a link to itself, or into a folder that nobody may enter
            yield entry.path, f"cannot be opened: {reason.strerror}"
            continue
        if deeper:
            yield from _files(entry.path, (*above, identity))
        elif entry.name.lower().endswith(pictures.SUFFIXES):
            yield entry.path, ""
